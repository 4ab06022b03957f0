"""Faust: an agent that sends each result.

Its settings reference names ``stream_buffer_maxsize=131_072`` for throughput, larger batches and a linger for the
producer. Its tuned parts are there (the Cython stream, orjson through the extra ``fast``). ``send`` is awaited until
the client has the message, as in its docs; offsets may be committed before results have arrived. Exactly once is not
measured: its sends stand outside of the transaction (its issues #177, #323).
"""

from __future__ import annotations

import sys
from typing import Any

import faust

from benchmarks.child import compute, settings

said = settings()

app = faust.App(
    said.name,
    broker=f"kafka://{said.bootstrap}",
    datadir=said.folder,
    autodiscover=False,
    web_enabled=False,
    topic_disable_leader=True,
    broker_commit_interval=said.commit_interval,
    broker_commit_every=said.commit_rows,
    stream_buffer_maxsize=131_072,
    consumer_max_fetch_size=4 * 1024 * 1024,
    producer_linger=0.005,
    producer_max_batch_size=1_000_000,
)
source = app.topic(said.source, key_type=bytes, key_serializer="raw", value_serializer="json")
sink = app.topic(said.sink, key_type=bytes, key_serializer="raw", value_serializer="json")


@app.agent(source)
async def work(rows: Any) -> None:
    async for key, row in rows.items():
        await sink.send(key=key, value=compute(row))


if __name__ == "__main__":
    sys.argv = [sys.argv[0], "worker", "--without-web", "-l", "warn"]
    app.main()
