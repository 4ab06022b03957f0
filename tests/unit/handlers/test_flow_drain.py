"""The end of a flow: rows in work finish, those for which nothing was called yet are handed back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from rowmill import RateLimit, Retry
from rowmill.handlers.chain import Chain, Failure
from rowmill.handlers.context import RowContext
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.flow import Flight, Flow
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage

ROWS = 40


class Bench:
    """A flow, what came out of it, and what was given up."""

    def __init__(self, *stages: Any, by_key: bool = False, contexts: bool = False) -> None:
        self.done: list[int] = []
        self.given_up: list[int] = []
        self._pool = BlockingPool(4)
        runtime = Runtime(self._pool)
        self.flow = Flow(Chain(stages), runtime, self._out, lambda: None, self._back, by_key=by_key, linger=0.01)
        for n in range(ROWS):
            key = b"%d" % (n % 4) if by_key else None
            context = RowContext("t", 0, n, 0, key, (), "s", None, runtime) if contexts else None
            self.flow.enter(Flight({"n": n}, context, key, n))

    def _out(self, flight: Flight) -> None:
        self.done.append(flight.sender)

    def _back(self, flights: Sequence[Flight], failure: Failure | None) -> None:
        assert failure is None
        self.given_up += [flight.sender for flight in flights]

    async def until(self, rows: int) -> None:
        async with asyncio.timeout(10):
            while len(self.done) + len(self.given_up) < rows:
                self.flow.check()
                await asyncio.sleep(0.001)

    async def end(self) -> None:
        await self.until(ROWS)
        await self.flow.close()
        self._pool.close()
        assert sorted(self.done + self.given_up) == list(range(ROWS)), "each row once, one way or the other"


class Gate:
    """A handler that holds its rows."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun: list[int] = []

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.begun.append(row["n"])
        await self.open.wait()
        return row

    async def until(self, calls: int) -> None:
        async with asyncio.timeout(10):
            while len(self.begun) < calls:
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("options", [{}, {"retry": Retry()}], ids=["bare", "policies"])
async def test_rows_that_wait_for_a_slot_go_back(options: dict[str, Any]) -> None:
    """With two slots two rows finish, and the others are handed back at once instead of running one after the other."""
    gate = Gate()
    bench = Bench(make_stage(gate, concurrency=2, **options))
    await gate.until(2)
    bench.flow.drain(30)
    assert len(bench.given_up) == ROWS - 2
    gate.open.set()
    await bench.end()
    assert sorted(bench.done) == sorted(gate.begun)


async def test_rows_behind_plain_stages_go_back() -> None:
    """Plain functions cost nothing to run again: a row that has only been through those goes back as well."""
    gate = Gate()
    bench = Bench(make_stage(lambda row: row, name="plain"), make_stage(gate, concurrency=2))
    await gate.until(2)
    bench.flow.drain(30)
    gate.open.set()
    await bench.end()
    assert sorted(bench.done) == sorted(gate.begun)
    assert len(gate.begun) == 2


async def test_rows_that_were_paid_for_go_on() -> None:
    """A row whose plain stage has noted a cost is not handed back: it would be paid for again."""

    def pays(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        if row["n"] % 2:
            ctx.add_cost(Decimal("0.01"))
        return row

    gate = Gate()
    bench = Bench(make_stage(pays), make_stage(gate, concurrency=2), contexts=True)
    await gate.until(2)
    bench.flow.drain(30)
    gate.open.set()
    await bench.end()
    assert set(range(1, ROWS, 2)) <= set(bench.done)
    assert all(n % 2 == 0 for n in bench.given_up)


async def test_rows_beyond_a_call_go_on() -> None:
    """A row that some stage was called for waits for the next one's slot until it is through."""
    second = Gate()

    async def first(row: dict[str, Any]) -> dict[str, Any]:
        return row

    bench = Bench(make_stage(first, concurrency=50), make_stage(second, concurrency=1))
    await second.until(1)
    bench.flow.drain(30)
    second.open.set()
    await bench.end()
    assert bench.given_up == []


async def test_keys_keep_their_order() -> None:
    """Of each key the rows up to some place are done, and all behind it are handed back: none is left out."""
    gate = Gate()
    bench = Bench(make_stage(gate, concurrency=3), by_key=True)
    await gate.until(3)
    bench.flow.drain(30)
    gate.open.set()
    await bench.end()
    for key in range(4):
        ours = [n for n in bench.done if n % 4 == key]
        assert ours == list(range(key, ROWS, 4))[: len(ours)]


async def test_rows_that_wait_for_a_limit_go_back() -> None:
    """Rows that wait for their turn in a rate limit have had no call: they go back, however soon their turn is."""
    called: list[int] = []

    async def call(row: dict[str, Any]) -> dict[str, Any]:
        called.append(row["n"])
        return row

    bench = Bench(make_stage(call, concurrency=50, limit=RateLimit(per_second=5, burst=5)))
    async with asyncio.timeout(10):
        while len(called) < 5:
            await asyncio.sleep(0.001)
    bench.flow.drain(30)
    await asyncio.wait_for(bench.end(), 2)
    assert sorted(bench.done) == sorted(called)
    assert len(bench.given_up) >= ROWS - 10


async def test_batches_go_back() -> None:
    """Rows that wait for company before a batch stage are handed back."""
    bench = Bench(make_stage(lambda rows: rows, name="batch", batch=ROWS + 1))
    bench.flow.drain(30)
    await bench.end()
    assert bench.done == []
