"""The port that rowmill asks of a broker. Two adapters fit it, and one contract suite holds them to it.

All methods are called from one event loop. None has a deadline of its own unless it says so: callers wrap
them (``streams/deadlines.py``), and after a deadline throw the object away rather than use it again, because
what the call did is unknown then. Every adapter turns its client's errors into those of ``streams/errors.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from ...state.model import Committed, Outgoing, Record, TopicPartition
from ..errors import BrokerError, TopicError

Moment: TypeAlias = "Literal['earliest', 'end', 'high_watermark'] | int"
"""A place in a log: its first record; ``end``, the end of what a reader can see now (the last stable offset);
``high_watermark``, the end of all that was written; or a time in milliseconds since the epoch (the first record at
or after it).

Who has just committed a transaction and wants to be sure that it is covered takes the high watermark: on Kafka the
last stable offset moves only when the transaction's markers are written, some time *after* ``end()`` returned."""


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic to be made. ``partitions`` None means the broker's default (6 on Kafka, 4 embedded).

    ``config`` uses Kafka's names (``cleanup.policy``, ``retention.ms``, ``max.message.bytes``); the embedded
    broker keeps what it understands and stores the rest.
    """

    name: str
    partitions: int | None = None
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic that exists."""

    name: str
    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BrokerInfo:
    """What ``rowmill doctor`` shows of a broker."""

    url: str
    kind: str
    version: str
    nodes: int


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """A member of a group, as the broker knows it.

    Attributes:
        id: the broker's name for it; every join may have a new one.
        client: what it calls itself.
        host: where it connects from.
        partitions: those that it owns; none while the group rebalances, or when there are more members than partitions.
    """

    id: str
    client: str
    host: str
    partitions: frozenset[TopicPartition]


class Reader(ABC):
    """Reads partitions that the caller names; committed records only; belongs to no group.

    Per partition, records come in the order of their offsets, each once per pass of the position. Offsets may
    have gaps (compaction, transaction markers, aborted records); ``position`` moves over them.
    """

    @abstractmethod
    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        """Begin at these offsets. Called once."""

    @abstractmethod
    async def fetch(
        self, partitions: Collection[TopicPartition], max_records: int, timeout: float
    ) -> dict[TopicPartition, Sequence[Record]]:
        """Up to ``max_records`` records in all from those of ``partitions`` that are read by this reader.

        Waits up to ``timeout`` seconds for the first record, without busy waiting, and returns {} when there is
        none; or earlier, when none of the partitions can be read yet. An empty list for a partition means that
        its position moved over a gap. A ``seek`` while it waits counts: what is returned lies at the new position.

        Raises:
            OffsetOutOfRangeError: the position is below the log's start or above its end.
            BrokerError: the broker did not answer; positions are as before.
        """

    @abstractmethod
    async def position(self, tp: TopicPartition) -> int:
        """The offset that the next fetch looks at first."""

    @abstractmethod
    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Make ``offset`` the next one to be fetched. Takes effect at the next fetch."""

    @abstractmethod
    async def close(self) -> None:
        """Stop. Safe to call at any time and twice; ends within a few seconds even if the broker is gone."""


class AssignmentListener(Protocol):
    """Told which partitions a member owns. Implemented by the worker."""

    def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None:
        """The member now owns exactly these. Called before any of their records can be fetched.

        ``consecutive`` tells that nobody else can have owned those of them that ``revoked`` named last: this is the
        group's very next generation. Work on them may go on. Otherwise nothing of it counts any more.

        Every partition is paused then, and has no position, until ``Member.begin`` names one. Must return at
        once: on Kafka no heartbeat is sent meanwhile (FACTS).
        """

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """The member is about to lose these (perhaps to get some straight back). Commit what has completed.

        Never called with an empty set, and maybe not at all when the process was evicted while it stood still.
        """


class Member(Reader):
    """A reader whose partitions are shared out among the members of a group.

    ``start`` of a member ignores positions given for partitions that it does not own: it takes none.
    """

    @abstractmethod
    async def join(self, listener: AssignmentListener) -> None:
        """Enter the group. The listener is called from now until ``close`` returns.

        Raises:
            GroupBusyError: on the embedded broker, when another worker serves this group.
        """

    @abstractmethod
    def begin(self, tp: TopicPartition, offset: int) -> None:
        """Start fetching an assigned partition at ``offset``. Ignored when it is not owned any more."""

    @abstractmethod
    async def commit(self, offsets: Mapping[TopicPartition, Committed]) -> None:
        """Commit offsets without a transaction, for at-least-once.

        Raises:
            FencedError: the group has gone on without this member; its commit does not count.
            BrokerError: whether it took effect is unknown. Committing again is harmless.
        """

    @abstractmethod
    async def leave(self) -> None:
        """Leave the group at once, so that others take over without waiting for the session to time out."""


class Producer(ABC):
    """Writes record batches. Idempotent: a batch sent once appears once, whatever is repeated inside."""

    @abstractmethod
    async def start(self) -> None:
        """Connect."""

    @abstractmethod
    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        """Hand over records for one partition, in order; wait for room, not for the broker.

        Returns an awaitable that ends when all of them are written, or raises a BrokerError. Every one of
        these must be awaited: an unawaited failure is a lost row (FACTS, "silent loss").
        """

    @abstractmethod
    async def close(self) -> None:
        """Give up what is not acknowledged and stop; within a few seconds even if the broker is gone."""


class TransactionalProducer(Producer):
    """A producer with a transactional id: ``begin``, any number of ``send`` and ``commit_offsets``, ``end``.

    At most one of each id is alive in the whole cluster: ``start`` settles the transaction a former owner left
    open (so that offsets read afterwards are final) and fences it. After any error but that of ``begin`` the
    object is spent: close it, and start another one if still the owner.
    """

    @property
    def written(self) -> Mapping[TopicPartition, int]:
        """The offset behind the transaction's last record in each partition, as far as the broker told.

        To be asked when ``end`` failed, as a witness of what became of it; a broker that needs none says nothing.
        """
        return {}

    @abstractmethod
    async def begin(self) -> None:
        """Open a transaction. Local; the broker hears of it with the first send."""

    @abstractmethod
    async def commit_offsets(self, group: str, offsets: Mapping[TopicPartition, Committed]) -> None:
        """Put a group's offsets, with their metadata, into the open transaction. One group per transaction."""

    @abstractmethod
    async def end(self) -> dict[TopicPartition, int]:
        """Commit. Every awaitable that ``send`` returned must have ended well before.

        Returns, for each partition written to, the offset behind the last record (markers may follow); a partition
        of which the broker did not tell is missing.

        On Kafka the records, and the offsets that ``Broker.committed`` tells, may show some milliseconds after this
        returned; a ``start`` of the same id makes them final.

        Raises:
            FencedError: somebody else owns the id; nothing of this transaction will ever be visible.
            BrokerError: whether it was committed is unknown; read the group's offsets to find out.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Throw the open transaction away."""

    async def settle(
        self,
        partitions: Collection[TopicPartition],
        group: str | None,
        offsets: Mapping[TopicPartition, Committed],
        *,
        commit: bool,
    ) -> None:
        """End what ended transactions of this id left open in these places, all of it in one way.

        A broker whose transactions end everywhere or nowhere has nothing to do: that is the default. Kafka decides
        first and writes a marker to each partition afterwards, and gives markers up while a partition has no leader
        (FACTS): then records stay invisible, and the next transaction of the id would end them in *its* way.

        Args:
            partitions: where records may be left.
            group: the group whose offsets may be left; None: of none.
            offsets: what to commit for the group with it, where ``commit`` is true; {}: what was left.
            commit: whether what was left counts.

        Raises:
            FencedError: somebody else owns the id.
            BrokerError: whether it took effect is unknown: start another producer and look again.
        """


class Broker(ABC):
    """A place where topics live. Open one with :func:`rowmill.streams.brokers.open.open_broker`."""

    url: str
    """As the user gave it, without secrets."""

    default_partitions: int
    """Partitions of a topic for which nobody asked a number."""

    folder: Path | None = None
    """Where the embedded broker keeps its files; None for brokers elsewhere."""

    session_timeout: float | None = None
    """Seconds without a sign of life after which a member's partitions go to others; None where they never do."""

    max_message_bytes: int
    """Largest record (key, value and headers) that ``send`` can be relied on to write."""

    @abstractmethod
    async def start(self) -> None:
        """Connect.

        Raises:
            BrokerUnreachableError: within 10 seconds, saying what was tried.
        """

    @abstractmethod
    async def close(self) -> None:
        """Disconnect, quickly, whatever state the broker is in."""

    @abstractmethod
    async def info(self) -> BrokerInfo:
        """What is there: kind, version, nodes."""

    @abstractmethod
    async def topics(self) -> dict[str, TopicInfo]:
        """All topics but the broker's own. ``config`` may be left empty."""

    async def record_limits(self, topics: Collection[str]) -> dict[str, int]:
        """The largest record that each of these topics takes, in bytes of key, value and headers together.

        Producers of this broker keep their batches within the limits of topics that were asked for.
        """
        return dict.fromkeys(topics, self.max_message_bytes)

    @abstractmethod
    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Make those that are absent and wait until they can be used. One that exists is left as it is.

        Raises:
            TopicError: a name or setting is refused, or creation is not allowed.
        """

    async def grow_topic(self, name: str, partitions: int) -> None:
        """Give a topic more partitions, and wait until they can be used.

        Raises:
            TopicError: refused, or this broker has no such thing.
        """
        raise TopicError(f"{self.url} cannot add partitions to {name!r}; it would need {partitions}")

    @abstractmethod
    async def delete_topics(self, names: Collection[str]) -> None:
        """Remove topics with all their records. Absent ones are no error."""

    @abstractmethod
    async def offsets(self, partitions: Collection[TopicPartition], at: Moment) -> dict[TopicPartition, int]:
        """Where ``at`` is in each partition. A time after the last record gives the end.

        Raises:
            TopicError: a partition does not exist.
        """

    @abstractmethod
    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, Committed | None]:
        """What the group has committed; None means that it surely never committed (or it was deleted).

        An answer that is an error is retried or raised, never read as "no offset" (FACTS).
        """

    async def pending(self, group: str, partitions: Collection[TopicPartition]) -> frozenset[TopicPartition]:
        """Those for which offsets lie in a transaction that has not ended for the group.

        After the ``start`` of a transactional id nothing of it should be pending; see ``TransactionalProducer.settle``
        for what can be. A broker that cannot tell says none.
        """
        del group, partitions
        return frozenset()

    @abstractmethod
    async def groups(self) -> list[str]:
        """The names of all groups with members or offsets, sorted."""

    async def members(self, group: str) -> list[MemberInfo]:
        """The present members of a group by their ids; [] for a group that has none, or that nobody knows.

        A process that was killed may be told of for as long as ``session_timeout``, where there is one.

        Raises:
            BrokerError: the broker does not tell; what is asked for is unknown, not empty.
        """
        raise BrokerError(f"{self.url} does not tell who is in group {group!r}")

    @abstractmethod
    async def delete_groups(self, names: Collection[str]) -> None:
        """Forget groups and their offsets. Absent ones are no error.

        Raises:
            GroupBusyError: the group has a member.
        """

    @abstractmethod
    def reader(self) -> Reader:
        """A reader without a group."""

    @abstractmethod
    def member(self, group: str, topics: Collection[str]) -> Member:
        """A member of a group that reads these topics (all of which exist)."""

    @abstractmethod
    def producer(self) -> Producer:
        """An idempotent producer without transactions."""

    @abstractmethod
    def transactional_producer(self, transactional_id: str, *, timeout: float | None = None) -> TransactionalProducer:
        """A producer for that id. Nothing happens before its ``start``.

        ``timeout``: seconds after which the broker ends a transaction that is left open, and that holds up readers of
        its topics meanwhile; None: a minute. A broker whose transactions end with their process needs none.
        """
