"""Calling a handler that is awaited: on the loop, on a thread, with a time limit."""

from __future__ import annotations

import asyncio
from typing import Any

from .errors import HandlerTimeoutError
from .runtime import Runtime
from .stage import Handler, Stage


async def await_call(stage: Stage, arguments: tuple[Any, ...], runtime: Runtime, timeout: float | None) -> Any:
    """The handler's result.

    Raises:
        HandlerTimeoutError: it took longer than ``timeout`` seconds. An async handler was cancelled; a blocking one
            goes on unwatched, and another thread takes its thread's place.
        AbandonedError: too many blocking ones do so already.
        BaseException: whatever the handler raises.
    """
    if not stage.is_async:
        return await runtime.pool.run(stage.call, *arguments, timeout=timeout)
    return await call_with_limit(stage.call, arguments, timeout)


async def call_with_limit(call: Handler, arguments: tuple[Any, ...], timeout: float | None) -> Any:
    """An async handler's result, within so many seconds.

    Raises:
        HandlerTimeoutError: it took longer, and was cancelled.
    """
    if timeout is None:
        return await call(*arguments)
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await call(*arguments)
    except TimeoutError:
        if limit.expired():
            raise HandlerTimeoutError(f"no result within {timeout:g} s") from None
        raise


def raise_if_cancelled() -> None:
    """A handler that swallowed its cancellation gets no further row."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def raise_if_ours() -> None:
    """Go on being cancelled if that is what happens to us; a handler may raise the same without it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise  # noqa: PLE0704 - called where a CancelledError is being handled
