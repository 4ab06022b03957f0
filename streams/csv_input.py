"""CSV files as rows: every line accounted for, the same types at every reading, memory for one line.

pandas' reader was rejected here (docs/decisions/0007): in chunks it gives a column another type from chunk to
chunk, it turns ``007`` into 7, and it cannot hand over the bytes of a broken line. So lines are split by the
standard library, and a first pass over the whole file settles each column's type.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..state.model import Row
from .errors import InputError
from .input_files import open_bytes

csv.field_size_limit(16 * 1024 * 1024)

_NEVER_CLOSED = ("unexpected end", "field larger")
"""How the errors begin in which a cell of several lines ends without its quote: at the file's end or the limit."""
_RESCUES = 100
"""How often the lines behind such a quote are read again in one file: a file made for it costs no more than that."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_BOOLEAN = {"true": True, "false": False, "True": True, "False": False, "TRUE": True, "FALSE": False}
_MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"})


class Piece(NamedTuple):
    """A row, or a broken line: its bytes and what is wrong with it."""

    row: Row | None
    raw: bytes = b""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CsvFile:
    """A CSV file whose columns and their types are known.

    Types, by what *all* cells of the column are: integer, number, boolean (true/false), else text. ``007`` and
    integers above 18 digits are text. A missing cell (empty, NA, NaN, null …) is null; in a text column only an
    empty one is.
    """

    path: Path
    delimiter: str
    columns: list[str]
    _convert: list[Callable[[str], Any]]

    def pieces(self) -> Iterator[Piece]:
        """Every line after the header, in order; empty ones are passed over."""
        for fields, raw, error in _records(self.path, self.delimiter, len(self.columns)):
            if error is not None:
                yield Piece(None, raw, error)
            else:
                values = (convert(cell) for convert, cell in zip(self._convert, fields, strict=True))
                yield Piece(dict(zip(self.columns, values, strict=True)))


def read_csv(path: Path, suffix: str) -> CsvFile:
    """Read the header, and the whole file once for the types of its columns.

    Raises:
        InputError: no header, a column without a name, or two of one name.
    """
    delimiter = "\t" if suffix == ".tsv" else ","
    columns = _header(path, delimiter)
    guesses = [_Guess() for _ in columns]
    for fields, _, error in _records(path, delimiter, len(columns)):
        if error is None:
            for guess, cell in zip(guesses, fields, strict=True):
                guess.see(cell)
    return CsvFile(path, delimiter, columns, [guess.converter() for guess in guesses])


def _header(path: Path, delimiter: str) -> list[str]:
    with open_bytes(path) as file:
        line = file.readline()
    try:
        columns = next(csv.reader([line.decode("utf-8-sig")], delimiter=delimiter, strict=True), [])
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the header is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}: the header line cannot be read ({error}); it must be one line") from error
    if not columns:
        raise InputError(f"{path}: the file has no header line; its first line must name the columns")
    for column in columns:
        if not column.strip() or columns.count(column) > 1:
            raise InputError(
                f"{path}: the header has {column!r} {columns.count(column)} time(s); name each column once"
            )
    return columns


def _records(path: Path, delimiter: str, width: int) -> Iterator[tuple[list[str], bytes, str | None]]:
    """Fields, the bytes they came from, and what is wrong with them, of every record after the header.

    A quote that is never closed costs its own line only: what it swallowed is read again.
    """
    consumed: list[bytes] = []

    def reader_of(source: Iterator[bytes]) -> Iterator[list[str]]:
        return csv.reader(_texts(source, consumed), delimiter=delimiter, strict=True)

    with open_bytes(path) as file:
        file.readline()
        source = iter(file)
        reader = reader_of(source)
        number, rescues = 1, _RESCUES
        while True:
            first = number + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                says = f"line {first}: {error}"
                if len(consumed) > 1 and rescues and str(error).startswith(_NEVER_CLOSED):
                    rescues -= 1
                    says = f"line {first}: a quote is opened and never closed ({error})"
                    source = chain(consumed[1:], source)
                    del consumed[1:]
                    reader = reader_of(source)
                yield [], b"".join(consumed).rstrip(b"\r\n"), says
                number += len(consumed)
                consumed.clear()
                continue
            number += len(consumed)
            raw = b"".join(consumed).rstrip(b"\r\n")
            consumed.clear()
            if fields:
                yield fields, raw, _fault(fields, raw, width, first)


def _texts(source: Iterator[bytes], consumed: list[bytes]) -> Iterator[str]:
    """Lines as text; what was taken is noted."""
    for line in source:
        consumed.append(line)
        yield line.decode("utf-8", "surrogateescape")


def _fault(fields: list[str], raw: bytes, width: int, line: int) -> str | None:
    if len(fields) != width:
        return f"line {line}: {len(fields)} fields where the header has {width}"
    if not raw.isascii():
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"line {line}: not UTF-8 ({error.reason} at byte {error.start})"
    return None


class _Guess:
    """What a column's cells have in common so far."""

    __slots__ = ("_boolean", "_integer", "_number", "_seen")

    def __init__(self) -> None:
        self._integer = self._number = self._boolean = True
        self._seen = False

    def see(self, cell: str) -> None:
        if not (self._number or self._boolean) or cell in _MISSING:
            return
        self._seen = True
        self._integer = self._integer and _INTEGER.fullmatch(cell) is not None
        self._number = self._number and _is_number(cell)
        self._boolean = self._boolean and cell in _BOOLEAN

    def converter(self) -> Callable[[str], Any]:
        if not self._seen:
            return _text
        if self._integer:
            return _or_missing(int)
        if self._number:
            return _or_missing(float)
        return _or_missing(_BOOLEAN.__getitem__) if self._boolean else _text


def _is_number(cell: str) -> bool:
    """A JSON number that a float holds; a long run of digits is rather an identifier."""
    if _NUMBER.fullmatch(cell) is None or abs(float(cell)) == float("inf"):
        return False
    return "." in cell or "e" in cell.lower() or _INTEGER.fullmatch(cell) is not None


def _text(cell: str) -> str | None:
    return cell or None


def _or_missing(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda cell: None if cell in _MISSING else convert(cell)
