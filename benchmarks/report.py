"""From runs to ratios, tables and verdicts; as text, as JSON and as a section of RESULTS.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from .cluster import ROOT, kafka_version
from .environments import FASTSTREAM, FAUST, QUIX
from .measure import Measured

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
"""Between these lines of RESULTS.md everything is written by the program."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A median and its spread."""

    middle: float
    least: float
    most: float

    def shown(self, digits: int = 2) -> str:
        return f"{self.middle:,.{digits}f} ({self.least:,.{digits}f} to {self.most:,.{digits}f})"


@dataclass(frozen=True, slots=True)
class Goal:
    """What was wanted, and what was found.

    Attributes:
        what: in words.
        limit: the bound.
        at_least: whether the figure must be at least the bound, or at most.
        found: the figure; None: it could not be measured, which is a miss.
        unit: behind the numbers.
    """

    what: str
    limit: float
    at_least: bool
    found: Figure | None
    unit: str = "times"

    @property
    def is_met(self) -> bool:
        if self.found is None:
            return False
        return self.found.middle >= self.limit if self.at_least else self.found.middle <= self.limit


@dataclass(frozen=True, slots=True)
class Result:
    """What a work gave.

    Attributes:
        work: its id, and perhaps a variant.
        title: what was done, in a line.
        headings, lines: a table.
        goals: with verdicts.
        notes: what a reader must know besides.
        runs: everything that was measured.
    """

    work: str
    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    goals: Sequence[Goal] = ()
    notes: Sequence[str] = ()
    runs: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


# --- figures ---------------------------------------------------------------------------------------------------------


def figure(values: Sequence[float]) -> Figure | None:
    """Median, least and most; None without any."""
    return Figure(median(values), min(values), max(values)) if values else None


def ratio(ours: Sequence[Measured], theirs: Sequence[Measured], of: str = "seconds") -> Figure | None:
    """Theirs to ours by the medians, with the spread of the pairs; None where one of them has no run that counts.

    Args:
        ours, theirs: runs in the order of the rounds, so that those of one round are a pair.
        of: the attribute that is compared.
    """
    mine, yours = ([getattr(run, of) for run in good(runs)] for runs in (ours, theirs))
    rounds = zip(ours, theirs, strict=False)
    pairs = [
        getattr(their, of) / getattr(our, of) for our, their in rounds if not our.complaint and not their.complaint
    ]
    if not mine or not yours:
        return None
    middle = median(yours) / median(mine)
    return Figure(middle, min(pairs, default=middle), max(pairs, default=middle))


def good(runs: Sequence[Measured]) -> list[Measured]:
    """Those that passed their check."""
    return [run for run in runs if not run.complaint]


def speed(seen: Mapping[str, Sequence[Measured]], ours: str = "rowmill") -> tuple[list[str], list[list[str]]]:
    """The table of a work in which everybody does the same: rates, processor time, and how much faster ours is."""
    headings = [
        "",
        "rows/s",
        "seconds",
        "processor s per million rows",
        "of the broker",
        "peak MiB",
        f"{ours} against it",
    ]
    lines = []
    for peer, runs in seen.items():
        passed = good(runs)
        if passed:
            lines.append([peer, *_speed_cells(passed), _against(seen[ours], runs) if peer != ours else ""])
        for complaint in sorted({run.complaint for run in runs if run.complaint}):
            failed = sum(run.complaint == complaint for run in runs)
            lines.append(
                [peer, f"{failed} of {len(runs)} runs do not count: {_one_line(complaint)}", "", "", "", "", ""]
            )
    return headings, lines


def _speed_cells(runs: Sequence[Measured]) -> list[str]:
    rows = runs[0].rows
    per_million = 1e6 / rows
    took = figure([run.seconds for run in runs])
    client = figure([run.cpu_seconds * per_million for run in runs])
    broker = figure([run.broker_seconds * per_million for run in runs if run.broker_seconds is not None])
    peak = figure([run.peak_mib for run in runs if run.peak_mib])
    rate = f"{rows / took.middle:,.0f}" if took else ""
    return [rate, *("" if each is None else each.shown(digits) for each, digits in _digits(took, client, broker, peak))]


def _digits(*figures: Figure | None) -> list[tuple[Figure | None, int]]:
    return list(zip(figures, (2, 1, 1, 0), strict=True))


def _against(ours: Sequence[Measured], theirs: Sequence[Measured]) -> str:
    found = ratio(ours, theirs)
    return "" if found is None else f"{found.shown()}"


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]


def repeats(seen: Mapping[str, Sequence[Measured]]) -> list[str]:
    """A note for each who gave some results more than once."""
    return [
        f"{peer}: {count:,} results more than once, in {len(runs)} runs"
        for peer, runs in seen.items()
        if (count := sum(run.repeated for run in runs))
    ]


def as_runs(seen: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Every run, for the JSON file."""
    return [run.as_dict() for runs in seen.values() for run in runs]


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """What one run of the program found of one work.

    Attributes:
        facts: where and with what it was measured.
        results: of the work, one for each variant.
    """

    facts: Mapping[str, str]
    results: Sequence[Result]


def markdown(parts: Sequence[Part], *, is_judged: bool) -> str:
    """All of it: goals first, then each work's tables. Verdicts only where sizes are those that goals are about."""
    lines = ["Ratios are of medians; in brackets the least and the most, of pairs of runs in the same round.", ""]
    goals = [(result, goal) for part in parts for result in part.results for goal in result.goals]
    if goals:
        lines += _table(["work", "goal", "found", ""], [_goal_line(*each, is_judged=is_judged) for each in goals])
    for part in parts:
        for result in part.results:
            lines += ["", f"**{result.work}** {result.title}", "", *_table(result.headings, result.lines)]
            lines += ["", *(f"- {note}" for note in result.notes)] if result.notes else []
        lines += ["", ", ".join(f"{name} {value}" for name, value in part.facts.items()) + "."]
    return "\n".join(lines) + "\n"


def _goal_line(result: Result, goal: Goal, *, is_judged: bool) -> list[str]:
    sign = "≥" if goal.at_least else "≤"
    found = "not measured" if goal.found is None else f"{goal.found.shown()} {goal.unit}"
    verdict = ("met" if goal.is_met else "**missed**") if is_judged else "not judged"
    return [result.work, f"{goal.what} {sign} {goal.limit:g} {goal.unit}", found, verdict]


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    shown = [headings, ["---"] * len(headings), *lines]
    return ["| " + " | ".join(line) + " |" for line in shown]


def facts(runs: int, *, small: bool, load_before: float) -> dict[str, str]:
    """Where and with what it was measured."""
    revision = _said("git", "rev-parse", "--short", "HEAD")
    changed = " with changes" if _said("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "On": time.strftime("%Y-%m-%d"),
        "revision": f"{revision}{changed}",
        "cores": str(os.cpu_count()),
        "load average before and after": f"{load_before:.1f} and {os.getloadavg()[0]:.1f}",
        "runs of each": str(runs) + (" (small sizes: no figures to rely on)" if small else ""),
        "Python": platform.python_version(),
        "Apache Kafka": f"{kafka_version()} (one node)",
        "rowmill with": _versions(),
        "peers": "; ".join(
            each.versions() for each in (QUIX, FAUST, FASTSTREAM) if (each.folder / "complete").exists()
        ),
    }


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("aiokafka", "orjson", "rocksdict", "aiohttp"))


def _said(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write_json(parts: Sequence[Part]) -> Path:
    """Everything that was measured, each run of it, below .rowmill/bench."""
    folder = ROOT / ".rowmill" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / time.strftime("%Y%m%d-%H%M%S.json")
    file.write_text(json.dumps([asdict(part) for part in parts], indent=1))
    return file


def remembered(file: Path, newest: Mapping[str, Part], order: Sequence[str]) -> list[Part]:
    """The last figures of every work, in order, with these among them; ``file`` remembers them for the next time.

    All works together take more than an hour, so they need not be measured in one go; the peers of one work are.
    """
    content = json.loads(file.read_text()) if file.exists() else {}
    for work, part in newest.items():
        content[work] = asdict(replace(part, results=[replace(result, runs=()) for result in part.results]))
    content = {work: content[work] for work in order if work in content}
    file.write_text(json.dumps(content, indent=1) + "\n")
    return [_part(each) for each in content.values()]


def _part(content: Mapping[str, Any]) -> Part:
    return Part(content["facts"], [_result(each) for each in content["results"]])


def _result(content: Mapping[str, Any]) -> Result:
    goals = [
        Goal(**{**goal, "found": None if goal["found"] is None else Figure(**goal["found"])})
        for goal in content["goals"]
    ]
    return Result(**{**content, "goals": goals})


def write_section(file: Path, text: str) -> None:
    """Put the text between the two marks, or, where they are not yet, at the end.

    Raises:
        SystemExit: one mark is there without the other.
    """
    whole = file.read_text()
    section = f"{BEGIN}\n{text.rstrip()}\n{END}\n"
    before, begin, rest = whole.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if bool(begin) != bool(end) or (not begin and END in whole):
        raise SystemExit(f"{file}: mend its marks first: {BEGIN} and {END} belong on lines of their own, in this order")
    file.write_text(before + section + after if begin else f"{whole.rstrip()}\n\n{section}")
