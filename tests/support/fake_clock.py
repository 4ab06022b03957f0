"""A clock that tests turn by hand: sleeping moves it on and takes no time."""

from __future__ import annotations

import asyncio


class FakeClock:
    """Starts at a fixed moment; ``sleep`` advances it at once and lets other tasks run.

    ``slept`` lists every sleep in seconds. Chance is even: ``random`` always gives 0.5.
    """

    def __init__(self, now_ms: int = 1_750_000_000_000) -> None:
        self._now_ms = now_ms
        self._monotonic = 100.0
        self._tokens = 0
        self.slept: list[float] = []

    def now_ms(self) -> int:
        """The fixed moment, moved on by sleeps."""
        return self._now_ms

    def monotonic(self) -> float:
        """Seconds, moved on by sleeps."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._monotonic += seconds
        self._now_ms += int(seconds * 1000)

    async def sleep(self, seconds: float) -> None:
        """Move on at once."""
        self.slept.append(seconds)
        self.advance(seconds)
        await asyncio.sleep(0)

    def random(self) -> float:
        """The middle."""
        return 0.5

    def token(self) -> str:
        """00000001, 00000002, …"""
        self._tokens += 1
        return f"{self._tokens:08x}"
