"""At least once: results go out as rows complete, and the offsets follow in commits of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..state.model import Committed, Outgoing, TopicPartition
from .brokers.base import Broker, Member, Producer
from .deadlines import deadline
from .errors import BrokerError
from .options import WorkerOptions
from .session import Session
from .transaction import gather_all, read_checkpoint


class Forwarder:
    """An idempotent producer for one input partition, and the offsets of what it has sent.

    The counterpart of :class:`~rowmill.streams.transaction.Transactor`. Nothing fences a former owner: what it still
    sends appears besides. After an error the task begins again from the last committed offset.

    Args:
        broker: where to send.
        session: whose group.
        tp: the input partition.
        options: time limits.
        member: gives the worker's present membership, through which offsets are committed.
    """

    def __init__(
        self,
        broker: Broker,
        session: Session,
        tp: TopicPartition,
        options: WorkerOptions,
        member: Callable[[], Member | None],
    ) -> None:
        self._broker = broker
        self._group = session.group
        self._tp = tp
        self._options = options
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
            written = await gather_all([producer.send(tp, records) for tp, records in outputs.items()])
            await gather_all(written)

    async def commit(self, checkpoint: Committed) -> None:
        """Commit the offset of what was sent before.

        Raises:
            FencedError: the partition belongs to another worker now.
            BrokerError: it may not be committed; begin again.
        """
        member = self._member()
        if member is None:
            raise BrokerError(f"{self._tp}: not in the group")
        async with deadline(self._options.broker_timeout, f"{self._tp}: commit offsets"):
            await member.commit({self._tp: checkpoint})
        self.checkpoint = checkpoint

    async def close(self) -> None:
        """Drop the producer."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.close()
