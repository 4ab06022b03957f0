"""Topics of rowmill's own, the web console's among them: what they hold, and that nobody takes them for a session's."""

from __future__ import annotations

import pytest
from rowmill import Pipeline
from rowmill.state.errors import ConfigError
from rowmill.state.model import Committed
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.cli.cmd_topics import _known_counts
from rowmill.streams.console.faust_app import CONSOLE_TOPICS
from rowmill.streams.console.turn import GROUP
from rowmill.streams.dlq_letters import marks_topic
from rowmill.streams.known_sessions import find_sessions
from rowmill.streams.own_topics import CONSOLE_PREFIX, purpose_of
from rowmill.streams.session import Session
from rowmill.streams.session_refs import session_of
from rowmill.streams.session_traces import list_traces
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock
from support.sessions import MadeSession

LIVE, SIDE = Session("p"), Session("p", "events")


@pytest.mark.parametrize(
    ("topic", "purpose"),
    [
        ("rowmill.control", "sessions' records"),
        ("rowmill.events", "workers' events"),
        (LIVE.changelog("in"), "context and tables"),
        (LIVE.answers("in"), "shared answers"),
        (LIVE.budget, "the budget's ledger"),
        (marks_topic(LIVE.dead_letters), "dead letters' marks"),
        *((topic, "the web console's history") for topic in CONSOLE_TOPICS),
        ("rowmill.something", ""),
        ("reviews", ""),
        ("reviews.changelog", ""),
    ],
)
def test_what_topics_hold(topic: str, purpose: str) -> None:
    """By their names."""
    assert purpose_of(topic) == purpose


def test_the_consoles_names() -> None:
    """Its group is no session's, and no pipeline can have its name."""
    assert all(topic.startswith(CONSOLE_PREFIX) for topic in CONSOLE_TOPICS)
    assert CONSOLE_PREFIX.removesuffix(".") == GROUP
    assert session_of(GROUP) is None
    assert session_of(f"{GROUP}.start") is None
    with pytest.raises(ConfigError, match="web console"):
        Pipeline("console", source="a", sink="b")
    with pytest.raises(ConfigError, match="web console"):
        Session("console", "x")
    assert session_of("rowmill.console2") == Session("console2")


async def test_nobody_takes_the_console_for_a_session() -> None:
    """With its group and topics on the broker, sessions and what they left are what they were."""
    broker, clock = FakeBroker(), FakeClock()
    for session in (LIVE, SIDE):
        await MadeSession(session).make(broker, clock)
    known = await find_sessions(broker, clock=clock)
    before = [await list_traces(broker, session.group, clock=clock) for session in (LIVE, SIDE)]
    await broker.create_topics([TopicSpec(name, 1) for name in (*CONSOLE_TOPICS, "rowmill.console.in.changelog")])
    producer = broker.transactional_producer(f"{GROUP}.start")
    await producer.start()
    await producer.begin()
    await producer.commit_offsets(GROUP, {MadeSession(LIVE).tps[0]: Committed(1)})
    await producer.end()
    await producer.close()
    assert GROUP in await broker.groups()
    assert await find_sessions(broker, clock=clock) == known
    assert [await list_traces(broker, session.group, clock=clock) for session in (LIVE, SIDE)] == before


async def test_they_are_listed_and_counted() -> None:
    """``rowmill topics`` shows them as any other."""
    broker = FakeBroker()
    await broker.create_topics([TopicSpec(name, 1) for name in CONSOLE_TOPICS])
    counts = await _known_counts(broker, dict.fromkeys(CONSOLE_TOPICS, 1))
    assert counts == dict.fromkeys(CONSOLE_TOPICS, 0)
