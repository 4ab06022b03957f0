"""The publisher of a bounded run, where the broker ends its transactions in some places only."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
from rowmill.state.clock import SystemClock
from rowmill.state.model import TopicPartition
from rowmill.streams.collect import input_row, read_topic
from rowmill.streams.errors import BrokerError
from rowmill.streams.inputs import make_input
from rowmill.streams.runs import Publisher
from rowmill.streams.session import Session
from support.fake_broker import FakeBroker

ROWS = [{"n": n} for n in range(60)]
SESSION = Session("p", "s", owns_source=True)
TOPIC = SESSION.source("p")


async def publish(broker: FakeBroker, *, until: int | None = None) -> Publisher:
    """Publish, all or until so many rows, and go away without a word."""
    publisher = Publisher(broker, SESSION, TOPIC, make_input(ROWS, None), SystemClock(), 5.0, 1_000_000)
    await publisher.open()
    async for published in publisher.publish_chunks(2, 20):
        if until is not None and published >= until:
            break
    await publisher.close()
    return publisher


@pytest.mark.parametrize(
    "left",
    [set(places) for places in product((None, 0, 1, "group"), repeat=2)],
    ids=lambda left: "-".join(sorted(map(str, left))),
)
@pytest.mark.parametrize("commit", [True, False])
async def test_markers_that_were_given_up(left: set[Any], commit: bool) -> None:
    """Whichever of its places a transaction was not ended in, committed or aborted: each row is there once."""
    broker = FakeBroker()
    broker.make(TOPIC, partitions=2)
    await publish(broker, until=20)

    def gives_up(place: TopicPartition | str) -> bool:
        return (place.partition if isinstance(place, TopicPartition) else "group") in left

    broker.give_up_markers(gives_up)
    if commit:
        await publish(broker, until=40)
    else:
        producer = broker.transactional_producer(SESSION.publisher_id)
        broker.give_up_markers(gives_up)  # the one before is that of this start, which has nothing to end
        await producer.start()
        await producer.begin()
        for partition in (0, 1):
            await (await producer.send(TopicPartition(TOPIC, partition), []))
        await producer.abort()
    done = await publish(broker)
    assert done.is_done
    assert not broker.left_open()
    numbers = [input_row(record) async for records in read_topic(broker, TOPIC) for record in records]
    assert Counter(numbers) == Counter(range(60))


async def test_a_broker_that_does_not_answer() -> None:
    """The look for remains has a deadline like everything else."""
    broker = FakeBroker()
    with pytest.raises(BrokerError):
        await Publisher(broker, SESSION, TOPIC, make_input(ROWS, None), SystemClock(), 0.05, 1_000_000).publish_all(2)
