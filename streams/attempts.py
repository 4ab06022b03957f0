"""One attempt at a session by a pipeline executor: from the call of ``execute`` or ``resume`` to its result.

Whoever asks for a pause has it recorded on the control topic first, and then ends the run here: if the process dies in
between, the session is paused all the same. A cancellation ends the run at once and is recorded meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from ..handlers.executors import BlockingPool
from ..handlers.frames import is_frame
from ..handlers.observers import ExecutionObserver, ObserverDispatcher
from ..handlers.runtime import Event
from ..state.clock import Clock
from ..state.context import ExecutionContext, session_uuid
from ..state.errors import ConfigError, RowmillError
from ..state.execution import ExecutionState, Wanted
from .broker_checkpoints import BrokerCheckpointStorage
from .brokers.open import open_broker
from .contexts import new_context, session_context
from .control import request
from .control_topic import ControlTopic
from .errors import IllegalTransitionError, NoCheckpointError, SessionError
from .inputs import make_input
from .options import WorkerOptions
from .pipeline import Pipeline
from .results import ExecutionResult
from .runs import BoundedRun, RunOutcome, execution_result
from .session import Session
from .session_records import SessionRecord, here
from .session_refs import SessionRef, known_sessions, resolve, short_name
from .state_manager import StateManager
from .worker import Worker

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5
_GOODBYE_SECONDS = 2.0
_HASTY_SECONDS = 0.5
"""How long observers may take to hear the rest: of a session that was cancelled, nobody wants to wait."""
_RECORD_SECONDS = 5.0
_CALL_SECONDS = 10.0
_SHOWN = 8
_STOPPED = {
    ExecutionState.PAUSED: "paused",
    ExecutionState.CANCELLED: "cancelled",
    ExecutionState.IDLE: "interrupted",
}
"""What a result says of an attempt that was ended early."""
_RANKS = (Wanted.RUN, Wanted.PAUSE, Wanted.CANCEL)


@dataclass(frozen=True)
class Job:
    """What is executed: the same in every attempt at a session.

    Attributes:
        pipeline: with its stages.
        session: under which name.
        rows: as they were given; None for those of the source topics.
        key: the column that becomes their key.
    """

    pipeline: Pipeline
    session: Session
    rows: Any
    key: str | None

    @property
    def can_be_read_again(self) -> bool:
        """Whether the rows are no iterator, which is used up."""
        return is_frame(self.rows) or not isinstance(self.rows, Iterable) or iter(self.rows) is not self.rows

    async def context(self, control: ControlTopic) -> ExecutionContext | None:
        """How far the session is; None where nothing was committed.

        Raises:
            CheckpointError: a checkpoint cannot be read.
            BrokerError: the broker does not answer.
        """
        sources = [self.session.source(topic) for topic in self.pipeline.sources]
        return await session_context(control.broker, self.session, sources, control.timeout, control.clock)


class Desk:
    """Where an executor asks and looks things up: connections to its broker, each for one errand.

    Args:
        url: the broker's.
        clock: time.
        options: the worker's.
    """

    def __init__(self, url: str, clock: Clock, options: WorkerOptions) -> None:
        self.url = url
        self.clock = clock
        self.options = options
        self._by = f"PipelineExecutor on {here()}"
        open_broker(url, clock=clock)  # refuses what is no broker

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[ControlTopic]:
        """The control topic, and with it a broker that is started."""
        broker = open_broker(self.url, clock=self.clock)
        await broker.start()
        try:
            timeout = min(_CALL_SECONDS, self.options.broker_timeout)
            yield ControlTopic(broker, clock=self.clock, timeout=timeout, create=self.options.create_topics)
        finally:
            await broker.close()

    async def request(self, control: ControlTopic, group: str, wanted: Wanted) -> None:
        """Ask something of a session, in this process's name. Errors are those of :func:`~.control.request`."""
        await request(control, group, wanted, by=self._by)

    async def withdraw_pause(self, control: ControlTopic, group: str) -> None:
        """Take a pause back that was asked for here, of a session that came to its end all the same.

        It could not be resumed: nothing may be asked of a session that is completed.
        """

        def change(present: SessionRecord | None) -> SessionRecord | None:
            if present is None or present.wanted is not Wanted.PAUSE or present.changed_by != self._by:
                return present
            return replace(present, wanted=Wanted.RUN, changed_ms=self.clock.now_ms())

        await control.update(group, change)

    async def find(self, control: ControlTopic, session_id: UUID | str) -> SessionRef:
        """The session that is meant.

        Raises:
            NoCheckpointError: there is none; the message says which there are.
            BrokerError: the broker does not answer.
        """
        known = await known_sessions(control)
        try:
            by_id = _as_uuid(session_id)
            if by_id is None:
                group = resolve(str(session_id), known.keys(), self.url)
                return SessionRef(group, known[group])
        except ConfigError as error:
            raise NoCheckpointError(f"no checkpoint of session {str(session_id)!r}: {error.remedy}") from None
        for group, record in known.items():
            if session_uuid(group) == by_id:
                return SessionRef(group, record)
        raise NoCheckpointError(f"no checkpoint of session {str(session_id)!r} on {self.url}: {_listed(sorted(known))}")


def _as_uuid(session_id: UUID | str) -> UUID | None:
    if isinstance(session_id, UUID):
        return session_id
    try:
        return UUID(session_id)
    except (ValueError, AttributeError, TypeError):
        return None


def _listed(groups: list[str]) -> str:
    if not groups:
        return "there are no sessions"
    names = ", ".join(short_name(group) for group in groups[:_SHOWN])
    more = f" and {len(groups) - _SHOWN:,} more" if len(groups) > _SHOWN else ""
    return f"there {'is' if len(groups) == 1 else 'are'} {names}{more}"


class Attempt:
    """One attempt. Made in the caller's thread, run on an event loop, asked from anywhere.

    Args:
        job: what is executed.
        desk: where things are asked.
        manager: keeps the context at the end.
        observers: are told.
        on_state: called with what it is doing now; from the event loop.
        on_end: called with a function that tells the last state; nothing may be asked after it was called.
        before: how far the session is, for observers; None where nobody looked.
        resumes: whether the session is paused, and is to go on.

    Raises:
        ConfigError: the rows are none.
    """

    def __init__(
        self,
        job: Job,
        desk: Desk,
        manager: StateManager,
        observers: Sequence[ExecutionObserver],
        *,
        on_state: Callable[[ExecutionState], None],
        on_end: Callable[[Attempt, Callable[[], ExecutionState]], ExecutionState],
        before: ExecutionContext | None = None,
        resumes: bool = False,
    ) -> None:
        self.job = job
        self.ended: Future[ExecutionResult] = Future()
        """What the attempt came to."""
        self.ended.set_running_or_notify_cancel()  # who waits for it and is cancelled does not cancel it
        self._desk = desk
        self._manager = manager
        self._on_state = on_state
        self._on_end = on_end
        self._resumes = resumes
        rows = None if job.rows is None else make_input(job.rows, job.key)
        self._before = before or new_context(job.session, desk.clock)
        total = 0 if rows is None else rows.total or 0
        self._audience = _Audience(job, observers, desk.clock, total)
        self._run = BoundedRun(
            replace_observers(job.pipeline),
            open_broker(desk.url, clock=desk.clock),
            job.session,
            rows,
            options=desk.options,
            clock=desk.clock,
            on_worker=self._meet,
            tells_all=True,
        )
        self._worker: Worker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._registered = asyncio.Event()
        self._asked: Wanted | None = None
        self._heeded: Wanted | None = None
        self._errands: list[asyncio.Task[None]] = []
        self._is_pause_recorded = False
        self._is_over = False

    # --- asking ------------------------------------------------------------------------------------------------

    def ask(self, wanted: Wanted) -> None:
        """Ask for a pause, a cancellation, or (of a paused session) to go on. From any thread; returns at once."""
        asked = self._asked
        if asked is None or asked is Wanted.RUN or _RANKS.index(wanted) > _RANKS.index(asked):
            self._asked = wanted
        loop = self._loop
        if loop is not None:  # else run() looks at it when it begins
            with contextlib.suppress(RuntimeError):  # the loop is closed: it is over
                loop.call_soon_threadsafe(self._heed)

    def interrupt(self) -> None:
        """End it in order, as at Ctrl-C, and ask nobody else to. On the event loop."""
        self._run.interrupt()

    def _heed(self) -> None:
        wanted = self._asked
        if wanted is None or (wanted is self._heeded and wanted is not Wanted.RUN):
            return
        self._heeded = wanted
        if wanted is Wanted.CANCEL:
            self._run.cancel()
        elif wanted is Wanted.PAUSE and self._worker is not None:
            self._worker.pause()  # no more rows while it is being recorded
        self._send(wanted)

    def _send(self, wanted: Wanted) -> None:
        before = self._errands[-1] if self._errands else None
        self._errands.append(asyncio.create_task(self._record(wanted, before)))

    async def _record(self, wanted: Wanted, before: asyncio.Task[None] | None) -> None:
        """Record what is wanted, in the order of asking, and once the session is known; then do it here."""
        if before is not None:
            await asyncio.wait({before})
        await self._registered.wait()
        try:
            async with self._desk.open() as control:
                await self._desk.request(control, self.job.session.group, wanted)
            self._is_pause_recorded |= wanted is Wanted.PAUSE
        except IllegalTransitionError as error:  # somebody asked for it already, or it is completed
            log.info("%s", error)
        except (RowmillError, OSError) as error:
            log.warning("%s: only this process obeys, for %r was not recorded: %s", self._name, wanted.value, error)
        if wanted is Wanted.PAUSE:
            self._run.interrupt()
        elif wanted is Wanted.RUN and self._worker is not None:
            self._worker.unpause()

    # --- running -----------------------------------------------------------------------------------------------

    async def run(self) -> ExecutionResult:
        """From the beginning to the end.

        Raises:
            RowmillError: it failed.
        """
        self._loop = asyncio.get_running_loop()
        if self._asked is not None:
            self._heed()
        elif self._resumes:
            self._send(Wanted.RUN)
        started = datetime.now(UTC)
        try:
            outcome = await self._run.execute()
            result = await self._conclude(outcome, await execution_result(outcome, self.job.rows, started))
        except BaseException as error:
            await self._fail(error)
            raise
        self.ended.set_result(result)
        return result

    def abandon(self, error: BaseException) -> None:
        """Its event loop is gone. Does nothing where it came to an end before."""
        self._on_end(self, lambda: ExecutionState.IDLE)
        if not self.ended.done():
            self.ended.set_exception(self._as_told(error))

    def _meet(self, worker: Worker) -> None:
        self._worker = worker
        worker.runtime.listeners.append(self._hear)
        self._audience.begin(worker, self._before)

    def _hear(self, event: Event) -> None:
        """From any thread."""
        if event.kind in _HEARD and self._loop is not None:
            with contextlib.suppress(RuntimeError):
                if asyncio.get_running_loop() is self._loop:
                    self._note(event.kind)
                    return
            self._loop.call_soon_threadsafe(self._note, event.kind)

    def _note(self, kind: str) -> None:
        if self._is_over:
            return
        if kind == "worker_started":
            self._registered.set()
        elif kind == "paused":
            # Its own pause ends the run, and one that it is about to lift is none.
            if self._asked is None and not self._resumes:
                self._on_state(ExecutionState.PAUSED)
        else:
            self._resumes = False
            if self._asked is Wanted.RUN:
                self._asked = None
            self._on_state(ExecutionState.EXECUTING)
            if self._asked is Wanted.PAUSE and self._worker is not None and self._loop is not None:
                # It heard of something older than the pause, which is not recorded yet.
                self._loop.call_soon(self._worker.pause)

    # --- the end -----------------------------------------------------------------------------------------------

    async def _conclude(self, outcome: RunOutcome, result: ExecutionResult) -> ExecutionResult:
        state = self._end(lambda: self._last_state(outcome))
        await self._finish_errands(outcome)
        result = replace(
            result,
            stopped=result.stopped if outcome.is_whole else _STOPPED[state],
            metadata={"session_id": str(session_uuid(self.job.session.group)), "state": state.value},
        )
        context = outcome.context or new_context(self.job.session, self._desk.clock)
        context.total_rows = max(result.metrics.total_rows, context.completed_rows)
        context.end_time = result.end_time if state is ExecutionState.COMPLETED else None
        await self._save(context)
        is_hasty = state is ExecutionState.CANCELLED
        await self._audience.end(context, result, _HASTY_SECONDS if is_hasty else _GOODBYE_SECONDS)
        return result

    def _last_state(self, outcome: RunOutcome) -> ExecutionState:
        if outcome.is_whole:
            return ExecutionState.COMPLETED if outcome.stopped_by is None else ExecutionState.IDLE
        if self._asked is Wanted.CANCEL or (self._worker is not None and self._worker.was_cancelled):
            return ExecutionState.CANCELLED
        return ExecutionState.PAUSED if self._asked is Wanted.PAUSE else ExecutionState.IDLE

    def _end(self, last_state: Callable[[], ExecutionState]) -> ExecutionState:
        state = self._on_end(self, last_state)
        self._is_over = True
        return state

    async def _finish_errands(self, outcome: RunOutcome) -> None:
        """Have recorded what was asked for, before anybody relies on it."""
        await asyncio.sleep(0)  # what was asked for in the last moment is heeded
        if outcome.is_whole and self._is_pause_recorded:
            self._errands.append(asyncio.create_task(self._withdraw()))
        if not self._errands:
            return
        _, late = await asyncio.wait(self._errands, timeout=_RECORD_SECONDS if self._registered.is_set() else 0)
        for errand in late:
            errand.cancel()
        if late:
            log.warning("%s: it could not be recorded that the session is to %s", self._name, self._asked)
            await asyncio.wait(late)

    async def _withdraw(self) -> None:
        with contextlib.suppress(RowmillError, OSError):
            async with self._desk.open() as control:
                await self._desk.withdraw_pause(control, self.job.session.group)

    async def _fail(self, error: BaseException) -> None:
        is_failure = isinstance(error, Exception)
        self._end(lambda: ExecutionState.FAILED if is_failure else ExecutionState.IDLE)
        for errand in self._errands:
            errand.cancel()
        context = self._before
        try:
            if is_failure:
                context = await self._committed() or context
                await self._save(context)
            await self._audience.end(context, error, _HASTY_SECONDS)
        finally:
            self.ended.set_exception(self._as_told(error))

    def _as_told(self, error: BaseException) -> BaseException:
        """As those hear of it who wait for the attempt in another place."""
        if isinstance(error, Exception):
            return error
        return SessionError(f"session {self._name!r} was interrupted; resume() goes on with it")

    async def _committed(self) -> ExecutionContext | None:
        """How far the session is, after a failure; None where that cannot be found out soon."""
        with contextlib.suppress(RowmillError, OSError, TimeoutError):
            async with asyncio.timeout(_RECORD_SECONDS), self._desk.open() as control:
                return await self.job.context(control)
        return None

    async def _save(self, context: ExecutionContext) -> None:
        """Hand the context to whoever keeps it. On a broker every transaction has done so."""
        if isinstance(self._manager.storage, BrokerCheckpointStorage):
            return
        try:
            await _beside(self._manager.save_checkpoint, context)
        except Exception as error:  # noqa: BLE001 - it may be anybody's storage, and the results are more than a file
            log.warning("%s: its context was not kept: %s (the session can be resumed all the same)", self._name, error)

    @property
    def _name(self) -> str:
        return short_name(self.job.session.group)


_HEARD = frozenset({"worker_started", "partition_opened", "paused", "resumed"})


def replace_observers(pipeline: Pipeline) -> Pipeline:
    """The pipeline without observers of its own: the attempt tells them, with the result, and not its worker."""
    if not pipeline.observers:
        return pipeline
    import copy

    silent = copy.copy(pipeline)
    silent._observers = []  # noqa: SLF001 - a copy of our own
    return silent


class _Audience:
    """An attempt's observers: told of one start, and of one end.

    Args:
        job: what they are told of.
        observers: who.
        clock: time.
        total: how many rows there are; 0 where that is not known beforehand.
    """

    def __init__(self, job: Job, observers: Sequence[ExecutionObserver], clock: Clock, total: int) -> None:
        self._job = job
        self._observers = observers
        self._clock = clock
        self._total = total
        self._dispatcher: ObserverDispatcher | None = None
        self._telling: asyncio.Task[None] | None = None

    def begin(self, worker: Worker, before: ExecutionContext) -> None:
        """The worker is about to begin, where the session stood before."""
        if not self._observers:
            return
        self._dispatcher = ObserverDispatcher(
            self._observers,
            stage_counts=worker.runtime.stage_counts,
            session=self._job.session.id,
            worker=worker.name,
        )
        worker.runtime.listeners.append(self._dispatcher.hear)
        self._dispatcher.started(self._job.pipeline, self._with_total(before))
        self._telling = asyncio.create_task(self._tell_progress(self._dispatcher, worker))

    def _with_total(self, context: ExecutionContext) -> ExecutionContext:
        context.total_rows = max(context.total_rows, self._total)
        return context

    async def _tell_progress(self, dispatcher: ObserverDispatcher, worker: Worker) -> None:
        while True:
            await self._clock.sleep(_PROGRESS_SECONDS)
            if _has_all_open(worker):
                dispatcher.progress(self._with_total(worker.context()))

    async def end(self, context: ExecutionContext, end: ExecutionResult | BaseException, seconds: float) -> None:
        """It came to an end. Observers may take so many seconds to hear the rest."""
        if not self._observers:
            return
        if self._telling is not None:
            self._telling.cancel()
        dispatcher = self._dispatcher or ObserverDispatcher(self._observers, session=self._job.session.id)
        if isinstance(end, BaseException):
            dispatcher.failed(context, end)
        else:
            dispatcher.progress(context)
            dispatcher.completed(context, end)
        await _beside(dispatcher.close, seconds)


def _has_all_open(worker: Worker) -> bool:
    """Whether the worker's context tells of all that it has: of a partition that it opens or lets go, it may not."""
    partitions = worker.snapshot().partitions
    return worker.state == "running" and bool(partitions) and all(each.state == "running" for each in partitions)


async def _beside(call: Callable[..., object], *arguments: Any) -> None:
    """Make a call that blocks on a thread of its own: asyncio's may all be held by handlers that were given up."""
    pool = BlockingPool(1)
    try:
        await pool.run(call, *arguments)
    finally:
        pool.close()
