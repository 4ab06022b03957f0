"""Errors of all three layers: the trees in their docstrings, and what each tells a person."""

from __future__ import annotations

import asyncio
import re
from types import ModuleType

import pytest
from rowmill.handlers import errors as handler_errors
from rowmill.handlers.errors import (
    AbandonedError,
    BreakerOpenError,
    HandlerTimeoutError,
    LedgerError,
    MisfitError,
    NotStartedError,
    ProcessDiedError,
    ResultSchemaError,
)
from rowmill.state import errors as state_errors
from rowmill.state.errors import BadRowError, ConfigError, RowmillError
from rowmill.state.model import TopicPartition
from rowmill.streams import errors as stream_errors
from rowmill.streams.errors import BrokerError, BrokerTimeoutError, OffsetOutOfRangeError
from rowmill.streams.transaction import CheckpointMovedError

MODULES = [state_errors, handler_errors, stream_errors]
LINE = re.compile(r"^ *(?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+(?:Error|Execution))  +(?P<acts>\S.*)$", re.MULTILINE)


def drawn(module: ModuleType) -> dict[str, str]:
    """The tree in a module's docstring: each class and its parent."""
    path: list[str] = ["RowmillError"]
    parents = {}
    for match in LINE.finditer(module.__doc__ or ""):
        depth = len(match["branch"]) // 4
        del path[depth:]
        if depth:
            parents[match["name"]] = path[-1]
        path.append(match["name"])
    return parents


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-2])
def test_the_tree_is_true(module: ModuleType) -> None:
    """The docstring draws exactly the classes that the module defines, below their parents."""
    defined = {
        name: value.__mro__[1].__name__
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and value is not RowmillError
    }
    elsewhere = {"BadRowError": "RowmillError"} if module is handler_errors else {}
    assert drawn(module) == defined | elsewhere


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-2])
def test_each_error_is_described(module: ModuleType) -> None:
    """Every error is a RowmillError with a docstring of its own and says whether trying again may help."""
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.__name__:
            assert issubclass(value, RowmillError)
            assert value.__doc__
            assert isinstance(value.retryable, bool)


RETRYABLE = {
    AbandonedError, BreakerOpenError, HandlerTimeoutError, LedgerError, NotStartedError, ProcessDiedError,
    ResultSchemaError,
}  # fmt: skip
"""Of handlers; what is outside of them may be better next time."""


def test_what_is_worth_another_try() -> None:
    """Nothing is retryable but a broker's failure, and what happened outside of a handler's own code."""
    retryable = {
        value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, RowmillError) and value.retryable
    }
    assert retryable - RETRYABLE == {value for value in retryable if issubclass(value, BrokerError)}
    assert retryable >= RETRYABLE
    assert BrokerTimeoutError in retryable
    assert not CheckpointMovedError.retryable


def test_config_error_says_setting_value_remedy() -> None:
    """The message has all three, and a value that would fill the screen is cut."""
    error = ConfigError("batch", "x" * 1000, "give a number")
    assert (error.setting, error.remedy) == ("batch", "give a number")
    assert str(error).startswith("batch: got 'xxx")
    assert str(error).endswith("…; give a number")
    assert len(str(error)) < 250


@pytest.mark.parametrize(
    ("error", "also"),
    [
        (ConfigError("a", 1, "b"), ValueError),
        (BadRowError("not_json", "x"), ValueError),
        (MisfitError("x"), TypeError),
        (HandlerTimeoutError("x"), asyncio.TimeoutError),
    ],
)
def test_errors_that_python_knows(error: RowmillError, also: type[Exception]) -> None:
    """Who catches Python's own class catches ours."""
    assert isinstance(error, also)


def test_figures_in_messages() -> None:
    """Deadlines and offsets stand in the text and, where tools need them, in attributes."""
    assert str(BrokerTimeoutError("look up", 0.5)) == "look up: no answer within 0.5 s"
    error = OffsetOutOfRangeError(TopicPartition("t", 3), 12345, "choose another")
    assert str(error) == "t/3: offset 12,345 is not in the log; choose another"
    assert (error.tp, error.offset) == (TopicPartition("t", 3), 12345)
