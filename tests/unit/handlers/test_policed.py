"""Stages with policies, alone and together, on virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from email.utils import formatdate
from itertools import combinations, pairwise
from typing import Any

import pytest
from rowmill.handlers.breaker import CircuitBreaker
from rowmill.handlers.cache import Cache
from rowmill.handlers.chain import Chain
from rowmill.handlers.context import RowContext
from rowmill.handlers.errors import StopExecution
from rowmill.handlers.flow import Flow
from rowmill.handlers.limits import RateLimit
from rowmill.handlers.outcomes import Failure, Outcome
from rowmill.handlers.retry import Retry
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage
from rowmill.state.errors import ConfigError
from simulation.machine import EPOCH_MS
from support.virtual import passage, virtual, virtual_runtime


class ServerError(Exception):
    """What a client raises for an answer that is none."""

    def __init__(self, status: int = 500, retry_after: object = None) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.retry_after = retry_after


def script(*steps: Any) -> Callable[[dict[str, Any]], Any]:
    """A handler whose n-th call does the n-th step: raise it, wait so many seconds, or (then, and at the end) pass."""
    calls = iter(steps)

    async def follow(row: dict[str, Any]) -> Any:
        step = next(calls, None)
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, (int, float)):
            await asyncio.sleep(step)
        return {**row, "done": True}

    return follow


DONE = {"n": 0, "done": True}


# --- retry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "retry", "outcome", "calls"),
    [
        ((), Retry(attempts=3), DONE, 1),
        ((ServerError(),), Retry(attempts=3), DONE, 2),
        ((ServerError(), OSError("x")), Retry(attempts=3), DONE, 3),
        ((ServerError(), ServerError(), ServerError()), Retry(attempts=3), "ServerError", 3),
        ((ServerError(404),), Retry(attempts=3), "ServerError", 1),
        ((ServerError(429),), Retry(attempts=3), DONE, 2),
        ((ServerError(408),), Retry(attempts=3), DONE, 2),
        ((TypeError("x"),), Retry(attempts=3), "TypeError", 1),
        ((TypeError("x"),), Retry(attempts=3, on=TypeError), DONE, 2),
        ((ServerError(),), Retry(attempts=3, on=(OSError, KeyError)), "ServerError", 1),
        ((ServerError(404),), Retry(attempts=3, on=lambda error: "404" in str(error)), DONE, 2),
        ((ServerError(),), Retry(attempts=3, on=lambda error: error.nothing), DONE, 2),  # type: ignore[attr-defined]
        ((SystemExit(2),), Retry(attempts=3), "SystemExit", 1),
        ((asyncio.CancelledError(),), Retry(attempts=3), "CancelledError", 1),
        ((ServerError(),), Retry(attempts=1), "ServerError", 1),
    ],
)
def test_which_errors_are_retried(steps: Any, retry: Retry, outcome: Any, calls: int) -> None:
    """Classes, statuses and what an error says of itself decide; its message never does."""
    seen = passage([make_stage(script(*steps), name="ask", retry=retry)], [{"n": 0}])
    found = seen.outcomes[0]
    if isinstance(found, Failure):
        assert (found.kind, found.attempts) == (outcome, calls)
    else:
        assert found == outcome
    assert seen.counts("ask")["calls"] == calls


@pytest.mark.parametrize("seed", range(20))
def test_full_jitter(seed: int) -> None:
    """Each pause lies between 0 and the exponential one, which the cap ends; two seeds differ."""
    errors = [ServerError() for _ in range(6)]
    seen = passage([make_stage(script(*errors), name="ask", retry=Retry(7, first=1.0, cap=8.0))], [{"n": 0}], seed=seed)
    assert seen.outcomes[0] == DONE
    assert 0 < seen.seconds[0] < 1 + 2 + 4 + 8 + 8 + 8
    other = passage(
        [make_stage(script(*errors), name="ask", retry=Retry(7, first=1.0, cap=8.0))], [{"n": 0}], seed=seed + 1
    )
    assert other.seconds[0] != seen.seconds[0]


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        (7, 7.0), (2.5, 2.5), ("7", 7.0), (b"7", 7.0), (formatdate(EPOCH_MS / 1000 + 60, usegmt=True), 60.0),
        (formatdate(EPOCH_MS / 1000 - 60, usegmt=True), 0.0), ("soon", 0.0), ("inf", 0.0), (-3, 0.0), (True, 0.0),
    ],
)  # fmt: skip
def test_retry_after_is_obeyed(asked: object, seconds: float) -> None:
    """Seconds and HTTP dates are lower bounds of the pause, beyond the cap too; nonsense is not obeyed."""
    stage = make_stage(script(ServerError(429, asked)), name="ask", retry=Retry(2, first=0.0, cap=1.0))
    assert passage([stage], [{"n": 0}]).seconds[0] == pytest.approx(seconds, abs=1.1)


def test_retry_after_beyond_the_deadline_fails_at_once() -> None:
    """Who asks for more time than there is gets no second call, and nobody waits for nothing."""
    stage = make_stage(script(ServerError(429, 100)), name="ask", retry=Retry(2, deadline=30))
    seen = passage([stage], [{"n": 0}])
    assert isinstance(seen.outcomes[0], Failure)
    assert seen.seconds[0] < 0.1


def test_the_deadline_ends_a_running_call() -> None:
    """All calls together never take longer than the deadline."""
    stage = make_stage(script(ServerError(), 100), name="ask", retry=Retry(9, first=0.0, deadline=5))
    seen = passage([stage], [{"n": 0}])
    assert isinstance(seen.outcomes[0], Failure)
    assert seen.outcomes[0].kind == "HandlerTimeoutError"
    assert seen.seconds[0] == pytest.approx(5, abs=0.1)


def test_a_waiting_row_holds_no_slot_and_only_its_own_key() -> None:
    """With one slot, a row that backs off for a minute delays only the rows of its key, which keep their order."""
    failed: set[int] = set()

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 0 and 0 not in failed:
            failed.add(0)
            raise ServerError(503, 60)
        return row

    stage = make_stage(ask, concurrency=1, retry=Retry(2))
    seen = passage([stage], [{"n": n} for n in range(12)], keys=["a" if n % 3 == 0 else f"b{n}" for n in range(12)])
    assert [n for n in seen.order if n % 3 == 0] == [0, 3, 6, 9]
    assert all(seen.seconds[n] < 0.1 for n in range(12) if n % 3)
    assert all(seen.seconds[n] >= 60 for n in range(0, 12, 3))


def test_effects_of_attempts_that_failed_are_gone() -> None:
    """What a failed attempt emitted, or set as key, is forgotten; what it cost is not."""
    tries = iter(range(3))

    async def ask(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        number = next(tries)
        ctx.emit("side", {"try": number})
        ctx.key = f"key-{number}" if number != 1 else ctx.key
        ctx.headers = {"try": str(number)}
        ctx.add_cost(1, 10)
        if number < 2:
            raise ServerError
        return row

    seen = passage([make_stage(ask, retry=Retry(3))], [{"n": 0}])
    context = seen.contexts[0]
    assert [emit.row for emit in context.emitted] == [{"try": 2}]
    assert (context.key, context.headers) == ("key-2", (("try", b"2"),))
    assert (context.cost, context.tokens) == (Decimal(3), 30)


# --- time-outs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_timeout_per_attempt(asynchronous: bool) -> None:
    """Each attempt has its own time limit; an async handler sees its cancellation."""
    cancelled = []

    async def hang(row: dict[str, Any]) -> dict[str, Any]:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.append(row["n"])
            raise
        return row

    stage = make_stage(hang, name="ask", timeout=3, retry=Retry(3, first=0.0))
    seen = passage([stage], [{"n": 0}])
    found = seen.outcomes[0]
    assert isinstance(found, Failure)
    assert (found.kind, found.attempts) == ("HandlerTimeoutError", 3)
    assert seen.seconds[0] == pytest.approx(9, abs=0.1)
    assert cancelled == [0, 0, 0]
    assert seen.counts("ask") == {"calls": 3, "retries": 2, "timeouts": 3, "failures": 1}


# --- breakers --------------------------------------------------------------------------------------------------


def test_a_breaker_opens_probes_and_closes() -> None:
    """Five failures open it; nothing is called for half a minute; one probe goes through, and then the rest."""
    calls: list[float] = []

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(asyncio.get_running_loop().time())
        if len(calls) <= 5:
            raise ServerError
        await asyncio.sleep(1)
        return row

    stage = make_stage(ask, concurrency=2, breaker=CircuitBreaker(failures=5, open_for=30))
    seen = passage([stage], [{"n": n} for n in range(20)])
    assert Counter(isinstance(outcome, Failure) for outcome in seen.outcomes.values()) == {True: 5, False: 15}
    assert [time for time in calls if 0.1 < time < 30] == []
    assert sum(30 <= time < 31 for time in calls) == 1
    assert sum(31 <= time < 31.5 for time in calls) == 2
    assert [event.kind for event in seen.events] == ["breaker_open", "breaker_half_open", "breaker_closed"]
    assert seen.events[0].detail == {"failures": 5, "open_for": 30.0}


def test_a_probe_that_fails_opens_it_again() -> None:
    """As long as probes fail, one call goes out per ``open_for``."""
    calls: list[float] = []

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(asyncio.get_running_loop().time())
        if len(calls) < 5:
            raise ServerError
        return row

    stage = make_stage(ask, breaker=CircuitBreaker(failures=1, open_for=10), retry=Retry(9, first=0.0), concurrency=1)
    seen = passage([stage], [{"n": n} for n in range(3)])
    assert [round(time) for time in calls[:5]] == [0, 10, 20, 30, 40]
    assert all(not isinstance(outcome, Failure) for outcome in seen.outcomes.values())


@pytest.mark.parametrize(
    ("when_open", "expected"),
    [("fail", "BreakerOpenError"), ("fallback", {"score": None})],
)
def test_what_rows_meet_at_an_open_breaker(when_open: Any, expected: Any) -> None:
    """They fail or take the fallback at once, without a call."""

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        raise ServerError

    fallback = {"score": None} if when_open == "fallback" else None
    stage = make_stage(ask, concurrency=1, breaker=CircuitBreaker(2, when_open=when_open), fallback=fallback)
    seen = passage([stage], [{"n": n} for n in range(6)])
    assert seen.counts("ask")["calls"] == 2
    assert seen.counts("ask")["refused"] == 4
    last = seen.outcomes[5]
    assert (last.kind if isinstance(last, Failure) else last) == (
        expected if when_open == "fail" else {"n": 5, "score": None}
    )
    assert max(seen.seconds.values()) < 0.1


def test_a_breaker_by_failure_rate() -> None:
    """Half of the calls within the window, and enough of them, open it; successes between do not keep it closed."""
    state = []

    async def ask(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        state.append(ctx.runtime.breakers["ask"].state)
        if row["n"] % 2:
            raise ServerError
        return row

    breaker = CircuitBreaker(failures=None, rate=0.5, window=60, minimum=10, open_for=5)
    seen = passage([make_stage(ask, concurrency=1, breaker=breaker)], [{"n": n} for n in range(12)])
    assert next(event.kind for event in seen.events) == "breaker_open"
    assert seen.events[0].detail == {"failed": 5, "calls": 10, "open_for": 5.0}
    assert [seen.seconds[n] < 1 for n in range(12)] == [True] * 10 + [False] * 2


def test_mistakes_and_429_do_not_open_a_breaker() -> None:
    """A 404, a bug and a plea to slow down do not speak against the resource."""
    errors = [ServerError(404), TypeError("x"), ServerError(429), NameError("x")] * 5
    stage = make_stage(script(*errors[:-1]), name="ask", concurrency=1, breaker=CircuitBreaker(failures=2))
    seen = passage([stage], [{"n": n} for n in range(19)])
    assert seen.events == []


def test_stages_that_share_a_breaker() -> None:
    """A named breaker that one stage's failures open holds the other back."""

    async def good(row: dict[str, Any]) -> dict[str, Any]:
        return row

    shared = CircuitBreaker(failures=3, name="api", open_for=60)
    first = make_stage(script(*[ServerError()] * 3), name="first", breaker=shared, on_error={"first": None})
    second = make_stage(good, name="second", breaker=shared)
    seen = passage([first, second], [{"n": n} for n in range(3)])
    assert min(seen.seconds.values()) >= 60
    with pytest.raises(ConfigError, match="has the same name"):
        Chain([first, make_stage(good, breaker=CircuitBreaker(failures=4, name="api"))])


def test_a_probe_that_is_given_up_frees_its_place() -> None:
    """A flow that closes while its row is the probe does not keep the breaker half open for ever."""

    async def main() -> str:
        runtime = virtual_runtime()
        stage = make_stage(
            script(ServerError(), 1_000), name="ask", retry=Retry(3, first=0.0), breaker=CircuitBreaker(1, open_for=1)
        )

        def flow() -> Flow:
            return Flow(
                Chain([stage]), runtime, lambda _: None, lambda: None, lambda *_: None, by_key=False, linger=0.0
            )

        from rowmill.handlers.flow import Flight

        first = flow()
        first.enter(Flight({"n": 0}, RowContext("t", 0, 0, 0, None, (), "s", None, runtime), None, 0))
        await asyncio.sleep(5)
        breaker = runtime.breakers["ask"]
        assert (breaker.state, breaker.admit()) == ("half_open", None)
        await first.close()
        assert breaker.admit() is not None
        return "done"

    assert virtual(main) == "done"


# --- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "rows", "seconds"),
    [
        (RateLimit(per_second=10), 21, 2.0),
        (RateLimit(per_second=10, burst=11), 21, 1.0),
        (RateLimit(per_minute=60), 5, 4.0),
        (RateLimit(units_per_second=100, units=20), 15, 2.0),
        (RateLimit(units_per_minute=600, units=lambda row: 100 + row["n"] * 0, unit_burst=100), 7, 60.0),
        (RateLimit(per_second=100, units_per_second=10, units=5, unit_burst=5), 5, 2.0),
    ],
)
def test_pace(limit: RateLimit, rows: int, seconds: float) -> None:
    """The last of so many calls begins when the limit lets it, and no slot is held meanwhile."""

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        return row

    seen = passage([make_stage(ask, limit=limit, concurrency=1)], [{"n": n} for n in range(rows)])
    assert max(seen.seconds.values()) == pytest.approx(seconds, abs=0.05)


def test_no_second_has_more_calls_than_allowed() -> None:
    """Over any second, retries included, no more calls begin than the rate and the burst together."""
    times: list[float] = []

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        times.append(asyncio.get_running_loop().time())
        if len(times) % 3 == 0:
            raise ServerError
        await asyncio.sleep(0.3)
        return row

    stage = make_stage(ask, limit=RateLimit(per_second=20, burst=5), retry=Retry(20, first=0.05), concurrency=50)
    passage([stage], [{"n": n} for n in range(200)])
    assert len(times) > 250
    for time in times:
        assert sum(time <= other < time + 1 for other in times) <= 20 + 5 + 1


def test_retry_after_holds_the_whole_resource() -> None:
    """When the server asks for ten seconds, no row calls it before; afterwards they go at the usual pace."""
    times: list[float] = []

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        times.append(asyncio.get_running_loop().time())
        if len(times) == 3:
            raise ServerError(429, 10)
        return row

    stage = make_stage(ask, limit=RateLimit(per_second=10), retry=Retry(3), concurrency=1)
    seen = passage([stage], [{"n": n} for n in range(10)])
    assert all(not isinstance(outcome, Failure) for outcome in seen.outcomes.values())
    late = [time for time in times if time > 1]
    assert min(late) >= 10
    assert all(b - a >= 0.09 for a, b in pairwise(late))


def test_reported_tokens_take_the_place_of_estimated_ones() -> None:
    """A limit of tokens is paid with what the handler reports, not with what was guessed."""

    async def ask(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        ctx.add_cost(0, tokens=100)
        return row

    limit = RateLimit(units_per_second=100, units=1, unit_burst=1)
    seen = passage([make_stage(ask, limit=limit, concurrency=1)], [{"n": n} for n in range(5)])
    assert max(seen.seconds.values()) == pytest.approx(4, abs=0.1)


# --- fallback, on_error, when ----------------------------------------------------------------------------------


def fails(row: dict[str, Any]) -> dict[str, Any]:
    """A plain handler that fails for odd numbers."""
    if row["n"] % 2:
        raise ServerError
    return {**row, "ok": True}


async def fails_later(row: dict[str, Any]) -> dict[str, Any]:
    """The same, async."""
    return fails(row)


def fails_batch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, for a batch of one."""
    return [fails(row) for row in rows]


def other(row: dict[str, Any]) -> dict[str, Any]:
    """A plain fallback."""
    return {**row, "other": True}


async def other_later(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
    """An async fallback."""
    return {**row, "other": ctx.offset == row["n"]}


def broken(row: dict[str, Any]) -> dict[str, Any]:
    """A fallback that fails as well."""
    raise KeyError("fallback")


EVEN = {"n": 0, "ok": True}


@pytest.mark.parametrize(
    "how",
    [
        (fails, {}), (fails_later, {}), (fails, {"timeout": 9}), (fails, {"concurrency": 3}), (fails, {"retry": 2}),
        (fails_later, {"retry": 2}), (fails_batch, {"batch": 1}), (fails_batch, {"batch": 1, "retry": 2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("options", "expected", "defaulted"),
    [
        ({}, ("ServerError", "dead_letter"), False),
        ({"on_error": "skip"}, ("ServerError", "skip"), False),
        ({"on_error": {"ok": None}}, {"n": 1, "ok": None}, True),
        ({"fallback": {"ok": None}}, {"n": 1, "ok": None}, True),
        ({"fallback": other}, {"n": 1, "other": True}, True),
        ({"fallback": other_later}, {"n": 1, "other": True}, True),
        ({"fallback": broken}, ("KeyError", "dead_letter"), False),
        ({"fallback": broken, "on_error": "skip"}, ("KeyError", "skip"), False),
        ({"fallback": broken, "on_error": {"ok": 0}}, {"n": 1, "ok": 0}, True),
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_rows_that_fail_for_good(
    how: Any, options: dict[str, Any], expected: Any, defaulted: bool, behind: bool
) -> None:
    """Every kind of stage treats them alike; those that go on pass the stages behind it."""
    handler, given = how
    stages = [make_stage(handler, name="ask", **given, **options)]
    if behind:
        stages.append(make_stage(lambda row: {**row, "behind": True}, name="behind"))
    seen = passage(stages, [{"n": 0}, {"n": 1}])
    extra = {"behind": True} if behind else {}
    found = seen.outcomes[1]
    if isinstance(expected, tuple):
        assert isinstance(found, Failure)
        assert (found.kind, found.then) == expected
    else:
        assert found == {**expected, **extra}
    assert seen.outcomes[0] == {**EVEN, **extra}
    assert [context.is_defaulted for context in seen.contexts] == [False, defaulted]


@pytest.mark.parametrize("way", ["plain", "async", "timeout", "retry", "batch", "batch retry", "async batch"])
def test_conditions(way: str) -> None:
    """Rows that a stage is not for go past it unchanged; a condition that raises fails its row."""
    options: dict[str, Any] = {
        "plain": {}, "async": {}, "timeout": {"timeout": 5}, "retry": {"retry": 2}, "batch": {"batch": 2},
        "batch retry": {"batch": 2, "retry": 2}, "async batch": {"batch": 2},
    }[way]  # fmt: skip
    mark: Any = lambda row: {**row, "seen": True}  # noqa: E731
    if way == "async":
        mark = script()
    elif way == "async batch":

        async def mark(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{**row, "seen": True} for row in rows]
    elif "batch" in way:
        mark = lambda rows: [{**row, "seen": True} for row in rows]  # noqa: E731
    stage = make_stage(
        mark, name="mark", when=lambda row, ctx: 10 // row["n"] > 2 and ctx.offset == row["n"], **options
    )
    seen = passage([stage], [{"n": n} for n in range(6)])
    found = seen.outcomes[0]
    assert isinstance(found, Failure)
    assert (found.kind, found.message) == (
        "ConditionError",
        "when= raised ZeroDivisionError: integer division or modulo by zero",
    )
    for n in range(1, 6):
        assert seen.outcomes[n] == ({"n": n, "seen" if way != "async" else "done": True} if n < 4 else {"n": n})
    assert seen.counts("mark")["passed_by"] == 2


# --- the end of a session --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"retry": 3}, {"timeout": 5}, {"batch": 2}, {"batch": 2, "retry": 3}])
@pytest.mark.parametrize("then", ["stop", "fail"])
def test_a_row_that_ends_the_session(how: dict[str, Any], then: str) -> None:
    """It stays undone, with the rows of its key behind it; all others in work are finished."""

    async def ask(row: Any) -> Any:
        rows = row if isinstance(row, list) else [row]
        if any(one["n"] == 3 for one in rows):
            raise StopExecution("enough") if then == "stop" else KeyError("n")
        await asyncio.sleep(1)
        return row

    stage = make_stage(
        ask,
        on_error="fail" if then == "fail" else "dead_letter",
        fallback={"never": 1} if not how and then == "stop" else None,
        **how,
    )
    keys = ["a" if n in {3, 7, 8} else f"b{n}" for n in range(10)]
    seen = passage([stage], [{"n": n} for n in range(10)], keys=keys)
    assert {3, 7, 8} <= set(seen.given_up)
    assert seen.halted_by is not None
    assert seen.halted_by.then == then
    if "batch" not in how:
        assert sorted(seen.given_up) == [3, 7, 8]
    assert set(seen.outcomes) | set(seen.given_up) == set(range(10))
    assert not any(isinstance(outcome, Failure) for outcome in seen.outcomes.values())


@pytest.mark.parametrize("halting", [0, 2, 4])
def test_a_plain_row_that_ends_the_session(halting: int) -> None:
    """In a lot of plain rows those before it are through, and neither it nor those behind it reach the next stage."""
    reached: list[int] = []

    def stop(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == halting:
            raise StopExecution("enough")
        return row

    async def later(row: dict[str, Any]) -> dict[str, Any]:
        reached.append(row["n"])
        return row

    async def main() -> list[Outcome]:
        rows: list[Outcome] = [{"n": n} for n in range(5)]
        runtime = virtual_runtime()
        await Chain([make_stage(stop), make_stage(later)]).run(rows, None, runtime)
        return rows

    rows = virtual(main)
    assert len(rows) == halting + 1
    last = rows[-1]
    assert isinstance(last, Failure)
    assert last.then == "stop"
    assert reached == list(range(halting))


def test_draining_gives_up_rows_that_wait_for_too_long() -> None:
    """Whoever is due soon goes on; who waits for a breaker, or longer than the drain may take, is given up at once."""
    again: list[int] = []

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 0 and not again:
            again.append(0)
            raise ServerError(503, 2)
        if row["n"] == 1:
            raise ServerError(503, 500)
        return row

    async def broken(row: dict[str, Any]) -> dict[str, Any]:
        raise ServerError

    async def drain(flow: Flow, runtime: Runtime) -> None:
        await asyncio.sleep(1)
        flow.drain(30)

    stages = [
        make_stage(ask, retry=Retry(5), when=lambda row: row["n"] < 2),
        make_stage(broken, breaker=CircuitBreaker(1, open_for=10_000), retry=2, when=lambda row: row["n"] >= 2),
    ]
    seen = passage(stages, [{"n": n} for n in range(4)], during=drain)
    assert sorted(seen.given_up) == [1, 2, 3]
    assert seen.seconds[0] == pytest.approx(2, abs=1)
    assert seen.halted_by is None


# --- pairs -----------------------------------------------------------------------------------------------------

POLICIES: dict[str, dict[str, Any]] = {
    "retry": {"retry": Retry(4, first=0.1)},
    "timeout": {"timeout": 2},
    "breaker": {"breaker": CircuitBreaker(3, open_for=7)},
    "limit": {"limit": RateLimit(per_second=5, burst=2)},
    "fallback": {"fallback": {"value": "fallback"}},
    "skip": {"on_error": "skip"},
    "when": {"when": lambda row: row["n"] % 4},
    "concurrency": {"concurrency": 3},
}


@pytest.mark.parametrize("names", list(combinations(POLICIES, 2)), ids="+".join)
@pytest.mark.parametrize("kind", ["async", "blocking", "batch"])
def test_pairs_of_policies(names: tuple[str, str], kind: str) -> None:
    """Whatever two policies are put together, each row ends in exactly one way, and calls stay within both."""
    times: list[float] = []
    running = most = 0

    async def ask(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal running, most
        times.append(asyncio.get_running_loop().time())
        running += 1
        most = max(most, running)
        try:
            number = len(times)
            await asyncio.sleep(5 if number % 7 == 3 else 0.01)
            if number % 3 == 1:
                raise ServerError
            return {**row, "value": "answer"}
        finally:
            running -= 1

    def block(row: dict[str, Any]) -> dict[str, Any]:
        times.append(asyncio.get_running_loop().time())
        if len(times) % 3 == 1:
            raise ServerError
        return {**row, "value": "answer"}

    async def batch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [await ask(row) for row in rows]

    options = {**POLICIES[names[0]], **POLICIES[names[1]]}
    if kind == "batch":
        options["batch"] = 2
    handler: Any = {"async": ask, "blocking": block, "batch": batch}[kind]
    stage = make_stage(handler, name="ask", **options)
    seen = passage([stage], [{"n": n} for n in range(40)], keys=[n % 20 for n in range(40)])
    assert seen.given_up == []
    kinds = Counter(_kind(outcome) for outcome in seen.outcomes.values())
    assert sum(kinds.values()) == 40
    allowed = {"answer", "unchanged" if "when" in names else "answer"}
    allowed |= {"fallback"} if "fallback" in names else {"skip"} if "skip" in names else {"dead_letter"}
    assert set(kinds) <= allowed, kinds
    if "when" in names:
        assert kinds["unchanged"] == 10
    if "limit" in names and kind != "batch":
        assert all(sum(t <= o < t + 1 for o in times) <= 5 + 2 + 1 for t in times)
    if kind == "async":
        assert most <= stage.concurrency
    for n in range(20):
        assert seen.order.index(n) < seen.order.index(n + 20)


def _kind(outcome: Outcome) -> str:
    if isinstance(outcome, Failure):
        return outcome.then
    assert isinstance(outcome, dict)
    return str(outcome.get("value", "unchanged"))


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Retry(attempts=0), "Retry(attempts=)"),
        (lambda: Retry(first=-1), "Retry(first=)"),
        (lambda: Retry(cap=float("nan")), "Retry(cap=)"),
        (lambda: Retry(deadline=0), "Retry(deadline=)"),
        (lambda: Retry(on="error"), "Retry(on=)"),  # type: ignore[arg-type]
        (lambda: Retry(on=(OSError, "x")), "Retry(on=)"),  # type: ignore[arg-type]
        (lambda: CircuitBreaker(failures=0), "CircuitBreaker(failures=)"),
        (lambda: CircuitBreaker(failures=None), "CircuitBreaker(failures=)"),
        (lambda: CircuitBreaker(rate=1.5), "CircuitBreaker(rate=)"),
        (lambda: CircuitBreaker(open_for=0), "CircuitBreaker(open_for=)"),
        (lambda: CircuitBreaker(probes=0), "CircuitBreaker(probes=)"),
        (lambda: CircuitBreaker(when_open="explode"), "CircuitBreaker(when_open=)"),  # type: ignore[arg-type]
        (lambda: CircuitBreaker(name="a b"), "CircuitBreaker(name=)"),
        (RateLimit, "RateLimit()"),
        (lambda: RateLimit(per_second=0), "RateLimit(per_second=)"),
        (lambda: RateLimit(per_second=1, per_minute=1), "RateLimit(per_minute=)"),
        (lambda: RateLimit(per_second=1, burst=0.5), "RateLimit(burst=)"),
        (lambda: RateLimit(units_per_second=5), "RateLimit(units=)"),
        (lambda: RateLimit(per_second=5, units=5), "RateLimit(units=)"),
        (lambda: RateLimit(units_per_minute=5, units=0), "RateLimit(units=)"),
        (lambda: make_stage(fails, retry="3"), "stage(retry=)"),  # type: ignore[arg-type]
        (lambda: make_stage(fails, retry=0), "Retry(attempts=)"),
        (lambda: make_stage(fails, breaker=5), "stage(breaker=)"),  # type: ignore[arg-type]
        (lambda: make_stage(fails, limit=5), "stage(limit=)"),  # type: ignore[arg-type]
        (lambda: make_stage(fails, fallback=5), "stage(fallback=)"),  # type: ignore[arg-type]
        (lambda: make_stage(fails, on_error="ignore"), "stage(on_error=)"),  # type: ignore[arg-type]
        (lambda: make_stage(fails, when="n > 3"), "stage(when=)"),  # type: ignore[arg-type]
        (lambda: make_stage(fails, when=fails_later), "stage(when=)"),
        (lambda: make_stage(fails, breaker=CircuitBreaker(when_open="fallback")), "CircuitBreaker(when_open=)"),
    ],
)
def test_wrong_options(make: Callable[[], object], setting: str) -> None:
    """A mistake is told by its setting when the stage is made."""
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.setting == setting


# --- caches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [["text"], lambda row: row["text"]])
def test_a_hit_changes_the_row_that_asks(inputs: Any) -> None:
    """With chosen inputs, a hit sets and removes the fields that the handler did; the row keeps its own others."""
    calls: list[int] = []

    async def ask(row: dict[str, Any]) -> Any:
        calls.append(row["n"])
        row["tags"].append("seen")
        del row["noise"]
        return None if row["text"] == "none" else {**row, "length": len(row["text"])}

    texts = ["a", "bb", "a", "none", "bb", "none", "a"]
    rows = [{"n": n, "text": text, "noise": n * 7, "tags": []} for n, text in enumerate(texts)]
    seen = passage([make_stage(ask, cache=Cache(inputs=inputs, version="1"), concurrency=3)], rows)
    assert calls == [0, 1, 3]
    for n, text in enumerate(texts):
        expected = {"n": n, "text": text, "tags": ["seen"], "length": len(text)}
        assert seen.outcomes[n] == (None if text == "none" else expected)
    assert seen.counts("ask")["hits"] == 4


def test_a_hit_of_several_results() -> None:
    """A row that became several does so for the next one with the same inputs, each with its own fields."""

    async def split(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**row, "word": word} for word in row["text"].split()]

    stage = make_stage(split, cache=Cache(inputs=["text"], version="1"), concurrency=1)
    seen = passage([stage], [{"n": 0, "text": "a b"}, {"n": 1, "text": "a b"}])
    assert seen.outcomes[1] == [{"n": 1, "text": "a b", "word": "a"}, {"n": 1, "text": "a b", "word": "b"}]
