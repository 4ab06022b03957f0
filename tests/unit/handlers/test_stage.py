"""Stages: what options may be, and what a handler's signature tells."""

# Handlers here are made for their signatures, not for what they do with their arguments.
# ruff: noqa: ARG005
from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from rowmill import Pipeline
from rowmill.handlers.stage import StageOptions, make_stage
from rowmill.state.errors import ConfigError


def plain(row: Any) -> Any:
    """Takes a row."""
    return row


def with_context(row: Any, ctx: Any) -> Any:
    """Takes a row and its context."""
    return row


async def awaited(row: Any) -> Any:
    """Is awaited."""
    return row


def yielding(row: Any) -> Iterator[Any]:
    """Yields, which handlers must not."""
    yield row


async def yielding_later(row: Any) -> Any:
    """Yields, awaited."""
    yield row


class Model:
    """A callable object."""

    def __call__(self, row: Any, ctx: Any) -> Any:
        return row

    async def later(self, row: Any) -> Any:
        return row

    @staticmethod
    def still(row: Any) -> Any:
        return row


class AsyncModel:
    async def __call__(self, row: Any) -> Any:
        return row


@pytest.mark.parametrize(
    ("handler", "options", "setting", "shown", "remedy"),
    [
        (None, {}, "stage(handler)", "None", "give a function"),
        ("clean", {}, "stage(handler)", "'clean'", "give a function"),
        (plain, {"name": ""}, "stage(name=)", "''", "1 to 80 letters"),
        (plain, {"name": "a b"}, "stage(name=)", "'a b'", "1 to 80 letters"),
        (plain, {"name": "a.b"}, "stage(name=)", "'a.b'", "1 to 80 letters"),
        (plain, {"name": "a\n"}, "stage(name=)", "'a\\n'", "1 to 80 letters"),
        (plain, {"name": "ä"}, "stage(name=)", "'ä'", "1 to 80 letters"),
        (plain, {"name": "x" * 81}, "stage(name=)", "x" * 81, "1 to 80 letters"),
        (plain, {"name": 7}, "stage(name=)", "7", "1 to 80 letters"),
        (plain, {"batch": 0}, "stage(batch=)", "0", "from 1"),
        (plain, {"batch": -5}, "stage(batch=)", "-5", "from 1"),
        (plain, {"batch": True}, "stage(batch=)", "True", "from 1"),
        (plain, {"batch": 2.0}, "stage(batch=)", "2.0", "from 1"),
        (plain, {"batch": "10"}, "stage(batch=)", "'10'", "from 1"),
        (plain, {"frame": 1}, "stage(frame=)", "1", "True or False"),
        (plain, {"frame": None}, "stage(frame=)", "None", "True or False"),
        (plain, {"timeout": 0}, "stage(timeout=)", "0", "seconds above 0"),
        (plain, {"timeout": -1.0}, "stage(timeout=)", "-1.0", "seconds above 0"),
        (plain, {"timeout": float("inf")}, "stage(timeout=)", "inf", "leave it out"),
        (plain, {"timeout": float("nan")}, "stage(timeout=)", "nan", "seconds above 0"),
        (plain, {"timeout": True}, "stage(timeout=)", "True", "seconds above 0"),
        (plain, {"timeout": "5s"}, "stage(timeout=)", "'5s'", "seconds above 0"),
        (yielding, {}, "stage(handler)", "'yielding'", "return a list of rows"),
        (yielding_later, {}, "stage(handler)", "'yielding_later'", "return a list of rows"),
        (lambda: None, {}, "stage(handler)", "lambda()", "(row) or (row, ctx)"),
        (lambda a, b, c: None, {}, "stage(handler)", "lambda(a, b, c)", "(row) or (row, ctx)"),
        (lambda row, *, ctx: None, {}, "stage(handler)", "lambda(row, *, ctx)", "(row) or (row, ctx)"),
        (lambda **fields: None, {}, "stage(handler)", "lambda(**fields)", "(row) or (row, ctx)"),
    ],
)
def test_wrong_options(handler: Any, options: dict[str, Any], setting: str, shown: str, remedy: str) -> None:
    """A mistake is told by setting, value received and remedy."""
    with pytest.raises(ConfigError) as caught:
        make_stage(handler, **options)
    assert caught.value.setting == setting
    assert shown in str(caught.value)
    assert remedy in caught.value.remedy


@functools.wraps(awaited)
def wrapped_async(row: Any) -> Any:
    """A decorator's wrapper: sync by itself, and what it gives has to be awaited."""
    return awaited(row)


@pytest.mark.parametrize(
    ("handler", "name", "is_async", "takes_context"),
    [
        (plain, "plain", False, False),
        (with_context, "with_context", False, True),
        (awaited, "awaited", True, False),
        (lambda row: row, "lambda", False, False),
        (lambda row, other: row, "lambda", False, True),
        (lambda row, ctx=None: row, "lambda", False, True),
        (lambda row, context=None: row, "lambda", False, True),
        (lambda row, factor=2: row, "lambda", False, False),
        (lambda row, factor=2, ctx=None: row, "lambda", False, False),
        (lambda *rows: rows[0], "lambda", False, False),
        (Model(), "Model", False, True),
        (AsyncModel(), "AsyncModel", True, False),
        (Model().later, "later", True, False),
        (Model.still, "still", False, False),
        (functools.partial(with_context, ctx=None), "partial", False, False),
        (functools.partial(awaited), "partial", True, False),
        (wrapped_async, "awaited", True, False),
        (dict, "dict", False, False),
    ],
)
def test_what_the_signature_tells(handler: Any, name: str, is_async: bool, takes_context: bool) -> None:
    """Functions, methods, objects, partials, wrappers and builtins: the own name, async or not, ctx or not."""
    stage = make_stage(handler)
    assert (stage.name, stage.is_async, stage.takes_context) == (name, is_async, takes_context)


@pytest.mark.parametrize(
    ("options", "batch", "frame", "timeout"),
    [
        ({}, None, False, None),
        ({"batch": 1}, 1, False, None),
        ({"frame": True}, 1000, True, None),
        ({"frame": True, "batch": 7}, 7, True, None),
        ({"timeout": 3}, None, False, 3.0),
    ],
)
def test_defaults(options: dict[str, Any], batch: int | None, frame: bool, timeout: float | None) -> None:
    """A frame has 1,000 rows unless told otherwise; nothing else has a default but none."""
    stage = make_stage(plain, **options)
    assert (stage.batch, stage.frame, stage.timeout) == (batch, frame, timeout)
    assert stage.is_plain is (timeout is None)


def test_only_bare_calls_are_plain() -> None:
    """Async handlers and time limits leave the fast path; batches stay on it."""
    assert make_stage(plain, batch=5).is_plain
    assert not make_stage(awaited).is_plain
    assert not make_stage(plain, timeout=1).is_plain


def test_options_are_named_alike() -> None:
    """What may be passed on to make_stage is what it takes."""
    assert list(StageOptions.__annotations__) == list(inspect.signature(make_stage).parameters)[1:]


def test_an_option_that_does_not_exist() -> None:
    """A misspelt option is told with the one that was meant."""
    with pytest.raises(ConfigError, match=r"stage\(retyr=\): got 3; there is no such option; did you mean retry=\?"):
        Pipeline("p").stage(retyr=3)(dict)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match=r"stage\(zzz=\): got 1; there is no such option; there are name, batch"):
        Pipeline("p").add(dict, zzz=1)  # type: ignore[call-arg]
