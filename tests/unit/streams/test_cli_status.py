"""How the state of sessions looks: at 80 columns, wider, in a pipe, on a screen, as JSON."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from rowmill.state.errors import ConfigError
from rowmill.state.execution import ExecutionState, Wanted
from rowmill.state.model import TopicPartition
from rowmill.streams.cli import cmd_status
from rowmill.streams.cli.cmd_status import Pipe, Screen, status_json, visible
from rowmill.streams.cli.parser import Parser
from rowmill.streams.cli.status_view import Place, age, compact, detail, local_time, overview
from rowmill.streams.errors import BrokerError
from rowmill.streams.session_records import SessionRecord
from rowmill.streams.status import BudgetStatus, PartitionStatus, RowCounts, SessionStatus
from rowmill.streams.status_workers import WorkerStatus
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock

NOW = 1_750_000_000_000
PLACE = Place("kafka://broker:9092", ("--broker", "kafka://broker:9092"))


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone for the times that are shown."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def record(session: str = "live", **fields: Any) -> SessionRecord:
    """A session of the pipeline ``reviews``."""
    group = "rowmill.reviews" + ("" if session == "live" else f".{session}")
    given = {"sources": ("reviews",), "sink": "reviews.scored", "started_ms": NOW - 3 * 3_600_000, **fields}
    return SessionRecord(group=group, pipeline="reviews", session=session, **given)


def status(session: str = "live", state: ExecutionState = ExecutionState.IDLE, **fields: Any) -> SessionStatus:
    """A session as it was looked up."""
    given = {
        "reference": "reviews" if session == "live" else f"reviews.{session}",
        "record": record(session),
        "is_registered": True,
        "activity": state.value,
        "at_ms": NOW,
        "started_ms": NOW - 3 * 3_600_000,
        "active_ms": NOW - 400,
        **fields,
    }
    return SessionStatus(state=state, **given)


TPS = [TopicPartition("reviews", 0), TopicPartition("reviews", 1)]
BUSY = status(
    state=ExecutionState.EXECUTING,
    rows=RowCounts(rows=1_203_334, ok=1_203_000, dropped=300, dead_letters=34, results=1_203_000),
    lag=12_340,
    rate=1_203.4,
    left_seconds=10.25,
    cost=Decimal("12.5"),
    tokens=90_000,
    budget=BudgetStatus(limit=Decimal(50), spent=Decimal("12.345678"), held=Decimal("0.5")),
    breakers={"openai": "open", "store": "closed"},
    stages={
        "score": {"rows": 1_290, "out": 1_256, "failed": 34, "calls": 1_300, "retries": 12, "timeouts": 1, "hits": 0},
        "tidy": {"rows": 1_300, "out": 1_290, "calls": 1_300},
    },
    latency={"score": {"p50": 0.047, "p95": 1.2, "p99": 2.0}, "tidy": {"p50": 1.3e-6, "p95": None}},
    workers=(
        WorkerStatus(
            name="a1b2c3d4", member="aiokafka-1", host="box", pid=4711, phase="running", seen_seconds=0.4,
            partitions=tuple(TPS), rate=1_203.4, in_flight=64,
        ),
    ),
    partitions=(
        PartitionStatus(
            tp=TPS[0], committed=1_001_200, end=1_013_540, lag=12_340, waiting=12_340, worker="a1b2c3d4",
            state="running", in_flight=64, oldest_offset=1_001_200, oldest_seconds=12.34,
        ),
        PartitionStatus(tp=TPS[1], end=0),
    ),
)  # fmt: skip


def test_the_overview_at_80_columns() -> None:
    """A line per session, what deserves a look, and what to type next."""
    job = status(
        "run-3f2a9c01", ExecutionState.EXECUTING, percent=42.3, total_rows=1_000, rows=RowCounts(rows=423, ok=423)
    )
    failed = status(
        "night",
        ExecutionState.FAILED,
        record=record("night", failure="RowFailedError: score: no such model", failed_ms=NOW - 300_000),
    )
    assert overview([BUSY, job, failed], 2, PLACE).splitlines() == [
        "session               state           workers     lag  rows/s   rows  failed",
        "reviews               executing             1  12,340   1,203  1.20M      34",
        "reviews.run-3f2a9c01  executing 42 %        0       0       -    423       0",
        "reviews.night         failed                0       0       -      0       0",
        "",
        "reviews: the breaker openai is open",
        "reviews.night failed 5 min ago: RowFailedError: score: no such model",
        "",
        "2 sessions that ended more than a day ago are not shown: add --all",
        "",
        "next:",
        "  rowmill status reviews --broker kafka://broker:9092",
    ]


def test_there_is_more_where_there_is_room() -> None:
    """Columns are added while they fit, and no line is wider than the terminal."""
    title = overview([BUSY], 0, PLACE._replace(columns=120)).splitlines()[0]
    assert title.split() == [
        "session", "state", "workers", "lag", "rows/s", "rows", "failed", "active", "left", "cost", "oldest"
    ]  # fmt: skip
    assert "oldest" not in overview([status()], 0, PLACE._replace(columns=120))  # nobody has one
    long = replace(
        BUSY, reference="a-very-long-name-of-a-pipeline-" * 3, workers=(replace(BUSY.workers[0], is_silent=True),)
    )
    for columns in (60, 80, 100, 120):
        text = overview([long, BUSY], 0, Place("local://x", columns=columns)).partition("next:")[0]
        assert max(map(len, text.splitlines())) <= columns


def test_one_session_at_80_columns() -> None:
    """Figures, workers, partitions and stages fit 80 columns, and are followed by commands that fit the state."""
    assert detail(BUSY, PLACE).splitlines() == [
        "reviews: executing",
        "  session of group rowmill.reviews on kafka://broker:9092",
        "  reviews -> reviews.scored",
        "  the breaker openai is open",
        "",
        "  rows done       1,203,334: 1,203,000 ok, 300 dropped, 34 dead letters",
        "  lag             12,340 offsets",
        "  speed           1,203 rows/s, about 10.2 s left",
        "  cost            12.50, 90,000 tokens",
        "  budget          12.345678 of 50 spent (24 %), 0.50 more held",
        "  breakers        openai open, store closed",
        "  oldest in work  reviews/0/1001200, for 12.3 s",
        "  started         3 h ago (2025-06-15 12:06), last active 0 s ago",
        "",
        "worker    state    partitions  rows/s  in work  heard  where",
        "a1b2c3d4  running           2   1,203       64    0 s  box pid 4711",
        "",
        "partition  committed        end     lag  in work  worker    state",
        "0          1,001,200  1,013,540  12,340       64  a1b2c3d4  running",
        "1                  -          0       -        -  -         -",
        "",
        "stage   rows    out  failed  calls  retries  time-outs  cached      p50    p95",
        "score  1,290  1,256      34  1,300       12          1       0  47.0 ms  1.2 s",
        "tidy   1,300  1,290       -  1,300        -          -       -   1.3 µs      -",
        "",
        "next:",
        "  rowmill pause reviews --broker kafka://broker:9092",
        "  rowmill dlq list reviews --broker kafka://broker:9092",
        "  rowmill status reviews --watch --broker kafka://broker:9092",
    ]


def test_wider_partitions_and_several_topics() -> None:
    """With room a partition's own rows are told; with several topics each partition names its own."""
    two = replace(BUSY, partitions=(BUSY.partitions[0], PartitionStatus(tp=TopicPartition("more", 0), end=3)))
    text = detail(two, PLACE._replace(columns=120))
    assert "rows  failed  committed ago" in text
    assert "\nreviews/0  " in text
    assert "\nmore/0     " in text


@pytest.mark.parametrize(
    ("shown", "commands"),
    [
        (status(state=ExecutionState.PAUSED), ["rowmill resume reviews", "rowmill status reviews --watch"]),
        (status(state=ExecutionState.EXECUTING, activity="pausing"), ["rowmill resume reviews"]),
        (status(), ["rowmill worker PIPELINE.py", "rowmill status reviews --watch"]),
        (status("night"), ["rowmill worker PIPELINE.py --session night"]),
        (status(state=ExecutionState.FAILED), ["rowmill worker PIPELINE.py"]),
        (
            status("job", record=record("job", owns_source=True, is_bounded=True)),
            ["rowmill run PIPELINE.py --input FILE --session job"],
        ),
        (status("job", ExecutionState.COMPLETED), ["rowmill consume reviews.scored --limit 5"]),
        (
            status("job", ExecutionState.CANCELLED, rows=RowCounts(rows=1, dead_letters=1)),
            ["rowmill worker PIPELINE.py --session job", "rowmill dlq list reviews --session job"],
        ),
    ],
)
def test_what_to_type_next(shown: SessionStatus, commands: list[str]) -> None:
    """Each state suggests what one would do then."""
    following = detail(shown, Place("local://x")).partition("next:\n")[2].splitlines()
    assert [line.strip() for line in following][: len(commands)] == commands
    assert "next:" not in detail(shown, Place("local://x", is_watched=True))


def test_why_it_stands_still() -> None:
    """Who asked for a pause and why, a failure, a silent worker, an empty budget, rows without a worker."""
    paused = status(
        state=ExecutionState.PAUSED,
        record=record(wanted=Wanted.PAUSE, changed_by="ann@desk", changed_ms=NOW - 60_000, reason="lunch"),
    )
    assert "pause was asked for by ann@desk, 1 min ago (2025-06-15 15:05): lunch" in detail(paused, PLACE)
    assert "reviews is paused: lunch" in overview([paused], 0, PLACE)
    failed = status(state=ExecutionState.FAILED, record=record(failure="no " * 200, failed_ms=NOW - 7_000))
    lines = detail(failed, PLACE).splitlines()
    assert lines[3].startswith("  failed 7 s ago: no no")
    assert max(map(len, lines)) <= 80
    silent = replace(BUSY, workers=(replace(BUSY.workers[0], is_silent=True, seen_seconds=7.0),))
    assert "worker a1b2c3d4 has said nothing for 7.0 s" in detail(silent, PLACE)
    broke = replace(BUSY, rate=0.0, budget=BudgetStatus(limit=Decimal(5), spent=Decimal(4), held=Decimal(1)))
    assert "nothing is left of the budget of 5" in overview([broke], 0, PLACE)
    assert "1 offset wait" not in overview([status()], 0, PLACE)
    assert "7 offsets wait, and no worker runs" in overview([status(lag=7)], 0, PLACE)


def test_foreign_text_cannot_steer_the_terminal() -> None:
    """Names and messages come from topics that others write to."""
    evil = record(failure="\x1b[2Jgone", failed_ms=NOW, changed_by="\x1b]0;x", wanted=Wanted.PAUSE, reason="\x07")
    shown = status(state=ExecutionState.FAILED, record=evil, problem="\x1b[31m", breakers={"\x1b[1m": "open"})
    worker = replace(BUSY.workers[0], name="\x1b[5m", host="\x1b[6m")
    for text in (detail(replace(shown, workers=(worker,)), PLACE), overview([shown], 0, PLACE)):
        assert "\x1b" not in text
        assert "\x07" not in text


def test_empty_states_say_what_to_do() -> None:
    """No sessions at all, and none but old ones."""
    assert overview([], 0, PLACE).splitlines() == [
        "no sessions on kafka://broker:9092",
        "",
        "A session is known from the first start of a worker, or of a run, on.",
        "",
        "next:",
        "  rowmill run PIPELINE.py --input FILE --broker kafka://broker:9092",
        "  rowmill worker PIPELINE.py --broker kafka://broker:9092",
    ]
    assert "rowmill status --all" in overview([], 3, PLACE)


def test_old_ended_sessions_are_hidden() -> None:
    """A bounded session that ended is listed for a day; a live one always; the busy ones stand first."""
    bounded, day = record("job", is_bounded=True), 86_400_000
    old = status("job", ExecutionState.COMPLETED, record=bounded, active_ms=NOW - day - 1)
    young = status("job", ExecutionState.COMPLETED, record=bounded, active_ms=NOW - day + 1_000)
    idle_for_long = status(active_ms=NOW - 9 * day)
    halfway = status("job", record=bounded, active_ms=NOW - 9 * day)
    found = visible([old, young, idle_for_long, halfway, BUSY], everything=False)
    assert found == ([BUSY, idle_for_long, halfway, young], 1)
    assert visible([old], everything=True) == ([old], 0)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (12_345, "12,345"), (99_999, "99,999"), (123_456, "123k"), (1_234_567, "1.23M"), (999_600, "1.00M"),
     (12_345_678, "12.3M"), (1_500_000_000, "1.50G"), (4_000_000_000_000, "4000G")],
)  # fmt: skip
def test_large_numbers(number: int, text: str) -> None:
    """Numbers that would not fit a column are rounded, with a letter."""
    assert compact(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (0.9, "0 s"), (59.9, "59 s"), (60, "1 min"), (3_599, "59 min"), (7_300, "2 h"), (180_000, "2 d")],
)
def test_ages(seconds: float, text: str) -> None:
    """The largest unit, rounded down."""
    assert age(seconds) == text


def test_times_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person reads the time of the own clock."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    assert local_time(NOW) == "2025-06-15 17:06:40"


# --- as JSON ---------------------------------------------------------------------------------------------------


def test_json_is_stable() -> None:
    """Names and types that programs rely on; money is text, times are UTC, what is unknown is null."""
    found = status_json([BUSY], "local://x", NOW)
    assert (found["broker"], found["at"]) == ("local://x", "2025-06-15T15:06:40.000Z")
    (session,) = found["sessions"]
    partition, worker = session.pop("partitions")[0], session.pop("workers")[0]
    assert session == {
        "session": "reviews", "group": "rowmill.reviews", "pipeline": "reviews", "id": "live",
        "state": "executing", "activity": "executing",
        "wanted": "run", "wanted_by": None, "wanted_at": None, "reason": None, "failure": None, "failed_at": None,
        "registered": True, "bounded": False,
        "sources": ["reviews"], "sink": "reviews.scored", "dead_letters_topic": None, "tables": [], "stage_names": [],
        "at": "2025-06-15T15:06:40.000Z", "started_at": "2025-06-15T12:06:40.000Z",
        "active_at": "2025-06-15T15:06:39.600Z",
        "rows": {"rows": 1203334, "ok": 1203000, "dropped": 300, "skipped": 0, "dead_letters": 34, "defaulted": 0,
                 "results": 1203000, "emitted": 0},
        "rows_per_second": 1203.4, "lag": 12340, "percent": None, "total_rows": None, "seconds_left": 10.25,
        "cost": "12.5", "tokens": 90000, "budget": {"limit": "50", "spent": "12.345678", "held": "0.5"},
        "breakers": {"openai": "open", "store": "closed"},
        "stages": {"score": {"rows": 1290, "out": 1256, "failed": 34, "calls": 1300, "retries": 12, "timeouts": 1,
                             "hits": 0},
                   "tidy": {"rows": 1300, "out": 1290, "calls": 1300}},
        "latency": {"score": {"p50": 0.047, "p95": 1.2, "p99": 2.0}, "tidy": {"p50": 1.3e-6, "p95": None}},
        "oldest_row": {"topic": "reviews", "partition": 0, "offset": 1001200, "seconds": 12.34},
        "problem": None,
    }  # fmt: skip
    assert partition == {
        "topic": "reviews", "partition": 0, "committed": 1001200, "end": 1013540, "lag": 12340, "waiting": 12340,
        "until": None, "worker": "a1b2c3d4", "state": "running", "in_flight": 64, "oldest_offset": 1001200,
        "oldest_seconds": 12.34, "full": None, "rows": RowCounts().to_dict(), "committed_at": None,
    }  # fmt: skip
    assert worker == {
        "worker": "a1b2c3d4", "member": "aiokafka-1", "host": "box", "pid": 4711, "state": "running", "silent": False,
        "seen_seconds": 0.4, "partitions": ["reviews/0", "reviews/1"], "rows_per_second": 1203.4, "started_at": None,
        "in_flight": 64, "rows": 0, "commit_seconds": None,
    }  # fmt: skip


def test_full_bounds_are_told() -> None:
    """Partitions whose rows cannot begin say which bound is reached, in their line and among the facts."""
    full = [replace(each, worker="a1b2c3d4", state="running", full=bound)
            for each, bound in zip(BUSY.partitions, ("map", "rows"), strict=True)]  # fmt: skip
    text = detail(replace(BUSY, partitions=tuple(full)), PLACE)
    assert "full (map)" in text
    assert "full (rows)" in text
    assert "1 partition begins no rows: the oldest row in work must end first (its offset map is full)" in text
    assert "1 partition begins no rows: the worker has as many in work as it may (--max-in-flight)" in text


# --- again and again -------------------------------------------------------------------------------------------


def test_a_pipe_gets_block_after_block(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks are kept apart by an empty line; lines of JSON are not. No control sequence is written."""
    with Pipe() as out:
        out.show("a\nb")
        out.show('{"x": 1}')
    assert capsys.readouterr().out == 'a\nb\n\n{"x": 1}\n'


def test_a_screen_is_drawn_over(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame wipes the screen first; what does not fit is cut and counted; the last view stays behind in full."""
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "3")
    with Screen() as out:
        entered = capsys.readouterr().out
        out.show("one")
        out.show("a line that is long\n2\n3\n4")
        frames = capsys.readouterr().out
    left = capsys.readouterr().out
    assert entered == "\x1b[?1049h\x1b[?25l"
    assert "\x1b[2J" not in frames
    assert frames.endswith(
        "\x1b[Ha line tha…\x1b[K\r\n2\x1b[K\r\n… 2 more …\x1b[K\x1b[J\x1b[?2026l".replace("tha…", "th…")
    )
    assert left == "\x1b[?25h\x1b[?1049la line that is long\n2\n3\n4\n"


async def test_a_watch_goes_on_when_the_broker_is_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has shown something, a look that fails leaves that, says so with its age, and is tried again."""
    looks: Iterator[Any] = iter([[BUSY], BrokerError("no answer"), [replace(BUSY, rate=5.0)], asyncio.CancelledError()])

    async def look(*_: Any) -> list[SessionStatus]:
        found = next(looks)
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, list)
        return found

    monkeypatch.setattr(cmd_status, "_look", look)
    args = parsed("--watch", "3", "--broker", "local://x")
    with pytest.raises(asyncio.CancelledError):
        await cmd_status._show_for_ever(args, FakeBroker(), FakeClock(NOW), None, 3.0)
    told = capsys.readouterr()
    first, second, third = told.out.removesuffix("\n\n").split("\n\nlocal://x, ")
    assert first.startswith("local://x, 2025-06-15 15:06:40, every 3 s")
    assert "1,203" in second
    assert second.endswith("this is 3.0 s old, the broker is asked again and again: no answer")
    assert "5.0" in third
    assert "asked again" not in third
    assert "no answer" in told.err


def parsed(*words: str) -> argparse.Namespace:
    """The command's arguments."""
    parser = Parser(prog="rowmill")
    cmd_status.add_parser(parser.add_subparsers())
    return parser.parse(["status", *words])


@pytest.mark.parametrize(
    ("words", "session", "interval"),
    [
        ([], None, None),
        (["--watch"], None, 2.0),
        (["--watch", "0.5"], None, 0.5),
        (["reviews", "--watch"], "reviews", 2.0),
        (["--watch", "5", "reviews"], "reviews", 5.0),
        (["--watch", "reviews"], "reviews", 2.0),
    ],
)
def test_what_follows_watch(words: list[str], session: str | None, interval: float | None) -> None:
    """A number is the interval; a name behind a bare --watch is the session that was meant."""
    args = parsed(*words)
    assert cmd_status._interval(args) == interval
    assert args.session == session


@pytest.mark.parametrize("words", [["--watch", "0"], ["--watch", "-1"], ["reviews", "--watch", "often"]])
def test_wrong_intervals(words: list[str]) -> None:
    """No time, and no number where the session is named already, are refused with the remedy."""
    with pytest.raises(ConfigError, match="give seconds above 0"):
        cmd_status._interval(parsed(*words))
