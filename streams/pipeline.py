"""The pipeline: a named chain of stages from source topics to a sink topic. What users write and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload

from ..handlers.budget import Budget
from ..handlers.capture import captured, is_installed
from ..handlers.chain import Chain
from ..handlers.context import RowContext, key_bytes
from ..handlers.executors import BlockingPool
from ..handlers.observers import ExecutionObserver, checked_observer
from ..handlers.outcomes import Failure, Outcome
from ..handlers.runtime import Runtime
from ..handlers.schema import make_validator
from ..handlers.stage import Handler, Stage, StageOptions, check_option_names, make_stage
from ..state.artifact_stores import open_artifacts
from ..state.artifacts import ARTIFACT_LIMIT, SHARED_SCOPE, ArtifactStore
from ..state.codec import MAX_DEPTH
from ..state.errors import ConfigError, RowmillError
from ..state.memory import MemoryStore
from ..state.model import RESERVED_PREFIX, Row
from ..state.table import TableSpec
from ..state.tables import PartitionTables
from .session import check_name, check_pipeline, check_topic

if TYPE_CHECKING:
    import pandas as pd  # noqa: TID251 - for the type only

    from .options import WorkerOptions
    from .results import ExecutionResult
    from .streaming import ChunkStream

LOG_CHARACTERS = 4_096
"""Of a row's log, as many as a dead letter's headers have room for."""

H = TypeVar("H", bound=Handler)

MAX_ROW_BYTES = 1_000_000
"""Longest value accepted as a row: what one Kafka message may hold by default."""


class Pipeline:
    """A named chain of stages. Build it once, run it anywhere: here, on the embedded broker, on Kafka.

    Args:
        name: 1 to 80 letters, digits, ``_`` and ``-``; not ``rowmill``. The consumer group is ``rowmill.<name>``.
        source: the topic, or topics, that rows come from. Default: the pipeline's name.
        sink: the topic that results go to. Default: ``<name>.results``.
        start: where the live session begins when it has never committed: ``earliest``, ``latest``, or a datetime
            with a time zone.
        tombstones: what becomes of rows with a null value: ``dead_letter``, or ``forward`` them to the sink (for
            pipelines on compacted topics).
        keys: ``text`` (keys are UTF-8; others become dead letters) or ``bytes`` (keys are anything).
        ordering: which rows wait for each other. ``key``: those of one key, as they came (rows without a key wait
            for none); ``partition``: all of a partition, one after the other; ``none``. Chains of plain functions
            keep the order of the partition in any case.
        dead_letter_headers: ``rowmill`` (names that begin with ``rowmill.error.``), or ``connect``: Kafka Connect's
            (``__connect.errors.…``) besides, for tools that know those.
        budget: what a session may spend, over all its workers and restarts; see :class:`~rowmill.Budget`.
        input, output: schemas of rows and results: a dataclass, a TypedDict, or a pydantic model's class. What does not
            fit is a dead letter that names the field.
        artifacts: where values go that are too large for a message: a folder, or an ArtifactStore. Texts in results
            beyond ``artifact_limit``, and bytes, are replaced by references to them.
        artifact_limit: longest text, in bytes of UTF-8, that stays in a result (65,536).
        capture_logs: whether dead letters show what was logged about their row: True, or the characters to keep
            (True: 4,096).
        max_row_bytes: longest value accepted as a row.
        max_depth: deepest nesting accepted in a row, up to 200.

    Raises:
        ConfigError: naming the option, what was given, and what to give instead.
    """

    def __init__(
        self,
        name: str,
        *,
        source: str | Sequence[str] | None = None,
        sink: str | None = None,
        start: Literal["earliest", "latest"] | datetime = "earliest",
        tombstones: Literal["dead_letter", "forward"] = "dead_letter",
        keys: Literal["text", "bytes"] = "text",
        ordering: Literal["key", "partition", "none"] = "key",
        dead_letter_headers: Literal["rowmill", "connect"] = "rowmill",
        budget: Budget | None = None,
        input: Any = None,  # noqa: A002 - the word users look for
        output: Any = None,
        artifacts: str | ArtifactStore | None = None,
        artifact_limit: int = ARTIFACT_LIMIT,
        capture_logs: bool | int = False,
        max_row_bytes: int = MAX_ROW_BYTES,
        max_depth: int = MAX_DEPTH,
    ) -> None:
        self.name = _name(name)
        self.sources = _sources(name if source is None else source)
        self.sink = check_topic("Pipeline(sink=)", f"{name}.results" if sink is None else sink)
        if self.sink in self.sources:
            raise ConfigError("Pipeline(sink=)", sink, "it is a source as well: results would come in again for ever")
        if f"{name}.dlq" in self.sources:
            raise ConfigError(
                "Pipeline(source=)",
                source,
                "its own dead letters would come in again for ever; give the pipeline another name",
            )
        if self.sink == f"{name}.dlq":
            raise ConfigError("Pipeline(sink=)", sink, "this is where its dead letters go; choose another topic")
        self.start = _start(start)
        self.tombstones = _one_of("tombstones", tombstones, ("dead_letter", "forward"))
        self.keys = _one_of("keys", keys, ("text", "bytes"))
        self.ordering = _one_of("ordering", ordering, ("key", "partition", "none"))
        self.dead_letter_headers = _one_of("dead_letter_headers", dead_letter_headers, ("rowmill", "connect"))
        if budget is not None and not isinstance(budget, Budget):
            raise ConfigError("Pipeline(budget=)", budget, "give a Budget('5.00')")
        self.budget = budget
        self.input = None if input is None else make_validator(input, side="input", setting="Pipeline(input=)")
        self.output = None if output is None else make_validator(output, side="result", setting="Pipeline(output=)")
        self.artifacts = _artifacts(artifacts)
        self.artifact_limit = _whole("artifact_limit", artifact_limit, 1, 1 << 30)
        self.kept_log = _kept_log(capture_logs)
        self.max_row_bytes = _whole("max_row_bytes", max_row_bytes, 1, 1 << 30)
        self.max_depth = _whole("max_depth", max_depth, 1, 200)
        self._stages: list[Stage] = []
        self._tables: dict[str, TableSpec] = {}
        self._observers: list[ExecutionObserver] = []

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order."""
        return tuple(self._stages)

    @overload
    def stage(self, handler: H) -> H: ...
    @overload
    def stage(self, handler: None = None, **options: Unpack[StageOptions]) -> Callable[[H], H]: ...
    def stage(self, handler: Any = None, **options: Any) -> Any:
        """Decorator: append a function as the next stage. It stays an ordinary function.

        Used bare (``@p.stage``) or with the options of :func:`~rowmill.handlers.stage.make_stage`.
        """
        if handler is not None:
            self.add(handler)
            return handler

        def decorate(function: H) -> H:
            self.add(function, **options)
            return function

        return decorate

    def add(self, handler: Handler | Stage, **options: Unpack[StageOptions]) -> Pipeline:
        """Append a handler, or a finished Stage, as the next stage; returns the pipeline, so that calls chain.

        The options are those of :func:`~rowmill.handlers.stage.make_stage`.

        Raises:
            ConfigError: there is no such option, or it is wrong, or another stage has the same name.
        """
        check_option_names(options)
        if isinstance(handler, Stage):
            for option, value in options.items():
                raise ConfigError(f"add({option}=)", value, "a finished Stage brings its own options")
            stage = handler
        else:
            stage = make_stage(handler, **options)
        Chain([*self._stages, stage])  # refuses a name that is taken
        self._stages.append(stage)
        return self

    def table(self, name: str, *, ttl: float | None = None) -> Pipeline:
        """Declare a table, for handlers to use as ``ctx.table(name)``; returns the pipeline.

        A table is kept per partition of the source: a row sees what rows of its own partition wrote. It lives in
        RocksDB on the worker's disk and in a compacted changelog topic, and moves with its partition.

        Args:
            name: 1 to 80 letters, digits, ``_`` and ``-``; it stands in the changelog, so keep it when code changes.
            ttl: seconds after which an entry is over, from the timestamp of the row that wrote it; None: never.

        Raises:
            ConfigError: an option is wrong, or the name is taken.
        """
        check_name("table(name)", name)
        if name in self._tables:
            raise ConfigError("table(name)", name, "another table has this name; give each its own")
        if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl < 1e10):
            raise ConfigError("table(ttl=)", ttl, "give seconds above 0, or None")
        self._tables[name] = TableSpec(name, None if ttl is None else max(1, int(ttl * 1000)))
        return self

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """The declared tables by name."""
        return self._tables

    def add_observer(self, observer: ExecutionObserver) -> Pipeline:
        """Have it told what becomes of the pipeline wherever it runs; returns the pipeline, so that calls chain.

        Each worker tells it on a thread of its own; see :class:`~rowmill.ExecutionObserver`.

        Raises:
            ConfigError: it is no observer, or a method of it is async.
        """
        self._observers.append(checked_observer(observer, "add_observer(observer)"))
        return self

    @property
    def observers(self) -> tuple[ExecutionObserver, ...]:
        """Whoever was added, in order."""
        return tuple(self._observers)

    def chain(self) -> Chain:
        """The compiled stages.

        Raises:
            ConfigError: there is no stage.
        """
        captures_all = bool(self.kept_log)
        captures = captures_all or is_installed()
        return Chain(
            [captured(stage) if captures and (captures_all or not stage.is_plain) else stage for stage in self._stages]
        )

    def process(self, row: Row, *, key: str | bytes | None = None) -> list[Row]:
        """One row through all stages, here and now, without any broker: for tests and for trying things out.

        Returns:
            Its results: none if it was dropped or skipped. Rows given to ``ctx.emit`` are not among them. Tables and
            caches are empty, and forgotten afterwards; a budget is not asked.

        Raises:
            RowmillError: the row failed, with the stage and the reason.
        """
        from .loops import run_blocking

        key_bytes(key)
        rows: list[Outcome] = [self._admitted(dict(row))]
        tables = PartitionTables(MemoryStore(), self._tables)

        async def run() -> None:
            pool = BlockingPool(1)
            runtime = Runtime(pool, artifacts=self.artifact_store())
            context = RowContext(
                self.sources[0], 0, 0, 0, key, (), "process", lambda _: tables.view(tables, 0), runtime
            )
            try:
                await self.chain().run(rows, [context], runtime)
            finally:
                await runtime.close()
                pool.close()

        run_blocking(run)
        outcome = rows[0]
        if isinstance(outcome, Failure):
            if outcome.then == "skip":
                return []
            raise RowmillError(f"stage {outcome.stage!r}: {outcome.kind}: {outcome.message}") from outcome.error
        results = outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]
        return [result if self.output is None else self.output.check(result) for result in results]

    def _admitted(self, row: Row) -> Row:
        return row if self.input is None else self.input.check(row)

    def artifact_store(self, scope: str = SHARED_SCOPE) -> ArtifactStore | None:
        """Where large values go; a folder of the pipeline's puts them into this scope of it."""
        if isinstance(self.artifacts, str):
            return open_artifacts(self.artifacts, scope=scope)
        return self.artifacts

    def run(
        self,
        rows: pd.DataFrame | Iterable[Row],
        *,
        broker: str | None = None,
        session: str | None = None,
        key: str | None = None,
        progress: bool | None = None,
        options: WorkerOptions | None = None,
    ) -> ExecutionResult:
        """Process rows to the end and return their results: a bounded run.

        Args:
            rows: a DataFrame, or any iterable of dicts.
            broker: its URL. Default: ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
            session: a name, to be able to go on after a crash: run the same rows with the same name again. Its
                topics are kept. Default: a new one, whose topics are removed when the run has succeeded.
            key: the column that becomes the rows' key; default: none.
            progress: a progress bar; default: on a terminal.
            options: how the worker runs.

        Returns:
            ``data`` is a DataFrame of the results in the order of the input, with the input's index (an index
            label is missing for a dropped row and repeated for several results); failed rows are in ``errors``.

        Raises:
            ConfigError, SessionError, BrokerError: nothing ran, or it can be gone on with.
        """
        from .runs import run_rows

        return run_rows(self, rows, broker=broker, session=session, key=key, progress=progress, options=options)

    async def run_async(
        self,
        rows: pd.DataFrame | Iterable[Row],
        *,
        broker: str | None = None,
        session: str | None = None,
        key: str | None = None,
        options: WorkerOptions | None = None,
    ) -> ExecutionResult:
        """:meth:`run` on the caller's event loop, for web frameworks and other asyncio programs; no progress bar.

        Cancelling it leaves a session with a name in a state from which it can be gone on with.
        """
        from .runs import run_rows_async

        return await run_rows_async(self, rows, broker=broker, session=session, key=key, options=options)

    def stream(
        self,
        rows: pd.DataFrame | Iterable[Row],
        *,
        chunk_size: int = 1000,
        broker: str | None = None,
        key: str | None = None,
        options: WorkerOptions | None = None,
        keep: bool = False,
    ) -> ChunkStream:
        """Process rows chunk by chunk in constant memory, yielding results early.

        Args:
            rows: a DataFrame or any iterable of dicts, also an endless one; read a few chunks ahead of the results.
            chunk_size: input rows per chunk, and per transaction at most.
            broker, key, options: as for :meth:`run`.
            keep: hold the chunks, for ``finalize().data``.

        Returns:
            An iterator of DataFrames: one per chunk, in order, with the input's index (a running number for an
            iterable). Its ``finalize()`` gives counts and errors as an ExecutionResult. The topics it uses are
            removed at its end.

        Raises:
            ConfigError: at once, for a wrong option; other errors come with the chunk they hit.
        """
        from .streaming import ChunkStream

        return ChunkStream(self, rows, chunk_size=chunk_size, broker=broker, key=key, options=options, keep=keep)


def _name(name: str) -> str:
    if check_pipeline("Pipeline(name)", name) == RESERVED_PREFIX.removesuffix("."):
        remedy = f"use another: its topics would begin with {RESERVED_PREFIX!r}, which are rowmill's own"
        raise ConfigError("Pipeline(name)", name, remedy)
    return name


def _sources(source: str | Sequence[str]) -> tuple[str, ...]:
    names = (source,) if isinstance(source, str) else tuple(source)
    if not names or len(set(names)) < len(names):
        raise ConfigError("Pipeline(source=)", source, "give one topic, or several different ones")
    return tuple(check_topic("Pipeline(source=)", name) for name in names)


def _start(start: str | datetime) -> Literal["earliest", "latest"] | datetime:
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise ConfigError("Pipeline(start=)", start, "give it a time zone (tzinfo=UTC)")
        return start
    if start not in {"earliest", "latest"}:
        raise ConfigError("Pipeline(start=)", start, "use 'earliest', 'latest' or a datetime with a time zone")
    return "earliest" if start == "earliest" else "latest"


def _artifacts(place: Any) -> str | ArtifactStore | None:
    if place is None or isinstance(place, ArtifactStore):
        return place
    open_artifacts(place)  # refuses what is no place
    return str(place)


def _kept_log(capture_logs: Any) -> int:
    """Characters of a row's log to keep; 0: none."""
    if isinstance(capture_logs, bool):
        return LOG_CHARACTERS if capture_logs else 0
    return int(_whole("capture_logs", capture_logs, 1, LOG_CHARACTERS))


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise ConfigError(f"Pipeline({name}=)", value, f"use {' or '.join(map(repr, known))}")
    return value


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"Pipeline({name}=)", value, f"give a whole number from {least:,} to {most:,}")
    return value
