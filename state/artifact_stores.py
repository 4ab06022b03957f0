"""Where artifacts lie: in a folder, or in memory. The port, and what artifacts are, is in ``artifacts.py``."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from .artifacts import MAX_ARTIFACT_BYTES, SHARED_SCOPE, ArtifactRef, ArtifactStore, ArtifactStoreError
from .clock import Clock, SystemClock
from .errors import ConfigError
from .files import sync_folder, write_whole
from .model import Row

_PART_PREFIX = ".part-"
_ASIDE_PREFIX = ".swept-"


class MemoryArtifacts(ArtifactStore):
    """Artifacts that end with the process: for tests and for trying things out."""

    def __init__(
        self, scope: str = SHARED_SCOPE, max_bytes: int = MAX_ARTIFACT_BYTES, clock: Clock | None = None
    ) -> None:
        super().__init__(scope, max_bytes)
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, str], tuple[bytes, int]] = {}

    def __str__(self) -> str:
        return "this process' memory"

    def within(self, scope: str) -> MemoryArtifacts:
        """The same memory, putting into another scope."""
        other = MemoryArtifacts(scope, self.max_bytes, self._clock)
        other._lock, other._kept = self._lock, self._kept
        return other

    def exists(self, reference: ArtifactRef | Row) -> bool:
        """Whether it is there."""
        return self._read(ArtifactRef.from_row(reference)) is not None

    def delete(self, reference: ArtifactRef | Row) -> bool:
        """Take it away."""
        reference = ArtifactRef.from_row(reference)
        with self._lock:
            return self._kept.pop((reference.store, reference.digest), None) is not None

    def sweep(self, older_than: float, keep: Iterable[ArtifactRef | Row] = ()) -> int:
        """Take away what is old."""
        spared, before = _spared(keep), _moment_ms(self._clock, older_than)
        with self._lock:
            old = [place for place, (_, at) in self._kept.items() if at < before and place not in spared]
            for place in old:
                del self._kept[place]
        return len(old)

    def clear(self) -> int:
        """Take away the scope's."""
        self._check_scoped()
        with self._lock:
            own = [place for place in self._kept if place[0] == self.scope]
            for place in own:
                del self._kept[place]
        return len(own)

    def _write(self, reference: ArtifactRef, data: bytes) -> None:
        with self._lock:
            self._kept[reference.store, reference.digest] = data, self._clock.now_ms()

    def _read(self, reference: ArtifactRef) -> bytes | None:
        with self._lock:
            return self._kept.get((reference.store, reference.digest), (None, 0))[0]


class FolderArtifacts(ArtifactStore):
    """Artifacts as files of a folder: ``<root>/<scope>/<first two digits>/<digest>``, folders of mode 0700, files 0600.

    Workers on several machines need a folder that all of them see (a network file system); otherwise a reference
    leads nowhere on the others. Nothing in a row chooses a path: digests and scopes are checked, names are not used.

    Args:
        root: the folder; made when it is absent.
        scope: see :class:`ArtifactStore`.
        max_bytes: of one artifact.
        clock: for the ages of files.

    Raises:
        ConfigError: an option is wrong, or the root is no folder.
    """

    def __init__(
        self,
        root: str | Path,
        scope: str = SHARED_SCOPE,
        max_bytes: int = MAX_ARTIFACT_BYTES,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(scope, max_bytes)
        self.root = Path(root).absolute()
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError("artifacts", str(root), "give a folder; this is a file")
        self._clock = clock or SystemClock()

    def __str__(self) -> str:
        return str(self.root)

    def within(self, scope: str) -> FolderArtifacts:
        """The same folder, putting into another scope."""
        return FolderArtifacts(self.root, scope, self.max_bytes, self._clock)

    def exists(self, reference: ArtifactRef | Row) -> bool:
        """Whether its file is there."""
        return self._path(ArtifactRef.from_row(reference)).is_file()

    def delete(self, reference: ArtifactRef | Row) -> bool:
        """Delete its file."""
        path = self._path(ArtifactRef.from_row(reference))
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._fail("delete", path, error)
        return True

    def sweep(self, older_than: float, keep: Iterable[ArtifactRef | Row] = ()) -> int:
        """Delete files that were last put longer ago, and halves of files that a crash left behind."""
        spared, before = _spared(keep), _moment_ms(self._clock, older_than)
        swept = 0
        for path in self._files():
            scope = path.parent.parent.name.partition("%")[0]
            if (scope, "sha256:" + path.name.removeprefix(_ASIDE_PREFIX)) in spared:
                continue
            try:
                swept += self._sweep_any(path, before)
            except FileNotFoundError:
                continue  # somebody else's sweep was quicker
            except OSError as error:
                self._fail("sweep", path, error)
        return swept

    def clear(self) -> int:
        """Delete the scope's folder."""
        self._check_scoped()
        cleared = 0
        folder = self.root / _folder_name(self.scope)
        for path in sorted(folder.rglob("*"), reverse=True):  # what is inside of a folder before the folder
            try:
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()
                    cleared += not path.name.startswith(".")
            except OSError as error:
                self._fail("clear", path, error)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        return cleared

    def _path(self, reference: ArtifactRef) -> Path:
        digits = reference.digest.removeprefix("sha256:")
        return self.root / _folder_name(reference.store) / digits[:2] / digits

    def _write(self, reference: ArtifactRef, data: bytes) -> None:
        path = self._path(reference)
        try:
            self._write_or_touch(path, data)
        except FileNotFoundError:  # swept between two steps; now it is young
            self._write_again(path, data)
        except OSError as error:
            self._fail(f"write {len(data):,} bytes to", path, error)

    def _write_again(self, path: Path, data: bytes) -> None:
        try:
            self._write_or_touch(path, data)
        except OSError as error:
            self._fail(f"write {len(data):,} bytes to", path, error)

    def _write_or_touch(self, path: Path, data: bytes) -> None:
        _make_folder(path.parent)
        if not _is_written(path, data):
            write_whole(path, data, prefix=_PART_PREFIX)
        now = self._clock.now_ms() * 1_000_000
        os.utime(path, ns=(now, now))
        sync_folder(path.parent)  # also where the file was there: whoever put it may have died before this

    def _read(self, reference: ArtifactRef) -> bytes | None:
        path = self._path(reference)
        try:
            with path.open("rb") as file:
                return file.read(reference.size + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._fail("read", path, error)

    def _files(self) -> list[Path]:
        return [path for path in self.root.glob("*/??/*") if path.is_file() and not path.is_symlink()]

    def _sweep_any(self, path: Path, before_ms: int) -> bool:
        if path.name.startswith(_ASIDE_PREFIX):
            return self._sweep_aside(path, before_ms)
        if not path.name.startswith(_PART_PREFIX):
            return self._sweep_file(path, before_ms)
        if _modified_ms(path) < before_ms:
            path.unlink()
        return False

    def _sweep_file(self, path: Path, before_ms: int) -> bool:
        """Delete an old file, unless it is put again at this very moment.

        Looking at the age and deleting are two steps, and a ``put`` in between would lose its artifact. So the file is
        first moved aside: a ``put`` that comes later does not find it and writes it, one that came before has made it
        young, which is looked at once more.
        """
        if _modified_ms(path) >= before_ms:
            return False
        aside = path.with_name(_ASIDE_PREFIX + path.name)
        path.replace(aside)
        return self._sweep_aside(aside, before_ms)

    def _sweep_aside(self, aside: Path, before_ms: int) -> bool:
        """Delete what was moved aside, now or by a sweep that died, or move it back."""
        if _modified_ms(aside) >= before_ms:
            aside.replace(aside.with_name(aside.name.removeprefix(_ASIDE_PREFIX)))
            return False
        aside.unlink()
        return True

    def _fail(self, action: str, path: Path, error: OSError) -> NoReturn:
        raise ArtifactStoreError(f"cannot {action} the artifact {path}: {error.strerror or error}") from error


def open_artifacts(place: str | Path, *, scope: str = SHARED_SCOPE) -> ArtifactStore:
    """The artifacts of a place, for reading references outside of handlers, or as a pipeline's ``artifacts=``.

    Args:
        place: a folder, or its URL (``file:///…``).
        scope: where to put; references are read whatever their scope.

    Raises:
        ConfigError: it is no folder, or a kind of place that rowmill does not know.
    """
    if isinstance(place, Path):
        return FolderArtifacts(place, scope)
    if not isinstance(place, str) or not place:
        raise ConfigError("artifacts", place, "give a folder, such as './artifacts', or an ArtifactStore")
    if "://" not in place:
        return FolderArtifacts(place, scope)
    url = urlsplit(place)
    if url.scheme != "file" or url.netloc not in {"", "localhost"}:
        remedy = "give a folder or a file:/// URL; for other places write a subclass of ArtifactStore"
        raise ConfigError("artifacts", place, remedy)
    return FolderArtifacts(unquote(url.path), scope)


# --- files -----------------------------------------------------------------------------------------------------


def _folder_name(scope: str) -> str:
    """A scope's folder: the scope, and something to tell it from others where a file system takes A for a."""
    if scope == scope.lower():
        return scope
    return f"{scope}%{sha256(scope.encode()).hexdigest()[:8]}"


def _make_folder(folder: Path) -> None:
    """``mkdir -p`` with mode 0700 for each new one, safe on disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder.parent)


def _is_written(path: Path, data: bytes) -> bool:
    """Whether the file is there and undamaged. Reading it costs less than writing it again."""
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except FileNotFoundError:
        return False


def _modified_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000


def _moment_ms(clock: Clock, older_than: float) -> int:
    if isinstance(older_than, bool) or not isinstance(older_than, (int, float)) or not 0 <= older_than < float("inf"):
        raise ConfigError("sweep(older_than=)", older_than, "give seconds from 0")
    return clock.now_ms() - int(older_than * 1000)


def _spared(keep: Iterable[ArtifactRef | Row]) -> set[tuple[str, str]]:
    return {(reference.store, reference.digest) for reference in map(ArtifactRef.from_row, keep)}
