"""P6: how long a row takes from being published to being visible, at 1,000 rows a second.

The harness publishes each row when it is due and reads the sink as any consumer with ``read_committed`` does; counted
is from the moment a row was due, so that a publisher that is late cannot hide it. The peer is a process of its own.
The send loop, which lingers 5 ms and guarantees nothing, tells what clients and broker take by themselves there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import aiokafka
import orjson

from ..bench import Bench
from ..checks import Expected, judge
from ..cluster import PARTITIONS, Cluster
from ..measure import FailedRunError, Job, Measured, joined, running, settings_for
from ..peers.known import LOOP, QUIX_EXACT, QUIX_ONCE_OR_MORE, ROWMILL, ROWMILL_ONCE_OR_MORE, Peer
from ..report import Goal, Result, as_runs, figure, good, repeats

RATE = 1_000
WARM_UP_SECONDS = 2
"""Rows of the first seconds do not count."""
LATE_SECONDS = 20.0
PEERS = (ROWMILL, ROWMILL_ONCE_OR_MORE, QUIX_EXACT, QUIX_ONCE_OR_MORE, LOOP)
GOALS = ((ROWMILL.name, "p50", 80.0), (ROWMILL.name, "p99", 250.0), (ROWMILL_ONCE_OR_MORE.name, "p50", 15.0))


async def run(bench: Bench) -> list[Result]:
    """Exactly once and at least once, with Quix Streams' beside ours."""
    print("P6", flush=True)
    rows = WARM_UP_SECONDS * RATE + bench.size(30 * RATE, 3 * RATE)
    peers = [peer for peer in PEERS if bench.only is None or "rowmill" in peer.name or peer.name in bench.only]
    seen = await bench.take_turns({peer.name: _way(bench.cluster, peer, Job(rows=rows, waits=True)) for peer in peers})
    found = {
        (name, which): figure([each.more[which] for each in good(runs)])
        for name, runs in seen.items()
        for which in ("p50", "p99", "most")
    }
    lines = []
    for name, runs in seen.items():
        shown = [found[name, which] for which in ("p50", "p99", "most")]
        failed = [each.complaint for each in runs if each.complaint]
        cells = ["" if each is None else each.shown(0) for each in shown]
        lines.append([name, *cells, f"{len(failed)} runs do not count: {failed[0][:200]}" if failed else ""])
    goals = [
        Goal(f"{name}: {which} of the time to visibility", limit, False, found[name, which], "ms")
        for name, which, limit in GOALS
    ]
    title = f"{RATE:,} rows/s for {(rows // RATE) - WARM_UP_SECONDS} s, commits every 0.1 s; ms from due to visible"
    return [Result("P6", title, ["", "p50", "p99", "most", ""], lines, goals, repeats(seen), as_runs(seen))]


def _way(cluster: Cluster, peer: Peer, job: Job) -> Any:
    return lambda: _timed(cluster, peer, job)


async def _timed(cluster: Cluster, peer: Peer, job: Job) -> Measured:
    name = f"bench-{uuid.uuid4().hex[:10]}"
    try:
        source, sink = await cluster.create(f"{name}.in"), await cluster.create(f"{name}.out")
        said = settings_for(cluster, peer, job, name, source, sink)
        async with running(peer, said) as processes:
            await joined(cluster, peer.group(said), processes)
            took = await _publish_and_watch(cluster, source, sink, job)
            cpu, peak = processes[0].cpu_seconds(), processes[0].peak_mib()
        expected = Expected(job.rows, job.result, job.key, peer.is_exact)
        verdict = await judge(expected, cluster.read(sink))
    except FailedRunError as error:
        return Measured(peer.name, job.rows, complaint=str(error))
    finally:
        await cluster.delete(name)
    more = {"p50": took[len(took) // 2], "p99": took[len(took) * 99 // 100], "most": took[-1]}
    run = Measured(peer.name, job.rows, job.rows / RATE, cpu, peak_mib=peak, load=os.getloadavg()[0], more=more)
    return replace(run, repeated=verdict.repeated, complaint=verdict.complaint)


async def _publish_and_watch(cluster: Cluster, source: str, sink: str, job: Job) -> list[float]:
    """Sorted milliseconds from a row's due time to its first appearance."""
    due: list[float] = []
    seen: dict[int, float] = {}
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=cluster.bootstrap, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    await consumer.start()
    consumer.assign([aiokafka.TopicPartition(sink, partition) for partition in range(PARTITIONS)])
    watching = asyncio.create_task(_watch(consumer, seen, job.rows))
    try:
        await _publish(cluster.bootstrap, source, job, due)
        await asyncio.wait({watching}, timeout=LATE_SECONDS)
        if not watching.done():
            raise FailedRunError(
                f"{len(seen):,} of {job.rows:,} results are visible {LATE_SECONDS:.0f} s after the last row"
            )
        await watching
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await consumer.stop()
    return sorted((seen[number] - due[number]) * 1000 for number in range(WARM_UP_SECONDS * RATE, job.rows))


async def _publish(bootstrap: str, source: str, job: Job, due: list[float]) -> None:
    """Each row at its time, whatever became of those before it."""
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        await producer.partitions_for(source)
        began, sent = time.monotonic() + 0.1, []
        for number in range(job.rows):
            due.append(began + number / RATE)
            value = orjson.dumps(job.row(number))
            if (early := due[number] - time.monotonic()) > 0:
                await asyncio.sleep(early)
            sent.append(await producer.send(source, value, key=job.key(number)))
        await asyncio.gather(*sent)


async def _watch(consumer: Any, seen: dict[int, float], count: int) -> None:
    while len(seen) < count:
        fetched: dict[Any, Sequence[Any]] = await consumer.getmany(timeout_ms=1_000)
        now = time.monotonic()
        for records in fetched.values():
            for record in records:
                seen.setdefault(orjson.loads(record.value)["id"], now)
