"""Reading the events topic: what was lately, who is alive, and what comes next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams import events as module
from rowmill.streams.errors import BrokerError, BrokerTimeoutError
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.events import follow_events, recent_events, recent_progress
from rowmill.streams.partitioning import partition_for
from support.fake_broker import FakeBroker, Step, lost
from support.fake_clock import FakeClock
from support.virtual import virtual, virtual_runtime

pytestmark = pytest.mark.timeout(60)

NOW = FakeClock().now_ms()


class Log:
    """A broker with an events topic, and a pen."""

    def __init__(self, partitions: int = 3) -> None:
        self.broker = FakeBroker()
        self.clock = FakeClock()
        self.partitions = partitions
        self.made = False

    def make(self) -> None:
        """Make the topic."""
        self.broker.make(EVENTS_TOPIC, self.partitions)
        self.made = True

    def write(self, kind: str, n: int, ago: float = 0.0, group: str = "rowmill.a", worker: str = "w1") -> None:
        """An event that arrived so many seconds ago; its own clock is one minute slow."""
        if not self.made:
            self.make()
        at_ms = self.clock.now_ms() - round(ago * 1000)
        event = EventRecord(
            kind=kind, at_ms=at_ms - 60_000, pipeline="a", session="live", group=group, worker=worker, data={"n": n}
        )
        self.put(group, event.encode(), at_ms)

    def put(self, group: str, value: bytes | None, at_ms: int) -> None:
        """Any record."""
        tp = TopicPartition(EVENTS_TOPIC, partition_for(group.encode(), self.partitions))
        self.broker.log(tp).append(tp, [Outgoing(group.encode(), value, at_ms)])
        self.broker.wake()

    async def recent(self, ago: float = 15.0, **options: Any) -> list[int]:
        """The numbers of recent events."""
        since_ms = self.clock.now_ms() - round(ago * 1000)
        events = await recent_events(self.broker, since_ms=since_ms, clock=self.clock, **options)
        return [event.data["n"] for event in events]

    async def progress(self, **options: Any) -> dict[str, dict[str, tuple[str, int]]]:
        """Kind and number of the newest word of each worker."""
        found = await recent_progress(self.broker, clock=self.clock, **options)
        return {
            group: {worker: (event.kind, event.data["n"]) for worker, event in workers.items()}
            for group, workers in found.items()
        }


@pytest.fixture
def events() -> Log:
    """An empty one, without the topic."""
    return Log()


async def test_recent_events(events: Log) -> None:
    """Those that arrived since then, whatever their own clocks say; of the groups asked for."""
    events.write("paused", 1, ago=30)
    events.write("paused", 2, ago=10)
    events.write("progress", 3, ago=5)
    events.write("resumed", 4, ago=1, group="rowmill.b")
    assert await events.recent() == [2, 3, 4]
    assert await events.recent(60) == [1, 2, 3, 4]
    assert await events.recent(60, groups=["rowmill.b", "rowmill.c"]) == [4]
    assert await events.recent(60, groups=[]) == []
    assert await events.recent(60, limit=2) == [3, 4]
    assert await events.recent(0) == []


@pytest.mark.parametrize(("room", "kept"), [(10_000, [1, 2, 3, 4, 5, 9]), (3, [3, 4, 5, 9]), (1, [5, 9])])
async def test_a_flood_of_events_is_cut(
    events: Log, monkeypatch: pytest.MonkeyPatch, room: int, kept: list[int]
) -> None:
    """Of each partition only so many bytes are kept, those of its newest events: anybody may write there."""
    for n in range(1, 6):
        events.write("x", n, ago=10 - n)
    events.write("x", 9, ago=1, group="rowmill.b")
    (size, *_) = {len(record.value or b"") for record in events.broker.records(EVENTS_TOPIC)}
    monkeypatch.setattr(module, "_RECENT_BYTES", room * size * events.partitions)
    assert await events.recent() == kept
    found = await recent_events(events.broker, since_ms=0, clock=events.clock)
    assert sum(event.size for event in found) <= room * size * events.partitions


async def test_events_bring_the_brokers_date(events: Log) -> None:
    """When an event was written is told besides what its worker's clock said, which is one minute slow here."""
    events.write("x", 1, ago=10)
    (event,) = await recent_events(events.broker, since_ms=0, clock=events.clock)
    assert (event.written_ms, event.at_ms) == (NOW - 10_000, NOW - 70_000)


async def test_workers_keep_their_order(events: Log) -> None:
    """Partitions are merged by time, and a worker whose clock ran backwards still has its events in their order."""
    events.write("x", 1, ago=10)
    events.write("x", 2, ago=12)
    events.write("x", 3, ago=8, group="rowmill.b")
    events.write("x", 4, ago=7)
    assert partition_for(b"rowmill.a", 3) != partition_for(b"rowmill.b", 3)
    found = await events.recent()
    assert found == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"v":1}',
        b'{"v":"1","type":"x","at":"2026-11-21T18:00:00Z","group":"rowmill.a"}',
        b'{"v":true,"type":"x","at":"2026-11-21T18:00:00Z","group":"rowmill.a"}',
        b'{"v":0,"type":"x","at":"2026-11-21T18:00:00Z","group":"rowmill.a"}',
        b'{"v":1,"type":"","at":"2026-11-21T18:00:00Z","group":"rowmill.a"}',
        b'{"v":1,"type":"x","at":"yesterday","group":"rowmill.a"}',
        b'{"v":1,"type":"x","at":12,"group":"rowmill.a"}',
        b'{"v":1,"type":"x","at":"2026-11-21T18:00:00Z","group":""}',
        b'{"v":1,"type":"x","at":"2026-11-21T18:00:00Z"}',
    ],
)
async def test_what_is_no_event_is_passed_over(events: Log, value: bytes | None) -> None:
    """Anybody may write there; readers go on."""
    events.write("paused", 1)
    events.put("rowmill.a", value, NOW)
    events.write("paused", 2)
    assert await events.recent() == [1, 2]


@pytest.mark.parametrize(
    "value",
    [
        b'{"v":7,"type":"x","at":"2026-11-21T18:00:00Z","group":"rowmill.a","data":{"n":5}}',
        b'{"v":1,"type":"of_tomorrow","at":"2026-11-21T18:00:00","group":"rowmill.a","new":1,"data":{"n":5,"m":[]}}',
        b'{"v":1,"type":"x","at":"2026-11-21T19:00:00+01:00","group":"rowmill.a","pid":"7","host":3,"data":{"n":5}}',
    ],
)
async def test_an_event_of_tomorrow(events: Log, value: bytes) -> None:
    """Newer versions, unknown kinds and fields, and fields of another type than today's are no reason to refuse."""
    events.make()
    events.put("rowmill.a", value, NOW)
    (event,) = await recent_events(events.broker, since_ms=0, clock=events.clock)
    assert (event.data["n"], event.pid, event.host, event.at_ms) == (5, 0, "", 1_795_284_000_000)


async def test_no_topic(events: Log) -> None:
    """Where nothing was ever written nothing is read, and nothing is made."""
    assert await events.recent() == []
    assert await events.progress() == {}
    assert "create" not in events.broker.calls


async def test_the_newest_word_of_each_worker(events: Log) -> None:
    """Progress by group and worker; other kinds do not count, nor does what is long ago."""
    events.write("progress", 1, ago=20, worker="dead")
    events.write("progress", 2, ago=5)
    events.write("progress", 3, ago=4, worker="w2")
    events.write("progress", 4, ago=4)
    events.write("paused", 5, ago=3)
    events.write("paused", 6, ago=3, worker="w3")
    events.write("progress", 7, ago=2, group="rowmill.b")
    assert await events.progress() == {
        "rowmill.a": {"w1": ("progress", 4), "w2": ("progress", 3)},
        "rowmill.b": {"w1": ("progress", 7)},
    }
    assert await events.progress(groups=["rowmill.b"]) == {"rowmill.b": {"w1": ("progress", 7)}}
    assert await events.progress(within_seconds=3) == {"rowmill.b": {"w1": ("progress", 7)}}


@pytest.mark.parametrize("order", [("progress", "worker_stopped"), ("worker_stopped", "progress")])
async def test_a_worker_that_stopped(events: Log, order: tuple[str, str]) -> None:
    """It is not taken for alive, in whatever order its last words arrived."""
    events.write(order[0], 1, ago=3)
    events.write(order[1], 2, ago=2)
    events.write("progress", 3, ago=1, worker="w2")
    found = await recent_progress(events.broker, clock=events.clock)
    assert {worker: event.has_stopped for worker, event in found["rowmill.a"].items()} == {"w1": True, "w2": False}


@pytest.mark.parametrize("step", ["topics", "look_up", "fetch", "position"])
async def test_a_broker_that_stumbles(events: Log, step: Step) -> None:
    """Reading is tried three times in all."""
    events.write("paused", 1)
    events.broker.inject(step, lost(), times=2)
    assert await events.recent() == [1]
    events.broker.inject(step, lost(), times=3)
    with pytest.raises(BrokerError, match="connection lost"):
        await events.recent()


@pytest.mark.parametrize("step", ["topics", "look_up", "fetch"])
async def test_a_broker_that_hangs(events: Log, step: Step) -> None:
    """A deadline covers all of it."""
    events.write("paused", 1)
    events.broker.inject(step, None)
    with pytest.raises(BrokerTimeoutError, match=r"rowmill\.events: no answer within 0\.05 s"):
        await events.recent(timeout=0.05)


async def test_retention_that_is_quicker(events: Log) -> None:
    """Events that are removed between the look-up and the reading are gone; the others are read."""
    for n in range(5):
        events.write("paused", n)
    tp = TopicPartition(EVENTS_TOPIC, partition_for(b"rowmill.a", 3))
    events.broker.inject("fetch", lost(), then=lambda: events.broker.truncate(tp, 3))
    assert await events.recent() == [3, 4]


# --- following ---------------------------------------------------------------------------------------------------


async def take(found: AsyncIterator[EventRecord], count: int) -> list[int]:
    """The numbers of the next events."""
    async with asyncio.timeout(100):
        return [(await anext(found)).data["n"] for _ in range(count)]


def following(work: Any, **options: Any) -> None:
    """Run it on virtual time, with a log and a generator that follows it."""

    async def run() -> None:
        log = Log()
        log.clock = virtual_runtime().clock  # type: ignore[assignment]
        events = follow_events(log.broker, clock=log.clock, **options)
        async with aclosing(events):
            await work(log, events)
        assert not log.broker._readers

    virtual(run)


def test_following() -> None:
    """From the next event on, each once; of the groups asked for."""

    async def work(log: Log, events: AsyncIterator[EventRecord]) -> None:
        log.write("paused", 1)
        first = asyncio.create_task(take(events, 1))
        await asyncio.sleep(5)
        log.write("paused", 2, group="rowmill.b")
        log.write("paused", 3)
        log.write("paused", 4)
        assert await first == [3]
        log.write("paused", 5)
        assert await take(events, 2) == [4, 5]

    following(work, groups=["rowmill.a"])


def test_following_from_a_time() -> None:
    """What was written since then comes first."""

    async def work(log: Log, events: AsyncIterator[EventRecord]) -> None:
        log.write("paused", 1, ago=20)
        log.write("paused", 2, ago=5)
        log.write("paused", 3)
        assert await take(events, 2) == [2, 3]

    following(work, since_ms=1_750_000_000_000 - 10_000)


def test_following_a_topic_that_is_not_there_yet() -> None:
    """It is waited for, and then read from its first event."""

    async def work(log: Log, events: AsyncIterator[EventRecord]) -> None:
        first = asyncio.create_task(take(events, 2))
        await asyncio.sleep(30)
        log.write("paused", 1)
        log.write("paused", 2)
        assert await first == [1, 2]

    following(work)


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
@pytest.mark.parametrize("step", ["topics", "look_up", "fetch"])
def test_following_through_trouble(step: Step, hangs: bool, caplog: pytest.LogCaptureFixture) -> None:
    """No event is missed or seen twice, and the log has one warning."""

    async def work(log: Log, events: AsyncIterator[EventRecord]) -> None:
        log.write("paused", 0)
        seen = asyncio.create_task(take(events, 100))
        await asyncio.sleep(5)
        if step != "fetch":  # the others come after a fetch that failed
            log.broker.inject("fetch", lost(), skip=10)
        log.broker.inject(step, None if hangs else lost(), skip=10 if step == "fetch" else 0, times=3)
        for n in range(1, 100):
            await asyncio.sleep(0.7)
            log.write("paused", n)
        assert await seen == list(range(100))

    following(work, since_ms=0)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_following_what_retention_removes() -> None:
    """A reader that fell behind goes on with the oldest that is there."""

    async def work(log: Log, events: AsyncIterator[EventRecord]) -> None:
        log.write("paused", 0)
        assert await take(events, 1) == [0]
        for n in range(1, 6):
            log.write("paused", n)
        log.write("paused", 9, group="rowmill.b")
        log.broker.truncate(TopicPartition(EVENTS_TOPIC, partition_for(b"rowmill.a", 3)), 4)
        assert sorted(await take(events, 3)) == [4, 5, 9]

    following(work, since_ms=0)
