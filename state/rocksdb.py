"""Stores on this machine's disk: the one file that knows rocksdict, and raw mode is the only one it uses.

What a folder looks like, and what each part is for::

    <state_dir>/worker-0.lock                           held by the worker that has the slot
    <state_dir>/worker-0/<group>/<topic>/<partition>/   one RocksDB
        ROWMILL                                         our mark: the version of the format, and whose store it is
    <state_dir>/worker-0/<group>/<topic>/<partition>.aside/
    <state_dir>/answers-0.lock, answers-0/<stage>/      a worker's cached answers, see RocksAnswerStores

The mark is a file and no key: it is read before RocksDB touches anything. Merely opening a store of another program
or of a newer rowmill replays its log, rewrites its options and lets rocksdict overwrite its settings, all before a
key could be looked at. It also leaves users every key there is, at no cost to any of them.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
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
from .answers import Answers, AnswerStores, seal, unseal
from .errors import ConfigError
from .model import TopicPartition
from .store import Change, Store, StoreError, Stores

if TYPE_CHECKING:
    from rocksdict import Cache, Options, Rdict, RdictIter, WriteBufferManager

log = logging.getLogger(__name__)

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
        cache_bytes: memory for blocks and not yet flushed writes of all stores together; half as much comes on top for
            what was used last (``recent_bytes``), and about 1 MiB per store.

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

    @property
    def recent_bytes(self) -> int:
        """An equal share for every open store. Waits for nobody: a store that is being deleted holds the guard."""
        return self._cache_bytes // 2 // max(1, sum(not store.closed for store in list(self._stores.values())))

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


def group_folders(root: Path, group: str) -> list[Path]:
    """What :func:`forget_group` would delete: the folders of a group's stores that are there."""
    places = [slot / _folder_name(group) for slot in sorted(root.glob("worker-*/"))]
    return [folder for place in places for folder in (place, _gone(place)) if folder.is_dir()]


def _gone(folder: Path) -> Path:
    """Where a group's folder lies while it is being deleted."""
    return folder.with_name(f"{folder.name[:200]}%gone")


def forget_group(root: Path, group: str) -> None:
    """Delete every store of a group that is over, whichever worker of this machine had it. None is no error.

    Moved first, as in ``remove``: a kill half-way leaves nothing where an open looks. No worker may serve the group.

    Raises:
        StoreError: one cannot be deleted.
    """
    for slot in root.glob("worker-*/"):
        folder = slot / _folder_name(group)
        gone = _gone(folder)
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
    """The exclusive right to a numbered folder, freed by a kill as well. Record locks, as for groups on the embedded
    broker: forked children, which may outlive a worker, do not share them."""

    def __init__(self, folder: Path, file: Path, handle: int) -> None:
        self.folder = folder
        self._file = file
        self._handle = handle

    @classmethod
    def take(cls, root: Path, kind: str = "worker") -> _Slot:
        """The first free slot of a root: ``<kind>-N``.

        Raises:
            ConfigError: the root cannot be used.
        """
        try:
            _make_folder(root)
            place = root.resolve()  # where two names lead to one folder, the locks have to be known by one
            for number in itertools.count():
                file = place / f"{kind}-{number}.lock"
                handle = _lock(file)
                if handle is not None:
                    return cls(root / f"{kind}-{number}", file, handle)
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


# --- answers ---------------------------------------------------------------------------------------------------

ANSWERS_FORMAT = 1
"""Version of the layout of a stage's answers on disk."""

_ANSWER, _WORD = b"a", b"m"
"""What the keys of answers and of marks begin with."""

_MOST_MENDS = 3
_REOPEN_EVERY = 1_000
_NO_ROOM = "the answers of stage %r cannot be kept in %s, so that rows may be paid for again after a restart: %s"


class RocksAnswerStores(AnswerStores):
    """Cached answers of one worker: one RocksDB for each stage, in the first free ``answers-N`` of a folder.

    The slots are others than those of tables: a worker may need either without the other. A restarted worker may get
    another number than before, and a killed one's rows may come to a worker that runs already. So the folders of
    *all* numbers are read, the others' as they were when this worker last looked; each worker writes to its own only.
    Moving another's answers over instead would copy gigabytes at a start, for the few that are asked for.

    Compaction is RocksDB's FIFO: it drops whole files, the oldest first, and never rewrites one. Nothing is done
    before the first ``open``, and nothing here ever raises: a damaged folder of our own is deleted and begun anew, an
    unusable one is gone without.

    Args:
        root: the folder, made when absent; may be the same that tables are in.
        cache_bytes: memory for blocks and not yet flushed answers of all stages together (32 MiB).
    """

    def __init__(self, root: Path, *, cache_bytes: int = 32 * _MIB) -> None:
        self._root = root.absolute()
        self._cache_bytes = cache_bytes
        self._memory: tuple[Cache, WriteBufferManager] | None = None
        self._slot: _Slot | None = None
        self._open: dict[str, RocksAnswers] = {}

    def open(self, name: str, max_bytes: int) -> Answers:
        """The answers of a stage. Holds the interpreter while RocksDB replays its log, some milliseconds."""
        answers = self._open.get(name)
        if answers is None:
            answers = self._open[name] = self._make(name, max_bytes)
            answers.look_around()
        return answers

    def refresh(self) -> None:
        """Open anew what other workers of this machine have written since."""
        for answers in self._open.values():
            answers.look_around()

    def close(self) -> None:
        """Close all of them, and free the slot. Twice is fine."""
        for answers in self._open.values():
            answers.close()
        self._open.clear()
        slot, self._slot, self._memory = self._slot, None, None
        if slot is not None:
            slot.release()

    def _make(self, name: str, max_bytes: int) -> RocksAnswers:
        from rocksdict import Cache, WriteBufferManager

        if self._memory is None:
            cache = Cache(self._cache_bytes)
            buffers = WriteBufferManager.new_write_buffer_manager_with_cache(self._cache_bytes // 2, False, cache)
            self._memory = cache, buffers
        try:
            self._slot = self._slot or _Slot.take(self._root, "answers")
        except ConfigError as error:
            log.warning(_NO_ROOM, name, self._root, error)
        own = self._slot.folder / _folder_name(name) if self._slot is not None else None
        return RocksAnswers(name, self._root, own, _answer_options(max_bytes, *self._memory))


class RocksAnswers(Answers):
    """One stage's answers. Made by :meth:`RocksAnswerStores.open`.

    Args:
        name: the stage's.
        root: where the slots of all workers are.
        own: the folder to write to; None: there is none.
        options: of the database.
    """

    def __init__(self, name: str, root: Path, own: Path | None, options: Options) -> None:
        self._name = name
        self._root = root
        self._own = own
        self._options = options
        self._mends = 0
        self._told = False
        self._views: dict[Path, tuple[object, Rdict]] = {}
        self._db: Rdict | None = None
        self._closed = False
        self._open()

    def get(self, key: bytes, now_ms: int) -> bytes | None:
        """What this worker, or else another one of this machine, put under the key."""
        key = _ANSWER + key
        stored = self._read(key)
        if stored is not None:
            value = self._live(stored, now_ms)
            if value is None:
                self._write(key, None)
            return value
        for folder in list(self._views) if self._views else ():
            stored = self._read_view(folder, key)
            if stored is not None and (value := self._live(stored, now_ms)) is not None:
                return value
        return None

    def put(self, key: bytes, value: bytes, expires_ms: int | None) -> None:
        """Keep a value: in RocksDB's log when this returns, so that a kill of the process does not lose it."""
        self._write(_ANSWER + key, seal(value, expires_ms))

    def read_mark(self, name: bytes) -> bytes | None:
        """What was marked in this worker's own folder."""
        return self._read(_WORD + name)

    def write_mark(self, name: bytes, value: bytes) -> None:
        """Mark it."""
        self._write(_WORD + name, value)

    def close(self) -> None:
        """Let go of the folders."""
        self._closed = True
        for _, view in self._views.values():
            _close(view)
        self._views.clear()
        self._let_go()

    def look_around(self) -> None:
        """Open the folders of other workers as they are now, those that have changed since the last time."""
        if self._closed:
            return
        folder_name = _folder_name(self._name)
        found = {slot / folder_name for slot in self._root.glob("answers-*/") if (slot / folder_name) != self._own}
        for folder in found | self._views.keys():
            present = _signature(folder)
            known = self._views.get(folder)
            if known is not None and known[0] == present:
                continue
            if known is not None:
                _close(self._views.pop(folder)[1])
            if present is not None and (view := self._open_view(folder)) is not None:
                self._views[folder] = present, view

    def _live(self, stored: bytes, now_ms: int) -> bytes | None:
        try:
            value, expires_ms = unseal(stored)
        except ValueError:
            self.damaged += 1
            return None
        return value if expires_ms is None or expires_ms > now_ms else None

    def _read(self, key: bytes) -> bytes | None:
        if self._db is None:
            return None
        try:
            stored: bytes | None = self._db.get(key)
        except Exception as error:  # noqa: BLE001 - rocksdict raises bare ones, and a cache must not stop anybody
            self._trouble("read", error)
            return None
        return stored

    def _write(self, key: bytes, value: bytes | None) -> None:
        if self._db is None:
            self.failed += not self._closed
            return
        try:
            if value is None:
                self._db.delete(key)
            else:
                self._db.put(key, value)
        except Exception as error:  # noqa: BLE001 - as above
            self._trouble("written", error)

    def _open(self) -> None:
        from rocksdict import Rdict

        if self._own is None:
            return
        try:
            _make_folder(self._own)
            _claim(self._own, self._name)
            self._db = Rdict(str(self._own), self._options, {"default": self._options})
        except (Exception, StoreError) as error:  # noqa: BLE001 - as above
            self._trouble("opened", error)

    def _trouble(self, what: str, error: Exception | StoreError) -> None:
        """Begin anew where the content is damaged; otherwise go on without, and try again once in a while."""
        assert self._own is not None  # noqa: S101 - without a folder nothing is tried
        failure = error if isinstance(error, StoreError) else _failure(self._own, what, error)
        if failure.damaged and self._mends < _MOST_MENDS:
            self._mends += 1
            self.damaged += 1
            log.warning("%s; it is deleted, and answers are collected anew", failure)
            self._let_go()
            with suppress(OSError):
                _delete(self._own)
            self._open()
            return
        self.failed += 1
        if not self._told:
            self._told = True
            log.warning(_NO_ROOM, self._name, self._own, failure)
        elif self._db is not None and self.failed % _REOPEN_EVERY == 0:
            # RocksDB may refuse all writes after one that failed, also when the disk has room again.
            self._let_go()
            self._open()

    def _let_go(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            _close(db)

    def _open_view(self, folder: Path) -> Rdict | None:
        """Another worker's folder as it is now. It takes no lock, changes nothing, and files deleted later stay."""
        from rocksdict import AccessType, Rdict

        for _ in range(2):  # its owner may delete a file while it is being opened
            try:
                _check_claim(folder)
                return Rdict(
                    str(folder), self._options, {"default": self._options}, access_type=AccessType.read_only(False)
                )
            except (Exception, StoreError) as error:  # noqa: BLE001 - as above
                log.debug("%s cannot be read: %s", folder, error)
        return None

    def _read_view(self, folder: Path, key: bytes) -> bytes | None:
        view = self._views[folder][1]
        try:
            stored: bytes | None = view.get(key)
        except Exception as error:  # noqa: BLE001 - as above
            self.damaged += 1
            log.debug("%s cannot be read: %s", folder, error)
            _close(self._views.pop(folder)[1])
            return None
        return stored


def _answer_options(max_bytes: int, cache: Cache, buffers: WriteBufferManager) -> Options:
    """FIFO within ``max_bytes``, the write-ahead logs of not yet flushed answers included."""
    from rocksdict import DBCompactionStyle, FifoCompactOptions

    # What is dropped at a time, and replayed at an opening, is one flushed buffer.
    buffer = min(max(max_bytes // 32, 64 << 10), 8 * _MIB)
    fifo = FifoCompactOptions()
    # The rest is for logs of four buffers, and for files that wait to be deleted while answers rain down.
    fifo.max_table_files_size = max_bytes - 8 * buffer
    options = _options(cache, buffers)
    options.set_compaction_style(DBCompactionStyle.fifo())
    options.set_fifo_compaction_options(fifo)
    options.set_write_buffer_size(buffer)
    # Puts wait, with the interpreter held, when all buffers are full: leave room for a burst while one is flushed.
    options.set_max_write_buffer_number(4)
    # All files stay open: views go on reading what their owner has deleted.
    options.set_max_open_files(-1)
    return options


def _claim(folder: Path, name: str) -> None:
    """Check that a folder is for answers of ours, and mark an empty one."""
    if any(folder.iterdir()):
        _check_claim(folder)
        return
    fresh = folder / f"{_MARK}.new"
    fresh.write_bytes(codec.dumps({"answers": ANSWERS_FORMAT, "stage": name}))
    fresh.replace(folder / _MARK)


def _check_claim(folder: Path) -> None:
    """Refuse what may not be read, nor deleted, as answers: another program's, or a newer rowmill's."""
    try:
        version = codec.loads((folder / _MARK).read_bytes())["answers"]
    except FileNotFoundError:
        left = sorted(path.name for path in folder.iterdir())
        mine = left in ([], [f"{_MARK}.new"])  # killed before it was marked
        raise StoreError(f"the folder {folder} holds no answers of rowmill ({left[:5]})", damaged=mine) from None
    except (ValueError, TypeError, LookupError) as error:
        raise StoreError(f"the folder {folder} has an unreadable mark, {_MARK}: {error}", damaged=True) from None
    if not isinstance(version, int) or version > ANSWERS_FORMAT:
        raise StoreError(f"the folder {folder} has answers of a newer rowmill (format {version})", damaged=False)


def _signature(folder: Path) -> object | None:
    """Something that differs when a store's content does; None where there is no store."""
    try:
        files = [(entry.name, entry.stat()) for entry in os.scandir(folder) if entry.name.endswith((".log", ".sst"))]
    except OSError:
        return None
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)) or None


def _close(db: Rdict) -> None:
    with suppress(Exception):
        db.close()
