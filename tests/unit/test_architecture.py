"""The shape of the code: who may import what, and how long functions get."""

from __future__ import annotations

import ast
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("state", "handlers", "streams") for path in (ROOT / folder).rglob("*.py"))
LAYERS = ["state", "handlers", "streams"]

ADAPTERS = {
    "aiokafka": {"streams/brokers/kafka.py"},
    "sqlite3": {"streams/brokers/local*.py"},
    "orjson": {"state/codec.py"},
    "pandas": {"handlers/frames.py"},
    "pyarrow": {"streams/input_files.py", "streams/outputs.py"},
    "time": {"state/clock.py"},
    "random": {"state/clock.py"},
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
    "faust": {"streams/console/faust_app.py", "streams/console/transport.py"},
    "jinja2": {"streams/console/pages.py"},
    "ddsketch": {"state/sketch.py"},
    "aiohttp": {"streams/health.py", "streams/console/*.py"},
    "prometheus_client": {"streams/metrics.py"},
    "opentelemetry": {"streams/tracing.py"},
    "rocksdict": {"state/rocksdb.py"},
}
"""Which files may import what, outside of TYPE_CHECKING. A pattern is one adapter that has outgrown one file."""


def name_of(path: Path) -> str:
    """A file's path in the repository."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Everything in a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """The modules that a file imports at run time: level of relativity and dotted name."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for_types = {
        id(inner)
        for node in nodes(path)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in nodes(path):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def test_there_is_something_to_check() -> None:
    """The package was found."""
    assert len(FILES) > 30


@pytest.mark.parametrize("module", ADAPTERS)
def test_one_adapter_per_library(module: str) -> None:
    """A third-party client, a clock or a die is imported by its adapter and by nobody else."""
    users = {path for path in FILES for level, name in imports(path) if not level and name.split(".")[0] == module}
    strangers = {
        name_of(p) for p in users if not any(p.relative_to(ROOT).match(pattern) for pattern in ADAPTERS[module])
    }
    assert strangers == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    """streams → handlers → state, relative imports only; the root, which knows them all, tells the CLI its version."""
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    depth = len(path.relative_to(ROOT).parts)
    for level, name in imports(path):
        assert name.split(".")[0] != "rowmill", f"{name}: imports inside of the package are relative"
        if level == depth and (name or "cli" not in path.parts):
            assert name.split(".")[0] in LAYERS[: layer + 1], f"{name} is above {LAYERS[layer]}"
        assert level <= depth


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_eval(path: Path) -> None:
    """Nothing is evaluated, executed or run through a shell."""
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "__import__"}
        if isinstance(node, ast.keyword) and node.arg == "shell":
            raise AssertionError(f"shell= at line {node.value.lineno}")


def lengths() -> dict[str, int]:
    """Lines of every function of the package, docstrings aside: what has to be read to know what it does."""
    found = {}
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
                found[f"{name_of(path)}:{node.lineno} {node.name}"] = (
                    (node.end_lineno or 0) - node.lineno + 1 - docstring
                )
    return found


def test_functions_stay_short() -> None:
    """A drift alarm, not a cap: the median is at most 10 lines, the 90th percentile at most 35."""
    found = lengths()
    longest = sorted(found, key=lambda name: -found[name])[:5]
    assert statistics.median(found.values()) <= 10, longest
    assert statistics.quantiles(found.values(), n=10)[-1] <= 35, longest
