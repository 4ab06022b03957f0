"""P7: does memory grow with the rows? Peak of a worker over four times as many, for plain and for async stages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from ..bench import Bench
from ..measure import Job, Measured, stream
from ..peers.known import ROWMILL
from ..report import Goal, Result, as_runs, figure, good, ratio

TIMES = 4


async def run(bench: Bench) -> list[Result]:
    """Both sorts of chains, on Kafka."""
    return [await _grown(bench, "plain", "sync"), await _grown(bench, "give way", "async")]


async def _grown(bench: Bench, kind: str, word: str) -> Result:
    print(f"P7, {word} chain", flush=True)
    few = Job(rows=bench.size(500_000, 5_000), kind=kind)
    many = replace(few, rows=few.rows * TIMES)
    names = {f"{job.rows:,} rows": job for job in (few, many)}
    seen = await bench.take_turns({name: _way(bench, job) for name, job in names.items()})
    peaks = {name: [run.peak_mib for run in good(runs)] for name, runs in seen.items()}
    lines = [
        [name, shown.shown(0) if (shown := figure(found)) else _complaint(seen[name])] for name, found in peaks.items()
    ]
    less, more = seen.values()
    goal = Goal(f"peak memory over {TIMES} times the rows, {word} chain", 1.1, False, ratio(less, more, of="peak_mib"))
    return Result("P7", f"peak memory of a worker, {word} chain", ["", "MiB"], lines, [goal], runs=as_runs(seen))


def _way(bench: Bench, job: Job) -> Callable[[], Awaitable[Measured]]:
    return lambda: stream(bench.cluster, ROWMILL, job)


def _complaint(runs: list[Measured]) -> str:
    return f"does not count: {runs[0].complaint[:200]}"
