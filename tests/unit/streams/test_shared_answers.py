"""Answers that follow their partition: written in the background, read at an assignment, and never fatal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
from rowmill.handlers.cache import Cache, Origin, StageCache
from rowmill.state.answers import Answers, MemoryAnswers
from rowmill.state.model import TopicPartition
from rowmill.streams.errors import OffsetOutOfRangeError, TopicError
from rowmill.streams.shared_answers import SharedAnswers, topic_config
from support.fake_broker import FakeBroker, Step, lost
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(60)

TOPIC = "rowmill.p.in.answers"
SOURCE, TARGET = TopicPartition("in", 1), TopicPartition(TOPIC, 1)
ORIGIN = Origin("live", *SOURCE, 42)
MIB = 1 << 20


class Bench:
    """A broker with the topics of a pipeline, and workers that share answers over it."""

    def __init__(self) -> None:
        self.broker = FakeBroker()
        self.clock = FakeClock()
        self.broker.make("in", 3)
        self.broker.make(TOPIC, 3, {"cleanup.policy": "compact"})
        self.workers: list[SharedAnswers] = []

    def worker(
        self, *stages: str, timeout: float = 5, queue_bytes: int = MIB
    ) -> tuple[SharedAnswers, dict[str, Answers]]:
        """One more, with nothing of its own."""
        answers: dict[str, Answers] = {stage: MemoryAnswers(MIB) for stage in stages or ("score",)}
        shared = SharedAnswers(
            self.broker, {"in": TOPIC}, answers, self.clock, timeout=timeout, queue_bytes=queue_bytes
        )
        self.workers.append(shared)
        return shared, answers


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Fresh; its workers are closed."""
    bench = Bench()
    yield bench
    for worker in bench.workers:
        await worker.close()


@pytest.mark.parametrize(
    ("caches", "policy", "retention"),
    [
        ([Cache(shared=True)], "compact", None),
        ([Cache(shared=True, ttl=60), Cache(shared=True)], "compact", None),
        ([Cache(shared=True, ttl=60), Cache(shared=True, ttl=0.5), Cache()], "compact,delete", "60000"),
    ],
)
def test_the_topic_forgets_where_it_may(caches: list[Cache], policy: str, retention: str | None) -> None:
    """Retention is the longest time to live, when all answers have one."""
    config = topic_config(caches)
    assert (config["cleanup.policy"], config.get("retention.ms")) == (policy, retention)


async def test_an_answer_reaches_another_worker(bench: Bench) -> None:
    """What one published, the other finds once it has the partition: through two stages' caches of one name."""
    one, theirs = bench.worker()
    other, ours = bench.worker()
    writing = StageCache(Cache(ttl=60, version="1"), "score", None, theirs["score"], bench.clock, one.publish)
    reading = StageCache(Cache(ttl=60, version="1"), "score", None, ours["score"], bench.clock, other.publish)
    key = writing.key({"a": 1}) or b""
    writing.keep(key, {"b": 2}, Decimal("0.5"), 7, ORIGIN)
    assert await one.flush(5)
    assert reading.find(key) is None
    assert await other.load(SOURCE) == 1
    answer = reading.find(key)
    assert answer is not None
    assert (answer.outcome, answer.cost, answer.paid_by(ORIGIN)) == ({"b": 2}, Decimal("0.5"), True)
    assert [len(bench.broker.log(tp).records) for tp in bench.broker.partitions(TOPIC)] == [0, 1, 0]
    bench.clock.advance(60)
    assert reading.find(key) is None


async def test_only_what_is_new_is_read(bench: Bench) -> None:
    """A second load goes on where the first ended, and a worker's own answers are no news to it."""
    one, _ = bench.worker()
    other, _ = bench.worker()
    for number in range(3):
        one.publish("score", ORIGIN, b"%d" % number, b"value", None)
    await one.flush(5)
    assert await other.load(SOURCE) == 3
    assert await other.load(SOURCE) == 0
    one.publish("score", ORIGIN, b"new", b"value", None)
    await one.flush(5)
    assert await other.load(SOURCE) == 1
    assert other.loaded == 4


async def test_a_stage_that_is_new_reads_from_the_start(bench: Bench) -> None:
    """Stages are told apart; one that joins later gets all of its answers, unknown ones are passed over."""
    one, _ = bench.worker("score", "other")
    for stage in ("score", "other", "third"):
        one.publish(stage, ORIGIN, b"key", stage.encode(), None)
    await one.flush(5)
    first, answers = bench.worker("score")
    assert await first.load(SOURCE) == 1
    second = SharedAnswers(
        bench.broker, {"in": TOPIC}, {**answers, "other": MemoryAnswers(MIB)}, bench.clock, timeout=5
    )
    assert await second.load(SOURCE) == 1
    assert answers["score"].get(b"key", 0) == b"score"


async def test_expired_and_odd_records_are_passed_over(bench: Bench) -> None:
    """What has expired, tombstones, and whatever else somebody put in the topic."""
    one, _ = bench.worker()
    one.publish("score", ORIGIN, b"old", b"value", bench.clock.now_ms() + 1_000)
    one.publish("score", ORIGIN, b"young", b"value", bench.clock.now_ms() + 3_000)
    await one.flush(5)
    bench.broker.write(TARGET, None, b"", b"short", b"x" * 50, key=b"score/odd")
    bench.broker.write(TARGET, b"x" * 50, None)
    bench.broker.write(TARGET, b"x" * 50, key=b"/")
    bench.clock.advance(2)
    other, answers = bench.worker()
    await other.load(SOURCE)
    assert answers["score"].get(b"old", 0) is None
    assert answers["score"].get(b"young", 0) == b"value"


async def test_a_topic_made_anew_is_read_from_its_start(bench: Bench) -> None:
    """A position beyond the end says that this is another topic."""
    one, _ = bench.worker()
    other, answers = bench.worker()
    for number in range(5):
        one.publish("score", ORIGIN, b"%d" % number, b"value", None)
    await one.flush(5)
    await other.load(SOURCE)
    bench.broker.make(TOPIC, 3)
    one.publish("score", ORIGIN, b"new", b"value", None)
    await one.flush(5)
    assert await other.load(SOURCE) == 1
    assert answers["score"].get(b"new", 0) == b"value"


async def test_a_topic_that_was_cut_is_read_from_its_start(bench: Bench) -> None:
    """A position below the start is behind retention."""
    one, _ = bench.worker()
    for number in range(5):
        one.publish("score", ORIGIN, b"%d" % number, b"value", None)
    await one.flush(5)
    bench.broker.truncate(TARGET, 3)
    other, _ = bench.worker()
    assert await other.load(SOURCE) == 2


async def test_gaps_at_the_end(bench: Bench) -> None:
    """Offsets without records are no reason to wait."""
    one, _ = bench.worker()
    one.publish("score", ORIGIN, b"key", b"value", None)
    await one.flush(5)
    bench.broker.skip_offsets(TARGET, 5)
    other, _ = bench.worker()
    assert await other.load(SOURCE) == 1


async def test_other_sources_are_not_shared(bench: Bench) -> None:
    """A source without a topic of answers has nothing to read and writes nothing."""
    one, _ = bench.worker()
    one.publish("score", ORIGIN._replace(topic="elsewhere"), b"key", b"value", None)
    assert await one.flush(5)
    assert await one.load(TopicPartition("elsewhere", 0)) == 0
    assert (one.sent, one.lost, bench.broker.values(TOPIC)) == (0, 0, [])


@pytest.mark.parametrize("step", ["look_up", "fetch", "position"])
@pytest.mark.parametrize("hangs", [False, True])
async def test_reading_that_fails_is_gone_without(
    bench: Bench, step: Step, hangs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An error and a broker that never answers: one warning, rows go on, and the next assignment reads again."""
    one, _ = bench.worker()
    one.publish("score", ORIGIN, b"key", b"value", None)
    await one.flush(5)
    other, _ = bench.worker(timeout=0.05)
    bench.broker.inject(step, None if hangs else lost())
    assert await other.load(SOURCE) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert await other.load(SOURCE) == 1


async def test_a_range_that_is_gone_is_gone_without(bench: Bench) -> None:
    """Retention that is quicker than the reader is no error."""
    one, _ = bench.worker()
    one.publish("score", ORIGIN, b"key", b"value", None)
    await one.flush(5)
    bench.broker.inject("fetch", OffsetOutOfRangeError(TARGET, 0, "choose"))
    other, _ = bench.worker()
    assert await other.load(SOURCE) == 0
    assert await other.load(SOURCE) == 1


@pytest.mark.parametrize("step", ["send", "ack"])
@pytest.mark.parametrize("error", [lost(), TopicError("refused"), None, RuntimeError("a bug")], ids=repr)
async def test_writing_that_fails_is_counted(
    bench: Bench, step: Step, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong: one line, a count, and the next answer is written again."""
    one, _ = bench.worker(timeout=0.05)
    bench.broker.inject(step, error)
    one.publish("score", ORIGIN, b"1", b"value", None)
    assert await one.flush(5)
    assert (one.sent, one.lost) == (0, 1)
    bench.broker.inject(step, error)
    one.publish("score", ORIGIN, b"2", b"value", None)
    assert await one.flush(5)
    one.publish("score", ORIGIN, b"3", b"value", None)
    assert await one.flush(5)
    assert (one.sent, one.lost) == (1, 2)
    assert len(caplog.records) == 1


async def test_a_missing_partition_loses_its_own_answers_only(bench: Bench) -> None:
    """Answers of other partitions are written, in the same go."""
    one, _ = bench.worker()
    one.publish("score", ORIGIN._replace(partition=9), b"1", b"value", None)
    one.publish("score", ORIGIN, b"2", b"value", None)
    assert await one.flush(5)
    assert (one.sent, one.lost) == (1, 1)


async def test_what_waits_is_bounded(bench: Bench) -> None:
    """Beyond the bound answers are not shared; those that wait are."""
    one, _ = bench.worker(queue_bytes=10_000)
    for number in range(100):
        one.publish("score", ORIGIN, b"%d" % number, b"x" * 400, None)
    assert one.lost > 80
    assert await one.flush(5)
    assert one.sent + one.lost == 100
    assert len(bench.broker.values(TOPIC)) == one.sent > 5


async def test_an_answer_too_large_for_a_record(bench: Bench) -> None:
    """It stays with the worker that has it."""
    one, _ = bench.worker(queue_bytes=10 * MIB)
    one.publish("score", ORIGIN, b"key", bytes(bench.broker.max_message_bytes), None)
    assert await one.flush(5)
    assert (one.sent, one.lost) == (0, 1)


async def test_many_are_written_in_order(bench: Bench) -> None:
    """Also those that come while others are under way."""
    one, _ = bench.worker()
    for number in range(1_200):
        one.publish("score", ORIGIN, b"%04d" % number, b"value", None)
        if number % 100 == 0:
            await asyncio.sleep(0)
    assert await one.flush(10)
    keys = [record.key for record in bench.broker.records(TOPIC)]
    assert keys == [b"score/%04d" % number for number in range(1_200)]


async def test_flush_does_not_wait_for_ever(bench: Bench) -> None:
    """A broker that is away holds up the end of a worker no longer than asked; what waits then is lost, and said so."""
    one, _ = bench.worker(timeout=30)
    bench.broker.inject("send", None)
    one.publish("score", ORIGIN, b"1", b"value", None)
    one.publish("score", ORIGIN, b"2", b"value", None)
    assert not await one.flush(0.02)
    await one.close()
    assert (one.sent, one.lost) == (0, 2)
    one.publish("score", ORIGIN, b"3", b"value", None)
    assert await one.flush(1)
    await one.close()
    assert bench.broker.values(TOPIC) == []
