"""Answers of the API: JSON, and which status an error has. Every error says what was wrong and what to do."""

from __future__ import annotations

import logging
from typing import Any

from aiohttp import web

from ...state.codec import dumps
from ...state.errors import CheckpointError, ConfigError, RowmillError
from ..errors import (
    BrokerError,
    BrokerTimeoutError,
    FencedError,
    GroupBusyError,
    IllegalTransitionError,
    OffsetOutOfRangeError,
    SessionError,
    TopicError,
)
from .contents import shown_text

log = logging.getLogger(__name__)

_STATUSES: tuple[tuple[type[RowmillError], int], ...] = (
    (BrokerTimeoutError, 504),
    (BrokerError, 503),
    (IllegalTransitionError, 409),
    (GroupBusyError, 409),
    (FencedError, 409),
    (SessionError, 409),
    (OffsetOutOfRangeError, 416),
    (TopicError, 404),
    (CheckpointError, 500),
    (ConfigError, 400),
)


class RefusedRequestError(ConfigError):
    """A request that is not answered as it was meant: setting, value, remedy, and an HTTP status.

    Args:
        status: the HTTP status.
        setting: which part of the request is wrong.
        value: what it was.
        remedy: what to do instead.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(self, status: int, setting: str, value: Any, remedy: str, *, retry_after: float | None = None) -> None:
        super().__init__(setting, value, remedy)
        self.status = status
        self.wait_seconds = retry_after


def not_found(setting: str, value: Any, remedy: str) -> RefusedRequestError:
    """What was asked for is not there."""
    return RefusedRequestError(404, setting, value, remedy)


def json_answer(value: Any, status: int = 200) -> web.Response:
    """A value as JSON. What JSON has no form for is a bug of ours; texts from topics went through ``contents.py``."""
    return web.Response(status=status, body=dumps(value), content_type="application/json", charset="utf-8")


def error_answer(error: BaseException) -> web.Response:
    """An error as JSON, with its status."""
    status, body = described(error)
    response = json_answer(body, status)
    if isinstance(error, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    if isinstance(error, RefusedRequestError) and error.wait_seconds is not None:
        response.headers["Retry-After"] = str(max(1, round(error.wait_seconds)))
    return response


def described(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The status of an error, and what is said of it."""
    if isinstance(error, RefusedRequestError):
        return error.status, _body(error.setting, error.value, error.remedy, str(error))
    if isinstance(error, ConfigError):
        return 400, _body(error.setting, error.value, error.remedy, str(error))
    if isinstance(error, RowmillError):
        return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500), _body(
            None, None, None, str(error)
        )
    if isinstance(error, web.HTTPException):
        return error.status, _body(None, None, _HTTP_REMEDIES.get(error.status), error.reason)
    log.error("a request failed", exc_info=error)
    return 500, _body(None, None, "see the console's log, and report it", "this is a bug in rowmill")


_HTTP_REMEDIES = {
    404: "GET /api/v1/openapi.json lists what there is",
    405: "see the header Allow",
    413: "send less: at most 1 MiB",
}


def _body(setting: str | None, value: Any, remedy: str | None, message: str) -> dict[str, Any]:
    shown = None if value is None else shown_text(value if isinstance(value, str) else repr(value))[:500]
    error = {
        "setting": setting,
        "value": shown,
        "remedy": None if remedy is None else shown_text(remedy),
        "message": shown_text(message),
    }
    return {"error": error}
