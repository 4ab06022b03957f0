"""Schemas: what our own validator says of a dataclass is what strict pydantic says of the same model."""

from __future__ import annotations

import dataclasses
import typing
from datetime import date
from enum import Enum
from typing import Any, Literal, Union, cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill.handlers.errors import SchemaError
from rowmill.handlers.schema import make_validator

pydantic = pytest.importorskip("pydantic", reason="the extra rowmill[pydantic] is not installed")


class Letter(Enum):
    """Choices."""

    A = "a"
    B = "b"


SIMPLE = [str, int, float, bool, type(None), Any, Literal["a", "x"], Letter, date, UUID]
TEXTS = ["", "a", "b", "x", "2026-01-31", "12345678-1234-5678-1234-567812345678"]
LIST, DICT, TUPLE, UNION = (cast("Any", kind) for kind in (typing.List, typing.Dict, typing.Tuple, Union))  # noqa: UP006
"""Types to be, which type checkers would take for types that are."""
NUMBERS = st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False)

hints = st.recursive(
    st.sampled_from(SIMPLE),
    lambda inner: st.one_of(
        inner.map(LIST.__getitem__),
        inner.map(lambda hint: DICT[str, hint]),
        inner.map(lambda hint: UNION[hint, None]),
        st.tuples(inner, inner).map(UNION.__getitem__),
        st.tuples(inner, inner).map(TUPLE.__getitem__),
        inner.map(lambda hint: TUPLE[hint, ...]),
    ),
    max_leaves=5,
)
leaves = st.none() | st.booleans() | NUMBERS | st.sampled_from(TEXTS)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


def fitting(hint: Any) -> st.SearchStrategy[Any]:
    """Values that mostly fit a type, so that both answers are tried often."""
    origin, inner = typing.get_origin(hint), [fitting(one) for one in typing.get_args(hint) if hint is not SIMPLE[6]]
    if origin is list or (origin is tuple and typing.get_args(hint)[1] is Ellipsis):
        return st.lists(inner[0], max_size=3)
    if origin is dict:
        return st.dictionaries(st.sampled_from("ab"), inner[1], max_size=2)
    if origin is Union:
        return st.one_of(inner)
    if origin is tuple:
        return st.tuples(*inner).map(list)
    return {str: st.sampled_from(TEXTS), int: st.integers(-9, 9), float: NUMBERS}.get(hint, leaves)


def verdict(schema: Any, row: dict[str, Any]) -> str:
    """What is amiss; "" if nothing."""
    try:
        assert make_validator(schema).check(row) is row
    except SchemaError as error:
        return str(error)
    return ""


@given(st.data())
def test_we_agree_with_pydantic(data: st.DataObject) -> None:
    """Any type and any value: it fits both or neither."""
    hint = data.draw(hints)
    row = {"value": data.draw(values | fitting(hint))}
    ours = verdict(dataclasses.make_dataclass("Ours", [("value", hint)]), row)
    theirs = verdict(pydantic.create_model("Theirs", value=(hint, ...)), row)
    assert bool(ours) == bool(theirs), f"{hint}: {row}: {ours or 'fits'}; {theirs or 'fits'}"
