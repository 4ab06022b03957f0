"""Checkpoint stores: what every store does, the files of the folder one, and what the state manager makes of them."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from rowmill.state.context import ExecutionContext, session_uuid
from rowmill.state.errors import CheckpointError, ConfigError
from rowmill.streams import checkpoint_stores
from rowmill.streams.checkpoint_stores import (
    CheckpointStorage,
    FileCheckpointStorage,
    MemoryCheckpointStorage,
    named_id,
)
from rowmill.streams.cli.cmd_checkpoints import parse_age
from rowmill.streams.state_manager import StateManager
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(60)

ONE, TWO = UUID(int=1), UUID(int=2)

# A file as ondine 2.1 writes it: times without a zone, money as text, the twelve keys inside of an outer object.
ONDINE = {
    "version": "1.0",
    "session_id": str(ONE),
    "timestamp": "2026-03-01T10:00:00.250000",
    "data": {
        "session_id": str(ONE),
        "pipeline_id": str(TWO),
        "start_time": "2026-03-01T09:00:00",
        "end_time": None,
        "current_stage_index": 2,
        "last_processed_row": 499,
        "total_rows": 1000,
        "accumulated_cost": "0.1234",
        "accumulated_tokens": 4321,
        "intermediate_data": {"model": "small"},
        "failed_rows": 3,
        "skipped_rows": 1,
    },
}


def context(session_id: UUID = ONE, row: int = 9, **changes: Any) -> ExecutionContext:
    """A context of a session that is under way."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return ExecutionContext(session_id=session_id, start_time=start, last_processed_row=row, total_rows=20, **changes)


@pytest.fixture
def clock() -> FakeClock:
    """Turned by hand."""
    return FakeClock()


@pytest.fixture(params=["memory", "file"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> CheckpointStorage:
    """Each store that needs no broker."""
    if request.param == "memory":
        return MemoryCheckpointStorage(clock=clock)
    return FileCheckpointStorage(tmp_path / "deep" / "checkpoints", clock=clock)


# --- what every store does ---------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(storage: CheckpointStorage) -> None:
    """The last checkpoint of a session comes back as it was, whatever became of the object since."""
    data = context(row=4).to_checkpoint()
    assert storage.load(ONE) is None
    assert not storage.exists(ONE)
    assert storage.save(ONE, data) is True
    assert storage.save(ONE, context(row=9, accumulated_cost=Decimal("0.10")).to_checkpoint()) is True
    data["last_processed_row"] = 0
    loaded = storage.load(ONE)
    assert loaded is not None
    assert ExecutionContext.from_checkpoint(loaded) == context(row=9, accumulated_cost=Decimal("0.10"), **_ids(loaded))
    assert storage.exists(ONE)
    assert storage.load(TWO) is None


def _ids(data: dict[str, Any]) -> dict[str, Any]:
    return {"pipeline_id": UUID(data["pipeline_id"])}


def test_lists_and_deletes(storage: CheckpointStorage, clock: FakeClock) -> None:
    """A list has the newest first, with progress, cost and age; a deleted one is gone, once."""
    storage.save(ONE, context(ONE, row=9, accumulated_cost=Decimal("1.50"), failed_rows=2).to_checkpoint())
    clock.advance(60)
    storage.save(TWO, context(TWO, row=19).to_checkpoint())
    clock.advance(5)
    newer, older = storage.list_checkpoints()
    assert (newer.session_id, older.session_id) == (TWO, ONE)
    assert (newer.progress, newer.resumable, newer.age) == (100.0, False, timedelta(seconds=5))
    assert (older.progress, older.resumable, older.age) == (50.0, True, timedelta(seconds=65))
    assert (older.rows, older.failed_rows, older.row_index, older.cost) == (10, 2, 9, Decimal("1.50"))
    assert storage.delete(ONE) is True
    assert storage.delete(ONE) is False
    assert [info.session_id for info in storage.list_checkpoints()] == [TWO]


def test_what_json_cannot_hold_is_refused(storage: CheckpointStorage) -> None:
    """A context with something in it that is no JSON is refused by name, and the checkpoint before stays."""
    storage.save(ONE, context(row=4).to_checkpoint())
    with pytest.raises(CheckpointError, match="intermediate_data"):
        storage.save(ONE, context(intermediate_data={"open": object()}).to_checkpoint())
    loaded = storage.load(ONE)
    assert loaded is not None
    assert loaded["last_processed_row"] == 4


def test_async_twins(storage: CheckpointStorage) -> None:
    """On an event loop each method has a twin to await."""

    async def use() -> None:
        assert await storage.save_async(ONE, context().to_checkpoint())
        assert await storage.exists_async(ONE)
        assert (await storage.load_async(ONE) or {})["last_processed_row"] == 9
        assert [info.session_id for info in await storage.list_checkpoints_async()] == [ONE]
        assert await storage.find_async(str(ONE)) == ONE
        assert await storage.delete_async(ONE)

    asyncio.run(use())


@pytest.mark.parametrize(
    ("word", "group"),
    [
        ("reviews", "rowmill.reviews"),
        ("reviews.live", "rowmill.reviews"),
        ("reviews.monday", "rowmill.reviews.monday"),
        ("rowmill.reviews.monday", "rowmill.reviews.monday"),
    ],
)
def test_sessions_by_name(word: str, group: str) -> None:
    """A session is found by its name as well as by its id."""
    assert named_id(word) == session_uuid(group)
    assert named_id(str(session_uuid(group))) == session_uuid(group)


@pytest.mark.parametrize("word", ["", "a.b.c", "no spaces", None, 7])
def test_no_session_by_that_name(word: Any) -> None:
    """What can be no session's name is refused."""
    with pytest.raises(ConfigError, match="session_id"):
        named_id(word)


# --- files -------------------------------------------------------------------------------------------------------


def write(folder: Path, text: bytes | str, name: str = f"checkpoint_{ONE}.json") -> Path:
    """A file in the folder."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (f"checkpoint_{ONE}.json", lambda: json.dumps(ONDINE).encode()),
        (f"checkpoint_{ONE}.json.gz", lambda: gzip.compress(json.dumps(ONDINE).encode())),
        (f"checkpoint_{ONE}.json", lambda: json.dumps(ONDINE["data"]).encode()),
        (f"checkpoint_{ONE}.json", lambda: json.dumps(ONDINE).replace('"small"', "NaN").encode()),
    ],
    ids=["ondine", "ondine packed", "twelve keys only", "with NaN"],
)
def test_files_of_ondine_load(tmp_path: Path, name: str, make: Callable[[], bytes]) -> None:
    """A checkpoint that ondine wrote loads, packed or not, and so does a file with the twelve keys alone."""
    write(tmp_path, make(), name)
    manager = StateManager(FileCheckpointStorage(tmp_path))
    loaded = manager.load_checkpoint(ONE)
    assert loaded is not None
    assert (loaded.last_processed_row, loaded.total_rows, loaded.accumulated_tokens) == (499, 1000, 4321)
    assert loaded.accumulated_cost == Decimal("0.1234")
    assert manager.can_resume(str(ONE))
    (info,) = manager.list_checkpoints()
    assert (info.session_id, info.stage_index, info.rows, info.progress) == (ONE, 2, 500, 50.0)
    assert info.checkpoint_path == str(tmp_path / name)


def test_ondine_reads_what_we_write(tmp_path: Path) -> None:
    """Our file has ondine's name and form, with its twelve keys and nothing but them; it is this user's alone."""
    storage = FileCheckpointStorage(tmp_path / "new")
    StateManager(storage).save_checkpoint(ExecutionContext.from_checkpoint(ONDINE["data"]))  # type: ignore[arg-type]
    path = tmp_path / "new" / f"checkpoint_{ONE}.json"
    outer = json.loads(path.read_text())
    assert set(outer) == {"version", "session_id", "timestamp", "data"}
    assert (outer["version"], outer["session_id"]) == ("1.0", str(ONE))
    assert set(outer["data"]) == set(ONDINE["data"])
    same = {key: value for key, value in outer["data"].items() if key != "start_time"}  # ours has a zone
    assert same == {key: value for key, value in ONDINE["data"].items() if key != "start_time"}  # type: ignore[attr-defined]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_packed_file_does_not_hide_a_newer_one(tmp_path: Path) -> None:
    """Saving replaces an older packed file too, which ondine would read first; of two the newer one counts."""
    packed = write(tmp_path, gzip.compress(json.dumps(ONDINE).encode()), f"checkpoint_{ONE}.json.gz")
    storage = FileCheckpointStorage(tmp_path)
    storage.save(ONE, context(row=7).to_checkpoint())
    assert not packed.exists()
    write(tmp_path, gzip.compress(json.dumps(ONDINE).encode()), packed.name)
    os.utime(packed, (1, 1))
    assert (storage.load(ONE) or {})["last_processed_row"] == 7
    assert len(storage.list_checkpoints()) == 1
    assert storage.delete(ONE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"data": 7}',
        b"\xff\xfe",
        json.dumps({"data": {"session_id": str(TWO)}}).encode(),
        b"[" * 100_000,
        json.dumps({**ONDINE, "data": {"session_id": str(ONE)}}).encode(),
    ],
    ids=["empty", "half", "list", "null", "no keys", "no object", "no text", "another's", "deep", "keys missing"],
)
def test_a_damaged_file_is_told_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes) -> None:
    """A file that cannot be read is left out of lists with a warning that names it; to load it is an error."""
    good = context(TWO).to_checkpoint()
    storage = FileCheckpointStorage(tmp_path)
    storage.save(TWO, good)
    path = write(tmp_path, text)
    with caplog.at_level(logging.WARNING):
        assert [info.session_id for info in storage.list_checkpoints()] == [TWO]
    manager = StateManager(storage)
    with pytest.raises(CheckpointError, match=str(path)):
        manager.load_checkpoint(ONE)
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    "timestamp",
    [
        "0001-01-01T00:00:00+14:00",
        "0001-01-01T00:00:00",
        "9999-12-31T23:59:59.999999-14:00",
        "9999-12-31T23:59:59.999999",
        "yesterday",
        "",
        5,
        1e308,
        None,
        [],
    ],
)
def test_odd_times_do_not_spoil_the_list(tmp_path: Path, timestamp: Any) -> None:
    """A file that names a time which cannot be, or none, has its own; every other one is listed beside it."""
    storage = FileCheckpointStorage(tmp_path)
    storage.save(TWO, context(TWO).to_checkpoint())
    write(tmp_path, json.dumps({**ONDINE, "timestamp": timestamp}).encode())
    infos = {info.session_id: info for info in storage.list_checkpoints()}
    assert set(infos) == {ONE, TWO}
    assert infos[ONE].timestamp.utcoffset() == timedelta(0)
    assert StateManager(storage).load_checkpoint(ONE) is not None


@pytest.mark.parametrize("cut", [1, 30, -1, -9])
def test_a_damaged_packed_file_is_told_by_name(tmp_path: Path, cut: int) -> None:
    """So is a packed one that was cut."""
    path = write(tmp_path, gzip.compress(json.dumps(ONDINE).encode())[:cut], f"checkpoint_{ONE}.json.gz")
    with pytest.raises(CheckpointError, match=str(path)):
        FileCheckpointStorage(tmp_path).load(ONE)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is larger, unpacked, than any checkpoint is refused before it fills the memory."""
    monkeypatch.setattr(checkpoint_stores, "_MOST_BYTES", 1_000)
    write(tmp_path, gzip.compress(b" " * 5_000), f"checkpoint_{ONE}.json.gz")
    with pytest.raises(CheckpointError, match="1,000 bytes"):
        FileCheckpointStorage(tmp_path).load(ONE)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fails at the last step, the checkpoint before is still there, whole, and no rest of the new one."""
    storage = FileCheckpointStorage(tmp_path)
    storage.save(ONE, context(row=4).to_checkpoint())

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device"):
        storage.save(ONE, context(row=9).to_checkpoint())
    monkeypatch.undo()
    assert (storage.load(ONE) or {})["last_processed_row"] == 4
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint_{ONE}.json"]


def test_other_files_are_none_of_our_business(tmp_path: Path) -> None:
    """A folder that has other files in it, or is not there, has no checkpoints."""
    write(tmp_path, b"x", "notes.json")
    write(tmp_path, b"x", "checkpoint_no-id-at-all-but-thirty-six-long.json")
    write(tmp_path, b"x", f".checkpoint_{ONE}.json.abc.part")
    assert FileCheckpointStorage(tmp_path).list_checkpoints() == []
    assert FileCheckpointStorage(tmp_path / "absent").list_checkpoints() == []
    assert FileCheckpointStorage(tmp_path / "absent").load(ONE) is None
    assert FileCheckpointStorage(tmp_path / "absent").delete(ONE) is False


@pytest.mark.parametrize("folder", ["", 7, None])
def test_no_folder(folder: Any) -> None:
    """What is no folder's path is refused."""
    with pytest.raises(ConfigError, match="folder"):
        FileCheckpointStorage(folder)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """So is a file."""
    with pytest.raises(ConfigError, match="this is a file"):
        FileCheckpointStorage(write(tmp_path, b"", "x"))


# --- the state manager ---------------------------------------------------------------------------------------------


def test_checkpoints_are_due_every_so_many_rows() -> None:
    """A checkpoint is due 500 rows after the last one, unless told otherwise; a new session counts from 0."""
    manager = StateManager(MemoryCheckpointStorage())
    assert [row for row in range(0, 1_100, 100) if manager.should_checkpoint(row)] == [500, 600, 700, 800, 900, 1000]
    manager.save_checkpoint(context(row=600))
    assert not manager.should_checkpoint(1_099)
    assert manager.should_checkpoint(1_100)
    assert not manager.should_checkpoint(499)
    assert manager.should_checkpoint(500)
    assert StateManager(MemoryCheckpointStorage(), checkpoint_interval=1).should_checkpoint(1)


def test_a_loaded_checkpoint_counts_as_the_last_one() -> None:
    """Who goes on at row 900 checkpoints again 500 rows later."""
    storage = MemoryCheckpointStorage()
    storage.save(ONE, context(row=900).to_checkpoint())
    manager = StateManager(storage)
    assert manager.load_checkpoint(ONE) is not None
    assert not manager.should_checkpoint(1_399)
    assert manager.should_checkpoint(1_400)


@pytest.mark.parametrize("interval", [0, -1, 1.5, "500", True, None])
def test_intervals_that_are_none(interval: Any) -> None:
    """An interval is a whole number of rows."""
    with pytest.raises(ConfigError, match="checkpoint_interval"):
        StateManager(MemoryCheckpointStorage(), checkpoint_interval=interval)


def test_storages_that_are_none() -> None:
    """A folder's name is no storage; the message says what is."""
    with pytest.raises(ConfigError, match="FileCheckpointStorage"):
        StateManager("checkpoints")  # type: ignore[arg-type]


def test_unknown_sessions() -> None:
    """A session that nobody knows has no checkpoint, whatever way it is named."""
    manager = StateManager(MemoryCheckpointStorage())
    for session in (TWO, str(TWO), "reviews", "reviews.monday"):
        assert manager.load_checkpoint(session) is None
        assert not manager.can_resume(session)
        assert manager.cleanup_checkpoints(session) is False


def test_a_context_goes_round(storage: CheckpointStorage) -> None:
    """What was saved is loaded equal, and cleaning up says whether there was anything."""
    manager = StateManager(storage)
    given = context(session_uuid("rowmill.reviews"), intermediate_data={"a": [1, None, "ü"]}, dropped_rows=3)
    assert manager.save_checkpoint(given)
    assert manager.load_checkpoint("reviews") == given
    assert manager.can_resume(given.session_id)
    assert manager.cleanup_checkpoints("reviews") is True
    assert manager.cleanup_checkpoints("reviews") is False


def test_the_manager_on_an_event_loop() -> None:
    """Its methods have twins to await."""

    async def use() -> None:
        manager = StateManager(MemoryCheckpointStorage())
        assert await manager.save_checkpoint_async(context())
        assert await manager.load_checkpoint_async(ONE) is not None
        assert await manager.can_resume_async(str(ONE))
        assert len(await manager.list_checkpoints_async()) == 1
        assert await manager.cleanup_checkpoints_async(ONE)
        assert not await manager.can_resume_async(ONE)

    asyncio.run(use())


# --- what people write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("30m", 1_800),
        ("30min", 1_800),
        ("12h", 43_200),
        ("7d", 604_800),
        ("2W", 1_209_600),
        ("PT36H", 129_600),
    ],
)
def test_ages(text: str, seconds: int) -> None:
    """An age is a number and a unit, or a duration of ISO 8601."""
    assert parse_age("--older-than", text) == seconds * 1000


@pytest.mark.parametrize("text", ["", "7", "d", "-7d", "7y", "1.5h", "week"])
def test_ages_that_are_none(text: str) -> None:
    """Anything else is refused by the option's name."""
    with pytest.raises(ConfigError, match="--older-than"):
        parse_age("--older-than", text)
