"""P11: what it costs to start: a job of ten rows to its end, ``--help``, and the import of pandas beside them."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..bench import Bench
from ..report import Figure, Goal, Result, figure
from ..rows import row_of

ROWS = 10
ROWMILL = str(Path(sys.executable).with_name("rowmill"))
PIPELINE = """
from rowmill import Pipeline

startup = Pipeline("startup")

@startup.stage
def compute(row):
    return {**row, "total": int(row["price"]) * int(row["quantity"])}
"""


async def run(bench: Bench) -> list[Result]:
    """Three commands in turn; one round before the first is not counted: files are in memory, and compiled."""
    print("P11", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="rowmill-bench-"))
    try:
        make_job(folder)
        ways: dict[str, Callable[[], float]] = {
            "run": partial(_job, folder),
            "help": partial(_timed, [ROWMILL, "--help"], folder),
            "pandas": partial(_timed, [sys.executable, "-c", "import pandas"], folder),
        }
        for way in ways.values():
            way()
        seen = await bench.take_turns({name: partial(asyncio.to_thread, way) for name, way in ways.items()})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    above = [ran - imported for ran, imported in zip(seen["run"], seen["pandas"], strict=True)]
    found = {name: figure(times) for name, times in seen.items()}
    goals = [
        Goal("rowmill run of 10 rows, above the import of pandas", 0.5, False, figure(above), "s"),
        Goal("rowmill --help", 0.25, False, found["help"], "s"),
    ]
    names = {
        "run": f"rowmill run, {ROWS} rows, embedded",
        "help": "rowmill --help",
        "pandas": "python -c 'import pandas'",
    }
    lines = [[names[name], _shown(each)] for name, each in found.items()]
    return [Result("P11", "from start to exit; seconds", ["", "s"], lines, goals, runs=[seen])]


def make_job(folder: Path) -> None:
    """A pipeline and its input."""
    (folder / "startup.py").write_text(PIPELINE)
    rows = [row_of(number) for number in range(ROWS)]
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _job(folder: Path) -> float:
    """A run in an empty folder, whose output must be right."""
    output = folder / "scored.jsonl"
    output.unlink(missing_ok=True)
    shutil.rmtree(folder / ".rowmill", ignore_errors=True)
    command = [ROWMILL, "run", "startup.py", "--input", "rows.csv", "--output", str(output)]
    took = _timed([*command, "--broker", "local://.rowmill"], folder)
    totals = [json.loads(line)["total"] for line in output.read_text().splitlines()]
    if totals != [row["price"] * row["quantity"] for row in map(row_of, range(ROWS))]:
        raise SystemExit(f"rowmill run gave wrong results: {totals}")
    return took


def _timed(command: Sequence[str], folder: Path) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROWMILL_")}
    # pip compiles what it installs; here rowmill runs from its sources, and who measures may have Python write nothing.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    took = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-1_000:]}")
    return took


def _shown(found: Figure | None) -> str:
    return "" if found is None else found.shown()
