"""Log capture: what a handler logs, itself or through a library, says which row it is about.

While a captured stage's handler runs, a context variable holds its row and stage. It follows the handler into the
threads of the pool and into the tasks that it starts, and two handlers at once do not see each other's. A factory of
log records reads it: so every record of the process carries the fields ``rowmill_session``, ``rowmill_row`` and
``rowmill_stage`` (empty outside of handlers), whichever logger it came through and wherever it goes. A filter was
rejected: a logger's filters do not see the records of its children, and handlers' filters would have to be put on
every handler there is and will be.

Only stages that were made by :func:`captured` set the variable, and only after :func:`install` does anybody read it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import replace
from datetime import UTC, datetime
from functools import wraps
from typing import Any, NamedTuple, TextIO, cast

from ..state.errors import ConfigError
from .context import RowContext
from .stage import Stage

LOG_CHARACTERS = 4_096
"""Characters of a row's log that are kept, where nothing else is said."""

_LINE_CHARACTERS = 500

_CURRENT: ContextVar[tuple[Any, str] | None] = ContextVar("rowmill_row", default=None)
"""What a call is about: its context, or the contexts of its batch, and the stage's name.

A bare tuple, since one is made for every call; what it means is read when somebody logs.
"""


class CurrentRow(NamedTuple):
    """What the code that asks is working on.

    Attributes:
        session: the session's id.
        topic, partition, offset: where the row came from; of a batch, its first one.
        stage: the stage's name.
        rows: how many rows the call is about.
    """

    session: str
    topic: str
    partition: int
    offset: int
    stage: str
    rows: int = 1

    @property
    def row(self) -> str:
        """``topic/partition/offset``; for a batch also how many more there are."""
        more = f" and {self.rows - 1} more" if self.rows > 1 else ""
        return f"{self.topic}/{self.partition}/{self.offset}{more}"


def current_row() -> CurrentRow | None:
    """The row that the calling code is working on; None outside of captured stages."""
    current = _CURRENT.get()
    if current is None:
        return None
    context, stage = current
    contexts = _contexts(context)
    if not contexts:
        return None
    first = contexts[0]
    return CurrentRow(first.session, first.topic, first.partition, first.offset, stage, len(contexts))


def captured(stage: Stage) -> Stage:
    """The stage, made to tell which row it works on while its handler runs. Its rows need contexts from now on."""
    call: Callable[..., Any]
    if stage.is_async:
        call = CapturedCall(stage.call, stage.name, takes_context=stage.takes_context)
    else:
        call = _wrap(stage.call, stage.name, stage.takes_context)
    return replace(stage, call=call, takes_context=True)


class CapturedCall:
    """An async handler that tells which row it works on.

    An object and no function, so that the hot path (:func:`~rowmill.handlers.chain.bare_attempt`) can do by itself what
    the call does: a coroutine around the handler's own costs 0.7 µs a row.

    Attributes:
        handler: what is called.
        stage: its stage's name.
        takes_context: whether it takes the row's context.
    """

    __slots__ = ("handler", "stage", "takes_context")

    def __init__(self, handler: Callable[..., Any], stage: str, *, takes_context: bool) -> None:
        self.handler = handler
        self.stage = stage
        self.takes_context = takes_context

    async def __call__(self, row: Any, context: Any) -> Any:
        """Call the handler."""
        token = tell(context, self.stage)
        try:
            return await (self.handler(row, context) if self.takes_context else self.handler(row))
        finally:
            forget(token)


def _wrap(call: Callable[..., Any], stage: str, takes_context: bool) -> Callable[..., Any]:
    @wraps(call)
    def captured_call(row: Any, context: Any) -> Any:
        token = _CURRENT.set((context, stage))
        try:
            return call(row, context) if takes_context else call(row)
        finally:
            _CURRENT.reset(token)

    return captured_call


def tell(context: Any, stage: str) -> Token[Any]:
    """From now on the running task works on this row; until :func:`forget`."""
    return _CURRENT.set((context, stage))


def forget(token: Token[Any]) -> None:
    """It does not any more."""
    try:  # noqa: SIM105 - contextlib.suppress would cost more than all the rest
        _CURRENT.reset(token)
    except ValueError:  # the call is being closed by somebody else's context, which never had the variable set
        pass


def _contexts(context: Any) -> Sequence[RowContext]:
    return context if isinstance(context, (list, tuple)) else () if context is None else (context,)


# --- the lines of one row --------------------------------------------------------------------------------------


class LogLines:
    """The last lines that were logged about a row. Belongs to its context (``context.lines``), forks included.

    Args:
        limit: characters kept; of a line at most 500.

    Raises:
        ConfigError: the limit is none.
    """

    __slots__ = ("_lines", "_open", "_size", "left_out", "limit")

    def __init__(self, limit: int = LOG_CHARACTERS) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError("capture_logs", limit, "give a number of characters from 1, or True or False")
        self.limit = limit
        self.left_out = 0
        """Earlier lines that had to go."""
        self._lines: deque[str] | None = None  # made for the first line: most rows log nothing
        self._open = ""
        self._size = 0

    def add(self, line: str) -> None:
        """One more line."""
        with _LOCK:
            self._add(line)

    def print(self, text: str) -> None:
        """What was printed: whole lines are added, the rest waits for its end."""
        with _LOCK:
            *whole, rest = (self._open + text).split("\n")
            for line in whole:
                self._add(f"print: {line}")
            self._open = rest[:_LINE_CHARACTERS]

    def text(self) -> str:
        """The lines in order; "" if there are none."""
        with _LOCK:
            lines = [*(self._lines or ()), *([f"print: {self._open}"] if self._open else [])]
            earlier = [f"… {self.left_out:,} earlier lines"] if self.left_out else []
        return "\n".join([*earlier, *lines])

    def _add(self, line: str) -> None:
        if self._lines is None:
            self._lines = deque()
        most = min(_LINE_CHARACTERS, self.limit)
        line = line if len(line) <= most else line[: most - 1] + "…"
        self._lines.append(line)
        self._size += len(line) + 1
        while self._size - 1 > self.limit:
            self._size -= len(self._lines.popleft()) + 1
            self.left_out += 1


_LOCK = threading.Lock()
"""For the lines of all rows: taken per line, for less than a microsecond."""


def lines_of(context: RowContext | None) -> str:
    """What was logged about a row, for its dead letter; "" where nothing was, or nothing is kept."""
    lines = getattr(context, "lines", None)
    return lines.text() if isinstance(lines, LogLines) else ""


def _current_lines() -> Iterator[LogLines]:
    """Where the lines of the running call belong: to its row, or to each row of its batch."""
    current = _CURRENT.get()
    if current is not None:
        for context in _contexts(current[0]):
            lines = getattr(context, "lines", None)
            if lines is not None:
                yield lines


def _line(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - arguments that do not fit; logging itself reports it
        message = str(record.msg)
    moment = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
    error = record.exc_info[1] if record.exc_info else None
    told = f" ({type(error).__name__}: {error})" if error is not None else ""
    return f"{moment} {record.levelname} {record.name}: {message}{told}".replace("\n", "\n  ")


# --- into the process ------------------------------------------------------------------------------------------


_Factory = Callable[..., logging.LogRecord]


class _RecordFactory:
    """Makes log records as the factory before it does, and adds the row."""

    def __init__(self, before: _Factory) -> None:
        self.before = before

    def __call__(self, *arguments: Any, **named: Any) -> logging.LogRecord:
        record = self.before(*arguments, **named)
        if "rowmill_row" in record.__dict__:  # a second one of us further down
            return record
        current = current_row()
        record.rowmill_session = current.session if current else ""
        record.rowmill_row = current.row if current else ""
        record.rowmill_stage = current.stage if current else ""
        if current is not None:
            for lines in _current_lines():
                lines.add(_line(record))
        return record


class _Stdout:
    """Standard output that also gives what a handler prints to its row.

    ``contextlib.redirect_stdout`` would take the output of all rows at once for that of one; this asks for each
    piece of text whose it is.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, and note."""
        for lines in _current_lines():
            lines.print(text)
        return self.stream.write(text)

    def writelines(self, texts: Sequence[str]) -> None:
        """Write, and note."""
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def is_installed() -> bool:
    """Whether log records of this process carry their rows."""
    return hasattr(logging.makeLogRecord({}), "rowmill_row")


def install(*, prints: bool = False) -> None:
    """Let log records of this process carry their rows, from now on. Calling it again changes nothing.

    If something replaces the logging module's record factory later without asking ours, call it again.

    Args:
        prints: whether what handlers print goes into their rows' logs as well (and to standard output, as before).
    """
    if not is_installed():
        logging.setLogRecordFactory(_RecordFactory(logging.getLogRecordFactory()))
    if prints and not isinstance(sys.stdout, _Stdout):
        sys.stdout = cast("TextIO", _Stdout(sys.stdout))


def uninstall() -> None:
    """Undo :func:`install`, as far as nobody has put something on top meanwhile."""
    factory: Any = logging.getLogRecordFactory()
    if isinstance(factory, _RecordFactory):
        logging.setLogRecordFactory(factory.before)
    stdout: Any = sys.stdout
    if isinstance(stdout, _Stdout):
        sys.stdout = stdout.stream
