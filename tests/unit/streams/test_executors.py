"""The three executors without a broker: what they say of themselves, what they make of stages, what contexts learn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from rowmill import ConfigError, ExecutionContext, ExecutionResult, Pipeline, ProcessingStats
from rowmill.handlers.stage import make_stage
from rowmill.state.context import ProgressObserver
from rowmill.streams.executors import AsyncExecutor, ExecutionStrategy, StreamingExecutor, SyncExecutor, _Progress
from rowmill.streams.results import CostEstimate

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
BLOCKING = [SyncExecutor(), StreamingExecutor()]


async def wait(row: Any) -> Any:
    """An async handler."""
    return row


def plain(row: Any) -> Any:
    """A plain one."""
    return row


class Seen(ProgressObserver):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float]] = []

    def on_progress_update(self, context: ExecutionContext, /) -> None:
        self.rows.append((context.completed_rows, context.get_progress()))


def result(rows: int, processed: int, failed: int, cost: str = "0", tokens: int = 0) -> ExecutionResult:
    """The result of an execution that took a second."""
    stats = ProcessingStats(
        total_rows=rows,
        processed_rows=processed,
        failed_rows=failed,
        skipped_rows=0,
        dropped_rows=rows - processed - failed,
        defaulted_rows=processed // 2,
    )
    costs = CostEstimate(Decimal(cost), tokens, processed)
    data: Any = None
    return ExecutionResult(data, stats, costs, [], "s", {}, BEGAN, BEGAN + timedelta(seconds=1))


def progress(context: ExecutionContext, rows: Any = None) -> _Progress:
    """The progress of a pipeline with two stages."""
    return _Progress(context, Pipeline("p").add(plain).add(wait), rows)


@pytest.mark.parametrize(
    ("strategy", "name", "is_async", "is_streaming"),
    [
        (AsyncExecutor(), "async", True, False),
        (SyncExecutor(), "sync", False, False),
        (StreamingExecutor(), "streaming", False, True),
    ],
    ids=["async", "sync", "streaming"],
)
def test_what_they_say(strategy: ExecutionStrategy, name: str, is_async: bool, is_streaming: bool) -> None:
    """Each has a name, and says whether it is awaited and whether it streams."""
    assert isinstance(strategy, ExecutionStrategy)
    assert (strategy.name, strategy.supports_async(), strategy.supports_streaming()) == (name, is_async, is_streaming)


def test_defaults() -> None:
    """The defaults are those that users know."""
    assert AsyncExecutor().max_concurrency == 10
    assert StreamingExecutor().chunk_size == 1000


def test_a_strategy_is_abstract() -> None:
    """The base cannot be used by itself."""
    with pytest.raises(TypeError, match="abstract"):
        ExecutionStrategy()  # type: ignore[abstract]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "10", None])
@pytest.mark.parametrize(("kind", "option"), [(AsyncExecutor, "max_concurrency"), (StreamingExecutor, "chunk_size")])
def test_wrong_options(kind: Any, option: str, value: Any) -> None:
    """A number that is none is refused by the option's name."""
    with pytest.raises(ConfigError, match=option):
        kind(value)


@pytest.mark.parametrize("stages", [plain, "stages", None, {plain}, []])
@pytest.mark.parametrize("strategy", BLOCKING)
def test_no_stages(strategy: ExecutionStrategy, stages: Any) -> None:
    """What is no pipeline and no list of stages is refused, and so is an empty list; the context stays as it is."""
    context = ExecutionContext()
    before = context.to_checkpoint()
    with pytest.raises(ConfigError, match="stage"):
        strategy.execute(stages, context, [{}])
    assert context.to_checkpoint() == before


@pytest.mark.parametrize("strategy", BLOCKING)
def test_no_rows(strategy: ExecutionStrategy) -> None:
    """Rows come as an argument or in the context; without any the error names both."""
    with pytest.raises(ConfigError, match="intermediate_data"):
        strategy.execute([plain], ExecutionContext())


async def test_no_rows_async() -> None:
    """The same where it is awaited."""
    with pytest.raises(ConfigError, match="intermediate_data"):
        await AsyncExecutor().execute_async([plain], ExecutionContext())


@pytest.mark.parametrize(
    ("given", "limit", "expected"),
    [
        (wait, 3, 3),
        (wait, 50, 50),
        (plain, 50, 1),
        (make_stage(wait), 3, 3),
        (make_stage(wait), 50, 10),
        (make_stage(wait, concurrency=64), 10, 10),
        (make_stage(wait, concurrency=5), 50, 5),
        (make_stage(plain, concurrency=8), 2, 8),
    ],
)
def test_the_limit_of_an_async_executor(given: Any, limit: int, expected: int) -> None:
    """Bare async handlers get it, stages keep their own where it is less, blocking handlers are the pool's business."""
    assert AsyncExecutor(limit)._pipeline([given]).stages[0].concurrency == expected


def test_the_limit_of_a_pipelines_stages() -> None:
    """A copy of the pipeline is limited, with everything else it has; the pipeline itself stays as it is."""
    pipeline = Pipeline("p", source="a", sink="b", ordering="none").add(wait, concurrency=64).table("t")
    limited = AsyncExecutor(4)._pipeline(pipeline)
    assert [stage.concurrency for stage in limited.stages] == [4]
    assert [stage.concurrency for stage in pipeline.stages] == [64]
    assert (limited.name, limited.sources, limited.sink, limited.ordering) == ("p", ("a",), "b", "none")
    assert limited.tables == pipeline.tables


def test_a_context_learns_everything() -> None:
    """Rows by their fate, cost, tokens, position, stage, start and end; its observers hear of it."""
    context, seen = ExecutionContext(), Seen()
    context.observers.append(seen)
    progress(context).finish(result(10, 6, 3, "0.25", 40))
    assert (context.processed_rows, context.failed_rows, context.dropped_rows, context.total_rows) == (6, 3, 1, 10)
    assert (context.skipped_rows, context.defaulted_rows) == (0, 3)
    assert (context.accumulated_cost, context.accumulated_tokens) == (Decimal("0.25"), 40)
    assert (context.last_processed_row, context.current_stage_index, context.get_progress()) == (9, 1, 100.0)
    assert (context.start_time, context.end_time) == (BEGAN, BEGAN + timedelta(seconds=1))
    assert seen.rows == [(10, 100.0)]


def test_a_context_goes_on_counting() -> None:
    """A second execution adds to what the context has, and keeps its start."""
    context = ExecutionContext()
    progress(context).finish(result(10, 10, 0, "1"))
    context.start_time = BEGAN - timedelta(days=1)
    progress(context).finish(result(5, 4, 1, "0.5"))
    assert (context.processed_rows, context.failed_rows, context.total_rows) == (14, 1, 15)
    assert context.accumulated_cost == Decimal("1.5")
    assert context.start_time == BEGAN - timedelta(days=1)


@pytest.mark.parametrize(("rows", "seen"), [([{}] * 20, 50.0), (iter(()), 0.0)])
def test_a_context_in_the_middle_of_a_stream(rows: Any, seen: float) -> None:
    """The total is that of the rows where it can be known, else unknown until the end; costs are counted once."""
    context = ExecutionContext()
    chunks = progress(context, rows)
    chunks.update(result(10, 10, 0, "1", 3))
    assert (context.get_progress(), context.end_time) == (seen, None)
    chunks.update(result(20, 20, 0, "1", 3))
    for _ in range(2):
        chunks.finish(result(20, 20, 0, "2", 5))
    assert (context.processed_rows, context.total_rows, context.get_progress()) == (20, 20, 100.0)
    assert (context.accumulated_cost, context.accumulated_tokens) == (Decimal(2), 5)


def test_failures_that_are_known_early() -> None:
    """Failed rows of a later chunk, known before it is handed out, leave no count below zero."""
    context = ExecutionContext()
    chunks = progress(context)
    chunks.update(result(10, 9, 4))
    assert (context.failed_rows, context.dropped_rows) == (4, 0)
    chunks.finish(result(20, 16, 4))
    assert (context.processed_rows, context.failed_rows, context.dropped_rows, context.total_rows) == (16, 4, 0, 20)
