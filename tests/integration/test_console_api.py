"""The console's API against real brokers with real workers: what it shows, what it does, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from aiohttp import ClientResponse, ClientSession, ClientTimeout, CookieJar
from rowmill import Pipeline, Worker, WorkerOptions, open_broker, publish, read
from rowmill.state.clock import SystemClock
from rowmill.state.errors import ConfigError, RowmillError
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.console.console import Console
from rowmill.streams.console.guard import CSRF_HEADER
from rowmill.streams.console.openapi import SHAPES
from rowmill.streams.console.routes import ROUTES
from rowmill.streams.status import session_statuses

pytestmark = pytest.mark.timeout(180)

API = "/api/v1"
PAYLOAD = '<script>alert("x")</script>'


class Browser:
    """Asks a console as its own page does, and holds each answer against the description."""

    def __init__(self, console: Console, session: ClientSession) -> None:
        self.console = console
        self.origin = console.url.rstrip("/")
        self.session = session
        self.csrf = ""

    async def get(self, path: str, expect: int = 200, *, begin: str | None = None, **query: Any) -> Any:
        """What is there. ``begin`` is the query's ``from``."""
        words = {name: str(value) for name, value in query.items()} | ({} if begin is None else {"from": begin})
        async with self.session.get(self.origin + path, params=words) as response:
            return await self._answer("GET", path, response, expect)

    async def post(self, path: str, body: Any = None, expect: int = 200) -> Any:
        """Change something."""
        if not self.csrf:
            self.csrf = (await self.get(f"{API}/csrf"))["token"]
        headers = {"Origin": self.origin, CSRF_HEADER: self.csrf}
        async with self.session.post(self.origin + path, json=body or {}, headers=headers) as response:
            return await self._answer("POST", path, response, expect)

    async def _answer(self, method: str, path: str, response: ClientResponse, status: int) -> Any:
        assert response.status == status, (method, path, await response.text())
        assert response.content_type == "application/json"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        answer = await response.json()
        validate(answer, shape_of(method, path, status))
        return answer

    async def until(self, path: str, condition: Callable[[Any], Any], seconds: float = 30) -> Any:
        """Ask until it is so."""
        answer = None
        try:
            async with asyncio.timeout(seconds):
                while not condition(answer := await self.get(path)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"{path} never came to that: {answer}")
        return answer

    @asynccontextmanager
    async def stream(self, path: str) -> AsyncIterator[AsyncIterator[tuple[str, str]]]:
        """Server-sent events: names and data."""
        async with self.session.get(self.origin + path) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"

            async def events() -> AsyncIterator[tuple[str, str]]:
                name = ""
                async for line in response.content:
                    field, _, value = line.decode().rstrip("\n").partition(": ")
                    name = value if field == "event" else name
                    if field == "data":
                        yield name, value

            yield events()


def shape_of(method: str, path: str, status: int) -> str:
    """Which shape an answer of this path has."""
    if status >= 400:
        return "Error"
    for route in ROUTES:
        pattern = re.sub(r"\{[a-z]+\}", "[^/]+", route.prefix + route.path)
        if route.method == method and re.fullmatch(pattern, path):
            return "Running" if status == 202 else route.answer
    raise AssertionError(f"{method} {path} is not in the table")


def validate(answer: Any, shape: str) -> None:
    """Hold an answer against the OpenAPI document; beside what a shape names there is nothing, so that it is whole."""
    schema = closed({"$ref": f"#/components/schemas/{shape}", "components": {"schemas": dict(SHAPES)}})
    jsonschema.validate(answer, schema)


def closed(schema: Any) -> Any:
    """The schema, taking no further fields where it names any."""
    if isinstance(schema, Mapping):
        found = {name: closed(each) for name, each in schema.items()}
        if found.get("type") == "object" and "required" in found and "additionalProperties" not in found:
            found["additionalProperties"] = False
        return found
    return [closed(each) for each in schema] if isinstance(schema, list) else schema


@asynccontextmanager
async def a_console(url: str, **options: Any) -> AsyncIterator[Browser]:
    """A console that runs for as long as the block does, and a browser that has it open."""
    console = Console(url, port=0, interval=0.2, **options)
    stop, ready = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(console.run(stop, lambda _: ready.set()))
    opening = asyncio.create_task(ready.wait())
    try:
        async with asyncio.timeout(30):
            await asyncio.wait({running, opening}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        async with ClientSession(cookie_jar=CookieJar(unsafe=True), timeout=ClientTimeout(total=60)) as session:
            yield Browser(console, session)
    finally:
        opening.cancel()
        stop.set()
        async with asyncio.timeout(20):
            await asyncio.wait({running})
    running.result()


@asynccontextmanager
async def a_worker(url: str, pipeline: Pipeline, folder: Path, **options: Any) -> AsyncIterator[Worker]:
    """A worker with a connection of its own."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        worker = Worker(pipeline, broker, options=WorkerOptions(state_dir=str(folder), **options))
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            async with asyncio.timeout(60):
                await asyncio.wait({running})
            running.exception()
    finally:
        await broker.close()


async def rows_of(topic: str, url: str) -> list[int]:
    """The numbers of a topic's rows."""
    return sorted([message.row["n"] for message in await asyncio.to_thread(lambda: list(read(topic, broker=url)))])


def failing(name: str) -> tuple[Pipeline, list[bool]]:
    """A pipeline in which rows 0, 10, 20, … fail until it is mended."""
    is_broken = [True]
    pipeline = Pipeline(name, source=name, sink=f"{name}.out")

    @pipeline.stage
    def check(row: dict[str, Any]) -> dict[str, Any]:
        if is_broken[0] and row["n"] % 10 == 0:
            raise ValueError(PAYLOAD)
        return row

    return pipeline, is_broken


async def test_what_it_shows_is_what_status_says(broker_url: str, name: str, tmp_path: Path) -> None:
    """The overview and the session have the exact figures of `rowmill status --json`, and the history has the rest."""
    pipeline, _ = failing(name)
    group = f"rowmill.{name}"
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(200)], broker=broker_url)
    async with a_worker(broker_url, pipeline, tmp_path), a_console(broker_url) as browser:
        path = f"{API}/sessions/{group}"
        await browser.until(f"{API}/overview", lambda each: group in [s["group"] for s in each["sessions"]])
        session = await browser.until(path, lambda each: each["summary"]["rows"] == 200 and each["summary"]["lag"] == 0)
        broker = open_broker(broker_url, environment={})
        await broker.start()
        try:
            (status,) = await session_statuses(broker, clock=SystemClock(), group=group)
        finally:
            await broker.close()
        told, exact = session["status"], status.to_dict()
        for field in ("state", "rows", "lag", "cost", "tokens", "wanted", "sources", "sink", "stage_names", "breakers"):
            assert told[field] == exact[field], field
        offsets = ("topic", "partition", "committed", "end", "lag", "rows", "committed_at")
        assert [[each[field] for field in offsets] for each in told["partitions"]] == [
            [each[field] for field in offsets] for each in exact["partitions"]
        ]
        assert session["partitions"] == told["partitions"]
        summary = session["summary"]
        assert (summary["results"], summary["dead_letters"], summary["workers"]) == (180, 20, 1)
        assert [stage["name"] for stage in session["stages"]] == ["check"]
        assert session["topics"] == {"sources": [name], "sink": f"{name}.out", "dead_letters": f"{name}.dlq"}
        series = await browser.until(
            f"{path}/series", lambda each: sum(each["rows"]) == 200 and sum(each["failures"]) == 20
        )
        assert series["window_seconds"] == 10
        events = await browser.until(f"{path}/events", lambda each: len(each["events"]) > 5)
        assert {"worker_started", "row_failed"} <= {event["kind"] for event in events["events"]}
        only = await browser.get(f"{path}/events", kind="worker_started", limit=5)
        assert {event["kind"] for event in only["events"]} == {"worker_started"}
        failures = (await browser.until(path, lambda each: each["failures"]))["failures"]
        assert failures[0]["stage"] == "check"
        overview = await browser.until(f"{API}/overview", lambda each: each["history"]["state"] == "live")
        assert overview["refresh_error"] is None


async def test_pause_and_resume(broker_url: str, name: str, tmp_path: Path) -> None:
    """A pause is done and shown within two seconds, on the stream as well; who asked is told; resume goes on."""
    pipeline, _ = failing(name)
    path = f"{API}/sessions/rowmill.{name}"
    await asyncio.to_thread(publish, name, [{"n": 1}], broker=broker_url)
    async with a_worker(broker_url, pipeline, tmp_path), a_console(broker_url) as browser:
        await browser.until(f"{API}/overview", lambda each: name in [s["name"] for s in each["sessions"]])
        await browser.until(path, lambda each: each["summary"]["state"] == "executing")
        loop = asyncio.get_running_loop()
        async with browser.stream(f"{API}/live?group=rowmill.{name}") as events:
            began = loop.time()
            answer = await browser.post(f"{path}/pause", {"reason": PAYLOAD})
            assert (answer["wanted"], answer["reason"]) == ("pause", PAYLOAD)
            assert answer["by"].startswith("console ")
            session = await browser.until(path, lambda each: each["summary"]["state"] == "paused", seconds=10)
            took = loop.time() - began
            assert session["status"]["wanted_by"] == answer["by"]
            async with asyncio.timeout(10):
                async for kind, data in events:
                    if kind == "session" and '"paused"' in data:
                        break
        assert took < 4.0  # 2 s on a quiet machine
        again = await browser.post(f"{path}/pause", {}, expect=409)
        assert "paused already" in again["error"]["message"]
        await browser.post(f"{path}/resume")
        await browser.until(path, lambda each: each["summary"]["state"] == "executing")
        await asyncio.to_thread(publish, name, [{"n": 2}], broker=broker_url)
        await browser.until(path, lambda each: each["summary"]["rows"] == 2)


async def test_dead_letters(broker_url: str, name: str, tmp_path: Path) -> None:
    """They are listed, looked into and filtered; retried once mended, or purged; and results are there once."""
    pipeline, is_broken = failing(name)
    path = f"{API}/sessions/rowmill.{name}"
    await asyncio.to_thread(publish, name, [{"n": n, "key": PAYLOAD} for n in range(100)], broker=broker_url, key="key")
    async with a_worker(broker_url, pipeline, tmp_path), a_console(broker_url) as browser:
        await browser.until(f"{API}/overview", lambda each: name in [s["name"] for s in each["sessions"]])
        await browser.until(path, lambda each: each["summary"]["rows"] == 100)
        found = await browser.get(f"{path}/dead-letters", limit=4)
        assert (found["total"], found["waiting"], found["complete"], len(found["letters"])) == (10, 10, True, 4)
        assert found["counts"] == [{"stage": "check", "type": "ValueError", "count": 10}]
        rest = await browser.get(f"{path}/dead-letters", limit=50, after=found["next"])
        ids = [letter["id"] for letter in found["letters"] + rest["letters"]]
        assert (len(set(ids)), rest["next"]) == (10, None)
        assert (await browser.get(f"{path}/dead-letters", text='"N":30'))["total"] == 1
        assert (await browser.get(f"{path}/dead-letters", stage="other"))["total"] == 0
        assert (await browser.get(f"{path}/dead-letters", status="retried"))["total"] == 0

        letter = await browser.get(f"{path}/dead-letters/{ids[0].replace('/', '-')}")
        assert letter["message"].endswith(PAYLOAD)
        assert letter["key"]["text"] == PAYLOAD
        assert '"n": ' in letter["value"]["json"]
        assert "test_console_api" in letter["where"]
        await browser.get(f"{path}/dead-letters/0-999999", expect=400)

        dry = await browser.post(f"{path}/dead-letters/retry", {"dry_run": True})
        assert (dry["matched"], dry["done"], dry["targets"]) == (10, 0, {name: 10})
        text = await browser.post(f"{path}/dead-letters/retry", {"filter": {"text": '"n":30'}, "dry_run": True})
        assert text["matched"] == 1
        none = await browser.post(f"{path}/dead-letters/retry", {"filter": {"text": "nothing"}, "dry_run": False})
        assert (none["matched"], none["done"]) == (0, 0)
        await browser.post(f"{path}/dead-letters/retry", {"ids": [], "dry_run": False}, expect=400)
        purged = await browser.post(f"{path}/dead-letters/purge", {"ids": [ids[0]], "dry_run": False})
        assert purged["done"] == 1
        is_broken[0] = False
        done = await browser.post(f"{path}/dead-letters/retry", {"dry_run": False})
        assert (done["done"], done["refused"]) == (9, [])
        assert (await browser.get(f"{path}/dead-letters"))["letters"] == []
        marked = await browser.get(f"{path}/dead-letters", status="all")
        assert sorted(each["status"] for each in marked["letters"]) == ["purged", *["retried"] * 9]
        mark = (await browser.get(f"{path}/dead-letters/{ids[1].replace('/', '-')}"))["mark"]
        assert mark["by"].startswith("console ")
        again = await browser.post(f"{path}/dead-letters/retry", {"dry_run": False})
        assert (again["done"], again["marked_before"]) == (0, 10)
        operation = (await browser.get(f"{path}/operation"))["operation"]
        assert operation is None or operation["running"] is False
        await browser.until(path, lambda each: each["summary"]["rows"] == 109)
    results = await rows_of(f"{name}.out", broker_url)
    assert len(results) == len(set(results)) == 99


async def test_replay(broker_url: str, name: str, tmp_path: Path) -> None:
    """A plan shows what would happen, and is carried out only if nobody works, and if it still holds."""
    pipeline, is_broken = failing(name)
    is_broken[0] = False
    path = f"{API}/sessions/rowmill.{name}"
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(60)], broker=broker_url)
    async with a_worker(broker_url, pipeline, tmp_path), a_console(broker_url) as browser:
        await browser.until(f"{API}/overview", lambda each: name in [s["name"] for s in each["sessions"]])
        await browser.until(path, lambda each: each["summary"]["rows"] == 60)
        reach = await browser.get(f"{path}/replay/range")
        assert reach["first_ms"] <= reach["last_ms"]
        assert sum(each["end"] - each["first"] for each in reach["partitions"]) >= 60

        plan = await browser.post(f"{path}/replay/plan", {"to": {"how": "earliest"}})
        assert (plan["can_execute"], plan["paused"], plan["workers"]) == (False, False, 1)
        assert plan["run_again"] >= 60
        busy = await browser.post(f"{path}/replay/execute", {"plan_id": plan["plan_id"]}, expect=409)
        assert "pause" in busy["error"]["message"]
        await browser.post(f"{path}/pause")
        await browser.until(path, lambda each: each["summary"]["state"] == "paused")

        plan = await browser.post(f"{path}/replay/plan", {"to": {"how": "datetime", "value": reach["first_ms"]}})
        assert plan["can_execute"]
        other = await browser.post(f"{path}/replay/plan", {"to": {"how": "shift", "value": -1}})
        done = await browser.post(f"{path}/replay/execute", {"plan_id": plan["plan_id"]})
        assert (done["failed"], {move["to"] for move in done["moved"] if move["run_again"]}) == ([], {0})
        await browser.post(f"{path}/replay/execute", {"plan_id": plan["plan_id"]}, expect=404)
        stale = await browser.post(f"{path}/replay/execute", {"plan_id": other["plan_id"]}, expect=409)
        assert "plan anew" in stale["error"]["remedy"]
        await browser.post(f"{path}/resume")
        await browser.until(path, lambda each: each["summary"]["rows"] == 120)
    assert await rows_of(f"{name}.out", broker_url) == sorted([*range(60)] * 2)


@pytest.mark.parametrize(
    ("to", "setting"),
    [
        ({"how": "offset"}, "to.value"),
        ({"how": "offset", "value": -1}, "to.value"),
        ({"how": "offset", "value": "x"}, "to.value"),
        ({"how": "duration", "value": "a week"}, "to.value"),
        ({"how": "datetime", "value": "yesterday"}, "to.value"),
        ({"how": "earliest", "value": 3}, "to.value"),
        ({"how": "file", "value": "/etc/passwd"}, "to.how"),
        ({"value": 3}, "to.how"),
    ],
)
async def test_replays_that_make_no_sense(tmp_path: Path, to: dict[str, Any], setting: str) -> None:
    """They are refused with what was wrong."""
    url = f"local://{tmp_path}/broker"
    await _one_session(url, tmp_path)
    async with a_console(url) as browser:
        await browser.until(f"{API}/overview", lambda each: each["sessions"])
        answer = await browser.post(f"{API}/sessions/rowmill.p/replay/plan", {"to": to}, expect=400)
        assert answer["error"]["setting"] == setting


async def _one_session(url: str, folder: Path) -> None:
    """A session named p, whose worker has gone."""
    await asyncio.to_thread(publish, "p", [{"n": n} for n in range(5)], broker=url)
    async with a_worker(url, failing("p")[0], folder):
        broker = open_broker(url, environment={})
        await broker.start()
        try:
            async with asyncio.timeout(30):
                while True:
                    found = await session_statuses(broker, clock=SystemClock())
                    if found and found[0].rows.rows == 5:
                        break
                    await asyncio.sleep(0.05)
        finally:
            await broker.close()


# --- topics ----------------------------------------------------------------------------------------------------


async def test_topics_and_records(broker_url: str, name: str) -> None:
    """Topics with what they are for; records from any place, with all their bytes; and the end of one as it grows."""
    broker = open_broker(broker_url, environment={})
    await broker.start()
    try:
        await broker.create_topics([TopicSpec(name, 2)])
        producer = broker.producer()
        await producer.start()
        rows = [Outgoing(b"k%d" % n, b'{"n": %d}' % n, 1_000 + n, (("h", b"\xff\x00"),)) for n in range(30)]
        await (await producer.send(TopicPartition(name, 0), rows))
        odd = [
            Outgoing(None, None, 2_000),
            Outgoing(b"\xfe", PAYLOAD.encode(), 2_001),
            Outgoing(b"", b"\x00\x01" * 5_000, 2_002),
        ]
        await (await producer.send(TopicPartition(name, 1), odd))
        async with a_console(broker_url) as browser:
            path = f"{API}/topics/{name}/records"
            topics = {each["name"]: each for each in (await browser.get(f"{API}/topics"))["topics"]}
            assert (topics[name]["partitions"], topics[name]["records"]) == (2, 33)
            newest = await browser.get(path, limit=2)
            assert [(each["partition"], each["offset"]) for each in newest["records"]] == [(1, 2), (1, 1)]
            big, script = (each["value"] for each in newest["records"])
            assert (big["size"], big["text"], big["cut"]) == (10_000, None, 10_000 - 4_096)
            assert big["hex"].startswith("00000000  00 01")
            assert (script["text"], script["json"]) == (PAYLOAD, None)
            first = await browser.get(path, partition=0, limit=10, begin="earliest")
            assert [each["offset"] for each in first["records"]] == [*range(10)]
            assert first["next"] == {"from": "10"}
            assert first["records"][3]["key"]["text"] == "k3"
            assert first["records"][3]["headers"][0]["value"]["hex"].startswith("00000000  ff 00")
            at = await browser.get(path, begin="time:1020", partition=0)
            assert [each["offset"] for each in at["records"]] == [*range(20, 30)]
            assert (await browser.get(path, begin="999", partition=0))["records"] == []
            queries: list[dict[str, Any]] = [{"limit": 0}, {"limit": 999}, {"begin": "x"}, {"partition": -1}, {"no": 1}]
            for query in queries:
                await browser.get(path, expect=400, **query)
            await browser.get(path, expect=404, partition=7)
            await browser.get(f"{API}/topics/no-such-topic/records", expect=404)
            async with browser.stream(f"{API}/topics/{name}/tail") as events:
                async with asyncio.timeout(20):
                    kind, _ = await anext(events)
                    assert kind == "beat"
                    await asyncio.sleep(1.0)
                    await (await producer.send(TopicPartition(name, 0), [Outgoing(b"new", b"line\n\ndata: x", 5)]))
                    async for kind, data in events:
                        if kind == "record":
                            assert "line\\n\\ndata: x" in data
                            break
        await producer.close()
    finally:
        await broker.close()


# --- the console itself ----------------------------------------------------------------------------------------


async def test_the_description_is_what_is_served(tmp_path: Path) -> None:
    """What is served below /api is described, and the other way round; parameters are those of the paths."""
    async with a_console(f"local://{tmp_path}/broker") as browser:
        document = await browser.get(f"{API}/openapi.json")
        described = {(method.upper(), path) for path, each in document["paths"].items() for method in each}
        served = set()
        app = browser.console._application()
        for route in app.router.routes():
            resource = route.resource
            path = resource.canonical if resource is not None else ""
            if (path.startswith("/api") or path == "/health") and route.method != "HEAD":
                served.add((route.method, path))
        assert described == served
        for path, methods in document["paths"].items():
            for operation in methods.values():
                in_path = {each["name"] for each in operation["parameters"] if each["in"] == "path"}
                assert in_path == set(re.findall(r"\{([a-z]+)\}", path))
        names = re.findall(r"#/components/schemas/(\w+)", str(document))
        assert set(names) <= set(document["components"]["schemas"])


BAD_BODIES: list[Any] = [
    b"",
    b"{",
    b"[]",
    b'"x"',
    b"null",
    b'{"dry_run": "yes"}',
    b'{"dry_run": true, "surprise": 1}',
    b'{"dry_run": true, "ids": "all"}',
    b'{"dry_run": true, "ids": ["../../etc"]}',
    b'{"dry_run": true, "filter": {"since_ms": -1}}',
    b'{"dry_run": true, "filter": {"since_ms": 1e400}}',
    b'{"dry_run": true, "to": "rowmill.events"}',
    b'{"dry_run": true, "to": "a/../b"}',
    b"[" * 100_000,
    b"\xff\xfe",
]


async def test_bodies_that_make_no_sense(tmp_path: Path) -> None:
    """Each is refused as what it is, and none is a bug of ours."""
    url = f"local://{tmp_path}/broker"
    await _one_session(url, tmp_path)
    async with a_console(url) as browser:
        await browser.until(f"{API}/overview", lambda each: each["sessions"])
        await browser.post(f"{API}/sessions/rowmill.p/dead-letters/retry", {"dry_run": True})
        headers = {"Origin": browser.origin, CSRF_HEADER: browser.csrf, "Content-Type": "application/json"}
        address = f"{browser.origin}{API}/sessions/rowmill.p/dead-letters/retry"
        for body in BAD_BODIES:
            async with browser.session.post(address, data=io.BytesIO(body), headers=headers) as response:
                assert response.status == 400, (body[:50], await response.text())
                validate(await response.json(), "Error")


@pytest.mark.parametrize(
    "path",
    [
        "/sessions/nothing",
        "/sessions/rowmill.nothing",
        "/sessions/rowmill.p%0d%0aX-Evil:%201",
        "/sessions/%3Cscript%3E",
        "/sessions/..%2f..%2fetc",
        "/sessions/rowmill.p/series?window=2s",
        "/sessions/rowmill.p/series?window=10s&window=1m",
        "/sessions/rowmill.p/series?since_ms=9&until_ms=3",
        "/sessions/rowmill.p/dead-letters?limit=-1",
        "/sessions/rowmill.p/dead-letters?after=1",
        "/sessions/rowmill.p/dead-letters/0-x",
        "/topics/a%2Fb/records",
        "/topics/%00/records",
        "/topics/..%2f..%2fx/tail",
        "/live?group=x%0aevent:%20y",
        "/nothing",
    ],
)
async def test_paths_that_make_no_sense(tmp_path: Path, path: str) -> None:
    """They are answered with a reason, as JSON, and nothing of them becomes a header."""
    async with (
        a_console(f"local://{tmp_path}/broker") as browser,
        browser.session.get(f"{browser.origin}{API}{path}") as response,
    ):
        assert response.status in {400, 404}, await response.text()
        assert "X-Evil" not in response.headers
        validate(await response.json(), "Error")


@pytest.mark.parametrize(
    "path",
    [
        "/static/../console.py",
        "/static/..%2fconsole.py",
        "/static/%2e%2e/%2e%2e/console.py",
        "/static/....//console.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/..\\console.py",
        "/static/%00",
        "/static/",
        "/static/vendor/",
    ],
)
async def test_files_of_others(tmp_path: Path, path: str) -> None:
    """Below /static there is what belongs there, and no way out."""
    async with a_console(f"local://{tmp_path}/broker") as browser:
        reader, writer = await asyncio.open_connection("127.0.0.1", browser.console.guard.port)
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        assert answer.split(b" ")[1] in {b"400", b"404", b"403"}, answer[:300]
        assert b"root:" not in answer
        assert b"import annotations" not in answer


async def test_a_second_console_is_refused(tmp_path: Path) -> None:
    """One console per broker; and another process's port is left to it."""
    url = f"local://{tmp_path}/broker"
    async with a_console(url) as browser:
        await browser.until(f"{API}/overview", lambda each: each["history"]["state"] == "live")
        with pytest.raises(RowmillError, match="console runs on"):
            async with a_console(url):
                pass
        taken = Console(f"local://{tmp_path}/other", port=browser.console.guard.port)
        with pytest.raises(ConfigError, match="another process listens there"):
            await taken.run(asyncio.Event())


async def test_read_only(tmp_path: Path) -> None:
    """Nothing can be changed, and it says so; what is only looked at can be."""
    url = f"local://{tmp_path}/broker"
    await _one_session(url, tmp_path)
    async with a_console(url, read_only=True) as browser:
        overview = await browser.until(f"{API}/overview", lambda each: each["sessions"])
        assert overview["read_only"] is True
        path = f"{API}/sessions/rowmill.p"
        for action in ("pause", "resume", "cancel"):
            answer = await browser.post(f"{path}/{action}", {}, expect=403)
            assert answer["error"]["setting"] == "--read-only"
        await browser.post(f"{path}/dead-letters/purge", {"dry_run": False}, expect=403)
        plan = await browser.post(f"{path}/replay/plan", {"to": {"how": "earliest"}})
        await browser.post(f"{path}/replay/execute", {"plan_id": plan["plan_id"]}, expect=403)


async def test_streams_are_few_and_end_with_the_console(tmp_path: Path) -> None:
    """Further streams are turned away; those that are open do not hold up the end."""
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        browser = await stack.enter_async_context(a_console(f"local://{tmp_path}/broker"))
        streams = [await browser.session.get(f"{browser.origin}{API}/live") for _ in range(64)]
        assert {stream.status for stream in streams} == {200}
        async with browser.session.get(f"{browser.origin}{API}/live") as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "10"
        began = loop.time()
    assert loop.time() - began < 8
    for stream in streams:
        stream.close()


async def test_it_goes_on_when_the_history_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Faust the sessions are shown and steered all the same, and it says why the history stands still."""
    from rowmill.streams.console import faust_app

    async def fail(*_: Any) -> None:
        raise RuntimeError("Faust is broken")

    monkeypatch.setattr(faust_app._Life, "live", fail)
    url = f"local://{tmp_path}/broker"
    await _one_session(url, tmp_path)
    async with a_console(url) as browser:
        overview = await browser.until(
            f"{API}/overview", lambda each: each["sessions"] and each["history"]["state"] == "stopped"
        )
        assert "Faust is broken" in overview["history"]["message"]
        assert overview["sessions"][0]["rows"] == 5
        await browser.post(f"{API}/sessions/rowmill.p/pause")
        await browser.until(f"{API}/sessions/rowmill.p", lambda each: each["summary"]["state"] == "paused")
        assert (await browser.get("/health"))["status"] == "ok"
