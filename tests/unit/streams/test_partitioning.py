"""A key goes where Kafka's own clients send it."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import murmur2 as aiokafka_murmur2
from hypothesis import given
from hypothesis import strategies as st
from rowmill.streams import partitioning
from rowmill.streams.partitioning import Partitioner, murmur2, partition_for


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_known_vectors(key: bytes, expected: int) -> None:
    """The hashes that Apache Kafka's UtilsTest pins down come out, sign included."""
    assert murmur2(key) == expected


@given(st.binary(max_size=200))
def test_agrees_with_aiokafka(key: bytes) -> None:
    """Any key hashes as aiokafka hashes it, whatever its length modulo four."""
    assert murmur2(key) & 0xFFFFFFFF == aiokafka_murmur2(key) & 0xFFFFFFFF


@given(st.binary(max_size=64), st.integers(1, 1000))
def test_partition_is_in_range(key: bytes, partitions: int) -> None:
    """The partition exists, and is the positive hash modulo the number of partitions."""
    assert partition_for(key, partitions) == (aiokafka_murmur2(key) & 0x7FFFFFFF) % partitions


def test_partitioner_agrees_and_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache changes no answer and never holds more than its bound."""
    monkeypatch.setattr(partitioning, "_CACHED_KEYS", 8)
    partitioner = Partitioner(7)
    keys = [b"key-%d" % (n % 30) for n in range(100)]
    assert [partitioner.partition(key) for key in keys] == [partition_for(key, 7) for key in keys]
    assert len(partitioner._known) <= 8
