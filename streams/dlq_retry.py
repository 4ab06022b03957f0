"""Sending the rows of dead letters again, and marking them: where rows may go, and exactly once.

Of each partition of the dead-letter topic one transactional id. Whoever begins fences whoever was there before, and
only then reads the marks.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..state.errors import RowmillError
from ..state.model import RESERVED_PREFIX, Headers, Outgoing, TopicPartition
from .brokers.base import TransactionalProducer
from .collect import header
from .deadlines import deadline, to_the_end
from .dlq_letters import DeadLetter, Mark, Place, Selection, State, marks_topic, number_of, record_size, with_mark
from .errors import BrokerError, FencedError
from .partitioning import partition_for
from .transaction import gather_all

if TYPE_CHECKING:
    from .dlq import DeadLetters

log = logging.getLogger(__name__)

Stamp: TypeAlias = Literal["now", "original"]

RETRIED_HEADER = RESERVED_PREFIX + "retried"
"""On a row that was sent again: ``topic/partition/offset`` of its dead letter."""
BATCH_BYTES = 4 * 1024 * 1024
"""Of values in one transaction, about."""
CALL_SECONDS = 30.0
_GOODBYE_SECONDS = 5.0
_SHOW_SECONDS = 2.0
_SHOW_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class Targets:
    """Where rows may be sent.

    Attributes:
        to: every row goes here, whatever its headers say.
        sources: without ``to``, a row goes to the topic it came from if that is one of these.
    """

    to: str | None = None
    sources: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """All topics that may be written to."""
        return frozenset((self.to,)) if self.to else self.sources

    def topic_of(self, letter: DeadLetter) -> str:
        """Where this one goes.

        Raises:
            RefusedError: nowhere, with the reason.
        """
        if self.to is not None:
            return self.to
        if letter.source in self.sources:
            return letter.source
        sources = ", ".join(sorted(self.sources)) or "nothing"
        if not letter.source:
            raise RefusedError(
                f"it does not say which topic it came from; sources are {sources}; send it with --to TOPIC"
            )
        raise RefusedError(
            f"it says that it came from {letter.source!r}, and sources are {sources}; send it with --to TOPIC"
        )


class RefusedError(Exception):
    """A dead letter that cannot be sent again, with the reason."""


@dataclass(slots=True)
class Outcome:
    """What was done, or would be.

    Attributes:
        done: dead letters by (stage, type).
        targets: rows by topic they go to.
        refused: reason to ids, the first 20 of each.
        reasons: how many were refused, by reason.
        refusals: how many were refused.
        marked: how many of those asked for were retried or purged before.
        missing: ids asked for that are not there.
        fenced: partitions that somebody else's retry or purge took over meanwhile.
    """

    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    refused: dict[str, list[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    marked: int = 0
    missing: list[str] = field(default_factory=list)
    fenced: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many were sent or marked."""
        return self.done.total()

    def refuse(self, letter: DeadLetter, reason: str) -> None:
        """Note one."""
        self.refusals += 1
        self.reasons[reason] += 1
        ids = self.refused.setdefault(reason, [])
        if len(ids) < 20:
            ids.append(letter.id)


Begun: TypeAlias = "Callable[[Outcome, int], object]"
"""Called when dead letters begin to be sent or marked: with the outcome, which grows, and how many there are to do."""


class Router:
    """Decides where each row goes, if anywhere."""

    def __init__(self, targets: Targets, counts: Mapping[str, int], limits: Mapping[str, int], url: str) -> None:
        self._targets = targets
        self._counts = counts
        self._limits = limits
        self._url = url

    @property
    def partitions(self) -> list[TopicPartition]:
        """All that rows may go to."""
        return [TopicPartition(topic, number) for topic, count in self._counts.items() for number in range(count)]

    def place(self, letter: DeadLetter) -> TopicPartition:
        """Where its row goes.

        Raises:
            RefusedError: nowhere.
        """
        if letter.truncated is not None:
            raise RefusedError("its value was cut when it became a dead letter; the row cannot be made whole again")
        topic = self._targets.topic_of(letter)
        count = self._counts.get(topic)
        if count is None:
            raise RefusedError(f"there is no topic {topic!r} on {self._url}; make it first")
        size = record_size(letter.key, letter.value, letter.headers)
        if size > self._limits[topic]:
            raise RefusedError(
                f"it is larger than topic {topic!r} takes ({self._limits[topic]:,} bytes); raise its limit"
            )
        if letter.key is not None:
            return TopicPartition(topic, partition_for(letter.key, count))
        wanted = letter.source_partition
        return TopicPartition(topic, wanted if wanted is not None and wanted < count else letter.partition % count)

    def row(self, letter: DeadLetter, place: TopicPartition, timestamp: int) -> Outgoing:
        """The row as it is sent."""
        trace: Headers = ((RETRIED_HEADER, f"{letter.topic}/{letter.id}".encode()),)
        headers = letter.headers + trace
        if record_size(letter.key, letter.value, headers) > self._limits[place.topic]:
            headers = letter.headers
        return Outgoing(letter.key, letter.value, timestamp, headers)


class PartitionWork:
    """One partition of the dead-letter topic: its producer, its marks, and what is sent in transactions."""

    def __init__(
        self,
        letters: DeadLetters,
        partition: int,
        selection: Selection,
        router: Router | None,
        outcome: Outcome,
        order: Order,
    ) -> None:
        self.partition = partition
        self.outcome = outcome
        self.sent = 0
        self._letters = letters
        self._broker = letters.broker
        self._clock = letters.clock
        self._selection = selection
        self._router = router
        self._order = order
        self._marks_at = TopicPartition(marks_topic(letters.topic), partition)
        self._producer: TransactionalProducer | None = None
        self._is_open = False  # whether a transaction is
        self._was_confirmed = False  # whether the last one was
        self._marks: dict[Place, Mark] = {}
        self._stale: list[Place] = []
        self._batches = 0
        self._doubtful: list[tuple[DeadLetter, Mark]] = []

    async def do(self) -> None:
        """Send and mark whatever is not marked yet.

        Raises:
            FencedError: somebody else has begun to.
            BrokerError: begin again; what was sent will be found marked.
        """
        try:
            await self._open()
            async with aclosing(self._unmarked()) as batches:
                async for batch in batches:
                    await self._commit(batch)
            await self._hidden([self._marks_at])  # who looks next shall see it
        except (FencedError, BrokerError):
            raise
        except BaseException:
            # An open transaction would hold up the source topic's readers until it times out, in a minute.
            if self._is_open:
                await to_the_end(self._end_what_is_open())
            raise
        finally:
            await self._close()

    # --- beginning ---------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        """Fence, end what was left open, and only then read the marks, which nobody else changes from then on."""
        await self._fence()
        if await self._settle_remains():
            await self._fence()
            if await self._hidden([self._marks_at]):
                raise BrokerError(f"{self._marks_at}: the broker does not end the last transaction")
        first, _ = await self._letters.ends(TopicPartition(self._letters.topic, self.partition))
        self._marks = await self._letters.marks(self.partition)
        self._stale = [place for place in self._marks if place[1] < first]
        for letter, mark in self._doubtful:
            if self._marks.get((letter.partition, letter.offset)) == mark:
                self._count(letter, mark)
        self._doubtful = []

    async def _fence(self) -> None:
        await self._close()
        self._producer = self._broker.transactional_producer(str(self._marks_at))
        async with deadline(CALL_SECONDS, f"{self._marks_at}: start the transactional producer"):
            await self._producer.start()
        self._is_open = False

    async def _close(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await to_the_end(producer.close())

    async def _end_what_is_open(self) -> None:
        with contextlib.suppress(RowmillError):
            async with deadline(_GOODBYE_SECONDS, f"{self._marks_at}: end what is open"):
                await self._fence()

    async def _settle_remains(self) -> bool:
        """End what the last transaction left open where Kafka gave its markers up, in the way that it was decided.

        It was a commit if a row of it can be read and has no mark, or if a row has its mark and cannot be read. If
        nothing of it can be read, nobody has seen either outcome, and the rows go out with the next. Tells whether
        there was anything.
        """
        places = [self._marks_at, *(self._router.partitions if self._router else ())]
        hidden = await self._hidden(places)
        if not hidden:
            return False
        marks = await self._letters.marks(self.partition)
        newest = next(reversed(marks.values()), None)
        last = {
            place[1]
            for place, mark in marks.items()
            if newest is not None and mark.batch == newest.batch and mark.to in {str(tp) for tp in hidden}
        }
        marked = {offset for _, offset in marks}
        sent = await self._sent_rows(places[1:])
        is_commit = self._was_confirmed or bool(sent - marked) or bool(last - sent)
        log.warning(
            "%s: the broker may have ended a transaction in some places only; the rest is ended now: %s",
            self._marks_at, "commit" if is_commit else "abort",
        )  # fmt: skip
        async with deadline(CALL_SECONDS, f"{self._marks_at}: end what was left open"):
            await self._started().settle(sorted(hidden), None, {}, commit=is_commit)
        return True

    async def _hidden(self, places: Collection[TopicPartition]) -> set[TopicPartition]:
        """Where something that is written now cannot be read for longer than others' transactions take."""
        async with deadline(CALL_SECONDS, f"{self._marks_at}: look for what was left open"):
            written = await self._broker.offsets(places, "high_watermark")
            give_up = self._clock.monotonic() + _SHOW_SECONDS
            while True:
                readable = await self._broker.offsets(places, "end")
                hidden = {tp for tp in places if readable[tp] < written[tp]}
                if not hidden or self._clock.monotonic() > give_up:
                    return hidden
                await self._clock.sleep(_SHOW_PAUSE)

    async def _sent_rows(self, places: Collection[TopicPartition]) -> set[int]:
        """The offsets of this partition's dead letters whose rows can be read where rows are sent to."""
        found: set[int] = set()
        start = f"{self._letters.topic}/{self.partition}/"
        for topic in sorted({tp.topic for tp in places}):
            async with aclosing(self._letters.records(topic)) as records:
                async for record in records:
                    origin = (header(record, RETRIED_HEADER) or b"").decode("utf-8", "replace")
                    offset = number_of(origin.removeprefix(start)) if origin.startswith(start) else None
                    if offset is not None:
                        found.add(offset)
        return found

    # --- sending -----------------------------------------------------------------------------------------------

    async def _unmarked(self) -> AsyncGenerator[list[DeadLetter]]:
        batch: list[DeadLetter] = []
        size = 0
        async with aclosing(self._letters.records(self._letters.topic, self.partition)) as records:
            async for record in records:
                letter = with_mark(record, self._marks)
                if letter.mark is not None or not self._selection.takes(letter) or not self._can_go(letter):
                    continue
                batch.append(letter)
                size += record_size(letter.key, letter.value, letter.headers)
                if len(batch) >= self._order.batch_rows or size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _can_go(self, letter: DeadLetter) -> bool:
        try:
            return self._router is None or bool(self._router.place(letter))
        except RefusedError:  # counted when it was planned
            return False

    async def _commit(self, batch: Sequence[DeadLetter]) -> None:
        """Rows and marks in one transaction."""
        now = self._clock.now_ms()
        self._batches += 1
        name = f"{self._order.run}.{self.partition}.{self._batches}"
        outputs: dict[TopicPartition, list[Outgoing]] = {self._marks_at: self._tombstones(now)}
        self._doubtful = []
        for letter in batch:
            place = None
            if self._router is not None:
                place = self._router.place(letter)
                outputs.setdefault(place, []).append(self._router.row(letter, place, self._stamp(letter, now)))
            state: State = "purged" if place is None else "retried"
            mark = Mark(state, now, self._order.by, str(place or ""), letter.fingerprint, name)
            outputs[self._marks_at].append(Outgoing(letter.id.encode(), mark.encode(), now))
            self._doubtful.append((letter, mark))
        await self._transact(outputs)
        for letter, mark in self._doubtful:
            self._count(letter, mark)
        self._doubtful = []

    async def _transact(self, outputs: Mapping[TopicPartition, Sequence[Outgoing]]) -> None:
        producer = self._started()
        async with deadline(CALL_SECONDS, f"{self._marks_at}: transaction"):
            await producer.begin()
            self._is_open, self._was_confirmed = True, False
            written = await gather_all([producer.send(tp, records) for tp, records in outputs.items()])
            await gather_all(written)
            await producer.end()
            self._is_open, self._was_confirmed = False, True

    def _tombstones(self, now: int) -> list[Outgoing]:
        """Marks of dead letters that retention has removed go with the first transaction."""
        stale, self._stale = self._stale, []
        return [Outgoing(f"{partition}/{offset}".encode(), None, now) for partition, offset in stale]

    def _stamp(self, letter: DeadLetter, now: int) -> int:
        return letter.timestamp if self._order.timestamp == "original" and letter.timestamp >= 0 else now

    def _count(self, letter: DeadLetter, mark: Mark) -> None:
        self.sent += 1
        self.outcome.done[letter.stage, letter.type] += 1
        if mark.to:
            self.outcome.targets[mark.to.rpartition("/")[0]] += 1

    def _started(self) -> TransactionalProducer:
        if self._producer is None:
            raise BrokerError(f"{self._marks_at}: no producer")
        return self._producer


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for, and by whom."""

    by: str
    timestamp: Stamp
    run: str
    batch_rows: int
