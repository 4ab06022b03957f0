"""Replay: what is planned, what a move leaves behind, and what becomes of it when it is interrupted."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from rowmill import Pipeline, Session, Worker, WorkerOptions
from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from rowmill.state.codec import dumps, loads
from rowmill.state.errors import ConfigError
from rowmill.state.memory import MemoryStores
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.cli import cmd_diff, cmd_replay
from rowmill.streams.cli.parser import Parser
from rowmill.streams.compare import ABSENT, compare
from rowmill.streams.errors import (
    BrokerError,
    CheckpointError,
    FencedError,
    GroupBusyError,
    SessionError,
    TopicError,
)
from rowmill.streams.offset_times import (
    Place,
    parse_duration,
    parse_moment,
    parse_offsets,
    parse_place,
    parse_shift,
    parse_topics,
)
from rowmill.streams.offsets import OffsetMap, decode_map, encode_map
from rowmill.streams.rebuild import standing
from rowmill.streams.replay import Replay, Target
from rowmill.streams.side_replay import Asked, EarlyEnd, open_range, stored_range
from rowmill.streams.transaction import Transactor
from support.fake_broker import FakeBroker

T = TopicPartition
LIVE = Session("p")
CHANGELOG = "rowmill.p.in.changelog"

pytestmark = pytest.mark.timeout(60)


# --- what people write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("P7D", 7 * 86_400_000),
        ("PT1H30M", 5_400_000),
        ("P1DT12H", 129_600_000),
        ("PT0.5S", 500),
        ("pt10s", 10_000),
        ("+PT1M", 60_000),
        ("PT0S", 0),
    ],
)
def test_durations(text: str, milliseconds: int) -> None:
    """Durations of days, hours, minutes and seconds are read as ISO 8601 has them."""
    assert parse_duration("--by-duration", text) == milliseconds


@pytest.mark.parametrize("text", ["", "P", "PT", "P1Y", "P1M", "1H", "-PT1H", "PT1H ", "P1DT", "PTS", "P99999999D"])
def test_durations_that_are_none(text: str) -> None:
    """Anything else is refused by the name of its option."""
    with pytest.raises(ConfigError, match="--by-duration"):
        parse_duration("--by-duration", text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("earliest", Place("earliest")),
        ("end", Place("end")),
        ("latest", Place("end")),
        ("17", Place("offset", 17)),
        ("2025-06-15T12:00:00Z", Place("time", 1_749_988_800_000)),
        ("2025-06-15T14:00:00.250+02:00", Place("time", 1_749_988_800_250)),
    ],
)
def test_places(text: str, place: Place) -> None:
    """Ends, offsets and moments are told apart."""
    assert parse_place("--from", text) == place


@pytest.mark.parametrize("text", ["", "-1", "yesterday", "12:00", "²", "1" * 30])
def test_places_that_are_none(text: str) -> None:
    """Anything else is refused, also an offset that no log can have."""
    with pytest.raises(ConfigError, match="--from"):
        parse_place("--from", text)


@pytest.mark.parametrize("text", ["1.5", "", "--3", "1" * 25, "9223372036854775808"])
def test_shifts_that_are_none(text: str) -> None:
    """A shift is a whole number that an offset can hold."""
    with pytest.raises(ConfigError):
        parse_shift("--shift-by", text)
    assert (parse_shift("--shift-by", "+5"), parse_shift("--shift-by", "-5")) == (5, -5)


def test_moments_before_1970_are_refused() -> None:
    """No record is as old."""
    with pytest.raises(ConfigError):
        parse_moment("--to-datetime", "1960-01-01T00:00:00Z")


def test_topics_with_partitions() -> None:
    """Partitions add up, and a topic by itself means all of them."""
    assert parse_topics("--topic", ["a:0,2", "a:1", "b"], ["a", "b"]) == {"a": frozenset({0, 1, 2}), "b": None}
    for wrong in ("c", "a:", "a:x", "a:1,"):
        with pytest.raises(ConfigError):
            parse_topics("--topic", [wrong], ["a"])


def test_offsets_of_a_file() -> None:
    """Lines as Kafka's tool writes them; a wrong or doubled one is named by its number."""
    lines = ["topic,partition,offset", "a,0,5", "", '"a",1,7']
    assert parse_offsets("--from-file", "f.csv", lines) == {T("a", 0): 5, T("a", 1): 7}
    for wrong in (["a,0"], ["a,0,-1"], ["a,0,1", "a,0,2"], ["a,x,1"], []):
        with pytest.raises(ConfigError, match="--from-file"):
            parse_offsets("--from-file", "f.csv", wrong)


# --- planning --------------------------------------------------------------------------------------------------


def broker_with(rows: int = 10, committed: Committed | None = None, partitions: int = 1) -> FakeBroker:
    """A source ``in`` with rows in each partition, and what the live group committed in each."""
    broker = FakeBroker()
    for tp in broker.make("in", partitions):
        broker.write(tp, *(dumps({"n": n}) for n in range(rows)))
        if committed is not None:
            broker.group_offsets.setdefault(LIVE.group, {})[tp] = committed
    return broker


def replaying(broker: FakeBroker, target: Target, **options: Any) -> Replay:
    """A replay of the live session that waits for nothing long."""
    return Replay(broker, LIVE, ["in"], target, options=WorkerOptions(broker_timeout=5), **options)


AT_6 = Committed(6)
MAP = Committed(4, encode_map(OffsetMap(4, 9, (4, 7))))  # 5, 6 and 8 are done as well


@pytest.mark.parametrize(
    ("target", "committed", "to", "again", "skipped"),
    [
        (Target("earliest"), AT_6, 0, 6, 0),
        (Target("latest"), AT_6, 10, 0, 4),
        (Target("current"), AT_6, 6, 0, 0),
        (Target("offset", 2), AT_6, 2, 4, 0),
        (Target("offset", 99), AT_6, 10, 0, 4),
        (Target("shift", -2), AT_6, 4, 2, 0),
        (Target("shift", -99), AT_6, 0, 6, 0),
        (Target("shift", 3), AT_6, 9, 0, 3),
        (Target("file", offsets={T("in", 0): 1}), AT_6, 1, 5, 0),
        (Target("time", 1 << 60), AT_6, 10, 0, 4),
        (Target("time", 0), AT_6, 0, 6, 0),
        (Target("current"), MAP, 4, 3, 0),
        (Target("earliest"), MAP, 0, 7, 0),
        (Target("offset", 6), MAP, 6, 2, 1),
        (Target("offset", 8), MAP, 8, 1, 2),
        (Target("latest"), MAP, 10, 0, 3),
        (Target("offset", 3), None, 3, 0, 3),
        (Target("shift", -3), None, None, 0, 0),
        (Target("current"), None, None, 0, 0),
    ],
)
async def test_plans(target: Target, committed: Committed | None, to: int | None, again: int, skipped: int) -> None:
    """Targets are clamped to the log; rows that the map knows as done count on the right side."""
    broker = broker_with(10, committed)
    before = dict(broker.group_offsets)
    [move] = await replaying(broker, target).plan()
    assert (move.to, move.run_again, move.skipped) == (to, again, skipped)
    assert broker.group_offsets == before
    assert not broker.starts, "a plan fences nobody"


async def test_a_log_that_lost_its_beginning() -> None:
    """Targets below retention are the first row, and rows that are gone count on neither side."""
    broker = broker_with(10, Committed(1))
    broker.truncate(T("in", 0), 4)
    [move] = await replaying(broker, Target("offset", 2)).plan()
    assert (move.before, move.to, move.run_again, move.skipped) == (1, 4, 0, 0)


@pytest.mark.parametrize("state", ["keep", "rebuild"])
async def test_a_map_that_cannot_be_read(state: Any) -> None:
    """It is what a replay can mend: the plan says so, counts what may run again, and the move discards it."""
    broker = broker_with(10, Committed(4, "?"))
    [move] = await replaying(broker, Target("current"), state=state).plan()
    assert "cannot be read" in move.note
    assert (move.run_again, move.discarded, move.kept_map) == (6, 6, "")
    [move] = await replaying(broker, Target("offset", 1), state=state).plan()
    assert (move.run_again, move.skipped) == (9, 0)
    [move] = await replaying(broker, Target("offset", 7), state=state).plan()
    assert (move.run_again, move.skipped) == (3, 3), "at most"
    await replaying(broker, Target("current")).execute()
    assert broker.group_offsets[LIVE.group][T("in", 0)] == Committed(4)


async def test_what_is_not_there() -> None:
    """An unknown source and an unknown partition are named; nothing is touched."""
    broker = broker_with()
    with pytest.raises(TopicError, match="'absent'"):
        await Replay(broker, LIVE, ["absent"], Target("earliest")).plan()
    with pytest.raises(ConfigError, match="in/7"):
        await replaying(broker, Target("earliest"), only={"in": frozenset({7})}).plan()
    with pytest.raises(ConfigError, match="in/3"):
        await replaying(broker, Target("file", offsets={T("in", 3): 0})).plan()


# --- moving ----------------------------------------------------------------------------------------------------


def counting() -> Pipeline:
    """Numbers rows by their key, from a table."""
    pipeline = Pipeline("p", source="in", sink="out").table("counts")

    @pipeline.stage
    def number(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        table = ctx.table("counts")
        table.put("all", table.get("all", 0) + 1)
        return {**row, "number": table.get("all")}

    return pipeline


async def work(broker: FakeBroker, stores: MemoryStores, guarantee: Any = "exactly_once") -> Worker:
    """A live worker to the present end."""
    options = WorkerOptions(broker_timeout=5, guarantee=guarantee)
    worker = Worker(counting(), broker, stores=stores, options=options)
    worker.finish_at(await broker.offsets(broker.partitions("in"), "high_watermark"))
    async with asyncio.timeout(20):
        await worker.run()
    return worker


def numbers(broker: FakeBroker, topic: str = "out") -> list[tuple[int, int]]:
    """Row and number of each result, as they came."""
    return [(row["n"], row["number"]) for row in (loads(value) for value in broker.values(topic) if value)]


def last_record(broker: FakeBroker, partition: int = 0) -> CheckpointRecord:
    """The changelog's newest checkpoint."""
    records = [r for r in broker.records(CHANGELOG) if r.partition == partition and r.key == CHECKPOINT_KEY]
    return CheckpointRecord.decode(records[-1].value or b"")


@pytest.mark.parametrize(
    ("state", "expected"), [("keep", [(2, 5), (3, 6)]), ("reset", [(2, 1), (3, 2)])], ids=["keep", "reset"]
)
@pytest.mark.parametrize("disk", ["kept", "lost"])
@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_rows_run_again(state: Any, expected: list[tuple[int, int]], disk: str, guarantee: Any) -> None:
    """The rows behind the target run once more, on tables as they were or emptied, whatever the disk remembers."""
    broker, stores = broker_with(4), MemoryStores()
    await work(broker, stores, guarantee)
    assert numbers(broker) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    former = last_record(broker)
    execution = await replaying(broker, Target("offset", 2), state=state).execute()
    assert [(move.to, move.run_again) for move in execution.moved] == [(2, 2)]
    record = last_record(broker)
    assert record.agrees_with(Committed(2))
    assert record.counts == former.counts
    assert (record.generation == former.generation) == (state == "keep")
    worker = await work(broker, stores if disk == "kept" else MemoryStores(), guarantee)
    assert worker.stats.rows == 2
    assert numbers(broker)[4:] == expected
    assert last_record(broker).counts["rows"] == 6, "rows that run again count again"


async def test_a_session_that_never_ran() -> None:
    """Its position can be set before its first worker, which begins there."""
    broker = broker_with(4)
    execution = await replaying(broker, Target("offset", 3)).execute()
    assert [move.to for move in execution.moved] == [3]
    await work(broker, MemoryStores())
    assert numbers(broker) == [(3, 1)]


async def test_a_group_that_forgot() -> None:
    """Where a worker refuses to start because the offsets expired, a replay is the remedy."""
    broker, stores = broker_with(4), MemoryStores()
    await work(broker, stores)
    broker.group_offsets.clear()
    with pytest.raises(CheckpointError):
        await work(broker, stores)
    await replaying(broker, Target("offset", 3)).execute()
    await work(broker, stores)
    assert numbers(broker)[4:] == [(3, 5)]


async def test_a_source_that_was_made_anew() -> None:
    """The row by which the old topic was known is forgotten, so that a worker takes the new one."""
    broker, stores = broker_with(4), MemoryStores()
    await work(broker, stores)
    await broker.delete_topics(["in"])
    broker.make("in", 1)
    broker.write(T("in", 0), dumps({"n": 9}))
    await replaying(broker, Target("earliest"), state="reset").execute()
    assert last_record(broker).witness is None
    await work(broker, stores)
    assert numbers(broker)[4:] == [(9, 1)]


async def test_a_zombie_is_fenced() -> None:
    """Whoever still holds a transaction of the partition cannot end it any more."""
    broker = broker_with(4, Committed(2))
    broker.make(CHANGELOG, 1)
    zombie = broker.transactional_producer(LIVE.transactional_id(T("in", 0)))
    await zombie.start()
    await zombie.begin()
    await zombie.commit_offsets(LIVE.group, {T("in", 0): Committed(4)})
    await replaying(broker, Target("earliest")).execute()
    with pytest.raises(FencedError):
        await zombie.end()
    assert broker.group_offsets[LIVE.group][T("in", 0)] == Committed(0)


async def test_a_running_worker_keeps_a_replay_out() -> None:
    """With a member in the group nothing moves, and the error says what to do; the worker goes on."""
    broker = broker_with(4, partitions=2)
    pipeline = Pipeline("p", source="in", sink="out")
    pipeline.add(lambda row: {**row, "number": 0}, name="same")
    worker = Worker(pipeline, broker, options=WorkerOptions(broker_timeout=5))
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(20):
        while worker.stats.rows < 8:
            await asyncio.sleep(0.01)
        offsets = dict(broker.group_offsets[LIVE.group])
        with pytest.raises(GroupBusyError, match="Stop the workers"):
            await replaying(broker, Target("earliest")).execute()
        assert broker.group_offsets[LIVE.group] == offsets
        broker.write(T("in", 1), dumps({"n": 4}))
        while worker.stats.rows < 9:
            await asyncio.sleep(0.01)
        worker.stop()
        await running


@pytest.mark.parametrize("target", [Target("shift", -2), Target("offset", 3)], ids=["shift", "offset"])
async def test_an_execution_that_was_interrupted(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """Run again, it moves those partitions that it had not: none is shifted twice; and a third time shifts anew."""
    broker = broker_with(10, Committed(6), partitions=4)
    honest = Transactor.commit
    commits = 0

    async def dying(self: Any, *args: Any) -> Any:
        nonlocal commits
        commits += 1
        if commits > 2:
            raise BrokerError("killed")
        return await honest(self, *args)

    monkeypatch.setattr(Transactor, "commit", dying)
    execution = await replaying(broker, target).execute()
    assert (len(execution.moved), len(execution.failed)) == (2, 2)
    monkeypatch.undo()

    def positions() -> set[int]:
        return {offset.offset for offset in broker.group_offsets[LIVE.group].values()}

    goal = 4 if target.how == "shift" else 3
    assert positions() == {6, goal}
    plan = await replaying(broker, target).plan()
    assert {move.to for move in plan} == {goal}
    execution = await replaying(broker, target).execute()
    assert not execution.failed
    assert positions() == {goal}
    await replaying(broker, target).execute()
    assert positions() == {2 if target.how == "shift" else 3}
    broker.group_offsets[LIVE.group][T("in", 1)] = Committed(9)  # a worker was at work in some partitions only
    await replaying(broker, target).execute()
    moved = {tp.partition: done.offset for tp, done in broker.group_offsets[LIVE.group].items()}
    assert moved == ({0: 0, 1: 7, 2: 0, 3: 0} if target.how == "shift" else dict.fromkeys(range(4), 3))


async def test_another_session() -> None:
    """A session that reads the same sources can be moved as well; an unknown one, or a side replay, is none."""
    broker, other = broker_with(4, Committed(3)), Session("p", "b")
    moving = Replay(broker, other, ["in"], Target("earliest"))
    for act in (moving.plan, moving.execute):
        with pytest.raises(SessionError, match="no session 'b'"):
            await act()
    broker.group_offsets[other.group] = {T("in", 0): Committed(2)}
    assert [move.to for move in (await moving.execute()).moved] == [0]
    assert broker.group_offsets[LIVE.group] == {T("in", 0): Committed(3)}
    side = Session("p", "fix")
    await open_range(broker, side, ["in"], Asked(text="x"), has_tables=False)
    with pytest.raises(SessionError, match="side replay"):
        await Replay(broker, side, ["in"], Target("earliest")).plan()


async def test_one_partition_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others move, and the failed one is told with its reason."""
    broker = broker_with(4, Committed(2), partitions=3)
    broker.make(CHANGELOG, 3)
    broker.write(T(CHANGELOG, 1), b'{"version": 99}', key=CHECKPOINT_KEY)
    execution = await replaying(broker, Target("earliest")).execute()
    assert [move.tp.partition for move in execution.moved] == [0, 2]
    assert list(execution.failed) == [T("in", 1)]


@pytest.mark.parametrize("took_effect", [True, False])
async def test_a_commit_whose_end_is_unknown(took_effect: bool) -> None:
    """Whether an unanswered commit took effect or not, the partition moves exactly once."""
    broker = broker_with(10, Committed(6))
    broker.inject("end", BrokerError("no answer"), took_effect=took_effect, skip=1)  # the first one notes the replay
    execution = await replaying(broker, Target("shift", -2)).execute()
    assert not execution.failed
    assert broker.group_offsets[LIVE.group][T("in", 0)] == Committed(4)
    assert sum(record.key == CHECKPOINT_KEY for record in broker.records(CHANGELOG)) == 1


@pytest.mark.parametrize("took_effect", [True, False])
@pytest.mark.parametrize("which", [0, 2])
async def test_a_note_whose_end_is_unknown(which: int, took_effect: bool) -> None:
    """A shift that cannot note its beginning or its end says so; run again, it has moved the partition once."""
    broker = broker_with(10, Committed(6))
    broker.inject("end", BrokerError("no answer"), took_effect=took_effect, skip=which)
    with pytest.raises(BrokerError):
        await replaying(broker, Target("shift", -2)).execute()
    if which == 0 or not took_effect:
        assert not (await replaying(broker, Target("shift", -2)).execute()).failed
    assert broker.group_offsets[LIVE.group][T("in", 0)] == Committed(4)


# --- tables made again -----------------------------------------------------------------------------------------


def speaking() -> Pipeline:
    """Counts rows in a table; odd ones are dropped, each third is emitted as well, each fifth fails."""
    pipeline = Pipeline("p", source="in", sink="out", ordering="partition").table("counts")

    @pipeline.stage
    def number(row: dict[str, Any], ctx: Any) -> dict[str, Any] | None:
        table = ctx.table("counts")
        table.update("all", lambda count: (count or 0) + 1)
        table.put(str(row["n"]), row["n"])
        ctx.add_cost("0.5", tokens=2)
        if row["n"] % 3 == 0:
            ctx.emit("besides", {"n": row["n"]})
        if row["n"] % 5 == 4:
            raise ValueError("a fifth one")
        return None if row["n"] % 2 else row

    return pipeline


def speaking_flow() -> Pipeline:
    """The same, row by row."""
    pipeline = Pipeline("p", source="in", sink="out", keys="text").table("counts")
    [stage] = speaking().stages

    async def number(row: dict[str, Any], ctx: Any) -> Any:
        await asyncio.sleep(0)
        return stage.handler(row, ctx)

    pipeline.stage(number)
    return pipeline


async def work_on(pipeline: Pipeline, broker: FakeBroker, stores: MemoryStores, **options: Any) -> Worker:
    """A live worker to the present end."""
    worker = Worker(pipeline, broker, stores=stores, options=WorkerOptions(broker_timeout=5, **options))
    worker.finish_at(await broker.offsets(broker.partitions("in"), "high_watermark"))
    async with asyncio.timeout(20):
        await worker.run()
    return worker


def outside(broker: FakeBroker) -> dict[str, list[tuple[int, bytes]]]:
    """All that shows outside: where from, and what."""
    topics = {}
    for topic in ("out", "besides", "p.dlq"):
        with contextlib.suppress(KeyError):
            topics[topic] = [(_source_of(r), r.value or b"") for r in broker.records(topic)]
    return topics


def _source_of(record: Any) -> int:
    headers = dict(record.headers)
    source = headers.get("rowmill.source", b"///").decode().split("/")[2]
    return int(source or headers["rowmill.error.offset"])


def tables(broker: FakeBroker) -> dict[bytes, bytes]:
    """The fold of the changelog, without the checkpoint."""
    found: dict[bytes, bytes] = {}
    for record in broker.records(CHANGELOG):
        if record.key == CHECKPOINT_KEY:
            continue
        found.pop(record.key or b"", None)
        if record.value is not None:
            found[record.key or b""] = record.value
    return found


@pytest.mark.parametrize("target", [Target("offset", 7), Target("current"), Target("latest"), Target("earliest")])
@pytest.mark.parametrize("make", [speaking, speaking_flow], ids=["lots", "flow"])
@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
async def test_tables_are_made_again(target: Target, make: Any, guarantee: Any) -> None:
    """Rows before the target run for their tables and their cost alone; the tables end as those of a fresh run."""
    broker, stores = broker_with(13), MemoryStores()
    options = {"guarantee": guarantee, "create_topics": True}
    await work_on(make(), broker, stores, **options)
    broker.write(T("in", 0), *(dumps({"n": n}) for n in range(13, 20)))
    before, first = outside(broker), last_record(broker)
    [move] = await replaying(broker, target, state="rebuild").plan()
    execution = await replaying(broker, target, state="rebuild").execute()
    assert execution.moved == [move]
    assert outside(broker) == before
    worker = await work_on(make(), broker, MemoryStores(), **options)
    to = move.to or 0
    fresh = broker_with(20)
    await work_on(make(), fresh, MemoryStores(), **options)
    for topic, found in outside(broker).items():
        expected = before[topic] + [each for each in outside(fresh)[topic] if each[0] >= to]
        assert sorted(found) == sorted(expected), topic
    assert tables(broker) == tables(fresh)
    assert (worker.stats.rows, worker.stats.rebuilt, move.rebuilt) == (20 - to, to, to)
    last, other = last_record(broker), last_record(fresh)
    assert last.rebuild_until is None
    assert last.agrees_with(Committed(20))
    assert Decimal(last.context["accumulated_cost"]) == Decimal("0.5") * 33, "what runs again is paid again"
    assert last.counts["rows"] == 13 + 20 - to
    assert last.counts.get("rebuilt", 0) == to
    assert last.counts["dead_letters"] == len(outside(broker)["p.dlq"])
    assert last.counts["emitted"] == len(outside(broker)["besides"])
    assert first.counts["results"] + other.counts["results"] >= last.counts["results"] == len(outside(broker)["out"])


@pytest.mark.parametrize("make", [speaking, speaking_flow], ids=["lots", "flow"])
async def test_rows_that_are_done_above_the_position(make: Any) -> None:
    """Made again where nothing moves, they keep silent as well, and only what was never done gives results."""
    broker = broker_with(10, MAP)
    [move] = await replaying(broker, Target("current"), state="rebuild").plan()
    assert (move.to, move.run_again, move.rebuilds_from, move.rebuilt) == (4, 0, 0, 7)
    await replaying(broker, Target("current"), state="rebuild").execute()
    await work_on(make(), broker, MemoryStores())
    fresh = broker_with(10)
    await work_on(make(), fresh, MemoryStores())
    for topic, found in outside(fresh).items():
        assert sorted(outside(broker)[topic]) == sorted(each for each in found if each[0] in {4, 7, 9}), topic
    assert tables(broker) == tables(fresh)
    assert last_record(broker).rebuild_until is None


async def half_made(make: Any, broker: FakeBroker) -> CheckpointRecord:
    """All 20 rows done, then made again up to 15, and stopped on the way."""
    await work_on(make(), broker, MemoryStores())
    await replaying(broker, Target("offset", 15), state="rebuild").execute()
    options = WorkerOptions(broker_timeout=5, fetch_rows=2, buffer_rows=2, max_in_flight=2)
    worker = Worker(make(), broker, stores=MemoryStores(), options=options)
    worker.finish_at({T("in", 0): 5})
    async with asyncio.timeout(20):
        await worker.run()
    record = last_record(broker)
    assert 5 <= record.offset < 15
    assert record.rebuild_until == 15
    return record


@pytest.mark.parametrize("make", [speaking, speaking_flow], ids=["lots", "flow"])
async def test_another_worker_goes_on_making_tables(make: Any) -> None:
    """What keeps silent is in every checkpoint: whoever takes the partition over knows it."""
    broker = broker_with(20)
    await half_made(make, broker)
    before = {topic: [source for source, _ in found] for topic, found in outside(broker).items()}
    await work_on(make(), broker, MemoryStores())
    for topic, found in outside(broker).items():
        again = [source for source, _ in found][len(before[topic]) :]
        assert sorted(again) == sorted(source for source in before[topic] if source >= 15)
    fresh = broker_with(20)
    await work_on(make(), fresh, MemoryStores())
    assert tables(broker) == tables(fresh)
    assert last_record(broker).counts["rebuilt"] == 15


async def test_moves_while_tables_are_half_made() -> None:
    """The position is where results stand; to keep such tables is refused, to make them anew or empty them is not."""
    broker = broker_with(20)
    record = await half_made(speaking, broker)
    with pytest.raises(ConfigError, match="rebuild or reset"):
        await replaying(broker, Target("current")).plan()
    failed = (await replaying(broker, Target("current")).execute()).failed
    assert list(failed) == [T("in", 0)]
    for state in ("rebuild", "reset"):
        [move] = await replaying(broker, Target("current"), state=state).plan()
        assert (move.before, move.to, move.run_again) == (record.offset, 15, 0)
        [move] = await replaying(broker, Target("shift", -5), state=state).plan()
        assert (move.to, move.run_again) == (10, 5)
    await replaying(broker, Target("shift", -5), state="rebuild").execute()
    assert (last_record(broker).rebuild_until, last_record(broker).offset) == (10, 0)
    await replaying(broker, Target("current"), state="reset").execute()
    assert (last_record(broker).rebuild_until, last_record(broker).offset) == (None, 10)


async def test_a_shift_that_rebuilds_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted and run again, partitions that went back to their first row are known by where they are to go."""
    broker = broker_with(10, Committed(6), partitions=4)
    honest, commits = Transactor.commit, 0

    async def dying(self: Any, *args: Any) -> Any:
        nonlocal commits
        commits += 1
        if commits > 2:
            raise BrokerError("killed")
        return await honest(self, *args)

    monkeypatch.setattr(Transactor, "commit", dying)
    await replaying(broker, Target("shift", -2), state="rebuild").execute()
    monkeypatch.undo()
    plan = await replaying(broker, Target("shift", -2), state="rebuild").plan()
    assert [(move.to, move.done) for move in plan] == [(4, True), (4, True), (4, False), (4, False)]
    assert not (await replaying(broker, Target("shift", -2), state="rebuild").execute()).failed
    assert {last_record(broker, partition).rebuild_until for partition in range(4)} == {4}


async def test_rows_that_tables_cannot_be_made_from() -> None:
    """A log that begins late is told; a pipeline that began at a moment makes its tables from there."""
    broker = broker_with(10, Committed(8))
    broker.truncate(T("in", 0), 4)
    [move] = await replaying(broker, Target("current"), state="rebuild").plan()
    assert (move.rebuilds_from, move.rebuilt, move.lost) == (4, 4, 4)
    [move] = await replaying(broker_with(10, AT_6), Target("current"), state="rebuild").plan()
    assert move.lost == 0
    broker = FakeBroker()
    broker.make("in")
    for n in range(4):
        broker.write(T("in", 0), dumps({"n": n}))  # at milliseconds that are their offsets
    moment = datetime.fromtimestamp(0.001, UTC)
    [move] = await replaying(broker, Target("latest"), state="rebuild", start=moment).plan()
    assert (move.rebuilds_from, move.rebuilt) == (1, 3)


async def test_a_row_that_kills_while_tables_are_made_again() -> None:
    """It is given up as ever, and is no dead letter once more."""
    broker = broker_with(3)
    await work_on(speaking(), broker, MemoryStores())
    await replaying(broker, Target("current"), state="rebuild").execute()
    record = last_record(broker)
    value = replace(record, starts={1: 3}, stopped=False, owner="dead").encode()
    broker.write(T(CHANGELOG, 0), value, key=CHECKPOINT_KEY)
    before = outside(broker)
    await work_on(speaking(), broker, MemoryStores())
    assert outside(broker) == before
    assert last_record(broker).agrees_with(Committed(3))


def test_an_older_rowmill_refuses_half_made_tables() -> None:
    """Only while they are, the record has another version: before and after, older ones read it."""
    plain = CheckpointRecord(5, 7, True, None, {"rows": 3}, {}, {}, "me", "first")
    assert loads(plain.encode())["version"] == 1
    assert "rebuild" not in loads(plain.encode())
    half = replace(plain, rebuild_until=9, rebuild_map="AWIA")
    assert loads(half.encode())["version"] == 2
    assert CheckpointRecord.decode(half.encode()) == half
    assert CheckpointRecord.decode(plain.encode()) == plain
    with pytest.raises(CheckpointError, match="run a newer"):
        CheckpointRecord.decode(half.encode().replace(b'"version":2', b'"version":3'))


@pytest.mark.parametrize(
    ("committed", "until", "offset_map", "expected"),
    [
        (Committed(2), 8, "", OffsetMap(8, 8, ())),
        (Committed(9), 8, "", OffsetMap(9, 9, ())),
        (Committed(2), 4, encode_map(OffsetMap(4, 9, (4, 7))), OffsetMap(4, 9, (4, 7))),
        (Committed(5), 4, encode_map(OffsetMap(4, 9, (4, 7))), OffsetMap(7, 9, (7,))),
        (Committed(7, encode_map(OffsetMap(7, 12, (7, 10)))), 8, "", OffsetMap(10, 12, (10,))),
        (Committed(9), 4, encode_map(OffsetMap(4, 9, (4, 7))), OffsetMap(9, 9, ())),
    ],
)
def test_where_results_stand(committed: Committed, until: int, offset_map: str, expected: OffsetMap) -> None:
    """A row has had its results if either the commit or the one before the rebuild says so."""
    record = CheckpointRecord(
        committed.offset, 0, True, None, {}, {}, {}, "me", "", rebuild_until=until, rebuild_map=offset_map
    )
    assert standing(decode_map(committed), record) == expected


# --- on the side -----------------------------------------------------------------------------------------------


async def run_side(broker: FakeBroker, session: Session, asked: Asked) -> Worker:
    """A side replay to the end of its range."""
    options = WorkerOptions(broker_timeout=5)
    ranges = await open_range(broker, session, ["in"], asked, has_tables=True, options=options)
    ends = {tp: end for tp, (_, end) in ranges.items()}
    worker = Worker(counting(), EarlyEnd(broker, ends), session=session, stores=MemoryStores(), options=options)
    worker.finish_at(ends)
    async with asyncio.timeout(20):
        await worker.run()
    return worker


async def test_a_side_session_runs_its_range_only() -> None:
    """Rows of the range run, none behind it; the live group's offsets and topics are as before."""
    broker = broker_with(10, Committed(6), partitions=2)
    before = dict(broker.group_offsets[LIVE.group])
    side = Session("p", "fix")
    asked = Asked(Place("offset", 3), Place("offset", 7), {"in": frozenset({1})}, text="x")
    worker = await run_side(broker, side, asked)
    assert worker.stats.rows == 4
    assert numbers(broker, "out.fix") == [(3, 1), (4, 2), (5, 3), (6, 4)]
    assert broker.group_offsets[LIVE.group] == before
    assert broker.group_offsets[side.group] == {T("in", 0): Committed(0), T("in", 1): Committed(7)}
    assert "out" not in await broker.topics()
    assert await stored_range(broker, side, ["in"]) == {T("in", 0): (0, 0), T("in", 1): (3, 7)}


async def test_a_range_stays_as_it_was_fixed() -> None:
    """Gone on with, a session ends where it was to at first, though more rows have come; another range is refused."""
    broker = broker_with(4)
    side = Session("p", "fix")
    await open_range(broker, side, ["in"], Asked(text="earliest end []"), has_tables=True)
    broker.write(T("in", 0), dumps({"n": 4}))
    worker = await run_side(broker, side, Asked())
    assert worker.stats.rows == 4
    with pytest.raises(SessionError, match="another range"):
        await run_side(broker, side, Asked(Place("offset", 2), text="2 end []"))


@pytest.mark.parametrize("kind", ["worker", "run", "live", "unreadable"])
async def test_names_that_are_taken(kind: str) -> None:
    """A session that is something else is not touched."""
    broker = broker_with(4)
    side = Session("p", "live" if kind == "live" else "fix")
    if kind == "worker":
        broker.group_offsets[side.group] = {T("in", 0): Committed(1)}
    if kind == "run":
        broker.group_offsets[side.publisher_id] = {T("in.fix", 0): Committed(1, "{}")}
    if kind == "unreadable":
        broker.group_offsets[side.publisher_id] = {T("in", 0): Committed(1, "{}")}
    with pytest.raises((SessionError, ConfigError, CheckpointError), match="another"):
        await open_range(broker, side, ["in"], Asked(), has_tables=False)


# --- comparing -------------------------------------------------------------------------------------------------


def results(broker: FakeBroker, topic: str, session: str, rows: Mapping[str, Any]) -> None:
    """Put results into a sink, by their source."""
    if topic not in broker._topics:
        broker.make(topic, 1)
    made = [
        Outgoing(None, dumps(value), 0, (("rowmill.source", place.encode()), ("rowmill.session", session.encode())))
        for place, value in rows.items()
    ]
    broker.log(T(topic, 0)).append(T(topic, 0), made)


async def test_what_two_sessions_have_in_common() -> None:
    """Equal, changed and missing results are told apart, by place; the last of a row that ran again counts."""
    broker = FakeBroker()
    results(broker, "out", "live", {"in/0/0/0": {"a": 1, "b": 2}, "in/0/1/0": {"a": 1}, "in/0/10/0": {"a": 0}})
    results(broker, "out", "live", {"in/0/10/0": {"a": True}, "in/1/2/0": 5})
    results(broker, "out.fix", "fix", {"in/1/2/0": 5, "in/0/10/0": {"a": 1, "c": 3}, "in/0/0/0": {"b": 2.0, "a": 1}})
    results(broker, "out.fix", "fix", {"in/0/0/1": {"a": 2}})
    found = await compare(broker, "out", LIVE, Session("p", "fix"))
    assert (found.equal, found.changed, found.only_a, found.only_b) == (2, 1, 1, 1)
    assert (found.again_a, found.again_b) == (1, 0)
    assert [(shown.kind, shown.place) for shown in found.shown] == [
        ("only_b", "in/0/0/1"),
        ("only_a", "in/0/1/0"),
        ("changed", "in/0/10/0"),
    ]
    assert found.shown[2].fields == {"a": (True, 1), "c": (ABSENT, 3)}
    few = await compare(broker, "out", LIVE, Session("p", "fix"), limit=1)
    assert (few.differences, len(few.shown)) == (3, 1)
    with pytest.raises(SessionError, match=r"out\.no"):
        await compare(broker, "out", LIVE, Session("p", "no"))


async def test_only_the_range_is_compared() -> None:
    """Live results outside of a side replay's range are no differences."""
    broker = broker_with(10)
    await work(broker, MemoryStores())
    side = Session("p", "fix")
    await run_side(broker, side, Asked(Place("offset", 4), Place("offset", 6), text="x"))
    found = await compare(broker, "out", LIVE, side)
    assert (found.equal, found.changed, found.only_a, found.only_b, found.ranges) == (0, 2, 0, 0, True)


# --- the command line ------------------------------------------------------------------------------------------


def parse(*words: str) -> argparse.Namespace:
    """The arguments of a command line."""
    parser = Parser(prog="rowmill")
    commands = parser.add_subparsers(dest="command")
    for command in (cmd_replay, cmd_diff):
        command.add_parser(commands)
    return parser.parse(words)


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ([], "where to go"),
        (["--to-earliest"], "--source"),
        (["--to-earliest", "--from", "3"], "--from"),
        (["--to-earliest", "--no-cache"], "--no-cache"),
        (["--to-earliest", "--session", "a.b", "--source", "in"], "session"),
        (["--state", "rebuild"], "--source"),
        (["--side", "--to-earliest"], "--side"),
        (["--side", "--execute"], "--execute"),
        (["--side", "--state", "reset"], "--state"),
        (["--side", "--session", "live"], "live"),
        (["--side", "--source", "in"], "--source"),
        (["--source", "in", "--to-offset", "x"], "--to-offset"),
        (["--source", "in", "--to-datetime", "noon"], "--to-datetime"),
        (["--source", "in", "--by-duration", "1h"], "--by-duration"),
        (["--source", "in", "--shift-by", "1.5"], "--shift-by"),
        (["--source", "in", "--from-file", "absent.csv"], "absent.csv"),
    ],
)
def test_misuse(words: list[str], setting: str) -> None:
    """Options that do not go together, or mean nothing, are named before anything is connected to."""
    args = parse("replay", "p", *words)
    with pytest.raises(Exception, match=setting) as raised:
        args.main(args)
    assert type(raised.value).__name__ in {"ConfigError", "InputError"}


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["p", "a", "b"], "--sink"),
        (["p.py", "a", "b", "--sink", "s"], "--sink"),
        (["p", "a", "a", "--sink", "s"], "SESSION_B"),
        (["p", "a.b", "c", "--sink", "s"], "SESSION_A"),
        (["absent.py", "a", "b"], "absent.py"),
    ],
)
def test_misuse_of_diff(words: list[str], setting: str) -> None:
    """A comparison names what it cannot make out."""
    args = parse("diff", *words)
    with pytest.raises(ConfigError, match=setting):
        args.main(args)


def test_two_targets_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly one place to go."""
    with pytest.raises(SystemExit):
        parse("replay", "p", "--to-earliest", "--to-latest")
    assert "not allowed with" in capsys.readouterr().err
    assert parse("replay", "p", "--shift-by", "-100").shift == "-100"
