"""Compaction of the embedded broker's topics: what stays, what readers see, kills, and other processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill.state.clock import SystemClock
from rowmill.state.model import Outgoing, StoredRecord, TopicPartition
from rowmill.streams.brokers import local, local_batch, local_compact
from rowmill.streams.brokers.base import Reader, TopicSpec
from rowmill.streams.brokers.local import LocalBroker
from rowmill.streams.brokers.local_batch import Columns, DamagedBatchError, decode, decode_keys, first_at, survey
from rowmill.streams.brokers.local_schema import SCHEMA, UPGRADE
from rowmill.streams.brokers.local_store import LogStore, LogToCompact, ReadPlan

TP = TopicPartition("c", 0)
NOW = 1_750_000_000_000
DAY = 86_400_000


class SetClock(SystemClock):
    """The machine's clock, except that the time of day is set by the test."""

    now = NOW

    def now_ms(self) -> int:
        return self.now


Open = Callable[..., Awaitable[LocalBroker]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the log goes: not there yet."""
    return tmp_path / "log"


@pytest.fixture
async def opened(folder: Path) -> AsyncIterator[Open]:
    """Starts brokers on the folder, with the compacted topic c of one partition, and closes them."""
    brokers = []

    async def start(clock: SystemClock | None = None, **config: str) -> LocalBroker:
        broker = LocalBroker(folder, clock or SystemClock())
        brokers.append(broker)
        await broker.start()
        config = {name.replace("_", "."): value for name, value in config.items()}
        await broker.create_topics([TopicSpec("c", 1, {"cleanup.policy": "compact", **config})])
        return broker

    yield start
    for broker in brokers:
        await broker.close()


def keyed(key: str | None, value: str | None, timestamp: int = NOW, headers: Any = ()) -> Outgoing:
    """A record."""
    return Outgoing(
        None if key is None else key.encode(), None if value is None else value.encode(), timestamp, headers
    )


async def put(broker: LocalBroker, *records: Outgoing, tp: TopicPartition = TP) -> None:
    """Write records, as one batch."""
    producer = broker.producer()
    await (await producer.send(tp, records))
    await producer.close()


async def put_each(broker: LocalBroker, *records: Outgoing) -> None:
    """Write records, each as a batch of its own."""
    for record in records:
        await put(broker, record)


async def drain(reader: Reader, end: int, most: int = 10_000) -> list[Any]:
    """What a reader still gets up to an offset."""
    found: list[Any] = []
    async with asyncio.timeout(20):
        while await reader.position(TP) < end:
            got = await reader.fetch([TP], most, 5)
            assert list(got) == [TP], "what lies before the end is read, or moved over, at once"
            found += got[TP]
    return found


async def end_of(broker: LocalBroker) -> int:
    """The log's end."""
    return (await broker.offsets([TP], "end"))[TP]


async def everything(broker: LocalBroker, start: int = 0) -> list[Any]:
    """All records from an offset on."""
    reader = broker.reader()
    await reader.start({TP: start})
    found = await drain(reader, await end_of(broker))
    await reader.close()
    return found


async def brief(broker: LocalBroker, start: int = 0) -> list[tuple[int, str, str | None]]:
    """Offset, key and value of all records."""
    return [
        (r.offset, r.key.decode() if r.key else "", None if r.value is None else r.value.decode())
        for r in await everything(broker, start)
    ]


def fold(records: Sequence[Any]) -> dict[bytes, bytes]:
    """The newest value of each key."""
    table: dict[bytes, bytes] = {}
    for record in records:
        if record.value is None:
            table.pop(record.key, None)
        else:
            table[record.key] = record.value
    return table


def sizes(folder: Path) -> tuple[int, int, int]:
    """Pages of the file, unused ones, and batches, asked through a connection of SQLite's own."""
    connection = sqlite3.connect(folder / "rowmill.db")
    pages, free, batches = (
        connection.execute(query).fetchone()[0]
        for query in ("PRAGMA page_count", "PRAGMA freelist_count", "SELECT count(*) FROM batch")
    )
    connection.close()
    return pages, free, batches


# -- what stays ----------------------------------------------------------------------------------------


async def test_newest_of_each_key_stays_as_it_is(opened: Open) -> None:
    """Of each key the newest record stays, with its offset, headers and timestamp; start and end do not move."""
    broker = await opened()
    await put(broker, keyed("a", "1"), keyed("b", "1", NOW + 7, (("h", b"x"), ("h", None))), keyed("a", "2"))
    await put(broker, keyed("a", "3", NOW - 5, (("n", b""),)), keyed("c", "1"))
    await put(broker, keyed("end", "1"))
    before = await everything(broker)
    await broker.compact()
    assert await everything(broker) == [before[1], *before[3:]]
    assert await broker.offsets([TP], "earliest") == {TP: 0}
    assert await end_of(broker) == 6
    await put(broker, keyed("b", "2"))
    assert (await brief(broker))[-1] == (6, "b", "2")


async def test_newest_batch_is_left_alone(opened: Open) -> None:
    """What was written last stays whole, duplicates and all, so that the log's end stays where it is."""
    broker = await opened()
    await put(broker, keyed("a", "1"))
    await put(broker, keyed("a", "2"), keyed("a", "3"))
    await broker.compact()
    assert await brief(broker) == [(0, "a", "1"), (1, "a", "2"), (2, "a", "3")]


async def test_records_without_a_key_stay(opened: Open) -> None:
    """A record without a key is nobody's older one."""
    broker = await opened()
    await put_each(broker, keyed(None, "1"), keyed(None, None), keyed("a", "1"), keyed(None, "2"), keyed("a", "2"))
    for end in (5, 6):
        await put(broker, keyed("end", ""))
        await broker.compact()
        assert [record[0] for record in await brief(broker)] == [0, 1, 3, 4, *range(5, end + 1)]


async def test_deletions_stay_a_day_then_go(opened: Open) -> None:
    """A deletion takes the older values at once, stays for a day after that compaction, then goes; never the newest."""
    clock = SetClock()
    broker = await opened(clock)
    await put_each(broker, keyed("a", "1"), keyed("a", None), keyed("b", "1"), keyed("b", None))
    clock.now += 5 * DAY  # the time since it was written does not count: the value was there all along
    await broker.compact()
    assert await brief(broker) == [(1, "a", None), (2, "b", "1"), (3, "b", None)]
    clock.now += DAY - 1
    await put_each(broker, keyed("x", "1"))
    await broker.compact()
    assert await brief(broker) == [(1, "a", None), (3, "b", None), (4, "x", "1")]
    clock.now += 1
    await put_each(broker, keyed("y", "1"))
    await broker.compact()
    assert await brief(broker) == [(3, "b", None), (4, "x", "1"), (5, "y", "1")]
    clock.now += DAY
    await put_each(broker, keyed("z", None))
    for _ in range(2):
        await broker.compact()
        assert await brief(broker) == [(4, "x", "1"), (5, "y", "1"), (6, "z", None)]
    assert await broker.offsets([TP], "earliest") == {TP: 0}


async def test_delete_retention_is_the_topics(opened: Open) -> None:
    """delete.retention.ms shortens the day."""
    clock = SetClock()
    broker = await opened(clock, delete_retention_ms="100")
    await put_each(broker, keyed("a", None), keyed("b", "1"))
    await broker.compact()
    clock.now += 100
    await put_each(broker, keyed("c", "1"))
    await broker.compact()
    assert await brief(broker) == [(1, "b", "1"), (2, "c", "1")]


async def test_other_topics_are_not_compacted(opened: Open) -> None:
    """Only cleanup.policy says so; with compact,delete the front is trimmed as well."""
    clock = SetClock()
    broker = await opened(clock)
    plain, both = TopicPartition("plain", 0), TopicPartition("both", 0)
    await broker.create_topics(
        [
            TopicSpec("plain", 1),
            TopicSpec("both", 1, {"cleanup.policy": "compact,delete", "retention.ms": "1000"}),
        ]
    )
    for tp in (plain, both):
        await put(broker, keyed("a", "0", NOW - 9000), keyed("b", "0", NOW - 9000), tp=tp)
        await put(broker, keyed("a", "1"), keyed("a", "2"), tp=tp)
        await put(broker, keyed("c", "1"), tp=tp)
    await broker.compact()
    await broker.trim()
    assert await broker.offsets([plain, both], "earliest") == {plain: 0, both: 0}, "the batch now holds newer records"
    clock.now += 2000
    await broker.trim()
    assert await broker.offsets([plain, both], "earliest") == {plain: 0, both: 5}
    reader = broker.reader()
    await reader.start({plain: 0})
    assert len((await reader.fetch([plain], 10, 1))[plain]) == 5


async def test_retention_after_compaction(opened: Open) -> None:
    """Compacted batches are trimmed at their ends, and what was said to be clean stays true."""
    clock = SetClock()
    broker = await opened(clock, cleanup_policy="compact,delete", retention_ms="1000")
    await put_each(broker, *(keyed("a", str(n), NOW - 9000) for n in range(5)))
    await put_each(broker, keyed("b", "1"))
    await broker.compact()
    await broker.trim()
    assert await broker.offsets([TP], "earliest") == {TP: 5}
    assert await brief(broker, 5) == [(5, "b", "1")]
    await put_each(broker, keyed("b", "2"), keyed("b", "3"))
    await broker.compact()
    assert await brief(broker, 5) == [(6, "b", "2"), (7, "b", "3")] or await brief(broker, 5) == [(7, "b", "3")]


# -- the file ------------------------------------------------------------------------------------------


async def test_space_is_used_again(opened: Open, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a few keys are written, the file stays small: compaction makes room that new records take."""
    monkeypatch.setattr(local, "_COMPACT_BYTES", 100_000)
    broker = await opened()
    largest = 0
    for turn in range(20):
        for _ in range(10):
            await put(broker, *(keyed(f"k{n}", os.urandom(500).hex()) for n in range(20)))
        if turn == 0:
            largest = sizes(folder)[0] * 2
        await broker.trim()
        assert sizes(folder)[0] < largest
    assert len(await everything(broker)) < 100
    assert await end_of(broker) == 20 * 10 * 20


@pytest.mark.parametrize("keys", [600, 10])
async def test_small_batches_become_large_ones(
    opened: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, keys: int
) -> None:
    """Commits of one record each do not stay a batch each, nor one per step, whether or not much is outdated."""
    monkeypatch.setattr(local_compact, "_STEP_BYTES", 50 * keys)
    broker = await opened()
    producer = broker.producer()
    for n in range(600):
        await (await producer.send(TP, [keyed(str(n % keys), "x")]))
    await put(broker, keyed("end", ""))
    await broker.compact()
    assert sizes(folder)[2] <= 3
    assert [record.offset for record in await everything(broker)] == list(range(600 - keys, 601))


async def test_background_waits_until_it_is_worth_while(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The background compacts a partition when as much was added as was left of it, and at least the floor."""
    monkeypatch.setattr(local, "_COMPACT_BYTES", 10_000)
    broker = await opened()

    async def grow(records: int) -> int:
        await put_each(broker, *(keyed(f"k{n % 20}", "x" * 1000) for n in range(records)))
        await broker.trim()
        return len(await everything(broker))

    assert await grow(9) == 9
    assert await grow(31) <= 21
    assert await grow(10) > 21  # 20 KB are clean: too little for another round
    assert await grow(20) <= 21


async def test_keys_beyond_the_room_take_several_passes(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more keys than fit into memory, the log is compacted stretch by stretch, to the same result."""
    monkeypatch.setattr(local_compact, "_KEYS_BYTES", 10 * local_compact._KEY_COST)
    monkeypatch.setattr(local_compact, "_STEP_BYTES", 400)
    broker = await opened()
    await put_each(broker, *(keyed(str(n % 40), str(n)) for n in range(120)), keyed("end", ""))
    await broker.compact()
    assert [record.offset for record in await everything(broker)] == list(range(80, 121))


async def test_log_of_the_version_before(folder: Path) -> None:
    """A file made before there was compaction is upgraded when it is opened, with all it has."""
    broker = LocalBroker(folder, SystemClock())
    await broker.start()
    await broker.create_topics([TopicSpec("c", 1, {"cleanup.policy": "compact"})])
    await put_each(broker, keyed("a", "1"), keyed("a", "2"), keyed("b", "1"))
    await broker.close()
    connection = sqlite3.connect(folder / "rowmill.db")
    connection.executescript(
        "ALTER TABLE log DROP COLUMN clean; ALTER TABLE log DROP COLUMN clean_bytes; PRAGMA user_version = 1"
    )
    connection.close()
    assert all(name in SCHEMA for name in ("clean ", "clean_bytes "))
    assert UPGRADE.count("ADD COLUMN") == 2
    broker = LocalBroker(folder, SystemClock())
    await broker.start()
    await broker.compact()
    assert await brief(broker) == [(1, "a", "2"), (2, "b", "1")]
    await broker.close()


async def test_damaged_batch_stops_that_partition_only(
    opened: Open, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Compaction never writes over what it cannot read; it says so, and goes on with the others."""
    broker = await opened()
    other = TopicPartition("d", 0)
    await broker.create_topics([TopicSpec("d", 1, {"cleanup.policy": "compact"})])
    for tp in (TP, other):
        for n in range(3):
            await put(broker, keyed("a", f"value{n}"), tp=tp)
    with sqlite3.connect(folder / "rowmill.db") as connection:
        (data,) = connection.execute("SELECT data FROM batch ORDER BY id LIMIT 1").fetchone()
        connection.execute(
            "UPDATE batch SET data = ? WHERE id = (SELECT min(id) FROM batch)", (data.replace(b"value0", b"valuE0"),)
        )
    connection.close()
    await broker.compact()
    assert "cannot compact" in caplog.text
    assert await brief(broker, 1) == [(1, "a", "value1"), (2, "a", "value2")]
    reader = broker.reader()
    await reader.start({other: 0})
    assert [r.offset for r in (await reader.fetch([other], 10, 1))[other]] == [1, 2]


# -- readers -------------------------------------------------------------------------------------------


async def test_readers_before_inside_and_behind(opened: Open) -> None:
    """A reader goes on at the next record that stayed, wherever it stands, with its position behind the gap."""
    broker = await opened()
    await put_each(broker, *(keyed("a", str(n)) for n in range(10)), *(keyed("b", str(n)) for n in range(10)))
    await put_each(broker, keyed("end", ""))
    await broker.compact()
    for start, expected in [(0, [9, 19, 20]), (5, [9, 19, 20]), (9, [9, 19, 20]), (10, [19, 20]), (20, [20]), (21, [])]:
        reader = broker.reader()
        await reader.start({TP: start})
        assert [r.offset for r in await drain(reader, 21, most=1)] == expected
        assert await reader.position(TP) == 21
        assert await reader.fetch([TP], 1, 0) == {}
        await reader.close()


async def test_gap_without_a_record_behind_it(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is left of what a fetch looked at, an empty list tells that the position moved over the gap."""
    monkeypatch.setattr(local_batch, "MAX_BATCH_RECORDS", 1)
    broker = await opened()
    await put_each(broker, *(keyed(key, "") for key in "xaaabz"))
    await broker.compact()
    reader = broker.reader()
    await reader.start({TP: 1})
    assert await reader.fetch([TP], 1, 5) == {TP: []}
    assert await reader.position(TP) == 3
    assert [record.offset for record in await drain(reader, 6, most=1)] == [3, 4, 5]


async def test_reader_that_has_read_ahead(opened: Open) -> None:
    """Records that a reader has read already come as they were; behind them it meets the compacted log."""
    broker = await opened()
    await put(broker, *(keyed("a", str(n)) for n in range(50)))
    await put(broker, *(keyed("a", str(n)) for n in range(50, 100)))
    await put(broker, keyed("a", "100"), keyed("b", "0"))
    reader = broker.reader()
    await reader.start({TP: 0})
    assert len((await reader.fetch([TP], 10, 1))[TP]) == 10
    await broker.compact()
    assert [r.offset for r in await drain(reader, 102)] == [*range(10, 50), 99, 100, 101]


async def test_times(opened: Open) -> None:
    """A time is found at the first record that stayed and is of that time or later, gaps or not."""
    broker = await opened()
    times = [5, 90, 20, 30, 10, 60, 40, 80]
    keys = "abacbdad"
    await put_each(broker, *(keyed(key, "", time) for key, time in zip(keys, times, strict=True)))
    await put_each(broker, keyed("end", "", 85))
    await broker.compact()
    kept = [(r.offset, r.timestamp) for r in await everything(broker)]
    assert [offset for offset, _ in kept] == [3, 4, 6, 7, 8]
    for time in range(0, 100, 5):
        expected = next((offset for offset, found in kept if found >= time), 9)
        assert await broker.offsets([TP], time) == {TP: expected}


async def test_times_behind_the_newest_batch(opened: Open) -> None:
    """The latest time of the log counts on from what is in the batch that compaction left alone."""
    broker = await opened()
    await put_each(broker, keyed("a", "", 5), keyed("a", "", 5), keyed("b", "", 90))
    await broker.compact()
    await put_each(broker, *(keyed("c", "", 10) for _ in range(9)))
    assert await broker.offsets([TP], 50) == {TP: 2}


# -- any sequence ---------------------------------------------------------------------------------------

writes = st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 50)), min_size=1, max_size=12)
steps = st.lists(
    writes | st.sampled_from(["compact", "wait"]) | st.integers(0, 200).map(lambda n: ("read", n)), max_size=25
)


@settings(deadline=None, max_examples=60)
@given(steps, st.integers(60, 2000), st.integers(1, 6))
def test_any_sequence_keeps_the_fold(steps: list[Any], step_bytes: int, most: int) -> None:
    """Writes, deletions, compactions and reads in any order: the fold is the uncompacted log's, offsets stay."""

    async def run(folder: str) -> None:
        clock = SetClock()
        broker = LocalBroker(folder, clock)
        await broker.start()
        await broker.create_topics([TopicSpec("c", 1, {"cleanup.policy": "compact"})])
        log: list[Any] = []
        readers: list[tuple[int, Reader, list[Any]]] = []
        try:
            for step in steps:
                if step == "compact":
                    await broker.compact()
                elif step == "wait":
                    clock.now += DAY
                elif isinstance(step, tuple):
                    at = step[1] % (len(log) + 1)
                    readers.append((at, broker.reader(), []))
                    await readers[-1][1].start({TP: at})
                else:
                    out = [keyed(key, None if gone else str(len(log) + n), t) for n, (key, gone, t) in enumerate(step)]
                    await put(broker, *out)
                    log += [
                        StoredRecord(*TP, len(log) + n, o.timestamp, o.key, o.value, o.headers)
                        for n, o in enumerate(out)
                    ]
                for _, reader, seen in readers:  # they lag: a few records per step, between compactions
                    seen += (await reader.fetch([TP], 2, 0)).get(TP, [])
            await check(broker, log)
            for at, reader, seen in readers:
                seen += await drain(reader, len(log), most=3)
                assert [log[r.offset] for r in seen] == seen
                assert all(a.offset < b.offset for a, b in pairwise(seen))
                # A reader never misses the newest record of a key that is there, nor a deletion of a value it saw.
                table = fold(seen)
                assert (
                    table == {k: v for k, v in fold(log).items() if k in {r.key for r in log[at:]}} or "wait" in steps
                )
        finally:
            await broker.close()

    async def check(broker: LocalBroker, log: list[Any]) -> None:
        found = await everything(broker)
        assert [log[r.offset] for r in found] == found
        assert fold(found) == fold(log)
        assert await end_of(broker) == len(log)
        assert not log or found[-1].offset == len(log) - 1
        for time in range(0, 60, 7):
            expected = next((r.offset for r in found if r.timestamp >= time), len(log))
            assert await broker.offsets([TP], time) == {TP: expected}

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_compact, "_STEP_BYTES", step_bytes)
        patch.setattr(local_batch, "MAX_BATCH_RECORDS", most)
        patch.setattr(local_compact, "MAX_BATCH_RECORDS", most)
        asyncio.run(run(folder))


optional_bytes = st.none() | st.binary(max_size=10)
sparse_records = st.dictionaries(
    st.integers(0, 200),
    st.builds(
        Outgoing,
        optional_bytes,
        optional_bytes,
        st.integers(-(2**63), 2**63 - 1),
        st.lists(st.tuples(st.text("ab", max_size=2), optional_bytes), max_size=2).map(tuple),
    ),
    max_size=20,
).map(lambda found: dict(sorted(found.items())))


@given(sparse_records, st.data())
def test_sparse_batches_round_trip(records: dict[int, Outgoing], data: st.DataObject) -> None:
    """Records at any offsets, with stamps, come back the same; every flipped byte is found."""
    offsets = list(records)
    chosen = data.draw(st.sets(st.sampled_from(offsets))) if offsets else set()
    stamps = {offset + 1000: offset * 7 for offset in chosen}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_batch, "MAX_BATCH_RECORDS", data.draw(st.integers(1, 30)))
        batches = Columns(list(records.values())).sparse_batches(1000, [o + 1000 for o in offsets], 1201, stamps)
    ends = [base + batch.records for base, batch in batches]
    assert [base for base, _ in batches] == [1000, *ends[:-1]]
    assert ends[-1] == 1201
    blob = b"".join(batch.data for _, batch in batches)
    found = decode(blob, "c", 0, 1000)
    assert {r.offset - 1000: Outgoing(r.key, r.value, r.timestamp, r.headers) for r in found} == records
    assert decode_keys(blob, 1000) == [(r.key, r.offset) for r in found]
    assert survey(blob, 1000).stamps == stamps
    assert survey(blob, 1000).blobs == len(batches)
    for base, batch in batches:
        in_it = [r for r in found if base <= r.offset < base + batch.records]
        for record in in_it:
            first = next(r.offset for r in in_it if r.timestamp >= record.timestamp)
            assert base + first_at(batch.data, record.timestamp) == first
    flipped = bytearray(batches[0][1].data)
    flipped[data.draw(st.integers(16, len(flipped) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedBatchError):
        decode(bytes(flipped), "c", 0, 1000)


# -- several processes, and kills ----------------------------------------------------------------------

PRELUDE = """
import asyncio, os, signal, sys
from rowmill.state.clock import SystemClock
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers import local_compact
from rowmill.streams.brokers.local import LocalBroker
from rowmill.streams.brokers.local_store import LogStore
TP = TopicPartition("c", 0)
local_compact._STEP_BYTES = 5_000
LocalBroker._trim_in_background = lambda broker: None  # what compacts is what the test says

async def main():
    broker = LocalBroker(sys.argv[1], SystemClock())
    await broker.start()
    await work(broker)
    await broker.close()
"""

DIE_AT_STEP = """
def die_at(step, inside):
    rewrite, done = LogStore.rewrite, 0
    def counted(store, new):
        nonlocal done
        done += 1
        if done == step and inside:  # in the middle of its transaction, the old batches gone, some new ones there
            new = new._replace(batches=dying(new.batches))
        outcome = rewrite(store, new)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome
    LogStore.rewrite = counted

def dying(batches):
    yield from batches[:1]
    os.kill(os.getpid(), signal.SIGKILL)

async def work(broker):
    die_at(int(sys.argv[2]), sys.argv[3] == "inside")
    await broker.compact()
"""

PUBLISH = """
async def work(broker):
    producer = broker.producer()
    loop, n, slowest = asyncio.get_running_loop(), 0, 0.0
    print("ready", flush=True)
    reading = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    while not reading.done():
        began = loop.time()
        await (await producer.send(TP, [Outgoing(b"child", b"%d" % n, 0)]))
        slowest, n = max(slowest, loop.time() - began), n + 1
        await asyncio.sleep(0.001)
    print(n, slowest, flush=True)
"""


def process(body: str, folder: Path, *args: object) -> Popen[str]:
    """Run ``work`` in a Python of its own."""
    code = f"{PRELUDE}\n{body}\nasyncio.run(main())"
    return Popen([sys.executable, "-c", code, str(folder), *map(str, args)], stdin=PIPE, stdout=PIPE, text=True)


async def many(broker: LocalBroker, batches: int = 60) -> list[Any]:
    """Write so many batches over 300 keys, and give them all."""
    for batch in range(batches):
        await put(broker, *(keyed(f"k{(batch * 37 + n) % 300}", None if n == 7 else f"{batch}/{n}") for n in range(50)))
    return await everything(broker)


@pytest.mark.parametrize("where", ["inside", "behind"])
@pytest.mark.parametrize("step", [1, 2, 5])
async def test_kill_amid_compaction(opened: Open, folder: Path, step: int, where: str) -> None:
    """A kill inside a step, or between two, leaves a log with the same fold, offsets and end, and the next goes on."""
    broker = await opened()
    before = await many(broker)
    with process(DIE_AT_STEP, folder, step, where) as child:
        assert await asyncio.to_thread(child.wait, 20) == -signal.SIGKILL
    for _ in range(2):
        after = await everything(broker)
        assert [before[r.offset] for r in after] == after
        assert fold(after) == fold(before)
        assert await end_of(broker) == len(before)
        await broker.compact()
    assert len(after) < 400


async def test_two_compact_at_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another compacts at the same time is not written over, and one of the two gets to the end."""
    monkeypatch.setattr(local_compact, "_STEP_BYTES", 5_000)
    one, two = await opened(), await opened()
    before = await many(one)
    await asyncio.gather(one.compact(), two.compact())
    after = await everything(one)
    assert [before[r.offset] for r in after] == after
    assert fold(after) == fold(before)
    assert len(after) < 400


async def test_step_that_comes_too_late_is_dropped(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch that was rewritten, trimmed or deleted since it was read is left as it is."""
    broker, other = await opened(), await opened()
    before = await many(broker, 5)
    rewrite = LogStore.rewrite
    late: list[Any] = []

    def keep_for_later(_: LogStore, new: Any) -> bool:
        late.append(new)
        return False

    monkeypatch.setattr(LogStore, "rewrite", keep_for_later)
    await broker.compact()
    monkeypatch.setattr(LogStore, "rewrite", rewrite)
    await other.compact()
    after = await everything(broker)
    assert len(after) < len(before)
    assert not await broker.write(LogStore.rewrite, late[0])
    assert await everything(broker) == after
    (log,) = (await broker.read(LogStore.logs, [TP])).values()
    assert await broker.read(LogStore.stretch, ReadPlan(TP, log, 0), 100, 100)
    await broker.write(LogStore.drop_topics, ["c"])  # not swept yet
    assert await broker.read(LogStore.stretch, ReadPlan(TP, log, 0), 100, 100) is None
    await broker.delete_topics(["c"])
    assert not await broker.write(LogStore.rewrite, late[0])


async def test_only_what_was_learnt_is_stamped(opened: Open) -> None:
    """Where another process merged batches across the pass's end, deletions behind it wait for a pass of their own."""
    broker = await opened()
    await put(broker, keyed("a", None), keyed("b", None))
    (log,) = (await broker.read(LogStore.logs, [TP])).values()
    this = local_compact.Pass(LogToCompact(TP, log, 0, 0, 1), local_compact.Newest(), NOW, DAY)
    step = await broker.read(local_compact._sift, this, 0, 1)
    assert step is not None
    assert step.rewrite is not None
    ((base, batch),) = step.rewrite.batches
    assert survey(batch.data, base).stamps == {0: NOW}


async def test_deleted_amid_compaction(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A topic deleted while it is compacted ends the pass without a word."""
    monkeypatch.setattr(local_compact, "_STEP_BYTES", 5_000)
    broker = await opened()
    await many(broker)
    compacting = asyncio.create_task(broker.compact())
    await asyncio.sleep(0.01)
    await broker.delete_topics(["c"])
    await compacting
    assert await broker.topics() == {}


async def test_close_amid_compaction(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing ends a compaction in the background, and leaves no connection behind."""
    monkeypatch.setattr(local_compact, "_STEP_BYTES", 2_000)
    monkeypatch.setattr(local, "_COMPACT_BYTES", 1_000)
    broker = await opened()
    await many(broker)
    broker._trim_in_background()
    await asyncio.sleep(0.02)
    await broker.close()
    assert [path.name for path in broker.folder.iterdir() if path.name.startswith("rowmill")] == ["rowmill.db"]


async def test_another_process_goes_on_writing(opened: Open, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this process compacts, one that publishes waits for single steps only, and nothing of it is lost."""
    monkeypatch.setattr(local_compact, "_STEP_BYTES", 50_000)
    broker = await opened()
    producer = broker.producer()
    for batch in range(100):
        await (await producer.send(TP, [keyed(f"k{n}", f"{batch}" * 50) for n in range(1000)]))
    with process(PUBLISH, folder) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert (await asyncio.to_thread(child.stdout.readline)).strip() == "ready"
        await broker.compact()
        count, slowest = (await asyncio.to_thread(child.communicate, "\n", 20))[0].split()
    await put_each(broker, keyed("end", ""))
    await broker.compact()
    assert fold(await everything(broker))[b"child"] == b"%d" % (int(count) - 1)
    assert int(count) > 1
    assert float(slowest) < 5.0  # far below lock_timeout, far above what it takes on an idle machine
