"""Dead letters: the original record and why it died, whatever its size."""

from __future__ import annotations

import pytest
from rowmill.handlers.chain import Failure
from rowmill.state.model import Headers, Outgoing, TopicPartition
from rowmill.streams.dead_letters import MESSAGE_CHARACTERS, TRUNCATED_HEADER, dead_letter
from support.rows import header_of, record

FAILURE = Failure("score", "KeyError", "'text'", attempts=3)
SESSION = "try-1"
IN = TopicPartition("in", 0)


def weight(letter: Outgoing) -> int:
    """Bytes of a record as a broker counts them, without the few of its frame."""
    headers = sum(len(name.encode()) + len(value or b"") + 10 for name, value in letter.headers)
    return len(letter.key or b"") + len(letter.value or b"") + headers


def test_what_it_says() -> None:
    """Key, value, timestamp and headers stay; stage, type, message, attempts, place and session are added."""
    source = record(b"\xff not json", offset=7, key=b"k", headers=(("h", b"1"), ("h", None)), partition=3)
    letter = dead_letter(source.tp, source, FAILURE, SESSION, 100_000)
    assert (letter.key, letter.value, letter.timestamp) == (b"k", b"\xff not json", 1_000)
    assert letter.headers == (
        ("h", b"1"),
        ("h", None),
        ("rowmill.error.stage", b"score"),
        ("rowmill.error.type", b"KeyError"),
        ("rowmill.error.message", b"'text'"),
        ("rowmill.error.attempts", b"3"),
        ("rowmill.error.topic", b"in"),
        ("rowmill.error.partition", b"3"),
        ("rowmill.error.offset", b"7"),
        ("rowmill.error.session", b"try-1"),
        ("rowmill.session", b"try-1"),
    )


@pytest.mark.parametrize("value", [None, b""])
def test_values_that_are_nothing(value: bytes | None) -> None:
    """A null value stays null and an empty one empty, however small the topic's limit."""
    for limit in (100_000, 10):
        assert dead_letter(IN, record(value), FAILURE, SESSION, limit).value == value


def test_reserved_headers_are_stripped() -> None:
    """What a sender wrote under our prefix is dropped, except the place in the input of a bounded run."""
    headers: Headers = (
        ("rowmill.error.stage", b"forged"),
        ("rowmill.session", b"forged"),
        ("rowmill.anything", b"x"),
        ("rowmill.input.row", b"5"),
        ("mine", b"x"),
    )
    letter = dead_letter(IN, record(headers=headers), FAILURE, SESSION, 100_000)
    assert header_of(letter.headers, "rowmill.error.stage") == b"score"
    assert header_of(letter.headers, "rowmill.session") == b"try-1"
    assert header_of(letter.headers, "rowmill.anything") is None
    assert header_of(letter.headers, "rowmill.input.row") == b"5"
    assert header_of(letter.headers, "mine") == b"x"


def test_header_names_that_are_not_utf8() -> None:
    """A name of other bytes is spelled out, so that it can be written."""
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    letter = dead_letter(IN, record(headers=((name, b"x"), ("ü", b"y"))), FAILURE, SESSION, 100_000)
    assert letter.headers[:2] == (("caf\\xe9", b"x"), ("ü", b"y"))


def test_messages_are_capped() -> None:
    """An endless message is cut, and text that is no Unicode is made so."""
    letter = dead_letter(IN, record(), Failure("s", "E\ud800", "ü" * 100_000), SESSION, 100_000)
    assert header_of(letter.headers, "rowmill.error.message") == ("ü" * MESSAGE_CHARACTERS).encode()
    assert header_of(letter.headers, "rowmill.error.type") == b"E?"


@pytest.mark.parametrize(
    ("value_bytes", "header_bytes", "keeps_headers", "keeps_value"),
    [(10, 10, True, True), (50_000, 60_000, False, True), (10, 200_000, False, True), (200_000, 10, False, False)],
)
def test_what_does_not_fit(value_bytes: int, header_bytes: int, keeps_headers: bool, keeps_value: bool) -> None:
    """The headers go first, then the end of the value, which is marked with its length; the error always stays."""
    original = record(b"v" * value_bytes, key=b"k", headers=(("h", b"h" * header_bytes),))
    letter = dead_letter(original.tp, original, FAILURE, SESSION, 100_000)
    assert weight(letter) <= 100_000
    assert (header_of(letter.headers, "h") is not None) is keeps_headers
    assert letter.value is not None
    assert (b"v" * value_bytes).startswith(letter.value)
    assert (letter.value == original.value) is keeps_value
    mark = header_of(letter.headers, TRUNCATED_HEADER)
    assert mark == (None if keeps_value else b"%d" % value_bytes)
    assert keeps_value or len(letter.value) > 90_000
    assert header_of(letter.headers, "rowmill.error.stage") == b"score"


def test_the_words_of_kafka_connect() -> None:
    """Asked for, Connect's headers say the same besides ours."""
    source = record(b"{}", offset=7, partition=3)
    plain, both = (dead_letter(source.tp, source, FAILURE, SESSION, 100_000, connect=name) for name in (None, "p"))
    assert both.headers[: len(plain.headers)] == plain.headers
    assert dict(both.headers[len(plain.headers) :]) == {
        "__connect.errors.topic": b"in",
        "__connect.errors.partition": b"3",
        "__connect.errors.offset": b"7",
        "__connect.errors.connector.name": b"p",
        "__connect.errors.task.id": b"3",
        "__connect.errors.stage": b"TRANSFORMATION",
        "__connect.errors.class.name": b"score",
        "__connect.errors.exception.class.name": b"KeyError",
        "__connect.errors.exception.message": b"'text'",
    }
