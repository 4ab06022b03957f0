"""The events topic on real brokers: what workers tell arrives, and nothing that happens to it reaches the data path."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rowmill import Budget, CircuitBreaker, Pipeline, Retry, open_broker
from rowmill.handlers.runtime import Event
from rowmill.state.clock import SystemClock
from rowmill.state.errors import RowmillError
from rowmill.streams.brokers.base import Broker
from rowmill.streams.client import publish_input
from rowmill.streams.collect import partitions_of, read_topic
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.events import EventPublisher, follow_events, recent_events, recent_progress
from rowmill.streams.inputs import make_input
from rowmill.streams.options import WorkerOptions
from rowmill.streams.session import Session
from rowmill.streams.snapshots import WorkerSnapshot
from rowmill.streams.worker import Worker
from support.kafka_server import KafkaServer, kafka_tool

pytestmark = pytest.mark.timeout(180)

CLOCK = SystemClock()
ROWMILL = str(Path(sys.executable).with_name("rowmill"))


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    """A started broker."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


def snapshot() -> WorkerSnapshot:
    """How a worker without work stands."""
    return WorkerSnapshot(
        worker="w1", state="running", at_ms=CLOCK.now_ms(), started_ms=1, totals={"rows": 0}, stages={}, breakers={}
    )


def publisher_of(broker: Broker, name: str, clock: SystemClock = CLOCK, **options: Any) -> EventPublisher:
    """A publisher for a pipeline's live session."""
    return EventPublisher(broker, Session(name), "w1", snapshot, clock=clock, **options)


def tell(publisher: EventPublisher, *numbers: int, kind: str = "breaker_open") -> None:
    """Events with these numbers."""
    for n in numbers:
        publisher.hear(Event(kind, "scorer", {"n": n}))


async def found(broker: Broker, name: str) -> list[EventRecord]:
    """All events of a pipeline's live session but progress."""
    events = await recent_events(broker, since_ms=0, groups=[f"rowmill.{name}"], clock=CLOCK, timeout=30)
    return [event for event in events if event.kind != "progress"]


async def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait for something, with a deadline."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def beating() -> AsyncIterator[list[float]]:
    """Measures meanwhile how late the event loop is: the list has every turn's delay in seconds."""
    late: list[float] = []

    async def beat() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            late.append(time.monotonic() - before - 0.01)

    task = asyncio.create_task(beat())
    try:
        yield late
    finally:
        task.cancel()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process's write that does not end: nothing can be written to the embedded broker."""
    (file,) = folder.glob("*.db")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=10)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


# --- there and back ----------------------------------------------------------------------------------------------


async def test_what_is_told_arrives(broker_url: str, name: str) -> None:
    """Events and progress reach readers of a while ago, of now, and of the future, in their order."""
    async with opened(broker_url) as broker:
        publisher = publisher_of(broker, name)
        group = f"rowmill.{name}"
        events = follow_events(broker, groups=[group], since_ms=CLOCK.now_ms() - 5_000, clock=CLOCK)
        async with aclosing(events):
            await publisher.start()
            tell(publisher, *range(50))
            async with asyncio.timeout(30):
                followed = [await anext(events) for _ in range(51)]
            progress = await recent_progress(broker, groups=[group], clock=CLOCK)
            await publisher.close(snapshot())
        numbers = [event.data["n"] for event in followed if event.kind == "breaker_open"]
        assert numbers == list(range(50))
        assert progress[group]["w1"].data["events_dropped"] == 0
        assert [event.data["n"] for event in await found(broker, name)] == list(range(50))
        assert (publisher.sent, publisher.dropped) == (publisher.told, 0)
        assert len(await partitions_of(broker, [EVENTS_TOPIC])) == (1 if broker.folder else 3)


async def test_a_worker_that_stopped(broker_url: str, name: str) -> None:
    """Its last progress stands before its last word, and it does not count as alive."""
    async with opened(broker_url) as broker:
        publisher = publisher_of(broker, name)
        await publisher.start()
        tell(publisher, 1, kind="worker_stopped")
        await publisher.close(snapshot())
        group = f"rowmill.{name}"
        found = await recent_events(broker, since_ms=0, groups=[group], clock=CLOCK, timeout=30)
        assert [event.kind for event in found] == ["progress", "worker_stopped"]
        assert (await recent_progress(broker, groups=[group], clock=CLOCK))[group]["w1"].has_stopped


class FastClock(SystemClock):
    """Two hours ahead."""

    def now_ms(self) -> int:
        return super().now_ms() + 7_200_000


async def test_a_clock_that_runs_fast(broker_url: str, name: str) -> None:
    """Kafka refuses records from an hour ahead on; this topic takes them, dated by its own clock."""
    async with opened(broker_url) as broker:
        publisher = publisher_of(broker, name, FastClock())
        await publisher.start()
        tell(publisher, 1)
        await publisher.close()
        (event,) = await found(broker, name)
        assert abs(event.at_ms - CLOCK.now_ms() - 7_200_000) < 60_000
        if broker.folder is None:
            soon_ms = CLOCK.now_ms() + 600_000
            assert await recent_events(broker, since_ms=soon_ms, clock=CLOCK) == []


def per_call(publisher: EventPublisher, kind: str, calls: int, costs: list[float]) -> None:
    """Tell events in this thread; the CPU time of a call in microseconds, for each thousand."""
    event = Event(kind, "score", {"type": "ValueError", "message": "boom"})
    for _ in range(calls // 1000):
        before = time.thread_time_ns()
        for _ in range(1000):
            publisher.hear(event)
        costs.append((time.thread_time_ns() - before) / 1e6)


@pytest.mark.alone
async def test_telling_costs_next_to_nothing(broker_url: str, name: str) -> None:
    """100,000 events from four threads: at most 3 µs each, all accounted for, and the loop goes on meanwhile."""
    async with opened(broker_url) as broker:
        publisher, costs = publisher_of(broker, name), list[float]()
        await publisher.start()
        await until(lambda: publisher.sent)
        threads = [
            threading.Thread(target=per_call, args=(publisher, kind, 25_000, costs))
            for kind in ("row_failed", "row_failed", "breaker_open", "mine")
        ]
        began = time.monotonic()
        async with beating() as late:
            for thread in threads:
                thread.start()
            await until(lambda: not any(thread.is_alive() for thread in threads))
        seconds = time.monotonic() - began
        await publisher.close(snapshot())
        written = await found(broker, name)
        costs.sort()
        print(
            f"hear: {costs[len(costs) // 2]:.2f} µs (median), {costs[0]:.2f} to {costs[-1]:.2f} µs; "
            f"{seconds:.2f} s in all; the loop was at most {max(late) * 1000:.0f} ms late"
        )
        assert costs[0] <= 3
        assert max(late) < 1
        assert publisher.told == publisher.sent + publisher.dropped
        assert publisher.told - 100_000 == publisher.sent - len(written)  # progress
        assert 120 <= len(written) <= 120 * (seconds + 2)


# --- brokers that are away -----------------------------------------------------------------------------------------


@pytest.mark.alone
async def test_kafka_goes_away_and_comes_back(kafka_server: Callable[..., KafkaServer], name: str) -> None:
    """Killed for some seconds: events told meanwhile arrive in order, none twice, and the loop never stands still."""
    server = kafka_server()
    async with opened(f"kafka://{server.bootstrap}") as broker:
        publisher = publisher_of(broker, name)
        await publisher.start()
        tell(publisher, *range(10))
        await until(lambda: publisher.sent >= 10)
        async with beating() as late:
            await asyncio.to_thread(server.kill)
            for n in range(10, 50):
                tell(publisher, n)
                await asyncio.sleep(0.1)
            await asyncio.to_thread(server.start)
            sent = publisher.sent
            await until(lambda: publisher.sent > sent + 2, 60)
            tell(publisher, 50)
            await until(lambda: publisher.sent + publisher.dropped == publisher.told, 60)
        await publisher.close(snapshot())
        numbers = [event.data["n"] for event in await found(broker, name)]
        print(f"away: {publisher.dropped} dropped of {publisher.told}, the loop {max(late) * 1000:.0f} ms late")
        assert max(late) < 1
        assert numbers == sorted(set(numbers))
        assert numbers[:10] == list(range(10))
        assert numbers[-1] == 50
        assert publisher.told == publisher.sent + publisher.dropped
        assert 51 - len(numbers) <= publisher.dropped <= 51  # at most what was under way, acknowledged or not


@pytest.mark.alone
async def test_the_end_while_kafka_hangs(kafka_server: Callable[..., KafkaServer], name: str) -> None:
    """Two seconds after it was asked for it is over, with what could not be written counted."""
    server = kafka_server()
    async with opened(f"kafka://{server.bootstrap}") as broker:
        publishers = [publisher_of(broker, f"{name}-{n}") for n in range(2)]
        for publisher in publishers:
            await publisher.start()
        await until(lambda: all(publisher.sent for publisher in publishers))
        server.suspend()
        try:
            tell(publishers[0], 1, 2, 3)
            await asyncio.sleep(1)  # one is in the middle of it, the other has only just been told
            tell(publishers[1], 1, 2, 3)
            for publisher in publishers:
                before = time.monotonic()
                await publisher.close(snapshot())
                took = time.monotonic() - before
                print(f"closed in {took:.2f} s")
                assert took < 2.5
                assert publisher.told == publisher.sent + publisher.dropped
                assert publisher.dropped >= 3
        finally:
            server.resume()
        await until(lambda: not any(publisher._leaving for publisher in publishers))  # their producers, late


@pytest.mark.alone
async def test_an_embedded_broker_that_is_locked(tmp_path: Path, name: str) -> None:
    """While another process writes, events wait, the loop goes on, and the end comes in time."""
    async with opened(f"local://{tmp_path}/broker") as broker:
        publisher, other = publisher_of(broker, name), publisher_of(broker, f"{name}-other")
        for each in (publisher, other):
            await each.start()
        await until(lambda: publisher.sent and other.sent)
        async with beating() as late:
            with locked(tmp_path / "broker"):
                tell(publisher, 1, 2, 3)
                tell(other, 1, 2, 3)
                await asyncio.sleep(1)
                before = time.monotonic()
                await other.close(snapshot())
                assert time.monotonic() - before < 2.5
            tell(publisher, 4)
            await publisher.close(snapshot())
        assert max(late) < 1
        assert [event.data["n"] for event in await found(broker, name)] == [1, 2, 3, 4]
        assert (publisher.dropped, other.told) == (0, other.sent + other.dropped)


# --- a whole life --------------------------------------------------------------------------------------------------


def scoring(name: str, **options: Any) -> Pipeline:
    """A stage that fails for good at row 7, and three times in a row at row 20."""
    down = 3
    pipeline = Pipeline(name, sink=f"{name}.out", ordering="partition", budget=options.pop("budget", None))
    breaker = CircuitBreaker(failures=3, open_for=0.3, name="scorer")
    retry = Retry(attempts=9, first=0.05, on=(ConnectionError,))

    @pipeline.stage(breaker=breaker, retry=retry, price="0.01", **options)
    async def score(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal down
        await asyncio.sleep(0.005)
        if row["n"] == 7:
            raise ValueError("row 7 has no text")
        if row["n"] >= 20 and down:
            down -= 1
            raise ConnectionError("the scorer does not answer")
        return row

    return pipeline


async def live(broker: Broker, name: str, ends: dict[Any, int]) -> None:
    """A live worker: rows fail, a breaker opens, it is paused and goes on, and stops."""
    worker = Worker(scoring(name), broker, steered=True)
    run = asyncio.create_task(worker.run())
    await until(lambda: run.done() or worker.stats.rows == 40)
    worker.pause()
    await until(lambda: run.done() or worker.state == "paused")
    await asyncio.sleep(1.2)
    worker.unpause()
    await until(lambda: run.done() or worker.state == "running")
    await asyncio.sleep(1.2)
    worker.stop()
    await run


async def bounded(broker: Broker, name: str, ends: dict[Any, int], **options: Any) -> None:
    """A session with an end."""
    session = Session(name, options.pop("session"))
    worker = Worker(scoring(name, **options), broker, session=session, steered=True, bounded=True)
    worker.finish_at(ends)
    with contextlib.suppress(RowmillError):
        await worker.run()


async def cancelled(broker: Broker, name: str, ends: dict[Any, int]) -> None:
    """A session that is cancelled in the middle of a row."""
    pipeline, begun = Pipeline(name, sink=f"{name}.out"), asyncio.Event()

    @pipeline.stage
    async def wait(row: dict[str, Any]) -> None:
        begun.set()
        await asyncio.sleep(60)

    worker = Worker(
        pipeline, broker, session=Session(name, "slow"), steered=True, options=WorkerOptions(drain_timeout=2)
    )
    run = asyncio.create_task(worker.run())
    await begun.wait()
    worker.cancel()
    await run


async def test_a_workers_life(broker_url: str, name: str, tmp_path: Path) -> None:
    """What real workers tell is what the documentation says: every kind, each with these fields and no others."""
    from support.event_docs import KINDS, check, examples, first_of_each, shape

    async with opened(broker_url) as broker:
        rows = make_input([{"n": n} for n in range(40)], None)
        await publish_input(broker, name, rows, clock=CLOCK, partitions=1)
        ends = await broker.offsets(await partitions_of(broker, [name]), "end")
        await live(broker, name, ends)
        await bounded(broker, name, ends, session="whole")
        await bounded(broker, name, ends, session="dear", budget=Budget("0.20"))
        await bounded(broker, name, ends, session="strict", on_error="fail")
        await cancelled(broker, name, ends)
        told = await recent_events(broker, since_ms=0, clock=CLOCK, timeout=30)
    events = [event.to_dict() for event in told if event.pipeline == name]
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    for event in events:
        check(event)
    first = first_of_each(events)
    elsewhere = {"budget_resumed", "budget_unreachable", "budget_reachable"}  # see the unit tests
    assert first.keys() == KINDS - elsewhere
    described = examples()
    busy = [event for event in events if event["type"] == "progress" and event["data"]["stages"]]
    for kind, event in first.items():
        if kind == "progress":
            assert set().union(*map(shape, busy)) == shape(described[kind])
        elif kind != "breaker_open":  # has several forms
            assert shape(event) == shape(described[kind]), kind
    reasons = {event["data"]["reason"] for event in events if event["type"] == "worker_stopped"}
    assert reasons == {"stopped", "finished", "row", "failed", "cancelled"}


# --- other people's readers ----------------------------------------------------------------------------------------


async def test_rowmill_consume(broker_url: str, name: str) -> None:
    """``rowmill consume rowmill.events`` prints events, and with --follow those to come."""
    async with opened(broker_url) as broker:
        publisher = publisher_of(broker, name)
        await publisher.start()
        await until(lambda: publisher.sent)
        where = ["consume", EVENTS_TOPIC, "--broker", broker_url]
        following = subprocess.Popen([ROWMILL, *where, "--follow"], stdout=subprocess.PIPE, text=True)
        try:
            assert following.stdout is not None
            tell(publisher, 1, 2, 3)
            async with asyncio.timeout(60):
                lines = list[str]()
                while len(lines) < 3:
                    line = await asyncio.to_thread(following.stdout.readline)
                    assert line, f"it ended with {following.wait(10)}"
                    lines += [line] if name in line and "breaker_open" in line else []
        finally:
            following.kill()
            following.communicate()
        await publisher.close()
        assert [json.loads(line)["data"]["n"] for line in lines] == [1, 2, 3]
        done = await asyncio.to_thread(
            subprocess.run, [ROWMILL, *where, "--limit", "2"], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr


async def test_kafkas_own_tools(kafka: str, name: str) -> None:
    """Kafka's console consumer reads the topic, and its configs tool tells the settings that the page lists."""
    async with opened(f"kafka://{kafka}") as broker:
        publisher = publisher_of(broker, name)
        await publisher.start()
        tell(publisher, 1, 2, 3)
        await publisher.close()
        there = sum([len(records) async for records in read_topic(broker, EVENTS_TOPIC)])
        printed = await asyncio.to_thread(
            kafka_tool,
            "console-consumer",
            *("--bootstrap-server", kafka, "--topic", EVENTS_TOPIC, "--from-beginning"),
            *("--max-messages", str(there), "--timeout-ms", "30000"),
        )
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and name in line]
        assert [line["data"]["n"] for line in lines] == [1, 2, 3]
        described = await asyncio.to_thread(
            kafka_tool,
            "configs",
            *("--bootstrap-server", kafka, "--describe", "--entity-type", "topics", "--entity-name", EVENTS_TOPIC),
        )
        for setting in (
            "compression.type=gzip",
            "cleanup.policy=delete",
            "message.timestamp.type=LogAppendTime",
            "retention.bytes=268435456",
            "retention.ms=604800000",
            "segment.bytes=33554432",
            "segment.ms=86400000",
        ):
            assert f"{setting} " in described
