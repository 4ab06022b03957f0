"""Rows to publish: the same order at every reading, from any row on, with a fingerprint."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rowmill.state.codec import dumps, loads
from rowmill.state.errors import ConfigError
from rowmill.streams.errors import InputError
from rowmill.streams.inputs import FileInput, Input, InputReader, InputRow, IterableInput, make_input

ROWS = [{"id": n, "name": f"name {n}", "half": n / 2} for n in range(20)]


def csv_bytes(delimiter: str = ",") -> bytes:
    """The rows as CSV."""
    lines = [delimiter.join(["id", "name", "half"])] + [delimiter.join(map(str, row.values())) for row in ROWS]
    return "\n".join(lines).encode()


def json_bytes() -> bytes:
    """The rows as JSON lines."""
    return b"\n".join(dumps(row) for row in ROWS)


def files(folder: Path) -> list[Path]:
    """The rows in a file of every kind."""
    contents = {
        "a.csv": csv_bytes(),
        "a.CSV.gz": gzip.compress(csv_bytes()),
        "a.tsv": csv_bytes("\t"),
        "a.jsonl": json_bytes(),
        "a.ndjson": json_bytes(),
        "a.b.jsonl.gz": gzip.compress(json_bytes()),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    pd.DataFrame(ROWS).to_parquet(folder / "a.parquet", index=False)
    return sorted(folder.iterdir())


def every_input(folder: Path, key: str | None = None) -> list[Input]:
    """The rows as every kind of input."""
    in_memory = [make_input(pd.DataFrame(ROWS), key), make_input(ROWS, key), make_input(tuple(ROWS), key)]
    return [*in_memory, *(FileInput(path, key) for path in files(folder))]


def test_all_kinds_hold_the_same(tmp_path: Path) -> None:
    """A frame, an iterable and files of every kind give the same rows."""
    for rows in every_input(tmp_path):
        assert [loads(row.value) for row in rows.rows(0)] == ROWS
        assert all(row.error is None and row.key is None for row in rows.rows(0))


@pytest.mark.parametrize("first", [0, 1, 7, 19, 20, 50])
def test_going_on_in_the_middle(tmp_path: Path, first: int) -> None:
    """From any row on the rows are those of a full reading, to the byte."""
    for rows in every_input(tmp_path, "id"):
        assert list(rows.rows(first)) == list(rows.rows(0))[first:]


def test_keys(tmp_path: Path) -> None:
    """The key column's value becomes the key: text as it is, anything else as JSON."""
    for column, keys in (
        ("id", [b"%d" % n for n in range(20)]),
        ("name", [b"name %d" % n for n in range(20)]),
        ("half", [b"0.0", b"0.5"]),
    ):
        for rows in every_input(tmp_path, column):
            assert [row.key for row in rows.rows(0)][: len(keys)] == keys


def test_keys_that_are_missing() -> None:
    """A row without the field, or with null in it, has no key; a structure's key is its JSON."""
    rows = make_input([{"k": None}, {}, {"k": ""}, {"k": {"a": 1}}, {"k": True}], "k")
    assert [row.key for row in rows.rows(0)] == [None, None, b"", b'{"a":1}', b"true"]


def test_totals(tmp_path: Path) -> None:
    """The number of rows is known where it costs nothing."""
    totals = {path.name: FileInput(path).total for path in files(tmp_path)}
    assert totals.pop("a.parquet") == 20
    assert set(totals.values()) == {None}
    assert make_input(pd.DataFrame(ROWS), None).total == 20
    assert make_input(ROWS, None).total == 20
    assert make_input(iter(ROWS), None).total is None


def test_fingerprints(tmp_path: Path) -> None:
    """The same input has the same fingerprint; another file, another kind and another key column have another."""
    prints = [rows.fingerprint for rows in every_input(tmp_path)]
    assert prints == [rows.fingerprint for rows in every_input(tmp_path)]
    assert not set(prints) & {rows.fingerprint for rows in every_input(tmp_path, "id")}
    longer = tmp_path / "longer.csv"
    longer.write_bytes(csv_bytes() + b"\n20,x,1.0")
    changed = tmp_path / "changed.csv"
    changed.write_bytes(csv_bytes().replace(b"name 19", b"NAME 19"))
    assert not set(prints) & {FileInput(longer).fingerprint, FileInput(changed).fingerprint}


async def test_rows_in_memory_are_told_by_their_content() -> None:
    """A list or frame is recognised by what lies before the place to go on at: the same rows, and no fewer."""
    changed = [{**row, "name": "other"} if row["id"] == 3 else row for row in ROWS]
    digests: list[tuple[int, str]] = []
    for upto in (0, 5, 20):
        reader = InputReader(make_input(ROWS, "id"))
        if upto:
            assert len(await reader.take(upto)) == upto
        digests.append((upto, reader.digest))
        reader.close()
    for upto, digest in digests:
        for rows, same in ((ROWS, True), (pd.DataFrame(ROWS), True), (changed, upto <= 3), (ROWS[:4], upto <= 4)):
            reader = InputReader(make_input(rows, "id"))
            assert await reader.go_to(upto, digest, done=False) is same
            reader.close()


@pytest.mark.parametrize(("rows", "same"), [(ROWS, True), ([*ROWS, {"id": 20}], False), (ROWS[:-1], False)])
async def test_an_input_that_was_read_to_its_end(rows: list[dict[str, Any]], same: bool) -> None:
    """Where an earlier attempt had read everything, more rows are another input."""
    reader = InputReader(make_input(ROWS, None))
    assert len(await reader.take(50)) == 20
    assert reader.is_exhausted
    again = InputReader(make_input(rows, None))
    assert await again.go_to(20, reader.digest, done=True) is same
    for done in (reader, again):
        done.close()


def test_fingerprints_of_large_files(tmp_path: Path) -> None:
    """A change at either end, or in the length, shows in files too large to be read twice."""
    path = tmp_path / "large.jsonl"
    base = b'{"a":1}\n' * 400_000
    prints = set()
    for content in (base, b'{"a":2}\n' + base[8:], base[:-8] + b'{"a":2}\n', base + b"\n"):
        path.write_bytes(content)
        prints.add(FileInput(path).fingerprint)
    assert len(prints) == 4


def test_broken_lines_keep_their_bytes(tmp_path: Path) -> None:
    """A broken CSV line is no row but its bytes and the reason; a JSON line goes out as it stands."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n1,2\nbroken\n3,4\n")
    assert list(FileInput(path, "a").rows(0)) == [
        InputRow(b'{"a":1,"b":2}', b"1"),
        InputRow(b"broken", None, "line 3: 1 fields where the header has 2"),
        InputRow(b'{"a":3,"b":4}', b"3"),
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\r\n\n  \nnot json\n[1]\n{"a":\xff}\n{"b":2}')
    assert list(FileInput(path, "a").rows(0)) == [
        InputRow(b'{"a":1}', b"1"),
        InputRow(b"not json"),
        InputRow(b"[1]"),
        InputRow(b'{"a":\xff}'),
        InputRow(b'{"b":2}'),
    ]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'\xef\xbb\xbf{"a":1}\n{"a":2}\n', [InputRow(b'{"a":1}', b"1"), InputRow(b'{"a":2}', b"2")]),
        (b'\xef\xbb\xbf\r\n{"a":1}', [InputRow(b'{"a":1}', b"1")]),
        (b'{"a":1}\n\xef\xbb\xbf{"a":2}', [InputRow(b'{"a":1}', b"1"), InputRow(b'\xef\xbb\xbf{"a":2}')]),
        (b"\xef\xbb\xbf", []),
        (b"", []),
    ],
)
def test_json_lines_that_begin_with_a_byte_order_mark(tmp_path: Path, content: bytes, rows: list[InputRow]) -> None:
    """As in CSV files it belongs to no row, and the first row has its key; anywhere else it is the line's own."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert list(FileInput(path, "a").rows(0)) == rows


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1], "a row is a dict; this is a list"),
        ("text", "this is a str"),
        (None, "this is a NoneType"),
        ({"a": object}, "cannot be written as JSON"),
        ({"a": "\ud800"}, "cannot be written as JSON"),
        ({1: 2}, "cannot be written as JSON"),
    ],
)
def test_items_that_are_no_rows(row: Any, says: str) -> None:
    """What is no dict or no JSON comes out as its repr with the reason, and the others are rows."""
    before, bad, after = make_input([{"a": 1}, row, {"a": 2}], "a").rows(0)
    assert (before, after) == (InputRow(b'{"a":1}', b"1"), InputRow(b'{"a":2}', b"2"))
    assert bad.value == repr(row).encode("utf-8", "replace")
    assert says in str(bad.error)


def test_frames_become_json() -> None:
    """Missing values become null, dates ISO text, and the index stays out."""
    frame = pd.DataFrame(
        {"t": [datetime(2024, 1, 2, tzinfo=UTC), pd.NaT], "x": [math.nan, 1.5], "n": pd.array([1, None], "Int64")},
        index=["a", "b"],
    )
    assert [loads(row.value) for row in make_input(frame, None).rows(0)] == [
        {"t": "2024-01-02T00:00:00+00:00", "x": None, "n": 1},
        {"t": None, "x": 1.5, "n": None},
    ]


def test_an_iterator_is_read_once() -> None:
    """A generator is taken row by row, not as a whole."""
    taken = []

    def endless() -> Iterator[dict[str, int]]:
        n = 0
        while True:
            taken.append(n)
            yield {"n": n}
            n += 1

    rows = IterableInput(endless(), None).rows(2)
    assert next(rows).value == b'{"n":2}'
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("rows", ["text", b"bytes", {"a": 1}, 7, None])
def test_what_is_no_input(rows: Any) -> None:
    """A text, a single row or a number is refused with what to give."""
    with pytest.raises(ConfigError, match="give a DataFrame or an iterable of dicts"):
        make_input(rows, None)


def test_unknown_key_columns(tmp_path: Path) -> None:
    """A key column that the input does not have is refused, naming those that it has."""
    for path in files(tmp_path):
        is_json = "json" in path.name
        says = "no row has such a field; the first one has id, name" if is_json else "no such column; it has id, name"
        with pytest.raises(ConfigError, match=says):
            FileInput(path, "ID")
    with pytest.raises(ConfigError, match="no row has such a field; the first one has id, name"):
        make_input(ROWS, "ID")
    with pytest.raises(ConfigError, match="no such column"):
        make_input(pd.DataFrame(ROWS), "ID")


@pytest.mark.parametrize("name", ["a", "a.txt", "a.xlsx", "a.parquet.gz", "a.gz", ".csv", "a.csv.zip"])
def test_unknown_kinds(tmp_path: Path, name: str) -> None:
    """A file whose ending says nothing is refused with the endings that are known."""
    (tmp_path / name).write_bytes(b"a\n1\n")
    with pytest.raises(InputError, match=r"known endings are \.csv, \.tsv, \.jsonl, \.ndjson, \.parquet"):
        FileInput(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, kind: str) -> None:
    """A missing file, or a folder in its place, is named."""
    if kind == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        FileInput(tmp_path / name)


def test_damaged_files(tmp_path: Path) -> None:
    """What is no Parquet or no gzip inside is an error that names the file, when it is opened or when it is read."""
    for name in ("a.parquet", "a.jsonl.gz", "b.jsonl.gz"):
        content = gzip.compress(json_bytes() * 50)[:-9] if name.startswith("b") else b"nonsense"
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            list(FileInput(tmp_path / name).rows(0))


def test_parquet_that_is_damaged_inside(tmp_path: Path) -> None:
    """Behind a sound beginning damaged rows are an error that names the file; those before them come first."""
    path = tmp_path / "a.parquet"
    frame = pd.DataFrame({"n": range(20_000), "text": [f"text {n}" for n in range(20_000)]})
    frame.to_parquet(path, index=False, compression="gzip", row_group_size=5_000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2_000] = b"\xff" * 2_000
    path.write_bytes(content)
    rows = FileInput(path).rows(0)
    assert next(rows).value == b'{"n":0,"text":"text 0"}'
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet as Parquet"):
        list(rows)
