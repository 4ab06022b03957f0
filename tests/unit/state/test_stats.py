"""The figures of a session."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from rowmill.state.codec import dumps, loads
from rowmill.state.context import ExecutionContext
from rowmill.state.stats import ProcessingStats


def test_order_of_fields() -> None:
    """The first six may be given by position, in ondine's order."""
    stats = ProcessingStats(10, 6, 2, 1, 5.0, 2.0)
    assert (stats.total_rows, stats.processed_rows, stats.failed_rows, stats.skipped_rows) == (10, 6, 2, 1)
    assert (stats.rows_per_second, stats.total_duration_seconds) == (5.0, 2.0)
    assert (stats.dropped_rows, stats.defaulted_rows, stats.results) == (0, 0, None)


def test_completed_rows() -> None:
    """Every row that is done counts once; one that went on with a fallback is a processed one already."""
    stats = ProcessingStats(10, 6, 2, 1, dropped_rows=1, defaulted_rows=3)
    assert stats.completed_rows == 10


def test_as_json() -> None:
    """All figures by name; the JSON form survives JSON."""
    found = ProcessingStats(4, 3, 1, 0, 2.5, 1.6, results=7).to_dict()
    assert loads(dumps(found)) == found
    assert found == {
        "total_rows": 4,
        "processed_rows": 3,
        "failed_rows": 1,
        "skipped_rows": 0,
        "rows_per_second": 2.5,
        "total_duration_seconds": 1.6,
        "dropped_rows": 0,
        "defaulted_rows": 0,
        "results": 7,
    }


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 49, 1_000_003])
def test_exact_from_first_to_last_row(rows: int) -> None:
    """A fresh context reports no rows and 0 %, one whose rows are all done exactly those and 100 %."""
    began = datetime(2026, 1, 1, tzinfo=UTC)
    context = ExecutionContext(start_time=began, total_rows=rows)
    assert (context.get_stats(began).completed_rows, context.get_progress()) == (0, 0.0)
    if not rows:
        return
    context.update_row(rows - 1)
    stats = context.get_stats(began + timedelta(seconds=2))
    assert (stats.completed_rows, stats.processed_rows, context.get_progress()) == (rows, rows, 100.0)
    assert stats.rows_per_second == rows / 2
    again = ExecutionContext.from_checkpoint(loads(dumps(context.to_checkpoint())))
    assert (again.completed_rows, again.get_progress()) == (rows, 100.0)
