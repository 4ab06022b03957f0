"""Dead letters as the console shows them: read afresh for each question, in bounded time and memory.

A dead-letter topic may hold any number. All of it is gone through, some thousand in a row and one partition after the
other, and only what is shown is kept: the newest ones that fit, without their values. Where that takes too long, what
was found by then is the answer, which says so.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ...state.clock import Clock
from ...state.model import TopicPartition
from ..brokers.base import Broker
from ..collect import partitions_of
from ..deadlines import deadline
from ..dlq import DeadLetters
from ..dlq_letters import DeadLetter, Selection, marks_topic, parse_id, with_mark
from .answers import RefusedRequestError, not_found
from .contents import content_of, short_text, shown_text
from .watch import Watch

SCAN_SECONDS = 10.0
"""How long one look at a topic may take."""
MOST_FOUND = 10_000
"""Most dead letters that a filter by text may choose for a retry or purge."""
_SCANS_AT_ONCE = 2
_ROOM_SECONDS = 20.0
_TURN = 200
"""Dead letters that are decoded before others have their turn on the event loop."""
_MOST_KINDS = 500
_SEARCHED_BYTES = 64 * 1_024
_LIMIT = 100
_MOST_REMEMBERED = 8
"""Answers that are given again while neither the dead letters nor their marks have grown."""

Edges: TypeAlias = tuple[Mapping[TopicPartition, int], Mapping[TopicPartition, int]]

Order = tuple[int, int, int]
"""Time, partition and offset of a row: the newest comes first."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which dead letters.

    Attributes:
        stage, type: these only; "" for all.
        status: ``waiting``, ``retried``, ``purged`` or ``all``.
        text: what must stand in the key, the value, the error's message or the id; in any case.
        since_ms, until_ms: the row's time, the second excluded.
    """

    stage: str = ""
    type: str = ""
    status: str = "all"
    text: str = ""
    since_ms: int | None = None
    until_ms: int | None = None

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> Wanted:
        """From a query or a filter that was checked."""
        return cls(**{name: asked[name] for name in cls.__slots__ if name in asked})

    def selection(self) -> Selection:
        """As the command line has it; text and status are not part of that."""
        return Selection(
            stages=frozenset((self.stage,)) if self.stage else frozenset(),
            types=frozenset((self.type,)) if self.type else frozenset(),
            since=self.since_ms,
            until=self.until_ms,
        )

    def takes_state(self, letter: DeadLetter) -> bool:
        """Whether its status and time are as wanted."""
        if self.status not in {"all", status_of(letter)}:
            return False
        after = self.since_ms is None or letter.timestamp >= self.since_ms
        return after and (self.until_ms is None or letter.timestamp < self.until_ms)

    def takes(self, letter: DeadLetter) -> bool:
        """Whether all else is, too."""
        if (self.stage and letter.stage != self.stage) or (self.type and letter.type != self.type):
            return False
        return not self.text or self._stands_in(letter)

    def _stands_in(self, letter: DeadLetter) -> bool:
        text = self.text.lower()
        if text in letter.message.lower() or text in letter.id or text in letter.came_from.lower():
            return True
        sought = text.encode()
        return any(sought in part[:_SEARCHED_BYTES].lower() for part in (letter.key, letter.value) if part is not None)


@dataclass(slots=True)
class _Found:
    """What a look found."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    held: list[tuple[Order, DeadLetter]] = field(default_factory=list)
    scanned: int = 0
    waiting: int = 0
    total: int = 0
    left: int = 0
    is_complete: bool = True


class LetterReads:
    """Looks at sessions' dead letters.

    Args:
        broker: a started one.
        watch: knows which topic a session's are on.
        clock: time.
    """

    def __init__(self, broker: Broker, watch: Watch, *, clock: Clock) -> None:
        self._broker = broker
        self._watch = watch
        self._clock = clock
        self._room = asyncio.Semaphore(_SCANS_AT_ONCE)
        self._remembered: OrderedDict[tuple[object, ...], tuple[Edges, dict[str, Any]]] = OrderedDict()

    def letters_of(self, group: str) -> DeadLetters:
        """A session's dead-letter topic.

        Raises:
            RefusedRequestError: there is no such session, or it has none.
        """
        status = self._watch.status(group)
        if status is None:
            raise not_found("session", group, "there is none of that name here")
        topic = status.record.dead_letters
        if not topic:
            raise not_found("session", group, "nobody knows where its dead letters are; `rowmill dlq list TOPIC` asks")
        return DeadLetters(self._broker, topic, clock=self._clock)

    async def briefs(self, group: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Some of a session's dead letters, the newest rows first, and counts of all.

        Args:
            group: the session.
            asked: a checked query: the fields of :class:`Wanted`, ``limit`` and ``after``.
        """
        letters, wanted = self.letters_of(group), Wanted.of({"status": "waiting", **asked})
        limit = asked.get("limit", _LIMIT)
        # A page asks again whenever something of the session changes, and a hundred thousand take seconds to read.
        question, edges = (letters.topic, wanted, limit, asked.get("after")), await self._edges(letters.topic)
        before = self._remembered.get(question)
        if before is not None and before[0] == edges:
            self._remembered.move_to_end(question)
            return before[1]
        found = await self._scan(letters, wanted, limit, _order_of(asked.get("after")))
        shown = [letter for _, letter in sorted(found.held, key=lambda each: each[0], reverse=True)]
        kinds = found.counts.most_common(_MOST_KINDS)
        answer = {
            "topic": letters.topic,
            "letters": [brief_of(letter) for letter in shown],
            "next": _cursor(shown[-1]) if shown and found.left > len(shown) else None,
            "counts": [
                {"stage": shown_text(stage), "type": shown_text(kind), "count": count} for (stage, kind), count in kinds
            ],
            "total": found.total,
            "waiting": found.waiting,
            "scanned": found.scanned,
            "complete": found.is_complete,
        }
        if found.is_complete:
            self._remembered[question] = edges, answer
            while len(self._remembered) > _MOST_REMEMBERED:
                self._remembered.popitem(last=False)
        return answer

    async def _edges(self, topic: str) -> Edges:
        """Where the dead letters and their marks begin and end now."""
        async with deadline(SCAN_SECONDS, f"look up where {topic} ends"):
            partitions = await partitions_of(self._broker, [topic, marks_topic(topic)])
            if not partitions:
                return {}, {}
            first = await self._broker.offsets(partitions, "earliest")
            return first, await self._broker.offsets(partitions, "end")

    async def whole(self, group: str, place: str) -> dict[str, Any]:
        """One dead letter, whole, at ``partition/offset``."""
        letters = self.letters_of(group)
        partition, offset = parse_id(place, letters.topic)
        async with self._turn(), deadline(SCAN_SECONDS, f"read {letters.topic}"):
            return whole_of(await letters.find(partition, offset))

    async def ids(self, group: str, wanted: Wanted) -> list[str]:
        """Those that fit and wait, by id: for a filter by text, which no topic can be asked for.

        Raises:
            RefusedRequestError: there are too many, or not all could be looked at in time.
        """
        found = await self._scan(self.letters_of(group), wanted, MOST_FOUND, None)
        if not found.is_complete or found.left > len(found.held):
            remedy = f"it fits more than {MOST_FOUND:,}, or not all could be looked at: narrow it, or leave text out"
            raise RefusedRequestError(409, "filter.text", wanted.text, remedy)
        return [letter.id for _, letter in found.held]

    # --- going through -----------------------------------------------------------------------------------------

    def _turn(self) -> _Turn:
        return _Turn(self._room)

    async def _scan(self, letters: DeadLetters, wanted: Wanted, limit: int, after: Order | None) -> _Found:
        found = _Found()
        async with self._turn():
            async with deadline(SCAN_SECONDS, "look topics up"):
                present = (await self._broker.topics()).get(letters.topic)
            if present is None:
                return found
            try:
                async with asyncio.timeout(SCAN_SECONDS):
                    await self._go_through(letters, present.partitions, wanted, limit, after, found)
            except TimeoutError:
                found.is_complete = False
        return found

    async def _go_through(
        self, letters: DeadLetters, partitions: int, wanted: Wanted, limit: int, after: Order | None, found: _Found
    ) -> None:
        for partition in range(partitions):
            async with aclosing(_of_partition(letters, partition)) as each:
                async for letter in each:
                    found.scanned += 1
                    if found.scanned % _TURN == 0:
                        await asyncio.sleep(0)
                    _note(found, letter, wanted, limit, after)


async def _of_partition(letters: DeadLetters, partition: int) -> AsyncGenerator[DeadLetter]:
    """With its marks: those of one partition at a time are in memory."""
    marks = await letters.marks(partition)
    async with aclosing(letters.records(letters.topic, partition)) as records:
        async for record in records:
            yield with_mark(record, marks)


def _note(found: _Found, letter: DeadLetter, wanted: Wanted, limit: int, after: Order | None) -> None:
    found.waiting += letter.mark is None
    if not wanted.takes_state(letter):
        return
    kind = (letter.stage[:200], letter.type[:200])
    if kind in found.counts or len(found.counts) < 4 * _MOST_KINDS:
        found.counts[kind] += 1
    if not wanted.takes(letter):
        return
    found.total += 1
    order = (letter.timestamp, letter.partition, letter.offset)
    if after is not None and order >= after:
        return
    found.left += 1
    if len(found.held) < limit:
        heapq.heappush(found.held, (order, letter.brief()))
    elif order > found.held[0][0]:
        heapq.heapreplace(found.held, (order, letter.brief()))


class _Turn:
    """Room to read a topic, within a time: many at once would take the memory of many."""

    def __init__(self, room: asyncio.Semaphore) -> None:
        self._room = room

    async def __aenter__(self) -> None:
        try:
            async with asyncio.timeout(_ROOM_SECONDS):
                await self._room.acquire()
        except TimeoutError:
            raise RefusedRequestError(
                503, "dead letters", "one more reader", "others read them: try again in a moment", retry_after=5
            ) from None

    async def __aexit__(self, *_: object) -> None:
        self._room.release()


def _cursor(letter: DeadLetter) -> str:
    return f"{letter.timestamp}.{letter.partition}.{letter.offset}"


def _order_of(cursor: str | None) -> Order | None:
    if cursor is None:
        return None
    at, partition, offset = map(int, cursor.split("."))
    return at, partition, offset


# --- as JSON ---------------------------------------------------------------------------------------------------


def status_of(letter: DeadLetter) -> str:
    """``waiting``, ``retried`` or ``purged``."""
    return "waiting" if letter.mark is None else letter.mark.state


def brief_of(letter: DeadLetter) -> dict[str, Any]:
    """One in a line."""
    return {
        "id": letter.id,
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp_ms": letter.timestamp,
        "status": status_of(letter),
        "stage": shown_text(letter.stage),
        "type": shown_text(letter.type),
        "message": shown_text(letter.message),
        "attempts": letter.attempts,
        "key": short_text(letter.key),
        "session": shown_text(letter.session),
        "came_from": shown_text(letter.came_from),
    }


def whole_of(letter: DeadLetter) -> dict[str, Any]:
    """All that is known of one."""
    mark = letter.mark
    return {
        **brief_of(letter),
        "topic": letter.topic,
        "key_text": short_text(letter.key),
        "key": content_of(letter.key),
        "value": content_of(letter.value),
        "headers": headers_of(letter.headers),
        "where": shown_text(letter.where),
        "log": shown_text(letter.log),
        "input_row": letter.input_row,
        "truncated": letter.truncated,
        "mark": None
        if mark is None
        else {"state": mark.state, "at_ms": mark.time, "by": shown_text(mark.by), "to": shown_text(mark.to)},
    }


_MOST_HEADERS = 100


def headers_of(headers: Any) -> list[dict[str, Any]]:
    """A record's headers in their order; a name may stand there more than once."""
    return [{"name": shown_text(name), "value": content_of(value)} for name, value in headers[:_MOST_HEADERS]]
