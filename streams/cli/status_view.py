"""How the state of sessions looks to people: an overview with a line for each, and one session in detail.

Pure text from :class:`~rowmill.streams.status.SessionStatus`, at a given width of 60 columns or more.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from ...state.execution import ExecutionState
from ..status import WINDOW_SECONDS, PartitionStatus, SessionStatus
from ..status_workers import WorkerStatus
from .output import command, cut, duration, plain, plural

_LEAST_NAME = 10
_NAME = 24
_REMARKS = 6
_TEXT_LINES = 4
_BREAKERS = 4
_DAY_SECONDS = 86_400
_ROUNDS_TO_ONE = 0.9995
_UNITS = ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k"))


class Place(NamedTuple):
    """Where this is looked at.

    Attributes:
        broker: its URL, to be shown.
        words: what a suggested command needs to reach it.
        columns: room in a line.
        is_watched: whether it is shown again and again, where nobody can type what comes next.
    """

    broker: str
    words: Sequence[str] = ()
    columns: int = 80
    is_watched: bool = False


class _Column(NamedTuple):
    title: str
    cell: Callable[[SessionStatus], str]
    right: bool = True


# --- all sessions ----------------------------------------------------------------------------------------------


def overview(statuses: Sequence[SessionStatus], hidden: int, place: Place) -> str:
    """A line for each session, then what deserves a look, then what to type next."""
    if not statuses:
        return _nothing(hidden, place)
    parts = ["\n".join(cut(line, place.columns) for line in _overview_lines(statuses, place.columns))]
    remarks = [remark for status in statuses for remark in _remarks(status)]
    if remarks:
        more = [f"… and {len(remarks) - _REMARKS:,} more"] if len(remarks) > _REMARKS else []
        parts.append("\n".join(cut(line, place.columns) for line in [*remarks[:_REMARKS], *more]))
    if hidden:
        ended = f"{plural(hidden, 'session')} that ended more than a day ago {'is' if hidden == 1 else 'are'} not shown"
        parts.append(f"{ended}: add --all")
    if place.is_watched:
        return "\n\n".join(parts)
    worst = next((status for status in statuses if any(_remarks(status))), statuses[0])
    parts.append(f"next:\n  {command('rowmill', 'status', worst.reference, *place.words)}")
    return "\n\n".join(parts)


def _overview_lines(statuses: Sequence[SessionStatus], columns: int) -> list[str]:
    chosen = list(_COLUMNS)
    widest = max(len("session"), *(len(status.reference) for status in statuses))
    for column in _MORE_COLUMNS:
        if all(column.cell(status) == "-" for status in statuses):
            continue
        if _taken([*chosen, column], statuses) + min(widest, _NAME) <= columns:
            chosen.append(column)
    name = max(_LEAST_NAME, min(widest, columns - _taken(chosen, statuses)))
    rows = [[cut(plain(s.reference), name), *(column.cell(s) for column in chosen)] for s in statuses]
    right = [i for i, column in enumerate(chosen, 1) if column.right]
    return _grid([["session", *(column.title for column in chosen)], *rows], right)


def _taken(chosen: Sequence[_Column], statuses: Sequence[SessionStatus]) -> int:
    """Columns of the terminal that these take, with the gaps before them."""
    return sum(2 + max(len(c.title), *(len(c.cell(status)) for status in statuses)) for c in chosen)


def _nothing(hidden: int, place: Place) -> str:
    if hidden:
        return (
            f"no session on {place.broker} is under way; {plural(hidden, 'session')} ended more than a day ago\n\n"
            f"next:\n  {command('rowmill', 'status', '--all', *place.words)}"
        )
    return (
        f"no sessions on {place.broker}\n\n"
        "A session is known from the first start of a worker, or of a run, on.\n\n"
        "next:\n"
        f"  {command('rowmill', 'run', 'PIPELINE.py', '--input', 'FILE', *place.words)}\n"
        f"  {command('rowmill', 'worker', 'PIPELINE.py', *place.words)}"
    )


def _remarks(status: SessionStatus) -> Iterator[str]:
    """What deserves a look, a line for each."""
    name = plain(status.reference)
    if status.state is ExecutionState.FAILED:
        yield f"{name} failed {_ago(status.record.failed_ms, status.at_ms)} ago: {plain(status.record.failure)}"
    elif status.record.reason and status.activity in {"pausing", "paused", "cancelling", "cancelled"}:
        yield f"{name} is {status.activity}: {plain(status.record.reason)}"
    if status.problem:
        yield f"{name}: {plain(status.problem)}"
    for warning in _warnings(status):
        yield f"{name}: {warning}"


def _warnings(status: SessionStatus) -> Iterator[str]:
    """What keeps rows from being done although nobody asked for that."""
    for resource, state in sorted(status.breakers.items()):
        if state != "closed":
            yield f"the breaker {plain(resource)} is {plain(state).replace('_', ' ')}"
    budget = status.budget
    if budget is not None and 0 < budget.limit <= budget.spent + budget.held and not status.rate and not status.is_over:
        yield f"nothing is left of the budget of {_money(f'{budget.limit:f}')}"
    for worker in status.workers:
        if worker.is_silent:
            silence = f"{WINDOW_SECONDS:g} s or more" if worker.seen_seconds is None else duration(worker.seen_seconds)
            yield f"worker {plain(worker.name)} has said nothing for {silence}"
    if status.state is ExecutionState.IDLE and status.lag:
        yield f"{_offsets(status)} wait, and no worker runs"


# --- one session -----------------------------------------------------------------------------------------------


def detail(status: SessionStatus, place: Place) -> str:
    """All that is known of one session, and what to type next."""
    parts = [
        "\n".join(_head(status, place)),
        "\n".join(_grid(_figures(status), indent="  ")),
        "\n".join(_worker_lines(status, place.columns)),
        "\n".join(_partition_lines(status, place.columns)),
        "\n".join(_stage_lines(status, place.columns)),
    ]
    following = [] if place.is_watched else list(_next(status, place))
    if following:
        parts.append("next:\n" + "\n".join(f"  {line}" for line in following))
    return "\n\n".join(part for part in parts if part)


def _head(status: SessionStatus, place: Place) -> Iterator[str]:
    record = status.record
    kind = "bounded session" if record.is_bounded else "session"
    yield cut(f"{plain(status.reference)}: {_state(status)}", place.columns)
    yield cut(f"  {kind} of group {plain(record.group)} on {place.broker}", place.columns)
    if record.sources:
        arrow = f" -> {plain(record.sink)}" if record.sink else ""
        yield cut(f"  {', '.join(map(plain, record.sources))}{arrow}", place.columns)
    if status.state is ExecutionState.FAILED:
        yield from _wrapped(f"failed {_moment(record.failed_ms, status.at_ms)}: {record.failure}", place)
    if record.wanted != "run" and record.changed_by:
        why = f": {record.reason}" if record.reason else ""
        when = _moment(record.changed_ms, status.at_ms)
        yield from _wrapped(f"{record.wanted} was asked for by {record.changed_by}, {when}{why}", place)
    if status.problem:
        yield from _wrapped(f"problem: {status.problem}", place)
    for warning in _warnings(status):
        yield from _wrapped(warning, place)


def _wrapped(text: str, place: Place) -> list[str]:
    """Text of somebody's, on a few lines."""
    return textwrap.wrap(
        plain(text),
        place.columns,
        initial_indent="  ",
        subsequent_indent="    ",
        max_lines=_TEXT_LINES,
        placeholder=" …",
    )


def _figures(status: SessionStatus) -> list[list[str]]:
    rows, lines = status.rows, []
    done = f"{rows.rows:,}" + (f" of {status.total_rows:,}" if status.total_rows is not None else "")
    if status.percent is not None:
        done += f" ({_percent(status.percent)})"
    split = {
        "ok": rows.ok,
        "dropped": rows.dropped,
        "skipped": rows.skipped,
        "dead letters": rows.dead_letters,
    }
    kinds = ", ".join(f"{count:,} {name}" for name, count in split.items() if count)
    lines.append(["rows done", f"{done}: {kinds}" if kinds else done])
    if rows.defaulted:
        lines.append(["with fallback", f"{rows.defaulted:,} of the ok ones"])
    if rows.results != rows.ok or rows.emitted:
        emitted = f", and {rows.emitted:,} emitted elsewhere" if rows.emitted else ""
        lines.append(["results", f"{rows.results:,}{emitted}"])
    lines.append(["lag", _offsets(status)])
    if status.rate is not None:
        left = f", about {duration(status.left_seconds)} left" if status.left_seconds else ""
        lines.append(["speed", f"{_rate(status.rate)} rows/s{left}"])
    if status.cost or status.tokens:
        lines.append(["cost", f"{_money(f'{status.cost:f}')}, {plural(status.tokens, 'token')}"])
    if status.budget is not None:
        lines.append(["budget", _budget(status)])
    if status.breakers:
        lines.append(["breakers", _breakers(status)])
    oldest = status.oldest
    if oldest is not None:
        where = (
            f"{plain(str(oldest.tp))}/{oldest.oldest_offset}" if oldest.oldest_offset is not None else str(oldest.tp)
        )
        lines.append(["oldest in work", f"{where}, for {duration(oldest.oldest_seconds or 0)}"])
    if full := Counter(each.full for each in status.partitions if each.full):
        lines.append(["full", ", ".join(_full(bound, count) for bound, count in sorted(full.items()))])
    active = f"last active {_ago(status.active_ms, status.at_ms)} ago" if status.active_ms else ""
    if status.started_ms:
        lines.append(["started", f"{_moment(status.started_ms, status.at_ms)}{active and f', {active}'}"])
    return lines


def _full(bound: str, partitions: int) -> str:
    """``2 partitions begin no rows: the worker has as many in work as it may (--max-in-flight)``."""
    begin = "begins" if partitions == 1 else "begin"
    return f"{plural(partitions, 'partition')} {begin} no rows: {_BOUNDS.get(bound, plain(bound))}"


_BOUNDS = {
    "map": "the oldest row in work must end first (its offset map is full)",
    "rows": "the worker has as many in work as it may (--max-in-flight)",
    "bytes": "the worker has as many bytes in work as it may (max_in_flight_bytes)",
}


def _breakers(status: SessionStatus) -> str:
    """Those that are not closed, and the others as far as there is room."""
    ranked = sorted(status.breakers.items(), key=lambda breaker: (breaker[1] == "closed", breaker[0]))
    shown = [f"{plain(name)} {plain(state).replace('_', ' ')}" for name, state in ranked]
    more = f" and {len(shown) - _BREAKERS:,} more" if len(shown) > _BREAKERS else ""
    return ", ".join(shown[:_BREAKERS]) + more


def _budget(status: SessionStatus) -> str:
    budget = status.budget
    if budget is None:
        return ""
    share = f" ({_percent(float(100 * budget.spent / budget.limit))})" if budget.limit else ""
    held = f", {_money(f'{budget.held:f}')} more held" if budget.held else ""
    return f"{_money(f'{budget.spent:f}')} of {_money(f'{budget.limit:f}')} spent{share}{held}"


def _partition_lines(status: SessionStatus, columns: int) -> list[str]:
    if not status.partitions:
        return ["its source topics do not exist"] if status.record.sources else []
    single = len({each.tp.topic for each in status.partitions}) == 1
    titles = ["partition", "committed", "end", "lag", "in work", "worker", "state"]
    wide = ["rows", "failed", "committed ago"] if columns >= 110 else []
    rows = [[*_partition_cells(each, single=single), *_wide_cells(each, status.at_ms)[: len(wide)]]
            for each in status.partitions]  # fmt: skip
    lines = [[*titles, *wide], *rows]
    others = sum(2 + max(len(line[i]) for line in lines) for i in range(1, len(lines[0])))
    name = max(_LEAST_NAME, columns - others)
    lines = [[cut(line[0], name), *line[1:]] for line in lines]
    return [cut(line, columns) for line in _grid(lines, right=[1, 2, 3, 4, 7, 8, 9])]


def _partition_cells(each: PartitionStatus, *, single: bool) -> list[str]:
    return [
        str(each.tp.partition) if single else plain(str(each.tp)),
        "-" if each.committed is None else f"{each.committed:,}",
        f"{each.end:,}",
        "-" if each.lag is None else f"{each.lag:,}",
        f"{each.in_flight:,}" if each.worker else "-",
        cut(plain(each.worker), 14) or "-",
        f"full ({plain(each.full)})" if each.full else plain(each.state) or "-",
    ]


def _wide_cells(each: PartitionStatus, at_ms: int) -> list[str]:
    return [f"{each.rows.rows:,}", f"{each.rows.dead_letters:,}", _ago(each.committed_ms, at_ms)]


def _worker_lines(status: SessionStatus, columns: int) -> list[str]:
    if not status.workers:
        return ["no worker runs"]
    rows = [_worker_cells(worker) for worker in status.workers]
    titles = ["worker", "state", "partitions", "rows/s", "in work", "heard", "where"]
    return [cut(line, columns) for line in _grid([titles, *rows], right=[2, 3, 4, 5])]


def _worker_cells(worker: WorkerStatus) -> list[str]:
    where = f"{plain(worker.host)} pid {worker.pid}" if worker.pid else plain(worker.host)
    return [
        cut(plain(worker.name), 14),
        "silent" if worker.is_silent else worker.phase,
        f"{len(worker.partitions)}",
        _rate(worker.rate),
        f"{worker.in_flight:,}",
        "-" if worker.seen_seconds is None else age(worker.seen_seconds),
        where,
    ]


def _stage_lines(status: SessionStatus, columns: int) -> list[str]:
    if not status.stages:
        return []
    titles = ["stage", "rows", "out", "failed", "calls", "retries", "time-outs", "cached", "p50", "p95"]
    rows = []
    for name, counts in status.stages.items():
        shown = ("rows", "out", "failed", "calls", "retries", "timeouts", "hits")
        figures = [compact(int(counts[figure])) if figure in counts else "-" for figure in shown]
        took = status.latency.get(name, {})
        times = [_took(took.get(quantile)) for quantile in ("p50", "p95")]
        rows.append([cut(plain(name), _NAME), *figures, *times])
    return [cut(line, columns) for line in _grid([titles, *rows], right=range(1, len(titles)))]


def _took(seconds: float | None) -> str:
    """The time of a call: ``1.3 µs``, ``47.0 ms``, ``3.2 s``."""
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else duration(seconds)


def _next(status: SessionStatus, place: Place) -> Iterator[str]:
    """Commands that fit the state."""
    name, record = status.reference, status.record
    session = ["--session", record.session] if record.session != "live" else []

    def line(*words: str) -> str:
        return command("rowmill", *words, *place.words)

    if status.activity in {"pausing", "paused"}:
        yield line("resume", name)
    elif status.workers and status.activity not in {"cancelling", "stopping"} and not status.is_over:
        yield line("pause", name)
    elif status.state is not ExecutionState.COMPLETED and not status.workers:
        if record.owns_source:
            yield line("run", "PIPELINE.py", "--input", "FILE", *session)
        else:
            yield line("worker", "PIPELINE.py", *session)
    if status.rows.dead_letters:
        yield line("dlq", "list", record.pipeline, *session)
    if status.state is ExecutionState.COMPLETED and record.sink:
        yield line("consume", record.sink, "--limit", "5")
    if not status.is_over:
        yield line("status", name, "--watch")


# --- figures ---------------------------------------------------------------------------------------------------


def compact(number: int) -> str:
    """``12,345``, ``123k``, ``1.23M``: six characters at most below 10^13."""
    if number < 100_000:
        return f"{number:,}"
    for unit, letter in _UNITS:
        scaled = number / unit
        if scaled >= _ROUNDS_TO_ONE:
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{letter}"
    raise AssertionError("unreachable")


def age(seconds: float) -> str:
    """``3 s``, ``5 min``, ``2 h``, ``4 d``: the largest unit, rounded down."""
    for unit, name in ((_DAY_SECONDS, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return f"{int(max(0, seconds))} s"


def local_time(at_ms: int) -> str:
    """``2026-11-21 18:03:05``, in the local time zone."""
    return datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _moment(at_ms: int, now_ms: int) -> str:
    """``5 min ago (2026-11-21 18:03)``, in the local time zone; what is a few seconds old, without its time."""
    if not at_ms:
        return "at an unknown time"
    if now_ms - at_ms < 10_000:
        return "just now" if now_ms - at_ms < 1_000 else f"{_ago(at_ms, now_ms)} ago"
    return f"{_ago(at_ms, now_ms)} ago ({local_time(at_ms)[:-3]})"


def _ago(at_ms: int | None, now_ms: int) -> str:
    return age((now_ms - at_ms) / 1000) if at_ms else "-"


def _state(status: SessionStatus) -> str:
    if status.percent is None or status.state is ExecutionState.COMPLETED:
        return status.activity
    return f"{status.activity} {_percent(status.percent)}"


def _percent(percent: float) -> str:
    """Never 100 % before it is."""
    return f"{int(percent)} %" if percent >= 1 or not percent else f"{percent:.1f} %"


def _rate(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:.1f}" if 0 < rate < 10 else compact(round(rate))


def _money(text: str) -> str:
    """An amount with two to six places; none where there are none."""
    whole, _, places = text.partition(".")
    shown = places[:6].rstrip("0")
    if not shown and places.strip("0"):
        return f"{whole}.{places.rstrip('0')}"  # a millionth of something: better long than nothing
    return f"{int(whole):,}" + (f".{shown:0<2}" if shown else "")


def _offsets(status: SessionStatus) -> str:
    return plural(status.lag, "offset")


def _oldest_seconds(status: SessionStatus) -> str:
    oldest = status.oldest
    return "-" if oldest is None else duration(oldest.oldest_seconds or 0)


def _grid(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "") -> list[str]:
    """Aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    flush = frozenset(right)
    return [
        (
            indent
            + "  ".join(
                c.rjust(w) if i in flush else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    ]


_COLUMNS = (
    _Column("state", _state, right=False),
    _Column("workers", lambda status: f"{len(status.workers)}"),
    _Column("lag", lambda status: compact(status.lag)),
    _Column("rows/s", lambda status: _rate(status.rate)),
    _Column("rows", lambda status: compact(status.rows.rows)),
    _Column("failed", lambda status: compact(status.rows.dead_letters)),
)
"""Of the overview, behind the session's name."""
_MORE_COLUMNS = (
    _Column("active", lambda status: _ago(status.active_ms, status.at_ms)),
    _Column("left", lambda status: "-" if status.left_seconds is None else duration(status.left_seconds)),
    _Column("cost", lambda status: _money(f"{status.cost:f}") if status.cost else "-"),
    _Column("oldest", _oldest_seconds),
)
"""What is shown besides where there is room, in this order."""
