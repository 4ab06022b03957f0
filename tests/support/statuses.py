"""Statuses of sessions as ``session_statuses`` gives them, made by hand."""

from __future__ import annotations

from typing import Any

from rowmill.state.execution import ExecutionState
from rowmill.streams.session_records import SessionRecord
from rowmill.streams.status import SessionStatus


def a_status(name: str, **more: Any) -> SessionStatus:
    """The status of a live session that is at work, with stages ``clean`` and ``score``."""
    record = SessionRecord(group=f"rowmill.{name}", pipeline=name, session="live", stages=("clean", "score"))
    fields = {
        "reference": name,
        "record": record,
        "is_registered": True,
        "state": ExecutionState.EXECUTING,
        "activity": "executing",
        "at_ms": 1,
    }
    return SessionStatus(**{**fields, **more})
