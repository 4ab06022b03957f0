"""One partition's transactions: fence, read the checkpoint, commit, and what to do when a commit fails.

The sequence of a commit and the rule after a failure (DESIGN, steps 2, 5 and 6) stand here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from enum import IntEnum
from typing import NoReturn

from ..state.clock import Clock
from ..state.model import Committed, Outgoing, TopicPartition
from .brokers.base import Broker, TransactionalProducer
from .deadlines import FIRST_PAUSE, LONGEST_PAUSE, deadline
from .errors import BrokerError, CheckpointError, FencedError, OffsetOutOfRangeError, StalledError, TopicError
from .options import WorkerOptions
from .restore import last_checkpoint
from .session import Session

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 0.4
_SHOW_SECONDS = 1.0
"""How long records of a commit that was confirmed may stay invisible behind other producers' transactions before they
count as left open."""
_SHOW_PAUSE = 0.1
_SETTLE_ATTEMPTS = 3
_LOOK_ROWS = 1_000

IsOurs = Callable[[], Awaitable[bool | None]]
"""Tells whose the changelog's last checkpoint is: True, the one of the commit in question; False, the one before it;
None, somebody else's."""


class CheckpointMovedError(CheckpointError):
    """After a failed commit the broker's checkpoint is neither the old nor the new one: somebody else moved it."""


class _Step(IntEnum):
    """How far an attempt came."""

    NOTHING = 0
    RECORDS = 1
    OFFSETS = 2
    END = 3


class Transactor:
    """The transactional producer of one input partition, and the checkpoint it last knew of.

    Args:
        broker: where to commit.
        session: whose group and producer id.
        tp: the input partition.
        options: time limits.
        clock: for pauses between attempts.
        stable: set while the group does not rebalance. A producer started meanwhile might fence a rightful owner.
    """

    def __init__(
        self,
        broker: Broker,
        session: Session,
        tp: TopicPartition,
        options: WorkerOptions,
        clock: Clock,
        stable: asyncio.Event | None = None,
    ) -> None:
        self._stable = stable
        self._broker = broker
        self._group = session.group
        self._id = session.transactional_id(tp)
        self._tp = tp
        self._options = options
        self._clock = clock
        self._producer: TransactionalProducer | None = None
        self._changelog = TopicPartition(session.changelog(tp.topic), tp.partition)
        self._ends: Mapping[TopicPartition, int] = {}  # behind the records of the last commit that was confirmed
        self._before: Committed | None = None  # the checkpoint before that commit
        self._attempted: Mapping[TopicPartition, int] = {}  # behind the records of the attempt that failed
        self._step = _Step.NOTHING
        self.checkpoint: Committed | None = None
        """What the group has committed; None when it never did."""

    async def open(self) -> Committed | None:
        """Fence the former owner, and only then read the checkpoint, which is final from then on.

        Raises:
            BrokerError: the broker does not answer in time.
            CheckpointError: the changelog's last checkpoint was asked for, and cannot be read.
        """
        self._ends, self._before = {}, None
        for _ in range(_SETTLE_ATTEMPTS):
            # Each time: what was ended is surely seen only after a start.
            await self._new_producer()
            found = await self._read()
            pending, hidden = await self._look_for_remains()
            if not pending and not hidden:
                self.checkpoint = found
                return found
            await self._settle_remains(found, pending=pending, hidden=hidden)
        raise BrokerError(f"{self._tp}: the broker does not end the last transaction")

    async def commit(
        self,
        outputs: Mapping[TopicPartition, Sequence[Outgoing]],
        checkpoint: Committed,
        is_ours: IsOurs,
    ) -> dict[TopicPartition, int]:
        """Write the outputs and move the checkpoint, together and once.

        Args:
            outputs: records by partition.
            checkpoint: what to commit with them.
            is_ours: asked after a failed attempt that may have committed: whose the changelog's last checkpoint is.
                It stands in the same transaction, and tells this commit from that of another worker which owned the
                partition meanwhile and came as far.

        Returns, by partition written to, the offset behind the last record, as far as the broker told.

        A failed attempt is never repeated blindly: with a new producer it is found out what became of it. The offset
        alone does not tell (FACTS: Kafka may give up a decided transaction's marker for the offset and write that for
        the records, or the other way about), so the changelog is asked as well. If nothing was committed, the same
        effects are sent again; before that, whatever Kafka left open is ended in the way that it was decided.

        Raises:
            FencedError: the partition belongs to another worker now.
            CheckpointMovedError: begin again with :meth:`open`.
            StalledError: ``stall_timeout`` passed without success.
            TopicError: the broker refuses the records for good.
        """
        give_up = self._clock.monotonic() + self._options.stall_timeout
        pause = FIRST_PAUSE
        ends: dict[TopicPartition, int] = {}
        while True:
            try:
                ends = await self._attempt(outputs, checkpoint)
            except BrokerError as error:
                log.warning("%s: commit failed, reading the checkpoint again: %s", self._tp, error)
                if await self._settled(tuple(outputs), checkpoint, give_up, error, is_ours):
                    break
                await self._clock.sleep(pause * (0.5 + self._clock.random() / 2))
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                break
        self._before, self.checkpoint = self.checkpoint, checkpoint
        self._ends = ends
        return ends

    async def close(self) -> None:
        """Drop the producer; an open transaction is settled by whoever owns the id next, or times out."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.close()

    async def _attempt(
        self, outputs: Mapping[TopicPartition, Sequence[Outgoing]], checkpoint: Committed
    ) -> dict[TopicPartition, int]:
        producer = self._producer
        self._step = _Step.NOTHING
        if producer is None:
            raise BrokerError(f"{self._tp}: no producer")
        async with deadline(self._options.broker_timeout, f"{self._tp}: transaction"):
            await producer.begin()
            self._step = _Step.RECORDS
            written = await gather_all([producer.send(tp, records) for tp, records in outputs.items()])
            await gather_all(written)
            self._step = _Step.OFFSETS
            await producer.commit_offsets(self._group, {self._tp: checkpoint})
            self._step = _Step.END
            return await producer.end()

    # --- after a failure ---------------------------------------------------------------------------------------

    async def _settled(
        self,
        written: Sequence[TopicPartition],
        intended: Committed,
        give_up: float,
        cause: BrokerError,
        is_ours: IsOurs,
    ) -> bool:
        """Whether a failed commit took effect after all, once a new producer has settled its transaction."""
        pause = FIRST_PAUSE
        self._attempted = dict(self._producer.written) if self._producer is not None else {}
        await self.close()  # at once: nothing of it may reach a broker that is just coming back
        # Longer than a heartbeat: who was evicted while it stood still hears of it before it fences the next owner.
        await self._clock.sleep(_HEARTBEAT_SECONDS)
        while True:
            try:
                if await self._took_effect(written, intended, is_ours):
                    return True
            except BrokerError as error:
                if self._clock.monotonic() > give_up:
                    raise StalledError(
                        f"{self._tp}: nothing could be committed for {self._options.stall_timeout:g} s; last error: "
                        f"{error}. Check the broker ({self._broker.url}); a restart goes on where this stopped"
                    ) from cause
                await self._clock.sleep(pause * (0.5 + self._clock.random() / 2))
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            if self._clock.monotonic() > give_up:
                raise StalledError(f"{self._tp}: no commit succeeded; last error: {cause}") from cause
            return False

    async def _took_effect(self, written: Sequence[TopicPartition], intended: Committed, is_ours: IsOurs) -> bool:
        """Find out with a new producer what became of the commit, and end in the same way what Kafka left open."""
        previous = self.checkpoint
        await self._new_producer()
        found = await self._read()
        pending, hidden = await self._look_for_remains()
        former, void = await self._look_at_last()
        committed = self._step is _Step.END and await self._was_committed(
            found, intended, is_ours, asked=self._changelog in written, pending=pending, hidden=hidden, void=void
        )
        # The last commit's own offset may have been lost with the transaction that came after it.
        expected = {previous, intended if committed else previous, self._before or previous}
        if found not in expected and not pending:
            raise CheckpointMovedError(f"{self._tp}: expected {previous} or {intended}, found {found}")
        if committed:
            await self._settle({*written, *former}, intended, commit=True)
            return True
        if void:
            await self._take_back({*written, *former}, found, void, in_part=len(former) + len(void) < len(self._ends))
        if self._step is not _Step.NOTHING:
            # What lies open there may be of the transaction that was just aborted: the next commit would revive it.
            aborted = {tp for tp in written if tp not in former}
            await self._settle(aborted, intended if self._step >= _Step.OFFSETS else None, commit=False)
        if former or found != previous:
            log.warning("%s: the last commit was confirmed and not carried out; carrying it out", self._tp)
            await self._settle(former, previous, commit=True)
        return False

    async def _take_back(
        self,
        places: Collection[TopicPartition],
        found: Committed | None,
        void: Collection[TopicPartition],
        *,
        in_part: bool,
    ) -> NoReturn:
        """The last commit was confirmed, left open, and then aborted with the next one: its rows have to run again.

        Raises:
            CheckpointMovedError: always; its offset is taken back as well.
        """
        log.log(
            logging.ERROR if in_part else logging.WARNING,
            "%s: the broker confirmed the commit at %s and lost its records in %s; its rows run again%s",
            self._tp, self.checkpoint, ", ".join(map(str, void)),
            ", and those of its effects that are not lost appear twice" if in_part else "",
        )  # fmt: skip
        await self._settle(places, self.checkpoint, commit=False)
        if found == self.checkpoint and self._before is not None:
            await self._settle((), self._before, commit=True)
        raise CheckpointMovedError(f"{self._tp}: the commit at {self.checkpoint} was lost")

    async def _was_committed(
        self,
        found: Committed | None,
        intended: Committed,
        is_ours: IsOurs,
        *,
        asked: bool,
        pending: bool,
        hidden: bool,
        void: Collection[TopicPartition],
    ) -> bool:
        """Whether a transaction whose end was asked for was decided as asked, by what can be seen of it.

        Raises:
            CheckpointMovedError: somebody else has committed meanwhile.
        """
        moved = found == intended != self.checkpoint
        if hidden:  # the changelog cannot tell: its marker is missing
            if moved or not pending:
                return moved
            # The offset's is missing as well. If all are, nobody has seen either outcome, and this one was asked for.
            return await self._is_visible() is not False
        if not asked:
            return moved
        ours = await is_ours()
        if ours is None and self._changelog not in void:
            raise CheckpointMovedError(f"{self._tp}: somebody else has committed; found {found}")
        return bool(ours)  # also where the offset says otherwise: it is brought forward, and nothing is sent twice

    async def _is_visible(self) -> bool | None:
        """Whether records of the failed attempt can be read, or are known to be void; None if neither is seen."""
        places = {tp: end for tp, end in self._attempted.items() if tp != self._changelog}
        stable = await self._readable_up_to(places)
        settled = {tp: end for tp, end in places.items() if stable[tp] >= end}
        return len(await self._find_void(settled)) < len(settled) if settled else None

    async def _look_at_last(self) -> tuple[set[TopicPartition], set[TopicPartition]]:
        """Where records of the last commit that was confirmed stay invisible for too long, and where they are void.

        Another producer's transaction may hold them back: then to commit there once more changes nothing.
        """
        give_up = self._clock.monotonic() + _SHOW_SECONDS
        while True:
            stable = await self._readable_up_to(self._ends)
            unseen = {tp for tp, end in self._ends.items() if stable[tp] < end}
            if not unseen or self._clock.monotonic() > give_up:
                break
            await self._clock.sleep(_SHOW_PAUSE)  # behind another producer's transaction, perhaps
        return unseen, await self._find_void({tp: end for tp, end in self._ends.items() if tp not in unseen})

    async def _readable_up_to(self, places: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """Up to where records can be read."""
        if not places:
            return {}
        async with deadline(self._options.broker_timeout, f"{self._tp}: look up what can be read"):
            return await self._broker.offsets(list(places), "end")

    async def _find_void(self, ends: Mapping[TopicPartition, int]) -> set[TopicPartition]:
        """Where the record before this offset was aborted. Who may not read a topic (ACLs) takes it to be there."""
        if not ends:
            return set()
        void, waiting = set(ends), set(ends)
        reader = self._broker.reader()
        try:
            async with deadline(self._options.broker_timeout, f"{self._tp}: look for the last commit"):
                await reader.start({tp: end - 1 for tp, end in ends.items()})
                while waiting:
                    fetched = await reader.fetch(list(waiting), _LOOK_ROWS, _SHOW_PAUSE)
                    void -= {tp for tp, records in fetched.items() if any(r.offset == ends[tp] - 1 for r in records)}
                    waiting = {tp for tp in waiting & void if await reader.position(tp) < ends[tp]}
        except (TopicError, OffsetOutOfRangeError) as error:
            log.debug("%s: what became of the last commit cannot be read: %s", self._tp, error)
            return set()
        finally:
            await reader.close()
        return void

    async def _look_for_remains(self) -> tuple[bool, bool]:
        """Whether the group's offset waits for a marker, and whether records of the changelog do.

        Only this id's transactions write there, and the producer's start should have ended the last of them.
        """
        async with deadline(self._options.broker_timeout, f"{self._tp}: look for what was left open"):
            pending = bool(await self._broker.pending(self._group, [self._tp]))
            written = (await self._broker.offsets([self._changelog], "high_watermark"))[self._changelog]
            stable = (await self._broker.offsets([self._changelog], "end"))[self._changelog]
        return pending, stable < written

    async def _settle_remains(self, found: Committed | None, *, pending: bool, hidden: bool) -> None:
        """Another task's last transaction was decided, and its end is missing in places: end it there as elsewhere."""
        timeout = self._options.broker_timeout
        record = await last_checkpoint(self._broker, self._changelog, self._tp, timeout, self._clock)
        agree = record is None or (found is not None and record.agrees_with(found))
        # One of the two moved and the other waits: it was committed. Both wait: nobody has seen either outcome.
        commit = not agree or (pending and hidden)
        log.warning(
            "%s: the broker left the last transaction open (offset: %s, changelog: %s); ending it: %s",
            self._tp, pending, hidden, "commit" if commit else "abort",
        )  # fmt: skip
        async with deadline(timeout, f"{self._tp}: end what was left open"):
            await self._started().settle([self._changelog], self._group, {}, commit=commit)

    async def _settle(self, partitions: Collection[TopicPartition], offset: Committed | None, *, commit: bool) -> None:
        async with deadline(self._options.broker_timeout, f"{self._tp}: end what was left open"):
            if offset is None:
                await self._started().settle(partitions, None, {}, commit=commit)
            else:
                await self._started().settle(partitions, self._group, {self._tp: offset}, commit=commit)

    async def _read(self) -> Committed | None:
        return await read_checkpoint(self._broker, self._group, self._tp, self._options.broker_timeout)

    def _started(self) -> TransactionalProducer:
        if self._producer is None:
            raise BrokerError(f"{self._tp}: no producer")
        return self._producer

    async def _new_producer(self) -> None:
        await self.close()
        if self._stable is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.broker_timeout):
                    await self._stable.wait()
        producer = self._broker.transactional_producer(self._id)
        self._producer = producer
        async with deadline(self._options.broker_timeout, f"{self._tp}: start the transactional producer"):
            await producer.start()


async def read_checkpoint(broker: Broker, group: str, tp: TopicPartition, timeout: float) -> Committed | None:
    """What a group has committed for one partition; None when it never did.

    Raises:
        BrokerError: the broker does not answer in time.
    """
    async with deadline(timeout, f"{tp}: read the checkpoint"):
        return (await broker.committed(group, [tp]))[tp]


async def gather_all(awaitables: Sequence[object]) -> list[object]:
    """All of them, to their ends, before the first error is raised: none may go on unwatched."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)  # type: ignore[call-overload]
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        for result in results:
            if inspect.iscoroutine(result):  # what a send that succeeded would have waited for
                result.close()
        raise next((error for error in errors if isinstance(error, FencedError)), errors[0])
    return list(results)
