"""Makes a broker with many sessions, and measures how long looking at all of them takes, as the console does.

``python -m benchmarks.console_sessions local:///tmp/many`` makes 50 sessions of 24 partitions with records, offsets,
checkpoints and workers' words where there are none yet, and then looks at them again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import time
from decimal import Decimal

from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from rowmill.state.clock import SystemClock
from rowmill.state.context import ExecutionContext, session_uuid
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker, TopicSpec
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.control_topic import CONTROL, ControlTopic
from rowmill.streams.event_records import EventRecord
from rowmill.streams.events import events_topic
from rowmill.streams.partitioning import partition_for
from rowmill.streams.session import Session
from rowmill.streams.session_records import SessionRecord

ROWS, DONE = 20, 8
_COUNTS = {"rows": DONE, "results": DONE, "dropped": 0, "skipped": 0, "defaulted": 0, "dead_letters": 1, "emitted": 0}
_STAGES = ("clean", "score", "store")


async def make(broker: Broker, sessions: int, partitions: int) -> None:
    """Sessions as workers leave them: a source with rows, offsets, changelogs with checkpoints, and records."""
    clock = SystemClock()
    names = [f"many{n:03d}" for n in range(sessions)]
    specs = [TopicSpec(f"{name}{end}", partitions if not end else 1) for name in names for end in ("", ".out")]
    specs += [TopicSpec(Session(name).changelog(name), partitions) for name in names]
    for start in range(0, len(specs), 20):
        await broker.create_topics(specs[start : start + 20])
    await ControlTopic(broker, clock=clock, timeout=120).require()
    for name in names:
        await _make_one(broker, Session(name), partitions, clock)


async def _make_one(broker: Broker, session: Session, partitions: int, clock: SystemClock) -> None:
    name, now = session.pipeline, clock.now_ms()
    tps = [TopicPartition(name, n) for n in range(partitions)]
    context = ExecutionContext(session_id=session_uuid(session.group), accumulated_cost=Decimal("0.25"))
    value = CheckpointRecord(DONE, 0, True, None, _COUNTS, context.to_checkpoint(), {}, "owner", "one").encode()
    record = SessionRecord(
        group=session.group,
        pipeline=name,
        session=session.id,
        sources=(name,),
        sink=f"{name}.out",
        dead_letters=session.dead_letters,
        stages=_STAGES,
        started_ms=now,
        changed_ms=now,
    )
    producer = broker.transactional_producer(f"{session.group}/by-hand")
    await producer.start()
    try:
        await producer.begin()
        for tp in tps:
            rows = [Outgoing(b"%d" % n, b'{"n": %d}' % n, now) for n in range(ROWS)]
            await (await producer.send(tp, rows))
            changelog = TopicPartition(session.changelog(name), tp.partition)
            await (await producer.send(changelog, [Outgoing(CHECKPOINT_KEY, value, now)] * 5))
        await (await producer.send(CONTROL, [Outgoing(session.group.encode(), record.encode(), now)]))
        await producer.commit_offsets(session.group, {tp: Committed(DONE) for tp in tps})
        await producer.end()
    finally:
        await producer.close()


def word(session: Session, at_ms: int, partitions: int, rows: int) -> EventRecord:
    """What a worker of the session says of itself."""
    said = [
        {
            "topic": session.pipeline,
            "partition": n,
            "state": "running",
            "committed": DONE,
            "position": ROWS,
            "buffered": 0,
            "in_flight": 1,
            "oldest_offset": DONE,
            "oldest_seconds": 0.1,
        }
        for n in range(partitions)
    ]
    counts = {"rows": rows, "out": rows, "dropped": 0, "failed": 0, "calls": rows}
    return EventRecord(
        kind="progress",
        at_ms=at_ms,
        pipeline=session.pipeline,
        session=session.id,
        group=session.group,
        worker=f"{session.pipeline}-w",
        host="box",
        pid=4711,
        data={
            "state": "running",
            "started_ms": at_ms - 60_000,
            "totals": {"rows": rows, "results": rows, "cost": "1.25"},
            "stages": dict.fromkeys(_STAGES, counts),
            "partitions": said,
        },
    )


async def speak(broker: Broker, sessions: int, partitions: int, stop: asyncio.Event) -> None:
    """One word per session and second, until told to stop."""
    clock, rows = SystemClock(), 0
    spec = events_topic(broker)
    await broker.create_topics([spec])
    width = (await broker.topics())[spec.name].partitions
    producer = broker.producer()
    await producer.start()
    try:
        while not stop.is_set():
            rows += 100
            lots: dict[int, list[Outgoing]] = {}
            for n in range(sessions):
                session = Session(f"many{n:03d}")
                event, key = word(session, clock.now_ms(), partitions, rows), session.group.encode()
                lots.setdefault(partition_for(key, width), []).append(Outgoing(key, event.encode(), event.at_ms))
            for partition, lot in lots.items():
                await (await producer.send(TopicPartition(spec.name, partition), lot))
            await asyncio.sleep(1.0)
    finally:
        await producer.close()


async def measure(broker: Broker, looks: int) -> None:
    """Look as the console does, and say how long it took, and how long the event loop stood still."""
    from rowmill.streams.status import StatusReader

    clock, stalls = SystemClock(), [0.0]

    async def tick() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.005)
            stalls.append(time.monotonic() - began - 0.005)

    ticking = asyncio.create_task(tick())
    reader = StatusReader(broker, clock=clock)
    try:
        for what in ("first look", "looks after it"):
            took, cpu = [], resource.getrusage(resource.RUSAGE_SELF)
            stalls[:] = [0.0]
            statuses = []
            for _ in range(1 if what == "first look" else looks):
                began = time.monotonic()
                statuses = await reader.statuses()
                took.append(time.monotonic() - began)
                await asyncio.sleep(1.0 if what != "first look" else 0)
            used = resource.getrusage(resource.RUSAGE_SELF)
            spent = (used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime) / len(took)
            print(
                f"{what:<15} {len(statuses)} sessions, {sum(len(s.partitions) for s in statuses):,} partitions, "
                f"{sum(len(s.workers) for s in statuses)} workers: median {statistics.median(took):.3f} s, "
                f"longest {max(took):.3f} s, {spent:.3f} s of CPU each, loop stood still up to {max(stalls):.3f} s",
                flush=True,
            )
    finally:
        ticking.cancel()


async def main() -> None:
    """Make, speak, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("broker", help="its URL")
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--partitions", type=int, default=24)
    parser.add_argument("--looks", type=int, default=10)
    parser.add_argument("--only-speak", action="store_true", help="speak until Ctrl-C, for a console to be looked at")
    args = parser.parse_args()
    broker, speaker = open_broker(args.broker), open_broker(args.broker)
    await broker.start()
    await speaker.start()
    stop = asyncio.Event()
    try:
        if f"many{args.sessions - 1:03d}" not in await broker.topics():
            began = time.monotonic()
            await make(broker, args.sessions, args.partitions)
            print(f"made in {time.monotonic() - began:.1f} s", flush=True)
        speaking = asyncio.create_task(speak(speaker, args.sessions, args.partitions, stop))
        if args.only_speak:
            await speaking
        await asyncio.sleep(3.0)
        await measure(broker, args.looks)
        stop.set()
        await speaking
    finally:
        await speaker.close()
        await broker.close()


if __name__ == "__main__":
    asyncio.run(main())
