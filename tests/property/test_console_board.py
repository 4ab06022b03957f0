"""However often the console dies, and wherever in its writing: each row is counted once, in the same windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill.state.model import TopicPartition
from rowmill.streams.console.board import TABLES, Board, Change
from rowmill.streams.console.series import WINDOWS
from rowmill.streams.event_records import EventRecord
from support.fake_clock import FakeClock

EVENTS = TopicPartition("rowmill.events", 0)
START_MS = 1_750_000_000_000
GROUPS = ("rowmill.a", "rowmill.b")


@dataclass
class Log:
    """The events topic, as two sessions of two workers each write it."""

    records: list[tuple[int, bytes]] = field(default_factory=list)
    rows: dict[tuple[str, str], int] = field(default_factory=dict)
    started: dict[tuple[str, str], int] = field(default_factory=dict)

    def tell(self, group: str, worker: str, rows: int, at_ms: int) -> None:
        """A worker's progress after so many more rows."""
        told = self.rows[group, worker] = self.rows.get((group, worker), 0) + rows
        started_ms = self.started.setdefault((group, worker), at_ms)
        event = EventRecord(
            kind="progress",
            at_ms=at_ms,
            pipeline=group.removeprefix("rowmill."),
            session="live",
            group=group,
            worker=worker,
            data={
                "started_ms": started_ms,
                "state": "running",
                "totals": {"rows": told, "results": told, "cost": f"{told}.01"},
                "stages": {"s": {"rows": told, "out": told, "dropped": 0, "failed": 0}},
                "latency": {"s": {"bins": {"-10": rows}, "zero": 0}},
            },
        )
        self.records.append((at_ms, event.encode()))

    def note(self, group: str, at_ms: int) -> None:
        """Something else that a worker tells: its place in the log."""
        event = EventRecord(
            kind="paused",
            at_ms=at_ms,
            pipeline=group.removeprefix("rowmill."),
            session="live",
            group=group,
            worker="v",
            data={"n": len(self.records)},
        )
        self.records.append((at_ms, event.encode()))


class Disk:
    """What reached the tables' changelogs."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, bytes]] = {table: {} for table in TABLES}

    def write(self, changes: Iterable[Change]) -> None:
        """Apply them in order."""
        for change in changes:
            if change.value is None:
                self.tables[change.table].pop(change.key, None)
            else:
                self.tables[change.table][change.key] = change.value

    def board(self, clock: FakeClock) -> Board:
        """A console that starts from this."""
        board = Board(clock)
        board.load(lambda table: list(self.tables[table].items()))
        return board


def figures(board: Board) -> dict[str, list[tuple[int, int, str, dict[str, int]]]]:
    """What all windows show."""
    return {
        f"{group} {window}": [
            (point.at_ms, point.rows, point.cost, {name: stage.rows for name, stage in point.stages.items()})
            for point in board.points(group, window, 0, 2**53)
        ]
        for group in GROUPS
        for window in WINDOWS
    }


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.sampled_from(GROUPS), st.sampled_from("vw"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.integers(1, 4_000_000).map(lambda ms: min(ms, 90_000)), st.just(0), st.just(0)),
        st.tuples(st.just("write"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("die"), st.floats(0, 1), st.floats(0, 1), st.booleans()),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(steps=STEPS)
def test_each_row_is_counted_once(steps: list[tuple[Any, ...]]) -> None:
    """A console that is killed between any two writes, and reads again from any acknowledged place, ends with the
    figures of one that never died."""
    clock = FakeClock(START_MS)
    log, disk = Log(), Disk()
    board, steady = Board(clock), Board(clock)
    acknowledged = read = 0
    for what, first, second, third in steps:
        if what == "event":
            log.tell(first, second, third, clock.now_ms()) if third < 8 else log.note(first, clock.now_ms())
            at_ms, value = log.records[-1]
            steady.take(EVENTS, len(log.records) - 1, at_ms, value)
        elif what == "wait":
            clock.advance(first / 1000)
        while what != "event" and read < len(log.records):
            board.take(EVENTS, read, *log.records[read])
            read += 1
        if what == "write":
            board.stand("live")
            disk.write(board.changes())
            acknowledged = read
        elif what == "die":
            changes = board.changes()
            cut = int(first * (len(changes) + 1))
            disk.write(changes[:cut])
            if cut >= len(changes) and third:
                acknowledged = read
            board = disk.board(clock)
            read = int(second * acknowledged)
    while read < len(log.records):
        board.take(EVENTS, read, *log.records[read])
        read += 1
    assert figures(board) == figures(steady)
    for group in GROUPS:
        assert board.events(group, None, 100) == steady.events(group, None, 100)
    for group in GROUPS:
        told = sum(rows for (name, _), rows in log.rows.items() if name == group)
        assert sum(point.rows for point in board.points(group, "1h", 0, 2**53)) == told
