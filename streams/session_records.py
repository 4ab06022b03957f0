"""What the control topic holds of each session: what it is made of, what is wanted of it, and how it ended.

One record per session on the compacted topic ``rowmill.control``, under the group's name. Format, version 1: a JSON
object; fields that a reader does not know are left alone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..state.codec import dumps, loads
from ..state.errors import CheckpointError
from ..state.execution import Wanted
from ..state.model import TopicPartition

CONTROL_TOPIC = "rowmill.control"

_VERSION = 1
_LATEST_MS = 253_402_300_799_999
"""The end of the year 9999: later times have no name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """One session, as whoever wrote last knew it. Times are milliseconds since the epoch.

    Attributes:
        group: the consumer group, and the record's key.
        pipeline: the pipeline's name.
        session: the session's id; ``live`` for the live one.
        owns_source: whether the source topics were published for it alone.
        sources: the topics it reads, as they are named on the broker.
        sink: where its results go.
        dead_letters: where its dead letters go.
        tables: the names of its tables.
        stages: the names of its stages, in order.
        has_budget: whether it has a ledger.
        state_dir: where a worker that started it keeps tables, as ``host:folder``; "" where there are none.
        is_bounded: whether it comes to an end by itself.
        ends: where it is complete, by partition; None while that is not known, and for sessions without an end.
        wanted: what is wanted of it.
        changed_ms: when that was last asked for.
        changed_by: who asked: ``user@host``, or the worker that started it.
        reason: what they gave as a reason.
        started_ms: when it was started for the first time.
        failure: why the last worker that failed did; "" if none did since it was last started.
        failed_ms: when; 0 if none did.
        sequence: how often the record was written.
        artifacts: where a worker that started it keeps artifacts, as ``host:folder``; "" where nobody knows.
    """

    group: str
    pipeline: str
    session: str
    owns_source: bool = False
    sources: tuple[str, ...] = ()
    sink: str = ""
    dead_letters: str = ""
    tables: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    has_budget: bool = False
    state_dir: str = ""
    is_bounded: bool = False
    ends: Mapping[TopicPartition, int] | None = None
    wanted: Wanted = Wanted.RUN
    changed_ms: int = 0
    changed_by: str = ""
    reason: str = ""
    started_ms: int = 0
    failure: str = ""
    failed_ms: int = 0
    sequence: int = 0
    artifacts: str = ""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a newer rowmill, which are kept."""

    def encode(self) -> bytes:
        """The record's value."""
        fields = asdict(self)
        unknown = fields.pop("unknown")
        ends = None if self.ends is None else [[tp.topic, tp.partition, end] for tp, end in sorted(self.ends.items())]
        return dumps({"v": _VERSION, **unknown, **fields, "ends": ends})

    @classmethod
    def decode(cls, value: bytes) -> SessionRecord:
        """The counterpart of :meth:`encode`.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            fields = loads(value)
            if fields["v"] < 1:
                raise ValueError("no such version")  # noqa: TRY301 - one way out for all that is unreadable
            if fields["v"] <= _VERSION:  # else it stays, with what else a newer rowmill wrote
                del fields["v"]
            known: dict[str, Any] = {name: fields.pop(name) for name in _FIELDS if name in fields}
            known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
            known["wanted"] = Wanted(known.get("wanted", Wanted.RUN))
            ends = known.get("ends")
            known["ends"] = None if ends is None else dict(map(_end, ends))
            for name, each in known.items():
                _check_type(name, each)
            return cls(**known, unknown=fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"a record of {CONTROL_TOPIC} cannot be read ({error}): {value[:80]!r}…") from error


def here() -> str:
    """This process, for people: ``host/pid``."""
    return f"{platform.node() or 'localhost'}/{os.getpid()}"


def _end(entry: Any) -> tuple[TopicPartition, int]:
    topic, partition, end = entry
    if not isinstance(topic, str) or type(partition) is not int or type(end) is not int:
        raise TypeError("ends are [topic, partition, offset]")
    if not 0 <= partition < 2**31 or not 0 <= end < 2**63:
        raise ValueError("no such partition or offset")
    return TopicPartition(topic, partition), end


def _check_type(name: str, value: Any) -> None:
    """Anybody may write to a topic: what is of another type than it should be is told here, not where it is used."""
    kind = str(SessionRecord.__dataclass_fields__[name].type)
    fits = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": type(value) is int and 0 <= value <= _LATEST_MS,
        "tuple[str, ...]": isinstance(value, tuple) and all(isinstance(each, str) for each in value),
    }
    if not fits.get(kind, True):
        raise TypeError(f"{name} is {type(value).__name__}, or too large")


_FIELDS = frozenset(SessionRecord.__dataclass_fields__) - {"unknown"}
