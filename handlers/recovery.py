"""What becomes of a row that failed for good: what the fallback makes of it, else what ``on_error`` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..state.model import Row
from .calls import call_with_limit
from .outcomes import Failure, Outcome, checked, failure_of
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
    try:
        outcome = checked(stage, stage.fallback(row, context))
    except Exception as error:  # noqa: BLE001 - a handler may raise anything
        return _with_fields(stage, row, context, None, failure_of(stage, error, failure.attempts))
    return _defaulted(context, outcome)


async def recover_async(
    stage: Stage, row: Row, context: RowContext | None, failure: Failure, runtime: Runtime
) -> Outcome:
    """As :func:`recover`, for any fallback: an async one is awaited, another one runs on a thread."""
    if failure.halts or stage.fallback is None or isinstance(stage.fallback, Mapping):
        return recover(stage, row, context, failure)
    try:
        if stage.fallback_is_async:
            result: Any = await call_with_limit(stage.fallback, (row, context), stage.timeout)
        else:
            result = await runtime.pool.run(stage.fallback, row, context, timeout=stage.timeout)
        outcome = checked(stage, result)
    except Exception as error:  # noqa: BLE001 - a handler may raise anything
        return _with_fields(stage, row, context, None, failure_of(stage, error, failure.attempts))
    return _defaulted(context, outcome)


def _with_fields(
    stage: Stage, row: Row, context: RowContext | None, fields: Mapping[str, Any] | None, failure: Failure
) -> Outcome:
    """The row with the fields of the fallback, or of ``on_error``, set; the failure where there are none."""
    if failure.halts:
        return failure
    if fields is None and isinstance(stage.on_error, Mapping):
        fields = stage.on_error
    return failure if fields is None else _defaulted(context, {**row, **fields})


def _defaulted(context: RowContext | None, outcome: Outcome) -> Outcome:
    if context is not None:
        context.is_defaulted = True
    return outcome
