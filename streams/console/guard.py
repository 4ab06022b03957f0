"""Who may ask the console for what.

Whoever can reach its port is a browser or a program; a browser may act for a page of somebody else's. So:

* *Host*: only names that are ours. A page of somebody else's may have its name lead to 127.0.0.1 (DNS rebinding), and
  would be of one origin with us. An address in figures is no name, so nobody else's page can have it as its origin.
* *Origin*: what changes something comes from a page of ours, as the browser says in ``Origin`` and ``Sec-Fetch-Site``,
  and carries a token which only a page of ours can read, bound to its cookie. What is only read is refused as well if
  the browser says that another site's page asks for it.
* *Identity*: with a token set, a cookie that ``/login`` gave, or the token itself as ``Authorization: Bearer``. A
  browser never sends the latter by itself, so such a request needs neither cookie nor CSRF token.

Guesses of the token are slowed down: each wrong one keeps its sender waiting twice as long as the last.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from aiohttp import web

from ...state.clock import Clock
from ...state.errors import ConfigError
from .answers import RefusedRequestError, error_answer

log = logging.getLogger(__name__)

CSRF_HEADER: Final = "X-Rowmill-CSRF"
LEAST_TOKEN: Final = 16
"""The shortest token that is taken, in characters."""
LOGIN_SECONDS: Final = 12 * 3_600.0
TICKET_SECONDS: Final = 600.0
"""How long a login link may be used, once."""
MOST_BODY_BYTES: Final = 1 << 20

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_STATIC: Final = "/static/"
_API: Final = "/api/"
_FORM: Final = "application/x-www-form-urlencoded"
_FORM_SECONDS: Final = 10.0
_MOST_FORM: Final = 8_192
_COOKIE: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::(?P<port>[0-9]{1,5}))?")
_MOST_LOGINS: Final = 1_000
_MOST_SENDERS: Final = 1_000
_LONGEST_PENALTY: Final = 30.0
_MOST_TOKEN: Final = 1_024

_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_DATA_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: then browsers say "Origin: null" of our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Server": "rowmill",
}


@dataclass(slots=True)
class _Visit:
    """What is known of the one who sends a request.

    Attributes:
        visitor: the cookie's value, perhaps one that is only about to be set.
        is_new: whether it is.
        by_bearer: whether the token came as a header, which no browser sends by itself.
    """

    visitor: str
    is_new: bool
    by_bearer: bool = False


_VISIT: Final[ContextVar[_Visit | None]] = ContextVar("rowmill.console.visit", default=None)
"""Of the request that is being answered; None before it is known. A request itself keeps nothing without aiohttp's own
keys, which older releases do not have."""

_Name = TypeVar("_Name")
_Value = TypeVar("_Value")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_binding(host: str, token: str | None) -> None:
    """See that nobody else can reach a console that asks nobody who they are.

    Raises:
        ConfigError: the address is not this machine's alone, and there is no token; or the token is too short.
    """
    if token is not None and not LEAST_TOKEN <= len(token) <= _MOST_TOKEN:
        raise ConfigError(
            "token", f"one of {len(token)} characters", f"give {LEAST_TOKEN} to {_MOST_TOKEN:,} characters"
        )
    if token is None and not is_loopback(host):
        raise ConfigError(
            "--host", host, "others could steer the sessions from there: set a token (--token-file FILE or "
            "ROWMILL_CONSOLE_TOKEN), with TLS in front of it, or leave it at 127.0.0.1",
        )  # fmt: skip


class Guard:
    """Looks at each request before anything else does, and at each answer after.

    Args:
        host: the address that is listened on.
        token: what has to be known; None: nothing, and only this machine can reach us.
        read_only: whether everything that changes something is refused.
        hosts: further names under which we may be asked, such as a proxy's in front of us.
        clock: time.

    Attributes:
        harmless: names of routes that change nothing although they are POSTed to.
        open_paths: what needs no token.
        port: the one that is listened on: cookies know no ports, so that it is in ours' name.
        error_page: makes a page of an error, where a person asked; None: plain text.
        login_page: makes the page that asks for the token.

    Raises:
        ConfigError: as :func:`check_binding`.
    """

    def __init__(
        self, *, host: str, token: str | None, clock: Clock, read_only: bool = False, hosts: Collection[str] = ()
    ) -> None:
        check_binding(host, token)
        self.read_only = read_only
        self.needs_token = token is not None
        self.harmless: set[str] = set()
        self.open_paths = {"/login", "/favicon.ico"}
        self.port = 0
        self.error_page: Callable[[web.Request, BaseException], Awaitable[web.StreamResponse]] | None = None
        self.login_page: Callable[[web.Request, str], Awaitable[web.StreamResponse]] | None = None
        self._clock = clock
        self._digest = None if token is None else _digest(token)
        self._names = {name.lower() for name in (host, *hosts, *(_own_names() if token is not None else ()))}
        self._secret = secrets.token_bytes(32)
        self._logins: OrderedDict[bytes, float] = OrderedDict()
        self._tickets: OrderedDict[bytes, float] = OrderedDict()
        self._penalties: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def attach(self, app: web.Application) -> None:
        """Put it in front of an application."""
        app.middlewares.append(self._middleware)
        app.on_response_prepare.append(self._prepare)
        app.router.add_post("/login", self.login)
        app.router.add_post("/logout", self.logout)

    # --- requests ----------------------------------------------------------------------------------------------

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        _VISIT.set(None)  # one task answers all requests of a connection
        response = await self._answer(request, handler)
        visit = _VISIT.get()
        if visit is not None and visit.is_new and not response.prepared:
            self._set_cookie(request, response, visit.visitor)
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_host(request)
            self._check_site(request)
            visit = self._know_visitor(request)
            if (answer := self._admit(request, visit)) is not None:
                return answer
            if request.method not in _SAFE:
                self._check_change(request, visit)
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                return error
            return await self._failed(request, error)
        except Exception as error:  # noqa: BLE001 - the last one who can make an answer of it
            return await self._failed(request, error)

    async def _failed(self, request: web.Request, error: BaseException) -> web.StreamResponse:
        if self.error_page is None or request.path.startswith(_API) or not _wants_page(request):
            return error_answer(error)
        return await self.error_page(request, error)

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """What every answer has."""
        response.headers.update(_HEADERS)
        is_page = response.content_type == "text/html"
        response.headers["Content-Security-Policy"] = _PAGE_POLICY if is_page else _DATA_POLICY
        if not request.path.startswith(_STATIC) or response.status >= 400:
            response.headers["Cache-Control"] = "no-store"

    def _set_cookie(self, request: web.Request, response: web.StreamResponse, visitor: str) -> None:
        response.set_cookie(
            self._cookie_name,
            visitor,
            max_age=round(LOGIN_SECONDS),
            path="/",
            httponly=True,
            samesite="Strict",
            # What TLS in front of us says of itself. Who lies here harms nobody but himself.
            secure=request.secure or request.headers.get("X-Forwarded-Proto", "").lower() == "https",
        )

    @property
    def _cookie_name(self) -> str:
        return f"rowmill_console_{self.port}"

    # --- host and origin ---------------------------------------------------------------------------------------

    def _check_host(self, request: web.Request) -> None:
        given = request.headers.getall("Host", [])
        found = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if found is None:
            raise RefusedRequestError(400, "Host", ", ".join(given)[:200], "send one header Host with a name and port")
        if not self._is_ours(found["name"].lower()):
            raise RefusedRequestError(403, "Host", given[0], self._host_remedy())

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name) or name in self._names:
            return True
        if not self.needs_token:
            return False
        try:  # no page can have figures as its name, unless it is ours
            return bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False

    def _host_remedy(self) -> str:
        if self.needs_token:
            return "the console does not answer to this name; if it is its own, say so (--allow-host NAME)"
        return f"the console answers to localhost and 127.0.0.1 only: open http://127.0.0.1:{self.port}/"

    def _check_site(self, request: web.Request) -> None:
        """Refuse what another site's page asks for, but for a person who follows a link to us."""
        origins = request.headers.getall("Origin", [])
        if origins and (len(origins) > 1 or not _is_origin_of(origins[0], request.headers["Host"])):
            raise RefusedRequestError(
                403, "Origin", ", ".join(origins)[:200], "only the console's own pages may ask for this"
            )
        site = request.headers.get("Sec-Fetch-Site", "none")
        if site in {"same-origin", "none"}:
            return
        is_link = request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"
        if not is_link or request.path.startswith(_API):
            raise RefusedRequestError(403, "Sec-Fetch-Site", site, "only the console's own pages may ask for this")

    def _check_change(self, request: web.Request, visit: _Visit) -> None:
        """What changes something comes from a page of ours, or from a program that knows the token."""
        if not visit.by_bearer:
            if "Origin" not in request.headers and request.headers.get("Sec-Fetch-Site") != "same-origin":
                raise RefusedRequestError(
                    403, "Origin", None, "send the console's own address as Origin, as browsers do"
                )
            if request.path not in {"/login", "/logout"}:  # whose forms carry it in a field
                self._check_csrf(visit, request.headers.get(CSRF_HEADER, ""))
        is_api = request.path.startswith(_API)
        wanted = "application/json" if is_api else _FORM
        if request.content_type != wanted or len(request.headers.getall("Content-Type", [])) != 1:
            raise RefusedRequestError(415, "Content-Type", request.headers.get("Content-Type"), f"send {wanted}")
        if self.read_only and request.path not in {"/login", "/logout"} and not self._is_harmless(request):
            raise RefusedRequestError(
                403, "--read-only", True, "this console only shows: start it without, or use the command line"
            )

    def _is_harmless(self, request: web.Request) -> bool:
        return request.match_info.route.name in self.harmless

    # --- the token of a page -----------------------------------------------------------------------------------

    def csrf_token(self, request: web.Request) -> str:
        """What a page sends as ``X-Rowmill-CSRF`` with what changes something; bound to the request's cookie.

        To be asked for while the request is answered; "" of one that was refused before anybody looked at its cookie.
        """
        del request
        visit = _VISIT.get()
        return "" if visit is None else self._csrf(visit)

    def _csrf(self, visit: _Visit) -> str:
        return hmac.new(self._secret, b"csrf:" + visit.visitor.encode(), hashlib.sha256).hexdigest()

    def _check_csrf(self, visit: _Visit, given: str) -> None:
        """See that it is the one of this request's cookie.

        Raises:
            RefusedRequestError: it is not.
        """
        is_right = hmac.compare_digest(given.encode("utf-8", "replace"), self._csrf(visit).encode())
        if visit.is_new or not is_right:
            raise RefusedRequestError(
                403, CSRF_HEADER, "none" if not given else "another one", "load the page anew, and try again"
            )

    # --- who it is ---------------------------------------------------------------------------------------------

    def _know_visitor(self, request: web.Request) -> _Visit:
        given = request.cookies.get(self._cookie_name, "")
        if _COOKIE.fullmatch(given):
            visit = _Visit(given, is_new=False)
        else:
            needs_none = request.path.startswith(_STATIC) or request.path in {"/health", "/favicon.ico"}
            visit = _Visit(secrets.token_urlsafe(32), is_new=not needs_none)
        _VISIT.set(visit)
        return visit

    def _admit(self, request: web.Request, visit: _Visit) -> web.StreamResponse | None:
        """Let it through (None), or answer it: a person is led to the login page.

        Raises:
            RefusedRequestError: nobody that we know.
        """
        if self._digest is None:
            return None
        authorization = request.headers.get("Authorization")
        if authorization is not None:
            scheme, _, given = authorization.partition(" ")
            if scheme.lower() != "bearer" or not self._knows_token(request, given.strip()):
                raise RefusedRequestError(401, "Authorization", "a wrong one", "send Bearer and the console's token")
            visit.by_bearer = True
            return None
        if request.path == "/login" and request.method == "GET" and "ticket" in request.query:
            if self._use_ticket(request.query["ticket"]):
                return self._logged_in(visit, "/")
            return None  # to the login page
        if request.path in self.open_paths or request.path.startswith(_STATIC) or self._is_logged_in(visit.visitor):
            return None
        if request.method == "GET" and _wants_page(request) and not request.path.startswith(_API):
            return _see_other(f"/login?next={quote(request.path_qs, safe='')}")
        raise RefusedRequestError(
            401, "Authorization", None, "log in at /login, or send the token as Authorization: Bearer TOKEN"
        )

    def _is_logged_in(self, visitor: str) -> bool:
        until = self._logins.get(_digest(visitor))
        return until is not None and self._clock.monotonic() < until

    def _logged_in(self, visit: _Visit, following: str) -> web.Response:
        """Give the visitor another cookie, which is one of those that are logged in, and lead him on."""
        self._forget(visit)
        _keep(self._logins, _digest(visit.visitor), self._clock.monotonic() + LOGIN_SECONDS, _MOST_LOGINS)
        return _see_other(following)

    def _forget(self, visit: _Visit) -> None:
        """The cookie counts no more; he gets another one."""
        self._logins.pop(_digest(visit.visitor), None)
        visit.visitor, visit.is_new = secrets.token_urlsafe(32), True

    async def login(self, request: web.Request) -> web.StreamResponse:
        """``POST /login``: form fields ``token``, ``csrf`` and ``next``."""
        visit, fields = _present_visit(), await _fields(request)
        self._check_csrf(visit, fields.get("csrf", "") or request.headers.get(CSRF_HEADER, ""))
        if self._digest is None or self._knows_token(request, fields.get("token", "")):
            return self._logged_in(visit, local_path(fields.get("next", "")))
        log.warning("somebody at %s gave a wrong token", request.remote)
        message = "That is not the token that this console was started with."
        if self.login_page is None:
            raise RefusedRequestError(401, "token", "a wrong one", message)
        response = await self.login_page(request, message)
        response.set_status(401)
        return response

    async def logout(self, request: web.Request) -> web.StreamResponse:
        """``POST /logout``: the cookie counts no more."""
        visit, fields = _present_visit(), await _fields(request)
        self._check_csrf(visit, fields.get("csrf", "") or request.headers.get(CSRF_HEADER, ""))
        self._forget(visit)
        return _see_other("/login")

    def ticket(self) -> str:
        """What logs in once, within ten minutes: for a link that is shown where the console was started."""
        value = secrets.token_urlsafe(32)
        _keep(self._tickets, _digest(value), self._clock.monotonic() + TICKET_SECONDS, _MOST_LOGINS)
        return value

    def _use_ticket(self, given: str) -> bool:
        until = self._tickets.pop(_digest(given[:_MOST_TOKEN]), None)
        return until is not None and self._clock.monotonic() < until

    def _knows_token(self, request: web.Request, given: str) -> bool:
        """Whether that is the token. Takes the same time for all wrong ones.

        Raises:
            RefusedRequestError: the sender has to wait, as he gave wrong ones.
        """
        sender, now = _sender(request.remote), self._clock.monotonic()
        failures, until = self._penalties.get(sender, (0, 0.0))
        if now < until:
            left = until - now
            raise RefusedRequestError(
                429, "token", "another one", f"the last one was wrong: wait {left:.0f} s", retry_after=left
            )
        if self._digest is not None and hmac.compare_digest(_digest(given[: _MOST_TOKEN + 1]), self._digest):
            self._penalties.pop(sender, None)
            return True
        penalty = min(_LONGEST_PENALTY, 2.0 ** min(failures, 10))
        _keep(self._penalties, sender, (failures + 1, now + penalty), _MOST_SENDERS)
        return False


def _present_visit() -> _Visit:
    visit = _VISIT.get()
    assert visit is not None  # noqa: S101 - the middleware has looked
    return visit


async def _fields(request: web.Request) -> dict[str, str]:
    """A form's, within a time and of a size.

    Raises:
        RefusedRequestError: it did not arrive in time, or is too large.
    """
    try:
        async with asyncio.timeout(_FORM_SECONDS):
            text = await request.content.read(_MOST_FORM + 1)
            while len(text) <= _MOST_FORM and not request.content.at_eof():
                text += await request.content.read(_MOST_FORM + 1 - len(text))
    except TimeoutError:
        raise RefusedRequestError(408, "body", "slow", f"send it within {_FORM_SECONDS:g} s") from None
    if len(text) > _MOST_FORM:
        raise RefusedRequestError(413, "body", f"more than {_MOST_FORM:,} bytes", "send the form's fields only")
    return dict(parse_qsl(text.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20))


def local_path(text: str) -> str:
    """Where to go on after the login: a path of ours, whatever was asked for."""
    is_path = re.fullmatch(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,2000}", text) is not None or text == "/"
    return text if is_path else "/"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _keep(items: OrderedDict[_Name, _Value], name: _Name, value: _Value, most: int) -> None:
    """Note it as the newest, and forget the oldest beyond so many."""
    items[name] = value
    items.move_to_end(name)
    while len(items) > most:
        items.popitem(last=False)


def _is_origin_of(origin: str, host: str) -> bool:
    """Whether an Origin is that of the pages that are served under this Host."""
    try:
        parts = urlsplit(origin)
        found = _HOST.fullmatch(parts.netloc)
    except ValueError:
        return False
    if parts.scheme not in {"http", "https"} or found is None or origin != f"{parts.scheme}://{parts.netloc}":
        return False
    return parts.netloc.lower() == host.lower()


def _wants_page(request: web.Request) -> bool:
    return "text/html" in request.headers.get("Accept", "")


def _see_other(path: str) -> web.Response:
    return web.Response(status=303, headers={"Location": path})


def _sender(remote: str | None) -> str:
    """Who it is, for the waiting: of IPv6 the network, as each host there has any number of addresses."""
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return remote or ""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _own_names() -> set[str]:
    """What this machine is called."""
    return {socket.gethostname(), socket.getfqdn()}
