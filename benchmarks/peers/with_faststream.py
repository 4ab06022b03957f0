"""FastStream: a batch subscriber that acknowledges after the work (at least once) and publishes in batches.

As its docs tell: ``batch=True`` and ``AckPolicy.ACK`` ("Consuming Acknowledgements"), ``publish_batch`` of
``KafkaPublishMessage`` with keys ("Publishing in Batches"). A batch goes to one partition, so that each source
partition's results are published apart, to the partition of the same number: otherwise rows of one key would stand in
several. It commits after each batch, which holds as many rows as the others commit at once; an interval it has only
with ``ACK_FIRST``, which is at most once. orjson is used where installed, and is.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import groupby
from typing import Any

from faststream import AckPolicy, FastStream  # type: ignore[import-not-found]
from faststream.kafka import (  # type: ignore[import-not-found]
    KafkaBroker,
    KafkaMessage,
    KafkaPublishMessage,
)

from benchmarks.child import compute, settings

said = settings()
ENVELOPE_BYTES = 200
"""What keys, headers and lengths add to a row, and more."""
MOST = 500_000 // (said.row_bytes * 5 // 4 + ENVELOPE_BYTES)
"""Messages that fit into one batch for certain: too many are an error."""

broker = KafkaBroker(said.bootstrap, max_batch_size=1_000_000, linger_ms=5, logger=None)


@broker.subscriber(  # type: ignore[untyped-decorator]
    said.source,
    batch=True,
    max_records=said.commit_rows,
    batch_timeout_ms=int(said.commit_interval * 1000),
    group_id=said.name,
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.ACK,
    max_partition_fetch_bytes=4 * 1024 * 1024,
)
async def work(rows: Any, message: KafkaMessage) -> None:
    pairs: Any = zip(rows, message.raw_message, strict=True)
    sending = []
    for partition, group in groupby(pairs, key=lambda pair: pair[1].partition):
        messages = [KafkaPublishMessage(compute(row), key=record.key) for row, record in group]
        for begin in range(0, len(messages), MOST):
            batch = messages[begin : begin + MOST]
            sending.append(await broker.publish_batch(*batch, topic=said.sink, partition=partition, no_confirm=True))
    await asyncio.gather(*sending)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(FastStream(broker, logger=None).run())
