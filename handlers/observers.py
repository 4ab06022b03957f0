"""Observers: who hears what becomes of a pipeline, without slowing or stopping it.

An :class:`ObserverDispatcher` takes what a worker tells and calls each observer on a daemon thread of that observer's
own. One thread for all of them was rejected: an observer that hangs would silence the others.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Context, Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeAlias

from ..state.clock import Clock, SystemClock
from ..state.context import ExecutionContext, checked_cost, sum_costs
from ..state.errors import ConfigError, RowmillError
from .budget import Budget
from .options import check_count, check_seconds
from .runtime import Event
from .stage import Stage
from .stage_counts import StageCounts

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)

QUEUE = 1_000
"""Calls that may wait for one observer."""

CLOSE_SECONDS = 5.0
"""How long :meth:`ObserverDispatcher.close` waits for observers to hear the rest."""

_LINE_CHARACTERS = 500
_CALLBACKS = (
    "on_pipeline_start", "on_stage_start", "on_stage_complete", "on_stage_error", "on_pipeline_complete",
    "on_pipeline_error", "on_progress_update",
)  # fmt: skip
_WIDE = Context(prec=400)  # products of any amounts that checked_cost lets in are exact

Call: TypeAlias = "Callable[[ExecutionObserver], object]"


class RowFailure(Exception):  # noqa: N818 - it is handed to observers and never raised
    """Why a row was given up: what :meth:`ExecutionObserver.on_stage_error` gets.

    Attributes:
        stage: the stage's full name: ``router/score`` for a stage inside an element.
        kind: the error's class name, or a short stable name for errors that rowmill found itself.
        message: what the error said.
        topic, partition, offset: where the row came from.
        attempts: how often it was tried.
        then: what became of it: ``dead_letter`` or ``skip``.
    """

    def __init__(
        self,
        stage: str,
        kind: str,
        message: str,
        *,
        topic: str = "",
        partition: int = -1,
        offset: int = -1,
        attempts: int = 1,
        then: str = "dead_letter",
    ) -> None:
        super().__init__(f"{kind}: {message}")
        self.stage = stage
        self.kind = kind
        self.message = message
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.attempts = attempts
        self.then = then

    @classmethod
    def from_event(cls, event: Event) -> RowFailure:
        """The failure that a ``row_failed`` event tells of."""
        told = event.detail
        return cls(
            event.subject,
            str(told.get("type", "")),
            str(told.get("message", "")),
            topic=str(told.get("topic", "")),
            partition=int(told.get("partition", -1)),
            offset=int(told.get("offset", -1)),
            attempts=int(told.get("attempts", 1)),
            then=str(told.get("then", "dead_letter")),
        )

    @property
    def row(self) -> str:
        """``topic/partition/offset``."""
        return f"{self.topic}/{self.partition}/{self.offset}"


class ExecutionObserver:
    """Hears what becomes of a pipeline. Inherit from it, and override what you want to hear of.

    In each worker an observer is called on a thread of its own, one call after the other, in the order of what
    happened. It may take its time: rows do not wait. Behind a slow observer up to 1,000 calls wait, of progress only
    the newest; failures of rows beyond that are dropped and counted, starts and ends are not. What it raises is logged
    once and counted, and stops nothing. Whatever belongs to an event loop must be reached with
    ``loop.call_soon_threadsafe``.

    Rows stream through all stages at once. So the stages start, in order, when the worker begins, and complete, in
    order, when it has ended without an error.

    ``context`` is a copy that nobody changes any more. It tells what is committed, in the partitions that this worker
    has, since the session began.
    """

    def on_pipeline_start(self, pipeline: Any, context: ExecutionContext) -> None:
        """A worker begins with the pipeline: the first call."""

    def on_stage_start(self, stage: Stage, context: ExecutionContext) -> None:
        """The stage is ready for rows."""

    def on_stage_complete(self, stage: Stage, context: ExecutionContext, result: StageCounts | None) -> None:
        """No more rows come. ``result`` is what happened in the stage; None where nobody counts."""

    def on_stage_error(self, stage: Stage, context: ExecutionContext, error: Exception) -> None:
        """A row was given up in the stage, and that is committed: it is a dead letter, or was skipped.

        Args:
            stage: the pipeline's stage; the element, for a stage inside of it. What fails outside of stages
                (``input``, ``output``, …) has a stand-in of that name.
            context: how far the worker is.
            error: a :class:`RowFailure`: which row, why, and what became of it.
        """

    def on_pipeline_complete(self, context: ExecutionContext, result: Any) -> None:
        """The worker has ended in order: the last call. ``result`` is what it, or the run, gives back; or None."""

    def on_pipeline_error(self, context: ExecutionContext, error: Exception) -> None:
        """The worker has failed: the last call, and the only one if it never began."""

    def on_progress_update(self, context: ExecutionContext) -> None:
        """Something was committed, some times a second at most."""


def checked_observer(observer: Any, setting: str) -> ExecutionObserver:
    """An observer that can be told.

    Args:
        observer: an ExecutionObserver, or whatever has all of its methods.
        setting: the argument's name as the caller wrote it, for the message.

    Raises:
        ConfigError: it is none, or a method of it is async.
    """
    if isinstance(observer, type):
        raise ConfigError(setting, observer, f"give an object: {observer.__name__}()")
    for name in _CALLBACKS:
        method = getattr(observer, name, None)
        if not callable(method):
            raise ConfigError(setting, observer, f"it has no {name}(); inherit from ExecutionObserver")
        if inspect.iscoroutinefunction(method):
            raise ConfigError(
                setting, observer, f"{name}() is async; make it a plain method: it has a thread for itself"
            )
    return observer  # type: ignore[no-any-return]


# --- telling ---------------------------------------------------------------------------------------------------


class _Progress:
    """A call that waits for its turn, and tells of what is newest when that has come."""

    __slots__ = ("context",)

    def __init__(self, context: ExecutionContext) -> None:
        self.context = context

    def __call__(self, observer: ExecutionObserver) -> None:
        observer.on_progress_update(self.context)


class _Mailbox:
    """One observer's calls: a bounded queue, and the thread that makes them one by one.

    Args:
        observer: who is called.
        name: what it is called in logs and counts.
        limit: calls that may wait.
        on_end: called when the thread ends.
    """

    def __init__(self, observer: ExecutionObserver, name: str, limit: int, on_end: Callable[[], None]) -> None:
        self.name = name
        self.errors = 0
        self.dropped = 0
        self.is_alive = False
        self._observer = observer
        self._limit = limit
        self._on_end = on_end
        self._calls: deque[Call] = deque()
        self._progress: _Progress | None = None
        self._changed = threading.Condition(threading.Lock())
        self._is_closing = False

    def put(self, call: Call, *, bounded: bool = False) -> None:
        """Let a call wait for its turn; a bounded one is dropped where too many wait."""
        with self._changed:
            if self._is_closing:
                return
            if not bounded or len(self._calls) < self._limit:
                self._append(call)
                return
            self.dropped += 1
            is_first = self.dropped == 1
        if is_first:
            log.warning("the observer %s is too slow: what it misses from now on is only counted", self.name)

    def put_progress(self, context: ExecutionContext) -> None:
        """Tell of this, and not of what waits to be told."""
        with self._changed:
            if self._is_closing:
                return
            if self._progress is not None:
                self._progress.context = context
                return
            self._progress = _Progress(context)
            self._append(self._progress)

    def _append(self, call: Call) -> None:
        self._calls.append(call)
        if not self.is_alive:
            self._start()
        elif len(self._calls) == 1:
            self._changed.notify()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"rowmill-observer-{self.name}", daemon=True)
        self.is_alive = True
        try:
            thread.start()
        except RuntimeError as error:  # the machine has no more threads; the rows need none of this
            self.is_alive, self._is_closing = False, True
            log.warning("the observer %s hears nothing: %s", self.name, error)

    def _run(self) -> None:
        try:
            while (call := self._next()) is not None:
                try:
                    call(self._observer)
                except BaseException as error:  # noqa: BLE001 - on this thread it can stop nobody else
                    self._blame(error)
        finally:
            self.is_alive = False
            self._on_end()

    def _next(self) -> Call | None:
        with self._changed:
            while not self._calls:
                if self._is_closing:
                    return None
                self._changed.wait()
            call = self._calls.popleft()
            if call is self._progress:
                self._progress = None
            return call

    def _blame(self, error: BaseException) -> None:
        self.errors += 1
        if self.errors == 1:
            log.warning("the observer %s failed; its next failures are only counted", self.name, exc_info=error)

    def close(self) -> None:
        """Take nothing more; the thread ends once all that waits is told."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def abandon(self) -> None:
        """Give up what waits: the thread ends after the call that it is in, if that ever ends."""
        with self._changed:
            self.dropped += sum(call is not self._progress for call in self._calls)
            self._calls.clear()
            self._progress = None


class ObserverDispatcher:
    """Tells observers what a worker does. Its caller never waits for them, and never hears of their errors.

    :meth:`hear` and :meth:`progress` may be called from any thread, the others from one.

    Args:
        observers: each is told once, however often it is among them.
        queue: calls that may wait for one observer (1,000).
        stage_counts: what happens in stages, by name, as a Runtime counts it: looked at when the worker has ended.
        session: the session's id, and
        worker: the worker's name, for the contexts that observers get.

    Raises:
        ConfigError: one is no observer, or ``queue`` is no number from 1.
    """

    def __init__(
        self,
        observers: Iterable[ExecutionObserver],
        *,
        queue: int = QUEUE,
        stage_counts: Mapping[str, StageCounts] | None = None,
        session: str = "",
        worker: str = "",
    ) -> None:
        check_count("ObserverDispatcher(queue=)", queue)
        self._ended = threading.Condition()
        self._mailboxes = [
            _Mailbox(observer, name, queue, self._one_ended) for name, observer in _named(observers).items()
        ]
        self._stage_counts = {} if stage_counts is None else stage_counts
        self._session = session
        self._worker = worker
        self._pipeline: Any = None
        self._stages: dict[str, Stage] = {}
        self._context = ExecutionContext()
        self._last_words: dict[str, Any] | None = None
        self._is_over = False

    # -- what happened ---------------------------------------------------------------------------------

    def started(self, pipeline: Any, context: ExecutionContext) -> None:
        """The worker begins with this pipeline: once, before anything else."""
        if self._pipeline is not None or self._is_over:
            return
        self._pipeline = pipeline
        self._stages = {stage.name: stage for stage in pipeline.stages}
        taken = self._take(context)
        self._tell(lambda observer: observer.on_pipeline_start(pipeline, taken))
        for stage in self._stages.values():
            self._tell(partial(_stage_starts, stage, taken))

    def progress(self, context: ExecutionContext) -> None:
        """How far it is now. The context is copied: it may go on changing."""
        if self._is_over or not self._mailboxes:
            return
        taken = self._take(context)
        for mailbox in self._mailboxes:
            mailbox.put_progress(taken)

    def hear(self, event: Event) -> None:
        """A listener of a Runtime: rows that fail, and how the worker ends, for the case that nobody else says it."""
        if event.kind == "row_failed":
            if not self._is_over:
                self._tell(partial(self._row_failed, event), bounded=True)
        elif event.kind == "worker_stopped":
            self._last_words = event.detail

    def completed(self, context: ExecutionContext, result: Any = None) -> None:
        """It has ended in order. Nothing is told after this."""
        if self._is_over:
            return
        self._is_over = True
        taken = self._take(context)
        counts = dict(self._stage_counts)
        for stage in self._stages.values():
            found = counts.get(stage.name)
            self._tell(partial(_stage_completes, stage, taken, None if found is None else replace(found)))
        self._tell(lambda observer: observer.on_pipeline_complete(taken, result))

    def failed(self, context: ExecutionContext, error: BaseException) -> None:
        """It has failed. Nothing is told after this."""
        if self._is_over:
            return
        self._is_over = True
        taken, told = self._take(context), _as_exception(error)
        self._tell(lambda observer: observer.on_pipeline_error(taken, told))

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Let the observers hear the rest, for so long at most. One that hangs is left behind on its thread.

        Blocks: on an event loop call it with ``asyncio.to_thread``. If neither :meth:`completed` nor :meth:`failed`
        was called, observers hear what the worker itself said of its end.

        Args:
            timeout: seconds, for all observers together.
        """
        self._end_by_itself()
        for mailbox in self._mailboxes:
            mailbox.close()
        with self._ended:
            self._ended.wait_for(lambda: not self._alive, timeout)
            late = self._alive
        for mailbox in late:
            mailbox.abandon()
        if late:
            names = ", ".join(mailbox.name for mailbox in late)
            log.warning("left behind after %g s, for they did not come to an end: observers %s", timeout, names)

    # -- what became of telling it ---------------------------------------------------------------------

    @property
    def errors(self) -> dict[str, int]:
        """How often observers raised, by their names; without those that never did."""
        return {mailbox.name: mailbox.errors for mailbox in self._mailboxes if mailbox.errors}

    @property
    def dropped(self) -> dict[str, int]:
        """How many calls observers missed, by their names; without those that missed none."""
        return {mailbox.name: mailbox.dropped for mailbox in self._mailboxes if mailbox.dropped}

    # -- inside ----------------------------------------------------------------------------------------

    @property
    def _alive(self) -> list[_Mailbox]:
        return [mailbox for mailbox in self._mailboxes if mailbox.is_alive]

    def _one_ended(self) -> None:
        with self._ended:
            self._ended.notify_all()

    def _tell(self, call: Call, *, bounded: bool = False) -> None:
        for mailbox in self._mailboxes:
            mailbox.put(call, bounded=bounded)

    def _take(self, context: ExecutionContext) -> ExecutionContext:
        """A copy that stays as it is, with the names that logs show."""
        taken = copy(context)
        taken.observers, taken.observer_dispatcher = [], None
        taken.pipeline_name = taken.pipeline_name or str(getattr(self._pipeline, "name", ""))
        taken.session_name = taken.session_name or self._session
        taken.worker_name = taken.worker_name or self._worker
        self._context = taken
        return taken

    def _row_failed(self, event: Event, observer: ExecutionObserver) -> None:
        """On the observer's thread: the caller's pays for nothing but the event's place in the queue."""
        observer.on_stage_error(self._stage(event.subject), self._context, RowFailure.from_event(event))

    def _stage(self, name: str) -> Stage:
        stage = self._stages.get(name) or self._stages.get(name.partition("/")[0])
        return stage or _stand_in(name)

    def _end_by_itself(self) -> None:
        if self._pipeline is None or self._is_over:
            return
        said = self._last_words or {"reason": "failed", "message": "the worker ended without saying why"}
        if said.get("reason") == "failed":
            self.failed(self._context, RowmillError(str(said.get("message") or "the worker failed")))
        else:
            self.completed(self._context)


def _named(observers: Iterable[Any]) -> dict[str, ExecutionObserver]:
    """Each observer once, by its class's name; further ones of a class are numbered."""
    named: dict[str, ExecutionObserver] = {}
    for given in observers:
        observer = checked_observer(given, "ObserverDispatcher(observers)")
        if any(known is observer for known in named.values()):
            continue
        name, number = type(observer).__name__, 1
        while (f"{name}-{number}" if number > 1 else name) in named:
            number += 1
        named[f"{name}-{number}" if number > 1 else name] = observer
    return named


def _stage_starts(stage: Stage, context: ExecutionContext, observer: ExecutionObserver) -> None:
    observer.on_stage_start(stage, context)


def _stage_completes(
    stage: Stage, context: ExecutionContext, result: StageCounts | None, observer: ExecutionObserver
) -> None:
    observer.on_stage_complete(stage, context, result)


def _as_exception(error: BaseException) -> Exception:
    """Observers are told of an Exception: a cancellation or Ctrl-C comes as the cause of one."""
    if isinstance(error, Exception):
        return error
    told = RowmillError(f"ended by {type(error).__name__}")
    told.__cause__ = error
    return told


def _stand_in(name: str) -> Stage:
    """Stands for what is done with rows outside of the pipeline's stages."""
    return Stage(
        name=name,
        handler=_same,
        call=_same,
        batch=None,
        frame=False,
        timeout=None,
        concurrency=1,
        is_async=False,
        takes_context=False,
    )


def _same(row: Any) -> Any:
    return row


# --- logs ------------------------------------------------------------------------------------------------------


class LoggingObserver(ExecutionObserver):
    """One line of log per event. Rows that fail are warnings, a worker that fails is an error.

    Each record has the fields ``event``, ``pipeline``, ``session``, ``worker``, ``topic``, ``partition`` and
    ``offset`` (None where there is none), and those of its event, for formatters that write JSON.

    Args:
        logger: where to. Default: ``rowmill.observer``.
        level: of ordinary events, as a number or a name (INFO).
        every: seconds from one line about progress to the next (10); 0 for all.
        clock: time; default: the machine's.

    Raises:
        ConfigError: there is no such level, or ``every`` is no number from 0.
    """

    def __init__(
        self,
        logger: logging.Logger | None = None,
        level: int | str = logging.INFO,
        *,
        every: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        check_seconds("LoggingObserver(every=)", every, least_is_zero=True)
        self._logger = logger or logging.getLogger("rowmill.observer")
        self._level = _level(level)
        self._every = every
        self._clock = clock or SystemClock()
        self._last_at = float("-inf")
        self._last_rows = 0

    def on_pipeline_start(self, pipeline: Any, context: ExecutionContext) -> None:
        """``pipeline reviews: started (stages clean, score)``."""
        self._last_at, self._last_rows = self._clock.monotonic(), context.completed_rows
        stages = [stage.name for stage in pipeline.stages]
        self._say(
            self._level, "pipeline_started", context, "pipeline %s: started (stages %s)",
            context.pipeline_name, ", ".join(stages), stages=stages,
        )  # fmt: skip

    def on_stage_start(self, stage: Stage, context: ExecutionContext) -> None:
        """``stage score: started``."""
        self._say(self._level, "stage_started", context, "stage %s: started", stage.name, stage=stage.name)

    def on_stage_complete(self, stage: Stage, context: ExecutionContext, result: StageCounts | None) -> None:
        """``stage score: completed (120 calls, 3 retries, 1 failures)``."""
        counts = {name: value for name, value in (result.to_dict() if result is not None else {}).items() if value}
        figures = ", ".join(f"{_figure(value)} {name}" for name, value in counts.items())
        self._say(
            self._level, "stage_completed", context, "stage %s: completed%s",
            stage.name, f" ({figures})" if figures else "", stage=stage.name, counts=counts,
        )  # fmt: skip

    def on_stage_error(self, stage: Stage, context: ExecutionContext, error: Exception) -> None:
        """``stage score: ValueError: no text (row reviews/0/12, attempt 3, dead_letter)``."""
        if not isinstance(error, RowFailure):
            error = RowFailure(stage.name, type(error).__name__, str(error))
        self._say(
            max(self._level, logging.WARNING), "row_failed", context, "stage %s: %s: %s (row %s, attempt %d, %s)",
            error.stage, error.kind, _line(error.message), error.row, error.attempts, error.then,
            stage=error.stage, type=error.kind, topic=error.topic, partition=error.partition, offset=error.offset,
            attempts=error.attempts, then=error.then,
        )  # fmt: skip

    def on_progress_update(self, context: ExecutionContext) -> None:
        """``pipeline reviews: 1,200 of 5,000 rows (24.0 %), 3 failed, cost 0.42, 240 rows/s``."""
        now, rows = self._clock.monotonic(), context.completed_rows
        seconds = now - self._last_at
        if seconds < self._every:
            return
        rate = max(0, rows - self._last_rows) / seconds if seconds else 0.0
        self._last_at, self._last_rows = now, rows
        self._say(
            self._level, "progress", context, "pipeline %s: %s, %.0f rows/s",
            context.pipeline_name, _so_far(context), rate, **_counts(context),
        )  # fmt: skip

    def on_pipeline_complete(self, context: ExecutionContext, result: Any) -> None:  # noqa: ARG002 - the context has it
        """``pipeline reviews: completed, 5,000 of 5,000 rows (100.0 %), 3 failed, cost 0.42``; or ``ended``, early."""
        how = "completed" if context.completed_rows >= context.total_rows else "ended"
        self._say(
            self._level, f"pipeline_{how}", context, "pipeline %s: %s, %s",
            context.pipeline_name, how, _so_far(context), **_counts(context),
        )  # fmt: skip

    def on_pipeline_error(self, context: ExecutionContext, error: Exception) -> None:
        """``pipeline reviews: failed, 1,200 of 5,000 rows (24.0 %): StalledError: …``."""
        self._say(
            max(self._level, logging.ERROR), "pipeline_failed", context, "pipeline %s: failed, %s: %s: %s",
            context.pipeline_name, _so_far(context), type(error).__name__, _line(str(error)),
            type=type(error).__name__, **_counts(context),
        )  # fmt: skip

    def _say(self, level: int, event: str, context: ExecutionContext, message: str, *figures: Any, **more: Any) -> None:
        if not self._logger.isEnabledFor(level):
            return
        self._logger.log(level, message, *figures, extra={"event": event, **_about(context), **more})


def _about(context: ExecutionContext) -> dict[str, Any]:
    """What every record tells: formatters may rely on these fields."""
    return {
        "pipeline": context.pipeline_name,
        "session": context.session_name or str(context.session_id),
        "worker": context.worker_name,
        "topic": None,
        "partition": None,
        "offset": None,
    }


def _level(level: Any) -> int:
    known = logging.getLevelNamesMapping()
    if isinstance(level, str) and level.upper() in known:
        return known[level.upper()]
    if isinstance(level, bool) or not isinstance(level, int):
        raise ConfigError("LoggingObserver(level=)", level, "give logging.INFO, or a name such as 'INFO'")
    return level


def _line(text: str) -> str:
    """On one line, and not too long: what handlers raise may say anything."""
    cut = text if len(text) <= _LINE_CHARACTERS else text[:_LINE_CHARACTERS] + "…"
    return "".join(character if character.isprintable() else " " for character in cut)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _counts(context: ExecutionContext) -> dict[str, Any]:
    """How far it is, as fields of a log record."""
    return {
        "rows": context.completed_rows,
        "total_rows": context.total_rows,
        "failed_rows": context.failed_rows,
        "skipped_rows": context.skipped_rows,
        "cost": f"{context.accumulated_cost:f}",
        "tokens": context.accumulated_tokens,
    }


def _so_far(context: ExecutionContext) -> str:
    """How far it is, for people. Percents are rounded down: 100 % is all."""
    parts = [f"{context.completed_rows:,} rows"]
    if context.total_rows:
        share = int(context.get_progress() * 10) / 10
        parts = [f"{context.completed_rows:,} of {context.total_rows:,} rows ({share:.1f} %)"]
    return ", ".join([*parts, *_trouble(context)])


def _trouble(context: ExecutionContext) -> list[str]:
    parts = [f"{context.failed_rows:,} failed"] if context.failed_rows else []
    parts += [f"{context.skipped_rows:,} skipped"] if context.skipped_rows else []
    return [*parts, f"cost {context.accumulated_cost:f}"] if context.accumulated_cost else parts


# --- a bar -----------------------------------------------------------------------------------------------------


class ProgressBarObserver(ExecutionObserver):
    """A progress bar on a terminal: rows committed over the rows that there are, as far as that is known.

    Args:
        title: stands before the bar. Default: the pipeline's name.
        shown: True or False to force; None shows it on a terminal only.
        file: where it is drawn. Default: standard error.
    """

    def __init__(self, title: str | None = None, *, shown: bool | None = None, file: TextIO | None = None) -> None:
        self._title = title
        self._shown = shown
        self._file = file
        self._bar: tqdm[NoReturn] | None = None

    def on_pipeline_start(self, pipeline: Any, context: ExecutionContext) -> None:  # noqa: ARG002 - the context has it
        """Begin a bar."""
        self._close()
        file = self._file or sys.stderr
        if file.isatty() if self._shown is None else self._shown:
            self._bar = open_bar(self._title or context.pipeline_name, file, done=context.completed_rows)
            self._draw(context)

    def on_progress_update(self, context: ExecutionContext) -> None:
        """Move it."""
        self._draw(context)

    def on_pipeline_complete(self, context: ExecutionContext, result: Any) -> None:  # noqa: ARG002 - see the base
        """Leave it behind as it is at the end."""
        self._draw(context)
        self._close()

    def on_pipeline_error(self, context: ExecutionContext, error: Exception) -> None:  # noqa: ARG002 - others tell it
        """Leave it behind where it stopped."""
        self._draw(context)
        self._close()

    def _draw(self, context: ExecutionContext) -> None:
        bar = self._bar
        if bar is None:
            return
        if context.total_rows:
            bar.total = context.total_rows
        bar.set_postfix_str(", ".join(_trouble(context)), refresh=False)
        bar.update(context.completed_rows - bar.n)

    def _close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


def open_bar(title: str, file: TextIO, *, done: int = 0) -> tqdm[NoReturn]:
    """A bar of rows, the same everywhere.

    Args:
        title: stands before it.
        file: where it is drawn.
        done: rows that were done before, which do not count for the speed.
    """
    from tqdm import tqdm

    return tqdm(desc=title, unit=" rows", unit_scale=True, dynamic_ncols=True, mininterval=0.1, file=file, initial=done)


# --- money -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CostReport:
    """What was spent, against what may be.

    Attributes:
        spent: money, exact: the committed cost.
        tokens: tokens.
        rows: rows that are done.
        limit: the budget; None without one.
        warned: the fractions of the budget that were warned of.
    """

    spent: Decimal = Decimal(0)
    tokens: int = 0
    rows: int = 0
    limit: Decimal | None = None
    warned: tuple[Decimal, ...] = ()

    @property
    def left(self) -> Decimal | None:
        """What may still be spent, never below 0; None without a budget."""
        return None if self.limit is None else max(Decimal(0), sum_costs(self.limit, self.spent.copy_negate()))

    @property
    def fraction(self) -> Decimal | None:
        """The part of the budget that is spent, rounded down to four digits; None without a budget."""
        if self.limit is None:
            return None
        return _WIDE.divide(self.spent, self.limit).quantize(Decimal("0.0001"), ROUND_DOWN, _WIDE)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; money is text, so that it stays exact."""
        money = {"spent": self.spent, "limit": self.limit, "left": self.left, "fraction": self.fraction}
        return {
            **{name: None if amount is None else f"{amount:f}" for name, amount in money.items()},
            "tokens": self.tokens,
            "rows": self.rows,
            "warned": [f"{fraction:f}" for fraction in self.warned],
        }

    def __str__(self) -> str:
        """``0.42 of 5.00 (8.40 %), 1,234 tokens, 100 rows``."""
        share = "" if self.fraction is None else f" of {self.limit:f} ({self.fraction * 100:.2f} %)"
        return f"{self.spent:f}{share}, {self.tokens:,} tokens, {self.rows:,} rows"


class CostTrackingObserver(ExecutionObserver):
    """Warns once when each threshold of the budget is crossed, and says at the end what was spent.

    It counts what is committed in the partitions of its own worker. The budget itself is kept, and warns, exactly,
    over all workers, with or without this observer: see ``Budget(warn=)``.

    Args:
        warning_threshold: a fraction of the budget, above 0 up to 1, or several (0.75).
        budget: a Budget or its amount, no float. Default: the pipeline's; without one nothing is warned of.
        logger: where to. Default: ``rowmill.observer``.

    Raises:
        ConfigError: a threshold is no such fraction, or the budget is no amount above 0.
    """

    def __init__(
        self,
        warning_threshold: float | Decimal | Sequence[float | Decimal] = 0.75,
        budget: Budget | Decimal | int | str | None = None,
        *,
        logger: logging.Logger | None = None,
    ) -> None:
        self.thresholds = _thresholds(warning_threshold)
        self._given = _limit(budget)
        self._logger = logger or logging.getLogger("rowmill.observer")
        self._report = CostReport(limit=self._given)
        self._about: dict[str, Any] = {}

    def report(self) -> CostReport:
        """How it stands; from any thread."""
        return self._report

    def on_pipeline_start(self, pipeline: Any, context: ExecutionContext) -> None:
        """Begin anew, with the pipeline's budget where no other was given."""
        limit = self._given if self._given is not None else getattr(getattr(pipeline, "budget", None), "limit", None)
        self._report = CostReport(limit=limit)
        self._look(context)

    def on_stage_complete(self, stage: Stage, context: ExecutionContext, result: StageCounts | None) -> None:  # noqa: ARG002
        """Look at what was spent."""
        self._look(context)

    def on_progress_update(self, context: ExecutionContext) -> None:
        """Look at what was spent."""
        self._look(context)

    def on_pipeline_complete(self, context: ExecutionContext, result: Any) -> None:  # noqa: ARG002 - see the base
        """Say what was spent."""
        self._sum_up(context)

    def on_pipeline_error(self, context: ExecutionContext, error: Exception) -> None:  # noqa: ARG002 - money only
        """Say what was spent until then."""
        self._sum_up(context)

    def on_warning(self, threshold: Decimal, report: CostReport) -> None:
        """A threshold was crossed: a line of log. Override it to be told in another way."""
        share = f"{(threshold * 100).normalize():f}"
        extra = {"event": "cost_warning", "threshold": f"{threshold:f}", **self._about, **report.to_dict()}
        self._logger.warning("%s %% of the budget is spent: %s", share, report, extra=extra)

    def _look(self, context: ExecutionContext) -> None:
        limit, warned, spent = self._report.limit, self._report.warned, context.accumulated_cost
        crossed = [
            fraction
            for fraction in self.thresholds
            if limit is not None and fraction not in warned and spent >= _WIDE.multiply(limit, fraction)
        ]
        tokens, rows = context.accumulated_tokens, context.completed_rows
        self._about = _about(context)
        self._report = CostReport(spent, tokens, rows, limit, (*warned, *crossed))
        for fraction in crossed:
            self.on_warning(fraction, self._report)

    def _sum_up(self, context: ExecutionContext) -> None:
        self._look(context)
        extra = {"event": "cost_summary", **self._about, **self._report.to_dict()}
        self._logger.info("spent: %s", self._report, extra=extra)


def _thresholds(given: Any) -> tuple[Decimal, ...]:
    """Fractions in order, each once."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    found = set()
    for value in given if several else [given]:
        # As it is written: 0.1 means a tenth, not the nearest binary number.
        is_number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
        fraction = Decimal(str(value)) if is_number else Decimal(0)
        if not fraction.is_finite() or not 0 < fraction <= 1:
            raise ConfigError(
                "CostTrackingObserver(warning_threshold=)",
                given,
                "give a fraction above 0, at most 1, or a list of them",
            )
        found.add(fraction)
    return tuple(sorted(found))


def _limit(budget: Any) -> Decimal | None:
    if budget is None or isinstance(budget, Budget):
        return None if budget is None else budget.limit
    limit = checked_cost(budget, "CostTrackingObserver(budget=)")
    if not limit:
        raise ConfigError("CostTrackingObserver(budget=)", budget, "give an amount above 0")
    return limit
