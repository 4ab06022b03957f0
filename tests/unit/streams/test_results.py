"""What a run gives back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from rowmill import CostEstimate, ErrorInfo, ExecutionResult, ProcessingStats


def result(total: int, failed: int) -> ExecutionResult:
    """A result with so many rows."""
    began = datetime(2024, 1, 1, tzinfo=UTC)
    return ExecutionResult(
        data=pd.DataFrame(),
        metrics=ProcessingStats(total, total - failed, failed, 0, total - failed, 10.0, 1.0),
        costs=CostEstimate(),
        errors=[ErrorInfo(f"row {n}", "s", "E", "m", 1, "p.dlq/0/0", b"{}") for n in range(failed)],
        session="s",
        topics={},
        start_time=began,
        end_time=began + timedelta(seconds=90),
    )


@pytest.mark.parametrize(
    ("total", "failed", "rate", "complete"),
    [(0, 0, 0.0, True), (4, 0, 0.0, True), (4, 1, 0.25, False), (2, 2, 1.0, False)],
)
def test_figures(total: int, failed: int, rate: float, complete: bool) -> None:
    """The error rate is a fraction, a run without rows has none; lost rows are named by their labels."""
    found = result(total, failed)
    assert (found.error_rate, found.is_complete) == (rate, complete)
    assert found.lost_rows == [f"row {n}" for n in range(failed)]
    assert found.duration == timedelta(seconds=90)
