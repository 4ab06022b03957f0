"""Dead letters again: list them, send their rows once more, or put them aside, each of them exactly once.

A dead letter stays where it is. What was done with it stands on a compacted topic beside its own, the *marks*: one
partition for each of the dead-letter topic, key ``partition/offset``, value JSON. A row and its mark go out in one
transaction, and each partition has one transactional id. Whoever begins fences whoever was there before, and only
then reads the marks: so two people at once, or a kill midway, send no row twice and forget none.

Headers are written by whoever writes to the topic. They never choose where a row goes: a recorded topic counts only
where it is one of the sources that the caller named.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from ..state.clock import Clock, SystemClock
from ..state.errors import ConfigError
from ..state.model import RESERVED_PREFIX, StoredRecord, TopicPartition
from .brokers.base import Broker, TopicInfo
from .brokers.open import open_broker
from .catalog import Catalog
from .client import consume
from .deadlines import FIRST_PAUSE, LONGEST_PAUSE, deadline
from .dlq_letters import (
    DeadLetter,
    Mark,
    Place,
    Selection,
    decode_mark,
    marks_topic,
    parse_id,
    place_of,
    with_mark,
)
from .dlq_retry import CALL_SECONDS, Begun, Order, Outcome, PartitionWork, RefusedError, Router, Stamp, Targets
from .errors import BrokerError, FencedError, TopicError
from .loops import LoopThread, run_blocking
from .session import LIVE, Session, check_topic

if TYPE_CHECKING:
    from .pipeline import Pipeline

log = logging.getLogger(__name__)

T = TypeVar("T")

MARKS_CONFIG = {"cleanup.policy": "compact"}
BATCH_ROWS = 500
"""Dead letters in one transaction."""
_ATTEMPTS = 6
"""Failures of the broker in a row after which a retry gives up."""
_ALL = Selection()


class DeadLetters:
    """A dead-letter topic, and the marks beside it.

    Args:
        broker: started.
        topic: one that exists.
        clock: time.
        create: whether the topic of marks may be made; only retry and purge need it.
        batch_rows: dead letters in one transaction.
    """

    def __init__(
        self, broker: Broker, topic: str, *, clock: Clock, create: bool = True, batch_rows: int = BATCH_ROWS
    ) -> None:
        self.topic = check_topic("dead-letter topic", topic)
        self.broker = broker
        self.clock = clock
        self._create = create
        self._batch_rows = batch_rows

    async def partitions(self) -> int:
        """The topic's partitions.

        Raises:
            TopicError: there is no such topic.
        """
        present = await self._present()
        if self.topic not in present:
            others = sorted(name for name in present if ".dlq" in name and not name.startswith(RESERVED_PREFIX))
            known = f"those here are {', '.join(others[:8])}" if others else "`rowmill topics` lists what there is"
            raise TopicError(
                f"no dead-letter topic {self.topic!r} on {self.broker.url}: a worker makes it when it starts; {known}"
            )
        return present[self.topic].partitions

    async def read(self, selection: Selection = _ALL, *, marked: bool = False) -> AsyncGenerator[DeadLetter]:
        """Those that wait, in order within each partition; with ``marked`` also what was retried or purged.

        Raises:
            TopicError: there is no such topic.
            CheckpointError: a mark cannot be read.
        """
        await self.partitions()
        marks = await self.marks()
        async with aclosing(self.records(self.topic)) as records:
            async for record in records:
                letter = with_mark(record, marks)
                if (marked or letter.mark is None) and selection.takes(letter):
                    yield letter

    async def find(self, partition: int, offset: int) -> DeadLetter:
        """The one at this place.

        Raises:
            ConfigError: there is none.
        """
        if partition < await self.partitions():
            tp = TopicPartition(self.topic, partition)
            first, end = await self.ends(tp)
            if first <= offset < end:
                lots = consume(self.broker, self.topic, start={tp: offset}, partition=partition, limit=1)
                async with aclosing(lots):
                    async for lot in lots:
                        if lot[0].offset == offset:
                            return with_mark(lot[0], await self.marks(partition))
        raise ConfigError(
            "ID", f"{partition}/{offset}", f"{self.topic} has no dead letter there; `list --all` shows all"
        )

    async def plan(self, selection: Selection, targets: Targets | None) -> Outcome:
        """What :meth:`retry` (or, without targets, :meth:`purge`) would do now. Changes nothing."""
        return (await self._plan(selection, targets))[0]

    async def retry(
        self,
        selection: Selection,
        targets: Targets,
        *,
        by: str = "",
        timestamp: Stamp = "now",
        begun: Begun | None = None,
    ) -> Outcome:
        """Send rows to where they came from once more, and mark their dead letters, together and once.

        A row has its key, value and headers, without those that tell of the error, and ``rowmill.retried``. With a
        key it goes to the key's partition, else to the one that it came from.

        Args:
            selection: which of those that wait.
            targets: where rows may go.
            by: who does it, for the marks.
            timestamp: ``now``: as any row that is published now, so that the source's retention does not remove what
                is old before it is read; ``original``: the row's own.
            begun: is told when it begins, so that somebody may look how far it is.

        Raises:
            TopicError: the topic is missing, or one cannot be written.
            BrokerError: the broker fails again and again. What was sent is marked: the same call goes on.
        """
        return await self._act(selection, targets, by=by, timestamp=timestamp, begun=begun)

    async def purge(self, selection: Selection, *, by: str = "", begun: Begun | None = None) -> Outcome:
        """Mark dead letters as done with; their records stay until the topic's retention removes them.

        Raises:
            TopicError: the topic is missing, or one cannot be written.
            BrokerError: the broker fails again and again.
        """
        return await self._act(selection, None, by=by, timestamp="now", begun=begun)

    # --- reading -----------------------------------------------------------------------------------------------

    async def _plan(self, selection: Selection, targets: Targets | None) -> tuple[Outcome, list[int]]:
        """What would be done, and in which partitions."""
        outcome, partitions = Outcome(), set()
        missing = set(selection.places)
        router = await self._router(targets)
        async with aclosing(self.read(selection, marked=True)) as letters:
            async for letter in letters:
                missing.discard((letter.partition, letter.offset))
                if letter.mark is not None:
                    outcome.marked += 1
                    continue
                try:
                    place = router.place(letter) if router else None
                except RefusedError as refusal:
                    outcome.refuse(letter, str(refusal))
                    continue
                partitions.add(letter.partition)
                outcome.done[letter.stage, letter.type] += 1
                if place is not None:
                    outcome.targets[place.topic] += 1
        outcome.missing = [f"{partition}/{offset}" for partition, offset in sorted(missing)]
        return outcome, sorted(partitions)

    async def _router(self, targets: Targets | None) -> Router | None:
        if targets is None:
            return None
        present = await self._present()
        if targets.to is not None:
            if check_topic("--to", targets.to) == self.topic:
                raise ConfigError("--to", targets.to, "that is the dead-letter topic itself; name a source topic")
            if targets.to not in present:
                raise TopicError(f"no topic {targets.to!r} on {self.broker.url}; `rowmill topics` lists what there is")
        counts = {name: present[name].partitions for name in targets.names if name in present}
        async with deadline(CALL_SECONDS, "look topics up"):
            limits = await self.broker.record_limits(sorted(counts))
        return Router(targets, counts, limits, self.broker.url)

    async def marks(self, partition: int | None = None) -> dict[Place, Mark]:
        """All marks, or one partition's; the newest stand at the end of it."""
        topic = marks_topic(self.topic)
        present = (await self._present()).get(topic)
        marks: dict[Place, Mark] = {}
        if present is None or (partition is not None and partition >= present.partitions):
            return marks
        async with aclosing(self.records(topic, partition)) as records:
            async for record in records:
                place = place_of(record)
                if place is None:
                    log.warning("%s/%d: offset %d is no mark", topic, record.partition, record.offset)
                elif record.value is None:
                    marks.pop(place, None)
                else:
                    marks.pop(place, None)  # the newest stand at the end
                    marks[place] = decode_mark(record)
        return marks

    async def records(self, topic: str, partition: int | None = None) -> AsyncGenerator[StoredRecord]:
        """The committed records of a topic, or of one partition of it."""
        async with aclosing(consume(self.broker, topic, partition=partition)) as lots:
            async for lot in lots:
                for record in lot:
                    yield record

    async def ends(self, tp: TopicPartition) -> tuple[int, int]:
        """The first offset, and the one behind the last that can be read."""
        async with deadline(CALL_SECONDS, f"{tp}: look up its ends"):
            first = (await self.broker.offsets([tp], "earliest"))[tp]
            return first, (await self.broker.offsets([tp], "end"))[tp]

    async def _present(self) -> dict[str, TopicInfo]:
        async with deadline(CALL_SECONDS, "look topics up"):
            return await self.broker.topics()

    # --- acting ------------------------------------------------------------------------------------------------

    async def _act(
        self, selection: Selection, targets: Targets | None, *, by: str, timestamp: Stamp, begun: Begun | None
    ) -> Outcome:
        planned, partitions = await self._plan(selection, targets)
        outcome = Outcome(missing=planned.missing, marked=planned.marked)
        outcome.refused, outcome.refusals, outcome.reasons = planned.refused, planned.refusals, planned.reasons
        if begun is not None:
            begun(outcome, planned.count)
        if not partitions:
            return outcome
        catalog = Catalog(self.broker, create=self._create, partitions=None, timeout=CALL_SECONDS)
        topic = marks_topic(self.topic)
        await catalog.require_own({topic: await self.partitions()}, MARKS_CONFIG, may_grow=True)
        async with deadline(CALL_SECONDS, "look topics up"):
            await self.broker.record_limits([topic])
        router, order = await self._router(targets), Order(by, timestamp, self.clock.token(), self._batch_rows)
        for partition in partitions:
            await self._patiently(PartitionWork(self, partition, selection, router, outcome, order))
        return outcome

    async def _patiently(self, work: PartitionWork) -> None:
        """Until it is done, somebody else does it, or the broker fails again and again."""
        pause, failures = FIRST_PAUSE, 0
        while True:
            before = work.sent
            try:
                return await work.do()
            except FencedError as error:
                # Never begin again: whoever came later would be fenced in turn.
                log.info("%s/%d: %s", self.topic, work.partition, error)
                work.outcome.fenced.append(work.partition)
                return None
            except BrokerError as error:
                failures = 0 if work.sent > before else failures + 1
                if failures >= _ATTEMPTS:
                    raise
                log.warning("%s/%d: beginning again: %s", self.topic, work.partition, error)
                await self.clock.sleep(pause * (0.5 + self.clock.random() / 2))
                pause = min(pause * 2, LONGEST_PAUSE)


# --- which topic, and which sources ----------------------------------------------------------------------------


def letters_topic(pipeline: Pipeline | str, session: str = LIVE) -> str:
    """The dead-letter topic of a pipeline, of its name, or of a topic's name (anything with a dot).

    Raises:
        ConfigError: the name is none, or a session is given with a topic.
    """
    if not isinstance(pipeline, str):
        return Session(pipeline.name, session).dead_letters
    if "." not in pipeline:
        return Session(pipeline, session).dead_letters
    if session != LIVE:
        raise ConfigError("session", session, f"{pipeline!r} is a topic; a session goes with a pipeline's name")
    return check_topic("dead-letter topic", pipeline)


def targets_of(topic: str, pipeline: Pipeline | str, to: str | None = None, sources: Collection[str] = ()) -> Targets:
    """Where a topic's dead letters may be sent.

    Args:
        topic: the dead-letter topic.
        pipeline: whose sources are declared, or a name of which nothing is known.
        to: send all of them here.
        sources: the declared sources, where the pipeline is a name only.

    Raises:
        ConfigError: nobody said where to, or the session had its rows for itself.
    """
    if to is not None:
        if sources:
            raise ConfigError("--source", next(iter(sources)), "not together with --to, which takes all rows")
        return Targets(to=check_topic("--to", to))
    session = _session_of(topic)
    if session is not None:
        raise ConfigError(
            "session", session,
            "its rows were its own, and it does not read them again: run them as another session (rowmill dlq export "
            f"{topic} --rows-only -o rows.jsonl, then rowmill run --input rows.jsonl), or send them with --to TOPIC",
        )  # fmt: skip
    if isinstance(pipeline, str):
        if not sources:
            raise ConfigError(
                "PIPELINE", pipeline,
                "give the pipeline's file, whose sources are known, or name them: --source TOPIC; or send all rows "
                "with --to TOPIC",
            )  # fmt: skip
        return Targets(sources=frozenset(check_topic("--source", source) for source in sources))
    if sources:
        raise ConfigError(
            "--source", next(iter(sources)), f"the pipeline's file declares {', '.join(pipeline.sources)}"
        )
    return Targets(sources=frozenset(pipeline.sources))


def _session_of(topic: str) -> str | None:
    pipeline, separator, session = topic.partition(".dlq.")
    return session if separator and "." not in pipeline and "." not in session else None


# --- the Python face -------------------------------------------------------------------------------------------


def dead_letters(
    pipeline: Pipeline | str,
    *,
    broker: str | None = None,
    session: str = LIVE,
    stage: str | None = None,
    type: str | None = None,  # noqa: A002 - the word of the header
    since: datetime | None = None,
    until: datetime | None = None,
    marked: bool = False,
) -> Iterator[DeadLetter]:
    """The dead letters that wait, in order within each partition.

    Args:
        pipeline: a Pipeline, its name, or the name of a dead-letter topic (with a dot in it).
        broker: its URL; default ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        session: another one than the live.
        stage, type: of this stage, with this error only.
        since, until: rows of this time only, the second excluded.
        marked: also those that were retried or purged.

    Raises:
        TopicError: there is no such topic.
        BrokerError: the broker cannot be reached or failed.
    """
    topic = letters_topic(pipeline, session)
    selection = _selection(topic, (), stage, type, since, until)
    with LoopThread() as loop:
        connected = open_broker(broker)
        loop.submit(connected.start).result()
        try:
            letters = DeadLetters(connected, topic, clock=SystemClock()).read(selection, marked=marked)
            while (letter := loop.submit(lambda: anext(letters, None)).result()) is not None:
                yield letter
            loop.submit(letters.aclose).result()
        finally:
            if not sys.is_finalizing():  # else the loop's thread is dead already, and nobody would answer
                loop.submit(connected.close).result()


def retry_dead_letters(
    pipeline: Pipeline | str,
    ids: Collection[str] = (),
    *,
    to: str | None = None,
    broker: str | None = None,
    session: str = LIVE,
    stage: str | None = None,
    type: str | None = None,  # noqa: A002 - the word of the header
    since: datetime | None = None,
    until: datetime | None = None,
    timestamp: Stamp = "now",
    by: str = "",
) -> Outcome:
    """Send the rows of dead letters to their source once more, exactly once, and mark them as retried.

    Args:
        pipeline: a Pipeline; or a name or topic as :func:`dead_letters` takes it, which needs ``to``.
        ids: ``partition/offset`` of some; default: all that the other arguments admit.
        to: send them to this topic, which exists, instead of to the source that they came from.
        broker, session, stage, type, since, until: as :func:`dead_letters` takes them.
        timestamp: of the rows: ``now``, or the ``original`` one.
        by: who does it, for the marks.

    Raises:
        ConfigError: an id is none, or nobody said where to send the rows.
        TopicError: a topic is missing, or cannot be written.
        BrokerError: the broker fails again and again. What was sent is marked: the same call goes on.
    """
    topic = letters_topic(pipeline, session)
    targets, selection = targets_of(topic, pipeline, to), _selection(topic, ids, stage, type, since, until)
    _check_stamp(timestamp)
    return _run(broker, topic, lambda letters: letters.retry(selection, targets, by=by, timestamp=timestamp))


def purge_dead_letters(
    pipeline: Pipeline | str,
    ids: Collection[str] = (),
    *,
    broker: str | None = None,
    session: str = LIVE,
    stage: str | None = None,
    type: str | None = None,  # noqa: A002 - the word of the header
    since: datetime | None = None,
    until: datetime | None = None,
    by: str = "",
) -> Outcome:
    """Mark dead letters as done with. Arguments and errors are those of :func:`retry_dead_letters`."""
    topic = letters_topic(pipeline, session)
    selection = _selection(topic, ids, stage, type, since, until)
    return _run(broker, topic, lambda letters: letters.purge(selection, by=by))


def _selection(
    topic: str,
    ids: Collection[str],
    stage: str | None,
    kind: str | None,
    since: datetime | None,
    until: datetime | None,
) -> Selection:
    places = frozenset(parse_id(each, topic) for each in ids)
    return Selection(
        places,
        frozenset((stage,)) if stage is not None else frozenset(),
        frozenset((kind,)) if kind is not None else frozenset(),
        None if since is None else int(since.timestamp() * 1000),
        None if until is None else int(until.timestamp() * 1000),
    )


def _check_stamp(timestamp: str) -> None:
    if timestamp not in {"now", "original"}:
        raise ConfigError("timestamp", timestamp, "use 'now' or 'original'")


def _run(broker: str | None, topic: str, work: Callable[[DeadLetters], Awaitable[T]]) -> T:
    clock = SystemClock()

    async def run() -> T:
        connected = open_broker(broker, clock=clock)
        await connected.start()
        try:
            return await work(DeadLetters(connected, topic, clock=clock))
        finally:
            await connected.close()

    return run_blocking(run)
