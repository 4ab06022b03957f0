"""What a partition remembers: tables, context and checkpoint record, as its changelog topic carries them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from ..handlers.executors import BlockingPool
from ..state.checkpoint import CHECKPOINT_KEY, CheckpointRecord, crc_of
from ..state.clock import Clock
from ..state.context import ExecutionContext
from ..state.model import Committed, Outgoing, Record, TopicPartition
from ..state.store import Store, StoreError, Stores
from ..state.table import Stamped, TableSpec, restamp
from ..state.tables import Layer, PartitionTables
from .brokers.base import Broker
from .contexts import new_context
from .errors import CheckpointError
from .options import WorkerOptions
from .processing import Effects
from .rebuild import Rebuild, rebuild_of
from .restore import ChangelogReader, last_checkpoint
from .session import Session
from .transaction import CheckpointMovedError, read_checkpoint

log = logging.getLogger(__name__)

TOMBSTONES_MS = 24 * 3_600_000
"""How long a compacted topic keeps deletions: a store that was away for longer may have missed some."""
CHANGELOG_CONFIG = {
    "cleanup.policy": "compact",
    "delete.retention.ms": str(TOMBSTONES_MS),
    "message.timestamp.type": "CreateTime",
}
"""What changelog topics are made with. A record's timestamp is its entry's: time to live counts from it."""


_LONG_RESTORE_SECONDS = 5.0
"""After which a restore notes what it is of, so that it can go on if it is cut off. To find that out takes a look at
the changelog's end, which a shorter one is not worth."""

_COUNTS = ("rows", "results", "dropped", "skipped", "defaulted", "dead_letters", "emitted")


class PartitionState:
    """One partition's memory during one assignment.

    Args:
        broker: where the changelog is.
        session: names.
        tp: the source's partition.
        specs: the pipeline's tables.
        stores: where they are kept; None for pipelines without any.
        options: time limits.
        pool: threads for writing to the store.
        clock: time.
        owner: a name of this process: what it did itself is no death.
    """

    def __init__(
        self,
        broker: Broker,
        session: Session,
        tp: TopicPartition,
        specs: Mapping[str, TableSpec],
        stores: Stores | None,
        options: WorkerOptions,
        pool: BlockingPool,
        clock: Clock,
        owner: str,
    ) -> None:
        self._owner = owner
        self._generation = clock.token()
        self.changelog = TopicPartition(session.changelog(tp.topic), tp.partition)
        self._broker = broker
        self._session = session
        self._tp = tp
        self._specs = specs
        self._stores = stores
        self._options = options
        self._pool = pool
        self._clock = clock
        self._tables: PartitionTables | None = None
        self.counts: dict[str, int] = dict.fromkeys(_COUNTS, 0)
        self.context = new_context(session, clock)
        self.rebuild: Rebuild | None = None
        """Which rows keep silent, while tables are made again."""
        self._silent_failures = 0
        self.starts: dict[int, int] = {}
        self._begun: set[int] = set()  # those of them that this task has begun
        self.witness: tuple[int, int] | None = None
        self.died = False
        """Whether the last task of this partition ended without saying so."""
        self._stopped = True
        self._last_record = b""
        self._known_record: bytes | None = None  # the newest that is surely in the changelog

    @property
    def tables(self) -> PartitionTables | None:
        """The tables, where the pipeline has any."""
        return self._tables

    @property
    def store_failure(self) -> StoreError | None:
        """What a read of the store met, also if a handler hid it."""
        return self._tables.failure if self._tables is not None else None

    # --- opening -----------------------------------------------------------------------------------------------

    async def open(self, committed: Committed | None) -> None:
        """Restore, and compare what the changelog knows with what the group committed.

        Raises:
            CheckpointError: the changelog knows a checkpoint that the group forgot, or the source was made anew.
            StoreError: the store is no good; set aside what is damaged, and open again.
            BrokerError: the broker does not answer.
        """
        reader = ChangelogReader(self._broker, self.changelog, self._tp, self._options.broker_timeout, self._clock)
        try:
            await reader.open()
            record = await self._restore(reader, committed)
            self._check(record, committed)
            if record is not None and record.witness is not None and committed is not None:
                await self._check_source(reader, *record.witness)
        except CheckpointError as error:
            await self._check_still(committed, error)
            raise
        finally:
            await reader.close()
        if record is not None:
            self._go_on_from(record)

    async def _check_still(self, committed: Committed | None, error: CheckpointError) -> None:
        """Who stood still between reading the offset and reading the changelog compares two different times.

        Raises:
            CheckpointMovedError: the group has committed meanwhile: another owner is at it, begin again.
        """
        timeout = self._options.broker_timeout
        present = await read_checkpoint(self._broker, self._session.group, self._tp, timeout)
        if present != committed:
            raise CheckpointMovedError(f"{self._tp}: committed at {committed}, now at {present}") from error

    async def _restore(self, reader: ChangelogReader, committed: Committed | None) -> CheckpointRecord | None:
        """The changelog's last checkpoint; tables, where there are any, are brought up to it."""
        if not self._specs or self._stores is None:
            return await reader.last_checkpoint()
        position = await self._open_store()
        record = None
        if position is not None:
            record = await reader.last_checkpoint()
            why = self._misfit(reader, position, record, committed)
            if why is not None:
                log.warning("%s: restoring all of the local tables: %s", self._tp, why)
                await self._wipe()
                position = await self._open_store()
        await self._restore_tables(reader, position, "" if record is None else record.generation)
        return self._stored_record()

    def _misfit(
        self,
        reader: ChangelogReader,
        position: int,
        record: CheckpointRecord | None,
        committed: Committed | None,
    ) -> str | None:
        """Why a store that is not empty does not belong to this changelog, if so.

        Raises:
            CheckpointError: there is no changelog that it could belong to.
        """
        stored = self._stored_record()
        if stored is None:
            return self._misfit_of_a_part(reader, position, record)
        if record is None:
            if committed is not None:
                raise CheckpointError(
                    f"the changelog {self.changelog.topic} of {self._tp} has nothing in it, but the tables on this "
                    f"disk and the group know a checkpoint at {committed.offset:,}: it was deleted. Put it back from "
                    f"a replica or a backup; or, to begin anew, delete the group {self._session.group}"
                )
            return "the changelog is empty"
        reasons = {
            "the tables were reset, or the changelog made anew, since": stored.generation != record.generation,
            f"they stand at {position:,}, outside the changelog ({reader.start:,} to {reader.end:,})": (
                not reader.start <= position <= reader.end
            ),
            "the broker lost its newest transactions": _rows_run(stored) > _rows_run(record),
            "they do not end as the changelog does": position == reader.end and stored.encode() != record.encode(),
        }
        return next((why for why, applies in reasons.items() if applies), None)

    def _misfit_of_a_part(self, reader: ChangelogReader, position: int, record: CheckpointRecord | None) -> str | None:
        """Why a restore that was cut off cannot be gone on with, if so.

        In a compacted changelog the one checkpoint is near the end, so that a part of it knows none: what the part is
        of was noted when the restore began.
        """
        restoring = self._tables.about.get("restoring") if self._tables is not None else None
        if record is None or restoring != record.generation or not reader.start <= position <= reader.end:
            return "they know of no checkpoint"
        log.info("%s: a restore that was cut off goes on at %d of %d", self._tp, position, reader.end)
        return None

    async def _restore_tables(self, reader: ChangelogReader, position: int | None, generation: str) -> None:
        """Bring the store up to the changelog's end, from where it stands; None: it is new.

        Its position is known from then on, also where nobody tells that of later writes (at least once): a store
        without one cannot be compared with its changelog.
        """
        tables = self._tables
        assert tables is not None  # noqa: S101 - just opened

        began = self._clock.monotonic()

        async def load(records: Sequence[Record], behind: int) -> None:
            nonlocal generation
            await self._pool.run(tables.load, records, behind)
            if not generation and self._clock.monotonic() - began > _LONG_RESTORE_SECONDS:
                generation = await self._present_generation()
                await self._pool.run(tables.describe, self._clock.now_ms(), generation)

        # First: a store without a date is not believed.
        await self._pool.run(tables.describe, self._clock.now_ms(), generation)
        begin = reader.start if position is None else position
        if begin < reader.end:
            await reader.restore(begin, load)
        elif position is None:
            await load((), begin)

    async def _present_generation(self) -> str:
        """Of the changelog as it is now."""
        record = await last_checkpoint(
            self._broker, self.changelog, self._tp, self._options.broker_timeout, self._clock
        )
        return "unknown" if record is None else record.generation

    async def _open_store(self) -> int | None:
        """Open the partition's store; its position, None for one without content that counts."""
        assert self._stores is not None  # noqa: S101 - there are tables
        opening = asyncio.ensure_future(self._pool.run(self._stores.open, self._session.group, self._tp))
        try:
            store = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread goes on: what it opens must not stay open
            opening.add_done_callback(_close_orphan)
            raise
        stores = self._stores
        self._tables = tables = PartitionTables(store, self._specs, lambda: stores.recent_bytes)
        about, position = tables.about, tables.position
        mortal = {name: spec.ttl_ms for name, spec in self._specs.items() if spec.ttl_ms is not None}
        if position is None and not about:
            return None
        if position is None:
            why = "nobody knows where they stand"
        elif about.get("ttl_ms") != mortal:
            why = "a table's ttl was changed"
        elif self._clock.now_ms() - int(str(about.get("used_ms", 0))) > TOMBSTONES_MS:
            why = "they were last in use more than a day ago, and may have missed deletions"
        else:
            return position
        log.info("%s: restoring all of the local tables: %s", self._tp, why)
        await self._wipe()
        return await self._open_store()

    async def _wipe(self) -> None:
        """Delete the store: it costs a restore."""
        assert self._stores is not None  # noqa: S101 - there are tables
        await self.close()
        await self._pool.run(self._stores.remove, self._session.group, self._tp)

    def _stored_record(self) -> CheckpointRecord | None:
        """The last checkpoint that the local store knows of."""
        raw = self._tables.own(CHECKPOINT_KEY) if self._tables else None
        return None if raw is None else CheckpointRecord.decode(raw)

    def _check(self, record: CheckpointRecord | None, committed: Committed | None) -> None:
        if committed is None and record is not None:
            raise CheckpointError(
                f"group {self._session.group} has no committed offset for {self._tp}, but its changelog "
                f"{self.changelog.topic} knows a checkpoint at {record.offset:,}: the offsets expired (Kafka drops "
                "those of a group that was away for a week), or they or the source were deleted. Starting over "
                "silently would run every row again. To go on there: "
                f"{self._session.way_to_move(self._tp, f'--to-offset {record.offset}')}; or delete the changelog topic "
                "to begin anew"
            )
        if committed is not None and record is None:
            log.debug("%s: committed at %d, and its changelog is empty", self._tp, committed.offset)
        elif committed is not None and record is not None and not record.agrees_with(committed):
            # At least once, the one is written before the other.
            level = logging.WARNING if self._options.guarantee == "exactly_once" else logging.DEBUG
            log.log(
                level,
                "%s: the group's offset was moved from outside, from %d to %d; tables stay as they are",
                self._tp, record.offset, committed.offset,
            )  # fmt: skip

    async def _check_source(self, reader: ChangelogReader, offset: int, timestamp: int) -> None:
        """A topic that was deleted and made anew begins again at 0, and has other rows where it had some.

        aiokafka knows no topic ids. What tells is the record that stood at the highest offset taken: if there is
        one at that very offset now, it has the same timestamp, or it is another topic's.
        """
        present = await reader.record_at(offset)
        if present is not None and present.timestamp != timestamp:
            raise CheckpointError(
                f"{self._tp}: the record at offset {offset:,} is not the one that was processed there (timestamp "
                f"{present.timestamp}, then {timestamp}): the topic was deleted and made anew. Its old position means "
                f"nothing: with the workers stopped, delete the group {self._session.group} and the topic "
                f"{self.changelog.topic} to begin with the new rows, or run them as another session"
            )

    def _go_on_from(self, record: CheckpointRecord) -> None:
        self._known_record = record.encode()
        self.counts |= record.counts
        self.context = ExecutionContext.from_checkpoint(record.context)
        self.starts = dict(record.starts)
        self.witness = record.witness
        self.rebuild = rebuild_of(record)
        if self.rebuild is not None:
            log.info("%s: tables are made again: rows before %d give no results", self._tp, self.rebuild.end)
        self._stopped = record.stopped
        self._generation = record.generation
        self.died = not record.stopped and record.owner != self._owner

    # --- commits -----------------------------------------------------------------------------------------------

    def take(self) -> dict[bytes, Stamped | None]:
        """What is pending in the tables: in the same moment in which the checkpoint is taken.

        Raises:
            StoreError: as :meth:`check`.
        """
        self.check()
        return {} if self._tables is None else self._tables.take()

    def check(self) -> None:
        """Before results of rows leave this process, by whatever way.

        Raises:
            StoreError: some row read from a store that failed, whether or not its handler let that show.
        """
        if self._tables is not None and self._tables.failure is not None:
            raise self._tables.failure

    def note_starts(self, records: Sequence[Record]) -> None:
        """These rows begin."""
        for record in records:
            self.starts[record.offset] = self.starts.get(record.offset, 0) + 1
            self._begun.add(record.offset)

    def forget_starts(self, records: Sequence[Record]) -> None:
        """These rows survived."""
        if self.starts:
            for record in records:
                self.starts.pop(record.offset, None)
                self._begun.discard(record.offset)

    def take_back_starts(self, records: Sequence[Record]) -> None:
        """These rows are given back: this time they have killed nobody; what they did before stands."""
        for record in records:
            if record.offset in self._begun:
                self._begun.discard(record.offset)
                left = self.starts.pop(record.offset) - 1
                if left:
                    self.starts[record.offset] = left

    def _starts_as_told(self, *, stopped: bool) -> dict[int, int]:
        """What the changelog is told: in an orderly end, rows that are left in work have killed nobody this time."""
        if not stopped:
            return dict(self.starts)
        told = {offset: count - (offset in self._begun) for offset, count in self.starts.items()}
        return {offset: count for offset, count in told.items() if count}

    def absorb(self, layer: Layer | None) -> None:
        """A lot is done: what its rows wrote counts."""
        if layer is not None and self._tables is not None:
            self._tables.absorb(layer)

    @property
    def says_stopped(self) -> bool:
        """Whether the last record says that the task ended in order."""
        return self._stopped

    def saw(self, offset: int, timestamp: int) -> None:
        """A record was taken: the highest one identifies the topic."""
        if self.witness is None or offset > self.witness[0]:
            self.witness = (offset, timestamp)

    def records(
        self, taken: dict[bytes, Stamped | None], effects: Effects, checkpoint: Committed, *, stopped: bool
    ) -> list[Outgoing]:
        """The changelog records of a commit: what was taken, and the checkpoint with the new context."""
        self._count(effects)
        self._stopped = stopped
        if self.rebuild is not None and checkpoint.offset >= self.rebuild.end:
            self._end_rebuild(self.rebuild)
        self.starts = {offset: count for offset, count in self.starts.items() if offset >= checkpoint.offset}
        record = CheckpointRecord(
            checkpoint.offset,
            crc_of(checkpoint),
            stopped,
            self.witness,
            self.counts,
            self.context.to_checkpoint(),
            self._starts_as_told(stopped=stopped),
            self._owner,
            self._generation,
            *(self.rebuild.stood if self.rebuild is not None else ()),
        )
        now = self._clock.now_ms()
        self._last_record = record.encode()
        taken[CHECKPOINT_KEY] = restamp(self._last_record, now)
        return PartitionTables.records(taken, now)

    def _end_rebuild(self, rebuild: Rebuild) -> None:
        log.info("%s: tables are made again, up to %d; rows give results from here on", self._tp, rebuild.end)
        if self._silent_failures:
            log.warning(
                "%s: %d rows failed in that, and wrote nothing; they are no dead letters once more",
                self._tp, self._silent_failures,
            )  # fmt: skip
        self.rebuild = None

    async def last_was_ours(self) -> bool | None:
        """Whether the changelog's newest checkpoint record is the one that :meth:`records` made last.

        False: it is the one before, of the last commit that surely succeeded. None: it is neither, so somebody else's.
        A record carries its process's name and all counts, so an equal one is the same one.
        """
        timeout = self._options.broker_timeout
        found = await last_checkpoint(self._broker, self.changelog, self._tp, timeout, self._clock)
        present = None if found is None else found.encode()
        if present == self._last_record:
            return True
        return False if present == self._known_record else None

    def _count(self, effects: Effects) -> None:
        counts = self.counts
        rows = effects.rows - effects.rebuilt
        counts["rows"] += rows
        if effects.rebuilt:
            counts["rebuilt"] = counts.get("rebuilt", 0) + effects.rebuilt
            self._silent_failures += effects.rebuilt_failed
        counts["results"] += effects.results
        counts["dropped"] += effects.dropped
        counts["skipped"] += effects.skipped
        counts["defaulted"] += effects.defaulted
        counts["dead_letters"] += effects.dead_letters
        counts["emitted"] += effects.emitted
        context = self.context
        context.processed_rows += rows - effects.dropped - effects.skipped - effects.dead_letters
        context.dropped_rows += effects.dropped
        context.skipped_rows += effects.skipped
        context.defaulted_rows += effects.defaulted
        context.failed_rows += effects.dead_letters
        if self.witness is not None:
            context.last_processed_row = self.witness[0]
        if effects.cost or effects.tokens:
            context.add_cost(effects.cost, effects.tokens)

    async def written(self, position: int | None) -> None:
        """The commit succeeded: now, and not before, the store may have it."""
        self._known_record = self._last_record
        if self._tables is not None:
            await self._pool.run(self._tables.written, position, self._clock.now_ms())
            self._tables.forget_taken()

    async def close(self) -> None:
        """Let go of the store."""
        tables = self._tables
        if tables is not None:
            await self._pool.run(tables.close)
            self._tables = None  # only now: cancelled meanwhile, the next close finds it still


def _rows_run(record: CheckpointRecord) -> int:
    return record.counts["rows"] + record.counts.get("rebuilt", 0)


def _close_orphan(opening: asyncio.Future[Store]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
