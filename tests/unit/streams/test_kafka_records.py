"""Kafka's record format, read by hand when the client gives up."""

from __future__ import annotations

import pytest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from hypothesis import given
from hypothesis import strategies as st
from rowmill.streams.brokers.kafka_records import RawRecord, read_record

HEAD = 61
"""Bytes of a batch before its first record."""

BYTES = st.none() | st.binary(max_size=200)
RECORDS = st.lists(
    st.tuples(st.integers(0, 2**40), BYTES, BYTES, st.lists(st.tuples(st.text(max_size=5), BYTES), max_size=3)),
    min_size=1,
    max_size=5,
)


def batch_of(records: list[tuple[int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]]) -> bytes:
    """A batch as aiokafka writes it."""
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=-1,
        batch_size=1 << 20,
    )  # fmt: skip
    for offset, (timestamp, key, value, headers) in enumerate(records):
        builder.append(offset, timestamp, key, value, headers)
    return bytes(builder.build())


@given(RECORDS)
def test_reads_what_aiokafka_writes(
    records: list[tuple[int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]],
) -> None:
    """Keys, values, headers, offsets and times come out as the client put them in."""
    buffer, at, first = batch_of(records), HEAD, records[0][0]
    for offset, (timestamp, key, value, headers) in enumerate(records):
        found = read_record(buffer, at)
        assert found == RawRecord(offset, timestamp - first, key, value, tuple(headers), found.end)
        at = found.end
    assert at == len(buffer)


def test_header_names_that_are_not_utf8() -> None:
    """A name of other bytes is kept with surrogate escapes, so that it can be told and written again."""
    buffer = batch_of([(0, b"k", b"v", [("ab", b"x")])]).replace(b"ab", b"\xffb")
    (header,) = read_record(buffer, HEAD).headers
    assert header == ("\udcffb", b"x")
    assert header[0].encode("utf-8", "surrogateescape") == b"\xffb"


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_lengths_that_do_not_add_up(cut: int) -> None:
    """A record cut short, or whose parts do not fill its length, is a ValueError or IndexError, never a wrong row."""
    buffer = batch_of([(0, b"key", b"value", [("h", b"x")])])
    with pytest.raises((ValueError, IndexError)):
        read_record(buffer[:-cut], HEAD)


def test_endless_integers() -> None:
    """An integer without an end is refused."""
    with pytest.raises(ValueError, match="has no end"):
        read_record(b"\xff" * 20, 0)
