"""Wrappers around the ports of brokers and stores that kill or stop their own process at a named point."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.state.store import Change, Store, Stores
from rowmill.streams.brokers.base import Broker, TransactionalProducer

from .calls import CallLog

POINTS = ("after-sends", "after-offsets", "before-end", "amid-end", "after-end")
"""Of a transaction: all sends acknowledged; offsets sent; about to end; somewhere while it ends; ended."""
STORE_POINTS = ("before-store", "after-store")
"""Of the local store's write, which follows the transaction."""


class Failpoints:
    """Kills (or stops) this process at the n-th passage of one point; ``spec`` is ``point/n/kill|stop`` or empty."""

    def __init__(self, spec: str, log: CallLog) -> None:
        self.log = log
        self._point, passages, self._action = (spec or "none/0/kill").split("/")
        self._left = int(passages)

    def pass_by(self, point: str) -> None:
        """Note a passage; does not return from the fatal one."""
        if self.is_due(point):
            self.strike()

    def is_due(self, point: str) -> bool:
        """Count a passage; True at the fatal one."""
        if point != self._point:
            return False
        self._left -= 1
        return self._left == 0

    def strike(self) -> None:
        """SIGKILL or SIGSTOP to ourselves: every thread ends or halts here."""
        kills = self._action == "kill"
        self.log.write("K" if kills else "Z", rest=self._point)
        os.kill(os.getpid(), signal.SIGKILL if kills else signal.SIGSTOP)


class FailingProducer(TransactionalProducer):
    """Passes everything on; logs openings and commits, and knows the points of a transaction."""

    def __init__(self, inner: TransactionalProducer, transactional_id: str, points: Failpoints) -> None:
        self._inner = inner
        self._partition = int(transactional_id.rpartition("/")[2])
        self._points = points
        self._checkpoint: Committed | None = None

    async def start(self) -> None:
        """Fence the former owner."""
        await self._inner.start()
        self._points.log.write("O", self._partition)

    async def begin(self) -> None:
        """Open a transaction."""
        self._checkpoint = None
        await self._inner.begin()

    async def send(self, tp: TopicPartition, records: Sequence[Outgoing]) -> Awaitable[None]:
        """Hand records over."""
        return await self._inner.send(tp, records)

    async def commit_offsets(self, group: str, offsets: Mapping[TopicPartition, Committed]) -> None:
        """Offsets into the transaction: whoever calls this has seen all sends acknowledged."""
        self._points.pass_by("after-sends")
        await self._inner.commit_offsets(group, offsets)
        self._checkpoint = next(iter(offsets.values()))
        self._points.pass_by("after-offsets")

    async def end(self) -> dict[TopicPartition, int]:
        """Commit."""
        self._points.pass_by("before-end")
        if self._points.is_due("amid-end"):
            asyncio.get_running_loop().call_later(random.uniform(0, 0.004), self._points.strike)
        ends = await self._inner.end()
        if self._checkpoint is not None:
            self._points.log.write("C", self._partition, *self._checkpoint[:1], rest=self._checkpoint.metadata)
        self._points.pass_by("after-end")
        return ends

    async def abort(self) -> None:
        """Abort."""
        await self._inner.abort()

    async def close(self) -> None:
        """Stop."""
        await self._inner.close()


class FailingBroker:
    """A broker whose transactional producers pass failpoints; all else is the inner one's."""

    def __init__(self, inner: Broker, points: Failpoints) -> None:
        self._inner = inner
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def transactional_producer(self, transactional_id: str, *, timeout: float | None = None) -> TransactionalProducer:
        """A producer that passes failpoints."""
        inner = self._inner.transactional_producer(transactional_id, timeout=timeout)
        if "/" not in transactional_id:  # of the control topic: it writes no rows
            return inner
        return FailingProducer(inner, transactional_id, self._points)


def failing_broker(inner: Broker, points: Failpoints) -> Broker:
    """The wrapped broker, typed as what it stands for."""
    return cast(Broker, FailingBroker(inner, points))


class FailingStore(Store):
    """Passes everything on, with a point before and after each write."""

    def __init__(self, inner: Store, points: Failpoints) -> None:
        self._inner = inner
        self._points = points

    def get(self, key: bytes) -> bytes | None:
        """One value."""
        return self._inner.get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Entries in order."""
        return self._inner.scan(prefix)

    def write(self, changes: Iterable[Change]) -> None:
        """Write, between two points."""
        self._points.pass_by("before-store")
        self._inner.write(changes)
        self._points.pass_by("after-store")

    def close(self) -> None:
        """Let go."""
        self._inner.close()


class FailingStores(Stores):
    """Stores whose writes pass failpoints."""

    def __init__(self, inner: Stores, points: Failpoints) -> None:
        self._inner = inner
        self._points = points

    def open(self, group: str, tp: TopicPartition) -> Store:
        """One partition's store."""
        return FailingStore(self._inner.open(group, tp), self._points)

    def set_aside(self, group: str, tp: TopicPartition) -> str:
        """Move a bad one away."""
        return self._inner.set_aside(group, tp)

    def remove(self, group: str, tp: TopicPartition) -> None:
        """Delete one."""
        self._inner.remove(group, tp)

    def close(self) -> None:
        """Let others have the place."""
        self._inner.close()
