"""P10: publish, process, read: the embedded broker against Apache Kafka, with rowmill on both."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..bench import Bench
from ..measure import FailedRunError, Measured, tell_json
from ..report import Goal, Result, as_runs, figure, good, ratio

STEPS = ("publish", "process", "read")
EMBEDDED, KAFKA = "embedded", "Apache Kafka"


async def run(bench: Bench) -> list[Result]:
    """The three steps one after the other, in one process."""
    print("P10", flush=True)
    count = bench.size(300_000, 5_000)
    kafka = f"kafka://{bench.cluster.bootstrap}"
    seen = await bench.take_turns(
        {EMBEDDED: lambda: _taken(EMBEDDED, "", count), KAFKA: lambda: _taken(KAFKA, kafka, count)}
    )
    lines = [_line(name, runs) for name, runs in seen.items()]
    goal = Goal("embedded against Apache Kafka", 0.7, True, ratio(seen[EMBEDDED], seen[KAFKA]))
    title = f"{count:,} rows of about 80 bytes, rowmill on both, four partitions; seconds"
    return [Result("P10", title, ["", *STEPS, "in all"], lines, [goal], runs=as_runs(seen))]


async def _taken(name: str, url: str, count: int) -> Measured:
    folder = Path(tempfile.mkdtemp(prefix="rowmill-bench-"))
    command = [sys.executable, "-m", "benchmarks.peers.three_steps", url or f"local://{folder / 'broker'}"]
    try:
        told = await tell_json([*command, str(count), str(folder / "state")], {})
    except FailedRunError as error:
        return Measured(name, count, complaint=str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    steps: Mapping[str, float] = {step: told[step] for step in STEPS}
    return Measured(name, count, sum(steps.values()), told["cpu"], load=os.getloadavg()[0], more=steps)


def _line(name: str, runs: list[Measured]) -> list[str]:
    passed = good(runs)
    if not passed:
        return [name, f"does not count: {runs[0].complaint[:200]}", "", "", ""]
    shown = [figure([run.more[step] for run in passed]) for step in STEPS] + [figure([run.seconds for run in passed])]
    return [name, *("" if each is None else each.shown() for each in shown)]
