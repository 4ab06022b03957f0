"""The text for Prometheus: every figure, by the library's own parser, and the table of them in the documentation."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from rowmill.handlers import breaker
from rowmill.handlers.stage_counts import StageCounts
from rowmill.streams import metrics, snapshots
from rowmill.streams.metrics import INFO, METRICS, MetricsPage
from support.observed import ObservedWorker

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"
Labels = dict[str, str]


def scraped(worker: ObservedWorker) -> dict[str, list[tuple[Labels, float]]]:
    """What a Prometheus server would know after a scrape: samples by name."""
    text = MetricsPage(worker).text(worker.snapshot()).decode()
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def words(literal: object) -> tuple[str, ...]:
    """What stands in quotes in a type that is written as text."""
    return tuple(re.findall(r"['\"](\w+)['\"]", str(literal)))


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("rowmill_rows_total", {}, 12),
        ("rowmill_results_total", {}, 9),
        ("rowmill_dropped_rows_total", {}, 1),
        ("rowmill_skipped_rows_total", {}, 2),
        ("rowmill_defaulted_rows_total", {}, 3),
        ("rowmill_dead_letters_total", {}, 4),
        ("rowmill_emitted_rows_total", {}, 5),
        ("rowmill_transactions_total", {}, 6),
        ("rowmill_tokens_total", {}, 7),
        ("rowmill_cost_total", {}, 1.25),
        ("rowmill_events_dropped_total", {}, 11),
        ("rowmill_observer_errors_total", {}, 13),
        ("rowmill_worker_state", {"state": "running"}, 1),
        ("rowmill_worker_state", {"state": "paused"}, 0),
        ("rowmill_worker_start_time_seconds", {}, 1_749_999_000.5),
        ("rowmill_in_flight_rows", {}, 8),
        ("rowmill_in_flight_bytes", {}, 900),
        ("rowmill_oldest_in_flight_seconds", {}, 1.5),
        ("rowmill_commit_seconds", {}, 0.25),
        ("rowmill_partitions", {}, 2),
        ("rowmill_partition_state", {"topic": "reviews", "partition": "1", "state": "opening"}, 1),
        ("rowmill_partition_committed_offset", {"topic": "reviews", "partition": "0"}, 100),
        ("rowmill_partition_position", {"topic": "reviews", "partition": "0"}, 120),
        ("rowmill_partition_buffered_rows", {"topic": "reviews", "partition": "0"}, 20),
        ("rowmill_partition_in_flight_rows", {"topic": "reviews", "partition": "0"}, 5),
        ("rowmill_partition_oldest_in_flight_seconds", {"topic": "reviews", "partition": "1"}, 0),
        ("rowmill_partition_rows_total", {"topic": "reviews", "partition": "0"}, 100),
        ("rowmill_partition_results_total", {"topic": "reviews", "partition": "0"}, 90),
        ("rowmill_partition_dead_letters_total", {"topic": "reviews", "partition": "0"}, 3),
        ("rowmill_stage_rows_total", {"stage": "score"}, 34),
        ("rowmill_stage_out_rows_total", {"stage": "score"}, 33),
        ("rowmill_stage_dropped_rows_total", {"stage": "score"}, 0),
        ("rowmill_stage_failed_rows_total", {"stage": "score"}, 1),
        ("rowmill_stage_call_seconds", {"stage": "score", "quantile": "0.5"}, pytest.approx(0.1, rel=0.03)),
        ("rowmill_stage_call_seconds", {"stage": "score", "quantile": "0.99"}, pytest.approx(1.0, rel=0.03)),
        ("rowmill_stage_calls_total", {"stage": "score"}, 30),
        ("rowmill_stage_seconds_total", {"stage": "score"}, 3.5),
        ("rowmill_stage_retries_total", {"stage": "score"}, 2),
        ("rowmill_stage_timeouts_total", {"stage": "score"}, 1),
        ("rowmill_stage_failures_total", {"stage": "score"}, 1),
        ("rowmill_stage_defaulted_total", {"stage": "score"}, 1),
        ("rowmill_stage_refused_total", {"stage": "score"}, 0),
        ("rowmill_stage_passed_by_total", {"stage": "score"}, 4),
        ("rowmill_stage_cache_hits_total", {"stage": "score"}, 10),
        ("rowmill_breaker_state", {"resource": "api", "state": "half_open"}, 1),
        ("rowmill_breaker_state", {"resource": "api", "state": "open"}, 0),
        ("rowmill_budget_limit", {}, 10),
        ("rowmill_budget_spent", {}, 2.5),
        ("rowmill_budget_reserved", {}, 0.5),
    ],
)
def test_every_figure(name: str, labels: Labels, value: float) -> None:
    """Each figure of a snapshot is scraped under its name and labels."""
    assert (labels, value) in scraped(ObservedWorker())[name]


def test_no_figure_is_left_out_of_the_test_above() -> None:
    """All metrics that are defined were scraped, with the kind that was said."""
    worker = ObservedWorker()
    assert {metric.name for metric in METRICS} <= scraped(worker).keys()
    kinds = {
        sample.name: family.type
        for family in text_string_to_metric_families(MetricsPage(worker).text(worker.snapshot()).decode())
        for sample in family.samples
    }
    assert all(kinds[metric.name] == metric.kind for metric in METRICS)


def test_names_keep_to_the_conventions() -> None:
    """Counters, and only they, end in _total; units are base units; every name begins with the program's; each has
    its own one-line help.
    """
    for metric in METRICS:
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert re.fullmatch(r"rowmill_[a-z_]+[a-z]", metric.name)
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb)\b", metric.name)
        assert metric.about.endswith(".")
        assert "\n" not in metric.about
    assert len({metric.about for metric in METRICS}) == len(METRICS) - 1  # "Rows in work." of worker and partition


def test_the_worker_says_who_it_is() -> None:
    """The info metric carries version, pipeline, session and worker."""
    ((labels, value),) = scraped(ObservedWorker())["rowmill_worker_info"]
    assert set(labels) == set(INFO)
    assert value == 1
    assert (labels["pipeline"], labels["session"], labels["worker"]) == ("reviews", "live", "0a1b2c3d")


def test_what_is_not_known_is_left_out() -> None:
    """No budget, no commit yet, a partition that opens: no sample, rather than a wrong zero."""
    worker = ObservedWorker()
    worker.set(budget=None, commit_seconds=None, partitions=worker.present.partitions[1:], breakers={}, stages={})
    found = scraped(worker)
    for name in ("rowmill_budget_limit", "rowmill_commit_seconds", "rowmill_partition_committed_offset",
                 "rowmill_breaker_state", "rowmill_stage_calls_total"):  # fmt: skip
        assert name not in found
    assert found["rowmill_oldest_in_flight_seconds"] == [({}, 0)]


def test_a_worker_without_partitions() -> None:
    """A spare one has a page like any other."""
    worker = ObservedWorker()
    worker.set(partitions=())
    assert scraped(worker)["rowmill_partitions"] == [({}, 0)]


def test_odd_names_are_escaped() -> None:
    """A resource may be called anything: the page stays readable, and the name comes out as it went in."""
    worker = ObservedWorker()
    odd = 'a "quoted"\nback\\slash ü {x="y"} 1'
    worker.set(breakers={odd: "open"})
    assert ({"resource": odd, "state": "open"}, 1) in scraped(worker)["rowmill_breaker_state"]


def test_nothing_is_shared_in_the_process() -> None:
    """Two workers' pages do not mix, and the library's own registry never hears of either."""
    first, second = ObservedWorker(), ObservedWorker()
    second.set(totals={**second.present.totals, "rows": 99})
    assert scraped(first)["rowmill_rows_total"] == [({}, 12)]
    assert scraped(second)["rowmill_rows_total"] == [({}, 99)]
    assert not [family for family in REGISTRY.collect() if family.name.startswith("rowmill")]


def test_pages_may_be_made_on_several_threads() -> None:
    """The same page object serves threads at once."""
    worker = ObservedWorker()
    page, made = MetricsPage(worker), list[bytes]()
    threads = [threading.Thread(target=lambda: made.append(page.text(worker.present))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    lines = [{line for line in text.splitlines() if line.startswith(b"rowmill_")} for text in made]
    assert len(lines) == 8
    assert all(one == lines[0] for one in lines)


def test_states_are_those_of_the_engine() -> None:
    """The states listed here are those that a snapshot can have, and the fields of stages those of their counts."""
    assert words(snapshots.WorkerState) == metrics.WORKER_STATES
    assert words(breaker.State) == metrics.BREAKER_STATES
    assert words(snapshots.PartitionSnapshot.__annotations__["state"]) == metrics.PARTITION_STATES
    worker = ObservedWorker()
    assert worker.present.stages["score"].keys() == StageCounts().to_dict().keys()
    changed = replace(worker.present, stages={"score": dict.fromkeys(StageCounts().to_dict(), 77)})
    worker.present = changed
    stage_metrics = [metric.name for metric in METRICS if metric.labels == ("stage",)]
    assert all(scraped(worker)[name] == [({"stage": "score"}, 77)] for name in stage_metrics)
    assert len(stage_metrics) == len(StageCounts().to_dict())


def test_the_documentation_lists_them_all() -> None:
    """The table in docs/operations.md is this table, in this order."""
    rows = re.findall(r"^\| `(rowmill_\w+)`(?:\{(.*?)\})? \| (\w+) \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    info = ("rowmill_worker_info", ", ".join(INFO), "gauge")
    assert rows[0][:3] == info
    said = [(name, labels, kind, about) for name, labels, kind, about in rows[1:]]
    assert said == [(metric.name, ", ".join(metric.labels), metric.kind, metric.about) for metric in METRICS]
