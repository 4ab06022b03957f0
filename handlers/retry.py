"""Retry: how often, after what pause, and for which errors a stage's call is made again.

Full jitter (a pause drawn between 0 and the exponential one) is the strategy that AWS's architecture blog found best
against many callers in step ("Exponential Backoff And Jitter", 2015). Errors are judged by their class and by what
they say of themselves (``retryable``, an HTTP status), never by words in their message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias

from ..state.clock import Clock
from ..state.errors import ConfigError
from .options import check_count, check_seconds

log = logging.getLogger(__name__)

LONGEST_ASKED = 3600.0
"""Seconds: a ``Retry-After`` of more is taken for this. One absurd answer must not stop a stage for years."""

Errors: TypeAlias = "type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]"
"""Which errors a policy is about: classes, or a function that judges one."""

_CURABLE_4XX = {408, 425, 429}
_MISTAKES = (
    TypeError, AttributeError, NameError, ImportError, NotImplementedError, AssertionError, SyntaxError, RecursionError,
)  # fmt: skip
"""What only a change of code mends."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How a stage's call is repeated when it fails. The row waits without holding a slot; rows of its key wait with it.

    What a row went through so far lives in memory only: after a crash it starts anew, with all its attempts.

    Attributes:
        attempts: calls in all, the first included (3).
        first: the longest pause before the second call, in seconds; it doubles with every further one (0.5).
        cap: the longest that doubling makes it (30.0).
        deadline: seconds from the first call's start after which no further one begins, and the running one ends; None:
            no limit.
        on: classes of errors to retry, or a function of the error. Default: all but those that say that trying again
            is of no use: an attribute ``retryable`` that is False, an HTTP status 4xx other than 408, 425 and 429, and
            programming mistakes (TypeError, AttributeError, NameError, …).

    An error's ``retry_after`` (seconds, or an HTTP date as text; also a response's ``Retry-After`` header) is a lower
    bound of the pause, up to one hour, whatever ``cap`` says.

    Raises:
        ConfigError: an option is out of its range.
    """

    attempts: int = 3
    first: float = 0.5
    cap: float = 30.0
    deadline: float | None = None
    on: Errors | None = None

    def __post_init__(self) -> None:
        check_count("Retry(attempts=)", self.attempts)
        check_seconds("Retry(first=)", self.first, least_is_zero=True)
        check_seconds("Retry(cap=)", self.cap, least_is_zero=True)
        if self.deadline is not None:
            check_seconds("Retry(deadline=)", self.deadline)
        check_errors("Retry(on=)", self.on)

    def pause_after(self, error: BaseException, attempts: int, elapsed: float, clock: Clock) -> float | None:
        """Seconds until the next call; None if there must be none.

        Args:
            error: what the last call raised.
            attempts: calls made so far.
            elapsed: seconds since the first one began.
            clock: chance, and the date that a ``Retry-After`` is compared with.
        """
        if attempts >= self.attempts or not concerns(self.on, error, is_curable):
            return None
        pause = clock.random() * min(self.cap, self.first * 2.0 ** min(attempts - 1, 60))
        asked = retry_after_of(error, clock.now_ms())
        if asked is not None:
            pause = max(pause, min(asked, LONGEST_ASKED))
        if self.deadline is not None and elapsed + pause >= self.deadline:
            return None
        return pause


def check_errors(setting: str, errors: Errors | None) -> None:
    """Check an ``on=`` option.

    Raises:
        ConfigError: neither classes of errors nor a function.
    """
    classes = errors if isinstance(errors, tuple) else (errors,)
    if errors is None or all(isinstance(one, type) and issubclass(one, BaseException) for one in classes):
        return
    if isinstance(errors, (tuple, type)) or not callable(errors):
        raise ConfigError(setting, errors, "give an exception class, a tuple of them, or a function of the error")


def concerns(errors: Errors | None, error: BaseException, default: Callable[[BaseException], bool]) -> bool:
    """Whether a policy's ``on=`` means this error; ``default`` judges where nothing was given."""
    if errors is None:
        return default(error)
    if isinstance(errors, (tuple, type)):
        return isinstance(error, errors)
    try:
        return bool(errors(error))
    except Exception:
        log.exception("on= cannot judge %s; it is judged as by default", type(error).__name__)
        return default(error)


def is_curable(error: BaseException) -> bool:
    """Whether the same call may succeed later without anybody changing anything, as far as the error tells."""
    says = _attribute(error, "retryable")
    if isinstance(says, bool):
        return says
    status = status_of(error)
    if status is not None and 400 <= status < 500:
        return status in _CURABLE_4XX
    return not isinstance(error, _MISTAKES)


def is_fault(error: BaseException) -> bool:
    """Whether an error speaks against the resource that was called; being told to slow down does not."""
    return is_curable(error) and status_of(error) != 429


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, httpx, requests or the OpenAI client carries."""
    response = _attribute(error, "response")
    for holder, name in ((error, "status"), (error, "status_code"), (response, "status_code"), (response, "status")):
        value = _attribute(holder, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def retry_after_of(error: BaseException, now_ms: int) -> float | None:
    """Seconds for which an error asks to be left alone (``retry_after``, or a ``Retry-After`` header), from 0."""
    return _seconds(asked_pause(error), now_ms)


def asked_pause(error: BaseException) -> Any:
    """The same as the error says it: a number, text, a date; None if it asks for nothing."""
    asked: Any = _attribute(error, "retry_after")
    for holder in (error, _attribute(error, "response")):
        headers = _attribute(holder, "headers")
        if asked is None and headers is not None and hasattr(headers, "get"):
            asked = headers.get("Retry-After") or headers.get("retry-after")
    return asked


def _attribute(holder: Any, name: str) -> Any:
    """An attribute of an error of somebody else's: a property may raise anything."""
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001
        return None


def _seconds(asked: Any, now_ms: int) -> float | None:
    """Seconds (number or text), an HTTP date (RFC 9110), or a datetime; None for what is none of these."""
    if isinstance(asked, bytes):
        asked = asked.decode("latin-1")
    if isinstance(asked, bool):
        return None
    try:
        if isinstance(asked, datetime):
            return _until(asked, now_ms)
        seconds = float(asked)
    except (TypeError, ValueError, OverflowError):
        pass
    else:
        return max(0.0, seconds) if seconds < float("inf") else None
    try:
        return _until(parsedate_to_datetime(asked), now_ms)
    except (TypeError, ValueError, IndexError, OverflowError, AttributeError, OSError):
        return None


def _until(moment: datetime, now_ms: int) -> float:
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0.0, aware.timestamp() - now_ms / 1000)
