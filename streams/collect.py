"""Reading a session's topics to the end, and putting its results back into the order of its input."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import IO, Literal, NamedTuple

from ..state.codec import dumps, loads
from ..state.model import Record, StoredRecord, TopicPartition, stored
from .brokers.base import Broker, Reader
from .dead_letters import ERROR_PREFIX
from .deadlines import deadline
from .session import INPUT_ROW_HEADER, SOURCE_HEADER

_READ_SECONDS = 30.0
_SPILL_AFTER = 50_000
_SPILL_BYTES = 32 * 1024 * 1024


class Result(NamedTuple):
    """A result with its place: ``order`` sorts by input row (or source offset), then by ordinal."""

    order: tuple[int, int, int]
    value: bytes

    @property
    def row(self) -> int:
        """The input row's number; for a session without an input of its own, the source offset."""
        return self.order[1]


async def partitions_of(broker: Broker, topics: Sequence[str]) -> list[TopicPartition]:
    """All partitions of those topics that exist."""
    present = await broker.topics()
    return [TopicPartition(t, p) for t in topics if t in present for p in range(present[t].partitions)]


async def read_topic(
    broker: Broker,
    topic: str,
    starts: Mapping[TopicPartition, int] | None = None,
    until: Literal["high_watermark", "end"] = "high_watermark",
) -> AsyncIterator[Sequence[StoredRecord]]:
    """Every committed record of a topic, each batch of one partition, from ``starts`` (default: the first) to the end.

    With ``until="end"`` transactions that are under way are not waited for.

    Raises:
        BrokerTimeoutError: no progress for 30 s.
    """
    partitions = await partitions_of(broker, [topic])
    positions = {**await broker.offsets(partitions, "earliest"), **(starts or {})}
    ends = await broker.offsets(partitions, until)
    left = {tp for tp in partitions if positions[tp] < ends[tp]}
    if not left:
        return
    reader = broker.reader()
    try:
        await reader.start({tp: positions[tp] for tp in left})
        while left:
            async with deadline(_READ_SECONDS, f"read {topic}"):
                batches, left = await _next(reader, left, ends)
            for records in batches:
                yield records
    finally:
        await reader.close()


async def _next(
    reader: Reader, left: set[TopicPartition], ends: Mapping[TopicPartition, int]
) -> tuple[list[Sequence[StoredRecord]], set[TopicPartition]]:
    while True:
        got = await reader.fetch(left, 5_000, 0.5)
        remaining = {tp for tp in left if await reader.position(tp) < ends[tp]}
        if got or remaining != left:
            return [stored(tp, records) for tp, records in got.items() if records], remaining


def header(record: Record, name: str) -> bytes | None:
    """The last value of a header, as Kafka's clients read it; None when absent."""
    return next((value for key, value in reversed(record.headers) if key == name), None)


def input_row(record: Record) -> int | None:
    """The number of the input row that a record of a bounded run comes from."""
    number = header(record, INPUT_ROW_HEADER)
    return int(number) if number is not None and number.isdigit() else None


def result_of(record: Record, sources: Sequence[str] = ()) -> Result | None:
    """A sink record as a Result; None when rowmill did not write it.

    Args:
        record: as read from the sink.
        sources: the topics whose rows they are, for sessions without an input of their own: results are ordered by
            source, partition and offset then.
    """
    source = header(record, SOURCE_HEADER)
    if source is None or record.value is None:
        return None
    topic, partition, offset, ordinal = source.decode().rsplit("/", 3)
    row = input_row(record)
    if row is not None:
        return Result((0, row, int(ordinal)), record.value)
    place = sources.index(topic) if topic in sources else len(sources)
    return Result((place << 32 | int(partition), int(offset), int(ordinal)), record.value)


def error_field(record: Record, name: str) -> str:
    """A field of a dead letter's error headers."""
    return (header(record, ERROR_PREFIX + name) or b"").decode("utf-8", "replace")


class Sorter:
    """Sorts any number of results in bounded memory: sorted runs on disk, merged at the end.

    Results come nearly in order already, but a key that a handler changed moves them to other partitions, and rows
    complete out of order; so nothing short of sorting is sure.
    """

    def __init__(self, spill_after: int = _SPILL_AFTER) -> None:
        self._spill_after = spill_after
        self._held: list[Result] = []
        self._held_bytes = 0
        self._runs: list[IO[bytes]] = []

    def add(self, result: Result) -> None:
        """Take one."""
        self._held.append(result)
        self._held_bytes += len(result.value)
        if len(self._held) >= self._spill_after or self._held_bytes >= _SPILL_BYTES:
            self._spill()

    def sorted(self) -> Iterator[Result]:
        """All of them in order. May be called again."""
        self._held.sort()
        return heapq.merge(self._held, *(_lines(run) for run in self._runs))

    def close(self) -> None:
        """Remove the files."""
        for run in self._runs:
            run.close()

    def _spill(self) -> None:
        self._held.sort()
        run = tempfile.TemporaryFile(prefix="rowmill-")  # noqa: SIM115 - closed by close()
        for result in self._held:
            # JSON text has no line breaks, so a line can hold the order and the value as it is.
            run.write(dumps(result.order) + b" " + result.value + b"\n")
        self._runs.append(run)
        self._held, self._held_bytes = [], 0


def _lines(run: IO[bytes]) -> Iterator[Result]:
    run.seek(0)
    for line in run:
        order, _, value = line.rstrip(b"\n").partition(b" ")
        a, b, c = loads(order)
        yield Result((a, b, c), value)
