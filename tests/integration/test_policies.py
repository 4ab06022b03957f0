"""Policies on real brokers: what becomes of rows, and exact counts of each way."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from rowmill import Pipeline, Session, StopExecution, WorkerOptions, open_broker, publish, read
from rowmill.handlers.retry import Retry
from rowmill.state.clock import SystemClock
from rowmill.state.context import ExecutionContext
from rowmill.streams.contexts import session_context
from rowmill.streams.errors import RowFailedError

from .test_worker import running, until


async def context_of(url: str, name: str) -> ExecutionContext:
    """What the live session has committed."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        found = await session_context(broker, Session(name), [name], 30, SystemClock())
    finally:
        await broker.close()
    assert found is not None
    return found


async def rows_of(url: str, topic: str) -> list[Any]:
    """A topic's rows."""
    return await asyncio.to_thread(lambda: [message.row for message in read(topic, broker=url)])


@pytest.mark.parametrize("ordering", ["key", "partition"])
async def test_every_row_ends_in_one_way(broker_url: str, name: str, ordering: Any) -> None:
    """Results, rows that were dropped, skipped, defaulted or failed: five counts, exact, and none is two of them."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out", ordering=ordering)
    tried: Counter[int] = Counter()

    @pipeline.stage(retry=Retry(3, first=0.01), concurrency=20)
    async def flaky(row: dict[str, Any]) -> dict[str, Any]:
        tried[row["n"]] += 1
        if row["n"] % 10 == 1 and tried[row["n"]] < 3:
            raise ConnectionError("not yet")
        return row

    @pipeline.stage(on_error="skip")
    def skips(row: dict[str, Any]) -> dict[str, Any]:
        return row if row["n"] % 10 != 2 else row["missing"]

    @pipeline.stage(fallback={"value": None}, when=lambda row: row["n"] % 10 == 3)
    def falls_back(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "value": 1 // 0}

    @pipeline.stage
    def last(row: dict[str, Any]) -> dict[str, Any] | None:
        if row["n"] % 10 == 4:
            raise ValueError("no")
        return None if row["n"] % 10 == 5 else row

    await asyncio.to_thread(publish, name, [{"n": n} for n in range(300)], broker=broker_url)
    async with running(broker_url, pipeline) as worker:
        await until(lambda: worker.stats.rows >= 300)
        stats = worker.stats
    assert (stats.results, stats.dropped, stats.skipped, stats.defaulted, stats.dead_letters) == (210, 30, 30, 30, 30)
    context = await context_of(broker_url, name)
    assert (context.processed_rows, context.dropped_rows, context.skipped_rows) == (210, 30, 30)
    assert (context.failed_rows, context.defaulted_rows, context.completed_rows) == (30, 30, 300)
    out = await rows_of(broker_url, f"{name}.out")
    assert sorted(row["n"] for row in out) == [n for n in range(300) if n % 10 not in {2, 4, 5}]
    assert all((row.get("value", 0) is None) == (row["n"] % 10 == 3) for row in out)
    assert sorted(row["n"] for row in await rows_of(broker_url, f"{name}.dlq")) == list(range(4, 300, 10))
    assert set(tried.values()) == {1, 3}


@pytest.mark.parametrize("kind", ["plain", "async", "partition"])
async def test_a_handler_ends_the_session(broker_url: str, name: str, kind: str) -> None:
    """StopExecution ends the worker in order; the row stays undone, and the next worker begins with it."""
    stopping = True
    done: list[int] = []

    def handle(row: dict[str, Any]) -> dict[str, Any]:
        if stopping and row["n"] == 150:
            raise StopExecution("the quota is used up")
        done.append(row["n"])
        return row

    async def handle_later(row: dict[str, Any]) -> dict[str, Any]:
        return handle(row)

    pipeline = Pipeline(name, source=name, sink=f"{name}.out", ordering="partition" if kind == "partition" else "key")
    pipeline.add(handle if kind == "plain" else handle_later, name="handle")
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(300)], broker=broker_url)
    broker = open_broker(broker_url, environment={})
    await broker.start()
    from rowmill import Worker

    worker = Worker(pipeline, broker)
    async with asyncio.timeout(60):
        stats = await worker.run()
    await broker.close()
    assert worker.stopped_by is not None
    assert (worker.stopped_by.stage, worker.stopped_by.message) == ("handle", "the quota is used up")
    assert stats.rows < 300
    assert stats.dead_letters == 0
    assert 150 not in {row["n"] for row in await rows_of(broker_url, f"{name}.out")}
    stopping = False
    async with running(broker_url, pipeline) as second:
        await until(lambda: second.stats.rows >= 300 - stats.rows)
    assert Counter(row["n"] for row in await rows_of(broker_url, f"{name}.out")) == Counter(range(300))


async def test_a_failure_that_ends_the_session(broker_url: str, name: str) -> None:
    """on_error="fail": the worker ends with the row's error, everything before it is committed, nothing is lost."""
    mended = False

    async def handle(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 50 and not mended:
            raise ValueError("bad day")
        return row

    pipeline = Pipeline(name, source=name, sink=f"{name}.out").add(handle, on_error="fail")
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(100)], broker=broker_url)
    with pytest.raises(RowFailedError, match="bad day"):
        async with running(broker_url, pipeline) as worker:
            await until(lambda: worker.stopped_by is not None)
    mended = True
    async with running(broker_url, pipeline) as second:
        await until(lambda: worker.stats.rows + second.stats.rows >= 100)
    assert Counter(row["n"] for row in await rows_of(broker_url, f"{name}.out")) == Counter(range(100))


async def test_a_bounded_run_that_is_stopped_and_gone_on_with(broker_url: str, name: str) -> None:
    """run() says why it stopped, what is done and what not; the same call with the session's name does the rest."""
    quota = 40

    async def handle(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal quota
        if not quota:
            raise StopExecution("quota")
        quota -= 1
        return row

    pipeline = Pipeline(name).add(handle, concurrency=1)
    rows = [{"n": n} for n in range(100)]
    options = WorkerOptions(partitions=1)
    first = await pipeline.run_async(rows, broker=broker_url, session="s", options=options)
    assert first.stopped == "quota"
    assert not first.is_complete
    assert (len(first.data), first.metrics.processed_rows, first.metrics.failed_rows) == (40, 40, 0)
    assert first.metrics.dropped_rows == 0
    quota = 1_000
    second = await pipeline.run_async(rows, broker=broker_url, session="s", options=options)
    assert second.stopped is None
    assert second.is_complete
    assert list(second.data["n"]) == list(range(100))
