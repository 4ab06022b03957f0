"""Warns of what rules find, once per episode, and calls what users registered for events."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, NamedTuple

import aiohttp

from ...state.clock import Clock
from ...state.codec import dumps
from ...state.errors import ConfigError
from ..event_records import EventRecord
from .alert_rules import Action, AlertRules, Rule
from .board import Alert, Board
from .session_board import IDLE_STATES, Facts

__all__ = ["Action", "AlertRules", "Alerts", "Rule"]

ALERT = "alert"
"""The kind under which functions are registered that hear of alerts."""

_log = logging.getLogger("rowmill.console.alerts")

_LOOK_SECONDS = 1.0
_KEPT_MS = 3_600_000
_MOST_WAITING = 1_000
_CALL_SECONDS = 10.0
_GOODBYE_SECONDS = 2.0
_ALIASES = {"breaker_opened": "breaker_open"}


class Found(NamedTuple):
    """What a rule finds: about what in the session, and in words."""

    rule: str
    group: str
    subject: str
    text: str


def found_by(rule: Rule, group: str, facts: Facts) -> Iterator[Found]:
    """What a rule finds in a session."""
    if rule.on == "budget" and facts.budget is not None:
        for fraction in rule.fractions:
            if facts.budget >= Decimal(str(fraction)):
                text = f"{float(facts.budget):.0%} of the budget is spent"
                yield Found(rule.on, group, f"{fraction:g}", text)
    elif rule.on == "breaker_open":
        for resource, worker in facts.breakers.items():
            yield Found(rule.on, group, resource, f"the breaker {resource!r} is open in worker {worker}")
    elif rule.on == "no_progress":
        if facts.lag and facts.idle_seconds >= rule.seconds and facts.state not in IDLE_STATES:
            text = f"{facts.lag:,} rows are left, and none was committed for {facts.idle_seconds:,.0f} s"
            yield Found(rule.on, group, "", text)
    elif rule.on == "lag":
        if facts.lag is not None and facts.lag > rule.over:
            yield Found(rule.on, group, f"{rule.over}", f"{facts.lag:,} rows are left, more than {rule.over:,}")
    elif rule.on == "dead_letters" and facts.dead_letters > rule.over:
        text = f"{facts.dead_letters:,} dead letters within a minute, more than {rule.over:,}"
        yield Found(rule.on, group, f"{rule.over}", text)


class Alerts:
    """Looks once per second. An alert opens when a rule finds something, and ends when it does not any more.

    Args:
        board: where the facts are, and where alerts are kept: after a restart of the console they are not told again.
        rules: what to warn of, and whom to tell.
        clock: time.
        environment: where tokens are; default: the process's.
    """

    def __init__(
        self, board: Board, rules: AlertRules, clock: Clock, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._board = board
        self._rules = rules
        self._clock = clock
        self._environment = os.environ if environment is None else environment
        self._functions: dict[str, list[Callable[[Any], Any]]] = {}
        self._outlets = [_Outlet(action.do, self._teller(action)) for action in rules.actions]
        self._calls = _Outlet("functions", self._call)
        self._has_failed = False
        self._under_way: set[int] = set()
        """Plain functions that are on their threads."""

    def on(self, kind: str, function: Callable[[Any], Any]) -> None:
        """Have a function called with each new event of a kind; with ``alert``: with each alert as it opens or ends.

        Functions are called one after the other, in the order in which they were registered; plain ones on a thread.
        One that fails or takes longer than 10 s is logged, and the next one is called. Each hears of an event at least
        once, of events older than a minute (those of the time when the console was down) never.

        Raises:
            ConfigError: that is no kind, or no function.
        """
        if not isinstance(kind, str) or not kind.isidentifier():
            raise ConfigError("kind", kind, "name one of docs/events.md, such as breaker_open, or alert")
        if not callable(function):
            raise ConfigError("function", function, "give something to call with the event")
        self._functions.setdefault(_ALIASES.get(kind, kind), []).append(function)

    def hear(self, events: Sequence[EventRecord]) -> None:
        """Events that were new; to be called on the event loop that ``run`` is called on."""
        for event in events:
            if event.kind in self._functions:
                self._calls.put((event.kind, event))

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``; what waits to be told then has two seconds."""
        outlets = [*self._outlets, self._calls]
        tasks = [asyncio.create_task(outlet.run()) for outlet in outlets]
        try:
            while not stop.is_set():
                if self._board.standing.state == "live":
                    self._look_on()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _LOOK_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*(outlet.empty() for outlet in outlets)), _GOODBYE_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _look_on(self) -> None:
        """Look, and go on after a bug, which is told once."""
        try:
            self.look()
        except Exception:  # noqa: BLE001 - alerts must not end for it
            if not self._has_failed:
                _log.exception("alerts cannot be looked for, which is tried again; this is a bug in rowmill")
            self._has_failed = True
        else:
            self._has_failed = False

    def look(self) -> None:
        """Compare what rules find now with the alerts that are open."""
        now_ms = self._clock.now_ms()
        found: dict[str, Found] = {}
        for group in self._board.groups():
            rules = [rule for rule in self._rules.rules if rule.is_for(group)]
            facts = self._board.facts(group) if rules else None
            if facts is not None:
                found |= {_key(each): each for rule in rules for each in found_by(rule, group, facts)}
        known = {alert.key: alert for alert in self._board.alerts(None)}
        for key, each in found.items():
            self._go_on(each, known.get(key), now_ms)
        self._close([alert for key, alert in known.items() if key not in found], now_ms)

    def _go_on(self, found: Found, before: Alert | None, now_ms: int) -> None:
        if before is not None and before.until_ms is None:
            return
        alert = Alert(found.rule, found.group, found.subject, now_ms, None, found.text)
        is_held_off = before is not None and now_ms - before.since_ms < self._rules.hold_off * 1000
        if is_held_off and before is not None:  # its time counts from when it was told
            alert = replace(alert, since_ms=before.since_ms)
        self._board.put_alert(alert)
        self._board.notify([alert.group])
        if not is_held_off:
            self._tell(alert)

    def _close(self, alerts: Collection[Alert], now_ms: int) -> None:
        kept_ms = max(_KEPT_MS, round(self._rules.hold_off * 1000))
        for alert in alerts:
            if alert.until_ms is None:
                ended = replace(alert, until_ms=now_ms)
                self._board.put_alert(ended)
                self._board.notify([alert.group])
                self._tell(ended)
            elif now_ms - alert.until_ms > kept_ms:
                self._board.drop_alert(alert)

    def _tell(self, alert: Alert) -> None:
        for action, outlet in zip(self._rules.actions, self._outlets, strict=True):
            if alert.until_ms is None or action.ends:
                outlet.put(alert)
        if ALERT in self._functions:
            self._calls.put((ALERT, alert))

    def _teller(self, action: Action) -> Callable[[Any], Any]:
        async def tell(alert: Alert) -> None:
            if action.do == "log":
                _log.warning("%s: %s%s", alert.group, alert.text, "" if alert.until_ms is None else " (is over)")
            elif action.do == "command":
                await run_command(action, alert)
            else:
                await post(action, alert, self._environment.get(action.token_env, "") if action.token_env else "")

        return tell

    async def _call(self, told: tuple[str, Any]) -> None:
        kind, subject = told
        for function in self._functions.get(kind, ()):
            try:
                async with asyncio.timeout(_CALL_SECONDS):
                    if inspect.iscoroutinefunction(function):
                        await function(subject)
                    else:
                        outcome = await self._on_a_thread(function, subject)
                        if inspect.isawaitable(outcome):
                            await outcome
            except Exception as error:  # noqa: BLE001 - it is the user's, and the next one is to be called
                _log.warning("a function for %s failed: %s: %s", kind, type(error).__name__, error)

    async def _on_a_thread(self, function: Callable[[Any], Any], subject: Any) -> Any:
        """What a plain function returns.

        On a thread of its own, as one that never returns must take none of the loop's few, nor keep the program from
        ending; it is not called again before it has returned.
        """
        if id(function) in self._under_way:
            raise RuntimeError("it has not returned since it was called before")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def settle(outcome: Any, error: BaseException | None) -> None:
            self._under_way.discard(id(function))
            if not done.done():
                done.set_result(outcome) if error is None else done.set_exception(error)

        def work() -> None:
            outcome, error = None, None
            try:
                outcome = function(subject)
            except Exception as caught:  # noqa: BLE001 - raised on the other side
                error = caught
            with contextlib.suppress(RuntimeError):  # the program has ended meanwhile
                loop.call_soon_threadsafe(settle, outcome, error)

        self._under_way.add(id(function))
        threading.Thread(target=work, name="rowmill-console-function", daemon=True).start()
        return await done


class _Outlet:
    """Tells one after the other, so that a slow one holds up nobody else. Of too many that wait the oldest go."""

    def __init__(self, name: str, tell: Callable[[Any], Any]) -> None:
        self._name = name
        self._tell = tell
        self._waiting: deque[Any] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    def put(self, item: Any) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self._waiting.popleft()
            _log.warning("%s: more than %d wait to be told: the oldest is dropped", self._name, _MOST_WAITING)
        self._waiting.append(item)
        self._emptied.clear()
        self._filled.set()

    async def empty(self) -> None:
        """Until all are told."""
        await self._emptied.wait()

    async def run(self) -> None:
        while True:
            await self._filled.wait()
            while self._waiting:
                try:
                    await self._tell(self._waiting.popleft())
                except Exception as error:  # noqa: BLE001 - the next one may work
                    _log.warning("an alert could not be told by %s: %s", self._name, str(error) or type(error).__name__)
            self._filled.clear()
            self._emptied.set()


def payload(alert: Alert) -> dict[str, Any]:
    """What commands and webhooks get."""
    return {
        "state": "open" if alert.until_ms is None else "ended",
        "rule": alert.rule,
        "group": alert.group,
        "subject": alert.subject,
        "since_ms": alert.since_ms,
        "until_ms": alert.until_ms,
        "text": alert.text,
    }


async def run_command(action: Action, alert: Alert) -> None:
    """Run the program with the alert on its standard input; it and its children are killed when its time is over.

    Raises:
        RuntimeError: it failed.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *action.argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{action.argv[0]}: {error}") from error
    try:
        async with asyncio.timeout(action.timeout):
            await process.communicate(dumps(payload(alert)))
    except TimeoutError:
        raise RuntimeError(f"{action.argv[0]} took longer than {action.timeout:g} s and was killed") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"{action.argv[0]} exited with {process.returncode}")


async def post(action: Action, alert: Alert, token: str) -> None:
    """Post the alert.

    Raises:
        RuntimeError: it was not taken.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    limit = aiohttp.ClientTimeout(total=action.timeout)
    try:
        async with (
            aiohttp.ClientSession(timeout=limit, trust_env=False) as session,
            session.post(action.url, data=dumps(payload(alert)), headers=headers, allow_redirects=False) as answer,
        ):
            if answer.status >= 300:
                raise RuntimeError(f"the webhook answered {answer.status}")
    except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
        raise RuntimeError(f"the webhook did not answer: {type(error).__name__}") from error


def _key(found: Found) -> str:
    return f"{found.rule}/{found.group}/{found.subject}"
