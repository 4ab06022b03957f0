"""The pipeline executor's states and arguments: what it refuses, and that nothing changes where it does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import UUID

import pandas as pd
import pytest
from rowmill import ConfigError, Pipeline, WorkerOptions
from rowmill.handlers.observers import ExecutionObserver
from rowmill.handlers.stage import make_stage
from rowmill.state.context import session_uuid
from rowmill.state.execution import TRANSITIONS, ExecutionState, Wanted, may_follow
from rowmill.streams.attempts import Job
from rowmill.streams.broker_checkpoints import BrokerCheckpointStorage
from rowmill.streams.checkpoint_stores import MemoryCheckpointStorage
from rowmill.streams.errors import IllegalTransitionError, NoCheckpointError, SessionError
from rowmill.streams.pipeline_executor import REFUSALS, PipelineExecutor
from rowmill.streams.session import Session
from rowmill.streams.state_manager import StateManager

IDLE, INITIALIZING, EXECUTING = ExecutionState.IDLE, ExecutionState.INITIALIZING, ExecutionState.EXECUTING
PAUSED, COMPLETED = ExecutionState.PAUSED, ExecutionState.COMPLETED
FAILED, CANCELLED = ExecutionState.FAILED, ExecutionState.CANCELLED

REFUSED = {
    "execute": {INITIALIZING, EXECUTING, PAUSED},
    "pause": {IDLE, PAUSED, COMPLETED, FAILED, CANCELLED},
    "resume": {INITIALIZING, EXECUTING},
    "cancel": {IDLE, COMPLETED, FAILED, CANCELLED},
}
ROWS = [{"n": n} for n in range(5)]
UNKNOWN = UUID("94f0c36c-fd8d-45d3-be60-4e063f93868f")


def twice(row: dict[str, Any]) -> dict[str, Any]:
    """A plain handler."""
    return {**row, "twice": row["n"] * 2}


def once(row: dict[str, Any]) -> dict[str, Any]:
    """Another one."""
    return row


class Asked:
    """Stands for an attempt that is under way."""

    def __init__(self) -> None:
        self.ended: Future[Any] = Future()
        self.wanted: list[Wanted] = []

    def ask(self, wanted: Wanted) -> None:
        """Note what is asked, and end."""
        self.wanted.append(wanted)
        if not self.ended.done():
            self.ended.set_result("the result")


def executor_in(state: ExecutionState, folder: Path, *, under_way: bool) -> tuple[PipelineExecutor, Asked]:
    """An executor of session ``p.s`` in a state."""
    executor, asked = PipelineExecutor([twice], broker=f"local://{folder}", session="s"), Asked()
    executor._job = Job(Pipeline("p").add(twice), Session("p", "s", owns_source=True), ROWS, None)
    executor._state = state
    executor._attempt = asked if under_way else None  # type: ignore[assignment]
    return executor, asked


CALLS: dict[str, Callable[[PipelineExecutor], Any]] = {
    "execute": lambda executor: executor.execute(Pipeline("p"), ROWS),
    "execute_async": lambda executor: asyncio.run(executor.execute_async(Pipeline("p"), ROWS)),
    "pause": lambda executor: executor.pause(),
    "pause_async": lambda executor: asyncio.run(executor.pause_async()),
    "resume": lambda executor: executor.resume(UNKNOWN),
    "resume_async": lambda executor: asyncio.run(executor.resume_async(UNKNOWN)),
    "cancel": lambda executor: executor.cancel(),
    "cancel_async": lambda executor: asyncio.run(executor.cancel_async()),
}


@pytest.mark.parametrize("state", list(ExecutionState))
@pytest.mark.parametrize("call", CALLS)
def test_every_call_in_every_state(tmp_path: Path, call: str, state: ExecutionState) -> None:
    """A call that does not go with the state is a RuntimeError that names call, session and reason; nothing changes."""
    method = call.removesuffix("_async")
    under_way = state in {INITIALIZING, EXECUTING}
    executor, asked = executor_in(state, tmp_path, under_way=under_way)
    if state in REFUSED[method]:
        with pytest.raises(RuntimeError, match=rf"{method}\(\): session 'p\.s' is|has failed") as caught:
            CALLS[call](executor)
        assert isinstance(caught.value, IllegalTransitionError)
        assert (executor.state, asked.wanted) == (state, [])
        assert not list(tmp_path.iterdir())  # nobody even looked at the broker
    elif method == "execute":
        assert len(CALLS[call](executor).data) == 5
        assert executor.state is COMPLETED
    elif method == "resume":
        with pytest.raises(ValueError, match="no checkpoint") as caught_value:
            CALLS[call](executor)
        assert isinstance(caught_value.value, NoCheckpointError)
        assert executor.state is state
    elif under_way:
        CALLS[call](executor)
        assert asked.wanted == [Wanted.PAUSE if method == "pause" else Wanted.CANCEL]
    else:  # to cancel a paused session whose record is gone
        with pytest.raises(ConfigError, match="no sessions"):
            CALLS[call](executor)
        assert executor.state is state


def test_the_table_of_refusals() -> None:
    """What the tests above believe is what the executor's table says."""
    assert {method: set(reasons) for method, reasons in REFUSALS.items()} == REFUSED


@pytest.mark.parametrize("following", list(ExecutionState))
@pytest.mark.parametrize("state", list(ExecutionState))
def test_changes_follow_the_table(tmp_path: Path, state: ExecutionState, following: ExecutionState) -> None:
    """Each change is checked against TRANSITIONS; to stay is none."""
    executor, _ = executor_in(state, tmp_path, under_way=False)
    if following is state or may_follow(state, following):
        executor._change(following)
        assert executor.state is following
    else:
        with pytest.raises(IllegalTransitionError, match=f"{state} is not followed by {following}"):
            executor._change(following)
        assert executor.state is state


@pytest.mark.parametrize("last", [COMPLETED, PAUSED, CANCELLED, FAILED, IDLE])
@pytest.mark.parametrize("state", [INITIALIZING, EXECUTING, PAUSED])
def test_an_attempt_can_end_from_wherever_it_is(tmp_path: Path, state: ExecutionState, last: ExecutionState) -> None:
    """Every end of an attempt is legal from every state that it can be in; afterwards nothing is asked of it."""
    executor, asked = executor_in(state, tmp_path, under_way=True)
    assert executor._end(asked, lambda: last) is last  # type: ignore[arg-type]
    assert (executor.state, executor._attempt) == (last, None)
    assert executor._end(asked, lambda: FAILED) is last  # type: ignore[arg-type]  # only once


def test_an_executor_that_waits_in_a_pause_of_others(tmp_path: Path) -> None:
    """Resuming asks the waiting attempt to go on, and gives what that one gives; another session cannot be resumed."""
    executor, asked = executor_in(PAUSED, tmp_path, under_way=True)
    with pytest.raises(IllegalTransitionError, match="execute\\(\\) waits for it"):
        executor.resume("p.other")
    given: list[object] = [executor.resume("p.s")]
    given.append(asyncio.run(executor.resume_async(session_uuid("rowmill.p.s"))))
    assert given == ["the result", "the result"]
    executor.cancel()
    assert asked.wanted == [Wanted.RUN, Wanted.RUN, Wanted.CANCEL]


def test_before_anything_was_executed(tmp_path: Path) -> None:
    """It is idle, has no session, and there is nothing to resume, pause or cancel."""
    executor = PipelineExecutor([twice], broker=f"local://{tmp_path}")
    assert (executor.state, executor.session, executor.session_id) == (IDLE, None, None)
    with pytest.raises(NoCheckpointError, match="nothing was executed yet"):
        executor.resume()
    with pytest.raises(RuntimeError, match="nothing was executed yet"):
        executor.pause()
    assert IDLE in TRANSITIONS


@pytest.mark.parametrize("session", ["x", "p.x", "rowmill.p.x", str(UNKNOWN), UNKNOWN])
def test_an_unknown_session_is_a_value_error(tmp_path: Path, session: Any) -> None:
    """It names the session and says which there are: those of the broker."""
    executor = PipelineExecutor([twice], broker=f"local://{tmp_path}", session="s")
    with pytest.raises(ValueError, match=f"no checkpoint of session '{session}'.*no sessions"):
        executor.resume(session)
    executor.execute(Pipeline("p"), ROWS)
    with pytest.raises(ValueError, match=rf"no checkpoint of session '{session}'.*p\.s"):
        executor.resume(session)
    assert executor.state is COMPLETED


# --- pipelines and stages --------------------------------------------------------------------------------------


def test_stages_of_the_executor(tmp_path: Path) -> None:
    """A pipeline without stages gets the executor's; it stays as it is itself."""
    pipeline = Pipeline("p", sink="results").table("t")
    result = PipelineExecutor([twice, make_stage(once)], broker=f"local://{tmp_path}").execute(pipeline, ROWS)
    assert list(result.data["twice"]) == [0, 2, 4, 6, 8]
    assert result.topics["sink"].startswith("results.run-")
    assert pipeline.stages == ()


@pytest.mark.parametrize(
    ("stages", "options"),
    [(None, {}), ([], {}), ([twice], {}), ([twice], {"retry": 2}), ([make_stage(twice)], {})],
)
def test_stages_of_the_pipeline(tmp_path: Path, stages: Any, options: Any) -> None:
    """A pipeline's own stages are run; the same ones may be given to the executor as well."""
    pipeline = Pipeline("p").add(twice, **options)
    result = PipelineExecutor(stages, broker=f"local://{tmp_path}").execute(pipeline, ROWS)
    assert list(result.data["twice"]) == [0, 2, 4, 6, 8]


def test_an_executor_of_a_pipeline(tmp_path: Path) -> None:
    """A pipeline in place of stages need not be given again; its stages serve another pipeline, too."""
    executor = PipelineExecutor(Pipeline("p").add(twice), broker=f"local://{tmp_path}")
    assert list(executor.execute(rows=ROWS).data["twice"]) == [0, 2, 4, 6, 8]
    assert executor.session is not None
    assert executor.session.startswith("p.run-")
    executor.execute(Pipeline("q"), ROWS)
    assert executor.session.startswith("q.run-")


@pytest.mark.parametrize(
    ("stages", "pipeline", "setting", "remedy"),
    [
        ([twice], None, r"execute\(pipeline\)", "give a Pipeline"),
        ([twice], "p", r"execute\(pipeline\)", "give a Pipeline"),
        (None, Pipeline("p"), "stage", ""),
        ([], Pipeline("p"), "stage", ""),
        ([twice], Pipeline("p").add(once), r"execute\(pipeline\)", "others than the executor's"),
        ([twice], Pipeline("p").add(twice).add(once), r"execute\(pipeline\)", "others than the executor's"),
        ([make_stage(twice, retry=2)], Pipeline("p").add(twice), r"execute\(pipeline\)", "others than the executor's"),
        (Pipeline("q").add(once), Pipeline("p").add(twice), r"execute\(pipeline\)", "others than the executor's"),
    ],
)
def test_wrong_pipelines(tmp_path: Path, stages: Any, pipeline: Any, setting: str, remedy: str) -> None:
    """No name, no stages, or two different lists of them: told by what to do; the executor stays idle."""
    executor = PipelineExecutor(stages, broker=f"local://{tmp_path}")
    with pytest.raises(ConfigError, match=f"{setting}.*{remedy}"):
        executor.execute(pipeline, ROWS)
    assert executor.state is IDLE


@pytest.mark.parametrize("rows", ["rows", b"rows", {"n": 1}, 5])
def test_wrong_rows(tmp_path: Path, rows: Any) -> None:
    """What is no frame and no iterable of dicts is refused before anything changes."""
    executor = PipelineExecutor([twice], broker=f"local://{tmp_path}")
    with pytest.raises(ConfigError, match="rows"):
        executor.execute(Pipeline("p"), rows)
    assert (executor.state, executor.session) == (IDLE, None)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"stages": twice}, "stages"),
        ({"stages": {twice}}, "stages"),
        ({"stages": "stages"}, "stages"),
        ({"state_manager": object()}, "state_manager"),
        ({"observers": [object()]}, "observers"),
        ({"observers": [ExecutionObserver]}, "observers"),
        ({"broker": "nowhere"}, "broker"),
        ({"session": "a.b"}, "session"),
        ({"options": WorkerOptions(commit_rows=7), "state_manager": StateManager(MemoryCheckpointStorage())},
         "commit_rows"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments: dict[str, Any], setting: str) -> None:
    """Told at once, by the argument's name."""
    with pytest.raises(ConfigError, match=setting):
        PipelineExecutor(**arguments)


def test_rows_do_not_go_to_the_live_session(tmp_path: Path) -> None:
    """It reads the source topics; rows of one's own need a session of their own."""
    executor = PipelineExecutor([twice], broker=f"local://{tmp_path}", session="live")
    with pytest.raises(ConfigError, match="choose another name"):
        executor.execute(Pipeline("p"), ROWS)


# --- the manager -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manager", "options", "rows"),
    [
        (None, None, 500),
        (None, WorkerOptions(), 10_000),
        (None, WorkerOptions(commit_rows=7), 7),
        (StateManager(MemoryCheckpointStorage(), 50), None, 50),
        (StateManager(MemoryCheckpointStorage(), 50), WorkerOptions(threads=3), 50),
        (StateManager(MemoryCheckpointStorage(), 50), WorkerOptions(commit_rows=50), 50),
    ],
)
def test_the_interval_of_checkpoints(tmp_path: Path, manager: Any, options: Any, rows: int) -> None:
    """It is how many rows a transaction has at most."""
    executor = PipelineExecutor([twice], manager, broker=f"local://{tmp_path}", options=options)
    assert executor._options.commit_rows == rows
    assert executor.state_manager.checkpoint_interval == rows
    assert options is None or executor._options.threads == options.threads


def test_the_broker_of_the_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor without a broker takes the one whose checkpoints its manager knows, else the default."""
    monkeypatch.setenv("ROWMILL_BROKER", f"local://{tmp_path / 'default'}")
    manager = StateManager(BrokerCheckpointStorage(f"local://{tmp_path / 'managed'}"))
    assert PipelineExecutor([twice], manager)._desk.url == f"local://{tmp_path / 'managed'}"
    assert PipelineExecutor([twice])._desk.url == f"local://{tmp_path / 'default'}"
    own = PipelineExecutor([twice], manager, broker=f"local://{tmp_path / 'own'}")
    assert own._desk.url == f"local://{tmp_path / 'own'}"


def test_a_broken_storage_costs_no_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rows are done and paid: that their context could not be kept is a warning."""

    class Full(MemoryCheckpointStorage):
        def save(self, session_id: Any, data: dict[str, Any]) -> bool:
            raise OSError("the disk is full")

    executor = PipelineExecutor([twice], StateManager(Full()), broker=f"local://{tmp_path}")
    assert len(executor.execute(Pipeline("p"), ROWS).data) == 5
    assert "the disk is full" in caplog.text


# --- jobs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "again"),
    [(None, True), (ROWS, True), (pd.DataFrame(ROWS), True), (iter(ROWS), False), ((row for row in ROWS), False)],
)
def test_rows_that_can_be_read_again(rows: Any, again: bool) -> None:
    """Lists and frames can; iterators are used up."""
    assert Job(Pipeline("p"), Session("p", "s"), rows, None).can_be_read_again is again


def test_one_execution_at_a_time(tmp_path: Path) -> None:
    """Of many threads that execute at the same moment one does; the others are refused."""
    barrier, refused, outcomes = threading.Barrier(5), threading.Semaphore(0), list[int]()

    def wait(row: dict[str, Any]) -> dict[str, Any]:
        """Until the others have tried."""
        if row["n"] == 0:
            for _ in range(4):
                assert refused.acquire(timeout=20)
        return row

    executor = PipelineExecutor([wait], broker=f"local://{tmp_path}")

    def execute() -> None:
        barrier.wait()
        try:
            outcomes.append(len(executor.execute(Pipeline("p"), ROWS).data))
        except IllegalTransitionError:
            outcomes.append(0)
            refused.release()

    threads = [threading.Thread(target=execute) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == [0, 0, 0, 0, 5]


def test_observers_are_added_in_a_chain(tmp_path: Path) -> None:
    """``add_observer`` returns the executor, and refuses what is no observer."""
    executor = PipelineExecutor([twice], broker=f"local://{tmp_path}")
    assert executor.add_observer(ExecutionObserver()).add_observer(ExecutionObserver()) is executor
    with pytest.raises(ConfigError, match="add_observer"):
        executor.add_observer(object())  # type: ignore[arg-type]


def test_the_error_of_a_missing_checkpoint() -> None:
    """Users of ondine expect a ValueError, and ours expect a RowmillError."""
    assert issubclass(NoCheckpointError, (ValueError,))
    assert issubclass(NoCheckpointError, SessionError)
