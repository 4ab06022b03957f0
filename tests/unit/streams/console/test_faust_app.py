"""What surrounds Faust in the console's app: what it begins with, and records that nobody can count."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.console.board import Board
from rowmill.streams.console.faust_app import ConsoleApp, _Life, _quiet_loggers, _seek_to_committed
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Life:
    """One whose broker is a fake."""
    monkeypatch.setattr("rowmill.streams.console.faust_app.open_broker", lambda *_, **__: FakeBroker())
    clock = FakeClock()
    return _Life(ConsoleApp("local:///nowhere", Board(clock), clock, state_dir=tmp_path))


async def test_the_past_is_looked_at_although_sessions_are_known(life: _Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch may have told of some before; and it is looked at once, as tables are behind what was read since."""
    done: list[str] = []

    async def look_back(_: Any) -> None:
        done.append("look back")

    async def live_in_turn(*_: Any) -> None:
        raise ConnectionError("enough")

    life._board.tell("rowmill.a", lag=1, state="idle")
    monkeypatch.setattr(life, "_look_back", look_back)
    monkeypatch.setattr(life, "_live_in_turn", live_in_turn)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await life.live()
    assert done == ["look back"]


def test_a_record_that_cannot_be_counted_is_passed_over(life: _Life, caplog: pytest.LogCaptureFixture) -> None:
    """It would else be read again for ever, and the history would stand still."""

    def fail(_: Any) -> None:
        raise OverflowError("odd")

    events = [
        SimpleNamespace(message=SimpleNamespace(topic="t", partition=0, offset=n, value=b"x"), value=b"x")
        for n in range(3)
    ]
    life._feed(events, fail)
    assert list(life._read.values()) == [3]
    assert len(life._messages) == 3
    assert caplog.text.count("cannot be counted and is passed over") == 1


async def test_partitions_committed_at_their_beginning_are_sought_as_well() -> None:
    """aiokafka's own method passes over 0: records of a new topic that Faust fetched and dropped would stay unread."""
    sought: dict[str, int] = {}
    committed = {"a": 5, "b": 0, "c": None}

    async def look_up(tp: str) -> int | None:
        return committed[tp]

    async def call_thread(function: Any) -> Any:
        return await function()

    consumer = SimpleNamespace(assignment=lambda: set(committed), committed=look_up, seek=sought.__setitem__)
    client = SimpleNamespace(_ensure_consumer=lambda: consumer, call_thread=call_thread)
    assert await _seek_to_committed(client) == committed
    assert sought == {"a": 5, "b": 0}


async def test_of_too_many_dead_letter_topics_those_of_recent_sessions_are_read(
    life: _Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others are left out, whatever they are called, which is said once."""
    monkeypatch.setattr("rowmill.streams.console.faust_app.MOST_LETTER_TOPICS", 2)
    broker, day = FakeBroker(), 86_400_000
    await broker.create_topics([TopicSpec(name, 1) for name in ("a.dlq", "b.dlq", "y", "z.dlq", "no")])
    heard = {"y": 9 * day, "z.dlq": 9 * day + 5, "b.dlq": 8 * day, "gone.dlq": 9 * day}
    monkeypatch.setattr(life._board, "letter_topics", lambda: heard)
    for _ in range(2):
        assert await life._find_letter_topics(broker) == ("y", "z.dlq")
    assert caplog.text.count("there are 4 dead-letter topics") == 1
    assert "b.dlq and others are not counted" in caplog.text


def test_being_cut_off_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    """A broker that hangs ends with Faust's tasks cancelled: three tracebacks of it told nobody anything."""
    log = logging.getLogger("faust.agents.actor")
    with _quiet_loggers():
        pass
    for error in (asyncio.CancelledError(), ValueError("odd")):
        log.error("crashed with %r", error, exc_info=error)
    assert "ValueError" in caplog.text
    assert "CancelledError" not in caplog.text
