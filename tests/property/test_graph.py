"""Graphs of any shape, with any mix of failures, conditions and ways of running: each node's state is the oracle's."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill.handlers.graph import Graph
from rowmill.handlers.stage import Handler


class Spec(NamedTuple):
    """A node ``n<i>``: what it takes and comes after, whether it has defaults, what it does, and how it is run."""

    takes: tuple[int, ...]
    after: tuple[int, ...]
    has_defaults: bool
    does: str  # answers, fails, skips
    way: str  # plain, async, threads


@st.composite
def specs(draw: st.DrawFn) -> list[Spec]:
    """Nodes that depend on earlier ones only; they are declared in another order."""
    made: list[Spec] = []
    for i in range(draw(st.integers(1, 9))):
        earlier = st.lists(st.integers(0, i - 1), max_size=3, unique=True).map(tuple) if i else st.just(())
        does = draw(st.sampled_from(["answers", "answers", "answers", "fails", "skips"]))
        way = draw(st.sampled_from(["plain", "async", "threads"]))
        made.append(Spec(draw(earlier), draw(earlier), draw(st.booleans()), does, way))
    return made


def function_of(i: int, spec: Spec, log: list[int]) -> Handler:
    """A function with the parameters that the node takes: it adds them up, and one more."""
    default = "=1000" if spec.has_defaults else ""
    parameters = ", ".join(f"n{j}{default}" for j in spec.takes)
    total = "+".join(["1", *(f"n{j}" for j in spec.takes)])
    body = f"log.append({i}); assert {spec.does != 'fails'}; return {total}"
    space: dict[str, Any] = {"log": log}
    kind = "async def" if spec.way == "async" else "def"
    exec(f"{kind} n{i}({parameters}):\n    {body}", space)  # noqa: S102 - parameters are what this is about
    function: Handler = space[f"n{i}"]
    return function


def oracle(made: list[Spec]) -> dict[int, tuple[str, int]]:
    """State and value by node, worked out one after the other."""
    found: dict[int, tuple[str, int]] = {}
    doomed: set[int] = set()
    for i, spec in enumerate(made):
        if any(found[j][0] == "failed" or j in doomed for j in (*spec.takes, *spec.after)):
            doomed.add(i)
            found[i] = ("skipped", 0)
        elif spec.does == "skips" or (not spec.has_defaults and any(found[j][0] == "skipped" for j in spec.takes)):
            found[i] = ("skipped", 0)
        elif spec.does == "fails":
            found[i] = ("failed", 0)
        else:
            found[i] = ("completed", 1 + sum(found[j][1] if found[j][0] == "completed" else 1000 for j in spec.takes))
    return found


@settings(deadline=None)
@given(specs(), st.randoms(use_true_random=False))
def test_every_node_ends_as_it_must(made: list[Spec], chance: Any) -> None:
    """States, values and calls are the oracle's, and each node ran after all that it waits for."""
    log: list[int] = []
    graph = Graph("g", on_failure="keep")
    declared = list(enumerate(made))
    chance.shuffle(declared)
    for i, spec in declared:
        options: dict[str, Any] = {"concurrency": 2} if spec.way == "threads" else {}
        if spec.does == "skips":
            options["when"] = lambda _: False
        graph.add(function_of(i, spec, log), after=[f"n{j}" for j in spec.after], **options)

    async def run() -> Any:
        async with asyncio.timeout(30):
            return await graph.run({})

    result = asyncio.run(run())
    expected = oracle(made)
    assert {int(name[1:]): report.state for name, report in result.nodes.items()} == {
        i: state for i, (state, _) in expected.items()
    }
    assert result.row == {f"n{i}": value for i, (state, value) in expected.items() if state == "completed"}
    assert sorted(log) == sorted(i for i, (state, _) in expected.items() if state != "skipped")
    for place, i in enumerate(log):
        assert not set(log[place:]) & {*made[i].takes, *made[i].after}, "it ran before what it waits for"
