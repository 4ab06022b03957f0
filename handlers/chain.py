"""A chain: the compiled stages of one pipeline, and what became of each row that went through.

Work goes stage by stage over a batch of rows. Stages that are bare function calls ("plain") are fused and run
row by row without a task, lock or allocation between them; that loop, ``_run_plain``, is the hot path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeAlias

from ..state.errors import ConfigError
from ..state.model import Row
from .context import RowContext
from .errors import HandlerTimeoutError, MisfitError
from .frames import is_frame, rows_to_frame, split_result
from .runtime import Runtime
from .stage import Stage


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row did not complete: the stage, the error, and how often it was tried.

    ``kind`` is the error's class name, or a short stable name for errors that rowmill found itself; ``where`` is the
    file and line of the user's code that raised it, "" for those.
    """

    stage: str
    kind: str
    message: str
    attempts: int = 1
    where: str = field(default="", compare=False)
    error: BaseException | None = field(default=None, compare=False, repr=False)


Outcome: TypeAlias = "Row | list[Row] | Failure | None"
"""What became of one input row: one result, several, a failure, or nothing (dropped on purpose)."""


_RAISED = (Exception, SystemExit, asyncio.CancelledError)
"""What a plain handler may raise and fail its row with. Nobody cancels a bare call: a CancelledError is its own."""


class Chain:
    """Stages in order, ready to run. Knows rows and contexts, and nothing of where they come from.

    Args:
        stages: at least one; their names differ.

    Raises:
        ConfigError: no stage, or two of one name.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ConfigError("stages", list(stages), "add at least one stage before running the pipeline")
        names = [stage.name for stage in stages]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("stage(name=)", name, "another stage has this name; give each its own")
        self.stages = tuple(stages)
        self.takes_context = any(stage.takes_context for stage in stages)
        self.is_sync = all(stage.is_plain for stage in stages)
        """Whether the whole chain may run in one go on one thread."""
        self.segments = _segments(self.stages)
        """The stages in groups that run together: neighbouring plain per-row stages, or one other stage."""
        self.is_row_by_row = self.is_sync and len(self.segments) == 1 and self.stages[0].batch is None
        """Whether each row runs through the whole chain before the next one begins."""

    def run_sync(self, rows: list[Outcome], contexts: Sequence[RowContext] | None) -> None:
        """Run a chain for which ``is_sync`` holds, on this thread. ``rows`` are replaced by their outcomes.

        Args:
            rows: one entry per input row; entries that are no row (failed before) are left alone.
            contexts: one per row; None when ``takes_context`` is False.
        """
        for segment in self.segments:
            run_segment(segment, rows, contexts)

    async def run(self, rows: list[Outcome], contexts: Sequence[RowContext] | None, runtime: Runtime) -> None:
        """Run any chain, blocking stages on threads. ``rows`` are replaced by their outcomes, in order."""
        for segment in self.segments:
            if segment[0].is_plain:
                await runtime.pool.run(run_segment, segment, rows, contexts)
            else:
                await run_lots(segment[0], rows, contexts, runtime)


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


def run_segment(segment: tuple[Stage, ...], rows: list[Outcome], contexts: Sequence[RowContext] | None) -> None:
    """A group of plain stages over these rows, on this thread; ``rows`` are replaced by their outcomes."""
    if segment[0].batch is None:
        _run_plain(segment, rows, contexts)
    else:
        for lot in _lots(segment[0], rows, contexts):
            lot.call()


# --- rows ------------------------------------------------------------------------------------------------------


def _run_plain(stages: tuple[Stage, ...], rows: list[Outcome], contexts: Sequence[RowContext] | None) -> None:
    """The hot path: each row through all of ``stages`` before the next.

    One loop turn and two comparisons a row and stage (about 0.06 µs here) besides the call itself. The stage's
    name is needed only when something is amiss, so the loop variable is all that is kept for it.
    """
    calls = [(stage, stage.handler, stage.takes_context) for stage in stages]
    for i, value in enumerate(rows):
        if value.__class__ is not dict:
            if isinstance(value, list):
                rows[i] = _spread(stages, value, contexts[i] if contexts else None)
            continue
        stage = stages[0]
        try:
            for stage, handler, takes_context in calls:
                value = handler(value, contexts[i]) if takes_context else handler(value)  # type: ignore[index]
                if value.__class__ is not dict:
                    value = _odd_result(stage, value)
                    if value.__class__ is not dict:
                        break
        except _RAISED as error:
            rows[i] = failure_of(stage, error)
            continue
        if value.__class__ is list:
            later = stages[stages.index(stage) + 1 :]
            rows[i] = _spread(later, value, contexts[i] if contexts else None)
        else:
            rows[i] = value


def _spread(stages: tuple[Stage, ...], several: list[Row], context: RowContext | None) -> Outcome:
    """Several rows made from one, through the remaining stages: all of them, or the failure of any."""
    if not stages:
        return several or None
    out: list[Row] = []
    for row in several:
        lone: list[Outcome] = [row]
        _run_plain(stages, lone, [context] if context else None)
        outcome = lone[0]
        if isinstance(outcome, Failure):
            return outcome
        if isinstance(outcome, list):
            out += outcome
        elif outcome is not None:
            out.append(outcome)
    return out or None


def _odd_result(stage: Stage, result: Any) -> Outcome:
    """What is no bare dict: None, a list of rows, a dict's subclass, or a mistake."""
    if result is None:
        return None
    if isinstance(result, dict):
        return dict(result)
    if isinstance(result, (list, tuple)):
        for row in result:
            if not isinstance(row, dict):
                raise MisfitError(f"stage {stage.name!r} returned a list with a {_type_name(row)} in it; {_RULE}")
        return [dict(row) for row in result] or None
    raise MisfitError(f"stage {stage.name!r} returned a {_type_name(result)}; {_RULE}")


_RULE = "a handler returns a dict, a list of dicts, or None to drop the row"


def _type_name(value: Any) -> str:
    return "DataFrame (set frame=True for frames)" if is_frame(value) else type(value).__name__


def failure_of(stage: Stage, error: BaseException) -> Failure:
    """An exception as a row's failure. An exception without text is named by its class."""
    return Failure(stage.name, type(error).__name__, str(error) or repr(error), where=_where(error), error=error)


_OWN_FOLDER = str(Path(__file__).parent)


def _where(error: BaseException) -> str:
    """The last line of the user's own code on the way to the error, as ``file.py:17``; "" if there is none.

    Of the frames that are not ours, the first one's file is the handler's; libraries it calls come further in.
    """
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    theirs = [(name, line) for name, line in frames if not name.startswith(_OWN_FOLDER)]
    own = [line for name, line in theirs if name == theirs[0][0]]
    return f"{Path(theirs[0][0]).name}:{own[-1]}" if theirs else ""


# --- stages that are awaited -----------------------------------------------------------------------------------


async def run_lots(stage: Stage, rows: list[Outcome], contexts: Sequence[RowContext] | None, runtime: Runtime) -> None:
    """Any one stage over these rows, one call after the other, in order; ``rows`` are replaced by their outcomes."""
    for lot in _lots(stage, rows, contexts):
        try:
            lot.settle(await _await_call(stage, lot.arguments(), runtime))
            _raise_if_cancelled()
        except asyncio.CancelledError as error:
            _raise_if_ours()
            lot.fail(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a handler may raise anything
            lot.fail(error)


async def attempt(stage: Stage, row: Row, context: RowContext | None, runtime: Runtime) -> Outcome:
    """One row through one stage of one row per call. Whatever the handler does wrong is the row's Failure."""
    try:
        if stage.is_async and stage.timeout is None:
            result = stage.handler(row, context) if stage.takes_context else stage.handler(row)
            if result.__class__ is not dict:  # a wrapper around an async handler may have run it already
                result = await result
        else:
            result = await _await_call(stage, (row, context) if stage.takes_context else (row,), runtime)
        return result if result.__class__ is dict else _odd_result(stage, result)
    except asyncio.CancelledError as error:
        _raise_if_ours()
        return failure_of(stage, error)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a handler may raise anything
        return failure_of(stage, error)


def _raise_if_cancelled() -> None:
    """A handler that swallowed its cancellation gets no further row."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _raise_if_ours() -> None:
    """Go on being cancelled if that is what happens to us; a handler may raise the same without it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise  # noqa: PLE0704 - called where a CancelledError is being handled


async def _await_call(stage: Stage, arguments: tuple[Any, ...], runtime: Runtime) -> Any:
    if not stage.is_async:
        return await runtime.pool.run(stage.handler, *arguments, timeout=stage.timeout)
    limit = asyncio.timeout(stage.timeout)
    try:
        async with limit:
            return await stage.handler(*arguments)
    except TimeoutError:
        if limit.expired():
            raise HandlerTimeoutError(f"no result within {stage.timeout:g} s") from None
        raise


# --- lots: the rows of one call --------------------------------------------------------------------------------


class _Lot:
    """The rows of one call, where they came from, and the way of its result back to them.

    A row that an earlier stage split holds several places; whatever fails in one of them fails the whole row.
    """

    def __init__(self, stage: Stage, rows: list[Outcome], contexts: Sequence[RowContext] | None) -> None:
        self._stage = stage
        self._rows = rows
        self._contexts = contexts
        self._origins: list[int] = []
        self._inputs: list[Row] = []

    def __len__(self) -> int:
        return len(self._inputs)

    def add(self, origin: int, row: Row) -> None:
        self._origins.append(origin)
        self._inputs.append(row)

    def arguments(self) -> tuple[Any, ...]:
        """What the handler is called with."""
        stage = self._stage
        if stage.batch is None:
            row = self._inputs[0]
            return (row, self._contexts[self._origins[0]]) if stage.takes_context and self._contexts else (row,)
        many: Any = rows_to_frame(self._inputs) if stage.frame else list(self._inputs)
        if stage.takes_context and self._contexts:
            return (many, [self._contexts[origin] for origin in self._origins])
        return (many,)

    def call(self) -> None:
        """Call the handler here and now, and give each row its part."""
        try:
            self.settle(self._stage.handler(*self.arguments()))
        except _RAISED as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The call failed: so did every row in it."""
        failure = failure_of(self._stage, error)
        for origin in self._origins:
            self._rows[origin] = failure

    def settle(self, result: Any) -> None:
        """Give each row its part of the result.

        Raises:
            MisfitError: the result does not fit the rows; none of them got a part.
        """
        for origin, part in zip(self._origins, self._parts(result), strict=True):
            self._merge(origin, part)

    def _parts(self, result: Any) -> list[Any]:
        stage, count = self._stage, len(self._inputs)
        if stage.frame:
            return list(split_result(result, count))
        if stage.batch is None:
            return [_checked(stage, result)]
        if not isinstance(result, (list, tuple)):
            raise MisfitError(f"batch stage {stage.name!r} returned a {_type_name(result)}; return a list of {count}")
        if len(result) != count:
            raise MisfitError(
                f"batch stage {stage.name!r} took {count} rows and returned {len(result)}; return one entry per row, "
                "in order: a dict, a list of dicts, or None to drop it"
            )
        return [_checked(stage, part) for part in result]

    def _merge(self, origin: int, part: Outcome) -> None:
        present = self._rows[origin]
        if isinstance(present, Failure):
            return
        if isinstance(present, _Several):
            present.take(part)
        else:
            self._rows[origin] = part


def _checked(stage: Stage, result: Any) -> Outcome:
    return result if result.__class__ is dict else _odd_result(stage, result)


class _Several(list[Row]):
    """Collects what becomes of the rows that one row was split into, while a later stage runs."""

    def take(self, part: Outcome) -> None:
        if isinstance(part, list):
            self.extend(part)
        elif isinstance(part, dict):
            self.append(part)


def _lots(stage: Stage, rows: list[Outcome], contexts: Sequence[RowContext] | None) -> list[_Lot]:
    """The calls that a stage needs for these rows: ``batch`` rows to a lot, or one."""
    size = stage.batch or 1
    lots = [_Lot(stage, rows, contexts)]
    for i, value in enumerate(rows):
        if value is None or isinstance(value, Failure):
            continue
        parts = [value] if isinstance(value, dict) else value
        if isinstance(value, list):
            rows[i] = _Several()
        for row in parts:
            if len(lots[-1]) >= size:
                lots.append(_Lot(stage, rows, contexts))
            lots[-1].add(i, row)
    return [lot for lot in lots if len(lot)]
