"""Rate limits under any mix of flows, closings, holds and corrections: the pace, the order, and no gaps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill import CircuitBreaker, RateLimit, Retry
from rowmill.handlers.chain import Chain
from rowmill.handlers.context import RowContext
from rowmill.handlers.flow import Flight, Flow
from rowmill.handlers.limits import Limiter
from rowmill.handlers.stage import make_stage
from support.virtual import virtual, virtual_runtime

_HAIR = 0.01


@dataclass
class Bucket:
    """A bucket of tokens as one would draw it: so much in it, so much flowing in."""

    rate: float
    size: float
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.size

    def flow(self, seconds: float) -> None:
        """Time passes."""
        self.level = min(self.size, self.level + seconds * self.rate)

    def wait(self, amount: float) -> float:
        """Seconds until so much may be taken; more than fits in: when it is full."""
        return max(0.0, min(amount, self.size) - self.level) / self.rate


moments = st.integers(0, 80).map(lambda tenths: tenths / 10)
calls = st.lists(st.tuples(moments, st.sampled_from([0, 1, 2, 5, 30])), min_size=1, max_size=25)
disturbances = st.lists(
    st.tuples(moments, st.sampled_from(["hold", "more", "less"]), st.sampled_from([0.5, 3.0, 8.0])), max_size=4
)


@settings(max_examples=200, deadline=None)
@given(
    calls=calls,
    leaving=st.dictionaries(st.integers(0, 24), moments, max_size=8),
    disturbances=disturbances,
    burst=st.sampled_from([1, 3]),
    unit_burst=st.sampled_from([1.0, 10.0]),
)
def test_everybody_begins_when_a_drawn_bucket_says(
    calls: list[tuple[float, int]],
    leaving: dict[int, float],
    disturbances: list[tuple[float, str, float]],
    burst: int,
    unit_burst: float,
) -> None:
    """Calls begin in their order, not before there is room for them, and not later: whoever left leaves no gap."""
    spec = RateLimit(per_second=4, burst=burst, units_per_second=10, units=1, unit_burst=unit_burst)
    order = sorted(range(len(calls)), key=lambda number: calls[number][0])

    async def work() -> list[tuple[float, str, float]]:
        loop, limiter = asyncio.get_running_loop(), Limiter(spec, virtual_runtime().clock)
        seen: list[tuple[float, str, float]] = []

        async def call(number: int) -> None:
            units = float(calls[number][1])
            ticket = limiter.ticket(units)
            seen.append((loop.time(), "come", number))
            try:
                while (turn := limiter.turn(ticket)) is not None:
                    await asyncio.wait_for(asyncio.shield(turn.until), 1_000)
            except asyncio.CancelledError:
                limiter.leave(ticket)
                seen.append((loop.time(), "leave", number))
                raise
            limiter.begin(units, ticket)
            seen.append((loop.time(), "begin", number))

        def disturb(kind: str, amount: float) -> None:
            seen.append((loop.time(), kind, amount))
            if kind == "hold":
                limiter.hold(amount)
            else:
                limiter.settle(20, 20 + amount * (1 if kind == "more" else -1))

        tasks: list[asyncio.Task[None]] = []

        def come(number: int) -> None:
            tasks.append(asyncio.ensure_future(call(number)))
            if number in leaving:
                loop.call_later(leaving[number], tasks[-1].cancel)

        for when, kind, amount in disturbances:
            loop.call_at(when + 0.05, disturb, kind, amount)
        for rank, number in enumerate(order):
            loop.call_at(calls[number][0] + rank / 1e6, come, number)
        await asyncio.sleep(9)
        await asyncio.wait(tasks)
        assert limiter.waiting == 0
        return seen

    check_trace(virtual(work), [float(units) for _, units in calls], spec)


def check_trace(seen: Sequence[tuple[float, str, float]], units: Sequence[float], spec: RateLimit) -> None:
    """Replay what happened with drawn buckets."""
    assert spec.per_second
    assert spec.units_per_second
    assert spec.unit_burst
    buckets = Bucket(spec.per_second, spec.burst), Bucket(spec.units_per_second, spec.unit_burst)
    queue: list[int] = []
    now = held_until = 0.0
    first, could_since = -1, 0.0  # who is first in the queue, and when it became able to begin
    for time, kind, what in seen:
        for bucket in buckets:
            bucket.flow(max(0.0, time - max(now, held_until)))
        now = time
        if kind == "come":
            queue.append(int(what))
        elif kind == "leave":
            queue.remove(int(what))
        elif kind == "hold":
            held_until = max(held_until, time + what)
        elif kind == "begin":
            # Who comes just while the first is called out, and finds room for both, need not wait for it to begin.
            assert queue[0] == what or could_since <= time + _HAIR, "it jumped the queue"
            queue.remove(int(what))
            amounts = (1.0, units[int(what)])
            waits = [bucket.wait(amount) for bucket, amount in zip(buckets, amounts, strict=True)]
            assert max(*waits, held_until - time) <= _HAIR, "it began too early"
            assert time <= could_since + _HAIR, "it began too late"
            for bucket, amount in zip(buckets, amounts, strict=True):
                bucket.level -= amount
        else:
            buckets[1].level = min(buckets[1].size, buckets[1].level - what * (1 if kind == "more" else -1))
        if queue:
            amounts = (1.0, units[queue[0]])
            wait = max(bucket.wait(amount) for bucket, amount in zip(buckets, amounts, strict=True))
            could = max(now, held_until) + wait
            if queue[0] != first or max(could, could_since) > now:
                could_since = could
            first = queue[0]
    assert not queue


class Busy(Exception):  # noqa: N818 - a server's answer
    """Asks for a pause."""

    def __init__(self, seconds: float) -> None:
        super().__init__("busy")
        self.retry_after = seconds


@settings(max_examples=150, deadline=None)
@given(
    flows=st.lists(
        st.tuples(
            st.integers(1, 40),  # rows
            st.sampled_from([0.0, 0.3, 5.0]),  # enters at
            st.sampled_from([None, None, 0.2, 1.0, 4.0, 11.0]),  # is closed at
            st.sampled_from([1, 3, 50]),  # slots
            st.sampled_from([0.0, 0.03, 2.0]),  # seconds of a call
        ),
        min_size=1,
        max_size=4,
    ),
    rate=st.sampled_from([2.0, 10.0, 50.0]),
    burst=st.sampled_from([1, 4]),
    failing=st.sampled_from([None, 3, 7]),
    asked=st.sampled_from([0.0, 4.0]),
    has_breaker=st.booleans(),
    price=st.sampled_from([None, "1"]),
)
def test_no_second_has_more_calls_than_allowed(
    flows: list[tuple[int, float, float | None, int, float]],
    rate: float,
    burst: int,
    failing: int | None,
    asked: float,
    has_breaker: bool,
    price: str | None,
) -> None:
    """Whatever else holds rows up, no second sees more than rate + burst + 1 calls, and all rows get through."""

    async def work() -> list[float]:
        runtime, loop = virtual_runtime(), asyncio.get_running_loop()
        times: list[float] = []
        done: list[set[int]] = [set() for _ in flows]
        limit = RateLimit(per_second=rate, burst=burst, name="one")
        breaker = CircuitBreaker(failures=1, open_for=3, on=Busy, name="one") if has_breaker else None

        def open_flow(number: int, slots: int, seconds: float) -> Flow:
            async def call(row: dict[str, Any]) -> dict[str, Any]:
                times.append(loop.time())
                if failing is not None and len(times) % failing == 0 and len(times) < 40:
                    raise Busy(asked)
                await asyncio.sleep(seconds)
                return row

            retry = Retry(attempts=50, first=0.1)
            stage = make_stage(
                call, name=f"s{number}", limit=limit, breaker=breaker, retry=retry, concurrency=slots, price=price
            )

            def on_done(flight: Flight) -> None:
                done[number].add(flight.sender)

            return Flow(Chain([stage]), runtime, on_done, lambda: None, lambda *_: None, by_key=False, linger=0.02)

        async def live(number: int, rows: int, enters: float, closed: float | None, slots: int, seconds: float) -> None:
            flow = open_flow(number, slots, seconds)
            await asyncio.sleep(enters)
            for row in range(rows):
                context = RowContext("rows", number, row, 0, None, (), "test", None, runtime)
                flow.enter(Flight({"n": row}, context, None, row))
            await asyncio.sleep(closed if closed is not None else 2_000)
            await flow.close()
            flow.check()
            assert closed is not None or len(done[number]) == rows

        await asyncio.gather(*(live(number, *each) for number, each in enumerate(flows)))
        limiter = runtime.limiter(make_stage(lambda row: row, name="s0", limit=limit))
        assert limiter is not None
        assert limiter.waiting == 0
        return times

    times = virtual(work)
    for begin in times:
        assert sum(begin <= time < begin + 1 for time in times) <= rate + burst + 1
