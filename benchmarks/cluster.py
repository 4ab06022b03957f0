"""Kafka as the harness uses it: topics filled and read back, and how far a group has come."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiokafka
import orjson
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner

if TYPE_CHECKING:
    from .measure import Job

ROOT = Path(__file__).resolve().parents[1]
PARTITIONS = 4
_BATCH_BYTES = 1_000_000
_TOPIC = {"message.timestamp.type": "CreateTime", "retention.ms": "-1"}


@contextlib.contextmanager
def apache_kafka(*, heap: str = "1g") -> Iterator[tuple[str, int | None]]:
    """``host:port`` and, where it was started here, the process of an Apache Kafka."""
    given = os.environ.get("ROWMILL_TEST_BOOTSTRAP")
    if given:
        yield given, None
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from support.kafka_server import find_source

    with find_source()(heap=heap) as kafka:
        yield kafka.bootstrap, kafka.pid


def kafka_version() -> str:
    """Of the one that would be started here."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.kafka_server import kafka_version as version

    return "of ROWMILL_TEST_BOOTSTRAP" if os.environ.get("ROWMILL_TEST_BOOTSTRAP") else version()


class Cluster:
    """A running Kafka, seen from the harness.

    Args:
        bootstrap: ``host:port``.
        pid: the broker's process, if it is known: its processor time is told beside the clients'.
    """

    def __init__(self, bootstrap: str, pid: int | None) -> None:
        self.bootstrap = bootstrap
        self.pid = pid
        self._filled: dict[tuple[int, ...], str] = {}

    async def __aenter__(self) -> Cluster:
        self._admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        self._lookup = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap, isolation_level="read_committed", enable_auto_commit=False
        )
        await self._admin.start()
        await self._lookup.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._filled:
            await self._admin.delete_topics(list(self._filled.values()))
        await self._lookup.stop()
        await self._admin.close()

    # --- topics ------------------------------------------------------------------------------------------------

    async def create(self, topic: str, partitions: int = PARTITIONS) -> str:
        """Make a topic, and wait until it has its leaders."""
        response = await self._admin.create_topics([NewTopic(topic, partitions, 1, topic_configs=_TOPIC)])
        for name, code, *_ in response.topic_errors:
            if code:
                raise SystemExit(f"the topic {name} could not be made: error {code}")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            (described,) = await self._admin.describe_topics([topic])
            leaders = [partition["leader"] for partition in described["partitions"]]
            if len(leaders) == partitions and min(leaders) >= 0:
                return topic
            await asyncio.sleep(0.05)
        raise SystemExit(f"the topic {topic} has no leaders after 30 s")

    async def delete(self, name: str) -> None:
        """Delete all topics with this in their names: results of one run may be large. (Groups are small, and stay.)"""
        topics = [topic for topic in await self._admin.list_topics() if name in topic]
        if topics:
            await self._admin.delete_topics(topics)

    async def filled(self, job: Job) -> str:
        """A topic with a job's rows, made once and read by everybody."""
        kind = (job.rows, job.keys, job.row_bytes)
        if kind not in self._filled:
            topic = await self.create(f"rows-{os.getpid()}-{len(self._filled)}")
            await self.fill_with(topic, job)
            self._filled[kind] = topic
        return self._filled[kind]

    async def fill_with(self, topic: str, job: Job) -> None:
        """Write a job's rows."""
        await self.fill(topic, ((job.key(number), orjson.dumps(job.row(number))) for number in range(job.rows)))

    async def fill(self, topic: str, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Write records to the partitions of their keys, in batches."""
        partitioner, partitions = DefaultPartitioner(), list(range(await self._partitions(topic)))
        producer = aiokafka.AIOKafkaProducer(
            bootstrap_servers=self.bootstrap, enable_idempotence=True, max_batch_size=_BATCH_BYTES
        )
        await producer.start()
        try:
            batches: dict[int, Any] = {}
            sent: list[Awaitable[Any]] = []
            for key, value in records:
                partition, now = partitioner(key, partitions, partitions), int(time.time() * 1000)
                batch = batches.setdefault(partition, producer.create_batch())
                if batch.append(key=key, value=value, timestamp=now) is None:
                    sent.append(await producer.send_batch(batch, topic, partition=partition))
                    batches[partition] = producer.create_batch()
                    batches[partition].append(key=key, value=value, timestamp=now)
            for partition, batch in batches.items():
                sent.append(await producer.send_batch(batch, topic, partition=partition))
            for each in sent:
                await each
        finally:
            await producer.stop()

    async def _partitions(self, topic: str) -> int:
        (described,) = await self._admin.describe_topics([topic])
        return len(described["partitions"])

    # --- how far things are ------------------------------------------------------------------------------------

    async def ends(self, topic: str) -> dict[Any, int]:
        """The last stable offsets."""
        tps = [aiokafka.TopicPartition(topic, partition) for partition in range(await self._partitions(topic))]
        ends: dict[Any, int] = await self._lookup.end_offsets(tps)
        return ends

    async def committed(self, group: str, topic: str) -> int:
        """The sum of what a group has committed of a topic; 0 while nobody can say."""
        try:
            offsets = await self._admin.list_consumer_group_offsets(group)
        except KafkaError as error:
            return _not_yet(error)
        return sum(max(0, found.offset) for tp, found in offsets.items() if tp.topic == topic)

    async def members(self, group: str) -> int:
        """How many members have their partitions; 0 while the group rebalances."""
        try:
            responses = await self._admin.describe_consumer_groups([group])
        except KafkaError as error:
            return _not_yet(error)
        for response in responses:
            for _code, _name, state, _type, _protocol, members, *_ in response.groups:
                if state == "Stable":
                    return len(members)
        return 0

    async def read(self, topic: str) -> AsyncIterator[Sequence[Any]]:
        """Everything that is committed in a topic, by runs of one partition."""
        ends = await self.ends(topic)
        consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=4 * 1024 * 1024,
        )
        await consumer.start()
        try:
            consumer.assign(list(ends))
            await consumer.seek_to_beginning()
            while any([await consumer.position(tp) < end for tp, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=1_000)).values():
                    yield records
        finally:
            await consumer.stop()


def _not_yet(error: KafkaError) -> int:
    """Nothing, where the error says that asking again may help: a fresh broker has no coordinators yet."""
    if not error.retriable:
        raise error
    return 0
