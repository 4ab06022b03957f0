"""Any row survives being written and read, and nothing a sender writes makes the codec fall over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill.state.codec import decode, decode_all, encode
from rowmill.state.errors import BadRowError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
ROWS = st.dictionaries(TEXT, VALUES, max_size=5)

KINDS = {"not_json", "invalid_utf8", "not_an_object", "too_large", "too_deep", "integer_out_of_range"}


@given(ROWS)
def test_round_trip(row: dict[str, Any]) -> None:
    """What was written is what is read, down to the types."""
    found = decode(encode(row), 1 << 20)
    assert found == row
    assert repr(found) == repr(row)


@given(st.binary(max_size=60) | st.text('{}[]",:0123456789.eE-ntfu\\ ', max_size=40).map(str.encode))
def test_anything_at_all(value: bytes) -> None:
    """Arbitrary bytes are a row or a BadRowError of a known kind, and a row can be written again."""
    try:
        row = decode(value, 50)
    except BadRowError as error:
        kind: str | None = error.kind
    else:
        kind = None
        assert decode(encode(row), 1 << 10) == row
    assert kind in {None, *KINDS}


@given(st.integers(-(2**70), 2**70), st.integers(0, 3))
def test_integers_keep_their_digits(number: int, depth: int) -> None:
    """An integer is read exactly or refused; it never becomes a nearby float."""
    text = b'{"a":' + b"[" * depth + str(number).encode() + b"]" * depth + b"}"
    if -(2**63) <= number < 2**64:
        value = decode(text, 200)["a"]
        for _ in range(depth):
            (value,) = value
        assert value == number
        assert type(value) is int
    else:
        with pytest.raises(BadRowError) as caught:
            decode(text, 200)
        assert caught.value.kind == "integer_out_of_range"


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
def test_numpy_is_written_like_python(numbers: list[int]) -> None:
    """An array and its scalars give the same text as the list they were made of."""
    array = np.array(numbers)
    assert encode({"a": array, "b": array[0]}) == encode({"a": numbers, "b": numbers[0]})


@given(
    st.lists(
        ROWS.map(encode)
        | st.binary(max_size=20)
        | st.text('{}[]",:0123456789.eE- ', max_size=30).map(str.encode)
        | st.integers(-(2**70), 2**70).map(lambda number: b'{"n":%d}' % number)
        | st.integers(1, 12).map(lambda depth: b'{"n":' * depth + b"1" + b"}" * depth)
        | st.none(),
        max_size=6,
    )
)
def test_all_at_once(values: list[bytes | None]) -> None:
    """A lot is decoded at once to what its values are one by one, and only where all of them are rows."""
    rows: list[Any] | None = []
    try:
        rows = [decode(value, 50, 10) for value in values]
    except BadRowError:
        rows = None
    assert repr(decode_all(values, 50, 10)) == repr(rows)
