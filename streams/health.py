"""``/live``, ``/ready`` and ``/metrics`` of one worker, over HTTP. The one file that knows aiohttp.

* *Live* means that the event loop turns: this endpoint is a task of it like any other, so a loop that hangs does not
  answer. It says nothing of the broker or of slow handlers, because a restart cures neither: a worker that cannot go
  on ends by itself (``stall_timeout``), and its supervisor starts the next.
* *Ready* means that the worker has joined its group and opened every partition that it owns. A paused worker is ready:
  it does what is wanted of it, and a rollout must not wait for somebody to resume the session.

It must not harm the worker whatever its clients do. They are few, and each gets one answer: a connection serves one
request, lives for a few seconds, and beyond a number of them a further one is turned away. A page of metrics is made on
a thread, and again only after half a second.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..state.clock import Clock
from ..state.codec import dumps
from ..state.errors import ConfigError
from .metrics import CONTENT_TYPE, MetricsPage, Observed
from .snapshots import WorkerSnapshot

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

SETTING = "http address"
_FORMS = "write PORT, HOST:PORT or [IPV6]:PORT; port 0 takes a free one"
_LOOPBACK = "127.0.0.1"
_HOST = re.compile(r"[a-zA-Z0-9._-]{1,253}")

_MOST_CONNECTIONS = 64
_CONNECTION_SECONDS = 10.0
"""How long a connection may take to ask and to read its answer."""
_FRESH_SECONDS = 0.5
_CLOSE_SECONDS = 1.0
_GOODBYE_SECONDS = 0.1
_MOST_NAMED = 10

_INDEX = b"""\
<!doctype html><meta charset="utf-8"><title>rowmill worker</title>
<h1>rowmill worker</h1>
<ul>
<li><a href="/live">/live</a>: 200 while the process can work
<li><a href="/ready">/ready</a>: 200 once it has joined its group and opened its partitions
<li><a href="/metrics">/metrics</a>: for Prometheus
</ul>
"""
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
}


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can get there."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``8080`` (on 127.0.0.1), ``0.0.0.0:8080``, ``[::]:8080``.

    Raises:
        ConfigError: it is none of them.
    """
    host, colon, port = str(text).strip().rpartition(":")
    if not colon:
        host = _LOOPBACK
    elif not _HOST.fullmatch(host) and not _is_bracketed(host):
        raise ConfigError(SETTING, text, _FORMS)
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65_535:
        raise ConfigError(SETTING, text, _FORMS)
    return Address(_LOOPBACK if host == "localhost" else host.strip("[]"), int(port))


def _is_bracketed(host: str) -> bool:
    """Whether it is an address like ``[::1]``."""
    if not (host.startswith("[") and host.endswith("]")):
        return False
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True


class HealthServer:
    """Serves one worker's health. Made, started and closed on the worker's event loop.

    Args:
        worker: whose.
        address: where to listen: ``8080`` (on 127.0.0.1), ``0.0.0.0:8080``, ``[::]:8080``; port 0 takes a free one.
        clock: tells how fresh a page is.

    Raises:
        ConfigError: the address is none.
    """

    def __init__(self, worker: Observed, address: str, *, clock: Clock) -> None:
        self._worker = worker
        self._address = parse_address(address)
        self._clock = clock
        self._pages: dict[str, Callable[[], Awaitable[web.Response]]] = {
            "/": self._index,
            "/live": self._live,
            "/ready": self._ready,
            "/metrics": self._metrics,
        }
        self._metrics_page: MetricsPage | None = None
        self._page: asyncio.Future[bytes] | None = None
        # One of its own: the loop's may all be taken by handlers that block.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rowmill-metrics")
        self._page_at = 0.0
        self._http: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._complained = False

    async def start(self) -> str:
        """Begin to listen, and return the URL.

        Raises:
            ConfigError: the port is taken, or the address is not this machine's.
        """
        from aiohttp import web

        loop = asyncio.get_running_loop()
        listening = await _listen(self._address)
        try:
            self._metrics_page = MetricsPage(self._worker)
            self._http = web.Server(self._answer, access_log=None, logger=_quiet_log(), lingering_time=0)
            self._listener = await loop.create_server(self._accept, sock=listening)
        except BaseException:
            listening.close()
            raise
        self._address = Address(self._address.host, listening.getsockname()[1])
        url = f"http://{self._address}"
        log.info("health and metrics on %s", url)
        return url

    async def close(self) -> None:
        """Stop listening, and cut the connections that are left."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        http, self._http = self._http, None
        if http is not None:
            for connection in http.connections:
                _cut(connection)
            await asyncio.sleep(0)  # for them to hear of it
            await http.shutdown(_GOODBYE_SECONDS)
        page, self._page = self._page, None
        if page is not None and not page.done():
            await asyncio.wait({page}, timeout=_CLOSE_SECONDS)
        self._thread.shutdown(wait=False)

    # --- connections -------------------------------------------------------------------------------------------

    def _accept(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        http = self._http
        if http is None or len(http.connections) >= _MOST_CONNECTIONS:
            return _TurnedAway()
        connection = http()
        asyncio.get_running_loop().call_later(_CONNECTION_SECONDS, _cut, connection)
        return connection

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        """Any request. Whatever goes wrong in here is an answer too."""
        try:
            response = await self._page_for(request)
        except Exception:
            if not self._complained:  # a scraper comes back every few seconds
                self._complained = True
                log.exception("%s failed; its next failures are not logged", request.path)
            response = _json(500, {"status": "error", "reasons": ["see the worker's log"]})
        response.headers.update(_HEADERS)
        response.force_close()
        return response

    async def _page_for(self, request: web.BaseRequest) -> web.Response:
        if request.method not in {"GET", "HEAD"}:
            response = _json(405, {"status": "error", "reasons": ["GET only"]})
            response.headers["Allow"] = "GET, HEAD"
            return response
        if self._address.is_loopback and not _is_local_name(request.host):
            # A web page that resolves its own name to 127.0.0.1 could read what is meant for this machine.
            return _json(403, {"status": "error", "reasons": ["this address serves localhost only"]})
        page = self._pages.get(request.path)
        if page is None:
            return _json(404, {"status": "error", "reasons": [f"there are {', '.join(self._pages)}"]})
        return await page()

    # --- pages -------------------------------------------------------------------------------------------------

    async def _index(self) -> web.Response:
        return _response(200, _INDEX, "text/html; charset=utf-8")

    async def _live(self) -> web.Response:
        snapshot = self._worker.snapshot()
        return _verdict("live", why_not_live(snapshot), snapshot)

    async def _ready(self) -> web.Response:
        snapshot = self._worker.snapshot()
        return _verdict("ready", why_not_ready(snapshot), snapshot)

    async def _metrics(self) -> web.Response:
        """The page; those who ask at about the same time get the same one."""
        now = self._clock.monotonic()
        is_stale = self._page is None or (self._page.done() and now - self._page_at >= _FRESH_SECONDS)
        if is_stale or self._page is None:
            assert self._metrics_page is not None  # noqa: S101 - made before anybody can connect
            loop, snapshot = asyncio.get_running_loop(), self._worker.snapshot()
            self._page, self._page_at = loop.run_in_executor(self._thread, self._metrics_page.text, snapshot), now
        return _response(200, await asyncio.shield(self._page), CONTENT_TYPE)


# --- verdicts --------------------------------------------------------------------------------------------------


def why_not_live(snapshot: WorkerSnapshot) -> list[str]:
    """What a restart would cure; nothing for a worker that can work."""
    return ["the worker has ended"] if snapshot.state == "stopped" else []


def why_not_ready(snapshot: WorkerSnapshot) -> list[str]:
    """What the worker waits for before it can do its part, or why it does it no more; nothing if it can."""
    if snapshot.state == "starting":
        return ["it has not joined its group yet"]
    if snapshot.state in {"stopping", "stopped"}:
        return [f"it is {snapshot.state}"]
    opening = [str(each.tp) for each in snapshot.partitions if each.state == "opening"]
    if not opening:
        return []
    names = ", ".join(opening[:_MOST_NAMED]) + (", …" if len(opening) > _MOST_NAMED else "")
    return [f"{len(opening)} of {len(snapshot.partitions)} partitions are being opened: {names}"]


def _verdict(word: str, reasons: list[str], snapshot: WorkerSnapshot) -> web.Response:
    about = {"status": f"not {word}" if reasons else word, "state": snapshot.state, "reasons": reasons}
    return _json(503 if reasons else 200, {**about, "partitions": len(snapshot.partitions)})


def _json(status: int, body: dict[str, Any]) -> web.Response:
    return _response(status, dumps(body) + b"\n", "application/json")


def _response(status: int, body: bytes, content_type: str) -> web.Response:
    from aiohttp import web

    return web.Response(status=status, body=body, headers={"Content-Type": content_type})


# --- sockets ---------------------------------------------------------------------------------------------------


class _TurnedAway(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say so and hang up."""
        writing = cast(asyncio.Transport, transport)
        writing.write(_BUSY)
        writing.close()


def _cut(connection: web.RequestHandler) -> None:
    """End a connection that has had its time."""
    transport = connection.transport
    if transport is not None:
        transport.abort()


async def _listen(address: Address) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: there can be none at this address.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(*address, type=socket.SOCK_STREAM)
        family, _, _, _, place = found[0]
        both = address.host == "::" and socket.has_dualstack_ipv6()  # as everybody expects of [::]
        listening = socket.create_server(cast(Any, place[:2]), family=family, backlog=128, dualstack_ipv6=both)
    except socket.gaierror as error:
        raise ConfigError(SETTING, str(address), f"there is no such host: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(SETTING, str(address), _REMEDIES.get(error.errno or 0, str(error))) from error
    listening.setblocking(False)
    return listening


_REMEDIES = {
    errno.EADDRINUSE: "another process listens there: give another port, or 0 for a free one",
    errno.EADDRNOTAVAIL: "this machine has no such address: give one of its own, 127.0.0.1, or 0.0.0.0 for all",
    errno.EACCES: "ports below 1024 are for privileged processes: give another port",
}


def _is_local_name(host: str) -> bool:
    """Whether a request's Host names this machine, with or without a port."""
    name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def _quiet_log() -> logging.Logger:
    """What clients send that is no HTTP is their affair."""
    quiet = logging.getLogger(f"{__name__}.http")
    quiet.setLevel(logging.CRITICAL)
    return quiet
