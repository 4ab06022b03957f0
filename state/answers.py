"""The port of caches: answers that were paid for, kept on this machine so that nobody pays for them twice.

A cache is no table (law 5): it is written as soon as an answer is there and not with the transaction, each worker has
its own folder, and everything here is best effort. So no method raises for trouble of its own. What cannot be read is
absent, what cannot be written is not kept; both are counted, and logged once. ``state/rocksdb.py`` and
:class:`MemoryAnswers` implement the port, and one contract suite holds them to it.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections import OrderedDict

_EXPIRES = struct.Struct(">Q")
_NEVER = 0
_ENTRY_BYTES = 200
"""What an entry of a Python dictionary takes besides its bytes, about."""


class Answers(ABC):
    """The answers of one stage. The oldest ones go when there are more than its place has room for.

    All methods are called from one thread and are quick enough for the event loop. A key is some 20 bytes.

    Attributes:
        damaged: how often something was found that cannot be believed; it is thrown away.
        failed: how often something could not be read or written, on a full disk for instance.
    """

    damaged: int = 0
    failed: int = 0

    @abstractmethod
    def get(self, key: bytes, now_ms: int) -> bytes | None:
        """What was put last under the key; None where nothing was, where it went, or where it has expired.

        Args:
            key: as it was put.
            now_ms: the time, in milliseconds since the epoch; an entry is gone from its ``expires_ms`` on.
        """

    @abstractmethod
    def put(self, key: bytes, value: bytes, expires_ms: int | None) -> None:
        """Keep a value, in place of the one before. It survives ``kill -9`` from the moment that this returned.

        Args:
            key: any bytes.
            value: any bytes, far fewer than the place has room for.
            expires_ms: milliseconds since the epoch, above 0; None: it does not expire.
        """

    @abstractmethod
    def read_mark(self, name: bytes) -> bytes | None:
        """What :meth:`write_mark` kept in this very place: never what another worker's folder has."""

    @abstractmethod
    def write_mark(self, name: bytes, value: bytes) -> None:
        """Keep a word about the answers, such as how far they were read; it goes where they go, or earlier."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the place. Twice is fine; afterwards nothing is found and nothing is kept."""


class AnswerStores(ABC):
    """The answers of one worker's stages."""

    @abstractmethod
    def open(self, name: str, max_bytes: int) -> Answers:
        """The answers of a stage: the same object each time until ``close``.

        Args:
            name: the stage's name. Stages of this name in other sessions and pipelines share the place.
            max_bytes: the room for it, from 1 MiB; the first ``open`` of a name decides.
        """

    def refresh(self) -> None:  # noqa: B027 - where answers have one place only, there is nothing to do
        """Look again for answers that other workers of this machine have left: call it when partitions arrive.

        Takes some 15 ms for each stage and worker that wrote since, and nothing for the others.
        """

    @abstractmethod
    def close(self) -> None:
        """Close all that are open. Twice is fine."""


def seal(value: bytes, expires_ms: int | None) -> bytes:
    """A value with its expiry, as it is kept."""
    return _EXPIRES.pack(expires_ms or _NEVER) + value


def unseal(stored: bytes) -> tuple[bytes, int | None]:
    """The counterpart of :func:`seal`.

    Raises:
        ValueError: nobody sealed this.
    """
    if len(stored) < _EXPIRES.size:
        raise ValueError(f"{len(stored)} bytes are no sealed answer")
    expires_ms: int = _EXPIRES.unpack_from(stored)[0]
    return stored[_EXPIRES.size :], expires_ms or None


class MemoryAnswers(Answers):
    """Answers that live and die with the process: for tests, notebooks and chains that run without a worker.

    Args:
        max_bytes: the room for keys and values, about 200 bytes more for each counted in.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, tuple[bytes, int | None]] = OrderedDict()
        self._marks: dict[bytes, bytes] = {}
        self._closed = False

    def get(self, key: bytes, now_ms: int) -> bytes | None:
        """What was put last under the key, unless it has expired or had to make room."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, expires_ms = entry
        if expires_ms is not None and expires_ms <= now_ms:
            self._remove(key)
            return None
        return value

    def put(self, key: bytes, value: bytes, expires_ms: int | None) -> None:
        """Keep a value; those that were put first make room."""
        if self._closed:
            return
        self._remove(key)
        self._entries[key] = value, expires_ms
        self._bytes += _size(key, value)
        while self._bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def read_mark(self, name: bytes) -> bytes | None:
        """What was marked."""
        return self._marks.get(name)

    def write_mark(self, name: bytes, value: bytes) -> None:
        """Mark it."""
        if not self._closed:
            self._marks[name] = value

    def close(self) -> None:
        """Forget everything."""
        self._closed = True
        self._entries.clear()
        self._marks.clear()
        self._bytes = 0

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= _size(key, entry[0])


def _size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + _ENTRY_BYTES


class MemoryAnswerStores(AnswerStores):
    """Answers in memory, forgotten at ``close``."""

    def __init__(self) -> None:
        self._open: dict[str, MemoryAnswers] = {}

    def open(self, name: str, max_bytes: int) -> Answers:
        """The answers of a stage, made when they are first asked for."""
        answers = self._open.get(name)
        if answers is None:
            answers = self._open[name] = MemoryAnswers(max_bytes)
        return answers

    def close(self) -> None:
        """Forget everything."""
        for answers in self._open.values():
            answers.close()
        self._open.clear()
