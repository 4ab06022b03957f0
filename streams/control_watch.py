"""Following a session's record on the control topic: how a worker hears what is wanted of the session."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..state.clock import Clock
from ..state.model import Record
from .brokers.base import Broker, Reader
from .collect import read_topic
from .control_topic import CONTROL, READ_TIMEOUTS, decode_or_warn
from .deadlines import deadline, to_the_end
from .errors import BrokerError, OffsetOutOfRangeError, TopicError
from .session_records import CONTROL_TOPIC, SessionRecord

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
"""Between two looks. A fetch that waits would be answered sooner, and costs more: on the embedded broker it is woken
by every commit of the worker's own."""
_ABSENT_POLL_SECONDS = 1.0
_CHECK_SECONDS = 30.0
"""How often, while nothing comes, it is made sure that the topic is still there: a fetch does not tell."""
_ABSENT_SECONDS = 5.0
"""How long a topic must be missing before it counts as deleted: a broker that has just started may not know it yet."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 2.0
_FETCH_RECORDS = 500

OnRecord = Callable[[SessionRecord | None], None]


class ControlWatch:
    """Follows one session's record, through any trouble. Belongs to one event loop.

    A topic that is missing is waited for; one that was deleted is told of as None, like a record that was removed.
    A record that cannot be read is left out, with a warning: what was wanted before holds.

    Args:
        broker: a started one.
        group: the session's.
        on_record: called on the event loop with each new record, in the order in which they were written. None is
            skipped but what compaction removed before it was read, and what stood in a topic that was deleted and
            made anew before that was noticed (within 30 s): of such a topic the newest record is told.
        clock: time.
        timeout: seconds that each call to the broker may take.
    """

    def __init__(self, broker: Broker, group: str, on_record: OnRecord, *, clock: Clock, timeout: float = 10.0) -> None:
        self._broker = broker
        self._group = group
        self._key = group.encode()
        self._on_record = on_record
        self._clock = clock
        self._timeout = timeout
        self._present: SessionRecord | None = None
        """As it was told."""
        self._position: int | None = None
        """What to read next; None: the whole topic."""
        self._reader: Reader | None = None
        self._checked = clock.monotonic()
        self._absent_since: float | None = None
        self._is_troubled = False
        self._is_closed = False

    async def start(self) -> SessionRecord | None:
        """Read to the end.

        Returns:
            The present record, for which ``on_record`` is not called; None if there is none.

        Raises:
            BrokerError: the broker does not answer. What is there is told by :meth:`run` then.
        """
        if await self._is_there():
            self._present = await self._read_all()
        return self._present

    async def run(self) -> None:
        """Tell every record from there on. Ends after :meth:`close`, or when it is cancelled, and never by itself."""
        pause = _FIRST_PAUSE
        try:
            while not self._is_closed:
                try:
                    found = await self._next()
                except Exception as error:
                    if self._was_closed():  # amid a fetch, to which clients answer in ways of their own
                        return
                    if not isinstance(error, (BrokerError, TopicError, OffsetOutOfRangeError, OSError)):
                        raise
                    await self._recover(error)
                    await self._clock.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                else:
                    pause = _FIRST_PAUSE
                    self._note_success()
                    for record in found:
                        self._present = record
                        self._on_record(record)
                    if not found:
                        await self._clock.sleep(POLL_SECONDS)
        finally:
            await self._let_go()

    def _was_closed(self) -> bool:
        return self._is_closed

    async def close(self) -> None:
        """Let go of the reader; :meth:`run` ends within seconds."""
        self._is_closed = True
        await self._let_go()

    # --- reading -----------------------------------------------------------------------------------------------

    async def _next(self) -> list[SessionRecord | None]:
        """What is new, in order."""
        if self._position is None:
            return await self._begin_anew()
        records = await self._fetch(self._position)
        now = self._clock.monotonic()
        if records:
            self._checked = now
        elif now - self._checked > _CHECK_SECONDS:
            self._checked = now
            await self._check(self._position)
        present, found = self._present, []
        for record in records:
            if record.key == self._key:
                present = self._decoded(record, present)
                found.append(present)
        return found

    async def _begin_anew(self) -> list[SessionRecord | None]:
        """The present record of a topic of which nothing is known, where it is another one than was told."""
        if await self._is_there():
            self._absent_since = None
            present = await self._read_all()
            return [present] if present != self._present else []
        now = self._clock.monotonic()
        if self._absent_since is None:
            self._absent_since = now
        if self._present is not None and now - self._absent_since >= _ABSENT_SECONDS:
            log.warning("%s: %s was deleted, and with it what was wanted of the session", self._group, CONTROL_TOPIC)
            return [None]
        await self._clock.sleep(_ABSENT_POLL_SECONDS)
        return []

    async def _read_all(self) -> SessionRecord | None:
        """The present record; from here on, records are followed from behind what was read."""
        mine: list[Record] = []
        async with deadline(READ_TIMEOUTS * self._timeout, f"read {CONTROL_TOPIC}"):
            position = (await self._broker.offsets([CONTROL], "earliest"))[CONTROL]
            async for lot in read_topic(self._broker, CONTROL_TOPIC, until="end"):
                own = [record for record in lot if record.partition == CONTROL.partition]
                mine += [record for record in own if record.key == self._key]
                position = max([position, *(record.offset + 1 for record in own)])
        self._position, self._checked = position, self._clock.monotonic()
        present = self._present if mine else None
        for record in mine:
            present = self._decoded(record, present)
        return present

    def _decoded(self, record: Record, before: SessionRecord | None) -> SessionRecord | None:
        if record.value is None:
            return None
        return decode_or_warn(self._group, record.value) or before

    async def _fetch(self, position: int) -> list[Record]:
        reader = self._reader
        if reader is None:
            reader = self._reader = self._broker.reader()
            async with deadline(self._timeout, f"{CONTROL}: start reading"):
                await reader.start({CONTROL: position})
        async with deadline(self._timeout, f"{CONTROL}: read"):
            found = await reader.fetch([CONTROL], _FETCH_RECORDS, 0.0)
            self._position = await reader.position(CONTROL)
        return list(found.get(CONTROL, ()))

    async def _is_there(self) -> bool:
        async with deadline(self._timeout, f"look {CONTROL_TOPIC} up"):
            return CONTROL_TOPIC in await self._broker.topics()

    async def _check(self, position: int) -> None:
        """See that the topic is there, and the one that was read."""
        if not await self._is_there():
            raise TopicError(f"{CONTROL_TOPIC} is not there any more")
        async with deadline(self._timeout, f"{CONTROL}: look up its end"):
            end = (await self._broker.offsets([CONTROL], "end"))[CONTROL]
        if end < position:
            raise OffsetOutOfRangeError(CONTROL, position, "the topic was made anew; it is read from its beginning")

    # --- trouble -----------------------------------------------------------------------------------------------

    async def _recover(self, error: Exception) -> None:
        """Begin with another reader where this one stopped; with the whole topic if that place is gone."""
        await self._let_go()
        if self._is_closed:
            return
        if not isinstance(error, (BrokerError, OSError)):
            self._position = None
        level = logging.DEBUG if self._is_troubled else logging.WARNING
        log.log(level, "%s: what is wanted of the session cannot be read; trying on: %s", self._group, error)
        self._is_troubled = True

    def _note_success(self) -> None:
        if self._is_troubled:
            log.warning("%s: what is wanted of the session can be read again", self._group)
        self._is_troubled = False

    async def _let_go(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await to_the_end(reader.close())
