"""What policies cost a row on which nothing goes wrong, and that stages without policies pay nothing for them.

    python -m benchmarks.policies                          # microseconds a row above a stage without policies
    python -m benchmarks.policies --against 7274a8b        # plain and async stages, now and at another revision

Everything runs in this process, on one thread: 20,000 rows go through a Flow with one async stage, up to 200 of them
at a time as in a partition task, 100 calls at once. The handlers do nothing: one returns its row, the other gives way
to the event loop first, as every handler that waits for something does. Counted is processor time, with what a row
needs for its policies besides its call (its context). All cases take turns, forth and back, and the medians count.
The first case is there twice: how far the two are apart is the noise.

``--against`` unpacks the other revision beside this one and runs both in fresh processes, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOAL = 15.0
CONCURRENCY, IN_FLIGHT = 100, 200
NONE, AGAIN, TRIO = "no policies", "no policies, once more", "retry + timeout + breaker"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the overhead of stages' policies on the happy path.")
    parser.add_argument("--rows", type=int, default=20_000, help="per run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of each case (default: %(default)s)")
    parser.add_argument("--only", help="cases whose name has this in it, besides the first two")
    parser.add_argument("--against", metavar="REVISION", help="compare stages without policies with this revision's")
    parser.add_argument("--child", choices=["sync", "async"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(args)))
        return 0
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    status = compare_revisions(args) if args.against else compare_cases(args)
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    return status


# --- handlers --------------------------------------------------------------------------------------------------------

Row = dict[str, Any]


async def returns(row: Row) -> Row:
    return row


async def gives_way(row: Row) -> Row:
    await asyncio.sleep(0)
    return row


async def returns_with_context(row: Row, ctx: Any) -> Row:  # noqa: ARG001 - that it is asked for is the point
    return row


async def gives_way_with_context(row: Row, ctx: Any) -> Row:  # noqa: ARG001 - the same
    await asyncio.sleep(0)
    return row


HANDLERS = {"returns its row": (returns, returns_with_context), "gives way": (gives_way, gives_way_with_context)}


def make_rows(count: int, kinds: int) -> list[Row]:
    return [{"id": number % kinds, "name": f"row {number % kinds}", "score": 0.5} for number in range(count)]


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One stage to measure.

    Attributes:
        name: for the table.
        options: of the stage.
        takes_context: whether the handler asks for ctx.
        kinds: how many of the rows differ; None: all.
        on_disk: whether the cache's answers are on disk, as a worker's are, and not in memory.
        is_paid: whether there is a budget.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    takes_context: bool = False
    kinds: int | None = None
    on_disk: bool = False
    is_paid: bool = False


@dataclass
class Fields:
    """The rows' schema."""

    id: int
    name: str
    score: float


def make_cases() -> list[Case]:
    from rowmill import Cache, CircuitBreaker, RateLimit, Retry

    trio = {"retry": Retry(), "timeout": 30.0, "breaker": CircuitBreaker()}
    limit = {"limit": RateLimit(per_second=1e9, burst=1_000_000)}
    when, schema, price = {"when": lambda row: row["score"] > 0}, {"input": Fields}, {"price": "0.001"}
    cache = {"cache": Cache(max_bytes=64 * 1024 * 1024)}
    return [
        Case(NONE),
        Case(AGAIN),
        Case("retry", {"retry": trio["retry"]}),
        Case("timeout (no policy: its stage stays unpoliced)", {"timeout": 30.0}),
        Case("timeout, beside a retry", {"retry": trio["retry"], "timeout": 30.0}),
        Case("breaker", {"breaker": trio["breaker"]}),
        Case(TRIO, trio),
        Case("no policies, handler takes ctx", takes_context=True),
        Case(f"{TRIO}, handler takes ctx", trio, takes_context=True),
        Case("limit, far from its bound", limit),
        Case("cache, every row a miss, in memory", cache),
        Case("cache, every row a hit, in memory", cache, kinds=1),
        Case("cache, every row a miss, on disk", cache, on_disk=True),
        Case("cache, every row a hit, on disk", cache, kinds=1, on_disk=True),
        Case("price + budget", price, is_paid=True),
        Case("when", when),
        Case("input schema, a dataclass of 3 fields", schema),
        Case("all of them (cache: misses in memory)", trio | limit | cache | when | schema | price, is_paid=True),
    ]


async def run_case(case: Case, handler: Any, count: int, folder: Path) -> float:
    """Microseconds of processor time a row."""
    from rowmill.handlers.budget import Account, Budget, MemoryLedger
    from rowmill.handlers.executors import BlockingPool
    from rowmill.handlers.runtime import Runtime
    from rowmill.handlers.stage import make_stage
    from rowmill.state.clock import SystemClock
    from rowmill.state.rocksdb import RocksAnswerStores

    pool, clock = BlockingPool(), SystemClock()
    answers = RocksAnswerStores(folder) if case.on_disk else None
    runtime = Runtime(pool, clock, answers=answers)
    if case.is_paid:
        runtime.account = Account(Budget(1_000_000), MemoryLedger(), clock=clock)
        await runtime.account.start()
    # Names of their own: what one run puts into a cache on disk must not be another's hit.
    stage = make_stage(handler, name=f"ask-{clock.token()}", concurrency=CONCURRENCY, **case.options)
    try:
        await run_flow(stage, make_rows(1_000, case.kinds or 1_000), runtime)
        rows = make_rows(count + 1_000, case.kinds or count + 1_000)[1_000:]
        return await run_flow(stage, rows, runtime)
    finally:
        if runtime.account is not None:
            await runtime.account.close()
        await runtime.close()
        if answers is not None:
            answers.close()
        pool.close()


async def run_flow(stage: Any, rows: list[Row], runtime: Any) -> float:
    """Send rows through a flow, the next one whenever one is done."""
    from rowmill.handlers.chain import Chain
    from rowmill.handlers.context import RowContext
    from rowmill.handlers.flow import Flight

    chain = Chain([stage])
    done = asyncio.Event()
    coming = enumerate(rows)
    left = len(rows)

    def enter_next() -> None:
        for number, row in coming:
            context = None
            if chain.takes_context:
                context = RowContext("topic", 0, number, 0, "key", (), "session", None, runtime)
            flow.enter(Flight(row, context, None, None))
            return

    def on_done(flight: Any) -> None:
        nonlocal left
        if flight.value.__class__ is not dict:
            raise SystemExit(f"a row did not come through: {flight.value}")
        left -= 1
        if left:
            enter_next()
        else:
            done.set()

    flow = make_flow(chain, runtime, on_done)
    gc.collect()
    began = time.process_time()
    for _ in range(min(IN_FLIGHT, left)):
        enter_next()
    async with asyncio.timeout(120):
        await done.wait()
    taken = time.process_time() - began
    flow.check()
    await flow.close()
    return taken / len(rows) * 1e6


def make_flow(chain: Any, runtime: Any, on_done: Callable[[Any], None]) -> Any:
    """A flow that nobody commits for."""
    from rowmill.handlers import flow as module

    return module.Flow(chain, runtime, on_done, lambda: None, lambda *_: None, by_key=False, linger=0.0)


def compare_cases(args: argparse.Namespace) -> int:
    cases = [case for case in make_cases() if not args.only or args.only in case.name or case.name in {NONE, AGAIN}]
    seen: dict[tuple[str, str], list[float]] = {(case.name, way): [] for case in cases for way in HANDLERS}
    with tempfile.TemporaryDirectory(prefix="rowmill-policies-") as folder:
        for number in range(args.rounds):
            for case in cases if number % 2 else reversed(cases):
                for way, handlers in HANDLERS.items():
                    run = run_case(case, handlers[case.takes_context], args.rows, Path(folder))
                    seen[case.name, way].append(asyncio.run(run))
    medians = {which: median(figures) for which, figures in seen.items()}
    print(f"microseconds a row above a stage without policies; medians of {args.rounds} runs of {args.rows:,} rows")
    print(f"{'':50}" + "".join(f"{f'handler {way}':>26}" for way in HANDLERS))
    for case in cases:
        figures = [medians[case.name, way] - medians[NONE, way] for way in HANDLERS]
        if case.name == NONE:
            figures = [medians[NONE, way] for way in HANDLERS]
        name = "(the stage without policies itself)" if case.name == NONE else case.name
        print(f"{name:50}" + "".join(f"{figure:26.2f}" for figure in figures))
    if (TRIO, next(iter(HANDLERS))) not in medians:
        return 0
    worst = max(medians[TRIO, way] - medians[NONE, way] for way in HANDLERS)
    print(f"{TRIO}: {worst:.1f} microseconds a row at most (goal: {GOAL:.0f})")
    return 0 if worst <= GOAL else 1


# --- now and before --------------------------------------------------------------------------------------------------


def run_child(args: argparse.Namespace) -> float:
    """Microseconds a row of stages without policies; the best of three, the first of which warms up."""
    return min(
        run_sync(args.rows * 10) if args.child == "sync" else asyncio.run(run_async(args.rows)) for _ in range(3)
    )


def run_sync(count: int) -> float:
    """Three plain stages."""
    from rowmill.handlers.chain import Chain
    from rowmill.handlers.stage import make_stage

    chain = Chain([make_stage(lambda row: row, name=name) for name in ("first", "second", "third")])
    rows: list[Any] = make_rows(count, count)
    gc.collect()
    began = time.process_time()
    chain.run_sync(rows, None)
    return (time.process_time() - began) / count * 1e6


async def run_async(count: int) -> float:
    from rowmill.handlers.executors import BlockingPool
    from rowmill.handlers.stage import make_stage

    shared: Any = BlockingPool()
    try:
        from rowmill.handlers.runtime import Runtime

        shared = Runtime(shared)
    except ModuleNotFoundError:
        pass
    return await run_flow(make_stage(gives_way, name="ask", concurrency=CONCURRENCY), make_rows(count, count), shared)


def compare_revisions(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="rowmill-policies-") as folder:
        paths = {"now": Path(folder, "now"), "again": Path(folder, "now"), "before": Path(folder, "before")}
        paths["now"].mkdir()
        (paths["now"] / "rowmill").symlink_to(ROOT)
        archive = subprocess.run(["git", "archive", args.against], cwd=ROOT, stdout=subprocess.PIPE, check=True)  # noqa: S607
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(paths["before"] / "rowmill", filter="data")
        for kind, what in (("sync", "three plain stages"), ("async", "an async stage that gives way")):
            seen: dict[str, list[float]] = {which: [] for which in paths}
            for number in range(args.rounds):
                for which in paths if number % 2 else reversed(list(paths)):
                    seen[which].append(spawn(args, kind, paths[which]))
            now, before = median(seen["now"]), median(seen["before"])
            print(f"{what}: {now:.3f} microseconds a row now, {before:.3f} at {args.against}")
            print(f"  now against {args.against}: {ratio(seen['now'], seen['before'])}")
            print(f"  now against itself, the noise: {ratio(seen['again'], seen['now'])}")
    return 0


def ratio(one: list[float], other: list[float]) -> str:
    pairs = [mine / yours for mine, yours in zip(one, other, strict=True)]
    by_pairs = f"by pairs {median(pairs):.3f} in the middle, {min(pairs):.2f} to {max(pairs):.2f}"
    return f"{median(one) / median(other):.3f} by the medians; {by_pairs}"


def spawn(args: argparse.Namespace, kind: str, path: Path) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, "--rows", str(args.rows)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
