"""Workers of one group on Apache Kafka that come and go: what stays goes on, what moves is handed over."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rowmill import Pipeline, Worker, WorkerOptions, open_broker, publish, read
from rowmill.state.model import TopicPartition
from rowmill.streams.brokers.base import TopicSpec

pytestmark = pytest.mark.timeout(120)


@asynccontextmanager
async def hired(url: str, pipeline: Pipeline, folder: Path, **options: Any) -> AsyncIterator[Worker]:
    """A worker with a connection of its own, at work for as long as the block lasts."""
    broker = open_broker(url, environment={})
    await broker.start()
    worker = Worker(pipeline, broker, options=WorkerOptions(state_dir=str(folder), **options))
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        try:
            async with asyncio.timeout(60):
                await running
        finally:
            await broker.close()


async def until(condition: Any, seconds: float = 40) -> None:
    """Wait for something that workers bring about."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def test_rows_in_work_outlive_a_rebalance(kafka: str, name: str, tmp_path: Path) -> None:
    """A worker joins and leaves: on partitions that stay with the first one, rows in work are not called again."""
    url, rows = f"kafka://{kafka}", 240
    calls: Counter[int] = Counter()
    where: dict[int, int] = {}
    gate = asyncio.Event()
    pipeline = Pipeline(name, sink=f"{name}.out").table("counts")

    @pipeline.stage(concurrency=rows)
    async def wait(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        calls[row["n"]] += 1
        where[row["n"]] = ctx.partition
        ctx.table("counts").add("rows")
        await gate.wait()
        return row

    await asyncio.to_thread(publish, name, [{"n": n, "k": f"k{n}"} for n in range(rows)], broker=url, key="k")
    async with hired(url, pipeline, tmp_path) as first:
        await until(lambda: len(calls) == rows)
        before = dict(first._tasks)
        async with hired(url, pipeline, tmp_path) as second:
            await until(lambda: len(second._tasks) == 3 and len(first._tasks) == 3)
            stayed = {tp.partition for tp, task in first._tasks.items() if before.get(tp) is task}
            assert len(stayed) == 3, "the partitions that stay keep their tasks"
            await until(lambda: all(calls[n] == 2 for n in range(rows) if where[n] not in stayed))
            gate.set()
        await until(lambda: len(first._tasks) == 6)
    assert all(calls[n] == 1 for n in range(rows) if where[n] in stayed)
    found = await asyncio.to_thread(lambda: [message.row["n"] for message in read(f"{name}.out", broker=url)])
    assert sorted(found) == list(range(rows))


async def test_hand_over_is_no_death(kafka: str, name: str, tmp_path: Path) -> None:
    """After an orderly hand-over the next owner has no suspicion: it does not begin its rows with care."""
    url = f"kafka://{kafka}"
    pipeline = Pipeline(name, sink=f"{name}.out").add(lambda row: row, name="same")
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(60)], broker=url)
    async with hired(url, pipeline, tmp_path) as first:
        await until(lambda: first.stats.rows == 60)
        async with hired(url, pipeline, tmp_path) as second:
            await until(lambda: len(second._tasks) == 3)
            assert not any(task._careful_rows for task in second._tasks.values())
        await until(lambda: len(first._tasks) == 6)
        assert not any(task._careful_rows for task in first._tasks.values())


async def test_a_zombie_writes_nothing(kafka: str, name: str, tmp_path: Path) -> None:
    """A task whose partition was taken over while it stood still commits nothing, and its tables learn of nothing."""
    url = f"kafka://{kafka}"
    pipeline = Pipeline(name, sink=f"{name}.out").table("counts")
    gate = asyncio.Event()

    @pipeline.stage(concurrency=50)
    async def wait(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        ctx.table("counts").add("rows")
        await gate.wait()
        return row

    await asyncio.to_thread(publish, name, [{"n": n} for n in range(30)], broker=url)
    async with hired(url, pipeline, tmp_path, max_deaths=0) as zombie:
        await until(lambda: len(zombie._tasks) == 6 and zombie._in_flight.rows == 30)
        # Somebody else starts the producers, as a new owner does: the zombie does not hear of it.
        broker = open_broker(url, environment={})
        await broker.start()
        for tp in list(zombie._tasks):
            producer = broker.transactional_producer(zombie.session.transactional_id(tp))
            await producer.start()
            await producer.close()
        member = zombie._member
        gate.set()
        await until(lambda: zombie._member not in {None, member})  # it was fenced, and joined again
        await until(lambda: zombie.stats.rows == 30)
        await broker.close()
    found = await asyncio.to_thread(lambda: [message.row["n"] for message in read(f"{name}.out", broker=url)])
    assert sorted(found) == list(range(30))
    counts: dict[Any, int] = {}
    for message in await asyncio.to_thread(lambda: list(read(f"rowmill.{name}.{name}.changelog", broker=url))):
        if message.key == b"counts/rows":
            counts[TopicPartition(message.topic, message.partition)] = int(message.value or 0)
    assert sum(counts.values()) == 30


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_many_partitions(kafka: str, name: str, tmp_path: Path) -> None:
    """A worker takes 48 partitions with tables, shares them with another one, and gets them back."""
    url, many, batch = f"kafka://{kafka}", 48, 960
    pipeline = Pipeline(name, sink=f"{name}.out").table("counts")

    @pipeline.stage
    async def count(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        ctx.table("counts").add("rows")
        return row

    broker = open_broker(url, environment={})
    await broker.start()
    await broker.create_topics([TopicSpec(name, many)])
    await broker.close()

    async def feed(turn: int) -> None:
        numbers = range(turn * batch, (turn + 1) * batch)
        await asyncio.to_thread(publish, name, [{"n": n, "k": f"k{n}"} for n in numbers], broker=url, key="k")

    def are_open(worker: Worker, count: int) -> bool:
        return len(worker._tasks) == count and all(task.running for task in worker._tasks.values())

    async with hired(url, pipeline, tmp_path) as first:
        await until(lambda: are_open(first, many), 60)
        await feed(0)
        async with hired(url, pipeline, tmp_path) as second:
            await until(lambda: are_open(first, many // 2) and are_open(second, many // 2), 60)
            await feed(1)
            await until(lambda: first.stats.rows + second.stats.rows == 2 * batch, 60)
        await until(lambda: are_open(first, many), 60)
        await feed(2)
        await until(lambda: first.stats.rows + second.stats.rows == 3 * batch, 60)
    found = await asyncio.to_thread(lambda: [message.row["n"] for message in read(f"{name}.out", broker=url)])
    assert sorted(found) == list(range(3 * batch))
    counts = {
        message.partition: int(message.value or 0)
        for message in await asyncio.to_thread(lambda: list(read(f"rowmill.{name}.{name}.changelog", broker=url)))
        if message.key == b"counts/rows"
    }
    assert (len(counts), sum(counts.values())) == (many, 3 * batch)
