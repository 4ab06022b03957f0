"""What a word on the command line means: which session, or which mistake."""

from __future__ import annotations

import pytest
from rowmill.state.errors import ConfigError
from rowmill.streams.session import Session
from rowmill.streams.session_refs import record_of, resolve, session_of, short_name

GROUPS = [
    "rowmill.reviews",
    "rowmill.reviews.run-3f2a9c01",
    "rowmill.reviews.s1",
    "rowmill.scores",
    "rowmill.scores.s1",
    "rowmill.bounded.run-1",
    "rowmill.live",
    "rowmill.reviews.s1.input",
    "somebody.elses",
    "rowmill.a b",
]


@pytest.mark.parametrize(
    ("word", "group"),
    [
        ("reviews", "rowmill.reviews"),
        ("reviews.live", "rowmill.reviews"),
        ("rowmill.reviews", "rowmill.reviews"),
        ("rowmill.reviews.live", "rowmill.reviews"),
        ("reviews.s1", "rowmill.reviews.s1"),
        ("rowmill.scores.s1", "rowmill.scores.s1"),
        ("run-3f2a9c01", "rowmill.reviews.run-3f2a9c01"),
        ("bounded.run-1", "rowmill.bounded.run-1"),
        ("live", "rowmill.live"),
    ],
)
def test_words_that_mean_a_session(word: str, group: str) -> None:
    """A pipeline's name, PIPELINE.NAME, the whole group, and a NAME that only one pipeline has."""
    assert resolve(word, GROUPS) == group


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("revews", "there is no such session on kafka://k; did you mean 'reviews'?"),
        ("run-3f2a9c02", "did you mean 'reviews.run-3f2a9c01'?"),
        ("s1", "there are several of that name: reviews.s1, scores.s1; name one of these"),
        ("bounded", "there is no such session on kafka://k, but there is bounded.run-1"),
        ("bounded.py", "there is no such session on kafka://k, but there is bounded.run-1"),
        ("jobs/x.py", "give the session's name, not the pipeline's file; there are bounded.run-1, live, reviews, "),
        ("nothing-like-it", "there is no such session on kafka://k; there are bounded.run-1, live, reviews, "),
        ("reviews.s1.input", "there is no such session"),
        ("somebody.elses", "there is no such session"),
        ("", "there is no such session"),
    ],
)
def test_words_that_mean_none(word: str, says: str) -> None:
    """The message tells what there is, and never guesses among several."""
    with pytest.raises(ConfigError) as caught:
        resolve(word, GROUPS, "kafka://k")
    assert str(caught.value).startswith(f"SESSION: got {word!r}; ")
    assert says in str(caught.value)


def test_a_broker_without_sessions() -> None:
    """There is nothing to name, and the message says from when on there is."""
    with pytest.raises(ConfigError, match="there are no sessions on here; a session is known from the first start"):
        resolve("x", ["somebody.elses"], "here")


def test_many_sessions_are_not_all_listed() -> None:
    """The message stays a line."""
    with pytest.raises(ConfigError, match="and 92 more"):
        resolve("zzz", [f"rowmill.p{n}" for n in range(100)])


@pytest.mark.parametrize(
    ("group", "session"),
    [
        ("rowmill.reviews", Session("reviews")),
        ("rowmill.reviews.s1", Session("reviews", "s1")),
        ("rowmill.reviews.input", Session("reviews", "input")),
        ("rowmill.reviews.live", None),
        ("rowmill.console", None),
        ("rowmill.reviews.s1.input", None),
        ("rowmill.", None),
        ("reviews", None),
        ("rowmill.reviews\n", None),
    ],
)
def test_groups(group: str, session: Session | None) -> None:
    """A session's group tells its pipeline and name; other groups are nobody's session."""
    assert session_of(group) == session
    if session is not None:
        assert session.group == group
        assert short_name(group) == group[len("rowmill.") :]
        record = record_of(group)
        assert (record.group, record.pipeline, record.session) == (group, session.pipeline, session.id)
    else:
        with pytest.raises(ConfigError):
            record_of(group)
