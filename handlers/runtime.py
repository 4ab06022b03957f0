"""What the stages of one worker share: threads, time, slots, and the state behind their policies.

Law 1: between two partition tasks nothing is shared but this. One object per worker; a chain run in a notebook, in a
test or by ``Pipeline.process`` gets one of its own. Handlers reach it as ``ctx.runtime``: elements that run stages of
their own (graphs, routers) need it, others hardly ever do.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..state.answers import AnswerStores, MemoryAnswerStores
from ..state.artifacts import ArtifactStore
from ..state.clock import Clock, SystemClock
from ..state.codec import all_dicts
from ..state.errors import ConfigError
from ..state.sketch import Sketch
from .breaker import Breaker, State
from .budget import Account
from .cache import Origin, Share, StageCache
from .costs import CostTracker
from .executors import BlockingPool
from .limits import Limiter
from .outcomes import Outcome
from .stage import Handler, Stage
from .stage_counts import Passage, StageCounts
from .stage_times import StageTimes

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
        self._counting = threading.Lock()
        self._called_by_row: list[StageCounts] = []
        self._times: dict[str, StageTimes] = {}
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
            counts = self._counts.setdefault(stage.name, StageCounts(is_policed=stage.is_policed))  # on any thread
            if not stage.is_policed and stage.batch is None:
                self._called_by_row.append(counts)
        return counts

    def times(self, stage: Stage) -> StageTimes:
        """How long the stage's calls take."""
        times = self._times.get(stage.name)
        if times is None:
            times = self._times.setdefault(stage.name, StageTimes(self.clock))
        return times

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
        for counts in self._called_by_row:
            counts.calls = counts.rows - counts.passed_by  # one for each: no need to count both
        return self._counts

    def note_passage(self, passage: Passage) -> None:
        """Rows went through fused stages, on any thread."""
        with self._counting:
            passage.add_to([self.counts(stage) for stage in passage.stages])

    def note_outcomes(self, stage: Stage, outcomes: Sequence[Outcome]) -> None:
        """Rows of a batch are through, on any thread."""
        counts = self.counts(stage)
        with self._counting:
            if all_dicts(outcomes):
                counts.rows += len(outcomes)
                return
            for outcome in outcomes:
                counts.note(outcome)

    def timed(self, stages: Sequence[Stage]) -> Sequence[Handler] | None:
        """What to call instead of these plain stages' handlers for one row, if one is to be timed now."""
        made = [self.counts(stage).rows for stage in stages]
        times = [self.times(stage) for stage in stages]
        if made[0] < times[0].due:
            return None
        return [each.timed(stage.call, rows) for each, stage, rows in zip(times, stages, made, strict=True)]

    def new_latency(self) -> dict[str, Sketch]:
        """How long calls took, by stage: a sample of those since this was asked before."""
        counts = self.stage_counts
        return {name: times.take(counts[name].calls) for name, times in self._times.items()}

    def latency(self) -> dict[str, Sketch]:
        """The same of the last half minute, or somewhat more."""
        counts = self.stage_counts
        return {name: times.recent(counts[name].calls) for name, times in self._times.items()}

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
