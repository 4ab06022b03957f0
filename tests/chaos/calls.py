"""A worker's log of what it did: one file per process, one write per line, so that a SIGKILL loses nothing.

Lines are ``KIND PARTITION OFFSET NANOSECONDS [REST]``, with the machine's monotonic clock:
S a handler call begins · E it ended · X it was cancelled · O the partition was opened (its former owner is fenced
now) · C a transaction ended well: the committed offset, and the offset map in the rest · K, Z a failpoint kills or
stops the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """One line; ``at`` is in seconds."""

    kind: str
    partition: int
    offset: int
    at: float
    rest: str


class CallLog:
    """Appends to a process's file; without a path it does nothing."""

    def __init__(self, path: str | None) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if path else None

    def write(self, kind: str, partition: int = -1, offset: int = -1, rest: str = "") -> None:
        """One line."""
        if self._file is not None:
            os.write(self._file, f"{kind} {partition} {offset} {time.monotonic_ns()} {rest}\n".encode())


def read_log(path: Path) -> Iterator[Line]:
    """The lines of a process's file."""
    if path.exists():
        for line in path.read_text().splitlines():
            kind, partition, offset, nanoseconds, rest = line.split(" ", 4)
            yield Line(kind, int(partition), int(offset), int(nanoseconds) / 1e9, rest)
