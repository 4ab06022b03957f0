"""P8: restore 1,000,000 changelog records into an empty folder.

rowmill and the bare loop are those of benchmarks/restore.py. Quix Streams restores state that it wrote itself: as many
keys, with values of the same size, in one partition; samples of what it restored are looked at through its results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from .. import restore
from ..bench import Bench
from ..child import RECOVERED
from ..cluster import Cluster
from ..environments import QUIX
from ..measure import FailedRunError, Job, Measured, Process, finished, running, settings_for
from ..peers.known import Peer, own_group
from ..report import Goal, Result, as_runs, ratio, speed

SAMPLES = 1_000
BARE = "bare getmany + WriteBatch"
RECOVERING = Peer(
    "quixstreams",
    lambda _: [str(QUIX.python()), "-m", "benchmarks.peers.quix_recovery"],
    own_group,
    is_exact=True,
    environment=QUIX,
)


async def run(bench: Bench) -> list[Result]:
    """Fill both changelogs once, restore again and again, in turn."""
    print("P8", flush=True)
    count = bench.size(1_000_000, 20_000)
    args = argparse.Namespace(
        broker=f"kafka://{bench.cluster.bootstrap}", name=f"restore-{uuid.uuid4().hex[:8]}", records=count
    )
    await restore.fill(args)
    ways = {"rowmill": lambda: _restored(args, "rowmill"), BARE: lambda: _restored(args, "bare")}
    theirs = QuixState(bench.cluster, count)
    try:
        if bench.chosen([RECOVERING]):
            await theirs.fill()
            ways[RECOVERING.name] = theirs.recover
        seen = await bench.take_turns(ways)
    finally:
        await restore.clean_up(args)
        await bench.cluster.delete(theirs.name)
    headings, lines = speed(seen)
    goals = [
        Goal("restore against a bare loop", 0.8, True, ratio(seen["rowmill"], seen[BARE])),
        Goal(
            "restore against quixstreams' recovery",
            3.0,
            True,
            ratio(seen["rowmill"], seen.get(RECOVERING.name, [])),
        ),
    ]
    title = f"{count:,} changelog records of one partition into an empty store"
    notes = ["the bare loop checks nothing; quixstreams recovers what it wrote itself, timed by its own log"]
    return [Result("P8", title, headings, lines, goals, notes, as_runs(seen))]


async def _restored(args: argparse.Namespace, kind: str) -> Measured:
    name = BARE if kind == "bare" else "rowmill"
    try:
        told = await asyncio.to_thread(restore.spawn, args, kind)
    except (subprocess.SubprocessError, OSError, SystemExit) as error:
        return Measured(name, args.records, complaint=str(error))
    return Measured(name, args.records, told["seconds"], told["cpu"], load=os.getloadavg()[0])


class QuixState:
    """Quix Streams' state of so many keys, and its recovery."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        self.name = f"bench-{uuid.uuid4().hex[:10]}"
        self._cluster = cluster
        self._job = Job(rows=count)
        self._source = f"{self.name}.in"
        self._sinks = 0
        self._published = 0

    async def fill(self) -> None:
        """Let it keep a value for each key."""
        await self._cluster.create(self._source, 1)
        await self._publish(range(self._job.rows))
        said = await self._settings()
        async with running(RECOVERING, said) as processes:
            await finished(self._cluster, RECOVERING, said, processes, self._published)
        print(f"  {RECOVERING.name} has kept {self._job.rows:,} values", flush=True)

    async def recover(self) -> Measured:
        """Start it without its folder, and look at samples of what it has then."""
        try:
            samples = range(0, self._job.rows, max(1, self._job.rows // SAMPLES))
            await self._publish(samples)
            said = await self._settings()
            async with running(RECOVERING, said) as processes:
                await finished(self._cluster, RECOVERING, said, processes, self._published, len(samples))
                told, peak = _told(processes[0]), processes[0].peak_mib()
            complaint = await self._judge(said.sink, samples)
        except FailedRunError as error:
            return Measured(RECOVERING.name, self._job.rows, complaint=str(error))
        load = os.getloadavg()[0]
        return Measured(
            RECOVERING.name, self._job.rows, told["seconds"], told["cpu"], None, peak, load, complaint=complaint
        )

    async def _settings(self) -> Any:
        self._sinks += 1
        sink = await self._cluster.create(f"{self.name}.out-{self._sinks}", 1)
        return settings_for(self._cluster, RECOVERING, self._job, self.name, self._source, sink)

    async def _publish(self, numbers: range) -> None:
        await self._cluster.fill(self._source, self._rows(numbers))
        self._published += len(numbers)

    def _rows(self, numbers: range) -> Iterator[tuple[bytes, bytes]]:
        for number in numbers:
            kept = orjson.loads(restore.value_of(number))
            yield restore.key_of(number), orjson.dumps({"id": number, "kept": kept})

    async def _judge(self, sink: str, samples: range) -> str:
        before = {}
        async for records in self._cluster.read(sink):
            for record in records:
                row = orjson.loads(record.value)
                before[row["id"]] = row["before"]
        wrong = [number for number in samples if before.get(number) != orjson.loads(restore.value_of(number))]
        return f"{len(wrong):,} of {len(samples):,} samples were not restored" if wrong else ""


def _told(process: Process) -> dict[str, float]:
    told: dict[str, float] = json.loads(Path(process.folder, RECOVERED).read_text())
    return told
