"""The events topic ``rowmill.events``: who works, how far they are, and what happens to them.

A worker's :class:`EventPublisher` hears what the runtime tells, and writes it in the background together with one
``progress`` event per second. Events are for people and their tools; nothing in rowmill depends on one. So the data
path must not notice them: whoever tells an event waits for nobody, too many are dropped and counted, and so are those
that were under way when the broker failed. An event appears at most once, and a worker's events appear in order.

All events of a session have its group as their key. Three partitions on Kafka: one would do for the load, but then all
readers and writers of a cluster would meet at one node, and a console could not share the work. The embedded broker is
one file and has one. Seven days are kept, and no more than ``retention.bytes``: a worker with six partitions writes
some 180 MB a day. Kafka keeps them as gzip, which every client reads, in 0.8 KB a second instead of 2.1 (measured), and
drops whole segments only, so these are made small. Records are dated by the broker: a worker's clock that runs an hour
fast would else be refused, and readers look for "the last 15 seconds" by these dates.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import platform
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..handlers.runtime import Event
from ..state.clock import Clock
from ..state.errors import BadRowError, RowmillError
from ..state.model import Outgoing, Record, TopicPartition
from .brokers.base import Broker, Moment, Producer, Reader, TopicSpec
from .collect import partitions_of, read_topic
from .deadlines import FIRST_PAUSE, LONGEST_PAUSE, deadline
from .errors import BrokerError, OffsetOutOfRangeError, TopicError
from .event_records import EVENTS_TOPIC, PROGRESS, ROW_FAILED, WORKER_STOPPED, EventRecord, plain, plain_text
from .partitioning import partition_for
from .session import Session
from .snapshots import WorkerSnapshot

log = logging.getLogger(__name__)

MOST_PER_SECOND = 50
"""Events of one kind that a worker writes in a second; further ones are dropped and counted."""
MOST_ROW_FAILED_PER_SECOND = 20
"""The same of ``row_failed``: every row may fail, and a dead letter tells of each."""
QUEUE_EVENTS, QUEUE_BYTES = 2_000, 4 * 1024 * 1024
"""Events that may wait to be written; beyond either, the oldest are dropped."""
CLOSE_SECONDS = 2.0
"""How long the end may take, whatever state the broker is in."""

_CAPS = {ROW_FAILED: MOST_ROW_FAILED_PER_SECOND}
_MOST_KINDS = 200
_ROUND_SECONDS = 0.25
_PROGRESS_SECONDS = 1.0
_REFUSED_SECONDS = 30.0
_FLUSH_SECONDS = 0.75 * CLOSE_SECONDS
_LONG_EVENT_BYTES = 8 * 1024
_ENVELOPE_BYTES = 1_000

_FETCH_RECORDS, _FETCH_SECONDS = 2_000, 0.5
_LOOK_AGAIN_SECONDS = 1.0
_ATTEMPTS = 3
_RECENT_EVENTS = 10_000
_RECENT_BYTES = 32 * 1024 * 1024

_CONFIG = {
    "cleanup.policy": "delete",
    "retention.ms": str(7 * 86_400_000),
    "message.timestamp.type": "LogAppendTime",
    "compression.type": "gzip",
    "segment.ms": str(86_400_000),
}


def events_topic(broker: Broker) -> TopicSpec:
    """How the topic is made: see the module."""
    if broker.folder is not None:
        return TopicSpec(EVENTS_TOPIC, 1, {**_CONFIG, "retention.bytes": str(64 << 20)})
    return TopicSpec(EVENTS_TOPIC, 3, {**_CONFIG, "retention.bytes": str(256 << 20), "segment.bytes": str(32 << 20)})


class _Waiting(NamedTuple):
    kind: str
    value: bytes


class EventPublisher:
    """Writes one worker's events in the background.

    At any time ``told`` is ``sent`` and ``dropped`` together with those that still wait or are under way; after
    :meth:`close`, it is the two. Progress counts as told when it is made.

    Args:
        broker: a started one; the publisher has a producer of its own on it.
        session: whose events they are.
        worker: the worker's name.
        snapshot: how the worker stands; called on the event loop, once per second.
        clock: time.
        create: whether the topic may be made.
        timeout: seconds that each call to the broker may take.

    Attributes:
        told: events heard, and progress made.
        sent: of these, those that the broker has acknowledged.
        dropped: of these, those that were too many, could not be written as JSON, or were not acknowledged. One of the
            latter may be in the topic all the same.
    """

    def __init__(
        self,
        broker: Broker,
        session: Session,
        worker: str,
        snapshot: Callable[[], WorkerSnapshot],
        *,
        clock: Clock,
        create: bool = True,
        timeout: float = 10.0,
    ) -> None:
        self.told = self.sent = self.dropped = 0
        self._broker = broker
        self._session = session
        self._worker = worker
        self._host, self._pid = platform.node(), os.getpid()
        self._snapshot = snapshot
        self._clock = clock
        self._create = create
        self._timeout = timeout
        # What several threads touch, under the lock. Reentrant: the garbage collector may call a finalizer that tells
        # an event, in the middle of anything.
        self._lock = threading.RLock()
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._second = float("-inf")  # when the present second began, and how many events of each kind it has had
        self._counts: dict[str, int] = {}
        self._is_closed = False
        self._odd: Exception | None = None  # the last reason why an event could not be made
        # What belongs to the event loop.
        self._tp: TopicPartition | None = None
        self._largest = broker.max_message_bytes - _ENVELOPE_BYTES
        self._producer: Producer | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._next_progress = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._is_resting = False
        self._is_closing = False
        self._pause = 0.0  # while in trouble, the present pause between attempts
        self._told_odd = False

    # -- from any thread -------------------------------------------------------------------------------

    def hear(self, event: Event) -> None:
        """Have an event written: a runtime's listener. From any thread; never waits for the broker, never raises."""
        try:
            if self._admits(event):
                at_ms = self._clock.now_ms()
                self._enqueue(_Waiting(event.kind, self._encoded(event.kind, at_ms, str(event.subject), event.detail)))
        except Exception as error:  # noqa: BLE001 - whoever tells it has other things to do
            self._lose(1)
            self._odd = error

    def _admits(self, event: Event) -> bool:
        """Count it, and say whether there were not too many like it in this second."""
        now = self._clock.monotonic()
        with self._lock:
            self.told += 1
            if now - self._second >= 1.0:
                self._second = now
                self._counts.clear()
            counts, kind = self._counts, event.kind
            count = counts[kind] = counts.get(kind, 0) + 1
            if self._is_closed or count > _CAPS.get(kind, MOST_PER_SECOND) or len(counts) > _MOST_KINDS:
                self.dropped += 1
                return False
        return True

    def _enqueue(self, event: _Waiting) -> None:
        with self._lock:
            if self._is_closed:
                self.dropped += 1
                return
            self._waiting.append(event)
            self._waiting_bytes += len(event.value)
            while len(self._waiting) > QUEUE_EVENTS or self._waiting_bytes > QUEUE_BYTES:
                self._waiting_bytes -= len(self._waiting.popleft().value)
                self.dropped += 1

    def _encoded(self, kind: str, at_ms: int, subject: str, data: Any) -> bytes:
        """The record's value, at once: whoever told it may change its details afterwards.

        Raises:
            BadRowError: it is too large for a record.
        """
        record = self._record(kind, at_ms, subject, data)
        try:
            value = record.encode()
        except BadRowError:
            value = b""
        if not value or (len(value) > _LONG_EVENT_BYTES and kind != PROGRESS):
            value = self._record(kind, at_ms, plain_text(subject), plain(data)).encode()
        if len(value) > self._largest:
            raise BadRowError("too_large", f"an event {kind!r} has {len(value):,} bytes")
        return value

    def _record(self, kind: str, at_ms: int, subject: str, data: Any) -> EventRecord:
        session = self._session
        return EventRecord(
            kind=kind,
            at_ms=at_ms,
            pipeline=session.pipeline,
            session=session.id,
            group=session.group,
            worker=self._worker,
            host=self._host,
            pid=self._pid,
            subject=subject,
            data=data,
        )

    def _lose(self, count: int) -> None:
        with self._lock:
            self.dropped += count

    def _take(self) -> list[_Waiting]:
        with self._lock:
            lot = list(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
        return lot

    # -- the worker's side -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to write. Returns at once and never raises: trouble is logged once and tried again."""
        if self._task is None and not self._is_closing:
            self._task = asyncio.create_task(self._work())

    async def close(self, last: WorkerSnapshot | None = None) -> None:
        """Write what waits, and stop; within 2 seconds, never raising. What is not written by then counts as dropped.

        Args:
            last: the worker's last progress; it stands before its ``worker_stopped``.
        """
        self._is_closing = True
        task, self._task = self._task, None
        give_up = asyncio.get_running_loop().time() + CLOSE_SECONDS
        try:
            if task is not None:
                async with asyncio.timeout(_FLUSH_SECONDS):
                    await self._end_round(task)
                    await self._write_last(last)
        except Exception as error:  # noqa: BLE001 - as everywhere here: nobody may suffer from events
            log.debug("the last events are not written: %s", error)
        finally:
            if task is not None and not task.done():
                task.cancel()
            with self._lock:
                self._is_closed = True
            self._lose(len(self._take()))
            self._let_go()
        left = {*self._leaving, *([task] if task is not None and not task.done() else [])}
        if left:  # what takes longer ends by itself
            await asyncio.wait(left, timeout=max(0.0, give_up - asyncio.get_running_loop().time()))
        if self.dropped:
            log.info("%d of %d events were not written to %s", self.dropped, self.told, EVENTS_TOPIC)

    async def _end_round(self, task: asyncio.Task[None]) -> None:
        """Let what is under way end; a pause is cut short."""
        if self._is_resting:
            task.cancel()
        await asyncio.wait({task})

    async def _write_last(self, last: WorkerSnapshot | None) -> None:
        if last is None and not self._waiting:
            return
        producer, tp = await self._ready()
        lot = self._take()
        progress = self._progress(last) if last is not None else None
        if progress is not None:
            stopped = (place for place, event in enumerate(lot) if event.kind == WORKER_STOPPED)
            lot.insert(next(stopped, len(lot)), progress)
        await self._send(producer, tp, lot)

    # -- in the background -----------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._is_closing:
            self._is_resting = True
            await self._clock.sleep(self._pause * (0.5 + self._clock.random() / 2) or _ROUND_SECONDS)
            self._is_resting = False
            try:
                await self._write()
            except Exception as error:  # noqa: BLE001 - brokers fail in many ways, and none may stop a worker
                self._stumble(error)

    async def _write(self) -> None:
        """What waits, and progress when it is time. Nothing is taken before there is somebody to give it to."""
        self._tell_odd()
        now = self._clock.monotonic()
        is_time = now >= self._next_progress
        if not is_time and not self._waiting:
            return
        producer, tp = await self._ready()
        lot = self._take()
        if is_time:
            late = now - self._next_progress >= _PROGRESS_SECONDS
            self._next_progress = (now if late else self._next_progress) + _PROGRESS_SECONDS
            progress = self._progress()
            lot += [progress] if progress is not None else []
        await self._send(producer, tp, lot)
        self._recover()

    def _progress(self, snapshot: WorkerSnapshot | None = None) -> _Waiting | None:
        """Progress now; without its partitions if it would be too large for a record with them."""
        with self._lock:
            self.told += 1
        try:
            snapshot = snapshot or self._snapshot()
            data = {**snapshot.to_dict(), "events_dropped": self.dropped}
            try:
                return _Waiting(PROGRESS, self._encoded(PROGRESS, snapshot.at_ms, "", data))
            except BadRowError:
                data |= {"partitions": [], "partitions_left_out": len(data["partitions"])}
                return _Waiting(PROGRESS, self._encoded(PROGRESS, snapshot.at_ms, "", data))
        except Exception as error:  # noqa: BLE001 - a bug in there must not silence all other events
            self._lose(1)
            self._odd = error
            return None

    async def _ready(self) -> tuple[Producer, TopicPartition]:
        if self._tp is None:
            self._tp = await self._find_partition()
        if self._producer is None:
            self._producer = self._broker.producer()  # before it is started: one that hangs has to be closed too
            async with deadline(self._timeout, "start writing events"):
                await self._producer.start()
        return self._producer, self._tp

    async def _find_partition(self) -> TopicPartition:
        async with deadline(self._timeout, f"look up topic {EVENTS_TOPIC}"):
            present = await self._broker.topics()
            if EVENTS_TOPIC not in present:
                await self._make_topic()
                present = await self._broker.topics()
            if EVENTS_TOPIC not in present:
                raise TopicError(f"topic {EVENTS_TOPIC!r} was made, and {self._broker.url} does not list it")
            self._largest = (await self._broker.record_limits([EVENTS_TOPIC]))[EVENTS_TOPIC] - _ENVELOPE_BYTES
        group = self._session.group
        return TopicPartition(EVENTS_TOPIC, partition_for(group.encode(), present[EVENTS_TOPIC].partitions))

    async def _make_topic(self) -> None:
        if not self._create:
            raise TopicError(
                f"topic {EVENTS_TOPIC!r} does not exist on {self._broker.url} and creation is off; make it, or allow "
                "rowmill to (drop --no-create-topics)"
            )
        await self._broker.create_topics([events_topic(self._broker)])

    async def _send(self, producer: Producer, tp: TopicPartition, lot: Sequence[_Waiting]) -> None:
        """Write these, or count them as dropped: of an event whose fate is unknown nobody may find two."""
        if not lot:
            return
        now_ms, key = self._clock.now_ms(), self._session.group.encode()
        is_written = False
        try:
            async with deadline(self._timeout, f"write to {tp}"):
                await (await producer.send(tp, [Outgoing(key, event.value, now_ms) for event in lot]))
            is_written = True
        finally:
            with self._lock:
                self.sent += len(lot) if is_written else 0
                self.dropped += 0 if is_written else len(lot)

    def _stumble(self, error: Exception) -> None:
        """Throw the producer away, and wait a little, each time longer; where we are refused, until somebody acts."""
        self._let_go()
        is_new = not self._pause
        if is_new:
            log.warning("events are not written to %s: %s; rows go on, and it is tried again", EVENTS_TOPIC, error)
        self._pause = min(max(self._pause * 2, FIRST_PAUSE), LONGEST_PAUSE)
        if isinstance(error, TopicError):
            if self._tp is None or not is_new:
                self._lose(len(self._take()))
                self._pause = _REFUSED_SECONDS
            self._tp = None  # it was there, and somebody deleted it: look again

    def _recover(self) -> None:
        if self._pause:
            self._pause = 0.0
            log.info("events are written again; %d were dropped so far", self.dropped)

    def _tell_odd(self) -> None:
        if self._odd is not None and not self._told_odd:
            self._told_odd = True
            log.warning("an event could not be made, and is counted as dropped; so are others: %s", self._odd)

    def _let_go(self) -> None:
        """Close the producer, without waiting for it."""
        producer, self._producer = self._producer, None
        if producer is not None:
            leaving = asyncio.create_task(_close(producer))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)


async def _close(producer: Producer) -> None:
    try:
        await producer.close()
    except Exception as error:  # noqa: BLE001 - it is gone either way
        log.debug("closing the producer of events: %s", error)


# --- readers ---------------------------------------------------------------------------------------------------


async def recent_events(
    broker: Broker,
    *,
    since_ms: int,
    groups: Collection[str] | None = None,
    clock: Clock,
    timeout: float = 10.0,
    limit: int = _RECENT_EVENTS,
) -> list[EventRecord]:
    """Events that were written since then, up to now.

    Args:
        broker: a started one.
        since_ms: milliseconds since the epoch, by the broker's clock (on Kafka events are dated when they arrive).
        groups: of these sessions only; None: of all.
        clock: for pauses after an error; it is tried up to three times.
        timeout: seconds for all of it.
        limit: the most that are returned: the newest of each partition, and of these the newest.

    Returns:
        Each worker's events in their order, those of several partitions merged by time. None where no topic is.

    Raises:
        BrokerError: the broker failed, or was not done in time.
        TopicError: the topic may not be read.
    """
    async with deadline(timeout, f"read {EVENTS_TOPIC}"):
        for _ in range(_ATTEMPTS - 1):
            try:
                return await _read_since(broker, since_ms, groups, limit)
            except (BrokerError, OffsetOutOfRangeError) as error:  # or retention was quicker
                log.debug("reading %s again: %s", EVENTS_TOPIC, error)
                await clock.sleep(FIRST_PAUSE)
        return await _read_since(broker, since_ms, groups, limit)


async def _read_since(broker: Broker, since_ms: int, groups: Collection[str] | None, limit: int) -> list[EventRecord]:
    partitions = await partitions_of(broker, [EVENTS_TOPIC])
    if not partitions:
        return []
    starts = await broker.offsets(partitions, since_ms)
    found: dict[int, deque[EventRecord]] = {tp.partition: deque(maxlen=limit) for tp in partitions}
    most = max(1, _RECENT_BYTES // len(partitions))
    async for records in read_topic(broker, EVENTS_TOPIC, starts, until="end"):
        present = found[records[0].partition]
        present.extend(_events(records, groups, by_broker=True))
        _forget_beyond(present, most)
    # A merge, not a sort: it keeps the order within each partition, whatever the workers' clocks did.
    return list(heapq.merge(*found.values(), key=lambda event: event.at_ms))[-limit:]


def _forget_beyond(events: deque[EventRecord], most: int) -> None:
    """Keep the newest, up to so many bytes: anybody may write to the topic, and as much as they like."""
    size = 0
    for place, event in enumerate(reversed(events)):
        size += event.size
        if size > most:
            for _ in range(len(events) - place):
                events.popleft()
            return


async def recent_progress(
    broker: Broker,
    *,
    within_seconds: float = 15.0,
    groups: Collection[str] | None = None,
    clock: Clock,
    timeout: float = 10.0,
) -> dict[str, dict[str, EventRecord]]:
    """The newest word of each worker about itself: its ``progress``, or its ``worker_stopped`` if it has stopped.

    Args:
        broker: a started one.
        within_seconds: how far to look back; a live worker tells its progress every second.
        groups: of these sessions only; None: of all.
        clock: gives the present time.
        timeout: seconds for all of it.

    Returns:
        By group and worker. ``has_stopped`` tells which of the two it is; a worker that is absent is either dead, or
        cannot write events, or its clock and the broker's are further apart than ``within_seconds``.

    Raises:
        BrokerError: the broker failed, or was not done in time.
        TopicError: the topic may not be read.
    """
    since_ms = clock.now_ms() - round(within_seconds * 1000)
    events = await recent_events(broker, since_ms=since_ms, groups=groups, clock=clock, timeout=timeout)
    newest: dict[str, dict[str, EventRecord]] = {}
    for event in events:
        workers = newest.setdefault(event.group, {})
        present = workers.get(event.worker)
        if event.has_stopped or (event.kind == PROGRESS and not (present and present.has_stopped)):
            workers[event.worker] = event
    return {group: workers for group, workers in newest.items() if workers}


async def follow_events(
    broker: Broker,
    *,
    groups: Collection[str] | None = None,
    since_ms: int | None = None,
    clock: Clock,
    timeout: float = 10.0,
) -> AsyncGenerator[EventRecord]:
    """Events as they come, for ever: close the generator (``contextlib.aclosing``) to end it.

    A topic that does not exist yet is waited for. Trouble with the broker is logged once, and reading goes on where it
    was. Each worker's events come in their order.

    Args:
        broker: a started one.
        groups: of these sessions only; None: of all.
        since_ms: begin with those that were written since then; None: with the next one.
        clock: for pauses.
        timeout: seconds that each call to the broker may take.
    """
    follower = _Follower(broker, "end" if since_ms is None else since_ms, clock, timeout)
    try:
        while True:
            for records in await follower.next():
                for event in _events(records, groups):
                    yield event
    finally:
        await follower.close()


class _Follower:
    """Where a reader of the topic is, and its connection."""

    def __init__(self, broker: Broker, begin: Moment, clock: Clock, timeout: float) -> None:
        self._broker = broker
        self._begin: Moment = begin  # for partitions that were not met before
        self._clock = clock
        self._timeout = timeout
        self._positions: dict[TopicPartition, int] = {}
        self._reader: Reader | None = None
        self._pause = 0.0

    async def next(self) -> list[Sequence[Record]]:
        """What comes next, after half a second at most where there is nothing; never raises for the broker's faults."""
        try:
            found = await self._fetch()
        except OffsetOutOfRangeError as error:
            log.info("%s: some events are gone: %s", EVENTS_TOPIC, error)
            self._positions.pop(error.tp, None)
            await self.close()
        except (RowmillError, OSError) as error:
            await self._stumble(error)
        else:
            self._pause = 0.0
            return found
        return []

    async def _fetch(self) -> list[Sequence[Record]]:
        reader = self._reader or await self._open()
        if reader is None:
            await self._clock.sleep(_LOOK_AGAIN_SECONDS)
            return []
        async with deadline(self._timeout, f"read {EVENTS_TOPIC}"):
            found = await reader.fetch(list(self._positions), _FETCH_RECORDS, _FETCH_SECONDS)
        for tp, records in found.items():
            if records:
                self._positions[tp] = records[-1].offset + 1
        return [records for records in found.values() if records]

    async def _open(self) -> Reader | None:
        """A reader at our positions; None where no topic is: then all that will be in it is news."""
        async with deadline(self._timeout, f"look up topic {EVENTS_TOPIC}"):
            partitions = await partitions_of(self._broker, [EVENTS_TOPIC])
            unmet = [tp for tp in partitions if tp not in self._positions]
            self._positions |= await self._broker.offsets(unmet, self._begin)
        self._begin = "earliest"
        if not partitions:
            return None
        self._reader = self._broker.reader()
        async with deadline(self._timeout, f"start reading {EVENTS_TOPIC}"):
            await self._reader.start({tp: self._positions[tp] for tp in partitions})
        return self._reader

    async def _stumble(self, error: Exception) -> None:
        if not self._pause:
            log.warning("%s cannot be read: %s; it is tried again", EVENTS_TOPIC, error)
        self._pause = min(max(self._pause * 2, FIRST_PAUSE), LONGEST_PAUSE)
        await self.close()
        await self._clock.sleep(self._pause)

    async def close(self) -> None:
        """Let go of the reader; the positions stay."""
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.close()


def _events(records: Sequence[Record], groups: Collection[str] | None, *, by_broker: bool = False) -> list[EventRecord]:
    """The events among these records, of these groups; ``by_broker``: with the broker's date, too."""
    wanted = None if groups is None else {group.encode() for group in groups}
    some = ((each, EventRecord.decode(each.value)) for each in records if wanted is None or each.key in wanted)
    return [
        replace(event, written_ms=record.timestamp, size=len(record.value or b"")) if by_broker else event
        for record, event in some
        if event is not None
    ]
