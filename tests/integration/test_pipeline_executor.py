"""The pipeline executor on both brokers: pause, resume and cancel, here and from elsewhere; nothing is paid twice."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rowmill import (
    BrokerError,
    ConfigError,
    ExecutionContext,
    ExecutionResult,
    Pipeline,
    RowContext,
    RowFailedError,
    SessionError,
    StopExecution,
    WorkerOptions,
    open_broker,
    publish,
)
from rowmill.handlers.observers import ExecutionObserver
from rowmill.state.clock import SystemClock
from rowmill.state.context import session_uuid
from rowmill.state.execution import ExecutionState, Wanted
from rowmill.streams.attempts import Desk
from rowmill.streams.checkpoint_stores import FileCheckpointStorage, MemoryCheckpointStorage
from rowmill.streams.control import ControlTopic, request
from rowmill.streams.errors import IllegalTransitionError, NoCheckpointError
from rowmill.streams.pipeline_executor import PipelineExecutor
from rowmill.streams.session_records import SessionRecord
from rowmill.streams.state_manager import StateManager

pytestmark = pytest.mark.timeout(120)

COUNT = 1_000
ROWS = [{"n": n} for n in range(COUNT)]
FRAME = pd.DataFrame(ROWS, index=[f"row-{n}" for n in range(COUNT)])
EARLY = WorkerOptions(max_in_flight=20)
"""Few rows in work, so that a pause comes soon; each takes some milliseconds."""


class Paid:
    """A handler that is paid by the call, and counts."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.calls: Counter[int] = Counter()
        self.enough = threading.Event()
        """Set when some rows were begun."""
        self.most_calls: Callable[[], float] = lambda: math.inf
        """How many may be made by now; further ones wait until it tells more."""
        self._seconds = seconds

    async def __call__(self, row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        self.calls[row["n"]] += 1
        ctx.add_cost(Decimal("0.01"), 3)
        if len(self.calls) > 60:
            self.enough.set()
        await asyncio.sleep(self._seconds)
        while len(self.calls) > self.most_calls():
            await asyncio.sleep(self._seconds)
        return {**row, "twice": row["n"] * 2}


class Seen(ExecutionObserver):
    """Keeps what it was told, and does something when rows are committed."""

    def __init__(self, on_progress: Callable[[], None] = lambda: None) -> None:
        self.told: list[str] = []
        self.counts: list[int] = []
        self.last: Any = None
        self._on_progress = on_progress

    def on_pipeline_start(self, pipeline: Any, context: ExecutionContext) -> None:
        self.told.append(f"start {pipeline.name}")
        self.counts.append(context.completed_rows)

    def on_stage_start(self, stage: Any, context: ExecutionContext) -> None:
        self.told.append(f"stage start {stage.name}")

    def on_stage_complete(self, stage: Any, context: ExecutionContext, result: Any) -> None:
        self.told.append(f"stage complete {stage.name}")

    def on_stage_error(self, stage: Any, context: ExecutionContext, error: Exception) -> None:
        self.told.append(f"stage error {stage.name}")

    def on_pipeline_complete(self, context: ExecutionContext, result: Any) -> None:
        self.told.append("complete")
        self.counts.append(context.completed_rows)
        self.last = result

    def on_pipeline_error(self, context: ExecutionContext, error: Exception) -> None:
        self.told.append("error")
        self.last = error

    def on_progress_update(self, context: ExecutionContext) -> None:
        if self.told[-1] != "progress":
            self.told.append("progress")
        self.counts.append(context.completed_rows)
        if context.completed_rows:
            self._on_progress()


class Pauses(Seen):
    """Asks the executor for a pause when rows are committed, so many times."""

    def __init__(self, times: int = 1) -> None:
        super().__init__(self._pause)
        self.executor: PipelineExecutor | None = None
        self.left = times

    def _pause(self) -> None:
        if self.left and self.executor is not None and self.executor.state is ExecutionState.EXECUTING:
            self.left -= 1
            self.executor.pause()
            self.executor.pause()  # asking once more changes nothing


def pausing(executor: PipelineExecutor, paid: Paid, times: int = 1, *, rows: int = COUNT) -> Pauses:
    """Have it paused by an observer.

    Observers hear of progress twice a second, and all rows take little longer. So the rows wait for each pause in
    turn: else one comes too late on a machine that stood still.
    """
    pauses = Pauses(times)
    pauses.executor = executor
    executor.add_observer(pauses)
    paid.most_calls = lambda: rows * (times - pauses.left + 1) // (times + 1) if pauses.left else math.inf
    return pauses


def on_control(url: str, work: Callable[[ControlTopic], Awaitable[Any]]) -> Any:
    """Something done on the control topic, as an operator elsewhere does it."""

    async def do() -> Any:
        broker = open_broker(url)
        await broker.start()
        try:
            return await work(ControlTopic(broker, clock=SystemClock()))
        finally:
            await broker.close()

    return asyncio.run(do())


def record_of(url: str, executor: PipelineExecutor) -> SessionRecord:
    """What the control topic has of the executor's session."""
    found: SessionRecord = on_control(url, lambda control: control.session(f"rowmill.{executor.session}"))
    return found


def ask(url: str, executor: PipelineExecutor, wanted: Wanted) -> None:
    """Somebody else asks for something."""
    on_control(url, lambda control: request(control, f"rowmill.{executor.session}", wanted, by="ann@elsewhere"))


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something, not for ever."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not come"
        time.sleep(0.01)


@contextmanager
def beside(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run something on another thread for as long as the block lasts; gives the list that gets its result."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - the block looks at it
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield results
    thread.join(60)
    assert not thread.is_alive(), "no end"
    if results and isinstance(results[0], AssertionError):
        raise results[0]


def check_partial(result: ExecutionResult, stopped: str) -> None:
    """Some of the rows, as they should be, and it says so."""
    assert (result.stopped, result.is_complete) == (stopped, False)
    done = len(result.data)
    assert 0 < done < COUNT
    assert list(result.data["twice"]) == [n * 2 for n in result.data["n"]]
    assert (result.metrics.total_rows, result.metrics.processed_rows, result.metrics.dropped_rows) == (COUNT, done, 0)
    assert result.costs.total_cost == done * Decimal("0.01")


def check_whole(result: ExecutionResult, paid: Paid | None = None) -> None:
    """Every row once, in order, with the input's labels, and every call made and paid once."""
    assert (result.stopped, result.is_complete) == (None, True)
    assert list(result.data["n"]) == list(range(COUNT))
    assert list(result.data["twice"]) == list(range(0, 2 * COUNT, 2))
    assert (result.metrics.total_rows, result.metrics.processed_rows) == (COUNT, COUNT)
    assert (result.costs.total_cost, result.costs.total_tokens) == (Decimal(10), 3 * COUNT)
    if paid is not None:
        assert set(paid.calls.values()) == {1}


# --- pause and resume ------------------------------------------------------------------------------------------


def test_pause_from_another_thread(broker_url: str, name: str) -> None:
    """Execute returns what is done; the session is paused on the broker; resuming gives all, nothing paid twice."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)

    def pause() -> None:
        assert paid.enough.wait(30)
        assert executor.state is ExecutionState.EXECUTING
        executor.pause()

    with beside(pause):
        result = executor.execute(Pipeline(name), FRAME)
    check_partial(result, "paused")
    assert list(result.data.index) == [f"row-{n}" for n in result.data["n"]]
    assert executor.state is ExecutionState.PAUSED
    assert executor.session_id == session_uuid(f"rowmill.{name}.{result.session}")
    assert result.metadata == {"session_id": str(executor.session_id), "state": "paused"}
    record = record_of(broker_url, executor)
    assert (record.wanted, record.changed_by.split()[0]) == (Wanted.PAUSE, "PipelineExecutor")
    with pytest.raises(RuntimeError, match="paused"):
        executor.execute(Pipeline(name), FRAME)

    assert executor.session_id is not None
    result = executor.resume(executor.session_id)
    check_whole(result, paid)
    assert list(result.data.index) == list(FRAME.index)
    assert str(executor.state) == "completed"
    assert record_of(broker_url, executor).wanted is Wanted.RUN
    with pytest.raises(RuntimeError, match="completed"):
        executor.resume()


def test_pause_from_an_observer(broker_url: str, name: str) -> None:
    """As often as one likes; each attempt is told of a start and an end, from where the session stands."""
    paid = Paid()
    executor = PipelineExecutor(Pipeline(name).add(paid, name="paid"), broker=broker_url, options=EARLY)
    seen = pausing(executor, paid, 2)
    results = [executor.execute(rows=ROWS)]
    while not results[-1].is_complete:
        check_partial(results[-1], "paused")
        results.append(executor.resume())
    assert len(results) == 3
    check_whole(results[-1], paid)
    once = [f"start {name}", "stage start paid", "progress", "stage complete paid", "complete"]
    assert seen.told == once * len(results)
    assert seen.counts == sorted(seen.counts)
    assert seen.counts[-1] == COUNT
    assert seen.last is results[-1]


def test_a_pause_that_comes_too_late(tmp_path: Path) -> None:
    """All rows were in work: they are finished, so the session is completed, and nobody wants it paused."""
    paid = Paid(seconds=0.5)
    executor = PipelineExecutor([paid], broker=f"local://{tmp_path}")

    def pause() -> None:
        until(lambda: len(paid.calls) == 10)
        executor.pause()

    with beside(pause):
        result = executor.execute(Pipeline("p"), ROWS[:10])
    assert (result.is_complete, len(result.data)) == (True, 10)
    assert executor.state is ExecutionState.COMPLETED
    assert record_of(f"local://{tmp_path}", executor).wanted is Wanted.RUN
    again = PipelineExecutor([paid], broker=f"local://{tmp_path}", session=result.session)
    assert len(again.execute(Pipeline("p"), ROWS[:10]).data) == 10
    assert set(paid.calls.values()) == {1}


def test_pause_before_it_began(broker_url: str, name: str) -> None:
    """A pause while it is initializing is one as well: no row is lost, and few or none are done."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)

    def pause() -> None:
        until(lambda: executor.state is not ExecutionState.IDLE)
        executor.pause()

    with beside(pause):
        result = executor.execute(Pipeline(name), ROWS)
    assert (result.stopped, executor.state) == ("paused", ExecutionState.PAUSED)
    assert len(result.data) + result.metrics.dropped_rows < COUNT
    check_whole(executor.resume(), paid)


def test_tables_and_failed_rows_survive_a_pause(broker_url: str, name: str, tmp_path: Path) -> None:
    """What rows wrote, and which of them failed, is the whole session's."""
    pipeline = Pipeline(name).table("counts")
    paid = Paid(seconds=0.005)

    @pipeline.stage
    def count(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        if row["n"] % 100 == 7:
            raise ValueError("seven")
        table = ctx.table("counts")
        number = table.get("rows", 0) + 1
        table.put("rows", number)
        return {**row, "count": number}

    pipeline.add(paid)
    options = WorkerOptions(max_in_flight=20, state_dir=str(tmp_path / "state"))
    executor = PipelineExecutor(pipeline, broker=broker_url, options=options, key="key")
    rows = [{"n": n, "key": "one"} for n in range(400)]
    pausing(executor, paid, 2)
    results = [executor.execute(rows=rows)]
    while results[-1].metrics.processed_rows != 396:
        assert results[-1].stopped == "paused"
        results.append(executor.resume())
    assert len(results) == 3
    assert [error.row_index for error in results[-1].errors] == [7, 107, 207, 307]
    assert list(results[-1].data["count"]) == list(range(1, 397))
    assert set(paid.calls.values()) == {1}


SCRIPT = """
    import asyncio, json, signal, sys, threading
    from pathlib import Path
    from rowmill import Pipeline, WorkerOptions
    from rowmill.streams.pipeline_executor import PipelineExecutor

    url, name, calls, asked, *session = sys.argv[1:]
    rows = [{"n": n} for n in range(int(asked))]

    async def paid(row, ctx):
        with Path(calls).open("a") as file:
            file.write(f"{row['n']}\\n")
        ctx.add_cost("0.01", 3)
        await asyncio.sleep(0.02)
        return {**row, "twice": row["n"] * 2}

    executor = PipelineExecutor([paid], broker=url, options=WorkerOptions(max_in_flight=20))
    signal.signal(signal.SIGUSR1, lambda *_: executor.pause())
    print("ready", flush=True)
    try:
        if session:
            result = executor.resume(session[0], rows, pipeline=Pipeline(name))
        else:
            result = executor.execute(Pipeline(name), rows)
        print(json.dumps({
            "state": executor.state, "session": executor.session, "id": str(executor.session_id),
            "stopped": result.stopped, "n": list(map(int, result.data["n"])), "cost": str(result.costs.total_cost),
        }))
    except Exception as error:
        print(json.dumps({"state": executor.state, "error": type(error).__name__, "message": str(error)}))
"""


class Program:
    """A process with an executor."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True
        )

    def pause(self) -> None:
        """By a signal, whose handler calls the executor."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Without a word."""
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def outcome(self) -> dict[str, Any]:
        """What it printed at its end."""
        out, _ = self._process.communicate(timeout=60)
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


def test_resume_in_a_new_process(broker_url: str, name: str, tmp_path: Path) -> None:
    """Paused from a signal handler, resumed by another process that has the same rows, and by none with others."""
    calls = tmp_path / "calls"
    first = Program(broker_url, name, str(calls), str(COUNT))
    until(lambda: calls.exists() and len(calls.read_text().splitlines()) > 60)
    first.pause()
    paused = first.outcome()
    assert (paused["state"], paused["stopped"]) == ("paused", "paused")
    assert 0 < len(paused["n"]) < COUNT

    other = Program(broker_url, name, str(calls), str(COUNT - 1), paused["id"]).outcome()
    assert (other["state"], other["error"]) == ("failed", "SessionError")
    assert "another input" in other["message"]
    control = on_control(broker_url, lambda control: control.session(f"rowmill.{paused['session']}"))
    assert control.wanted is Wanted.PAUSE  # it stayed as it was

    second = Program(broker_url, name, str(calls), str(COUNT), paused["id"]).outcome()
    assert (second["state"], second["stopped"], second["session"]) == ("completed", None, paused["session"])
    assert (second["n"], Decimal(second["cost"])) == (list(range(COUNT)), Decimal(10))
    assert sorted(map(int, calls.read_text().split())) == list(range(COUNT))  # nothing was paid twice

    third = Program(broker_url, name, str(calls), str(COUNT), paused["session"]).outcome()
    assert third["error"] == "IllegalTransitionError"
    assert "completed" in third["message"]


def test_resume_after_a_kill(broker_url: str, name: str, tmp_path: Path) -> None:
    """A process that died without a word left a session like any other: only rows in work are paid again."""
    calls = tmp_path / "calls"
    first = Program(broker_url, name, str(calls), str(COUNT))
    until(lambda: calls.exists() and len(calls.read_text().splitlines()) > 100)
    first.kill()
    sessions = on_control(broker_url, lambda control: control.sessions())
    group = next(group for group in sessions if group.startswith(f"rowmill.{name}."))
    second = Program(broker_url, name, str(calls), str(COUNT), str(session_uuid(group))).outcome()
    assert (second["state"], second["n"]) == ("completed", list(range(COUNT)))
    paid = Counter(map(int, calls.read_text().split()))
    assert set(paid) == set(range(COUNT))
    assert sum(paid.values()) - COUNT <= 2 * 20 + 60  # in work, and completed within a commit interval


def test_what_resume_needs(broker_url: str, name: str) -> None:
    """In a new executor: a pipeline, and rows; those that were an iterator also in the one that had them."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, session="night", options=EARLY)
    pausing(executor, paid)
    assert executor.execute(Pipeline(name), iter(ROWS)).stopped == "paused"
    with pytest.raises(ValueError, match="can be read only once"):
        executor.resume()
    new = PipelineExecutor([paid], broker=broker_url)
    with pytest.raises(ConfigError, match="give a Pipeline"):
        new.resume(f"{name}.night", ROWS)
    with pytest.raises(ConfigError, match=f"is of the pipeline {name!r}"):
        new.resume(f"{name}.night", ROWS, pipeline=Pipeline("another"))
    with pytest.raises(ConfigError, match="did not start it"):
        new.resume(f"{name}.night", pipeline=Pipeline(name))
    assert (executor.state, new.state) == (ExecutionState.PAUSED, ExecutionState.IDLE)
    check_whole(new.resume(f"{name}.night", iter(ROWS), pipeline=Pipeline(name)), paid)


def test_cleaned_up(broker_url: str, name: str) -> None:
    """Sessions are kept until the manager removes them; then there is nothing to resume."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)
    pausing(executor, paid)
    executor.execute(Pipeline(name), ROWS)
    session_id = executor.session_id
    assert session_id is not None
    assert executor.state_manager.can_resume(session_id)
    context = executor.state_manager.load_checkpoint(session_id)
    assert context is not None
    assert 0 < context.processed_rows < COUNT
    assert executor.state_manager.cleanup_checkpoints(session_id)
    with pytest.raises(NoCheckpointError, match=str(session_id)):
        executor.resume(session_id)
    assert executor.state is ExecutionState.PAUSED


def test_the_manager_keeps_the_context(tmp_path: Path) -> None:
    """Of a pause, a cancellation, a failure and the end; a broker's own manager needs none of that."""
    storage = FileCheckpointStorage(tmp_path / "checkpoints")
    manager = StateManager(storage, checkpoint_interval=50)
    paid = Paid()
    executor = PipelineExecutor([paid], manager, broker=f"local://{tmp_path}/broker", options=EARLY)
    pausing(executor, paid)
    result = executor.execute(Pipeline("p"), ROWS)
    assert executor.session_id is not None
    kept = manager.load_checkpoint(executor.session_id)
    assert kept is not None
    assert (kept.processed_rows, kept.total_rows, kept.end_time) == (len(result.data), COUNT, None)
    assert storage.list_checkpoints()[0].resumable
    while not result.is_complete:
        result = executor.resume()
    kept = manager.load_checkpoint(executor.session_id)
    assert kept is not None
    assert (kept.processed_rows, kept.get_progress(), kept.accumulated_cost) == (COUNT, 100.0, Decimal(10))
    assert kept.end_time is not None
    assert not storage.list_checkpoints()[0].resumable


# --- cancel ----------------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["async", "blocking"])
def test_cancel_during_a_minute_long_handler(broker_url: str, name: str, kind: str) -> None:
    """Execute returns within two seconds; what completed is kept, and the rest runs when it is resumed."""
    calls: Counter[int] = Counter()
    may_hang, hangs = True, threading.Event()

    def note(row: dict[str, Any]) -> bool:
        calls[row["n"]] += 1
        if may_hang and row["n"] == 30:
            hangs.set()
        return may_hang and row["n"] >= 30

    async def wait(row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(60 if note(row) else 0)
        return row

    def block(row: dict[str, Any]) -> dict[str, Any]:
        time.sleep(60 if note(row) else 0)
        return row

    pipeline = Pipeline(name).add(wait if kind == "async" else block, name="slow", concurrency=4)
    executor = PipelineExecutor(pipeline, broker=broker_url, options=WorkerOptions(partitions=1))
    asked = 0.0

    def cancel() -> None:
        nonlocal asked
        assert hangs.wait(30)
        time.sleep(0.5)  # what completed is committed
        asked = time.monotonic()
        executor.cancel()

    with beside(cancel):
        result = executor.execute(rows=ROWS[:60])
        took = time.monotonic() - asked
    assert took < 2
    assert (result.stopped, result.is_complete) == ("cancelled", False)
    assert set(range(27)) <= set(result.data["n"]) <= set(range(30))
    assert executor.state is ExecutionState.CANCELLED
    assert record_of(broker_url, executor).wanted is Wanted.CANCEL
    with pytest.raises(RuntimeError, match="cancelled"):
        executor.cancel()

    may_hang = False
    result = executor.resume()
    assert (result.is_complete, list(result.data["n"])) == (True, list(range(60)))
    assert all(calls[n] == 1 for n in range(27))
    assert sum(calls.values()) <= 60 + 8


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["plain", "partition", "batch", "timeout", "asyncio's threads"])
def test_cancel_whatever_hangs(tmp_path: Path, kind: str) -> None:
    """Also lot by lot, in batches, behind a time limit, and where handlers hold all of asyncio's own threads."""
    hangs, released = threading.Event(), threading.Event()

    def hang(row: Any) -> Any:
        hangs.set()
        released.wait(60)
        return row

    async def hang_there(row: dict[str, Any]) -> Any:
        return await asyncio.to_thread(hang, row)

    pipeline = Pipeline("p", ordering="partition" if kind == "partition" else "key")
    options: dict[str, Any] = {"batch": {"batch": 5}, "timeout": {"timeout": 60}}.get(kind, {})
    pipeline.add(hang_there if kind == "asyncio's threads" else hang, name="slow", **options)
    seen, storage, asked = Seen(), FileCheckpointStorage(tmp_path / "checkpoints"), 0.0
    executor = PipelineExecutor(pipeline, StateManager(storage), [seen], broker=f"local://{tmp_path}/broker")

    def cancel() -> None:
        nonlocal asked
        assert hangs.wait(30)
        time.sleep(0.5)
        asked = time.monotonic()
        executor.cancel()

    with beside(cancel):
        result = executor.execute(rows=ROWS)
        took = time.monotonic() - asked
    released.set()
    assert took < 2
    assert (result.stopped, executor.state) == ("cancelled", ExecutionState.CANCELLED)
    assert (seen.told[-1], len(storage.list_checkpoints())) == ("complete", 1)


def test_a_process_ends_though_a_handler_hangs(tmp_path: Path) -> None:
    """The thread of a blocking handler that was left behind does not keep its process alive."""
    script = """
        import sys, threading, time
        from rowmill import Pipeline
        from rowmill.streams.pipeline_executor import PipelineExecutor

        def hang(row):
            threading.Timer(0.2, executor.cancel).start()
            time.sleep(60)

        executor = PipelineExecutor(Pipeline("p").add(hang, timeout=100), broker=sys.argv[1])
        print(executor.execute(rows=[{"n": 1}]).stopped)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), f"local://{tmp_path}"]
    began = time.monotonic()
    out = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True).stdout
    assert out.strip() == "cancelled"
    assert time.monotonic() - began < 20


def test_a_cancelled_session_goes_on_by_its_name(broker_url: str, name: str) -> None:
    """Executing a session of the same name, in whatever executor, goes on with it."""
    paid = Paid()
    first = PipelineExecutor([paid], broker=broker_url, session="night", options=EARLY)

    def cancel() -> None:
        if first.state is ExecutionState.EXECUTING:
            first.cancel()

    first.add_observer(Seen(cancel))
    result = first.execute(Pipeline(name), ROWS)
    check_partial(result, "cancelled")
    done = set(result.data["n"])
    second = PipelineExecutor([paid], broker=broker_url, session="night", options=EARLY)
    check_whole(second.execute(Pipeline(name), ROWS))
    assert second.session == f"{name}.night"
    assert {paid.calls[n] for n in done} == {1}
    assert set(paid.calls.values()) <= {1, 2}


def test_a_paused_session_is_cancelled(broker_url: str, name: str) -> None:
    """It is recorded, so that it does not go on by itself; resuming it is still possible."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)
    pausing(executor, paid)
    executor.execute(Pipeline(name), ROWS)
    executor.cancel()
    assert executor.state is ExecutionState.CANCELLED
    assert record_of(broker_url, executor).wanted is Wanted.CANCEL
    check_whole(executor.resume(), paid)


@pytest.mark.parametrize("wanted", ["pause", "cancel"])
def test_what_cannot_be_recorded_is_done_here(
    tmp_path: Path, wanted: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the control topic this process obeys all the same, and a warning says that nobody else does."""

    async def refuse(*_: Any) -> None:
        raise BrokerError("no control topic today")

    monkeypatch.setattr(Desk, "request", refuse)
    paid = Paid()
    executor = PipelineExecutor([paid], broker=f"local://{tmp_path}", options=EARLY)

    def ask_for_it() -> None:
        assert paid.enough.wait(30)
        getattr(executor, wanted)()

    with beside(ask_for_it):
        result = executor.execute(Pipeline("p"), ROWS)
    check_partial(result, "paused" if wanted == "pause" else "cancelled")
    assert f"{wanted!r} was not recorded: no control topic today" in caplog.text
    check_whole(executor.resume(), paid if wanted == "pause" else None)


# --- others steer ----------------------------------------------------------------------------------------------


def test_paused_and_resumed_by_others(broker_url: str, name: str) -> None:
    """Execute waits, and the state shows it; when they let it go on, it does, to the end."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)
    with beside(lambda: executor.execute(Pipeline(name), ROWS)) as results:
        assert paid.enough.wait(30)
        ask(broker_url, executor, Wanted.PAUSE)
        until(lambda: executor.state is ExecutionState.PAUSED)
        count = len(paid.calls)
        time.sleep(0.5)
        assert (len(paid.calls), results) == (count, [])
        with pytest.raises(RuntimeError, match="paused already"):
            executor.pause()
        ask(broker_url, executor, Wanted.RUN)
        until(lambda: executor.state is not ExecutionState.PAUSED)
    check_whole(results[0], paid)
    assert executor.state is ExecutionState.COMPLETED


@pytest.mark.parametrize("way", ["blocking", "async"])
def test_paused_by_others_and_resumed_here(broker_url: str, name: str, way: str) -> None:
    """Both calls, the one that waits and the one that lets it go on, give the result."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)
    with beside(lambda: executor.execute(Pipeline(name), ROWS)) as results:
        assert paid.enough.wait(30)
        ask(broker_url, executor, Wanted.PAUSE)
        until(lambda: executor.state is ExecutionState.PAUSED)
        result = executor.resume() if way == "blocking" else asyncio.run(executor.resume_async())
    check_whole(result, paid)
    assert results[0] is result


def test_cancelled_by_others(broker_url: str, name: str) -> None:
    """Execute returns what is done, and it can be resumed."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)
    with beside(lambda: executor.execute(Pipeline(name), ROWS)) as results:
        assert paid.enough.wait(30)
        ask(broker_url, executor, Wanted.CANCEL)
    check_partial(results[0], "cancelled")
    assert executor.state is ExecutionState.CANCELLED
    check_whole(executor.resume())


def test_paused_by_others_and_cancelled_here(broker_url: str, name: str) -> None:
    """An executor that waits can be cancelled."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)
    with beside(lambda: executor.execute(Pipeline(name), ROWS)) as results:
        assert paid.enough.wait(30)
        ask(broker_url, executor, Wanted.PAUSE)
        until(lambda: executor.state is ExecutionState.PAUSED)
        executor.cancel()
    check_partial(results[0], "cancelled")
    assert executor.state is ExecutionState.CANCELLED
    check_whole(executor.resume(), paid)


def test_a_session_that_is_paused_when_it_is_executed(broker_url: str, name: str) -> None:
    """What is wanted of it outlives the executor that asked: another one's execute waits for somebody to resume it."""
    paid = Paid()
    first = PipelineExecutor([paid], broker=broker_url, session="night", options=EARLY)
    pausing(first, paid)
    first.execute(Pipeline(name), ROWS)
    count = len(paid.calls)
    second = PipelineExecutor([paid], broker=broker_url, session="night", options=EARLY)
    with beside(lambda: second.execute(Pipeline(name), ROWS)) as results:
        until(lambda: second.state is ExecutionState.PAUSED)
        time.sleep(0.5)
        assert len(paid.calls) == count
        ask(broker_url, second, Wanted.RUN)
    check_whole(results[0], paid)


# --- observers, failures ---------------------------------------------------------------------------------------


def test_observers_are_told_in_order(broker_url: str, name: str) -> None:
    """The pipeline's own and the executor's hear the same: start, stages, failed rows, stages' ends, the result."""
    seen = [Seen(), Seen()]
    pipeline = Pipeline(name).add_observer(seen[0])

    @pipeline.stage
    def first(row: dict[str, Any]) -> dict[str, Any]:
        return row

    @pipeline.stage
    def second(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 3:
            raise ValueError("three")
        return row

    result = PipelineExecutor(None, None, [seen[1]], broker=broker_url).execute(pipeline, ROWS[:10])
    told = [each for each in seen[1].told if each != "progress"]
    assert told == [
        f"start {name}", "stage start first", "stage start second", "stage error second",
        "stage complete first", "stage complete second", "complete",
    ]  # fmt: skip
    assert [each for each in seen[0].told if each != "progress"] == told
    assert seen[0].last is seen[1].last is result
    assert (seen[1].counts[0], seen[1].counts[-1]) == (0, 10)


def test_a_failure(broker_url: str, name: str) -> None:
    """The error is raised, and told to observers; the cause mended, it is resumed."""
    seen, broken = Seen(), True

    async def call(row: dict[str, Any]) -> dict[str, Any]:
        if broken and row["n"] == 200:
            raise OSError("no such door")
        return {**row, "twice": row["n"] * 2}

    pipeline = Pipeline(name).add(call, on_error="fail")
    storage = MemoryCheckpointStorage()
    executor = PipelineExecutor(pipeline, StateManager(storage), [seen], broker=broker_url)
    with pytest.raises(RowFailedError, match="no such door") as caught:
        executor.execute(rows=ROWS)
    assert executor.state is ExecutionState.FAILED
    assert seen.told[-1] == "error"
    assert seen.last is caught.value
    assert executor.session_id is not None
    assert storage.exists(executor.session_id)
    with pytest.raises(RuntimeError, match="has failed"):
        executor.pause()
    broken = False
    result = executor.resume()
    assert (result.is_complete, list(result.data["n"])) == (True, list(range(COUNT)))
    last: object = seen.last
    assert last is result


def test_a_failure_before_it_began(tmp_path: Path) -> None:
    """Observers hear of it, and of nothing else."""
    seen = Seen()
    executor = PipelineExecutor(Pipeline("p").add(Paid()), None, [seen], broker="kafka://127.0.0.1:1")
    with pytest.raises(BrokerError):
        executor.execute(rows=ROWS)
    assert executor.state is ExecutionState.FAILED
    assert seen.told == ["error"]
    with pytest.raises(BrokerError):
        executor.resume()


def test_an_input_that_raises(tmp_path: Path) -> None:
    """An error of the caller's own iterator is raised as it is; what came before it is kept."""

    def rows() -> Iterator[dict[str, Any]]:
        yield from ROWS[:100]
        raise KeyError("page 2")

    executor = PipelineExecutor(Pipeline("p").add(Paid(0.001)), broker=f"local://{tmp_path}")
    with pytest.raises(KeyError, match="page 2"):
        executor.execute(rows=rows())
    assert executor.state is ExecutionState.FAILED
    check_whole(executor.resume(rows=iter(ROWS)))


def test_a_row_that_stops_the_session(broker_url: str, name: str) -> None:
    """The executor is idle then: there is work left, and resuming goes on with it."""
    stops = True

    async def call(row: dict[str, Any]) -> dict[str, Any]:
        if stops and row["n"] == 50:
            raise StopExecution("enough for today")
        return row

    executor = PipelineExecutor(Pipeline(name).add(call), broker=broker_url, options=WorkerOptions(partitions=1))
    result = executor.execute(rows=ROWS)
    assert (result.stopped, executor.state) == ("enough for today", ExecutionState.IDLE)
    assert not result.is_complete
    stops = False
    assert len(executor.resume().data) == COUNT


# --- from where it is called -----------------------------------------------------------------------------------


async def test_on_an_event_loop(broker_url: str, name: str) -> None:
    """All of it awaited: pause and cancel return when it is done, and other tasks go on meanwhile."""
    paid, ticks = Paid(), 0
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    async def until_begun(rows: int) -> None:
        async with asyncio.timeout(30):
            while len(paid.calls) < rows:
                await asyncio.sleep(0.01)

    ticking = asyncio.create_task(tick())
    executing = asyncio.create_task(executor.execute_async(Pipeline(name), ROWS))
    await until_begun(60)
    await executor.pause_async()
    assert executor.state is ExecutionState.PAUSED
    check_partial(await executing, "paused")

    count = len(paid.calls)
    resuming = asyncio.create_task(executor.resume_async())
    await until_begun(count + 60)
    await executor.cancel_async()
    assert str(executor.state) == "cancelled"
    check_partial(await resuming, "cancelled")
    check_whole(await executor.resume_async())
    ticking.cancel()
    assert ticks > 50


async def test_inside_a_running_loop(tmp_path: Path) -> None:
    """The blocking calls work in a notebook's cell as well."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=f"local://{tmp_path}", options=EARLY)
    pausing(executor, paid)
    result = executor.execute(Pipeline("p"), ROWS)
    check_partial(result, "paused")
    executor.cancel()
    check_whole(executor.resume(), paid)


async def test_a_task_that_is_cancelled(tmp_path: Path) -> None:
    """As after a crash: nobody paused the session, the executor is idle, and resuming goes on."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=f"local://{tmp_path}", options=EARLY)
    executing = asyncio.create_task(executor.execute_async(Pipeline("p"), ROWS))
    async with asyncio.timeout(30):
        while not paid.enough.is_set():
            await asyncio.sleep(0.01)
    executing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await executing
    assert executor.state is ExecutionState.IDLE
    check_whole(await executor.resume_async())


def test_ctrl_c(broker_url: str, name: str) -> None:
    """Rows in work are finished, KeyboardInterrupt is raised, nobody else is paused; resuming pays nothing twice."""
    paid = Paid()
    executor = PipelineExecutor([paid], broker=broker_url, options=EARLY)

    def press() -> None:
        assert paid.enough.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    with beside(press), pytest.raises(KeyboardInterrupt):
        executor.execute(Pipeline(name), ROWS)
    assert executor.state is ExecutionState.IDLE
    assert record_of(broker_url, executor).wanted is Wanted.RUN
    check_whole(executor.resume(), paid)


def test_ctrl_c_twice(tmp_path: Path) -> None:
    """The second one does not wait for handlers."""
    hangs = threading.Event()

    async def hang(row: dict[str, Any]) -> None:
        hangs.set()
        await asyncio.sleep(60)

    def press() -> None:
        assert hangs.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    executor = PipelineExecutor([hang], broker=f"local://{tmp_path}")
    began = time.monotonic()
    with beside(press), pytest.raises(KeyboardInterrupt):
        executor.execute(Pipeline("p"), ROWS[:5])
    assert time.monotonic() - began < 15
    assert executor.state is ExecutionState.IDLE


# --- rows of the source topics ---------------------------------------------------------------------------------


def test_rows_that_were_published(broker_url: str, name: str) -> None:
    """Without rows it executes what the source topic holds: the live session, or one of its own by name."""
    paid = Paid()
    pipeline = Pipeline(name).add(paid)
    publish(name, ROWS, broker=broker_url)
    named = PipelineExecutor(pipeline, broker=broker_url, session="night", options=EARLY)
    pausing(named, paid)
    result = named.execute()
    assert (result.stopped, named.session) == ("paused", f"{name}.night")
    assert 0 < len(result.data) == result.metrics.processed_rows < COUNT
    with pytest.raises(ConfigError, match="give no rows"):
        named.resume(rows=ROWS)
    while not result.is_complete:
        result = named.resume()
    assert sorted(result.data["n"]) == list(range(COUNT))
    assert (result.metrics.total_rows, result.topics["sink"]) == (COUNT, f"{name}.results.night")
    assert set(paid.calls.values()) == {1}

    live = PipelineExecutor(pipeline, broker=broker_url)
    result = live.execute()
    assert (live.session, sorted(result.data["n"])) == (name, list(range(COUNT)))
    publish(name, [{"n": 1_000}], broker=broker_url)
    assert list(live.execute().data["n"]) == [1_000]
    assert set(paid.calls.values()) == {1, 2}


def test_illegal_transitions_of_a_session(broker_url: str, name: str) -> None:
    """What is completed is not executed anew under the same name: its results are read once more."""
    paid = Paid(0)
    executor = PipelineExecutor([paid], broker=broker_url, session="night")
    check_whole(executor.execute(Pipeline(name), ROWS))
    check_whole(executor.execute(Pipeline(name), ROWS), paid)
    with pytest.raises(SessionError, match="another input"):
        executor.execute(Pipeline(name), ROWS[:10])
    assert executor.state is ExecutionState.FAILED
    with pytest.raises(IllegalTransitionError, match="completed"):
        executor.resume(f"{name}.night")
