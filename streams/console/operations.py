"""What takes a while and must not be done twice at once: sending dead letters again, marking them, moving a session.

It goes on when whoever asked for it has gone, and is asked about then. Of each session only one is under way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ...state.clock import Clock
from ..deadlines import deadline
from .answers import RefusedRequestError, described

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""How long a request waits for the end; then it is told that it goes on."""
MOST_SECONDS = 900.0
_AT_ONCE = 8
_REMEMBERED = 500
_GOODBYE_SECONDS = 5.0

Work = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(slots=True)
class Progress:
    """How far some work is; the work fills it in. ``total``: of how many, None while nobody knows."""

    done: Callable[[], int] = lambda: 0
    total: int | None = None


@dataclass(slots=True)
class Operation:
    """One of them. ``result`` or ``error`` is there when it has ended; times are milliseconds since the epoch."""

    kind: str
    group: str
    by: str
    started_ms: int
    ended_ms: int | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    progress: Progress = field(default_factory=Progress)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        told = {name: getattr(self, name) for name in self.__slots__ if name != "progress"}
        return {
            **told, "done": self.progress.done(), "total": self.progress.total, "running": self.ended_ms is None,
        }  # fmt: skip


class Operations:
    """Runs them, each in a task of its own.

    Args:
        clock: time.
        patience: seconds that a request waits.
    """

    def __init__(self, *, clock: Clock, patience: float = PATIENCE_SECONDS) -> None:
        self._clock = clock
        self._patience = patience
        self._last: OrderedDict[str, Operation] = OrderedDict()
        self._running: dict[str, asyncio.Task[dict[str, Any]]] = {}

    def last(self, group: str) -> Operation | None:
        """The last one of a session; None if there was none since the console started."""
        return self._last.get(group)

    async def run(self, kind: str, group: str, by: str, work: Work, progress: Progress | None = None) -> dict[str, Any]:
        """Do it.

        Args:
            kind: what it is.
            group: the session.
            by: who asked for it.
            work: does it.
            progress: what it tells of how far it is.

        Returns:
            Its result; or, where it takes longer than a request waits, the operation, whose ``running`` is true.

        Raises:
            RefusedRequestError: another one of this session is under way, or too many of others.
            Exception: what the work raised.
        """
        present = self._last.get(group)
        if group in self._running and present is not None:
            raise RefusedRequestError(
                409, "session", group, f"a {present.kind} is under way, by {present.by}: wait until it has ended"
            )
        if len(self._running) >= _AT_ONCE:
            raise RefusedRequestError(503, "session", group, "others are under way: try again soon", retry_after=5)
        operation = Operation(kind, group, by, self._clock.now_ms(), progress=progress or Progress())
        self._last[group] = operation
        self._last.move_to_end(group)
        while len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
        task = self._running[group] = asyncio.create_task(self._do(operation, work))
        task.add_done_callback(lambda _: self._running.pop(group, None))
        await asyncio.wait({task}, timeout=self._patience)
        if not task.done():
            task.add_done_callback(_look_at)
            return operation.to_dict()
        return task.result()

    async def _do(self, operation: Operation, work: Work) -> dict[str, Any]:
        log.info("%s: %s by %s begins", operation.group, operation.kind, operation.by)
        try:
            async with deadline(MOST_SECONDS, f"{operation.group}: {operation.kind}"):
                operation.result = await work()
        except asyncio.CancelledError:
            operation.error = {"message": "the console was stopped meanwhile; what was done stays"}
            raise
        except Exception as error:
            operation.error = described(error)[1]["error"]
            raise
        finally:
            operation.ended_ms = self._clock.now_ms()
        return operation.result

    async def close(self) -> None:
        """End what is under way, within some seconds. What is done so far stays, and nothing is left half done."""
        running = set(self._running.values())
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_GOODBYE_SECONDS)


def _look_at(task: asyncio.Task[dict[str, Any]]) -> None:
    """Nobody waits any more: its error was noted."""
    if not task.cancelled():
        task.exception()
