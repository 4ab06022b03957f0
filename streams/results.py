"""What a bounded run gives back: data, figures, costs, and the rows that did not make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ..state.context import checked_cost
from ..state.stats import ProcessingStats as ProcessingStats  # noqa: PLC0414 - exported again

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What the session's calls cost. Zero for pipelines whose stages report none.

    Attributes:
        total_cost: money, exact: what is committed with the rows, earlier attempts included.
        total_tokens: tokens, likewise.
        rows: rows that gave a result.
        by_stage: what the calls of this attempt cost by stage, where that was counted: those made again after a crash
            count again, and stages without policies are missing, so it need not sum up to ``total_cost``.

    Raises:
        ConfigError: a cost is a float or no amount of at least 0.
    """

    total_cost: Decimal = Decimal(0)
    total_tokens: int = 0
    rows: int = 0
    by_stage: Mapping[str, Decimal] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_cost", checked_cost(self.total_cost, "CostEstimate(total_cost=)"))
        by_stage = {name: checked_cost(cost, "CostEstimate(by_stage=)") for name, cost in self.by_stage.items()}
        object.__setattr__(self, "by_stage", by_stage)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; money is text, so that it stays exact."""
        return {
            "total_cost": str(self.total_cost),
            "total_tokens": self.total_tokens,
            "rows": self.rows,
            "by_stage": {name: str(cost) for name, cost in self.by_stage.items()},
        }


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """A row that failed: which one, where, why, and where its dead letter lies.

    ``row_index`` is the row's label in the input's index (its number, for a file or an iterable), or None when the row
    did not come from this run's input. ``value`` is the row as it came, in bytes. ``where`` is the line of the
    handler's file that raised the error, where there is one.
    """

    row_index: Any
    stage_name: str
    error_type: str
    error_message: str
    attempts: int
    dead_letter: str
    value: bytes | None
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON: a label that has no form there is text, and so are the row's bytes, with � for what is no UTF-8."""
        return {
            "row_index": _plain_label(self.row_index),
            "stage_name": self.stage_name,
            "error_type": self.error_type,
            "error_message": self.error_message,
            "attempts": self.attempts,
            "dead_letter": self.dead_letter,
            "value": None if self.value is None else self.value.decode("utf-8", "replace"),
            "where": self.where,
        }


def _plain_label(label: Any) -> Any:
    """An index label as JSON has it: numpy's integers are integers."""
    plain = label.item() if hasattr(label, "item") else label
    return plain if plain is None or isinstance(plain, (str, int, float, bool)) else str(label)


@dataclass(frozen=True)
class ExecutionResult:
    """The outcome of a bounded run.

    Attributes:
        data: the results, in the order and with the index of the input.
        metrics: counts and speed, of the whole session, earlier attempts included.
        costs: money and tokens.
        errors: the rows that failed, the first 1,000 of them; ``metrics.failed_rows`` counts all, and
            ``unnamed_errors`` those that are not among them.
        session: the session's id.
        topics: where things are: role (source, sink, dead_letters) to topic.
        start_time, end_time: of this call.
        stages: what happened in stages, by name: rows, calls, retries, time-outs and so on (see
            :class:`~rowmill.handlers.stage_counts.StageCounts`). Of this call; calls made again after a crash count
            again.
        stopped: why the session ended before its last row (a handler raised StopExecution), or None. Its topics are
            kept; :meth:`~rowmill.Pipeline.run` with ``session=`` goes on with it.
    """

    data: pd.DataFrame
    metrics: ProcessingStats
    costs: CostEstimate
    errors: list[ErrorInfo]
    session: str
    topics: dict[str, str]
    start_time: datetime
    end_time: datetime
    metadata: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: str | None = None

    @property
    def duration(self) -> timedelta:
        """How long this call took."""
        return self.end_time - self.start_time

    @property
    def error_rate(self) -> float:
        """Failed rows as a fraction of all, from 0.0 to 1.0; 0.0 when there were none."""
        return self.metrics.failed_rows / self.metrics.total_rows if self.metrics.total_rows else 0.0

    @property
    def is_complete(self) -> bool:
        """Whether every row is done and none became a dead letter.

        Rows that a stage with ``on_error="skip"`` gave up are done: that is what it asks for.
        """
        done = self.metrics.completed_rows >= self.metrics.total_rows
        return done and self.metrics.failed_rows == 0 and self.stopped is None

    @property
    def lost_rows(self) -> list[Any]:
        """The input labels of the rows in ``errors``."""
        return [error.row_index for error in self.errors]

    @property
    def unnamed_errors(self) -> int:
        """Rows that failed and are not in ``errors``, for there are too many: a session with a name keeps them all,
        as dead letters.
        """
        return max(0, self.metrics.failed_rows - len(self.errors))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the data, as JSON, as far as ``metadata`` is."""
        return {
            "session": self.session,
            "is_complete": self.is_complete,
            "stopped": self.stopped,
            "start_time": self.start_time.isoformat(),
            "end_time": self.end_time.isoformat(),
            "duration_seconds": self.duration.total_seconds(),
            "metrics": self.metrics.to_dict(),
            "costs": self.costs.to_dict(),
            "error_rate": self.error_rate,
            "errors": [error.to_dict() for error in self.errors],
            "unnamed_errors": self.unnamed_errors,
            "topics": dict(self.topics),
            "stages": {name: dict(counts) for name, counts in self.stages.items()},
            "metadata": dict(self.metadata),
        }
