"""The execution context: exact counts and money, checkpoints old and new, and the view of a whole session."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill import ExecutionContext, ProcessingStats
from rowmill.state.codec import dumps, loads
from rowmill.state.context import PROCESSED_KEY, pipeline_uuid, session_uuid
from rowmill.state.errors import CheckpointError, ConfigError, RowmillError

BEGAN = datetime(2024, 5, 1, 12, tzinfo=UTC)
SESSION, PIPELINE = session_uuid("rowmill.p"), pipeline_uuid("p")
KEYS = [
    "session_id",
    "pipeline_id",
    "start_time",
    "end_time",
    "current_stage_index",
    "last_processed_row",
    "total_rows",
    "accumulated_cost",
    "accumulated_tokens",
    "intermediate_data",
    "failed_rows",
    "skipped_rows",
]

counts = st.integers(0, 2**53)
FIRST, LAST = datetime(1971, 1, 1), datetime(9998, 1, 1)  # noqa: DTZ001 - the zones are drawn
moments = st.datetimes(FIRST, LAST) | st.datetimes(FIRST, LAST, timezones=st.timezones())
costs = st.decimals(0, 10**12, places=9) | st.integers(0, 10**30).map(Decimal) | st.just(Decimal("1E-40"))
json_objects = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key != PROCESSED_KEY),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5), st.lists, max_leaves=5
    ),
    max_size=3,
)
contexts = st.builds(
    ExecutionContext,
    session_id=st.just(SESSION),
    pipeline_id=st.just(PIPELINE),
    start_time=moments,
    end_time=st.none() | moments,
    current_stage_index=counts,
    last_processed_row=st.integers(-1, 2**53) | st.integers(-1, 3),
    total_rows=counts,
    accumulated_cost=costs,
    accumulated_tokens=counts,
    intermediate_data=json_objects,
    failed_rows=counts | st.integers(0, 3),
    skipped_rows=counts | st.integers(0, 3),
    processed_rows=counts | st.integers(-1, 5),
)


def old_checkpoint() -> dict[str, Any]:
    """What ondine 2.1 writes at row 41 of 100: moments without a zone, no count of processed rows."""
    return {
        "session_id": "2f0c3a52-9c1e-4f4e-8d63-7a3f5b1d9e10",
        "pipeline_id": "b7d1a0c4-53f2-4c29-a1e8-0d9c6e2f7788",
        "start_time": "2024-05-01T12:00:00.250000",
        "end_time": None,
        "current_stage_index": 2,
        "last_processed_row": 41,
        "total_rows": 100,
        "accumulated_cost": "0.0421",
        "accumulated_tokens": 1234,
        "intermediate_data": {"prompts": ["a", "b"]},
        "failed_rows": 2,
        "skipped_rows": 1,
    }


class Watcher:
    """An observer that notes the progress, and then may raise."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.seen: list[float] = []
        self.error = error

    def on_progress_update(self, context: ExecutionContext) -> None:
        self.seen.append(context.get_progress())
        if self.error:
            raise self.error


@pytest.fixture
def new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose local time is New York's."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_fresh() -> None:
    """Without arguments everything is at its default, ids are new, and time is in UTC."""
    fresh, other = ExecutionContext(), ExecutionContext()
    assert isinstance(fresh.session_id, UUID)
    assert len({fresh.session_id, fresh.pipeline_id, other.session_id, other.pipeline_id}) == 4
    assert len({fresh.trace_id, fresh.span_id, other.trace_id, other.span_id}) == 4
    assert fresh.start_time.tzinfo is UTC
    assert (fresh.end_time, fresh.observer_dispatcher) == (None, None)
    assert (fresh.current_stage_index, fresh.last_processed_row, fresh.total_rows) == (0, 0, 0)
    assert (fresh.accumulated_cost, fresh.accumulated_tokens) == (Decimal("0.0"), 0)
    assert (fresh.failed_rows, fresh.skipped_rows, fresh.processed_rows, fresh.completed_rows) == (0, 0, 0, 0)
    assert (fresh.intermediate_data, fresh.observers) == ({}, [])
    assert fresh.intermediate_data is not other.intermediate_data
    assert fresh.observers is not other.observers


def test_order_of_fields() -> None:
    """Arguments may be given by position, in ondine's order; ours comes after all of ondine's."""
    made = ExecutionContext(SESSION, PIPELINE, BEGAN, None, 1, 9, 20, Decimal(1), 5, {"a": 1}, 2, 3, [], None, "t", "s")
    assert (made.last_processed_row, made.total_rows, made.failed_rows, made.skipped_rows) == (9, 20, 2, 3)
    assert (made.trace_id, made.span_id, made.processed_rows) == ("t", "s", 5)


def test_progress_is_exact() -> None:
    """A fresh context is at 0 %, each row adds its share, and the last one makes it 100 %, not 99."""
    context = ExecutionContext(total_rows=3)
    seen = [context.get_progress()]
    for index in range(3):
        context.update_row(index)
        seen.append(context.get_progress())
    assert seen == [0.0, 100 / 3, 200 / 3, 100.0]
    assert context.processed_rows == context.get_stats().processed_rows == 3


@given(st.integers(1, 2**60))
def test_finished_is_one_hundred(total: int) -> None:
    """Whatever the total, all rows are exactly 100 %, and one less is never more."""
    assert ExecutionContext(total_rows=total, processed_rows=total).get_progress() == 100.0
    assert ExecutionContext(total_rows=total, processed_rows=total - 1).get_progress() <= 100.0


@pytest.mark.parametrize(
    ("total", "processed", "failed", "skipped", "percent"),
    [(0, 0, 0, 0, 0.0), (0, 5, 0, 0, 0.0), (8, 1, 2, 1, 50.0), (8, 0, 4, 4, 100.0), (8, 9, 0, 0, 100.0)],
)
def test_progress(total: int, processed: int, failed: int, skipped: int, percent: float) -> None:
    """Failed and skipped rows are done too; an unknown total is 0 %, an exceeded one 100 %."""
    context = ExecutionContext(
        total_rows=total, processed_rows=processed, failed_rows=failed, skipped_rows=skipped, last_processed_row=10**6
    )
    assert context.get_progress() == percent
    assert context.completed_rows == processed + failed + skipped


@pytest.mark.parametrize("before", [True, False], ids=["counted before", "counted after"])
def test_update_row_and_failures(before: bool) -> None:
    """Failed and skipped rows are in no other count, on whichever side of ``update_row`` they are counted."""
    context = ExecutionContext(total_rows=10)
    for index in range(10):
        if not before:
            context.update_row(index)
        context.failed_rows += index in {2, 3}
        context.skipped_rows += index == 5
        if before:
            context.update_row(index)
    assert (context.processed_rows, context.failed_rows, context.skipped_rows) == (7, 2, 1)
    assert (context.get_progress(), context.last_processed_row) == (100.0, 9)


def test_update_row_jumps() -> None:
    """An index stands for all before it, one that moves back takes nothing away, -1 is none."""
    context = ExecutionContext()
    steps: list[tuple[Any, int]] = [(-1, 0), (0, 1), (49, 50), (20, 50), (np.int64(50), 51)]
    for index, processed in steps:
        context.update_row(index)
        assert (context.last_processed_row, context.processed_rows) == (index, processed)
    assert type(context.last_processed_row) is int


def test_update_stage() -> None:
    """The stage is the one given."""
    context = ExecutionContext()
    context.update_stage(3)
    assert context.current_stage_index == 3


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [
        ("update_stage(stage_index=)", -1),
        ("update_stage(stage_index=)", 1.0),
        ("update_row(row_index=)", -2),
        ("update_row(row_index=)", "1"),
        ("update_row(row_index=)", True),
    ],
)
def test_wrong_positions(setting: str, wrong: Any) -> None:
    """A position that no checkpoint could hold is refused, and changes nothing."""
    context = ExecutionContext(session_id=SESSION, start_time=BEGAN)
    before = context.to_checkpoint()
    with pytest.raises(ConfigError, match="give an integer of at least") as caught:
        getattr(context, setting.split("(", maxsplit=1)[0])(wrong)
    assert caught.value.setting == setting
    assert context.to_checkpoint() == before


def test_stats() -> None:
    """Speed is rows done per second, until the end or until now; a clock that went back makes it 0."""
    context = ExecutionContext(
        start_time=BEGAN, total_rows=100, processed_rows=40, failed_rows=6, skipped_rows=4, last_processed_row=7
    )
    assert context.get_stats(now=BEGAN + timedelta(seconds=25)) == ProcessingStats(
        total_rows=100,
        processed_rows=40,
        failed_rows=6,
        skipped_rows=4,
        results=None,
        rows_per_second=2.0,
        total_duration_seconds=25.0,
    )
    for now in (BEGAN, BEGAN - timedelta(hours=1)):
        stats = context.get_stats(now=now)
        assert (stats.rows_per_second, stats.total_duration_seconds) == (0.0, 0.0)
    context.end_time = BEGAN + timedelta(seconds=10)
    assert context.get_stats(now=BEGAN + timedelta(days=1)).rows_per_second == 5.0
    assert ExecutionContext(start_time=datetime.now(UTC) - timedelta(hours=1)).get_stats().total_duration_seconds > 3599


def test_cost_is_exact() -> None:
    """Ten tenths are one; integers and text are welcome; no digit is rounded away, whatever Decimal's context says."""
    context = ExecutionContext()
    for _ in range(10):
        context.add_cost(Decimal("0.1"), 3)
    assert (str(context.accumulated_cost), context.accumulated_tokens) == ("1.0", 30)
    with localcontext(prec=2):
        context.add_cost(10**30, np.int64(1))  # type: ignore[arg-type]
        context.add_cost("1E-30", 0)  # type: ignore[arg-type]
    assert context.accumulated_cost == Decimal(f"{10**30 + 1}.{1:030}")
    assert type(context.accumulated_tokens) is int


@pytest.mark.parametrize(
    ("cost", "tokens", "says"),
    [
        (0.1, 1, r"add_cost\(cost=\): got 0.1; give Decimal\('0.1'\): a float"),
        (np.float64(0.5), 1, r"give Decimal\('0.5'\)"),
        (float("nan"), 1, "a float"),
        ("much", 1, "'much'; this is no number"),
        ("-1", 1, "at least 0"),
        ("nan", 1, "finite"),
        (True, 1, "give a Decimal, an int, or a number as text"),
        (None, 1, "give a Decimal, an int, or a number as text"),
        (Decimal("-0.01"), 1, "at least 0"),
        (-1, 1, "at least 0"),
        (Decimal("NaN"), 1, "finite"),
        (Decimal("sNaN"), 1, "finite"),
        (Decimal("Infinity"), 1, "finite"),
        (Decimal("1E+300"), 1, "at most 40 digits before"),
        (Decimal("1E-1500000"), 1, "at most 40 digits before"),
        (Decimal(1), -1, r"add_cost\(tokens=\): got -1; give an integer of at least 0"),
        (Decimal(1), 1.0, "give an integer"),
        (Decimal(1), True, "give an integer"),
        (Decimal(1), None, "give an integer"),
    ],
)
def test_costs_that_are_none(cost: Any, tokens: Any, says: str) -> None:
    """Floats, negative and endless amounts are refused with the remedy, and then nothing is added."""
    context = ExecutionContext(accumulated_cost=Decimal("0.25"))
    with pytest.raises(ConfigError, match=says):
        context.add_cost(cost, tokens)
    assert (str(context.accumulated_cost), context.accumulated_tokens) == ("0.25", 0)


def test_no_float_through_the_constructor() -> None:
    """The total may be given as Decimal or int, and not as a float either."""
    assert str(ExecutionContext(accumulated_cost=2).accumulated_cost) == "2"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ExecutionContext\(accumulated_cost=\): got 0.5"):
        ExecutionContext(accumulated_cost=0.5)  # type: ignore[arg-type]


def test_observers(caplog: pytest.LogCaptureFixture) -> None:
    """All are told in order; one that raises is counted each time, logged once by name, and harms nobody."""
    good, bad, worse = Watcher(), Watcher(ValueError("no")), Watcher(KeyError("x"))
    context = ExecutionContext(total_rows=2, observers=[bad, good, worse])
    with caplog.at_level(logging.WARNING):
        for index in range(2):
            context.update_row(index)
            context.notify_progress()
    assert good.seen == bad.seen == worse.seen == [50.0, 100.0]
    assert context.observer_errors == 4
    assert [record.getMessage().split(" failed")[0] for record in caplog.records] == ["the observer Watcher"] * 2
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["no", "'x'"]


def test_observers_do_not_swallow_a_stop() -> None:
    """What is no Exception (Ctrl-C, cancellation) passes through."""
    context = ExecutionContext(observers=[Watcher(KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        context.notify_progress()
    assert context.observer_errors == 0


def test_an_observer_may_leave() -> None:
    """An observer that takes itself off the list does not make another one miss the news."""

    class Once(Watcher):
        def on_progress_update(self, context: ExecutionContext) -> None:
            context.observers.remove(self)

    last = Watcher()
    context = ExecutionContext(observers=[Once(), last])
    context.notify_progress()
    assert (context.observers, last.seen) == ([last], [0.0])


def test_a_dispatcher(caplog: pytest.LogCaptureFixture) -> None:
    """It is told after the observers, of the very context; what it raises counts like an observer's error."""

    class Passing:
        """Notes the progress, and fails."""

        def __init__(self) -> None:
            self.seen: list[ExecutionContext] = []

        def progress(self, context: ExecutionContext) -> None:
            self.seen.append(context)
            raise ValueError("no")

    passing, watcher = Passing(), Watcher()
    context = ExecutionContext(total_rows=1, observers=[watcher], observer_dispatcher=passing)
    context.notify_progress()
    context.notify_progress()
    assert passing.seen == [context, context]
    assert (watcher.seen, context.observer_errors) == ([0.0, 0.0], 2)
    (record,) = caplog.records
    assert "Passing failed; its next failures are only counted" in record.getMessage()


def test_names_are_for_people() -> None:
    """Names of pipeline, session and worker are neither compared nor stored, and a merged view has the first's."""
    one = ExecutionContext(pipeline_name="p", session_name="live", worker_name="w")
    two = replace(one, worker_name="x")
    assert one == two
    assert one.to_checkpoint() == two.to_checkpoint()
    again = ExecutionContext.from_checkpoint(one.to_checkpoint())
    assert (again.pipeline_name, again.session_name, again.worker_name) == ("", "", "")
    merged = ExecutionContext.merge([one, two])
    assert (merged.pipeline_name, merged.session_name, merged.worker_name) == ("p", "live", "w")


@given(contexts)
def test_round_trip(context: ExecutionContext) -> None:
    """A checkpoint has the twelve keys, survives JSON, and gives back an equal context and itself again."""
    data = context.to_checkpoint()
    assert list(data) == KEYS
    for text in (json.dumps(data), dumps(data)):
        back = ExecutionContext.from_checkpoint(loads(text))
        assert back == context
        assert back.to_checkpoint() == data
        assert str(back.accumulated_cost) == str(context.accumulated_cost)
        assert back.processed_rows == context.processed_rows
    assert ExecutionContext.from_dict(context.to_dict()) == context


def test_shape() -> None:
    """Ids and money are text, moments ISO 8601 in UTC; an in-order run leaves nothing in ``intermediate_data``."""
    zone = timezone(timedelta(hours=2))
    context = ExecutionContext(SESSION, PIPELINE, datetime(2024, 5, 1, 14, tzinfo=zone), total_rows=9)
    context.update_row(4)
    context.add_cost(Decimal("0.50"), 7)
    assert context.to_checkpoint() == {
        "session_id": str(SESSION),
        "pipeline_id": str(PIPELINE),
        "start_time": "2024-05-01T12:00:00+00:00",
        "end_time": None,
        "current_stage_index": 0,
        "last_processed_row": 4,
        "total_rows": 9,
        "accumulated_cost": "0.50",
        "accumulated_tokens": 7,
        "intermediate_data": {},
        "failed_rows": 0,
        "skipped_rows": 0,
    }


def test_where_the_count_travels() -> None:
    """A count that the position does not tell lies under the reserved key, and is gone from the loaded data."""
    first = ExecutionContext(intermediate_data={"a": 1})
    first.update_row(0)  # position 0 is also what no row at all looks like
    data = first.to_checkpoint()
    assert data["intermediate_data"] == {"a": 1, PROCESSED_KEY: 1}
    back = ExecutionContext.from_checkpoint(data)
    assert (back.processed_rows, back.intermediate_data) == (1, {"a": 1})


def test_the_reserved_key_is_refused() -> None:
    """Data of the user's under the reserved key would be lost, so it is an error."""
    context = ExecutionContext(intermediate_data={PROCESSED_KEY: 1})
    with pytest.raises(ConfigError, match=r"intermediate_data: got 'rowmill\.processed_rows'; .*rowmill's own"):
        context.to_checkpoint()


def test_a_checkpoint_is_a_copy() -> None:
    """Neither does a checkpoint change with its context, nor a context with the checkpoint it came from."""
    context = ExecutionContext(intermediate_data={"a": [1]})
    data = context.to_checkpoint()
    back = ExecutionContext.from_checkpoint(data)
    context.intermediate_data["a"].append(2)
    back.intermediate_data["a"].append(3)
    assert data["intermediate_data"] == {"a": [1]}


def test_equality_is_that_of_checkpoints() -> None:
    """Observers and trace ids do not make contexts differ; a row does."""
    one = ExecutionContext(observers=[Watcher()], trace_id="a")
    two = replace(one, observers=[], trace_id="b", span_id="c")
    assert one == two
    two.processed_rows += 1
    assert one != two


@pytest.mark.usefixtures("new_york")
def test_a_checkpoint_of_ondine() -> None:
    """The twelve keys as ondine 2.1 wrote them load; its moments were local time, position 41 were 42 rows."""
    data = old_checkpoint()
    context = ExecutionContext.from_checkpoint(data)
    assert str(context.session_id) == data["session_id"]
    assert str(context.pipeline_id) == data["pipeline_id"]
    assert context.start_time == datetime(2024, 5, 1, 16, 0, 0, 250_000, tzinfo=UTC)
    assert (context.current_stage_index, context.last_processed_row, context.total_rows) == (2, 41, 100)
    assert (context.accumulated_cost, context.accumulated_tokens) == (Decimal("0.0421"), 1234)
    assert context.intermediate_data == {"prompts": ["a", "b"]}
    assert (context.processed_rows, context.failed_rows, context.skipped_rows) == (39, 2, 1)
    assert context.get_progress() == 42.0
    assert context.to_checkpoint() == {**data, "start_time": "2024-05-01T16:00:00.250000+00:00"}
    assert data == old_checkpoint()


@pytest.mark.parametrize(
    ("changes", "processed"),
    [
        ({"last_processed_row": 0}, 0),
        ({"last_processed_row": -1}, 0),
        ({"last_processed_row": 1, "failed_rows": 0, "skipped_rows": 0}, 2),
        ({"last_processed_row": 1, "failed_rows": 3}, 0),
    ],
)
def test_rows_of_old_checkpoints(changes: dict[str, int], processed: int) -> None:
    """Position 0 is ondine's default and means no row; the count is never negative; writing it again loses nothing."""
    data = {**old_checkpoint(), **changes, "start_time": BEGAN.isoformat()}
    context = ExecutionContext.from_checkpoint(data)
    assert context.processed_rows == processed
    assert context.to_checkpoint() == data


@pytest.mark.usefixtures("new_york")
def test_naive_moments() -> None:
    """Moments without a zone are local time, also when they are set later on, and never clash with others."""
    context = ExecutionContext(start_time=datetime(2024, 5, 1, 8), end_time=datetime(2024, 5, 1, 9))  # noqa: DTZ001
    assert (context.start_time, context.end_time) == (BEGAN, BEGAN + timedelta(hours=1))
    context.end_time = datetime(2024, 5, 1, 10)  # noqa: DTZ001
    assert context.get_stats().total_duration_seconds == 7200.0
    assert context.to_checkpoint()["end_time"] == "2024-05-01T14:00:00+00:00"
    assert ExecutionContext.merge([context]).end_time == BEGAN + timedelta(hours=2)


def test_keys_that_may_be_absent_or_unknown() -> None:
    """Keys that came later default, keys of somebody else's are left out."""
    data = old_checkpoint()
    for key in ("end_time", "intermediate_data", "failed_rows", "skipped_rows"):
        del data[key]
    context = ExecutionContext.from_checkpoint({**data, "schema": 9, "observers": ["x"]})
    assert (context.end_time, context.intermediate_data, context.observers) == (None, {}, [])
    assert (context.failed_rows, context.skipped_rows, context.processed_rows) == (0, 0, 42)
    assert list(context.to_checkpoint()) == KEYS


@pytest.mark.parametrize("key", [*KEYS[:3], *KEYS[4:9]])
def test_missing_keys(key: str) -> None:
    """A key that has no default is named, with what it should be and what is there."""
    data = old_checkpoint()
    del data[key]
    with pytest.raises(CheckpointError, match=rf"lacks '{key}'; expected an? .*; found the keys \['acc"):
        ExecutionContext.from_checkpoint(data)


@pytest.mark.parametrize(
    ("key", "wrong", "expected"),
    [
        ("session_id", "x", "a UUID"),
        ("session_id", 5, "a UUID"),
        ("pipeline_id", None, "a UUID"),
        ("start_time", 1714564800, "ISO 8601"),
        ("start_time", "yesterday", "ISO 8601"),
        ("start_time", "0001-01-01T00:00:00+14:00", "ISO 8601"),
        ("start_time", None, "ISO 8601"),
        ("end_time", "", "ISO 8601"),
        ("current_stage_index", "2", "an integer of at least 0"),
        ("last_processed_row", -2, "an integer of at least -1"),
        ("total_rows", 5.0, "an integer"),
        ("total_rows", True, "an integer"),
        ("accumulated_cost", 0.1, "as text"),
        ("accumulated_cost", "much", "as text"),
        ("accumulated_cost", "NaN", "finite"),
        ("accumulated_cost", "-1", "at least 0"),
        ("accumulated_cost", "1E+99999999999999999999", "finite"),
        ("accumulated_tokens", None, "an integer"),
        ("intermediate_data", None, "a JSON object"),
        ("intermediate_data", ["x" * 1000], "a JSON object"),
        ("failed_rows", -1, "an integer"),
        ("skipped_rows", "0", "an integer"),
    ],
)
def test_wrong_values(key: str, wrong: Any, expected: str) -> None:
    """A value of the wrong kind is an error of ours that names the key, the value and what it should be."""
    with pytest.raises(CheckpointError, match=f"'{key}' is .*; expected .*{expected}") as caught:
        ExecutionContext.from_checkpoint({**old_checkpoint(), key: wrong})
    assert isinstance(caught.value, RowmillError)
    assert repr(wrong)[:80] in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("wrong", [-1, "1", None, 1.5])
def test_wrong_count(wrong: Any) -> None:
    """The count under the reserved key is checked like the others."""
    with pytest.raises(CheckpointError, match=r"'rowmill\.processed_rows' is .*; expected an integer of at least 0"):
        ExecutionContext.from_checkpoint({**old_checkpoint(), "intermediate_data": {PROCESSED_KEY: wrong}})


@pytest.mark.parametrize("wrong", [None, [], "{}", 3])
def test_no_object(wrong: Any) -> None:
    """A checkpoint that is no object says what it is."""
    with pytest.raises(CheckpointError, match="a context's checkpoint is a JSON object; found"):
        ExecutionContext.from_checkpoint(wrong)


def test_merge() -> None:
    """Rows, money and tokens are sums; it began with the first, and the stage is the one that all have reached."""
    one = ExecutionContext(
        SESSION, PIPELINE, BEGAN, BEGAN + timedelta(hours=1), 2, 10, 50, Decimal("0.10"), 5, {"a": 1}, 1, 2, [Watcher()]
    )
    two = ExecutionContext(
        SESSION, PIPELINE, BEGAN - timedelta(hours=1), BEGAN, 1, 900, 30, Decimal("0.2"), 7, {"b": 2}, 3, 4
    )
    one.processed_rows, two.processed_rows = 20, 23
    one.observer_errors = 3
    view = ExecutionContext.merge([one, two])
    assert (view.session_id, view.pipeline_id, view.trace_id, view.span_id) == (
        SESSION,
        PIPELINE,
        one.trace_id,
        one.span_id,
    )
    assert (view.start_time, view.end_time) == (BEGAN - timedelta(hours=1), BEGAN + timedelta(hours=1))
    assert (view.current_stage_index, view.last_processed_row) == (1, 900)
    assert (view.total_rows, view.processed_rows, view.failed_rows, view.skipped_rows) == (80, 43, 4, 6)
    assert (str(view.accumulated_cost), view.accumulated_tokens) == ("0.30", 12)
    assert (view.intermediate_data, view.observers, view.observer_errors) == ({}, [], 3)
    assert view.get_progress() == 100 * 53 / 80


def test_merged_costs_are_exact() -> None:
    """Ten partitions that paid a tenth each paid one, whatever Decimal's context says."""
    parts = [ExecutionContext(SESSION, accumulated_cost=Decimal("0.1")) for _ in range(10)]
    with localcontext(prec=1):
        assert str(ExecutionContext.merge(iter(parts)).accumulated_cost) == "1.0"


def test_over_when_all_are() -> None:
    """As long as one partition goes on, the session does."""
    parts = [ExecutionContext(SESSION, start_time=BEGAN, end_time=BEGAN) for _ in range(3)]
    assert ExecutionContext.merge(parts).end_time == BEGAN
    parts[1].end_time = None
    assert ExecutionContext.merge(parts).end_time is None


@given(st.lists(contexts, min_size=1, max_size=5), st.data())
def test_merge_is_associative(parts: list[ExecutionContext], data: st.DataObject) -> None:
    """However the partitions are grouped, the view is the same to the last digit."""
    cuts = sorted({0, len(parts), *data.draw(st.lists(st.integers(0, len(parts))))})
    grouped = [ExecutionContext.merge(parts[begin:end]) for begin, end in pairwise(cuts)]
    whole, regrouped = ExecutionContext.merge(parts), ExecutionContext.merge(grouped)
    assert regrouped == whole
    assert str(regrouped.accumulated_cost) == str(whole.accumulated_cost)
    assert whole.accumulated_cost == ExecutionContext.merge(parts[::-1]).accumulated_cost
    assert regrouped.trace_id == whole.trace_id


def test_merging_what_does_not_belong_together() -> None:
    """No context and contexts of two sessions are errors that say so."""
    with pytest.raises(ConfigError, match=r"merge\(contexts=\): got \[\]; give at least one context"):
        ExecutionContext.merge([])
    with pytest.raises(ConfigError, match=f"give contexts of one session: {SESSION}"):
        ExecutionContext.merge([ExecutionContext(SESSION), ExecutionContext(session_uuid("rowmill.other"))])


def test_ids_of_names() -> None:
    """A name has the same id in every process and version, another name another one, a pipeline never a session's."""
    assert session_uuid("rowmill.p") == UUID("de018b17-3bac-5ec8-bfb7-0f2ed4d7f9bd")
    assert pipeline_uuid("p") == UUID("5072b660-8f36-527a-9db3-cbe022720eef")
    names = ["p", "rowmill.p", "rowmill.p.live", "é", ""]
    assert len({made(name) for made in (session_uuid, pipeline_uuid) for name in names}) == 2 * len(names)
