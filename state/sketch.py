"""How long calls take, as a sketch that can be added up: over calls, over time, over workers.

Percentiles of parts say nothing about the whole, but sketches of parts merge into the sketch of it. This is a DDSketch
(https://www.vldb.org/pvldb/vol12/p2195-masson.pdf) over the library of that name: bins whose bounds grow by 4.08 %
each, so that every quantile is right within 2 %, in a few dozen numbers. The one file that knows the library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ddsketch.ddsketch import BaseDDSketch
from ddsketch.mapping import LogarithmicMapping
from ddsketch.store import DenseStore

ACCURACY = 0.02
"""Relative accuracy of quantiles. Part of the format: sketches of different accuracy cannot be merged."""

_MAPPING = LogarithmicMapping(ACCURACY)
_SHORTEST, _LONGEST = 1e-9, 1e9
"""Seconds. What is shorter counts as 0, what is longer (30 years) as this: so there are a thousand bins at most."""
_LOWEST, _HIGHEST = _MAPPING.key(_SHORTEST), _MAPPING.key(_LONGEST)
_MOST = 2.0**53
_NUMBERS = (int, float)


class Sketch:
    """The distribution of some durations."""

    __slots__ = ("_inner",)

    def __init__(self) -> None:
        self._inner = BaseDDSketch(_MAPPING, DenseStore(), DenseStore(), 0.0)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Sketch:
        """What :meth:`to_dict` gave, maybe elsewhere. What is unsound in it is left out: anybody may write events."""
        return cls.of_all([content])

    @classmethod
    def of_all(cls, contents: Iterable[Mapping[str, Any]]) -> Sketch:
        """Several of them in one: adding up bins before anything is made of them costs a fraction of merging."""
        bins: dict[Any, float] = {}
        zero = 0.0
        for content in contents:
            zero += _count(content.get("zero"))
            given = content.get("bins")
            for name, number in given.items() if isinstance(given, dict) else ():
                bins[name] = bins.get(name, 0.0) + _count(number)
        sketch = cls()
        if zero:
            sketch.add(0.0, zero)
        for name, count in bins.items():
            index = _index(name)
            if index is not None and count:
                sketch.add(max(_SHORTEST, _MAPPING.value(index)), count)
        return sketch

    @property
    def count(self) -> float:
        """How many durations there are in it."""
        return float(self._inner.count)

    def add(self, seconds: float, count: float = 1.0) -> None:
        """Add a duration, or so many of the same; takes about a microsecond. One that is no number is left out."""
        if seconds != seconds:  # noqa: PLR0124 - the one value that differs from itself
            return
        self._inner.add(min(seconds, _LONGEST) if seconds >= _SHORTEST else 0.0, count)

    def merge(self, other: Sketch) -> None:
        """Add all durations of another one."""
        self._inner.merge(other._inner)

    def quantile(self, fraction: float) -> float | None:
        """The duration in seconds that so large a fraction does not exceed, within 2 %; None if there is none at all.

        Args:
            fraction: from 0 to 1: 0.5 is the median.
        """
        value = self._inner.get_quantile_value(fraction)
        return None if value is None else float(value)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: ``bins``, counts by index, and ``zero``, how many took no time.

        Bin ``i`` holds durations of up to ``(1.02 / 0.98) ** i`` seconds, those of bin ``i - 1`` excepted.
        """
        store = self._inner._store  # noqa: SLF001 - the library has no other way out but protobuf
        bins = {str(store.offset + place): _plain(count) for place, count in enumerate(store.bins) if count}
        return {"bins": bins, "zero": _plain(self._inner._zero_count)}  # noqa: SLF001


def _plain(count: float) -> float | int:
    return int(count) if count == int(count) else count


def _count(value: Any) -> float:
    """A count that is one; NaN is none."""
    return value if value.__class__ in _NUMBERS and 0 < value < _MOST else 0.0


def _index(name: Any) -> int | None:
    try:
        index = int(name)
    except (TypeError, ValueError):
        return None
    return index if _LOWEST <= index <= _HIGHEST else None
