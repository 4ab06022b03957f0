"""A chain: the compiled stages of one pipeline, and what became of each row that went through.

Work goes stage by stage over a batch of rows. Stages that are bare function calls ("plain") are fused and run
row by row without a task, lock or allocation between them; that loop, ``_run_plain``, is the hot path.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from itertools import repeat
from typing import Any, TypeAlias, cast

from ..state.context import sum_costs
from ..state.errors import BadRowError, ConfigError
from ..state.model import Row
from .calls import await_call, raise_if_cancelled, raise_if_ours
from .capture import CapturedCall, forget, tell
from .context import NO_COST, RowContext
from .errors import MisfitError
from .frames import rows_to_frame, split_result
from .outcomes import RAISED, Failure, Outcome, checked, failure_of, odd_result, type_name
from .policed import Bill, Trial, charge, persist
from .recovery import recover, recover_async
from .runtime import Runtime, check_resources
from .stage import Handler, Stage, fitting, is_for
from .stage_counts import Passage

_PlainCalls: TypeAlias = Sequence[tuple[Stage, Handler, bool]]
"""Plain stages, what is called for each, and whether that takes a row's context."""

__all__ = ["Chain", "Failure", "Outcome", "attempt", "bare_attempt", "run_lots", "run_segment"]


class Chain:
    """Stages in order, ready to run. Knows rows and contexts, and nothing of where they come from.

    Args:
        stages: at least one; their names differ.

    Raises:
        ConfigError: no stage, two of one name, or two that share a resource and do not agree about it.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ConfigError("stages", list(stages), "add at least one stage before running the pipeline")
        every = with_inner(stages)
        names = Counter(stage.name for stage in every)
        for name, count in names.items():
            if count > 1:
                raise ConfigError("stage(name=)", name, "another stage has this name; give each its own")
        check_resources(every)
        self.stages = tuple(stages)
        self.takes_context = any(stage.needs_context for stage in stages)
        self.is_sync = all(stage.is_plain for stage in stages)
        """Whether the whole chain may run in one go on one thread."""
        self.segments = _segments(self.stages)
        """The stages in groups that run together: neighbouring plain per-row stages, or one other stage."""
        self.is_row_by_row = self.is_sync and len(self.segments) == 1 and self.stages[0].batch is None
        """Whether each row runs through the whole chain before the next one begins."""

    def run_sync(
        self, rows: list[Outcome], contexts: Sequence[RowContext] | None, runtime: Runtime | None = None
    ) -> None:
        """Run a chain for which ``is_sync`` holds, on this thread. ``rows`` are replaced by their outcomes.

        Where a row ends the session (a Failure that ``halts``), those behind it are taken out of ``rows``.

        Args:
            rows: one entry per input row; entries that are no row (failed before) are left alone.
            contexts: one per row; None when ``takes_context`` is False.
            runtime: where stages count; None: nowhere.
        """
        for segment in self.segments:
            run_segment(segment, rows, contexts, runtime)

    async def run(self, rows: list[Outcome], contexts: Sequence[RowContext] | None, runtime: Runtime) -> None:
        """As :meth:`run_sync`, for any chain; blocking stages on threads."""
        for segment in self.segments:
            if segment[0].is_plain:
                await runtime.pool.run(run_segment, segment, rows, contexts, runtime)
            else:
                await run_lots(segment[0], rows, contexts, runtime)


def with_inner(stages: Sequence[Stage]) -> list[Stage]:
    """These stages, and those inside their elements, each once; one of the chain's own as often as it is there."""
    found = list(stages)
    for stage in stages:
        found += [inner for inner in with_inner(stage.stages) if not any(inner is known for known in found)]
    return found


def _segments(stages: Sequence[Stage]) -> list[tuple[Stage, ...]]:
    """Neighbouring plain per-row stages together, every other stage by itself."""
    segments: list[tuple[Stage, ...]] = []
    for stage in stages:
        fusible = stage.is_plain and stage.batch is None
        if fusible and segments and segments[-1][0].is_plain and segments[-1][0].batch is None:
            segments[-1] += (stage,)
        else:
            segments.append((stage,))
    return segments


def run_segment(
    segment: tuple[Stage, ...],
    rows: list[Outcome],
    contexts: Sequence[RowContext] | None,
    runtime: Runtime | None = None,
) -> None:
    """A group of plain stages over these rows, on this thread; ``rows`` are replaced by their outcomes."""
    if segment[0].batch is None:
        passage = Passage(segment)
        _run_plain(segment, rows, contexts, passage, runtime)
        if runtime is not None:
            runtime.note_passage(passage)
    else:
        for lot in _lots(segment[0], rows, contexts, runtime):
            lot.call()
            if lot.halts():
                return


# --- rows ------------------------------------------------------------------------------------------------------


def _run_plain(
    stages: tuple[Stage, ...],
    rows: list[Outcome],
    contexts: Sequence[RowContext] | None,
    passage: Passage,
    runtime: Runtime | None,
) -> None:
    """Each row through all of ``stages`` before the next; where it is time for that, one in the middle is timed."""
    calls: _PlainCalls = [(stage, stage.call, stage.takes_context) for stage in stages]
    timed = runtime.timed(stages) if runtime is not None else None
    if timed is None:
        _run_rows(calls, rows, 0, len(rows), contexts, passage)
        return
    at = len(rows) // 2
    timed_calls: _PlainCalls = [(stage, call, stage.takes_context) for stage, call in zip(stages, timed, strict=True)]
    for these, begin, end in ((calls, 0, at), (timed_calls, at, at + 1), (calls, at + 1, len(rows))):
        if len(rows) >= end:  # else the session has ended with a row before
            _run_rows(these, rows, begin, end, contexts, passage)


def _run_rows(
    calls: _PlainCalls,
    rows: list[Outcome],
    begin: int,
    end: int,
    contexts: Sequence[RowContext] | None,
    passage: Passage,
) -> None:
    """The hot path: these rows, one after the other, through all the calls.

    One loop turn and two comparisons a row and stage (about 0.06 µs here) besides the call itself. The stage's
    name is needed only when something is amiss, so the loop variable is all that is kept for it. What stages count is
    told by how many rows there were, and by those that did not go straight through: no row pays for it.
    """
    strays = 0
    for i, value in enumerate(rows[begin:end], begin):
        if value.__class__ is dict:
            stage = calls[0][0]
            try:
                for stage, handler, takes_context in calls:
                    result = handler(value, contexts[i]) if takes_context else handler(value)  # type: ignore[index]
                    if result.__class__ is not dict:
                        result = odd_result(stage, result)
                        if result.__class__ is not dict:
                            value = result
                            break
                    value = result
            except RAISED as error:
                outcome = _go_on(calls, stage, value, contexts[i] if contexts else None, error, passage)
            else:
                if value.__class__ is dict:
                    rows[i] = value
                    continue
                outcome = _leave(calls, stage, value, contexts[i] if contexts else None, passage)
        else:
            strays += 1
            if not isinstance(value, list):
                continue
            outcome = _spread(calls, value, contexts[i] if contexts else None, passage)
        rows[i] = outcome
        if _halts(rows, i):
            break
    passage.went(calls[0][0], min(end, len(rows)) - begin - strays)


def _halts(rows: list[Outcome], place: int) -> bool:
    """Whether the session ends with what became of this row: those behind it are taken out, for they did not run."""
    outcome = rows[place]
    if not isinstance(outcome, Failure) or not outcome.halts:
        return False
    del rows[place + 1 :]
    return True


def _spread(calls: _PlainCalls, several: list[Row], context: RowContext | None, passage: Passage) -> Outcome:
    """Several rows made from one, through the remaining stages: all of them, or the failure of any."""
    if not calls:
        return several or None
    out: list[Row] = []
    for row in several:
        lone: list[Outcome] = [row]
        _run_rows(calls, lone, 0, 1, [context] if context else None, passage)
        outcome = lone[0]
        if isinstance(outcome, Failure):
            return outcome
        if isinstance(outcome, list):
            out += outcome
        elif outcome is not None:
            out.append(outcome)
    return out or None


def _behind(calls: _PlainCalls, stage: Stage) -> _PlainCalls:
    """The calls behind that stage's."""
    place = next(place for place, (one, _, _) in enumerate(calls, 1) if one is stage)
    return calls[place:]


def _leave(calls: _PlainCalls, stage: Stage, result: Any, context: RowContext | None, passage: Passage) -> Outcome:
    """A plain stage gave no row, or several: these go through the remaining stages."""
    passage.left(stage, result)
    return None if result is None else _spread(_behind(calls, stage), result, context, passage)


def _go_on(
    calls: _PlainCalls, failed: Stage, row: Any, context: RowContext | None, error: BaseException, passage: Passage
) -> Outcome:
    """A plain stage raised: the row's failure, or what a fallback made of it, through the remaining stages."""
    outcome = recover(failed, row, context, failure_of(failed, error))
    passage.left(failed, outcome)
    if outcome is None or isinstance(outcome, Failure):
        return outcome
    rows = outcome if isinstance(outcome, list) else [outcome]
    several = _spread(_behind(calls, failed), rows, context, passage)
    return several[0] if isinstance(several, list) and len(several) == 1 else several


# --- stages that are awaited -----------------------------------------------------------------------------------


async def run_lots(
    stage: Stage,
    rows: list[Outcome],
    contexts: Sequence[RowContext] | None,
    runtime: Runtime,
    may_begin: Callable[[], bool] | None = None,
) -> None:
    """Any one stage over these rows, one call after the other, in order; ``rows`` are replaced by their outcomes."""
    for lot in _lots(stage, rows, contexts, runtime):
        if not stage.is_policed:
            await _run_lot(lot, stage, runtime)
        elif stage.batch is not None:
            await persist(runtime.policed(stage), Trial(lot), may_begin)
        else:
            lot.settle_with(await attempt(stage, *lot.only, runtime))
        if lot.halts():
            return


async def _run_lot(lot: _Lot, stage: Stage, runtime: Runtime) -> None:
    try:
        lot.accept(await await_call(lot.counted(stage), lot.arguments(), runtime, stage.timeout))
        lot.pay()
        raise_if_cancelled()
    except asyncio.CancelledError as error:
        raise_if_ours()
        lot.fail(error)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a handler may raise anything
        lot.fail(error)


async def attempt(stage: Stage, row: Row, context: RowContext | None, runtime: Runtime) -> Outcome:
    """One row through one stage of one row per call, with all its policies, waiting here where they say so.

    Whatever the handler does wrong is the row's Failure.
    """
    if runtime.traced is not None:
        stage = runtime.traced(stage)
    outcome: Outcome | Trial
    counts = runtime.counts(stage)
    if stage.is_policed:
        policed = runtime.policed(stage)
        outcome = policed.begin(row, context)
        if isinstance(outcome, Trial):
            outcome = await persist(policed, outcome)
    else:
        times = runtime.times(stage)
        timed = stage if counts.rows < times.due else times.stage(stage, counts.rows)
        outcome = await bare_attempt(timed, row, context, runtime)
    counts.note(outcome)
    return outcome


async def bare_attempt(stage: Stage, row: Row, context: RowContext | None, runtime: Runtime) -> Outcome:
    """As :func:`attempt`, for a stage without policies: the hot path of async rows."""
    call, takes_context, token = stage.call, stage.takes_context, None
    try:
        if stage.is_async and stage.timeout is None:
            if isinstance(call, CapturedCall):
                token = tell(context, call.stage)
                takes_context = call.takes_context
                call = call.handler
            result = call(row, context) if takes_context else call(row)
            if result.__class__ is not dict:  # a wrapper around an async handler may have run it already
                result = await result
        else:
            result = await await_call(stage, (row, context) if takes_context else (row,), runtime, stage.timeout)
        return result if result.__class__ is dict else odd_result(stage, result)
    except asyncio.CancelledError as error:
        raise_if_ours()
        return failure_of(stage, error)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a handler may raise anything
        return recover(stage, row, context, failure_of(stage, error))
    finally:
        if token is not None:
            forget(token)


# --- lots: the rows of one call --------------------------------------------------------------------------------


class _Lot:
    """The rows of one call, where they came from, and the way of its result back to them.

    A row that an earlier stage split holds several places; whatever fails in one of them fails the whole row.
    """

    def __init__(
        self, stage: Stage, rows: list[Outcome], contexts: Sequence[RowContext] | None, runtime: Runtime | None
    ) -> None:
        self._stage = stage
        self._runtime = runtime
        self._places = rows
        self._contexts = contexts
        self._origins: list[int] = []
        self._parts_of: list[int] = []  # which part of its row each is
        self._inputs: list[Row] = []
        self._attempts: dict[int, RowContext] = {}  # contexts of this attempt's own, by the row's place

    def __len__(self) -> int:
        return len(self._inputs)

    def add(self, origin: int, part: int, row: Row) -> None:
        self._origins.append(origin)
        self._parts_of.append(part)
        self._inputs.append(row)

    @property
    def context(self) -> None:
        """Each row has its own."""
        return

    @property
    def rows(self) -> Sequence[Row]:
        """The rows."""
        return self._inputs

    @property
    def only(self) -> tuple[Row, RowContext | None]:
        """The row of a lot of one, and its context."""
        return self._inputs[0], self._context(self._origins[0])

    def _context(self, origin: int) -> RowContext | None:
        return self._contexts[origin] if self._contexts else None

    def arguments(self) -> tuple[Any, ...]:
        """What the handler is called with; contexts of this attempt's own where the call may be repeated."""
        stage, contexts = self._stage, self._contexts
        takes_context = stage.takes_context and contexts
        if stage.batch is None:
            return (self._inputs[0], self._context(self._origins[0])) if takes_context else (self._inputs[0],)
        given_rows = [dict(row) for row in self._inputs] if stage.repeats else self._inputs
        many: Any = rows_to_frame(given_rows) if stage.frame else list(given_rows)
        if not takes_context or contexts is None:
            return (many,)
        if not stage.is_policed and not stage.recovers:
            return (many, [contexts[origin] for origin in self._origins])
        # What a call does that fails is undone. Parts of one row share a context, here as elsewhere.
        self._attempts = {origin: contexts[origin].fork() for origin in dict.fromkeys(self._origins)}
        return (many, [self._attempts[origin] for origin in self._origins])

    def call(self) -> None:
        """Call the handler here and now, and give each row its part."""
        try:
            self.accept(self.counted(self._stage).call(*self.arguments()))
            self.pay()
        except RAISED as error:
            self.fail(error)

    def counted(self, stage: Stage) -> Stage:
        """Count a call of this stage, which is without policies; gives the stage to call, which may be a timed one."""
        if self._runtime is None:
            return stage
        counts, times = self._runtime.counts(stage), self._runtime.times(stage)
        called = stage if counts.calls < times.due else times.stage(stage, counts.calls)
        counts.calls += 1
        return called

    def fail(self, error: BaseException) -> None:
        """The call failed: so did every row in it, as far as none has a fallback."""
        self.pay()
        failure = failure_of(self._stage, error)
        self._merge_all(
            recover(self._stage, row, self._context(origin), failure)
            for origin, row in zip(self._origins, self._inputs, strict=True)
        )

    def accept(self, result: Any) -> Outcome:
        """Give each row its part of the result.

        Raises:
            MisfitError: the result does not fit the rows; none of them got a part.
        """
        parts = self._parts(result)
        if self._stage.output is not None:
            parts = [self._fitting(*each) for each in zip(self._origins, self._inputs, parts, strict=True)]
        self._merge_all(parts)
        for origin, attempt_context in self._attempts.items():
            context = self._context(origin)
            if context is not None:
                context.adopt(attempt_context)
        return None

    def halts(self) -> bool:
        """Whether the session ends with one of its rows: those behind that are taken out, as if they had not run."""
        return any(_halts(self._places, origin) for origin in self._origins)

    def _fitting(self, origin: int, row: Row, part: Any) -> Outcome:
        """A row's part, if it fits the schema; one that does not fails alone."""
        check = self._stage.output
        assert check is not None  # noqa: S101 - the caller has looked
        try:
            return cast("Outcome", fitting(check, part))
        except BadRowError as error:
            return recover(self._stage, row, self._context(origin), failure_of(self._stage, error))

    def settle_with(self, outcome: Outcome) -> None:
        """What became of the row of a lot of one."""
        self._merge(0, outcome)

    def pay(self) -> None:
        """Count what the last call cost, where it had contexts of its own."""
        if self._attempts:
            self.bill(())

    def bill(self, prices: Sequence[Decimal]) -> Bill:
        """What the last call cost, each row its own share."""
        attempts, self._attempts = self._attempts, {}
        asked: dict[int, Decimal] = {}
        for origin, price in zip(self._origins, prices or repeat(NO_COST), strict=False):
            asked[origin] = sum_costs(asked.get(origin, NO_COST), price)
        bills = [
            charge(context, attempts.get(origin), price)
            for origin, price in asked.items()
            if (context := self._context(origin)) is not None
        ]
        return Bill(sum_costs(*(bill.cost for bill in bills)), sum(bill.tokens for bill in bills))

    async def recover(self, failure: Failure, runtime: Runtime) -> Outcome:
        """It failed for good: what becomes of each row; the failure if that is what became of all."""
        outcomes = [
            await recover_async(self._stage, row, self._context(origin), failure, runtime)
            for origin, row in zip(self._origins, self._inputs, strict=True)
        ]
        self._merge_all(outcomes)
        return failure if all(isinstance(outcome, Failure) for outcome in outcomes) else None

    def _parts(self, result: Any) -> list[Any]:
        stage, count = self._stage, len(self._inputs)
        if stage.frame:
            return list(split_result(result, count))
        if stage.batch is None:
            return [checked(stage, result)]
        if not isinstance(result, (list, tuple)):
            raise MisfitError(f"batch stage {stage.name!r} returned a {type_name(result)}; return a list of {count}")
        if len(result) != count:
            raise MisfitError(
                f"batch stage {stage.name!r} took {count} rows and returned {len(result)}; return one entry per row, "
                "in order: a dict, a list of dicts, or None to drop it"
            )
        return [checked(stage, part) for part in result]

    def _merge_all(self, outcomes: Iterable[Outcome]) -> None:
        """What became of every row, in order."""
        outcomes = list(outcomes)
        for place, outcome in enumerate(outcomes):
            self._merge(place, outcome)
        if self._runtime is not None:
            self._runtime.note_outcomes(self._stage, outcomes)

    def _merge(self, place: int, part: Outcome) -> None:
        origin = self._origins[place]
        present = self._places[origin]
        if isinstance(present, Failure):
            return
        if isinstance(present, _Several) and not isinstance(part, Failure):
            present.take(self._parts_of[place], part)
        else:
            self._places[origin] = part


class _Several(list[Row]):
    """Collects what becomes of the rows that one row was split into, while a later stage runs; in their order."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[int] = []  # which part each came of

    def take(self, part: int, outcome: Outcome) -> None:
        """What became of one part. Those that a stage is not for come before others that must wait for their call."""
        rows = outcome if isinstance(outcome, list) else [outcome] if isinstance(outcome, dict) else []
        place = bisect_right(self._parts, part)
        self[place:place] = rows
        self._parts[place:place] = [part] * len(rows)


def _lots(
    stage: Stage, rows: list[Outcome], contexts: Sequence[RowContext] | None, runtime: Runtime | None
) -> list[_Lot]:
    """The calls that a stage needs for these rows: ``batch`` rows to a lot, or one."""
    size = stage.batch or 1
    lots = [_Lot(stage, rows, contexts, runtime)]
    for i, value in enumerate(rows):
        if value is None or isinstance(value, Failure):
            continue
        parts = [value] if isinstance(value, dict) else value
        if isinstance(value, list):
            rows[i] = _Several()
        wanted = enumerate(parts) if stage.batch is None else _for_batch(stage, rows, i, parts, contexts, runtime)
        if _halts(rows, i):
            break
        for part, row in wanted:
            if len(lots[-1]) >= size:
                lots.append(_Lot(stage, rows, contexts, runtime))
            lots[-1].add(i, part, row)
    return [lot for lot in lots if len(lot)]


def _for_batch(
    stage: Stage,
    rows: list[Outcome],
    place: int,
    parts: Sequence[Row],
    contexts: Sequence[RowContext] | None,
    runtime: Runtime | None,
) -> Iterable[tuple[int, Row]]:
    """Those parts of a row that a batch stage is for, with their numbers; the others are past it already."""
    if stage.when is None and stage.input is None:
        return enumerate(parts)
    wanted: list[tuple[int, Row]] = []
    context, present = contexts[place] if contexts else None, rows[place]
    for part, row in enumerate(parts):
        try:
            if is_for(stage, row, context):
                wanted.append((part, row if stage.input is None else stage.input.check(row)))
                continue
            if isinstance(present, _Several):
                present.take(part, row)
            if runtime is not None:
                runtime.note_outcomes(stage, [row])
        except Exception as error:  # noqa: BLE001 - a user's condition or model may raise anything
            outcome = recover(stage, row, context, failure_of(stage, error))
            if runtime is not None:
                runtime.note_outcomes(stage, [outcome])
            if isinstance(outcome, Failure) or not isinstance(present, _Several):
                rows[place] = outcome
                return []
            present.take(part, outcome)
    return wanted
