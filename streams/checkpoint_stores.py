"""Where checkpoints of sessions are kept: a broker (see ``broker_checkpoints.py``), a folder of JSON, or memory.

A session that runs on a broker needs none of these: each transaction commits its checkpoint. They are for looking at
it, and for contexts that somebody keeps by hand, as ondine's users do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import error as ZlibError  # noqa: N812 - an exception, whatever it is called there

from ..state.clock import Clock, SystemClock
from ..state.codec import encode, loads
from ..state.context import ExecutionContext, session_uuid
from ..state.errors import BadRowError, CheckpointError, ConfigError
from ..state.execution import ExecutionState
from ..state.files import sync_folder, write_whole
from .session_refs import session_of

log = logging.getLogger(__name__)

_FORMAT = "1.0"
"""Version of the file's outer object: ondine's, which reads what we write."""
_NAME = re.compile(r"checkpoint_(?P<id>[0-9a-fA-F-]{36})\.json(\.gz)?")
_MOST_BYTES = 256 << 20
"""Bytes of a checkpoint, unpacked, above which a file is taken for something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a list tells of one checkpoint. The first six are ondine's.

    Attributes:
        session_id: the session.
        checkpoint_path: where it is: a file, or the broker and the group.
        row_index: the position of the row done last.
        stage_index: the stage that runs; 0 for the first.
        timestamp: when it was written, in UTC; 1970 where nobody knows.
        size_bytes: what it takes there; 0 where nobody knows.
        session: how people name it: ``reviews`` or ``reviews.NAME``; "" where only the id is known.
        pipeline: the pipeline's name; "" where nobody knows.
        group: the consumer group; "" for a checkpoint that is no broker's session.
        state: what the session does; None for a checkpoint that is no broker's session.
        resumable: whether there is something to go on with: a checkpoint, rows, and whatever the rows lie in.
        progress: percent of the rows that are done. Of a session without an end: of those that are there now.
        rows: rows that are done, whatever became of them.
        total_rows: rows to do; 0 where that is unknown.
        failed_rows, skipped_rows: of the rows that are done.
        cost: money, exact.
        tokens: tokens.
        age: time since the last sign of life; None where nobody knows.
        workers: processes that serve it.
        is_being_removed: whether somebody began to remove it.
        problem: why something of it cannot be read; "" for nothing.
    """

    session_id: UUID
    checkpoint_path: str
    row_index: int = 0
    stage_index: int = 0
    timestamp: datetime
    size_bytes: int = 0
    session: str = ""
    pipeline: str = ""
    group: str = ""
    state: ExecutionState | None = None
    resumable: bool = False
    progress: float = 0.0
    rows: int = 0
    total_rows: int = 0
    failed_rows: int = 0
    skipped_rows: int = 0
    cost: Decimal = Decimal(0)
    tokens: int = 0
    age: timedelta | None = None
    workers: int = 0
    is_being_removed: bool = False
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON. Names and meanings are kept from release to release; fields may be added."""
        return {
            "session": self.session or None,
            "session_id": str(self.session_id),
            "group": self.group or None,
            "pipeline": self.pipeline or None,
            "state": None if self.state is None else self.state.value,
            "resumable": self.resumable,
            "progress": round(self.progress, 3),
            "rows": self.rows,
            "total_rows": self.total_rows,
            "failed_rows": self.failed_rows,
            "skipped_rows": self.skipped_rows,
            "cost": f"{self.cost:f}",
            "tokens": self.tokens,
            "at": None if self.age is None else self.timestamp.isoformat(timespec="milliseconds"),
            "age_seconds": None if self.age is None else round(self.age.total_seconds(), 3),
            "workers": self.workers,
            "being_removed": self.is_being_removed,
            "place": self.checkpoint_path,
            "problem": self.problem or None,
        }


class CheckpointStorage(ABC):
    """A place for the checkpoints of sessions: write a subclass for another one.

    The twins that end in ``_async`` serve programs with an event loop. By default they call the others in a thread.
    """

    @abstractmethod
    def save(self, session_id: UUID, data: dict[str, Any]) -> bool:
        """Keep a session's checkpoint in place of the one before. Once it returned, a crash does not lose it.

        Args:
            session_id: the session.
            data: what ``ExecutionContext.to_checkpoint()`` gave.

        Returns:
            True.

        Raises:
            CheckpointError: it cannot be written; the one before is as it was.
        """

    @abstractmethod
    def load(self, session_id: UUID) -> dict[str, Any] | None:
        """What :meth:`save` kept last; None where nothing is.

        Raises:
            CheckpointError: there is one, and it cannot be read.
        """

    @abstractmethod
    def list_checkpoints(self) -> list[CheckpointInfo]:
        """All of them, the newest first. One that cannot be read is left out, with a warning that names it."""

    @abstractmethod
    def delete(self, session_id: UUID) -> bool:
        """Remove a session's checkpoint; False where there is none."""

    @abstractmethod
    def exists(self, session_id: UUID) -> bool:
        """Whether there is a checkpoint of this session."""

    def find(self, session: UUID | str) -> UUID:
        """The id of a session: an id, its text, or a session's name.

        Raises:
            ConfigError: it is none of these, or no one session's.
        """
        return session if isinstance(session, UUID) else named_id(session)

    async def save_async(self, session_id: UUID, data: dict[str, Any]) -> bool:
        """:meth:`save` beside a running event loop."""
        return await asyncio.to_thread(self.save, session_id, data)

    async def load_async(self, session_id: UUID) -> dict[str, Any] | None:
        """:meth:`load` beside a running event loop."""
        return await asyncio.to_thread(self.load, session_id)

    async def list_checkpoints_async(self) -> list[CheckpointInfo]:
        """:meth:`list_checkpoints` beside a running event loop."""
        return await asyncio.to_thread(self.list_checkpoints)

    async def delete_async(self, session_id: UUID) -> bool:
        """:meth:`delete` beside a running event loop."""
        return await asyncio.to_thread(self.delete, session_id)

    async def exists_async(self, session_id: UUID) -> bool:
        """:meth:`exists` beside a running event loop."""
        return await asyncio.to_thread(self.exists, session_id)

    async def find_async(self, session: UUID | str) -> UUID:
        """:meth:`find` beside a running event loop."""
        return await asyncio.to_thread(self.find, session)


def named_id(session: Any) -> UUID:
    """The id that a session's name, or an id's text, stands for. Nobody is asked whether there is such a session.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(session, str):
        with contextlib.suppress(ValueError):
            return UUID(session)
        found = session_of(session) or session_of(f"rowmill.{session.removesuffix('.live')}")
        if found is not None:
            return session_uuid(found.group)
    raise ConfigError("session_id", session, "give the session's UUID, or its name: PIPELINE or PIPELINE.NAME")


def info_of(data: Mapping[str, Any], path: str, size: int, written_ms: int, now_ms: int) -> CheckpointInfo:
    """What a checkpoint tells of itself.

    Raises:
        CheckpointError: it is none.
    """
    context = ExecutionContext.from_checkpoint(data)
    progress = context.get_progress()
    return CheckpointInfo(
        session_id=context.session_id,
        checkpoint_path=path,
        row_index=context.last_processed_row,
        stage_index=context.current_stage_index,
        timestamp=datetime.fromtimestamp(written_ms / 1000, UTC),
        size_bytes=size,
        resumable=context.end_time is None and progress < 100,
        progress=progress,
        rows=context.completed_rows,
        total_rows=context.total_rows,
        failed_rows=context.failed_rows,
        skipped_rows=context.skipped_rows,
        cost=context.accumulated_cost,
        tokens=context.accumulated_tokens,
        age=timedelta(milliseconds=max(0, now_ms - written_ms)),
    )


def newest_first(infos: list[CheckpointInfo]) -> list[CheckpointInfo]:
    """In the order of lists."""
    return sorted(infos, key=lambda info: (-info.timestamp.timestamp(), info.session, str(info.session_id)))


def written(data: Any) -> bytes:
    """JSON that is to be kept.

    Raises:
        CheckpointError: there is something in it that JSON has no form for.
    """
    try:
        return encode(data)
    except BadRowError as error:
        raise CheckpointError(f"the checkpoint cannot be kept: {error} (look at its intermediate_data)") from None


class MemoryCheckpointStorage(CheckpointStorage):
    """Checkpoints that end with the process: for tests.

    Args:
        clock: for ages.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._kept: dict[UUID, tuple[bytes, int]] = {}

    def save(self, session_id: UUID, data: dict[str, Any]) -> bool:
        """Keep a copy."""
        self._kept[session_id] = written(data), self._clock.now_ms()
        return True

    def load(self, session_id: UUID) -> dict[str, Any] | None:
        """A copy of what was kept."""
        kept = self._kept.get(session_id)
        return None if kept is None else dict(loads(kept[0]))

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """All of them, the newest first."""
        now = self._clock.now_ms()
        return newest_first([info_of(loads(data), "memory", len(data), at, now) for data, at in self._kept.values()])

    def delete(self, session_id: UUID) -> bool:
        """Forget it."""
        return self._kept.pop(session_id, None) is not None

    def exists(self, session_id: UUID) -> bool:
        """Whether it was kept."""
        return session_id in self._kept


class FileCheckpointStorage(CheckpointStorage):
    """Checkpoints as JSON files of a folder, as ondine keeps them: ``checkpoint_<session id>.json``.

    Reads ondine's files, packed ones (``.json.gz``) too, and files that hold just the twelve keys; writes such as
    ondine reads. A file is replaced as a whole: a crash leaves the old one or the new one.

    Args:
        folder: made, for this user alone, when the first checkpoint is saved.
        clock: for ages.

    Raises:
        ConfigError: the folder is a file.
    """

    def __init__(self, folder: str | Path, *, clock: Clock | None = None) -> None:
        if not isinstance(folder, (str, Path)) or not str(folder):
            raise ConfigError("FileCheckpointStorage(folder=)", folder, "give a folder's path")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError("FileCheckpointStorage(folder=)", str(folder), "give a folder; this is a file")
        self._clock = clock or SystemClock()

    def save(self, session_id: UUID, data: dict[str, Any]) -> bool:
        """Write the file, and make it safe on disk."""
        now = datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC).isoformat()
        text = written({"version": _FORMAT, "session_id": str(session_id), "timestamp": now, "data": data})
        path = self._path(session_id)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, text, prefix=f".{path.name}.")
            sync_folder(path.parent)
            self._packed(session_id).unlink(missing_ok=True)  # an older one, which ondine would prefer
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error
        return True

    def load(self, session_id: UUID) -> dict[str, Any] | None:
        """What the session's file holds."""
        path = self._present(session_id)
        return None if path is None else _read(path, session_id)[0]

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """All files that can be read, the newest first; a warning names each of the others."""
        found = []
        for session_id in {each: None for each, _ in self._files()}:
            path = self._present(session_id)
            if path is None:
                continue  # somebody deleted it meanwhile
            try:
                data, at_ms = _read(path, session_id)
                found.append(info_of(data, str(path), path.stat().st_size, at_ms, self._clock.now_ms()))
            except CheckpointError as error:
                log.warning("%s", error)
            except FileNotFoundError:
                continue
        return newest_first(found)

    def delete(self, session_id: UUID) -> bool:
        """Delete the session's files."""
        deleted = False
        for path in (self._path(session_id), self._packed(session_id)):
            try:
                path.unlink()
                deleted = True
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CheckpointError(f"cannot delete the checkpoint {path}: {error.strerror or error}") from error
        return deleted

    def exists(self, session_id: UUID) -> bool:
        """Whether there is a file."""
        return self._present(session_id) is not None

    def _path(self, session_id: UUID) -> Path:
        return self.folder / f"checkpoint_{session_id}.json"

    def _packed(self, session_id: UUID) -> Path:
        return self.folder / f"checkpoint_{session_id}.json.gz"

    def _present(self, session_id: UUID) -> Path | None:
        """The session's file; the newer one where there are two."""
        ages = {}
        for path in (self._path(session_id), self._packed(session_id)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                ages[path] = path.stat().st_mtime_ns
        return max(ages, key=ages.__getitem__, default=None)

    def _files(self) -> Iterator[tuple[UUID, Path]]:
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            found = _NAME.fullmatch(path.name)
            if found is not None:
                with contextlib.suppress(ValueError):
                    yield UUID(found["id"]), path


def _read(path: Path, session_id: UUID) -> tuple[dict[str, Any], int]:
    """A file's checkpoint, and when it was written, in milliseconds since the epoch."""
    try:
        text = _unpacked(path)
        outer = _parsed(text)
        data = outer.get("data", outer) if isinstance(outer, dict) else outer
        if not isinstance(data, dict) or "session_id" not in data:
            raise CheckpointError("it holds no checkpoint, which is a JSON object with a session_id")  # noqa: TRY301
        if str(data["session_id"]).lower() != str(session_id):
            raise CheckpointError(f"it holds the checkpoint of session {data['session_id']}")  # noqa: TRY301
        ExecutionContext.from_checkpoint(data)
        return data, _moment(outer, path)
    except (OSError, EOFError, ZlibError, ValueError, RecursionError, CheckpointError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise CheckpointError(f"the checkpoint {path} cannot be read: {reason}; delete it, or put it right") from error


def _unpacked(path: Path) -> bytes:
    if path.suffix != ".gz":
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    else:
        with gzip.open(path, "rb") as packed:
            text = packed.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise CheckpointError(f"it has more than {_MOST_BYTES:,} bytes")
    return text


def _parsed(text: bytes) -> Any:
    try:
        return loads(text)
    except ValueError:
        return json.loads(text)  # Python's own writes NaN, which is no JSON: ondine's files may have it


def _moment(outer: Mapping[str, Any], path: Path) -> int:
    """When it was written, as it says; else the file's own time."""
    try:
        at_ms = round(datetime.fromisoformat(outer["timestamp"]).timestamp() * 1000)
        datetime.fromtimestamp(at_ms / 1000, UTC)  # which has no name for all of them
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return path.stat().st_mtime_ns // 1_000_000
    return at_ms
