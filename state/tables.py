"""The tables of one partition: a store on disk, and above it what completed since it was last written.

Law 5: the store never runs ahead of the broker. Writes of completed rows are *pending*; a commit *takes* them, puts
them in its transaction as changelog records, and only when that transaction is committed are they *written* to the
store, in one batch with the changelog's position. Until then every read looks at pending and taken writes first.

What a store holds, by the first byte of its keys: tables (their names), rowmill's own entries that the changelog
carries as well (``.checkpoint``), and entries of this store alone (a zero byte): the position, and the index by
which expired entries are found.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from threading import Lock

from .codec import dumps, loads
from .errors import BadRowError, RowmillError
from .model import Outgoing, Record, new_outgoing
from .store import Change, Store, StoreError
from .table import (
    Operation,
    Put,
    RowTables,
    Source,
    Stamped,
    TableSpec,
    Update,
    is_expired,
    overlaid,
    restamp,
    stamp,
    time_of,
    unstamp,
)

_POSITION = b"\x00position"
_ABOUT = b"\x00about"
_EXPIRY = b"\x00expiry/"
_NUMBER = struct.Struct(">Q")
_DESCRIBE_EVERY_MS = 3_600_000
_SWEEP = 500
_SWEEP_EVERY_MS = 1_000
_ENTRY = 130  # bytes that Python needs for two bytes objects and their place in a dictionary
_WRITE = 2_000  # records per batch: rocksdict holds the GIL while it writes one (FACTS)


class TableUpdateError(RowmillError):
    """A row's ``update`` raised, or gave what is no value: the row's failure."""


class Layer(Source):
    """Writes above a source: of the rows of one lot that are complete, while the lot goes on."""

    def __init__(self, below: Source) -> None:
        self._below = below
        self.changes: dict[bytes, Stamped | None] = {}

    def get(self, key: bytes) -> Stamped | None:
        """The value now, or None. May be called from a thread while the event loop takes or completes writes."""
        changes = self.changes  # one look: `take` puts another one there
        return changes[key] if key in changes else self._below.get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, Stamped]]:
        """All entries whose keys begin so, ascending."""
        changes = self.changes
        return overlaid(self._below.scan(prefix), changes, prefix)

    def settle(self, operations: Iterable[Operation]) -> None:
        """Apply what a row that completes wanted; all of it or nothing.

        Raises:
            TableUpdateError: one of its updates cannot be worked out.
        """
        changes: dict[bytes, Stamped | None] = {}
        for operation in operations:
            key = operation.key
            if isinstance(operation, Put):
                changes[key] = operation.value
            else:
                present = changes[key] if key in changes else self.get(key)
                changes[key] = _updated(operation, present)
        self.changes.update(changes)


class PartitionTables(Layer):
    """All tables of one partition.

    Args:
        store: this partition's own.
        specs: the pipeline's tables.
        recent_bytes: tells how much memory what was used last may have now; 0 for none.
    """

    def __init__(
        self, store: Store, specs: Mapping[str, TableSpec], recent_bytes: Callable[[], int] = lambda: 0
    ) -> None:
        self._store = store
        self._taken: dict[bytes, Stamped | None] = {}
        self._stored = _Remembered(store, recent_bytes)
        super().__init__(self._stored)
        self.specs = specs
        self._mortal = {spec.prefix: spec for spec in specs.values() if spec.ttl_ms is not None}
        # A thread whose caller was cancelled goes on writing: closing waits for it.
        self._writing = Lock()
        self._described_ms = 0
        self._due: list[tuple[bytes, bytes, bool]] = []  # found over: index entry, key, whether the value is
        self._now_ms = 0  # the newest row that completed; what expires is measured by it
        self._swept_ms = 0

    @property
    def expires(self) -> bool:
        """Whether anything in them does: then :meth:`pass_time` is to be told how time passes."""
        return bool(self._mortal)

    # --- rows --------------------------------------------------------------------------------------------------

    def get(self, key: bytes) -> Stamped | None:
        """See :class:`Layer`: what is pending, under it what is taken, under it the store."""
        changes = self.changes  # this one first: `take` makes it the taken one
        if key in changes:
            return changes[key]
        taken = self._taken
        return taken[key] if key in taken else self._stored.get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, Stamped]]:
        """All entries whose keys begin so, ascending."""
        changes = self.changes
        taken = self._taken  # before the store: what is forgotten meanwhile lies there
        return overlaid(overlaid(self._stored.scan(prefix), taken, prefix), changes, prefix)

    def view(self, source: Source, time_ms: int) -> RowTables:
        """One row's tables, reading through ``source`` (this object, or a layer above it)."""
        return RowTables(self.specs, source, time_ms)

    def absorb(self, layer: Layer) -> None:
        """Take over what a lot's layer holds."""
        self.changes.update(layer.changes)

    def pass_time(self, time_ms: int) -> None:
        """A row of this age completed."""
        self._now_ms = max(self._now_ms, time_ms)

    def own(self, key: bytes) -> bytes | None:
        """The JSON of an entry of rowmill's own, whose key begins with a dot."""
        value = self.get(key)
        return None if value is None else value[8:]

    @property
    def failure(self) -> StoreError | None:
        """The store's error that some read met, whatever became of it: nothing read since may be committed."""
        return self._stored.failure

    # --- commits -----------------------------------------------------------------------------------------------

    def take(self) -> dict[bytes, Stamped | None]:
        """What is pending, for the transaction that begins now. It stays readable until :meth:`written`."""
        self._delete_due()
        self._taken, self.changes = self.changes, {}
        return self._taken

    def written(self, position: int | None, now_ms: int) -> None:
        """The transaction is committed: write what was taken to the store. Blocks; not for the event loop.

        Args:
            position: the changelog's offset behind it; None if nobody knows, which costs a longer restore.
            now_ms: the present, noted now and then as the time when the store was in use last.

        Raises:
            StoreError: it cannot be written.
        """
        with self._writing:
            self._store.write(self._changes_of(self._taken.items(), position))
            self._stored.remember(self._taken)
        self._find_due(max(_SWEEP, 2 * len(self._taken)))
        if now_ms - self._described_ms > _DESCRIBE_EVERY_MS:
            self.describe(now_ms)

    def forget_taken(self) -> None:
        """The store has it."""
        self._taken = {}

    def _changes_of(self, entries: Iterable[tuple[bytes, Stamped | None]], position: int | None) -> list[Change]:
        changes: list[Change] = list(entries)
        if self._mortal:
            changes += [(self._expiry(key, value), b"") for key, value in changes if self._is_mortal(key, value)]
        if position is not None:
            changes.append((_POSITION, _NUMBER.pack(position)))
        return changes

    # --- expiry ------------------------------------------------------------------------------------------------

    def _spec_of(self, key: bytes) -> TableSpec | None:
        return self._mortal.get(key[: key.find(b"/") + 1])

    def _is_mortal(self, key: bytes, value: Stamped | None) -> bool:
        return value is not None and self._spec_of(key) is not None

    def _expiry(self, key: bytes, value: Stamped | None) -> bytes:
        spec = self._spec_of(key)
        assert spec is not None  # noqa: S101 - the caller asked
        assert spec.ttl_ms is not None  # noqa: S101
        assert value is not None  # noqa: S101
        return _EXPIRY + _NUMBER.pack(max(0, time_of(value) + spec.ttl_ms)) + key

    def _find_due(self, limit: int) -> None:
        """Look for entries that are over, on the thread that has just written: more of them than were written."""
        if not self._mortal or self._due or self._now_ms - self._swept_ms < _SWEEP_EVERY_MS:
            return
        due: list[tuple[bytes, bytes, bool]] = []
        for index, _ in islice(self._store.scan(_EXPIRY), limit):
            (over_ms,) = _NUMBER.unpack_from(index, len(_EXPIRY))
            if over_ms > self._now_ms:
                self._swept_ms = self._now_ms
                break
            key = index[len(_EXPIRY) + 8 :]
            value, spec = self._store.get(key), self._spec_of(key)
            over = value is not None and spec is not None and is_expired(spec, value, self._now_ms)
            due.append((index, key, over))
        self._due = due

    def _delete_due(self) -> None:
        """Delete what was found, unless it was written again; the index also holds times that entries once had."""
        for index, key, over in self._due:
            if over and key not in self.changes:
                self.changes[key] = None
            self.changes[index] = None
        self._due = []

    # --- the changelog -----------------------------------------------------------------------------------------

    @staticmethod
    def records(taken: Mapping[bytes, Stamped | None], now_ms: int) -> list[Outgoing]:
        """What was taken, as changelog records: a value carries its own time, a deletion the present."""
        return [
            new_outgoing((key, None, now_ms, ()))
            if value is None
            else new_outgoing((key, value[8:], min(time_of(value), now_ms), ()))
            for key, value in taken.items()
            if key[0]
        ]

    @property
    def position(self) -> int | None:
        """The changelog offset up to which the store is complete; None for a new store."""
        raw = self._store.get(_POSITION)
        return None if raw is None else int(_NUMBER.unpack(raw)[0])

    def load(self, records: Sequence[Record], position: int) -> None:
        """Write changelog records to the store, at full speed: a restore."""
        with self._writing:
            for begin in range(0, len(records), _WRITE):
                # Made one by one as they are written: no list of all, no copies of it.
                changes: Iterable[Change] = (
                    (record.key, None if record.value is None else restamp(record.value, record.timestamp))
                    for record in records[begin : begin + _WRITE]
                    if record.key
                )
                self._store.write(self._changes_of(changes, None) if self._mortal else changes)
            self._store.write([(_POSITION, _NUMBER.pack(position))])
            self._stored.forget()

    # --- what the store says of itself -------------------------------------------------------------------------

    @property
    def about(self) -> dict[str, int | str | dict[str, int]]:
        """What :meth:`describe` noted, {} for a new store."""
        raw = self._store.get(_ABOUT)
        return {} if raw is None else dict(loads(raw))

    def describe(self, now_ms: int, restoring: str = "") -> None:
        """Note when this store was in use last, and the lifetimes that its index was made with.

        Args:
            now_ms: the present.
            restoring: the changelog's generation, while a restore is under way that may be cut off.
        """
        about = {"used_ms": now_ms, "ttl_ms": {spec.name: spec.ttl_ms for spec in self._mortal.values()}}
        with self._writing:
            self._store.write([(_ABOUT, dumps({**about, "restoring": restoring} if restoring else about))])
        self._described_ms = now_ms

    def close(self) -> None:
        """Let go of the store."""
        with self._writing:
            self._store.close()


class _Remembered(Source):
    """The store, and in memory what was read from it or written to it last: RocksDB takes 2 µs and more for a look.

    Two generations: entries join the young one, and so do those of the old one that are asked for. When the young one
    has half of the memory, it becomes the old one, and what nobody asked for since it became old is gone. Whatever is
    here is in the store too, so that nothing is lost with it, and scans need not look.

    Args:
        store: this partition's own.
        limit: tells how many bytes it may have now.
    """

    def __init__(self, store: Store, limit: Callable[[], int]) -> None:
        self._store = store
        self._limit = limit
        self._young: dict[bytes, Stamped | None] = {}
        self._old: dict[bytes, Stamped | None] = {}
        self._size = 0  # of the young ones
        self._half = limit() // 2
        self._writes = 0
        self._guard = Lock()
        # A read that failed is remembered: the handler that made it may have swallowed the error, or wrapped it.
        self.failure: StoreError | None = None

    def get(self, key: bytes) -> Stamped | None:
        """The value in the store, or None. May be called from several threads, also while :meth:`remember` is."""
        writes = self._writes  # before anything is looked at
        young = self._young  # before the old ones, which it may become
        if key in young:
            return young[key]
        old = self._old
        value = old[key] if key in old else self._read(key)
        with self._guard:
            # What was written since may be newer than what was found here: then it is not kept.
            if self._half and writes == self._writes:
                size = _size(key, value) - self._known_size(key)  # another thread may have read it as well
                self._young[key] = value
                self._grow(size)
        return value

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, Stamped]]:
        """All entries of the store whose keys begin so, as they are now, ascending."""
        try:
            found = self._store.scan(prefix)
        except StoreError as error:
            self.failure = error
            raise
        return self._watched(found)

    def _watched(self, found: Iterator[tuple[bytes, Stamped]]) -> Iterator[tuple[bytes, Stamped]]:
        try:
            yield from found
        except StoreError as error:
            self.failure = error
            raise

    def remember(self, written: Mapping[bytes, Stamped | None]) -> None:
        """The store has these now."""
        half = self._limit() // 2
        with self._guard:
            self._writes += 1
            self._half = half
            if half:
                young = self._young
                known = {key: young[key] for key in written if key in young}
                young.update(written)
                self._grow(_size_of_all(written) - _size_of_all(known))

    def forget(self) -> None:
        """The store was written to by other ways."""
        with self._guard:
            self._writes += 1
            self._old, self._young, self._size = {}, {}, 0

    def _known_size(self, key: bytes) -> int:
        """Of what is counted already: values grow."""
        return _size(key, self._young[key]) if key in self._young else 0

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._half:
            self._old, self._young, self._size = self._young, {}, 0

    def _read(self, key: bytes) -> Stamped | None:
        try:
            return self._store.get(key)
        except StoreError as error:
            self.failure = error
            raise


def _size(key: bytes, value: Stamped | None) -> int:
    return len(key) + len(value or b"") + _ENTRY


def _size_of_all(entries: Mapping[bytes, Stamped | None]) -> int:
    return sum(map(len, entries)) + sum(map(len, filter(None, entries.values()))) + _ENTRY * len(entries)


def _updated(update: Update, present: Stamped | None) -> Stamped | None:
    over = present is None or is_expired(update.spec, present, update.time_ms)
    what = f"update of {update.key.decode(errors='replace')!r}"
    try:
        value = update.function(None if present is None or over else unstamp(present))
        return None if value is None else stamp(update.spec, value, update.time_ms)
    except (BadRowError, ValueError) as error:
        raise TableUpdateError(f"{what}: {error}") from error
    except Exception as error:
        raise TableUpdateError(f"{what}: {type(error).__name__}: {error}") from error
