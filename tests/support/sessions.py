"""Sessions as workers leave them on a broker, made by hand: topics, offsets, checkpoints, records and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from rowmill.state.clock import Clock
from rowmill.state.context import ExecutionContext, session_uuid
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker, TopicSpec
from rowmill.streams.control import ControlTopic
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.session import Session
from rowmill.streams.session_records import SessionRecord

COUNTS = {"rows": 0, "results": 0, "dropped": 0, "skipped": 0, "defaulted": 0, "dead_letters": 0, "emitted": 0}


@dataclass
class MadeSession:
    """What is to be made.

    Attributes:
        session: which; its source is called as its pipeline.
        record: fields of its record; None: it never registered.
        ends: rows in each partition of its source.
        committed: by partition; None: nothing was committed.
        counts: of every partition's checkpoint.
        cost: of every partition.
        publisher: the publisher's position; None without one.
    """

    session: Session
    record: Mapping[str, Any] | None = field(default_factory=dict)
    ends: Sequence[int] = (10, 10)
    committed: Sequence[int | None] = (4, None)
    counts: Mapping[str, int] = field(default_factory=dict)
    cost: Decimal = Decimal(0)
    publisher: Committed | None = None

    @property
    def source(self) -> str:
        """The topic that it reads."""
        return self.session.source(self.session.pipeline)

    @property
    def tps(self) -> list[TopicPartition]:
        """Its partitions."""
        return [TopicPartition(self.source, n) for n in range(len(self.ends))]

    async def make(self, broker: Broker, clock: Clock) -> None:
        """Write all of it. To be called once for each session."""
        changelog = self.session.changelog(self.source)
        present = await broker.topics()
        await broker.create_topics([TopicSpec(name, len(self.ends)) for name in (self.source, changelog)])
        producer = broker.transactional_producer(f"{self.session.group}/by-hand")
        await producer.start()
        try:
            await producer.begin()
            for tp, end, committed in zip(self.tps, self.ends, self.committed, strict=True):
                if end and self.source not in present:
                    rows = [Outgoing(None, b'{"n": %d}' % n, clock.now_ms()) for n in range(end)]
                    await (await producer.send(tp, rows))
                if committed is not None:
                    noted = Outgoing(CHECKPOINT_KEY, self._checkpoint(committed), clock.now_ms())
                    await (await producer.send(TopicPartition(changelog, tp.partition), [noted]))
            done = {tp: Committed(n) for tp, n in zip(self.tps, self.committed, strict=True) if n is not None}
            if done:
                await producer.commit_offsets(self.session.group, done)
            await producer.end()
            if self.publisher is not None:
                await producer.begin()
                await producer.commit_offsets(self.session.publisher_id, {self.tps[0]: self.publisher})
                await producer.end()
        finally:
            await producer.close()
        if self.record is not None:
            record = self._record(self.record)
            await ControlTopic(broker, clock=clock).update(self.session.group, lambda _: record)

    def _record(self, fields: Mapping[str, Any]) -> SessionRecord:
        return SessionRecord(
            **{
                "group": self.session.group,
                "pipeline": self.session.pipeline,
                "session": self.session.id,
                "owns_source": self.session.owns_source,
                "sources": (self.source,),
                "sink": self.session.output(f"{self.session.pipeline}.out"),
                "dead_letters": self.session.dead_letters,
                **fields,
            }
        )

    def _checkpoint(self, offset: int) -> bytes:
        context = ExecutionContext(session_id=session_uuid(self.session.group), accumulated_cost=self.cost)
        counts = {**COUNTS, "rows": offset, "results": offset, **self.counts}
        return CheckpointRecord(offset, 0, True, None, counts, context.to_checkpoint(), {}, "owner", "one").encode()


def progress(
    session: Session, worker: str, at_ms: int, *, rows: int = 0, partitions: Sequence[TopicPartition] = (), **data: Any
) -> EventRecord:
    """What a worker says of itself. A partition's fields are given as ``t_0={...}`` for partition 0 of topic t."""
    said = [{"topic": tp.topic, "partition": tp.partition, "state": "running", "in_flight": 0} for tp in partitions]
    for each in said:
        each.update(data.pop(f"{each['topic']}_{each['partition']}", {}))
    return EventRecord(
        kind="progress",
        at_ms=at_ms,
        pipeline=session.pipeline,
        session=session.id,
        group=session.group,
        worker=worker,
        host="box",
        pid=4711,
        data={"state": "running", "started_ms": at_ms, "totals": {"rows": rows}, "partitions": said, **data},
    )


async def say(broker: Broker, clock: Clock, *events: EventRecord) -> None:
    """Put events on their topic, dated as they say."""
    await broker.create_topics([TopicSpec(EVENTS_TOPIC, 1)])
    producer = broker.producer()
    await producer.start()
    try:
        records = [Outgoing(event.group.encode(), event.encode(), event.at_ms) for event in events]
        await (await producer.send(TopicPartition(EVENTS_TOPIC, 0), records))
    finally:
        await producer.close()
