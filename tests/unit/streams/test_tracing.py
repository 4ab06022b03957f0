"""Traces of rows: which spans there are, what they hang on, and that nothing happens where nobody asked for any."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from rowmill.handlers.chain import Chain
from rowmill.handlers.context import RowContext
from rowmill.handlers.outcomes import Failure
from rowmill.handlers.stage import Stage, make_stage
from rowmill.state.model import Headers, StoredRecord, TopicPartition
from rowmill.streams import tracing
from rowmill.streams.tracing import Tracing, find_tracing, publishing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


class Spans:
    """A provider of one test's own, and what it recorded."""

    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(self.provider.get_tracer("test"), system="kafka", group="rowmill.reviews", worker="w1")

    @property
    def all(self) -> list[ReadableSpan]:
        """Those that ended."""
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        """The only one of that name."""
        (span,) = [span for span in self.all if span.name == name]
        return span


@pytest.fixture
def spans() -> Iterator[Spans]:
    """Spans that are all recorded."""
    found = Spans()
    yield found
    found.provider.shutdown()


def record(headers: Headers = (), offset: int = 7) -> StoredRecord:
    """A record of topic ``reviews``."""
    return StoredRecord("reviews", 2, offset, 1_000, None, b"{}", headers)


def begun(spans: Spans, headers: Headers = (), kept: Headers = ()) -> RowContext:
    """A row whose span has begun."""
    context = RowContext("reviews", 2, 7, 1_000, None, kept or headers, "live")
    spans.tracing.begin(context, record(headers))
    return context


def parent_of(span: ReadableSpan) -> str | None:
    """The id of its parent."""
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def id_of(span: ReadableSpan) -> str:
    """Its own."""
    return f"{span.context.span_id:016x}"


def traceparent(span: ReadableSpan) -> bytes:
    """How the span is told in a header."""
    return f"00-{span.context.trace_id:032x}-{id_of(span)}-{span.context.trace_flags:02x}".encode()


# --- rows -------------------------------------------------------------------------------------------------------


def test_a_row_continues_its_trace(spans: Spans) -> None:
    """Its span is the child of whoever published it, and results carry the row's own traceparent."""
    context = begun(spans, (("traceparent", PARENT.encode()), ("tracestate", b"a=1"), ("x", b"y")))
    spans.tracing.end(context, {"n": 1})
    span = spans.named("process reviews")
    assert f"{span.context.trace_id:032x}" == TRACE
    assert parent_of(span) == SPAN
    assert span.kind is SpanKind.CONSUMER
    assert dict(context.headers) == {
        "x": b"y", "traceparent": traceparent(span), "tracestate": b"a=1",
    }  # fmt: skip
    assert span.attributes == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.consumer.group.name": "rowmill.reviews",
        "messaging.client.id": "w1",
        "messaging.destination.name": "reviews",
        "messaging.destination.partition.id": "2",
        "messaging.kafka.offset": 7,
        "rowmill.results": 1,
    }


@pytest.mark.parametrize(
    "headers",
    [(), (("traceparent", None),), (("traceparent", b""),), (("traceparent", b"rubbish"),), (("traceparent", b"\xff"),),
     (("Traceparent", PARENT.encode()),), (("traceparent", f"00-{'0' * 32}-{SPAN}-01".encode()),),
     (("traceparent", b"0" * 100_000),)],
)  # fmt: skip
def test_a_row_without_a_trace_begins_one(spans: Spans, headers: Headers) -> None:
    """Where no header tells a trace, or rubbish does, the row's span is a root, whatever runs around the worker."""
    with spans.provider.get_tracer("else").start_as_current_span("of whoever started the worker"):
        context = begun(spans, headers)
        spans.tracing.end(context, None)
    span = spans.named("process reviews")
    assert span.parent is None
    assert dict(context.headers)["traceparent"] == traceparent(span)


def test_of_two_headers_the_first_counts(spans: Spans) -> None:
    """A name may stand there twice."""
    context = begun(spans, (("traceparent", PARENT.encode()), ("traceparent", b"rubbish")))
    spans.tracing.end(context, None)
    assert parent_of(spans.named("process reviews")) == SPAN


@pytest.mark.parametrize(
    ("outcome", "results", "status"),
    [({"n": 1}, 1, StatusCode.UNSET), ([{"n": 1}, {"n": 2}], 2, StatusCode.UNSET), (None, 0, StatusCode.UNSET),
     (Failure("score", "ValueError", "seven " * 500), 0, StatusCode.ERROR)],
)  # fmt: skip
def test_what_became_of_it(spans: Spans, outcome: Any, results: int, status: StatusCode) -> None:
    """The span says how many results there were, or which stage failed with what."""
    context = begun(spans)
    spans.tracing.end(context, outcome)
    spans.tracing.end(context, outcome)  # once is enough
    span = spans.named("process reviews")
    assert span.attributes is not None
    assert span.attributes["rowmill.results"] == results
    assert span.status.status_code is status
    if isinstance(outcome, Failure):
        assert (span.attributes["rowmill.stage"], span.attributes["error.type"]) == ("score", "ValueError")
        assert len(span.status.description or "") == 500


def test_rows_that_are_given_up(spans: Spans) -> None:
    """Of a lot that was cut short, the rows behind say that they will run again."""
    contexts = [begun(spans) for _ in range(3)]
    spans.tracing.end_all(contexts, [{"n": 1}])
    given_up = [bool((span.attributes or {}).get("rowmill.given_up")) for span in spans.all]
    assert given_up == [False, True, True]
    spans.tracing.end_all(None, [{"n": 1}])
    spans.tracing.end(None, None)


def test_what_is_not_sampled_stays_so() -> None:
    """An unsampled row records nothing, and its results say so to whoever reads them."""
    spans = Spans(sampler=ALWAYS_OFF)
    context = begun(spans, (("traceparent", PARENT.encode()),))
    spans.tracing.end(context, {"n": 1})
    assert dict(context.headers)["traceparent"].endswith(b"-00")  # type: ignore[union-attr]
    assert spans.all == []


# --- lots -------------------------------------------------------------------------------------------------------


def test_a_lot_of_plain_functions(spans: Spans) -> None:
    """One span for all, with links to the rows' traces that somebody records."""
    unsampled = f"00-{TRACE}-{SPAN}-00"
    traced = [record((("traceparent", f"00-{TRACE}-{n:016x}-01".encode()),)) for n in range(1, 200)]
    with spans.tracing.lot(
        TopicPartition("reviews", 2), [record(), record((("traceparent", unsampled.encode()),)), *traced]
    ):
        pass
    span = spans.named("process reviews")
    assert span.attributes is not None
    assert span.attributes["messaging.batch.message_count"] == 201
    assert [link.context.span_id for link in span.links] == list(range(1, 129))
    assert span.parent is None


# --- stages -----------------------------------------------------------------------------------------------------


def stage_of(handler: Any, **options: Any) -> Stage:
    """A stage."""
    return make_stage(handler, name="score", **options)


async def test_a_call_is_a_child_of_its_row(spans: Spans) -> None:
    """The stage's span is current while an async handler runs, and what libraries trace in there hangs on it."""
    other = spans.provider.get_tracer("library")

    async def score(row: dict[str, Any]) -> dict[str, Any]:
        with other.start_as_current_span("GET /score"):
            await asyncio.sleep(0)
        return row

    stage = spans.tracing.stage(stage_of(score))
    contexts = [begun(spans) for _ in range(3)]
    with other.start_as_current_span("around the worker"):
        await asyncio.gather(*(stage.call({"n": 1}, context) for context in contexts))
    for context in contexts:
        spans.tracing.end(context, {"n": 1})
    rows = {id_of(span) for span in spans.all if span.name == "process reviews"}
    calls = [span for span in spans.all if span.name == "score"]
    assert {parent_of(span) for span in calls} == rows
    assert {parent_of(span) for span in spans.all if span.name == "GET /score"} == {id_of(span) for span in calls}
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_blocking_call(spans: Spans) -> None:
    """The same on a thread, for a handler that takes the context; what it raises is on the span, and goes on."""

    def score(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        raise ValueError(f"no {row['n']} in {ctx.topic}")

    stage = spans.tracing.stage(stage_of(score, concurrency=2))
    context = begun(spans)
    with pytest.raises(ValueError, match="no 1 in reviews"):
        stage.call({"n": 1}, context)
    span = spans.named("score")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes == {"rowmill.stage": "score", "error.type": "ValueError"}
    assert [event.name for event in span.events] == ["exception"]


async def test_a_call_that_is_cancelled(spans: Spans) -> None:
    """A time limit ends the span as an error."""

    async def score(row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(60)
        return row

    stage = spans.tracing.stage(stage_of(score))
    task = asyncio.create_task(stage.call({}, begun(spans)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert (spans.named("score").attributes or {})["error.type"] == "cancelled"


def test_a_call_that_is_closed_elsewhere(spans: Spans, caplog: pytest.LogCaptureFixture) -> None:
    """A coroutine that nobody awaits any more ends quietly, wherever it is collected."""

    async def score(row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(60)
        return row

    call = spans.tracing.stage(stage_of(score)).call({}, begun(spans))
    asyncio.run(stuck(call))
    call.close()
    assert spans.named("score").end_time is not None
    assert not caplog.records


async def stuck(call: Any) -> None:
    """Begin a call, and leave it where it waits."""
    waiting = call.send(None)
    waiting.cancel()


async def test_batches(spans: Spans) -> None:
    """A call for several rows has links to their spans, a row's only once, and belongs to none of them."""

    async def score(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return rows

    stage = spans.tracing.stage(stage_of(score, batch=10))
    first, second = begun(spans), begun(spans)
    assert await stage.call([{}, {}, {}], [first, first.fork(), second]) == [{}, {}, {}]
    span = spans.named("score")
    links = {link.context.span_id for link in span.links}
    assert links == {context.trace.span.get_span_context().span_id for context in (first, second)}
    assert len(span.links) == 2
    assert span.parent is None


async def test_stages_inside_of_elements(spans: Spans) -> None:
    """Their spans hang on the element's, not on the row's."""
    inner = stage_of(lambda row: row, concurrency=2)

    async def element(row: dict[str, Any], ctx: Any) -> Any:
        return spans.tracing.stage(inner).call(row, ctx.fork())

    outer = spans.tracing.stage(make_stage(element, name="graph"))
    context = begun(spans)
    await outer.call({}, context)
    spans.tracing.end(context, {})
    assert parent_of(spans.named("score")) == id_of(spans.named("graph"))
    assert parent_of(spans.named("graph")) == id_of(spans.named("process reviews"))


async def test_contexts_without_a_trace(spans: Spans) -> None:
    """A chain may be run by hand, with contexts of one's own."""
    stage = spans.tracing.stage(stage_of(lambda row: {**row, "seen": True}, concurrency=2))
    assert stage.call({}, RowContext("t", 0, 0, 0, None, (), "s")) == {"seen": True}
    assert stage.call({}, None) == {"seen": True}
    assert spans.all == []


def test_chains(spans: Spans) -> None:
    """Plain functions are left alone; a stage is wrapped once."""
    plain, awaited = make_stage(lambda row: row, name="plain"), stage_of(lambda row: row, timeout=1)
    quick = Chain([plain])
    assert spans.tracing.chain(quick) is quick
    chain = spans.tracing.chain(Chain([plain, awaited]))
    assert chain.stages[0] is plain
    assert chain.stages[1] is not awaited
    assert spans.tracing.stage(chain.stages[1]) is chain.stages[1]
    assert spans.tracing.stage(awaited) is chain.stages[1]


# --- publishing -------------------------------------------------------------------------------------------------


def test_publishing(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a current span rows carry the traceparent of a span below it; without one they carry nothing."""
    tracer = spans.provider.get_tracer("test")
    monkeypatch.setattr(tracing, "_tracer", lambda: tracer)
    with publishing("reviews", "kafka") as headers:
        assert headers == ()
    assert spans.all == []
    with tracer.start_as_current_span("request"), publishing("reviews", "kafka") as headers:
        pass
    span, outer = spans.named("send reviews"), spans.named("request")
    assert headers == (("traceparent", traceparent(span)),)
    assert parent_of(span) == id_of(outer)
    assert span.kind is SpanKind.PRODUCER
    assert (span.attributes or {})["messaging.destination.name"] == "reviews"


# --- nobody asked -----------------------------------------------------------------------------------------------


def test_without_a_provider() -> None:
    """As long as nobody set a provider there is nothing to trace, also with OpenTelemetry imported."""
    assert find_tracing(system="kafka", group="g", worker="w") is None
    with publishing("reviews", "kafka") as headers:
        assert headers == ()


@pytest.mark.parametrize(
    ("set_up", "found"),
    [
        ("", "None False"),
        ("import opentelemetry.trace", "None True"),
        ("from opentelemetry import trace; trace.set_tracer_provider(trace.NoOpTracerProvider())", "None True"),
        (
            "import opentelemetry.trace as t, opentelemetry.sdk.trace as s; t.set_tracer_provider(s.TracerProvider())",
            "Tracing True",
        ),
        ("import os; os.environ['OTEL_PYTHON_TRACER_PROVIDER'] = 'sdk_tracer_provider'", "Tracing True"),
        ("sys.modules['opentelemetry'] = None; sys.modules['opentelemetry.trace'] = None", "None True"),
    ],
)
def test_in_a_process_of_its_own(set_up: str, found: str) -> None:
    """A provider counts, wherever it was set; without one, OpenTelemetry is not even imported."""
    program = (
        f"import sys\n{set_up}\nfrom rowmill.streams.tracing import find_tracing\n"
        "found = find_tracing(system='kafka', group='g', worker='w')\n"
        "print(type(found).__name__.replace('NoneType', 'None'), 'opentelemetry.trace' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == found, done.stderr
