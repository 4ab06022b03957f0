"""P4: an async handler that only gives way, 100 rows at once: from Kafka to Kafka, and the engine by itself."""

from __future__ import annotations

import sys
from dataclasses import replace

from ..bench import Bench
from ..measure import Job, tell_json
from ..peers.known import FLOOR, ROWMILL
from ..report import Goal, Result, as_runs, figure, ratio, speed

POOL = replace(FLOOR, name="bare pool")
"""The floor, with 100 tasks that take the records of a fetch one after the other."""


async def run(bench: Bench) -> list[Result]:
    """Both."""
    return [await _streamed(bench), await _by_itself(bench)]


async def _streamed(bench: Bench) -> Result:
    print("P4, from Kafka to Kafka", flush=True)
    job = Job(rows=bench.size(300_000, 5_000), kind="give way", concurrency=100)
    seen = await bench.compare([ROWMILL, POOL], job)
    goal = Goal("rate against a bare pool of 100 tasks", 0.8, True, ratio(seen["rowmill"], seen.get(POOL.name, [])))
    headings, lines = speed(seen)
    title = f"{job.rows:,} rows through a handler that awaits sleep(0), 100 at once, exactly once"
    notes = ["the bare pool is P1's floor with 100 tasks on each fetch: it reads and writes the same records"]
    return Result("P4", title, headings, lines, [goal], notes, as_runs(seen))


async def _by_itself(bench: Bench) -> Result:
    print("P4, the engine by itself", flush=True)
    count = bench.size(100_000, 5_000)
    command = [sys.executable, "-m", "benchmarks.peers.tasks", str(count)]
    seen = await bench.take_turns({"engine": lambda: tell_json(command, {})})
    figures = {what: figure([run[what] for run in seen["engine"]]) for what in ("engine", "bare", "above")}
    names = {"engine": "a row in the engine", "bare": "a row in a pool of 100 tasks", "above": "the engine's cost"}
    lines = [[names[what], found.shown()] for what, found in figures.items() if found]
    goal = Goal("the engine's cost of an async row", 8.0, False, figures["above"], "µs")
    title = f"the same handler, {count:,} rows in memory, no broker; processor time"
    return Result("P4", title, ["", "µs a row"], lines, [goal], runs=seen["engine"])
