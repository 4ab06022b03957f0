"""``rowmill run``: a pipeline over a file, or over what its source topic holds now, to the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...state.errors import ConfigError
from .connect import broker_words, shown_broker
from .output import command, plural, reader_has_left, say
from .parser import (
    Commands,
    add_broker,
    add_command,
    add_commits,
    add_max_deaths,
    add_partitions,
    add_state_dir,
    whole_number,
)
from .progress import counted_progress

if TYPE_CHECKING:
    from ..inputs import FileInput
    from ..pipeline import Pipeline
    from ..runs import RunOutcome
    from ..session import Session
    from .signals import Caught

FAILED = 1
"""Exit code for a job that failed, or lost more rows to errors than was allowed."""


def add_parser(commands: Commands) -> None:
    """``run``'s options."""
    parser = add_command(
        commands,
        "run",
        main,
        words="PIPELINE",
        summary="process a file, or what a topic holds now, to the end",
        about=(
            "Process rows to the end and write their results: those of a file (--input), each exactly once, or those "
            "that the pipeline's source topic holds now. Killed or interrupted, a run goes on where it stopped when "
            "it is started again with the same --session.\n\n"
            "PIPELINE is file.py, file.py:name or module:name."
        ),
        example="rowmill run reviews.py --input reviews.csv --output scored.parquet",
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="where the pipeline is defined")
    parser.add_argument(
        "--input",
        metavar="FILE",
        type=Path,
        help="rows: .csv, .tsv, .jsonl (these also with .gz) or .parquet (default: the pipeline's source topic)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="results, in the order of the input: the same endings; - for standard output (default: leave them in the "
        "sink topic)",
    )
    parser.add_argument(
        "--session",
        metavar="NAME",
        help="name to go on by after a stop (default: a new one with --input, else the live session)",
    )
    add_broker(parser)
    parser.add_argument("--key", metavar="COLUMN", help="column of the input that becomes the key (default: none)")
    add_partitions(parser)
    parser.add_argument(
        "--max-errors", metavar="N", type=whole_number(0), help="exit 1 when more rows fail (default: no limit)"
    )
    add_commits(parser)
    add_state_dir(parser)
    add_max_deaths(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none in a pipe)")
    parser.add_argument("--json", action="store_true", help="the summary as a JSON object on standard output")


@dataclass
class _Job:
    """What is to be run, everything checked, and how far it came."""

    args: argparse.Namespace
    pipeline: Pipeline
    session: Session
    rows: FileInput | None
    done: int = 0
    caught: Caught | None = None

    @property
    def again(self) -> str:
        """The command that goes on with this session."""
        named = self.args.session is not None or self.session.is_live
        return command("rowmill", *self.args.words, *([] if named else ["--session", self.session.id]))


def main(args: argparse.Namespace) -> int:
    """Run, write the results, say what happened."""
    _check_options(args)
    job = _prepare(args)
    if job.rows is not None:
        say(f"session {job.session.id} on {shown_broker(args)}", quiet=args.quiet)
    from ..worker import BUDGET_STAGE

    outcome = _run_to_end(job)
    if outcome is None:
        return job.caught.exit_code if job.caught else FAILED
    try:
        if not _write(job, outcome):
            return FAILED
        _report(job, outcome)
    finally:
        outcome.sorter.close()
    if args.max_errors is not None and outcome.failed > args.max_errors:
        say(f"rowmill: error: {plural(outcome.failed, 'dead letter')}; --max-errors allows {args.max_errors:,}")
        return FAILED
    if outcome.failed and outcome.failed == outcome.rows:
        say("rowmill: error: every row failed")
        return FAILED
    if outcome.stopped_by is not None and outcome.stopped_by.stage == BUDGET_STAGE:
        return FAILED
    return 0


def _check_options(args: argparse.Namespace) -> None:
    from ..outputs import check_output
    from ..session import check_new_session, check_own_session

    if args.session is not None:
        (check_new_session if args.input is None else check_own_session)("--session", args.session)
    if args.key is not None and args.input is None:
        raise ConfigError("--key", args.key, "it names a column of a file; give --input as well")
    if args.output is None:
        return
    check_output(args.output)
    if args.input is not None and args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise ConfigError("--output", str(args.output), "it is the input as well; choose another file")


def _prepare(args: argparse.Namespace) -> _Job:
    from ...handlers.capture import install
    from ...state.clock import SystemClock
    from ..inputs import FileInput
    from ..session import LIVE, Session
    from .load import load_pipeline

    install()  # log records of handlers tell their rows, for whatever format the pipeline's file sets up
    pipeline = load_pipeline(args.pipeline)
    pipeline.chain()
    if args.input is None:
        return _Job(args, pipeline, Session(pipeline.name, args.session or LIVE), None)
    session = Session(pipeline.name, args.session or f"run-{SystemClock().token()}", owns_source=True)
    return _Job(args, pipeline, session, FileInput(args.input, args.key))


# --- running ---------------------------------------------------------------------------------------------------


def _run_to_end(job: _Job) -> RunOutcome | None:
    """The outcome, or None when a signal ended the run early."""
    from ..errors import BrokerError, BrokerUnreachableError, RowFailedError, SessionCancelledError, StalledError
    from ..loops import run_here

    try:
        with counted_progress(job, job.pipeline.name) as report:
            return run_here(_attempt(job, report))
    except InterruptedError:
        say(f"stopped after {plural(job.done, 'row')}; everything done is kept. To go on:\n  {job.again}")
        if job.args.json:
            _print_json(job, {"status": "interrupted", "session": job.session.id, "rows_here": job.done})
        return None
    except BrokerUnreachableError:
        raise  # nothing began
    except SessionCancelledError:
        say(f"cancelled after {plural(job.done, 'row')}; everything done is kept. To go on:\n  {job.again}")
        if job.args.json:
            _print_json(job, {"status": "cancelled", "session": job.session.id, "rows_here": job.done})
        raise
    except (BrokerError, StalledError, RowFailedError):
        say(f"stopped after {plural(job.done, 'row')}; everything done is kept. To go on:\n  {job.again}")
        if job.args.json:
            _print_json(job, {"status": "failed", "session": job.session.id, "rows_here": job.done})
        raise


async def _attempt(job: _Job, report: Callable[[int, int | None], None]) -> RunOutcome:
    from ..brokers.open import open_broker
    from ..options import WorkerOptions
    from ..runs import BoundedRun
    from .signals import orderly_stop

    options = WorkerOptions(
        commit_interval=job.args.commit_interval,
        commit_rows=job.args.commit_rows,
        partitions=job.args.partitions,
        state_dir=job.args.state_dir,
        max_deaths=job.args.max_deaths,
    )
    run = BoundedRun(
        job.pipeline, open_broker(job.args.broker), job.session, job.rows, options=options, progress=report
    )

    note = "" if job.args.quiet else "stopping: rows in work are finished and kept (once more: stop at once)"
    with orderly_stop(run.interrupt, note) as job.caught:
        return await run.execute()


# --- afterwards ------------------------------------------------------------------------------------------------


def _write(job: _Job, outcome: RunOutcome) -> bool:
    """Write the results where they are wanted; False when that failed."""
    from ..errors import InputError
    from ..outputs import write_results

    if job.args.output is None:
        return True
    try:
        write_results(job.args.output, outcome.values)
    except BrokenPipeError:
        if not reader_has_left():
            raise
    except InputError as error:
        # Exit code 1, not 2: the usage was right, the rows are done, only this is left to do.
        say(f"rowmill: error: {error}")
        say(f"all rows are done; to write their results once more:\n  {job.again}")
        return False
    return True


def _report(job: _Job, outcome: RunOutcome) -> None:
    from .run_summary import summary_json, summary_text

    output = str(job.args.output) if job.args.output is not None else None
    if job.args.json:
        _print_json(job, summary_json(outcome, job.pipeline.name, output, shown_broker(job.args)))
    else:
        text = summary_text(outcome, job.pipeline.name, output, broker_words(job.args))
        say(f"\n{text}", quiet=job.args.quiet)
    if outcome.stopped_by is not None:
        say(f"to go on with the rows that are left:\n  {job.again}")


def _print_json(job: _Job, summary: dict[str, object]) -> None:
    """On standard output, unless the results go there."""
    from ...state.codec import dumps

    print(dumps(summary).decode(), file=sys.stderr if str(job.args.output) == "-" else sys.stdout, flush=True)
