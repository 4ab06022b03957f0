"""Values as they are shown: cut, without noise, and always of a form that JSON has."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill.state.codec import dumps, loads
from rowmill.streams.console.contents import Content, content_of, hex_dump, short_text, shown_text
from rowmill.streams.console.series import Point, StageFigures, StagePoint
from rowmill.streams.console.views import EventView, Series, cut_values, spark_of, stages_of
from rowmill.streams.event_records import EventRecord
from support.statuses import a_status

NOW = 1_750_000_007_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("<script>", "<script>"),
        ("ü€😀", "ü€😀"),
        ("a\udc80b", "a?b"),
        ("x" * 4_096, "x" * 4_096),
        ("x" * 5_000, "x" * 4_096 + "… 904 more bytes"),
        ("é" * 4_100, "é" * 4_096 + "… 8 more bytes"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    """Long ones are cut with a note; nothing is left that JSON has no form for."""
    assert shown_text(text) == shown


@pytest.mark.parametrize(
    ("value", "is_json"),
    [
        (b"[" * 40 + b"1" + b"]" * 40, True),
        (b"[" * 900 + b",".join([b"1"] * 30_000) + b"]" * 900, False),
        (b"[" * 30_000, False),
        (b'{"a":' * 60_000, False),
        (b"[" + b",".join([b'"abc"'] * 10_000) + b"]", True),
        (b"[" + b"1," * 40_000 + b"1]", False),
    ],
)
def test_json_that_is_made_to_grow(value: bytes, is_json: bool) -> None:
    """What somebody nested so that indentation would make a hundred megabytes of it is shown as text, and at once."""
    tracemalloc.start()
    content = Content.of(value)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert content is not None
    assert (content.json is not None) == is_json
    assert len(content.json or "") < 5_000
    assert most < 8 << 20


@pytest.mark.parametrize(
    ("value", "text", "is_json", "cut"),
    [
        (b"", "", False, 0),
        (b"{}", "{}", True, 0),
        (b'{"a": [1, NaN]}', '{"a": [1, NaN]}', True, 0),
        (b"plain", "plain", False, 0),
        (b"\xff\xfe", None, False, 0),
        (b"a\x00b", None, False, 0),
        (b"x" * 5_000, "x" * 4_096 + "… 904 more bytes", False, 904),
        (b"x" * 4_095 + "é".encode() + b"yyy", "x" * 4_095 + "… 5 more bytes", False, 4),
        (b"x" * 100 + b"\xff" + b"x" * 5_000, None, False, 1_005),
        (b"[" * 100_000, None, False, None),
        (b"9" * 10_000, None, False, None),
    ],
)
def test_contents(value: bytes, text: str | None, is_json: bool, cut: int | None) -> None:
    """Bytes as text where they are some, as JSON where they are that, and always as they are."""
    content = Content.of(value)
    assert content is not None
    assert content.size == len(value)
    assert (content.json is not None) is is_json
    if cut is not None:
        assert (content.text, content.cut) == (text, cut)
    assert content.hex.startswith("00000000" if value else "")


def test_null_is_null() -> None:
    """And not empty."""
    assert content_of(None) is None
    assert short_text(None) is None
    assert short_text(b"\xff<b>") == "\\xff<b>"


@given(st.binary(max_size=10_000))
def test_any_bytes_can_be_shown(value: bytes) -> None:
    """Whatever they are, JSON holds them, and little of it."""
    text = dumps(content_of(value))
    assert loads(text)["size"] == len(value)
    assert len(text) < 40_000
    assert dumps(short_text(value))


def test_a_dump() -> None:
    """Sixteen in a line, and letters where there are some."""
    assert hex_dump(b"A\x00<\xff" + b"z" * 14).split("\n") == [
        "00000000  41 00 3c ff 7a 7a 7a 7a 7a 7a 7a 7a 7a 7a 7a 7a  A.<.zzzzzzzzzzzz",
        "00000010  7a 7a                                            zz",
    ]


def test_a_spark() -> None:
    """The last sixty whole windows; unknown ones are gaps, the present one is not shown."""
    assert spark_of([], NOW) == [None] * 60
    start = NOW // 10_000 * 10_000
    points = [Point(at_ms=start - 10_000, rows=55), Point(at_ms=start, rows=9), Point(at_ms=start - 600_000, rows=10)]
    spark = spark_of(points, NOW)
    assert (spark[-1], spark[0], spark.count(None)) == (5.5, 1.0, 58)


def test_a_series() -> None:
    """Columns of equal length; a stage that a window lacks has a gap in it."""
    points = [
        Point(at_ms=1, rows=2, cost="0.1", lag=None, stages={"a": StagePoint(5, 0.1, 0.5, 0.75, 0.99)}),
        Point(at_ms=2, rows=3, failures=1, lag=7, stages={"b": StagePoint(6, 0.2)}),
    ]
    series = Series.of(points, 10).to_dict()
    assert (series["rows"], series["lag"], series["cost"]) == ([2, 3], [None, 7], ["0.1", "0"])
    assert series["stages"]["a"] == {"rows": [5, None], "p50": [0.5, None], "p95": [0.75, None], "p99": [0.99, None]}
    assert series["stages"]["b"] == {"rows": [None, 6], "p50": [None] * 2, "p95": [None] * 2, "p99": [None] * 2}


def test_stages_of_a_session_whose_workers_are_gone() -> None:
    """Their counts are those of the past; what a worker counts goes before it."""
    so_far = [StageFigures("score", rows=9, out=8, failed=1)]
    _, score = stages_of(a_status("p", stages={}), [], so_far)
    assert (score.name, score.rows_in, score.rows_out, score.dropped, score.failed) == ("score", 9, 8, 0, 1)
    _, score = stages_of(a_status("p", stages={"score": {"rows": 2.0}}), [], so_far)
    assert (score.rows_in, score.rows_out) == (2, None)


def test_stages_in_the_chains_order() -> None:
    """As the session says; counts are the live workers', times those of the last minute."""
    status = a_status("p", stages={"score": {"rows": 9.0, "out": 8.0, "failed": 1.0, "calls": 10.0}})
    figures = [StageFigures("late"), StageFigures("score", rows=3, calls_per_second=1.5, p50=0.12345678)]
    clean, score, late = stages_of(status, figures)
    assert (clean.name, score.name, late.name) == ("clean", "score", "late")
    assert (clean.rows_in, clean.per_second, clean.p50) == (None, None, None)
    assert (score.rows_in, score.rows_out, score.failed, score.dropped) == (9, 8, 1, None)
    assert (score.per_second, score.p50, score.counters["calls"]) == (1.5, 0.123457, 10)


@pytest.mark.parametrize(
    ("value", "cut"),
    [
        ("x" * 5_000, "x" * 4_096 + "… 904 more bytes"),
        ({"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}}, {"a": {"b": {"c": {"d": {"e": {"f": "…"}}}}}}),
        (list(range(300)), list(range(100))),
        ({"\udc80": None, "n": 1.5, "t": True}, {"?": None, "n": 1.5, "t": True}),
    ],
)
def test_data_of_events(value: Any, cut: Any) -> None:
    """As it came, cut in every direction."""
    assert cut_values(value) == cut


def test_an_event() -> None:
    """Its texts stay texts."""
    record = EventRecord(
        kind="row_failed", at_ms=5, pipeline="p", session="live", group="rowmill.p", worker="<w>", data={"m": "<b>"}
    )
    assert json.loads(dumps(EventView.of(record).to_dict())) == {
        "at_ms": 5, "kind": "row_failed", "worker": "<w>", "host": "", "subject": "", "data": {"m": "<b>"},
    }  # fmt: skip
