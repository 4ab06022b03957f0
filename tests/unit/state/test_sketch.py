"""Sketches of durations."""

from __future__ import annotations

import random
from typing import Any

import pytest
from rowmill.state.codec import dumps, loads
from rowmill.state.sketch import ACCURACY, Sketch


def sketch_of(*durations: float) -> Sketch:
    """One of these."""
    sketch = Sketch()
    for seconds in durations:
        sketch.add(seconds)
    return sketch


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.95, 0.99, 1.0])
def test_quantiles_are_right_within_two_percent(fraction: float) -> None:
    """Durations over six orders of magnitude: each quantile is near the exact one."""
    chance = random.Random(7)
    durations = sorted(10 ** chance.uniform(-6, 1) for _ in range(5_000))
    exact = durations[int(fraction * (len(durations) - 1))]
    assert sketch_of(*durations).quantile(fraction) == pytest.approx(exact, rel=ACCURACY * 1.01)


def test_parts_add_up_to_the_whole() -> None:
    """Sketches that were merged, and such that went through JSON and were added up, equal that of all durations."""
    chance = random.Random(3)
    parts = [[chance.expovariate(100) for _ in range(200)] for _ in range(5)]
    whole = sketch_of(*(seconds for part in parts for seconds in part))
    merged = Sketch()
    for part in parts:
        merged.merge(sketch_of(*part))
    assert merged.to_dict() == whole.to_dict()
    told = [loads(dumps(sketch_of(*part).to_dict())) for part in parts]
    assert Sketch.of_all(told).to_dict() == whole.to_dict()
    assert (merged.count, Sketch.of(whole.to_dict()).count) == (1_000, 1_000)


def test_one_without_any() -> None:
    """It has no quantiles, and merging it changes nothing."""
    sketch = sketch_of(0.5)
    sketch.merge(Sketch())
    assert (Sketch().quantile(0.5), Sketch().count, Sketch().to_dict()) == (None, 0, {"bins": {}, "zero": 0})
    assert sketch.count == 1


@pytest.mark.parametrize(
    ("seconds", "found"),
    [(0.0, 0.0), (1e-12, 0.0), (-1.0, 0.0), (float("nan"), None), (float("inf"), 1e9), (1e12, 1e9), (1e-9, 1e-9)],
)
def test_odd_durations(seconds: float, found: float | None) -> None:
    """What is too short counts as nothing, what is too long as 30 years; what is no number is left out."""
    expected = found if not found else pytest.approx(found, rel=0.021)
    assert sketch_of(seconds).quantile(0.5) == expected


def test_a_duration_may_count_several_times() -> None:
    """One in so many that was measured stands for the others."""
    sketch = Sketch()
    sketch.add(0.010, 99)
    sketch.add(1.0)
    assert sketch.count == 100
    assert sketch.quantile(0.5) == pytest.approx(0.010, rel=0.021)
    assert sketch.quantile(1.0) == pytest.approx(1.0, rel=0.021)


def test_every_bin_comes_back_as_itself() -> None:
    """To and from JSON nothing moves to a neighbour, also at the ends."""
    for index in (-518, -517, -100, -1, 0, 1, 57, 518, 519):
        content = {"bins": {str(index): 3}, "zero": 2}
        assert Sketch.of(content).to_dict() == content


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"bins": None, "zero": None},
        {"bins": [1], "zero": "5"},
        {"bins": {"x": 1, "1.5": 1, "": 1, "1000000000": 1, "-99999": 1}, "zero": -3},
        {"bins": {"1": True, "2": "3", "3": None, "4": -1, "5": float("nan"), "6": float("inf"), "7": 0}, "zero": True},
    ],
)
def test_what_is_unsound_is_left_out(content: dict[str, Any]) -> None:
    """Anybody may write to the events topic: no content breaks a reader, or makes it take memory."""
    assert Sketch.of(content).count == 0
