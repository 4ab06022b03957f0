"""One small Faust app, on the embedded broker by our driver and on Apache Kafka by Faust's: both do the same."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import faust
import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types.tuples import TP
from mode.supervisors import CrashingSupervisor
from rowmill.state.errors import ConfigError
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.console.transport import Transport
from rowmill.streams.errors import GroupBusyError
from rowmill.streams.partitioning import partition_for
from yarl import URL

pytestmark = pytest.mark.timeout(180)

PARTITIONS = 3
EXAMPLE = Path(__file__).parents[2] / "examples" / "faust_on_local.py"


class Words:
    """Counts words in a table, and notes each record that it reads."""

    def __init__(self, url: str, name: str, folder: Path, **settings: Any) -> None:
        self.app = faust.App(
            name,
            broker=url,
            datadir=folder / "faust",
            store="memory://",
            web_enabled=False,
            topic_disable_leader=True,
            topic_partitions=PARTITIONS,
            topic_replication_factor=1,
            stream_wait_empty=False,
            broker_commit_interval=0.2,
            broker_session_timeout=6.0,
            broker_heartbeat_interval=1.0,
            agent_supervisor=CrashingSupervisor,
            autodiscover=False,
            **settings,
        )
        self.topic = self.app.topic(
            f"{name}.words",
            partitions=PARTITIONS,
            key_type=bytes,
            value_type=bytes,
            key_serializer="raw",
            value_serializer="raw",
            allow_empty=True,
        )
        self.counts = self.app.Table("counts", default=int, partitions=PARTITIONS, key_type=str)
        self.read: list[Any] = []
        self.recovered: dict[str, int] | None = None
        self.counts.on_recover(self._note_recovery)
        self.app.agent(self.topic)(self._count)

    async def _note_recovery(self) -> None:
        self.recovered = dict(self.counts)

    async def _count(self, stream: Any) -> None:
        async for event in stream.events():
            self.read.append(event.message)
            word = event.key.decode()
            if event.value:
                self.counts[word] += 1
            else:
                self.counts.pop(word, None)

    async def send(self, *words: str, value: bytes | None = b"x", **more: Any) -> None:
        """Write records, and wait until they are written."""
        for sent in [await self.topic.send(key=word.encode(), value=value, **more) for word in words]:
            await sent


async def until(is_so: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for something."""
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running(words: Words) -> AsyncIterator[Words]:
    """The app at work, with its tables recovered."""
    await words.topic.maybe_declare()
    await words.app.start()
    try:
        await until(lambda: words.recovered is not None)
        yield words
    finally:
        async with asyncio.timeout(15):
            await words.app.stop()


KEYS = [f"word-{n}" for n in range(20)]


async def test_a_table_outlives_its_app(broker_url: str, name: str, tmp_path: Path) -> None:
    """The next app begins with the table as it was, and reads nothing twice."""
    async with running(Words(broker_url, name, tmp_path)) as words:
        assert words.recovered == {}
        await words.send(*KEYS * 5)
        await until(lambda: len(words.read) == 100)
        assert {message.partition for message in words.read} == set(range(PARTITIONS))
        await words.send(KEYS[0], value=None)
        await until(lambda: KEYS[0] not in words.counts)
        await asyncio.sleep(0.6)  # its commit comes by a timer
    async with running(Words(broker_url, name, tmp_path)) as words:
        assert words.recovered == dict.fromkeys(KEYS[1:], 5)
        await words.send(*KEYS)
        await until(lambda: len(words.read) == 20)
        await asyncio.sleep(0.3)
        assert dict(words.counts) == {**dict.fromkeys(KEYS, 6), KEYS[0]: 1}
        assert len(words.read) == 20


async def test_keys_have_the_same_partition_and_order(broker_url: str, name: str, tmp_path: Path) -> None:
    """Ours as Kafka's: a key's records are in one partition, in the order of their sends, with all that they carry."""
    async with running(Words(broker_url, name, tmp_path)) as words:
        for n in range(30):
            await words.send(KEYS[n % 7], value=str(n).encode(), timestamp=1_750_000_000.5 + n, headers={"h": b"\xff"})
        await until(lambda: len(words.read) == 30)
    for message in words.read:
        assert message.partition == partition_for(message.key, PARTITIONS)
        assert message.timestamp == 1_750_000_000.5 + int(message.value)
        assert dict(message.headers) == {"h": b"\xff"}
    for key in KEYS[:7]:
        values = [int(message.value) for message in words.read if message.key == key.encode()]
        assert values == sorted(values)


async def test_a_seek_reads_again(broker_url: str, name: str, tmp_path: Path) -> None:
    """From the offset that it names."""
    async with running(Words(broker_url, name, tmp_path)) as words:
        await words.send(*[KEYS[0]] * 10)
        await until(lambda: len(words.read) == 10)
        partition = TP(*words.read[0].tp)
        await words.app.consumer.seek(partition, 4)
        await until(lambda: len(words.read) == 16)
        assert [message.offset for message in words.read[10:]] == list(range(4, 10))
        assert await words.app.consumer.position(partition) == 10
        assert (await words.app.consumer.highwaters(partition))[partition] == 10
        assert (await words.app.consumer.earliest_offsets(partition))[partition] == 0


@pytest.mark.parametrize(("reset", "read"), [("earliest", 15), ("latest", 10)])
async def test_where_a_new_group_begins(broker_url: str, name: str, tmp_path: Path, reset: str, read: int) -> None:
    """At the first record or behind the last, as the app's setting says."""
    broker = open_broker(broker_url)
    await broker.start()
    try:
        await broker.create_topics([TopicSpec(f"{name}.words", PARTITIONS)])
        producer = broker.producer()
        await producer.start()
        tp = TopicPartition(f"{name}.words", 1)
        await (await producer.send(tp, [Outgoing(b"old", b"x", 1)] * 5))
        await producer.close()
    finally:
        await broker.close()
    async with running(Words(broker_url, name, tmp_path, consumer_auto_offset_reset=reset)) as words:
        await asyncio.sleep(1.0)
        await words.send(*KEYS[:10])
        await until(lambda: len(words.read) == read)
        await asyncio.sleep(0.3)
        assert len(words.read) == read


async def test_what_is_done_is_committed(broker_url: str, name: str, tmp_path: Path) -> None:
    """Where our own tools look for it too."""
    async with running(Words(broker_url, name, tmp_path)) as words:
        await words.send(*[KEYS[0]] * 10)
        await until(lambda: len(words.read) == 10)
        await asyncio.sleep(0.6)
    broker = open_broker(broker_url)
    await broker.start()
    try:
        tp = TopicPartition(*words.read[0].tp)
        committed = (await broker.committed(name, [tp]))[tp]
        assert committed is not None
        assert committed.offset == 10
    finally:
        await broker.close()


# -- the embedded broker's own ---------------------------------------------------------------------------------


@pytest.fixture
def local_url(tmp_path: Path) -> str:
    """An embedded broker that is not there yet."""
    return f"local://{tmp_path / 'broker'}"


async def test_nothing_is_left_behind(local_url: str, name: str, tmp_path: Path) -> None:
    """No task and no thread."""
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    async with running(Words(local_url, name, tmp_path)) as words:
        await words.send(*KEYS)
        await until(lambda: len(words.read) == 20)
    await until(lambda: set(threading.enumerate()) <= threads, 5)
    assert {task for task in asyncio.all_tasks() if not task.done()} == tasks


async def test_a_second_app_of_the_group_fails(local_url: str, name: str, tmp_path: Path) -> None:
    """The embedded broker lets one process serve a group, and says who has it."""
    async with running(Words(local_url, name, tmp_path)):
        second = Words(local_url, name, tmp_path)
        await second.app.start()
        await until(lambda: second.app.crashed)
        assert isinstance(second.app.crash_reason, GroupBusyError)
        await second.app.stop()


async def test_a_record_that_is_too_large_fails_alone(local_url: str, name: str, tmp_path: Path) -> None:
    """Its sender hears of it; others are written."""
    async with running(Words(local_url, name, tmp_path)) as words:
        with pytest.raises(faust.exceptions.ProducerSendError):
            await words.send("big", value=b"x" * 2_000_000)
        await words.send("small")
        await until(lambda: len(words.read) == 1)


async def test_records_that_are_gone_are_passed_over(local_url: str, name: str, tmp_path: Path) -> None:
    """A topic that was made anew begins at 0: the committed offset behind its end leads to the setting's place."""
    async with running(Words(local_url, name, tmp_path)) as words:
        await words.send(*[KEYS[0]] * 10)
        await until(lambda: len(words.read) == 10)
        await asyncio.sleep(0.6)
        tp = TopicPartition(*words.read[0].tp)
    broker = open_broker(local_url)
    await broker.start()
    try:
        producer = broker.transactional_producer("t")
        await producer.start()
        await producer.begin()
        await producer.commit_offsets(name, {tp: Committed(500)})
        await producer.end()
        await producer.close()
    finally:
        await broker.close()
    async with running(Words(local_url, name, tmp_path)) as words:
        await until(lambda: len(words.read) == 10)
        assert [message.offset for message in words.read] == list(range(10))


async def test_exactly_once_is_refused(local_url: str, name: str, tmp_path: Path) -> None:
    """Its transactions do not hold what they promise (FACTS), here they are not even there."""
    words = Words(local_url, name, tmp_path, processing_guarantee="exactly_once")
    with pytest.raises(ImproperlyConfigured, match="at_least_once"):
        await words.app.start()
    await words.app.stop()


@pytest.mark.parametrize("url", ["local://relative", "local://Relative/Folder", "local:", "local:///"])
def test_the_folder_is_absolute(url: str) -> None:
    """A URL's host has no capitals, so half of a relative path would be another one."""
    transport = Transport([URL(url)], faust.App("x", broker="local:///tmp/x", autodiscover=False))
    with pytest.raises(ConfigError, match="three slashes"):
        _ = transport.folder


def test_folders_may_have_any_name() -> None:
    """As long as the URL is built and not glued."""
    path = "/var/a b/ä%20c#d?e"
    transport = Transport(
        [URL.build(scheme="local", path=path)], faust.App("x", broker="local:///x", autodiscover=False)
    )
    assert transport.folder == Path(path)


def test_the_example_runs_twice(tmp_path: Path) -> None:
    """And counts on where it was; warnings are errors."""
    words = [sys.executable, "-W", "error", str(EXAMPLE), str(tmp_path / "broker")]
    counts = []
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        counts.append({line.split()[1]: int(line.split()[0]) for line in done.stdout.splitlines()})
    assert counts[0]["the"] == 5
    assert counts[1] == {word: 2 * times for word, times in counts[0].items()}
