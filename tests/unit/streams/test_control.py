"""The control topic: updates in one order for all, what may be asked for, and a watch that survives everything."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from rowmill.state.codec import dumps, loads
from rowmill.state.errors import CheckpointError, ConfigError
from rowmill.state.execution import REQUESTS, Wanted
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.control import (
    ControlTopic,
    ControlWatch,
    is_completed,
    note_ends,
    note_failure,
    register,
    request,
)
from rowmill.streams.errors import BrokerError, FencedError, IllegalTransitionError, TopicError
from rowmill.streams.session import Session
from rowmill.streams.session_records import CONTROL_TOPIC, SessionRecord
from rowmill.streams.session_traces import list_traces
from rowmill.streams.status import session_statuses
from support.fake_broker import FakeBroker, Step, lost
from support.fake_clock import FakeClock
from support.sessions import MadeSession

GROUP = "rowmill.reviews"
TP = TopicPartition(CONTROL_TOPIC, 0)
RECORD = SessionRecord(
    group=GROUP,
    pipeline="reviews",
    session="live",
    sources=("reviews",),
    sink="reviews.scored",
    stages=("clean", "score"),
    state_dir="host-a:/state",
    changed_ms=1,
    changed_by="host-a/1",
    started_ms=1,
)
PAUSED = replace(RECORD, wanted=Wanted.PAUSE, changed_ms=2, changed_by="ann@here", reason="deploying", sequence=1)


class ChanceClock(FakeClock):
    """Draws lots, so that two who wait do not wait alike."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._chance = random.Random(seed)

    def random(self) -> float:
        return self._chance.random()


def topic(broker: FakeBroker, *, seed: int = 1, timeout: float = 5.0, create: bool = True) -> ControlTopic:
    """The control topic of one operator or worker."""
    return ControlTopic(broker, clock=ChanceClock(seed), timeout=timeout, create=create)


def put(broker: FakeBroker, *records: SessionRecord | bytes | None, group: str = GROUP) -> None:
    """Records as somebody wrote them before."""
    if not any(name == CONTROL_TOPIC for name in broker._topics):
        broker.make(CONTROL_TOPIC)
    for record in records:
        value = record.encode() if isinstance(record, SessionRecord) else record
        broker.write(TP, value, key=group.encode())


def written(broker: FakeBroker, group: str = GROUP) -> list[SessionRecord | None]:
    """All records of a session that a reader finds, in order."""
    found = [record for record in broker.records(CONTROL_TOPIC) if record.key == group.encode()]
    return [None if record.value is None else SessionRecord.decode(record.value) for record in found]


# --- records ---------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was() -> None:
    """All its fields, and those that only a newer rowmill knows."""
    record = replace(PAUSED, ends={TopicPartition("a", 1): 5}, unknown={"color": "red"})
    assert SessionRecord.decode(record.encode()) == record
    assert loads(record.encode())["color"] == "red"
    newer = SessionRecord.decode(dumps({**loads(record.encode()), "v": 2}))
    assert loads(replace(newer, reason="x").encode())["v"] == 2


@pytest.mark.parametrize(
    "change",
    [
        {"v": 0},
        {"v": "1"},
        {"wanted": "fly"},
        {"sequence": "1"},
        {"sequence": True},
        {"changed_ms": None},
        {"reason": 7},
        {"stages": [1]},
        {"stages": "clean"},
        {"is_bounded": 1},
        {"ends": [["a", "x", 1]]},
        {"ends": 5},
        {"group": None},
        {"changed_ms": 253_402_300_800_000},
        {"started_ms": 2**63 - 1},
        {"failed_ms": 2**62},
        {"changed_ms": -1},
        {"started_ms": -(2**63)},
        {"failed_ms": 1.5},
        {"sequence": -1},
        {"sequence": 1e308},
        {"ends": [["a", 0, 1e308]]},
        {"ends": [["a", 0, -1]]},
        {"ends": [["a", 0, "5"]]},
        {"ends": [["a", 0, True]]},
        {"ends": [["a", 0, None]]},
        {"ends": [["a", 2**40, 5]]},
        {"ends": [["a", 2**31, 5]]},
        {"ends": [["a", -1, 5]]},
        {"ends": [["a", 0.0, 5]]},
        {"ends": [["a", True, 5]]},
        {"ends": [[5, 0, 5]]},
        {"ends": [[None, 0, 5]]},
        {"ends": [["a", 0]]},
        {"ends": [["a", 0, 5, 6]]},
        {"ends": ["a05"]},
        {"ends": "a05"},
        {"ends": {"a": 5}},
        {"wanted": ["run"]},
        {"wanted": {}},
        {"sink": 5},
        {"sink": ["s"]},
        {"dead_letters": None},
        {"state_dir": {}},
        {"sources": "reviews"},
        {"sources": {"reviews": 1}},
        {"sources": ["reviews", None]},
        {"tables": [["t"]]},
        {"owns_source": "yes"},
        {"is_bounded": None},
    ],
    ids=str,
)
def test_what_is_no_record_is_told(change: dict[str, Any]) -> None:
    """Anybody may write to the topic: what cannot be right is an error where it is read, not where it is used."""
    with pytest.raises(CheckpointError, match=CONTROL_TOPIC):
        SessionRecord.decode(dumps({**loads(RECORD.encode()), **change}))


def test_the_largest_values_are_read() -> None:
    """The last millisecond of the year 9999, and what Kafka counts partitions and offsets with."""
    at_ms = 253_402_300_799_999
    ends = {TopicPartition("a", 2**31 - 1): 2**63 - 1, TopicPartition("a", 0): 0}
    record = replace(RECORD, changed_ms=at_ms, started_ms=0, failed_ms=at_ms, ends=ends)
    assert SessionRecord.decode(record.encode()) == record


def test_an_end_beyond_all_numbers() -> None:
    """What JSON can write and no number can hold is told as well."""
    text = replace(RECORD, ends={TopicPartition("a", 0): 777_777}).encode()
    with pytest.raises(CheckpointError):
        SessionRecord.decode(text.replace(b"777777", b"1e400"))


@pytest.mark.parametrize("value", [b"", b"[]", b"nonsense", b"{}", b'{"v":1}', b'{"v":1,"group":"g"}'])
def test_what_is_no_json_of_ours_is_told(value: bytes) -> None:
    """The same for what is no record at all."""
    with pytest.raises(CheckpointError):
        SessionRecord.decode(value)


# --- reading ---------------------------------------------------------------------------------------------------


async def test_without_a_topic_there_are_no_sessions() -> None:
    """Nothing is made by looking."""
    broker = FakeBroker()
    assert await topic(broker).sessions() == {}
    assert await topic(broker).session(GROUP) is None
    assert "create" not in broker.calls


async def test_the_newest_record_of_each_session_counts(caplog: pytest.LogCaptureFixture) -> None:
    """Removed ones are gone, and one that cannot be read is left out of the list, and told where it is asked for."""
    broker = FakeBroker()
    put(broker, RECORD, PAUSED)
    put(broker, RECORD, None, group="rowmill.removed")
    put(broker, RECORD, b"{", group="rowmill.broken")
    assert await topic(broker).sessions() == {GROUP: PAUSED}
    assert "rowmill.broken is left out" in caplog.text
    assert await topic(broker).session("rowmill.removed") is None
    with pytest.raises(CheckpointError):
        await topic(broker).session("rowmill.broken")


async def test_a_key_cannot_steer_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """The warning of a record that cannot be read shows no control characters of its key."""
    broker = FakeBroker()
    put(broker, b"garbage", group="rowmill.evil\x1b]0;owned\x07\n\u202e")
    assert await topic(broker).sessions() == {}
    (warning,) = caplog.records
    assert warning.getMessage().startswith("session rowmill.evil?]0;owned??? is left out: ")
    assert warning.getMessage().isprintable()


# --- writing ---------------------------------------------------------------------------------------------------


async def test_an_update_counts_and_keeps_what_it_does_not_know() -> None:
    """The sequence goes up by one, and fields of a newer rowmill stay."""
    broker = FakeBroker()
    put(broker, replace(RECORD, sequence=7, unknown={"color": "red"}))
    found = await topic(broker).update(GROUP, lambda present: present and replace(present, reason="x"))
    assert found is not None
    assert (found.sequence, found.reason, found.unknown) == (8, "x", {"color": "red"})
    assert written(broker)[-1] == found


async def test_what_changes_nothing_is_not_written() -> None:
    """Neither is the deletion of what is not there."""
    broker = FakeBroker()
    put(broker, RECORD)
    assert await topic(broker).update(GROUP, lambda present: present) == RECORD
    assert await topic(broker).update("rowmill.absent", lambda present: present) is None
    assert broker.commits == 0


async def test_a_record_is_removed() -> None:
    """By a deletion in the log; a later one of the same name begins anew."""
    broker = FakeBroker()
    put(broker, RECORD, PAUSED)
    assert await topic(broker).update(GROUP, lambda _: None) is None
    assert written(broker)[-1] is None
    assert await topic(broker).sessions() == {}
    assert await register(topic(broker), RECORD) == replace(RECORD, sequence=1)


async def test_an_unreadable_record_can_only_be_removed() -> None:
    """A newer rowmill may have written it: nothing is written over it, but who removes it needs not read it."""
    broker = FakeBroker()
    put(broker, b'{"v":1}')
    with pytest.raises(CheckpointError):
        await topic(broker).update(GROUP, lambda _: RECORD)
    with pytest.raises(CheckpointError):
        await register(topic(broker), RECORD)
    assert broker.commits == 0
    assert await topic(broker).update(GROUP, lambda _: None) is None
    assert broker.records(CONTROL_TOPIC)[-1].value is None


async def test_the_topic_is_made_where_it_may_be() -> None:
    """With one partition, compacted; else the message says what to do."""
    broker = FakeBroker()
    with pytest.raises(TopicError, match=r"rowmill\.control.* does not exist .*make it, or allow rowmill to"):
        await register(topic(broker, create=False), RECORD)
    await register(topic(broker), RECORD)
    made = (await broker.topics())[CONTROL_TOPIC]
    assert (made.partitions, made.config["cleanup.policy"]) == (1, "compact")
    await register(topic(broker, create=False), replace(RECORD, sink="x"))


@pytest.mark.parametrize("lazy", [0.0, 0.01])
async def test_two_operators_are_put_in_order(lazy: float) -> None:
    """One pauses, one cancels, at once and often: the log shows a legal order, and who lost hears by name."""
    for seed in range(30):
        broker = FakeBroker(lazy=lazy)
        put(broker, replace(RECORD, sequence=1))
        asked = [(Wanted.PAUSE, "ann"), (Wanted.CANCEL, "bob"), (Wanted.PAUSE, "eve")]
        outcomes = await asyncio.gather(
            *(request(topic(broker, seed=seed * 10 + n), GROUP, wanted, by=by) for n, (wanted, by) in enumerate(asked)),
            return_exceptions=True,
        )
        log = written(broker)
        assert is_legal(log), log
        won = [each.changed_by for each in outcomes if isinstance(each, SessionRecord)]
        assert sorted(won) == sorted(record.changed_by for record in log[1:] if record)
        assert "bob" in won
        for refused in (each for each in outcomes if not isinstance(each, SessionRecord)):
            assert isinstance(refused, IllegalTransitionError)
            assert any(f"{name} asked for that" in str(refused) for name in won)


def is_legal(log: list[SessionRecord | None]) -> bool:
    """Whether each record follows the one before it by the table, and none was written from a stale one."""
    return all(
        before is not None
        and after is not None
        and REQUESTS[before.wanted][after.wanted] == ""
        and after.sequence == before.sequence + 1
        for before, after in pairwise(log)
    )


async def test_whoever_was_fenced_meets_what_the_other_wrote() -> None:
    """The change is asked again, with the record as the other one left it."""
    broker = FakeBroker()
    put(broker, replace(RECORD, sequence=1))
    seen: list[Wanted] = []

    def change(present: SessionRecord | None) -> SessionRecord | None:
        assert present is not None
        seen.append(present.wanted)
        return replace(present, reason="mine")

    def pause() -> None:
        """Somebody else starts the same producer, and writes."""
        broker.starts[f"{GROUP}.control"] += 1
        put(broker, replace(PAUSED, sequence=2))

    original = broker.open_transaction

    def fenced_first(transactional_id: str) -> None:
        original(transactional_id)
        if len(seen) == 1:
            pause()

    broker.open_transaction = fenced_first  # type: ignore[method-assign]
    found = await topic(broker).update(GROUP, change)
    assert seen == [Wanted.RUN, Wanted.PAUSE, Wanted.PAUSE], "with a look before it fences in its turn"
    assert found == replace(PAUSED, sequence=3, reason="mine")
    assert is_legal([record for record in written(broker)[:2] if record])


STEPS: list[tuple[Step, bool]] = [
    ("topics", False),
    ("create", False),
    ("start", False),
    ("start", True),
    ("look_up", False),
    ("fetch", False),
    ("position", False),
    ("begin", False),
    ("send", False),
    ("send", True),
    ("ack", False),
    ("end", False),
    ("end", True),
]


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
@pytest.mark.parametrize(("step", "took_effect"), STEPS)
@pytest.mark.parametrize("skip", [0, 1])
async def test_trouble_at_each_step(step: Step, took_effect: bool, hangs: bool, skip: int) -> None:
    """Whatever fails or never answers, and whether or not it took effect: in the end the record is there once."""
    broker = FakeBroker(lazy=0.001)
    expected = [1] if step == "create" else [1, 2]
    if step != "create":
        put(broker, replace(RECORD, sequence=1))
    broker.inject(step, None if hangs else lost(), took_effect=took_effect, skip=skip)
    found = await topic(broker, timeout=0.05).update(GROUP, lambda present: replace(present or RECORD, reason="x"))
    assert found is not None
    assert found.sequence == expected[-1]
    broker.show_all()
    assert [record.sequence for record in written(broker) if record] == expected
    assert not broker._open, "a transaction was left open"


async def test_an_attempt_of_unknown_fate_is_recognised() -> None:
    """It had succeeded, and somebody wrote after it: it is not written once more over theirs."""
    broker = FakeBroker()
    put(broker, replace(RECORD, sequence=1))

    def resume() -> None:
        newest = written(broker)[-1]
        assert newest is not None
        put(broker, replace(newest, wanted=Wanted.RUN, changed_by="bob", sequence=newest.sequence + 1))

    broker.inject("end", lost(), took_effect=True, then=resume)
    found = await request(topic(broker), GROUP, Wanted.PAUSE, by="ann")
    assert (found.wanted, found.changed_by) == (Wanted.PAUSE, "ann")
    assert [(record.changed_by, record.wanted) for record in written(broker)[1:] if record] == [
        ("ann", Wanted.PAUSE),
        ("bob", Wanted.RUN),
    ]


async def test_a_broker_that_stays_away_is_told() -> None:
    """With what is known of the request's fate."""
    broker = FakeBroker()
    put(broker, RECORD)
    broker.inject("start", lost(), times=99)
    with pytest.raises(BrokerError, match=r"was not recorded: connection lost; ask once more"):
        await topic(broker).update(GROUP, lambda _: PAUSED)
    broker = FakeBroker()
    put(broker, RECORD)
    broker.inject("end", lost(), times=99)
    with pytest.raises(BrokerError, match=r"may have been recorded or not: connection lost; ask once more"):
        await topic(broker).update(GROUP, lambda _: PAUSED)


async def test_who_is_fenced_again_and_again_gives_up() -> None:
    """After ten times, with a message; not for ever."""
    broker = FakeBroker()
    put(broker, RECORD)
    broker.inject("begin", FencedError("a newer owner exists"), times=99)
    with pytest.raises(BrokerError, match="others change this session again and again"):
        await topic(broker).update(GROUP, lambda _: PAUSED)
    assert broker.starts[f"{GROUP}.control"] == 10


async def test_an_interrupted_update_leaves_nothing_open() -> None:
    """Cancelled between its record and its commit: others' records behind it can be read at once."""
    broker = FakeBroker()
    put(broker, RECORD)
    broker.inject("end", None)
    updating = asyncio.create_task(topic(broker).update(GROUP, lambda _: PAUSED))
    async with asyncio.timeout(5):
        while "end" not in broker.calls:
            await asyncio.sleep(0)
    updating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await updating
    assert not broker._open
    assert await topic(broker).sessions() == {GROUP: RECORD}


async def test_a_killed_operator_is_ended_by_the_next() -> None:
    """Its transaction was open: the next one of that session aborts it, reads and writes."""
    broker = FakeBroker()
    put(broker, replace(RECORD, sequence=1))
    await leave_open(broker, GROUP)
    found = await request(topic(broker), GROUP, Wanted.PAUSE, by="ann")
    assert found.sequence == 2
    assert is_legal(written(broker))


async def leave_open(broker: FakeBroker, group: str) -> None:
    """An operator is killed between begin and end."""
    producer = broker.transactional_producer(f"{group}.control")
    await producer.start()
    await producer.begin()
    lost_record = replace(RECORD, group=group, wanted=Wanted.CANCEL, sequence=99)
    await (await producer.send(TP, [Outgoing(group.encode(), lost_record.encode(), 0)]))


async def test_what_another_session_left_open_is_waited_for_and_told() -> None:
    """Nothing can be read behind it until the broker ends it; the message says that it will."""
    broker = FakeBroker()
    put(broker, replace(RECORD, sequence=1))
    await leave_open(broker, "rowmill.other")
    with pytest.raises(BrokerError, match=r"was not recorded: .*until the broker ends it, within about a minute"):
        await topic(broker).update(GROUP, lambda _: PAUSED)
    broker.finish("rowmill.other.control", commit=False)
    assert await topic(broker).update(GROUP, lambda _: PAUSED) == replace(PAUSED, sequence=2)


async def test_a_marker_that_the_broker_gave_up_is_written_again() -> None:
    """What was recorded can be read when the update returns, by sessions of all names."""
    broker = FakeBroker()
    put(broker, replace(RECORD, sequence=1))
    broker.give_up_markers(lambda where: where == TP)
    await request(topic(broker), GROUP, Wanted.PAUSE, by="ann")
    assert not broker.left_open()
    assert await topic(broker).sessions() == {GROUP: written(broker)[-1]}
    await register(topic(broker), replace(RECORD, group="rowmill.other"))


async def test_a_marker_given_up_at_a_killed_operators_end_is_found_by_the_next() -> None:
    """The next operator of the session ends it in one way for all, and goes on from there."""
    broker = FakeBroker()
    put(broker, replace(RECORD, sequence=1))
    await leave_open(broker, GROUP)
    broker.give_up_markers(lambda where: where == TP)
    broker.finish(f"{GROUP}.control", commit=True)
    assert broker.left_open()
    with pytest.raises(IllegalTransitionError, match="is cancelled already"):
        await request(topic(broker), GROUP, Wanted.CANCEL, by="ann")
    assert not broker.left_open()


async def test_two_at_once_in_one_process_take_turns() -> None:
    """A worker's own notes do not fence each other."""
    broker = FakeBroker()
    put(broker, RECORD)
    control = topic(broker)
    await asyncio.gather(*(note_failure(control, GROUP, f"no {n}") for n in range(5)))
    assert broker.commits == 5
    assert broker.starts[f"{GROUP}.control"] == 5


# --- what workers write ----------------------------------------------------------------------------------------


async def test_a_new_session_is_entered_as_given() -> None:
    """Once."""
    broker = FakeBroker()
    assert await register(topic(broker), RECORD) == replace(RECORD, sequence=1)
    again = replace(RECORD, changed_ms=99, changed_by="host-a/2", started_ms=99)
    assert await register(topic(broker), again) == replace(RECORD, sequence=1)
    assert broker.commits == 1


@pytest.mark.parametrize(
    ("present", "given", "expected"),
    [
        ({}, {"sink": "new", "tables": ("t",)}, {"sink": "new", "tables": ("t",)}),
        ({"wanted": Wanted.PAUSE, "reason": "r"}, {"sink": "new"}, {"wanted": Wanted.PAUSE, "reason": "r"}),
        (
            {"wanted": Wanted.CANCEL, "reason": "r", "changed_by": "ann"},
            {"changed_by": "host-b/2", "changed_ms": 50},
            {"wanted": Wanted.RUN, "reason": "", "changed_by": "host-b/2", "changed_ms": 50},
        ),
        ({"failure": "x", "failed_ms": 5}, {}, {"failure": "", "failed_ms": 0}),
        ({"started_ms": 5}, {"started_ms": 50, "sink": "new"}, {"started_ms": 5}),
        ({"started_ms": 0}, {"started_ms": 50}, {"started_ms": 50}),
        ({"unknown": {"color": "red"}}, {"sink": "new"}, {"unknown": {"color": "red"}}),
        ({"ends": {TP: 5}}, {"sink": "new"}, {"ends": {TP: 5}}),
        ({"ends": {TP: 5}}, {"ends": {TP: 6}}, {"ends": {TP: 6}}),
        ({"state_dir": ""}, {"state_dir": "host-b:/x"}, {"state_dir": "host-b:/x"}),
        ({"state_dir": "host-b:/x"}, {"state_dir": "host-b:/y"}, {"state_dir": "host-b:/y"}),
        ({"state_dir": "host-b:/x"}, {"state_dir": "", "sink": "new"}, {"state_dir": "host-b:/x"}),
    ],
    ids=str,
)
async def test_a_start_brings_the_record_up_to_date(
    present: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    """What the session is made of; what operators want of it stays, but that a cancelled one goes on."""
    broker = FakeBroker()
    put(broker, replace(RECORD, sequence=3, **present))
    found = await register(topic(broker), replace(RECORD, **given))
    assert found.sequence == 4
    assert {name: getattr(found, name) for name in expected} == expected
    assert await register(topic(broker), replace(RECORD, **given)) == found
    assert broker.commits == 1


async def test_workers_on_two_machines_do_not_rewrite_it_in_turn() -> None:
    """Each has its own folder: the first one's is noted."""
    broker = FakeBroker()
    for _ in range(3):
        await register(topic(broker), RECORD)
        await register(topic(broker), replace(RECORD, state_dir="host-b:/state", artifacts=""))
    assert broker.commits == 1


@pytest.mark.parametrize("lazy", [0.0, 0.005])
@pytest.mark.parametrize("present", [None, replace(RECORD, wanted=Wanted.CANCEL, failure="x")])
async def test_ten_workers_start_at_once(lazy: float, present: SessionRecord | None) -> None:
    """One record is written, and all of them obey it."""
    broker = FakeBroker(lazy=lazy)
    if present:
        put(broker, present)
    found = await asyncio.gather(*(register(topic(broker, seed=seed), RECORD) for seed in range(10)))
    assert broker.commits == 1
    assert {each.sequence for each in found} == {1}
    assert {each.wanted for each in found} == {Wanted.RUN}


async def test_failures_and_ends_are_noted() -> None:
    """In the record if there is one; a long message is cut."""
    broker = FakeBroker()
    await note_failure(topic(broker), GROUP, "x")
    await note_ends(topic(broker), GROUP, {TP: 5})
    assert broker.commits == 0
    put(broker, RECORD)
    await note_failure(topic(broker), GROUP, "x" * 5_000)
    await note_ends(topic(broker), GROUP, {TP: 5})
    await note_ends(topic(broker), GROUP, {TP: 5})
    newest = written(broker)[-1]
    assert newest is not None
    assert (len(newest.failure), newest.failed_ms > 0, newest.ends) == (1_000, True, {TP: 5})
    assert broker.commits == 2


@pytest.mark.parametrize("value", [b'{"v":2,"group":"rowmill.reviews","wanted":"drain"}', b'{"v":1}', b"nonsense"])
async def test_notes_never_remove_a_record(value: bytes) -> None:
    """A record of a newer rowmill, which this one cannot read, stays when a worker notes its failure or its ends."""
    broker = FakeBroker()
    put(broker, RECORD, value)
    with pytest.raises(CheckpointError):
        await note_failure(topic(broker), GROUP, "x")
    with pytest.raises(CheckpointError):
        await note_ends(topic(broker), GROUP, {TP: 5})
    assert broker.commits == 0
    assert broker.records(CONTROL_TOPIC)[-1].value == value


# --- what operators ask for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", Wanted)
@pytest.mark.parametrize("present", Wanted)
async def test_the_table_of_requests(present: Wanted, asked: Wanted) -> None:
    """Each request is carried out where the table says so, and else refused with its words, and nothing is written."""
    broker = FakeBroker()
    put(broker, replace(PAUSED, wanted=present))
    refusal = REQUESTS[present][asked]
    if not refusal:
        found = await request(topic(broker), GROUP, asked, by="bob@there", reason="because")
        assert (found.wanted, found.changed_by, found.reason) == (asked, "bob@there", "because")
        assert found.changed_ms == FakeClock().now_ms()
        assert written(broker)[-1] == found
        return
    with pytest.raises(IllegalTransitionError) as caught:
        await request(topic(broker), GROUP, asked, by="bob@there")
    assert f"reviews cannot be {asked.value.replace('run', 'resum')[:5]}" in str(caught.value)
    assert refusal in str(caught.value)
    by = " (ann@here asked for that at 1970-01-01 00:00:00+00:00: deploying)"
    assert str(caught.value).endswith(by) is (present is not Wanted.RUN)
    assert broker.commits == 0


def test_the_table_is_whole() -> None:
    """Every request has its word for every present state, and none is refused everywhere."""
    assert set(REQUESTS) == set(Wanted)
    assert all(set(row) == set(Wanted) for row in REQUESTS.values())
    assert all(any(not row[asked] for row in REQUESTS.values()) for asked in Wanted)
    assert all(REQUESTS[each][each] for each in Wanted)


async def test_a_session_that_is_a_group_only_can_be_steered() -> None:
    """Its workers are of an older rowmill: the record is made from the group's name."""
    broker = FakeBroker()
    broker.group_offsets["rowmill.reviews.s1"] = {}
    found = await request(topic(broker), "rowmill.reviews.s1", Wanted.PAUSE, by="ann")
    assert (found.pipeline, found.session, found.wanted, found.sequence) == ("reviews", "s1", Wanted.PAUSE, 1)
    registered = await register(topic(broker), replace(RECORD, group=found.group, session="s1"))
    assert (registered.wanted, registered.sink, registered.started_ms) == (Wanted.PAUSE, "reviews.scored", 1)


@pytest.mark.parametrize("wanted", Wanted)
async def test_a_first_record_names_what_is_the_sessions_own(wanted: Wanted) -> None:
    """A session without a record that is asked for something is shown and cleaned up as before: it has its sources."""
    broker, clock = FakeBroker(markers=False), FakeClock()
    session = Session("old", "s1")
    await MadeSession(session, record=None).make(broker, clock)
    (before,) = await session_statuses(broker, clock=clock, timeout=5)
    found = await request(topic(broker), session.group, wanted, by="ann")
    assert (found.sources, found.wanted) == (("old",), wanted)
    (after,) = await session_statuses(broker, clock=clock, timeout=5)
    assert after.is_registered
    assert (after.rows, after.lag, after.partitions) == (before.rows, before.lag, before.partitions)
    assert (after.rows.rows, after.lag) == (4, 16)
    traces = await list_traces(broker, session.group, clock=clock)
    assert traces is not None
    assert session.changelog("old") in {trace.name for trace in traces.found}


@pytest.mark.parametrize("is_removed", [False, True], ids=["topic deleted", "record removed"])
async def test_what_was_paused_by_a_record_that_is_gone_can_go_on(is_removed: bool) -> None:
    """Workers stay paused when the control topic is deleted under them: who resumes them then is not refused."""
    broker = FakeBroker()
    put(broker, RECORD)
    broker.group_offsets[GROUP] = {}
    await request(topic(broker), GROUP, Wanted.PAUSE, by="ann")
    if is_removed:
        put(broker, None)
    else:
        await broker.delete_topics([CONTROL_TOPIC])
    found = await request(topic(broker), GROUP, Wanted.RUN, by="bob")
    assert (found.wanted, found.changed_by) == (Wanted.RUN, "bob")
    assert written(broker)[-1] == found, "the workers hear of it"
    with pytest.raises(IllegalTransitionError, match="is not paused"):
        await request(topic(broker), GROUP, Wanted.RUN, by="eve")


async def test_a_session_that_nobody_knows() -> None:
    """The message names those that are known, and nothing is made."""
    broker = FakeBroker()
    put(broker, RECORD)
    broker.group_offsets["rowmill.scores"] = {}
    broker.group_offsets["other"] = {}
    with pytest.raises(ConfigError, match="there are reviews, scores"):
        await request(topic(broker), "rowmill.nobodys", Wanted.PAUSE, by="ann")
    assert "begin" not in broker.calls


async def test_what_people_wrote_cannot_steer_a_terminal() -> None:
    """A reason is text from elsewhere: the message shows no control characters of it."""
    broker = FakeBroker()
    put(broker, replace(PAUSED, reason="\x1b[31mred\nline"))
    with pytest.raises(IllegalTransitionError) as caught:
        await request(topic(broker), GROUP, Wanted.PAUSE, by="bob")
    assert str(caught.value).isprintable()


A, B = TopicPartition("a", 0), TopicPartition("a", 1)


@pytest.mark.parametrize(
    ("ends", "committed", "is_bounded", "completed"),
    [
        ({A: 3, B: 2}, {A: 3, B: 2}, True, True),
        ({A: 3, B: 2}, {A: 4, B: 2}, True, True),
        ({A: 3, B: 2}, {A: 2, B: 2}, True, False),
        ({A: 3, B: 2}, {A: 3}, True, False),
        ({A: 3, B: 0}, {A: 3}, True, True),
        ({}, {}, True, True),
        (None, {A: 3, B: 2}, True, False),
        ({A: 3, B: 2}, {A: 3, B: 2}, False, False),
        ({TopicPartition("gone", 0): 3}, {}, True, False),
    ],
)
async def test_completed_is_derived_from_offsets(
    ends: dict[TopicPartition, int] | None,
    committed: dict[TopicPartition, int],
    is_bounded: bool,
    completed: bool,
) -> None:
    """A bounded session with known ends, all of them committed: of that nothing can be asked any more."""
    broker = FakeBroker()
    broker.make("a", 2)
    broker.write(A, b"1", b"2", b"3")
    broker.write(B, b"1", b"2")
    broker.group_offsets[GROUP] = {tp: Committed(offset, "") for tp, offset in committed.items()}
    record = replace(RECORD, is_bounded=is_bounded, ends=ends)
    assert await is_completed(broker, record, 5.0) is completed
    put(broker, record)
    if completed:
        for wanted in Wanted:
            with pytest.raises(IllegalTransitionError, match="it is completed, all its rows are done"):
                await request(topic(broker), GROUP, wanted, by="ann")
    else:
        await request(topic(broker), GROUP, Wanted.PAUSE, by="ann")


async def test_a_partition_whose_rows_are_gone_does_not_hold_up_completion() -> None:
    """Retention took them before the session began: it never commits there."""
    broker = FakeBroker()
    broker.make("a", 1)
    broker.write(A, b"1", b"2")
    broker.truncate(A, 2)
    assert await is_completed(broker, replace(RECORD, is_bounded=True, ends={A: 2}), 5.0)


# --- the watch -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def watching(broker: FakeBroker, **options: Any) -> AsyncIterator[tuple[ControlWatch, list[Any]]]:
    """A watch that runs, and what it has told."""
    told: list[Any] = []
    watch = ControlWatch(broker, GROUP, told.append, clock=FakeClock(), **options)
    with suppress(BrokerError):
        told.append(("start", await watch.start()))
    running = asyncio.create_task(watch.run())
    try:
        yield watch, told
        assert not running.done() or running.result() is None
    finally:
        await watch.close()
        async with asyncio.timeout(5):
            await running


async def until(condition: Callable[[], Any]) -> None:
    """Let others run until it is true."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def a_while() -> None:
    """Let others run for many of their turns."""
    for _ in range(500):
        await asyncio.sleep(0)


async def test_every_record_is_told_in_order() -> None:
    """From behind what start() gave, of this session only, deletions as None."""
    broker = FakeBroker()
    put(broker, RECORD, replace(RECORD, sequence=2))
    async with watching(broker) as (_, told):
        assert told == [("start", replace(RECORD, sequence=2))]
        put(broker, PAUSED)
        put(broker, PAUSED, group="rowmill.reviews.other")
        put(broker, RECORD, PAUSED, None, RECORD)
        await until(lambda: len(told) == 6)
        await a_while()
    assert told[1:] == [PAUSED, RECORD, PAUSED, None, RECORD]


async def test_only_what_is_committed_is_told() -> None:
    """A killed operator's record never is."""
    broker = FakeBroker()
    put(broker, RECORD)
    async with watching(broker) as (_, told):
        await leave_open(broker, GROUP)
        await a_while()
        await request(topic(broker), GROUP, Wanted.PAUSE, by="ann")
        await until(lambda: len(told) == 2)
    assert told[1].changed_by == "ann"


async def test_a_topic_that_appears_later() -> None:
    """There is none at the start: the first record in it is told."""
    broker = FakeBroker()
    async with watching(broker) as (_, told):
        assert told == [("start", None)]
        await a_while()
        put(broker, RECORD)
        await until(lambda: len(told) == 2)
        put(broker, PAUSED)
        await until(lambda: len(told) == 3)
    assert told[1:] == [RECORD, PAUSED]


async def test_a_deleted_topic_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """As None, once, when it is missing for good; and the records of one that is made anew."""
    broker = FakeBroker()
    put(broker, PAUSED)
    async with watching(broker) as (_, told):
        await broker.delete_topics([CONTROL_TOPIC])
        await until(lambda: len(told) == 2)
        await a_while()
        assert told[1:] == [None]
        put(broker, RECORD)
        await until(lambda: len(told) == 3)
    assert told[2] == RECORD
    assert caplog.text.count("was deleted, and with it what was wanted") == 1


async def test_a_broker_that_forgets_the_topic_for_a_moment_changes_nothing() -> None:
    """It has just started, and tells of no topics yet: a paused session stays paused."""
    broker = FakeBroker()
    put(broker, PAUSED)
    async with watching(broker) as (_, told):
        topics, logs = broker._topics.pop(CONTROL_TOPIC), broker._logs.pop(TP)
        await until(lambda: broker.calls.count("topics") > 2)
        broker._topics[CONTROL_TOPIC], broker._logs[TP] = topics, logs
        await a_while()
        assert told[1:] == []
        put(broker, RECORD)
        await until(lambda: len(told) == 2)
    assert told[1] == RECORD


@pytest.mark.parametrize("newest", [PAUSED, RECORD, None])
async def test_a_topic_made_anew_is_read_from_its_beginning(newest: SessionRecord | None) -> None:
    """The newest record is told if it is another one than before."""
    broker = FakeBroker()
    put(broker, RECORD, PAUSED, RECORD, PAUSED)
    async with watching(broker) as (_, told):
        broker.make(CONTROL_TOPIC)
        if newest:
            put(broker, newest)
        await until(lambda: broker.calls.count("look_up") > 6)
        await a_while()
    assert told[1:] == ([newest] if newest != PAUSED else [])


async def test_a_compacted_log_is_followed() -> None:
    """Records that are gone are not missed, neither at the start nor later."""
    broker = FakeBroker()
    put(broker, RECORD, PAUSED, RECORD, PAUSED)
    broker.log(TP).records[0:3] = [None, None, None]
    async with watching(broker) as (_, told):
        assert told == [("start", PAUSED)]
        put(broker, RECORD, PAUSED)
        broker.log(TP).records[4] = None
        await until(lambda: len(told) == 2)
        broker.truncate(TP, 6)
        put(broker, RECORD)
        await until(lambda: len(told) == 3)
    assert told[1:] == [PAUSED, RECORD]


async def test_records_deleted_under_the_watch() -> None:
    """Its place is not in the log any more: it begins with what is there."""
    broker = FakeBroker()
    put(broker, RECORD)
    told: list[SessionRecord | None] = []
    watch = ControlWatch(broker, GROUP, told.append, clock=FakeClock())
    await watch.start()
    put(broker, PAUSED, RECORD, PAUSED)
    broker.truncate(TP, 3)
    running = asyncio.create_task(watch.run())
    await until(lambda: told)
    await watch.close()
    await running
    assert told == [PAUSED]


async def test_an_unreadable_record_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What was wanted before holds; the next readable one is told."""
    broker = FakeBroker()
    put(broker, RECORD, PAUSED, b'{"v":1}')
    async with watching(broker) as (_, told):
        assert told == [("start", PAUSED)]
        put(broker, b"nonsense", RECORD)
        await until(lambda: told[-1] == RECORD)
    assert set(map(str, told[1:-1])) <= {str(PAUSED)}
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("step", ["topics", "look_up", "fetch", "position"])
@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
async def test_the_watch_survives_trouble(step: Step, hangs: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It says once that it cannot read, and once that it can; no record is lost or told twice."""
    caplog.set_level(logging.WARNING)
    broker = FakeBroker()
    put(broker, RECORD)
    async with watching(broker, timeout=0.01) as (_, told):
        broker.inject(step, None if hangs else lost(), times=5)
        if step in {"topics", "look_up"}:  # asked for when nothing comes for a while, and when the place is lost
            broker.truncate(TP, 1)
            put(broker, RECORD)
            broker.truncate(TP, 2)
        put(broker, PAUSED)
        await until(lambda: len(told) == 2)
        put(broker, RECORD)
        await until(lambda: len(told) == 3)
    assert told[1:] == [PAUSED, RECORD]
    assert caplog.text.count("trying on") == 1
    assert caplog.text.count("can be read again") == 1


async def test_a_start_that_failed_is_made_good() -> None:
    """The broker was away at the start: what is there is told when it is back."""
    broker = FakeBroker()
    put(broker, PAUSED)
    broker.inject("topics", lost())
    async with watching(broker) as (_, told):
        await until(lambda: told == [PAUSED])


async def test_a_closed_watch_ends() -> None:
    """Before its first look, in the middle, and twice."""
    broker = FakeBroker()
    put(broker, RECORD)
    watch = ControlWatch(broker, GROUP, lambda _: None, clock=FakeClock())
    await watch.close()
    await watch.close()
    async with asyncio.timeout(5):
        await watch.run()
    async with watching(broker) as (watch, _):
        await a_while()
    assert broker._readers == []
