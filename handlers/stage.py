"""A stage: a handler and how it is to be called."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..state.errors import ConfigError

Handler: TypeAlias = Callable[..., Any]

ASYNC_CONCURRENCY = 10
"""Calls of an async handler that run at once unless its stage says otherwise."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,80}")


@dataclass(frozen=True, slots=True)
class Stage:
    """One named step of a chain. Made by :func:`make_stage`, which checks everything.

    Attributes:
        name: unique in its pipeline; it stands in dead letters, metrics and caches, so keep it when code changes.
        handler: ``row -> row | list[row] | None``; with ``batch`` it takes and gives lists, with ``frame`` frames.
        batch: rows per call at most, or None for one row per call.
        frame: whether the rows come as a pandas DataFrame.
        timeout: seconds that one call may take, or None for no limit.
        concurrency: calls that may run at once, in the whole worker.
        is_async: whether calling the handler gives something to await.
        takes_context: whether the handler wants a RowContext (a list of them for batches and frames) besides.
    """

    name: str
    handler: Handler
    batch: int | None
    frame: bool
    timeout: float | None
    concurrency: int
    is_async: bool
    takes_context: bool

    @property
    def is_plain(self) -> bool:
        """Whether a bare call on the caller's thread is all that it takes: the fast path."""
        return not self.is_async and self.timeout is None and self.concurrency == 1


def make_stage(
    handler: Handler,
    *,
    name: str | None = None,
    batch: int | None = None,
    frame: bool = False,
    timeout: float | None = None,
    concurrency: int | None = None,
) -> Stage:
    """Check a handler and its options and put them together.

    Args:
        handler: a function, method or object with ``__call__``; sync or async; of (row) or (row, ctx).
        name: 1 to 80 letters, digits, ``_`` and ``-``; default: the handler's own name.
        batch: 1 or more; default for ``frame=True``: 1,000.
        frame: call with a DataFrame; its index identifies the rows and must be kept.
        timeout: seconds above 0.
        concurrency: calls at once, from 1. Default: 10 for async handlers, 1 for others; above 1 a blocking handler
            runs on as many threads.

    Raises:
        ConfigError: naming the option, what was given, and what to give instead.
    """
    if not callable(handler):
        raise ConfigError("stage(handler)", handler, "give a function, or an object that can be called")
    name = name if name is not None else _own_name(handler)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError("stage(name=)", name, "use 1 to 80 letters, digits, '_' and '-'")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ConfigError("stage(batch=)", batch, "give a number of rows from 1, or leave it out")
    if not isinstance(frame, bool):
        raise ConfigError("stage(frame=)", frame, "give True or False")
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf")
    ):
        raise ConfigError("stage(timeout=)", timeout, "give seconds above 0, or leave it out for no limit")
    if concurrency is not None and (
        isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1
    ):
        raise ConfigError("stage(concurrency=)", concurrency, "give a number of calls from 1, or leave it out")
    is_async = _is_async(handler)
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise ConfigError("stage(handler)", name, "return a list of rows instead of yielding them")
    return Stage(
        name=name,
        handler=handler,
        batch=batch or (1000 if frame else None),
        frame=frame,
        timeout=float(timeout) if timeout is not None else None,
        concurrency=concurrency or (ASYNC_CONCURRENCY if is_async else 1),
        is_async=is_async,
        takes_context=_takes_context(handler, name),
    )


def _own_name(handler: Handler) -> str:
    own = getattr(handler, "__name__", None) or type(handler).__name__
    return "lambda" if own == "<lambda>" else str(own)


def _is_async(handler: Handler) -> bool:
    call = getattr(handler, "__call__", None)  # noqa: B004 - an object's own async __call__ counts as well
    return inspect.iscoroutinefunction(inspect.unwrap(handler)) or inspect.iscoroutinefunction(call)


def _takes_context(handler: Handler, name: str) -> bool:
    """Whether a second argument is wanted: a required second one, or one called ``ctx`` or ``context``."""
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except (TypeError, ValueError):  # builtins such as dict tell no signature: they get the row
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    required = [p for p in positional if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(required) > 2 or keyword_only or (not positional and not takes_any):
        raise ConfigError(
            "stage(handler)", f"{name}{inspect.signature(handler)}", "a handler takes (row) or (row, ctx) and no more"
        )
    return len(required) == 2 or (len(positional) > 1 and positional[1].name in {"ctx", "context"})
