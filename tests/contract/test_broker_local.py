"""The embedded broker keeps the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from contract.broker_contract import BrokerContract
from rowmill.state.clock import SystemClock
from rowmill.streams.brokers.base import Broker
from rowmill.streams.brokers.local import LocalBroker


class TestLocalBroker(BrokerContract):
    """The suite on a fresh folder per test."""

    @pytest.fixture
    async def broker(self, tmp_path: Path) -> AsyncIterator[Broker]:
        """An embedded broker."""
        broker = LocalBroker(f"local://{tmp_path}/log", SystemClock())
        await broker.start()
        yield broker
        await broker.close()
