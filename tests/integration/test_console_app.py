"""The console's Faust app on both brokers: what it counts, what a restart or a kill leaves, and how it stops."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rowmill.state.clock import SystemClock
from rowmill.state.errors import ConfigError
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker, TopicSpec
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.console import faust_app
from rowmill.streams.console.board import Board
from rowmill.streams.console.faust_app import CONSOLE_TOPICS, ConsoleApp
from rowmill.streams.console.series import Window
from rowmill.streams.console.turn import GROUP
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.events import events_topic
from rowmill.streams.partitioning import partition_for

sys.path.append(str(Path(__file__).resolve().parents[2]))  # benchmarks are no part of the package
from benchmarks.console import soak

pytestmark = pytest.mark.timeout(240)


class Teller:
    """Tells what workers of one session would."""

    def __init__(self, broker: Broker, group: str) -> None:
        self.broker = broker
        self.group = group
        self.clock = SystemClock()
        self.rows = 0
        self._producer = broker.producer()
        self._started_ms = self.clock.now_ms()

    async def write(self, topic: str, partition: int, record: Outgoing) -> None:
        """One record."""
        await (await self._producer.send(TopicPartition(topic, partition), [record]))

    async def tell(self, kind: str, at_ms: int | None = None, **data: Any) -> None:
        """One event."""
        at_ms = at_ms or self.clock.now_ms()
        event = EventRecord(
            kind=kind,
            at_ms=at_ms,
            pipeline=self.group.removeprefix("rowmill."),
            session="live",
            group=self.group,
            worker=f"w{self._started_ms}",
            data=data,
        )
        partitions = (await self.broker.topics())[EVENTS_TOPIC].partitions
        partition = partition_for(self.group.encode(), partitions)
        await self.write(EVENTS_TOPIC, partition, Outgoing(self.group.encode(), event.encode(), at_ms))

    async def progress(self, rows: int, at_ms: int | None = None) -> None:
        """So many more rows."""
        self.rows += rows
        totals = {"rows": self.rows, "results": self.rows, "cost": f"{self.rows}.5", "tokens": 3, "dead_letters": 1}
        started_ms = max(self._started_ms, self.clock.now_ms() - 10_000) if at_ms is None else at_ms
        await self.tell("progress", at_ms, started_ms=started_ms, totals=totals, state="running")


@asynccontextmanager
async def telling(url: str, name: str) -> AsyncIterator[Teller]:
    """A session that tells of itself."""
    broker = open_broker(url)
    await broker.start()
    teller = Teller(broker, f"rowmill.{name}")
    try:
        await broker.create_topics([events_topic(broker)])
        await teller._producer.start()
        yield teller
    finally:
        await teller._producer.close()
        await broker.close()


async def until(is_so: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for something."""
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running(url: str, folder: Path, **options: Any) -> AsyncIterator[Board]:
    """The app at work, live; it must stop within five seconds."""
    board, stop = Board(SystemClock()), asyncio.Event()
    task = asyncio.create_task(ConsoleApp(url, board, SystemClock(), state_dir=folder, **options).run(stop))
    try:
        await until(lambda: task.done() or board.standing.state == "live")
        if task.done():
            await task
        yield board
    finally:
        stop.set()
        async with asyncio.timeout(5):
            await task
    assert board.standing.state == "stopped"


def rows(board: Board, teller: Teller, window: Window = "1h") -> int:
    """All that is counted."""
    return sum(point.rows for point in board.points(teller.group, window, 0, 2**53))


async def test_what_workers_tell_is_on_the_board(broker_url: str, name: str, tmp_path: Path) -> None:
    """Within a second or two, with every change told to listeners; events are heard of by those who asked."""
    heard: list[str] = []
    news: list[EventRecord] = []
    async with telling(broker_url, name) as teller, running(broker_url, tmp_path, on_events=news.extend) as board:
        remove = board.add_listener(heard.append)
        await teller.tell("worker_started", stages=["s"], dead_letters="none")
        await teller.progress(10)
        await teller.progress(32)
        await until(lambda: rows(board, teller) == 42, 10)
        (point,) = board.points(teller.group, "1h", 0, 2**53)
        assert (point.results, point.cost, point.tokens, point.failures) == (42, "42.5", 3, 1)
        assert [event.kind for event in board.events(teller.group, None, 5)] == ["worker_started"]
        await until(lambda: teller.group in heard, 5)
        assert "worker_started" in {event.kind for event in news if event.group == teller.group}
        remove()


async def test_a_restart_shows_the_past_and_counts_on(broker_url: str, name: str, tmp_path: Path) -> None:
    """What was told while the console was down is counted as well, and nothing twice."""
    async with telling(broker_url, name) as teller:
        async with running(broker_url, tmp_path) as board:
            await teller.tell("worker_started", stages=["s"])
            await teller.progress(10)
            await until(lambda: rows(board, teller) == 10, 10)
        await teller.progress(5)
        board, stop = Board(SystemClock()), asyncio.Event()
        task = asyncio.create_task(ConsoleApp(broker_url, board, SystemClock(), state_dir=tmp_path).run(stop))
        await until(lambda: rows(board, teller) == 10, 20)
        assert board.standing.state == "starting"  # the past is there before Faust is
        assert len(board.events(teller.group, None, 5)) == 1
        await until(lambda: board.standing.state == "live")
        await until(lambda: rows(board, teller) == 15, 10)
        await teller.progress(7)
        await until(lambda: rows(board, teller) == 22, 10)
        assert rows(board, teller, "10s") == 22
        stop.set()
        async with asyncio.timeout(5):
            await task


@pytest.mark.slow
async def test_a_kill_loses_and_repeats_nothing(broker_url: str, tmp_path: Path) -> None:
    """SIGKILL while a hundred events come per second: every row is counted once, and soon."""
    found = await soak(broker_url, tmp_path, 8.0, core=None, workers=2)
    assert found["rows_after_kill"] == found["rows"] > 0
    assert found["past_shown_after_seconds"] < 15


async def test_a_second_console_is_refused(broker_url: str, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """One per broker: it says where the other one is, and disturbs it in nothing."""
    monkeypatch.setattr(faust_app, "SESSION_SECONDS", 6.0)  # how long it waits for one that was killed
    async with telling(broker_url, name) as teller, running(broker_url, tmp_path / "a") as board:
        second = ConsoleApp(broker_url, Board(SystemClock()), SystemClock(), state_dir=tmp_path / "b")
        with pytest.raises(ConfigError, match=r"--broker.*another console runs on it \(process \d+ on .*stop it first"):
            await second.run(asyncio.Event())
        await teller.progress(3)
        await until(lambda: rows(board, teller) == 3, 15)
        assert board.standing.state == "live"


async def test_topics_that_may_not_be_made_are_named(name: str, tmp_path: Path) -> None:
    """With the remedy; nothing is made."""
    url = f"local://{tmp_path / 'broker'}"
    async with telling(url, name) as teller:
        app = ConsoleApp(url, Board(SystemClock()), SystemClock(), state_dir=tmp_path, create_topics=False)
        with pytest.raises(ConfigError, match=r"rowmill\.console\.10s.*may not be made"):
            await app.run(asyncio.Event())
        assert set(await teller.broker.topics()) == {EVENTS_TOPIC}


async def test_the_consoles_topics_are_small_and_compacted(broker_url: str, tmp_path: Path) -> None:
    """One partition each; the newest entry of each key is what is kept."""
    async with running(broker_url, tmp_path):
        broker = open_broker(broker_url)
        await broker.start()
        try:
            topics = await broker.topics()
            assert {topics[topic].partitions for topic in CONSOLE_TOPICS} == {1}
            if broker.folder is not None:
                assert {topics[topic].config["cleanup.policy"] for topic in CONSOLE_TOPICS} == {"compact"}
        finally:
            await broker.close()
    assert (tmp_path / "console").stat().st_mode & 0o777 == 0o700


async def test_dead_letters_of_new_topics_are_counted(
    broker_url: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic that comes later is read as well, from its beginning."""
    monkeypatch.setattr(faust_app, "_LETTER_TOPICS_SECONDS", 1.0)
    topic = f"{name}.dlq"
    headers = (("rowmill.error.stage", b"s"), ("rowmill.error.type", b"ValueError"), ("rowmill.session", b"live"))
    async with telling(broker_url, name) as teller, running(broker_url, tmp_path) as board:
        await teller.tell("worker_started", stages=["s"], dead_letters=topic)
        await teller.broker.create_topics([TopicSpec(topic, 2)])
        for n in range(6):
            await teller.write(topic, n % 2, Outgoing(b"k", b"{}", teller.clock.now_ms(), headers))
        await until(
            lambda: [(f.stage, f.type, f.count) for f in board.failures(teller.group, 0)] == [("s", "ValueError", 6)]
        )
        await teller.broker.delete_topics([topic])


async def test_only_the_last_day_is_read_at_first(name: str, tmp_path: Path) -> None:
    """However long the topic is; on the embedded broker a writer dates its records."""
    url = f"local://{tmp_path / 'broker'}"
    async with telling(url, name) as teller:
        now_ms = teller.clock.now_ms()
        await teller.progress(1_000, now_ms - 2 * 86_400_000)
        await teller.progress(10, now_ms - 3_600_000)
        await teller.progress(1, now_ms)
        async with running(url, tmp_path) as board:
            await until(lambda: rows(board, teller) == 1_011, 10)  # a worker that started then, counted in its hour
            starts = [point.at_ms for point in board.points(teller.group, "1h", 0, 2**53)]
    assert min(starts) > now_ms - 86_400_000


async def test_garbage_on_the_topics_is_passed_over(broker_url: str, name: str, tmp_path: Path) -> None:
    """Anybody may write to them."""
    async with telling(broker_url, name) as teller, running(broker_url, tmp_path) as board:
        for value in (None, b"", b"\xff\xfe", b"[]", b'{"v": 1}', b"x" * 100_000):
            await teller.write(EVENTS_TOPIC, 0, Outgoing(b"\xff", value, teller.clock.now_ms()))
        await teller.progress(4)
        await until(lambda: rows(board, teller) == 4, 10)
        assert board.standing.state == "live"


async def test_an_app_that_fails_is_started_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The board says that it stands still, and why; afterwards nothing is missing and nothing is twice."""
    url = f"local://{tmp_path / 'broker'}"
    feed = faust_app._Life._feed
    broken = threading.Event()

    def fail(*args: Any) -> None:
        if broken.is_set():
            raise ZeroDivisionError("by a test")
        feed(*args)

    monkeypatch.setattr(faust_app._Life, "_feed", fail)
    async with telling(url, name) as teller, running(url, tmp_path) as board:
        await teller.progress(10)
        await until(lambda: rows(board, teller) == 10, 10)
        broken.set()
        await teller.progress(10)
        await until(lambda: board.standing.state == "stopped", 20)
        assert "by a test" in board.standing.message
        assert rows(board, teller) == 10
        broken.clear()
        await until(lambda: board.standing.state == "live", 30)
        await until(lambda: rows(board, teller) == 20, 10)
    assert "stands still" in caplog.text


async def test_nothing_is_left_behind(name: str, tmp_path: Path) -> None:
    """No task, no thread, no level of a logger, no handler."""
    url = f"local://{tmp_path / 'broker'}"
    loggers = [logging.getLogger(each) for each in ("", "faust", "mode")]
    levels, handlers = [logger.level for logger in loggers], list(logging.getLogger().handlers)
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    async with running(url, tmp_path):
        pass
    await until(lambda: set(threading.enumerate()) <= threads, 5)
    assert {task for task in asyncio.all_tasks() if not task.done()} == tasks
    assert [logger.level for logger in loggers] == levels
    assert logging.getLogger().handlers == handlers


async def test_a_life_that_hangs_is_left(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console stops all the same, in time."""
    url = f"local://{tmp_path / 'broker'}"
    leave = threading.Event()

    async def hang(self: Any, app: Any) -> None:
        await asyncio.to_thread(leave.wait, 30)

    ended = faust_app._Life._end
    monkeypatch.setattr(faust_app._Life, "_end", hang)
    async with running(url, tmp_path):
        pass
    leave.set()
    monkeypatch.setattr(faust_app._Life, "_end", ended)
    await until(lambda: not any(t.name == "rowmill-console-faust" for t in threading.enumerate()), 15)


async def test_a_broker_that_goes_away_and_comes_back(name: str, tmp_path: Path, kafka_server: Any) -> None:
    """The board says so; it goes on when the broker does; and it stops in time while there is none."""
    server = kafka_server()
    url = f"kafka://{server.bootstrap}"
    async with running(url, tmp_path) as board:
        async with telling(url, name) as teller:
            await teller.progress(10)
            await until(lambda: rows(board, teller) == 10, 15)
        await asyncio.to_thread(server.restart, crash=True)
        async with telling(url, name) as teller:
            await teller.progress(7)
            await until(lambda: rows(board, teller) == 17, 90)
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(1)


async def test_an_embedded_broker_that_hangs_and_comes_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody stopped in the midst of a write: Faust is cut off, and its group is left, so that the next life is not
    told that another console runs.
    """
    url = f"local://{tmp_path}/broker"
    monkeypatch.setattr(faust_app, "_CALL_SECONDS", 1.0)
    async with telling(url, name) as teller, running(url, tmp_path, checkpoint_seconds=0.2) as board:
        await teller.progress(5)
        await until(lambda: any(point.rows for point in board.points(teller.group, "1h", 0, 2**53)))
        writer = sqlite3.connect(tmp_path / "broker" / "rowmill.db", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        board.tell(teller.group, lag=7, state="executing")
        await until(lambda: board.standing.state == "stopped")
        writer.execute("ROLLBACK")
        writer.close()
        await until(lambda: board.standing.state == "live")


def test_the_consoles_names_are_its_own() -> None:
    """So that clean-up and ``rowmill topics`` know them by their beginning."""
    assert all(topic.startswith(f"{GROUP}.") for topic in CONSOLE_TOPICS)
