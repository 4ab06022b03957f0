"""What a partition makes of its changelog and its local tables when it begins, and when something breaks midway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from rowmill import CheckpointError, Pipeline, StalledError, Worker
from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from rowmill.state.codec import dumps, loads
from rowmill.state.memory import MemoryStore, MemoryStores
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.state.store import Change, Store, StoreError
from rowmill.state.table import restamp
from rowmill.state.tables import PartitionTables
from rowmill.streams.options import WorkerOptions
from rowmill.streams.transaction import CheckpointMovedError
from support.fake_broker import FakeBroker, lost
from support.fake_clock import FakeClock

GROUP, CHANGELOG = "rowmill.p", TopicPartition("rowmill.p.in.changelog", 0)

pytestmark = pytest.mark.timeout(30)


async def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait for something that a worker brings about."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


class Bench:
    """A broker with one partition of rows, and workers for a pipeline over it."""

    def __init__(self) -> None:
        self.broker = FakeBroker()
        (self.tp,) = self.broker.make("in")
        self.stores = MemoryStores()
        self.clock = FakeClock()

    def put(self, *rows: dict[str, Any]) -> None:
        """Publish rows, each under its name ``k`` as key."""
        for row in rows:
            self.broker.write(self.tp, dumps(row), key=str(row.get("k", row["n"])).encode())

    def found(self) -> list[dict[str, Any]]:
        """The results."""
        return [loads(value or b"") for value in self.broker.values("out")] if "out" in self.broker._topics else []

    def letters(self) -> list[str]:
        """The dead letters' types."""
        if "p.dlq" not in self.broker._topics:
            return []
        return [(dict(r.headers)["rowmill.error.type"] or b"").decode() for r in self.broker.records("p.dlq")]

    def record(self) -> CheckpointRecord:
        """The changelog's last checkpoint."""
        records = [r for r in self.broker.records(CHANGELOG.topic) if r.key == CHECKPOINT_KEY]
        return CheckpointRecord.decode(records[-1].value or b"")

    def worker(
        self, handler: Any, *, tables: bool = True, stores: Any = None, start: Any = "earliest", **options: Any
    ) -> Worker:
        """A worker that is not started."""
        pipeline = Pipeline("p", source="in", sink="out", start=start).add(handler, name="stage")
        if tables:
            pipeline.table("t")
        settings = WorkerOptions(**{"commit_interval": 0.001, **options})
        stores = stores or self.stores
        return Worker(pipeline, self.broker, options=settings, clock=self.clock, stores=stores, steered=False)

    @asynccontextmanager
    async def running(self, handler: Any, **options: Any) -> AsyncIterator[Worker]:
        """A worker at work; it must end well."""
        worker = self.worker(handler, **options)
        running = asyncio.create_task(worker.run())
        try:
            await until(lambda: any(task.running for task in worker._tasks.values()) or running.done())
            yield worker
        finally:
            worker.stop()
            await asyncio.wait_for(running, 10)

    async def life(self, handler: Any, *rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        """A worker's whole life: it takes these rows, commits and stops; their results."""
        before = len(self.found())
        self.put(*rows)
        async with self.running(handler, **options):
            await until(lambda: len(self.found()) == before + len(rows))
        return self.found()[before:]


@pytest.fixture
def bench() -> Bench:
    """A fresh one."""
    return Bench()


def keep(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
    """Puts or deletes an entry, and tells which there are."""
    table = ctx.table("t")
    if row.get("gone"):
        table.delete(row["k"])
    else:
        table.put(row["k"], row["n"])
    return {"n": row["n"], "all": sorted(table)}


async def test_latest_is_looked_up_once(bench: Bench) -> None:
    """The row that came after the first look is run, although the first commit of rows failed and the task restarts."""
    bench.put({"n": 0})
    async with bench.running(lambda row: row, tables=False, start="latest") as worker:
        bench.broker.inject("begin", CheckpointMovedError("as after an ambiguous failure"))
        bench.put({"n": 1})
        await until(lambda: bench.broker.starts[f"{GROUP}/in/0"] > 1)
        bench.put({"n": 2})
        await until(lambda: worker.stats.rows == 2)
    assert [row["n"] for row in bench.found()] == [1, 2]


async def test_at_least_once_begins_again_after_a_failed_first_commit(bench: Bench) -> None:
    """A first commit of offsets that fails leaves no changelog without a group, which would be refused for ever."""
    bench.broker.inject("commit", lost(), skip=1)
    assert len(await bench.life(keep, {"n": 0, "k": "a"}, guarantee="at_least_once")) >= 1
    assert bench.broker.group_offsets[GROUP][bench.tp] == Committed(1)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_a_changelog_made_anew(bench: Bench, guarantee: str) -> None:
    """Tables of a former changelog are not taken for warm, though the new one is longer than their position."""
    other = MemoryStores()
    await bench.life(keep, *({"n": n, "k": f"old{n}"} for n in range(3)), stores=other, guarantee=guarantee)
    await bench.broker.delete_topics([CHANGELOG.topic])
    await bench.broker.delete_groups([GROUP])
    bench.broker.make("in")
    for n in range(5):
        await bench.life(keep, {"n": n, "k": f"new{n}"})
    (result,) = await bench.life(keep, {"n": 9, "k": "last"}, stores=other, guarantee=guarantee)
    assert result["all"] == ["last", "new0", "new1", "new2", "new3", "new4"]


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_begun_anew(bench: Bench, guarantee: str) -> None:
    """Who deletes the group and the changelog, as errors tell to, begins anew, whatever lies on this disk."""
    await bench.life(keep, {"n": 0, "k": "a"}, guarantee=guarantee)
    await bench.broker.delete_topics([CHANGELOG.topic])
    await bench.broker.delete_groups([GROUP])
    bench.put({"n": 1, "k": "b"})
    async with bench.running(keep, guarantee=guarantee):
        await until(lambda: len(bench.found()) == 3)
    assert [row["all"] for row in bench.found()[1:]] == [["a"], ["a", "b"]]


async def test_tables_whose_place_nobody_knows(bench: Bench) -> None:
    """A store with content and without a position, as a commit without an answer left it, is restored in full."""
    await bench.life(keep, {"n": 0, "k": "a"})
    tables = PartitionTables(bench.stores.open(GROUP, bench.tp), {})
    tables._store.write([(b"\x00position", None), (b"t/ghost", restamp(b"1", 0))])
    tables.close()
    (result,) = await bench.life(keep, {"n": 1, "k": "b"})
    assert result["all"] == ["a", "b"]


class CutOff(MemoryStores):
    """Stores that count the entries they are given, and fail once, amid them."""

    def __init__(self, after: int, then: Callable[[], None]) -> None:
        super().__init__()
        self.entries = 0
        self._after = after
        self._then: Callable[[], None] | None = then

    def open(self, group: str, tp: TopicPartition) -> Store:
        store = super().open(group, tp)
        write = store.write

        def count(changes: Iterable[Change]) -> None:
            changes = list(changes)
            if self._then is not None and self.entries > self._after:
                then, self._then = self._then, None
                then()
                raise StoreError("No space left on device", damaged=False)
            self.entries += sum(key.startswith(b"t/") for key, _ in changes)
            write(changes)

        store.write = count  # type: ignore[method-assign]
        return store


@pytest.mark.parametrize("anew", [False, True])
async def test_a_restore_goes_on(bench: Bench, anew: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a long restore brought before it was cut off is not brought again, unless the changelog is another by then.

    The changelog is compacted: there is one checkpoint in it, at its end.
    """
    monkeypatch.setattr("rowmill.streams.partition_state._LONG_RESTORE_SECONDS", -1.0)
    count = 25_000
    await bench.life(keep, {"n": 0, "k": "a"})
    log, record = bench.broker.log(CHANGELOG), bench.record()
    log.records = []
    log.append(CHANGELOG, [Outgoing(f"t/{n:05}".encode(), b"1", 0) for n in range(count)])
    log.append(CHANGELOG, [Outgoing(CHECKPOINT_KEY, record.encode(), 0)])

    def make_another() -> None:
        if anew:
            log.records.pop()
            log.append(CHANGELOG, [Outgoing(CHECKPOINT_KEY, replace(record, generation="another").encode(), 0)])

    stores = CutOff(12_000, make_another)
    (result,) = await bench.life(keep, {"n": 1, "k": "b"}, stores=stores)
    assert len(result["all"]) == count + 1
    assert (stores.entries > count + 10_000) is anew


async def test_a_restore_that_takes_long_is_shown(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without -v, since rows wait for it: how far it is, and when it is done."""
    await bench.life(keep, {"n": 0, "k": "a"})
    record, log = bench.record(), bench.broker.log(CHANGELOG)
    log.records = []
    log.append(CHANGELOG, [Outgoing(f"t/{n:05}".encode(), b"1", 0) for n in range(24_999)])
    log.append(CHANGELOG, [Outgoing(CHECKPOINT_KEY, record.encode(), 0)])
    monkeypatch.setattr("rowmill.streams.restore._TELL_SECONDS", -1.0)
    await bench.life(keep, {"n": 1, "k": "b"}, stores=MemoryStores())
    told = [message for message in caplog.messages if "restored" in message]
    assert [f"restored: {part}" in line for part, line in zip(("40 %", "80 %", "100 %"), told, strict=False)] == [
        True
    ] * 3
    assert "tables restored: 25000 records" in told[-1]
    assert all(r.levelname == "WARNING" for r in caplog.records if "restored" in r.message)


async def test_a_changelog_that_was_deleted(bench: Bench) -> None:
    """With tables on this disk and a committed offset, an empty changelog is an error, not empty tables."""
    await bench.life(keep, {"n": 0, "k": "a"})
    await bench.broker.delete_topics([CHANGELOG.topic])
    bench.put({"n": 1, "k": "b"})
    with pytest.raises(CheckpointError, match="it was deleted"):
        await bench.worker(keep).run()


async def test_a_restore_that_was_cut_off(bench: Bench) -> None:
    """A store that has a position and no date, as a kill amid its first restore once left it, is restored in full."""
    await bench.life(keep, {"n": 0, "k": "a"})
    position = bench.broker.log(CHANGELOG).high_watermark
    bench.stores.remove(GROUP, bench.tp)
    half = PartitionTables(bench.stores.open(GROUP, bench.tp), {})
    half.load([], position)
    half.close()
    (result,) = await bench.life(keep, {"n": 1, "k": "b"})
    assert result["all"] == ["a", "b"]


@pytest.mark.parametrize(("hours", "wiped"), [(1, False), (25, True)])
async def test_tables_that_were_away(bench: Bench, hours: int, wiped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that were in use a while ago are warm; after a day they may have missed deletions and are restored."""
    await bench.life(keep, {"n": 0, "k": "a"})
    removed: list[Any] = []
    really = bench.stores.remove

    def remove(group: str, tp: TopicPartition) -> None:
        removed.append(tp)
        really(group, tp)

    monkeypatch.setattr(bench.stores, "remove", remove)
    bench.clock.advance(hours * 3_600)
    (result,) = await bench.life(keep, {"n": 1, "k": "b"})
    assert (result["all"], bool(removed)) == (["a", "b"], wiped)


async def test_a_long_life_counts_as_use(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ran for more than a day does not restore everything at its next start."""
    bench.put({"n": 0, "k": "a"})
    async with bench.running(keep):
        await until(lambda: len(bench.found()) == 1)
        bench.clock.advance(25 * 3_600)
        bench.put({"n": 1, "k": "b"})
        await until(lambda: len(bench.found()) == 2)
    monkeypatch.setattr(bench.stores, "remove", lambda *_: pytest.fail("the tables were wiped"))
    (result,) = await bench.life(keep, {"n": 2, "k": "c"})
    assert result["all"] == ["a", "b", "c"]


async def test_a_lookup_that_fails_is_no_rows_fault(bench: Bench) -> None:
    """A broker that does not answer while a row's tables are settled restarts the partition; no row is buried."""

    tried: list[int] = []

    def handler(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        tried.append(row["n"])
        if row["n"] == 0:
            ctx.emit("side", row)
            ctx.table("t").put("k", 1)
            if tried == [0]:
                bench.broker.inject("topics", lost())
        else:
            ctx.table("t").put("k", 2)
        return row

    assert len(await bench.life(handler, {"n": 0, "k": "a"}, {"n": 1, "k": "a"})) == 2
    assert (bench.letters(), tried) == ([], [0, 1, 0, 1])


async def test_orderly_stops_are_no_deaths(bench: Bench) -> None:
    """A row that outlasts every drain_timeout is not buried, however often its worker is stopped in order."""
    bench.put({"n": 0}, {"n": 1})

    async def slow(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 1:
            await asyncio.Event().wait()
        return row

    for _ in range(5):
        async with bench.running(slow, tables=False, drain_timeout=0.01) as worker:
            await until(partial(_is_stuck, bench, worker))
        assert bench.record().stopped
    assert (bench.letters(), bench.record().starts) == ([], {})


def _is_stuck(bench: Bench, worker: Worker) -> bool:
    return worker._in_flight.rows == 1 and bool(bench.found())


@pytest.mark.parametrize("cost", [(1, 2**64), (1, -1), (0.5, 0), ("x", 0), (Decimal(10) ** 50, 0)])
async def test_a_cost_that_is_none(bench: Bench, cost: tuple[Any, Any]) -> None:
    """A number that cannot be kept fails the row that named it, never the partition."""

    def handler(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        if row["n"] == 0:
            ctx.add_cost(*cost)
        return row

    bench.put({"n": 0}, {"n": 1})
    async with bench.running(handler, tables=False):
        await until(lambda: bench.found() and bench.letters())
    assert ([row["n"] for row in bench.found()], bench.letters()) == ([1], ["ConfigError"])


class BrokenOnce(MemoryStores):
    """Stores whose first read of a table's entry fails."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = False

    def open(self, group: str, tp: TopicPartition) -> Store:
        store = super().open(group, tp)
        read = store.get

        def get(key: bytes) -> bytes | None:
            if key.startswith(b"t/") and not self.failed:
                self.failed = True
                raise StoreError("Corruption: bad block", damaged=True)
            return read(key)

        store.get = get  # type: ignore[method-assign]
        return store


async def plainly(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
    """Reads as handlers do."""
    return {**row, "seen": ctx.table("t").get("k", 0)}


async def in_a_group(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
    """Reads where asyncio wraps what is raised."""
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(plainly(row, ctx))
    return reading.result()


async def with_a_net(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
    """Reads where everything is caught."""
    try:
        return await plainly(row, ctx)
    except BaseException:  # noqa: BLE001 - that is the point
        return {**row, "seen": "a guess"}


@pytest.mark.parametrize("handler", [plainly, in_a_group, with_a_net])
async def test_a_store_that_breaks_midway(bench: Bench, handler: Any) -> None:
    """Damage that a handler meets restarts the partition with restored tables; no row is made from a wrong answer."""
    stores = BrokenOnce()
    assert await bench.life(handler, {"n": 0}, stores=stores) == [{"n": 0, "seen": 0}]
    assert (bench.letters(), stores.failed) == ([], True)


class Hopeless(MemoryStores):
    """Stores that cannot be opened, nor be set aside."""

    def open(self, group: str, tp: TopicPartition) -> Store:
        raise StoreError("Input/output error", damaged=True)

    def set_aside(self, group: str, tp: TopicPartition) -> str:
        raise StoreError("Read-only file system", damaged=False)


async def test_a_disk_that_is_lost(bench: Bench) -> None:
    """A store that can neither be opened nor set aside ends the worker with the reason, after stall_timeout."""
    bench.put({"n": 0, "k": "a"})
    with pytest.raises(StalledError, match="Input/output error"):
        await bench.worker(keep, stores=Hopeless(), stall_timeout=1).run()


async def test_the_record_of_another_is_not_ours(bench: Bench) -> None:
    """A commit without an answer, after which another worker committed just as far, is not taken for ours."""
    bench.put({"n": 0, "k": "a"})
    taken_over = Bench()
    taken_over.broker = bench.broker

    def another() -> None:
        record = bench.record()
        bench.broker.log(CHANGELOG).append(CHANGELOG, [_record_of_another(record)])
        bench.broker.group_offsets[GROUP][bench.tp] = Committed(1)

    bench.broker.inject("end", lost(), skip=2, then=another)  # the first two settle the beginning, and say who runs
    async with bench.running(keep):
        await until(lambda: bench.broker.starts[f"{GROUP}/in/0"] > 2)
    assert bench.found() == [], "the other worker's rows are its own business"
    assert dict(bench.stores._contents[GROUP, bench.tp]).get(b"t/a") is None


def _record_of_another(record: CheckpointRecord) -> Any:
    return Outgoing(CHECKPOINT_KEY, replace(record, offset=1, owner="somebody else").encode(), 0)


def test_a_checkpoint_record_survives(bench: Bench) -> None:
    """A record is read as it was written; a newer version, or rubbish, is an error that says so."""
    record = CheckpointRecord(5, 7, True, (4, 99), {"rows": 3}, {"a": 1}, {4: 2}, "me", "first")
    assert CheckpointRecord.decode(record.encode()) == record
    newer = record.encode().replace(b'"version":1', b'"version":3')
    with pytest.raises(CheckpointError, match="version 3; this rowmill reads 1 and 2"):
        CheckpointRecord.decode(newer)
    for rubbish in (b"", b"[]", b"{}", b'{"version":1}', b"nonsense"):
        with pytest.raises(CheckpointError):
            CheckpointRecord.decode(rubbish)
    assert MemoryStore().get(b"x") is None
