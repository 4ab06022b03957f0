"""An event loop whose time is virtual, and processes on it that can be stopped and killed as the system would.

Nothing waits: when no callback is ready, time jumps to the next timer; a turn takes a microsecond. A run depends on
nothing but its seed: there is one thread, no wall clock, timers that are due together run in the order they were set,
and tasks are hashed by their number, so that a set of them is gone through in the same order every time.

Several processes share the loop. Each callback belongs to the process in whose context it was scheduled, so a process
that is frozen (SIGSTOP) or killed (SIGKILL) simply gets no callback any more: no ``finally`` runs, no cancellation
arrives, and when it is thawed all its timers are found overdue at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


_TURN_SECONDS = 1e-6
"""What a turn of the loop takes: a wait that rounding left a hair short ends with the next one, as it really does."""


class StuckError(AssertionError):
    """Nothing can happen any more, or what happens leads nowhere."""


class Process:
    """What one worker's code runs in. Its callbacks are held back while it is frozen, and for ever once it is dead."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_frozen = False
        self.is_dead = False
        self.held: deque[asyncio.Handle] = deque()

    def freeze(self) -> None:
        """Stop it as SIGSTOP does."""
        self.is_frozen = True

    def kill(self) -> None:
        """Stop it for good as SIGKILL does."""
        self.is_dead = True


class SimTask(asyncio.Task[T]):
    """A task with a number to be hashed by, instead of its address."""

    def __init__(self, number: int, work: Coroutine[Any, Any, T], **options: Any) -> None:
        self._number = number
        super().__init__(work, **options)

    def __hash__(self) -> int:
        return self._number


class SimLoop(asyncio.BaseEventLoop):
    """Runs callbacks in virtual time.

    Args:
        max_seconds: virtual time after which a run counts as stuck.
        max_steps: callbacks after which it does.
    """

    def __init__(self, *, max_seconds: float = 100_000.0, max_steps: int = 5_000_000) -> None:
        super().__init__()
        self.steps = 0
        self.halted: Exception | None = None
        """Set this to end the run with it."""
        self._now = 0.0
        self._max_seconds = max_seconds
        self._max_steps = max_steps
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._set = 0
        self._made = 0
        # A task that waits for an answer which never comes is known to nobody else: it would be collected, at a time
        # that depends on everything.
        self._tasks: list[SimTask[Any]] = []
        self.nobody = contextvars.Context()
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def call_at(  # type: ignore[override] # typeshed's TypeVarTuple says no more
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """A timer; of those due together, the one set first runs first."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._set += 1
        heapq.heappush(self._timers, (when, self._set, handle))
        return handle

    def outside(self, delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Call later, in no process: what the network and the brokers do."""
        return self.call_at(self._now + delay, callback, *args, context=self.nobody)

    def spawn(self, process: Process, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin a process's work."""
        context = contextvars.Context()
        context.run(PROCESS.set, process)
        return self.create_task(work, context=context)

    def thaw(self, process: Process) -> None:
        """Let a frozen process go on: what it missed comes at once."""
        process.is_frozen = False
        self._ready.extend(process.held)  # type: ignore[attr-defined]
        process.held.clear()

    def dispose(self, processes: Iterable[Process]) -> None:
        """End every task, those of dead processes too, so that nothing is left for the garbage collector to finish."""
        self.halted = None
        self._max_seconds, self._max_steps = float("inf"), self.steps + 1_000_000
        for process in processes:
            process.is_dead = False
            self.thaw(process)
        with contextlib.suppress(RuntimeError):  # a stop that is still asked for, of the run that failed
            self.run_until_complete(asyncio.sleep(0))
        for _ in range(20):
            tasks = [task for task in self._tasks if not task.done()]
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks, timeout=100.0))
        self.close()

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> SimTask[Any]:
        self._made += 1
        task: SimTask[Any] = SimTask(self._made, work, loop=loop, **options)
        if self._made % 1000 == 0:
            self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(task)
        return task

    def _run_once(self) -> None:
        """Run what is ready; with nothing ready, go to the next timer."""
        ready: deque[asyncio.Handle] = self._ready  # type: ignore[attr-defined]
        timers = self._timers
        if self.halted is not None:
            raise self.halted
        self._now += _TURN_SECONDS
        if not ready:
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers:
                raise StuckError("deadlock: nothing is ready, and no timer is set")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        if self._now > self._max_seconds or self.steps > self._max_steps:
            raise StuckError(f"livelock: {self._now:,.0f} virtual seconds, {self.steps:,} steps")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process: Process | None = handle._context.get(PROCESS)  # type: ignore[attr-defined]
            if process is not None and (process.is_frozen or process.is_dead):
                process.held.append(handle)
                continue
            self.steps += 1
            handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are skipped when their time comes."""

    def _write_to_self(self) -> None:
        """No other thread ever wakes this loop."""

    def _process_events(self, event_list: Any) -> None:
        """There are none."""
