"""Whatever rows are written to a file are read from it again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill.state.codec import encode, loads
from rowmill.streams.csv_input import read_csv
from rowmill.streams.inputs import FileInput
from rowmill.streams.outputs import write_results

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CELL = TEXT | st.sampled_from(["007", "1", "1e5", "NA", "true", "", '"', "a,b", "x\ny", "1" * 19, "-0", " "])
NUMBERS = st.integers(-(10**17), 10**17) | st.none()
ROWS = st.lists(st.fixed_dictionaries({"a": TEXT | st.none(), "b": NUMBERS, "c": st.booleans() | st.none()}))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@given(rows=ROWS)
@settings(max_examples=25)
def test_written_and_read(ending: str, rows: list[dict[str, Any]]) -> None:
    """JSON lines and Parquet give the very same rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out{ending}"
        assert write_results(path, lambda: iter([encode(row) for row in rows])) == len(rows)
        assert [loads(row.value) for row in FileInput(path).rows(0)] == rows


@given(st.lists(st.tuples(CELL, CELL), max_size=6))
def test_csv_keeps_every_cell(cells: list[tuple[str, str]]) -> None:
    """Cells come back as the text they were, as nothing, or as a value that is written the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.csv"
        rows = [encode({"a": f"text {a}", "b": b}) for a, b in cells]
        write_results(path, lambda: iter(rows))
        found = list(read_csv(path, ".csv").pieces()) if cells else []
    assert [piece.error for piece in found] == [None] * len(cells)
    for piece, (a, b) in zip(found, cells, strict=True):
        assert piece.row is not None
        assert piece.row["a"] == f"text {a}"
        value = piece.row["b"]
        if value is None:
            assert b in {"", "NA"}
        elif isinstance(value, str):
            assert value == b
        else:
            assert float(b) == value if not isinstance(value, bool) else b.lower() == str(value).lower()


@given(st.binary(max_size=60))
def test_every_line_is_accounted_for(content: bytes) -> None:
    """Reading never raises; without quotes each line that is not empty is one row or one broken piece."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.csv"
        path.write_bytes(b"a,b\n" + content)
        pieces = list(read_csv(path, ".csv").pieces())
    assert all((piece.row is None) == (piece.error is not None) for piece in pieces)
    if b'"' not in content and b"\r" not in content:
        lines = [line for line in content.split(b"\n") if line]
        assert len(pieces) == len(lines)
        for piece, line in zip(pieces, lines, strict=True):
            assert piece.row is not None or piece.raw == line
