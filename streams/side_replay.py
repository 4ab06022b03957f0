"""Side replay: a session of its own over a range of the source topics, which leaves the live one alone.

The range is fixed when the session begins, and kept as offsets of the group ``<group>.input`` (as a bounded run keeps
its position in the input file): a moment or "the end" must mean the same when a killed session is gone on with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from zlib import crc32

from ..state.clock import Clock, SystemClock
from ..state.codec import dumps, loads
from ..state.errors import ConfigError
from ..state.model import Committed, Record, TopicPartition
from .brokers.base import (
    AssignmentListener,
    Broker,
    BrokerInfo,
    Member,
    MemberInfo,
    Moment,
    Producer,
    Reader,
    TopicInfo,
    TopicSpec,
    TransactionalProducer,
)
from .catalog import Catalog
from .collect import partitions_of
from .deadlines import deadline
from .errors import CheckpointError, FencedError, SessionError, TopicError
from .offset_times import EARLIEST, END, Place
from .options import WorkerOptions, state_folder
from .partition_state import CHANGELOG_CONFIG
from .session import LIVE, Session
from .transaction import Transactor, read_checkpoint

_VERSION = 1

Range: TypeAlias = tuple[int, int]
"""The first offset, and the one behind the last."""
_EndOf: TypeAlias = Callable[[TopicPartition], int]


@dataclass(frozen=True, slots=True)
class Asked:
    """The part of the sources that a session is to run.

    Attributes:
        begin, end: places; in every partition.
        only: partitions by topic, None for all of a topic; None: all of all sources.
        text: how it was written, to be compared when the session is gone on with; None: nothing was said.
    """

    begin: Place = EARLIEST
    end: Place = END
    only: Mapping[str, frozenset[int] | None] | None = None
    text: str | None = None


async def open_range(
    broker: Broker,
    session: Session,
    sources: Sequence[str],
    asked: Asked,
    *,
    has_tables: bool,
    options: WorkerOptions | None = None,
    clock: Clock | None = None,
) -> dict[TopicPartition, Range]:
    """The session's range: as it was fixed when it began; or fix it now, and have its group begin there.

    Args:
        broker: a started one.
        session: which; not the live one.
        sources: the topics it reads.
        asked: what to run.
        has_tables: whether the pipeline has any.
        options: time limits.
        clock: time.

    Raises:
        ConfigError: the session is the live one, or a partition is not there.
        SessionError: there is a session of this name that is something else, or has another range.
        TopicError: a source does not exist.
        BrokerError: the broker does not answer.
    """
    if session.is_live:
        raise ConfigError("--session", LIVE, "this is the session that reads the source topics; choose another name")
    options, clock = options or WorkerOptions(), clock or SystemClock()
    producer = broker.transactional_producer(session.publisher_id)
    try:
        async with deadline(options.broker_timeout, f"session {session.id}: open its range"):
            await producer.start()  # what a former start of the session fixed is final from here on
            tps = await _partitions(broker, sources)
            if await broker.pending(session.publisher_id, tps):
                await producer.settle([], session.publisher_id, {}, commit=False)
            found = await _stored(broker, session, tps)
            if not found:
                await _check_unused(broker, session, sources, tps)
                found = await _measure(broker, tps, asked)
                await _store(producer, session, found, asked)
            else:
                await _check_same(broker, session, tps, asked)
    except FencedError as error:
        raise SessionError(f"session {session.id!r} was started elsewhere at the same moment") from error
    finally:
        await producer.close()
    await _begin(broker, session, found, has_tables=has_tables, options=options, clock=clock)
    return found


async def stored_range(broker: Broker, session: Session, sources: Collection[str]) -> dict[TopicPartition, Range]:
    """The range of a side replay; {} for sessions of another kind.

    Raises:
        CheckpointError: it cannot be read.
        BrokerError: the broker does not answer.
    """
    if session.is_live:
        return {}
    return await _stored(broker, session, await partitions_of(broker, sorted(sources)))


def answers_apart(options: WorkerOptions, broker: Broker, session: Session) -> str:
    """A state folder in which no other session's cached answers are: with it, a session calls its handlers itself.

    Its own answers are there, so that it does not pay twice when it is gone on with after a kill.
    """
    return str(state_folder(options, broker) / "no-cache" / session.group)


# --- the range -------------------------------------------------------------------------------------------------


async def _partitions(broker: Broker, sources: Sequence[str]) -> list[TopicPartition]:
    tps = await partitions_of(broker, sources)
    for source in sources:
        if not any(tp.topic == source for tp in tps):
            raise TopicError(f"topic {source!r} does not exist on {broker.url}; `rowmill topics` lists them")
    return tps


async def _stored(broker: Broker, session: Session, tps: Sequence[TopicPartition]) -> dict[TopicPartition, Range]:
    marks = await broker.committed(session.publisher_id, tps)
    return {tp: (_note(session, mark)["begin"], mark.offset) for tp, mark in marks.items() if mark is not None}


def _note(session: Session, mark: Committed) -> dict[str, int]:
    try:
        note = loads(mark.metadata)
        if note["v"] == _VERSION:
            return {"begin": int(note["begin"]), "asked": int(note["asked"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_unreadable(session, mark)) from error
    raise CheckpointError(_unreadable(session, mark))


def _unreadable(session: Session, mark: Committed) -> str:
    return (
        f"session {session.id!r}: its range, in group {session.publisher_id}, cannot be read "
        f"({mark.metadata[:100]!r}); use another session name"
    )


async def _check_unused(
    broker: Broker, session: Session, sources: Sequence[str], tps: Sequence[TopicPartition]
) -> None:
    committed = await broker.committed(session.group, tps)
    input_topic = TopicPartition(f"{sources[0]}.{session.id}", 0)
    is_a_run = (await broker.committed(session.publisher_id, [input_topic]))[input_topic] is not None
    if is_a_run or any(committed.values()):
        kind = "ran a file" if is_a_run else "reads the source topics without a range (rowmill worker --session)"
        raise SessionError(f"there is a session {session.id!r} that {kind}; use another session name")


async def _check_same(broker: Broker, session: Session, tps: Sequence[TopicPartition], asked: Asked) -> None:
    marks = await broker.committed(session.publisher_id, tps)
    if asked.text is None or all(m is None or _note(session, m)["asked"] == _digest(asked) for m in marks.values()):
        return
    raise SessionError(
        f"session {session.id!r} was started with another range; leave out --from, --until and --topic to go on with "
        "it, or use another session name"
    )


def _digest(asked: Asked) -> int:
    return crc32((asked.text or "").encode())


async def _measure(broker: Broker, tps: Sequence[TopicPartition], asked: Asked) -> dict[TopicPartition, Range]:
    first = await broker.offsets(tps, "earliest")
    end = await broker.offsets(tps, "high_watermark")
    begins, ends = await _offsets(broker, tps, asked.begin), await _offsets(broker, tps, asked.end)
    ranges: dict[TopicPartition, Range] = {}
    for tp in tps:
        if not _is_chosen(tp, asked.only):
            ranges[tp] = (first[tp], first[tp])
            continue
        begin = min(max(begins[tp], first[tp]), end[tp])
        ranges[tp] = (begin, max(begin, min(ends[tp], end[tp])))
    _check_partitions(tps, asked.only)
    return ranges


async def _offsets(broker: Broker, tps: Sequence[TopicPartition], place: Place) -> dict[TopicPartition, int]:
    if place.kind == "offset":
        return dict.fromkeys(tps, place.value)
    at: Moment = place.value if place.kind == "time" else "earliest" if place.kind == "earliest" else "high_watermark"
    return await broker.offsets(tps, at)


def _is_chosen(tp: TopicPartition, only: Mapping[str, frozenset[int] | None] | None) -> bool:
    if only is None:
        return True
    some = only.get(tp.topic, frozenset())
    return some is None or tp.partition in some


def _check_partitions(tps: Sequence[TopicPartition], only: Mapping[str, frozenset[int] | None] | None) -> None:
    for topic, some in (only or {}).items():
        for number in sorted(some or ()):
            if TopicPartition(topic, number) not in tps:
                count = sum(tp.topic == topic for tp in tps)
                raise ConfigError("--topic", f"{topic}:{number}", f"{topic} has partitions 0 to {count - 1}")


async def _store(
    producer: TransactionalProducer,
    session: Session,
    ranges: Mapping[TopicPartition, Range],
    asked: Asked,
) -> None:
    """All partitions at once: half a range would be another one."""
    marks = {}
    for tp, (begin, end) in ranges.items():
        note = {"v": _VERSION, "begin": begin, "asked": _digest(asked)}
        marks[tp] = Committed(end, dumps(note).decode())
    await producer.begin()
    await producer.commit_offsets(session.publisher_id, marks)
    await producer.end()


async def _begin(
    broker: Broker,
    session: Session,
    ranges: Mapping[TopicPartition, Range],
    *,
    has_tables: bool,
    options: WorkerOptions,
    clock: Clock,
) -> None:
    """Have the group begin where the range does, in partitions in which it has not begun."""
    counts: dict[str, int] = {}
    for tp in ranges:
        counts[tp.topic] = max(counts.get(tp.topic, 0), tp.partition + 1)
    catalog = Catalog(broker, create=True, partitions=None, timeout=options.broker_timeout)
    changelogs = {session.changelog(topic): count for topic, count in counts.items()}
    await catalog.require_own(changelogs, CHANGELOG_CONFIG, may_grow=not has_tables)
    for tp, (begin, _) in ranges.items():
        if await read_checkpoint(broker, session.group, tp, options.broker_timeout) is not None:
            continue
        transactor = Transactor(broker, session, tp, options, clock)
        try:
            if await transactor.open() is None:
                await transactor.commit({}, Committed(begin), _never_ours)
        finally:
            await transactor.close()


async def _never_ours() -> bool | None:
    """Nothing is written to the changelog, so it is not asked."""
    return None


# --- a broker that ends early ----------------------------------------------------------------------------------


class EarlyEnd(Broker):
    """The same broker, whose source topics end at the range's end for whoever processes them.

    A worker's :meth:`~rowmill.streams.worker.Worker.finish_at` says when it may stop, not what it must not touch:
    rows behind the end would run while other partitions are not there yet.

    Args:
        broker: a started one; to start and close this object does nothing.
        ends: by partition of the sources; others of these topics have no rows at all.
        clock: for waiting.
    """

    def __init__(self, broker: Broker, ends: Mapping[TopicPartition, int], clock: Clock | None = None) -> None:
        self._broker = broker
        self._ends = dict(ends)
        self._sources = {tp.topic for tp in ends}
        self._clock = clock or SystemClock()
        self.url = broker.url
        self.default_partitions = broker.default_partitions
        self.folder = broker.folder
        self.session_timeout = broker.session_timeout
        self.max_message_bytes = broker.max_message_bytes

    async def start(self) -> None:
        """It is."""

    async def close(self) -> None:
        """Whoever opened it closes it."""

    async def info(self) -> BrokerInfo:
        """As it is."""
        return await self._broker.info()

    async def topics(self) -> dict[str, TopicInfo]:
        """As they are."""
        return await self._broker.topics()

    async def record_limits(self, topics: Collection[str]) -> dict[str, int]:
        """As they are."""
        return await self._broker.record_limits(topics)

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Make topics."""
        await self._broker.create_topics(specs)

    async def grow_topic(self, name: str, partitions: int) -> None:
        """Add partitions."""
        await self._broker.grow_topic(name, partitions)

    async def delete_topics(self, names: Collection[str]) -> None:
        """Remove topics."""
        await self._broker.delete_topics(names)

    async def offsets(self, partitions: Collection[TopicPartition], at: Moment) -> dict[TopicPartition, int]:
        """Where ``at`` is; in the sources, never behind the range's end."""
        found = await self._broker.offsets(partitions, at)
        if at == "earliest":
            return found
        return {tp: min(offset, self._end(tp)) if tp.topic in self._sources else offset for tp, offset in found.items()}

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, Committed | None]:
        """As they are."""
        return await self._broker.committed(group, partitions)

    async def pending(self, group: str, partitions: Collection[TopicPartition]) -> frozenset[TopicPartition]:
        """As they are."""
        return await self._broker.pending(group, partitions)

    async def groups(self) -> list[str]:
        """As they are."""
        return await self._broker.groups()

    async def members(self, group: str) -> list[MemberInfo]:
        """As they are."""
        return await self._broker.members(group)

    async def delete_groups(self, names: Collection[str]) -> None:
        """Forget groups."""
        await self._broker.delete_groups(names)

    def reader(self) -> Reader:
        """A reader of everything: changelogs, sinks, and single rows of the source."""
        return self._broker.reader()

    def member(self, group: str, topics: Collection[str]) -> Member:
        """A member that is given no row behind the end."""
        return _EarlyMember(self._broker.member(group, topics), self._end, self._clock)

    def producer(self) -> Producer:
        """As ever."""
        return self._broker.producer()

    def transactional_producer(self, transactional_id: str, *, timeout: float | None = None) -> TransactionalProducer:
        """As ever."""
        return self._broker.transactional_producer(transactional_id, timeout=timeout)

    def _end(self, tp: TopicPartition) -> int:
        return self._ends.get(tp, 0)


class _EarlyMember(Member):
    """A member that stops at an offset in each partition."""

    def __init__(self, member: Member, end: _EndOf, clock: Clock) -> None:
        self._member = member
        self._end = end
        self._clock = clock
        self._passed: set[TopicPartition] = set()

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        """As ever."""
        await self._member.start(positions)

    async def join(self, listener: AssignmentListener) -> None:
        """As ever."""
        await self._member.join(listener)

    def begin(self, tp: TopicPartition, offset: int) -> None:
        """As ever; one that begins at its end is not asked for."""
        self._note(tp, offset)
        self._member.begin(tp, offset)

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """As ever."""
        self._note(tp, offset)
        self._member.seek(tp, offset)

    def _note(self, tp: TopicPartition, offset: int) -> None:
        if offset >= self._end(tp):
            self._passed.add(tp)
        else:
            self._passed.discard(tp)

    async def fetch(
        self, partitions: Collection[TopicPartition], max_records: int, timeout: float
    ) -> dict[TopicPartition, Sequence[Record]]:
        """The records below the ends."""
        wanted = [tp for tp in partitions if tp not in self._passed]
        if not wanted:
            await self._clock.sleep(timeout)
            return {}
        got = await self._member.fetch(wanted, max_records, timeout)
        return {tp: self._cut(tp, records) for tp, records in got.items()}

    def _cut(self, tp: TopicPartition, records: Sequence[Record]) -> Sequence[Record]:
        end = self._end(tp)
        if not records or records[-1].offset < end:
            return records
        self._passed.add(tp)
        return [record for record in records if record.offset < end]

    async def position(self, tp: TopicPartition) -> int:
        """Never behind the end: the worker commits no further."""
        position, end = await self._member.position(tp), self._end(tp)
        if position >= end:
            self._passed.add(tp)
        return min(position, end)

    async def commit(self, offsets: Mapping[TopicPartition, Committed]) -> None:
        """As ever."""
        await self._member.commit(offsets)

    async def leave(self) -> None:
        """As ever."""
        await self._member.leave()

    async def close(self) -> None:
        """As ever."""
        await self._member.close()
