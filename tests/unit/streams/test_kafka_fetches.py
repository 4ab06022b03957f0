"""What the adapter takes of the client's fetches, against the client's own way with the same bytes."""

from __future__ import annotations

import gc
import struct
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchError, FetchResult, PartitionRecords
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c
from hypothesis import given
from hypothesis import strategies as st
from rowmill.streams.brokers.kafka import _Arrivals

TP = TopicPartition("in", 2)
PRODUCERS = 3
_CRC_AT, _ATTRIBUTES_AT = 17, 21
_CONTROL = 1 << 5

pytestmark = pytest.mark.timeout(60)


class Piece(NamedTuple):
    """A batch: of plain records, of a producer's transaction, or the marker that ends one."""

    kind: str
    producer: int
    rows: int
    gap: int


PIECES = st.lists(
    st.builds(
        Piece,
        st.sampled_from(["plain", "transactional", "commit", "abort"]),
        st.integers(0, PRODUCERS - 1),
        st.integers(1, 5),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
)


def encoded(base: int, piece: Piece) -> bytes:
    """A batch as a broker gives it, beginning at this offset."""
    is_marker = piece.kind in {"commit", "abort"}
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=piece.kind != "plain", producer_id=piece.producer,
        producer_epoch=0, base_sequence=0, batch_size=100_000,
    )  # fmt: skip
    if is_marker:
        builder.append(0, 1_000, struct.pack(">hh", 0, piece.kind == "commit"), b"\x00" * 6, [])
    else:
        for n in range(piece.rows):
            builder.append(n, 1_000 + n, b"k%d" % n if n % 2 else None, b"%d" % (base + n), [("h", b"x")] * (n % 3))
    data = bytearray(builder.build())
    struct.pack_into(">q", data, 0, base)
    if is_marker:
        (attributes,) = struct.unpack_from(">h", data, _ATTRIBUTES_AT)
        struct.pack_into(">h", data, _ATTRIBUTES_AT, attributes | _CONTROL)
        struct.pack_into(">I", data, _CRC_AT, calc_crc32c(bytes(data[_ATTRIBUTES_AT:])))
    return bytes(data)


def log_of(pieces: list[Piece]) -> tuple[bytes, list[tuple[int, int]], int]:
    """A partition's bytes, its aborted transactions (producer and first offset), and its end."""
    data, offset = b"", 0
    aborted: list[tuple[int, int]] = []
    begun: dict[int, int] = {}
    for piece in pieces:
        offset += piece.gap
        data += encoded(offset, piece)
        if piece.kind == "transactional":
            begun.setdefault(piece.producer, offset)
        elif piece.kind != "plain" and piece.producer in begun:
            first = begun.pop(piece.producer)
            if piece.kind == "abort":
                aborted.append((piece.producer, first))
        offset += piece.rows if piece.kind in {"plain", "transactional"} else 1
    return data, aborted, offset


def packed(data: bytes, aborted: list[tuple[int, int]], start: int) -> PartitionRecords:
    """The client's own, as it makes them of a response."""
    return PartitionRecords(TP, MemoryRecords(data), list(aborted), start, None, None, True, READ_COMMITTED)


class Assignment:
    """The client's record of where it stands in the one partition."""

    def __init__(self, position: int) -> None:
        self.active = True
        self.paused = False
        self.position = position

    def state_value(self, _: Any) -> Any:
        """As the client's."""
        return self

    def consumed_to(self, position: int) -> None:
        """As the client's."""
        self.position = position


def arrived(records: PartitionRecords, assignment: Assignment) -> tuple[_Arrivals, Any]:
    """A fetch that has come in."""
    arrivals = _Arrivals()
    arrivals[TP] = FetchResult(TP, assignment=assignment, partition_records=records, backoff=0)
    return arrivals, arrivals[TP]


def shown(records: list[Any]) -> list[Any]:
    """All that a record says."""
    return [(r.offset, r.timestamp, r.key, r.value, tuple(r.headers)) for r in records]


@given(pieces=PIECES, start=st.integers(0, 20), most=st.integers(1, 9))
def test_the_same_records_as_the_client(pieces: list[Piece], start: int, most: int) -> None:
    """In whatever pieces they are taken: the same records, from the same offset on, and the same position at the end.

    Control batches and aborted transactions are passed over, a batch is begun in its middle where the fetch began
    there, and at every moment the position is behind what was taken and not behind what was not.
    """
    data, aborted, end = log_of(pieces)
    start = min(start, end)
    theirs = packed(data, aborted, start)
    expected = list(theirs)
    assignment = Assignment(start)
    _, fetched = arrived(packed(data, aborted, start), assignment)
    found: list[Any] = []
    while fetched.has_more():
        taken = fetched.getall(most)
        assert len(taken) == min(most, len(expected) - len(found))
        found += taken
        left = expected[len(found) :]
        assert not taken or assignment.position > taken[-1].offset
        assert not left or assignment.position <= left[0].offset
    assert shown(found) == shown(expected)
    assert assignment.position == theirs.next_fetch_offset


def test_what_is_not_wanted_any_more() -> None:
    """After a seek, a pause or a new assignment nothing is given, and what was fetched is let go."""
    data, _, _ = log_of([Piece("plain", 0, 5, 0)])
    for change in ({"position": 3}, {"paused": True}, {"active": False}):
        assignment = Assignment(0)
        _, fetched = arrived(packed(data, [], 0), assignment)
        assert [record.offset for record in fetched.getall(2)] == [0, 1]
        vars(assignment).update(change)
        assert fetched.getall(2) == []
        assert not fetched.has_more()


def test_a_damaged_batch() -> None:
    """It is refused with the client's error; what lies before it can still be had, and the position stays there."""
    good, bad = encoded(0, Piece("plain", 0, 3, 0)), bytearray(encoded(3, Piece("plain", 0, 3, 0)))
    bad[-1] ^= 1
    assignment = Assignment(0)
    _, fetched = arrived(packed(good + bytes(bad), [], 0), assignment)
    with pytest.raises(kafka_errors.CorruptRecordException):
        fetched.getall(10)
    assert assignment.position == 0
    assert [record.offset for record in fetched.getall(10)] == [0, 1, 2]
    assert assignment.position == 3


def test_what_is_taken_is_let_go() -> None:
    """Without the garbage collector's help: of what was fetched, megabytes of it, nothing stays behind."""
    data, _, _ = log_of([Piece("plain", 0, 5, 0)] * 3)
    theirs = packed(data, [], 0)
    arrivals, fetched = arrived(theirs, Assignment(0))
    kept = [weakref.ref(theirs), weakref.ref(fetched._partition_records), weakref.ref(fetched)]
    gc.disable()
    try:
        del theirs
        assert len(fetched.getall(4)) == 4
        assert kept[0]() is None
        assert len(fetched.getall(100)) == 11
        assert kept[1]() is None
        del fetched, arrivals[TP]
        assert kept[2]() is None
    finally:
        gc.enable()


def test_errors_stay_as_they_are() -> None:
    """What the client keeps in place of records is left alone."""
    error = FetchError(error=kafka_errors.KafkaError(), backoff=0)
    arrivals = _Arrivals({TP: SimpleNamespace()})
    arrivals[TP] = error
    assert arrivals[TP] is error
