"""Reads one record of Kafka's log format (magic 2) when the client's own parser refuses it.

The client decodes header names as UTF-8 and fails the whole batch on one that is not, for ever (FACTS, "Fetch").
Here such a name is kept with surrogate escapes, so that the row can become a dead letter and the others go on.
Format: https://kafka.apache.org/documentation/#record.
"""

from __future__ import annotations

from typing import NamedTuple

from ...state.model import Headers


class RawRecord(NamedTuple):
    """A record as it stands in its batch; ``end`` is where the next one begins."""

    offset_delta: int
    timestamp_delta: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    end: int


def read_record(buffer: bytes | bytearray, start: int) -> RawRecord:
    """The record that begins at ``start``.

    Raises:
        ValueError: the lengths in it do not add up.
    """
    length, at = _varint(buffer, start)
    end = at + length
    at += 1  # attributes: none are defined
    timestamp_delta, at = _varint(buffer, at)
    offset_delta, at = _varint(buffer, at)
    key, at = _nullable(buffer, at)
    value, at = _nullable(buffer, at)
    count, at = _varint(buffer, at)
    headers: list[tuple[str, bytes | None]] = []
    for _ in range(count):
        name, at = _nullable(buffer, at)
        content, at = _nullable(buffer, at)
        headers.append(((name or b"").decode("utf-8", "surrogateescape"), content))
    if at != end or end > len(buffer):
        raise ValueError(f"a record of {length} bytes at {start} ends at {at}")
    return RawRecord(offset_delta, timestamp_delta, key, value, tuple(headers), end)


def _nullable(buffer: bytes | bytearray, at: int) -> tuple[bytes | None, int]:
    length, at = _varint(buffer, at)
    if length < 0:
        return None, at
    return bytes(buffer[at : at + length]), at + length


def _varint(buffer: bytes | bytearray, at: int) -> tuple[int, int]:
    """A zig-zag variable-length integer: seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
        shift += 7
        if shift > 63:
            raise ValueError(f"an integer at {at} has no end")
