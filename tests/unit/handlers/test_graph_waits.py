"""A graph whose node waits for its next attempt while the session pauses."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from rowmill import Graph
from support.steered import RETRY, Bench, LaterError, NotedClock, until


@pytest.mark.parametrize("ordering", ["key", "partition", "none"])
async def test_a_row_that_waits_in_a_node(ordering: Literal["key", "partition", "none"]) -> None:
    """A row whose node waits an hour is given back by a pause, not dead-lettered, and runs when the session goes on."""
    bench, clock = Bench(rows=6), NotedClock()
    calls: list[int] = []

    async def node(n: int) -> int:
        calls.append(n)
        if n == 3 and calls.count(3) == 1:
            raise LaterError
        return n

    graph = Graph("graph")
    graph.add(node, retry=RETRY, outputs="again")
    worker = bench.worker(graph, ordering=ordering, clock=clock)
    run = asyncio.create_task(worker.run())
    await until(lambda: clock.long_sleeps)
    worker.pause()
    await until(lambda: worker.state == "paused")
    worker.unpause()
    worker.finish_at(bench.ends)
    await asyncio.wait_for(run, 15)
    assert bench.broker.values("p.dlq") == []
    assert bench.found() == list(range(bench.rows))
    assert calls.count(3) == 2
