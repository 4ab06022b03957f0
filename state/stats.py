"""How many rows went which way, and how fast: the figures that contexts and bounded runs report alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ProcessingStats:
    """Row counts and speed of a session.

    Every row that is done is in exactly one of ``processed_rows`` (at least one result), ``dropped_rows`` (its handler
    gave none, on purpose), ``skipped_rows`` (it failed in a stage that says ``on_error="skip"``) and ``failed_rows`` (a
    dead letter); at the end they sum up to ``total_rows``. ``defaulted_rows`` are those of the processed ones in which
    some stage failed and its fallback took its place.

    ``results`` may be more than ``processed_rows``, for a row may have several; None where nobody counted them: an
    ExecutionContext counts rows only. The first six are in ondine's order; name the others.
    """

    total_rows: int
    processed_rows: int
    failed_rows: int
    skipped_rows: int
    rows_per_second: float = 0.0
    total_duration_seconds: float = 0.0
    dropped_rows: int = 0
    defaulted_rows: int = 0
    results: int | None = None

    @property
    def completed_rows(self) -> int:
        """Rows that are done, whatever became of them."""
        return self.processed_rows + self.failed_rows + self.skipped_rows + self.dropped_rows

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as JSON."""
        return asdict(self)
