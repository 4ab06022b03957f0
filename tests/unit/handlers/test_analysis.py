"""The ready-made analysis: thresholds, conditions and paths of the orchestration course, and the assembly of it all."""

# Handlers and factories here are made for their signatures, not for what they do with their arguments.
# ruff: noqa: ARG005
from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from rowmill.handlers.analysis import (
    Analyser,
    Assembly,
    analyze_data_requirements,
    determine_optimal_path,
    evaluate_condition,
    named_condition,
)
from rowmill.handlers.context import RowContext
from rowmill.handlers.errors import StageFailedError
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.registry import Registry
from rowmill.handlers.retry import Retry
from rowmill.handlers.runtime import Runtime
from rowmill.state.errors import ConfigError
from support.fake_clock import FakeClock

CHUNKING, JSON, NUMERIC, VALIDATOR = "chunking_processor", "json_processor", "numeric_processor", "data_validator"

COURSE_RULES = {"large_data": [CHUNKING, JSON, VALIDATOR], "structured_data": [JSON, VALIDATOR]}


class _Streaming:
    stream = None

    def __str__(self) -> str:
        return "quiet"


@pytest.fixture
async def ctx() -> AsyncIterator[RowContext]:
    """A row's context."""
    pool = BlockingPool(2)
    yield RowContext("t", 0, 1, 0, "k", (), "live", runtime=Runtime(pool, FakeClock()))
    pool.close()


def registry_of(*types: str) -> Registry:
    """A registry whose components note in the row that they saw it."""
    registry = Registry()
    for component_type in types:
        registry.register(component_type, _noting(component_type))
    return registry


def _noting(name: str) -> Any:
    return lambda config: lambda row: {**row, "seen": [*row.get("seen", []), name]}


# --- the functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "requirements"),
    [
        ("plain words", [VALIDATOR]),
        ("test data", [VALIDATOR]),
        ("", [VALIDATOR]),
        ("x" * 1000, [VALIDATOR]),
        ("x" * 1001, [CHUNKING, VALIDATOR]),
        ("some JSON here", [JSON, VALIDATOR]),
        ("an { opens", [JSON, VALIDATOR]),
        ("a } closes", [VALIDATOR]),
        ("route 66", [NUMERIC, VALIDATOR]),
        ("²", [NUMERIC, VALIDATOR]),
        ("½", [VALIDATOR]),
        ('{"n": 1}', [JSON, NUMERIC, VALIDATOR]),
        ("json 1" + "x" * 1000, [CHUNKING, JSON, NUMERIC, VALIDATOR]),
        ({"json": "{1}"}, [VALIDATOR]),
        (["{", "1"], [VALIDATOR]),
        (17, [VALIDATOR]),
        (None, [VALIDATOR]),
        (b"{1}", [VALIDATOR]),
    ],
)
def test_requirements(data: Any, requirements: list[str]) -> None:
    """Which components a piece of data needs, at and beside each threshold."""
    assert analyze_data_requirements(data) == requirements


@pytest.mark.parametrize(
    ("name", "data", "holds"),
    [
        ("large_data", "x" * 5000, False),
        ("large_data", "x" * 5001, True),
        ("large_data", ["x" * 4990], False),
        ("large_data", ["x" * 5000], True),
        ("structured_data", {}, True),
        ("structured_data", "{}", True),
        ("structured_data", "}{", True),
        ("structured_data", "{", False),
        ("structured_data", "}", False),
        ("structured_data", [{"a": 1}], True),
        ("structured_data", [1], False),
        ("streaming_data", "a Stream of words", True),
        ("streaming_data", {"kind": "upstream"}, True),
        ("streaming_data", _Streaming(), True),
        ("streaming_data", "a river", False),
        ("test_data", "test data", False),
    ],
)
def test_conditions(name: str, data: Any, holds: bool) -> None:
    """When each condition holds, at and beside its threshold; an unknown one never does."""
    assert evaluate_condition(name, data) is holds


@pytest.mark.parametrize(
    ("data", "rules", "path"),
    [
        ("plain words", {}, [VALIDATOR]),
        ("test data", {"test_data": ["test_component"]}, [VALIDATOR]),
        ("x" * 5001, COURSE_RULES, [CHUNKING, JSON, VALIDATOR]),
        ("{" + "x" * 5001 + "}", COURSE_RULES, [CHUNKING, JSON, VALIDATOR]),
        ({"a": 1}, COURSE_RULES, [JSON, VALIDATOR]),
        ('{"a": 1}', COURSE_RULES, [JSON, VALIDATOR]),
        ("words 1", COURSE_RULES, [NUMERIC, VALIDATOR]),
        ("x" * 2000, COURSE_RULES, [CHUNKING, VALIDATOR]),
        ("json " + "x" * 2000, {}, [JSON, CHUNKING, VALIDATOR]),
        ("json 1 " + "x" * 2000, COURSE_RULES, [JSON, CHUNKING, VALIDATOR]),
        ("json stream", {"streaming_data": ["s"], "structured_data": ["t"]}, ["s"]),
    ],
)
def test_paths(data: Any, rules: dict[str, list[str]], path: list[str]) -> None:
    """Rules first, in order; then requirements, with JSON read before text is cut."""
    assert determine_optimal_path(data, rules) == path


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "row", "path"),
    [
        ("text", {"text": "json 1"}, [JSON, NUMERIC, VALIDATOR]),
        ("text", {"other": "json 1"}, [VALIDATOR]),
        ("text", {"text": None}, [VALIDATOR]),
        ("text", {"text": {"a": 1}}, [VALIDATOR]),
        (None, {"text": "json 1"}, [VALIDATOR]),
    ],
)
def test_what_of_a_row_is_looked_at(field: str | None, row: dict[str, Any], path: list[str]) -> None:
    """A field, or the row as a whole, which is no text and so needs validation only."""
    assert Analyser(field)(row) == path


def test_rules_of_an_analyser() -> None:
    """Its conditions look at the same data: a whole row is structured, the text of a field may not be."""
    row = {"text": "words"}
    assert Analyser(rules=COURSE_RULES)(row) == [JSON, VALIDATOR]
    assert Analyser("text", COURSE_RULES)(row) == [VALIDATOR]
    assert named_condition("structured_data")(row)
    assert not named_condition("structured_data", "text")(row)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Analyser(5),  # type: ignore[arg-type]
        lambda: Analyser(rules={"huge_data": [JSON]}),
        lambda: named_condition("huge_data"),
        lambda: Assembly(None),  # type: ignore[arg-type]
        lambda: Assembly(Registry(), rules={"huge_data": [JSON]}),
        lambda: Assembly(Registry()).rule("huge_data", [JSON]),
    ],
)
def test_mistakes_are_refused_when_built(wrong: Any) -> None:
    """A condition that nobody knows would never hold: it is refused, as is a field that is no name."""
    with pytest.raises(ConfigError):
        wrong()


# --- the assembly --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("plain words", [VALIDATOR]),
        ("route 66", [NUMERIC, VALIDATOR]),
        ('{"a": "b"}', [JSON, VALIDATOR]),
        ("json 1 " + "x" * 2000, [JSON, CHUNKING, VALIDATOR]),
        ("x" * 6000, [CHUNKING, JSON, VALIDATOR]),
    ],
)
async def test_components_run_along_the_path(text: str, path: list[str], ctx: RowContext) -> None:
    """Each row meets the components of its path in order, and says so."""
    assembly = Assembly(registry_of(CHUNKING, JSON, NUMERIC, VALIDATOR), field="text", rules=COURSE_RULES)
    result = await assembly({"text": text}, ctx)
    assert isinstance(result, dict)
    assert result["seen"] == path
    report = result["orchestration"]
    assert report["processing_path"] == report["components_created"] == path
    assert report["status"] == "completed"
    assert assembly.determine_optimal_path({"text": text}) == path


async def test_the_courses_own_names_and_test(ctx: RowContext) -> None:
    """The course's closing example: a component made on demand, and a rule that leads to it."""
    registry = Registry()
    registry.register_component_factory("test_component", lambda config: type("Agent", (), config)())
    assert registry.create_component_on_demand("test_component", {"max_tokens": 150}).max_tokens == 150
    assembly = Assembly(registry, field="text")
    assembly.add_routing_rule("streaming_data", ["test_component"])
    assert assembly.determine_optimal_path({"text": "a stream"}) == ["test_component"]


async def test_components_are_made_once(ctx: RowContext) -> None:
    """Rows of the same path share the components; only those that a path needs are made."""
    registry = registry_of(CHUNKING, JSON, NUMERIC, VALIDATOR)
    assembly = Assembly(registry, field="text")
    for number in range(5):
        await assembly({"text": f"row {number}"}, ctx)
    assert registry.created == 2


async def test_configs_per_row(ctx: RowContext) -> None:
    """What a row asks of a component reaches its factory."""
    registry = Registry()
    registry.register(VALIDATOR, lambda config: lambda row: {**row, "limit": config.get("limit")})
    assembly = Assembly(registry, config=lambda row: {VALIDATOR: {"limit": row["limit"]}}, report=None)
    assert await assembly({"limit": 1}, ctx) == {"limit": 1}
    assert await assembly({"limit": 2}, ctx) == {"limit": 2}
    assert await assembly({"limit": 1}, ctx) == {"limit": 1}
    assert registry.created == 2


async def test_policies_per_component(ctx: RowContext) -> None:
    """A flaky component is tried again, one that fails for good fails the row and is named with its path."""
    calls: list[str] = []

    def flaky(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["text"])
        if row["text"] == "bad" or len(calls) < 3:
            raise OSError("down")
        return row

    registry = Registry()
    registry.register(VALIDATOR, lambda config: flaky)
    assembly = Assembly(registry, field="text", options={VALIDATOR: {"retry": Retry(attempts=3)}})
    result = await assembly({"text": "good"}, ctx)
    assert isinstance(result, dict)
    assert result["orchestration"]["status"] == "completed"
    with pytest.raises(
        StageFailedError, match=r"path 'data_validator': stage 'data_validator': OSError: down"
    ) as caught:
        await assembly({"text": "bad"}, ctx)
    assert (caught.value.failure.stage, caught.value.kind, caught.value.failure.attempts) == (VALIDATOR, "OSError", 3)


async def test_a_component_without_a_factory(ctx: RowContext) -> None:
    """A row that needs a type which nobody registered fails, and the message names those that there are."""
    assembly = Assembly(registry_of(JSON), field="text")
    with pytest.raises(ConfigError, match=r"'data_validator'; unknown; .*known: json_processor"):
        await assembly({"text": "words"}, ctx)
