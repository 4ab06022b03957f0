"""The fake that unit tests rely on keeps the contract, too: what they show holds for real brokers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from contract.broker_contract import SharedGroupContract
from rowmill.streams.brokers.base import Broker
from support.fake_broker import FakeBroker


class TestFakeBroker(SharedGroupContract):
    """The suite in memory."""

    @pytest.fixture(params=[True, False], ids=["markers", "dense"])
    async def broker(self, request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
        """An empty broker."""
        broker = FakeBroker(markers=request.param)
        await broker.start()
        yield broker
        await broker.close()
