"""``rowmill publish``: the rows of a file, or of standard input, to a topic."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .connect import broker_words, connected, shown_broker
from .output import command, plain, plural, say
from .parser import Commands, add_broker, add_command, add_no_create, add_partitions

if TYPE_CHECKING:
    from ..brokers.base import Broker
    from ..client import Published
    from ..inputs import Input


def add_parser(commands: Commands) -> None:
    """``publish``'s options."""
    parser = add_command(
        commands,
        "publish",
        main,
        words="TOPIC FILE",
        summary="send the rows of a file to a topic",
        about=(
            "Send the rows of a file (.csv, .tsv, .jsonl, these also with .gz, or .parquet), or JSON lines from "
            "standard input (FILE is -), to a topic, and wait until the broker has them. What is no row is sent as it "
            "stands: the worker makes a dead letter of it. Published twice, rows are there twice."
        ),
        example="rowmill publish reviews reviews.csv --key id",
    )
    parser.add_argument("topic", metavar="TOPIC", help="made when absent")
    parser.add_argument("file", metavar="FILE", help="the rows; - for JSON lines on standard input")
    parser.add_argument(
        "--key", metavar="COLUMN", help="column that becomes the key: rows of one key keep their order (default: none)"
    )
    add_broker(parser)
    add_partitions(parser)
    add_no_create(parser)
    parser.add_argument("--json", action="store_true", help="the summary as a JSON object on standard output")


def main(args: argparse.Namespace) -> int:
    """Publish and say how many."""
    import asyncio

    from ..session import check_topic

    check_topic("TOPIC", args.topic)
    rows = _rows(args)
    done = asyncio.run(connected(args.broker, lambda broker: _publish(args, broker, rows)))
    if args.json:
        _print_json(args, done)
    else:
        _report(args, done)
    return 0


def _rows(args: argparse.Namespace) -> Input:
    from ..inputs import FileInput
    from .stdin_rows import StdinRows

    if args.file == "-":
        return StdinRows(sys.stdin.fileno(), args.key)
    return FileInput(Path(args.file), args.key)


async def _publish(args: argparse.Namespace, broker: Broker, rows: Input) -> Published:
    import asyncio

    from ...state.clock import SystemClock
    from ..client import publish_input
    from ..progress import progress_bar
    from .signals import StoppedError, orderly_stop
    from .stdin_rows import StdinRows

    with progress_bar(args.topic, shown=False if args.quiet else None) as draw:
        sent = 0

        def report(done: int, total: int | None) -> None:
            nonlocal sent
            sent = done
            draw(done, total)

        publishing = asyncio.ensure_future(
            publish_input(
                broker,
                args.topic,
                rows,
                clock=SystemClock(),
                create=not args.no_create_topics,
                partitions=args.partitions,
                progress=report,
            )
        )

        def stop() -> None:
            if isinstance(rows, StdinRows):
                rows.stop()
            publishing.cancel()

        with orderly_stop(stop) as caught:
            try:
                return await publishing
            except asyncio.CancelledError:
                if caught.signal is None:
                    raise
    raise StoppedError(caught, f"at least {plural(sent, 'row')} of the input are in {args.topic} and stay there")


def _report(args: argparse.Namespace, done: Published) -> None:
    say(f"{plural(done.rows, 'row')} published to {done.topic} on {shown_broker(args)}", quiet=args.quiet)
    if done.broken:
        say(
            f"{done.broken:,} of them are no rows ({plain(done.first_error or '')}, for one); they were sent as they "
            "stand, and a worker makes dead letters of them",
            quiet=args.quiet,
        )
    look = command("rowmill", "consume", done.topic, "--limit", "5", *broker_words(args))
    say(f"next:\n  {look}", quiet=args.quiet)


def _print_json(args: argparse.Namespace, done: Published) -> None:
    from ...state.codec import dumps

    summary = {
        "topic": done.topic,
        "broker": shown_broker(args),
        "rows": done.rows,
        "broken": done.broken,
        "first_error": done.first_error,
    }
    print(dumps(summary).decode())
