"""Where handlers that block run: a bounded pool of threads that never holds up the event loop or the exit."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..state.errors import ConfigError
from .errors import AbandonedError, HandlerTimeoutError, NotStartedError

T = TypeVar("T")


class _Job:
    __slots__ = ("abandoned", "call", "finished", "loop", "outcome", "started", "started_at")

    def __init__(self, call: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.call = call
        self.loop = loop
        self.outcome: asyncio.Future[Any] = loop.create_future()
        self.started = False
        self.started_at = 0.0  # by the loop's clock, once it has
        self.finished = False
        self.abandoned = False


class BlockingPool:
    """Runs blocking calls on daemon threads, started when needed and kept.

    Python's own ThreadPoolExecutor was rejected: it joins its threads at exit, so one handler that hangs keeps
    the process alive, and it cannot replace a thread that is lost to one.

    Args:
        threads: calls that run at once.
        queue_seconds: how long a call with a time limit may wait for a thread.
        max_abandoned: threads that may hang in overrun calls before further calls with a time limit are refused.
    """

    def __init__(self, threads: int = 8, max_abandoned: int = 32, queue_seconds: float = 60.0) -> None:
        if threads < 1:
            raise ConfigError("threads", threads, "give a number from 1")
        self._limit = threads
        self._max_abandoned = max_abandoned
        self._queue_seconds = queue_seconds
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
            timeout: seconds from when a thread takes it. After them the call goes on unwatched: Python cannot stop a
                thread. Its result is thrown away and another thread takes its place.

        Raises:
            HandlerTimeoutError: it took longer.
            NotStartedError: with a timeout, no thread took it within ``queue_seconds``.
            AbandonedError: ``max_abandoned`` threads hang already.
        """
        if timeout is not None and self.abandoned >= self._max_abandoned:
            raise AbandonedError(
                f"{self.abandoned} calls hang beyond their timeouts; no more are started until some return"
            )
        job = _Job(_bound(call, arguments), asyncio.get_running_loop())
        self._submit(job)
        try:
            is_late = timeout is not None and await _is_late(job, timeout, self._queue_seconds)
            if not is_late:
                result: T = await job.outcome
                return result
        except asyncio.CancelledError:
            if not job.outcome.done() or job.outcome.cancelled():  # else it is the handler's own
                self._abandon(job)
            raise
        job.outcome.cancel()
        self._abandon(job)
        if job.started:
            raise HandlerTimeoutError(f"no result within {timeout:g} s")
        raise NotStartedError(f"no thread was free for {self._queue_seconds:g} s; other handlers hold all of them")

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
                    job.started_at = job.loop.time()
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


async def _is_late(job: _Job, timeout: float, queue_seconds: float) -> bool:
    """Wait for a job's end; True if it took longer than ``timeout`` since it began, or began too late."""
    give_up = job.loop.time() + queue_seconds
    while not job.outcome.done():
        until = job.started_at + timeout if job.started else give_up
        left = until - job.loop.time()
        if left <= 0:
            return True
        await asyncio.wait({job.outcome}, timeout=min(left, timeout))
    return False


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
