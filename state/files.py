"""Files that are there as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes, *, prefix: str) -> None:
    """All of the file or none: a reader, and a crash at any moment, see nothing in between.

    Args:
        path: which; its folder is there.
        data: what it holds.
        prefix: of the file beside it that is written first, and left behind by a crash.
    """
    number, part = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(part).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(part).unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder safe on disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
