"""What people write first: aiokafka's ``getmany`` and ``send`` in a loop, offsets committed by the client on its own.

No guarantee: the offset is committed whether or not the results have arrived. ``send`` is not awaited to its end,
as the docs advise for throughput (aiokafka, "Producer client": batching); batches and fetches are as large as the
other peers', and it lingers as librdkafka does by default (5 ms), so that batches fill.
"""

from __future__ import annotations

import asyncio

import aiokafka
import orjson

from benchmarks.child import compute, settings


async def main() -> None:
    said = settings()
    consumer = aiokafka.AIOKafkaConsumer(
        said.source,
        bootstrap_servers=said.bootstrap,
        group_id=said.name,
        auto_offset_reset="earliest",
        enable_auto_commit=True,
        auto_commit_interval_ms=int(said.commit_interval * 1000),
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=said.bootstrap, linger_ms=5, max_batch_size=1_000_000)
    await consumer.start()
    await producer.start()
    while True:
        for records in (await consumer.getmany(timeout_ms=1_000, max_records=said.commit_rows)).values():
            for record in records:
                await producer.send(said.sink, orjson.dumps(compute(orjson.loads(record.value))), key=record.key)


if __name__ == "__main__":
    asyncio.run(main())
