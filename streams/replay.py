"""Replay: move a session's position in its source topics, so that rows run again or are left out.

The live session has to be stopped. A partition moves in one transaction of its own transactional id, which fences
whoever worked on it: the new offset with an empty map, the changelog's checkpoint record that agrees with it, and,
where tables are reset, a deletion for each of their entries. So each partition has moved, or has not, whatever kills
the command; run again, it moves the others.

What stays: the context's counts, costs and tokens. They are sums of the work that was done, so rows that run again
count again. What is forgotten: the offset map, and the deaths that rows were seen at.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple, TypeAlias
from zlib import crc32

from ..state.checkpoint import CHECKPOINT_KEY, CheckpointRecord, crc_of
from ..state.clock import Clock, SystemClock
from ..state.context import ExecutionContext, pipeline_uuid, session_uuid
from ..state.errors import ConfigError, RowmillError
from ..state.model import Committed, Outgoing, Record, TopicPartition
from .brokers.base import AssignmentListener, Broker
from .catalog import Catalog
from .deadlines import deadline
from .errors import BrokerError, BrokerTimeoutError, CheckpointError, FencedError, GroupBusyError, TopicError
from .offsets import decode_map
from .options import WorkerOptions
from .partition_state import CHANGELOG_CONFIG
from .restore import ChangelogReader, last_checkpoint
from .session import Session
from .transaction import CheckpointMovedError, Transactor

log = logging.getLogger(__name__)

How: TypeAlias = "Literal['earliest', 'latest', 'current', 'offset', 'time', 'duration', 'shift', 'file']"
Tables: TypeAlias = "Literal['keep', 'reset']"

_AT_ONCE = 8
"""Partitions that are moved side by side."""
_ATTEMPTS = 3
_OWNER = "replay"
_RELATIVE = frozenset({"shift", "duration"})
"""Targets that mean something else when they are asked for once more."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to go.

    Attributes:
        how: by Kafka's names for the options.
        value: the offset, the moment (ms since the epoch), the duration (ms), or the number of offsets to shift by.
        offsets: for ``file``: by partition; only these are moved.
    """

    how: How
    value: int = 0
    offsets: Mapping[TopicPartition, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Move:
    """One partition's way.

    Attributes:
        tp: which.
        before: the committed offset; None where the group never committed.
        to: the offset to be committed; None: it stays as it is, and ``note`` says why.
        run_again: offsets with rows that are done and run again; at most, since gaps of the log count.
        skipped: offsets with rows that are not done and are left out; at most.
        discarded: of ``run_again``, those that the offset map knew as done above the committed offset.
        entries: entries of tables that are deleted; None where tables are kept.
        done: whether an execution that did not come to its end has moved it already.
        note: what else there is to say.
    """

    tp: TopicPartition
    before: int | None
    to: int | None
    run_again: int = 0
    skipped: int = 0
    discarded: int = 0
    entries: int | None = None
    done: bool = False
    note: str = ""


@dataclass(slots=True)
class Execution:
    """What became of a replay: the partitions that have moved, and those that could not be."""

    moved: list[Move] = field(default_factory=list)
    failed: dict[TopicPartition, RowmillError] = field(default_factory=dict)


class _Log(NamedTuple):
    """What a partition of the source has."""

    first: int
    end: int
    at: int | None
    """The first row at or after the moment asked for."""


class Replay:
    """Moves the position of a session that no worker serves.

    Args:
        broker: a started one.
        session: whose group.
        sources: the topics it reads, as they are named on the broker.
        target: where to.
        state: ``keep`` the tables as they are, or ``reset`` them: empty those of each partition that moves.
        only: partitions by topic, None for all of a topic; default: all of all sources.
        has_tables: whether the pipeline has any; None: not known.
        options: time limits.
        clock: time.
    """

    def __init__(
        self,
        broker: Broker,
        session: Session,
        sources: Sequence[str],
        target: Target,
        *,
        state: Tables = "keep",
        only: Mapping[str, frozenset[int] | None] | None = None,
        has_tables: bool | None = None,
        options: WorkerOptions | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._broker = broker
        self._session = session
        self._sources = list(sources)
        self._target = target
        self._resets = state == "reset"
        self._only = only
        self._has_tables = has_tables
        self._options = options or WorkerOptions()
        self._clock = clock or SystemClock()

    async def plan(self) -> list[Move]:
        """What :meth:`execute` would do now. Changes nothing.

        Raises:
            TopicError: a source does not exist.
            ConfigError: a partition that was asked for does not.
            BrokerError: the broker does not answer.
        """
        logs = await self._look()
        async with deadline(self._options.broker_timeout, "read the group's offsets"):
            committed = await self._broker.committed(self._session.group, list(logs))
        owner = await self._unfinished()
        moves = []
        for tp, place in logs.items():
            record = await self._record(tp) if owner else None
            move = self._move(tp, place, committed[tp], done=_is_by(record, owner, committed[tp]))
            if self._resets and move.to is not None and not move.done:
                move = replace(move, entries=len(await self._entries(tp)))
            moves.append(move)
        return moves

    async def execute(self, told: Callable[[Move], None] = lambda _: None) -> Execution:
        """Move the partitions. Those that fail stay where they are; to run it again moves them.

        Args:
            told: called with each partition that has moved.

        Raises:
            GroupBusyError: a worker serves the group.
            TopicError, ConfigError, BrokerError: as :meth:`plan`; nothing has moved.
        """
        logs = await self._look()
        await self._prepare_changelogs()
        execution = Execution()
        async with _held(self._broker, self._session.group, self._sources, self._options.broker_timeout) as hold:
            owner = await self._unfinished()
            by = owner or self._new_owner()
            await self._leave_mark(by)
            gate = asyncio.Semaphore(_AT_ONCE)

            async def go(tp: TopicPartition, place: _Log) -> None:
                async with gate:
                    try:
                        hold.check()
                        move = await self._reset(tp, place, by, goes_on=owner is not None)
                    except RowmillError as error:
                        execution.failed[tp] = error
                    else:
                        execution.moved.append(move)
                        told(move)

            async with asyncio.TaskGroup() as group:
                for tp, place in logs.items():
                    group.create_task(go(tp, place))
            if not execution.failed:
                await self._wipe_mark()
        execution.moved.sort(key=lambda move: move.tp)
        return execution

    # --- looking -----------------------------------------------------------------------------------------------

    async def _look(self) -> dict[TopicPartition, _Log]:
        """The partitions that were asked for, and what they have."""
        broker = self._broker
        async with deadline(self._options.broker_timeout, "look the sources up"):
            topics = await broker.topics()
            for source in self._sources:
                if source not in topics:
                    raise TopicError(f"topic {source!r} does not exist on {broker.url}; `rowmill topics` lists them")
            chosen = self._chosen({source: topics[source].partitions for source in self._sources})
            first = await broker.offsets(chosen, "earliest")
            # Not the last stable offset: what a transaction has just written counts as there, as in Kafka's tool.
            end = await broker.offsets(chosen, "high_watermark")
            at: Mapping[TopicPartition, int] = {}
            if self._target.how in {"time", "duration"}:
                at = await broker.offsets(chosen, self._moment)
        return {tp: _Log(first[tp], end[tp], at.get(tp)) for tp in chosen}

    @property
    def _moment(self) -> int:
        value = self._target.value
        return value if self._target.how == "time" else max(0, self._clock.now_ms() - value)

    def _chosen(self, counts: Mapping[str, int]) -> list[TopicPartition]:
        if self._target.how == "file":
            wanted = sorted(self._target.offsets)
        else:
            only = dict.fromkeys(self._sources) if self._only is None else self._only
            numbers = {topic: range(counts.get(topic, 0)) if some is None else some for topic, some in only.items()}
            wanted = [TopicPartition(topic, number) for topic in numbers for number in sorted(numbers[topic])]
        for tp in wanted:
            if tp.partition >= counts.get(tp.topic, 0):
                there = ", ".join(f"{topic} with {count} partitions" for topic, count in counts.items())
                raise ConfigError("partition", str(tp), f"the pipeline reads {there}")
        return wanted

    async def _record(self, tp: TopicPartition) -> CheckpointRecord | None:
        """The changelog's last checkpoint; None also where there is no changelog yet."""
        changelog = TopicPartition(self._session.changelog(tp.topic), tp.partition)
        async with deadline(self._options.broker_timeout, "look topics up"):
            present = (await self._broker.topics()).get(changelog.topic)
        if present is None or tp.partition >= present.partitions:
            return None
        return await last_checkpoint(self._broker, changelog, tp, self._options.broker_timeout, self._clock)

    async def _entries(self, tp: TopicPartition) -> set[bytes]:
        """The keys of the tables' entries, from the changelog: about a hundred bytes of memory for each."""
        changelog = TopicPartition(self._session.changelog(tp.topic), tp.partition)
        async with deadline(self._options.broker_timeout, "look topics up"):
            present = (await self._broker.topics()).get(changelog.topic)
        keys: set[bytes] = set()
        if present is None or tp.partition >= present.partitions:
            return keys

        async def load(records: Sequence[Record], _behind: int) -> None:
            for record in records:
                if record.key is None or record.key.startswith(b"."):
                    continue
                if record.value is None:
                    keys.discard(record.key)
                else:
                    keys.add(record.key)

        reader = ChangelogReader(self._broker, changelog, tp, self._options.broker_timeout, self._clock)
        try:
            await reader.open()
            if reader.start < reader.end:
                await reader.restore(reader.start, load)
        finally:
            await reader.close()
        return keys

    # --- planning ----------------------------------------------------------------------------------------------

    def _move(self, tp: TopicPartition, place: _Log, committed: Committed | None, *, done: bool) -> Move:
        before = None if committed is None else committed.offset
        asked = before if done else self._asked(tp, place, before)
        if asked is None:
            return Move(tp, before, None, note="never committed: it stays so")
        to = min(max(asked, place.first), place.end)
        if done:
            return Move(tp, before, to, done=True, note="moved by the replay that was interrupted")
        note = "" if to == asked else f"{asked:,} is not in the log"
        if committed is None:
            return Move(tp, None, to, skipped=to - place.first, note=note or "never committed before")
        try:
            known = decode_map(committed)
        except CheckpointError:
            known = decode_map(Committed(committed.offset))
            note = "its offset map cannot be read"
        undone = [offset for offset in known.incomplete if place.first <= offset < to]
        kept_done = known.end - max(known.low, to) - sum(offset >= to for offset in known.incomplete)
        again_in_map = max(0, kept_done)
        again = max(0, min(known.low, place.end) - to) + again_in_map
        skipped = len(undone) + max(0, to - max(known.end, place.first))
        return Move(tp, before, to, again, skipped, again_in_map, note=note)

    def _asked(self, tp: TopicPartition, place: _Log, before: int | None) -> int | None:
        """The offset that was asked for, perhaps outside of the log; None where there is nothing to move from."""
        target = self._target
        fixed = {"earliest": place.first, "latest": place.end, "offset": target.value}
        if target.how in fixed:
            return fixed[target.how]
        if target.how == "file":
            return target.offsets[tp]
        if target.how in {"time", "duration"}:
            return place.at
        if before is None:
            return None
        return before + target.value if target.how == "shift" else before

    # --- an execution that did not come to its end -----------------------------------------------------------------

    def _new_owner(self) -> str:
        """A name for one execution, which also tells what it does."""
        return f"{_OWNER}/{self._clock.token()}/{self._digest}"

    @property
    def _digest(self) -> str:
        only = sorted((topic, sorted(some or ())) for topic, some in (self._only or {}).items())
        return f"{crc32(repr((self._target.how, self._target.value, self._resets, only)).encode()):08x}"

    @property
    def _mark(self) -> TopicPartition:
        return TopicPartition(self._sources[0], 0)

    async def _unfinished(self) -> str | None:
        """The execution of this very replay that began and did not come to its end, if there is one.

        To shift by -100 once more would move those partitions twice that it had moved. It left its name as a mark in a
        group beside the session's, which is wiped at its end; the checkpoint records tell which partitions it moved.
        """
        if self._target.how not in _RELATIVE:
            return None
        async with deadline(self._options.broker_timeout, "look for a replay that was interrupted"):
            found = (await self._broker.committed(self._session.publisher_id, [self._mark]))[self._mark]
        owner = found.metadata if found is not None else ""
        return owner if owner.startswith(f"{_OWNER}/") and owner.endswith(self._digest) else None

    async def _leave_mark(self, text: str) -> None:
        if self._target.how not in _RELATIVE:
            return
        producer = self._broker.transactional_producer(self._session.publisher_id)
        try:
            async with deadline(self._options.broker_timeout, "note the replay"):
                await producer.start()
                await producer.begin()
                await producer.commit_offsets(self._session.publisher_id, {self._mark: Committed(0, text)})
                await producer.end()
        finally:
            await producer.close()

    async def _wipe_mark(self) -> None:
        try:
            await self._leave_mark("")
        except (BrokerError, FencedError) as error:
            raise BrokerError(
                f"all partitions have moved, which could not be noted: {error}. Run this once more: it moves none twice"
            ) from error

    # --- moving ------------------------------------------------------------------------------------------------

    async def _prepare_changelogs(self) -> None:
        """A changelog that is missing is made, as a worker would."""
        timeout = self._options.broker_timeout
        catalog = Catalog(self._broker, create=True, partitions=None, timeout=timeout)
        async with deadline(timeout, "look topics up"):
            topics = await self._broker.topics()
        await catalog.require_own(
            {self._session.changelog(source): topics[source].partitions for source in self._sources},
            CHANGELOG_CONFIG,
            may_grow=self._has_tables is False,
        )

    async def _reset(self, tp: TopicPartition, place: _Log, owner: str, *, goes_on: bool) -> Move:
        for attempt in range(_ATTEMPTS):
            try:
                return await self._try_reset(tp, place, owner, goes_on=goes_on)
            except CheckpointMovedError:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise BrokerError(f"{tp}: could not be moved")  # not reached

    async def _try_reset(self, tp: TopicPartition, place: _Log, owner: str, *, goes_on: bool) -> Move:
        transactor = Transactor(self._broker, self._session, tp, self._options, self._clock)
        try:
            committed = await transactor.open()  # from here on nobody else can commit
            record = await self._record(tp)
            done = goes_on and _is_by(record, owner, committed)
            move = self._move(tp, place, committed, done=done)
            if move.to is None or done:
                return move
            entries = await self._entries(tp) if self._resets else set()
            checkpoint = Committed(move.to)
            told = await self._next_record(tp, record, checkpoint, owner)
            former = None if record is None else record.encode()
            value = told.encode()

            async def is_ours() -> bool | None:
                found = await self._record(tp)
                present = None if found is None else found.encode()
                return True if present == value else False if present == former else None

            now = self._clock.now_ms()
            changelog = TopicPartition(self._session.changelog(tp.topic), tp.partition)
            deletions = [Outgoing(key, None, now) for key in sorted(entries)]
            await transactor.commit(
                {changelog: [*deletions, Outgoing(CHECKPOINT_KEY, value, now)]}, checkpoint, is_ours
            )
            return replace(move, entries=len(entries)) if self._resets else move
        finally:
            await transactor.close()

    async def _next_record(
        self, tp: TopicPartition, record: CheckpointRecord | None, checkpoint: Committed, owner: str
    ) -> CheckpointRecord:
        """What the next worker is to believe: it agrees with the offset, and its counts go on."""
        if record is None:
            record = self._first_record(checkpoint)
        return replace(
            record,
            offset=checkpoint.offset,
            map_crc=crc_of(checkpoint),
            stopped=True,
            starts={},
            owner=owner,
            witness=await self._witness(tp, record),
            # Another generation: a store on some worker's disk that missed the deletions is not believed.
            generation=self._clock.token() if self._resets else record.generation,
        )

    def _first_record(self, checkpoint: Committed) -> CheckpointRecord:
        context = ExecutionContext(
            session_id=session_uuid(self._session.group),
            pipeline_id=pipeline_uuid(self._session.pipeline),
            start_time=datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC),
        )
        counts = dict.fromkeys(
            ("rows", "results", "dropped", "skipped", "defaulted", "dead_letters", "emitted"), 0
        )  # as PartitionState begins
        return CheckpointRecord(
            checkpoint.offset, 0, True, None, counts, context.to_checkpoint(), {}, "", self._clock.token()
        )

    async def _witness(self, tp: TopicPartition, record: CheckpointRecord) -> tuple[int, int] | None:
        """The row by which the source is known; forgotten where the source was made anew, which a replay mends."""
        if record.witness is None:
            return None
        timeout = self._options.broker_timeout
        changelog = TopicPartition(self._session.changelog(tp.topic), tp.partition)
        async with deadline(timeout, f"{tp}: look up its end"):
            end = (await self._broker.offsets([tp], "high_watermark"))[tp]
        reader = ChangelogReader(self._broker, changelog, tp, timeout, self._clock)
        try:
            present = await reader.record_at(record.witness[0])
        finally:
            await reader.close()
        if record.witness[0] >= end or (present is not None and present.timestamp != record.witness[1]):
            log.warning("%s: the topic was made anew since it was processed", tp)
            return None
        return record.witness


def _is_by(record: CheckpointRecord | None, owner: str | None, committed: Committed | None) -> bool:
    """Whether that execution moved the partition, and nobody has worked on it since."""
    return (
        record is not None and owner is not None and committed is not None
        and record.owner == owner and record.agrees_with(committed)
    )  # fmt: skip


# --- keeping workers out ---------------------------------------------------------------------------------------


class _Hold(AssignmentListener):
    """A member of the group that wants all of its partitions and works on none."""

    def __init__(self, group: str, wanted: frozenset[TopicPartition]) -> None:
        self._group = group
        self._wanted = wanted
        self._owned: frozenset[TopicPartition] = frozenset()
        self.told = asyncio.Event()

    def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None:
        """All of them: nobody else is there."""
        del consecutive
        self._owned = partitions
        self.told.set()

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Somebody joins, or it is over."""
        self._owned -= partitions

    def check(self) -> None:
        """Raise GroupBusyError unless everything is ours."""
        if not self._wanted <= self._owned:
            raise GroupBusyError(
                f"group {self._group} has a member: a worker runs. Stop the workers (SIGTERM or Ctrl-C), and run this "
                "again; a killed one counts as a member until its session times out"
            )


@asynccontextmanager
async def _held(broker: Broker, group: str, sources: Sequence[str], timeout: float) -> AsyncIterator[_Hold]:
    """Be the group's only member.

    To ask who is in the group would leave a gap between the answer and the act, and the port has no such question.
    A worker that is there keeps its partitions, or gets them back at once; one that was killed is waited for until
    its session times out.

    Raises:
        GroupBusyError: somebody else is there.
    """
    async with deadline(timeout, "look topics up"):
        topics = await broker.topics()
    wanted = frozenset(TopicPartition(s, p) for s in sources for p in range(topics[s].partitions))
    hold = _Hold(group, wanted)
    member = broker.member(group, list(sources))
    try:
        try:
            async with deadline(timeout + (broker.session_timeout or 0), f"group {group}: join"):
                await member.join(hold)
                await hold.told.wait()
        except BrokerTimeoutError as error:
            raise GroupBusyError(
                f"group {group} does not settle: a member of it does not answer. Stop the workers, and run this again"
            ) from error
        hold.check()
        yield hold
    finally:
        await member.leave()
        await member.close()
