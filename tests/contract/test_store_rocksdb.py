"""RocksDB keeps the contract of stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.store_contract import StoreContract
from rowmill.state.rocksdb import RocksStores
from rowmill.state.store import Stores


class TestRocksStore(StoreContract):
    """The suite on a fresh folder per test."""

    @pytest.fixture
    def stores(self, tmp_path: Path) -> Iterator[Stores]:
        """A place of its own."""
        stores = RocksStores(tmp_path / "state")
        yield stores
        stores.close()
