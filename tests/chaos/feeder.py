"""Publishes rows while faults happen, at a steady pace, so that there always is work in flight."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import orjson
from rowmill.state.clock import SystemClock
from rowmill.state.errors import RowmillError
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker, Producer
from rowmill.streams.brokers.kafka import KafkaBroker
from rowmill.streams.partitioning import partition_for

from .fate import LUCK

KEYS = 4_000
FIRST_SHARE = 0.2
TICK = 0.1


class Feeder:
    """Sends ``rows`` rows over about ``seconds``, and goes on more slowly until told that it is enough.

    ``deadly`` of the first ones kill whoever runs them.

    A broker under fault may lose or repeat some: what counts is what stands in the topic in the end.
    """

    def __init__(
        self, bootstrap: str, topic: str, partitions: int, rows: int, seconds: float, seed: int, deadly: int
    ) -> None:
        self.sent = 0
        self.enough = asyncio.Event()
        self._broker: Broker = KafkaBroker(bootstrap, clock=SystemClock())
        self._topic = topic
        self._partitions = partitions
        self._rows = rows
        self._pace = rows * (1 - FIRST_SHARE) / max(seconds, TICK)
        self._chance = random.Random(seed)
        self._deadly = set(self._chance.sample(range(int(rows * FIRST_SHARE)), deadly))
        self._producer: Producer | None = None

    async def run(self) -> None:
        """Feed."""
        await self._broker.start()
        try:
            await self._send(int(self._rows * FIRST_SHARE))
            due = time.monotonic()
            while self.sent < self._rows or not self.enough.is_set():
                share = 1.0 if self.sent < self._rows else 0.25
                await self._send(max(1, int(self._pace * TICK * share)))
                due = max(due + TICK, time.monotonic() - 1)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        finally:
            if self._producer is not None:
                await self._producer.close()
            await self._broker.close()

    async def _send(self, count: int) -> None:
        lots: dict[TopicPartition, list[Outgoing]] = {}
        now = int(time.time() * 1000)
        for n in range(self.sent, self.sent + count):
            partition, out = self._row(n, now)
            lots.setdefault(TopicPartition(self._topic, partition), []).append(out)
        try:
            if self._producer is None:
                self._producer = self._broker.producer()
                await self._producer.start()
            for written in [await self._producer.send(tp, records) for tp, records in lots.items()]:
                async with asyncio.timeout(90):
                    await written
            self.sent += count
        except (RowmillError, TimeoutError):
            producer, self._producer = self._producer, None
            if producer is not None:
                with contextlib.suppress(RowmillError):
                    await producer.close()
            await asyncio.sleep(0.5)

    def _row(self, n: int, now: int) -> tuple[int, Outgoing]:
        row = {"n": n, "luck": self._chance.randrange(LUCK)} | ({"deadly": True} if n in self._deadly else {})
        value = orjson.dumps(row)
        if self._chance.random() < 0.1:
            return self._chance.randrange(self._partitions), Outgoing(None, value, now)
        key = b"key-%d" % self._chance.randrange(KEYS)
        return partition_for(key, self._partitions), Outgoing(key, value, now)
