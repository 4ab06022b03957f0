"""The console's pages with made-up figures behind them, and the real guard in front: no broker, no Faust."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from rowmill.state.clock import SystemClock
from rowmill.streams.console.guard import Guard
from rowmill.streams.console.pages import add_pages

from support.console_samples import NOW_MS, SampleData, moved, plan, series

OUTCOME = {
    "running": False, "dry_run": True, "matched": 412, "count": 392, "done": 0, "refusals": 20,
    "by_type": [{"stage": "score-with-model", "type": "HTTPError", "count": 303},
                {"stage": "score-with-model", "type": "TimeoutError", "count": 89}],
    "targets": {"orders": 392}, "refused": [{"reason": "the value was cut", "count": 20, "ids": []}],
}  # fmt: skip


class SampleConsole:
    """What ``add_pages`` asks for, and an API of a few answers.

    Args:
        by_ms: how much later than the samples' time it is.
        read_only: as the console's.
        token: as the console's.
    """

    def __init__(self, by_ms: int = 0, *, read_only: bool = False, token: str | None = None) -> None:
        self.data = SampleData(by_ms)
        self.read_only = read_only
        self.shown_broker = "kafka://kafka-1:9092"
        self.guard = Guard(host="127.0.0.1", token=token, read_only=read_only, clock=SystemClock())
        self.guard.port = 1
        self.posted: list[tuple[str, Any]] = []
        self.changes = asyncio.Event()

    def application(self) -> web.Application:
        """All of it."""
        app = web.Application()
        self.guard.attach(app)
        group = "/api/v1/sessions/{group}"
        app.router.add_get("/api/v1/live", self._live)
        app.router.add_get(f"{group}/series", self._answer(lambda: moved(series(), self.data.by_ms)))
        app.router.add_post(f"{group}/replay/plan", self._answer(lambda: moved(plan(), self.data.by_ms)))
        app.router.add_post(f"{group}/dead-letters/{{action}}", self._answer(lambda: OUTCOME))
        app.router.add_post(f"{group}/{{action}}", self._answer(lambda: {"session": "enrich"}))
        add_pages(app, self)
        return app

    def _answer(self, make: Callable[[], Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            if request.method == "POST":
                self.posted.append((request.path, await request.json()))
            return web.json_response(make())

        return answer

    async def _live(self, request: web.Request) -> web.StreamResponse:
        """Something changes four times in a second."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(
                    b'event: overview\ndata: {}\n\nevent: session\ndata: {"group": "rowmill.enrich"}\n\n'
                )
                await asyncio.sleep(0.25)
        except (ConnectionError, asyncio.CancelledError):
            return response


def by_now() -> int:
    """How much later than the samples' time it is."""
    return SystemClock().now_ms() - NOW_MS
