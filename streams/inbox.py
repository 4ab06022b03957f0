"""Records that a partition task was given and has not begun, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter

from ..state.model import Record

_value_of = attrgetter("value")


class Inbox:
    """Lots of records as a reader gave them, each with its size, so that most are measured once only."""

    __slots__ = ("_lots",)

    def __init__(self) -> None:
        self._lots: deque[tuple[Sequence[Record], int]] = deque()

    def __bool__(self) -> bool:
        return bool(self._lots)

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(records for records, _ in self._lots)

    @property
    def first(self) -> int:
        """The first record's offset; there must be one."""
        return self._lots[0][0][0].offset

    def add(self, records: Sequence[Record]) -> int:
        """Put records, at least one, behind the others; gives their size."""
        size = size_of(records)
        self._lots.append((records, size))
        return size

    def take(self, most: int) -> tuple[Sequence[Record], int]:
        """The next records, as many as are there up to ``most``, and their size. There must be one."""
        taken, size = self._lots.popleft()
        while self._lots and len(taken) < most:
            further, added = self._lots.popleft()
            taken, size = [*taken, *further], size + added
        if len(taken) <= most:
            return taken, size
        part = taken[:most]
        part_size = size_of(part)
        self._lots.appendleft((taken[most:], size - part_size))
        return part, part_size

    def clear(self) -> None:
        """Forget them."""
        self._lots.clear()


def size_of(records: Sequence[Record]) -> int:
    """Bytes of their values."""
    return sum(map(len, filter(None, map(_value_of, records))))
