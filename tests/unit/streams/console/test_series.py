"""Windows, differences of cumulative figures, latency sketches, and what tables hold of them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from rowmill.state.sketch import Sketch
from rowmill.streams.console.series import (
    MOST_FAILURE_TYPES,
    MOST_STAGES,
    OTHER,
    SPANS,
    Latency,
    Point,
    StageTotals,
    Totals,
    WindowSum,
    count_failure,
    increase,
    is_expired,
    latencies_of,
    money,
    number,
    stage_figures,
    start_of,
    whole,
)

AT_MS = 1_750_000_005_678


def totals(rows: int, **more: object) -> Totals:
    """What a worker tells after so many rows."""
    told = {
        "rows": rows,
        "results": rows - 1,
        "dropped": 1,
        "skipped": 2,
        "dead_letters": 3,
        "cost": "0.10",
        "tokens": 7,
    }
    stages = {"score": {"rows": rows, "out": rows - 4, "dropped": 1, "failed": 3, "calls": rows + 2, "seconds": 1.5}}
    return Totals.of({"totals": {**told, **more}, "stages": stages})


def test_totals_are_read_as_workers_tell_them() -> None:
    """Failures are dead letters and skipped rows together; money stays exact."""
    assert totals(10) == Totals(10, 9, 1, 5, 3, 7, Decimal("0.10"), {"score": StageTotals(10, 6, 1, 3, 12, 1.5)})


def test_stages_of_an_older_rowmill_have_calls_only() -> None:
    """Where a stage's rows are not told they are the calls that were no retries."""
    told = Totals.of({"stages": {"s": {"calls": 12, "retries": 2, "failures": 3, "seconds": 0.5}}})
    assert told.stages == {"s": StageTotals(rows=10, out=7, failed=3, calls=12, seconds=0.5)}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"totals": [], "stages": 5},
        {"totals": {"rows": "many", "cost": "NaN", "tokens": -1, "results": True}, "stages": {"s": 1}},
        {"totals": {"rows": 2**60, "cost": "-1", "dropped": 1.5}, "stages": None},
        {"totals": {"cost": "9" * 100}},
        {"totals": {"cost": 5}},
    ],
)
def test_what_is_no_number_counts_as_nothing(data: dict[str, Any]) -> None:
    """Anybody may write to the topic: nonsense adds nothing and breaks nothing."""
    assert Totals.of(data) == Totals()


def test_more_stages_than_a_hundred_are_left_out() -> None:
    """An event cannot make the console remember any number of names."""
    assert len(Totals.of({"stages": {f"s{n}": {"rows": 1} for n in range(500)}}).stages) == MOST_STAGES


def test_what_is_added_is_the_difference() -> None:
    """Of the totals, and of each stage."""
    added, highest = increase(totals(10), totals(25, cost="0.35"))
    assert (added.rows, added.cost, added.failures) == (15, Decimal("0.25"), 0)
    assert added.stages["score"] == StageTotals(rows=15, out=15, calls=15)
    assert highest == totals(25, cost="0.35")


def test_older_figures_add_nothing_and_lower_nothing() -> None:
    """Whatever order events are read in, what is counted in the end is the highest told."""
    added, highest = increase(totals(25), totals(10))
    assert added.rows == 0
    assert added.cost == 0
    assert highest == totals(25)
    added, _ = increase(highest, totals(26))
    assert added.rows == 1


def test_a_stopped_worker_tells_no_stages_and_loses_none() -> None:
    """``worker_stopped`` has totals only."""
    added, highest = increase(totals(10), Totals.of({"totals": {"rows": 12}}))
    assert added.rows == 2
    assert highest.stages == totals(10).stages


def test_totals_survive_a_table() -> None:
    """What was written is read again."""
    assert Totals.from_json(totals(10).to_json()) == totals(10)


def filled() -> WindowSum:
    """A window with everything in it."""
    window = WindowSum(start_of("10s", AT_MS), lag=12)
    times = {"score": {"bins": {"-17": 90, "103": 10}, "zero": 0}, "other": {"bins": {}, "zero": 3}}
    window.add(totals(10), latencies_of({"latency": times}))
    window.add_failure("score", "ValueError", AT_MS)
    window.add_failure("score", "ValueError", AT_MS - 5)
    window.positions["rowmill.events/0"] = 17
    return window


def test_a_window_survives_a_table() -> None:
    """With its bins all of it comes back."""
    window = filled()
    assert WindowSum.decode(window.encode(with_bins=True)) == window


def test_a_window_without_bins_shows_the_same() -> None:
    """Quantiles are settled when it is written down, and it is smaller."""
    window = filled()
    short = window.encode(with_bins=False)
    decoded = WindowSum.decode(short)
    assert decoded is not None
    assert Point.of(decoded) == Point.of(window)
    assert WindowSum.decode(decoded.encode(with_bins=False)) == decoded
    assert len(short) < 400


@pytest.mark.parametrize("value", [b"", b"{}", b"[1]", b"[2,3,4,5,6,7,8,9]", b"null", b'[1,2,[3],"x",null,{},[],{}]'])
def test_a_window_that_cannot_be_read_is_none(value: bytes) -> None:
    """Damaged or of another version: it is left out."""
    assert WindowSum.decode(value) is None


def test_quantiles_are_those_of_the_sketch() -> None:
    """p50, p95 and p99 of the calls' times, within two percent."""
    sketch = Sketch()
    for millisecond in range(1, 1_001):
        sketch.add(millisecond / 1000)
    latency = Latency.of(sketch.to_dict())
    found = latency.quantiles()
    assert found is not None
    assert found == pytest.approx((0.5, 0.95, 0.99), rel=0.03)


def test_merging_sketches_is_adding_their_bins() -> None:
    """Two halves together have the whole's quantiles."""
    whole_sketch, parts = Sketch(), (Latency(), Latency())
    for number_of in range(1, 500):
        whole_sketch.add(number_of / 100)
        half = Sketch()
        half.add(number_of / 100)
        parts[number_of % 2].add(Latency.of(half.to_dict()))
    merged = Latency()
    merged.add(parts[0])
    merged.add(parts[1])
    assert merged.quantiles() == tuple(whole_sketch.quantile(q) for q in (0.5, 0.95, 0.99))


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"bins": 5},
        {"bins": {"x": 1, "": 2, "1e9": 3, "--1": 1, "123456": 1}, "zero": "no"},
        {"bins": {"3": 0, "4": -1, "5": float("nan"), "6": "7"}},
        {"bins": {3: 4}},
    ],
)
def test_bins_that_are_none_are_passed_over(told: object) -> None:
    """They come from a topic that anybody may write to."""
    latency = Latency.of(told)
    assert not latency
    assert latency.quantiles() is None


def test_bins_are_bounded() -> None:
    """An event cannot fill the memory with bins."""
    latency = Latency.of({"bins": {str(n): 1 for n in range(-9999, 9999)}, "zero": 0})
    latency.add(Latency.of({"bins": {"10": 1, "9998": 1}, "zero": 0}))
    assert len(latency.bins) == 1_000


def test_failure_types_beyond_the_bound_are_other() -> None:
    """Types are made by users: there may be any number."""
    failed: dict[tuple[str, str], list[int]] = {}
    for n in range(200):
        count_failure(failed, "s", f"Type{n}", AT_MS + n)
    assert len(failed) == MOST_FAILURE_TYPES + 1
    assert failed["", OTHER] == [200 - MOST_FAILURE_TYPES, AT_MS + 199]


@pytest.mark.parametrize(("window", "start"), [("10s", 1_750_000_000_000), ("1m", 1_749_999_960_000)])
def test_windows_begin_at_full_multiples(window: str, start: int) -> None:
    """Of the epoch, so that those of all sessions lie below each other."""
    assert start_of(window, AT_MS) == start  # type: ignore[arg-type]


@pytest.mark.parametrize("window", SPANS)
def test_windows_are_kept_from_their_end_on(window: str) -> None:
    """15 minutes, 6 hours, 7 days."""
    length_ms, kept_ms = SPANS[window]  # type: ignore[index]
    assert not is_expired(window, 0, length_ms + kept_ms - 1)  # type: ignore[arg-type]
    assert is_expired(window, 0, length_ms + kept_ms)  # type: ignore[arg-type]


def test_stage_figures_are_in_the_order_of_the_chain() -> None:
    """Stages that did nothing are there; calls are per second of the time looked at."""
    window = WindowSum(0)
    window.add(Totals.of({"stages": {"b": {"rows": 20, "calls": 30}, "x": {"rows": 10}}}), {})
    figures = stage_figures(["a", "b"], [window, window], 10.0)
    assert [(each.name, each.rows, each.calls_per_second) for each in figures] == [
        ("a", 0, 0),
        ("b", 40, 6),
        ("x", 20, 2),
    ]


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (whole, 5, 5),
        (whole, True, 0),
        (whole, 5.0, 0),
        (number, 5, 5.0),
        (number, float("inf"), 0.0),
        (money, "1E-7", Decimal("1E-7")),
        (money, "Infinity", 0),
        (money, "1E-99999999", 0),
        (money, "x", 0),
    ],
)
def test_numbers_are_taken_as_they_are_or_not_at_all(read: Any, value: object, expected: object) -> None:
    """Nothing is converted that only looks like a number."""
    assert read(value) == expected


def test_money_is_shown_without_an_exponent() -> None:
    """Small amounts are read by people."""
    assert Point.of(WindowSum(0, cost=Decimal("1E-7"))).cost == "0.0000001"
