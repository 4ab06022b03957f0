"""kill -9 in the middle of paid calls: nothing is paid for twice but what was under way when the process died.

A call is under way at a kill if it had begun by then and the service had not handed its whole answer to the network
50 ms before: what was on its way back the process may not have read, let alone stored.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from rowmill import publish
from support.flaky_server import Call, FlakyServer

from .test_policies import context_of, rows_of

pytestmark = pytest.mark.timeout(150)

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
SUPPORT = Path(__file__).parents[1] / "support"
CONCURRENCY = 20
SEED = 4
COMMIT_INTERVAL = 1.0
ON_ITS_WAY = 0.1
"""Seconds that an answer may need from the service's socket into the worker's cache."""
NOT_YET_SHARED = 0.5
"""Seconds that an answer may need into the topic of shared answers."""


class Kill(NamedTuple):
    """Between these two moments of the monotonic clock a process died."""

    before: float
    after: float

    def hit(self, call: Call, seconds: float) -> bool:
        """Whether a call was under way, or its answer not older than so many seconds."""
        return call.begun <= self.after and min(call.answered, call.gone) > self.before - seconds


class Process:
    """``rowmill worker`` as a process of its own."""

    def __init__(self, broker: str, name: str, server: FlakyServer, state: Path, **told: Any) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SUPPORT.parent), os.environ.get("PYTHONPATH", "")]),
            "ROWMILL_TEST_NAME": name,
            "ROWMILL_TEST_URL": server.url,
            **{f"ROWMILL_TEST_{key.upper()}": str(value) for key, value in told.items()},
        }
        command = [ROWMILL, "worker", f"{SUPPORT / 'paid_pipelines.py'}:paid", "--broker", broker]
        # Commits are rare, so that a kill undoes the work of a second: without the cache it would be paid for again.
        command += ["--max-deaths", "0", "--state-dir", str(state), "--commit-interval", str(COMMIT_INTERVAL)]
        self.log = (state.parent / f"{name}.log").open("ab")
        self._process = subprocess.Popen(command, env=environment, stderr=self.log)

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def kill(self) -> Kill:
        """SIGKILL."""
        before = time.monotonic()
        self._process.kill()
        self._process.wait(20)
        return Kill(before, time.monotonic())

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        if self.is_alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(40)
        finally:
            self._process.kill()
            self._process.wait(20)
            self.log.close()


@asynccontextmanager
async def process(*args: Any, **told: Any) -> AsyncIterator[Process]:
    """A process that is gone after the block."""
    one = await asyncio.to_thread(Process, *args, **told)
    try:
        yield one
    finally:
        await asyncio.to_thread(one.stop)


async def called(server: FlakyServer, times: int, worker: Process) -> None:
    """Wait until the service was called so often."""
    async with asyncio.timeout(60):
        while len(server.calls) < times:
            assert worker.is_alive, "a worker ended by itself"
            await asyncio.sleep(0.01)


async def complete(url: str, name: str, rows: int, worker: Process) -> list[dict[str, Any]]:
    """The results, once there are as many as rows."""
    async with asyncio.timeout(60):
        while len(found := await rows_of(url, f"{name}.out")) < rows:
            assert worker.is_alive, "a worker ended by itself"
            await asyncio.sleep(0.5)
    return found


def most_calls(calls: list[Call], kills: list[Kill], seconds: float) -> Counter[int]:
    """How often each row may have been paid for, by what was under way at the kills."""
    allowed = Counter(dict.fromkeys({call.row for call in calls}, 1))
    for kill in kills:
        allowed.update({call.row for call in calls if kill.hit(call, seconds)})
    return allowed


async def test_killed_workers_pay_once(broker_url: str, name: str, tmp_path: Path) -> None:
    """Killed again and again and gone on with: exact output, and calls <= rows + those under way at the kills."""
    chance, rows = Random(SEED), 1_500
    times = 4 if broker_url.startswith("local:") else 2  # Kafka notices a death after ten seconds
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(rows)], broker=broker_url)
    kills: list[Kill] = []
    with FlakyServer(delay=0.02) as server:
        told = {"cache": "own", "concurrency": CONCURRENCY}
        for share in sorted(chance.uniform(0.1, 0.85) for _ in range(times)):
            async with process(broker_url, name, server, tmp_path / "state", **told) as worker:
                await called(server, max(int(share * rows), len(server.calls) + 30), worker)
                await asyncio.sleep(chance.uniform(0, 0.05))
                kills.append(await asyncio.to_thread(worker.kill))
        async with process(broker_url, name, server, tmp_path / "state", **told) as worker:
            found = await complete(broker_url, name, rows, worker)
    assert sorted((row["n"], row["answer"]) for row in found) == [(n, n * 2) for n in range(rows)]
    check_paid(server, kills, rows, ON_ITS_WAY)
    under_way = [sum(kill.hit(call, 0) for call in server.calls) for kill in kills]
    assert sum(under_way) > 0  # one may come just between two rounds of calls, but not all
    # Twice the slots: a call may end, and the next begin, while the signal is on its way.
    assert max(under_way) <= 2 * CONCURRENCY
    context = await context_of(broker_url, name)
    assert (context.completed_rows, context.accumulated_cost) == (rows, Decimal(rows))


async def test_another_machine_finds_what_was_paid_for(broker_url: str, name: str, tmp_path: Path) -> None:
    """With shared answers the same holds where the next worker has nothing of the first one's disk, but for the
    answers of the last half second.
    """
    rows = 800
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(rows)], broker=broker_url)
    with FlakyServer(delay=0.02) as server:
        told = {"cache": "shared", "concurrency": CONCURRENCY}
        async with process(broker_url, name, server, tmp_path / "one", **told) as worker:
            await called(server, 500, worker)
            kill = await asyncio.to_thread(worker.kill)
        async with process(broker_url, name, server, tmp_path / "two", **told) as worker:
            found = await complete(broker_url, name, rows, worker)
    assert sorted((row["n"], row["answer"]) for row in found) == [(n, n * 2) for n in range(rows)]
    check_paid(server, [kill], rows, NOT_YET_SHARED)


def check_paid(server: FlakyServer, kills: list[Kill], rows: int, seconds: float) -> None:
    """No row was paid for more often than the kills excuse, nor all of them together."""
    calls, paid = server.calls, server.per_row()
    under_way = sum(kill.hit(call, seconds) for call in calls for kill in kills)
    print(f"{len(calls)} calls for {rows} rows; under way at {len(kills)} kills: {under_way}")
    assert set(paid) == set(range(rows))
    allowed = most_calls(calls, kills, seconds)
    assert not {row: count for row, count in paid.items() if count > allowed[row]}
    assert len(calls) <= rows + under_way
