"""Reading the embedded broker: with a group, and without one."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from ...state.model import Committed, Record, StoredRecord, TopicPartition
from ..errors import FencedError, TopicError
from .base import AssignmentListener, Member, Reader
from .local_batch import DamagedBatchError, decode
from .local_group import GroupLock
from .local_store import LogStore, Piece, ReadPlan, damaged

if TYPE_CHECKING:
    from .local import LocalBroker

_offset = attrgetter("offset")

_FIRST_POLL_S, _LAST_POLL_S = 0.005, 0.05


class LocalReader(Reader):
    """Reads partitions of the embedded broker. Only compaction makes gaps."""

    def __init__(self, broker: LocalBroker) -> None:
        self._broker = broker
        self._cursors: dict[TopicPartition, _Cursor] = {}
        self._woken = asyncio.Event()
        self._closed = False
        self._turn = 0

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        """Begin at these offsets."""
        logs = await self._broker.read(LogStore.logs, list(positions))
        self._cursors = {tp: _Cursor(tp, logs[tp], offset) for tp, offset in positions.items()}
        self._broker.attach(self)

    async def fetch(
        self, partitions: Collection[TopicPartition], max_records: int, timeout: float
    ) -> dict[TopicPartition, Sequence[Record]]:
        """Up to ``max_records`` records, shared fairly; at most about 16 MiB at a time."""
        # The loop's clock, not the broker's: what is waited for happens in other threads and processes.
        deadline = asyncio.get_running_loop().time() + timeout
        while not self._closed:
            self._woken.clear()
            cursors = self._in_turn(partitions)
            version = await self._read_ahead(cursors, max_records)
            taken = self._take(cursors, max_records)
            if taken:
                return taken
            if not await self._news(version, deadline):
                break
        return {}

    async def position(self, tp: TopicPartition) -> int:
        """The offset that the next fetch looks at first."""
        return self._cursor(tp).position

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Make ``offset`` the next one to be fetched."""
        self._cursor(tp).seek(offset)
        self.wake()

    async def close(self) -> None:
        """Stop; a fetch that waits returns {}."""
        self.abandon()

    def abandon(self) -> None:
        """Stop at once."""
        self._closed = True
        self.wake()

    def wake(self) -> None:
        """Something was written, or a position moved: a waiting fetch looks again."""
        self._woken.set()

    def _cursor(self, tp: TopicPartition) -> _Cursor:
        cursor = self._cursors.get(tp)
        if cursor is None:
            raise TopicError(f"{tp}: not read by this reader; name it in start(), or begin() it")
        return cursor

    def _in_turn(self, partitions: Collection[TopicPartition]) -> list[_Cursor]:
        """Who is read, a different one first each time, for what cannot be shared evenly."""
        cursors = [cursor for tp in partitions if (cursor := self._cursors.get(tp)) is not None]
        self._turn += 1
        cut = self._turn % (len(cursors) or 1)
        return cursors[cut:] + cursors[:cut]

    async def _read_ahead(self, cursors: Sequence[_Cursor], max_records: int) -> int | None:
        """Read for those that have less than their share left over from earlier batches, so that nobody waits
        for another's leftovers. Gives the data version as of that, None if there was no need.
        """
        share = -(-max_records // (len(cursors) or 1))
        poor = [cursor for cursor in cursors if len(cursor.ahead) < share]
        if not poor:
            return None
        room = sum(share - len(cursor.ahead) for cursor in poor)
        plans = {cursor.tp: cursor.plan() for cursor in poor}
        version, pieces = await self._broker.read(LogStore.read, list(plans.values()), room)
        for piece in pieces:
            cursor = self._cursors.get(piece.tp)
            if cursor is not None and cursor.plan() == plans[piece.tp]:  # nobody sought meanwhile
                cursor.extend(piece)
        return version

    def _take(self, cursors: Sequence[_Cursor], max_records: int) -> dict[TopicPartition, Sequence[Record]]:
        taken: dict[TopicPartition, Sequence[Record]] = {}
        # One that was begun anew while this fetch waited has another cursor now.
        ready = [cursor for cursor in cursors if cursor.ahead and self._cursors.get(cursor.tp) is cursor][:max_records]
        # The poorest first: what they leave of their share goes to the others.
        for index, cursor in enumerate(sorted(ready, key=lambda cursor: len(cursor.ahead))):
            taken[cursor.tp] = cursor.take(max_records // (len(ready) - index))
            max_records -= len(taken[cursor.tp])
        for cursor in cursors:
            if cursor.has_skipped() and self._cursors.get(cursor.tp) is cursor:
                taken.setdefault(cursor.tp, [])
        return taken

    async def _news(self, version: int | None, deadline: float) -> bool:
        """Wait until a look is worth while; False when the deadline came first.

        Writers on this broker object wake us; what others commit shows in SQLite's data version, which is asked
        for every 5 ms at first and every 50 ms later.
        """
        loop = asyncio.get_running_loop()
        pause = _FIRST_POLL_S
        while (left := deadline - loop.time()) > 0:
            try:
                async with asyncio.timeout(min(pause, left)):
                    await self._woken.wait()
            except TimeoutError:
                if version is not None and await self._broker.read(LogStore.data_version) != version:
                    return True
                pause = min(pause * 1.5, _LAST_POLL_S)
            else:
                return True
        return False


class _Cursor:
    """Where a reader is in one partition, and the records it has decoded beyond that, all those below ``reach``."""

    __slots__ = ("ahead", "log", "position", "reach", "skipped", "tp")

    def __init__(self, tp: TopicPartition, log: int, position: int) -> None:
        self.tp = tp
        self.log = log
        self.seek(position)

    def plan(self) -> ReadPlan:
        return ReadPlan(self.tp, self.log, self.reach)

    def seek(self, offset: int) -> None:
        self.position = self.reach = offset
        self.ahead: list[StoredRecord] = []
        self.skipped = False

    def extend(self, piece: Piece) -> None:
        try:
            records = decode(piece.data, *self.tp, piece.base)
        except DamagedBatchError as error:
            raise damaged(self.tp, piece.base, error) from error
        skip = bisect_left(records, self.reach, key=_offset) if self.reach > piece.base else 0
        self.ahead += records[skip:] if skip else records
        self.reach = piece.end
        if not self.ahead:
            self.position = piece.end
            self.skipped = True

    def take(self, most: int) -> list[StoredRecord]:
        taken, self.ahead = self.ahead[:most], self.ahead[most:]
        self.position = self.ahead[0].offset if self.ahead else self.reach
        return taken

    def has_skipped(self) -> bool:
        """Whether the position moved over a gap without any record, since this was asked last."""
        skipped, self.skipped = self.skipped, False
        return skipped


class LocalMember(LocalReader, Member):
    """The one member of a group: it owns all partitions of its topics from ``join`` to ``leave``."""

    def __init__(self, broker: LocalBroker, group: str, topics: Collection[str]) -> None:
        super().__init__(broker)
        self._group = group
        self._topics = list(topics)
        self._lock = GroupLock(broker.folder, group, topics)
        self._listener: AssignmentListener | None = None
        self._owned: dict[TopicPartition, int] = {}

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        """Begin those of these that are owned."""
        for tp, offset in positions.items():
            self.begin(tp, offset)

    async def join(self, listener: AssignmentListener) -> None:
        """Take the group's lock, and all partitions."""
        self._lock.acquire()
        try:
            partitions = [
                TopicPartition(name, partition)
                for name in self._topics
                for partition in range((await self._broker.topic(TopicPartition(name, 0))).partitions)
            ]
            self._owned = await self._broker.read(LogStore.logs, partitions)
        except BaseException:
            self._lock.release()
            raise
        self._listener = listener
        self._broker.attach(self)
        listener.assigned(frozenset(self._owned), False)

    def begin(self, tp: TopicPartition, offset: int) -> None:
        """Start fetching an owned partition."""
        if tp in self._owned:
            self._cursors[tp] = _Cursor(tp, self._owned[tp], offset)
            self.wake()

    async def commit(self, offsets: Mapping[TopicPartition, Committed]) -> None:
        """Commit offsets by themselves."""
        if not offsets.keys() <= self._owned.keys():
            raise FencedError(f"group {self._group}: {sorted(offsets)} are not this member's any more")
        await self._broker.write(LogStore.commit_offsets, self._group, offsets, self._broker.now_ms())

    async def leave(self) -> None:
        """Let the listener commit, then free the group."""
        listener, self._listener = self._listener, None
        try:
            if listener is not None:
                await listener.revoked(frozenset(self._owned))
        finally:
            self._let_go()

    async def close(self) -> None:
        """Leave, and stop."""
        try:
            await self.leave()
        finally:
            await super().close()

    def abandon(self) -> None:
        """Stop without a word to the listener: the broker itself is closed."""
        self._let_go()
        super().abandon()

    def _let_go(self) -> None:
        self._listener = None
        self._owned = {}
        self._cursors = {}
        self._lock.release()
