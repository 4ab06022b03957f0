"""The console put together: a broker, what events told, how sessions stand, and a web server for people and programs.

Its parts fail apart. The web server and the watch need nothing of Faust: with the history dead, pages show and steer,
and say that it stands still. A broker that is away is asked again and again. Only what nobody could repair by waiting
ends the console: a port that is taken, a token that is too short, another console on the same broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final, cast

from aiohttp import web

from ...state.clock import Clock, SystemClock
from ...state.errors import ConfigError
from ..brokers.open import broker_url, open_broker
from ..deadlines import deadline
from ..options import WorkerOptions, state_folder
from .actions import Actions
from .alerts import AlertRules, Alerts
from .api import Api
from .board import Board
from .data import Data
from .faust_app import ConsoleApp
from .guard import MOST_BODY_BYTES, Guard, Handler
from .letter_reads import LetterReads
from .live import Live
from .operations import Operations
from .replays import Replays
from .topic_reads import TopicReads
from .turn import GROUP, another_console
from .watch import Watch

log = logging.getLogger(__name__)

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8321
MOST_CONNECTIONS: Final = 256
_FIRST_REQUEST_SECONDS = 10.0
_KEEP_SECONDS = 30.0
_LINGER_SECONDS = 1.0
"""How long the rest of a request that was refused is waited for, so that its sender gets to read why."""
_GOODBYE_SECONDS = 2.0
_CLOSE_SECONDS = 5.0
_CALL_SECONDS = 10.0
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Console:
    """One console. Made anywhere, run on an event loop.

    Args:
        broker: its URL. Default: ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        host: the address to listen on; anything but this machine's own needs a token.
        port: 0 takes a free one.
        token: what people and programs have to know; None: nothing, as only this machine can reach it.
        read_only: whether everything that changes something is refused.
        hosts: further names under which it may be asked, such as that of a proxy in front of it.
        clock: default: the machine's.
        interval: seconds between two looks at the sessions.
        state_dir: where it may keep files, of which it has few; default: where workers keep theirs.
        alerts: a file of rules and what they do; default: the usual rules, which write to the log.

    Raises:
        ConfigError: the broker's URL, the address, the token or the file of alerts is wrong.
    """

    def __init__(
        self,
        broker: str | None = None,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        token: str | None = None,
        read_only: bool = False,
        hosts: Collection[str] = (),
        clock: Clock | None = None,
        interval: float = 1.0,
        state_dir: Path | str | None = None,
        alerts: Path | None = None,
    ) -> None:
        clock = clock or SystemClock()
        rules = AlertRules() if alerts is None else AlertRules.from_file(alerts)
        self.read_only = read_only
        self.url = ""
        self.guard = Guard(host=host, token=token, read_only=read_only, hosts=hosts, clock=clock)
        self.board = Board(clock)
        self._clock = clock
        self._host = host
        self._port = port
        self._broker_url = broker_url(broker)
        self._broker = open_broker(broker, clock=clock)
        self.watch = Watch(self._broker, self.board, clock=clock, read_only=read_only, interval=interval)
        self._operations = Operations(clock=clock)
        self._letters = LetterReads(self._broker, self.watch, clock=clock)
        self._topics = TopicReads(self._broker, self.watch, clock=clock)
        self._replays = Replays(self._broker, self.watch, self._operations, clock=clock)
        self._actions = Actions(self._broker, self.watch, self._letters, self._operations, clock=clock)
        self._live = Live(self.watch, self._broker, self._topics, clock=clock)
        self.data = Data(self.watch, self._letters, self._topics, self._replays, clock=clock)
        folder = state_folder(WorkerOptions(state_dir=None if state_dir is None else str(state_dir)), self._broker)
        self._alerts = Alerts(self.board, rules, clock)
        self._history = ConsoleApp(self._broker_url, self.board, clock, state_dir=folder, on_events=self._alerts.hear)
        self._server = Server()

    @property
    def shown_broker(self) -> str:
        """The broker's URL without secrets."""
        return self.watch.shown_broker

    def on(self, kind: str, function: Callable[..., object]) -> None:
        """Have a function called with each event of a kind, or with each alert (``alert``); see :meth:`Alerts.on`."""
        self._alerts.on(kind, function)

    def login_url(self) -> str:
        """The console's address; with a token, a link that logs in once, within ten minutes."""
        return f"{self.url}login?ticket={self.guard.ticket()}" if self.guard.needs_token else self.url

    async def run(self, stop: asyncio.Event, ready: Callable[[Console], object] = lambda _: None) -> None:
        """Serve until told to stop.

        Args:
            stop: ends it, in an orderly way and within some seconds.
            ready: called when it answers; ``url`` says where.

        Raises:
            ConfigError: the port is taken, or another console runs on this broker.
            BrokerUnreachableError: there is nothing to connect to.
        """
        listening = listen(self._host, self._port)
        try:
            await self._broker.start()
            try:
                await self._check_alone()
                await self._serve(listening, stop, ready)
            finally:
                await self._broker.close()
        finally:
            listening.close()

    async def _serve(self, listening: socket.socket, stop: asyncio.Event, ready: Callable[[Console], object]) -> None:
        self.guard.port = listening.getsockname()[1]
        self.url = f"http://{_shown_host(self._host)}:{self.guard.port}/"
        over = asyncio.Event()
        history = asyncio.create_task(self._history.run(over), name="history")
        alerts = asyncio.create_task(self._alerts.run(over), name="alerts")
        watch = asyncio.create_task(self.watch.run(), name="watch")
        try:
            await self._server.start(self._application(), listening)
            log.info("the console of %s is at %s", self.shown_broker, self.url)
            ready(self)
            await _until(stop, history)
        finally:
            over.set()
            self._live.close()
            await self._server.close()
            await self._operations.close()
            watch.cancel()
            _, late = await asyncio.wait({history, alerts, watch}, timeout=_CLOSE_SECONDS)
            for task in late:
                task.cancel()

    def _application(self) -> web.Application:
        """The guard in front, the API and the pages behind it."""
        from .pages import add_pages

        app = web.Application(client_max_size=MOST_BODY_BYTES)
        app.middlewares.append(self._server.middleware)
        self.guard.attach(app)
        Api(self.data, self._actions, self._replays, self._operations, self._live, self.guard).attach(app)
        add_pages(app, self)
        return app

    async def _check_alone(self) -> None:
        """See that no other console runs on this embedded broker. On Kafka the history does: one that was killed is in
        its group for some seconds, in which this one serves already.
        """
        if self._broker.folder is None:
            return
        async with deadline(_CALL_SECONDS, f"look up who is in group {GROUP}"):
            members = await self._broker.members(GROUP)
        if members:
            raise another_console(self._broker_url, members)


async def _until(stop: asyncio.Event, history: asyncio.Task[None]) -> None:
    """Wait for the end.

    Raises:
        ConfigError: another console runs on this broker, or the console's topics may not be made.
    """
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({stopped, history}, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            await history  # it ends by itself only with what nobody can repair by waiting
            await stopped
    finally:
        stopped.cancel()


# --- the web server --------------------------------------------------------------------------------------------


class Server:
    """aiohttp's server on a socket, with bounds of our own: on connections, and on those that say nothing."""

    def __init__(self) -> None:
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._silent: set[asyncio.BaseProtocol] = set()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note that the connection has asked something."""
        self._silent.discard(request.protocol)
        return await handler(request)

    async def start(self, app: web.Application, listening: socket.socket) -> None:
        """Begin to answer."""
        runner = self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_quiet_log(),
            keepalive_timeout=_KEEP_SECONDS,
            lingering_time=_LINGER_SECONDS,
            shutdown_timeout=_GOODBYE_SECONDS,
            handle_signals=False,
        )
        await runner.setup()
        self._listener = await asyncio.get_running_loop().create_server(self._accept, sock=listening)

    def _accept(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        server = self._runner.server if self._runner is not None else None
        if server is None or len(server.connections) >= MOST_CONNECTIONS:
            return _TurnedAway()
        connection = server()
        self._silent.add(connection)
        asyncio.get_running_loop().call_later(_FIRST_REQUEST_SECONDS, self._cut_silent, connection)
        return connection

    def _cut_silent(self, connection: web.RequestHandler) -> None:
        """End a connection that has not sent a whole request's head by now."""
        if connection in self._silent:
            self._silent.discard(connection)
            if connection.transport is not None:
                connection.transport.abort()

    async def close(self) -> None:
        """Stop listening, let answers that are under way end, and cut what is left."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        runner, self._runner = self._runner, None
        if runner is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await runner.cleanup()


class _TurnedAway(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say so and hang up."""
        writing = cast(asyncio.Transport, transport)
        writing.write(_BUSY)
        writing.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: there can be none at this address.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError("--port", port, "give a number from 0 (a free one) to 65,535")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, _, _, _, place = found[0]
        listening = socket.create_server(cast(Any, place[:2]), family=family, backlog=128)
    except socket.gaierror as error:
        raise ConfigError("--host", host, f"there is no such address: {error.strerror}") from error
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, str(error))
        raise ConfigError("--port", port, remedy) from error
    listening.setblocking(False)
    return listening


_REMEDIES = {
    errno.EADDRINUSE: "another process listens there, perhaps another console: give another port, or 0 for a free one",
    errno.EADDRNOTAVAIL: "this machine has no such address: give --host one of its own, or 127.0.0.1",
    errno.EACCES: "ports below 1024 are for privileged processes: give another port",
}


def _shown_host(host: str) -> str:
    """What a browser on this machine opens."""
    if host in {"0.0.0.0", "::", "[::]"}:  # noqa: S104 - only looked for
        return "127.0.0.1"
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def _quiet_log() -> logging.Logger:
    """What clients send that is no HTTP is their affair."""
    quiet = logging.getLogger(f"{__name__}.http")
    quiet.setLevel(logging.CRITICAL)
    return quiet
