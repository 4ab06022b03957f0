"""The suites that adapters inherit are no test files by name: have their assertions explained all the same."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("contract.broker_contract", "contract.store_contract")
