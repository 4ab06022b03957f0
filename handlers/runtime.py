"""What the stages of one worker share: threads, time, slots, and the state behind their policies.

Law 1: between two partition tasks nothing is shared but this. One object per worker; a chain run in a notebook, in a
test or by ``Pipeline.process`` gets one of its own. Handlers reach it as ``ctx.runtime``: elements that run stages of
their own (graphs, routers) need it, others hardly ever do.
"""

from __future__ import annotations

import asyncio

from ..state.clock import Clock, SystemClock
from .executors import BlockingPool
from .stage import Stage


class Runtime:
    """Shared by all stages of one worker.

    Args:
        pool: threads for plain and blocking handlers; whoever made it closes it.
        clock: time and chance; default: the machine's.
    """

    def __init__(self, pool: BlockingPool, clock: Clock | None = None) -> None:
        self.pool = pool
        self.clock = clock or SystemClock()
        self._slots: dict[str, asyncio.Semaphore] = {}

    def slots(self, stage: Stage) -> asyncio.Semaphore:
        """The stage's slots: how many of its calls may run at once, over all partitions."""
        slots = self._slots.get(stage.name)
        if slots is None:
            slots = self._slots[stage.name] = asyncio.Semaphore(stage.concurrency)
        return slots
