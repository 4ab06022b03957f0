"""Files by their endings: opening them, and reading Parquet. Knows pyarrow, which is imported where used."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import InputError

CSV_SUFFIXES = (".csv", ".tsv")
JSON_SUFFIXES = (".jsonl", ".ndjson")
KNOWN = (*CSV_SUFFIXES, *JSON_SUFFIXES, ".parquet")


def suffix_of(path: Path) -> str:
    """The ending that tells a file's kind, without ``.gz``.

    Raises:
        InputError: naming the endings that are known.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if suffix not in KNOWN or (packed and suffix == ".parquet"):
        raise InputError(f"{path}: unknown kind of file; known endings are {', '.join(KNOWN)}, and .gz behind text")
    return suffix


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked, for a ``with`` block.

    Raises:
        InputError: it cannot be opened, or turns out to be damaged while it is read in the block.
    """
    try:
        with cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from error


def parquet_columns(path: Path) -> tuple[list[str], int]:
    """Column names and the number of rows."""
    file = _parquet_file(path)
    return list(file.schema_arrow.names), int(file.metadata.num_rows)


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, a batch at a time.

    Raises:
        InputError: the file turns out to be damaged, at the batch where it is.
    """
    batches = _parquet_file(path).iter_batches(batch_size=2_000)
    while True:
        with _parquet_errors(path):
            rows = next((batch.to_pylist() for batch in batches), None)
        if rows is None:
            return
        yield from rows


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    with _parquet_errors(path):
        return pq.ParquetFile(path)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:  # a time that Python has none for is a ValueError
        raise InputError(f"cannot read {path} as Parquet: {error}") from error
