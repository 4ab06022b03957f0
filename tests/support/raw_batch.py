"""Writes a record batch with header names that are not UTF-8, which no Python client would send."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.util import calc_crc32c
from rowmill.state.clock import SystemClock


async def raw_header_batch(bootstrap: str, topic: str, rows: Sequence[tuple[bytes, bytes]]) -> None:
    """Send ``(value, header name)`` rows to partition 0 as one batch, each with that header and the value "value"."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    try:
        batch = _Raw(batch_size=1, compression_type=0)
        batch.raw = _encode(rows)
        batch.count = len(rows)
        await (await producer.send_batch(batch, topic, partition=0))
    finally:
        await producer.stop()


class _Raw(BatchBuilder):  # type: ignore[misc]
    """A batch whose bytes are given."""

    raw: bytes
    count: int

    def _build(self) -> bytes:
        self._closed = True
        self._buffer = self.raw
        return self.raw

    def record_count(self) -> int:
        return self.count


def _varint(number: int) -> bytes:
    """Zig-zag, seven bits a byte, the lowest first."""
    number = (number << 1) ^ (number >> 63)
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(0x80 | (number & 0x7F))
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _record(delta: int, value: bytes, name: bytes) -> bytes:
    body = b"\x00" + _varint(0) + _varint(delta) + _varint(-1) + _varint(len(value)) + value
    body += _varint(1) + _varint(len(name)) + name + _varint(5) + b"value"
    return _varint(len(body)) + body


def _encode(rows: Sequence[tuple[bytes, bytes]]) -> bytes:
    """https://kafka.apache.org/documentation/#recordbatch, without compression, producer or transaction."""
    records = b"".join(_record(delta, value, name) for delta, (value, name) in enumerate(rows))
    now = SystemClock().now_ms()
    tail = struct.pack(">hiqqqhii", 0, len(rows) - 1, now, now, -1, -1, -1, len(rows))
    tail += records
    return struct.pack(">qiibI", 0, len(tail) + 9, 0, 2, calc_crc32c(tail)) + tail
