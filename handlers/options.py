"""Checks that policies share: each names the setting, what was given, and what to give instead."""

from __future__ import annotations

import re
from typing import Any

from ..state.errors import ConfigError

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,80}")


def check_name(setting: str, value: Any) -> None:
    """A stage's or a resource's name.

    Raises:
        ConfigError: it is something else than 1 to 80 letters, digits, ``_`` and ``-``.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(setting, value, "use 1 to 80 letters, digits, '_' and '-'")


def check_count(setting: str, value: Any, remedy: str = "") -> None:
    """A whole number from 1. ``remedy`` is what else may be done.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(setting, value, f"give a whole number from 1{remedy}")


def check_seconds(setting: str, value: Any, *, least_is_zero: bool = False, remedy: str = "") -> None:
    """A duration in seconds, above 0, or from 0. ``remedy`` is what else may be done.

    Raises:
        ConfigError: it is something else.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf") or not (value or least_is_zero):
        raise ConfigError(setting, value, f"give seconds {'from' if least_is_zero else 'above'} 0{remedy}")


def check_rate(setting: str, value: Any) -> None:
    """A number above 0.

    Raises:
        ConfigError: it is something else.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ConfigError(setting, value, "give a number above 0")
