"""P4, in a process of its own: the engine's cost of an async row, above 100 tasks that do the same."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

from benchmarks.policies import CONCURRENCY, gives_way, make_rows, run_flow


async def main() -> None:
    from rowmill.handlers.executors import BlockingPool
    from rowmill.handlers.runtime import Runtime
    from rowmill.handlers.stage import make_stage
    from rowmill.state.clock import SystemClock

    count, pool = int(sys.argv[1]), BlockingPool()
    runtime = Runtime(pool, SystemClock())
    stage = make_stage(gives_way, name="give-way", concurrency=CONCURRENCY)
    await run_flow(stage, make_rows(1_000, 1_000), runtime)
    engine = await run_flow(stage, make_rows(count, count), runtime)
    bare = await run_bare(make_rows(count, count))
    await runtime.close()
    pool.close()
    print(json.dumps({"engine": engine, "bare": bare, "above": engine - bare}))


async def run_bare(rows: list[dict[str, Any]]) -> float:
    """Microseconds of processor time a row."""
    coming, done = iter(rows), 0

    async def take() -> None:
        nonlocal done
        for row in coming:
            await gives_way(row)
            done += 1

    gc.collect()
    began = time.process_time()
    await asyncio.gather(*(take() for _ in range(CONCURRENCY)))
    if done != len(rows):
        raise SystemExit(f"{done:,} of {len(rows):,} rows came through")
    return (time.process_time() - began) / len(rows) * 1e6


if __name__ == "__main__":
    asyncio.run(main())
