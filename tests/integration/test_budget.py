"""A budget of N calls, and a service that counts them: never more than N, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest
from rowmill import publish
from support.flaky_server import FlakyServer
from support.paid_pipelines import paid_pipeline

from .test_paid_calls import called, process
from .test_policies import rows_of
from .test_worker import running

pytestmark = pytest.mark.timeout(150)

BUDGET = 500
ROWS = 900
IN_FLIGHT = 200


async def quiet(server: FlakyServer, seconds: float, within: float = 60) -> None:
    """Wait until the service was not called for so long."""
    async with asyncio.timeout(within):
        while not server.calls or time.monotonic() - server.calls[-1].came < seconds:
            await asyncio.sleep(0.05)


async def test_a_bounded_run_ends_when_its_budget_is_used_up(broker_url: str, name: str) -> None:
    """200 calls in flight and one too many is never made; with a higher budget the rest is done, and only that paid."""
    rows = [{"n": n} for n in range(ROWS)]
    with FlakyServer(delay=0.05) as server:
        poor = paid_pipeline(name, server.url, budget=str(BUDGET), concurrency=IN_FLIGHT)
        async with asyncio.timeout(60):
            first = await poor.run_async(rows, broker=broker_url, session="s")
        assert len(server.calls) == BUDGET
        assert first.stopped is not None
        assert f"budget of {BUDGET} is used up" in first.stopped
        assert not first.is_complete
        assert set(first.data["n"]) == {call.row for call in server.calls}
        assert list(first.data["n"]) == sorted(server.per_row())
        assert (first.metrics.processed_rows, first.metrics.failed_rows) == (BUDGET, 0)
        assert first.costs.total_cost == BUDGET
        rich = paid_pipeline(name, server.url, budget="2000", concurrency=IN_FLIGHT)
        async with asyncio.timeout(60):
            second = await rich.run_async(rows, broker=broker_url, session="s")
    assert second.stopped is None
    assert second.is_complete
    assert list(second.data["n"]) == list(range(ROWS))
    assert server.per_row() == Counter(range(ROWS))
    assert second.costs.total_cost == ROWS


async def test_calls_that_fail_are_paid_for(broker_url: str, name: str) -> None:
    """Retries are calls: they come out of the same budget, and together they are never too many."""
    with FlakyServer(lambda row, number: "500" if number < 3 and row % 3 == 0 else "ok") as server:
        pipeline = paid_pipeline(name, server.url, budget=str(BUDGET), concurrency=IN_FLIGHT, retry=3)
        async with asyncio.timeout(60):
            result = await pipeline.run_async([{"n": n} for n in range(ROWS)], broker=broker_url, session="s")
    assert len(server.calls) == BUDGET
    assert result.stopped is not None
    assert set(result.data["n"]) == {call.row for call in server.calls if call.answer == "ok"}


async def test_two_workers_share_a_budget(kafka: str, name: str) -> None:
    """Two workers of a group together never make more calls than the budget allows, and nearly all of them."""
    url = f"kafka://{kafka}"
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(ROWS)], broker=url)
    with FlakyServer(delay=0.05) as server:
        pipeline = paid_pipeline(name, server.url, budget=str(BUDGET), concurrency=IN_FLIGHT)
        async with running(url, pipeline) as one, running(url, pipeline) as two:
            async with asyncio.timeout(60):
                while len(server.calls) < BUDGET:
                    await asyncio.sleep(0.05)
            await quiet(server, 1.0)
            assert one.stats.rows + two.stats.rows <= BUDGET
    assert len(server.calls) == BUDGET
    assert max(server.per_row().values()) <= 2  # a row whose partition moved while it was under way


async def test_killed_workers_stay_within_the_budget(broker_url: str, name: str, tmp_path: Path) -> None:
    """What a killed worker had leased counts as spent: after restarts there may be fewer calls than N, never more."""
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(ROWS)], broker=broker_url)
    told = {"budget": BUDGET, "concurrency": IN_FLIGHT}
    with FlakyServer(delay=0.05) as server:
        async with process(broker_url, name, server, tmp_path / "state", **told) as worker:
            await called(server, BUDGET // 3, worker)
            await asyncio.to_thread(worker.kill)
        here = len(server.calls)
        async with process(broker_url, name, server, tmp_path / "state", **told) as worker:
            await called(server, max(here, BUDGET // 2) + 1, worker)
            await quiet(server, 2.0)
            assert worker.is_alive
    out = [row["n"] for row in await rows_of(broker_url, f"{name}.out")]
    print(f"{here} calls before the kill, {len(server.calls)} in all; {len(out)} results")
    assert BUDGET // 2 < len(server.calls) <= BUDGET
    assert len(set(out)) == len(out)
    assert set(out) <= set(server.per_row())
