"""Records on their way out, by columns: what the rows of one commit interval become, for one partition.

An object per record would be the obvious form, and was the first one. But a worker holds tens of thousands of these
until their commit, and three nested tuples a record (itself, its headers, the header that tells its source) are what
Python's garbage collector then walks through again and again: a fifth of all processor time of a plain pipeline
(benchmarks, P1). Columns of bytes and integers are nothing to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import SupportsIndex, overload

from ..state.model import Header, Headers, Outgoing, new_outgoing
from .session import SOURCE_HEADER


class Outbox(Sequence[Outgoing]):
    """Records for one partition, in order. Those that plain rows became know only their row's offset.

    Args:
        source_prefix: what stands before the offset in a plain row's source header: ``topic/partition/``.
        session: the header that tells the session.
    """

    __slots__ = ("_headers", "_keys", "_session", "_source_prefix", "_timestamps", "_values")

    def __init__(self, source_prefix: str, session: Header) -> None:
        self._source_prefix = source_prefix.encode()
        self._session = session
        self._keys: list[bytes | None] = []
        self._values: list[bytes | None] = []
        self._timestamps: list[int] = []
        self._headers: list[Headers | int] = []
        """A plain row's offset in place of its headers."""

    def append(self, record: Outgoing) -> None:
        """Put one record behind the others."""
        self._keys.append(record.key)
        self._values.append(record.value)
        self._timestamps.append(record.timestamp)
        self._headers.append(record.headers)

    def extend_plain(
        self, keys: list[bytes | None], values: list[bytes], timestamps: list[int], offsets: list[int]
    ) -> None:
        """Put the only results of these rows, which had no headers of their own, behind the others."""
        self._keys += keys
        self._values += values
        self._timestamps += timestamps
        self._headers += offsets

    def extend(self, other: Outbox) -> None:
        """Put what came after, of the same source, behind these."""
        self._keys += other._keys
        self._values += other._values
        self._timestamps += other._timestamps
        self._headers += other._headers

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Outgoing]:
        return (
            new_outgoing((key, value, timestamp, tuple(headers))) for key, value, timestamp, headers in self.parts()
        )

    def parts(self) -> Iterator[tuple[bytes | None, bytes | None, int, list[Header]]]:
        """Key, value, timestamp and headers of each record, for a broker that makes something else of them at once."""
        prefix, session = self._source_prefix, self._session
        headers = (
            [(SOURCE_HEADER, b"%b%d/0" % (prefix, each)), session] if isinstance(each, int) else list(each)
            for each in self._headers
        )
        return zip(self._keys, self._values, self._timestamps, headers, strict=True)

    @overload
    def __getitem__(self, place: SupportsIndex) -> Outgoing: ...
    @overload
    def __getitem__(self, place: slice) -> list[Outgoing]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> Outgoing | list[Outgoing]:
        return list(self)[place]
