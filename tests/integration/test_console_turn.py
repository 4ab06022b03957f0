"""Two consoles on one broker: one of them is refused in words, and the other one goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession
from rowmill.state.clock import SystemClock
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.events import events_topic
from support.live_console import live_console

pytestmark = pytest.mark.timeout(180)

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
REFUSED = re.compile(
    r"rowmill: error: --broker: got '(local|kafka)://[^']+'; another console runs on it.*stop it first\n"
)


class Process:
    """``rowmill console`` in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said += line.decode()

    async def end(self) -> int:
        """Its exit code, once it has ended and all that it said is read."""
        code = await self.process.wait()
        await self._reading
        return code

    async def history(self) -> str:
        """The state of its history as its API tells it; nothing while there is no answer."""
        address = re.search(r"http://127\.0\.0\.1:\d+/", self.said)
        if address is None:
            return ""
        try:
            async with ClientSession() as session, session.get(f"{address[0]}api/v1/overview") as answer:
                return str((await answer.json())["history"]["state"])
        except ClientError:
            return ""


@asynccontextmanager
async def a_console(url: str, folder: Path) -> AsyncIterator[Process]:
    """A process that is ended with the block, if it has not ended by itself."""
    process = await asyncio.create_subprocess_exec(
        ROWMILL, "console", "--broker", url, "--port", "0",
        cwd=folder, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    console = Process(process)
    try:
        yield console
    finally:
        if process.returncode is None:
            process.terminate()
            async with asyncio.timeout(20):
                await console.end()
        assert "Traceback" not in console.said


async def until(is_so: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for something that is asked for."""
    async with asyncio.timeout(seconds):
        while not await is_so():
            await asyncio.sleep(0.1)


@asynccontextmanager
async def started(url: str) -> AsyncIterator[Broker]:
    """The broker."""
    broker = open_broker(url)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


async def tell(broker: Broker, group: str, rows: int, started_ms: int) -> None:
    """What a worker tells after so many rows."""
    clock, producer = SystemClock(), broker.producer()
    await broker.create_topics([events_topic(broker)])
    await producer.start()
    try:
        event = EventRecord(
            kind="progress", at_ms=clock.now_ms(), pipeline=group.removeprefix("rowmill."), session="live",
            group=group, worker="w", data={"started_ms": started_ms, "totals": {"rows": rows}, "state": "running"},
        )  # fmt: skip
        tp = TopicPartition(EVENTS_TOPIC, 0)
        await (await producer.send(tp, [Outgoing(group.encode(), event.encode(), clock.now_ms())]))
    finally:
        await producer.close()


async def test_one_after_the_other(
    broker_url: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second one ends with setting, value and remedy; page and history of the first one go on meanwhile."""
    group, rows, started_ms = f"rowmill.{name}", 0, SystemClock().now_ms()
    async with started(broker_url) as broker, live_console(broker_url, tmp_path) as first, ClientSession() as visitor:

        def shown() -> int:
            return sum(point.rows for point in first.board.points(group, "1h", 0, 2**53))

        async with a_console(broker_url, tmp_path) as second, asyncio.timeout(60):
            ending = asyncio.create_task(second.end())
            while not ending.done():
                rows += 1
                await tell(broker, group, rows, started_ms)
                async with visitor.get(f"{first.url}api/v1/overview") as answer:
                    assert (await answer.json())["history"]["state"] == "live"
                await asyncio.sleep(0.5)
            assert await ending == 2
            assert REFUSED.search(second.said), second.said
        async with asyncio.timeout(15):
            while shown() != rows:
                await asyncio.sleep(0.05)
        assert first.board.standing.state == "live"
    assert "stands still" not in caplog.text


@pytest.mark.parametrize("delay", [0.0, 1.0])
async def test_at_the_same_moment(broker_url: str, tmp_path: Path, delay: float) -> None:
    """Of three that start at once, or soon after each other, exactly one is left, and works."""
    async with AsyncExitStack() as stack:
        consoles = []
        for _ in range(3):
            consoles.append(await stack.enter_async_context(a_console(broker_url, tmp_path)))
            await asyncio.sleep(delay)

        async def are_refused() -> bool:
            return sum(console.process.returncode is not None for console in consoles) == 2

        await until(are_refused, 90)
        (left,) = [console for console in consoles if console.process.returncode is None]
        for console in consoles:
            if console is not left:
                assert await console.end() == 2, console.said
                assert REFUSED.search(console.said), console.said
        await until(lambda: _is(left, "live"))
        assert "stands still" not in left.said


async def _is(console: Process, state: str) -> bool:
    assert console.process.returncode is None, console.said
    return await console.history() == state
