"""A whole console in the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rowmill.streams.console.console import Console


@asynccontextmanager
async def live_console(url: str, folder: Path) -> AsyncIterator[Console]:
    """A console that serves its page, and whose history is live; it must end within twenty seconds."""
    console, stop, ready = Console(url, port=0, state_dir=folder), asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(console.run(stop, lambda _: ready.set()))
    try:
        async with asyncio.timeout(60):
            while not ready.is_set() or console.board.standing.state != "live":
                assert not task.done(), task.result()
                await asyncio.sleep(0.05)
        yield console
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await task
