"""``rowmill dlq``: look at dead letters, send their rows once more, put them aside, write them to a file."""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ...state.errors import ConfigError
from .asking import who
from .connect import on_broker
from .output import command, cut, plain, plural, say, table
from .parser import USAGE, Commands, Parser, add_broker, add_command, add_no_create, add_verbosity, whole_number

if TYPE_CHECKING:
    from ..brokers.base import Broker
    from ..dlq import DeadLetters
    from ..dlq_letters import DeadLetter, Selection
    from ..dlq_retry import Outcome, Targets
    from ..pipeline import Pipeline

_LISTED = 1_000
_HEX_BYTES = 1_024
_NAME_WIDTH = 24
_WHERE = "PIPELINE|TOPIC"
_ABOUT = """\
Dead letters are rows that no policy could save. They stay on their topic; what was retried or purged is marked, and \
left out of every list from then on.

PIPELINE is a pipeline's name, or its file as other commands take it; what has a dot in it and is no file is the \
dead-letter topic itself. An ID is partition/offset, as `list` shows it."""


def add_parser(commands: Commands) -> None:
    """``dlq``'s actions and their options."""
    parser = add_command(
        commands,
        "dlq",
        _help,
        words=f"ACTION {_WHERE}",
        summary="list, show, retry, export and purge dead letters",
        about=_ABOUT,
        example="rowmill dlq list reviews --stage score",
    )
    actions: Commands = parser.add_subparsers(title="actions", prog="rowmill dlq", metavar="ACTION", dest="action")
    for add in (_add_list, _add_show, _add_retry, _add_export, _add_purge):
        add_verbosity(add(actions), default=argparse.SUPPRESS)


def _help(args: argparse.Namespace) -> int:
    args.parser.print_help(sys.stderr)
    return USAGE


def _add_list(actions: Commands) -> Parser:
    parser = add_command(
        actions,
        "list",
        _list,
        summary="a line for each dead letter, the newest row first",
        about="A line for each dead letter that was neither retried nor purged, the newest row first. The time is the "
        "row's own.",
        example="rowmill dlq list reviews --type TimeoutError --since 2026-01-31T12:00",
    )
    _add_where(parser, "list")
    _add_filters(parser)
    parser.add_argument(
        "--limit",
        metavar="N",
        type=whole_number(1),
        default=_LISTED,
        help=f"show so many, and tell how many more there are (default: {_LISTED:,})",
    )
    parser.add_argument("--oldest", action="store_true", help="the oldest row first")
    parser.add_argument("--count", action="store_true", help="how many of each stage and type instead")
    _add_all(parser)
    parser.add_argument("--json", action="store_true", help="a JSON object per line")
    add_broker(parser)
    return parser


def _add_show(actions: Commands) -> Parser:
    parser = add_command(
        actions,
        "show",
        _show,
        summary="all that is known of one",
        about="All that is known of one dead letter: the error, what was logged, where the row came from, its "
        "headers and its value. Instead of two words, topic/partition/offset will do.",
        example="rowmill dlq show reviews 0/17",
    )
    _add_where(parser, "show", " ID")
    parser.add_argument("ids", metavar="ID", nargs="?", help="partition/offset")
    parser.add_argument("--json", action="store_true", help="a JSON object")
    add_broker(parser)
    return parser


def _add_retry(actions: Commands) -> Parser:
    parser = add_command(
        actions,
        "retry",
        _retry,
        summary="send their rows to their source again, exactly once",
        about="Send the rows of dead letters to the topic that they came from, and mark them as retried, in one "
        "transaction. A row that fails again becomes a new dead letter. Whoever else reads that topic gets the row "
        "again as well.\n\n"
        "Nothing is sent without --execute: what would be is shown. Two people may do this at once, and it may be "
        "killed and run again: no row is sent twice.\n\n"
        "Rows go only to a source that the pipeline's file declares, or that --source names; what a dead letter says "
        "of itself is not enough.",
        example="rowmill dlq retry reviews.py --stage score --execute",
    )
    _add_where(parser, "retry", " [ID …]")
    _add_ids(parser)
    _add_filters(parser)
    parser.add_argument(
        "--source",
        metavar="TOPIC",
        action="append",
        default=[],
        help="a source of the pipeline, where its name was given and not its file; may be repeated",
    )
    parser.add_argument("--to", metavar="TOPIC", help="send all rows to this topic, wherever they came from")
    parser.add_argument(
        "--timestamp",
        choices=("now", "original"),
        default="now",
        help="the rows' time: now, so that the source's retention spares them until they are read, or their own "
        "(default: now)",
    )
    _add_execute(parser)
    return parser


def _add_export(actions: Commands) -> Parser:
    parser = add_command(
        actions,
        "export",
        _export,
        summary="write them to a file",
        about="Write rows with their errors: the row's own fields, and error.id, error.stage, error.type, "
        "error.message and so on. A value that is no JSON object stands in error.value.",
        example="rowmill dlq export reviews -o failed.csv",
    )
    _add_where(parser, "export", " [ID …]")
    _add_ids(parser)
    _add_filters(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("-"),
        help=".jsonl, .csv, .tsv (these also with .gz) or .parquet (default: JSON lines on standard output)",
    )
    parser.add_argument(
        "--rows-only",
        action="store_true",
        help="the rows as they were, to publish or run again; what was cut or is no row is left out",
    )
    _add_all(parser)
    add_broker(parser)
    return parser


def _add_purge(actions: Commands) -> Parser:
    parser = add_command(
        actions,
        "purge",
        _purge,
        summary="mark them as done with",
        about="Mark dead letters as done with: they are not listed or retried any more. Their records stay until the "
        "topic's retention removes them, and `list --all` shows them.\n\n"
        "Nothing is marked without --execute: what would be is shown.",
        example="rowmill dlq purge reviews --until 2026-01-31 --execute",
    )
    _add_where(parser, "purge", " [ID …]")
    _add_ids(parser)
    _add_filters(parser)
    _add_execute(parser)
    return parser


def _add_where(parser: Parser, action: str, more: str = "") -> None:
    parser.usage = f"rowmill dlq {action} {_WHERE}{more} [options]"
    parser.add_argument("where", metavar=_WHERE, help="a pipeline's name or file, or the dead-letter topic")
    parser.add_argument("--session", metavar="NAME", help="of this session of the pipeline (default: the live one)")
    parser.add_argument("--topic", action="store_true", help="it is the topic's name, although it has no dot")


def _add_ids(parser: Parser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="*", help="partition/offset (default: all that the filters admit)")


def _add_filters(parser: Parser) -> None:
    form = "a time as 2026-01-31T12:00, local unless it names a zone"
    parser.add_argument("--stage", metavar="NAME", action="append", default=[], help="of this stage; may be repeated")
    parser.add_argument("--type", metavar="NAME", action="append", default=[], help="with this error; may be repeated")
    parser.add_argument("--since", metavar="TIME", help=f"rows from this time on: {form}")
    parser.add_argument("--until", metavar="TIME", help="rows before this time")


def _add_all(parser: Parser) -> None:
    parser.add_argument("--all", action="store_true", help="also those that were retried or purged")


def _add_execute(parser: Parser) -> None:
    parser.add_argument("--execute", action="store_true", help="really do it (default: show what would be done)")
    parser.add_argument("--json", action="store_true", help="a JSON object of what was done")
    add_no_create(parser)
    add_broker(parser)


# --- what the words mean ---------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A dead-letter topic, and what is known of its pipeline."""

    topic: str
    pipeline: Pipeline | str


def _place(args: argparse.Namespace, where: str) -> _Place:
    from ..dlq import letters_topic
    from ..session import LIVE, check_name, check_topic

    session = args.session or LIVE
    if args.topic:
        if args.session is not None:
            raise ConfigError("--session", args.session, "it goes with a pipeline, not with --topic")
        return _Place(check_topic("TOPIC", where), where)
    if where.endswith(".py") or ":" in where:
        from .load import load_pipeline

        pipeline = load_pipeline(where)
        return _Place(letters_topic(pipeline, session), pipeline)
    if "." in where and args.session is not None:
        raise ConfigError("--session", args.session, f"{where!r} is a topic; a session goes with a pipeline's name")
    if "." not in where:
        check_name(_WHERE, where)
    return _Place(letters_topic(where, session), where)


def _selection(args: argparse.Namespace, topic: str) -> Selection:
    from ..dlq_letters import Selection, parse_id

    return Selection(
        frozenset(parse_id(each, topic) for each in getattr(args, "ids", ())),
        frozenset(args.stage),
        frozenset(args.type),
        _milliseconds("--since", args.since),
        _milliseconds("--until", args.until),
    )


def _milliseconds(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(datetime.fromisoformat(text).astimezone().timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ConfigError(option, text, "give a time such as 2026-01-31T12:00 or 2026-01-31T12:00Z") from None


def _letters(broker: Broker, topic: str, *, create: bool = True) -> DeadLetters:
    from ...state.clock import SystemClock
    from ..dlq import DeadLetters

    return DeadLetters(broker, topic, clock=SystemClock(), create=create)


# --- list ------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """What ``list`` shows: counts of all, and the first of them."""

    counts: Counter[tuple[str, str]]
    letters: list[DeadLetter]


def _list(args: argparse.Namespace) -> int:
    topic = _place(args, args.where).topic
    selection = _selection(args, topic)
    found = on_broker(args.broker, lambda broker: _find(args, broker, topic, selection))
    if args.count:
        return _print_counts(args, found)
    if args.json:
        for letter in found.letters:
            print(_json_line(_fields(letter)))
    elif found.letters:
        print(_table(found.letters, marked=args.all))
    total = found.counts.total()
    if not total:
        say(f"no dead letters on {topic}{' that fit' if selection != type(selection)() else ''}", quiet=args.quiet)
    elif total > len(found.letters):
        say(f"{len(found.letters):,} of {plural(total, 'dead letter')}; --limit N shows more", quiet=args.quiet)
    return 0


async def _find(args: argparse.Namespace, broker: Broker, topic: str, selection: Selection) -> _Found:
    """Counts, and of the letters the first ``--limit``: no more than those are ever held."""
    from contextlib import aclosing

    counts: Counter[tuple[str, str]] = Counter()
    held: list[tuple[tuple[int, int, int], DeadLetter]] = []
    sign = -1 if args.oldest else 1
    async with aclosing(_letters(broker, topic).read(selection, marked=args.all)) as letters:
        async for letter in letters:
            counts[letter.stage, letter.type] += 1
            if args.count:
                continue
            order = (sign * letter.timestamp, sign * letter.partition, sign * letter.offset)
            if len(held) < args.limit:
                heapq.heappush(held, (order, letter.brief()))
            elif order > held[0][0]:
                heapq.heapreplace(held, (order, letter.brief()))
    return _Found(counts, [letter for _, letter in sorted(held, key=lambda each: each[0], reverse=True)])


def _print_counts(args: argparse.Namespace, found: _Found) -> int:
    ordered = sorted(found.counts.items(), key=lambda item: (-item[1], item[0]))
    if args.json:
        for (stage, kind), count in ordered:
            print(_json_line({"stage": stage, "type": kind, "dead_letters": count}))
    elif ordered:
        print(_counts_table(ordered))
    else:
        say("no dead letters", quiet=args.quiet)
    return 0


def _counts_table(ordered: list[tuple[tuple[str, str], int]]) -> str:
    lines = [(f"{count:,}", _name(stage), plain(kind)) for (stage, kind), count in ordered]
    return table([("count", "stage", "type"), *lines], right=[0])


def _table(letters: list[DeadLetter], *, marked: bool) -> str:
    head = ["id", "time", "stage", "type", "tries", *(["state"] if marked else []), "message"]
    lines = [
        [
            letter.id,
            _time(letter.timestamp, "seconds"),
            _name(letter.stage),
            _name(letter.type),
            "" if letter.attempts is None else f"{letter.attempts:,}",
            *([_state(letter)] if marked else []),
            plain(letter.message),
        ]
        for letter in letters
    ]
    return table([head, *lines], right=[4])


def _name(text: str) -> str:
    return cut(plain(text), _NAME_WIDTH)


def _state(letter: DeadLetter) -> str:
    return letter.mark.state if letter.mark else "waits"


def _time(milliseconds: int, parts: str = "milliseconds", *, zone: bool = False) -> str:
    try:
        moment = datetime.fromtimestamp(milliseconds / 1000).astimezone()
    except (ValueError, OverflowError, OSError):
        return str(milliseconds)
    return (moment if zone else moment.replace(tzinfo=None)).isoformat(sep=" ", timespec=parts)


# --- show ------------------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> int:
    from ..dlq_letters import parse_id

    where, text = args.where, args.ids
    if text is None:
        where, _, rest = where.partition("/")
        if not rest:
            raise ConfigError(
                "ID", None, f"name one: rowmill dlq show {args.where} 0/17; `rowmill dlq list` shows them"
            )
        text, args.topic = rest, True
    topic = _place(args, where).topic
    partition, offset = parse_id(text, topic)
    letter = on_broker(args.broker, lambda broker: _letters(broker, topic).find(partition, offset))
    if args.json:
        print(_json_line({**_fields(letter), "headers": _headers(letter), "log": letter.log, "value": _value(letter)}))
    else:
        print("\n".join(_described(letter)))
    return 0


def _described(letter: DeadLetter) -> Iterator[str]:
    mark = letter.mark
    facts = {
        "dead letter": f"{letter.topic}/{letter.id}",
        "time": _time(letter.timestamp, zone=True),
        "source": letter.came_from,
        "input row": "" if letter.input_row is None else f"{letter.input_row:,}",
        "session": letter.session,
        "stage": letter.stage,
        "type": letter.type,
        "attempts": "" if letter.attempts is None else f"{letter.attempts:,}",
        "where": letter.where,
        "key": "null" if letter.key is None else letter.key.decode("utf-8", "backslashreplace"),
        "state": "waits" if mark is None else f"{mark.state} {_time(mark.time, zone=True)}",
        "by": mark.by if mark else "",
        "sent to": mark.to if mark else "",
    }
    for name, text in facts.items():
        if text:
            yield f"{name:<12}  {plain(text)}"
    yield from _block("message", letter.message)
    yield from _block("log", letter.log)
    own = "\n".join(f"{name}: {_escaped(_text(value))}" for name, value in letter.headers)
    yield from _block("headers", own)
    yield from _value_lines(letter)


def _block(title: str, text: str) -> Iterator[str]:
    if text:
        yield ""
        yield f"{title}:"
        yield from (f"  {_escaped(line)}" for line in text.split("\n"))


def _value_lines(letter: DeadLetter) -> Iterator[str]:
    yield ""
    if letter.value is None:
        yield "value: null"
        return
    size = plural(len(letter.value), "byte")
    cut_note = f"; CUT, it had {letter.truncated:,}, and cannot be retried" if letter.truncated is not None else ""
    try:
        shown = json.dumps(json.loads(letter.value), indent=2, ensure_ascii=False).split("\n")
        kind = "JSON"
    except (ValueError, RecursionError):
        kind, shown = _no_json(letter.value)
    yield f"value ({size}, {kind}{cut_note}):"
    yield from (f"  {_escaped(line)}" for line in shown)


def _no_json(value: bytes) -> tuple[str, list[str]]:
    """Text if it is text, else a dump of its beginning."""
    try:
        return "text, no JSON", value.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        rest = len(value) - _HEX_BYTES
        return "no text", [*_dump(value[:_HEX_BYTES]), *([f"… and {plural(rest, 'byte')} more"] if rest > 0 else [])]


def _dump(value: bytes) -> Iterator[str]:
    for start in range(0, len(value), 16):
        part = value[start : start + 16]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        yield f"{start:08x}  {part.hex(' '):<47}  {letters}"


def _escaped(line: str) -> str:
    """Nothing that could steer a terminal, and still every character to be told."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line.removesuffix("\r"))


# --- retry and purge -------------------------------------------------------------------------------------------


def _retry(args: argparse.Namespace) -> int:
    from ..dlq import targets_of

    place = _place(args, args.where)
    return _act(args, place, targets_of(place.topic, place.pipeline, args.to, args.source))


def _purge(args: argparse.Namespace) -> int:
    return _act(args, _place(args, args.where), None)


def _act(args: argparse.Namespace, place: _Place, targets: Targets | None) -> int:
    selection = _selection(args, place.topic)

    async def work(broker: Broker) -> Outcome:
        letters = _letters(broker, place.topic, create=not args.no_create_topics)
        if not args.execute:
            return await letters.plan(selection, targets)
        if targets is None:
            return await letters.purge(selection, by=who())
        return await letters.retry(selection, targets, by=who(), timestamp=args.timestamp)

    outcome = on_broker(args.broker, work)
    if args.json:
        print(_json_line(_summary(args, outcome)))
    else:
        _tell(args, place, outcome, retries=targets is not None)
    return 1 if args.execute and (outcome.refusals or outcome.missing or outcome.fenced) else 0


def _tell(args: argparse.Namespace, place: _Place, outcome: Outcome, *, retries: bool) -> None:
    ordered = sorted(outcome.done.items(), key=lambda item: (-item[1], item[0]))
    if ordered and not args.quiet:
        print(_counts_table(ordered))
    targets = ", ".join(f"{count:,} to {topic}" for topic, count in sorted(outcome.targets.items()))
    count = plural(outcome.count, "row" if retries else "dead letter")
    verb = ("sent" if retries else "purged") if args.execute else ("would be sent" if retries else "would be purged")
    say(f"{count} {verb}{f' ({targets})' if targets else ''}", quiet=args.quiet)
    if outcome.marked:
        say(f"{outcome.marked:,} more had been retried or purged before", quiet=args.quiet)
    for reason, ids in outcome.refused.items():
        more = "" if len(ids) < 20 else " …"
        say(f"rowmill: {plain(reason)}: {', '.join(ids)}{more}")
    if outcome.missing:
        say(f"rowmill: {place.topic} has no dead letter at {', '.join(outcome.missing[:20])}")
    if outcome.fenced:
        partitions = ", ".join(map(str, outcome.fenced))
        say(
            f"rowmill: somebody else has begun to retry or purge {place.topic}, partition {partitions}, and goes on "
            "there; run this again to see what is left"
        )
    if outcome.count and not args.execute:
        say(f"nothing was done; to do it: {command('rowmill', *_words(args), '--execute')}", quiet=args.quiet)


def _words(args: argparse.Namespace) -> list[str]:
    return [word for word in args.words if word]


def _summary(args: argparse.Namespace, outcome: Outcome) -> dict[str, Any]:
    return {
        "executed": args.execute,
        "count": outcome.count,
        "by_type": [
            {"stage": stage, "type": kind, "dead_letters": count}
            for (stage, kind), count in sorted(outcome.done.items())
        ],
        "targets": dict(sorted(outcome.targets.items())),
        "refused": outcome.refusals,
        "reasons": outcome.refused,
        "marked_before": outcome.marked,
        "missing": outcome.missing,
        "taken_over": outcome.fenced,
    }


# --- export ----------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    """Through a temporary file, because CSV and Parquet need one pass for the columns and one for the rows."""
    import tempfile

    from ..outputs import check_output, write_results

    topic = _place(args, args.where).topic
    selection = _selection(args, topic)
    check_output(args.output)
    with tempfile.TemporaryFile(prefix="rowmill-") as held:
        left_out = on_broker(args.broker, lambda broker: _hold(args, broker, topic, selection, held))
        count = write_results(args.output, lambda: _lines(held))
    note = f" ({left_out:,} left out: cut, or no JSON object)" if left_out else ""
    say(f"{plural(count, 'dead letter')} of {topic} written to {args.output}{note}", quiet=args.quiet)
    return 0


async def _hold(args: argparse.Namespace, broker: Broker, topic: str, selection: Selection, held: IO[bytes]) -> int:
    from contextlib import aclosing

    left_out = 0
    async with aclosing(_letters(broker, topic).read(selection, marked=args.all)) as letters:
        async for letter in letters:
            line = _row_line(letter) if args.rows_only else _export_line(letter)
            left_out += line is None
            if line is not None:
                # JSON text has line breaks between its parts only, where a space means the same.
                held.write(line.replace(b"\n", b" ") + b"\n")
    return left_out


def _lines(held: IO[bytes]) -> Iterator[bytes]:
    held.seek(0)
    for line in held:
        yield line.rstrip(b"\n")


def _row_line(letter: DeadLetter) -> bytes | None:
    return letter.value if letter.truncated is None and _is_row(letter) else None


def _export_line(letter: DeadLetter) -> bytes:
    """The row goes in as it stands, so that no number in it changes."""
    from ...state.codec import dumps

    errors = {f"error.{name}": value for name, value in {**_fields(letter), "log": letter.log}.items()}
    if not _is_row(letter):
        return dumps({**errors, "error.value": _text(letter.value)})
    row = (letter.value or b"").strip()[1:-1].strip()
    return b"{" + row + (b"," if row else b"") + dumps(errors)[1:]


def _is_row(letter: DeadLetter) -> bool:
    try:
        return bool(letter.row) or letter.value is not None
    except ValueError:
        return False


# --- as JSON ---------------------------------------------------------------------------------------------------


def _fields(letter: DeadLetter) -> dict[str, Any]:
    mark = letter.mark
    return {
        "id": letter.id,
        "topic": letter.topic,
        "timestamp": letter.timestamp,
        "key": _text(letter.key),
        "source": letter.came_from,
        "session": letter.session,
        "input_row": letter.input_row,
        "stage": letter.stage,
        "type": letter.type,
        "message": letter.message,
        "attempts": letter.attempts,
        "where": letter.where,
        "truncated": letter.truncated,
        "state": _state(letter),
        "state_time": mark.time if mark else None,
        "state_by": mark.by if mark else None,
        "sent_to": (mark.to or None) if mark else None,
    }


def _headers(letter: DeadLetter) -> list[list[str | None]]:
    """In their order; a name may stand there more than once."""
    return [[name, None if value is None else _text(value)] for name, value in letter.headers]


def _value(letter: DeadLetter) -> Any:
    from ...state.codec import loads

    try:
        return None if letter.value is None else loads(letter.value)
    except ValueError:
        return _text(letter.value)


def _text(value: bytes | None) -> Any:
    return None if value is None else value.decode("utf-8", "replace")


def _json_line(value: dict[str, Any]) -> str:
    from ...state.codec import dumps

    text = dumps(value).decode()
    return text if text.isprintable() else json.dumps(value)  # in ASCII: it may be read on a terminal
