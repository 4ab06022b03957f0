"""How far a bounded job is: on a terminal as a bar, in any case as a number."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol


class Job(Protocol):
    """What a command runs to the end."""

    args: argparse.Namespace
    """With ``no_progress`` and ``quiet``."""
    done: int
    """Rows that are done."""


@contextmanager
def counted_progress(job: Job, title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal, with logs above it; in any case count the rows. Yields what is told (rows done, total)."""
    from ..progress import progress_bar

    shown = False if job.args.no_progress or job.args.quiet or not sys.stderr.isatty() else None
    with progress_bar(title, shown=shown) as draw, ExitStack() as stack:
        if shown is None:
            from tqdm.contrib.logging import logging_redirect_tqdm

            stack.enter_context(logging_redirect_tqdm())

        def report(done: int, total: int | None) -> None:
            job.done = done
            draw(done, total)

        yield report
