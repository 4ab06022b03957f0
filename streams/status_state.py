"""What a session is doing, derived from what is wanted of it, how far it is, and what its workers say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, TypeAlias

from ..state.execution import ExecutionState, Wanted
from .session_records import SessionRecord

Phase: TypeAlias = "Literal['starting', 'running', 'pausing', 'paused', 'stopping']"
"""What one live worker does. ``starting``: it has opened no partition yet."""

Activity: TypeAlias = str
"""What to show for a session: its state, or ``pausing``, ``resuming``, ``cancelling`` or ``stopping`` on the way."""


class Derived(NamedTuple):
    """A session's state, and the word for it."""

    state: ExecutionState
    activity: Activity


def derive(record: SessionRecord, phases: Collection[Phase], *, is_complete: bool) -> Derived:
    """What a session does.

    Offsets come first: a session whose end is committed is complete, whatever was wanted. Then what live workers do.
    Where there are none, what was asked for or happened last: a failure, a pause, a cancellation.

    Args:
        record: its record; of one that never registered, what is known of it.
        phases: of each live worker.
        is_complete: whether everything up to its end is committed.
    """
    if is_complete:
        return _just(ExecutionState.COMPLETED)
    if phases:
        return _of_workers(record.wanted, phases)
    if record.wanted is Wanted.CANCEL:
        return _just(ExecutionState.CANCELLED)
    if record.failure and (record.wanted is Wanted.RUN or record.failed_ms >= record.changed_ms):
        return _just(ExecutionState.FAILED)
    return _just(ExecutionState.PAUSED if record.wanted is Wanted.PAUSE else ExecutionState.IDLE)


def _of_workers(wanted: Wanted, phases: Collection[Phase]) -> Derived:
    """A session with live workers: it is where what is wanted is done by all of them, and on the way there before."""
    kinds = set(phases)
    if wanted is Wanted.PAUSE:
        done = kinds == {"paused"}
        return _just(ExecutionState.PAUSED) if done else Derived(ExecutionState.EXECUTING, "pausing")
    if wanted is Wanted.CANCEL:
        return Derived(ExecutionState.EXECUTING, "cancelling")
    if "running" in kinds:
        return _just(ExecutionState.EXECUTING)
    if kinds & {"paused", "pausing"}:
        return Derived(ExecutionState.INITIALIZING, "resuming")
    if "starting" in kinds:
        return _just(ExecutionState.INITIALIZING)
    return Derived(ExecutionState.EXECUTING, "stopping")


def _just(state: ExecutionState) -> Derived:
    return Derived(state, state.value)
