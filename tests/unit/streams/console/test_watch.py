"""The watch: what is in memory, how often it is looked up, and who hears of it."""

from __future__ import annotations

import asyncio
from collections import deque
from decimal import Decimal

import pytest
from rowmill.state.execution import ExecutionState
from rowmill.state.model import TopicPartition
from rowmill.streams.console.board import Alert, Board
from rowmill.streams.console.watch import MOST_SECONDS, MOST_SESSIONS, Watch, _per_minute, _Sample, _sample
from rowmill.streams.errors import BrokerError
from rowmill.streams.status import BudgetStatus, PartitionStatus, RowCounts, SessionStatus
from rowmill.streams.status_workers import WorkerStatus
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock
from support.statuses import a_status


class Looks:
    """What the next looks find, in place of a broker's."""

    def __init__(self) -> None:
        self.found: list[SessionStatus] | Exception = []
        self.count = 0
        self.takes = 0.0


@pytest.fixture
def clock() -> FakeClock:
    """A fresh one."""
    return FakeClock()


@pytest.fixture
def looks() -> Looks:
    """None yet."""
    return Looks()


@pytest.fixture
def watch(clock: FakeClock, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """One that looks at ``looks``."""
    found = Watch(FakeBroker(), Board(clock), clock=clock)

    async def statuses(_: str | None = None) -> list[SessionStatus]:
        looks.count += 1
        clock.advance(looks.takes)
        if isinstance(looks.found, Exception):
            raise looks.found
        return looks.found

    monkeypatch.setattr(found._reader, "statuses", statuses)
    return found


async def test_before_the_first_look(watch: Watch) -> None:
    """There is nothing, which is said; nothing waits."""
    overview = watch.overview().to_dict()
    assert (overview["refreshed_ms"], overview["sessions"], watch.session("rowmill.p")) == (None, [], None)
    assert watch.health()["status"] == "starting"


async def test_a_look(watch: Watch, looks: Looks) -> None:
    """What it finds is shown from then on: those that go on first, by name."""
    over = a_status("a", state=ExecutionState.COMPLETED, activity="completed")
    budget = BudgetStatus(limit=Decimal(8), spent=Decimal(2), held=Decimal(1))
    looks.found = [over, a_status("c", rows=RowCounts(rows=5, dead_letters=2)), a_status("b", budget=budget)]
    await watch.refresh()
    overview = watch.overview().to_dict()
    assert [session["name"] for session in overview["sessions"]] == ["b", "c", "a"]
    first, second, _ = overview["sessions"]
    assert first["budget"] == {"limit": "8", "spent": "2", "held": "1", "fraction": 0.25}
    assert (second["rows"], second["dead_letters"], second["budget"]) == (5, 2, None)
    assert watch.health()["status"] == "ok"
    session = watch.session("rowmill.c")
    assert session is not None
    assert session.to_dict()["status"] == looks.found[1].to_dict()
    assert [stage.name for stage in session.stages] == ["clean", "score"]


async def test_a_look_that_fails(watch: Watch, looks: Looks) -> None:
    """What was known stays, and why it is not newer is told until it is."""
    looks.found = [a_status("p")]
    await watch.refresh()
    refreshed_ms = watch.overview().refreshed_ms
    for error in (BrokerError("gone"), ValueError("odd")):
        looks.found = error
        await watch.refresh()
        overview = watch.overview()
        assert [session.name for session in overview.sessions] == ["p"]
        assert str(error) in (overview.refresh_error or "")
        assert overview.refreshed_ms == refreshed_ms
        assert watch.health()["status"] == "the broker does not answer"
    looks.found = []
    await watch.refresh()
    assert watch.overview().refresh_error is None


async def test_so_many_sessions_are_shown(watch: Watch, looks: Looks) -> None:
    """And it is said how many more there are."""
    looks.found = [a_status(f"p{n:04d}") for n in range(MOST_SESSIONS + 7)]
    await watch.refresh()
    overview = watch.overview()
    assert (len(overview.sessions), overview.sessions_left_out) == (MOST_SESSIONS, 7)


async def test_who_listens_hears_what_changed(watch: Watch, looks: Looks) -> None:
    """Only that; not that time has passed, nor that a row has been in work for longer."""
    heard: list[frozenset[str]] = []
    remove = watch.add_listener(heard.append)
    worker = WorkerStatus(name="w", seen_seconds=0.1)
    partition = PartitionStatus(tp=TopicPartition("t", 0), oldest_seconds=1.0)
    looks.found = [a_status("p", workers=(worker,), partitions=(partition,)), a_status("q")]
    await watch.refresh()
    older = WorkerStatus(name="w", seen_seconds=0.9)
    longer = PartitionStatus(tp=TopicPartition("t", 0), oldest_seconds=2.0)
    looks.found = [a_status("p", at_ms=2, workers=(older,), partitions=(longer,)), a_status("q", at_ms=2)]
    await watch.refresh()
    looks.found = [a_status("p", at_ms=3, lag=5, workers=(older,), partitions=(longer,))]
    await watch.refresh()
    assert heard == [frozenset({"rowmill.p", "rowmill.q"}), frozenset({"rowmill.p", "rowmill.q"})]
    looks.found = BrokerError("gone")
    await watch.refresh()
    assert heard[-1] == frozenset()
    remove()
    looks.found = []
    await watch.refresh()
    assert len(heard) == 3


async def test_the_board_hears_of_lag(watch: Watch, looks: Looks) -> None:
    """So that it has a history."""
    looks.found = [a_status("p", lag=42)]
    await watch.refresh()
    points = watch.board.points("rowmill.p", "10s", 0, 2**53)
    assert [point.lag for point in points] == [42]


@pytest.mark.parametrize(
    ("takes", "asked", "pause"),
    [(0.01, True, 1.0), (0.2, True, 1.0), (2.0, True, 6.0), (60.0, True, MOST_SECONDS), (0.01, False, 5.0)],
)
async def test_how_often_it_looks(
    watch: Watch, looks: Looks, clock: FakeClock, takes: float, asked: bool, pause: float
) -> None:
    """Every second; less often where a look takes long, or while nobody reads."""
    looks.takes = takes
    if asked:
        watch.touch()
        watch._is_wanted = False
        watch._hurry.clear()
    await watch.refresh()
    if asked:
        watch._asked_at = clock.monotonic()
    await watch._rest()
    assert sum(clock.slept) == pytest.approx(pause)


async def test_a_session_that_was_steered_is_looked_at_soon(
    watch: Watch, looks: Looks, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, several times within the next seconds, however long a look at all sessions takes."""
    looks.found, looks.takes = [a_status("p"), a_status("q")], 10.0
    await watch.refresh()
    seen: list[str] = []

    async def look_at(group: str) -> None:
        seen.append(group)

    monkeypatch.setattr(watch, "_look_at", look_at)
    watch.hurry("rowmill.p")
    await watch._rest()
    assert set(seen) == {"rowmill.p"}
    assert 8 <= len(seen) <= 14
    seen.clear()
    end = watch.follow("rowmill.q")
    await watch._rest()
    assert set(seen) == {"rowmill.q"}
    end()
    seen.clear()
    await watch._rest()
    assert seen == []


async def test_it_runs_until_it_is_cancelled(watch: Watch, looks: Looks) -> None:
    """Looking again and again, also after bugs; and hears of the board."""
    looks.found = ValueError("odd")
    heard: list[frozenset[str]] = []
    watch.add_listener(heard.append)
    running = asyncio.create_task(watch.run())
    async with asyncio.timeout(10):
        while looks.count < 3:
            await asyncio.sleep(0)
        watch.board.notify(["rowmill.p"])
        assert frozenset({"rowmill.p"}) in heard
    running.cancel()
    await asyncio.wait({running})
    watch.board.notify(["rowmill.z"])
    assert frozenset({"rowmill.z"}) not in heard


async def test_what_fails_while_it_tells_does_not_end_it(watch: Watch, looks: Looks) -> None:
    """Neither somebody who listens, nor the board: figures would stand still, and nobody would know why."""
    heard: list[frozenset[str]] = []

    def fail(_: frozenset[str]) -> None:
        raise ValueError("odd")

    watch.add_listener(fail)
    watch.add_listener(heard.append)
    looks.found = [a_status("p")]
    await watch.refresh()
    assert heard == [frozenset({"rowmill.p"})]
    watch.board.tell = fail  # type: ignore[assignment, method-assign]
    await watch.refresh()
    assert "this is a bug" in (watch.overview().refresh_error or "")


async def test_open_alerts_are_counted(watch: Watch, looks: Looks) -> None:
    """Those that were closed are shown, and not counted."""
    looks.found = [a_status("p")]
    await watch.refresh()
    watch.board.put_alert(Alert("lag", "rowmill.p", "", 1, None, "<b>much</b>"))
    watch.board.put_alert(Alert("breaker", "rowmill.p", "api", 1, 2, "open"))
    (session,) = watch.overview().sessions
    assert session.alerts == 1
    assert {alert.text for alert in watch.alerts()} == {"<b>much</b>", "open"}


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        ([], None),
        ([(0, 5)], None),
        ([(0, 5), (4, 9)], None),
        ([(0, 5), (10, 5)], 0),
        ([(0, 5), (10, 15)], 10),
        ([(0, 0), (30, 30), (60, 60), (90, 90), (120, 90)], 30),
        ([(0, 100), (10, 3)], 0),
    ],
)
def test_dead_letters_per_minute(samples: list[tuple[float, int]], rate: float | None) -> None:
    """Of the last minute; unknown before it was watched for some seconds; never below nothing."""
    kept: deque[_Sample] = deque()
    for at, dead_letters in samples:
        _sample(kept, _Sample(at, dead_letters))
    assert _per_minute(kept) == rate
