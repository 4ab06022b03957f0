"""A worker's ties to those who steer and watch it: the control topic, the events topic, and observers.

The data path knows nothing of them. Where they fail, a warning says so once and rows go on; only what is wanted of the
session has to be known before the first row, or a paused session would run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..handlers.chain import with_inner
from ..handlers.observers import ExecutionObserver, ObserverDispatcher
from ..handlers.runtime import Event, Runtime
from ..state.artifact_stores import FolderArtifacts
from ..state.clock import Clock
from ..state.context import ExecutionContext
from ..state.errors import RowmillError
from ..state.execution import Wanted
from ..state.model import TopicPartition
from .brokers.base import Broker
from .control import ControlTopic, ControlWatch, note_ends, note_failure, register
from .deadlines import to_the_end
from .errors import TopicError
from .events import EventPublisher
from .session import Session
from .session_records import SessionRecord, here
from .session_refs import short_name
from .snapshots import WorkerSnapshot

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .worker import Worker

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5
_CLOSE_SECONDS = 2.0


class Steering:
    """One worker's place on the control topic and the events topic.

    Args:
        broker: a started one.
        session: whose.
        worker: the worker's name.
        about: what the worker tells of itself in its first event.
        describe: what the session is made of, as this worker knows it.
        obey: called with the session's record, now and whenever it changes.
        snapshot: how the worker stands.
        runtime: tells the events.
        clock: time.
        timeout: seconds that each call to the broker may take.
        create: whether the two topics may be made.
    """

    def __init__(
        self,
        broker: Broker,
        session: Session,
        worker: str,
        *,
        about: Callable[[], dict[str, Any]],
        describe: Callable[[], SessionRecord],
        obey: Callable[[SessionRecord], None],
        snapshot: Callable[[], WorkerSnapshot],
        runtime: Runtime,
        clock: Clock,
        timeout: float,
        create: bool,
    ) -> None:
        self._group = session.group
        self._about = about
        self._describe = describe
        self._obey = obey
        self._snapshot = snapshot
        self._runtime = runtime
        self._control = ControlTopic(broker, clock=clock, timeout=timeout, create=create)
        self._watch = ControlWatch(broker, session.group, self._heard, clock=clock, timeout=timeout)
        self._events = EventPublisher(broker, session, worker, snapshot, clock=clock, create=create, timeout=timeout)
        self._tasks: set[asyncio.Task[None]] = set()
        self._notes: set[asyncio.Task[None]] = set()
        """Of these, what others need to know after the end."""

    @property
    def events_dropped(self) -> int:
        """Events that were too many for the topic, or did not get there."""
        return self._events.dropped

    async def start(self) -> None:
        """Take part in the session: what is wanted of it is obeyed when this returns.

        Raises:
            BrokerError: the broker does not answer. A topic that may not be made or read is only warned of.
        """
        self._runtime.listeners.append(self._events.hear)
        await self._events.start()
        try:
            record = await register(self._control, self._describe())
            self._obey(record)
            if record.wanted is Wanted.PAUSE:
                log.warning(
                    "session %s is paused: its rows wait until somebody resumes it (rowmill resume %s)",
                    short_name(self._group),
                    short_name(self._group),
                )
            present = await self._watch.start()
            if present is not None:
                self._obey(present)
        except TopicError as error:
            log.warning("this worker cannot be paused or cancelled from outside: %s", error)
        else:
            self._spawn(self._watch.run())
        self._runtime.tell(Event("worker_started", "", self._about()))

    def _heard(self, record: SessionRecord | None) -> None:
        if record is not None:
            self._obey(record)

    def _spawn(self, work: Any, into: set[asyncio.Task[None]] | None = None) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        if into is not None:
            into.add(task)
            task.add_done_callback(into.discard)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("%s: the control topic: %s", self._group, task.exception())

    def ends_at(self, ends: Mapping[TopicPartition, int]) -> None:
        """Note where the session is complete, for whoever looks at it later."""
        self._spawn(note_ends(self._control, self._group, ends), self._notes)

    async def close(self, failure: str) -> None:
        """Note why the worker failed, if it did, send what is queued, and let go, within seconds."""
        if failure:
            with contextlib.suppress(RowmillError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await note_failure(self._control, self._group, failure)
        if self._notes:
            await asyncio.wait(self._notes, timeout=_CLOSE_SECONDS)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:  # they let go of their producers, and the broker is closed after this
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
        await to_the_end(self._watch.close())
        await self._events.close(self._snapshot())
        with contextlib.suppress(ValueError):
            self._runtime.listeners.remove(self._events.hear)


class Audience:
    """A worker's observers: told from here, called on a thread of their own.

    Args:
        pipeline: what they are told of.
        observers: whoever wants to hear.
        context: the worker's context, made anew at each call.
        runtime: tells of failures.
        clock: time.
        session, worker: their names.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        observers: Sequence[ExecutionObserver],
        context: Callable[[], ExecutionContext],
        runtime: Runtime,
        clock: Clock,
        session: str,
        worker: str,
    ) -> None:
        self._pipeline = pipeline
        self._context = context
        self._runtime = runtime
        self._clock = clock
        self.dispatcher = ObserverDispatcher(
            observers, stage_counts=runtime.stage_counts, session=session, worker=worker
        )
        self._telling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The pipeline begins."""
        self._runtime.listeners.append(self.dispatcher.hear)
        self.dispatcher.started(self._pipeline, self._context())
        self._telling = asyncio.create_task(self._tell_progress())

    async def _tell_progress(self) -> None:
        while True:
            await self._clock.sleep(_PROGRESS_SECONDS)
            self.dispatcher.progress(self._context())

    async def close(self, result: Any, error: BaseException | None) -> None:
        """It is over: with a result, or with an error."""
        if self._telling is not None:
            self._telling.cancel()
        context = self._context()
        self.dispatcher.progress(context)
        if error is None:
            self.dispatcher.completed(context, result)
        else:
            self.dispatcher.failed(context, error)
        await asyncio.to_thread(self.dispatcher.close, _CLOSE_SECONDS)
        with contextlib.suppress(ValueError):
            self._runtime.listeners.remove(self.dispatcher.hear)


def about(worker: Worker) -> dict[str, Any]:
    """What a worker tells of itself."""
    pipeline, session = worker.pipeline, worker.session
    return {
        "version": version("rowmill"),
        "stages": [stage.name for stage in pipeline.stages],
        "sources": [session.source(topic) for topic in pipeline.sources],
        "sink": session.output(pipeline.sink),
        "dead_letters": session.dead_letters,
        "guarantee": worker.options.guarantee,
        "ordering": pipeline.ordering,
        "commit_interval": worker.options.commit_interval,
    }


def describe(worker: Worker, state_folder: Path) -> SessionRecord:
    """A worker's session, as the worker knows it."""
    pipeline, session = worker.pipeline, worker.session
    artifacts = pipeline.artifact_store(session.group) if isinstance(pipeline.artifacts, str) else None
    return SessionRecord(
        group=session.group,
        pipeline=pipeline.name,
        session=session.id,
        owns_source=session.owns_source,
        sources=tuple(session.source(topic) for topic in pipeline.sources),
        sink=session.output(pipeline.sink),
        dead_letters=session.dead_letters,
        tables=tuple(pipeline.tables),
        stages=tuple(stage.name for stage in pipeline.stages),
        has_budget=pipeline.budget is not None,
        state_dir=f"{platform.node()}:{state_folder.resolve()}" if _keeps_state(pipeline) else "",
        artifacts=f"{platform.node()}:{artifacts.root}" if isinstance(artifacts, FolderArtifacts) else "",
        is_bounded=worker.is_bounded,
        changed_ms=worker.stats.started_ms,
        changed_by=f"worker {worker.name} on {here()}",
        started_ms=worker.stats.started_ms,
    )


def _keeps_state(pipeline: Pipeline) -> bool:
    """Whether its workers have tables or cached answers on their disks."""
    return bool(pipeline.tables) or any(stage.cache is not None for stage in with_inner(pipeline.stages))
