"""From a batch of records to their effects: decode, run the chain, encode. One object per partition task.

A batch that needs no event loop (a chain of plain functions) is decoded, run and encoded in one go on a thread
of the pool, so that heartbeats never wait for it. What a row does to the outside is put together per row and
joins the batch's effects only when the whole row is sound (law 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..handlers.chain import Chain, Failure, Outcome
from ..handlers.context import Emit, RowContext
from ..handlers.executors import BlockingPool
from ..state.clock import Clock, SystemClock
from ..state.codec import decode, encode
from ..state.errors import BadRowError, ConfigError
from ..state.model import RESERVED_PREFIX, Headers, Outgoing, Record, TopicPartition
from .catalog import Catalog, UnknownTopicsError
from .dead_letters import dead_letter
from .errors import TopicError
from .partitioning import Partitioner
from .session import INPUT_ERROR_HEADER, INPUT_ROW_HEADER, SESSION_HEADER, SOURCE_HEADER, Session

if TYPE_CHECKING:
    from .pipeline import Pipeline

INPUT_STAGE = "input"
"""Stands for decoding in dead letters: the row never reached a stage."""
OUTPUT_STAGE = "output"
"""Stands for encoding in dead letters: every stage was fine, but the result cannot be written."""

_AHEAD_MS = 60_000
_RECORD_OVERHEAD = 2_048  # our own headers, lengths and the batch's head, generously


class Effects:
    """What completed rows do to the outside: records by output partition, in the rows' order, and counts."""

    __slots__ = ("dead_letters", "dropped", "emitted", "outputs", "results", "rows")

    def __init__(self) -> None:
        self.outputs: dict[TopicPartition, list[Outgoing]] = {}
        self.rows = 0
        self.results = 0
        self.dropped = 0
        self.dead_letters = 0
        self.emitted = 0

    def merge(self, other: Effects) -> None:
        """Add what came after."""
        for tp, records in other.outputs.items():
            present = self.outputs.setdefault(tp, records)
            if present is not records:
                present += records
        self.rows += other.rows
        self.results += other.results
        self.dropped += other.dropped
        self.dead_letters += other.dead_letters
        self.emitted += other.emitted


class Batch:
    """Records on their way through the chain; ``rows`` holds what became of each so far."""

    __slots__ = ("contexts", "records", "rows")

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.rows: list[Outcome] = []
        self.contexts: list[RowContext] | None = None


class Processor:
    """Runs one partition's batches through a pipeline's chain.

    Args:
        pipeline: limits and names.
        chain: its compiled stages.
        session: which execution this is.
        tp: the partition that is read.
        catalog: partition counts of topics; source, sink and dead-letter topic are known to it already.
        pool: threads for blocking work.
        clock: the time; brokers refuse records from the future.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        chain: Chain,
        session: Session,
        tp: TopicPartition,
        catalog: Catalog,
        pool: BlockingPool,
        clock: Clock | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._chain = chain
        self._session = session
        self._tp = tp
        self._catalog = catalog
        self._pool = pool
        self._clock = clock or SystemClock()
        self._sink = session.output(pipeline.sink)
        self._sink_partitions = catalog.partitions(self._sink)
        # Co-partitioned topics keep a row in the partition of the same number, whatever partitioner the sender
        # used, as long as no handler changes its key (docs/decisions/0005).
        # A partition beyond the sink's last one is new: the source grew while the counts were remembered.
        self._same_partitions = self._sink_partitions == catalog.partitions(tp.topic) > tp.partition
        self._dead_letters = TopicPartition(
            session.dead_letters, tp.partition % catalog.partitions(session.dead_letters)
        )
        self._partitioners: dict[str, Partitioner] = {}
        self._source_prefix = f"{tp.topic}/{tp.partition}/"
        self._session_header = (SESSION_HEADER, session.id.encode())

    @property
    def least_rows(self) -> int:
        """Rows that a lot should have where there are so many: those of the largest batch stage."""
        return max((stage.batch or 1 for stage in self._chain.stages), default=1)

    @property
    def awaits(self) -> bool:
        """Whether the chain has stages that are awaited one row after the other: their pace has to be learnt."""
        return not self._chain.is_sync

    async def process(self, records: Sequence[Record]) -> Effects:
        """The effects of these records, all of them, in order. Only a bug or cancellation raises.

        Raises:
            BrokerError: topics that rows are emitted to cannot be looked up.
        """
        batch = Batch(records)
        if self._chain.is_sync:
            effects = await self._pool.run(self._decode_and_run, batch)
            return effects if isinstance(effects, Effects) else await self.encode(batch, effects)
        self.decode(batch)
        await self._chain.run(batch.rows, batch.contexts, self._pool)
        return await self.encode(batch)

    async def encode(self, batch: Batch, unknown: UnknownTopicsError | None = None) -> Effects:
        """The effects of a batch that ran; topics that rows are emitted to are looked up on the way."""
        while True:
            if unknown is not None:
                await self._catalog.ensure(unknown.names)
            effects = await self._pool.run(self._encode, batch)
            if isinstance(effects, Effects):
                return effects
            unknown = effects

    def _decode_and_run(self, batch: Batch) -> Effects | UnknownTopicsError:
        self.decode(batch)
        self._chain.run_sync(batch.rows, batch.contexts)
        return self._encode(batch)

    # --- in --------------------------------------------------------------------------------------------------

    def decode(self, batch: Batch) -> None:
        """Fill in rows, or failures for records that are none, and contexts where the chain wants them."""
        pipeline = self._pipeline
        max_bytes, max_depth = pipeline.max_row_bytes, pipeline.max_depth
        text_keys, marked = pipeline.keys == "text", self._session.owns_source
        rows: list[Outcome] = []
        for record in batch.records:
            try:
                if record.key is not None and text_keys and not record.key.isascii():
                    _check_utf8("key", record.key)
                if record.headers:
                    _check_headers(record.headers, marked)
                rows.append(decode(record.value, max_bytes, max_depth))
            except BadRowError as error:
                rows.append(Failure(INPUT_STAGE, error.kind, str(error)))
        batch.rows = rows
        if self._chain.takes_context:
            batch.contexts = [self._context(record, text_keys) for record in batch.records]

    def _context(self, record: Record, text_keys: bool) -> RowContext:
        key: str | bytes | None = record.key
        if text_keys and record.key is not None:
            key = record.key.decode("utf-8", "replace")  # a bad key's row runs through no stage
        return RowContext(
            record.topic,
            record.partition,
            record.offset,
            record.timestamp,
            key,
            _foreign(record.headers) if record.headers else (),
            self._session.id,
        )

    # --- out -------------------------------------------------------------------------------------------------

    def _encode(self, batch: Batch) -> Effects | UnknownTopicsError:
        """The effects of a batch that ran; or the topics that have to be looked up before they can be told.

        The loop is the second half of the hot path: rows with one result, no context and no headers stay in it.
        """
        effects = Effects()
        effects.rows = len(batch.records)
        plain_target = TopicPartition(self._sink, self._tp.partition)
        plain: list[Outgoing] = effects.outputs.setdefault(plain_target, [])
        fast = self._same_partitions and batch.contexts is None
        limit = self._catalog.limit(self._sink) - _RECORD_OVERHEAD
        prefix, session_header = self._source_prefix, self._session_header
        now = self._clock.now_ms()
        try:
            for i, record in enumerate(batch.records):
                outcome = batch.rows[i]
                if fast and outcome.__class__ is dict and not record.headers and record.timestamp <= now:
                    try:
                        value = encode(outcome)
                    except BadRowError as error:
                        self._bury(effects, record, Failure(OUTPUT_STAGE, error.kind, str(error)))
                        continue
                    key = record.key
                    if len(value) + (len(key) if key else 0) <= limit:
                        source = (SOURCE_HEADER, f"{prefix}{record.offset}/0".encode())
                        plain.append(Outgoing(key, value, record.timestamp, (source, session_header)))
                        effects.results += 1
                        continue
                self._encode_row(effects, record, outcome, batch.contexts[i] if batch.contexts else None)
        except UnknownTopicsError as unknown:
            return unknown
        if not plain:
            del effects.outputs[plain_target]
        return effects

    def _encode_row(self, effects: Effects, record: Record, outcome: Outcome, context: RowContext | None) -> None:
        """Any row: its results and side outputs together, or its dead letter."""
        if isinstance(outcome, Failure) and (outcome.kind != "null_value" or self._pipeline.tombstones != "forward"):
            self._bury(effects, record, outcome)
            return
        results = outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]
        emitted = context.emitted if context else []
        try:
            placed = [self._result(record, context, ordinal, row) for ordinal, row in enumerate(results)]
            placed += [self._emit(record, emit, len(results) + i) for i, emit in enumerate(emitted)]
        except BadRowError as error:
            self._bury(effects, record, Failure(OUTPUT_STAGE, error.kind, str(error)))
            return
        except (TopicError, ConfigError) as error:
            self._bury(effects, record, Failure(OUTPUT_STAGE, "topic_refused", str(error)))
            return
        for target, out in placed:
            effects.outputs.setdefault(target, []).append(out)
        effects.results += len(results)
        effects.emitted += len(emitted)
        effects.dropped += not results

    def _result(
        self, record: Record, context: RowContext | None, ordinal: int, row: object
    ) -> tuple[TopicPartition, Outgoing]:
        key, timestamp, headers = record.key, record.timestamp, _foreign(record.headers)
        if context is not None:
            key = context.key.encode() if isinstance(context.key, str) else context.key
            headers = context.headers
            if context.timestamp != record.timestamp:
                timestamp = _checked_timestamp(context.timestamp, self._clock.now_ms())
        value = None if isinstance(row, Failure) else encode(row)  # the only failure here is a forwarded tombstone
        return self._place(self._sink, record, Outgoing(key, value, timestamp, headers), ordinal)

    def _emit(self, record: Record, emit: Emit, ordinal: int) -> tuple[TopicPartition, Outgoing]:
        out = Outgoing(emit.key, encode(emit.row), record.timestamp, emit.headers)
        return self._place(self._session.output(emit.topic), record, out, ordinal)

    def _place(self, topic: str, record: Record, out: Outgoing, ordinal: int) -> tuple[TopicPartition, Outgoing]:
        """Choose the partition and add the headers that tell where a record came from."""
        partitions = self._catalog.partitions(topic)
        if topic == self._sink and self._same_partitions and out.key == record.key:
            partition = record.partition
        elif out.key is None:
            partition = record.partition % partitions
        else:
            partition = self._partitioner(topic, partitions).partition(out.key)
        source = (SOURCE_HEADER, f"{self._source_prefix}{record.offset}/{ordinal}".encode())
        own: Headers = (source, self._session_header)
        if self._session.owns_source:
            own += tuple(header for header in record.headers if header[0] == INPUT_ROW_HEADER)
        headers = out.headers + own
        timestamp = min(out.timestamp, self._clock.now_ms())  # Kafka 4 refuses what is an hour ahead, for good
        size = len(out.value or b"") + len(out.key or b"") + sum(len(n) * 3 + len(v or b"") + 10 for n, v in headers)
        limit = self._catalog.limit(topic)
        if size > limit:
            raise BadRowError("too_large", f"the record for {topic!r} has {size:,} bytes; it takes {limit:,}")
        return TopicPartition(topic, partition), Outgoing(out.key, out.value, timestamp, headers)

    def _partitioner(self, topic: str, partitions: int) -> Partitioner:
        partitioner = self._partitioners.get(topic)
        if partitioner is None:
            partitioner = self._partitioners[topic] = Partitioner(partitions)
        return partitioner

    def _bury(self, effects: Effects, record: Record, failure: Failure) -> None:
        room = self._catalog.limit(self._session.dead_letters)
        letter = dead_letter(record, failure, self._session.id, room)
        letter = letter._replace(timestamp=min(letter.timestamp, self._clock.now_ms()))
        effects.outputs.setdefault(self._dead_letters, []).append(letter)
        effects.dead_letters += 1


def _foreign(headers: Headers) -> Headers:
    """Headers that are not rowmill's own."""
    return tuple(header for header in headers if not header[0].startswith(RESERVED_PREFIX)) if headers else ()


def _check_headers(headers: Headers, marked: bool) -> None:
    for name, value in headers:
        if not name.isascii():
            _check_utf8("header name", name.encode("utf-8", "surrogateescape"))
        if marked and name == INPUT_ERROR_HEADER:
            raise BadRowError("broken_input", (value or b"").decode("utf-8", "replace"))


def _check_utf8(what: str, text: bytes) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError("invalid_utf8", f"the {what} is not UTF-8: {error.reason} at byte {error.start}") from None


def _checked_timestamp(timestamp: object, now: int) -> int:
    if isinstance(timestamp, bool) or not isinstance(timestamp, int) or not -1 <= timestamp <= now + _AHEAD_MS:
        raise BadRowError(
            "bad_timestamp",
            f"ctx.timestamp is {timestamp!r}; it is milliseconds since the epoch, and not in the future",
        )
    return timestamp
