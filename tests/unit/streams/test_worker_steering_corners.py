"""Two wishes at once: what a worker does that is paused, resumed or stopped amid something else."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from rowmill.handlers.runtime import Event
from rowmill.state.codec import dumps
from rowmill.state.execution import Wanted
from rowmill.state.model import Committed, TopicPartition
from rowmill.streams import partition_task, steering
from rowmill.streams.brokers.base import TransactionalProducer
from rowmill.streams.control import request
from rowmill.streams.errors import BrokerError
from rowmill.streams.partition_state import PartitionState
from rowmill.streams.partition_task import PartitionTask
from rowmill.streams.session import Session
from rowmill.streams.worker import Worker
from support.steered import GROUP, RETRY, Bench, Gate, LaterError, NotedClock, until

LONG = 60.0
"""Seconds of the time-outs that nothing here may wait for."""
SOON = 15.0
"""Seconds that are plenty for what takes none."""


@pytest.fixture
def bench() -> Bench:
    """A fresh one."""
    return Bench()


def draining(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once the worker waits for its rows in work to finish, at its end."""
    begun, drain = asyncio.Event(), worker._drain

    async def tell() -> None:
        begun.set()
        await drain()

    monkeypatch.setattr(worker, "_drain", tell)
    return begun


def openings(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[TopicPartition]:
    """The partitions that the worker begins to open from now on."""
    opened: list[TopicPartition] = []
    make = worker._make_task

    def tell(tp: TopicPartition) -> PartitionTask:
        opened.append(tp)
        return make(tp)

    monkeypatch.setattr(worker, "_make_task", tell)
    return opened


async def let_others_run() -> None:
    """Whatever can go on without waiting for time has done so."""
    for _ in range(100):
        await asyncio.sleep(0)


async def begin(worker: Worker, bench: Bench) -> asyncio.Task[Any]:
    """Start it, and wait until all there is is committed."""
    run = asyncio.create_task(worker.run())
    await until(lambda: worker.has_committed(bench.ends))
    return run


# --- stopped ---------------------------------------------------------------------------------------------------


async def test_stopped_while_it_pauses(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that pauses and is told to stop ends once its rows in work are done, not at the drain's time-out."""
    gate = Gate()
    worker = bench.worker(gate, concurrency=3, drain_timeout=LONG)
    drains = draining(worker, monkeypatch)
    run = asyncio.create_task(worker.run())
    await until(lambda: gate.begun)
    worker.pause()
    worker.stop()
    await asyncio.wait_for(drains.wait(), SOON)
    gate.open.set()
    await asyncio.wait_for(run, SOON)
    assert bench.found() == sorted(gate.begun), "what began is done"


async def test_stopped_while_the_group_rebalances(bench: Bench) -> None:
    """With nothing in work a worker that is told to stop does not wait for the rebalance that is under way."""
    worker = bench.worker(lambda row: row, drain_timeout=LONG)
    run = await begin(worker, bench)
    await worker.revoked(frozenset(bench.tps))
    worker.stop()
    await asyncio.wait_for(run, SOON)
    assert bench.found() == list(range(bench.rows))


async def test_resumed_after_a_stop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who resumes a session does not undo the stop of a worker of it: a row that waits an hour is given up."""
    gate = Gate()

    async def puts_off(row: dict[str, Any]) -> None:
        await gate(row)
        raise LaterError

    worker = bench.worker(puts_off, ordering="partition", retry=RETRY, drain_timeout=LONG)
    drains = draining(worker, monkeypatch)
    run = asyncio.create_task(worker.run())
    await until(lambda: gate.begun)
    worker.pause()
    worker.stop()
    await asyncio.wait_for(drains.wait(), SOON)
    worker.unpause()
    gate.open.set()
    await asyncio.wait_for(run, SOON)
    assert "resumed" not in bench.kinds()


async def test_cancelled_while_it_drains(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that its caller cancels while it drains leaves no task behind."""
    gate = Gate()
    worker = bench.worker(gate, concurrency=3, drain_timeout=LONG)
    drains = draining(worker, monkeypatch)
    run = asyncio.create_task(worker.run())
    await until(lambda: gate.begun)
    worker.stop()
    await asyncio.wait_for(drains.wait(), SOON)
    run.cancel()
    await asyncio.wait({run}, timeout=SOON)
    assert run.cancelled()
    own = asyncio.current_task()
    await until(lambda: asyncio.all_tasks() == {own})


# --- complete --------------------------------------------------------------------------------------------------


async def test_complete_while_it_pauses(bench: Bench) -> None:
    """A bounded session whose last rows are done while it pauses is over: nobody has to resume it, or could."""
    gate = Gate()
    session = Session("p", "once")
    worker = bench.worker(gate, steered=True, bounded=True, session=session, concurrency=bench.rows)
    worker.finish_at(bench.ends)
    run = asyncio.create_task(worker.run())
    await until(lambda: len(gate.begun) == bench.rows)
    await request(bench.control, session.group, Wanted.PAUSE, by="ann@here")
    await until(lambda: worker.state == "pausing")
    gate.open.set()
    await asyncio.wait_for(run, SOON)
    assert worker.is_complete
    assert bench.found("out.once") == list(range(bench.rows))


async def test_moved_back_while_paused(bench: Bench) -> None:
    """A partition that was complete and is moved back during a pause runs again before a finite run is over."""
    calls: list[int] = []
    hold = asyncio.Event()

    async def handler(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["n"])
        if row["n"] == 0 and calls.count(0) == 2:
            await hold.wait()
        return row

    moved, other = bench.tps
    worker = bench.worker(handler, ordering="partition")
    worker.finish_at({**bench.ends, other: bench.ends[other] + 1})
    run = asyncio.create_task(worker.run())
    await until(lambda: moved in worker._finished and worker.has_committed(bench.ends))
    worker.pause()
    await until(lambda: worker.state == "paused")
    bench.broker.group_offsets[GROUP] = {**bench.broker.group_offsets[GROUP], moved: Committed(0)}
    worker.unpause()
    await until(lambda: calls.count(0) == 2)
    bench.broker.write(other, dumps({"n": 61}))
    await until(lambda: other in worker._finished)
    assert not worker.is_complete
    hold.set()
    await asyncio.wait_for(run, SOON)
    assert sorted(calls) == sorted([*range(bench.rows), *range(0, bench.rows, 2), 61])


async def test_ends_are_noted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a run that is quicker than the control topic tells where it is complete all the same."""
    worker = bench.worker(lambda row: row, steered=True, bounded=True, session=Session("p", "once"))
    make, made, stopped = bench.broker.transactional_producer, 0, asyncio.Event()

    def hear(event: Event) -> None:
        if event.kind == "worker_stopped":
            stopped.set()

    def slow(transactional_id: str, *, timeout: float | None = None) -> TransactionalProducer:
        nonlocal made
        producer = make(transactional_id, timeout=timeout)
        made += transactional_id.endswith(".control")
        if transactional_id.endswith(".control") and made > 1:  # the first one enters the session
            start = producer.start

            async def late() -> None:
                await stopped.wait()
                await start()

            monkeypatch.setattr(producer, "start", late)
        return producer

    monkeypatch.setattr(bench.broker, "transactional_producer", slow)
    monkeypatch.setattr(steering, "_CLOSE_SECONDS", LONG)
    worker.runtime.listeners.append(hear)
    worker.finish_at(bench.ends)
    await asyncio.wait_for(worker.run(), SOON)
    assert made > 1
    assert (await bench.record("rowmill.p.once")).ends == bench.ends


# --- paused and resumed ----------------------------------------------------------------------------------------


async def test_a_pause_is_no_stall(bench: Bench) -> None:
    """The first hiccup of the broker after a long pause is borne like any other: no time of the pause counts."""
    clock = NotedClock()
    worker = bench.worker(lambda row: row, clock=clock, stall_timeout=LONG)
    worker.pause()
    run = asyncio.create_task(worker.run())
    await until(lambda: worker.state == "paused" and len(worker._owners) == 2)
    clock.ahead = 10 * LONG
    bench.broker.inject("committed", BrokerError("not the coordinator"))
    worker.unpause()
    worker.finish_at(bench.ends)
    await asyncio.wait_for(run, SOON)
    assert not bench.broker._faults, "it was met"
    assert bench.found() == list(range(bench.rows))


async def test_paused_again_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed and paused again in one breath it opens nothing: what is told as paused is at rest."""
    worker = bench.worker(lambda row: row)
    run = await begin(worker, bench)
    worker.pause()
    await until(lambda: worker.state == "paused")
    opened = openings(worker, monkeypatch)
    worker.unpause()
    worker.pause()
    await let_others_run()
    assert not opened
    assert worker.state == "paused"
    worker.unpause()
    await until(lambda: sorted(opened) == bench.tps)
    worker.stop()
    await asyncio.wait_for(run, SOON)


async def test_a_lot_that_waits_hears_the_second_pause(bench: Bench) -> None:
    """A lot that waits an hour is given up by the second pause, where the first was called off in the same breath."""
    clock = NotedClock()

    async def puts_off(_row: dict[str, Any]) -> None:
        raise LaterError

    worker = bench.worker(puts_off, ordering="partition", retry=RETRY, clock=clock)
    run = asyncio.create_task(worker.run())
    await until(lambda: clock.long_sleeps == 2)
    worker.pause()
    worker.unpause()
    await let_others_run()
    worker.pause()
    await until(lambda: worker.state == "paused", SOON)
    worker.stop()
    await asyncio.wait_for(run, SOON)


async def test_resumed_while_the_group_rebalances(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed before the assignment tells whose the partitions are, a worker opens none, and so fences nobody."""
    worker = bench.worker(lambda row: row)
    run = await begin(worker, bench)
    worker.pause()
    await until(lambda: worker.state == "paused")
    await worker.revoked(frozenset(bench.tps))
    opened, before = openings(worker, monkeypatch), dict(bench.broker.starts)
    worker.unpause()
    await let_others_run()
    assert not opened
    assert bench.broker.starts == before
    worker.assigned(frozenset(bench.tps), consecutive=True)
    await until(lambda: all(bench.broker.starts[name] > count for name, count in before.items()))
    worker.stop()
    await asyncio.wait_for(run, SOON)


async def test_who_killed_before_is_still_suspected(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that workers died of, and that a pause gives back, has killed nobody this time; the deaths before count."""
    opened: list[dict[int, int]] = []
    calls: list[int] = []
    restore = PartitionState.open

    async def suspicious(state: PartitionState, committed: Committed | None) -> None:
        await restore(state, committed)
        if state._tp == bench.tps[0]:
            if not opened:
                state.starts, state.died = {0: 2}, True  # as after two deaths
            opened.append(dict(state.starts))

    async def puts_off(row: dict[str, Any]) -> None:
        calls.append(row["n"])
        raise LaterError

    monkeypatch.setattr(PartitionState, "open", suspicious)
    worker = bench.worker(puts_off, concurrency=bench.rows, retry=RETRY)
    run = asyncio.create_task(worker.run())
    await until(lambda: 0 in calls)
    await let_others_run()
    worker.pause()
    await until(lambda: worker.state == "paused")
    worker.unpause()
    await until(lambda: len(opened) == 2)
    worker.cancel()
    await asyncio.wait_for(run, SOON)
    assert opened == [{0: 2}, {0: 2}]


# --- rows that wait for a call -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"batch": 3}, {"batch": 3, "retry": RETRY}, {"retry": RETRY}],
    ids=["batches", "batches with a policy", "rows with a policy"],
)
async def test_rows_that_wait_for_a_slot_are_given_back(options: dict[str, Any]) -> None:
    """A pause waits for the call that is under way, and begins none that waits for the stage's only slot."""
    bench = Bench(rows=0)
    tps = bench.broker.make("many", 12)
    for tp in tps:
        bench.broker.write(tp, *[dumps({"n": n}) for n in range(6)])
    hold, calls = asyncio.Event(), 0

    async def slow(given: Any) -> Any:
        nonlocal calls
        calls += 1
        await hold.wait()
        return given

    worker = bench.worker(slow, source="many", concurrency=1, **options)
    run = asyncio.create_task(worker.run())
    await until(lambda: worker.snapshot().in_flight == 6 * len(tps))
    await let_others_run()
    worker.pause()
    hold.set()
    await until(lambda: worker.state == "paused")
    assert calls == 1
    worker.unpause()
    worker.finish_at(dict.fromkeys(tps, 6))
    await asyncio.wait_for(run, SOON)
    assert len(bench.found()) == 6 * len(tps)


async def test_what_is_kept_behind_a_slow_row_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow row and many quick ones behind it: their moments are not all kept to tell the oldest one's age."""
    monkeypatch.setattr(partition_task, "_FLOW_LOT", 1)
    monkeypatch.setattr(partition_task, "_BEGUN_LOTS", 40, raising=False)
    bench = Bench(rows=600)
    hold = asyncio.Event()

    async def handler(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 0:
            await hold.wait()
        return row

    worker = bench.worker(handler, concurrency=20)
    run = asyncio.create_task(worker.run())
    await until(lambda: len(bench.found()) == bench.rows - 1)
    assert len(worker._tasks[bench.tps[0]]._begun) <= 40
    (slow, _) = worker.snapshot().partitions
    assert slow.oldest_offset == 0
    assert slow.oldest_seconds is not None
    assert slow.full == ""
    hold.set()
    worker.finish_at(bench.ends)
    await asyncio.wait_for(run, SOON)


async def test_cancelled_amid_a_handler_that_will_not_end(bench: Bench) -> None:
    """A handler that swallows its cancellation, in a partition that keeps its order, holds up no cancelled worker."""
    begun, end = asyncio.Event(), asyncio.Event()

    async def stubborn(row: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        while not end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await end.wait()
        return row

    worker = bench.worker(stubborn, ordering="partition", broker_timeout=60.0)
    run = asyncio.create_task(worker.run())
    try:
        await asyncio.wait_for(begun.wait(), 10)
        worker.cancel()
        await asyncio.wait_for(asyncio.shield(run), 20)
    finally:
        end.set()
        await asyncio.wait({run}, timeout=20)
