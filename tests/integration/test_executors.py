"""The three executors on both brokers: one engine, the same results, the context brought up to date."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rowmill import ConfigError, ExecutionContext, Pipeline, RowContext, StreamingResult
from rowmill.handlers.processes import ProcessPool
from rowmill.handlers.stage import Stage, make_stage
from rowmill.streams.cli.load import load_pipeline
from rowmill.streams.executors import AsyncExecutor, ExecutionStrategy, StreamingExecutor, SyncExecutor

FRAME = pd.DataFrame({"n": range(100)}, index=[f"row-{n}" for n in range(100)])


def twice(row: dict[str, Any]) -> dict[str, Any]:
    """A plain handler."""
    return {**row, "twice": row["n"] * 2}


async def judge(row: dict[str, Any], ctx: RowContext) -> dict[str, Any] | None:
    """An async one that costs something, drops rows and fails some."""
    ctx.add_cost(Decimal("0.001"), 2)
    await asyncio.sleep(0)
    if row["n"] % 10 == 3:
        return None
    if row["n"] % 10 == 7:
        raise ValueError("seven")
    return row


STAGES: list[Callable[..., Any] | Stage] = [twice, make_stage(judge, name="judge")]
LEFT = [n for n in range(100) if n % 10 not in {3, 7}]


def check_context(context: ExecutionContext) -> None:
    """The context of a hundred rows."""
    assert (context.processed_rows, context.failed_rows, context.dropped_rows) == (80, 10, 10)
    assert (context.total_rows, context.last_processed_row, context.get_progress()) == (100, 99, 100.0)
    assert (context.accumulated_cost, context.accumulated_tokens) == (Decimal("0.1"), 200)
    assert context.end_time is not None
    assert context.end_time > context.start_time
    assert context.current_stage_index == 1


def check_frame(frame: pd.DataFrame) -> None:
    """The results of a hundred rows."""
    assert list(frame["twice"]) == [n * 2 for n in LEFT]
    assert list(frame.index) == [f"row-{n}" for n in LEFT]


def test_sync(broker_url: str) -> None:
    """From plain blocking code; the result and the context say the same."""
    context = ExecutionContext()
    result = SyncExecutor(broker=broker_url).execute(STAGES, context, FRAME)
    check_frame(result.data)
    check_context(context)
    assert [error.row_index for error in result.errors] == [f"row-{n}" for n in range(7, 100, 10)]


def test_async(broker_url: str) -> None:
    """On the caller's loop: other tasks go on, and async handlers run on no other thread."""
    context, ticks = ExecutionContext(), 0
    threads: set[int] = set()

    async def where(row: dict[str, Any]) -> dict[str, Any]:
        threads.add(threading.get_ident())
        await asyncio.sleep(0.001)
        return row

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async def serve() -> Any:
        ticking = asyncio.create_task(tick())
        result = await AsyncExecutor(broker=broker_url).execute([*STAGES, where], context, FRAME)
        ticking.cancel()
        return result

    result = asyncio.run(serve())
    check_frame(result.data)
    context.current_stage_index -= 1
    check_context(context)
    assert threads == {threading.get_ident()}
    assert ticks > 10


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (7, 7), (25, 25)])
def test_max_concurrency(tmp_path: Any, limit: int, expected: int) -> None:
    """As many calls of a bare async handler run at once as the executor allows, and no more."""
    running = most = 0

    async def count(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return row

    executor = AsyncExecutor(limit, broker=f"local://{tmp_path}")
    asyncio.run(executor.execute_async([count], ExecutionContext(), FRAME))
    assert most == expected


def test_streaming(broker_url: str) -> None:
    """One DataFrame per chunk, in order; the context is up to date with each, and complete at the end."""
    context, summary = ExecutionContext(), StreamingResult(keep=True)
    done: list[int] = []
    chunks = StreamingExecutor(25, broker=broker_url).execute(STAGES, context, FRAME)
    for chunk in chunks:
        summary.add_chunk(chunk, Decimal("0.01"))
        done.append(context.processed_rows)
        assert context.total_rows == 100
    assert len(done) == 4
    assert done == sorted(done)
    assert done[0] == 20
    check_frame(summary.finalize().data)
    assert summary.finalize().costs.total_cost == Decimal("0.04")
    check_context(context)
    assert chunks.finalize().metrics.failed_rows == chunks.result.failed == 10
    assert next(chunks, None) is None


def test_streaming_is_early_and_endless(broker_url: str) -> None:
    """Rows without an end: the first chunks come while later rows still wait, and leaving early is fine."""
    taken = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal taken
        while True:
            yield {"n": taken}
            taken += 1

    context = ExecutionContext()
    with StreamingExecutor(10, broker=broker_url).execute_stream([twice], context, endless()) as chunks:
        first, second = next(chunks), next(chunks)
    assert [*first["n"], *second["n"]] == list(range(20))
    assert taken < 1_000
    assert (context.processed_rows, context.get_progress()) == (20, 0.0)


def test_streaming_on_a_loop(tmp_path: Any) -> None:
    """``async for`` leaves the loop free while it waits for a chunk."""
    context = ExecutionContext()

    async def serve() -> list[int]:
        chunks = StreamingExecutor(30, broker=f"local://{tmp_path}").execute(STAGES, context, FRAME)
        return [len(chunk) async for chunk in chunks]

    assert asyncio.run(serve()) == [24, 24, 24, 8]
    check_context(context)


def test_sync_where_a_loop_runs(tmp_path: Any) -> None:
    """A notebook's cell runs on a loop: blocking execution works there too."""
    context = ExecutionContext()

    async def cell() -> Any:
        return SyncExecutor(broker=f"local://{tmp_path}").execute(STAGES, context, FRAME)

    check_frame(asyncio.run(cell()).data)
    check_context(context)


@pytest.mark.parametrize("executor", [SyncExecutor, StreamingExecutor])
def test_a_pipeline_and_rows_in_the_context(tmp_path: Any, executor: type[ExecutionStrategy]) -> None:
    """``execute(stages, context)``, as users of other orchestrators call it: the context carries the rows."""
    context = ExecutionContext(intermediate_data={"rows": [{"n": 1}, {"n": 2}]})
    strategy = executor(broker=f"local://{tmp_path}")
    result = strategy.execute(Pipeline("p").add(twice), context)
    frame = result.data if strategy.supports_streaming() is False else pd.concat(result)
    assert list(frame["twice"]) == [2, 4]
    assert context.processed_rows == 2


def test_a_context_counts_several_executions(tmp_path: Any) -> None:
    """One context for two executions has the rows and costs of both."""
    context = ExecutionContext()
    executor = SyncExecutor(broker=f"local://{tmp_path}")
    for _ in range(2):
        executor.execute(STAGES, context, FRAME)
    assert (context.total_rows, context.completed_rows, context.accumulated_tokens) == (200, 200, 400)
    assert context.get_progress() == 100.0


def test_an_execution_that_fails_leaves_the_context(tmp_path: Any) -> None:
    """A wrong option stops it before anything runs, and the context is as it was."""
    context = ExecutionContext()
    before = context.to_checkpoint()
    with pytest.raises(ConfigError):
        SyncExecutor(broker="nonsense://").execute(STAGES, context, FRAME)
    assert context.to_checkpoint() == before


@pytest.mark.parametrize("file", ["scores_of_a_test.py", "json.py", "my-scores.py"])
def test_a_pipeline_file_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """A pipeline file that the command line loads by path is found by a process, with its neighbours."""
    (tmp_path / "word_of_a_test.py").write_text("WORD = 'neighbour'\n", encoding="utf-8")
    (tmp_path / file).write_text(
        "from rowmill import Pipeline\n"
        "from rowmill.handlers.processes import name_handler\n"
        "import word_of_a_test\n"
        "scores = Pipeline('scores')\n"
        "@scores.stage\n"
        "def score(row):\n"
        "    import word_of_a_test\n"
        "    return {**row, 'word': word_of_a_test.WORD}\n"
        "NAMED = name_handler(score)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    pipeline = load_pipeline(str(tmp_path / file))
    named = sys.modules[pipeline.stages[0].handler.__module__].NAMED

    async def call() -> Any:
        pool = ProcessPool(1)
        try:
            return await pool.run(named, {"n": 1})
        finally:
            await pool.close()

    assert asyncio.run(call()) == {"n": 1, "word": "neighbour"}
    for name in set(sys.modules) - before:
        if "of_a_test" in name or "rowmill_pipeline" in name:
            del sys.modules[name]
