"""The low watermark and the offset map: which offsets of a partition are complete, in a commit's 4,096 characters.

Rows complete out of order. What is committed is the lowest offset not yet completed (the low watermark) and, in
the commit's metadata, which offsets above it are complete all the same, so that after a crash exactly the others
run again. The idea is Confluent Parallel Consumer's; that the map rides inside the transaction is ours.

Format, version 1: ``base64(version, kind, varint(span), payload)``. The span is the number of offsets from the low
watermark to the end of what is known. Kind ``b``: one bit per offset, lowest first, set if complete. Kind ``r``:
varints of alternating run lengths, incomplete first. The shorter one is taken. Empty metadata is an empty map.
"""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..state.model import Committed, Record, TopicPartition
from .errors import CheckpointError

MAX_CHARACTERS = 4_096
"""What Kafka's brokers take by default (``offset.metadata.max.bytes``)."""

_VERSION = 1
_BITS, _RUNS = ord("b"), ord("r")
_HEAD_BYTES = 2 + 5
_ROOM_BYTES = MAX_CHARACTERS // 4 * 3 - _HEAD_BYTES

# Rows are taken only while the map is sure to fit, whatever completes in whatever order: as bits if all offsets lie
# near the low watermark, or as runs if few rows are in flight (a run of them and the one behind it take at most
# 2 + 5 bytes). Three quarters, so that a later version of the format may need more.
SPAN_LIMIT = _ROOM_BYTES * 8 * 3 // 4
"""Offsets above the low watermark that may be taken whatever is in flight: about 18,000."""
IN_FLIGHT_LIMIT = _ROOM_BYTES * 3 // 4 // 7
"""Rows that may be in flight when an offset lies beyond that: about 320."""


class OffsetMap(NamedTuple):
    """A decoded map: of the offsets from ``low`` up to ``end``, those in ``incomplete`` are not complete."""

    low: int
    end: int
    incomplete: tuple[int, ...]


def encode_map(offsets: OffsetMap) -> str:
    """The map as a commit's metadata; "" when nothing above the low watermark is complete."""
    low, end, incomplete = offsets
    span = end - low
    if span == len(incomplete):
        return ""
    runs = _runs(low, end, incomplete)
    kind, payload = _RUNS, b"".join(map(_varint, runs))
    if span < len(payload) * 8:
        kind, payload = _BITS, _bits(low, span, incomplete)
    return base64.b64encode(bytes((_VERSION, kind)) + _varint(span) + payload).decode("ascii")


def decode_map(committed: Committed, tp: TopicPartition | None = None) -> OffsetMap:
    """The map of a commit.

    Args:
        committed: the commit.
        tp: where, for the error.

    Raises:
        CheckpointError: it cannot be read, or a newer rowmill wrote it. Nothing is guessed: without the map,
            completed rows would run again.
    """
    low, metadata = committed
    if not metadata:
        return OffsetMap(low, low, ())
    try:
        raw = base64.b64decode(metadata, validate=True)
        version, kind = raw[0], raw[1]
        span, at = _read_varint(raw, 2)
        if version == _VERSION and kind in {_BITS, _RUNS}:
            payload = raw[at:]
            offsets = _from_bits(low, span, payload) if kind == _BITS else _from_runs(low, span, payload)
            return OffsetMap(low, low + span, offsets)
    except (binascii.Error, IndexError, ValueError) as error:
        raise _unreadable(committed, tp, str(error)) from error
    raise _unreadable(committed, tp, f"version {version}, kind {kind}; this rowmill reads version {_VERSION}")


def _unreadable(committed: Committed, tp: TopicPartition | None, why: str) -> CheckpointError:
    where = "" if tp is None else f"{tp}: "
    return CheckpointError(
        f"{where}the offset map committed at {committed.offset:,} cannot be read ({why}): "
        f"{committed.metadata[:60]!r}…. Run a newer rowmill if one wrote it; or, with the workers stopped, drop it: "
        "`rowmill replay PIPELINE --to-current --execute` (and --session NAME, if it is not the live one). Rows above "
        "it that were complete then run again"
    )


class OffsetTracker:
    """Follows one partition's offsets from being taken to being complete.

    Args:
        start: where the map of the last commit stands; its incomplete offsets are expected to come again.
    """

    def __init__(self, start: OffsetMap) -> None:
        self._taken = start.end  # everything below was taken, or is complete
        # In flight, or expected again after a restart, in ascending order (offsets are only ever added upwards).
        self._incomplete: dict[int, None] = dict.fromkeys(start.incomplete)
        self._expected = start.incomplete
        self._map_end = start.end
        self._next_expected = 0

    @property
    def low_watermark(self) -> int:
        """The lowest offset that is not complete."""
        return next(iter(self._incomplete), self._taken)

    @property
    def in_flight(self) -> int:
        """Offsets that are taken, or expected again, and not complete."""
        return len(self._incomplete)

    def has_room(self, offset: int) -> bool:
        """Whether this offset may be taken: whether the map will fit whatever completes next."""
        return len(self._incomplete) < IN_FLIGHT_LIMIT or offset - self.low_watermark < SPAN_LIMIT

    def fitting(self, offsets: Sequence[int]) -> int:
        """How many of the next offsets, ascending, may be taken together; the first one may."""
        few = max(1, IN_FLIGHT_LIMIT - len(self._incomplete))
        if len(offsets) <= few or offsets[-1] - self.low_watermark < SPAN_LIMIT:
            return len(offsets)
        return max(few, bisect_left(offsets, self.low_watermark + SPAN_LIMIT))

    def take(self, offsets: Sequence[int]) -> list[int]:
        """Take offsets as the reader gives them, ascending; returns the places of those that have to run.

        What lies between them (compacted away, transaction markers, aborted) counts as complete, and so do those
        that the last commit's map says are.
        """
        run: list[int] = []
        for place, offset in enumerate(offsets):
            if offset >= self._taken:
                self._incomplete[offset] = None
                self._taken = offset + 1
                run.append(place)
            elif self._is_expected(offset):
                run.append(place)
        return run

    def _is_expected(self, offset: int) -> bool:
        """Whether the map said that this one is incomplete. Those passed over on the way are not there any more."""
        expected = self._expected
        while self._next_expected < len(expected) and expected[self._next_expected] < offset:
            self._incomplete.pop(expected[self._next_expected], None)
            self._next_expected += 1
        if self._next_expected < len(expected) and expected[self._next_expected] == offset:
            self._next_expected += 1
            return True
        return False

    def still_to_run(self, records: Sequence[Record]) -> Sequence[Record]:
        """Those that the last commit's map does not call complete, for tasks that keep the order and need no take."""
        if not self._expected or records[0].offset >= self._map_end:
            return records
        return [r for r in records if r.offset >= self._map_end or r.offset in self._incomplete]

    def complete(self, offset: int) -> None:
        """This one is complete."""
        self._incomplete.pop(offset, None)

    def complete_all(self, offsets: Iterable[int]) -> None:
        """These are complete."""
        forget = self._incomplete.pop
        for offset in offsets:
            forget(offset, None)

    def pass_over(self, position: int) -> None:
        """The reader stands at ``position`` and gave everything below it: what did not come is not there."""
        self._taken = max(self._taken, position)
        while self._next_expected < len(self._expected) and self._expected[self._next_expected] < position:
            self._incomplete.pop(self._expected[self._next_expected], None)
            self._next_expected += 1

    def snapshot(self) -> Committed:
        """What to commit now."""
        low = self.low_watermark
        return Committed(low, encode_map(OffsetMap(low, self._taken, tuple(self._incomplete))))


# --- the two forms ---------------------------------------------------------------------------------------------


def _runs(low: int, end: int, incomplete: Sequence[int]) -> list[int]:
    """Lengths of alternating runs from ``low`` to ``end``, incomplete first."""
    runs: list[int] = []
    at = low  # everything below is in a run already
    first = 0
    while first < len(incomplete):
        if incomplete[first] > at or not runs:
            runs += [incomplete[first] - at] if runs else []
            at = incomplete[first]
        last = first
        while last + 1 < len(incomplete) and incomplete[last + 1] == incomplete[last] + 1:
            last += 1
        runs.append(incomplete[last] + 1 - at)
        at = incomplete[last] + 1
        first = last + 1
    return [*runs, end - at] if end > at else runs


def _from_runs(low: int, span: int, payload: bytes) -> tuple[int, ...]:
    incomplete: list[int] = []
    at, place, is_complete = low, 0, False
    while place < len(payload):
        length, place = _read_varint(payload, place)
        if at + length > low + span:
            raise ValueError("its runs exceed its span")
        if not is_complete:
            incomplete.extend(range(at, at + length))
        at += length
        is_complete = not is_complete
    if at != low + span:
        raise ValueError("its runs fall short of its span")
    return tuple(incomplete)


def _bits(low: int, span: int, incomplete: Sequence[int]) -> bytes:
    bits = bytearray(b"\xff" * ((span + 7) // 8))
    if span % 8:
        bits[-1] = (1 << span % 8) - 1
    for offset in incomplete:
        bits[(offset - low) // 8] &= ~(1 << (offset - low) % 8) & 0xFF
    return bytes(bits)


def _from_bits(low: int, span: int, payload: bytes) -> tuple[int, ...]:
    if len(payload) != (span + 7) // 8:
        raise ValueError(f"{len(payload)} bytes of bits for {span} offsets")
    return tuple(low + i for i in range(span) if not payload[i // 8] >> i % 8 & 1)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = raw[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
        if shift > 35:
            raise ValueError("a number in it has no end")
