"""Events: handlers by the type of the event that a row is.

The type stands in a field or in a header. A row without one is of type ``unknown``; a type that nobody handles is a
state of its own, ``no_handlers``, and what becomes of such rows is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Literal, NamedTuple, TypeVar, overload

from ..state.errors import ConfigError
from ..state.model import Row
from .context import RowContext
from .errors import StopExecution, UnroutedError
from .options import check_name
from .routing import StatisticsByName, check_stage_options, run_stage, run_stages
from .stage import Handler, Stage, make_stage

H = TypeVar("H", bound=Handler | Stage)

UNKNOWN = "unknown"
"""The type of rows that have none."""

NO_HANDLERS = "no_handlers"
"""The state of events that nobody handles."""

_TYPE_CHARS = 100


class _Listener(NamedTuple):
    pattern: str
    stage: Stage

    def wants(self, event_type: str) -> bool:
        if self.pattern.endswith("*"):
            return event_type.startswith(self.pattern[:-1])
        return event_type == self.pattern


class Events:
    """An element that gives each row to the handlers of its event type, in the order they were registered.

    Args:
        field: the row's field that holds the type; default: ``type``, if no header is named.
        header: the header that holds it instead; of several with this name the last one counts.
        mode: ``chain`` (default): each handler gets the row as the one before returned it, as stages do, and what
            the last one returns goes on; None drops the row, and later handlers are not called. ``each``: each
            handler gets the event as it came, whatever it returns is collected in ``report``, and the event goes on.
        unhandled: what becomes of events that nobody handles: they go on unchanged (``forward``, the default:
            nothing is lost by forgetting a handler), end here (``drop``), or fail as ``no_handlers`` (``fail``).
        report: field of the results that tells what happened: ``event_type`` and ``handlers_executed`` (with
            ``each`` also ``results``, one entry per handler), or ``event_type`` and ``status: no_handlers``. Default:
            ``event_report`` with ``each``; none with ``chain``.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(
        self,
        *,
        field: str | None = None,
        header: str | None = None,
        mode: Literal["chain", "each"] = "chain",
        unhandled: Literal["forward", "drop", "fail"] = "forward",
        report: str | None = None,
    ) -> None:
        if field is not None and header is not None:
            raise ConfigError("Events(header=)", header, "the type stands in a field or in a header: give one of them")
        for option, value in {"field": field, "header": header, "report": report}.items():
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"Events({option}=)", value, "give a name")
        _one_of("mode", mode, ("chain", "each"))
        _one_of("unhandled", unhandled, ("forward", "drop", "fail"))
        self._header = header
        self._field = field if field is not None else "type"
        self._collects = mode == "each"
        self._unhandled = unhandled
        self._report = report if report is not None or mode == "chain" else "event_report"
        self._listeners: list[_Listener] = []
        self._default: list[Stage] = []
        self._known: dict[str, tuple[Stage, ...]] = {}
        self.handled = 0
        """Events that had a handler, failed ones included."""
        self.unhandled = 0
        """Events that nobody handles."""
        self.unknown = 0
        """Rows without a type, whatever became of them; they are handled or unhandled as well."""
        self.statistics = StatisticsByName()
        """Rows, failures and seconds of handled events by what handlers were registered for."""
        self._unhandled_types = StatisticsByName(most=100)

    # --- building --------------------------------------------------------------------------------------------

    @overload
    def on(self, event_type: str, handler: H, **options: Any) -> H: ...
    @overload
    def on(self, event_type: str, handler: None = None, **options: Any) -> Callable[[H], H]: ...
    def on(self, event_type: str, handler: Any = None, **options: Any) -> Any:
        """Register a handler for an event type; without ``handler`` it is a decorator.

        Args:
            event_type: the type; or a beginning of types, ``order.*``; or ``*`` for every event. Rows without a
                type are of type ``unknown``.
            handler: ``row -> row | list[row] | None``, sync or async, with ``ctx`` if it asks for it; or a Stage.
            options: those of ``pipeline.add`` (``retry``, ``timeout``, ``breaker``, …) and ``name``, under which it
                stands in dead letters. Default: the function's name.

        Returns:
            The handler as it was, so that it stays an ordinary function.

        Raises:
            ConfigError: an option is wrong, or another handler has this name.
        """
        if not isinstance(event_type, str) or not event_type or "*" in event_type[:-1]:
            raise ConfigError("on(event_type)", event_type, "give a type, a beginning with '*' at its end, or '*'")
        return self._registering(handler, options, lambda stage: self._listeners.append(_Listener(event_type, stage)))

    @overload
    def default(self, handler: H, **options: Any) -> H: ...
    @overload
    def default(self, handler: None = None, **options: Any) -> Callable[[H], H]: ...
    def default(self, handler: Any = None, **options: Any) -> Any:
        """Register a handler for events that no other handler wants; as :meth:`on` without a type.

        Raises:
            ConfigError: as there.
        """
        return self._registering(handler, options, self._default.append)

    def register_event_handler(self, event_type: str, handler_func: Handler) -> None:
        """The same as :meth:`on`."""
        self.on(event_type, handler_func)

    def _registering(
        self, handler: Handler | Stage | None, options: Mapping[str, Any], register: Callable[[Stage], None]
    ) -> Any:
        def decorate(function: H) -> H:
            register(self._stage(function, options))
            self._known.clear()
            return function

        return decorate if handler is None else decorate(handler)

    def _stage(self, handler: Handler | Stage, options: Mapping[str, Any]) -> Stage:
        policies = {name: value for name, value in options.items() if name != "name"}
        check_stage_options("on(options)", policies)
        if isinstance(handler, Stage):
            if options:
                raise ConfigError(
                    f"on({next(iter(options))}=)", handler.name, "a finished Stage brings its own options"
                )
            stage = handler
        else:
            stage = make_stage(handler, name=options.get("name"), **policies)
        if stage.batch is not None:
            raise ConfigError("on(handler)", stage.name, "events come one by one: leave batch= and frame=")
        return self._same_or_new(stage)

    def _same_or_new(self, stage: Stage) -> Stage:
        """One stage per name: a handler may be registered for several types."""
        for present in self._all():
            if present.name == stage.name:
                if present == stage:
                    return present
                remedy = "another handler has this name, or this one other options; give it its own with name="
                raise ConfigError("on(name=)", stage.name, remedy)
        check_name("on(name=)", stage.name)
        return stage

    def _all(self) -> list[Stage]:
        return [*(listener.stage for listener in self._listeners), *self._default]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The handlers' stages, each once."""
        return tuple({stage.name: stage for stage in self._all()}.values())

    # --- running ---------------------------------------------------------------------------------------------

    def type_of(self, row: Row, ctx: RowContext | None = None) -> str:
        """The row's event type; ``unknown`` if it has none, or none that is text."""
        return self._type_of(row, ctx) or UNKNOWN

    def handlers_of(self, event_type: str) -> tuple[str, ...]:
        """The names of the handlers that an event of this type goes to, in order."""
        return tuple(stage.name for stage in self._wanting(event_type))

    async def __call__(self, row: Row, ctx: RowContext) -> Row | list[Row] | None:
        """The event, through its handlers.

        Raises:
            StageFailedError: a handler failed; it names handler and type.
            UnroutedError: nobody handles the type, and ``unhandled`` is ``fail``.
        """
        found = self._type_of(row, ctx)
        self.unknown += found is None
        event_type = found or UNKNOWN
        stages = self._wanting(event_type)
        if not stages:
            return self._unhandled_event(row, event_type)
        self.handled += 1
        return await self._measured(event_type, stages, row, ctx)

    def _type_of(self, row: Row, ctx: RowContext | None) -> str | None:
        value = row.get(self._field) if self._header is None else self._header_of(ctx)
        return value if isinstance(value, str) and value else None

    def _header_of(self, ctx: RowContext | None) -> str | None:
        found = [value for name, value in (ctx.headers if ctx is not None else ()) if name == self._header]
        try:
            return found[-1].decode("utf-8") if found and found[-1] is not None else None
        except UnicodeDecodeError:
            return None

    def _wanting(self, event_type: str) -> tuple[Stage, ...]:
        known = self._known.get(event_type)
        if known is None:
            known = tuple(listener.stage for listener in self._listeners if listener.wants(event_type))
            known = tuple({stage.name: stage for stage in known or self._default}.values())
            if len(self._known) >= 1000:  # types come from outside
                self._known.clear()
            self._known[event_type] = known
        return known

    def _unhandled_event(self, row: Row, event_type: str) -> Row | None:
        self.unhandled += 1
        shown = event_type[:_TYPE_CHARS]
        self._unhandled_types.of(shown).count(0.0, failed=self._unhandled == "fail", dropped=self._unhandled == "drop")
        if self._unhandled == "fail":
            raise UnroutedError(
                NO_HANDLERS, f"no handler for events of type {shown!r}; register one with on({shown!r})"
            )
        if self._unhandled == "drop":
            return None
        return row if self._report is None else {**row, self._report: {"event_type": event_type, "status": NO_HANDLERS}}

    async def _measured(
        self, event_type: str, stages: tuple[Stage, ...], row: Row, ctx: RowContext
    ) -> Row | list[Row] | None:
        clock = ctx.runtime.clock
        statistics = self.statistics.of(event_type[:_TYPE_CHARS])
        started = clock.monotonic()
        try:
            result = await (self._each if self._collects else self._chain)(event_type, stages, row, ctx)
        except StopExecution:
            raise
        except Exception:
            statistics.count(clock.monotonic() - started, failed=True)
            raise
        statistics.count(clock.monotonic() - started, dropped=result is None)
        return result

    async def _chain(
        self, event_type: str, stages: tuple[Stage, ...], row: Row, ctx: RowContext
    ) -> Row | list[Row] | None:
        result = await run_stages(stages, row, ctx, _event(event_type))
        if self._report is None or result is None:
            return result
        report = {"event_type": event_type, "handlers_executed": len(stages)}
        if isinstance(result, list):
            return [{**part, self._report: report} for part in result]
        return {**result, self._report: report}

    async def _each(self, event_type: str, stages: tuple[Stage, ...], row: Row, ctx: RowContext) -> Row:
        results = []
        for stage in stages:  # a copy for each: what one does to its event is not seen by the next
            results.append(await run_stage(stage, deepcopy(row), ctx, _event(event_type)))  # noqa: PERF401 - awaits
        report = {"event_type": event_type, "handlers_executed": len(results), "results": results}
        return {**row, str(self._report): report}

    @property
    def counts(self) -> dict[str, int]:
        """``handled``, ``unhandled`` (together: all events) and ``unknown`` (of these, those without a type)."""
        return {"handled": self.handled, "unhandled": self.unhandled, "unknown": self.unknown}

    def to_dict(self) -> dict[str, Any]:
        """Figures for status pages: the counts, figures by type, and how often each unhandled type came."""
        return {
            **self.counts,
            "types": self.statistics.to_dict(),
            "unhandled_types": {name: found["rows"] for name, found in self._unhandled_types.to_dict().items()},
        }


def _event(event_type: str) -> str:
    return f"event {event_type[:_TYPE_CHARS]!r}"


def _one_of(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"Events({option}=)", value, f"use {' or '.join(map(repr, known))}")
