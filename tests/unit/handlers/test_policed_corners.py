"""What a sceptical review of stages with policies found, on virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from decimal import Decimal
from typing import Any, ClassVar

import pytest
from rowmill import Graph
from rowmill.handlers.breaker import CircuitBreaker
from rowmill.handlers.cache import Cache
from rowmill.handlers.chain import Chain, attempt
from rowmill.handlers.context import RowContext
from rowmill.handlers.errors import StageFailedError, StopExecution
from rowmill.handlers.flow import Flight, Flow
from rowmill.handlers.limits import RateLimit
from rowmill.handlers.outcomes import Failure, failure_of
from rowmill.handlers.retry import Retry, is_fault, retry_after_of
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import Stage, make_stage
from support.virtual import passage, virtual, virtual_runtime

pytestmark = pytest.mark.timeout(30)


def flow_of(stages: list[Stage], runtime: Runtime, done: list[Any]) -> Flow:
    """A flow that notes what comes out of it, and when."""
    loop = asyncio.get_running_loop()

    def note(flight: Flight) -> None:
        done.append((flight.sender, loop.time()))

    return Flow(Chain(stages), runtime, note, lambda: None, lambda *_: None, by_key=False, linger=0.02)


def flight(number: int, runtime: Runtime, **fields: Any) -> Flight:
    """A row with a context."""
    context = RowContext("rows", 0, number, 0, None, (), "test", None, runtime)
    return Flight({"n": number, **fields}, context, None, number)


async def down(row: dict[str, Any]) -> Any:
    """A handler that always fails."""
    raise OSError("down")


# --- A: rows or money ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{"retry": 2}, {"fallback": {"x": 1}}, {"when": bool}], ids=str)
def test_what_a_stage_inside_an_element_cost_is_counted_under_every_policy(policy: dict[str, Any]) -> None:
    """Cost that a node reports reaches the row's context, whatever policies its element has."""

    async def node(n: int, ctx: RowContext) -> int:
        ctx.add_cost(Decimal(3), tokens=7)
        return n

    graph = Graph("graph")
    graph.add(node, name="node", outputs=["x"])
    seen = passage([make_stage(graph, name="outer", **policy)], [{"n": 0}])
    assert (seen.contexts[0].cost, seen.contexts[0].tokens) == (Decimal(3), 7)


def test_cost_of_an_inner_call_survives_the_outer_attempts_failure() -> None:
    """An inner cached call is paid once; the outer attempt that paid it fails, and the cost stays the row's."""
    calls: list[int] = []

    async def ask(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.add_cost(Decimal(3))
        return row

    inner = make_stage(ask, name="inner", cache=Cache())

    async def element(row: dict[str, Any], ctx: RowContext) -> Any:
        outcome = await attempt(inner, row, ctx, ctx.runtime)
        calls.append(1)
        if len(calls) == 1:
            raise OSError("later")
        return outcome

    seen = passage([make_stage(element, name="outer", retry=2)], [{"n": 0}])
    assert seen.contexts[0].cost == 3


def test_a_retry_sees_the_row_as_it_was() -> None:
    """What a failed attempt did to its row in place is gone when the next one begins."""
    calls: list[int] = []

    async def rename(row: dict[str, Any]) -> Any:
        row["new"] = row.pop("old")
        calls.append(1)
        if len(calls) == 1:
            raise OSError("once")
        return row

    assert passage([make_stage(rename, name="rename", retry=2)], [{"old": 1}]).outcomes == {0: {"new": 1}}


def test_fields_of_a_fallback_are_each_rows_own() -> None:
    """A list in fallback= that a later stage appends to is not shared by all rows that fell back."""

    def tag(row: dict[str, Any]) -> Any:
        row["tags"].append(row["n"])
        return row

    stages = [make_stage(down, name="down", fallback={"tags": []}), make_stage(tag, name="tag")]
    outcomes = passage(stages, [{"n": n} for n in range(3)]).outcomes
    assert outcomes == {n: {"n": n, "tags": [n]} for n in range(3)}


def test_a_failed_fallback_leaves_no_effects() -> None:
    """What a fallback emitted before it raised does not go out with the row that on_error= saved."""

    def fallback(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.emit("side", {"a": 1})
        raise KeyError("fallback")

    seen = passage([make_stage(down, name="down", fallback=fallback, on_error={"d": 1})], [{"n": 0}])
    assert seen.outcomes == {0: {"n": 0, "d": 1}}
    assert seen.contexts[0].emitted == []


@pytest.mark.parametrize(
    "policy", [{"limit": RateLimit(per_minute=1)}, {"breaker": CircuitBreaker(failures=1, open_for=1_000)}], ids=str
)
def test_no_call_begins_after_the_retrys_deadline(policy: dict[str, Any]) -> None:
    """Waiting for a limit or a breaker counts: a call after the deadline would be cut off at once, and paid."""
    calls: list[int] = []

    async def call(row: dict[str, Any]) -> Any:
        calls.append(1)
        raise OSError("down")

    stage = make_stage(call, name="s", retry=Retry(attempts=5, first=0, deadline=5), **policy)
    seen = passage([stage], [{"n": 0}])
    assert len(calls) == 1
    assert isinstance(seen.outcomes[0], Failure)


# --- B: hangs, crashes, leaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch", "plain"])
def test_nothing_begins_in_a_closed_flow(kind: str) -> None:
    """A handler that swallows its cancellation gives its row to no further stage, and no lingering batch is sent."""

    async def work() -> list[str]:
        calls: list[str] = []
        runtime, done = virtual_runtime(), list[Any]()

        async def stubborn(row: dict[str, Any]) -> Any:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)
            return row

        def plain(row: Any) -> Any:
            calls.append("called")
            return row

        second = make_stage(plain, name="second", batch=2 if kind == "batch" else None)
        flow = flow_of([make_stage(stubborn, name="stubborn"), second], runtime, done)
        flow.enter(flight(1, runtime))
        await asyncio.sleep(1)
        await flow.close()
        await asyncio.sleep(10)
        return calls

    assert virtual(work) == []


def test_a_batch_that_waits_for_company_is_not_sent_after_close() -> None:
    """A partition that is gone calls no handler any more, also for rows that lingered."""

    async def work() -> list[int]:
        calls: list[int] = []

        def handler(rows: Any) -> Any:
            calls.append(len(rows))
            return rows

        runtime = virtual_runtime()
        flow = flow_of([make_stage(handler, name="s", batch=100)], runtime, [])
        flow.enter(flight(1, runtime))
        await flow.close()
        await asyncio.sleep(1)
        return calls

    assert virtual(work) == []


def test_a_cancelled_call_that_raises_something_else_leaves_the_cache_to_others() -> None:
    """A client that turns its cancellation into an error of its own does not keep the lead for ever."""

    async def work() -> list[Any]:
        runtime, done = virtual_runtime(), list[Any]()

        async def call(row: dict[str, Any]) -> Any:
            if row["n"] == 1:
                try:
                    await asyncio.sleep(100)
                except asyncio.CancelledError:
                    raise OSError("connection closed") from None
            return row

        stage = make_stage(call, name="s", retry=3, cache=Cache(inputs=["q"]))
        one, other = flow_of([stage], runtime, done), flow_of([stage], runtime, done)
        one.enter(flight(1, runtime, q=1))
        await asyncio.sleep(1)
        other.enter(flight(2, runtime, q=1))
        await asyncio.sleep(1)
        await one.close()
        await asyncio.sleep(1_000)
        return [sender for sender, _ in done]

    assert virtual(work) == [2]


def test_rows_behind_one_that_ends_the_session_are_given_up() -> None:
    """A batch stage that stops the session leaves none of its rows neither done nor given up."""

    def split(row: dict[str, Any]) -> Any:
        return [{"n": row["n"], "part": part} for part in range(2)]

    async def stop(rows: Any) -> Any:
        raise StopExecution("enough")

    seen = passage([make_stage(split, name="split"), make_stage(stop, name="stop", batch=2)], [{"n": 0}, {"n": 1}])
    assert sorted(seen.given_up) == [0, 1]


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("option", ["when", "fallback"])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_whatever_a_users_function_raises_is_the_rows_failure(
    error: BaseException, option: str, is_async: bool
) -> None:
    """SystemExit and CancelledError of a condition or fallback are treated as those of handlers are."""

    def function(row: dict[str, Any]) -> Any:
        raise error

    def plain(row: dict[str, Any]) -> Any:
        raise OSError("down")

    policy: dict[str, Any] = {option: function}
    seen = passage([make_stage(down if is_async else plain, name="s", **policy)], [{"n": 0}])
    assert isinstance(seen.outcomes[0], Failure)


class Odd(Exception):  # noqa: N818
    """Has a property that raises."""

    @property
    def response(self) -> object:
        raise RuntimeError("no response set")


class Mute(Exception):  # noqa: N818
    """Cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Later(Exception):  # noqa: N818
    """Asks for a pause."""

    def __init__(self, retry_after: object) -> None:
        super().__init__("later")
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("error", "policy"),
    [
        (OSError("x"), {"breaker": CircuitBreaker(on=lambda error: error.status >= 500)}),  # type: ignore[attr-defined]
        (Odd("x"), {"breaker": CircuitBreaker()}),
        (Odd("x"), {"limit": RateLimit(per_second=1)}),
        (Mute("x"), {}),
        (Mute("x"), {"retry": 2}),
        (Later("Wed, 21 Oct 99999999999999 07:28:00 GMT"), {"limit": RateLimit(per_second=1)}),
        (Later(10**400), {"limit": RateLimit(per_second=1)}),
        (Later(["3"]), {"limit": RateLimit(per_second=1)}),
        (Later(object()), {"limit": RateLimit(per_second=1)}),
    ],
    ids=["breaker-on", "odd-breaker", "odd-limit", "mute", "mute-retry", "year", "huge", "list", "object"],
)
def test_an_error_that_cannot_be_judged_fails_its_row_alone(error: Exception, policy: dict[str, Any]) -> None:
    """A policy that stumbles over a user's error or function never takes the worker down."""

    async def call(row: dict[str, Any]) -> Any:
        raise error

    seen = passage([make_stage(call, name="s", **policy)], [{"n": 0}])
    assert isinstance(seen.outcomes[0], Failure)


@pytest.mark.parametrize("option", ["units", "price"])
def test_a_probe_that_never_called_gives_its_place_back(option: str) -> None:
    """A row whose units or price cannot be told does not leave the breaker half open for ever."""
    calls: list[int] = []

    async def call(row: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("down")
        return row

    def amount(row: dict[str, Any]) -> Any:
        return None if row.get("bad") else 1

    policies: dict[str, Any] = {"price": amount}
    if option == "units":
        policies = {"limit": RateLimit(units_per_second=100, units=amount)}
    stage = make_stage(call, name="s", breaker=CircuitBreaker(failures=1, open_for=10), **policies)
    # Whichever row is woken first is the probe: all but the very last are bad.
    rows = [{"n": 0}, {"n": 1, "bad": 1}, {"n": 2}, {"n": 3, "bad": 1}]
    assert sorted(passage([stage], rows).outcomes) == [0, 1, 2, 3]


def test_a_probe_that_waits_for_money_keeps_no_other_stage_from_probing() -> None:
    """A stage that shares the breaker and costs nothing goes on while the paid one waits for its budget."""

    async def work() -> list[int]:
        runtime, done, calls = virtual_runtime(), list[Any](), list[int]()

        class Penniless:
            def try_reserve(self, amount: Decimal) -> None:
                return None

            def changed(self) -> asyncio.Future[None]:
                return asyncio.get_running_loop().create_future()

        async def paid(row: dict[str, Any]) -> Any:
            return row

        async def free(row: dict[str, Any]) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise OSError("down")
            return row

        breaker = CircuitBreaker(failures=1, open_for=10, name="api")
        stages = [
            make_stage(paid, name="paid", breaker=breaker, price="1", when=lambda row: row["n"] == 9),
            make_stage(free, name="free", breaker=breaker, when=lambda row: row["n"] != 9),
        ]
        runtime.account = Penniless()  # type: ignore[assignment]
        flow = flow_of(stages, runtime, done)
        for number, pause in ((0, 10.5), (9, 1), (2, 1_000)):
            flow.enter(flight(number, runtime))
            await asyncio.sleep(pause)
        runtime.account = None
        await flow.close()
        return [sender for sender, _ in done]

    assert virtual(work) == [0, 2]


def test_a_row_that_waits_inside_an_element_keeps_no_other_out() -> None:
    """Ten rows of a graph that back off for an hour hold none of its slots."""

    class Busy(Exception):  # noqa: N818
        retry_after = 3_600

    async def node(n: int) -> int:
        if n < 10:
            raise Busy
        return n

    graph = Graph("graph")
    graph.add(node, name="node", outputs=["x"], retry=2)
    rows = [{"n": n} for n in range(11)]
    seen = passage([make_stage(graph, name="outer")], rows, keys=[str(n) for n in range(11)])
    assert seen.seconds[10] < 60


# --- C: pace, order, messages --------------------------------------------------------------------------------------


def test_rows_that_waited_for_a_breaker_go_on_in_their_order() -> None:
    """The oldest row is the first to be tried: it is what holds the checkpoint back."""
    calls: list[int] = []

    async def call(row: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("down")
        return row

    stage = make_stage(call, name="s", breaker=CircuitBreaker(failures=1, open_for=10), concurrency=1)
    rows = [{"n": n} for n in range(8)]
    assert passage([stage], rows, keys=list(range(8))).order == list(range(8))


def test_an_elements_error_tells_status_and_retry_after_of_the_inner_one() -> None:
    """A 429 inside a router neither counts against the router's breaker nor loses its Retry-After header."""

    class Response:
        headers: ClassVar = {"Retry-After": "7"}
        status_code = 429

    class Refused(Exception):  # noqa: N818
        response = Response()

    stage = make_stage(down, name="inner")
    error = StageFailedError(failure_of(stage, Refused("429")), "inner failed")
    assert retry_after_of(error, 0) == 7
    assert not is_fault(error)


def most_within_a_second(times: list[float]) -> int:
    """The most calls that began within one second."""
    return max(sum(1 for time in times if begin <= time < begin + 1) for begin in times)
