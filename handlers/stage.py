"""A stage: a handler, and how it is to be called."""

from __future__ import annotations

import inspect
from asyncio import CancelledError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, cast

from ..state.codec import dumps
from ..state.errors import BadRowError, ConfigError
from ..state.model import Row
from .breaker import CircuitBreaker
from .budget import Price, checked_price
from .cache import Cache
from .errors import ConditionError, StopExecution
from .limits import RateLimit
from .options import check_count, check_name, check_seconds
from .processes import ProcessHandler, default_processes
from .retry import Retry
from .schema import make_validator, with_objects

Handler: TypeAlias = Callable[..., Any]
OnError: TypeAlias = "Literal['dead_letter', 'skip', 'fail'] | Mapping[str, Any]"
"""What becomes of a row that failed for good: a dead letter; left out and counted; the session ends as failed; or these
fields are set in it and it goes on."""

ASYNC_CONCURRENCY = 10
"""Calls of an async handler that run at once unless its stage says otherwise."""


class Check(Protocol):
    """Whether a row fits a schema."""

    def check(self, row: Row) -> Row:
        """The row as it goes on; raises what becomes its failure."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """One named step of a chain. Made by :func:`make_stage`, which checks everything.

    Attributes:
        name: unique in its pipeline; it stands in dead letters, metrics and caches, so keep it when code changes.
        handler: ``row -> row | list[row] | None``; with ``batch`` it takes and gives lists, with ``frame`` frames.
        call: what the engine calls: the handler, behind its condition and schemas where nobody else looks at these.
        batch: rows per call at most, or None for one row per call.
        frame: whether the rows come as a pandas DataFrame.
        timeout: seconds that one call may take, or None for no limit.
        concurrency: calls that may run at once, in the whole worker.
        is_async: whether calling the handler gives something to await.
        takes_context: whether ``call`` wants a RowContext (a list of them for batches and frames) besides.
        retry, breaker, limit, cache: policies, or None.
        price: the most that one call may cost, or a function of the row that tells it; None: it costs nothing.
        fallback: fields to set, or a function of (row, ctx) to call instead, when the stage failed for good.
        fallback_is_async: whether calling it gives something to await.
        on_error: what becomes of the row where there is no fallback, or it failed as well.
        when: whether a row is for this stage; None: every one.
        input, output: schemas, or None.
    """

    name: str
    handler: Handler
    call: Handler
    batch: int | None
    frame: bool
    timeout: float | None
    concurrency: int
    is_async: bool
    takes_context: bool
    retry: Retry | None = None
    breaker: CircuitBreaker | None = None
    limit: RateLimit | None = None
    cache: Cache | None = None
    price: Price | None = None
    fallback: Mapping[str, Any] | Handler | None = None
    fallback_is_async: bool = False
    on_error: OnError = "dead_letter"
    when: Handler | None = None
    input: Check | None = None
    output: Check | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a bare call on the caller's thread is all that it takes: the fast path."""
        return not self.is_async and self.timeout is None and self.concurrency == 1 and not self.is_policed

    @property
    def is_policed(self) -> bool:
        """Whether calls go through :mod:`~rowmill.handlers.policed`, which may wait and try again.

        A plain function's condition, schemas, fields to fall back to and ``on_error`` need none of that.
        """
        if any(policy is not None for policy in (self.retry, self.breaker, self.limit, self.cache, self.price)):
            return True
        if self.fallback_is_async:
            return True
        if self.batch is not None:
            return False
        if self.is_async:
            return self.recovers or self.when is not None or self.input is not None or self.output is not None
        return self.recovers and (self.timeout is not None or self.concurrency > 1)

    @property
    def recovers(self) -> bool:
        """Whether a row that failed may go on all the same."""
        return self.fallback is not None or isinstance(self.on_error, Mapping)

    @property
    def repeats(self) -> bool:
        """Whether a call may be followed by another with the same row: each gets a copy (of its fields, no deeper)."""
        return self.retry is not None or (self.timeout is not None and not self.is_async)

    @property
    def needs_context(self) -> bool:
        """Whether its rows need a RowContext, for the handler or for the engine's own notes."""
        return self.takes_context or self.is_policed or self.recovers or self.when is not None

    @property
    def asked(self) -> Handler:
        """The handler whose code the answers depend on: the user's, also where a process calls it."""
        reference = getattr(self.handler, "reference", None)
        return getattr(reference, "handler", self.handler)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages inside its handler, where that is an element (a graph, a router)."""
        inner = getattr(self.handler, "stages", ())
        return tuple(stage for stage in inner if isinstance(stage, Stage)) if isinstance(inner, tuple) else ()

    def then_of(self, error: BaseException) -> Literal["dead_letter", "skip", "fail", "stop"]:
        """What becomes of a row that failed with this error."""
        if isinstance(error, StopExecution):
            return "stop"
        if getattr(error, "then", None) == "fail":  # a stage inside an element says so
            return "fail"
        return "dead_letter" if isinstance(self.on_error, Mapping) else self.on_error


class StageOptions(TypedDict, total=False):
    """The options of :func:`make_stage`, for functions that pass them on."""

    name: str | None
    batch: int | None
    frame: bool
    timeout: float | None
    concurrency: int | None
    retry: Retry | int | None
    breaker: CircuitBreaker | None
    limit: RateLimit | None
    cache: Cache | None
    price: Price | None
    fallback: Mapping[str, Any] | Handler | None
    on_error: OnError
    when: Handler | None
    input: Any
    output: Any
    parse: bool
    executor: Literal["process"] | None


def check_option_names(options: Mapping[str, Any]) -> None:
    """Refuse what is no option of a stage.

    Raises:
        ConfigError: naming the option, and the one that was probably meant.
    """
    known = StageOptions.__annotations__
    for option, value in options.items():
        if option not in known:
            close = get_close_matches(option, known, 1)
            remedy = f"did you mean {close[0]}=?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"stage({option}=)", value, f"there is no such option; {remedy}")


def make_stage(
    handler: Handler,
    *,
    name: str | None = None,
    batch: int | None = None,
    frame: bool = False,
    timeout: float | None = None,
    concurrency: int | None = None,
    retry: Retry | int | None = None,
    breaker: CircuitBreaker | None = None,
    limit: RateLimit | None = None,
    cache: Cache | None = None,
    price: Price | None = None,
    fallback: Mapping[str, Any] | Handler | None = None,
    on_error: OnError = "dead_letter",
    when: Handler | None = None,
    input: Any = None,  # noqa: A002 - the word users look for
    output: Any = None,
    parse: bool = False,
    executor: Literal["process"] | None = None,
) -> Stage:
    """Check a handler and its options and put them together.

    Args:
        handler: a function, method or object with ``__call__``; sync or async; of (row) or (row, ctx).
        name: 1 to 80 letters, digits, ``_`` and ``-``; default: the handler's own name.
        batch: 1 or more; default for ``frame=True``: 1,000.
        frame: call with a DataFrame; its index identifies the rows and must be kept.
        timeout: seconds above 0 that one call, of several if it is retried, may take.
        concurrency: calls at once, from 1. Default: 10 for async handlers, 1 for others; above 1 a blocking handler
            runs on as many threads.
        retry: when a failed call is repeated; a number means ``Retry(attempts=number)``.
        breaker: when calls stop for a while because they keep failing.
        limit: how fast calls may begin.
        cache: how answers are kept, so that the same question is asked once.
        price: the most that one call may cost: Decimal, int or text, or a function of the row. It is what the call did
            cost unless the handler says so (``ctx.add_cost``), and what a budget sets aside before it.
        fallback: fields to set in a row that failed for good, or a handler to call with it instead.
        on_error: ``dead_letter`` (default), ``skip``, ``fail``, or fields to set.
        when: function of (row) or (row, ctx): rows for which it gives nothing true go past the stage unchanged.
        input: schema that rows must fit: a dataclass, a TypedDict, or a pydantic model's class.
        output: schema that results must fit; the handler may return instances of it.
        parse: hand the handler instances of ``input`` instead of rows.
        executor: ``process`` calls a plain handler, defined at the top level of a file, in a process of its own.

    Raises:
        ConfigError: naming the option, what was given, and what to give instead.
    """
    if not callable(handler):
        raise ConfigError("stage(handler)", handler, "give a function, or an object that can be called")
    name = name if name is not None else _own_name(handler)
    check_name("stage(name=)", name)
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise ConfigError("stage(handler)", name, "return a list of rows instead of yielding them")
    _check_calls(batch, frame, timeout, concurrency, executor)
    _check_is("breaker", breaker, CircuitBreaker)
    _check_is("limit", limit, RateLimit)
    _check_is("cache", cache, Cache)
    _check_ends(name, fallback, on_error, when, breaker)
    if cache is not None and (batch is not None or frame):
        raise ConfigError("stage(cache=)", cache, "answers are kept row by row; leave out batch= and frame=, or cache=")
    takes = None if input is None else make_validator(input, side="input", setting="stage(input=)")
    gives = None if output is None else make_validator(output, side="result", setting="stage(output=)")
    if not isinstance(parse, bool) or (parse and (takes is None or frame)):
        raise ConfigError("stage(parse=)", parse, "give an input= schema as well, and no frame=")
    if batch is not None and is_async(fallback) and (when is not None or takes is not None or gives is not None):
        raise ConfigError("stage(fallback=)", fallback, "with batch= and when= or schemas, give a plain function")
    awaited, wants_context = is_async(handler), takes_context(handler, name)
    batch = batch or (1000 if frame else None)
    if executor == "process":
        handler = ProcessHandler(handler, takes_context=wants_context, frame=frame, timeout=timeout)
        frame, timeout = False, None  # both are the process's business
        awaited = wants_context = True
        concurrency = concurrency or default_processes()
    call = handler
    if parse or gives is not None:
        call = with_objects(handler, takes=takes if parse else None, is_async=awaited, batch=batch is not None)
    stage = Stage(
        name=name,
        handler=handler,
        call=call,
        batch=batch,
        frame=frame,
        timeout=float(timeout) if timeout is not None else None,
        concurrency=concurrency or (ASYNC_CONCURRENCY if awaited else 1),
        is_async=awaited,
        takes_context=wants_context,
        retry=_retry(retry),
        breaker=breaker,
        limit=limit,
        cache=cache,
        price=None if price is None else checked_price(price),
        fallback=fallback if isinstance(fallback, Mapping) else _with_context(fallback, "fallback"),
        fallback_is_async=is_async(fallback),
        on_error=on_error,
        when=_with_context(when, "when"),
        input=takes,
        output=gives,
    )
    return _guarded(stage)


def _with_context(function: Handler | None, name: str) -> Handler | None:
    """A condition or fallback as a function of (row, ctx)."""
    if function is None or takes_context(function, name, f"stage({name}=)"):
        return function
    return lambda row, _: function(row)


def _guarded(stage: Stage) -> Stage:
    """Put condition, schemas and the undoing of effects around the call, where no policy or batch looks at them."""
    if stage.is_policed or stage.batch is not None:
        return stage
    if stage.recovers and stage.takes_context:
        stage = replace(stage, call=_undoing(stage.call))
    if stage.when is None and stage.input is None and stage.output is None:
        return stage
    bare, wants_context, check_input, check_output = stage.call, stage.takes_context, stage.input, stage.output

    def call(row: Row, context: Any) -> Any:
        if not is_for(stage, row, context):
            return row
        if check_input is not None:
            row = check_input.check(row)
        result = bare(row, context) if wants_context else bare(row)
        return result if check_output is None else fitting(check_output, result)

    return replace(stage, call=call, takes_context=True)


def _undoing(call: Handler) -> Handler:
    """A call whose effects are gone when it fails, for the row goes on without it; what it cost is not."""

    def undone(row: Row, context: Any) -> Any:
        attempt = context.fork()
        try:
            result = call(row, attempt)
            context.adopt(attempt)
        finally:
            context.pay(attempt)
        return result

    return undone


def is_for(stage: Stage, row: Row, context: Any) -> bool:
    """Whether a row is for a stage; counts it if not.

    Raises:
        ConditionError: the condition raised.
    """
    if stage.when is None:
        return True
    try:
        wanted = bool(stage.when(row, context))
    except (Exception, SystemExit, CancelledError) as error:
        raise ConditionError(f"when= raised {type(error).__name__}: {error}") from error
    if not wanted and context is not None:
        context.runtime.counts(stage).passed_by += 1
    return wanted


def fitting(check: Check, result: Any) -> Any:
    """A handler's result, each of its rows checked."""
    if isinstance(result, dict):
        return check.check(result)
    if isinstance(result, (list, tuple)):
        return [check.check(row) if isinstance(row, dict) else row for row in result]
    return result


def _check_calls(batch: Any, frame: Any, timeout: Any, concurrency: Any, executor: Any) -> None:
    """How a handler is called."""
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ConfigError("stage(batch=)", batch, "give a number of rows from 1, or leave it out")
    if not isinstance(frame, bool):
        raise ConfigError("stage(frame=)", frame, "give True or False")
    if timeout is not None:
        check_seconds("stage(timeout=)", timeout, remedy=", or leave it out for no limit")
    if concurrency is not None:
        check_count("stage(concurrency=)", concurrency, ", or leave it out")
    if executor not in {None, "process"}:
        raise ConfigError("stage(executor=)", executor, "use 'process', or leave it out")


def _check_ends(name: str, fallback: Any, on_error: Any, when: Any, breaker: CircuitBreaker | None) -> None:
    """What becomes of rows that a handler is not for, or fails with."""
    if fallback is not None and not isinstance(fallback, Mapping) and not callable(fallback):
        raise ConfigError("stage(fallback=)", fallback, "give a dict of fields to set, or a handler")
    if not isinstance(on_error, Mapping) and on_error not in {"dead_letter", "skip", "fail"}:
        raise ConfigError("stage(on_error=)", on_error, "use 'dead_letter', 'skip', 'fail', or a dict of fields to set")
    if when is not None and (not callable(when) or is_async(when)):
        raise ConfigError("stage(when=)", when, "give a plain function of (row) or (row, ctx)")
    if isinstance(on_error, Mapping):
        _check_fields("stage(on_error=)", on_error)
    if isinstance(fallback, Mapping):
        _check_fields("stage(fallback=)", fallback)
    if breaker is not None and breaker.when_open == "fallback" and fallback is None:
        raise ConfigError("CircuitBreaker(when_open=)", "fallback", f"stage {name!r} has no fallback=; give it one")


def _check_fields(setting: str, fields: Mapping[Any, Any]) -> None:
    """Fields that are set in a row."""
    if not all(isinstance(name, str) for name in fields):
        raise ConfigError(setting, dict(fields), "the names of fields are text")
    try:
        dumps(dict(fields))
    except (TypeError, ValueError, BadRowError):
        raise ConfigError(setting, dict(fields), "give values that JSON has") from None


def _retry(retry: Any) -> Retry | None:
    if isinstance(retry, int) and not isinstance(retry, bool):
        retry = Retry(attempts=retry)
    _check_is("retry", retry, Retry)
    return cast("Retry | None", retry)


def _check_is(option: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"stage({option}=)", value, f"give a {kind.__name__}(…)")


def _own_name(handler: Handler) -> str:
    own = getattr(handler, "__name__", None) or type(handler).__name__
    return "lambda" if own == "<lambda>" else str(own)


def is_async(handler: Any) -> bool:
    """Whether calling it gives something to await."""
    call = getattr(handler, "__call__", None)  # noqa: B004 - an object's own async __call__ counts as well
    return inspect.iscoroutinefunction(inspect.unwrap(handler)) or inspect.iscoroutinefunction(call)


def takes_context(handler: Handler, name: str, setting: str = "stage(handler)") -> bool:
    """Whether a second argument is wanted: a required second one, or one called ``ctx`` or ``context``.

    Raises:
        ConfigError: it wants something else.
    """
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except (TypeError, ValueError):  # builtins such as dict tell no signature: they get the row
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    required = [p for p in positional if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(required) > 2 or keyword_only or (not positional and not takes_any):
        shown = f"{name}{inspect.signature(handler)}"
        raise ConfigError(setting, shown, "a handler takes (row) or (row, ctx) and no more")
    return len(required) == 2 or (len(positional) > 1 and positional[1].name in {"ctx", "context"})
