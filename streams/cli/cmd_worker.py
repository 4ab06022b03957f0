"""``rowmill worker``: a pipeline over its source topics, continuously."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from .connect import connected, shown_broker
from .logs import add_fields
from .output import plural, say
from .parser import (
    DEFAULTS,
    Commands,
    add_broker,
    add_command,
    add_commits,
    add_max_deaths,
    add_no_create,
    add_partitions,
    add_state_dir,
    seconds,
    whole_number,
)

if TYPE_CHECKING:
    from ..brokers.base import Broker
    from ..options import WorkerOptions
    from ..pipeline import Pipeline
    from ..session import Session
    from ..worker import Worker, WorkerStats


def add_parser(commands: Commands) -> None:
    """``worker``'s options."""
    parser = add_command(
        commands,
        "worker",
        main,
        words="PIPELINE",
        summary="process rows as they come, until stopped",
        about=(
            "Process the rows of the pipeline's source topics as they come, each exactly once. Start it as often as "
            "needed: on Kafka, the workers of a session share the partitions. SIGTERM or Ctrl-C stops it in order: "
            "rows in work are finished and committed.\n\n"
            "PIPELINE is file.py, file.py:name or module:name."
        ),
        example="rowmill worker reviews.py --broker kafka://localhost:9092",
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="where the pipeline is defined")
    add_broker(parser)
    parser.add_argument(
        "--session",
        metavar="NAME",
        help="a session of its own: it reads the same sources and writes to topics that end in .NAME "
        "(default: the live session)",
    )
    add_partitions(parser)
    add_no_create(parser)
    add_commits(parser)
    parser.add_argument(
        "--drain-timeout",
        metavar="S",
        type=seconds(at_least_zero=True),
        default=DEFAULTS.drain_timeout,
        help="how long rows in work may take to finish at the end (default: %(default)g s)",
    )
    parser.add_argument(
        "--stall-timeout",
        metavar="S",
        type=seconds(),
        default=DEFAULTS.stall_timeout,
        help="give up when a partition cannot commit for so long (default: %(default)g s)",
    )
    parser.add_argument(
        "--guarantee",
        choices=["exactly-once", "at-least-once"],
        default="exactly-once",
        help="at-least-once sends results as rows complete, for latency; after a crash some come again "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--http",
        metavar="[HOST:]PORT",
        help="serve /live, /ready and /metrics there, only on this machine unless HOST says otherwise; 0: a free port",
    )
    add_state_dir(parser)
    add_max_deaths(parser)
    parser.add_argument(
        "--threads",
        metavar="N",
        type=whole_number(1),
        default=DEFAULTS.threads,
        help="blocking handlers that run at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-in-flight",
        metavar="N",
        type=whole_number(1),
        default=DEFAULTS.max_in_flight,
        help="rows in work at once, those that wait for the row before them in their key included "
        "(default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Work until a signal or an error."""
    from ...handlers.capture import install
    from ..loops import run_here
    from ..session import LIVE, Session, check_new_session
    from .load import load_pipeline

    install()  # log records of handlers tell their rows, for whatever format the pipeline's file sets up
    pipeline = load_pipeline(args.pipeline)
    pipeline.chain()
    session = Session(pipeline.name, check_new_session("--session", args.session or LIVE))
    _check_address(args.http)
    options = _options(args)
    run_here(connected(args.broker, lambda broker: _serve(args, broker, pipeline, session, options)))
    return 0


def _options(args: argparse.Namespace) -> WorkerOptions:
    from ..options import WorkerOptions

    return WorkerOptions(
        commit_interval=args.commit_interval,
        commit_rows=args.commit_rows,
        drain_timeout=args.drain_timeout,
        stall_timeout=args.stall_timeout,
        threads=args.threads,
        max_in_flight=args.max_in_flight,
        guarantee=args.guarantee.replace("-", "_"),
        state_dir=args.state_dir,
        max_deaths=args.max_deaths,
        create_topics=not args.no_create_topics,
        partitions=args.partitions,
    )


async def _serve(
    args: argparse.Namespace, broker: Broker, pipeline: Pipeline, session: Session, options: WorkerOptions
) -> None:
    from ..worker import Worker
    from .signals import orderly_stop

    worker = Worker(pipeline, broker, session=session, options=options)
    add_fields(pipeline=pipeline.name, session=session.id, worker=worker.name)

    note = "" if args.quiet else "stopping: rows in work are finished and committed (once more: stop at once)"
    sources = ", ".join(session.source(topic) for topic in pipeline.sources)
    say(
        f"worker of group {session.group}: {sources} -> {session.output(pipeline.sink)} on {shown_broker(args)}",
        quiet=args.quiet,
    )
    try:
        async with _health(args, worker):
            with orderly_stop(worker.stop, note):
                await worker.run()
    finally:
        say(f"{'cancelled' if worker.was_cancelled else 'stopped'}: {_counts(worker.stats)}", quiet=args.quiet)


def _check_address(address: str | None) -> None:
    """Refuse a typo before anything is connected."""
    if address is not None:
        from ..health import parse_address

        parse_address(address)


@asynccontextmanager
async def _health(args: argparse.Namespace, worker: Worker) -> AsyncIterator[None]:
    """While the block runs, answer whoever asks how the worker is, where that was asked for."""
    if args.http is None:
        yield
        return
    from ...state.clock import SystemClock
    from ..health import HealthServer

    server = HealthServer(worker, args.http, clock=SystemClock())
    say(f"health and metrics on {await server.start()}", quiet=args.quiet)
    try:
        yield
    finally:
        await server.close()


def _counts(stats: WorkerStats) -> str:
    return (
        f"{plural(stats.rows, 'row')} in, {plural(stats.results, 'result')} out, {stats.dropped:,} dropped, "
        f"{f'{stats.rebuilt:,} for tables only, ' if stats.rebuilt else ''}"
        f"{f'{stats.skipped:,} skipped, ' if stats.skipped else ''}"
        f"{f'{stats.defaulted:,} with fallback, ' if stats.defaulted else ''}"
        f"{plural(stats.dead_letters, 'dead letter')}, in {plural(stats.transactions, 'transaction')}"
    )
