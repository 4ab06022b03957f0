"""The adapter for Apache Kafka keeps the contract."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import warnings
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


@pytest.mark.timeout(120)
async def test_starts_that_are_given_up(kafka: str, recwarn: pytest.WarningsRecorder) -> None:
    """At whatever moment a start is cancelled, what it had opened is closed by close()."""
    warnings.simplefilter("always", ResourceWarning)
    broker = open_broker(f"kafka://{kafka}", environment={})
    await broker.start()
    given_up = 0
    for moment in range(60):
        reader, producer = broker.reader(), broker.producer()
        starting = [asyncio.create_task(reader.start({})), asyncio.create_task(producer.start())]
        await asyncio.sleep(moment / 2_000)
        for start in starting:
            given_up += start.cancel()
        await asyncio.wait(starting)
        await asyncio.gather(reader.close(), producer.close())
        del reader, producer, starting, start
        gc.collect()
    await broker.close()
    assert given_up > 20
    assert [str(each.message) for each in recwarn if "Unclosed" in str(each.message)] == []
