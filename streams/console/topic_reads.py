"""Topics and their records as the console shows them, within limits of number, size and time."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ...state.clock import Clock
from ...state.model import RESERVED_PREFIX, Record, StoredRecord, TopicPartition, stored
from ..brokers.base import Broker
from ..collect import partitions_of
from ..deadlines import deadline
from ..dlq_letters import marks_topic
from ..errors import BrokerError, TopicError
from ..known_sessions import recorded_session
from ..own_topics import purpose_of
from .answers import not_found
from .contents import TEXT_CHARACTERS, content_of
from .letter_reads import headers_of
from .watch import Watch

CALL_SECONDS = 10.0
READ_SECONDS = 10.0
"""How long looking at a topic's records may take."""
MOST_TOPICS = 5_000
_COUNT_SECONDS = 5.0
_FRESH_SECONDS = 3.0
_ANSWER_BYTES = 1 << 20
_LOT = 100
_LIMIT = 50
_READERS = 4


class TopicReads:
    """Lists topics, and reads records of any.

    Args:
        broker: a started one.
        watch: knows what topics are for.
        clock: time.
    """

    def __init__(self, broker: Broker, watch: Watch, *, clock: Clock) -> None:
        self._broker = broker
        self._watch = watch
        self._clock = clock
        self._room = asyncio.Semaphore(_READERS)
        self._listing = asyncio.Lock()
        self._listed: dict[str, Any] = {}
        self._listed_at = float("-inf")

    async def topics(self) -> dict[str, Any]:
        """All topics with what they are for, and the number of their offsets: at most so many records."""
        async with self._listing:  # those who ask at about the same time get the same answer
            if self._clock.monotonic() - self._listed_at >= _FRESH_SECONDS:
                self._listed = await self._list()
                self._listed_at = self._clock.monotonic()
        return self._listed

    async def _list(self) -> dict[str, Any]:
        async with deadline(CALL_SECONDS, "list topics"):
            partitions = {name: info.partitions for name, info in sorted((await self._broker.topics()).items())}
        shown = dict(list(partitions.items())[:MOST_TOPICS])
        counts = await self._counts(shown)
        uses = self._uses()
        topics = [
            {
                "name": name,
                "partitions": number,
                "records": counts.get(name),
                "kind": uses[name][0] if name in uses else _kind(name),
                "sessions": sorted(uses[name][1]) if name in uses else [],
            }
            for name, number in shown.items()
        ]
        return {"topics": topics, "topics_left_out": len(partitions) - len(shown), "at_ms": self._clock.now_ms()}

    def _uses(self) -> dict[str, tuple[str, set[str]]]:
        """What sessions use topics for, and which do."""
        uses: dict[str, tuple[str, set[str]]] = {}
        for status in self._watch.statuses():
            record, session = status.record, recorded_session(status.record)
            kinds = dict.fromkeys(record.sources, "source")
            kinds |= {session.changelog(source): "changelog" for source in record.sources}
            kinds |= {session.answers(source): "internal" for source in record.sources}
            kinds |= {record.sink: "sink", session.budget: "internal"}
            if record.dead_letters:
                kinds |= {record.dead_letters: "dead letters", marks_topic(record.dead_letters): "internal"}
            for name, kind in kinds.items():
                uses.setdefault(name, (kind, set()))[1].add(record.group)
        return uses

    async def _counts(self, partitions: Mapping[str, int]) -> dict[str, int]:
        """Offsets from the first to the end, by topic; nothing where that takes long, or a topic vanishes meanwhile."""
        every = [TopicPartition(name, n) for name, number in partitions.items() for n in range(number)]
        counts: dict[str, int] = {}
        with suppress(BrokerError, TopicError):
            async with deadline(_COUNT_SECONDS, "count records"):
                first = await self._broker.offsets(every, "earliest")
                ends = await self._broker.offsets(every, "end")
            for tp in every:
                counts[tp.topic] = counts.get(tp.topic, 0) + max(0, ends[tp] - first[tp])
        return counts

    # --- records -----------------------------------------------------------------------------------------------

    async def records(self, topic: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Some records of a topic.

        Args:
            topic: which.
            asked: a checked query. ``from`` is ``end`` (the newest, newest first; the default), ``earliest``, an
                offset or ``time:MS``; ``partition``: of this one only; ``limit``: 50 by default.

        Raises:
            RefusedRequestError: there is no such topic or partition.
        """
        place, limit = asked.get("from", "end"), asked.get("limit", _LIMIT)
        partitions = await self.partitions(topic, asked.get("partition"))
        async with self._room, deadline(CALL_SECONDS, f"look up where {topic} begins and ends"):
            first = await self._broker.offsets(partitions, "earliest")
            ends = await self._broker.offsets(partitions, "end")
            starts = await self._starts(place, partitions, first, ends, limit)
        async with self._room:
            shown, is_complete = await self._read(starts, ends, limit, newest=place == "end")
        return {
            "topic": topic,
            "partitions": [{"partition": tp.partition, "first": first[tp], "end": ends[tp]} for tp in partitions],
            "records": shown,
            "next": _next(partitions, shown, ends, newest=place == "end"),
            "complete": is_complete,
        }

    async def partitions(self, topic: str, only: int | None) -> list[TopicPartition]:
        """A topic's partitions, or one of them.

        Raises:
            RefusedRequestError: there is none.
        """
        async with deadline(CALL_SECONDS, "look topics up"):
            found = await partitions_of(self._broker, [topic])
        if not found:
            raise not_found("topic", topic, "there is none of that name; GET /api/v1/topics lists them")
        if only is None:
            return found
        if only >= len(found):
            raise not_found("partition", only, f"{topic} has {len(found)}, from 0 on")
        return [found[only]]

    async def _starts(
        self,
        place: str,
        partitions: Sequence[TopicPartition],
        first: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
        limit: int,
    ) -> Mapping[TopicPartition, int]:
        if place == "earliest":
            return first
        if place == "end":
            return {tp: max(first[tp], ends[tp] - limit) for tp in partitions}
        if place.startswith("time:"):
            found = await self._broker.offsets(partitions, int(place.removeprefix("time:")))
            return {tp: max(first[tp], found[tp]) for tp in partitions}
        return {tp: min(max(int(place), first[tp]), ends[tp]) for tp in partitions}

    async def _read(
        self, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], limit: int, *, newest: bool
    ) -> tuple[list[dict[str, Any]], bool]:
        """Up to so many records, as JSON and within a size; and whether nothing was left out for want of time."""
        held: list[tuple[tuple[int, int, int], StoredRecord]] = []
        size, is_complete = 0, True
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for record in records_between(self._broker, starts, ends):
                    each = ((record.timestamp, record.partition, record.offset), record)
                    if newest and len(held) >= limit:
                        heapq.heappushpop(held, each)
                        continue
                    heapq.heappush(held, each)
                    size += _least_size(record)
                    if not newest and (len(held) >= limit or size >= _ANSWER_BYTES):
                        break
        except TimeoutError:
            is_complete = False
        # Only of those that are shown: of many partitions most are read and passed over.
        found = [await _in_turn(record) for _, record in sorted(held, key=lambda each: each[0], reverse=newest)]
        return _within(found, _ANSWER_BYTES), is_complete


async def records_between(
    broker: Broker,
    starts: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    *,
    only_first: bool = False,
) -> AsyncGenerator[StoredRecord]:
    """Records from there to there, a hundred at a time: a fetch of more would hold them all.

    Args:
        broker: a started one.
        starts, ends: by partition.
        only_first: one of each partition.
    """
    left = {tp for tp in starts if starts[tp] < ends[tp]}
    if not left:
        return
    reader = broker.reader()
    try:
        await reader.start({tp: starts[tp] for tp in left})
        while left:
            for tp, records in (await reader.fetch(left, _LOT, 0.5)).items():
                fitting = [record for record in records if record.offset < ends[tp]]
                for record in stored(tp, fitting[:1] if only_first else fitting):
                    yield record
                if only_first and fitting:
                    left = left - {tp}
            left = {tp for tp in left if await reader.position(tp) < ends[tp]}
    finally:
        await reader.close()


def record_of(record: StoredRecord) -> dict[str, Any]:
    """A record as JSON; what is long is cut."""
    return {
        "partition": record.partition,
        "offset": record.offset,
        "timestamp_ms": record.timestamp,
        "key": content_of(record.key),
        "value": content_of(record.value),
        "headers": headers_of(record.headers),
    }


async def _in_turn(record: StoredRecord) -> dict[str, Any]:
    """A record as JSON; then others have their turn on the event loop, as making JSON readable takes a while."""
    shown = record_of(record)
    await asyncio.sleep(0)
    return shown


def _least_size(record: Record) -> int:
    """What its JSON takes at least, before it is made."""
    return 200 + min(len(record.value or b""), TEXT_CHARACTERS)


def _size(shown: Mapping[str, Any]) -> int:
    """About how long its JSON is."""
    contents = [shown["key"], shown["value"], *(header["value"] for header in shown["headers"])]
    return 200 + sum(
        len(each["text"] or "") + len(each["json"] or "") + len(each["hex"]) + len(each["base64"])
        for each in contents
        if each is not None
    )


def _within(shown: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """As many as fit, at least one."""
    total = 0
    for place, each in enumerate(shown):
        total += _size(each)
        if total > most and place:
            return shown[:place]
    return shown


def _next(
    partitions: Sequence[TopicPartition],
    shown: Sequence[Mapping[str, Any]],
    ends: Mapping[TopicPartition, int],
    *,
    newest: bool,
) -> dict[str, str] | None:
    """Where to go on, of a single partition."""
    if newest or len(partitions) != 1 or not shown:
        return None
    following = max(each["offset"] for each in shown) + 1
    return {"from": str(following)} if following < ends[partitions[0]] else None


def _kind(name: str) -> str:
    if name.startswith(RESERVED_PREFIX):
        return "changelog" if purpose_of(name) == "context and tables" else "internal"
    return "dead letters" if name.endswith(".dlq") else "other"
