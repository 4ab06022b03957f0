"""Rows as frames and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rowmill.handlers.errors import MisfitError
from rowmill.handlers.frames import (
    frame_of,
    frame_to_rows,
    is_frame,
    join_frames,
    labels_at,
    rows_to_frame,
    select_lines,
    split_result,
)
from rowmill.state.codec import encode


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [{}, {}, {}],
        [{"a": 1, "b": "x", "c": 1.5, "d": True}, {"a": 2, "b": "y", "c": 2.5, "d": False}],
        [{"a": 2**64 - 1}, {"a": 2**63}],
        [{"a": -(2**63)}, {"a": 2**64 - 1}],
        [{"a": None, "b": "x"}, {"a": None, "b": None}],
        [{"a": {"b": [1, {"c": None}]}, "d": []}],
        [{"a": 1}, {"a": "text"}, {"a": None}, {"a": 2.5}],
        [{"ü": "ß", "": "empty name"}],
        [{"a": True}, {"a": None}],
    ],
)
def test_round_trip(rows: list[dict[str, Any]]) -> None:
    """Rows of one shape come back from a frame as they went in, down to the types."""
    found = list(frame_to_rows(rows_to_frame(rows)))
    assert found == rows
    assert repr(found) == repr(rows)


def test_missing_fields_come_back_as_null() -> None:
    """A frame is a rectangle: a field that only some rows have is None in the others, and integers become floats."""
    rows: list[dict[str, Any]] = [{"a": 1, "b": "x"}, {"a": 2}, {"b": "z"}]
    found = list(frame_to_rows(rows_to_frame(rows)))
    assert found == [{"a": 1.0, "b": "x"}, {"a": 2.0, "b": None}, {"a": None, "b": "z"}]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (pd.array([1, None], dtype="Int64"), [1, None]),
        (pd.array([2**64 - 1, None], dtype="UInt64"), [2**64 - 1, None]),
        (pd.array([True, None], dtype="boolean"), [True, None]),
        (pd.array(["x", None], dtype="string"), ["x", None]),
        (pd.array([1.5, None], dtype="Float64"), [1.5, None]),
        (pd.Categorical(["x", None]), ["x", None]),
        (pd.to_datetime(["2024-01-02T03:04:05.000006", "NaT"]), ["2024-01-02T03:04:05.000006", None]),
        (pd.to_datetime(["2024-01-02T03:04:05+02:00", "NaT"]), ["2024-01-02T03:04:05+02:00", None]),
        (pd.to_timedelta(["1 days 02:00:00", None]), ["P1DT2H0M0S", None]),
        (np.array([1, 2], dtype="int8"), [1, 2]),
        (np.array([1.5, np.nan], dtype="float32"), [1.5, None]),
        (np.array([True, False]), [True, False]),
        ([np.nan, None], [None, None]),
        (["x", pd.NA], ["x", None]),
        ([[1, 2], {"a": pd.NaT}], [[1, 2], {"a": pd.NaT}]),
    ],
)
def test_columns_of_every_type(column: Any, values: list[Any]) -> None:
    """numpy numbers become Python's own, dates ISO text, and every kind of missing value None."""
    found = [row["a"] for row in frame_to_rows(pd.DataFrame({"a": pd.Series(column)}))]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame(),
        pd.DataFrame({"a": []}),
        pd.DataFrame(index=[1, 2]),
        pd.DataFrame({1: [1], 2.5: ["x"], None: [None]}),
        pd.DataFrame({("a", "b"): [1]}),
    ],
)
def test_odd_shapes(frame: pd.DataFrame) -> None:
    """Frames without lines, without columns, or with names that are no text give one writable row a line."""
    rows = list(frame_to_rows(frame))
    assert len(rows) == len(frame)
    for row in rows:
        encode(row)
        assert list(row) == [str(name) for name in frame.columns]


def test_doubled_columns() -> None:
    """Two columns of one name are refused, also when only their text is the same."""
    with pytest.raises(MisfitError, match="more than one column named 1, b"):
        frame_to_rows(pd.DataFrame([[1, 2, 3, 4]], columns=["b", "1", "b", 1]))


def test_results_by_row() -> None:
    """Lines go to the row whose label they carry: none, one or several, in the frame's order."""
    frame = rows_to_frame([{"n": n} for n in range(4)])
    lines = frame.iloc[[3, 1, 1, 0]]
    assert split_result(lines, 4) == [{"n": 0}, [{"n": 1}, {"n": 1}], None, {"n": 3}]
    assert split_result(frame.iloc[:0], 4) == [None] * 4
    thrice = frame.iloc[[2, 2, 2]]
    assert split_result(thrice, 4)[2] == [{"n": 2}] * 3


def test_float_labels_that_are_whole() -> None:
    """An index that pandas turned to floats on the way still tells the rows."""
    frame = rows_to_frame([{"n": 0}, {"n": 1}])
    assert split_result(frame.set_axis(frame.index.astype("float64"), axis=0), 2) == [{"n": 0}, {"n": 1}]


def test_what_is_a_frame() -> None:
    """Only a DataFrame is one."""
    assert is_frame(pd.DataFrame())
    others: list[Any] = [None, [], {}, pd.Series([1]), np.zeros(2)]
    assert not any(is_frame(value) for value in others)


def test_frames_for_users() -> None:
    """Results become a frame with the labels asked for, repeats and levels included; empty parts are left out."""
    source = pd.DataFrame({"n": range(4)}, index=pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["x", "y"]))
    labels = labels_at(source, [0, 0, 3])
    assert list(labels) == [("a", 1), ("a", 1), ("b", 2)]
    assert labels.names == ["x", "y"]
    frame = frame_of([{"r": 1}, {"r": 2}, {"r": 3}], labels)
    assert list(frame.index) == list(labels)
    assert select_lines(source, 3)["n"].tolist() == [3]
    assert frame_of([], []).empty
    assert list(frame_of([{"a": 1}], ["label"]).index) == ["label"]
    joined = join_frames([frame, frame.iloc[:0], frame_of([{"s": 1}], ["label"])])
    assert len(joined) == 4
    assert math.isnan(joined["r"].iloc[-1])
    assert join_frames([]).empty
