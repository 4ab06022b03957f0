"""What every work is given: the cluster, sizes, how often, and how to take turns."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .cluster import Cluster
from .measure import Job, Measured, stream
from .peers.known import ROWMILL, Peer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the program.

    Attributes:
        cluster: the Kafka that everybody uses.
        runs: of each, in turn.
        rows: instead of each work's own number; None: that.
        small: sizes that only show that it works.
        only: names of peers to measure, besides rowmill; None: all.
    """

    cluster: Cluster
    runs: int
    rows: int | None
    small: bool
    only: frozenset[str] | None = None

    def size(self, full: int, small: int) -> int:
        """How many rows, seconds, … of a work's usual size."""
        return self.rows or (small if self.small else full)

    def chosen(self, peers: Sequence[Peer]) -> list[Peer]:
        """Those that were asked for."""
        return [peer for peer in peers if self.only is None or peer is ROWMILL or peer.name in self.only]

    async def take_turns(self, ways: Mapping[str, Callable[[], Awaitable[T]]]) -> dict[str, list[T]]:
        """Run each, forth and back: what changes on the machine hits everybody alike."""
        seen: dict[str, list[T]] = {name: [] for name in ways}
        for number in range(self.runs):
            for name in ways if number % 2 == 0 else reversed(list(ways)):
                seen[name].append(await ways[name]())
                print(f"  {number + 1}/{self.runs} {name}: {_shown(seen[name][-1])}", flush=True)
        return seen

    async def compare(self, peers: Sequence[Peer], job: Job) -> dict[str, list[Measured]]:
        """The same job for everybody."""
        return await self.take_turns({peer.name: _way(self.cluster, peer, job) for peer in self.chosen(peers)})


def _way(cluster: Cluster, peer: Peer, job: Job) -> Callable[[], Awaitable[Measured]]:
    return lambda: stream(cluster, peer, job)


def _shown(value: object) -> str:
    load = f"load {os.getloadavg()[0]:.1f}"
    if isinstance(value, Measured):
        return f"{_told(value)} ({load})"
    figures: Mapping[str, float] = value if isinstance(value, Mapping) else {"seconds": value}  # type: ignore[dict-item]
    return ", ".join(f"{name} {figure:.3f}" for name, figure in figures.items()) + f" ({load})"


def _told(run: Measured) -> str:
    if run.complaint:
        return f"DOES NOT COUNT: {run.complaint}"
    more = "".join(f", {name} {figure:,.2f}" for name, figure in run.more.items())
    repeated = f", {run.repeated:,} repeated" if run.repeated else ""
    rate = run.rows / run.seconds if run.seconds else 0
    return f"{rate:,.0f} rows/s, {run.seconds:.2f} s, processor {run.cpu_seconds:.2f} s{more}{repeated}"
