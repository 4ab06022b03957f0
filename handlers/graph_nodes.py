"""The nodes of a graph: what each function takes and gives, and the order that follows from it.

Everything here happens once, when a graph is built; :mod:`~rowmill.handlers.graph_run` runs rows through the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CoroutineType
from typing import Any, Final, TypeAlias, cast

from ..state.errors import ConfigError
from ..state.model import Row
from .errors import MisfitError
from .options import check_name
from .stage import Handler, Stage, is_async, make_stage

ROW: Final = "row"
CONTEXT: Final = "ctx"
SPECIAL: Final = frozenset({ROW, CONTEXT})
"""Parameters that are filled by the graph itself: a copy of the input row, and the row's context."""

_RECOVERY: Final = frozenset({"fallback", "on_error"})
"""Options that a plain function may have and stay one."""

MISSING: Final = inspect.Parameter.empty
"""No value: nobody provides one, and the function has no default."""

Names: TypeAlias = "str | Sequence[str]"
Inputs: TypeAlias = "Names | Mapping[str, str]"


_NO_LIMIT = 100_000
"""Calls at once of an async node that names no number: the graph's own concurrency is its limit."""


class NodeInputs(dict[str, Any]):
    """What one node is called with, by parameter: the "row" of its stage. Counts the calls that were made with it."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


@dataclass(frozen=True, slots=True)
class Argument:
    """Where a function's parameter comes from, and what it gets where nobody provides it."""

    parameter: str
    source: str
    default: Any


@dataclass(frozen=True, slots=True)
class Node:
    """One function of a graph.

    Attributes:
        name: unique in its graph.
        stage: the function behind its policies, as :func:`~rowmill.handlers.chain.attempt` runs it.
        call: the function itself, of (inputs, context), giving ``{output: value}``, or something to await for it.
        arguments: what it takes.
        outputs: what it gives.
        after: nodes that come before it without giving it anything.
        when: condition of (values) or (values, ctx), or None.
        wants_row: whether it asks for ``row``.
        has_effects: whether it may do something through ``ctx`` and so gets one of its own.
        is_quick: whether it is a plain function that needs neither waiting nor a thread of its own: it runs in one go
            with others of its kind.
        is_limited: whether it was given a ``concurrency`` of its own.
    """

    name: str
    stage: Stage
    call: Callable[[Row, Any], Any]
    arguments: tuple[Argument, ...]
    outputs: tuple[str, ...]
    after: tuple[str, ...]
    when: Callable[..., Any] | None
    wants_row: bool
    has_effects: bool
    is_quick: bool
    is_limited: bool


def make_node(
    graph: str,
    function: Handler,
    *,
    name: str | None,
    inputs: Inputs | None,
    outputs: Names | None,
    after: Names,
    when: Callable[..., Any] | None,
    options: Mapping[str, Any],
) -> Node:
    """Check a function and its options and put them together; :meth:`Graph.add` describes them.

    Raises:
        ConfigError: naming the option, what was given, and what to give instead.
    """
    if not callable(function):
        raise ConfigError("node(function)", function, "give a function, or an object that can be called")
    name = name if name is not None else getattr(function, "__name__", type(function).__name__)
    check_name("node(name=)", name)
    for option in ("batch", "frame"):
        if options.get(option):
            raise ConfigError(f"node({option}=)", options[option], "a node runs for one row; leave it out")
    if when is not None and (not callable(when) or inspect.iscoroutinefunction(when)):
        raise ConfigError("node(when=)", when, "give a plain function of (values) or (values, ctx)")
    parameters = _parameters(function, name)
    sources = _sources(inputs, parameters, name)
    given = tuple(_names("node(outputs=)", outputs)) if outputs is not None else (name,)
    _check_outputs(given)
    wanted = SPECIAL & (parameters.keys() - sources.keys())
    options = _with_fallback(options, name, given, parameters)
    is_limited = options.get("concurrency") is not None
    is_quick = not (options.keys() - _RECOVERY) and not is_async(function)
    if is_async(function) and not is_limited:
        options["concurrency"] = _NO_LIMIT
    call = _caller(function, parameters, given, name, wants_context=CONTEXT in wanted)
    handler = _as_handler(call, function, wants_context=CONTEXT in wanted)
    stage = make_stage(handler, name=f"{graph}-{name}", **options)
    return Node(
        name=name,
        stage=stage,
        call=call,
        arguments=tuple(
            Argument(parameter, sources.get(parameter, parameter), parameters[parameter].default)
            for parameter in parameters
            if parameter not in wanted
        ),
        outputs=given,
        after=tuple(_names("node(after=)", after)),
        when=when,
        wants_row=ROW in wanted,
        has_effects=CONTEXT in wanted or bool(options.keys() - {"concurrency"}),
        is_quick=is_quick and stage.is_plain,
        is_limited=is_limited and not stage.is_policed,
    )


# --- what a function takes ---------------------------------------------------------------------------------------


def _parameters(function: Handler, name: str) -> dict[str, inspect.Parameter]:
    if inspect.isgeneratorfunction(inspect.unwrap(function)) or inspect.isasyncgenfunction(inspect.unwrap(function)):
        raise ConfigError("node(function)", name, "return the values instead of yielding them")
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some builtins
        raise ConfigError("node(function)", name, "its parameters are unknown; wrap it in a function") from None
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError("node(function)", f"{name}({parameter})", "name each parameter: names are the wiring")
    return parameters


def _sources(inputs: Inputs | None, parameters: Mapping[str, inspect.Parameter], name: str) -> dict[str, str]:
    """Which parameter takes which value, as far as ``inputs=`` says: by name first, the rest by position."""
    if inputs is None:
        return {}
    takes = f"{name} takes {_listed(parameters)}"
    if isinstance(inputs, Mapping):
        for parameter, source in inputs.items():
            if parameter not in parameters or not isinstance(source, str):
                raise ConfigError("node(inputs=)", {parameter: source}, f"give {{parameter: name of a value}}; {takes}")
        return dict(inputs)
    names = _names("node(inputs=)", inputs)
    by_name = {source: source for source in names if source in parameters}
    free = [parameter for parameter in parameters if parameter not in by_name and parameter not in SPECIAL]
    rest = list(names)
    for source in by_name:
        rest.remove(source)
    if len(rest) > len(free):
        raise ConfigError("node(inputs=)", rest[len(free)], f"there is no parameter left for it; {takes}")
    return {**by_name, **dict(zip(free, rest, strict=False))}


def _names(setting: str, names: Names) -> list[str]:
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, (list, tuple)) or not all(isinstance(one, str) and one for one in listed):
        raise ConfigError(setting, names, "give a name, or several of them in a tuple")
    return list(listed)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


# --- what it gives -----------------------------------------------------------------------------------------------


def _check_outputs(outputs: tuple[str, ...]) -> None:
    for output in outputs:
        if output in SPECIAL:
            raise ConfigError(
                "node(outputs=)", output, "'row' and 'ctx' mean the row and its context; name it otherwise"
            )
        if outputs.count(output) > 1:
            raise ConfigError("node(outputs=)", output, "it is there twice; give each output its own name")


def _spread(name: str, outputs: tuple[str, ...], result: Any) -> Row:
    """A result as ``{output: value}``: a dict by name, a tuple or list by position.

    Raises:
        MisfitError: it fits the outputs neither way.
    """
    if isinstance(result, Mapping):
        if all(output in result for output in outputs):
            return {output: result[output] for output in outputs}
    elif isinstance(result, (tuple, list)) and len(result) == len(outputs):
        return dict(zip(outputs, result, strict=True))
    size = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
    raise MisfitError(
        f"node {name!r} gave a {type(result).__name__}{size}; its outputs are {_listed(outputs)}: return a tuple of "
        f"{len(outputs)}, or a dict with these keys"
    )


# --- functions as handlers ---------------------------------------------------------------------------------------


def _caller(
    function: Handler,
    parameters: Mapping[str, inspect.Parameter],
    outputs: tuple[str, ...],
    name: str,
    *,
    wants_context: bool,
) -> Callable[[Row, Any], Any]:
    """The function as (inputs, context) -> ``{output: value}``; to be awaited if the function is.

    ``inputs`` must hold all of its parameters but ``ctx``.
    """
    first = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
    only = outputs[0] if len(outputs) == 1 else None

    def invoke(inputs: Row, context: Any) -> Any:
        values = {**inputs, CONTEXT: context} if wants_context else dict(inputs)
        return function(*[values.pop(parameter) for parameter in first], **values)

    def settled(result: Any) -> Row:
        if only is not None:
            return {only: result}
        return _spread(name, outputs, result) if outputs else {}

    async def call_async(inputs: Row, context: Any) -> Row:
        return settled(await invoke(inputs, context))

    def call(inputs: Row, context: Any) -> Row:
        result = invoke(inputs, context) if wants_context or first else function(**inputs)
        if result.__class__ is CoroutineType:
            result.close()
            raise MisfitError(f"node {name!r} gave something to await; declare its function with 'async def'")
        return {only: result} if only is not None else settled(result)

    return call_async if is_async(function) else call


def _as_handler(call: Callable[[Row, Any], Any], function: Handler, *, wants_context: bool) -> Handler:
    """A handler of (row) or (row, ctx) that counts its calls and shows whose code it runs (caches ask for that)."""

    def handler(row: Row, ctx: Any = None) -> Any:
        if row.__class__ is NodeInputs:
            row.calls += 1
        return call(row, ctx)

    async def handler_async(row: Row, ctx: Any = None) -> Any:
        return await handler(row, ctx)

    made: Any = handler_async if is_async(function) else handler
    whose: Any = function
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = (ROW, CONTEXT) if wants_context else (ROW,)
    made.__signature__ = inspect.Signature([inspect.Parameter(one, kind) for one in names])
    is_object = not (inspect.isroutine(function) or isinstance(function, (partial, type)))
    made.__wrapped__ = whose.__call__ if is_object else whose
    made.__name__ = getattr(function, "__name__", type(function).__name__)
    return cast(Handler, made)


def _with_fallback(
    options: Mapping[str, Any], name: str, outputs: tuple[str, ...], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """The options with a fallback function made a handler; fields to fall back to must be the node's outputs."""
    checked = dict(options)
    for option in ("fallback", "on_error"):
        fields = checked.get(option)
        if isinstance(fields, Mapping) and set(fields) != set(outputs):
            raise ConfigError(f"node({option}=)", dict(fields), f"give a value for each of {_listed(outputs)}")
    fallback = checked.get("fallback")
    if not callable(fallback):
        return checked
    taken = _parameters(fallback, f"{name}'s fallback")
    unknown = [parameter for parameter in taken if parameter not in parameters and parameter != CONTEXT]
    if unknown:
        raise ConfigError("node(fallback=)", unknown[0], f"a fallback takes what {name!r} takes: {_listed(parameters)}")
    wants_context = CONTEXT in taken
    call = _caller(fallback, taken, outputs, name, wants_context=wants_context)
    needed = [parameter for parameter in taken if parameter != CONTEXT]
    checked["fallback"] = _as_handler(_selecting(call, needed), fallback, wants_context=wants_context)
    return checked


def _selecting(call: Callable[[Row, Any], Any], needed: Sequence[str]) -> Callable[[Row, Any], Any]:
    return lambda inputs, context: call({parameter: inputs[parameter] for parameter in needed}, context)
