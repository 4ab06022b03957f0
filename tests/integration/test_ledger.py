"""A budget's ledger on real brokers: several workers, kills, restarts, and what a start reads."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest
from rowmill import open_broker
from rowmill.handlers.budget import Account, Budget, Entry
from rowmill.state.clock import SystemClock
from rowmill.state.model import TopicPartition
from rowmill.streams.brokers.base import Broker
from rowmill.streams.ledger import TopicLedger, read_ledger

ONE = Decimal(1)

pytestmark = pytest.mark.timeout(180)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    """A started broker."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


class Worker:
    """A worker's account, on a ledger and a broker connection of its own, and its callers."""

    def __init__(self, broker: Broker, topic: str, limit: int, callers: int, server: list[str], seed: int) -> None:
        clock = SystemClock()
        self.ledger = TopicLedger(broker, topic, clock=clock)
        self.account = Account(Budget(limit), self.ledger, clock=clock, idle=0.5)
        self.events: list[str] = []
        self._chance = random.Random(seed)
        self._server = server
        self._count = callers
        self._callers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to make calls."""
        await self.account.start()
        self._callers = [asyncio.create_task(self._call()) for _ in range(self._count)]

    async def _call(self) -> None:
        while True:
            reservation = await self.account.reserve(ONE)
            self._server.append(self.account.worker)
            await asyncio.sleep(self._chance.random() / 200)
            self.account.settle(reservation, ONE)

    async def kill(self) -> None:
        """Stop without a word to the ledger."""
        tasks = [*self._callers, self.account._task, self.account._watch, self.account._idle_timer]
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        await self.ledger.close()

    async def stop(self) -> None:
        """End in order; calls are over."""
        for task in self._callers:
            task.cancel()
        await asyncio.gather(*self._callers, return_exceptions=True)
        await self.account.close()
        await self.ledger.close()


async def until_spent(workers: list[Worker]) -> None:
    """Until every worker waits in vain."""
    async with asyncio.timeout(60):
        while not all(worker.account.is_exhausted for worker in workers):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)


@asynccontextmanager
async def connected(url: str, count: int) -> AsyncIterator[list[Broker]]:
    """As many connections as workers."""
    brokers = [open_broker(url, environment={}) for _ in range(count)]
    try:
        for broker in brokers:
            await broker.start()
        yield brokers
    finally:
        for broker in brokers:
            await broker.close()


async def test_three_workers_spend_exactly_the_limit(broker_url: str, name: str) -> None:
    """200 calls in flight over three workers: as many reach the server as the limit pays for, not one more or less."""
    topic, server = f"rowmill.{name}.budget", list[str]()
    async with connected(broker_url, 3) as brokers:
        workers = [Worker(broker, topic, 500, 67, server, seed) for seed, broker in enumerate(brokers)]
        await asyncio.gather(*(worker.start() for worker in workers))
        await until_spent(workers)
        assert len(server) == 500
        assert len(set(server)) == 3
        await asyncio.gather(*(worker.stop() for worker in workers))
        report = await read_ledger(brokers[0], topic, clock=SystemClock())
        limit = Decimal(500)
        assert (report.used, report.limit, report.returned) == (limit, limit, report.granted - limit)
        assert all(worker.is_closed and not worker.open for worker in report.workers)


async def test_kills_and_restarts(broker_url: str, name: str) -> None:
    """Workers die in the middle of calls and start again: never more calls than the limit, and a report of the rest."""
    topic, server = f"rowmill.{name}.budget", list[str]()
    async with connected(broker_url, 2) as brokers:
        for round_ in range(3):
            workers = [Worker(broker, topic, 300, 20, server, round_ * 10 + n) for n, broker in enumerate(brokers)]
            await asyncio.gather(*(worker.start() for worker in workers))
            async with asyncio.timeout(30):
                while len(server) < 40 * (round_ + 1):
                    await asyncio.sleep(0.005)
            await asyncio.gather(*(worker.kill() for worker in workers))
        workers = [Worker(broker, topic, 300, 20, server, 99) for broker in brokers]
        await asyncio.gather(*(worker.start() for worker in workers))
        await until_spent(workers)
        await asyncio.gather(*(worker.stop() for worker in workers))
        report = await read_ledger(brokers[0], topic, clock=SystemClock())
        assert len(server) <= report.used == 300
        dead = [worker for worker in report.workers if not worker.is_closed]
        assert len(dead) <= 6
        assert len(server) >= 300 - sum(worker.leased for worker in dead)


async def test_a_raised_limit_goes_on(broker_url: str, name: str) -> None:
    """A session whose money was out goes on with a higher limit, and spends the difference."""
    topic, server = f"rowmill.{name}.budget", list[str]()
    async with opened(broker_url) as broker:
        for limit in (50, 80):
            worker = Worker(broker, topic, limit, 10, server, limit)
            await worker.start()
            await until_spent([worker])
            await worker.stop()
            assert len(server) == limit


async def test_starting_from_a_snapshot(broker_url: str, name: str) -> None:
    """After thousands of entries a start reads from the newest snapshot, and comes to the same sums."""
    topic = f"rowmill.{name}.budget"
    async with opened(broker_url) as broker:
        ledger = TopicLedger(broker, topic, clock=SystemClock())
        for number in range(1, 1101):
            await ledger.post(Entry("a", number, Decimal(10_000), take=ONE))
        await ledger.close()
        end = (await broker.offsets([TopicPartition(topic, 0)], "end"))[TopicPartition(topic, 0)]
        assert end >= 1101, "1,100 entries and a snapshot"
        fresh = TopicLedger(broker, topic, clock=SystemClock())
        standing = await fresh.look("b")
        assert (standing.used, standing.version) == (Decimal(1100), 1100)
        await fresh.close()
