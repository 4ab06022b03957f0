"""Graphs: what each node gets and gives, who waits for whom, and what a failure leaves standing."""

# Nodes here are made for their parameters, not for what they do with them.
# ruff: noqa: ARG005, PLW0108
from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from rowmill.handlers.chain import Chain, Failure
from rowmill.handlers.context import RowContext
from rowmill.handlers.errors import HandlerTimeoutError, StopExecution
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.graph import Graph, GraphError, NodeReport
from rowmill.handlers.retry import Retry
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage
from rowmill.state.errors import ConfigError
from rowmill.state.memory import MemoryStore
from rowmill.state.table import TableSpec
from rowmill.state.tables import PartitionTables
from rowmill.streams.pipeline import Pipeline
from support.fake_clock import FakeClock

Ways = Callable[[Callable[..., Any]], dict[str, Any]]


@pytest.fixture
async def ctx() -> AsyncIterator[RowContext]:
    """A row's context with threads, a clock turned by hand, and the table ``seen``."""
    pool = BlockingPool(4)
    tables = PartitionTables(MemoryStore(), {"seen": TableSpec("seen")})
    runtime = Runtime(pool, FakeClock())
    yield RowContext("t", 0, 7, 0, "k", (), "live", lambda _: tables.view(tables, 0), runtime)
    pool.close()


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    """Whatever became of the row: nothing of it goes on."""
    yield
    others = [task for task in asyncio.all_tasks() if "Run._follow" in repr(task)]
    assert not others, others


def states(nodes: dict[str, NodeReport]) -> dict[str, str]:
    """State by node."""
    return {name: report.state for name, report in nodes.items()}


def in_turn(*names: str, **options: Any) -> Graph:
    """A graph ``line`` of async nodes, each taking the one before; the first takes the field ``n``."""
    graph = Graph("line", **options)
    for before, name in zip(("n", *names), names, strict=False):

        async def step(value: Any) -> Any:
            return value + 1

        graph.add(step, name=name, inputs=(before,))
    return graph


# --- where values come from --------------------------------------------------------------------------------------

SOURCES: list[tuple[str, Callable[..., Any], dict[str, Any], Any]] = [
    ("a field of the row", lambda a: a, {}, 1),
    ("an output of another node", lambda x: x, {}, "x of a node"),
    ("a parameter of the graph", lambda p: p, {}, "p of the graph"),
    ("the row before the graph's parameter", lambda q: q, {}, "q of the row"),
    ("the function's default", lambda z=5: z, {}, 5),
    ("the row before the default", lambda a=5: a, {}, 1),
    ("null is a value", lambda nothing=5: nothing, {}, None),
    ("inputs by position", lambda first, second: (first, second), {"inputs": ("a", "b")}, (1, 2)),
    ("one input as text", lambda first: first, {"inputs": "b"}, 2),
    ("by name first", lambda a, b: (a, b), {"inputs": ("b", "a")}, (1, 2)),
    ("by name, then by position", lambda a, v, w: (a, v, w), {"inputs": ("b", "a", "x")}, (1, 2, "x of a node")),
    ("position leaves the others to their names", lambda v, b: (v, b), {"inputs": ("a",)}, (1, 2)),
    ("by parameter", lambda v, w: (v, w), {"inputs": {"w": "a", "v": "b"}}, (2, 1)),
    ("one value twice", lambda v, w: (v, w), {"inputs": ("a", "a")}, (1, 1)),
    ("keyword-only", lambda *, a: a, {}, 1),
    ("positional-only", lambda a, /, b: (a, b), {}, (1, 2)),
    ("a copy of the row", lambda row: sorted(row), {}, ["a", "b", "nothing", "q"]),
    ("the context", lambda ctx: ctx.offset, {}, 7),
    ("the context by position only", lambda ctx, a, /: (ctx.offset, a), {}, (7, 1)),
    ("a field called row", lambda v: v, {"inputs": {"v": "b"}}, 2),
    ("a partial function", partial(lambda a, b: (a, b), b=9), {"inputs": {"b": "b"}}, (1, 2)),
    ("a builtin", len, {"inputs": ("x",)}, 11),
]  # fmt: skip


def plain(function: Callable[..., Any]) -> dict[str, Any]:
    """As it is: in one go with the others."""
    return {"function": function}


def threaded(function: Callable[..., Any]) -> dict[str, Any]:
    """On a thread of its own."""
    return {"function": function, "concurrency": 2}


def timed(function: Callable[..., Any]) -> dict[str, Any]:
    """Through the machinery of policies."""
    return {"function": function, "timeout": 20, "retry": Retry(attempts=2)}


@pytest.mark.parametrize("way", [plain, threaded, timed])
@pytest.mark.parametrize(
    ("function", "options", "expected"), [case[1:] for case in SOURCES], ids=[c[0] for c in SOURCES]
)
async def test_what_a_node_gets(
    ctx: RowContext, way: Ways, function: Callable[..., Any], options: dict[str, Any], expected: Any
) -> None:
    """Each parameter gets its value from the first source that has one, however the node is run."""
    graph = Graph("g", parameters={"p": "p of the graph", "q": "q of the graph"})
    graph.add(lambda: "x of a node", name="x").add(lambda p, q: None, name="taker")
    graph.add(name="out", **options, **way(function))
    result = await graph.run({"a": 1, "b": 2, "nothing": None, "q": "q of the row"}, ctx)
    assert result.status == "completed", result.nodes["out"].error
    assert result.outputs["out"] == expected


async def test_a_node_that_gives_what_it_takes(ctx: RowContext) -> None:
    """It takes the row's field; everybody else takes what it gave."""
    graph = Graph("g").add(lambda text: text.strip(), name="text").add(lambda text: len(text), name="size")
    assert (await graph.run({"text": " ab "}, ctx)).row == {"text": "ab", "size": 2}


async def test_async_objects_and_methods(ctx: RowContext) -> None:
    """Objects with an async ``__call__`` and bound methods are nodes as well."""

    class Model:
        async def __call__(self, text: str) -> int:
            await asyncio.sleep(0)
            return len(text)

        async def judge(self, size: int) -> bool:
            return size > 1

    graph = Graph("g").add(Model(), name="size").add(Model().judge)
    assert (await graph.run({"text": "ab"}, ctx)).row == {"text": "ab", "size": 2, "judge": True}


async def test_a_node_cannot_change_the_row(ctx: RowContext) -> None:
    """``row`` is a copy: what a node does to it reaches neither the others nor the result."""
    graph = Graph("g").add(lambda row: row.clear(), name="vandal", outputs=()).add(lambda row: len(row), name="size")
    row = {"a": 1}
    assert (await graph.run(row, ctx)).row == {"a": 1, "size": 1}
    assert row == {"a": 1}


async def test_objects_pass_between_nodes(ctx: RowContext) -> None:
    """What goes from node to node may be anything; only the outputs that were asked for are in the row."""
    graph = Graph("g", outputs=("size",)).add(lambda a: {1, 2, a}, name="some").add(lambda some: len(some), name="size")
    assert (await graph.run({"a": 3}, ctx)).row == {"a": 3, "size": 3}


# --- what a node gives -------------------------------------------------------------------------------------------

GIVEN: list[tuple[Any, tuple[str, ...], dict[str, Any]]] = [
    ((1, 2), ("x",), {"x": (1, 2)}),
    (None, ("x",), {"x": None}),
    ((1, 2), ("x", "y"), {"x": 1, "y": 2}),
    ([1, 2], ("x", "y"), {"x": 1, "y": 2}),
    ({"y": 2, "x": 1, "z": 3}, ("x", "y"), {"x": 1, "y": 2}),
    (5, (), {}),
]


@pytest.mark.parametrize("way", [plain, timed])
@pytest.mark.parametrize(("value", "outputs", "expected"), GIVEN)
async def test_outputs(
    ctx: RowContext, way: Ways, value: Any, outputs: tuple[str, ...], expected: dict[str, Any]
) -> None:
    """One output is the result; several come from a tuple or list by position, or from a dict by name."""
    graph = Graph("g").add(name="out", outputs=outputs, **way(lambda: value))
    assert (await graph.run({}, ctx)).outputs == expected


@pytest.mark.parametrize("value", [5, "ab", None, (1,), (1, 2, 3), {"x": 1}])
async def test_outputs_that_do_not_fit(ctx: RowContext, value: Any) -> None:
    """The node fails, and says what it should have given; a text of two letters is no two values."""
    result = await Graph("g").add(lambda: value, name="out", outputs=("x", "y")).run({}, ctx)
    assert result.nodes["out"].state == "failed"
    assert "its outputs are 'x', 'y': return a tuple of 2" in (result.nodes["out"].error or "")


async def test_a_plain_function_that_gives_a_coroutine(ctx: RowContext) -> None:
    """Nobody would await it: the node fails and says how to declare it."""

    async def call() -> int:
        return 1

    result = await Graph("g").add(lambda: call(), name="out").run({}, ctx)
    assert "declare its function with 'async def'" in (result.nodes["out"].error or "")


# --- what is refused when it is built ----------------------------------------------------------------------------


def graph_of(*nodes: dict[str, Any], **options: Any) -> Graph:
    """A checked graph."""
    graph = Graph("g", **options)
    for node in nodes:
        graph.add(**node)
    graph.check()
    return graph


def generator() -> Any:
    """No node."""
    yield 1


async def condition(values: Any) -> bool:
    """No condition."""
    return True


A = {"function": lambda x: x, "name": "a"}
REFUSED: list[tuple[str, Callable[[], Any]]] = [
    (r"Graph\(name\).*80 letters", lambda: Graph("a b")),
    (r"on_failure=\): got 'drop'; use 'fail' or 'keep'", lambda: Graph("g", on_failure="drop")),  # type: ignore[arg-type]
    (r"report=\): got 5", lambda: Graph("g", report=5)),  # type: ignore[arg-type]
    (r"parameters=\): got 'row'", lambda: Graph("g", parameters={"row": 1})),
    (r"outputs=\): got 'score'; give names in a tuple", lambda: Graph("g", outputs="score")),
    (r"Graph\('g'\): got \[\]; add at least one node", graph_of),
    (r"node\(function\): got 5", lambda: graph_of({"function": 5})),
    (r"name=\): got '<lambda>'", lambda: graph_of({"function": lambda x: x})),
    (r"return the values instead of yielding", lambda: graph_of({"function": generator})),
    (r"its parameters are unknown", lambda: graph_of({"function": dict})),
    (r"a\(\*x\)'; name each parameter", lambda: graph_of({"function": lambda *x: x, "name": "a"})),
    (r"a\(\*\*x\)'; name each parameter", lambda: graph_of({"function": lambda **x: x, "name": "a"})),
    (r"batch=\): got 5; a node runs for one row", lambda: graph_of({**A, "batch": 5})),
    (r"when=\).*plain function", lambda: graph_of({**A, "when": condition})),
    (r"timeout=\): got -1", lambda: graph_of({**A, "timeout": -1})),
    (r"no parameter left for it; a takes 'x'", lambda: graph_of({**A, "inputs": ("u", "v")})),
    (r"\{'y': 'x'\}; give.*a takes 'x'", lambda: graph_of({**A, "inputs": {"y": "x"}})),
    (r"inputs=\): got 5; give a name", lambda: graph_of({**A, "inputs": 5})),
    (r"outputs=\): got 'ctx'", lambda: graph_of({**A, "outputs": ("ctx",)})),
    (r"outputs=\): got 'u'; it is there twice", lambda: graph_of({**A, "outputs": ("u", "u")})),
    (r"outputs=\): got 'a'; node 'a' gives it already", lambda: graph_of(A, {**A, "name": "b", "outputs": ("a",)})),
    (r"name=\): got 'a'; another node", lambda: graph_of(A, A)),
    (r"after=\): got 'c'; no node has this name; there are 'a'", lambda: graph_of({**A, "after": ("c",)})),
    (
        r"inputs=\): got 'b'; node 'b' gives 'u', 'v'; name one of these",
        lambda: graph_of({**A, "inputs": ("b",)}, {**A, "name": "b", "outputs": ("u", "v")}),
    ),
    (
        r"inputs=\): got 'b'; node 'b' gives nothing",
        lambda: graph_of({**A, "inputs": "b"}, {**A, "name": "b", "outputs": ()}),
    ),
    (r"inputs=\): got 'x'; neither.*there are 'a', 'text'", lambda: graph_of(A, inputs=("text",))),
    (r"parameters=\): got 'y'; no node takes it", lambda: graph_of(A, parameters={"y": 1})),
    (r"parameters=\): got 'a'; node 'a' gives it", lambda: graph_of(A, parameters={"a": 1})),
    (r"outputs=\): got 'b'; no node gives it; there are a", lambda: graph_of(A, outputs=("b",))),
    (r"report=\): got 'a'; a node gives", lambda: graph_of(A, report="a")),
    (r"fallback=\): got \{'b': 1\}; give a value for each of 'a'", lambda: graph_of({**A, "fallback": {"b": 1}})),
    (r"on_error=\): got \{\}; give a value for each of 'a'", lambda: graph_of({**A, "on_error": {}})),
    (r"fallback=\): got 'y'; a fallback takes what 'a' takes: 'x'", lambda: graph_of({**A, "fallback": lambda y: y})),
    (r"got 'a -> a'; these nodes wait for each other", lambda: graph_of({**A, "after": "a"})),
    (
        r"got 'b -> c -> b'; these nodes wait for each other in a circle",
        lambda: graph_of(
            {"function": lambda a, c: 0, "name": "b"}, {"function": lambda b: 0, "name": "c"}, A,
            {"function": lambda c: 0, "name": "d"},
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("message", "build"), REFUSED, ids=range(len(REFUSED)))
def test_refused_when_built(message: str, build: Callable[[], Any]) -> None:
    """What cannot work is refused with the setting, what was given, and what to do, before any row comes."""
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_pipeline_checks_its_graph() -> None:
    """Adding a graph to a pipeline is building it; afterwards it takes no further node."""
    with pytest.raises(ConfigError, match="at least one node"):
        Pipeline("p").add(Graph("g"))
    graph = graph_of(A)
    pipeline = Pipeline("p").add(graph)
    assert [stage.name for stage in pipeline.stages] == ["g"]
    with pytest.raises(ConfigError, match="before graph 'g' goes into a pipeline"):
        graph.add(lambda: 1, name="late")


# --- order and company -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
async def test_ready_ones_run_together(ctx: RowContext, is_async: bool) -> None:
    """Two nodes that each wait for the other to have begun: it ends only if they run at the same time."""
    graph = Graph("g")
    met, meeting = asyncio.Barrier(2), threading.Barrier(2, timeout=10)

    async def meet_async(a: int) -> int:
        await met.wait()
        return a

    def meet(a: int) -> int:
        meeting.wait()
        return a

    options: dict[str, Any] = {} if is_async else {"concurrency": 2}
    graph.add(meet_async if is_async else meet, name="left", **options)
    graph.add(meet_async if is_async else meet, name="right", **options)
    graph.add(lambda left, right: left + right, name="sum")
    async with asyncio.timeout(10):
        assert (await graph.run({"a": 1}, ctx)).outputs["sum"] == 2


async def test_no_node_waits_for_more_than_it_needs(ctx: RowContext) -> None:
    """The successor of a quick branch runs while a slow branch is still under way: no waves."""
    over = asyncio.Event()
    graph = Graph("g")

    @graph.node
    async def slow(a: int) -> int:
        await over.wait()
        return a

    graph.add(lambda a: a, name="quick")

    @graph.node(after="quick")
    async def successor(a: int) -> int:
        over.set()
        return a

    async with asyncio.timeout(10):
        assert (await graph.run({"a": 1}, ctx)).status == "completed"


async def test_plain_functions_never_run_on_the_event_loop(ctx: RowContext) -> None:
    """They may block; heartbeats must not. Neighbours of theirs share one trip to a thread."""
    here = threading.current_thread()
    graph = Graph("g").add(threading.current_thread, name="t1").add(lambda t1: threading.current_thread(), name="t2")

    @graph.node
    async def t3(t2: Any) -> Any:
        return threading.current_thread()

    outputs = (await graph.run({}, ctx)).outputs
    assert outputs["t3"] is here
    assert outputs["t1"] is outputs["t2"] is not here


async def test_side_effects_come_in_the_order_of_the_plan(ctx: RowContext) -> None:
    """Whatever order nodes end in: emitted rows and fields are ordered by dependencies, then by declaration."""
    graph = Graph("g")
    second_is_over = asyncio.Event()

    @graph.node
    async def first(ctx: RowContext) -> int:
        await second_is_over.wait()
        ctx.emit("t", {"n": 1})
        return 1

    @graph.node
    async def second(ctx: RowContext) -> int:
        ctx.emit("t", {"n": 2})
        second_is_over.set()
        return 2

    async with asyncio.timeout(10):
        result = await graph.run({}, ctx)
    assert [emit.row["n"] for emit in ctx.emitted] == [1, 2]
    assert list(result.row or ()) == ["first", "second"]


@pytest.mark.parametrize(
    "options", [{}, {"concurrency": 3}, {"retry": Retry(attempts=2)}], ids=["plain", "threads", "retry"]
)
async def test_effects_of_nodes_that_run_together_do_not_overwrite_each_other(
    ctx: RowContext, options: dict[str, Any]
) -> None:
    """Table writes, costs and the key of concurrent nodes all reach the row; a later node sees what was written."""
    graph = Graph("g")

    def write(name: str, ctx: RowContext) -> str:
        ctx.table("seen").put(name, 1)
        ctx.add_cost(Decimal("0.1"), tokens=1)
        if name == "b":
            ctx.key = "from b"
        return name

    for name in "abc":
        graph.add(partial(write, name), name=name, **options)

    @graph.node
    def last(a: str, b: str, c: str, ctx: RowContext) -> list[str]:
        return [*ctx.table("seen"), str(ctx.key)]

    ctx.table("seen").put("z", 1)
    assert (await graph.run({}, ctx)).outputs["last"] == ["a", "b", "c", "z", "from b"]
    assert list(ctx.table("seen")) == ["a", "b", "c", "z"]
    assert len(ctx.operations) == 4
    assert (ctx.cost, ctx.tokens, ctx.key) == (Decimal("0.3"), 3, "from b")


async def test_of_a_failed_node_only_the_cost_stays(ctx: RowContext) -> None:
    """A row that goes on without a node goes on without what that node emitted or wrote; the money is spent."""
    graph = Graph("g", on_failure="keep")

    @graph.node
    def bad(ctx: RowContext) -> None:
        ctx.emit("t", {})
        ctx.table("seen").put("x", 1)
        ctx.add_cost(2, tokens=5)
        raise ValueError("bad")

    assert (await graph.run({"a": 1}, ctx)).row == {"a": 1}
    assert (ctx.emitted, list(ctx.operations), ctx.cost, ctx.tokens) == ([], [], Decimal(2), 5)


# --- conditions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_condition_that_is_not_met(ctx: RowContext, is_async: bool) -> None:
    """The node is skipped, with what needs its output; a default stands in, and mere order loses nothing."""
    graph = Graph("g", parameters={"language": "en"})

    async def judge_async(text: str) -> str:
        return text

    def judge(text: str) -> str:
        return text

    graph.add(judge_async if is_async else judge, name="judge", when=lambda v: v["lang"] == v["language"])
    graph.add(lambda language: language, name="uses")
    graph.add(lambda judge: judge, name="needs").add(lambda needs: needs, name="further")
    graph.add(lambda judge="none": judge, name="default").add(lambda text: text, name="order", after="judge")
    result = await graph.run({"text": "hallo", "lang": "de", "judge": "the row's own"}, ctx)
    assert result.status == "completed"
    assert states(result.nodes) == {
        "judge": "skipped", "uses": "completed", "needs": "skipped", "further": "skipped", "default": "completed",
        "order": "completed",
    }  # fmt: skip
    assert result.outputs == {"uses": "en", "default": "none", "order": "hallo"}
    assert result.nodes["judge"].error == "skipped: its condition was not met"
    assert result.nodes["needs"].error == "skipped: dependency 'judge' was skipped"
    assert result.nodes["judge"].attempts == 0
    assert (await graph.run({"text": "hello", "lang": "en"}, ctx)).outputs["further"] == "hello"


async def test_a_condition_sees_outputs_and_context(ctx: RowContext) -> None:
    """It sees what the nodes gave that its own waits for, and may ask for the context."""
    graph = Graph("g").add(lambda a: a * 2, name="twice")
    graph.add(lambda twice: twice, name="big", when=lambda values, ctx: values["twice"] > ctx.offset)
    assert (await graph.run({"a": 3}, ctx)).nodes["big"].state == "skipped"
    assert (await graph.run({"a": 4}, ctx)).nodes["big"].state == "completed"


async def test_a_condition_that_raises(ctx: RowContext) -> None:
    """The node fails, unrun."""
    result = await Graph("g").add(lambda: 1, name="a", when=lambda values: values["none"]).run({}, ctx)
    assert (result.status, result.nodes["a"].state) == ("failed", "failed")
    assert "ConditionError: when= raised KeyError: 'none'" in (result.nodes["a"].error or "")


# --- failures ----------------------------------------------------------------------------------------------------


def broken(*, is_async: bool, **options: Any) -> Graph:
    """``bad`` fails; ``needs``, ``further`` and ``ordered`` depend on it; ``free`` and ``next`` do not."""
    graph = Graph("g", **options)

    async def bad_async(a: int) -> int:
        raise ValueError("no answer")

    def bad(a: int) -> int:
        raise ValueError("no answer")

    graph.add(bad_async if is_async else bad, name="bad").add(lambda a: a, name="free")
    graph.add(lambda bad=0: bad, name="needs").add(lambda needs: needs, name="further")
    graph.add(lambda a: a, name="ordered", after="bad").add(lambda free: free + 1, name="next")
    return graph


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_failure_skips_its_dependents_and_nothing_else(ctx: RowContext, is_async: bool) -> None:
    """Dependents are skipped and say why, defaults or not; independent branches go on to their end."""
    result = await broken(is_async=is_async).run({"a": 1}, ctx)
    assert (result.row, result.status, result.outputs) == (None, "failed", {"free": 1, "next": 2})
    assert result.nodes["bad"].state == "failed"
    assert (result.nodes["bad"].error or "").startswith("ValueError: no answer (test_graph.py:")
    for name in ("needs", "further", "ordered"):
        assert result.nodes[name] == NodeReport("skipped", 0, None, "skipped: dependency 'bad' failed")


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_row_that_fails_with_its_nodes(ctx: RowContext, is_async: bool) -> None:
    """In a chain the row's failure is a GraphError that names what failed and what was skipped."""
    outcome = await through(broken(is_async=is_async), {"a": 1}, ctx)
    assert isinstance(outcome, Failure)
    assert (outcome.stage, outcome.kind) == ("g", "GraphError")
    assert outcome.message.startswith("graph 'g': node 'bad' failed: ValueError: no answer (test_graph.py:")
    assert outcome.message.endswith("; skipped: 'needs', 'further', 'ordered'")
    assert isinstance(outcome.error, GraphError)
    assert isinstance(outcome.error.__cause__, ValueError)
    assert outcome.error.nodes["free"].state == "completed"


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_row_that_is_kept(ctx: RowContext, is_async: bool) -> None:
    """With on_failure="keep" it goes on with what there is, and the report tells what is not."""
    outcome = await through(broken(is_async=is_async, on_failure="keep", report="how"), {"a": 1}, ctx)
    assert isinstance(outcome, dict)
    how = outcome.pop("how")
    assert outcome == {"a": 1, "free": 1, "next": 2}
    assert how["needs"] == {
        "state": "skipped",
        "attempts": 0,
        "seconds": None,
        "error": "skipped: dependency 'bad' failed",
    }
    assert how["free"] == {"state": "completed", "attempts": 1, "seconds": 0.0, "error": None}
    assert (await broken(is_async=is_async, on_failure="keep").run({"a": 1}, ctx)).status == "partial"


async def test_a_missing_field(ctx: RowContext) -> None:
    """It is the failure of the node that needs it, naming both; what needs nothing of it goes on."""
    graph = Graph("g").add(lambda text: text, name="words").add(lambda a: a, name="free")
    result = await graph.run({"a": 1}, ctx)
    assert states(result.nodes) == {"words": "failed", "free": "completed"}
    assert result.nodes["words"].error == (
        "missing_input: node 'words' needs 'text': the row has no such field, and nothing else provides it"
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [({"timeout": 0.01}, "HandlerTimeoutError"), ({"retry": Retry(deadline=0.01)}, "HandlerTimeoutError")],
)
async def test_a_node_that_takes_too_long(ctx: RowContext, options: dict[str, Any], error: str) -> None:
    """Its time-out is its own failure; the others are not disturbed."""
    graph = Graph("g", on_failure="keep")

    async def slow() -> None:
        await asyncio.Event().wait()

    graph.add(slow, **options).add(lambda: 1, name="free")
    result = await graph.run({}, ctx)
    assert (result.row, states(result.nodes)) == ({"free": 1}, {"slow": "failed", "free": "completed"})
    assert (result.nodes["slow"].error or "").startswith(error)
    assert HandlerTimeoutError.__name__ == error


# --- policies of nodes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_node_is_retried_by_itself(ctx: RowContext, is_async: bool) -> None:
    """Attempts and time of each node are its own; the neighbours run once."""
    calls = []

    def flaky(a: int, ctx: RowContext) -> int:
        calls.append("flaky")
        ctx.emit("t", {"n": len(calls)})
        if len(calls) < 3:
            raise ConnectionError("down")
        return a

    async def flaky_async(a: int, ctx: RowContext) -> int:
        return flaky(a, ctx)

    graph = Graph("g").add(lambda a: a, name="free")
    graph.add(flaky_async if is_async else flaky, name="flaky", retry=Retry(attempts=3, first=1.0))
    result = await graph.run({"a": 1}, ctx)
    assert result.nodes["free"] == NodeReport("completed", 1, 0.0)
    assert result.nodes["flaky"] == NodeReport("completed", 3, 1.5)  # half of 1 s, half of 2 s
    assert [emit.row["n"] for emit in ctx.emitted] == [3]


async def test_a_node_that_gave_up(ctx: RowContext) -> None:
    """The report counts its attempts."""
    graph = Graph("g").add(lambda: 1 / 0, name="bad", retry=Retry(attempts=4, first=0))
    assert (await graph.run({}, ctx)).nodes["bad"].attempts == 4


FALLBACKS: list[Any] = [
    {"score": 9, "label": "?"},
    lambda words: (9, "?"),
    lambda words, ctx: {"score": 2 + ctx.offset, "label": "?"},
]


@pytest.mark.parametrize("options", [{}, {"retry": Retry(attempts=2, first=0)}], ids=["alone", "retry"])
@pytest.mark.parametrize("fallback", FALLBACKS, ids=["fields", "function", "with context"])
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_fallback(ctx: RowContext, is_async: bool, fallback: Any, options: dict[str, Any]) -> None:
    """It gives the node's outputs in its place, from the node's own inputs; dependents go on with them."""

    def bad(words: str, factor: int = 1) -> None:
        raise ConnectionError

    async def bad_async(words: str, factor: int = 1) -> None:
        raise ConnectionError

    graph = Graph("g").add(lambda score: score + 1, name="next")
    graph.add(bad_async if is_async else bad, name="judge", outputs=("score", "label"), fallback=fallback, **options)
    result = await graph.run({"words": "a"}, ctx)
    assert result.outputs == {"score": 9, "label": "?", "next": 10}
    assert ctx.is_defaulted


async def test_a_node_that_may_fail(ctx: RowContext) -> None:
    """on_error="skip": it counts as skipped, its dependents take their defaults, and the row goes on."""
    graph = Graph("g").add(lambda: 1 / 0, name="bad", on_error="skip")
    graph.add(lambda bad=7: bad, name="default").add(lambda bad: bad, name="needs")
    result = await graph.run({}, ctx)
    assert (result.status, result.row) == ("completed", {"default": 7})
    assert states(result.nodes) == {"bad": "skipped", "default": "completed", "needs": "skipped"}
    assert (result.nodes["bad"].error or "").startswith("skipped: ZeroDivisionError: division by zero")


async def test_calls_at_once(ctx: RowContext) -> None:
    """A node's own ``concurrency`` holds over all rows; without it only the graph's does."""
    running = {"limited": 0, "free": 0}
    most = {"limited": 0, "free": 0}

    async def busy(name: str) -> None:
        running[name] += 1
        most[name] = max(most[name], running[name])
        for _ in range(3):
            await asyncio.sleep(0)
        running[name] -= 1

    graph = (
        Graph("g").add(partial(busy, "limited"), name="limited", concurrency=2).add(partial(busy, "free"), name="free")
    )
    async with asyncio.timeout(10):
        await asyncio.gather(*(graph.run({}, ctx.fork()) for _ in range(20)))
    assert most == {"limited": 2, "free": 20}


# --- stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    ("error", "options"), [(StopExecution("enough"), {}), (ValueError("worse"), {"on_error": "fail"})]
)
async def test_a_node_that_ends_the_session(
    ctx: RowContext, is_async: bool, error: Exception, options: dict[str, Any]
) -> None:
    """The others are cancelled and awaited, nothing further begins, and the error goes on its way."""
    graph = Graph("g")
    has_begun, log = asyncio.Event(), []

    @graph.node
    async def other() -> None:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            log.append("cancelled")

    graph.add(lambda other: 1, name="later")

    async def begun() -> None:
        await has_begun.wait()

    def stop() -> None:
        raise error

    async def stop_async() -> None:
        raise error

    graph.add(begun).add(stop_async if is_async else stop, name="stop", after="begun", **options)
    nodes: dict[str, NodeReport] = {}
    async with asyncio.timeout(10):
        with pytest.raises(StopExecution if isinstance(error, StopExecution) else GraphError) as caught:
            await graph.run({}, ctx, nodes=nodes)
    assert log == ["cancelled"]
    assert states(nodes) == {"other": "cancelled", "later": "not_run", "begun": "completed", "stop": "failed"}
    if isinstance(caught.value, GraphError):
        assert caught.value.then == "fail"
        assert caught.value.__cause__ is error
    else:
        assert caught.value is error


async def test_a_plain_graph_stops_as_well(ctx: RowContext) -> None:
    """StopExecution in a graph of plain functions is what the chain sees."""

    def stop() -> None:
        raise StopExecution

    outcome = await through(Graph("g").add(stop), {}, ctx)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "StopExecution"
    assert outcome.halts


@pytest.mark.parametrize("swallows", [False, True])
async def test_cancelling_the_row(ctx: RowContext, swallows: bool) -> None:
    """All nodes are cancelled and awaited; one that swallows it releases no other; the reports tell where it was."""
    graph = Graph("g")
    begun: list[str] = []
    log: list[str] = []

    async def wait(name: str) -> None:
        begun.append(name)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append(name)
            if not swallows:
                raise

    graph.add(partial(wait, "a"), name="a").add(partial(wait, "b"), name="b", timeout=60).add(
        lambda a: log.append("c"), name="c"
    )
    nodes: dict[str, NodeReport] = {}
    task = asyncio.create_task(graph.run({}, ctx, nodes=nodes))
    async with asyncio.timeout(10):
        while len(begun) < 2:
            await asyncio.sleep(0)
        assert states(nodes) == {"a": "running", "b": "running", "c": "pending"}
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert sorted(log) == ["a", "b"]
    assert states(nodes) == {"a": "cancelled", "b": "cancelled", "c": "not_run"}


async def test_cancelling_a_line(ctx: RowContext) -> None:
    """A graph in which nothing runs together has no tasks of its own, and is cancelled like any coroutine."""
    begun = asyncio.Event()

    async def wait(n: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    nodes: dict[str, NodeReport] = {}
    task = asyncio.create_task(in_turn("a").add(wait, name="w", inputs="a").run({"n": 1}, ctx, nodes=nodes))
    async with asyncio.timeout(10):
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert states(nodes) == {"a": "completed", "w": "cancelled"}


async def test_a_thread_that_nobody_waits_for_begins_no_further_node(ctx: RowContext) -> None:
    """Python cannot stop a thread, but what comes behind the running function is not run."""
    begun, go_on, log = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        assert go_on.wait(10)
        log.append("first is over")

    graph = Graph("g").add(first).add(lambda first: log.append("second"), name="second")
    task = asyncio.create_task(graph.run({}, ctx))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    async with asyncio.timeout(10):
        while ctx.runtime.pool.abandoned:
            await asyncio.sleep(0)
    assert log == ["first is over"]


# --- in a pipeline -----------------------------------------------------------------------------------------------


async def through(graph: Graph, row: dict[str, Any], ctx: RowContext) -> Any:
    """What a chain of this graph alone makes of a row."""
    outcomes: list[Any] = [row]
    async with asyncio.timeout(10):
        await Chain([make_stage(graph)]).run(outcomes, [ctx], ctx.runtime)
    return outcomes[0]


@pytest.mark.parametrize("is_async", [True, False])
def test_a_graph_is_a_stage(is_async: bool) -> None:
    """A pipeline runs it between other stages, under its name; of plain functions alone it is a plain stage."""
    graph = Graph("enrich", parameters={"model": "small"}, outputs=("label",))

    async def judge_async(words: list[str], model: str) -> str:
        return f"{model}:{len(words)}"

    def judge(words: list[str], model: str) -> str:
        return f"{model}:{len(words)}"

    graph.add(lambda text: text.split(), name="words").add(judge_async if is_async else judge, name="label")
    pipeline = Pipeline("p").add(lambda row: {**row, "text": row["text"].lower()}, name="lower").add(graph)
    assert [stage.name for stage in pipeline.stages] == ["lower", "enrich"]
    assert pipeline.stages[1].is_plain is not is_async
    assert [stage.name for stage in graph.stages] == ["enrich-words", "enrich-label"]
    assert pipeline.process({"text": "A B"}) == [{"text": "a b", "label": "small:2"}]


async def test_without_a_context() -> None:
    """In a notebook a row is all it takes."""
    graph = in_turn("a", "b", "c")
    async with asyncio.timeout(10):
        assert (await graph.run({"n": 0})).row == {"n": 0, "a": 1, "b": 2, "c": 3}


def test_describing_a_graph() -> None:
    """As JSON for tools, and as text for people: in the order of the plan."""
    graph = Graph("g", parameters={"model": "m"})
    graph.add(lambda words, model: 0, name="judge", outputs=("score", "label"), inputs=("words",))
    graph.add(lambda text: 0, name="words").add(lambda row: 0, name="notify", outputs=(), after="judge")
    assert graph.describe() == {
        "name": "g",
        "nodes": [
            {"name": "words", "inputs": ["text"], "outputs": ["words"], "after": []},
            {"name": "judge", "inputs": ["words", "model"], "outputs": ["score", "label"], "after": []},
            {"name": "notify", "inputs": [], "outputs": [], "after": ["judge"]},
        ],
        "edges": [["words", "judge", "words"], ["judge", "notify", None]],
    }
    assert str(graph).splitlines() == [
        "graph g", "  words(text) -> words", "  judge(words, model) -> score, label", "  notify()  after judge",
    ]  # fmt: skip
