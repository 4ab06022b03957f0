"""What happened, in order: the last of it for reports, and a digest of all of it to compare runs by."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable

from simulation.loop import PROCESS


class Trace:
    """Lines with time and process.

    Args:
        now: virtual time.
        kept: lines that a report shows.
    """

    def __init__(self, now: Callable[[], float], kept: int = 80) -> None:
        self._now = now
        self._lines: deque[str] = deque(maxlen=kept)
        self._digest = hashlib.blake2b(digest_size=16)

    def note(self, text: str) -> None:
        """Add a line."""
        process = PROCESS.get()
        line = f"{self._now():10.4f}  {process.name if process else '-':8} {text}"
        self._lines.append(line)
        self._digest.update(line.encode())

    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._lines)

    @property
    def digest(self) -> str:
        """The same for two runs in which the same happened."""
        return self._digest.hexdigest()
