"""A worker's figures for Prometheus: which there are, and their text. The one file that knows prometheus-client.

Figures are read from a snapshot when somebody asks, and from nowhere else: nothing is counted for Prometheus' sake, so
a worker that nobody scrapes pays nothing (law 8). Each page has a registry of its own, never the process's: two
workers in one process do not see each other's figures.

Names and units keep to Prometheus' conventions: base units, ``_total`` for what only grows, one meaning per name.
Labels are names that the pipeline's author gave, and partitions that the worker owns: their number is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from .snapshots import PartitionSnapshot, WorkerSnapshot

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family
    from prometheus_client.registry import CollectorRegistry

    from .pipeline import Pipeline
    from .session import Session

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of the text. Every Prometheus reads it; nothing of ours needs the newer formats."""

Sample: TypeAlias = "tuple[tuple[str, ...], float]"
"""Values of the labels, in their order, and the figure."""

WORKER_STATES = ("starting", "running", "pausing", "paused", "stopping", "stopped")
PARTITION_STATES = ("opening", "running", "paused")
BREAKER_STATES = ("closed", "open", "half_open")
QUANTILES = (0.5, 0.95, 0.99)
"""Of the times of calls."""


class Observed(Protocol):
    """What is asked of a worker: see :class:`~rowmill.streams.worker.Worker`."""

    @property
    def pipeline(self) -> Pipeline:
        """What it runs."""
        ...

    @property
    def session(self) -> Session:
        """Which execution of it."""
        ...

    def snapshot(self) -> WorkerSnapshot:
        """How it stands now. Called on the event loop."""
        ...


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure, or one for each combination of its labels' values.

    Attributes:
        name: as it is scraped.
        kind: ``counter`` (only grows, until the worker starts again) or ``gauge``.
        labels: their names.
        about: one line, shown as its HELP text.
        read: takes the figures from a snapshot.
    """

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    about: str
    read: Callable[[WorkerSnapshot], Iterable[Sample]]


# --- where figures come from -----------------------------------------------------------------------------------


def _one(read: Callable[[WorkerSnapshot], float | None]) -> Callable[[WorkerSnapshot], Iterator[Sample]]:
    """A figure without labels; left out where it is None."""

    def samples(snapshot: WorkerSnapshot) -> Iterator[Sample]:
        value = read(snapshot)
        if value is not None:
            yield (), float(value)

    return samples


def _total(field: str) -> Callable[[WorkerSnapshot], Iterator[Sample]]:
    return _one(lambda snapshot: float(snapshot.totals.get(field, 0)))


def _states(
    read: Callable[[WorkerSnapshot], str], known: Iterable[str]
) -> Callable[[WorkerSnapshot], Iterator[Sample]]:
    """1 for the present state, 0 for every other one, so that a state that ended does not linger."""
    return lambda snapshot: (((state,), float(state == read(snapshot))) for state in known)


def _partitions(read: Callable[[PartitionSnapshot], float | None]) -> Callable[[WorkerSnapshot], Iterator[Sample]]:
    def samples(snapshot: WorkerSnapshot) -> Iterator[Sample]:
        for each in snapshot.partitions:
            value = read(each)
            if value is not None:
                yield (each.tp.topic, str(each.tp.partition)), float(value)

    return samples


def _partition_states(snapshot: WorkerSnapshot) -> Iterator[Sample]:
    for each in snapshot.partitions:
        for state in PARTITION_STATES:
            yield (each.tp.topic, str(each.tp.partition), state), float(state == each.state)


def _stages(field: str) -> Callable[[WorkerSnapshot], Iterator[Sample]]:
    def samples(snapshot: WorkerSnapshot) -> Iterator[Sample]:
        for stage, counts in snapshot.stages.items():
            if field in counts:  # stages without policies have some of them only
                yield (stage,), float(counts[field])

    return samples


def _latency(snapshot: WorkerSnapshot) -> Iterator[Sample]:
    for stage, sketch in snapshot.latency.items():
        for fraction in QUANTILES:
            seconds = sketch.quantile(fraction)
            if seconds is not None:
                yield (stage, f"{fraction:g}"), seconds


def _breakers(snapshot: WorkerSnapshot) -> Iterator[Sample]:
    for resource, present in snapshot.breakers.items():
        for state in BREAKER_STATES:
            yield (resource, state), float(state == present)


def _budget(field: str) -> Callable[[WorkerSnapshot], Iterator[Sample]]:
    return _one(lambda snapshot: None if snapshot.budget is None else float(snapshot.budget.get(field, 0)))


def _oldest(snapshot: WorkerSnapshot) -> float:
    return max((each.oldest_seconds or 0.0 for each in snapshot.partitions), default=0.0)


# --- what there is ---------------------------------------------------------------------------------------------

_TP = ("topic", "partition")
_STAGE = ("stage",)

METRICS: tuple[Metric, ...] = (
    Metric("rowmill_rows_total", "counter", (), "Rows whose completion was committed.", _total("rows")),
    Metric("rowmill_results_total", "counter", (), "Results committed to the sink.", _total("results")),
    Metric("rowmill_dropped_rows_total", "counter", (), "Rows that a handler dropped.", _total("dropped")),
    Metric("rowmill_skipped_rows_total", "counter", (), "Rows that failed where on_error is skip.", _total("skipped")),
    Metric("rowmill_defaulted_rows_total", "counter", (), "Results made with a fallback.", _total("defaulted")),
    Metric("rowmill_dead_letters_total", "counter", (), "Rows that became dead letters.", _total("dead_letters")),
    Metric("rowmill_emitted_rows_total", "counter", (), "Rows committed to side topics.", _total("emitted")),
    Metric("rowmill_transactions_total", "counter", (), "Commits.", _total("transactions")),
    Metric("rowmill_cost_total", "counter", (), "Cost of committed rows, in the budget's currency.", _total("cost")),
    Metric("rowmill_tokens_total", "counter", (), "Tokens of committed rows.", _total("tokens")),
    Metric("rowmill_events_dropped_total", "counter", (), "Events that were too many for rowmill.events.",
           _one(lambda snapshot: snapshot.events_dropped)),
    Metric("rowmill_observer_errors_total", "counter", (), "Failures of observers.",
           _one(lambda snapshot: snapshot.observer_errors)),
    Metric("rowmill_worker_state", "gauge", ("state",), "1 for the state that the worker is in, else 0.",
           _states(lambda snapshot: snapshot.state, WORKER_STATES)),
    Metric("rowmill_worker_start_time_seconds", "gauge", (), "When the worker started, in seconds since the epoch.",
           _one(lambda snapshot: snapshot.started_ms / 1000)),
    Metric("rowmill_in_flight_rows", "gauge", (), "Rows in work.", _one(lambda snapshot: snapshot.in_flight)),
    Metric("rowmill_in_flight_bytes", "gauge", (), "Bytes of their values.",
           _one(lambda snapshot: snapshot.in_flight_bytes)),
    Metric("rowmill_oldest_in_flight_seconds", "gauge", (), "How long the oldest row has been in work; 0 if none is.",
           _one(_oldest)),
    Metric("rowmill_commit_seconds", "gauge", (), "How long the last commit took.",
           _one(lambda snapshot: snapshot.commit_seconds)),
    Metric("rowmill_partitions", "gauge", (), "Partitions that the worker owns.",
           _one(lambda snapshot: len(snapshot.partitions))),
    Metric("rowmill_partition_state", "gauge", (*_TP, "state"), "1 for the state that the partition is in, else 0.",
           _partition_states),
    Metric("rowmill_partition_committed_offset", "gauge", _TP, "The committed low watermark.",
           _partitions(lambda each: each.committed)),
    Metric("rowmill_partition_position", "gauge", _TP, "The offset that is read next.",
           _partitions(lambda each: each.position)),
    Metric("rowmill_partition_buffered_rows", "gauge", _TP, "Rows taken and not yet committed.",
           _partitions(lambda each: each.buffered)),
    Metric("rowmill_partition_in_flight_rows", "gauge", _TP, "Rows in work.",
           _partitions(lambda each: each.in_flight)),
    Metric("rowmill_partition_oldest_in_flight_seconds", "gauge", _TP,
           "How long the partition's oldest row has been in work; 0 if none is.",
           _partitions(lambda each: each.oldest_seconds or 0.0)),
    Metric("rowmill_partition_rows_total", "counter", _TP, "Rows committed since the session's beginning.",
           _partitions(lambda each: each.counts.get("rows", 0))),
    Metric("rowmill_partition_results_total", "counter", _TP, "Results committed since the session's beginning.",
           _partitions(lambda each: each.counts.get("results", 0))),
    Metric("rowmill_partition_dead_letters_total", "counter", _TP, "Dead letters since the session's beginning.",
           _partitions(lambda each: each.counts.get("dead_letters", 0))),
    Metric("rowmill_stage_rows_total", "counter", _STAGE, "Rows that went into the stage and are through.",
           _stages("rows")),
    Metric("rowmill_stage_out_rows_total", "counter", _STAGE, "Rows that came out of the stage.", _stages("out")),
    Metric("rowmill_stage_dropped_rows_total", "counter", _STAGE, "Rows that the stage dropped.", _stages("dropped")),
    Metric("rowmill_stage_failed_rows_total", "counter", _STAGE, "Rows that failed in the stage, without a fallback.",
           _stages("failed")),
    Metric("rowmill_stage_call_seconds", "gauge", (*_STAGE, "quantile"),
           "Time of one call, from a sample of the last half minute.", _latency),
    Metric("rowmill_stage_calls_total", "counter", _STAGE, "Calls of the handler, retries included.", _stages("calls")),
    Metric("rowmill_stage_seconds_total", "counter", _STAGE, "Time spent in these calls.", _stages("seconds")),
    Metric("rowmill_stage_retries_total", "counter", _STAGE, "Calls that were a row's second or further one.",
           _stages("retries")),
    Metric("rowmill_stage_timeouts_total", "counter", _STAGE, "Calls that took longer than the stage's timeout.",
           _stages("timeouts")),
    Metric("rowmill_stage_failures_total", "counter", _STAGE, "Rows or batches that failed for good.",
           _stages("failures")),
    Metric("rowmill_stage_defaulted_total", "counter", _STAGE, "Of these, those that went on with a fallback.",
           _stages("defaulted")),
    Metric("rowmill_stage_refused_total", "counter", _STAGE, "Of these, those that met an open breaker.",
           _stages("refused")),
    Metric("rowmill_stage_passed_by_total", "counter", _STAGE, "Rows that the stage's when was not for.",
           _stages("passed_by")),
    Metric("rowmill_stage_cache_hits_total", "counter", _STAGE, "Answers that came from the cache.", _stages("hits")),
    Metric("rowmill_breaker_state", "gauge", ("resource", "state"), "1 for the state that the breaker is in, else 0.",
           _breakers),
    Metric("rowmill_budget_limit", "gauge", (), "The session's budget.", _budget("limit")),
    Metric("rowmill_budget_spent", "gauge", (), "What all workers of the session have spent of it.", _budget("spent")),
    Metric("rowmill_budget_reserved", "gauge", (), "What this worker has reserved for calls under way.",
           _budget("reserved")),
)  # fmt: skip
"""All but ``rowmill_worker_info``, in the order of the page; ``docs/operations.md`` lists them."""

INFO = ("version", "pipeline", "session", "worker")
"""Labels of ``rowmill_worker_info``, whose value is 1: what the other figures are joined with."""


class MetricsPage:
    """Makes the text that Prometheus reads.

    Args:
        worker: whose figures.
    """

    def __init__(self, worker: Observed) -> None:
        from prometheus_client import ProcessCollector

        self._worker = worker
        self._version = _version()
        # Memory, processor time and file descriptors, by the names that every exporter has for them.
        self._process = ProcessCollector(registry=_new_registry())

    def text(self, snapshot: WorkerSnapshot) -> bytes:
        """The page. Takes a while where there are many partitions, and may be called on any thread."""
        from prometheus_client.exposition import generate_latest

        registry = _new_registry()
        registry.register(_Collector(lambda: self._families(snapshot)))
        registry.register(self._process)
        return generate_latest(registry)

    def _families(self, snapshot: WorkerSnapshot) -> Iterator[Family]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        worker = self._worker
        values = (self._version, worker.pipeline.name, worker.session.id, snapshot.worker)
        info = InfoMetricFamily("rowmill_worker", "What this worker is.")
        info.add_metric((), dict(zip(INFO, values, strict=True)))
        yield info
        for metric in METRICS:
            make: Any = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(metric.name, metric.about, labels=metric.labels)
            for labels, value in metric.read(snapshot):
                family.add_metric(labels, value)
            yield family


class _Collector:
    """The library's port."""

    def __init__(self, collect: Callable[[], Iterator[Family]]) -> None:
        self.collect = collect

    def describe(self) -> Iterable[Family]:
        """Nothing: else the library would collect everything once more, to see that no name comes twice."""
        return ()


def _new_registry() -> CollectorRegistry:
    from prometheus_client.registry import CollectorRegistry

    return CollectorRegistry(auto_describe=False)


def _version() -> str:
    try:
        return version("rowmill")
    except PackageNotFoundError:  # run from a folder of sources
        return "unknown"
