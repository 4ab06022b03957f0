"""Places in a log as people write them: offsets, moments, durations, and Kafka's ``topic:0,1``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from ..state.errors import ConfigError
from ..state.model import TopicPartition

_DURATION = re.compile(
    r"(?P<sign>[+-]?)P(?:(?P<days>\d+)D)?"
    r"(?:T(?=\d)(?:(?P<hours>\d+)H)?(?:(?P<minutes>\d+)M)?(?:(?P<seconds>\d+(?:[.,]\d{1,9})?)S)?)?",
    re.IGNORECASE,
)
_MOST_DAYS = 100 * 366
_PARTITIONS = re.compile(r"\d+(?:,\d+)*")


class Place(NamedTuple):
    """A place that was asked for: an end of the log, an offset, or a moment in milliseconds since the epoch."""

    kind: Literal["earliest", "end", "offset", "time"]
    value: int = 0


EARLIEST, END = Place("earliest"), Place("end")


def parse_place(setting: str, text: str) -> Place:
    """``earliest``, ``end`` (or Kafka's ``latest``), an offset, or a moment as :func:`parse_moment` takes it.

    Args:
        setting: the option, for the message.
        text: what was given.

    Raises:
        ConfigError: it is none of these.
    """
    if text == "earliest":
        return EARLIEST
    if text in {"end", "latest"}:
        return END
    if text.isascii() and text.isdigit():
        return Place("offset", _offset(setting, text))
    try:
        return Place("time", parse_moment(setting, text))
    except ConfigError:
        raise ConfigError(
            setting, text, "give earliest, end, an offset, or a time such as 2026-01-31T12:00 or 2026-01-31T12:00Z"
        ) from None


def parse_moment(setting: str, text: str) -> int:
    """A date and time of day in milliseconds since the epoch; local time unless it names a zone.

    Raises:
        ConfigError: it is none.
    """
    try:
        # A time without a zone is local, as everywhere in rowmill; Kafka's tool takes it for UTC.
        moment = datetime.fromisoformat(text).astimezone()
        milliseconds = round(moment.timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        milliseconds = -1
    if milliseconds < 0:
        raise ConfigError(setting, text, "give YYYY-MM-DDTHH:mm:SS.sss, as 2026-01-31T12:00:00.000 or with a zone (Z)")
    return milliseconds


def parse_duration(setting: str, text: str) -> int:
    """A duration of ISO 8601 without months and years, as ``P7D`` or ``PT1H30M``, in milliseconds.

    Raises:
        ConfigError: it is none, or negative, or longer than a hundred years.
    """
    found = _DURATION.fullmatch(text)
    parts = found.groupdict() if found else {}
    if not any(parts.get(name) for name in ("days", "hours", "minutes", "seconds")) or parts.get("sign") == "-":
        raise ConfigError(setting, text, "give PnDTnHnMnS, as P7D (a week), PT1H30M or P1DT12H")
    days, hours, minutes = (int(parts[name] or 0) for name in ("days", "hours", "minutes"))
    seconds = float((parts["seconds"] or "0").replace(",", "."))
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total > _MOST_DAYS * 86_400:
        raise ConfigError(setting, text, "give at most a hundred years; --to-earliest begins with the first row")
    return round(total * 1000)


def parse_shift(setting: str, text: str) -> int:
    """A whole number with or without a sign.

    Raises:
        ConfigError: it is none, or no offset can be as large.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text) or abs(int(text)) >= 1 << 63:
        raise ConfigError(setting, text, "give a number of offsets: -100 to run a hundred again, +100 to skip them")
    return int(text)


def shown_moment(milliseconds: int) -> str:
    """A moment for people, with its zone."""
    return datetime.fromtimestamp(milliseconds / 1000).astimezone().isoformat(timespec="milliseconds")


def parse_topics(setting: str, given: Sequence[str], sources: Sequence[str]) -> dict[str, frozenset[int] | None]:
    """``topic`` or ``topic:0,1`` each; the partitions asked for by topic, None for all of them.

    Raises:
        ConfigError: a form or a topic that is not there.
    """
    chosen: dict[str, frozenset[int] | None] = {}
    for text in given:
        topic, separator, numbers = text.partition(":")
        if separator and not _PARTITIONS.fullmatch(numbers):
            raise ConfigError(setting, text, "give TOPIC, or TOPIC:0,1 for some of its partitions")
        if topic not in sources:
            raise ConfigError(setting, text, f"the pipeline reads {', '.join(sources)}")
        some = frozenset(map(int, numbers.split(","))) if separator else None
        before = chosen.get(topic, frozenset())
        chosen[topic] = None if some is None or before is None else before | some
    return chosen


def parse_offsets(setting: str, name: str, lines: Sequence[str]) -> dict[TopicPartition, int]:
    """The lines ``topic,partition,offset`` of a file, as Kafka's tool writes them; empty lines are left out.

    Args:
        setting: the option, for the message.
        name: the file's.
        lines: its content.

    Raises:
        ConfigError: naming the line that is no such line, or comes twice.
    """
    offsets: dict[TopicPartition, int] = {}
    for number, line in enumerate(lines, 1):
        fields = [field.strip().strip('"') for field in line.split(",")]
        if fields == [""] or (number == 1 and fields == ["topic", "partition", "offset"]):
            continue
        if len(fields) != 3 or not all(field.isascii() and field.isdigit() for field in fields[1:]):
            raise ConfigError(setting, f"{name}, line {number}: {line[:80]}", "write topic,partition,offset")
        tp = TopicPartition(fields[0], int(fields[1]))
        if tp in offsets:
            raise ConfigError(setting, f"{name}, line {number}: {line[:80]}", f"{tp} stands in it twice; leave one out")
        offsets[tp] = _offset(setting, fields[2])
    if not offsets:
        raise ConfigError(setting, name, "there is no line in it; write topic,partition,offset")
    return offsets


def _offset(setting: str, text: str) -> int:
    if len(text) > 19 or int(text) >= 1 << 63:
        raise ConfigError(setting, text, "no offset is as large")
    return int(text)
