"""Which partition a key belongs to: the answer that Kafka's Java client gives.

Every client that shares a topic must agree, or a key's rows part ways and their order is gone. The hash is
Austin Appleby's MurmurHash2 with the seed and the sign handling that Kafka's default partitioner settled on.
"""

from __future__ import annotations

from struct import unpack_from

_SEED = 0x9747B28C
_MULTIPLIER = 0x5BD1E995
_32_BITS = 0xFFFFFFFF
_CACHED_KEYS = 16_384
_CACHED_KEY_BYTES = 256


def murmur2(key: bytes) -> int:
    """MurmurHash2 of ``key`` as a signed 32-bit integer, as Kafka's ``Utils.murmur2`` returns it."""
    length = len(key)
    words = length >> 2
    # Bits above the 32nd never reach those below in a product or xor: one mask per round is enough.
    state = _SEED ^ length
    for word in unpack_from(f"<{words}I", key):
        mixed = word * _MULTIPLIER & _32_BITS
        state = (state * _MULTIPLIER ^ (mixed ^ mixed >> 24) * _MULTIPLIER) & _32_BITS
    if length & 3:
        state = (state ^ int.from_bytes(key[words << 2 :], "little")) * _MULTIPLIER & _32_BITS
    state = (state ^ state >> 13) * _MULTIPLIER & _32_BITS
    state ^= state >> 15
    return state - (state >> 31 << 32)


def partition_for(key: bytes, partitions: int) -> int:
    """The partition of ``key`` in a topic of so many partitions.

    The sign bit is dropped rather than negated (Kafka's ``toPositive``), so that the smallest integer works.
    """
    return (murmur2(key) & 0x7FFFFFFF) % partitions


class Partitioner:
    """:func:`partition_for` of one topic, remembering the keys it met.

    Keys repeat and hashing in Python costs about a microsecond, so answers are kept: at most 16,384 of them,
    all forgotten when there is no more room (cheaper than counting who was used last).
    """

    __slots__ = ("_known", "partitions")

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self._known: dict[bytes, int] = {}

    def partition(self, key: bytes) -> int:
        """The partition of ``key``."""
        if len(key) > _CACHED_KEY_BYTES:
            return partition_for(key, self.partitions)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _CACHED_KEYS:
                self._known.clear()
            known = self._known[key] = partition_for(key, self.partitions)
        return known
