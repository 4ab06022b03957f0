"""Tables as a handler sees them: what one row reads, and what it means to write.

A row reads what was completed before it, and its own writes. What it writes is kept with the row, as a list of
operations, and joins the table when the row completes, together with its results; a row that fails leaves nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias

from .codec import encode, loads
from .errors import ConfigError

MAX_KEY_BYTES = 1_024
MAX_VALUE_BYTES = 900_000
"""Longest value as JSON: a changelog record has to fit in one Kafka message."""

_STAMP = struct.Struct(">q")
_pack, _unpack_from = _STAMP.pack, _STAMP.unpack_from

Stamped: TypeAlias = bytes
"""A value in a store: eight bytes of the time it counts from (ms since the epoch, big-endian), then JSON."""


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A declared table.

    Attributes:
        name: unique in its pipeline; it stands in the changelog, so keep it when code changes.
        ttl_ms: milliseconds that an entry lives, from the timestamp of the row that wrote it; None: for ever.
        prefix: what the table's keys begin with in the store and the changelog. No table's name has a slash.
    """

    name: str
    ttl_ms: int | None = None
    prefix: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", self.name.encode() + b"/")


class Put(NamedTuple):
    """An entry's new value; None deletes it."""

    key: bytes
    value: Stamped | None


class Update(NamedTuple):
    """A change that is worked out when the row completes, from what stands there then."""

    key: bytes
    function: Callable[[Any], Any]
    time_ms: int
    spec: TableSpec


Operation: TypeAlias = "Put | Update"


class Source(Protocol):
    """What a row reads through: the store, under everything that was completed since."""

    def get(self, key: bytes) -> Stamped | None:
        """The value now, or None."""
        ...

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, Stamped]]:
        """All entries whose keys begin so, as they are now, ascending; no more is read than is asked for."""
        ...


class RowTables:
    """One row's tables.

    Args:
        specs: the pipeline's tables by name.
        source: what it reads.
        time_ms: the row's timestamp: what it writes is of that age, and what is expired by then it does not see.
    """

    __slots__ = ("_own", "_source", "_specs", "operations", "time_ms")

    def __init__(self, specs: Mapping[str, TableSpec], source: Source, time_ms: int) -> None:
        self._specs = specs
        self._source = source
        self._own: dict[bytes, Stamped | None] = {}
        self.operations: list[Operation] = []
        self.time_ms = time_ms

    def fork(self) -> RowTables:
        """A copy that goes its own way: what it notes is not noted here."""
        copy = RowTables(self._specs, self._source, self.time_ms)
        copy._own = dict(self._own)
        copy.operations = list(self.operations)
        return copy

    def table(self, name: str) -> Table:
        """The table of that name.

        Raises:
            ConfigError: the pipeline did not declare it.
        """
        spec = self._specs.get(name) if isinstance(name, str) else None
        if spec is None:
            raise ConfigError("ctx.table(name)", name, _undeclared(name, self._specs))
        return Table(self, spec)

    def get(self, key: bytes) -> Stamped | None:
        """What the row sees there."""
        return self._own[key] if key in self._own else self._source.get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, Stamped]]:
        """What the row sees below there, ascending."""
        return overlaid(self._source.scan(prefix), self._own, prefix)

    def put(self, key: bytes, value: Stamped | None) -> None:
        """Note a new value."""
        self._own[key] = value
        self.operations.append(Put(key, value))

    def update(self, key: bytes, function: Callable[[Any], Any], spec: TableSpec) -> None:
        """Note a change."""
        self.operations.append(Update(key, function, self.time_ms, spec))


class Table:
    """One table, from inside a handler: ``ctx.table("counts")``. Keys are text, values are JSON.

    Rows that run at the same time do not see each other's writes: what is read and written back may overwrite
    another row's. With ``ordering="key"`` entries named by the row's key are safe; for all others use
    :meth:`update` or :meth:`add`, which never lose one.
    """

    __slots__ = ("_prefix", "_row", "_spec")

    def __init__(self, row: RowTables, spec: TableSpec) -> None:
        self._row = row
        self._spec = spec
        self._prefix = spec.prefix

    def get(self, key: str, default: Any = None) -> Any:
        """The entry's value, or ``default``. It is a copy: changing it changes nothing."""
        value = self._row.get(self._key(key))
        if value is None or (self._spec.ttl_ms is not None and self._is_over(value)):
            return default
        return loads(value[8:])

    def put(self, key: str, value: Any) -> None:
        """Set an entry.

        Raises:
            ConfigError: the key is no text, or the value is None (use :meth:`delete`) or too long.
            BadRowError: the value is no JSON.
        """
        self._row.put(self._key(key), stamp(self._spec, value, self._row.time_ms))

    def delete(self, key: str) -> None:
        """Remove an entry; an absent one is no error."""
        self._row.put(self._key(key), None)

    def scan(self, prefix: str = "", limit: int | None = None) -> list[tuple[str, Any]]:
        """Entries whose keys begin with ``prefix``, by key, at most ``limit`` of them: pairs of key and value."""
        found = self._row.scan(self._prefix + _utf8(prefix))
        living = ((key, value) for key, value in found if not self._is_over(value))
        return [(self._name_of(key), unstamp(value)) for key, value in islice(living, limit and max(0, limit))]

    def update(self, key: str, function: Callable[[Any], Any]) -> None:
        """Change an entry when the row completes: ``function(value or None)`` gives the new value, None deletes it.

        It runs while nothing else changes the table, so no update of another row is lost. It must depend on its
        argument alone, be quick, and may be called again; this row does not see its result. If it raises, the row
        fails.
        """
        if not callable(function):
            raise ConfigError("update(function)", function, "give a function of the present value")
        self._row.update(self._key(key), function, self._spec)

    def add(self, key: str, amount: float = 1) -> None:
        """Count: add ``amount`` to a number that begins at 0, when the row completes."""
        if isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise ConfigError("add(amount=)", amount, "give a number")
        self.update(key, lambda value: (value or 0) + amount)

    def __contains__(self, key: str) -> bool:
        """Whether there is such an entry."""
        value = self._row.get(self._key(key))
        return value is not None and not self._is_over(value)

    def __iter__(self) -> Iterator[str]:
        """The keys, in order."""
        return iter([self._name_of(key) for key, value in self._row.scan(self._prefix) if not self._is_over(value)])

    def _key(self, key: str) -> bytes:
        encoded = _utf8(key)
        if not encoded or len(encoded) > MAX_KEY_BYTES:
            raise ConfigError(f"table {self._spec.name!r}: key", key, f"use 1 to {MAX_KEY_BYTES:,} bytes of text")
        return self._prefix + encoded

    def _name_of(self, key: bytes) -> str:
        return key[len(self._prefix) :].decode()

    def _is_over(self, value: Stamped) -> bool:
        return is_expired(self._spec, value, self._row.time_ms)


def overlaid(
    below: Iterator[tuple[bytes, Stamped]], changes: Mapping[bytes, Stamped | None], prefix: bytes
) -> Iterator[tuple[bytes, Stamped]]:
    """``below`` with the changes, as they are now, to keys that begin so; both ascend."""
    # A copy: another thread may complete rows meanwhile.
    over = sorted(change for change in list(changes.items()) if change[0].startswith(prefix))
    return _merged(below, over) if over else below


def _merged(
    below: Iterator[tuple[bytes, Stamped]], over: Sequence[tuple[bytes, Stamped | None]]
) -> Iterator[tuple[bytes, Stamped]]:
    place = 0
    for entry in below:
        while place < len(over) and over[place][0] < entry[0]:
            yield from _living(over[place])
            place += 1
        if place == len(over) or over[place][0] != entry[0]:
            yield entry
    for change in over[place:]:
        yield from _living(change)


def _living(change: tuple[bytes, Stamped | None]) -> Iterator[tuple[bytes, Stamped]]:
    if change[1] is not None:
        yield change[0], change[1]


def stamp(spec: TableSpec, value: Any, time_ms: int) -> Stamped:
    """A value as a store keeps it.

    Raises:
        ConfigError: None, NaN or infinite, or longer than 900,000 bytes.
        BadRowError: no JSON.
    """
    if value is None:
        raise ConfigError(f"table {spec.name!r}: value", value, "delete() the entry instead")
    encoded = encode(value)
    if encoded == b"null":  # it would be read as None, which is no value
        raise ConfigError(f"table {spec.name!r}: value", value, "JSON has no NaN and no infinity")
    if len(encoded) > MAX_VALUE_BYTES:
        raise ConfigError(
            f"table {spec.name!r}: value", f"{len(encoded):,} bytes of JSON", f"keep it within {MAX_VALUE_BYTES:,}"
        )
    return _pack(time_ms) + encoded


def restamp(value: bytes, time_ms: int) -> Stamped:
    """A value that is JSON already, as a store keeps it."""
    return _pack(time_ms) + value


def unstamp(value: Stamped) -> Any:
    """The value that :func:`stamp` was given."""
    return loads(value[8:])


def time_of(value: Stamped) -> int:
    """The time a value counts from."""
    return int(_unpack_from(value)[0])


def is_expired(spec: TableSpec, value: Stamped, time_ms: int) -> bool:
    """Whether the entry is over at that time."""
    return spec.ttl_ms is not None and time_of(value) + spec.ttl_ms <= time_ms


def _undeclared(name: str, specs: Mapping[str, TableSpec]) -> str:
    known = f"; there are {', '.join(sorted(specs))}" if specs else ""
    return f"declare it where the pipeline is built: pipeline.table({name!r}){known}"


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise ConfigError("table: key", text, "a key is text")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("table: key", text, "text must be valid Unicode (no lone surrogates)") from None
