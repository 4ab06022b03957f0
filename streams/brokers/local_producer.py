"""Writing to the embedded broker: as records come, and in transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING

from ...state.model import Committed, Outgoing, TopicPartition
from ..errors import BrokerError, TopicError
from .base import Producer, TransactionalProducer
from .local_batch import Columns
from .local_store import LogStore, Write

if TYPE_CHECKING:
    from .local import LocalBroker

_UNSENT_BYTES = 32 << 20


class LocalProducer(Producer):
    """Writes what it is given while it waits for nothing else: sends that meet share a SQLite transaction."""

    def __init__(self, broker: LocalBroker) -> None:
        self._broker = broker
        self._unsent = _Outbox()
        self._written: asyncio.Future[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._closed = False

    async def start(self) -> None:
        """Nothing to connect to."""

    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        """Hand over records; waits while more than 32 MiB wait to be written."""
        columns = await _measured(self._broker, tp, records)
        while self._unsent.size > _UNSENT_BYTES and not self._closed:
            self._room.clear()
            await self._room.wait()
        if self._closed:
            raise _closed_producer()
        self._unsent.add(tp, columns)
        loop = asyncio.get_running_loop()
        if self._written is None:
            self._written = loop.create_future()
        if self._writer is None or self._writer.done():
            self._writer = loop.create_task(self._write())
        return asyncio.shield(self._written)  # it is shared: one caller's cancellation is its own affair

    async def close(self) -> None:
        """Give up what is not written."""
        self._closed = True
        self._room.set()
        if self._writer is not None:
            self._writer.cancel()
        if self._written is not None and not self._written.done():
            self._written.set_exception(_closed_producer())

    async def _write(self) -> None:
        while self._written is not None:
            written, self._written = self._written, None
            writes = self._unsent.drain()
            self._room.set()
            try:
                await self._broker.write(LogStore.append, writes)
            except asyncio.CancelledError:
                _fail(written, _closed_producer())
                raise
            except Exception as error:  # noqa: BLE001 - raised where the sends are awaited
                _fail(written, error)
            else:
                written.set_result(None)


class LocalTransactionalProducer(TransactionalProducer):
    """Collects a transaction in memory and writes it at ``end``, as one of SQLite's."""

    def __init__(self, broker: LocalBroker, transactional_id: str) -> None:
        self._broker = broker
        self._id = transactional_id
        self._epoch: int | None = None
        self._outbox: _Outbox | None = None
        self._offsets: dict[str, dict[TopicPartition, Committed]] = {}

    async def start(self) -> None:
        """Fence the former owner. It can have left nothing open: its transactions live in its memory."""
        self._epoch = await self._broker.write(LogStore.next_epoch, self._id)

    async def begin(self) -> None:
        """Open a transaction."""
        if self._epoch is None or self._outbox is not None:
            raise BrokerError(f"producer {self._id!r}: begin() needs a started producer with no open transaction")
        self._outbox = _Outbox()
        self._offsets = {}

    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        """Put records into the transaction. The awaitable has ended already."""
        outbox = self._open()
        outbox.add(tp, await _measured(self._broker, tp, records))
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def commit_offsets(self, group: str, offsets: Mapping[TopicPartition, Committed]) -> None:
        """Put a group's offsets into the transaction; a later one for the same partition wins."""
        self._open()
        self._offsets.setdefault(group, {}).update(offsets)

    async def end(self) -> dict[TopicPartition, int]:
        """Write all of it, or nothing."""
        outbox, self._outbox = self._open(), None
        epoch, self._epoch = self._epoch, None  # spent, should anything go wrong
        ends = await self._broker.write(
            LogStore.commit, self._id, epoch, outbox.drain(), self._offsets, self._broker.now_ms()
        )
        self._epoch = epoch
        return ends

    async def abort(self) -> None:
        """Forget the transaction, if there is one."""
        self._outbox = None

    async def close(self) -> None:
        """Forget everything."""
        self._outbox = self._epoch = None

    def _open(self) -> _Outbox:
        if self._outbox is None:
            raise BrokerError(f"producer {self._id!r}: no transaction is open; begin() one")
        return self._outbox


class _Outbox:
    """Records on their way into one SQLite transaction, by partition."""

    def __init__(self) -> None:
        self.size = 0
        self._columns: dict[TopicPartition, Columns] = {}

    def add(self, tp: TopicPartition, columns: Columns) -> None:
        self.size += sum(columns.sizes)
        waiting = self._columns.get(tp)
        if waiting is None:
            self._columns[tp] = columns
        else:
            waiting.extend(columns)

    def drain(self) -> list[Write]:
        """All of it, encoded."""
        self.size = 0
        columns, self._columns = self._columns, {}
        return [Write(tp, waiting.batches()) for tp, waiting in columns.items() if waiting]


async def _measured(broker: LocalBroker, tp: TopicPartition, records: Sequence[Outgoing]) -> Columns:
    """The records taken apart, after a look at their sizes."""
    limit = await broker.largest_message(tp)
    columns = Columns(records)
    largest = max(columns.sizes, default=0)
    if largest > limit:
        raise TopicError(
            f"{tp}: a record has {largest:,} bytes, above the topic's max.message.bytes={limit:,}; send less, or "
            "make the topic with a larger max.message.bytes"
        )
    return columns


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _closed_producer() -> BrokerError:
    return BrokerError("the producer was closed before this was written")
