"""The progress bar: tqdm on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, *, shown: bool | None = None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error for as long as the block lasts; yields what is to be told (rows done, total).

    Args:
        title: stands before the bar.
        shown: True or False to force; None shows it on a terminal only.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda _done, _total: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit=" rows", unit_scale=True, dynamic_ncols=True, mininterval=0.1) as bar:

        def report(done: int, total: int | None) -> None:
            if total is not None:
                bar.total = total
            bar.update(done - bar.n)

        yield report
