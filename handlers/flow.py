"""Rows on their way through a chain one by one, many at a time, completing in any order.

A :class:`Flow` belongs to one partition task. A row enters it as a :class:`Flight`, passes the chain's segments
one after the other, and comes out through ``on_done``, whatever became of it. Three kinds of segments:

* plain stages: whatever has come together runs in one go on a thread of the pool;
* a stage of one row per call that is async, timed or concurrent: its ``concurrency`` lanes, which the worker's flows
  share, take row after row. Lanes, not a task per row: creating a task costs more than everything else the engine does
  for a row. A row that a policy tells to wait leaves its lane and comes back: it holds nothing meanwhile;
* batch and frame stages: up to ``batch`` rows, or what has come together within ``linger`` seconds.

Ordering is settled at the entrance: with ``key``, a row waits there until the row of its key that came before it is
done, so no segment needs to know of it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from enum import Enum, auto
from typing import Any, Final, NamedTuple, TypeAlias

from ..state.model import Row
from .calls import raise_if_ours
from .capture import CapturedCall
from .chain import Chain, attempt, bare_attempt, run_lots, run_segment
from .context import RowContext
from .outcomes import Failure, Outcome, failure_of, odd_result
from .policed import Pause, Policed, Trial
from .runtime import Runtime
from .stage import Stage

_PLAIN_ROWS = 500
_CLOSE_SECONDS = 1.0


class Flight:
    """One row on its way: its value so far, and whatever its sender wants to recognise it by."""

    __slots__ = ("context", "key", "sender", "trial", "value")

    def __init__(self, value: Outcome, context: RowContext | None, key: object, sender: Any) -> None:
        self.value = value
        self.trial: Trial | None = None
        """How far it is in a stage with policies."""
        self.context = context
        self.key = key
        self.sender = sender

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was paid for it so far: beginning it anew later costs nobody anything."""
        return self.context is None or not (self.context.cost or self.context.tokens)


class _Paused(NamedTuple):
    """What wakes a row that waits, and whose leave it may hold."""

    timer: asyncio.TimerHandle | None
    policed: Policed


OnGivenUp: TypeAlias = "Callable[[Sequence[Flight], Failure | None], None]"
"""Called with rows that end undone, and the failure that ends the session, if that is why."""

OnDone: TypeAlias = "Callable[[Flight], Callable[[], Coroutine[Any, Any, None]] | None]"
"""Called with every row that is through; may return what has to run to its end before the row's key goes on."""


class Flow:
    """Runs flights through a chain.

    Args:
        chain: the stages.
        runtime: what the worker's stages share.
        on_done: called on the event loop with every flight that is through, failed or dropped.
        on_given_up: called with flights that end here undone, and the failure that ends the session, if one did.
        on_error: called when an error of the flow's own, not of a handler, waits for :meth:`check`.
        by_key: whether rows of one key (other than None) run one after the other, in the order they entered.
        linger: seconds that a row waits for company before a batch or frame stage.
    """

    def __init__(
        self,
        chain: Chain,
        runtime: Runtime,
        on_done: OnDone,
        on_error: Callable[[], None],
        on_given_up: OnGivenUp,
        *,
        by_key: bool,
        linger: float,
    ) -> None:
        self._on_done = on_done
        self._on_error = on_error
        self._on_given_up = on_given_up
        self._paused: dict[Flight, _Paused] = {}
        self._latest: float | None = None  # while draining: when the last row that waits must go on
        self._by_key = by_key
        # By key in work, the rows that wait for it. A queue is made for the first that has to: most never are needed.
        self._waiting: dict[object, deque[Flight] | None] = {}
        self._through: deque[object] = deque()  # keys whose row is done
        self._releasing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self.is_closed = False
        """Whether :meth:`close` was called: nothing begins and nothing comes out any more."""
        segment: _Segment | None = None
        self._segments: list[_Segment] = []
        for stages in reversed(chain.segments):
            leave = segment.enter if segment is not None else self._done
            segment = _make_segment(self, stages, runtime, leave, linger)
            self._segments.append(segment)
        assert segment is not None  # noqa: S101 - a chain has stages
        self._first = segment
        self._segments.reverse()
        self._entrance = _entrance(self._segments)

    def enter(self, flight: Flight) -> None:
        """Start a row, or queue it behind the rows of its key."""
        if self._by_key and flight.key is not None:
            waiting = self._waiting
            if flight.key in waiting:
                queue = waiting[flight.key]
                if queue is None:
                    queue = waiting[flight.key] = deque()
                queue.append(flight)
                return
            waiting[flight.key] = None
        self._first.enter(flight)

    def enter_all(self, flights: Sequence[Flight]) -> None:
        """As :meth:`enter`, for rows in their order: by far most are alone with their key, and begin together."""
        begin = flights
        if self._by_key:
            waiting, begin = self._waiting, []
            for flight in flights:
                key = flight.key
                if key is not None:
                    if key in waiting:
                        queue = waiting[key]
                        if queue is None:
                            queue = waiting[key] = deque()
                        queue.append(flight)
                        continue
                    waiting[key] = None
                begin.append(flight)
        self._first.enter_all(begin)

    def _done(self, flight: Flight) -> None:
        if self.is_closed:
            return
        if flight.value.__class__ is Failure and flight.value.halts:
            self._on_given_up([flight, *self._behind(flight)], flight.value)
            return
        later = self._on_done(flight)
        if later is None:
            self._release(flight)
        else:
            self.start(self._release_after(later, flight))

    async def _release_after(self, later: Callable[[], Coroutine[Any, Any, None]], flight: Flight) -> None:
        await later()
        self._release(flight)

    def _release(self, flight: Flight) -> None:
        """Let the next row of the key begin.

        A loop, not a call within a call: rows that failed before they came here are through as soon as they begin,
        and a thousand of one key may wait.
        """
        if not self._by_key or flight.key is None:
            return
        if not self._waiting[flight.key]:
            del self._waiting[flight.key]
            return
        self._through.append(flight.key)
        if self._releasing:
            return
        self._releasing = True
        try:
            while self._through and not self.is_closed:
                key = self._through.popleft()
                queue = self._waiting[key]
                if queue:
                    self._first.enter(queue.popleft())
                else:
                    del self._waiting[key]
        finally:
            self._releasing = False

    # --- rows that wait ----------------------------------------------------------------------------------------

    def pause(self, flight: Flight, pause: Pause, policed: Policed, go_on: Callable[[Flight], None]) -> None:
        """Let a row wait, holding nothing; then ``go_on`` is called with it, unless it was given up meanwhile."""
        loop = asyncio.get_running_loop()
        if self.is_closed:
            if flight.trial is not None:
                policed.abandon(flight.trial)
            return

        def resume(*_: object) -> None:
            paused = self._paused.pop(flight, None)
            if paused is not None:
                if paused.timer is not None:
                    paused.timer.cancel()
                go_on(flight)

        timer = loop.call_later(pause.seconds, resume) if pause.seconds is not None else None
        self._paused[flight] = paused = _Paused(timer, policed)
        if self._is_late(paused, flight):
            self._give_up(flight)
        elif pause.until is not None:
            pause.until.add_done_callback(resume)

    def drain(self, seconds: float) -> None:
        """Let rows in work finish. Others are given up, now and from now on.

        Those are rows that wait for longer than this, or for nobody knows how long; and rows for which nothing was
        called yet but plain functions: with a thousand of them before a slow stage the end would be minutes away.
        """
        self._latest = asyncio.get_running_loop().time() + seconds
        for flight in [flight for flight, paused in self._paused.items() if self._is_late(paused, flight)]:
            self._give_up(flight)
        for segment in self._entrance:
            for flight in segment.turn_back():
                self.give_up([flight])

    def _is_late(self, paused: _Paused, flight: Flight) -> bool:
        """Whether a row that waits should not wait any longer, because the flow ends."""
        if self._latest is None:
            return False
        if paused.timer is None or paused.timer.when() > self._latest:
            return True
        is_new = flight.trial is not None and not flight.trial.attempts and flight.is_fresh
        return is_new and self._entrance[-1].is_of(paused.policed.stage)

    def _give_up(self, flight: Flight) -> None:
        self._drop(flight)
        self._on_given_up([flight, *self._behind(flight)], None)

    def give_up(self, flights: Sequence[Flight]) -> None:
        """End rows undone, and those that wait for them: the session ends with one before them."""
        for flight in flights:
            self._on_given_up([flight, *self._behind(flight)], None)

    def _drop(self, flight: Flight) -> None:
        paused = self._paused.pop(flight)
        if paused.timer is not None:
            paused.timer.cancel()
        if flight.trial is not None:
            paused.policed.abandon(flight.trial)

    def _behind(self, flight: Flight) -> Sequence[Flight]:
        """The rows that wait for this one to be done; none of them will begin."""
        return self._waiting.pop(flight.key, None) or () if self._by_key and flight.key is not None else ()

    # --- work --------------------------------------------------------------------------------------------------

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run part of a segment's work. An error in it is a bug of ours, and is raised by :meth:`check`."""
        if self.is_closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.fail(task.exception())

    def fail(self, error: BaseException | None) -> None:
        """Something went wrong in the flow itself."""
        self._error = self._error or error
        self._on_error()

    def check(self) -> None:
        """Raise what went wrong inside the flow itself; handlers' errors never do, they are rows' failures."""
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Cancel everything under way; nothing comes out any more."""
        self.is_closed = True
        for flight in list(self._paused):
            self._drop(flight)
        tasks = list(self._tasks)
        for segment in self._segments:
            tasks += segment.close()
        for task in tasks:
            task.cancel()
        if tasks:  # a handler may swallow its cancellation: it is not waited for, and gets no further row
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)


def _entrance(segments: Sequence[_Segment]) -> Sequence[_Segment]:
    """The segments whose queues hold rows for which nothing but plain functions was called."""
    plain = 0
    while plain < len(segments) - 1 and isinstance(segments[plain], _Plain):
        plain += 1
    return segments[: plain + 1]


def _make_segment(
    flow: Flow,
    stages: tuple[Stage, ...],
    runtime: Runtime,
    leave: Callable[[Flight], None],
    linger: float,
) -> _Segment:
    first = stages[0]
    if first.batch is not None:
        return _Batches(flow, first, runtime, leave, linger)
    if first.is_plain:
        return _Plain(flow, stages, runtime, leave)
    if first.stages:
        return _Elements(flow, first, runtime, leave)
    return _PolicedCalls(flow, first, runtime, leave) if first.is_policed else _Calls(flow, first, runtime, leave)


class _Segment(ABC):
    """Part of the chain, with a queue before it and a way on behind it."""

    def __init__(self, flow: Flow, leave: Callable[[Flight], None]) -> None:
        self.flow = flow
        self.leave = leave
        self._queue: deque[Flight] = deque()
        self._turns_back = False

    def enter(self, flight: Flight) -> None:
        """Queue a row; one that is done already (dropped, failed) only passes through."""
        if self.flow.is_closed:  # a handler that swallowed its cancellation is through
            return
        if flight.value is None or flight.value.__class__ is Failure:
            self.leave(flight)
            return
        if self._turns_back and flight.is_fresh:
            self.flow.give_up([flight])
            return
        self._queue.append(flight)
        self._wake()

    def enter_all(self, flights: Sequence[Flight]) -> None:
        """As :meth:`enter`, for rows in their order."""
        for flight in flights:
            self.enter(flight)

    @abstractmethod
    def _wake(self) -> None:
        """Something is in the queue: see that somebody works on it."""

    def is_of(self, stage: Stage) -> bool:
        """Whether this is the segment of that one stage."""
        del stage
        return False

    def turn_back(self) -> list[Flight]:
        """Take no further row, and hand out those in the queue; but rows that something was paid for go on."""
        self._turns_back = True
        fresh = [flight for flight in self._queue if flight.is_fresh]
        paid = [flight for flight in self._queue if not flight.is_fresh]
        self._queue.clear()
        self._queue.extend(paid)
        return fresh

    def close(self) -> Sequence[asyncio.Task[None]]:
        """Nothing more will be worked on; gives the tasks that are at it and are not the flow's own."""
        return ()


class _Plain(_Segment):
    """Fused plain stages: what has come together while the last lot ran is the next one."""

    def __init__(
        self, flow: Flow, stages: tuple[Stage, ...], runtime: Runtime, leave: Callable[[Flight], None]
    ) -> None:
        super().__init__(flow, leave)
        self._stages = stages
        self._runtime = runtime
        self._busy = False

    def _wake(self) -> None:
        if not self._busy:
            self._busy = True
            self.flow.start(self._work())

    async def _work(self) -> None:
        try:
            while self._queue:
                lot = [self._queue.popleft() for _ in range(min(len(self._queue), _PLAIN_ROWS))]
                values, contexts = _columns(lot)
                await self._runtime.pool.run(run_segment, self._stages, values, contexts, self._runtime)
                self._queue.extendleft(reversed(_hand_on(lot, values, self.leave)))
        finally:
            self._busy = False


class Lanes:
    """The lanes of one stage in one worker: so many calls at once, over all partitions.

    The segments of all flows that have rows for the stage take turns, row by row: no partition waits for another one's
    backlog. Lanes of each partition's own that took a slot of the stage for each row were rejected: with four
    partitions and 100 slots, 400 lanes stood in one queue, and every row paid for a future, for a trip through the
    event loop and for a look at those in front.

    Args:
        most: calls at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lanes: set[_Lane] = set()
        self._turns: deque[_Calls] = deque()  # each segment that has rows, once
        self.are_all_open = False
        """Whether as many lanes are open as there may be: each takes further rows by itself."""

    def wake(self, segment: _Calls, rows: int = 1) -> None:
        """Rows have come into the segment."""
        if not segment.is_in_turn:
            segment.is_in_turn = True
            self._turns.append(segment)
        for _ in range(min(rows, self._most - len(self._lanes))):
            self._open()

    def leave(self, segment: _Calls) -> list[asyncio.Task[None]]:
        """The segment's flow ends: gives the tasks that call handlers for it."""
        if segment.is_in_turn:
            segment.is_in_turn = False
            self._turns.remove(segment)
        return [lane.task for lane in self._lanes if lane.segment is segment]

    def _open(self) -> None:
        lane = _Lane()
        self._lanes.add(lane)
        self.are_all_open = len(self._lanes) >= self._most
        lane.task = asyncio.create_task(self._run(lane))
        lane.task.add_done_callback(lambda _: self._ended(lane))

    async def _run(self, lane: _Lane) -> None:
        """Row after row until none is left: the hot path of async rows."""
        turns = self._turns
        while turns:
            segment = lane.segment = turns[0]
            turns.rotate(-1)
            flight = segment.take()
            if flight is None:
                turns.pop()
                segment.is_in_turn = False
                continue
            value, call = flight.value, segment.call
            if call is None or value.__class__ is not dict or segment.counts.rows >= segment.times.due:
                outcome = await segment.attempt(flight)
            else:  # what bare_attempt does: a coroutine around the handler's own would cost 0.5 µs a row
                try:
                    result = call(value, flight.context) if segment.takes_context else call(value)
                    if result.__class__ is not dict:
                        result = await result
                    outcome = result if result.__class__ is dict else odd_result(segment.stage, result)
                except asyncio.CancelledError as error:
                    raise_if_ours()
                    outcome = failure_of(segment.stage, error)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - a handler may raise anything
                    outcome = failure_of(segment.stage, error)  # no fallback: those are policies of async stages
            if segment.flow.is_closed:  # the handler swallowed its cancellation: this task gets no further row
                return
            if outcome is not _ELSEWHERE:
                if outcome.__class__ is dict:
                    segment.counts.rows += 1
                elif value.__class__ is dict:  # the parts of a row that was split were counted one by one
                    segment.counts.note(outcome)
                flight.value = outcome
                segment.leave(flight)

    def _ended(self, lane: _Lane) -> None:
        """A lane came to its end, or to its flow's."""
        self._lanes.discard(lane)
        self.are_all_open = False
        task, segment = lane.task, lane.segment
        if segment is not None and not task.cancelled() and task.exception() is not None:
            segment.flow.fail(task.exception())
        # Others go on with what this one left, unless it was not us who ended it: all of the program's tasks end.
        if self._turns and (not task.cancelled() or (segment is not None and segment.flow.is_closed)):
            self._open()


class _Lane:
    """A task that calls a stage's handler for one row after the other."""

    __slots__ = ("segment", "task")

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.segment: _Calls | None = None
        """Whose row it has."""


class _Elsewhere(Enum):
    """Stands for the outcome of a row that has left its lane in another way."""

    ELSEWHERE = auto()


_ELSEWHERE: Final = _Elsewhere.ELSEWHERE


class _Calls(_Segment):
    """One call per row, several calls at once."""

    def __init__(
        self,
        flow: Flow,
        stage: Stage,
        runtime: Runtime,
        leave: Callable[[Flight], None],
    ) -> None:
        super().__init__(flow, leave)
        self.is_in_turn = False
        """The lanes' own: whether they know that there are rows."""
        self.stage = stage
        self.takes_context = stage.takes_context
        is_bare = stage.is_async and stage.timeout is None and not stage.is_policed
        self.call = stage.call if is_bare and not isinstance(stage.call, CapturedCall) else None
        """What a lane may call and await by itself: an async handler with nothing around it."""
        self.times = runtime.times(stage)
        self.counts = runtime.counts(stage)
        self._runtime = runtime
        self._lanes = runtime.lanes(stage)

    def enter_all(self, flights: Sequence[Flight]) -> None:
        """As :meth:`enter`: rows that are none, and the end, are for the slow way."""
        if flights and not self._turns_back and all(flight.value.__class__ is dict for flight in flights):
            self._queue.extend(flights)
            self._lanes.wake(self, len(flights))
        else:
            super().enter_all(flights)

    def _wake(self) -> None:
        if not self.is_in_turn or not self._lanes.are_all_open:
            self._lanes.wake(self)

    def take(self) -> Flight | None:
        """The next row, if one is left."""
        return self._queue.popleft() if self._queue else None

    def attempt(self, flight: Flight) -> Awaitable[Outcome | _Elsewhere]:
        """Call the handler for a row."""
        value = flight.value
        if value.__class__ is dict:
            made, stage = self.counts.rows, self.stage
            if made >= self.times.due:
                stage = self.times.stage(stage, made)
            return bare_attempt(stage, value, flight.context, self._runtime)
        return _attempt_all(self.stage, value, flight.context, self._runtime)

    def close(self) -> Sequence[asyncio.Task[None]]:
        """Take no further turn."""
        return self._lanes.leave(self)


class _PolicedCalls(_Calls):
    """The same, for a stage with policies."""

    def __init__(self, flow: Flow, stage: Stage, runtime: Runtime, leave: Callable[[Flight], None]) -> None:
        super().__init__(flow, stage, runtime, leave)
        self._policed = runtime.policed(stage)
        self._slots = runtime.slots(stage)  # the parts of rows that were split need some beside the lanes
        self._returned: deque[Flight] = deque()  # rows that have waited, in the order of their return; they go first

    def take(self) -> Flight | None:
        """The next row, if one is left."""
        return self._returned.popleft() if self._returned else super().take()

    async def attempt(self, flight: Flight) -> Outcome | _Elsewhere:
        """Try a row once, if its policies allow that now."""
        policed, trial = self._policed, flight.trial
        if trial is None:
            value = flight.value
            if value.__class__ is not dict:
                self.flow.start(self._each(flight))
                return _ELSEWHERE
            begun = policed.begin(value, flight.context)
            if not isinstance(begun, Trial):
                return begun
            trial = flight.trial = begun
        seen = policed.look(trial)
        if isinstance(seen, Pause):
            self.flow.pause(flight, seen, policed, self._come_back)
            return _ELSEWHERE
        if seen is not None:
            flight.trial = None
            return seen.outcome
        return await self._step(flight, trial)

    async def _step(self, flight: Flight, trial: Trial) -> Outcome | _Elsewhere:
        policed = self._policed
        try:
            async with self._slots:
                is_late = self._turns_back and not trial.attempts and flight.is_fresh
                outcome = None if is_late else await policed.step(trial)
        except asyncio.CancelledError:
            policed.abandon(trial)
            raise
        if is_late:  # it ended while the row waited for the slot
            policed.abandon(trial)
            self.flow.give_up([flight])
            return _ELSEWHERE
        if isinstance(outcome, Pause):
            self.flow.pause(flight, outcome, policed, self._come_back)
            return _ELSEWHERE
        flight.trial = None
        return outcome

    async def _each(self, flight: Flight) -> None:
        """The parts of a row that was split, one after the other; rare enough for a task of its own."""
        flight.value = await _attempt_all(self.stage, flight.value, flight.context, self._runtime)
        self.leave(flight)

    def _come_back(self, flight: Flight) -> None:
        self._returned.append(flight)
        self._wake()

    def is_of(self, stage: Stage) -> bool:
        """Whether this is the segment of that one stage."""
        return stage is self.stage

    def close(self) -> Sequence[asyncio.Task[None]]:
        """Take no further turn, and give back what rows hold that wait for a lane again."""
        for flight in self._returned:
            if flight.trial is not None:
                self._policed.abandon(flight.trial)
        return super().close()


class _Elements(_Segment):
    """Rows through a stage that is made of stages: these have slots of their own, and a row may wait in there.

    So each has a task, and nothing bounds them here but the worker's rows in work.
    """

    def __init__(self, flow: Flow, stage: Stage, runtime: Runtime, leave: Callable[[Flight], None]) -> None:
        super().__init__(flow, leave)
        self._stage = stage
        self._runtime = runtime

    def _wake(self) -> None:
        while self._queue:
            self.flow.start(self._run(self._queue.popleft()))

    async def _run(self, flight: Flight) -> None:
        value = flight.value
        if value.__class__ is dict:
            flight.value = await attempt(self._stage, value, flight.context, self._runtime)
        else:
            flight.value = await _attempt_all(self._stage, value, flight.context, self._runtime)
        self.leave(flight)


class _Batches(_Segment):
    """Several rows per call: as many as the stage takes, or as have come within ``linger``."""

    def __init__(
        self,
        flow: Flow,
        stage: Stage,
        runtime: Runtime,
        leave: Callable[[Flight], None],
        linger: float,
    ) -> None:
        super().__init__(flow, leave)
        self._stage = stage
        self._runtime = runtime
        self._slots = runtime.slots(stage)
        self._linger = linger
        self._timer: asyncio.TimerHandle | None = None

    def _wake(self) -> None:
        if len(self._queue) >= (self._stage.batch or 1):
            self._send()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._linger, self._send)

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.flow.is_closed:
            return
        size = self._stage.batch or 1
        lot = [self._queue.popleft() for _ in range(min(size, len(self._queue)))]
        if lot:
            self.flow.start(self._call(lot))

    async def _call(self, lot: list[Flight]) -> None:
        values, contexts = _columns(lot)
        if self._stage.is_policed:  # holds a slot only while it calls
            await run_lots(self._stage, values, contexts, self._runtime, lambda: not self._is_late(lot))
        else:
            async with self._slots:
                if self._is_late(lot):
                    self.flow.give_up(lot)
                    return
                await run_lots(self._stage, values, contexts, self._runtime)
        self.flow.give_up(_hand_on(lot, values, self.leave))

    def _is_late(self, lot: Sequence[Flight]) -> bool:
        """Whether it all ended while they waited for their call."""
        return self._turns_back and all(flight.is_fresh for flight in lot)


def _columns(lot: Sequence[Flight]) -> tuple[list[Outcome], list[RowContext] | None]:
    contexts = [flight.context for flight in lot if flight.context is not None]
    return [flight.value for flight in lot], contexts if len(contexts) == len(lot) else None


def _hand_on(lot: Sequence[Flight], values: Sequence[Outcome], leave: Callable[[Flight], None]) -> list[Flight]:
    """Let rows go on; gives those that did not run, because one before them ends the session."""
    for flight, value in zip(lot, values, strict=False):
        flight.value = value if value != [] else None
        leave(flight)
    return list(lot[len(values) :])


async def _attempt_all(stage: Stage, rows: Any, context: RowContext | None, runtime: Runtime) -> Outcome:
    """A row that an earlier stage split: each part in turn; one failure is the failure of all."""
    out: list[Row] = []
    for row in rows:
        outcome = await attempt(stage, row, context, runtime)
        if isinstance(outcome, Failure):
            return outcome
        out += outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]
    return out or None
