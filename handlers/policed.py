"""Stages with policies: what happens around each call of theirs, and when it is made again.

A row's way through such a stage is a :class:`Trial`. ``Policed.begin`` settles what needs no call; each
``Policed.step`` makes one call, or says what to wait for. A wait is a value (:class:`Pause`), not something that goes
on inside: whoever runs the stage decides how to wait, so that a row which waits holds no slot, no thread and no task.

Order of the policies around a call, from the outside in: condition, schema, cache; then for each attempt breaker,
limits, budget, time-out, the handler; then fallback and ``on_error``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from copy import deepcopy
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, cast

from ..state.context import sum_costs
from ..state.errors import RowmillError
from ..state.model import Row
from .breaker import Permit
from .budget import Price, Reservation, price_of
from .cache import Answer, Before, StageCache, changes_of, with_changes
from .calls import await_call, is_being_cancelled, raise_if_cancelled, raise_if_ours
from .context import NO_COST, RowContext
from .errors import BreakerOpenError, HandlerTimeoutError, NotStartedError, StopExecution
from .limits import Ticket
from .outcomes import RAISED, Failure, Outcome, checked, failure_of
from .recovery import recover_async
from .retry import retry_after_of
from .runtime import Runtime
from .stage import Stage, fitting, is_for


class Pause(NamedTuple):
    """What a row waits for before its next step: time, something to happen, or whichever comes first."""

    seconds: float | None
    until: asyncio.Future[Any] | None = None

    async def wait(self, runtime: Runtime) -> bool:
        """Wait here, for those that have nothing better to do; False if the session ends first."""
        if not runtime.may_wait(self.seconds):
            return False
        pause = asyncio.ensure_future(runtime.clock.sleep(self.seconds)) if self.seconds is not None else None
        waited = {future for future in (pause, self.until) if future is not None}
        ending: asyncio.Future[Any] | None = None
        try:
            while ending is None or not runtime.ending.is_set():  # again after an end that was called off
                ending = asyncio.ensure_future(runtime.ending.wait())
                await asyncio.wait({*waited, ending}, return_when=asyncio.FIRST_COMPLETED)
                if any(future.done() for future in waited):
                    return True
            if runtime.may_wait(self.seconds):
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            return any(future.done() for future in waited)
        finally:
            if ending is not None:
                ending.cancel()
            if pause is not None:
                pause.cancel()


class Bill(NamedTuple):
    """What a call cost."""

    cost: Decimal
    tokens: int


_FREE = Bill(NO_COST, 0)


def charge(context: RowContext, attempt: RowContext | None, price: Decimal) -> Bill:
    """Put what an attempt cost on its row's account: what the handler reported, or else the price."""
    if attempt is not None and (attempt.has_reported or attempt.cost or attempt.tokens):
        context.pay(attempt)
        return Bill(attempt.cost, attempt.tokens)
    if not price:
        return _FREE
    context.add_cost(price)
    return Bill(price, 0)


class Work(Protocol):
    """What a trial is about: one row, or the rows of one batch."""

    @property
    def context(self) -> RowContext | None:
        """The row's context; None for a batch."""
        ...

    @property
    def rows(self) -> Sequence[Row]:
        """The row, or rows."""
        ...

    def arguments(self) -> tuple[Any, ...]:
        """What the handler is called with this time; effects of former calls are forgotten, but for their cost."""

    def accept(self, result: Any) -> Outcome:
        """Take the handler's result, and the effects of this call.

        Raises:
            MisfitError: it does not fit.
            BadRowError: it does not fit the schema.
        """
        ...

    def bill(self, prices: Sequence[Decimal]) -> Bill:
        """Count what the last call cost, whatever became of it.

        Args:
            prices: the most it may have cost, by row: what it did cost where the handler does not say.
        """
        ...

    async def recover(self, failure: Failure, runtime: Runtime) -> Outcome:
        """What becomes of it now that it failed for good."""
        ...


class RowWork:
    """One row."""

    __slots__ = ("_attempt", "_context", "row", "stage")

    def __init__(self, stage: Stage, row: Row, context: RowContext | None) -> None:
        self.stage = stage
        self.row = row
        self._context = context
        self._attempt: RowContext | None = None

    @property
    def context(self) -> RowContext | None:
        """The row's."""
        return self._context

    @property
    def rows(self) -> Sequence[Row]:
        """The row."""
        return (self.row,)

    def arguments(self) -> tuple[Any, ...]:
        """The row, and a context of this attempt's own."""
        row = self.row
        if self.stage.cache is not None and self.stage.cache.inputs is not None:
            row = deepcopy(row)  # what the handler changes is found by comparing
        elif self.stage.repeats and row.__class__ is dict:
            row = dict(row)
        if not self.stage.takes_context or self._context is None:
            return (row,)
        self._attempt = self._context.fork()
        return (row, self._attempt)

    def accept(self, result: Any) -> Outcome:
        """The result, checked."""
        outcome = checked(self.stage, result)
        if self.stage.output is not None:
            outcome = fitting(self.stage.output, outcome)
        if self._attempt is not None and self._context is not None:
            self._context.adopt(self._attempt)
        return outcome

    def bill(self, prices: Sequence[Decimal]) -> Bill:
        """The cost that the handler reported, or the price."""
        attempt, self._attempt = self._attempt, None
        context = self._context
        if context is None:
            return Bill(sum_costs(*prices), 0)
        return charge(context, attempt, prices[0] if prices else NO_COST)

    async def recover(self, failure: Failure, runtime: Runtime) -> Outcome:
        """The fallback's row, or the failure."""
        return await recover_async(self.stage, self.row, self._context, failure, runtime)


class Hit(NamedTuple):
    """An answer from the cache: no call is needed."""

    outcome: Outcome


class Trial:
    """How far a row, or a batch, is in a stage."""

    __slots__ = (
        "answering", "attempts", "before", "began", "failure", "held", "key", "last_error", "permit",
        "prices", "ticket", "units", "work",
    )  # fmt: skip

    def __init__(self, work: Work) -> None:
        self.work = work
        self.attempts = 0
        self.began = 0.0
        self.permit: Permit | None = None
        self.ticket: Ticket | None = None
        """While it waits for a limit's turn."""
        self.units = 0.0
        self.failure: Failure | None = None
        """What it failed with before any call."""
        self.last_error: BaseException | None = None
        self.prices: Sequence[Decimal] | None = None
        self.held: Reservation | None = None
        self.key: bytes | None = None
        """Of the cache, where the row found no answer there and has to bring one: others may wait for it."""
        self.answering: tuple[bytes, asyncio.Future[bytes | None]] | None = None
        """The key, and what tells of the answer that another row brings."""
        self.before: Before | None = None


class Policed:
    """One stage's policies at work in one worker.

    Args:
        stage: a stage whose ``is_policed`` holds.
        runtime: the worker's.
    """

    def __init__(self, stage: Stage, runtime: Runtime) -> None:
        self.stage = stage
        self.runtime = runtime
        self._clock = runtime.clock
        self._counts = runtime.counts(stage)
        self._times = runtime.times(stage)
        self._breaker = runtime.breaker(stage)
        self._limiter = runtime.limiter(stage)
        self._cache = runtime.cache(stage)
        has_deadline = stage.retry is not None and stage.retry.deadline is not None
        # Async, and with the same time limit for every call, or none: nothing is to be worked out before each.
        self._is_simple = stage.is_async and not has_deadline
        self._time_limit = runtime.time_limit(stage) if self._is_simple else None

    def begin(self, row: Row, context: RowContext | None) -> Trial | Outcome:
        """What a row meets before any call: a trial if the handler must be called, else what became of it already."""
        stage = self.stage
        try:
            if not is_for(stage, row, context):
                return row
            if stage.input is not None:
                row = stage.input.check(row)
        except RAISED as error:  # a user's condition or model may raise anything
            return self._doomed(row, context, error)
        trial = Trial(RowWork(stage, row, context))
        if self._cache is None:
            return trial
        try:
            hit = self._ask_cache(self._cache, trial, row, context)
        except RAISED as error:  # a user's function of inputs may raise anything
            return self._doomed(row, context, error)
        return trial if hit is None else hit.outcome

    def _doomed(self, row: Row, context: RowContext | None, error: BaseException) -> Trial:
        """A row that failed before any call; its first step settles what becomes of it."""
        trial = Trial(RowWork(self.stage, row, context))
        trial.failure = failure_of(self.stage, error)
        return trial

    def look(self, trial: Trial) -> Pause | Hit | None:
        """What is to be waited for before a slot is taken: the answer of another row with the same question.

        None: it is this row's turn to call.
        """
        if trial.answering is None:
            return None
        key, coming = trial.answering
        if not coming.done():
            return Pause(None, coming)
        trial.answering = None
        cache, context = self._cache, trial.work.context
        assert cache is not None  # noqa: S101 - it is what the row waited for
        answer = cache.arrived(coming.result())
        if answer is None:
            trial.key, trial.before = key, Before(context)
            return None
        return self._hit(answer, key, trial.work.rows[0], context)

    async def step(self, trial: Trial) -> Outcome | Pause:
        """One more call, or what must be waited for before it. The caller holds one of the stage's slots.

        Nothing that the handler does wrong is raised.
        """
        gate = self._late(trial) or trial.failure or self._admit(trial)
        if isinstance(gate, Failure):
            self._given_back(trial)
            return await self._give_up(trial, gate)
        if gate is not None:
            self._lend_probe(trial)
            return self._within_deadline(trial, gate)
        counts, clock = self._counts, self._clock
        started = clock.monotonic()
        if not trial.attempts:
            trial.began = started
        trial.attempts += 1
        stands_for = 0 if counts.calls < self._times.due else self._times.claim(counts.calls)
        counts.calls += 1
        try:
            result = await self._call(trial, started)
            raise_if_cancelled()
            outcome = trial.work.accept(result)
        except asyncio.CancelledError as error:
            self._given_back(trial)
            raise_if_ours()
            return await self._failed(trial, error, clock.monotonic())
        except (Exception, SystemExit) as error:
            if is_being_cancelled():  # it turned its cancellation into another error
                self._given_back(trial)
                raise asyncio.CancelledError from error
            now = clock.monotonic()
            self._note_seconds(now - started, stands_for)
            return await self._failed(trial, error, now)
        self._note_seconds(clock.monotonic() - started, stands_for)
        if self._breaker is not None and trial.permit is not None:
            self._breaker.succeeded(trial.permit)
        self._settle(trial)
        if trial.key is not None:
            self._keep(trial, outcome)
        return outcome

    def _note_seconds(self, seconds: float, stands_for: int) -> None:
        """A call is over; one that was chosen for it stands for so many others in the sample of their times."""
        self._counts.seconds += seconds
        if stands_for:
            self._times.add(seconds, stands_for)

    def _call(self, trial: Trial, now: float) -> Awaitable[Any]:
        """The call, to be awaited. Not async itself: that would be one coroutine more for every row."""
        stage, arguments = self.stage, trial.work.arguments()
        if not self._is_simple:
            return await_call(stage, arguments, self.runtime, self._time_left(trial, now))
        if self._time_limit is not None:
            return self._time_limit.call(stage.call, arguments)
        return cast("Awaitable[Any]", stage.call(*arguments))

    def abandon(self, trial: Trial) -> None:
        """The row will not go on here."""
        self._given_back(trial)
        self._leave_queue(trial)
        self._leave_cache(trial)
        if trial.answering is not None and self._cache is not None:
            self._cache.flights.abandon(*trial.answering)
            trial.answering = None

    # --- the cache ---------------------------------------------------------------------------------------------

    def _ask_cache(self, cache: StageCache, trial: Trial, row: Row, context: RowContext | None) -> Hit | None:
        key = cache.key(row)
        if key is None:
            return None
        entered = cache.enter(key)
        if isinstance(entered, Answer):
            return self._hit(entered, key, row, context)
        if entered is None:
            trial.key, trial.before = key, Before(context)
        else:
            trial.answering = (key, entered)
        return None

    def _hit(self, answer: Answer, key: bytes, row: Row, context: RowContext | None) -> Hit:
        """An answer costs nothing, unless it is the very row that paid: its cost was never committed."""
        self._counts.hits += 1
        if context is not None and answer.paid_by(Before(context).origin) and context.charge_once(key):
            context.add_cost(answer.cost, answer.tokens)
        is_partial = self._cache is not None and self._cache.is_partial
        return Hit(with_changes(row, answer.outcome) if is_partial else answer.outcome)

    def _keep(self, trial: Trial, outcome: Outcome) -> None:
        """Store the answer at once: a process that dies before the commit has not paid for nothing."""
        cache, key, before = self._cache, trial.key, trial.before
        assert cache is not None  # noqa: S101 - the key is of it
        assert key is not None  # noqa: S101
        assert before is not None  # noqa: S101 - it came with the key
        value = None
        if before.has_effects:
            cache.refuse("the handler emits, writes tables, or changes key, headers or timestamp")
        else:
            kept = changes_of(trial.work.rows[0], outcome) if cache.is_partial else outcome
            value = cache.keep(key, kept, before.cost, before.tokens, before.origin)
            if trial.work.context is not None:
                trial.work.context.charge_once(key)
        trial.key = None
        cache.leave(key, value)

    def _leave_cache(self, trial: Trial) -> None:
        """There is no answer: let the next one who waits try."""
        if trial.key is not None and self._cache is not None:
            key, trial.key = trial.key, None
            self._cache.leave(key, None)

    # --- before a call -----------------------------------------------------------------------------------------

    def _admit(self, trial: Trial) -> Pause | Failure | None:
        """None if the call may begin now."""
        breaker = self._breaker
        if breaker is not None and (trial.permit is None or not breaker.holds(trial.permit)):
            trial.permit = breaker.admit()
            if trial.permit is None:
                return self._stand_aside(trial, self._at_open_breaker(trial))
        # A limit's turn is used last, when nothing else is in the way; no money is set aside while a row waits for it.
        if self._limiter is not None and (gate := self._wait_for_turn(trial)) is not None:
            return gate
        if self.stage.price is not None and (gate := self._reserve(trial, self.stage.price)) is not None:
            return self._stand_aside(trial, gate)
        if self._limiter is not None:
            self._limiter.begin(trial.units, trial.ticket)
            trial.ticket = None
        return None

    def _at_open_breaker(self, trial: Trial) -> Pause | Failure:
        breaker = self._breaker
        assert breaker is not None  # noqa: S101 - the caller just asked it
        if breaker.spec.when_open == "wait":
            return Pause(breaker.seconds_left or None, breaker.changed())
        self._counts.refused += 1
        name = breaker.spec.name or self.stage.name
        last = f"; before: {trial.last_error!r}" if trial.last_error is not None else ""
        left = breaker.seconds_left
        error = BreakerOpenError(f"the circuit breaker {name!r} is open; probes in {left:.0f} s{last}")
        return failure_of(self.stage, error, trial.attempts)

    def _wait_for_turn(self, trial: Trial) -> Pause | Failure | None:
        limiter, ticket = self._limiter, trial.ticket
        assert limiter is not None  # noqa: S101 - the caller has looked
        if ticket is None:
            try:
                trial.units = limiter.units_of_all(trial.work.rows)
            except Exception as error:  # noqa: BLE001 - the user's function may raise anything
                return failure_of(self.stage, error, trial.attempts)
            if self.stage.price is None and limiter.is_free(trial.units):
                return None  # with a price it may have to wait for money, and needs a number to come back to
            ticket = trial.ticket = limiter.ticket(trial.units)
        turn = limiter.turn(ticket)
        return None if turn is None else Pause(turn.seconds, turn.until)

    def _stand_aside(self, trial: Trial, gate: Pause | Failure) -> Pause | Failure:
        """Something else is in the way of a call whose turn it may be: others of the limit go first meanwhile."""
        if self._limiter is not None and trial.ticket is not None:
            self._limiter.stand_aside(trial.ticket)
        return gate

    def _leave_queue(self, trial: Trial) -> None:
        """It will make no call: it keeps no place in the limit's queue."""
        if self._limiter is not None and trial.ticket is not None:
            ticket, trial.ticket = trial.ticket, None
            self._limiter.leave(ticket)

    def _reserve(self, trial: Trial, price: Price) -> Pause | Failure | None:
        """Set aside what the call may cost; without money, wait for some."""
        account = self.runtime.account
        try:
            if trial.prices is None:
                # An amount was checked when the stage was made; what a function gives was not.
                fixed = price if isinstance(price, Decimal) else None
                trial.prices = [price_of(price, row) if fixed is None else fixed for row in trial.work.rows]
            if account is None:
                return None
            trial.held = account.try_reserve(sum_costs(*trial.prices))
        except RowmillError as error:
            return failure_of(self.stage, error, trial.attempts)
        return None if trial.held is not None else Pause(None, cast("asyncio.Future[None]", account.changed()))

    def _late(self, trial: Trial) -> Failure | None:
        """The last failure, once the deadline of all attempts has passed while the next one waited."""
        retry, last = self.stage.retry, trial.last_error
        if retry is None or retry.deadline is None or last is None:
            return None
        if self._clock.monotonic() - trial.began < retry.deadline:
            return None
        return failure_of(self.stage, last, trial.attempts)

    def _within_deadline(self, trial: Trial, pause: Pause) -> Pause:
        """No wait beyond the deadline of all attempts."""
        retry = self.stage.retry
        if retry is None or retry.deadline is None or trial.last_error is None:
            return pause
        left = max(0.0, trial.began + retry.deadline - self._clock.monotonic())
        return Pause(left if pause.seconds is None else min(left, pause.seconds), pause.until)

    def _lend_probe(self, trial: Trial) -> None:
        """A row that waits for something else must not keep the breaker's only probe."""
        if trial.permit is not None and trial.permit.is_probe and self._breaker is not None:
            self._breaker.given_back(trial.permit)
            trial.permit = None

    def _time_left(self, trial: Trial, now: float) -> float | None:
        """How long this call may take."""
        limit, retry = self.stage.timeout, self.stage.retry
        if retry is None or retry.deadline is None:
            return limit
        left = max(0.001, trial.began + retry.deadline - now)
        return left if limit is None else min(limit, left)

    # --- after a call ------------------------------------------------------------------------------------------

    def _settle(self, trial: Trial) -> None:
        """A call is over: count what it cost, and take what it really used."""
        bill = trial.work.bill(trial.prices or ())
        if self._limiter is not None and bill.tokens:
            self._limiter.settle(trial.units, bill.tokens)
        if trial.held is not None and self.runtime.account is not None:
            self.runtime.account.settle(trial.held, bill.cost)
            trial.held = None
        if bill.cost or bill.tokens:
            self.runtime.costs.add(self.stage.name, bill.cost, tokens_out=bill.tokens)
        trial.permit = None

    async def _failed(self, trial: Trial, error: BaseException, now: float) -> Outcome | Pause:
        if isinstance(error, HandlerTimeoutError):
            self._counts.timeouts += 1
        if isinstance(error, NotStartedError):
            self._never_began(trial)
        elif self._breaker is not None and trial.permit is not None:
            if isinstance(error, StopExecution):
                self._breaker.given_back(trial.permit)
            else:
                self._breaker.failed(trial.permit, error)
        self._settle(trial)
        if isinstance(error, StopExecution):
            self._leave_cache(trial)
            return await trial.work.recover(failure_of(self.stage, error, trial.attempts), self.runtime)
        if self._limiter is not None:
            asked = retry_after_of(error, self._clock.now_ms())
            if asked:
                self._limiter.hold(asked)
        try:
            pause = self._pause_after(trial, error, now)
        except Exception as second:  # noqa: BLE001 - the user's function may raise anything
            error, pause = second, None
        if pause is not None:
            trial.last_error = error
            self._counts.retries += 1
            return Pause(pause)
        return await self._give_up(trial, failure_of(self.stage, error, trial.attempts))

    def _never_began(self, trial: Trial) -> None:
        """No call was made: nothing is to pay, and it speaks for nobody."""
        if self._breaker is not None and trial.permit is not None:
            self._breaker.given_back(trial.permit)
            trial.permit = None
        if trial.held is not None and self.runtime.account is not None:
            self.runtime.account.release(trial.held)
            trial.held = None
        trial.prices = None

    def _pause_after(self, trial: Trial, error: BaseException, now: float) -> float | None:
        retry = self.stage.retry
        if retry is None or not isinstance(error, Exception):
            return None
        return retry.pause_after(error, trial.attempts, now - trial.began, self._clock)

    async def _give_up(self, trial: Trial, failure: Failure) -> Outcome:
        self._counts.failures += 1
        self._leave_queue(trial)
        self._leave_cache(trial)
        outcome = await trial.work.recover(failure, self.runtime)
        if not isinstance(outcome, Failure):
            self._counts.defaulted += 1
        return outcome

    def _given_back(self, trial: Trial) -> None:
        if self._breaker is not None and trial.permit is not None:
            self._breaker.given_back(trial.permit)
        trial.permit = None
        if (
            trial.held is not None and self.runtime.account is not None
        ):  # it may have been paid for: unknown is not free
            self.runtime.account.settle(trial.held, trial.held.amount)
            trial.held = None


async def persist(policed: Policed, trial: Trial, may_begin: Callable[[], bool] | None = None) -> Outcome:
    """Run a trial to its end, waiting here; a slot of the stage is held only during calls.

    ``may_begin`` is asked before the first call, when the slot is there: without it the trial is given up.
    """
    runtime, slots = policed.runtime, policed.runtime.slots(policed.stage)
    try:
        while True:
            outcome: Outcome | Pause
            seen = policed.look(trial)
            if isinstance(seen, Hit):
                return seen.outcome
            if seen is None:
                async with slots:
                    is_late = may_begin is not None and not trial.attempts and not may_begin()
                    outcome = Pause(None) if is_late else await policed.step(trial)
            else:
                outcome, is_late = seen, False
            if not isinstance(outcome, Pause):
                return outcome
            if is_late or not await outcome.wait(runtime):
                policed.abandon(trial)
                return await trial.work.recover(given_up(policed.stage, trial.attempts), runtime)
    except BaseException:
        policed.abandon(trial)
        raise


GIVEN_UP = "given_up"


def given_up(stage: Stage, attempts: int) -> Failure:
    """A row that waits while the session ends: it stays undone."""
    return Failure(stage.name, GIVEN_UP, "the session ends while the row waits", attempts, then="stop")
