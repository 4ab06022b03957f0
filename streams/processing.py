"""From a batch of records to their effects: decode, run the chain, encode. One object per partition task.

A batch that needs no event loop (a chain of plain functions) is decoded, run and encoded in one go on a thread
of the pool, so that heartbeats never wait for it. What a row does to the outside is put together per row and
joins the batch's effects only when the whole row is sound (law 3).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby, repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..handlers.capture import LogLines, lines_of
from ..handlers.chain import Chain
from ..handlers.context import NO_COST, Emit, RowContext, TablesOpener
from ..handlers.flow import Flight
from ..handlers.outcomes import Failure, Outcome
from ..handlers.runtime import Runtime
from ..state.artifacts import ArtifactError, materialize
from ..state.codec import all_dicts, decode, decode_all, encode, encode_all
from ..state.context import sum_costs
from ..state.errors import BadRowError, ConfigError
from ..state.model import RESERVED_PREFIX, Header, Headers, Outgoing, Record, TopicPartition, foreign
from ..state.table import RowTables, TableSpec
from ..state.tables import Layer, PartitionTables, TableUpdateError
from .catalog import Catalog, UnknownTopicsError
from .dead_letters import dead_letter
from .errors import TopicError
from .outbox import Outbox
from .partitioning import Partitioner
from .rebuild import Rebuild
from .session import INPUT_ERROR_HEADER, INPUT_ROW_HEADER, SESSION_HEADER, SOURCE_HEADER, Session

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .tracing import Tracing

log = logging.getLogger(__name__)

INPUT_STAGE = "input"
"""Stands for decoding in dead letters: the row never reached a stage."""
OUTPUT_STAGE = "output"
"""Stands for encoding in dead letters: every stage was fine, but the result cannot be written."""
TABLES_STAGE = "tables"
"""Stands for a table's ``update`` in dead letters: it raised when the row completed."""

_AHEAD_MS = 60_000
_SLICE_ROWS = 500
_RECORD_OVERHEAD = 2_048  # our own headers, lengths and the batch's head, generously


class Effects:
    """What completed rows do to the outside: records by output partition, in the rows' order, and counts."""

    __slots__ = (
        "cost", "dead_letters", "defaulted", "dropped", "emitted", "failures", "halted_by", "outputs", "rebuilt",
        "rebuilt_failed", "results", "rows", "skipped", "tables", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.outputs: dict[TopicPartition, Outbox] = {}
        self.rows = 0
        self.rebuilt = 0
        """Of ``rows``, those that ran only for what they write to tables; the counts below know nothing of them."""
        self.rebuilt_failed = 0
        """Of these, those that failed."""
        self.results = 0
        self.dropped = 0
        self.skipped = 0
        self.defaulted = 0
        self.dead_letters = 0
        self.emitted = 0
        self.cost = NO_COST
        self.tokens = 0
        self.failures: list[tuple[Record, Failure]] = []
        """Of the rows that were skipped or became dead letters, to be told once they are committed."""
        self.tables: Layer | None = None
        """What the rows of a lot wrote to tables; not merged, but absorbed when the lot is done."""
        self.halted_by: Failure | None = None
        """What ends the session: the row behind these ``rows`` stays undone. Not merged."""

    def merge(self, other: Effects) -> None:
        """Add what came after."""
        for tp, records in other.outputs.items():
            present = self.outputs.setdefault(tp, records)
            if present is not records:
                present.extend(records)
        self.rows += other.rows
        self.rebuilt += other.rebuilt
        self.rebuilt_failed += other.rebuilt_failed
        self.results += other.results
        self.dropped += other.dropped
        self.skipped += other.skipped
        self.defaulted += other.defaulted
        self.dead_letters += other.dead_letters
        self.emitted += other.emitted
        self.cost = sum_costs(self.cost, other.cost)
        self.tokens += other.tokens
        self.failures += other.failures

    def silence(self) -> None:
        """Leave out all that shows outside, and what is counted of it; what the rows cost was paid.

        They are encoded all the same: what cannot be written as a result left nothing in a table at the first time.
        """
        self.outputs.clear()
        self.failures.clear()
        self.rebuilt, self.rebuilt_failed = self.rows, self.dead_letters
        self.results = self.dropped = self.skipped = self.defaulted = self.dead_letters = self.emitted = 0


_Work: TypeAlias = "Generator[frozenset[str], None, Effects]"
"""Work that goes on until it lacks topics, whose names it yields; call it again when they are known."""


def _go_on(work: _Work) -> Effects | frozenset[str]:
    try:
        return next(work)
    except StopIteration as end:
        effects: Effects = end.value
        return effects


class _InterruptedError(BaseException):
    """A lot cannot go on, through no fault of the row in whose handler that shows; so it is no Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Placed(NamedTuple):
    """A row's records, ready to go; made before the commit for rows that write to tables."""

    results: int
    emitted: int
    records: Sequence[tuple[TopicPartition, Outgoing]]


class Batch:
    """Records on their way through the chain; ``rows`` holds what became of each so far."""

    __slots__ = ("_has_headers", "contexts", "halted_by", "records", "rows")

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.rows: list[Outcome] = []
        self.contexts: list[RowContext] | None = None
        self.halted_by: Failure | None = None
        self._has_headers: bool | None = None

    @property
    def has_headers(self) -> bool:
        """Whether any of the records has some; asked on the way in and on the way out."""
        if self._has_headers is None:
            self._has_headers = any(map(_headers_of, self.records))
        return self._has_headers

    def cut(self) -> None:
        """Leave out the row that ends the session, if one does, and all behind it."""
        last = self.rows[-1] if self.rows else None
        if not isinstance(last, Failure) or not last.halts:
            return
        halting = (i for i, outcome in enumerate(self.rows) if isinstance(outcome, Failure) and outcome.halts)
        first = next(halting)
        self.halted_by = last
        self.records = self.records[:first]
        del self.rows[first:]

    def part(self, places: Sequence[int]) -> Batch:
        """Some of its rows."""
        batch = Batch([self.records[i] for i in places])
        batch.rows = [self.rows[i] for i in places]
        batch.contexts = [self.contexts[i] for i in places] if self.contexts else None
        return batch


class Processor:
    """Runs one partition's batches through a pipeline's chain.

    Args:
        pipeline: limits and names.
        chain: its compiled stages.
        session: which execution this is.
        tp: the partition that is read.
        catalog: partition counts of topics; source, sink and dead-letter topic are known to it already.
        runtime: what the worker's stages share; its clock tells which records are from the future.
        tables: the partition's tables, where the pipeline has any.
        rebuild: tells which rows keep silent while tables are made again; None once they are.
        tracing: what traces rows, where somebody wants that.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        chain: Chain,
        session: Session,
        tp: TopicPartition,
        catalog: Catalog,
        runtime: Runtime,
        tables: PartitionTables | None = None,
        rebuild: Callable[[], Rebuild | None] = lambda: None,
        tracing: Tracing | None = None,
    ) -> None:
        self._tables = tables
        self._rebuild = rebuild
        self._traced_lots = tracing if chain.is_sync else None
        self._traced_rows = tracing if not chain.is_sync else None
        self._row_by_row = chain.is_row_by_row
        self._has_policies = any(stage.is_policed or stage.stages for stage in chain.stages)
        self._pipeline = pipeline
        self._chain = chain
        self._session = session
        self._tp = tp
        self._catalog = catalog
        self._runtime = runtime
        self._clock = runtime.clock
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
        is_bare = pipeline.output is None and runtime.artifacts is None
        self._is_plain = self._same_partitions and is_bare
        self._plain_limit = catalog.limit(self._sink) - _RECORD_OVERHEAD

    @property
    def least_rows(self) -> int:
        """Rows that a lot should have where there are so many: those of the largest batch stage."""
        return max((stage.batch or 1 for stage in self._chain.stages), default=1)

    @property
    def learns_pace(self) -> bool:
        """Whether lots should begin small: stages that are awaited one row after the other may be slow."""
        return not self._chain.is_sync or self.fixed_lots

    @property
    def fixed_lots(self) -> bool:
        """Whether lots must stay at ``least_rows``.

        Rows of one lot do not see each other's table writes; and where one waits for a policy, those before it in its
        lot would wait to be committed, or be paid for again.
        """
        return self._has_policies or (self._tables is not None and not self._row_by_row)

    async def process(self, records: Sequence[Record]) -> Effects:
        """The effects of these records, all of them, in order. Only a bug or cancellation raises.

        Raises:
            BrokerError: topics that rows are emitted to cannot be looked up.
        """
        try:
            with self._traced_lots.lot(self._tp, records) if self._traced_lots is not None else nullcontext():
                layer = Layer(self._tables) if self._tables and self._chain.takes_context else None
                if self._chain.is_sync:
                    effects = await self._on_threads(self._run_sync(records, layer, asyncio.get_running_loop()))
                else:
                    effects = await self._run_async(Batch(records), layer, asyncio.get_running_loop())
        except _InterruptedError as interrupted:
            raise interrupted.error from interrupted
        effects.tables = layer
        return effects

    async def _on_threads(self, work: _Work) -> Effects:
        """Have work done on threads; topics that it lacks are looked up here."""
        while True:
            done = await self._runtime.pool.run(_go_on, work)
            if isinstance(done, Effects):
                return done
            await self._catalog.ensure(done)

    def _run_sync(self, records: Sequence[Record], layer: Layer | None, loop: asyncio.AbstractEventLoop) -> _Work:
        """The hot path of plain functions, on a thread: decode, run, settle and encode.

        In slices, where each row runs through the whole chain before the next one anyway: what one step made of a row
        is still near when the next one needs it, and dies young. Rows that write to tables took a fifth longer in
        whole lots of 2,000; slices of 128 rows were no better.
        """
        effects = Effects()
        size = _SLICE_ROWS if self._row_by_row else len(records) or 1
        for start in range(0, len(records), size):
            batch = Batch(records[start : start + size])
            lot = self._lot(batch, layer, loop)
            self.decode(batch, lot)
            self._chain.run_sync(batch.rows, batch.contexts, self._runtime)
            batch.cut()
            effects.merge((yield from self._settle_and_encode(batch, lot)))
            if batch.halted_by is not None:
                effects.halted_by = batch.halted_by
                break
        return effects

    async def _run_async(self, batch: Batch, layer: Layer | None, loop: asyncio.AbstractEventLoop) -> Effects:
        lot = self._lot(batch, layer, loop)
        self.decode(batch, lot)
        await self._chain.run(batch.rows, batch.contexts, self._runtime)
        if self._traced_rows is not None:
            self._traced_rows.end_all(batch.contexts, batch.rows)
        batch.cut()
        effects = await self._on_threads(self._settle_and_encode(batch, lot))
        effects.halted_by = batch.halted_by
        return effects

    def _lot(self, batch: Batch, layer: Layer | None, loop: asyncio.AbstractEventLoop) -> _Lot | None:
        if self._tables is None or layer is None:
            return None
        return _Lot(self, batch, self._tables.specs, layer, loop, self._row_by_row)

    async def encode(self, batch: Batch) -> Effects:
        """The effects of a batch that ran; topics that rows are emitted to are looked up on the way."""
        while True:
            effects = await self._runtime.pool.run(self._encode, batch)
            if isinstance(effects, Effects):
                return effects
            await self._catalog.ensure(effects.names)

    def settle(self, flight: Flight) -> None:
        """As :meth:`settle_row`, for a row of a flow."""
        batch = Batch([flight.sender])
        batch.rows = [flight.value]
        batch.contexts = [flight.context] if flight.context is not None else None
        if self._tables is not None:
            self.settle_row(batch, 0, self._tables, self._clock.now_ms())
        flight.value = batch.rows[0]

    async def ensure(self, topics: frozenset[str]) -> None:
        """Look topics up that rows are emitted to."""
        await self._catalog.ensure(topics)

    def bury(self, record: Record, failure: Failure) -> Effects:
        """The effects of a record that is not run."""
        effects = Effects()
        effects.rows = 1
        self._bury(effects, record, failure)
        rebuild = self._rebuild()
        if rebuild is not None and rebuild.is_silent(record.offset):
            effects.silence()
        return effects

    def settle_row(self, batch: Batch, place: int, into: Layer, now_ms: int) -> None:
        """Let a row that is through the chain write to its tables, or make it a failure.

        Its records are made first: what cannot be written as a result must leave nothing in a table.

        Raises:
            UnknownTopicsError: look these up and try again.
        """
        context, outcome = batch.contexts[place] if batch.contexts else None, batch.rows[place]
        if context is None or not context.operations or context.placed or isinstance(outcome, Failure):
            return
        record = batch.records[place]
        try:
            placed: Placed | bytes | None = self._plain_value(record, outcome, context, now_ms)
            if placed is None:
                placed = self._placed(record, outcome, context)
            into.settle(context.operations)
        except TableUpdateError as error:
            batch.rows[place] = Failure(TABLES_STAGE, "table_update", str(error))
        except BadRowError as error:
            batch.rows[place] = Failure(OUTPUT_STAGE, error.kind, str(error))
        except (TopicError, ConfigError) as error:
            batch.rows[place] = Failure(OUTPUT_STAGE, "topic_refused", str(error))
        except ArtifactError as error:
            batch.rows[place] = Failure(OUTPUT_STAGE, error.kind, str(error))
        else:
            context.placed = placed
            if self._tables is not None and self._tables.expires:
                self._tables.pass_time(min(record.timestamp, now_ms))

    def _plain_value(self, record: Record, outcome: Outcome, context: RowContext, now_ms: int) -> bytes | None:
        """The encoded result of most rows that write to tables; None for those that :meth:`_encode_plain` is not for.

        Raises:
            BadRowError: it cannot be written as JSON.
        """
        if not self._is_plain or outcome.__class__ is not dict or not _is_plain(record, outcome, context, now_ms):
            return None
        value = encode(outcome)
        return value if len(value) + len(record.key or b"") <= self._plain_limit else None

    def _settle_and_encode(self, batch: Batch, lot: _Lot | None) -> _Work:
        while True:
            try:
                if lot is not None:
                    lot.settle(len(batch.records))
                effects = self._encode(batch)
            except UnknownTopicsError as unknown:
                effects = unknown
            if isinstance(effects, Effects):
                break
            yield effects.names
        # Contexts refer to the lot, which refers to its batch: without this cut all rows of a lot would be left to the
        # garbage collector, which took half of a stateful job's time.
        batch.contexts = None
        return effects

    def look_up(self, names: frozenset[str], loop: asyncio.AbstractEventLoop) -> None:
        """Look topics up from a thread, while its lot cannot go on without.

        Raises:
            _InterruptedError: the broker does not answer.
        """
        try:
            asyncio.run_coroutine_threadsafe(self._catalog.ensure(names), loop).result()
        except Exception as error:
            raise _InterruptedError(error) from error

    # --- in --------------------------------------------------------------------------------------------------

    def decode(self, batch: Batch, lot: _Lot | None = None) -> None:
        """Fill in rows, or failures for records that are none, and contexts where the chain wants them."""
        pipeline = self._pipeline
        text_keys = pipeline.keys == "text"
        rows: Sequence[Outcome] | None = None
        if pipeline.input is None and _are_ordinary(batch, text_keys):
            rows = decode_all([record.value for record in batch.records], pipeline.max_row_bytes, pipeline.max_depth)
        batch.rows = self._decode_each(batch.records, text_keys) if rows is None else list(rows)
        if self._chain.takes_context:
            batch.contexts = [
                self._context(record, text_keys, self._opener(record, place, lot) if self._tables else None)
                for place, record in enumerate(batch.records)
            ]
            if self._traced_rows is not None:
                for context, record in zip(batch.contexts, batch.records, strict=True):
                    self._traced_rows.begin(context, record)

    def _decode_each(self, records: Sequence[Record], text_keys: bool) -> list[Outcome]:
        """One after the other: which of them is no row, and why."""
        max_bytes, max_depth = self._pipeline.max_row_bytes, self._pipeline.max_depth
        check, marked = self._pipeline.input, self._session.owns_source
        rows: list[Outcome] = []
        for record in records:
            try:
                if record.key is not None and text_keys and not record.key.isascii():
                    _check_utf8("key", record.key)
                if record.headers:
                    _check_headers(record.headers, marked)
                row = decode(record.value, max_bytes, max_depth)
                rows.append(row if check is None else check.check(row))
            except BadRowError as error:
                rows.append(Failure(INPUT_STAGE, error.kind, str(error)))
        return rows

    def _opener(self, record: Record, place: int, lot: _Lot | None) -> TablesOpener:
        return partial(lot.view, place) if lot else partial(self.view, record)

    def view(self, record: Record, _: object = None) -> RowTables:
        """A row's tables. What it writes is as old as the row, unless that is in the future."""
        assert self._tables is not None  # noqa: S101 - only asked for where the pipeline has tables
        return RowTables(self._tables.specs, self._tables, min(record.timestamp, self._clock.now_ms()))

    def now_ms(self) -> int:
        """The present."""
        return self._clock.now_ms()

    def _context(self, record: Record, text_keys: bool, open_tables: TablesOpener | None) -> RowContext:
        key: str | bytes | None = record.key
        if text_keys and record.key is not None:
            key = record.key.decode("utf-8", "replace")  # a bad key's row runs through no stage
        context = RowContext(
            *self._tp,
            record.offset,
            record.timestamp,
            key,
            foreign(record.headers),
            self._session.id,
            open_tables,
            self._runtime,
        )
        if self._pipeline.kept_log:
            context.lines = LogLines(self._pipeline.kept_log)
        return context

    # --- out -------------------------------------------------------------------------------------------------

    def _encode(self, batch: Batch) -> Effects | UnknownTopicsError:
        """The effects of a batch that ran; or the topics that have to be looked up before they can be told."""
        rebuild = self._rebuild()
        if rebuild is None:
            return self._encode_aloud(batch)
        parts: tuple[list[int], list[int]] = ([], [])
        for place, record in enumerate(batch.records):
            parts[rebuild.is_silent(record.offset)].append(place)
        aloud, silent = (self._encode_aloud(batch.part(places)) for places in parts)
        if isinstance(aloud, UnknownTopicsError):
            return aloud
        if isinstance(silent, Effects):
            silent.silence()
            silent.merge(aloud)
        return silent

    def _encode_aloud(self, batch: Batch) -> Effects | UnknownTopicsError:
        """All of a batch's effects.

        The second half of the hot path: rows with one result or none, no headers, and nothing that their handlers asked
        of a context go through it in runs, as long as there are, and the others between them one by one.
        """
        effects = Effects()
        effects.rows = len(batch.records)
        records, rows, contexts = batch.records, batch.rows, batch.contexts
        whole = slice(0, len(records))
        spans = _spans(batch, self._clock.now_ms()) if self._is_plain else ((False, whole),)
        try:
            for is_plain, span in spans:
                if is_plain and self._encode_plain(
                    effects, batch if span == whole else batch.part(range(span.start, span.stop))
                ):
                    continue
                for place in range(span.start, span.stop):
                    self._encode_row(effects, records[place], rows[place], contexts[place] if contexts else None)
        except UnknownTopicsError as unknown:
            return unknown
        return effects

    def _encode_plain(self, effects: Effects, batch: Batch) -> bool:
        """Rows with a result each, or none, all at once; False, and nothing done, if one cannot be written."""
        kept = (
            batch if all_dicts(batch.rows) else batch.part([i for i, row in enumerate(batch.rows) if row is not None])
        )
        try:
            values = _values_of(kept)
        except BadRowError:
            return False
        keys = [record.key for record in kept.records]
        if max(map(len, values), default=0) + max(map(len, filter(None, keys)), default=0) > self._plain_limit:
            return False
        if values:
            outbox = self._outbox(effects, TopicPartition(self._sink, self._tp.partition))
            timestamps = [record.timestamp for record in kept.records]
            outbox.extend_plain(keys, values, timestamps, [record.offset for record in kept.records])
        effects.results += len(values)
        effects.dropped += len(batch.records) - len(values)
        return True

    def _outbox(self, effects: Effects, target: TopicPartition) -> Outbox:
        outbox = effects.outputs.get(target)
        if outbox is None:
            outbox = effects.outputs[target] = Outbox(self._source_prefix, self._session_header)
        return outbox

    def _encode_row(self, effects: Effects, record: Record, outcome: Outcome, context: RowContext | None) -> None:
        """Any row: its results and side outputs together, or its dead letter. What it cost counts in any case."""
        placed: Placed | None = context.placed if context and context.placed.__class__ is Placed else None
        if placed is None:
            placed = self._place_or_bury(effects, record, outcome, context)
        if placed is not None:
            for target, out in placed.records:
                self._outbox(effects, target).append(out)
            effects.results += placed.results
            effects.emitted += placed.emitted
            effects.dropped += not placed.results
            effects.defaulted += bool(placed.results and context is not None and context.is_defaulted)
        if context is not None and (context.cost or context.tokens):
            effects.cost = sum_costs(effects.cost, context.cost)
            effects.tokens += context.tokens

    def _place_or_bury(
        self, effects: Effects, record: Record, outcome: Outcome, context: RowContext | None
    ) -> Placed | None:
        if isinstance(outcome, Failure) and (outcome.kind != "null_value" or self._pipeline.tombstones != "forward"):
            if outcome.then == "skip":
                effects.skipped += 1
                effects.failures.append((record, outcome))
                log.info("%s/%d: skipped: stage %r: %s", self._tp, record.offset, outcome.stage, outcome.message)
            else:
                self._bury(effects, record, outcome, lines_of(context) if context is not None else "")
            return None
        try:
            return self._placed(record, outcome, context)
        except BadRowError as error:
            self._bury(effects, record, Failure(OUTPUT_STAGE, error.kind, str(error)))
        except (TopicError, ConfigError) as error:
            self._bury(effects, record, Failure(OUTPUT_STAGE, "topic_refused", str(error)))
        except ArtifactError as error:
            self._bury(effects, record, Failure(OUTPUT_STAGE, error.kind, str(error)))
        return None

    def _placed(self, record: Record, outcome: Outcome, context: RowContext | None) -> Placed:
        results = outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]
        emitted = context.emitted if context else []
        records = [self._result(record, context, ordinal, row) for ordinal, row in enumerate(results)]
        records += [self._emit(record, emit, len(results) + i) for i, emit in enumerate(emitted)]
        return Placed(len(results), len(emitted), records)

    def _result(
        self, record: Record, context: RowContext | None, ordinal: int, row: object
    ) -> tuple[TopicPartition, Outgoing]:
        key, timestamp, headers = record.key, record.timestamp, foreign(record.headers)
        if context is not None:
            key = context.key.encode() if isinstance(context.key, str) else context.key
            headers = context.headers
            if context.timestamp != record.timestamp:
                timestamp = _checked_timestamp(context.timestamp, self._clock.now_ms())
        value = None if isinstance(row, Failure) else self._encoded(row)  # the only failure is a forwarded tombstone
        return self._place(self._sink, record, Outgoing(key, value, timestamp, headers), ordinal)

    def _encoded(self, row: Any) -> bytes:
        """A result as JSON: it fits the schema, and what is too large in it lies elsewhere."""
        if self._pipeline.output is not None:
            self._pipeline.output.check(row)
        return encode(self._lightened(row))

    def _lightened(self, row: Any) -> Any:
        store = self._runtime.artifacts
        return row if store is None else materialize(row, self._pipeline.artifact_limit, store)

    def _emit(self, record: Record, emit: Emit, ordinal: int) -> tuple[TopicPartition, Outgoing]:
        if emit.topic.startswith(RESERVED_PREFIX):
            raise TopicError(f"topic {emit.topic!r}: topics that begin with {RESERVED_PREFIX!r} are rowmill's own")
        topic = self._session.output(emit.topic)
        if topic == self._session.dead_letters:
            raise TopicError(f"topic {emit.topic!r} is where dead letters go; to make one of a row, raise an error")
        out = Outgoing(emit.key, encode(self._lightened(emit.row)), record.timestamp, emit.headers)
        return self._place(topic, record, out, ordinal)

    def _place(self, topic: str, record: Record, out: Outgoing, ordinal: int) -> tuple[TopicPartition, Outgoing]:
        """Choose the partition and add the headers that tell where a record came from."""
        partitions = self._catalog.partitions(topic)
        if topic == self._sink and self._same_partitions and out.key == record.key:
            partition = self._tp.partition
        elif out.key is None:
            partition = self._tp.partition % partitions
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

    def _bury(self, effects: Effects, record: Record, failure: Failure, lines: str = "") -> None:
        room = self._catalog.limit(self._session.dead_letters)
        connect = self._pipeline.name if self._pipeline.dead_letter_headers == "connect" else None
        letter = dead_letter(self._tp, record, failure, self._session.id, room, connect=connect, lines=lines)
        letter = letter._replace(timestamp=min(letter.timestamp, self._clock.now_ms()))
        self._outbox(effects, self._dead_letters).append(letter)
        effects.dead_letters += 1
        effects.failures.append((record, failure))


class _Lot:
    """What the rows of one lot write to tables, while it runs on a thread.

    Where each row runs through the whole chain before the next one, a row reads what those before it wrote: they
    are settled when it first looks. In other chains the rows of a lot are concurrent: none sees another's writes.
    """

    def __init__(
        self,
        processor: Processor,
        batch: Batch,
        specs: Mapping[str, TableSpec],
        layer: Layer,
        loop: asyncio.AbstractEventLoop,
        row_by_row: bool,
    ) -> None:
        self._processor = processor
        self._batch = batch
        self._row_by_row = row_by_row
        self._loop = loop
        self._settled = 0
        self._specs = specs
        self._now_ms = processor.now_ms()  # once: rows of the future are no newer than the moment when they are begun
        self.layer = layer

    def view(self, place: int, _: object) -> RowTables:
        """The tables of the row at that place."""
        while self._row_by_row:
            try:
                self.settle(place)
                break
            except UnknownTopicsError as unknown:
                self._processor.look_up(unknown.names, self._loop)
        return RowTables(self._specs, self.layer, min(self._batch.records[place].timestamp, self._now_ms))

    def settle(self, until: int) -> None:
        """Settle the rows before that place."""
        while self._settled < until:
            self._processor.settle_row(self._batch, self._settled, self.layer, self._now_ms)
            self._settled += 1


_headers_of = attrgetter("headers")
_placed_of = attrgetter("placed")
_timestamp_of = attrgetter("timestamp")
_ONE_OR_NONE = {dict, type(None)}


def _spans(batch: Batch, now_ms: int) -> list[tuple[bool, slice]]:
    """The batch in stretches of rows that are plain, or are not. Almost always, all of it is one."""
    records, rows, contexts = batch.records, batch.rows, batch.contexts
    if contexts is not None and set(map(type, map(_placed_of, contexts))) == {bytes}:
        return [(True, slice(0, len(records)))]  # that was looked at when they were settled
    is_bare = contexts is None and not batch.has_headers and set(map(type, rows)) <= _ONE_OR_NONE
    if is_bare and max(map(_timestamp_of, records), default=0) <= now_ms:
        return [(True, slice(0, len(records)))]
    spans, start = [], 0
    plain = map(_is_plain, records, rows, contexts or repeat(None), repeat(now_ms))
    for is_plain, stretch in groupby(plain):
        end = start + sum(1 for _ in stretch)
        spans.append((is_plain, slice(start, end)))
        start = end
    return spans


def _is_plain(record: Record, outcome: Outcome, context: RowContext | None, now_ms: int) -> bool:
    """Whether a row has one result or none, of the same key and time, and nothing else shows of it outside."""
    return (
        outcome.__class__ in _ONE_OR_NONE
        and not record.headers
        and record.timestamp <= now_ms
        and (context is None or context.placed.__class__ is bytes or context.is_bare(record.timestamp))
    )


def _values_of(batch: Batch) -> list[bytes]:
    """The results of plain rows; those of rows that wrote to tables were encoded when they were settled."""
    if batch.contexts is None or not any(map(_placed_of, batch.contexts)):
        return encode_all(batch.rows)
    return [context.placed or encode(row) for row, context in zip(batch.rows, batch.contexts, strict=True)]


def _are_ordinary(batch: Batch, text_keys: bool) -> bool:
    """Whether keys and headers need no look one by one."""
    if batch.has_headers:
        return False
    return not text_keys or b"".join([record.key for record in batch.records if record.key]).isascii()


def _check_headers(headers: Sequence[Header], marked: bool) -> None:
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
