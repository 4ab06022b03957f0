"""``kafka://host:port,…``: the broker port on Apache Kafka, through aiokafka. The one file that knows it.

Every oddity of the client that is dealt with here is described in the project's FACTS; comments name them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import struct
import weakref
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, NoReturn, ParamSpec, TypeVar

import aiokafka
from aiokafka import errors as kafka_errors
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocol, ConsumerProtocolMemberAssignment
from aiokafka.protocol.admin import DeleteGroupsRequest, DeleteTopicsRequest, DescribeGroupsRequest
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)
from aiokafka.record.default_records import _DefaultRecordBatchPy, _DefaultRecordPy

from ...state.clock import Clock
from ...state.model import Committed, Header, Outgoing, Record, TopicPartition
from ..deadlines import deadline
from ..errors import (
    BrokerError,
    BrokerUnreachableError,
    FencedError,
    GroupBusyError,
    OffsetOutOfRangeError,
    TopicError,
)
from ..outbox import Outbox
from .base import (
    AssignmentListener,
    Broker,
    BrokerInfo,
    Member,
    MemberInfo,
    Moment,
    Producer,
    Reader,
    TopicInfo,
    TopicSpec,
    TransactionalProducer,
)
from .kafka_records import read_record
from .security import KafkaSecurity

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")

START_SECONDS = 7.0
"""How long the first connection may take; "unreachable" is said within 10 s, of which a command's start takes some."""
CALL_SECONDS = 30.0
"""How long one administrative call may take, its own retries included."""
CLOSE_SECONDS = 5.0
"""How long an orderly goodbye may take before connections are simply cut."""
_CANCELLED_CLOSE_SECONDS = 1.0
_BOOTSTRAP_SECONDS = 0.5
RETRY_PAUSE = 0.1
_HEARTBEAT_MS = 300
_FETCH_WAIT_MS = 100
"""How long a broker holds a fetch that finds nothing. The client has one at a time for each broker: a partition that
begins beside quiet ones waits for it, half a second by default."""
_SHORT_PAUSE = 0.01
_METADATA_ATTEMPTS = 20
"""Answers without a partition after which it counts as absent."""
_RECORD_BYTES = 100
"""More than the lengths, offsets and times of a record take, and than the head of a batch."""

BATCH_BYTES = 1_000_000
"""Size of the record batches that are built: just below the broker's default ``max.message.bytes``."""

_FENCED = (
    kafka_errors.ProducerFenced,
    kafka_errors.InvalidProducerEpoch,
    kafka_errors.TransactionCoordinatorFenced,
    kafka_errors.InvalidProducerIdMapping,
)
_OUTSIDE = (
    kafka_errors.CommitFailedError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.IllegalStateError,
)
# A header name that is not UTF-8 surfaces as either, depending on whether the client's C extension is there.
_UNPARSABLE = (kafka_errors.CorruptRecordException, UnicodeDecodeError)
_REFUSED = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.ClusterAuthorizationFailedError,
    kafka_errors.TransactionalIdAuthorizationFailed,
)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """The client's errors as ours. In its fatal state it raises AssertionError (FACTS), which is a BrokerError."""
    try:
        yield
    except _FENCED as error:
        raise FencedError(f"{what}: another worker has taken over ({type(error).__name__})") from error
    except _REFUSED as error:
        raise TopicError(f"{what}: not allowed ({error}); grant the ACLs that docs/operations.md lists") from error
    except kafka_errors.MessageSizeTooLargeError as error:
        raise TopicError(f"{what}: a record exceeds the topic's max.message.bytes ({error})") from error
    except (kafka_errors.InvalidTimestampError, kafka_errors.RecordListTooLargeError) as error:
        raise TopicError(f"{what}: refused for good ({type(error).__name__}: {error})") from error
    except kafka_errors.UnknownTopicOrPartitionError as error:
        raise TopicError(f"{what}: no such topic or partition ({error})") from error
    except (kafka_errors.KafkaError, kafka_errors.IllegalOperation, AssertionError, OSError) as error:
        raise BrokerError(f"{what}: {type(error).__name__}: {error}") from error


def _outlives_its_caller(call: Callable[_P, Coroutine[Any, Any, _R]]) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """Let a request go on when nobody waits for it any more, to its own time-out.

    Only that makes the client close a connection on which no answers come. A caller with a shorter deadline would
    otherwise ask the same dead connection again and again (seen: a worker that gave up behind a silent proxy).
    """

    @functools.wraps(call)
    async def shielded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        asking = asyncio.create_task(call(*args, **kwargs))
        _ASKING.add(asking)
        asking.add_done_callback(_asked)
        return await asyncio.shield(asking)

    return shielded


_ASKING: set[asyncio.Task[Any]] = set()


def _asked(asking: asyncio.Task[Any]) -> None:
    _ASKING.discard(asking)
    if not asking.cancelled():
        asking.exception()  # looked at: whoever asked heard it, or has gone


_PARTLY_LOADED = "this partition was there before; the broker has loaded only a part of its metadata since it restarted"


class KafkaBroker(Broker):
    """Topics on Apache Kafka.

    Args:
        bootstrap: ``host:port`` of some brokers, separated by commas.
        clock: time for retries.
        security: TLS and SASL; None for plain text.
        session_timeout: seconds without a heartbeat after which a member's partitions go to others.
    """

    default_partitions = 6
    max_message_bytes = BATCH_BYTES

    def __init__(
        self,
        bootstrap: str,
        *,
        clock: Clock,
        security: KafkaSecurity | None = None,
        session_timeout: float = 10.0,
    ) -> None:
        self.url = f"kafka://{bootstrap}"
        self._clock = clock
        self.session_timeout: float = session_timeout
        self._connection: dict[str, Any] = {"bootstrap_servers": bootstrap, "request_timeout_ms": 20_000}
        self._connection |= security.client_options() if security else {}
        # At DEBUG the client logs keys and values (FACTS): never let it.
        # Also where somebody turns the root logger to DEBUG later: a password is in there, too.
        client_log = logging.getLogger("aiokafka")
        if client_log.level < logging.INFO:
            client_log.setLevel(max(logging.INFO, client_log.getEffectiveLevel()))
        self._admin: AIOKafkaAdminClient | None = None
        self._lookup: aiokafka.AIOKafkaConsumer | None = None
        self._uncommitted: aiokafka.AIOKafkaConsumer | None = None
        self._opening = asyncio.Lock()
        self._limits: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # partitions of topics, as seen: they never become fewer

    async def start(self) -> None:
        """Connect; see the port."""
        admin = AIOKafkaAdminClient(**self._connection)
        lookup = aiokafka.AIOKafkaConsumer(
            isolation_level="read_committed", enable_auto_commit=False, **self._connection
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                await _begin(admin.start(), admin._client)  # noqa: SLF001
                await _begin(lookup.start(), lookup._client)  # noqa: SLF001
        except BaseException as error:
            await _stop(lookup.stop(), lookup._client)  # noqa: SLF001 - a failed start leaves connections open
            await _stop(admin.close(), admin._client)  # noqa: SLF001
            if not isinstance(error, (TimeoutError, kafka_errors.KafkaError, OSError)):
                raise
            raise BrokerUnreachableError(
                f"{self.url}: no broker answers ({_reason(error)}); check the address, that Kafka runs there, and "
                "its TLS and SASL settings"
            ) from error
        self._admin, self._lookup = admin, lookup

    async def close(self) -> None:
        """Disconnect."""
        consumers, admin = [self._lookup, self._uncommitted], self._admin
        self._lookup = self._uncommitted = self._admin = None
        for consumer in consumers:
            if consumer is not None:
                await _stop(consumer.stop(), consumer._client)  # noqa: SLF001
        if admin is not None:
            await _stop(admin.close(), admin._client)  # noqa: SLF001

    # --- what is there -----------------------------------------------------------------------------------------

    async def info(self) -> BrokerInfo:
        """Kind, release as far as the protocol tells it, nodes."""
        async with self._call("describe the cluster"):
            cluster = await self._started().describe_cluster()
            return BrokerInfo(self.url, "Apache Kafka", _release(self._started()), len(cluster["brokers"]))

    @_outlives_its_caller
    async def topics(self) -> dict[str, TopicInfo]:
        """All topics but Kafka's internal ones."""
        async with self._call("list topics"):
            described = await self._started().describe_topics()
        found = {
            entry["topic"]: TopicInfo(entry["topic"], len(entry["partitions"]))
            for entry in described
            if not entry["is_internal"] and not entry["error_code"]
        }
        for name, topic in found.items():
            self._sizes[name] = max(topic.partitions, self._sizes.get(name, 0))
        return found

    @_outlives_its_caller
    async def record_limits(self, topics: Collection[str]) -> dict[str, int]:
        """``max.message.bytes`` of each; it holds for a whole batch, so batches are kept below it as well."""
        unknown = [topic for topic in topics if topic not in self._limits]
        if unknown:
            wanted = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in unknown]
            async with self._call("read topic settings"):
                responses = await self._started().describe_configs(wanted)
            self._limits |= _limits(responses, unknown)
        return {topic: self._limits[topic] for topic in topics}

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Make the absent ones; the replication factor is 3, or the number of brokers if that is less."""
        present = await self.topics()
        absent = [spec for spec in specs if spec.name not in present]
        if not absent:
            return
        replicas = min(3, (await self.info()).nodes)
        wanted = [
            NewTopic(
                spec.name,
                self.default_partitions if spec.partitions is None else spec.partitions,
                replicas,
                topic_configs=dict(spec.config),
            )
            for spec in absent
        ]
        async with self._call("create topics"):
            response = await self._started().create_topics(wanted, timeout_ms=int(CALL_SECONDS * 1000))
            for name, code, *detail in response.topic_errors:
                _check_created(name, code, str(detail[0]) if detail and detail[0] else "")
            await self._await_leaders([spec.name for spec in absent])

    async def _await_leaders(self, names: Collection[str]) -> None:
        """create_topics returns before brokers know the topic; wait until every partition has a leader."""
        while True:
            described = await self._started().describe_topics(list(names))
            leaders = [p["leader"] for entry in described for p in entry["partitions"]]
            if leaders and min(leaders) >= 0 and not any(entry["error_code"] for entry in described):
                return
            await self._clock.sleep(RETRY_PAUSE)

    async def grow_topic(self, name: str, partitions: int) -> None:
        """Add partitions up to this number."""
        async with self._call(f"add partitions to {name}"):
            await self._started().create_partitions({name: NewPartitions(partitions)})
            while (await self.topics())[name].partitions < partitions:
                await self._clock.sleep(RETRY_PAUSE)
            await self._await_leaders([name])

    async def delete_topics(self, names: Collection[str]) -> None:
        """Delete, and wait until the names are gone from the metadata."""
        present = set(await self.topics()) & set(names)
        for name in names:
            self._sizes.pop(name, None)
        if not present:
            return
        async with self._call("delete topics"):
            request = DeleteTopicsRequest(sorted(present), int(CALL_SECONDS * 1000))
            response = await self._started()._send_to_controller(request)  # noqa: SLF001 - delete_topics drops errors
            for name, code in response.topic_error_codes:
                error = kafka_errors.for_code(code)
                if error not in (kafka_errors.NoError, kafka_errors.UnknownTopicOrPartitionError):
                    raise error(name)
            while present & set(await self.topics()):
                await self._clock.sleep(RETRY_PAUSE)

    @_outlives_its_caller
    async def offsets(self, partitions: Collection[TopicPartition], at: Moment) -> dict[TopicPartition, int]:
        """Log start, last stable offset, or first record at a time."""
        if not partitions:
            return {}
        await self._check_exist(partitions)
        tps = [aiokafka.TopicPartition(*tp) for tp in partitions]
        async with self._call("look up offsets"):
            lookup = self._looking()
            await _know(lookup, {tp.topic for tp in partitions})
            if at == "earliest":
                found = await lookup.beginning_offsets(tps)
            elif at == "end":
                found = await lookup.end_offsets(tps)
            elif at == "high_watermark":
                found = await self._high_watermarks(tps)
            else:
                found = await self._offsets_at(lookup, tps, at)
        return {TopicPartition(*tp): offset for tp, offset in found.items()}

    async def _high_watermarks(self, tps: Sequence[Any]) -> dict[Any, int]:
        """What end_offsets answers to a consumer that also sees open transactions."""
        async with self._opening:
            if self._uncommitted is None:
                consumer = aiokafka.AIOKafkaConsumer(enable_auto_commit=False, **self._connection)
                try:
                    await _begin(consumer.start(), consumer._client)  # noqa: SLF001
                except BaseException:
                    await _stop(consumer.stop(), consumer._client)  # noqa: SLF001
                    raise
                self._uncommitted = consumer
        await _know(self._uncommitted, {tp.topic for tp in tps})
        found: dict[Any, int] = await self._uncommitted.end_offsets(tps)
        return found

    async def _offsets_at(self, lookup: Any, tps: Sequence[Any], at: int) -> dict[Any, int]:
        ends = await lookup.end_offsets(tps)
        timed = await lookup.offsets_for_times(dict.fromkeys(tps, at))
        # The lookup by time also finds records beyond the last stable offset; a reader would not see them yet.
        return {tp: min(ends[tp], timed[tp].offset) if timed[tp] else ends[tp] for tp in tps}

    async def _check_exist(self, partitions: Collection[TopicPartition]) -> None:
        async with self._call("describe topics"):  # only these: a cluster may have thousands
            described = await self._started().describe_topics(sorted({tp.topic for tp in partitions}))
        counts = {entry["topic"]: len(entry["partitions"]) for entry in described if not entry["error_code"]}
        for tp in partitions:
            if tp.partition >= counts.get(tp.topic, 0):
                if tp.topic in counts and tp.partition < self._sizes.get(tp.topic, 0):
                    raise BrokerError(f"{tp}: {_PARTLY_LOADED}")
                raise TopicError(f"{tp}: no such partition on {self.url}; `rowmill topics` lists what there is")
        self._sizes |= counts

    # --- groups ------------------------------------------------------------------------------------------------

    @_outlives_its_caller
    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, Committed | None]:
        """OffsetFetch, with the two errors checked that the client's own calls overlook (FACTS, "Fencing")."""
        by_topic: dict[str, list[int]] = {}
        for tp in partitions:
            by_topic.setdefault(tp.topic, []).append(tp.partition)
        request = OffsetFetchRequest(group, list(by_topic.items()))
        async with self._call(f"read the offsets of group {group}"):
            while True:
                try:
                    coordinator = await self._started().find_coordinator(group)
                    response = await self._started()._send_request(request, coordinator)  # noqa: SLF001
                    return _committed(response, partitions)
                except kafka_errors.KafkaError as error:
                    if not getattr(error, "retriable", False):
                        raise
                await self._clock.sleep(RETRY_PAUSE)

    @_outlives_its_caller
    async def pending(self, group: str, partitions: Collection[TopicPartition]) -> frozenset[TopicPartition]:
        """An OffsetFetch that asks for stable offsets: the broker refuses those that a transaction may still move."""
        by_topic: dict[str, list[int]] = {}
        for tp in partitions:
            by_topic.setdefault(tp.topic, []).append(tp.partition)
        request = _StableOffsetsRequest(group, by_topic)
        async with self._call(f"read the pending offsets of group {group}"):
            while True:
                try:
                    coordinator = await self._started().find_coordinator(group)
                    response = await self._started()._send_request(request, coordinator)  # noqa: SLF001
                    return _pending(response, partitions)
                except NotImplementedError:  # the client's word for a broker that does not speak this version
                    return frozenset()
                except kafka_errors.KafkaError as error:
                    if not getattr(error, "retriable", False):
                        raise
                await self._clock.sleep(RETRY_PAUSE)

    async def groups(self) -> list[str]:
        """Every group that some broker coordinates."""
        async with self._call("list groups"):
            return sorted({str(group[0]) for group in await self._started().list_consumer_groups()})

    @_outlives_its_caller
    async def members(self, group: str) -> list[MemberInfo]:
        """DescribeGroups for this one group.

        The client reads the answer of the newest version by the layout of the one before, which holds for its first
        group only; and its own call passes over the group's error.
        """
        request = DescribeGroupsRequest([group])
        async with self._call(f"describe group {group}"):
            while True:
                try:
                    coordinator = await self._started().find_coordinator(group)
                    response = await self._started()._send_request(request, coordinator)  # noqa: SLF001
                    return _members(response.groups[0])
                except kafka_errors.KafkaError as error:
                    if not getattr(error, "retriable", False):
                        raise
                await self._clock.sleep(RETRY_PAUSE)

    async def delete_groups(self, names: Collection[str]) -> None:
        """Forget groups; each at its coordinator, one that is absent or already gone is no error."""
        async with self._call("delete groups"):
            for name in names:
                coordinator = await self._started().find_coordinator(name)
                response = await self._started()._send_request(  # noqa: SLF001 - the client has the message, no call
                    DeleteGroupsRequest([name]), coordinator
                )
                for _, code in response.results:
                    error = kafka_errors.for_code(code)
                    if error is kafka_errors.NonEmptyGroup:
                        raise GroupBusyError(f"group {name} has a member; stop its workers first")
                    if error not in (kafka_errors.NoError, kafka_errors.GroupIdNotFound):
                        raise error(name)

    # --- readers and producers ---------------------------------------------------------------------------------

    def reader(self) -> Reader:
        """A reader without a group."""
        return KafkaReader(self._consumer(), self)

    def member(self, group: str, topics: Collection[str]) -> Member:
        """A member of a consumer group."""
        consumer = self._consumer(
            group_id=group,
            session_timeout_ms=int(self.session_timeout * 1000),
            # A member hears of a rebalance in the answer to a heartbeat, and all wait for the last one to hear.
            heartbeat_interval_ms=min(_HEARTBEAT_MS, int(self.session_timeout * 1000 / 4)),
            # Partitions that stay where they are keep their rows in flight.
            partition_assignment_strategy=(StickyPartitionAssignor,),
            # The default is the session time-out, which is short for handing over many partitions (FACTS).
            rebalance_timeout_ms=60_000,
            # Never: past it the client leaves, and comes back only when it is polled, which a worker without
            # partitions, or with full buffers, does not do. The worker watches its own progress instead.
            max_poll_interval_ms=2**31 - 1,
        )
        return KafkaMember(consumer, self, topics)

    def producer(self) -> Producer:
        """An idempotent producer."""
        return KafkaProducer(self._producer(enable_idempotence=True), self._limits, self._sizes)

    def transactional_producer(self, transactional_id: str, *, timeout: float | None = None) -> TransactionalProducer:
        """A transactional producer; a transaction that is left open ends by itself, after a minute unless told."""
        return KafkaTransactionalProducer(
            self._producer(transactional_id=transactional_id, transaction_timeout_ms=int((timeout or 60.0) * 1000)),
            self._limits,
            self._sizes,
            transactional_id,
        )

    def _consumer(self, **options: Any) -> aiokafka.AIOKafkaConsumer:
        return aiokafka.AIOKafkaConsumer(
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=4 * 1024 * 1024,
            fetch_max_wait_ms=_FETCH_WAIT_MS,
            **self._connection,
            **options,
        )

    def _producer(self, **options: Any) -> aiokafka.AIOKafkaProducer:
        return aiokafka.AIOKafkaProducer(acks="all", max_batch_size=BATCH_BYTES, **self._connection, **options)

    # --- raw access, for records that the client cannot parse --------------------------------------------------

    async def rescue(self, tp: TopicPartition, offset: int, max_records: int) -> tuple[list[Record], int]:
        """Fetch and parse by hand what lies at ``offset``: the records, and where to go on."""
        client = self._looking()._client  # noqa: SLF001
        request = FetchRequest(
            0, 0, 4 * 1024 * 1024, READ_COMMITTED, [(tp.topic, [(tp.partition, offset, 4 * 1024 * 1024)])]
        )
        async with self._call(f"read {tp} at offset {offset:,}"):
            await client._wait_on_metadata(tp.topic)  # noqa: SLF001
            leader = client.cluster.leader_for_partition(aiokafka.TopicPartition(*tp))
            response = await client.send(leader, request)
            partition = response.topics[0][1][0]
            code, aborted, data = partition[1], partition[-3 if response.API_VERSION >= 11 else -2], partition[-1]
            if kafka_errors.for_code(code) is not kafka_errors.NoError:
                raise kafka_errors.for_code(code)(tp)
        parsed = PartitionRecords(
            aiokafka.TopicPartition(*tp), _TolerantRecords(data or b""), aborted, offset, None, None, True,
            READ_COMMITTED,
        )  # fmt: skip
        records: list[Record] = []
        try:
            records.extend(itertools.islice(parsed, max_records))
        except (ValueError, IndexError, kafka_errors.KafkaError) as error:
            if not records:
                raise BrokerError(
                    f"{tp}: the record at offset {parsed.next_fetch_offset:,} is corrupt ({error}); move the group "
                    "past it with Kafka's own consumer-groups tool, or restore the topic from a replica"
                ) from error
        return records, parsed.next_fetch_offset

    @contextlib.asynccontextmanager
    async def _call(self, what: str) -> AsyncIterator[None]:
        async with deadline(CALL_SECONDS, f"{self.url}: {what}"):
            with _translated(what):
                yield

    def _started(self) -> AIOKafkaAdminClient:
        if self._admin is None:
            raise BrokerError(f"{self.url}: not started, or closed already")
        return self._admin

    def _looking(self) -> aiokafka.AIOKafkaConsumer:
        if self._lookup is None:
            raise BrokerError(f"{self.url}: not started, or closed already")
        return self._lookup


async def _know(consumer: Any, topics: set[str]) -> None:
    """Ask for the metadata of all these topics at once: the client would ask for one after the other."""
    client = consumer._client  # noqa: SLF001
    if not topics <= client._topics:  # noqa: SLF001
        await client.set_topics(client._topics | topics)  # noqa: SLF001


def _reason(error: BaseException) -> str:
    return str(error) or ("no answer within 9 s" if isinstance(error, TimeoutError) else type(error).__name__)


def _check_created(name: str, code: int, detail: str) -> None:
    error = kafka_errors.for_code(code)
    if error not in (kafka_errors.NoError, kafka_errors.TopicAlreadyExistsError):
        raise TopicError(f"topic {name!r} was not created: {error.__name__}{': ' + detail if detail else ''}")


def _committed(response: Any, partitions: Collection[TopicPartition]) -> dict[TopicPartition, Committed | None]:
    if response.error_code:
        raise kafka_errors.for_code(response.error_code)("OffsetFetch")
    found: dict[TopicPartition, Committed | None] = {}
    for topic, entries in response.topics:
        for partition, offset, metadata, code in entries:
            if code:
                raise kafka_errors.for_code(code)(f"{topic}/{partition}")
            found[TopicPartition(topic, partition)] = Committed(offset, metadata or "") if offset >= 0 else None
    missing = [tp for tp in partitions if tp not in found]
    if missing:  # a short answer is no "no offset"
        raise kafka_errors.GroupLoadInProgressError(f"no answer for {missing[0]}")
    return found


def _members(described: Sequence[Any]) -> list[MemberInfo]:
    """The members in a group's description. A group that nobody knows is told as dead, or as an error of its own."""
    code, group, _, kind, _, members, *_ = described
    error = kafka_errors.for_code(code)
    if error is kafka_errors.GroupIdNotFound:
        return []
    if error is not kafka_errors.NoError:
        raise error(group)
    decoded = kind == ConsumerProtocol.PROTOCOL_TYPE
    return sorted(
        (
            MemberInfo(member, client, host.removeprefix("/"), _assigned(assignment if decoded else b""))
            for member, client, host, _, assignment in members
        ),
        key=lambda member: member.id,
    )


def _assigned(assignment: bytes) -> frozenset[TopicPartition]:
    """The partitions in a member's assignment; it is empty until the leader has shared them out."""
    if not assignment:
        return frozenset()
    try:
        return frozenset(TopicPartition(*tp) for tp in ConsumerProtocolMemberAssignment.decode(assignment).partitions())
    except (ValueError, struct.error) as error:
        raise BrokerError(f"a member's assignment cannot be read ({error}): {assignment[:80]!r}") from error


def _pending(response: Any, partitions: Collection[TopicPartition]) -> frozenset[TopicPartition]:
    if response.error_code:
        raise kafka_errors.for_code(response.error_code)("OffsetFetch")
    codes = {
        TopicPartition(topic, partition): code
        for topic, entries, _ in response.topics
        for partition, _, _, _, code, _ in entries
    }
    for tp in partitions:
        code = codes.get(tp)
        if code is None:
            raise kafka_errors.GroupLoadInProgressError(f"no answer for {tp}")
        if code not in (0, _UNSTABLE_OFFSET_COMMIT):
            raise kafka_errors.for_code(code)(str(tp))
    return frozenset(tp for tp in partitions if codes[tp])


_UNSTABLE_OFFSET_COMMIT = 88


class _StableOffsetsResponse(Response):  # type: ignore[misc]  # the client has no types
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CompactString("utf-8")),
                        ("error_code", Int16),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("error_code", Int16),
        ("tags", TaggedFields),
    )


class _StableOffsetsRequestV7(RequestStruct):  # type: ignore[misc]
    """OffsetFetch of KIP-447, Kafka 2.5 and later; the client stops at version 3 (FACTS, "Fencing")."""

    FLEXIBLE_VERSION = True
    API_KEY = 9
    API_VERSION = 7
    RESPONSE_TYPE = _StableOffsetsResponse
    SCHEMA = Schema(
        ("group", CompactString("utf-8")),
        (
            "topics",
            CompactArray(
                ("topic", CompactString("utf-8")), ("partitions", CompactArray(Int32)), ("tags", TaggedFields)
            ),
        ),
        ("require_stable", Boolean),
        ("tags", TaggedFields),
    )


class _StableOffsetsRequest(Request[_StableOffsetsRequestV7]):  # type: ignore[misc]
    API_KEY = 9

    def __init__(self, group: str, by_topic: Mapping[str, Sequence[int]]) -> None:
        self._group = group
        no_tags: dict[int, bytes] = {}
        self._topics = [(topic, list(numbers), no_tags) for topic, numbers in by_topic.items()]

    def build(self, request_struct_class: type[_StableOffsetsRequestV7]) -> _StableOffsetsRequestV7:
        return request_struct_class(self._group, self._topics, True, {})


# The newest version of the Fetch API that each release speaks, read off their ApiVersions answers: the protocol
# has no field for the release itself.
_RELEASES = ((18, "4.1 or newer"), (17, "3.9 or 4.0"), (16, "3.7 or 3.8"), (15, "3.5 or 3.6"), (13, "3.1 to 3.4"))


def _release(admin: AIOKafkaAdminClient) -> str:
    for connection in admin._client._conns.values():  # noqa: SLF001 - versions are kept per connection
        versions = getattr(connection, "_versions", None) or {}
        if FetchRequest.API_KEY in versions:
            newest = versions[FetchRequest.API_KEY][1]
            return next((f"{name} (Fetch v{newest})" for level, name in _RELEASES if newest >= level), "before 3.1")
    return "unknown"


async def _begin(start: Coroutine[Any, Any, None], network: Any) -> None:
    """Start a client. Who gives up meanwhile waits, half a second at most, until it knows its cluster.

    A client that is cancelled while it asks its first connection for metadata forgets that connection (aiokafka 0.14.0,
    ``AIOKafkaClient.bootstrap``): its own stop would not close it.
    """
    starting = asyncio.create_task(start)
    starting.add_done_callback(_asked)
    try:
        await asyncio.shield(starting)
    except asyncio.CancelledError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BOOTSTRAP_SECONDS):
                while network._sync_task is None and not starting.done():  # noqa: SLF001, ASYNC110 - it tells nobody
                    await asyncio.sleep(_SHORT_PAUSE)
        starting.cancel()
        await asyncio.wait({starting}, timeout=_CANCELLED_CLOSE_SECONDS)
        raise


async def _stop(goodbye: Coroutine[Any, Any, Any], client: Any) -> None:
    """An orderly stop with a deadline; with the broker gone the client's own would wait for ever (FACTS).

    In a task of its own: while stopping, the client may raise the CancelledError of a task that it cancelled
    itself, which must not be taken for our own cancellation.
    """
    leaving = asyncio.create_task(goodbye)
    try:
        await asyncio.wait({leaving}, timeout=CLOSE_SECONDS)
    except asyncio.CancelledError:  # a connection left half closed outlives the loop: a little longer, then
        await asyncio.wait({leaving}, timeout=_CANCELLED_CLOSE_SECONDS)
        raise
    if leaving.done() and not leaving.cancelled() and leaving.exception() is None:
        return
    log.debug("closing without a goodbye")
    leaving.cancel()
    if client is not None:
        await _cut(client)


async def _cut(*clients: Any) -> None:
    for client in clients:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1):
                await client.close()


def _out_of_range(error: kafka_errors.OffsetOutOfRangeError) -> OffsetOutOfRangeError:
    tp, offset = next(iter(error.args[0].items()))
    return OffsetOutOfRangeError(
        TopicPartition(*tp), offset, "retention removed it, or the topic was made anew; choose where to go on"
    )


class _TolerantRecords:
    """The batches of a fetch response, each parsed by :func:`read_record`; as the client's MemoryRecords."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _length(self) -> int:
        return 12 + int(struct.unpack_from(">i", self._data, self._at + 8)[0])

    def has_next(self) -> bool:
        return len(self._data) - self._at >= 12 and len(self._data) - self._at >= self._length()

    def next_batch(self) -> _TolerantBatch:
        end = self._at + self._length()
        batch = _TolerantBatch(self._data[self._at : end])
        self._at = end
        return batch


class _TolerantBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    _pos: int

    def _read_msg(self, *_: Any) -> Any:
        raw = read_record(self._buffer, self._pos)
        self._pos = raw.end
        logged = self.timestamp_type == self.LOG_APPEND_TIME
        timestamp = self.max_timestamp if logged else self.first_timestamp + raw.timestamp_delta
        return _DefaultRecordPy(
            self.base_offset + raw.offset_delta, timestamp, self.timestamp_type, raw.key, raw.value, list(raw.headers)
        )


class _Arrivals(dict[Any, Any]):
    """What the client has fetched and nobody has taken, by partition; what is taken of it are bare records.

    The client makes an object of eleven fields of every record, in Python, one generator step each: a sixth of all
    processor time of a plain pipeline (benchmarks, P1). Nobody needs more than its parser gives.
    """

    def __setitem__(self, tp: Any, fetched: Any) -> None:
        if type(fetched) is FetchResult:  # else an error
            fetched._partition_records = _BareRecords(fetched._partition_records)  # noqa: SLF001
            # A proxy: with a cycle, what is passed over would stay in memory until the collector comes by.
            fetched.getall = functools.partial(_take_bare, weakref.proxy(fetched))
        super().__setitem__(tp, fetched)


def _take_bare(fetched: Any, most: int) -> list[Record]:
    """The client's ``FetchResult.getall``, but for what it gives."""
    if not fetched.has_more() or not fetched.check_assignment(fetched._topic_partition):  # noqa: SLF001
        return []
    records: _BareRecords = fetched._partition_records  # noqa: SLF001
    taken = records.take(most)
    fetched._update_position()  # noqa: SLF001
    if not records.ahead:
        fetched._partition_records = None  # noqa: SLF001 - by which the client knows that it may fetch
    return taken


class _BareRecords(PartitionRecords):  # type: ignore[misc]  # the client has no types
    """The records of one partition in one fetch, as the client's parser makes them.

    Which batches count is decided as the client's ``_unpack_records`` does: control batches and those of aborted
    transactions are passed over.

    Args:
        packed: the client's own, of which nothing has been taken.
    """

    def __init__(self, packed: PartitionRecords) -> None:
        self.__dict__.update(vars(packed))
        # It holds the client's object, which holds it and all that was fetched, until the collector comes by.
        self._records_iterator.close()
        self._position: int = packed.next_fetch_offset  # behind the batches that were unpacked
        self._batches = self._unpack()
        self.ahead: list[Record] = []
        """Unpacked, and not taken."""

    def take(self, most: int) -> list[Record]:
        """Up to so many. If nothing is ``ahead`` afterwards, that was all.

        Raises:
            CorruptRecordException: a batch is damaged.
            UnicodeDecodeError: a header's name is no UTF-8.
        """
        ahead = self.ahead
        while len(ahead) <= most:  # one more than is asked for, so that its end is known
            batch = next(self._batches, None)
            if batch is None:
                break
            ahead += batch
        taken, self.ahead = ahead[:most], ahead[most:]
        self.next_fetch_offset = self.ahead[0].offset if self.ahead else self._position
        return taken

    def _unpack(self) -> Iterator[list[Record]]:
        while self._records.has_next():
            batch = self._records.next_batch()
            if not batch.validate_crc():
                raise kafka_errors.CorruptRecordException(f"Invalid CRC - {self._tp}")
            records = [] if self._is_void(batch) or batch.is_control_batch else list(batch)
            if records and records[0].offset < self._position:
                records = [record for record in records if record.offset >= self._position]
            self._position = batch.next_offset
            if records:
                yield records

    def _is_void(self, batch: Any) -> bool:
        """Whether a batch is of a transaction that was aborted; keeps the client's books of those."""
        if self._isolation_level != READ_COMMITTED or batch.producer_id is None:
            return False
        self._consume_aborted_up_to(batch.base_offset)
        if batch.is_control_batch and self._contains_abort_marker(batch):
            self._aborted_producers.discard(batch.producer_id)
        return batch.is_transactional and batch.producer_id in self._aborted_producers


class KafkaReader(Reader):
    """A consumer with partitions assigned by hand."""

    def __init__(self, consumer: aiokafka.AIOKafkaConsumer, broker: KafkaBroker) -> None:
        self._client = consumer
        self._broker = broker
        # Where each partition's next record lies as far as our caller was told. The client's own position may be
        # ahead: when one partition's batch cannot be parsed, what it took from others in that call is lost.
        self._delivered: dict[TopicPartition, int] = {}

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        """Connect and seek."""
        await self._connect()
        self._client.assign([aiokafka.TopicPartition(*tp) for tp in positions])
        for tp, offset in positions.items():
            self.seek(tp, offset)

    async def _connect(self) -> None:
        # Longer than a broker's start: right after one restarted, its coordinators load their logs first.
        async with deadline(CALL_SECONDS, "connect a consumer"):
            with _translated("connect a consumer"):
                await _begin(self._client.start(), self._client._client)  # noqa: SLF001
        self._client._fetcher._records = _Arrivals(self._client._fetcher._records)  # noqa: SLF001 - no other way in

    async def fetch(
        self, partitions: Collection[TopicPartition], max_records: int, timeout: float
    ) -> dict[TopicPartition, Sequence[Record]]:
        """See the port. Cancelling getmany breaks its liveness check (FACTS), so the wait is its own."""
        wanted = [aiokafka.TopicPartition(*tp) for tp in partitions if tp in self._owned()]
        if not wanted:
            await asyncio.sleep(min(timeout, 0.02))
            return {}
        try:
            got = await self._client.getmany(*wanted, timeout_ms=int(timeout * 1000), max_records=max_records)
        except _UNPARSABLE as error:
            log.info("a fetch could not be parsed (%s); parsing it by hand", error)
            return await self._rescue(wanted, max_records)
        except kafka_errors.OffsetOutOfRangeError as error:
            raise _out_of_range(error) from error
        except (kafka_errors.KafkaError, OSError) as error:
            raise BrokerError(f"fetch: {type(error).__name__}: {error}") from error
        found: dict[TopicPartition, Sequence[Record]] = {}
        for kafka_tp, records in got.items():
            tp = TopicPartition(*kafka_tp)
            self._delivered[tp] = records[-1].offset + 1
            found[tp] = records
        return found

    async def _rescue(self, wanted: Sequence[Any], max_records: int) -> dict[TopicPartition, Sequence[Record]]:
        """Some partition holds a record that the client cannot parse, and the error does not say which.

        Asking the client again would not tell either: it throws the refused data away and fetches it anew. So this
        one fetch is done by hand for every partition.
        """
        found: dict[TopicPartition, Sequence[Record]] = {}
        partitions = [TopicPartition(*kafka_tp) for kafka_tp in wanted]
        for tp in partitions:  # all of them first: the look-ups below may fail
            self.seek(tp, self._delivered[tp])
        for tp in partitions:
            position = self._delivered[tp]
            records, behind = await self._broker.rescue(tp, position, max_records)
            # Meanwhile the partition may have gone, or begun anew: then these records are nobody's.
            if behind > position and tp in self._owned() and self._delivered.get(tp) == position:
                self.seek(tp, behind)
                found[tp] = records
        return found

    async def position(self, tp: TopicPartition) -> int:
        """The consumer's position."""
        with _translated(f"position of {tp}"):
            return int(await self._client.position(aiokafka.TopicPartition(*tp)))

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Move the position; what was prefetched for the partition is dropped."""
        self._delivered[tp] = offset
        self._client.seek(aiokafka.TopicPartition(*tp), offset)

    def _owned(self) -> frozenset[Any]:
        return frozenset(self._client.assignment())

    async def close(self) -> None:
        """Disconnect."""
        await _stop(self._client.stop(), self._client._client)  # noqa: SLF001


class KafkaMember(KafkaReader, Member):
    """A consumer in a group. Offsets are committed by transactions, never through it."""

    def __init__(self, consumer: aiokafka.AIOKafkaConsumer, broker: KafkaBroker, topics: Collection[str]) -> None:
        super().__init__(consumer, broker)
        self._topics = list(topics)
        self._begun: set[TopicPartition] = set()
        self._listener: AssignmentListener | None = None
        self._generation = -1

    async def join(self, listener: AssignmentListener) -> None:
        """Connect and subscribe; the client joins by itself and calls the listener."""
        self._listener = listener
        self._client.subscribe(self._topics, listener=_Rebalances(self, listener))
        await self._connect()

    def take_over(self, partitions: frozenset[TopicPartition]) -> bool:
        """Hold newly assigned partitions still before anything can be fetched from them.

        Tells whether this is the generation that follows the one before.

        A position is set at once, or the client would look for a committed one, find none and fail; it is not
        used, because the partition is paused until ``begin``.
        """
        self._begun.clear()
        for tp in partitions:
            kafka_tp = aiokafka.TopicPartition(*tp)
            self._client.seek(kafka_tp, 0)
            self._client.pause(kafka_tp)
        before, self._generation = self._generation, int(self._client._coordinator.generation)  # noqa: SLF001
        return self._generation == before + 1

    def begin(self, tp: TopicPartition, offset: int) -> None:
        """Seek and resume."""
        kafka_tp = aiokafka.TopicPartition(*tp)
        if kafka_tp in self._client.assignment():
            self.seek(tp, offset)
            self._client.resume(kafka_tp)
            self._begun.add(tp)

    def _owned(self) -> frozenset[Any]:
        return frozenset(self._begun) & frozenset(self._client.assignment())

    async def commit(self, offsets: Mapping[TopicPartition, Committed]) -> None:
        """An OffsetCommit with this member's generation, which the broker checks."""
        if self._listener is None:  # the client would connect once more for it
            raise FencedError("commit offsets: this member has left its group")
        try:
            with _translated("commit offsets"):
                await self._client.commit({aiokafka.TopicPartition(*tp): tuple(done) for tp, done in offsets.items()})
        except BrokerError as error:
            if isinstance(error.__cause__, _OUTSIDE):
                raise FencedError(f"commit offsets: {error.__cause__}") from error
            raise

    async def leave(self) -> None:
        """Leave; on the way the listener loses what it had, which the client would not tell it."""
        listener, self._listener = self._listener, None
        owned = frozenset(TopicPartition(*tp) for tp in self._client.assignment())
        if listener is not None and owned:
            await listener.revoked(owned)
        await super().close()

    async def close(self) -> None:
        """The same."""
        await self.leave()


class _Rebalances(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc]
    """The client awaits these inside its coordinator, without heartbeats, and swallows what they raise (FACTS)."""

    def __init__(self, member: KafkaMember, listener: AssignmentListener) -> None:
        self._member = member
        self._listener = listener

    async def on_partitions_revoked(self, revoked: Collection[Any]) -> None:
        if revoked:  # the first join revokes nothing
            await self._listener.revoked(frozenset(TopicPartition(*tp) for tp in revoked))

    def on_partitions_assigned(self, assigned: Collection[Any]) -> None:
        partitions = frozenset(TopicPartition(*tp) for tp in assigned)
        consecutive = self._member.take_over(partitions)
        self._listener.assigned(partitions, consecutive)


class KafkaProducer(Producer):
    """Builds record batches itself: one ``send_batch`` a megabyte instead of one ``send`` a record."""

    def __init__(self, client: aiokafka.AIOKafkaProducer, limits: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        self._client = client
        self._limits = limits
        self._sizes = sizes
        self._known: set[TopicPartition] = set()
        self._ends: dict[TopicPartition, int] = {}

    async def start(self) -> None:
        """Connect; a transactional one fences its predecessor here."""
        with _translated("start a producer"):
            await _begin(self._client.start(), self._client.client)

    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        """Batch and hand over."""
        if tp not in self._known:
            await self._check_exists(tp)
        with _translated(f"send to {tp}"):
            acknowledgements = [
                (await self._client.send_batch(batch, tp.topic, partition=tp.partition), batch.record_count())
                for batch in _batches(self._client, records, self._limits.get(tp.topic, BATCH_BYTES))
            ]
        return _Written(tp, acknowledgements, self._ends)

    async def _check_exists(self, tp: TopicPartition) -> None:
        """The client asks for an absent topic again and again, and asserts on an absent partition."""
        client = self._client.client
        with _translated(f"look {tp} up"):
            client.add_topic(tp.topic)
            answers = 0
            while True:
                partitions = client.cluster.partitions_for_topic(tp.topic)
                if partitions and tp.partition in partitions:
                    self._known.add(tp)
                    return
                if answers == _METADATA_ATTEMPTS:
                    break
                if answers > 1:  # the first answer has it, unless the topic is brand new
                    await asyncio.sleep(RETRY_PAUSE)
                if await client.force_metadata_update():
                    answers += 1
                else:  # nobody answered; the caller's deadline ends this
                    await asyncio.sleep(RETRY_PAUSE)
        if partitions and tp.partition < self._sizes.get(tp.topic, 0):
            raise BrokerError(f"{tp}: {_PARTLY_LOADED}")
        raise TopicError(f"{tp}: no such topic or partition; `rowmill topics` lists what there is")

    async def close(self) -> None:
        """Stop, without waiting for what nobody waits for."""
        sender = self._client._sender  # noqa: SLF001 - stop() would deliver what is pending first, or hang
        sender.client = _Gone()
        await _stop(sender.close(), None)
        await _stop(self._client.client.close(), self._client.client)
        _look_at_errors(self._client)
        self._client._closed = True  # noqa: SLF001 - it is; and its destructor would complain otherwise


class _Gone:
    """The client of a sender that is closed: a task of the sender ends where it would ask it anything more.

    The sender cancels its loop and not the tasks that it began: one that looks for a coordinator outlives it, and adds
    its partitions to a transaction of the same producer number when the broker comes back, seconds later (seen).
    """

    def __getattr__(self, name: str) -> NoReturn:
        raise asyncio.CancelledError(name)


class _Written(Awaitable[None]):
    """What ``send`` returns. No coroutine: who is cancelled between a send and its await leaves nothing behind.

    Args:
        tp: where the batches went.
        acknowledgements: the client's future of each batch, and the records in it.
        ends: takes the offset behind the last record.
    """

    def __init__(
        self,
        tp: TopicPartition,
        acknowledgements: Sequence[tuple[asyncio.Future[Any], int]],
        ends: dict[TopicPartition, int],
    ) -> None:
        self._tp = tp
        self._acknowledgements = acknowledgements
        self._ends = ends
        for written, _ in acknowledgements:
            written.add_done_callback(_looked_at)

    def __await__(self) -> Generator[Any, None, None]:
        return self._all().__await__()

    async def _all(self) -> None:
        """Await every one, also after a failure: an unawaited one is a lost row that nobody hears of (FACTS)."""
        results = await asyncio.gather(*(written for written, _ in self._acknowledgements), return_exceptions=True)
        for result, (_, count) in zip(results, self._acknowledgements, strict=True):
            if isinstance(result, BaseException):
                with _translated(f"write to {self._tp}"):
                    raise result
            if result.offset >= 0:  # unknown where a repeated batch was recognised as one
                self._ends[self._tp] = result.offset + count


def _looked_at(written: asyncio.Future[Any]) -> None:
    """Whoever sent it hears of a failure by awaiting, or has gone: asyncio has nothing to report."""
    if not written.cancelled():
        written.exception()


class KafkaTransactionalProducer(KafkaProducer, TransactionalProducer):
    """A producer with a transactional id."""

    def __init__(
        self,
        client: aiokafka.AIOKafkaProducer,
        limits: Mapping[str, int],
        sizes: Mapping[str, int],
        transactional_id: str,
    ) -> None:
        super().__init__(client, limits, sizes)
        self._id = transactional_id

    @property
    def written(self) -> Mapping[TopicPartition, int]:
        """As acknowledged so far."""
        return self._ends

    async def begin(self) -> None:
        """Open a transaction."""
        with _translated(f"begin a transaction of {self._id}"):
            await self._client.begin_transaction()
        self._ends = {}

    async def commit_offsets(self, group: str, offsets: Mapping[TopicPartition, Committed]) -> None:
        """Offsets and metadata into the transaction."""
        with _translated(f"commit offsets of {group} in the transaction of {self._id}"):
            await self._client.send_offsets_to_transaction(
                {aiokafka.TopicPartition(*tp): tuple(committed) for tp, committed in offsets.items()}, group
            )

    async def end(self) -> dict[TopicPartition, int]:
        """Commit."""
        with _translated(f"commit the transaction of {self._id}"):
            await self._client.commit_transaction()
        return self._ends

    async def abort(self) -> None:
        """Abort."""
        with _translated(f"abort the transaction of {self._id}"):
            await self._client.abort_transaction()

    async def settle(
        self,
        partitions: Collection[TopicPartition],
        group: str | None,
        offsets: Mapping[TopicPartition, Committed],
        *,
        commit: bool,
    ) -> None:
        """A transaction without records: its markers end what lies open under this producer's number (FACTS)."""
        client, manager = self._client, self._client._txn_manager  # noqa: SLF001 - there is no call for it
        await self._await_leaders(partitions)
        await self.begin()
        with _translated(f"settle what {self._id} left open"):
            for tp in partitions:
                manager.maybe_add_partition_to_txn(aiokafka.TopicPartition(*tp))
            while manager.is_in_transaction() and manager.partitions_to_add():  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(_SHORT_PAUSE)
            if not manager.is_in_transaction():
                await manager.wait_for_transaction_end()  # raises what went wrong
        if group is not None and offsets:
            await self.commit_offsets(group, offsets)
        elif group is not None:
            with _translated(f"settle the offsets of {group}"):
                while not await client._sender._do_add_offsets_to_txn(group):  # noqa: SLF001
                    pass  # it has paused
        await (self.end() if commit else self.abort())

    async def _await_leaders(self, partitions: Collection[TopicPartition]) -> None:
        """A partition without a leader would get no marker this time either."""
        client = self._client.client
        with _translated("look up the leaders"):
            for topic in {tp.topic for tp in partitions}:
                client.add_topic(topic)
            while True:
                known = await client.force_metadata_update()
                leaders = [client.cluster.leader_for_partition(aiokafka.TopicPartition(*tp)) for tp in partitions]
                if known and all(leader is not None and leader >= 0 for leader in leaders):
                    return
                await asyncio.sleep(RETRY_PAUSE)


def _batches(client: aiokafka.AIOKafkaProducer, records: Sequence[Outgoing], limit: int) -> Iterator[Any]:
    """Record batches within ``limit`` bytes. The client's own batches are of one size for all topics."""
    if limit < BATCH_BYTES:
        records = list(records)
        while records:
            part, records = _within(records, limit)
            yield from _filled(client, part)
    else:
        yield from _filled(client, records)


def _filled(client: aiokafka.AIOKafkaProducer, records: Sequence[Outgoing]) -> Iterator[Any]:
    """Batches of the client's size.

    Part of the hot path: records go straight to the C extension that a batch has inside. What the batch's own
    ``append`` adds to that are serializers, which we have none of, and its count of records, which is told it at the
    end; that took a third of the time.
    """
    batch, count = client.create_batch(), 0
    append = batch._builder.append  # noqa: SLF001
    for key, value, timestamp, headers in _parts(records):
        if append(count, timestamp, key, value, headers) is None:
            yield _closed(batch, count)
            batch, count = client.create_batch(), 0
            append = batch._builder.append  # noqa: SLF001
            append(count, timestamp, key, value, headers)
        count += 1
    if count:
        yield _closed(batch, count)


def _parts(records: Sequence[Outgoing]) -> Iterable[tuple[bytes | None, bytes | None, int, list[Header]]]:
    """With headers in a list: the C extension takes nothing else."""
    if isinstance(records, Outbox):
        return records.parts()
    return ((key, value, timestamp, list(headers)) for key, value, timestamp, headers in records)


def _closed(batch: Any, count: int) -> Any:
    batch._relative_offset = count  # noqa: SLF001
    batch.close()
    return batch


def _within(records: Sequence[Outgoing], limit: int) -> tuple[Sequence[Outgoing], Sequence[Outgoing]]:
    """The first records, at least one, that together stay below ``limit``, and the rest."""
    size = 0
    for count, (key, value, _, headers) in enumerate(records):
        size += len(key or b"") + len(value or b"") + _RECORD_BYTES
        size += sum(len(name) * 3 + len(content or b"") + 10 for name, content in headers)
        if size > limit and count:
            return records[:count], records[count:]
    return records, ()


def _limits(responses: Sequence[Any], topics: Sequence[str]) -> dict[str, int]:
    """``max.message.bytes`` less a batch's own head; the broker's default where we may not ask (ACLs)."""
    found = dict.fromkeys(topics, BATCH_BYTES)
    for response in responses:
        for code, _, _, topic, entries in response.resources:
            for name, value, *_ in entries if not code else ():
                if name == "max.message.bytes":
                    found[topic] = int(value) - 2 * _RECORD_BYTES
    return found


def _look_at_errors(client: aiokafka.AIOKafkaProducer) -> None:
    """Errors that the client keeps in futures of its own, and that were told to us by other ways already.

    asyncio would print each of them as never retrieved, with a traceback, into the user's terminal.
    """
    manager, accumulator = client._txn_manager, client._message_accumulator  # noqa: SLF001
    futures = [getattr(manager, "_transaction_waiter", None), client._sender.sender_task]  # noqa: SLF001
    futures += [batch._drain_waiter for queue in accumulator._batches.values() for batch in queue]  # noqa: SLF001
    for future in futures:
        if future is not None and future.done() and not future.cancelled():
            future.exception()
