"""A session's context, read from its changelogs: exact through any crash, and no worker needs to run for it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from ..state.clock import Clock
from ..state.context import ExecutionContext, pipeline_uuid, session_uuid
from ..state.model import TopicPartition
from .brokers.base import Broker
from .restore import last_checkpoint
from .session import Session


def new_context(session: Session, clock: Clock) -> ExecutionContext:
    """The context of a session, or of one of its partitions, that begins now."""
    return ExecutionContext(
        session_id=session_uuid(session.group),
        pipeline_id=pipeline_uuid(session.pipeline),
        start_time=datetime.fromtimestamp(clock.now_ms() / 1000, UTC),
    )


async def session_context(
    broker: Broker, session: Session, sources: Sequence[str], timeout: float, clock: Clock
) -> ExecutionContext | None:
    """The merged context of all of a session's partitions, as of their last commits.

    Args:
        broker: a started one.
        session: which.
        sources: the topics it reads, as they are named on the broker.
        timeout: seconds that each look may take.
        clock: time.

    Returns:
        The context, whose ``total_rows`` are the rows done and those that still wait; None if nothing was committed.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        BrokerError: the broker does not answer.
    """
    topics = await broker.topics()
    partitions = [
        TopicPartition(source, partition)
        for source in sources
        if source in topics and session.changelog(source) in topics
        for partition in range(min(topics[source].partitions, topics[session.changelog(source)].partitions))
    ]
    ends = await broker.offsets(partitions, "end")
    contexts = []
    waiting = 0
    for tp in partitions:
        changelog = TopicPartition(session.changelog(tp.topic), tp.partition)
        record = await last_checkpoint(broker, changelog, tp, timeout, clock)
        if record is not None:
            contexts.append(ExecutionContext.from_checkpoint(record.context))
        first = record.offset if record else (await broker.offsets([tp], "earliest"))[tp]
        waiting += max(0, ends[tp] - first)
    if not contexts:
        return None
    merged = ExecutionContext.merge(contexts)
    merged.total_rows = merged.completed_rows + waiting
    return merged
