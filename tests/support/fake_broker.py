"""An in-memory broker that keeps the port's contract and fails where a test tells it to.

It behaves like Kafka where that is harder than the embedded broker: transactions leave a marker behind (a gap in
the offsets), readers stop at the first record of an open transaction, members share partitions and all of them
lose all of theirs at every rebalance. It is stricter than both: a producer that is used after an error, or ended
before every send was awaited, is an AssertionError, because that is how rows get lost (FACTS, "silent loss").
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from rowmill.state.model import Committed, Outgoing, Record, StoredRecord, TopicPartition
from rowmill.streams.brokers.base import (
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
from rowmill.streams.errors import BrokerError, FencedError, OffsetOutOfRangeError, TopicError

T = TypeVar("T")

Step: TypeAlias = Literal[
    "start",
    "begin",
    "send",
    "ack",
    "offsets",
    "end",
    "committed",
    "pending",
    "settle",
    "topics",
    "create",
    "look_up",
    "fetch",
    "position",
    "commit",
]
"""Where a fault can be put: the transactional producer's steps in their order, then the broker's and a reader's."""


@dataclass
class Fault:
    """One thing that goes wrong: at which step, how, and whether the step took effect all the same."""

    step: Step
    error: Exception | None
    took_effect: bool
    skip: int
    times: int
    then: Callable[[], None] | None


@dataclass
class _Log:
    """A partition: records by offset, None for what nobody may read (markers, aborted, compacted away)."""

    start: int = 0
    records: list[StoredRecord | None] = field(default_factory=list)
    open: dict[str, int] = field(default_factory=dict)

    @property
    def high_watermark(self) -> int:
        return self.start + len(self.records)

    @property
    def end(self) -> int:
        return min(self.open.values(), default=self.high_watermark)

    def append(self, tp: TopicPartition, records: Iterable[Outgoing]) -> list[int]:
        offsets = []
        for out in records:
            offsets.append(self.high_watermark)
            self.records.append(StoredRecord(*tp, offsets[-1], out.timestamp, out.key, out.value, tuple(out.headers)))
        return offsets


class FakeBroker(Broker):
    """Topics in a dict. ``inject`` makes the next call of a step fail; ``calls`` lists the steps that were taken.

    Args:
        markers: whether the end of a transaction takes an offset in each partition it wrote to, as on Kafka.
        lazy: seconds from the decision that a transaction is committed to its showing, in records and in offsets, as
            on Kafka; only a start of the same id, or its next transaction, makes it show at once.
    """

    def __init__(self, *, markers: bool = True, lazy: float = 0.0) -> None:
        self.url = "fake://"
        self.default_partitions = 4
        self.max_message_bytes = 1_000_000
        self.markers = markers
        self.lazy = lazy
        self._decided: dict[str, _Transaction] = {}
        self.calls: list[Step] = []
        self.group_offsets: dict[str, dict[TopicPartition, Committed]] = {}
        self.starts: dict[str, int] = {}
        """How often each transactional id was started: its epoch."""
        self.commits = 0
        """Transactions that took effect."""
        self.creation_allowed = True
        self._left: dict[str, _Transaction] = {}
        self._giving_up: list[Callable[[TopicPartition | str], bool]] = []
        self._topics: dict[str, TopicInfo] = {}
        self._logs: dict[TopicPartition, _Log] = {}
        self._open: dict[str, _Transaction] = {}
        self._readers: list[FakeReader] = []
        self._members: dict[str, list[FakeMember]] = {}
        self._faults: list[Fault] = []
        self._coordinator = asyncio.Lock()
        self._generation = 0

    # -- for tests -------------------------------------------------------------------------------------

    def inject(
        self,
        step: Step,
        error: Exception | None = None,
        *,
        took_effect: bool = False,
        skip: int = 0,
        times: int = 1,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Make a step fail.

        Args:
            step: which one.
            error: what it raises; None: it never answers.
            took_effect: whether it does its work before it fails.
            skip: calls of the step that go well before.
            times: calls that fail.
            then: called when it fails, for what happens elsewhere meanwhile.
        """
        self._faults.append(Fault(step, error, took_effect, skip, times, then))

    def give_up_markers(self, where: Callable[[TopicPartition | str], bool]) -> None:
        """Leave out markers of the next transaction that is decided, as Kafka does for partitions without a leader.

        Args:
            where: asked for each partition that was written to, and for each group (by its name): whether to leave
                it open. What was written there stays invisible until another transaction of the same id ends there,
                in whatever way that one is decided.
        """
        self._giving_up.append(where)

    def left_open(self) -> bool:
        """Whether anything waits for a marker that was given up."""
        return any(left.written or left.offsets for left in self._left.values())

    def write(self, tp: TopicPartition, *values: bytes | None, key: bytes | None = None) -> None:
        """Put records in a partition, at timestamps that tell their offsets."""
        log = self.log(tp)
        for value in values:
            log.append(tp, [Outgoing(key, value, log.high_watermark)])
        self.wake()

    def values(self, topic: str) -> list[bytes | None]:
        """What a read-committed reader finds in a topic: the values by partition and offset."""
        return [record.value for record in self.records(topic)]

    def records(self, topic: str) -> list[StoredRecord]:
        """The records that a read-committed reader finds in a topic."""
        found = []
        for tp in self.partitions(topic):
            log = self._logs[tp]
            found += [record for record in log.records[: log.end - log.start] if record is not None]
        return found

    def partitions(self, topic: str) -> list[TopicPartition]:
        """A topic's partitions."""
        return [TopicPartition(topic, partition) for partition in range(self._topics[topic].partitions)]

    def make(self, topic: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> list[TopicPartition]:
        """Make a topic; its partitions."""
        self._topics[topic] = TopicInfo(topic, partitions, dict(config or {}))
        for tp in self.partitions(topic):
            self._logs[tp] = _Log()
        return self.partitions(topic)

    def skip_offsets(self, tp: TopicPartition, count: int) -> None:
        """Leave a gap at the end of a partition, as aborted transactions and compaction do."""
        self.log(tp).records += [None] * count
        self.wake()

    def truncate(self, tp: TopicPartition, before: int) -> None:
        """Forget the records below an offset, as retention does."""
        log = self.log(tp)
        del log.records[: before - log.start]
        log.start = before

    def evict(self, group: str) -> None:
        """Assign a group's partitions anew without revoking them first, as after a pause of the process."""
        self._generation += 2
        for member in self._members.get(group, []):
            member.take(member.owned, self._generation)

    def log(self, tp: TopicPartition) -> _Log:
        """A partition's log."""
        log = self._logs.get(tp)
        if log is None:
            raise TopicError(f"{tp}: no such partition")
        return log

    def wake(self) -> None:
        """Tell readers that wait."""
        for reader in self._readers:
            reader.woken.set()

    async def step(self, step: Step, act: Callable[[], T]) -> T:
        """Do something, unless a fault is due."""
        self.calls.append(step)
        await asyncio.sleep(0)
        fault = self._due(step)
        if fault is None:
            return act()
        if fault.took_effect:
            act()
        if fault.then is not None:
            fault.then()
        if fault.error is None:
            await asyncio.Event().wait()
        raise fault.error or AssertionError("unreachable")

    def _due(self, step: Step) -> Fault | None:
        for fault in self._faults:
            if fault.step == step:
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
                return fault
        return None

    # -- the port --------------------------------------------------------------------------------------

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        for reader in list(self._readers):
            await reader.close()

    async def info(self) -> BrokerInfo:
        return BrokerInfo(self.url, "fake", "1", 1)

    async def topics(self) -> dict[str, TopicInfo]:
        return await self.step("topics", lambda: dict(self._topics))

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        for spec in specs:
            await self.step("create", lambda spec=spec: self._create(spec))  # type: ignore[misc]

    def _create(self, spec: TopicSpec) -> None:
        partitions = self.default_partitions if spec.partitions is None else spec.partitions
        if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", spec.name) or spec.name in {".", ".."}:
            raise TopicError(f"{spec.name!r} is no topic's name")
        if partitions < 1 or not spec.config.get("retention.ms", "1").isdigit() or not self.creation_allowed:
            raise TopicError(f"{spec} is refused")
        if spec.name not in self._topics:
            self.make(spec.name, partitions, spec.config)

    async def grow_topic(self, name: str, partitions: int) -> None:
        await self.step("create", lambda: self.grow(name, partitions))

    def grow(self, topic: str, partitions: int) -> None:
        """Add partitions to a topic; members hear of it with the next rebalance."""
        present = self._topics[topic]
        self._topics[topic] = TopicInfo(topic, partitions, present.config)
        for partition in range(present.partitions, partitions):
            self._logs[TopicPartition(topic, partition)] = _Log()

    async def delete_topics(self, names: Collection[str]) -> None:
        for name in names:
            if name in self._topics:
                for tp in self.partitions(name):
                    del self._logs[tp]
                del self._topics[name]

    async def offsets(self, partitions: Collection[TopicPartition], at: Moment) -> dict[TopicPartition, int]:
        return await self.step("look_up", lambda: {tp: self._moment(self.log(tp), at) for tp in partitions})

    def _moment(self, log: _Log, at: Moment) -> int:
        if at == "earliest":
            return log.start
        if at == "high_watermark":
            return log.high_watermark
        if at == "end":
            return log.end
        seen = log.records[: log.end - log.start]
        return next((r.offset for r in seen if r is not None and r.timestamp >= at), log.end)

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, Committed | None]:
        known = self.group_offsets.get(group, {})
        return await self.step("committed", lambda: {tp: known.get(tp) for tp in partitions})

    async def pending(self, group: str, partitions: Collection[TopicPartition]) -> frozenset[TopicPartition]:
        def find() -> frozenset[TopicPartition]:
            unfinished = [*self._open.values(), *self._decided.values(), *self._left.values()]
            waiting = {tp for transaction in unfinished for tp in transaction.offsets.get(group, ())}
            return frozenset(partitions) & waiting

        return await self.step("pending", find)

    async def groups(self) -> list[str]:
        return sorted({*self.group_offsets, *(group for group, members in self._members.items() if members)})

    async def members(self, group: str) -> list[MemberInfo]:
        members = self._members.get(group, [])
        return [MemberInfo(f"{group}-{i}", "fake", "fake", member.owned) for i, member in enumerate(members)]

    async def delete_groups(self, names: Collection[str]) -> None:
        for name in names:
            self.group_offsets.pop(name, None)

    def reader(self) -> FakeReader:
        return FakeReader(self)

    def member(self, group: str, topics: Collection[str]) -> FakeMember:
        return FakeMember(self, group, topics)

    def producer(self) -> FakeProducer:
        return FakeProducer(self)

    def transactional_producer(
        self, transactional_id: str, *, timeout: float | None = None
    ) -> FakeTransactionalProducer:
        return FakeTransactionalProducer(self, transactional_id)

    # -- for its parts ---------------------------------------------------------------------------------

    def attach(self, reader: FakeReader, *, attached: bool) -> None:
        """Count a reader in or out."""
        if attached:
            self._readers.append(reader)
        elif reader in self._readers:
            self._readers.remove(reader)

    def append(self, tp: TopicPartition, records: Sequence[Outgoing], transactional_id: str | None) -> Exception | None:
        """Write records, or say why not."""
        log = self.log(tp)
        limit = int(self._topics[tp.topic].config.get("max.message.bytes", self.max_message_bytes + 70_000))
        if any(len(record.key or b"") + len(record.value or b"") > limit for record in records):
            return TopicError(f"{tp}: a record is above max.message.bytes={limit}")
        offsets = log.append(tp, records)
        if transactional_id is not None and offsets:
            log.open.setdefault(transactional_id, offsets[0])
            self._open[transactional_id].written.setdefault(tp, []).extend(offsets)
        self.wake()
        return None

    def open_transaction(self, transactional_id: str) -> None:
        """Note that the id has a transaction."""
        self.show(transactional_id)
        self._open[transactional_id] = _Transaction()

    def add_offsets(self, transactional_id: str, group: str, offsets: Mapping[TopicPartition, Committed]) -> None:
        """Put a group's offsets in the open transaction."""
        self._open[transactional_id].offsets.setdefault(group, {}).update(offsets)

    def written_ends(self, transactional_id: str) -> dict[TopicPartition, int]:
        """Behind the last record of the id's open transaction, by partition."""
        transaction = self._open.get(transactional_id)
        return {tp: offsets[-1] + 1 for tp, offsets in transaction.written.items()} if transaction else {}

    def finish(self, transactional_id: str, *, commit: bool) -> None:
        """End the id's transaction, if it has one."""
        transaction = self._open.pop(transactional_id, None)
        if transaction is None:
            return
        if commit and self.lazy:
            self._decided[transactional_id] = transaction
            asyncio.get_running_loop().call_later(self.lazy, self.show, transactional_id, transaction)
        else:
            self._settle(transactional_id, transaction, commit=commit)

    def show(self, transactional_id: str, only: _Transaction | None = None) -> None:
        """Let a transaction that is decided show, if it does not yet."""
        transaction = self._decided.get(transactional_id)
        if transaction is not None and only in {None, transaction}:
            del self._decided[transactional_id]
            self._settle(transactional_id, transaction, commit=True)

    def show_all(self) -> None:
        """Let everything that is decided show."""
        for transactional_id in list(self._decided):
            self.show(transactional_id)

    def _settle(self, transactional_id: str, transaction: _Transaction, *, commit: bool) -> None:
        left = self._left.setdefault(transactional_id, _Transaction())
        gives_up = self._giving_up.pop(0) if self._giving_up else lambda _: False
        for tp, offsets in transaction.written.items():
            if gives_up(tp):
                left.written.setdefault(tp, []).extend(offsets)
                continue
            log = self._logs[tp]
            for offset in [*left.written.pop(tp, []), *offsets] if not commit else ():
                log.records[offset - log.start] = None
            left.written.pop(tp, None)
            log.open.pop(transactional_id, None)
            if self.markers:
                log.records.append(None)
        for group, moved in transaction.offsets.items():
            if gives_up(group):
                left.offsets.setdefault(group, {}).update(moved)
                continue
            effective = {**left.offsets.pop(group, {}), **moved}
            if commit:
                self.group_offsets.setdefault(group, {}).update(effective)
        if commit and not transaction.settling:
            self.commits += 1
        self.wake()

    def add_places(self, transactional_id: str, partitions: Collection[TopicPartition], group: str | None) -> None:
        """Have the open transaction end in these places, too."""
        transaction = self._open[transactional_id]
        transaction.settling = True
        for tp in partitions:
            self.log(tp)
            transaction.written.setdefault(tp, [])
        if group is not None:
            transaction.offsets.setdefault(group, {})

    async def rebalance(self, group: str, *, joins: FakeMember | None = None, leaves: FakeMember | None = None) -> None:
        """Take all partitions from all members, and share them among those who are there then."""
        async with self._coordinator:  # one rebalance after the other
            for member in self._members.get(group, []):
                await member.lose()
            members = [member for member in self._members.get(group, []) if member is not leaves]
            self._members[group] = members = [*members, *([joins] if joins else [])]
            self._share(members)

    def _share(self, members: list[FakeMember]) -> None:
        self._generation += 1
        for number, member in enumerate(members):
            everything = [tp for topic in member.topics for tp in self.partitions(topic)]
            member.take(frozenset(everything[number :: len(members)]), self._generation)

    def joined(self, group: str) -> list[FakeMember]:
        """The group's members themselves."""
        return self._members.get(group, [])


@dataclass(eq=False)
class _Transaction:
    written: dict[TopicPartition, list[int]] = field(default_factory=dict)
    offsets: dict[str, dict[TopicPartition, Committed]] = field(default_factory=dict)
    settling: bool = False


class FakeReader(Reader):
    """Reads up to the last stable offset."""

    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self._positions: dict[TopicPartition, int] = {}
        self._turn = 0
        self._closed = False
        self.woken = asyncio.Event()

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        self._broker.attach(self, attached=True)
        self._positions = dict(positions)

    async def fetch(
        self, partitions: Collection[TopicPartition], max_records: int, timeout: float
    ) -> dict[TopicPartition, Sequence[Record]]:
        deadline = asyncio.get_running_loop().time() + timeout
        await self._broker.step("fetch", lambda: None)
        while not self._closed:
            self.woken.clear()
            found = self._take(partitions, max_records)
            if found:
                return found
            try:
                async with asyncio.timeout_at(deadline):
                    await self.woken.wait()
            except TimeoutError:
                break
        return {}

    def _take(self, partitions: Collection[TopicPartition], room: int) -> dict[TopicPartition, Sequence[Record]]:
        mine = [tp for tp in partitions if tp in self._positions]
        self._turn += 1
        cut = self._turn % (len(mine) or 1)
        found: dict[TopicPartition, Sequence[Record]] = {}
        for tp in mine[cut:] + mine[:cut]:
            log, position = self._broker.log(tp), self._positions[tp]
            if not log.start <= position <= log.high_watermark:
                raise OffsetOutOfRangeError(tp, position, "choose another")
            records: list[Record] = []
            while position < log.end and len(records) < room:
                record = log.records[position - log.start]
                position += 1
                if record is not None:
                    records.append(record)
            if position > self._positions[tp]:
                found[tp] = records
                self._positions[tp] = position
                room -= len(records)
        return found

    async def position(self, tp: TopicPartition) -> int:
        return await self._broker.step("position", lambda: self._position(tp))

    def _position(self, tp: TopicPartition) -> int:
        if tp not in self._positions:
            raise BrokerError(f"{tp}: not read by this reader")
        return self._positions[tp]

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self._positions[tp] = offset
        self.woken.set()

    async def close(self) -> None:
        self._closed = True
        self._broker.attach(self, attached=False)
        self.woken.set()


class DeafListener(AssignmentListener):
    """Of a member whose partitions somebody else looks after."""

    def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None:
        pass

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        pass


class FakeMember(FakeReader, Member):
    """Shares its topics' partitions with the group's other members."""

    def __init__(self, broker: FakeBroker, group: str, topics: Collection[str]) -> None:
        super().__init__(broker)
        self.topics = sorted(topics)
        self.owned: frozenset[TopicPartition] = frozenset()
        self._group = group
        self._listener: AssignmentListener | None = None
        self._generation = -1

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        for tp, offset in positions.items():
            self.begin(tp, offset)

    async def join(self, listener: AssignmentListener) -> None:
        self._listener = listener
        self._broker.attach(self, attached=True)
        await self._broker.rebalance(self._group, joins=self)

    def begin(self, tp: TopicPartition, offset: int) -> None:
        if tp in self.owned:
            self._positions[tp] = offset
            self.woken.set()

    def take(self, partitions: frozenset[TopicPartition], generation: int) -> None:
        """Own exactly these, paused."""
        self.owned = partitions
        self._positions = {}
        before, self._generation = self._generation, generation
        if self._listener is not None:
            self._listener.assigned(partitions, generation == before + 1)

    async def commit(self, offsets: Mapping[TopicPartition, Committed]) -> None:
        await self._broker.step("commit", lambda: self._commit(offsets))

    def _commit(self, offsets: Mapping[TopicPartition, Committed]) -> None:
        if not offsets.keys() <= self.owned:
            raise FencedError("these partitions belong to another member")
        self._broker.group_offsets.setdefault(self._group, {}).update(offsets)

    async def lose(self) -> None:
        """Own nothing."""
        if self._listener is not None and self.owned:
            await self._listener.revoked(self.owned)
        self.owned = frozenset()
        self._positions = {}

    async def leave(self) -> None:
        if self._listener is not None:
            await self._broker.rebalance(self._group, leaves=self)
            self._listener = None

    async def close(self) -> None:
        await self.leave()
        await super().close()


class _Ack:
    """What ``send`` returns. Knows whether anybody awaited it."""

    def __init__(self, broker: FakeBroker, error: Exception | None) -> None:
        self._broker = broker
        self._error = error
        self.awaited = False

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._settle().__await__()

    async def _settle(self) -> None:
        await self._broker.step("ack", lambda: None)
        if self._error is not None:
            raise self._error
        self.awaited = True


class FakeProducer(Producer):
    """Writes at once; the acknowledgement comes when it is awaited."""

    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self._id: str | None = None

    async def start(self) -> None:
        pass

    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        return await self._broker.step("send", lambda: self._write(tp, records))

    def _write(self, tp: TopicPartition, records: Sequence[Outgoing]) -> _Ack:
        return _Ack(self._broker, self._broker.append(tp, records, self._id))

    async def close(self) -> None:
        pass


class FakeTransactionalProducer(FakeProducer, TransactionalProducer):
    """Fenced by the next ``start`` of its id; spent after its first error."""

    def __init__(self, broker: FakeBroker, transactional_id: str) -> None:
        super().__init__(broker)
        self._name = transactional_id
        self._id = transactional_id
        self._epoch = 0
        self._acks: list[_Ack] = []
        self._ends: dict[TopicPartition, int] = {}
        self._spent = False
        self.closed = False

    async def start(self) -> None:
        await self._do("start", self._take_over)

    def _take_over(self) -> None:
        self._broker.starts[self._name] = self._epoch = self._broker.starts.get(self._name, 0) + 1
        self._broker.show(self._name)
        self._broker.finish(self._name, commit=False)

    @property
    def written(self) -> Mapping[TopicPartition, int]:
        return self._ends

    async def begin(self) -> None:
        await self._do("begin", lambda: self._broker.open_transaction(self._name))
        self._acks = []
        self._ends = {}

    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        self._check()
        try:
            ack = await super().send(tp, records)
        except BaseException:
            self._spent = True
            raise
        return ack

    def _write(self, tp: TopicPartition, records: Sequence[Outgoing]) -> _Ack:
        self._check()
        self._acks.append(super()._write(tp, records))
        self._ends = self._broker.written_ends(self._name)
        return self._acks[-1]

    async def commit_offsets(self, group: str, offsets: Mapping[TopicPartition, Committed]) -> None:
        await self._do("offsets", lambda: self._broker.add_offsets(self._name, group, offsets))

    async def end(self) -> dict[TopicPartition, int]:
        assert all(ack.awaited for ack in self._acks), "a transaction ends before all of its sends are acknowledged"
        ends: dict[TopicPartition, int] = {}

        def finish() -> None:
            ends.update(self._broker.written_ends(self._name))
            self._broker.finish(self._name, commit=True)

        await self._do("end", finish)
        return ends

    async def abort(self) -> None:
        self._check()
        self._broker.finish(self._name, commit=False)

    async def settle(
        self,
        partitions: Collection[TopicPartition],
        group: str | None,
        offsets: Mapping[TopicPartition, Committed],
        *,
        commit: bool,
    ) -> None:
        def act() -> None:
            self._broker.open_transaction(self._name)
            self._broker.add_places(self._name, partitions, group)
            if group is not None:
                self._broker.add_offsets(self._name, group, offsets)
            self._broker.finish(self._name, commit=commit)

        await self._do("settle", act)

    async def close(self) -> None:
        self.closed = True

    async def _do(self, step: Step, act: Callable[[], None]) -> None:
        def checked() -> None:
            if step != "start":
                self._check()
            act()

        if step != "start":
            self._check()
        try:
            await self._broker.step(step, checked)
        except BaseException:
            self._spent = True
            raise

    def _check(self) -> None:
        assert not self._spent, "a producer is used after an error"
        assert not self.closed, "a producer is used after close()"
        if self._broker.starts.get(self._name) != self._epoch:
            self._spent = True
            raise FencedError(f"{self._name}: a newer owner exists")


def lost(text: str = "connection lost") -> BrokerError:
    """The error of a broker that went away."""
    return BrokerError(text)
