"""Faults, evictions, stops and rebalances by a seed: whatever comes, results are exact."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest
from rowmill import Pipeline, Worker
from rowmill.state.codec import dumps, loads
from rowmill.state.model import Committed
from rowmill.streams.errors import FencedError
from rowmill.streams.options import WorkerOptions
from support.fake_broker import FakeBroker, Step, lost
from support.fake_clock import FakeClock

GROUP = "rowmill.p"
ROWS, PARTITIONS = 90, 3
STEPS: list[Step] = ["start", "begin", "send", "ack", "offsets", "end", "committed", "look_up", "fetch", "position"]
OPTIONS = WorkerOptions(commit_interval=0.002, broker_timeout=0.5, drain_timeout=5, fetch_rows=10, stall_timeout=10_000)


async def handler(row: dict[str, Any]) -> Any:
    """Split, drop or keep, some sooner and some later."""
    for _ in range(row["n"] % 4):
        await asyncio.sleep(0)
    return [row, row] if row["n"] % 7 == 0 else None if row["n"] % 5 == 0 else row


def put_in_faults(broker: FakeBroker, chance: random.Random) -> None:
    """Some faults, among them fencings."""
    for _ in range(chance.randint(0, 6)):
        step = chance.choice(STEPS)
        fenced = step in {"begin", "send", "offsets", "end"} and chance.random() < 0.3
        broker.inject(
            step,
            FencedError("somebody else") if fenced else lost(),
            took_effect=not fenced and chance.random() < 0.5,
            skip=chance.randint(0, 12),
            times=chance.randint(1, 2),
        )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(int(os.environ.get("ROWMILL_TEST_SEEDS", "12"))))
async def test_exact_whatever_happens(seed: int) -> None:
    """Workers come, stop, are evicted and fail; in the end each row has its results once, a key's in order."""
    chance = random.Random(seed)
    broker = FakeBroker(markers=chance.random() < 0.5, lazy=chance.choice([0.0, 0.01, 0.2]))
    tps = broker.make("in", PARTITIONS)
    for n in range(ROWS):
        broker.write(tps[n % PARTITIONS], dumps({"n": n}), key=None if n % 6 == 5 else b"%d" % (n % 5))
        if chance.random() < 0.1:
            broker.skip_offsets(tps[n % PARTITIONS], 2)
    ends = {tp: broker.log(tp).high_watermark for tp in tps}
    pipeline = Pipeline("p", source="in", sink="out").add(handler)

    def hired() -> tuple[Worker, asyncio.Task[Any]]:
        worker = Worker(pipeline, broker, options=OPTIONS, clock=FakeClock())
        worker.finish_at(ends)
        return worker, asyncio.create_task(worker.run())

    for _ in range(chance.randint(1, 3)):
        put_in_faults(broker, chance)
        staff = [hired() for _ in range(chance.randint(1, 2))]
        for _ in range(chance.randint(0, 60)):
            await asyncio.sleep(0)
        if chance.random() < 0.4:
            broker.evict(GROUP)
        for _ in range(chance.randint(0, 200)):
            await asyncio.sleep(0)
        for worker, _ in staff:
            worker.stop()
        await asyncio.wait_for(asyncio.gather(*(run for _, run in staff)), 20)
    _, last = hired()
    await asyncio.wait_for(last, 20)

    broker.show_all()
    expected = [n for n in range(ROWS) for _ in range(2 if n % 7 == 0 else 0 if n % 5 == 0 else 1)]
    assert sorted(loads(value or b"")["n"] for value in broker.values("out")) == expected, f"seed {seed}"
    for key in range(5):
        for tp in tps:
            mine = [r for r in broker.records("out") if r.key == b"%d" % key and r.partition == tp.partition]
            in_order = [loads(r.value or b"")["n"] for r in mine]
            assert in_order == sorted(in_order), f"seed {seed}, key {key} of {tp}"
    assert broker.values("p.dlq") == []
    assert broker.group_offsets[GROUP] == {tp: Committed(end) for tp, end in ends.items()}
    assert broker.members(GROUP) == []
