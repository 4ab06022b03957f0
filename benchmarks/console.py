"""Does the console keep up? 500 events a second (50 sessions of ten workers, 24 partitions in each event), on one core.

    python -m benchmarks.console                          # embedded broker, one minute
    python -m benchmarks.console --kafka --seconds 600    # Apache Kafka, ten minutes

A process with the console's Faust app is bound to one core; this one writes the events. Every second the app tells how
much it has counted, how old its newest event is, its memory and its processor time. Then it is killed with SIGKILL and
started again: how long until the past is there, how long until it is live, and is every row counted once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from rowmill.state.clock import SystemClock
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker, Producer
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.console.board import Board
from rowmill.streams.console.faust_app import ConsoleApp
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.events import events_topic
from rowmill.streams.partitioning import partition_for

SESSIONS, WORKERS, PARTITIONS, STAGES = 50, 10, 24, ("clean", "score", "store")
ROWS_PER_EVENT = 100


class Writer:
    """Writes what workers would: each its progress once per second, spread over the second."""

    def __init__(self, broker: Broker, producer: Producer, partitions: int, workers: int, name: str) -> None:
        self._broker = broker
        self._producer = producer
        self._partitions = partitions
        self._name = name
        self._workers = [(session, worker) for session in range(SESSIONS) for worker in range(workers)]
        self._started_ms = SystemClock().now_ms()
        self.written = 0
        self.rounds = 0

    async def write(self, seconds: float) -> None:
        """So long."""
        clock = SystemClock()
        begun, step = clock.monotonic(), 0.05
        per_step = len(self._workers) * step
        done = 0
        while (elapsed := clock.monotonic() - begun) < seconds:
            due = int(elapsed / step * per_step)
            by_partition: dict[int, list[Outgoing]] = {}
            for n in range(done, due):
                group, value = self._event(n, clock.now_ms())
                partition = partition_for(group, self._partitions)
                by_partition.setdefault(partition, []).append(Outgoing(group, value, clock.now_ms()))
            for partition, records in by_partition.items():
                await (await self._producer.send(TopicPartition(EVENTS_TOPIC, partition), records))
            self.written += due - done
            done = due
            await asyncio.sleep(step)
        rest = -done % len(self._workers)  # end with a whole round, so that all workers have told the same
        for n in range(done, done + rest):
            group, value = self._event(n, clock.now_ms())
            tp = TopicPartition(EVENTS_TOPIC, partition_for(group, self._partitions))
            await (await self._producer.send(tp, [Outgoing(group, value, clock.now_ms())]))
        self.written += rest
        self.rounds += (done + rest) // len(self._workers)

    def _event(self, n: int, now_ms: int) -> tuple[bytes, bytes]:
        session, worker = self._workers[n % len(self._workers)]
        told = self.rounds + n // len(self._workers) + 1
        rows = told * ROWS_PER_EVENT
        counts = {"rows": rows, "results": rows, "dropped": 0, "skipped": 0, "defaulted": 0, "dead_letters": 0}
        group = f"rowmill.{self._name}-{session}"
        event = EventRecord(
            kind="progress",
            at_ms=now_ms,
            pipeline=f"{self._name}-{session}",
            session="live",
            group=group,
            worker=f"w{worker}",
            host="node",
            pid=worker + 1,
            data={
                "state": "running",
                "started_ms": max(self._started_ms, now_ms - 10_000),
                "totals": {**counts, "tokens": rows, "cost": f"{rows // 100}.00", "transactions": told},
                "in_flight": 10,
                "partitions": [
                    {
                        "topic": f"{self._name}-{session}",
                        "partition": partition,
                        "state": "running",
                        "committed": rows,
                        "position": rows + 20,
                        "buffered": 20,
                        "in_flight": 1,
                        "oldest_offset": rows,
                        "oldest_seconds": 0.1,
                        "counts": counts,
                    }
                    for partition in range(PARTITIONS)
                ],
                "stages": {
                    name: {"rows": rows, "out": rows, "dropped": 0, "failed": 0, "calls": rows, "seconds": rows / 50}
                    for name in STAGES
                },
                "latency": {
                    name: {"bins": {str(-90 + (told + i) % 40): 5 for i in range(12)}, "zero": 0} for name in STAGES
                },
                "breakers": {"scorer": "closed"},
                "budget": None,
            },
        )
        return group.encode(), event.encode()


@contextlib.asynccontextmanager
async def writing(url: str, workers: int, name: str) -> AsyncIterator[Writer]:
    """A writer on a broker."""
    broker = open_broker(url)
    await broker.start()
    producer = broker.producer()
    try:
        await broker.create_topics([events_topic(broker)])
        await producer.start()
        yield Writer(broker, producer, (await broker.topics())[EVENTS_TOPIC].partitions, workers, name)
    finally:
        await producer.close()
        await broker.close()


async def be_console(url: str, folder: Path, core: int | None, name: str) -> None:
    """The other process: the app alone, and a line per second on standard output."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    board = Board(SystemClock())
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    task = asyncio.create_task(ConsoleApp(url, board, SystemClock(), state_dir=folder).run(stop))
    until, is_live = 0.0, False
    while not task.done() and not stop.is_set():
        now_ms = SystemClock().now_ms()
        if time.monotonic() >= until or not is_live:
            is_live = board.standing.state == "live"
            until = time.monotonic() + 1
            points = [
                p
                for group in board.groups()
                if name in group
                for p in board.points(group, "1h", now_ms - 7_200_000, now_ms + 1)
            ]
            told = {
                "rows": sum(point.rows for point in points),
                "state": board.standing.state,
                "behind": board.standing.behind_seconds,
                "rss": _rss(),
                "cpu": time.process_time(),
                "threads": threading.active_count(),
            }
            print(json.dumps(told), flush=True)
        await asyncio.sleep(0.1)
    await task


def _rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


class Process:
    """The console's process, and what it told."""

    def __init__(self, url: str, folder: Path, core: int | None, name: str) -> None:
        self.began = time.monotonic()
        self.told: list[tuple[float, dict[str, Any]]] = []
        words = [
            sys.executable,
            "-m",
            "benchmarks.console",
            "--be",
            url,
            str(folder),
            str(-1 if core is None else core),
            name,
        ]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            self.told.append((time.monotonic() - self.began, json.loads(line)))

    async def until(self, is_so: Any, seconds: float) -> float:
        """When it first told that; seconds since its start."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for at, told in list(self.told):
                if is_so(told):
                    return at
            if self._process.poll() is not None:
                raise RuntimeError(f"the console ended with {self._process.returncode}")
            await asyncio.sleep(0.1)
        raise TimeoutError(f"the console did not get there within {seconds} s: {self.told[-1:]}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        self._process.wait(20)
        self._thread.join(5)
        if self._process.stdout is not None:
            self._process.stdout.close()


async def soak(url: str, folder: Path, seconds: float, *, core: int | None, workers: int = WORKERS) -> dict[str, Any]:
    """The whole of it; what was found."""
    name = f"soak{SystemClock().token()}"  # a broker may have those of another time
    async with writing(url, workers, name) as writer:
        first = Process(url, folder, core, name)
        try:
            await first.until(lambda told: told["state"] == "live", 60)
            begun = time.monotonic() - first.began
            await writer.write(seconds)
            rows = writer.rounds * ROWS_PER_EVENT * workers * SESSIONS
            ended = time.monotonic() - first.began
            caught_up = await first.until(lambda told: told["rows"] >= rows, 60) - ended
            running = [(at, told) for at, told in first.told if begun + 5 <= at <= ended]
        finally:
            first.kill()
        second = Process(url, folder, core, name)
        try:
            past = await second.until(lambda told: told["rows"] > 0, 60)
            live = await second.until(lambda told: told["state"] == "live" and told["rows"] >= rows, 90)
            await asyncio.sleep(3)
            counted = second.told[-1][1]["rows"]
        finally:
            second.kill(signal.SIGTERM)
    return {
        "events": writer.written,
        "events_per_second": round(writer.written / seconds, 1),
        "rows": rows,
        "rows_after_kill": counted,
        "caught_up_after_seconds": round(caught_up, 2),
        "past_shown_after_seconds": round(past, 2),
        "live_after_seconds": round(live, 2),
        **figures(running),
    }


def figures(running: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Memory, processor time and age of the newest event, in the two halves."""
    halves = [running[: len(running) // 2], running[len(running) // 2 :]]
    (at_first, first), (at_last, last) = running[0], running[-1]
    rss = [max(told["rss"] for _, told in half) for half in halves]
    behind = [max(told["behind"] for _, told in half) for half in halves]
    return {
        "core_used": round((last["cpu"] - first["cpu"]) / (at_last - at_first), 3),
        "rss_mib": [round(each / 2**20, 1) for each in rss],
        "rss_second_half": [round(_of(halves[1], pick) / 2**20, 1) for pick in (0, -1)],
        "rss_by_minute": _by_minute(running),
        "most_behind_seconds": behind,
        "threads": last["threads"],
    }


def _by_minute(running: list[tuple[float, dict[str, Any]]]) -> list[float]:
    """The most of each minute, in MiB."""
    most: dict[int, float] = {}
    for at, told in running:
        minute = int((at - running[0][0]) // 60)
        most[minute] = max(most.get(minute, 0.0), round(told["rss"] / 2**20, 1))
    return list(most.values())


def _of(half: list[tuple[float, dict[str, Any]]], pick: int) -> int:
    return int(half[pick][1]["rss"])


@contextlib.contextmanager
def _broker(is_kafka: bool, folder: Path) -> Iterator[str]:
    if not is_kafka:
        yield f"local://{folder / 'broker'}"
        return
    from .cluster import apache_kafka

    with apache_kafka() as (bootstrap, _):
        yield f"kafka://{bootstrap}"


def main() -> int:
    """Measure, and print; 1 if it did not keep up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kafka", action="store_true", help="on Apache Kafka instead of the embedded broker")
    parser.add_argument("--core", type=int, default=1, help="the core that the console has; -1: any")
    parser.add_argument("--be", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be:
        url, folder, core, name = args.be
        asyncio.run(be_console(url, Path(folder), None if int(core) < 0 else int(core), name))
        return 0
    with tempfile.TemporaryDirectory() as scratch, _broker(args.kafka, Path(scratch)) as url:
        core = None if args.core < 0 else args.core
        found = asyncio.run(soak(url, Path(scratch) / "state", args.seconds, core=core))
    print(json.dumps(found, indent=2))
    first, last = found["rss_second_half"]
    is_flat = last <= first * 1.05
    keeps_up = found["rows"] == found["rows_after_kill"] and found["caught_up_after_seconds"] < 10
    return 0 if is_flat and keeps_up else 1


if __name__ == "__main__":
    sys.exit(main())
