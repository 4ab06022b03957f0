"""Dead letters: the original record, and in its headers why no policy could save it."""

from __future__ import annotations

from ..handlers.chain import Failure
from ..state.model import RESERVED_PREFIX, Headers, Outgoing, Record, TopicPartition, foreign
from .session import SESSION_HEADER

ERROR_PREFIX = RESERVED_PREFIX + "error."
CONNECT_PREFIX = "__connect.errors."
"""Kafka Connect's names (``ErrorReporter`` of its dead-letter queue), for tools that know them."""
TRUNCATED_HEADER = ERROR_PREFIX + "truncated"
"""Present on a dead letter whose value was cut, with the length it had."""

MESSAGE_CHARACTERS = 4_096
HEADROOM_BYTES = 64 * 1024
"""By how much a dead-letter topic's largest message exceeds the source's: room for the headers."""


def dead_letter(
    tp: TopicPartition,
    record: Record,
    failure: Failure,
    session: str,
    max_bytes: int,
    *,
    connect: str | None = None,
    lines: str = "",
) -> Outgoing:
    """The record for the dead-letter topic: key, value, timestamp and headers as they came, and the error.

    Args:
        tp: where the record lies.
        record: the row's record.
        failure: what went wrong.
        session: the session's id.
        max_bytes: largest record the topic admits. What does not fit loses its headers, then the end of its
            value, and is marked: a dead letter can never block its partition.
        lines: what was logged about the row.
        connect: the pipeline's name, where the error is to be told by Kafka Connect's headers as well.
    """
    error = _error_headers(tp, record, failure, session, lines)
    if connect is not None:
        error += _connect_headers(tp, record, failure, connect)
    kept = tuple((_readable(name), value) for name, value in foreign(record.headers))
    value = record.value
    room = max_bytes - len(record.key or b"") - _size(error)
    if len(value or b"") + _size(kept) > room:
        kept = ()
    if value is not None and len(value) > room:
        error += ((TRUNCATED_HEADER, str(len(value)).encode()),)
        value = value[: max(0, room - 64)]
    return Outgoing(record.key, value, record.timestamp, kept + error)


def _error_headers(tp: TopicPartition, record: Record, failure: Failure, session: str, lines: str) -> Headers:
    values = {
        "stage": failure.stage,
        "type": failure.kind,
        "message": failure.message[:MESSAGE_CHARACTERS],
        "attempts": str(failure.attempts),
        "where": failure.where,
        "topic": tp.topic,
        "partition": str(tp.partition),
        "offset": str(record.offset),
        "session": session,
        "log": lines[-MESSAGE_CHARACTERS:],
    }
    headers = tuple((ERROR_PREFIX + name, text.encode("utf-8", "replace")) for name, text in values.items() if text)
    own = tuple(header for header in record.headers if header[0].startswith(RESERVED_PREFIX + "input.row"))
    return (*headers, *own, (SESSION_HEADER, session.encode()))


def _connect_headers(tp: TopicPartition, record: Record, failure: Failure, pipeline: str) -> Headers:
    """The same in the words of Kafka Connect: the stage is a class that handled the row in a task's transformation."""
    values = {
        "topic": tp.topic,
        "partition": str(tp.partition),
        "offset": str(record.offset),
        "connector.name": pipeline,
        "task.id": str(tp.partition),
        "stage": "VALUE_CONVERTER" if failure.stage == "input" else "TRANSFORMATION",
        "class.name": failure.stage,
        "exception.class.name": failure.kind,
        "exception.message": failure.message[:MESSAGE_CHARACTERS],
        "exception.stacktrace": failure.where,
    }
    return tuple((CONNECT_PREFIX + name, text.encode("utf-8", "replace")) for name, text in values.items() if text)


def _readable(name: str) -> str:
    """A header's name that may hold bytes which are not UTF-8 (as surrogates), in a form that can be written."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _size(headers: Headers) -> int:
    return sum(len(name) * 4 + len(value or b"") + 10 for name, value in headers)
