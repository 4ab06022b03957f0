"""``rowmill checkpoints``: what sessions there are to go on with, what one of them is, and removing what is over."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ...state.errors import ConfigError
from .connect import CALL_SECONDS, broker_words, on_broker, shown_broker
from .output import command, cut, plain, plural, say, table, width
from .parser import Commands, Parser, add_command, add_state_dir, add_verbosity

if TYPE_CHECKING:
    from ..broker_checkpoints import BrokerCheckpoints
    from ..brokers.base import Broker
    from ..checkpoint_stores import CheckpointInfo
    from ..session_traces import Trace, Traces

ABORTED = 1
_STOP_SECONDS = 60.0
_WIDEST_NAME = 40
_AGE = re.compile(r"(?P<number>\d{1,6})\s*(?P<unit>s|m|min|h|d|w)")
_UNITS = {"s": 1_000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}
_SESSION = "PIPELINE, PIPELINE.NAME, the group, just NAME where one session only is called so, or the session's id"
_ABOUT = """\
A session's checkpoint is what a worker goes on from: its committed offsets, its context and its tables. Without an \
action, or with list, every session of the broker is shown with what can be done with it; `rowmill status` shows more \
of those that run.

All of it is read from the broker: no worker need run."""


def add_parser(commands: Commands) -> None:
    """``checkpoints``'s actions and their options."""
    parser = add_command(
        commands,
        "checkpoints",
        _list,
        words="[ACTION]",
        summary="list, show and remove sessions and their checkpoints",
        about=_ABOUT,
        example="rowmill checkpoints delete --older-than 7d",
    )
    _add_shared(parser, "a JSON object per session and line", default=None)
    actions: Commands = parser.add_subparsers(
        title="actions", prog="rowmill checkpoints", metavar="ACTION", dest="action", required=False
    )
    for add in (_add_list, _add_show, _add_delete):
        add_verbosity(add(actions), default=argparse.SUPPRESS)


def _add_list(actions: Commands) -> Parser:
    parser = add_command(
        actions,
        "list",
        _list,
        summary="every session: state, progress, rows, cost, age",
        about="Every session of the broker, the one that was active last first. 'resume' tells whether there is "
        "something to go on with. Of a session without an end, 'done' counts the rows that are there now. The age is "
        "the time since its last sign of life.",
        example="rowmill checkpoints list --json",
    )
    parser.usage = "rowmill checkpoints list [options]"
    _add_shared(parser, "a JSON object per session and line")
    return parser


def _add_shared(parser: Parser, json: str, *, default: str | None = argparse.SUPPRESS) -> None:
    """``--json`` and ``--broker``: an action's own keep what was given before the action."""
    parser.add_argument("--json", action="store_true", default=False if default is None else default, help=json)
    parser.add_argument(
        "--broker",
        metavar="URL",
        default=default,
        help="kafka://host:port[,…] or local://DIR (default: $ROWMILL_BROKER, else local://.rowmill)",
    )


def _add_show(actions: Commands) -> Parser:
    parser = add_command(
        actions,
        "show",
        _show,
        summary="one session, its checkpoint, and what it left",
        about="All that is known of one session, and everything on the broker and on this machine that is its own.",
        example="rowmill checkpoints show reviews.monday",
    )
    parser.usage = "rowmill checkpoints show SESSION [options]"
    parser.add_argument("session", metavar="SESSION", help=_SESSION)
    add_state_dir(parser)
    _add_shared(parser, "a JSON object, with the checkpoint's twelve keys in it")
    return parser


def _add_delete(actions: Commands) -> Parser:
    parser = add_command(
        actions,
        "delete",
        _delete,
        summary="remove every trace of sessions, and nothing else",
        about="Remove sessions for good: their consumer groups with the offsets, their topics, their tables on this "
        "machine, their artifacts, and what is known of them. Everything is shown first, and on a terminal you are "
        "asked; elsewhere nothing is removed without --yes.\n\n"
        "Of a live session its source, sink and dead letters stay, which are not its own; it begins anew, from the "
        "earliest row, when a worker starts.\n\n"
        "A session that workers serve is refused. A removal that was killed comes to its end when it is run again.",
        example="rowmill checkpoints delete reviews.monday --dry-run",
    )
    parser.usage = "rowmill checkpoints delete [SESSION …] [options]"
    parser.add_argument("sessions", metavar="SESSION", nargs="*", help=_SESSION)
    parser.add_argument(
        "--older-than",
        metavar="AGE",
        help="instead of names: all sessions without a sign of life for so long, as 30m, 12h, 7d or PT36H, that no "
        "worker serves; live ones stay",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--cancel",
        action="store_true",
        help=f"cancel sessions that workers serve, and wait up to {_STOP_SECONDS:g} s until these have left",
    )
    add_state_dir(parser)
    _add_shared(parser, "a JSON object per session and line, once it is done")
    return parser


# --- list ------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    infos = on_broker(args.broker, lambda broker: _checkpoints(args, broker).infos())
    if args.json:
        for info in infos:
            print(_json_line(info.to_dict()))
    elif infos:
        print("\n".join(_table(infos)))
    else:
        say(f"no sessions on {shown_broker(args)}", quiet=args.quiet)
    for info in infos:
        if info.problem:
            say(f"rowmill: {info.session}: {plain(info.problem)}")
    return 0


def _checkpoints(args: argparse.Namespace, broker: Broker) -> BrokerCheckpoints:
    from ...state.clock import SystemClock
    from ..broker_checkpoints import BrokerCheckpoints
    from ..options import WorkerOptions

    options = WorkerOptions(state_dir=getattr(args, "state_dir", None), broker_timeout=CALL_SECONDS)
    return BrokerCheckpoints(broker, clock=SystemClock(), options=options)


def _table(infos: Sequence[CheckpointInfo]) -> list[str]:
    titles = ("session", "state", "resume", "done", "rows", "cost", "age")
    lines = [
        (
            plain(info.session or str(info.session_id)),
            _state(info),
            "yes" if info.resumable else "no",
            _percent(info.progress),
            f"{info.rows:,}",
            _money(info.cost),
            _age(info),
        )
        for info in infos
    ]
    others = [max(len(line[i]) for line in (titles, *lines)) for i in range(1, len(titles))]
    room = max(12, min(_WIDEST_NAME, width() - sum(others) - 2 * len(others)))
    rows = [(cut(name, room), *cells) for name, *cells in (titles, *lines)]
    return table(rows, right=[3, 4, 5, 6]).split("\n")


def _state(info: CheckpointInfo) -> str:
    if info.is_being_removed:
        return "half removed"
    return "kept" if info.state is None else info.state.value


def _percent(percent: float) -> str:
    """Never 100 % before it is."""
    return f"{int(percent)} %"


def _money(cost: Decimal) -> str:
    whole, _, places = f"{cost:,f}".partition(".")
    places = places[:6].rstrip("0")
    return f"{whole}.{places}" if places else whole


def _age(info: CheckpointInfo) -> str:
    from .status_view import age

    return "?" if info.age is None else age(info.age.total_seconds())


# --- show ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Shown:
    """What ``show`` tells of."""

    info: CheckpointInfo
    data: dict[str, Any] | None
    traces: Traces | None


def _show(args: argparse.Namespace) -> int:
    shown = on_broker(args.broker, lambda broker: _look(args, broker))
    if args.json:
        traces = None if shown.traces is None else _traces_json(shown.traces)
        print(_json_line({**shown.info.to_dict(), "checkpoint": shown.data, **(traces or {})}))
    else:
        print("\n".join(_described(shown)))
    return 0


async def _look(args: argparse.Namespace, broker: Broker) -> _Shown:
    from ..session_traces import list_traces

    checkpoints = _checkpoints(args, broker)
    infos = {info.session_id: info for info in await checkpoints.infos()}
    session_id = await checkpoints.find(args.session)
    if session_id not in infos:
        raise ConfigError("SESSION", args.session, await _no_such(args, broker))
    info = infos[session_id]
    if not info.group:
        return _Shown(info, await checkpoints.load(session_id), None)
    data = None if info.problem else await checkpoints.load(session_id)
    return _Shown(info, data, await list_traces(broker, info.group, options=checkpoints.options))


def _described(shown: _Shown) -> Iterator[str]:
    info, traces = shown.info, shown.traces
    facts = {
        "session": info.session,
        "group": info.group,
        "session id": str(info.session_id),
        "state": _state(info),
        "resume": "yes" if info.resumable else "no",
        "done": f"{_percent(info.progress)} ({info.rows:,} of {plural(info.total_rows, 'row')})",
        "failed": f"{info.failed_rows:,}" if info.failed_rows else "",
        "skipped": f"{info.skipped_rows:,}" if info.skipped_rows else "",
        "cost": f"{info.cost:f}" + (f" ({info.tokens:,} tokens)" if info.tokens else ""),
        "workers": str(info.workers) if info.workers else "none",
        "last active": ""
        if info.age is None
        else f"{info.timestamp.astimezone():%Y-%m-%d %H:%M:%S} ({_age(info)} ago)",
        "problem": info.problem,
    }
    if traces is not None:
        record = traces.record
        facts |= {
            "sources": ", ".join(record.sources),
            "sink": record.sink,
            "dead letters": record.dead_letters,
            "stages": ", ".join(record.stages),
            "tables": ", ".join(record.tables),
            "failure": record.failure,
        }
    for name, text in facts.items():
        if text:
            yield f"{name:<12}  {plain(text)}"
    if traces is not None:
        yield ""
        yield "its own, which `rowmill checkpoints delete` removes:"
        yield from _trace_lines(traces)


def _last_active(info: CheckpointInfo) -> str:
    from .status_view import local_time

    if info.age is None:
        return ""
    return f"{local_time(round(info.timestamp.timestamp() * 1000))} ({_age(info)} ago)"


def _trace_lines(traces: Traces) -> Iterator[str]:
    rows = [(_kind(trace), plain(trace.name), plain(trace.what)) for trace in traces.found]
    if rows:
        room = max(20, width() - 2 - max(len(kind) for kind, _, _ in rows) - 4 - 22)
        yield table([(kind, _cut_middle(name, room), what) for kind, name, what in rows], indent="  ")
    else:
        yield "  nothing"
    for kept in traces.kept:
        yield f"  stays: {plain(kept.name)} ({plain(kept.why)})"


def _kind(trace: Trace) -> str:
    return "control topic" if trace.kind == "record" else trace.kind


def _cut_middle(text: str, wide: int) -> str:
    """Names differ at both ends."""
    if len(text) <= wide:
        return text
    head = (wide - 1) // 2
    return f"{text[:head]}…{text[-(wide - 1 - head) :]}"


def _traces_json(traces: Traces) -> dict[str, Any]:
    return {
        "traces": [{"kind": trace.kind, "name": trace.name, "what": trace.what} for trace in traces.found],
        "stays": [{"name": kept.name, "why": kept.why} for kept in traces.kept],
    }


# --- delete ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Doomed:
    """One session that is to be removed: its traces, or the id of a checkpoint that somebody kept by hand."""

    name: str
    session_id: UUID
    traces: Traces | None


def _delete(args: argparse.Namespace) -> int:
    older_ms = None if args.older_than is None else parse_age("--older-than", args.older_than)
    if args.sessions and older_ms is not None:
        raise ConfigError("--older-than", args.older_than, "not together with names; give the one or the other")
    if not args.sessions and older_ms is None:
        raise ConfigError("SESSION", None, "name sessions, or give --older-than 7d; `rowmill checkpoints` lists them")
    doomed = on_broker(args.broker, lambda broker: _choose(args, broker, older_ms))
    if not doomed:
        say("nothing to remove", quiet=args.quiet)
        return 0
    if not args.json:
        print("\n\n".join("\n".join(_plan_lines(each)) for each in doomed), flush=True)
    if args.dry_run:
        return _tell_dry_run(args, doomed)
    _check_idle(args, doomed)
    if not args.yes and not _confirmed(args, doomed):
        say("nothing was removed")
        return ABORTED
    return on_broker(args.broker, lambda broker: _remove_all(args, broker, doomed))


async def _choose(args: argparse.Namespace, broker: Broker, older_ms: int | None) -> list[_Doomed]:
    """The sessions that were named, or are old enough, with what each left."""
    from ..known_sessions import find_sessions
    from ..session_traces import list_traces

    checkpoints = _checkpoints(args, broker)
    infos = await checkpoints.infos()
    chosen = await _named(args, broker, checkpoints, infos) if older_ms is None else _old(args, infos, older_ms)
    known = await find_sessions(broker, clock=checkpoints.clock, timeout=CALL_SECONDS)
    doomed = []
    for info in chosen:
        if not info.group:
            doomed.append(_Doomed(str(info.session_id), info.session_id, None))
            continue
        traces = await list_traces(broker, info.group, options=checkpoints.options, known=known)
        if traces is not None and traces.found:
            doomed.append(_Doomed(info.session, info.session_id, traces))
    return doomed


async def _named(
    args: argparse.Namespace, broker: Broker, checkpoints: BrokerCheckpoints, infos: Sequence[CheckpointInfo]
) -> list[CheckpointInfo]:
    by_id = {info.session_id: info for info in infos}
    chosen = {}
    for word in args.sessions:
        session_id = await checkpoints.find(word)
        if session_id not in by_id:
            raise ConfigError("SESSION", word, await _no_such(args, broker))
        chosen[session_id] = by_id[session_id]
    return list(chosen.values())


async def _no_such(args: argparse.Namespace, broker: Broker) -> str:
    place = shown_broker(args)
    from ...state.clock import SystemClock
    from ..known_sessions import find_sessions
    from ..session_refs import resolve

    known = await find_sessions(broker, clock=SystemClock(), timeout=CALL_SECONDS)
    try:
        resolve(args.session if "session" in args else args.sessions[0], known.keys(), place)
    except ConfigError as error:
        return error.remedy
    return f"there is no such session on {place}"


def _old(args: argparse.Namespace, infos: Sequence[CheckpointInfo], older_ms: int) -> list[CheckpointInfo]:
    """Those that nobody serves, without a sign of life for so long; and those whose removal did not come to its end."""
    chosen = []
    for info in infos:
        is_old = info.age is not None and info.age.total_seconds() * 1000 >= older_ms
        if not is_old and not info.is_being_removed:
            continue
        if info.workers:
            say(f"{info.session} stays: {plural(info.workers, 'worker')} serve it", quiet=args.quiet)
        elif info.session == info.pipeline and info.group and not info.is_being_removed:
            say(f"{info.session} stays: it is a live session; name it to remove it", quiet=args.quiet)
        else:
            chosen.append(info)
    return chosen


def _plan_lines(doomed: _Doomed) -> Iterator[str]:
    if doomed.traces is None:
        yield f"session {doomed.name}: a checkpoint that was kept by hand"
        return
    workers = doomed.traces.workers
    yield f"session {doomed.name}" + (f", which {plural(workers, 'worker')} serve" if workers else "") + ":"
    yield from _trace_lines(doomed.traces)


def _tell_dry_run(args: argparse.Namespace, doomed: Sequence[_Doomed]) -> int:
    if args.json:
        for each in doomed:
            print(_json_line(_doomed_json(each, removed=False)))
    words = [word for word in args.words if word != "--dry-run"]
    say(f"nothing was removed; to do it: {command('rowmill', *words)}", quiet=args.quiet)
    return 0


def _check_idle(args: argparse.Namespace, doomed: Sequence[_Doomed]) -> None:
    """Before anything is removed, or asked."""
    from ..errors import GroupBusyError

    for each in doomed:
        if each.traces is not None and each.traces.workers and not args.cancel:
            serve = "1 worker serves" if each.traces.workers == 1 else f"{each.traces.workers} workers serve"
            cancel = command("rowmill", "cancel", each.name, *broker_words(args))
            raise GroupBusyError(f"{serve} session {each.name}; stop first ({cancel}), or add --cancel")


def _confirmed(args: argparse.Namespace, doomed: Sequence[_Doomed]) -> bool:
    """Ask the person at the terminal."""
    what = doomed[0].name if len(doomed) == 1 else plural(len(doomed), "session")
    if args.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError("delete", what, "this removes it for good; add --yes (or look at it first with --dry-run)")
    print(f"Remove {what} for good? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


async def _remove_all(args: argparse.Namespace, broker: Broker, doomed: Sequence[_Doomed]) -> int:
    """All of them; one that fails does not keep the others."""
    from ...state.errors import RowmillError

    failed = 0
    for each in doomed:
        try:
            await _remove(args, broker, each)
        except RowmillError as error:
            failed += 1
            say(f"rowmill: error: {each.name}: {error}")
            continue
        if args.json:
            print(_json_line(_doomed_json(each, removed=True)))
        else:
            say(f"removed {each.name}", quiet=args.quiet)
    if failed:
        say(f"rowmill: {failed} of {plural(len(doomed), 'session')} not removed, or in part; run it again")
    return 1 if failed else 0


async def _remove(args: argparse.Namespace, broker: Broker, doomed: _Doomed) -> None:
    from ..session_traces import remove_traces
    from .asking import who

    checkpoints = _checkpoints(args, broker)
    if doomed.traces is not None:
        await remove_traces(
            broker,
            doomed.traces,
            options=checkpoints.options,
            stop_workers=_STOP_SECONDS if args.cancel else None,
            by=who(),
        )
    await checkpoints.forget(doomed.session_id)


def _doomed_json(doomed: _Doomed, *, removed: bool) -> dict[str, Any]:
    found = {"traces": [], "stays": []} if doomed.traces is None else _traces_json(doomed.traces)
    return {"session": doomed.name, "session_id": str(doomed.session_id), "removed": removed, **found}


def _json_line(value: dict[str, Any]) -> str:
    from ...state.codec import dumps

    return dumps(value).decode()


def parse_age(setting: str, text: str) -> int:
    """A time that passed, as ``30m``, ``12h``, ``7d`` or of ISO 8601, in milliseconds.

    Raises:
        ConfigError: it is none.
    """
    from ..offset_times import parse_duration

    found = _AGE.fullmatch(text.strip().lower())
    if found is not None:
        return int(found["number"]) * _UNITS[found["unit"]]
    try:
        return parse_duration(setting, text)
    except ConfigError:
        raise ConfigError(setting, text, "give a number and s, m, h, d or w, as 30m, 12h or 7d, or as PT36H") from None
