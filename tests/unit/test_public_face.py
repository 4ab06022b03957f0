"""The root package: what it exports, and that importing it costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import rowmill

HEAVY = ["aiokafka", "pandas", "numpy", "pyarrow", "orjson", "tqdm", "sqlite3", "asyncio"]


def python(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_names_are_sorted() -> None:
    """``__all__`` is in order and without repeats, and so is the table of homes; both name the same."""
    assert rowmill.__all__ == sorted(set(rowmill.__all__))
    assert list(rowmill._HOMES) == rowmill.__all__


@pytest.mark.parametrize("name", rowmill.__all__)
def test_every_name_is_there(name: str) -> None:
    """Each public name resolves, to what its home defines itself, and has a docstring."""
    value = getattr(rowmill, name)
    home = f"rowmill.{rowmill._HOMES[name]}"
    assert value is getattr(import_module(home), name)
    assert value.__module__ == home
    assert value.__doc__
    assert name in dir(rowmill)


def test_type_checkers_see_the_same() -> None:
    """The imports under TYPE_CHECKING bring exactly the public names, from their homes."""
    tree = ast.parse(Path(rowmill.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == rowmill._HOMES


def test_unknown_names() -> None:
    """A name that does not exist is an AttributeError like any module's."""
    with pytest.raises(AttributeError, match="module 'rowmill' has no attribute 'Pipelines'"):
        rowmill.Pipelines  # noqa: B018
    assert not hasattr(rowmill, "_nothing")


def test_importing_is_cheap() -> None:
    """``import rowmill`` loads none of the heavy libraries, and no module of its own."""
    loaded = python(f"import rowmill, sys; print([m for m in {HEAVY} + ['rowmill.state'] if m in sys.modules])")
    assert loaded == "[]"


@pytest.mark.parametrize("name", ["Pipeline", "Worker", "publish", "open_broker", "ExecutionResult"])
def test_names_bring_only_what_they_need(name: str) -> None:
    """No public name loads pandas, Arrow or a Kafka client before they are used."""
    code = f"from rowmill import {name}; import sys; print([m for m in {HEAVY[:4]} + ['tqdm'] if m in sys.modules])"
    assert python(code) == "[]"
