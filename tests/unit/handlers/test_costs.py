"""CostTracker: exact sums by stage and model, from any thread, in bounded memory."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Any

import pytest
from rowmill.handlers.costs import MOST_NAMES, OTHERS, RECENT_ENTRIES, CostEntry, CostTracker, StageCost
from rowmill.state.codec import dumps, loads
from rowmill.state.errors import ConfigError

pytestmark = pytest.mark.timeout(20)


def test_sums_by_stage_and_model() -> None:
    """Costs and tokens add up by stage, by model and in all; a float never enters."""
    costs = CostTracker()
    assert costs.add("score", "0.10", tokens_in=100, tokens_out=10, model="small") == Decimal("0.10")
    costs.add("score", Decimal("0.20"), tokens_in=200, tokens_out=20, model="large")
    costs.add("fetch", 1)
    assert costs.total_cost == Decimal("1.30")
    assert (costs.input_tokens, costs.output_tokens, costs.total_tokens) == (300, 30, 330)
    assert costs.total == StageCost(3, Decimal("1.30"), 300, 30)
    assert costs.get_stage_costs() == {"score": Decimal("0.30"), "fetch": Decimal(1)}
    assert costs.by_stage()["score"] == StageCost(2, Decimal("0.30"), 300, 30)
    assert costs.by_model() == {
        "small": StageCost(1, Decimal("0.10"), 100, 10),
        "large": StageCost(1, Decimal("0.20"), 200, 20),
    }
    assert costs.entries[-1] == CostEntry("fetch", Decimal(1))


def test_as_json() -> None:
    """The JSON form survives JSON, and keeps every digit of a cost."""
    costs = CostTracker()
    amount = "0.1234567890123456789012345678901234567890"
    costs.add("score", amount, tokens_in=1, model="m")
    expected = {"calls": 1, "cost": amount, "tokens_in": 1, "tokens_out": 0}
    found = costs.to_dict()
    assert loads(dumps(found)) == found
    assert found == {"total": expected, "stages": {"score": expected}, "models": {"m": expected}}


def test_reset() -> None:
    """After a reset everything is as in a new tracker."""
    costs = CostTracker()
    costs.add("score", 1, model="m")
    costs.reset()
    assert costs.to_dict() == CostTracker().to_dict()
    assert costs.entries == ()


def test_memory_is_bounded() -> None:
    """Only the newest entries are kept, and names beyond the limit are summed up as one: no money is lost."""
    costs = CostTracker(recent=3)
    for number in range(MOST_NAMES + 5):
        costs.add(f"stage-{number}", 1, model=f"model-{number}")
    assert [entry.stage for entry in costs.entries] == [f"stage-{MOST_NAMES + n}" for n in (2, 3, 4)]
    assert len(costs.by_stage()) == len(costs.by_model()) == MOST_NAMES + 1
    assert costs.get_stage_costs()[OTHERS] == 5
    assert sum(costs.get_stage_costs().values()) == costs.total_cost == MOST_NAMES + 5


def test_threads() -> None:
    """Eight threads add at once, and nothing is missing; whoever reads meanwhile finds sums that fit together."""
    costs = CostTracker()
    together = threading.Barrier(9)

    def add(name: str) -> None:
        together.wait(10)
        for _ in range(500):
            costs.add(name, "0.001", tokens_in=2)

    threads = [threading.Thread(target=add, args=(f"stage-{n % 2}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    together.wait(10)
    while any(thread.is_alive() for thread in threads):
        found = costs.to_dict()
        assert sum(stage["calls"] for stage in found["stages"].values()) == found["total"]["calls"]
        assert sum(Decimal(stage["cost"]) for stage in found["stages"].values()) == Decimal(found["total"]["cost"])
    for thread in threads:
        thread.join(10)
    assert costs.total == StageCost(4000, Decimal("4.000"), 8000, 0)
    assert len(costs.entries) == RECENT_ENTRIES
    assert costs.get_stage_costs() == {"stage-0": Decimal("2.000"), "stage-1": Decimal("2.000")}


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"cost": 0.1}, "cost"),
        ({"cost": -1}, "cost"),
        ({"cost": None}, "cost"),
        ({"cost": "NaN"}, "cost"),
        ({"cost": True}, "cost"),
        ({"cost": 1, "tokens_in": -1}, "tokens_in"),
        ({"cost": 1, "tokens_out": 1.5}, "tokens_out"),
        ({"cost": 1, "tokens_out": True}, "tokens_out"),
        ({"cost": 1, "model": None}, "model"),
        ({"cost": 1, "stage": 7}, "stage"),
    ],
)
def test_mistakes(arguments: dict[str, Any], setting: str) -> None:
    """What is no cost, no count or no name is refused, names the argument, and changes nothing."""
    costs = CostTracker()
    with pytest.raises(ConfigError, match=f"{setting}="):
        costs.add(**{"stage": "score", **arguments})
    assert costs.to_dict() == CostTracker().to_dict()


@pytest.mark.parametrize("recent", [-1, 1.5, True, "3"])
def test_bad_recent(recent: Any) -> None:
    """The number of entries kept is a whole number from 0."""
    with pytest.raises(ConfigError, match="recent="):
        CostTracker(recent)
