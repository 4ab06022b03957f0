"""Schemas: what fits, what does not, and how that is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Final, Literal, NewType, NotRequired, Required, TypedDict
from uuid import UUID

import numpy as np
import pandas as pd
import pytest
from rowmill.handlers.errors import ResultSchemaError, SchemaError
from rowmill.handlers.schema import make_validator, row_of, with_objects
from rowmill.state.errors import ConfigError

pydantic = pytest.importorskip("pydantic", reason="the extra rowmill[pydantic] is not installed")


class Status(Enum):
    """Text choices."""

    NEW = "new"
    DONE = "done"


class Level(Enum):
    """Number choices."""

    LOW = 1
    HIGH = 2


@dataclass
class Item:
    """Nested in an order."""

    sku: str
    price: float
    tags: list[str] = field(default_factory=list)


@dataclass
class Address:
    """An optional object."""

    city: str


@dataclass
class Order:
    """The example of these tests."""

    id: str
    items: list[Item]
    address: Address | None = None
    note: str | None = None


@dataclass
class Tree:
    """Has fields of its own class."""

    name: str
    children: list[Tree] = field(default_factory=list)


@dataclass(kw_only=True)
class Range:
    """Has a say of its own in what fits."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


@dataclass
class Ranges:
    """Judged inside."""

    ranges: list[Range]


class Point(TypedDict):
    """A TypedDict, with annotations that are text."""

    x: int
    y: NotRequired[int]


class Partial(TypedDict, total=False):
    """A TypedDict whose keys may be missing, but for one."""

    x: Required[int]
    at: datetime


class Branch(TypedDict):
    """Has a list of its own kind, and something to build."""

    at: date
    children: NotRequired[list[Branch]]


ORDER = {"id": "a", "items": [{"sku": "s", "price": 1.5}, {"sku": "t", "price": 2, "tags": ["x"]}]}
UserId = NewType("UserId", str)


def one(hint: Any) -> type:
    """A dataclass with one required field, called value."""

    class Lone:
        value: Any

    Lone.__annotations__ = {"value": hint}
    return dataclass(Lone)


NAN = float("nan")
ISO = "2026-01-31T12:00:00+00:00"
SOME_UUID = "12345678-1234-5678-1234-567812345678"

FITS: list[tuple[Any, Any]] = [
    (str, ""),
    (str, "text"),
    (int, 0),
    (int, -(2**63)),
    (float, 1.5),
    (float, 1),
    (bool, True),
    (None, None),
    (Any, None),
    (Any, {"deep": [1]}),
    (object, 1),
    (list, [1, "a", None]),
    (list[int], []),
    (list[int], [1, 2]),
    (list[float], [1, 2.5]),
    (list[list[int]], [[1], []]),
    (tuple[int, str], [1, "a"]),
    (tuple[int, ...], [1, 2, 3]),
    (tuple, [1, "a"]),
    (dict, {"a": 1}),
    (dict[str, int], {"a": 1}),
    (dict[str, Any], {}),
    (int | None, None),
    (int | None, 1),
    (int | str, "a"),
    (list[int] | dict[str, int], {"a": 1}),
    (Literal["a", 1, None], 1),
    (Literal["a", 1, None], None),
    (Literal[True], True),
    (Status, "new"),
    (Level, 2),
    (Decimal, "1.50"),
    (Decimal, "-1e3"),
    (Decimal, ".5"),
    (Decimal, 7),
    (datetime, ISO),
    (datetime, "2026-01-31 12:00"),
    (datetime, "2026-01-31T12:00:00Z"),
    (date, "2026-01-31"),
    (time, "12:30"),
    (UUID, SOME_UUID),
    (Annotated[int, "a remark"], 1),
    (Final[int], 1),
    (UserId, "u"),
    (Tree, {"name": "a", "children": [{"name": "b"}]}),
    (Point, {"x": 1}),
    (Partial, {"x": 1, "at": ISO}),
]

MISFITS: list[tuple[Any, Any, str]] = [
    (str, 1, "expected text, got int 1"),
    (str, None, "expected text, got null"),
    (int, "1", "expected an integer, got str '1'"),
    (int, 1.0, "expected an integer, got float 1.0"),
    (int, True, "expected an integer, got bool True"),
    (float, "1.5", "expected a number, got str '1.5'"),
    (float, False, "expected a number, got bool False"),
    (float, NAN, "expected a number, got float nan"),
    (float, float("inf"), "expected a number, got float inf"),
    (bool, 1, "expected true or false, got int 1"),
    (bool, "true", "expected true or false, got str 'true'"),
    (None, 0, "expected null, got int 0"),
    (list[int], "abc", "expected a list, got str 'abc'"),
    (list[int], {"a": 1}, "expected a list, got an object"),
    (tuple[int, str], [1], "expected a list of 2, got a list of 1"),
    (dict[str, int], [1], "expected an object, got a list of 1"),
    (int | None, "a", "expected an integer or null, got str 'a'"),
    (int | str, 1.5, "expected an integer or text, got float 1.5"),
    (Literal["a", 1], "b", "expected one of 'a', 1, got str 'b'"),
    (Literal[1], True, "expected one of 1, got bool True"),
    (Literal[True], 1, "expected one of true, got int 1"),
    (Literal["a"], ["a"], "expected one of 'a', got a list of 1"),
    (Status, "NEW", "expected one of 'new', 'done', got str 'NEW'"),
    (Decimal, 1.5, "expected a decimal number as text, or an integer, got float 1.5"),
    (Decimal, "1_000", "expected a decimal number as text, or an integer, got str '1_000'"),
    (Decimal, "NaN", "expected a decimal number as text, or an integer, got str 'NaN'"),
    (Decimal, True, "expected a decimal number as text, or an integer, got bool True"),
    (datetime, "2026-01-31", "expected a date and time in ISO 8601, got str '2026-01-31'"),
    (datetime, "yesterday T", "expected a date and time in ISO 8601, got str 'yesterday T'"),
    (datetime, 1_750_000_000, "expected a date and time in ISO 8601, got int 1750000000"),
    (date, ISO, f"expected a date in ISO 8601, got str {ISO!r}"),
    (time, "25:00", "expected a time in ISO 8601, got str '25:00'"),
    (UUID, "{" + SOME_UUID + "}", "expected a UUID as text, got str '{" + SOME_UUID + "}'"),
    (Address, "Rome", "expected an object (Address), got str 'Rome'"),
    (str, Decimal(1), "expected text, got Decimal Decimal('1')"),
    (str, "x" * 500, ""),
    (int, "x" * 500, "expected an integer, got str '" + "x" * 59 + "…"),
]


@pytest.mark.parametrize(("hint", "value"), FITS, ids=str)
def test_fits(hint: Any, value: Any) -> None:
    """A row that fits comes back as the very object that went in, with what the schema does not know."""
    row = {"value": value, "other": object}
    assert make_validator(one(hint)).check(row) is row


@pytest.mark.parametrize(("hint", "value", "told"), MISFITS, ids=str)
def test_misfits(hint: Any, value: Any, told: str) -> None:
    """JSON types must match: nothing is converted, true is no number, NaN is no number."""
    validator = make_validator(one(hint))
    if not told:
        assert validator.check({"value": value})
        return
    with pytest.raises(SchemaError) as caught:
        validator.check({"value": value})
    assert str(caught.value) == f"the input does not fit Lone: field 'value': {told}"
    assert caught.value.kind == "schema"
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {**ORDER, "items": [{"sku": "s", "price": "abc"}]},
            "field 'items[0].price': expected a number, got str 'abc'",
        ),
        ({"items": []}, "field 'id': missing, expected text"),
        ({"id": "a", "items": [{"sku": "s"}]}, "field 'items[0].price': missing, expected a number"),
        ({**ORDER, "address": {"city": 1}}, "field 'address.city': expected text, got int 1"),
        ({**ORDER, "address": []}, "field 'address': expected an object (Address) or null, got a list of 0"),
        (
            {"id": 1, "items": [{}, {"sku": 2, "price": None}]},
            (
                "field 'id': expected text, got int 1; field 'items[0].sku': missing, expected text; "
                "field 'items[0].price': missing, expected a number; and 2 more"
            ),
        ),
        (
            {**ORDER, "items": [{"sku": "s", "price": 1, "tags": ["a", 2]}]},
            "field 'items[0].tags[1]': expected text, got int 2",
        ),
    ],
)
def test_messages_name_the_field(row: dict[str, Any], told: str) -> None:
    """The path leads to the very field; the first three misfits are named and the others counted."""
    with pytest.raises(SchemaError) as caught:
        make_validator(Order).check(row)
    assert str(caught.value) == f"the input does not fit Order: {told}"
    assert caught.value.count >= len(caught.value.misfits)


def test_odd_names_are_quoted() -> None:
    """A name that is no identifier cannot be mistaken for a path."""
    schema = TypedDict("schema", {"a.b": dict[str, int]})
    with pytest.raises(SchemaError, match=r"field \"\['a\.b'\]\['c d'\]\": expected an integer, got str 'x'"):
        make_validator(schema).check({"a.b": {"c d": "x"}})


def test_a_union_of_objects_is_not_guessed() -> None:
    """Where several members are objects, the message names them all; what fits one of them, fits."""
    validator = make_validator(one(Address | Item))
    assert validator.check({"value": {"sku": "s", "price": 1}})
    with pytest.raises(SchemaError, match=r"expected an object \(Address\) or an object \(Item\), got an object"):
        validator.check({"value": {"street": 1}})


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, np.int64(3)),
        (float, np.float32(1.5)),
        (float, np.float64(1.5)),
        (bool, np.bool_(True)),
        (list[float], np.array([1.0, 2.0])),
        (list[int], [np.int64(1), 2]),
        (list[int] | None, [np.int64(1)]),
        (tuple[int, int], (1, 2)),
        (datetime, datetime(2026, 1, 31, tzinfo=UTC)),
        (datetime, pd.Timestamp("2026-01-31")),
        (date, date(2026, 1, 31)),
        (UUID, UUID(SOME_UUID)),
        (Status, Status.DONE),
        (float | None, NAN),
        (float | None, np.float64("nan")),
        (Address, Address("Rome")),
    ],
    ids=str,
)
def test_values_are_judged_by_what_they_are_written_as(hint: Any, value: Any) -> None:
    """A handler's result may hold what JSON has a form for: numpy's numbers, dates, enums, NaN where null will do."""
    row = {"value": value}
    assert make_validator(one(hint), side="result").check(row) is row


def test_results_may_be_tried_again() -> None:
    """A misfit of a result is retryable, since a model may answer better next time; its message says result."""
    with pytest.raises(ResultSchemaError, match="the result does not fit Order") as caught:
        make_validator(Order, side="result").check({"id": "a"})
    assert caught.value.retryable


def test_parse_builds_objects() -> None:
    """Parsed rows are objects all the way down, defaults filled in."""
    order = make_validator(Order).parse({**ORDER, "address": {"city": "Rome"}, "unknown": 1})
    assert order == Order("a", [Item("s", 1.5), Item("t", 2, ["x"])], Address("Rome"))
    assert order.items[0].tags == []


@pytest.mark.parametrize(
    ("hint", "value", "built"),
    [
        (Decimal, "1.50", Decimal("1.50")),
        (Decimal, 7, Decimal(7)),
        (datetime, ISO, datetime(2026, 1, 31, 12, tzinfo=UTC)),
        (date, "2026-01-31", date(2026, 1, 31)),
        (time, "12:30", time(12, 30)),
        (UUID, SOME_UUID, UUID(SOME_UUID)),
        (Status, "new", Status.NEW),
        (Level | None, 2, Level.HIGH),
        (tuple[date, ...], ["2026-01-31"], (date(2026, 1, 31),)),
        (tuple[int, str], [1, "a"], (1, "a")),
        (dict[str, Address], {"a": {"city": "Rome"}}, {"a": Address("Rome")}),
        (list[Status], ["new"], [Status.NEW]),
        (datetime | str, "free text", "free text"),
        (Tree, {"name": "a", "children": [{"name": "b"}]}, Tree("a", [Tree("b")])),
        (Partial, {"x": 1, "at": ISO, "z": 2}, {"x": 1, "at": datetime(2026, 1, 31, 12, tzinfo=UTC), "z": 2}),
        (float, np.float32(1.5), 1.5),
    ],
    ids=str,
)
def test_parse_builds_values(hint: Any, value: Any, built: Any) -> None:
    """Text with a meaning becomes Python's own object of it."""
    assert make_validator(one(hint)).parse({"value": value}).value == built


def test_parse_builds_inside_of_recursive_typed_dicts() -> None:
    """A list of a TypedDict's own kind is built, though it was compiled before its owner was."""
    row = {"at": "2026-01-31", "children": [{"at": "2026-02-01"}]}
    parsed = make_validator(Branch).parse(row)
    assert parsed == {"at": date(2026, 1, 31), "children": [{"at": date(2026, 2, 1)}]}
    assert row["at"] == "2026-01-31"


@pytest.mark.parametrize("method", ["check", "parse"])
def test_post_init_has_a_say(method: str) -> None:
    """What a dataclass raises when it is made of a row is a misfit, whether the handler gets the object or not."""
    validator = make_validator(Ranges)
    assert getattr(validator, method)({"ranges": [{"low": 1, "high": 2}]})
    with pytest.raises(SchemaError, match="the input does not fit Ranges: Range refuses it: low is above high"):
        getattr(validator, method)({"ranges": [{"low": 3, "high": 2}]})


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (3, "give a dataclass"),
        ("Order", "give a dataclass"),
        (dict, "give a dataclass"),
        (int, "give a dataclass"),
        (Order("a", []), "the class itself"),
        (one(bytes), "Lone.value has a type that is not checked here"),
        (one(set[int]), "not checked here"),
        (one(dict[int, str]), "not checked here"),
        (one(Literal[b"a"]), "not checked here"),
        (one(list[complex]), "not checked here"),
        (one("Nowhere"), "cannot be resolved"),
    ],
    ids=str,
)
def test_what_is_no_schema(schema: Any, told: str) -> None:
    """A schema that cannot be checked is refused when the pipeline is built, with the field and a remedy."""
    with pytest.raises(ConfigError, match=told) as caught:
        make_validator(schema, setting="stage(input=)")
    assert caught.value.setting == "stage(input=)"


def test_limits_beside_types_are_not_ignored() -> None:
    """Somebody who writes a limit means it: where it would not be checked, it is refused."""
    with pytest.raises(ConfigError, match="use a pydantic model"):
        make_validator(one(Annotated[int, pydantic.Field(gt=0)]))


def test_sides_are_checked() -> None:
    """There are two sides."""
    with pytest.raises(ConfigError):
        make_validator(Order, side="output")  # type: ignore[arg-type]


# --- pydantic --------------------------------------------------------------------------------------------------


class Line(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    """Nested."""

    sku: str
    price: float = pydantic.Field(gt=0)


class Bill(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    """A model with a bit of everything."""

    id: str
    lines: list[Line]
    at: datetime | None = None
    kind: int | str = 0


class Lax(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    """Asks for conversions."""

    model_config = pydantic.ConfigDict(strict=False, extra="forbid")
    count: int
    name: str = pydantic.Field(alias="full name", default="")


BILL = {"id": "b", "lines": [{"sku": "s", "price": 1}], "at": ISO, "other": 1}


def test_models_leave_the_row_as_it_is() -> None:
    """A row that fits a model goes on unchanged: no defaults, no conversions, nothing left out."""
    validator = make_validator(Bill)
    assert validator.check(BILL) is BILL
    parsed = validator.parse(BILL)
    assert isinstance(parsed, Bill)
    assert parsed.at == datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"lines": []}, "field 'id': missing"),
        ({**BILL, "id": 1}, "field 'id': expected a valid string, got int 1"),
        (
            {**BILL, "lines": [{"sku": "s", "price": "1"}]},
            "field 'lines[0].price': expected a valid number, got str '1'",
        ),
        ({**BILL, "lines": [{"sku": "s"}]}, "field 'lines[0].price': missing"),
        ({**BILL, "lines": [{"sku": "s", "price": 0}]}, "field 'lines[0].price': expected greater than 0, got int 0"),
    ],
)
def test_models_name_the_field(row: dict[str, Any], told: str) -> None:
    """A model is strict as JSON is strict, and its errors read like ours."""
    with pytest.raises(SchemaError) as caught:
        make_validator(Bill).check(row)
    assert str(caught.value) == f"the input does not fit Bill: {told}"


def test_union_members_are_no_part_of_the_path() -> None:
    """pydantic's path of a union names its members; a row has no such fields."""
    with pytest.raises(SchemaError) as caught:
        make_validator(Bill).check({**BILL, "kind": 1.5})
    assert {misfit.path for misfit in caught.value.misfits} == {"kind"}


def test_a_model_may_ask_for_conversions_and_forbid_fields() -> None:
    """What a model's own configuration says about strictness and further fields holds."""
    validator = make_validator(Lax)
    assert validator.parse({"count": "3", "full name": "a"}).count == 3
    with pytest.raises(SchemaError, match="field 'surplus': Extra inputs are not permitted, got int 1"):
        validator.check({"count": 1, "surplus": 1})


def test_adapters_and_dataclasses_of_pydantic() -> None:
    """A TypeAdapter and pydantic's dataclasses are schemas as well."""
    assert make_validator(pydantic.TypeAdapter(dict[str, int])).check({"a": 1}) == {"a": 1}

    @pydantic.dataclasses.dataclass
    class Small:
        count: int = pydantic.Field(gt=0)

    assert make_validator(Small).parse({"count": 2}).count == 2
    with pytest.raises(SchemaError, match="field 'count': expected greater than 0"):
        make_validator(Small).check({"count": 0})
    assert row_of(make_validator(Small).parse({"count": 3})) == {"count": 3}


def test_a_model_cannot_hide_what_is_no_json() -> None:
    """A result that cannot be written is a misfit, not a crash."""
    with pytest.raises(SchemaError, match="cannot be written as JSON"):
        make_validator(Bill, side="result").check({**BILL, "other": Decimal(1)})


def test_a_model_that_is_not_finished_is_refused_early() -> None:
    """A model with names that lead nowhere is a mistake of whoever builds the pipeline, not of a row."""
    unfinished = type(
        "Unfinished", (pydantic.BaseModel,), {"__annotations__": {"a": "Nowhere"}, "__module__": __name__}
    )
    with pytest.raises(ConfigError, match="Nowhere"):
        make_validator(unfinished)


def test_rowmill_does_not_import_pydantic() -> None:
    """Those who have no model never pay for pydantic."""
    program = "import sys, rowmill.handlers.schema as s; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


# --- handlers --------------------------------------------------------------------------------------------------


@dataclass
class Total:
    """What a handler gives."""

    id: str
    amount: Decimal
    status: Status = Status.NEW
    parts: tuple[Item, ...] = ()


def test_objects_become_rows() -> None:
    """Dataclasses, models and lists of them are results like dicts; Decimals in them are text, as they are read."""
    item = {"sku": "s", "price": 1.5, "tags": []}
    assert row_of(Total("a", Decimal("1.50"), parts=(Item("s", 1.5),))) == {
        "id": "a", "amount": "1.50", "status": "new", "parts": [item],
    }  # fmt: skip
    assert row_of([Line(sku="s", price=1), {"a": 1}]) == [{"sku": "s", "price": 1.0}, {"a": 1}]
    assert row_of(None) is None
    assert row_of(3) == 3
    assert row_of(Total) is Total


async def test_handlers_of_objects() -> None:
    """A handler may take and give objects, sync and async, with and without a context, by row and by batch."""
    takes = make_validator(Order)

    def price(order: Order, ctx: str) -> Total:
        return Total(order.id + ctx, sum((Decimal(str(item.price)) for item in order.items), Decimal(0)))

    async def count(orders: list[Order]) -> list[dict[str, Any]]:
        return [{"count": len(order.items)} for order in orders]

    here = with_objects(price, takes=takes, is_async=False)
    assert here(ORDER, "!") == {"id": "a!", "amount": "3.5", "status": "new", "parts": []}
    batch = with_objects(count, takes=takes, is_async=True, batch=True)
    assert await batch([ORDER, ORDER]) == [{"count": 2}, {"count": 2}]
    assert with_objects(lambda row: [Address(row["city"])], is_async=False)({"city": "Rome"}) == [{"city": "Rome"}]
    with pytest.raises(SchemaError):
        here({"id": 1}, "")
