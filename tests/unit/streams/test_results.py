"""What a run gives back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rowmill import ConfigError, CostEstimate, ErrorInfo, ExecutionResult, ProcessingStats
from rowmill.state.codec import dumps, loads


def result(total: int, failed: int, **more: Any) -> ExecutionResult:
    """A result with so many rows."""
    began = datetime(2024, 1, 1, tzinfo=UTC)
    return ExecutionResult(
        data=pd.DataFrame(),
        metrics=ProcessingStats(total, total - failed, failed, 0, 10.0, 1.0, results=total - failed),
        costs=CostEstimate(),
        errors=[ErrorInfo(f"row {n}", "s", "E", "m", 1, "p.dlq/0/0", b"{}") for n in range(failed)],
        session="s",
        topics={},
        start_time=began,
        end_time=began + timedelta(seconds=90),
        **more,
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


@pytest.mark.parametrize(
    ("stats", "stopped", "complete"),
    [
        (ProcessingStats(4, 4, 0, 0), None, True),
        (ProcessingStats(4, 3, 0, 0, dropped_rows=1), None, True),
        (ProcessingStats(4, 3, 0, 1), None, True),
        (ProcessingStats(4, 3, 0, 0), None, False),
        (ProcessingStats(4, 3, 1, 0), None, False),
        (ProcessingStats(4, 2, 0, 0), "enough", False),
        (ProcessingStats(4, 4, 0, 0), "enough", False),
    ],
)
def test_what_is_complete(stats: ProcessingStats, stopped: str | None, complete: bool) -> None:
    """Every row is done, dropped and skipped ones included, none is a dead letter, and nothing ended it early."""
    began = datetime(2024, 1, 1, tzinfo=UTC)
    found = ExecutionResult(pd.DataFrame(), stats, CostEstimate(), [], "s", {}, began, began, stopped=stopped)
    assert found.is_complete is complete


def test_errors_that_are_not_named() -> None:
    """Where more rows failed than are described, it says how many."""
    many = result(5, 3)
    assert many.unnamed_errors == 0
    del many.errors[1:]
    assert many.unnamed_errors == 2


def test_as_json() -> None:
    """Everything but the data survives JSON: money as text, moments in ISO 8601."""
    found = result(4, 1, stages={"s": {"calls": 4}}, stopped="enough", metadata={"a": 1}).to_dict()
    assert loads(dumps(found)) == found
    assert found == {
        "session": "s",
        "is_complete": False,
        "stopped": "enough",
        "start_time": "2024-01-01T00:00:00+00:00",
        "end_time": "2024-01-01T00:01:30+00:00",
        "duration_seconds": 90.0,
        "metrics": ProcessingStats(4, 3, 1, 0, 10.0, 1.0, results=3).to_dict(),
        "costs": {"total_cost": "0", "total_tokens": 0, "rows": 0, "by_stage": {}},
        "error_rate": 0.25,
        "errors": [
            {
                "row_index": "row 0",
                "stage_name": "s",
                "error_type": "E",
                "error_message": "m",
                "attempts": 1,
                "dead_letter": "p.dlq/0/0",
                "value": "{}",
                "where": "",
            }
        ],
        "unnamed_errors": 0,
        "topics": {},
        "stages": {"s": {"calls": 4}},
        "metadata": {"a": 1},
    }


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        (None, None),
        (7, 7),
        ("a", "a"),
        (np.int64(7), 7),
        (np.float64(0.5), 0.5),
        (pd.Timestamp("2026-01-01"), "2026-01-01 00:00:00"),
        (("a", 1), "('a', 1)"),
        (b"k", "b'k'"),
    ],
)
def test_labels_as_json(label: Any, plain: Any) -> None:
    """An index label is what JSON has for it, else its text."""
    found = ErrorInfo(label, "s", "E", "m", 1, "d/0/0", b"\xff{}").to_dict()
    assert (found["row_index"], found["value"]) == (plain, "\ufffd{}")
    assert loads(dumps(found)) == found
    assert ErrorInfo(label, "s", "E", "m", 1, "d/0/0", None).to_dict()["value"] is None


def test_costs() -> None:
    """Exact to the last digit, as JSON too; a whole number becomes a Decimal, and equal ones are equal."""
    amount = "0.1234567890123456789012345678901234567890"
    costs = CostEstimate(Decimal(amount), 7, 2, {"ask": Decimal("0.10")})
    assert costs.to_dict() == {"total_cost": amount, "total_tokens": 7, "rows": 2, "by_stage": {"ask": "0.10"}}
    assert isinstance(CostEstimate(3).total_cost, Decimal)  # type: ignore[arg-type]
    assert costs == CostEstimate(Decimal(amount), 7, 2, {"ask": Decimal("0.10")})
    assert hash(costs) == hash(CostEstimate(Decimal(amount), 7, 2))


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"total_cost": 0.1}, "total_cost"),
        ({"total_cost": Decimal(-1)}, "total_cost"),
        ({"total_cost": Decimal("NaN")}, "total_cost"),
        ({"by_stage": {"ask": 0.1}}, "by_stage"),
    ],
)
def test_no_float_is_a_cost(arguments: dict[str, Any], setting: str) -> None:
    """What is no exact amount is refused, and named."""
    with pytest.raises(ConfigError, match=rf"CostEstimate\({setting}=\)"):
        CostEstimate(**arguments)
