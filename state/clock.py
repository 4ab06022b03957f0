"""Time and chance, as things that are handed in.

Everything that waits, measures or draws lots takes a :class:`Clock`. The simulation replaces it with a
virtual one; nothing else in rowmill may import ``time`` or ``random`` (ruff holds that).
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Protocol


class Clock(Protocol):
    """What the engine knows of time and chance."""

    def now_ms(self) -> int:
        """Wall-clock time in milliseconds since the epoch, as records carry it."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; only differences mean something."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait at least so long."""
        ...

    def random(self) -> float:
        """The next number in [0, 1), for jitter."""
        ...

    def token(self) -> str:
        """A short name nobody else has: 8 hexadecimal digits."""
        ...


class SystemClock:
    """The machine's clock and a generator seeded by the operating system."""

    def __init__(self) -> None:
        self._random = random.Random()  # noqa: S311 - jitter and names, no secrets

    def now_ms(self) -> int:
        """Wall-clock milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Sleep on the running event loop."""
        await asyncio.sleep(seconds)

    def random(self) -> float:
        """The next number in [0, 1)."""
        return self._random.random()

    def token(self) -> str:
        """Eight random hexadecimal digits."""
        return f"{self._random.getrandbits(32):08x}"
