"""The embedded broker by itself: several processes, kills, full disks, retention, odd files."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill.state.clock import SystemClock
from rowmill.state.errors import ConfigError
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.brokers import local_batch
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.brokers.local import LocalBroker
from rowmill.streams.brokers.local_batch import Columns, DamagedBatchError, decode
from rowmill.streams.errors import (
    BrokerError,
    BrokerTimeoutError,
    BrokerUnreachableError,
    FencedError,
    GroupBusyError,
    OffsetOutOfRangeError,
    TopicError,
)

TP = TopicPartition("t", 0)
OTHER = TopicPartition("t", 1)
NOW = 1_750_000_000_000


class SetClock(SystemClock):
    """The machine's clock, except that the time of day is set by the test."""

    now = NOW

    def now_ms(self) -> int:
        return self.now


class Listener:
    """Listens and does nothing."""

    def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None:
        pass

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        pass


Open = Callable[..., Awaitable[LocalBroker]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the log goes: not there yet."""
    return tmp_path / "log"


@pytest.fixture
async def opened(folder: Path) -> AsyncIterator[Open]:
    """Starts brokers on the folder, with the topic t of two partitions, and closes them."""
    brokers = []

    async def start(**options: Any) -> LocalBroker:
        broker = LocalBroker(folder, options.pop("clock", SystemClock()), **options)
        brokers.append(broker)
        await broker.start()
        await broker.create_topics([TopicSpec("t", 2, options.pop("config", {}))])
        return broker

    yield start
    for broker in brokers:
        await broker.close()


def rows(*values: bytes, timestamp: int = NOW) -> list[Outgoing]:
    """Records of these values."""
    return [Outgoing(None, value, timestamp) for value in values]


async def put(broker: LocalBroker, tp: TopicPartition, records: list[Outgoing]) -> None:
    """Write records without a transaction."""
    producer = broker.producer()
    await (await producer.send(tp, records))
    await producer.close()


async def everything(broker: LocalBroker, tp: TopicPartition) -> list[Any]:
    """All records of a partition."""
    (start,) = (await broker.offsets([tp], "earliest")).values()
    (end,) = (await broker.offsets([tp], "end")).values()
    reader = broker.reader()
    await reader.start({tp: start})
    found: list[Any] = []
    while await reader.position(tp) < end:
        found += (await reader.fetch([tp], 10_000, 5))[tp]
    await reader.close()
    return found


PRELUDE = """
import asyncio, sys
from rowmill.state.clock import SystemClock
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.brokers.local import LocalBroker
TP = TopicPartition("t", 0)

class Listener:
    def assigned(self, partitions, consecutive): pass
    async def revoked(self, partitions): pass

async def main():
    broker = LocalBroker(sys.argv[1], SystemClock())
    await broker.start()
    await work(broker)
    await broker.close()
"""

PUBLISH_IN_TRANSACTIONS = """
async def work(broker):
    producer = broker.transactional_producer(sys.argv[2])
    await producer.start()
    print("ready", flush=True)
    for n in range(int(sys.argv[3])):
        await producer.begin()
        await (await producer.send(TP, [Outgoing(b"%d" % n, b"%s/%d/%d" % (sys.argv[2].encode(), n, i), 0)
                                        for i in range(1500)]))
        await producer.commit_offsets("g", {TopicPartition("t", 1): Committed(n + 1, sys.argv[2])})
        await producer.end()
        print(n, flush=True)
"""

SERVE_GROUP = """
async def work(broker):
    member = broker.member("g", ["t"])
    await member.join(Listener())
    print("joined", flush=True)
    await asyncio.sleep(60)
"""

EXIT_WITHOUT_CLOSING = """
async def work(broker):
    import threading
    broker._reads._thread.run(threading.Event().wait)
    print("hanging", flush=True)
    sys.exit(0)
"""


@contextmanager
def process(body: str, folder: Path, *args: object) -> Iterator[Popen[str]]:
    """Run ``work`` in a Python of its own; killed at the end at the latest."""
    code = f"{PRELUDE}\n{body}\nasyncio.run(main())"
    command = [sys.executable, "-c", code, str(folder), *map(str, args)]
    with Popen(command, stdout=PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


async def line(child: Popen[str]) -> str:
    """The next line a process prints."""
    assert child.stdout is not None
    async with asyncio.timeout(20):
        return (await asyncio.to_thread(child.stdout.readline)).strip()


# -- several processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 4, 9])
async def test_killed_publisher_leaves_whole_transactions(opened: Open, folder: Path, after: int) -> None:
    """A publisher killed at any moment leaves dense offsets, whole transactions, and the offsets that go with them."""
    broker = await opened()
    with process(PUBLISH_IN_TRANSACTIONS, folder, "p", 100_000) as child:
        for _ in range(after):
            await line(child)
        child.send_signal(signal.SIGKILL)
        child.wait()
    found = await everything(broker, TP)
    assert [record.offset for record in found] == list(range(len(found)))
    transactions = len(found) // 1500
    assert transactions >= after - 1
    assert [r.value for r in found] == [b"p/%d/%d" % (n, i) for n in range(transactions) for i in range(1500)]
    assert await broker.committed("g", [OTHER]) == {OTHER: Committed(transactions, "p") if transactions else None}
    await put(broker, TP, rows(b"next"))
    assert (await everything(broker, TP))[-1].value == b"next"


async def test_two_processes_publish_at_once(opened: Open, folder: Path) -> None:
    """Two processes and this one, writing and reading at the same time, lose and mix up nothing."""
    broker = await opened()
    reader = broker.reader()
    await reader.start({TP: 0})
    seen: list[Any] = []
    with process(PUBLISH_IN_TRANSACTIONS, folder, "a", 20) as a, process(PUBLISH_IN_TRANSACTIONS, folder, "b", 20) as b:
        async with asyncio.timeout(60):
            while len(seen) < 2 * 20 * 1500:
                seen += (await reader.fetch([TP], 10_000, 1.0)).get(TP, [])
        assert await asyncio.to_thread(a.wait, 10) == 0
        assert await asyncio.to_thread(b.wait, 10) == 0
    assert [record.offset for record in seen] == list(range(60_000))
    for name in (b"a", b"b"):
        own = [record.value for record in seen if record.value.startswith(name)]
        assert own == [b"%s/%d/%d" % (name, n, i) for n in range(20) for i in range(1500)]


OPEN_AND_CLOSE = """
async def work(broker):
    print(len(await broker.topics()), flush=True)
"""


async def test_nobody_takes_the_log_from_under_us(opened: Open, folder: Path) -> None:
    """However many brokers this process opens and closes on the folder, another one that comes and goes leaves the
    write-ahead log alone: SQLite's locks are held. (They were dropped once by a handle of our own being closed.)
    """
    broker = await opened()
    await (await opened()).close()
    await put(broker, TP, rows(b"1"))
    log = folder / "rowmill.db-wal"
    before = log.stat().st_ino
    with process(OPEN_AND_CLOSE, folder) as child:
        assert await line(child) == "1"
        assert await asyncio.to_thread(child.wait, 10) == 0
    assert log.stat().st_ino == before
    assert log.stat().st_size > 0


async def test_other_processes_fence(opened: Open, folder: Path) -> None:
    """A transactional id taken over by another process is fenced here."""
    broker = await opened()
    producer = broker.transactional_producer("p")
    await producer.start()
    await producer.begin()
    await (await producer.send(OTHER, rows(b"zombie")))
    with process(PUBLISH_IN_TRANSACTIONS, folder, "p", 0) as child:
        assert await line(child) == "ready"
    with pytest.raises(FencedError, match="'p'"):
        await producer.end()
    assert await everything(broker, OTHER) == []
    with pytest.raises(BrokerError):
        await producer.begin()


async def test_second_worker_is_refused(opened: Open, folder: Path) -> None:
    """While a process serves a group another one is refused, with its number and what to do; a kill frees the group."""
    broker = await opened()
    member = broker.member("g", ["t"])
    with process(SERVE_GROUP, folder) as child:
        assert await line(child) == "joined"
        with pytest.raises(GroupBusyError, match=rf"process {child.pid};.*kafka://"):
            await member.join(Listener())
        assert await broker.groups() == ["g"]
        with pytest.raises(GroupBusyError, match="stop it first"):
            await broker.delete_groups(["g"])
        other_group = broker.member("g2", ["t"])
        await other_group.join(Listener())
        await other_group.close()
        child.kill()
        child.wait()
    assert await broker.groups() == []
    await member.join(Listener())
    await member.close()


async def test_second_member_in_this_process_is_refused(opened: Open) -> None:
    """Also inside one process, and through two broker objects, a group has one member; the refusal frees nothing."""
    one, two = await opened(), await opened()
    first = one.member("g", ["t"])
    await first.join(Listener())
    for broker in (one, two):
        second = broker.member("g", ["t"])
        with pytest.raises(GroupBusyError, match=str(os.getpid())):
            await second.join(Listener())
        await second.close()
    assert await two.groups() == ["g"]
    await first.close()
    assert await one.groups() == []
    await second.join(Listener())
    await second.close()


async def test_forked_child_does_not_keep_the_group(opened: Open, folder: Path) -> None:
    """A child forked by a worker (a process pool) that outlives it does not keep its group busy."""
    broker = await opened()
    forking = SERVE_GROUP.replace(
        'print("joined"', 'import os, time\n    if os.fork() == 0: time.sleep(30); os._exit(0)\n    print("joined"'
    )
    with process(forking, folder) as child:
        assert await line(child) == "joined"
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        child.kill()
        await asyncio.to_thread(child.wait)
        member = broker.member("g", ["t"])
        await member.join(Listener())
        await member.close()
        for orphan in children:
            os.kill(int(orphan), signal.SIGKILL)


@pytest.mark.parametrize("group", ["../../x", "a/b", "A" * 1000, ".", "ü", "con\n"])
async def test_lock_files_stay_in_their_folder(opened: Open, folder: Path, group: str) -> None:
    """Whatever a group is called, its lock file is one in the folder for that."""
    broker = await opened()
    member = broker.member(group, ["t"])
    await member.join(Listener())
    assert await broker.groups() == [group]
    assert len(list((folder / "groups").iterdir())) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == ["log"]
    await member.close()


async def test_failed_join_frees_the_group(opened: Open) -> None:
    """A member whose topic is missing does not hold the group."""
    broker = await opened()
    with pytest.raises(TopicError, match="missing"):
        await broker.member("g", ["missing"]).join(Listener())
    member = broker.member("g", ["t"])
    await member.join(Listener())
    await member.close()


async def test_listener_that_fails_does_not_hold_the_group(opened: Open) -> None:
    """An error in revoked() reaches the caller, and the group is free all the same."""

    class Failing(Listener):
        async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
            raise RuntimeError("no")

    broker = await opened()
    member = broker.member("g", ["t"])
    await member.join(Failing())
    with pytest.raises(RuntimeError, match="no"):
        await member.close()
    assert await broker.groups() == []


async def test_exit_with_a_hanging_thread(opened: Open, folder: Path) -> None:
    """A call that never returns from the disk does not keep the process from ending."""
    await opened()
    with process(EXIT_WITHOUT_CLOSING, folder) as child:
        assert await line(child) == "hanging"
        assert await asyncio.to_thread(child.wait, 10) == 0


async def test_writer_that_stands_still(opened: Open, folder: Path) -> None:
    """When somebody keeps the file's write lock, a write gives up after its time and says why; reads go on."""
    broker = await opened(lock_timeout=0.2)
    await put(broker, TP, rows(b"1"))
    blocker = sqlite3.connect(folder / "rowmill.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(BrokerTimeoutError, match="locked by another process"):
        await put(broker, TP, rows(b"2"))
    assert len(await everything(broker, TP)) == 1
    blocker.execute("ROLLBACK")
    blocker.close()
    await put(broker, TP, rows(b"3"))
    assert [record.value for record in await everything(broker, TP)] == [b"1", b"3"]


# -- the file ------------------------------------------------------------------------------------------


async def test_nothing_happens_before_start(folder: Path) -> None:
    """The constructor leaves the disk alone; the folder and its files are their owner's only."""
    broker = LocalBroker(f"local://{folder}", SystemClock())
    assert broker.url == f"local://{folder}"
    with pytest.raises(BrokerError, match="start"):
        await broker.topics()
    assert not folder.exists()
    await broker.start()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    await broker.close()
    await broker.close()
    with pytest.raises(BrokerError):
        await broker.topics()


@pytest.mark.parametrize("where", ["", "local://", "a\0b"])
def test_no_folder(where: str) -> None:
    """A broker needs a folder's name."""
    with pytest.raises(ConfigError, match=r"local://\.rowmill"):
        LocalBroker(where, SystemClock())


def test_unknown_synchronous() -> None:
    """The setting goes into a statement: only known words do."""
    with pytest.raises(ConfigError, match="off, normal, full, extra"):
        LocalBroker("x", SystemClock(), synchronous="sometimes; DROP TABLE batch")


async def test_folder_that_cannot_be(tmp_path: Path) -> None:
    """Where a file stands in the way, start() names the folder."""
    (tmp_path / "file").write_text("x")
    broker = LocalBroker(tmp_path / "file" / "log", SystemClock())
    with pytest.raises(BrokerUnreachableError, match="cannot use the folder"):
        await broker.start()
    await broker.close()


async def test_newer_format_is_refused(opened: Open, folder: Path) -> None:
    """What a newer rowmill wrote is left alone, with the way out."""
    await (await opened()).close()
    with sqlite3.connect(folder / "rowmill.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match=r"format 99, this one knows 2.*upgrade rowmill"):
        await opened()


async def test_file_that_is_no_log(folder: Path) -> None:
    """A file that SQLite does not know is not touched."""
    folder.mkdir()
    (folder / "rowmill.db").write_bytes(b"no database at all" * 100)
    broker = LocalBroker(folder, SystemClock())
    with pytest.raises(ConfigError, match="there is no log"):
        await broker.start()
    await broker.close()


async def test_damaged_batch_is_named(opened: Open, folder: Path) -> None:
    """A flipped byte is found by the checksum; the error says where, does not ask for a retry, and others are read."""
    broker = await opened()
    await put(broker, TP, rows(b"one", b"two"))
    await put(broker, TP, rows(b"three"))
    with sqlite3.connect(folder / "rowmill.db") as connection:
        (data,) = connection.execute("SELECT data FROM batch ORDER BY id LIMIT 1").fetchone()
        connection.execute("UPDATE batch SET data = ? WHERE data = ?", (data.replace(b"one", b"oNe"), data))
    connection.close()
    reader = broker.reader()
    await reader.start({TP: 0})
    with pytest.raises(OffsetOutOfRangeError, match="damaged on disk") as caught:
        await reader.fetch([TP], 2, 1)
    assert not caught.value.retryable
    reader.seek(TP, 2)
    assert [r.value for r in (await reader.fetch([TP], 10, 1))[TP]] == [b"three"]


@asynccontextmanager
async def full(opened: Open) -> AsyncIterator[LocalBroker]:
    """A broker that was filled to its cap of 2 MiB."""
    broker = await opened(max_bytes=2 << 20)

    async def fill() -> None:
        for _ in range(200):
            await put(broker, TP, rows(os.urandom(50_000)))

    with pytest.raises(BrokerError, match=r"full \(max_bytes=2,097,152") as caught:
        await fill()
    assert caught.value.retryable
    yield broker


async def test_cap(opened: Open, folder: Path) -> None:
    """A full broker refuses writes whole, keeps what it has, and says what to do."""
    async with full(opened) as broker:
        found = await everything(broker, TP)
        assert 30 <= len(found) <= 42
        producer = broker.transactional_producer("p")
        await producer.start()
        await producer.begin()
        await (await producer.send(OTHER, rows(b"small")))
        await (await producer.send(TP, rows(os.urandom(500_000))))
        with pytest.raises(BrokerError, match="delete topics"):
            await producer.end()
        assert await everything(broker, OTHER) == []
    assert (folder / "rowmill.db").stat().st_size <= 2 << 20


async def test_full_broker_recovers(opened: Open, folder: Path) -> None:
    """Deleting topics works on a full broker, gives the space back, and writing goes on."""
    async with full(opened) as broker:
        await broker.delete_topics(["t"])
        await broker.create_topics([TopicSpec("t", 2)])
        for _ in range(20):
            await put(broker, TP, rows(os.urandom(50_000)))
        assert len(await everything(broker, TP)) == 20


async def test_space_is_given_back(opened: Open, folder: Path) -> None:
    """After a large topic is deleted the file shrinks."""
    broker = await opened()
    for _ in range(8):
        await put(broker, TP, rows(os.urandom(1_000_000), os.urandom(1_000_000)))
    await put(broker, TopicPartition("t", 1), rows(b"x"))
    await broker.delete_topics(["t"])
    await broker.create_topics([TopicSpec("u", 1)])
    await put(broker, TopicPartition("u", 0), rows(b"kept"))
    await broker.trim()
    assert [record.value for record in await everything(broker, TopicPartition("u", 0))] == [b"kept"]
    await broker.close()
    assert (folder / "rowmill.db").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (sqlite3.SQLITE_FULL, "database or disk is full"),
        (sqlite3.SQLITE_IOERR | 10 << 8, "disk I/O error"),
    ],
)
async def test_disk_full(opened: Open, monkeypatch: pytest.MonkeyPatch, code: int, text: str) -> None:
    """The disk's own errors come with the folder and the remedy, and may be retried once it is done."""
    from rowmill.streams.brokers.local_store import LogStore

    def fails(*_: object) -> None:
        error = sqlite3.OperationalError(text)
        error.sqlite_errorcode = code
        raise error

    broker = await opened()
    monkeypatch.setattr(LogStore, "append", fails)
    with pytest.raises(BrokerError, match=rf"{text}.*free space") as caught:
        await put(broker, TP, rows(b"x"))
    assert caught.value.retryable
    monkeypatch.undo()
    await put(broker, TP, rows(b"y"))


# -- retention and deletion ----------------------------------------------------------------------------


async def test_retention_by_age(opened: Open) -> None:
    """Batches all of whose records are past retention.ms go, oldest first; what is left keeps its offsets."""
    clock = SetClock()
    broker = await opened(clock=clock)
    await broker.create_topics([TopicSpec("old", 1, {"retention.ms": "1000"})])
    tp = TopicPartition("old", 0)
    await put(broker, tp, rows(b"0", b"1", timestamp=NOW - 5000))
    await put(broker, tp, rows(b"2", timestamp=NOW + 500))
    await put(broker, tp, rows(b"3", timestamp=NOW - 5000))
    await put(broker, TP, rows(b"kept", timestamp=0))
    await broker.trim()
    assert await broker.offsets([tp, TP], "earliest") == {tp: 2, TP: 0}
    assert [record.value for record in await everything(broker, tp)] == [b"2", b"3"]
    # The newest time that was ever in the log is no longer the newest in it: a search must not trust it.
    assert await broker.offsets([tp], NOW + 501) == {tp: 4}
    assert await broker.offsets([tp], NOW) == {tp: 2}
    reader = broker.reader()
    await reader.start({tp: 1})
    with pytest.raises(OffsetOutOfRangeError, match="2 to 4"):
        await reader.fetch([tp], 10, 1)
    clock.now = NOW + 10_000
    await broker.trim()
    assert await broker.offsets([tp], "earliest") == {tp: 4}
    await put(broker, tp, rows(b"4"))
    assert [(record.offset, record.value) for record in await everything(broker, tp)] == [(4, b"4")]


async def test_retention_by_size(opened: Open) -> None:
    """retention.bytes is per partition, and leaves at least that much, as Kafka does."""
    broker = await opened()
    await broker.create_topics([TopicSpec("small", 1, {"retention.bytes": "30000"})])
    tp = TopicPartition("small", 0)
    for n in range(200):
        await put(broker, tp, rows(bytes([n]) * 1000))
    await broker.trim()
    found = await everything(broker, tp)
    assert 29 <= len(found) <= 31
    assert found[-1].offset == 199


async def test_retention_defaults_and_exceptions(opened: Open) -> None:
    """The broker's own retention holds for topics that say nothing; not for those that keep all or are compacted."""
    broker = await opened(clock=SetClock(), retention_ms=1000)
    await broker.create_topics(
        [TopicSpec("ever", 1, {"retention.ms": "-1"}), TopicSpec("compact", 1, {"cleanup.policy": "compact"})]
    )
    ever, compact = TopicPartition("ever", 0), TopicPartition("compact", 0)
    for tp in (TP, ever, compact):
        await put(broker, tp, rows(b"x", timestamp=0))
    await broker.trim()
    assert await broker.offsets([TP, ever, compact], "earliest") == {TP: 1, ever: 0, compact: 0}


async def test_start_trims(opened: Open) -> None:
    """A broker that starts drops what is past its time, without being asked."""
    broker = await opened()
    await broker.create_topics([TopicSpec("old", 1, {"retention.ms": "1000"})])
    tp = TopicPartition("old", 0)
    await put(broker, tp, rows(b"x", timestamp=0))
    await broker.close()
    broker = await opened()
    async with asyncio.timeout(10):
        while await broker.offsets([tp], "earliest") != {tp: 1}:
            await asyncio.sleep(0.01)


async def test_deleted_topic_takes_its_offsets_along(opened: Open) -> None:
    """A group starts afresh on a topic made anew, and a reader of the deleted one is told, not fed other records."""
    broker = await opened()
    producer = broker.transactional_producer("p")
    await producer.start()
    await producer.begin()
    await (await producer.send(TP, rows(b"old")))
    await producer.commit_offsets("g", {TP: Committed(1, "map")})
    await producer.end()
    reader = broker.reader()
    await reader.start({TP: 0})
    await broker.delete_topics(["t"])
    await broker.create_topics([TopicSpec("t", 2)])
    await put(broker, TP, rows(b"new"))
    assert await broker.committed("g", [TP]) == {TP: None}
    with pytest.raises(TopicError, match="deleted"):
        await reader.fetch([TP], 10, 1)


async def test_topic_deleted_elsewhere(opened: Open) -> None:
    """A topic that another broker object deleted is noticed when it is written to, and nothing else is written."""
    one, two = await opened(), await opened()
    await one.create_topics([TopicSpec("u", 1)])
    await put(one, TP, rows(b"1"))
    await put(one, TopicPartition("u", 0), rows(b"1"))
    await two.delete_topics(["t"])
    producer = one.transactional_producer("p")
    await producer.start()
    await producer.begin()
    await (await producer.send(TopicPartition("u", 0), rows(b"2")))
    await (await producer.send(TP, rows(b"2")))
    with pytest.raises(TopicError):
        await producer.end()
    assert len(await everything(one, TopicPartition("u", 0))) == 1
    with pytest.raises(TopicError, match="no such topic"):
        await put(one, TP, rows(b"3"))


# -- reading -------------------------------------------------------------------------------------------


async def test_other_object_wakes_within_a_poll(opened: Open) -> None:
    """A write through another broker object ends a waiting fetch by the data version, well before its timeout."""
    one, two = await opened(), await opened()
    reader = one.reader()
    await reader.start({TP: 0, OTHER: 0})
    fetching = asyncio.create_task(reader.fetch([TP, OTHER], 10, 60))
    await asyncio.sleep(0.02)
    await put(two, OTHER, rows(b"x"))
    async with asyncio.timeout(5):
        assert list(await fetching) == [OTHER]


async def test_begin_and_seek_wake_a_waiting_fetch(opened: Open) -> None:
    """A fetch that waits looks again as soon as a partition begins or is moved."""
    broker = await opened()
    await put(broker, TP, rows(b"0", b"1"))
    member = broker.member("g", ["t"])
    await member.join(Listener())
    for move in (partial(member.begin, TP, 0), partial(member.seek, TP, 0)):
        fetching = asyncio.create_task(member.fetch([TP], 10, 60))
        await asyncio.sleep(0.02)
        move()
        async with asyncio.timeout(5):
            assert len((await fetching)[TP]) == 2
    fetching = asyncio.create_task(member.fetch([TP], 10, 60))
    await asyncio.sleep(0.02)
    await member.close()
    async with asyncio.timeout(5):
        assert await fetching == {}


async def test_shares_are_fair(opened: Open) -> None:
    """A partition with much does not crowd out one with little, and gets what the other leaves."""
    broker = await opened()
    await put(broker, TP, rows(*(b"%d" % n for n in range(5000))))
    await put(broker, OTHER, rows(*(b"%d" % n for n in range(10))))
    reader = broker.reader()
    await reader.start({TP: 0, OTHER: 0})
    found = await reader.fetch([TP, OTHER], 100, 1)
    assert {tp: len(records) for tp, records in found.items()} == {TP: 90, OTHER: 10}
    reader.seek(OTHER, 0)
    one_by_one = [next(iter(await reader.fetch([TP, OTHER], 1, 1))) for _ in range(4)]
    assert set(one_by_one) == {TP, OTHER}


async def test_fetch_is_bounded_in_bytes(opened: Open) -> None:
    """Large records come in several fetches of about 16 MiB; what a reader keeps for later is bounded as well."""
    broker = await opened()
    for _ in range(40):
        await put(broker, TP, rows(os.urandom(1_000_000)))
    reader = broker.reader()
    await reader.start({TP: 0})
    sizes: list[int] = []
    while sum(sizes) < 40:
        sizes.append(len((await reader.fetch([TP], 1000, 1))[TP]))
    assert max(sizes) <= 18
    reader.seek(TP, 0)
    await reader.fetch([TP], 1, 1)
    assert len(reader._cursors[TP].ahead) <= 18


# -- batches -------------------------------------------------------------------------------------------

optional_bytes = st.none() | st.binary(max_size=20)
header_names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
records_of_any_kind = st.lists(
    st.builds(
        Outgoing,
        optional_bytes,
        optional_bytes,
        st.integers(-(2**63), 2**63 - 1),
        st.lists(st.tuples(header_names, optional_bytes), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=30,
)


@given(records_of_any_kind, st.integers(1, 7), st.integers(1, 60))
def test_batches_round_trip(records: list[Outgoing], most: int, most_bytes: int) -> None:
    """However the records are cut into batches, they come back the same, at dense offsets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_batch, "MAX_BATCH_RECORDS", most)
        patch.setattr(local_batch, "MAX_BATCH_BYTES", most_bytes)
        batches = Columns(records).batches()
    assert all(batch.records <= most for batch in batches)
    found = decode(b"".join(batch.data for batch in batches), "t", 3, 100)
    assert [Outgoing(r.key, r.value, r.timestamp, r.headers) for r in found] == records
    assert [r.offset for r in found] == list(range(100, 100 + len(records)))


@given(records_of_any_kind, st.data())
def test_any_flip_or_cut_is_found(records: list[Outgoing], data: st.DataObject) -> None:
    """A changed or missing byte never passes for records."""
    (batch,) = Columns(records).batches()
    at = data.draw(st.integers(20, len(batch.data) - 1))
    flipped = bytearray(batch.data)
    flipped[at] ^= data.draw(st.integers(1, 255))
    for broken in (bytes(flipped), batch.data[:at]):
        with pytest.raises(DamagedBatchError):
            decode(broken, "t", 0, 0)
