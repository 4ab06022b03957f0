"""Rules, the alerts that they open and end, whom these are told, and the words of the file that says so."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rowmill.state.clock import SystemClock
from rowmill.state.errors import ConfigError
from rowmill.streams.console import alerts as alerts_module
from rowmill.streams.console.alert_rules import Action, AlertRules, Rule
from rowmill.streams.console.alerts import Alerts, found_by, post, run_command
from rowmill.streams.console.board import Alert, Board
from rowmill.streams.console.session_board import Facts
from rowmill.streams.event_records import EventRecord
from support.fake_clock import FakeClock

GROUP = "rowmill.reviews"
CALM = Facts(lag=0, state="executing", idle_seconds=0, budget=None, breakers={}, dead_letters=0)
ALERT = Alert("lag", GROUP, "5", 1_000, None, "6 rows are left, more than 5")


@pytest.mark.parametrize(
    ("rule", "facts", "subjects"),
    [
        (Rule(on="budget"), {"budget": Decimal("0.49")}, []),
        (Rule(on="budget"), {"budget": Decimal("0.8")}, ["0.5", "0.8"]),
        (Rule(on="budget"), {"budget": Decimal("1.2")}, ["0.5", "0.8", "1"]),
        (Rule(on="budget"), {"budget": None}, []),
        (Rule(on="breaker_open"), {"breakers": {"scorer": "w1", "store": "w2"}}, ["scorer", "store"]),
        (Rule(on="no_progress", seconds=60), {"lag": 5, "idle_seconds": 60}, [""]),
        (Rule(on="no_progress", seconds=60), {"lag": 5, "idle_seconds": 59.9}, []),
        (Rule(on="no_progress", seconds=60), {"lag": 0, "idle_seconds": 600}, []),
        (Rule(on="no_progress", seconds=60), {"lag": None, "idle_seconds": 600}, []),
        (Rule(on="no_progress", seconds=60), {"lag": 5, "idle_seconds": 600, "state": "paused"}, []),
        (Rule(on="no_progress", seconds=60), {"lag": 5, "idle_seconds": 600, "state": "idle"}, [""]),
        (Rule(on="lag", over=5), {"lag": 5}, []),
        (Rule(on="lag", over=5), {"lag": 6}, ["5"]),
        (Rule(on="lag", over=5), {"lag": None}, []),
        (Rule(on="dead_letters", over=3), {"dead_letters": 3}, []),
        (Rule(on="dead_letters", over=3), {"dead_letters": 4}, ["3"]),
    ],
)
def test_what_rules_find(rule: Rule, facts: dict[str, Any], subjects: list[str]) -> None:
    """Each at its bound and beyond."""
    assert [each.subject for each in found_by(rule, GROUP, replace(CALM, **facts))] == subjects


@pytest.mark.parametrize(
    ("pattern", "is_for"), [("*", True), ("reviews", True), ("rev*", True), ("orders", False), ("reviews.*", False)]
)
def test_rules_are_for_sessions_by_their_names(pattern: str, is_for: bool) -> None:
    """As ``rowmill status`` calls them."""
    assert Rule(on="lag", sessions=(pattern,)).is_for(GROUP) is is_for


class Scene:
    """Alerts on a board whose facts a test makes up."""

    def __init__(self, *rules: Rule, hold_off: float = 300.0, actions: tuple[Action, ...] = (Action(),)) -> None:
        self.clock = FakeClock()
        self.board = Board(self.clock)
        self.alerts = Alerts(self.board, AlertRules(rules=rules, actions=actions, hold_off=hold_off), self.clock)
        self.told: list[Alert] = []
        self.alerts._tell = self.told.append  # type: ignore[method-assign, assignment]

    def look(self, lag: int) -> None:
        """With so many rows left."""
        self.board.tell(GROUP, lag=lag, state="executing")
        self.alerts.look()

    def states(self) -> list[bool]:
        """Whether each alert that was told was an end."""
        return [alert.until_ms is not None for alert in self.told]


def test_an_episode_is_told_once() -> None:
    """It opens, it lasts, it ends."""
    scene = Scene(Rule(on="lag", over=5))
    for lag in (5, 6, 700, 8, 5, 4):
        scene.look(lag)
        scene.clock.advance(1)
    assert scene.states() == [False, True]
    (alert,) = scene.board.alerts(GROUP)
    assert alert.until_ms is not None
    assert alert.until_ms - alert.since_ms == 3_000


def test_an_episode_that_comes_back_soon_is_shown_and_not_told() -> None:
    """Hold-off: something that flaps calls nobody ten times."""
    scene = Scene(Rule(on="lag", over=5), hold_off=60)
    for lag in (6, 0, 6, 0, 6):
        scene.look(lag)
        scene.clock.advance(10)
    assert scene.states().count(False) == 1
    assert scene.board.alerts(GROUP)[0].until_ms is None
    scene.look(0)
    scene.clock.advance(60)
    scene.look(6)
    assert scene.states().count(False) == 2


def test_what_is_open_at_a_restart_is_not_told_again() -> None:
    """The board keeps alerts, and the tables keep the board."""
    scene = Scene(Rule(on="lag", over=5))
    scene.look(6)
    again = Alerts(scene.board, AlertRules(rules=(Rule(on="lag", over=5),)), scene.clock)
    told: list[Alert] = []
    again._tell = told.append  # type: ignore[method-assign, assignment]
    again.look()
    assert told == []


def test_ended_alerts_are_forgotten_after_an_hour() -> None:
    """Nothing grows without a bound."""
    scene = Scene(Rule(on="lag", over=5))
    scene.look(6)
    scene.look(0)
    scene.clock.advance(3_601)
    scene.look(0)
    assert scene.board.alerts(None) == []


@asynccontextmanager
async def running(alerts: Alerts) -> AsyncIterator[None]:
    """Outlets at work until the block ends."""
    stop = asyncio.Event()
    task = asyncio.create_task(alerts.run(stop))
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(10):
            await task


def test_only_a_live_history_is_judged() -> None:
    """While events of yesterday are read, nothing is told of them."""

    async def scenario() -> list[Alert]:
        board = Board(SystemClock())
        alerts = Alerts(board, AlertRules(rules=(Rule(on="lag", over=5),)), SystemClock())
        board.tell(GROUP, lag=6, state="executing")
        board.stand("catching up")
        async with running(alerts):
            await asyncio.sleep(0.05)
        return board.alerts(None)

    assert asyncio.run(scenario()) == []


async def test_it_goes_on_after_a_bug(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Which is told once; a session that cannot be judged now may be judged later."""
    scene = Scene(Rule(on="lag", over=5))
    scene.board.stand("live")
    looks = 0

    def fail(_: str) -> None:
        nonlocal looks
        looks += 1
        raise ArithmeticError("odd")

    monkeypatch.setattr(alerts_module, "_LOOK_SECONDS", 0.001)
    scene.board.tell(GROUP, lag=6, state="executing")
    with monkeypatch.context() as patch:
        patch.setattr(scene.board, "facts", fail)
        async with running(scene.alerts), asyncio.timeout(10):
            while looks < 3:
                await asyncio.sleep(0.001)
    assert caplog.text.count("this is a bug in rowmill") == 1


async def test_functions_hear_of_their_events_in_order(caplog: pytest.LogCaptureFixture) -> None:
    """Plain ones and async ones; one that fails is logged and the next is called; aliases are known."""
    alerts = Alerts(Board(FakeClock()), AlertRules(), FakeClock())
    heard: list[str] = []

    def fail(event: EventRecord) -> None:
        heard.append(f"fail {event.subject}")
        raise ValueError("mine")

    async def note(event: EventRecord) -> None:
        heard.append(f"note {event.subject}")

    alerts.on("breaker_opened", fail)
    alerts.on("breaker_open", note)
    alerts.on("breaker_open", lambda event: heard.append(f"plain {event.subject}"))
    event = EventRecord(
        kind="breaker_open", at_ms=1, pipeline="a", session="live", group=GROUP, worker="w", subject="x"
    )
    async with running(alerts):
        alerts.hear([event, replace(event, kind="other"), replace(event, subject="y")])
    assert heard == ["fail x", "note x", "plain x", "fail y", "note y", "plain y"]
    assert "mine" in caplog.text


async def test_functions_that_hang_are_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """They have ten seconds each."""
    monkeypatch.setattr(alerts_module, "_CALL_SECONDS", 0.01)
    alerts = Alerts(Board(FakeClock()), AlertRules(), FakeClock())
    heard: list[str] = []

    async def hang(event: EventRecord) -> None:
        await asyncio.Event().wait()

    alerts.on("paused", hang)
    alerts.on("paused", lambda event: heard.append(event.kind))
    event = EventRecord(kind="paused", at_ms=1, pipeline="a", session="live", group=GROUP, worker="w")
    async with running(alerts):
        alerts.hear([event])
    assert heard == ["paused"]
    assert "TimeoutError" in caplog.text


async def test_plain_functions_that_hang_take_one_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of their own, which keeps no program from ending; they are called again when they have returned."""
    monkeypatch.setattr(alerts_module, "_CALL_SECONDS", 0.05)
    alerts = Alerts(Board(FakeClock()), AlertRules(), FakeClock())
    gate, threads, heard = threading.Event(), [threading.current_thread()], asyncio.Event()

    def hang(event: EventRecord) -> None:
        threads.append(threading.current_thread())
        if event.subject == "last":
            loop.call_soon_threadsafe(heard.set)
        gate.wait(30)

    loop = asyncio.get_running_loop()
    alerts.on("paused", hang)
    event = EventRecord(kind="paused", at_ms=1, pipeline="a", session="live", group=GROUP, worker="w")
    async with running(alerts), asyncio.timeout(20):
        alerts.hear([event] * 5)
        await alerts._calls.empty()
        assert len(threads) == 2
        assert threads[1].daemon
        assert caplog.text.count("it has not returned") == 4
        gate.set()
        while alerts._under_way:
            await asyncio.sleep(0.001)
        alerts.hear([replace(event, subject="last")])
        await heard.wait()


async def test_functions_hear_of_alerts() -> None:
    """Under the kind ``alert``, as they open and as they end."""
    clock = SystemClock()
    board = Board(clock)
    alerts = Alerts(board, AlertRules(rules=(Rule(on="lag", over=5),), actions=()), clock)
    heard: list[bool] = []
    alerts.on("alert", lambda alert: heard.append(alert.until_ms is None))
    async with running(alerts):
        for lag in (6, 0):
            board.tell(GROUP, lag=lag, state="executing")
            alerts.look()
    assert heard == [True, False]


@pytest.mark.parametrize(("kind", "function"), [("", print), ("no kind", print), (5, print), ("paused", "x")])
def test_what_cannot_be_registered_is_refused(kind: Any, function: Any) -> None:
    """At once, and not when the event comes."""
    with pytest.raises(ConfigError):
        Alerts(Board(FakeClock()), AlertRules(), FakeClock()).on(kind, function)


async def test_too_many_that_wait_push_out_the_oldest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A slow program holds up the others of its kind only, and no memory."""
    monkeypatch.setattr(alerts_module, "_MOST_WAITING", 3)
    alerts = Alerts(Board(FakeClock()), AlertRules(), FakeClock())
    heard: list[str] = []
    alerts.on("paused", lambda event: heard.append(event.subject))
    event = EventRecord(kind="paused", at_ms=1, pipeline="a", session="live", group=GROUP, worker="w")
    alerts.hear([replace(event, subject=str(n)) for n in range(5)])
    async with running(alerts):
        pass
    assert heard == ["2", "3", "4"]
    assert "oldest is dropped" in caplog.text


async def test_the_log_says_group_and_text(caplog: pytest.LogCaptureFixture) -> None:
    """One line each; ends only where asked for."""
    clock = SystemClock()
    rules = AlertRules(rules=(Rule(on="lag", over=5),), actions=(Action(ends=True),))
    board = Board(clock)
    alerts = Alerts(board, rules, clock)
    async with running(alerts):
        for lag in (6, 0):
            board.tell(GROUP, lag=lag, state="executing")
            alerts.look()
    assert [record.getMessage() for record in caplog.records] == [
        "rowmill.reviews: 6 rows are left, more than 5",
        "rowmill.reviews: 6 rows are left, more than 5 (is over)",
    ]


async def test_a_command_gets_json_on_its_input(tmp_path: Path) -> None:
    """Its arguments are taken as they are: no shell is involved."""
    file = tmp_path / "heard; rm -rf x"
    program = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    await run_command(Action(do="command", argv=(sys.executable, "-c", program, str(file))), ALERT)
    assert json.loads(file.read_bytes()) == {
        "state": "open",
        "rule": "lag",
        "group": GROUP,
        "subject": "5",
        "since_ms": 1_000,
        "until_ms": None,
        "text": ALERT.text,
    }


@pytest.mark.parametrize(
    ("argv", "timeout", "complaint"),
    [
        (("/no/such/program",), 5.0, "No such file"),
        ((sys.executable, "-c", "raise SystemExit(3)"), 20.0, "exited with 3"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), 0.3, "was killed"),
        (("sh", "-c", "sleep 60 & sleep 60"), 0.3, "was killed"),
    ],
)
async def test_a_command_that_fails_says_how(argv: tuple[str, ...], timeout: float, complaint: str) -> None:
    """And none outlives its time, nor its children."""
    with pytest.raises(RuntimeError, match=complaint):
        await run_command(Action(do="command", argv=argv, timeout=timeout), ALERT)


@asynccontextmanager
async def server(handler: Any) -> AsyncIterator[str]:
    """Something that takes webhooks."""
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def test_a_webhook_gets_json_and_its_token() -> None:
    """By POST, with the token of the environment variable that the file names."""
    heard: list[Any] = []

    async def take(request: web.Request) -> web.Response:
        heard.append((request.method, request.path, request.headers.get("Authorization"), await request.json()))
        return web.Response(status=204)

    async with server(take) as url:
        await post(Action(do="webhook", url=f"{url}/hook"), ALERT, "secret")
    ((method, path, authorization, told),) = heard
    assert (method, path, authorization) == ("POST", "/hook", "Bearer secret")
    assert told["text"] == ALERT.text


async def test_a_webhook_follows_no_redirect() -> None:
    """A server that was asked for does not choose another one, which might be inside."""
    paths: list[str] = []

    async def redirect(request: web.Request) -> web.Response:
        paths.append(request.path)
        raise web.HTTPFound("/elsewhere")

    async with server(redirect) as url:
        with pytest.raises(RuntimeError, match="302"):
            await post(Action(do="webhook", url=f"{url}/hook"), ALERT, "")
    assert paths == ["/hook"]


async def test_a_webhook_that_hangs_or_is_not_there_is_given_up() -> None:
    """Within its time; what is said of it holds no address, which may be a secret."""

    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(1)
        return web.Response()

    async with server(hang) as url:
        with pytest.raises(RuntimeError, match="did not answer") as raised:
            await post(Action(do="webhook", url=f"{url}/hook", timeout=0.1), ALERT, "")
        assert url not in str(raised.value)
    with pytest.raises(RuntimeError, match="did not answer"):
        await post(Action(do="webhook", url=f"{url}/hook", timeout=1), ALERT, "")


def test_the_file_is_read_as_toml_and_as_json(tmp_path: Path) -> None:
    """The same words in both."""
    toml, as_json = tmp_path / "alerts.toml", tmp_path / "alerts.json"
    toml.write_text(
        'hold_off = 60\n[[rule]]\non = "budget"\nfractions = [1, 0.5]\nsessions = ["a*"]\n'
        '[[rule]]\non = "lag"\nover = 10\n[[rule]]\non = "no_progress"\nseconds = 5\n[[rule]]\non = "breaker_open"\n'
        '[[action]]\ndo = "command"\nargv = ["page", "me"]\ntimeout = 3\nends = true\n'
        '[[action]]\ndo = "webhook"\nurl = "https://example.org/hook"\ntoken_env = "HOOK"\n'
    )
    as_json.write_text(
        json.dumps(
            {
                "hold_off": 60,
                "rule": [
                    {"on": "budget", "fractions": [0.5, 1], "sessions": ["a*"]},
                    {"on": "lag", "over": 10},
                    {"on": "no_progress", "seconds": 5},
                    {"on": "breaker_open"},
                ],
                "action": [
                    {"do": "command", "argv": ["page", "me"], "timeout": 3, "ends": True},
                    {"do": "webhook", "url": "https://example.org/hook", "token_env": "HOOK"},
                ],
            }
        )
    )
    rules = AlertRules.from_file(toml)
    assert rules == AlertRules.from_file(as_json)
    assert rules.rules[0] == Rule(on="budget", fractions=(0.5, 1.0), sessions=("a*",))
    assert rules.actions[0] == Action(do="command", argv=("page", "me"), timeout=3.0, ends=True)
    assert AlertRules.of({}) == AlertRules()


@pytest.mark.parametrize(
    ("value", "setting", "remedy"),
    [
        ([], "alerts", "table"),
        ({"rules": []}, "alerts", "no such setting"),
        ({"rule": {}}, "alerts.rule", r"\[\[rule\]\]"),
        ({"rule": [5]}, r"alerts.rule\[1\]", "table"),
        ({"rule": [{}]}, r"alerts.rule\[1\].on", "use one of budget"),
        ({"rule": [{"on": "lagg"}]}, r"alerts.rule\[1\].on", "use one of"),
        ({"rule": [{"on": "lag"}]}, r"alerts.rule\[1\].over", "whole number"),
        ({"rule": [{"on": "lag", "over": -1}]}, r"alerts.rule\[1\].over", "whole number"),
        ({"rule": [{"on": "lag", "over": 5, "seconds": 5}]}, r"alerts.rule\[1\]", "no such setting"),
        ({"rule": [{"on": "breaker_open"}, {"on": "no_progress", "seconds": 0}]}, r"alerts.rule\[2\].seconds", "1 to"),
        ({"rule": [{"on": "budget", "fractions": []}]}, r"alerts.rule\[1\].fractions", "numbers above 0"),
        ({"rule": [{"on": "budget", "fractions": ["a"]}]}, r"alerts.rule\[1\].fractions", "numbers above 0"),
        ({"rule": [{"on": "breaker_open", "sessions": "a"}]}, r"alerts.rule\[1\].sessions", "list of texts"),
        ({"action": [{"do": "mail"}]}, r"alerts.action\[1\].do", "log, command, webhook"),
        ({"action": [{"do": "command"}]}, r"alerts.action\[1\].argv", "name the program"),
        ({"action": [{"do": "command", "argv": "rm -rf"}]}, r"alerts.action\[1\].argv", "list of texts"),
        ({"action": [{"do": "webhook"}]}, r"alerts.action\[1\].url", "https://host/path"),
        ({"action": [{"do": "webhook", "url": "file:///etc/passwd"}]}, r"action\[1\].url", "https://host/path"),
        ({"action": [{"do": "webhook", "url": "http://[::1"}]}, r"action\[1\].url", "https://host/path"),
        ({"action": [{"do": "webhook", "url": 5}]}, r"action\[1\].url", "write an address"),
        ({"action": [{"do": "webhook", "url": "https://a:b@c/"}]}, r"action\[1\].url", "token_env"),
        ({"action": [{"do": "webhook", "url": "http://169.254.169.254/x"}]}, r"action\[1\].url", "link-local"),
        ({"action": [{"do": "webhook", "url": "http://a/", "token_env": 5}]}, r"action\[1\].token_env", "variable"),
        ({"action": [{"do": "log", "timeout": 5}]}, r"alerts.action\[1\]", "no such setting"),
        ({"action": [{"do": "log", "ends": "yes"}]}, r"alerts.action\[1\].ends", "true or false"),
        ({"hold_off": "long"}, "alerts.hold_off", "use a number"),
        ({"hold_off": float("nan")}, "alerts.hold_off", "use a number"),
    ],
)
def test_wrong_words_are_told(value: Any, setting: str, remedy: str) -> None:
    """Which setting, and what to write instead."""
    with pytest.raises(ConfigError, match=f"{setting}.*{remedy}"):
        AlertRules.of(value)


def test_no_password_is_shown() -> None:
    """An address with one is refused without it."""
    with pytest.raises(ConfigError) as raised:
        AlertRules.of({"action": [{"do": "webhook", "url": "https://me:hunter2@host/"}]})
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(("name", "content"), [("a.toml", b"= x"), ("a.json", b"{"), ("a.toml", b"\xff"), ("b", None)])
def test_files_that_cannot_be_read_are_told(tmp_path: Path, name: str, content: bytes | None) -> None:
    """Missing, damaged, or of another encoding."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="alerts"):
        AlertRules.from_file(file)
