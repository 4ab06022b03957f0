"""Three ways to execute stages, by the names that users of other orchestrators know. One engine runs them all.

Each is a thin layer over :meth:`Pipeline.run_async`, :meth:`Pipeline.run` and :meth:`Pipeline.stream`: it takes a
pipeline or bare stages, runs the rows through them, and brings the caller's ExecutionContext up to date.
"""

from __future__ import annotations

import asyncio
import copy
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ..handlers.stage import Handler, Stage, make_stage
from ..state.context import ExecutionContext, sum_costs
from ..state.errors import ConfigError
from ..state.model import Row
from .options import WorkerOptions
from .pipeline import Pipeline
from .results import CostEstimate, ExecutionResult
from .streaming import ChunkStream, StreamingResult

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only

Stages: TypeAlias = "Pipeline | Sequence[Handler | Stage]"
"""A pipeline; or handlers and finished stages in order, which are run as a pipeline of their own."""

ROWS_KEY = "rows"
"""Where ``execute(stages, context)`` looks for rows in ``context.intermediate_data``."""


class ExecutionStrategy(ABC):
    """How stages are executed. The options are common to all strategies.

    Args:
        broker: its URL. Default: ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        key: the column that becomes the rows' key; default: none.
        options: how the worker runs.
    """

    def __init__(
        self, *, broker: str | None = None, key: str | None = None, options: WorkerOptions | None = None
    ) -> None:
        self._broker = broker
        self._key = key
        self._options = options

    @property
    @abstractmethod
    def name(self) -> str:
        """What the strategy is called: ``async``, ``sync`` or ``streaming``."""

    @abstractmethod
    def execute(
        self, stages: Stages, context: ExecutionContext, rows: pd.DataFrame | Iterable[Row] | None = None
    ) -> Any:
        """Run rows through stages.

        Args:
            stages: a Pipeline, or a list of handlers and Stages.
            context: brought up to date: rows, cost, tokens, start and end; its observers hear of it. A context that
                has rows already goes on counting.
            rows: a DataFrame or any iterable of dicts. None: those in ``context.intermediate_data["rows"]``.

        Raises:
            ConfigError: there are no stages or no rows, or an option is wrong.
            SessionError, BrokerError: nothing ran, or not to the end; the context is as it was.
        """

    @abstractmethod
    def supports_async(self) -> bool:
        """Whether ``execute`` is awaited."""

    @abstractmethod
    def supports_streaming(self) -> bool:
        """Whether ``execute`` gives results while later rows still wait."""

    def _pipeline(self, stages: Stages) -> Pipeline:
        """The pipeline to run; bare stages get one that is named after the strategy."""
        if isinstance(stages, Pipeline):
            return stages
        pipeline = Pipeline(f"{self.name}-executor")
        for stage in _listed(stages):
            pipeline.add(stage)
        return pipeline


class AsyncExecutor(ExecutionStrategy):
    """Runs on the caller's event loop, without a thread per call: for web frameworks and other asyncio programs.

    Args:
        max_concurrency: calls of one async stage that run at once at most. Bare handlers get it as their concurrency;
            Stages and Pipelines keep their own where it is less.
        broker, key, options: as for every ExecutionStrategy.

    Raises:
        ConfigError: ``max_concurrency`` is no number from 1.
    """

    def __init__(
        self,
        max_concurrency: int = 10,
        *,
        broker: str | None = None,
        key: str | None = None,
        options: WorkerOptions | None = None,
    ) -> None:
        super().__init__(broker=broker, key=key, options=options)
        self.max_concurrency = _from_one("AsyncExecutor(max_concurrency=)", max_concurrency)

    @property
    def name(self) -> str:
        """``async``."""
        return "async"

    def supports_async(self) -> bool:
        """True: ``await executor.execute(…)``."""
        return True

    def supports_streaming(self) -> bool:
        """False: the result comes when all rows are done."""
        return False

    async def execute(
        self, stages: Stages, context: ExecutionContext, rows: pd.DataFrame | Iterable[Row] | None = None
    ) -> ExecutionResult:
        """Run rows through stages on this event loop; see :meth:`ExecutionStrategy.execute`.

        Returns:
            What :meth:`Pipeline.run_async` returns.
        """
        pipeline = self._pipeline(stages)
        given = _rows(rows, context)
        result = await pipeline.run_async(given, broker=self._broker, key=self._key, options=self._options)
        _Progress(context, pipeline, given).finish(result)
        return result

    async def execute_async(
        self, stages: Stages, context: ExecutionContext, rows: pd.DataFrame | Iterable[Row] | None = None
    ) -> ExecutionResult:
        """The same as :meth:`execute`."""
        return await self.execute(stages, context, rows)

    def _pipeline(self, stages: Stages) -> Pipeline:
        most = self.max_concurrency
        if isinstance(stages, Pipeline):
            limited = copy.copy(stages)
            limited._stages = [_limited(stage, most) for stage in stages.stages]  # noqa: SLF001 - a copy of our own
            return limited
        return super()._pipeline([_limited(stage, most) for stage in _listed(stages)])


class SyncExecutor(ExecutionStrategy):
    """Runs from plain blocking code, also where an event loop runs already (a notebook), and returns when all is done.

    Stages run in sequence; blocking handlers run on the threads of a bounded pool (``WorkerOptions.threads``), several
    at once where their stage has a ``concurrency``. Async handlers work as well.
    """

    @property
    def name(self) -> str:
        """``sync``."""
        return "sync"

    def supports_async(self) -> bool:
        """False: ``execute`` blocks."""
        return False

    def supports_streaming(self) -> bool:
        """False: the result comes when all rows are done."""
        return False

    def execute(
        self, stages: Stages, context: ExecutionContext, rows: pd.DataFrame | Iterable[Row] | None = None
    ) -> ExecutionResult:
        """Run rows through stages; see :meth:`ExecutionStrategy.execute`.

        Returns:
            What :meth:`Pipeline.run` returns.
        """
        pipeline = self._pipeline(stages)
        given = _rows(rows, context)
        result = pipeline.run(given, broker=self._broker, key=self._key, options=self._options, progress=False)
        _Progress(context, pipeline, given).finish(result)
        return result


class StreamingExecutor(ExecutionStrategy):
    """Runs chunk by chunk in constant memory: early results, and any number of rows.

    Args:
        chunk_size: input rows per chunk, and per transaction at most.
        broker, key, options: as for every ExecutionStrategy.

    Raises:
        ConfigError: ``chunk_size`` is no number from 1.
    """

    def __init__(
        self,
        chunk_size: int = 1000,
        *,
        broker: str | None = None,
        key: str | None = None,
        options: WorkerOptions | None = None,
    ) -> None:
        super().__init__(broker=broker, key=key, options=options)
        self.chunk_size = _from_one("StreamingExecutor(chunk_size=)", chunk_size)

    @property
    def name(self) -> str:
        """``streaming``."""
        return "streaming"

    def supports_async(self) -> bool:
        """False: ``execute`` is not awaited. What it returns may be iterated with ``async for`` nevertheless."""
        return False

    def supports_streaming(self) -> bool:
        """True: chunk by chunk."""
        return True

    def execute(
        self, stages: Stages, context: ExecutionContext, rows: pd.DataFrame | Iterable[Row] | None = None
    ) -> Chunks:
        """Begin to run rows through stages; see :meth:`ExecutionStrategy.execute`.

        Returns:
            An iterator of DataFrames, one per chunk. The context is brought up to date before each is handed out.
        """
        pipeline = self._pipeline(stages)
        given = _rows(rows, context)
        stream = pipeline.stream(
            given,
            chunk_size=self.chunk_size,
            broker=self._broker,
            key=self._key,
            options=self._options,
        )
        return Chunks(stream, _Progress(context, pipeline, given))

    def execute_stream(
        self, stages: Stages, context: ExecutionContext, rows: pd.DataFrame | Iterable[Row] | None = None
    ) -> Chunks:
        """The same as :meth:`execute`."""
        return self.execute(stages, context, rows)


class Chunks(Iterator["pd.DataFrame"], AsyncIterator["pd.DataFrame"]):
    """The DataFrames of a streaming execution, for ``for`` and, on an event loop, ``async for``.

    Use it in a ``with`` block if you may leave it early.
    """

    def __init__(self, stream: ChunkStream, progress: _Progress) -> None:
        self._stream = stream
        self._progress = progress

    @property
    def result(self) -> StreamingResult:
        """Adds up what came so far."""
        return self._stream.result

    def finalize(self) -> ExecutionResult:
        """Counts, costs and errors so far; ``data`` is empty, for the chunks are not held."""
        return self._stream.finalize()

    def close(self) -> None:
        """Stop early: rows not yet processed are given up."""
        self._stream.close()

    def __next__(self) -> pd.DataFrame:
        chunk = next(self._stream, None)
        if chunk is None:
            self._progress.finish(self._stream.finalize())
            raise StopIteration
        self._progress.update(self._stream.finalize())
        return chunk

    async def __anext__(self) -> pd.DataFrame:
        chunk = await asyncio.to_thread(next, self, None)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def __iter__(self) -> Chunks:
        return self

    def __aiter__(self) -> Chunks:
        return self

    def __enter__(self) -> Chunks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Progress:
    """Brings a context up to date with what an execution did so far, on top of what the context had before."""

    def __init__(self, context: ExecutionContext, pipeline: Pipeline, rows: Any) -> None:
        self._context = context
        self._last_stage = len(pipeline.stages) - 1
        self._before = replace(context.get_stats(), total_rows=context.completed_rows)
        self._known = len(rows) if isinstance(rows, Sized) else None
        self._paid = CostEstimate()
        self._is_finished = False

    def update(self, result: ExecutionResult) -> None:
        """Take over how far it is, and tell the observers."""
        context, before, now = self._context, self._before, result.metrics
        if before.total_rows == 0:
            context.start_time = result.start_time
        context.end_time = result.end_time if self._is_finished else None
        total = now.total_rows if self._is_finished else self._known
        if total is not None:
            context.total_rows = before.total_rows + total
        context.processed_rows = before.processed_rows + now.processed_rows
        context.failed_rows = before.failed_rows + now.failed_rows
        context.skipped_rows = before.skipped_rows + now.skipped_rows
        context.defaulted_rows = before.defaulted_rows + now.defaulted_rows
        # In the middle of a stream failures of rows ahead may be known already: then this is below 0.
        context.dropped_rows = before.dropped_rows + max(0, now.dropped_rows)
        context.last_processed_row = max(context.last_processed_row, context.completed_rows - 1)
        context.update_stage(self._last_stage)
        self._add_costs(result.costs)
        context.notify_progress()

    def finish(self, result: ExecutionResult) -> None:
        """The end: total and time are known. Once only."""
        if not self._is_finished:
            self._is_finished = True
            self.update(result)

    def _add_costs(self, costs: CostEstimate) -> None:
        new = sum_costs(costs.total_cost, self._paid.total_cost.copy_negate())
        self._context.add_cost(new, costs.total_tokens - self._paid.total_tokens)
        self._paid = costs


def _rows(rows: Any, context: ExecutionContext) -> Any:
    given = context.intermediate_data.get(ROWS_KEY) if rows is None else rows
    if given is None:
        raise ConfigError(
            "execute(rows=)",
            rows,
            f'give a DataFrame or an iterable of dicts, or put them into context.intermediate_data["{ROWS_KEY}"]',
        )
    return given


def _listed(stages: Any) -> list[Handler | Stage]:
    if not isinstance(stages, (list, tuple)):
        raise ConfigError("execute(stages=)", stages, "give a Pipeline, or a list of handlers and Stages")
    return list(stages)


def _limited(given: Any, most: int) -> Stage:
    """A stage whose async handler has at most so many calls at once; a bare handler makes full use of that."""
    if isinstance(given, Stage):
        return replace(given, concurrency=most) if given.is_async and given.concurrency > most else given
    stage = make_stage(given)
    return replace(stage, concurrency=most) if stage.is_async else stage


def _from_one(setting: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(setting, value, "give a whole number from 1")
    return value
