"""The console's pages, as the server makes them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from rowmill.state.errors import ConfigError
from rowmill.streams.console import pages
from rowmill.streams.console.page_format import look
from rowmill.streams.errors import BrokerTimeoutError
from support.console_app import SampleConsole
from support.console_samples import EVIL, NOW_MS

HERE = pages.HERE
GROUP = "/sessions/rowmill.enrich"
PATHS = (
    "/", GROUP, f"{GROUP}/dead-letters", f"{GROUP}/dead-letters/0-1200", f"{GROUP}/replay", "/topics",
    "/topics/orders", "/login", "/sessions/rowmill.nobody", "/nowhere", "/sessions/rowmill.geo",
)  # fmt: skip
Get = Callable[..., Awaitable[tuple[int, str]]]


class Page(HTMLParser):
    """What a page holds, as far as a content policy and a keyboard are concerned."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def console() -> SampleConsole:
    """The samples, at their own time."""
    return SampleConsole()


@pytest.fixture
async def get(console: SampleConsole) -> AsyncIterator[Get]:
    """Ask for a page as a browser does: status and text."""
    async with TestClient(TestServer(console.application())) as client:

        async def ask(path: str, **headers: str) -> tuple[int, str]:
            named = {name.replace("_", "-"): text for name, text in headers.items()}
            answer = await client.get(path, headers={"Accept": "text/html", **named}, allow_redirects=False)
            return answer.status, await answer.text()

        yield ask


@pytest.mark.parametrize("path", PATHS)
async def test_no_page_breaks_the_content_policy(get: Get, path: str) -> None:
    """No inline script, style or handler; everything is loaded from here; ids are there once."""
    status, text = await get(path)
    assert status == (404 if "no" in path.rpartition("/")[2].replace("enrich", "") and "login" not in path else 200)
    tags = Page(text).tags
    for tag, attributes in tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert tag != "style"
        if tag == "script":
            assert (attributes["src"] or "").startswith("/static/")
        for name in ("src", "href", "action"):
            assert not re.match(r"(https?:)?//|javascript:", attributes.get(name) or ""), attributes
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", [path for path in PATHS if not path.endswith(("login", "where", "replay", "orders"))])
async def test_parts_are_the_same_without_the_frame(get: Get, path: str) -> None:
    """What a browser asks for when something changed stands in the whole page, letter by letter."""
    (_, whole), (_, part) = await get(path), await get(f"{path}?part=live")
    assert "<html" not in part
    assert part.strip() in whole


async def test_markup_is_escaped(get: Get) -> None:
    """What stands in messages, headers and values is text; the words of an address, too."""
    for path in (f"{GROUP}/dead-letters", f"{GROUP}/dead-letters/0-1200", "/topics/orders", f"/?find={EVIL}"):
        _, text = await get(path)
        assert "<script>window" not in text
        assert "&lt;script&gt;window" in text


async def test_figures_are_those_of_status(get: Get) -> None:
    """Lag, counts, cost and budget of a session are on its page; what nobody knows is a dash."""
    _, text = await get(GROUP)
    for shown in ("48,211", "8,412,090", "815.02", "82 % of 1,000.00", "orders/1", "41,023", "182 ms", "half open"):
        assert shown in text


async def test_overview_is_filtered_and_sorted(get: Get) -> None:
    """By name and state; in the order asked for; an unknown order is the usual one, where trouble comes first."""

    async def names(path: str) -> list[str]:
        _, text = await get(path)
        return re.findall(r'class="stretch" href="/sessions/rowmill\.([^"]+)"', text)

    assert (await names("/"))[:2] == ["translate", "enrich"]
    assert await names("/?sort=nonsense") == await names("/")
    assert (await names("/?sort=lag"))[0] == "fraud-scoring"
    assert await names("/?state=paused") == ["fraud-scoring"]
    assert await names("/?find=REVIEWS&sort=name") == ["reviews", "reviews.nightly-2026-11-21"]
    _, text = await get("/?find=zzz")
    assert "No session fits the filter" in text


async def test_an_empty_broker_says_what_to_do(console: SampleConsole, get: Get) -> None:
    """The first thing that somebody sees is the command to type."""
    console.data.the_overview = {**console.data.the_overview, "sessions": []}
    _, text = await get("/")
    assert "rowmill worker reviews.py --broker kafka://kafka-1:9092" in text


async def test_what_stands_still_is_said(console: SampleConsole, get: Get) -> None:
    """A broker that cannot be read, and a history that is behind, are on every page that shows figures of theirs."""
    console.data.the_overview = {
        **console.data.the_overview, "refresh_error": "no answer within 10 s", "refreshed_ms": None,
        "history": {"state": "stopped", "behind_seconds": 90.0, "message": "Faust ended: <b>boom</b>"},
    }  # fmt: skip
    for path in ("/", GROUP):
        _, text = await get(path)
        assert "The broker cannot be read" in text
        assert "Faust ended: &lt;b&gt;boom" in text


async def test_filters_reach_the_reader(console: SampleConsole, get: Get) -> None:
    """Of dead letters those that wait unless asked otherwise; "since" becomes a moment; unknown words are left out."""
    await get(f"{GROUP}/dead-letters?stage=score&since=1h&part=live&evil=1")
    await get(f"{GROUP}/dead-letters?status=all")
    await get(f"{GROUP}/dead-letters/3-77")
    await get("/topics/orders?from=time:5&partition=&limit=10")
    assert console.data.asked == [
        (
            "dead_letters",
            ("rowmill.enrich", {"stage": "score", "status": "waiting", "since_ms": str(NOW_MS - 3_600_000)}),
        ),
        ("dead_letters", ("rowmill.enrich", {"status": "all"})),
        ("dead_letter", ("rowmill.enrich", "3/77")),
        ("records", ("orders", {"from": "time:5", "limit": "10"})),
    ]


async def test_the_log_is_narrowed(console: SampleConsole, get: Get) -> None:
    """One kind of events, or all of them for a kind that there is not."""
    await get(f"{GROUP}?events=breakers")
    await get(f"{GROUP}?events=nonsense")
    kinds = [asked[1] for name, asked in console.data.asked if name == "events"]
    assert kinds == [pages.EVENT_GROUPS["breakers"], None]


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (ConfigError("from", "<b>", "give an offset"), 400, ["from", "&lt;b&gt;", "give an offset"]),
        (BrokerTimeoutError("list topics", 10), 504, ["list topics"]),
    ],
)
async def test_errors_say_who_acts_next(
    console: SampleConsole, get: Get, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, shown: list[str]
) -> None:
    """Setting, value and remedy, or the message, on a page of its own with the right status."""

    async def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(console.data, "records", fails)
    found, text = await get("/topics/orders")
    assert found == status
    for words in shown:
        assert words in text


async def test_strangers_learn_nothing(get: Get) -> None:
    """The page that refuses a foreign name tells neither the broker nor any session."""
    status, text = await get("/", Host="evil.example")
    assert status == 403
    assert "kafka-1" not in text
    assert "enrich" not in text


async def test_the_login_page_tells_nothing_else() -> None:
    """Who is not logged in is led to a form without the broker's name; where they wanted to go is kept."""
    console = SampleConsole(token="a" * 20)
    async with TestClient(TestServer(console.application())) as client:
        answer = await client.get("/topics?find=x", headers={"Accept": "text/html"})
        text = await answer.text()
        assert answer.url.path == "/login"
        assert 'name="next" value="/topics?find=x"' in text
        assert re.search(r'name="csrf" value="[0-9a-f]{64}"', text)
        assert "kafka-1" not in text
        assert (await client.get(f"/static/{pages.VERSION_MARK}/console.css")).status == 200


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../pages.py",
        "%2e%2e/pages.py",
        "js/../../pages.py",
        "/etc/passwd",
        "..%2f..%2fpages.py",
        "vendor/README.md",
        "x",
    ],
)
async def test_only_what_was_loaded_is_served(get: Get, path: str) -> None:
    """No path reaches the disk."""
    status, text = await get(f"/static/{path}")
    assert status == 404
    assert "import" not in text


async def test_files_are_kept_by_version() -> None:
    """An address with the version is kept for good, one without is asked about again; both are packed on request."""
    async with TestClient(TestServer(SampleConsole().application()), auto_decompress=False) as client:
        kept = await client.get(f"/static/{pages.VERSION_MARK}/js/main.js")
        assert "immutable" in kept.headers["Cache-Control"]
        assert kept.headers["Content-Encoding"] == "gzip"
        assert "javascript" in kept.content_type
        plain = await client.get("/static/console.css", headers={"Accept-Encoding": "identity"})
        assert plain.headers["Cache-Control"] == "no-cache"
        assert await plain.read() == (HERE / "static" / "console.css").read_bytes()
        again = await client.get("/static/console.css", headers={"If-None-Match": plain.headers["ETag"]})
        assert again.status == 304
        assert (await client.get("/favicon.ico")).content_type == "image/svg+xml"


def test_every_file_that_pages_name_is_there() -> None:
    """Scripts, styles and modules in templates and imports exist, and so does each shape."""
    static, templates = HERE / "static", HERE / "templates"
    text = "".join(path.read_text(encoding="utf-8") for path in templates.glob("*.html"))
    for name in re.findall(r"static\('([^']+)'\)", text):
        assert (static / name).is_file(), name
    for script in (static / "js").glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8")):
            assert (static / "js" / name).is_file(), name
    shapes = set(re.findall(r'<symbol id="i-([a-z]+)"', text))
    wanted = set(re.findall(r'icon\("([a-z]+)"\)', text)) | {look(word).icon for word in ("executing", "x", "open")}
    assert wanted <= shapes


def test_what_others_wrote_is_as_they_published_it() -> None:
    """The table of ``vendor/README.md`` names each file with its digest, and its licence is there."""
    folder = HERE / "static" / "vendor"
    rows = re.findall(
        r"^\| (\S+) \| .*\]\((LICENSE\.\w+)\)\) \| ([0-9a-f]{64}) \|$", (folder / "README.md").read_text(), re.MULTILINE
    )
    assert {name for name, _, _ in rows} == {path.name for path in folder.glob("*.*s")}
    for name, licence, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
        assert (folder / licence).is_file()


def test_scripts_never_make_html_of_texts() -> None:
    """Our scripts put in texts as texts: none of the ways that take them for markup is used."""
    for path in Path(HERE / "static" / "js").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), (
            path.name
        )


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (pages.href("sessions", "rowmill.a b/c"), "/sessions/rowmill.a%20b%2Fc"),
        (pages.href("topics", "t", from_=0, partition=None, find=""), "/topics/t?from=0"),
        (pages.href("sessions", 'x"><script>', type="a&b"), "/sessions/x%22%3E%3Cscript%3E?type=a%26b"),
    ],
)
def test_addresses_are_quoted(address: str, expected: str) -> None:
    """Any word may stand in an address."""
    assert address == expected
