"""The embedded broker's file: what is in it, and every statement that touches it. Knows no event loop.

One SQLite database in WAL mode. Each :class:`LogStore` owns one connection and is used from one thread: a
broker has one that writes and one that reads, so that a long read never holds up a commit. Everything a
transaction of rowmill's does is one SQLite transaction; there is no other state, so that a killed process
leaves nothing to repair.
"""

from __future__ import annotations

import os
import sqlite3  # noqa: TID251 - the one adapter
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

from ...state import codec
from ...state.errors import ConfigError, RowmillError
from ...state.model import Committed, TopicPartition
from ..errors import (
    BrokerError,
    BrokerTimeoutError,
    BrokerUnreachableError,
    FencedError,
    OffsetOutOfRangeError,
    TopicError,
)
from .base import Moment
from .local_batch import HEAD_BYTES, Batch, DamagedBatchError, first_at
from .local_schema import (
    AFTER_REWRITE,
    APPEND,
    BATCH_BEFORE,
    COMMIT_OFFSET,
    HEADS,
    JOINED,
    LOGS_TO_COMPACT,
    MARK_CLEAN,
    REACH,
    SCHEMA,
    SCHEMA_VERSION,
    SHIFT,
    UPGRADE,
)

T = TypeVar("T")

FILE_NAME = "rowmill.db"
SQLITE_VERSION = sqlite3.sqlite_version

_FETCH_BYTES = 16 << 20
_WAL_BYTES = 16 << 20
_SHRINK_PAGES = 1024
_SHRINK_BYTES = 64 << 20
_FRONT = 64
"""Batches looked at, and at most dropped, in one transaction of a trim: writers wait no longer than for that."""


class StoreOptions(NamedTuple):
    """See :class:`rowmill.streams.brokers.local.LocalBroker`, whose options these are."""

    folder: Path
    synchronous: str
    max_bytes: int | None
    lock_timeout: float


class StoredTopic(NamedTuple):
    """A topic as it stands in the file."""

    name: str
    partitions: int
    config: dict[str, str]


class ReadPlan(NamedTuple):
    """What a reader wants of one partition: records from ``offset`` on, of the log numbered ``log``."""

    tp: TopicPartition
    log: int
    offset: int


class Piece(NamedTuple):
    """What it gets: encoded batches that cover the offsets from ``base`` (at or before the wish) up to ``end``."""

    tp: TopicPartition
    base: int
    end: int
    data: bytes


class Retention(NamedTuple):
    """How long one log keeps its records; None is for ever."""

    log: int
    max_age_ms: int | None
    max_bytes: int | None


class LogToCompact(NamedTuple):
    """A log to be compacted: it is compacted below ``clean``, and the newest batch begins at ``active``."""

    tp: TopicPartition
    log: int
    start: int
    clean: int
    active: int


class Rewrite(NamedTuple):
    """What compaction puts in the place of a log's batches from ``base`` to ``end``, if they have these heads still.

    ``latest`` is the latest time before them. Each batch comes with its own base.
    """

    log: int
    base: int
    end: int
    heads: bytes
    latest: int
    batches: Sequence[tuple[int, Batch]]


class Write(NamedTuple):
    """Encoded batches for one partition."""

    tp: TopicPartition
    batches: Sequence[Batch]


class LogStore:
    """One connection. Not for two threads; ``call`` is the way in."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self._connection: sqlite3.Connection | None = None

    def call(self, method: Callable[..., T], *args: Any) -> T:
        """Run one of this object's methods; SQLite's errors come out as ours."""
        try:
            return method(*args)
        except sqlite3.Error as error:
            raise self._translated(error) from error

    # -- opening and closing ---------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, and make the file if there is none."""
        folder = self._options.folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_private(folder / FILE_NAME)
        except OSError as error:
            raise BrokerUnreachableError(
                f"cannot use the folder {folder}: {error.strerror}; name one that you may write to"
            ) from error
        try:
            self._connection = self._connect(folder / FILE_NAME)
            self._make_schema()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect; the last one to do so tidies the write-ahead log away."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connect(self, file: Path) -> sqlite3.Connection:
        timeout = self._options.lock_timeout
        connection = sqlite3.connect(file, timeout=timeout, isolation_level=None, cached_statements=64)
        try:
            _enter_wal_mode(connection, timeout)
            page_size = _one(connection, "PRAGMA page_size")
            connection.execute(f"PRAGMA synchronous = {self._options.synchronous}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_BYTES // page_size}")
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_schema(self) -> None:
        db = self._db
        self._check_version()
        if _one(db, "PRAGMA user_version") < SCHEMA_VERSION:
            with self._writing():
                found = _one(db, "PRAGMA user_version")  # somebody else may have been faster
                if found < SCHEMA_VERSION:
                    for statement in _statements(UPGRADE if found else SCHEMA):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._check_version()
        self._set_cap()

    def _check_version(self) -> None:
        found = _one(self._db, "PRAGMA user_version")
        if found > SCHEMA_VERSION:
            raise ConfigError(
                "broker",
                f"local://{self._options.folder}",
                f"its log was written by a newer rowmill (format {found}, this one knows {SCHEMA_VERSION}): "
                "upgrade rowmill, or use another folder",
            )

    def _set_cap(self, spare: int = 0) -> None:
        if self._options.max_bytes is not None:
            pages = self._options.max_bytes // _one(self._db, "PRAGMA page_size")
            self._db.execute(f"PRAGMA max_page_count = {max(pages, 1) + spare}")

    @contextmanager
    def _above_cap(self) -> Iterator[None]:
        """Deleting frees pages, but may take a few first; at the cap it must work nevertheless."""
        self._set_cap(spare=1024)
        try:
            yield
        finally:
            self._set_cap()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise BrokerError(f"the embedded broker in {self._options.folder} is closed")
        return self._connection

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One write transaction. IMMEDIATE: one that reads first and writes later could not wait its turn."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # a full disk rolls back by itself
                db.execute("ROLLBACK")
            raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One consistent view over several statements."""
        db = self._db
        db.execute("BEGIN")
        try:
            yield
        finally:
            db.execute("ROLLBACK")

    def _translated(self, error: sqlite3.Error) -> RowmillError:
        where = f"the embedded broker in {self._options.folder}"
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return BrokerTimeoutError(
                f"{where} is locked by another process (stopped in the middle of a write?)",
                self._options.lock_timeout,
            )
        if code == sqlite3.SQLITE_FULL and self._options.max_bytes is not None:
            return BrokerError(
                f"{where} is full (max_bytes={self._options.max_bytes:,}, or the disk): delete topics, set "
                "retention.ms or retention.bytes on them, or raise max_bytes"
            )
        if code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
            return BrokerError(f"{where} cannot write ({error}): free space on its disk, and check the disk")
        if code == sqlite3.SQLITE_NOTADB:
            return ConfigError("broker", f"local://{self._options.folder}", f"{FILE_NAME} there is no log: {error}")
        if code == sqlite3.SQLITE_CORRUPT:
            return BrokerError(f"{where} is damaged ({error}): move the folder away, keep it, and start afresh")
        return BrokerError(f"{where}: {error}")

    # -- topics ----------------------------------------------------------------------------------------

    def create_topics(self, topics: Sequence[StoredTopic]) -> None:
        """Make those that are absent."""
        with self._writing():
            for topic in topics:
                made = self._db.execute(
                    "INSERT OR IGNORE INTO topic VALUES (?, ?, ?)",
                    (topic.name, topic.partitions, codec.dumps(topic.config).decode()),
                ).rowcount
                if made:
                    self._db.executemany(
                        "INSERT INTO log (topic, partition) VALUES (?, ?)",
                        ((topic.name, partition) for partition in range(topic.partitions)),
                    )

    def topics(self, name: str | None = None) -> list[StoredTopic]:
        """All topics, or the one of that name if it exists."""
        rows = self._db.execute(
            "SELECT name, partitions, config FROM topic WHERE name = coalesce(?, name) ORDER BY name", (name,)
        )
        return [StoredTopic(found, partitions, codec.loads(config)) for found, partitions, config in rows]

    def drop_topics(self, names: Collection[str]) -> None:
        """Forget topics and what groups committed for them. Their batches wait for :meth:`sweep`."""
        with self._above_cap(), self._writing():
            for name in names:
                self._db.execute("DELETE FROM committed WHERE topic = ?", (name,))
                self._db.execute("UPDATE log SET topic = NULL WHERE topic = ?", (name,))
                self._db.execute("DELETE FROM topic WHERE name = ?", (name,))

    def sweep(self) -> bool:
        """Delete some of what dropped topics left behind; False when nothing is left."""
        row = self._db.execute("SELECT id FROM log WHERE topic IS NULL LIMIT 1").fetchone()
        if row is None:
            return False
        low, high = _ids(row[0])
        with self._above_cap(), self._writing():
            (end,) = self._db.execute(
                "SELECT max(id) + 1 FROM (SELECT id FROM batch WHERE id >= ? AND id < ? ORDER BY id LIMIT ?)",
                (low, high, _FRONT),
            ).fetchone()
            if end is None:
                self._db.execute("DELETE FROM log WHERE id = ?", row)
            else:
                self._db.execute("DELETE FROM batch WHERE id >= ? AND id < ?", (low, end))
        return True

    def logs(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """The number of each partition's log."""
        return {tp: self._log(tp)[0] for tp in partitions}

    def _log(self, tp: TopicPartition) -> tuple[int, int, int]:
        row = self._db.execute(
            "SELECT id, start, next FROM log WHERE topic = ? AND partition = ?", tp
        ).fetchone()  # fmt: skip
        if row is None:
            raise TopicError(f"{tp}: no such partition; create the topic first")
        return row[0], row[1], row[2]

    # -- retention -------------------------------------------------------------------------------------

    def trim(self, retention: Retention, now_ms: int) -> bool:
        """Drop some batches at the front that are past their time; False when the front may stay."""
        low, high = _ids(retention.log)
        with self._above_cap(), self._writing():
            row = self._db.execute("SELECT bytes FROM log WHERE id = ?", (retention.log,)).fetchone()
            front = self._db.execute(
                "SELECT id, count, size, newest FROM batch WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
                (low, high, _FRONT),
            ).fetchall()
            left = row[0] if row else 0
            end = low
            for key, count, size, newest in front:
                old = retention.max_age_ms is not None and newest < now_ms - retention.max_age_ms
                # As Kafka: drop only while what is left is still as much as the limit.
                much = retention.max_bytes is not None and left - size >= retention.max_bytes
                if not (old or much):
                    break
                left, end = left - size, key + count
            if end > low:
                self._db.execute("DELETE FROM batch WHERE id >= ? AND id < ?", (low, end))
                self._db.execute(
                    "UPDATE log SET start = ?1, clean_bytes = max(clean_bytes - (bytes - ?2), 0), bytes = ?2 "
                    "WHERE id = ?3",
                    (end - low, left, retention.log),
                )
        return len(front) == _FRONT and end == front[-1][0] + front[-1][1]

    def shrink(self) -> None:
        """Give unused space back to the disk when little is in use, as after a large job's topics are deleted.

        VACUUM writes what is in use anew and holds the write lock meanwhile, so only where that is little. The
        incremental one searches its list of free pages for each page: 4 s for 120 MB, and quadratic.
        """
        free, pages = _one(self._db, "PRAGMA freelist_count"), _one(self._db, "PRAGMA page_count")
        used_bytes = (pages - free) * _one(self._db, "PRAGMA page_size")
        if free > max(pages // 2, _SHRINK_PAGES) and used_bytes <= _SHRINK_BYTES:
            self._db.execute("VACUUM")

    def log_ids(self, topic: str) -> list[int]:
        """The numbers of a topic's logs."""
        return [row[0] for row in self._db.execute("SELECT id FROM log WHERE topic = ?", (topic,))]

    # -- compaction: what the steps of local_compact ask for --------------------------------------------

    def logs_to_compact(self, topic: str, least_bytes: int | None) -> list[LogToCompact]:
        """The topic's logs to which as much was added as compaction had left, and no less than that; None for all."""
        return [
            LogToCompact(TopicPartition(topic, partition), log, start, clean, active)
            for log, partition, start, clean, active in self._db.execute(LOGS_TO_COMPACT, (topic, least_bytes))
            if active is not None and clean < active
        ]

    def stretch(self, plan: ReadPlan, end: int, room: int) -> tuple[Piece, int] | None:
        """Batches from the wish on that begin before ``end``, and the latest time before them.

        The first, and then as long as ``room`` bytes are not full. None when the log is not what it was: trimmed,
        or deleted.
        """
        low, _ = _ids(plan.log)
        with self._reading():
            row = self._db.execute("SELECT start FROM log WHERE id = ? AND topic NOT NULL", (plan.log,)).fetchone()
            if row is None or row[0] > plan.offset:
                return None
            piece = self._piece(plan, end - plan.offset, room)
            before = self._db.execute(
                "SELECT latest FROM batch WHERE id >= ? AND id < ? ORDER BY id DESC LIMIT 1", (low, low + piece.base)
            ).fetchone()
        return piece, before[0] if before else -1

    def rewrite(self, new: Rewrite) -> bool:
        """Put a log's batches into the place of others; False when those are not there any more as they were.

        So two processes that compact the same log do no harm: what one of them read before the other wrote, it
        does not write.
        """
        db, (low, _), latest = self._db, _ids(new.log), new.latest
        stretch = (low + new.base, low + new.end)
        with self._above_cap(), self._writing():
            (heads,) = db.execute(HEADS, (HEAD_BYTES, *stretch)).fetchone()
            if heads != new.heads:
                return False
            log = db.execute("SELECT next, latest, bytes FROM log WHERE id = ?", (new.log,)).fetchone()
            (saved,) = db.execute("SELECT sum(size) FROM batch WHERE id >= ? AND id < ?", stretch).fetchone()
            db.execute("DELETE FROM batch WHERE id >= ? AND id < ?", stretch)
            for base, (span, newest, data) in new.batches:
                latest, saved = max(latest, newest), saved - len(data)
                db.execute(
                    "INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?)", (low + base, span, len(data), newest, latest, data)
                )
            # The trigger took these for new ones at the end.
            db.execute(
                AFTER_REWRITE,
                {
                    "next": log[0],
                    "latest": log[1],
                    "bytes": log[2] - saved,
                    "saved": saved,
                    "end": new.end,
                    "log": new.log,
                },
            )
        return True

    def mark_clean(self, log: int, offset: int) -> None:
        """The log is compacted below ``offset``."""
        with self._writing():
            self._db.execute(MARK_CLEAN, (offset, log))

    # -- writing ---------------------------------------------------------------------------------------

    def append(self, writes: Sequence[Write]) -> None:
        """Write batches, all or none."""
        with self._writing():
            self._append(writes)

    def next_epoch(self, transactional_id: str) -> int:
        """Become the owner of the id: the former one is fenced from now on."""
        with self._writing():
            (epoch,) = self._db.execute(
                "INSERT INTO producer VALUES (?, 1) ON CONFLICT DO UPDATE SET epoch = epoch + 1 RETURNING epoch",
                (transactional_id,),
            ).fetchone()
        return int(epoch)

    def commit(
        self,
        transactional_id: str,
        epoch: int,
        writes: Sequence[Write],
        offsets: Mapping[str, Mapping[TopicPartition, Committed]],
        now_ms: int,
    ) -> dict[TopicPartition, int]:
        """A whole transaction of the id's owner: batches and groups' offsets, all or none. Gives the logs' new ends."""
        with self._writing():
            row = self._db.execute("SELECT epoch FROM producer WHERE id = ?", (transactional_id,)).fetchone()
            if row is None or row[0] != epoch:
                raise FencedError(
                    f"the transactional id {transactional_id!r} has a newer owner; nothing of this transaction "
                    "was written"
                )
            self._append(writes)
            for group, committed in offsets.items():
                self._commit_offsets(group, committed, now_ms)
            return {write.tp: self._end(write.tp) for write in writes}

    def commit_offsets(self, group: str, offsets: Mapping[TopicPartition, Committed], now_ms: int) -> None:
        """A group's offsets by themselves."""
        with self._writing():
            self._commit_offsets(group, offsets, now_ms)

    def _append(self, writes: Sequence[Write]) -> None:
        for (topic, partition), batches in writes:
            written = self._db.executemany(
                APPEND,
                (
                    (count, len(data), newest, newest, data, topic, partition)
                    for count, newest, data in batches
                ),
            ).rowcount  # fmt: skip
            if written != len(batches):
                raise TopicError(f"{topic}/{partition}: no such partition; create the topic first")

    def _end(self, tp: TopicPartition) -> int:
        (end,) = self._db.execute("SELECT next FROM log WHERE topic = ? AND partition = ?", tp).fetchone()
        return int(end)

    def _commit_offsets(self, group: str, offsets: Mapping[TopicPartition, Committed], now_ms: int) -> None:
        written = self._db.executemany(
            COMMIT_OFFSET,
            ((group, offset, metadata, now_ms, *tp) for tp, (offset, metadata) in offsets.items()),
        ).rowcount
        if written != len(offsets):
            raise TopicError(f"offsets of group {group!r}: one of {sorted(offsets)} does not exist")

    # -- groups ----------------------------------------------------------------------------------------

    def committed(self, group: str, partitions: Collection[TopicPartition]) -> dict[TopicPartition, Committed | None]:
        """What the group committed, None where it never did."""
        rows = self._db.execute(
            "SELECT topic, partition, offset, metadata FROM committed WHERE member_group = ?", (group,)
        )
        found = {TopicPartition(row[0], row[1]): Committed(row[2], row[3]) for row in rows}
        return {tp: found.get(tp) for tp in partitions}

    def groups(self) -> list[str]:
        """Groups that committed something."""
        return [row[0] for row in self._db.execute("SELECT DISTINCT member_group FROM committed")]

    def delete_groups(self, names: Collection[str]) -> None:
        """Forget what these committed."""
        with self._above_cap(), self._writing():
            self._db.executemany("DELETE FROM committed WHERE member_group = ?", ((name,) for name in names))

    # -- reading ---------------------------------------------------------------------------------------

    def data_version(self) -> int:
        """A number that is another one once any other connection committed anything."""
        return int(_one(self._db, "PRAGMA data_version"))

    def read(self, plans: Sequence[ReadPlan], max_records: int) -> tuple[int, list[Piece]]:
        """Batches for these partitions, about ``max_records`` in all and shared fairly, and the data version.

        Whole batches: the last one of a partition may reach further than its share. At most about 16 MiB in
        all, but at least one batch if there is any.
        """
        version = self.data_version()  # before the view is taken: a write in between shows as a new version
        pieces: list[Piece] = []
        with self._reading():
            room = _FETCH_BYTES
            for plan, share in self._shares(plans, max_records):
                if room <= 0:
                    break
                piece = self._piece(plan, share, room)
                room -= len(piece.data)
                pieces.append(piece)
        return version, pieces

    def _shares(self, plans: Sequence[ReadPlan], max_records: int) -> list[tuple[ReadPlan, int]]:
        """How many records each may give: the poorest are served first, so that nothing of a share is lost."""
        waiting = []
        for order, plan in enumerate(plans):
            row = self._db.execute("SELECT start, next FROM log WHERE id = ?", (plan.log,)).fetchone()
            if row is None:
                raise TopicError(f"{plan.tp}: the topic was deleted; stop reading it, or create it anew")
            start, end = row
            if not start <= plan.offset <= end:
                raise OffsetOutOfRangeError(
                    plan.tp,
                    plan.offset,
                    f"it has {start:,} to {end:,}; go on from one of these (retention removes the oldest)",
                )
            if plan.offset < end:
                waiting.append((end - plan.offset, order, plan))
        waiting = sorted(waiting[:max_records])  # with fewer records than partitions, the next fetch takes others
        shares = []
        for index, (available, order, plan) in enumerate(waiting):
            share = min(available, max_records // (len(waiting) - index))
            max_records -= share
            shares.append((order, plan, share))
        return [(plan, share) for _, plan, share in sorted(shares)]

    def _piece(self, plan: ReadPlan, share: int, room: int) -> Piece:
        wanted = (plan.log << SHIFT) + plan.offset
        first = self._db.execute(BATCH_BEFORE, (wanted,)).fetchone()[0]
        (end,) = self._db.execute(REACH, (first, wanted + share, room)).fetchone()
        (data,) = self._db.execute(JOINED, (first, end)).fetchone()
        low = plan.log << SHIFT
        return Piece(plan.tp, first - low, end - low, data)

    def offsets(self, partitions: Collection[TopicPartition], at: Moment) -> dict[TopicPartition, int]:
        """Where that moment is in each partition."""
        with self._reading():
            return {tp: self._offset(tp, at) for tp in partitions}

    def _offset(self, tp: TopicPartition, at: Moment) -> int:
        log, start, end = self._log(tp)
        if at == "earliest":
            return start
        if not isinstance(at, int):  # "end" or "high_watermark": transactions appear whole, so these are one
            return end
        low, high = _ids(log)
        # Halve down to the first batch before which all records are older …
        left, right = low + start, low + end
        while left < right:
            key, count, latest = self._db.execute(BATCH_BEFORE, ((left + right) // 2,)).fetchone()
            if latest >= at:
                right = key
            else:
                left = key + count
        # … then go on to one that itself has such a record: what made `latest` large may be trimmed away.
        row = self._db.execute(
            "SELECT id, data FROM batch WHERE id >= ? AND id < ? AND newest >= ? ORDER BY id LIMIT 1",
            (left, high, at),
        ).fetchone()
        if row is None:
            return end
        try:
            return int(row[0] - low + first_at(row[1], at))
        except DamagedBatchError as error:
            raise damaged(tp, row[0] - low, error) from error


def damaged(tp: TopicPartition, offset: int, error: DamagedBatchError) -> OffsetOutOfRangeError:
    """A batch on disk is not what was written: its records are gone, and only a person can decide that."""
    return OffsetOutOfRangeError(
        tp, offset, f"the batch there is damaged on disk ({error}); restore the folder, or go on behind it"
    )


def _make_private(file: Path) -> None:
    """Make the file, for its owner only, if there is none.

    Never by opening it: when a process closes *any* handle of a file, the system drops all its locks on it, those
    of SQLite's connections as well. Another process then takes itself for the last user and deletes the
    write-ahead log in use; both go on without an error, and what one of them writes is lost.
    """
    if file.exists():
        return
    handle, name = tempfile.mkstemp(prefix=".new-", dir=file.parent)
    os.close(handle)
    try:
        os.link(name, file)
    except FileExistsError:  # somebody was faster
        pass
    finally:
        Path(name).unlink()


def _ids(log: int) -> tuple[int, int]:
    """The keys of a log's batches: from the first, up to but without the second."""
    return log << SHIFT, (log + 1) << SHIFT


def _one(connection: sqlite3.Connection, query: str) -> int:
    return int(connection.execute(query).fetchone()[0])


def _statements(script: str) -> Iterator[str]:
    """The script's statements one by one (``executescript`` would end the transaction we are in)."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _enter_wal_mode(connection: sqlite3.Connection, timeout: float) -> None:
    """Switch the file to WAL. Two processes doing it at once get "locked" whatever the busy timeout says."""
    pause, waited = 0.02, 0.0
    while True:
        try:
            connection.execute("PRAGMA journal_mode = wal")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or waited >= timeout:
                raise
            Event().wait(pause)
            waited += pause
        else:
            return
