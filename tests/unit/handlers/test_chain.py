"""Chains: what becomes of rows on their way through stages of every kind, alone and mixed."""

# Handlers here are made for their signatures, not for what they do with their arguments.
# ruff: noqa: ARG005
from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import product
from typing import Any

import pandas as pd
import pytest
from rowmill.handlers.chain import Chain, Failure, Outcome
from rowmill.handlers.context import RowContext
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import Stage, make_stage
from rowmill.state.errors import ConfigError

RowFunction = Callable[[dict[str, Any]], Any]
Run = Callable[..., Any]


@pytest.fixture
async def pool() -> AsyncIterator[BlockingPool]:
    """Threads for one test."""
    pool = BlockingPool(2)
    yield pool
    pool.close()


@pytest.fixture
def run(pool: BlockingPool) -> Run:
    """Runs rows through stages and gives their outcomes, several rows as a plain list."""

    async def through(stages: Sequence[Stage], rows: Sequence[Any]) -> list[Outcome]:
        chain = Chain(stages)
        outcomes: list[Outcome] = list(rows)
        contexts = [context(i) for i in range(len(rows))] if chain.takes_context else None
        async with asyncio.timeout(10):
            await chain.run(outcomes, contexts, Runtime(pool))
        return [list(outcome) if isinstance(outcome, list) else outcome for outcome in outcomes]

    return through


def context(offset: int) -> RowContext:
    """A row's context."""
    return RowContext("t", 0, offset, 0, None, (), "live")


# --- one function, called in every way -------------------------------------------------------------------------


def plain(function: RowFunction, name: str) -> Stage:
    """Row by row."""
    return make_stage(function, name=name)


def limited(function: RowFunction, name: str) -> Stage:
    """Row by row on a thread, with a time limit."""
    return make_stage(function, name=name, timeout=30)


def awaited(function: RowFunction, name: str) -> Stage:
    """Row by row, async."""

    async def handler(row: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return function(row)

    return make_stage(handler, name=name)


def batched(function: RowFunction, name: str) -> Stage:
    """Lists of two rows."""
    return make_stage(lambda rows: [function(row) for row in rows], name=name, batch=2)


def awaited_batch(function: RowFunction, name: str) -> Stage:
    """Lists of two rows, async, with a time limit."""

    async def handler(rows: list[dict[str, Any]]) -> list[Any]:
        return [function(row) for row in rows]

    return make_stage(handler, name=name, batch=2, timeout=30)


def framed(function: RowFunction, name: str) -> Stage:
    """Frames of three rows: a repeated label for several rows, a missing one for none."""

    def handler(frame: pd.DataFrame) -> pd.DataFrame:
        labels, rows = [], []
        for label, line in zip(frame.index, frame.to_dict("records"), strict=True):
            result = function({str(name): value for name, value in line.items()})
            several = [] if result is None else result if isinstance(result, list) else [result]
            labels += [label] * len(several)
            rows += several
        return pd.DataFrame(rows, index=labels, columns=["n", "seen"])

    return make_stage(handler, name=name, batch=3, frame=True)


WAYS = [plain, limited, awaited, batched, awaited_batch, framed]
PAIRS = list(product(WAYS, WAYS))
NAMES = [f"{a.__name__}-{b.__name__}" for a, b in PAIRS]


def treat(row: dict[str, Any]) -> Any:
    """Keep most rows, drop every fifth, double every third."""
    seen = {"n": row["n"], "seen": f"{row.get('seen') or ''}x"}
    if row["n"] % 5 == 4:
        return None
    return [seen, {"n": row["n"] + 100, "seen": seen["seen"]}] if row["n"] % 3 == 2 else seen


def expected(row: dict[str, Any], times: int) -> list[dict[str, Any]]:
    """What becomes of a row after so many stages."""
    rows = [row]
    for _ in range(times):
        results = [treat(row) for row in rows]
        rows = [r for result in results if result for r in (result if isinstance(result, list) else [result])]
    return rows


def as_list(outcome: Outcome) -> list[Any]:
    """An outcome that is no failure, as the rows it stands for."""
    assert not isinstance(outcome, Failure)
    return outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
async def test_two_stages_of_any_kind(run: Run, pair: tuple[Any, Any]) -> None:
    """Rows that are kept, dropped and split come out the same and in place, whichever kinds of stage meet."""
    rows = [{"n": n} for n in range(11)]
    outcomes = await run([pair[0](treat, "one"), pair[1](treat, "two")], rows)
    assert [as_list(outcome) for outcome in outcomes] == [expected({"n": n}, 2) for n in range(11)]


@pytest.mark.parametrize("way", WAYS)
async def test_three_stages_of_a_kind(run: Run, way: Any) -> None:
    """The rows of a split row go through all later stages, and are split again there."""
    rows = [{"n": n} for n in range(20)]
    outcomes = await run([way(treat, name) for name in ("one", "two", "three")], rows)
    assert [as_list(outcome) for outcome in outcomes] == [expected({"n": n}, 3) for n in range(20)]


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
async def test_a_split_row_fails_whole(run: Run, pair: tuple[Any, Any]) -> None:
    """When one of the rows that a row was split into fails later, the row fails, and no part of it is left."""

    def split(row: dict[str, Any]) -> Any:
        return [{"n": row["n"], "seen": ""}, {"n": row["n"] + 100, "seen": ""}, {"n": row["n"] + 200, "seen": ""}]

    def refuse(row: dict[str, Any]) -> Any:
        if row["n"] == 101:
            raise LookupError("no 101")
        return row

    second: Stage = pair[1](refuse, "refuse")
    outcomes = await run([pair[0](split, "split"), second], [{"n": n} for n in range(8)])
    failed = {i for i, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
    assert outcomes[1] == Failure("refuse", "LookupError", "no 101")
    company = {1} if second.batch is None else failed  # who shares a call with the row shares its fate
    assert failed == company
    for i in set(range(8)) - failed:
        assert [row["n"] for row in as_list(outcomes[i])] == [i, i + 100, i + 200]


@pytest.mark.parametrize("way", WAYS)
async def test_failures_pass_through(run: Run, way: Any) -> None:
    """Rows that failed before, or were dropped, are left as they are."""
    failure = Failure("input", "not_json", "x")
    outcomes = await run([way(treat, "one"), way(treat, "two")], [failure, {"n": 0}, None, failure])
    assert outcomes[0] is outcomes[3] is failure
    assert outcomes[2] is None
    assert as_list(outcomes[1]) == [{"n": 0, "seen": "xx"}]


@pytest.mark.parametrize("way", WAYS)
async def test_no_rows(run: Run, way: Any) -> None:
    """An empty batch calls nobody."""
    assert await run([way(lambda row: 1 / 0, "one")], []) == []


# --- calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [False, True])
async def test_batches_are_full(run: Run, frame: bool) -> None:
    """A batch stage gets as many rows as it asked for, the last call the rest, split rows counted one by one."""
    sizes: list[int] = []

    def handler(many: Any) -> Any:
        sizes.append(len(many))
        return many

    def split(row: dict[str, Any]) -> Any:
        return [row, row] if row["n"] == 0 else row

    stages = [make_stage(split), make_stage(handler, batch=3, frame=frame)]
    await run(stages, [{"n": n} for n in range(6)])
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("timeout", [None, 30])
async def test_contexts(run: Run, is_async: bool, timeout: float | None) -> None:
    """One row comes with its context, a batch with a list of them, and a split row's parts share theirs."""

    def split(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.key = str(ctx.offset)
        return [row, row]

    def note(row: dict[str, Any], ctx: RowContext) -> Any:
        return {"n": row["n"], "key": ctx.key}

    def note_many(rows: list[dict[str, Any]], ctx: list[RowContext]) -> Any:
        return [{**row, "offset": c.offset} for row, c in zip(rows, ctx, strict=True)]

    def note_frame(frame: pd.DataFrame, ctx: list[RowContext]) -> pd.DataFrame:
        return frame.assign(again=[c.offset for c in ctx])

    def in_form(function: Any) -> Any:
        async def later(value: Any, ctx: Any) -> Any:
            return function(value, ctx)

        return later if is_async else function

    stages = [
        make_stage(in_form(split), name="a", timeout=timeout),
        make_stage(in_form(note), name="b", timeout=timeout),
        make_stage(in_form(note_many), name="c", timeout=timeout, batch=3),
        make_stage(in_form(note_frame), name="d", timeout=timeout, frame=True),
    ]
    outcomes = await run(stages, [{"n": n} for n in range(3)])
    assert outcomes == [[{"n": n, "key": str(n), "offset": n, "again": n}] * 2 for n in range(3)]


async def test_a_plain_chain_runs_on_one_thread(run: Run) -> None:
    """Plain stages run row by row: each row through all of them, before the next, on one thread."""
    order: list[tuple[str, int]] = []
    threads: set[int] = set()

    def noting(name: str) -> Stage:
        def handler(row: dict[str, Any]) -> Any:
            order.append((name, row["n"]))
            threads.add(threading.get_ident())
            return row

        return make_stage(handler, name=name)

    await run([noting("a"), noting("b")], [{"n": 0}, {"n": 1}])
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_run_sync() -> None:
    """A chain of plain stages runs without an event loop, batches and frames included."""
    chain = Chain([plain(treat, "a"), batched(treat, "b"), framed(treat, "c")])
    assert chain.is_sync
    rows: list[Outcome] = [{"n": n} for n in range(11)]
    chain.run_sync(rows, None)
    assert [as_list(row) for row in rows] == [expected({"n": n}, 3) for n in range(11)]


def test_chains_are_checked() -> None:
    """No stage at all, and two of one name, are mistakes."""
    with pytest.raises(ConfigError, match="at least one stage"):
        Chain([])
    with pytest.raises(ConfigError, match=r"stage\(name=\).*'a'.*another stage has this name"):
        Chain([plain(treat, "a"), plain(treat, "b"), plain(treat, "a")])


# --- results that do not fit -----------------------------------------------------------------------------------


class Odd(dict[str, Any]):
    """A dict's subclass."""


@pytest.mark.parametrize("way", [plain, limited, awaited, batched, awaited_batch])
@pytest.mark.parametrize(
    ("result", "becomes"),
    [
        (None, None),
        ({}, {}),
        ([], None),
        ((), None),
        ([{"a": 1}], [{"a": 1}]),
        (({"a": 1}, {"a": 2}), [{"a": 1}, {"a": 2}]),
        (Odd(a=1), {"a": 1}),
        ([Odd(a=1)], [{"a": 1}]),
    ],
)
async def test_results_that_fit(run: Run, way: Any, result: Any, becomes: Any) -> None:
    """None and an empty list drop the row; tuples count as lists, a dict's subclass as a dict."""
    (outcome,) = await run([way(lambda row: result, "odd")], [{"n": 0}])
    assert outcome == becomes
    assert all(type(row) is dict for row in as_list(outcome))


@pytest.mark.parametrize("way", [plain, limited, awaited, batched, awaited_batch])
@pytest.mark.parametrize(
    ("result", "says"),
    [
        ("text", "returned a str"),
        (7, "returned a int"),
        (True, "returned a bool"),
        ({1, 2}, "returned a set"),
        (b"{}", "returned a bytes"),
        ([{"a": 1}, None], "list with a NoneType in it"),
        ([["a"]], "list with a list in it"),
        (pd.DataFrame({"a": [1]}), "set frame=True"),
    ],
)
async def test_results_that_do_not_fit(run: Run, way: Any, result: Any, says: str) -> None:
    """Anything but dicts, lists of them and None fails the row, with what came and what should have."""
    (outcome,) = await run([way(lambda row: result, "odd"), plain(treat, "later")], [{"n": 0}])
    assert isinstance(outcome, Failure)
    assert (outcome.stage, outcome.kind) == ("odd", "MisfitError")
    assert says in outcome.message
    assert "a handler returns a dict" in outcome.message


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("result", "says"),
    [
        ([], "took 3 rows and returned 0"),
        ([{}, {}], "took 3 rows and returned 2"),
        ([{}] * 4, "took 3 rows and returned 4"),
        ({}, "returned a dict; return a list of 3"),
        (None, "returned a NoneType"),
        (iter([]), "returned a list_iterator"),
        (pd.DataFrame({"a": [1, 2, 3]}), "set frame=True"),
    ],
)
async def test_batches_that_do_not_fit(run: Run, is_async: bool, result: Any, says: str) -> None:
    """A batch result without one entry per row fails all rows of the call, and only those."""

    def answer(rows: list[dict[str, Any]]) -> Any:
        return rows if rows[0]["n"] == 3 else result

    async def later(rows: list[dict[str, Any]]) -> Any:
        return answer(rows)

    stage = make_stage(later if is_async else answer, name="many", batch=3)
    outcomes = await run([stage], [{"n": n} for n in range(4)])
    assert outcomes[3] == {"n": 3}
    for outcome in outcomes[:3]:
        assert isinstance(outcome, Failure)
        assert (outcome.stage, outcome.kind) == ("many", "MisfitError")
        assert says in outcome.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda frame: frame.reset_index(drop=True), "index label 0"),
        (lambda frame: frame.set_index("n"), "index label 0"),
        (lambda frame: pd.concat([frame, pd.DataFrame({"n": [9]}, index=["x"])]), "index label 'x'"),
        (lambda frame: frame.set_axis([None, float("nan"), float("inf")], axis=0), "index label"),
        (lambda frame: frame.set_axis([float("inf")] * 3, axis=0), "index label inf"),
        (lambda frame: frame.set_axis(frame.index + 3, axis=0), "index label"),
        (lambda frame: frame.set_axis(frame.index + 0.5, axis=0), "index label"),
        (lambda frame: frame.set_axis(pd.MultiIndex.from_product([["a"], [1, 2, 3]]), axis=0), "index label"),
        (lambda frame: frame.set_axis(pd.date_range("2024", periods=3), axis=0), "index label"),
        (lambda frame: frame.groupby("g").sum(), "index label"),
        (lambda frame: pd.concat([frame, frame], axis=1), "more than one column named g, n"),
        (lambda frame: frame.assign(**{"1": 0}).assign(x=0).rename(columns={"x": 1}), "more than one column named 1"),
        (lambda frame: frame["n"], "got Series"),
        (lambda frame: frame.to_dict("records"), "got list"),
        (lambda frame: None, "got NoneType"),
    ],
)
async def test_frames_that_do_not_fit(run: Run, change: Any, says: str) -> None:
    """A frame whose lines cannot be told apart fails every row of the call instead of being believed."""
    stage = make_stage(change, name="frame", frame=True)
    for outcome in await run([stage], [{"n": n, "g": 0} for n in range(3)]):
        assert isinstance(outcome, Failure)
        assert (outcome.stage, outcome.kind) == ("frame", "MisfitError")
        assert says in outcome.message


async def test_frames_are_aligned_by_label(run: Run) -> None:
    """Lines may be sorted, filtered and repeated: a missing label drops its row, a repeated one doubles it."""

    def rearrange(frame: pd.DataFrame) -> pd.DataFrame:
        kept = frame[frame["n"] != 1]
        return pd.concat([kept.sort_values("n", ascending=False), kept[kept["n"] == 3].assign(n=33)])

    outcomes = await run([make_stage(rearrange, frame=True)], [{"n": n} for n in range(4)])
    assert outcomes == [{"n": 0}, None, {"n": 2}, [{"n": 3}, {"n": 33}]]


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("bad"), "ValueError", "bad"),
        (KeyError("text"), "KeyError", "'text'"),
        (RuntimeError(), "RuntimeError", "RuntimeError()"),
        (SystemExit(3), "SystemExit", "3"),
        (asyncio.CancelledError("mine"), "CancelledError", "mine"),
        (TimeoutError("mine"), "TimeoutError", "mine"),
        (RecursionError("deep"), "RecursionError", "deep"),
        (MemoryError(), "MemoryError", "MemoryError()"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_whatever_a_handler_raises(run: Run, way: Any, error: BaseException, kind: str, message: str) -> None:
    """Every exception is the row's failure with its class and text; rows of other calls go on."""

    def handler(row: dict[str, Any]) -> Any:
        if row["n"] == 0:
            raise error
        return row

    outcomes = await run([way(handler, "raises")], [{"n": n, "seen": ""} for n in range(4)])
    assert outcomes[0] == Failure("raises", kind, message)
    assert outcomes[3] == {"n": 3, "seen": ""}


@pytest.mark.parametrize("way", WAYS)
async def test_stop_iteration(run: Run, way: Any) -> None:
    """StopIteration, which neither futures nor coroutines can carry, fails the row like any other error."""

    def handler(row: dict[str, Any]) -> Any:
        return next(iter([]))

    (outcome,) = await run([way(handler, "raises")], [{"n": 0}])
    assert isinstance(outcome, Failure)
    assert outcome.stage == "raises"
    assert "StopIteration" in outcome.kind + outcome.message


async def test_a_slow_async_handler(run: Run) -> None:
    """An async handler that outlives its limit is cancelled, and its row fails with the limit."""
    cancelled = []

    async def slow(row: dict[str, Any]) -> Any:
        if row["n"]:
            return row
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(row["n"])
            raise

    outcomes = await run([make_stage(slow, timeout=0.02)], [{"n": 0}, {"n": 1}])
    assert outcomes == [Failure("slow", "HandlerTimeoutError", "no result within 0.02 s"), {"n": 1}]
    assert cancelled == [0]


async def test_a_sync_handler_that_hangs(run: Run, pool: BlockingPool) -> None:
    """A blocking handler that never returns costs its row and a thread, which another one replaces."""
    release = threading.Event()

    def hang(row: dict[str, Any]) -> Any:
        if row["n"] == 0:
            release.wait()
        return row

    try:
        outcomes = await run([make_stage(hang, timeout=0.05)], [{"n": 0}, {"n": 1}, {"n": 2}])
        assert outcomes == [Failure("hang", "HandlerTimeoutError", "no result within 0.05 s"), {"n": 1}, {"n": 2}]
        assert pool.abandoned == 1
    finally:
        release.set()


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_handlers_own_timeout_error(run: Run, is_async: bool) -> None:
    """A TimeoutError that the handler raises itself is told apart from its stage's limit."""

    def handler(row: dict[str, Any]) -> Any:
        raise TimeoutError("the model did not answer")

    async def later(row: dict[str, Any]) -> Any:
        return handler(row)

    (outcome,) = await run([make_stage(later if is_async else handler, name="own", timeout=30)], [{"n": 0}])
    assert outcome == Failure("own", "TimeoutError", "the model did not answer")


@pytest.mark.parametrize("way", [awaited, limited, awaited_batch])
async def test_being_stopped_is_no_failure(pool: BlockingPool, way: Any) -> None:
    """Cancelling the chain while a handler runs cancels the chain; no row is blamed for it."""
    started, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    async def wait(value: Any) -> Any:
        started.set()
        await asyncio.Event().wait()

    def block(value: Any) -> Any:
        loop.call_soon_threadsafe(started.set)
        release.wait()

    stage = make_stage(block, timeout=30) if way is limited else make_stage(wait, batch=way(treat, "x").batch)
    rows: list[Outcome] = [{"n": 0}]
    task = asyncio.create_task(Chain([stage]).run(rows, None, Runtime(pool)))
    try:
        async with asyncio.timeout(10):
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert rows == [{"n": 0}]
    finally:
        release.set()
