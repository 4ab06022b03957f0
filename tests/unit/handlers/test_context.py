"""What handlers may ask and do besides returning rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from rowmill.handlers.context import Emit, RowContext, header_pairs, key_bytes
from rowmill.state.errors import ConfigError


@pytest.fixture
def ctx() -> RowContext:
    """The context of the row orders/2/17."""
    return RowContext("orders", 2, 17, 1_000, "k", (("h", b"1"),), "live")


def test_where_the_row_comes_from(ctx: RowContext) -> None:
    """Place, time, key, headers and session can be read."""
    assert (ctx.topic, ctx.partition, ctx.offset, ctx.timestamp, ctx.session) == ("orders", 2, 17, 1_000, "live")
    assert ctx.key == "k"
    assert ctx.headers == (("h", b"1"),)
    assert ctx.emitted == []


@pytest.mark.parametrize("key", ["ü", b"\xff", None, ""])
def test_keys_that_go_on_the_wire(ctx: RowContext, key: Any) -> None:
    """A handler may give the results another key: text, bytes or none."""
    ctx.key = key
    assert ctx.key == key
    assert key_bytes(key) == (key.encode() if isinstance(key, str) else key)


@pytest.mark.parametrize("key", [7, 1.5, ["k"], {}, True, "\ud800"])
def test_keys_that_do_not(ctx: RowContext, key: Any) -> None:
    """Another type, or text that is no Unicode, is refused where it is assigned, and the key stays."""
    with pytest.raises(ConfigError, match="key"):
        ctx.key = key
    assert ctx.key == "k"
    with pytest.raises(ConfigError, match="key"):
        ctx.emit("t", {}, key=key)
    assert ctx.emitted == []


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ({"a": "1", "b": b"2", "c": None}, (("a", b"1"), ("b", b"2"), ("c", None))),
        ((("a", b"1"), ("a", b"2")), (("a", b"1"), ("a", b"2"))),
        ((), ()),
        ({"ü": "ß"}, (("ü", "ß".encode()),)),
        ({"": ""}, (("", b""),)),
    ],
)
def test_headers_that_go_on_the_wire(ctx: RowContext, given: Any, pairs: Any) -> None:
    """A mapping or pairs, text or bytes: kept in order with repeats, as bytes."""
    ctx.headers = given
    assert ctx.headers == pairs
    assert header_pairs(given) == pairs


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rowmill.source": "x"}, "rowmill's own"),
        ({1: "x"}, "name is str"),
        ({"a": 1}, "value is str, bytes or None"),
        ({"a": "\ud800"}, "valid Unicode"),
        ({"\ud800": "a"}, "valid Unicode"),
        ((("a", ["x"]),), "value is str, bytes or None"),
    ],
)
def test_headers_that_do_not(ctx: RowContext, given: Any, says: str) -> None:
    """Reserved names, other types and broken text are refused at once, and the headers stay."""
    with pytest.raises(ConfigError, match=says):
        ctx.headers = given
    assert ctx.headers == (("h", b"1"),)
    with pytest.raises(ConfigError, match=says):
        ctx.emit("t", {}, headers=given)
    assert ctx.emitted == []


def test_emit_collects(ctx: RowContext) -> None:
    """Side outputs are kept in order, in wire form."""
    ctx.emit("low", {"a": 1})
    ctx.emit("high", {"a": 2}, key="ü", headers={"h": "x"})
    assert ctx.emitted == [
        Emit("low", {"a": 1}, None, ()),
        Emit("high", {"a": 2}, "ü".encode(), (("h", b"x"),)),
    ]


@pytest.mark.parametrize(
    ("topic", "row", "setting"),
    [
        ("t", [1], "emit(row=)"),
        ("t", None, "emit(row=)"),
        ("t", "{}", "emit(row=)"),
        (None, {}, "emit(topic=)"),
        (7, {}, "emit(topic=)"),
    ],
)
def test_what_cannot_be_emitted(ctx: RowContext, topic: Any, row: Any, setting: str) -> None:
    """A row that is no dict and a topic that is no text are refused where the handler stands."""
    with pytest.raises(ConfigError) as caught:
        ctx.emit(topic, row)
    assert caught.value.setting == setting


def test_log_lines_name_the_row(ctx: RowContext, caplog: pytest.LogCaptureFixture) -> None:
    """Lines begin with session and place, which are also attributes of the record, beside the caller's own."""
    with caplog.at_level(logging.INFO, "rowmill.handler"):
        ctx.log.info("score %d", 3, extra={"model": "m1"})
    (record,) = caplog.records
    assert record.getMessage() == "[live orders/2/17] score 3"
    assert vars(record)["row"] == "orders/2/17"
    assert vars(record)["session"] == "live"
    assert vars(record)["model"] == "m1"


def test_costs_add_up_exactly(ctx: RowContext) -> None:
    """Sums of money keep every digit, where Decimal's own addition would round to 28."""
    for amount in (Decimal("1e20"), Decimal("1e-20"), Decimal("0.1")):
        ctx.add_cost(amount, tokens=2)
    assert ctx.cost == Decimal("100000000000000000000.10000000000000000001")
    assert ctx.tokens == 6


def _give_key(ctx: RowContext) -> None:
    ctx.key = "other"


def _give_headers(ctx: RowContext) -> None:
    ctx.headers = {"h": b"1"}


def _give_time(ctx: RowContext) -> None:
    ctx.timestamp = 2_000


def _fall_back(ctx: RowContext) -> None:
    ctx.is_defaulted = True


def _adopt_key(ctx: RowContext) -> None:
    attempt = ctx.fork()
    attempt.key = "other"
    ctx.adopt(attempt)


@pytest.mark.parametrize(
    ("act", "bare"),
    [
        (lambda _: None, True),
        (lambda ctx: ctx.adopt(ctx.fork()), True),
        (lambda ctx: ctx.emitted, True),
        (lambda ctx: ctx.add_cost(0), True),
        (lambda ctx: ctx.add_cost(1), False),
        (lambda ctx: ctx.add_cost(0, tokens=1), False),
        (lambda ctx: ctx.emit("side", {}), False),
        (_give_key, False),
        (_give_headers, False),
        (_give_time, False),
        (_fall_back, False),
        (_adopt_key, False),
    ],
)
def test_whether_results_need_the_context(act: Callable[[RowContext], object], bare: bool) -> None:
    """A context that nothing was asked of, and nothing was put into, is recognised."""
    ctx = RowContext("orders", 2, 17, 1_000, "k", (), "live")
    act(ctx)
    assert ctx.is_bare(1_000) is bare
