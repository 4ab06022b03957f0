"""P1: a JSON row in, one field computed, a JSON row out. One process, four partitions, exactly once where that is."""

from __future__ import annotations

from ..bench import Bench
from ..measure import Job, Measured
from ..peers.known import ALL
from ..report import Goal, Result, as_runs, ratio, repeats, speed

GOALS = (("quixstreams", 5.0), ("faust", 30.0), ("send loop", 2.0), ("floor", 0.8))
SIZES = {"80 bytes": 80, "1 KB": 1_000}


async def run(bench: Bench) -> list[Result]:
    """Once for each size of rows."""
    results = []
    for size, row_bytes in SIZES.items():
        print(f"P1, rows of about {size}", flush=True)
        job = Job(rows=bench.size(300_000, 5_000), row_bytes=row_bytes)
        results.append(_told(size, job, await bench.compare(ALL, job)))
    return results


def _told(size: str, job: Job, seen: dict[str, list[Measured]]) -> Result:
    goals = [
        Goal(f"rate against {peer}, {size}", limit, True, ratio(seen["rowmill"], seen[peer]))
        for peer, limit in GOALS
        if peer in seen
    ]
    headings, lines = speed(seen)
    title = f"one field computed, {job.rows:,} rows of about {size}, {job.keys:,} keys, commits every 0.1 s"
    return Result("P1", title, headings, lines, goals, repeats(seen), as_runs(seen))
