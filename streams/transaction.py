"""One partition's transactions: fence, read the checkpoint, commit, and what to do when a commit fails.

The sequence of a commit and the rule after a failure (DESIGN, steps 2, 5 and 6) stand here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ..state.clock import Clock
from ..state.model import Committed, Outgoing, TopicPartition
from .brokers.base import Broker, TransactionalProducer
from .deadlines import FIRST_PAUSE, LONGEST_PAUSE, deadline
from .errors import BrokerError, CheckpointError, FencedError, StalledError
from .options import WorkerOptions
from .session import Session

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 0.4


class CheckpointMovedError(CheckpointError):
    """After a failed commit the broker's checkpoint is neither the old nor the new one: somebody else moved it."""


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
        self.checkpoint: Committed | None = None
        """What the group has committed; None when it never did."""

    async def open(self) -> Committed | None:
        """Fence the former owner, and only then read the checkpoint, which is final from then on.

        Raises:
            BrokerError: the broker does not answer in time.
        """
        await self._new_producer()
        self.checkpoint = await read_checkpoint(self._broker, self._group, self._tp, self._options.broker_timeout)
        return self.checkpoint

    async def commit(
        self,
        outputs: Mapping[TopicPartition, Sequence[Outgoing]],
        checkpoint: Committed,
        is_ours: Callable[[], Awaitable[bool]],
    ) -> dict[TopicPartition, int]:
        """Write the outputs and move the checkpoint, together and once.

        Args:
            outputs: records by partition.
            checkpoint: what to commit with them.
            is_ours: asked after a failed attempt, when the intended checkpoint is found: whether it was committed by
                this very transaction, and not by another worker that owned the partition meanwhile and came as far.

        Returns, by partition written to, the offset behind the last record, as far as the broker told.

        A failed attempt is never repeated blindly: the checkpoint is read again through a new producer. If it
        has not moved, the same effects are sent again; if it is the intended one, the commit had succeeded. A
        commit that moves nothing carries only notes of ours, of which the last one counts: it is sent again.

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
                if await self._settled(checkpoint, give_up, error, is_ours):
                    break
                await self._clock.sleep(pause * (0.5 + self._clock.random() / 2))
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                break
        self.checkpoint = checkpoint
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
        if producer is None:
            raise BrokerError(f"{self._tp}: no producer")
        async with deadline(self._options.broker_timeout, f"{self._tp}: transaction"):
            await producer.begin()
            written = await gather_all([producer.send(tp, records) for tp, records in outputs.items()])
            await gather_all(written)
            await producer.commit_offsets(self._group, {self._tp: checkpoint})
            return await producer.end()

    async def _settled(
        self, intended: Committed, give_up: float, cause: BrokerError, is_ours: Callable[[], Awaitable[bool]]
    ) -> bool:
        """Whether a failed commit took effect after all, once a new producer has settled its transaction."""
        previous = self.checkpoint
        pause = FIRST_PAUSE
        # Longer than a heartbeat: who was evicted while it stood still hears of it before it fences the next owner.
        await self._clock.sleep(_HEARTBEAT_SECONDS)
        while True:
            try:
                found = await self.open()
                ours = found == intended != previous and await is_ours()
            except BrokerError as error:
                if self._clock.monotonic() > give_up:
                    raise StalledError(
                        f"{self._tp}: nothing could be committed for {self._options.stall_timeout:g} s; last error: "
                        f"{error}. Check the broker ({self._broker.url}); a restart goes on where this stopped"
                    ) from cause
                await self._clock.sleep(pause * (0.5 + self._clock.random() / 2))
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            if ours:
                return True
            if found != previous:
                raise CheckpointMovedError(f"{self._tp}: expected {previous} or {intended}, found {found}")
            if self._clock.monotonic() > give_up:
                raise StalledError(f"{self._tp}: no commit succeeded; last error: {cause}") from cause
            return False

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
