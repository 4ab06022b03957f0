"""P3: a call of 50 ms to a local HTTP server for each row, exactly once, against calls alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

from ..bench import Bench
from ..cluster import ROOT
from ..measure import FailedRunError, Job, Measured, dying_with_us, stream, tell_json
from ..peers.known import ROWMILL
from ..report import Goal, Result, as_runs, ratio, speed

BARE = "bare loop of calls"


async def run(bench: Bench) -> list[Result]:
    """With 100 calls at once, and with 500."""
    return [await _with_calls(bench, concurrency) for concurrency in (100, 500)]


async def _with_calls(bench: Bench, concurrency: int) -> Result:
    print(f"P3, {concurrency} calls at once", flush=True)
    count = bench.size(60_000, 2_000)
    async with answering() as url:
        job = Job(rows=count, kind="ask", concurrency=concurrency, server=url)
        seen = await bench.take_turns(
            {
                "rowmill": lambda: stream(bench.cluster, ROWMILL, job),
                BARE: lambda: _bare(url, count, concurrency),
            }
        )
    goal = Goal(f"rate against a bare loop, {concurrency} calls at once", 0.9, True, ratio(seen["rowmill"], seen[BARE]))
    headings, lines = speed(seen)
    title = f"{count:,} rows, an HTTP call of 50 ms each, {concurrency} at once"
    notes = ["the server is one process beside them, on the same cores; the bare loop reads and writes nothing"]
    return Result("P3", title, headings, lines, [goal], notes, as_runs(seen))


@contextlib.asynccontextmanager
async def answering() -> AsyncIterator[str]:
    """The server's URL, while the block runs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = dying_with_us([sys.executable, "-m", "benchmarks.server"])
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        if server.stdout is None:
            raise RuntimeError("the server has no output")
        port = int(await asyncio.wait_for(server.stdout.readline(), 30))
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        await server.wait()


async def _bare(url: str, count: int, concurrency: int) -> Measured:
    command = [sys.executable, "-m", "benchmarks.peers.bare_http", url, str(count), str(concurrency)]
    try:
        told = await tell_json(command, {})
    except FailedRunError as error:
        return Measured(BARE, count, complaint=str(error))
    return Measured(
        BARE,
        count,
        seconds=told["seconds"],
        cpu_seconds=told["cpu_seconds"],
        peak_mib=told["peak_mib"],
        load=os.getloadavg()[0],
        complaint="" if told["right"] == count else f"{count - told['right']:,} wrong answers",
    )
