"""Graphs: the stages of one row with dependencies, run in one process without topics in between."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, overload

from ..state.errors import ConfigError
from ..state.model import Row
from .context import RowContext
from .errors import GraphError, StageFailedError, StopExecution
from .executors import BlockingPool
from .graph_nodes import SPECIAL, Inputs, Names, Node, make_node
from .graph_plan import Plan, make_plan
from .graph_run import HaltError, NodeReport, Run
from .options import check_name
from .runtime import Runtime
from .stage import Handler, Stage

__all__ = ["Graph", "GraphError", "GraphResult", "NodeReport"]

F = TypeVar("F", bound=Handler)
OnFailure = Literal["fail", "keep"]
Status = Literal["completed", "partial", "failed"]

_THREADS: Final = 4
"""Of a run that was given no context, and so no runtime."""


@dataclass(frozen=True, slots=True)
class GraphResult:
    """What became of one row in a graph.

    Attributes:
        row: the result row; None if the row failed.
        nodes: a report for each node, by name, in the order of the plan.
        status: ``completed``; ``partial``: nodes failed, and the row goes on with ``on_failure="keep"``; ``failed``.
        outputs: every value that a completed node gave, by name.
    """

    row: Row | None
    nodes: dict[str, NodeReport]
    status: Status
    outputs: Row


class Graph:
    """Functions that work on one row, each with the outputs of others as its inputs. Added to a pipeline as one stage.

    What a parameter called ``x`` of a node's function gets, in this order: the output ``x`` of another node; the row's
    field ``x``; the graph's parameter ``x``; the function's default. ``row`` and ``ctx`` are special: a copy of the
    input row, and the row's context. A node that gives what it takes (``def text(text)``) takes the row's field.

    Order: a node runs when all that it waits for are over; nodes that are ready together run together. Async functions
    run on the event loop, blocking ones with a policy or ``concurrency=`` on threads of their own. Plain functions
    without options are taken for quick: they run one after the other on one thread (a graph of nothing else costs
    little more than its calls). What nodes do through ``ctx`` (``emit``, tables, key, headers) joins the row in the
    plan's order (by dependencies, then by declaration), whatever order they ended in; of a node that did not complete
    only its cost stays.

    Failures: what depends on a failed node is skipped, the rest runs to its end. A node whose condition is not met is
    skipped, and so is what takes its outputs, unless the function has a default for them; ``after=`` such a node
    nothing is missing, and nothing is skipped.

    Args:
        name: the stage's name; its nodes are the stages ``<name>-<node>`` in counts and caches.
        parameters: values by name, for functions that ask for them.
        inputs: the fields that rows have, so that a misspelt name is refused when the graph is built. Default: any.
        outputs: which outputs of nodes go into the result row. Default: all of them.
        on_failure: what becomes of the row when a node failed. ``fail``: so does the row, with a GraphError that names
            the nodes. ``keep``: it goes on with what there is.
        report: a field of the result row for ``{node: {state, attempts, seconds, error}}``. Default: none.

    Raises:
        ConfigError: naming the option, what was given, and what to give instead.
    """

    def __init__(
        self,
        name: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        on_failure: OnFailure = "fail",
        report: str | None = None,
    ) -> None:
        check_name("Graph(name)", name)
        if on_failure not in {"fail", "keep"}:
            raise ConfigError("Graph(on_failure=)", on_failure, "use 'fail' or 'keep'")
        if report is not None and (not isinstance(report, str) or not report):
            raise ConfigError("Graph(report=)", report, "give a field's name, or leave it out")
        self.name = self.__name__ = name
        self.parameters = _parameters(parameters)
        self.inputs = _fields("inputs", inputs)
        self.outputs = _fields("outputs", outputs)
        self.on_failure = on_failure
        self.report = report
        self._nodes: dict[str, Node] = {}
        self._plan: Plan | None = None
        self._is_taken = False  # a pipeline has looked at it
        self.__signature__ = inspect.signature(self._run_awaited)

    # --- building -------------------------------------------------------------------------------------------------

    @overload
    def node(self, function: F) -> F: ...
    @overload
    def node(
        self,
        function: None = None,
        *,
        name: str | None = None,
        inputs: Inputs | None = None,
        outputs: Names | None = None,
        after: Names = (),
        when: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Callable[[F], F]: ...
    def node(self, function: Any = None, **options: Any) -> Any:
        """Decorator: add a function as a node, bare or with the options of :meth:`add`. It stays a function."""
        if function is not None:
            self.add(function)
            return function

        def decorate(decorated: F) -> F:
            self.add(decorated, **options)
            return decorated

        return decorate

    def add(
        self,
        function: Handler,
        *,
        name: str | None = None,
        inputs: Inputs | None = None,
        outputs: Names | None = None,
        after: Names = (),
        when: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Graph:
        """Add a function as a node; returns the graph, so that calls chain.

        Args:
            function: sync or async; its parameters are its inputs.
            name: 1 to 80 letters, digits, ``_`` and ``-``. Default: the function's own name.
            inputs: names of values for the function's parameters: those that are called like a parameter go there,
                the others to the remaining parameters in order. Or a dict ``{parameter: name of a value}``. Parameters
                that are not mentioned get the value of their own name.
            outputs: names for what the function returns. One: the result. Several: a tuple or list of so many, or a
                dict with these keys, whose other keys are dropped. ``()``: none. Default: the node's name.
            after: nodes (or outputs) that must be over before, without giving anything to this one.
            when: function of (values) or (values, ctx): whether to run it. ``values`` are the graph's parameters, the
                row's fields and the outputs of the nodes that this one waits for.
            options: policies, as for :func:`~rowmill.handlers.stage.make_stage`. A ``fallback`` is a dict with a value
                for each output, or a function that takes what the node takes, or less.

        Raises:
            ConfigError: naming the option, what was given, and what to give instead.
        """
        if self._is_taken:
            raise ConfigError(
                "node(function)", function, f"add all nodes before graph {self.name!r} goes into a pipeline"
            )
        node = make_node(
            self.name, function, name=name, inputs=inputs, outputs=outputs, after=after, when=when, options=options
        )
        if node.name in self._nodes:
            raise ConfigError("node(name=)", node.name, "another node has this name; give each its own")
        for other in self._nodes.values():
            for output in set(node.outputs) & set(other.outputs):
                raise ConfigError("node(outputs=)", output, f"node {other.name!r} gives it already; name it otherwise")
        self._nodes[node.name] = node
        self._plan = None
        return self

    def check(self) -> None:
        """See whether the graph can work. A pipeline does this when the graph is added to it.

        Raises:
            ConfigError: there are no nodes; a name in ``inputs=``, ``after=`` or the graph's ``outputs=`` that nothing
                provides; a parameter that nothing takes; or nodes that wait for each other in a circle.
        """
        self._made_plan()

    def _made_plan(self) -> Plan:
        """Made once for each state of the graph."""
        if self._plan is None:
            plan = make_plan(self.name, list(self._nodes.values()), self.parameters, self.inputs)
            given = [output for node in self._nodes.values() for output in node.outputs]
            for output in self.outputs or ():
                if output not in given:
                    raise ConfigError("Graph(outputs=)", output, f"no node gives it; there are {', '.join(given)}")
            if self.report in given:
                raise ConfigError(
                    "Graph(report=)", self.report, "a node gives an output of this name; rename one of them"
                )
            self._plan = plan
        return self._plan

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages behind the nodes, for the engine: it counts threads and looks for shared resources."""
        return tuple(node.stage for node in self._nodes.values())

    # --- looking --------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The graph as JSON: ``{"name", "nodes": [{name, inputs, outputs, after}], "edges": [[from, to, value]]}``.

        In the plan's order; ``value`` is None where ``after=`` says it.

        Raises:
            ConfigError: the graph cannot work; see :meth:`check`.
        """
        steps = self._made_plan().steps
        nodes, edges = [], []
        for step in steps:
            node = step.node
            inputs = [feed.source for feed in step.feeds]
            nodes.append({"name": node.name, "inputs": inputs, "outputs": [*node.outputs], "after": [*node.after]})
            data = [
                [steps[feed.giver].node.name, node.name, feed.source] for feed in step.feeds if feed.giver is not None
            ]
            givers = {giver for giver, _, _ in data}
            order = [steps[place].node.name for place in step.waits_for]
            edges += data + [[name, node.name, None] for name in order if name not in givers]
        return {"name": self.name, "nodes": nodes, "edges": edges}

    def __str__(self) -> str:
        """One line for each node: ``judge(tokens, model) -> score, label  after x``."""
        lines = [f"graph {self.name}"]
        for node in self.describe()["nodes"]:
            after = f"  after {', '.join(node['after'])}" if node["after"] else ""
            outputs = f" -> {', '.join(node['outputs'])}" if node["outputs"] else ""
            lines.append(f"  {node['name']}({', '.join(node['inputs'])}){outputs}{after}")
        return "\n".join(lines)

    # --- running --------------------------------------------------------------------------------------------------

    @property
    def __call__(self) -> Callable[..., Any]:
        """The graph as a handler: of (row, ctx), async unless all of its nodes are plain functions.

        A property, so that the stage it is added to sees which of the two it is, and the graph is checked then.
        """
        self._is_taken = True
        return self._run_plain if self._made_plan().is_quick else self._run_awaited

    def _run_plain(self, row: Row, ctx: RowContext) -> Row:
        plan = self._made_plan()
        run = Run(plan, row, ctx, None if self.report is None else ctx.runtime.clock)
        try:
            run.run_quick(plan.steps)
        except HaltError as halt:
            self._raise(halt, run)
        return self._row(run)

    async def _run_awaited(self, row: Row, ctx: RowContext) -> Row:
        runtime = ctx.runtime
        run = Run(self._made_plan(), row, ctx, None if self.report is None else runtime.clock)
        await self._follow(run, runtime)
        return self._row(run)

    async def run(
        self, row: Row, ctx: RowContext | None = None, *, nodes: dict[str, NodeReport] | None = None
    ) -> GraphResult:
        """One row through the graph, with a report: for tests and notebooks.

        Args:
            row: the input.
            ctx: the row's context. Default: one made for this, with threads of its own.
            nodes: a dict that is filled with the nodes' reports at the beginning; they change while the row is under
                way, and can be looked at meanwhile, or after this was cancelled.

        Raises:
            ConfigError: the graph cannot work; see :meth:`check`.
            StopExecution: a node raised it.
            GraphError: a node with ``on_error="fail"`` failed. Other failures are in the result.
        """
        plan = self._made_plan()
        pool = BlockingPool(_THREADS) if ctx is None else None
        if ctx is None:
            assert pool is not None  # noqa: S101 - made one line above
            ctx = RowContext(self.name, 0, 0, 0, None, (), "graph", None, Runtime(pool))
        try:
            run = Run(plan, row, ctx, ctx.runtime.clock)
            reports = _reports(run)
            if nodes is not None:
                nodes.update(reports)
            await self._follow(run, ctx.runtime)
        finally:
            if pool is not None:
                pool.close()
        failed = bool(run.failures)
        outputs = {name: value for place in sorted(run.outputs) for name, value in run.outputs[place].items()}
        if failed and self.on_failure == "fail":
            run.join_effects(costs_only=True)
            return GraphResult(None, reports, "failed", outputs)
        return GraphResult(self._row(run), reports, "partial" if failed else "completed", outputs)

    async def _follow(self, run: Run, runtime: Runtime) -> None:
        try:
            await run.run(runtime)
        except HaltError as halt:
            self._raise(halt, run)

    def _row(self, run: Run) -> Row:
        """The result row.

        Raises:
            GraphError: nodes failed, and the row with them.
        """
        if run.failures and self.on_failure == "fail":
            run.join_effects(costs_only=True)
            raise self._error(run)
        run.join_effects(costs_only=False)
        known = run.known
        if self.outputs is not None:
            row = {**run.row, **{name: known[name] for name in self.outputs if name in known}}
        else:
            row = dict(run.row)
            for place in sorted(run.outputs):  # in the plan's order, so that equal rows look equal
                row.update(run.outputs[place])
        if self.report is not None:
            row[self.report] = {name: report.to_dict() for name, report in _reports(run).items()}
        return row

    def _raise(self, halt: HaltError, run: Run) -> None:
        run.join_effects(costs_only=True)
        if isinstance(halt.failure.error, StopExecution):
            raise halt.failure.error from None
        if halt.failure.then == "stop":  # the session ends, or pauses, while a node waits: the row stays undone
            raise StageFailedError(halt.failure, halt.failure.message)
        raise self._error(run) from halt.failure.error

    def _error(self, run: Run) -> GraphError:
        reports = _reports(run)
        failures = [run.failures[place] for place in sorted(run.failures)]
        parts = [
            f"node {name!r} failed: {report.error}" for name, report in reports.items() if report.state == "failed"
        ]
        skipped = [repr(name) for name, report in reports.items() if report.state == "skipped"]
        if skipped:
            parts.append(f"skipped: {', '.join(skipped)}")
        error = GraphError(f"graph {self.name!r}: {'; '.join(parts)}", reports, failures)
        error.__cause__ = failures[0].error
        return error


def _reports(run: Run) -> dict[str, NodeReport]:
    return {step.node.name: report for step, report in zip(run.plan.steps, run.reports, strict=True)}


def _parameters(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    given = {} if parameters is None else parameters
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConfigError("Graph(parameters=)", parameters, "give a dict of values by name")
    for name in SPECIAL & given.keys():
        raise ConfigError("Graph(parameters=)", name, "'row' and 'ctx' mean the row and its context; name it otherwise")
    return dict(given)


def _fields(option: str, names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"Graph({option}=)", names, "give names in a tuple")
    return tuple(names)
