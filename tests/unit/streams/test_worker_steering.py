"""The worker's ear for its operators: pause, resume, cancel, and what it tells of itself."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
from rowmill.state.clock import SystemClock
from rowmill.state.codec import dumps
from rowmill.state.execution import Wanted
from rowmill.state.model import Committed
from rowmill.streams.control import request
from rowmill.streams.errors import RowFailedError
from rowmill.streams.events import recent_events
from rowmill.streams.session import Session
from rowmill.streams.session_records import SessionRecord
from support.steered import GROUP, RETRY, Bench, Gate, LaterError, until


@pytest.fixture
def bench() -> Bench:
    """A fresh one."""
    return Bench()


async def test_pause_and_go_on(bench: Bench) -> None:
    """A pause finishes and commits what is in work and begins nothing; then the rest runs, each row once."""
    gate = Gate()
    worker = bench.worker(gate, concurrency=5)
    run = asyncio.create_task(worker.run())
    await until(lambda: len(gate.begun) >= 5)
    worker.pause()
    assert worker.state == "pausing"
    before = worker.snapshot()
    assert before.in_flight > 0
    assert any(each.oldest_seconds is not None for each in before.partitions)
    gate.open.set()
    await until(lambda: worker.state == "paused")
    begun = list(gate.begun)
    assert bench.found() == sorted(begun), "what began is done"
    assert bench.broker.joined(GROUP), "it stays in the group"
    assert [p.state for p in worker.snapshot().partitions] == ["paused", "paused"]
    await asyncio.sleep(0.05)
    assert gate.begun == begun
    worker.unpause()
    worker.finish_at(bench.ends)
    await asyncio.wait_for(run, 10)
    assert bench.found() == list(range(bench.rows))
    assert sorted(gate.begun) == list(range(bench.rows)), "none ran twice"
    assert [kind for kind in bench.kinds() if kind.startswith("pa") and "partition" not in kind] == [
        "pausing",
        "paused",
    ]
    assert "resumed" in bench.kinds()


async def test_paused_partitions_are_read_anew(bench: Bench) -> None:
    """Somebody who moves a paused session's offset is obeyed when it goes on: nothing of the old position is kept."""
    worker = bench.worker(lambda row: row, ordering="partition")
    run = asyncio.create_task(worker.run())
    await until(lambda: len(bench.found()) == bench.rows)
    worker.pause()
    await until(lambda: worker.state == "paused")
    bench.broker.group_offsets[GROUP] = {tp: Committed(20) for tp in bench.tps}
    worker.unpause()
    worker.finish_at(bench.ends)
    await asyncio.wait_for(run, 10)
    again = sorted([*range(bench.rows), *range(40, 60)])
    assert bench.found() == again


async def test_paused_before_it_began(bench: Bench) -> None:
    """A worker that starts on a paused session runs nothing, and goes on once somebody resumes it."""
    await bench.control.update(GROUP, lambda _: SessionRecord(group=GROUP, pipeline="p", session="live"))
    await request(bench.control, GROUP, Wanted.PAUSE, by="ann@here")
    worker = bench.worker(lambda row: row, steered=True)
    run = asyncio.create_task(worker.run())
    await until(lambda: len(worker._owners) == 2 and worker.state == "paused")
    assert bench.found() == []
    await request(bench.control, GROUP, Wanted.RUN, by="bob@there")
    await until(lambda: len(bench.found()) == bench.rows)
    worker.stop()
    await asyncio.wait_for(run, 10)


async def test_a_second_worker_hears_as_well(bench: Bench) -> None:
    """All workers of a session pause, also one that joins later and takes partitions over."""
    one = bench.worker(lambda row: row, steered=True)
    runs = [asyncio.create_task(one.run())]
    await until(lambda: len(bench.found()) == bench.rows)
    await request(bench.control, GROUP, Wanted.PAUSE, by="ann@here")
    await until(lambda: one.state == "paused")
    two = bench.worker(lambda row: row, steered=True)
    runs.append(asyncio.create_task(two.run()))
    await until(lambda: len(one._owners) == 1 and len(two._owners) == 1 and two.state == "paused")
    bench.broker.write(bench.tps[0], dumps({"n": 60}))
    bench.broker.write(bench.tps[1], dumps({"n": 61}))
    await asyncio.sleep(0.1)
    assert len(bench.found()) == bench.rows
    await request(bench.control, GROUP, Wanted.RUN, by="ann@here")
    await until(lambda: len(bench.found()) == bench.rows + 2)
    for worker in (one, two):
        worker.stop()
    await asyncio.wait_for(asyncio.gather(*runs), 10)


async def test_a_row_that_waits_is_given_up(bench: Bench) -> None:
    """A pause does not wait for a retry that is an hour away; the row runs again when the session goes on."""
    calls: list[int] = []

    async def fails_once(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["n"])
        if row["n"] == 7 and calls.count(7) == 1:
            raise LaterError
        return row

    worker = bench.worker(fails_once, concurrency=4, retry=RETRY)
    run = asyncio.create_task(worker.run())
    await until(lambda: len(bench.found()) == bench.rows - 1)
    worker.pause()
    await until(lambda: worker.state == "paused")
    worker.unpause()
    worker.finish_at(bench.ends)
    await asyncio.wait_for(run, 10)
    assert bench.found() == list(range(bench.rows))
    assert len(calls) == bench.rows + 1


async def test_a_lot_that_waits_is_given_up(bench: Bench) -> None:
    """The same where rows run in order: the worker goes on afterwards, instead of ending with the row."""
    calls: list[int] = []

    async def fails_once(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["n"])
        if row["n"] == 7 and calls.count(7) == 1:
            raise LaterError
        return row

    worker = bench.worker(fails_once, ordering="partition", retry=RETRY)
    run = asyncio.create_task(worker.run())
    await until(lambda: 7 in calls and len(bench.found()) >= bench.rows // 2)
    worker.pause()
    await until(lambda: worker.state == "paused")
    worker.unpause()
    assert worker.runtime.may_wait(3600), "rows may wait again"
    worker.finish_at(bench.ends)
    await asyncio.wait_for(run, 10)
    assert bench.found() == list(range(bench.rows))


async def test_paused_while_it_opens(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition that is being opened when the pause comes runs nothing either."""
    looked, go_on = asyncio.Event(), asyncio.Event()
    offsets = bench.broker.offsets

    async def slow(partitions: Any, at: Any) -> Any:
        looked.set()
        await go_on.wait()
        return await offsets(partitions, at)

    worker = bench.worker(lambda row: row)
    monkeypatch.setattr(bench.broker, "offsets", slow)
    run = asyncio.create_task(worker.run())
    await until(looked.is_set)
    worker.pause()
    assert worker.state == "pausing"
    go_on.set()
    await until(lambda: worker.state == "paused")
    assert bench.found() == []
    worker.unpause()
    worker.finish_at(bench.ends)
    await asyncio.wait_for(run, 10)
    assert bench.found() == list(range(bench.rows))


async def test_cancel_async(bench: Bench) -> None:
    """Cancelled amid rows that take a minute: it ends at once, what was done counts, the rest runs again."""
    calls: list[int] = []

    async def slow(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["n"])
        if row["n"] >= 20:
            await asyncio.sleep(60)
        return row

    worker = bench.worker(slow, concurrency=50, commit_interval=30.0)
    run = asyncio.create_task(worker.run())
    await until(lambda: len(calls) == bench.rows)
    assert bench.found() == [], "nothing is committed yet"
    worker.cancel()
    await asyncio.wait_for(run, 2)
    assert bench.found() == list(range(20))
    assert worker.was_cancelled
    assert [e.detail["reason"] for e in bench.events if e.kind == "worker_stopped"] == ["cancelled"]
    await _finish(bench)
    assert bench.found() == list(range(bench.rows))


async def test_cancel_blocking(bench: Bench) -> None:
    """A blocking handler cannot be stopped: its thread is left behind, and nobody waits for it."""
    begun, gate = threading.Event(), threading.Event()

    def blocks(row: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        gate.wait(30)
        return row

    worker = bench.worker(blocks, concurrency=2)
    run = asyncio.create_task(worker.run())
    try:
        await until(begun.is_set)
        worker.cancel()
        await asyncio.wait_for(run, 2)
    finally:
        gate.set()
    assert bench.found() == []
    await _finish(bench)
    assert bench.found() == list(range(bench.rows))


async def test_cancel_while_it_drains(bench: Bench) -> None:
    """Who has asked for an orderly end, and then for one at once, does not wait for the orderly one."""
    gate = Gate()
    worker = bench.worker(gate, concurrency=3, drain_timeout=30)
    run = asyncio.create_task(worker.run())
    await until(lambda: gate.begun)
    worker.stop()
    await asyncio.sleep(0.2)
    worker.cancel()
    await asyncio.wait_for(run, 2)


async def test_stop_while_paused(bench: Bench) -> None:
    """A paused worker stops at once, and the session stays paused for the next one."""
    worker = bench.worker(lambda row: row, steered=True)
    run = asyncio.create_task(worker.run())
    await until(lambda: len(bench.found()) == bench.rows)
    await request(bench.control, GROUP, Wanted.PAUSE, by="ann@here")
    await until(lambda: worker.state == "paused")
    worker.stop()
    await asyncio.wait_for(run, 2)
    assert (await bench.record()).wanted is Wanted.PAUSE


async def test_cancelled_from_outside(bench: Bench) -> None:
    """A cancelled session's workers end without an error; whoever is started afterwards goes on."""
    gate = Gate()
    worker = bench.worker(gate, concurrency=3, steered=True)
    run = asyncio.create_task(worker.run())
    await until(lambda: gate.begun)
    await request(bench.control, GROUP, Wanted.CANCEL, by="ann@here", reason="too dear")
    await asyncio.wait_for(run, 3)
    assert (await bench.record()).wanted is Wanted.CANCEL
    await _finish(bench, steered=True)
    assert (await bench.record()).wanted is Wanted.RUN
    assert bench.found() == list(range(bench.rows))


async def test_record(bench: Bench) -> None:
    """A worker enters its session with all that others need to know, and where it is complete."""
    session = Session("p", "once")
    worker = bench.worker(lambda row: row, steered=True, bounded=True, session=session)
    worker.finish_at(bench.ends)
    await asyncio.wait_for(worker.run(), 10)
    record = await bench.record("rowmill.p.once")
    assert (record.pipeline, record.session, record.is_bounded, record.wanted) == ("p", "once", True, Wanted.RUN)
    assert (record.sources, record.sink, record.dead_letters) == (("in",), "out.once", "p.dlq.once")
    assert (record.stages, record.tables, record.has_budget) == (("stage",), (), False)
    assert record.ends == bench.ends
    assert record.failure == ""


async def test_failure_is_noted(bench: Bench) -> None:
    """Why a worker failed is in the session's record until the next start."""

    def refuses(row: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("no such thing")

    worker = bench.worker(refuses, steered=True, on_error="fail")
    with pytest.raises(RowFailedError):
        await asyncio.wait_for(worker.run(), 10)
    assert "no such thing" in (await bench.record()).failure
    await _finish(bench, steered=True)
    assert (await bench.record()).failure == ""


async def test_events(bench: Bench) -> None:
    """What happens is on the events topic, with rows that failed named."""

    def odd(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 13:
            raise ValueError("thirteen")
        return row

    worker = bench.worker(odd, steered=True)
    worker.finish_at(bench.ends)
    await asyncio.wait_for(worker.run(), 10)
    events = await recent_events(bench.broker, since_ms=0, clock=SystemClock(), timeout=5)
    kinds = [event.kind for event in events]
    assert kinds[0] == "worker_started"
    assert kinds[-1] == "worker_stopped"
    assert kinds.count("partition_opened") == 2
    (failed,) = [event for event in events if event.kind == "row_failed"]
    assert (failed.subject, failed.data["type"], failed.data["partition"], failed.data["offset"]) == (
        "stage", "ValueError", 1, 6,
    )  # fmt: skip
    (last,) = [event for event in events if event.kind == "progress"][-1:]
    assert last.data["totals"]["rows"] == bench.rows


async def test_a_forbidden_control_topic(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Where the control topic may not be made the worker says so once, and works."""
    options = {"create_topics": False}
    bench.broker.make("p.dlq", 2)
    await _finish(bench)  # makes the changelog
    bench.broker.write(bench.tps[0], dumps({"n": 60}))
    worker = bench.worker(lambda row: row, steered=True, **options)
    worker.finish_at(bench.ends)
    await asyncio.wait_for(worker.run(), 10)
    assert len(bench.found()) == bench.rows + 1
    assert len([r for r in caplog.records if "cannot be paused" in r.getMessage()]) == 1


async def _finish(bench: Bench, *, steered: bool = False) -> None:
    worker = bench.worker(lambda row: row, steered=steered)
    worker.finish_at(bench.ends)
    await asyncio.wait_for(worker.run(), 10)


def test_replace_keeps_unknown_fields() -> None:
    """A record read from a newer rowmill keeps what this one does not know."""
    record = SessionRecord(group=GROUP, pipeline="p", session="live", unknown={"colour": "red"})
    again = SessionRecord.decode(replace(record, wanted=Wanted.PAUSE).encode())
    assert (again.unknown, again.wanted) == ({"colour": "red"}, Wanted.PAUSE)
