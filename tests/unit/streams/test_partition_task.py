"""One assigned partition: taking rows, committing them, draining, gaps, bounds and errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rowmill import Pipeline
from rowmill.handlers.chain import Chain
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.flow import Flow
from rowmill.handlers.outcomes import Failure
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import Stage, make_stage
from rowmill.state.clock import Clock, SystemClock
from rowmill.state.codec import dumps, loads
from rowmill.state.model import Committed, Record, TopicPartition
from rowmill.streams.catalog import Catalog
from rowmill.streams.errors import BrokerError, FencedError, TopicError
from rowmill.streams.in_flight import InFlight
from rowmill.streams.options import WorkerOptions
from rowmill.streams.partition_state import PartitionState
from rowmill.streams.partition_task import PartitionTask
from rowmill.streams.processing import Effects, Processor
from rowmill.streams.session import Session
from rowmill.streams.transaction import Transactor
from support.fake_broker import FakeBroker, lost
from support.fake_clock import FakeClock

TP = TopicPartition("in", 0)
GROUP = "rowmill.p"
ROWS = [{"n": n} for n in range(100)]
LATE = 3_600.0
"""A commit interval that no test waits for."""

pytestmark = pytest.mark.timeout(20)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the task does by itself."""
    while not condition():
        await asyncio.sleep(0.001)


class Bench:
    """A broker with a hundred rows in in/0, and partition tasks for it."""

    def __init__(self) -> None:
        self.broker = FakeBroker()
        for topic in ("in", "out", "p.dlq", "rowmill.p.in.changelog"):
            self.broker.make(topic)
        self.broker.write(TP, *(dumps(row) for row in ROWS))
        self.pool = BlockingPool(1)
        self.commits: list[Effects] = []
        self.halted: list[Failure] = []
        self.changes = 0
        self.gate = asyncio.Event()
        """Rows wait here, when the handler is ``waiting``."""
        self.begun: list[int] = []
        self.gate.set()

    async def handler(self, row: dict[str, Any]) -> Any:
        """Passes rows on, once the gate is open."""
        self.begun.append(row["n"])
        await self.gate.wait()
        return row

    async def task(self, handler: Any = None, clock: Clock | None = None, **options: Any) -> PartitionTask:
        """A task that is not opened yet."""
        pipeline = Pipeline("p", source="in", sink="out")
        pipeline.add(handler if isinstance(handler, Stage) else make_stage(handler or self.handler, name="stage"))
        catalog = Catalog(self.broker, create=False, partitions=None, timeout=5)
        await catalog.require(["in", "out", "p.dlq"])
        session, settings, clock = (
            Session("p"),
            WorkerOptions(**{"commit_interval": 0.0, "max_deaths": 0, **options}),
            clock or SystemClock(),
        )

        def changed() -> None:
            self.changes += 1

        return PartitionTask(
            TP,
            make_flow=None,
            in_flight=InFlight(1_000, 1 << 26),
            alone=asyncio.Lock(),
            delivery=Transactor(self.broker, session, TP, settings, clock),
            state=PartitionState(self.broker, session, TP, {}, None, settings, self.pool, clock, "me"),
            make_processor=lambda: Processor(pipeline, pipeline.chain(), session, TP, catalog, Runtime(self.pool)),
            options=settings,
            clock=clock,
            on_commit=lambda _tp, effects, _seconds: self.commits.append(effects),
            on_halt=lambda _tp, failure: self.halted.append(failure),
            on_change=changed,
        )

    @asynccontextmanager
    async def running(self, handler: Any = None, **options: Any) -> AsyncIterator[PartitionTask]:
        """A task that was opened and runs; cancelled at the end if it still does."""
        task = await self.task(handler, **options)
        await task.open(self.first_offset)
        run = asyncio.create_task(task.run())
        await until(lambda: task.running)
        try:
            yield task
        finally:
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await run
            await task.close()

    async def first_offset(self, tp: TopicPartition) -> int:
        return 0

    def offer(self, task: PartitionTask, first: int, last: int) -> None:
        """Give a task the rows ``first`` to ``last - 1``."""
        task.offer(self.broker.records("in")[first:last])

    def committed(self) -> Committed | None:
        """What the group has committed."""
        return self.broker.group_offsets.get(GROUP, {}).get(TP)

    def exact(self, count: int) -> None:
        """Assert that the results of the first rows are there once, in order, with their checkpoint."""
        assert self.broker.values("out") == [dumps(row) for row in ROWS[:count]]
        assert self.committed() in ((Committed(count),) if count else (None, Committed(0)))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A fresh one."""
    bench = Bench()
    yield bench
    bench.pool.close()


async def test_where_it_begins(bench: Bench) -> None:
    """Without a checkpoint at the first offset, which is asked for only then and committed at once; else there."""
    asked: list[TopicPartition] = []

    async def first(tp: TopicPartition) -> int:
        asked.append(tp)
        return 42

    task = await bench.task()
    assert await task.open(first) == 42
    assert (task.committed, task.low_watermark, bench.committed()) == (42, 42, Committed(42))
    bench.broker.group_offsets[GROUP] = {TP: Committed(7)}
    task = await bench.task()
    assert await task.open(first) == 7
    assert (task.committed, task.low_watermark) == (7, 7)
    assert asked == [TP]


async def test_rows_become_results(bench: Bench) -> None:
    """Offered rows are processed and committed; the owner is told of the effects, and the task is settled."""
    async with bench.running() as task:
        settled = [task.is_settled]
        for first in (0, 30):
            bench.offer(task, first, first + 30)
            settled.append(task.is_settled)
        assert settled == [True, False, False]
        await until(lambda: task.is_settled)
        bench.exact(60)
        assert (task.committed, task.low_watermark) == (60, 60)
        assert sum(effects.rows for effects in bench.commits) == 60
        assert bench.changes


async def test_commit_rows(bench: Bench) -> None:
    """So many rows are committed at once, without waiting for the interval."""
    async with bench.running(commit_interval=LATE, commit_rows=50) as task:
        bench.offer(task, 0, 49)
        await until(lambda: task.low_watermark == 49)
        bench.exact(0)
        bench.offer(task, 49, 51)
        await until(lambda: task.committed == 51)
        bench.exact(51)
        assert [effects.rows for effects in bench.commits] == [51]


async def test_commit_interval(bench: Bench) -> None:
    """Rows are committed once the oldest is so old, several batches in one transaction."""
    async with bench.running(commit_interval=0.05) as task:
        for first in range(0, 50, 10):
            bench.offer(task, first, first + 10)
        await until(lambda: task.committed == 50)
        bench.exact(50)
        assert len(bench.commits) == 1


async def test_flush(bench: Bench) -> None:
    """What has completed is committed without waiting for the interval; what is in work stays in work."""
    async with bench.running(commit_interval=LATE) as task:
        bench.offer(task, 0, 10)
        await until(lambda: task.low_watermark == 10)
        bench.gate.clear()
        bench.offer(task, 10, 20)
        await until(lambda: bench.begun[-1] == 10)
        await task.flush()
        bench.exact(10)
        bench.gate.set()
        await until(lambda: task.low_watermark == 20)
        await task.flush()
        bench.exact(20)


async def test_flush_of_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that has nothing to commit, because it has just begun behind offset 0, has nothing to wait for."""

    async def latest(_: TopicPartition) -> int:
        return 100

    monkeypatch.setattr(bench, "first_offset", latest)
    async with bench.running(commit_interval=LATE) as task:
        commits = bench.broker.commits
        await asyncio.wait_for(task.flush(), 2)
        assert (bench.broker.commits, bench.committed()) == (commits, Committed(100))


async def test_drain(bench: Bench) -> None:
    """Draining finishes the batch in work, commits it and ends; rows not begun are left to the next run."""
    bench.gate.clear()
    task = await bench.task(commit_interval=LATE)
    await task.open(bench.first_offset)
    run = asyncio.create_task(task.run())
    await until(lambda: task.running)
    for first in range(0, 100, 25):
        bench.offer(task, first, first + 25)
    await until(lambda: bench.begun == [0])
    task.drain()
    assert not task.wants_rows
    bench.gate.set()
    await run
    done = len(bench.begun)
    assert 1 <= done < 100
    bench.exact(done)
    assert not task.running
    async with bench.running() as heir:
        bench.offer(heir, done, 100)
        await until(lambda: heir.is_settled)
    bench.exact(100)


@pytest.mark.parametrize(
    ("seconds_a_row", "batch", "least", "most"),
    [(1.0, None, 1, 1), (0.05, None, 2, 4), (1.0, 20, 20, 20), (0.0, None, 100, 256)],
)
async def test_lots_suit_their_pace(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, seconds_a_row: float, batch: int | None, least: int, most: int
) -> None:
    """Rows are taken in lots that last about ``commit_interval``: few slow ones, many quick ones, whole batches."""
    clock = FakeClock()
    sizes: list[int] = []

    def handler(rows: Any) -> Any:
        clock.advance(seconds_a_row * (len(rows) if batch else 1))
        return rows

    bench.broker.write(TP, *(dumps({"n": n}) for n in range(100, 400)))
    async with bench.running(make_stage(handler, batch=batch), clock=clock, commit_interval=0.15) as task:
        process = task._processor.process

        async def noting(records: Any) -> Effects:
            sizes.append(len(records))
            return await process(records)

        monkeypatch.setattr(task._processor, "process", noting)
        for first in range(0, 400, 7):
            bench.offer(task, first, first + 7)
        await until(lambda: task.low_watermark == 400)
        await task.flush()
    assert least <= sizes[1] <= most
    assert sizes[0] <= 64
    assert [loads(value or b"")["n"] for value in bench.broker.values("out")] == list(range(400))


async def test_drain_of_an_idle_task(bench: Bench) -> None:
    """A task without work ends at once and commits nothing."""
    task = await bench.task()
    await task.open(bench.first_offset)
    run = asyncio.create_task(task.run())
    await until(lambda: task.running)
    task.drain()
    await run
    assert bench.commits == []


async def test_no_row_begins_once_the_task_drains(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose start is being noted when the task drains stay undone: one before them was given up."""
    calls: list[int] = []

    class Later(OSError):  # noqa: N818
        retry_after = 1_000

    async def handler(row: dict[str, Any]) -> Any:
        calls.append(row["n"])
        if row["n"] == 0:
            raise Later
        return row

    stage = make_stage(handler, name="stage", retry=2)
    task = await bench.task(stage, max_deaths=3, commit_interval=0.05, drain_timeout=1)
    task._flow = Flow(
        Chain([stage]), Runtime(bench.pool), task._finished, task._wake, task._give_up, by_key=True, linger=0.02
    )
    await task.open(bench.first_offset)
    task._careful_rows = 1_000  # as after a death
    run = asyncio.create_task(task.run())
    await until(lambda: task.running)
    records = [record._replace(key=b"k") for record in bench.broker.records("in")[:3]]
    task.offer(records[:1])
    await until(lambda: calls == [0])
    await asyncio.sleep(0.1)
    note, noting = task._commits.note_starts, asyncio.Event()

    async def slowly(rows: Sequence[Record]) -> None:
        noting.set()
        await note(rows)
        await asyncio.sleep(0.2)

    monkeypatch.setattr(task._commits, "note_starts", slowly)
    task.offer(records[1:])
    await noting.wait()
    task.drain()
    await asyncio.wait_for(run, 5)
    await task.close()
    assert bench.broker.values("out") == []


async def test_a_gap_at_the_end(bench: Bench) -> None:
    """The watermark moves over offsets that hold no rows, as soon as every row before them is done."""
    async with bench.running() as task:
        task.advance(0)
        await task.flush()
        assert bench.committed() == Committed(0)
        bench.offer(task, 0, 100)
        task.advance(103)
        await until(lambda: task.committed == 103)
        assert len(bench.broker.values("out")) == 100
        task.advance(110)
        await until(lambda: task.committed == 110)
        task.advance(105)  # behind what is known
        await task.flush()
        assert bench.committed() == Committed(110)


async def test_a_gap_behind_rows_in_work(bench: Bench) -> None:
    """A gap that is told while rows before it are in work is not committed before they are."""
    bench.gate.clear()
    async with bench.running() as task:
        bench.offer(task, 0, 100)
        await until(lambda: bench.begun == [0])
        task.advance(120)
        await asyncio.sleep(0)
        assert (task.low_watermark, bench.committed()) == (0, Committed(0))
        bench.gate.set()
        await until(lambda: task.committed == 120)
        assert len(bench.broker.values("out")) == 100


async def test_gaps_between_batches(bench: Bench) -> None:
    """Offsets missing between two batches are no obstacle, and are not committed before their time."""
    bench.gate.clear()
    async with bench.running(commit_rows=1) as task:
        bench.offer(task, 0, 10)
        bench.offer(task, 50, 60)
        await until(lambda: bench.begun == [0])
        bench.gate.set()
        await until(lambda: task.committed == 60)
        assert sum(effects.rows for effects in bench.commits) == 20


@pytest.mark.parametrize(
    ("options", "batches"),
    [({"buffer_rows": 20}, 2), ({"buffer_rows": 1}, 1), ({"buffer_bytes": 100}, 2), ({"buffer_bytes": 71}, 2)],
)
async def test_back_pressure(bench: Bench, options: dict[str, Any], batches: int) -> None:
    """A task wants no rows before it runs, while its buffer is full of rows or bytes, and after it was told to end."""
    bench.gate.clear()
    task = await bench.task(**options)
    assert not task.wants_rows
    async with bench.running(**options) as task:
        offered = 0
        while task.wants_rows:
            bench.offer(task, offered * 10, offered * 10 + 10)  # 70 bytes
            offered += 1
        assert offered == batches
        bench.gate.set()
        await until(lambda: task.is_settled)
        bench.exact(offered * 10)
        wanted = [task.wants_rows]
        task.drain()
        assert [*wanted, task.wants_rows] == [True, False]


async def test_rows_count_until_they_are_committed(bench: Bench) -> None:
    """Rows that are done but not committed still fill the buffer: memory is bounded, not only work."""
    async with bench.running(buffer_rows=10, commit_interval=LATE) as task:
        bench.offer(task, 0, 10)
        await until(lambda: task.low_watermark == 10)
        assert not task.wants_rows
        await task.flush()
        assert task.wants_rows


async def test_processing_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error outside of handlers ends the task with that error; what it had not committed is left to the next run."""
    broken = await bench.task(commit_interval=LATE)
    await broken.open(bench.first_offset)

    async def fail(_: object) -> Effects:
        raise BrokerError("no topics")

    run = asyncio.create_task(broken.run())
    bench.offer(broken, 0, 10)
    await until(lambda: broken.low_watermark == 10)
    monkeypatch.setattr(broken._processor, "process", fail)
    bench.offer(broken, 10, 20)
    with pytest.raises(BrokerError, match="no topics"):
        await run
    assert not broken.running
    bench.exact(0)


@pytest.mark.parametrize("error", [FencedError("newer"), TopicError("refused")])
async def test_committing_fails(bench: Bench, error: Exception) -> None:
    """An error that a commit cannot mend by itself ends the task, also while rows are in work."""
    task = await bench.task()
    await task.open(bench.first_offset)
    bench.broker.inject("offsets", error)
    run = asyncio.create_task(task.run())
    bench.offer(task, 0, 10)
    await until(lambda: task.low_watermark == 10 or run.done())
    bench.gate.clear()
    if not run.done():
        bench.offer(task, 10, 20)
    with pytest.raises(type(error)):
        await run
    bench.exact(0)


async def test_commits_that_fail_are_mended(bench: Bench) -> None:
    """While a commit is sent again, rows go on being processed, and everything appears once."""
    bench.broker.inject("end", lost(), took_effect=True, skip=1)
    bench.broker.inject("ack", lost(), skip=2)
    async with bench.running() as task:
        for first in range(0, 100, 10):
            bench.offer(task, first, first + 10)
            await until(lambda first=first: task.low_watermark == first + 10)  # type: ignore[misc]
        await until(lambda: task.is_settled)
    bench.exact(100)


@pytest.mark.parametrize("after", [1, 3, 5, 8])
async def test_cut_off_anywhere(bench: Bench, after: int) -> None:
    """A task that is cancelled at any moment loses and repeats nothing: the next one goes on at the checkpoint."""
    begun = asyncio.Event()

    async def handler(row: dict[str, Any]) -> Any:
        if row["n"] == after * 10 + 5:
            begun.set()
        await asyncio.sleep(0)
        return row

    async with bench.running(handler) as task:
        for first in range(0, 100, 10):
            bench.offer(task, first, first + 10)
        await begun.wait()
    async with bench.running(handler) as heir:
        bench.offer(heir, heir.low_watermark, 100)
        await until(lambda: heir.is_settled)
    bench.exact(100)


Handler = Callable[[dict[str, Any]], Awaitable[Any] | Any]


def sync_cancelled(row: dict[str, Any]) -> Any:
    """Raises in a thread."""
    raise asyncio.CancelledError("mine")


async def async_cancelled(row: dict[str, Any]) -> Any:
    """Raises on the loop."""
    raise asyncio.CancelledError("mine")


@pytest.mark.parametrize("handler", [sync_cancelled, async_cancelled])
async def test_a_handler_cannot_cancel_the_task(bench: Bench, handler: Handler) -> None:
    """A CancelledError that a handler raises is a dead letter; it does not end processing without a word."""
    async with bench.running(handler) as task:
        bench.offer(task, 0, 10)
        await until(lambda: task.is_settled)
    assert len(bench.broker.values("p.dlq")) == 10
    assert bench.committed() == Committed(10)
