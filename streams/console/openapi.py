"""The OpenAPI 3.1 description of the API, made from the table that serves it; the shapes of answers stand here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from .routes import Route
from .schemas import Field

VERSION: Final = "1"
"""Of the API, as in its paths: names and types are kept, fields may be added."""

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
WHOLE: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
FLAG: Final[Schema] = {"type": "boolean"}
MONEY: Final[Schema] = {"type": "string", "description": "an amount of money, exact"}
MOMENT: Final[Schema] = {"type": "integer", "description": "milliseconds since the epoch"}
SECONDS: Final[Schema] = {"type": "number", "description": "seconds"}
ANY: Final[Schema] = {"type": "object"}


def maybe(schema: Schema) -> Schema:
    """That, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def listed(schema: Schema) -> Schema:
    """A list of that."""
    return {"type": "array", "items": schema}


def by_name(schema: Schema) -> Schema:
    """An object whose values are that."""
    return {"type": "object", "additionalProperties": schema}


def shape(**properties: Schema) -> Schema:
    """An object with all of these; a name that ends in ``_`` is a keyword of Python without it."""
    named = {name.removesuffix("_"): schema for name, schema in properties.items()}
    return {"type": "object", "properties": named, "required": list(named)}


def of(name: str) -> Schema:
    """A shape by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


SHAPES: Final[Mapping[str, Schema]] = {
    "Error": shape(
        error=shape(setting=maybe(TEXT), value=maybe(TEXT), remedy=maybe(TEXT), message=TEXT),
    ),
    "Health": shape(status=TEXT, history=TEXT, refreshed_ms=maybe(MOMENT)),
    "Document": ANY,
    "Csrf": shape(header=TEXT, token=TEXT),
    "History": shape(state=TEXT, behind_seconds=SECONDS, message=TEXT),
    "Budget": shape(limit=MONEY, spent=MONEY, held=MONEY, fraction=NUMBER),
    "Summary": shape(
        group=TEXT,
        name=TEXT,
        pipeline=TEXT,
        session=TEXT,
        state=TEXT,
        activity=TEXT,
        wanted=TEXT,
        workers=WHOLE,
        partitions=WHOLE,
        lag=WHOLE,
        rate=maybe(NUMBER),
        rows=WHOLE,
        results=WHOLE,
        dead_letters=WHOLE,
        dead_letters_per_minute=maybe(NUMBER),
        cost=MONEY,
        tokens=WHOLE,
        budget=maybe(of("Budget")),
        spark=listed(maybe(NUMBER)),
        alerts=WHOLE,
        is_bounded=FLAG,
        percent=maybe(NUMBER),
        seconds_left=maybe(SECONDS),
        problem=TEXT,
        updated_ms=MOMENT,
        active_ms=maybe(MOMENT),
    ),
    "Overview": shape(
        broker=TEXT,
        kind=TEXT,
        version=TEXT,
        now_ms=MOMENT,
        read_only=FLAG,
        history=of("History"),
        refreshed_ms=maybe(MOMENT),
        refresh_error=maybe(TEXT),
        refresh_seconds=maybe(SECONDS),
        sessions=listed(of("Summary")),
        sessions_left_out=WHOLE,
    ),
    "Stage": shape(
        name=TEXT,
        rows_in=maybe(NUMBER),
        rows_out=maybe(NUMBER),
        dropped=maybe(NUMBER),
        failed=maybe(NUMBER),
        per_second=maybe(NUMBER),
        p50=maybe(SECONDS),
        p95=maybe(SECONDS),
        p99=maybe(SECONDS),
        counters=by_name(NUMBER),
    ),
    "Breaker": shape(name=TEXT, state=TEXT, since_ms=maybe(MOMENT)),
    "Failure": shape(stage=TEXT, type=TEXT, count=WHOLE, last_ms=MOMENT),
    "Alert": shape(rule=TEXT, group=TEXT, subject=TEXT, since_ms=MOMENT, until_ms=maybe(MOMENT), text=TEXT),
    "Session": shape(
        summary=of("Summary"),
        status={"type": "object", "description": "the object of `rowmill status --json`"},
        partitions=listed(ANY),
        stages=listed(of("Stage")),
        breakers=listed(of("Breaker")),
        workers=listed(ANY),
        failures=listed(of("Failure")),
        alerts=listed(of("Alert")),
        topics=shape(sources=listed(TEXT), sink=maybe(TEXT), dead_letters=maybe(TEXT)),
        now_ms=MOMENT,
        refreshed_ms=maybe(MOMENT),
        refresh_error=maybe(TEXT),
        history=of("History"),
    ),
    "Series": shape(
        window_seconds=WHOLE,
        at_ms=listed(MOMENT),
        rows=listed(WHOLE),
        results=listed(WHOLE),
        dropped=listed(WHOLE),
        failures=listed(WHOLE),
        lag=listed(maybe(WHOLE)),
        cost=listed(MONEY),
        tokens=listed(WHOLE),
        stages=by_name(
            shape(
                rows=listed(maybe(WHOLE)),
                p50=listed(maybe(SECONDS)),
                p95=listed(maybe(SECONDS)),
                p99=listed(maybe(SECONDS)),
            )
        ),
    ),
    "Events": shape(
        events=listed(shape(at_ms=MOMENT, kind=TEXT, worker=TEXT, host=TEXT, subject=TEXT, data=ANY)),
    ),
    "Alerts": shape(alerts=listed(of("Alert"))),
    "Answer": shape(session=TEXT, group=TEXT, wanted=TEXT, by=TEXT, at_ms=MOMENT, reason=TEXT),
    "Content": shape(size=WHOLE, text=maybe(TEXT), json=maybe(TEXT), hex=TEXT, base64=TEXT, cut=WHOLE),
    "Header": shape(name=TEXT, value=maybe(of("Content"))),
    "LetterBrief": shape(
        id=TEXT,
        partition=WHOLE,
        offset=WHOLE,
        timestamp_ms=WHOLE,
        status={"type": "string", "enum": ["waiting", "retried", "purged"]},
        stage=TEXT,
        type=TEXT,
        message=TEXT,
        attempts=maybe(WHOLE),
        key=maybe(TEXT),
        session=TEXT,
        came_from=TEXT,
    ),
    "DeadLetters": shape(
        topic=TEXT,
        letters=listed(of("LetterBrief")),
        next=maybe(TEXT),
        counts=listed(shape(stage=TEXT, type=TEXT, count=WHOLE)),
        total=WHOLE,
        waiting=WHOLE,
        scanned=WHOLE,
        complete=FLAG,
    ),
    "DeadLetter": shape(
        id=TEXT,
        partition=WHOLE,
        offset=WHOLE,
        timestamp_ms=WHOLE,
        status=TEXT,
        stage=TEXT,
        type=TEXT,
        message=TEXT,
        attempts=maybe(WHOLE),
        session=TEXT,
        came_from=TEXT,
        topic=TEXT,
        key_text=maybe(TEXT),
        key=maybe(of("Content")),
        value=maybe(of("Content")),
        headers=listed(of("Header")),
        where=TEXT,
        log=TEXT,
        input_row=maybe(WHOLE),
        truncated=maybe(WHOLE),
        mark=maybe(shape(state=TEXT, at_ms=MOMENT, by=TEXT, to=TEXT)),
    ),
    "Outcome": shape(
        running=FLAG,
        dry_run=FLAG,
        matched=WHOLE,
        count=WHOLE,
        done=WHOLE,
        by_type=listed(shape(stage=TEXT, type=TEXT, count=WHOLE)),
        targets=by_name(WHOLE),
        refusals=WHOLE,
        refused=listed(shape(reason=TEXT, count=WHOLE, ids=listed(TEXT))),
        marked_before=WHOLE,
        missing=listed(TEXT),
        taken_over=listed(WHOLE),
    ),
    "Running": shape(
        kind=TEXT,
        group=TEXT,
        by=TEXT,
        started_ms=MOMENT,
        ended_ms=maybe(MOMENT),
        result=maybe(ANY),
        error=maybe(ANY),
        done=WHOLE,
        total=maybe(WHOLE),
        running=FLAG,
    ),
    "Operation": shape(operation=maybe(of("Running"))),
    "ReplayRange": shape(
        first_ms=maybe(MOMENT),
        last_ms=maybe(MOMENT),
        partitions=listed(shape(topic=TEXT, partition=WHOLE, first=WHOLE, end=WHOLE, committed=maybe(WHOLE))),
    ),
    "Move": shape(
        topic=TEXT,
        partition=WHOLE,
        from_=maybe(WHOLE),
        to=maybe(WHOLE),
        run_again=WHOLE,
        skipped=WHOLE,
        rebuilt=WHOLE,
        rebuilds_from=maybe(WHOLE),
        discarded=WHOLE,
        entries=maybe(WHOLE),
        done=FLAG,
        note=TEXT,
    ),
    "Plan": shape(
        plan_id=TEXT,
        expires_ms=MOMENT,
        group=TEXT,
        state=TEXT,
        time_ms=maybe(MOMENT),
        can_execute=FLAG,
        why_not=TEXT,
        workers=maybe(WHOLE),
        paused=FLAG,
        moves=listed(of("Move")),
        run_again=WHOLE,
        skipped=WHOLE,
        rebuilt=WHOLE,
        discarded=WHOLE,
        entries=maybe(WHOLE),
        warnings=listed(TEXT),
    ),
    "Execution": shape(
        running=FLAG,
        moved=listed(of("Move")),
        failed=listed(shape(topic=TEXT, partition=WHOLE, message=TEXT)),
        by=TEXT,
    ),
    "Topics": shape(
        topics=listed(
            shape(name=TEXT, partitions=WHOLE, records=maybe(WHOLE), kind=TEXT, sessions=listed(TEXT)),
        ),
        topics_left_out=WHOLE,
        at_ms=MOMENT,
    ),
    "Records": shape(
        topic=TEXT,
        partitions=listed(shape(partition=WHOLE, first=WHOLE, end=WHOLE)),
        records=listed(
            shape(
                partition=WHOLE,
                offset=WHOLE,
                timestamp_ms=WHOLE,
                key=maybe(of("Content")),
                value=maybe(of("Content")),
                headers=listed(of("Header")),
            )
        ),
        next=maybe(shape(from_=TEXT)),
        complete=FLAG,
    ),
}

_LONG: Final = frozenset({"Outcome", "Execution"})
"""Answers of what may go on after its request: 202 then, and how it stands."""


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The whole description of what is served."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.prefix + route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rowmill console",
            "version": VERSION,
            "description": "Watches and steers the sessions of one broker. Names and types are kept from release to "
            "release; fields may be added. What changes something needs the header X-Rowmill-CSRF and the cookie it "
            "belongs to (GET /api/v1/csrf), or the console's token as Authorization: Bearer.",
        },
        "paths": paths,
        "components": {
            "schemas": dict(SHAPES),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "csrf": {"type": "apiKey", "in": "header", "name": "X-Rowmill-CSRF"},
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "parameters": [
            *(_parameter(name, "path", kind, is_needed=True) for name, kind in route.path_fields.items()),
            *(_parameter(name, "query", kind, is_needed=False) for name, kind in route.query.items()),
        ],
        "responses": _responses(route),
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": bool(route.body.needed),
            "content": {"application/json": {"schema": route.body.schema()}},
        }
        operation["security"] = [{"csrf": []}, {"token": []}]
    elif not route.is_open:
        operation["security"] = [{}, {"token": []}]
    return operation


def _parameter(name: str, place: str, kind: Field, *, is_needed: bool) -> dict[str, Any]:
    # An empty word of a query counts as absent: forms send all of their fields.
    schema = kind.schema() if is_needed else {"anyOf": [kind.schema(), {"const": ""}]}
    return {"name": name, "in": place, "required": is_needed, "schema": schema}


def _responses(route: Route) -> dict[str, Any]:
    if route.is_stream:
        answer: dict[str, Any] = {"description": "events", "content": {"text/event-stream": {"schema": TEXT}}}
    else:
        answer = _json("the answer", of(route.answer))
    responses: dict[str, Any] = {"200": answer}
    if route.answer in _LONG:
        responses["202"] = _json("it goes on: ask for the session's operation", of("Running"))
    if route.name == "health":
        responses["503"] = _json("the sessions cannot be looked up", of("Health"))
    return {**responses, "default": _json("what went wrong: setting, value and remedy", of("Error"))}


def _json(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
