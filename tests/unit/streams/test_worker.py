"""Workers: groups, hand-over, faults, ends. Whatever happens, results are exact."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from rowmill import Pipeline, RowContext, Worker
from rowmill.state.clock import Clock, SystemClock
from rowmill.state.codec import dumps, loads
from rowmill.state.model import Committed, TopicPartition
from rowmill.streams.errors import FencedError, OffsetOutOfRangeError, StalledError, TopicError
from rowmill.streams.options import WorkerOptions
from rowmill.streams.partition_state import PartitionState
from rowmill.streams.session import Session
from rowmill.streams.worker import WorkerStats
from support.fake_broker import FakeBroker, Step, lost
from support.fake_clock import FakeClock
from support.rows import header_of

GROUP = "rowmill.p"
QUICK: dict[str, Any] = {"commit_interval": 0.005, "broker_timeout": 0.5, "drain_timeout": 5.0, "fetch_rows": 20}

pytestmark = pytest.mark.timeout(30)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what workers do by themselves."""
    while not condition():
        await asyncio.sleep(0.001)


def pipeline_of(*handlers: Any, **options: Any) -> Pipeline:
    """A pipeline from in to out."""
    pipeline = Pipeline("p", source="in", sink="out", **{"ordering": "partition", **options})
    for number, handler in enumerate(handlers or [lambda row: row]):
        pipeline.add(handler, name=f"stage{number}")
    return pipeline


class Bench:
    """A broker with rows in three partitions, and workers on it."""

    def __init__(self, rows: int = 150, partitions: int = 3) -> None:
        self.broker = FakeBroker()
        self.tps = self.broker.make("in", partitions)
        for n in range(rows):
            self.broker.write(self.tps[n % partitions], dumps({"n": n}), key=b"%d" % (n % 10))
        self.rows = rows

    def worker(self, pipeline: Pipeline | None = None, clock: Clock | None = None, **options: Any) -> Worker:
        """A worker that is not running yet."""
        settings = WorkerOptions(**{**QUICK, **options})
        return Worker(pipeline or pipeline_of(), self.broker, options=settings, clock=clock, steered=False)

    @property
    def ends(self) -> dict[TopicPartition, int]:
        """Where the source ends now."""
        return {tp: self.broker.log(tp).high_watermark for tp in self.tps}

    @asynccontextmanager
    async def running(self, pipeline: Pipeline | None = None, **options: Any) -> AsyncIterator[Worker]:
        """A worker that runs, and is stopped at the end."""
        worker = self.worker(pipeline, **options)
        run = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            await run

    async def finish(self, pipeline: Pipeline | None = None, clock: Clock | None = None, **options: Any) -> WorkerStats:
        """Run a worker until everything in the source is committed."""
        worker = self.worker(pipeline, clock, **options)
        worker.finish_at(self.ends)
        async with asyncio.timeout(15):
            return await worker.run()

    def found(self, topic: str = "out") -> list[int]:
        """The numbers of the rows in a topic, in order of partition and offset."""
        return [loads(value or b"")["n"] for value in self.broker.values(topic)]

    def exact(self) -> None:
        """Assert that every row has one result, in the source's order, and that everything is committed."""
        expected = [n for p in range(len(self.tps)) for n in range(p, self.rows, len(self.tps))]
        assert self.found() == expected
        assert self.broker.group_offsets[GROUP] == {tp: Committed(end) for tp, end in self.ends.items()}


@pytest.fixture
def bench() -> Bench:
    """A fresh one."""
    return Bench()


# --- the plain case --------------------------------------------------------------------------------------------


async def test_to_the_end(bench: Bench) -> None:
    """A worker with an end processes everything once, counts it, and leaves the group."""
    stats = await bench.finish()
    bench.exact()
    assert (stats.rows, stats.results, stats.dropped, stats.dead_letters, stats.emitted) == (150, 150, 0, 0, 0)
    assert stats.transactions == bench.broker.commits - len(bench.tps), "one more for each settled where it begins"
    assert stats.partitions == set(bench.tps)
    assert bench.broker.joined(GROUP) == []


async def test_nothing_left_to_do(bench: Bench) -> None:
    """Run again, it finds everything committed and does nothing."""
    await bench.finish()
    commits = bench.broker.commits
    stats = await bench.finish()
    assert (stats.rows, bench.broker.commits) == (0, commits)
    bench.exact()


async def test_no_rows_at_all() -> None:
    """An empty source ends at once."""
    bench = Bench(rows=0)
    assert (await bench.finish()).rows == 0


async def test_every_fate(bench: Bench) -> None:
    """Results, drops, dead letters and side outputs of one run are counted and found where they belong."""

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        if row["n"] % 5 == 0:
            return None
        if row["n"] % 5 == 1:
            ctx.emit("side", row)
        return row if row["n"] % 5 < 4 else 1 / 0

    stats = await bench.finish(pipeline_of(handler))
    assert (stats.rows, stats.results, stats.dropped, stats.dead_letters, stats.emitted) == (150, 90, 30, 30, 30)
    assert sorted(bench.found("side")) == [n for n in range(150) if n % 5 == 1]
    assert sorted(bench.found("p.dlq")) == [n for n in range(150) if n % 5 == 4]
    assert sorted(bench.found()) == [n for n in range(150) if n % 5 in {1, 2, 3}]


async def test_gaps_and_markers(bench: Bench) -> None:
    """Offsets without rows, in the middle and at the end of partitions, do not keep a run from ending."""
    bench.broker.skip_offsets(bench.tps[0], 4)
    bench.broker.skip_offsets(bench.tps[1], 1)
    bench.broker.write(bench.tps[1], dumps({"n": 999}))
    stats = await bench.finish()
    assert stats.rows == 151
    assert bench.broker.group_offsets[GROUP] == {tp: Committed(end) for tp, end in bench.ends.items()}


async def test_rows_that_come_later(bench: Bench) -> None:
    """Without an end a worker waits for rows and takes them as they come, until it is stopped."""
    async with bench.running() as worker:
        await until(lambda: worker.has_committed(bench.ends))
        bench.exact()
        for n in range(150, 180):
            bench.broker.write(bench.tps[n % 3], dumps({"n": n}))
        bench.rows = 180
        await until(lambda: worker.has_committed(bench.ends))
    bench.exact()


async def test_sessions_have_topics_of_their_own(bench: Bench) -> None:
    """A session besides the live one reads the same source with its own group and writes to its own topics."""
    worker = Worker(pipeline_of(), bench.broker, session=Session("p", "try"), options=WorkerOptions(**QUICK))
    worker.finish_at(bench.ends)
    await worker.run()
    assert bench.found("out.try")
    assert set(bench.broker.group_offsets) == {"rowmill.p.try"}
    assert {header_of(r.headers, "rowmill.session") for r in bench.broker.records("out.try")} == {b"try"}
    assert "out" not in await bench.broker.topics()


# --- where it begins -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("earliest", 10),
        ("latest", 0),
        (datetime.fromtimestamp(0.004, UTC), 6),
        (datetime.fromtimestamp(5_000, UTC), 0),
    ],
)
async def test_where_the_live_session_begins(start: Any, expected: int) -> None:
    """The first start is at the earliest row, at the end, or at a time; the fake's timestamps are its offsets."""
    bench = Bench(rows=10, partitions=1)
    async with bench.running(pipeline_of(start=start)) as worker:
        await until(lambda: bool(worker._tasks) and all(task.running for task in worker._tasks.values()))
        bench.broker.write(bench.tps[0], dumps({"n": 10}))
        await until(lambda: len(bench.found()) == expected + 1)
    assert bench.found() == list(range(10 - expected, 11))


async def test_start_is_for_the_first_time_only(bench: Bench) -> None:
    """Once the group has committed, it goes on there, whatever ``start`` says."""
    await bench.finish()
    bench.broker.write(bench.tps[0], dumps({"n": 999}))
    await bench.finish(pipeline_of(start="latest"))
    assert 999 in bench.found()


async def test_topics_that_are_made(bench: Bench) -> None:
    """Sink and dead-letter topic are made as wide as the source, the latter with room for an error."""
    await bench.finish()
    topics = await bench.broker.topics()
    assert (topics["out"].partitions, topics["p.dlq"].partitions) == (3, 3)
    assert int(topics["p.dlq"].config["max.message.bytes"]) > bench.broker.max_message_bytes + 64 * 1024
    assert topics["out"].config == {}


async def test_topics_that_may_not_be_made(bench: Bench) -> None:
    """With creation off a missing topic is an error before anything is read."""
    with pytest.raises(TopicError, match="'out' does not exist"):
        await bench.finish(create_topics=False)
    assert bench.broker.group_offsets == {}


async def test_an_offset_that_is_gone(bench: Bench) -> None:
    """A checkpoint below what retention left is an error that names the place, never a silent jump."""
    bench.broker.group_offsets[GROUP] = {bench.tps[1]: Committed(3)}
    bench.broker.truncate(bench.tps[1], 10)
    with pytest.raises(OffsetOutOfRangeError, match="in/1: offset 3") as told:
        await bench.finish()
    assert "`rowmill replay p --source in --topic in:1 --to-earliest --execute`" in str(told.value)


# --- stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 17, 60, 149])
async def test_stopped_in_the_middle(bench: Bench, after: int) -> None:
    """Stopped anywhere, a worker commits what it began and leaves the rest to the next one: nothing lost or twice."""
    seen: list[int] = []

    async def handler(row: dict[str, Any]) -> Any:
        seen.append(row["n"])
        if len(seen) == after:
            worker.stop()
        await asyncio.sleep(0)
        return row

    worker = bench.worker(pipeline_of(handler))
    stats = await worker.run()
    assert stats.rows == len(bench.found())
    assert stats.rows >= min(after, 1)
    await bench.finish()
    bench.exact()


@pytest.mark.parametrize("is_async", [False, True])
async def test_rows_that_do_not_finish(bench: Bench, is_async: bool) -> None:
    """A handler that hangs holds up the end for ``drain_timeout`` and no longer; its row belongs to the next worker."""
    begun, release = threading.Event(), threading.Event()

    def hang(row: dict[str, Any]) -> Any:
        begun.set()
        release.wait()
        return row

    async def hang_async(row: dict[str, Any]) -> Any:
        begun.set()
        await asyncio.Event().wait()

    worker = bench.worker(pipeline_of(hang_async if is_async else hang), drain_timeout=0.05)
    run = asyncio.create_task(worker.run())
    try:
        await until(begun.is_set)
        worker.stop()
        assert (await asyncio.wait_for(run, 5)).rows == 0
    finally:
        release.set()
    await bench.finish()
    bench.exact()


async def test_cancelled(bench: Bench) -> None:
    """Cancelling run() is an end like any other: the group is left, and the next worker goes on."""
    async with asyncio.timeout(10):
        run = asyncio.create_task(bench.worker().run())
        await until(lambda: bench.broker.commits > 0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
    assert bench.broker.joined(GROUP) == []
    await bench.finish()
    bench.exact()


async def test_stopped_before_it_began(bench: Bench) -> None:
    """A stop that comes first is heeded."""
    worker = bench.worker()
    worker.stop()
    assert (await asyncio.wait_for(worker.run(), 5)).rows == 0


# --- bounds ----------------------------------------------------------------------------------------------------


async def test_back_pressure(bench: Bench) -> None:
    """A slow handler keeps no more rows in memory than the buffer and one fetch; the others stay at the broker."""
    gate = asyncio.Event()
    held: list[int] = []

    async def slow(row: dict[str, Any]) -> Any:
        await gate.wait()
        return row

    async with bench.running(pipeline_of(slow), buffer_rows=15, fetch_rows=10) as worker:
        await until(lambda: len(worker._tasks) == 3 and not any(task.wants_rows for task in worker._tasks.values()))
        for _ in range(20):
            await asyncio.sleep(0)
            held.append(max(task._buffered_rows for task in worker._tasks.values()))
        assert max(held) <= 15 + 10
        gate.set()
        await until(lambda: worker.has_committed(bench.ends))
    bench.exact()


@pytest.mark.parametrize(
    ("bound", "options", "map_holds"),
    [
        ("rows", {"max_in_flight": 5}, 1_000),
        ("bytes", {"max_in_flight_bytes": 20, "fetch_rows": 5}, 1_000),
        ("map", {}, 5),
    ],
)
async def test_a_bound_that_is_full_is_told(
    monkeypatch: pytest.MonkeyPatch, bound: str, options: dict[str, int], map_holds: int
) -> None:
    """Where rows wait because a bound is reached, the snapshot says which; it says nothing once they go on."""
    monkeypatch.setattr("rowmill.streams.offsets.IN_FLIGHT_LIMIT", map_holds)
    monkeypatch.setattr("rowmill.streams.offsets.SPAN_LIMIT", map_holds)
    bench = Bench(rows=60)
    gate = asyncio.Event()

    async def slow(row: dict[str, Any]) -> Any:
        await gate.wait()
        return row

    def told(worker: Worker) -> set[str]:
        return {each.full for each in worker.snapshot().partitions}

    async with bench.running(pipeline_of(slow, ordering="none"), **options) as worker:
        await until(lambda: bound in told(worker))
        assert told(worker) <= {bound, ""}
        gate.set()
        await until(lambda: worker.has_committed(bench.ends))
        assert told(worker) == {""}
    bench.exact()


async def test_rows_are_begun_only_while_the_map_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many rows come together, with far gaps between them, as in a compacted topic."""
    few, span = 10, 100
    monkeypatch.setattr("rowmill.streams.offsets.IN_FLIGHT_LIMIT", few)
    monkeypatch.setattr("rowmill.streams.offsets.SPAN_LIMIT", span)
    bench = Bench(rows=0)
    tp = bench.tps[0]
    for n in range(80):
        if n >= 50:
            bench.broker.skip_offsets(tp, span)
        bench.broker.write(tp, dumps({"n": n}))
    gate = asyncio.Event()

    async def slow(row: dict[str, Any]) -> Any:
        await gate.wait()
        return row

    async with bench.running(pipeline_of(slow, ordering="none"), fetch_rows=100) as worker:
        await until(lambda: worker._in_flight.rows >= 50)
        await asyncio.sleep(0.05)
        assert worker._in_flight.rows == 50, "those within the span, and not one beyond it"
        gate.set()
        await until(lambda: worker.has_committed({tp: bench.broker.log(tp).high_watermark}))
    assert sorted(bench.found()) == list(range(80))


async def test_one_slow_partition(bench: Bench) -> None:
    """A partition whose row hangs does not hold up the others."""
    gate = asyncio.Event()

    async def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        if ctx.partition == 1:
            await gate.wait()
        return row

    async with bench.running(pipeline_of(handler), buffer_rows=15) as worker:
        others = {tp: end for tp, end in bench.ends.items() if tp.partition != 1}
        await until(lambda: worker.has_committed(others))
        assert not worker.has_committed(bench.ends)
        gate.set()
        await until(lambda: worker.has_committed(bench.ends))
    bench.exact()


# --- groups ----------------------------------------------------------------------------------------------------


async def test_two_workers_share(bench: Bench) -> None:
    """A second worker that joins midway takes over partitions with their checkpoints; together they are exact."""
    gate = asyncio.Event()

    async def handler(row: dict[str, Any]) -> Any:
        if row["n"] >= 60:
            await gate.wait()
        return row

    one, two = bench.worker(pipeline_of(handler)), bench.worker(pipeline_of(handler))
    ends = bench.ends
    for worker in (one, two):
        worker.finish_at(ends)
    runs = [asyncio.create_task(one.run())]
    await until(lambda: len(one._tasks) == 3)
    runs.append(asyncio.create_task(two.run()))
    await until(lambda: len(bench.broker.joined(GROUP)) == 2 and bool(one._tasks) and bool(two._tasks))
    gate.set()
    stats = await asyncio.wait_for(asyncio.gather(*runs), 15)
    bench.exact()
    assert sum(s.rows for s in stats) == 150
    assert all(s.rows for s in stats)


async def test_partitions_are_opened_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for its own restore, none for another's: all of them are being opened before the first one is."""
    bench = Bench(rows=0, partitions=24)
    opening: set[TopicPartition] = set()
    really = PartitionState.open

    async def open_with_all_others(state: PartitionState, committed: Committed | None) -> None:
        opening.add(state._tp)
        await until(lambda: len(opening) == 24)
        await really(state, committed)

    monkeypatch.setattr(PartitionState, "open", open_with_all_others)
    async with bench.running() as worker:
        await until(lambda: len(worker._tasks) == 24)


async def test_the_other_worker_leaves(bench: Bench) -> None:
    """When one of two workers stops, the other takes its partitions and ends the work."""
    ends = bench.ends
    one, two = bench.worker(), bench.worker()
    one.finish_at(ends)
    runs = [asyncio.create_task(worker.run()) for worker in (one, two)]
    await until(lambda: len(bench.broker.joined(GROUP)) == 2)
    two.stop()
    await asyncio.wait_for(asyncio.gather(*runs), 15)
    bench.exact()


async def test_revoked_partitions_are_flushed(bench: Bench) -> None:
    """What is done when a partition is revoked is committed first, although its interval is not over."""
    async with bench.running(commit_interval=3_600.0) as worker:
        await until(lambda: sum(task.low_watermark for task in worker._tasks.values()) == 150)
        assert bench.broker.values("out") == []
        owners = dict(worker._owners)
        await worker.revoked(frozenset(bench.tps))
        bench.exact()
        worker.assigned(frozenset(bench.tps[:2]), consecutive=True)
        await until(owners[bench.tps[2]].done)
        assert worker._owners == {tp: owners[tp] for tp in bench.tps[:2]}, "those that came straight back go on"


async def test_revoking_does_not_wait_for_rows_in_work(bench: Bench) -> None:
    """Rows in work hold up no revocation; when their partition does not come back they run again at the next owner."""
    started = asyncio.Event()

    async def hang(row: dict[str, Any]) -> Any:
        started.set()
        await asyncio.Event().wait()

    async with bench.running(pipeline_of(hang)) as worker:
        await started.wait()
        owners = list(worker._owners.values())
        await asyncio.wait_for(worker.revoked(frozenset(bench.tps)), 2)
        worker.assigned(frozenset(), consecutive=True)
        assert worker._owners == {}
        await until(lambda: all(owner.done() for owner in owners))
    await bench.finish()
    bench.exact()


async def test_assigned_anew_without_a_revocation(bench: Bench) -> None:
    """A member that was evicted while it stood still drops its old tasks, as they are another owner's by now."""
    gate = asyncio.Event()

    async def handler(row: dict[str, Any]) -> Any:
        await gate.wait()
        return row

    async with bench.running(pipeline_of(handler)) as worker:
        await until(lambda: len(worker._tasks) == 3 and all(task._buffered_rows for task in worker._tasks.values()))
        old, member = list(worker._owners.values()), worker._member
        bench.broker.evict(GROUP)
        await until(lambda: all(owner.done() for owner in old))
        assert len(worker._owners) == 3
        gate.set()
        await until(lambda: worker.has_committed(bench.ends))
        assert worker._member is member
    bench.exact()
    assert set(bench.broker.starts.values()) == {2}


async def test_fenced_workers_join_again(bench: Bench) -> None:
    """A worker that loses a producer to somebody else joins the group again and goes on from the checkpoint."""
    bench.broker.inject("end", FencedError("somebody else"), skip=2)
    await bench.finish()
    bench.exact()
    assert max(bench.broker.starts.values()) >= 2


# --- faults ----------------------------------------------------------------------------------------------------

FAULTS: list[Step] = ["start", "begin", "send", "ack", "offsets", "end", "committed", "look_up", "fetch", "position"]


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("took_effect", [False, True])
@pytest.mark.parametrize("step", FAULTS)
async def test_any_step_may_fail(bench: Bench, step: Step, took_effect: bool, skip: int) -> None:
    """Whatever the broker fails at, and whether or not it did its work: the run ends, and its results are exact."""
    bench.broker.inject(step, lost(), took_effect=took_effect, skip=skip, times=2)
    await bench.finish(clock=FakeClock())
    bench.exact()


@pytest.mark.parametrize("step", ["start", "send", "ack", "offsets", "end", "committed", "look_up"])
async def test_any_step_may_never_answer(bench: Bench, step: Step) -> None:
    """A call of the broker without an answer ends at its deadline, and the partition begins again."""
    bench.broker.inject(step)
    await bench.finish(clock=FakeClock(), broker_timeout=0.05)
    bench.exact()


async def test_the_checkpoint_moves(bench: Bench) -> None:
    """When a failed commit finds a checkpoint that somebody else moved, the partition begins again there."""
    tp = TopicPartition("in", 0)

    def move() -> None:
        bench.broker.group_offsets.setdefault(GROUP, {})[tp] = Committed(45)

    bench = Bench(rows=50, partitions=1)
    bench.broker.inject("end", lost(), then=move)
    await bench.finish(clock=FakeClock())
    assert bench.found() == [45, 46, 47, 48, 49]


@pytest.mark.parametrize("step", ["start", "send", "end", "committed"])
async def test_stalled(bench: Bench, step: Step) -> None:
    """A partition that cannot commit for stall_timeout ends the worker with what a supervisor needs to know."""
    bench.broker.inject(step, lost("still away"), times=10**9)
    with pytest.raises(StalledError, match="still away"):
        await bench.finish(clock=FakeClock())


async def test_stalled_while_processing(bench: Bench) -> None:
    """A partition that opens each time but can never process its rows is stalled as well."""

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.emit("new", row)
        bench.broker.inject("topics", lost("still away"), times=10**9)

    with pytest.raises(StalledError, match="still away"):
        await bench.finish(pipeline_of(handler), clock=FakeClock())


async def test_trouble_that_passes_is_no_stall() -> None:
    """Failures far apart, each followed by progress, never add up to a stall."""
    bench = Bench(rows=60, partitions=1)

    class SlowClock(SystemClock):
        """Each look at the clock takes a second."""

        ticks = 0.0

        def monotonic(self) -> float:
            self.ticks += 1.0
            return self.ticks

        async def sleep(self, seconds: float) -> None:
            self.ticks += seconds
            await asyncio.sleep(0)

    failing = 0

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        nonlocal failing
        if row["n"] % 10 == 0 and failing <= row["n"] // 10:
            failing += 1
            bench.broker.inject("topics", lost())
        ctx.emit(f"side{row['n'] // 10}", row)
        return row

    await bench.finish(pipeline_of(handler), clock=SlowClock(), stall_timeout=60.0, fetch_rows=5)
    bench.exact()
    assert failing == 6


async def test_a_bug_reaches_the_caller(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected ends run() with that error, after the other partitions were left in order."""
    offsets = bench.broker.offsets

    async def broken(partitions: Any, at: Any) -> Any:
        if bench.tps[1] in partitions:
            raise ZeroDivisionError("a bug")
        return await offsets(partitions, at)

    monkeypatch.setattr(bench.broker, "offsets", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await bench.finish()
    assert bench.broker.joined(GROUP) == []


async def test_no_task_outlives_the_worker(bench: Bench) -> None:
    """When run() has ended, nothing of it is left on the event loop."""
    before = asyncio.all_tasks()
    bench.broker.inject("end", FencedError("x"), skip=1)
    bench.broker.inject("end", lost(), skip=3)
    await bench.finish(clock=FakeClock())
    assert asyncio.all_tasks() == before
