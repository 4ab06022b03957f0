"""One row's way through the plan of a graph."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from ..state.clock import Clock
from ..state.model import Row
from ..state.table import Operation, Put
from .calls import raise_if_cancelled
from .chain import attempt
from .context import RowContext
from .errors import ConditionError, MisfitError
from .graph_nodes import MISSING, ROW, NodeInputs
from .graph_plan import Plan, Step
from .outcomes import RAISED, Failure, Outcome, failure_of
from .recovery import recover
from .runtime import Runtime

State: TypeAlias = Literal["pending", "running", "completed", "failed", "skipped", "cancelled", "not_run"]


@dataclass(slots=True)
class NodeReport:
    """What became of one node for one row.

    Attributes:
        state: ``pending`` and ``running`` while the row is under way; in the end ``completed``; ``failed``; ``skipped``
            (its condition was not met, it failed under ``on_error="skip"``, or something it needs is not there);
            ``cancelled`` or ``not_run`` when the row's work was broken off.
        attempts: calls of the function; 0 for an answer that came from a cache.
        seconds: from its beginning to its end, waiting between attempts included; None unless it began and time was
            taken.
        error: what went wrong, or why it was skipped; None for completed ones.
    """

    state: State = "pending"
    attempts: int = 0
    seconds: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"state": self.state, "attempts": self.attempts, "seconds": self.seconds, "error": self.error}


class HaltError(Exception):
    """A node's failure that ends the session: the other nodes are cancelled."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Effects(NamedTuple):
    """A node's own context, and what it began with: the difference is what the node did."""

    context: RowContext
    key: str | bytes | None
    headers: Any
    timestamp: int
    operations: int

    @classmethod
    def begin(cls, context: RowContext) -> Effects:
        """From here on what happens in ``context`` is the node's."""
        return cls(context, context.key, context.headers, context.timestamp, len(context.operations))

    def show(self, target: RowContext) -> None:
        """Let ``target`` see the key, headers, timestamp and table writes that the node set."""
        done = self.context
        if done.key != self.key:
            target.key = done.key
        if done.headers != self.headers:
            target._headers = done.headers  # noqa: SLF001 - they were checked when the node set them
        if done.timestamp != self.timestamp:
            target.timestamp = done.timestamp
        _write(target, done, done.operations[self.operations :])

    def join(self, target: RowContext) -> None:
        """All that the node did, but for its cost, is the row's now."""
        self.show(target)
        target.emitted += self.context.emitted
        target.is_defaulted |= self.context.is_defaulted


def _write(target: RowContext, source: RowContext, operations: Sequence[Operation]) -> None:
    if not operations:
        return
    if target._tables is None:  # noqa: SLF001 - the same view, without what the other one wrote
        target._tables = source._open_tables(target)  # type: ignore[misc]  # noqa: SLF001
    tables = target._tables  # noqa: SLF001
    for operation in operations:
        if isinstance(operation, Put):
            tables.put(operation.key, operation.value)
        else:
            tables.update(operation.key, operation.function, operation.spec)


class Run:
    """One row in a graph.

    Args:
        plan: the graph's.
        row: the input; it is not changed.
        context: the row's; may be None if all nodes are plain functions that do not ask for it.
        clock: takes the time of each node; None: nobody wants to know.
    """

    __slots__ = (
        "_causes", "_context", "_effects", "_group", "_is_over", "_is_troubled", "_left", "_reports", "clock",
        "failures", "known", "outputs", "plan", "row",
    )  # fmt: skip

    def __init__(self, plan: Plan, row: Row, context: RowContext | None, clock: Clock | None) -> None:
        self.plan = plan
        self.row = row
        self.clock = clock
        self.known = dict(row)
        """Fields of the row, overlaid with what nodes gave."""
        self.outputs: dict[int, Row] = {}
        """What completed nodes gave, by their places."""
        self.failures: dict[int, Failure] = {}
        self._context = context
        self._reports: list[NodeReport] | None = None
        self._causes: dict[int, str] = {}  # of nodes that were skipped because some node failed: its name
        self._effects: dict[int, Effects] = {}
        self._is_troubled = False  # some node did not complete: from now on look before each step
        self._is_over = False
        self._left: list[int] = []
        self._group: asyncio.TaskGroup | None = None

    @property
    def reports(self) -> list[NodeReport]:
        """A report for each step; up to date once the run is over, or where time is taken."""
        for place in self.outputs:
            report = self._report(place)
            if report.state == "pending":  # it went by the bare path, which writes none
                report.state, report.attempts = "completed", 1
        return self._all_reports()

    def _report(self, place: int) -> NodeReport:
        return self._all_reports()[place]

    def _all_reports(self) -> list[NodeReport]:
        """Made when somebody asks for the first one."""
        if self._reports is None:
            self._reports = [NodeReport() for _ in self.plan.steps]
        return self._reports

    # --- plain functions, one after the other, on this thread -----------------------------------------------------

    def run_quick(self, steps: Sequence[Step]) -> None:
        """Run plain functions, in the plan's order. The hot path of graphs without policies.

        Raises:
            HaltError: one of them ends the session.
        """
        known, given, is_timed = self.known, self.outputs, self.clock is not None
        for step in steps:
            if self._is_over:  # nobody waits for this thread any more
                return
            if is_timed or step.is_watched or self._is_troubled:
                self._run_watched(step)
                continue
            inputs: Row = {}
            for parameter, source, default, _, _ in step.feeds:
                inputs[parameter] = value = known.get(source, default)
                if value is MISSING:
                    self._missing(step, source)
                    break
            else:
                try:
                    outputs = step.call(inputs, None)
                except RAISED as error:
                    self._failed(step, failure_of(step.node.stage, error))
                else:
                    given[step.index] = outputs
                    known.update(outputs)

    def _run_watched(self, step: Step) -> None:
        """Run one plain function, with everything that may be about it."""
        inputs: Row = {}
        if not self._begin(step, inputs):
            return
        stage, clock, report = step.node.stage, self.clock, self._report(step.index)
        context = self._context_of(step) if step.node.has_effects else None
        started = clock.monotonic() if clock is not None else 0.0
        report.attempts = 1
        try:
            outcome: Outcome = step.call(inputs, context)
        except RAISED as error:
            outcome = recover(stage, inputs, context, failure_of(stage, error))
        if clock is not None:
            report.seconds = clock.monotonic() - started
        self._settle(step, outcome)

    # --- all kinds of nodes, on the event loop --------------------------------------------------------------------

    async def run(self, runtime: Runtime) -> None:
        """Run all nodes, those together that are ready together.

        Raises:
            HaltError: one of them ends the session; the others were cancelled.
        """
        self._left = [len(step.waits_for) for step in self.plan.steps]
        try:
            if self.plan.is_quick:
                await self._run_on_thread(self.plan.steps, runtime)
            elif self.plan.is_line:
                await self._follow(self.plan.first, runtime)
            else:
                await self._follow_together(runtime)
        except BaseException:
            self._break_off()
            raise

    async def _follow_together(self, runtime: Runtime) -> None:
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._follow(self.plan.first, runtime)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _follow(self, ready: Sequence[Step], runtime: Runtime) -> None:
        """Run what is ready, and then what that makes ready, in this task as long as there is one thing to do."""
        while ready:
            units = _units(ready)
            for unit in units[1:]:
                assert self._group is not None  # noqa: S101 - only a line has none, and has one unit at a time
                self._group.create_task(self._follow(unit, runtime))
            done = await self._run_unit(units[0], runtime)
            ready = self._released(done)

    async def _run_unit(self, unit: Sequence[Step], runtime: Runtime) -> Sequence[Step]:
        """Run one awaited node, or plain ones with all plain ones that they release; what was run."""
        if unit[0].node.is_quick:
            unit = self._with_followers(unit)
            await self._run_on_thread(unit, runtime)
        else:
            await self._run_awaited(unit[0], runtime)
        return unit

    async def _run_on_thread(self, unit: Sequence[Step], runtime: Runtime) -> None:
        try:
            await runtime.pool.run(self.run_quick, unit)
        except BaseException:
            self._is_over = True  # at once: the thread goes on, and is not to begin a further node
            raise

    async def _run_awaited(self, step: Step, runtime: Runtime) -> None:
        inputs = NodeInputs()
        if not self._begin(step, inputs):
            return
        report = self._report(step.index)
        node, clock = step.node, self.clock
        context = self._context_of(step) if node.has_effects else self._context
        started = clock.monotonic() if clock is not None else 0.0
        try:
            if node.is_limited:
                async with runtime.slots(node.stage):
                    outcome = await attempt(node.stage, inputs, context, runtime)
            else:
                outcome = await attempt(node.stage, inputs, context, runtime)
            raise_if_cancelled()  # a node that swallowed its cancellation releases no other
            report.attempts = inputs.calls
            self._settle(step, outcome)
        finally:
            if clock is not None:
                report.seconds = clock.monotonic() - started

    def _settle(self, step: Step, outcome: Outcome) -> None:
        if self._is_over:
            return
        if isinstance(outcome, Failure):
            self._failed(step, outcome)
        elif isinstance(outcome, dict) and all(name in outcome for name in step.node.outputs):
            self._report(step.index).state = "completed"
            self.outputs[step.index] = outputs = {name: outcome[name] for name in step.node.outputs}
            self.known.update(outputs)
        else:  # not the function's doing, which is checked where it is called, but a schema's or a policy's
            message = f"node {step.node.name!r} came back without {', '.join(map(repr, step.node.outputs))}"
            self._failed(step, failure_of(step.node.stage, MisfitError(message)))

    def _with_followers(self, steps: Sequence[Step]) -> list[Step]:
        """These plain nodes, and those that only they hold back, in the plan's order: one trip to a thread for all."""
        unit = list(steps)
        left: dict[int, int] = {}
        for step in unit:
            for place in step.releases:
                left[place] = left.get(place, self._left[place]) - 1
                follower = self.plan.steps[place]
                if not left[place] and follower.node.is_quick:
                    unit.append(follower)
        return sorted(unit, key=_index)

    def _released(self, done: Sequence[Step]) -> list[Step]:
        """The nodes that can run now, in the plan's order."""
        released = []
        for step in done:
            for place in step.releases:
                self._left[place] -= 1
                if not self._left[place] and self.plan.steps[place] not in done:
                    released.append(self.plan.steps[place])
        return sorted(released, key=_index) if len(released) > 1 else released

    def _break_off(self) -> None:
        self._is_over = True
        for report in self.reports:
            if report.state == "running":
                report.state = "cancelled"
            elif report.state == "pending":
                report.state = "not_run"

    # --- before and after a node ----------------------------------------------------------------------------------

    def _begin(self, step: Step, inputs: Row) -> bool:
        """Fill in what the node is called with; False if it is not called."""
        if self._is_troubled and self._is_held_back(step):
            return False
        if step.node.when is not None and not self._is_wanted(step):
            return False
        known = self.known
        for parameter, source, default, giver, instead in step.feeds:
            value = known.get(source, default)
            if self._is_troubled and giver is not None and giver not in self.outputs:
                value = instead
            if value is MISSING:
                self._missing(step, source)
                return False
            inputs[parameter] = value
        if step.node.wants_row:
            inputs[ROW] = dict(self.row)
        self._report(step.index).state = "running"
        return True

    def _is_held_back(self, step: Step) -> bool:
        """Whether something that the node needs is not there. One that was merely skipped may have a substitute."""
        steps = self.plan.steps
        for place in step.waits_for:
            cause = self._causes.get(place) if place not in self.failures else steps[place].node.name
            if cause is not None:
                self._causes[step.index] = cause
                self._skip(step, f"dependency {cause!r} failed")
                return True
        for feed in step.feeds:
            if feed.giver is not None and feed.giver not in self.outputs and feed.instead is MISSING:
                self._skip(step, f"dependency {steps[feed.giver].node.name!r} was skipped")
                return True
        return False

    def _is_wanted(self, step: Step) -> bool:
        values = {**self.plan.parameters, **self.row}
        for place in step.waits_for:
            values.update(self.outputs.get(place, ()))
        when = step.node.when
        assert when is not None  # noqa: S101 - the caller has looked
        try:
            wanted = when(values, self._context) if _takes_two(when) else when(values)
        except Exception as error:  # noqa: BLE001 - a user's condition may raise anything
            raised = ConditionError(f"when= raised {type(error).__name__}: {error}")
            raised.__cause__ = error
            self._failed(step, failure_of(step.node.stage, raised))
            return False
        if not wanted:
            self._skip(step, "its condition was not met")
        return bool(wanted)

    def _missing(self, step: Step, source: str) -> None:
        message = f"node {step.node.name!r} needs {source!r}: the row has no such field, and nothing else provides it"
        self._failed(step, Failure(step.node.stage.name, "missing_input", message, attempts=0))

    def _skip(self, step: Step, why: str) -> None:
        self._is_troubled = True
        report = self._report(step.index)
        report.state, report.error = "skipped", f"skipped: {why}"

    def _failed(self, step: Step, failure: Failure) -> None:
        self._is_troubled = True
        report = self._report(step.index)
        report.attempts = max(report.attempts, failure.attempts)
        where = f" ({failure.where})" if failure.where else ""
        report.error = f"{failure.kind}: {failure.message}{where}"
        if failure.then == "skip":
            self._skip(step, report.error)
            return
        report.state = "failed"
        self.failures[step.index] = failure
        if failure.halts:
            raise HaltError(failure)

    # --- effects --------------------------------------------------------------------------------------------------

    def _context_of(self, step: Step) -> RowContext | None:
        """A context of the node's own, in which it sees what was done by those that came before it.

        Nodes that run at the same time do not see each other's doings, and cannot overwrite them.
        """
        if self._context is None:
            return None
        context = self._context.fork()
        for place in step.ancestors:
            if place in self.outputs and place in self._effects:
                self._effects[place].show(context)
        self._effects[step.index] = Effects.begin(context)
        return context

    def join_effects(self, *, costs_only: bool) -> None:
        """Give the row what its nodes did, in the plan's order whatever order they ended in.

        Of a node that did not complete only the cost stays.
        """
        if self._context is None:
            return
        for place in sorted(self._effects):
            effects = self._effects[place]
            self._context.pay(effects.context)
            if place in self.outputs and not costs_only:
                effects.join(self._context)


def _index(step: Step) -> int:
    return step.index


def _units(ready: Sequence[Step]) -> list[Sequence[Step]]:
    """What can be run at the same time: each awaited node by itself, all plain ones together."""
    if len(ready) == 1:
        return [ready]
    quick = [step for step in ready if step.node.is_quick]
    units: list[Sequence[Step]] = [[step] for step in ready if not step.node.is_quick]
    if quick:  # last: its trip to a thread would only delay the others, and it needs this task the least
        units.append(quick)
    return units


def _takes_two(when: Any) -> bool:
    try:
        return len(inspect.signature(when).parameters) > 1
    except (TypeError, ValueError):
        return False
