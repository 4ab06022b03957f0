"""What it costs a worker to be watched: the same rows with events, counts by stage and control, and without any.

    python -m benchmarks.watched                       # plain and async stages on the embedded broker
    python -m benchmarks.watched --broker kafka://localhost:9092

The issue's goal: a worker that tells events has at least 0.98 of the rate of one that does not. Counted is processor
time of the worker's process, so that other work on the machine matters less, from the first quarter of the rows to the
last row: starting and ending are not a matter of rate. Every run is a fresh process, the two ways take turns, and the
median of the ratios of neighbouring runs counts. The first way is there twice: how far it is from itself is the noise.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from statistics import median
from typing import Any

GOAL = 0.98
CONCURRENCY, PARTITIONS = 100, 4
OFF, ON, AGAIN = "off", "on", "off, once more"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a worker that tells events with one that does not.")
    parser.add_argument("--rows", type=int, default=400_000, help="of a plain run; an async one has a third of them")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--broker", help="default: an embedded one in a temporary folder")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, name, way = args.child
        print(json.dumps(asyncio.run(run_worker(args.broker, kind, name, watched=way == ON, rows=args.rows))))
        return 0
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="rowmill-watched-") as folder:
        broker = args.broker or f"local://{folder}/broker"
        worst = min(compare(broker, kind, rows, args.rounds) for kind, rows in
                    (("plain", args.rows), ("async", args.rows // 3)))  # fmt: skip
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    return 0 if worst >= GOAL else 1


def compare(broker: str, kind: str, rows: int, rounds: int) -> float:
    """The watched worker's rate against the other's, by processor time."""
    name = f"watched-{kind}-{uuid.uuid4().hex[:6]}"
    asyncio.run(prepare(broker, name, rows))
    seen: dict[str, list[float]] = {OFF: [], ON: [], AGAIN: []}
    events = 0
    for number in range(rounds + 1):
        for way in (OFF, ON, AGAIN) if number % 2 else (AGAIN, ON, OFF):
            command = [sys.executable, "-m", "benchmarks.watched", "--broker", broker, "--rows", str(rows)]
            done = subprocess.run([*command, "--child", kind, name, way], capture_output=True, text=True, check=True)
            told = json.loads(done.stdout)
            if number:  # the first round warms the files up
                seen[way].append(told["cpu"] / (rows - rows // 4) * 1e6)
                events += told["progress"]
    ratio, noise = (median(off / on for off, on in zip(seen[OFF], seen[way], strict=True)) for way in (ON, AGAIN))
    print(
        f"{kind}: {median(seen[OFF]):.2f} µs of processor time a row without events, {median(seen[ON]):.2f} with; "
        f"ratio {ratio:.3f} (goal: {GOAL}), noise {noise:.3f}; {rounds} rounds of {rows:,} rows, "
        f"{events / rounds:.1f} progress events a run"
    )
    return ratio


async def prepare(url: str, name: str, rows: int) -> None:
    from rowmill import open_broker, publish
    from rowmill.streams.brokers.base import TopicSpec

    broker = open_broker(url)
    await broker.start()
    await broker.create_topics([TopicSpec(topic, PARTITIONS, {}) for topic in (name, f"{name}.out")])
    await broker.close()
    many = [{"key": f"key-{number % 9_973}", "id": number, "price": 1.5, "name": "somebody"} for number in range(rows)]
    await asyncio.to_thread(publish, name, many, key="key", broker=url)


calls, marks, marked = itertools.count(1), set[int](), list[float]()


def compute(row: dict[str, Any]) -> dict[str, Any]:
    if next(calls) in marks:
        marked.append(time.process_time())
    return {**row, "total": row["price"] * 2}


def keep(row: dict[str, Any]) -> dict[str, Any] | None:
    return row if row["id"] % 50 else None


async def give_way(row: dict[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(0)
    return row


async def run_worker(url: str, kind: str, name: str, *, watched: bool, rows: int) -> dict[str, float]:
    """A worker of a session of its own, to the end of the topic."""
    from rowmill import Pipeline, Session, Worker, WorkerOptions, open_broker
    from rowmill.state.model import TopicPartition

    pipeline = Pipeline(name, source=name, sink=f"{name}.out")
    pipeline.add(compute)
    pipeline.add(keep)
    if kind == "async":
        pipeline.add(give_way, concurrency=CONCURRENCY)
    broker = open_broker(url)
    await broker.start()
    marks.update((rows // 4, rows))
    session = Session(name, id=uuid.uuid4().hex[:8])
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(pipeline, broker, session=session, options=WorkerOptions(state_dir=folder), steered=watched)
        tps = [TopicPartition(name, number) for number in range(PARTITIONS)]
        worker.finish_at(await broker.offsets(tps, "end"))
        told = 0
        if worker._steering is not None:  # noqa: SLF001 - how many events there were is worth knowing
            progress = worker.progress

            def counted() -> Any:
                nonlocal told
                told += 1
                return progress()

            worker._steering._events._snapshot = counted  # noqa: SLF001
        stats = await worker.run()
    taken = marked[1] - marked[0]
    await broker.close()
    if stats.rows != rows:
        raise SystemExit(f"{stats.rows:,} of {rows:,} rows")
    return {"cpu": taken, "progress": told}


if __name__ == "__main__":
    sys.exit(main())
