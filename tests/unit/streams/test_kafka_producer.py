"""What the adapter for Kafka makes of its client's answers, where a real node cannot be made to give them."""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import Any

import pytest
from aiokafka import errors as kafka_errors
from rowmill.state.model import TopicPartition
from rowmill.streams.brokers import kafka
from rowmill.streams.brokers.kafka import KafkaProducer
from rowmill.streams.errors import BrokerError, TopicError

TP = TopicPartition("topic", 4)

pytestmark = pytest.mark.timeout(20)


class Cluster:
    """A client's view of its cluster: ``answers`` are the partitions in one metadata answer after the other."""

    def __init__(self, *answers: int | None) -> None:
        self.client = self.cluster = self
        self._answers = list(answers)
        self._partitions: set[int] | None = None
        self.asked = 0

    def add_topic(self, topic: str) -> None:
        """As the client's."""

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        """As the client's."""
        return self._partitions

    async def force_metadata_update(self) -> bool:
        """The next answer; None where nobody answers. The last one stays."""
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is None:
            return False
        self._partitions = set(range(answer))
        return True


def producer(cluster: Any, size: int = 6) -> KafkaProducer:
    """A producer of an adapter that saw so many partitions."""
    return KafkaProducer(cluster, {}, {TP.topic: size} if size else {})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between questions."""
    monkeypatch.setattr(kafka, "RETRY_PAUSE", 0.0)


async def test_a_partition_that_was_there_is_coming_back() -> None:
    """Metadata that a restarted broker has loaded in part are an error that passes, not the end of the worker."""
    with pytest.raises(BrokerError, match="was there before"):
        await producer(Cluster(4))._check_exists(TP)
    with pytest.raises(TopicError, match="no such topic or partition"):
        await producer(Cluster(4), 0)._check_exists(TP)
    with pytest.raises(TopicError, match="no such topic or partition"):
        await producer(Cluster(0))._check_exists(TP)


async def test_a_partition_that_appears() -> None:
    """It is waited for; who does not answer at all says nothing about it."""
    cluster = Cluster(4, *[None] * 50, 4, 6)
    await producer(cluster, 0)._check_exists(TP)
    assert cluster.asked == 53


@pytest.mark.filterwarnings("error")
async def test_a_send_that_nobody_waits_for() -> None:
    """Whoever is cancelled between a send and its await leaves no coroutine and no error that was never retrieved."""
    told: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))
    future: asyncio.Future[Any] = loop.create_future()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        left = kafka._Written(TP, [(future, 1)], {})
        future.set_exception(kafka_errors.RequestTimedOutError())
        await asyncio.sleep(0)
        del left, future
        gc.collect()
    assert not told
    assert not caught


async def test_a_send_that_fails() -> None:
    """The first error is raised, after all batches are done; the others' ends are known."""
    loop = asyncio.get_running_loop()
    ends: dict[TopicPartition, int] = {}
    first, second = loop.create_future(), loop.create_future()
    waiting = asyncio.ensure_future(_wait(kafka._Written(TP, [(first, 1), (second, 2)], ends)))
    first.set_exception(kafka_errors.RequestTimedOutError())
    await asyncio.sleep(0)
    assert not waiting.done()
    second.set_exception(kafka_errors.ProducerFenced())
    with pytest.raises(BrokerError, match="topic/4"):
        await waiting
    assert not ends


async def _wait(written: kafka._Written) -> None:
    await written
