"""A worker to pause, resume and stop: rows on a fake broker, handlers that hold rows or put them off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from rowmill import Pipeline, Retry, WorkerOptions
from rowmill.handlers.runtime import Event
from rowmill.state.clock import SystemClock
from rowmill.state.codec import dumps, loads
from rowmill.state.model import TopicPartition
from rowmill.streams.control import ControlTopic
from rowmill.streams.session_records import SessionRecord
from rowmill.streams.worker import Worker

from support.fake_broker import FakeBroker

GROUP = "rowmill.p"
QUICK = {"commit_interval": 0.005, "broker_timeout": 5.0, "drain_timeout": 5.0}
RETRY = Retry(attempts=3)
HOUR = 3600


class LaterError(Exception):
    """Asks to be called again in an hour."""

    retry_after = HOUR


async def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait for what workers do by themselves."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


class NotedClock(SystemClock):
    """The machine's clock, which can be put forward; ``slept`` lists for how long somebody began to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await super().sleep(seconds)

    @property
    def long_sleeps(self) -> int:
        """How many rows began to wait for their hour."""
        return sum(seconds > HOUR / 2 for seconds in self.slept)


class Bench:
    """A broker with 60 rows in two partitions, and workers of pipeline ``p`` on it."""

    def __init__(self, rows: int = 60) -> None:
        self.broker = FakeBroker()
        self.tps = self.broker.make("in", 2)
        self.broker.make("out", 2)
        self.rows = rows
        for n in range(rows):
            self.broker.write(self.tps[n % 2], dumps({"n": n}), key=b"%d" % n)
        self.events: list[Event] = []
        self.control = ControlTopic(self.broker, clock=SystemClock(), timeout=5)

    def worker(self, handler: Any, *, steered: bool = False, bounded: bool = False, **more: Any) -> Worker:
        stage = {name: more.pop(name) for name in ("batch", "concurrency", "retry", "on_error") if name in more}
        session, clock = more.pop("session", None), more.pop("clock", None)
        source = more.pop("source", "in")
        pipeline = Pipeline("p", source=source, sink="out", ordering=more.pop("ordering", "none"))
        pipeline.add(handler, name="stage", **stage)
        worker = Worker(
            pipeline,
            self.broker,
            session=session,
            options=WorkerOptions(**{**QUICK, **more}),
            clock=clock,
            steered=steered,
            bounded=bounded,
        )
        worker.runtime.listeners.append(self.events.append)
        return worker

    @property
    def ends(self) -> dict[TopicPartition, int]:
        return {tp: self.broker.log(tp).high_watermark for tp in self.tps}

    def found(self, topic: str = "out") -> list[int]:
        return sorted(loads(value or b"")["n"] for value in self.broker.values(topic))

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    async def record(self, group: str = GROUP) -> SessionRecord:
        record = await self.control.session(group)
        assert record is not None
        return record


class Gate:
    """A handler that holds every row until it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun: list[int] = []

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.begun.append(row["n"])
        await self.open.wait()
        return row
