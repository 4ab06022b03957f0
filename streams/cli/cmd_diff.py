"""``rowmill diff``: what two sessions of a pipeline made of the same rows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .connect import on_broker, shown_broker
from .output import cut, plain, plural, say, table
from .parser import Commands, add_broker, add_command, whole_number

if TYPE_CHECKING:
    from ..brokers.base import Broker
    from ..compare import Comparison, Difference
    from ..session import Session

DIFFERENT = 1
_VALUE_CHARACTERS = 40


def add_parser(commands: Commands) -> None:
    """``diff``'s options."""
    parser = add_command(
        commands,
        "diff",
        main,
        words="PIPELINE SESSION_A SESSION_B",
        summary="compare the results of two sessions",
        about=(
            "Compare the results that two sessions made of the same rows, by the topic, partition and offset of the "
            "row and the result's number. 'live' is the live session. Where a row ran again in the same session, its "
            "last result counts; where one is a side replay, only the rows of its range are compared. Side topics and "
            "dead letters are not. Exit code 0: equal, 1: different."
        ),
        example="rowmill diff reviews.py live replay-3f2a9c01",
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="where the pipeline is defined, or its name with --sink")
    parser.add_argument("session_a", metavar="SESSION_A", help="a session's name, or live")
    parser.add_argument("session_b", metavar="SESSION_B", help="another")
    add_broker(parser)
    parser.add_argument("--sink", metavar="TOPIC", help="the pipeline's sink, where PIPELINE is a name")
    parser.add_argument(
        "--limit",
        metavar="N",
        type=whole_number(0),
        default=10,
        help="differences that are shown; all are counted (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object on standard output instead of text")


def main(args: argparse.Namespace) -> int:
    """Compare, and say how much they differ."""
    from ...state.errors import ConfigError
    from ..session import Session, check_name, check_topic

    if check_name("SESSION_A", args.session_a) == check_name("SESSION_B", args.session_b):
        raise ConfigError("SESSION_B", args.session_b, "it is SESSION_A; give two sessions")
    is_name = not args.pipeline.endswith(".py") and ":" not in args.pipeline
    if is_name != (args.sink is not None):
        raise ConfigError(
            "PIPELINE" if is_name else "--sink", args.pipeline if is_name else args.sink,
            "write file.py, file.py:name or module:name; or a pipeline's name together with --sink TOPIC",
        )  # fmt: skip
    if args.sink is not None:
        name, sink = args.pipeline, check_topic("--sink", args.sink)
    else:
        from .load import load_pipeline

        pipeline = load_pipeline(args.pipeline)
        name, sink = pipeline.name, pipeline.sink
    a, b = Session(name, args.session_a), Session(name, args.session_b)
    found = on_broker(args.broker, lambda broker: _compare(args, broker, sink, a, b))
    if args.json:
        _print_json(args, found)
    else:
        print(_text(args, name, found))
        if found.differences > len(found.shown):
            say(f"{plural(found.differences, 'difference')}; --limit shows more", quiet=args.quiet)
    return DIFFERENT if found.differences else 0


async def _compare(args: argparse.Namespace, broker: Broker, sink: str, a: Session, b: Session) -> Comparison:
    from ..compare import compare

    return await compare(broker, sink, a, b, limit=args.limit)


def _text(args: argparse.Namespace, name: str, found: Comparison) -> str:
    a, b = args.session_a, args.session_b
    where = ", rows of the side replay's range" if found.ranges else ""
    counts = [
        ("equal", f"{found.equal:,}"),
        ("changed", f"{found.changed:,}"),
        (f"only in {a}", f"{found.only_a:,}"),
        (f"only in {b}", f"{found.only_b:,}"),
    ]
    counts += [
        (f"run again in {session}", f"{again:,}")
        for session, again in ((a, found.again_a), (b, found.again_b))
        if again
    ]
    parts = [f"{name}: results of {a} and {b}{where}", table(counts, right=[1], indent="  ")]
    if found.shown:
        lines = [("source", "difference"), *((shown.place, _what(shown, a, b)) for shown in found.shown)]
        parts.append(table(lines, indent="  "))
    return "\n\n".join(parts)


def _what(difference: Difference, a: str, b: str) -> str:
    if difference.kind != "changed":
        return f"only in {a if difference.kind == 'only_a' else b}"
    shown = [f"{name or 'value'}: {_value(x)} -> {_value(y)}" for name, (x, y) in difference.fields.items()]
    return plain("; ".join(shown))


def _value(value: Any) -> str:
    from ...state.codec import dumps
    from ..compare import ABSENT

    return "(absent)" if value is ABSENT else cut(dumps(value).decode(), _VALUE_CHARACTERS)


def _print_json(args: argparse.Namespace, found: Comparison) -> None:
    from ...state.codec import dumps

    summary = {
        "a": args.session_a,
        "b": args.session_b,
        "broker": shown_broker(args),
        "equal": found.equal,
        "changed": found.changed,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "again_a": found.again_a,
        "again_b": found.again_b,
        "range_only": found.ranges,
        "differences": [_difference_json(difference) for difference in found.shown],
    }
    print(dumps(summary).decode())


def _difference_json(difference: Difference) -> dict[str, Any]:
    from ..compare import ABSENT

    fields = {
        name: {side: value for side, value in (("a", x), ("b", y)) if value is not ABSENT}
        for name, (x, y) in difference.fields.items()
    }
    return {"kind": difference.kind, "source": difference.place, "fields": fields}
