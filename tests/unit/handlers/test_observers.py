"""Observers: told of everything in order, on threads of their own, and never at the cost of who tells them."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from decimal import Decimal
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rowmill.handlers.budget import Budget
from rowmill.handlers.observers import (
    CostReport,
    CostTrackingObserver,
    ExecutionObserver,
    LoggingObserver,
    ObserverDispatcher,
    ProgressBarObserver,
    RowFailure,
    checked_observer,
)
from rowmill.handlers.runtime import Event
from rowmill.handlers.stage import Stage, make_stage
from rowmill.handlers.stage_counts import StageCounts
from rowmill.state.codec import dumps, loads
from rowmill.state.context import ExecutionContext, ProgressObserver
from rowmill.state.errors import ConfigError, RowmillError
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(20)

PATIENCE = 10.0


def clean(row: Any) -> Any:
    """A handler."""
    return row


def score(row: Any) -> Any:
    """Another one."""
    return row


PIPELINE = SimpleNamespace(name="reviews", stages=(make_stage(clean), make_stage(score)), budget=None)


def at(rows: int, total: int = 0, *, failed: int = 0, cost: str = "0", tokens: int = 0) -> ExecutionContext:
    """A context with so many rows done."""
    return ExecutionContext(
        processed_rows=rows - failed,
        failed_rows=failed,
        total_rows=total,
        accumulated_cost=Decimal(cost),
        accumulated_tokens=tokens,
    )


def row_failed(offset: int = 0, stage: str = "score", **more: Any) -> Event:
    """A row became a dead letter."""
    detail = {"type": "ValueError", "message": "no text", "topic": "reviews", "partition": 0, "offset": offset}
    return Event("row_failed", stage, {**detail, "attempts": 3, "then": "dead_letter", **more})


class Recorder(ExecutionObserver):
    """Notes every call: what, and of what."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: list[ExecutionContext] = []
        self.errors: list[Any] = []
        self.threads: set[str] = set()
        self.heard = threading.Semaphore(0)

    def note(self, context: ExecutionContext, *call: Any) -> None:
        """Keep it."""
        self.calls.append(call)
        self.contexts.append(context)
        self.threads.add(threading.current_thread().name)
        self.heard.release()

    def on_pipeline_start(self, pipeline: Any, context: ExecutionContext) -> None:
        self.note(context, "pipeline_start", pipeline.name)

    def on_stage_start(self, stage: Stage, context: ExecutionContext) -> None:
        self.note(context, "stage_start", stage.name)

    def on_stage_complete(self, stage: Stage, context: ExecutionContext, result: StageCounts | None) -> None:
        self.note(context, "stage_complete", stage.name, result)

    def on_stage_error(self, stage: Stage, context: ExecutionContext, error: Exception) -> None:
        self.errors.append(error)
        self.note(context, "stage_error", stage.name, str(error))

    def on_pipeline_complete(self, context: ExecutionContext, result: Any) -> None:
        self.note(context, "pipeline_complete", result)

    def on_pipeline_error(self, context: ExecutionContext, error: Exception) -> None:
        self.errors.append(error)
        self.note(context, "pipeline_error", str(error))

    def on_progress_update(self, context: ExecutionContext) -> None:
        self.note(context, "progress", context.completed_rows)


class Gated(Recorder):
    """Waits in its first call until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.gate = threading.Event()

    def note(self, context: ExecutionContext, *call: Any) -> None:
        super().note(context, *call)
        self.entered.set()
        assert self.gate.wait(PATIENCE)


@pytest.fixture
def gated() -> Iterator[Gated]:
    """An observer that is stuck until its gate is opened, at the latest with the test's end."""
    observer = Gated()
    yield observer
    observer.gate.set()


# --- the dispatcher --------------------------------------------------------------------------------------------


def test_everything_in_order() -> None:
    """Start, stages in order, progress, a row's failure, stages with their counts, the end: on one other thread."""
    seen = Recorder()
    counts = StageCounts(calls=5, retries=2)
    dispatcher = ObserverDispatcher([seen], stage_counts={"score": counts})
    dispatcher.started(PIPELINE, at(0))
    dispatcher.hear(row_failed())
    dispatcher.progress(at(7))
    dispatcher.completed(at(9), "result")
    counts.calls = 99  # too late
    dispatcher.close(PATIENCE)
    assert seen.calls == [
        ("pipeline_start", "reviews"),
        ("stage_start", "clean"),
        ("stage_start", "score"),
        ("stage_error", "score", "ValueError: no text"),
        ("progress", 7),
        ("stage_complete", "clean", None),
        ("stage_complete", "score", StageCounts(calls=5, retries=2)),
        ("pipeline_complete", "result"),
    ]
    assert seen.threads == {"rowmill-observer-Recorder"}
    assert (dispatcher.errors, dispatcher.dropped) == ({}, {})


def test_contexts_are_copies_with_names() -> None:
    """An observer sees the context as it was when it was told of, under the names that people use."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen], session="live", worker="0a1b2c3d")
    context = at(1)
    context.observers.append(seen)
    context.observer_dispatcher = dispatcher
    dispatcher.started(PIPELINE, context)
    context.processed_rows, context.session_name = 50, "other"
    dispatcher.progress(context)
    dispatcher.close(PATIENCE)
    assert [found.completed_rows for found in seen.contexts[:3]] == [1, 1, 1]
    assert {(found.pipeline_name, found.worker_name) for found in seen.contexts} == {("reviews", "0a1b2c3d")}
    assert [found.session_name for found in seen.contexts][2:4] == ["live", "other"]
    assert all(found.observers == [] and found.observer_dispatcher is None for found in seen.contexts)
    assert (context.observers, context.pipeline_name) == ([seen], "")


def test_a_slow_observer_slows_nobody(gated: Gated, caplog: pytest.LogCaptureFixture) -> None:
    """What does not fit into its queue is dropped, counted and warned of once; an observer beside it hears all."""
    quick = Recorder()
    dispatcher = ObserverDispatcher([gated, quick], queue=10)
    dispatcher.hear(row_failed(0))
    assert gated.entered.wait(PATIENCE)
    for offset in range(1, 51):
        assert quick.heard.acquire(timeout=PATIENCE)  # its queue is as short, but it keeps up
        dispatcher.hear(row_failed(offset))
    assert dispatcher.dropped == {"Gated": 40}
    gated.gate.set()
    dispatcher.close(PATIENCE)
    assert [error.offset for error in gated.errors] == list(range(11))
    assert [error.offset for error in quick.errors] == list(range(51))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["the observer Gated is too slow"]


def test_progress_is_coalesced(gated: Gated) -> None:
    """Of the progress that waits only the newest is told; it neither fills the queue nor counts as dropped."""
    dispatcher = ObserverDispatcher([gated], queue=1)
    dispatcher.progress(at(0))
    assert gated.entered.wait(PATIENCE)
    for rows in range(1, 101):
        dispatcher.progress(at(rows))
    gated.gate.set()
    dispatcher.close(PATIENCE)
    assert gated.calls == [("progress", 0), ("progress", 100)]
    assert dispatcher.dropped == {}


def test_starts_and_ends_are_never_dropped(gated: Gated) -> None:
    """However full the queue is, an observer hears how it ends."""
    dispatcher = ObserverDispatcher([gated], queue=1)
    dispatcher.started(PIPELINE, at(0))
    assert gated.entered.wait(PATIENCE)
    for offset in range(5):
        dispatcher.hear(row_failed(offset))
    dispatcher.failed(at(3), ValueError("over"))
    gated.gate.set()
    dispatcher.close(PATIENCE)
    assert [call[0] for call in gated.calls] == ["pipeline_start", "stage_start", "stage_start", "pipeline_error"]
    assert dispatcher.dropped == {"Gated": 5}  # the two starts were waiting


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_an_observer_that_raises(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """It goes on being told, its errors are counted, and logged once, with the traceback; nobody else notices."""

    class Broken(Recorder):
        def note(self, context: ExecutionContext, *call: Any) -> None:
            super().note(context, *call)
            raise error

    broken, seen = Broken(), Recorder()
    dispatcher = ObserverDispatcher([broken, seen])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.completed(at(1))
    dispatcher.close(PATIENCE)
    assert broken.calls == seen.calls
    assert dispatcher.errors == {"Broken": 6}
    (record,) = caplog.records
    assert record.getMessage() == "the observer Broken failed; its next failures are only counted"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_an_observer_that_hangs_is_left_behind(gated: Gated, caplog: pytest.LogCaptureFixture) -> None:
    """Closing waits for it no longer than it may; what it misses is counted, and others have heard the end."""
    ended = threading.Event()

    class Quick(Recorder):
        def on_pipeline_complete(self, context: ExecutionContext, result: Any) -> None:
            ended.set()

    dispatcher = ObserverDispatcher([gated, Quick()])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.progress(at(1))
    dispatcher.completed(at(1))
    assert gated.entered.wait(PATIENCE)
    assert ended.wait(PATIENCE)
    dispatcher.close(0.05)
    assert dispatcher.dropped == {"Gated": 5}  # two stages that start and two that end, and the end; progress is none
    assert "did not come to an end: observers Gated" in caplog.records[-1].getMessage()
    thread = next(each for each in threading.enumerate() if each.name == "rowmill-observer-Gated")
    assert thread.daemon
    gated.gate.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert gated.calls == [("pipeline_start", "reviews")]


def test_closing_twice_and_telling_afterwards() -> None:
    """Once it is closed, telling does nothing, and closing again neither."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.completed(at(0))
    dispatcher.close(PATIENCE)
    heard = list(seen.calls)
    dispatcher.hear(row_failed())
    dispatcher.progress(at(1))
    dispatcher.started(PIPELINE, at(0))
    dispatcher.close(PATIENCE)
    assert seen.calls == heard


def test_an_idle_observer_ends(caplog: pytest.LogCaptureFixture) -> None:
    """Closing wakes threads that wait for something to tell; none stays behind."""
    for _ in range(20):
        seen = Recorder()
        dispatcher = ObserverDispatcher([seen])
        dispatcher.hear(row_failed())
        assert seen.heard.acquire(timeout=PATIENCE)
        dispatcher.close(PATIENCE)
    assert caplog.records == []


def test_a_start_is_told_once() -> None:
    """A worker begins once, whatever is said later."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.started(SimpleNamespace(name="other", stages=()), at(0))
    dispatcher.completed(at(0))
    dispatcher.close(PATIENCE)
    assert [call for call in seen.calls if call[0] == "pipeline_start"] == [("pipeline_start", "reviews")]


def test_nothing_comes_after_the_end() -> None:
    """The end is told once, and last, whatever else is said."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.failed(at(1), ValueError("first"))
    dispatcher.failed(at(1), ValueError("second"))
    dispatcher.completed(at(1))
    dispatcher.progress(at(2))
    dispatcher.hear(row_failed())
    dispatcher.close(PATIENCE)
    assert seen.calls[3:] == [("pipeline_error", "first")]


def test_a_start_that_failed() -> None:
    """A worker that fails before it begins is told of as well; what is no Exception comes as the cause of one."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen])
    cause = KeyboardInterrupt()
    dispatcher.failed(at(0), cause)
    dispatcher.close(PATIENCE)
    assert seen.calls == [("pipeline_error", "ended by KeyboardInterrupt")]
    assert seen.errors[0].__cause__ is cause


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ({"reason": "stopped"}, ("pipeline_complete", None)),
        ({"reason": "finished", "message": ""}, ("pipeline_complete", None)),
        ({"reason": "cancelled"}, ("pipeline_complete", None)),
        ({"reason": "row"}, ("pipeline_complete", None)),
        ({"reason": "failed", "message": "no broker"}, ("pipeline_error", "no broker")),
        ({"reason": "failed"}, ("pipeline_error", "the worker failed")),
        (None, ("pipeline_error", "the worker ended without saying why")),
    ],
)
def test_the_end_by_the_workers_own_words(said: dict[str, Any] | None, end: tuple[Any, ...]) -> None:
    """Where nobody says how it ended, observers hear what the worker said, when the dispatcher is closed."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.progress(at(4))
    if said is not None:
        dispatcher.hear(Event("worker_stopped", "", said))
    dispatcher.close(PATIENCE)
    assert seen.calls[-1] == end
    assert seen.contexts[-1].completed_rows == 4


def test_other_events_are_none_of_theirs() -> None:
    """Observers hear of rows that fail; a dispatcher that was never started has no end to tell."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen])
    for kind in ("worker_started", "progress", "breaker_open", "worker_stopped", "session_failed"):
        dispatcher.hear(Event(kind, "x", {}))
    dispatcher.close(PATIENCE)
    assert seen.calls == []


@pytest.mark.parametrize(
    ("told", "found"),
    [("score", "score"), ("score/ask", "score"), ("input", "input"), ("tables", "tables"), ("gone/by", "gone/by")],
)
def test_the_stage_of_a_failure(told: str, found: str) -> None:
    """It is the pipeline's; an element's for a stage inside of it; a stand-in for what is no stage at all."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.hear(row_failed(stage=told))
    dispatcher.close(PATIENCE)
    (call,) = (call for call in seen.calls if call[0] == "stage_error")
    assert call[1] == found
    (error, _) = seen.errors
    assert isinstance(error, RowFailure)
    assert error.stage == told


def test_what_a_failure_tells() -> None:
    """Row, reason, attempts and what became of it; what an event leaves out has a default."""
    error = RowFailure.from_event(row_failed(12, then="skip"))
    assert (error.kind, error.message, error.attempts, error.then) == ("ValueError", "no text", 3, "skip")
    assert (error.topic, error.partition, error.offset, error.row) == ("reviews", 0, 12, "reviews/0/12")
    assert str(error) == "ValueError: no text"
    bare = RowFailure.from_event(Event("row_failed", "s", {}))
    assert (bare.stage, bare.partition, bare.attempts, bare.then) == ("s", -1, 1, "dead_letter")


def test_told_from_many_threads() -> None:
    """Eight threads tell at once: nothing is lost, and the observer is still called one call at a time."""
    busy = threading.Lock()

    class Alone(Recorder):
        def note(self, context: ExecutionContext, *call: Any) -> None:
            assert busy.acquire(blocking=False)
            super().note(context, *call)
            busy.release()

    seen = Alone()
    dispatcher = ObserverDispatcher([seen], queue=10_000)
    together = threading.Barrier(8)

    def tell(number: int) -> None:
        together.wait(PATIENCE)
        for offset in range(200):
            dispatcher.hear(row_failed(number * 1_000 + offset))
            dispatcher.progress(at(offset))

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    dispatcher.close(PATIENCE)
    offsets = [error.offset for error in seen.errors]
    assert sorted(offsets) == [number * 1_000 + offset for number in range(8) for offset in range(200)]
    assert [offset for offset in offsets if offset < 1_000] == list(range(200))  # each teller's in order
    assert (dispatcher.errors, dispatcher.dropped) == ({}, {})


def test_without_observers() -> None:
    """Nobody listens: nothing is made, no thread is started."""
    before = threading.active_count()
    dispatcher = ObserverDispatcher([])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.progress(at(1))
    dispatcher.hear(row_failed())
    dispatcher.completed(at(1))
    dispatcher.close(PATIENCE)
    assert threading.active_count() == before


def test_names_and_repeats() -> None:
    """Observers of one class are numbered; the same one is told once, however often it was given."""

    class Broken(Recorder):
        def on_pipeline_start(self, pipeline: Any, context: ExecutionContext) -> None:
            super().on_pipeline_start(pipeline, context)
            raise ValueError("no")

    first, second = Broken(), Broken()
    dispatcher = ObserverDispatcher([first, second, first])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.completed(at(0))
    dispatcher.close(PATIENCE)
    assert dispatcher.errors == {"Broken": 1, "Broken-2": 1}
    assert len(first.calls) == len(second.calls) == 6


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A machine without a free thread costs the observers their news, and the worker nothing."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    dispatcher = ObserverDispatcher([Recorder()])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.completed(at(0))
    dispatcher.close(PATIENCE)
    assert [r.getMessage() for r in caplog.records] == ["the observer Recorder hears nothing: can't start new thread"]


def test_a_contexts_dispatcher() -> None:
    """``notify_progress`` reaches observers behind a dispatcher; an ExecutionObserver may be told directly as well."""
    direct, behind = Recorder(), Recorder()
    dispatcher = ObserverDispatcher([behind])
    known: ProgressObserver = direct
    context = ExecutionContext(total_rows=2, observers=[known], observer_dispatcher=dispatcher)
    context.update_row(1)
    context.notify_progress()
    assert direct.calls == [("progress", 2)]
    dispatcher.close(PATIENCE)
    assert behind.calls == [("progress", 2)]


class Async(ExecutionObserver):
    """A mistake: nobody awaits it."""

    async def on_progress_update(self, context: ExecutionContext) -> None:  # type: ignore[override]
        """Never called."""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, r"got None; it has no on_pipeline_start\(\); inherit from ExecutionObserver"),
        (print, r"it has no on_pipeline_start\(\)"),
        (SimpleNamespace(on_pipeline_start=print), r"it has no on_stage_start\(\)"),
        (Recorder, r"give an object: Recorder\(\)"),
        (Async(), r"on_progress_update\(\) is async"),
    ],
)
def test_what_is_no_observer(given: Any, says: str) -> None:
    """It is refused where it is given, and the message says what to give."""
    with pytest.raises(ConfigError, match=rf"^add_observer\(observer\): .*{says}"):
        checked_observer(given, "add_observer(observer)")
    with pytest.raises(ConfigError, match=r"^ObserverDispatcher\(observers\): "):
        ObserverDispatcher([given])


@pytest.mark.parametrize("queue", [0, -1, 1.5, True, "10"])
def test_bad_queue(queue: Any) -> None:
    """The queue is a whole number from 1."""
    with pytest.raises(ConfigError, match=r"ObserverDispatcher\(queue=\)"):
        ObserverDispatcher([], queue=queue)


def test_the_base_does_nothing() -> None:
    """Every callback is there, so that an observer needs only those that it wants."""
    observer = ExecutionObserver()
    dispatcher = ObserverDispatcher([observer])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.hear(row_failed())
    dispatcher.progress(at(1))
    dispatcher.completed(at(1))
    dispatcher.close(PATIENCE)
    observer.on_pipeline_error(at(0), ValueError())
    assert (dispatcher.errors, dispatcher.dropped) == ({}, {})


# --- logs ------------------------------------------------------------------------------------------------------


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and text of what was logged."""
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_lines_of_log(caplog: pytest.LogCaptureFixture) -> None:
    """One line per event, at the level that fits it; amounts as people read them."""
    observer = LoggingObserver(every=0, clock=FakeClock())
    dispatcher = ObserverDispatcher([observer], stage_counts={"score": StageCounts(calls=1_200, retries=3, seconds=2)})
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        dispatcher.started(PIPELINE, at(0))
        dispatcher.hear(row_failed(12, message="no\ntext"))
        dispatcher.progress(at(1_200, 5_000, failed=3, cost="0.4200"))
        dispatcher.completed(at(5_000, 5_000, failed=3, cost="1.10"))
        dispatcher.close(PATIENCE)
    assert logged(caplog) == [
        ("INFO", "pipeline reviews: started (stages clean, score)"),
        ("INFO", "stage clean: started"),
        ("INFO", "stage score: started"),
        ("WARNING", "stage score: ValueError: no text (row reviews/0/12, attempt 3, dead_letter)"),
        ("INFO", "pipeline reviews: 1,200 of 5,000 rows (24.0 %), 3 failed, cost 0.4200, 0 rows/s"),
        ("INFO", "stage clean: completed"),
        ("INFO", "stage score: completed (1,200 calls, 3 retries, 2 seconds)"),
        ("INFO", "pipeline reviews: completed, 5,000 of 5,000 rows (100.0 %), 3 failed, cost 1.10"),
    ]


@pytest.mark.parametrize(
    ("rows", "total", "how"), [(5, 5, "completed"), (6, 5, "completed"), (0, 0, "completed"), (3, 5, "ended")]
)
def test_a_run_that_ended_early(rows: int, total: int, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A run that was cancelled has ended, by its line and by its event: only one with all its rows is complete."""
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        LoggingObserver().on_pipeline_complete(at(rows, total), None)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"pipeline : {how}, {rows}")
    assert (vars(record)["event"], vars(record)["rows"], record.levelname) == (f"pipeline_{how}", rows, "INFO")


def test_fields_of_log(caplog: pytest.LogCaptureFixture) -> None:
    """Every record has the same fields for formatters; those of a row are filled where there is a row."""
    dispatcher = ObserverDispatcher([LoggingObserver(every=0)], session="live", worker="w1")
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        dispatcher.started(PIPELINE, at(0))
        dispatcher.hear(row_failed(12))
        dispatcher.progress(at(3, 4, cost="0.10", tokens=7))
        dispatcher.failed(at(3, 4), ValueError("no"))
        dispatcher.close(PATIENCE)
    records = {vars(record)["event"]: vars(record) for record in caplog.records}
    names = {"pipeline": "reviews", "session": "live", "worker": "w1"}
    assert list(records) == ["pipeline_started", "stage_started", "row_failed", "progress", "pipeline_failed"]
    for fields in records.values():
        assert {name: fields[name] for name in names} == names
        assert {"topic", "partition", "offset"} <= fields.keys()
    row = records["row_failed"]
    assert (row["topic"], row["partition"], row["offset"], row["stage"]) == ("reviews", 0, 12, "score")
    assert (row["type"], row["attempts"], row["then"]) == ("ValueError", 3, "dead_letter")
    progress = records["progress"]
    assert (progress["topic"], progress["rows"], progress["total_rows"], progress["cost"]) == (None, 3, 4, "0.10")
    assert (progress["tokens"], records["pipeline_failed"]["type"]) == (7, "ValueError")
    assert records["pipeline_started"]["stages"] == ["clean", "score"]


def test_a_session_without_a_name(caplog: pytest.LogCaptureFixture) -> None:
    """Its id stands for it."""
    context = at(0)
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        LoggingObserver().on_stage_start(PIPELINE.stages[0], context)
    assert vars(caplog.records[0])["session"] == str(context.session_id)


def test_what_handlers_say_stays_on_its_line(caplog: pytest.LogCaptureFixture) -> None:
    """Line breaks and terminal codes in a message cannot forge lines of log, and a long one is cut."""
    observer = LoggingObserver()
    evil = RowFailure("score", "ValueError", "a\r\nERROR all is lost\x1b[2J" + "x" * 1_000)
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        observer.on_stage_error(PIPELINE.stages[0], at(0), evil)
        observer.on_pipeline_error(at(0), ValueError("a\nb"))
        observer.on_stage_error(PIPELINE.stages[0], at(0), KeyError("k"))
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith("stage score: ValueError: a  ERROR all is lost [2Jxxx")
    assert len(first) < 600
    assert second == "pipeline : failed, 0 rows: ValueError: a b"
    assert third.startswith("stage clean: KeyError: 'k'")
    assert all(text.isprintable() for text in (first, second, third))


def test_progress_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """A line about progress every so many seconds, with the speed since the last one; percents are rounded down."""
    clock = FakeClock()
    observer = LoggingObserver(every=10, clock=clock)
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        observer.on_pipeline_start(PIPELINE, at(100))
        caplog.clear()
        for second in range(1, 26):
            clock.advance(1)
            observer.on_progress_update(at(100 + 20 * second, 1_000_000))
    assert [record.getMessage() for record in caplog.records] == [
        "pipeline : 300 of 1,000,000 rows (0.0 %), 20 rows/s",
        "pipeline : 500 of 1,000,000 rows (0.0 %), 20 rows/s",
    ]
    caplog.clear()
    clock.advance(10)
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        observer.on_progress_update(at(999_999, 1_000_000))
    assert "(99.9 %)" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("level", "ordinary", "failed_row", "failed"),
    [
        (logging.DEBUG, "DEBUG", "WARNING", "ERROR"),
        ("info", "INFO", "WARNING", "ERROR"),
        ("ERROR", "ERROR", "ERROR", "ERROR"),
        (logging.CRITICAL, "CRITICAL", "CRITICAL", "CRITICAL"),
    ],
)
def test_levels(level: Any, ordinary: str, failed_row: str, failed: str, caplog: pytest.LogCaptureFixture) -> None:
    """The level is that of ordinary events; failures are at least warnings, a worker's end by one an error."""
    observer = LoggingObserver(logging.getLogger("mine"), level)
    with caplog.at_level(logging.DEBUG, logger="mine"):
        observer.on_pipeline_start(PIPELINE, at(0))
        observer.on_stage_error(PIPELINE.stages[0], at(0), ValueError())
        observer.on_pipeline_error(at(0), ValueError())
    assert [record.levelname for record in caplog.records] == [ordinary, failed_row, failed]
    assert {record.name for record in caplog.records} == {"mine"}


def test_a_level_that_is_off(caplog: pytest.LogCaptureFixture) -> None:
    """What nobody wants to read is not written."""
    with caplog.at_level(logging.WARNING, logger="rowmill.observer"):
        LoggingObserver().on_pipeline_start(PIPELINE, at(0))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"level": "LOUD"}, "level"),
        ({"level": None}, "level"),
        ({"level": True}, "level"),
        ({"every": -1}, "every"),
        ({"every": "10"}, "every"),
    ],
)
def test_bad_options_of_logs(options: dict[str, Any], setting: str) -> None:
    """A wrong option is named."""
    with pytest.raises(ConfigError, match=rf"LoggingObserver\({setting}=\)"):
        LoggingObserver(**options)


# --- the bar ---------------------------------------------------------------------------------------------------


class Terminal(StringIO):
    """A file that says it is a terminal, or not."""

    def __init__(self, *, is_terminal: bool = True) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def last_line(file: StringIO) -> str:
    """What the bar shows at the end."""
    return file.getvalue().rstrip("\n").rsplit("\r", 1)[-1].strip()


def test_a_bar() -> None:
    """Committed rows over the rows that there are, and what went wrong; it stays when the pipeline is done."""
    file = Terminal()
    dispatcher = ObserverDispatcher([ProgressBarObserver(file=file)])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.progress(at(40, 100))
    dispatcher.completed(at(100, 100, failed=2, cost="0.50"))
    dispatcher.close(PATIENCE)
    assert dispatcher.errors == {}
    assert last_line(file).startswith("reviews: 100%")
    assert "100/100" in last_line(file)
    assert "2 failed, cost 0.50" in last_line(file)
    assert file.getvalue().endswith("\n")


def test_a_bar_that_fails_and_begins_anew() -> None:
    """An error leaves it where it was; the same observer draws a new one, from where the next run begins."""
    file = Terminal()
    observer = ProgressBarObserver("again", file=file)
    observer.on_pipeline_start(PIPELINE, at(0, 10))
    observer.on_progress_update(at(5, 10))
    observer.on_progress_update(at(3, 10))  # a partition went elsewhere
    observer.on_pipeline_error(at(3, 10), ValueError("no"))
    assert last_line(file).startswith("again:  30%")
    assert "3.00/10.0" in last_line(file)
    observer.on_pipeline_start(PIPELINE, at(3, 10))
    observer.on_pipeline_start(PIPELINE, at(3, 10))  # without an end before: that bar is closed
    assert observer._bar is not None
    assert observer._bar.initial == 3  # which is not this run's speed
    observer.on_pipeline_complete(at(10, 10), None)
    assert last_line(file).startswith("again: 100%")
    observer.on_progress_update(at(10, 10))  # too late: nothing to draw


@pytest.mark.parametrize(
    ("shown", "is_terminal", "drawn"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_where_a_bar_is_drawn(shown: bool | None, is_terminal: bool, drawn: bool) -> None:
    """On a terminal only, unless told otherwise."""
    file = Terminal(is_terminal=is_terminal)
    observer = ProgressBarObserver(shown=shown, file=file)
    observer.on_pipeline_start(PIPELINE, at(0))
    observer.on_progress_update(at(5))
    observer.on_pipeline_complete(at(5), None)
    assert bool(file.getvalue()) is drawn


def test_no_bar_no_tqdm() -> None:
    """tqdm is imported for a bar that is drawn, and not before."""
    code = (
        "import sys\nfrom types import SimpleNamespace\n"
        "from rowmill.handlers.observers import ProgressBarObserver\n"
        "from rowmill.state.context import ExecutionContext\n"
        "ProgressBarObserver(shown=False).on_pipeline_start(SimpleNamespace(name='p', stages=()), ExecutionContext())\n"
        "print('tqdm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "False\n"


# --- money -----------------------------------------------------------------------------------------------------


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings, up to the colon."""
    return [r.getMessage().split(":")[0] for r in caplog.records if r.levelno == logging.WARNING]


def test_one_warning_per_threshold(caplog: pytest.LogCaptureFixture) -> None:
    """Each threshold warns when it is crossed and never again, also where the cost falls and rises anew."""
    observer = CostTrackingObserver([0.9, 0.5, 0.5], "1.00")
    observer.on_pipeline_start(PIPELINE, at(0))
    for cost in ("0.49", "0.50", "0.89", "0.30", "0.70", "0.90", "1.00"):
        observer.on_progress_update(at(1, cost=cost))
    assert warned(caplog) == ["50 % of the budget is spent", "90 % of the budget is spent"]
    assert observer.report().warned == (Decimal("0.5"), Decimal("0.9"))


def test_a_leap_over_several_thresholds(caplog: pytest.LogCaptureFixture) -> None:
    """All of them are told, the lowest first; a stage's end is looked at as well."""
    observer = CostTrackingObserver((0.5, 0.75), Budget("2"))
    observer.on_pipeline_start(PIPELINE, at(0))
    observer.on_stage_complete(PIPELINE.stages[0], at(1, cost="1.6"), None)
    assert warned(caplog) == ["50 % of the budget is spent", "75 % of the budget is spent"]


def test_the_budget_is_the_pipelines(caplog: pytest.LogCaptureFixture) -> None:
    """Without a budget of its own it takes the pipeline's, anew for each run; what is given comes first."""
    pipeline = SimpleNamespace(name="p", stages=(), budget=Budget("4.00"))
    observer, own = CostTrackingObserver(), CostTrackingObserver(budget=8)
    for each in (observer, own, observer):
        each.on_pipeline_start(pipeline, at(0))
        each.on_progress_update(at(1, cost="3.00"))
    assert (observer.report().limit, own.report().limit) == (Decimal(4), Decimal(8))
    assert warned(caplog) == ["75 % of the budget is spent"] * 2  # own had not got so far


def test_without_a_budget(caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to warn of; what was spent is said all the same."""
    observer = CostTrackingObserver()
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        observer.on_pipeline_start(PIPELINE, at(0))
        observer.on_progress_update(at(1, cost="1000000"))
        observer.on_pipeline_complete(at(20, cost="1000001.50", tokens=1_234), None)
    assert logged(caplog) == [("INFO", "spent: 1000001.50, 1,234 tokens, 20 rows")]
    report = observer.report()
    assert (report.limit, report.left, report.fraction, report.warned) == (None, None, None, ())


def test_the_report(caplog: pytest.LogCaptureFixture) -> None:
    """What was spent, what is left and the fraction, as Decimals; as JSON money is text; the end says it in a line."""
    observer = CostTrackingObserver(0.75, Budget("5.00"))
    with caplog.at_level(logging.INFO, logger="rowmill.observer"):
        observer.on_pipeline_start(PIPELINE, at(0))
        observer.on_pipeline_error(at(9, cost="4.9999999", tokens=77), ValueError())
    report = observer.report()
    assert report == CostReport(Decimal("4.9999999"), 77, 9, Decimal("5.00"), (Decimal("0.75"),))
    assert (report.left, report.fraction) == (Decimal("0.0000001"), Decimal("0.9999"))
    found = report.to_dict()
    assert loads(dumps(found)) == found
    assert found == {
        "spent": "4.9999999",
        "limit": "5.00",
        "left": "0.0000001",
        "fraction": "0.9999",
        "tokens": 77,
        "rows": 9,
        "warned": ["0.75"],
    }
    assert str(report) == "4.9999999 of 5.00 (99.99 %), 77 tokens, 9 rows"
    fields = vars(caplog.records[-1])
    assert (fields["event"], fields["spent"], fields["topic"]) == ("cost_summary", "4.9999999", None)


def test_more_than_the_budget() -> None:
    """Calls that cost more than their price may go beyond it: nothing is left then, never less."""
    report = CostReport(spent=Decimal("5.5"), limit=Decimal(5))
    assert (report.left, report.fraction) == (Decimal(0), Decimal("1.1000"))


def test_thresholds_are_exact(caplog: pytest.LogCaptureFixture) -> None:
    """One part in 10^40 below the threshold is below it, where 28 digits would round."""
    observer = CostTrackingObserver(0.75, "1." + "0" * 38 + "4")
    observer.on_pipeline_start(PIPELINE, at(0))
    for almost in ("0.74" + "9" * 38, "0.75", "0.75" + "0" * 36 + "2"):
        observer.on_progress_update(at(1, cost=almost))
    assert warned(caplog) == []
    observer.on_progress_update(at(1, cost="0.75" + "0" * 36 + "3"))
    assert warned(caplog) == ["75 % of the budget is spent"]


def test_told_in_another_way() -> None:
    """``on_warning`` is there to be overridden."""
    told = []

    class Pager(CostTrackingObserver):
        def on_warning(self, threshold: Decimal, report: CostReport) -> None:
            told.append((threshold, report.spent))

    observer = Pager(0.1, "1")
    observer.on_pipeline_start(PIPELINE, at(0))
    observer.on_progress_update(at(1, cost="0.2"))
    assert told == [(Decimal("0.1"), Decimal("0.2"))]


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"warning_threshold": 0}, "warning_threshold"),
        ({"warning_threshold": 1.1}, "warning_threshold"),
        ({"warning_threshold": "0.5"}, "warning_threshold"),
        ({"warning_threshold": True}, "warning_threshold"),
        ({"warning_threshold": None}, "warning_threshold"),
        ({"warning_threshold": [0.5, float("nan")]}, "warning_threshold"),
        ({"budget": 0.5}, "budget"),
        ({"budget": 0}, "budget"),
        ({"budget": "-1"}, "budget"),
        ({"budget": "much"}, "budget"),
    ],
)
def test_bad_options_of_costs(options: dict[str, Any], setting: str) -> None:
    """A wrong option is named; a float is no budget."""
    with pytest.raises(ConfigError, match=rf"CostTrackingObserver\({setting}=\)"):
        CostTrackingObserver(**options)


def test_errors_of_ours_are_ours() -> None:
    """What a dispatcher makes of a worker's last words is an error of rowmill's."""
    seen = Recorder()
    dispatcher = ObserverDispatcher([seen])
    dispatcher.started(PIPELINE, at(0))
    dispatcher.close(PATIENCE)
    assert isinstance(seen.errors[0], RowmillError)
