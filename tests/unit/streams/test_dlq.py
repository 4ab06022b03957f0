"""Dead letters on the fake broker: reading them, where rows may go, and exactly once whatever fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from rowmill import Pipeline
from rowmill.handlers.chain import Failure
from rowmill.state.codec import dumps, loads
from rowmill.state.errors import ConfigError
from rowmill.state.model import Headers, Outgoing, TopicPartition
from rowmill.streams.dead_letters import dead_letter
from rowmill.streams.dlq import DeadLetters, letters_topic, targets_of
from rowmill.streams.dlq_letters import DeadLetter, Mark, Selection, marks_topic, parse_id, read_letter
from rowmill.streams.dlq_retry import RETRIED_HEADER, Outcome, Targets
from rowmill.streams.errors import CheckpointError, TopicError
from rowmill.streams.partitioning import partition_for
from rowmill.streams.session import Session
from support.fake_broker import FakeBroker, Step, lost
from support.fake_clock import FakeClock
from support.rows import record

TOPIC = "p.dlq"
MARKS = "rowmill.p.dlq.marks"
SOURCE = Targets(sources=frozenset(("in",)))
ALL = Selection()


@pytest.fixture
def broker() -> FakeBroker:
    """Two partitions of a source, and as many of dead letters."""
    broker = FakeBroker()
    broker.make("in", 2)
    broker.make(TOPIC, 2)
    return broker


def letter(number: int, *, topic: str = "in", partition: int = 0, key: bytes | None = None, **fault: Any) -> Outgoing:
    """A dead letter as a worker writes it, of the row ``{"n": number}``."""
    failure = Failure(
        fault.get("stage", "score"), fault.get("kind", "ValueError"), fault.get("message", "no"), 3, "f:1"
    )
    row = record({"n": number}, offset=number, topic=topic, partition=partition, key=key, timestamp=1_000 + number,
                 headers=(("trace", b"t"), ("rowmill.session", b"x")))  # fmt: skip
    return dead_letter(row.tp, row, failure, "live", fault.get("room", 1_000_000))


def fill(broker: FakeBroker, *letters: Outgoing, partition: int = 0) -> None:
    """Put dead letters in a partition of their topic."""
    broker.append(TopicPartition(TOPIC, partition), letters, None)


def dlq(broker: FakeBroker, **options: Any) -> DeadLetters:
    """The dead letters, in batches of two."""
    return DeadLetters(broker, TOPIC, clock=FakeClock(), **({"batch_rows": 2} | options))


async def waiting(broker: FakeBroker, selection: Selection = ALL, **options: Any) -> list[DeadLetter]:
    """Those that are listed."""
    return [each async for each in dlq(broker).read(selection, **options)]


def sent(broker: FakeBroker, topic: str = "in") -> list[int]:
    """The rows that a topic has."""
    return [loads(value or b"")["n"] for value in broker.values(topic)]


# --- reading ---------------------------------------------------------------------------------------------------


def test_what_a_worker_wrote_is_read() -> None:
    """Everything that a dead letter says of its row and its error is told, and the row's own headers are kept."""
    out = letter(7, partition=1, key=b"k", message="so\nbad")
    found = read_letter(
        record(out.value, key=out.key, headers=out.headers, timestamp=out.timestamp, topic=TOPIC, offset=4)
    )
    assert (found.id, found.stage, found.type, found.message, found.attempts) == (
        "0/4",
        "score",
        "ValueError",
        "so\nbad",
        3,
    )
    assert (found.came_from, found.session, found.where, found.key, found.row) == (
        "in/1/7",
        "live",
        "f:1",
        b"k",
        {"n": 7},
    )
    assert (found.headers, found.truncated, found.mark) == ((("trace", b"t"),), None, None)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("rowmill.error.attempts", b"many"), ("rowmill.error.offset", b"-1"), ("rowmill.error.partition", None)),
        (("rowmill.error.attempts", "²".encode()), ("rowmill.input.row", "²".encode())),
        (("rowmill.error.offset", b"9" * 5_000), ("rowmill.error.topic", b"")),
    ],
)
def test_what_somebody_else_wrote_is_read(headers: Headers) -> None:
    """Records without our headers, or with nonsense in them, have blanks."""
    found = read_letter(record(b"\xff", headers=headers))
    assert (found.stage, found.attempts, found.came_from, found.source_offset) == ("", None, "", None)


def test_kafka_connects_headers_are_read() -> None:
    """Dead letters of Kafka Connect say where they come from and why in their own words."""
    names = {"topic": "in", "partition": "1", "offset": "5", "class.name": "Cast", "exception.class.name": "E"}
    headers = tuple((f"__connect.errors.{name}", text.encode()) for name, text in names.items())
    found = read_letter(record(b"{}", headers=headers))
    assert (found.came_from, found.stage, found.type, found.headers) == ("in/1/5", "Cast", "E", ())


@pytest.mark.parametrize(
    ("selection", "numbers"),
    [
        (Selection(), [0, 1, 2, 3]),
        (Selection(stages=frozenset(("clean",))), [1]),
        (Selection(types=frozenset(("OSError", "KeyError"))), [2]),
        (Selection(since=1_001, until=1_003), [1, 2]),
        (Selection(places=frozenset(((0, 0), (1, 0)))), [0, 3]),
        (Selection(places=frozenset(((0, 0),)), stages=frozenset(("clean",))), []),
    ],
)
async def test_filters(broker: FakeBroker, selection: Selection, numbers: list[int]) -> None:
    """Each filter narrows what is listed; together all must hold."""
    fill(broker, letter(0), letter(1, stage="clean"), letter(2, kind="OSError"))
    fill(broker, letter(3), partition=1)
    assert sorted(each.row["n"] for each in await waiting(broker, selection)) == numbers


async def test_a_topic_that_is_not_there(broker: FakeBroker) -> None:
    """The message names the dead-letter topics that are."""
    with pytest.raises(TopicError, match=r"no dead-letter topic 'q\.dlq'.*p\.dlq"):
        await anext(DeadLetters(broker, "q.dlq", clock=FakeClock()).read())


async def test_one_by_its_place(broker: FakeBroker) -> None:
    """The record at exactly this place, with its mark; any other place is an error that says so."""
    fill(broker, letter(0), letter(1))
    await dlq(broker).purge(Selection(places=frozenset(((0, 1),))), by="me")
    found = await dlq(broker).find(0, 1)
    assert found.row == {"n": 1}
    assert found.mark is not None
    assert (found.mark.state, found.mark.by) == ("purged", "me")
    for place in [(0, 2), (1, 0), (9, 0)]:
        with pytest.raises(ConfigError, match="no dead letter there"):
            await dlq(broker).find(*place)


@pytest.mark.parametrize("text", ["", "1", "a/b", "-1/2", "1/2/3/4", "other/0/1", "0/²", "0/1 ", "/0/1"])
def test_ids_that_are_none(text: str) -> None:
    """An id is partition/offset, perhaps after the topic's own name."""
    with pytest.raises(ConfigError, match="partition/offset"):
        parse_id(text, TOPIC)
    assert parse_id("0/17", TOPIC) == parse_id("p.dlq/0/17", TOPIC) == (0, 17)


# --- where rows go ---------------------------------------------------------------------------------------------


async def test_rows_are_sent_as_they_were(broker: FakeBroker) -> None:
    """Key, value and headers without those of the error; at the present time; each marked; nothing waits any more."""
    fill(broker, letter(0, key=b"k"), letter(1, partition=1))
    outcome = await dlq(broker).retry(ALL, SOURCE, by="me")
    assert (outcome.count, outcome.targets, outcome.refusals) == (2, Counter({"in": 2}), 0)
    rows = {loads(row.value or b"")["n"]: row for row in broker.records("in")}
    assert rows[0].key == b"k"
    assert rows[0].headers == (("trace", b"t"), (RETRIED_HEADER, b"p.dlq/0/0"))
    assert rows[0].timestamp == FakeClock().now_ms()
    assert rows[0].partition == partition_for(b"k", 2)
    assert rows[1].partition == 1, "a row without a key goes where it came from"
    assert await waiting(broker) == []
    assert [each.mark.state for each in await waiting(broker, marked=True) if each.mark] == ["retried"] * 2
    assert loads(broker.values(MARKS)[0] or b"")["to"] == f"in/{partition_for(b'k', 2)}"


async def test_the_original_time(broker: FakeBroker) -> None:
    """Where it is asked for, rows keep their own time."""
    fill(broker, letter(5))
    await dlq(broker).retry(ALL, SOURCE, timestamp="original")
    assert broker.records("in")[0].timestamp == 1_005


async def test_headers_choose_no_topic(broker: FakeBroker) -> None:
    """A recorded topic that is no declared source gets nothing; nor is anything guessed where none is recorded."""
    broker.make("secret")
    fill(broker, letter(0, topic="secret"), letter(1), letter(2, topic="gone"))
    fill(broker, Outgoing(None, b"{}", 1), partition=1)
    outcome = await dlq(broker).retry(ALL, Targets(sources=frozenset(("in", "gone"))))
    assert (sent(broker), broker.values("secret"), outcome.count) == ([1], [], 1)
    assert {next(iter(ids)): reason for reason, ids in outcome.refused.items()} == {
        "0/0": "it says that it came from 'secret', and sources are gone, in; send it with --to TOPIC",
        "0/2": "there is no topic 'gone' on fake://; make it first",
        "1/0": "it does not say which topic it came from; sources are gone, in; send it with --to TOPIC",
    }
    assert {each.id for each in await waiting(broker)} == {"0/0", "0/2", "1/0"}


async def test_what_was_cut_is_refused(broker: FakeBroker) -> None:
    """A dead letter whose value was cut says so and is never sent."""
    out = letter(0)
    fill(broker, out._replace(headers=(*out.headers, ("rowmill.error.truncated", b"99999"))))
    outcome = await dlq(broker).retry(ALL, Targets(to="in"))
    assert [*outcome.refused] == ["its value was cut when it became a dead letter; the row cannot be made whole again"]
    assert (broker.values("in"), (await waiting(broker))[0].truncated) == ([], 99_999)


async def test_a_topic_of_ones_own_choice(broker: FakeBroker) -> None:
    """``to`` takes every row, one of another tool's dead letter too; it has to exist, and to be another topic."""
    broker.make("elsewhere", 3)
    fill(broker, letter(0, topic="secret"), Outgoing(b"k", b'{"n":1}', 1))
    for wrong, error in [("nowhere", TopicError), (TOPIC, ConfigError), ("rowmill.events", ConfigError)]:
        with pytest.raises(error):
            await dlq(broker).plan(ALL, Targets(to=wrong))
    assert (await dlq(broker).retry(ALL, Targets(to="elsewhere"))).count == 2
    assert sorted(sent(broker, "elsewhere")) == [0, 1]


async def test_too_large_for_its_source(broker: FakeBroker) -> None:
    """A row that its topic does not take is refused, and does not stop those behind it."""
    fill(broker, letter(0)._replace(value=dumps({"n": 0, "text": "x" * 1_000_000})), letter(1))
    outcome = await dlq(broker).retry(ALL, SOURCE)
    assert (outcome.refusals, sent(broker)) == (1, [1])


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        ("p", {}, "give the pipeline's file"),
        ("p.dlq", {}, "give the pipeline's file"),
        ("p", {"to": "a", "sources": ["b"]}, "not together"),
        ("p.dlq.run-1", {"sources": ["in"]}, "run them as another session"),
        (Pipeline("p", source="in"), {"sources": ["b"]}, "declares in"),
    ],
)
def test_nobody_said_where_to(pipeline: Any, options: dict[str, Any], message: str) -> None:
    """Without the pipeline's file somebody has to name a topic; a session's own rows need one in any case."""
    with pytest.raises(ConfigError, match=message):
        targets_of(letters_topic(pipeline), pipeline, **options)


def test_names() -> None:
    """Topics of sessions and marks; no session's dead letters can be another's marks."""
    pipeline = Pipeline("p", source=["a", "b"])
    assert letters_topic(pipeline) == letters_topic("p") == letters_topic("p.dlq") == "p.dlq"
    assert letters_topic("p", "s") == Session("p", "s").dead_letters
    assert targets_of("p.dlq", pipeline).names == {"a", "b"}
    assert marks_topic("p.dlq") == MARKS != Session("p", "marks").dead_letters
    with pytest.raises(ConfigError, match="is a topic"):
        letters_topic("p.dlq", "s")


# --- planning and purging --------------------------------------------------------------------------------------


async def test_a_plan_changes_nothing(broker: FakeBroker) -> None:
    """What would be done is counted; no producer starts, nothing is made or written."""
    fill(broker, letter(0), letter(1, stage="clean"))
    selection = Selection(places=frozenset(((0, 0), (0, 1), (1, 9))))
    outcome = await dlq(broker).plan(selection, SOURCE)
    assert outcome == Outcome(
        done=Counter({("score", "ValueError"): 1, ("clean", "ValueError"): 1}),
        targets=Counter(["in", "in"]),
        missing=["1/9"],
    )
    assert not {"start", "send", "create"} & set(broker.calls)


async def test_purged_ones_are_gone_from_lists(broker: FakeBroker) -> None:
    """A purge marks and sends nothing; a retry passes over what was purged; again it finds nothing to do."""
    fill(broker, letter(0), letter(1, stage="clean"), letter(2))
    outcome = await dlq(broker).purge(Selection(stages=frozenset(("score",))))
    assert (outcome.count, sent(broker), [each.row["n"] for each in await waiting(broker)]) == (2, [], [1])
    assert (await dlq(broker).retry(ALL, SOURCE)).marked == 2
    assert sent(broker) == [1]
    starts = dict(broker.starts)
    assert (await dlq(broker).purge(ALL)).count == 0
    assert broker.starts == starts


async def test_marks_of_another_time(broker: FakeBroker) -> None:
    """Once the topic is deleted and made anew, old marks hide nothing at the same places."""
    fill(broker, letter(0), letter(1))
    await dlq(broker).purge(ALL)
    broker.make(TOPIC, 2)
    fill(broker, letter(10), letter(11))
    assert len(await waiting(broker)) == 2
    await dlq(broker).retry(ALL, SOURCE)
    assert (sent(broker), await waiting(broker)) == ([10, 11], [])


async def test_marks_are_forgotten_with_their_letters(broker: FakeBroker) -> None:
    """What retention removed needs no mark: the next transaction takes it off the compacted topic."""
    fill(broker, *(letter(number) for number in range(4)))
    await dlq(broker).purge(ALL)
    broker.truncate(TopicPartition(TOPIC, 0), 3)
    fill(broker, letter(4))
    await dlq(broker).purge(ALL)
    assert {each.key for each in broker.records(MARKS) if each.value is None} == {b"0/0", b"0/1", b"0/2"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"what", "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"v":1,"state":"lost"}', "cannot be read"),
        (b'{"v":2}', "newer rowmill"),
    ],
)
async def test_unreadable_marks(broker: FakeBroker, value: bytes, message: str) -> None:
    """Nothing is guessed about a mark: an overlooked one would send a row twice. A foreign key is no mark."""
    fill(broker, letter(0))
    (tp, *_) = broker.make(MARKS, 2)
    broker.write(tp, b"{}", key=b"hello")
    assert len(await waiting(broker)) == 1
    broker.write(tp, value, key=b"0/0")
    with pytest.raises(CheckpointError, match=message):
        await dlq(broker).retry(ALL, SOURCE)
    assert sent(broker) == []


def test_what_a_mark_looks_like() -> None:
    """The stored form is fixed: marks outlive versions."""
    assert loads(Mark("retried", 5, "me", "in/1", "ab", "r.0.1").encode()) == {
        "v": 1, "state": "retried", "time": 5, "by": "me", "to": "in/1", "letter": "ab", "batch": "r.0.1",
    }  # fmt: skip


async def test_more_partitions_than_before(broker: FakeBroker) -> None:
    """When the dead-letter topic has grown, its marks grow with it."""
    fill(broker, letter(0))
    await dlq(broker).purge(ALL)
    broker.grow(TOPIC, 4)
    fill(broker, letter(1), partition=3)
    await dlq(broker).retry(ALL, SOURCE)
    assert (sent(broker), await waiting(broker)) == ([1], [])


# --- exactly once ----------------------------------------------------------------------------------------------

STEPS: tuple[Step, ...] = ("start", "look_up", "topics", "fetch", "position", "begin", "send", "ack", "end")


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("took_effect", [False, True])
@pytest.mark.parametrize("skip", range(4))
@pytest.mark.parametrize("step", STEPS)
async def test_a_crash_after_every_step(step: Step, skip: int, took_effect: bool, markers: bool) -> None:
    """Killed before or after any step, and run again: each row is in the source once, and the counts agree."""
    broker = FakeBroker(markers=markers)
    broker.make("in", 2)
    broker.make(TOPIC, 2)
    for partition in range(2):
        fill(broker, *(letter(10 * partition + number) for number in range(5)), partition=partition)
    broker.inject(step, asyncio.CancelledError(), took_effect=took_effect, skip=skip)  # type: ignore[arg-type]
    first = asyncio.create_task(dlq(broker).retry(ALL, SOURCE))
    await asyncio.wait({first}, timeout=10)
    assert first.done()
    if step != "start" or skip < 2:  # else its last breath was faulted as well
        places = [*broker.partitions("in"), *broker.partitions(TOPIC)]
        assert not any(broker.log(place).open for place in places), "an open transaction would hold up readers"
    broker._faults.clear()  # it may have needed fewer calls
    await dlq(broker).retry(ALL, SOURCE)
    assert sorted(sent(broker)) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert await waiting(broker) == []


@pytest.mark.parametrize("took_effect", [False, True])
@pytest.mark.parametrize("skip", range(4))
@pytest.mark.parametrize("step", ["start", "begin", "send", "ack", "end"])
async def test_a_broker_that_fails(broker: FakeBroker, step: Step, skip: int, took_effect: bool) -> None:
    """What became of a failed transaction is read from the marks; the same call goes on, and counts each row once."""
    fill(broker, *(letter(number) for number in range(6)))
    broker.inject(step, lost(), took_effect=took_effect, skip=skip)
    outcome = await dlq(broker).retry(ALL, SOURCE)
    assert (sorted(sent(broker)), outcome.count) == ([*range(6)], 6)
    assert outcome.targets == Counter({"in": 6})


async def test_a_broker_that_is_gone(broker: FakeBroker) -> None:
    """After some attempts the error comes through."""
    fill(broker, letter(0))
    broker.inject("end", lost(), times=100)
    with pytest.raises(type(lost())):
        await dlq(broker).retry(ALL, SOURCE)
    assert sent(broker) == []


async def test_two_at_once(broker: FakeBroker) -> None:
    """The later one fences the earlier, which gives way and says so; together they send each row once."""
    fill(broker, *(letter(number) for number in range(40)))
    outcomes = await asyncio.gather(*(dlq(broker).retry(ALL, SOURCE) for _ in range(3)))
    assert sorted(sent(broker)) == [*range(40)]
    assert await waiting(broker) == []
    assert sum(outcome.count for outcome in outcomes) == 40
    assert [0] in [outcome.fenced for outcome in outcomes]


@pytest.mark.parametrize("late", range(1, 40, 3))
async def test_a_retry_and_a_purge_at_once(broker: FakeBroker, late: int) -> None:
    """Whatever the order, a dead letter has one fate: its row was sent, or it was purged."""
    fill(broker, *(letter(number) for number in range(10)))
    first = asyncio.create_task(dlq(broker).retry(ALL, SOURCE))
    for _ in range(late):
        await asyncio.sleep(0)
    await asyncio.gather(first, dlq(broker).purge(ALL))
    fates = {each.row["n"]: each.mark.state for each in await waiting(broker, marked=True) if each.mark}
    assert len(fates) == 10
    assert sorted(sent(broker)) == [number for number, state in sorted(fates.items()) if state == "retried"]


@pytest.mark.parametrize("where", ["marks", "rows", "both"])
@pytest.mark.parametrize("then", ["end", "begin"])
async def test_markers_that_were_given_up(broker: FakeBroker, where: str, then: Step) -> None:
    """Where Kafka ended a transaction in some places only, the next one ends the rest in the same way."""
    fill(broker, *(letter(number) for number in range(4)))
    broker.give_up_markers(
        lambda place: (
            isinstance(place, TopicPartition) and (where == "both" or (place.topic == MARKS) == (where == "marks"))
        )
    )
    broker.inject(then, lost(), took_effect=True, skip=1 if then == "begin" else 0, times=1)
    outcome = await dlq(broker).retry(ALL, SOURCE)
    assert (sorted(sent(broker)), outcome.count) == ([0, 1, 2, 3], 4)
    assert not broker.left_open()


async def test_commits_that_show_late() -> None:
    """Where a commit shows some time after it is confirmed, a list right behind it is right all the same."""
    broker = FakeBroker(lazy=0.01)
    broker.make("in")
    broker.make(TOPIC)
    fill(broker, *(letter(number) for number in range(5)))
    letters = DeadLetters(broker, TOPIC, clock=_PatientClock(), batch_rows=2)
    await letters.retry(ALL, SOURCE)
    assert await waiting(broker) == []


class _PatientClock(FakeClock):
    """Its sleeps let a little real time pass."""

    async def sleep(self, seconds: float) -> None:
        """A hundredth of it."""
        await super().sleep(seconds)
        await asyncio.sleep(seconds / 10)
