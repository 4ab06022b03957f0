"""Rows as a DataFrame and back: the one file that knows pandas.

A frame's index says which row of the batch each line belongs to. The labels start at a number that no
``reset_index`` would produce, so that a handler which loses the index is found out instead of believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from ..state.model import Row
from .errors import MisfitError

if TYPE_CHECKING:
    import pandas as pd

_FIRST_LABEL = 1 << 32


def rows_to_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """A frame of a batch: a line per row, labelled by its place in the batch. Missing fields are missing values."""
    import pandas as pd

    index = pd.RangeIndex(_FIRST_LABEL, _FIRST_LABEL + len(rows), name="row")
    return pd.DataFrame(list(rows), index=index)


def split_result(result: Any, rows: int) -> list[Row | list[Row] | None]:
    """What a frame handler returned, by input row: none (dropped), one, or several.

    Raises:
        MisfitError: no frame, or a label that is not one of the input's.
    """
    if not is_frame(result):
        raise MisfitError(f"a frame stage returns a DataFrame; got {type(result).__name__}")
    places = [_place(label, rows) for label in result.index]
    outcomes: list[Row | list[Row] | None] = [None] * rows
    for place, row in zip(places, frame_to_rows(result), strict=True):
        present = outcomes[place]
        if present is None:
            outcomes[place] = row
        elif isinstance(present, list):
            present.append(row)
        else:
            outcomes[place] = [present, row]
    return outcomes


def _place(label: Any, rows: int) -> int:
    try:
        place = int(label) - _FIRST_LABEL if int(label) == label else -1
    except (TypeError, ValueError, OverflowError):
        place = -1
    if not 0 <= place < rows:
        raise MisfitError(
            f"the returned frame has the index label {label!r}, which the input did not have; keep the input's index "
            "(no reset_index, no set_index): it says which row each line belongs to"
        )
    return place


def frame_to_rows(frame: pd.DataFrame) -> Iterator[Row]:
    """The lines of a frame as rows: missing values as None, dates as ISO text, numpy numbers as Python's own.

    Raises:
        MisfitError: two columns of one name, of which a row could keep only one.
    """
    import pandas as pd

    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise MisfitError(f"the frame has more than one column named {', '.join(doubled)}; rename them")
    columns = [_plain_values(pd, frame.iloc[:, i]) for i in range(len(names))]
    if not columns:
        return iter([{} for _ in range(len(frame))])
    return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def _plain_values(pd: Any, column: Any) -> list[Any]:
    values = column.tolist()  # numpy numbers become Python's own here
    if column.dtype.kind in "iub" and not pd.api.types.is_extension_array_dtype(column.dtype):
        return list(values)
    return [_plain_value(pd, value) for value in values]


def _plain_value(pd: Any, value: Any) -> Any:
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):  # noqa: PLR0124
        return None
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    if isinstance(value, pd.Timedelta):
        return value.isoformat()
    return value


def is_frame(value: Any) -> TypeGuard[pd.DataFrame]:
    """Whether a value is a DataFrame, without importing pandas for those that never used it."""
    import sys

    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def frame_of(rows: Iterable[Row], index: Any = None) -> pd.DataFrame:
    """A frame for the user, with the index given (any sequence of labels)."""
    import pandas as pd

    frame = pd.DataFrame(list(rows))
    if index is not None:
        frame.index = index if isinstance(index, pd.Index) else pd.Index(index)
    return frame


def select_lines(frame: pd.DataFrame, first: int) -> pd.DataFrame:
    """The lines of a frame from place ``first`` on."""
    return frame.iloc[first:]


def labels_at(frame: pd.DataFrame, places: Sequence[int]) -> pd.Index:
    """The index labels at these places, repeats included, names and levels kept."""
    return frame.index.take(list(places))


def join_frames(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Frames one below the other, their indexes kept; an empty frame for none."""
    import pandas as pd

    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled) if filled else pd.DataFrame()
