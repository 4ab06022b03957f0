"""What the console warns of and whom it tells: read from a TOML or JSON file, checked to the last word.

hold_off = 300                       # seconds: an episode that comes back sooner is shown, and told to nobody

[[rule]]
on = "budget"                        # also: breaker_open, no_progress, lag, dead_letters
fractions = [0.5, 0.8, 1.0]
sessions = ["reviews", "orders.*"]   # as rowmill status calls them; default: all

[[action]]
do = "command"                       # also: log, webhook
argv = ["/usr/local/bin/page-me"]    # JSON on standard input
"""

from __future__ import annotations

import ipaddress
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from ...state.codec import loads
from ...state.errors import ConfigError
from ..session_refs import short_name

RuleKind: TypeAlias = Literal["budget", "breaker_open", "no_progress", "lag", "dead_letters"]
ActionKind: TypeAlias = Literal["log", "command", "webhook"]

HOLD_OFF_SECONDS = 300.0
_MOST_SECONDS = 7 * 86_400.0
_MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Something to warn of.

    Attributes:
        on: ``budget``: a fraction of it is spent; ``breaker_open``; ``no_progress``: rows are left and none was
            committed for ``seconds``; ``lag``: ``over`` so many rows are left; ``dead_letters``: ``over`` so many came
            within a minute.
        sessions: names with ``*`` and ``?``, as ``rowmill status`` shows them.
        fractions: of the budget.
        seconds: without a row.
        over: rows left, or dead letters per minute.
    """

    on: RuleKind
    sessions: tuple[str, ...] = ("*",)
    fractions: tuple[float, ...] = (0.5, 0.8, 1.0)
    seconds: float = 60.0
    over: int = 0

    def is_for(self, group: str) -> bool:
        """Whether it looks at this session."""
        return any(fnmatchcase(short_name(group), pattern) for pattern in self.sessions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Somebody to tell.

    Attributes:
        do: ``log``: a warning in the console's log; ``command``: a program that gets the alert as JSON on its standard
            input; ``webhook``: an address that gets it by POST.
        argv: the program and its arguments; no shell is involved.
        url: where to post to. Redirects are not followed.
        token_env: an environment variable with a token for ``Authorization: Bearer``.
        timeout: seconds that it may take.
        ends: whether the end of an alert is told as well.
    """

    do: ActionKind = "log"
    argv: tuple[str, ...] = ()
    url: str = field(default="", repr=False)
    token_env: str = ""
    timeout: float = 10.0
    ends: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertRules:
    """All of it.

    Attributes:
        rules: what to warn of.
        actions: whom to tell, each of every alert.
        hold_off: seconds for which an alert that was told is not told again.
    """

    rules: tuple[Rule, ...] = (
        Rule(on="budget"),
        Rule(on="breaker_open"),
        Rule(on="no_progress"),
        Rule(on="dead_letters", over=60),
    )
    actions: tuple[Action, ...] = (Action(),)
    hold_off: float = HOLD_OFF_SECONDS

    @classmethod
    def from_file(cls, path: Path) -> AlertRules:
        """From a file that ends in ``.json``, or is TOML.

        Raises:
            ConfigError: it cannot be read, or a word of it is wrong.
        """
        try:
            with path.open("rb") as file:
                content = file.read(_MOST_FILE_BYTES + 1)
            if len(content) > _MOST_FILE_BYTES:
                raise ConfigError("alerts", str(path), "it is larger than 1 MiB")
            value = loads(content) if path.suffix == ".json" else tomllib.loads(content.decode())
        except OSError as error:
            raise ConfigError("alerts", str(path), f"it cannot be read: {error.strerror}") from error
        except ValueError as error:
            kind = "JSON" if path.suffix == ".json" else "TOML"
            raise ConfigError("alerts", str(path), f"it is no {kind}: {error}") from error
        return cls.of(value)

    @classmethod
    def of(cls, value: Any) -> AlertRules:
        """From what such a file holds.

        Raises:
            ConfigError: a word of it is wrong.
        """
        table, usual = _Table("alerts", value), cls()
        found = cls(
            rules=tuple(_rule(each) for each in table.tables("rule")) if table.has("rule") else usual.rules,
            actions=tuple(_action(each) for each in table.tables("action")) if table.has("action") else usual.actions,
            hold_off=table.number("hold_off", HOLD_OFF_SECONDS, 0, _MOST_SECONDS),
        )
        table.done()
        return found


class _Table:
    """A table of the file; knows where it is, and which words nobody asked for."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        if not isinstance(value, dict):
            raise ConfigError(name, value, "write a table with names and values")
        self._left: dict[str, Any] = dict(value)
        self._known: list[str] = []

    def has(self, word: str) -> bool:
        return word in self._left

    def take(self, word: str, default: Any) -> Any:
        self._known.append(word)
        return self._left.pop(word, default)

    def tables(self, word: str) -> list[_Table]:
        value = self.take(word, [])
        if not isinstance(value, list):
            raise ConfigError(f"{self.name}.{word}", value, f"write a list of tables: [[{word}]]")
        return [_Table(f"{self.name}.{word}[{n}]", each) for n, each in enumerate(value, 1)]

    def choice(self, word: str, choices: tuple[str, ...]) -> Any:
        value = self.take(word, None)
        if value not in choices:
            raise ConfigError(f"{self.name}.{word}", value, f"use one of {', '.join(choices)}")
        return value

    def number(self, word: str, default: float, least: float, most: float) -> float:
        value = self.take(word, default)
        if not _is_number(value) or not least <= value <= most:
            raise ConfigError(f"{self.name}.{word}", value, f"use a number from {least:g} to {most:g}")
        return float(value)

    def texts(self, word: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self.take(word, list(default))
        if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
            raise ConfigError(f"{self.name}.{word}", value, "write a list of texts")
        return tuple(value)

    def done(self) -> None:
        """Nothing may be left: a word that is misspelt would change nothing, and nobody would know."""
        if self._left:
            words = ", ".join(self._left)
            raise ConfigError(
                self.name, words, f"no such setting; known here are {', '.join(sorted(set(self._known)))}"
            )


def _rule(table: _Table) -> Rule:
    on: RuleKind = table.choice("on", tuple(_RULES))
    given: dict[str, Any] = _RULES[on](table)
    sessions = table.texts("sessions", ("*",))
    table.done()
    return Rule(on=on, sessions=sessions, **given)


def _fractions(table: _Table) -> dict[str, Any]:
    value = table.take("fractions", [0.5, 0.8, 1.0])
    if not isinstance(value, list) or not value or not all(_is_number(each) and 0 < each <= 10 for each in value):
        raise ConfigError(f"{table.name}.fractions", value, "write a list of numbers above 0, such as [0.5, 0.8, 1.0]")
    return {"fractions": tuple(sorted({float(each) for each in value}))}


def _over(table: _Table) -> dict[str, Any]:
    value = table.take("over", None)
    if type(value) is not int or not 0 <= value < 2**53:
        raise ConfigError(f"{table.name}.over", value, "write a whole number from 0")
    return {"over": value}


_RULES: Mapping[str, Callable[[_Table], dict[str, Any]]] = {
    "budget": _fractions,
    "breaker_open": lambda table: {},  # noqa: ARG005 - it has no settings
    "no_progress": lambda table: {"seconds": table.number("seconds", 60.0, 1, _MOST_SECONDS)},
    "lag": _over,
    "dead_letters": _over,
}


def _action(table: _Table) -> Action:
    do: ActionKind = table.choice("do", ("log", "command", "webhook"))
    given: dict[str, Any] = {}
    if do == "command":
        given["argv"] = table.texts("argv", ())
        if not given["argv"]:
            raise ConfigError(f"{table.name}.argv", [], 'name the program: argv = ["/usr/local/bin/page-me"]')
    if do == "webhook":
        given["url"] = _checked_url(table)
        given["token_env"] = table.take("token_env", "")
        if not isinstance(given["token_env"], str):
            raise ConfigError(f"{table.name}.token_env", given["token_env"], "name an environment variable")
    if do != "log":
        given["timeout"] = table.number("timeout", 10.0, 0.1, 300)
    ends = table.take("ends", False)
    if not isinstance(ends, bool):
        raise ConfigError(f"{table.name}.ends", ends, "write true or false")
    table.done()
    return Action(do=do, ends=ends, **given)


def _checked_url(table: _Table) -> str:
    """An address of http or https without a password in it, and none that is the machine's own metadata service."""
    value = table.take("url", "")
    setting = f"{table.name}.url"
    if not isinstance(value, str):
        raise ConfigError(setting, value, "write an address: https://host/path")
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
        del port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in {"http", "https"} or not host:
        raise ConfigError(setting, value.partition("?")[0][:100], "write an address: https://host/path")
    if parts.username is not None:
        raise ConfigError(setting, f"{parts.scheme}://…@{host}", "no secrets in an address: use token_env")
    try:
        is_link_local = ipaddress.ip_address(host).is_link_local
    except ValueError:
        is_link_local = False
    if is_link_local:
        raise ConfigError(setting, host, "link-local addresses are refused: machines keep secrets there")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value and abs(value) < 2**53  # noqa: PLR0124 - not NaN
