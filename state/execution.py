"""What a session is doing, what its operators want of it, and which of that may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class ExecutionState(StrEnum):
    """What a session, or the executor that runs it, is doing. The names are ondine's, and ``cancelled``."""

    IDLE = "idle"
    """Nobody works on it, and there is work, or may be some day."""
    INITIALIZING = "initializing"
    """Workers are there, and none has opened a partition yet."""
    EXECUTING = "executing"
    PAUSED = "paused"
    COMPLETED = "completed"
    """Every row up to the end that was fixed for it is committed: derived from offsets, declared by nobody."""
    FAILED = "failed"
    CANCELLED = "cancelled"


class Wanted(StrEnum):
    """What the operators of a session want of it. It outlives all workers."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


_IDLE, _INITIALIZING, _EXECUTING = ExecutionState.IDLE, ExecutionState.INITIALIZING, ExecutionState.EXECUTING
_PAUSED, _COMPLETED = ExecutionState.PAUSED, ExecutionState.COMPLETED
_FAILED, _CANCELLED = ExecutionState.FAILED, ExecutionState.CANCELLED

TRANSITIONS: Mapping[ExecutionState, frozenset[ExecutionState]] = MappingProxyType(
    {
        _IDLE: frozenset({_INITIALIZING, _PAUSED, _CANCELLED}),
        _INITIALIZING: frozenset({_EXECUTING, _PAUSED, _COMPLETED, _FAILED, _CANCELLED, _IDLE}),
        _EXECUTING: frozenset({_PAUSED, _COMPLETED, _FAILED, _CANCELLED, _IDLE}),
        _PAUSED: frozenset({_INITIALIZING, _EXECUTING, _FAILED, _CANCELLED, _IDLE}),
        _COMPLETED: frozenset({_INITIALIZING}),
        _FAILED: frozenset({_INITIALIZING, _PAUSED, _CANCELLED, _IDLE}),
        _CANCELLED: frozenset({_INITIALIZING, _IDLE}),
    }
)
"""Which state may follow which. A session that completed begins again only when it is executed anew."""


def may_follow(state: ExecutionState, following: ExecutionState) -> bool:
    """Whether a session in one state may get into the other."""
    return following in TRANSITIONS[state]


REQUESTS: Mapping[Wanted, Mapping[Wanted, str]] = MappingProxyType(
    {
        Wanted.RUN: MappingProxyType(
            {
                Wanted.RUN: "is not paused",
                Wanted.PAUSE: "",
                Wanted.CANCEL: "",
            }
        ),
        Wanted.PAUSE: MappingProxyType(
            {
                Wanted.RUN: "",
                Wanted.PAUSE: "is paused already",
                Wanted.CANCEL: "",
            }
        ),
        Wanted.CANCEL: MappingProxyType(
            {
                Wanted.RUN: "is cancelled; to go on with it, start it again",
                Wanted.PAUSE: "is cancelled; to go on with it, start it again",
                Wanted.CANCEL: "is cancelled already",
            }
        ),
    }
)
"""What operators may ask for: by what is wanted of the session, then by what they ask; "" or why it is refused.

A worker that starts makes CANCEL into RUN, which is no request. Of a session that has completed nothing may be asked.
"""
