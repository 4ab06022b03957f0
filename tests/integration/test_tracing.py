"""Traces from publish over a worker's stages to its results, on a real worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rowmill import Graph, Pipeline, Retry, publish, read
from rowmill.streams import tracing

from .test_worker import running, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """A provider for the length of one test: the process's can be set only once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("rowmill")
    monkeypatch.setattr(tracing, "_tracer", lambda: tracer)
    yield exporter
    provider.shutdown()


def published(url: str, name: str, rows: list[dict[str, Any]]) -> int:
    """Publish under a span of a caller's; gives the id of its trace."""
    tracer = tracing._tracer()
    assert tracer is not None
    with tracer.start_as_current_span("request") as span:
        publish(name, rows, broker=url)
        return span.get_span_context().trace_id


def spans_named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """Those of one name."""
    return [span for span in spans.get_finished_spans() if span.name == name]


def traceparents(url: str, topic: str) -> list[tuple[int, int]]:
    """Of a topic's records: ids of trace and span."""
    found = []
    for message in read(topic, broker=url):
        _, trace_id, span_id, _ = dict(message.headers)["traceparent"].decode().split("-")  # type: ignore[union-attr]
        found.append((int(trace_id, 16), int(span_id, 16)))
    return found


def ids(of: list[ReadableSpan]) -> set[int]:
    """Of spans."""
    return {span.context.span_id for span in of}


def parents(of: list[ReadableSpan]) -> list[int]:
    """Of spans."""
    return [span.parent.span_id for span in of if span.parent is not None]


async def test_from_publish_to_result(broker_url: str, name: str, spans: InMemorySpanExporter) -> None:
    """One trace: request, send, a span per row, one per call, retries included; results go on from their row's span."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out")
    failed: set[int] = set()

    @pipeline.stage
    def clean(row: dict[str, Any]) -> dict[str, Any]:
        return row

    @pipeline.stage(concurrency=8, retry=Retry(3, first=0.01))
    async def score(row: dict[str, Any]) -> dict[str, Any]:
        with trace.get_tracer("library").start_as_current_span("unrecorded"):  # the process has no provider
            await asyncio.sleep(0)
        if row["n"] == 3 and 3 not in failed:
            failed.add(3)
            raise ConnectionError("once")
        if row["n"] == 4:
            raise ValueError("never")
        return row

    trace_id = await asyncio.to_thread(published, broker_url, name, [{"n": n} for n in range(10)])
    async with running(broker_url, pipeline) as worker:
        await until(lambda: worker.stats.rows >= 10)
    (sent,) = spans_named(spans, f"send {name}")
    rows, calls = spans_named(spans, f"process {name}"), spans_named(spans, "score")
    assert {span.context.trace_id for span in [sent, *rows, *calls]} == {trace_id}
    assert parents(rows) == [sent.context.span_id] * 10
    assert len(calls) == 11 + 2  # one came again, one was tried three times
    assert set(parents(calls)) == ids(rows)
    assert not spans_named(spans, "clean")
    (dead,) = [span for span in rows if not span.status.is_unset]
    assert (dead.attributes or {})["error.type"] == "ValueError"
    results = await asyncio.to_thread(traceparents, broker_url, f"{name}.out")
    assert sorted(results) == sorted((trace_id, span.context.span_id) for span in rows if span is not dead)


@pytest.mark.parametrize("ordering", ["key", "partition", "none"])
async def test_orderings_and_batches(tmp_path: Any, name: str, spans: InMemorySpanExporter, ordering: Any) -> None:
    """Whether rows go one by one or in lots, each has its span, and batches have links to all of theirs."""
    url = f"local://{tmp_path}/broker"
    pipeline = Pipeline(name, source=name, sink=f"{name}.out", ordering=ordering)

    @pipeline.stage
    async def wait(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        return row

    @pipeline.stage(batch=5, timeout=5)
    def together(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return rows

    await asyncio.to_thread(publish, name, [{"n": n} for n in range(40)], broker=url)
    async with running(url, pipeline) as worker:
        await until(lambda: worker.stats.rows >= 40)
    rows = spans_named(spans, f"process {name}")
    assert len(rows) == len(spans_named(spans, "wait")) == 40
    assert set(parents(spans_named(spans, "wait"))) == ids(rows)
    assert not parents(rows)
    links = [link.context.span_id for span in spans_named(spans, "together") for link in span.links]
    assert sorted(links) == sorted(ids(rows))
    results = await asyncio.to_thread(traceparents, url, f"{name}.out")
    assert {span_id for _, span_id in results} == ids(rows)


async def test_plain_chains(broker_url: str, name: str, spans: InMemorySpanExporter) -> None:
    """A span per lot, linked to what sent the rows; results carry on what their rows came with."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out").add(lambda row: row, name="same")
    trace_id = await asyncio.to_thread(published, broker_url, name, [{"n": n} for n in range(500)])
    async with running(broker_url, pipeline) as worker:
        await until(lambda: worker.stats.rows >= 500)
    (sent,) = spans_named(spans, f"send {name}")
    lots = spans_named(spans, f"process {name}")
    assert sum((span.attributes or {})["messaging.batch.message_count"] for span in lots) == 500  # type: ignore[misc]
    assert {link.context.span_id for span in lots for link in span.links} == {sent.context.span_id}
    results = await asyncio.to_thread(traceparents, broker_url, f"{name}.out")
    assert set(results) == {(trace_id, sent.context.span_id)}


async def test_elements(tmp_path: Any, name: str, spans: InMemorySpanExporter) -> None:
    """Stages inside of a graph are below the graph's span."""

    async def left(n: int) -> int:
        await asyncio.sleep(0)
        return n + 1

    async def right(n: int) -> int:
        await asyncio.sleep(0)
        return n + 2

    graph = Graph("both")
    graph.add(left).add(right)
    pipeline = Pipeline(name, source=name, sink=f"{name}.out").add(graph, name="both")
    url = f"local://{tmp_path}/broker"
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(3)], broker=url)
    async with running(url, pipeline) as worker:
        await until(lambda: worker.stats.rows >= 3)
    for node in ("both-left", "both-right"):
        assert sorted(parents(spans_named(spans, node))) == sorted(ids(spans_named(spans, "both")))
    assert sorted(parents(spans_named(spans, "both"))) == sorted(ids(spans_named(spans, f"process {name}")))


async def test_a_bounded_run(tmp_path: Any, name: str, spans: InMemorySpanExporter) -> None:
    """Rows of ``run()`` under a caller's span belong to its trace."""
    pipeline = Pipeline(name)

    @pipeline.stage
    async def same(row: dict[str, Any]) -> dict[str, Any]:
        return row

    def run() -> int:
        tracer = tracing._tracer()
        assert tracer is not None
        with tracer.start_as_current_span("notebook") as span:
            pipeline.run([{"n": n} for n in range(20)], broker=f"local://{tmp_path}/broker")
            return span.get_span_context().trace_id

    trace_id = await asyncio.to_thread(run)
    found = spans.get_finished_spans()
    assert {span.context.trace_id for span in found} == {trace_id}
    assert len([span for span in found if span.name == "same"]) == 20
