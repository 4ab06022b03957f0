"""Bad input of every kind on both brokers: a dead letter with its reason and its bytes; the others go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from rowmill import Message, Pipeline, Session, TopicError, Worker, WorkerOptions, open_broker, publish, read
from rowmill.state.clock import SystemClock
from rowmill.state.model import Headers, Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker, TopicSpec

BAD_VALUES = {
    "not_json": b"{nope",
    "nan": b'{"n": NaN}',
    "array": b"[1, 2]",
    "string": b'"row"',
    "number": b"17",
    "json_null": b"null",
    "empty": b"",
    "too_deep": b'{"a":' * 200 + b"1" + b"}" * 200,
    "wide_integer": b'{"n": 18446744073709551616}',
    "small_integer": b'{"n": -9223372036854775809}',
    "invalid_utf8": b'{"n": "\xff\xfe"}',
    "tombstone": None,
}
KINDS = {
    "not_json": "not_json", "nan": "not_json", "array": "not_an_object", "string": "not_an_object",
    "number": "not_an_object", "json_null": "not_an_object", "empty": "not_json", "too_deep": "too_deep",
    "wide_integer": "integer_out_of_range", "small_integer": "integer_out_of_range", "invalid_utf8": "invalid_utf8",
    "tombstone": "null_value",
}  # fmt: skip


@pytest.fixture
async def broker(broker_url: str) -> AsyncIterator[Broker]:
    """A started broker of each kind."""
    broker = open_broker(broker_url, environment={})
    await broker.start()
    yield broker
    await broker.close()


async def put(broker: Broker, topic: str, records: Sequence[Outgoing], partitions: int = 1) -> None:
    """Write records to partition 0 as any client would."""
    await broker.create_topics([TopicSpec(topic, partitions, {"max.message.bytes": "3000000"})])
    producer = broker.producer()
    await producer.start()
    await (await producer.send(TopicPartition(topic, 0), records))
    await producer.close()


def out(value: bytes | None, key: bytes | None = None, headers: Headers = ()) -> Outgoing:
    """A record with the present time."""
    return Outgoing(key, value, SystemClock().now_ms(), headers)


async def work(broker: Broker, pipeline: Pipeline, **options: Any) -> Worker:
    """Run the live session up to what is in its source now."""
    worker = Worker(pipeline, broker, options=WorkerOptions(**options))
    topic = pipeline.sources[0]
    if topic in await broker.topics():
        count = (await broker.topics())[topic].partitions
        worker.finish_at(await broker.offsets([TopicPartition(topic, p) for p in range(count)], "high_watermark"))
    async with asyncio.timeout(60):
        await worker.run()
    return worker


async def everything(broker_url: str, topic: str) -> list[Message]:
    """A topic's records."""
    return await asyncio.to_thread(lambda: list(read(topic, broker=broker_url)))


def good(count: int) -> list[Outgoing]:
    """Rows that are fine."""
    return [out(b'{"n":%d}' % n, b"k%d" % n) for n in range(count)]


async def test_bad_values(broker: Broker, broker_url: str, name: str) -> None:
    """Each kind of bad value is dead-lettered with its reason and its bytes, among rows that go through."""
    records = []
    for number, (kind, value) in enumerate(BAD_VALUES.items()):
        records += [out(b'{"n":%d}' % number), out(value, kind.encode())]
    await put(broker, name, records)
    worker = await work(broker, Pipeline(name).add(lambda row: row, name="same"))
    results = await everything(broker_url, f"{name}.results")
    assert [m.row["n"] for m in results] == list(range(len(BAD_VALUES)))
    letters = {(m.key or b"").decode(): m for m in await everything(broker_url, f"{name}.dlq")}
    assert {kind: m.value for kind, m in letters.items()} == BAD_VALUES
    found = {kind: dict(m.headers) for kind, m in letters.items()}
    assert {kind: (h["rowmill.error.type"] or b"").decode() for kind, h in found.items()} == KINDS
    for position, kind in enumerate(BAD_VALUES):
        headers = found[kind]
        assert headers["rowmill.error.stage"] == b"input"
        assert headers["rowmill.error.topic"] == name.encode()
        assert headers["rowmill.error.offset"] == b"%d" % (2 * position + 1)
        assert headers["rowmill.error.message"]
    assert (worker.stats.rows, worker.stats.results) == (2 * len(BAD_VALUES), len(BAD_VALUES))
    assert (worker.stats.dead_letters, worker.stats.dropped) == (len(BAD_VALUES), 0)


async def test_too_large(broker: Broker, broker_url: str, name: str) -> None:
    """A value above the pipeline's limit is dead-lettered whole; one just below it goes through."""
    fits, exceeds = b'{"x":"%s"}' % (b"y" * 89_992), b'{"x":"%s"}' % (b"y" * 89_993)
    assert len(fits) == 90_000
    await put(broker, name, [out(exceeds), out(fits)])
    worker = await work(broker, Pipeline(name, max_row_bytes=90_000).add(lambda row: row, name="same"))
    [letter] = await everything(broker_url, f"{name}.dlq")
    assert letter.value == exceeds
    assert dict(letter.headers)["rowmill.error.type"] == b"too_large"
    assert worker.stats.results == 1


async def test_a_value_as_large_as_the_broker_takes(broker: Broker, broker_url: str, name: str) -> None:
    """A bad value near the broker's own limit still fits into the dead-letter topic, headers and all."""
    huge = b"#" * (broker.max_message_bytes - 200)
    await put(broker, name, [out(huge, headers=(("note", b"n" * 50),)), *good(1)])
    await work(broker, Pipeline(name).add(lambda row: row, name="same"))
    [letter] = await everything(broker_url, f"{name}.dlq")
    assert letter.value == huge
    assert dict(letter.headers)["note"] == b"n" * 50


async def test_bad_keys(broker: Broker, broker_url: str, name: str) -> None:
    """A key that is not UTF-8 is a dead letter, or goes through with keys="bytes"."""
    await put(broker, name, [out(b'{"n":1}', b"\xff\x00"), out(b'{"n":2}', "ключ".encode())])
    await work(broker, Pipeline(name).add(lambda row: row, name="same"))
    [letter] = await everything(broker_url, f"{name}.dlq")
    assert (letter.key, letter.value) == (b"\xff\x00", b'{"n":1}')
    assert dict(letter.headers)["rowmill.error.type"] == b"invalid_utf8"
    binary = Pipeline(f"{name}-b", source=name, keys="bytes").add(lambda row, ctx: {**row, "k": len(ctx.key)}, name="k")
    await work(broker, binary)
    assert [m.row["k"] for m in await everything(broker_url, f"{name}-b.results")] == [2, 8]


async def test_header_names_that_are_not_utf8(kafka: str, name: str) -> None:
    """On Kafka such a record, which wedges the client, becomes a dead letter; its whole batch goes on."""
    from support.raw_batch import raw_header_batch

    url = f"kafka://{kafka}"
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        await broker.create_topics([TopicSpec(name, 1)])
        rows = [(b'{"n":%d}' % n, b"caf\xe9" if n == 7 else b"plain") for n in range(20)]
        await raw_header_batch(kafka, name, rows)
        await put(broker, name, good(3))
        worker = await work(broker, Pipeline(name).add(lambda row: row, name="same"))
        [letter] = await everything(url, f"{name}.dlq")
        assert letter.value == b'{"n":7}'
        headers = dict(letter.headers)
        assert headers["rowmill.error.type"] == b"invalid_utf8"
        assert headers["caf\\xe9"] == b"value"
        results = [m.row["n"] for m in await everything(url, f"{name}.results")]
        assert results == [n for n in range(20) if n != 7] + [0, 1, 2]
        assert (worker.stats.rows, worker.stats.dead_letters) == (23, 1)
    finally:
        await broker.close()


async def test_a_poisoned_partition_costs_the_others_nothing(kafka: str, name: str) -> None:
    """While one partition has to be parsed by hand, what the client took from the others is not lost."""
    from support.raw_batch import raw_header_batch

    url = f"kafka://{kafka}"
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        for round_ in range(4):
            topic = f"{name}-{round_}"
            await broker.create_topics([TopicSpec(topic, 4)])
            producer = broker.producer()
            await producer.start()
            for partition in range(1, 4):
                await (await producer.send(TopicPartition(topic, partition), good(50)))
            await producer.close()
            await raw_header_batch(kafka, topic, [(b'{"n":%d}' % n, b"caf\xe9" if n == 7 else b"h") for n in range(50)])
            worker = await work(broker, Pipeline(topic).add(lambda row: row, name="same"))
            assert (worker.stats.rows, worker.stats.results, worker.stats.dead_letters) == (200, 199, 1)
    finally:
        await broker.close()


async def test_tombstones_can_be_forwarded(broker: Broker, broker_url: str, name: str) -> None:
    """A pipeline on a compacted topic passes deletions on, key and all."""
    await put(broker, name, [out(b'{"n":1}', b"a"), out(None, b"a")])
    await work(broker, Pipeline(name, tombstones="forward").add(lambda row: row, name="same"))
    results = await everything(broker_url, f"{name}.results")
    assert [(m.key, m.value) for m in results] == [(b"a", b'{"n":1}'), (b"a", None)]


class Odd:
    """Something that JSON has no form for."""


def raises(row: dict[str, Any]) -> dict[str, Any]:
    """Fails on the third row."""
    if row["n"] == 3:
        raise KeyError("no such thing")
    return row


def gives(result: Any) -> Any:
    """A handler that returns ``result`` for the third row."""
    return lambda row: result if row["n"] == 3 else row


async def cancels_itself(row: dict[str, Any]) -> dict[str, Any]:
    """Raises what a cancelled task raises, without being one."""
    if row["n"] == 3:
        raise asyncio.CancelledError
    return row


def leaves(row: dict[str, Any]) -> dict[str, Any]:
    """Calls exit, as scripts do."""
    if row["n"] == 3:
        raise SystemExit("bye")
    return row


@pytest.mark.parametrize(
    ("handler", "stage", "kind"),
    [
        (raises, "odd", b"KeyError"),
        (gives(17), "odd", b"MisfitError"),
        (gives([{"n": 1}, 2]), "odd", b"MisfitError"),
        (gives({"x": Odd()}), "output", b"unserialisable"),
        (gives({"x": "y" * 1_100_000}), "output", b"too_large"),
        (gives({"x": 2**70}), "output", b"unserialisable"),
        (cancels_itself, "odd", b"CancelledError"),
        (leaves, "odd", b"SystemExit"),
    ],
    ids=["raises", "wrong-type", "wrong-type-in-list", "unserialisable", "too-large", "huge-int", "cancels", "exits"],
)
async def test_bad_handlers(broker: Broker, broker_url: str, name: str, handler: Any, stage: str, kind: bytes) -> None:
    """Whatever a handler does wrong costs that row alone: a dead letter with stage, type and the original bytes."""
    await put(broker, name, good(6))
    worker = await work(broker, Pipeline(name).add(handler, name="odd"))
    [letter] = await everything(broker_url, f"{name}.dlq")
    assert (letter.key, letter.value) == (b"k3", b'{"n":3}')
    headers = dict(letter.headers)
    assert (headers["rowmill.error.stage"], headers["rowmill.error.type"]) == (stage.encode(), kind)
    assert [m.row["n"] for m in await everything(broker_url, f"{name}.results")] == [0, 1, 2, 4, 5]
    assert (worker.stats.rows, worker.stats.results, worker.stats.dead_letters) == (6, 5, 1)


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "blocking"])
async def test_a_handler_that_never_returns(broker: Broker, broker_url: str, name: str, *, is_async: bool) -> None:
    """With a timeout, a handler that hangs costs its row, and the worker still stops in time."""
    release = threading.Event()

    async def hangs(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 3:
            await asyncio.Event().wait()
        return row

    def blocks(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 3:
            release.wait(60)
        return row

    await put(broker, name, good(6))
    try:
        await work(broker, Pipeline(name).add(hangs if is_async else blocks, name="odd", timeout=0.3))
    finally:
        release.set()
    [letter] = await everything(broker_url, f"{name}.dlq")
    assert dict(letter.headers)["rowmill.error.type"] == b"HandlerTimeoutError"
    assert letter.value == b'{"n":3}'
    assert len(await everything(broker_url, f"{name}.results")) == 5


async def test_emitting_to_a_topic_that_may_not_be(broker: Broker, broker_url: str, name: str) -> None:
    """A row for a topic with an impossible name, or one that may not be made, is a dead letter; others go on."""

    def sends(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        odd = {0: "no/such", 1: f"{name}.results", 2: "rowmill.control", 3: f"{name}.dlq"}
        ctx.emit(odd.get(row["n"], f"{name}.side"), row)
        return row

    await put(broker, name, good(6))
    await work(broker, Pipeline(name).add(sends, name="sends"))
    letters = {m.row["n"]: dict(m.headers) for m in await everything(broker_url, f"{name}.dlq")}
    assert set(letters) == {0, 2, 3}
    assert {h["rowmill.error.type"] for h in letters.values()} == {b"topic_refused"}
    assert sorted(m.row["n"] for m in await everything(broker_url, f"{name}.side")) == [4, 5]
    assert sorted(m.row["n"] for m in await everything(broker_url, f"{name}.results")) == [1, 1, 4, 5]


async def test_an_absent_source(broker: Broker, broker_url: str, name: str) -> None:
    """A missing source is made where that is allowed, and refused with the remedy where it is not."""
    pipeline = Pipeline(name).add(lambda row: row, name="same")
    with pytest.raises(TopicError, match=r"does not exist on .* and creation is off"):
        await Worker(pipeline, broker, options=WorkerOptions(create_topics=False)).run()
    assert name not in await broker.topics()
    worker = Worker(pipeline, broker, session=Session(name))
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(30):
        while name not in await broker.topics():
            await asyncio.sleep(0.05)
        await asyncio.to_thread(publish, name, [{"n": 1}], broker=broker_url)
        while worker.stats.results < 1:
            await asyncio.sleep(0.05)
        worker.stop()
        await running
    assert worker.stats.rows == 1


async def test_reserved_headers_do_not_come_in(broker: Broker, broker_url: str, name: str) -> None:
    """Headers in rowmill's name are not believed and not passed on; others are, a trace's among them."""
    seen: list[Any] = []

    def note(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        seen.append(ctx.headers)
        return row

    sent = (("rowmill.source", b"forged/0/0/0"), ("traceparent", b"00-ab-cd-01"), ("twice", b"1"), ("twice", None))
    await put(broker, name, [out(b'{"n":1}', headers=sent)])
    await work(broker, Pipeline(name).add(note, name="note"))
    [result] = await everything(broker_url, f"{name}.results")
    assert seen == [(("traceparent", b"00-ab-cd-01"), ("twice", b"1"), ("twice", None))]
    assert result.headers[:3] == seen[0]
    assert dict(result.headers)["rowmill.source"] == f"{name}/0/0/0".encode()
    assert dict(result.headers)["rowmill.session"] == b"live"
