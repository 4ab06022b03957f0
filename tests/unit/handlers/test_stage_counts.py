"""What stages count of the rows that go through them, and how long their calls take."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from rowmill import Retry
from rowmill.handlers.chain import Chain, attempt
from rowmill.handlers.context import RowContext
from rowmill.handlers.errors import StopExecution
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.outcomes import Failure, Outcome
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import Stage, make_stage
from rowmill.handlers.stage_times import StageTimes
from support.fake_clock import FakeClock
from support.virtual import passage

ROWS = [{"n": n} for n in range(40)]


def odd(row: dict[str, Any]) -> Any:
    """Of 40 rows 4 fail (5, 15, …), 10 are dropped (0, 4, …), and 12 become two (those that end in 1, 3 and 7)."""
    if row["n"] % 10 == 5:
        raise ValueError("no")
    if row["n"] % 4 == 0:
        return None
    return [row, dict(row)] if row["n"] % 10 in {1, 3, 7} else row


async def odd_async(row: dict[str, Any]) -> Any:
    """The same, awaited."""
    await asyncio.sleep(0)
    return odd(row)


def odd_batch(rows: list[dict[str, Any]]) -> list[Any]:
    """The same for many, but none fails."""
    return [None if row["n"] % 4 == 0 else [row, row] if row["n"] % 10 in {1, 3, 7} else row for row in rows]


def same(row: dict[str, Any]) -> dict[str, Any]:
    """A handler that changes nothing."""
    return row


async def same_async(row: dict[str, Any]) -> dict[str, Any]:
    """The same, awaited."""
    return row


def tally(runtime: Runtime, stage: str) -> tuple[int, int, int, int]:
    """Rows that went into a stage, came out of it, were dropped there, and failed there."""
    counts = runtime.stage_counts[stage].to_dict()
    return counts["rows"], counts["out"], counts["dropped"], counts["failed"]


def run_sync(stages: list[Stage], rows: list[Outcome]) -> Runtime:
    """Rows through a chain in one go; gives where it counted."""
    runtime = Runtime(BlockingPool(1), FakeClock())
    contexts = [RowContext("t", 0, n, 0, None, (), "s", None, runtime) for n in range(len(rows))]
    chain = Chain(stages)
    assert chain.is_sync
    chain.run_sync(rows, contexts, runtime)
    return runtime


def in_flow(stages: list[Stage], rows: list[Outcome]) -> Runtime:
    """Rows through a flow; gives where it counted."""
    seen = passage(stages, rows)  # type: ignore[arg-type]
    assert seen.runtime is not None
    return seen.runtime


COUNTS = (40, 40 - 4 - 10 + 12, 10, 4)
"""What :func:`odd` makes of the rows: in, out, dropped, failed."""


@pytest.mark.parametrize(
    ("run", "stages"),
    [
        (run_sync, [make_stage(same), make_stage(odd), make_stage(same, name="last")]),
        (in_flow, [make_stage(same), make_stage(odd_async, name="odd"), make_stage(same, name="last")]),
        (in_flow, [make_stage(same_async, name="same"), make_stage(odd), make_stage(same_async, name="last")]),
        (in_flow, [make_stage(same), make_stage(odd, concurrency=3), make_stage(same_async, name="last")]),
        (in_flow, [make_stage(same), make_stage(odd_async, name="odd", retry=2), make_stage(same, name="last")]),
        (in_flow, [make_stage(same), make_stage(odd, retry=Retry(2, first=0)), make_stage(same, name="last", batch=7)]),
        (in_flow, [make_stage(same), make_stage(odd), make_stage(same_async, name="last", retry=2)]),
    ],
    ids=["plain", "async", "between async", "threads", "policed async", "policed, batch", "split before policed"],
)
def test_every_kind_of_stage_counts_its_rows(run: Callable[..., Runtime], stages: list[Stage]) -> None:
    """In, out, dropped and failed, whatever calls the handler; a row that was split counts one by one behind that."""
    if stages[-1].batch is not None:
        stages = [*stages[:-1], make_stage(lambda rows: rows, name="last", batch=7)]
    runtime = run(stages, [dict(row) for row in ROWS])
    assert tally(runtime, "same") == (40, 40, 0, 0)
    assert tally(runtime, "odd") == COUNTS
    assert tally(runtime, "last") == (38, 38, 0, 0)
    calls = runtime.stage_counts["odd"].calls
    assert calls == (44 if stages[1].is_policed else 40)


@pytest.mark.parametrize(("run", "retry"), [(run_sync, None), (in_flow, None), (in_flow, 1)])
def test_batches_count_rows_and_calls(run: Callable[..., Runtime], retry: int | None) -> None:
    """A call may be about several rows; those that a condition keeps out count as through, and as passed by."""
    stage = make_stage(odd_batch, name="odd", batch=8, when=lambda row: row["n"] < 20, retry=retry)
    runtime = run([make_stage(same), stage], [dict(row) for row in ROWS])
    assert tally(runtime, "odd") == (40, 40 - 5 + 6, 5, 0)
    counts = runtime.stage_counts["odd"]
    assert counts.passed_by == 20
    assert 3 <= counts.calls <= 20


def test_a_batch_that_fails_fails_all_its_rows() -> None:
    """The call failed, and so did each row in it."""

    def broken(rows: list[dict[str, Any]]) -> list[Any]:
        raise ValueError("no")

    runtime = run_sync([make_stage(broken, batch=10)], [dict(row) for row in ROWS])
    assert tally(runtime, "broken") == (40, 0, 0, 40)
    assert runtime.stage_counts["broken"].calls == 4


@pytest.mark.parametrize("run", [run_sync, in_flow])
def test_a_fallback_saves_a_row(run: Callable[..., Runtime]) -> None:
    """What went on with a fallback did not fail; a condition's rows count as through."""
    stages = [make_stage(odd, fallback={"n": -1}, when=lambda row: row["n"] < 20), make_stage(same)]
    runtime = run(stages, [dict(row) for row in ROWS])
    assert tally(runtime, "odd") == (40, 40 - 5 + 6, 5, 0)
    assert tally(runtime, "same") == (41, 41, 0, 0)
    counts = runtime.stage_counts["odd"]
    assert (counts.passed_by, counts.calls) == (20, 20)


@pytest.mark.parametrize(("run", "through"), [(run_sync, 30), (in_flow, 39)])
def test_a_row_that_ends_the_session_counts_for_nothing(run: Callable[..., Runtime], through: int) -> None:
    """It stays undone and will run again: neither done nor failed; nor do those behind it that did not run."""

    def until(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 30:
            raise StopExecution
        return row

    runtime = run([make_stage(same), make_stage(until)], [dict(row) for row in ROWS])
    assert tally(runtime, "until") == (through, through, 0, 0)


def test_rows_that_are_none_are_not_counted() -> None:
    """What failed before the first stage, or was dropped, never enters one; parts of a split row do one by one."""
    rows: list[Outcome] = [Failure("input", "not_json", "x"), None, {"n": 1}, [{"n": 2}, {"n": 3}], {}]
    runtime = run_sync([make_stage(same)], rows)
    assert tally(runtime, "same") == (4, 4, 0, 0)


def test_counting_costs_no_runtime() -> None:
    """A chain may run without anybody who counts."""
    rows: list[Outcome] = [{"n": 5}, {"n": 1}, {"n": 4}]
    Chain([make_stage(odd), make_stage(lambda rows: rows, name="b", batch=2)]).run_sync(rows, None)
    assert isinstance(rows[0], Failure)
    assert rows[1:] == [[{"n": 1}, {"n": 1}], None]


def test_elements_and_what_is_inside_count_alike() -> None:
    """A stage that an element runs counts its rows like one of the chain's own."""
    inner = make_stage(odd_async, name="inner")

    async def outer(row: dict[str, Any], ctx: RowContext) -> Any:
        outcome = await attempt(inner, row, ctx, ctx.runtime)
        assert not isinstance(outcome, Failure), "no"
        return outcome

    runtime = in_flow([make_stage(outer)], [dict(row) for row in ROWS])
    assert tally(runtime, "inner") == COUNTS
    assert tally(runtime, "outer") == COUNTS


# --- times -----------------------------------------------------------------------------------------------------


def sleeper(clock: FakeClock, seconds: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A handler that takes so long."""

    def nap(row: dict[str, Any]) -> dict[str, Any]:
        clock.advance(seconds)
        return row

    return nap


def test_the_row_in_the_middle_of_a_slice_is_timed_stage_by_stage() -> None:
    """Each of the fused stages gets its own time, and one row stands for its slice."""
    clock = FakeClock()
    runtime = Runtime(BlockingPool(1), clock)
    chain = Chain([make_stage(sleeper(clock, 0.001), name="a"), make_stage(sleeper(clock, 0.02), name="b")])
    for _ in range(4):
        rows: list[Outcome] = [dict(row) for row in ROWS]
        chain.run_sync(rows, None, runtime)
    found = runtime.new_latency()
    assert found["a"].quantile(0.5) == pytest.approx(0.001, rel=0.03)
    assert found["b"].quantile(0.5) == pytest.approx(0.02, rel=0.03)
    assert found["a"].count == pytest.approx(121)  # the first stands for itself, the others for 40 each
    assert runtime.new_latency()["a"].count == 0
    assert runtime.latency()["a"].count == found["a"].count


@pytest.mark.parametrize("options", [{}, {"retry": 2}, {"timeout": 30}, {"batch": 1}])
def test_awaited_calls_are_timed_on_the_virtual_clock(options: dict[str, Any]) -> None:
    """An async call's time is from its beginning to its end, without the wait for a lane before."""

    async def nap(row: Any) -> Any:
        await asyncio.sleep(0.25)
        return row

    seen = passage([make_stage(nap, concurrency=4, **options)], [dict(row) for row in ROWS])
    assert seen.runtime is not None
    sketch = seen.runtime.new_latency()["nap"]
    assert sketch.quantile(0.0) == sketch.quantile(1.0) == pytest.approx(0.25, rel=0.03)
    assert 30 <= sketch.count <= 40


def test_calls_that_raise_are_timed_as_well() -> None:
    """How long a failing service takes is what one wants to know."""

    async def nap(row: Any) -> Any:
        await asyncio.sleep(0.5)
        raise ValueError("no")

    seen = passage([make_stage(nap, concurrency=4)], [dict(row) for row in ROWS])
    assert seen.runtime is not None
    assert seen.runtime.new_latency()["nap"].quantile(0.5) == pytest.approx(0.5, rel=0.03)


def run_at(times: StageTimes, clock: FakeClock, made: int, calls: int, seconds: float) -> tuple[int, int]:
    """So many calls within these seconds; gives the number made, and how many were timed."""
    timed = 0
    for _ in range(calls):
        if made >= times.due:
            times.add(0.01, times.claim(made))
            timed += 1
        made += 1
        clock.advance(seconds / calls)
    return made, timed


def test_about_a_hundred_calls_a_second_are_timed() -> None:
    """Whatever the pace: all of a slow stage, one in so many of a quick one, and each stands for those between."""
    clock = FakeClock()
    times, made = StageTimes(clock), 0
    made, timed = run_at(times, clock, made, 20, 1.0)
    assert timed == 20
    assert times.take(made).count == pytest.approx(20, abs=1)
    made, timed = run_at(times, clock, made, 50_000, 1.0)
    assert timed == 300  # not known yet to be so quick
    times.take(made)
    for _ in range(3):
        made, timed = run_at(times, clock, made, 50_000, 1.0)
        assert 95 <= timed <= 105
        assert times.take(made).count == pytest.approx(50_000, rel=0.02)
    made, _ = run_at(times, clock, made, 10, 1.0)
    times.take(made)
    made, timed = run_at(times, clock, made, 10, 1.0)
    assert timed >= 9


def test_nobody_who_looks() -> None:
    """Without a reader the sample stays small, and ends."""
    clock = FakeClock()
    times = StageTimes(clock)
    _, timed = run_at(times, clock, 0, 10_000, 100.0)
    assert timed == 300


def test_recent_calls_are_those_of_the_last_half_minute_or_so() -> None:
    """What is older goes, also where nobody has looked for long."""
    clock = FakeClock()
    times, made = StageTimes(clock), 0
    counts = []
    for _ in range(100):
        made, _ = run_at(times, clock, made, 10, 1.0)
        counts.append(times.recent(made).count)
    assert 290 <= min(counts[40:]) <= max(counts) <= 610
    clock.advance(100)
    assert times.recent(made).count == 0


def test_longer_calls_are_no_likelier_to_be_timed() -> None:
    """The call is chosen before it is made: a tenth of long ones is a tenth of the sample."""
    chance, clock = random.Random(5), FakeClock()
    times, made = StageTimes(clock), 0
    for _ in range(40):
        for _ in range(1_000):
            seconds = 0.01 if chance.random() < 0.1 else 0.001
            if made >= times.due:
                times.add(seconds, times.claim(made))
            made += 1
            clock.advance(0.001)
        times.recent(made)
    sketch = times.recent(made)
    assert sketch.quantile(0.85) == pytest.approx(0.001, rel=0.03)
    assert sketch.quantile(0.95) == pytest.approx(0.01, rel=0.03)
