"""``rowmill``: reads the command line, runs the command, and turns every error into a line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ... import __version__
from ...state.errors import ConfigError, RowmillError
from . import (
    cmd_cancel,
    cmd_checkpoints,
    cmd_console,
    cmd_consume,
    cmd_diff,
    cmd_dlq,
    cmd_doctor,
    cmd_pause,
    cmd_publish,
    cmd_replay,
    cmd_resume,
    cmd_run,
    cmd_status,
    cmd_topics,
    cmd_worker,
)
from .connect import collect_seldom
from .logs import in_json, set_up_logging
from .output import reader_has_left, say
from .parser import USAGE, Commands, Parser, add_verbosity, did_you_mean
from .signals import StoppedError, leave_threads_behind

COMMANDS = (
    cmd_run,
    cmd_worker,
    cmd_status,
    cmd_pause,
    cmd_resume,
    cmd_cancel,
    cmd_replay,
    cmd_diff,
    cmd_dlq,
    cmd_checkpoints,
    cmd_publish,
    cmd_consume,
    cmd_topics,
    cmd_console,
    cmd_doctor,
)
"""In the order of the help text."""

_EPILOG = """\
PIPELINE is file.py, file.py:name or module:name. Without --broker, rowmill uses
$ROWMILL_BROKER, else the broker embedded in the folder .rowmill.

exit codes:
  0 done   1 the job failed   2 wrong usage   130 Ctrl-C   143 SIGTERM

example:
  rowmill run reviews.py --input reviews.csv --output scored.parquet"""


def entry() -> int:
    """The console script."""
    collect_seldom()
    code = main()
    leave_threads_behind(code)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``rowmill``; default: this process's.

    Returns:
        The exit code: 0 done, 1 the job failed, 2 wrong usage, 130 or 143 after a signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show … or ✓ must not end a job
    try:
        args = _parse(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    set_up_logging(args.verbose, quiet=args.quiet, form=args.log_format)
    try:
        code = args.main(args)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - each kind gets its line and exit code
        return _explain(error)
    return int(code)


def _open_what_is_closed() -> None:
    """Started with standard output or error closed (``>&-``), as daemons are: what is said there goes nowhere."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the life of the process


def _explain(error: BaseException) -> int:
    """Say what ended the command; returns the exit code."""
    if isinstance(error, BrokenPipeError) and reader_has_left():
        return 0  # whoever read our output has seen enough
    if isinstance(error, RowmillError):
        say(f"rowmill: error: {error}", level="error")
        return USAGE if _is_usage(error) else 1
    if isinstance(error, StoppedError):
        say(f"rowmill: interrupted: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        say("rowmill: interrupted")
        return 130
    if not in_json():
        say("".join(traceback.format_exception(error)).rstrip())
    bug = f"rowmill: error: this is a bug in rowmill {__version__}; please report it with its traceback"
    say(bug, level="error", bug=error)
    return 1


def build_parser() -> Parser:
    """The parser with all commands."""
    parser = Parser(
        prog="rowmill",
        description="Run row pipelines as event-driven stream processors.",
        epilog=_EPILOG,
        usage="rowmill [-v | -q] [--log-format F] COMMAND …",
    )
    parser.add_argument("--version", action="version", version=f"rowmill {__version__}")
    add_verbosity(parser)
    commands: Commands = parser.add_subparsers(title="commands", prog="rowmill", metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.add_parser(commands)
    for one in commands.choices.values():
        add_verbosity(one, default=argparse.SUPPRESS)
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    # Of the options before the command only one takes a value, so the first other word without a dash is the command.
    pairs = zip(["", *words], words, strict=False)
    command = next((word for before, word in pairs if word[:1] != "-" and before != "--log-format"), None)
    names = [module.__name__.rpartition("cmd_")[2] for module in COMMANDS]
    if command is not None and command not in names:
        hint = did_you_mean(command, names) or f"; commands are {', '.join(names)}"
        parser.error(f"there is no command {command!r}{hint}")
    args = parser.parse(words)
    if args.command is None:
        parser.print_help(sys.stderr)
        raise SystemExit(USAGE)
    return args


def _is_usage(error: RowmillError) -> bool:
    from ..errors import InputError

    if isinstance(error, (ConfigError, InputError)):
        return True
    load = sys.modules.get(f"{__package__}.load")
    return load is not None and isinstance(error, load.UserCodeError)
