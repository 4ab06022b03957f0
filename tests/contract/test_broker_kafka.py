"""The adapter for Apache Kafka keeps the contract."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
from contract.broker_contract import SharedGroupContract
from rowmill.streams.brokers.base import Broker
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.errors import BrokerUnreachableError


class TestKafkaBroker(SharedGroupContract):
    """The suite on the session's node."""

    @pytest.fixture
    async def broker(self, kafka: str) -> AsyncIterator[Broker]:
        """A connected adapter."""
        broker = open_broker(f"kafka://{kafka}", environment={})
        await broker.start()
        yield broker
        await broker.close()


@pytest.mark.timeout(30)
async def test_nobody_there() -> None:
    """Where nothing listens, start() says so within ten seconds and names the address."""
    broker = open_broker("kafka://127.0.0.1:1", environment={})
    began = time.monotonic()
    with pytest.raises(BrokerUnreachableError, match=r"127\.0\.0\.1:1"):
        await broker.start()
    assert time.monotonic() - began < 11
    await broker.close()
