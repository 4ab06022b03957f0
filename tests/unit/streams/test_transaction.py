"""Commits that fail at every step: effects appear exactly once, and nothing that took effect is repeated."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord, crc_of
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.errors import BrokerError, BrokerTimeoutError, FencedError, StalledError, TopicError
from rowmill.streams.options import WorkerOptions
from rowmill.streams.session import Session
from rowmill.streams.transaction import CheckpointMovedError, IsOurs, Transactor
from support.fake_broker import FakeBroker, FakeTransactionalProducer, Step, lost
from support.fake_clock import FakeClock

IN = TopicPartition("in", 0)
CHANGELOG = TopicPartition("rowmill.p.in.changelog", 0)
OUT = [TopicPartition("out", partition) for partition in range(2)]
SESSION = Session("p")
GROUP = SESSION.group
OPTIONS = WorkerOptions(broker_timeout=10, stall_timeout=60)
HASTY = WorkerOptions(broker_timeout=0.1, stall_timeout=60)
"""For steps that never answer."""
STEPS: tuple[Step, ...] = ("begin", "send", "ack", "offsets", "end")
COMMIT: list[Step] = ["begin", "send", "send", "send", "ack", "ack", "ack", "offsets", "end"]
LOOKING: list[Step] = ["pending", "look_up", "look_up"]
"""What is asked after a start: the group's offset, and the changelog's two ends."""

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def broker() -> FakeBroker:
    """A broker with a source and a sink."""
    broker = FakeBroker()
    broker.make("in", 1)
    broker.make("out", 2)
    broker.make(CHANGELOG.topic, 1)
    return broker


@pytest.fixture
def clock() -> FakeClock:
    """Time that tests do not wait for."""
    return FakeClock()


@pytest.fixture
def transactor(broker: FakeBroker, clock: FakeClock) -> Transactor:
    """The transactor of in/0."""
    return Transactor(broker, SESSION, IN, OPTIONS, clock)


@pytest.fixture
def hasty(broker: FakeBroker, clock: FakeClock) -> Transactor:
    """The same, with a short deadline."""
    return Transactor(broker, SESSION, IN, HASTY, clock)


def record(number: int) -> Outgoing:
    """The checkpoint record of row ``number``'s commit."""
    offset, crc = number + 1, crc_of(Committed(number + 1, f"map {number}"))
    text = CheckpointRecord(offset, crc, False, None, {}, {}, {}, "me", "").encode()
    return Outgoing(CHECKPOINT_KEY, text, 0)


def witness(broker: FakeBroker, number: int) -> IsOurs:
    """Whose the changelog's last record is, asked about the commit of row ``number``."""

    async def is_ours() -> bool | None:
        last = (broker.values(CHANGELOG.topic) or [None])[-1]
        if last == record(number).value:
            return True
        return False if last == (record(number - 1).value if number else None) else None

    return is_ours


async def commit(transactor: Transactor, number: int) -> None:
    """Commit the effects of row ``number``: a record in each partition of the sink and one in the changelog."""
    broker = transactor._broker
    assert isinstance(broker, FakeBroker)
    outputs = {tp: [Outgoing(None, b"%d" % number, 0)] for tp in OUT} | {CHANGELOG: [record(number)]}
    await transactor.commit(outputs, Committed(number + 1, f"map {number}"), witness(broker, number))


async def ours() -> bool:
    """For commits that do not write the changelog: it is not asked."""
    raise AssertionError("asked")


def exact(broker: FakeBroker, count: int, transactions: int | None = None) -> None:
    """Assert that the effects of rows 0 to count - 1 are there once, in order, with their checkpoint."""
    assert broker.values("out") == [b"%d" % n for n in range(count)] * 2
    assert broker.values(CHANGELOG.topic) == [record(n).value for n in range(count)]
    assert broker.group_offsets.get(GROUP, {}) == ({IN: Committed(count, f"map {count - 1}")} if count else {})
    assert broker.commits == (count if transactions is None else transactions)


async def test_open_fences_then_reads(broker: FakeBroker, transactor: Transactor) -> None:
    """The checkpoint is read only after the former owner is fenced: before, it could still move."""
    zombie = Transactor(broker, SESSION, IN, OPTIONS, FakeClock())
    assert await zombie.open() is None
    await commit(zombie, 0)
    broker.calls.clear()
    assert await transactor.open() == Committed(1, "map 0")
    assert broker.calls == ["start", "committed", *LOOKING]
    with pytest.raises(FencedError):
        await commit(zombie, 1)
    await commit(transactor, 1)
    exact(broker, 2)


async def test_steps_of_a_commit(broker: FakeBroker, transactor: Transactor) -> None:
    """Begin, send, await every acknowledgement, offsets, end: in this order, with one producer for all commits."""
    await transactor.open()
    for number in range(3):
        broker.calls.clear()
        await commit(transactor, number)
        assert broker.calls == COMMIT
        assert transactor.checkpoint == Committed(number + 1, f"map {number}")
    assert broker.starts == {"rowmill.p/in/0": 1}


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("took_effect", [False, True])
@pytest.mark.parametrize("step", STEPS)
async def test_any_step_may_fail(
    broker: FakeBroker,
    transactor: Transactor,
    step: Step,
    took_effect: bool,
    skip: int,
    times: int,
) -> None:
    """Whichever step fails, before or after its work was done, once or again: every effect appears once."""
    await transactor.open()
    await commit(transactor, 0)
    broker.inject(step, lost(), took_effect=took_effect, skip=skip, times=times)
    for number in range(1, 5):
        await commit(transactor, number)
        exact(broker, number + 1)


@pytest.mark.parametrize("took_effect", [False, True])
@pytest.mark.parametrize("step", STEPS)
async def test_any_step_may_never_answer(
    broker: FakeBroker,
    hasty: Transactor,
    step: Step,
    took_effect: bool,
) -> None:
    """A step without an answer ends at its deadline, and what it did is found out, not guessed."""
    await hasty.open()
    broker.inject(step, took_effect=took_effect)
    await commit(hasty, 0)
    await commit(hasty, 1)
    exact(broker, 2)


async def test_a_commit_that_took_effect_is_not_repeated(broker: FakeBroker, transactor: Transactor) -> None:
    """When end() raises although it committed, the checkpoint tells so, and nothing is sent again."""
    await transactor.open()
    broker.inject("end", lost(), took_effect=True)
    broker.calls.clear()
    await commit(transactor, 0)
    assert broker.calls == [*COMMIT, "start", "committed", *LOOKING, "settle"]
    assert transactor.checkpoint == Committed(1, "map 0")
    exact(broker, 1)


async def test_a_commit_that_took_no_effect_is_sent_again(broker: FakeBroker, transactor: Transactor) -> None:
    """When end() raises and did not commit, a new producer aborts what is left and sends the same again."""
    await transactor.open()
    broker.inject("end", lost())
    await commit(transactor, 0)
    assert broker.calls.count("send") == 6
    assert broker.starts == {"rowmill.p/in/0": 2}
    exact(broker, 1)


SETTLING: tuple[Step, ...] = ("start", "committed", "pending", "look_up")


@pytest.mark.parametrize(("step", "hangs"), list(itertools.product(SETTLING, [False, True])))
@pytest.mark.parametrize("took_effect", [False, True])
async def test_finding_out_may_fail_too(
    broker: FakeBroker,
    transactor: Transactor,
    hasty: Transactor,
    step: Step,
    hangs: bool,
    took_effect: bool,
) -> None:
    """While the broker cannot say what became of a commit, it is asked again; only its answer counts."""
    transactor = hasty if hangs else transactor
    await transactor.open()
    broker.inject("end", lost(), took_effect=took_effect)
    broker.inject(step, None if hangs else lost(), times=3)
    await commit(transactor, 0)
    exact(broker, 1)


@pytest.mark.parametrize("step", [*STEPS, *SETTLING])
async def test_fenced(broker: FakeBroker, transactor: Transactor, step: Step) -> None:
    """Fenced at any step: no second attempt, no new producer, which would fence the rightful owner."""
    await transactor.open()
    if step in SETTLING:
        broker.inject("send", lost())
    broker.inject(step, FencedError("somebody else"))
    starts = broker.calls.count("start")
    with pytest.raises(FencedError):
        await commit(transactor, 0)
    assert broker.calls.count("start") - starts <= (step in SETTLING)
    assert (broker.values("out"), broker.commits) == ([], 0)


@pytest.mark.parametrize("step", STEPS)
async def test_a_newer_owner_comes_in_between(broker: FakeBroker, transactor: Transactor, step: Step) -> None:
    """Whenever a newer owner starts, the older one's commit is void, and the newer one goes on."""
    newer = Transactor(broker, SESSION, IN, OPTIONS, FakeClock())
    await transactor.open()
    await commit(transactor, 0)

    def take_over() -> None:
        broker.starts["rowmill.p/in/0"] += 1
        broker.finish("rowmill.p/in/0", commit=False)

    broker.inject(step, FencedError("newer"), then=take_over)
    with pytest.raises(FencedError):
        await commit(transactor, 1)
    assert await newer.open() == Committed(1, "map 0")
    await commit(newer, 1)
    exact(broker, 2)


@pytest.mark.parametrize("found", [Committed(7), Committed(1), Committed(2, "another map"), None])
async def test_somebody_moved_the_checkpoint(
    broker: FakeBroker, transactor: Transactor, found: Committed | None
) -> None:
    """A checkpoint that is neither the old nor the new one is an error: nothing is sent on top of it."""
    await transactor.open()
    await commit(transactor, 0)

    def move() -> None:
        broker.group_offsets[GROUP] = {} if found is None else {IN: found}

    broker.inject("end", lost(), then=move)
    sent = broker.calls.count("send")
    with pytest.raises(CheckpointMovedError, match="in/0: expected"):
        await commit(transactor, 1)
    assert broker.calls.count("send") == sent + 3
    assert await transactor.open() == found


@pytest.mark.parametrize("step", [*STEPS, *SETTLING])
async def test_a_broker_that_stays_away(
    broker: FakeBroker, transactor: Transactor, clock: FakeClock, step: Step
) -> None:
    """After stall_timeout without success the commit gives up, with the last error; pauses grow to 5 s, jittered."""
    await transactor.open()
    if step in SETTLING:
        broker.inject("end", lost())
    broker.inject(step, lost("still away"), times=10_000)
    began = clock.monotonic()
    with pytest.raises(StalledError, match=r"in/0: .*(still away|connection lost)"):
        await commit(transactor, 0)
    assert 60 <= clock.monotonic() - began <= 70
    pauses = [pause for pause in clock.slept if pause != 0.4]  # 0.4: time to hear of an eviction
    assert pauses[0] == pytest.approx(0.075)
    assert max(pauses) == pytest.approx(3.75)
    assert pauses == sorted(pauses)


async def test_a_refusal_is_no_failure(broker: FakeBroker, transactor: Transactor) -> None:
    """Records that the broker refuses for good are an error at once; nothing of the transaction appears."""
    await transactor.open()
    with pytest.raises(TopicError):
        await transactor.commit({OUT[0]: [Outgoing(None, b"x" * 2_000_000, 0)]}, Committed(1), ours)
    with pytest.raises(TopicError):
        await transactor.commit({TopicPartition("absent", 0): [Outgoing(None, b"x", 0)]}, Committed(1), ours)
    await transactor.open()
    await commit(transactor, 0)
    exact(broker, 1)


async def test_fenced_beats_other_errors(broker: FakeBroker, transactor: Transactor) -> None:
    """When one send is lost and the other fenced, it is fenced: that error must not be slept over."""
    await transactor.open()
    broker.inject("ack", lost())
    broker.inject("ack", FencedError("somebody else"))
    with pytest.raises(FencedError):
        await commit(transactor, 0)


@pytest.mark.parametrize("step", SETTLING)
async def test_open_says_why_it_failed(
    broker: FakeBroker, transactor: Transactor, hasty: Transactor, step: Step
) -> None:
    """Opening is not repeated in here: a broker that fails or hangs is an error, and opening again works."""
    broker.inject(step, lost())
    with pytest.raises(BrokerError, match="connection lost"):
        await transactor.open()
    broker.inject(step)
    with pytest.raises(BrokerTimeoutError, match=r"in/0: .*0\.1 s"):
        await hasty.open()
    await transactor.open()
    await commit(transactor, 0)
    exact(broker, 1)


async def test_producers_are_closed(
    broker: FakeBroker, transactor: Transactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each producer that is replaced or done with is closed, and closing twice is no error."""
    made: list[FakeTransactionalProducer] = []
    make = broker.transactional_producer

    def noting(name: str) -> FakeTransactionalProducer:
        made.append(make(name))
        return made[-1]

    monkeypatch.setattr(broker, "transactional_producer", noting)
    await transactor.open()
    broker.inject("end", lost())
    await commit(transactor, 0)
    assert [producer.closed for producer in made] == [True, False]
    await transactor.close()
    await transactor.close()
    assert all(producer.closed for producer in made)


async def test_offsets_alone(broker: FakeBroker, transactor: Transactor) -> None:
    """Rows without effects move the checkpoint all the same."""
    await transactor.open()
    await transactor.commit({}, Committed(9), ours)
    assert broker.group_offsets[GROUP] == {IN: Committed(9)}
    assert broker.values("out") == []


PLACES: tuple[TopicPartition | str, ...] = (*OUT, CHANGELOG, GROUP)
SUBSETS = [subset for size in range(len(PLACES) + 1) for subset in itertools.combinations(PLACES, size)]


def described(places: tuple[TopicPartition | str, ...]) -> str:
    """The id of a subset in a table."""
    return "+".join(str(place) for place in places) or "none"


@pytest.mark.parametrize("places", SUBSETS, ids=described)
@pytest.mark.parametrize("took_effect", [False, True])
async def test_markers_are_given_up(
    broker: FakeBroker, transactor: Transactor, took_effect: bool, places: tuple[TopicPartition | str, ...]
) -> None:
    """A commit's answer is lost, and its outcome, whichever it is, reaches only some places: each effect appears once.

    This is what Kafka does when a broker comes back: a decided transaction's marker for a partition without a leader
    is left out, and the next transaction of the id decides for both (FACTS, "Markers that are given up").
    """
    await transactor.open()
    await commit(transactor, 0)
    broker.inject("end", lost(), took_effect=took_effect)
    broker.give_up_markers(lambda place: place in places)
    await commit(transactor, 1)
    # What nobody saw the outcome of is simply committed, where it lies.
    spared = not took_effect and places == PLACES
    exact(broker, 2, 2 - spared)
    assert not broker.left_open()
    broker.inject("ack", lost())
    await commit(transactor, 2)
    exact(broker, 3, 3 - spared)


@pytest.mark.parametrize("places", SUBSETS, ids=described)
@pytest.mark.parametrize("step", ["begin", "send"])
async def test_markers_of_a_confirmed_commit_are_given_up(
    broker: FakeBroker, transactor: Transactor, step: Step, places: tuple[TopicPartition | str, ...]
) -> None:
    """A commit is confirmed, its markers reach only some places, and the next commit fails: both appear, once."""
    await transactor.open()
    await commit(transactor, 0)
    broker.give_up_markers(lambda place: place in places)
    await commit(transactor, 1)
    broker.inject(step, lost())
    await commit(transactor, 2)
    exact(broker, 3)
    assert not broker.left_open()


@pytest.mark.parametrize("places", SUBSETS, ids=described)
@pytest.mark.parametrize("step", ["ack", "offsets", "end"])
async def test_a_confirmed_commit_is_aborted_with_the_next_one(
    broker: FakeBroker,
    transactor: Transactor,
    step: Step,
    places: tuple[TopicPartition | str, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A commit is confirmed, its markers are given up, and the next one, aborted, takes it along: its rows run again.

    If it is lost everywhere, its effects appear once all the same. If not, none is lost, and the log says the rest.
    """
    await transactor.open()
    await commit(transactor, 0)
    broker.give_up_markers(lambda place: place in places)
    await commit(transactor, 1)
    broker.inject(step, lost())
    lost_in = [place for place in places if place != GROUP]
    if not lost_in:
        await commit(transactor, 2)
        exact(broker, 3)
        return
    with pytest.raises(CheckpointMovedError, match="was lost"):
        await commit(transactor, 2)
    assert await transactor.open() == Committed(1, "map 0")
    assert not broker.left_open()
    in_part = len(lost_in) < len(PLACES) - 1
    assert ("appear twice" in caplog.text) == in_part
    if in_part and CHANGELOG not in places:
        return  # the witness knows no changelog that is ahead
    await commit(transactor, 1)
    await commit(transactor, 2)
    for place in (*OUT, CHANGELOG):
        values = [stored.value for stored in broker.records(place.topic) if stored.partition == place.partition]
        expected = [record(n).value for n in range(3)] if place == CHANGELOG else [b"0", b"1", b"2"]
        assert values == (expected if place in places else [*expected[:2], *expected[1:]])


@pytest.mark.parametrize("places", SUBSETS, ids=described)
async def test_the_next_owner_finds_markers_given_up(
    broker: FakeBroker, transactor: Transactor, places: tuple[TopicPartition | str, ...]
) -> None:
    """A commit's markers reach only some places and its process is gone: the next owner goes on behind it."""
    await transactor.open()
    await commit(transactor, 0)
    broker.give_up_markers(lambda place: place in places)
    await commit(transactor, 1)
    newer = Transactor(broker, SESSION, IN, OPTIONS, FakeClock())
    assert await newer.open() == Committed(2, "map 1")
    await commit(newer, 2)
    exact(broker, 3)


@pytest.mark.parametrize("places", [subset for subset in SUBSETS if not {*OUT, *PLACES[2:]} <= {*subset, *OUT}])
async def test_the_next_owner_finds_an_abort_given_up(
    broker: FakeBroker, transactor: Transactor, places: tuple[TopicPartition | str, ...]
) -> None:
    """The same with a transaction that was aborted: the next owner begins where it began, on clean tables."""
    await transactor.open()
    await commit(transactor, 0)
    broker.inject("end", TopicError("the process dies"))
    with pytest.raises(TopicError):
        await commit(transactor, 1)
    broker.give_up_markers(lambda place: place in places)
    newer = Transactor(broker, SESSION, IN, OPTIONS, FakeClock())
    assert await newer.open() == Committed(1, "map 0")
    assert await broker.offsets([CHANGELOG], "end") == await broker.offsets([CHANGELOG], "high_watermark")
    assert not await broker.pending(GROUP, [IN])
    assert broker.values(CHANGELOG.topic) == [record(0).value]


async def test_a_settling_that_fails(broker: FakeBroker, transactor: Transactor) -> None:
    """What was left open is looked at again when ending it failed, whether or not that took effect."""
    for number, took_effect in enumerate([False, True]):
        broker.inject("settle", lost(), took_effect=took_effect, times=2)
        broker.inject("end", lost(), took_effect=took_effect)
        broker.give_up_markers(lambda place: place in {*OUT, GROUP})
        if not number:
            await transactor.open()
        await commit(transactor, number)
        exact(broker, number + 1)


async def test_a_reset_is_no_marker_given_up(broker: FakeBroker, transactor: Transactor) -> None:
    """An offset that was moved with Kafka's tool waits for nothing: it is believed, and nothing is ended."""
    await transactor.open()
    for number in range(3):
        await commit(transactor, number)
    broker.group_offsets[GROUP] = {IN: Committed(1)}
    broker.calls.clear()
    assert await transactor.open() == Committed(1)
    assert broker.calls == ["start", "committed", *LOOKING]


def test_every_step_is_tested() -> None:
    """A step that the fake learns to fail at is in the tables here, or belongs to somebody else."""
    assert set(get_args(Step)) == {*STEPS, *SETTLING, "settle", "topics", "create", "fetch", "position", "commit"}
