"""What somebody who looks at all sessions every second need not read twice: changelogs' last checkpoints, and words.

Fifty sessions of 24 partitions are 1,200 changelogs and 600 events within the time that is looked at. From one look to
the next most changelogs have not grown, and eleven twelfths of the events are the same.
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal

from ..state.checkpoint import CheckpointRecord
from ..state.clock import Clock
from ..state.context import ExecutionContext
from ..state.errors import RowmillError
from ..state.model import Record, TopicPartition
from .brokers.base import Broker
from .collect import partitions_of, read_topic
from .deadlines import FIRST_PAUSE, deadline
from .errors import BrokerError, OffsetOutOfRangeError
from .event_records import EVENTS_TOPIC, EventRecord
from .known_sessions import KnownTail, Tail, read_tails

log = logging.getLogger(__name__)

MOST_EVENTS = 50_000
_ATTEMPTS = 3
_MOST_EVENT_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Counted:
    """What a checkpoint counts: ``problem`` where it cannot be read, and then nothing else."""

    counts: Mapping[str, int] = field(default_factory=dict)
    cost: Decimal = Decimal(0)
    tokens: int = 0
    started_ms: int = 0
    at_ms: int = 0
    problem: str = ""

    @classmethod
    def of(cls, tail: Tail) -> Counted:
        """From a changelog's end that has a checkpoint."""
        try:
            checkpoint = CheckpointRecord.decode(tail.value or b"")
            context = ExecutionContext.from_checkpoint(checkpoint.context)
        except RowmillError as error:
            return cls(problem=str(error))
        return cls(
            checkpoint.counts,
            context.accumulated_cost,
            context.accumulated_tokens,
            round(context.start_time.timestamp() * 1000),
            tail.at_ms,
        )


class TailMemory:
    """The last checkpoints of changelogs. Those that have not grown are not read again."""

    def __init__(self) -> None:
        self._known: dict[TopicPartition, KnownTail] = {}
        self._counted: dict[TopicPartition, tuple[Tail, Counted]] = {}

    async def read(
        self, broker: Broker, changelogs: Collection[TopicPartition], *, timeout: float
    ) -> dict[TopicPartition, Counted]:
        """What each of them counts; those without a checkpoint are left out.

        Raises:
            BrokerError: the broker does not answer.
        """
        for tp in self._known.keys() - set(changelogs):
            del self._known[tp]
        tails = await read_tails(broker, changelogs, timeout=timeout, known=self._known)
        counted: dict[TopicPartition, tuple[Tail, Counted]] = {}
        for tp, tail in tails.items():
            if tail.value is not None:
                before = self._counted.get(tp)
                counted[tp] = before if before is not None and before[0] is tail else (tail, Counted.of(tail))
        self._counted = counted
        return {tp: what for tp, (_, what) in counted.items()}


class WordMemory:
    """The events of the last seconds. Each look reads those that are new."""

    def __init__(self) -> None:
        self._positions: dict[TopicPartition, int] = {}
        self._events: dict[int, deque[EventRecord]] = {}

    async def recent(
        self, broker: Broker, *, since_ms: int, groups: Collection[str], clock: Clock, timeout: float
    ) -> list[EventRecord]:
        """Events of these sessions that were written since then, each worker's in their order; it is tried three times.

        Raises:
            BrokerError: the broker does not answer.
            TopicError: the topic may not be read.
        """
        async with deadline(timeout, f"read {EVENTS_TOPIC}"):
            for attempt in range(_ATTEMPTS):
                try:
                    await self._read(broker, since_ms)
                    break
                except (BrokerError, OffsetOutOfRangeError) as error:  # or retention was quicker
                    self._positions, self._events = {}, {}
                    if attempt == _ATTEMPTS - 1:
                        raise
                    log.debug("reading %s again: %s", EVENTS_TOPIC, error)
                    await clock.sleep(FIRST_PAUSE)
        # A merge, not a sort: it keeps the order within each partition, whatever the workers' clocks did.
        merged = heapq.merge(*self._events.values(), key=lambda event: event.at_ms)
        return [event for event in merged if event.group in groups]

    async def _read(self, broker: Broker, since_ms: int) -> None:
        partitions = await partitions_of(broker, [EVENTS_TOPIC])
        ends = await broker.offsets(partitions, "end")
        known = self._positions
        if set(partitions) != set(known) or any(ends[tp] < known[tp] for tp in partitions):
            # The first look; or the topic has grown, or was made anew.
            self._positions = dict(await broker.offsets(partitions, since_ms))
            self._events = {tp.partition: deque() for tp in partitions}
        async for records in read_topic(broker, EVENTS_TOPIC, self._positions, until="end"):
            last = records[-1]
            self._events[last.partition].extend(_events_of(records))
            self._positions[TopicPartition(last.topic, last.partition)] = last.offset + 1
            _forget(self._events[last.partition], since_ms, len(partitions))
        for events in self._events.values():
            _forget(events, since_ms, len(partitions))


def _events_of(records: Sequence[Record]) -> Iterator[EventRecord]:
    """With the broker's dates."""
    for record in records:
        event = EventRecord.decode(record.value)
        if event is not None:
            yield replace(event, written_ms=record.timestamp, size=len(record.value or b""))


def _forget(events: deque[EventRecord], since_ms: int, partitions: int) -> None:
    """Those that are too old, and the oldest beyond so many and so large: anybody may write to the topic."""
    while events and events[0].written_ms < since_ms:
        events.popleft()
    size = sum(event.size for event in events)
    while events and (size > _MOST_EVENT_BYTES // partitions or len(events) > MOST_EVENTS):
        size -= events.popleft().size
