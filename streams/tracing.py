"""Traces across publish, stages and result, where the process has an OpenTelemetry SDK. The one file that knows it.

What is traced follows OpenTelemetry's conventions for messaging:

* ``publish`` under a current span sends with a PRODUCER span, and every row carries its W3C ``traceparent``;
* a row of a chain that awaits something gets a CONSUMER span, ``process <topic>``, which continues the row's trace or
  begins one; each call of an awaited or policed stage is a span below it, current while the handler runs, so that
  instrumented libraries go on from there; results carry the row's ``traceparent``;
* a call for many rows belongs to many traces: it is a span of its own with links to the rows';
* a chain of plain functions takes thousands of rows in one go, and a span costs more than such a row: there each go
  is one span with links, and results carry the ``traceparent`` that their row came with.

Whether there is anything to trace is decided once per worker (:func:`find_tracing`). Where there is not, nothing of
this is in anybody's way: no stage is wrapped, and OpenTelemetry is not even imported.
"""

from __future__ import annotations

import os
import sys
from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias

from ..handlers.chain import Chain
from ..handlers.context import RowContext
from ..handlers.outcomes import Failure, Outcome
from ..handlers.stage import Stage
from ..state.model import Header, Headers, Record, TopicPartition

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, Tracer

    from ..handlers.flow import Flight, OnDone, OnGivenUp

NAME = "rowmill"
_FIELDS = ("traceparent", "tracestate")
_MOST_LINKS = 128
"""What the SDK keeps of a span's links, where nobody says otherwise."""
_TOLD_CHARACTERS = 500
_ROW_KEY = "rowmill-row"
"""In OpenTelemetry's context: the row whose stage is running."""

_About: TypeAlias = dict[str, str | int]


class RowTrace:
    """A row's span, and the context that spans below it begin in."""

    __slots__ = ("context", "is_over", "span")

    def __init__(self, span: Span, context: Context) -> None:
        self.span = span
        self.context = context
        self.is_over = False


def _tracer() -> Tracer | None:
    """The tracer of the process's provider, if somebody set one."""
    if "opentelemetry.trace" not in sys.modules and "OTEL_PYTHON_TRACER_PROVIDER" not in os.environ:
        return None  # whoever sets a provider has imported it
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return None
    return provider.get_tracer(NAME)


def system_of(url: str) -> str:
    """What traces call a broker."""
    return "kafka" if url.startswith("kafka") else "rowmill"


def find_tracing(*, system: str, group: str, worker: str) -> Tracing | None:
    """What traces a worker's rows; None where the process has no provider of traces.

    Args:
        system: ``kafka`` or ``rowmill``, by the kind of broker.
        group: the consumer group.
        worker: the worker's name.
    """
    tracer = _tracer()
    return None if tracer is None else Tracing(tracer, system=system, group=group, worker=worker)


# --- publishing ------------------------------------------------------------------------------------------------


@contextmanager
def publishing(topic: str, system: str) -> Iterator[Headers]:
    """Around sending rows to a topic: gives the headers that each of them carries. None without a current span."""
    tracer = _tracer()
    if tracer is None:
        yield ()
        return
    from opentelemetry import trace

    if not trace.get_current_span().get_span_context().is_valid:
        yield ()
        return
    about = {"messaging.system": system, "messaging.destination.name": topic, "messaging.operation.name": "send",
             "messaging.operation.type": "send"}  # fmt: skip
    with tracer.start_as_current_span(f"send {topic}", kind=trace.SpanKind.PRODUCER, attributes=about) as span:
        yield _headers_of(trace.set_span_in_context(span))


def _headers_of(context: Context) -> Headers:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return tuple((name, value.encode()) for name, value in carrier.items())


def _context_of(headers: Sequence[Header]) -> Context:
    """The context that a record's headers tell; an empty one where they tell none, or rubbish."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {name: value.decode("ascii", "replace") for name, value in reversed(headers) if name in _FIELDS and value}
    return TraceContextTextMapPropagator().extract(carrier, Context())


# --- processing ------------------------------------------------------------------------------------------------


class Tracing:
    """Traces the rows of one worker.

    Args:
        tracer: makes the spans.
        system: ``kafka`` or ``rowmill``.
        group: the consumer group.
        worker: the worker's name.
    """

    def __init__(self, tracer: Tracer, *, system: str, group: str, worker: str) -> None:
        self._tracer = tracer
        self._about = {
            "messaging.system": system,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.consumer.group.name": group,
            "messaging.client.id": worker,
        }
        self._wrapped: dict[str, tuple[Stage, Stage]] = {}

    # --- rows --------------------------------------------------------------------------------------------------

    def begin(self, context: RowContext, record: Record) -> None:
        """Begin the row's span; results carry it from now on, unless a handler says otherwise."""
        from opentelemetry import trace
        from opentelemetry.context import set_value

        parent = _context_of(record.headers)
        about: _About = {
            **self._about,
            "messaging.destination.name": context.topic,
            "messaging.destination.partition.id": str(context.partition),
            "messaging.kafka.offset": record.offset,
        }
        span = self._tracer.start_span(f"process {context.topic}", parent, trace.SpanKind.CONSUMER, about)
        inside = trace.set_span_in_context(span, parent)
        row = RowTrace(span, inside)
        row.context = set_value(_ROW_KEY, row, inside)
        context.trace = row
        kept = tuple(header for header in context.headers if header[0] not in _FIELDS)
        context.headers = kept + _headers_of(inside)

    def end(self, context: RowContext | None, outcome: Outcome) -> None:
        """The row is through the chain."""
        row: RowTrace | None = context.trace if context is not None else None
        if row is None or row.is_over:
            return
        row.is_over = True
        if isinstance(outcome, Failure):
            _fail(row.span, outcome.kind, f"stage {outcome.stage!r}: {outcome.message}")
            row.span.set_attribute("rowmill.stage", outcome.stage)
        results = len(outcome) if isinstance(outcome, list) else int(isinstance(outcome, dict))
        row.span.set_attribute("rowmill.results", results)
        row.span.end()

    def end_all(self, contexts: Sequence[RowContext] | None, outcomes: Sequence[Outcome]) -> None:
        """The same for rows of a lot; those behind the outcomes did not run, and will be begun again."""
        for place, context in enumerate(contexts or ()):
            if place < len(outcomes):
                self.end(context, outcomes[place])
            else:
                self._give_up(context)

    def _give_up(self, context: RowContext | None) -> None:
        row: RowTrace | None = context.trace if context is not None else None
        if row is not None and not row.is_over:
            row.is_over = True
            row.span.set_attribute("rowmill.given_up", True)
            row.span.end()

    def ending(self, on_done: OnDone) -> OnDone:
        """A flow's ``on_done`` that ends spans as well."""

        def done(flight: Flight) -> Callable[[], Coroutine[Any, Any, None]] | None:
            later = on_done(flight)
            self.end(flight.context, flight.value)
            return later

        return done

    def giving_up(self, on_given_up: OnGivenUp) -> OnGivenUp:
        """A flow's ``on_given_up`` that ends spans as well."""

        def given_up(flights: Sequence[Flight], failure: Failure | None) -> None:
            for flight in flights:
                self._give_up(flight.context)
            on_given_up(flights, failure)

        return given_up

    @contextmanager
    def lot(self, tp: TopicPartition, records: Sequence[Record]) -> Iterator[None]:
        """Around records that run through a chain of plain functions in one go."""
        from opentelemetry import trace
        from opentelemetry.context import Context

        about: _About = {
            **self._about,
            "messaging.destination.name": tp.topic,
            "messaging.destination.partition.id": str(tp.partition),
            "messaging.kafka.offset": records[0].offset,
            "messaging.batch.message_count": len(records),
        }
        contexts = (_context_of(record.headers) for record in records if record.headers)
        links = _links(trace.get_current_span(context).get_span_context() for context in contexts)
        kind = trace.SpanKind.CONSUMER
        with self._tracer.start_as_current_span(f"process {tp.topic}", Context(), kind, about, links):
            yield

    # --- stages ------------------------------------------------------------------------------------------------

    def chain(self, chain: Chain) -> Chain:
        """The chain, its awaited and policed stages made to have spans; rows need contexts then."""
        if chain.is_sync:
            return chain
        return Chain([stage if stage.is_plain else self.stage(stage) for stage in chain.stages])

    def stage(self, stage: Stage) -> Stage:
        """The stage with a span around each call. Also for stages inside of elements, when they are run."""
        known = self._wrapped.get(stage.name)
        if known is not None and (known[0] is stage or known[1] is stage):
            return known[1]
        wrap = self._around_batch if stage.batch is not None else self._around
        traced = replace(stage, call=wrap(stage), takes_context=True)
        self._wrapped[stage.name] = (stage, traced)
        return traced

    def _around(self, stage: Stage) -> Callable[..., Any]:
        bare, takes_context = stage.call, stage.takes_context
        if stage.is_async:

            @wraps(bare)
            async def awaited(row: Any, context: Any) -> Any:
                with self._call(stage.name, context):
                    return await (bare(row, context) if takes_context else bare(row))

            return awaited

        @wraps(bare)
        def called(row: Any, context: Any) -> Any:
            with self._call(stage.name, context):
                return bare(row, context) if takes_context else bare(row)

        return called

    def _around_batch(self, stage: Stage) -> Callable[..., Any]:
        bare, takes_context = stage.call, stage.takes_context
        if stage.is_async:

            @wraps(bare)
            async def awaited(rows: Any, contexts: Any) -> Any:
                with self._batch(stage.name, contexts):
                    return await (bare(rows, contexts) if takes_context else bare(rows))

            return awaited

        @wraps(bare)
        def called(rows: Any, contexts: Any) -> Any:
            with self._batch(stage.name, contexts):
                return bare(rows, contexts) if takes_context else bare(rows)

        return called

    @contextmanager
    def _call(self, stage: str, context: RowContext | None) -> Iterator[None]:
        from opentelemetry.context import get_current, get_value

        # Inside of an element its span is the parent, also where a stage in there gets no context; anything else that
        # is current here belongs to whoever started the worker.
        row: RowTrace | None = context.trace if context is not None else None
        outer = get_value(_ROW_KEY)
        if row is None and outer is None:
            yield
            return
        parent = get_current() if row is None or row is outer else row.context
        with _current(self._tracer.start_span(stage, parent, attributes={"rowmill.stage": stage}), parent):
            yield

    @contextmanager
    def _batch(self, stage: str, contexts: Sequence[RowContext]) -> Iterator[None]:
        from opentelemetry.context import Context

        rows = {id(context.trace): context.trace for context in contexts if context.trace is not None}
        links = _links(row.span.get_span_context() for row in rows.values())
        about: _About = {"rowmill.stage": stage, "messaging.batch.message_count": len(contexts)}
        root = Context()
        with _current(self._tracer.start_span(stage, root, attributes=about, links=links), root):
            yield


def _links(found: Iterable[Any]) -> list[Link]:
    """To the spans that somebody records, as many as are kept."""
    from opentelemetry.trace import Link

    links: list[Link] = []
    for context in found:
        if context.is_valid and context.trace_flags.sampled:
            links.append(Link(context))
            if len(links) == _MOST_LINKS:
                break
    return links


@contextmanager
def _current(span: Span, parent: Context) -> Iterator[None]:
    """Have a span be current, and end with what happens in the block."""
    from opentelemetry import trace
    from opentelemetry.context import attach, detach

    token = attach(trace.set_span_in_context(span, parent))
    is_ours = True
    try:
        yield
    except GeneratorExit:  # the call is being closed by somebody else's context, where nothing was attached
        is_ours = False
        raise
    except CancelledError:  # a time limit, or the end of the worker
        _fail(span, "cancelled", "cancelled")
        raise
    except BaseException as error:
        if isinstance(error, Exception):
            span.record_exception(error)
        _fail(span, type(error).__qualname__, str(error))
        raise
    finally:
        if is_ours:
            detach(token)
        span.end()


def _fail(span: Span, kind: str, message: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, message[:_TOLD_CHARACTERS]))
