"""What the console shows of sessions, as plain values: the JSON of its API, which its pages use as well.

Times are milliseconds since the epoch and their names end in ``_ms``; money is text; what nobody knows is None. What
counts comes from ``status.py`` and is exact; rates over time, percentiles and failures by type come from the board,
which knows what events told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..status import SessionStatus
from .contents import shown_text

if TYPE_CHECKING:
    from ..event_records import EventRecord
    from .board import Alert, Standing
    from .series import FailureCount, Point, StageFigures

SPARK_WINDOWS, SPARK_SECONDS = 60, 10
"""How many windows of how many seconds a session's small drawing has: the last ten minutes."""
MOST_STAGES = 200
"""Stages of a session that are shown; events may name any number."""


class View:
    """A value with the JSON form of its fields; a field's ``metadata["name"]`` is its name there, if it has one."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            each.metadata.get("name", each.name): _plain(getattr(self, each.name))
            for each in fields(self)  # type: ignore[arg-type]  # all that inherit from it are dataclasses
        }


def _plain(value: Any) -> Any:
    if isinstance(value, View):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return value


@dataclass(frozen=True, slots=True)
class BudgetView(View):
    """A session's budget: ``fraction`` of the limit is spent, 0 to 1 and, where calls cost more than leased, above."""

    limit: str
    spent: str
    held: str
    fraction: float

    @classmethod
    def of(cls, status: SessionStatus) -> BudgetView | None:
        """Of a session; None where it has no ledger."""
        budget = status.budget
        if budget is None:
            return None
        fraction = float(budget.spent / budget.limit) if budget.limit else 1.0
        return cls(f"{budget.limit:f}", f"{budget.spent:f}", f"{budget.held:f}", round(fraction, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(View):
    """One session in a line.

    Attributes:
        group: its consumer group.
        name: how people name it.
        pipeline, session: the pipeline's name and the session's id.
        state, activity: what it does, and the word for it (``pausing`` on the way to ``paused``).
        wanted: what is wanted of it: ``run``, ``pause`` or ``cancel``.
        workers, partitions: how many it has.
        lag: what is left to do, in offsets.
        rate: rows per second lately; None where no worker says.
        rows, results, dead_letters: exact, since its beginning.
        dead_letters_per_minute: new ones in the last minute; None where it has not been watched for long enough.
        cost, tokens: of completed rows.
        budget: None where it has none.
        spark: rows per second in each of the last 60 windows of 10 s, the oldest first; None: nothing is known.
        alerts: how many are open.
        is_bounded, percent, seconds_left: of a session with an end.
        problem: why something of it could not be read; "" for nothing.
        updated_ms: when this was looked up.
        active_ms: its last sign of life; None if there is none.
    """

    group: str
    name: str
    pipeline: str
    session: str
    state: str
    activity: str
    wanted: str
    workers: int
    partitions: int
    lag: int
    rate: float | None
    rows: int
    results: int
    dead_letters: int
    dead_letters_per_minute: float | None
    cost: str
    tokens: int
    budget: BudgetView | None
    spark: Sequence[float | None]
    alerts: int
    is_bounded: bool
    percent: float | None
    seconds_left: float | None
    problem: str
    updated_ms: int
    active_ms: int | None

    @classmethod
    def of(
        cls, status: SessionStatus, *, spark: Sequence[float | None], alerts: int, dead_letters_per_minute: float | None
    ) -> Summary:
        """Of a session's status, with what the history adds."""
        record = status.record
        return cls(
            group=record.group,
            name=status.reference,
            pipeline=record.pipeline,
            session=record.session,
            state=status.state.value,
            activity=status.activity,
            wanted=record.wanted.value,
            workers=len(status.workers),
            partitions=len(status.partitions),
            lag=status.lag,
            rate=rounded(status.rate),
            rows=status.rows.rows,
            results=status.rows.results,
            dead_letters=status.rows.dead_letters,
            dead_letters_per_minute=rounded(dead_letters_per_minute),
            cost=f"{status.cost:f}",
            tokens=status.tokens,
            budget=BudgetView.of(status),
            spark=spark,
            alerts=alerts,
            is_bounded=record.is_bounded,
            percent=rounded(status.percent),
            seconds_left=rounded(status.left_seconds),
            problem=shown_text(status.problem),
            updated_ms=status.at_ms,
            active_ms=status.active_ms,
        )


@dataclass(frozen=True, slots=True)
class HistoryView(View):
    """How far the part of the console is that keeps what events told."""

    state: str
    behind_seconds: float
    message: str

    @classmethod
    def of(cls, standing: Standing) -> HistoryView:
        """As the board has it."""
        return cls(standing.state, round(standing.behind_seconds, 1), shown_text(standing.message))


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview(View):
    """All sessions.

    Attributes:
        broker: its URL without secrets.
        kind, version: the broker's.
        now_ms: when this was asked for.
        read_only: whether nothing can be changed from here.
        history: how far the history is.
        refreshed_ms: when the sessions were looked up last; None before the first time.
        refresh_error: why the last attempt failed; None if it did not.
        refresh_seconds: how long the last look took.
        sessions: the first 500.
        sessions_left_out: how many more there are.
    """

    broker: str
    kind: str
    version: str
    now_ms: int
    read_only: bool
    history: HistoryView
    refreshed_ms: int | None
    refresh_error: str | None
    refresh_seconds: float | None
    sessions: Sequence[Summary]
    sessions_left_out: int


@dataclass(frozen=True, slots=True)
class StageView(View):
    """One stage: counts since the session's live workers started, rate and times of its calls over the last minute.

    Attributes:
        name: the stage's.
        rows_in, rows_out, dropped, failed: None where no live worker counts them.
        per_second: calls of its handler in the last minute, by the second.
        p50, p95, p99: seconds that a call took; None where nobody says.
        counters: all that workers count of it, as ``rowmill status`` has it: attempts, retries, waits and the like.
    """

    name: str
    rows_in: float | None = None
    rows_out: float | None = None
    dropped: float | None = None
    failed: float | None = None
    per_second: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    counters: Mapping[str, float] = field(default_factory=dict)


def stages_of(
    status: SessionStatus, figures: Sequence[StageFigures], so_far: Sequence[StageFigures] = ()
) -> list[StageView]:
    """A session's stages in the chain's order; behind them those that only events name.

    Args:
        status: with what its workers count since they started.
        figures: of the last minute.
        so_far: of the past, for a session whose workers are gone.
    """
    by_name = {each.name: each for each in figures}
    names = list(dict.fromkeys([*status.record.stages, *status.stages, *by_name]))[:MOST_STAGES]
    counters: Mapping[str, Mapping[str, float]] = status.stages or {
        each.name: {"rows": each.rows, "out": each.out, "dropped": each.dropped, "failed": each.failed}
        for each in so_far
    }
    return [_stage(name, counters.get(name, {}), by_name.get(name)) for name in names]


def _stage(name: str, counters: Mapping[str, float], figures: StageFigures | None) -> StageView:
    return StageView(
        name=shown_text(name),
        rows_in=counters.get("rows"),
        rows_out=counters.get("out"),
        dropped=counters.get("dropped"),
        failed=counters.get("failed"),
        per_second=None if figures is None else rounded(figures.calls_per_second),
        p50=None if figures is None else rounded(figures.p50, 6),
        p95=None if figures is None else rounded(figures.p95, 6),
        p99=None if figures is None else rounded(figures.p99, 6),
        counters=counters,
    )


@dataclass(frozen=True, slots=True)
class BreakerView(View):
    """A circuit breaker: the worst state over all workers."""

    name: str
    state: str
    since_ms: int | None = None


@dataclass(frozen=True, slots=True)
class FailureView(View):
    """How often rows failed in a stage with one type of error, over the time that was asked for."""

    stage: str
    type: str
    count: int
    last_ms: int

    @classmethod
    def of(cls, failure: FailureCount) -> FailureView:
        """As the board has it."""
        return cls(shown_text(failure.stage), shown_text(failure.type), failure.count, failure.last_ms)


@dataclass(frozen=True, slots=True)
class AlertView(View):
    """Something that somebody should look at; ``until_ms`` is None while it is so."""

    rule: str
    group: str
    subject: str
    since_ms: int
    until_ms: int | None
    text: str

    @classmethod
    def of(cls, alert: Alert) -> AlertView:
        """As the board has it."""
        return cls(
            shown_text(alert.rule),
            shown_text(alert.group),
            shown_text(alert.subject),
            alert.since_ms,
            alert.until_ms,
            shown_text(alert.text),
        )


@dataclass(frozen=True, slots=True)
class EventView(View):
    """One event of a worker."""

    at_ms: int
    kind: str
    worker: str
    host: str
    subject: str
    data: Mapping[str, Any]

    @classmethod
    def of(cls, event: EventRecord) -> EventView:
        """As it was written, cut where it is long."""
        data = {shown_text(name): cut_values(value) for name, value in event.data.items()}
        return cls(
            event.at_ms,
            shown_text(event.kind),
            shown_text(event.worker),
            shown_text(event.host),
            shown_text(event.subject),
            data,
        )


def cut_values(value: Any, depth: int = 0) -> Any:
    """JSON as it came from a topic, long texts, long lists and deep values cut short."""
    if isinstance(value, str):
        return shown_text(value)
    if isinstance(value, Mapping):
        if depth >= _DEEPEST:
            return "…"
        return {shown_text(name): cut_values(each, depth + 1) for name, each in list(value.items())[:_MOST_ITEMS]}
    if isinstance(value, list):
        return [cut_values(each, depth + 1) for each in value[:_MOST_ITEMS]] if depth < _DEEPEST else "…"
    return value


_DEEPEST, _MOST_ITEMS = 6, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView(View):
    """One session in detail; ``status`` is the object of ``rowmill status --json``."""

    summary: Summary
    status: Mapping[str, Any]
    partitions: Sequence[Mapping[str, Any]]
    stages: Sequence[StageView]
    breakers: Sequence[BreakerView]
    workers: Sequence[Mapping[str, Any]]
    failures: Sequence[FailureView]
    alerts: Sequence[AlertView]
    topics: Mapping[str, Any]
    now_ms: int
    refreshed_ms: int | None
    refresh_error: str | None
    history: HistoryView


def topics_of(status: SessionStatus) -> dict[str, Any]:
    """The topics that a session reads and writes."""
    record = status.record
    return {"sources": list(record.sources), "sink": record.sink or None, "dead_letters": record.dead_letters or None}


# --- series ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Series(View):
    """Figures over time in columns, as charts take them: one entry in each for each window that is known.

    Attributes:
        window_seconds: how long a window is.
        at_ms: when each began.
        rows, results, dropped, failures, cost, tokens: in each window.
        lag: at the end of each.
        stages: by name ``rows``, ``p50``, ``p95``, ``p99``; times in seconds.
    """

    window_seconds: int
    at_ms: Sequence[int]
    rows: Sequence[int]
    results: Sequence[int]
    dropped: Sequence[int]
    failures: Sequence[int]
    lag: Sequence[int | None]
    cost: Sequence[str]
    tokens: Sequence[int]
    stages: Mapping[str, Mapping[str, Sequence[float | None]]]

    @classmethod
    def of(cls, points: Sequence[Point], window_seconds: int) -> Series:
        """Of the points of one session, oldest first."""
        names = list(dict.fromkeys(name for point in points for name in point.stages))[:MOST_STAGES]
        return cls(
            window_seconds=window_seconds,
            at_ms=[point.at_ms for point in points],
            rows=[point.rows for point in points],
            results=[point.results for point in points],
            dropped=[point.dropped for point in points],
            failures=[point.failures for point in points],
            lag=[point.lag for point in points],
            cost=[point.cost for point in points],
            tokens=[point.tokens for point in points],
            stages={shown_text(name): _stage_columns(points, name) for name in names},
        )


def _stage_columns(points: Sequence[Point], name: str) -> dict[str, list[float | None]]:
    found = [point.stages.get(name) for point in points]
    columns: dict[str, list[float | None]] = {"rows": [None if each is None else each.rows for each in found]}
    for figure in ("p50", "p95", "p99"):
        columns[figure] = [None if each is None else rounded(getattr(each, figure), 6) for each in found]
    return columns


def spark_of(points: Sequence[Point], now_ms: int) -> list[float | None]:
    """Rows per second in the last 60 whole windows of 10 s, the oldest first."""
    width = SPARK_SECONDS * 1000
    first = now_ms // width - SPARK_WINDOWS
    spark: list[float | None] = [None] * SPARK_WINDOWS
    for point in points:
        place = point.at_ms // width - first
        if 0 <= place < SPARK_WINDOWS:
            spark[place] = round(point.rows / SPARK_SECONDS, 2)
    return spark


def rounded(number: float | None, digits: int = 3) -> float | None:
    """A figure without noise."""
    return None if number is None else round(number, digits)
