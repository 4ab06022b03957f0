"""Compaction of the embedded broker's logs: of each key only the newest record stays, at the offset it has.

As Kafka's log cleaner: learn from what was added where each key's newest record is, then go through the log from its
start and put sparse batches in the place of those that hold older ones. Each step is a transaction of its own that
leaves a log with the same newest record of each key, so that a kill in between costs nothing but the rest of the
pass, and a step holds up writers no longer than putting about 1 MiB of batches aside takes.

What is remembered are the keys themselves: no two are ever taken for one. When they fill their room (64 MiB), the
pass ends at that place of the log, and another one follows, so that memory is bounded whatever the number of keys.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeVar

from ...state.model import Outgoing, StoredRecord
from .local_batch import (
    MAX_BATCH_BYTES,
    MAX_BATCH_RECORDS,
    Batch,
    Columns,
    DamagedBatchError,
    decode,
    decode_keys,
    survey,
)
from .local_store import LogStore, LogToCompact, Piece, ReadPlan, Rewrite, damaged

T = TypeVar("T")

_STEP_BYTES = 1 << 20
_KEYS_BYTES = 64 << 20
_KEY_COST = 160
"""What a key costs besides its own bytes: two objects and a place in a dict."""


class StoreThread(Protocol):
    """Where a store's methods, and functions of a store, are called."""

    def call(self, method: Callable[..., T], *args: Any) -> Awaitable[T]:
        """Call it with the thread's store and these arguments."""


class Newest:
    """Where the newest record of each key is, as far as it was learnt."""

    def __init__(self) -> None:
        self._offsets: dict[bytes, int] = {}
        self._room = _KEYS_BYTES

    def learn(self, keys: Sequence[tuple[bytes | None, int]]) -> None:
        """Take note of these keys and offsets, which are newer than all before."""
        offsets = self._offsets
        for key, offset in keys:
            if key is not None:
                if key not in offsets:
                    self._room -= len(key) + _KEY_COST
                offsets[key] = offset

    def is_full(self) -> bool:
        """Whether no more should be learnt."""
        return self._room <= 0

    def outdates(self, record: StoredRecord) -> bool:
        """Whether there is a newer record of the same key."""
        return record.key is not None and self._offsets.get(record.key, -1) > record.offset


class Pass(NamedTuple):
    """One pass over a log: what was learnt, the time, and how long deletions stay after they were met first."""

    log: LogToCompact
    newest: Newest
    now_ms: int
    keep_ms: int


class Step(NamedTuple):
    """What became of a stretch of the log, None for nothing, and where to go on."""

    rewrite: Rewrite | None
    next: int


async def compact(log: LogToCompact, sifting: StoreThread, writing: StoreThread, now_ms: int, keep_ms: int) -> None:
    """Compact the log up to its newest batch.

    Ends early when somebody else rewrites the log at the same time, as another process that compacts it does: one of
    the two goes on.

    Raises:
        OffsetOutOfRangeError: a batch is damaged; nothing from there on was touched.
    """
    clean: int | None = log.clean
    while clean is not None and clean < log.active:
        newest = Newest()
        clean = await _learn_up_to_active(log, newest, clean, sifting)
        if clean is None or not await _rewrite_up_to(clean, Pass(log, newest, now_ms, keep_ms), sifting, writing):
            return
        await writing.call(LogStore.mark_clean, log.log, clean)


async def _learn_up_to_active(log: LogToCompact, newest: Newest, at: int, sifting: StoreThread) -> int | None:
    """Learn until the newest batch, or until there is no room; where that was, None when the log has changed."""
    reached: int | None = at
    while reached is not None and reached < log.active and not newest.is_full():
        reached = await sifting.call(_learn, log, newest, reached)
    return reached


async def _rewrite_up_to(end: int, this: Pass, sifting: StoreThread, writing: StoreThread) -> bool:
    at = this.log.start
    while at < end:
        step = await sifting.call(_sift, this, at, end)
        if step is None or (step.rewrite is not None and not await writing.call(LogStore.rewrite, step.rewrite)):
            return False
        at = step.next
    return True


def _learn(store: LogStore, log: LogToCompact, newest: Newest, at: int) -> int | None:
    found = store.stretch(ReadPlan(log.tp, log.log, at), log.active, _STEP_BYTES)
    if found is None:
        return None
    piece, _ = found
    with _telling_damage(piece):
        newest.learn(decode_keys(piece.data, piece.base))
    return piece.end


def _sift(store: LogStore, this: Pass, at: int, end: int) -> Step | None:
    """Leave out of the next stretch what is not to stay."""
    found = store.stretch(ReadPlan(this.log.tp, this.log.log, at), end, _STEP_BYTES)
    if found is None:
        return None
    piece, latest = found
    with _telling_damage(piece):
        records = decode(piece.data, *piece.tp, piece.base)
        heads, blobs, known = survey(piece.data, piece.base)
    stamps = known | {
        record.offset: this.now_ms
        for record in records
        if record.value is None and record.key is not None and record.offset < end and record.offset not in known
    }
    kept = [record for record in records if not this.newest.outdates(record) and not _is_over(record, known, this)]
    batches = _encoded(piece, kept, stamps)
    if len(kept) == len(records) and len(stamps) == len(known) and len(batches) >= blobs:
        return Step(None, piece.end)
    # A small batch at the end is taken up again together with what follows, or a log of many would stay that.
    last, (_, _, data) = batches[-1]
    count = len(kept) - bisect_left(kept, last, key=attrgetter("offset"))
    is_small = count < MAX_BATCH_RECORDS // 2 and len(data) < MAX_BATCH_BYTES // 2
    after = last if is_small and piece.end < end else piece.end
    return Step(Rewrite(this.log.log, piece.base, piece.end, heads, latest, batches), after)


def _is_over(record: StoredRecord, stamps: dict[int, int], this: Pass) -> bool:
    """Whether it is a deletion that stayed long enough.

    All that it deletes is gone: it got its stamp from a pass that had learnt of it, and had been over all before it.
    """
    stamp = stamps.get(record.offset)
    return stamp is not None and stamp + this.keep_ms <= this.now_ms


def _encoded(piece: Piece, records: Sequence[StoredRecord], stamps: dict[int, int]) -> list[tuple[int, Batch]]:
    columns = Columns([Outgoing(r.key, r.value, r.timestamp, r.headers) for r in records])
    return columns.sparse_batches(piece.base, [r.offset for r in records], piece.end, stamps)


@contextmanager
def _telling_damage(piece: Piece) -> Iterator[None]:
    try:
        yield
    except DamagedBatchError as error:
        raise damaged(piece.tp, piece.base, error) from error
