"""The port of local stores: ordered bytes on this machine's disk, one store per partition.

A store holds what the changelog topic holds and nothing else, so losing one costs a restore, never a row. What the
keys and values mean is the business of ``state/tables.py``; a store knows bytes. ``state/memory.py`` and
``state/rocksdb.py`` implement the port, and one contract suite holds them to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from .model import TopicPartition

Change = tuple[bytes, "bytes | None"]
"""A key and its new value; None deletes it."""


class StoreError(BaseException):
    """A local store cannot be read or written: restart the partition from its changelog.

    Not an ``Exception``: it may be raised inside a handler that reads a table, and must neither be taken for that
    row's failure nor be caught by the handler's ``except Exception``.

    Args:
        message: the store's folder, and what was wrong.
        damaged: whether its content cannot be believed any more, so that it has to be set aside; otherwise the same
            store may work when it is opened again (the disk was full).
    """

    def __init__(self, message: str, *, damaged: bool) -> None:
        super().__init__(message)
        self.damaged = damaged


class Store(ABC):
    """Keys and values of one partition, in the order of the keys' bytes.

    Methods may be called from several threads, ``write`` and ``close`` from one at a time. Any may raise StoreError.
    """

    @abstractmethod
    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""

    @abstractmethod
    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Every entry whose key begins with ``prefix``, ascending: all of them, or a StoreError at the bad place.

        The iterator shows the store as it was when it was made. Abandoned half-way, it holds nothing open for long.
        """

    @abstractmethod
    def write(self, changes: Iterable[Change]) -> None:
        """Apply all of these or none, in order; of two changes to one key the last one counts."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it. Twice is fine. What was written is still there when it is opened again."""


class Stores(ABC):
    """The stores of one worker. Everything in it is that worker's alone until ``close``."""

    @property
    def recent_bytes(self) -> int:
        """Memory that an open store's tables may use for what they read or wrote last, now: a share of the worker's."""
        return 0

    @abstractmethod
    def open(self, group: str, tp: TopicPartition) -> Store:
        """The store of a group's partition, made if it is absent.

        Raises:
            StoreError: it cannot be opened.
        """

    @abstractmethod
    def set_aside(self, group: str, tp: TopicPartition) -> str:
        """Move a closed store that is no good out of the way; says where it is now. The next ``open`` makes a new one.

        Only the one set aside last is kept for each partition.
        """

    @abstractmethod
    def remove(self, group: str, tp: TopicPartition) -> None:
        """Delete a closed store, and what was set aside of it. An absent one is no error."""

    @abstractmethod
    def close(self) -> None:
        """Let others have the place. Every store must be closed before."""
