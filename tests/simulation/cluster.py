"""The brokers: logs, the transaction coordinator, groups. What Kafka does on its side of the wire, and nothing else.

Topics and logs are those of the FakeBroker. On top come what it leaves out: epochs and sequence numbers that tell
late and repeated requests, transactions that are decided first and whose markers are written some time later,
partition by partition, time-outs of transactions, and sessions.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from rowmill.state.model import Committed, Outgoing, StoredRecord, TopicPartition
from rowmill.streams.errors import BrokerError, FencedError, OffsetOutOfRangeError
from support.fake_broker import FakeBroker

from simulation.groups import Group, Policy
from simulation.loop import SimLoop
from simulation.network import Network, RetriableError
from simulation.trace import Trace


class Decided(NamedTuple):
    """A transaction at the moment from which it is committed, whoever sees it when."""

    transactional_id: str
    records: list[StoredRecord]
    offsets: dict[str, dict[TopicPartition, Committed]]


class Stamp(NamedTuple):
    """What every request of a transactional producer carries.

    ``number`` counts its transactions; the wire has no such thing. It only serves to tell copies of requests that
    were answered: those cannot hit a later transaction (a client that had its answer is not asked to guard against
    its own past), while a request whose caller gave up hits whatever its epoch has open when it arrives.
    """

    transactional_id: str
    epoch: int
    number: int


@dataclass
class _Owner:
    """What the coordinator knows of one transactional id."""

    epoch: int = 0
    state: Literal["empty", "ongoing", "decided"] = "empty"
    number: int = -1
    serial: int = 0
    committed_last: bool = False
    written: dict[TopicPartition, list[int]] = field(default_factory=dict)
    offsets: dict[str, dict[TopicPartition, Committed]] = field(default_factory=dict)
    sequences: dict[TopicPartition, int] = field(default_factory=dict)
    markers: int = 0


class Found(NamedTuple):
    """A partition's part of a fetch: records, and where the next ones are."""

    records: list[StoredRecord]
    position: int


class Cluster:
    """All brokers as one.

    Args:
        on_decided: told of every transaction that commits, when that is decided.
        on_written, on_committed: told of records and offsets outside of transactions.
        session, patience, policy: of groups.
        transaction_timeout: seconds after which an open transaction is aborted.
    """

    def __init__(
        self,
        loop: SimLoop,
        network: Network,
        chance: random.Random,
        trace: Trace,
        *,
        on_decided: Callable[[Decided], None],
        on_written: Callable[[StoredRecord], None],
        on_committed: Callable[[TopicPartition, Committed], None],
        session: float,
        patience: float,
        policy: Policy,
        transaction_timeout: float,
    ) -> None:
        self.store = FakeBroker()
        self.network = network
        self.groups: dict[str, Group] = {}
        self.timed_out = 0
        self._loop = loop
        self._chance = chance
        self._trace = trace
        self._on_decided = on_decided
        self._on_written = on_written
        self._on_committed = on_committed
        self._plain: list[dict[TopicPartition, int]] = []  # sequence numbers of producers without transactions
        self._commits: dict[tuple[str, TopicPartition], int] = {}  # number of the last commit by member
        self._session, self._patience, self._policy = session, patience, policy
        self._transaction_timeout = transaction_timeout
        self._owners: dict[str, _Owner] = {}
        self._fetches: list[_Fetch] = []

    # --- transactions ------------------------------------------------------------------------------------------

    def init_producer(self, transactional_id: str) -> int:
        """A new epoch, once what the former one left open is settled."""
        owner = self._owners.setdefault(transactional_id, _Owner())
        if owner.state == "ongoing":
            owner.epoch += 1
            self._decide(transactional_id, owner, commit=False)
        if owner.state == "decided":
            raise RetriableError("markers are still to be written")
        owner.epoch += 1
        owner.sequences.clear()
        return owner.epoch

    def add(self, stamp: Stamp, part: TopicPartition | str, *, is_copy: bool) -> None:
        """Take a partition, or a group's offsets, into the transaction; the first one opens it."""
        owner = self._current(stamp)
        if owner.state == "decided":
            raise RetriableError("the last transaction is being settled")
        if is_copy and (owner.state == "empty" or owner.number != stamp.number):
            return
        if owner.state == "empty":
            owner.state, owner.number = "ongoing", stamp.number
            owner.serial += 1
            owner.written, owner.offsets = {}, {}
            self._loop.outside(self._transaction_timeout, self._time_out, stamp.transactional_id, owner.serial)
        if isinstance(part, TopicPartition):
            owner.written.setdefault(part, [])
        else:
            owner.offsets.setdefault(part, {})

    def produce(self, stamp: Stamp, tp: TopicPartition, sequence: int, records: Sequence[Outgoing]) -> int:
        """Append a batch; its last offset, or -1 where it is a repeated one."""
        owner = self._current(stamp)
        if owner.state != "ongoing" or tp not in owner.written:
            raise BrokerError(f"{tp}: no transaction of {stamp} has it open")
        expected = owner.sequences.get(tp, 0)
        if sequence > expected:
            raise BrokerError(f"{tp}: sequence {sequence}, expected {expected}")
        if sequence < expected:
            return -1
        owner.sequences[tp] = expected + len(records)
        log = self.store.log(tp)
        offsets = log.append(tp, records)
        log.open.setdefault(stamp.transactional_id, offsets[0])
        owner.written[tp] += offsets
        return offsets[-1]

    def commit_offsets(
        self, stamp: Stamp, group: str, offsets: Mapping[TopicPartition, Committed], *, is_copy: bool
    ) -> None:
        """Put offsets into the transaction."""
        owner = self._current(stamp)
        if is_copy and owner.number != stamp.number:
            return
        if owner.state != "ongoing" or group not in owner.offsets:
            raise BrokerError(f"{group}: no transaction of {stamp} has it open")
        owner.offsets[group].update(offsets)

    def end(self, stamp: Stamp, *, commit: bool, is_copy: bool) -> None:
        """Commit or abort what the id has open."""
        owner = self._current(stamp)
        if is_copy and owner.number != stamp.number:
            return
        if owner.state == "decided":
            raise RetriableError("the transaction is being settled")
        if owner.state == "ongoing":
            self._decide(stamp.transactional_id, owner, commit=commit)
        elif owner.committed_last != commit:
            raise BrokerError(f"{stamp}: nothing is open")

    @property
    def open_transactions(self) -> list[str]:
        """Ids with a transaction that nobody ended, or whose markers are not written."""
        return sorted(name for name, owner in self._owners.items() if owner.state != "empty")

    def _current(self, stamp: Stamp) -> _Owner:
        owner = self._owners.setdefault(stamp.transactional_id, _Owner())
        if stamp.epoch != owner.epoch:
            raise FencedError(f"{stamp.transactional_id}: epoch {stamp.epoch} is not {owner.epoch}")
        return owner

    def _decide(self, transactional_id: str, owner: _Owner, *, commit: bool) -> None:
        owner.state, owner.committed_last = "decided", commit
        self._trace.note(
            f"{'commit' if commit else 'abort'} {transactional_id} epoch {owner.epoch}: "
            + ", ".join(f"{tp} {len(offsets)}" for tp, offsets in owner.written.items())
            + "".join(f"; {tp} at {done.offset}" for group in owner.offsets.values() for tp, done in group.items())
        )
        if commit:
            records = [self._record(tp, offset) for tp, offsets in owner.written.items() for offset in offsets]
            self._on_decided(Decided(transactional_id, records, owner.offsets))
        owner.markers = len(owner.written) + len(owner.offsets) or 1
        for tp, offsets in owner.written.items():
            self._mark_later(owner, partial(self._mark, transactional_id, tp, offsets, commit=commit))
        for group, moved in owner.offsets.items():
            self._mark_later(owner, partial(self._move, group, moved, commit=commit))
        if not owner.written and not owner.offsets:
            self._mark_later(owner, lambda: None)

    def _mark_later(self, owner: _Owner, act: Callable[[], None]) -> None:
        def mark() -> None:
            act()
            owner.markers -= 1
            if not owner.markers:
                owner.state = "empty"
            self.wake()

        self._loop.outside(self._chance.expovariate(1 / self.network.mood.marker), mark)

    def _mark(self, transactional_id: str, tp: TopicPartition, offsets: list[int], *, commit: bool) -> None:
        log = self.store.log(tp)
        for offset in offsets if not commit else ():
            log.records[offset - log.start] = None
        log.open.pop(transactional_id, None)
        if offsets:
            log.records.append(None)

    def _move(self, group: str, offsets: Mapping[TopicPartition, Committed], *, commit: bool) -> None:
        if commit:
            self.store.group_offsets.setdefault(group, {}).update(offsets)

    def _record(self, tp: TopicPartition, offset: int) -> StoredRecord:
        log = self.store.log(tp)
        record = log.records[offset - log.start]
        assert record is not None
        return record

    def _time_out(self, transactional_id: str, serial: int) -> None:
        owner = self._owners[transactional_id]
        if owner.state == "ongoing" and owner.serial == serial:
            self._trace.note(f"transaction of {transactional_id} timed out")
            self.timed_out += 1
            owner.epoch += 1
            self._decide(transactional_id, owner, commit=False)

    # --- without transactions -----------------------------------------------------------------------------------

    def new_producer(self) -> int:
        """A number for an idempotent producer."""
        self._plain.append({})
        return len(self._plain) - 1

    def append(self, producer: int, tp: TopicPartition, sequence: int, records: Sequence[Outgoing]) -> None:
        """Append a batch, unless it is a repeated one."""
        expected = self._plain[producer].get(tp, 0)
        if sequence > expected:
            raise BrokerError(f"{tp}: sequence {sequence}, expected {expected}")
        if sequence == expected:
            self._plain[producer][tp] = expected + len(records)
            for offset in self.store.log(tp).append(tp, records):
                self._on_written(self._record(tp, offset))
            self.wake()

    def commit(
        self, group: str, member: str, generation: int, number: int, offsets: Mapping[TopicPartition, Committed]
    ) -> None:
        """A member's plain commit. One that was overtaken by a later one of the same member counts no more."""
        if not self.group(group).is_current(member, generation):
            raise FencedError("the group has gone on without this member")
        for tp, committed in offsets.items():
            if number >= self._commits.get((member, tp), 0):
                self._commits[member, tp] = number
                self.store.group_offsets.setdefault(group, {})[tp] = committed
                self._on_committed(tp, committed)

    # --- reading -----------------------------------------------------------------------------------------------

    def fetch(
        self, positions: Mapping[TopicPartition, int], room: int, wait: float
    ) -> asyncio.Future[dict[TopicPartition, Found]]:
        """Records, as soon as there are some; after ``wait`` seconds what there is."""
        fetch = _Fetch(positions, room, self._loop.create_future())
        self._fetches.append(fetch)
        self._try(fetch, last=False)
        self._loop.outside(wait, self._try, fetch)
        return fetch.answer

    def wake(self) -> None:
        """Logs have changed."""
        for fetch in list(self._fetches):
            self._try(fetch, last=False)

    def _try(self, fetch: _Fetch, last: bool = True) -> None:
        if fetch.answer.done():
            return
        try:
            found = self._find(fetch)
        except OffsetOutOfRangeError as error:
            fetch.answer.set_exception(error)
        else:
            if found or last:
                fetch.answer.set_result(found)
        if fetch.answer.done():
            self._fetches.remove(fetch)

    def _find(self, fetch: _Fetch) -> dict[TopicPartition, Found]:
        room, found = fetch.room, {}
        for tp, start in fetch.positions.items():
            log, position = self.store.log(tp), start
            if not log.start <= position <= log.high_watermark:
                raise OffsetOutOfRangeError(tp, position, "choose another")
            records: list[StoredRecord] = []
            while position < log.end and len(records) < room:
                record = log.records[position - log.start]
                position += 1
                if record is not None:
                    records.append(record)
            if position > start:
                found[tp] = Found(records, position)
                room -= len(records)
        return found

    def committed(self, group: str, partitions: Collection[TopicPartition]) -> dict[TopicPartition, Committed | None]:
        """What shows of a group's offsets."""
        known = self.store.group_offsets.get(group, {})
        return {tp: known.get(tp) for tp in partitions}

    # --- groups ------------------------------------------------------------------------------------------------

    def group(self, name: str, topics: Sequence[str] = ()) -> Group:
        """A group, made with the first member."""
        if name not in self.groups:
            partitions = [tp for topic in sorted(topics) for tp in self.store.partitions(topic)]
            self.groups[name] = Group(
                self._loop,
                self._chance,
                self._trace,
                partitions,
                session=self._session,
                patience=self._patience,
                policy=self._policy,
            )
        return self.groups[name]


@dataclass(eq=False)
class _Fetch:
    positions: Mapping[TopicPartition, int]
    room: int
    answer: asyncio.Future[dict[TopicPartition, Found]]
