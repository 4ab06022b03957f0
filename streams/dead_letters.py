"""Dead letters: the original record, and in its headers why no policy could save it."""

from __future__ import annotations

from ..handlers.chain import Failure
from ..state.model import RESERVED_PREFIX, Headers, Outgoing, Record
from .session import SESSION_HEADER

ERROR_PREFIX = RESERVED_PREFIX + "error."
TRUNCATED_HEADER = ERROR_PREFIX + "truncated"
"""Present on a dead letter whose value was cut, with the length it had."""

MESSAGE_CHARACTERS = 4_096
HEADROOM_BYTES = 64 * 1024
"""By how much a dead-letter topic's largest message exceeds the source's: room for the headers."""


def dead_letter(record: Record, failure: Failure, session: str, max_bytes: int) -> Outgoing:
    """The record for the dead-letter topic: key, value, timestamp and headers as they came, and the error.

    Args:
        record: the row's record.
        failure: what went wrong.
        session: the session's id.
        max_bytes: largest record the topic admits. What does not fit loses its headers, then the end of its
            value, and is marked: a dead letter can never block its partition.
    """
    error = _error_headers(record, failure, session)
    kept = tuple((_readable(name), value) for name, value in _foreign(record.headers))
    value = record.value
    room = max_bytes - len(record.key or b"") - _size(error)
    if len(value or b"") + _size(kept) > room:
        kept = ()
    if value is not None and len(value) > room:
        error += ((TRUNCATED_HEADER, str(len(value)).encode()),)
        value = value[: max(0, room - 64)]
    return Outgoing(record.key, value, record.timestamp, kept + error)


def _error_headers(record: Record, failure: Failure, session: str) -> Headers:
    values = {
        "stage": failure.stage,
        "type": failure.kind,
        "message": failure.message[:MESSAGE_CHARACTERS],
        "attempts": str(failure.attempts),
        "where": failure.where,
        "topic": record.topic,
        "partition": str(record.partition),
        "offset": str(record.offset),
        "session": session,
    }
    headers = tuple((ERROR_PREFIX + name, text.encode("utf-8", "replace")) for name, text in values.items() if text)
    own = tuple(header for header in record.headers if header[0].startswith(RESERVED_PREFIX + "input.row"))
    return (*headers, *own, (SESSION_HEADER, session.encode()))


def _foreign(headers: Headers) -> Headers:
    return tuple(header for header in headers if not header[0].startswith(RESERVED_PREFIX))


def _readable(name: str) -> str:
    """A header's name that may hold bytes which are not UTF-8 (as surrogates), in a form that can be written."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _size(headers: Headers) -> int:
    return sum(len(name) * 4 + len(value or b"") + 10 for name, value in headers)
