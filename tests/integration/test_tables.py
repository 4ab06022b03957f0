"""Tables, context and restore on real brokers: through kills, lost and broken folders, and groups that forget."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rowmill import CheckpointError, Pipeline, Session, TopicError, Worker, WorkerOptions, open_broker, publish, read
from rowmill.state.clock import SystemClock
from rowmill.state.codec import loads
from rowmill.state.model import TopicPartition
from rowmill.state.rocksdb import RocksStores
from rowmill.streams.brokers.base import Broker
from rowmill.streams.contexts import session_context

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
PIPELINES = Path(__file__).parents[1] / "support" / "pipelines.py"

pytestmark = pytest.mark.timeout(180)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    """A started broker."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


async def to_the_end(url: str, pipeline: Pipeline, folder: Path, **options: Any) -> Worker:
    """Run a worker until everything published so far is committed."""
    async with opened(url) as broker:
        count = (await broker.topics())[pipeline.sources[0]].partitions
        tps = [TopicPartition(pipeline.sources[0], partition) for partition in range(count)]
        worker = Worker(pipeline, broker, options=WorkerOptions(state_dir=str(folder), **options))
        worker.finish_at(await broker.offsets(tps, "high_watermark"))
        async with asyncio.timeout(90):
            await worker.run()
        return worker


def counting(name: str) -> Pipeline:
    """Numbers the rows of each key, reading back what it wrote."""
    pipeline = Pipeline(name, sink=f"{name}.out").table("counts")

    @pipeline.stage
    def number(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        table = ctx.table("counts")
        table.put(ctx.key, table.get(ctx.key, 0) + 1)
        return {**row, "number": table.get(ctx.key)}

    return pipeline


async def feed(url: str, topic: str, numbers: range) -> None:
    """Publish rows under eleven keys."""
    rows = [{"n": n, "key": f"k{n % 11}"} for n in numbers]
    await asyncio.to_thread(publish, topic, rows, broker=url, key="key")


async def rows_of(url: str, topic: str) -> list[dict[str, Any]]:
    """The rows of a topic, as far as committed."""
    return await asyncio.to_thread(lambda: [message.row for message in read(topic, broker=url)])


def check_numbered(rows: list[dict[str, Any]], expected: range) -> None:
    """Each row once, and each key's numbers without a gap, in order."""
    assert sorted(row["n"] for row in rows) == list(expected)
    by_key = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["n"]):
        by_key[row["key"]].append(row["number"])
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in by_key.values())


async def changelog_fold(url: str, pipeline: Pipeline) -> dict[str, Any]:
    """The tables as their changelog tells them: entries of equal name in several partitions are added up."""
    fold: dict[tuple[int, bytes], Any] = {}
    topic = Session(pipeline.name).changelog(pipeline.sources[0])
    for message in await asyncio.to_thread(lambda: list(read(topic, broker=url))):
        fold[message.partition, message.key or b""] = message.value
    totals: dict[str, Any] = defaultdict(int)
    for (_, key), value in fold.items():
        if value is not None and not key.startswith(b"."):
            totals[key.decode()] += loads(value)
    return dict(totals)


async def test_tables_go_on_where_they_were(broker_url: str, name: str, tmp_path: Path) -> None:
    """A second worker goes on counting where the first stopped: from its folder, and from the changelog alone."""
    pipeline = counting(name)
    for lap in range(3):
        await feed(broker_url, name, range(lap * 500, lap * 500 + 500))
        worker = await to_the_end(broker_url, pipeline, tmp_path / "state")
        assert worker.stats.results == 500
        if lap == 1:
            shutil.rmtree(tmp_path / "state")
    check_numbered(await rows_of(broker_url, f"{name}.out"), range(1_500))
    fold = await changelog_fold(broker_url, pipeline)
    assert sum(fold.values()) == 1_500
    assert len(fold) == 11


@pytest.mark.parametrize("how", ["cut", "flipped", "foreign"])
async def test_damaged_folders_are_restored(broker_url: str, name: str, tmp_path: Path, how: str) -> None:
    """A damaged or foreign store is found, set aside and restored; counting goes on without a slip."""
    pipeline, state = counting(name), tmp_path / "state"
    await feed(broker_url, name, range(500))
    await to_the_end(broker_url, pipeline, state)
    for file in [*state.rglob("*.sst"), *state.rglob("*.log")] if how != "foreign" else []:
        data = bytearray(file.read_bytes())
        if how == "flipped" and len(data) > 20:
            for place in range(10, len(data), 50):
                data[place] ^= 0x55
        file.write_bytes(data if how == "flipped" else data[: len(data) // 2])
    if how == "foreign":
        for mark in state.rglob("ROWMILL"):
            mark.unlink()
    await feed(broker_url, name, range(500, 1_000))
    await to_the_end(broker_url, pipeline, state)
    check_numbered(await rows_of(broker_url, f"{name}.out"), range(1_000))


async def test_a_store_ahead_of_the_broker(broker_url: str, name: str, tmp_path: Path) -> None:
    """A store that holds more than the changelog, as after a power cut under the broker, is restored from it."""
    pipeline, state = counting(name), tmp_path / "state"
    await feed(broker_url, name, range(500))
    await to_the_end(broker_url, pipeline, state)
    stores = RocksStores(state)
    for partition in range(12):
        store = stores.open(f"rowmill.{name}", TopicPartition(name, partition))
        store.write([(b"counts/k1", b"\0" * 8 + b"4711"), (b"\0position", (1 << 40).to_bytes(8, "big"))])
    stores.close()
    await feed(broker_url, name, range(500, 1_000))
    await to_the_end(broker_url, pipeline, state)
    check_numbered(await rows_of(broker_url, f"{name}.out"), range(1_000))


async def test_rows_that_fail_leave_no_trace(broker_url: str, name: str, tmp_path: Path) -> None:
    """Neither a row that raised, nor one whose result cannot be written, nor one whose update failed wrote anything."""
    pipeline = Pipeline(name, sink=f"{name}.out").table("t")

    @pipeline.stage
    def work(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        ctx.table("t").put(f"row-{row['n']}", row["n"])
        ctx.table("t").add("all")
        if row["n"] % 5 == 1:
            raise ValueError("no")
        if row["n"] % 5 == 2:
            return {"no json": object()}
        if row["n"] % 5 == 3:
            ctx.table("t").update("bad", lambda _: 1 / 0)
        if row["n"] % 5 == 4:
            ctx.emit("no such topic's name!", row)
        return row

    await feed(broker_url, name, range(100))
    worker = await to_the_end(broker_url, pipeline, tmp_path)
    assert (worker.stats.results, worker.stats.dead_letters) == (20, 80)
    fold = await changelog_fold(broker_url, pipeline)
    assert fold == {"t/all": 20} | {f"t/row-{n}": n for n in range(0, 100, 5)}


async def test_batches_and_ordering(broker_url: str, name: str, tmp_path: Path) -> None:
    """Batch stages and chains of several segments keep a key's rows apart, so that none misses another's write."""
    pipeline = Pipeline(name, sink=f"{name}.out").table("counts")

    @pipeline.stage(batch=7)
    def number(rows: list[dict[str, Any]], contexts: list[Any]) -> list[dict[str, Any]]:
        done = []
        for row, ctx in zip(rows, contexts, strict=True):
            table = ctx.table("counts")
            table.put(ctx.key, table.get(ctx.key, 0) + 1)
            done.append({**row, "number": table.get(ctx.key)})
        return done

    @pipeline.stage
    async def rest(row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.001)
        return row

    await feed(broker_url, name, range(300))
    await to_the_end(broker_url, pipeline, tmp_path)
    check_numbered(await rows_of(broker_url, f"{name}.out"), range(300))


@pytest.mark.parametrize("ordering", ["key", "partition", "none"])
async def test_context_is_exact(broker_url: str, name: str, tmp_path: Path, ordering: Any) -> None:
    """The session's context counts rows, failures, drops, cost and tokens of all its workers' lives."""
    pipeline = Pipeline(name, sink=f"{name}.out", ordering=ordering)

    @pipeline.stage(concurrency=4)
    async def work(row: dict[str, Any], ctx: Any) -> Any:
        ctx.add_cost(Decimal("0.1"), tokens=2)
        if row["n"] % 10 == 1:
            raise ValueError("no")
        return None if row["n"] % 10 == 2 else [row, row]

    for lap in range(2):
        await feed(broker_url, name, range(lap * 100, lap * 100 + 100))
        await to_the_end(broker_url, pipeline, tmp_path)
    await feed(broker_url, name, range(50))
    async with opened(broker_url) as broker:
        context = await session_context(broker, Session(name), [name], 10, SystemClock())
    assert context is not None
    assert (context.processed_rows, context.failed_rows, context.dropped_rows) == (160, 20, 20)
    assert (context.accumulated_cost, context.accumulated_tokens) == (Decimal("20.0"), 400)
    assert context.total_rows == 250
    assert context.get_progress() == 80.0


async def test_run_tells_what_it_cost(broker_url: str, name: str) -> None:
    """A bounded run reports the cost of its rows, and leaves no trace of its tables behind."""
    pipeline = Pipeline(name, sink=f"{name}.out").table("t")

    @pipeline.stage
    def work(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        ctx.add_cost(Decimal("0.25"), tokens=2)
        ctx.table("t").add("n")
        return row

    rows = [{"n": n} for n in range(40)]
    result = await pipeline.run_async(rows, broker=broker_url)
    assert (result.costs.total_cost, result.costs.total_tokens, result.costs.rows) == (Decimal("10.00"), 80, 40)
    async with opened(broker_url) as broker:
        assert [topic for topic in await broker.topics() if name in topic] == []
        left = [] if broker.folder is None else [p for p in (broker.folder / "state").rglob("*") if name in p.name]
    assert left == []
    streamed = await asyncio.to_thread(_streamed_costs, pipeline, rows, broker_url)
    assert streamed == (Decimal("10.00"), 80)


def _streamed_costs(pipeline: Pipeline, rows: list[dict[str, Any]], url: str) -> tuple[Decimal, int]:
    stream = pipeline.stream(rows, chunk_size=15, broker=url)
    for _ in stream:
        pass
    costs = stream.finalize().costs
    return costs.total_cost, costs.total_tokens


async def lost_offset(url: str, pipeline: Pipeline, folder: Path) -> str:
    """The error of a worker that is refused; "" when it came to the end."""
    try:
        await to_the_end(url, pipeline, folder)
    except CheckpointError as error:
        return str(error)
    return ""


async def test_a_group_that_forgot_its_offsets(broker_url: str, name: str, tmp_path: Path) -> None:
    """Offsets that expired or were deleted are told, with the changelog's position: nothing starts over silently.

    The command that the error names puts them back, on either broker.
    """
    pipeline = counting(name)
    await feed(broker_url, name, range(100))
    await to_the_end(broker_url, pipeline, tmp_path)
    async with opened(broker_url) as broker:
        await broker.delete_groups([f"rowmill.{name}"])
    await feed(broker_url, name, range(100, 110))
    mended = 0
    while why := await lost_offset(broker_url, pipeline, tmp_path):  # one partition after the other
        told = re.search(r"no committed offset.*knows a checkpoint at .*`rowmill (replay .* --execute)`", why)
        assert told is not None, why
        assert mended or len(await rows_of(broker_url, f"{name}.out")) == 100
        mended += 1
        command = [ROWMILL, *told[1].split(), "--broker", broker_url]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    assert mended
    check_numbered(await rows_of(broker_url, f"{name}.out"), range(110))


async def test_a_topic_made_anew(broker_url: str, name: str, tmp_path: Path) -> None:
    """A source that was deleted and made again under its name is recognised: its old position means nothing."""
    pipeline = counting(name)
    await feed(broker_url, name, range(200))
    await to_the_end(broker_url, pipeline, tmp_path)
    async with opened(broker_url) as broker:
        count = (await broker.topics())[name].partitions
        committed = await broker.committed(f"rowmill.{name}", [TopicPartition(name, p) for p in range(count)])
        await broker.delete_topics([name])
        await feed(broker_url, name, range(1_000, 1_400))
        # A group forgets the offsets of a topic that is deleted, which is told as well; here somebody puts them back.
        producer = broker.transactional_producer(f"{name}-reset")
        try:
            await producer.start()
            await producer.begin()
            await producer.commit_offsets(f"rowmill.{name}", {tp: c for tp, c in committed.items() if c})
            await producer.end()
            await producer.start()  # Kafka shows a commit only some time after it was answered
        finally:
            await producer.close()
    with pytest.raises(CheckpointError, match="deleted and made anew"):
        await to_the_end(broker_url, pipeline, tmp_path)


async def test_a_source_that_grew(kafka: str, name: str, tmp_path: Path) -> None:
    """New partitions of the source are worked on; a pipeline with tables says that its tables would not fit."""
    url = f"kafka://{kafka}"
    plain = Pipeline(name, sink=f"{name}.out").add(lambda row: row, name="same")
    counts = counting(f"{name}-t")
    for topic in (name, f"{name}-t"):
        await feed(url, topic, range(100))
    await to_the_end(url, plain, tmp_path)
    await to_the_end(url, counts, tmp_path)
    async with opened(url) as broker:
        for topic in (name, f"{name}-t"):
            await broker.grow_topic(topic, 8)
    for topic in (name, f"{name}-t"):
        await feed(url, topic, range(100, 200))
    await to_the_end(url, plain, tmp_path)
    assert sorted(row["n"] for row in await rows_of(url, f"{name}.out")) == list(range(200))
    with pytest.raises(TopicError, match="the source has grown"):
        await to_the_end(url, counts, tmp_path)


async def test_at_least_once(broker_url: str, name: str, tmp_path: Path) -> None:
    """Nothing is lost through crashes, results go out before offsets are committed, and tables keep working."""
    pipeline = Pipeline(name, sink=f"{name}.out").table("counts")

    @pipeline.stage(concurrency=8)
    async def work(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        await asyncio.sleep(0.002)
        ctx.table("counts").add("all")
        return row

    await feed(broker_url, name, range(600))
    options = WorkerOptions(guarantee="at_least_once", state_dir=str(tmp_path), commit_interval=0.2)
    for _ in range(3):
        async with opened(broker_url) as broker:
            crashing = asyncio.create_task(Worker(pipeline, broker, options=options).run())
            await asyncio.sleep(0.8)
            crashing.cancel()
            await asyncio.wait({crashing})
    worker = await to_the_end(broker_url, pipeline, tmp_path, guarantee="at_least_once")
    found = [row["n"] for row in await rows_of(broker_url, f"{name}.out")]
    assert set(found) == set(range(600))
    assert (await changelog_fold(broker_url, pipeline))["counts/all"] >= 600
    assert worker.stats.dead_letters == 0


async def test_at_least_once_is_quick(broker_url: str, name: str, tmp_path: Path) -> None:
    """Results are visible long before the commit interval is over."""
    pipeline = Pipeline(name, sink=f"{name}.out").add(lambda row: row, name="same")
    await feed(broker_url, name, range(10))
    options = WorkerOptions(guarantee="at_least_once", state_dir=str(tmp_path), commit_interval=3_600)
    async with opened(broker_url) as broker:
        worker = Worker(pipeline, broker, options=options)
        running = asyncio.create_task(worker.run())
        async with asyncio.timeout(30):
            for wave in (10, 20, 30):
                while len(await rows_of(broker_url, f"{name}.out") if worker.stats.results else []) < wave:
                    await asyncio.sleep(0.05)
                await feed(broker_url, name, range(wave, wave + 10))
        tps = [TopicPartition(name, partition) for partition in range(4)]
        committed = await broker.committed(f"rowmill.{name}", tps)
        assert {c.offset for c in committed.values() if c} <= {0}, "nothing but where it began"
        worker.stop()
        await running
        committed = await broker.committed(f"rowmill.{name}", tps)
        assert sum(c.offset for c in committed.values() if c) > 0


def start(pipeline: str, url: str, environment: dict[str, str], folder: Path, deaths: int) -> subprocess.Popen[str]:
    """A worker process that buries a row after so many deaths."""
    words = [ROWMILL, "-q", "worker", f"{PIPELINES}:{pipeline}", "--broker", url, "--state-dir", str(folder)]
    words += ["--max-deaths", str(deaths)]
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


async def test_killed_again_and_again(broker_url: str, name: str, tmp_path: Path) -> None:
    """SIGKILL amid rows that read and write tables: numbers, totals, context and changelog are exact in the end."""
    seed = int(os.environ.get("ROWMILL_TEST_SEED", random.randrange(1 << 30)))
    chance = random.Random(seed)
    source, rows = f"{name}-counted", 1_500
    environment = {**os.environ, "ROWMILL_TEST_NAME": name}
    await feed(broker_url, source, range(rows))
    for _ in range(6):
        process = start("counted", broker_url, environment, tmp_path / "state", 0)
        try:
            await asyncio.sleep(1.2 + chance.random() * 1.2)
        finally:
            process.kill()
            process.communicate(timeout=30)
        if chance.random() < 0.2:
            shutil.rmtree(tmp_path / "state", ignore_errors=True)
    pipeline = _counted(name)
    await to_the_end(broker_url, pipeline, tmp_path / "state", max_deaths=1_000)
    good = [n for n in range(rows) if n % 13]
    found = await rows_of(broker_url, f"{source}.out")
    assert sorted(row["n"] for row in found) == good, f"seed {seed}"
    by_key = defaultdict(list)
    for row in found:
        by_key[row["key"]].append((row["n"], row["number"]))
    for numbers in by_key.values():
        assert [number for _, number in sorted(numbers)] == list(range(1, len(numbers) + 1)), f"seed {seed}"
    fold = await changelog_fold(broker_url, pipeline)
    assert fold == {"counts/all": len(good)} | {f"counts/{key}": len(n) for key, n in by_key.items()}, f"seed {seed}"
    async with opened(broker_url) as broker:
        context = await session_context(broker, Session(pipeline.name), [source], 10, SystemClock())
    assert context is not None
    assert (context.processed_rows, context.failed_rows) == (len(good), rows - len(good)), f"seed {seed}"
    assert (context.accumulated_cost, context.accumulated_tokens) == (rows * Decimal("0.1"), rows * 3), f"seed {seed}"


def _counted(name: str) -> Pipeline:
    """The pipeline of that name in ``pipelines.py``, in this process."""
    import importlib.util

    os.environ["ROWMILL_TEST_NAME"] = name
    try:
        spec = importlib.util.spec_from_file_location("pipelines_under_test", PIPELINES)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del os.environ["ROWMILL_TEST_NAME"]
    found: Pipeline = module.counted
    return found


@pytest.mark.parametrize("kind", ["deadly", "plain"])
async def test_a_row_that_kills_the_process(broker_url: str, name: str, tmp_path: Path, kind: str) -> None:
    """A row that ends its process each time is a dead letter after three watched deaths; no other is."""
    environment = {**os.environ, "ROWMILL_TEST_NAME": name, "ROWMILL_TEST_CALLS": str(tmp_path / "calls")}
    source = f"{name}-{kind}"
    await feed(broker_url, source, range(60))
    deaths = 0
    for _ in range(6):
        process = start(
            "deadly" if kind == "deadly" else "deadly_plain", broker_url, environment, tmp_path / "state", 3
        )
        try:
            code = await _ended_or_done(process, broker_url, source, 60)
        finally:
            process.kill()
            process.communicate(timeout=30)
        deaths += code == 9
        if code is None:
            break
    assert sorted(row["n"] for row in await rows_of(broker_url, f"{source}.out")) == [n for n in range(60) if n != 13]
    letters = await asyncio.to_thread(lambda: list(read(f"{source}.dlq", broker=broker_url)))
    assert [letter.row["n"] for letter in letters] == [13]
    headers = dict(letters[0].headers)
    assert (headers["rowmill.error.stage"], headers["rowmill.error.type"]) == (b"process", b"process_died")
    assert headers["rowmill.error.attempts"] == b"3"
    assert deaths == 4, "one before anybody looked, and three"
    assert (tmp_path / "calls").read_text().split().count("13") == 4


async def _ended_or_done(process: subprocess.Popen[str], url: str, source: str, rows: int) -> int | None:
    """The exit code of a process that died; None once all rows are results or dead letters."""
    async with asyncio.timeout(60):
        while True:
            if process.poll() is not None:
                return process.returncode
            done = 0
            for topic in (f"{source}.out", f"{source}.dlq"):
                with suppress(TopicError):
                    done += len(await rows_of(url, topic))
            if done >= rows:
                return None
            await asyncio.sleep(0.2)
