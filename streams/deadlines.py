"""Nothing waits without a deadline (law 6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from ..state.clock import Clock
from .errors import BrokerTimeoutError

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts: they double from one to the other."""


@asynccontextmanager
async def deadline(seconds: float, what: str) -> AsyncIterator[None]:
    """Give the block ``seconds``; what it did is unknown when they pass.

    Raises:
        BrokerTimeoutError: the time is over. A TimeoutError of the block's own passes through as it is.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if limit.expired():
            raise BrokerTimeoutError(what, seconds) from None
        raise


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await something that must not be left half done, also when the caller is cancelled meanwhile."""
    running = asyncio.create_task(work)
    cancelled = False
    while not running.done():
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            cancelled = True
    if not cancelled or running.cancelled():
        running.result()
    if cancelled:
        if error := running.exception():
            log.debug("while letting go: %s", error)
        raise asyncio.CancelledError


class Patience:
    """How long a partition's trouble may last, and the growing pauses between attempts.

    Args:
        clock: time.
        stall: seconds after which it is over.
    """

    def __init__(self, clock: Clock, stall: float) -> None:
        self._clock = clock
        self._stall = stall
        self._pause = FIRST_PAUSE
        self._until = self._began = clock.monotonic() + stall

    def begin(self) -> None:
        """An attempt begins."""
        self._began = self._clock.monotonic()

    def is_over(self, *, worked: bool) -> bool:
        """Whether to give up, after an attempt failed. One that worked for a while made this trouble a new one."""
        now = self._clock.monotonic()
        if worked or now - self._began > self._stall:
            self._pause, self._until = FIRST_PAUSE, now + self._stall
        return now > self._until

    async def pause(self) -> None:
        """Wait a little, each time longer."""
        await self._clock.sleep(self._pause * (0.5 + self._clock.random() / 2))
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
