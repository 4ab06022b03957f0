"""Asyncio from ordinary code: results, errors, running loops, Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest
from rowmill.streams.deadlines import deadline
from rowmill.streams.errors import BrokerTimeoutError
from rowmill.streams.loops import LoopThread, run_blocking, run_here

pytestmark = pytest.mark.timeout(20)


async def give(value: Any) -> Any:
    """A value, later."""
    await asyncio.sleep(0)
    return value


def test_results_and_errors() -> None:
    """The result comes back, and an error as it is."""
    assert run_blocking(lambda: give(7)) == 7

    async def fail() -> None:
        raise LookupError("as it is")

    with pytest.raises(LookupError, match="as it is"):
        run_blocking(fail)


async def test_inside_of_a_running_loop() -> None:
    """It works where a loop runs already: it has one of its own on another thread."""

    async def where() -> int:
        return threading.get_ident()

    assert run_blocking(where) != threading.get_ident()


def test_what_is_left_is_cancelled() -> None:
    """Tasks that still run when the block ends are cancelled and have time to clean up; the thread ends."""
    cleaned = []

    async def linger() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    async def begin() -> None:
        asyncio.create_task(linger()).set_name("lingering")
        await asyncio.sleep(0)

    with LoopThread("test-loop") as loop:
        loop.submit(begin).result(5)
    assert cleaned == [True]
    assert "test-loop" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("orderly", [True, False])
def test_interrupted(monkeypatch: pytest.MonkeyPatch, orderly: bool) -> None:
    """Ctrl-C asks for an orderly end where there is one, and cancels where not; it is passed on in either case."""
    ends: list[str] = []
    stop = asyncio.Event()

    async def work() -> None:
        try:
            await stop.wait()
            ends.append("orderly")
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    class Interrupted:
        """A future whose first wait is interrupted."""

        def __init__(self, future: Any) -> None:
            self._future, self._first = future, True

        def result(self) -> Any:
            if self._first:
                self._first = False
                raise KeyboardInterrupt
            return self._future.result(10)

        def done(self) -> bool:
            return bool(self._future.done())

        def cancel(self) -> bool:
            return bool(self._future.cancel())

    submit = LoopThread.submit
    monkeypatch.setattr(LoopThread, "submit", lambda self, work: Interrupted(submit(self, work)))
    with pytest.raises(KeyboardInterrupt):
        run_blocking(work, stop.set if orderly else None)
    assert ends == (["orderly"] if orderly else ["cancelled"] if ends else [])


def test_threads_that_hang_are_not_waited_for() -> None:
    """Run here, work ends although a call that it has put on another thread does not."""
    begun, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait(15)
        ended.set()

    async def work() -> int:
        hanging = asyncio.create_task(asyncio.to_thread(hang))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        assert not hanging.done()
        return 7

    try:
        assert run_here(work()) == 7
        assert not ended.is_set()
    finally:
        gate.set()
    assert ended.wait(10)


async def test_deadlines() -> None:
    """A block beyond its time ends with what it was doing; its own TimeoutError and quick blocks pass."""
    with pytest.raises(BrokerTimeoutError, match=r"look up: no answer within 0\.01 s"):
        async with deadline(0.01, "look up"):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError, match="own") as caught:
        async with deadline(5, "look up"):
            raise TimeoutError("own")
    assert not isinstance(caught.value, BrokerTimeoutError)
    with contextlib.suppress(LookupError):
        async with deadline(5, "look up"):
            raise LookupError
