"""Rate limits: how many calls, and how many units (tokens, bytes, records) of them, may begin in a time.

A token bucket kept as one moment (the generic cell rate algorithm of ITU-T I.371): what a call takes is paid off at the
rate. It is taken when the call really begins, not before: a place handed out ahead of time comes due while its row is
held up elsewhere (by a breaker, a budget, slots), and then all such places are used at once.

Whoever finds the bucket empty queues with a :class:`Ticket`. One timer per limiter calls out who is due, first come
first served; nobody else wakes up. What a call-out promises counts as taken until its row comes, so that as many are
called out as the bucket has room for, and no more; as promises are paid off at the rate too, one that is never kept
holds nobody up. Who was called out but may not begin (the breaker is open, there is no money) stands aside for others,
and keeps its number: when it comes back it is first.

aiolimiter was looked at (docs/decisions/0016): it waits inside, on the loop's clock, which a row that must hold no slot
meanwhile cannot use.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from ..state.clock import Clock
from ..state.errors import ConfigError
from ..state.model import Row
from .options import check_name, check_rate
from .retry import LONGEST_ASKED

log = logging.getLogger(__name__)

_HAIR = 1e-4  # timers may ring a little early
_LATE = 0.02  # and the event loop is late: what a queue loses by that is made up for, as far as this many seconds
_MARGIN, _LEAST_MARGIN = 1.05, 0.1  # of a guess of how long a wait takes
_MANY = 64


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How fast calls of a stage may begin, in one worker. Retries count as calls.

    Attributes:
        per_second, per_minute: calls; give one of the two, or none.
        burst: calls that may begin at once after a pause (1): the bucket's size.
        units_per_second, units_per_minute: units, such as tokens; give one of the two, or none.
        unit_burst: units that may begin at once after a pause; default: what one second, or one minute, allows.
        units: how many units a row's call takes, as far as one knows before: a number, or a function of the row. What
            the handler then reports (``ctx.add_cost(tokens=)``) takes its place.
        name: stages whose limits have one name share them; default: the stage's own.

    Raises:
        ConfigError: an option is out of its range, or there is nothing to limit.
    """

    per_second: float | None = None
    per_minute: float | None = None
    burst: float = 1
    units_per_second: float | None = None
    units_per_minute: float | None = None
    unit_burst: float | None = None
    units: float | Callable[[Row], float] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        rates = ("per_second", "per_minute", "units_per_second", "units_per_minute")
        for option in (*rates, "unit_burst"):
            if getattr(self, option) is not None:
                check_rate(f"RateLimit({option}=)", getattr(self, option))
        check_rate("RateLimit(burst=)", self.burst)
        if all(getattr(self, option) is None for option in rates):
            raise ConfigError("RateLimit()", "nothing", f"give one of {', '.join(rates)}")
        for one, other in (rates[:2], rates[2:]):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ConfigError(f"RateLimit({other}=)", getattr(self, other), f"{one} is given as well; give one")
        if self.burst < 1:
            raise ConfigError("RateLimit(burst=)", self.burst, "give a number from 1: a call is never less than one")
        has_units = self.units_per_second is not None or self.units_per_minute is not None
        if has_units != (self.units is not None):
            raise ConfigError("RateLimit(units=)", self.units, "units and units_per_… belong together: give both")
        if self.units is not None and not callable(self.units):
            check_rate("RateLimit(units=)", self.units)
        if self.name is not None:
            check_name("RateLimit(name=)", self.name)


class Turn(NamedTuple):
    """What a call waits for: ``until`` ends when it is called out, in about ``seconds``, rather less."""

    seconds: float
    until: asyncio.Future[None]


class Ticket:
    """A call's number in a limiter's queue."""

    __slots__ = ("is_called", "number", "since", "units", "until")

    def __init__(self, number: int, units: float, now: float) -> None:
        self.number = number
        self.units = units
        self.since = now
        """When it joined the queue; once it is called out: since when it might have begun."""
        self.until: asyncio.Future[None] | None = None
        """While it is in the queue: ends when it is called out."""
        self.is_called = False
        """Whether it was called out, and has neither begun nor stood aside since."""


class _Bucket:
    """A bucket of tokens, kept as the time at which it will be full again.

    It is kept twice: with what calls took that have begun, and with what those will take that were called out, too.
    """

    __slots__ = ("_begun", "_held_until", "_promised", "_rate", "_slack")

    def __init__(self, rate: float, size: float, now: float) -> None:
        self._rate = rate
        self._slack = size / rate
        self._begun = self._promised = now
        self._held_until = now

    def seconds_of(self, amount: float) -> float:
        """How long the rate takes to pay for it."""
        return amount / self._rate

    def due(self, amount: float, *, is_called: bool) -> float:
        """When a call that takes so much may begin, or be called out. More than fits in: when the bucket is full."""
        spare = self._slack - amount / self._rate
        full_at = self._begun if is_called else self._promised
        return max(full_at - spare if spare > 0 else full_at, self._held_until)

    def promise(self, amount: float, at: float) -> None:
        """A call that takes so much was called out."""
        self._promised = max(self._promised, at) + amount / self._rate

    def break_promise(self, amount: float) -> None:
        """It does not begin."""
        self._promised = max(self._promised - amount / self._rate, self._begun)

    def begin(self, amount: float, at: float, *, is_called: bool) -> None:
        """A call that takes so much begins."""
        taken = amount / self._rate
        self._begun = max(self._begun, at) + taken
        if not is_called:
            self._promised = max(self._promised, at) + taken
        elif self._promised < self._begun:
            self._promised = self._begun

    def settle(self, difference: float, now: float) -> None:
        """A call took so many more than it said; fewer, if it is below 0."""
        seconds = difference / self._rate
        # What is full cannot be more than full before it is taken from.
        least = max(now, self._held_until) if seconds > 0 else float("-inf")
        self._begun = max(self._begun, least) + seconds
        self._promised = max(self._promised, least) + seconds

    def hold(self, until: float, now: float) -> None:
        """Nobody begins before, and meanwhile nothing is paid off."""
        least = max(now, self._held_until)
        if until > least:
            self._begun = max(self._begun, least) + until - least
            self._promised = max(self._promised, least) + until - least
            self._held_until = until


class Limiter:
    """One resource's limits in one worker. Not for several threads.

    A call asks :meth:`is_free`, or else takes a :meth:`ticket` and asks for its :meth:`turn` until it is; then, in the
    same breath, it says :meth:`begin`, or :meth:`stand_aside` if something else is in its way. A ticket whose row is
    gone must :meth:`leave`.

    Args:
        spec: how fast.
        clock: time.
    """

    def __init__(self, spec: RateLimit, clock: Clock) -> None:
        self._spec = spec
        self._clock = clock
        now = clock.monotonic()
        rate = _rate(spec.per_second, spec.per_minute)
        self._calls = _Bucket(rate, spec.burst, now) if rate is not None else None
        unit_rate = _rate(spec.units_per_second, spec.units_per_minute)
        size = spec.unit_burst or spec.units_per_second or spec.units_per_minute or 1.0
        self._units = _Bucket(unit_rate, size, now) if unit_rate is not None else None
        self._held_until = now
        self._given_back_at = now
        """When units were last given back: what has room since then had none before."""
        self._numbers = 0
        self._queue: list[tuple[int, int, Ticket, asyncio.Future[None]]] = []
        """A heap by number. An entry whose future is not its ticket's any more is void."""
        self._entries = 0
        self._waiting = 0
        """How many of the entries are not void."""
        self._work = 0.0
        """How many seconds their calls take."""
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def waiting(self) -> int:
        """How many calls are in the queue."""
        return self._waiting

    def units_of(self, row: Row) -> float:
        """What a call for this row takes, as far as one knows.

        Raises:
            Exception: whatever the user's function raises.
            ConfigError: it gave no number of at least 0.
        """
        units = self._spec.units
        if units is None:
            return 0.0
        amount = units(row) if callable(units) else units
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < float("inf"):
            raise ConfigError("RateLimit(units=)", amount, "the function must give a number of at least 0")
        return float(amount)

    def units_of_all(self, rows: Sequence[Row]) -> float:
        """What one call for all these rows takes.

        Raises:
            Exception: whatever the user's function raises.
            ConfigError: it gave no number of at least 0.
        """
        return sum(self.units_of(row) for row in rows) if self._units is not None else 0.0

    def is_free(self, units: float) -> bool:
        """Whether a call that has no ticket may begin now: the bucket has room, and nobody waits."""
        return not self._waiting and self._due(units) <= self._clock.monotonic() + _HAIR

    def ticket(self, units: float) -> Ticket:
        """The next number, for a call that takes so many units."""
        self._numbers += 1
        return Ticket(self._numbers, units, self._clock.monotonic())

    def turn(self, ticket: Ticket) -> Turn | None:
        """None if the call may begin now; else it is in the queue, and what it waits for."""
        now, was_called = self._clock.monotonic(), ticket.is_called
        if was_called:
            if self._due(ticket.units, is_called=True) <= now + _HAIR:
                return None
            self._break_promise(ticket)  # it came so late that others were called out in its place
        elif ticket.until is None and self._is_first(ticket) and self._due(ticket.units) <= now + _HAIR:
            ticket.since = now
            return None
        until = ticket.until or self._enter(ticket, now)
        seconds = self._guess(ticket, now)
        if was_called or self._is_first(ticket):
            self._call_out(now)
        return Turn(seconds * _MARGIN + _LEAST_MARGIN, until)

    def begin(self, units: float, ticket: Ticket | None = None) -> None:
        """The call whose turn it is begins: it takes what it takes."""
        now = self._clock.monotonic()
        at, is_called = now, False
        if ticket is not None:
            at, is_called = max(ticket.since, now - _LATE), ticket.is_called
            ticket.is_called = False
        if self._calls is not None:
            self._calls.begin(1.0, at, is_called=is_called)
        if self._units is not None:
            self._units.begin(units, at, is_called=is_called)

    def stand_aside(self, ticket: Ticket) -> None:
        """The call may not begin although it is its turn: let the next one, until it asks for its turn again."""
        if ticket.is_called:
            self._break_promise(ticket)
        elif ticket.until is not None:
            self._exit(ticket)
        else:
            return
        self._call_out(self._clock.monotonic())

    def leave(self, ticket: Ticket) -> None:
        """The call will not be made."""
        self.stand_aside(ticket)

    def settle(self, estimated: float, actual: float) -> None:
        """A call took other units than was thought: whoever is in the queue begins later, or earlier."""
        if self._units is not None:
            now = self._clock.monotonic()
            self._units.settle(actual - estimated, now)
            if actual < estimated:
                self._given_back_at = now
                self._call_out(now)

    def hold(self, seconds: float) -> None:
        """Let nothing begin for so long, at most an hour: the resource asked for it (``Retry-After``)."""
        now = self._clock.monotonic()
        if seconds > LONGEST_ASKED and now >= self._held_until:
            log.warning("Retry-After asks for %.0f s without calls; they go on after %.0f s", seconds, LONGEST_ASKED)
        until = now + min(seconds, LONGEST_ASKED)
        self._held_until = max(self._held_until, until)
        for bucket in (self._calls, self._units):
            if bucket is not None:
                bucket.hold(until, now)

    # --- inside ------------------------------------------------------------------------------------------------

    def _due(self, units: float, *, is_called: bool = False) -> float:
        """When such a call may begin, or be called out, if nobody is before it."""
        if self._units is None:
            assert self._calls is not None  # noqa: S101 - there is always something to limit
            return self._calls.due(1.0, is_called=is_called)
        due = self._units.due(units, is_called=is_called)
        return due if self._calls is None else max(due, self._calls.due(1.0, is_called=is_called))

    def _seconds_of(self, units: float) -> float:
        """By how long such a call keeps the queue waiting."""
        calls = self._calls.seconds_of(1.0) if self._calls is not None else 0.0
        return max(calls, self._units.seconds_of(units)) if self._units is not None else calls

    def _is_first(self, ticket: Ticket) -> bool:
        self._drop_void()
        return not self._queue or ticket.number <= self._queue[0][0]

    def _guess(self, ticket: Ticket, now: float) -> float:
        """How many seconds a ticket in the queue waits, as things are, if all others there go before it.

        That is so when it joins the queue. Later it is too much: guessed too little, a row would ask again and again.
        """
        ahead = 0.0 if self._is_first(ticket) else self._work - self._seconds_of(ticket.units)
        return max(0.0, self._due(ticket.units) - now) + max(0.0, ahead)

    def _enter(self, ticket: Ticket, now: float) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._move_to(loop)
        until = ticket.until = loop.create_future()
        ticket.since = now
        seconds = self._seconds_of(ticket.units)
        self._entries += 1
        self._waiting += 1
        self._work += seconds
        heappush(self._queue, (ticket.number, self._entries, ticket, until))
        return until

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Another event loop runs (in a notebook, say): whoever waited in the last one is gone with it."""
        for _, _, ticket, _ in self._queue:
            ticket.until = None
        self._queue, self._waiting, self._work = [], 0, 0.0
        self._loop, self._timer = loop, None

    def _exit(self, ticket: Ticket) -> None:
        """Out of the queue; its entry there is void from now on, and goes when it is met, or when too many are."""
        ticket.until = None
        self._waiting -= 1
        self._work = self._work - self._seconds_of(ticket.units) if self._waiting else 0.0
        if len(self._queue) > 2 * self._waiting + _MANY:
            self._queue = [entry for entry in self._queue if entry[2].until is entry[3]]
            heapify(self._queue)

    def _drop_void(self) -> None:
        queue = self._queue
        while queue and queue[0][2].until is not queue[0][3]:
            heappop(queue)

    def _call_out(self, now: float) -> None:
        """Call out who is due, and set the timer for the next one."""
        while self._loop is not None and not self._loop.is_closed():
            self._drop_void()
            if not self._queue:
                return
            _, _, ticket, until = self._queue[0]
            due = self._due(ticket.units)
            if due > now + _HAIR:
                self._set_timer(due, now)
                return
            self._exit(ticket)
            self._promise(ticket, max(ticket.since, due, self._given_back_at, now - _LATE))
            until.set_result(None)

    def _promise(self, ticket: Ticket, at: float) -> None:
        ticket.is_called, ticket.since = True, at
        if self._calls is not None:
            self._calls.promise(1.0, at)
        if self._units is not None:
            self._units.promise(ticket.units, at)

    def _break_promise(self, ticket: Ticket) -> None:
        ticket.is_called = False
        if self._calls is not None:
            self._calls.break_promise(1.0)
        if self._units is not None:
            self._units.break_promise(ticket.units)

    def _set_timer(self, due: float, now: float) -> None:
        assert self._loop is not None  # noqa: S101 - somebody is in the queue
        if self._timer is not None:
            if abs(self._rings_at - due) < _HAIR:
                return
            self._timer.cancel()
        self._rings_at = due
        self._timer = self._loop.call_later(due - now, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._call_out(self._clock.monotonic())


def _rate(per_second: float | None, per_minute: float | None) -> float | None:
    """Per second."""
    if per_second is not None:
        return float(per_second)
    return None if per_minute is None else per_minute / 60
