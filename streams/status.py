"""How all sessions stand, from what the broker has: it can be asked while no worker runs.

What counts is read from offsets, groups, the control topic and the changelogs' checkpoints, which are exact. What only
a live worker knows (rates, rows in work, breakers) is its newest word on ``rowmill.events``, and is missing without.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar

from ..handlers.errors import LedgerError
from ..state.clock import Clock
from ..state.codec import loads
from ..state.context import sum_costs
from ..state.execution import ExecutionState
from ..state.model import Committed, TopicPartition
from ..state.sketch import Sketch
from .brokers.base import Broker, MemberInfo, TopicInfo
from .deadlines import deadline
from .errors import BrokerError, TopicError
from .event_records import EVENTS_TOPIC
from .known_sessions import KnownSession, find_sessions
from .ledger import LedgerReport, read_ledger
from .session_records import SessionRecord
from .session_refs import short_name
from .status_memory import Counted, TailMemory, WordMemory
from .status_state import Derived, derive
from .status_workers import WorkerStatus, WorkerWord, words_of, workers_of

log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW_SECONDS = 12.0
"""How far back workers' words are read: their rates are those of this time."""
_AT_ONCE = 16
"""Sessions that are asked about side by side."""
_ATTEMPTS = 3
_COUNTS = ("rows", "results", "dropped", "skipped", "defaulted", "dead_letters", "emitted")


@dataclass(frozen=True, slots=True)
class RowCounts:
    """What became of a session's rows, exact since its beginning.

    Attributes:
        rows: those that are done.
        ok: of these, those that gave at least one result.
        dropped: of these, those that a handler gave no result for, on purpose; also where it emitted instead.
        skipped: of these, those that failed in a stage that says ``on_error="skip"``.
        dead_letters: of these, those that failed for good.
        defaulted: of the ``ok`` ones, those in which a fallback took a failed stage's place.
        results: written to the sink.
        emitted: written elsewhere.
    """

    rows: int = 0
    ok: int = 0
    dropped: int = 0
    skipped: int = 0
    dead_letters: int = 0
    defaulted: int = 0
    results: int = 0
    emitted: int = 0

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> RowCounts:
        """From a checkpoint's counts."""
        known = {name: int(counts.get(name, 0)) for name in _COUNTS}
        left = known["rows"] - known["dropped"] - known["skipped"] - known["dead_letters"]
        return cls(ok=max(0, left), **known)

    def plus(self, other: RowCounts) -> RowCounts:
        """Both together."""
        return RowCounts(*(getattr(self, name) + getattr(other, name) for name in _fields(self)))

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return {name: getattr(self, name) for name in _fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionStatus:
    """One partition of a session's source.

    Attributes:
        tp: which.
        committed: the group's committed offset; None: nothing was committed.
        end: the log's end, transactions under way included (the high watermark).
        lag: ``end - committed``, as Kafka's consumer-groups tool has it; None where nothing was committed.
        waiting: offsets that are left to do: ``lag``, or all that the partition holds where nothing was committed; of a
            session with an end, up to there. On Kafka transactions' markers are among them.
        until: where a session with an end is complete; None while nobody knows, and for the others.
        worker: the name of the worker that owns it; "" for none.
        state: ``opening``, ``running`` or ``paused`` as its worker says; "" where nobody says.
        in_flight: rows in work.
        oldest_offset: the lowest offset in work; None if there is none.
        oldest_seconds: how long that row has been in work.
        full: what keeps its worker from beginning further rows, as a :class:`PartitionSnapshot` has it.
        rows: what became of its rows.
        committed_ms: when it was committed last; None where nothing was.
    """

    tp: TopicPartition
    committed: int | None = None
    end: int = 0
    lag: int | None = None
    waiting: int = 0
    until: int | None = None
    worker: str = ""
    state: str = ""
    in_flight: int = 0
    oldest_offset: int | None = None
    oldest_seconds: float | None = None
    full: str = ""
    rows: RowCounts = field(default_factory=RowCounts)
    committed_ms: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "topic": self.tp.topic,
            "partition": self.tp.partition,
            "committed": self.committed,
            "end": self.end,
            "lag": self.lag,
            "waiting": self.waiting,
            "until": self.until,
            "worker": self.worker or None,
            "state": self.state or None,
            "in_flight": self.in_flight,
            "oldest_offset": self.oldest_offset,
            "oldest_seconds": _rounded(self.oldest_seconds),
            "full": self.full or None,
            "rows": self.rows.to_dict(),
            "committed_at": iso_time(self.committed_ms),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetStatus:
    """A session's budget by its ledger.

    Attributes:
        limit: the highest total.
        spent: what workers said to have spent.
        held: leased to workers and not said to be spent; what a dead worker held stays so, and counts as spent.
    """

    limit: Decimal
    spent: Decimal
    held: Decimal

    def to_dict(self) -> dict[str, str]:
        """As JSON."""
        return {"limit": f"{self.limit:f}", "spent": f"{self.spent:f}", "held": f"{self.held:f}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatus:
    """How one session stands. Times are milliseconds since the epoch.

    Attributes:
        reference: how people name it: ``reviews`` for the live one, ``reviews.NAME`` for another.
        record: what the control topic has of it, or what was found out.
        is_registered: whether the control topic has it.
        state: what it does.
        activity: what to show for it: the state, or ``pausing``, ``resuming``, ``cancelling``, ``stopping``.
        at_ms: when this was looked up.
        workers: those that live.
        partitions: of its sources.
        rows: what became of its rows.
        cost, tokens: what its completed rows cost.
        budget: None where it has no ledger.
        breakers: the worst state of each over all workers: ``closed``, ``half_open``, ``open``.
        stages: what live workers counted by stage since they started.
        latency: ``p50``, ``p95`` and ``p99`` of the times of calls by stage, in seconds, in the time looked at.
        rate: rows per second over the last ten seconds or so; None where no worker says.
        lag: what is left to do, in offsets: the sum of the partitions' ``waiting``.
        percent: how much of a session with an end is done, 0 to 100; None for the others.
        total_rows: rows that it has in all; None while that is unknown, and for sessions without an end.
        left_seconds: how long it takes at its present rate; None where that cannot be told.
        started_ms: when it began; None if it never did.
        active_ms: its last sign of life; None if there is none.
        problem: why something of it could not be read; "" for nothing.
    """

    reference: str
    record: SessionRecord
    is_registered: bool
    state: ExecutionState
    activity: str
    at_ms: int
    workers: tuple[WorkerStatus, ...] = ()
    partitions: tuple[PartitionStatus, ...] = ()
    rows: RowCounts = field(default_factory=RowCounts)
    cost: Decimal = Decimal(0)
    tokens: int = 0
    budget: BudgetStatus | None = None
    breakers: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    latency: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    rate: float | None = None
    lag: int = 0
    percent: float | None = None
    total_rows: int | None = None
    left_seconds: float | None = None
    started_ms: int | None = None
    active_ms: int | None = None
    problem: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself: it is complete, cancelled or failed."""
        return self.state in {ExecutionState.COMPLETED, ExecutionState.CANCELLED, ExecutionState.FAILED}

    @property
    def oldest(self) -> PartitionStatus | None:
        """The partition whose row has been in work for longest."""
        return max(
            (each for each in self.partitions if each.oldest_seconds is not None),
            key=lambda each: each.oldest_seconds or 0.0,
            default=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON. Names and meanings are kept from release to release; fields may be added."""
        record, oldest = self.record, self.oldest
        return {
            "session": self.reference,
            "group": record.group,
            "pipeline": record.pipeline,
            "id": record.session,
            "state": self.state.value,
            "activity": self.activity,
            "wanted": record.wanted.value,
            "wanted_by": record.changed_by or None,
            "wanted_at": iso_time(record.changed_ms),
            "reason": record.reason or None,
            "failure": record.failure or None,
            "failed_at": iso_time(record.failed_ms),
            "registered": self.is_registered,
            "bounded": record.is_bounded,
            "sources": list(record.sources),
            "sink": record.sink or None,
            "dead_letters_topic": record.dead_letters or None,
            "tables": list(record.tables),
            "stage_names": list(record.stages),
            "at": iso_time(self.at_ms),
            "started_at": iso_time(self.started_ms),
            "active_at": iso_time(self.active_ms),
            "rows": self.rows.to_dict(),
            "rows_per_second": _rounded(self.rate),
            "lag": self.lag,
            "percent": _rounded(self.percent),
            "total_rows": self.total_rows,
            "seconds_left": _rounded(self.left_seconds),
            "cost": f"{self.cost:f}",
            "tokens": self.tokens,
            "budget": None if self.budget is None else self.budget.to_dict(),
            "breakers": dict(self.breakers),
            "stages": {name: dict(counts) for name, counts in self.stages.items()},
            "latency": {name: dict(quantiles) for name, quantiles in self.latency.items()},
            "oldest_row": None
            if oldest is None
            else {
                "topic": oldest.tp.topic,
                "partition": oldest.tp.partition,
                "offset": oldest.oldest_offset,
                "seconds": _rounded(oldest.oldest_seconds),
            },
            "workers": [worker.to_dict() for worker in self.workers],
            "partitions": [partition.to_dict() for partition in self.partitions],
            "problem": self.problem or None,
        }


async def session_statuses(
    broker: Broker, *, clock: Clock, timeout: float = 30.0, group: str | None = None
) -> list[SessionStatus]:
    """How every session stands.

    Args:
        broker: a started one.
        clock: the present time.
        timeout: seconds that each call to the broker may take.
        group: of this session only.

    Returns:
        By group. [] where there is no such session.

    Raises:
        BrokerError: the broker does not answer.
        TopicError: topics are removed again and again while they are being looked at.
    """
    return await StatusReader(broker, clock=clock, timeout=timeout).statuses(group)


class StatusReader:
    """Looks at sessions again and again, and reads only what is new where that makes no difference. One at a time.

    Args:
        broker: a started one.
        clock: the present time.
        timeout: seconds that each call to the broker may take.
    """

    def __init__(self, broker: Broker, *, clock: Clock, timeout: float = 30.0) -> None:
        self._broker = broker
        self._clock = clock
        self._timeout = timeout
        self._tails = TailMemory()
        self._words = WordMemory()

    async def statuses(self, group: str | None = None) -> list[SessionStatus]:
        """How every session stands, or this one; arguments and errors are those of :func:`session_statuses`."""
        for attempt in range(_ATTEMPTS):
            try:
                return await _Look(self._broker, self._clock, self._timeout, self._tails, self._words).statuses(group)
            except TopicError:  # a session was removed at this very moment
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")


# --- what is read of the broker --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Found:
    """What the broker has of one session."""

    known: KnownSession
    partitions: tuple[TopicPartition, ...]
    committed: Mapping[TopicPartition, Committed | None] = field(default_factory=dict)
    members: Sequence[MemberInfo] = ()
    ledger: LedgerReport | None = None
    published: Committed | None = None
    problem: str = ""


@dataclass(slots=True)
class _Logs:
    """Where partitions of sources begin and end, and what changelogs' last checkpoints count."""

    first: Mapping[TopicPartition, int]
    ends: Mapping[TopicPartition, int]
    counted: Mapping[TopicPartition, Counted]
    words: Mapping[str, Sequence[WorkerWord]]
    has_events: bool


class _Look:
    """One look at the broker: few calls for all sessions together, and the rest side by side.

    Args:
        broker: a started one.
        clock: the present time.
        timeout: seconds that each call may take.
        tails, words: what was read before.
    """

    def __init__(self, broker: Broker, clock: Clock, timeout: float, tails: TailMemory, words: WordMemory) -> None:
        self._broker = broker
        self._clock = clock
        self._timeout = timeout
        self._tails = tails
        self._words_before = words
        self._topics: Mapping[str, TopicInfo] = {}
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def statuses(self, group: str | None) -> list[SessionStatus]:
        known = await find_sessions(self._broker, clock=self._clock, timeout=self._timeout)
        self._topics = await self._ask("look topics up", self._broker.topics)
        found = [
            _Found(each, _partitions(each.record, self._topics))
            for each in known.values()
            if group is None or each.record.group == group
        ]
        if not found:
            return []
        logs = asyncio.create_task(self._logs(found))
        try:
            await _together(self._read(each) for each in found)
            statuses = []
            for each in found:
                statuses.append(_status(each, await logs, self._clock.now_ms()))
                await asyncio.sleep(0)  # many sessions are some tenths of a second of work
            return statuses
        finally:
            logs.cancel()
            await asyncio.wait({logs})

    async def _logs(self, found: Sequence[_Found]) -> _Logs:
        everywhere = sorted({tp for each in found for tp in each.partitions})
        changelogs = [tp for each in found for tp in self._changelogs(each)]
        groups = {each.known.record.group for each in found}
        words, counted = await asyncio.gather(
            self._words(groups), self._tails.read(self._broker, changelogs, timeout=self._timeout)
        )
        first = await self._ask("look up where topics begin", lambda: self._broker.offsets(everywhere, "earliest"))
        ends = await self._ask("look up where topics end", lambda: self._broker.offsets(everywhere, "high_watermark"))
        return _Logs(first, ends, counted, words or {}, has_events=words is not None and EVENTS_TOPIC in self._topics)

    def _changelogs(self, found: _Found) -> Iterable[TopicPartition]:
        for tp in found.partitions:
            changelog = changelog_of(found.known, tp)
            if changelog.topic in self._topics and changelog.partition < self._topics[changelog.topic].partitions:
                yield changelog

    async def _words(self, groups: Collection[str]) -> Mapping[str, Sequence[WorkerWord]] | None:
        """What workers said lately; None where that cannot be read: all that counts is known without it."""
        since_ms = self._clock.now_ms() - round(WINDOW_SECONDS * 1000)
        try:
            events = await self._words_before.recent(
                self._broker, since_ms=since_ms, groups=groups, clock=self._clock, timeout=self._timeout
            )
        except (BrokerError, TopicError) as error:
            log.warning("the workers' events cannot be read, so rates and rows in work are missing: %s", error)
            return None
        return words_of(events)

    async def _read(self, found: _Found) -> None:
        """What belongs to one session only."""
        async with self._room:
            broker, group = self._broker, found.known.record.group
            found.members = await self._ask(f"look up who is in {group}", lambda: broker.members(group))
            if found.partitions:
                found.committed = await self._ask(
                    f"read the offsets of {group}", lambda: broker.committed(group, found.partitions)
                )
            await self._read_publisher(found)
            if found.known.session.budget in self._topics:
                await self._read_ledger(found)

    async def _read_publisher(self, found: _Found) -> None:
        record, publisher = found.known.record, found.known.session.publisher_id
        if record.owns_source and found.partitions:
            mark = found.partitions[0]
            answer = await self._ask(
                f"read the offsets of {publisher}", lambda: self._broker.committed(publisher, [mark])
            )
            found.published = answer[mark]

    async def _read_ledger(self, found: _Found) -> None:
        topic = found.known.session.budget
        try:
            found.ledger = await read_ledger(self._broker, topic, clock=self._clock, timeout=self._timeout)
        except LedgerError as error:
            found.problem = str(error)

    async def _ask(self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        async with deadline(self._timeout, what):
            return await call()


async def _together(works: Iterable[Awaitable[None]]) -> None:
    """All of them; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(_coroutine(work))
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors


async def _coroutine(work: Awaitable[None]) -> None:
    await work


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _partitions(record: SessionRecord, topics: Mapping[str, TopicInfo]) -> tuple[TopicPartition, ...]:
    return tuple(
        TopicPartition(source, partition)
        for source in record.sources
        if source in topics
        for partition in range(topics[source].partitions)
    )


def changelog_of(known: KnownSession, tp: TopicPartition) -> TopicPartition:
    """The changelog's partition of a source's partition."""
    return TopicPartition(known.session.changelog(tp.topic), tp.partition)


# --- what it means ---------------------------------------------------------------------------------------------


def _status(found: _Found, logs: _Logs, now_ms: int) -> SessionStatus:
    record = found.known.record
    status = SessionStatus(
        reference=short_name(record.group),
        record=record,
        is_registered=found.known.is_registered,
        state=ExecutionState.IDLE,
        activity="",
        at_ms=now_ms,
        workers=workers_of(
            found.members,
            logs.words.get(record.group, ()),
            now_ms,
            should_speak=found.known.is_registered and logs.has_events,
        ),
        budget=_budget(found.ledger),
        problem=found.problem,
    )
    ends = _ends(found, logs)
    status = _with_partitions(status, found, logs, ends)
    status = _with_checkpoints(status, found, logs)
    phases = [worker.phase for worker in status.workers]
    derived = derive(record, phases, is_complete=bool(ends) and not status.lag)
    return _with_progress(_with_words(status), derived, found)


def _ends(found: _Found, logs: _Logs) -> Mapping[TopicPartition, int] | None:
    """Where the session is complete: as was noted, or where its publisher said that it had published all."""
    record = found.known.record
    if not record.is_bounded:
        return None
    if record.ends is not None:
        return record.ends if set(record.ends) <= set(found.partitions) else None
    if record.owns_source and _is_published(found.published):
        return {tp: logs.ends[tp] for tp in found.partitions}
    return None


def _is_published(mark: Committed | None) -> bool:
    if mark is None:
        return False
    try:
        return loads(mark.metadata)["done"] is True
    except (ValueError, KeyError, TypeError):
        return False


def _with_partitions(
    status: SessionStatus, found: _Found, logs: _Logs, ends: Mapping[TopicPartition, int] | None
) -> SessionStatus:
    owners = {tp: worker for worker in status.workers for tp in worker.partitions}
    partitions = []
    for tp in found.partitions:
        checkpoint, end = found.committed.get(tp), logs.ends[tp]
        committed = None if checkpoint is None else checkpoint.offset
        until = None if ends is None else ends.get(tp, 0)
        begin, goal = logs.first[tp] if committed is None else committed, end if until is None else until
        owner = owners.get(tp)
        said: Mapping[str, Any] = owner.said_of(tp) if owner is not None else {}
        partitions.append(
            PartitionStatus(
                tp=tp,
                committed=committed,
                end=end,
                lag=None if committed is None else end - committed,
                waiting=max(0, goal - begin),
                until=until,
                worker=owner.name if owner is not None else "",
                state=str(said.get("state", "")),
                in_flight=int(said.get("in_flight") or 0),
                oldest_offset=said.get("oldest_offset"),
                oldest_seconds=said.get("oldest_seconds"),
                full=str(said.get("full") or ""),
            )
        )
    return replace(status, partitions=tuple(partitions), lag=sum(each.waiting for each in partitions))


def _with_checkpoints(status: SessionStatus, found: _Found, logs: _Logs) -> SessionStatus:
    """What the changelogs know: counts, costs and times, exact."""
    partitions, sound, rows = [], [], RowCounts()
    problem = status.problem
    for partition in status.partitions:
        counted = logs.counted.get(changelog_of(found.known, partition.tp))
        if counted is not None and counted.problem:
            problem = problem or counted.problem
        elif counted is not None:
            sound.append(counted)
            counts = RowCounts.of(counted.counts)
            rows = rows.plus(counts)
            partition = replace(partition, rows=counts, committed_ms=counted.at_ms)
        partitions.append(partition)
    record = found.known.record
    begun = [counted.started_ms for counted in sound]
    signs = [record.changed_ms, record.failed_ms, record.started_ms, *(p.committed_ms or 0 for p in partitions)]
    return replace(
        status,
        partitions=tuple(partitions),
        rows=rows,
        cost=sum_costs(*(counted.cost for counted in sound)),
        tokens=sum(counted.tokens for counted in sound),
        started_ms=record.started_ms or min(begun, default=0) or None,
        active_ms=max(signs) or None,
        problem=problem,
    )


def _with_words(status: SessionStatus) -> SessionStatus:
    """What live workers say."""
    rates = [worker.rate for worker in status.workers if worker.rate is not None]
    breakers: dict[str, str] = {}
    stages: dict[str, dict[str, float]] = {}
    timed: dict[str, list[Mapping[str, Any]]] = {}
    for worker in status.workers:
        for name, state in worker.breakers.items():
            breakers[name] = max(state, breakers.get(name, "closed"), key=_severity)
        for name, sketches in worker.latency.items():
            timed.setdefault(name, []).extend(sketches)
        for name, counts in worker.stages.items():
            summed = stages.setdefault(name, {})
            for figure, number in counts.items():
                summed[figure] = summed.get(figure, 0) + number
    latency = {name: _quantiles(sketches) for name, sketches in timed.items()}
    return replace(status, rate=sum(rates) if rates else None, breakers=breakers, stages=stages, latency=latency)


def _quantiles(sketches: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    sketch = Sketch.of_all(sketches)
    return {name: sketch.quantile(fraction) for name, fraction in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


_SEVERITY = ("closed", "half_open", "open")


def _severity(state: str) -> int:
    return _SEVERITY.index(state) if state in _SEVERITY else -1


def _with_progress(status: SessionStatus, derived: Derived, found: _Found) -> SessionStatus:
    record, is_complete = status.record, derived.state is ExecutionState.COMPLETED
    percent, total = None, None
    if record.is_bounded:
        total = _total(status, found, is_complete=is_complete)
        percent = 100.0 if is_complete else None
        if percent is None and total:
            percent = min(99.9, 100 * status.rows.rows / total)
        elif percent is None and total == 0:
            percent = 0.0
    left = None
    if status.rate and not is_complete and (record.is_bounded or status.lag):
        left = status.lag / status.rate
    return replace(
        status,
        state=derived.state,
        activity=derived.activity,
        lag=0 if is_complete else status.lag,
        percent=percent,
        total_rows=total,
        left_seconds=left,
    )


def _total(status: SessionStatus, found: _Found, *, is_complete: bool) -> int | None:
    """All rows of a session with an end: as published, else those that are done and the offsets that are left."""
    if is_complete:
        return status.rows.rows
    if found.known.record.owns_source:
        return found.published.offset if found.published is not None and _is_published(found.published) else None
    return status.rows.rows + status.lag


def _budget(ledger: LedgerReport | None) -> BudgetStatus | None:
    if ledger is None:
        return None
    held = min(ledger.used, sum_costs(*(worker.open for worker in ledger.workers)))
    return BudgetStatus(limit=ledger.limit, spent=ledger.used - held, held=held)


def _fields(counts: RowCounts) -> tuple[str, ...]:
    return tuple(type(counts).__dataclass_fields__)


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)


def iso_time(at_ms: int | None) -> str | None:
    """``2026-11-21T18:00:00.123Z``; None for never."""
    if not at_ms:
        return None
    moment = datetime.fromtimestamp(at_ms // 1000, UTC).replace(microsecond=at_ms % 1000 * 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
