"""Stores on this machine's disk: the one file that knows rocksdict, and raw mode is the only one it uses.

What a folder looks like, and what each part is for::

    <state_dir>/worker-0.lock                           held by the worker that has the slot
    <state_dir>/worker-0/<group>/<topic>/<partition>/   one RocksDB
        ROWMILL                                         our mark: the version of the format, and whose store it is
    <state_dir>/worker-0/<group>/<topic>/<partition>.aside/

The mark is a file and no key: it is read before RocksDB touches anything. Merely opening a store of another program
or of a newer rowmill replays its log, rewrites its options and lets rocksdict overwrite its settings, all before a
key could be looked at. It also leaves users every key there is, at no cost to any of them.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakSet

from . import codec
from .errors import ConfigError
from .model import TopicPartition
from .store import Change, Store, StoreError, Stores

if TYPE_CHECKING:
    from rocksdict import Cache, Options, Rdict, RdictIter, WriteBufferManager

FORMAT = 1
"""Version of a store's layout on disk. Raise it when an older rowmill must not read what this one writes."""

_MARK = "ROWMILL"
_FIRST_CHUNK = 100
_CHUNK = 1000
_CHUNK_BYTES = 1 << 20
_MIB = 1 << 20


class RocksStore(Store):
    """One RocksDB. Made by :meth:`RocksStores.open`.

    Args:
        folder: where it is, for errors.
        db: the open database, in raw mode.
    """

    def __init__(self, folder: Path, db: Rdict) -> None:
        self._folder = folder
        self._db = db
        # Over iterators and close: a live iterator keeps RocksDB's lock on the folder after the database is closed.
        self._guard = Lock()
        self._views: WeakSet[_View] = WeakSet()
        self.closed = False

    def get(self, key: bytes) -> bytes | None:
        """The value, or None.

        Raises:
            StoreError: it is closed, or it cannot be read.
        """
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:
            raise self._failure("read", error) from error
        return value

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Every entry below a prefix as it is now, ascending.

        The first entries are read here, so that a short scan holds nothing from the start. A longer one keeps
        RocksDB's iterator until it ends, is dropped, or the store is closed. (No snapshot: in rocksdict 0.3.29 an
        iterator made from a Snapshot shows what was written after it.)

        Raises:
            StoreError: it is closed, or it cannot be read; from the iterator as well.
        """
        view = _View()
        with self._guard:
            self._check()
            self._views.add(view)
            try:
                view.cursor = self._db.iter()
                view.cursor.seek(prefix)
            except Exception as error:
                raise self._failure("read", error) from error
        entries, more = self._read(view, prefix, _FIRST_CHUNK)
        return self._rest(view, prefix, entries) if more else iter(entries)

    def write(self, changes: Iterable[Change]) -> None:
        """Apply all of these or none, in one batch. A kill of the process loses none of it, a power cut may.

        Raises:
            StoreError: it is closed, or it cannot be written.
        """
        from rocksdict import WriteBatch

        batch = WriteBatch(raw_mode=True)
        for key, value in changes:
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        try:
            self._db.write(batch)
        except Exception as error:
            raise self._failure("written", error) from error

    def close(self) -> None:
        """Let go of the folder, also where scans were left half-way: those raise StoreError when they go on."""
        with self._guard:
            if self.closed:
                return
            self.closed = True
            for view in list(self._views):
                view.cursor = None
            # The flush on closing may fail, on a full disk for instance. The write-ahead log still has all of it, and
            # the folder is free: rocksdict closes after a failed flush too.
            with suppress(Exception):
                self._db.close()

    def _rest(self, view: _View, prefix: bytes, entries: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        more = True
        while more:
            yield from entries
            entries, more = self._read(view, prefix, _CHUNK)
        yield from entries

    def _read(self, view: _View, prefix: bytes, limit: int) -> tuple[list[tuple[bytes, bytes]], bool]:
        """The next entries, and whether there are more; if not, the cursor is gone."""
        with self._guard:
            self._check()
            cursor = view.cursor
            assert cursor is not None  # noqa: S101 - only `close` takes it away
            entries: list[tuple[bytes, bytes]] = []
            size = 0
            more = False
            try:
                # No upper bound in the iterator's options: rocksdict 0.3.29 does not keep its bytes alive, and a scan
                # would end early where they are overwritten.
                while cursor.valid() and (key := cursor.key()).startswith(prefix):
                    if len(entries) == limit or size >= _CHUNK_BYTES:
                        more = True
                        break
                    value = cursor.value()
                    entries.append((key, value))
                    size += len(key) + len(value)
                    cursor.next()
                cursor.status()  # an iterator that meets a damaged block just ends: only this tells
            except Exception as error:
                more = False
                raise self._failure("read", error) from error
            finally:
                if not more:
                    view.cursor = None
                del cursor  # an error's traceback keeps this frame, and with the iterator the folder's lock
        return entries, more

    def _check(self) -> None:
        if self.closed:
            raise StoreError(f"the store {self._folder} is closed", damaged=False)

    def _failure(self, what: str, error: Exception) -> StoreError:
        # Calls that meet a close half-way in another thread fail in ways of their own.
        self._check()
        return _failure(self._folder, what, error)


class _View:
    """A scan's iterator, where the store can reach it: it goes with the scan or with ``close``, whichever is first."""

    __slots__ = ("__weakref__", "cursor")

    def __init__(self) -> None:
        self.cursor: RdictIter | None = None


class RocksStores(Stores):
    """The stores of one worker, in the first free slot below a folder that workers of one machine may share.

    Nothing is touched before the first ``open``.

    Args:
        root: the folder, made when absent.
        cache_bytes: memory for blocks and not yet flushed writes of all stores together; about 1 MiB per store comes
            on top.

    Raises:
        ConfigError: ``cache_bytes`` is too small.
    """

    def __init__(self, root: Path, *, cache_bytes: int = 64 * _MIB) -> None:
        if cache_bytes < 8 * _MIB:
            raise ConfigError("table_cache_bytes", cache_bytes, f"give at least {8 * _MIB} (8 MiB)")
        self._root = root.absolute()
        self._cache_bytes = cache_bytes
        self._memory: tuple[Cache, WriteBufferManager] | None = None
        self._slot: _Slot | None = None
        self._stores: dict[Path, RocksStore] = {}
        self._guard = Lock()

    def open(self, group: str, tp: TopicPartition) -> Store:
        """The store of a group's partition, made if it is absent.

        Holds the interpreter while RocksDB replays its log: a thread does not help (rocksdict).

        Raises:
            ConfigError: the root cannot be used.
            StoreError: ``damaged`` when what is there is no store of ours, a newer one, or one that RocksDB refuses;
                otherwise it is open elsewhere, or the disk is full or not ours to write.
        """
        with self._guard:
            folder = self._closed(group, tp)
            try:
                _make_folder(folder)
                _check_mark(folder, group, tp)
            except OSError as error:
                raise _failure(folder, "opened", error) from error
            store = self._stores[folder] = RocksStore(folder, self._open(folder))
            return store

    def set_aside(self, group: str, tp: TopicPartition) -> str:
        """Rename a closed store's folder; says to what. An absent one is no error.

        Raises:
            ConfigError: the root cannot be used.
            StoreError: it is open, or cannot be renamed.
        """
        with self._guard:
            return str(self._move(self._closed(group, tp)))

    def remove(self, group: str, tp: TopicPartition) -> None:
        """Delete a closed store, and what was set aside of it. An absent one is no error.

        Raises:
            ConfigError: the root cannot be used.
            StoreError: it is open, or cannot be deleted.
        """
        with self._guard:
            # Moved first: a kill half-way must not leave half a store where the next open looks.
            aside = self._move(self._closed(group, tp))
            try:
                _delete(aside)
                for folder in itertools.islice(aside.parents, 2):  # sessions come and go, their folders too
                    if folder.is_dir() and not any(folder.iterdir()):
                        folder.rmdir()
            except OSError as error:
                raise _failure(aside, "deleted", error) from error

    def close(self) -> None:
        """Close what is still open, and free the slot. Twice is fine."""
        with self._guard:
            for store in self._stores.values():
                store.close()
            self._stores.clear()
            slot, self._slot, self._memory = self._slot, None, None
            if slot is not None:
                slot.release()

    def _closed(self, group: str, tp: TopicPartition) -> Path:
        """The folder of a store that is not open; takes the slot when there is none yet."""
        if self._slot is None:
            self._slot = _Slot.take(self._root)
        folder = self._slot.folder / _folder_name(group) / _folder_name(tp.topic) / str(int(tp.partition))
        store = self._stores.get(folder)
        if store is not None and not store.closed:
            raise StoreError(f"the store {folder} is open; close it first", damaged=False)
        self._stores.pop(folder, None)
        return folder

    def _open(self, folder: Path) -> Rdict:
        from rocksdict import Cache, Rdict, WriteBufferManager

        if self._memory is None:
            cache = Cache(self._cache_bytes)
            # Unflushed writes are charged to the cache, so that one figure bounds both. No stalls: they would be
            # waited out with the interpreter held.
            buffers = WriteBufferManager.new_write_buffer_manager_with_cache(self._cache_bytes // 2, False, cache)
            self._memory = cache, buffers
        options = _options(*self._memory)
        try:
            # Named, although there is no other family: left out, rocksdict takes its settings from the last run's
            # file, with a block cache of its own for each store.
            return Rdict(str(folder), options, {"default": options})
        except Exception as error:
            raise _failure(folder, "opened", error) from error

    def _move(self, folder: Path) -> Path:
        aside = folder.with_name(f"{folder.name}.aside")
        try:
            if folder.exists():
                _delete(aside)
                folder.rename(aside)
        except OSError as error:
            raise _failure(folder, "set aside", error) from error
        return aside


def forget_group(root: Path, group: str) -> None:
    """Delete every store of a group that is over, whichever worker of this machine had it. None is no error.

    Moved first, as in ``remove``: a kill half-way leaves nothing where an open looks. No worker may serve the group.

    Raises:
        StoreError: one cannot be deleted.
    """
    for slot in root.glob("worker-*/"):
        folder = slot / _folder_name(group)
        gone = folder.with_name(f"{folder.name[:200]}%gone")
        try:
            _delete(gone)
            if folder.exists():
                folder.rename(gone)
                _delete(gone)
        except OSError as error:
            raise _failure(folder, "deleted", error) from error


def _options(cache: Cache, buffers: WriteBufferManager) -> Options:
    """Small tables, many of them, in a process that has other things to do."""
    from rocksdict import BlockBasedOptions, DBCompressionType, Options

    blocks = BlockBasedOptions()
    blocks.set_block_cache(cache)
    blocks.set_bloom_filter(10, False)
    blocks.set_cache_index_and_filter_blocks(True)
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(True)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(blocks)
    options.set_write_buffer_manager(buffers)
    options.set_write_buffer_size(8 * _MIB)
    options.set_arena_block_size(64 << 10)  # the least that an almost empty store costs
    # A file's filter and index are one block each, 1 MiB and more for RocksDB's usual 64 MiB: as large as a shard of
    # our cache, so that each get read them anew (10,000 gets/s of 1M entries, and 150,000 so).
    options.set_target_file_size_base(8 * _MIB)
    options.set_compression_type(DBCompressionType.lz4())
    options.set_max_open_files(64)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(_MIB)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    return options


def _check_mark(folder: Path, group: str, tp: TopicPartition) -> None:
    """Refuse what is no store of ours; mark an empty folder as one."""
    file = folder / _MARK
    try:
        mark = codec.loads(file.read_bytes())
        version = mark["format"]
        newer = version > FORMAT
    except FileNotFoundError:
        _write_mark(folder, group, tp)
        return
    except (ValueError, TypeError, LookupError) as error:
        raise StoreError(f"the store {folder} has an unreadable mark, {_MARK}: {error}", damaged=True) from None
    if newer:
        raise StoreError(
            f"the store {folder} has format {version}, made by a newer rowmill; this one knows format {FORMAT} and "
            "older: run the newer one, or let the store be restored",
            damaged=True,
        )


def _write_mark(folder: Path, group: str, tp: TopicPartition) -> None:
    fresh = folder / f"{_MARK}.new"
    found = sorted(path.name for path in folder.iterdir() if path != fresh)
    if found:
        what = "a RocksDB of another program" if "CURRENT" in found else "something else"
        raise StoreError(
            f"the store {folder} is no store of rowmill: it holds {what} ({', '.join(found[:5])})", damaged=True
        )
    # Whose it is serves people: a folder's name may be a digest. Renamed when it is whole: a kill must not leave a
    # mark that cannot be read.
    names = [name.encode("utf-8", "backslashreplace").decode() for name in (group, tp.topic)]
    fresh.write_bytes(codec.dumps({"format": FORMAT, "group": names[0], "topic": names[1], "partition": tp.partition}))
    fresh.replace(folder / _MARK)


_DAMAGE = {"Invalid argument", "Not implemented", "NotFound"}
"""What RocksDB's texts begin with when another attempt will not help."""

_LOST = ("Corruption", "No such file", "Input/output error")
"""What they contain when it is the content that is lost, whichever error carries it."""


def _failure(folder: Path, what: str, error: Exception) -> StoreError:
    """A StoreError from one of rocksdict's, which are bare exceptions with a text, or the system's."""
    text = str(error)
    plain = text.replace(str(folder), "")  # names are people's: a group may be called "Corruption"
    damaged = plain.partition(":")[0] in _DAMAGE or any(word in plain for word in _LOST)
    return StoreError(f"the store {folder} cannot be {what}: {text}", damaged=damaged)


def _folder_name(name: str) -> str:
    """A folder for a group or topic: the name itself, or a digest where it might be mistaken for another's.

    Digests are for names that a file system may fold together (capitals), that mean something to it, or that nobody
    checked. They contain a ``%``, which no valid name does.
    """
    if re.fullmatch(r"[a-z0-9_-][a-z0-9._-]{0,248}", name):
        return name
    digest = sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{re.sub('[^a-zA-Z0-9_-]', '-', name)[:80]}%{digest}"


def _make_folder(folder: Path) -> None:
    """``mkdir -p`` with mode 0700 for each: Path.mkdir(parents=True) gives the mode to the last one only."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        if folder.exists():
            raise


_held: set[tuple[int, Path]] = set()
"""Lock files that this process holds. Closing any handle of one would free it, so none is opened twice. By process
id: a forked child inherits the set, not the locks."""

_held_guard = Lock()


class _Slot:
    """The exclusive right to ``worker-N``, freed by a kill as well. Record locks, as for groups on the embedded broker:
    forked children, which may outlive a worker, do not share them."""

    def __init__(self, folder: Path, file: Path, handle: int) -> None:
        self.folder = folder
        self._file = file
        self._handle = handle

    @classmethod
    def take(cls, root: Path) -> _Slot:
        """The first free slot of a root.

        Raises:
            ConfigError: the root cannot be used.
        """
        try:
            _make_folder(root)
            place = root.resolve()  # where two names lead to one folder, the locks have to be known by one
            for number in itertools.count():
                file = place / f"worker-{number}.lock"
                handle = _lock(file)
                if handle is not None:
                    return cls(root / f"worker-{number}", file, handle)
        except OSError as error:
            raise ConfigError(
                "state_dir",
                str(root),
                f"it cannot be used ({error.strerror}: {error.filename or root}); give a folder on a local disk that "
                "this user may write to",
            ) from error
        raise AssertionError("unreachable")

    def release(self) -> None:
        """Give it up. The file stays: removing it would let two processes lock two files of one name."""
        with _held_guard:
            if (os.getpid(), self._file) in _held:
                os.close(self._handle)
                _held.remove((os.getpid(), self._file))


def _lock(file: Path) -> int | None:
    """A handle with the lock, or None when another worker has it, here or elsewhere."""
    with _held_guard:
        if (os.getpid(), file) in _held:
            return None
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of the two depends on the system
            os.close(handle)
            return None
        except OSError:
            os.close(handle)
            raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)  # for people
        _held.add((os.getpid(), file))
        return handle
