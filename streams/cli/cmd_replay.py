"""``rowmill replay``: move a session's position, or run a part of its rows once more in a session of its own."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...state.errors import ConfigError
from .connect import broker_words, on_broker, shown_broker
from .output import command, plural, say, table, width
from .parser import Commands, add_broker, add_command, add_commits, add_max_deaths, add_state_dir
from .progress import counted_progress

if TYPE_CHECKING:
    from datetime import datetime

    from ..brokers.base import Broker
    from ..hold import Standstill
    from ..pipeline import Pipeline
    from ..replay import Execution, Move, Replay, Target
    from ..runs import Progress, RunOutcome
    from ..session import Session
    from ..side_replay import Asked
    from .signals import Caught

FAILED = 1
_SIDE_ONLY = ("begin", "until", "no_cache")
_TARGETS = ("earliest", "latest", "current", "offset", "datetime", "duration", "shift", "file")


def add_parser(commands: Commands) -> None:
    """``replay``'s options."""
    parser = add_command(
        commands,
        "replay",
        main,
        words="PIPELINE",
        summary="run rows again: move a session's position, or a side session over a range",
        about=(
            "Show what moving the position of the live session would do; --execute moves it. Its workers have to be "
            "stopped, or paused (rowmill pause), and go on from there. The options are those of Kafka's own reset "
            "tool.\n\n"
            "With --state rebuild, tables are emptied and made again: all rows before the target run once more, "
            "without results.\n\n"
            "With --side, run a range of the source topics once more, now and here, in a session with a group, tables "
            "and output topics of its own; the live session is left alone.\n\n"
            "PIPELINE is file.py, file.py:name or module:name; or, without --side, the pipeline's name with --source."
        ),
        example="rowmill replay reviews.py --to-datetime 2026-01-31T12:00:00.000",
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="where the pipeline is defined, or its name")
    add_broker(parser)
    _add_targets(parser)
    parser.add_argument(
        "--topic",
        metavar="T[:0,1]",
        action="append",
        default=[],
        help="only this source, or these partitions of it; may be repeated (default: all)",
    )
    parser.add_argument(
        "--source",
        metavar="TOPIC",
        action="append",
        default=[],
        help="a source topic, where PIPELINE is a name; may be repeated",
    )
    parser.add_argument(
        "--state",
        choices=["keep", "reset", "rebuild"],
        default="keep",
        help="tables: keep them as they are; reset them to empty in partitions that move; or rebuild them from the "
        "earliest row, without results up to the target, which is --to-current if none is given (default: %(default)s)",
    )
    parser.add_argument(
        "--session",
        metavar="NAME",
        help="the session to move (default: the live one); with --side, the new session's name: after a stop, go on by "
        "it (default: a new one)",
    )
    acting = parser.add_mutually_exclusive_group()
    acting.add_argument("--execute", action="store_true", help="move the position")
    acting.add_argument("--dry-run", action="store_true", help="show what would happen (the default)")
    _add_side(parser)
    parser.add_argument("--json", action="store_true", help="a JSON object on standard output instead of text")


def _add_targets(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where to go, one of").add_mutually_exclusive_group().add_argument
    add("--to-earliest", dest="earliest", action="store_true", help="the first row there is")
    add("--to-latest", dest="latest", action="store_true", help="the end: leave out what waits")
    add("--to-current", dest="current", action="store_true", help="stay, and forget what is done above the position")
    add(
        "--to-offset",
        dest="offset",
        metavar="N",
        help="this offset in each partition; the log's ends where it has no N",
    )
    add(
        "--to-datetime",
        dest="datetime",
        metavar="TIME",
        help="the first row from YYYY-MM-DDTHH:mm:SS.sss on, local unless it names a zone",
    )
    add("--by-duration", dest="duration", metavar="PnDTnHnMnS", help="the first row of the last so long, as PT12H")
    add("--shift-by", dest="shift", metavar="N", help="N offsets on, or back with -N")
    add("--from-file", dest="file", metavar="FILE", type=Path, help="lines of topic,partition,offset")


def _add_side(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a session of its own")
    group.add_argument("--side", action="store_true", help="run a range in a session of its own, to its end")
    where = "earliest, end, an offset (in every partition), or a time"
    group.add_argument("--from", dest="begin", metavar="WHERE", help=f"{where} (default: earliest)")
    group.add_argument("--until", metavar="WHERE", help=f"{where}, which is not run any more (default: end)")
    group.add_argument(
        "--no-cache", action="store_true", help="call handlers again where other sessions have kept their answers"
    )
    add_commits(parser)
    add_state_dir(parser)
    add_max_deaths(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none in a pipe)")


def main(args: argparse.Namespace) -> int:
    """Plan, move, or run on the side."""
    asked = [name for name in _TARGETS if getattr(args, name) not in (None, False)]
    if args.side:
        _check_side(args, asked)
        return _side(args)
    for name in _SIDE_ONLY:
        if getattr(args, name) not in (None, False):
            option = "--from" if name == "begin" else "--" + name.replace("_", "-")
            raise ConfigError(option, getattr(args, name), "it goes with --side")
    if not asked and args.state == "rebuild":
        asked = ["current"]
    if not asked:
        raise ConfigError(
            "replay", None, "say where to go: --to-earliest, --to-latest, --to-current, --to-offset, --to-datetime, "
            "--by-duration, --shift-by or --from-file; or --side for a session of its own",
        )  # fmt: skip
    return _move(args, asked[0])


# --- moving the live session -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """The pipeline as far as a move needs it. What is None is not known, as only its name was given."""

    session: Session
    sources: list[str]
    sink: str | None = None
    tables: list[str] | None = None
    start: datetime | str = "earliest"

    @property
    def name(self) -> str:
        """As other commands know the session."""
        return self.session.group.removeprefix("rowmill.")


def _move(args: argparse.Namespace, how: str) -> int:
    subject = _subject(args)
    if args.state == "rebuild" and subject.tables == []:
        raise ConfigError("--state", "rebuild", "the pipeline has no tables; leave --state out")
    target = _target(args, how, subject.sources)
    return on_broker(args.broker, lambda broker: _plan_or_execute(args, broker, subject, target))


def _subject(args: argparse.Namespace) -> _Subject:
    from ..session import LIVE, Session, check_topic

    is_name = not args.pipeline.endswith(".py") and ":" not in args.pipeline
    if is_name and not args.source:
        raise ConfigError(
            "PIPELINE", args.pipeline, "write file.py, file.py:name or module:name; or, for a pipeline's name, say "
            "what it reads: --source TOPIC",
        )  # fmt: skip
    if args.source:
        if not is_name:
            raise ConfigError("--source", args.source[0], "it goes with a pipeline's name; a file tells its sources")
        sources = [check_topic("--source", topic) for topic in args.source]
        return _Subject(Session(args.pipeline, args.session or LIVE), sources)
    from .load import load_pipeline

    pipeline = load_pipeline(args.pipeline)
    session = Session(pipeline.name, args.session or LIVE)
    sink = session.output(pipeline.sink)
    return _Subject(session, list(pipeline.sources), sink, list(pipeline.tables), pipeline.start)


def _target(args: argparse.Namespace, how: str, sources: Sequence[str]) -> Target:
    from ..offset_times import parse_duration, parse_moment, parse_place, parse_shift
    from ..replay import Target

    given = getattr(args, how)
    if how == "offset":
        place = parse_place("--to-offset", given) if given.isdigit() else None
        if place is None or place.kind != "offset":
            raise ConfigError(
                "--to-offset", given, "give a whole number from 0; --to-earliest and --to-latest are ends"
            )
        return Target("offset", place.value)
    if how == "datetime":
        return Target("time", parse_moment("--to-datetime", given))
    if how == "duration":
        return Target("duration", parse_duration("--by-duration", given))
    if how == "shift":
        return Target("shift", parse_shift("--shift-by", given))
    if how == "file":
        return _target_of_file(args, sources)
    return Target(how)  # type: ignore[arg-type]  # earliest, latest, current


def _target_of_file(args: argparse.Namespace, sources: Sequence[str]) -> Target:
    from ..errors import InputError
    from ..offset_times import parse_offsets
    from ..replay import Target

    if args.topic:
        raise ConfigError("--topic", args.topic[0], "the file names the partitions; leave one of the two out")
    try:
        lines = args.file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"cannot read {args.file}: {why}") from None
    offsets = parse_offsets("--from-file", str(args.file), lines)
    for tp in offsets:
        if tp.topic not in sources:
            raise ConfigError("--from-file", str(tp), f"the pipeline reads {', '.join(sources)}")
    return Target("file", offsets=offsets)


async def _plan_or_execute(args: argparse.Namespace, broker: Broker, subject: _Subject, target: Target) -> int:
    from ..offset_times import parse_topics
    from ..replay import Replay

    replay = Replay(
        broker,
        subject.session,
        subject.sources,
        target,
        state=args.state,
        only=parse_topics("--topic", args.topic, subject.sources) if args.topic else None,
        has_tables=None if subject.tables is None else bool(subject.tables),
        start=subject.start,
    )
    if args.execute:
        return await _execute(args, replay, subject, target)
    moves, standstill = await replay.plan(), await replay.standstill()
    if args.json:
        _print_json(args, subject, moves, {}, standstill)
    else:
        print(_plan_text(args, subject, target, moves))
        say(f"\nnothing was changed; to do it{_first(args, subject, standstill)}:\n  {_again(args)}", quiet=args.quiet)
    return 0


def _first(args: argparse.Namespace, subject: _Subject, standstill: Standstill) -> str:
    """What has to happen before it can be executed."""
    if not standstill.members or standstill.is_paused:
        return ""
    one = standstill.members == 1
    workers = "the worker that runs" if one else f"the {standstill.members:,} workers that run"
    pause = command("rowmill", "pause", subject.name, *broker_words(args))
    return f", stop {workers},\nor pause {'it' if one else 'them'} ({pause})"


async def _execute(args: argparse.Namespace, replay: Replay, subject: _Subject, target: Target) -> int:
    standstill = await replay.standstill()
    if standstill.is_paused and standstill.members:
        say("waiting until all workers say that they are paused", quiet=args.quiet)
    execution = await replay.execute(_progress(args))
    if args.json:
        failed = {str(tp): str(error) for tp, error in execution.failed.items()}
        _print_json(args, subject, execution.moved, failed, standstill)
    elif execution.moved:
        print(_plan_text(args, subject, target, execution.moved))
    return _tell_failures(args, subject, execution, standstill)


def _progress(args: argparse.Namespace) -> Callable[[Move], None]:
    """On a terminal, a line for each partition: those with large tables take a while."""
    if args.quiet or args.no_progress or not sys.stderr.isatty():
        return lambda _: None
    return lambda move: say(f"  {move.tp} {'was moved before' if move.done else 'moved'}")


def _tell_failures(args: argparse.Namespace, subject: _Subject, execution: Execution, standstill: Standstill) -> int:
    if not execution.failed:
        resume = command("rowmill", "resume", subject.name, *broker_words(args))
        paused = f"done; the session is paused, and goes on from there with:\n  {resume}"
        say(paused if standstill.is_paused else "done; the next worker goes on from there", quiet=args.quiet)
        return 0
    for tp, error in sorted(execution.failed.items()):
        say(f"rowmill: error: {tp} was not moved: {error}")
    say(
        f"{plural(len(execution.moved), 'partition')} moved, {len(execution.failed):,} not. Before a worker starts, "
        f"run this again; what has moved stays:\n  {command('rowmill', *args.words)}"
    )
    return FAILED


def _again(args: argparse.Namespace) -> str:
    return command("rowmill", *(word for word in args.words if word != "--dry-run"), "--execute")


def _plan_text(args: argparse.Namespace, subject: _Subject, target: Target, moves: Sequence[Move]) -> str:
    verb = "moved" if args.execute else "would move"
    lines = [f"{subject.session.pipeline}: group {subject.session.group} on {shown_broker(args)} {verb}"]
    moment = _moment(target)
    if moment:
        lines[0] += f" to {moment}"
    rebuilds = args.state == "rebuild"
    shown: list[tuple[str, ...]] = [("partition", "from", "to", *(["tables from"] * rebuilds), "again", "skipped", "")]
    shown += [_move_line(move, rebuilds=rebuilds) for move in moves]
    lines += ["", table(shown, right=range(1, len(shown[0]) - 1), indent="  "), ""]
    for line in _consequences(args, subject, moves):
        lines.append(textwrap.fill(line, width(), initial_indent="  ", subsequent_indent=" " * 13))
    return "\n".join(lines)


def _moment(target: Target) -> str:
    from ..offset_times import shown_moment

    return f"the first rows from {shown_moment(target.value)} on" if target.how == "time" else ""


def _move_line(move: Move, *, rebuilds: bool) -> tuple[str, ...]:
    before = "-" if move.before is None else f"{move.before:,}"
    to = before if move.to is None else f"{move.to:,}"
    begin = "-" if move.rebuilds_from is None else f"{move.rebuilds_from:,}"
    cells = (str(move.tp), before, to, *([begin] if rebuilds else []), f"{move.run_again:,}", f"{move.skipped:,}")
    return (*cells, move.note)


def _consequences(args: argparse.Namespace, subject: _Subject, moves: Sequence[Move]) -> Iterator[str]:
    again, discarded = sum(move.run_again for move in moves), sum(move.discarded for move in moves)
    skipped = sum(move.skipped for move in moves)
    if args.state == "rebuild":
        rebuilt = sum(move.rebuilt for move in moves)
        yield f"rows       at most {rebuilt:,} run first for the tables alone, without results"
        yield f"           at most {again:,} run again with results; those of {skipped:,} are left out"
    else:
        yield f"rows       at most {again:,} run again and {skipped:,} are left out (gaps of the log count)"
    tail = f": {plural(discarded, 'row')} done above the position run again" if discarded else ""
    kept = any(move.kept_map for move in moves)
    yield "offset map heeded: what is done gives no results again" if kept else f"offset map discarded{tail}"
    yield f"tables     {_tables(args, subject, moves)}"
    if again:
        sink = f" in {subject.sink} and {subject.session.dead_letters}" if subject.sink else ""
        yield f"results    those of rows that run again appear once more{sink}"
        yield "counts     rows, cost and tokens are sums: what runs again counts again"
    if args.state == "rebuild":
        yield "handlers   are called for all of these rows, and paid, but where a cache has the answer"
        yield from _warnings(moves)


def _warnings(moves: Sequence[Move]) -> Iterator[str]:
    """Rows that the tables may have been made from, and that nobody has any more."""
    short = [move for move in moves if move.lost and move.to is not None]
    if short:
        places = ", ".join(f"{move.tp} begins at {move.lost:,}" for move in short[:3])
        more = f" and {len(short) - 3:,} more begin later than at 0" if len(short) > 3 else ""
        yield f"WARNING    {places}{more}: what older rows wrote to tables is lost"


def _tables(args: argparse.Namespace, subject: _Subject, moves: Sequence[Move]) -> str:
    if subject.tables is not None and not subject.tables:
        return "the pipeline has none"
    if args.state != "keep":
        entries = sum(move.entries or 0 for move in moves)
        emptied = f"emptied in these partitions: {entries:,} {'entry' if entries == 1 else 'entries'}"
        return f"{emptied}; then made again" if args.state == "rebuild" else emptied
    names = f" ({', '.join(subject.tables)})" if subject.tables else ""
    return f"kept as they are{names}: rows that run again write to them again"


def _print_json(
    args: argparse.Namespace,
    subject: _Subject,
    moves: Sequence[Move],
    failed: dict[str, str],
    standstill: Standstill,
) -> None:
    from ...state.codec import dumps

    print(
        dumps(
            {
                "pipeline": subject.session.pipeline,
                "group": subject.session.group,
                "broker": shown_broker(args),
                "executed": bool(args.execute),
                "state": args.state,
                "workers": standstill.members,
                "paused": standstill.is_paused,
                "sink": subject.sink,
                "run_again": sum(move.run_again for move in moves),
                "skipped": sum(move.skipped for move in moves),
                "rebuilt": sum(move.rebuilt for move in moves),
                "partitions": [_move_json(move) for move in moves],
                "failed": failed,
            }
        ).decode()
    )


def _move_json(move: Move) -> dict[str, Any]:
    return {
        "topic": move.tp.topic,
        "partition": move.tp.partition,
        "from": move.before,
        "to": move.to,
        "run_again": move.run_again,
        "skipped": move.skipped,
        "discarded_from_map": move.discarded,
        "table_entries": move.entries,
        "moved_before": move.done,
        "rebuilds_from": move.rebuilds_from,
        "rebuilt": move.rebuilt,
        "lost": move.lost,
        "note": move.note,
    }


# --- on the side -----------------------------------------------------------------------------------------------


def _check_side(args: argparse.Namespace, asked: Sequence[str]) -> None:
    from ..session import LIVE, check_new_session

    if asked:
        raise ConfigError("--side", True, "it runs a range: give --from and --until instead of where to go")
    if args.execute or args.dry_run:
        raise ConfigError("--execute" if args.execute else "--dry-run", True, "not with --side, which runs at once")
    if args.state != "keep":
        raise ConfigError("--state", args.state, "a side session has tables of its own, which begin empty")
    if args.source:
        raise ConfigError("--source", args.source[0], "--side runs the pipeline: PIPELINE is where it is defined")
    if args.session is not None and check_new_session("--session", args.session) == LIVE:
        raise ConfigError("--session", LIVE, "this is the session that reads the source topics; choose another name")


@dataclass
class _Job:
    """A side replay, and how far it came."""

    args: argparse.Namespace
    pipeline: Pipeline
    session: Session
    asked: Asked
    done: int = 0
    caught: Caught | None = None

    @property
    def again(self) -> str:
        """The command that goes on with it."""
        return command("rowmill", *self.args.words, *([] if self.args.session else ["--session", self.session.id]))


def _side(args: argparse.Namespace) -> int:
    from ..errors import BrokerError, RowFailedError, StalledError
    from ..loops import run_here

    job = _prepare(args)
    say(f"session {job.session.id} on {shown_broker(args)}", quiet=args.quiet)
    try:
        with counted_progress(job, job.session.id) as report:
            outcome = run_here(_run_side(job, report))
    except InterruptedError:
        _say_stopped(job)
        return job.caught.exit_code if job.caught else FAILED
    except (BrokerError, StalledError, RowFailedError):
        _say_stopped(job)
        raise
    try:
        return _report(job, outcome)
    finally:
        outcome.sorter.close()


def _prepare(args: argparse.Namespace) -> _Job:
    from ...handlers.capture import install
    from ...state.clock import SystemClock
    from ..offset_times import EARLIEST, END, parse_place, parse_topics
    from ..session import Session
    from ..side_replay import Asked
    from .load import load_pipeline

    install()  # log records of handlers tell their rows, for whatever format the pipeline's file sets up
    pipeline = load_pipeline(args.pipeline)
    pipeline.chain()
    said = args.begin is not None or args.until is not None or args.topic
    asked = Asked(
        begin=EARLIEST if args.begin is None else parse_place("--from", args.begin),
        end=END if args.until is None else parse_place("--until", args.until),
        only=parse_topics("--topic", args.topic, list(pipeline.sources)) if args.topic else None,
        text=f"{args.begin or 'earliest'} {args.until or 'end'} {sorted(args.topic)}" if said else None,
    )
    session = Session(pipeline.name, args.session or f"replay-{SystemClock().token()}")
    return _Job(args, pipeline, session, asked)


async def _run_side(job: _Job, report: Progress) -> RunOutcome:
    from .connect import connected

    return await connected(job.args.broker, lambda broker: _attempt(job, broker, report))


async def _attempt(job: _Job, broker: Broker, report: Progress) -> RunOutcome:
    from dataclasses import replace

    from ..options import WorkerOptions
    from ..runs import BoundedRun
    from ..side_replay import EarlyEnd, answers_apart, open_range
    from .signals import orderly_stop

    args, pipeline, session = job.args, job.pipeline, job.session
    options = WorkerOptions(
        commit_interval=args.commit_interval,
        commit_rows=args.commit_rows,
        state_dir=args.state_dir,
        max_deaths=args.max_deaths,
    )
    if args.no_cache:
        options = replace(options, state_dir=answers_apart(options, broker, session))
    has_tables = bool(pipeline.tables)
    ranges = await open_range(
        broker, session, list(pipeline.sources), job.asked, has_tables=has_tables, options=options
    )
    shortened = EarlyEnd(broker, {tp: end for tp, (_, end) in ranges.items()})
    run = BoundedRun(pipeline, shortened, session, None, options=options, progress=report)
    note = "" if args.quiet else "stopping: rows in work are finished and kept (once more: stop at once)"
    with orderly_stop(run.interrupt, note) as job.caught:
        return await run.execute()


def _say_stopped(job: _Job) -> None:
    say(f"stopped after {plural(job.done, 'row')}; everything done is kept. To go on:\n  {job.again}")


def _report(job: _Job, outcome: RunOutcome) -> int:
    from ...state.codec import dumps
    from ..session import LIVE
    from ..worker import BUDGET_STAGE
    from .run_summary import summary_json, summary_text

    args = job.args
    if args.json:
        print(dumps(summary_json(outcome, job.pipeline.name, None, shown_broker(args))).decode(), flush=True)
    else:
        say(f"\n{summary_text(outcome, job.pipeline.name, None, broker_words(args))}", quiet=args.quiet)
        compare = command("rowmill", "diff", args.pipeline, LIVE, job.session.id, *broker_words(args))
        say(f"  {compare}", quiet=args.quiet)
    if outcome.stopped_by is not None:
        say(f"to go on with the rows that are left:\n  {job.again}")
        return FAILED if outcome.stopped_by.stage == BUDGET_STAGE else 0
    if outcome.failed and outcome.failed == outcome.rows:
        say("rowmill: error: every row failed")
        return FAILED
    return 0
