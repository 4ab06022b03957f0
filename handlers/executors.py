"""Where handlers that block run: a bounded pool of threads that never holds up the event loop or the exit."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..state.errors import ConfigError
from .errors import AbandonedError, HandlerTimeoutError

T = TypeVar("T")


class _Job:
    __slots__ = ("abandoned", "call", "finished", "loop", "outcome", "started")

    def __init__(self, call: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.call = call
        self.loop = loop
        self.outcome: asyncio.Future[Any] = loop.create_future()
        self.started = False
        self.finished = False
        self.abandoned = False


class BlockingPool:
    """Runs blocking calls on daemon threads, started when needed and kept.

    Python's own ThreadPoolExecutor was rejected: it joins its threads at exit, so one handler that hangs keeps
    the process alive, and it cannot replace a thread that is lost to one.

    Args:
        threads: calls that run at once.
        max_abandoned: threads that may hang in overrun calls before further calls with a time limit are refused.
    """

    def __init__(self, threads: int = 8, max_abandoned: int = 32) -> None:
        if threads < 1:
            raise ConfigError("threads", threads, "give a number from 1")
        self._limit = threads
        self._max_abandoned = max_abandoned
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._untaken = 0  # jobs in the queue; its qsize() is ahead of _idle while a thread is between the two
        self.abandoned = 0
        """Threads that hang in a call nobody waits for any more."""

    async def run(self, call: Callable[..., T], *arguments: Any, timeout: float | None = None) -> T:
        """The call's result, from a thread of the pool, with the caller's context variables.

        Args:
            call: what to run.
            arguments: its arguments.
            timeout: seconds from now, queueing included. After it the call goes on unwatched: Python cannot stop
                a thread. Its result is thrown away and another thread takes its place.

        Raises:
            HandlerTimeoutError: it took longer.
            AbandonedError: ``max_abandoned`` threads hang already.
        """
        if timeout is not None and self.abandoned >= self._max_abandoned:
            raise AbandonedError(
                f"{self.abandoned} calls hang beyond their timeouts; no more are started until some return"
            )
        job = _Job(_bound(call, arguments), asyncio.get_running_loop())
        self._submit(job)
        try:
            async with asyncio.timeout(timeout):
                result: T = await job.outcome
        except TimeoutError:
            if not job.outcome.cancelled():
                raise  # the handler's own TimeoutError, in time
            self._abandon(job)
            raise HandlerTimeoutError(f"no result within {timeout:g} s") from None
        except asyncio.CancelledError:
            if job.outcome.cancelled():  # else it is the handler's own, and its thread is free
                self._abandon(job)
            raise
        return result

    def close(self) -> None:
        """Let idle threads end. Those that hang are daemons and end with the process."""
        with self._lock:
            waiting = self._threads
        for _ in range(waiting):
            self._jobs.put(None)

    def _submit(self, job: _Job) -> None:
        with self._lock:
            start = self._untaken >= self._idle and self._threads < self._limit
            self._untaken += 1
            if start:
                self._threads += 1
        self._jobs.put(job)
        if start:
            threading.Thread(target=self._work, name="rowmill-handler", daemon=True).start()

    def _abandon(self, job: _Job) -> None:
        with self._lock:
            if job.finished:
                return  # just in time for the thread, too late for the caller
            job.abandoned = True
            if not job.started:
                return  # no thread took it yet; none will
            self.abandoned += 1
            self._threads -= 1
            replace = self._untaken > self._idle
            if replace:
                self._threads += 1
        if replace:
            threading.Thread(target=self._work, name="rowmill-handler", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            job = self._jobs.get()
            with self._lock:
                self._idle -= 1
                skip = job is not None and job.abandoned
                if job is not None:
                    self._untaken -= 1
                    job.started = True
            if job is None or not (skip or self._run(job)):
                break

    def _run(self, job: _Job) -> bool:
        """Run one job; False when this thread was given up meanwhile and has to end."""
        result: Any = None
        error: BaseException | None = None
        try:
            result = job.call()
        except BaseException as caught:  # noqa: BLE001 - whatever it is belongs to the caller
            error = caught
        with self._lock:
            if job.abandoned:
                self.abandoned -= 1
                return False
            job.finished = True
        try:
            job.loop.call_soon_threadsafe(_settle, job.outcome, result, error)
        except RuntimeError:  # the loop is closed: nobody waits for the answer
            return False
        return True


def _bound(call: Callable[..., T], arguments: tuple[Any, ...]) -> Callable[[], T]:
    context = contextvars.copy_context()
    return lambda: context.run(call, *arguments)


def _settle(outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if outcome.done():
        return
    if isinstance(error, StopIteration):  # a future refuses to carry it
        error = RuntimeError("the handler raised StopIteration")
    if error is None:
        outcome.set_result(result)
    else:
        outcome.set_exception(error)
