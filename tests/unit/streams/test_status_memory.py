"""What is not read twice: with a memory the same is found as without, and little is read."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from rowmill.state.context import ExecutionContext, session_uuid
from rowmill.state.model import StoredRecord, TopicPartition, stored
from rowmill.streams.brokers.base import Reader
from rowmill.streams.errors import BrokerError
from rowmill.streams.event_records import EVENTS_TOPIC
from rowmill.streams.session import Session
from rowmill.streams.status import StatusReader, session_statuses
from rowmill.streams.status_memory import Counted, TailMemory, WordMemory
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock
from support.sessions import COUNTS, MadeSession, progress, say

LIVE, OTHER = Session("p"), Session("q")
A, B = TopicPartition("log", 0), TopicPartition("log", 1)


def checkpoint(rows: int) -> bytes:
    """A checkpoint after so many rows."""
    context = ExecutionContext(session_id=session_uuid(LIVE.group), accumulated_cost=Decimal(rows))
    return CheckpointRecord(
        rows, 0, True, None, {**COUNTS, "rows": rows}, context.to_checkpoint(), {}, "o", "1"
    ).encode()


@pytest.fixture
def broker() -> FakeBroker:
    """With a changelog of two partitions."""
    broker = FakeBroker()
    broker.make("log", 2)
    return broker


class Reads:
    """Counts the records that readers give."""

    def __init__(self, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records: list[StoredRecord] = []
        self.readers = 0
        make = broker.reader

        def reader() -> Reader:
            self.readers += 1
            made = make()
            fetch = made.fetch

            async def noted(*arguments: Any) -> Any:
                found = await fetch(*arguments)
                self.records += [record for tp, records in found.items() for record in stored(tp, records)]
                return found

            monkeypatch.setattr(made, "fetch", noted)
            return made

        monkeypatch.setattr(broker, "reader", reader)


async def both(broker: FakeBroker, memory: TailMemory) -> dict[TopicPartition, int]:
    """Rows by partition; the same without a memory."""
    found = await memory.read(broker, [A, B], timeout=5)
    assert found == await TailMemory().read(broker, [A, B], timeout=5)
    return {tp: counted.counts["rows"] for tp, counted in found.items()}


async def test_changelogs_that_grow(broker: FakeBroker) -> None:
    """The last checkpoint is found, whatever comes before and after it, and also where many records follow."""
    memory = TailMemory()
    assert await both(broker, memory) == {}
    broker.write(A, checkpoint(1), key=CHECKPOINT_KEY)
    assert await both(broker, memory) == {A: 1}
    broker.write(A, b"table", key=b"k")
    broker.write(B, checkpoint(7), key=CHECKPOINT_KEY)
    assert await both(broker, memory) == {A: 1, B: 7}
    broker.write(A, checkpoint(2), key=CHECKPOINT_KEY)
    for n in range(300):
        broker.write(A, b"table", key=b"%d" % n)
    assert await both(broker, memory) == {A: 2, B: 7}
    for n in range(300):
        broker.write(A, b"table", key=b"%d" % n)
    assert await both(broker, memory) == {A: 2, B: 7}


async def test_what_has_not_grown_is_not_read(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it; and of what has grown only the new records."""
    for n in range(50):
        broker.write(A, checkpoint(n), key=CHECKPOINT_KEY)
        broker.write(B, checkpoint(n), key=CHECKPOINT_KEY)
    memory = TailMemory()
    first = await memory.read(broker, [A, B], timeout=5)
    reads = Reads(broker, monkeypatch)
    again = await memory.read(broker, [A, B], timeout=5)
    assert (reads.records, reads.readers) == ([], 0)
    assert again[A] is first[A]
    broker.write(B, checkpoint(99), key=CHECKPOINT_KEY)
    found = await memory.read(broker, [A, B], timeout=5)
    assert [(record.partition, record.offset) for record in reads.records] == [(1, 50)]
    assert found[B].counts["rows"] == 99


async def test_a_changelog_that_was_made_anew(broker: FakeBroker) -> None:
    """A shorter one is read from its beginning."""
    for n in range(5):
        broker.write(A, checkpoint(n), key=CHECKPOINT_KEY)
    memory = TailMemory()
    assert await both(broker, memory) == {A: 4}
    await broker.delete_topics(["log"])
    broker.make("log", 2)
    broker.write(A, checkpoint(77), key=CHECKPOINT_KEY)
    assert await both(broker, memory) == {A: 77}
    assert await memory.read(broker, [], timeout=5) == {}


async def test_checkpoints_that_cannot_be_read(broker: FakeBroker) -> None:
    """They say why, and count nothing."""
    broker.write(A, b"{", key=CHECKPOINT_KEY)
    counted = (await TailMemory().read(broker, [A], timeout=5))[A]
    assert counted == Counted(problem=counted.problem)
    assert counted.problem


async def test_words_of_the_last_seconds(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look reads what is new, forgets what is old, and gives the sessions asked for."""
    clock, memory = FakeClock(), WordMemory()

    async def at(seconds: float) -> list[int]:
        since_ms = clock.now_ms() - round(seconds * 1000)
        events = await memory.recent(broker, since_ms=since_ms, groups={LIVE.group}, clock=clock, timeout=5)
        return [event.data["totals"]["rows"] for event in events]

    assert await at(10) == []
    for n in range(3):
        await say(broker, clock, progress(LIVE, "w", clock.now_ms(), rows=n), progress(OTHER, "x", clock.now_ms()))
        clock.advance(4)
    assert await at(20) == [0, 1, 2]
    reads = Reads(broker, monkeypatch)
    await say(broker, clock, progress(LIVE, "w", clock.now_ms(), rows=3))
    assert await at(10) == [1, 2, 3]
    assert len(reads.records) == 1
    await broker.delete_topics([EVENTS_TOPIC])
    assert await at(10) == []
    await say(broker, clock, progress(LIVE, "w", clock.now_ms(), rows=9))
    assert await at(10) == [9]


async def test_a_broker_that_fails_now_and_then(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried three times, and begins anew."""
    clock, memory, failures = FakeClock(), WordMemory(), [2]
    await say(broker, clock, progress(LIVE, "w", clock.now_ms(), rows=1))
    offsets = broker.offsets

    async def failing(*arguments: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise BrokerError("gone")
        return await offsets(*arguments)

    monkeypatch.setattr(broker, "offsets", failing)
    options: Any = {"since_ms": 0, "groups": {LIVE.group}, "clock": clock, "timeout": 5}
    assert len(await memory.recent(broker, **options)) == 1
    failures[0] = 3
    with pytest.raises(BrokerError):
        await memory.recent(broker, **options)
    assert len(await memory.recent(broker, **options)) == 1


async def test_statuses_again_and_again() -> None:
    """A reader that remembers says what one without a memory says, also of sessions that come and go."""
    broker, clock = FakeBroker(), FakeClock()
    reader = StatusReader(broker, clock=clock, timeout=5)
    assert await reader.statuses() == []
    await MadeSession(LIVE, committed=(4, 2)).make(broker, clock)
    await say(broker, clock, progress(LIVE, "w", clock.now_ms(), partitions=MadeSession(LIVE).tps))
    assert await reader.statuses() == await session_statuses(broker, clock=clock, timeout=5)
    await MadeSession(OTHER, committed=(3, None)).make(broker, clock)
    found = await reader.statuses()
    assert found == await session_statuses(broker, clock=clock, timeout=5)
    assert [status.rows.rows for status in found] == [6, 3]
    assert [status.reference for status in await reader.statuses(OTHER.group)] == ["q"]
    assert await reader.statuses() == found
