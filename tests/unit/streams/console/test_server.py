"""The web server's bounds, what takes a while, and errors as answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from rowmill.state.errors import BadRowError, CheckpointError, ConfigError
from rowmill.state.model import TopicPartition
from rowmill.streams.console import api, console
from rowmill.streams.console.actions import console_user, outcome_of
from rowmill.streams.console.answers import RefusedRequestError, described, error_answer
from rowmill.streams.console.console import Server, listen
from rowmill.streams.console.operations import Operations, Progress
from rowmill.streams.console.routes import ROUTES
from rowmill.streams.dlq_letters import DeadLetter
from rowmill.streams.dlq_retry import Outcome
from rowmill.streams.errors import (
    BrokerError,
    BrokerTimeoutError,
    GroupBusyError,
    IllegalTransitionError,
    OffsetOutOfRangeError,
    TopicError,
)
from support.fake_clock import FakeClock


@asynccontextmanager
async def a_server() -> AsyncIterator[int]:
    """One that says hello, and what it was sent; gives its port."""
    server, app, listening = Server(), web.Application(), listen("127.0.0.1", 0)
    app.middlewares.append(server.middleware)

    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def echo(request: web.Request) -> web.Response:
        try:
            return web.json_response(await api._body(request, next(each for each in ROUTES if each.name == "pause")))
        except ConfigError as error:
            return error_answer(error)

    app.router.add_get("/", hello)
    app.router.add_post("/", echo)
    try:
        await server.start(app, listening)
        yield listening.getsockname()[1]
    finally:
        await server.close()
        listening.close()


async def talk(port: int, text: bytes, *, wait: float = 5.0) -> bytes:
    """What comes back until the other side hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(text)
        async with asyncio.timeout(wait):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


HELLO = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def test_who_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is who says half a request; and who has asked something goes on."""
    monkeypatch.setattr(console, "_FIRST_REQUEST_SECONDS", 0.1)
    async with a_server() as port:
        assert await talk(port, b"") == b""
        assert await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(5):
                assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.15)
        writer.close()


async def test_a_connection_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told so; when one has gone there is room again."""
    monkeypatch.setattr(console, "MOST_CONNECTIONS", 3)
    async with a_server() as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        await asyncio.sleep(0)
        assert (await talk(port, HELLO)).startswith(b"HTTP/1.1 503")
        held[0][1].close()
        await held[0][1].wait_closed()
        async with asyncio.timeout(5):
            while not (await talk(port, HELLO)).startswith(b"HTTP/1.1 200"):
                await asyncio.sleep(0.01)
        for _, writer in held:
            writer.close()


async def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who sends a byte now and then keeps nothing busy for long."""
    monkeypatch.setattr(api, "BODY_SECONDS", 0.1)
    async with a_server() as port:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{"
        assert (await talk(port, head)).startswith(b"HTTP/1.1 408")


async def test_an_end_with_somebody_on_the_line() -> None:
    """Connections that are left do not hold it up."""
    loop = asyncio.get_running_loop()
    async with a_server() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n")
        began = loop.time()
    assert loop.time() - began < 5
    writer.close()


def test_where_it_can_listen() -> None:
    """A port that is taken, and addresses that are none, are said with a remedy."""
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for host, number, setting in (
            ("127.0.0.1", port, "--port"),
            ("nowhere.invalid", 0, "--host"),
            ("192.0.2.1", 0, "--port"),
            ("127.0.0.1", 99_999, "--port"),
        ):
            with pytest.raises(ConfigError) as caught:
                listen(host, number)
            assert caught.value.setting == setting
    with listen("[::1]", 0) as found:
        assert found.getsockname()[0] == "::1"


# --- what takes a while ----------------------------------------------------------------------------------------


async def test_one_at_a_time_of_each_session() -> None:
    """A second one is refused while the first is under way, and told whose that is; other sessions go on."""
    operations, gate = Operations(clock=FakeClock()), asyncio.Event()

    async def work() -> dict[str, Any]:
        await gate.wait()
        return {"running": False}

    async def quick() -> dict[str, Any]:
        return {"running": False, "n": 1}

    first = asyncio.create_task(operations.run("retry", "rowmill.p", "ann", work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(RefusedRequestError, match="a retry is under way, by ann") as caught:
        await operations.run("purge", "rowmill.p", "bob", quick)
    assert caught.value.status == 409
    assert (await operations.run("purge", "rowmill.q", "bob", quick))["n"] == 1
    gate.set()
    assert await first == {"running": False}
    await asyncio.sleep(0)
    assert (await operations.run("purge", "rowmill.p", "bob", quick))["n"] == 1
    last = operations.last("rowmill.p")
    assert last is not None
    assert (last.to_dict()["kind"], last.to_dict()["running"]) == ("purge", False)


async def test_what_takes_longer_than_a_request_waits_goes_on() -> None:
    """The request is told, and what came of it is there later."""
    operations, gate = Operations(clock=FakeClock(), patience=0.01), asyncio.Event()

    async def work() -> dict[str, Any]:
        await gate.wait()
        raise BrokerError("gone")

    progress = Progress(lambda: 3, 7)
    told = await operations.run("retry", "rowmill.p", "ann", work, progress)
    assert (told["running"], told["kind"], told["result"]) == (True, "retry", None)
    assert (told["done"], told["total"]) == (3, 7)
    gate.set()
    async with asyncio.timeout(5):
        while (last := operations.last("rowmill.p")) is None or last.error is None:
            await asyncio.sleep(0)
    assert last.error["message"] == "gone"


async def test_errors_of_the_work_are_the_requests() -> None:
    """And are remembered."""
    operations = Operations(clock=FakeClock())

    async def work() -> dict[str, Any]:
        raise TopicError("no topic")

    with pytest.raises(TopicError):
        await operations.run("retry", "rowmill.p", "ann", work)
    last = operations.last("rowmill.p")
    assert last is not None
    assert last.error is not None
    assert last.error["message"] == "no topic"


async def test_the_end_of_the_console_ends_them() -> None:
    """They are cancelled, and may end what they have open."""
    operations, ended = Operations(clock=FakeClock(), patience=0.01), []

    async def work() -> dict[str, Any]:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)
        return {}

    await operations.run("retry", "rowmill.p", "ann", work)
    await operations.close()
    assert ended == [True]
    last = operations.last("rowmill.p")
    assert last is not None
    assert last.error is not None
    assert "stopped" in last.error["message"]


async def test_too_many_at_once() -> None:
    """Of other sessions, too."""
    operations = Operations(clock=FakeClock(), patience=0.001)

    async def work() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    for n in range(8):
        await operations.run("retry", f"rowmill.p{n}", "ann", work)
    with pytest.raises(RefusedRequestError) as caught:
        await operations.run("retry", "rowmill.q", "ann", work)
    assert caught.value.status == 503
    await operations.close()


# --- errors as answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("a", "<b>", "do c"), 400),
        (RefusedRequestError(429, "a", 1, "wait", retry_after=3.2), 429),
        (TopicError("x"), 404),
        (IllegalTransitionError("x"), 409),
        (GroupBusyError("x"), 409),
        (OffsetOutOfRangeError(TopicPartition("t", 0), 5, "x"), 416),
        (BrokerError("x"), 503),
        (BrokerTimeoutError("x", 1), 504),
        (CheckpointError("x"), 500),
        (BadRowError("kind", "x"), 500),
        (web.HTTPNotFound(), 404),
        (web.HTTPRequestEntityTooLarge(1, 2), 413),
        (KeyError("secret"), 500),
    ],
)
def test_errors(error: Exception, status: int) -> None:
    """Each has its status and a message; a bug of ours does not show what it was about."""
    found, body = described(error)
    assert (found, set(body["error"])) == (status, {"setting", "value", "remedy", "message"})
    assert body["error"]["message"]
    assert "secret" not in str(body)
    response = error_answer(error)
    assert (response.status, response.content_type) == (status, "application/json")
    assert response.headers.get("Retry-After") == ("3" if status == 429 else None)


def test_who_asks() -> None:
    """The user of this process, and from where, unless that is here."""
    assert console_user("127.0.0.1") == console_user(None) == console_user("::1")
    assert console_user("127.0.0.1").startswith("console ")
    assert console_user("10.1.2.3").endswith(" for 10.1.2.3")


def test_an_outcome() -> None:
    """Counts, and why some were refused; of a dry run nothing is done."""
    outcome = Outcome()
    outcome.done["s", "T"] = 5
    outcome.targets["in"] = 5
    for n in range(30):
        outcome.refuse(DeadLetter("t", 0, n, 0, None, None), "too large")
    told = outcome_of(outcome, is_dry=True)
    assert (told["matched"], told["count"], told["done"]) == (35, 5, 0)
    assert (told["refused"][0]["count"], len(told["refused"][0]["ids"])) == (30, 20)
    assert outcome_of(outcome, is_dry=False)["done"] == 5
