"""P9: two worker processes against one, a millisecond of processor time a row, where the cores allow."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..bench import Bench
from ..measure import Job, Measured, stream
from ..peers.known import ROWMILL
from ..report import Goal, Result, as_runs, ratio, speed

NAMES = {1: "one worker", 2: "two workers"}


async def run(bench: Bench) -> list[Result]:
    """Rows come when all workers have their partitions."""
    print("P9", flush=True)
    job = Job(rows=bench.size(20_000, 1_000), kind="burn", waits=True)
    with pinned(bench.cluster.pid) as where:
        seen = await bench.take_turns(
            {name: partial(_with, bench, job, number, name) for number, name in NAMES.items()}
        )
    headings, lines = speed(seen, ours=NAMES[2])
    goal = Goal("two workers against one", 1.7, True, ratio(seen[NAMES[2]], seen[NAMES[1]]))
    notes = [f"{os.cpu_count()} cores, {where}; the workers may use all cores"]
    title = f"{job.rows:,} rows of 1 ms of processor time each"
    return [Result("P9", title, headings, lines, [goal], notes, as_runs(seen))]


async def _with(bench: Bench, job: Job, number: int, name: str) -> Measured:
    return replace(await stream(bench.cluster, ROWMILL, replace(job, workers=number)), peer=name)


@contextlib.contextmanager
def pinned(pid: int | None) -> Iterator[str]:
    """Keep the broker on the first core while the block runs (as taskset does); says what was done."""
    if pid is None:
        yield "the broker is not ours, and not pinned"
        return
    every = os.sched_getaffinity(pid)
    try:
        _pin(pid, {min(every)})
        yield f"the broker is pinned to one of them (core {min(every)})"
    finally:
        _pin(pid, every)


def _pin(pid: int, cores: set[int]) -> None:
    """All of its threads; later ones follow those that start them."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)
