"""P2: what each further plain stage costs a row, above calling its function. No broker."""

from __future__ import annotations

import sys

from ..bench import Bench
from ..measure import tell_json
from ..report import Goal, Result, figure


async def run(bench: Bench) -> list[Result]:
    """Chains of 1 and 21 stages against 20 nested calls; processor time."""
    print("P2", flush=True)
    count = bench.size(100_000, 5_000)
    seen = await bench.take_turns(
        {"chain": lambda: tell_json([sys.executable, "-m", "benchmarks.peers.stages", str(count)], {})}
    )
    figures = {what: figure([run[what] for run in seen["chain"]]) for what in ("above", "stage", "call")}
    names = {"stage": "a further stage", "call": "calling its function", "above": "above the call"}
    lines = [[names[what], found.shown(3)] for what, found in figures.items() if found]
    goals = [Goal("a further plain stage, above the call", 0.3, False, figures["above"], "µs a row")]
    return [Result("P2", f"{count:,} rows in one chain", ["", "µs a row"], lines, goals, runs=seen["chain"])]
