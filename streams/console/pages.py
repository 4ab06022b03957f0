"""The pages: what the console shows, rendered here from what the API answers, so that both always say the same.

A page is whole without JavaScript; a part of it (``?part=live``) is what the browser asks for when something changed.
Every text is escaped by Jinja; the pages hold no script and no style of their own (see the policy in ``guard.py``).
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
import shlex
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias
from urllib.parse import quote, urlencode

from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ...state.codec import dumps
from .answers import described, not_found
from .page_format import FILTERS, dom_id, look, share

if TYPE_CHECKING:
    from jinja2 import Template

HERE: Final = Path(__file__).parent
Query: TypeAlias = Mapping[str, str]
Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

_EVENTS_SHOWN = 100
_SESSIONS_SHOWN = 100
"""Unless all are asked for: each takes an eighth of a millisecond, and the page is made anew every second."""
_PEEK = "50"
_KEPT_FOR_GOOD = "public, max-age=31536000, immutable"
_SORTS: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "state": lambda each: (not each["alerts"], look(each["state"]).rank, each["name"]),
    "name": lambda each: each["name"],
    "lag": lambda each: (-(each["lag"] or 0), each["name"]),
    "rate": lambda each: (-(each["rate"] or 0), each["name"]),
    "rows": lambda each: (-each["rows"], each["name"]),
    "dead": lambda each: (-each["dead_letters"], each["name"]),
    "cost": lambda each: (-float(each["cost"] or 0), each["name"]),
}
_LETTER_WORDS: Final = ("stage", "type", "status", "text", "limit", "after")
_SINCE_MS: Final[Mapping[str, int]] = {"15m": 900_000, "1h": 3_600_000, "24h": 86_400_000, "7d": 604_800_000}
EVENT_GROUPS: Final[Mapping[str, frozenset[str]]] = {
    "failures": frozenset({"row_failed", "session_failed"}),
    "workers": frozenset(
        {"worker_started", "worker_stopped", "partitions_assigned", "partitions_revoked", "partition_opened"}
    ),
    "session": frozenset({"pausing", "paused", "resumed", "cancelled", "session_completed", "session_failed"}),
    "breakers": frozenset({"breaker_open", "breaker_half_open", "breaker_closed"}),
    "budget": frozenset({"budget_warning", "budget_exhausted", "budget_resumed"}),
}
"""What the log of a session can be narrowed to."""


class Data(Protocol):
    """What pages ask: each method answers as the API's endpoint does."""

    def overview(self) -> Mapping[str, Any]:
        """All sessions, from memory."""

    def session(self, group: str) -> Mapping[str, Any] | None:
        """One of them, from memory; None: there is none of that name."""

    def events(self, group: str, kinds: frozenset[str] | None, limit: int) -> Mapping[str, Any]:
        """What its workers told, the newest first, from memory."""

    async def dead_letters(self, group: str, query: Query) -> Mapping[str, Any]:
        """Its dead letters, filtered."""

    async def dead_letter(self, group: str, place: str) -> Mapping[str, Any]:
        """One of them, whole; ``place`` is ``partition/offset``."""

    async def topics(self) -> Mapping[str, Any]:
        """The broker's topics."""

    async def records(self, topic: str, query: Query) -> Mapping[str, Any]:
        """Some records of a topic."""

    async def replay_range(self, group: str) -> Mapping[str, Any]:
        """Between which moments and offsets the session's sources can be replayed."""


class Guard(Protocol):
    """What pages need of the guard, and give to it."""

    login_page: Callable[[web.Request, str], Awaitable[web.StreamResponse]] | None
    error_page: Callable[[web.Request, BaseException], Awaitable[web.StreamResponse]] | None

    def csrf_token(self, request: web.Request) -> str:
        """The word that changes must bring along."""


class Console(Protocol):
    """What pages need of the console."""

    @property
    def data(self) -> Data:
        """Figures."""

    @property
    def guard(self) -> Guard:
        """Who may do what."""

    @property
    def read_only(self) -> bool:
        """Whether nothing can be changed here."""

    @property
    def shown_broker(self) -> str:
        """The broker's URL without secrets."""


def add_pages(app: web.Application, console: Console) -> None:
    """Have an application serve the pages and what they are made of."""
    pages = Pages(console)
    app.add_routes(page_routes(pages))
    console.guard.login_page = pages.login_again
    console.guard.error_page = pages.error


def page_routes(pages: Pages) -> list[web.RouteDef]:
    """The pages' addresses, all of them to be read only: what changes something goes through the API."""
    static = Static.load(HERE / "static")
    return [
        web.get("/", pages.overview),
        web.get("/sessions/{group}", pages.session),
        web.get("/sessions/{group}/dead-letters", pages.dead_letters),
        web.get(r"/sessions/{group}/dead-letters/{partition:\d{1,9}}-{offset:\d{1,19}}", pages.dead_letter),
        web.get("/sessions/{group}/replay", pages.replay),
        web.get("/topics", pages.topics),
        web.get("/topics/{topic}", pages.topic),
        web.get("/login", pages.login),
        web.get("/static/{path:.+}", static.serve),
        web.get("/favicon.ico", static.icon),
    ]


# --- files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    packed: bytes
    kind: str
    tag: str


class Static:
    """Style sheets, scripts and shapes, held in memory: no request's path ever reaches the disk.

    Args:
        files: by the path below ``/static/``.
    """

    def __init__(self, files: Mapping[str, _File]) -> None:
        self._files = files

    @classmethod
    def load(cls, folder: Path) -> Static:
        """Read a folder."""
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in {".js", ".css", ".svg"}:
                body = path.read_bytes()
                kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
                tag = hashlib.blake2b(body, digest_size=8).hexdigest()
                files[path.relative_to(folder).as_posix()] = _File(body, gzip.compress(body, 6, mtime=0), kind, tag)
        return cls(files)

    def version(self) -> str:
        """Changes with any of the files."""
        tags = "".join(file.tag for file in self._files.values())
        return hashlib.blake2b(tags.encode(), digest_size=5).hexdigest()

    async def serve(self, request: web.Request) -> web.Response:
        """One file. An address that names a version is kept by browsers for good."""
        path = request.match_info["path"]
        return self._answer(request, self._files.get(path.removeprefix(f"{VERSION_MARK}/")))

    async def icon(self, request: web.Request) -> web.Response:
        """What browsers ask for by themselves."""
        return self._answer(request, self._files.get("favicon.svg"))

    def _answer(self, request: web.Request, file: _File | None) -> web.Response:
        if file is None:
            raise web.HTTPNotFound(text="there is no such file")
        is_versioned = VERSION_MARK in request.path
        headers = {"ETag": f'"{file.tag}"', "Cache-Control": _KEPT_FOR_GOOD if is_versioned else "no-cache"}
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return web.Response(status=304, headers=headers)
        headers["Vary"] = "Accept-Encoding"
        body = file.body
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body, headers["Content-Encoding"] = file.packed, "gzip"
        return web.Response(body=body, headers=headers, content_type=file.kind, charset="utf-8")


VERSION_MARK: Final = "v." + Static.load(HERE / "static").version()
"""A folder in the addresses of static files: scripts that import each other are of the same version, too."""


# --- pages -----------------------------------------------------------------------------------------------------


def environment() -> Environment:
    """Jinja with our formats; every text is escaped, and a misspelt name is an error."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters.update(FILTERS)
    made.globals.update(
        static=lambda path: f"/static/{VERSION_MARK}/{path}",
        href=href,
        share=share,
        dom_id=dom_id,
        rowmill=shell_line,
        version=version("rowmill"),
    )
    return made


def href(*parts: str, **query: Any) -> str:
    """An address of ours from words of any characters; what is None or "" is left out of the query."""
    path = "/" + "/".join(quote(part, safe="") for part in parts)
    words = {name.rstrip("_"): value for name, value in query.items() if value not in {None, ""}}
    return f"{path}?{urlencode(words)}" if words else path


def shell_line(broker: str, *words: str) -> str:
    """A command line to copy."""
    return shlex.join(["rowmill", *words, "--broker", broker])


class Pages:
    """Handlers for the pages.

    Args:
        console: where figures come from.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._templates = environment()

    async def overview(self, request: web.Request) -> web.Response:
        """All sessions."""
        answer = self._console.data.overview()
        query = request.query
        sort = query.get("sort", "state") if query.get("sort") in _SORTS else "state"
        every: Sequence[Mapping[str, Any]] = answer["sessions"]
        shown = sorted(_found(every, query), key=_SORTS[sort])
        states: dict[str, int] = {}
        for each in every:
            states[each["state"]] = states.get(each["state"], 0) + 1
        return self._page(
            request,
            "overview",
            here="sessions",
            answer=answer,
            sessions=shown,
            states=dict(sorted(states.items(), key=lambda entry: look(entry[0]).rank)),
            sort=sort,
            query=query,
            totals=_totals(every),
            most=len(shown) if query.get("all") else _SESSIONS_SHOWN,
        )

    async def session(self, request: web.Request) -> web.Response:
        """One session."""
        group, answer = self._session(request)
        kind = request.query.get("events", "")
        events = _named(self._console.data.events(group, EVENT_GROUPS.get(kind), _EVENTS_SHOWN)["events"])
        return self._page(
            request, "session", here="sessions", answer=answer, group=group, events=events, kind=kind,
            kinds=list(EVENT_GROUPS), query=request.query,
        )  # fmt: skip

    async def dead_letters(self, request: web.Request) -> web.Response:
        """A session's dead letters."""
        group, answer = self._session(request)
        query = {"status": "waiting", **request.query}
        asked = {name: query[name] for name in _LETTER_WORDS if query.get(name)}
        if query.get("since") in _SINCE_MS:
            asked["since_ms"] = str(self._console.data.overview()["now_ms"] - _SINCE_MS[query["since"]])
        letters = await self._console.data.dead_letters(group, asked)
        return self._page(
            request, "dead_letters", here="sessions", answer=answer, group=group, letters=letters, query=query,
            stages=_values(letters["counts"], "stage"), types=_values(letters["counts"], "type"),
        )  # fmt: skip

    async def dead_letter(self, request: web.Request) -> web.Response:
        """One dead letter, whole."""
        group, answer = self._session(request)
        place = f"{request.match_info['partition']}/{request.match_info['offset']}"
        letter = await self._console.data.dead_letter(group, place)
        return self._page(request, "dead_letter", here="sessions", answer=answer, group=group, letter=letter)

    async def replay(self, request: web.Request) -> web.Response:
        """Where a session can be moved to."""
        group, answer = self._session(request)
        reach = await self._console.data.replay_range(group)
        return self._page(request, "replay", here="sessions", answer=answer, group=group, reach=reach)

    async def topics(self, request: web.Request) -> web.Response:
        """The broker's topics."""
        answer = await self._console.data.topics()
        every: Sequence[Mapping[str, Any]] = answer["topics"]
        kinds: dict[str, int] = {}
        for each in every:
            kinds[each["kind"]] = kinds.get(each["kind"], 0) + 1
        text, kind = request.query.get("find", "").strip().lower(), request.query.get("kind", "")
        shown = [each for each in every if text in each["name"].lower() and kind in {"", each["kind"]}]
        most = max((each["records"] or 0 for each in shown), default=0)
        return self._page(
            request, "topics", here="topics", topics=shown, kinds=kinds, query=request.query, most=most,
            total=len(every),
        )  # fmt: skip

    async def topic(self, request: web.Request) -> web.Response:
        """Some records of a topic."""
        topic = request.match_info["topic"]
        query = {"from": "end", "limit": _PEEK, **{name: text for name, text in request.query.items() if text}}
        asked: Query = {name: query[name] for name in ("partition", "from", "limit") if name in query}
        answer = await self._console.data.records(topic, asked)
        return self._page(request, "topic", here="topics", topic=topic, answer=answer, query=query)

    async def login(self, request: web.Request) -> web.Response:
        """Where the token is asked for. All that comes of it is the guard's."""
        return await self.login_again(request, "")

    async def login_again(self, request: web.Request, message: str) -> web.Response:
        """The same, saying why once more."""
        following = request.query.get("next", "/")
        return self._page(request, "login", here="", message=message, following=following, is_bare=True)

    async def error(self, request: web.Request, error: BaseException) -> web.Response:
        """What went wrong with any request of a person's, and who acts next."""
        status, body = described(error)
        is_bare = status in {400, 401, 403}  # for somebody who may be nobody we know: no figures, no broker
        return self._page(request, "problem", status=status, here="", error=body["error"], is_bare=is_bare)

    # --- what they share ---------------------------------------------------------------------------------------

    def _session(self, request: web.Request) -> tuple[str, Mapping[str, Any]]:
        """The session that is asked for: its group and how it stands.

        Raises:
            RefusedRequestError: there is none of that name.
        """
        group = request.match_info["group"]
        answer = self._console.data.session(group)
        if answer is None:
            raise not_found("session", group, "there is none of that name here; the overview lists those there are")
        return group, answer

    def _page(
        self, request: web.Request, name: str, *, status: int = 200, is_bare: bool = False, **words: Any
    ) -> web.Response:
        """A whole page, or the part of it that was asked for."""
        console = self._console
        part = request.query.get("part")
        template: Template = self._templates.get_template(f"{name}_live.html" if part == "live" else f"{name}.html")
        answer = words.get(
            "answer"
        )  # of most pages it says how current it is, too: all sessions are not summed up twice
        facts = None if is_bare else answer if answer and "history" in answer else console.data.overview()
        text = template.render(
            **words,
            broker="" if is_bare else console.shown_broker,
            read_only=console.read_only,
            # A bare page may be for a request that the guard refused before it knew whose it is.
            csrf="" if is_bare and name != "login" else console.guard.csrf_token(request),
            is_bare=is_bare,
            history=facts["history"] if facts else None,
            now_ms=facts["now_ms"] if facts else 0,
            refreshed_ms=facts["refreshed_ms"] if facts else None,
            refresh_error=facts["refresh_error"] if facts else None,
            htmx_config=_HTMX,
        )
        return web.Response(
            text=text, status=status, content_type="text/html", charset="utf-8", headers={"Cache-Control": "no-store"}
        )


_HTMX: Final = dumps(
    {
        "includeIndicatorStyles": False,  # it would write a style element, which the policy forbids
        "allowEval": False,
        "allowScriptTags": False,
        "selfRequestsOnly": True,
        "historyCacheSize": 0,  # pages with rows in them do not go to the browser's storage
        "refreshOnHistoryMiss": True,
        "scrollIntoViewOnBoost": False,
    }
).decode()


def _found(sessions: Iterable[Mapping[str, Any]], query: Query) -> list[Mapping[str, Any]]:
    text, state = query.get("find", "").strip().lower(), query.get("state", "")
    return [each for each in sessions if text in each["name"].lower() and state in {"", each["state"]}]


def _named(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each event with a name that it keeps while others come on top of it; several of one moment are counted."""
    seen: dict[tuple[Any, ...], int] = {}
    named = []
    for event in reversed(events):
        key = (event["at_ms"], event["kind"], event["worker"], event["subject"])
        seen[key] = seen.get(key, 0) + 1
        named.append((dom_id("event", *key, seen[key]), event))
    return named[::-1]


def _totals(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all sessions, whatever is filtered."""
    return {
        "workers": sum(each["workers"] for each in sessions),
        "lag": sum(each["lag"] or 0 for each in sessions),
        "rate": sum(each["rate"] or 0 for each in sessions),
        "dead_per_minute": sum(each["dead_letters_per_minute"] or 0 for each in sessions),
        "alerts": sum(each["alerts"] for each in sessions),
    }


def _values(counts: Iterable[Mapping[str, Any]], name: str) -> dict[str, int]:
    """How many dead letters there are of each stage or type, the most frequent first."""
    found: dict[str, int] = {}
    for each in counts:
        found[each[name]] = found.get(each[name], 0) + each["count"]
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))
