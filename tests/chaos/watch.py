"""What the outside can see of a run while it goes on: source, outputs, and the group's commits with their times."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from rowmill.state.clock import SystemClock
from rowmill.state.errors import RowmillError
from rowmill.state.model import Committed, Record, TopicPartition
from rowmill.streams.brokers.base import Broker, Reader
from rowmill.streams.brokers.kafka import KafkaBroker
from rowmill.streams.offsets import OffsetMap, decode_map
from rowmill.streams.session import SOURCE_HEADER

Place = tuple[int, int]
"""Partition and offset of a source row."""

LOOK_SECONDS = 0.25
SAMPLE_SECONDS = 1.5


class Sample(NamedTuple):
    """The outputs' last stable offsets, what was committed after that, and the high watermarks after that."""

    stable: dict[TopicPartition, int]
    complete: dict[int, OffsetMap]
    written: dict[TopicPartition, int]


class Progress(NamedTuple):
    """How many rows of each partition were known to be complete at a time."""

    at: float
    complete: tuple[int, ...]


class Watch:
    """Follows a run's topics and its group; reads committed records only, and disturbs nothing."""

    def __init__(self, bootstrap: str, group: str, source: str, outputs: Collection[str], partitions: int) -> None:
        self.group = group
        self.outputs = tuple(outputs)
        self.tps = [TopicPartition(source, p) for p in range(partitions)]
        self.broker: Broker = KafkaBroker(bootstrap, clock=SystemClock())
        self.rows: dict[Place, Record] = {}
        self.records: defaultdict[TopicPartition, list[Record]] = defaultdict(list)
        self.by_row: defaultdict[Place, list[tuple[TopicPartition, int]]] = defaultdict(list)
        self.visible_at: dict[Place, float] = {}
        self.complete_at: dict[Place, float] = {}
        self.committed: dict[TopicPartition, Committed | None] = {}
        self.progress: list[Progress] = []
        self.backwards: list[str] = []
        self.samples: list[Sample] = []
        self._counts = [0] * partitions
        self._positions: dict[TopicPartition, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._reader: Reader | None = None

    async def start(self) -> None:
        """Begin to follow; the broker is started, and the topics exist."""
        outputs = await self.output_partitions()
        self._positions = dict.fromkeys([*self.tps, *outputs], 0)
        self._tasks = [asyncio.create_task(work()) for work in (self._follow, self._look_on, self._sample_on)]

    async def close(self) -> None:
        """Stop following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close_reader()
        await self.broker.close()

    async def output_partitions(self) -> list[TopicPartition]:
        """All partitions of the output topics."""
        topics = await self.broker.topics()
        return [TopicPartition(name, p) for name in self.outputs for p in range(topics[name].partitions)]

    # --- records -----------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            try:
                if self._reader is None:
                    self._reader = self.broker.reader()
                    await self._reader.start(self._positions)
                for tp, records in (await self._reader.fetch(list(self._positions), 5_000, 0.2)).items():
                    self._note(tp, records)
                for tp in self._positions:
                    self._positions[tp] = max(self._positions[tp], await self._reader.position(tp))
            except RowmillError:
                await self._close_reader()
                await asyncio.sleep(0.5)

    async def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.close()

    def _note(self, tp: TopicPartition, records: Sequence[Record]) -> None:
        if not records:
            return
        self._positions[tp] = records[-1].offset + 1
        if tp.topic == self.tps[0].topic:
            self.rows.update(((tp.partition, record.offset), record) for record in records)
            return
        self.records[tp] += records
        now = time.monotonic()
        for record in records:
            place = source_of(record)
            if place is not None:
                self.by_row[place].append((tp, record.offset))
                self.visible_at.setdefault(place, now)

    def reads_up_to(self, ends: dict[TopicPartition, int]) -> bool:
        """Whether everything before these offsets was seen."""
        return all(self._positions[tp] >= end for tp, end in ends.items())

    # --- commits -----------------------------------------------------------------------------------------------

    async def _look_on(self) -> None:
        while True:
            try:
                await self.look()
            except RowmillError:
                await asyncio.sleep(0.5)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> dict[TopicPartition, Committed | None]:
        """Read the group's commits and note what is complete since."""
        found = await self.broker.committed(self.group, self.tps)
        now = time.monotonic()
        for tp, committed in found.items():
            if committed is not None and committed != self.committed.get(tp):
                self.take(tp.partition, committed, now)
        self.committed = found
        self.progress.append(Progress(now, tuple(self._counts)))
        return found

    def take(self, partition: int, committed: Committed, at: float) -> None:
        """A commit that was known to be final at some time."""
        known = decode_map(committed)
        previous = self.committed.get(self.tps[partition])
        if previous is not None and committed.offset < previous.offset:
            self.backwards.append(f"partition {partition}: {previous.offset} -> {committed.offset}")
        incomplete = set(known.incomplete)
        forgotten = [offset for offset in incomplete if (partition, offset) in self.complete_at]
        if forgotten:
            self.backwards.append(f"partition {partition}: {forgotten[:3]} complete, then not")
        for offset in range(previous.offset if previous else 0, known.end):
            if offset not in incomplete and (partition, offset) not in self.complete_at:
                self.complete_at[partition, offset] = at
                self._counts[partition] += 1

    def note_earlier(self, partition: int, committed: Committed, at: float) -> None:
        """A worker's own word for a commit: it may know of it before we looked."""
        known = decode_map(committed)
        incomplete = set(known.incomplete)
        for offset in range(known.low - 1, -1, -1):
            if self.complete_at.get((partition, offset), 0.0) <= at:
                break
            self.complete_at[partition, offset] = at
        for offset in range(known.low, known.end):
            if offset not in incomplete and self.complete_at.get((partition, offset), at + 1) > at:
                self.complete_at[partition, offset] = at

    # --- whole transactions ------------------------------------------------------------------------------------

    async def _sample_on(self) -> None:
        while True:
            try:
                await self.sample()
            except RowmillError:
                await asyncio.sleep(0.5)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def sample(self) -> Sample:
        """Take one; see :func:`verdicts.whole_transactions` for what follows from it."""
        outputs = await self.output_partitions()
        stable = await self.broker.offsets(outputs, "end")
        found = await self.broker.committed(self.group, self.tps)
        written = await self.broker.offsets(outputs, "high_watermark")
        complete = {tp.partition: decode_map(committed or Committed(0)) for tp, committed in found.items()}
        sample = Sample(stable, complete, written)
        self.samples.append(sample)
        return sample


def changelog(group: str, source: str) -> str:
    """Where the changes of a group's tables go."""
    return f"{group}.{source}.changelog"


def source_of(record: Record) -> Place | None:
    """The row that a result or side output came from; None for other records."""
    for name, value in record.headers:
        if name == SOURCE_HEADER and value:
            _, partition, offset, _ = value.decode().rsplit("/", 3)
            return int(partition), int(offset)
    return None
