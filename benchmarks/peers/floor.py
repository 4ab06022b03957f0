"""The floor: what exactly once costs at least with this client. A bare loop, one transaction for each commit interval.

No tables, no offset map, no headers, no context, no checks, no second worker: it is as wrong as it is short, and only
says what JSON, aiokafka and the broker cost. Settings are those of rowmill's own adapter where they matter for speed
(size of batches and fetches). The producer's docs tell to build batches by hand where speed counts (aiokafka,
"Direct batch control" and "Transactional producer").
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiokafka
import orjson

from benchmarks.child import Settings, begin_once, compute, settings
from benchmarks.rows import Row, result_of


async def main() -> None:
    said = settings()
    consumer = aiokafka.AIOKafkaConsumer(
        said.source,
        bootstrap_servers=said.bootstrap,
        group_id=said.name,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    producer = aiokafka.AIOKafkaProducer(
        bootstrap_servers=said.bootstrap, transactional_id=said.name, max_batch_size=1_000_000
    )
    await consumer.start()
    await producer.start()
    while True:
        await transact(said, consumer, producer)


async def transact(said: Settings, consumer: Any, producer: Any) -> None:
    """One transaction: what arrives within the commit interval, or as many rows as a commit may have."""
    fetched = await consumer.getmany(timeout_ms=1_000, max_records=said.commit_rows)
    if not fetched:
        return
    taken, offsets, sending = 0, {}, []
    until = time.monotonic() + said.commit_interval
    async with producer.transaction():
        while fetched:
            for tp, records in fetched.items():
                values = await WAYS[said.job](said, records)
                sending += await send(said.sink, producer, tp.partition, records, values)
                offsets[tp] = records[-1].offset + 1
                taken += len(records)
            left = until - time.monotonic()
            if left <= 0 or taken >= said.commit_rows:
                break
            fetched = await consumer.getmany(timeout_ms=int(left * 1000), max_records=said.commit_rows - taken)
        for sent in sending:
            await sent
        await producer.send_offsets_to_transaction(offsets, said.name)


async def send(sink: str, producer: Any, partition: int, records: list[Any], values: list[bytes]) -> list[Any]:
    """One batch, or as many as they need, to the partition of the same number."""
    sending, batch = [], producer.create_batch()
    for record, value in zip(records, values, strict=True):
        if batch.append(key=record.key, value=value, timestamp=record.timestamp) is None:
            sending.append(await producer.send_batch(batch, sink, partition=partition))
            batch = producer.create_batch()
            batch.append(key=record.key, value=value, timestamp=record.timestamp)
    sending.append(await producer.send_batch(batch, sink, partition=partition))
    return sending


async def plainly(_: Settings, records: list[Any]) -> list[bytes]:
    """The job ``plain``."""
    return [orjson.dumps(compute(orjson.loads(record.value))) for record in records]


async def in_a_pool(said: Settings, records: list[Any]) -> list[bytes]:
    """The job ``give way``: as many tasks as may run at once take one record after the other."""
    begin_once()
    values = [b""] * len(records)
    coming = enumerate(records)

    async def take() -> None:
        for index, record in coming:
            values[index] = orjson.dumps(await give_way(orjson.loads(record.value)))

    await asyncio.gather(*(take() for _ in range(said.concurrency)))
    return values


async def give_way(row: Row) -> Row:
    await asyncio.sleep(0)
    return result_of(row)


WAYS = {"plain": plainly, "give way": in_a_pool}


if __name__ == "__main__":
    asyncio.run(main())
