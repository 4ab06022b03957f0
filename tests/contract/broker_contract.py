"""What every broker must do, whichever it is: inherited by one class per adapter.

A subclass gives a started ``broker``. Names are unique per test, because Kafka's node is shared.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rowmill.state.model import Committed, Outgoing, Record, TopicPartition
from rowmill.streams.brokers.base import Broker, Producer, Reader, TopicSpec, TransactionalProducer
from rowmill.streams.errors import FencedError, OffsetOutOfRangeError, TopicError

DEADLINE = 30.0
NOW = 1_750_000_000_000


class Owners:
    """Starts transactional producers, and closes them at the end of the test."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._started: list[tuple[str, TransactionalProducer]] = []

    async def __call__(self, transactional_id: str) -> TransactionalProducer:
        """A started producer for the id."""
        producer = self._broker.transactional_producer(transactional_id)
        self._started.append((transactional_id, producer))
        async with asyncio.timeout(DEADLINE):
            await producer.start()
        return producer

    async def settle(self) -> None:
        """Wait until every transaction that ended can be seen, the way a partition's next owner does.

        Kafka answers a commit before its markers are written: for some milliseconds the records are not
        readable and the offsets not committed. A start of the same id waits for them; what is read then is final.
        """
        for transactional_id in {name for name, _ in self._started}:
            await self(transactional_id)

    async def close(self) -> None:
        """Close all of them."""
        for _, producer in self._started:
            await producer.close()


def out(value: bytes | None, key: bytes | None = None, timestamp: int = NOW, headers: Any = ()) -> Outgoing:
    """A record on its way out."""
    return Outgoing(key, value, timestamp, headers)


def values_of(records: Sequence[Record]) -> list[bytes | None]:
    """What the records hold."""
    return [record.value for record in records]


async def take(reader: Reader, partitions: Collection[TopicPartition], count: int) -> dict[TopicPartition, list[Any]]:
    """Fetch until so many records came in all."""
    taken: dict[TopicPartition, list[Any]] = {tp: [] for tp in partitions}
    async with asyncio.timeout(DEADLINE):
        while sum(map(len, taken.values())) < count:
            for tp, records in (await reader.fetch(partitions, 50_000, 1.0)).items():
                taken[tp] += records
    return taken


async def drain(broker: Broker, partitions: Collection[TopicPartition]) -> dict[TopicPartition, list[Any]]:
    """All committed records of these partitions, read until the positions reach the ends."""
    reader = broker.reader()
    taken: dict[TopicPartition, list[Any]] = {tp: [] for tp in partitions}
    try:
        await reader.start(await broker.offsets(partitions, "earliest"))
        ends = await broker.offsets(partitions, "end")
        async with asyncio.timeout(DEADLINE):
            for tp, end in ends.items():
                while await reader.position(tp) < end:
                    taken[tp] += (await reader.fetch([tp], 50_000, 0.5)).get(tp, ())
    finally:
        await reader.close()
    return taken


async def put(producer: Producer, tp: TopicPartition, *records: Outgoing) -> None:
    """Write records and wait until they are."""
    await (await producer.send(tp, records))


class Listener:
    """Remembers what a member was told."""

    def __init__(self) -> None:
        self.owned: frozenset[TopicPartition] = frozenset()
        self.lost: list[frozenset[TopicPartition]] = []
        self.consecutive: list[bool] = []
        self.told = asyncio.Event()

    def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None:
        self.owned = partitions
        self.consecutive.append(consecutive)
        self.told.set()

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        await asyncio.sleep(0)  # a listener may await
        self.lost.append(partitions)


@pytest.mark.timeout(90)
class BrokerContract:
    """The suite. Every test runs against every broker."""

    @pytest.fixture
    def topic(self) -> str:
        """A topic name of this test's own."""
        return f"contract-{uuid.uuid4().hex[:12]}"

    @pytest.fixture
    async def tps(self, broker: Broker, topic: str) -> list[TopicPartition]:
        """The three partitions of a fresh topic."""
        await broker.create_topics([TopicSpec(topic, 3)])
        return [TopicPartition(topic, partition) for partition in range(3)]

    @pytest.fixture
    async def producer(self, broker: Broker) -> AsyncIterator[Producer]:
        """A started producer without transactions."""
        producer = broker.producer()
        await producer.start()
        yield producer
        await producer.close()

    @pytest.fixture
    async def transactional(self, broker: Broker) -> AsyncIterator[Owners]:
        """Starts transactional producers by id."""
        owners = Owners(broker)
        yield owners
        await owners.close()

    @asynccontextmanager
    async def reading(self, broker: Broker, *tps: TopicPartition, at: int = 0) -> AsyncIterator[Reader]:
        """A reader of these partitions, closed at the end."""
        reader = broker.reader()
        await reader.start(dict.fromkeys(tps, at))
        try:
            yield reader
        finally:
            await reader.close()

    # -- topics ----------------------------------------------------------------------------------------

    async def test_info(self, broker: Broker) -> None:
        """A broker says what it is."""
        info = await broker.info()
        assert info.url == broker.url
        assert info.nodes >= 1
        assert info.version

    async def test_create_list_delete(self, broker: Broker, topic: str) -> None:
        """A topic appears with the partitions asked for and is gone after its deletion; deleting again is no error."""
        await broker.create_topics([TopicSpec(topic, 5, {"cleanup.policy": "compact"})])
        assert (await broker.topics())[topic].partitions == 5
        await broker.delete_topics([topic])
        assert topic not in await broker.topics()
        await broker.delete_topics([topic])

    async def test_default_partitions(self, broker: Broker, topic: str) -> None:
        """Without a number of partitions the broker's own default holds."""
        await broker.create_topics([TopicSpec(topic)])
        assert (await broker.topics())[topic].partitions == broker.default_partitions

    async def test_existing_topic_is_left_alone(
        self, broker: Broker, tps: list[TopicPartition], producer: Producer
    ) -> None:
        """Creating a topic that exists changes neither its partitions nor its records, and makes the others."""
        await put(producer, tps[0], out(b"kept"))
        await broker.create_topics([TopicSpec(tps[0].topic, 9), TopicSpec(tps[0].topic + "-new", 1)])
        topics = await broker.topics()
        assert topics[tps[0].topic].partitions == 3
        assert tps[0].topic + "-new" in topics
        assert values_of((await drain(broker, tps))[tps[0]]) == [b"kept"]

    async def test_topic_made_anew_is_empty(
        self, broker: Broker, tps: list[TopicPartition], producer: Producer
    ) -> None:
        """A topic deleted and made again begins at offset 0 without its former records."""
        await put(producer, tps[0], out(b"old"))
        await broker.delete_topics([tps[0].topic])
        await broker.create_topics([TopicSpec(tps[0].topic, 3)])
        assert await broker.offsets(tps, "end") == dict.fromkeys(tps, 0)

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "x" * 250, "../escape", "a\0b"])
    async def test_bad_names(self, broker: Broker, name: str) -> None:
        """Names against Kafka's rule are refused."""
        with pytest.raises(TopicError):
            await broker.create_topics([TopicSpec(name, 1)])

    async def test_bad_shape(self, broker: Broker, topic: str) -> None:
        """No partitions at all, or a number that is none, is refused and makes nothing."""
        for spec in (TopicSpec(topic, 0), TopicSpec(topic, 1, {"retention.ms": "soon"})):
            with pytest.raises(TopicError):
                await broker.create_topics([spec])
        assert topic not in await broker.topics()

    # -- records ---------------------------------------------------------------------------------------

    async def test_round_trip(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """Keys, values, None in either place, timestamps and headers come back as they went."""
        records = [
            out(b"value", b"key", NOW),
            out(None, b"tombstone", NOW + 5),
            out(b"", None, NOW + 1),
            out(b"\x00\xff" * 10, b"", NOW - 10, (("a", b"1"), ("b", None), ("a", b""), ("ü", b"\x00"))),
            out(None, None, 0),
            out(b"one header", None, NOW, (("a", b"2"),)),
        ]
        await put(producer, tps[1], *records)
        found = (await drain(broker, tps))[tps[1]]
        assert [Outgoing(r.key, r.value, r.timestamp, tuple(r.headers)) for r in found] == records
        assert [r.offset for r in found] == list(range(len(records)))

    async def test_same_headers_on_all(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """Records that all carry the same number of headers keep each its own."""
        records = [out(b"v", None, NOW, (("s", b"%d" % n), ("t", None))) for n in range(100)]
        await put(producer, tps[0], *records)
        found = (await drain(broker, tps))[tps[0]]
        assert [tuple(r.headers) for r in found] == [record.headers for record in records]

    async def test_order_per_partition(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """Sends that are awaited together keep their order in each partition."""
        pending = [await producer.send(tps[n % 3], [out(b"%d" % n), out(b"%d+" % n)]) for n in range(300)]
        await asyncio.gather(*pending)
        found = await drain(broker, tps)
        for index, tp in enumerate(tps):
            assert values_of(found[tp]) == [v for n in range(index, 300, 3) for v in (b"%d" % n, b"%d+" % n)]

    async def test_large_batch(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """Twenty thousand records in one send arrive, in order, at dense offsets."""
        await put(producer, tps[0], *(out(b"%d" % n, b"k") for n in range(20_000)))
        found = (await drain(broker, tps))[tps[0]]
        assert values_of(found) == [b"%d" % n for n in range(20_000)]
        assert [r.offset for r in found] == list(range(20_000))

    async def test_nothing_to_send(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """An empty send is a success that writes nothing."""
        await put(producer, tps[0])
        assert await broker.offsets(tps, "end") == dict.fromkeys(tps, 0)

    async def test_big_records(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """Records of almost the largest size pass, several in one send."""
        size = min(broker.max_message_bytes, 1_048_576) - 1000
        records = [out(os.urandom(size)) for _ in range(4)]
        await put(producer, tps[0], *records)
        assert values_of((await drain(broker, tps))[tps[0]]) == values_of(records)  # type: ignore[arg-type]

    async def test_oversized_record(self, broker: Broker, topic: str, producer: Producer) -> None:
        """A record above the topic's limit is refused for good, and nothing of its send is written."""
        tp = TopicPartition(topic, 0)
        await broker.create_topics([TopicSpec(topic, 1, {"max.message.bytes": "2000"})])
        with pytest.raises(TopicError, match=r"max\.message\.bytes") as caught:
            await put(producer, tp, out(os.urandom(5000)))
        assert not caught.value.retryable
        assert await broker.offsets([tp], "end") == {tp: 0}

    async def test_send_to_nowhere(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """A missing topic or partition is the caller's error."""
        for tp in (TopicPartition(tps[0].topic + "-missing", 0), TopicPartition(tps[0].topic, 3)):
            with pytest.raises(TopicError):
                await asyncio.wait_for(put(producer, tp, out(b"x")), DEADLINE)

    # -- reading ---------------------------------------------------------------------------------------

    @pytest.mark.alone
    async def test_empty_fetch_waits_idle(self, broker: Broker, tps: list[TopicPartition]) -> None:
        """With nothing to read a fetch waits about as long as it was told to, and spends no time computing."""
        async with self.reading(broker, *tps) as reader:
            await reader.fetch(tps, 10, 0.1)  # connections are made
            began, cpu = time.monotonic(), time.process_time()
            assert await reader.fetch(tps, 10, 0.8) == {}
            assert 0.7 <= time.monotonic() - began < 5
            assert time.process_time() - cpu < 0.3

    async def test_fetch_of_nothing_waits_too(
        self, broker: Broker, tps: list[TopicPartition], producer: Producer
    ) -> None:
        """Asked for no partitions, or for one it does not read, a fetch gives nothing and does not spin.

        It may come back before its timeout: a partition may have been assigned meanwhile.
        """
        await put(producer, tps[0], out(b"x"))
        async with self.reading(broker, tps[0]) as reader:
            for partitions in ([], [tps[1]]):
                began = time.monotonic()
                assert await reader.fetch(partitions, 10, 0.2) == {}
                assert time.monotonic() - began >= 0.015

    @pytest.mark.alone
    async def test_waiting_fetch_wakes_up(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """A record written while a fetch waits ends the wait soon, not at the timeout."""
        async with self.reading(broker, *tps) as reader:
            await reader.fetch(tps, 10, 0.3)
            fetching = asyncio.create_task(reader.fetch(tps, 10, 8.0))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            await put(producer, tps[2], out(b"hello"))
            assert values_of((await fetching)[tps[2]]) == [b"hello"]
            assert time.monotonic() - began < 4.0

    async def test_fetch_keeps_to_its_limit(
        self, broker: Broker, tps: list[TopicPartition], producer: Producer
    ) -> None:
        """No fetch gives more records than asked for; together they give all, each once and in order."""
        for tp in tps:
            await put(producer, tp, *(out(b"%d" % n) for n in range(500)))
        found: dict[TopicPartition, list[Any]] = {tp: [] for tp in tps}
        async with self.reading(broker, *tps) as reader, asyncio.timeout(DEADLINE):
            while sum(map(len, found.values())) < 1500:
                batch = await reader.fetch(tps, 7, 1.0)
                assert sum(map(len, batch.values())) <= 7
                for tp, records in batch.items():
                    found[tp] += records
        assert all(values_of(found[tp]) == [b"%d" % n for n in range(500)] for tp in tps)

    async def test_only_named_partitions(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """A partition left out of a fetch keeps its position, and its records come when it is asked for."""
        for tp in tps:
            await put(producer, tp, out(b"1"), out(b"2"))
        async with self.reading(broker, *tps) as reader:
            assert values_of((await take(reader, [tps[0]], 2))[tps[0]]) == [b"1", b"2"]
            assert await reader.position(tps[1]) == 0
            rest = await take(reader, tps[1:], 4)
            assert [values_of(rest[tp]) for tp in tps[1:]] == [[b"1", b"2"]] * 2

    async def test_position_and_seek(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """The position follows what was fetched, and a seek moves it in both directions."""
        await put(producer, tps[0], *(out(b"%d" % n) for n in range(10)))
        async with self.reading(broker, tps[0], at=4) as reader:
            assert await reader.position(tps[0]) == 4
            first = (await reader.fetch(tps, 2, DEADLINE))[tps[0]]
            assert [r.offset for r in first] == [4, 5]
            assert await reader.position(tps[0]) == 6
            reader.seek(tps[0], 1)
            assert await reader.position(tps[0]) == 1
            assert [r.offset for r in (await take(reader, tps[:1], 9))[tps[0]]] == list(range(1, 10))
            reader.seek(tps[0], 9)
            assert [r.offset for r in (await take(reader, tps[:1], 1))[tps[0]]] == [9]

    async def test_out_of_range(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """A position above the end is an error that names place and offset, not a silent stall."""
        await put(producer, tps[0], out(b"x"))
        async with self.reading(broker, tps[0], at=7) as reader, asyncio.timeout(DEADLINE):
            with pytest.raises(OffsetOutOfRangeError) as caught:
                await take(reader, tps[:1], 1)
            assert (caught.value.tp, caught.value.offset) == (tps[0], 7)
            reader.seek(tps[0], 0)
            assert values_of((await take(reader, tps[:1], 1))[tps[0]]) == [b"x"]

    async def test_several_readers(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """Readers at the same time do not take records from each other."""
        readers = [broker.reader() for _ in range(3)]
        waiting: list[asyncio.Task[Any]] = []
        try:
            for reader in readers:
                await reader.start(dict.fromkeys(tps, 0))
            waiting = [asyncio.create_task(take(reader, tps, 200)) for reader in readers]
            for n in range(200):
                await put(producer, tps[n % 2], out(b"%d" % n))
            for found in await asyncio.gather(*waiting):
                assert values_of(found[tps[0]]) == [b"%d" % n for n in range(0, 200, 2)]
                assert values_of(found[tps[1]]) == [b"%d" % n for n in range(1, 200, 2)]
        finally:
            for task in waiting:
                task.cancel()
            for reader in readers:
                await reader.close()

    async def test_cancelled_fetch_loses_nothing(
        self, broker: Broker, tps: list[TopicPartition], producer: Producer
    ) -> None:
        """Records that come while a fetch is being cancelled come again with the next one."""
        async with self.reading(broker, *tps) as reader:
            fetching = asyncio.create_task(reader.fetch(tps, 10, DEADLINE))
            await asyncio.sleep(0.05)
            sending = await producer.send(tps[0], [out(b"1"), out(b"2")])
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            await sending
            assert values_of((await take(reader, tps, 2))[tps[0]]) == [b"1", b"2"]

    # -- offsets ---------------------------------------------------------------------------------------

    async def test_offsets(self, broker: Broker, tps: list[TopicPartition], producer: Producer) -> None:
        """Earliest, end, and times: the first record at or after one, in a log whose times go up and down."""
        await put(producer, tps[0], out(b"0", timestamp=1000), out(b"1", timestamp=3000))
        await put(producer, tps[0], out(b"2", timestamp=2000))
        await put(producer, tps[0], out(b"3", timestamp=4000), out(b"4", timestamp=3500))
        await put(producer, tps[1], out(b"0", timestamp=500))
        both = tps[:2]
        assert await broker.offsets(both, "earliest") == {tps[0]: 0, tps[1]: 0}
        assert await broker.offsets(both, "end") == {tps[0]: 5, tps[1]: 1}
        assert await broker.offsets(both, "high_watermark") == {tps[0]: 5, tps[1]: 1}
        expected = {0: 0, 1000: 0, 1001: 1, 2000: 1, 3000: 1, 3001: 3, 4000: 3, 4001: 5}
        for moment, offset in expected.items():
            assert (await broker.offsets([tps[0]], moment))[tps[0]] == offset, moment
        assert await broker.offsets(both, 600) == {tps[0]: 0, tps[1]: 1}
        assert await broker.offsets([], "end") == {}

    async def test_offsets_of_nothing(self, broker: Broker, tps: list[TopicPartition]) -> None:
        """A partition that does not exist is an error for every moment."""
        for moment in ("earliest", "end", "high_watermark", NOW):
            with pytest.raises(TopicError):
                await broker.offsets([TopicPartition(tps[0].topic, 3)], moment)
            with pytest.raises(TopicError):
                await broker.offsets([TopicPartition(tps[0].topic + "-missing", 0)], moment)

    # -- transactions ----------------------------------------------------------------------------------

    async def test_transaction_is_seen_whole(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """Sends to several partitions and topics and a group's offsets appear with end(), and not before."""
        await broker.create_topics([TopicSpec(topic + "-b", 1)])
        other = TopicPartition(topic + "-b", 0)
        group = f"{topic}-g"
        producer = await transactional(f"{topic}-id")
        await producer.begin()
        await put(producer, tps[0], out(b"a"), out(b"b"))
        await put(producer, tps[1], out(b"c"))
        await put(producer, other, out(b"d"))
        await put(producer, tps[0], out(b"e"))
        await producer.commit_offsets(group, {tps[2]: Committed(7, "map"), tps[0]: Committed(1)})
        assert await broker.offsets([*tps, other], "end") == dict.fromkeys([*tps, other], 0)
        assert await broker.committed(group, [tps[2]]) == {tps[2]: None}
        assert await producer.end() == {tps[0]: 3, tps[1]: 1, other: 1}, "the offsets behind what was written"
        await transactional.settle()
        found = await drain(broker, [*tps, other])
        assert [values_of(found[tp]) for tp in (*tps, other)] == [[b"a", b"b", b"e"], [b"c"], [], [b"d"]]
        committed = await broker.committed(group, tps)
        assert committed == {tps[0]: Committed(1), tps[1]: None, tps[2]: Committed(7, "map")}

    async def test_high_watermark_covers_what_was_committed(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """Who reads up to the high watermark taken right after end() has all of the transaction, without settling."""
        producer = await transactional(f"{topic}-id")
        for n in range(5):
            await producer.begin()
            await put(producer, tps[0], out(b"%d" % n))
            await producer.end()
            marks = await broker.offsets(tps, "high_watermark")
            found: list[Any] = []
            async with self.reading(broker, tps[0]) as reader, asyncio.timeout(DEADLINE):
                while await reader.position(tps[0]) < marks[tps[0]]:
                    found += (await reader.fetch(tps, 10, 0.5)).get(tps[0], ())
            assert values_of(found) == [b"%d" % m for m in range(n + 1)]

    async def test_open_transaction_is_unseen(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """A reader that waits sees nothing of an open transaction, and all of it after end()."""
        producer = await transactional(f"{topic}-id")
        async with self.reading(broker, *tps) as reader:
            await producer.begin()
            await put(producer, tps[0], out(b"a"))
            assert not any((await reader.fetch(tps, 10, 0.5)).values())
            await put(producer, tps[0], out(b"b"))
            await producer.end()
            assert values_of((await take(reader, tps, 2))[tps[0]]) == [b"a", b"b"]

    async def test_abort_leaves_nothing(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """An aborted transaction is as if it never was, and the producer goes on."""
        producer = await transactional(f"{topic}-id")
        await producer.begin()
        await put(producer, tps[0], out(b"dropped"))
        await producer.commit_offsets(f"{topic}-g", {tps[0]: Committed(5)})
        await producer.abort()
        await producer.begin()
        await put(producer, tps[0], out(b"kept"))
        await producer.end()
        await transactional.settle()
        assert values_of((await drain(broker, tps))[tps[0]]) == [b"kept"]
        assert await broker.committed(f"{topic}-g", tps) == dict.fromkeys(tps)

    async def test_settling_what_is_in_order(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """Where nothing was left open, settling changes nothing, either way, and the producer goes on."""
        group = f"{topic}-g"
        producer = await transactional(f"{topic}-id")
        await producer.begin()
        await put(producer, tps[0], out(b"a"))
        await producer.commit_offsets(group, {tps[0]: Committed(1, "map")})
        await producer.end()
        for commit in (False, True):
            await producer.settle(tps, group, {}, commit=commit)
            await producer.settle(tps[:1], None, {}, commit=commit)
            await producer.settle([], group, {tps[0]: Committed(1, "map")}, commit=commit)
        await producer.begin()
        await put(producer, tps[0], out(b"b"))
        await producer.end()
        await transactional.settle()
        assert values_of((await drain(broker, tps))[tps[0]]) == [b"a", b"b"]
        assert await broker.committed(group, tps[:1]) == {tps[0]: Committed(1, "map")}
        assert await broker.pending(group, tps) == frozenset()
        assert await broker.pending(f"{topic}-absent", tps) == frozenset()

    async def test_offsets_alone(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """A transaction may carry offsets only, or nothing at all."""
        producer = await transactional(f"{topic}-id")
        await producer.begin()
        await producer.end()
        await producer.begin()
        await producer.commit_offsets(f"{topic}-g", {tps[0]: Committed(3, "x")})
        await producer.end()
        await transactional.settle()
        assert await broker.committed(f"{topic}-g", tps[:1]) == {tps[0]: Committed(3, "x")}

    async def test_position_passes_gaps(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """Behind the last record the position reaches the end, over markers and aborted records."""
        producer = await transactional(f"{topic}-id")
        for value, keep in ((b"1", True), (b"2", False), (b"3", True), (b"4", False)):
            await producer.begin()
            await put(producer, tps[0], out(value))
            await (producer.end() if keep else producer.abort())
        await transactional.settle()
        (end,) = (await broker.offsets(tps[:1], "end")).values()
        found: list[Any] = []
        async with self.reading(broker, tps[0]) as reader, asyncio.timeout(DEADLINE):
            while await reader.position(tps[0]) < end:
                found += (await reader.fetch(tps, 10, 0.5)).get(tps[0], ())
        assert values_of(found) == [b"1", b"3"]

    async def test_newer_owner_fences(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """A second start of an id fences the first owner: its end() fails and nothing of it ever appears."""
        first = await transactional(f"{topic}-id")
        await first.begin()
        await put(first, tps[0], out(b"zombie"))
        await first.commit_offsets(f"{topic}-g", {tps[1]: Committed(99)})
        second = await transactional(f"{topic}-id")
        with pytest.raises(FencedError) as caught:
            await first.end()
        assert not caught.value.retryable
        await second.begin()
        await put(second, tps[0], out(b"owner"))
        await second.commit_offsets(f"{topic}-g", {tps[1]: Committed(1)})
        await second.end()
        await transactional.settle()
        assert values_of((await drain(broker, tps))[tps[0]]) == [b"owner"]
        assert await broker.committed(f"{topic}-g", [tps[1]]) == {tps[1]: Committed(1)}

    async def test_zombie_that_begins_late(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """An owner that was replaced while idle learns of it by the end of its next transaction."""
        first = await transactional(f"{topic}-id")
        await transactional(f"{topic}-id")

        async def act() -> None:
            await first.begin()
            await put(first, tps[0], out(b"zombie"))
            await first.commit_offsets(f"{topic}-g", {tps[1]: Committed(99)})
            await first.end()

        with pytest.raises(FencedError):
            await asyncio.wait_for(act(), DEADLINE)
        assert (await drain(broker, tps))[tps[0]] == []
        assert await broker.committed(f"{topic}-g", [tps[1]]) == {tps[1]: None}

    async def test_start_settles_what_was_open(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """After a crash of its owner nothing of an open transaction holds up readers once its heir has started."""
        crashed = await transactional(f"{topic}-id")
        await crashed.begin()
        await put(crashed, tps[0], out(b"lost"))
        bystander = await transactional(f"{topic}-other")
        await bystander.begin()
        await put(bystander, tps[0], out(b"behind it"))
        await bystander.end()
        await transactional(f"{topic}-id")
        async with self.reading(broker, tps[0]) as reader:
            assert values_of((await take(reader, tps[:1], 1))[tps[0]]) == [b"behind it"]

    async def test_ids_are_independent(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """Transactions of different ids overlap and end in any order."""
        one, two = await transactional(f"{topic}-1"), await transactional(f"{topic}-2")
        await one.begin()
        await two.begin()
        await put(one, tps[0], out(b"1"))
        await put(two, tps[1], out(b"2"))
        await two.end()
        await one.end()
        await transactional.settle()
        found = await drain(broker, tps)
        assert [values_of(found[tp]) for tp in tps] == [[b"1"], [b"2"], []]

    # -- groups ----------------------------------------------------------------------------------------

    async def test_committed(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """A later commit replaces offset and metadata of its partition alone; other groups know nothing of it."""
        group = f"{topic}-g"
        assert await broker.committed(group, tps) == dict.fromkeys(tps)
        for committed in (Committed(5, "one" * 1000), Committed(2, ""), Committed(0, "zero")):
            producer = await transactional(f"{topic}-id")
            await producer.begin()
            await producer.commit_offsets(group, {tps[0]: committed})
            await producer.end()
            await transactional.settle()
            assert await broker.committed(group, tps[:2]) == {tps[0]: committed, tps[1]: None}
        assert await broker.committed(group + "x", tps) == dict.fromkeys(tps)

    async def test_groups_listed_and_deleted(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """Groups with offsets are listed until they are deleted; deleting one that is absent is no error."""
        names = [f"{topic}-g1", f"{topic}-g2"]
        for name in names:
            producer = await transactional(f"{topic}-id")
            await producer.begin()
            await producer.commit_offsets(name, {tps[0]: Committed(1)})
            await producer.end()
        await transactional.settle()
        listed = await broker.groups()
        assert set(names) <= set(listed)
        assert listed == sorted(listed)
        await broker.delete_groups([names[0], f"{topic}-absent"])
        assert names[0] not in await broker.groups()
        assert await broker.committed(names[0], tps[:1]) == {tps[0]: None}
        assert await broker.committed(names[1], tps[:1]) == {tps[0]: Committed(1)}

    async def test_member(self, broker: Broker, tps: list[TopicPartition], producer: Producer, topic: str) -> None:
        """Join, be told, see nothing before begin(), read from there, be told again on leaving."""
        group, listener = f"{topic}-g", Listener()
        for tp in tps:
            await put(producer, tp, out(b"0"), out(b"1"))
        member = broker.member(group, [topic])
        try:
            async with asyncio.timeout(DEADLINE):
                await member.join(listener)
                await listener.told.wait()
            assert listener.owned == frozenset(tps)
            assert group in await broker.groups()
            assert not any((await member.fetch(tps, 10, 0.5)).values())
            member.begin(tps[0], 1)
            member.begin(TopicPartition(topic, 77), 0)  # not owned: ignored
            assert [r.offset for r in (await take(member, tps, 1))[tps[0]]] == [1]
            assert await member.position(tps[0]) == 2
            member.begin(tps[1], 0)
            assert values_of((await take(member, tps, 2))[tps[1]]) == [b"0", b"1"]
            assert listener.lost == []
            await member.leave()
            assert listener.lost == [frozenset(tps)]
        finally:
            await member.close()
        assert listener.lost == [frozenset(tps)]

    async def test_member_close_leaves(self, broker: Broker, tps: list[TopicPartition], topic: str) -> None:
        """Closing a member that did not leave tells the listener and frees the group for the next one at once."""
        for _ in range(2):
            listener, member = Listener(), broker.member(f"{topic}-g", [topic])
            try:
                async with asyncio.timeout(8):  # less than a session timeout
                    await member.join(listener)
                    await listener.told.wait()
                assert listener.owned == frozenset(tps)
            finally:
                await member.close()
            assert listener.lost == [frozenset(tps)]
            await member.close()

    async def test_members_of_a_group(self, broker: Broker, tps: list[TopicPartition], topic: str) -> None:
        """A group's member is told with its partitions while it is in, also to others; nobody before and after."""
        group, listener = f"{topic}-g", Listener()
        assert await broker.members(group) == []
        member = broker.member(group, [topic])
        try:
            async with asyncio.timeout(DEADLINE):
                await member.join(listener)
                await listener.told.wait()
                while not (known := await broker.members(group)) or not known[0].partitions:
                    await asyncio.sleep(0.05)
                assert [each.partitions for each in known] == [frozenset(tps)]
                assert known[0].id
                assert known[0].client
                assert known[0].host
                assert await broker.members(f"{group}-other") == []
                await member.leave()
                while await broker.members(group):
                    await asyncio.sleep(0.05)
        finally:
            await member.close()

    async def test_group_without_members(self, broker: Broker, tps: list[TopicPartition], topic: str) -> None:
        """A group that only has offsets has no members, and is no error."""
        producer = broker.transactional_producer(f"{topic}-id")
        await producer.start()
        await producer.begin()
        await producer.commit_offsets(f"{topic}-g", {tps[0]: Committed(3)})
        await producer.end()
        await producer.close()
        assert f"{topic}-g" in await broker.groups()
        assert await broker.members(f"{topic}-g") == []

    async def test_revoked_can_still_commit(
        self, broker: Broker, tps: list[TopicPartition], transactional: Owners, topic: str
    ) -> None:
        """While revoked() is awaited a transaction still goes through: that is what the call is for."""
        producer = await transactional(f"{topic}-id")

        class Committing(Listener):
            async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
                await producer.begin()
                await producer.commit_offsets(f"{topic}-g", dict.fromkeys(partitions, Committed(4)))
                await producer.end()

        member, listener = broker.member(f"{topic}-g", [topic]), Committing()
        try:
            async with asyncio.timeout(DEADLINE):
                await member.join(listener)
                await listener.told.wait()
                await member.leave()
        finally:
            await member.close()
        await transactional.settle()
        assert await broker.committed(f"{topic}-g", tps) == dict.fromkeys(tps, Committed(4))

    async def test_member_commits_without_transaction(
        self, broker: Broker, tps: list[TopicPartition], topic: str
    ) -> None:
        """A member's own commit carries offset and map, may be repeated, and is refused once it has left."""
        member, listener = broker.member(f"{topic}-g", [topic]), Listener()
        try:
            async with asyncio.timeout(DEADLINE):
                await member.join(listener)
                await listener.told.wait()
                for _ in range(2):
                    await member.commit({tps[0]: Committed(5, "map"), tps[1]: Committed(6)})
                assert await broker.committed(f"{topic}-g", tps[:2]) == {
                    tps[0]: Committed(5, "map"),
                    tps[1]: Committed(6),
                }
                await member.leave()
                with pytest.raises(FencedError):
                    await member.commit({tps[0]: Committed(9)})
        finally:
            await member.close()
        assert (await broker.committed(f"{topic}-g", tps))[tps[0]] == Committed(5, "map")

    # -- the end ---------------------------------------------------------------------------------------

    async def test_closing_twice(self, broker: Broker, tps: list[TopicPartition], topic: str) -> None:
        """Everything may be closed twice, started or not."""
        reader = broker.reader()
        await reader.start({tps[0]: 0})
        producer = broker.producer()
        await producer.start()
        transactional = broker.transactional_producer(f"{topic}-id")
        await transactional.start()
        await transactional.begin()
        never = (broker.reader(), broker.member(f"{topic}-g", [topic]), broker.producer())
        for thing in (reader, producer, transactional, *never, broker) * 2:
            async with asyncio.timeout(8):
                await thing.close()


class SharedGroupContract(BrokerContract):
    """What brokers must do besides whose groups may have several members."""

    async def test_members_share(self, broker: Broker, tps: list[TopicPartition], topic: str) -> None:
        """A second member gets some of the partitions, and both are told which assignments follow directly."""
        first, second = broker.member(f"{topic}-g", [topic]), broker.member(f"{topic}-g", [topic])
        one, two = Listener(), Listener()
        try:
            async with asyncio.timeout(DEADLINE):
                await first.join(one)
                await one.told.wait()
                assert one.owned == frozenset(tps)
                one.told.clear()
                await second.join(two)
                while one.owned | two.owned != frozenset(tps) or not two.owned or one.owned & two.owned:
                    await asyncio.sleep(0.05)
                while frozenset(m.partitions for m in await broker.members(f"{topic}-g")) != {one.owned, two.owned}:
                    await asyncio.sleep(0.05)
            assert one.lost == [frozenset(tps)]
            assert one.consecutive == [False, True]
            assert two.consecutive[0] is False
        finally:
            await second.close()
            await first.close()
