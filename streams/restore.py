"""Reading a partition's changelog: all of it into the tables' store, or just its last checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from ..state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from ..state.clock import Clock
from ..state.model import Record, TopicPartition
from .brokers.base import Broker, Reader
from .deadlines import deadline
from .errors import BrokerTimeoutError, OffsetOutOfRangeError

log = logging.getLogger(__name__)

_FETCH_ROWS = 10_000
_FETCH_SECONDS = 0.25
_TELL_SECONDS = 5.0
_TAIL = 100

Load = Callable[[Sequence[Record], int], Awaitable[None]]
"""Takes records of the changelog, and the position behind them."""


class ChangelogReader:
    """Reads one partition's changelog, and looks single records of its source up; a consumer of its own.

    Args:
        broker: where both are.
        changelog: the changelog's partition.
        source: the partition that the task reads.
        timeout: seconds without progress after which the broker counts as gone.
        clock: for progress messages.
    """

    def __init__(
        self, broker: Broker, changelog: TopicPartition, source: TopicPartition, timeout: float, clock: Clock
    ) -> None:
        self._broker = broker
        self._changelog = changelog
        self._source = source
        self._timeout = timeout
        self._clock = clock
        self._reader: Reader | None = None
        self.start = 0
        """The first offset that the changelog has."""
        self.end = 0
        """The offset behind its last record that counts."""

    async def open(self) -> None:
        """Look up where the changelog begins and ends. Call it once the partition's producer is started."""
        async with deadline(self._timeout, f"{self._changelog}: look up its ends"):
            self.start = (await self._broker.offsets([self._changelog], "earliest"))[self._changelog]
            self.end = (await self._broker.offsets([self._changelog], "end"))[self._changelog]

    async def close(self) -> None:
        """Let go of the consumer."""
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.close()

    async def restore(self, position: int, load: Load) -> int:
        """Hand over everything from ``position`` to the end; returns how many records there were."""
        began = told = self._clock.monotonic()
        total = 0
        reader = await self._reading(self._changelog, position)
        while position < self.end:
            records, position = await self._next(reader, self._changelog)
            total += len(records)
            await load(records, position)
            now = self._clock.monotonic()
            if now - told > _TELL_SECONDS:
                told = now
                share = (position - self.start) / max(1, self.end - self.start)
                log.warning(
                    "%s: rows wait while tables are restored: %.0f %%, %d records", self._source, 100 * share, total
                )
        seconds = self._clock.monotonic() - began
        if seconds > _TELL_SECONDS:
            log.warning("%s: tables restored: %d records in %.1f s", self._source, total, seconds)
        return total

    async def last_checkpoint(self) -> CheckpointRecord | None:
        """The changelog's newest checkpoint, found from the end backwards.

        Raises:
            CheckpointError: it cannot be read.
        """
        step = _TAIL
        until = self.end
        while until > self.start:
            begin = max(self.start, self.end - step)
            found: Record | None = None
            reader, position = await self._reading(self._changelog, begin), begin
            while position < self.end:
                records, position = await self._next(reader, self._changelog)
                found = next((r for r in reversed(records) if r.key == CHECKPOINT_KEY), found)
            if found is not None:
                return CheckpointRecord.decode(found.value or b"")
            until, step = begin, step * 20
        return None

    async def record_at(self, offset: int) -> Record | None:
        """The source's record at exactly this offset; None if there is none any more."""
        async with deadline(self._timeout, f"{self._source}: look up its ends"):
            first = (await self._broker.offsets([self._source], "earliest"))[self._source]
            end = (await self._broker.offsets([self._source], "end"))[self._source]
        if not first <= offset < end:
            return None
        reader = await self._reading(self._source, offset)
        try:
            records, _ = await self._next(reader, self._source, 1)
        except OffsetOutOfRangeError:  # retention was quicker
            return None
        return records[0] if records and records[0].offset == offset else None

    async def _reading(self, tp: TopicPartition, position: int) -> Reader:
        """A new consumer, of this partition alone.

        Kafka holds a fetch at a log's end open for half a second, and the client has one at a time: a consumer that
        was there already, or that reads an empty partition besides, waits it out before it fetches anything else.
        """
        await self.close()
        self._reader = reader = self._broker.reader()
        async with deadline(self._timeout, f"{tp}: start reading"):
            await reader.start({tp: position})
        return reader

    async def _next(self, reader: Reader, tp: TopicPartition, most: int = _FETCH_ROWS) -> tuple[Sequence[Record], int]:
        """The next records, and the position behind them; a gap gives none and moves the position."""
        async with deadline(self._timeout, f"{tp}: look up the position"):
            before = await reader.position(tp)
        give_up = self._clock.monotonic() + self._timeout
        while True:
            async with deadline(self._timeout, f"{tp}: read"):
                records = (await reader.fetch([tp], most, _FETCH_SECONDS)).get(tp, ())
                position = await reader.position(tp)
            if records or position > before:
                return records, position
            if self._clock.monotonic() > give_up:
                raise BrokerTimeoutError(f"{tp}: read from offset {before:,}", self._timeout)


async def last_checkpoint(
    broker: Broker, changelog: TopicPartition, source: TopicPartition, timeout: float, clock: Clock
) -> CheckpointRecord | None:
    """A changelog's newest checkpoint, with a reader of its own; None if there is none.

    Raises:
        CheckpointError: it cannot be read.
        BrokerError: the broker does not answer.
    """
    reader = ChangelogReader(broker, changelog, source, timeout, clock)
    try:
        await reader.open()
        return await reader.last_checkpoint()
    finally:
        await reader.close()
