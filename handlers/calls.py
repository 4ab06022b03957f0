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
    limit = runtime.time_limit(stage) if timeout == stage.timeout else None
    if limit is not None:
        return await limit.call(stage.call, arguments)
    return await call_with_limit(stage.call, arguments, timeout)


class TimeLimit:
    """A limit for the calls of one async handler, many at once, each with its own seconds. Belongs to one event loop.

    It does for each call what ``asyncio.timeout`` does. That sets a timer per call, which cost more than the rest of a
    row's way through a stage with policies: the loop sorts timers, and keeps those that were called off for long. Calls
    of one limit run out in the order in which they began, so that one timer, set for the oldest, serves them all.

    Args:
        seconds: that a call may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[_TimedCall, None] = {}  # the oldest first
        self._timer: asyncio.TimerHandle | None = None

    async def call(self, call: Handler, arguments: tuple[Any, ...]) -> Any:
        """As :func:`call_with_limit`."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # noqa: S101 - something runs this
        running = _TimedCall(task, loop.time() + self._seconds)
        self._running[running] = None
        if self._timer is None:  # it is never called off: it looks what is there when it rings
            self._timer = loop.call_at(running.ends, self._ring)
        try:
            return await call(*arguments)
        except asyncio.CancelledError:
            if running.is_over and not running.is_cancelled_by_others():
                raise self._error() from None
            raise
        except TimeoutError:  # what a handler may make of its cancellation
            if running.is_over:
                raise self._error() from None
            raise
        finally:
            if running.is_over:
                task.uncancel()
            else:
                del self._running[running]

    def _ring(self) -> None:
        """Cancel the calls whose seconds are over; then wait for the next one's end."""
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._running:
            oldest = next(iter(self._running))
            if oldest.ends > loop.time():
                self._timer = loop.call_at(oldest.ends, self._ring)
                return
            del self._running[oldest]
            oldest.is_over = True
            oldest.task.cancel()

    def _error(self) -> HandlerTimeoutError:
        return HandlerTimeoutError(f"no result within {self._seconds:g} s")


class _TimedCall:
    """A call that runs under a time limit."""

    __slots__ = ("_cancelling", "ends", "is_over", "task")

    def __init__(self, task: asyncio.Task[Any], ends: float) -> None:
        self.task = task
        self.ends = ends
        self.is_over = False
        self._cancelling = task.cancelling()

    def is_cancelled_by_others(self) -> bool:
        """Whether somebody besides the limit has cancelled the task since the call began."""
        return self.task.cancelling() > self._cancelling + 1


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


def is_being_cancelled() -> bool:
    """Whether the running task is to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def raise_if_cancelled() -> None:
    """A handler that swallowed its cancellation gets no further row."""
    if is_being_cancelled():
        raise asyncio.CancelledError


def raise_if_ours() -> None:
    """Go on being cancelled if that is what happens to us; a handler may raise the same without it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise  # noqa: PLE0704 - called where a CancelledError is being handled
