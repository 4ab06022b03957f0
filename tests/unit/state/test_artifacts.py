"""Artifacts: what becomes a reference in a row, and what a folder survives."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rowmill.state import artifact_stores
from rowmill.state.artifact_stores import FolderArtifacts, MemoryArtifacts, open_artifacts
from rowmill.state.artifacts import (
    ArtifactError,
    ArtifactStoreError,
    is_oversized,
    load_artifact,
    load_artifacts,
    materialize,
    put_artifact,
)
from rowmill.state.codec import dumps
from rowmill.state.errors import BadRowError, ConfigError
from support.fake_clock import FakeClock

DATA = b"content" * 50
DAY = 86_400


@pytest.fixture
def clock() -> FakeClock:
    """Turned by hand."""
    return FakeClock()


@pytest.fixture
def store(tmp_path: Path, clock: FakeClock) -> FolderArtifacts:
    """A folder that is not there yet."""
    return FolderArtifacts(tmp_path / "artifacts", clock=clock)


def files(store: FolderArtifacts) -> list[Path]:
    """Everything that is no folder."""
    return sorted(path for path in store.root.rglob("*") if path.is_file())


# --- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "data", "content_type"),
    [
        (b"\xff", b"\xff", "application/octet-stream"),
        (bytearray(b"ab"), b"ab", "application/octet-stream"),
        (memoryview(b"ab"), b"ab", "application/octet-stream"),
        ("grün", "grün".encode(), "text/plain; charset=utf-8"),
        ({"a": [1, None]}, b'{"a":[1,null]}', "application/json"),
        ([1.5], b"[1.5]", "application/json"),
    ],
)
def test_values_of_any_kind(value: Any, data: bytes, content_type: str) -> None:
    """Bytes are kept as they are, text as UTF-8, anything else as JSON; the reference says which."""
    store = MemoryArtifacts()
    reference = put_artifact(store, value, name="n")
    assert reference["type"] == content_type
    assert reference["name"] == "n"
    assert load_artifact(store, reference) == data


@pytest.mark.parametrize("value", [object(), "\ud800", {"a": {1, 2}}])
def test_what_cannot_be_kept(value: Any) -> None:
    """What is none of these is a bad row and no crash."""
    with pytest.raises(BadRowError) as caught:
        put_artifact(MemoryArtifacts(), value)
    assert caught.value.kind == "unserialisable"


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"a": "x" * 10, "b": 1, "c": None, "d": [True, 1.5], "e": {"f": "y"}},
        {"a": "ü" * 5},
        {"x" * 100: 1},
        {"numbers": list(range(1000))},
        pytest.param({"date": object()}, id="an object"),
    ],
    ids=str,
)
def test_small_rows_stay(row: Any) -> None:
    """A row with nothing large in it comes back itself; names, numbers and the size of lists do not count."""
    store = MemoryArtifacts()
    assert materialize(row, 10, store) is row
    assert not is_oversized(row, 10)


@pytest.mark.parametrize(
    ("row", "find"),
    [
        ({"a": "x" * 11, "b": 1}, lambda row: row["a"]),
        ({"a": "ü" * 6}, lambda row: row["a"]),
        ({"a": {"b": [0, {"c": "x" * 11}]}}, lambda row: row["a"]["b"][1]["c"]),
        ({"a": ("x" * 11,)}, lambda row: row["a"][0]),
        ({"a": b""}, lambda row: row["a"]),
        ({"a": [bytearray(b"x")]}, lambda row: row["a"][0]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_large_values_become_references(row: Any, find: Any) -> None:
    """Texts above the limit and any bytes, at any depth; the row that was given is not changed, and JSON comes out."""
    store = MemoryArtifacts()
    before = str(row)
    assert is_oversized(row, 10)
    out = materialize(row, 10, store)
    value = find(row)
    assert load_artifact(store, find(out)) == (value.encode() if isinstance(value, str) else bytes(value))
    assert str(row) == before
    assert dumps(out)
    assert not is_oversized(out, 100)


def test_there_and_back() -> None:
    """load_artifacts undoes what materialize did to texts, and loads JSON; bytes stay references."""
    store = MemoryArtifacts()
    out = materialize({"a": ["x" * 11, 1], "b": b"bytes"}, 10, store)
    out["c"] = put_artifact(store, {"k": [1]})
    back = load_artifacts(out, store)
    assert back == {"a": ["x" * 11, 1], "b": out["b"], "c": {"k": [1]}}


def test_a_text_that_is_none() -> None:
    """An artifact that is not what its reference says is an error of the row."""
    store = MemoryArtifacts()
    for content_type in ("text/plain", "application/json"):
        with pytest.raises(ArtifactError, match=f"is no {content_type}"):
            load_artifacts({"a": put_artifact(store, b"\xff", content_type=content_type)}, store)


def test_a_row_without_end_is_a_bad_row() -> None:
    """A result that contains itself cannot take the process down."""
    row: dict[str, Any] = {}
    row["self"] = [row]
    for call in (lambda: materialize(row, 10, MemoryArtifacts()), lambda: is_oversized(row, 10)):
        with pytest.raises(BadRowError, match="nests too deeply"):
            call()


# --- folders ---------------------------------------------------------------------------------------------------


def test_where_files_lie(store: FolderArtifacts) -> None:
    """One file for one content, in folders and with a mode that keep others out, under no name from outside."""
    for _ in range(3):
        reference = store.within("rowmill.p").put(DATA, name="../../evil")
    digits = reference.digest.removeprefix("sha256:")
    (path,) = files(store)
    assert path == store.root / "rowmill.p" / digits[:2] / digits
    assert path.stat().st_mode & 0o777 == 0o600
    for folder in (path.parent, path.parent.parent, store.root):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_it_is_safe_on_disk_before_put_returns(store: FolderArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before it gets its name, and its name before the row goes on, also when the file was there."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(number: int) -> None:
        steps.append("folder" if Path(f"/proc/self/fd/{number}").resolve().is_dir() else "file")
        fsync(number)

    def note_replace(path: Path, target: Path) -> Path:
        steps.append("name")
        return replace(path, target)

    store.put(b"makes the folders")
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    store.put(DATA)
    assert [step for step in steps if step != "folder"] == ["file", "name"]
    assert steps[-1] == "folder"
    steps.clear()
    store.put(DATA)
    assert steps == ["folder"]


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA + b"x", DATA[:-1] + b"?"])
def test_damage_is_found_and_mended(store: FolderArtifacts, damage: bytes) -> None:
    """A file that is not what it was is never given to anybody; running its row again writes it anew."""
    reference = store.put(DATA)
    files(store)[0].write_bytes(damage)
    with pytest.raises(ArtifactError, match="was damaged"):
        store.get(reference)
    store.put(DATA)
    assert store.get(reference) == DATA


@pytest.mark.parametrize("broken", ["fsync", "utime"])
def test_a_failed_write_is_an_error(store: FolderArtifacts, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """A full disk fails the row, says so, may be tried again, and leaves no half of a file behind."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.put(b"makes the folders")
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(ArtifactStoreError, match=r"cannot write 350 bytes to the artifact .*: No space left") as caught:
        store.put(DATA)
    assert caught.value.retryable
    assert not [path for path in files(store) if path.name.startswith(".")]
    monkeypatch.undo()
    assert store.get(store.put(DATA)) == DATA


def test_a_folder_that_is_in_the_way(store: FolderArtifacts) -> None:
    """Reading, deleting and writing where the file system refuses are errors that name the file."""
    reference = store.put(DATA)
    path = files(store)[0]
    path.unlink()
    path.mkdir()
    (path / "inside").touch()
    for call in (store.get, store.delete, lambda _: store.put(DATA)):
        with pytest.raises(ArtifactStoreError, match=str(path)):
            call(reference)


def test_a_put_after_the_sweep_took_the_file(store: FolderArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a sweep takes between two steps of a put is written again."""
    reference = store.put(DATA)
    path, real = files(store)[0], os.utime

    def swept(*arguments: Any, **named: Any) -> None:
        monkeypatch.setattr(os, "utime", real)
        path.unlink()
        real(*arguments, **named)

    monkeypatch.setattr(os, "utime", swept)
    store.put(DATA)
    assert store.get(reference) == DATA


def test_a_put_while_the_sweep_looks(store: FolderArtifacts, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is put again after the sweep saw its age stays."""
    reference = store.put(DATA)
    clock.advance(2 * DAY)
    real = artifact_stores._modified_ms

    def looks(path: Path) -> int:
        age = real(path)
        monkeypatch.setattr(artifact_stores, "_modified_ms", real)
        store.put(DATA)
        return age

    monkeypatch.setattr(artifact_stores, "_modified_ms", looks)
    assert store.sweep(DAY) == 0
    assert store.get(reference) == DATA


@pytest.fixture
def leftovers(store: FolderArtifacts, clock: FakeClock) -> Iterator[Path]:
    """A folder in which a write and a sweep died half-way."""
    store.put(DATA)
    path = files(store)[0]
    path.replace(path.with_name(".swept-" + path.name))
    (path.parent / ".part-abc").touch()
    now = clock.now_ms() * 1_000_000
    os.utime(path.parent / ".part-abc", ns=(now, now))
    return iter([path])


def test_what_crashes_leave_behind(store: FolderArtifacts, clock: FakeClock, leftovers: Iterator[Path]) -> None:
    """Halves of files go when they are old, and a young file that a sweep had moved aside comes back."""
    path = next(leftovers)
    assert store.sweep(DAY) == 0
    assert sorted(one.name for one in files(store)) == sorted([".part-abc", path.name])
    clock.advance(2 * DAY)
    assert store.sweep(DAY) == 1
    assert files(store) == []


def test_clearing_takes_leftovers_along(store: FolderArtifacts, leftovers: Iterator[Path]) -> None:
    """A cleared scope leaves no folder; only artifacts are counted."""
    mine = store.within("rowmill.p")
    mine.put(DATA)
    (mine.root / "rowmill.p" / ".part-x").touch()
    assert mine.clear() == 1
    assert [folder.name for folder in store.root.iterdir()] == ["shared"]


def test_sweeping_no_folder(store: FolderArtifacts) -> None:
    """Nothing was ever put: nothing to do."""
    assert store.sweep(0) == 0
    assert store.within("rowmill.p").clear() == 0


# --- places ----------------------------------------------------------------------------------------------------


def test_open_artifacts(tmp_path: Path) -> None:
    """A folder by its path or URL: what one store has put, another one reads."""
    reference = open_artifacts(tmp_path / "a b", scope="rowmill.p").put(DATA)
    for place in (str(tmp_path / "a b"), f"file://{tmp_path}/a%20b", f"file://localhost{tmp_path}/a%20b"):
        assert open_artifacts(place).get(reference) == DATA


@pytest.mark.parametrize("place", ["", 7, None, "s3://bucket/x", "file://elsewhere/x", "http://x"])
def test_places_that_are_none(place: Any) -> None:
    """Another kind of place is refused with what there is, not tried."""
    with pytest.raises(ConfigError, match="give a folder"):
        open_artifacts(place)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """A root that is a file is told before the first row."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="this is a file"):
        open_artifacts(tmp_path / "file")
    with pytest.raises(ConfigError, match="max_bytes"):
        FolderArtifacts(tmp_path, max_bytes=0)
