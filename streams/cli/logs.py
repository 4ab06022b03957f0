"""Logging of the command line: on standard error, warnings and worse unless more is asked for, as text or as JSON."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

Form: TypeAlias = Literal["text", "json"]

FORMS: tuple[Form, ...] = ("text", "json")

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_CLIENTS = ("aiokafka", "kafka")
_NAME = "rowmill-cli"

_HIDDEN = "***"
_CREDENTIALS = re.compile(r"""(:/{1,2})(?:[^/?#\s'"@:]{0,256}:[^\s'"]{0,256}|[^/?#\s'"@:]{1,256})@""")
"""What stands before the @ of a URL, or of one that was taken for a path. Ours have no place for it (see
brokers/open.py); those of libraries may."""
_SECRETIVE = re.compile(r"(?:^|_)(?:password|passwd|secret|token|api_?key|authorization)$", re.IGNORECASE)

_HANDLERS_ROW = {"rowmill_session": "session", "rowmill_row": "row", "rowmill_stage": "stage"}
"""Fields that records of handlers carry (see handlers/capture.py), and their names in JSON."""
_PLACE = re.compile(r"(?P<topic>.+)/(?P<partition>\d+)/(?P<offset>\d+)(?: and \d+ more)?")

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_OWN = frozenset({"time", "level", "logger", "message", "exception"})


def set_up_logging(verbose: int, *, quiet: bool, form: Form = "text") -> None:
    """Send logs to standard error.

    Args:
        verbose: 0 for warnings, 1 for what happens, 2 for details.
        quiet: errors only.
        form: ``text`` for people, or ``json``: one object per line.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _NAME]:
        root.removeHandler(handler)  # main() may be called more than once in a process
    handler = logging.StreamHandler()
    handler.set_name(_NAME)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root.addHandler(handler)
    root.setLevel(logging.ERROR if quiet else _LEVELS[min(verbose, 2)])
    logging.captureWarnings(form == "json")  # else they would stand between the objects
    for name in _CLIENTS:
        # The client logs every failed connection at ERROR; what matters of it comes as our own error. At DEBUG it
        # logs every request.
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL)


def add_fields(**fields: str) -> None:
    """Have every line carry these, where lines are JSON: which worker of which session this is."""
    lines = _json_lines()
    if lines is not None:
        lines.fields |= fields


def in_json() -> bool:
    """Whether lines are JSON."""
    return _json_lines() is not None


def in_form(text: str, *, level: str = "info", error: BaseException | None = None) -> str:
    """What the command tells its user, as a line of the log's form: programs that read the one read the other, too.

    Args:
        text: what it tells.
        level: ``info`` or ``error``.
        error: a bug, whose traceback goes with it.
    """
    lines = _json_lines()
    if lines is None:
        return text
    trace = None if error is None else (type(error), error, error.__traceback__)
    number = logging.getLevelNamesMapping()[level.upper()]
    return lines.format(logging.LogRecord("rowmill", number, __file__, 0, "%s", (text.strip(),), trace))


def _json_lines() -> JsonLines | None:
    for handler in logging.getLogger().handlers:
        if handler.get_name() == _NAME and isinstance(handler.formatter, JsonLines):
            return handler.formatter
    return None


def masked(text: str) -> str:
    """The text without credentials in URLs, whoever put them there."""
    return _CREDENTIALS.sub(rf"\1{_HIDDEN}@", text) if ":/" in text and "@" in text else text


class TextLines(logging.Formatter):
    """``18:00:00 WARNING logger: message``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """One record, with its traceback if it has one."""
        return masked(super().format(record))


class JsonLines(logging.Formatter):
    """One JSON object per line, whatever is logged.

    ``time`` (UTC, milliseconds), ``level``, ``logger``, ``message``; where there is one, ``exception`` (its traceback
    as text); and every further field that is set: ``session``, ``row``, ``topic``, ``partition``, ``offset`` and
    ``stage`` of what handlers log, what the caller gave as ``extra=``, and :func:`add_fields`. A field called like one
    of the first five gets an underscore behind it; one called like a secret loses its value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, Any] = {}
        """What every line carries."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as a line, without a line break in it."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        exception = self._exception(record)
        if exception:
            fields["exception"] = exception
        return masked(_line({**fields, **self.fields, **_extra(record)}))

    def _exception(self, record: logging.LogRecord) -> str:
        parts = []
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(self.formatException(record.exc_info))
        elif record.exc_text:
            parts.append(record.exc_text)
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - arguments that do not fit: the line is worth more than the complaint
        return f"{record.msg} {record.args!r}"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the record says beyond what every record does."""
    found: dict[str, Any] = {}
    for field, value in record.__dict__.items():
        if field in _STANDARD or value is None or (isinstance(value, str) and not value):
            continue
        name = _HANDLERS_ROW.get(field, field)
        found[f"{name}_" if name in _OWN else name] = _HIDDEN if _SECRETIVE.search(field) else value
    place = _PLACE.fullmatch(str(found.get("row", "")))
    if place is not None:
        numbers = {name: int(place[name]) for name in ("partition", "offset")}
        found = {"topic": place["topic"], **numbers, **found}
    return found


def _line(fields: Mapping[str, Any]) -> str:
    """By the standard library: it takes a way out for every value that JSON does not know. In ASCII, because standard
    error may be anything.
    """
    try:
        return json.dumps(fields, allow_nan=False, default=_text)
    except (TypeError, ValueError, RecursionError):  # a key that is no text, NaN, something that holds itself
        return json.dumps({name: value if isinstance(value, str) else _text(value) for name, value in fields.items()})


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a user's object may do anything
        return f"<{type(value).__name__}>"
