"""A browser for the console's tests: Debian's Chromium, driven by Playwright; its pages may complain of nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, sync_playwright
from support.console_app import SampleConsole, by_now

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
NOTED = """
window.__violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.__violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


def _find_chromium() -> str:
    found = os.environ.get("ROWMILL_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found and Path(found).exists():
        return found
    message = "the console's pages were not tested: no Chromium (apt-get install chromium, or ROWMILL_TEST_CHROMIUM=…)"
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(f"CI must not skip tests. {message}", pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser; each context of it has a fresh profile.

    Not of the whole session: while Playwright's synchronous side is there an event loop runs in this thread, and no
    asynchronous test of another file could.
    """
    path = _find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visitor:
    """A person with a browser of their own, and all that it complained of.

    Attributes:
        context: cookies and storage.
        complaints: errors of scripts and of loading, dialogs, violations of the content policy.
        tolerated: words of complaints that a test expects.
    """

    context: BrowserContext
    complaints: list[str] = field(default_factory=list)
    tolerated: list[str] = field(default_factory=list)

    def page(self) -> Page:
        """A new tab."""
        page = self.context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: self.complaints.append(f"script: {error}"))
        page.on("console", self._said)
        page.on("dialog", self._asked)
        return page

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def _asked(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def violations(self, page: Page) -> list[str]:
        """What the content policy forbade on a page."""
        return list(page.evaluate("window.__violations"))

    def check(self) -> None:
        """Nothing was complained of but what is tolerated."""
        for page in self.context.pages:
            with contextlib.suppress(Exception):  # a page that is closed, or never loaded
                self.complaints.extend(self.violations(page))
        left = [each for each in self.complaints if not any(word in each for word in self.tolerated)]
        assert left == []


@pytest.fixture
def visitor(chromium: Browser, samples: object) -> Iterator[Callable[..., Visitor]]:  # who leaves before these end
    """Make visitors, ``visitor(width=360, scheme="dark", **more for new_context)``, and check what they saw."""
    made: list[Visitor] = []

    def make(width: int = 1440, scheme: str = "light", **options: Any) -> Visitor:
        settings: dict[str, Any] = {
            "viewport": {"width": width, "height": 740 if width < 600 else 900},
            "timezone_id": "Europe/Berlin", "locale": "en-GB", "color_scheme": scheme, **options,
        }  # fmt: skip
        person = Visitor(chromium.new_context(**settings))
        if settings.get("java_script_enabled", True):
            person.context.add_init_script(NOTED)
        made.append(person)
        return person

    yield make
    try:
        for person in made:
            person.check()
    finally:
        for person in made:
            person.context.close()


@pytest.fixture
def samples() -> Iterator[Callable[..., str]]:
    """Serve pages with made-up figures from a thread of its own: ``samples(**options of SampleConsole)`` is a URL."""
    with contextlib.ExitStack() as stack:

        def start(console: SampleConsole | None = None, **options: Any) -> str:
            return stack.enter_context(_served(console or SampleConsole(by_now(), **options)))

        yield start


@contextlib.contextmanager
def _served(console: SampleConsole) -> Iterator[str]:
    ready, stops = threading.Event(), []
    address: list[str] = []

    async def serve() -> None:
        stop = asyncio.Event()
        stops.append((asyncio.get_running_loop(), stop))
        runner = web.AppRunner(console.application(), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        console.guard.port = runner.addresses[0][1]
        address.append(f"http://127.0.0.1:{console.guard.port}")
        ready.set()
        try:
            await stop.wait()
        finally:
            await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield address[0]
    finally:
        for loop, stop in stops:
            loop.call_soon_threadsafe(stop.set)
        thread.join(20)
