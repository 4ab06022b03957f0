"""What a run showed, for the terminal and for ``docs/reliability.md``."""

from __future__ import annotations

import datetime as dt
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from support.kafka_server import kafka_version

from .run import Outcome

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
INVARIANTS = ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8")
_MARKS = {True: "ok", False: "**FAILED**", None: "-"}


def summary(outcome: Outcome) -> str:
    """A scenario's verdicts with their figures."""
    lines = [
        (
            f"{'ok    ' if outcome.holds else 'FAILED'} {outcome.scenario.name}: injected {outcome.injected} times, "
            f"{outcome.kills} SIGKILLs, {outcome.rows:,} rows, {outcome.seconds:.0f} s, seed {outcome.seed}, "
            f"recovery {recovery(outcome)} s"
        )
    ]
    for name, verdict in outcome.verdicts.items():
        mark = {True: "ok", False: "FAILED", None: "-"}[verdict.holds]
        lines.append(f"  {name} {mark:6} {verdict.figures}")
    lines += [f"  {note}" for note in outcome.notes]
    if outcome.folder is not None:
        lines.append(f"  logs: {outcome.folder}")
    return "\n".join(lines)


def recovery(outcome: Outcome) -> str:
    """Median and maximum."""
    times = outcome.recoveries
    return f"{statistics.median(times):.1f} / {max(times):.1f}" if times else "-"


def table(outcomes: Sequence[Outcome]) -> str:
    """The table of a full run, with what it ran on."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    kills = sum(outcome.kills for outcome in outcomes)
    today = dt.datetime.now(dt.UTC).date()
    lines = [
        (
            f"Run of {today}, seed {', '.join(map(str, seeds))}: Apache Kafka {kafka_version()} (one node), aiokafka "
            f"{version('aiokafka')}, Python {platform.python_version()}, {os.cpu_count()} shared cores; "
            f"{len(outcomes)} scenarios, {sum(o.rows for o in outcomes):,} rows, {kills} SIGKILLs to workers, "
            f"{sum(outcome.seconds for outcome in outcomes) / 60:.0f} minutes."
        ),
        "",
        "| fault | injected | rows | " + " | ".join(INVARIANTS) + " | recovery, median / max (s) |",
        "|---|--:|--:|" + "---|" * len(INVARIANTS) + "--:|",
    ]
    for outcome in outcomes:
        marks = [_MARKS[outcome.verdicts[name].holds] for name in INVARIANTS]
        cells = [outcome.scenario.fault, str(outcome.injected), f"{outcome.rows:,}", *marks, recovery(outcome)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(_most_kills(outcomes))]
    return "\n".join(lines)


def _most_kills(outcomes: Sequence[Outcome]) -> list[str]:
    most = max(outcomes, key=lambda outcome: outcome.kills)
    if most.kills < 100:
        return []
    told = "; ".join(f"{name}: {most.verdicts[name].figures}" for name in ("I1", "I4"))
    return [f"The scenario with {most.kills} SIGKILLs, in figures: {told}."]


def write(outcomes: Sequence[Outcome]) -> None:
    """Put the table between its markers; the words around it stay."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table(outcomes)}\n{END}{tail}", encoding="utf-8")
