"""What a measured process knows and tells. Standard library only: it is imported in every peer's environment.

The harness says in ``ROWMILL_BENCH`` what to do. The process tells, once, when its function was called for the first
time, and how much processor time it had used until then: work is measured from there, so that nobody's start counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .rows import Row, result_of

VARIABLE = "ROWMILL_BENCH"
BEGUN = "begun.json"
"""The file, in the process's folder, in which it tells of its first call."""
RECOVERED = "recovered.json"
"""The file in which a process tells how long its recovery took, where that is what is measured."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What one process is to do.

    Attributes:
        bootstrap: ``host:port`` of Kafka.
        source, sink: topics.
        name: of the application, from which its group's name is made.
        folder: an empty one of its own, where the first call is told too.
        commit_interval: seconds.
        commit_rows: after so many rows a commit is made at once, by those who count rows.
        exactly_once: or at least once, by those who can do either.
        job: what to do with rows: ``plain``, ``count``, ``give way``, ``ask`` or ``burn``.
        concurrency: rows at once, where the job waits.
        row_bytes: about the size of a row.
        server: URL that the job ``ask`` asks.
        more: what only one work needs.
    """

    bootstrap: str
    source: str
    sink: str
    name: str
    folder: str
    commit_interval: float = 0.1
    commit_rows: int = 10_000
    exactly_once: bool = True
    job: str = "plain"
    concurrency: int = 100
    row_bytes: int = 80
    server: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_environment(self) -> dict[str, str]:
        """The variable by which the process is told."""
        return {VARIABLE: json.dumps(asdict(self))}


def settings() -> Settings:
    """What this process is to do."""
    return Settings(**json.loads(os.environ[VARIABLE]))


class _Begun:
    """Whether the first row has been seen in this process."""

    yes = False


def begin() -> None:
    """Tell, once, that the first row is here."""
    _Begun.yes = True
    told = json.dumps({"at": time.monotonic(), "cpu": time.process_time()})
    file = Path(settings().folder, BEGUN)
    file.with_suffix(".part").write_text(told)
    file.with_suffix(".part").rename(file)  # whoever finds it finds all of it


def compute(row: Row) -> Row:
    """The job ``plain``, for everybody the same function."""
    if not _Begun.yes:
        begin()
    return result_of(row)


def begin_once() -> None:
    """For jobs other than ``plain``."""
    if not _Begun.yes:
        begin()


def burn(row: Row) -> Row:
    """The job ``burn``: a millisecond of processor time, however long that takes."""
    begin_once()
    end = time.thread_time() + 0.001
    while time.thread_time() < end:
        pass
    return result_of(row)
