"""A restore of tables against the least that it could cost: a bare loop of fetching and writing, same topic, same run.

    python -m benchmarks.restore                                     # on an Apache Kafka of its own
    python -m benchmarks.restore --broker kafka://127.0.0.1:9092     # or local://DIR

Fills one changelog partition as commits do, then restores it into an empty folder again and again, rowmill and the
bare loop in turn, each in a fresh process. Every run checks what it restored.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.8
TOPIC = "rows"
PER_COMMIT = 5_000
BARE_BATCH = 2_000
SAMPLE = 1_009
PREFIX = b"counts/"


def main() -> int:
    parser = argparse.ArgumentParser(description="Restore 1,000,000 changelog records, and compare with a bare loop.")
    parser.add_argument("--broker", help="default: start an Apache Kafka")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7, help="of each, alternately (default: %(default)s)")
    parser.add_argument("--child", choices=["rowmill", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(args)))
        return 0
    with some_broker(args.broker) as url:
        args.broker, args.name = url, f"restore-{uuid.uuid4().hex[:8]}"
        try:
            began = time.monotonic()
            asyncio.run(fill(args))
            print(f"{args.records:,} records written in {time.monotonic() - began:.0f} s to {url}", flush=True)
            return compare(args)
        finally:
            asyncio.run(clean_up(args))


@contextlib.contextmanager
def some_broker(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from support.kafka_server import find_source

    with find_source()() as kafka:
        yield f"kafka://{kafka.bootstrap}"


# --- the changelog ---------------------------------------------------------------------------------------------------


def key_of(number: int) -> bytes:
    """16 to 20 bytes, all different, in no order: as keys of rows are."""
    digest = f"{number * 2_654_435_761 % 2**32:08x}"  # odd, so that no two numbers give the same
    return PREFIX + f"{digest}{'abcde'[: number % 5]}-".encode()


def value_of(number: int) -> bytes:
    """About 100 bytes of JSON."""
    fields = {"count": number, "total": number * 0.37, "last": f"2026-01-01T00:00:{number % 60:02d}", "state": "open"}
    return json.dumps({**fields, "note": "x" * 12}).encode()


async def fill(args: argparse.Namespace) -> None:
    """Transactions as a partition task makes them: the tables' records, a checkpoint record, the group's offset."""
    from rowmill.handlers.executors import BlockingPool
    from rowmill.state.clock import SystemClock
    from rowmill.state.model import Committed, Outgoing, TopicPartition
    from rowmill.streams.brokers.base import TopicSpec
    from rowmill.streams.brokers.open import open_broker
    from rowmill.streams.options import WorkerOptions
    from rowmill.streams.partition_state import CHANGELOG_CONFIG, PartitionState
    from rowmill.streams.processing import Effects
    from rowmill.streams.session import Session

    session, source = Session(args.name), f"{args.name}.{TOPIC}"
    changelog = TopicPartition(session.changelog(source), 0)
    broker, clock = open_broker(args.broker), SystemClock()
    tp = TopicPartition(source, 0)
    task = PartitionState(broker, session, tp, {}, None, WorkerOptions(), BlockingPool(), clock, "benchmark")
    await broker.start()
    try:
        await broker.create_topics([TopicSpec(source, 1, {}), TopicSpec(changelog.topic, 1, CHANGELOG_CONFIG)])
        producer = broker.transactional_producer(f"{session.group}/{source}/0")
        await producer.start()
        for begin in range(0, args.records, PER_COMMIT):
            end, now = min(begin + PER_COMMIT, args.records), clock.now_ms()
            records = [Outgoing(key_of(i), value_of(i), now) for i in range(begin, end)]
            effects = Effects()
            effects.rows = end - begin
            records += task.records({}, effects, Committed(end), stopped=True)
            await producer.begin()
            await (await producer.send(changelog, records))
            await producer.commit_offsets(session.group, {tp: Committed(end)})
            await producer.end()
        await producer.close()
    finally:
        await broker.close()


async def clean_up(args: argparse.Namespace) -> None:
    from rowmill.streams.brokers.open import open_broker

    broker = open_broker(args.broker)
    await broker.start()
    try:
        await broker.delete_topics([topic for topic in await broker.topics() if args.name in topic])
        await broker.delete_groups([group for group in await broker.groups() if args.name in group])
    finally:
        await broker.close()


# --- one run, in a process of its own --------------------------------------------------------------------------------


def run_child(args: argparse.Namespace) -> dict[str, Any]:
    return asyncio.run(restore_with_rowmill(args) if args.child == "rowmill" else restore_bare(args))


class Watch:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def stop(self) -> dict[str, float]:
        return {"seconds": time.monotonic() - self._wall, "cpu": time.process_time() - self._cpu}


async def restore_with_rowmill(args: argparse.Namespace) -> dict[str, Any]:
    """What a partition task does when it was assigned a partition and finds no store."""
    from rowmill.handlers.executors import BlockingPool
    from rowmill.state.clock import SystemClock
    from rowmill.state.model import TopicPartition
    from rowmill.state.rocksdb import RocksStores
    from rowmill.state.table import TableSpec
    from rowmill.streams.brokers.open import open_broker
    from rowmill.streams.options import WorkerOptions
    from rowmill.streams.partition_state import PartitionState
    from rowmill.streams.session import Session

    clock, session, pool = SystemClock(), Session(args.name), BlockingPool()
    tp = TopicPartition(f"{args.name}.{TOPIC}", 0)
    stores = RocksStores(args.folder, cache_bytes=WorkerOptions().table_cache_bytes)
    broker = open_broker(args.broker)
    await broker.start()
    try:
        committed = (await broker.committed(session.group, [tp]))[tp]
        specs = {"counts": TableSpec("counts")}
        state = PartitionState(broker, session, tp, specs, stores, WorkerOptions(), pool, clock, "benchmark")
        watch = Watch()
        await state.open(committed)
        taken = watch.stop()
        if state.tables is None or state.counts["rows"] != args.records:
            raise SystemExit(f"the checkpoint says {state.counts['rows']:,} rows")
        check(args, [(key, value[8:]) for key, value in state.tables.scan(PREFIX)])
        await state.close()
    finally:
        await broker.close()
        stores.close()
        pool.close()
    return taken


async def restore_bare(args: argparse.Namespace) -> dict[str, Any]:
    """Fetch, put, write, until the position is the end: no time stamps, no position of the store, no checks."""
    from rocksdict import Cache, Rdict, WriteBatch, WriteBufferManager
    from rowmill.state.rocksdb import _options
    from rowmill.streams.options import WorkerOptions

    size = WorkerOptions().table_cache_bytes
    cache = Cache(size)
    options = _options(cache, WriteBufferManager.new_write_buffer_manager_with_cache(size // 2, False, cache))
    open_reader = bare_kafka if args.broker.startswith("kafka:") else bare_local
    async with open_reader(args) as start:
        watch = Watch()
        db = Rdict(str(args.folder), options, {"default": options})
        fetch, position, end = await start()
        while await position() < end:
            records = await fetch()
            for begin in range(0, len(records), BARE_BATCH):
                batch = WriteBatch(raw_mode=True)
                for record in records[begin : begin + BARE_BATCH]:
                    if record.value is None:
                        batch.delete(record.key)
                    else:
                        batch.put(record.key, record.value)
                db.write(batch)
        taken = watch.stop()
    entries, cursor = [], db.iter()
    cursor.seek(PREFIX)
    while cursor.valid() and cursor.key().startswith(PREFIX):
        entries.append((cursor.key(), cursor.value()))
        cursor.next()
    cursor.status()
    del cursor
    check(args, entries)
    db.close()
    return taken


Fetch = Callable[[], Awaitable[Sequence[Any]]]
Start = Callable[[], Awaitable[tuple[Fetch, Callable[[], Awaitable[int]], int]]]


@contextlib.asynccontextmanager
async def bare_kafka(args: argparse.Namespace) -> Any:
    import aiokafka
    from rowmill.streams.session import Session

    tp = aiokafka.TopicPartition(Session(args.name).changelog(f"{args.name}.{TOPIC}"), 0)
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=args.broker.partition("://")[2],
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )

    async def start() -> tuple[Fetch, Callable[[], Awaitable[int]], int]:
        await consumer.start()
        consumer.assign([tp])
        consumer.seek(tp, 0)
        end = (await consumer.end_offsets([tp]))[tp]

        async def fetch() -> Sequence[Any]:
            records: Sequence[Any] = (await consumer.getmany(tp, timeout_ms=1000)).get(tp, ())
            return records

        return fetch, lambda: consumer.position(tp), end

    try:
        yield start
    finally:
        await consumer.stop()


@contextlib.asynccontextmanager
async def bare_local(args: argparse.Namespace) -> Any:
    """The embedded broker has no client below ours: its own reader, then."""
    from rowmill.state.model import TopicPartition
    from rowmill.streams.brokers.open import open_broker
    from rowmill.streams.session import Session

    tp = TopicPartition(Session(args.name).changelog(f"{args.name}.{TOPIC}"), 0)
    broker = open_broker(args.broker)
    await broker.start()
    reader = broker.reader()

    async def start() -> tuple[Fetch, Callable[[], Awaitable[int]], int]:
        await reader.start({tp: 0})
        end = (await broker.offsets([tp], "end"))[tp]

        async def fetch() -> Sequence[Any]:
            return (await reader.fetch([tp], 10_000, 1)).get(tp, ())

        return fetch, lambda: reader.position(tp), end

    try:
        yield start
    finally:
        await reader.close()
        await broker.close()


def check(args: argparse.Namespace, entries: Sequence[tuple[bytes, bytes]]) -> None:
    found = dict(entries)
    if len(found) != args.records or len(entries) != args.records:
        raise SystemExit(f"restored {len(found):,} of {args.records:,} keys")
    for number in range(0, args.records, SAMPLE):
        if found[key_of(number)] != value_of(number):
            raise SystemExit(f"{key_of(number)!r}: {found[key_of(number)]!r}, not {value_of(number)!r}")


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> int:
    print(f"{'':8}{'records/s':>12}{'s':>8}{'cpu s':>8}  load")
    seen: dict[str, list[dict[str, float]]] = {"rowmill": [], "bare": []}
    for number in range(args.rounds):
        for kind in ("rowmill", "bare") if number % 2 else ("bare", "rowmill"):
            taken = spawn(args, kind)
            seen[kind].append(taken)
            rate, load = args.records / taken["seconds"], os.getloadavg()[0]
            print(f"{kind:8}{rate:12,.0f}{taken['seconds']:8.2f}{taken['cpu']:8.2f}  {load:.1f}", flush=True)
    wall = {kind: median(run["seconds"] for run in runs) for kind, runs in seen.items()}
    cpu = {kind: median(run["cpu"] for run in runs) for kind, runs in seen.items()}
    for kind, seconds in wall.items():
        print(f"median, {kind}: {args.records / seconds:,.0f} records/s, {cpu[kind]:.2f} s of processor time")
    ratio = wall["bare"] / wall["rowmill"]
    pairs = [bare["seconds"] / ours["seconds"] for bare, ours in zip(seen["bare"], seen["rowmill"], strict=True)]
    print(f"processor time: {cpu['bare'] / cpu['rowmill']:.2f} of the bare loop's rate")
    print(f"ratio by pairs: median {median(pairs):.2f}, from {min(pairs):.2f} to {max(pairs):.2f}")
    print(f"rowmill restores at {ratio:.2f} of the bare loop's rate (goal: {GOAL}; medians of {args.rounds} runs each)")
    return 0 if ratio >= GOAL else 1


def spawn(args: argparse.Namespace, kind: str) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="rowmill-restore-"))
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, "--broker", args.broker]
    command += ["--name", args.name, "--folder", str(folder / "store"), "--records", str(args.records)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
