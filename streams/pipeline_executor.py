"""The pipeline executor: a session that its program can pause, resume and cancel. The names are ondine's.

It is a bounded run (``runs.py``) with a state, and with a hand on the control topic: what is asked of it here is asked
of all workers of the session, and outlives this process. The other way round, what others ask of the session shows in
the executor's state.

A call of :meth:`PipelineExecutor.execute` or :meth:`PipelineExecutor.resume` is one *attempt* (``attempts.py``).
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

from ..handlers.observers import ExecutionObserver, checked_observer
from ..handlers.stage import Handler, Stage
from ..state.clock import SystemClock
from ..state.context import ExecutionContext, session_uuid
from ..state.errors import ConfigError
from ..state.execution import ExecutionState, Wanted, may_follow
from ..state.model import Row
from .attempts import Attempt, Desk, Job
from .broker_checkpoints import BrokerCheckpointStorage
from .brokers.open import broker_url
from .control import is_completed
from .errors import IllegalTransitionError, NoCheckpointError
from .loops import run_blocking
from .options import WorkerOptions
from .pipeline import Pipeline
from .results import ExecutionResult
from .session import LIVE, Session, check_name
from .session_records import SessionRecord
from .session_refs import record_of, short_name
from .state_manager import CHECKPOINT_ROWS, StateManager

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only

Rows: TypeAlias = "pd.DataFrame | Iterable[Row]"

_UNDER_WAY = "is being executed"
_OVER = MappingProxyType(
    {
        ExecutionState.IDLE: "is not being executed",
        ExecutionState.COMPLETED: "is completed",
        ExecutionState.FAILED: "has failed; resume() goes on with it once the cause is mended",
        ExecutionState.CANCELLED: "is cancelled; resume() goes on with it",
    }
)
REFUSALS: Mapping[str, Mapping[ExecutionState, str]] = MappingProxyType(
    {
        "execute": MappingProxyType(
            {
                ExecutionState.INITIALIZING: _UNDER_WAY,
                ExecutionState.EXECUTING: _UNDER_WAY,
                ExecutionState.PAUSED: "is paused; resume() goes on with it, cancel() ends it",
            }
        ),
        "pause": MappingProxyType({**_OVER, ExecutionState.PAUSED: "is paused already"}),
        "resume": MappingProxyType({ExecutionState.INITIALIZING: _UNDER_WAY, ExecutionState.EXECUTING: _UNDER_WAY}),
        "cancel": _OVER,
    }
)
"""Why an executor in this state refuses to do this; what is not here it does."""


class PipelineExecutor:
    """Executes a pipeline as a session that can be paused, resumed and cancelled, from any thread and any process.

    :meth:`execute` and :meth:`resume` block until the session ends or is ended; they work in scripts, in notebooks, and
    beside a running event loop, which they hold up: asyncio programs await the twins that end in ``_async``. While one
    of them is under way, :meth:`pause` and :meth:`cancel` may be called from other threads, from observers and from
    signal handlers; they ask, and return at once.

    The session is kept, with its topics, until ``state_manager.cleanup_checkpoints(executor.session_id)``.

    Args:
        stages: handlers and Stages, in order; or a Pipeline; or None: those of the pipeline that is executed.
        state_manager: whose ``checkpoint_interval`` is the most rows that one transaction has, and who keeps the
            session's context at its end, and when it is paused or cancelled. Default: one that knows this broker, with
            an interval of ``options.commit_rows``, or 500 without options. On a broker there is nothing to keep: every
            transaction commits the checkpoint.
        observers: told what becomes of the pipeline, besides the pipeline's own. Each attempt is told from a start to
            an end, also where it was paused: ``result.stopped`` tells.
        broker: its URL. Default: the state manager's, else ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        session: the session's name, to go on with it in another process. Default: a new one for every ``execute`` with
            rows, the live session for one without.
        key: the column that becomes the rows' key; default: none.
        options: how the worker runs.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        stages: Pipeline | Sequence[Handler | Stage] | None = None,
        state_manager: StateManager | None = None,
        observers: Sequence[ExecutionObserver] | None = None,
        *,
        broker: str | None = None,
        session: str | None = None,
        key: str | None = None,
        options: WorkerOptions | None = None,
    ) -> None:
        self._stages = _checked_stages(stages)
        self._observers = [checked_observer(each, "PipelineExecutor(observers=)") for each in observers or ()]
        self._name = None if session is None else check_name("PipelineExecutor(session=)", session)
        self._key = key
        self._clock = SystemClock()
        self.state_manager = _checked_manager(state_manager, broker, options)
        """Whoever knows, lists and removes the checkpoints."""
        self._options = _with_interval(options, self.state_manager.checkpoint_interval)
        url = broker_url(broker or _manager_url(self.state_manager))
        self._desk = Desk(url, self._clock, self._options)
        # Reentrant: a signal handler may call pause() while its own thread is in here.
        self._lock = threading.RLock()
        self._state = ExecutionState.IDLE
        self._job: Job | None = None
        self._attempt: Attempt | None = None

    def add_observer(self, observer: ExecutionObserver) -> PipelineExecutor:
        """Have it told of what is executed from the next call on; returns the executor, so that calls chain.

        Raises:
            ConfigError: it is no observer, or a method of it is async.
        """
        self._observers.append(checked_observer(observer, "add_observer(observer)"))
        return self

    @property
    def state(self) -> ExecutionState:
        """What it does now. ``idle`` again after Ctrl-C, or when a row ended the session: it can be resumed."""
        return self._state

    @property
    def session(self) -> str | None:
        """What people call the session that was executed last, ``reviews.NAME``; None before the first one."""
        return None if self._job is None else short_name(self._job.session.group)

    @property
    def session_id(self) -> UUID | None:
        """Its id, for :meth:`resume` and the state manager; None before the first one."""
        return None if self._job is None else session_uuid(self._job.session.group)

    # --- executing ---------------------------------------------------------------------------------------------

    def execute(self, pipeline: Pipeline | None = None, rows: Rows | None = None) -> ExecutionResult:
        """Run rows through the stages, and return when all are done, or somebody pauses or cancels the session.

        Args:
            pipeline: says name, topics, tables, budget and so on; and the stages, if the executor was given none.
                Default: the one that the executor was made with.
            rows: a DataFrame or any iterable of dicts. None: those of the pipeline's source topics, from the session's
                checkpoint to the ends that they have now.

        Returns:
            As :meth:`Pipeline.run`. If the session was paused or cancelled, those results that there are, with
            ``is_complete`` False and ``stopped`` ``paused`` or ``cancelled``.

        Raises:
            IllegalTransitionError: it is executing already, or paused. A RuntimeError.
            ConfigError: an argument is wrong, or stages were given twice and differ.
            RowmillError: it failed; :meth:`resume` goes on with it once the cause is mended.
        """
        return self._block(self._begin("execute", self._new_job(pipeline, rows)))

    async def execute_async(self, pipeline: Pipeline | None = None, rows: Rows | None = None) -> ExecutionResult:
        """:meth:`execute` on the running event loop.

        Cancelling the task leaves the session as a crash would: :meth:`resume` goes on with it.
        """
        return await self._begin("execute", self._new_job(pipeline, rows)).run()

    def resume(
        self, session_id: UUID | str | None = None, rows: Rows | None = None, *, pipeline: Pipeline | None = None
    ) -> ExecutionResult:
        """Go on with a session that was paused, cancelled or interrupted, or that failed or crashed.

        If this executor waits in :meth:`execute` because others paused the session, both calls return its result.

        Args:
            session_id: its UUID, the UUID's text, or its name (``reviews.NAME``). Default: the one executed last.
            rows: the same as before. Needed in another process than before, and where they were an iterator, which can
                be read only once.
            pipeline: as for :meth:`execute`. Needed in another process than before.

        Returns:
            The result of the whole session, also of what was done before (not so for the live session).

        Raises:
            NoCheckpointError: there is no such session on the broker. A ValueError.
            IllegalTransitionError: the executor is executing, or the session is completed. A RuntimeError.
            SessionError: these are not the rows that it was started with; it stays as it was.
            ConfigError: rows or pipeline are missing, or wrong.
            RowmillError: it failed.
        """
        waiting = self._waiting_for(session_id)
        if waiting is not None:
            return waiting.ended.result()
        return self._block(run_blocking(lambda: self._begin_again(session_id, rows, pipeline)))

    async def resume_async(
        self, session_id: UUID | str | None = None, rows: Rows | None = None, *, pipeline: Pipeline | None = None
    ) -> ExecutionResult:
        """:meth:`resume` on the running event loop."""
        waiting = self._waiting_for(session_id)
        if waiting is not None:
            return await asyncio.wrap_future(waiting.ended)
        return await (await self._begin_again(session_id, rows, pipeline)).run()

    # --- ending it ---------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Ask for a pause: rows in work are finished and committed, by all workers of the session, and others wait.

        Returns at once; :meth:`execute` returns with what is done when it is so. The session stays paused, for other
        workers and after restarts as well, until it is resumed or cancelled. If all rows are done by then, it is
        completed instead.

        Raises:
            IllegalTransitionError: nothing is executing, or it is paused already. A RuntimeError.
        """
        self._ask("pause", Wanted.PAUSE)

    async def pause_async(self) -> None:
        """:meth:`pause`, and wait until it is done. Not for handlers, for which it would wait."""
        await _until_ended(self._ask("pause", Wanted.PAUSE))

    def cancel(self) -> None:
        """Stop at once: what has completed is committed; rows in work, and all others, run when it is resumed.

        Returns at once while :meth:`execute` is under way, which then returns with what is done: within two seconds,
        whatever handlers do. Blocking handlers go on with the call that they are in, on threads that nobody waits for.
        Of a paused session it is recorded that it shall not go on by itself.

        Raises:
            IllegalTransitionError: nothing is executing or paused. A RuntimeError.
            BrokerError: a paused session: the broker does not answer.
        """
        if self._ask("cancel", Wanted.CANCEL) is None:
            run_blocking(self._cancel_paused)

    async def cancel_async(self) -> None:
        """:meth:`cancel`, and wait until it is done. Not for handlers."""
        attempt = self._ask("cancel", Wanted.CANCEL)
        await (self._cancel_paused() if attempt is None else _until_ended(attempt))

    def _ask(self, method: str, wanted: Wanted) -> Attempt | None:
        """The attempt that was asked; None where none is under way."""
        with self._lock:
            self._check(method)
            if self._attempt is not None:
                self._attempt.ask(wanted)
            return self._attempt

    async def _cancel_paused(self) -> None:
        job = self._job
        assert job is not None  # noqa: S101 - it is paused
        async with self._desk.open() as control:
            await self._desk.request(control, job.session.group, Wanted.CANCEL)
        self._change(ExecutionState.CANCELLED)

    # --- states ------------------------------------------------------------------------------------------------

    def _check(self, method: str) -> None:
        refusal = REFUSALS[method].get(self._state)
        if refusal is not None:
            session = f"session {self.session!r}" if self._job is not None else "nothing was executed yet; it"
            raise IllegalTransitionError(f"PipelineExecutor.{method}(): {session} {refusal}")

    def _change(self, following: ExecutionState) -> None:
        with self._lock:
            if following is not self._state and not may_follow(self._state, following):
                raise IllegalTransitionError(f"{self.session}: {self._state} is not followed by {following}")
            self._state = following

    def _begin(
        self, method: str, job: Job, before: ExecutionContext | None = None, *, resumes: bool = False
    ) -> Attempt:
        """An attempt that is to be run; until it has ended, there is no other."""
        observers = [*job.pipeline.observers, *self._observers]
        with self._lock:
            self._check(method)
            attempt = Attempt(  # refuses wrong rows before anything changes
                job,
                self._desk,
                self.state_manager,
                observers,
                on_state=self._change,
                on_end=self._end,
                before=before,
                resumes=resumes,
            )
            self._change(ExecutionState.INITIALIZING)
            self._job, self._attempt = job, attempt
        return attempt

    def _end(self, attempt: Attempt, last_state: Callable[[], ExecutionState]) -> ExecutionState:
        """An attempt has ended; from here on nothing is asked of it."""
        with self._lock:
            if self._attempt is not attempt:
                return self._state
            last = last_state()
            if self._state is ExecutionState.PAUSED and last is ExecutionState.COMPLETED:
                self._change(ExecutionState.EXECUTING)  # the last rows were committed on the way into the pause
            self._change(last)
            self._attempt = None
            return last

    def _block(self, attempt: Attempt) -> ExecutionResult:
        try:
            return run_blocking(attempt.run, on_interrupt=attempt.interrupt)
        except BaseException as error:
            attempt.abandon(error)  # its loop is gone; if it came to no end by itself, it has now
            raise

    def _waiting_for(self, session_id: UUID | str | None) -> Attempt | None:
        """The attempt that waits because others paused this session, asked to go on."""
        with self._lock:
            self._check("resume")
            if self._attempt is None:
                return None
            if not self._is_mine(session_id):
                raise IllegalTransitionError(
                    f"PipelineExecutor.resume(): session {self.session!r} is paused, and execute() waits for it; "
                    "cancel() it first, or use another executor"
                )
            self._attempt.ask(Wanted.RUN)
            return self._attempt

    # --- jobs --------------------------------------------------------------------------------------------------

    def _new_job(self, pipeline: Pipeline | None, rows: Rows | None) -> Job:
        merged = self._merged(pipeline, "execute")
        name = self._name or (LIVE if rows is None else f"run-{self._clock.token()}")
        if rows is not None and name == LIVE:
            remedy = "this is the session that reads the source topics; choose another name for these rows"
            raise ConfigError("PipelineExecutor(session=)", name, remedy)
        return Job(merged, Session(merged.name, name, owns_source=rows is not None), rows, self._key)

    def _merged(self, pipeline: Pipeline | None, method: str) -> Pipeline:
        """The pipeline with its stages, those given to the executor or its own."""
        own = self._stages
        if pipeline is None and isinstance(own, Pipeline):
            return own
        if not isinstance(pipeline, Pipeline):
            remedy = "give a Pipeline: it has the name, the topics, and whatever else there is to say"
            raise ConfigError(f"{method}(pipeline)", pipeline, remedy)
        stages = own.stages if isinstance(own, Pipeline) else own
        if pipeline is own or not stages:
            pipeline.chain()  # refuses one without stages
            return pipeline
        if not pipeline.stages:
            merged = copy.copy(pipeline)
            merged._stages = []  # noqa: SLF001 - a copy of our own
            for stage in stages:
                merged.add(stage)
            return merged
        if not _are_same(stages, pipeline.stages):
            shown = ", ".join(stage.name for stage in pipeline.stages)
            remedy = "its stages are others than the executor's; give the stages to one of the two"
            raise ConfigError(f"{method}(pipeline)", f"{pipeline.name} ({shown})", remedy)
        return pipeline

    def _is_mine(self, session_id: UUID | str | None) -> bool:
        """Whether this is the session that was executed last."""
        if self._job is None or session_id is None:
            return self._job is not None
        session = self._job.session
        names = {str(self.session_id), session.group, short_name(session.group), session.id}
        return str(session_id) in names

    async def _begin_again(
        self, session_id: UUID | str | None, rows: Rows | None, pipeline: Pipeline | None
    ) -> Attempt:
        former = self._job if self._is_mine(session_id) else None
        wanted = session_id if former is None else session_uuid(former.session.group)
        if wanted is None:
            raise NoCheckpointError("PipelineExecutor.resume(): nothing was executed yet; name the session")
        async with self._desk.open() as control:
            found = await self._desk.find(control, wanted)
            record = found.record or replace(record_of(found.group), owns_source=rows is not None)
            if await is_completed(control.broker, record, control.timeout):
                raise IllegalTransitionError(f"{found.name} cannot be resumed: it is completed, all its rows are done")
            job = self._former_job(former, record, rows, pipeline)
            before = await job.context(control)
        return self._begin("resume", job, before, resumes=record.wanted is Wanted.PAUSE)

    def _former_job(
        self, former: Job | None, record: SessionRecord, rows: Rows | None, pipeline: Pipeline | None
    ) -> Job:
        """What a session was started with, as far as this executor knows it, and as it was given again."""
        if pipeline is None and former is not None:
            pipeline = former.pipeline
        pipeline = self._merged(pipeline, "resume")
        if pipeline.name != record.pipeline:
            remedy = f"session {short_name(record.group)!r} is of the pipeline {record.pipeline!r}"
            raise ConfigError("resume(pipeline=)", pipeline.name, remedy)
        if rows is None and former is not None and former.can_be_read_again:
            rows = former.rows
        if record.owns_source and rows is None:
            why = "they were an iterator, which can be read only once" if former else "this executor did not start it"
            raise ConfigError("resume(rows=)", None, f"give the rows of session {short_name(record.group)!r}: {why}")
        if rows is not None and not record.owns_source:
            remedy = f"session {short_name(record.group)!r} reads the pipeline's source topics; give no rows"
            raise ConfigError("resume(rows=)", type(rows).__name__, remedy)
        session = Session(record.pipeline, record.session, owns_source=record.owns_source)
        return Job(pipeline, session, rows, self._key)


async def _until_ended(attempt: Attempt | None) -> None:
    """Until its caller gets what it came to."""
    if attempt is not None:
        await asyncio.gather(asyncio.wrap_future(attempt.ended), return_exceptions=True)


def _checked_stages(stages: Any) -> Pipeline | tuple[Handler | Stage, ...]:
    if isinstance(stages, Pipeline):
        return stages
    if stages is not None and not isinstance(stages, (list, tuple)):
        raise ConfigError("PipelineExecutor(stages)", stages, "give a list of handlers and Stages, or a Pipeline")
    return tuple(stages or ())


def _are_same(given: Sequence[Any], present: Sequence[Stage]) -> bool:
    """Whether the executor's stages are those of the pipeline, which may have options besides."""
    if len(given) != len(present):
        return False
    pairs = zip(given, present, strict=True)
    return all(each == (stage if isinstance(each, Stage) else stage.asked) for each, stage in pairs)


def _checked_manager(manager: Any, broker: str | None, options: WorkerOptions | None) -> StateManager:
    if manager is None:
        storage = BrokerCheckpointStorage(broker, state_dir=options.state_dir if options is not None else None)
        return StateManager(storage, CHECKPOINT_ROWS if options is None else options.commit_rows)
    if not isinstance(manager, StateManager):
        raise ConfigError("PipelineExecutor(state_manager=)", manager, "give a StateManager()")
    return manager


def _manager_url(manager: StateManager) -> str | None:
    """The broker that the manager looks at, if it does."""
    storage = manager.storage
    return storage._url if isinstance(storage, BrokerCheckpointStorage) else None  # noqa: SLF001 - it is ours


def _with_interval(options: WorkerOptions | None, rows: int) -> WorkerOptions:
    """The options with the manager's interval.

    Raises:
        ConfigError: they have another one.
    """
    options = options or WorkerOptions()
    if options.commit_rows not in {rows, WorkerOptions().commit_rows}:
        remedy = f"the state manager's checkpoint_interval is {rows:,}, which is the same thing; say it there only"
        raise ConfigError("commit_rows", options.commit_rows, remedy)
    return replace(options, commit_rows=rows)
