"""What every kind of local store must do, whichever it is: inherited by one class per adapter.

A subclass gives ``stores``: a fresh place, closed by the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rowmill.state.model import TopicPartition
from rowmill.state.store import Change, Store, StoreError, Stores

GROUP = "rowmill.reviews"
TP = TopicPartition("reviews", 0)


def numbered(count: int, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
    """Entries in the order of their keys."""
    return [(prefix + b"%08d" % number, b"value %d" % number) for number in range(count)]


class StoreContract:
    """The suite."""

    @pytest.fixture
    def store(self, stores: Stores) -> Iterator[Store]:
        """An empty store."""
        store = stores.open(GROUP, TP)
        yield store
        store.close()

    def test_what_is_written_is_read(self, store: Store) -> None:
        """A value is there after its write, and an absent key has none."""
        store.write([(b"a", b"1"), (b"b", b"2")])
        assert [store.get(b"a"), store.get(b"b"), store.get(b"c")] == [b"1", b"2", None]

    def test_the_last_change_of_a_key_counts(self, store: Store) -> None:
        """Changes to one key apply in their order, deletions too, inside a batch and across batches."""
        store.write([(b"a", b"1"), (b"a", b"2"), (b"b", b"1"), (b"b", None), (b"c", None), (b"c", b"3")])
        assert list(store.scan(b"")) == [(b"a", b"2"), (b"c", b"3")]
        store.write([(b"a", None), (b"c", b"4")])
        assert list(store.scan(b"")) == [(b"c", b"4")]

    def test_deleting_what_is_absent_is_no_error(self, store: Store) -> None:
        """A tombstone may come for a key that was never there."""
        store.write([(b"a", None)])
        assert store.get(b"a") is None

    def test_a_scan_is_in_the_order_of_bytes(self, store: Store) -> None:
        """Keys are unsigned bytes: no alphabet, no numbers, shorter before longer."""
        keys = [
            b"",
            b"\x00",
            b"\x00\x00",
            b"\x00\xff",
            b"A",
            b"a",
            b"a\x00",
            b"aa",
            b"\x7f",
            b"\x80",
            b"\xff",
            b"\xff\xff",
        ]
        store.write([(key, b"at " + key) for key in reversed(keys)])
        assert list(store.scan(b"")) == [(key, b"at " + key) for key in keys]

    def test_every_byte_may_begin_a_key(self, store: Store) -> None:
        """No key is taken by the store itself, the empty one included."""
        keys = [b""] + [bytes([number]) for number in range(256)]
        store.write([(key, key) for key in keys])
        assert [store.get(key) for key in keys] == keys
        assert [key for key, _ in store.scan(b"")] == keys

    def test_a_new_store_is_empty(self, store: Store) -> None:
        """Whatever the store keeps for itself is no entry."""
        assert list(store.scan(b"")) == []
        assert store.get(b"") is None

    def test_an_empty_value_is_a_value(self, store: Store) -> None:
        """Empty is not absent."""
        store.write([(b"a", b"")])
        assert store.get(b"a") == b""
        assert list(store.scan(b"")) == [(b"a", b"")]

    @pytest.mark.parametrize(
        ("prefix", "inside", "outside"),
        [
            (b"ab", [b"ab", b"ab\x00", b"ab\xff\xff", b"abc"], [b"aa\xff", b"ac", b"a", b"b"]),
            (b"a\xff", [b"a\xff", b"a\xff\x00", b"a\xff\xff"], [b"a\xfe\xff", b"b", b"a"]),
            (b"\xff", [b"\xff", b"\xff\x00", b"\xff\xff\xff"], [b"\xfe\xff", b""]),
            (b"\xff\xff", [b"\xff\xff", b"\xff\xff\x01"], [b"\xff", b"\xff\xfe"]),
            (b"\x00", [b"\x00", b"\x00\x00", b"\x00\xff"], [b"", b"\x01"]),
        ],
    )
    def test_a_prefix_is_exact(self, store: Store, prefix: bytes, inside: list[bytes], outside: list[bytes]) -> None:
        """A scan gives what begins with the prefix and nothing beside it, at the edges of a byte as well."""
        store.write([(key, b"x") for key in [*outside, *inside]])
        assert [key for key, _ in store.scan(prefix)] == sorted(inside)

    def test_an_empty_batch_changes_nothing(self, store: Store) -> None:
        """Writing no changes is allowed."""
        store.write([(b"a", b"1")])
        store.write([])
        assert list(store.scan(b"")) == [(b"a", b"1")]

    def test_changes_may_come_from_an_iterator_that_reads_the_store(self, store: Store) -> None:
        """The batch is put together before it is applied."""
        store.write(numbered(3))
        store.write((key, value.upper()) for key, value in store.scan(b""))
        assert [value for _, value in store.scan(b"")] == [b"VALUE 0", b"VALUE 1", b"VALUE 2"]

    def test_a_batch_that_cannot_be_put_together_leaves_no_trace(self, store: Store) -> None:
        """Where the changes break off, none is applied."""

        def changes() -> Iterator[Change]:
            yield b"a", b"1"
            raise LookupError("no more")

        with pytest.raises(LookupError):
            store.write(changes())
        assert store.get(b"a") is None

    def test_many_entries(self, store: Store) -> None:
        """A scan gives all of many entries once and in order, also large ones."""
        entries = numbered(5_000, b"many/") + [(b"wide/%d" % number, bytes(300_000)) for number in range(9)]
        store.write(entries)
        assert list(store.scan(b"")) == entries
        assert list(store.scan(b"many/")) == entries[:5_000]
        assert list(store.scan(b"wide/")) == entries[5_000:]

    @pytest.mark.parametrize("count", [99, 100, 101, 1_099, 1_100, 1_101, 2_100])
    def test_no_entry_is_lost_or_repeated_where_chunks_meet(self, store: Store, count: int) -> None:
        """Whatever portions a store reads in, they fit together."""
        store.write(numbered(count, b"b"))
        store.write([(b"a", b"before"), (b"c", b"behind")])
        assert list(store.scan(b"b")) == numbered(count, b"b")

    @pytest.mark.parametrize("count", [3, 3_000])
    def test_a_scan_shows_the_store_as_it_was(self, store: Store, count: int) -> None:
        """What is written after a scan was made is not in it, whether or not it has begun."""
        entries = numbered(count)
        store.write(entries)
        begun, fresh = store.scan(b""), store.scan(b"")
        first = next(begun)
        store.write([(entries[-1][0], b"new"), (entries[1][0], None), (entries[0][0] + b"+", b"more"), (b"z", b"end")])
        assert [first, *begun] == entries
        assert list(fresh) == entries
        assert len(list(store.scan(b""))) == count + 1

    def test_a_scan_may_be_left_half_way(self, store: Store, stores: Stores) -> None:
        """An abandoned iterator keeps nobody from closing and opening the store."""
        store.write(numbered(3_000))
        scan = store.scan(b"")
        next(scan)
        store.close()
        again = stores.open(GROUP, TP)
        assert len(list(again.scan(b""))) == 3_000
        again.close()

    def test_content_survives_closing(self, store: Store, stores: Stores) -> None:
        """What was written is there when the store is opened again."""
        store.write(numbered(1_000))
        store.write([(b"%08d" % 7, None)])
        store.close()
        again = stores.open(GROUP, TP)
        assert list(again.scan(b"")) == [entry for entry in numbered(1_000) if entry[0] != b"%08d" % 7]
        again.close()

    def test_closing_twice_is_fine(self, store: Store) -> None:
        """The second time does nothing."""
        store.close()
        store.close()

    def test_a_closed_store_says_so(self, store: Store) -> None:
        """Using a closed store is a StoreError that does not cast doubt on its content."""
        store.close()
        for use in (lambda: store.get(b"a"), lambda: list(store.scan(b"")), lambda: store.write([(b"a", b"1")])):
            with pytest.raises(StoreError, match="closed") as caught:
                use()
            assert not caught.value.damaged

    def test_a_store_is_open_once(self, store: Store, stores: Stores) -> None:
        """An open store is neither opened again nor moved nor deleted."""
        store.write([(b"a", b"1")])
        for use in (stores.open, stores.set_aside, stores.remove):
            with pytest.raises(StoreError, match="open") as caught:
                use(GROUP, TP)
            assert not caught.value.damaged
        assert store.get(b"a") == b"1"

    def test_stores_are_apart(self, stores: Stores) -> None:
        """Each group, topic and partition has its own content."""
        places = [
            (group, TopicPartition(topic, partition))
            for group in ("g", "G", "g.1", "t")
            for topic in ("t", "T", "g")
            for partition in (0, 1, 10)
        ]
        opened = [stores.open(*place) for place in places]
        for number, store in enumerate(opened):
            store.write([(b"me", b"%d" % number)])
        for store in opened:
            store.close()
        for number, place in enumerate(places):
            store = stores.open(*place)
            assert list(store.scan(b"")) == [(b"me", b"%d" % number)]
            store.close()

    def test_set_aside_makes_room(self, store: Store, stores: Stores) -> None:
        """After a store was set aside the next one is new, and this may happen again and again."""
        for number in range(3):
            store.write([(b"a", b"%d" % number)])
            store.close()
            assert stores.set_aside(GROUP, TP)
            store = stores.open(GROUP, TP)
            assert list(store.scan(b"")) == []
        store.close()

    def test_remove_deletes(self, store: Store, stores: Stores) -> None:
        """A removed store is empty when it is opened again; its neighbours are not."""
        neighbour = stores.open(GROUP, TopicPartition("reviews", 1))
        neighbour.write([(b"a", b"1")])
        store.write([(b"a", b"1")])
        store.close()
        stores.remove(GROUP, TP)
        again = stores.open(GROUP, TP)
        assert again.get(b"a") is None
        assert neighbour.get(b"a") == b"1"
        again.close()
        neighbour.close()

    def test_absent_stores_are_no_error(self, stores: Stores) -> None:
        """What was never there can be set aside and removed."""
        stores.set_aside(GROUP, TopicPartition("never", 0))
        stores.remove(GROUP, TopicPartition("never", 0))

    def test_closing_the_place_twice_is_fine(self, stores: Stores) -> None:
        """The second time does nothing, and what was left open is closed by the first."""
        store = stores.open(GROUP, TP)
        stores.close()
        stores.close()
        with pytest.raises(StoreError, match="closed"):
            store.get(b"a")
