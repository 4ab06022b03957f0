"""Result files: what is written can be read, and nothing half-written is left."""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from rowmill.state.codec import dumps, encode, loads
from rowmill.streams.errors import InputError
from rowmill.streams.inputs import FileInput
from rowmill.streams.outputs import Values, check_output, write_results

ROWS: list[dict[str, Any]] = [
    {"id": 1, "text": 'quote " and, comma', "score": 0.5, "ok": True},
    {"id": 2, "text": "line\nbreak", "score": None, "ok": False},
    {"id": 3, "text": "ünïcode \u2028", "score": -1e-9, "ok": None},
    {"id": 4, "text": "\r carriage \r returns\r", "score": 0.0, "ok": True},
]
ENDINGS = [".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".tsv.gz"]


def values_of(rows: list[Any]) -> Values:
    """Rows as the results' texts."""
    return lambda: iter([encode(row) for row in rows])


def listing(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_round_trip(tmp_path: Path, ending: str) -> None:
    """A file of every kind gives back the rows that went into it, and is alone in its folder."""
    path = tmp_path / f"out{ending}"
    assert write_results(path, values_of(ROWS)) == 4
    assert [loads(row.value) for row in FileInput(path).rows(0)] == ROWS
    assert listing(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_results(tmp_path: Path, ending: str) -> None:
    """No results make an empty file, of its kind."""
    path = tmp_path / f"out{ending}"
    assert write_results(path, values_of([])) == 0
    if ending == ".parquet":
        assert pq.read_table(path).num_rows == 0
    else:
        assert (gzip.decompress(path.read_bytes()) if ending.endswith(".gz") else path.read_bytes()) == b""


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_rows_of_different_shapes(tmp_path: Path, ending: str) -> None:
    """Columns are those of all rows in the order of their first appearance; what a row lacks is missing."""
    path = tmp_path / f"out{ending}"
    write_results(path, values_of([{"b": 1}, {}, {"a": 2, "b": 3}, {"c": None}]))
    frame = pd.read_parquet(path) if ending == ".parquet" else pd.read_csv(path, skip_blank_lines=False)
    assert list(frame.columns) == ["b", "a", "c"]
    assert frame.notna().to_numpy().tolist() == [
        [True, False, False],
        [False, False, False],
        [True, True, False],
        [False, False, False],
    ]


def test_csv_cells(tmp_path: Path) -> None:
    """Structures become JSON text, truth is true and false, nothing is empty."""
    path = tmp_path / "out.csv"
    write_results(path, values_of([{"a": {"x": [1, None]}, "b": True, "c": None, "d": [1], "e": 2**64 - 1}]))
    assert path.read_text() == 'a,b,c,d,e\n"{""x"":[1,null]}",true,,[1],18446744073709551615\n'


def test_parquet_types_over_all_rows(tmp_path: Path) -> None:
    """A column's type is settled over the whole file: null first and integers and floats mixed are no problem."""
    path = tmp_path / "out.parquet"
    rows = [{"a": None, "b": 1}] * 10_001 + [{"a": "x", "b": 1.5}]
    assert write_results(path, values_of(rows)) == 10_002
    frame = pd.read_parquet(path)
    assert frame["a"].tolist()[-1] == "x"
    assert frame["a"].isna().sum() == 10_001
    assert frame["b"].tolist()[-2:] == [1.0, 1.5]


@pytest.mark.parametrize(
    "rows",
    [
        [{"a": 1}, {"a": "text"}],
        [{"a": 1}] * 10_001 + [{"a": "text"}],
        [{"a": {}}],
        [{"a": [1]}, {"a": 1}],
        [{"a": 2**64 - 1}, {"a": -1}],
    ],
)
def test_parquet_that_cannot_be(tmp_path: Path, rows: list[Any]) -> None:
    """Columns without one type are refused with a way out, and no file is left."""
    path = tmp_path / "out.parquet"
    with pytest.raises(InputError, match=r"write \.jsonl"):
        write_results(path, values_of(rows))
    assert listing(tmp_path) == []


def failing(rows: int) -> Values:
    """Results whose reading breaks off."""

    def values() -> Iterator[bytes]:
        yield from (dumps({"n": n}) for n in range(rows))
        raise OSError(5, "Input/output error")

    return values


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("rows", [0, 20_000])
def test_nothing_half_written(tmp_path: Path, ending: str, rows: int) -> None:
    """After an error an older result is still whole, and no other file is there."""
    path = tmp_path / f"out{ending}"
    path.write_bytes(b"older result")
    with pytest.raises(InputError, match="Input/output error; free space"):
        write_results(path, failing(rows))
    assert path.read_bytes() == b"older result"
    assert listing(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    """Any other exception passes, and leaves no file either."""

    def values() -> Iterator[bytes]:
        yield b"{}"
        raise error

    with pytest.raises(error):
        write_results(tmp_path / "out.jsonl", values)
    assert listing(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
@pytest.mark.parametrize("rows", [1, 20_000])
def test_full_disk(rows: int) -> None:
    """A full disk is an error that says so, for one row as for many."""
    with pytest.raises(InputError, match=r"cannot write /dev/full: No space left on device; free space"):
        write_results(Path("/dev/full"), values_of([{"n": n} for n in range(rows)]))


def test_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hyphen means JSON lines on standard output."""
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", out)
    check_output(Path("-"))
    assert write_results(Path("-"), values_of([{"a": 1}, {"a": 2}])) == 2
    assert out.buffer.getvalue() == b'{"a":1}\n{"a":2}\n'


@pytest.mark.parametrize("name", ["out", "out.txt", "out.parquet.gz", "missing/out.csv", "folder.csv"])
def test_targets_that_cannot_be(tmp_path: Path, name: str) -> None:
    """Unknown endings, missing folders and folders are refused before any work is done."""
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"out|folder"):
        check_output(tmp_path / name)


@pytest.mark.parametrize("name", [f"out{ending}" for ending in ENDINGS])
def test_targets_that_can_be(tmp_path: Path, name: str) -> None:
    """Every known ending may be written, over an older file too."""
    (tmp_path / name).write_bytes(b"old")
    check_output(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
