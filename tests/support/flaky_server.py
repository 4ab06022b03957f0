"""A local HTTP service that misbehaves on purpose and remembers every call: what really reached it, and when.

It runs on a thread and a loop of its own, so that its clock does not stand still when the client's loop does. Both
read the same machine's monotonic clock, and a client may tell in a header when its call began.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiohttp import web

BEGUN_HEADER = "X-Begun"
"""When the call began: the client's monotonic clock in seconds."""

NEVER = float("inf")


@dataclass(slots=True)
class Call:
    """One request, in seconds of the monotonic clock.

    Attributes:
        row: the row's number.
        number: 1 for the row's first call, and so on.
        begun: when the client says that it began.
        came: when the server had read it.
        answer: what it did: see :class:`FlakyServer`.
        answered: when the answer was handed to the network to its last byte; infinity: never.
        gone: when the connection ended without an answer; infinity: it did not.
    """

    row: int
    number: int
    begun: float
    came: float
    answer: str
    answered: float = NEVER
    gone: float = NEVER


Plan: TypeAlias = Callable[[int, int], str]
"""What a row's n-th call is answered with."""


def always_well(row: int, number: int) -> str:
    """No faults."""
    return "ok"


class FlakyServer:
    """Answers ``POST`` with ``{"n": row}`` by ``{"answer": row * 2}``, or as ``plan`` says.

    ``plan`` gives ``ok``; a status such as ``500`` or ``400``; ``429``, with a ``Retry-After`` of ``retry_after``
    seconds; ``hang`` (no answer), ``reset`` (the connection is torn down), or ``garbage`` (200, and no JSON).

    Args:
        plan: called on the server's thread.
        delay: seconds that every call takes.
        retry_after: whole seconds, as HTTP has them.
    """

    def __init__(self, plan: Plan = always_well, *, delay: float = 0.005, retry_after: int = 1) -> None:
        self.calls: list[Call] = []
        """Every call that came, in this order."""
        self.url = ""
        self._plan = plan
        self._delay = delay
        self._retry_after = retry_after
        self._numbers: Counter[int] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flaky-server", daemon=True)
        self._runner: web.AppRunner | None = None

    def __enter__(self) -> FlakyServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def per_row(self) -> Counter[int]:
        """Calls by row."""
        return Counter(call.row for call in self.calls)

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_post("/", self._take)
        # A client that hangs up cancels the call: that is how the server sees a time-out, or a kill.
        self._runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/"

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.StreamResponse:
        row = int((await request.json())["n"])
        self._numbers[row] += 1
        now, number = time.monotonic(), self._numbers[row]
        call = Call(row, number, float(request.headers.get(BEGUN_HEADER, now)), now, self._plan(row, number))
        self.calls.append(call)
        try:
            return await self._answer(request, call)
        except asyncio.CancelledError:
            call.gone = time.monotonic()
            raise

    async def _answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        await asyncio.sleep(3_600 if call.answer == "hang" else self._delay)
        if call.answer == "reset" and request.transport is not None:
            call.gone = time.monotonic()
            _reset(request.transport)
            return web.Response()  # nobody hears it
        response = self._response(call)
        await response.prepare(request)
        await response.write_eof()
        call.answered = time.monotonic()
        return response

    def _response(self, call: Call) -> web.Response:
        if call.answer == "ok":
            return web.json_response({"answer": call.row * 2})
        if call.answer == "garbage":
            return web.Response(body=b"<html>\xff\x00", content_type="text/html")
        headers = {"Retry-After": str(self._retry_after)} if call.answer == "429" else None
        return web.Response(status=int(call.answer), headers=headers)


def _reset(transport: asyncio.Transport) -> None:
    """Close so that the peer gets a TCP reset instead of an orderly end."""
    connection: Any = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def most_within(times: Iterable[float], seconds: float = 1.0) -> int:
    """The most of these moments that lie within any span of so many seconds."""
    ordered = sorted(times)
    most = first = 0
    for last, moment in enumerate(ordered):
        while ordered[first] <= moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most
