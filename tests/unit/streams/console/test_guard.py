"""The guard, as somebody sees it who wants to get past it."""

from __future__ import annotations

import asyncio
import http.cookies
import io
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession, CookieJar, DummyCookieJar, web
from aiohttp.test_utils import TestServer
from rowmill.state.errors import ConfigError
from rowmill.streams.console.guard import CSRF_HEADER, MOST_BODY_BYTES, Guard, check_binding, local_path
from support.fake_clock import FakeClock

TOKEN = "correct-horse-battery"
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Door:
    """A console's door: the guard, one page, one thing that can be read and changed, and whoever knocks."""

    def __init__(self, guard: Guard, server: TestServer, session: ClientSession, clock: FakeClock) -> None:
        self.guard = guard
        self.clock = clock
        self.session = session
        self.origin = f"http://127.0.0.1:{server.port}"
        self.port = server.port or 0

    async def ask(self, path: str = "/api/v1/thing", method: str = "GET", **more: Any) -> ClientResponse:
        """Knock, as a program does."""
        async with self.session.request(
            method, self.origin + path, allow_redirects=False, timeout=_timeout(), **more
        ) as response:
            await response.read()
            return response

    async def page(self) -> dict[str, str]:
        """Open the page, and take what it gives: the headers that its own script sends with a change."""
        response = await self.ask("/", headers={"Accept": "text/html"})
        assert response.status == 200
        found = re.search(r'content="([0-9a-f]{64})"', await response.text())
        assert found is not None
        cookie = "; ".join(f"{name}={morsel.value}" for name, morsel in response.cookies.items())
        return {**JSON, "Origin": self.origin, CSRF_HEADER: found[1], **({"Cookie": cookie} if cookie else {})}


def _timeout() -> Any:
    from aiohttp import ClientTimeout

    return ClientTimeout(total=20)


@asynccontextmanager
async def a_door(**options: Any) -> AsyncIterator[Door]:
    """A guard in front of an application."""
    clock = FakeClock()
    guard = Guard(**{"host": "127.0.0.1", "token": None, "clock": clock, **options})

    async def page(request: web.Request) -> web.Response:
        text = f'<meta name="rowmill-csrf" content="{guard.csrf_token(request)}">'
        return web.Response(text=text, content_type="text/html")

    async def thing(request: web.Request) -> web.Response:
        return web.json_response({"body": (await request.read()).decode()})

    async def login_page(request: web.Request, message: str = "") -> web.Response:
        text = f'{message}<input value="{guard.csrf_token(request)}" content="{guard.csrf_token(request)}">'
        return web.Response(text=text, content_type="text/html")

    app = web.Application(client_max_size=MOST_BODY_BYTES)
    guard.attach(app)
    guard.login_page = login_page
    guard.open_paths.add("/health")
    app.router.add_get("/", page)
    app.router.add_get("/login", login_page)
    app.router.add_get("/health", thing)
    app.router.add_get("/static/app.js", thing)
    app.router.add_get("/api/v1/thing", thing)
    app.router.add_post("/api/v1/thing", thing)
    app.router.add_post("/api/v1/plan", thing, name="plan")
    guard.harmless.add("plan")
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    guard.port = server.port or 0
    try:
        async with ClientSession(cookie_jar=DummyCookieJar()) as session:
            yield Door(guard, server, session, clock)
    finally:
        await server.close()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """Without a token, on this machine only."""
    async with a_door() as found:
        yield found


@pytest.fixture
async def locked() -> AsyncIterator[Door]:
    """With a token."""
    async with a_door(token=TOKEN, host="0.0.0.0", hosts=["console.example.com"]) as found:  # noqa: S104 - not bound
        yield found


async def remedy(response: ClientResponse) -> dict[str, Any]:
    """What an error says."""
    error: dict[str, Any] = (await response.json())["error"]
    assert error["message"]
    return error


# --- where it listens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "192.168.1.7", "myhost", "127.0.0.1.evil.com", "localhost.evil.com"],  # noqa: S104 - not bound
)
def test_another_address_needs_a_token(host: str) -> None:
    """What others can reach asks who they are."""
    with pytest.raises(ConfigError, match="token"):
        check_binding(host, None)
    check_binding(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_this_machine_alone_needs_none(host: str) -> None:
    """Loopback addresses are this machine's."""
    check_binding(host, None)


@pytest.mark.parametrize("token", ["", "short", "x" * 15, "x" * 2_000])
def test_tokens_that_can_be_guessed(token: str) -> None:
    """A token is long, and its refusal does not show it."""
    with pytest.raises(ConfigError, match="characters") as caught:
        check_binding("127.0.0.1", token)
    assert not token or token not in str(caught.value)


# --- Host: DNS rebinding ---------------------------------------------------------------------------------------

FOREIGN_HOSTS = [
    "evil.com",
    "evil.com:{port}",
    "127.0.0.1.evil.com:{port}",
    "localhost.evil.com",
    "localhost:{port}@evil.com",
    "evil.com#127.0.0.1",
    "127.0.0.1:{port}, evil.com",
    "127.0.0.1:{port}/../",
    "127.0.0.1:abc",
    "0x7f.1.evil.com",
    "[::1].evil.com",
    "local host",
    "192.168.0.1",
    "",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize("path", ["/", "/api/v1/thing", "/health", "/static/app.js", "/no-such-thing"])
async def test_a_foreign_host(door: Door, host: str, path: str) -> None:
    """Somebody else's name that leads here is refused everywhere, before anything else is said."""
    response = await door.ask(path, headers={"Host": host.format(port=door.port)})
    assert response.status in {400, 403}
    assert "body" not in await response.text()
    assert not response.cookies


@pytest.mark.parametrize("host", ["localhost:{port}", "LOCALHOST:9", "127.0.0.1", "[::1]:{port}", "127.0.0.1:{port}"])
async def test_names_of_this_machine(door: Door, host: str) -> None:
    """Also with another port, as through a tunnel."""
    assert (await door.ask(headers={"Host": host.format(port=door.port)})).status == 200


async def test_several_or_no_hosts(door: Door) -> None:
    """A second Host, which something in between may heed, is refused; so is none."""
    for lines in (b"Host: 127.0.0.1\r\nHost: evil.com\r\n", b"X: y\r\n"):
        answer = await raw(door.port, b"GET /api/v1/thing HTTP/1.1\r\n" + lines + b"Connection: close\r\n\r\n")
        assert answer.split(b" ")[1] == b"400", answer


async def test_a_foreign_host_in_the_request_line(door: Door) -> None:
    """An absolute address in the request line is not a way around Host."""
    answer = await raw(
        door.port, b"GET http://evil.com/api/v1/thing HTTP/1.1\r\nHost: evil.com\r\nConnection: close\r\n\r\n"
    )
    assert answer.split(b" ")[1] == b"403"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("console.example.com", 200),
        ("console.example.com:8443", 200),
        ("192.168.0.1:8321", 200),
        ("evil.com", 403),
        ("console.example.com.evil.com", 403),
        ("xconsole.example.com", 403),
    ],
)
async def test_hosts_with_a_token(locked: Door, host: str, status: int) -> None:
    """Names that were allowed, and addresses in figures, which no page of somebody else's can have."""
    response = await locked.ask(headers={"Host": host, "Authorization": f"Bearer {TOKEN}"})
    assert response.status == status


# --- Origin, Sec-Fetch-Site, CSRF ------------------------------------------------------------------------------

FOREIGN_ORIGINS = [
    "http://evil.com",
    "null",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "http://localhost:{port}",
    "http://127.0.0.1:{port}.evil.com",
    "http://127.0.0.1:{port}@evil.com",
    "http://evil.com/127.0.0.1:{port}",
    "http://127.0.0.1:{port}/",
    "file://127.0.0.1:{port}",
    "chrome-extension://127.0.0.1:{port}",
    "http://127.0.0.1:{port} http://evil.com",
    "",
]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
async def test_a_change_from_a_foreign_origin(door: Door, origin: str) -> None:
    """A page of somebody else's changes nothing, even with the right cookie and CSRF token."""
    headers = {**await door.page(), "Origin": origin.format(port=door.port)}
    response = await door.ask(method="POST", headers=headers, data="{}")
    assert response.status == 403
    assert (await remedy(response))["setting"] == "Origin"


@pytest.mark.parametrize("origin", ["http://evil.com", "null"])
@pytest.mark.parametrize("path", ["/", "/api/v1/thing", "/static/app.js", "/health"])
async def test_reading_from_a_foreign_origin(door: Door, origin: str, path: str) -> None:
    """Nor does it read, whatever the browser would make of the answer."""
    response = await door.ask(path, headers={"Origin": origin})
    assert response.status == 403
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_several_origins(door: Door) -> None:
    """A second Origin is not a way around the first."""
    ours = b"Origin: %s\r\n" % door.origin.encode()
    head = b"GET /api/v1/thing HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n" % door.port
    assert (await raw(door.port, head + ours + b"\r\n")).split(b" ")[1] == b"200"
    for lines in (ours + b"Origin: http://evil.com\r\n", b"Origin: null\r\n" + ours):
        assert (await raw(door.port, head + lines + b"\r\n")).split(b" ")[1] in {b"400", b"403"}


@pytest.mark.parametrize("site", ["cross-site", "same-site", "something"])
@pytest.mark.parametrize(
    ("path", "mode"), [("/", "no-cors"), ("/api/v1/thing", "navigate"), ("/static/app.js", "cors")]
)
async def test_what_the_browser_says_of_the_site(door: Door, site: str, path: str, mode: str) -> None:
    """Another site's frames, images and scripts get nothing of ours, nor do other ports of this machine."""
    response = await door.ask(path, headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode})
    assert response.status == 403


@pytest.mark.parametrize("site", ["cross-site", "none", "same-origin"])
async def test_a_person_may_follow_a_link(door: Door, site: str) -> None:
    """From anywhere to a page."""
    response = await door.ask("/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"})
    assert response.status == 200


async def test_a_change_from_our_page(door: Door) -> None:
    """What our own page sends goes through; an Origin, or the browser's word, is enough beside the CSRF token."""
    headers = await door.page()
    assert (await door.ask(method="POST", headers=headers, data='{"a": 1}')).status == 200
    del headers["Origin"]
    assert (await door.ask(method="POST", headers=headers, data="{}")).status == 403
    assert (
        await door.ask(method="POST", headers={**headers, "Sec-Fetch-Site": "same-origin"}, data="{}")
    ).status == 200
    assert (await door.ask(method="POST", headers={**headers, "Sec-Fetch-Site": "cross-site"}, data="{}")).status == 403


def _without(name: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda headers: {key: value for key, value in headers.items() if key != name}


@pytest.mark.parametrize(
    "spoil",
    [
        _without(CSRF_HEADER),
        _without("Cookie"),
        lambda headers: {**headers, CSRF_HEADER: ""},
        lambda headers: {**headers, CSRF_HEADER: "0" * 64},
        lambda headers: {**headers, CSRF_HEADER: headers[CSRF_HEADER].upper()},
        lambda headers: {**headers, "Cookie": re.sub("=.", "=x", headers["Cookie"], count=1) + "x"},
        lambda headers: {**headers, "Cookie": headers["Cookie"].replace("rowmill_console_", "rowmill_console_1")},
    ],
    ids=["no token", "no cookie", "empty", "zeros", "upper case", "broken cookie", "another console's cookie"],
)
async def test_a_change_without_the_right_csrf_token(
    door: Door, spoil: Callable[[dict[str, str]], dict[str, str]]
) -> None:
    """The CSRF token has to be there, and to belong to the cookie."""
    response = await door.ask(method="POST", headers=spoil(await door.page()), data="{}")
    assert response.status == 403
    assert (await remedy(response))["setting"] == CSRF_HEADER


async def test_a_csrf_token_of_somebody_else(door: Door) -> None:
    """One visitor's token does not go with another's cookie, nor with one that somebody made up and planted."""
    mine, yours = await door.page(), await door.page()
    assert mine[CSRF_HEADER] != yours[CSRF_HEADER]
    response = await door.ask(method="POST", headers={**mine, CSRF_HEADER: yours[CSRF_HEADER]}, data="{}")
    assert response.status == 403
    planted = {**mine, "Cookie": f"rowmill_console_{door.port}={'A' * 43}"}
    assert (await door.ask(method="POST", headers=planted, data="{}")).status == 403


# --- methods and content types ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", "", None],
)
async def test_what_forms_of_other_pages_can_send(door: Door, content_type: str | None) -> None:
    """Only JSON changes something: the types that a browser sends without asking are refused."""
    headers = _without("Content-Type")(await door.page())
    if content_type is not None:
        headers["Content-Type"] = content_type
    response = await door.ask(method="POST", headers=headers, data=b"{}")
    assert response.status == 415


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND"])
async def test_other_methods(door: Door, method: str) -> None:
    """There are none, and no preflight is answered."""
    response = await door.ask(method=method, headers=await door.page(), data="{}")
    assert response.status == 405
    assert response.headers["Allow"] == "GET, HEAD, POST"
    assert not [name for name in response.headers if name.startswith("Access-Control")]


async def test_changes_cannot_be_asked_for_by_get(door: Door) -> None:
    """A link or an image changes nothing."""
    assert (await door.ask("/api/v1/plan")).status == 405


async def test_a_body_that_is_too_large(door: Door) -> None:
    """More than a megabyte is not read."""
    response = await door.ask(method="POST", headers=await door.page(), data=io.BytesIO(b" " * (MOST_BODY_BYTES + 1)))
    assert response.status == 413
    assert "1 MiB" in (await remedy(response))["remedy"]


async def test_read_only() -> None:
    """Everything that changes something is refused, with the reason; what only plans is not."""
    async with a_door(read_only=True) as door:
        headers = await door.page()
        response = await door.ask(method="POST", headers=headers, data="{}")
        assert response.status == 403
        assert (await remedy(response))["setting"] == "--read-only"
        assert (await door.ask("/api/v1/plan", method="POST", headers=headers, data="{}")).status == 200
        assert (await door.ask()).status == 200


# --- answers ---------------------------------------------------------------------------------------------------

COMMON = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "rowmill",
}


@pytest.mark.parametrize("path", ["/", "/api/v1/thing", "/nothing", "/api/v1/nothing", "/health"])
async def test_what_every_answer_has(door: Door, path: str) -> None:
    """Also errors, and what is not there."""
    response = await door.ask(path)
    assert {name: response.headers.get(name) for name in COMMON} == COMMON
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy


async def test_the_policy_of_pages(door: Door) -> None:
    """Scripts and styles come from us, as files; forms go to us."""
    policy = (await door.ask("/")).headers["Content-Security-Policy"]
    for part in (
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
    ):
        assert part in policy.split("; ")


async def test_payloads_in_errors_stay_json(door: Door) -> None:
    """What somebody sent comes back as JSON only, and never as a header."""
    payload = "/api/v1/%3Cscript%3Ealert(1)%3C/script%3E%0d%0aX-Evil:%201"
    response = await door.ask(payload, headers={"Accept": "text/html"})
    assert response.status == 404
    assert response.content_type == "application/json"
    assert "X-Evil" not in response.headers


@pytest.mark.parametrize("secure", [False, True])
async def test_the_cookie(door: Door, secure: bool) -> None:
    """No script reads it, no other site sends it; behind TLS it stays there; its name has the port."""
    headers = {"X-Forwarded-Proto": "https"} if secure else {}
    response = await door.ask("/", headers=headers)
    (line,) = response.headers.getall("Set-Cookie")
    cookie: http.cookies.SimpleCookie = http.cookies.SimpleCookie(line)
    morsel = cookie[f"rowmill_console_{door.port}"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", morsel.value)
    assert (morsel["httponly"], morsel["samesite"], morsel["path"], morsel["domain"]) == (True, "Strict", "/", "")
    assert bool(morsel["secure"]) is secure


async def test_no_cookie_where_none_is_needed(door: Door) -> None:
    """Health checks and files get none; who has one keeps it."""
    assert not (await door.ask("/health")).cookies
    assert not (await door.ask("/static/app.js")).cookies
    assert not (await door.ask("/", headers=await door.page())).cookies


# --- the token -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/v1/thing", "/nothing", "/api/v1/nothing", "/"])
async def test_without_the_token(locked: Door, path: str) -> None:
    """Nothing is told, not even what is there."""
    response = await locked.ask(path)
    assert response.status == 401
    assert "body" not in await response.text()


async def test_a_person_without_the_token_is_led_to_the_login(locked: Door) -> None:
    """With the way back; and what does not belong to anybody is there without."""
    response = await locked.ask("/?a=b", headers={"Accept": "text/html"})
    assert (response.status, response.headers["Location"]) == (303, "/login?next=%2F%3Fa%3Db")
    for path in ("/login", "/health", "/static/app.js"):
        assert (await locked.ask(path)).status == 200


async def login(door: Door, token: str, **more: str) -> ClientResponse:
    """Give a token, as the form does."""
    page = await door.ask("/login")
    found = re.search(r'value="([0-9a-f]{64})"', await page.text())
    assert found is not None
    cookie = "; ".join(f"{name}={morsel.value}" for name, morsel in page.cookies.items())
    fields = {"csrf": found[1], "token": token, **more}
    return await door.ask(
        "/login", method="POST", headers={**FORM, "Origin": door.origin, "Cookie": cookie}, data=fields
    )


def cookies_of(response: ClientResponse) -> str:
    """As a browser sends them back."""
    return "; ".join(f"{name}={morsel.value}" for name, morsel in response.cookies.items())


async def test_login_and_logout(locked: Door) -> None:
    """The cookie that a login gives is a new one, opens the door, and closes with the logout."""
    before = cookies_of(await locked.ask("/login"))
    answer = await login(locked, TOKEN, next="/topics")
    assert (answer.status, answer.headers["Location"]) == (303, "/topics")
    cookie = cookies_of(answer)
    assert cookie
    assert cookie != before
    assert (await locked.ask(headers={"Cookie": cookie})).status == 200
    assert (await locked.ask(headers={"Cookie": before})).status == 401
    away = await login(locked, TOKEN, next="//evil.com")
    assert (away.status, away.headers["Location"]) == (303, "/")
    page = await locked.ask("/", headers={"Cookie": cookie})
    csrf = re.search(r'content="([0-9a-f]{64})"', await page.text())
    assert csrf is not None
    out = {**FORM, "Origin": locked.origin, "Cookie": cookie}
    assert (await locked.ask("/logout", method="POST", headers=out, data={"csrf": "x"})).status == 403
    assert (await locked.ask("/logout", method="POST", headers=out, data={"csrf": csrf[1]})).status == 303
    assert (await locked.ask(headers={"Cookie": cookie})).status == 401


async def test_logins_end(locked: Door) -> None:
    """After twelve hours."""
    cookie = cookies_of(await login(locked, TOKEN))
    locked.clock.advance(12 * 3_600 + 1)
    assert (await locked.ask(headers={"Cookie": cookie})).status == 401


async def test_login_needs_its_own_form(locked: Door) -> None:
    """Nobody is logged in, or out, by another site's form."""
    headers = {**FORM, "Origin": locked.origin}
    assert (await locked.ask("/login", method="POST", headers=headers, data={"token": TOKEN})).status == 403
    foreign = {**FORM, "Origin": "http://evil.com"}
    assert (await locked.ask("/login", method="POST", headers=foreign, data={"token": TOKEN})).status == 403


@pytest.mark.parametrize(
    "given", ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\x00", "ü" * 500, TOKEN + "\n", "x" * 5_000]
)
async def test_wrong_tokens(locked: Door, given: str) -> None:
    """None of them opens, and none is shown."""
    answer = await login(locked, given)
    assert answer.status == 401
    assert TOKEN not in await answer.text()
    assert (await locked.ask(headers={"Cookie": cookies_of(answer)})).status == 401


async def test_guessing_is_slow(locked: Door) -> None:
    """Each wrong guess takes twice as long as the one before, by whichever way; the right one waits as well."""
    waits = []
    for _ in range(7):
        assert (await login(locked, "wrong")).status == 401
        answer = await locked.ask(headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status == 429
        waits.append(int(answer.headers["Retry-After"]))
        locked.clock.advance(waits[-1] + 0.1)
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    assert (await locked.ask(headers={"Authorization": f"Bearer {TOKEN}"})).status == 200
    assert (await login(locked, "wrong")).status == 401
    answer = await locked.ask(headers={"Authorization": "Bearer x"})
    assert answer.headers["Retry-After"] == "1"


async def test_who_is_in_is_not_kept_out_by_guesses(locked: Door) -> None:
    """Somebody else's guesses slow down nobody who is logged in."""
    cookie = cookies_of(await login(locked, TOKEN))
    assert (await login(locked, "wrong")).status == 401
    assert (await locked.ask(headers={"Cookie": cookie})).status == 200


@pytest.mark.parametrize(
    "value", ["Bearer", "Bearer ", "Basic " + TOKEN, TOKEN, f"Bearer {TOKEN}x", f"Bearer x {TOKEN}", "Bearer ü"]
)
async def test_wrong_authorization(locked: Door, value: str) -> None:
    """Only the token itself, as Bearer."""
    assert (await locked.ask(headers={"Authorization": value})).status == 401


async def test_a_program_needs_no_csrf_token(locked: Door) -> None:
    """No browser sends Authorization by itself. What it does send of another site is refused all the same."""
    bearer = {**JSON, "Authorization": f"Bearer {TOKEN}"}
    assert (await locked.ask(method="POST", headers=bearer, data="{}")).status == 200
    foreign = {**bearer, "Origin": "http://evil.com"}
    assert (await locked.ask(method="POST", headers=foreign, data="{}")).status == 403
    assert (await locked.ask(method="POST", headers={**bearer, "Content-Type": "text/plain"}, data="{}")).status == 415


async def test_without_a_token_bearer_is_no_way_around(door: Door) -> None:
    """Where no token is set, none can be right."""
    headers = {**JSON, "Authorization": "Bearer ", "Origin": door.origin}
    assert (await door.ask(method="POST", headers=headers, data="{}")).status == 403


async def test_a_ticket_logs_in_once(locked: Door) -> None:
    """The link that the console shows at its start works once, within ten minutes, and leads to the overview."""
    path = f"/login?ticket={locked.guard.ticket()}&next=//evil.com"
    answer = await locked.ask(path)
    assert (answer.status, answer.headers["Location"]) == (303, "/")
    assert (await locked.ask(headers={"Cookie": cookies_of(answer)})).status == 200
    again = await locked.ask(path)
    assert again.status == 200  # the form
    assert (await locked.ask(headers={"Cookie": cookies_of(again)})).status == 401
    late = f"/login?ticket={locked.guard.ticket()}"
    locked.clock.advance(601)
    assert (await locked.ask(late)).status == 200
    assert (await locked.ask("/login?ticket=guess")).status == 200


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/", "/"),
        ("/topics?a=b&c=%20", "/topics?a=b&c=%20"),
        ("//evil.com", "/"),
        ("/\\evil.com", "/"),
        ("https://evil.com", "/"),
        ("javascript:alert(1)", "/"),
        ("/a\r\nX-Evil: 1", "/"),
        ("/a\tb", "/"),
        ("/a\\b", "/"),
        ("", "/"),
        ("/" + "x" * 3_000, "/"),
        ("/ü", "/"),
    ],
)
def test_where_the_login_leads(given: str, path: str) -> None:
    """To a path of ours, whatever the link said."""
    assert local_path(given) == path


async def test_a_form_that_never_ends(locked: Door) -> None:
    """A login form has some fields and no more."""
    page = await locked.ask("/login")
    headers = {**FORM, "Origin": locked.origin, "Cookie": cookies_of(page)}
    answer = await locked.ask("/login", method="POST", headers=headers, data=b"token=" + b"x" * 50_000)
    assert answer.status == 413


async def test_a_browser_with_its_cookie_jar(locked: Door) -> None:
    """All of it as a browser does: the page, the form, the change."""
    jar = CookieJar(unsafe=True)
    async with ClientSession(cookie_jar=jar) as browser:
        async with browser.get(locked.origin + "/login") as page:
            csrf = re.search(r'value="([0-9a-f]{64})"', await page.text())
        assert csrf is not None
        fields = {"token": TOKEN, "csrf": csrf[1], "next": "/"}
        async with browser.post(locked.origin + "/login", data=fields, headers={"Origin": locked.origin}) as page:
            assert page.status == 200
            csrf = re.search(r'content="([0-9a-f]{64})"', await page.text())
        assert csrf is not None
        headers = {**JSON, "Origin": locked.origin, CSRF_HEADER: csrf[1]}
        async with browser.post(locked.origin + "/api/v1/thing", data="{}", headers=headers) as answer:
            assert answer.status == 200


async def raw(port: int, request: bytes) -> bytes:
    """An answer to bytes that no client would send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
