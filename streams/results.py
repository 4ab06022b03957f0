"""What a bounded run gives back: data, figures, costs, and the rows that did not make it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ..state.stats import ProcessingStats as ProcessingStats  # noqa: PLC0414 - exported again

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What the run's calls cost. Zero for pipelines whose stages report none."""

    total_cost: Decimal = Decimal(0)
    total_tokens: int = 0
    rows: int = 0


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


@dataclass(frozen=True)
class ExecutionResult:
    """The outcome of a bounded run.

    Attributes:
        data: the results, in the order and with the index of the input.
        metrics: counts and speed, of the whole session, earlier attempts included.
        costs: money and tokens.
        errors: the rows that failed, the first 1,000 of them; ``metrics.failed_rows`` counts all.
        session: the session's id.
        topics: where things are: role (source, sink, dead_letters) to topic.
        start_time, end_time: of this call.
        stages: what happened in stages with policies, by name: calls, retries, time-outs and so on (see
            :class:`~rowmill.handlers.runtime.StageCounts`). Of this call; calls made again after a crash count again.
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
        """Whether every row is done and none was lost to an error."""
        return self.metrics.failed_rows == 0 and self.stopped is None

    @property
    def lost_rows(self) -> list[Any]:
        """The input labels of the rows in ``errors``."""
        return [error.row_index for error in self.errors]
