"""Stages with policies on virtual time: hours of backing off pass in milliseconds, the same way every time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from rowmill.handlers.chain import Chain
from rowmill.handlers.context import RowContext
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.flow import Flight, Flow
from rowmill.handlers.outcomes import Failure, Outcome
from rowmill.handlers.runtime import Event, Runtime
from rowmill.handlers.stage import Stage
from simulation.loop import SimLoop
from simulation.machine import SimClock, SimPool

T = TypeVar("T")


def virtual(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run it on a loop of its own whose time is virtual; what it leaves behind is ended."""
    loop = SimLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work())
    finally:
        loop.dispose(())
        asyncio.set_event_loop(None)


def virtual_runtime(seed: int = 0) -> Runtime:
    """A runtime on the running virtual loop; calls of blocking handlers run at once."""
    loop, chance = cast(SimLoop, asyncio.get_running_loop()), random.Random(seed)
    return Runtime(cast(BlockingPool, SimPool(loop, chance, 0.0)), SimClock(loop, chance))


_ROWS = {"rows", "out", "dropped", "failed", "seconds"}


@dataclass
class Passage:
    """What became of rows that went through a flow.

    Attributes:
        outcomes: by row number; rows that were given up are not among them.
        contexts: by row number.
        order: row numbers as they came out.
        seconds: when each came out, by row number.
        given_up: numbers of rows that ended undone.
        halted_by: what ended the session, if something did.
        events: what the runtime told.
        runtime: the runtime.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    contexts: list[RowContext] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    given_up: list[int] = field(default_factory=list)
    halted_by: Failure | None = None
    events: list[Event] = field(default_factory=list)
    runtime: Runtime | None = None

    def counts(self, stage: str) -> dict[str, Any]:
        """A stage's counts that are not 0, but for those of rows."""
        return {name: count for name, count in self._all_counts(stage).items() if count and name not in _ROWS}

    def row_counts(self, stage: str) -> tuple[int, int, int, int]:
        """Rows that went into a stage, came out of it, were dropped there, and failed there."""
        counts = self._all_counts(stage)
        return counts["rows"], counts["out"], counts["dropped"], counts["failed"]

    def _all_counts(self, stage: str) -> dict[str, Any]:
        assert self.runtime is not None
        return self.runtime.stage_counts[stage].to_dict()


def passage(
    stages: Sequence[Stage],
    rows: Sequence[dict[str, Any]],
    *,
    keys: Sequence[object] | None = None,
    seed: int = 0,
    during: Callable[[Flow, Runtime], Coroutine[Any, Any, None]] | None = None,
) -> Passage:
    """Send rows through a flow of these stages on virtual time, until each is done or given up.

    Args:
        stages: the chain.
        rows: the rows; row n is the n-th.
        keys: one per row: rows of a key keep their order. None: no order.
        seed: the chance's.
        during: runs beside them, once they are in.
    """

    async def work() -> Passage:
        seen, done = Passage(runtime=virtual_runtime(seed)), asyncio.Event()
        loop, runtime = asyncio.get_running_loop(), cast(Runtime, seen.runtime)
        runtime.listeners.append(seen.events.append)

        def finished() -> None:
            if len(seen.outcomes) + len(seen.given_up) == len(rows):
                done.set()

        def on_done(flight: Flight) -> None:
            assert flight.sender not in seen.outcomes, "a row came out twice"
            seen.outcomes[flight.sender] = flight.value
            seen.seconds[flight.sender] = loop.time()
            seen.order.append(flight.sender)
            finished()

        def on_given_up(flights: Sequence[Flight], failure: Failure | None) -> None:
            seen.given_up += [flight.sender for flight in flights]
            seen.halted_by = seen.halted_by or failure
            finished()

        flow = Flow(Chain(stages), runtime, on_done, lambda: None, on_given_up, by_key=keys is not None, linger=0.02)
        for number, row in enumerate(rows):
            context = RowContext("rows", 0, number, 0, None, (), "test", None, runtime)
            seen.contexts.append(context)
            flow.enter(Flight(row, context, keys[number] if keys else None, number))
        beside = asyncio.create_task(during(flow, runtime)) if during is not None else None
        await asyncio.wait({asyncio.create_task(done.wait())}, timeout=90_000)
        flow.check()
        if beside is not None:
            await beside
        await flow.close()
        return seen

    return virtual(work)
