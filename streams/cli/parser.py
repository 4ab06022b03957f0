"""Arguments: a parser whose errors say what to do next, and the options that commands share."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeAlias

from ..options import WorkerOptions
from .logs import FORMS, masked

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # noqa: SLF001 - argparse has no public name for it
Main: TypeAlias = Callable[[argparse.Namespace], int]

DEFAULTS = WorkerOptions()

USAGE = 2
"""Exit code for what the caller got wrong."""


class Parser(argparse.ArgumentParser):
    """argparse with errors in our form, without abbreviated options (a new option must not break a script)."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where help is."""
        self.exit(USAGE, f"rowmill: error: {masked(message)}\ntry: {self.prog} --help\n")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments of the command named in ``words``.

        Raises:
            SystemExit: they are wrong, or help was asked for.
        """
        args, unknown = self.parse_known_args(words)
        if unknown:
            parser: Parser = getattr(args, "parser", self)
            known = re.findall(r"--[a-z][a-z-]*", parser.format_help())
            parser.error(f"unrecognized argument: {unknown[0]}{did_you_mean(unknown[0].partition('=')[0], known)}")
        args.words = list(words)
        return args


class _Help(argparse.RawDescriptionHelpFormatter):
    """Options at a fixed column; our own line breaks in examples; never wider than 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)
        self._width = min(self._width, 100)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for a word that is close to a known one, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def add_command(
    commands: Commands, name: str, main: Main, *, words: str = "", summary: str, about: str, example: str
) -> Parser:
    """A command's parser with what every command has.

    Args:
        commands: where to add it.
        name: what is typed.
        main: what runs.
        words: what must follow the name.
        summary: a line for ``rowmill --help``.
        about: what it does, for its own help.
        example: one command line.
    """
    parser = commands.add_parser(
        name,
        usage=f"rowmill {name}{words and f' {words}'} [options]",
        help=summary,
        description="\n\n".join(textwrap.fill(part, 78) for part in about.split("\n\n")),
        epilog=f"example:\n  {example}",
    )
    parser.set_defaults(main=main, parser=parser)
    return parser


def add_verbosity(parser: argparse.ArgumentParser, *, default: Any = None) -> None:
    """``-v``, ``-q``, ``--log-format``; a command's own keep what was given before it (``default=SUPPRESS``)."""
    top = default is None
    parser.add_argument(
        "-v", "--verbose", action="count", default=0 if top else default, help="log what happens (-vv: in detail)"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", default=False if top else default, help="print errors and results only"
    )
    parser.add_argument(
        "--log-format",
        choices=FORMS,
        default="text" if top else default,
        help="json: one JSON object per line for all that is said on standard error (default: text)",
    )


def add_broker(parser: argparse.ArgumentParser) -> None:
    """``--broker``."""
    parser.add_argument(
        "--broker",
        metavar="URL",
        help="kafka://host:port[,…] or local://DIR (default: $ROWMILL_BROKER, else local://.rowmill)",
    )


def add_partitions(parser: argparse.ArgumentParser) -> None:
    """``--partitions``."""
    parser.add_argument(
        "--partitions",
        metavar="N",
        type=whole_number(1),
        help="partitions of topics that are made (default: 6 on Kafka, 4 embedded)",
    )


def add_no_create(parser: argparse.ArgumentParser) -> None:
    """``--no-create-topics``."""
    parser.add_argument(
        "--no-create-topics",
        action="store_true",
        help="fail when a topic is missing (default: missing topics are made)",
    )


def add_commits(parser: argparse.ArgumentParser) -> None:
    """``--commit-interval`` and ``--commit-rows``."""
    parser.add_argument(
        "--commit-interval",
        metavar="S",
        type=seconds(at_least_zero=True),
        default=DEFAULTS.commit_interval,
        help="longest time from a row's completion to its commit (default: %(default)g s)",
    )
    parser.add_argument(
        "--commit-rows",
        metavar="N",
        type=whole_number(1),
        default=DEFAULTS.commit_rows,
        help=f"rows after which a commit is made at once (default: {DEFAULTS.commit_rows:,})",
    )


def add_state_dir(parser: argparse.ArgumentParser) -> None:
    """``--state-dir``."""
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="where tables are kept; workers of one machine may share it (default: state in the embedded broker's "
        "folder, else .rowmill/state)",
    )


def add_max_deaths(parser: argparse.ArgumentParser) -> None:
    """``--max-deaths``."""
    parser.add_argument(
        "--max-deaths",
        metavar="N",
        type=whole_number(0),
        default=DEFAULTS.max_deaths,
        help="a row that was in work at so many deaths of its process in a row becomes a dead letter unrun; 0: never, "
        "for machines that are killed from outside again and again (default: %(default)s)",
    )


def whole_number(least: int) -> Callable[[str], int]:
    """An option's type: a whole number, underscores allowed as in Python."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number from {least}")
        return number

    return parse


def seconds(*, at_least_zero: bool = False) -> Callable[[str], float]:
    """An option's type: seconds, above 0 unless 0 has a meaning."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf") or not (number or at_least_zero):
            raise argparse.ArgumentTypeError(f"got {text!r}; give seconds {'from' if at_least_zero else 'above'} 0")
        return number

    return parse
