"""Rate limits: the pace is kept whatever else is in the way, in the order of arrival, and nobody leaves a gap."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from rowmill import CircuitBreaker, RateLimit, Retry
from rowmill.handlers.chain import Chain
from rowmill.handlers.context import RowContext
from rowmill.handlers.flow import Flight, Flow
from rowmill.handlers.limits import Limiter, Ticket
from rowmill.handlers.policed import Policed
from rowmill.handlers.retry import LONGEST_ASKED
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import Stage, make_stage
from rowmill.state.clock import SystemClock
from support.fake_clock import FakeClock
from support.virtual import passage, virtual, virtual_runtime

pytestmark = pytest.mark.timeout(30)
Row = dict[str, Any]


class Later(Exception):  # noqa: N818 - a handler's own
    """Asks for a pause."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("later")
        self.retry_after = retry_after


class Purse:
    """An account that has money when it is told so."""

    class Reservation:
        """One unit."""

        amount = Decimal(1)

    def __init__(self) -> None:
        self.has_money = False
        self.change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reserved = 0

    def try_reserve(self, amount: Decimal) -> Purse.Reservation | None:
        """A reservation, if there is money."""
        self.reserved += self.has_money
        return self.Reservation() if self.has_money else None

    def changed(self) -> asyncio.Future[None]:
        """Ends when there is money."""
        return self.change

    def settle(self, reservation: Reservation, actual: Decimal) -> None:
        """Nothing to note."""

    def fill(self) -> None:
        """Money comes."""
        self.has_money = True
        self.change.set_result(None)


def flow_of(stages: Sequence[Stage], runtime: Runtime, done: list[tuple[int, float]], given_up: Any = None) -> Flow:
    """A flow that notes what comes out of it, and when."""
    loop = asyncio.get_running_loop()

    def note(flight: Flight) -> None:
        done.append((flight.sender, loop.time()))

    def no_more(flights: Sequence[Flight], failure: object) -> None:
        if given_up is not None:
            given_up.extend(flight.sender for flight in flights)

    return Flow(Chain(stages), runtime, note, lambda: None, no_more, by_key=False, linger=0.02)


def flight(number: int, runtime: Runtime, **fields: Any) -> Flight:
    """A row with a context."""
    context = RowContext("rows", 0, number, 0, None, (), "test", None, runtime)
    return Flight({"n": number, **fields}, context, None, number)


def most_within_a_second(times: list[float]) -> int:
    """The most calls that began within one second."""
    return max(sum(begin <= time < begin + 1 for time in times) for begin in times)


def count_steps(runtime: Runtime, stage: Stage) -> list[int]:
    """Notes each time a row takes a slot of the stage."""
    policed, steps = runtime.policed(stage), list[int]()
    step = Policed.step

    async def counted(trial: Any) -> Any:
        steps.append(1)
        return await step(policed, trial)

    policed.step = counted  # type: ignore[method-assign]
    return steps


async def echo(row: Row) -> Row:
    """A call that takes no time."""
    return row


# --- the pace ------------------------------------------------------------------------------------------------------


def test_pace_after_a_breaker_closed() -> None:
    """Rows that an open breaker held up do not call all at once when it closes."""
    times: list[float] = []

    async def call(row: Row) -> Row:
        times.append(asyncio.get_running_loop().time())
        if len(times) <= 5:
            raise OSError("down")
        return row

    breaker = CircuitBreaker(failures=5, open_for=30)
    stage = make_stage(call, name="s", concurrency=200, limit=RateLimit(per_second=10), breaker=breaker)
    seen = passage([stage], [{"n": n} for n in range(500)])
    assert most_within_a_second(times) <= 11
    assert max(seen.seconds.values()) == pytest.approx(30 + 50, abs=1)


def test_pace_after_money_came_back() -> None:
    """Rows that an empty budget held up do not call all at once, and set no money aside while the pace holds them."""

    async def work() -> list[float]:
        runtime, loop, times = virtual_runtime(), asyncio.get_running_loop(), list[float]()
        purse = runtime.account = Purse()  # type: ignore[assignment]

        async def call(row: Row) -> Row:
            times.append(loop.time())
            return row

        stage = make_stage(call, name="s", concurrency=200, limit=RateLimit(per_second=10), price="1")
        done: list[tuple[int, float]] = []
        flow = flow_of([stage], runtime, done)
        for number in range(500):
            flow.enter(flight(number, runtime))
        await asyncio.sleep(60)
        purse.fill()
        await asyncio.sleep(20)
        assert purse.reserved == len(times)
        await asyncio.sleep(31)
        assert [number for number, _ in done] == list(range(500))
        await flow.close()
        return times

    times = virtual(work)
    assert len(times) == 500
    assert most_within_a_second(times) <= 11


def test_standing_aside_costs_no_polling() -> None:
    """Rows that were called out, found no money, and queue again wake up no more often than others."""

    async def work() -> int:
        runtime, done = virtual_runtime(), list[tuple[int, float]]()
        purse = runtime.account = Purse()  # type: ignore[assignment]
        stage = make_stage(echo, name="s", limit=RateLimit(per_second=10), price="1")
        steps = count_steps(runtime, stage)
        flow = flow_of([stage], runtime, done)
        for number in range(500):
            flow.enter(flight(number, runtime))
        await asyncio.sleep(1)
        purse.fill()
        await asyncio.sleep(51)
        assert len(done) == 500
        await flow.close()
        return len(steps)

    assert virtual(work) <= 4 * 500


def test_pace_after_slots_came_free() -> None:
    """Rows that waited for a slot do not call all at once when many come free together."""
    times: list[float] = []

    async def call(row: Row) -> Row:
        times.append(asyncio.get_running_loop().time())
        if row["n"] < 50:
            await asyncio.sleep(60 - times[-1])
        return row

    stage = make_stage(call, name="s", concurrency=50, limit=RateLimit(per_second=10))
    seen = passage([stage], [{"n": n} for n in range(400)])
    assert most_within_a_second(times) <= 11
    assert max(seen.seconds.values()) == pytest.approx(60 + 35, abs=1)


@pytest.mark.parametrize("rate", [50, 400, 2_000])
def test_pace_on_a_loop_that_is_late(rate: int) -> None:
    """The rate that was asked for is reached without any burst, although calls begin a little after their turn."""

    async def work() -> float:
        limiter, loop = Limiter(RateLimit(per_second=rate), virtual_runtime().clock), asyncio.get_running_loop()
        times: list[float] = []

        async def call(number: int) -> None:
            ticket = limiter.ticket(0)
            while (turn := limiter.turn(ticket)) is not None:
                await turn.until
                await asyncio.sleep(0.003 * (number % 5))
            limiter.begin(0, ticket)
            times.append(loop.time())

        await asyncio.gather(*(call(number) for number in range(rate * 2)))
        assert most_within_a_second(times) <= rate * 1.02 + 2
        return times[-1] - times[0]

    assert virtual(work) == pytest.approx(2, abs=0.05)


def test_many_that_wait_wake_up_once_each() -> None:
    """A thousand rows that wait for their turn take a slot twice each: to hear that they must wait, and to call."""

    async def work() -> int:
        runtime, done = virtual_runtime(), list[tuple[int, float]]()
        stage = make_stage(echo, name="s", limit=RateLimit(per_second=10))
        steps = count_steps(runtime, stage)
        flow = flow_of([stage], runtime, done)
        for number in range(1_000):
            flow.enter(flight(number, runtime))
        await asyncio.sleep(101)
        assert [number for number, _ in done] == list(range(1_000))
        await flow.close()
        return len(steps)

    assert virtual(work) <= 2_010


# --- order ---------------------------------------------------------------------------------------------------------


def test_a_large_call_does_not_starve() -> None:
    """A call of more units than the burst waits until the bucket is full, and small ones behind it wait with it."""
    begun: list[tuple[int, float]] = []

    async def call(row: Row) -> Row:
        begun.append((row["n"], round(asyncio.get_running_loop().time(), 2)))
        return row

    limit = RateLimit(units_per_second=10, units=lambda row: row["units"], unit_burst=10)
    units = [10, 50, 1, 1, 9]
    passage([make_stage(call, limit=limit)], [{"n": n, "units": amount} for n, amount in enumerate(units)])
    # After the second the bucket owes 40: 4 s until it is empty, and then it fills for the next ones.
    assert begun == [(0, 0.0), (1, 1.0), (2, 5.1), (3, 5.2), (4, 6.1)]


def test_who_had_to_wait_for_money_is_first_again() -> None:
    """A row that stood aside for want of money keeps its number: it goes before those that came later."""

    async def work() -> list[int]:
        runtime, done = virtual_runtime(), list[tuple[int, float]]()
        purse = runtime.account = Purse()  # type: ignore[assignment]
        limit = RateLimit(per_second=1, name="both")
        paid = make_stage(echo, name="paid", limit=limit, price="1")
        free = make_stage(echo, name="free", limit=limit)
        one, other = flow_of([paid], runtime, done), flow_of([free], runtime, done)
        one.enter(flight(100, runtime))
        for number in range(10):
            other.enter(flight(number, runtime))
        await asyncio.sleep(3.5)
        purse.fill()
        await asyncio.sleep(10)
        await one.close()
        await other.close()
        return [number for number, _ in done]

    assert virtual(work) == [0, 1, 2, 3, 100, 4, 5, 6, 7, 8, 9]


def test_full_slots_of_one_stage_do_not_hold_up_another() -> None:
    """Rows of a stage that hangs are called out in vain; those of another one with the same limit go on meanwhile."""

    async def work() -> list[tuple[int, float]]:
        runtime, done = virtual_runtime(), list[tuple[int, float]]()

        async def hang(row: Row) -> Row:
            await asyncio.sleep(1_000)
            return row

        limit = RateLimit(per_second=10, name="both")
        slow = flow_of([make_stage(hang, name="slow", limit=limit, concurrency=1)], runtime, [])
        quick = flow_of([make_stage(echo, name="quick", limit=limit)], runtime, done)
        for number in range(20):
            slow.enter(flight(number, runtime))
        await asyncio.sleep(0.01)
        for number in range(20):
            quick.enter(flight(number, runtime))
        await asyncio.sleep(5)
        await slow.close()
        await quick.close()
        return done

    done = virtual(work)
    assert [number for number, _ in done] == list(range(20))
    assert done[-1][1] < 4.2


def test_retries_queue_again() -> None:
    """Each attempt takes a turn of its own, behind those who wait already."""
    begun: list[tuple[int, float]] = []

    async def call(row: Row) -> Row:
        begun.append((row["n"], round(asyncio.get_running_loop().time(), 2)))
        if len(begun) == 1:
            raise OSError("down")
        return row

    passage([make_stage(call, limit=RateLimit(per_second=10), retry=Retry(first=0))], [{"n": n} for n in range(4)])
    assert begun == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (0, 0.4)]


# --- those who leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1], ids=["rows", "batches"])
def test_places_go_with_their_rows(batch: int | None) -> None:
    """Rows that are gone with their partition do not keep those of other partitions waiting."""

    async def work() -> float:
        runtime, done = virtual_runtime(), list[tuple[int, float]]()

        async def call(row: Any) -> Any:
            return row

        stage = make_stage(call, name="s", limit=RateLimit(per_second=1), batch=batch)
        one, other = flow_of([stage], runtime, []), flow_of([stage], runtime, done)
        for number in range(1_000):
            one.enter(flight(number, runtime))
        await asyncio.sleep(3.5)
        await one.close()
        began = asyncio.get_running_loop().time()
        other.enter(flight(5_000, runtime))
        await asyncio.sleep(3)
        limiter = runtime.limiter(stage)
        assert limiter is not None
        assert limiter.waiting == 0
        await other.close()
        return done[-1][1] - began

    assert virtual(work) <= 1.1


def test_the_queue_does_not_keep_those_who_left() -> None:
    """However many come and go behind one that waits long, the queue holds few more entries than there are waiting."""

    async def work() -> int:
        limiter = Limiter(RateLimit(per_minute=1), virtual_runtime().clock)
        limiter.begin(0)
        assert limiter.turn(limiter.ticket(0)) is not None
        for _ in range(5_000):
            ticket = limiter.ticket(0)
            assert limiter.turn(ticket) is not None
            limiter.leave(ticket)
        assert limiter.waiting == 1
        return len(limiter._queue)

    assert virtual(work) < 200


def test_who_was_called_out_and_left_lets_the_next_one_go() -> None:
    """Leaving between being called out and calling costs the others nothing."""

    async def work() -> float:
        runtime = virtual_runtime()
        limiter, loop = Limiter(RateLimit(per_second=1), runtime.clock), asyncio.get_running_loop()
        limiter.begin(0)
        first, second = limiter.ticket(0), limiter.ticket(0)
        turns = [limiter.turn(ticket) for ticket in (first, second)]
        assert turns[0] is not None
        assert turns[1] is not None
        await turns[0].until
        limiter.leave(first)
        await turns[1].until
        assert limiter.turn(second) is None
        limiter.begin(0, second)
        return loop.time()

    assert virtual(work) == pytest.approx(1, abs=0.001)


def test_draining_gives_up_those_who_wait_for_their_turn() -> None:
    """When the session ends, rows that had no call yet are given up, however soon their turn is; none is left over."""

    async def work() -> tuple[list[int], list[int]]:
        runtime, done, given_up = virtual_runtime(), list[tuple[int, float]](), list[int]()
        flow = flow_of([make_stage(echo, name="s", limit=RateLimit(per_second=10))], runtime, done, given_up)
        for number in range(100):
            flow.enter(flight(number, runtime))
        await asyncio.sleep(0.05)
        flow.drain(2.0)
        await asyncio.sleep(20)
        await flow.close()
        return [number for number, _ in done], given_up

    done, given_up = virtual(work)
    assert done == list(range(len(done)))
    assert 1 <= len(done) <= 2
    assert given_up == list(range(len(done), 100))


def test_a_limit_outlives_an_event_loop() -> None:
    """Those who waited on a loop that has ended keep nobody waiting on the next one."""
    limiter = Limiter(RateLimit(per_second=1_000), SystemClock())

    async def first() -> None:
        limiter.begin(0)
        assert limiter.turn(limiter.ticket(0)) is not None

    async def second() -> Ticket:
        ticket = limiter.ticket(0)
        while (turn := limiter.turn(ticket)) is not None:
            await asyncio.wait_for(turn.until, 5)
        return ticket

    asyncio.run(first())
    asyncio.run(second())
    assert limiter.waiting == 0


# --- holds, and what calls really took -----------------------------------------------------------------------------


def test_one_absurd_retry_after_does_not_stop_a_stage_for_years(caplog: pytest.LogCaptureFixture) -> None:
    """What a server may ask for has a bound, and the log tells when it is used."""
    calls: list[int] = []

    async def call(row: Row) -> Row:
        calls.append(1)
        if len(calls) == 1:
            raise Later(10**9)
        return row

    stage = make_stage(call, name="s", limit=RateLimit(per_second=1), concurrency=1)
    with caplog.at_level(logging.WARNING):
        seen = passage([stage], [{"n": 0}, {"n": 1}])
    assert seen.outcomes[1] == {"n": 1}
    assert seen.seconds[1] == pytest.approx(LONGEST_ASKED + 1, abs=0.1)
    assert [record.message for record in caplog.records] == [
        "Retry-After asks for 1000000000 s without calls; they go on after 3600 s"
    ]


def free_after(limiter: Limiter, clock: FakeClock, units: float = 0) -> float:
    """Turns the clock on until a call may begin; how many seconds that took."""
    passed = 0.0
    while not limiter.is_free(units):
        clock.advance(0.25)
        passed += 0.25
        assert passed < 100, "it never may"
    return passed


def test_units_that_were_not_used_do_not_lift_a_hold() -> None:
    """Nobody begins before Retry-After is over, however little the calls under way turn out to use."""
    clock = FakeClock()
    limiter = Limiter(RateLimit(units_per_second=100, units=1_000, unit_burst=5_000), clock)
    for _ in range(5):
        assert limiter.is_free(1_000)
        limiter.begin(1_000)
    limiter.hold(30)
    for _ in range(5):
        limiter.settle(1_000, 10)
    assert free_after(limiter, clock, 1_000) == 30
    assert limiter.is_free(4_950)
    assert not limiter.is_free(4_951)


def test_nothing_is_paid_off_during_a_hold() -> None:
    """After a hold the bucket is as full as it was before; a shorter one within it changes nothing."""
    clock = FakeClock()
    limiter = Limiter(RateLimit(per_second=1, burst=4), clock)
    for _ in range(4):
        limiter.begin(0)
    limiter.hold(10)
    clock.advance(2)
    limiter.hold(3)
    assert free_after(limiter, clock) == 9


@pytest.mark.parametrize(
    ("actual", "later", "seconds"),
    [(5, 0, 0.5), (2.5, 0, 0.25), (30, 0, 3.0), (30, 60, 2.5), (0, 60, 0.0)],
    ids=["as-said", "less", "more", "more-and-late", "less-and-late"],
)
def test_what_a_call_really_took_counts(actual: float, later: float, seconds: float) -> None:
    """The next call waits for the units that were used, not for those that were guessed, however late one knows."""
    clock = FakeClock()
    limiter = Limiter(RateLimit(units_per_second=10, units=5, unit_burst=10), clock)
    limiter.begin(5)
    clock.advance(later)
    limiter.settle(5, actual)
    assert free_after(limiter, clock, 10) == seconds


def test_units_given_back_let_those_who_wait_go_earlier() -> None:
    """The timer of the first in the queue is set anew when a call turns out to have used less."""

    async def work() -> float:
        limiter = Limiter(RateLimit(units_per_second=10, units=1, unit_burst=100), virtual_runtime().clock)
        limiter.begin(100)
        ticket = limiter.ticket(50)
        turn = limiter.turn(ticket)
        assert turn is not None
        await asyncio.sleep(1)
        limiter.settle(100, 70)
        await turn.until
        assert limiter.turn(ticket) is None
        limiter.begin(50, ticket)
        return asyncio.get_running_loop().time()

    assert virtual(work) == pytest.approx(2, abs=0.001)


def test_spacing_after_a_hold() -> None:
    """When everybody may go on, they do so at the pace, not at once."""
    times: list[float] = []

    async def call(row: Row) -> Row:
        times.append(asyncio.get_running_loop().time())
        if len(times) == 3:
            raise Later(20)
        return row

    passage([make_stage(call, limit=RateLimit(per_second=10), retry=2)], [{"n": n} for n in range(50)])
    assert len(times) == 51
    assert times[3] >= 20
    assert all(later - time >= 0.0999 for time, later in pairwise(times))
