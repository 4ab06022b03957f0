"""The ledger of a session's budget on a topic: one partition, never compacted, kept for ever, folded by every reader.

A worker appends what it asks for and reads it back before it spends anything: the log's order decides, and every
reader decides alike (``LedgerState``). An answer that was lost is asked for again with the same entry, which counts
once. Lower or raise the limit between runs as you like: each entry carries the limit that its worker knows, and that
one decides about its lease; so the total stays within the highest limit of all workers that run.

To start a budget anew, stop the session's workers and delete the topic.

Size: a session writes some fifty leases until nine tenths of its limit are spent, and a few dozen from there, however
many rows it has; each is about 300 bytes. Every 1,000 entries a snapshot of the fold joins them, so that starting
reads 2,000 records or fewer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..handlers.budget import Entry, Holder, LedgerState, Standing
from ..handlers.errors import LedgerError
from ..state.clock import Clock
from ..state.codec import dumps, loads
from ..state.context import checked_cost
from ..state.errors import ConfigError, RowmillError
from ..state.model import Outgoing, Record, TopicPartition
from .brokers.base import Broker, Producer, Reader, TopicSpec
from .deadlines import deadline, to_the_end
from .errors import BrokerTimeoutError, OffsetOutOfRangeError

log = logging.getLogger(__name__)

LEDGER_CONFIG = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
"""How the topic is made: nothing in it may ever be removed, or spent money would be spent again."""

SNAPSHOT_EVERY = 1_000
"""Entries between two snapshots."""

_VERSION = 1
_FETCH_RECORDS = 1_000
_FETCH_SECONDS = 0.5
_MONEY = ("take", "least", "give", "charge", "spent", "tell")


@dataclass(frozen=True, slots=True)
class WorkerLease:
    """What one worker holds.

    Attributes:
        worker: its name; every start has a new one.
        leased: granted to it and not returned, spent or not.
        spent: of that, what it had spent when it last wrote.
        open: the rest: on the way, idle, or lost with a worker that died.
        is_closed: whether it ended in order.
    """

    worker: str
    leased: Decimal
    spent: Decimal
    open: Decimal
    is_closed: bool


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """What a session's ledger says. All amounts are 0 where no ledger is.

    Attributes:
        limit: the limit of whoever wrote last.
        granted: all leases together.
        returned: of these, what came back.
        charged: spent beyond leases, by calls that cost more than their price.
        used: granted + charged - returned: spent, or leased to somebody who may spend it.
        workers: those that wrote last, at most 256, the newest at the end.
    """

    limit: Decimal
    granted: Decimal
    returned: Decimal
    charged: Decimal
    used: Decimal
    workers: tuple[WorkerLease, ...]


class TopicLedger:
    """A ledger that the workers of a session share through a topic. Fits :class:`~rowmill.handlers.budget.Ledger`.

    Belongs to one event loop. Nothing happens before it is first asked. Whatever fails raises LedgerError, and the
    next call begins where this one stopped.

    Args:
        broker: a started one.
        topic: ``<group>.budget``; partition 0 is used.
        clock: for timestamps.
        timeout: seconds that each call to the broker may take, and reading back what was written.
        create: whether the topic may be made.
    """

    def __init__(self, broker: Broker, topic: str, *, clock: Clock, timeout: float = 10.0, create: bool = True) -> None:
        self._broker = broker
        self._tp = TopicPartition(topic, 0)
        self._clock = clock
        self._timeout = timeout
        self._create = create
        self._state: LedgerState | None = None
        self._position = 0
        self._since_snapshot = 0
        self._reader: Reader | None = None
        self._producer: Producer | None = None
        self._reading = asyncio.Lock()

    async def post(self, entry: Entry) -> Standing:
        """Append an entry and read up to it.

        Raises:
            LedgerError: whether it was written is unknown; post the same one again.
        """
        with _failing(self._tp):
            state = await self._catch_up()
            if not state.has(entry):
                await self._append(encode_entry(entry))
                state = await self._read_back(entry)
            await self._snapshot(state)
        return state.standing(entry.worker)

    async def look(self, worker: str) -> Standing:
        """Read to the end.

        Raises:
            LedgerError: the broker does not answer, or the topic cannot be read.
        """
        with _failing(self._tp):
            return (await self._catch_up()).standing(worker)

    async def news(self, worker: str, version: int) -> Standing:
        """Read on until there is another version.

        Raises:
            LedgerError: the broker does not answer, or the topic cannot be read.
        """
        with _failing(self._tp):
            while (state := await self._loaded()).entries == version:
                await self._advance()
        return state.standing(worker)

    async def report(self) -> LedgerReport:
        """What the ledger says now.

        Raises:
            LedgerError: the broker does not answer, or the topic cannot be read.
        """
        with _failing(self._tp):
            return _report(await self._catch_up())

    async def close(self) -> None:
        """Let go of reader and producer. Everything that was posted is in the log."""
        await self._drop_reader()
        await self._drop_producer()

    # -- reading ---------------------------------------------------------------------------------------

    async def _catch_up(self) -> LedgerState:
        """Take in all that is in the log now."""
        await self._loaded()
        end = await self._offset("end")
        async with deadline(self._timeout, f"{self._tp}: read to its end"):
            while self._position < end:
                await self._advance()
        return await self._loaded()

    async def _read_back(self, entry: Entry) -> LedgerState:
        async with deadline(self._timeout, f"{self._tp}: read back what was written"):
            while not (state := await self._loaded()).has(entry):
                await self._advance()
        return state

    async def _loaded(self) -> LedgerState:
        async with self._reading:
            return await self._state_now()

    async def _advance(self) -> None:
        """Take in what comes next, waiting for it a moment. One at a time: what it reads serves everybody."""
        async with self._reading:
            state = await self._state_now()
            try:
                if self._reader is None:
                    self._reader = await self._open_reader(self._position)
                async with deadline(self._timeout, f"{self._tp}: read"):
                    found = await self._reader.fetch([self._tp], _FETCH_RECORDS, _FETCH_SECONDS)
                    position = await self._reader.position(self._tp)
                for record in found.get(self._tp, ()):
                    self._fold(state, record)
                    self._position = record.offset + 1
                self._position = position
            except BaseException as error:
                # What a broken-off call did to the reader is unknown; another one begins where the fold is.
                if isinstance(error, OffsetOutOfRangeError):
                    self._state = None
                await self._drop_reader()
                raise

    async def _state_now(self) -> LedgerState:
        """The fold as far as it was read; for the first time from the newest snapshot on. Under the lock."""
        if self._state is None:
            self._state, self._position = await self._load()
        return self._state

    def _fold(self, state: LedgerState, record: Record) -> None:
        content = _content(self._tp, record)
        if isinstance(content, Entry):
            state.apply(content)
            self._since_snapshot += 1
        elif content is not None:
            self._since_snapshot = 0

    async def _load(self) -> tuple[LedgerState, int]:
        """The newest snapshot and the position behind what it holds; from the beginning where there is none."""
        await self._require_topic()
        start, end = await self._offset("earliest"), await self._offset("end")
        step, until = 2 * SNAPSHOT_EVERY, end
        while until > start:
            begin = max(start, until - step)
            found = await self._newest_snapshot(begin, until)
            if found is not None and found.position >= start:
                return found.state, found.position
            step, until = step * 8, begin
        if start > 0:
            raise LedgerError(
                f"{self._tp}: the ledger's first {start:,} records are gone, and with them what was spent; give the "
                "topic unlimited retention, and to begin a new budget stop the workers and delete it"
            )
        return LedgerState(), start

    async def _newest_snapshot(self, begin: int, until: int) -> _Snapshot | None:
        found: _Snapshot | None = None
        reader, position = await self._open_reader(begin), begin
        try:
            while position < until:
                async with deadline(self._timeout, f"{self._tp}: read from offset {position:,}"):
                    before = position
                    while position == before:
                        records = (await reader.fetch([self._tp], _FETCH_RECORDS, _FETCH_SECONDS)).get(self._tp, ())
                        position = await reader.position(self._tp)
                contents = (_content(self._tp, record) for record in records if record.offset < until)
                found = next((each for each in reversed([*contents]) if isinstance(each, _Snapshot)), found)
        finally:
            await to_the_end(reader.close())
        return found

    async def _open_reader(self, position: int) -> Reader:
        reader = self._broker.reader()
        try:
            async with deadline(self._timeout, f"{self._tp}: start reading"):
                await reader.start({self._tp: position})
        except BaseException:
            await to_the_end(reader.close())
            raise
        return reader

    async def _offset(self, at: Any) -> int:
        async with deadline(self._timeout, f"{self._tp}: look up its ends"):
            return (await self._broker.offsets([self._tp], at))[self._tp]

    async def _require_topic(self) -> None:
        async with deadline(self._timeout, f"look up topic {self._tp.topic}"):
            if self._tp.topic in await self._broker.topics():
                return
            if not self._create:
                raise LedgerError(
                    f"topic {self._tp.topic!r} does not exist on {self._broker.url} and creation is off; make it with "
                    f"one partition and {LEDGER_CONFIG}, or allow rowmill to (drop --no-create-topics)"
                )
            await self._broker.create_topics([TopicSpec(self._tp.topic, 1, LEDGER_CONFIG)])

    async def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await to_the_end(reader.close())

    # -- writing ---------------------------------------------------------------------------------------

    async def _append(self, value: bytes) -> None:
        try:
            async with deadline(self._timeout, f"{self._tp}: write"):
                if self._producer is None:
                    self._producer = self._broker.producer()
                    await self._producer.start()
                await (await self._producer.send(self._tp, [Outgoing(None, value, self._clock.now_ms())]))
        except BaseException:
            await self._drop_producer()
            raise

    async def _snapshot(self, state: LedgerState) -> None:
        """Append what was folded so far, when it is time. A help for those who start: nothing depends on it."""
        if self._since_snapshot < SNAPSHOT_EVERY:
            return
        self._since_snapshot = 0
        try:
            await self._append(encode_snapshot(state, self._position))
        except RowmillError as error:
            log.info("%s: no snapshot this time: %s", self._tp, error)

    async def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await to_the_end(producer.close())


async def read_ledger(broker: Broker, topic: str, *, clock: Clock, timeout: float = 10.0) -> LedgerReport:
    """What a session has spent by its ledger, for status. Writes nothing.

    Args:
        broker: a started one.
        topic: ``<group>.budget``; where it does not exist, all amounts are 0.
        clock: as TopicLedger takes it.
        timeout: seconds that each call to the broker may take.

    Raises:
        LedgerError: the broker does not answer, or the topic cannot be read.
    """
    tp = TopicPartition(topic, 0)
    with _failing(tp):
        async with deadline(timeout, f"look up topic {topic}"):
            if topic not in await broker.topics():
                return _report(LedgerState())
        async with _opened(TopicLedger(broker, topic, clock=clock, timeout=timeout, create=False)) as ledger:
            return await ledger.report()


@asynccontextmanager
async def _opened(ledger: TopicLedger) -> AsyncIterator[TopicLedger]:
    try:
        yield ledger
    finally:
        await ledger.close()


@contextmanager
def _failing(tp: TopicPartition) -> Iterator[None]:
    try:
        yield
    except LedgerError:
        raise
    except (RowmillError, OSError) as error:
        raise LedgerError(str(error) if isinstance(error, BrokerTimeoutError) else f"{tp}: {error}") from error


def _report(state: LedgerState) -> LedgerReport:
    return LedgerReport(
        limit=state.limit,
        granted=state.granted,
        returned=state.returned,
        charged=state.charged,
        used=state.used,
        workers=tuple(
            WorkerLease(name, each.leased, each.spent, each.open, each.closed) for name, each in state.workers.items()
        ),
    )


# --- records ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Snapshot:
    state: LedgerState
    position: int


class _UnreadableError(Exception):
    """It is no record of a ledger."""


def encode_entry(entry: Entry) -> bytes:
    """An entry as a record's value. Amounts are text, and those that are 0 are left out."""
    money = {name: str(getattr(entry, name)) for name in _MONEY if getattr(entry, name)}
    closes = {"closes": True} if entry.closes else {}
    who = {"worker": entry.worker, "sequence": entry.sequence, "limit": str(entry.limit)}
    return dumps({"v": _VERSION, "type": "entry", **who, **money, **closes})


def encode_snapshot(state: LedgerState, position: int) -> bytes:
    """A fold as a record's value, and the offset behind the last record that it holds."""
    workers = [
        [
            name,
            each.sequence,
            str(each.leased),
            str(each.spent),
            str(each.granted),
            str(each.told),
            str(each.waits),
            each.closed,
        ]
        for name, each in state.workers.items()
    ]
    return dumps(
        {
            "v": _VERSION,
            "type": "snapshot",
            "position": position,
            "entries": state.entries,
            "granted": str(state.granted),
            "returned": str(state.returned),
            "charged": str(state.charged),
            "limit": str(state.limit),
            "told": [[str(limit), str(fraction)] for limit, fraction in state.told.items()],
            "workers": workers,
        }
    )


def _content(tp: TopicPartition, record: Record) -> Entry | _Snapshot | None:
    """What a record says; None for one that no ledger wrote, which every reader leaves out alike.

    Raises:
        LedgerError: a newer rowmill wrote it.
    """
    try:
        content = loads(record.value or b"")
        if not isinstance(content, dict) or type(content.get("v")) is not int:
            raise _UnreadableError  # noqa: TRY301 - one way out for all that is unreadable
        if content["v"] > _VERSION:
            raise LedgerError(
                f"{tp}: offset {record.offset:,} was written by a newer rowmill; update "
                "this worker: it could count the money wrongly"
            )
        return _decode(content)
    except (_UnreadableError, ConfigError, ValueError, TypeError, KeyError, AttributeError):
        log.warning("%s: offset %d is no record of a ledger; left out", tp, record.offset)
        return None


def _decode(content: dict[str, Any]) -> Entry | _Snapshot:
    if content.get("type") == "entry":
        return Entry(
            worker=_text(content["worker"]),
            sequence=_count(content["sequence"]),
            limit=_money(content["limit"]),
            **{name: _money(content[name]) for name in _MONEY if name in content},
            closes=content.get("closes") is True,
        )
    if content.get("type") == "snapshot":
        state = LedgerState(
            entries=_count(content["entries"]),
            granted=_money(content["granted"]),
            returned=_money(content["returned"]),
            charged=_money(content["charged"]),
            limit=_money(content["limit"]),
            told={_money(limit): _money(fraction) for limit, fraction in content["told"]},
            workers={_text(name): _holder(*rest) for name, *rest in content["workers"]},
        )
        return _Snapshot(state, _count(content["position"]))
    raise _UnreadableError


def _holder(*fields: Any) -> Holder:
    sequence, *amounts, closed = fields
    leased, spent, granted, told, waits = map(_money, amounts)
    return Holder(_count(sequence), leased, spent, granted, told, waits, closed is True)


def _money(value: Any) -> Decimal:
    return checked_cost(_text(value), "amount")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _UnreadableError
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _UnreadableError
    return value
