"""Faust on the embedded broker: a transport driver for ``local:///FOLDER`` over rowmill's broker port.

Registered for the URL scheme ``local`` (entry point ``faust.transports``), so that any Faust app runs without Kafka::

    app = faust.App("counts", broker="local:///tmp/broker")

Agents, tables with changelogs and their recovery, several partitions, seeks and ``auto_offset_reset`` work as on Kafka.
What differs: one process at a time serves an app's group (a second one crashes with GroupBusyError); the folder's path
must be absolute, because URLs have hosts, and hosts no capitals; ``processing_guarantee="exactly_once"`` is refused; a
record that was sent has the offset -1 in its metadata, so that persistent stores restore from the changelog's start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from faust.exceptions import ImproperlyConfigured, ProducerSendError
from faust.transport import base
from faust.types.enums import ProcessingGuarantee
from faust.types.tuples import TP, ConsumerMessage, RecordMetadata
from mode import Service, want_seconds

from ...state.clock import SystemClock
from ...state.errors import ConfigError, RowmillError
from ...state.model import Committed, Header, Outgoing, Record, TopicPartition
from ..brokers.base import Broker, Member, TopicSpec
from ..brokers.local import LocalBroker
from ..errors import OffsetOutOfRangeError
from ..partitioning import partition_for

_log = logging.getLogger(__name__)
_faust_log = logging.getLogger("faust.transport.drivers.local")
"""For what Faust's services tell of themselves."""

MOST_RECORDS = 5_000
"""Records of one fetch, unless the app's ``broker_max_poll_records`` says otherwise."""
MOST_UNWRITTEN = 10_000
"""Records that wait to be written before ``send`` makes its caller wait."""
_UNKNOWN_OFFSET = -1


class Cluster:
    """The topics of a broker and how many partitions they have, remembered: what Faust asks while nobody may wait."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._partitions: dict[str, int] = {}

    async def refresh(self) -> None:
        """Look again."""
        self._partitions = {name: topic.partitions for name, topic in (await self._broker.topics()).items()}

    def count(self, topic: str) -> int | None:
        """A topic's partitions; None if there is no such topic."""
        return self._partitions.get(topic)

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        """The same as Kafka's clients tell it; Faust's assignor asks for this."""
        count = self._partitions.get(topic)
        return None if count is None else set(range(count))

    def partition_of(self, topic: str, key: bytes | None) -> int:
        """Where a key belongs; records without one go to the first partition."""
        count = self._partitions.get(topic)
        if count is None:
            raise ProducerSendError(f"{topic}: no such topic; create it first")
        return 0 if key is None else partition_for(key, count)


class _Link:
    """A broker of our own while a consumer or producer runs."""

    def __init__(self, folder: Path) -> None:
        self.broker: Broker = LocalBroker(folder, SystemClock())
        self.cluster = Cluster(self.broker)

    async def open(self) -> None:
        await self.broker.start()
        await self.cluster.refresh()

    async def create(self, topic: str, partitions: int, config: Mapping[str, str]) -> None:
        await self.broker.create_topics([TopicSpec(topic, partitions, config)])
        await self.cluster.refresh()


class Consumer(base.Consumer):
    """Reads the topics of an app's group: all of their partitions, since nobody else is in the group."""

    logger = _faust_log
    consumer_stopped_errors: ClassVar[tuple[type[BaseException], ...]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if cast(Any, self.app.conf).processing_guarantee == ProcessingGuarantee.EXACTLY_ONCE:
            raise ImproperlyConfigured(
                "processing_guarantee='exactly_once' is not there on local://: use at_least_once"
            )
        self._link = _Link(cast(Transport, self.transport).folder)
        self._member: Member | None = None
        self._assigned: set[TP] = set()
        self._begun: set[TP] = set()
        self._ends: dict[TP, int] = {}
        self._generation = 0
        self._joining = asyncio.Lock()

    async def on_start(self) -> None:
        """Open the broker."""
        await super().on_start()
        await self._link.open()

    async def on_stop(self) -> None:
        """Commit, leave the group, close the broker."""
        try:
            await super().on_stop()
        finally:
            await self._leave()
            await self._link.broker.close()

    async def let_go(self) -> None:
        """Leave the group and close the broker, whatever else hangs: for an app that does not stop in time. The group
        would else be served by this process, and by nobody in it.
        """
        try:
            await self._leave()
        finally:
            await self._link.broker.close()

    # -- the group ---------------------------------------------------------------------------------------------

    async def subscribe(self, topics: Iterable[str]) -> None:
        """Join the group anew with these topics."""
        # In the background: Faust calls this where the callback of an assignment would wait for its end.
        self.add_future(self._rebalance(set(topics)))

    async def _rebalance(self, topics: set[str]) -> None:
        async with self._joining:
            try:
                self.app.on_rebalance_start()
                await self.on_partitions_revoked(set(self._assigned))
                await self._leave()
                await self._join(topics)
                self._generation += 1
                self.app.consumer_generation_id = self._generation
                self._tell_assignor(topics)
                await self.on_partitions_assigned(set(self._assigned), self._generation)
            except RowmillError as error:
                await self.crash(error)

    async def _join(self, topics: set[str]) -> None:
        await self._link.cluster.refresh()
        absent = sorted(topic for topic in topics if self._link.cluster.count(topic) is None)
        if absent and not self.app.conf.topic_allow_declare:
            raise ConfigError("topics", ", ".join(absent), "they are not there; create them first")
        for topic in absent:
            await self._link.create(topic, self.app.conf.topic_partitions, {})
        member = self._link.broker.member(self.app.conf.id, sorted(topics))
        listener = _Listener()
        await member.join(listener)
        self._member = member
        self._assigned = {TP(*tp) for tp in listener.owned}

    async def _leave(self) -> None:
        member, self._member = self._member, None
        self._assigned, self._begun = set(), set()
        if member is not None:
            await member.close()

    def _tell_assignor(self, topics: set[str]) -> None:
        """Let Faust's own assignor decide as in a group of one: tables ask it which changelogs are theirs."""
        assignor = cast(Any, self.app.assignor)
        member_id = self.app.conf.id
        told = assignor.assign(self._link.cluster, {member_id: assignor.metadata(topics)})
        assignor.on_assignment(told[member_id])

    def assignment(self) -> set[TP]:
        """All partitions of the topics."""
        return set(self._assigned)

    # -- reading -----------------------------------------------------------------------------------------------

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> dict[TP, list[Record]]:
        begun = self._begun if active_partitions is None else self._begun & active_partitions
        if self._member is None or not begun or not self.flow_active:
            await self.sleep(min(timeout, 0.05))
            return {}
        most = self.app.conf.broker_max_poll_records or MOST_RECORDS
        wanted = [TopicPartition(*tp) for tp in begun]
        try:
            fetched = await self._member.fetch(wanted, most, timeout)
        except OffsetOutOfRangeError as error:
            await self._reset(error)
            return {}
        records = {TP(*tp): list(batch) for tp, batch in fetched.items() if batch}
        for tp, batch in records.items():
            self._ends[tp] = max(self._ends.get(tp, 0), batch[-1].offset + 1)
        return records

    async def _reset(self, error: OffsetOutOfRangeError) -> None:
        """The position is gone from the log: go where the app's setting says."""
        tp = TP(*error.tp)
        if self.app.conf.consumer_auto_offset_reset not in {"earliest", "latest"}:
            raise error
        offset = (await self._reset_offsets([tp]))[tp]
        _log.warning("%s Going on at %d", error, offset)
        self._begin(tp, offset)
        self._read_offset[tp] = offset or None

    async def _reset_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        is_latest = self.app.conf.consumer_auto_offset_reset == "latest"
        return await self._offsets(tps, "end" if is_latest else "earliest")

    def _begin(self, tp: TP, offset: int) -> None:
        if self._member is not None and tp in self._assigned:
            self._member.begin(TopicPartition(*tp), offset)
            self._begun.add(tp)

    def _to_message(self, tp: TP, record: Any) -> ConsumerMessage:
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            record.offset,
            record.timestamp / 1000.0,
            0,
            list(record.headers),
            record.key,
            record.value,
            None,
            -1 if record.key is None else len(record.key),
            -1 if record.value is None else len(record.value),
            tp,
            generation_id=self.app.consumer_generation_id,
        )

    # -- positions ---------------------------------------------------------------------------------------------

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Go where the group has committed; elsewhere to where ``consumer_auto_offset_reset`` says."""
        tps = list(self._assigned)
        committed = await self._link.broker.committed(self.app.conf.id, [TopicPartition(*tp) for tp in tps])
        known = {TP(*tp): place.offset for tp, place in committed.items() if place is not None}
        starts = {**await self._reset_offsets(tp for tp in tps if tp not in known), **known}
        for tp, offset in starts.items():
            self._begin(tp, offset)
        return known

    async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
        """Go to these offsets."""
        for tp, offset in partitions.items():
            self._begin(tp, offset)
            self._read_offset[tp] = offset or None

    async def _seek(self, partition: TP, offset: int) -> None:
        self._begin(partition, offset)

    async def seek_to_beginning(self, *partitions: TP) -> None:
        """Go to the first records."""
        for tp, offset in (await self.earliest_offsets(*partitions)).items():
            self._begin(tp, offset)

    async def position(self, tp: TP) -> int | None:
        """The offset that is read next; None before the first seek."""
        if self._member is None or tp not in self._begun:
            return None
        return await self._member.position(TopicPartition(*tp))

    async def earliest_offsets(self, *partitions: TP) -> Mapping[TP, int]:
        """The first records' offsets."""
        return await self._offsets(partitions, "earliest")

    async def highwaters(self, *partitions: TP) -> Mapping[TP, int]:
        """The offsets behind the last records."""
        ends = await self._offsets(partitions, "end")
        self._ends.update(ends)
        return ends

    def highwater(self, tp: TP) -> int:
        """The end as it was seen last."""
        return self._ends.get(tp, 0)

    async def _offsets(self, tps: Iterable[TP], at: Any) -> dict[TP, int]:
        wanted = [TopicPartition(*tp) for tp in tps]
        return {TP(*tp): offset for tp, offset in (await self._link.broker.offsets(wanted, at)).items()}

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        if self._member is None:
            return False
        await self._member.commit({TopicPartition(*tp): Committed(offset) for tp, offset in offsets.items()})
        return True

    # -- topics ------------------------------------------------------------------------------------------------

    def topic_partitions(self, topic: str) -> int | None:
        """How many a topic has."""
        return self._link.cluster.count(topic)

    def key_partition(self, topic: str, key: bytes | None, partition: int | None = None) -> int | None:
        """Where a key belongs."""
        return self._link.cluster.partition_of(topic, key) if partition is None else partition

    async def create_topic(self, topic: str, partitions: int, replication: int, **options: Any) -> None:
        """Make a topic if it is absent; nothing is replicated."""
        del replication
        await _create_topic(self, self._link, topic, partitions, options)

    def _new_topicpartition(self, topic: str, partition: int) -> TP:
        return TP(topic, partition)


class _Listener:
    """Only hears what is owned: the group has no other member that could take it."""

    def __init__(self) -> None:
        self.owned: frozenset[TopicPartition] = frozenset()

    def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None:
        del consecutive
        self.owned = partitions

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Faust has committed before it leaves."""


class Producer(base.Producer):
    """Writes records in the order of their sends; those that meet share a transaction of SQLite's."""

    logger = _faust_log

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._link = _Link(cast(Transport, self.transport).folder)
        self._writing: set[asyncio.Future[Any]] = set()
        self._producer = self._link.broker.producer()

    async def on_start(self) -> None:
        """Open the broker."""
        await super().on_start()
        await self._link.open()
        await self._producer.start()

    async def on_stop(self) -> None:
        """Close it; what is unwritten then fails."""
        try:
            await super().on_stop()
        finally:
            await self._producer.close()
            await asyncio.gather(*self._writing, return_exceptions=True)
            await self._link.broker.close()

    async def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        partition: int | None,
        timestamp: float | None,
        headers: Any,
        *,
        transactional_id: str | None = None,
    ) -> Awaitable[RecordMetadata]:
        """Hand a record over; the awaitable ends when it is written."""
        del transactional_id
        cluster = self._link.cluster
        if cluster.count(topic) is None:
            await cluster.refresh()
        tp = TopicPartition(topic, cluster.partition_of(topic, key) if partition is None else partition)
        at_ms = SystemClock().now_ms() if timestamp is None else int(timestamp * 1000)
        record = Outgoing(key, value, at_ms, _headers(headers))
        while len(self._writing) >= MOST_UNWRITTEN:
            await asyncio.wait(self._writing, return_when=asyncio.FIRST_COMPLETED)
        try:
            written = await self._producer.send(tp, [record])
        except RowmillError as error:
            raise ProducerSendError(f"Error while sending: {error}") from error
        sent = asyncio.ensure_future(_told(written, RecordMetadata(*tp, TP(*tp), _UNKNOWN_OFFSET, at_ms / 1000, 0)))
        self._writing.add(sent)
        sent.add_done_callback(self._writing.discard)
        return sent

    async def send_and_wait(self, *args: Any, **kwargs: Any) -> RecordMetadata:
        """Write a record."""
        return await (await self.send(*args, **kwargs))

    async def flush(self) -> None:
        """Wait until all that was sent is written."""
        await self.buffer.flush()
        if self._writing:
            await asyncio.wait(self._writing)

    def key_partition(self, topic: str, key: bytes) -> TP:
        """Where a key belongs."""
        return TP(topic, self._link.cluster.partition_of(topic, key))

    async def create_topic(self, topic: str, partitions: int, replication: int, **options: Any) -> None:
        """Make a topic if it is absent; nothing is replicated."""
        del replication
        await _create_topic(self, self._link, topic, partitions, options)

    def supports_headers(self) -> bool:
        """They are kept."""
        return True


class Transport(base.Transport):
    """The driver: ``broker="local:///FOLDER"``."""

    Consumer: ClassVar[Any] = Consumer
    Producer: ClassVar[Any] = Producer
    default_port = 0
    driver_version = "rowmill"

    @property
    def folder(self) -> Path:
        """The broker's folder.

        Raises:
            ConfigError: the URL names none, or a relative one.
        """
        url = self.url[0]
        if url.host or not url.path.startswith("/") or url.path == "/":
            raise ConfigError(
                "broker", str(url), "name an absolute folder, with three slashes: local:///var/lib/broker"
            )
        return Path(url.path)


async def _create_topic(owner: Service, link: _Link, topic: str, partitions: int, options: Mapping[str, Any]) -> None:
    """Make a topic, if the app may and it is absent. Replication means nothing here."""
    if not cast(Any, owner).app.conf.topic_allow_declare:
        _log.debug("%s is not made: topic_allow_declare is off", topic)
        return
    config = {str(name): str(value) for name, value in (options.get("config") or {}).items()}
    policies = [word for word, flag in (("compact", "compacting"), ("delete", "deleting")) if options.get(flag)]
    if policies:
        config.setdefault("cleanup.policy", ",".join(policies))
    if options.get("retention") is not None:
        config.setdefault("retention.ms", str(int(want_seconds(options["retention"]) * 1000)))
    await link.create(topic, partitions, config)


async def _told(written: Awaitable[None], metadata: RecordMetadata) -> RecordMetadata:
    try:
        await written
    except RowmillError as error:
        raise ProducerSendError(f"Error while sending: {error}") from error
    return metadata


def _headers(headers: Any) -> tuple[Header, ...]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
    return tuple((str(name), value) for name, value in pairs)
