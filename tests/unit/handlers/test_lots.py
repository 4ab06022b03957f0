"""What a review found in lots, threads and the partition task."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypedDict

import pytest
from rowmill import Pipeline
from rowmill.handlers.breaker import CircuitBreaker
from rowmill.handlers.chain import Chain, attempt
from rowmill.handlers.context import RowContext
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.outcomes import Failure
from rowmill.handlers.retry import Retry
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import Stage, make_stage
from rowmill.streams.errors import RowFailedError
from rowmill.streams.options import WorkerOptions
from support.virtual import passage, virtual, virtual_runtime

pytestmark = pytest.mark.timeout(30)


class Out(TypedDict):
    """A schema."""

    n: int


def through(stage: Stage, count: int) -> list[Any]:
    """What a chain of this one stage makes of rows, lot by lot."""

    async def work() -> list[Any]:
        runtime = virtual_runtime()
        rows: list[Any] = [{"n": n} for n in range(count)]
        contexts = [RowContext("rows", 0, n, 0, None, (), "test", None, runtime) for n in range(count)]
        await Chain([stage]).run(rows, contexts, runtime)
        return rows

    return virtual(work)


@pytest.mark.parametrize("policy", [{"on_error": {"score": None}}, {"fallback": {"score": None}}], ids=str)
def test_a_result_that_is_none_has_its_fallback(policy: dict[str, Any]) -> None:
    """A plain handler that returns no row falls back from the row that it was given."""
    stage = make_stage(lambda _: "oops", name="s", **policy)
    assert passage([stage], [{"n": 0}]).outcomes == {0: {"n": 0, "score": None}}


def test_a_result_that_is_none_has_its_fallback_handler() -> None:
    """The fallback is called with the row, not with what the handler returned."""
    stage = make_stage(lambda _: 5, name="s", fallback=lambda row: {**row, "fell": True})
    assert passage([stage], [{"n": 0}]).outcomes == {0: {"n": 0, "fell": True}}


def misfit_stage() -> Stage:
    """A batch whose second row does not fit."""

    def handler(rows: Any) -> Any:
        return [{"n": "bad"} if row["n"] == 1 else row for row in rows]

    return make_stage(handler, name="s", batch=3, output=Out, on_error="fail")


def condition_stage() -> Stage:
    """A batch for whose second row nobody knows whether it should run."""

    def when(row: dict[str, Any]) -> bool:
        if row["n"] == 1:
            raise KeyError("what")
        return True

    return make_stage(lambda rows: rows, name="s", batch=3, when=when, on_error="fail")


@pytest.mark.parametrize("stage", [misfit_stage(), condition_stage()], ids=["result", "condition"])
def test_on_error_fail_ends_the_session_from_the_middle_of_a_batch(stage: Stage) -> None:
    """A row of a batch that fails alone halts as any other does, and is no dead letter."""
    rows = through(stage, 6)
    assert isinstance(rows[-1], Failure)
    assert rows[-1].halts


def test_on_error_fail_in_a_batch_fails_the_run(tmp_path: Any) -> None:
    """The whole way: the run ends as failed, and the row stays undone."""
    pipeline = Pipeline("p", source="a", sink="b")
    stage = misfit_stage()
    pipeline.add(stage.handler, name="s", batch=3, output=Out, on_error="fail")
    with pytest.raises(RowFailedError, match="on_error"):
        pipeline.run([{"n": n} for n in range(6)], broker=f"local://{tmp_path}", options=WorkerOptions(partitions=1))


def test_a_call_that_never_began_is_not_paid_for() -> None:
    """With all threads lost, calls are refused before they begin: nothing is charged."""

    async def work() -> tuple[str, Any]:
        runtime = Runtime(BlockingPool(1, max_abandoned=1))

        def hang(row: dict[str, Any]) -> Any:
            time.sleep(0.5)
            return row

        stage = make_stage(hang, name="s", timeout=0.05, price="1")
        contexts = [RowContext("rows", 0, n, 0, None, (), "test", None, runtime) for n in range(2)]
        outcomes = [await attempt(stage, {"n": 0}, context, runtime) for context in contexts]
        assert isinstance(outcomes[1], Failure)
        return outcomes[1].kind, contexts[1].cost

    assert asyncio.run(work()) == ("AbandonedError", 0)


def test_waiting_for_a_thread_is_no_overrun() -> None:
    """A call that finds all threads busy with other stages' rows neither times out unbegun, nor opens the breaker."""

    async def work() -> tuple[Any, str]:
        runtime, calls = Runtime(BlockingPool(1)), list[int]()

        def quick(row: dict[str, Any]) -> Any:
            calls.append(1)
            return row

        stage = make_stage(quick, name="s", timeout=0.1, breaker=CircuitBreaker(failures=1))
        other = asyncio.create_task(runtime.pool.run(time.sleep, 0.4))
        await asyncio.sleep(0.02)
        outcome = await attempt(stage, {"n": 0}, RowContext("t", 0, 0, 0, None, (), "s", None, runtime), runtime)
        await other
        return outcome, runtime.breakers["s"].state

    assert asyncio.run(work()) == ({"n": 0}, "closed")


def test_a_thread_that_overran_changes_nobody_elses_row() -> None:
    """What an abandoned call writes into its row in place is not in the result of the next attempt."""

    async def work() -> Any:
        runtime, calls = Runtime(BlockingPool(4)), list[int]()

        def slow(row: dict[str, Any]) -> Any:
            calls.append(1)
            if len(calls) == 1:
                time.sleep(0.3)
                row["late"] = True
                return row
            time.sleep(0.15)
            return row

        stage = make_stage(slow, name="s", timeout=0.2, retry=Retry(attempts=2, first=0), concurrency=2)
        outcome = await attempt(stage, {"n": 0}, RowContext("t", 0, 0, 0, None, (), "s", None, runtime), runtime)
        await asyncio.sleep(0.3)
        return outcome

    assert asyncio.run(work()) == {"n": 0}
