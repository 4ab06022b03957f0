"""How long a partition's results stand still when it changes hands, on Apache Kafka, between real worker processes.

    python -m benchmarks.handover                                    # on an Apache Kafka of its own
    python -m benchmarks.handover --broker kafka://127.0.0.1:9092 --rounds 5

Rows take 5 to 100 ms each and count in a table; they are published steadily, and a read-committed consumer notes when
their results become visible. Workers join, leave in order and are killed in turn. For each such event, and each
partition, the longest time without a new result counts: apart for partitions that moved and that stayed, and for
tables that the new owner had on disk (warm) or not (empty). At the end every row must have exactly one result.

On a machine that others use too, an event counts as crowded when less than a fifth of the processors' time was idle
around it: those are shown apart, and the goals are not held against them. Without any other event of some sort
nothing is shown for it, and the measurement fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTITIONS = 6
SESSION_TIMEOUT = 6.0
MOVED_GOAL, STAYED_GOAL, KILLED_GOAL = 1.5, 1.0, SESSION_TIMEOUT + 3.0
SETTLED_SECONDS = 2.5
EVENT_SECONDS = 60.0
CROWDED = 0.2
KINDS = {
    "control": "nothing happens",
    "join-empty": "a worker joins, its disk empty",
    "join-warm": "a worker joins, its tables warm",
    "leave-empty": "a worker leaves, the other's disk empty",
    "leave-warm": "a worker leaves, the other's tables warm",
    "kill-empty": "a worker is killed, the other's disk empty",
    "kill-warm": "a worker is killed, the other's tables warm",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure hand-overs of partitions between two workers.")
    parser.add_argument("--broker", help="kafka://host:port; default: start an Apache Kafka")
    parser.add_argument("--rounds", type=int, default=5, help="each of 9 events (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=200, help="rows a second in all (default: %(default)s)")
    parser.add_argument("--entries", type=int, default=10_000, help="table entries a partition (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the workers' logs, and say where")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--state-dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        asyncio.run(work(args))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="rowmill-handover-"))
    try:
        with some_broker(args.broker) as url:
            return asyncio.run(Measurement(args, url, folder).run())
    finally:
        if args.keep:
            print(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def some_broker(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from support.kafka_server import find_source

    with find_source()() as kafka:
        yield f"kafka://{kafka.bootstrap}"


def kafka_broker(url: str) -> Any:
    from rowmill.state.clock import SystemClock
    from rowmill.streams.brokers.kafka import KafkaBroker

    return KafkaBroker(url.partition("://")[2], clock=SystemClock(), session_timeout=SESSION_TIMEOUT)


# --- a worker process ------------------------------------------------------------------------------------------------


def make_pipeline(name: str) -> Any:
    from rowmill import Pipeline

    pipeline = Pipeline(name, source=name, sink=f"{name}.out")
    pipeline.table("counts")

    @pipeline.stage(concurrency=64)
    async def enrich(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        if not row["fill"]:
            await asyncio.sleep(0.005 + row["id"] * 37 % 96 / 1000)  # 5 to 100 ms
        ctx.table("counts").add(ctx.key, 1)
        return {"id": row["id"], "partition": ctx.partition, "by": os.getpid()}

    return pipeline


async def work(args: argparse.Namespace) -> None:
    from rowmill import Worker, WorkerOptions
    from rowmill.streams.cli.signals import orderly_stop

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it never outlives the measurement
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(name)s %(message)s", datefmt="%H:%M:%S")
    broker = kafka_broker(args.broker)
    await broker.start()
    try:
        worker = Worker(make_pipeline(args.worker), broker, options=WorkerOptions(state_dir=args.state_dir))
        with orderly_stop(worker.stop):
            await worker.run()
    finally:
        await broker.close()


# --- the measurement -------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the consumer saw: when results of a partition arrived, by whom, and how often each row's."""

    times: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    owners: dict[int, int] = field(default_factory=dict)
    results: Counter[int] = field(default_factory=Counter)

    def note(self, now: float, value: bytes) -> None:
        row = json.loads(value)
        self.times[row["partition"]].append(now)
        self.owners[row["partition"]] = row["by"]
        self.results[row["id"]] += 1

    def longest_pause(self, partition: int, since: float) -> float:
        """Between results that follow each other, the later one after ``since``."""
        times = self.times[partition]
        pauses = [later - earlier for earlier, later in itertools.pairwise(times) if later >= since]
        return max([*pauses, time.monotonic() - times[-1]])


def idle_seconds() -> float:
    """How long the processors have been idle since the machine started, summed (proc_stat(5))."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[4]) / os.sysconf("SC_CLK_TCK")


class Measurement:
    def __init__(self, args: argparse.Namespace, url: str, folder: Path) -> None:
        self._args = args
        self._url = url
        self._folder = folder
        self._name = f"handover-{uuid.uuid4().hex[:8]}"
        self._broker = kafka_broker(url)
        self._seen = Seen()
        self._published = 0
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._gone: set[str] = set()
        self._pauses: dict[tuple[bool, str, str], list[float]] = defaultdict(list)

    async def run(self) -> int:
        from rowmill.streams.brokers.base import TopicSpec

        await self._broker.start()
        try:
            topics = [TopicSpec(name, PARTITIONS, {}) for name in (self._name, f"{self._name}.out")]
            await self._broker.create_topics(topics)
            async with self._publishing() as publish, self._watching():
                self._start("a")
                await self._fill(publish)
                steady = asyncio.create_task(self._publish_steadily(publish))
                await asyncio.sleep(2)
                for number in range(1, self._args.rounds + 1):
                    print(f"round {number}, load {os.getloadavg()[0]:.1f}", flush=True)
                    await self._round()
                steady.cancel()
                await asyncio.wait({steady})
                await self._until(lambda: len(self._seen.results) == self._published, "every row has a result")
            return self._report()
        finally:
            for worker in self._workers.values():
                worker.kill()
                worker.wait()
            with contextlib.suppress(Exception):
                await asyncio.sleep(SESSION_TIMEOUT + 1)  # the group forgets who was killed
                await self._clean_up()
            await self._broker.close()

    async def _round(self) -> None:
        """It begins and ends with one worker, ``a``, that has every partition and all tables on its disk."""
        await self._event("control", lambda: None, {"a"})
        await self._event("join-empty", lambda: self._start("b"), {"a", "b"})
        await self._event("leave-empty", lambda: self._signal("a", signal.SIGTERM), {"b"})
        await self._event("join-warm", lambda: self._start("a"), {"a", "b"})
        await self._event("leave-warm", lambda: self._signal("b", signal.SIGTERM), {"a"})
        await self._event("join-empty", lambda: self._start("c"), {"a", "c"})
        await self._event("kill-empty", lambda: self._signal("a", signal.SIGKILL), {"c"})
        await self._event("join-warm", lambda: self._start("a"), {"a", "c"})
        await self._event("kill-warm", lambda: self._signal("c", signal.SIGKILL), {"a"})
        for name in ("b", "c"):
            shutil.rmtree(self._folder / name)

    async def _event(self, kind: str, action: Callable[[], None], expected: set[str]) -> None:
        before, since, idle_before = dict(self._seen.owners), time.monotonic(), idle_seconds()
        print(f"{time.strftime('%H:%M:%S')}.{time.time() % 1 * 1000:03.0f} {kind:12}", end="", flush=True)
        action()
        pids = {self._workers[name].pid for name in expected}
        await self._until(lambda: set(self._seen.owners.values()) == pids, f"{kind}: {expected} own everything")
        await asyncio.sleep(SETTLED_SECONDS)
        pauses = {partition: self._seen.longest_pause(partition, since) for partition in range(PARTITIONS)}
        idle = (idle_seconds() - idle_before) / (time.monotonic() - since) / (os.cpu_count() or 1)
        moved = {partition for partition in pauses if self._seen.owners[partition] != before[partition]}
        for partition, pause in pauses.items():
            self._pauses[idle < CROWDED, kind, "moved" if partition in moved else "stayed"].append(pause)
        for what in ("moved", "stayed"):
            shown = [f"{p}: {pause:.2f}" for p, pause in pauses.items() if (p in moved) == (what == "moved")]
            print(f"  {what} {' '.join(shown) or '-'}", end="")
        print(f"  idle {idle:.0%}", flush=True)

    async def _until(self, done: Callable[[], bool], what: str) -> None:
        give_up = time.monotonic() + EVENT_SECONDS
        while not done():
            if any(worker.poll() for name, worker in self._workers.items() if name not in self._gone):
                raise SystemExit(f"a worker failed, while waiting until {what}; see its log (--keep)")
            if time.monotonic() > give_up:
                raise SystemExit(f"not within {EVENT_SECONDS:.0f} s: {what}; see the logs (--keep)")
            await asyncio.sleep(0.02)

    # --- workers, publisher, consumer ------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        if name in self._workers:
            self._workers[name].wait()
        self._gone.discard(name)
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", self._name]
        command += ["--broker", self._url, "--state-dir", str(self._folder / name)]
        with (self._folder / f"{name}.log").open("ab") as log:
            self._workers[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def _signal(self, name: str, number: signal.Signals) -> None:
        self._gone.add(name)
        self._workers[name].send_signal(number)

    @contextlib.asynccontextmanager
    async def _publishing(self) -> AsyncIterator[Any]:
        producer = self._broker.producer()
        await producer.start()
        try:
            yield producer
        finally:
            await producer.close()

    async def _fill(self, producer: Any) -> None:
        """As many table entries as asked for, in every partition."""
        for partition in range(PARTITIONS):
            for begin in range(0, self._args.entries, 1_000):
                keys = range(begin, min(begin + 1_000, self._args.entries))
                await self._send(producer, partition, keys, fill=True)
        await self._until(lambda: len(self._seen.results) == self._published, "the tables are filled")

    async def _publish_steadily(self, producer: Any) -> None:
        pause, due = PARTITIONS / self._args.rate, time.monotonic()
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                for partition in range(PARTITIONS):
                    key = self._published * 7_919 % self._args.entries
                    await asyncio.shield(self._send(producer, partition, [key], fill=False))
                due += pause
                await asyncio.sleep(max(0, due - time.monotonic()))

    async def _send(self, producer: Any, partition: int, keys: Any, *, fill: bool) -> None:
        from rowmill.state.clock import SystemClock
        from rowmill.state.model import Outgoing, TopicPartition

        now = SystemClock().now_ms()
        records = []
        for key in keys:
            row = {"id": self._published, "fill": fill, "text": "x" * 60}
            records.append(Outgoing(f"{partition}-{key}".encode(), json.dumps(row).encode(), now))
            self._published += 1
        await (await producer.send(TopicPartition(self._name, partition), records))

    @contextlib.asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        import aiokafka

        consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=self._url.partition("://")[2],
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        await consumer.start()
        consumer.assign([aiokafka.TopicPartition(f"{self._name}.out", p) for p in range(PARTITIONS)])

        async def watch() -> None:
            while True:
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    now = time.monotonic()
                    for record in records:
                        self._seen.note(now, record.value)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await consumer.stop()

    async def _clean_up(self) -> None:
        await self._broker.delete_topics([topic for topic in await self._broker.topics() if self._name in topic])
        await self._broker.delete_groups([group for group in await self._broker.groups() if self._name in group])

    # --- the report ------------------------------------------------------------------------------------------------

    def _table(self, *, crowded: bool) -> int:
        """Print what was measured in events of one sort; gives how many pauses were longer than the goal."""
        title = "pauses in seconds, crowded machine" if crowded else "pauses in seconds"
        print(f"\n{title:50}{'n':>5}{'median':>8}{'worst':>7}{'goal':>6}{'above':>7}")
        total = 0
        for kind, what in itertools.product(KINDS, ("moved", "stayed")):
            pauses = self._pauses.get((crowded, kind, what))
            if pauses:
                goal = STAYED_GOAL if what == "stayed" else KILLED_GOAL if kind.startswith("kill") else MOVED_GOAL
                above = sum(pause >= goal for pause in pauses)
                total += above
                figures = f"{len(pauses):>5}{median(pauses):>8.2f}{max(pauses):>7.2f}{goal:>6.1f}{above:>7}"
                print(f"{KINDS[kind]}: {what}".ljust(50) + figures)
        return total

    def _report(self) -> int:
        missed = self._table(crowded=False) > 0
        self._table(crowded=True)
        unseen = [title for kind, title in KINDS.items() if (False, kind, "stayed") not in self._pauses]
        if unseen:
            print(f"only on a crowded machine, so not shown: {'; '.join(unseen)}")
        twice = sum(count > 1 for count in self._seen.results.values())
        print(f"{self._published:,} rows, {len(self._seen.results):,} with results, {twice} with more than one")
        print(f"{self._args.entries:,} table entries a partition, {self._args.rate} rows/s, load {os.getloadavg()}")
        return 1 if missed or unseen or twice else 0


if __name__ == "__main__":
    sys.exit(main())
