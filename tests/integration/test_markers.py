"""Kafka itself gives up the markers of a decided transaction: every effect appears once all the same.

How that comes about for real: FACTS, "Markers that are given up". Here the node is told not to verify that a
transactional write was announced, and a producer leaves some places unannounced: they get data and no marker.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import aiokafka
import pytest
from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord, crc_of
from rowmill.state.clock import SystemClock
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker, TopicSpec
from rowmill.streams.brokers.kafka import KafkaTransactionalProducer
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.errors import BrokerError
from rowmill.streams.options import WorkerOptions
from rowmill.streams.restore import last_checkpoint
from rowmill.streams.session import Session
from rowmill.streams.transaction import CheckpointMovedError, Transactor
from support.kafka_server import KafkaServer

pytestmark = [pytest.mark.timeout(180)]

PLACES = ("sink", "changelog", "offset")
SUBSETS = [subset for size in range(1, 4) for subset in itertools.combinations(PLACES, size)]


@pytest.fixture
async def broker(kafka_server: Callable[..., KafkaServer]) -> AsyncIterator[Broker]:
    """A node that takes transactional writes that were not announced."""
    server = await asyncio.to_thread(kafka_server, properties={"transaction.partition.verification.enable": "false"})
    broker = open_broker(f"kafka://{server.bootstrap}", environment={})
    await broker.start()
    yield broker
    await broker.close()


class Lane:
    """A pipeline of its own, and commits of its partition whose places can be left without a marker."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.broker = broker
        self.session = Session(name)
        self.source = TopicPartition(f"{name}.in", 0)
        self.sinks = [TopicPartition(f"{name}.out", partition) for partition in range(2)]
        self.changelog = TopicPartition(self.session.changelog(self.source.topic), 0)
        self.transactor = self.make()

    def make(self) -> Transactor:
        """A transactor of the lane's partition."""
        options = WorkerOptions(broker_timeout=20, stall_timeout=60)
        return Transactor(self.broker, self.session, self.source, options, SystemClock())

    async def open(self) -> None:
        """Make the topics, and open."""
        topics = {self.source.topic: 1, self.sinks[0].topic: 2, self.changelog.topic: 1}
        await self.broker.create_topics([TopicSpec(name, partitions) for name, partitions in topics.items()])
        await self.transactor.open()

    def record(self, number: int) -> CheckpointRecord:
        """What the changelog gets with commit ``number``."""
        crc = crc_of(Committed(number + 1, f"map {number}"))
        return CheckpointRecord(number + 1, crc, False, None, {}, {}, {}, "me", "")

    async def commit(self, number: int) -> None:
        """Commit ``number``: one record in each partition of the sink."""

        async def is_ours() -> bool | None:
            last = await last_checkpoint(self.broker, self.changelog, self.source, 20, SystemClock())
            return {number + 1: True, number: False}.get(last.offset if last else 0)

        outputs = {tp: [Outgoing(None, b"%d" % number, 0)] for tp in self.sinks}
        outputs[self.changelog] = [Outgoing(CHECKPOINT_KEY, self.record(number).encode(), 0)]
        await self.transactor.commit(outputs, Committed(number + 1, f"map {number}"), is_ours)

    def leave_out(self, places: Collection[str]) -> None:
        """The next transaction announces none of these. One partition of the sink it always does."""
        producer = self.transactor._producer
        assert isinstance(producer, KafkaTransactionalProducer)
        manager = producer._client._txn_manager
        begin = producer.begin
        silent = {"sink": self.sinks[1], "changelog": self.changelog}

        async def leaving_out() -> None:
            await begin()
            manager._txn_partitions |= {aiokafka.TopicPartition(*silent[place]) for place in places if place in silent}
            if "offset" in places:
                manager._txn_consumer_group = self.session.group
            producer.begin = begin  # type: ignore[method-assign]

        producer.begin = leaving_out  # type: ignore[method-assign]

    def lose_answer(self, *, took_effect: bool) -> None:
        """The next transaction's end fails, with or without effect."""
        producer: Any = self.transactor._producer
        end = producer.end

        async def losing() -> None:
            if took_effect:
                await end()
            raise BrokerError("the answer is lost")

        producer.end = losing

    async def check(self, count: int) -> None:
        """Commits 0 to count - 1 appear once, and nothing is left open; markers come a little later than answers."""
        give_up = SystemClock().monotonic() + 5
        while True:
            try:
                return await self._check(count)
            except AssertionError:
                if SystemClock().monotonic() > give_up:
                    raise
            await asyncio.sleep(0.05)

    async def _check(self, count: int) -> None:
        for tp in (*self.sinks, self.changelog):
            end = (await self.broker.offsets([tp], "end"))[tp]
            assert end == (await self.broker.offsets([tp], "high_watermark"))[tp], tp
        for tp in self.sinks:
            assert await values(self.broker, tp) == [b"%d" % number for number in range(count)], tp
        assert await values(self.broker, self.changelog) == [self.record(number).encode() for number in range(count)]
        assert not await self.broker.pending(self.session.group, [self.source])
        found = await self.broker.committed(self.session.group, [self.source])
        assert found == {self.source: Committed(count, f"map {count - 1}")}


async def values(broker: Broker, tp: TopicPartition) -> list[bytes | None]:
    """What can be read of a partition."""
    reader = broker.reader()
    found: list[bytes | None] = []
    try:
        await reader.start({tp: 0})
        end = (await broker.offsets([tp], "end"))[tp]
        while await reader.position(tp) < end:
            found += [record.value for record in (await reader.fetch([tp], 100, 1)).get(tp, ())]
    finally:
        await reader.close()
    return found


async def an_answer_is_lost(lane: Lane, places: Collection[str], *, took_effect: bool) -> None:
    """A commit of unknown outcome, some of whose places get no marker."""
    await lane.open()
    await lane.commit(0)
    await lane.check(1)  # or its markers would end what is not announced
    lane.leave_out(places)
    lane.lose_answer(took_effect=took_effect)
    await lane.commit(1)
    await lane.check(2)
    await lane.commit(2)
    await lane.check(3)


async def the_next_one_fails(lane: Lane, places: Collection[str]) -> None:
    """A commit that is confirmed, some of whose places get no marker, and the next one fails at once."""
    await lane.open()
    await lane.commit(0)
    await lane.check(1)  # or its markers would end what is not announced
    lane.leave_out(places)
    await lane.commit(1)
    producer: Any = lane.transactor._producer

    async def failing() -> None:
        raise BrokerError("gone")

    producer.begin = failing
    await lane.commit(2)
    await lane.check(3)


async def the_process_dies(lane: Lane, places: Collection[str]) -> None:
    """The same, and the next owner of the partition has to find out."""
    await lane.open()
    await lane.commit(0)
    await lane.check(1)  # or its markers would end what is not announced
    lane.leave_out(places)
    await lane.commit(1)
    await lane.transactor.close()
    lane.transactor = lane.make()
    assert await lane.transactor.open() == Committed(2, "map 1")
    await lane.commit(2)
    await lane.check(3)


async def it_goes_with_the_next_one(lane: Lane) -> None:
    """A commit that is confirmed gets no marker where the next one writes, and that one is aborted."""
    await lane.open()
    await lane.commit(0)
    await lane.check(1)
    lane.leave_out(PLACES)
    # The one partition that gets its marker is not written to, or the commit would be lost in part only.
    sinks, lane.sinks = lane.sinks, lane.sinks[1:]
    producer: Any = lane.transactor._producer
    begin = producer.begin

    async def beginning() -> None:
        await begin()
        producer._client._txn_manager.maybe_add_partition_to_txn(aiokafka.TopicPartition(*sinks[0]))

    producer.begin = beginning
    await lane.commit(1)
    producer.begin = KafkaTransactionalProducer.begin.__get__(producer)
    lane.lose_answer(took_effect=False)
    with pytest.raises(CheckpointMovedError, match="was lost"):
        await lane.commit(2)
    lane.sinks = sinks
    assert await lane.transactor.open() == Committed(1, "map 0")
    await lane.commit(1)
    await lane.commit(2)
    await lane.check(3)


async def test_a_commit_that_goes_with_the_next_one(broker: Broker) -> None:
    """What was confirmed, left open and then aborted with the next transaction is taken back and made again."""
    lane = Lane(broker, "lane")
    try:
        await it_goes_with_the_next_one(lane)
    finally:
        await lane.transactor.close()


async def test_nothing_of_a_closed_producer_goes_on(kafka_server: Callable[..., KafkaServer]) -> None:
    """A producer that is closed while its broker is away leaves no task that would go on when it comes back.

    One that looked for its coordinator for some seconds more added its partitions to a transaction when the broker was
    there again, and the next producer's start aborted it, with the commit before it, whose markers had been given up.
    """
    server = await asyncio.to_thread(kafka_server)
    broker = open_broker(f"kafka://{server.bootstrap}", environment={})
    await broker.start()
    try:
        await broker.create_topics([TopicSpec("out", 1)])
        producer = broker.transactional_producer("id")
        await producer.start()
        await producer.begin()
        await (await producer.send(TopicPartition("out", 0), [Outgoing(None, b"x", 0)]))
        await asyncio.to_thread(server.kill)
        committing = asyncio.create_task(producer.commit_offsets("group", {TopicPartition("out", 0): Committed(1)}))
        await asyncio.sleep(1)  # by now it looks for a coordinator, again and again
        committing.cancel()
        closing = asyncio.create_task(producer.close())
        await asyncio.sleep(1)
        left = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]  # type: ignore[union-attr]
        assert not [name for name in left if name.startswith("Sender.")], left
        await closing
    finally:
        await broker.close()


async def test_markers_are_given_up(broker: Broker) -> None:
    """Whichever places get no marker, and whoever finds it: records, tables and offsets agree, each effect once."""
    lanes: list[Lane] = []
    room = asyncio.Semaphore(8)

    async def run(number: int, scenario: Callable[..., Any], places: Collection[str], **options: bool) -> None:
        lane = Lane(broker, f"lane{number}")
        lanes.append(lane)
        async with room:
            try:
                await scenario(lane, places, **options)
            except Exception as error:
                error.add_note(f"{scenario.__name__} {places} {options}")
                raise
            finally:
                await lane.transactor.close()

    numbers = itertools.count()
    async with asyncio.TaskGroup() as group:
        for places in SUBSETS:
            for took_effect in (False, True):
                group.create_task(run(next(numbers), an_answer_is_lost, places, took_effect=took_effect))
            group.create_task(run(next(numbers), the_next_one_fails, places))
            group.create_task(run(next(numbers), the_process_dies, places))
    assert len(lanes) == 4 * len(SUBSETS)
