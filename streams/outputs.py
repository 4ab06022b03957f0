"""Result files: JSON lines, CSV or Parquet by ending, written beside the target and moved into place when whole."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..state.codec import dumps, loads
from .errors import InputError
from .input_files import CSV_SUFFIXES, suffix_of

Values = Callable[[], Iterator[bytes]]
"""Gives the results' JSON texts in order; called once for every pass that a format needs."""

_PARQUET_ROWS = 10_000


def check_output(path: Path) -> None:
    """Refuse, before any work is done, a target that cannot be written.

    Raises:
        InputError: its kind is unknown, or its folder is missing or closed to us.
    """
    if str(path) == "-" or path.is_char_device():
        return
    suffix_of(path)
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {folder}; make it first")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file")


def write_results(path: Path, values: Values) -> int:
    """Write all results; returns how many. ``-`` is standard output, as JSON lines.

    Raises:
        InputError: the disk is full, or the target cannot be written; no half-written file is left.
    """
    if str(path) == "-":
        return _json_lines(sys.stdout.buffer, values())
    whole = path if path.is_char_device() else path.with_name(f".{path.name}.partial")
    try:
        count = _write(whole, path, values)
        if whole != path:
            whole.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        if whole != path:
            with contextlib.suppress(OSError):
                whole.unlink(missing_ok=True)
    return count


def _write(whole: Path, path: Path, values: Values) -> int:
    suffix = ".jsonl" if path.is_char_device() else suffix_of(path)
    if suffix == ".parquet":
        return _parquet(whole, values)
    with _open(whole, packed=path.suffix.lower() == ".gz") as file:
        if suffix in CSV_SUFFIXES:
            return _csv(file, values, "\t" if suffix == ".tsv" else ",")
        return _json_lines(file, values())


def _open(whole: Path, *, packed: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.open(whole, "wb")) if packed else whole.open("wb")


def _json_lines(file: BinaryIO, values: Iterable[bytes]) -> int:
    count = 0
    for value in values:
        file.write(value + b"\n")
        count += 1
    file.flush()
    return count


def _csv(file: BinaryIO, values: Values, delimiter: str) -> int:
    """Columns in the order of their first appearance; lists and objects as JSON text."""
    columns: dict[str, None] = {}
    for value in values():
        columns.update(dict.fromkeys(loads(value)))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(_UnixLines(text), delimiter=delimiter, lineterminator="\r\n")
    if columns:
        writer.writerow(columns)
    count = 0
    for value in values():
        row = loads(value)
        writer.writerow([_cell(row.get(column)) for column in columns])
        count += 1
    text.flush()
    text.detach()
    return count


class _UnixLines:
    """Ends lines with a line feed. The writer itself must think otherwise: before Python 3.13 it quotes a carriage
    return in a cell only where one ends the lines, and unquoted it would be lost or break the line.
    """

    def __init__(self, text: io.TextIOBase) -> None:
        self._text = text

    def write(self, line: str) -> int:
        return self._text.write(line[:-2] + "\n")


def _cell(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return dumps(value).decode()
    return str(value).lower() if isinstance(value, bool) else value


def _parquet(path: Path, values: Values) -> int:
    """One pass for the columns' types over all rows, one to write."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pa.unify_schemas(
            [table.schema for table in _tables(pa, values, None)] or [pa.schema([])],
            promote_options="permissive",
        )
        count = 0
        with pq.ParquetWriter(path, schema) as writer:
            for table in _tables(pa, values, schema):
                writer.write_table(table)
                count += table.num_rows
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise InputError(
            f"the results do not fit one Parquet table ({error}); write .jsonl, or make the column's type uniform"
        ) from error
    return count


def _tables(pa: Any, values: Values, schema: Any) -> Iterator[Any]:
    rows = values()
    while chunk := [loads(value) for value in islice(rows, _PARQUET_ROWS)]:
        if schema is None:
            # from_pylist takes its columns from the first row only: name them all.
            names = list(dict.fromkeys(name for row in chunk for name in row))
            yield pa.table({name: pa.array([row.get(name) for row in chunk]) for name in names})
        else:
            yield pa.Table.from_pylist(chunk, schema=schema)
