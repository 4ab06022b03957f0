"""docs/events.md and docs/events.schema.json agree with each other, and with what is told.

Real workers are held against them by tests/integration/test_events.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from rowmill.handlers.budget import Account, Budget, Entry, MemoryLedger, Standing
from rowmill.handlers.errors import LedgerError
from rowmill.handlers.runtime import Event
from rowmill.state.codec import dumps
from rowmill.streams import events as module
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from support.event_bench import EventBench, on_bench
from support.event_docs import KINDS, PAGE, check, examples, first_of_each, shape
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(60)


def test_every_kind_is_described() -> None:
    """The schema has them all, the page has a heading and an example for each, and neither has another."""
    assert examples().keys() == KINDS
    assert set(re.findall(r"^#### `(\w+)`$", PAGE, re.MULTILINE)) == KINDS


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_example(kind: str) -> None:
    """It fits the schema, a reader gets all of it, and the table above it names every field of its data."""
    event = examples()[kind]
    check(event)
    record = EventRecord.decode(dumps(event))
    assert record is not None
    assert record.to_dict() == event
    section = PAGE.partition(f"#### `{kind}`")[2].partition("```")[0]
    for field in event["data"]:
        assert f"`{field}`" in section, field


@pytest.mark.parametrize(
    ("field", "value"), [("type", ""), ("at", "2026-11-21 18:00"), ("v", 0), ("data", []), ("group", None)]
)
def test_the_schema_can_tell(field: str, value: Any) -> None:
    """An envelope that is not as it should be does not fit."""
    with pytest.raises(AssertionError):
        check({**examples()["paused"], field: value})


def test_kinds_of_tomorrow_fit() -> None:
    """The schema lets through what it does not know."""
    check({**examples()["paused"], "type": "of_tomorrow", "new": 1, "data": {"more": [1]}})


def test_numbers_on_the_page() -> None:
    """Caps and the topic's settings are those of the code."""
    for text in (
        f"{module.MOST_PER_SECOND} of a kind",
        f"{module.MOST_ROW_FAILED_PER_SECOND} of `row_failed`",
        f"{module.QUEUE_EVENTS:,} events or {module.QUEUE_BYTES >> 20} MiB",
    ):
        assert text in PAGE
    spec: TopicSpec = module.events_topic(FakeBroker())
    for name, value in spec.config.items():
        assert f"| `{name}` | {value} |" in PAGE.replace(",", "")


def test_what_the_publisher_adds() -> None:
    """The page names what is left out of progress that would be too large."""

    async def work(bench: EventBench) -> None:
        bench.partitions = 6000
        await asyncio.sleep(0.6)
        event = bench.events("progress")[0].to_dict()
        check(event)
        assert all(f"`{field}`" in PAGE for field in event["data"])

    on_bench(work)


class AwayLedger(MemoryLedger):
    """Does not answer at first."""

    failures = 1

    async def post(self, entry: Entry) -> Standing:
        if self.failures:
            self.failures -= 1
            raise LedgerError("rowmill.reviews.budget/0: no answer within 10 s")
        return await super().post(entry)


async def test_what_a_budget_tells() -> None:
    """A ledger that is away and back, a warning, the end of the money, and a worker that gives some back."""
    clock, ledger = FakeClock(), AwayLedger()
    bench = EventBench(clock=clock)

    def hear(kind: str, detail: dict[str, Any]) -> None:
        bench.publisher.hear(Event(kind, "budget", detail))

    never = float("inf")
    ours, theirs = (Account(Budget("2.00"), ledger, clock=clock, on_event=hear, idle=never) for _ in range(2))
    for account in (ours, theirs):
        await account.start()
    try:
        other = await theirs.reserve(Decimal("0.40"))
        ours.settle(await ours.reserve(Decimal("1.60")), Decimal("1.60"))
        waiting = asyncio.create_task(ours.reserve(Decimal("0.20")))
        await until(lambda: ours.is_exhausted)
        theirs.settle(other, Decimal("0.10"))
        await theirs.close()
        await asyncio.wait_for(waiting, 10)
        await until(lambda: len(bench.publisher._waiting) >= 5)
    finally:
        for account in (ours, theirs):
            await account.close()
    told = [EventRecord.decode(event.value) for event in bench.publisher._waiting]
    first = first_of_each(event.to_dict() for event in told if event is not None)
    described = examples()
    for kind, event in first.items():
        check(event)
        assert (event["subject"], shape(event)) == ("budget", shape(described[kind])), kind
    assert first.keys() == {kind for kind in KINDS if kind.startswith("budget_")}
    await bench.publisher.close()
    assert EVENTS_TOPIC not in await bench.broker.topics()


async def until(condition: Callable[[], Any]) -> None:
    """Let other tasks run until something holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)
