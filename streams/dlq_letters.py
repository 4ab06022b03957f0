"""Dead letters and marks as records: what stands on the two topics, read tolerantly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..state.codec import dumps, loads
from ..state.errors import BadRowError, ConfigError
from ..state.model import RESERVED_PREFIX, Headers, Record, Row, StoredRecord
from .collect import input_row
from .dead_letters import CONNECT_PREFIX, ERROR_PREFIX, TRUNCATED_HEADER
from .errors import CheckpointError
from .session import SESSION_HEADER

_VERSION = 1

State: TypeAlias = Literal["retried", "purged"]
Place: TypeAlias = tuple[int, int]
"""Partition and offset of a dead letter."""


def marks_topic(topic: str) -> str:
    """The topic of the marks of a dead-letter topic.

    Not ``<topic>.marks``: that is the dead-letter topic of a session called ``marks``. And nobody's source or sink
    can begin with ``rowmill.``.
    """
    return f"{RESERVED_PREFIX}{topic}.marks"


@dataclass(frozen=True, slots=True)
class Mark:
    """What was done with a dead letter.

    Attributes:
        state: ``retried`` or ``purged``.
        time: when, in milliseconds since the epoch.
        by: by whom, as they said.
        to: ``topic/partition`` that the row was sent to; "" for purged.
        letter: tells the dead letter from another one at the same place, once its topic is deleted and made anew.
        batch: the transaction.
    """

    state: State
    time: int
    by: str
    to: str
    letter: str
    batch: str

    def encode(self) -> bytes:
        """As it stands on the topic."""
        fields = {name: getattr(self, name) for name in ("state", "time", "by", "to", "letter", "batch")}
        return dumps({"v": _VERSION, **fields})


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row that failed, and why. What its headers do not say is "" or None.

    Attributes:
        topic, partition, offset: where it stands.
        timestamp: the row's, in milliseconds since the epoch.
        key, value: the row's.
        headers: the row's own, without rowmill's.
        stage, type, message, where, log, session: what the error's headers say.
        attempts: how often the stage was tried.
        source: the topic that the row came from, as recorded.
        source_partition, source_offset: where it stood there.
        input_row: its place in the input of a bounded run.
        truncated: the length that the value had before it was cut; None when it is whole.
        fingerprint: tells it from another one at the same place, once the topic is deleted and made anew.
        mark: what was done with it since; None while it waits.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    stage: str = ""
    type: str = ""
    message: str = ""
    attempts: int | None = None
    where: str = ""
    log: str = ""
    session: str = ""
    source: str = ""
    source_partition: int | None = None
    source_offset: int | None = None
    input_row: int | None = None
    truncated: int | None = None
    fingerprint: str = ""
    mark: Mark | None = None

    @property
    def id(self) -> str:
        """``partition/offset``."""
        return f"{self.partition}/{self.offset}"

    @property
    def came_from(self) -> str:
        """``topic/partition/offset`` of the row that failed, as far as it is recorded."""
        parts = (self.source, self.source_partition, self.source_offset)
        return "/".join(str(part) for part in parts if part not in {None, ""})

    @property
    def row(self) -> Row:
        """The value as a row.

        Raises:
            BadRowError: it is no JSON object (a ValueError).
        """
        row = loads(self.value or b"null")
        if not isinstance(row, dict):
            raise BadRowError("not_an_object", f"{self.topic}/{self.id}: the value is no JSON object")
        return row

    def brief(self) -> DeadLetter:
        """Without what may be large: for keeping many."""
        return replace(self, value=None, headers=(), log="", message=self.message[:500])


def read_letter(record: StoredRecord) -> DeadLetter:
    """A record of a dead-letter topic, whoever wrote it; Kafka Connect's headers are understood as well."""
    texts: dict[str, str] = {}
    for name, value in record.headers:
        if value is not None and name.startswith((ERROR_PREFIX, CONNECT_PREFIX, SESSION_HEADER)):
            texts[name] = value.decode("utf-8", "replace")

    def text(name: str, connect: str = "") -> str:
        return texts.get(ERROR_PREFIX + name) or texts.get(CONNECT_PREFIX + (connect or name), "")

    return DeadLetter(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        record.key,
        record.value,
        tuple(
            (_readable(name), value)
            for name, value in record.headers
            if not name.startswith((RESERVED_PREFIX, CONNECT_PREFIX))
        ),
        stage=text("stage", "class.name"),
        type=text("type", "exception.class.name"),
        message=text("message", "exception.message"),
        attempts=number_of(text("attempts")),
        where=text("where", "exception.stacktrace"),
        log=text("log"),
        session=text("session") or texts.get(SESSION_HEADER, ""),
        source=text("topic"),
        source_partition=number_of(text("partition")),
        source_offset=number_of(text("offset")),
        input_row=_input_row(record),
        truncated=_truncated(record, texts),
        fingerprint=_fingerprint(record),
    )


def _readable(name: str) -> str:
    """A header's name that may hold bytes which are not UTF-8 (as surrogates), in a form that can be written."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _truncated(record: Record, texts: Mapping[str, str]) -> int | None:
    if not any(name == TRUNCATED_HEADER for name, _ in record.headers):
        return None
    return number_of(texts.get(TRUNCATED_HEADER, "")) or len(record.value or b"")


def _input_row(record: Record) -> int | None:
    try:
        return input_row(record)
    except ValueError:  # digits that int() does not take
        return None


def number_of(text: str) -> int | None:
    """A whole number from 0; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _fingerprint(record: Record) -> str:
    digest = hashlib.blake2b(b"%d %d " % (record.timestamp, len(record.key or b"")), digest_size=8)
    for part in (record.key, record.value, *(value for _, value in record.headers)):
        digest.update(part or b"\x00")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters. Everything given must hold; nothing given means all.

    Attributes:
        places: (partition, offset) of some.
        stages, types: one of these.
        since: the row's time is not before this, in milliseconds since the epoch.
        until: the row's time is before this.
    """

    places: frozenset[Place] = frozenset()
    stages: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    since: int | None = None
    until: int | None = None

    def takes(self, letter: DeadLetter) -> bool:
        """Whether it is one of them."""
        return (
            (not self.places or (letter.partition, letter.offset) in self.places)
            and (not self.stages or letter.stage in self.stages)
            and (not self.types or letter.type in self.types)
            and (self.since is None or letter.timestamp >= self.since)
            and (self.until is None or letter.timestamp < self.until)
        )


def parse_id(text: str, topic: str) -> Place:
    """``partition/offset``, or ``topic/partition/offset`` of this topic.

    Raises:
        ConfigError: it is neither.
    """
    found = re.fullmatch(r"(?:([^/]+)/)?([0-9]{1,19})/([0-9]{1,19})", text)
    if found is None or found[1] not in {None, topic}:
        raise ConfigError("ID", text, f"write partition/offset as `rowmill dlq list {topic}` shows it, such as 0/17")
    return int(found[2]), int(found[3])


# --- marks as records ------------------------------------------------------------------------------------------


def with_mark(record: StoredRecord, marks: Mapping[Place, Mark]) -> DeadLetter:
    """A dead letter with its mark; a mark of another one that stood there before does not count."""
    letter = read_letter(record)
    mark = marks.get((record.partition, record.offset))
    return letter if mark is None or mark.letter != letter.fingerprint else replace(letter, mark=mark)


def place_of(record: Record) -> Place | None:
    """The place that a mark's key names; None: it is no mark."""
    partition, separator, offset = (record.key or b"").decode("utf-8", "replace").partition("/")
    numbers = number_of(partition), number_of(offset)
    if not separator or numbers[0] is None or numbers[1] is None:
        return None
    return numbers[0], numbers[1]


def decode_mark(record: StoredRecord) -> Mark:
    """Nothing is guessed: a mark that is overlooked would send a row twice.

    Raises:
        CheckpointError: it cannot be read.
    """
    where = f"{record.topic}/{record.partition}/{record.offset}"
    try:
        content = loads(record.value or b"")
        version = content["v"]
        if version == _VERSION and content["state"] in {"retried", "purged"}:
            texts = [content[name] for name in ("by", "to", "letter", "batch")]
            if isinstance(content["time"], int) and all(isinstance(text, str) for text in texts):
                return Mark(content["state"], content["time"], *texts)
    except (ValueError, KeyError, TypeError):
        version = None
    if isinstance(version, int) and version > _VERSION:
        raise CheckpointError(f"{where}: a newer rowmill wrote this mark of a dead letter; update this one")
    raise CheckpointError(
        f"{where}: this mark of a dead letter cannot be read, so what was retried is not known; to retry and purge "
        f"anew, delete topic {record.topic!r}"
    )


def record_size(key: bytes | None, value: bytes | None, headers: Headers) -> int:
    """Bytes of a record, as limits count them, or a few more."""
    own = sum(len(name.encode("utf-8", "replace")) + len(content or b"") + 10 for name, content in headers)
    return len(key or b"") + len(value or b"") + own
