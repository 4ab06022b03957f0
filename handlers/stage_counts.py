"""What happens in stages, counted for whoever watches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .outcomes import Failure, Outcome
from .stage import Stage


@dataclass(slots=True)
class StageCounts:
    """What happened in a stage in this worker since it started. Not exactly once: calls count when they are made.

    All stages count rows, calls and what passed them by; the rest is counted for stages with policies only. Rows that a
    stage split count one by one in those behind it.

    Attributes:
        rows: rows that went in and are through, in whatever way; those that ended undone are not counted.
        dropped: of these, those of which nothing came out, on purpose.
        failed: of these, those that failed, and that no fallback saved.
        more: rows that came out beyond one for each of the others.
        calls: calls of the handler, retries included.
        retries: of these, the second and further ones for a row.
        timeouts: calls that took longer than the stage's ``timeout``.
        failures: rows (or batches) that failed for good, before any fallback.
        defaulted: of these, those that went on with a fallback.
        refused: of these, those that met an open breaker.
        passed_by: rows that the stage's ``when`` was not for.
        hits: answers that came from the cache.
        seconds: time spent in calls.
        is_policed: whether the stage has policies.
    """

    rows: int = 0
    dropped: int = 0
    failed: int = 0
    more: int = 0
    calls: int = 0
    retries: int = 0
    timeouts: int = 0
    failures: int = 0
    defaulted: int = 0
    refused: int = 0
    passed_by: int = 0
    hits: int = 0
    seconds: float = 0.0
    is_policed: bool = True

    @property
    def out(self) -> int:
        """Rows that came out: more than went in where rows are split."""
        return self.rows - self.dropped - self.failed + self.more

    def note(self, outcome: Outcome) -> None:
        """A row is through, and this became of it."""
        if isinstance(outcome, Failure):
            if outcome.halts:
                return
            self.failed += 1
        elif not outcome:
            self.dropped += outcome.__class__ is not dict  # a row may be empty
        elif outcome.__class__ is not dict:
            self.more += len(outcome) - 1
        self.rows += 1

    def to_dict(self) -> dict[str, Any]:
        """The figures by name; of a stage without policies those that it has."""
        figures = {name: getattr(self, name) for name in ("rows", "out", "dropped", "failed", "calls", "passed_by")}
        return figures | {name: getattr(self, name) for name in _POLICED} if self.is_policed else figures


_POLICED = ("retries", "timeouts", "failures", "defaulted", "refused", "hits", "seconds")


class Passage:
    """A lot of rows on its way through fused plain stages, row by row.

    Nothing is counted of a row that goes straight through: how many began is known, and so is every one that left. What
    a stage was given is what went into the first one, without those that left before.

    Args:
        stages: the fused stages, in order.
    """

    __slots__ = ("_began", "_left", "stages")

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self._began: dict[str, int] = {}
        self._left: dict[str, StageCounts] = {}

    def went(self, first: Stage, rows: int) -> None:
        """So many rows began at this stage: all that did, or parts of rows that were split before it."""
        self._began[first.name] = self._began.get(first.name, 0) + rows

    def left(self, stage: Stage, outcome: Outcome) -> None:
        """A row did not go straight on behind this stage. What came out of it instead begins anew."""
        counts = self._left.get(stage.name)
        if counts is None:
            counts = self._left[stage.name] = StageCounts()
        counts.calls += 1
        counts.note(outcome)

    def add_to(self, totals: Sequence[StageCounts]) -> None:
        """Add it all to the stages' counts, given in the same order."""
        rows = 0
        for stage, total in zip(self.stages, totals, strict=True):
            rows += self._began.get(stage.name, 0)
            total.rows += rows
            left = self._left.get(stage.name)
            if left is not None:
                rows -= left.calls
                total.rows -= left.calls - left.rows  # of those that ended undone
                total.dropped += left.dropped
                total.failed += left.failed
                total.more += left.more
