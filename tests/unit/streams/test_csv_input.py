"""CSV files as rows: types, missing cells, broken lines with their bytes, odd files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from rowmill.streams.csv_input import Piece, read_csv
from rowmill.streams.errors import InputError


def pieces(folder: Path, content: bytes | str, suffix: str = ".csv") -> list[Piece]:
    """What a file of this content holds; the same at a second reading."""
    path = folder / f"file{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    file = read_csv(path, suffix)
    found = list(file.pieces())
    assert list(file.pieces()) == found
    return found


def column(folder: Path, *cells: str) -> list[Any]:
    """The values of a column of these cells; a second column keeps empty lines from looking empty."""
    found = pieces(folder, "c,other\n" + "".join(f"{cell},\n" for cell in cells))
    return [piece.row["c"] for piece in found if piece.row is not None]


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-2", "0"], [1, -2, 0]),
        (["999999999999999999", "-999999999999999999"], [999999999999999999, -999999999999999999]),
        (["1", "2.5"], [1.0, 2.5]),
        (["1e3", "-1.5E-2", "0.0"], [1000.0, -0.015, 0.0]),
        (["true", "False", "TRUE"], [True, False, True]),
        (["007", "1"], ["007", "1"]),
        (["1", "00"], ["1", "00"]),
        (["1234567890123456789", "1"], ["1234567890123456789", "1"]),
        (["12345678901234567890123", "5"], ["12345678901234567890123", "5"]),
        (["1234567890123456789", "1.5"], ["1234567890123456789", "1.5"]),
        (["1e999", "1"], ["1e999", "1"]),
        (["+1", "2"], ["+1", "2"]),
        (["1.", "2"], ["1.", "2"]),
        ([".5", "2"], [".5", "2"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["inf", "1"], ["inf", "1"]),
        (["٣", "1"], ["٣", "1"]),
        (["0x10", "1"], ["0x10", "1"]),
        ([" 1", "2"], [" 1", "2"]),
        (["true", "1"], ["true", "1"]),
        (["yes", "no"], ["yes", "no"]),
        (["2024-01-02", "2024-01-03"], ["2024-01-02", "2024-01-03"]),
        (["1", "", "NA", "NaN", "null", "None", "N/A"], [1, None, None, None, None, None, None]),
        (["1.5", "nan", ""], [1.5, None, None]),
        (["true", "NULL"], [True, None]),
        (["text", "NA", "", "null"], ["text", "NA", None, "null"]),
        (["NA", ""], ["NA", None]),
        (["", ""], [None, None]),
        (["NA", "1", "x"], ["NA", "1", "x"]),
    ],
)
def test_types_of_columns(tmp_path: Path, cells: list[str], values: list[Any]) -> None:
    """A column has the type that all of its cells have; what only looks like a number stays text."""
    found = column(tmp_path, *cells)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_the_last_cell_counts(tmp_path: Path) -> None:
    """The type is settled over the whole file, so that a late exception does not change it midway."""
    assert column(tmp_path, *["7"] * 5000, "x") == ["7"] * 5000 + ["x"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_quotes(tmp_path: Path, ending: str) -> None:
    """Quoted cells hold delimiters, quotes and line breaks; the latter as they stand."""
    content = ending.join(["a,b", '"x,""y""","1"', f'"two{ending}lines",2', ",3", ""])
    assert [piece.row for piece in pieces(tmp_path, content)] == [
        {"a": 'x,"y"', "b": 1},
        {"a": f"two{ending}lines", "b": 2},
        {"a": None, "b": 3},
    ]


@pytest.mark.parametrize(
    ("line", "raw", "says"),
    [
        ("1", b"1", "line 3: 1 fields where the header has 2"),
        ("1,2,3", b"1,2,3", "line 3: 3 fields where the header has 2"),
        ('1,"2"x', b'1,"2"x', "line 3: ',' expected after '\"'"),
        ("\udcff,1", b"\xff,1", "line 3: not UTF-8 (invalid start byte at byte 0)"),
        ('"a\nb",\udce4', b'"a\nb",\xe4', "line 3: not UTF-8"),
        ("1\r2,3", b"1\r2,3", "line 3: new-line character"),
    ],
)
def test_broken_lines(tmp_path: Path, line: str, raw: bytes, says: str) -> None:
    """A broken line keeps its place and its bytes and says what is wrong; the others are rows, with their types."""
    content = f"a,b\n1,2\n{line}\n3,4\n".encode("utf-8", "surrogateescape")
    first, broken, last = pieces(tmp_path, content)
    assert (first.row, last.row) == ({"a": 1, "b": 2}, {"a": 3, "b": 4})
    assert broken.row is None
    assert broken.raw == raw
    assert says in str(broken.error)


def test_line_numbers(tmp_path: Path) -> None:
    """The numbers are those of an editor: the header, empty lines and lines inside of quotes count."""
    found = pieces(tmp_path, 'a,b\n\n"x\ny",1\n\nbad\n"unfinished,1\nmore\n')
    assert [str(piece.error).split(":")[0] for piece in found if piece.error] == [
        "line 6",
        "line 7",
        "line 8",
    ]


@pytest.mark.parametrize("behind", [b"5,6\n", b"5,6\n\n7,xy\r\n8,9"])
def test_a_quote_that_is_never_closed(tmp_path: Path, behind: bytes) -> None:
    """It costs its own line, whose bytes are kept; those behind it are rows."""
    first, broken, *rest = pieces(tmp_path, b'a,b\n1,2\n"3,4\n' + behind)
    assert first.row is not None
    assert (broken.row, broken.raw) == (None, b'"3,4')
    assert str(broken.error) == "line 3: a quote is opened and never closed (unexpected end of data)"
    assert [piece.row for piece in rest] == [piece.row for piece in pieces(tmp_path, b"a,b\n1,2\n" + behind)[1:]]


def test_a_quote_that_swallows_too_much(tmp_path: Path) -> None:
    """Also where the file is larger than what a cell may hold, only the line with the quote is broken."""
    lines = 17 * 1024
    found = pieces(tmp_path, b'a,b\n"3,4\n' + (b"y" * 1_000 + b",2\n") * lines)
    assert [piece.raw for piece in found if piece.row is None] == [b'"3,4']
    assert len(found) == 1 + lines


def test_quotes_made_to_be_read_again(tmp_path: Path) -> None:
    """Lines of which each swallows all the others are told one by one a hundred times, then together."""
    *alone, rest = pieces(tmp_path, b"a,b\n" + b'x","\n' * 500)
    assert [piece.raw for piece in alone] == [b'x","'] * 100
    assert rest.raw.count(b"\n") == 399


@pytest.mark.parametrize(
    ("content", "suffix", "rows"),
    [
        (b"\xef\xbb\xbfa,b\n1,x\n", ".csv", [{"a": 1, "b": "x"}]),
        (b"a\tb\n1\tx,y\n", ".tsv", [{"a": 1, "b": "x,y"}]),
        (b"a,b", ".csv", []),
        (b"a,b\n", ".csv", []),
        (b"a,b\n\n\r\n\n1,2", ".csv", [{"a": 1, "b": 2}]),
        ("name,größe\nÄrmel,1\n".encode(), ".csv", [{"name": "Ärmel", "größe": 1}]),
        (b'"a,b",c\n1,2\n', ".csv", [{"a,b": 1, "c": 2}]),
        (b"a\n\n", ".csv", []),
        (b'a\n""\n', ".csv", [{"a": None}]),
        (b"a,b\nx\0y,1\n", ".csv", [{"a": "x\0y", "b": 1}]),
    ],
)
def test_odd_files(tmp_path: Path, content: bytes, suffix: str, rows: list[Any]) -> None:
    """Byte order marks, tabs, headers alone, empty lines, no last line break, quoted names."""
    assert [piece.row for piece in pieces(tmp_path, content, suffix)] == rows


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no header line"),
        (b"\n1,2\n", "no header line"),
        (b"\xef\xbb\xbf\n", "no header line"),
        (b"a,b,a\n1,2,3\n", "has 'a' 2 time"),
        (b"a,,b\n1,2,3\n", "has '' 1 time"),
        (b"a, \n1,2\n", "has ' ' 1 time"),
        (b'"a\nb",c\n1,2\n', "header"),
        (b"a\xff,b\n1,2\n", "UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-8"),
    ],
)
def test_headers_that_do_not_work(tmp_path: Path, content: bytes, says: str) -> None:
    """Without one good name per column there are no rows: the file is refused, with the reason."""
    with pytest.raises(InputError, match=says) as caught:
        pieces(tmp_path, content)
    assert "file.csv" in str(caught.value)


def test_gzip(tmp_path: Path) -> None:
    """A packed file is read like a plain one."""
    path = tmp_path / "file.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert [piece.row for piece in read_csv(path, ".csv").pieces()] == [{"a": 1, "b": 2}]


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", gzip.compress(b"a,b\n" + b"1,2\n" * 999, mtime=0)[:-20], b"\x1f\x8b"]
)
def test_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    """A file that only calls itself packed, or ends too early, is an error that names it."""
    path = tmp_path / "file.csv.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.csv\.gz"):
        read_csv(path, ".csv")


def test_endless_cells(tmp_path: Path) -> None:
    """A cell beyond 16 MiB is a broken line, not a file in memory; what follows is read again."""
    path = tmp_path / "file.csv"
    path.write_bytes(b"a,b\n" + b"x" * (16 * 1024 * 1024 + 10) + b",1\n2,3\n")
    broken, last = read_csv(path, ".csv").pieces()
    assert "field larger than field limit" in str(broken.error)
    assert last.row == {"a": 2, "b": 3}
