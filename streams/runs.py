"""Bounded runs: rows in, processed to the end, results out. Interrupted at any moment, they can be gone on with.

Publishing and processing go on side by side. The publisher's transactions carry how many rows of the input they
complete (as an offset of the group ``<group>.input``), the worker's carry the source offsets; both are exactly
once, so whoever starts the same session again goes on where they stopped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from ..handlers.executors import BlockingPool
from ..handlers.frames import frame_of, is_frame, labels_at
from ..handlers.observers import ExecutionObserver, ProgressBarObserver
from ..handlers.outcomes import Failure
from ..state.clock import Clock, SystemClock
from ..state.codec import dumps, loads
from ..state.context import ExecutionContext
from ..state.model import Committed, Headers, Outgoing, StoredRecord, TopicPartition
from .brokers.base import Broker, TransactionalProducer
from .brokers.open import open_broker
from .catalog import Catalog
from .collect import Sorter, error_field, header, input_row, partitions_of, read_topic, result_of
from .contexts import session_context
from .dead_letters import HEADROOM_BYTES, TRUNCATED_HEADER
from .deadlines import deadline
from .errors import BrokerError, CheckpointError, FencedError, SessionCancelledError, SessionError
from .inputs import LOT_BYTES, Input, InputReader, InputRow, make_input
from .loops import run_blocking
from .options import WorkerOptions, state_folder
from .partitioning import partition_for
from .progress import progress_bar
from .results import CostEstimate, ErrorInfo, ExecutionResult, ProcessingStats
from .session import INPUT_ERROR_HEADER, INPUT_ROW_HEADER, SOURCE_HEADER, Session, check_own_session
from .session_traces import remove_owned
from .tracing import publishing, system_of
from .worker import Worker, WorkerStats

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only

    from .pipeline import Pipeline

PUBLISH_ROWS = 2_000
"""Rows per transaction of the publisher."""
_MARKER_SECONDS = 1.0
_MARKER_PAUSE = 0.02
KEPT_ERRORS = 1_000
"""Failed rows that are described one by one; all are counted."""

Progress = Callable[[int, int | None], None]
"""Told of rows committed so far and of the total, None while that is unknown."""


@dataclass(slots=True)
class RunOutcome:
    """What became of a session's rows, read back from its topics, so that it is exact through any number of kills."""

    session: Session
    rows: int = 0
    processed: int = 0
    failed: int = 0
    results: int = 0
    seconds: float = 0.0
    rows_here: int = 0
    topics: dict[str, str] = field(default_factory=dict)
    side_topics: list[str] = field(default_factory=list)
    errors: list[ErrorInfo] = field(default_factory=list)
    sorter: Sorter = field(default_factory=Sorter)
    context: ExecutionContext | None = None
    stats: WorkerStats | None = None
    """What this attempt did, where the session's context tells of more than its rows: a live one's."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Counts of stages, of this attempt."""
    stopped_by: Failure | None = None
    """What ended the session before its last row, if something did."""
    is_whole: bool = True
    """Whether nobody ended the attempt before its time."""

    @property
    def costs(self) -> CostEstimate:
        """What the session's rows cost, earlier attempts included."""
        if self.context is None:
            return CostEstimate(rows=self.processed)
        return CostEstimate(self.context.accumulated_cost, self.context.accumulated_tokens, self.processed)

    @property
    def skipped(self) -> int:
        """Rows that failed in a stage that says to leave them out."""
        if self.stats is not None:
            return self.stats.skipped
        return self.context.skipped_rows if self.context is not None else 0

    @property
    def defaulted(self) -> int:
        """Rows that went on with a fallback."""
        if self.stats is not None:
            return self.stats.defaulted
        return self.context.defaulted_rows if self.context is not None else 0

    @property
    def dropped(self) -> int:
        """Rows that handlers dropped on purpose."""
        return self.done - self.processed - self.failed - self.skipped

    @property
    def done(self) -> int:
        """Rows that are done: all, unless a row, or somebody, ended the session."""
        if self.stats is not None or (self.stopped_by is None and self.is_whole):
            return self.rows
        return 0 if self.context is None else min(self.rows, self.context.completed_rows)

    def values(self) -> Iterator[bytes]:
        """The results' JSON texts in the order of the input. May be called again."""
        return (result.value for result in self.sorter.sorted())


class Publisher:
    """Publishes an input into a session's own source topic, exactly once, from where an earlier attempt stopped.

    Args:
        broker: where to.
        session: whose source topic and producer id.
        topic: the source topic.
        rows: the input.
        clock: timestamps of the rows.
        timeout: seconds one transaction may take.
        room: longest value that fits into the topic; a longer row is cut and marked, and becomes a dead letter.
    """

    def __init__(
        self, broker: Broker, session: Session, topic: str, rows: Input, clock: Clock, timeout: float, room: int
    ) -> None:
        self._broker = broker
        self._group = session.publisher_id
        self._session = session
        self._mark = TopicPartition(topic, 0)
        self._input = rows
        self._clock = clock
        self._timeout = timeout
        self._room = room
        self._producer: TransactionalProducer | None = None
        self._reader = InputReader(rows)
        self.published = 0
        """Rows of the input that are in the topic."""
        self.is_done = False

    async def open(self) -> None:
        """Fence an earlier publisher of the session, find out how far it came, and go there in the input.

        Raises:
            SessionError: the session was started with another input.
        """
        committed = await self._fence()
        if await self._settle_remains(committed):
            committed = await self._fence()
        if committed is None:
            await self._check_unused()
            return
        try:
            state = loads(committed.metadata)
            fingerprint, digest, done = state["input"], state["digest"], bool(state["done"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"session {self._session.id!r}: the publishing position of group {self._group} cannot be read "
                f"({committed.metadata[:100]!r}); use another session name"
            ) from error
        if fingerprint != self._input.fingerprint or not await self._reader.go_to(committed.offset, digest, done=done):
            raise SessionError(
                f"session {self._session.id!r} was started with another input; give the same one to go on with it, "
                "or another session name to start anew"
            )
        self.published, self.is_done = committed.offset, done

    async def _fence(self) -> Committed | None:
        """Start a producer, which ends what an earlier one left, and read how far that one came."""
        if self._producer is not None:
            await self._producer.close()
        self._producer = self._broker.transactional_producer(self._group)
        async with deadline(self._timeout, "start publishing"):
            await self._producer.start()
            return (await self._broker.committed(self._group, [self._mark]))[self._mark]

    async def _settle_remains(self, committed: Committed | None) -> bool:
        """End what the last transaction left open where Kafka gave its markers up, in the way it was decided.

        It was a commit if any of its rows can be read, or if rows before the position cannot. Tells whether there was
        anything.
        """
        async with deadline(self._timeout, "look for what was left open"):
            sources = await partitions_of(self._broker, [self._mark.topic])
            written = await self._broker.offsets(sources, "high_watermark")
            readable = await self._broker.offsets(sources, "end")
            pending = await self._broker.pending(self._group, [self._mark])
        if not pending and readable == written:
            return False
        position, before, beyond = committed.offset if committed else 0, 0, 0
        async for records in read_topic(self._broker, self._mark.topic, until="end"):
            numbers = [number for record in records if (number := input_row(record)) is not None]
            before += sum(number < position for number in numbers)
            beyond += sum(number >= position for number in numbers)
        is_commit = beyond > 0 or before < position
        producer = self._producer
        assert producer is not None  # noqa: S101 - just started
        log.warning(
            "%s: the broker ended a transaction in some places only; the rest is ended now: %s",
            self._mark.topic, "commit" if is_commit else "abort",
        )  # fmt: skip
        async with deadline(self._timeout, "end what was left open"):
            await producer.settle(sources, self._group, {}, commit=is_commit)
        return True

    async def _check_unused(self) -> None:
        """A topic of this name with rows in it, but no position of ours: it is somebody else's session's."""
        async for _ in read_topic(self._broker, self._mark.topic):
            raise SessionError(
                f"topic {self._mark.topic!r} holds rows that session {self._session.id!r} of pipeline "
                f"{self._session.pipeline!r} did not publish (another pipeline's session of the same name?); use "
                "another session name"
            )

    async def publish_all(self, partitions: int) -> None:
        """Publish what is left, and mark the end.

        Raises:
            SessionError: the session was started a second time meanwhile, and that process goes on with it.
        """
        try:
            async for _ in self.publish_chunks(partitions, PUBLISH_ROWS):
                pass
        except FencedError as error:
            raise SessionError(
                f"session {self._session.id!r} was started again elsewhere; that process goes on with it"
            ) from error

    async def publish_chunks(self, partitions: int, size: int, max_bytes: int = LOT_BYTES) -> AsyncIterator[int]:
        """Publish chunk by chunk, one transaction each; yields the number of rows published so far."""
        while not self.is_done:
            await self._publish(await self._reader.take(size, max_bytes=max_bytes), partitions)
            yield self.published

    async def _publish(self, chunk: list[InputRow], partitions: int) -> None:
        producer = self._producer
        if producer is None:
            raise BrokerError("publishing was not opened")
        done = self._reader.is_exhausted
        state = {"v": 1, "input": self._input.fingerprint, "digest": self._reader.digest, "done": done}
        mark = Committed(self.published + len(chunk), dumps(state).decode())
        async with deadline(self._timeout, "publish rows"):
            await producer.begin()
            with publishing(self._mark.topic, system_of(self._broker.url)) as trace:
                for partition, records in self._spread(chunk, partitions, trace).items():
                    await (await producer.send(TopicPartition(self._mark.topic, partition), records))
            await producer.commit_offsets(self._group, {self._mark: mark})
            await producer.end()
        self.published, self.is_done = mark.offset, done

    def _spread(self, chunk: list[InputRow], partitions: int, trace: Headers) -> dict[int, list[Outgoing]]:
        """By key; rows without one in equal runs, in order."""
        now = self._clock.now_ms()
        by_partition: dict[int, list[Outgoing]] = {}
        for i, given in enumerate(chunk):
            row = self._fitting(given)
            headers: Headers = ((INPUT_ROW_HEADER, str(self.published + i).encode()), *trace)
            if row.error is not None:
                headers += ((INPUT_ERROR_HEADER, row.error[:1_000].encode("utf-8", "replace")),)
            partition = i * partitions // len(chunk) if row.key is None else partition_for(row.key, partitions)
            by_partition.setdefault(partition, []).append(Outgoing(row.key, row.value, now, headers))
        return by_partition

    def _fitting(self, row: InputRow) -> InputRow:
        size = len(row.value) + len(row.key or b"")
        if size <= self._room:
            return row
        reason = row.error or "the row is too large"
        return InputRow(row.value[: self._room], None, f"{reason}: {size:,} bytes, cut to {self._room:,}")

    async def close(self) -> None:
        """Stop; what is not committed is published by the next attempt."""
        self._reader.close()
        if self._producer is not None:
            await self._producer.close()


def source_room(pipeline: Pipeline, broker: Broker) -> int:
    """The longest value that the source topic of a bounded run takes."""
    return max(pipeline.max_row_bytes, broker.max_message_bytes)


async def make_source(pipeline: Pipeline, broker: Broker, session: Session, options: WorkerOptions) -> int:
    """Make the source topics of a bounded run, wide enough for its rows; returns the first one's partitions."""
    catalog = Catalog(broker, create=True, partitions=options.partitions, timeout=options.broker_timeout)
    topics = [session.source(topic) for topic in pipeline.sources]
    room = source_room(pipeline, broker) + HEADROOM_BYTES
    await catalog.require(topics, config={"max.message.bytes": str(room)})
    return catalog.partitions(topics[0])


class BoundedRun:
    """One attempt at a bounded session: publish (if it has an input), process to the end, read back.

    Args:
        pipeline: what to run.
        broker: where; started by :meth:`execute`.
        session: which; with ``owns_source`` when there is an input.
        rows: the input; None to run the pipeline's source topics up to the end found at the start.
        options: the worker's.
        progress: told how far it is, some times a second.
        clock: time.
        observers: told of progress besides those of the pipeline.
        steered: whether others can watch, pause and cancel it; not worth it for one without a name.
        on_worker: called with the worker before it begins.
        tells_all: whether the outcome is that of the whole session, with what earlier attempts did, and comes also
            where this attempt was ended early, instead of an error. Of a live session it tells of this attempt.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        broker: Broker,
        session: Session,
        rows: Input | None,
        *,
        options: WorkerOptions | None = None,
        progress: Progress | None = None,
        clock: Clock | None = None,
        observers: Sequence[ExecutionObserver] = (),
        steered: bool = True,
        on_worker: Callable[[Worker], None] | None = None,
        tells_all: bool = False,
    ) -> None:
        self.session = session
        self._pipeline = pipeline
        self._broker = broker
        self._input = rows
        self._options = options or WorkerOptions()
        self._progress = progress or (lambda _done, _total: None)
        self._clock = clock or SystemClock()
        self._observers = observers
        self._steered = steered
        self._on_worker = on_worker
        self._tells_all = tells_all
        self._worker: Worker | None = None
        self._ends: Mapping[TopicPartition, int] | None = None
        self._interrupted = False
        self._cancelled = False
        self._total = rows.total if rows is not None else None
        self._published = 0
        self._before = 0  # rows that earlier attempts committed; with Kafka's markers among them, so never exact

    async def execute(self) -> RunOutcome:
        """Run to the end.

        Raises:
            InterruptedError: :meth:`interrupt` or :meth:`cancel` was called; the session can be gone on with. Not
                with ``tells_all``, nor is the next one.
            SessionCancelledError: somebody else cancelled it.
            RowmillError: it could not go on; the session can be gone on with once the cause is mended.
        """
        began = self._clock.monotonic()
        await self._broker.start()
        try:
            starts = await self._sink_ends()
            rows_here = await (self._run_input() if self._input is not None else self._run_to_present_end())
            is_whole = await self._is_whole()
            outcome = await self._read_back(starts, is_whole=is_whole)
            outcome.seconds = self._clock.monotonic() - began
            outcome.rows_here = rows_here
            return outcome
        finally:
            await self._broker.close()

    async def _is_whole(self) -> bool:
        """Whether nobody ended the attempt before its time; unless ``tells_all``, it is an error if somebody did."""
        worker = self._worker
        was_ended = self._interrupted or (worker is not None and worker.was_cancelled)
        if not was_ended or (worker is not None and worker.is_complete):
            return True
        if self._tells_all:
            return self._ends is not None and await self._has_committed(self._ends)
        if self._interrupted:
            raise InterruptedError(self.session.id)
        raise SessionCancelledError(
            f"session {self.session.id!r} was cancelled; what has completed is kept, and the same call goes on"
        )

    async def _has_committed(self, ends: Mapping[TopicPartition, int]) -> bool:
        """Whether all was done when somebody ended it: the last rows in work may have been the last ones at all."""
        committed = await self._broker.committed(self.session.group, list(ends))
        return all(end == 0 or ((at := committed[tp]) is not None and at.offset >= end) for tp, end in ends.items())

    def interrupt(self) -> None:
        """Ask for an orderly end. To be called on the event loop."""
        self._interrupted = True
        if self._worker is not None:
            self._worker.stop()

    def cancel(self) -> None:
        """End at once: what has completed is committed, the rest runs again. To be called on the event loop."""
        self._interrupted = self._cancelled = True
        if self._worker is not None:
            self._worker.cancel()

    # --- processing --------------------------------------------------------------------------------------------

    async def _run_input(self) -> int:
        """Publish and process side by side."""
        assert self._input is not None  # noqa: S101 - the caller asked
        source = self.session.source(self._pipeline.sources[0])
        partitions = await make_source(self._pipeline, self._broker, self.session, self._options)
        publisher = Publisher(
            self._broker,
            self.session,
            source,
            self._input,
            self._clock,
            self._options.broker_timeout,
            source_room(self._pipeline, self._broker),
        )
        worker = self._make_worker()
        try:
            await publisher.open()
            ends = await self._source_ends()
            self._before = await self._position(ends) if ends else 0
            publishing = asyncio.create_task(self._publish(publisher, partitions, worker))
            await self._work(worker, publishing)
        finally:
            self._published = publisher.published
            await publisher.close()
        return worker.stats.rows

    async def _publish(self, publisher: Publisher, partitions: int, worker: Worker) -> None:
        await publisher.publish_all(partitions)
        self._total = publisher.published
        self._ends = await self._source_ends()
        worker.finish_at(self._ends)

    async def _run_to_present_end(self) -> int:
        """No input: the topics as they are, up to their ends at this moment."""
        worker = self._make_worker()
        self._ends = ends = await self._source_ends()
        worker.finish_at(ends)
        self._total = sum(ends.values()) - await self._position(ends)
        await self._work(worker, None)
        return worker.stats.rows

    async def _position(self, ends: Mapping[TopicPartition, int]) -> int:
        committed = await self._broker.committed(self.session.group, list(ends))
        earliest = await self._broker.offsets(list(ends), "earliest")
        return sum(found.offset if found else earliest[tp] for tp, found in committed.items())

    def _make_worker(self) -> Worker:
        worker = Worker(
            self._pipeline,
            self._broker,
            session=self.session,
            options=self._options,
            clock=self._clock,
            observers=self._observers,
            steered=self._steered,
            bounded=True,
        )
        self._worker = worker
        if self._on_worker is not None:
            self._on_worker(worker)
        if self._cancelled:
            worker.cancel()
        elif self._interrupted:
            worker.stop()
        return worker

    async def _work(self, worker: Worker, publishing: asyncio.Task[None] | None) -> None:
        """Run the worker; whichever of it and the publisher fails first stops the other."""
        working = asyncio.create_task(worker.run())
        reporting = asyncio.create_task(self._report(worker))
        together = {working, publishing} if publishing is not None else {working}
        try:
            await asyncio.wait(together, return_when=asyncio.FIRST_COMPLETED)
            if publishing is not None and publishing.done() and publishing.exception() is not None:
                worker.stop()
            await asyncio.wait({working})
        finally:
            await _cancel([task for task in (publishing, reporting, working) if task is not None])
        self._progress(self._total if worker.is_complete and self._total else self._done(worker), self._total)
        # Look at both before raising one: an exception that nobody looked at is printed with a traceback.
        tasks = [task for task in (publishing, working) if task is not None and not task.cancelled()]
        for error in [task.exception() for task in tasks]:
            if error is not None:
                raise error

    async def _report(self, worker: Worker) -> None:
        while True:
            await self._clock.sleep(0.2)
            self._progress(self._done(worker), self._total)

    def _done(self, worker: Worker) -> int:
        done = self._before + worker.stats.rows + worker.stats.rebuilt
        return done if self._total is None else min(done, self._total)

    async def _source_ends(self) -> dict[TopicPartition, int]:
        topics = [self.session.source(topic) for topic in self._pipeline.sources]
        return await self._broker.offsets(await partitions_of(self._broker, topics), "high_watermark")

    async def _sink_ends(self) -> dict[TopicPartition, int] | None:
        """Where this call's results begin, for sessions whose sink holds more than this run's."""
        if self.session.owns_source or self._tells_of_session:
            return None
        topics = [self.session.output(self._pipeline.sink), self.session.dead_letters]
        return await self._broker.offsets(await partitions_of(self._broker, topics), "end")

    @property
    def _tells_of_session(self) -> bool:
        return self._tells_all and not self.session.is_live

    # --- reading back ------------------------------------------------------------------------------------------

    async def _read_back(self, starts: Mapping[TopicPartition, int] | None, *, is_whole: bool) -> RunOutcome:
        outcome = RunOutcome(self.session, is_whole=is_whole)
        if self._worker is not None:
            outcome.stopped_by = self._worker.stopped_by
            outcome.stages = {name: c.to_dict() for name, c in self._worker.runtime.stage_counts.items()}
        sink = self.session.output(self._pipeline.sink)
        outcome.topics = {
            "source": ", ".join(self.session.source(topic) for topic in self._pipeline.sources),
            "sink": sink,
            "dead_letters": self.session.dead_letters,
        }
        seen = _Distinct()
        sources = [self.session.source(topic) for topic in self._pipeline.sources]
        until = "high_watermark" if is_whole else await self._what_is_visible([sink, self.session.dead_letters])
        async for records in read_topic(self._broker, sink, starts, until):
            for record in records:
                result = result_of(record, sources)
                if result is not None:
                    outcome.sorter.add(result)
                    outcome.results += 1
        for result in outcome.sorter.sorted():
            seen.add(result.order[:2])
        outcome.processed = seen.count
        async for records in read_topic(self._broker, self.session.dead_letters, starts, until):
            outcome.failed += len(records)
            outcome.errors += [describe_error(r) for r in records[: KEPT_ERRORS - len(outcome.errors)]]
        outcome.errors.sort(key=lambda error: (error.row_index is None, error.row_index))
        if self.session.owns_source:
            outcome.rows = self._total if self._total is not None else self._published
            outcome.side_topics = await self._side_topics(set(outcome.topics.values()))
        elif not self._tells_of_session:
            outcome.stats = self._worker.stats if self._worker else None
            outcome.rows = outcome.stats.rows if outcome.stats else 0
        outcome.context = await session_context(
            self._broker, self.session, sources, self._options.broker_timeout, self._clock
        )
        if self._tells_of_session and not self.session.owns_source and outcome.context is not None:
            outcome.rows = outcome.context.completed_rows if is_whole else outcome.context.total_rows
        if not is_whole:
            _count_committed(outcome)
        return outcome

    async def _what_is_visible(self, topics: Sequence[str]) -> Literal["end"]:
        """Up to where an attempt that was ended early is read: as far as transactions are over.

        Kafka writes a commit's markers soon after it confirmed it, so they are waited for; but a commit that was cut
        off stays open for long, and hides what comes after it.
        """
        partitions = await partitions_of(self._broker, topics)
        give_up = self._clock.monotonic() + _MARKER_SECONDS
        while self._clock.monotonic() < give_up:
            written = await self._broker.offsets(partitions, "high_watermark")
            if await self._broker.offsets(partitions, "end") == written:
                break
            await self._clock.sleep(_MARKER_PAUSE)
        return "end"

    async def _side_topics(self, known: set[str]) -> list[str]:
        """Topics that rows were emitted to, also by earlier attempts: they are named after the session, as another
        pipeline's may be, and their records tell our source.
        """
        sources = tuple(f"{self.session.source(topic)}/".encode() for topic in self._pipeline.sources)
        ours = []
        for topic in await self._broker.topics():
            if topic in known or not topic.endswith(f".{self.session.id}"):
                continue
            async for records in read_topic(self._broker, topic):
                if (header(records[0], SOURCE_HEADER) or b"").startswith(sources):
                    ours.append(topic)
                break
        return ours


def _count_committed(outcome: RunOutcome) -> None:
    """Rows by their fates as they are committed: not all of their results may be visible yet."""
    if outcome.stats is not None:
        outcome.failed = outcome.stats.dead_letters
        outcome.processed = outcome.rows - outcome.failed - outcome.stats.skipped - outcome.stats.dropped
    elif outcome.context is not None:
        outcome.failed = outcome.context.failed_rows
        outcome.processed = outcome.context.processed_rows


class _Distinct:
    """Counts distinct values of a sorted sequence."""

    def __init__(self) -> None:
        self.count = 0
        self._last: object = None

    def add(self, value: object) -> None:
        self.count += value != self._last
        self._last = value


def describe_error(record: StoredRecord) -> ErrorInfo:
    """A dead letter as the error it tells of."""
    return ErrorInfo(
        row_index=input_row(record),
        stage_name=error_field(record, "stage"),
        error_type=error_field(record, "type"),
        error_message=error_field(record, "message"),
        attempts=int(error_field(record, "attempts") or 1),
        dead_letter=f"{record.topic}/{record.partition}/{record.offset}",
        where=error_field(record, "where"),
        value=None if any(name == TRUNCATED_HEADER for name, _ in record.headers) else record.value,
    )


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)


async def remove_session(
    broker: Broker,
    pipeline: Pipeline,
    session: Session,
    side_topics: Iterable[str] = (),
    options: WorkerOptions | None = None,
) -> None:
    """Delete a temporary session's own topics, groups and local tables: see :func:`~.session_traces.remove_owned`."""
    sources = [session.source(topic) for topic in pipeline.sources]
    tables = state_folder(options or WorkerOptions(), broker) if pipeline.tables else None
    sink = session.output(pipeline.sink)
    await remove_owned(broker, session, sources, sink, side_topics=side_topics, tables=tables)


# --- the Python face -------------------------------------------------------------------------------------------


def run_rows(
    pipeline: Pipeline,
    rows: pd.DataFrame | Iterable[Any],
    *,
    broker: str | None,
    session: str | None,
    key: str | None,
    progress: bool | None,
    options: WorkerOptions | None,
) -> ExecutionResult:
    """:meth:`Pipeline.run`."""
    if progress is None and any(isinstance(observer, ProgressBarObserver) for observer in pipeline.observers):
        progress = False  # one bar is enough
    with progress_bar(pipeline.name, shown=progress) as report:
        call = _Call(pipeline, rows, broker, session, key, options, report)
        return run_blocking(call.execute, on_interrupt=call.attempt.interrupt)


async def run_rows_async(
    pipeline: Pipeline,
    rows: pd.DataFrame | Iterable[Any],
    *,
    broker: str | None,
    session: str | None,
    key: str | None,
    options: WorkerOptions | None,
) -> ExecutionResult:
    """:meth:`Pipeline.run_async`."""
    return await _Call(pipeline, rows, broker, session, key, options, None).execute()


class _Call:
    """One call of ``Pipeline.run``: a session's attempt, its results as a DataFrame, and the tidying up."""

    def __init__(
        self,
        pipeline: Pipeline,
        rows: pd.DataFrame | Iterable[Any],
        broker: str | None,
        session: str | None,
        key: str | None,
        options: WorkerOptions | None,
        report: Progress | None,
    ) -> None:
        pipeline.chain()
        if session is not None:
            check_own_session("session", session)
        clock = SystemClock()
        self._pipeline = pipeline
        self._rows = rows
        self._options = options
        self._temporary = session is None
        self._broker_url = broker
        self.attempt = BoundedRun(
            pipeline,
            open_broker(broker, clock=clock),
            Session(pipeline.name, session or f"run-{clock.token()}", owns_source=True),
            make_input(rows, key),
            options=options,
            progress=report,
            clock=clock,
            steered=session is not None,
        )

    async def execute(self) -> ExecutionResult:
        started = datetime.now(UTC)
        outcome = await self.attempt.execute()
        result = await execution_result(outcome, self._rows, started)
        if self._temporary and outcome.stopped_by is None:
            await _remove(open_broker(self._broker_url), self._pipeline, outcome, self._options)
        return result


async def execution_result(outcome: RunOutcome, rows: Any, started: datetime) -> ExecutionResult:
    """An outcome as those see it who gave the rows; the outcome is closed.

    Args:
        outcome: what became of them.
        rows: as they were given; None for those of the source topics.
        started: when the call began.
    """
    pool = BlockingPool(1)  # asyncio's own threads may all be held by handlers that were given up
    try:
        data = await pool.run(_data, outcome, rows)
    finally:
        pool.close()
        outcome.sorter.close()
    return _result(outcome, data, rows, started)


async def _remove(broker: Broker, pipeline: Pipeline, outcome: RunOutcome, options: WorkerOptions | None) -> None:
    await broker.start()
    try:
        await remove_session(broker, pipeline, outcome.session, outcome.side_topics, options)
    finally:
        await broker.close()


def _data(outcome: RunOutcome, rows: Any) -> pd.DataFrame:
    results = list(outcome.sorter.sorted())
    places = [result.row for result in results]
    index = labels_at(rows, places) if is_frame(rows) else None if rows is None else places
    return frame_of((loads(result.value) for result in results), index)


def _result(outcome: RunOutcome, data: pd.DataFrame, rows: Any, started: datetime) -> ExecutionResult:
    if is_frame(rows):
        outcome.errors = [_labelled(error, rows) for error in outcome.errors]
    return ExecutionResult(
        data=data,
        metrics=stats_of(outcome),
        costs=outcome.costs,
        errors=outcome.errors,
        session=outcome.session.id,
        topics=outcome.topics,
        start_time=started,
        end_time=datetime.now(UTC),
        stages=outcome.stages,
        stopped=outcome.stopped_by.message if outcome.stopped_by else None,
    )


def _labelled(error: ErrorInfo, frame: Any) -> ErrorInfo:
    from dataclasses import replace

    return error if error.row_index is None else replace(error, row_index=frame.index[error.row_index])


def stats_of(outcome: RunOutcome) -> ProcessingStats:
    """The outcome's figures."""
    return ProcessingStats(
        total_rows=outcome.rows,
        processed_rows=outcome.processed,
        failed_rows=outcome.failed,
        skipped_rows=outcome.skipped,
        dropped_rows=outcome.dropped,
        defaulted_rows=outcome.defaulted,
        results=outcome.results,
        rows_per_second=outcome.rows_here / outcome.seconds if outcome.seconds else 0.0,
        total_duration_seconds=outcome.seconds,
    )
