"""Rows on their way through a chain one by one, many at a time, completing in any order.

A :class:`Flow` belongs to one partition task. A row enters it as a :class:`Flight`, passes the chain's segments
one after the other, and comes out through ``on_done``, whatever became of it. Three kinds of segments:

* plain stages: whatever has come together runs in one go on a thread of the pool;
* a stage of one row per call that is async, timed or concurrent: up to ``concurrency`` lanes take row after row.
  Lanes, not a task per row: creating a task costs more than everything else the engine does for a row;
* batch and frame stages: up to ``batch`` rows, or what has come together within ``linger`` seconds.

Ordering is settled at the entrance: with ``key``, a row waits there until the row of its key that came before it is
done, so no segment needs to know of it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias

from ..state.model import Row
from .chain import Chain, Failure, Outcome, attempt, run_lots, run_segment
from .context import RowContext
from .runtime import Runtime
from .stage import Stage

_PLAIN_ROWS = 500
_CLOSE_SECONDS = 1.0


class Flight:
    """One row on its way: its value so far, and whatever its sender wants to recognise it by."""

    __slots__ = ("context", "key", "sender", "value")

    def __init__(self, value: Outcome, context: RowContext | None, key: object, sender: Any) -> None:
        self.value = value
        self.context = context
        self.key = key
        self.sender = sender


OnDone: TypeAlias = "Callable[[Flight], Callable[[], Coroutine[Any, Any, None]] | None]"
"""Called with every row that is through; may return what has to run to its end before the row's key goes on."""


class Flow:
    """Runs flights through a chain.

    Args:
        chain: the stages.
        runtime: what the worker's stages share.
        on_done: called on the event loop with every flight that is through, failed or dropped.
        on_error: called when an error of the flow's own, not of a handler, waits for :meth:`check`.
        by_key: whether rows of one key (other than None) run one after the other, in the order they entered.
        linger: seconds that a row waits for company before a batch or frame stage.
    """

    def __init__(
        self,
        chain: Chain,
        runtime: Runtime,
        on_done: OnDone,
        on_error: Callable[[], None],
        *,
        by_key: bool,
        linger: float,
    ) -> None:
        self._on_done = on_done
        self._on_error = on_error
        self._by_key = by_key
        self._waiting: dict[object, deque[Flight]] = {}
        self._through: deque[object] = deque()  # keys whose row is done
        self._releasing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self.is_closed = False
        """Whether :meth:`close` was called: nothing begins and nothing comes out any more."""
        segment: _Segment | None = None
        for stages in reversed(chain.segments):
            leave = segment.enter if segment is not None else self._done
            segment = _make_segment(self, stages, runtime, leave, linger)
        assert segment is not None  # noqa: S101 - a chain has stages
        self._first = segment

    def enter(self, flight: Flight) -> None:
        """Start a row, or queue it behind the rows of its key."""
        if self._by_key and flight.key is not None:
            queue = self._waiting.get(flight.key)
            if queue is not None:
                queue.append(flight)
                return
            self._waiting[flight.key] = deque()
        self._first.enter(flight)

    def _done(self, flight: Flight) -> None:
        if self.is_closed:
            return
        later = self._on_done(flight)
        if later is None:
            self._release(flight)
        else:
            self.start(self._release_after(later, flight))

    async def _release_after(self, later: Callable[[], Coroutine[Any, Any, None]], flight: Flight) -> None:
        await later()
        self._release(flight)

    def _release(self, flight: Flight) -> None:
        """Let the next row of the key begin.

        A loop, not a call within a call: rows that failed before they came here are through as soon as they begin,
        and a thousand of one key may wait.
        """
        if not self._by_key or flight.key is None:
            return
        self._through.append(flight.key)
        if self._releasing:
            return
        self._releasing = True
        try:
            while self._through and not self.is_closed:
                key = self._through.popleft()
                queue = self._waiting[key]
                if queue:
                    self._first.enter(queue.popleft())
                else:
                    del self._waiting[key]
        finally:
            self._releasing = False

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run part of a segment's work. An error in it is a bug of ours, and is raised by :meth:`check`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()
            self._on_error()

    def check(self) -> None:
        """Raise what went wrong inside the flow itself; handlers' errors never do, they are rows' failures."""
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Cancel everything under way; nothing comes out any more."""
        self.is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:  # a handler may swallow its cancellation: it is not waited for, and gets no further row
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)


def _make_segment(
    flow: Flow,
    stages: tuple[Stage, ...],
    runtime: Runtime,
    leave: Callable[[Flight], None],
    linger: float,
) -> _Segment:
    first = stages[0]
    if first.batch is not None:
        return _Batches(flow, first, runtime, leave, linger)
    return _Plain(flow, stages, runtime, leave) if first.is_plain else _Lanes(flow, first, runtime, leave)


class _Segment(ABC):
    """Part of the chain, with a queue before it and a way on behind it."""

    def __init__(self, flow: Flow, leave: Callable[[Flight], None]) -> None:
        self._flow = flow
        self._leave = leave
        self._queue: deque[Flight] = deque()

    def enter(self, flight: Flight) -> None:
        """Queue a row; one that is done already (dropped, failed) only passes through."""
        if flight.value is None or flight.value.__class__ is Failure:
            self._leave(flight)
            return
        self._queue.append(flight)
        self._wake()

    @abstractmethod
    def _wake(self) -> None:
        """Something is in the queue: see that somebody works on it."""


class _Plain(_Segment):
    """Fused plain stages: what has come together while the last lot ran is the next one."""

    def __init__(
        self, flow: Flow, stages: tuple[Stage, ...], runtime: Runtime, leave: Callable[[Flight], None]
    ) -> None:
        super().__init__(flow, leave)
        self._stages = stages
        self._runtime = runtime
        self._busy = False

    def _wake(self) -> None:
        if not self._busy:
            self._busy = True
            self._flow.start(self._work())

    async def _work(self) -> None:
        try:
            while self._queue:
                lot = [self._queue.popleft() for _ in range(min(len(self._queue), _PLAIN_ROWS))]
                values, contexts = _columns(lot)
                await self._runtime.pool.run(run_segment, self._stages, values, contexts)
                _hand_on(lot, values, self._leave)
        finally:
            self._busy = False


class _Lanes(_Segment):
    """One call per row, several calls at once."""

    def __init__(
        self,
        flow: Flow,
        stage: Stage,
        runtime: Runtime,
        leave: Callable[[Flight], None],
    ) -> None:
        super().__init__(flow, leave)
        self._stage = stage
        self._runtime = runtime
        self._slots = runtime.slots(stage)
        self._lanes = 0

    def _wake(self) -> None:
        if self._lanes < self._stage.concurrency:
            self._lanes += 1
            self._flow.start(self._lane())

    async def _lane(self) -> None:
        """Row after row until none is left: the hot path of async rows."""
        queue, slots, stage, runtime, leave = self._queue, self._slots, self._stage, self._runtime, self._leave
        try:
            while queue and not self._flow.is_closed:
                async with slots:
                    if not queue:  # other lanes were quicker
                        break
                    flight = queue.popleft()
                    value = flight.value
                    if value.__class__ is dict:
                        flight.value = await attempt(stage, value, flight.context, runtime)
                    else:
                        flight.value = await _attempt_all(stage, value, flight.context, runtime)
                leave(flight)
        finally:
            self._lanes -= 1


class _Batches(_Segment):
    """Several rows per call: as many as the stage takes, or as have come within ``linger``."""

    def __init__(
        self,
        flow: Flow,
        stage: Stage,
        runtime: Runtime,
        leave: Callable[[Flight], None],
        linger: float,
    ) -> None:
        super().__init__(flow, leave)
        self._stage = stage
        self._runtime = runtime
        self._slots = runtime.slots(stage)
        self._linger = linger
        self._timer: asyncio.TimerHandle | None = None

    def _wake(self) -> None:
        if len(self._queue) >= (self._stage.batch or 1):
            self._send()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._linger, self._send)

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        size = self._stage.batch or 1
        lot = [self._queue.popleft() for _ in range(min(size, len(self._queue)))]
        if lot:
            self._flow.start(self._call(lot))

    async def _call(self, lot: list[Flight]) -> None:
        values, contexts = _columns(lot)
        async with self._slots:
            await run_lots(self._stage, values, contexts, self._runtime)
        _hand_on(lot, values, self._leave)


def _columns(lot: Sequence[Flight]) -> tuple[list[Outcome], list[RowContext] | None]:
    contexts = [flight.context for flight in lot if flight.context is not None]
    return [flight.value for flight in lot], contexts if len(contexts) == len(lot) else None


def _hand_on(lot: Sequence[Flight], values: Sequence[Outcome], leave: Callable[[Flight], None]) -> None:
    for flight, value in zip(lot, values, strict=True):
        flight.value = value if value != [] else None
        leave(flight)


async def _attempt_all(stage: Stage, rows: Any, context: RowContext | None, runtime: Runtime) -> Outcome:
    """A row that an earlier stage split: each part in turn; one failure is the failure of all."""
    out: list[Row] = []
    for row in rows:
        outcome = await attempt(stage, row, context, runtime)
        if isinstance(outcome, Failure):
            return outcome
        out += outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]
    return out or None
