"""What every kind of answers must do: one suite, for memory and for RocksDB."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rowmill.state.answers import Answers, AnswerStores, MemoryAnswerStores
from rowmill.state.rocksdb import RocksAnswerStores

MIB = 1 << 20
NOW = 1_750_000_000_000


class AnswersContract:
    """The suite. A subclass gives ``stores``, fresh and closed by the fixture."""

    @pytest.fixture
    def answers(self, stores: AnswerStores) -> Answers:
        """A stage's answers, none yet."""
        return stores.open("score", 4 * MIB)

    def test_what_is_put_is_found(self, answers: Answers) -> None:
        """A value is there at once, and an absent key gives None."""
        answers.put(b"key", b"value", None)
        assert answers.get(b"key", NOW) == b"value"
        assert answers.get(b"other", NOW) is None

    @pytest.mark.parametrize("key", [b"", b"\0", b"m", b"a", b"\xff" * 20, bytes(range(20))])
    def test_any_bytes_are_a_key(self, answers: Answers, key: bytes) -> None:
        """No key is taken, and no mark is found as an answer."""
        answers.write_mark(key, b"mark")
        assert answers.get(key, NOW) is None
        answers.put(key, b"value", None)
        assert (answers.get(key, NOW), answers.read_mark(key)) == (b"value", b"mark")

    @pytest.mark.parametrize("value", [b"", b"\0", b"x" * 60_000, bytes(range(256))])
    def test_any_bytes_are_a_value(self, answers: Answers, value: bytes) -> None:
        """An empty value is one."""
        answers.put(b"key", value, None)
        assert answers.get(b"key", NOW) == value

    def test_the_last_value_counts(self, answers: Answers) -> None:
        """A put replaces value and expiry of the one before."""
        answers.put(b"key", b"old", NOW + 10)
        answers.put(b"key", b"new", None)
        assert answers.get(b"key", NOW + 20) == b"new"

    def test_expiry(self, answers: Answers) -> None:
        """A value is there before the moment it expires at, and not from then on, whatever the clock says later."""
        answers.put(b"key", b"value", NOW + 10)
        assert answers.get(b"key", NOW + 9) == b"value"
        assert answers.get(b"key", NOW + 10) is None
        assert answers.get(b"key", NOW) is None

    def test_expired_ones_can_be_put_again(self, answers: Answers) -> None:
        """After its expiry a key is as good as new."""
        answers.put(b"key", b"old", NOW + 10)
        assert answers.get(b"key", NOW + 10) is None
        answers.put(b"key", b"new", NOW + 30)
        assert answers.get(b"key", NOW + 20) == b"new"

    def test_marks(self, answers: Answers) -> None:
        """A mark is read as it was written last, and an absent one is None."""
        assert answers.read_mark(b"position") is None
        answers.write_mark(b"position", b"1")
        answers.write_mark(b"position", b"2")
        assert answers.read_mark(b"position") == b"2"

    def test_stages_are_apart(self, stores: AnswerStores) -> None:
        """Each stage has answers of its own, whatever its name looks like to a file system."""
        names = ["score", "Score", "SCORE", "x" * 80, "-", "score-2"]
        for name in names:
            stores.open(name, MIB).put(b"key", name.encode(), None)
        assert [stores.open(name, MIB).get(b"key", NOW) for name in names] == [name.encode() for name in names]

    def test_one_object_for_a_stage(self, stores: AnswerStores) -> None:
        """Two chains with a stage of one name share its answers."""
        assert stores.open("score", MIB) is stores.open("score", MIB)

    def test_the_oldest_make_room(self, stores: AnswerStores) -> None:
        """Far beyond the bound the newest are there and the oldest are gone."""
        answers = stores.open("small", MIB)
        for number in range(10_000):
            answers.put(b"%d" % number, number.to_bytes(4, "big") + os.urandom(996), None)
        assert (answers.get(b"9999", NOW) or b"")[:4] == (9999).to_bytes(4, "big")
        assert answers.get(b"0", NOW) is None
        found = sum(answers.get(b"%d" % number, NOW) is not None for number in range(10_000))
        assert 300 <= found <= 1_500

    def test_closed_ones_find_and_keep_nothing(self, stores: AnswerStores, answers: Answers) -> None:
        """Rows that are late when a worker stops are no trouble."""
        answers.put(b"key", b"value", None)
        stores.close()
        answers.put(b"key", b"value", None)
        answers.write_mark(b"position", b"1")
        answers.close()
        assert (answers.get(b"key", NOW), answers.read_mark(b"position")) == (None, None)

    def test_closing_and_looking_again_are_always_fine(self, stores: AnswerStores, answers: Answers) -> None:
        """Before anything is there, twice, and afterwards."""
        stores.refresh()
        answers.put(b"key", b"value", None)
        stores.refresh()
        assert answers.get(b"key", NOW) == b"value"
        stores.close()
        stores.close()
        stores.refresh()


class TestMemoryAnswers(AnswersContract):
    """In memory."""

    @pytest.fixture
    def stores(self) -> Iterator[AnswerStores]:
        """A place of its own."""
        stores = MemoryAnswerStores()
        yield stores
        stores.close()


class TestRocksAnswers(AnswersContract):
    """On disk."""

    @pytest.fixture
    def stores(self, tmp_path: Path) -> Iterator[AnswerStores]:
        """A place of its own."""
        stores = RocksAnswerStores(tmp_path / "state")
        yield stores
        stores.close()

    def test_they_survive_closing(self, stores: AnswerStores, tmp_path: Path) -> None:
        """The next worker finds what this one left, marks too."""
        answers = stores.open("score", MIB)
        answers.put(b"key", b"value", NOW + 10)
        answers.write_mark(b"position", b"7")
        stores.close()
        again = RocksAnswerStores(tmp_path / "state")
        answers = again.open("score", MIB)
        assert answers.get(b"key", NOW) == b"value"
        assert answers.get(b"key", NOW + 10) is None
        assert answers.read_mark(b"position") == b"7"
        again.close()
