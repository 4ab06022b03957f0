"""Rows to publish, from frames, iterables and files, in an order that is the same at every reading.

A bounded run that was killed goes on at the row where its publishing stopped: so an input can be read from any
row on, and has a fingerprint by which a session recognises it.
"""

from __future__ import annotations

import hashlib
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..handlers.context import key_bytes
from ..handlers.executors import BlockingPool
from ..handlers.frames import frame_to_rows, is_frame, select_lines
from ..state.codec import encode, loads
from ..state.errors import BadRowError, ConfigError
from .csv_input import read_csv
from .errors import InputError
from .input_files import CSV_SUFFIXES, JSON_SUFFIXES, open_bytes, parquet_columns, read_parquet, suffix_of

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only


LOT_BYTES = 4 * 1024 * 1024
"""Bytes of values that are read, and published, in one go."""


class InputRow(NamedTuple):
    """A row as it will be published. ``error`` says why it is none; ``value`` is then the input as it stood."""

    value: bytes
    key: bytes | None = None
    error: str | None = None


class Input(Protocol):
    """Rows in a fixed order."""

    fingerprint: str
    """The same for the same rows, another for others, as far as can be told without reading everything."""
    total: int | None
    """How many rows there are, where that is known beforehand."""
    is_file: bool
    """Whether the fingerprint tells the content; else the rows themselves have to be compared."""

    def rows(self, first: int) -> Iterator[InputRow]:
        """The rows from number ``first`` (0 is the first) to the end."""
        ...


class InputReader:
    """Reads an input lot by lot, on a thread that holds up neither the event loop nor the end of the process."""

    def __init__(self, source: Input) -> None:
        self._source = source
        self._pool = BlockingPool(1)
        self._rows: Iterator[InputRow] | None = None
        self._digest = hashlib.blake2b(digest_size=16)
        self.is_exhausted = False

    @property
    def digest(self) -> str:
        """Of all rows read so far, for inputs that have to be compared by their rows."""
        return "" if self._source.is_file else self._digest.hexdigest()

    async def go_to(self, row: int, digest: str, *, done: bool) -> bool:
        """Go to row number ``row``, where an earlier attempt stopped; False if what lies before it was other rows."""
        if self._source.is_file:
            self._rows = self._source.rows(row)
            return True
        before = 0
        while before < row and not self.is_exhausted:
            before += len(await self.take(row - before))
        if before < row or self.digest != digest:
            return False
        return not done or not await self.take(1)

    async def take(self, most: int, *, max_bytes: int = LOT_BYTES) -> list[InputRow]:
        """The next rows: up to ``most`` of them, or of ``max_bytes``.

        Fewer do not mean the end; ``is_exhausted`` does.

        Raises:
            InputError: the input cannot be read on. An exception of the user's own iterator passes through.
        """
        return await self._pool.run(self._take, most, max_bytes)

    def _take(self, most: int, max_bytes: int) -> list[InputRow]:
        if self._rows is None:
            self._rows = self._source.rows(0)
        taken: list[InputRow] = []
        size = 0
        for row in self._rows:
            taken.append(row)
            size += len(row.value)
            if not self._source.is_file:
                self._digest.update(b"%d %d " % (len(row.value), len(row.key or b"")) + row.value + (row.key or b""))
            if len(taken) >= most or size >= max_bytes:
                return taken
        self.is_exhausted = True
        return taken

    def close(self) -> None:
        """Let the thread end."""
        self._pool.close()


def make_input(rows: pd.DataFrame | Iterable[Any], key: str | None) -> Input:
    """The rows of a DataFrame, or of an iterable of dicts; ``key`` names the column that becomes the key."""
    if is_frame(rows):
        return FrameInput(rows, key)
    if isinstance(rows, (str, bytes, dict)) or not isinstance(rows, Iterable):
        raise ConfigError("rows", type(rows).__name__, "give a DataFrame or an iterable of dicts")
    return IterableInput(rows, key)


class FrameInput:
    """The lines of a DataFrame."""

    def __init__(self, frame: pd.DataFrame, key: str | None) -> None:
        columns = [str(name) for name in frame.columns]
        _check_column(key, columns)
        self.is_file = False
        self._frame = frame
        self._key = key
        self.total: int | None = len(frame)
        self.fingerprint = _digest("frame", key or "")

    def rows(self, first: int) -> Iterator[InputRow]:
        """The lines from ``first`` on."""
        for row in frame_to_rows(select_lines(self._frame, first)):
            yield _input_row(row, self._key)


class IterableInput:
    """Dicts from anywhere. Can be read once only if it is an iterator."""

    def __init__(self, rows: Iterable[Any], key: str | None) -> None:
        self._rows = rows
        self.is_file = False
        self._key = key
        self.total: int | None = len(rows) if isinstance(rows, Sized) else None
        if key is not None and isinstance(rows, Collection):  # an iterator could be read only once
            _check_rows(key, rows)
        self.fingerprint = _digest("iterable", key or "")

    def rows(self, first: int) -> Iterator[InputRow]:
        """The items from ``first`` on; earlier ones are passed over."""
        for row in islice(iter(self._rows), first, None):
            yield _input_row(row, self._key)


class FileInput:
    """A CSV, JSON-lines or Parquet file, told by its ending; ``.gz`` in addition for the first two.

    Args:
        path: the file.
        key: the column (or field) that becomes the rows' key.

    Raises:
        InputError: it is missing, unreadable, or of another kind.
        ConfigError: no such column.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self._path = path
        self._key = key
        self.is_file = True
        self._suffix = suffix_of(path)
        self.total: int | None = None
        try:
            self.fingerprint = _digest("file", key or "", _file_fingerprint(path))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        if self._suffix in CSV_SUFFIXES:
            self._csv = read_csv(path, self._suffix)
            _check_column(key, self._csv.columns)
        elif self._suffix == ".parquet":
            columns, self.total = parquet_columns(path)
            _check_column(key, columns)
        elif key is not None:
            self._check_field(key)

    def _check_field(self, key: str) -> None:
        """Rows may lack the field. Where none has it, it is mistyped; the first one settles it as a rule."""
        with open_bytes(self._path) as lines:
            _check_rows(key, map(_row_of, _unmarked(lines)))

    def rows(self, first: int) -> Iterator[InputRow]:
        """The rows from ``first`` on."""
        return islice(self._all_rows(), first, None)

    def _all_rows(self) -> Iterator[InputRow]:
        if self._suffix in CSV_SUFFIXES:
            for piece in self._csv.pieces():
                yield (
                    _input_row(piece.row, self._key)
                    if piece.row is not None
                    else InputRow(piece.raw, None, piece.error)
                )
        elif self._suffix in JSON_SUFFIXES:
            yield from self._json_lines()
        else:
            for row in read_parquet(self._path):
                yield _input_row(row, self._key)

    def _json_lines(self) -> Iterator[InputRow]:
        """Lines as they stand: the worker judges them, so that a bad one becomes a dead letter of its own bytes."""
        with open_bytes(self._path) as lines:
            yield from json_line_rows(lines, self._key)


def json_line_rows(lines: Iterable[bytes], key: str | None) -> Iterator[InputRow]:
    """Every line that is not blank, as it stands, with the key that its field ``key`` gives."""
    for line in _unmarked(lines):
        value = line.rstrip(b"\r\n")
        if value.strip():
            yield InputRow(value, _key_of(value, key))


def _unmarked(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without the byte order mark that editors on Windows begin a file with: it belongs to no row."""
    rest = iter(lines)
    for line in rest:
        yield line.removeprefix(BOM_UTF8)
        break
    yield from rest


def _key_of(value: bytes, key: str | None) -> bytes | None:
    row = _row_of(value) if key is not None else None
    return None if key is None or row is None else _key_text(row.get(key))


def _row_of(value: bytes) -> dict[str, Any] | None:
    try:
        row = loads(value)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _input_row(row: Any, key: str | None) -> InputRow:
    if not isinstance(row, dict):
        return InputRow(repr(row).encode("utf-8", "replace"), None, f"a row is a dict; this is a {type(row).__name__}")
    try:
        value = encode(row)
    except BadRowError as error:
        return InputRow(repr(row).encode("utf-8", "replace"), None, str(error))
    return InputRow(value, _key_text(row.get(key)) if key is not None else None)


def _key_text(value: Any) -> bytes | None:
    if value is None:
        return None
    return key_bytes(value) if isinstance(value, (str, bytes)) else encode(value)


def _check_column(key: str | None, columns: Iterable[str]) -> None:
    known = list(columns)
    if key is not None and key not in known:
        raise ConfigError("key", key, f"the input has no such column; it has {', '.join(known)}")


def _check_rows(key: str, rows: Iterable[Any]) -> None:
    """Refuse a key that no row has as a field; without any row there is nothing to say."""
    known: Iterable[str] | None = None
    for row in rows:
        if isinstance(row, dict):
            if key in row:
                return
            known = row if known is None else known
    if known is not None:
        raise ConfigError("key", key, f"no row has such a field; the first one has {', '.join(map(str, known))}")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:32]


def _file_fingerprint(path: Path) -> str:
    """Size, beginning and end: enough to notice another file, cheap for a large one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        tail = file.read(1 << 20)
    return hashlib.sha256(str(size).encode() + head + tail).hexdigest()[:32]
