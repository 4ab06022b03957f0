"""The control topic: one record per session, written by whoever steers or starts it, in one order for all.

Who writes starts the transactional producer ``<group>.control`` first, which fences everybody else who is about to
write of this session and ends what they left open; only then reads the topic to its end, checks what was asked for
against what is there, and writes. Whoever was fenced meanwhile begins again, and meets what the other one wrote.

Sessions share the topic's one partition. On Kafka a transaction that was left open hides what comes after it: an
operator that is killed between its record and its commit holds up those of *other* sessions until Kafka ends its
transaction, a minute later (the next operator of the same session ends it at once).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..state.clock import Clock
from ..state.errors import RowmillError
from ..state.model import Outgoing, StoredRecord, TopicPartition
from .brokers.base import Broker, Moment, TransactionalProducer
from .catalog import Catalog
from .collect import read_topic
from .deadlines import FIRST_PAUSE, LONGEST_PAUSE, deadline, to_the_end
from .errors import BrokerError, CheckpointError, FencedError
from .session_records import CONTROL_TOPIC, SessionRecord

log = logging.getLogger(__name__)

CONTROL = TopicPartition(CONTROL_TOPIC, 0)
CONTROL_CONFIG = {"cleanup.policy": "compact", "segment.bytes": "4194304", "segment.ms": "86400000"}
"""Kafka never compacts the newest segment: small ones keep the topic a matter of some megabytes to read."""

Change = Callable[[SessionRecord | None], SessionRecord | None]
"""Makes the new record of a session from the present one; None: there is, or shall be, none. Must be pure."""

READ_TIMEOUTS = 3
"""How many calls' time reading the whole topic may take."""
_FENCED_ATTEMPTS = 10
_OPEN_SECONDS = 10.0
"""How long a broker keeps a killed writer's transaction open, which hides what others wrote after it. Kafka looks for
such ones every ten seconds."""
_FAILED_ATTEMPTS = 3
_SHOW_SECONDS = 2.0
"""How long what was committed may stay invisible before it counts as left open."""
_SHOW_PAUSE = 0.05
_GOODBYE_SECONDS = 2.0


class ControlTopic:
    """Reads and writes the sessions' records. Belongs to one event loop.

    Args:
        broker: a started one.
        clock: time.
        timeout: seconds that each call to the broker may take.
        create: whether the topic may be made.
    """

    def __init__(self, broker: Broker, *, clock: Clock, timeout: float = 10.0, create: bool = True) -> None:
        self.broker = broker
        self.clock = clock
        self.timeout = timeout
        self._create = create
        self._writing = asyncio.Lock()

    async def sessions(self) -> dict[str, SessionRecord]:
        """The records of all sessions by group; {} where there is no topic.

        One that cannot be read is left out, with a warning.

        Raises:
            BrokerError: the broker does not answer.
        """
        found: dict[str, bytes] = {}
        for record in await _records(self.broker, self.timeout):
            group = (record.key or b"").decode("utf-8", "replace")
            found.pop(group, None)
            if record.value is not None and group:
                found[group] = record.value
        decoded = {group: decode_or_warn(group, value) for group, value in found.items()}
        return {group: record for group, record in decoded.items() if record is not None}

    async def session(self, group: str) -> SessionRecord | None:
        """The record of one session; None if there is none.

        Raises:
            CheckpointError: it cannot be read.
            BrokerError: the broker does not answer.
        """
        return (await _look(self, group)).present

    async def update(self, group: str, change: Change, *, may_remove: bool = True) -> SessionRecord | None:
        """Replace a session's record, in order with all others who do.

        Args:
            group: the session's.
            change: called with the present record, perhaps several times; ``sequence`` is counted for it. What it
                raises is raised here, and nothing is written; nor is it where it changes nothing.
            may_remove: whether a record that cannot be read may be removed, where ``change(None)`` is None.

        Returns:
            The record as it was written, or as it is; None where it was removed, or is not there.

        Raises:
            TopicError: there is no control topic and it may not be made, or it may not be written.
            CheckpointError: the present record cannot be read. It can be removed all the same.
            BrokerError: the broker failed again and again. What was asked for may have been recorded or not.
        """
        async with self._writing:  # two at once here would fence each other
            return await _Update(self, group, change, may_remove).do()

    async def require(self) -> None:
        """See that the topic exists.

        Raises:
            TopicError: it does not, and may not be made.
            BrokerError: the broker does not answer.
        """
        catalog = Catalog(self.broker, create=self._create, partitions=None, timeout=self.timeout)
        await catalog.require_own({CONTROL_TOPIC: 1}, CONTROL_CONFIG, may_grow=False)


async def _records(broker: Broker, timeout: float) -> list[StoredRecord]:
    """All that can be read, in order; [] where there is no topic."""
    async with deadline(READ_TIMEOUTS * timeout, f"read {CONTROL_TOPIC}"):
        found = [each async for lot in read_topic(broker, CONTROL_TOPIC, until="end") for each in lot]
    return [record for record in found if record.partition == CONTROL.partition]


async def _look(control: ControlTopic, group: str, tried: Collection[bytes] = ()) -> _Found:
    key = group.encode()
    values = [record.value for record in await _records(control.broker, control.timeout) if record.key == key]
    ours = next((value for value in values if value is not None and value in tried), None)
    return _Found(values[-1] if values else None, ours)


class _Found(NamedTuple):
    """What the topic says of one session.

    Attributes:
        value: the newest record; None where there is none.
        ours: the value of an attempt of ours that is there, or was.
    """

    value: bytes | None
    ours: bytes | None

    @property
    def present(self) -> SessionRecord | None:
        """The newest record.

        Raises:
            CheckpointError: it cannot be read.
        """
        return None if self.value is None else SessionRecord.decode(self.value)


class _Plan(NamedTuple):
    """What is left to do: nothing, and the record is the answer; or to write it (None: the deletion)."""

    is_done: bool
    record: SessionRecord | None


@dataclass(slots=True)
class _Update:
    """One update: its attempts, and what they left."""

    control: ControlTopic
    group: str
    change: Change
    may_remove: bool
    tried: list[bytes] = field(default_factory=list)
    """Values of attempts that failed: they may be there all the same."""

    async def do(self) -> SessionRecord | None:
        """Until it is recorded, or proves illegal, or attempts are used up."""
        pause, fenced, failed = FIRST_PAUSE, 0, 0
        while True:
            try:
                return await (self._attempt_after_looking() if fenced else self._attempt())
            except FencedError as error:
                fenced += 1
                if fenced >= _FENCED_ATTEMPTS:
                    raise BrokerError(
                        f"{self.group}: others change this session again and again, and what was asked for was not "
                        "recorded; see what they made of it (`rowmill status`), and ask once more"
                    ) from error
            except BrokerError as error:
                fenced, failed = 0, failed + 1
                log.debug("%s: attempt %d failed: %s", self.group, failed, error)
                if failed >= _FAILED_ATTEMPTS:
                    fate = "may have been recorded or not" if self.tried else "was not recorded"
                    raise BrokerError(f"{self.group}: what was asked for {fate}: {error}; ask once more") from error
            # At random from the start: who was fenced leaves the other one, and no third one, the time to finish.
            await self.control.clock.sleep(pause * (0.25 + 1.5 * self.control.clock.random()))
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _attempt_after_looking(self) -> SessionRecord | None:
        """Look before fencing whoever fenced us: what they wrote may leave nothing to do, or make this illegal."""
        plan = self._plan(await _look(self.control, self.group, self.tried))
        return plan.record if plan.is_done else await self._attempt()

    async def _attempt(self) -> SessionRecord | None:
        await self.control.require()
        producer = await self._fence()
        try:
            plan = self._plan(await _look(self.control, self.group, self.tried))
            if not plan.is_done:
                await self._write(producer, plan.record)
                with contextlib.suppress(RowmillError):  # it is recorded, whatever becomes of this
                    await self._show(producer)
            return plan.record
        finally:
            await to_the_end(producer.close())

    def _plan(self, found: _Found) -> _Plan:
        if found.ours is not None:
            return _Plan(True, SessionRecord.decode(found.ours))
        try:
            present = found.present
        except CheckpointError:
            if not self.may_remove or self.change(None) is not None:
                raise
            return _Plan(False, None)  # what is to be removed need not be read
        new = self.change(present)
        if new is None:
            return _Plan(present is None, None)
        sequence = 0 if present is None else present.sequence
        if replace(new, sequence=sequence) == present:
            return _Plan(True, present)
        return _Plan(False, replace(new, sequence=sequence + 1))

    async def _fence(self) -> TransactionalProducer:
        """Whoever else is about to write of this session writes no more, and all that was written can be read."""
        for is_last in (False, True):
            producer = await self._start()
            try:
                if await self._is_shown(self.control.timeout if is_last else _SHOW_SECONDS):
                    return producer
                if not is_last:
                    await self._end_what_is_left(producer)
            except BaseException:
                await to_the_end(producer.close())
                raise
            await to_the_end(producer.close())
        raise BrokerError(
            f"{CONTROL_TOPIC}: somebody was killed while steering another session, and what they left open hides all "
            "that came after it until the broker ends it, within about a minute"
        )

    async def _start(self) -> TransactionalProducer:
        producer = self.control.broker.transactional_producer(f"{self.group}.control", timeout=_OPEN_SECONDS)
        try:
            async with deadline(self.control.timeout, f"{self.group}: start the transactional producer"):
                await producer.start()
        except BaseException:
            await to_the_end(producer.close())
            raise
        return producer

    async def _write(self, producer: TransactionalProducer, record: SessionRecord | None) -> None:
        """The record, or the deletion, in a transaction of its own."""
        value = None if record is None else record.encode()
        out = Outgoing(self.group.encode(), value, self.control.clock.now_ms())
        if value is not None:
            self.tried.append(value)
        try:
            async with deadline(self.control.timeout, f"{self.group}: write to {CONTROL_TOPIC}"):
                await producer.begin()
                await (await producer.send(CONTROL, [out]))
                await producer.end()
        except FencedError:
            raise
        except BaseException:
            # Also when cancelled: an open transaction would hide what others write, until it times out.
            await to_the_end(self._end_what_is_open())
            raise

    async def _end_what_is_open(self) -> None:
        with contextlib.suppress(RowmillError):
            async with deadline(_GOODBYE_SECONDS, f"{self.group}: end what is open"):
                await (await self._start()).close()

    async def _show(self, producer: TransactionalProducer) -> None:
        """See that who looks next finds what was written; where Kafka gave its marker up, write that once more."""
        if not await self._is_shown(_SHOW_SECONDS):
            await self._end_what_is_left(producer)

    async def _is_shown(self, seconds: float) -> bool:
        """Whether all that is written now can be read, at once or in a moment."""
        clock = self.control.clock
        written = await self._end("high_watermark")
        give_up = clock.monotonic() + seconds
        while await self._end("end") < written:
            if clock.monotonic() > give_up:
                return False
            await clock.sleep(_SHOW_PAUSE)
        return True

    async def _end(self, at: Moment) -> int:
        async with deadline(self.control.timeout, f"look up the end of {CONTROL}"):
            return (await self.control.broker.offsets([CONTROL], at))[CONTROL]

    async def _end_what_is_left(self, producer: TransactionalProducer) -> None:
        """Commit what ended transactions of this session left open where Kafka gave their markers up, if they did.

        It may have been an abort that was decided: nobody has seen it, and whoever asked was told that it may have
        been recorded or not. As nothing was written of this session since, it is as legal as it was.
        """
        log.warning("%s: something that was written cannot be read; ending what this session left open", CONTROL_TOPIC)
        async with deadline(self.control.timeout, f"{self.group}: end what was left open"):
            await producer.settle([CONTROL], None, {}, commit=True)


def decode_or_warn(group: str, value: bytes) -> SessionRecord | None:
    """A record; None, with a warning, if it cannot be read."""
    try:
        return SessionRecord.decode(value)
    except CheckpointError as error:
        log.warning("session %s is left out: %s", "".join(c if c.isprintable() else "?" for c in group), error)
        return None
