"""The pool for blocking calls: results, limits, hanging threads, the end."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from rowmill.handlers.errors import AbandonedError, HandlerTimeoutError, NotStartedError
from rowmill.handlers.executors import BlockingPool
from rowmill.state.errors import ConfigError

pytestmark = pytest.mark.timeout(20)

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="none")


@pytest.fixture
async def release() -> AsyncIterator[threading.Event]:
    """Ends every call that hangs, at the end of the test at the latest."""
    event = threading.Event()
    yield event
    event.set()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other threads do."""
    while not condition():
        await asyncio.sleep(0.001)


def raiser(error: BaseException) -> Callable[[], Any]:
    """A function that raises."""

    def call() -> Any:
        raise error

    return call


async def test_results_and_arguments() -> None:
    """A call's result comes back, from another thread, which further calls use again."""
    pool = BlockingPool(1)
    assert await pool.run(divmod, 7, 2) == (3, 1)
    threads = {await pool.run(threading.get_ident) for _ in range(10)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    pool.close()


@pytest.mark.parametrize(
    "error", [ValueError("x"), SystemExit(2), TimeoutError("own"), asyncio.CancelledError("own"), GeneratorExit()]
)
async def test_exceptions(error: BaseException) -> None:
    """Whatever the call raises is the caller's, and costs the pool nothing."""
    pool = BlockingPool(1)
    for timeout in (None, 5.0):
        with pytest.raises(type(error)) as caught:
            await pool.run(raiser(error), timeout=timeout)
        assert str(caught.value) == str(error)
    assert pool.abandoned == 0
    assert await pool.run(int, "7") == 7
    pool.close()


async def test_stop_iteration() -> None:
    """StopIteration, which a future refuses to carry, comes as an error that names it."""
    pool = BlockingPool(1)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await pool.run(raiser(StopIteration()))
    pool.close()


async def test_context_variables() -> None:
    """A call sees the context variables of who asked for it."""
    pool = BlockingPool(1)

    async def ask(name: str) -> str:
        VARIABLE.set(name)
        return await pool.run(VARIABLE.get)

    assert list(await asyncio.gather(ask("a"), ask("b"), pool.run(VARIABLE.get))) == ["a", "b", "none"]
    pool.close()


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads(threads: int) -> None:
    """A pool without threads is a mistake."""
    with pytest.raises(ConfigError, match="threads"):
        BlockingPool(threads)


async def test_never_more_than_its_threads(release: threading.Event) -> None:
    """As many calls run at once as there are threads, and the others wait their turn."""
    pool = BlockingPool(3)
    running: set[int] = set()

    def hold(number: int) -> int:
        running.add(number)
        release.wait()
        return number

    tasks = [asyncio.create_task(pool.run(hold, number)) for number in range(5)]
    await until(lambda: len(running) == 3)
    assert (running, pool._threads, pool._untaken) == ({0, 1, 2}, 3, 2)
    release.set()
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]
    pool.close()


async def test_a_call_does_not_queue_behind_another_while_there_is_room(release: threading.Event) -> None:
    """Two calls at once on a pool with one idle thread get a thread each: the second does not wait for the first."""
    pool = BlockingPool(2)
    await pool.run(int)
    await until(lambda: pool._idle == 1)
    first = asyncio.create_task(pool.run(release.wait))
    second = asyncio.create_task(pool.run(release.set))
    await asyncio.gather(first, second)
    pool.close()


async def test_time_limits(release: threading.Event) -> None:
    """A call that nobody took in time is never begun, and says so; queueing is no part of its own limit."""
    pool = BlockingPool(1, queue_seconds=0.03)
    blocked = asyncio.create_task(pool.run(release.wait))
    await asyncio.sleep(0)
    begun: list[int] = []
    with pytest.raises(NotStartedError, match=r"no thread was free for 0\.03 s"):
        await pool.run(begun.append, 1, timeout=0.01)
    assert pool.abandoned == 0  # it hangs in no thread
    release.set()
    assert await blocked
    assert await pool.run(int, "7") == 7
    assert begun == []
    pool.close()


async def test_hanging_threads_are_replaced_and_bounded(release: threading.Event) -> None:
    """Each call that hangs has its thread replaced, up to a number; then limits are refused until one returns."""
    pool = BlockingPool(1, max_abandoned=2)
    for hanging in (1, 2):
        with pytest.raises(HandlerTimeoutError):
            await pool.run(release.wait, timeout=0.02)
        assert pool.abandoned == hanging
        assert await pool.run(int, "7") == 7
    with pytest.raises(AbandonedError, match="2 calls hang"):
        await pool.run(int, "7", timeout=1)
    release.set()
    await until(lambda: pool.abandoned == 0)
    assert await pool.run(int, "7", timeout=5) == 7
    pool.close()


async def test_a_waiting_call_gets_the_thread_of_one_that_hangs(release: threading.Event) -> None:
    """A call that queues behind one that is given up runs at once on the thread that takes its place."""
    pool = BlockingPool(1)
    hanging = asyncio.create_task(pool.run(release.wait, timeout=0.05))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(pool.run(int, "7"))
    assert await waiting == 7
    with pytest.raises(HandlerTimeoutError):
        await hanging
    pool.close()


@pytest.mark.parametrize("timeout", [None, 5.0])
async def test_cancelled_callers(release: threading.Event, timeout: float | None) -> None:
    """Who stops waiting leaves the call running unwatched; the pool goes on and counts it until it ends."""
    pool = BlockingPool(1)
    started = threading.Event()

    def hold() -> None:
        started.set()
        release.wait()

    task = asyncio.create_task(pool.run(hold, timeout=timeout))
    await until(started.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.abandoned == 1
    assert await pool.run(int, "7") == 7
    release.set()
    await until(lambda: pool.abandoned == 0)
    pool.close()


async def test_many_calls_from_many_tasks() -> None:
    """A thousand calls at once all get their own answer."""
    pool = BlockingPool(4)
    assert await asyncio.gather(*(pool.run(lambda n=n: n * n) for n in range(1000))) == [n * n for n in range(1000)]
    pool.close()


def handler_threads() -> set[threading.Thread]:
    """The threads of all pools."""
    return {thread for thread in threading.enumerate() if thread.name == "rowmill-handler"}


async def test_close_ends_idle_threads() -> None:
    """After close() the threads end, and none of them keeps the process from exiting."""
    before = handler_threads()
    pool = BlockingPool(3)
    barrier = threading.Barrier(3)
    await asyncio.gather(*(pool.run(barrier.wait, 5) for _ in range(3)))
    ours = handler_threads() - before
    assert len(ours) == 3
    assert all(thread.daemon for thread in ours)
    pool.close()
    await until(lambda: not ours & handler_threads())


def test_a_pool_serves_one_loop_after_another() -> None:
    """A call that outlives its event loop does not take its thread from the next loop."""
    pool = BlockingPool(1)
    started, release = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        release.wait(10)

    async def leave_early() -> None:
        task = asyncio.create_task(pool.run(hold))
        await until(started.is_set)
        del task

    work: Callable[[], Awaitable[int]] = lambda: pool.run(int, "7")  # noqa: E731

    async def ask() -> int:
        async with asyncio.timeout(5):
            return await work()

    asyncio.run(leave_early())
    release.set()
    assert asyncio.run(ask()) == 7
    pool.close()
