"""Compare what two sessions of a pipeline made of the same rows.

A result is known by its source header: topic, partition and offset of the row that it was made from, and its number
among that row's results. Each session's sink is read once and sorted by that on disk (``collect.Sorter``: at most
50,000 results or 32 MiB in memory), then both are walked through side by side. SQLite would do the same with an
index and a hundred lines more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias

from ..state.codec import loads
from ..state.model import Record, TopicPartition
from .brokers.base import Broker
from .collect import Result, Sorter, header, input_row, read_topic
from .errors import SessionError
from .session import SOURCE_HEADER, Session
from .side_replay import Range, stored_range

Kind: TypeAlias = "Literal['changed', 'only_a', 'only_b']"

ABSENT = object()
"""Stands for a field that one of the two results does not have."""

_SEQUENCE_BITS = 40  # results read per session; the number among a row's results has the bits above
_INPUT = ""


class Difference(NamedTuple):
    """A result that the sessions do not have in common.

    ``place`` is ``topic/partition/offset/ordinal`` of its source, or ``row N/ordinal`` of a bounded run's input;
    ``fields`` are those that differ, with both values, ABSENT where there is none. A value that is no JSON object
    counts as one field without a name.
    """

    kind: Kind
    place: str
    fields: dict[str, tuple[Any, Any]]


@dataclass(slots=True)
class Comparison:
    """What two sessions have in common.

    Attributes:
        equal, changed, only_a, only_b: numbers of results.
        again_a, again_b: results that a later one for the same place takes the place of: rows that ran again.
        shown: the first differences.
        ranges: whether only the range that a side replay ran was compared.
    """

    equal: int = 0
    changed: int = 0
    only_a: int = 0
    only_b: int = 0
    again_a: int = 0
    again_b: int = 0
    shown: list[Difference] = field(default_factory=list)
    ranges: bool = False

    @property
    def differences(self) -> int:
        """How many results differ."""
        return self.changed + self.only_a + self.only_b


async def compare(broker: Broker, sink: str, a: Session, b: Session, *, limit: int = 10) -> Comparison:
    """Compare the results of two sessions in their sinks. Side topics and dead letters are not looked at.

    Where a row ran again in the same session, its last result counts. Where one of them is a side replay, only the
    rows of its range are compared.

    Args:
        broker: a started one.
        sink: the pipeline's.
        a, b: the sessions.
        limit: differences to be kept in ``shown``.

    Raises:
        SessionError: a session has no results.
        BrokerError: the broker does not answer.
    """
    topics: dict[str, int] = {}
    sides: list[_Results] = []
    try:
        for session in (a, b):
            results = _Results(topics)
            sides.append(results)
            await results.read(broker, session.output(sink), session)
        ranges = [await stored_range(broker, session, topics.keys() - {_INPUT}) for session in (a, b)]
        comparison = _compared(sides[0], sides[1], _Within(topics, [found for found in ranges if found]), limit)
        comparison.ranges = any(ranges)
        return comparison
    finally:
        for results in sides:
            results.close()


# --- one session -----------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    topic: int
    partition: int
    offset: int
    ordinal: int


class _Results:
    """The results of one session, sorted by their source."""

    def __init__(self, topics: dict[str, int]) -> None:
        self._topics = topics
        self._sorter = Sorter()
        self._read = 0
        self.again = 0

    async def read(self, broker: Broker, topic: str, session: Session) -> None:
        """Take all of a sink."""
        if topic not in await broker.topics():
            raise SessionError(
                f"session {session.id!r} of pipeline {session.pipeline!r} has no results: there is no topic {topic!r} "
                f"on {broker.url}"
            )
        async for records in read_topic(broker, topic):
            for record in records:
                self._add(record)

    def _add(self, record: Record) -> None:
        source = header(record, SOURCE_HEADER)
        if source is None:  # not ours
            return
        topic, partition, offset, ordinal = source.decode("utf-8", "replace").rsplit("/", 3)
        row = input_row(record)
        name, first, second = (topic, int(partition), int(offset)) if row is None else (_INPUT, 0, row)
        number = self._topics.setdefault(name, len(self._topics))
        last = int(ordinal) << _SEQUENCE_BITS | self._read
        self._read += 1
        self._sorter.add(Result((number << 32 | first, second, last), record.value or b"null"))

    def sorted(self, within: _Within) -> Iterator[tuple[_Place, bytes]]:
        """By place, the last of each."""
        for place, results in groupby(self._sorter.sorted(), _place_of):
            if not within.holds(place):
                continue
            for count, result in enumerate(results):
                self.again += count > 0
                last = result
            yield place, last.value

    def close(self) -> None:
        """Remove the files."""
        self._sorter.close()


def _place_of(result: Result) -> _Place:
    place, offset, last = result.order
    return _Place(place >> 32, place & 0xFFFFFFFF, offset, last >> _SEQUENCE_BITS)


class _Within:
    """Whether a place lies in every range."""

    def __init__(self, topics: Mapping[str, int], ranges: list[dict[TopicPartition, Range]]) -> None:
        self._names = {number: name for name, number in topics.items()}
        self._ranges = ranges

    def name(self, place: _Place) -> str:
        """For people."""
        topic = self._names[place.topic]
        if topic == _INPUT:
            return f"row {place.offset}/{place.ordinal}"
        return f"{topic}/{place.partition}/{place.offset}/{place.ordinal}"

    def holds(self, place: _Place) -> bool:
        """Whether to look at it."""
        tp = TopicPartition(self._names[place.topic], place.partition)
        return all(begin <= place.offset < end for ranges in self._ranges for begin, end in [ranges.get(tp, (0, 0))])


# --- both ------------------------------------------------------------------------------------------------------


def _compared(a: _Results, b: _Results, within: _Within, limit: int) -> Comparison:
    found = Comparison()
    lefts, rights = a.sorted(within), b.sorted(within)
    left, right = next(lefts, None), next(rights, None)
    while left is not None or right is not None:
        if right is None or (left is not None and left[0] < right[0]):
            assert left is not None  # noqa: S101 - one of them is there
            found.only_a += 1
            _show(found, "only_a", within.name(left[0]), left[1], None, limit)
            left = next(lefts, None)
        elif left is None or right[0] < left[0]:
            found.only_b += 1
            _show(found, "only_b", within.name(right[0]), None, right[1], limit)
            right = next(rights, None)
        else:
            if left[1] == right[1] or _same(loads(left[1]), loads(right[1])):
                found.equal += 1
            else:
                found.changed += 1
                _show(found, "changed", within.name(left[0]), left[1], right[1], limit)
            left, right = next(lefts, None), next(rights, None)
    found.again_a, found.again_b = a.again, b.again
    return found


def _show(found: Comparison, kind: Kind, place: str, left: bytes | None, right: bytes | None, limit: int) -> None:
    if len(found.shown) < limit:
        found.shown.append(Difference(kind, place, _fields(_fields_of(left), _fields_of(right))))


def _fields_of(value: bytes | None) -> dict[str, Any]:
    if value is None:
        return {}
    row = loads(value)
    return row if isinstance(row, dict) else {"": row}


def _fields(left: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (left.get(name, ABSENT), right.get(name, ABSENT)) for name in [*left, *right]}
    return {name: pair for name, pair in pairs.items() if not _same(*pair)}


def _same(left: Any, right: Any) -> bool:
    """Whether two JSON values are the same: the order of fields does not count, 1 and 1.0 are one number."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(value, right[name]) for name, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)
