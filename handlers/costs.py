"""What the stages of a session cost, kept apart by stage: for reports, not for control.

A context's totals are exact and committed with the rows; a budget decides what may be spent. This is the third
account: where the money went, as far as this process saw it.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..state.context import checked_cost, sum_costs
from ..state.errors import ConfigError

RECENT_ENTRIES = 100
"""How many single entries are kept."""

MOST_NAMES = 1_000
"""How many stages, and models of a stage, are told apart; what comes later is summed up under ``OTHERS``."""

OTHERS = "(others)"

_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class CostEntry:
    """One call: its stage, what it cost, the tokens it took and gave, and the model where there was one."""

    stage: str
    cost: Decimal
    tokens_in: int = 0
    tokens_out: int = 0
    model: str = ""


@dataclass(frozen=True, slots=True)
class StageCost:
    """All calls of one stage or model, summed up."""

    calls: int = 0
    cost: Decimal = _ZERO
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def tokens(self) -> int:
        """Both kinds together."""
        return self.tokens_in + self.tokens_out

    def plus(self, entry: CostEntry) -> StageCost:
        """These calls and one more."""
        return StageCost(
            calls=self.calls + 1,
            cost=sum_costs(self.cost, entry.cost),
            tokens_in=self.tokens_in + entry.tokens_in,
            tokens_out=self.tokens_out + entry.tokens_out,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the cost is text, so that it stays exact."""
        return {
            "calls": self.calls,
            "cost": str(self.cost),
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
        }


class CostTracker:
    """Adds up what calls cost, by stage and by model. Any thread may add and read at any time.

    Memory is bounded: sums per stage and model, and the newest entries.

    Args:
        recent: how many of the newest entries :attr:`entries` gives; 0 for none.

    Raises:
        ConfigError: ``recent`` is no whole number from 0.
    """

    def __init__(self, recent: int = RECENT_ENTRIES) -> None:
        if isinstance(recent, bool) or not isinstance(recent, int) or recent < 0:
            raise ConfigError("CostTracker(recent=)", recent, "give a whole number from 0")
        self._lock = threading.Lock()
        self._total = StageCost()
        self._stages: dict[str, StageCost] = {}
        self._models: dict[str, StageCost] = {}
        self._recent: deque[CostEntry] = deque(maxlen=recent)

    def add(
        self, stage: str, cost: Decimal | int | str, *, tokens_in: int = 0, tokens_out: int = 0, model: str = ""
    ) -> Decimal:
        """Count one call; its cost, as a Decimal.

        Args:
            stage: its stage's name.
            cost: from 0; no float.
            tokens_in: tokens of the prompt, from 0.
            tokens_out: tokens of the answer, from 0.
            model: which model answered; "" for none.

        Raises:
            ConfigError: the cost is a float or no amount, a number of tokens is no whole number from 0, or a name is
                no text.
        """
        entry = CostEntry(
            stage=_name("stage", stage),
            cost=checked_cost(cost, "CostTracker.add(cost=)"),
            tokens_in=_tokens("tokens_in", tokens_in),
            tokens_out=_tokens("tokens_out", tokens_out),
            model=_name("model", model),
        )
        with self._lock:
            total = self._total.plus(entry)  # the one step that may refuse comes before anything is changed
            _count(self._stages, entry.stage, entry)
            if entry.model:
                _count(self._models, entry.model, entry)
            self._total = total
            self._recent.append(entry)
        return entry.cost

    @property
    def total(self) -> StageCost:
        """All calls together."""
        return self._total

    @property
    def total_cost(self) -> Decimal:
        """The money of all calls."""
        return self._total.cost

    @property
    def total_tokens(self) -> int:
        """The tokens of all calls, both kinds."""
        return self._total.tokens

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return self._total.tokens_in

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers."""
        return self._total.tokens_out

    @property
    def entries(self) -> tuple[CostEntry, ...]:
        """The newest calls, the oldest of them first."""
        with self._lock:
            return tuple(self._recent)

    def by_stage(self) -> dict[str, StageCost]:
        """The calls of each stage, in the order of their first ones."""
        with self._lock:
            return dict(self._stages)

    def by_model(self) -> dict[str, StageCost]:
        """The calls of each model, in the order of their first ones; without those that named none."""
        with self._lock:
            return dict(self._models)

    def get_stage_costs(self) -> dict[str, Decimal]:
        """The money of each stage."""
        return {name: cost.cost for name, cost in self.by_stage().items()}

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._total = StageCost()
            self._stages.clear()
            self._models.clear()
            self._recent.clear()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single entries, as JSON; the figures belong to one moment."""
        with self._lock:
            total, stages, models = self._total, dict(self._stages), dict(self._models)
        return {
            "total": total.to_dict(),
            "stages": {name: cost.to_dict() for name, cost in stages.items()},
            "models": {name: cost.to_dict() for name, cost in models.items()},
        }


def _count(sums: dict[str, StageCost], name: str, entry: CostEntry) -> None:
    if name not in sums and len(sums) >= MOST_NAMES:
        name = OTHERS
    sums[name] = sums.get(name, StageCost()).plus(entry)


def _name(argument: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"CostTracker.add({argument}=)", value, "give its name as text")
    return value


def _tokens(argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"CostTracker.add({argument}=)", value, "give a whole number from 0")
    return value
