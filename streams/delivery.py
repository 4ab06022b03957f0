"""At least once: results go out as rows complete, and the offsets follow in commits of their own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ..state.clock import Clock
from ..state.model import Committed, Outgoing, TopicPartition
from .brokers.base import Broker, Member, Producer
from .deadlines import FIRST_PAUSE, LONGEST_PAUSE, deadline
from .errors import BrokerError, FencedError, StalledError
from .options import WorkerOptions
from .session import Session
from .transaction import read_checkpoint

log = logging.getLogger(__name__)


class Forwarder:
    """An idempotent producer for one input partition, and the offsets of what it has sent.

    The counterpart of :class:`~rowmill.streams.transaction.Transactor`. Nothing fences a former owner: what it still
    sends appears besides. After an error the task begins again from the last committed offset.

    Args:
        broker: where to send.
        session: whose group.
        tp: the input partition.
        options: time limits.
        clock: for pauses between attempts.
        member: gives the worker's present membership, through which offsets are committed.
    """

    def __init__(
        self,
        broker: Broker,
        session: Session,
        tp: TopicPartition,
        options: WorkerOptions,
        clock: Clock,
        member: Callable[[], Member | None],
    ) -> None:
        self._broker = broker
        self._group = session.group
        self._tp = tp
        self._options = options
        self._clock = clock
        self._member = member
        self._producer: Producer | None = None
        self.checkpoint: Committed | None = None
        """What the group has committed; None when it never did."""

    async def open(self) -> Committed | None:
        """Start the producer and read the checkpoint.

        Raises:
            BrokerError: the broker does not answer in time.
        """
        self._producer = self._broker.producer()
        async with deadline(self._options.broker_timeout, f"{self._tp}: start the producer"):
            await self._producer.start()
        self.checkpoint = await read_checkpoint(self._broker, self._group, self._tp, self._options.broker_timeout)
        return self.checkpoint

    async def send(self, outputs: Mapping[TopicPartition, Sequence[Outgoing]]) -> None:
        """Write these, and wait until all of them are written.

        Raises:
            BrokerError: some may not be.
            TopicError: the broker refuses them for good.
        """
        producer = self._producer
        if producer is None:
            raise BrokerError(f"{self._tp}: no producer")
        async with deadline(self._options.broker_timeout, f"{self._tp}: send results"):
            # No tasks, as gather would make: lots are small here, and there are many.
            await _written(producer, outputs)

    async def commit(self, checkpoint: Committed, released: asyncio.Event | None = None) -> None:
        """Commit the offset of what was sent before, again and again until the broker says that it did.

        The rows are not run again for that: one lost answer would cost all since the last commit. And the request may
        yet come through, late: it would move the offset to where nobody expects it, and the next commit back again.

        Args:
            checkpoint: what to commit.
            released: is set while offsets may be committed; not in a rebalance, whose end decides whose they are.

        Raises:
            FencedError: the partition belongs to another worker now.
            StalledError: ``stall_timeout`` passed without success.
        """
        give_up = self._clock.monotonic() + self._options.stall_timeout
        pause = FIRST_PAUSE
        while True:
            if released is not None:
                await released.wait()
            try:
                await self._commit_once(checkpoint)
            except BrokerError as error:
                if self._clock.monotonic() > give_up:
                    raise StalledError(f"{self._tp}: no commit succeeded; last error: {error}") from error
                log.warning("%s: commit failed, trying again: %s", self._tp, error)
            else:
                self.checkpoint = checkpoint
                return
            await self._clock.sleep(pause * (0.5 + self._clock.random() / 2))
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _commit_once(self, checkpoint: Committed) -> None:
        member = self._member()
        if member is None:
            raise FencedError(f"{self._tp}: commit offsets: this worker has left its group")
        async with deadline(self._options.broker_timeout, f"{self._tp}: commit offsets"):
            await member.commit({self._tp: checkpoint})

    async def close(self) -> None:
        """Drop the producer."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.close()


async def _written(producer: Producer, outputs: Mapping[TopicPartition, Sequence[Outgoing]]) -> None:
    """Hand all of it over, then await it; what is on its way is settled before the first error is raised."""
    failure: Exception | None = None
    sent: list[Awaitable[None]] = []
    for tp, records in outputs.items():
        try:
            sent.append(await producer.send(tp, records))
        except Exception as error:  # noqa: BLE001 - raised below
            failure = error
            break
    for each in sent:
        try:
            await each
        except Exception as error:  # noqa: BLE001 - raised below
            failure = failure or error
    if failure is not None:
        raise failure
