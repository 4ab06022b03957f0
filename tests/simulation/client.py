"""One process's client of the model brokers: the port, spoken over a network that loses, delays and repeats.

It does what aiokafka does as far as the worker can tell: answers that only mean "not yet" are asked again inside,
fetches go on in the background while ``fetch`` waits for as long as it was told, the group's coordinator is a task
of its own that awaits the listener, and a transactional producer keeps no watch over sends that nobody awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from rowmill.state.model import Committed, Outgoing, Record, TopicPartition
from rowmill.streams.brokers.base import (
    AssignmentListener,
    Broker,
    BrokerInfo,
    Member,
    Moment,
    Producer,
    Reader,
    TopicInfo,
    TopicSpec,
    TransactionalProducer,
)
from rowmill.streams.errors import BrokerError, FencedError, OffsetOutOfRangeError

from simulation.cluster import Cluster, Found, Stamp
from simulation.groups import UnknownMemberError
from simulation.network import Link, Network

OPENED: ContextVar[float] = ContextVar("opened", default=-1.0)
"""When the transactional producer of the partition task was started, in whose context a handler runs."""

_FETCH_PATIENCE = 3.0
_JOIN_PATIENCE = 40.0
_HEARTBEAT_PATIENCE = 2.0
_LEAVE_PATIENCE = 2.0
_REJOIN_SECONDS = 0.1


class Connection(Broker):
    """A process's broker.

    Args:
        name: the process's.
        cluster: the brokers.
        network: the way there.
        heartbeat: seconds between two.
        on_bug: told of what a listener raised, which a real client would swallow.
        on_start: told of each start of a transactional producer, and of what is owned then.
        on_anew: told of assignments before which others may have owned the partitions.
        tells_evicted: whether a member that was put out has ``revoked`` called before it joins again.
    """

    def __init__(
        self,
        name: str,
        cluster: Cluster,
        network: Network,
        *,
        heartbeat: float,
        on_bug: Callable[[BaseException], None],
        on_start: Callable[[str, frozenset[TopicPartition] | None], None],
        on_anew: Callable[[str, frozenset[TopicPartition]], None],
        tells_evicted: bool,
    ) -> None:
        self.url = f"sim://{name}"
        self.default_partitions = 4
        self.max_message_bytes = 1_000_000
        self.name = name
        self.cluster = cluster
        self.link = Link()
        self.heartbeat = heartbeat
        self.on_bug = on_bug
        self.on_start = on_start
        self.on_anew = on_anew
        self.owned: frozenset[TopicPartition] | None = frozenset()
        """What the process's member owns, as far as it was told; None between two assignments."""
        self.tells_evicted = tells_evicted
        self._network = network
        self._members = 0

    @property
    def now(self) -> float:
        """Virtual time."""
        return self._network.loop.time()

    async def call(self, what: str, act: Callable[[bool], Any], *, coordinator: bool = False) -> Any:
        """Over the network."""
        return await self._network.call(self.link, what, act, coordinator=coordinator)

    def next_member(self) -> str:
        """A name that no member had before."""
        self._members += 1
        return f"{self.name}.{self._members}"

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def info(self) -> BrokerInfo:
        return BrokerInfo(self.url, "sim", "1", 1)

    async def topics(self) -> dict[str, TopicInfo]:
        found: dict[str, TopicInfo] = await self.call("topics", lambda _: dict(self.cluster.store._topics))
        return found

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        for spec in specs:
            await self.call("create", lambda _, spec=spec: self.cluster.store._create(spec))  # type: ignore[misc]

    async def delete_topics(self, names: Collection[str]) -> None:
        raise NotImplementedError

    async def offsets(self, partitions: Collection[TopicPartition], at: Moment) -> dict[TopicPartition, int]:
        store = self.cluster.store
        found: dict[TopicPartition, int] = await self.call(
            "offsets", lambda _: {tp: store._moment(store.log(tp), at) for tp in partitions}
        )
        return found

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, Committed | None]:
        found: dict[TopicPartition, Committed | None] = await self.call(
            "committed", lambda _: self.cluster.committed(group, partitions), coordinator=True
        )
        return found

    async def groups(self) -> list[str]:
        return sorted(self.cluster.groups)

    async def delete_groups(self, names: Collection[str]) -> None:
        raise NotImplementedError

    def reader(self) -> SimReader:
        return SimReader(self)

    def member(self, group: str, topics: Collection[str]) -> SimMember:
        return SimMember(self, group, sorted(topics))

    def producer(self) -> PlainProducer:
        return PlainProducer(self)

    def transactional_producer(self, transactional_id: str, *, timeout: float | None = None) -> SimProducer:
        return SimProducer(self, transactional_id)


# --- reading ---------------------------------------------------------------------------------------------------


class SimReader(Reader):
    """Fetches in the background; ``fetch`` hands out what has come."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._positions: dict[TopicPartition, int] = {}
        self._moved = asyncio.Event()
        self._pending: asyncio.Task[dict[TopicPartition, Found]] | None = None
        self._asked: dict[TopicPartition, int] = {}
        self._closed = False

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        self._positions = dict(positions)

    async def fetch(
        self, partitions: Collection[TopicPartition], max_records: int, timeout: float
    ) -> dict[TopicPartition, Sequence[Record]]:
        end = self._connection.now + timeout
        while not self._closed:
            asked = {tp: self._positions[tp] for tp in partitions if tp in self._positions}
            if not asked:
                await asyncio.sleep(min(timeout, 0.02))
                return {}
            if self._pending is None or asked != self._asked:
                self._drop_pending()
                self._asked = asked
                self._moved.clear()
                self._pending = asyncio.create_task(self._ask(asked, max_records))
                self._pending.add_done_callback(lambda _: self._moved.set())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await self._moved.wait()
            self._moved.clear()
            if self._pending is not None and self._pending.done():
                found = self._taken()
                if found:
                    return found
            if self._connection.now >= end:
                return {}
        return {}

    async def _ask(self, asked: Mapping[TopicPartition, int], room: int) -> dict[TopicPartition, Found]:
        try:
            async with asyncio.timeout(_FETCH_PATIENCE):
                found: dict[TopicPartition, Found] = await self._connection.call(
                    "fetch", lambda _: self._connection.cluster.fetch(asked, room, 0.5)
                )
        except TimeoutError:
            return {}
        return found

    def _taken(self) -> dict[TopicPartition, Sequence[Record]]:
        """What came, as far as it lies where the positions are now."""
        pending, self._pending = self._pending, None
        assert pending is not None
        try:
            found = pending.result()
        except OffsetOutOfRangeError as error:
            if self._positions.get(error.tp) != self._asked.get(error.tp):
                return {}
            raise
        taken: dict[TopicPartition, Sequence[Record]] = {}
        for tp, (records, position) in found.items():
            if self._positions.get(tp) == self._asked[tp]:
                self._positions[tp] = position
                taken[tp] = records
        return taken

    def _drop_pending(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None

    async def position(self, tp: TopicPartition) -> int:
        if tp not in self._positions:
            raise BrokerError(f"{tp}: not read by this reader")
        return self._positions[tp]

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self._positions[tp] = offset
        self._moved.set()

    async def close(self) -> None:
        self._closed = True
        self._moved.set()
        self._drop_pending()


class SimMember(SimReader, Member):
    """A member of a group, with a coordinator's task of its own."""

    def __init__(self, connection: Connection, group: str, topics: Sequence[str]) -> None:
        super().__init__(connection)
        self._group = group
        self._topics = topics
        self._name = connection.next_member()
        self._commits = 0
        self._listener: AssignmentListener | None = None
        self._coordinator: asyncio.Task[None] | None = None
        self._generation = -1

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        pass

    async def join(self, listener: AssignmentListener) -> None:
        self._listener = listener
        async with self._deadline(10.0, "connect"):
            await self._connection.call("connect", lambda _: None)
        self._coordinator = asyncio.create_task(self._coordinate(listener))

    @contextlib.asynccontextmanager
    async def _deadline(self, seconds: float, what: str):  # type: ignore[no-untyped-def]
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise BrokerError(f"{what}: no answer within {seconds:g} s") from None

    async def _coordinate(self, listener: AssignmentListener) -> None:
        """Join, be told what is owned, stay alive, and again when something changes."""
        evicted = False
        while True:
            if self._connection.owned and (not evicted or self._connection.tells_evicted):
                await self._revoke(listener)
            share = await self._enter()
            if share is not None:
                evicted = False
                before, (self._generation, self._connection.owned) = self._generation, share
                self._positions = {}
                if self._generation != before + 1:
                    self._connection.on_anew(self._connection.name, share[1])
                try:
                    listener.assigned(share[1], self._generation == before + 1)
                except Exception as error:  # noqa: BLE001 - a client swallows it; a simulation tells
                    self._connection.on_bug(error)
                evicted = await self._stay()
            else:
                evicted = True
            if evicted:
                self._name = self._connection.next_member()

    async def _revoke(self, listener: AssignmentListener) -> None:
        try:
            await listener.revoked(self._connection.owned or frozenset())
        except Exception as error:  # noqa: BLE001 - see _coordinate
            self._connection.on_bug(error)
        self._connection.owned = None
        self._positions = {}

    async def _enter(self) -> tuple[int, frozenset[TopicPartition]] | None:
        """A place in the next generation; None when this member is not known any more."""
        while True:
            name = self._name
            try:
                async with self._deadline(_JOIN_PATIENCE, "join"):
                    share: tuple[int, frozenset[TopicPartition]] = await self._connection.call(
                        "join",
                        lambda _, name=name: self._connection.cluster.group(self._group, self._topics).join(name),  # type: ignore[misc]
                        coordinator=True,
                    )
            except UnknownMemberError:
                return None
            except BrokerError:
                await asyncio.sleep(_REJOIN_SECONDS)
            else:
                return share

    async def _stay(self) -> bool:
        """Send heartbeats until the group changes; whether that is because this member was put out."""
        while True:
            await asyncio.sleep(self._connection.heartbeat)
            try:
                async with self._deadline(_HEARTBEAT_PATIENCE, "heartbeat"):
                    same = await self._connection.call(
                        "heartbeat",
                        lambda _: self._connection.cluster.group(self._group).heartbeat(self._name, self._generation),
                        coordinator=True,
                    )
            except UnknownMemberError:
                return True
            except BrokerError:
                continue
            if not same:
                return False

    def begin(self, tp: TopicPartition, offset: int) -> None:
        if tp in (self._connection.owned or ()):
            self._positions[tp] = offset
            self._moved.set()

    async def commit(self, offsets: Mapping[TopicPartition, Committed]) -> None:
        if self._listener is None:
            raise FencedError("this member has left its group")
        self._commits += 1
        name, generation, number, moved = self._name, self._generation, self._commits, dict(offsets)
        cluster = self._connection.cluster
        await self._connection.call(
            "commit", lambda _: cluster.commit(self._group, name, generation, number, moved), coordinator=True
        )

    async def leave(self) -> None:
        listener, self._listener = self._listener, None
        if self._coordinator is not None:
            self._coordinator.cancel()
        if listener is not None and self._connection.owned:
            await self._revoke(listener)
        self._connection.owned, self._positions = frozenset(), {}
        await super().close()
        if listener is not None:
            with contextlib.suppress(BrokerError, UnknownMemberError):
                async with self._deadline(_LEAVE_PATIENCE, "leave"):
                    await self._connection.call(
                        "leave", lambda _: self._connection.cluster.group(self._group, self._topics).leave(self._name)
                    )

    async def close(self) -> None:
        await self.leave()


# --- writing ---------------------------------------------------------------------------------------------------


class SimProducer(TransactionalProducer):
    """A transactional producer. What it sends goes off at once; what comes of it is known to who awaits it."""

    def __init__(self, connection: Connection, transactional_id: str) -> None:
        self._connection = connection
        self._id = transactional_id
        self._epoch = -1
        self._number = 0
        self._added: set[TopicPartition | str] = set()
        self._sequences: dict[TopicPartition, int] = {}
        self._last: dict[TopicPartition, asyncio.Task[None]] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._sends: list[asyncio.Task[None]] = []
        self._closed = False

    @property
    def _stamp(self) -> Stamp:
        return Stamp(self._id, self._epoch, self._number)

    async def start(self) -> None:
        def act(_: bool) -> tuple[int, float]:
            return self._connection.cluster.init_producer(self._id), self._connection.now

        await self._connection.call("connect", lambda _: None)
        self._connection.on_start(self._id, self._connection.owned)
        self._epoch, opened = await self._connection.call("start", act, coordinator=True)
        OPENED.set(opened)

    async def begin(self) -> None:
        self._check()
        self._number += 1
        self._added, self._last, self._ends, self._sends = set(), {}, {}, []

    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        self._check()
        sequence = self._sequences.get(tp, 0)
        self._sequences[tp] = sequence + len(records)
        sending = asyncio.create_task(self._write(tp, sequence, tuple(records), self._last.get(tp), self._stamp))
        self._last[tp] = sending
        self._sends.append(sending)
        return sending

    async def _write(
        self,
        tp: TopicPartition,
        sequence: int,
        records: Sequence[Outgoing],
        before: asyncio.Task[None] | None,
        stamp: Stamp,
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        await self._add(tp, stamp)
        cluster = self._connection.cluster
        last = await self._connection.call("produce", lambda _: cluster.produce(stamp, tp, sequence, records))
        if last >= 0:
            self._ends[tp] = last + 1

    async def _add(self, part: TopicPartition | str, stamp: Stamp) -> None:
        if part not in self._added:
            cluster = self._connection.cluster
            await self._connection.call("add", lambda copy: cluster.add(stamp, part, is_copy=copy), coordinator=True)
            self._added.add(part)

    async def commit_offsets(self, group: str, offsets: Mapping[TopicPartition, Committed]) -> None:
        self._check()
        stamp, cluster, moved = self._stamp, self._connection.cluster, dict(offsets)
        await self._add(group, stamp)
        await self._connection.call(
            "send_offsets", lambda copy: cluster.commit_offsets(stamp, group, moved, is_copy=copy), coordinator=True
        )

    async def end(self) -> dict[TopicPartition, int]:
        await self._end(commit=True)
        return dict(self._ends)

    async def abort(self) -> None:
        await self._end(commit=False)

    async def _end(self, *, commit: bool) -> None:
        self._check()
        stamp, cluster = self._stamp, self._connection.cluster
        if self._added or self._sends:
            await self._connection.call(
                "end", lambda copy: cluster.end(stamp, commit=commit, is_copy=copy), coordinator=True
            )

    async def close(self) -> None:
        self._closed = True
        for sending in self._sends:
            sending.cancel()

    def _check(self) -> None:
        assert not self._closed, "a producer is used after close()"
        assert self._epoch >= 0, "a producer is used before start()"


class PlainProducer(Producer):
    """An idempotent producer without transactions; spent after its first error, since a sequence number is missing."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._number = -1
        self._sequences: dict[TopicPartition, int] = {}
        self._last: dict[TopicPartition, asyncio.Task[None]] = {}

    async def start(self) -> None:
        cluster = self._connection.cluster
        self._number, opened = await self._connection.call(
            "start", lambda _: (cluster.new_producer(), self._connection.now), coordinator=True
        )
        OPENED.set(opened)

    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        sequence = self._sequences.get(tp, 0)
        self._sequences[tp] = sequence + len(records)
        self._last[tp] = asyncio.create_task(self._write(tp, sequence, tuple(records), self._last.get(tp)))
        return self._last[tp]

    async def _write(
        self, tp: TopicPartition, sequence: int, records: Sequence[Outgoing], before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        cluster = self._connection.cluster
        await self._connection.call("produce", lambda _: cluster.append(self._number, tp, sequence, records))

    async def close(self) -> None:
        for sending in self._last.values():
            sending.cancel()
