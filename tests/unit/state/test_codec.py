"""What is a row and what is not, at every boundary."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pytest
from rowmill.state.codec import MAX_DEPTH, decode, decode_all, dumps, encode, encode_all, loads
from rowmill.state.errors import BadRowError

LARGEST, SMALLEST = 2**64 - 1, -(2**63)


def nested(levels: int) -> dict[str, Any]:
    """A row of so many levels, itself included: objects and arrays by turns."""
    value: Any = 1
    for level in range(levels - 1):
        value = [value] if level % 2 else {"n": value}
    return {"n": value}


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (None, "null_value", "tombstone"),
        (b"{" + b" " * 1000 + b"}", "too_large", "1,002 bytes, above max_row_bytes=1,000"),
        (b"", "not_json", "not JSON"),
        (b"{", "not_json", "not JSON"),
        (b"{} {}", "not_json", "not JSON"),
        (b"\xef\xbb\xbf{}", "not_json", "not JSON"),
        (b"{'a': 1}", "not_json", "not JSON"),
        (b'{"a": NaN}', "not_json", "not JSON"),
        (b'{"a": -Infinity}', "not_json", "not JSON"),
        (b'{"a": 01}', "not_json", "not JSON"),
        (b'{"a": "\\ud800"}', "not_json", "not JSON"),
        (b'{"a": "\xff"}', "invalid_utf8", "at byte 7"),
        (b"\x80", "invalid_utf8", "at byte 0"),
        (b"[]", "not_an_object", "array"),
        (b'"text"', "not_an_object", "string"),
        (b"true", "not_an_object", "boolean"),
        (b"1", "not_an_object", "number"),
        (b"1.5", "not_an_object", "number"),
        (b"null", "not_an_object", "null"),
        (dumps(nested(MAX_DEPTH + 1)), "too_deep", "128"),
        (b'{"a": 18446744073709551616}', "integer_out_of_range", "18446744073709551616"),
        (b'{"a": -9223372036854775809}', "integer_out_of_range", "as a string"),
        (b'{"a": [1, {"b": 99999999999999999999}]}', "integer_out_of_range", "99999999999999999999"),
        (b'{"a": ' + b"9" * 300 + b"}", "integer_out_of_range", "…"),
        (b'{"a": ' + b"9" * 500 + b"}", "not_json", "infinity"),  # no double holds it: the parser refuses first
    ],
)
def test_what_is_no_row(value: bytes | None, kind: str, says: str) -> None:
    """Each way of being no row has its kind and a sentence for a person."""
    with pytest.raises(BadRowError) as caught:
        decode(value, 1_000)
    assert caught.value.kind == kind
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"a": None, "b": [], "c": {}, "": ""},
        {"a": LARGEST, "b": SMALLEST, "c": 2**63, "d": [LARGEST, {"e": SMALLEST}]},
        {"digits in a text": "9" * 40},
        {"9" * 40: "digits in a name"},
        {"text with an escape": '\\" 18446744073709551616 \u2028'},
        {"a": 1.2345678901234567, "b": 1e22, "c": 5e-324},
        nested(MAX_DEPTH),
        {"brackets in a text": "[{" * 500},
        {"wide": [{}] * 200},
    ],
)
def test_what_is_a_row(row: dict[str, Any]) -> None:
    """Rows up to every limit come back as they were."""
    assert decode(json.dumps(row).encode(), 10_000) == row
    assert decode(encode(row), 10_000) == row


def test_long_mantissas_are_floats() -> None:
    """Nineteen digits behind a point are a float like any other: only integers are refused."""
    assert decode(b'{"a": 0.1234567890123456789, "b": 123456789012345678901.0}', 100) == {
        "a": 0.1234567890123456789,
        "b": 123456789012345678901.0,
    }


def test_byte_limit_is_inclusive() -> None:
    """A value of exactly the limit passes, one byte more does not."""
    assert decode(b'{"a":1}', 7) == {"a": 1}
    with pytest.raises(BadRowError, match="7 bytes, above max_row_bytes=6"):
        decode(b'{"a":1}', 6)


@pytest.mark.parametrize(("levels", "limit", "fits"), [(1, 1, True), (2, 1, False), (200, 200, True), (3, 2, False)])
def test_depth_limit_counts_the_row(levels: int, limit: int, fits: bool) -> None:
    """The row itself is level one, and the limit is inclusive."""
    value = encode(nested(levels))
    if fits:
        assert decode(value, 10_000, limit) == nested(levels)
    else:
        with pytest.raises(BadRowError, match=f"deeper than {limit} levels"):
            decode(value, 10_000, limit)


def test_last_duplicate_wins() -> None:
    """Of a repeated name the last value counts, as in orjson and JavaScript."""
    assert decode(b'{"a": 1, "b": 2, "a": 3}', 100) == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.int64(7), 7),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC), "2024-01-02T03:04:05+00:00"),
        (date(2024, 1, 2), "2024-01-02"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ((1, 2), [1, 2]),
        (float("nan"), None),
        (float("inf"), None),
    ],
)
def test_more_than_json_is_written(value: Any, written: Any) -> None:
    """numpy, dates and UUIDs are written in the obvious form; what JSON has no number for becomes null."""
    assert loads(encode({"a": value})) == {"a": written}


@pytest.mark.parametrize(
    "value",
    [
        {"a": object()},
        {"a": {1, 2}},
        {"a": b"bytes"},
        {1: "a"},
        {"a": 2**64},
        {"a": -(2**63) - 1},
        {"a": "\ud800"},
        {"a": 1 + 2j},
        nested(300),
        {"a": np.array(["text"], dtype=object)},
    ],
)
def test_what_cannot_be_written(value: Any) -> None:
    """A result that JSON has no form for, or that nobody could read again, is refused by kind."""
    with pytest.raises(BadRowError) as caught:
        encode(value)
    assert caught.value.kind == "unserialisable"
    assert str(caught.value).startswith("the result cannot be written as JSON: ")


def test_a_row_that_holds_itself() -> None:
    """Endless rows are refused, not followed."""
    row: dict[str, Any] = {}
    row["self"] = row
    with pytest.raises(BadRowError):
        encode(row)


def test_odd_values_far_back_in_a_lot() -> None:
    """However many rows come before it, a value that cannot be taken as it is has the lot looked at one by one."""
    plain = [encode({"n": n}) for n in range(200)]
    assert decode_all(plain, 100) == [{"n": n} for n in range(200)]
    for odd in (b'{"n":%d}' % 2**64, b'{"n":' * 200 + b"1" + b"}" * 200, b'{"n":"' + b"x" * 100 + b'"}', b"[1]", None):
        assert decode_all([*plain, odd], 100) is None
    many = encode({"n": [[1]] * 200})
    assert decode_all([*plain, many], 10_000) == [*({"n": n} for n in range(200)), {"n": [[1]] * 200}]


def test_a_lot_is_written_at_once() -> None:
    """Rows are written as they are one by one; one that cannot be is told."""
    rows = [{"n": n, "t": np.int64(n)} for n in range(3)]
    assert encode_all(rows) == [encode(row) for row in rows]
    with pytest.raises(BadRowError, match="set"):
        encode_all([*rows, {"n": {1}}])
