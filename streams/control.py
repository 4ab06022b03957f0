"""Steering sessions: what workers and operators write on the control topic, and how workers hear of it.

What may be asked for stands in one table, ``REQUESTS`` of ``state/execution.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

from ..state.execution import REQUESTS, Wanted
from ..state.model import TopicPartition
from .brokers.base import Broker
from .control_topic import CONTROL_CONFIG, ControlTopic
from .control_watch import ControlWatch
from .deadlines import deadline
from .errors import IllegalTransitionError, TopicError
from .session_records import SessionRecord
from .session_refs import SessionRef, find_session, record_of

__all__ = [
    "CONTROL_CONFIG",
    "ControlTopic",
    "ControlWatch",
    "is_completed",
    "note_ends",
    "note_failure",
    "register",
    "request",
]

_TEXT_CHARACTERS = 1_000
_PLACES = ("state_dir", "artifacts")
_STEERED = frozenset(
    {
        "wanted",
        "changed_ms",
        "changed_by",
        "reason",
        "started_ms",
        "failure",
        "failed_ms",
        "sequence",
        "ends",
        "unknown",
        *_PLACES,
    }
)
"""What a record says beside the description of its session, which whoever starts a worker knows best."""
_VERBS = {Wanted.RUN: "resumed", Wanted.PAUSE: "paused", Wanted.CANCEL: "cancelled"}


async def register(control: ControlTopic, record: SessionRecord) -> SessionRecord:
    """Enter a session whose worker starts, or bring its record up to date.

    What was wanted of it stays, but that a cancelled session goes on; its last failure is forgotten. Where nothing
    changes nothing is written, so that any number of workers may start at once.

    Args:
        control: the topic.
        record: what the session is made of, as this worker knows it; ``changed_by`` and ``changed_ms`` for a session
            that is new or was cancelled.

    Returns:
        The record as it is now. Its ``wanted`` is to be obeyed.

    Raises:
        TopicError: there is no control topic and it may not be made.
        CheckpointError: the present record cannot be read.
        BrokerError: the broker does not answer.
    """
    present = await control.session(record.group)
    if present is not None and present == _registered(present, record):
        return present
    return await control.update(record.group, lambda present: _registered(present, record)) or record


def _registered(present: SessionRecord | None, given: SessionRecord) -> SessionRecord:
    if present is None:
        return given
    described: dict[str, Any] = {
        each.name: getattr(given, each.name) for each in fields(given) if each.name not in _STEERED
    }
    places: dict[str, Any] = {name: _place(getattr(present, name), getattr(given, name)) for name in _PLACES}
    new = replace(
        present,
        **(described | places),
        ends=present.ends if given.ends is None else given.ends,
        started_ms=present.started_ms or given.started_ms,
        failure="",
        failed_ms=0,
    )
    if present.wanted is not Wanted.CANCEL:
        return new
    return replace(new, wanted=Wanted.RUN, changed_ms=given.changed_ms, changed_by=given.changed_by, reason="")


def _place(present: str, given: str) -> str:
    """``host:folder``. Another host's stays: workers on two of them would rewrite it in turn, at each start."""
    is_elsewhere = present.partition(":")[0] != given.partition(":")[0]
    return present if not given or (present and is_elsewhere) else given


async def note_failure(control: ControlTopic, group: str, message: str) -> None:
    """Note why a worker failed. A session without a record gets none by that.

    Raises:
        RowmillError: as :meth:`ControlTopic.update`.
    """
    now, text = control.clock.now_ms(), _cut(message)

    def change(present: SessionRecord | None) -> SessionRecord | None:
        return None if present is None else replace(present, failure=text, failed_ms=now)

    await control.update(group, change, may_remove=False)


async def note_ends(control: ControlTopic, group: str, ends: Mapping[TopicPartition, int]) -> None:
    """Note where a session is complete. A session without a record gets none by that.

    Raises:
        RowmillError: as :meth:`ControlTopic.update`.
    """

    def change(present: SessionRecord | None) -> SessionRecord | None:
        return None if present is None else replace(present, ends=dict(ends))

    await control.update(group, change, may_remove=False)


async def request(control: ControlTopic, group: str, wanted: Wanted, *, by: str, reason: str = "") -> SessionRecord:
    """Ask that a session be paused, resumed (``Wanted.RUN``) or cancelled. Its workers do so within seconds.

    Args:
        control: the topic.
        group: the session's; it has a record, or is a consumer group of that name.
        wanted: what is asked for.
        by: who asks, as ``user@host``.
        reason: why; at most 1,000 characters of it are kept.

    Returns:
        The record as it is now.

    Raises:
        IllegalTransitionError: that cannot be asked of it now; the message says why, and who asked for what is.
        ConfigError: there is no such session.
        RowmillError: as :meth:`ControlTopic.update`.
    """
    found = await find_session(control, group)
    if found.record is not None and await is_completed(control.broker, found.record, control.timeout):
        raise IllegalTransitionError(f"{found.name} cannot be {_VERBS[wanted]}: it is completed, all its rows are done")
    now, text = control.clock.now_ms(), _cut(reason)
    known = await _found_out(control, found) if found.record is None else None

    def change(present: SessionRecord | None) -> SessionRecord:
        # Without a record nobody knows what was wanted: workers may be paused by one that was deleted.
        if present is not None and (refusal := REQUESTS[present.wanted][wanted]):
            raise IllegalTransitionError(f"{found.name} cannot be {_VERBS[wanted]}: it {refusal}{_asked(present)}")
        base = present or known or record_of(found.group)
        return replace(base, wanted=wanted, changed_ms=now, changed_by=by, reason=text)

    return await control.update(found.group, change) or record_of(found.group)


async def _found_out(control: ControlTopic, found: SessionRef) -> SessionRecord | None:
    """What can be found out of a session that never registered: its first record has to name what is its own."""
    from .known_sessions import find_sessions

    known = (await find_sessions(control.broker, clock=control.clock, timeout=control.timeout)).get(found.group)
    return None if known is None else known.record


def _asked(record: SessionRecord) -> str:
    """Who asked for what is wanted, and when."""
    if not record.changed_by or record.wanted is Wanted.RUN:
        return ""
    try:
        moment = datetime.fromtimestamp(record.changed_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds")
    except (ValueError, OverflowError, OSError):
        moment = str(record.changed_ms)
    text = f" ({record.changed_by} asked for that at {moment}{f': {record.reason}' if record.reason else ''})"
    return "".join(c if c.isprintable() else " " for c in text)  # anybody may write to a topic, and terminals obey


async def is_completed(broker: Broker, record: SessionRecord, timeout: float) -> bool:
    """Whether a bounded session has committed all up to its ends. Nobody declares that: the offsets tell.

    Args:
        broker: a started one.
        record: the session's.
        timeout: seconds that each call to the broker may take.

    Raises:
        BrokerError: the broker does not answer.
    """
    if not record.is_bounded or record.ends is None:
        return False
    async with deadline(timeout, f"read the offsets of {record.group}"):
        committed = await broker.committed(record.group, list(record.ends))
        left = {
            tp: end
            for tp, end in record.ends.items()
            if end > 0 and ((done := committed[tp]) is None or done.offset < end)
        }
        # A partition that never had a row, or has none any more, is never committed.
        if any(committed[tp] is not None for tp in left):
            return False
        try:
            firsts = await broker.offsets(list(left), "earliest")
        except TopicError:
            return False
    return all(firsts[tp] >= end for tp, end in left.items())


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else text[: _TEXT_CHARACTERS - 1] + "…"
