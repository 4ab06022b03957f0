"""Chunk by chunk: rows are published a few chunks ahead, results come back as DataFrames in constant memory."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..handlers.frames import frame_of, is_frame, join_frames, labels_at
from ..state.clock import SystemClock
from ..state.codec import loads
from ..state.context import checked_cost, sum_costs
from ..state.errors import ConfigError, RowmillError
from ..state.model import StoredRecord, TopicPartition, stored
from .brokers.base import Broker, Reader
from .brokers.open import open_broker
from .collect import Result, partitions_of, result_of
from .deadlines import deadline
from .inputs import make_input
from .loops import LoopThread
from .options import WorkerOptions
from .results import CostEstimate, ErrorInfo, ExecutionResult, ProcessingStats
from .runs import KEPT_ERRORS, Publisher, describe_error, make_source, remove_session, source_room
from .session import Session
from .worker import Worker

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only

    from .pipeline import Pipeline

log = logging.getLogger(__name__)

LOOKAHEAD = 4
"""Chunks that are published before their results are asked for."""
_POLL_SECONDS = 0.01
_CHUNK_BYTES = 256 * 1024 * 1024  # a chunk has the rows that were asked for, unless they are huge
_READ_SECONDS = 60.0


class StreamingResult:
    """Adds up what a stream of chunks gave, without holding the chunks unless asked to.

    Args:
        keep: hold the chunks, so that ``finalize().data`` has them all; else it is an empty frame.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._kept: list[Any] | None = [] if keep else None
        self._started = datetime.now(UTC)
        self._results = 0
        self._cost = Decimal(0)
        self._tokens = 0
        self.rows = 0
        self.processed = 0
        self.failed = 0
        self.skipped = 0
        self.defaulted = 0
        self.stopped: str | None = None
        self.errors: list[ErrorInfo] = []
        self.stages: dict[str, dict[str, Any]] = {}
        self.session = ""
        self.topics: dict[str, str] = {}

    def add_chunk(self, chunk: pd.DataFrame, cost: Decimal = Decimal(0), tokens: int = 0) -> None:
        """Count a chunk of results, and what it cost.

        Raises:
            ConfigError: the cost is a float, negative or no number.
        """
        amount = checked_cost(cost, "add_chunk(cost=)")
        self._results += len(chunk)
        self._cost = sum_costs(self._cost, amount)
        self._tokens += tokens
        if self._kept is not None:
            self._kept.append(chunk)

    def finalize(self) -> ExecutionResult:
        """The sum of all chunks so far. Where nobody told of rows, each result counts as one."""
        if not self.rows:
            self.rows = self.processed = self._results
        ended = datetime.now(UTC)
        seconds = (ended - self._started).total_seconds()
        stats = ProcessingStats(
            total_rows=self.rows,
            processed_rows=self.processed,
            failed_rows=self.failed,
            skipped_rows=self.skipped,
            dropped_rows=max(0, self.rows - self.processed - self.failed - self.skipped),
            defaulted_rows=self.defaulted,
            results=self._results,
            rows_per_second=self.rows / seconds if seconds else 0.0,
            total_duration_seconds=seconds,
        )
        return ExecutionResult(
            data=join_frames(self._kept or []),
            metrics=stats,
            costs=CostEstimate(self._cost, self._tokens, self.processed),
            errors=self.errors,
            session=self.session,
            topics=self.topics,
            start_time=self._started,
            end_time=ended,
            stopped=self.stopped,
            stages=self.stages,
        )


_OPEN: weakref.WeakSet[ChunkStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A stream that is still open when the program ends would leave its topics behind, and wait for a dead thread."""
    for stream in list(_OPEN):
        with contextlib.suppress(Exception):
            stream.close()


class ChunkStream(Iterator["pd.DataFrame"]):
    """The iterator that :meth:`Pipeline.stream` returns. ``result`` adds up what it gave so far.

    Its loop starts with the first chunk and ends with the last, with :meth:`close`, or with the ``with`` block.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        rows: pd.DataFrame | Iterable[Any],
        *,
        chunk_size: int,
        broker: str | None,
        key: str | None,
        options: WorkerOptions | None,
        keep: bool,
    ) -> None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ConfigError("stream(chunk_size=)", chunk_size, "give a whole number from 1")
        pipeline.chain()
        options = options or WorkerOptions()
        self.result = StreamingResult(keep=keep)
        self._frame = rows if is_frame(rows) else None
        self._engine = _Engine(
            pipeline,
            open_broker(broker),
            make_input(rows, key),
            chunk_size,
            replace(
                options,
                commit_rows=min(options.commit_rows, chunk_size),
                fetch_rows=min(options.fetch_rows, chunk_size),
            ),
            self.result,
        )
        self._loop: LoopThread | None = None
        self._exhausted = False
        _OPEN.add(self)

    def __next__(self) -> pd.DataFrame:
        if self._exhausted:
            raise StopIteration
        if self._loop is None:
            self._loop = LoopThread("rowmill-stream").__enter__()
        try:
            results = self._loop.submit(self._engine.next_chunk).result()
        except BaseException:
            self.close()
            raise
        if results is None:
            self.close()
            raise StopIteration
        chunk = self._chunk(results)
        self.result.add_chunk(chunk, *self._engine.new_costs())
        return chunk

    def finalize(self) -> ExecutionResult:
        """``result.finalize()``: counts, errors and, with ``keep=True``, all the data."""
        return self.result.finalize()

    def close(self) -> None:
        """Stop early: rows not yet processed are given up, and the session's topics removed."""
        self._exhausted = True
        _OPEN.discard(self)
        loop, self._loop = self._loop, None
        if loop is not None:
            try:
                loop.submit(self._engine.close).result()
            finally:
                loop.__exit__()

    def __enter__(self) -> ChunkStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if sys.is_finalizing():
            return  # its loop's thread is dead: nobody would answer
        with contextlib.suppress(Exception):
            self.close()

    def _chunk(self, results: list[Result]) -> pd.DataFrame:
        places = [result.row for result in results]
        index = labels_at(self._frame, places) if self._frame is not None else places
        return frame_of((loads(result.value) for result in results), index)


class _Engine:
    """The part of a stream that lives on the event loop."""

    def __init__(
        self,
        pipeline: Pipeline,
        broker: Broker,
        rows: Any,
        chunk_size: int,
        options: WorkerOptions,
        result: StreamingResult,
    ) -> None:
        clock = SystemClock()
        self._clock = clock
        self._pipeline = pipeline
        self._broker = broker
        self._chunk_size = chunk_size
        self._options = options
        self._result = result
        self._session = Session(pipeline.name, f"stream-{clock.token()}", owns_source=True)
        self._source = self._session.source(pipeline.sources[0])
        self._worker = Worker(
            pipeline, broker, session=self._session, options=options, clock=clock, steered=False, bounded=True
        )
        self._publisher = Publisher(
            broker, self._session, self._source, rows, clock, options.broker_timeout, source_room(pipeline, broker)
        )
        self._outputs: list[_Tail] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._ahead = asyncio.Semaphore(LOOKAHEAD)
        self._published: deque[tuple[int, dict[TopicPartition, int]]] = deque()
        self._held: list[Result] = []
        self._told_costs = (Decimal(0), 0)
        result.session = self._session.id
        result.topics = {
            "source": self._source,
            "sink": self._session.output(pipeline.sink),
            "dead_letters": self._session.dead_letters,
        }

    async def next_chunk(self) -> list[Result] | None:
        """The results of the next chunk's rows in their order, or None at the end."""
        if not self._tasks:
            await self._start()
        chunk = await self._completed_chunk()
        if chunk is None:
            return await self._rest()
        before, self._result.rows = self._result.rows, chunk
        self._result.stages = {name: counts.to_dict() for name, counts in self._worker.runtime.stage_counts.items()}
        await self._read_outputs()
        mine = sorted(result for result in self._held if result.row < chunk)
        self._held = [result for result in self._held if result.row >= chunk]
        self._result.processed += len({result.row for result in mine})
        self._ahead.release()
        return mine if mine or chunk > before else None

    async def _rest(self) -> list[Result] | None:
        """What was done before a row, or the budget, ended the session in the middle of a chunk; None at the end."""
        stopped_by = self._worker.stopped_by
        if stopped_by is None or self._result.stopped is not None:
            return None
        self._result.stopped = stopped_by.message
        await self._read_outputs()
        rest, self._held = sorted(self._held), []
        self._result.processed += len({result.row for result in rest})
        self._result.rows = self._worker.stats.rows
        return rest or None

    async def _start(self) -> None:
        await self._broker.start()
        partitions = await make_source(self._pipeline, self._broker, self._session, self._options)
        await self._publisher.open()
        self._tasks = [
            asyncio.create_task(self._worker.run()),
            asyncio.create_task(self._publish(partitions)),
        ]

    def new_costs(self) -> tuple[Decimal, int]:
        """Money and tokens of the rows committed since the last time."""
        stats = self._worker.stats
        before, self._told_costs = self._told_costs, (stats.cost, stats.tokens)
        return sum_costs(stats.cost, before[0].copy_negate()), self._told_costs[1] - before[1]

    async def _publish(self, partitions: int) -> None:
        chunks = self._publisher.publish_chunks(partitions, self._chunk_size, _CHUNK_BYTES)
        while True:
            await self._ahead.acquire()
            published = await anext(chunks, None)
            if published is None:
                return
            sources = [TopicPartition(self._source, partition) for partition in range(partitions)]
            ends = await self._broker.offsets(sources, "high_watermark")
            self._published.append((published, ends))

    async def _completed_chunk(self) -> int | None:
        """The number of rows up to the end of the next chunk, once all of them are committed."""
        while True:
            working, publishing = self._tasks
            if working.done():
                working.result()
            if self._published:
                upto, ends = self._published[0]
                if self._worker.has_committed(ends):
                    self._published.popleft()
                    return upto
                if working.done() and self._worker.stopped_by is not None:
                    return None
            elif working.done() and self._worker.stopped_by is not None:
                return None
            elif publishing.done():
                publishing.result()  # an error of the input comes behind the chunks before it
                return None
            await self._clock.sleep(_POLL_SECONDS)

    async def _read_outputs(self) -> None:
        if not self._outputs:
            topics = self._result.topics
            self._outputs = [_Tail(self._broker, topics["sink"]), _Tail(self._broker, topics["dead_letters"])]
        sink, dead_letters = self._outputs
        for record in await sink.read():
            result = result_of(record)
            if result is not None:
                self._held.append(result)
        failures = await dead_letters.read()
        self._result.failed += len(failures)
        self._result.skipped = self._worker.stats.skipped
        self._result.defaulted = self._worker.stats.defaulted
        room = KEPT_ERRORS - len(self._result.errors)
        self._result.errors += [describe_error(record) for record in islice(failures, max(0, room))]

    async def close(self) -> None:
        """Stop everything; a failure in one step does not keep the others from being taken."""
        self._worker.stop()
        for task in reversed(self._tasks):
            task.cancel()
        if self._tasks:
            done, _ = await asyncio.wait(self._tasks, timeout=self._options.broker_timeout)
            for task in done:
                if not task.cancelled():
                    task.exception()  # looked at: the user was told of it, or left before it came
        steps = [self._publisher.close, *(tail.close for tail in self._outputs), self._remove, self._broker.close]
        for step in steps:
            try:
                await step()
            except RowmillError as error:
                log.warning("cleaning up after session %s: %s", self._session.id, error)

    async def _remove(self) -> None:
        if self._tasks:
            side = [t for t in await self._broker.topics() if t.endswith(f".{self._session.id}")]
            await remove_session(self._broker, self._pipeline, self._session, side, self._options)


class _Tail:
    """Reads what was added to a topic since the last time."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self._broker = broker
        self._topic = topic
        self._reader: Reader | None = None
        self._partitions: list[TopicPartition] = []

    async def read(self) -> list[StoredRecord]:
        """Every record committed before this call and not read yet."""
        if self._reader is None:
            self._partitions = await partitions_of(self._broker, [self._topic])
            self._reader = self._broker.reader()
            await self._reader.start(await self._broker.offsets(self._partitions, "earliest"))
        ends = await self._broker.offsets(self._partitions, "high_watermark")
        found: list[StoredRecord] = []
        async with deadline(_READ_SECONDS, f"read {self._topic}"):
            while left := await self._behind(self._reader, ends):
                for tp, records in (await self._reader.fetch(left, 5_000, 0.2)).items():
                    found += stored(tp, records)
        return found

    async def _behind(self, reader: Reader, ends: Mapping[TopicPartition, int]) -> list[TopicPartition]:
        return [tp for tp in self._partitions if await reader.position(tp) < ends[tp]]

    async def close(self) -> None:
        if self._reader is not None:
            await self._reader.close()
