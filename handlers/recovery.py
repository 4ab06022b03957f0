"""What becomes of a row that failed for good: what the fallback makes of it, else what ``on_error`` says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ..state.model import Row
from .calls import call_with_limit, raise_if_ours
from .outcomes import RAISED, Failure, Outcome, checked, failure_of
from .stage import Stage

if TYPE_CHECKING:
    from .context import RowContext
    from .runtime import Runtime


def recover(stage: Stage, row: Row, context: RowContext | None, failure: Failure) -> Outcome:
    """Here and now, for a stage whose fallback is not async."""
    if failure.halts or not stage.recovers:
        return failure
    if stage.fallback is None or isinstance(stage.fallback, Mapping):
        return _with_fields(stage, row, context, stage.fallback, failure)
    attempt = context.fork() if context is not None else None
    try:
        outcome = checked(stage, stage.fallback(dict(row), attempt))
    except RAISED as error:
        return _fallback_failed(stage, row, context, attempt, failure_of(stage, error, failure.attempts))
    return _fell_back(context, attempt, outcome)


async def recover_async(
    stage: Stage, row: Row, context: RowContext | None, failure: Failure, runtime: Runtime
) -> Outcome:
    """As :func:`recover`, for any fallback: an async one is awaited, another one runs on a thread."""
    if failure.halts or stage.fallback is None or isinstance(stage.fallback, Mapping):
        return recover(stage, row, context, failure)
    attempt = context.fork() if context is not None else None
    try:
        if stage.fallback_is_async:
            result: Any = await call_with_limit(stage.fallback, (dict(row), attempt), stage.timeout)
        else:
            result = await runtime.pool.run(stage.fallback, dict(row), attempt, timeout=stage.timeout)
        outcome = checked(stage, result)
    except asyncio.CancelledError as error:
        raise_if_ours()
        return _fallback_failed(stage, row, context, attempt, failure_of(stage, error, failure.attempts))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a handler may raise anything
        return _fallback_failed(stage, row, context, attempt, failure_of(stage, error, failure.attempts))
    return _fell_back(context, attempt, outcome)


def _fell_back(context: RowContext | None, attempt: RowContext | None, outcome: Outcome) -> Outcome:
    if context is not None and attempt is not None:
        context.adopt(attempt)
        context.pay(attempt)
    return _defaulted(context, outcome)


def _fallback_failed(
    stage: Stage, row: Row, context: RowContext | None, attempt: RowContext | None, failure: Failure
) -> Outcome:
    """The fallback failed as well: what it did is undone, what it cost is not."""
    if context is not None and attempt is not None:
        context.pay(attempt)
    return _with_fields(stage, row, context, None, failure)


def _with_fields(
    stage: Stage, row: Row, context: RowContext | None, fields: Mapping[str, Any] | None, failure: Failure
) -> Outcome:
    """The row with the fields of the fallback, or of ``on_error``, set; the failure where there are none."""
    if failure.halts:
        return failure
    if fields is None and isinstance(stage.on_error, Mapping):
        fields = stage.on_error
    # A copy, all the way down: later stages may change it, and other rows have the same.
    return failure if fields is None else _defaulted(context, {**row, **deepcopy(dict(fields))})


def _defaulted(context: RowContext | None, outcome: Outcome) -> Outcome:
    if context is not None:
        context.is_defaulted = True
    return outcome
