"""The worker on real brokers: plain clients in and out, workers that come and go, brokers that fail."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiokafka
import orjson
import pytest
from rowmill import GroupBusyError, Pipeline, Session, StalledError, Worker, WorkerOptions, open_broker, publish, read
from rowmill.state.model import TopicPartition
from support.kafka_server import KafkaServer

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
PIPELINES = Path(__file__).parents[1] / "support" / "pipelines.py"


def simple(name: str) -> Pipeline:
    """Doubles a number."""
    return Pipeline(name, source=name, sink=f"{name}.out").add(
        lambda row: {**row, "twice": row["n"] * 2}, name="double"
    )


@asynccontextmanager
async def running(url: str, pipeline: Pipeline, **options: Any) -> AsyncIterator[Worker]:
    """A worker at work for as long as the block lasts; it must end well."""
    broker = open_broker(url, environment={})
    await broker.start()
    worker = Worker(pipeline, broker, options=WorkerOptions(**options))
    task = asyncio.create_task(worker.run())
    task.add_done_callback(lambda _: _ENDED.append(worker))
    try:
        yield worker
    finally:
        worker.stop()
        try:
            async with asyncio.timeout(60):
                await task
        finally:
            _ENDED.clear()
            await broker.close()


_ENDED: list[Worker] = []
"""Workers that ended by themselves, which nobody should wait for."""


async def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something that a worker brings about, as long as all workers live."""
    async with asyncio.timeout(seconds):
        while not condition():
            if _ENDED:
                return  # running() raises what it ended with
            await asyncio.sleep(0.05)


async def results(url: str, topic: str) -> list[dict[str, Any]]:
    """The rows of a topic."""
    return await asyncio.to_thread(lambda: [message.row for message in read(topic, broker=url)])


async def test_plain_json_in_and_out(kafka: str, name: str) -> None:
    """A bare Kafka client publishes plain JSON and reads plain JSON: nothing of rowmill is needed at either end."""
    async with running(f"kafka://{kafka}", simple(name)) as worker:
        await until(lambda: worker.stats.partitions or worker._tasks)
        producer = aiokafka.AIOKafkaProducer(bootstrap_servers=kafka)
        await producer.start()
        for n in range(50):
            await producer.send_and_wait(name, b'{"n": %d}' % n, key=b"key-%d" % n)
        await producer.stop()
        consumer = aiokafka.AIOKafkaConsumer(
            f"{name}.out", bootstrap_servers=kafka, auto_offset_reset="earliest", isolation_level="read_committed"
        )
        await consumer.start()
        found: dict[bytes, Any] = {}
        async with asyncio.timeout(30):
            while len(found) < 50:
                record = await consumer.getone()
                found[record.key] = orjson.loads(record.value)
        await consumer.stop()
    assert found == {b"key-%d" % n: {"n": n, "twice": n * 2} for n in range(50)}


async def test_a_worker_goes_on_where_the_last_one_stopped(broker_url: str, name: str) -> None:
    """Stopped and started again, the live session runs each row once."""
    pipeline = simple(name)
    for round_ in range(3):
        rows = [{"n": n} for n in range(round_ * 1_000, round_ * 1_000 + 1_000)]
        await asyncio.to_thread(publish, name, rows, broker=broker_url)
        async with running(broker_url, pipeline) as worker:
            stats = worker.stats
            while stats.rows < 1_000:
                await asyncio.sleep(0.05)
        assert stats.rows == 1_000
    assert sorted(row["n"] for row in await results(broker_url, f"{name}.out")) == list(range(3_000))


async def test_a_second_worker_of_an_embedded_group_is_refused(tmp_path: Path, name: str) -> None:
    """On the embedded broker one worker serves a group; another is told so, with the remedy."""
    url = f"local://{tmp_path}"
    async with running(url, simple(name)) as worker:
        await until(lambda: worker._tasks)
        with pytest.raises(GroupBusyError, match="kafka://"):
            async with running(url, simple(name)) as second:
                await until(lambda: second._tasks)


async def test_a_pipeline_that_starts_at_the_end(broker_url: str, name: str) -> None:
    """With start="latest" a first worker leaves what was there before it alone."""
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(100)], broker=broker_url)
    pipeline = Pipeline(name, sink=f"{name}.out", start="latest").add(lambda row: row, name="same")
    async with running(broker_url, pipeline) as worker:
        await until(lambda: worker._tasks and all(task.running for task in worker._tasks.values()))
        await asyncio.to_thread(publish, name, [{"n": 1_000}], broker=broker_url)
        await until(lambda: worker.stats.rows)
    assert await results(broker_url, f"{name}.out") == [{"n": 1_000}]


@pytest.mark.timeout(180)
async def test_workers_that_come_go_and_are_killed(kafka: str, name: str, tmp_path: Path) -> None:
    """While workers join, leave and are killed, every row gives one result, and each key keeps its order."""
    url, calls = f"kafka://{kafka}", tmp_path / "calls"
    rows = [{"n": n, "key": f"k{n % 40}"} for n in range(16_000)]
    await asyncio.to_thread(publish, name, rows, broker=url, key="key")
    environment = {**os.environ, "ROWMILL_TEST_NAME": name, "ROWMILL_TEST_CALLS": str(calls)}
    command = [ROWMILL, "worker", f"{PIPELINES}:doubled", "--broker", url, "--max-deaths", "0"]
    workers = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)]
    try:
        await until(lambda: calls.exists() and calls.stat().st_size > 500)
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        await asyncio.sleep(2.5)
        workers[0].kill()
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        await asyncio.sleep(2.5)
        workers[1].send_signal(signal.SIGTERM)
        async with asyncio.timeout(100):
            found: list[dict[str, Any]] = []
            while len(found) < len(rows):
                await asyncio.sleep(1)
                found = await results(url, f"{name}.out")
    finally:
        for worker in {*workers} - {workers[min(1, len(workers) - 1)]}:  # it got its signal; a second one is "at once"
            worker.send_signal(signal.SIGTERM)
        codes = [worker.wait(timeout=60) for worker in workers]
    found = await results(url, f"{name}.out")
    assert Counter(row["n"] for row in found) == Counter(range(16_000))
    by_key = defaultdict(list)
    for row in found:
        by_key[row["key"]].append(row["n"])
    assert all(numbers == sorted(numbers) for numbers in by_key.values())
    assert codes == [-signal.SIGKILL, 0, 0]


@pytest.mark.timeout(120)
async def test_a_fenced_worker_rejoins(kafka: str, name: str) -> None:
    """A worker whose producer id is taken drops the partition, joins again and goes on; nothing is lost or doubled."""
    url = f"kafka://{kafka}"
    pipeline = simple(name)
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(500)], broker=url)
    async with running(url, pipeline) as worker:
        await until(lambda: worker.stats.rows >= 500)
        intruder = open_broker(url, environment={})
        await intruder.start()
        taken = intruder.transactional_producer(Session(name).transactional_id(TopicPartition(name, 0)))
        await taken.start()
        await taken.close()
        await intruder.close()
        await asyncio.to_thread(publish, name, [{"n": n} for n in range(500, 2_000)], broker=url)
        await until(lambda: worker.stats.rows >= 2_000)
    assert Counter(row["n"] for row in await results(url, f"{name}.out")) == Counter(range(2_000))


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_broker_that_is_killed_and_comes_back(kafka_server: Callable[..., KafkaServer], name: str) -> None:
    """A worker outlives its broker: after SIGKILL and restart it goes on, with exact output."""
    server = await asyncio.to_thread(kafka_server)
    url = f"kafka://{server.bootstrap}"
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(3_000)], broker=url)
    slow = Pipeline(name, source=name, sink=f"{name}.out")

    @slow.stage
    async def wait(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] % 10 == 0:
            await asyncio.sleep(0.005)
        return row

    async with running(url, slow, broker_timeout=5.0, fetch_rows=200) as worker:
        await until(lambda: worker.stats.rows > 300)
        await asyncio.to_thread(server.restart, crash=True)
        await asyncio.to_thread(publish, name, [{"n": n} for n in range(3_000, 4_000)], broker=url)
        await until(lambda: worker.stats.rows >= 4_000, 90)
    assert Counter(row["n"] for row in await results(url, f"{name}.out")) == Counter(range(4_000))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_broker_whose_disk_fills_up(kafka_server: Callable[..., KafkaServer], name: str) -> None:
    """Kafka cannot write any more: the worker gives up with a reason after stall_timeout; later it goes on, exact."""
    server = await asyncio.to_thread(kafka_server)
    url = f"kafka://{server.bootstrap}"
    grow = Pipeline(name, source=name, sink=f"{name}.out").add(lambda row: {**row, "pad": "x" * 2_000}, name="grow")
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(1_000)], broker=url)

    async def until_stalled() -> None:
        async with running(url, grow, broker_timeout=3.0, stall_timeout=8.0) as worker:
            await until(lambda: worker.stats.rows >= 1_000)
            # No file may pass 1 MB: to the broker that is a full disk, and a broker without a log folder stops.
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
            await asyncio.to_thread(publish, name, [{"n": n} for n in range(1_000, 6_000)], broker=url)
            await until(lambda: False, 90)

    with pytest.raises(StalledError, match=r"restart goes on|no progress"):
        await until_stalled()
    await asyncio.to_thread(server.restart, crash=True)
    ends = await source_ends(url, name)
    async with running(url, grow) as worker:
        await until(lambda: worker.has_committed(ends), 90)
    assert Counter(row["n"] for row in await results(url, f"{name}.out")) == Counter(range(6_000))


async def source_ends(url: str, topic: str) -> dict[TopicPartition, int]:
    """The end of everything that was published."""
    broker = open_broker(url, environment={})
    await broker.start()
    count = (await broker.topics())[topic].partitions
    ends = await broker.offsets([TopicPartition(topic, p) for p in range(count)], "high_watermark")
    await broker.close()
    return ends


FULL = """
import asyncio, resource, sys
from rowmill import Pipeline, Worker, WorkerOptions, open_broker
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
name = sys.argv[2]
grow = Pipeline(name, source=name, sink=name + ".out").add(lambda row: {**row, "pad": "x" * 2_000}, name="grow")
async def main():
    broker = open_broker(sys.argv[1])
    await broker.start()
    try:
        await Worker(grow, broker, options=WorkerOptions(stall_timeout=2.0)).run()
    finally:
        await broker.close()
asyncio.run(main())
"""


async def test_an_embedded_disk_that_fills_up(tmp_path: Path, name: str) -> None:
    """Where the embedded broker cannot grow the worker says so and ends; with room again the output is exact."""
    url = f"local://{tmp_path / 'broker'}"
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(3_000)], broker=url)
    full = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", FULL, url, name, "1500000"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert full.returncode == 1
    assert "StalledError" in full.stderr
    assert "free space" in full.stderr
    grow = Pipeline(name, source=name, sink=f"{name}.out").add(lambda row: {**row, "pad": "x" * 2_000}, name="grow")
    ends = await source_ends(url, name)
    async with running(url, grow) as worker:
        await until(lambda: worker.has_committed(ends))
    assert Counter(row["n"] for row in await results(url, f"{name}.out")) == Counter(range(3_000))


async def test_topics_of_several_sources(broker_url: str, name: str) -> None:
    """A pipeline may read several topics; a row's results tell which one it came from."""
    pipeline = Pipeline(name, source=[f"{name}.a", f"{name}.b"], sink=f"{name}.out").add(lambda row: row, name="same")
    for which in "ab":
        await asyncio.to_thread(publish, f"{name}.{which}", [{"from": which}] * 10, broker=broker_url)
    async with running(broker_url, pipeline) as worker:
        await until(lambda: worker.stats.rows >= 20)
    messages = await asyncio.to_thread(lambda: list(read(f"{name}.out", broker=broker_url)))
    sources = Counter(
        (m.row["from"], (dict(m.headers)["rowmill.source"] or b"").split(b"/")[0].decode()) for m in messages
    )
    assert sources == {("a", f"{name}.a"): 10, ("b", f"{name}.b"): 10}
