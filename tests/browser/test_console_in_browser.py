"""The console on real brokers, with workers in processes of their own, as a person sees and uses it in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from rowmill import publish
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.brokers.open import open_broker

from .bench import Bench
from .conftest import Visitor
from .console_pipelines import EVIL

ROOT = Path(__file__).parents[2]
REVIEWS = ROOT / "examples" / "data" / "reviews.csv"
Visit = Callable[..., Visitor]
UNTIL_PAUSED = """() => new Promise((done) => {
  const give_up = Date.now() + 20_000;
  const look = () => {
    const is_over = document.querySelector(".head .state").textContent === "paused" || Date.now() > give_up;
    return is_over ? done() : requestAnimationFrame(look);
  };
  look();
})"""
"""Looks with every frame: expect() would look after 0.1, 0.25, 0.5 and 1 s."""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def bench(broker_url: str, name: str, tmp_path: Path) -> Iterator[Bench]:
    """Ends every process that a test started."""
    bench = Bench(broker_url, name, tmp_path)
    yield bench
    bench.close()


def session_page(bench: Bench, page: Page, url: str, part: str = "") -> None:
    """Open the page of the bench's session, once the console knows it."""
    bench.until(lambda: status_of(f"{url}/api/v1/sessions/rowmill.{bench.name}") == 200)
    page.goto(f"{url}/sessions/rowmill.{bench.name}{part}")


def digits(page: Page, fact: str) -> int:
    """The figure of that name, as the page shows it."""
    return int(page.locator(f"[data-fact='{fact}'] b").inner_text().replace(",", ""))


def test_end_figures_are_those_of_status(bench: Bench, visitor: Visit) -> None:
    """The reviews example runs to its end; what the page then shows is what ``rowmill status --json`` says."""
    bench.command("run", str(ROOT / "examples" / "reviews.py"), "--input", str(REVIEWS), "--session", bench.name)
    page = visitor().page()
    url = bench.console()
    status = bench.status(f"reviews.{bench.name}")
    assert status["rows"]["rows"] == 3_708
    page.goto(url)
    page.get_by_role("link", name=f"reviews.{bench.name}", exact=True).click()
    expect(page.locator(".head .state")).to_have_text(status["state"])
    expect(page.locator("[data-fact='rows done'] b")).to_have_text(f"{status['rows']['rows']:,}")
    assert digits(page, "results") == status["rows"]["results"]
    assert digits(page, "dead letters") == status["rows"]["dead_letters"]
    assert digits(page, "lag") == status["lag"]
    rows = page.locator("section:has(#partitions-title) tbody tr")
    assert rows.count() == len(status["partitions"])
    for row, partition in zip(rows.all(), status["partitions"], strict=True):
        cells = [cell.inner_text() for cell in row.locator("th, td").all()]
        assert cells[0] == f"{partition['topic']}/{partition['partition']}"
        assert cells[2:5] == [f"{partition[name]:,}" for name in ("committed", "end", "waiting")]


@pytest.mark.alone
def test_pause_and_resume_from_the_page(bench: Bench, visitor: Visit) -> None:
    """A click on Pause pauses the worker within two seconds, which the page shows by itself; Resume goes on."""
    publish(bench.name, [{"n": n} for n in range(20_000)], broker=bench.url)
    bench.worker("steady")
    page = visitor().page()
    session_page(bench, page, bench.console())
    expect(page.locator(".head .state")).to_have_text("executing", timeout=60_000)
    bench.until(lambda: len(bench.results()) > 50)
    page.get_by_role("button", name="Pause").click()
    page.get_by_label("Reason").fill("looking into it")
    began = time.monotonic()
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    page.evaluate(UNTIL_PAUSED)
    took = time.monotonic() - began
    expect(page.locator(".notice", has_text="looking into it")).to_be_visible()
    bench.until(lambda: "paused" in {worker["state"] for worker in bench.status()["workers"]}, 10)
    done = bench.results()
    time.sleep(1)
    assert bench.results() == done
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".head .state")).to_have_text("executing", timeout=20_000)
    bench.until(lambda: len(bench.results()) > len(done))
    assert took < 2, f"it took {took:.1f} s"


def test_dead_letters_are_looked_into_and_sent_again(bench: Bench, visitor: Visit) -> None:
    """A failing stage fills the list; one shows its bytes; after the fix "retry all" empties it, and each row has its
    result once."""
    publish(bench.name, [{"n": n} for n in range(100)], broker=bench.url)
    worker = bench.worker("mended")
    url, page = bench.console(), visitor().page()
    session_page(bench, page, url, "/dead-letters")
    expect(page.locator(".letters tbody tr")).to_have_count(20, timeout=60_000)
    page.locator("[data-letter]", has_text="ValueError").first.click()
    letter = page.locator("aside .letter-body")
    expect(letter).to_contain_text("is one of five")
    letter.get_by_role("tab", name="Hex").last.click()
    expect(letter.locator("[data-panel=hex]").last).to_contain_text("7b 22 6e 22 3a")  # {"n":
    bench.fixed.touch()
    assert worker.poll() is None
    page.get_by_role("button", name="Retry all of this filter").click()
    page.get_by_role("dialog").get_by_role("button", name="Retry 20 rows").click()
    expect(page.locator(".toast")).to_contain_text("20 dead letters sent to their source again", timeout=60_000)
    expect(page.get_by_text("No dead letter waits")).to_be_visible(timeout=30_000)
    bench.until(lambda: bench.results() == list(range(100)))
    page.get_by_label("status").select_option("retried")
    expect(page.locator(".letters tbody tr")).to_have_count(20, timeout=30_000)


def test_replay_is_planned_and_executed(bench: Bench, visitor: Visit) -> None:
    """A plan of the page moves nothing; the session paused, it is executed, and the rows run again once resumed."""
    publish(bench.name, [{"n": n} for n in range(40)], broker=bench.url)
    bench.fixed.touch()
    bench.worker("mended")
    bench.until(lambda: bench.results() == list(range(40)))
    url, page = bench.console(), visitor().page()
    session_page(bench, page, url, "/replay")
    page.get_by_role("radio", name="The first row there is").check()
    page.get_by_role("button", name="Make the plan").click()
    expect(page.locator("#plan")).to_contain_text("40", timeout=30_000)
    expect(page.get_by_role("button", name="Execute the plan")).to_be_disabled()
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    execute = page.get_by_role("button", name="Execute the plan")
    expect(execute).to_be_enabled(timeout=30_000)
    execute.click()
    page.get_by_role("dialog").get_by_role("button", name="Execute").click()
    expect(page.locator("#plan")).to_contain_text("moved", timeout=60_000)
    assert bench.results() == list(range(40))
    page.get_by_role("button", name="Resume").click()
    bench.until(lambda: bench.results() == sorted([*range(40), *range(40)]))


def test_markup_stays_text(bench: Bench, visitor: Visit) -> None:
    """Markup in keys, values, headers, messages and types of errors is nowhere taken for markup, and no policy is
    broken."""
    publish_evil(bench)
    bench.worker("evil")
    url, page = bench.console(), visitor().page()
    session_page(bench, page, url, "/dead-letters")
    expect(page.locator(".letters tbody tr")).to_have_count(3, timeout=60_000)
    page.locator("[data-letter]").first.click()
    expect(page.locator("aside")).to_contain_text("<script>window.evil=1</script>")
    session_page(bench, page, url)
    expect(page.locator(".log")).to_contain_text("<script>", timeout=30_000)
    for path in (f"/topics/{bench.name}", f"/topics/{bench.name}.dlq", "/topics", "/", "/topics/rowmill.events"):
        page.goto(url + path)
        for summary in page.locator("summary").all()[:3]:
            summary.click()
        assert page.evaluate("window.evil") is None
        assert page.evaluate("window.__violations") == []
    page.goto(f"{url}/topics/{bench.name}")
    page.get_by_role("button", name="Follow the end").click()
    expect(page.locator("#tail-note")).to_contain_text("Following the end")
    page.wait_for_timeout(1_000)
    publish_evil(bench)
    expect(page.locator(".record")).to_have_count(3, timeout=30_000)
    page.locator(".record summary").first.click()
    expect(page.locator(".record-body")).to_contain_text("<script>window.evil=1</script>")
    assert page.evaluate("window.evil") is None


def publish_evil(bench: Bench) -> None:
    """Three rows with markup wherever a row has text. In a thread, because Playwright's loop runs in this one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(_publish_evil(bench))).result(60)


async def _publish_evil(bench: Bench) -> None:
    broker = open_broker(bench.url)
    await broker.start()
    try:
        if bench.name not in await broker.topics():
            await broker.create_topics([TopicSpec(bench.name, 1)])
        producer = broker.producer()
        await producer.start()
        try:
            value = b'{"n": 1, "text": "%s"}' % EVIL.replace('"', '\\"').encode()
            rows = [
                Outgoing(EVIL.encode(), each, int(time.time() * 1000), ((EVIL, EVIL.encode()),))
                for each in (value, EVIL.encode(), b"\xff\xfe<script>")
            ]
            await (await producer.send(TopicPartition(bench.name, 0), rows))
        finally:
            await producer.close()
    finally:
        await broker.close()


# --- who may ask -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def another_site(target: str) -> Iterator[str]:
    """A page of somebody else's, on another port of this machine, that tries to steer the console."""
    page = f"""<!doctype html><title>elsewhere</title><form id=f method=post action="{target}"></form><script>
    const tries = [["POST", "application/json"], ["POST", "text/plain"]].map(([method, type]) =>
      fetch("{target}", {{method, credentials: "include", headers: {{"Content-Type": type}}, body: "{{}}"}})
      .then((r) => r.status, () => "refused"));
    Promise.all(tries).then((all) => document.title = all.join(" "));</script>""".encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def status_of(url: str, body: bytes | None = None, **headers: str) -> int:
    """How a request of no browser is answered."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    request = urllib.request.Request(url, body, named)  # noqa: S310 - an address of ours
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)


@pytest.mark.parametrize("broker_url", ["local"], indirect=True)
def test_nobody_elses_page_steers(bench: Bench, visitor: Visit) -> None:
    """A page of another origin cannot pause a session, by script or form, nor can a request under a foreign Host."""
    publish(bench.name, [{"n": 1}], broker=bench.url)
    bench.fixed.touch()
    bench.worker("mended")
    url, person = bench.console(), visitor()
    page = person.page()
    session_page(bench, page, url)
    target = f"{url}/api/v1/sessions/rowmill.{bench.name}/pause"
    person.tolerated += ["CORS", "Failed to load resource", "chrome-error", "ERR_"]
    with another_site(target) as elsewhere:
        page.goto(elsewhere)
        expect(page).to_have_title("refused refused")
        with page.expect_response(target) as answer:
            page.evaluate("document.getElementById('f').submit()")
        assert answer.value.status == 403
    assert status_of(f"{url}/api/v1/overview", Host="evil.example") == 403
    assert status_of(target, b"{}", Content_Type="application/json", Origin="http://evil.example") == 403
    assert status_of(target, b"{}", Content_Type="application/json") == 403
    assert bench.status()["wanted"] == "run"


@pytest.mark.parametrize("broker_url", ["local"], indirect=True)
def test_a_token_is_asked_for(bench: Bench, visitor: Visit) -> None:
    """With a token nothing is shown without it; a wrong one is refused; the right one, or the link that the command
    shows, lets in, the link once."""
    token = "correct-horse-battery-staple"
    (bench.folder / "token").write_text(f"{token}\n")
    url = bench.console("--token-file", str(bench.folder / "token"))
    assert status_of(f"{url}/api/v1/overview") == 401
    assert status_of(f"{url}/api/v1/overview", Authorization=f"Bearer {token}") == 200
    person = visitor()
    person.tolerated += ["401"]
    page = person.page()
    page.goto(f"{url}/topics")
    expect(page.get_by_role("heading", name="rowmill console")).to_be_visible()
    page.get_by_label("Token").fill("correct-horse-battery-stable")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("not the token")
    time.sleep(1.1)  # each wrong one keeps its sender waiting
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Topics")
    link = bench.login_link()
    for title in ("Sessions", "rowmill console"):
        other = visitor().page()
        other.goto(link)
        expect(other.get_by_role("heading", level=1)).to_have_text(title)


@pytest.mark.parametrize("broker_url", ["local"], indirect=True)
def test_the_command_itself(bench: Bench) -> None:
    """It says where it is, ends with 0 at SIGTERM, and says what to do about a port that is taken or an address that
    needs a token."""
    url = bench.console()
    port = url.rpartition(":")[2]
    bench.until(lambda: status_of(f"{url}/health") == 200)
    other = Bench(f"local://{bench.folder / 'another'}", bench.name, bench.folder)
    process = other.start("taken.log", "console", "--port", port)
    assert process.wait(60) == 2
    assert "another process listens there" in other.log("taken.log")
    process = other.start("open.log", "console", "--host", "0.0.0.0", "--port", "0")  # noqa: S104 - it is refused
    assert process.wait(60) == 2
    assert "set a token" in other.log("open.log")
    bench.stop(bench.processes[0])
    assert bench.processes[0].returncode == 0
    assert "Traceback" not in bench.log("console.log")
