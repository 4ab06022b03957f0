"""Nothing waits without a deadline (law 6)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .errors import BrokerTimeoutError


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
