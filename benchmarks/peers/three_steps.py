"""P10, in a process of its own: publish rows, process them to the end, read the results, each timed and checked."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from rowmill import Pipeline, Worker, WorkerOptions, open_broker, publish, read
from rowmill.state.model import TopicPartition
from rowmill.streams.brokers.base import TopicSpec

from benchmarks.cluster import PARTITIONS
from benchmarks.rows import result_of, row_of

KEYS = 10_000


def main() -> None:
    url, count, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    name = f"bench-{uuid.uuid4().hex[:10]}"
    source, sink = f"{name}.in", f"{name}.out"
    rows = [{**row_of(number), "key": f"key-{number * 7_919 % KEYS:06d}"} for number in range(count)]
    asyncio.run(prepare(url, source, sink))
    told = {
        "publish": timed(lambda: publish(source, rows, key="key", broker=url)),
        "process": timed(lambda: asyncio.run(process(url, name, source, sink, folder))),
    }
    results: list[dict[str, Any]] = []
    told["read"] = timed(lambda: results.extend(message.row for message in read(sink, broker=url)))
    check(rows, results)
    asyncio.run(clean_up(url, name))
    print(json.dumps(told | {"cpu": time.process_time()}))


def timed(step: Callable[[], Any]) -> float:
    began = time.monotonic()
    step()
    return time.monotonic() - began


async def prepare(url: str, source: str, sink: str) -> None:
    """The same number of partitions on both."""
    broker = open_broker(url)
    await broker.start()
    await broker.create_topics([TopicSpec(topic, PARTITIONS, {}) for topic in (source, sink)])
    await broker.close()


async def process(url: str, name: str, source: str, sink: str, folder: str) -> None:
    """A worker that ends where the topic ends."""
    pipeline = Pipeline(name, source=source, sink=sink)
    pipeline.add(result_of, name="compute")
    broker = open_broker(url)
    await broker.start()
    try:
        worker = Worker(pipeline, broker, options=WorkerOptions(state_dir=folder))
        tps = [TopicPartition(source, partition) for partition in range(PARTITIONS)]
        worker.finish_at(await broker.offsets(tps, "end"))
        await worker.run()
    finally:
        await broker.close()


def check(rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    """Each result once, with its content; those of a key in their order."""
    if len(results) != len(rows) or {row["id"] for row in results} != set(range(len(rows))):
        raise SystemExit(
            f"{len(results):,} results of {len(rows):,} rows, {len({row['id'] for row in results}):,} different"
        )
    last: dict[str, int] = {}
    for row in results:
        if row != result_of(rows[row["id"]]):
            raise SystemExit(f"row {row['id']} has other content: {row}")
        if row["id"] < last.get(row["key"], -1):
            raise SystemExit(f"row {row['id']} is out of order")
        last[row["key"]] = row["id"]


async def clean_up(url: str, name: str) -> None:
    broker = open_broker(url)
    await broker.start()
    await broker.delete_topics([topic for topic in await broker.topics() if name in topic])
    await broker.close()


if __name__ == "__main__":
    main()
