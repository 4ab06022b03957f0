"""How a session's state follows from what the broker has of it, and what is told of its workers and partitions."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest
from rowmill.handlers.budget import Entry
from rowmill.state.checkpoint import CHECKPOINT_KEY
from rowmill.state.codec import dumps
from rowmill.state.execution import ExecutionState, Wanted
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.brokers.base import MemberInfo, TopicSpec
from rowmill.streams.cli.status_view import Place, detail
from rowmill.streams.errors import BrokerError, TopicError
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.ledger import TopicLedger
from rowmill.streams.session import Session
from rowmill.streams.session_records import SessionRecord
from rowmill.streams.status import RowCounts, SessionStatus, session_statuses
from rowmill.streams.status_state import Phase, derive
from rowmill.streams.status_workers import words_of, workers_of
from support.fake_broker import FakeBroker, FakeMember
from support.fake_clock import FakeClock
from support.sessions import MadeSession, progress, say

LIVE = Session("p")
TPS = [TopicPartition("p", 0), TopicPartition("p", 1)]
NOW = 1_750_000_000_000
PLACE = Place("kafka://broker:9092")
DONE = Committed(20, '{"v":1,"input":"x","digest":"y","done":true}')
NOT_DONE = Committed(20, '{"v":1,"input":"x","digest":"y","done":false}')


# --- the state -------------------------------------------------------------------------------------------------

RUN, PAUSE, CANCEL = Wanted.RUN, Wanted.PAUSE, Wanted.CANCEL
FAILED_AT_5 = {"failure": "out of memory", "failed_ms": 5}


@pytest.mark.parametrize(
    ("wanted", "phases", "fields", "complete", "activity"),
    [
        (RUN, [], {}, False, "idle"),
        (RUN, [], {}, True, "completed"),
        (RUN, ["stopping"], {}, True, "completed"),
        (PAUSE, [], {}, True, "completed"),
        (CANCEL, [], FAILED_AT_5, True, "completed"),
        (RUN, ["starting"], {}, False, "initializing"),
        (RUN, ["starting", "running"], {}, False, "executing"),
        (RUN, ["running", "stopping"], {}, False, "executing"),
        (RUN, ["stopping"], {}, False, "stopping"),
        (RUN, ["paused"], {}, False, "resuming"),
        (RUN, ["paused", "running"], {}, False, "executing"),
        (RUN, ["running"], FAILED_AT_5, False, "executing"),
        (RUN, [], FAILED_AT_5, False, "failed"),
        (PAUSE, ["running"], {}, False, "pausing"),
        (PAUSE, ["paused", "pausing"], {}, False, "pausing"),
        (PAUSE, ["paused", "starting"], {}, False, "pausing"),
        (PAUSE, ["paused", "paused"], {}, False, "paused"),
        (PAUSE, [], {}, False, "paused"),
        (PAUSE, [], {**FAILED_AT_5, "changed_ms": 4}, False, "failed"),
        (PAUSE, [], {**FAILED_AT_5, "changed_ms": 6}, False, "paused"),
        (CANCEL, ["running"], {}, False, "cancelling"),
        (CANCEL, [], {}, False, "cancelled"),
        (CANCEL, [], FAILED_AT_5, False, "cancelled"),
    ],
)
def test_the_state_follows(
    wanted: Wanted, phases: list[Phase], fields: dict[str, Any], complete: bool, activity: str
) -> None:
    """Offsets first, then live workers and what is wanted of them, then what happened last."""
    record = SessionRecord(group="rowmill.p", pipeline="p", session="live", wanted=wanted, **fields)
    derived = derive(record, phases, is_complete=complete)
    assert derived.activity == activity
    on_the_way = {"stopping", "resuming", "pausing", "cancelling"}
    assert (derived.state.value == activity) is (activity not in on_the_way)


# --- the workers -----------------------------------------------------------------------------------------------


def member(name: str, *tps: TopicPartition, host: str = "10.0.0.1") -> MemberInfo:
    """A member of the group."""
    return MemberInfo(name, "aiokafka", host, frozenset(tps))


def words(*events: EventRecord) -> Any:
    """The words of the live session's workers."""
    return words_of(events).get(LIVE.group, [])


def test_members_and_words_are_matched_by_partitions() -> None:
    """Each member gets the word that tells the most of its partitions; one without any gets what is left."""
    said = words(
        progress(LIVE, "aa", NOW, partitions=TPS[:1]), progress(LIVE, "bb", NOW, partitions=TPS[1:]),
        progress(LIVE, "cc", NOW),
    )  # fmt: skip
    found = workers_of([member("m1", TPS[1]), member("m2", TPS[0]), member("m3")], said, NOW)
    assert [(worker.name, worker.member) for worker in found] == [("aa", "m2"), ("bb", "m1"), ("cc", "m3")]
    assert found[0].partitions == (TPS[0],)
    assert (found[0].host, found[0].pid) == ("box", 4711)


def test_the_best_match_comes_first() -> None:
    """In a rebalance words lag behind: who has more in common with a member is it."""
    tps = [TopicPartition("p", n) for n in range(4)]
    said = words(progress(LIVE, "aa", NOW, partitions=tps[:3]), progress(LIVE, "bb", NOW, partitions=tps[2:]))
    found = workers_of([member("m1", *tps[2:]), member("m2", *tps[:2])], said, NOW)
    assert [(worker.name, worker.member) for worker in found] == [("aa", "m2"), ("bb", "m1")]


def test_on_the_embedded_broker_the_process_tells() -> None:
    """There a member's name is its process, which a word tells as well."""
    said = words(progress(LIVE, "aa", NOW, partitions=TPS))
    found = workers_of([MemberInfo("4711", "rowmill", "box", frozenset())], said, NOW)
    assert [(worker.name, worker.member) for worker in found] == [("aa", "4711")]


def test_who_left_the_group_is_gone_whatever_it_said() -> None:
    """A killed worker's words are seconds old and count no more; nor do those of one that said goodbye."""
    said = words(progress(LIVE, "aa", NOW - 500, partitions=TPS))
    assert workers_of([], said, NOW) == ()
    goodbye = EventRecord(kind="worker_stopped", at_ms=NOW, pipeline="p", session="live", group=LIVE.group, worker="aa")
    assert words(progress(LIVE, "aa", NOW), goodbye) == []
    assert words(progress(LIVE, "aa", NOW, state="stopped")) == []


def test_who_is_about_to_join_is_there() -> None:
    """A worker that makes its topics is in no group yet, and starting; after some seconds nobody knows."""
    said = words(progress(LIVE, "aa", NOW, state="starting"))
    assert [(worker.name, worker.phase, worker.member) for worker in workers_of([], said, NOW)] == [
        ("aa", "starting", "")
    ]
    assert workers_of([], said, NOW + 4_000) == ()


def test_a_successor_does_not_get_a_dead_workers_word() -> None:
    """Two words tell of the same partitions: the fresh one belongs to the member."""
    said = words(progress(LIVE, "dead", NOW - 6_000, partitions=TPS), progress(LIVE, "new", NOW, partitions=TPS[:1]))
    assert [worker.name for worker in workers_of([member("m", *TPS)], said, NOW)] == ["new"]


def test_silence() -> None:
    """A worker whose word is seconds old is silent, without a rate; one that never spoke only where it should have."""
    old = words(
        progress(LIVE, "aa", NOW - 9_000, rows=1, partitions=TPS),
        progress(LIVE, "aa", NOW - 7_000, rows=9, partitions=TPS),
    )  # fmt: skip
    (silent,) = workers_of([member("m", *TPS)], old, NOW)
    assert (silent.is_silent, silent.seen_seconds, silent.rate) == (True, 7.0, None)
    (stranger,) = workers_of([member("m", *TPS)], [], NOW)
    assert (stranger.is_silent, stranger.name, stranger.phase) == (False, "m", "running")
    assert workers_of([member("m", *TPS)], [], NOW, should_speak=True)[0].is_silent
    assert not workers_of([member("m")], [], NOW, should_speak=True)[0].is_silent


@pytest.mark.parametrize(
    ("at", "rows", "rate"),
    [((0, 1_000, 10_000), (100, 150, 300), 20.0), ((0,), (5,), None), ((0, 99), (5, 50), None), ((0, 900), (9, 5), 0)],
)  # fmt: skip
def test_the_rate(at: tuple[int, ...], rows: tuple[int, ...], rate: float | None) -> None:
    """Rows between the first and the newest word, by the time between them; none from one word, or from two at once."""
    (word,) = words(*(progress(LIVE, "aa", NOW + ms, rows=n) for ms, n in zip(at, rows, strict=True)))
    assert word.rate == rate


@pytest.mark.parametrize(
    ("state", "partitions", "phase"),
    [
        ("running", {"p_0": {"state": "opening"}, "p_1": {"state": "opening"}}, "starting"),
        ("running", {"p_0": {"state": "opening"}}, "running"),
        ("paused", {}, "paused"),
        ("on fire", {}, "running"),
    ],
)
def test_what_a_worker_does(state: str, partitions: dict[str, Any], phase: str) -> None:
    """It has started once it has opened a partition; a word that nobody knows counts as work."""
    said = words(progress(LIVE, "aa", NOW, state=state, partitions=TPS, **partitions))
    assert workers_of([member("m", *TPS)], said, NOW)[0].phase == phase


def test_odd_words_do_no_harm() -> None:
    """Anybody may write to the topic: data of the wrong shape is as good as none."""
    odd = {"partitions": [1, {"topic": 5}], "totals": [], "stages": {"s": 1, "t": {"calls": "x"}}, "breakers": 7}
    event = EventRecord(
        kind="progress", at_ms=NOW, pipeline="p", session="live", group=LIVE.group, worker="aa", data=odd
    )
    (found,) = workers_of([member("m", *TPS)], words(event), NOW)
    assert (found.name, found.rows, found.stages, found.breakers) == ("aa", 0, {"t": {}}, {})


# --- what the broker has ---------------------------------------------------------------------------------------


async def statuses(broker: FakeBroker, clock: FakeClock, group: str | None = None) -> list[SessionStatus]:
    """What is to be shown."""
    async with asyncio.timeout(20):
        return await session_statuses(broker, clock=clock, timeout=5, group=group)


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands."""
    return FakeClock(NOW)


@pytest.fixture
def broker() -> FakeBroker:
    """A broker without markers, so that offsets are rows."""
    return FakeBroker(markers=False)


async def test_nothing_is_no_error(broker: FakeBroker, clock: FakeClock) -> None:
    """A broker without sessions, or without the one that was asked for, gives an empty list."""
    assert await statuses(broker, clock) == []
    await MadeSession(LIVE).make(broker, clock)
    assert await statuses(broker, clock, "rowmill.q") == []
    assert len(await statuses(broker, clock, "rowmill.p")) == 1


async def test_offsets_counts_and_cost(broker: FakeBroker, clock: FakeClock) -> None:
    """Lag is end less committed; where nothing is committed there is none, and all that is there waits."""
    made = MadeSession(
        LIVE,
        ends=(10, 10, 0),
        committed=(4, 7, None),
        counts={"rows": 6, "results": 9, "dropped": 1, "skipped": 2, "dead_letters": 1, "defaulted": 1, "emitted": 3},
        cost=Decimal("0.25"),
    )
    await made.make(broker, clock)
    (status,) = await statuses(broker, clock)
    assert [(p.committed, p.end, p.lag, p.waiting) for p in status.partitions] == [
        (4, 10, 6, 6), (7, 10, 3, 3), (None, 0, None, 0)
    ]  # fmt: skip
    assert status.lag == 9
    assert status.rows == RowCounts(
        rows=12, ok=4, dropped=2, skipped=4, dead_letters=2, defaulted=2, results=18, emitted=6
    )
    assert (str(status.cost), status.tokens, status.rate, status.percent) == ("0.50", 0, None, None)
    assert (status.state, status.reference, status.is_registered) == (ExecutionState.IDLE, "p", True)
    assert status.active_ms == NOW


async def test_a_session_that_never_registered(broker: FakeBroker, clock: FakeClock) -> None:
    """Workers of an older rowmill left a group and changelogs: that is enough."""
    await MadeSession(Session("p", "old"), record=None).make(broker, clock)
    (status,) = await statuses(broker, clock)
    assert (status.reference, status.is_registered, status.rows.rows) == ("p.old", False, 4)
    assert status.record.sources == ("p",)
    assert status.started_ms is not None


@pytest.mark.parametrize(
    ("committed", "publisher", "fields", "state", "percent", "total"),
    [
        ((10, 10), DONE, {}, ExecutionState.COMPLETED, 100, 20),
        ((10, 5), DONE, {}, ExecutionState.IDLE, 75, 20),
        ((10, 10), NOT_DONE, {}, ExecutionState.IDLE, None, None),
        ((10, 10), None, {}, ExecutionState.IDLE, None, None),
        ((10, 10), Committed(20, "nonsense"), {}, ExecutionState.IDLE, None, None),
        ((10, 10), None, {"ends": {TPS[0]: 10, TPS[1]: 10}, "owns_source": False}, ExecutionState.COMPLETED, 100, 20),
        ((8, 10), None, {"ends": {TPS[0]: 8, TPS[1]: 10}, "owns_source": False}, ExecutionState.COMPLETED, 100, 18),
        ((8, 10), None, {"ends": {TPS[0]: 9, TPS[1]: 10}, "owns_source": False}, ExecutionState.IDLE, 94.7, 19),
        ((10, None), None, {"ends": {TPS[0]: 10, TPS[1]: 0}, "owns_source": False}, ExecutionState.COMPLETED, 100, 10),
    ],
)
async def test_complete_is_what_offsets_say(
    broker: FakeBroker,
    clock: FakeClock,
    committed: tuple[int | None, ...],
    publisher: Committed | None,
    fields: dict[str, Any],
    state: ExecutionState,
    percent: float | None,
    total: int | None,
) -> None:
    """A bounded session is complete where its noted ends, or all that its publisher published, is committed."""
    fields = {"owns_source": True, "is_bounded": True, **fields}
    session = Session("p", "job", owns_source=fields["owns_source"])
    await MadeSession(session, fields, committed=committed, publisher=publisher).make(broker, clock)
    (status,) = await statuses(broker, clock)
    assert (status.state, status.total_rows) == (state, total)
    assert status.percent == (None if percent is None else pytest.approx(percent, abs=0.1))


async def test_rows_that_came_after_the_end_do_not_count(broker: FakeBroker, clock: FakeClock) -> None:
    """Kafka's lag of a completed session over a shared topic grows; what it has left to do does not."""
    fields = {"is_bounded": True, "ends": {TPS[0]: 4, TPS[1]: 4}}
    await MadeSession(Session("p", "job"), fields, committed=(4, 4)).make(broker, clock)
    (status,) = await statuses(broker, clock)
    assert (status.state, status.lag) == (ExecutionState.COMPLETED, 0)
    assert [p.lag for p in status.partitions] == [6, 6]


async def test_a_partition_whose_rows_are_gone_is_done(broker: FakeBroker, clock: FakeClock) -> None:
    """Retention was quicker than a session with an end: where nothing is left, nothing will ever be committed."""
    fields = {"is_bounded": True, "ends": {TPS[0]: 10, TPS[1]: 10}}
    await MadeSession(Session("p", "job"), fields, committed=(10, None)).make(broker, clock)
    assert (await statuses(broker, clock))[0].state is ExecutionState.IDLE
    broker.truncate(TPS[1], 10)
    assert (await statuses(broker, clock))[0].state is ExecutionState.COMPLETED


async def join(broker: FakeBroker) -> FakeMember:
    """A worker joins the live session's group, and is given its partitions."""

    class Listener:
        def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None: ...

        async def revoked(self, partitions: frozenset[TopicPartition]) -> None: ...

    joined = broker.member(LIVE.group, ["p"])
    await joined.join(Listener())
    return joined


async def test_live_workers(broker: FakeBroker, clock: FakeClock) -> None:
    """What a worker says lands at its partitions, and ages; once it has left the group it counts no more."""
    await MadeSession(LIVE, committed=(4, 4)).make(broker, clock)
    joined = await join(broker)
    said = {
        "p_0": {"in_flight": 3, "oldest_offset": 5, "oldest_seconds": 2.0},
        "p_1": {"in_flight": 1, "oldest_offset": 9, "oldest_seconds": 7.5},
        "stages": {"score": {"calls": 4, "seconds": 2.0}},
        "breakers": {"api": "half_open"},
    }
    await say(
        broker, clock,
        progress(LIVE, "aa", NOW - 2_500, rows=0, partitions=TPS),
        progress(LIVE, "aa", NOW - 500, rows=20, partitions=TPS, **said),
    )  # fmt: skip
    (status,) = await statuses(broker, clock)
    assert (status.activity, status.rate) == ("executing", 10.0)
    assert status.left_seconds == pytest.approx(1.2)
    assert [(p.worker, p.state, p.in_flight) for p in status.partitions] == [("aa", "running", 3), ("aa", "running", 1)]
    assert status.oldest is not None
    assert (status.oldest.tp, status.oldest.oldest_offset, status.oldest.oldest_seconds) == (TPS[1], 9, 8.0)
    assert (status.breakers, status.stages) == ({"api": "half_open"}, {"score": {"calls": 4, "seconds": 2.0}})
    await joined.leave()
    (status,) = await statuses(broker, clock)
    assert (status.activity, status.rate, status.oldest, status.breakers) == ("idle", None, None, {})


@pytest.mark.parametrize("skew_ms", [-3_600_000, -6_000, 0, 6_000, 3_600_000])
async def test_a_workers_clock_does_not_count(broker: FakeBroker, clock: FakeClock, skew_ms: int) -> None:
    """A worker whose clock is slow is not silent, and one whose clock is fast is not fresh: the broker dates words."""
    await MadeSession(LIVE, committed=(4, 4)).make(broker, clock)
    await join(broker)
    (events,) = broker.make(EVENTS_TOPIC)

    def speak(worker: str, ago_ms: int, rows: int) -> None:
        event = progress(LIVE, worker, NOW - ago_ms + skew_ms, rows=rows, partitions=TPS, p_0={"oldest_seconds": 1.0})
        broker.log(events).append(events, [Outgoing(LIVE.group.encode(), event.encode(), NOW - ago_ms)])

    speak("aa", 5_500, 0)
    (status,) = await statuses(broker, clock)
    assert [(worker.is_silent, worker.seen_seconds) for worker in status.workers] == [(True, 5.5)]
    speak("aa", 500, 20)
    (status,) = await statuses(broker, clock)
    assert [(worker.is_silent, worker.seen_seconds) for worker in status.workers] == [(False, 0.5)]
    assert (status.rate, status.partitions[0].oldest_seconds) == (4.0, 1.5)


HOSTILE: list[Any] = ["abc", "\x1b[31m", "5", True, [1], {"x": 1}]


@pytest.mark.parametrize("value", [*HOSTILE, -5, 1e308, 2**63], ids=repr)
@pytest.mark.parametrize("name", ["committed", "position", "buffered", "in_flight", "oldest_offset", "oldest_seconds"])
async def test_what_is_no_number_of_a_partition_is_left_out(
    broker: FakeBroker, clock: FakeClock, name: str, value: Any
) -> None:
    """Anybody may write to the events: the partition is shown as if its worker had not said that."""
    await MadeSession(LIVE, committed=(4, 4)).make(broker, clock)
    await join(broker)
    honest = {"state": "running", "in_flight": 3, "oldest_offset": 5, "oldest_seconds": 2.0}
    missing = {each: number for each, number in honest.items() if each != name}
    (status,) = await shown(broker, clock, p_0={**honest, name: value})
    (partition, _) = status.partitions
    assert (partition.in_flight, partition.oldest_offset, partition.oldest_seconds) == (
        missing.get("in_flight", 0), missing.get("oldest_offset"), missing.get("oldest_seconds")
    )  # fmt: skip
    assert detail(status, PLACE)
    assert dumps(status.to_dict())


@pytest.mark.parametrize("value", [*HOSTILE, 2**62, -5, 1e308, 253_402_300_800_000], ids=repr)
async def test_what_is_no_number_of_a_worker_is_left_out(broker: FakeBroker, clock: FakeClock, value: Any) -> None:
    """So is when it started, and how much it has in work: a time that has no name is none."""
    await MadeSession(LIVE, committed=(4, 4)).make(broker, clock)
    await join(broker)
    (status,) = await shown(broker, clock, started_ms=value, in_flight=value)
    (worker,) = status.workers
    assert (worker.started_ms, worker.in_flight, worker.name) == (None, 0, "aa")
    assert detail(status, PLACE)
    assert dumps(status.to_dict())


async def shown(broker: FakeBroker, clock: FakeClock, **said: Any) -> list[SessionStatus]:
    """The sessions when a worker said that just now."""
    await say(broker, clock, progress(LIVE, "aa", NOW, partitions=TPS, **said))
    return await statuses(broker, clock)


async def test_the_budget(broker: FakeBroker, clock: FakeClock) -> None:
    """Limit, what was spent, and what is leased, from the ledger, where there is one."""
    await MadeSession(LIVE).make(broker, clock)
    assert (await statuses(broker, clock))[0].budget is None
    await broker.create_topics([TopicSpec(LIVE.budget, 1)])
    ledger = TopicLedger(broker, LIVE.budget, clock=clock)
    await ledger.post(Entry(worker="w", sequence=1, limit=Decimal(5), take=Decimal(2)))
    await ledger.post(Entry(worker="w", sequence=2, limit=Decimal(5), spent=Decimal("0.5")))
    await ledger.close()
    budget = (await statuses(broker, clock))[0].budget
    assert budget is not None
    assert budget.to_dict() == {"limit": "5", "spent": "0.5", "held": "1.5"}


async def test_a_checkpoint_that_cannot_be_read_is_told(broker: FakeBroker, clock: FakeClock) -> None:
    """What is wrong with one session is said there; the others, and its offsets, are shown."""
    await MadeSession(LIVE).make(broker, clock)
    await MadeSession(Session("q")).make(broker, clock)
    changelog = TopicPartition(LIVE.changelog("p"), 0)
    broker.log(changelog).append(changelog, [Outgoing(CHECKPOINT_KEY, b'{"version": 99}', NOW)])
    first, second = await statuses(broker, clock)
    assert "run a newer" in first.problem
    assert (first.lag, second.problem, second.rows.rows) == (16, "", 4)


async def test_without_events_all_that_counts_is_there(
    broker: FakeBroker, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the events may not be read, offsets and counts are shown all the same."""

    async def refused(*_: Any, **__: Any) -> list[EventRecord]:
        raise TopicError("not allowed")

    monkeypatch.setattr("rowmill.streams.status_memory.WordMemory.recent", refused)
    await MadeSession(LIVE).make(broker, clock)
    (status,) = await statuses(broker, clock)
    assert (status.rows.rows, status.rate) == (4, None)


async def test_a_session_that_is_removed_meanwhile(
    broker: FakeBroker, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic that goes while it is looked at makes it look again, and not for ever."""
    await MadeSession(LIVE).make(broker, clock)
    asked, offsets = 0, broker.offsets

    async def vanishing(partitions: Any, at: Any) -> Any:
        nonlocal asked
        asked += at == "high_watermark" and TPS[0] in partitions
        if at == "high_watermark" and TPS[0] in partitions and asked <= failures:
            raise TopicError("p/0: no such partition")
        return await offsets(partitions, at)

    monkeypatch.setattr(broker, "offsets", vanishing)
    failures = 2
    assert len(await statuses(broker, clock)) == 1
    asked, failures = 0, 99
    with pytest.raises(TopicError):
        await statuses(broker, clock)


async def test_a_broker_that_does_not_answer_is_an_error(
    broker: FakeBroker, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is in the group cannot be told: that is never shown as nobody."""

    async def silent(_: str) -> list[MemberInfo]:
        raise BrokerError("gone")

    monkeypatch.setattr(broker, "members", silent)
    await MadeSession(LIVE).make(broker, clock)
    with pytest.raises(BrokerError, match="gone"):
        await statuses(broker, clock)


async def test_sources_that_are_gone(broker: FakeBroker, clock: FakeClock) -> None:
    """A session whose source was deleted is shown, without partitions, and never as complete."""
    await MadeSession(LIVE, {"is_bounded": True, "ends": {TPS[0]: 0}}).make(broker, clock)
    await broker.delete_topics(["p"])
    (status,) = await statuses(broker, clock)
    assert (status.partitions, status.state) == ((), ExecutionState.IDLE)


async def test_a_changelog_narrower_than_its_source(broker: FakeBroker, clock: FakeClock) -> None:
    """A source that has grown since: its new partitions have offsets and no counts yet."""
    await MadeSession(LIVE).make(broker, clock)
    await broker.create_topics([TopicSpec("p", 2)])
    broker.grow("p", 3)
    (status,) = await statuses(broker, clock)
    assert [(p.committed, p.rows.rows) for p in status.partitions] == [(4, 4), (None, 0), (None, 0)]


async def test_a_state_that_is_none_is_left_out(broker: FakeBroker, clock: FakeClock) -> None:
    """A partition's state that is a list does not end the command."""
    await MadeSession(LIVE, committed=(4, 4)).make(broker, clock)
    await join(broker)
    await say(broker, clock, progress(LIVE, "aa", NOW - 500, rows=0, partitions=TPS, p_0={"state": ["y"]}))
    (status,) = await statuses(broker, clock)
    assert status.workers
