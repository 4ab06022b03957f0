"""P5: stateful. Number the rows of each of 100,000 keys, state on disk and in a changelog, exactly once."""

from __future__ import annotations

from ..bench import Bench
from ..measure import Job
from ..peers.known import QUIX_EXACT, QUIX_ONCE_OR_MORE, ROWMILL
from ..report import Goal, Result, as_runs, ratio, repeats, speed


async def run(bench: Bench) -> list[Result]:
    """Quix Streams is the one of the peers that keeps state in transactions."""
    print("P5", flush=True)
    job = Job(rows=bench.size(300_000, 5_000), keys=2_000 if bench.small else 100_000, kind="count")
    seen = await bench.compare([ROWMILL, QUIX_EXACT, QUIX_ONCE_OR_MORE], job)
    goal = Goal("stateful rate against quixstreams", 3.0, True, ratio(seen["rowmill"], seen.get(QUIX_EXACT.name, [])))
    headings, lines = speed(seen)
    title = f"count per key, {job.rows:,} rows, {job.keys:,} keys, changelog on, commits every 0.1 s"
    return [Result("P5", title, headings, lines, [goal], repeats(seen), as_runs(seen))]
