"""The plan of a graph: its nodes in the order in which they may run, and who waits for whom. Made once per graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..state.errors import ConfigError
from ..state.model import Row
from .graph_nodes import MISSING, Node


class Feed(NamedTuple):
    """One argument of a step: what the hot path has to know of it.

    ``default`` is what it gets where neither row nor node has a value of that name; ``instead`` what it gets where the
    node that should give it (``giver``, None for none) was skipped.
    """

    parameter: str
    source: str
    default: Any
    giver: int | None
    instead: Any


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A node at its place in the plan.

    Attributes:
        index: its place; a step comes behind all that it waits for.
        node: what to run.
        call: the node's own, here because the hot path asks for it.
        feeds: where its arguments come from.
        waits_for: steps that must be over before it.
        releases: steps that wait for it.
        ancestors: steps before it that have effects, directly or not, in order.
        is_watched: whether a bare call with its arguments is not all that it takes.
    """

    index: int
    node: Node
    call: Callable[[Row, Any], Any]
    feeds: tuple[Feed, ...]
    waits_for: tuple[int, ...]
    releases: tuple[int, ...]
    ancestors: tuple[int, ...]
    is_watched: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order: by what they wait for, and by declaration where that leaves a choice.

    Attributes:
        steps: all of them.
        parameters: the graph's own values by name.
        first: those that wait for nothing.
        is_quick: whether all are plain functions, so that no event loop is needed.
        is_line: whether no two of them can run at the same time.
    """

    steps: tuple[Step, ...]
    parameters: Mapping[str, Any]
    first: tuple[Step, ...]
    is_quick: bool
    is_line: bool


def make_plan(graph: str, nodes: Sequence[Node], parameters: Mapping[str, Any], inputs: Sequence[str] | None) -> Plan:
    """Put nodes in order.

    Args:
        graph: its name, for messages.
        nodes: as they were declared.
        parameters: values by name, for arguments that neither a node nor the row provides.
        inputs: fields that rows have; None: any.

    Raises:
        ConfigError: no nodes, a name that nothing provides, a parameter that nothing takes, or a circle.
    """
    if not nodes:
        raise ConfigError(f"Graph({graph!r})", [], "add at least one node")
    givers = {output: node for node in nodes for output in node.outputs}
    by_name = {node.name: node for node in nodes}
    _check_parameters(nodes, parameters, givers)
    waits = {}
    for node in nodes:
        _check_sources(node, givers, by_name, parameters, inputs)
        data = [giver.name for argument in node.arguments if (giver := _giver(node, argument.source, givers))]
        waits[node.name] = list(dict.fromkeys(data + [_before(node, name, givers, by_name) for name in node.after]))
    ordered = [by_name[name] for name in _ordered(graph, waits)]
    return _plan(ordered, waits, givers, parameters)


def _plan(
    ordered: Sequence[Node],
    waits: Mapping[str, Sequence[str]],
    givers: Mapping[str, Node],
    parameters: Mapping[str, Any],
) -> Plan:
    places = {node.name: place for place, node in enumerate(ordered)}
    before: list[set[int]] = []
    steps = []
    for place, node in enumerate(ordered):
        waits_for = sorted(places[name] for name in waits[node.name])
        before.append(set(waits_for).union(*(before[other] for other in waits_for)))
        feeds = []
        for argument in node.arguments:
            giver = _giver(node, argument.source, givers)
            default = parameters.get(argument.source, argument.default)
            at = None if giver is None else places[giver.name]
            feeds.append(Feed(argument.parameter, argument.source, default, at, argument.default))
        steps.append(
            Step(
                index=place,
                node=node,
                call=node.call,
                feeds=tuple(feeds),
                waits_for=tuple(waits_for),
                releases=tuple(places[name] for name in places if node.name in waits[name]),
                ancestors=tuple(other for other in sorted(before[place]) if ordered[other].has_effects),
                is_watched=node.when is not None or node.wants_row or node.has_effects,
            )
        )
    return Plan(
        steps=tuple(steps),
        parameters=dict(parameters),
        first=tuple(step for step in steps if not step.waits_for),
        is_quick=all(node.is_quick for node in ordered),
        is_line=all(place in steps[place + 1].waits_for for place in range(len(steps) - 1)),
    )


def _giver(node: Node, source: str, givers: Mapping[str, Node]) -> Node | None:
    """Which other node gives a value. A node that gives what it takes (``text(text)``) takes the row's."""
    giver = givers.get(source)
    return None if giver is node else giver


def _before(node: Node, name: str, givers: Mapping[str, Node], by_name: Mapping[str, Node]) -> str:
    """The node that ``after=`` means: by its own name, or by that of an output."""
    before = by_name.get(name) or givers.get(name)
    if before is None:
        raise ConfigError(f"node({node.name!r}, after=)", name, f"no node has this name; there are {_names(by_name)}")
    return before.name


def _check_parameters(nodes: Sequence[Node], parameters: Mapping[str, Any], givers: Mapping[str, Node]) -> None:
    taken = {argument.source for node in nodes for argument in node.arguments}
    for name in parameters:
        if name in givers:
            raise ConfigError("Graph(parameters=)", name, f"node {givers[name].name!r} gives it; rename one of the two")
        if name not in taken:
            raise ConfigError("Graph(parameters=)", name, "no node takes it; remove it, or name it as a node does")


def _check_sources(
    node: Node,
    givers: Mapping[str, Node],
    by_name: Mapping[str, Node],
    parameters: Mapping[str, Any],
    inputs: Sequence[str] | None,
) -> None:
    """Refuse what nothing can provide, as far as that is known now."""
    for argument in node.arguments:
        source = argument.source
        if _giver(node, source, givers) is not None or source in parameters or source in (inputs or ()):
            continue
        setting = f"node({node.name!r}, inputs=)"
        named = by_name.get(source)
        if named is not None and source not in named.outputs:
            gives = f"gives {_names(named.outputs)}; name one of these" if named.outputs else "gives nothing"
            raise ConfigError(setting, source, f"node {source!r} {gives}")
        if inputs is not None and argument.default is MISSING:
            known = _names([*givers, *inputs, *parameters])
            raise ConfigError(
                setting, source, f"neither a node nor the row nor a parameter provides it; there are {known}"
            )


def _ordered(graph: str, waits: Mapping[str, Sequence[str]]) -> list[str]:
    """Names so that each comes behind those that it waits for; otherwise as declared."""
    ordered: dict[str, None] = {}
    while len(ordered) < len(waits):
        ready = (name for name in waits if name not in ordered and all(other in ordered for other in waits[name]))
        name = next(ready, None)
        if name is None:
            raise ConfigError(
                f"Graph({graph!r})",
                _circle({name: needs for name, needs in waits.items() if name not in ordered}),
                "these nodes wait for each other in a circle; take one of the dependencies away",
            )
        ordered[name] = None
    return list(ordered)


def _circle(waits: Mapping[str, Sequence[str]]) -> str:
    """One circle among nodes that cannot be put in order, in the direction in which values would go."""
    path = [next(iter(waits))]
    while path.count(path[-1]) == 1:
        path.append(next(other for other in waits[path[-1]] if other in waits))
    circle = path[path.index(path[-1]) :]
    return " -> ".join(reversed(circle))


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
