"""A thread of one's own for calls that block, awaited from the event loop.

Not a ThreadPoolExecutor: the interpreter joins those threads at exit, so that one call stuck on a bad disk
would keep the whole process from ending. This thread is a daemon, and ``stop`` waits for it only so long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, TypeVar

from ..errors import BrokerError

T = TypeVar("T")


class _Job(NamedTuple):
    future: asyncio.Future[Any]
    call: Callable[..., Any]
    args: tuple[Any, ...]


class JobThread:
    """Runs calls one after another, in the order they were handed in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: asyncio.Event = asyncio.Event()

    def start(self) -> None:
        """Bind to the running loop and begin."""
        self._loop = asyncio.get_running_loop()
        Thread(target=self._work, args=(self._loop,), name=self.name, daemon=True).start()

    def run(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """The call's outcome, as a future.

        Cancelling the future drops a call that has not begun; one that has begun goes on to its end.
        """
        if self._loop is None:
            raise BrokerError(f"{self.name}: not running; start the broker first, and use it until its close")
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put(_Job(future, call, args))
        return future

    async def stop(self, last: Callable[[], Any], timeout: float) -> bool:
        """Run ``last`` after what is queued, end the thread, and say whether it ended within ``timeout``."""
        if self._loop is None:
            return True
        self.run(last).add_done_callback(_forget)
        self._jobs.put(None)
        self._loop = None
        try:
            async with asyncio.timeout(timeout):
                await self._done.wait()
        except TimeoutError:
            return False
        return True

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while (job := self._jobs.get()) is not None:
            if job.future.cancelled():
                continue
            try:
                outcome, error = job.call(*job.args), None
            except BaseException as raised:  # noqa: BLE001 - handed to whoever awaits
                outcome, error = None, raised
            if not _tell(loop, _settle, job.future, outcome, error):
                return
            # Otherwise the last outcome (megabytes, perhaps) lives on while the thread waits for the next job.
            del job, outcome, error
        _tell(loop, self._done.set)


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *args: Any) -> bool:
    """Call back on the loop; False when it was closed meanwhile and nobody listens any more."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        return False
    return True


def _settle(future: asyncio.Future[Any], outcome: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled while the call ran
        return
    if error is None:
        future.set_result(outcome)
    else:
        future.set_exception(error)


def _forget(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
