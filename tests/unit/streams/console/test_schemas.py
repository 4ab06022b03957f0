"""What the API takes: each field refuses what it does not describe, and describes what it takes."""

from __future__ import annotations

from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from rowmill.state.errors import ConfigError
from rowmill.streams.console.data import read_query
from rowmill.streams.console.openapi import SHAPES, document
from rowmill.streams.console.routes import CURSOR, GROUP, LETTER_ID, PLACE, ROUTES, TOPIC
from rowmill.streams.console.schemas import Choice, Field, Flag, Listed, OneOf, Record, Text, Whole

CASES: list[tuple[Field, list[Any], list[Any]]] = [
    (Whole(1, 9), [1, 9], [0, 10, 1.5, True, None, "x", [], -1]),
    (Text(3), ["", "abc"], ["abcd", 1, None, [], b"a"]),
    (Text(9, "[ab]+", "write ab"), ["a", "abab"], ["", "c", "ab\n", "abc"]),
    (Choice(("a", "b")), ["a"], ["", "c", 1, None, "A"]),
    (Flag(), [True, False], [1, 0, "true", None]),
    (Listed(Whole(0, 5), 2), [[], [1], [5, 5]], [[6], [1, 1, 1], "1", {}, None, [None]]),
    (OneOf((Whole(0, 5), Text(2))), [3, "ab", ""], ["abc", 7, None, True]),
    (
        Record({"a": Whole(0, 5), "b": Text(2)}, frozenset({"a"})),
        [{"a": 1}, {"a": 1, "b": "x"}, {"a": 1, "b": None}],
        [{}, {"b": "x"}, {"a": None}, {"a": 1, "c": 1}, [], "x", None, {"a": "x"}],
    ),
    (
        GROUP,
        ["rowmill.p", "rowmill.p.s-1_2"],
        ["p", "rowmill.", "rowmill.a.b.c", "rowmill.a\n", "rowmill.<b>", "x" * 300],
    ),
    (TOPIC, ["a", "a.b-c_d"], ["", "a/b", "a\r\nb", "ä", "x" * 250]),
    (LETTER_ID, ["0-17", "0/17"], ["0", "-1-2", "0-", "a-b", "0-1-2"]),
    (PLACE, ["earliest", "end", "5", "time:17"], ["", "latest", "-1", "time:", "time:x", "5 "]),
    (CURSOR, ["5.0.1", "-1.0.1"], ["5", "5.0", "a.b.c", "5.0.1.2"]),
]


@pytest.mark.parametrize(("field", "right", "wrong"), CASES)
def test_fields(field: Field, right: list[Any], wrong: list[Any]) -> None:
    """What is right goes through, what is wrong is refused by its name; the schema agrees."""
    for value in right:
        field.read("it", value)
        jsonschema.validate(value, field.schema())
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            field.read("it", value)
        assert caught.value.setting.startswith(("it", "a", "b", "c"))
        if not isinstance(value, bytes) and value not in (True, "ab\n", "rowmill.a\n"):  # JSON Schema's $ and booleans
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(value, field.schema())


def test_numbers_of_a_query() -> None:
    """They come as text."""
    assert Whole(-5, 9).read("it", "-3") == -3
    for text in ("", " 1", "1.0", "٣", "1_0", "9" * 30):
        with pytest.raises(ConfigError):
            Whole().read("it", text)


@pytest.mark.parametrize(
    ("route", "query", "read"),
    [
        ("series", {"window": "1m", "since_ms": "5"}, {"window": "1m", "since_ms": 5}),
        ("dead_letters", {"stage": "", "limit": "9", "status": "all"}, {"limit": 9, "status": "all"}),
        ("overview", {}, {}),
    ],
)
def test_queries(route: str, query: dict[str, str], read: dict[str, Any]) -> None:
    """Checked; empty words of a form count as absent."""
    assert read_query(route, query) == read


@pytest.mark.parametrize(
    ("route", "query", "setting"),
    [("overview", {"a": "b"}, "a"), ("series", {"window": "1d"}, "window"), ("records", {"limit": "0"}, "limit")],
)
def test_wrong_queries(route: str, query: dict[str, str], setting: str) -> None:
    """Named by the word that is wrong."""
    with pytest.raises(ConfigError) as caught:
        read_query(route, query)
    assert caught.value.setting == setting


def test_the_table() -> None:
    """Every answer has a shape; only what is POSTed has a body, and all of that has; no name comes twice."""
    names = [route.name for route in ROUTES]
    assert len(set(names)) == len(names)
    for route in ROUTES:
        assert route.is_stream or route.answer in SHAPES
        assert (route.body is not None) is (route.method == "POST")
        assert route.method == "POST" or not route.is_harmless
    assert [route.name for route in ROUTES if route.is_harmless] == ["replay_plan"]
    assert [route.name for route in ROUTES if route.is_open] == ["health"]


def test_the_document() -> None:
    """Each shape that is referred to is there, and is a JSON Schema."""
    made = document(ROUTES)
    assert made["openapi"] == "3.1.0"
    for shape in made["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(shape)
