"""What the topics are for that rowmill makes for itself: all whose names begin with ``rowmill.``."""

from __future__ import annotations

from ..state.model import RESERVED_PREFIX
from .event_records import EVENTS_TOPIC
from .session import CONSOLE
from .session_records import CONTROL_TOPIC

CONSOLE_PREFIX = f"{RESERVED_PREFIX}{CONSOLE}."
"""Topics of the web console. They hold nothing but what it shows of the past."""

_NAMED = {CONTROL_TOPIC: "sessions' records", EVENTS_TOPIC: "workers' events"}
_ENDINGS = {
    ".changelog": "context and tables",
    ".answers": "shared answers",
    ".budget": "the budget's ledger",
    ".marks": "dead letters' marks",
}


def purpose_of(topic: str) -> str:
    """What a topic of rowmill's own is for; "" for everybody else's, and for one that nobody knows."""
    if not topic.startswith(RESERVED_PREFIX):
        return ""
    if topic.startswith(CONSOLE_PREFIX):
        return "the web console's history"
    known = _NAMED.get(topic, "")
    return known or next((purpose for ending, purpose in _ENDINGS.items() if topic.endswith(ending)), "")
