"""How the console's pages look and behave in a browser, with made-up figures behind them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from support.console_app import SampleConsole, by_now
from support.console_samples import EVIL
from support.small_png import save_small

from .conftest import Visitor

IMAGES = Path(__file__).parents[2] / "docs" / "images"
WRITE = "ROWMILL_WRITE_IMAGES"
GROUP = "/sessions/rowmill.enrich"
PAGES = {
    "overview": "/", "session": GROUP, "dead-letters": f"{GROUP}/dead-letters", "replay": f"{GROUP}/replay",
    "topics": "/topics", "topic": "/topics/orders", "dead-letter": f"{GROUP}/dead-letters/0-1200",
}  # fmt: skip

Visit = Callable[..., Visitor]
Serve = Callable[..., str]


def settle(page: Page) -> None:
    """Wait until everything that a page loads is there, and drawn."""
    page.wait_for_load_state("load")
    expect(page.locator("#theme")).to_be_visible()
    if page.locator(".chart").count():
        expect(page.locator(".chart canvas").first).to_be_visible()


def act(page: Page, name: str) -> None:
    """Open what a page is about."""
    if name == "dead-letters":
        page.locator("[data-letter]").first.click()
        expect(page.locator("aside .letter-body")).to_be_visible()
    if name == "replay":
        page.get_by_role("button", name="Make the plan").click()
        expect(page.get_by_role("heading", name="The plan")).to_be_visible()
    if name == "topic":
        page.locator(".record summary").first.click()


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(360, "light"), (360, "dark"), (768, "light"), (1280, "dark"), (1920, "light"), (1920, "dark")],
)
def test_every_page_fits(visitor: Visit, samples: Serve, width: int, scheme: str) -> None:
    """At any width nothing is wider than the window, and nothing complains: no script, no content policy.

    With ROWMILL_WRITE_IMAGES set, the pictures of docs/images are made anew.
    """
    person, url = visitor(width, scheme, reduced_motion="reduce"), samples()
    for name, path in PAGES.items():
        page = person.page()
        page.goto(url + path)
        settle(page)
        act(page, name)
        wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider <= 0, f"{name} is {wider} px wider than {width} px"
        if os.environ.get(WRITE) and width in {360, 1920} and name in {"overview", "session", "dead-letters", "replay"}:
            page.evaluate("scrollTo(0, 0)")
            shot = page.screenshot(full_page=width == 1920 and name == "session")
            save_small(shot, IMAGES / f"console-{name}-{width}-{scheme}.png")
        page.close()


def test_tabs_that_nobody_sees_let_go_of_their_stream(visitor: Visit, samples: Serve) -> None:
    """A browser has six connections to one address: with one held by each tab, the seventh page would never come."""
    person, url = visitor(), samples()
    seen = "Object.defineProperty(document, 'hidden', {get: () => %s, configurable: true});"
    seen += "document.dispatchEvent(new Event('visibilitychange'))"
    pages: list[Page] = []
    for n in range(8):
        if n == 6:
            pages[-1].wait_for_timeout(4_000)  # who turns to another tab for a moment keeps his
        page = person.page()
        page.goto(f"{url}/")
        expect(page.locator("#connection")).to_have_text("live")
        page.evaluate(seen % "true")
        pages.append(page)
    with pages[0].expect_response(re.compile("part=live")):
        pages[0].evaluate(seen % "false")
    expect(pages[0].locator("#connection")).to_have_text("live")


def test_what_comes_from_topics_stays_text(visitor: Visit, samples: Serve) -> None:
    """Markup in keys, values, headers and messages is shown as it is; no script of it runs, no image is asked for."""
    person, url = visitor(), samples()
    page = person.page()
    page.goto(f"{url}{GROUP}/dead-letters")
    settle(page)
    expect(page.locator(".letters")).to_contain_text(EVIL)
    page.locator("[data-letter]").first.click()
    expect(page.locator("aside")).to_contain_text(EVIL)
    page.goto(f"{url}/topics/orders")
    expect(page.locator("#records")).to_contain_text(EVIL)
    page.goto(f"{url}/sessions/{EVIL.replace('/', '')}")
    assert page.evaluate("window.evil") is None
    person.tolerated.append("404")


def test_nothing_moves_under_the_reader(visitor: Visit, samples: Serve) -> None:
    """Updates keep focus, scroll position, open details, marked text, and the very elements of the page."""
    page = visitor().page()
    page.goto(samples() + GROUP)
    settle(page)
    page.get_by_role("button", name="Pause").focus()
    page.evaluate(
        "document.querySelector('.chart').scrollIntoView(); window.kept = document.querySelector('.grid tbody tr')"
    )
    place = page.evaluate("scrollY")
    for _ in range(2):
        with page.expect_response(re.compile("part=live")):
            pass
    page.wait_for_timeout(100)
    assert page.evaluate("document.activeElement.dataset.action") == "pause"
    assert page.evaluate("scrollY") == place
    assert page.evaluate("window.kept.isConnected")
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
    page.wait_for_timeout(2_500)
    assert page.evaluate("String(getSelection())") == "enrich"


def test_a_change_of_state_is_read_out(visitor: Visit, samples: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hears the page instead of seeing it is told that the session is paused now, and not every figure."""
    console = SampleConsole(by_now())
    page = visitor().page()
    page.goto(samples(console) + GROUP)
    settle(page)
    expect(page.locator("#announced")).to_be_empty()
    before = console.data.session("rowmill.enrich")
    assert before is not None
    paused = {
        **before,
        "summary": {**before["summary"], "state": "paused"},
        "status": {**before["status"], "activity": "paused"},
    }
    monkeypatch.setattr(console.data, "session", lambda _: paused)
    expect(page.locator("#announced")).to_have_text("The session is paused", timeout=15_000)
    expect(page.get_by_role("button", name="Resume")).to_be_visible()


def test_times_are_the_readers(visitor: Visit, samples: Serve) -> None:
    """A moment is shown in the reader's zone, with the machine's form behind it."""
    console = SampleConsole()
    page = visitor(timezone_id="Asia/Tokyo").page()
    page.goto(samples(console) + f"{GROUP}/dead-letters/0-1200")
    moment = page.locator("time[data-form=date]").first
    expect(moment).to_have_text("22 Nov 2026, 10:58:59")
    expect(moment).to_have_attribute("datetime", "2026-11-22T01:58:59.000Z")


def test_the_theme_is_remembered(visitor: Visit, samples: Serve) -> None:
    """The switch goes over the system's choice, also after a reload, and back to it."""
    page = visitor(scheme="light").page()
    page.goto(samples())
    settle(page)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    button = page.get_by_role("button", name="Theme")
    button.click()
    button.click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark
    page.get_by_role("button", name="Theme: dark").click()
    assert page.evaluate(ground) == light


def test_by_the_keyboard_alone(visitor: Visit, samples: Serve) -> None:
    """The first Tab offers to skip the bar, `/` goes to the filter, a dialog that closes gives the focus back."""
    console = SampleConsole(by_now())
    page = visitor().page()
    url = samples(console)
    page.goto(url)
    settle(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("/")
    page.keyboard.type("fraud")
    expect(page.locator(".sessions tbody tr")).to_have_count(1)
    assert page.url.endswith("?find=fraud&sort=state")
    page.goto(url + GROUP)
    settle(page)
    page.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.action") == "pause"
    page.keyboard.press("Enter")
    page.get_by_label("Reason").fill("new model")
    page.keyboard.press("Enter")
    expect(page.locator(".toast")).to_contain_text("pause is recorded")
    assert console.posted == [("/api/v1/sessions/rowmill.enrich/pause", {"reason": "new model"})]


def test_a_dry_run_comes_first(visitor: Visit, samples: Serve) -> None:
    """What a retry would do is counted and shown before it can be confirmed; closed, nothing has been done."""
    console = SampleConsole(by_now())
    page = visitor().page()
    page.goto(samples(console) + f"{GROUP}/dead-letters?type=HTTPError")
    settle(page)
    page.get_by_role("button", name="Retry all of this filter").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("412 found, 392 can be done")
    expect(dialog).to_contain_text("20 dead letters refused: the value was cut")
    expect(dialog.get_by_role("button", name="Retry 392 rows")).to_be_enabled()
    dialog.get_by_role("button", name="Cancel").click()
    assert [body["dry_run"] for _, body in console.posted] == [True]
    assert console.posted[0][1]["filter"] == {"type": "HTTPError"}


def test_some_dead_letters_are_chosen(visitor: Visit, samples: Serve) -> None:
    """Those that are ticked are named, and stay ticked while the page is updated."""
    console = SampleConsole(by_now())
    page = visitor().page()
    page.goto(samples(console) + f"{GROUP}/dead-letters")
    settle(page)
    for n in range(2):
        page.locator("input[name=pick]").nth(n).check()
    with page.expect_response(re.compile("part=live")):
        pass
    expect(page.locator("input[name=pick]:checked")).to_have_count(2)
    page.get_by_role("button", name="Purge 2 chosen").click()
    expect(page.get_by_role("dialog")).to_contain_text("2 dead letters: 0/1200, 1/1199")
    assert console.posted[0][1] == {"ids": ["0/1200", "1/1199"], "dry_run": True}


def test_without_scripts(visitor: Visit, samples: Serve) -> None:
    """With JavaScript off everything can be read, filters work, and what needs it is not offered."""
    page = visitor(java_script_enabled=False).page()
    url = samples()
    page.goto(f"{url}/?find=geo")
    expect(page.locator(".sessions tbody tr")).to_have_count(1)
    page.goto(url + GROUP)
    expect(page.locator("[data-fact=lag]")).to_contain_text("48,211")
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    page.goto(f"{url}{GROUP}/dead-letters/0-1200")
    expect(page.locator("[data-panel=hex]").first).to_be_visible()


def test_read_only_offers_no_change(visitor: Visit, samples: Serve) -> None:
    """A console that only shows has no button that would change something, and says so."""
    page = visitor().page()
    url = samples(read_only=True)
    page.goto(url + GROUP)
    settle(page)
    expect(page.get_by_text("read-only", exact=True)).to_be_visible()
    assert page.locator("[data-action]").count() == 0
    page.goto(f"{url}{GROUP}/dead-letters")
    settle(page)
    assert page.locator("[data-letters-action]").count() == 0


def test_a_broken_line_is_said(visitor: Visit, samples: Serve, request: pytest.FixtureRequest) -> None:
    """When the console does not answer any more the page says so, and keeps what it shows."""
    person = visitor()
    person.tolerated += ["Failed to load resource", "ERR_", "htmx"]
    page = person.page()
    page.goto(samples() + GROUP)
    settle(page)
    expect(page.locator("#connection")).to_have_text("live")
    page.context.set_offline(True)
    page.evaluate("document.getElementById('live').dispatchEvent(new CustomEvent('rowmill:changed'))")
    expect(page.locator("[data-fact=lag]")).to_contain_text("48,211")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    expect(page.locator("#dialog-problem")).to_contain_text("The console does not answer")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visitor: Visit, samples: Serve, scheme: str) -> None:
    """axe-core finds no breach of WCAG 2.2 AA on any page."""
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    person, url = visitor(1280, scheme, bypass_csp=True), samples()
    found: dict[str, Any] = {}
    for name, path in PAGES.items():
        page = person.page()
        page.goto(url + path)
        settle(page)
        act(page, name)
        page.evaluate(axe)
        result = page.evaluate(
            "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice']})"
        )
        for each in result["violations"]:
            found[f"{name}: {each['id']}"] = [node["html"][:160] for node in each["nodes"][:4]]
        page.close()
    assert found == {}
