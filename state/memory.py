"""Stores that live in this process: for tests, for the simulation, and for pipelines without tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Lock

from .model import TopicPartition
from .store import Change, Store, StoreError, Stores


class MemoryStore(Store):
    """A dictionary, sorted when it is scanned.

    Args:
        name: what errors call it.
        content: what it holds, if it is to outlive this object.
    """

    def __init__(self, name: str = "memory", content: dict[bytes, bytes] | None = None) -> None:
        self._name = name
        self._content = {} if content is None else content
        self._guard = Lock()  # so that a scan in another thread sees a batch whole
        self.closed = False

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        self._check()
        return self._content.get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The entries below a prefix as they are now, ascending."""
        self._check()
        with self._guard:
            found = [entry for entry in self._content.items() if entry[0].startswith(prefix)]
        found.sort()
        return iter(found)

    def write(self, changes: Iterable[Change]) -> None:
        """Apply all of these or none."""
        self._check()
        final = dict(changes)  # whole before any of it is applied: making the changes may fail half-way
        with self._guard:
            for key, value in final.items():
                if value is None:
                    self._content.pop(key, None)
                else:
                    self._content[key] = value

    def close(self) -> None:
        """Refuse further calls; the content stays with its ``MemoryStores``."""
        self.closed = True

    def _check(self) -> None:
        if self.closed:
            raise StoreError(f"the store {self._name} is closed", damaged=False)


class MemoryStores(Stores):
    """Content lives as long as this object, through ``close`` and ``open`` as well.

    Args:
        recent_bytes: see the port; there is no gain in it here, but tests want what users have.
    """

    def __init__(self, recent_bytes: int = 2_000) -> None:
        self._recent_bytes = recent_bytes
        self._contents: dict[tuple[str, TopicPartition], dict[bytes, bytes]] = {}
        self._aside: dict[tuple[str, TopicPartition], dict[bytes, bytes]] = {}
        self._stores: dict[tuple[str, TopicPartition], MemoryStore] = {}

    @property
    def recent_bytes(self) -> int:
        """As given."""
        return self._recent_bytes

    def open(self, group: str, tp: TopicPartition) -> Store:
        """The store of a group's partition.

        Raises:
            StoreError: it is open already.
        """
        name = self._closed(group, tp)
        store = self._stores[group, tp] = MemoryStore(name, self._contents.setdefault((group, tp), {}))
        return store

    def set_aside(self, group: str, tp: TopicPartition) -> str:
        """Move its content out of the way; says where to.

        Raises:
            StoreError: it is still open.
        """
        name = self._closed(group, tp)
        self._aside[group, tp] = self._contents.pop((group, tp), {})
        return f"{name}.aside"

    def remove(self, group: str, tp: TopicPartition) -> None:
        """Forget its content, and what was set aside.

        Raises:
            StoreError: it is still open.
        """
        self._closed(group, tp)
        self._contents.pop((group, tp), None)
        self._aside.pop((group, tp), None)

    def close(self) -> None:
        """Close what is still open."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def _closed(self, group: str, tp: TopicPartition) -> str:
        name = f"memory:{group}/{tp}"
        store = self._stores.get((group, tp))
        if store is not None and not store.closed:
            raise StoreError(f"the store {name} is open; close it first", damaged=False)
        return name
