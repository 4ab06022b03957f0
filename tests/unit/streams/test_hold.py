"""Replay of a paused session: its workers stay in the group, and go on from where it was moved to."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rowmill import Pipeline, Session, Worker, WorkerOptions
from rowmill.state.clock import SystemClock
from rowmill.state.codec import dumps, loads
from rowmill.state.execution import Wanted
from rowmill.state.memory import MemoryStores
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.control import ControlTopic, request
from rowmill.streams.errors import GroupBusyError
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.hold import Standstill
from rowmill.streams.replay import Replay, Target
from rowmill.streams.transaction import Transactor
from support.fake_broker import FakeBroker

T = TopicPartition
LIVE = Session("p")

pytestmark = pytest.mark.timeout(60)


def pipeline() -> Pipeline:
    """Counts rows, and passes them on."""
    pipeline = Pipeline("p", source="in", sink="out").table("counts")

    @pipeline.stage
    def number(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        ctx.table("counts").add("all")
        return row

    return pipeline


async def until(condition: Any) -> None:
    """Wait for what a worker does by itself."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def working(broker: FakeBroker) -> AsyncIterator[Worker]:
    """A live worker that obeys and tells."""
    options = WorkerOptions(broker_timeout=5)
    worker = Worker(pipeline(), broker, stores=MemoryStores(), options=options, steered=True)
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        async with asyncio.timeout(20):
            await running


def broker_with(rows: int, partitions: int = 2) -> FakeBroker:
    """A source ``in``."""
    broker = FakeBroker()
    for tp in broker.make("in", partitions):
        broker.write(tp, *(dumps({"n": n}) for n in range(rows)))
    return broker


def replaying(broker: FakeBroker, target: Target, timeout: float = 5, **options: Any) -> Replay:
    """A replay of the live session."""
    return Replay(broker, LIVE, ["in"], target, options=WorkerOptions(broker_timeout=timeout), **options)


async def ask(broker: FakeBroker, wanted: Wanted) -> None:
    """Steer the live session."""
    await request(ControlTopic(broker, clock=SystemClock()), LIVE.group, wanted, by="somebody")


async def say_paused(broker: FakeBroker, worker: str) -> None:
    """What a paused worker said a moment ago."""
    now = SystemClock().now_ms()
    word = EventRecord(
        kind="progress", at_ms=now, pipeline="p", session="live", group=LIVE.group, worker=worker,
        data={"state": "paused"},
    )  # fmt: skip
    async with asyncio.timeout(10):
        while EVENTS_TOPIC not in await broker.topics():
            await asyncio.sleep(0.01)
    producer = broker.producer()
    await producer.start()
    await (await producer.send(T(EVENTS_TOPIC, 0), [Outgoing(LIVE.group.encode(), word.encode(), now)]))
    await producer.close()


def results(broker: FakeBroker) -> Counter[int]:
    """How often there is a result of which row."""
    return Counter(loads(value)["n"] for value in broker.values("out") if value)


@pytest.mark.parametrize("state", ["keep", "reset", "rebuild"])
async def test_a_paused_session_is_moved(state: Any) -> None:
    """With its worker in the group it moves, and after resume exactly the rows from the target on appear again."""
    broker = broker_with(4)
    async with working(broker) as worker:
        await until(lambda: worker.stats.rows == 8)
        assert await replaying(broker, Target("offset", 3)).standstill() == Standstill(1, is_paused=False)
        await ask(broker, Wanted.PAUSE)
        execution = await replaying(broker, Target("offset", 3), state=state).execute()
        assert not execution.failed
        assert worker.state == "paused"
        assert (await replaying(broker, Target("offset", 3)).standstill()).is_paused
        assert len(broker.joined(LIVE.group)) == 1, "nobody joined, and the worker stayed"
        position = 0 if state == "rebuild" else 3
        assert broker.group_offsets[LIVE.group] == {T("in", 0): Committed(position), T("in", 1): Committed(position)}
        assert results(broker) == Counter(dict.fromkeys(range(4), 2))
        await ask(broker, Wanted.RUN)
        await until(lambda: (worker.stats.rows, worker.stats.rebuilt) == (10, 6 if state == "rebuild" else 0))
        await until(lambda: results(broker)[3] == 4)
    assert results(broker) == Counter({0: 2, 1: 2, 2: 2, 3: 4})
    [count] = {r.value for r in broker.records("rowmill.p.in.changelog") if r.key == b"counts/all"} & {
        {"keep": b"5", "reset": b"1", "rebuild": b"4"}[state]
    }
    assert count


async def test_a_paused_session_without_workers() -> None:
    """Nobody is there: the group is held, as ever."""
    broker = broker_with(4)
    async with working(broker) as worker:
        await until(lambda: worker.stats.rows == 8)
        await ask(broker, Wanted.PAUSE)
        await until(lambda: worker.state == "paused")
    assert await replaying(broker, Target("earliest")).standstill() == Standstill(0, is_paused=True)
    assert not (await replaying(broker, Target("earliest")).execute()).failed


async def test_a_worker_that_does_not_say_that_it_is_paused() -> None:
    """It may be at work still: after a while the replay is refused, and nothing has moved."""
    broker = broker_with(4)
    async with working(broker) as worker:
        await until(lambda: worker.stats.rows == 8)
        silent = broker.member(LIVE.group, ["in"])  # in the group, and no word of it
        await ask(broker, Wanted.PAUSE)
        await silent.join(worker)
        await say_paused(broker, "dead")  # a former word counts for nobody who is there now
        before = dict(broker.group_offsets[LIVE.group])
        with pytest.raises(GroupBusyError, match="1 of its 2 workers did not say"):
            await replaying(broker, Target("earliest"), timeout=1.5).execute()
        assert broker.group_offsets[LIVE.group] == before
        await silent.leave()


async def test_resumed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions that are left are not moved any more, and it is said why; those that moved go on from there."""
    broker = broker_with(4)
    honest = Transactor.commit
    monkeypatch.setattr("rowmill.streams.replay._AT_ONCE", 1)
    async with working(broker) as worker:
        await until(lambda: worker.stats.rows == 8)
        await ask(broker, Wanted.PAUSE)
        await until(lambda: worker.state == "paused")

        async def then_resume(self: Any, *args: Any) -> Any:
            monkeypatch.undo()
            done = await honest(self, *args)
            await ask(broker, Wanted.RUN)
            return done

        monkeypatch.setattr(Transactor, "commit", then_resume)
        execution = await replaying(broker, Target("earliest")).execute()
        assert [move.tp for move in execution.moved] == [T("in", 0)]
        assert "was resumed by somebody meanwhile" in str(execution.failed[T("in", 1)])
        await until(lambda: worker.stats.rows == 12)
    assert results(broker) == Counter(dict.fromkeys(range(4), 3))


async def test_fenced_by_a_worker_that_was_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the commit a worker opens the partition: it is the worker's, and it is said why."""
    broker = broker_with(4, partitions=1)
    honest = Transactor.commit
    async with working(broker) as worker:
        await until(lambda: worker.stats.rows == 4)
        await ask(broker, Wanted.PAUSE)
        await until(lambda: worker.state == "paused")

        async def resume_first(self: Any, *args: Any) -> Any:
            monkeypatch.undo()
            starts = broker.starts[LIVE.transactional_id(T("in", 0))]
            await ask(broker, Wanted.RUN)
            await until(lambda: broker.starts[LIVE.transactional_id(T("in", 0))] > starts)
            return await honest(self, *args)

        monkeypatch.setattr(Transactor, "commit", resume_first)
        execution = await replaying(broker, Target("earliest")).execute()
        assert "the session was resumed meanwhile" in str(execution.failed[T("in", 0)])
        broker.write(T("in", 0), dumps({"n": 4}))
        await until(lambda: results(broker)[4] == 1)
    assert results(broker) == Counter(range(5))
