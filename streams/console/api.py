"""The JSON API: one handler for each entry of ``routes.py``. What it answers, pages show as well (``data.py``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ...state.codec import loads
from ...state.errors import ConfigError
from ...state.execution import Wanted
from .actions import Actions, console_user
from .answers import RefusedRequestError, json_answer, not_found
from .data import Data, read_query
from .guard import CSRF_HEADER, Guard
from .live import Live
from .openapi import document
from .operations import Operations
from .replays import Replays
from .routes import ROUTES, Route

BODY_SECONDS = 10.0
"""How long a request's body may take to arrive."""

Handler = Callable[[web.Request, Route], Awaitable[web.StreamResponse]]


class Api:
    """Answers requests.

    Args:
        data: what can be asked.
        actions: what can be done to sessions.
        replays: moving them.
        operations: what is under way.
        live: streams.
        guard: for the token of a page.
    """

    def __init__(
        self, data: Data, actions: Actions, replays: Replays, operations: Operations, live: Live, guard: Guard
    ) -> None:
        self._data = data
        self._actions = actions
        self._replays = replays
        self._operations = operations
        self._streams = live
        self._guard = guard
        self._document = document(ROUTES)

    def attach(self, app: web.Application) -> None:
        """Serve it. Whatever the table has is served, and nothing else."""
        for route in ROUTES:
            app.router.add_route(
                route.method, route.prefix + _pattern(route), self._handler(route), name=f"api.{route.name}"
            )
            if route.is_harmless:
                self._guard.harmless.add(f"api.{route.name}")
            if route.is_open:
                self._guard.open_paths.add(route.prefix + route.path)

    def _handler(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        answer: Handler = getattr(self, f"_{route.name}")  # a name of the table that nobody answers fails at the start

        async def handle(request: web.Request) -> web.StreamResponse:
            for name, kind in route.path_fields.items():
                kind.read(name, request.match_info[name])
            for name in request.query:
                if len(request.query.getall(name)) > 1:
                    raise ConfigError(name[:200], ", ".join(request.query.getall(name))[:200], "give it once")
            if not route.is_stream:
                read_query(route.name, request.query)
            return await answer(request, route)

        return handle

    # --- the console itself ------------------------------------------------------------------------------------

    async def _health(self, _: web.Request, __: Route) -> web.Response:
        overview = self._data.health()
        return json_answer(overview, 200 if overview["status"] == "ok" else 503)

    async def _openapi(self, _: web.Request, __: Route) -> web.Response:
        return json_answer(self._document)

    async def _csrf(self, request: web.Request, _: Route) -> web.Response:
        return json_answer({"header": CSRF_HEADER, "token": self._guard.csrf_token(request)})

    # --- reading -----------------------------------------------------------------------------------------------

    async def _overview(self, _: web.Request, __: Route) -> web.Response:
        return json_answer(self._data.overview())

    async def _session(self, request: web.Request, _: Route) -> web.Response:
        group = request.match_info["group"]
        found = self._data.session(group)
        if found is None:
            raise not_found("session", group, "there is none of that name here; GET /api/v1/overview lists them")
        return json_answer(found)

    async def _series(self, request: web.Request, _: Route) -> web.Response:
        return json_answer(self._data.series(request.match_info["group"], request.query))

    async def _events(self, request: web.Request, _: Route) -> web.Response:
        return json_answer(self._data.events_of(request.match_info["group"], request.query))

    async def _alerts(self, _: web.Request, __: Route) -> web.Response:
        return json_answer(self._data.alerts())

    async def _dead_letters(self, request: web.Request, _: Route) -> web.Response:
        return json_answer(await self._data.dead_letters(request.match_info["group"], request.query))

    async def _dead_letter(self, request: web.Request, _: Route) -> web.Response:
        return json_answer(await self._data.dead_letter(request.match_info["group"], request.match_info["id"]))

    async def _topics(self, _: web.Request, __: Route) -> web.Response:
        return json_answer(await self._data.topics())

    async def _records(self, request: web.Request, _: Route) -> web.Response:
        return json_answer(await self._data.records(request.match_info["topic"], request.query))

    async def _tail(self, request: web.Request, _: Route) -> web.StreamResponse:
        asked = read_query("tail", request.query)
        return await self._streams.tail(request, request.match_info["topic"], asked.get("partition"))

    async def _live(self, request: web.Request, _: Route) -> web.StreamResponse:
        return await self._streams.changes(request, read_query("live", request.query).get("group"))

    async def _operation(self, request: web.Request, _: Route) -> web.Response:
        operation = self._operations.last(request.match_info["group"])
        return json_answer({"operation": None if operation is None else operation.to_dict()})

    async def _replay_range(self, request: web.Request, _: Route) -> web.Response:
        return json_answer(await self._data.replay_range(request.match_info["group"]))

    # --- changing ----------------------------------------------------------------------------------------------

    async def _pause(self, request: web.Request, route: Route) -> web.Response:
        return await self._steer(request, route, Wanted.PAUSE)

    async def _resume(self, request: web.Request, route: Route) -> web.Response:
        return await self._steer(request, route, Wanted.RUN)

    async def _cancel(self, request: web.Request, route: Route) -> web.Response:
        return await self._steer(request, route, Wanted.CANCEL)

    async def _steer(self, request: web.Request, route: Route, wanted: Wanted) -> web.Response:
        body = await _body(request, route)
        answer = await self._actions.steer(
            request.match_info["group"], wanted, reason=body.get("reason", ""), by=console_user(request.remote)
        )
        return json_answer(answer)

    async def _retry(self, request: web.Request, route: Route) -> web.Response:
        body = await _body(request, route)
        return _done(await self._actions.retry(request.match_info["group"], body, by=console_user(request.remote)))

    async def _purge(self, request: web.Request, route: Route) -> web.Response:
        body = await _body(request, route)
        return _done(await self._actions.purge(request.match_info["group"], body, by=console_user(request.remote)))

    async def _replay_plan(self, request: web.Request, route: Route) -> web.Response:
        body = await _body(request, route)
        return json_answer(await self._replays.plan(request.match_info["group"], body))

    async def _replay_execute(self, request: web.Request, route: Route) -> web.Response:
        body = await _body(request, route)
        group, by = request.match_info["group"], console_user(request.remote)
        return _done(await self._replays.execute(group, body["plan_id"], by=by))


def _done(result: dict[str, Any]) -> web.Response:
    """What was done; 202 where it goes on."""
    return json_answer(result, 202 if result["running"] else 200)


async def _body(request: web.Request, route: Route) -> dict[str, Any]:
    """A request's body, checked.

    Raises:
        RefusedRequestError: it did not arrive in time, or is too large.
        ConfigError: it is not what the route takes.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            text = await request.read()
    except TimeoutError:
        raise RefusedRequestError(408, "body", "slow", f"send it within {BODY_SECONDS:g} s") from None
    try:
        value = loads(text or b"{}")
    except ValueError:
        raise ConfigError("body", text[:100].decode("utf-8", "replace"), "send JSON") from None
    assert route.body is not None  # noqa: S101 - every POST of the table has one
    return route.body.read("body", value)


def _pattern(route: Route) -> str:
    """The path as aiohttp takes it; an id of a dead letter is told from ``retry`` by its form."""
    return route.path.replace("{id}", r"{id:[0-9]{1,9}-[0-9]{1,19}}")
