"""What a process has of its own: a clock, and threads that take virtual time."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rowmill.handlers.errors import HandlerTimeoutError
from rowmill.state.memory import MemoryStore, MemoryStores
from rowmill.state.model import TopicPartition
from rowmill.state.store import Change, Store

from simulation.loop import SimLoop

T = TypeVar("T")

EPOCH_MS = 1_750_000_000_000


class SimClock:
    """The loop's time, as this machine's clock tells it, and the seed's chance.

    Args:
        skew_ms: by how much its wall clock is wrong.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, skew_ms: int = 0) -> None:
        self._loop = loop
        self._chance = chance
        self._skew_ms = skew_ms

    def now_ms(self) -> int:
        """Wall-clock milliseconds."""
        return EPOCH_MS + self._skew_ms + int(self._loop.time() * 1000)

    def monotonic(self) -> float:
        """Virtual seconds."""
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        """Sleep virtually."""
        await asyncio.sleep(seconds)

    def random(self) -> float:
        """The seed's next number."""
        return self._chance.random()

    def token(self) -> str:
        """Eight hexadecimal digits."""
        return f"{self._chance.getrandbits(32):08x}"


class SimStores(MemoryStores):
    """A machine's disk as one process sees it. The content outlives the process, as on a disk.

    Args:
        disk: the content, by group and partition.
        on_write: told of what is written, before it is; may raise StoreError.
    """

    def __init__(
        self,
        disk: dict[tuple[str, TopicPartition], dict[bytes, bytes]],
        on_write: Callable[[TopicPartition, Sequence[Change]], None],
    ) -> None:
        super().__init__()
        self._contents = disk
        self._on_write = on_write

    def open(self, group: str, tp: TopicPartition) -> Store:
        """The store of a partition."""
        super().open(group, tp)
        store = _SimStore(f"sim:{group}/{tp}", self._contents[group, tp], lambda changes: self._on_write(tp, changes))
        self._stores[group, tp] = store
        return store


class _SimStore(MemoryStore):
    def __init__(self, name: str, content: dict[bytes, bytes], on_write: Callable[[Sequence[Change]], None]) -> None:
        super().__init__(name, content)
        self._on_write = on_write

    def write(self, changes: Iterable[Change]) -> None:
        """Apply all of these or none."""
        listed = list(changes)
        self._on_write(listed)
        super().write(listed)


class SimPool:
    """Stands for BlockingPool: calls run on the loop after a while, and their results take another while to come.

    As with threads, a call that has begun goes on when nobody waits for it any more, and its result is thrown away.

    Args:
        delay: mean seconds before a call begins, and again before its result is there; 0 for none at all.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, delay: float) -> None:
        self._loop = loop
        self._chance = chance
        self._delay = delay
        self.abandoned = 0
        self._busy = 0.0

    def busy(self, seconds: float) -> None:
        """The call that runs now takes so long; called from inside it."""
        self._busy += seconds

    async def run(self, call: Callable[..., T], *arguments: Any, timeout: float | None = None) -> T:
        """As BlockingPool.run."""
        outcome: asyncio.Future[T] = self._loop.create_future()
        context = contextvars.copy_context()
        self._later(self._begin, outcome, lambda: context.run(call, *arguments))
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await outcome
        except TimeoutError:
            if not limit.expired():
                raise
            raise HandlerTimeoutError(f"no result within {timeout:g} s") from None

    def _begin(self, outcome: asyncio.Future[T], call: Callable[[], T]) -> None:
        if not outcome.cancelled():
            self._later(self._execute, outcome, call)

    def _execute(self, outcome: asyncio.Future[T], call: Callable[[], T]) -> None:
        self._busy = 0.0
        result: Any = None
        error: BaseException | None = None
        try:
            result = call()
        except BaseException as raised:  # noqa: BLE001 - whatever it is belongs to the caller
            error = raised
        if isinstance(error, StopIteration):
            error = RuntimeError("the handler raised StopIteration")
        busy, self._busy = self._busy, 0.0
        self._loop.call_later(busy, self._settle, outcome, result, error)

    def _settle(self, outcome: asyncio.Future[T], result: Any, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is None:
            outcome.set_result(result)
        else:
            outcome.set_exception(error)

    def _later(self, act: Callable[..., None], *arguments: Any) -> None:
        if self._delay:
            self._loop.call_later(self._chance.expovariate(1 / self._delay), act, *arguments)
        else:
            self._loop.call_soon(act, *arguments)

    def close(self) -> None:
        """Nothing is kept."""
