"""Names: what they may be, and what belongs to a session."""

from __future__ import annotations

from typing import Any

import pytest
from rowmill.state.errors import ConfigError
from rowmill.state.model import TopicPartition
from rowmill.streams.session import LIVE, Session, check_name, check_topic


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 80, "-", "0"])
def test_names(name: str) -> None:
    """1 to 80 letters, digits, underscores and hyphens make a name."""
    assert check_name("s", name) == name


@pytest.mark.parametrize("name", ["", "x" * 81, "a.b", "a/b", "a b", "ä", "a\n", "٣", None, 7, b"a"])
def test_no_names(name: Any) -> None:
    """Anything else is refused, dots and line ends included."""
    with pytest.raises(ConfigError, match="1 to 80 letters"):
        check_name("s", name)


@pytest.mark.parametrize("name", ["a", "a.b-c_9", "x" * 249, "...", ".a", "rowmill"])
def test_topics(name: str) -> None:
    """Topics keep Kafka's rule."""
    assert check_topic("t", name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 250, "a/b", "a b", "ä", "a\n", "rowmill.events", None, 7])
def test_no_topics(name: Any) -> None:
    """What Kafka refuses, and names that rowmill keeps for itself, are refused here already."""
    with pytest.raises(ConfigError) as caught:
        check_topic("Pipeline(sink=)", name)
    assert caught.value.setting == "Pipeline(sink=)"


TP = TopicPartition("reviews", 3)


@pytest.mark.parametrize(
    ("session", "group", "source", "output", "dead", "producer", "publisher"),
    [
        (
            Session("p"),
            "rowmill.p",
            "in",
            "out",
            "p.dlq",
            "rowmill.p/reviews/3",
            "rowmill.p.input",
        ),
        (
            Session("p", "try-1"),
            "rowmill.p.try-1",
            "in",
            "out.try-1",
            "p.dlq.try-1",
            "rowmill.p.try-1/reviews/3",
            "rowmill.p.try-1.input",
        ),
        (
            Session("p", "try-1", owns_source=True),
            "rowmill.p.try-1",
            "in.try-1",
            "out.try-1",
            "p.dlq.try-1",
            "rowmill.p.try-1/reviews/3",
            "rowmill.p.try-1.input",
        ),
    ],
)
def test_what_belongs_to_a_session(
    session: Session, group: str, source: str, output: str, dead: str, producer: str, publisher: str
) -> None:
    """The live session uses plain names; any other writes to topics of its own, and owns its source if it said so."""
    assert session.group == group
    assert session.source("in") == source
    assert session.output("out") == output
    assert session.dead_letters == dead
    assert session.transactional_id(TP) == producer
    assert session.publisher_id == publisher
    assert session.is_live is (session.id == LIVE)


def test_sessions_never_share_a_name() -> None:
    """Groups and producer ids differ between pipelines, sessions, topics and partitions."""
    sessions = [Session("p"), Session("q"), Session("p", "q"), Session("p", "q2"), Session("p-q")]
    tps = [TP, TopicPartition("reviews", 30), TopicPartition("reviews.2", 3)]
    names = [session.transactional_id(tp) for session in sessions for tp in tps] + [s.publisher_id for s in sessions]
    names += [session.group for session in sessions]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("options", [{"pipeline": "a.b"}, {"pipeline": "p", "id": "a.b"}, {"pipeline": "p", "id": ""}])
def test_sessions_check_their_names(options: dict[str, Any]) -> None:
    """A session cannot be made with a name that could be taken for another's."""
    with pytest.raises(ConfigError):
        Session(**options)


@pytest.mark.parametrize(
    ("session", "way"),
    [
        (Session("p"), "`rowmill replay p --source in --topic in:3 --to-offset 7 --execute`"),
        (Session("p", "b"), "`rowmill replay p --source in --topic in:3 --to-offset 7 --session b --execute`"),
        (Session("p", "b", owns_source=True), "as another session"),
    ],
)
def test_way_to_move(session: Session, way: str) -> None:
    """Errors name a command that can be copied; a session over rows of its own cannot be moved."""
    assert way in session.way_to_move(TopicPartition("in", 3), "--to-offset 7")
