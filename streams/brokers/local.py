"""The embedded broker ``local://FOLDER``: a durable log in one SQLite file.

Several processes of one machine may publish and read at once; one worker at a time serves a group. It never
pretends to be a cluster, and the folder must not be on a network file system (SQLite's locks and shared
memory do not work there).

What is kept after what: a killed process loses nothing that was acknowledged, whatever ``synchronous`` says.
After a power cut ``normal`` (the default) may lose the newest transactions, as a whole and in order, ``full``
none, for one disk flush per commit; with ``off`` the file itself may break.

Topics with ``cleanup.policy=compact`` keep the newest record of each key, at its offset, and every record without
a key; with ``compact,delete`` retention applies to them as well. A deletion (a null value) stays for at least
``delete.retention.ms`` (a day) after the compaction that met it first, so that readers on their way see it. The
newest batch is left alone. A partition is compacted in the background once as much was added as it had kept, and at
least 1 MiB: it takes about twice its live records. Kafka's other settings of compaction have no effect. Group offsets
never expire.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from ...state.clock import Clock
from ...state.errors import ConfigError, RowmillError
from ...state.model import Committed, TopicPartition
from ..errors import GroupBusyError, OffsetOutOfRangeError, TopicError
from .base import Broker, BrokerInfo, MemberInfo, Moment, TopicInfo, TopicSpec
from .local_compact import compact
from .local_group import owner_of, served_groups
from .local_producer import LocalProducer, LocalTransactionalProducer
from .local_reader import LocalMember, LocalReader
from .local_store import SQLITE_VERSION, LogStore, Retention, StoredTopic, StoreOptions
from .local_thread import JobThread

T = TypeVar("T")

_log = logging.getLogger(__name__)

_SCHEME = "local://"
_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")
_MAX_PARTITIONS = 10_000
_NUMBERS = ("retention.ms", "retention.bytes", "max.message.bytes", "delete.retention.ms")
_SYNCHRONOUS = ("off", "normal", "full", "extra")

_TRIM_EVERY_S = 60.0
_DELETE_RETENTION_MS = 86_400_000
_COMPACT_BYTES = 1 << 20
_CLOSE_S = 2.0


class LocalBroker(Broker):
    """Topics in a folder. Nothing touches the disk before ``start``.

    Args:
        where: the folder, as a path or as ``local://FOLDER``; made with mode 0700 if it is absent.
        clock: for commit times and retention.
        synchronous: how careful SQLite is about power cuts: ``off``, ``normal``, ``full`` or ``extra`` (see
            the module).
        max_bytes: largest size of the database file; None for no bound. Its write-ahead log (up to 16 MiB)
            comes on top. A full broker refuses writes until topics are deleted or trimmed.
        retention_ms: age in milliseconds at which records of topics without a ``retention.ms`` of their own
            are dropped; None keeps them.
        retention_bytes: likewise for ``retention.bytes``, in bytes per partition.
        lock_timeout: seconds to wait for another process's write to end.

    Freed space is used again for new records. The file shrinks when more than half of it is unused and no more
    than 64 MiB are in use.
    """

    folder: Path
    default_partitions = 4
    max_message_bytes = 1_048_576

    def __init__(
        self,
        where: str | Path,
        clock: Clock,
        *,
        synchronous: str = "normal",
        max_bytes: int | None = None,
        retention_ms: int | None = None,
        retention_bytes: int | None = None,
        lock_timeout: float = 10.0,
    ) -> None:
        path = str(where).removeprefix(_SCHEME)
        if not path or "\0" in path:
            raise ConfigError("broker", str(where), "name a folder, such as local://.rowmill")
        if synchronous not in _SYNCHRONOUS:
            raise ConfigError("synchronous", synchronous, f"use one of {', '.join(_SYNCHRONOUS)}")
        self.url = _SCHEME + path
        self.folder = Path(path).expanduser().absolute()
        self._clock = clock
        self._retention = {"retention.ms": retention_ms, "retention.bytes": retention_bytes}
        self._options = StoreOptions(self.folder, synchronous, max_bytes, lock_timeout)
        self._writes = _StoreThread(LogStore(self._options), "rowmill-local-write")
        self._reads = _StoreThread(LogStore(self._options), "rowmill-local-read")
        self._topics: dict[str, StoredTopic] = {}
        self._open: WeakSet[LocalReader] = WeakSet()
        self._trimming: asyncio.Task[None] | None = None
        self._trimmed_at = 0.0
        self._compacting = asyncio.Lock()  # two passes over one log would only get into each other's way

    async def start(self) -> None:
        """Open the file, or make it."""
        await self._writes.start()  # makes the file that the other one opens
        try:
            await self._reads.start()
        except BaseException:
            await self._writes.stop()
            raise
        self._trim_in_background()

    async def close(self) -> None:
        """Let go of the file and of all groups; a call that hangs on the disk is left behind after 2 s."""
        for reader in list(self._open):
            reader.abandon()
        if self._trimming is not None:
            self._trimming.cancel()
            await asyncio.wait([self._trimming])  # it may have a connection of its own
        # One after the other: SQLite tidies up when the last connection closes, and two at once both think that
        # the other one is still there.
        await self._reads.stop()
        await self._writes.stop()

    async def info(self) -> BrokerInfo:
        """What is there."""
        return BrokerInfo(url=self.url, kind="local", version=f"SQLite {SQLITE_VERSION}", nodes=1)

    # -- topics ----------------------------------------------------------------------------------------

    async def topics(self) -> dict[str, TopicInfo]:
        """All topics, with the config they were made with."""
        return {
            topic.name: TopicInfo(topic.name, topic.partitions, topic.config)
            for topic in await self._reads.call(LogStore.topics)
        }

    async def record_limits(self, topics: Collection[str]) -> dict[str, int]:
        """``max.message.bytes`` of each, less what the lengths of its parts take."""
        present = await self.topics()
        return {
            name: (_number(name, present[name].config, "max.message.bytes") or self.max_message_bytes) - 100
            for name in topics
        }

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Make those that are absent, all or none."""
        await self._writes.call(LogStore.create_topics, [self._checked(spec) for spec in specs])

    async def delete_topics(self, names: Collection[str]) -> None:
        """Remove topics, their records, and what groups committed for them."""
        await self._writes.call(LogStore.drop_topics, list(names))
        for name in names:
            self._topics.pop(name, None)
        await self._sweep()
        self._trim_in_background()

    async def topic(self, tp: TopicPartition) -> StoredTopic:
        """The topic of an existing partition, from memory if it was met before.

        A topic deleted by another process is noticed when it is written to.

        Raises:
            TopicError: there is none, or it has fewer partitions.
        """
        topic = self._topics.get(tp.topic)
        if topic is None:
            found = await self._reads.call(LogStore.topics, tp.topic)
            if not found:
                raise TopicError(f"{tp.topic}: no such topic; create it first")
            topic = self._topics[tp.topic] = found[0]
        if not 0 <= tp.partition < topic.partitions:
            raise TopicError(f"{tp}: no such partition; the topic has {topic.partitions}, counted from 0")
        return topic

    def _checked(self, spec: TopicSpec) -> StoredTopic:
        if not _NAME.fullmatch(spec.name) or spec.name in {".", ".."}:
            raise TopicError(
                f"topic name {spec.name[:300]!r}: use 1 to 249 letters, digits, dots, underscores and dashes "
                "(and not . or ..)"
            )
        partitions = self.default_partitions if spec.partitions is None else spec.partitions
        if not 1 <= partitions <= _MAX_PARTITIONS:
            raise TopicError(f"{spec.name}: partitions={partitions}; use 1 to {_MAX_PARTITIONS:,}")
        for name in _NUMBERS:
            _number(spec.name, spec.config, name)
        return StoredTopic(spec.name, partitions, dict(spec.config))

    # -- offsets and groups ----------------------------------------------------------------------------

    async def offsets(self, partitions: Collection[TopicPartition], at: Moment) -> dict[TopicPartition, int]:
        """Where that moment is in each partition."""
        return await self._reads.call(LogStore.offsets, list(partitions), at)

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, Committed | None]:
        """What the group committed, None where it never did."""
        return await self._reads.call(LogStore.committed, group, list(partitions))

    async def groups(self) -> list[str]:
        """Groups with a member or with offsets."""
        committed = await self._reads.call(LogStore.groups)
        return sorted({*committed, *served_groups(self.folder)})

    async def members(self, group: str) -> list[MemberInfo]:
        """The one member, if some process of this machine serves the group."""
        owner = owner_of(self.folder, group)
        if owner is None:
            return []
        topics = await self.topics()
        partitions = frozenset(
            TopicPartition(name, partition)
            for name in owner.topics
            if name in topics
            for partition in range(topics[name].partitions)
        )
        return [MemberInfo(str(owner.pid), "rowmill", platform.node(), partitions)]

    async def delete_groups(self, names: Collection[str]) -> None:
        """Forget groups.

        Raises:
            GroupBusyError: one of them has a member.
        """
        busy = served_groups(self.folder).intersection(names)
        if busy:
            raise GroupBusyError(f"cannot delete {', '.join(sorted(busy))}: a worker serves it; stop it first")
        await self._writes.call(LogStore.delete_groups, list(names))

    # -- readers and producers -------------------------------------------------------------------------

    def reader(self) -> LocalReader:
        """A reader without a group."""
        return LocalReader(self)

    def member(self, group: str, topics: Collection[str]) -> LocalMember:
        """The one member of a group."""
        return LocalMember(self, group, topics)

    def producer(self) -> LocalProducer:
        """A producer whose sends are written as they come."""
        return LocalProducer(self)

    def transactional_producer(
        self, transactional_id: str, *, timeout: float | None = None
    ) -> LocalTransactionalProducer:
        """A producer whose sends are written at ``end``: nothing of it is left open."""
        del timeout
        return LocalTransactionalProducer(self, transactional_id)

    # -- for this file's other classes -----------------------------------------------------------------

    def now_ms(self) -> int:
        """The clock's time."""
        return self._clock.now_ms()

    async def largest_message(self, tp: TopicPartition) -> int:
        """The largest record that this existing partition takes, in bytes."""
        topic = await self.topic(tp)
        return _number(topic.name, topic.config, "max.message.bytes") or self.max_message_bytes

    def attach(self, reader: LocalReader) -> None:
        """Tell this reader of writes, and end it with the broker."""
        self._open.add(reader)

    async def read(self, method: Callable[..., T], *args: Any) -> T:
        """Call the store on the reading connection."""
        return await self._reads.call(method, *args)

    async def write(self, method: Callable[..., T], *args: Any) -> T:
        """Call the store on the writing connection, and wake readers afterwards.

        Waiting ends with the caller; a call that has begun ends by itself.
        """
        try:
            outcome = await self._writes.call(method, *args)
        except TopicError:
            self._topics.clear()  # another process deleted one that we remember
            raise
        for reader in self._open:
            reader.wake()
        if self._clock.monotonic() - self._trimmed_at >= _TRIM_EVERY_S:
            self._trim_in_background()
        return outcome

    # -- keeping the file small ------------------------------------------------------------------------

    def _trim_in_background(self) -> None:
        """At the start, and now and then while somebody writes: nothing grows unless somebody does."""
        self._trimmed_at = self._clock.monotonic()
        if self._trimming is None or self._trimming.done():
            self._trimming = asyncio.get_running_loop().create_task(self._trim_quietly())

    async def _trim_quietly(self) -> None:
        try:
            await self.trim()
        except RowmillError as error:
            _log.warning("could not drop old records (tried again in a minute): %s", error)

    async def trim(self) -> None:
        """Drop records that are past their topic's retention (batches as a whole, the oldest first), and compact.

        Only partitions for which it is worth while are compacted; see the module.
        """
        await self._sweep()
        for topic in await self._reads.call(LogStore.topics):
            if "delete" not in _policy(topic):
                continue
            age, size = (self._limit(topic, name) for name in ("retention.ms", "retention.bytes"))
            if age is None and size is None:
                continue
            for log in await self._reads.call(LogStore.log_ids, topic.name):
                while await self._writes.call(LogStore.trim, Retention(log, age, size), self.now_ms()):
                    pass
        await self._compact(_COMPACT_BYTES)
        await self._writes.call(LogStore.shrink)

    async def compact(self) -> None:
        """Compact all topics that are to be compacted now, however little was added to them.

        A partition that another process compacts at this moment is left to it.
        """
        await self._compact(None)

    async def _compact(self, least_bytes: int | None) -> None:
        async with self._compacting:
            await self._compact_those_due(least_bytes)

    async def _compact_those_due(self, least_bytes: int | None) -> None:
        topics = [topic for topic in await self._reads.call(LogStore.topics) if "compact" in _policy(topic)]
        due = [
            (log, _number(topic.name, topic.config, "delete.retention.ms"))
            for topic in topics
            for log in await self._reads.call(LogStore.logs_to_compact, topic.name, least_bytes)
        ]
        if not due:
            return
        # On a thread of its own, so that nobody's fetch waits while records are sifted.
        sifting = _StoreThread(LogStore(self._options), "rowmill-local-compact")
        await sifting.start()
        try:
            for log, keep_ms in due:
                keep_ms = _DELETE_RETENTION_MS if keep_ms is None else keep_ms
                try:
                    await compact(log, sifting, self._writes, self.now_ms(), keep_ms)
                except OffsetOutOfRangeError as error:  # damaged: the others are worth compacting all the same
                    _log.warning("cannot compact: %s", error)
        finally:
            await sifting.stop()

    def _limit(self, topic: StoredTopic, name: str) -> int | None:
        own = _number(topic.name, topic.config, name)
        limit = self._retention[name] if own is None else own
        return None if limit is None or limit < 0 else limit  # -1 is Kafka's "for ever"

    async def _sweep(self) -> None:
        while await self._writes.call(LogStore.sweep):
            pass


class _StoreThread:
    """A connection and the thread it lives on."""

    def __init__(self, store: LogStore, name: str) -> None:
        self._store = store
        self._thread = JobThread(name)

    async def start(self) -> None:
        self._thread.start()
        try:
            await self.call(LogStore.open)
        except BaseException:
            await self.stop()
            raise

    async def call(self, method: Callable[..., T], *args: Any) -> T:
        return await self._thread.run(self._store.call, method, self._store, *args)

    async def stop(self) -> None:
        if not await self._thread.stop(self._store.close, _CLOSE_S):
            _log.warning("%s: a call hangs on the disk; the thread is left behind", self._thread.name)


def _policy(topic: StoredTopic) -> str:
    return topic.config.get("cleanup.policy", "delete")


def _number(topic: str, config: Mapping[str, str], name: str) -> int | None:
    text = config.get(name)
    try:
        return None if text is None else int(text)
    except ValueError:
        raise TopicError(f"{topic}: {name}={text!r}; use a whole number") from None
