"""What the console keeps of a session's past: sums per window, and how they are written down.

Pure: no clock, no broker, no Faust. A window holds what was added while it ran; workers tell cumulative figures, so
what is added is the difference to what the worker told before (:func:`increase`). Each window says up to which record
of the events topic it counts (``positions``), so that a record that is read again after a crash is counted in those
windows that lack it and in no other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from ...state.codec import dumps, loads
from ...state.sketch import Sketch

Window: TypeAlias = Literal["10s", "1m", "1h"]
Quantiles: TypeAlias = "tuple[float, float, float]"
Positions: TypeAlias = dict[str, int]
"""The offset behind the last record that is counted, by ``topic/partition``."""

VERSION = 1
MOST_STAGES = 100
MOST_FAILURE_TYPES = 50
OTHER = "other"
QUANTILES = (0.5, 0.95, 0.99)
_MOST_BINS = 1_000
_LARGEST = 2**53
_MOST_DIGITS = 60
"""Behind an amount's point."""


class Span(NamedTuple):
    """How long a window is, and how long it is kept after its end; milliseconds."""

    length_ms: int
    kept_ms: int


SPANS: Mapping[Window, Span] = {
    "10s": Span(10_000, 900_000),
    "1m": Span(60_000, 6 * 3_600_000),
    "1h": Span(3_600_000, 7 * 86_400_000),
}
WINDOWS: tuple[Window, ...] = ("10s", "1m", "1h")


def start_of(window: Window, at_ms: int) -> int:
    """The start of the window that this moment is in."""
    return at_ms - at_ms % SPANS[window].length_ms


def is_expired(window: Window, start_ms: int, now_ms: int) -> bool:
    """Whether such a window is not kept any more."""
    length_ms, kept_ms = SPANS[window]
    return start_ms + length_ms + kept_ms <= now_ms


# -- what workers tell -------------------------------------------------------------------------------------------


class StageTotals(NamedTuple):
    """What a stage did since its worker started."""

    rows: int = 0
    out: int = 0
    dropped: int = 0
    failed: int = 0
    calls: int = 0
    seconds: float = 0.0


class Totals(NamedTuple):
    """What a worker committed since it started."""

    rows: int = 0
    results: int = 0
    dropped: int = 0
    failures: int = 0
    dead_letters: int = 0
    tokens: int = 0
    cost: Decimal = Decimal(0)
    stages: Mapping[str, StageTotals] = {}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Totals:
        """From the data of a ``progress`` or ``worker_stopped``. What is no number counts as 0: anybody may write."""
        totals = data.get("totals")
        totals = totals if isinstance(totals, dict) else {}
        dead_letters = whole(totals.get("dead_letters"))
        return cls(
            whole(totals.get("rows")),
            whole(totals.get("results")),
            whole(totals.get("dropped")),
            dead_letters + whole(totals.get("skipped")),
            dead_letters,
            whole(totals.get("tokens")),
            money(totals.get("cost")),
            _stages_of(data.get("stages")),
        )

    def to_json(self) -> list[Any]:
        """A short form for tables."""
        return [*self[:6], str(self.cost), {name: list(stage) for name, stage in self.stages.items()}]

    @classmethod
    def from_json(cls, value: Any) -> Totals:
        """The counterpart of :meth:`to_json`."""
        *counts, cost, stages = value
        return cls._make([*counts, Decimal(cost), {name: StageTotals._make(stage) for name, stage in stages.items()}])


def _stages_of(value: Any) -> dict[str, StageTotals]:
    if not isinstance(value, dict):
        return {}
    found: dict[str, StageTotals] = {}
    for name, counts in value.items():
        if not isinstance(counts, dict) or len(found) >= MOST_STAGES:
            continue
        calls = whole(counts.get("calls"))
        rows = whole(counts["rows"]) if "rows" in counts else calls - whole(counts.get("retries"))
        failed = whole(counts["failed"]) if "failed" in counts else whole(counts.get("failures"))
        found[name] = StageTotals(
            max(rows, 0),
            whole(counts["out"]) if "out" in counts else max(rows - failed, 0),
            whole(counts.get("dropped")),
            failed,
            calls,
            number(counts.get("seconds")),
        )
    return found


def latencies_of(data: Mapping[str, Any]) -> dict[str, Latency]:
    """The call times by stage, from the data of a ``progress``."""
    told = data.get("latency")
    if not isinstance(told, dict):
        return {}
    return {name: Latency.of(times) for name, times in itertools.islice(told.items(), MOST_STAGES)}


def increase(before: Totals, now: Totals) -> tuple[Totals, Totals]:
    """What was added, and the highest seen so far.

    Figures of one worker only grow (a new start has a new name). One below its forerunner is old: it adds nothing and
    lowers nothing.
    """
    stages, highest = {}, dict(before.stages)
    for name, stage in now.stages.items():
        old = before.stages.get(name) or StageTotals()
        stages[name] = StageTotals._make(map(_added, old, stage))
        highest[name] = StageTotals._make(map(max, old, stage))
    added = Totals._make([*map(_added, before[:7], now[:7]), stages])
    return added, Totals._make([*map(_highest, before[:7], now[:7]), highest])


def _highest(before: Any, now: Any) -> Any:
    return max(before, now)


def _added(before: Any, now: Any) -> Any:
    return now - before if now > before else now - now


def whole(value: Any) -> int:
    """A count, 0 for what is none."""
    return value if type(value) is int and 0 <= value < _LARGEST else 0


def number(value: Any) -> float:
    """A quantity, 0 for what is none."""
    return float(value) if type(value) in (int, float) and 0 <= value < _LARGEST else 0.0


def money(value: Any) -> Decimal:
    """An amount, 0 for what is none, or is so small that to write it out takes any number of zeros."""
    try:
        amount = Decimal(value) if isinstance(value, str) and len(value) < 60 else Decimal(0)
    except InvalidOperation:
        return Decimal(0)
    is_sound = amount.is_finite() and 0 <= amount < _LARGEST and cast(int, amount.as_tuple().exponent) >= -_MOST_DIGITS
    return amount if is_sound else Decimal(0)


# -- windows -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Latency:
    """A sketch of call times as the bare counts of its bins: adding two is adding counts."""

    bins: dict[str, float] = field(default_factory=dict)
    zero: float = 0.0

    @classmethod
    def of(cls, told: Any) -> Latency:
        """What a worker told. Bins that are none are passed over: anybody may write to the topic."""
        if not isinstance(told, dict):
            return cls()
        bins = told.get("bins")
        counts = ((index, number(count)) for index, count in bins.items()) if isinstance(bins, dict) else ()
        found = ((index, count) for index, count in counts if count > 0 and _is_index(index))
        return cls(dict(itertools.islice(found, _MOST_BINS)), number(told.get("zero")))

    def add(self, other: Latency) -> None:
        """Count what another one has counted."""
        self.zero += other.zero
        own = self.bins
        for index, count in other.bins.items():
            if index in own:
                own[index] += count
            elif len(own) < _MOST_BINS:
                own[index] = count

    def quantiles(self) -> Quantiles | None:
        """p50, p95 and p99 in seconds; None without a call.

        The sketch's own search, over bare counts: to build a sketch of thirty bins takes fifty times as long.
        """
        if not self:
            return None
        indices = sorted(self.bins, key=int)
        count = self.zero + sum(self.bins.values())
        p50, p95, p99 = (self._at_rank(q * (count - 1), indices) for q in QUANTILES)
        return p50, p95, p99

    def _at_rank(self, rank: float, indices: list[str]) -> float:
        reached = self.zero
        if rank < reached:
            return 0.0
        for index in indices:
            reached += self.bins[index]
            if reached > rank:
                return _seconds_of(index)
        return _seconds_of(indices[-1]) if indices else 0.0

    def __bool__(self) -> bool:
        return bool(self.bins) or self.zero > 0


@functools.lru_cache(maxsize=4_096)
def _seconds_of(index: str) -> float:
    """What a bin stands for."""
    return Sketch.of({"bins": {index: 1.0}, "zero": 0.0}).quantile(0.5) or 0.0


@functools.lru_cache(maxsize=4_096)
def _is_index(text: Any) -> bool:
    """Whether this is a bin's number: those of 1 ns to 30 years lie between -600 and 600."""
    return (
        isinstance(text, str)
        and len(text) <= 5
        and text.removeprefix("-").isascii()
        and (text.removeprefix("-").isdigit())
    )


@dataclass(slots=True)
class StageSum:
    """What one stage did in a window."""

    rows: int = 0
    out: int = 0
    dropped: int = 0
    failed: int = 0
    calls: int = 0
    seconds: float = 0.0
    latency: Latency = field(default_factory=Latency)
    settled: Quantiles | None = None
    """The quantiles of a window that was written down without its bins."""

    def add(self, told: StageTotals) -> None:
        """Count it."""
        self.rows += told.rows
        self.out += told.out
        self.dropped += told.dropped
        self.failed += told.failed
        self.calls += told.calls
        self.seconds += told.seconds

    def quantiles(self) -> Quantiles | None:
        """p50, p95 and p99 in seconds."""
        return self.latency.quantiles() if self.latency else self.settled


@dataclass(slots=True)
class WindowSum:
    """What happened in one session within one window."""

    start_ms: int
    rows: int = 0
    results: int = 0
    dropped: int = 0
    failures: int = 0
    dead_letters: int = 0
    tokens: int = 0
    cost: Decimal = Decimal(0)
    lag: int | None = None
    stages: dict[str, StageSum] = field(default_factory=dict)
    failed: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """By stage and type: how many rows failed, and when the last one did."""
    positions: Positions = field(default_factory=dict)

    def has_counted(self, tp: str, offset: int) -> bool:
        """Whether this record is in it already."""
        return offset < self.positions.get(tp, 0)

    def add(self, told: Totals, latency: Mapping[str, Latency]) -> None:
        """Count what a worker did, and its calls' times."""
        self.rows += told.rows
        self.results += told.results
        self.dropped += told.dropped
        self.failures += told.failures
        self.dead_letters += told.dead_letters
        self.tokens += told.tokens
        self.cost += told.cost
        for name, stage in told.stages.items():
            self._stage(name).add(stage)
        for name, times in latency.items():
            self._stage(name).latency.add(times)

    def add_failure(self, stage: str, kind: str, at_ms: int) -> None:
        """Count a row that failed."""
        count_failure(self.failed, stage, kind, at_ms)

    def _stage(self, name: str) -> StageSum:
        if name not in self.stages:
            name = name if len(self.stages) < MOST_STAGES else OTHER
        return self.stages.setdefault(name, StageSum())

    def encode(self, *, with_bins: bool) -> bytes:
        """As a table holds it. Without bins it cannot be merged any more, and takes a tenth."""
        stages = {}
        for name, stage in self.stages.items():
            fields: list[Any] = [stage.rows, stage.out, stage.dropped, stage.failed, stage.calls, stage.seconds]
            if with_bins and stage.latency:
                fields.append({"bins": stage.latency.bins, "zero": stage.latency.zero})
            else:
                fields.append(stage.quantiles())
            stages[name] = fields
        counts = [self.rows, self.results, self.dropped, self.failures, self.dead_letters, self.tokens]
        failed = [[stage, kind, *count] for (stage, kind), count in self.failed.items()]
        content = [VERSION, self.start_ms, counts, str(self.cost), self.lag, stages, failed, self.positions]
        return packed(content)

    @classmethod
    def decode(cls, value: bytes) -> WindowSum | None:
        """The counterpart of :meth:`encode`; None for what another version wrote, or what is damaged."""
        try:
            version, start_ms, counts, cost, lag, stages, failed, positions = loads(value)
            if version != VERSION:
                return None
            rows, results, dropped, failures, dead_letters, tokens = counts
            return cls(
                start_ms,
                rows,
                results,
                dropped,
                failures,
                dead_letters,
                tokens,
                Decimal(cost),
                lag,
                {name: _stage_from(fields) for name, fields in stages.items()},
                {(stage, kind): [count, last_ms] for stage, kind, count, last_ms in failed},
                positions,
            )
        except (ValueError, TypeError, AttributeError, InvalidOperation):
            return None


def _stage_from(fields: Any) -> StageSum:
    rows, out, dropped, failed, calls, seconds, times = fields
    stage = StageSum(rows, out, dropped, failed, calls, seconds)
    if isinstance(times, dict):
        stage.latency = Latency(times["bins"], times["zero"])
    elif times:
        p50, p95, p99 = times
        stage.settled = (p50, p95, p99)
    return stage


def count_failure(failed: dict[tuple[str, str], list[int]], stage: str, kind: str, at_ms: int, count: int = 1) -> None:
    """Count failures by stage and type; more than :data:`MOST_FAILURE_TYPES` of them go together as ``other``."""
    if (stage, kind) not in failed and len(failed) >= MOST_FAILURE_TYPES:
        stage, kind = "", OTHER
    entry = failed.setdefault((stage, kind), [0, 0])
    entry[0] += count
    entry[1] = max(entry[1], at_ms)


# -- what is shown -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StagePoint:
    """A stage in a window: rows that entered it, seconds spent in its calls, and their quantiles in seconds."""

    rows: int
    seconds: float
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One window of a session.

    Attributes:
        at_ms: its start.
        rows, results, dropped: what was committed in it.
        failures: rows that became dead letters or were skipped.
        cost: money as text.
        tokens: as handlers count them.
        lag: rows that were left at its end; None where nobody told.
        stages: by name.
    """

    at_ms: int
    rows: int = 0
    results: int = 0
    dropped: int = 0
    failures: int = 0
    cost: str = "0"
    tokens: int = 0
    lag: int | None = None
    stages: Mapping[str, StagePoint] = field(default_factory=dict)

    @classmethod
    def of(cls, window: WindowSum) -> Point:
        """As much of a window as is shown."""
        return cls(
            window.start_ms,
            window.rows,
            window.results,
            window.dropped,
            window.failures,
            plain_money(window.cost),
            window.tokens,
            window.lag,
            {
                name: StagePoint(stage.rows, round(stage.seconds, 6), *(stage.quantiles() or (None, None, None)))
                for name, stage in window.stages.items()
            },
        )


@dataclass(frozen=True, slots=True)
class FailureCount:
    """How many rows failed in a stage with one type of error, and when the last one did."""

    stage: str
    type: str
    count: int
    last_ms: int


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage of the chain within the last minute.

    Attributes:
        name: the stage's.
        rows: that entered it.
        out: that left it.
        dropped: by its handler.
        failed: for good.
        calls_per_second: of its handler; of rows, where calls are not counted.
        p50, p95, p99: of its calls, in seconds; None without one.
    """

    name: str
    rows: int = 0
    out: int = 0
    dropped: int = 0
    failed: int = 0
    calls_per_second: float = 0.0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


def stage_figures(order: Iterable[str], windows: Iterable[WindowSum], seconds: float) -> list[StageFigures]:
    """What the stages did in these windows together, in the order of the chain.

    Args:
        order: the chain's stages; others follow.
        windows: with their bins.
        seconds: how long they are together.
    """
    sums: dict[str, StageSum] = {name: StageSum() for name in order}
    for window in windows:
        for name, stage in window.stages.items():
            total = sums.setdefault(name, StageSum())
            total.add(StageTotals(stage.rows, stage.out, stage.dropped, stage.failed, stage.calls, stage.seconds))
            total.latency.add(stage.latency)
    return [
        StageFigures(
            name,
            total.rows,
            total.out,
            total.dropped,
            total.failed,
            round((total.calls or total.rows) / seconds, 3) if seconds else 0.0,
            *(total.quantiles() or (None, None, None)),
        )
        for name, total in sums.items()
    ]


def packed(value: Any) -> bytes:
    """JSON to be kept. A copy: orjson leaves a text in the buffer that it wrote it into, ten times as large (ran)."""
    return b"%b" % dumps(value)


def plain_money(amount: Decimal) -> str:
    """Without an exponent."""
    return format(amount, "f")
