"""What the console knows of sessions, from events alone."""

from __future__ import annotations

from typing import Any

import pytest
from rowmill.state.model import TopicPartition
from rowmill.streams.console import board as board_module
from rowmill.streams.console.board import TABLES, Alert, Board
from rowmill.streams.console.series import WINDOWS, Window
from rowmill.streams.console.session_board import RING_SIZE
from rowmill.streams.event_records import EventRecord
from rowmill.streams.session_records import SessionRecord
from support.fake_clock import FakeClock

EVENTS, CONTROL, LETTERS = TopicPartition("rowmill.events", 0), TopicPartition("rowmill.control", 0), "a.dlq"
GROUP = "rowmill.a"


class Feed:
    """A board, and the topics that it reads."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.board = Board(self.clock)
        self.board.stand("live")
        self.offset = 0
        self.started_ms = self.clock.now_ms()

    def tell(
        self, kind: str, data: dict[str, Any], *, group: str = GROUP, worker: str = "w", subject: str = ""
    ) -> None:
        """A worker tells something now."""
        now_ms = self.clock.now_ms()
        event = EventRecord(
            kind=kind,
            at_ms=now_ms,
            pipeline="a",
            session="live",
            group=group,
            worker=worker,
            subject=subject,
            data=data,
        )
        self.board.take(EVENTS, self.offset, now_ms, event.encode())
        self.offset += 1

    def progress(self, rows: int, *, worker: str = "w", started_ms: int | None = None, **more: Any) -> None:
        """A worker's progress."""
        data = {"started_ms": started_ms or self.started_ms, "state": "running", "totals": {"rows": rows}, **more}
        self.tell("progress", data, worker=worker)

    def rows(self, window: Window = "1h") -> int:
        """All rows that are counted."""
        return sum(point.rows for point in self.board.points(GROUP, window, 0, 2**53))

    def restarted(self) -> Board:
        """Another board with what this one has written down."""
        tables: dict[str, dict[str, bytes]] = {table: {} for table in TABLES}
        for change in self.board.changes():
            if change.value is not None:
                tables[change.table][change.key] = change.value
        board = Board(self.clock)
        board.load(lambda table: list(tables[table].items()))
        return board


@pytest.fixture
def feed() -> Feed:
    """A board to be fed."""
    return Feed()


def test_rows_of_all_workers_are_counted(feed: Feed) -> None:
    """Each worker's totals are differences since it told last."""
    for rows in (10, 30, 60):
        feed.progress(rows)
        feed.progress(rows * 2, worker="v")
    assert feed.rows() == 180


def test_a_worker_that_is_older_than_what_is_known_begins_now(feed: Feed) -> None:
    """Its rows of yesterday are no rows of this minute."""
    feed.progress(1_000_000, started_ms=feed.started_ms - 60_000)
    feed.progress(1_000_010, started_ms=feed.started_ms - 60_000)
    assert feed.rows() == 10


def test_a_worker_whose_start_was_heard_counts_from_nothing(feed: Feed) -> None:
    """However long it was silent after it."""
    feed.tell("worker_started", {"stages": ["s"], "dead_letters": LETTERS})
    feed.clock.advance(120)
    feed.progress(50)
    assert feed.rows() == 50


def test_the_last_totals_count_and_end_the_worker(feed: Feed) -> None:
    """``worker_stopped`` has what came after the last progress."""
    feed.progress(50)
    feed.tell("worker_stopped", {"reason": "finished", "totals": {"rows": 70}})
    assert feed.rows() == 70


def test_an_event_counts_once(feed: Feed) -> None:
    """A record that is read again is passed over."""
    feed.progress(10)
    feed.offset -= 1
    feed.progress(1_000)
    assert feed.rows() == 10


def test_rows_fall_into_the_window_of_their_time(feed: Feed) -> None:
    """By the date that the broker put on the record."""
    feed.progress(10)
    feed.clock.advance(10)
    feed.progress(25)
    feed.clock.advance(60)
    feed.progress(100)
    assert [point.rows for point in feed.board.points(GROUP, "10s", 0, 2**53)] == [10, 15, 75]
    assert [point.rows for point in feed.board.points(GROUP, "1m", 0, 2**53)] == [25, 75]


def test_points_are_those_asked_for(feed: Feed) -> None:
    """Windows that overlap the time, the oldest first."""
    begin = feed.clock.now_ms()
    for n in range(6):
        feed.progress(10 * (n + 1))
        feed.clock.advance(10)
    found = feed.board.points(GROUP, "10s", begin + 15_000, begin + 30_001)
    assert [point.at_ms - begin for point in found] == [10_000, 20_000, 30_000]
    assert feed.board.points("rowmill.unknown", "10s", 0, 2**53) == []


def test_windows_expire(feed: Feed) -> None:
    """Ten-second ones after a quarter of an hour, and their entries are removed from the table."""
    feed.progress(10)
    feed.board.changes()
    feed.clock.advance(30)
    feed.board.changes()
    feed.clock.advance(900)
    removed = [change for change in feed.board.changes() if change.value is None]
    assert [change.table for change in removed] == ["10s"]
    assert feed.board.points(GROUP, "10s", 0, 2**53) == []
    assert feed.rows("1m") == 10


def test_a_restart_shows_the_past(feed: Feed) -> None:
    """Windows, events, stages, alerts: all that was written down."""
    feed.tell("worker_started", {"stages": ["s", "t"], "dead_letters": LETTERS})
    feed.progress(10, latency={"t": {"bins": {"-17": 3}, "zero": 0}}, stages={"t": {"rows": 10, "out": 9, "failed": 1}})
    feed.tell("row_failed", {"type": "ValueError", "message": "no"}, subject="t")
    feed.board.take_letter(
        TopicPartition(LETTERS, 1), 5, feed.clock.now_ms(), {"session": "live", "stage": "t", "type": "E"}
    )
    feed.board.put_alert(Alert("lag", GROUP, "5", 1, None, "text"))
    feed.board.tell(GROUP, lag=77, state="executing")
    before = feed.board
    after = feed.restarted()
    for window in WINDOWS:
        assert after.points(GROUP, window, 0, 2**53) == before.points(GROUP, window, 0, 2**53)
    assert after.points(GROUP, "10s", 0, 2**53)[0].lag == 77
    assert after.stages(GROUP) == before.stages(GROUP)
    assert [stage.name for stage in after.stages(GROUP)] == ["s", "t"]
    assert [(stage.rows, stage.out, stage.failed) for stage in after.stages_so_far(GROUP)] == [(0, 0, 0), (10, 9, 1)]
    assert after.events(GROUP, None, 10) == before.events(GROUP, None, 10)
    assert after.alerts(None) == before.alerts(None)
    assert after.failures(GROUP, 0) == before.failures(GROUP, 0)
    assert after.letter_topics().keys() == {LETTERS}


def test_what_is_told_after_a_restart_is_the_difference(feed: Feed) -> None:
    """The last totals are in the tables."""
    feed.progress(10)
    board = feed.board = feed.restarted()
    feed.progress(15)
    assert feed.rows() == 15
    assert board.groups() == [GROUP]


def test_events_are_the_newest_first_and_bounded(feed: Feed) -> None:
    """A flood of failures does not push out what else happened."""
    feed.tell("breaker_open", {"failures": 3}, subject="scorer")
    for n in range(2 * RING_SIZE):
        feed.clock.advance(0.001)
        feed.tell("row_failed", {"type": "E", "message": str(n)}, subject="s")
    everything = feed.board.events(GROUP, None, 10_000)
    assert len(everything) == RING_SIZE + 1
    assert everything[0].data["message"] == str(2 * RING_SIZE - 1)
    assert [event.subject for event in feed.board.events(GROUP, frozenset({"breaker_open"}), 5)] == ["scorer"]
    assert len(feed.board.events(GROUP, None, 3)) == 3


def test_large_events_are_cut(feed: Feed) -> None:
    """Four kilobytes are kept; the message says as much as fits."""
    feed.tell("session_failed", {"message": "x" * 3_000, "more": ["y" * 1_000] * 50})
    (event,) = feed.board.events(GROUP, None, 5)
    assert event.size < 4_200
    assert event.data["message"].startswith("xxx")


def test_failures_by_stage_and_type(feed: Feed) -> None:
    """Of what workers told and what the dead letters say the larger count is shown."""
    feed.tell("worker_started", {"stages": ["s"], "dead_letters": LETTERS})
    for _ in range(3):
        feed.tell("row_failed", {"type": "ValueError", "then": "dead_letter"}, subject="s")
    feed.tell("row_failed", {"type": "KeyError", "then": "skip"}, subject="s")
    for offset in range(40):
        why = {"session": "live", "stage": "s", "type": "ValueError"}
        feed.board.take_letter(TopicPartition(LETTERS, 0), offset, feed.clock.now_ms(), why)
        feed.board.take_letter(TopicPartition(LETTERS, 0), offset, feed.clock.now_ms(), why)
    found = [(each.stage, each.type, each.count) for each in feed.board.failures(GROUP, 0)]
    assert found == [("s", "ValueError", 40), ("s", "KeyError", 1)]
    feed.clock.advance(7_200)
    assert feed.board.failures(GROUP, feed.clock.now_ms() - 60_000) == []


def test_wishes_of_the_control_topic_are_events_once(feed: Feed) -> None:
    """A record is written again by every worker that starts: only another wish is news."""
    record = SessionRecord(
        group=GROUP, pipeline="a", session="live", changed_ms=5, changed_by="me", reason="why", dead_letters=LETTERS
    )
    assert feed.board.take_control(CONTROL, 0, feed.clock.now_ms(), record.encode()) is not None
    assert feed.board.take_control(CONTROL, 0, feed.clock.now_ms(), record.encode()) is None
    assert feed.board.take_control(CONTROL, 1, feed.clock.now_ms(), record.encode()) is None
    assert feed.board.take_control(CONTROL, 2, feed.clock.now_ms(), None) is None
    assert feed.board.take_control(CONTROL, 3, feed.clock.now_ms(), b"nonsense") is None
    (event,) = feed.board.events(GROUP, frozenset({"control"}), 5)
    assert event.data == {"wanted": "run", "by": "me", "reason": "why"}
    assert feed.board.letter_topics().keys() == {LETTERS}


@pytest.mark.parametrize(
    "group", ["", "other", "rowmill.", "rowmill.a/b", "rowmill.a.b.c", "rowmill.<b>", "x" * 10_000]
)
def test_events_of_no_session_are_passed_over(feed: Feed, group: str) -> None:
    """Groups are keys of tables and parts of addresses: anything else than a session's is refused."""
    feed.tell("progress", {"totals": {"rows": 5}}, group=group)
    assert feed.board.groups() == []


def test_too_many_sessions_push_out_the_silent_ones(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, and so are the tables."""
    monkeypatch.setattr(board_module, "MOST_SESSIONS", 3)
    for n in range(5):
        feed.clock.advance(1)
        feed.tell("progress", {"started_ms": 1, "totals": {"rows": 5}}, group=f"rowmill.s{n}")
        feed.board.changes() if n == 0 else None
    assert feed.board.groups() == ["rowmill.s2", "rowmill.s3", "rowmill.s4"]
    removed = {change.key for change in feed.board.changes() if change.value is None}
    assert "rowmill.s0" in removed


def test_a_silent_session_is_forgotten_after_a_week(feed: Feed) -> None:
    """With all that the tables have of it."""
    feed.progress(10)
    feed.board.changes()
    changes = []
    for _ in range(3):
        feed.clock.advance(4 * 86_400)
        changes += feed.board.changes()
    assert feed.board.groups() == []
    assert ("sessions", GROUP, None) in {(change.table, change.key, change.value) for change in changes}


def test_a_clock_that_runs_ahead_opens_no_window_in_the_future(feed: Feed) -> None:
    """Records of the embedded broker are dated by their writers."""
    event = EventRecord(kind="progress", at_ms=1, pipeline="a", session="live", group=GROUP, worker="w")
    feed.board.take(EVENTS, 0, feed.clock.now_ms() + 86_400_000, event.encode())
    assert feed.board.points(GROUP, "10s", feed.clock.now_ms() + 60_000, 2**53) == []


def test_lag_is_told_by_others(feed: Feed) -> None:
    """The newest of a window stays; an idle session without rows left makes no windows."""
    feed.board.tell(GROUP, lag=0, state="completed")
    assert feed.board.points(GROUP, "10s", 0, 2**53) == []
    feed.board.tell(GROUP, lag=50, state="executing")
    feed.board.tell(GROUP, lag=40, state="executing")
    feed.clock.advance(10)
    feed.board.tell(GROUP, lag=30, state="executing")
    assert [point.lag for point in feed.board.points(GROUP, "10s", 0, 2**53)] == [40, 30]


def test_windows_end_by_the_clock_while_live(feed: Feed) -> None:
    """A session that fell silent leaves nothing open, and nothing is written twice."""
    feed.progress(10)
    feed.board.changes()
    feed.clock.advance(45)
    assert {change.table for change in feed.board.changes()} >= {"10s", "sessions"}
    feed.clock.advance(5)
    assert feed.board.changes() == []


def test_tables_that_cannot_be_read_are_left_out(feed: Feed, caplog: pytest.LogCaptureFixture) -> None:
    """One damaged entry costs itself only, and a warning."""
    feed.progress(10)
    tables: dict[str, list[tuple[str, bytes]]] = {table: [] for table in TABLES}
    for change in feed.board.changes():
        tables[change.table].append((change.key, change.value or b""))
    tables["sessions"].append(("rowmill.b", b'{"v": 99}'))
    tables["10s"] += [("rowmill.a/x", b""), ("nonsense", b"")]
    tables["letters"].append(("t", b"[9]"))
    tables["alerts"].append(("t", b"5"))
    tables["events"].append(("rowmill.a/z1", b"x"))
    board = Board(feed.clock)
    board.load(lambda table: tables[table])
    assert board.groups() == [GROUP]
    assert sum(point.rows for point in board.points(GROUP, "1h", 0, 2**53)) == 10
    assert "cannot be read" in caplog.text


def test_listeners_hear_of_groups_until_removed(feed: Feed, caplog: pytest.LogCaptureFixture) -> None:
    """One that fails disturbs nobody."""
    heard: list[str] = []

    def fail(group: str) -> None:
        raise ValueError(group)

    feed.board.add_listener(fail)
    remove = feed.board.add_listener(heard.append)
    feed.board.notify(["rowmill.a"])
    remove()
    remove()
    feed.board.notify(["rowmill.b"])
    assert heard == ["rowmill.a"]
    assert "listener" in caplog.text


def test_breakers_and_budget_are_facts(feed: Feed) -> None:
    """What rules look at."""
    feed.progress(10, breakers={"scorer": "open"}, budget={"limit": "2.00", "spent": "1.50"})
    facts = feed.board.facts(GROUP)
    assert facts is not None
    assert dict(facts.breakers) == {"scorer": "w"}
    assert facts.budget == pytest.approx(0.75)
    feed.tell("breaker_closed", {}, subject="scorer")
    assert not feed.board.facts(GROUP).breakers  # type: ignore[union-attr]
    assert feed.board.facts("rowmill.unknown") is None


def test_dead_letters_of_the_last_minute_are_facts(feed: Feed) -> None:
    """Older ones are not counted."""
    feed.progress(10, totals={"rows": 10, "dead_letters": 4})
    assert feed.board.facts(GROUP).dead_letters == 4  # type: ignore[union-attr]
    feed.clock.advance(61)
    assert feed.board.facts(GROUP).dead_letters == 0  # type: ignore[union-attr]


def test_a_session_with_very_many_workers_fits_into_a_record(feed: Feed) -> None:
    """The session's own record stays below the largest message of a topic."""
    stages = {f"stage-{n}": {"rows": 5, "out": 5, "calls": 5, "seconds": 0.123456} for n in range(40)}
    for n in range(700):
        feed.progress(5, worker=f"worker-{n}", stages=stages)
    sizes = [len(change.value or b"") for change in feed.board.changes()]
    assert max(sizes) < 900_000


def test_rows_that_have_just_come_are_not_late(feed: Feed) -> None:
    """A session that had nothing to do for an hour, or was paused, begins to be idle when there is something to do."""

    def idle_seconds() -> float:
        facts = feed.board.facts(GROUP)
        assert facts is not None
        return facts.idle_seconds

    feed.progress(5)
    feed.board.tell(GROUP, lag=0, state="executing")
    feed.clock.advance(3_600)
    feed.board.tell(GROUP, lag=7, state="executing")
    assert idle_seconds() == 0
    feed.clock.advance(40)
    feed.board.tell(GROUP, lag=9, state="executing")
    assert idle_seconds() == 40
    board = feed.restarted()
    facts = board.facts(GROUP)
    assert facts is not None
    assert facts.idle_seconds == 40
    feed.board.tell(GROUP, lag=9, state="paused")
    feed.clock.advance(600)
    feed.board.tell(GROUP, lag=9, state="executing")
    assert idle_seconds() == 0
    feed.clock.advance(90)
    feed.progress(6)
    assert idle_seconds() == 0


def test_tables_that_are_read_again_forget_no_lag(feed: Feed) -> None:
    """No table holds it; without it, alerts that look at it would end and begin again."""
    feed.progress(5)
    feed.board.tell(GROUP, lag=7, state="executing")
    feed.board.tell("rowmill.b", lag=3, state="idle")
    feed.board.load(lambda _: [])
    for group, lag in ((GROUP, 7), ("rowmill.b", 3)):
        facts = feed.board.facts(group)
        assert facts is not None
        assert facts.lag == lag
