"""At least once, a partition task sends results at once; the changelog and the offset follow together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rowmill import Pipeline
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.runtime import Runtime
from rowmill.state.clock import SystemClock
from rowmill.state.codec import dumps, loads
from rowmill.state.memory import MemoryStore, MemoryStores
from rowmill.state.model import TopicPartition
from rowmill.state.store import StoreError
from rowmill.streams.catalog import Catalog
from rowmill.streams.delivery import Forwarder
from rowmill.streams.in_flight import InFlight
from rowmill.streams.options import WorkerOptions
from rowmill.streams.partition_state import PartitionState
from rowmill.streams.partition_task import PartitionTask
from rowmill.streams.processing import Effects, Processor
from rowmill.streams.session import Session
from support.fake_broker import DeafListener, FakeBroker, FakeMember, lost

TP = TopicPartition("in", 0)
CHANGELOG = "rowmill.p.in.changelog"
GROUP = "rowmill.p"
ROWS = [{"n": n} for n in range(10)]
LATE = 3_600.0
"""A commit interval that no test waits for."""

pytestmark = pytest.mark.timeout(20)


class Bench:
    """A broker with ten rows in in/0, a member of the group that owns it, and partition tasks for it."""

    def __init__(self) -> None:
        self.broker = FakeBroker()
        for topic in ("in", "out", "p.dlq", CHANGELOG):
            self.broker.make(topic)
        self.broker.write(TP, *(dumps(row) for row in ROWS))
        self.member = FakeMember(self.broker, GROUP, ["in"])
        self.commits: list[Effects] = []
        self.stores = MemoryStores()

    @asynccontextmanager
    async def running(self, pipeline: Pipeline | None = None, **settings: Any) -> AsyncIterator[PartitionTask]:
        """A task that was opened and runs, at least once; dies at the end without a word."""
        options = WorkerOptions(guarantee="at_least_once", max_deaths=0, **{"commit_interval": LATE, **settings})
        if pipeline is None:
            pipeline = Pipeline("p", source="in", sink="out")
            pipeline.add(lambda row: row, name="keep")
        catalog = Catalog(self.broker, create=False, partitions=None, timeout=5)
        await catalog.require(["in", "out", "p.dlq"])
        session, pool, clock = Session("p"), BlockingPool(1), SystemClock()
        state = PartitionState(self.broker, session, TP, pipeline.tables, self.stores, options, pool, clock, "me")
        task = PartitionTask(
            TP,
            make_flow=None,
            in_flight=InFlight(1_000, 1 << 26),
            alone=asyncio.Lock(),
            delivery=Forwarder(self.broker, session, TP, options, clock, lambda: self.member),
            state=state,
            make_processor=lambda: Processor(
                pipeline, pipeline.chain(), session, TP, catalog, Runtime(pool), state.tables
            ),
            options=options,
            clock=clock,
            on_commit=lambda _tp, effects, _seconds: self.commits.append(effects),
            on_halt=lambda _tp, _failure: None,
            on_change=lambda: None,
        )
        await task.open(_from_the_start)
        run = asyncio.create_task(task.run())
        await _until(lambda: task.running)
        try:
            yield task
        finally:
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError, StoreError):
                await run
            await task.close()
            pool.close()

    async def shown(self, count: int) -> None:
        """Wait for so many results."""
        await _until(lambda: len(self.broker.values("out")) >= count)

    def offer(self, task: PartitionTask, first: int, last: int) -> None:
        task.offer(self.broker.records("in")[first:last])

    @property
    def committed(self) -> int:
        return self.broker.group_offsets[GROUP][TP].offset

    @property
    def checkpoint(self) -> Mapping[str, Any] | None:
        """The changelog's newest."""
        values = self.broker.values(CHANGELOG)
        return loads(values[-1] or b"") if values else None


async def _from_the_start(_: TopicPartition) -> int:
    return 0


async def _until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
async def bench() -> Bench:
    """A fresh one, whose member has its partition."""
    bench = Bench()
    await bench.member.join(DeafListener())
    return bench


async def test_results_do_not_wait_for_their_commit(bench: Bench) -> None:
    """They are out long before anything of them is in the changelog or the group."""
    async with bench.running() as task:
        for count in range(1, 5):
            bench.offer(task, count - 1, count)
            await bench.shown(count)
        assert (bench.committed, bench.checkpoint) == (0, None)
        assert not task.is_settled


async def test_one_commit_for_all_that_was_sent(bench: Bench) -> None:
    """The changelog, the offset and the counts of several sends follow together."""
    async with bench.running() as task:
        for count in range(1, 5):
            bench.offer(task, count - 1, count)
            await bench.shown(count)
        await task.flush()
        assert bench.checkpoint is not None
        assert (bench.committed, bench.checkpoint["offset"], bench.checkpoint["counts"]["rows"]) == (4, 4, 4)
        assert sum(effects.rows for effects in bench.commits) == 4
        assert [loads(value or b"") for value in bench.broker.values("out")] == ROWS[:4]


async def test_the_interval_ends(bench: Bench) -> None:
    """Without any further row the offset of what was sent follows by itself."""
    async with bench.running(commit_interval=0.01) as task:
        bench.offer(task, 0, 1)
        await _until(lambda: bench.committed == 1)
        await _until(lambda: task.is_settled)
        assert sum(effects.rows for effects in bench.commits) == 1


async def test_many_rows_do_not_wait_for_the_interval(bench: Bench) -> None:
    """``commit_rows`` counts what was sent together with what was not."""
    async with bench.running(commit_rows=5) as task:
        bench.offer(task, 0, 3)
        await bench.shown(3)
        assert bench.committed == 0
        bench.offer(task, 3, 6)
        await _until(lambda: bench.committed == 6)


async def test_an_orderly_end_commits_what_was_sent(bench: Bench) -> None:
    """Drained, a task leaves nothing behind, and says that it stopped in order."""
    async with bench.running() as task:
        bench.offer(task, 0, 2)
        await bench.shown(2)
        task.drain()
        await _until(lambda: not task.running)
        assert bench.checkpoint is not None
        assert (bench.committed, bench.checkpoint["stopped"]) == (2, True)


async def test_a_death_before_the_commit(bench: Bench) -> None:
    """Rows whose results are out run again, and the context counts them once."""
    async with bench.running() as task:
        bench.offer(task, 0, 3)
        await bench.shown(3)
    async with bench.running() as task:
        bench.offer(task, 0, 3)
        await bench.shown(6)
        await task.flush()
        assert bench.checkpoint is not None
        assert (bench.committed, bench.checkpoint["counts"]["rows"]) == (3, 3)


async def test_a_lost_answer_to_a_commit_costs_no_row(bench: Bench) -> None:
    """The commit is made again, and its rows are not."""
    async with bench.running() as task:
        bench.offer(task, 0, 3)
        await bench.shown(3)
        bench.broker.inject("commit", lost(), took_effect=True)
        await task.flush()
        assert bench.committed == 3
        assert len(bench.broker.values("out")) == 3


async def test_nothing_goes_out_that_a_failed_read_led_to(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler may hide that its table could not be read: what it made of that is not sent, and the task ends."""

    def broken(_store: MemoryStore, key: bytes) -> bytes | None:
        if key.startswith(b"seen/"):
            raise StoreError("the disk", damaged=False)
        return None

    monkeypatch.setattr(MemoryStore, "get", broken)
    pipeline = Pipeline("p", source="in", sink="out").table("seen")

    @pipeline.stage
    def look(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        with contextlib.suppress(BaseException):
            ctx.table("seen").get("k")
        return row

    async with bench.running(pipeline) as task:
        bench.offer(task, 0, 3)
        await _until(lambda: not task.running)
    assert bench.broker.values("out") == []
