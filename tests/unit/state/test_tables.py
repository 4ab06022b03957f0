"""Tables: what rows see of each other, what a commit carries, and what reaches the store when."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill.state.codec import dumps, loads
from rowmill.state.errors import BadRowError, ConfigError
from rowmill.state.memory import MemoryStore
from rowmill.state.model import StoredRecord
from rowmill.state.store import StoreError
from rowmill.state.table import RowTables, TableSpec, restamp, stamp
from rowmill.state.tables import Layer, PartitionTables, TableUpdateError

NOW = 1_750_000_000_000
SPECS = {"counts": TableSpec("counts"), "seen": TableSpec("seen", ttl_ms=10_000)}


class Bench:
    """A partition's tables over a store that tests may look into."""

    def __init__(self, content: dict[bytes, bytes] | None = None, recent_bytes: int = 0) -> None:
        self.content = {} if content is None else content
        self.store = MemoryStore(content=self.content)
        self.tables = PartitionTables(self.store, SPECS, lambda: recent_bytes)

    def row(self, time_ms: int = NOW) -> RowTables:
        """A row that begins now."""
        return self.tables.view(self.tables, time_ms)

    def complete(self, row: RowTables) -> None:
        """The row is done."""
        self.tables.settle(row.operations)
        self.tables.pass_time(row.time_ms)

    def put(self, table: str, key: str, value: Any, time_ms: int = NOW) -> None:
        """A whole row that sets one entry."""
        row = self.row(time_ms)
        row.table(table).put(key, value)
        self.complete(row)

    def commit(self, position: int | None = None) -> dict[bytes, bytes | None]:
        """A whole commit; the changelog records' keys and values."""
        taken = self.tables.take()
        records = self.tables.records(taken, NOW)
        self.tables.written(position, NOW)
        self.tables.forget_taken()
        return {record.key or b"": record.value for record in records}


@pytest.fixture(params=[0, 400, 1_000_000], ids=["forgetful", "of_short_memory", "of_long_memory"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """Fresh tables, with and without a memory of what was used last."""
    return Bench(recent_bytes=request.param)


def test_a_row_sees_its_own_writes(bench: Bench) -> None:
    """What a row puts or deletes it reads back at once, by key, by prefix, and as an absence."""
    bench.put("counts", "a", 1)
    table = bench.row().table("counts")
    table.put("b", {"deep": [1, 2]})
    table.delete("a")
    assert (table.get("a"), table.get("a", 7), table.get("b")) == (None, 7, {"deep": [1, 2]})
    assert table.scan() == [("b", {"deep": [1, 2]})]
    assert list(table) == ["b"]
    assert "b" in table
    assert "a" not in table


def test_values_are_copies(bench: Bench) -> None:
    """Changing what was put or got changes nothing in the table."""
    value = {"list": [1]}
    table = bench.row().table("counts")
    table.put("k", value)
    value["list"].append(2)
    table.get("k")["list"].append(3)
    assert table.get("k") == {"list": [1]}


def test_rows_at_once_are_isolated(bench: Bench) -> None:
    """A row in work sees nothing of another one in work, and all of it once that one is complete."""
    first, second = bench.row(), bench.row()
    first.table("counts").put("k", 1)
    assert second.table("counts").get("k") is None
    bench.complete(first)
    assert second.table("counts").get("k") == 1


def test_a_failed_row_leaves_nothing(bench: Bench) -> None:
    """A row that is never completed has written nothing."""
    bench.row().table("counts").put("k", 1)
    assert bench.commit() == {}
    assert [key for key in bench.content if key[0]] == []


def test_updates_are_never_lost(bench: Bench) -> None:
    """Two rows at once that count on one entry both count, whichever completes first."""
    rows = [bench.row() for _ in range(5)]
    for row in rows:
        row.table("counts").add("k")
        row.table("counts").update("list", lambda value: [*(value or []), len(value or [])])
    for row in reversed(rows):
        bench.complete(row)
    assert bench.row().table("counts").scan() == [("k", 5), ("list", [0, 1, 2, 3, 4])]


def test_an_update_follows_the_rows_own_puts(bench: Bench) -> None:
    """Operations of one row apply in their order; the row itself does not see what its updates give."""
    row = bench.row()
    table = row.table("counts")
    table.put("k", 10)
    table.add("k", 5)
    assert table.get("k") == 10
    bench.complete(row)
    assert bench.row().table("counts").get("k") == 15
    row = bench.row()
    row.table("counts").update("k", lambda _: None)
    bench.complete(row)
    assert "k" not in bench.row().table("counts")


@pytest.mark.parametrize(
    "function", [lambda _: 1 / 0, lambda _: object(), lambda _: "x" * 1_000_000, lambda _: float("inf")]
)
def test_an_update_that_fails(bench: Bench, function: Any) -> None:
    """An update that raises, or gives what is no value, fails its row: nothing else of the row counts either."""
    row = bench.row()
    row.table("counts").put("other", 1)
    row.table("counts").update("k", function)
    with pytest.raises(TableUpdateError, match="update of 'counts/k'"):
        bench.complete(row)
    assert bench.commit() == {}


def test_the_store_follows_the_commit(bench: Bench) -> None:
    """Completed writes are readable at once, ride in the commit, and are in the store only when it is written."""
    bench.put("counts", "k", 1)
    assert [key for key in bench.content if key[0]] == []
    taken = bench.tables.take()
    bench.put("counts", "k", 2)  # meanwhile
    assert bench.row().table("counts").get("k") == 2
    assert [key for key in bench.content if key[0]] == []
    assert [(r.key, r.value, r.timestamp) for r in bench.tables.records(taken, NOW)] == [(b"counts/k", b"1", NOW)]
    bench.tables.written(7, NOW)
    bench.tables.forget_taken()
    assert bench.content[b"counts/k"].endswith(b"1")
    assert bench.tables.position == 7
    assert bench.row().table("counts").get("k") == 2
    assert bench.commit(9) == {b"counts/k": b"2"}
    assert bench.tables.position == 9


def test_what_was_never_committed_is_gone(bench: Bench) -> None:
    """Another look at the same store, as after an abort or a crash, knows nothing of completed or taken writes."""
    bench.put("counts", "k", 1)
    bench.commit(1)
    bench.put("counts", "k", 2)
    bench.tables.take()
    bench.put("counts", "k", 3)
    assert Bench(bench.content).row().table("counts").get("k") == 1


def test_what_was_used_last_is_remembered() -> None:
    """What was written or read, an absence too, is not read from the store again."""
    bench = Bench({b"counts/old": stamp(SPECS["counts"], 1, NOW)}, recent_bytes=10_000)
    bench.put("counts", "new", 2)
    bench.commit()

    def seen() -> list[Any]:
        return [bench.row().table("counts").get(key) for key in ("old", "new", "none")]

    assert seen() == [1, 2, None]
    bench.store.close()
    assert seen() == [1, 2, None]


def known_without_its_store(bench: Bench, count: int) -> int:
    """Of so many entries, how many are found though the store is closed."""
    remembered = 0
    for number in range(count):
        with contextlib.suppress(StoreError):
            assert bench.tables.get(b"counts/k%d" % number) is not None
            remembered += 1
    return remembered


def test_memory_is_bounded() -> None:
    """However many entries are used, those in memory stay within the bytes given; what is used all the time stays."""
    bench = Bench(recent_bytes=20_000)
    for number in range(1_000):
        bench.put("counts", f"k{number}", number)
        bench.commit()
        assert bench.row().table("counts").get("k0") == 0
    bench.store.close()
    remembered = known_without_its_store(bench, 1_000)
    assert 50 < remembered < 20_000 / 130
    assert bench.row().table("counts").get("k0") == 0


def test_entries_that_grow_stay_within_the_memory() -> None:
    """The same few keys, written again and again with more in them, are counted as what they have become."""
    bench = Bench(recent_bytes=20_000)
    for size in range(0, 3_000, 100):
        for number in range(20):
            bench.put("counts", f"k{number}", "x" * size)
        bench.commit()
    bench.store.close()
    remembered = known_without_its_store(bench, 20)
    assert remembered * 2_900 <= 2 * 20_000


def test_what_a_read_found_before_a_write_is_not_remembered() -> None:
    """A commit may be written while another row's read of the same entry is under way: the new value stays."""

    class SlowStore(MemoryStore):
        def get(self, key: bytes) -> bytes | None:
            found = super().get(key)
            if key == b"counts/k" and not meanwhile:
                meanwhile.append(key)
                bench.put("counts", "k", 2)
                bench.commit()
            return found

    meanwhile: list[bytes] = []
    bench = Bench({b"counts/k": stamp(SPECS["counts"], 1, NOW)})
    bench.tables = PartitionTables(SlowStore(content=bench.content), SPECS, lambda: 10_000)
    assert bench.row().table("counts").get("k") == 1
    assert bench.row().table("counts").get("k") == 2


def test_a_restore_is_not_hidden_by_what_was_read_before() -> None:
    """What was looked up before the changelog was loaded is looked up again."""
    bench = Bench(recent_bytes=10_000)
    assert bench.tables.own(b"counts/k") is None
    bench.tables.load([StoredRecord("c", 0, 0, NOW, b"counts/k", b"1")], 1)
    assert bench.tables.own(b"counts/k") == b"1"


def test_layers(bench: Bench) -> None:
    """A lot's rows read through their layer; outside it nothing shows before it is absorbed."""
    layer = Layer(bench.tables)
    row = bench.tables.view(layer, NOW)
    row.table("counts").put("k", 1)
    layer.settle(row.operations)
    assert bench.tables.view(layer, NOW).table("counts").scan("k") == [("k", 1)]
    assert bench.row().table("counts").get("k") is None
    bench.tables.absorb(layer)
    assert bench.row().table("counts").get("k") == 1


def test_scans_keep_tables_apart(bench: Bench) -> None:
    """A scan gives the entries below a prefix in order, from store, overlay and row, and of no other table."""
    for key in ("b/2", "a", "b/1"):
        bench.put("counts", key, key)
    bench.put("seen", "b/9", "other table")
    bench.commit()
    bench.put("counts", "b/3", "b/3")
    table = bench.row().table("counts")
    table.put("b/0", "b/0")
    assert table.scan("b/") == [(key, key) for key in ("b/0", "b/1", "b/2", "b/3")]
    assert table.scan("b/", limit=2) == [("b/0", "b/0"), ("b/1", "b/1")]
    assert len(table.scan()) == 5
    assert table.scan(limit=0) == []


def test_a_scan_with_a_limit_reads_no_more() -> None:
    """The first entries of a large table, what is pending and taken above it included, cost as much as of a small."""
    store, read = MemoryStore(), 0
    store.write([(f"counts/{n:05}".encode(), restamp(b"0", NOW)) for n in range(1_000)])
    really = store.scan

    def scan(prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        nonlocal read
        for entry in really(prefix):
            read += 1
            yield entry

    store.scan = scan  # type: ignore[method-assign]
    tables = PartitionTables(store, SPECS)
    tables.changes = {b"counts/00000": None, b"counts/000005": restamp(b"1", NOW)}
    tables.take()
    tables.changes = {b"counts/00001": restamp(b"2", NOW), b"counts/000005": None, b"counts/99999": restamp(b"3", NOW)}
    row = tables.view(tables, NOW)
    row.table("counts").put("00002", 4)
    row.table("counts").delete("00003")
    row.table("counts").put("000035", 5)
    found = row.table("counts").scan(limit=4)
    assert found == [("00001", 2), ("00002", 4), ("000035", 5), ("00004", 0)]
    assert read < 20
    assert len(row.table("counts").scan()) == len(list(row.table("counts"))) == 1_000


def test_entries_expire(bench: Bench) -> None:
    """With a ttl a row sees nothing that is older than that by its own time; an update begins anew."""
    bench.put("seen", "k", 1)
    assert bench.row(NOW + 9_999).table("seen").get("k") == 1
    late = bench.row(NOW + 10_000)
    assert (late.table("seen").get("k"), late.table("seen").scan(), "k" in late.table("seen")) == (None, [], False)
    late.table("seen").add("k", 5)
    bench.complete(late)
    assert bench.row(NOW + 10_000).table("seen").get("k") == 5


def test_expired_entries_are_swept(bench: Bench) -> None:
    """Once a committed row is newer than an entry's end, the next commit deletes it everywhere; renewed ones stay."""
    bench.put("seen", "old", 1)
    bench.put("seen", "renewed", 1)
    bench.put("counts", "eternal", 1)
    bench.commit()
    bench.put("seen", "renewed", 2, NOW + 8_000)
    bench.commit()
    bench.put("counts", "eternal", 2, NOW + 12_000)
    assert bench.commit() == {b"counts/eternal": b"2"}
    assert bench.commit() == {b"seen/old": None}
    assert sorted(key for key in bench.content if key[0]) == [b"counts/eternal", b"seen/renewed"]
    bench.put("counts", "eternal", 3, NOW + 19_000)
    assert bench.commit() == {b"counts/eternal": b"3"}
    bench.put("counts", "eternal", 4, NOW + 19_500)
    assert bench.commit() == {b"seen/renewed": None, b"counts/eternal": b"4"}
    assert sorted(key for key in bench.content if key != b"\0about") == [b"counts/eternal"]


def test_what_is_due_and_written_again_stays(bench: Bench) -> None:
    """An entry that was found over, and is written again before the commit that would delete it, stays."""
    bench.put("seen", "k", 1)
    bench.commit()
    bench.put("counts", "tick", 1, NOW + 12_000)
    bench.commit()
    bench.put("seen", "k", 2, NOW + 12_000)
    assert bench.commit() == {b"seen/k": b"2"}
    assert bench.row(NOW + 12_000).table("seen").get("k") == 2


def test_a_bounded_number_is_swept_at_once(bench: Bench) -> None:
    """A thousand entries that end together are deleted over several commits, all of them."""
    row = bench.row()
    for n in range(1_200):
        row.table("seen").put(f"{n:04}", n)
    bench.complete(row)
    bench.commit()
    deleted = 0
    for step in range(4):
        bench.put("counts", "tick", step, NOW + 20_000 + step)
        swept = [key for key, value in bench.commit().items() if value is None]
        assert len(swept) <= 1_002, "500, or two for each entry of the commit before"
        deleted += len(swept)
    assert deleted == 1_200


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda table: table.put("k", None), "delete"),
        (lambda table: table.put("k", float("nan")), "JSON has no NaN"),
        (lambda table: table.put("", 1), "bytes of text"),
        (lambda table: table.put("k" * 2_000, 1), "bytes of text"),
        (lambda table: table.put(1, 1), "text"),
        (lambda table: table.put("\ud800", 1), "surrogates"),
        (lambda table: table.put("k", "x" * 1_000_000), "keep it within"),
        (lambda table: table.update("k", 1), "function"),
        (lambda table: table.add("k", "1"), "number"),
        (lambda table: table.add("k", True), "number"),
    ],
)
def test_mistakes(bench: Bench, call: Any, says: str) -> None:
    """What cannot be an entry is refused where it is put, with the remedy."""
    with pytest.raises(ConfigError, match=says):
        call(bench.row().table("counts"))


def test_what_is_no_json(bench: Bench) -> None:
    """A value without a JSON form is refused where it is put."""
    with pytest.raises(BadRowError, match="cannot be written as JSON"):
        bench.row().table("counts").put("k", object())


def test_undeclared(bench: Bench) -> None:
    """A table that nobody declared is an error that shows the declaration."""
    with pytest.raises(ConfigError, match=r"pipeline\.table\('nope'\); there are counts, seen"):
        bench.row().table("nope")


Step = tuple[str, str, int]
steps = st.lists(
    st.tuples(st.sampled_from(["put", "delete", "add", "commit"]), st.sampled_from("abcd"), st.integers(0, 99)),
    max_size=60,
)


@given(steps)
def test_store_and_changelog_agree(script: list[Step]) -> None:
    """After any writes and commits: store, fold of the changelog, a store restored from it, and a dict are equal."""
    bench, oracle, log = Bench(), dict[str, int](), list[StoredRecord]()
    for what, key, number in [*script, ("commit", "", 0)]:
        if what == "commit":
            taken = bench.tables.take()
            for out in bench.tables.records(taken, NOW):
                log.append(StoredRecord("c", 0, len(log), out.timestamp, out.key, out.value))
            bench.tables.written(len(log), NOW)
            bench.tables.forget_taken()
            continue
        row = bench.row()
        table = row.table("counts")
        if what == "put":
            table.put(key, number)
            oracle[key] = number
        elif what == "delete":
            table.delete(key)
            oracle.pop(key, None)
        else:
            table.add(key, number)
            oracle[key] = oracle.get(key, 0) + number
        bench.complete(row)
    restored = Bench()
    restored.tables.load(log, len(log))
    fold = {record.key: record.value for record in log}
    assert {key.decode()[7:]: loads(value) for key, value in fold.items() if key and value} == oracle
    assert {k: v for k, v in restored.content.items() if k != b"\0about"} == {
        k: v for k, v in bench.content.items() if k != b"\0about"
    }
    assert dict(bench.row().table("counts").scan()) == oracle
    assert restored.tables.position == len(log)
    assert dumps(oracle)
