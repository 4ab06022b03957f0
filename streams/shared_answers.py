"""Cached answers that follow their partition to other machines: ``Cache(shared=True)``.

Answers also go to a compacted topic, ``<group>.<source>.answers``, with as many partitions as the source, into the
partition of the row that paid. Whoever is assigned that partition reads them into the worker's own answers first.

They are written as soon as they are there, not with the transaction: an answer is paid for whether or not its row is
ever committed. Nobody waits for that, and nothing about it is fatal. An answer that cannot be written is counted, and
may be paid for again by another machine; a partition whose answers cannot be read begins without them.

A record's key is ``<stage>/`` and the answer's key; its value the answer with its expiry, as it is stored locally.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress

from ..handlers.cache import Cache, Origin
from ..state.answers import Answers, seal, unseal
from ..state.clock import Clock
from ..state.errors import RowmillError
from ..state.model import Outgoing, Record, TopicPartition
from .brokers.base import Broker, Producer
from .deadlines import deadline
from .errors import TopicError
from .restore import ChangelogReader

log = logging.getLogger(__name__)

_SEND_RECORDS = 500
_SEND_BYTES = 1024 * 1024
_YIELD_RECORDS = 200
_RECORD_BYTES = 512
"""Room in a record for what is not its value."""
_PAUSE = 1.0


def topic_config(caches: Iterable[Cache]) -> dict[str, str]:
    """What the topic of these shared caches is made with.

    Answers that all expire leave the topic once the longest ``ttl`` has passed. If one of them does not, the topic
    keeps the last answer of every key for ever.
    """
    ttls = [cache.ttl for cache in caches if cache.shared]
    limited = [ttl for ttl in ttls if ttl is not None]
    if not limited or len(limited) < len(ttls):
        return {"cleanup.policy": "compact", "message.timestamp.type": "CreateTime"}
    return {
        "cleanup.policy": "compact,delete",
        "retention.ms": str(max(1, round(max(limited) * 1000))),
        "message.timestamp.type": "CreateTime",
    }


class SharedAnswers:
    """The shared answers of one worker. :meth:`publish` is what a ``StageCache`` takes as ``share``.

    Args:
        broker: where the topics are; they exist.
        topics: the answers' topic of each source topic.
        answers: the worker's own answers, of each stage whose cache is shared.
        clock: time.
        timeout: seconds for reading a partition's answers, and for each step of writing.
        queue_bytes: answers that may wait to be written (8 MiB); further ones are not shared.

    Attributes:
        sent: answers written to the topic.
        lost: answers that were not: too large, too many at once, or the broker refused or was away.
        loaded: answers of others that were read.
    """

    def __init__(
        self,
        broker: Broker,
        topics: Mapping[str, str],
        answers: Mapping[str, Answers],
        clock: Clock,
        *,
        timeout: float,
        queue_bytes: int = 8 * 1024 * 1024,
    ) -> None:
        self.sent = self.lost = self.loaded = 0
        self._broker = broker
        self._topics = dict(topics)
        self._answers = answers
        self._clock = clock
        self._timeout = timeout
        self._queue: deque[tuple[TopicPartition, Outgoing]] = deque()
        self._queue_bytes = 0
        self._unsettled = 0
        """Answers of which it is not known yet whether they are written."""
        self._most_bytes = queue_bytes
        self._producer: Producer | None = None
        self._task: asyncio.Task[None] | None = None
        self._told = False
        self._closed = False

    def publish(self, stage: str, origin: Origin, key: bytes, value: bytes, expires_ms: int | None) -> None:
        """Write an answer in the background.

        Args:
            stage: the stage's name.
            origin: the row that paid; its partition is where the answer goes.
            key: the answer's.
            value: the encoded answer.
            expires_ms: milliseconds since the epoch; None: never.
        """
        topic = self._topics.get(origin.topic)
        if topic is None or self._closed:
            return
        record = Outgoing(stage.encode() + b"/" + key, seal(value, expires_ms), self._clock.now_ms())
        size = _size(record)
        self._unsettled += 1
        if size > self._broker.max_message_bytes or self._queue_bytes + size > self._most_bytes:
            self._lose(1, f"{size:,} bytes are too many, for a record or besides those that wait to be written")
            return
        self._queue.append((TopicPartition(topic, origin.partition), record))
        self._queue_bytes += size
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def load(self, source: TopicPartition) -> int:
        """Read the answers that belong to a partition of a source, as far as they were not read before.

        Never raises: what cannot be read within ``timeout``, or at all, is gone without.

        Returns how many were new to this worker.
        """
        topic = self._topics.get(source.topic)
        if topic is None:
            return 0
        tp = TopicPartition(topic, source.partition)
        loading = _Loading(tp, self._answers, self._clock)
        reader = ChangelogReader(self._broker, tp, source, self._timeout, self._clock)
        try:
            async with deadline(self._timeout, f"{tp}: read cached answers"):
                await reader.open()
                position = loading.position(reader.start, reader.end)
                if position < reader.end:
                    await reader.restore(position, loading.take)
        except Exception as error:  # noqa: BLE001 - a cache must not stop a partition, whatever the broker does
            log.warning("%s: rows go on without some of the answers that are shared: %s", source, error)
        finally:
            await reader.close()
        self.loaded += loading.count
        return loading.count

    async def flush(self, timeout: float) -> bool:
        """Wait until what was published is written, or lost; False when ``timeout`` seconds were not enough."""
        if self._task is None or self._task.done():
            return True
        done, _ = await asyncio.wait({self._task}, timeout=timeout)
        return bool(done)

    async def close(self) -> None:
        """Stop. What waits still is lost: ``flush`` before."""
        self._closed = True
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=self._timeout)
        self._queue.clear()
        self._lose(self._unsettled, "the worker stopped before they were written")
        await self._drop_producer()

    # -- writing ---------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Write until nothing waits."""
        while self._queue:
            if not await self._send(self._take()):
                await self._drop_producer()
                await self._clock.sleep(_PAUSE)

    def _take(self) -> dict[TopicPartition, list[Outgoing]]:
        lot: dict[TopicPartition, list[Outgoing]] = {}
        count = size = 0
        while self._queue and count < _SEND_RECORDS and size < _SEND_BYTES:
            tp, record = self._queue.popleft()
            lot.setdefault(tp, []).append(record)
            count += 1
            size += _size(record)
        self._queue_bytes -= size
        return lot

    async def _send(self, lot: Mapping[TopicPartition, Sequence[Outgoing]]) -> bool:
        """Write these; whether the producer can be used again."""
        under_way: list[tuple[int, Awaitable[None]]] = []
        trouble: Exception | None = None
        for tp, records in lot.items():
            if trouble is not None:
                self._lose(len(records), trouble)
                continue
            try:
                under_way.append((len(records), await self._hand_over(tp, records)))
            except Exception as error:  # noqa: BLE001 - brokers fail in many ways, and none may stop a worker
                self._lose(len(records), error)
                trouble = None if isinstance(error, TopicError) else error  # one partition's, or the broker's
        for count, written in under_way:
            try:
                async with deadline(self._timeout, "write answers"):
                    await written
            except Exception as error:  # noqa: BLE001 - as above
                self._lose(count, error)
                trouble = error
            else:
                self._unsettled -= count
                self.sent += count
        return trouble is None

    async def _hand_over(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        producer = await self._ready()
        async with deadline(self._timeout, f"{tp}: write answers"):
            return await producer.send(tp, records)

    async def _ready(self) -> Producer:
        if self._producer is None:
            self._producer = self._broker.producer()  # before it is started: one that hangs has to be closed too
            try:
                async with deadline(self._timeout, "start writing answers"):
                    await self._producer.start()
            except Exception:
                await self._drop_producer()
                raise
        return self._producer

    async def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(RowmillError):
                async with deadline(self._timeout, "stop writing answers"):
                    await producer.close()

    def _lose(self, count: int, reason: object) -> None:
        self.lost += count
        self._unsettled -= count
        if count and not self._told:
            self._told = True
            log.warning("%d cached answers are not shared: %s; further ones are only counted", count, reason)


def _size(record: Outgoing) -> int:
    return len(record.key or b"") + len(record.value or b"") + _RECORD_BYTES


class _Loading:
    """Takes one partition's records into the answers they belong to, and notes how far it has come."""

    def __init__(self, tp: TopicPartition, answers: Mapping[str, Answers], clock: Clock) -> None:
        self._mark = f"{tp}".encode()
        self._answers = {stage.encode(): one for stage, one in answers.items()}
        self._clock = clock
        self.count = 0

    def position(self, start: int, end: int) -> int:
        """Where to begin: where all stages' answers have been, unless the topic has been made anew since."""
        position = min((_number(one.read_mark(self._mark)) for one in self._answers.values()), default=end)
        return position if start <= position <= end else start

    async def take(self, records: Sequence[Record], position: int) -> None:
        """Put those that are new where they belong."""
        now_ms = self._clock.now_ms()
        for number, record in enumerate(records):
            if number % _YIELD_RECORDS == _YIELD_RECORDS - 1:
                await asyncio.sleep(0)  # other partitions have rows under way
            self._put(record, now_ms)
        for one in self._answers.values():
            one.write_mark(self._mark, b"%d" % position)

    def _put(self, record: Record, now_ms: int) -> None:
        stage, _, key = (record.key or b"").partition(b"/")
        one = self._answers.get(stage)
        if one is None or record.value is None:
            return
        try:
            value, expires_ms = unseal(record.value)
        except ValueError:
            return
        expired = expires_ms is not None and expires_ms <= now_ms
        if not expired and one.get(key, now_ms) is None:
            one.put(key, value, expires_ms)
            self.count += 1


def _number(text: bytes | None) -> int:
    """A mark as a position; -1, which is before every start, for none."""
    try:
        return int(text) if text is not None else -1
    except ValueError:
        return -1
