"""Flows: rows that go through a chain many at a time, in whatever order they complete."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from rowmill.handlers.chain import Chain, Failure
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.flow import Flight, Flow
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage


async def run(
    stages: Sequence[Any], rows: Sequence[Any], *, by_key: bool = False, linger: float = 0.0, lot: int = 1
) -> list[Flight]:
    """All rows through a flow; the flights in the order in which they came out. Rows may be (key, row) pairs.

    They enter one by one, or by lots of more.
    """
    chain, pool, done = Chain(stages), BlockingPool(8), []
    finished = asyncio.Event()

    def on_done(flight: Flight) -> None:
        done.append(flight)
        if len(done) == len(rows):
            finished.set()

    flow = Flow(chain, Runtime(pool), on_done, lambda: None, unexpected, by_key=by_key, linger=linger)
    pairs = [row if isinstance(row, tuple) else (None, row) for row in rows]
    flights = [Flight(value, None, key, number) for number, (key, value) in enumerate(pairs)]
    for begin in range(0, len(flights), lot):
        if lot > 1:
            flow.enter_all(flights[begin : begin + lot])
        else:
            flow.enter(flights[begin])
    try:
        async with asyncio.timeout(20):
            await finished.wait()
        flow.check()
    finally:
        await flow.close()
        pool.close()
    return done


def unexpected(flights: Sequence[Flight], failure: Failure | None) -> None:
    """No row is given up in these tests."""
    raise AssertionError([flight.value for flight in flights])


async def test_rows_overtake_a_slow_one() -> None:
    """A row that waits is passed by all others."""
    release = asyncio.Event()

    async def wait(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 0:
            await release.wait()
        if row["n"] == 9:
            release.set()
        return row

    done = await run([make_stage(wait, concurrency=4)], [{"n": n} for n in range(10)])
    assert [flight.sender for flight in done][-1] == 0
    assert sorted(flight.sender for flight in done) == list(range(10))


@pytest.mark.parametrize("concurrency", [1, 3, 7])
async def test_concurrency_is_kept(concurrency: int) -> None:
    """No more calls run at once than the stage allows, and as many as it allows do."""
    running = most = 0

    async def count(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return row

    await run([make_stage(count, concurrency=concurrency)], [{"n": n} for n in range(50)])
    assert most == concurrency


async def test_slots_are_shared_between_flows() -> None:
    """Two flows of one worker together keep to the stage's concurrency."""
    running = most = 0

    async def count(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return row

    stages = [make_stage(count, concurrency=3)]
    pool, left = BlockingPool(1), 40
    runtime = Runtime(pool)
    finished = asyncio.Event()

    def on_done(_: Flight) -> None:
        nonlocal left
        left -= 1
        if not left:
            finished.set()

    flows = [Flow(Chain(stages), runtime, on_done, lambda: None, unexpected, by_key=False, linger=0) for _ in range(2)]
    for flow in flows:
        for n in range(20):
            flow.enter(Flight({"n": n}, None, None, n))
    async with asyncio.timeout(20):
        await finished.wait()
    for flow in flows:
        await flow.close()
    assert most == 3


@pytest.mark.parametrize("lot", [1, 7, 60])
async def test_rows_of_one_key_keep_their_order(lot: int) -> None:
    """With by_key, rows of a key run one after the other as they entered; other keys and keyless rows do not wait."""
    running: set[bytes] = set()

    async def alone(row: dict[str, Any]) -> dict[str, Any]:
        key = row["key"]
        assert key is None or key not in running
        if key is not None:
            running.add(key)
        for _ in range(row["n"] % 5):
            await asyncio.sleep(0)
        running.discard(key)
        return row

    keys = [b"a", b"b", None]
    rows = [(keys[n % 3], {"n": n, "key": keys[n % 3]}) for n in range(60)]
    done = await run([make_stage(alone, concurrency=10)], rows, by_key=True, lot=lot)
    assert not [flight.value for flight in done if isinstance(flight.value, Failure)]
    for key in keys[:2]:
        numbers = [flight.sender for flight in done if flight.key == key]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("lot", [1, 5, 40])
@pytest.mark.parametrize("key", [None, b"a"])
async def test_rows_that_failed_before_keep_their_place(lot: int, key: bytes | None) -> None:
    """What is no row passes through: at once, or behind those of its key."""
    rows = [(key, Failure("input", "not_json", f"{n}") if n % 3 == 0 else {"n": n}) for n in range(40)]
    done = await run([make_stage(passes)], rows, by_key=True, lot=lot)
    assert sorted(flight.sender for flight in done) == list(range(40))
    if key is not None:
        assert [flight.sender for flight in done] == list(range(40))


@pytest.mark.parametrize("raised", [ValueError("no"), SystemExit(3), asyncio.CancelledError()])
async def test_what_an_async_handler_raises_fails_its_row(raised: BaseException) -> None:
    """Also what would end the lane, were it not the handler's own doing: the other rows go on."""

    async def handler(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 5:
            raise raised
        return row

    done = await run([make_stage(handler, concurrency=3)], [{"n": n} for n in range(20)], lot=20)
    failed = [flight for flight in done if isinstance(flight.value, Failure)]
    assert [(flight.sender, flight.value.kind) for flight in failed] == [(5, type(raised).__name__)]  # type: ignore[union-attr]


def fails(row: dict[str, Any]) -> Any:
    """Odd rows fail, every fourth is dropped."""
    if row["n"] % 2:
        raise ValueError("odd")
    return None if row["n"] % 4 == 0 else row


async def passes(row: dict[str, Any]) -> dict[str, Any]:
    """Changes nothing."""
    return row


def doubles(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One row becomes two."""
    return [row, {**row, "copy": True}]


@pytest.mark.parametrize("first", [True, False])
async def test_failed_and_dropped_rows_skip_the_rest(*, first: bool) -> None:
    """What fails or drops anywhere comes out as that, and later stages never see it."""
    seen = []

    async def note(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(row["n"])
        return row

    failing, noting = make_stage(fails), make_stage(note)
    done = await run(
        [failing, noting] if first else [make_stage(passes), failing, noting], [{"n": n} for n in range(20)]
    )
    by_number = {flight.sender: flight.value for flight in done}
    assert all(isinstance(by_number[n], Failure) for n in range(1, 20, 2))
    assert all(by_number[n] is None for n in range(0, 20, 4))
    assert sorted(seen) == [2, 6, 10, 14, 18]


@pytest.mark.parametrize("later", [{"batch": 3}, {"concurrency": 2}, {}], ids=["batch", "threads", "plain"])
async def test_split_rows_stay_together(later: dict[str, Any]) -> None:
    """The parts of a split row come out as one flight with all results; one failed part fails the whole row."""

    def picky(row: Any) -> Any:
        if isinstance(row, list):
            return [picky(one) for one in row]
        if row["n"] == 4 and row.get("copy"):
            raise ValueError("not this copy")
        return row

    done = await run(
        [make_stage(passes), make_stage(doubles), make_stage(picky, name="picky", **later)],
        [{"n": n} for n in range(6)],
    )
    by_number = {flight.sender: flight.value for flight in done}
    assert isinstance(by_number[4], Failure)
    for n, value in by_number.items():
        if not isinstance(value, Failure):
            assert value == [{"n": n}, {"n": n, "copy": True}]


async def test_batches_wait_for_company_but_not_for_ever() -> None:
    """A full batch goes at once; the rest goes when linger is over."""
    sizes = []

    def batch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sizes.append(len(rows))
        return rows

    await run([make_stage(passes), make_stage(batch, batch=8)], [{"n": n} for n in range(20)], linger=0.05)
    assert sorted(sizes) == [4, 8, 8]


async def test_closing_cancels_what_runs() -> None:
    """After close() async handlers are cancelled and nothing comes out any more."""
    cancelled: list[int] = []
    done: list[Flight] = []
    entered = asyncio.Event()

    async def hang(row: dict[str, Any]) -> dict[str, Any]:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(row["n"])
            raise
        return row

    stages, pool = [make_stage(hang)], BlockingPool(1)
    flow = Flow(Chain(stages), Runtime(pool), done.append, lambda: None, unexpected, by_key=False, linger=0)
    flow.enter(Flight({"n": 1}, None, None, 1))
    async with asyncio.timeout(5):
        await entered.wait()
        await flow.close()
    assert (cancelled, done) == ([1], [])


async def test_a_blocking_handler_does_not_hold_up_the_loop() -> None:
    """While a blocking stage waits on its threads, async rows of the same flow go on."""
    gate = threading.Event()

    async def opens(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 5:
            gate.set()
        return row

    def blocks(row: dict[str, Any]) -> dict[str, Any]:
        assert gate.wait(10)
        return row

    done = await run(
        [make_stage(opens, concurrency=1), make_stage(blocks, concurrency=2)], [{"n": n} for n in range(6)]
    )
    assert len(done) == 6
    assert all(flight.value == {"n": flight.sender} for flight in done)
