"""Events as JSON: what is written is read, and nothing that lies in the topic can stop a reader."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rowmill.state.codec import dumps, encode, loads
from rowmill.streams.event_records import EventRecord, plain

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
YEAR_1, YEAR_9999 = -62_135_596_800_000, 253_402_300_799_999
RECORDS = st.builds(
    EventRecord,
    kind=TEXTS.filter(bool),
    at_ms=st.integers(YEAR_1, YEAR_9999),
    pipeline=TEXTS,
    session=TEXTS,
    group=TEXTS.filter(bool),
    worker=TEXTS,
    host=TEXTS,
    pid=st.integers(0, 2**31),
    subject=TEXTS,
    data=st.dictionaries(TEXTS, JSON, max_size=4),
    version=st.integers(1, 9),
)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    JSON
    | st.binary(max_size=5)
    | st.text(max_size=3)
    | st.integers()
    | st.floats()
    | st.decimals()
    | st.datetimes()
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(TEXTS | st.integers() | st.tuples(TEXTS), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(RECORDS)
def test_what_is_written_is_read(record: EventRecord) -> None:
    """All fields come back, to the millisecond."""
    assert EventRecord.decode(record.encode()) == record


@given(RECORDS, st.dictionaries(TEXTS, JSON, max_size=4))
def test_fields_of_tomorrow_change_nothing(record: EventRecord, more: dict[str, Any]) -> None:
    """A reader of today passes over what it does not know."""
    known = loads(record.encode())
    assert EventRecord.decode(dumps({**more, **known})) == record


@given(RECORDS, st.data())
def test_a_field_may_hold_anything(record: EventRecord, data: st.DataObject) -> None:
    """One field of another type gives an event without it, or none at all; never an error."""
    fields = loads(record.encode())
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)
    read = EventRecord.decode(dumps(fields))
    assert read is None or EventRecord.decode(read.encode()) == read


@given(st.binary(max_size=60) | JSON.map(dumps))
def test_any_value_may_lie_there(value: bytes) -> None:
    """Whatever is no event is None."""
    read = EventRecord.decode(value)
    assert read is None or read.kind


@given(ANYTHING)
def test_anything_becomes_json(value: Any) -> None:
    """Details that JSON has no form for become something that it has, and plain ones stay as they are."""
    text = encode({"data": plain(value)})
    assert loads(encode({"data": plain(loads(text)["data"])})) == loads(text)
