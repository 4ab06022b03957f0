"""Tables made again by replay, and replay of paused sessions, on real brokers, with workers that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rowmill import Session, open_broker, publish, read
from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from rowmill.state.clock import SystemClock
from rowmill.state.codec import loads
from rowmill.state.execution import Wanted
from rowmill.state.model import Committed, TopicPartition
from rowmill.streams.brokers.base import Broker
from rowmill.streams.collect import read_topic
from rowmill.streams.control import ControlTopic, request
from rowmill.streams.replay import Replay, Target

pytestmark = pytest.mark.timeout(240)

WORKER = """
import asyncio, sys
from rowmill import Pipeline, Worker, WorkerOptions, open_broker

url, name, way, pause, state, end = sys.argv[1:]
p = Pipeline(name, source=name + ".in", sink=name + ".out").table("counts")

def work(row, ctx):
    table = ctx.table("counts")
    number = table.get(ctx.key, 0) + 1
    table.put(ctx.key, number)
    ctx.add_cost("0.01")
    if row["n"] % 10 == 7:
        raise ValueError("a seventh one")
    ctx.emit(name + ".besides", {"n": row["n"]})
    return {"n": row["n"], "key": row["key"], "number": number}

async def flow(row, ctx):
    await asyncio.sleep(float(pause))
    return work(row, ctx)

def lots(row, ctx):
    import time
    time.sleep(float(pause))
    return work(row, ctx)

p.stage(flow if way == "flow" else lots)

async def main():
    broker = open_broker(url, environment={})
    await broker.start()
    options = WorkerOptions(state_dir=state, commit_interval=0.02, fetch_rows=20, buffer_rows=40)
    worker = Worker(p, broker, options=options, steered=True)
    if end == "finish":
        count = (await broker.topics())[name + ".in"].partitions
        tps = [(name + ".in", n) for n in range(count)]
        from rowmill.state.model import TopicPartition
        worker.finish_at(await broker.offsets([TopicPartition(*tp) for tp in tps], "high_watermark"))
    print("begins", flush=True)
    await worker.run()
    await broker.close()

asyncio.run(main())
"""

KEYS = 6


@pytest.fixture
def start(tmp_path: Path, broker_url: str, name: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts worker processes; those that are left at the end are killed."""
    workers: list[subprocess.Popen[bytes]] = []

    def one(way: str, pause: float = 0.0, end: str = "finish") -> subprocess.Popen[bytes]:
        words = [broker_url, name, way, str(pause), str(tmp_path / f"state{len(workers)}"), end]
        workers.append(subprocess.Popen([sys.executable, "-c", WORKER, *words], stdout=subprocess.PIPE))
        return workers[-1]

    yield one
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.communicate(timeout=30)


def finish(worker: subprocess.Popen[bytes]) -> None:
    """Wait for its orderly end."""
    worker.communicate(timeout=120)
    assert worker.returncode == 0


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    """A started broker."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


def feed(url: str, name: str, begin: int, end: int) -> None:
    """Publish rows under a few keys."""
    publish(f"{name}.in", [{"n": n, "key": f"k{n % KEYS}"} for n in range(begin, end)], broker=url, key="key")


def rows_of(url: str, topic: str) -> list[dict[str, Any]]:
    """The rows of a topic, as far as committed."""
    return [message.row for message in read(topic, broker=url)]


async def changelog(url: str, name: str) -> tuple[dict[str, Any], list[CheckpointRecord]]:
    """The tables by the fold of the changelog, and the last checkpoint of each partition."""
    tables: dict[str, Any] = {}
    records: dict[int, CheckpointRecord] = {}
    async with opened(url) as broker:
        topic = Session(name).changelog(f"{name}.in")
        async for lot in read_topic(broker, topic):
            for record in lot:
                if record.key == CHECKPOINT_KEY:
                    records[record.partition] = CheckpointRecord.decode(record.value or b"")
                elif record.value is None:
                    tables.pop((record.key or b"").decode(), None)
                else:
                    tables[(record.key or b"").decode()] = loads(record.value)
    return tables, [records[number] for number in sorted(records)]


def oracle(count: int) -> dict[str, int]:
    """What the tables are to hold: rows that fail write nothing."""
    counted = Counter(f"counts/k{n % KEYS}" for n in range(count) if n % 10 != 7)
    return dict(counted)


async def replay(url: str, name: str, target: Target, state: Any) -> list[TopicPartition]:
    """Move the live session; the partitions that moved."""
    async with opened(url) as broker:
        execution = await Replay(broker, Session(name), [f"{name}.in"], target, state=state).execute()
    assert not execution.failed, execution.failed
    return [move.tp for move in execution.moved]


async def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for what other processes do."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "nothing happened"
        await asyncio.sleep(0.05)


async def half_way(url: str, name: str) -> None:
    """Until some rows ran for the tables alone, in the changelog."""
    give_up = time.monotonic() + 60
    while True:
        _, records = await changelog(url, name)
        if sum(record.counts.get("rebuilt", 0) for record in records) >= 60:
            return
        assert time.monotonic() < give_up, "nothing is rebuilt"
        await asyncio.sleep(0.1)


def check(url: str, name: str, count: int, again: Callable[[dict[str, Any]], bool]) -> None:
    """Every result once, and those from the target on once more, the same; so with emits and dead letters."""
    results = Counter((row["n"], row["number"]) for row in rows_of(url, f"{name}.out"))
    places = {number: place for place, number in enumerate(n for n in range(count) if n % 10 != 7)}
    assert {n for n, _ in results} == set(places), "each row has one and the same result"
    assert len(results) == len(places), "what runs again gives the same number"
    wrong = {n: times for (n, _), times in results.items() if times != 1 + again({"n": n})}
    assert not wrong
    besides = Counter(row["n"] for row in rows_of(url, f"{name}.besides"))
    assert besides == Counter({n: times for (n, _), times in results.items()})
    letters = Counter(row["n"] for row in rows_of(url, f"{name}.dlq"))
    assert letters == Counter({n: 1 + again({"n": n}) for n in range(count) if n % 10 == 7})


@pytest.mark.parametrize("way", ["flow", "lots"])
async def test_killed_while_tables_are_made_again(broker_url: str, name: str, start: Any, way: str) -> None:
    """SIGKILL on the way, another worker beside it on Kafka: the others go on, and outputs come from the target on."""
    await asyncio.to_thread(feed, broker_url, name, 0, 300)
    finish(await asyncio.to_thread(start, way))
    async with opened(broker_url) as broker:
        count = (await broker.topics())[f"{name}.in"].partitions
        tps = [TopicPartition(f"{name}.in", number) for number in range(count)]
        target = await broker.offsets(tps, "high_watermark")
    await asyncio.to_thread(feed, broker_url, name, 300, 400)
    finish(await asyncio.to_thread(start, way))
    check(broker_url, name, 400, lambda _: False)

    await replay(broker_url, name, Target("file", offsets=target), "rebuild")
    tables, records = await changelog(broker_url, name)
    assert not tables
    is_kafka = broker_url.startswith("kafka")  # two workers, and time for them to share the partitions
    pause = {"flow": 0.4, "lots": 0.2}[way] if is_kafka else {"flow": 0.1, "lots": 0.02}[way]
    first = start(way, pause, "stay")
    await half_way(broker_url, name)
    second = start(way, pause / 4) if is_kafka else None
    await asyncio.sleep(4.0 if is_kafka else 0.3)
    first.send_signal(signal.SIGKILL)
    await asyncio.to_thread(first.communicate, timeout=30)
    _, records = await changelog(broker_url, name)
    assert any(record.rebuild_until is not None for record in records), "it was killed on the way"
    await asyncio.to_thread(finish, second or start(way))
    check(broker_url, name, 400, lambda row: row["n"] >= 300)
    tables, records = await changelog(broker_url, name)
    assert tables == oracle(400)
    assert all(record.rebuild_until is None for record in records)
    assert sum(record.counts["rows"] for record in records) == 500
    assert sum(record.counts.get("rebuilt", 0) for record in records) == 300
    assert sum(float(record.context["accumulated_cost"]) for record in records) == pytest.approx(8.0)


@pytest.mark.parametrize("state", ["keep", "rebuild"])
async def test_a_paused_worker_goes_on_from_there(broker_url: str, name: str, start: Any, state: str) -> None:
    """Paused, the worker's process stays in the group; moved and resumed, it gives exactly the rows from there on."""
    await asyncio.to_thread(feed, broker_url, name, 0, 120)
    worker = start("flow", 0.0, "stay")
    await until(lambda: worker.poll() is None and len(_rows_if_any(broker_url, f"{name}.out")) == 108)
    async with opened(broker_url) as broker:
        group = Session(name).group
        control = ControlTopic(broker, clock=SystemClock())
        await request(control, group, Wanted.PAUSE, by="the test")
        count = (await broker.topics())[f"{name}.in"].partitions
        tps = [TopicPartition(f"{name}.in", number) for number in range(count)]
        moving = Replay(broker, Session(name), [f"{name}.in"], Target("earliest" if state == "keep" else "current"),
                        state=state)  # type: ignore[arg-type]  # fmt: skip
        execution = await moving.execute()
        assert not execution.failed
        async with asyncio.timeout(30):  # on Kafka a commit's offset may show some time after it was confirmed
            while await broker.committed(group, tps) != {tp: Committed(0) for tp in tps}:
                await asyncio.sleep(0.05)
        assert len(await broker.members(group)) == 1
        await asyncio.sleep(1.0)
        assert len(rows_of(broker_url, f"{name}.out")) == 108, "it is still paused"
        await asyncio.to_thread(feed, broker_url, name, 120, 150)
        await request(control, group, Wanted.RUN, by="the test")
    expected = 108 + 27 + (108 if state == "keep" else 0)
    await until(lambda: len(rows_of(broker_url, f"{name}.out")) >= expected)
    os.kill(worker.pid, signal.SIGTERM)
    await asyncio.to_thread(worker.communicate, timeout=30)
    numbers = Counter(row["n"] for row in rows_of(broker_url, f"{name}.out"))
    again = 2 if state == "keep" else 1
    assert numbers == Counter({n: again if n < 120 else 1 for n in range(150) if n % 10 != 7})
    tables, _ = await changelog(broker_url, name)
    if state == "rebuild":
        assert tables == oracle(150)


def _rows_if_any(url: str, topic: str) -> list[dict[str, Any]]:
    try:
        return rows_of(url, topic)
    except Exception:  # noqa: BLE001 - it is not there yet
        return []
