"""The adapter for Apache Kafka keeps the contract."""

from __future__ import annotations

import socket
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
@pytest.mark.parametrize("there", ["nobody", "somebody silent"])
async def test_nobody_answers(there: str) -> None:
    """Where nothing listens, or nothing that answers, start() names the address, with time left of ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if there == "somebody silent" else 1
        broker = open_broker(f"kafka://127.0.0.1:{port}", environment={})
        began = time.monotonic()
        with pytest.raises(BrokerUnreachableError, match=rf"127\.0\.0\.1:{port}: no broker answers"):
            await broker.start()
        assert time.monotonic() - began < 9
    await broker.close()
