"""Replay: move a session's position in its source topics, so that rows run again or are left out.

The session has to be stopped, or paused (``hold.py``). A partition moves in one transaction of its own transactional
id, which fences whoever worked on it: the new offset with an empty map, the changelog's checkpoint record that agrees
with it, and, where tables are reset, a deletion for each of their entries. So each partition has moved, or has not,
whatever kills the command; run again, it moves the others.

Where tables are *rebuilt*, the new offset is that of the first row there is, and the record tells where results stand
(``rebuild.py``).

What stays: the context's counts, costs and tokens. They are sums of the work that was done, so rows that run again
count again. What is forgotten: the offset map, and the deaths that rows were seen at.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias, TypeVar
from zlib import crc32

from ..state.checkpoint import CHECKPOINT_KEY, CheckpointRecord, crc_of
from ..state.clock import Clock, SystemClock
from ..state.errors import ConfigError, RowmillError
from ..state.model import Committed, Outgoing, Record, TopicPartition
from .brokers.base import Broker
from .catalog import Catalog
from .contexts import new_context
from .deadlines import deadline
from .errors import BrokerError, CheckpointError, FencedError, SessionError, TopicError
from .hold import Standstill, kept_still, look_at
from .offsets import OffsetMap, decode_map, encode_map
from .options import WorkerOptions
from .partition_state import CHANGELOG_CONFIG
from .rebuild import standing
from .restore import ChangelogReader, last_checkpoint
from .session import Session
from .side_replay import stored_range
from .transaction import CheckpointMovedError, Transactor

log = logging.getLogger(__name__)

How: TypeAlias = "Literal['earliest', 'latest', 'current', 'offset', 'time', 'duration', 'shift', 'file']"
Tables: TypeAlias = "Literal['keep', 'reset', 'rebuild']"

_AT_ONCE = 8
"""Partitions that are moved side by side."""
_ATTEMPTS = 3
_OWNER = "replay"
_Made = TypeVar("_Made")
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
        to: the offset from which on rows have results; None: it stays as it is, and ``note`` says why.
        run_again: offsets with rows that are done and run again, with their results; at most, since gaps of the log
            count.
        skipped: offsets with rows that are not done and whose results are left out; at most.
        discarded: of ``run_again``, those that the offset map knew as done above the committed offset.
        entries: entries of tables that are deleted; None where tables are kept.
        done: whether an execution that did not come to its end has moved it already.
        note: what else there is to say.
        rebuilds_from: where rows begin to run for the tables alone; None where tables are not made again.
        rebuilt: offsets with rows that run for the tables alone; at most.
        lost: offsets of rows that may have written to the tables, and are not in the log any more.
        kept_map: of ``rebuilt``, those from ``to`` on, as an offset map's text.
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
    rebuilds_from: int | None = None
    rebuilt: int = 0
    lost: int = 0
    kept_map: str = ""

    @property
    def begin(self) -> int | None:
        """The offset to be committed."""
        return self.to if self.rebuilds_from is None else self.rebuilds_from


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
    begin: int
    """Where the session began: the first row, or the first one from its pipeline's ``start`` on."""


class Replay:
    """Moves the position of a session on which no worker works: it is stopped, or paused.

    Args:
        broker: a started one.
        session: whose group.
        sources: the topics it reads, as they are named on the broker.
        target: where to.
        state: ``keep`` the tables as they are; ``reset`` them: empty those of each partition that moves; or
            ``rebuild`` them: empty them, and run all rows before the target once more for what they write to tables.
        only: partitions by topic, None for all of a topic; default: all of all sources.
        has_tables: whether the pipeline has any; None: not known.
        start: the pipeline's ``start``: tables are rebuilt from there on.
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
        start: datetime | str = "earliest",
        options: WorkerOptions | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._broker = broker
        self._session = session
        self._sources = list(sources)
        self._target = target
        self._state = state
        self._start = start
        self._only = only
        self._has_tables = has_tables
        self._options = options or WorkerOptions()
        self._clock = clock or SystemClock()

    async def plan(self) -> list[Move]:
        """What :meth:`execute` would do now. Changes nothing.

        Raises:
            TopicError: a source does not exist.
            ConfigError: a partition that was asked for does not; or tables cannot be kept, as they are half made.
            SessionError: the session is none whose position can be moved.
            BrokerError: the broker does not answer.
        """
        logs = await self._look()
        async with deadline(self._options.broker_timeout, "read the group's offsets"):
            committed = await self._broker.committed(self._session.group, list(logs))
        await self._check_session(committed)
        owner = await self._unfinished()

        async def plan_one(tp: TopicPartition, place: _Log) -> Move:
            record = await self._record(tp)
            move = self._move(tp, place, committed[tp], record, done=_is_by(record, owner, committed[tp]))
            if self._state == "keep" or move.to is None or move.done:
                return move
            return replace(move, entries=len(await self._entries(tp)))

        return await _side_by_side(plan_one, logs)

    async def standstill(self) -> Standstill:
        """Whether workers are there, and whether they are paused: what is needed to execute.

        Raises:
            BrokerError: the broker does not answer, or does not tell.
        """
        return await look_at(self._broker, self._session.group, self._options.broker_timeout, self._clock)

    async def execute(self, told: Callable[[Move], None] = lambda _: None) -> Execution:
        """Move the partitions. Those that fail stay where they are; to run it again moves them.

        Args:
            told: called with each partition that has moved.

        Raises:
            GroupBusyError: a worker serves the group, and is not paused.
            TopicError, ConfigError, SessionError, BrokerError: as :meth:`plan`; nothing has moved.
        """
        logs = await self._look()
        async with deadline(self._options.broker_timeout, "read the group's offsets"):
            await self._check_session(await self._broker.committed(self._session.group, list(logs)))
        await self._prepare_changelogs()
        execution = Execution()
        async with kept_still(
            self._broker, self._session.group, self._sources, self._options.broker_timeout, self._clock
        ) as hold:
            owner = await self._unfinished()
            by = owner or self._new_owner()
            await self._leave_mark(by)

            async def go(tp: TopicPartition, place: _Log) -> None:
                try:
                    await hold.check()
                    move = await self._reset(tp, place, by, goes_on=owner is not None)
                except FencedError as error:
                    execution.failed[tp] = hold.taken(error)
                except RowmillError as error:
                    execution.failed[tp] = error
                else:
                    execution.moved.append(move)
                    told(move)

            await _side_by_side(go, logs)
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
            begin = first
            if isinstance(self._start, datetime) and self._session.is_live:
                begin = await broker.offsets(chosen, int(self._start.timestamp() * 1000))
        return {tp: _Log(first[tp], end[tp], at.get(tp), max(first[tp], begin[tp])) for tp in chosen}

    async def _check_session(self, committed: Mapping[TopicPartition, Committed | None]) -> None:
        """The live session may be moved before it began; another one by this name has to be there."""
        session = self._session
        if session.is_live:
            return
        if await stored_range(self._broker, session, self._sources):
            raise SessionError(
                f"session {session.id!r} is a side replay, whose range is fixed; run another range in a session of "
                "another name: rowmill replay --side"
            )
        if not any(committed.values()):
            raise SessionError(
                f"there is no session {session.id!r} that reads {', '.join(self._sources)} (rowmill worker --session "
                "makes one); without --session, the live session is moved"
            )

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

    def _move(
        self,
        tp: TopicPartition,
        place: _Log,
        committed: Committed | None,
        record: CheckpointRecord | None,
        *,
        done: bool,
    ) -> Move:
        if committed is None:
            return self._first_move(tp, place)
        note = ""
        try:
            known = standing(decode_map(committed), record)
            end = known.end
        except CheckpointError:
            known = decode_map(Committed(committed.offset))
            note = "its offset map cannot be read"
            # Any row that was taken may be complete.
            end = place.end if record is None or record.witness is None else record.witness[0] + 1
        if record is not None and record.rebuild_until is not None and not done:
            self._check_half_made(tp, record.rebuild_until)
            note = note or f"tables are being rebuilt up to {record.rebuild_until:,}"
        asked = known.low if done else self._asked(tp, place, known.low)
        assert asked is not None  # noqa: S101 - it has committed
        to = min(max(asked, place.first), place.end)
        if done:
            return Move(tp, committed.offset, to, done=True, note="moved by the replay that was interrupted")
        if to != asked:
            note = note or f"{asked:,} is not in the log"
        undone = [offset for offset in known.incomplete if place.first <= offset < to]
        again_in_map = max(0, end - max(known.low, to) - sum(offset >= to for offset in known.incomplete))
        again = max(0, min(known.low, place.end) - to) + again_in_map
        skipped = len(undone) + max(0, to - max(known.end, place.first))
        move = Move(tp, committed.offset, to, again, skipped, again_in_map, note=note)
        return self._rebuilding(move, place, known) if self._state == "rebuild" else move

    def _first_move(self, tp: TopicPartition, place: _Log) -> Move:
        asked = self._asked(tp, place, None)
        if asked is None:
            return Move(tp, None, None, note="never committed: it stays so")
        to = min(max(asked, place.first), place.end)
        note = "never committed before" if to == asked else f"{asked:,} is not in the log"
        move = Move(tp, None, to, skipped=to - place.first, note=note)
        return self._rebuilding(move, place, OffsetMap(to, to, ())) if self._state == "rebuild" else move

    def _check_half_made(self, tp: TopicPartition, until: int) -> None:
        if self._state == "keep":
            raise ConfigError(
                "--state",
                "keep",
                f"the tables of {tp} are being rebuilt, up to {until:,}, and are not complete: have a worker finish "
                "that, or say --state rebuild or reset",
            )

    def _rebuilding(self, move: Move, place: _Log, known: OffsetMap) -> Move:
        """All before the target runs for the tables; where nothing moves, so do rows done above the position."""
        to = move.to
        assert to is not None  # noqa: S101 - the caller has looked
        lost = place.first if move.before else 0
        kept, rows = "", max(0, to - place.begin)
        if self._target.how == "current" and to == known.low < known.end:
            kept, rows = encode_map(known), rows + move.discarded
            move = replace(move, run_again=move.run_again - move.discarded, discarded=0)
        if to <= place.begin and not kept:  # nothing lies before it: the tables are empty there
            return replace(move, lost=lost)
        begin = min(place.begin, to)
        return replace(move, rebuilds_from=begin, rebuilt=rows, lost=lost, kept_map=kept)

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
        return f"{crc32(repr((self._target.how, self._target.value, self._state, only)).encode()):08x}"

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
            move = self._move(tp, place, committed, record, done=done)
            if move.begin is None or done:
                return move
            entries = await self._entries(tp) if self._state != "keep" else set()
            checkpoint = Committed(move.begin)
            told = await self._next_record(tp, record, checkpoint, owner)
            if move.rebuilds_from is not None:
                told = replace(told, rebuild_until=move.to, rebuild_map=move.kept_map)
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
            return move if self._state == "keep" else replace(move, entries=len(entries))
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
            generation=record.generation if self._state == "keep" else self._clock.token(),
            rebuild_until=None,
            rebuild_map="",
        )

    def _first_record(self, checkpoint: Committed) -> CheckpointRecord:
        context = new_context(self._session, self._clock)
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


async def _side_by_side(
    act: Callable[[TopicPartition, _Log], Awaitable[_Made]], logs: Mapping[TopicPartition, _Log]
) -> list[_Made]:
    """Do it for each partition, so many at once; in the partitions' order."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(tp: TopicPartition, place: _Log) -> _Made:
        async with gate:
            return await act(tp, place)

    tasks = [asyncio.ensure_future(one(tp, place)) for tp, place in logs.items()]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
