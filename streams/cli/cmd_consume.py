"""``rowmill consume``: a topic's committed records, to standard output or a file."""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ...state.errors import ConfigError
from .connect import CALL_SECONDS, on_broker
from .output import plural, say, write_line
from .parser import Commands, add_broker, add_command, whole_number

if TYPE_CHECKING:
    from ...state.model import Record, StoredRecord
    from ..brokers.base import Broker
    from ..client import Start


def add_parser(commands: Commands) -> None:
    """``consume``'s options."""
    parser = add_command(
        commands,
        "consume",
        main,
        words="TOPIC",
        summary="print the values of a topic, or write them to a file",
        about=(
            "Print the committed values of a topic as JSON lines, in order within each partition, up to the end that "
            "it has now. A null value is printed as null, and a line break inside a value as a space."
        ),
        example="rowmill consume reviews.scored --limit 5",
    )
    parser.add_argument("topic", metavar="TOPIC", help="the topic to read")
    parser.add_argument("--follow", action="store_true", help="wait for more at the end, until stopped")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="WHERE",
        default="earliest",
        help="earliest, end, an offset (in every partition), or a time as 2026-01-31T12:00, local unless it names a "
        "zone (default: earliest)",
    )
    parser.add_argument("--limit", metavar="N", type=whole_number(1), help="stop after so many (default: no limit)")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="write a file instead: .jsonl, .csv, .tsv (these also with .gz) or .parquet",
    )
    parser.add_argument(
        "--partition", metavar="N", type=whole_number(0), help="this partition only (default: all of them)"
    )
    parser.add_argument(
        "--with-meta",
        action="store_true",
        help="print objects of topic, partition, offset, timestamp, key, headers and value",
    )
    add_broker(parser)


def main(args: argparse.Namespace) -> int:
    """Read and print, or write."""
    start = _start(args.start)
    if args.output is None or str(args.output) == "-":
        return on_broker(args.broker, lambda broker: _print(args, broker, start))
    from ..outputs import check_output

    check_output(args.output)
    if args.follow and args.limit is None:
        raise ConfigError("--follow", "with --output", "a file is written at the end: add --limit, or drop --follow")
    return _write(args, start)


def _start(text: str) -> Start:
    if text in {"earliest", "end"}:
        return text
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise ConfigError(
            "--from", text, "give earliest, end, an offset, or a time such as 2026-01-31T12:00 or 2026-01-31T12:00Z"
        ) from None


async def _print(args: argparse.Namespace, broker: Broker, start: Start) -> int:
    from contextlib import aclosing

    async with aclosing(_records(args, broker, start)) as records:
        async for record in records:
            write_line(_line(record, with_meta=args.with_meta), flush=args.follow)
    return 0


def _write(args: argparse.Namespace, start: Start) -> int:
    """Through a temporary file, because CSV and Parquet need one pass for the columns and one for the rows."""
    import tempfile

    from ..outputs import write_results

    with tempfile.TemporaryFile(prefix="rowmill-") as held:
        skipped = on_broker(args.broker, lambda broker: _hold(args, broker, start, held))
        count = write_results(args.output, lambda: _lines(held))
    nulls = f" ({plural(skipped, 'null value')} left out)" if skipped else ""
    say(f"{plural(count, 'row')} of {args.topic} written to {args.output}{nulls}", quiet=args.quiet)
    return 0


async def _hold(args: argparse.Namespace, broker: Broker, start: Start, held: IO[bytes]) -> int:
    """Values line by line; returns how many null values were left out."""
    from contextlib import aclosing

    skipped = 0
    needs_rows = ".jsonl" not in args.output.suffixes and ".ndjson" not in args.output.suffixes
    async with aclosing(_records(args, broker, start)) as records:
        async for record in records:
            if record.value is None and needs_rows and not args.with_meta:
                skipped += 1
                continue
            if needs_rows and not args.with_meta:
                _check_row(record, args.output)
            held.write(_line(record, with_meta=args.with_meta) + b"\n")
    return skipped


def _check_row(record: StoredRecord, output: Path) -> None:
    from ...state.codec import loads
    from ..errors import InputError

    try:
        row = loads(record.value or b"")
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise InputError(
            f"cannot write {output}: {record.topic}/{record.partition}/{record.offset} is no JSON object; "
            "write .jsonl, which takes any value, or add --with-meta"
        )


def _lines(held: IO[bytes]) -> Iterator[bytes]:
    held.seek(0)
    for line in held:
        yield line.rstrip(b"\n")


async def _records(args: argparse.Namespace, broker: Broker, start: Start) -> AsyncGenerator[StoredRecord, None]:
    """The records asked for."""
    from contextlib import aclosing

    from ..client import consume

    if args.partition is not None:
        await _check_partition(args, broker)
    lots = consume(broker, args.topic, start=start, limit=args.limit, follow=args.follow, partition=args.partition)
    async with aclosing(lots):
        async for lot in lots:
            for record in lot:
                yield record


async def _check_partition(args: argparse.Namespace, broker: Broker) -> None:
    from ..deadlines import deadline

    async with deadline(CALL_SECONDS, "look the topic up"):
        topic = (await broker.topics()).get(args.topic)
    if topic is not None and args.partition >= topic.partitions:
        raise ConfigError("--partition", args.partition, f"{args.topic} has partitions 0 to {topic.partitions - 1}")


# --- one record ------------------------------------------------------------------------------------------------


def _line(record: StoredRecord, *, with_meta: bool) -> bytes:
    value = b"null" if record.value is None else record.value
    if with_meta:
        value = _with_meta(record, value)
    # JSON text has line breaks between its parts only, where a space means the same.
    return value.replace(b"\n", b" ") if b"\n" in value else value


def _with_meta(record: StoredRecord, value: bytes) -> bytes:
    """The value goes in as it stands, so that no number in it changes; what is no JSON, as a string."""
    from ...state.codec import dumps, loads

    meta = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "key": _text(record.key),
        "headers": _headers(record),
    }
    try:
        loads(value)
    except ValueError:
        value = dumps(_text(value))
    return dumps(meta)[:-1] + b',"value":' + value + b"}"


def _headers(record: Record) -> dict[str, Any]:
    """By name; a name that stands there more than once has a list."""
    headers: dict[str, Any] = {}
    for name, value in record.headers:
        text = _text(value)
        if name not in headers:
            headers[name] = text
        elif isinstance(headers[name], list):
            headers[name].append(text)
        else:
            headers[name] = [headers[name], text]
    return headers


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")
