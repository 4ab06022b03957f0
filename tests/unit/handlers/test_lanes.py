"""A stage's lanes, which all flows of a worker share: turns, bounds, and what the end of a flow means to others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from rowmill import Retry
from rowmill.handlers.chain import Chain, Failure
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.flow import Flight, Flow
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage

Row = dict[str, Any]

pytestmark = pytest.mark.timeout(20)


class Bench:
    """Flows of one worker, by name, through one stage whose calls are noted."""

    def __init__(self, concurrency: int, **options: Any) -> None:
        self.pool = BlockingPool(1)
        self._runtime = Runtime(self.pool)
        self._stage = make_stage(self.handler, name="stage", concurrency=concurrency, **options)
        self.begun: list[str] = []
        self.done: list[str] = []
        self.errors: list[str] = []
        self.closed: list[Flow] = []
        self.gate = asyncio.Event()
        """Calls wait here."""
        self.swallows = False
        """Whether a call goes on when it is cancelled, until the gate opens."""

    async def handler(self, row: Row) -> Row:
        """The stage's."""
        self.begun.append(row["of"])
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                if not self.swallows:
                    raise
        return row

    def flow(self, name: str, rows: int, on_done: Callable[[Flight], None] | None = None) -> Flow:
        """A flow that has so many rows to run."""
        flow = Flow(
            Chain([self._stage]),
            self._runtime,
            on_done or (lambda flight: self.done.append(flight.value["of"])),  # type: ignore[index, call-overload]
            lambda: self.errors.append(name),
            unexpected,
            by_key=False,
            linger=0.0,
        )
        for _ in range(rows):
            flow.enter(Flight({"of": name}, None, None, None))
        self.closed.append(flow)
        return flow


@pytest.fixture(params=[{}, {"retry": Retry()}], ids=["bare", "with a policy"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[int], Bench]]:
    """Makes a bench, and closes all of its flows at the end."""
    benches: list[Bench] = []

    def bench(concurrency: int) -> Bench:
        benches.append(Bench(concurrency, **request.param))
        return benches[-1]

    yield bench
    for each in benches:
        each.gate.set()
        for flow in each.closed:
            await flow.close()
        each.pool.close()


def unexpected(flights: Sequence[Flight], failure: Failure | None) -> None:
    """No row is given up in these tests."""
    raise AssertionError([flight.value for flight in flights])


async def settle() -> None:
    """Let everything go on that can."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_flows_take_turns(make: Callable[[int], Bench]) -> None:
    """A flow whose rows come later does not wait for the end of another one's backlog."""
    bench = make(1)
    bench.flow("a", 5)
    await settle()
    bench.flow("b", 3)
    bench.gate.set()
    await settle()
    assert bench.begun == ["a", "a", "b", "a", "b", "a", "b", "a"]
    assert sorted(bench.done) == ["a"] * 5 + ["b"] * 3


async def test_all_lanes_may_serve_one_flow(make: Callable[[int], Bench]) -> None:
    """What other flows do not need is not kept for them; no more calls run than there are lanes."""
    bench = make(4)
    bench.flow("a", 0)
    bench.flow("b", 9)
    await settle()
    assert bench.begun == ["b"] * 4


async def test_the_end_of_a_flow_makes_room(make: Callable[[int], Bench]) -> None:
    """A flow that is closed while it holds all lanes leaves them to the others."""
    bench = make(2)
    first = bench.flow("a", 5)
    await settle()
    bench.flow("b", 3)
    await first.close()
    await settle()
    assert bench.begun == ["a", "a", "b", "b"]
    bench.gate.set()
    await settle()
    assert bench.done == ["b"] * 3


async def test_a_call_that_will_not_end(make: Callable[[int], Bench]) -> None:
    """A handler that swallows its cancellation keeps its lane until it returns, and its row comes out nowhere."""
    bench = make(2)
    bench.swallows = True
    first = bench.flow("a", 1)
    await settle()
    bench.flow("b", 3)
    closing = asyncio.create_task(first.close())
    await settle()
    assert bench.begun == ["a", "b"]
    bench.gate.set()
    await closing
    await settle()
    assert bench.done == ["b"] * 3


async def test_an_error_of_a_flow_is_its_own(make: Callable[[int], Bench]) -> None:
    """What goes wrong behind the lanes is told to the flow whose row it was; other flows go on."""
    bench = make(1)

    def broken(flight: Flight) -> None:
        raise LookupError(flight.value)

    first = bench.flow("a", 1, broken)
    second = bench.flow("b", 3)
    bench.gate.set()
    await settle()
    assert bench.errors == ["a"]
    with pytest.raises(LookupError):
        first.check()
    second.check()
    assert bench.done == ["b"] * 3


async def test_rows_that_come_one_by_one(make: Callable[[int], Bench]) -> None:
    """A lane that found nothing to do is there again for the next row."""
    bench = make(2)
    bench.gate.set()
    flow = bench.flow("a", 1)
    for count in range(1, 5):
        await settle()
        assert bench.done == ["a"] * count
        flow.enter(Flight({"of": "a"}, None, None, None))
