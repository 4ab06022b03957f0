"""Running our asyncio code from ordinary code, with or without an event loop already running (notebooks)."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop on a thread of its own, for as long as the ``with`` block lasts.

    Used for every call from synchronous code, so that one way serves scripts, notebooks and web frameworks, and
    so that Ctrl-C reaches the caller's thread while the loop can still finish in order.
    """

    def __init__(self, name: str = "rowmill") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not sys.is_finalizing():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)

    def submit(self, coroutine: Callable[[], Awaitable[T]]) -> Future[T]:
        """Start ``coroutine()`` on the loop; the future belongs to this thread."""

        async def call() -> T:
            return await coroutine()

        return asyncio.run_coroutine_threadsafe(call(), self._loop)

    def call_soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function on the loop's thread."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            _close(self._loop)


def run_here(coroutine: Awaitable[T]) -> T:
    """Run to the end on this thread, like ``asyncio.run``, but do not wait for threads that handlers have started.

    ``asyncio.run`` waits for each ``asyncio.to_thread`` that is still under way: with a handler that hangs a worker
    which was told to stop would never end.
    """
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(coroutine)
    finally:
        _close(loop)
        asyncio.set_event_loop(None)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=5))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def run_blocking(coroutine: Callable[[], Awaitable[T]], on_interrupt: Callable[[], None] | None = None) -> T:
    """Run to the end and return the result.

    Args:
        coroutine: what to run, on a loop of its own in another thread.
        on_interrupt: called on the loop at the first Ctrl-C, to ask for an orderly end; at the second one, and at
            the first without it, everything is cancelled.

    Raises:
        KeyboardInterrupt: after an interrupted run has ended.
    """
    with LoopThread() as loop:
        future = loop.submit(coroutine)
        try:
            return future.result()
        except KeyboardInterrupt:
            if on_interrupt is not None and not future.done():
                loop.call_soon(on_interrupt)
                with contextlib.suppress(InterruptedError):  # the orderly end that was asked for
                    future.result()
            else:
                future.cancel()
            raise
