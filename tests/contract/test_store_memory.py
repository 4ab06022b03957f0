"""The store in memory keeps the contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract.store_contract import StoreContract
from rowmill.state.memory import MemoryStores
from rowmill.state.store import Stores


class TestMemoryStore(StoreContract):
    """The suite on a fresh object per test."""

    @pytest.fixture
    def stores(self) -> Iterator[Stores]:
        """A place of its own."""
        stores = MemoryStores()
        yield stores
        stores.close()
