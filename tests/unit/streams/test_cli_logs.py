"""Lines of the log, as text and as JSON: every record becomes one, and no credentials stand in it."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill.handlers.capture import captured, install, uninstall
from rowmill.handlers.context import RowContext
from rowmill.handlers.stage import make_stage
from rowmill.streams.cli.logs import JsonLines, TextLines, add_fields, in_form, masked, set_up_logging

CANARY = "c4nary-s3cret"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what the command line does to the process's logging."""
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in ("", "aiokafka", "kafka")}
    handlers = list(root.handlers)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class Written:
    """What was written to standard error since the test began."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._text = ""

    @property
    def text(self) -> str:
        """As it stands."""
        self._text += self._capture.readouterr().err
        return self._text

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its lines as objects."""
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Written:
    """Standard error."""
    return Written(capsys)


def record_of(message: Any = "hello", *args: Any, **fields: Any) -> logging.LogRecord:
    """A record with fields of its own."""
    record = logging.LogRecord("some.logger", logging.WARNING, "file.py", 1, message, args, None)
    record.__dict__.update(fields)
    return record


def raised(error: Exception) -> Exception:
    """The error with a traceback."""
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


def as_json(record: logging.LogRecord) -> dict[str, Any]:
    """The line that a record becomes."""
    line = JsonLines().format(record)
    assert "\n" not in line
    assert line.isascii()
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_line(stderr: Written) -> None:
    """Time in UTC with milliseconds, level, logger, message, and the fields that the caller gave."""
    set_up_logging(1, quiet=False, form="json")
    before = time.time()
    logging.getLogger("my.module").info("%d rows\nfor %s", 3, "Zoë", extra={"cost": Decimal("1.5"), "path": Path("/x")})
    (line,) = stderr.lines
    at = datetime.strptime(line.pop("time"), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert before - 0.001 <= at.timestamp() <= time.time()
    assert line == {"level": "info", "logger": "my.module", "message": "3 rows\nfor Zoë", "cost": "1.5", "path": "/x"}


def test_an_exception(stderr: Written) -> None:
    """A traceback is one field of its line."""
    set_up_logging(0, quiet=False, form="json")
    logging.getLogger("x").error("it failed", exc_info=raised(ValueError("seven")), stack_info=True)
    (line,) = stderr.lines
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert "ValueError: seven\nStack (most recent call last)" in line["exception"]


def test_levels(stderr: Written) -> None:
    """The form changes nothing about what is shown; a second call replaces the first one's handler."""
    for form in ("json", "text", "json"):
        set_up_logging(0, quiet=True, form=form)
    logging.getLogger("x").warning("not shown")
    logging.getLogger("aiokafka").error("nor this")
    logging.getLogger("x").error("shown")
    assert [line["message"] for line in stderr.lines] == ["shown"]


def test_text(stderr: Written) -> None:
    """Without being asked for anything else, lines are for people."""
    set_up_logging(0, quiet=False)
    logging.getLogger("x").warning("careful")
    assert stderr.text[8:] == " WARNING x: careful\n"
    assert in_form("plainly") == "plainly"


def test_warnings_are_lines_too(stderr: Written) -> None:
    """What Python or a library warns of does not stand between the objects."""
    set_up_logging(0, quiet=False, form="json")
    with warnings.catch_warnings():
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # inside of pytest's own way of catching them
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (line,) = stderr.lines
    assert "DeprecationWarning: old" in line["message"]


def test_what_handlers_log(stderr: Written) -> None:
    """Lines of a handler, through its context or any logger, say which row, session and stage they are about."""

    def score(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        ctx.log.warning("odd")
        logging.getLogger("library").warning("odder")
        return row

    set_up_logging(0, quiet=False, form="json")
    install()
    try:
        context = RowContext("reviews", 3, 41, 0, None, (), "live")
        captured(make_stage(score)).call({"n": 1}, context)
    finally:
        uninstall()
    for line in stderr.lines:
        about = {name: line[name] for name in ("session", "row", "topic", "partition", "offset", "stage")}
        assert about == {"session": "live", "row": "reviews/3/41", "topic": "reviews", "partition": 3, "offset": 41,
                         "stage": "score"}  # fmt: skip
    assert len(stderr.lines) == 2


def test_a_batch(stderr: Written) -> None:
    """Lines of a batch carry the place of its first row."""
    line = as_json(record_of(rowmill_row="my/odd/topic/0/7 and 3 more", rowmill_session="s", rowmill_stage=""))
    assert (line["topic"], line["partition"], line["offset"]) == ("my/odd/topic", 0, 7)
    assert "stage" not in line


def test_fields_of_all_lines(stderr: Written) -> None:
    """What is known of the worker stands on every line from then on, also on what the command says."""
    add_fields(worker="not yet")  # nothing is set up: ignored
    set_up_logging(0, quiet=False, form="json")
    add_fields(worker="0a1b", session="live")
    logging.getLogger("x").warning("one", extra={"session": "of its own"})
    said = json.loads(in_form("\nstopped: 5 % done %s"))
    assert [line["worker"] for line in stderr.lines] == ["0a1b"]
    assert stderr.lines[0]["session"] == "of its own"
    assert (said["message"], said["level"], said["logger"], said["worker"]) == (
        "stopped: 5 % done %s", "info", "rowmill", "0a1b",
    )  # fmt: skip


def test_a_bug_is_a_line() -> None:
    """An error that the command did not expect keeps its traceback."""
    set_up_logging(0, quiet=False, form="json")
    said = json.loads(in_form("rowmill: error: this is a bug", level="error", error=raised(KeyError("x"))))
    assert (said["level"], said["exception"].splitlines()[-1]) == ("error", "KeyError: 'x'")


class Hostile:
    """An object that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


HOLDS_ITSELF: list[Any] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {("a", 1): 2}, HOLDS_ITSELF, b"\xff", "\ud800", {1, 2}, Hostile(), object, 10**400,
     {"deep": [{"a": Hostile()}]}, "\u2028\x00\x1b[31m"],
)  # fmt: skip
def test_odd_values(value: Any) -> None:
    """Whatever is given as an extra field, the line is there and is JSON."""
    assert as_json(record_of(odd=value))["message"] == "hello"


@pytest.mark.parametrize(
    ("message", "args"), [("%d rows", ("three",)), ("%s %s", ("one",)), ("100 %", (1,)), ({"a": 1}, ()), (None, ())]
)
def test_arguments_that_do_not_fit(message: Any, args: tuple[Any, ...]) -> None:
    """A mistake in a log call costs no line."""
    assert as_json(record_of(message, *args))["message"]


def test_fields_called_like_ours() -> None:
    """An extra field does not take the place of time, level, logger or exception."""
    line = as_json(record_of(time="noon", level="high", logger="me", exception="none"))
    assert (line["time_"], line["level_"], line["logger_"], line["exception_"]) == ("noon", "high", "me", "none")
    assert line["logger"] == "some.logger"


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.text() | st.floats() | st.binary(), st.lists)), st.text())
def test_any_record(fields: dict[str, Any], message: str) -> None:
    """Any fields, any message: one line of ASCII, with the message in it."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (message,), None)
    record.__dict__.update({name: value for name, value in fields.items() if name not in record.__dict__})
    assert as_json(record)["message"] == masked(message)


# --- secrets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"kafka://alice:{CANARY}@host:9092",
        f"no broker at kafka://alice:{CANARY}@host:9092, sorry",
        f"http://{CANARY}@host/x",
        f"'https://bob:p{CANARY}/with@and#in@host/x'",
        f"postgresql+asyncpg://u:{CANARY}@h/db and redis://:{CANARY}@h",
    ],
)
def test_credentials_in_urls(text: str) -> None:
    """Whoever logs a URL with credentials, in either form they are not shown; the rest of the line is."""
    for formatter in (TextLines(), JsonLines()):
        error = raised(ValueError(text))
        line = formatter.format(record_of("%s", text, url=text, exc_info=(type(error), error, error.__traceback__)))
        assert CANARY not in line
        assert "***@" in line


@pytest.mark.parametrize(
    "text", ["a@b.c", "see http://host:80/x?y=1 or ask a@b.c", "kafka://one:9092,two:9092", "x://", "mail to <a@b>"]
)
def test_what_is_no_credential(text: str) -> None:
    """Addresses and plain URLs stay as they are."""
    assert masked(text) == text


def test_masking_is_quick() -> None:
    """No text makes it slow."""
    began = time.monotonic()
    for text in ("://" + "a:" * 50_000 + " @", "://a" * 30_000 + " @", "@" * 100_000 + "://"):
        masked(text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["password", "sasl_plain_password", "api_key", "apikey", "webhook_token", "SECRET"])
def test_fields_called_like_secrets(name: str) -> None:
    """Their values are not written; counts of tokens are."""
    line = as_json(record_of(**{name: CANARY}, tokens=5))
    assert CANARY not in json.dumps(line)
    assert line["tokens"] == 5
