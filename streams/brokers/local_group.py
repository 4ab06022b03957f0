"""Who serves a group on the embedded broker: an operating system's lock on a file, freed by a kill as well.

POSIX record locks (``lockf``) rather than ``flock``: a ``flock`` is shared with forked children, so that a
process pool that outlives its killed worker would keep the group busy. Record locks belong to the process; two
members inside one process are told apart by a list of our own, which also keeps us from opening a file that we
hold locked: closing any handle of it would free the lock.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple
from urllib.parse import quote

from ...state import codec
from ..errors import BrokerUnreachableError, GroupBusyError

_TRIES = 10
_PAUSE_SECONDS = 0.005
_OWNER_BYTES = 1 << 16


class Owner(NamedTuple):
    """Who serves a group.

    Attributes:
        group: which one.
        pid: the process.
        topics: what it reads, all partitions of it.
    """

    group: str
    pid: int
    topics: tuple[str, ...]


_held: dict[tuple[int, Path], Owner] = {}
"""Groups served by members in this process. By process id too: a forked child inherits the list, not the locks."""

_guard = Lock()
"""Over every touch of a lock file in this process, for the reason above."""


class GroupLock:
    """The exclusive right to serve one group.

    Args:
        folder: the broker's.
        group: its name.
        topics: what its member reads, for those who ask.
    """

    def __init__(self, folder: Path, group: str, topics: Collection[str] = ()) -> None:
        self._group = group
        self._topics = tuple(sorted(topics))
        self._file = _file_of(folder, group)
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take it, or say who has it.

        Raises:
            GroupBusyError: another member, here or in another process, serves the group.
        """
        with _guard:
            if (os.getpid(), self._file) in _held:
                raise _busy(self._group, f"this process ({os.getpid()})")
            handle = _open(self._file)
            if not _lock_patiently(handle):
                owner = _owner(handle).get("pid", "unknown")
                os.close(handle)
                raise _busy(self._group, f"process {owner}")
            owned = Owner(self._group, os.getpid(), self._topics)
            os.ftruncate(handle, 0)
            os.pwrite(handle, codec.dumps(owned._asdict()), 0)
            _held[os.getpid(), self._file] = owned
            self._handle = handle

    def release(self) -> None:
        """Give it up; nothing happens where it is not held.

        The file stays: removing it would let one process lock the name's old file and another its new one.
        """
        with _guard:
            handle, self._handle = self._handle, None
            if handle is not None and _held.pop((os.getpid(), self._file), None) is not None:
                os.ftruncate(handle, 0)
                os.close(handle)


def served_groups(folder: Path) -> set[str]:
    """The groups that have a member in some process of this machine."""
    with _guard:
        owners = [_served_by(file) for file in (folder / "groups").glob("*.lock")]
    return {owner.group for owner in owners if owner is not None}


def owner_of(folder: Path, group: str) -> Owner | None:
    """Who serves a group, in some process of this machine; None if nobody does."""
    file = _file_of(folder, group)
    with _guard:
        return _served_by(file) if file.exists() else None


def _served_by(file: Path) -> Owner | None:
    held_here = _held.get((os.getpid(), file))
    if held_here is not None:
        return held_here
    handle = _open(file)
    try:
        if _lock(handle):
            return None
        owner = _owner(handle)
        return Owner(owner["group"], owner.get("pid", 0), tuple(owner.get("topics", ()))) if "group" in owner else None
    finally:
        os.close(handle)


def _file_of(folder: Path, group: str) -> Path:
    """A name for people and, since names may differ by case or be long, a digest that makes it unique."""
    digest = sha256(group.encode()).hexdigest()[:16]
    return folder / "groups" / f"{quote(group, safe='')[:80]}-{digest}.lock"


def _open(file: Path) -> int:
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise BrokerUnreachableError(f"cannot open {file}: {error.strerror}; it must be yours to write") from error


def _lock(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two depends on the system
        return False
    return True


def _lock_patiently(handle: int) -> bool:
    """The same, in spite of those who only ask whether somebody has it: they hold it themselves for a moment."""
    for _ in range(_TRIES):
        if _lock(handle):
            return True
        Event().wait(_PAUSE_SECONDS)
    return False


def _owner(handle: int) -> dict[str, Any]:
    try:
        owner = codec.loads(os.pread(handle, _OWNER_BYTES, 0))
    except ValueError:  # between taking the lock and writing its name
        return {}
    return owner if isinstance(owner, dict) else {}


def _busy(group: str, who: str) -> GroupBusyError:
    return GroupBusyError(
        f"group {group!r} is served by {who}; stop that worker first, or run more than one worker on Kafka with "
        "kafka://HOST:PORT (the embedded broker lets one worker serve a group)"
    )
