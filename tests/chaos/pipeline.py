"""The pipeline under test: one async stage whose rows take random times, with every kind of outcome.

``CHAOS_NAME`` is its name, ``CHAOS_CALLS`` the file of its calls, ``CHAOS_CONCURRENCY`` the handlers at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from rowmill import Pipeline

from .calls import CallLog
from .fate import NO_KEY, TABLE, complaint, fate, results, side

NAME = os.environ.get("CHAOS_NAME", "chaos")
SIDE = f"{NAME}.side"

calls = CallLog(os.environ.get("CHAOS_CALLS"))
pipeline = Pipeline(NAME, source=NAME, sink=f"{NAME}.out")

pipeline.table(TABLE)


@pipeline.stage(concurrency=int(os.environ.get("CHAOS_CONCURRENCY", "32")))
async def work(row: dict[str, Any], ctx: Any) -> Any:
    """Note the call, take the row's time, and meet its fate: side effects first, so that a failure must undo them."""
    calls.write("S", ctx.partition, ctx.offset)
    meant = fate(row)
    if meant.deadly:
        calls.write("K", ctx.partition, ctx.offset, "deadly")
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        await asyncio.sleep(meant.seconds)
    except BaseException:
        calls.write("X", ctx.partition, ctx.offset)
        raise
    ctx.table(TABLE).add(ctx.key or NO_KEY, 1)
    if meant.emits:
        ctx.emit(SIDE, side(row), key=ctx.key)
    calls.write("E", ctx.partition, ctx.offset)
    if meant.fails:
        raise ValueError(complaint(row))
    return results(row)
