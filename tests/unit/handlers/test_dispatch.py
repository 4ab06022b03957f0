"""Events: handlers by event type, several in order, and what becomes of events that nobody handles."""

# Handlers here are made for their signatures, not for what they do with their arguments.
# ruff: noqa: ARG005
from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from rowmill.handlers.context import RowContext
from rowmill.handlers.dispatch import Events
from rowmill.handlers.errors import StageFailedError, StopExecution, UnroutedError
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.retry import Retry
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage
from rowmill.state.errors import ConfigError
from support.fake_clock import FakeClock


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    """What a worker shares."""
    pool = BlockingPool(2)
    yield Runtime(pool, FakeClock())
    pool.close()


@pytest.fixture
def ctx(runtime: Runtime) -> RowContext:
    """A row's context."""
    return context(runtime)


def context(runtime: Runtime, *headers: tuple[str, bytes | None]) -> RowContext:
    """A context with these headers."""
    return RowContext("t", 0, 1, 0, "k", headers, "live", runtime=runtime)


def noting(name: str, *, is_async: bool = True) -> Any:
    """A handler that notes in the row that it saw it."""

    def note(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "seen": [*row.get("seen", []), name]}

    async def note_later(row: dict[str, Any]) -> dict[str, Any]:
        return note(row)

    return make_stage(note_later if is_async else note, name=name)


# --- which handlers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_type", "handlers"),
    [
        ("order.created", ("first", "orders", "all", "second")),
        ("order.paid", ("orders", "all")),
        ("order", ("all",)),
        ("unknown", ("all",)),
        ("", ("all",)),
    ],
)
def test_handlers_of_a_type(event_type: str, handlers: tuple[str, ...]) -> None:
    """Those of the type, of a beginning and of everything, in the order they were registered."""
    events = Events()
    for pattern, name in [("order.created", "first"), ("order.*", "orders"), ("*", "all"), ("order.created", "second")]:
        events.on(pattern, noting(name))
    events.default(noting("never"))
    assert events.handlers_of(event_type) == handlers
    assert [stage.name for stage in events.stages] == ["first", "orders", "all", "second", "never"]


async def test_decorated_and_registered(ctx: RowContext) -> None:
    """Sync and async functions, by decorator, by call and by the expected name; they stay functions."""
    events = Events()

    @events.on("a")
    def plain(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "plain": True}

    @events.on("a", retry=Retry(attempts=2), timeout=5, name="other")
    async def awaited(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        return {**row, "key": ctx.key}

    events.register_event_handler("a", noting("third"))
    assert plain({}) == {"plain": True}
    assert await events({"type": "a"}, ctx) == {"type": "a", "plain": True, "key": "k", "seen": ["third"]}
    assert [stage.name for stage in events.stages] == ["plain", "other", "third"]


async def test_one_handler_for_several_types(ctx: RowContext) -> None:
    """A handler may be registered for more than one type: it is one stage, and is called once per event."""
    events = Events()

    @events.on("a")
    @events.on("b")
    @events.on("*")
    async def count(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "n": row.get("n", 0) + 1}

    assert len(events.stages) == 1
    assert await events({"type": "a"}, ctx) == {"type": "a", "n": 1}


async def test_handlers_registered_later_count(ctx: RowContext) -> None:
    """What was looked up before does not hide a handler that comes later."""
    events = Events()
    assert await events({"type": "a"}, ctx) == {"type": "a"}
    events.on("a", noting("late"))
    assert await events({"type": "a"}, ctx) == {"type": "a", "seen": ["late"]}


# --- which type --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "event_type", "unknown"),
    [
        ({"type": "a"}, "a", 0),
        ({"type": "unknown"}, "unknown", 0),
        ({}, "unknown", 1),
        ({"type": None}, "unknown", 1),
        ({"type": ""}, "unknown", 1),
        ({"type": 5}, "unknown", 1),
        ({"type": ["a"]}, "unknown", 1),
    ],
)
async def test_types_in_a_field(row: dict[str, Any], event_type: str, unknown: int, ctx: RowContext) -> None:
    """What is absent or no text is unknown, which handlers can be registered for."""
    events = Events()
    events.on("unknown", noting("unknown"))
    events.on("a", noting("a"))
    assert events.type_of(row) == event_type
    result = await events(row, ctx)
    assert isinstance(result, dict)
    assert result["seen"] == [event_type]
    assert events.counts == {"handled": 1, "unhandled": 0, "unknown": unknown}


@pytest.mark.parametrize(
    ("headers", "event_type"),
    [
        ([("type", b"a")], "a"),
        ([("type", b"a"), ("type", b"b")], "b"),
        ([("type", b"a"), ("type", None)], "unknown"),
        ([("type", "ü".encode())], "ü"),
        ([("type", b"\xff")], "unknown"),
        ([("Type", b"a")], "unknown"),
        ([], "unknown"),
    ],
)
def test_types_in_a_header(headers: list[tuple[str, bytes | None]], event_type: str, runtime: Runtime) -> None:
    """The last header of the name counts; what is absent or not UTF-8 is unknown; the field is not looked at."""
    events = Events(header="type")
    assert events.type_of({"type": "field"}, context(runtime, *headers)) == event_type
    assert events.type_of({"type": "field"}) == "unknown"


async def test_another_field(ctx: RowContext) -> None:
    """The field's name is chosen."""
    events = Events(field="event")
    events.on("a", noting("a"))
    assert await events({"event": "a", "type": "b"}, ctx) == {"event": "a", "type": "b", "seen": ["a"]}


# --- nobody handles it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"type": "x"}, {}])
@pytest.mark.parametrize("unhandled", ["forward", "drop", "fail"])
async def test_events_that_nobody_handles(unhandled: Any, row: dict[str, Any], ctx: RowContext) -> None:
    """They go on, end here or fail, and are counted apart from those that have no type."""
    events = Events(unhandled=unhandled)
    events.on("a", noting("a"))
    if unhandled == "fail":
        with pytest.raises(UnroutedError, match=row.get("type", "unknown")) as caught:
            await events(row, ctx)
        assert caught.value.kind == "no_handlers"
    else:
        assert await events(row, ctx) == (row if unhandled == "forward" else None)
    assert events.counts == {"handled": 0, "unhandled": 1, "unknown": int(not row)}
    assert events.to_dict()["unhandled_types"] == {row.get("type", "unknown"): 1}


async def test_the_default_handles_the_rest(ctx: RowContext) -> None:
    """A default handler gets what no other one wants, and nothing else."""
    events = Events(unhandled="fail")
    events.on("a", noting("a"))

    @events.default
    async def rest(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "seen": ["rest"]}

    for row, handler in (({"type": "a"}, "a"), ({"type": "b"}, "rest"), ({}, "rest")):
        result = await events(row, ctx)
        assert isinstance(result, dict)
        assert result["seen"] == [handler]
    assert events.counts == {"handled": 3, "unhandled": 0, "unknown": 1}


async def test_types_from_outside_are_bounded(ctx: RowContext) -> None:
    """However many types come, figures and look-ups stay bounded."""
    events = Events(unhandled="drop")
    events.on("known.*", noting("known"))
    for number in range(1500):
        await events({"type": f"{'x' * 200}{number}"}, ctx)
        await events({"type": f"t{number}"}, ctx)
        await events({"type": f"known.{number}"}, ctx)
    figures = events.to_dict()
    assert len(figures["unhandled_types"]) == 101
    assert len(figures["types"]) == 257
    assert len(events._known) <= 1000
    assert events.counts == {"handled": 1500, "unhandled": 3000, "unknown": 0}


# --- chain and each ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "result", "called"),
    [
        ({"n": 1}, {"n": 1, "seen": ["last"]}, 1),
        (None, None, 0),
        ([{"n": 1}, {"n": 2}], [{"n": 1, "seen": ["last"]}, {"n": 2, "seen": ["last"]}], 2),
    ],
)
async def test_chain(returned: Any, result: Any, called: int, ctx: RowContext) -> None:
    """By default each handler gets what the one before returned; a dropped row meets no further one."""
    events = Events()
    events.on("a", make_stage(lambda row: returned, name="first"))
    calls: list[int] = []

    @events.on("a")
    async def last(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["n"])
        return {**row, "seen": ["last"]}

    assert await events({"type": "a"}, ctx) == result
    assert len(calls) == called


async def test_each(ctx: RowContext) -> None:
    """With ``each`` every handler gets the event as it came, whatever the others do; results are collected."""

    def spoil(row: dict[str, Any]) -> None:
        row["items"].append(99)
        row.clear()

    events = Events(mode="each")
    events.on("a", make_stage(spoil, name="spoil"))
    events.on("a", make_stage(lambda row: {"total": sum(row["items"])}, name="total"))
    events.on("a", make_stage(lambda row: [{"n": 1}, {"n": 2}], name="several"))
    row = {"type": "a", "items": [1, 2]}
    assert await events(row, ctx) == {
        "type": "a",
        "items": [1, 2],
        "event_report": {
            "event_type": "a",
            "handlers_executed": 3,
            "results": [None, {"total": 3}, [{"n": 1}, {"n": 2}]],
        },
    }
    assert row == {"type": "a", "items": [1, 2]}
    assert await events({"type": "b"}, ctx) == {
        "type": "b",
        "event_report": {"event_type": "b", "status": "no_handlers"},
    }


async def test_reports_of_a_chain(ctx: RowContext) -> None:
    """With ``report=`` results say which type was handled by how many, and events without a handler say so."""
    events = Events(report="told")
    events.on("a", noting("one"))
    events.on("a", noting("two"))
    events.on("split", make_stage(lambda row: [{}, {}], name="split"))
    result = await events({"type": "a"}, ctx)
    assert isinstance(result, dict)
    assert result["told"] == {"event_type": "a", "handlers_executed": 2}
    assert await events({"type": "split"}, ctx) == [{"told": {"event_type": "split", "handlers_executed": 1}}] * 2
    assert await events({"type": "b"}, ctx) == {
        "type": "b",
        "told": {"event_type": "b", "status": "no_handlers"},
    }


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["chain", "each"])
async def test_a_failing_handler_fails_the_row(mode: Any, ctx: RowContext) -> None:
    """The error names handler and type, its options are obeyed, and later handlers are not called."""
    calls = 0
    events = Events(mode=mode)

    @events.on("a", retry=Retry(attempts=3))
    async def boom(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        raise OSError("down")

    events.on("a", make_stage(lambda row: pytest.fail("called"), name="later"))
    with pytest.raises(StageFailedError, match="event 'a': stage 'boom': OSError: down") as caught:
        await events({"type": "a"}, ctx)
    assert (caught.value.failure.stage, caught.value.kind, caught.value.failure.attempts) == ("boom", "OSError", 3)
    assert calls == 3
    figures = events.to_dict()
    assert (figures["handled"], figures["types"]["a"]["rows"], figures["types"]["a"]["failed"]) == (1, 1, 1)


async def test_stopping_passes_through(ctx: RowContext) -> None:
    """A handler can end the session; that is no failure of the type."""

    async def stop(row: dict[str, Any]) -> dict[str, Any]:
        raise StopExecution

    events = Events()
    events.on("a", stop)
    with pytest.raises(StopExecution):
        await events({"type": "a"}, ctx)
    assert events.to_dict()["types"]["a"]["failed"] == 0


async def test_figures_by_type(runtime: Runtime, ctx: RowContext) -> None:
    """Rows, drops and seconds of each type."""
    events = Events()

    @events.on("a")
    async def slow(row: dict[str, Any]) -> dict[str, Any] | None:
        await runtime.clock.sleep(row["s"])
        return None if row["s"] == 1 else row

    await events({"type": "a", "s": 1}, ctx)
    await events({"type": "a", "s": 3}, ctx)
    assert events.to_dict()["types"]["a"] == {
        "rows": 2,
        "failed": 0,
        "dropped": 1,
        "seconds": 4.0,
        "slowest_seconds": 3.0,
        "mean_seconds": 2.0,
    }


# --- mistakes when building --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: Events(field="a", header="b"), "header"),
        (lambda: Events(field=""), "field"),
        (lambda: Events(header=5), "header"),  # type: ignore[arg-type]
        (lambda: Events(report=""), "report"),
        (lambda: Events(mode="all"), "mode"),  # type: ignore[arg-type]
        (lambda: Events(unhandled="skip"), "unhandled"),  # type: ignore[arg-type]
        (lambda: Events().on(""), "event_type"),
        (lambda: Events().on(5), "event_type"),  # type: ignore[call-overload]
        (lambda: Events().on("a*b"), "event_type"),
        (lambda: Events().on("a", 5), "handler"),  # type: ignore[call-overload]
        (lambda: Events().on("a", len, retries=3), "retries"),
        (lambda: Events().on("a", len, batch=3), "batch"),
        (lambda: Events().on("a", len, name="a b"), "name"),
        (lambda: Events().on("a", noting("x"), timeout=1), "finished Stage"),
        (lambda: Events().on("a", make_stage(lambda rows: rows, name="x", batch=2)), "batch"),
        (lambda: _two_of_a_name(lambda row: row, lambda row: {}), "another handler"),
    ],
)
def test_mistakes_are_refused_when_built(wrong: Callable[[], Any], named: str) -> None:
    """Each is a ConfigError that names the setting or the remedy."""
    with pytest.raises(ConfigError, match=named):
        wrong()


def _two_of_a_name(one: Any, other: Any) -> None:
    events = Events()
    events.on("a", one)
    events.on("b", other)
