"""How the embedded broker writes a run of records into one blob, and reads it back.

Columns, not rows: all lengths first, then all bytes, so that packing and cutting happen in C. One blob per run
instead of one SQLite row per record is not for the disk's sake: Python's sqlite3 gives the GIL away at every
row, and wins it back only after the 5 ms switch interval while the event loop is busy. Measured with a busy
loop: 1k records/s in either direction with a row per record, 150k and more with 1,000 records per blob.

Layout, little-endian: a head (version, flags, count, length, CRC-32 of the body), then the body: timestamps
(i64), keys, values, and where a record has headers: how many each has, the distinct names, an index into these
per header, the headers' values. A column of optional bytes is its lengths (i32, -1 for None), then the bytes.

Records of a dense blob (version 1) have the offsets from its base on, one after another. A sparse one (version 2)
is what compaction left of a stretch of the log: before the timestamps it has how many offsets it covers (i64), the
number of stamps (u32), each record's offset less the base (i64), then the stamps: pairs of a tombstone's offset
less the base and the time of the compaction that met it first (i64). It may cover offsets and hold no record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise, repeat
from operator import add
from struct import Struct, pack, unpack_from
from typing import NamedTuple
from zlib import crc32

from ...state.model import Headers, Outgoing, StoredRecord, new_stored

_DENSE, _SPARSE = 1, 2
MAX_BATCH_RECORDS = 1_000
MAX_BATCH_BYTES = 1 << 20
"""A longer run is cut: what a reader decodes in one go, and keeps when it was asked for less, is bounded."""

_HEAD = Struct("<BBxxIII")
_SPAN = Struct("<qI")
_HAS_HEADERS = 1
_NO_TIME = -(1 << 63)

HEAD_BYTES = _HEAD.size


class DamagedBatchError(ValueError):
    """A blob that is not what was written."""


class Batch(NamedTuple):
    """An encoded run: how many offsets it covers (dense: its records), the largest timestamp in ms, the blob."""

    records: int
    newest: int
    data: bytes


class Columns:
    """Records for one partition, taken apart, waiting to be encoded."""

    __slots__ = ("headers", "keys", "sizes", "timestamps", "values")

    def __init__(self, records: Sequence[Outgoing] = ()) -> None:
        keys, values, timestamps, headers = zip(*records, strict=True) if records else ((), (), (), ())
        self.keys: list[bytes | None] = list(keys)
        self.values: list[bytes | None] = list(values)
        self.timestamps: list[int] = list(timestamps)
        self.headers: list[Headers] = list(headers)
        self.sizes = _sizes(self.keys, self.values, self.headers)

    def __len__(self) -> int:
        return len(self.sizes)

    def extend(self, other: Columns) -> None:
        """Put the other's records behind these."""
        self.keys += other.keys
        self.values += other.values
        self.timestamps += other.timestamps
        self.headers += other.headers
        self.sizes += other.sizes

    def batches(self) -> list[Batch]:
        """All records, in order, in runs that keep within the bounds."""
        return [self._encode(*cut) for cut in self._cuts(0, len(self))]

    def _cuts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for low in range(start, end, MAX_BATCH_RECORDS):
            high = min(low + MAX_BATCH_RECORDS, end)
            if high - low > 1 and sum(self.sizes[low:high]) > MAX_BATCH_BYTES:
                middle = (low + high) // 2
                yield from self._cuts(low, middle)
                yield from self._cuts(middle, high)
            else:
                yield low, high

    def sparse_batches(
        self, base: int, offsets: Sequence[int], end: int, stamps: Mapping[int, int]
    ) -> list[tuple[int, Batch]]:
        """All records at these offsets, in runs that cover everything from ``base`` to ``end``, with their bases."""
        cuts = list(self._cuts(0, len(self))) or [(0, 0)]
        bases = [base, *(offsets[low] for low, _ in cuts[1:]), end]
        return [
            (start, self._encode_at(low, high, start, offsets[low:high], after, stamps))
            for (low, high), (start, after) in zip(cuts, pairwise(bases), strict=True)
        ]

    def _encode_at(
        self, low: int, high: int, base: int, offsets: Sequence[int], end: int, stamps: Mapping[int, int]
    ) -> Batch:
        own = [number for offset in offsets if offset in stamps for number in (offset - base, stamps[offset])]
        if high - low == end - base and not own:
            return self._encode(low, high)
        gaps = _SPAN.pack(end - base, len(own) // 2) + pack(
            f"<{len(offsets) + len(own)}q", *(offset - base for offset in offsets), *own
        )
        return self._encode(low, high, end - base, gaps)

    def _encode(self, low: int, high: int, span: int | None = None, gaps: bytes = b"") -> Batch:
        count = high - low
        timestamps = self.timestamps[low:high]
        headers = self.headers[low:high]
        parts = [
            gaps,
            pack(f"<{count}q", *timestamps),
            *_pack_column(self.keys[low:high]),
            *_pack_column(self.values[low:high]),
        ]
        flags = 0
        if any(headers):
            flags = _HAS_HEADERS
            parts += _pack_headers(headers)
        body = b"".join(parts)
        head = _HEAD.pack(_SPARSE if gaps else _DENSE, flags, count, len(body), crc32(body))
        return Batch(count if span is None else span, max(timestamps, default=_NO_TIME), head + body)


def decode(data: bytes, topic: str, partition: int, base: int) -> list[StoredRecord]:
    """The records of one or more blobs laid end to end, the first of them at offset ``base``.

    Raises:
        DamagedBatchError: a blob is cut short or its checksum does not fit.
    """
    records: list[StoredRecord] = []
    at = 0
    while at < len(data):
        blob = _open(data, at)
        count, at = blob.records, blob.columns
        timestamps = unpack_from(f"<{count}q", data, at)
        keys, at = _unpack_column(data, at + 8 * count, count)
        values, at = _unpack_column(data, at, count)
        headers = _unpack_headers(data, at, count) if blob.flags & _HAS_HEADERS else repeat(())
        offsets = range(base, base + count) if blob.span == count else map(base.__add__, blob.offsets)
        records += map(
            new_stored, zip(repeat(topic), repeat(partition), offsets, timestamps, keys, values, headers)
        )  # fmt: skip
        base += blob.span
        at = blob.after
    return records


def decode_keys(data: bytes, base: int) -> list[tuple[bytes | None, int]]:
    """The keys of all records, and their offsets: a quarter of the price of ``decode``.

    Raises:
        DamagedBatchError: as ``decode``.
    """
    found: list[tuple[bytes | None, int]] = []
    at = 0
    while at < len(data):
        blob = _open(data, at)
        keys, _ = _unpack_column(data, blob.columns + 8 * blob.records, blob.records)
        found += zip(keys, map(base.__add__, blob.offsets), strict=True)
        base += blob.span
        at = blob.after
    return found


def first_at(data: bytes, timestamp: int) -> int:
    """How far behind the base the first record with such a timestamp or a later one is; the span if there is none."""
    blob = _open(data, 0)
    timestamps = unpack_from(f"<{blob.records}q", data, blob.columns)
    return next((at for at, found in zip(blob.offsets, timestamps, strict=True) if found >= timestamp), blob.span)


class Survey(NamedTuple):
    """What compaction needs to know of blobs end to end, besides their records.

    ``heads`` are all their heads, checksums and all: as good as the blobs to see whether they are still the same.
    """

    heads: bytes
    blobs: int
    stamps: dict[int, int]


def survey(data: bytes, base: int) -> Survey:
    """Look the blobs over, the first of which begins at offset ``base``.

    Raises:
        DamagedBatchError: as ``decode``.
    """
    heads: list[bytes] = []
    stamps: dict[int, int] = {}
    at = 0
    while at < len(data):
        blob = _open(data, at)
        heads.append(data[at : at + HEAD_BYTES])
        if blob.stamps:
            numbers = unpack_from(f"<{2 * blob.stamps}q", data, blob.columns - 16 * blob.stamps)
            stamps.update(zip(map(base.__add__, numbers[::2]), numbers[1::2], strict=True))
        base += blob.span
        at = blob.after
    return Survey(b"".join(heads), len(heads), stamps)


class _Blob(NamedTuple):
    """An opened blob: where its columns begin and it ends, and which offsets behind its base its records have."""

    flags: int
    records: int
    columns: int
    after: int
    span: int
    offsets: Sequence[int]
    stamps: int


def _open(data: bytes, at: int) -> _Blob:
    """Look at one blob, after checking that it is whole."""
    if len(data) - at < _HEAD.size:
        raise DamagedBatchError("it is cut short")
    version, flags, count, length, checksum = _HEAD.unpack_from(data, at)
    start = at + _HEAD.size
    if version not in {_DENSE, _SPARSE} or length > len(data) - start or count * 16 > length:
        raise DamagedBatchError("its head makes no sense")
    if crc32(memoryview(data)[start : start + length]) != checksum:
        raise DamagedBatchError("its checksum does not fit")
    if version == _DENSE:
        return _Blob(flags, count, start, start + length, count, range(count), 0)
    span, stamps = _SPAN.unpack_from(data, start)
    offsets = start + _SPAN.size
    columns = offsets + 8 * count + 16 * stamps
    return _Blob(flags, count, columns, start + length, span, unpack_from(f"<{count}q", data, offsets), stamps)


def _lengths(items: Sequence[bytes | None]) -> list[int]:
    try:
        return list(map(len, items))  # type: ignore[arg-type]
    except TypeError:  # a None among them
        return [-1 if item is None else len(item) for item in items]


def _sizes(keys: list[bytes | None], values: list[bytes | None], headers: list[Headers]) -> list[int]:
    sizes = list(map(add, _lengths(keys), _lengths(values)))
    if any(headers):
        return [
            size + sum(len(name) + len(value or b"") for name, value in pairs)
            for size, pairs in zip(sizes, headers, strict=True)
        ]
    return sizes


def _pack_column(items: Sequence[bytes | None]) -> tuple[bytes, bytes]:
    lengths = _lengths(items)
    return pack(f"<{len(lengths)}i", *lengths), b"".join(filter(None, items))


def _unpack_column(data: bytes, at: int, count: int) -> tuple[list[bytes | None], int]:
    lengths = unpack_from(f"<{count}i", data, at)
    at += 4 * count
    nulls = lengths.count(-1)
    if nulls == count:
        return [None] * count, at
    if not nulls:
        ends = list(accumulate(lengths, initial=at))
        return [data[start:end] for start, end in pairwise(ends)], ends[-1]
    items: list[bytes | None] = []
    for length in lengths:
        if length < 0:
            items.append(None)
        else:
            items.append(data[at : at + length])
            at += length
    return items, at


def _pack_headers(headers: Sequence[Headers]) -> list[bytes]:
    pairs = list(chain.from_iterable(headers))
    names: dict[str, int] = {}
    index = [names.setdefault(name, len(names)) for name, _ in pairs]
    return [
        pack(f"<{len(headers)}i", *map(len, headers)),
        pack("<I", len(names)),
        *_pack_column([name.encode() for name in names]),
        pack(f"<{len(index)}i", *index),
        *_pack_column([value for _, value in pairs]),
    ]


def _unpack_headers(data: bytes, at: int, count: int) -> list[Headers]:
    counts = unpack_from(f"<{count}i", data, at)
    (distinct,) = unpack_from("<I", data, at + 4 * count)
    encoded, at = _unpack_column(data, at + 4 * count + 4, distinct)
    names = [str(name, "utf-8") for name in encoded if name is not None]
    total = sum(counts)
    index = unpack_from(f"<{total}i", data, at)
    values, _ = _unpack_column(data, at + 4 * total, total)
    pairs = zip(map(names.__getitem__, index), values, strict=True)
    if counts.count(counts[0]) == count:  # as rowmill's own results have them
        return list(zip(*repeat(pairs, counts[0]), strict=True))
    listed = list(pairs)
    return [tuple(listed[start:end]) for start, end in pairwise(accumulate(counts, initial=0))]
