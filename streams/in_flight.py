"""How much is in work in a worker, against its caps."""

from __future__ import annotations

import asyncio
from typing import Literal


class InFlight:
    """How much is in work in the whole worker, against its caps on rows and bytes.

    A task with nothing in work may always begin one row: nobody starves because others are slow.
    """

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self.rows = 0
        self.bytes = 0
        self._waiting: list[asyncio.Event] = []

    def has_room(self) -> bool:
        """Whether another row may begin."""
        return self.rows < self._max_rows and self.bytes < self._max_bytes

    def full(self) -> Literal["", "rows", "bytes"]:
        """Which cap is reached; "" if none is."""
        if self.has_room():
            return ""
        return "rows" if self.rows >= self._max_rows else "bytes"

    def begin(self, rows: int, size: int) -> None:
        """Rows begin."""
        self.rows += rows
        self.bytes += size

    def end(self, rows: int, size: int) -> None:
        """Rows are done, or given up."""
        self.rows -= rows
        self.bytes -= size
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for event in waiting:
                event.set()

    def tell(self, event: asyncio.Event) -> None:
        """Set this event at the next :meth:`end`."""
        self._waiting.append(event)
