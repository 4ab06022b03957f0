"""The root of rowmill's errors, and those of the state layer.

Each class says who acts next::

    RowmillError            somebody must act; the subclass says who
    ├── ConfigError         you: a setting is wrong (setting, value received, remedy)
    ├── BadRowError         the sender of a row: it cannot be read or written; it becomes a dead letter
    └── CheckpointError     you: a stored checkpoint cannot be read or does not fit; nothing was guessed

``retryable`` tells whether the same call may succeed later without anybody changing anything.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RowmillError(Exception):
    """Base of every error that rowmill raises on purpose."""

    retryable: ClassVar[bool] = False


class ConfigError(RowmillError, ValueError):
    """A setting that cannot work. Also a ValueError, which callers of Python libraries expect.

    Args:
        setting: the setting's name as the caller wrote it, such as ``stage(batch=)``.
        value: what was received.
        remedy: what to write instead.
    """

    def __init__(self, setting: str, value: Any, remedy: str) -> None:
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:200] + "…"
        super().__init__(f"{setting}: got {shown}; {remedy}")
        self.setting = setting
        self.value = value
        self.remedy = remedy


class BadRowError(RowmillError, ValueError):
    """A record that is no row, or a result that is no JSON. Becomes a dead letter, never a crash.

    Args:
        kind: a short stable name that tools may filter by, such as ``not_json``.
        message: one sentence for a person.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class CheckpointError(RowmillError):
    """A checkpoint is unreadable or contradicts what else is known. Never a silent start from the beginning."""
