"""Answers on disk, where the suite of the port cannot look: kills, neighbours, damage, disks that are full."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rowmill.state.answers import seal, unseal
from rowmill.state.model import TopicPartition
from rowmill.state.rocksdb import RocksAnswerStores, RocksStores

MIB = 1 << 20
NOW = 1_750_000_000_000

pytestmark = pytest.mark.timeout(60)

WRITER = """
import os, signal, sys
from pathlib import Path
from rowmill.state.rocksdb import RocksAnswerStores
stores = RocksAnswerStores(Path(sys.argv[1]))
answers = stores.open("score", 4 << 20)
for number in range(int(sys.argv[2])):
    answers.put(b"%s-%d" % (sys.argv[3].encode(), number), b"value %d" % number, None)
print("ready", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The state folder."""
    return tmp_path / "state"


@pytest.fixture
def stores(root: Path) -> Iterator[RocksAnswerStores]:
    """A worker's."""
    stores = RocksAnswerStores(root)
    yield stores
    stores.close()


class Writer:
    """A worker in a process of its own that has put its answers and waits to be killed."""

    def __init__(self, root: Path, count: int, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root), str(count), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        """``kill -9``, by itself: it has done nothing since it said that it was ready."""
        self._process.communicate("\n", timeout=20)
        assert self._process.returncode == -signal.SIGKILL


def folder_bytes(folder: Path, *endings: str) -> int:
    """What the files of a folder take, while others come and go."""
    total = 0
    for path in folder.rglob("*"):
        if path.name.endswith(endings):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


@pytest.mark.parametrize("expires_ms", [None, 1, NOW, 2**63])
def test_seal(expires_ms: int | None) -> None:
    """A value and its expiry come back."""
    assert unseal(seal(b"value", expires_ms)) == (b"value", expires_ms)


@pytest.mark.parametrize("stored", [b"", b"1234567"])
def test_what_nobody_sealed(stored: bytes) -> None:
    """Too little to be a sealed answer is a ValueError."""
    with pytest.raises(ValueError, match="no sealed answer"):
        unseal(stored)


def test_a_killed_worker_loses_no_answer(root: Path) -> None:
    """Everything put before ``kill -9`` is found by the next worker."""
    Writer(root, 2_000, "a").kill()
    stores = RocksAnswerStores(root)
    answers = stores.open("score", 4 * MIB)
    assert all(answers.get(b"a-%d" % number, NOW) == b"value %d" % number for number in range(2_000))
    stores.close()


def test_all_slots_are_read(root: Path) -> None:
    """Two workers are killed and one comes back: it finds the answers of both, whichever slot it gets."""
    first, second = Writer(root, 100, "a"), Writer(root, 100, "b")
    first.kill()
    second.kill()
    assert sorted(path.name for path in root.glob("answers-*/")) == ["answers-0", "answers-1"]
    stores = RocksAnswerStores(root)
    answers = stores.open("score", 4 * MIB)
    assert answers.get(b"a-99", NOW) == b"value 99"
    assert answers.get(b"b-99", NOW) == b"value 99"
    stores.close()


def test_a_worker_that_runs_takes_over_from_a_killed_one(stores: RocksAnswerStores, root: Path) -> None:
    """It has its own folder open already; after a refresh it finds what the killed one left."""
    answers = stores.open("score", 4 * MIB)
    answers.put(b"own", b"1", None)
    writer = Writer(root, 100, "b")
    stores.refresh()
    assert answers.get(b"b-99", NOW) == b"value 99"
    writer.kill()
    stores.refresh()
    assert (answers.get(b"b-99", NOW), answers.get(b"own", NOW)) == (b"value 99", b"1")


def test_neighbours_do_not_disturb_each_other(stores: RocksAnswerStores, root: Path) -> None:
    """Two workers of one machine write at once, each sees the other's after a refresh, and neither changes it."""
    other = RocksAnswerStores(root)
    ours, theirs = stores.open("score", MIB), other.open("score", MIB)
    ours.put(b"a", b"ours", None)
    theirs.put(b"b", b"theirs", NOW + 10)
    assert ours.get(b"b", NOW) is None
    stores.refresh()
    assert ours.get(b"b", NOW) == b"theirs"
    assert ours.get(b"b", NOW + 10) is None
    for number in range(5_000):  # far beyond the bound: files that we have open are deleted
        theirs.put(b"%d" % number, os.urandom(500), None)
    assert ours.get(b"b", NOW) == b"theirs"
    stores.refresh()
    assert ours.get(b"4999", NOW) is not None
    assert theirs.get(b"4999", NOW) is not None
    other.close()
    assert ours.get(b"4999", NOW) is not None
    assert (ours.damaged, ours.failed, theirs.damaged, theirs.failed) == (0, 0, 0, 0)


def test_a_mark_is_of_its_own_folder(stores: RocksAnswerStores, root: Path) -> None:
    """How far another worker has read says nothing about this one."""
    other = RocksAnswerStores(root)
    other.open("score", MIB).write_mark(b"position", b"7")
    other.open("score", MIB).put(b"key", b"value", None)
    answers = stores.open("score", MIB)
    assert (answers.read_mark(b"position"), answers.get(b"key", NOW)) == (None, b"value")
    other.close()


def test_a_neighbour_that_goes_away(stores: RocksAnswerStores, root: Path) -> None:
    """Its folder may be deleted at any time; what is gone is a miss."""
    other = RocksAnswerStores(root)
    other.open("score", MIB).put(b"key", b"value", None)
    answers = stores.open("score", MIB)
    other.close()
    shutil.rmtree(root / "answers-0")
    stores.refresh()
    assert answers.get(b"key", NOW) is None
    answers.put(b"key", b"mine", None)
    assert answers.get(b"key", NOW) == b"mine"


def test_tables_have_other_slots(stores: RocksAnswerStores, root: Path) -> None:
    """Answers and tables of one worker share a folder and no lock."""
    tables = RocksStores(root)
    tables.open("rowmill.p", TopicPartition("in", 0)).write([(b"key", b"table")])
    answers = stores.open("score", MIB)
    answers.put(b"key", b"answer", None)
    assert sorted(path.name for path in root.glob("*-0/")) == ["answers-0", "worker-0"]
    assert answers.get(b"key", NOW) == b"answer"
    tables.close()


def test_the_disk_space_stays_bounded(stores: RocksAnswerStores, root: Path) -> None:
    """Seven times the bound is written: what is on disk, logs of writes included, comes back to it at once.

    While answers rain down faster than any stage gives them, RocksDB's thread that deletes files may lag a little.
    """
    answers = stores.open("small", 2 * MIB)
    folder, most = root / "answers-0" / "small", 0
    for number in range(30_000):
        answers.put(b"%020d" % number, os.urandom(500), None)
        if number % 100 == 0:
            most = max(most, folder_bytes(folder, ".sst", ".log"))
    assert MIB <= most <= 6 * MIB
    give_up = time.monotonic() + 10
    while (size := folder_bytes(folder, ".sst", ".log")) > 2 * MIB and time.monotonic() < give_up:
        time.sleep(0.01)
    assert size <= 2 * MIB
    assert folder_bytes(root, "") < size + 3 * MIB
    assert answers.get(b"%020d" % 29_999, NOW) is not None
    assert answers.get(b"%020d" % 0, NOW) is None


def break_files(folder: Path, pattern: str) -> int:
    """Overwrite the middle of each file."""
    found = list(folder.glob(pattern))
    for path in found:
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        data[middle // 2 : middle + middle // 2] = b"\xa5" * len(data[middle // 2 : middle + middle // 2])
        path.write_bytes(data)
    return len(found)


@pytest.mark.parametrize("pattern", ["*.sst", "MANIFEST-*", "CURRENT", "ROWMILL"])
def test_damage_is_deleted(root: Path, pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever file is broken: rows miss, the folder begins anew, and the log says so once."""
    stores = RocksAnswerStores(root)
    answers = stores.open("score", MIB)
    for number in range(1_000):
        answers.put(b"%d" % number, os.urandom(500), None)
    stores.close()
    assert break_files(root / "answers-0" / "score", pattern)
    stores = RocksAnswerStores(root)
    answers = stores.open("score", MIB)
    for number in range(1_000):
        answers.get(b"%d" % number, NOW)
    assert answers.damaged == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    answers.put(b"key", b"value", None)
    assert answers.get(b"key", NOW) == b"value"
    stores.close()


def test_a_damaged_neighbour_is_a_miss(stores: RocksAnswerStores, root: Path) -> None:
    """Another's folder is never deleted: it is its owner's business, and read no more."""
    other = RocksAnswerStores(root)
    for number in range(1_000):
        other.open("score", MIB).put(b"%d" % number, os.urandom(500), None)
    answers = stores.open("score", MIB)
    stores.refresh()
    other.close()
    assert break_files(root / "answers-0" / "score", "*.sst")
    stores.refresh()
    found = [answers.get(b"%d" % number, NOW) for number in range(1_000)]
    assert None in found
    assert list((root / "answers-0" / "score").glob("*.sst"))
    answers.put(b"key", b"value", None)
    assert answers.get(b"key", NOW) == b"value"


@pytest.mark.parametrize(
    ("name", "content"), [("ROWMILL", b'{"answers": 2}'), ("notes.txt", b"mine"), ("CURRENT", b"MANIFEST-000005\n")]
)
def test_what_is_not_ours_stays(root: Path, name: str, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A folder of a newer rowmill, or of somebody else, is neither read nor deleted; the worker goes on without."""
    folder = root / "answers-0" / "score"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    stores = RocksAnswerStores(root)
    answers = stores.open("score", MIB)
    for _ in range(3):
        answers.put(b"key", b"value", None)
        assert answers.get(b"key", NOW) is None
    assert [path.name for path in folder.iterdir()] == [name]
    assert answers.failed == 4
    assert len(caplog.records) == 1
    assert "may be paid for again" in caplog.text
    stores.close()


def test_a_root_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no place at all, the worker goes on without, and says so."""
    (tmp_path / "state").write_text("a file")
    stores = RocksAnswerStores(tmp_path / "state")
    answers = stores.open("score", MIB)
    answers.put(b"key", b"value", None)
    assert answers.get(b"key", NOW) is None
    stores.refresh()
    stores.close()
    assert "may be paid for again" in caplog.text


FULL = """
import logging, resource, signal, sys
from pathlib import Path
from rowmill.state.rocksdb import RocksAnswerStores
logging.basicConfig(stream=sys.stdout, format="%(levelname)s")
stores = RocksAnswerStores(Path(sys.argv[1]))
answers = stores.open("score", 8 << 20)
answers.put(b"before", b"1", None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for number in range(3_000):
    answers.put(b"%d" % number, b"x" * 500, None)
assert answers.failed > 1_000, answers.failed
assert answers.get(b"before", 0) == b"1"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for number in range(3_000):
    answers.put(b"%d" % number, b"x" * 500, None)
assert answers.get(b"2999", 0) is not None
stores.close()
"""


def test_a_full_disk(root: Path) -> None:
    """Writes that fail are counted and logged once, reads go on, and when there is room again so do writes."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(root)], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "WARNING\n"
