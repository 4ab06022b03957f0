"""The worker's options and what they may not be."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
from rowmill.state.errors import ConfigError
from rowmill.streams.options import WorkerOptions

COUNTS_FROM_0 = ["max_deaths"]
SECONDS_FROM_0 = ["commit_interval", "linger", "drain_timeout"]
SECONDS = ["broker_timeout", "stall_timeout"]
COUNTS = [
    "commit_rows",
    "fetch_rows",
    "buffer_rows",
    "buffer_bytes",
    "max_in_flight",
    "max_in_flight_bytes",
    "threads",
    "partitions",
    "processes",
]

MISTAKES: list[tuple[str, Any]] = [
    *((name, value) for name in SECONDS_FROM_0 for value in (-1, -0.1, True, "1", None, float("nan"), float("inf"))),
    *((name, value) for name in SECONDS for value in (0, 0.0, -1, True, "1", None, float("nan"), float("inf"))),
    *((name, value) for name in COUNTS for value in (0, -1, 1.0, True, "1")),
    *((name, None) for name in COUNTS if name not in {"partitions", "processes"}),
    *((name, value) for name in COUNTS_FROM_0 for value in (-1, 1.0, True, "1", None)),
    *(("guarantee", value) for value in ("at_most_once", None, 1)),
    *(("table_cache_bytes", value) for value in (0, 1, 8 * 1024 * 1024 - 1, True, "1", None)),
    *(("state_dir", value) for value in ("", 1, "\0")),
    *(("create_topics", value) for value in (0, 1, None, "yes")),
]


@pytest.mark.parametrize(("name", "value"), MISTAKES)
def test_mistakes(name: str, value: Any) -> None:
    """A wrong value is refused by the option's name, with what was given and what to give."""
    with pytest.raises(ConfigError) as caught:
        WorkerOptions(**{name: value})
    assert caught.value.setting == name
    assert repr(value) in str(caught.value)
    assert caught.value.remedy.startswith("give ")


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, 0) for name in SECONDS_FROM_0 + COUNTS_FROM_0]
    + [(name, 0.001) for name in SECONDS + SECONDS_FROM_0]
    + [(name, 1) for name in COUNTS + SECONDS]
    + [("partitions", None), ("create_topics", False), ("guarantee", "at_least_once"), ("state_dir", "x")],
)
def test_smallest_values(name: str, value: Any) -> None:
    """The smallest sensible value of each option is accepted."""
    assert getattr(WorkerOptions(**{name: value}), name) == value


def test_every_option_is_checked() -> None:
    """An option that is added is in these tables too, and described."""
    assert {field.name for field in fields(WorkerOptions)} == {name for name, _ in MISTAKES}
    described = inspect.getdoc(WorkerOptions) or ""  # dedented: the compiler does that since Python 3.13
    for field in fields(WorkerOptions):
        assert f"\n    {field.name}: " in described
