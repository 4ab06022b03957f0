"""The health endpoint: its verdicts, its addresses, and that no client of it can do harm."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest
from rowmill.state.errors import ConfigError
from rowmill.streams import health
from rowmill.streams.health import HealthServer, parse_address
from support.fake_clock import FakeClock
from support.observed import ObservedWorker, partition

pytestmark = pytest.mark.timeout(60)


class Answer(NamedTuple):
    """What came back over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The body as JSON."""
        found: dict[str, Any] = json.loads(self.body)
        return found


async def ask(url: str, path: str, *, method: str = "GET", host: str | None = None) -> Answer:
    """One request by hand: no client library that would forgive anything."""
    address = url.removeprefix("http://")
    name, _, port = address.rpartition(":")
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(name.strip("[]"), int(port))
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host or address}\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    return Answer(int(first.split()[1]), dict(line.split(": ", 1) for line in rest), body)


@asynccontextmanager
async def serving(
    worker: ObservedWorker, address: str = "0", clock: FakeClock | None = None
) -> AsyncIterator[tuple[HealthServer, str]]:
    """An endpoint for as long as the block lasts, and its URL."""
    server = HealthServer(worker, address, clock=clock or FakeClock())
    url = await server.start()
    try:
        yield server, url
    finally:
        await server.close()


# --- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("8080", "127.0.0.1", 8080, "127.0.0.1:8080"),
        (" 0 ", "127.0.0.1", 0, "127.0.0.1:0"),
        ("0.0.0.0:8080", "0.0.0.0", 8080, "0.0.0.0:8080"),  # noqa: S104 - read, not bound
        ("[::]:8080", "::", 8080, "[::]:8080"),
        ("[::1]:65535", "::1", 65_535, "[::1]:65535"),
        ("localhost:80", "127.0.0.1", 80, "127.0.0.1:80"),
        ("node-7.example:9100", "node-7.example", 9100, "node-7.example:9100"),
    ],
)
def test_addresses(text: str, host: str, port: int, shown: str) -> None:
    """A port alone means this machine only; everything else must be said."""
    address = parse_address(text)
    assert (address.host, address.port, str(address)) == (host, port, shown)


@pytest.mark.parametrize(
    "text",
    ["", "no", ":8080", "8080:", "::1:8080", "[::1]8080", "[nonsense]:80", "[]:80", "65536", "-1", "8080x", "٣",
     "http://0.0.0.0:80", "a b:80", "user@host:80", "1.2.3.4:80/live"],
)  # fmt: skip
def test_wrong_addresses(text: str) -> None:
    """What is no address is refused before anything is opened, with the forms that would do."""
    with pytest.raises(ConfigError, match="write PORT, HOST:PORT or"):
        HealthServer(ObservedWorker(), text, clock=FakeClock())


async def test_a_taken_port() -> None:
    """The error names the address and the remedy, and leaves nothing open."""
    async with serving(ObservedWorker()) as (_, url):
        taken = url.rpartition(":")[2]
        second = HealthServer(ObservedWorker(), taken, clock=FakeClock())
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{taken}.*another process listens there: give another"):
            await second.start()
        await second.close()


@pytest.mark.parametrize(
    ("address", "remedy"), [("192.0.2.1:0", "no such address"), ("no-such-host.invalid:0", "no such host")]
)
async def test_addresses_that_are_not_here(address: str, remedy: str) -> None:
    """An address of another machine, or of none."""
    with pytest.raises(ConfigError, match=remedy):
        await HealthServer(ObservedWorker(), address, clock=FakeClock()).start()


@pytest.mark.parametrize("address", ["0", "0.0.0.0:0", "[::1]:0"])
async def test_it_listens_where_it_was_told(address: str) -> None:
    """Port 0 takes a free one, and the URL says which."""
    async with serving(ObservedWorker(), address) as (_, url):
        assert not url.endswith(":0")
        assert (await ask(url, "/live")).status == 200


async def test_both_kinds_of_addresses() -> None:
    """[::] is reached by IPv4 as well, as a probe of Kubernetes may come."""
    async with serving(ObservedWorker(), "[::]:0") as (_, url):
        port = url.rpartition(":")[2]
        assert (await ask(f"http://127.0.0.1:{port}", "/live")).status == 200
        assert (await ask(f"http://[::1]:{port}", "/live")).status == 200


# --- verdicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "live", "ready", "reason"),
    [
        ("starting", 200, 503, "it has not joined its group yet"),
        ("running", 200, 200, None),
        ("pausing", 200, 200, None),
        ("paused", 200, 200, None),
        ("stopping", 200, 503, "it is stopping"),
        ("stopped", 503, 503, "it is stopped"),
    ],
)
async def test_states(state: str, live: int, ready: int, reason: str | None) -> None:
    """Draining is live and not ready; paused is both; ended is neither."""
    worker = ObservedWorker()
    worker.set(state=state, partitions=(partition(0),))
    async with serving(worker) as (_, url):
        assert (await ask(url, "/live")).status == live
        answer = await ask(url, "/ready")
    assert answer.status == ready
    assert answer.json == {
        "status": "not ready" if reason else "ready", "state": state, "reasons": [reason] if reason else [],
        "partitions": 1,
    }  # fmt: skip


async def test_partitions_that_open() -> None:
    """Not ready while a partition is fenced and restored; the first ten are named."""
    worker = ObservedWorker()
    worker.set(partitions=tuple(partition(n, "opening" if n else "running") for n in range(13)))
    async with serving(worker) as (_, url):
        answer = await ask(url, "/ready")
        assert answer.status == 503
        assert answer.json["reasons"][0].startswith("12 of 13 partitions are being opened: reviews/1, reviews/2,")
        assert answer.json["reasons"][0].endswith("reviews/10, …")
        worker.set(partitions=())
        assert (await ask(url, "/ready")).status == 200  # a spare worker, with more workers than partitions


# --- HTTP -------------------------------------------------------------------------------------------------------


async def test_pages() -> None:
    """The index leads to the others; unknown paths and other methods get their codes."""
    async with serving(ObservedWorker()) as (_, url):
        index = await ask(url, "/")
        assert index.status == 200
        assert all(path in index.body for path in (b"/live", b"/ready", b"/metrics"))
        metrics = await ask(url, "/metrics?name=x")
        assert metrics.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b"\nrowmill_rows_total 12.0\n" in metrics.body
        assert b"\nprocess_open_fds " in metrics.body
        assert (await ask(url, "/nothing")).status == 404
        refused = await ask(url, "/live", method="POST")
        assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD")
        head = await ask(url, "/live", method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert metrics.headers["Cache-Control"] == "no-store"
        assert metrics.headers["Connection"] == "close"


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:1", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200), ("127.9.9.9", 200),
     ("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("192.0.2.1", 403), ("[", 403)],
)  # fmt: skip
async def test_other_names_on_loopback(host: str, status: int) -> None:
    """A web page that has its own name resolved to 127.0.0.1 reads nothing."""
    async with serving(ObservedWorker()) as (_, url):
        assert (await ask(url, "/metrics", host=host)).status == status


async def test_any_name_elsewhere() -> None:
    """On other addresses probes and scrapers come by whatever name they know."""
    async with serving(ObservedWorker(), "0.0.0.0:0") as (_, url):
        assert (await ask(url, "/ready", host="worker-0.workers")).status in {200, 503}


# --- clients that would do harm ---------------------------------------------------------------------------------


async def test_a_thousand_scrapes() -> None:
    """They share pages: the worker is looked at once per half a second, not once per scrape."""
    worker, clock = ObservedWorker(), FakeClock()
    async with serving(worker, clock=clock) as (_, url):
        for _ in range(50):
            answers = await asyncio.gather(*(ask(url, "/metrics") for _ in range(20)))
            assert {answer.status for answer in answers} == {200}
        assert worker.looks == 1
        worker.set(totals={"rows": 13})
        clock.advance(0.4)
        assert b"rowmill_rows_total 12.0" in (await ask(url, "/metrics")).body
        clock.advance(0.1)
        assert b"rowmill_rows_total 13.0" in (await ask(url, "/metrics")).body


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that connect and say nothing are cut; meanwhile others are turned away, not queued for ever."""
    monkeypatch.setattr(health, "_CONNECTION_SECONDS", 0.3)
    async with serving(ObservedWorker()) as (server, url), AsyncExitStack() as stack:
        port = int(url.rpartition(":")[2])
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(health._MOST_CONNECTIONS)]
        for _, writer in silent:
            stack.callback(writer.close)
        async with asyncio.timeout(10):
            while server._http is None or len(server._http.connections) < health._MOST_CONNECTIONS:
                await asyncio.sleep(0)
        assert (await ask(url, "/live")).status == 503
        async with asyncio.timeout(10):  # each connection ends without a byte
            ends = await asyncio.gather(*(reader.read() for reader, _ in silent), return_exceptions=True)
        assert all(end == b"" or isinstance(end, ConnectionResetError) for end in ends)
        assert (await ask(url, "/live")).status == 200


async def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a large page and does not take it is cut; others are served meanwhile."""
    monkeypatch.setattr(health, "_CONNECTION_SECONDS", 0.3)
    worker = ObservedWorker()
    worker.set(partitions=tuple(partition(n) for n in range(2_000)))
    async with serving(worker) as (server, url):
        loop = asyncio.get_running_loop()
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.setblocking(False)
        await loop.sock_connect(slow, ("127.0.0.1", int(url.rpartition(":")[2])))
        await loop.sock_sendall(slow, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await ask(url, "/live")).status == 200
        async with asyncio.timeout(20):
            while server._http is not None and server._http.connections:
                await asyncio.sleep(0.02)
        slow.close()


@pytest.mark.parametrize(
    "sent",
    [b"\0\1\2\3\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n", b"POST /live HTTP/1.1\r\nHost: localhost\r\n"
     b"Content-Length: 999999999999\r\n\r\n" + b"x" * 1_000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_request(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Rubbish is answered or hung up on, quietly, and the next client is served."""
    caplog.set_level(logging.WARNING)
    async with serving(ObservedWorker()) as (_, url):
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(sent)
            answer = await reader.read()
            writer.close()
        assert b" 200 " not in answer.partition(b"\r\n")[0]
        assert (await ask(url, "/live")).status == 200
    assert not caplog.records


async def test_a_worker_that_cannot_be_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    """A bug in a snapshot is an answer 500 and one line in the log, not one for every scrape."""
    worker = ObservedWorker()

    def broken() -> Any:
        raise RuntimeError("no figures today")

    worker.snapshot = broken  # type: ignore[method-assign]
    async with serving(worker) as (_, url):
        for path in ("/metrics", "/ready", "/live", "/metrics"):
            assert (await ask(url, path)).status == 500
        assert (await ask(url, "/")).status == 200
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_threads_that_are_all_taken() -> None:
    """A page is made also while handlers hold every thread of the event loop's own pool."""
    taken = threading.Event()
    async with serving(ObservedWorker()) as (_, url):
        blocked = [asyncio.create_task(asyncio.to_thread(taken.wait, 30)) for _ in range(64)]
        try:
            assert (await ask(url, "/metrics")).status == 200
        finally:
            taken.set()
            await asyncio.wait(blocked)


async def test_large_pages_do_not_block() -> None:
    """While a page of 3,000 partitions is made, the event loop turns."""
    worker = ObservedWorker()
    worker.set(partitions=tuple(partition(n) for n in range(3_000)))
    async with serving(worker) as (_, url):
        asking = asyncio.create_task(ask(url, "/metrics"))
        turns = 0
        while not asking.done():
            turns += 1
            await asyncio.sleep(0.001)
        assert len((await asking).body) > 1_000_000
    assert turns > 20


async def test_close_is_quick_and_final() -> None:
    """Open connections are cut, nobody is let in any more, and closing again does nothing."""
    worker = ObservedWorker()
    server = HealthServer(worker, "0", clock=FakeClock())
    url = await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    await ask(url, "/metrics")
    async with asyncio.timeout(5):
        await server.close()
        assert await reader.read() == b""
    writer.close()
    with pytest.raises(OSError, match=r"111|refused"):
        await ask(url, "/live")
    await server.close()
