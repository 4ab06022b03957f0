"""What every place for artifacts must do, and both places that there are: memory and a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rowmill.state.artifact_stores import FolderArtifacts, MemoryArtifacts
from rowmill.state.artifacts import ArtifactError, ArtifactRef, ArtifactStore, put_artifact, references
from rowmill.state.errors import ConfigError
from support.fake_clock import FakeClock

DATA = b"\x00an image\xff" * 100
DAY = 86_400


class ArtifactContract(ABC):
    """The suite."""

    @pytest.fixture
    def clock(self) -> FakeClock:
        """Turned by hand."""
        return FakeClock()

    @pytest.fixture
    @abstractmethod
    def store(self, clock: FakeClock, tmp_path: Path) -> ArtifactStore:
        """An empty store that takes 10,000 bytes at most."""

    def test_what_is_put_is_got(self, store: ArtifactStore) -> None:
        """The bytes come back by the reference, and by its form in a row."""
        reference = store.put(DATA, name="page 1.png", content_type="image/png")
        assert reference.to_row() == {
            "$artifact": reference.digest, "bytes": len(DATA), "type": "image/png", "store": "shared",
            "name": "page 1.png",
        }  # fmt: skip
        assert store.exists(reference)
        assert store.get(reference) == store.get(reference.to_row()) == DATA

    def test_nothing_is_an_artifact_too(self, store: ArtifactStore) -> None:
        """No bytes at all can be kept."""
        assert store.get(store.put(b"")) == b""

    def test_the_same_again_is_the_same(self, store: ArtifactStore) -> None:
        """A row that runs again after a crash gets the reference that it had."""
        assert store.put(DATA) == store.put(DATA)

    def test_many_at_once(self, store: ArtifactStore) -> None:
        """Threads that put the same and different things do not disturb each other."""
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda number: store.put(b"%d" % (number % 5)), range(100)))
        assert [store.get(reference) for reference in found] == [b"%d" % (number % 5) for number in range(100)]

    def test_what_is_not_there(self, store: ArtifactStore) -> None:
        """A reference that leads nowhere is an error that says what and where."""
        reference = MemoryArtifacts().put(DATA)
        assert not store.exists(reference)
        assert not store.delete(reference)
        with pytest.raises(ArtifactError, match=f"no artifact shared/{reference.digest} in "):
            store.get(reference)

    def test_deleting(self, store: ArtifactStore) -> None:
        """What is deleted is gone, and can be put again."""
        reference = store.put(DATA)
        assert store.delete(reference)
        assert not store.exists(reference)
        store.put(DATA)
        assert store.get(reference) == DATA

    def test_scopes(self, store: ArtifactStore) -> None:
        """Each session has its own part, clearing it takes nothing else away, and any store reads all of them."""
        shared, live = store.put(DATA), store.within("rowmill.p").put(DATA)
        replay = store.within("rowmill.P").put(DATA)  # a file system may think that this is the same name
        assert [shared.store, live.store, replay.store] == ["shared", "rowmill.p", "rowmill.P"]
        assert store.get(live) == store.within("rowmill.P").get(live) == DATA
        assert store.within("rowmill.p").clear() == 1
        assert [store.exists(reference) for reference in (shared, live, replay)] == [True, False, True]
        assert store.within("rowmill.p").clear() == 0

    def test_the_shared_scope_is_nobodys_to_clear(self, store: ArtifactStore) -> None:
        """Clearing without saying whose is a mistake."""
        with pytest.raises(ConfigError, match="choose whose"):
            store.clear()

    def test_a_sweep_takes_what_is_old(self, store: ArtifactStore, clock: FakeClock) -> None:
        """Age counts from the last put; references that are told stay; scopes are no protection."""
        live = store.within("rowmill.p")
        old, kept, again = store.put(b"old"), live.put(b"kept"), store.put(b"again")
        elsewhere = live.put(b"old")
        clock.advance(2 * DAY)
        young = store.put(b"young")
        store.put(b"again")
        row = {"deep": [{"image": kept.to_row()}], "name": "a"}
        assert store.sweep(DAY, keep=references(row)) == 2
        gone = [store.exists(reference) for reference in (old, kept, again, elsewhere, young)]
        assert gone == [False, True, True, False, True]
        clock.advance(2 * DAY)
        assert store.sweep(DAY) == 3

    @pytest.mark.parametrize("older_than", [-1, float("nan"), "1", True])
    def test_sweep_wants_seconds(self, store: ArtifactStore, older_than: Any) -> None:
        """An age is a number of seconds."""
        with pytest.raises(ConfigError, match="seconds"):
            store.sweep(older_than)

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ({"data": "text"}, "give bytes"),
            ({"data": DATA, "name": "a\nb"}, "control character"),
            ({"data": DATA, "name": "x" * 201}, "control character"),
            ({"data": DATA, "name": None}, "control character"),
            ({"data": DATA, "content_type": "png"}, "MIME"),
            ({"data": DATA, "content_type": "image/png\r\nX: y"}, "MIME"),
        ],
    )
    def test_put_checks_its_arguments(self, store: ArtifactStore, arguments: Any, told: str) -> None:
        """What cannot stand in a reference is refused before anything is kept."""
        with pytest.raises(ConfigError, match=told):
            store.put(**arguments)

    def test_there_is_a_bound(self, store: ArtifactStore) -> None:
        """What is larger than the store admits is an error in both directions."""
        with pytest.raises(ArtifactError, match="above max_bytes=10,000"):
            store.put(b"x" * 10_001)
        with pytest.raises(ArtifactError, match="above max_bytes"):
            store.get(ArtifactRef("sha256:" + "0" * 64, 10_001))

    @pytest.mark.parametrize(
        "change",
        [
            {"$artifact": "sha256:../../../../etc/passwd"},
            {"$artifact": "sha256:" + "A" * 64},
            {"$artifact": "md5:" + "a" * 64},
            {"$artifact": 7},
            {"store": "../elsewhere"},
            {"store": ".hidden"},
            {"store": ""},
            {"store": "a/b"},
            {"bytes": -1},
            {"bytes": True},
            {"bytes": "7"},
            {"type": "x"},
            {"name": "a\0b"},
        ],
        ids=str,
    )
    def test_references_are_not_believed(self, store: ArtifactStore, change: Any) -> None:
        """A reference comes with a row from anywhere: nothing in it chooses a path, and what is odd is refused."""
        row = {**store.put(DATA).to_row(), **change}
        for call in (store.get, store.exists, store.delete):
            with pytest.raises(ArtifactError):
                call(row)
        assert list(references(row)) == []

    @pytest.mark.parametrize("value", [None, "sha256:", {}, {"artifact": 1}, []])
    def test_what_is_no_reference(self, store: ArtifactStore, value: Any) -> None:
        """Any other value is told apart."""
        with pytest.raises(ArtifactError, match="expected a reference to an artifact"):
            store.get(value)

    def test_the_size_is_compared(self, store: ArtifactStore) -> None:
        """A reference that tells of other bytes than there are is an error."""
        row = {**put_artifact(store, DATA), "bytes": 3}
        with pytest.raises(ArtifactError, match="not the 3 bytes"):
            store.get(row)

    @pytest.mark.parametrize("scope", ["", ".", "..", "a/b", "a b", "x" * 201, 7])
    def test_scopes_have_safe_names(self, store: ArtifactStore, scope: Any) -> None:
        """A scope is a name and never a path."""
        with pytest.raises(ConfigError, match="scope"):
            store.within(scope)


class TestMemory(ArtifactContract):
    """In memory."""

    @pytest.fixture
    def store(self, clock: FakeClock, tmp_path: Path) -> ArtifactStore:
        """Nothing in it."""
        return MemoryArtifacts(max_bytes=10_000, clock=clock)


class TestFolder(ArtifactContract):
    """In a folder."""

    @pytest.fixture
    def store(self, clock: FakeClock, tmp_path: Path) -> ArtifactStore:
        """A folder that is not there yet."""
        return FolderArtifacts(tmp_path / "deep" / "artifacts", max_bytes=10_000, clock=clock)
