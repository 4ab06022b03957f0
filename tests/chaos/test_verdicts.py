"""The judge of the chaos runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chaos.fleet import STOP_SECONDS
from chaos.verdicts import overdue


@pytest.mark.parametrize(
    ("told", "killed", "ended", "late"),
    [
        (None, True, 50.0, False),  # killed without a word
        (40.0, False, 50.0, False),  # stopped in order
        (40.0, True, 43.5, False),  # the storm killed it on its way out: it had no time
        (40.0, True, 40.0 + STOP_SECONDS, True),
    ],
)
def test_overdue(told: float | None, killed: bool, ended: float, late: bool) -> None:
    """Only who had all its time to stop, and was there still, is blamed for it."""
    process: Any = SimpleNamespace(told_to_stop=told, killed_by_us=killed, ended=ended)
    assert overdue([process]) == ([process] if late else [])
