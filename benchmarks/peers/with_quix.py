"""Quix Streams: at least once or exactly once, stateless or counting in its state.

Its docs ("Configuration" and "Checkpointing") leave speed to the commit interval, which is everybody's here, with
``commit_every`` as rowmill's ``commit_rows``; the producer keeps librdkafka's own batches (1,000,000 bytes, lingering
5 ms), and the queue of the consumer is deeper than by default. A checkpoint is not made while it waits for a message,
a second by default: it waits for the commit interval instead. JSON goes through orjson by default. Both clients are
librdkafka's, which work on threads of their own. State goes to RocksDB and to a changelog topic, by default.
"""

from __future__ import annotations

import logging
from typing import Any

from quixstreams import Application  # type: ignore[import-not-found]

from benchmarks.child import Settings, begin_once, burn, compute, settings
from benchmarks.rows import Row


def make_application(said: Settings) -> Application:
    return Application(
        broker_address=said.bootstrap,
        consumer_group=said.name,
        auto_offset_reset="earliest",
        commit_interval=said.commit_interval,
        commit_every=said.commit_rows,
        processing_guarantee="exactly-once" if said.exactly_once else "at-least-once",
        consumer_poll_timeout=said.commit_interval,
        state_dir=said.folder,
        producer_extra_config={"batch.size": 1_000_000, "linger.ms": 5, "queue.buffering.max.messages": 1_000_000},
        consumer_extra_config={"queued.min.messages": 200_000, "max.partition.fetch.bytes": 4 * 1024 * 1024},
        loglevel="WARNING",
    )


def count(row: Row, state: Any) -> Row:
    """Number the rows of each key: state is kept by the message's key."""
    begin_once()
    number = state.get("count", 0) + 1
    state.set("count", number)
    return {**row, "number": number}


def main() -> None:
    said = settings()
    logging.basicConfig(level=logging.WARNING)
    application = make_application(said)
    frame = application.dataframe(application.topic(said.source))
    if said.job == "count":
        frame = frame.apply(count, stateful=True)
    else:
        frame = frame.apply({"plain": compute, "burn": burn}[said.job])
    frame.to_topic(application.topic(said.sink))
    application.run()


if __name__ == "__main__":
    main()
