"""A publisher of events beside a broker, on virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, cast

from rowmill.handlers.runtime import Event
from rowmill.state.clock import Clock
from rowmill.state.model import TopicPartition
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.events import EventPublisher
from rowmill.streams.session import Session
from rowmill.streams.snapshots import PartitionSnapshot, WorkerSnapshot
from simulation.loop import SimLoop
from simulation.machine import SimClock

from support.fake_broker import FakeBroker
from support.virtual import virtual

COUNTS = {
    "rows": 1200, "results": 1180, "dropped": 12, "skipped": 0, "defaulted": 0, "dead_letters": 8, "emitted": 0,
    "rebuilt": 0,
}  # fmt: skip


class EventBench:
    """One publisher.

    Args:
        broker: default: a fake one.
        worker: its worker's name.
        clock: default: that of the running virtual loop.
        options: the publisher's.

    Attributes:
        broker, clock, publisher: the parts.
        stages: what the snapshots say of stages.
        partitions: how many partitions they have.
    """

    def __init__(
        self,
        broker: FakeBroker | None = None,
        worker: str = "5e2c01aa",
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        self.broker = broker or FakeBroker()
        self.clock = clock or SimClock(cast(SimLoop, asyncio.get_running_loop()), random.Random(1))
        self.session = options.pop("session", Session("reviews"))
        self.worker = worker
        self.stages: dict[str, Any] = {}
        self.partitions = 1
        self.publisher = EventPublisher(self.broker, self.session, worker, self.snapshot, clock=self.clock, **options)

    def snapshot(self) -> WorkerSnapshot:
        """Some progress."""
        return WorkerSnapshot(
            worker=self.worker,
            state="running",
            at_ms=self.clock.now_ms(),
            started_ms=self.clock.now_ms() - 61_250,
            totals={**COUNTS, "transactions": 122, "tokens": 90_300, "cost": "0.4515"},
            in_flight=64,
            in_flight_bytes=13_120,
            commit_seconds=0.0061,
            partitions=tuple(
                PartitionSnapshot(
                    tp=TopicPartition("reviews", number),
                    state="running",
                    committed=1200,
                    position=1300,
                    buffered=100,
                    in_flight=64,
                    oldest_offset=1204,
                    oldest_seconds=0.211,
                    counts=COUNTS,
                )
                for number in range(self.partitions)
            ),
            stages=self.stages,
            breakers={"scorer": "closed"},
            budget={"limit": "2.00", "spent": "0.4515", "held": "0.0385"},
        )

    def tell(self, count: int = 1, kind: str = "breaker_open", **data: Any) -> None:
        """Tell some events; ``n`` in their data counts from 0."""
        for n in range(count):
            self.publisher.hear(Event(kind, "scorer", {"n": n, **data}))

    def events(self, kind: str | None = None) -> list[EventRecord]:
        """What is in the topic, of one kind, or all but progress."""
        found = [EventRecord.decode(value) for value in self.broker.values(EVENTS_TOPIC)]
        return [event for event in found if event and (event.kind == kind if kind else event.kind != "progress")]

    def numbers(self, kind: str | None = None) -> list[int]:
        """The ``n`` of each event in the topic."""
        return [event.data["n"] for event in self.events(kind)]

    @property
    def is_settled(self) -> bool:
        """Whether every event that was told was sent or dropped."""
        return self.publisher.told == self.publisher.sent + self.publisher.dropped


def on_bench(work: Callable[[EventBench], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run it with a fresh publisher that is started, and closed at the end; the books must balance then."""

    async def run() -> None:
        bench = EventBench(**options)
        await bench.publisher.start()
        try:
            await work(bench)
        finally:
            await bench.publisher.close()
        assert bench.is_settled, vars(bench.publisher)

    virtual(run)
