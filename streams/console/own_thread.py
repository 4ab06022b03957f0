"""An event loop in a thread of its own, for what may block, hang or leave tasks behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine
from typing import Any, Protocol

_log = logging.getLogger(__name__)


class Life(Protocol):
    """What can be run so. Both are called on its own loop."""

    async def live(self) -> None:
        """Until it ends."""

    def ask_to_stop(self) -> None:
        """Make it end soon."""


async def in_thread(life: Life, stop: asyncio.Event, patience: float) -> None:
    """Run something on an event loop in a thread of its own, until it ends or for a while after ``stop``.

    Args:
        life: what is run.
        stop: when it is to be asked to end.
        patience: seconds that it then has; after that it is left behind, with its thread.

    Raises:
        Exception: what it raised.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    inner: list[asyncio.AbstractEventLoop] = []
    ready = threading.Event()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    async def main() -> None:
        inner.append(asyncio.get_running_loop())
        ready.set()
        await life.live()

    def work() -> None:
        error: BaseException | None = None
        try:
            _run(main())
        except BaseException as caught:  # noqa: BLE001 - raised on the other side
            error = caught
        finally:
            ready.set()
        with contextlib.suppress(RuntimeError):  # the program has ended meanwhile
            loop.call_soon_threadsafe(settle, error)

    thread = threading.Thread(target=work, name="rowmill-console-faust", daemon=True)
    thread.start()
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((done, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not done.done():
            _ask_to_stop(life, inner)
            await asyncio.wait({done}, timeout=patience)
    if not done.done():
        _log.warning("the console's Faust app hangs and is left behind")
        done.cancel()
        return
    thread.join(1)
    done.result()


def _ask_to_stop(life: Life, inner: list[asyncio.AbstractEventLoop]) -> None:
    for loop in inner:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(life.ask_to_stop)


def _run(main: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run, but what does not end when it is cancelled is left behind after a second."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(_log_quietly)
    try:
        loop.run_until_complete(main)
    finally:
        close_loop(loop)


def close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop that runs no more, and what is left on it: tasks that do not end within a second are left behind."""
    try:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=1.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(_hang_up(loop))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _hang_up(loop: asyncio.AbstractEventLoop) -> None:
    """Close connections that were left behind: Faust stops a client that is just connecting without them (ran).

    Python has no public list of a loop's transports; without it they would stay open until they are collected.
    """
    left = list(getattr(loop, "_transports", {}).values())
    readers = [getattr(transport.get_protocol(), "_stream_reader", None) for transport in left]
    for transport in left:
        transport.abort()
    for _ in range(3):  # abort, connection_lost, and what waits for that
        await asyncio.sleep(0)
    # What came after a reader was cancelled: aiokafka takes a stream with something unread in it for an open one.
    for reader in readers:
        if isinstance(reader, asyncio.StreamReader):
            with contextlib.suppress(Exception):  # whatever the connection ended of
                await reader.read()


def _log_quietly(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    del loop
    _log.debug("in the console's Faust app: %s", context.get("message"), exc_info=context.get("exception"))
