"""What the stages of one worker share: threads, time, slots, and the state behind their policies.

Law 1: between two partition tasks nothing is shared but this. One object per worker; a chain run in a notebook, in a
test or by ``Pipeline.process`` gets one of its own. Handlers reach it as ``ctx.runtime``: elements that run stages of
their own (graphs, routers) need it, others hardly ever do.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..state.answers import AnswerStores, MemoryAnswerStores
from ..state.artifacts import ArtifactStore
from ..state.clock import Clock, SystemClock
from ..state.errors import ConfigError
from .breaker import Breaker, State
from .budget import Account
from .cache import Origin, Share, StageCache
from .costs import CostTracker
from .executors import BlockingPool
from .limits import Limiter
from .stage import Stage

if TYPE_CHECKING:
    from .calls import TimeLimit
    from .flow import Lanes
    from .policed import Policed
    from .processes import ProcessPool

log = logging.getLogger(__name__)


class Event(NamedTuple):
    """Something that people want to hear of: a breaker that opened, a budget that is used up, a row that failed.

    ``kind`` is a stable name (docs/events.md lists them), ``subject`` the resource or stage, ``detail`` JSON.
    """

    kind: str
    subject: str
    detail: dict[str, Any]


@dataclass(slots=True)
class StageCounts:
    """What happened in a stage in this worker since it started. Not exactly once: calls count when they are made.

    Attributes:
        calls: calls of the handler, retries included.
        retries: of these, the second and further ones for a row.
        timeouts: calls that took longer than the stage's ``timeout``.
        failures: rows (or batches) that failed for good, before any fallback.
        defaulted: of these, those that went on with a fallback.
        refused: of these, those that met an open breaker.
        passed_by: rows that the stage's ``when`` was not for.
        hits: answers that came from the cache.
        seconds: time spent in calls.
    """

    calls: int = 0
    retries: int = 0
    timeouts: int = 0
    failures: int = 0
    defaulted: int = 0
    refused: int = 0
    passed_by: int = 0
    hits: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


class Runtime:
    """Shared by all stages of one worker.

    Args:
        pool: threads for plain and blocking handlers; whoever made it closes it.
        clock: time and chance; default: the machine's.
        answers: where caches keep answers; default: in memory.
        artifacts: where large values go; default: nowhere, so that asking for it is an error.
        processes: how many processes CPU-bound handlers get; default: one per core.
    """

    def __init__(
        self,
        pool: BlockingPool,
        clock: Clock | None = None,
        *,
        answers: AnswerStores | None = None,
        artifacts: ArtifactStore | None = None,
        processes: int | None = None,
    ) -> None:
        self.pool = pool
        self.clock = clock or SystemClock()
        self.answers = answers or MemoryAnswerStores()
        self.share: Share | None = None
        """Takes answers of caches with ``shared=True`` for other workers."""
        self.artifacts = artifacts
        self.account: Account | None = None
        """What paid calls are settled with, where the session has a budget."""
        self.costs = CostTracker()
        """What calls of stages with policies cost, by stage."""
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._process_count = processes
        self._processes: ProcessPool | None = None
        self._caches: dict[str, StageCache] = {}
        self.listeners: list[Callable[[Event], object]] = [_log]
        """Told of every event; one that raises is logged, and harms nobody."""
        self.traced: Callable[[Stage], Stage] | None = None
        """Gives stages spans, where rows are traced; for those inside of elements, which are made by the user."""
        self._ending: asyncio.Event | None = None
        self._ends_at: float | None = None
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._lanes: dict[str, Lanes] = {}
        self._counts: dict[str, StageCounts] = {}
        self._breakers: dict[str, Breaker] = {}
        self._limiters: dict[str, Limiter] = {}
        self._policed: dict[str, Policed] = {}
        self._time_limits: dict[str, TimeLimit] = {}

    def slots(self, stage: Stage) -> asyncio.Semaphore:
        """The stage's slots: how many of its calls may run at once, over all partitions.

        An element has no end of them: the stages inside it have their own.
        """
        slots = self._slots.get(stage.name)
        if slots is None:
            slots = self._slots[stage.name] = asyncio.Semaphore(sys.maxsize if stage.stages else stage.concurrency)
        return slots

    def lanes(self, stage: Stage) -> Lanes:
        """The stage's lanes, which take rows of all flows in turn: what calls its handler for most of them."""
        lanes = self._lanes.get(stage.name)
        if lanes is None:
            from .flow import Lanes

            lanes = self._lanes[stage.name] = Lanes(stage.concurrency)
        return lanes

    @property
    def processes(self) -> ProcessPool:
        """Processes for handlers of stages with ``executor="process"``; made when first asked for."""
        if self._processes is None:
            from .processes import ProcessPool

            self._processes = ProcessPool(self._process_count)
        return self._processes

    def end(self, seconds: float) -> None:
        """The session ends within so many seconds: rows that wait for longer are given up, now and from now on."""
        self._ends_at = self.clock.monotonic() + seconds
        self.ending.set()

    @property
    def ending(self) -> asyncio.Event:
        """Set once the session ends."""
        if self._ending is None:
            self._ending = asyncio.Event()
        return self._ending

    def go_on(self) -> None:
        """It does not end after all: it was paused. Rows wait again for as long as they like."""
        self._ends_at = None
        self._ending = None

    def may_wait(self, seconds: float | None) -> bool:
        """Whether a row may wait for so long; None: nobody knows how long."""
        if self._ends_at is None:
            return True
        return seconds is not None and self.clock.monotonic() + seconds < self._ends_at

    def at_close(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Have something closed with the worker: connections of components, say."""
        self._closers.append(closer)

    async def close(self) -> None:
        """End the processes, and what :meth:`at_close` was told of. Threads and answers: whoever made them."""
        closers, self._closers = self._closers, []
        for closer in closers:
            try:
                await closer()
            except Exception:
                log.exception("closing %s failed", closer)
        processes, self._processes = self._processes, None
        if processes is not None:
            await processes.close()

    def cache(self, stage: Stage) -> StageCache | None:
        """The stage's cache, if it has one."""
        if stage.cache is None:
            return None
        cache = self._caches.get(stage.name)
        if cache is None:
            answers = self.answers.open(stage.name, stage.cache.max_bytes)
            share = self._share if stage.cache.shared else None
            cache = StageCache(stage.cache, stage.name, stage.asked, answers, self.clock, share)
            self._caches[stage.name] = cache
        return cache

    def _share(self, stage: str, origin: Origin, key: bytes, value: bytes, expires_ms: int | None) -> None:
        if self.share is not None:
            self.share(stage, origin, key, value, expires_ms)

    @property
    def caches(self) -> dict[str, StageCache]:
        """Caches by stage, as far as they were used."""
        return self._caches

    def counts(self, stage: Stage) -> StageCounts:
        """The stage's counts."""
        counts = self._counts.get(stage.name)
        if counts is None:
            counts = self._counts[stage.name] = StageCounts()
        return counts

    def policed(self, stage: Stage) -> Policed:
        """The stage's policies at work here."""
        policed = self._policed.get(stage.name)
        if policed is None:
            from .policed import Policed

            policed = self._policed[stage.name] = Policed(stage, self)
        return policed

    def time_limit(self, stage: Stage) -> TimeLimit | None:
        """The limit of each call of an async stage, if it has one."""
        if stage.timeout is None:
            return None
        limit = self._time_limits.get(stage.name)
        if limit is None:
            from .calls import TimeLimit

            limit = self._time_limits[stage.name] = TimeLimit(stage.timeout)
        return limit

    def breaker(self, stage: Stage) -> Breaker | None:
        """The breaker of the stage's resource, if it has one."""
        spec = stage.breaker
        if spec is None:
            return None
        name = spec.name or stage.name
        breaker = self._breakers.get(name)
        if breaker is None:
            breaker = self._breakers[name] = Breaker(spec, self.clock, self._teller(name))
        return breaker

    def limiter(self, stage: Stage) -> Limiter | None:
        """The limits of the stage's resource, if it has any."""
        spec = stage.limit
        if spec is None:
            return None
        name = spec.name or stage.name
        limiter = self._limiters.get(name)
        if limiter is None:
            limiter = self._limiters[name] = Limiter(spec, self.clock)
        return limiter

    @property
    def stage_counts(self) -> dict[str, StageCounts]:
        """Counts by stage, of those that have any."""
        return self._counts

    @property
    def breakers(self) -> dict[str, Breaker]:
        """Breakers by resource, as far as they were used."""
        return self._breakers

    def tell(self, event: Event) -> None:
        """Tell every listener, in the caller's thread: they are quick, and bear being called from any."""
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed at %s", event)

    def _teller(self, name: str) -> Callable[[State, State, dict[str, Any]], None]:
        return lambda _, state, why: self.tell(Event(f"breaker_{state}", name, why))


def _log(event: Event) -> None:
    """Breakers' events; all others are logged where they are known best, or would be too many."""
    if event.kind.startswith("breaker_"):
        level = logging.WARNING if event.kind == "breaker_open" else logging.INFO
        log.log(level, "%s: %s %s", event.subject, event.kind, event.detail or "")


def check_resources(stages: Sequence[Stage]) -> None:
    """Stages that share a breaker or a limit by name must mean the same.

    Raises:
        ConfigError: they do not.
    """
    seen: dict[tuple[str, str], Any] = {}
    for stage in stages:
        for option, spec in (("breaker", stage.breaker), ("limit", stage.limit)):
            if spec is None:
                continue
            present = seen.setdefault((option, spec.name or stage.name), spec)
            if present != spec:
                raise ConfigError(
                    f"stage({option}=)", spec, f"{present} has the same name; share one object, or name them apart"
                )
