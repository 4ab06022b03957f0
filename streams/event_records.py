"""What the events topic holds: one JSON object per event, in an envelope that is the same for all kinds.

``docs/events.md`` describes it for people and ``docs/events.schema.json`` for programs. Version 1 only grows: fields
and kinds are added, none changes its meaning. So a reader passes over what it does not know and refuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from ..state.codec import encode, loads

EVENTS_TOPIC = "rowmill.events"
VERSION = 1

PROGRESS = "progress"
ROW_FAILED = "row_failed"
WORKER_STOPPED = "worker_stopped"

_LONG_TEXT = 2_000
_MOST_ITEMS = 1_000
_DEEPEST = 8

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """One event of one worker.

    Attributes:
        kind: what happened; ``type`` in JSON. A reader passes over kinds that it does not know.
        at_ms: when, in milliseconds since the epoch, by the worker's clock; ``at`` in JSON, as a time in UTC.
        pipeline: the pipeline's name.
        session: the session's id.
        group: the session's consumer group, and the record's key.
        worker: the worker's name; every start has a new one.
        host: the machine it runs on.
        pid: its process there.
        subject: the stage or resource that it is about; "" for the worker as a whole.
        data: what belongs to the kind.
        version: the format's.
        written_ms: when, as the topic dates it: on Kafka by the broker's clock. 0 where the reader does not say.
        size: bytes of the record's value; 0 where the reader does not say.
    """

    kind: str
    at_ms: int
    pipeline: str
    session: str
    group: str
    worker: str
    host: str = ""
    pid: int = 0
    subject: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION
    written_ms: int = field(default=0, compare=False)
    size: int = field(default=0, compare=False)

    @property
    def has_stopped(self) -> bool:
        """Whether this is the worker's word that it stopped. Its name never comes back."""
        return self.kind == WORKER_STOPPED

    def to_dict(self) -> dict[str, Any]:
        """As in JSON."""
        return {
            "v": self.version,
            "type": self.kind,
            "at": _time_of(self.at_ms),
            "pipeline": self.pipeline,
            "session": self.session,
            "group": self.group,
            "worker": self.worker,
            "host": self.host,
            "pid": self.pid,
            "subject": self.subject,
            "data": self.data,
        }

    def encode(self) -> bytes:
        """The record's value.

        Raises:
            BadRowError: ``data`` holds something that JSON has no form for.
        """
        return encode(self.to_dict())

    @classmethod
    def decode(cls, value: bytes | None) -> EventRecord | None:
        """The counterpart of :meth:`encode`; None for what is no event.

        An event has a version, a type, a time and a group. What else is missing, or of another type than it should
        be, is empty.
        """
        try:
            fields = loads(value or b"")
        except ValueError:
            return None
        if not isinstance(fields, dict):
            return None
        version, at_ms = fields.get("v"), _milliseconds_of(fields.get("at"))
        kind, group = _text(fields, "type"), _text(fields, "group")
        if type(version) is not int or version < 1 or at_ms is None or not kind or not group:
            return None
        pid, data = fields.get("pid"), fields.get("data")
        return cls(
            kind=kind,
            at_ms=at_ms,
            pipeline=_text(fields, "pipeline"),
            session=_text(fields, "session"),
            group=group,
            worker=_text(fields, "worker"),
            host=_text(fields, "host"),
            pid=pid if type(pid) is int else 0,
            subject=_text(fields, "subject"),
            data=data if isinstance(data, dict) else {},
            version=version,
        )


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def _time_of(at_ms: int) -> str:
    """``2026-11-21T18:00:00.123Z``. Not by fromtimestamp: a float has no exact milliseconds."""
    return (_EPOCH + at_ms * _MILLISECOND).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _milliseconds_of(text: Any) -> int | None:
    """The time as milliseconds since the epoch; one that names no zone is taken for UTC."""
    try:
        time = datetime.fromisoformat(text)
        return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // _MILLISECOND
    except (ValueError, TypeError, OverflowError):
        return None


def plain(value: Any, depth: int = 0) -> Any:
    """What JSON can hold of a value, with long texts and lists cut short. ``depth``: how deep it lies."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return _plain_items(value, depth + 1) if depth < _DEEPEST else "…"
    return plain_text(value)


def _plain_items(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        return {plain_text(name): plain(item, depth) for name, item in islice(value.items(), _MOST_ITEMS)}
    return [plain(item, depth) for item in islice(value, _MOST_ITEMS)]


def plain_text(value: object) -> str:
    """Text without lone surrogates, which come from file names and have no UTF-8."""
    text = str(value).encode("utf-8", "replace").decode()
    return text if len(text) <= _LONG_TEXT else text[: _LONG_TEXT - 1] + "…"
