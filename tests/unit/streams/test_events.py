"""Events are written in the background: capped, counted, never in anybody's way, whatever the broker does."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from rowmill.handlers.runtime import Event, Runtime
from rowmill.state.clock import SystemClock
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams import events as module
from rowmill.streams.brokers.base import Producer
from rowmill.streams.errors import BrokerError, TopicError
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.events import CLOSE_SECONDS, QUEUE_EVENTS, events_topic
from rowmill.streams.partitioning import partition_for
from rowmill.streams.snapshots import WorkerSnapshot
from support.event_bench import EventBench, on_bench
from support.fake_broker import FakeBroker, FakeProducer, Step, lost
from support.virtual import virtual

pytestmark = pytest.mark.timeout(60)

GROUP = "rowmill.reviews"
STEPS: list[Step] = ["topics", "create", "send", "ack"]
"""Where a publisher's broker can fail, in the order in which it comes there."""


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged at WARNING and above."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- what is written ---------------------------------------------------------------------------------------------


def test_what_is_told_is_written() -> None:
    """Events are in the topic within a round, in their order, in the partition of their group, dated by the worker."""

    async def work(bench: EventBench) -> None:
        await asyncio.sleep(0.1)
        told_ms = bench.clock.now_ms()
        bench.tell(3)
        bench.tell(kind="paused")
        await asyncio.sleep(0.3)
        assert bench.numbers() == [0, 1, 2, 0]
        assert {(event.at_ms, event.group, event.worker, event.session, event.subject) for event in bench.events()} == {
            (told_ms, GROUP, "5e2c01aa", "live", "scorer")
        }
        number = partition_for(GROUP.encode(), 3)
        assert {(record.key, record.partition) for record in bench.broker.records(EVENTS_TOPIC)} == {
            (GROUP.encode(), number)
        }
        # Dated by when it was sent, so that times in the log never run backwards.
        assert bench.broker.records(EVENTS_TOPIC)[0].timestamp > told_ms

    on_bench(work)


def test_progress_comes_once_per_second() -> None:
    """With the worker's snapshot, and what was dropped so far."""

    async def work(bench: EventBench) -> None:
        bench.tell(60)
        await asyncio.sleep(10.1)
        progress = bench.events("progress")
        assert len(progress) == 10
        assert {b.at_ms - a.at_ms for a, b in pairwise(progress)} <= {999, 1000, 1001}
        expected = {**bench.snapshot().to_dict(), "events_dropped": 10}
        for event in progress:
            assert {**event.data, "started_ms": 0} == {**expected, "started_ms": 0}

    on_bench(work)


@pytest.mark.parametrize("folder", [None, "here"])
def test_the_topic(folder: str | None, tmp_path: Any) -> None:
    """Three partitions on Kafka and one embedded, bounded by time and size, dated by the broker."""
    broker = FakeBroker()
    broker.folder = tmp_path if folder else None
    spec = events_topic(broker)
    assert spec.partitions == (1 if folder else 3)
    assert spec.config["cleanup.policy"] == "delete"
    assert spec.config["retention.ms"] == "604800000"
    assert spec.config["retention.bytes"] == str((64 if folder else 256) * 1024 * 1024)
    assert spec.config["message.timestamp.type"] == "LogAppendTime"


def test_a_topic_that_is_there_stays_as_it_is() -> None:
    """Somebody made it with other settings: these hold, and its number of partitions counts."""
    broker = FakeBroker()
    broker.make(EVENTS_TOPIC, 7)

    async def work(bench: EventBench) -> None:
        bench.tell()
        await asyncio.sleep(0.3)
        assert "create" not in broker.calls
        assert broker.records(EVENTS_TOPIC)[0].partition == partition_for(GROUP.encode(), 7)

    on_bench(work, broker=broker)


# --- caps and bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cap"), [("row_failed", 20), ("breaker_open", 50), ("of_tomorrow", 50)])
def test_a_kind_has_so_many_per_second(kind: str, cap: int) -> None:
    """The first ones of each second are written; the others are counted, and progress tells of them."""

    async def work(bench: EventBench) -> None:
        await asyncio.sleep(0.1)
        bench.tell(100, kind)
        bench.tell(10, "paused")
        await asyncio.sleep(0.8)
        bench.tell(1, kind)
        assert bench.publisher.dropped == 101 - cap
        await asyncio.sleep(0.2)
        bench.tell(100, kind)
        await asyncio.sleep(1.2)
        assert bench.numbers(kind) == [*range(cap), *range(cap)]
        assert len(bench.events("paused")) == 10
        assert bench.events("progress")[-1].data["events_dropped"] == bench.publisher.dropped == 201 - 2 * cap

    on_bench(work)


def test_kinds_are_few() -> None:
    """Whoever makes a kind of each row's id gets as many as there are kinds, and no more, in a second."""

    async def work(bench: EventBench) -> None:
        for n in range(1000):
            bench.tell(kind=f"row_{n}")
        await asyncio.sleep(0.3)
        assert len(bench.events()) == 200

    on_bench(work)


def test_the_queue_keeps_the_newest() -> None:
    """While the broker is away the oldest events make room, and what is in the topic then goes up to the present."""

    async def work(bench: EventBench) -> None:
        bench.broker.inject("topics", lost(), times=100)
        for second in range(60):
            for n in range(50):
                bench.tell(n=second * 50 + n)
            await asyncio.sleep(1.0)
        assert len(bench.publisher._waiting) == QUEUE_EVENTS
        bench.broker._faults.clear()
        await asyncio.sleep(10)
        assert bench.numbers() == list(range(3000 - QUEUE_EVENTS, 3000))
        assert bench.publisher.dropped == 3000 - QUEUE_EVENTS

    on_bench(work)


def test_the_queue_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few but large events are dropped by their size."""
    monkeypatch.setattr(module, "QUEUE_BYTES", 50_000)

    async def work(bench: EventBench) -> None:
        bench.tell(20, text=["x" * 1000] * 7)
        assert 43_000 < bench.publisher._waiting_bytes <= 50_000
        await asyncio.sleep(0.3)
        assert bench.publisher._waiting_bytes == 0
        assert bench.numbers() == [14, 15, 16, 17, 18, 19]

    on_bench(work)


# --- events that are odd -----------------------------------------------------------------------------------------


class Rude:
    """What cannot even be shown."""

    def __str__(self) -> str:
        raise ValueError("no")


def circle() -> dict[str, Any]:
    """A dict that holds itself."""
    found: dict[str, Any] = {}
    found["again"] = found
    return found


@pytest.mark.parametrize(
    ("detail", "data"),
    [
        ({"cost": Decimal("0.50")}, {"cost": "0.50"}),
        ({"file": "caf\udce9"}, {"file": "caf?"}),
        ({"tps": {("in", 1)}}, {"tps": [["in", 1]]}),
        ({1: 2**70, "x": 2**63}, {"1": str(2**70), "x": 2**63}),
        ({"what": ValueError("boom")}, {"what": "boom"}),
        ({"text": "x" * 10_000}, {"text": "x" * 1999 + "…"}),
        ({"list": list(range(5000))}, {"list": list(range(1000))}),
        ({"nan": float("nan")}, {"nan": None}),
        (None, {}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_details_become_json(detail: Any, data: Any) -> None:
    """What JSON has no form for becomes text, and what is long is cut short: an event is not lost for its details."""

    async def work(bench: EventBench) -> None:
        bench.publisher.hear(Event("odd", "scorer", detail))
        await asyncio.sleep(0.3)
        assert [event.data for event in bench.events()] == [data]

    on_bench(work)


@pytest.mark.parametrize("depth", [3, 1000], ids=["a circle", "a tower"])
def test_details_that_never_end(depth: int) -> None:
    """A circle and a tower are cut where they get deep."""
    tower = circle() if depth == 3 else {}
    for _ in range(depth if depth > 3 else 0):
        tower = {"down": tower}

    async def work(bench: EventBench) -> None:
        bench.publisher.hear(Event("odd", "scorer", tower))
        await asyncio.sleep(0.3)
        assert len(bench.broker.records(EVENTS_TOPIC)[0].value or b"") < 5_000
        assert len(bench.events()) == 1

    on_bench(work)


@pytest.mark.parametrize(
    "event",
    [
        None,
        Event("odd", "scorer", {"x": Rude()}),
        Event("odd", Rude(), {}),  # type: ignore[arg-type]
        Event([], "scorer", {}),  # type: ignore[arg-type]
        Event("odd", "scorer", {str(n): ["€" * 2000] * 1000 for n in range(10)}),
    ],
    ids=["none", "rude detail", "rude subject", "no kind", "too large"],
)
def test_hear_never_raises(event: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An event that cannot be made counts as dropped; a warning says so once, and the next ones are written."""

    async def work(bench: EventBench) -> None:
        for _ in range(3):
            bench.publisher.hear(event)
        bench.tell()
        await asyncio.sleep(0.3)
        assert (bench.publisher.dropped, bench.numbers()) == (3, [0])

    on_bench(work)
    assert [line.partition(":")[0] for line in warnings(caplog)] == [
        "an event could not be made, and is counted as dropped; so are others"
    ]


def test_details_may_change_afterwards() -> None:
    """An event says what was so when it was told."""

    async def work(bench: EventBench) -> None:
        detail = {"n": 1}
        bench.publisher.hear(Event("odd", "scorer", detail))
        detail["n"] = 2
        await asyncio.sleep(0.3)
        assert bench.numbers() == [1]

    on_bench(work)


def test_a_snapshot_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A bug there costs the progress, and no other event."""

    def fail() -> WorkerSnapshot:
        raise KeyError("bug")

    async def work(bench: EventBench) -> None:
        bench.publisher._snapshot = fail
        bench.tell(3)
        await asyncio.sleep(2.6)
        assert (bench.numbers(), bench.events("progress"), bench.publisher.dropped) == ([0, 1, 2], [], 3)

    on_bench(work)
    assert len(warnings(caplog)) == 1


def test_progress_that_is_too_large() -> None:
    """With thousands of partitions, it comes without them and says so."""

    async def work(bench: EventBench) -> None:
        bench.partitions = 6000
        await asyncio.sleep(0.6)
        data = bench.events("progress")[0].data
        assert (data["partitions"], data["partitions_left_out"], data["in_flight"]) == ([], 6000, 64)
        bench.partitions = 1000
        await asyncio.sleep(1)
        assert len(bench.events("progress")[-1].data["partitions"]) == 1000

    on_bench(work)


# --- trouble -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
@pytest.mark.parametrize("step", STEPS)
def test_the_broker_comes_back(step: Step, hangs: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Events told meanwhile are written then, in order and once; what was being written when it failed is given up."""

    async def work(bench: EventBench) -> None:
        bench.broker.inject(step, None if hangs else lost(), times=3)
        for n in range(150):
            bench.tell(n=n)
            await asyncio.sleep(0.4)
        await asyncio.sleep(0.3)
        numbers, dropped = bench.numbers(), bench.publisher.dropped
        assert numbers == sorted(set(numbers))
        missing = set(range(150)) - set(numbers)
        if step == "send":  # three lots, and progress in some of them
            assert missing
            assert 1 <= dropped - len(missing) <= 3
            assert max(missing) < 120
        elif step == "ack":  # nobody can know that they are there
            assert (missing, dropped >= 3) == (set(), True)
        else:
            assert (missing, dropped) == (set(), 0)

    on_bench(work)
    assert [line.partition(":")[0] for line in warnings(caplog)] == [f"events are not written to {EVENTS_TOPIC}"]


def test_pauses_grow() -> None:
    """A broker that stays away is asked less and less often, and at least every five seconds."""

    async def work(bench: EventBench) -> None:
        bench.broker.inject("topics", lost(), times=1000)
        await asyncio.sleep(60)
        early = bench.broker.calls.count("topics")
        await asyncio.sleep(600)
        late = bench.broker.calls.count("topics") - early
        assert 600 / 5 <= late < 600 / 2

    on_bench(work)


@pytest.mark.parametrize("reason", ["the broker refuses", "creation is off"])
def test_a_topic_that_may_not_be_made(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """One warning with the remedy; events count as dropped; once somebody makes the topic they are written."""

    async def work(bench: EventBench) -> None:
        bench.broker.creation_allowed = reason == "creation is off"
        for _ in range(100):
            bench.tell()
            await asyncio.sleep(1)
        assert 95 <= bench.publisher.dropped <= 100
        assert bench.publisher.sent == 0
        assert bench.broker.calls.count("topics") <= 7
        bench.broker.make(EVENTS_TOPIC)
        await asyncio.sleep(31)
        bench.tell()
        await asyncio.sleep(1)
        assert bench.events()
        assert bench.events("progress")[-1].data["events_dropped"] == bench.publisher.dropped

    on_bench(work, create=reason != "creation is off")
    assert len(warnings(caplog)) == 1
    assert ("drop --no-create-topics" in warnings(caplog)[0]) == (reason == "creation is off")


def test_a_topic_that_is_deleted_is_made_anew(caplog: pytest.LogCaptureFixture) -> None:
    """What was being written is lost, what comes then is not."""

    async def work(bench: EventBench) -> None:
        await asyncio.sleep(2)
        await bench.broker.delete_topics([EVENTS_TOPIC])
        bench.tell(n=1)
        await asyncio.sleep(0.5)
        bench.tell(n=2)
        await asyncio.sleep(1)
        assert bench.numbers() == [2]

    on_bench(work)
    assert len(warnings(caplog)) == 1


def test_writing_that_is_refused() -> None:
    """A topic that is there and may not be written is tried anew every half minute."""

    async def work(bench: EventBench) -> None:
        bench.broker.inject("send", TopicError("not allowed"), times=1000)
        await asyncio.sleep(600)
        assert 15 <= bench.broker.calls.count("send") <= 45

    on_bench(work)


def test_nobody_is_told_through_a_listener_that_waits() -> None:
    """A runtime with a publisher among its listeners tells on while the broker hangs."""

    async def work(bench: EventBench) -> None:
        loop = asyncio.get_running_loop()
        bench.broker.inject("send", None, times=10)
        await asyncio.sleep(1)
        before = loop.time()
        bench.tell(1000)
        assert loop.time() == before

    on_bench(work)


# --- the end -----------------------------------------------------------------------------------------------------


def test_the_end() -> None:
    """What waits is written, the last progress stands before the word that the worker stopped, later events count."""

    async def work(bench: EventBench) -> None:
        await asyncio.sleep(1)
        bench.tell(3)
        bench.tell(1, "worker_stopped")
        bench.tell(1, "session_completed")
        bench.stages = {"last": {}}
        await bench.publisher.close(bench.snapshot())
        kinds = [event.kind for event in map(EventRecord.decode, bench.broker.values(EVENTS_TOPIC)) if event]
        assert kinds[-6:] == [*["breaker_open"] * 3, "progress", "worker_stopped", "session_completed"]
        assert bench.events("progress")[-1].data["stages"] == {"last": {}}
        assert bench.publisher.dropped == 0
        bench.tell(5)
        assert bench.publisher.dropped == 5
        await bench.publisher.close(bench.snapshot())
        assert len(bench.broker.values(EVENTS_TOPIC)) == bench.publisher.sent

    on_bench(work)


class Stubborn(FakeProducer):
    """Never closes."""

    async def close(self) -> None:
        await asyncio.Event().wait()


class StubbornBroker(FakeBroker):
    """Has producers that never close."""

    def producer(self) -> FakeProducer:
        return Stubborn(self)


@pytest.mark.parametrize("stubborn", [False, True], ids=["", "the producer does not close either"])
@pytest.mark.parametrize("hung_before", [False, True], ids=["at the end", "already before"])
@pytest.mark.parametrize("step", STEPS)
def test_the_end_comes_in_time(step: Step, hung_before: bool, stubborn: bool) -> None:
    """Within two seconds, wherever the broker hangs; what is not written counts as dropped."""
    broker = StubbornBroker() if stubborn else FakeBroker()

    async def work(bench: EventBench) -> None:
        if hung_before or step in {"topics", "create"}:
            broker.inject(step, None, times=100)
        await asyncio.sleep(5 if hung_before else 0.1)
        if not hung_before:
            broker.inject(step, None, times=100)
        bench.tell(50)
        before = asyncio.get_running_loop().time()
        await bench.publisher.close(bench.snapshot())
        assert asyncio.get_running_loop().time() - before <= CLOSE_SECONDS + 0.01
        assert bench.is_settled
        assert bench.publisher.dropped >= 50

    on_bench(work, broker=broker)


def test_the_end_without_a_beginning() -> None:
    """A worker that fails before it starts to write has told things; they count as dropped."""

    async def work() -> None:
        bench = EventBench()
        bench.tell(7)
        await bench.publisher.close(bench.snapshot())
        assert (bench.publisher.told, bench.publisher.dropped) == (7, 7)
        await bench.publisher.start()
        assert bench.broker.calls == []

    virtual(work)


def test_the_beginning_waits_for_nobody() -> None:
    """``start`` returns at once, with a broker that does not answer."""

    async def work() -> None:
        bench = EventBench()
        bench.broker.inject("topics", None, times=100)
        await bench.publisher.start()
        await bench.publisher.start()
        assert asyncio.get_running_loop().time() < 0.001
        await bench.publisher.close()

    virtual(work)


def test_a_producer_that_cannot_be_started() -> None:
    """It is closed, and another one is tried."""
    made: list[Unwilling] = []

    class Unwilling(FakeProducer):
        closed = False

        async def start(self) -> None:
            if len(made) < 3:
                raise BrokerError("no")

        async def close(self) -> None:
            self.closed = True
            raise BrokerError("not even that")

    class Reluctant(FakeBroker):
        def producer(self) -> FakeProducer:
            made.append(Unwilling(self))
            return made[-1]

    async def work(bench: EventBench) -> None:
        bench.tell()
        await asyncio.sleep(2)
        assert bench.numbers() == [0]
        assert [producer.closed for producer in made] == [True, True, False]

    on_bench(work, broker=Reluctant())
    assert all(producer.closed for producer in made)


# --- threads -----------------------------------------------------------------------------------------------------


async def test_events_come_from_any_thread() -> None:
    """100,000 events from four threads at once, on a loop that goes on: told = sent + dropped, to the last one."""
    bench = EventBench(clock=SystemClock())
    kinds = ["row_failed", "breaker_open", "budget_warning", "mine"]
    threads = [threading.Thread(target=bench.tell, args=(25_000, kind)) for kind in kinds]
    await bench.publisher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    await bench.publisher.close()
    progress = len(bench.events("progress"))
    assert bench.publisher.told == 100_000 + progress
    assert bench.publisher.sent == len(bench.broker.values(EVENTS_TOPIC)) == len(bench.events()) + progress
    assert bench.is_settled
    for kind in kinds:
        numbers = bench.numbers(kind)
        assert numbers == sorted(set(numbers))
        assert len(numbers) >= 20


async def test_no_event_slips_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that change places all the time, and a writer that takes what waits a thousand times a second."""
    monkeypatch.setattr(module, "MOST_PER_SECOND", 10**9)
    monkeypatch.setattr(module, "_ROUND_SECONDS", 0.001)
    usual = sys.getswitchinterval()
    bench = EventBench(clock=SystemClock())
    threads = [threading.Thread(target=bench.tell, args=(2_000, kind)) for kind in "abcd"]
    await bench.publisher.start()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.001)
    finally:
        sys.setswitchinterval(usual)
    await bench.publisher.close()
    assert bench.is_settled
    assert bench.publisher.sent == len(bench.broker.values(EVENTS_TOPIC))


async def test_a_runtime_tells_it() -> None:
    """``hear`` is a listener of a runtime: what a breaker tells is written."""
    bench = EventBench(clock=SystemClock())
    runtime = Runtime(None)  # type: ignore[arg-type]
    runtime.listeners.append(bench.publisher.hear)
    await bench.publisher.start()
    runtime.tell(Event("breaker_open", "scorer", {"failures": 5, "open_for": 30.0}))
    await bench.publisher.close()
    (event,) = bench.events()
    assert (event.kind, event.subject, event.data) == ("breaker_open", "scorer", {"failures": 5, "open_for": 30.0})


def test_a_producer_is_a_producer() -> None:
    """The producer is an idempotent one without transactions: events wait for no row, and no row for them."""
    made: list[Producer] = []

    class Watched(FakeBroker):
        def producer(self) -> FakeProducer:
            made.append(super().producer())
            return made[-1]  # type: ignore[return-value]

        def transactional_producer(self, transactional_id: str, *, timeout: float | None = None) -> Any:
            raise AssertionError

    async def work(bench: EventBench) -> None:
        await asyncio.sleep(5)
        assert len(made) == 1

    on_bench(work, broker=Watched())


def test_a_gap_in_time() -> None:
    """A process that stood still writes one progress event then, not one for each second that it missed."""

    async def work(bench: EventBench) -> None:
        await asyncio.sleep(2.1)
        before = len(bench.events("progress"))
        bench.publisher._next_progress -= 60
        await asyncio.sleep(2.1)
        assert len(bench.events("progress")) - before <= 4

    on_bench(work)


def test_records_of_others_are_left_alone() -> None:
    """Whatever else is in the topic is not ours to judge: writing goes on beside it."""
    broker = FakeBroker()
    (tp, *_) = broker.make(EVENTS_TOPIC, 1)
    broker.log(tp).append(TopicPartition(EVENTS_TOPIC, 0), [Outgoing(None, b"\xff", 5)])

    async def work(bench: EventBench) -> None:
        bench.tell()
        await asyncio.sleep(0.3)
        assert bench.numbers() == [0]

    on_bench(work, broker=broker)
