"""Publishing rows to any topic and reading any topic's records, from Python and for the command line."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias

from ..state.clock import Clock, SystemClock
from ..state.codec import loads
from ..state.errors import BadRowError, ConfigError
from ..state.model import Headers, Outgoing, Record, Row, StoredRecord, TopicPartition, stored
from .brokers.base import Broker, Moment, Producer, Reader
from .brokers.open import open_broker
from .catalog import Catalog
from .collect import partitions_of
from .deadlines import deadline
from .errors import TopicError
from .inputs import Input, InputReader, InputRow, make_input
from .loops import LoopThread, run_blocking
from .partitioning import partition_for
from .session import check_topic
from .tracing import publishing, system_of

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only

_CALL_SECONDS = 30.0
_CHUNK = 5_000
_IN_FLIGHT = 4

Start: TypeAlias = "str | int | datetime | Mapping[TopicPartition, int]"
"""Where to begin reading: ``earliest``, ``end``, an offset (in every partition), a time, or offsets by partition."""


@dataclass(frozen=True, slots=True)
class Message:
    """A record as read.

    Attributes:
        topic, partition, offset: where it stands.
        timestamp: milliseconds since the epoch.
        key, value: bytes, or None.
        headers: (name, bytes or None) in order.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers

    @property
    def row(self) -> Row:
        """The value as a row.

        Raises:
            BadRowError: it is no JSON object (a ValueError).
        """
        row = loads(self.value or b"null")
        if not isinstance(row, dict):
            raise BadRowError(
                "not_an_object", f"{self.topic}/{self.partition}/{self.offset}: the value is no JSON object"
            )
        return row


@dataclass(slots=True)
class Published:
    """What a publish did: rows sent, and how many of them were sent as they stood because they are no rows."""

    topic: str
    rows: int = 0
    broken: int = 0
    first_error: str | None = None


async def publish_input(
    broker: Broker,
    topic: str,
    rows: Input,
    *,
    clock: Clock,
    create: bool = True,
    partitions: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Published:
    """Send every row to a topic, in order per partition; waits until the broker has them all.

    A broken line of a file is sent as it stands: the worker that reads it makes a dead letter of it.

    Args:
        broker: started.
        topic: created when absent, if ``create``.
        rows: what to send.
        clock: gives the rows' timestamps.
        create, partitions: whether and how wide to make the topic.
        progress: called with (rows sent, total or None) after every chunk.

    Raises:
        TopicError: the topic is missing, or a record is too large for it.
        BrokerError: the broker failed; rows sent so far stay sent.
    """
    catalog = Catalog(broker, create=create, partitions=partitions, timeout=_CALL_SECONDS)
    await catalog.require([check_topic("topic", topic)])
    done = Published(topic)
    producer, reader = broker.producer(), InputReader(rows)
    pending: list[Awaitable[None]] = []
    system = system_of(broker.url)
    try:
        async with deadline(_CALL_SECONDS, "start publishing"):
            await producer.start()
        with publishing(topic, system) as headers:
            while chunk := await reader.take(_CHUNK):
                pending += await _send(producer, topic, chunk, catalog.partitions(topic), done.rows, clock, headers)
                _count(done, chunk)
                while len(pending) > _IN_FLIGHT * catalog.partitions(topic):
                    await _written(pending.pop(0))
                if progress is not None:
                    progress(done.rows, rows.total)
            for written in pending:
                await _written(written)
    finally:
        reader.close()
        await producer.close()
    return done


async def _send(
    producer: Producer,
    topic: str,
    chunk: list[InputRow],
    partitions: int,
    before: int,
    clock: Clock,
    headers: Headers = (),
) -> list[Awaitable[None]]:
    now = clock.now_ms()
    by_partition: dict[int, list[Outgoing]] = {}
    turn = before // _CHUNK
    for i, row in enumerate(chunk):
        # Rows without a key go round the partitions in runs, so that a short file does not fill only the first.
        keyless = (turn + i * partitions // len(chunk)) % partitions
        partition = keyless if row.key is None else partition_for(row.key, partitions)
        by_partition.setdefault(partition, []).append(Outgoing(row.key, row.value, now, headers))
    async with deadline(_CALL_SECONDS, f"publish to {topic}"):
        return [await producer.send(TopicPartition(topic, p), records) for p, records in by_partition.items()]


async def _written(pending: Awaitable[None]) -> None:
    async with deadline(_CALL_SECONDS, "publish"):
        await pending


def _count(done: Published, chunk: list[InputRow]) -> None:
    done.rows += len(chunk)
    for row in chunk:
        if row.error is not None:
            done.broken += 1
            done.first_error = done.first_error or row.error


async def consume(
    broker: Broker,
    topic: str,
    *,
    start: Start = "earliest",
    limit: int | None = None,
    follow: bool = False,
    partition: int | None = None,
) -> AsyncGenerator[list[StoredRecord]]:
    """The committed records of a topic, in the lots in which the broker gives them.

    Args:
        broker: started.
        topic: one that exists.
        start: where to begin.
        limit: stop after so many; None for all.
        follow: wait for more at the end instead of stopping at what is the end now.
        partition: read this one only.

    Raises:
        TopicError: no such topic.
        OffsetOutOfRangeError: the offset asked for is not in the log.
    """
    partitions = await partitions_of(broker, [topic])
    if not partitions:
        raise TopicError(f"no topic {topic!r} on {broker.url}; `rowmill topics` lists what there is")
    if partition is not None:
        partitions = [tp for tp in partitions if tp.partition == partition]
        if not partitions:
            raise TopicError(f"topic {topic!r} on {broker.url} has no partition {partition}")
    positions = await _positions(broker, partitions, start)
    ends = await broker.offsets(partitions, "end")
    left = {tp for tp in partitions if follow or positions[tp] < ends[tp]}
    if not left or limit == 0:
        return
    reader = broker.reader()
    try:
        await reader.start({tp: positions[tp] for tp in left})
        wanted = limit
        while left:
            for tp, records in (await _next(reader, left, patient=follow)).items():
                seen = stored(tp, [r for r in records if follow or r.offset < ends[tp]][:wanted])
                if seen:
                    yield seen
                if wanted is not None:
                    wanted -= len(seen)
                    if not wanted:
                        return
            if not follow:
                left = {tp for tp in left if await reader.position(tp) < ends[tp]}
    finally:
        await reader.close()


async def _next(
    reader: Reader, partitions: Collection[TopicPartition], *, patient: bool
) -> dict[TopicPartition, Sequence[Record]]:
    """What comes next; up to an end that exists, something must come (a fetch tells nothing of a dead broker)."""
    if patient:
        return await reader.fetch(partitions, 2_000, 0.5)
    async with deadline(_CALL_SECONDS, "read"):
        before = [await reader.position(tp) for tp in partitions]
        while True:
            got = await reader.fetch(partitions, 2_000, 0.5)
            if got or before != [await reader.position(tp) for tp in partitions]:
                return got


async def _positions(broker: Broker, partitions: list[TopicPartition], start: Start) -> dict[TopicPartition, int]:
    if isinstance(start, Mapping):
        return {**await broker.offsets(partitions, "earliest"), **start}
    if isinstance(start, bool):
        raise ConfigError("start", start, "use 'earliest', 'end', an offset or a datetime")
    if isinstance(start, int):
        earliest = await broker.offsets(partitions, "earliest")
        ends = await broker.offsets(partitions, "end")
        # Like Kafka's own tools: an offset beyond a partition's end means its end there.
        return {tp: min(max(start, earliest[tp]), ends[tp]) for tp in partitions}
    if isinstance(start, datetime):
        return await broker.offsets(partitions, int(start.timestamp() * 1000))
    moments: dict[str, Moment] = {"earliest": "earliest", "end": "end", "latest": "end"}
    if start not in moments:
        raise ConfigError("start", start, "use 'earliest', 'end', an offset or a datetime")
    return await broker.offsets(partitions, moments[start])


# --- the Python face -------------------------------------------------------------------------------------------


def publish(
    topic: str, rows: pd.DataFrame | Iterable[Row], *, broker: str | None = None, key: str | None = None
) -> int:
    """Publish rows to a topic as plain JSON and return how many.

    Args:
        topic: created when absent.
        rows: a DataFrame or an iterable of dicts.
        broker: its URL; default ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        key: the column that becomes the key; rows of one key keep their order.

    Raises:
        ConfigError: a row is no dict or cannot be written as JSON; nothing after it is sent.
        BrokerError: the broker cannot be reached or failed.
    """
    clock = SystemClock()
    source = _Strict(make_input(rows, key))

    async def run() -> int:
        connected = open_broker(broker, clock=clock)
        await connected.start()
        try:
            return (await publish_input(connected, topic, source, clock=clock)).rows
        finally:
            await connected.close()

    return run_blocking(run)


class _Strict:
    """From Python a row that is none is the caller's mistake, not a dead letter."""

    def __init__(self, rows: Input) -> None:
        self._rows = rows
        self.fingerprint = rows.fingerprint
        self.total = rows.total
        self.is_file = rows.is_file

    def rows(self, first: int) -> Iterator[InputRow]:
        for number, row in enumerate(self._rows.rows(first), first):
            if row.error is not None:
                raise ConfigError(f"row {number}", row.value[:100], row.error)
            yield row


def read(
    topic: str,
    *,
    broker: str | None = None,
    start: Start = "earliest",
    limit: int | None = None,
    follow: bool = False,
) -> Iterator[Message]:
    """Read a topic's committed records, one after the other.

    Args:
        topic: one that exists.
        broker: its URL; default ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        start: ``earliest``, ``end``, an offset, or a datetime.
        limit: stop after so many.
        follow: wait for more for ever; otherwise end where the topic ended when reading began.

    Yields:
        Messages; in order within each partition. ``pd.DataFrame(m.row for m in read(topic))`` makes a frame.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise ConfigError("limit", limit, "give a whole number from 0, or None for no limit")
    with LoopThread() as loop:
        connected = open_broker(broker)
        loop.submit(connected.start).result()
        try:
            lots = consume(connected, topic, start=start, limit=limit, follow=follow)
            while lot := loop.submit(lambda: anext(lots, None)).result():
                for r in lot:
                    yield Message(*r)
            loop.submit(lots.aclose).result()
        finally:
            if not sys.is_finalizing():  # else the loop's thread is dead already, and nobody would answer
                loop.submit(connected.close).result()
