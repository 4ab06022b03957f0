"""Shared answers on real brokers: what one worker paid for is found by the next one on another machine."""

from __future__ import annotations

import pytest
from rowmill.handlers.cache import Cache, Origin
from rowmill.state.answers import Answers, MemoryAnswers
from rowmill.state.clock import SystemClock
from rowmill.state.model import TopicPartition
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.shared_answers import SharedAnswers, topic_config

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20


async def test_answers_follow_their_partition(broker_url: str, name: str) -> None:
    """Written by one worker, read by another, which goes on where it was when more has come: on both brokers."""
    clock, topic = SystemClock(), f"rowmill.{name}.{name}.answers"
    broker = open_broker(broker_url, environment={})
    await broker.start()
    try:
        await broker.create_topics([TopicSpec(topic, 3, topic_config([Cache(shared=True, ttl=3_600)]))])
        topics, source = {name: topic}, TopicPartition(name, 1)
        origin = Origin("live", *source, 42)
        one = SharedAnswers(broker, topics, {"score": MemoryAnswers(MIB)}, clock, timeout=20)
        expires_ms = clock.now_ms() + 3_600_000
        for number in range(2_000):
            one.publish("score", origin, b"%d" % number, b"value %d" % number, expires_ms)
        assert await one.flush(30)
        assert (one.sent, one.lost) == (2_000, 0)
        answers: dict[str, Answers] = {"score": MemoryAnswers(MIB)}
        other = SharedAnswers(broker, topics, answers, clock, timeout=20)
        assert await other.load(source) == 2_000
        assert await other.load(TopicPartition(name, 0)) == 0
        assert await other.load(source) == 0
        assert answers["score"].get(b"1999", clock.now_ms()) == b"value 1999"
        one.publish("score", origin, b"late", b"value", None)
        assert await one.flush(30)
        assert await other.load(source) == 1
        await one.close()
        await other.close()
    finally:
        await broker.delete_topics([topic])
        await broker.close()
