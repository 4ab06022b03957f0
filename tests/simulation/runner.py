"""Many seeds: one after the other or on several cores, and what they amount to."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from simulation.world import SimulationError, World

_CHUNK = 10


@dataclass
class Summary:
    """What happened in some seeds."""

    seeds: int = 0
    rows: int = 0
    calls: int = 0
    virtual_seconds: float = 0.0
    rebalances: int = 0
    strays: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    deeds: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)

    def add(self, other: Summary) -> None:
        """Count another one in."""
        self.seeds += other.seeds
        self.rows += other.rows
        self.calls += other.calls
        self.virtual_seconds += other.virtual_seconds
        self.rebalances += other.rebalances
        self.strays += other.strays
        self.faults += other.faults
        self.deeds += other.deeds
        self.failures |= other.failures

    def __str__(self) -> str:
        lines = [
            f"{self.seeds:,} seeds, {len(self.failures)} failed",
            f"{self.rows:,} rows, {self.calls:,} calls of handlers, {self.virtual_seconds / 3600:,.1f} virtual hours",
            f"{self.rebalances:,} rebalances, {self.deeds['killed']:,} kills",
            f"{self.strays:,} producers started between two assignments",
            "on the network: " + _counted(self.faults),
            "besides: " + _counted(self.deeds),
        ]
        if self.failures:
            lines.append("failed: " + ", ".join(map(str, sorted(self.failures))))
        return "\n".join(lines)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def run_seed(seed: int) -> Summary:
    """One run."""
    world = World(seed)
    summary = Summary(seeds=1, rows=len(world.workload.rows))
    try:
        world.run()
    except SimulationError as error:
        summary.failures[seed] = str(error)
    summary.calls, summary.strays = world.checker.calls, world.checker.strays
    summary.virtual_seconds = world.seconds
    summary.rebalances = sum(group.rebalances for group in world.cluster.groups.values())
    summary.deeds = world.counts
    for what, count in world.network.faults.items():
        summary.faults[what.partition(" ")[0]] += count
    return summary


def run_seeds(seeds: Sequence[int]) -> Summary:
    """Several runs."""
    total = Summary()
    for seed in seeds:
        total.add(run_seed(seed))
    return total


def run_all(seeds: range, jobs: int) -> Summary:
    """Many runs on several cores; failures are printed as they come."""
    total, began = Summary(), time.monotonic()
    for part in _parts(seeds, jobs):
        total.add(part)
        for text in part.failures.values():
            print(text, flush=True)
        if total.seeds % 200 < _CHUNK:
            print(f"… {total.seeds:,} seeds, {time.monotonic() - began:,.0f} s", flush=True)
    print(f"{total}\n{time.monotonic() - began:,.0f} s")
    return total


def _parts(seeds: range, jobs: int) -> Iterator[Summary]:
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    if jobs < 2:
        yield from map(run_seeds, chunks)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(run_seeds, chunks)
