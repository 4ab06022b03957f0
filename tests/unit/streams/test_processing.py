"""From records to effects: where results go, what they carry, and what becomes of everything that is amiss."""

# Handlers here are made for their signatures, not for what they do with their arguments.
# ruff: noqa: ARG005
from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from rowmill import Pipeline, RowContext
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.runtime import Runtime
from rowmill.state.codec import loads
from rowmill.state.memory import MemoryStore
from rowmill.state.model import Outgoing, StoredRecord, TopicPartition
from rowmill.state.tables import PartitionTables
from rowmill.streams.catalog import Catalog
from rowmill.streams.errors import BrokerError
from rowmill.streams.outbox import Outbox
from rowmill.streams.partitioning import partition_for
from rowmill.streams.processing import Effects, Processor
from rowmill.streams.session import Session
from support.fake_broker import FakeBroker, lost
from support.rows import header_of, record

Process = Callable[..., Any]
LIVE = Session("p")
OWN = Session("p", "job", owns_source=True)

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def broker() -> FakeBroker:
    """A broker whose source, sink and dead-letter topic have four partitions."""
    broker = FakeBroker()
    for session in (LIVE, OWN):
        for topic in (session.source("in"), session.output("out"), session.dead_letters):
            broker.make(topic, 4)
    return broker


@pytest.fixture
async def pool() -> AsyncIterator[BlockingPool]:
    """Threads for one test."""
    pool = BlockingPool(2)
    yield pool
    pool.close()


def pipeline_of(*handlers: Any, **options: Any) -> Pipeline:
    """A pipeline from in to out."""
    pipeline = Pipeline("p", source="in", sink="out", **options)
    for number, handler in enumerate(handlers or [lambda row: row]):
        pipeline.add(handler, name=f"stage{number}")
    return pipeline


@pytest.fixture
def process(broker: FakeBroker, pool: BlockingPool) -> Process:
    """Runs records through a pipeline as partition 2 of its source."""

    async def run(
        pipeline: Pipeline, records: Sequence[StoredRecord], session: Session = LIVE, max_bytes: int = 1_000_000
    ) -> Effects:
        broker.max_message_bytes = max_bytes
        catalog = Catalog(broker, create=True, partitions=3, timeout=5)
        await catalog.ensure([session.source("in"), session.output("out"), session.dead_letters])
        tp = TopicPartition(session.source("in"), 2)
        processor = Processor(pipeline, pipeline.chain(), session, tp, catalog, Runtime(pool))
        return await processor.process(records)

    return run


def counts(effects: Effects) -> tuple[int, int, int, int, int]:
    """Rows, results, dropped, dead letters, emitted."""
    return (effects.rows, effects.results, effects.dropped, effects.dead_letters, effects.emitted)


def contents(effects: Effects) -> dict[TopicPartition, list[Outgoing]]:
    """What goes where; times of this very moment as one of the past, so that two runs can be compared."""
    return {
        tp: [record._replace(timestamp=min(record.timestamp, 10**12)) for record in records]
        for tp, records in effects.outputs.items()
    }


def only(effects: Effects) -> tuple[TopicPartition, Outgoing]:
    """The one record that goes out."""
    ((tp, records),) = effects.outputs.items()
    (out,) = records
    return tp, out


SINK, LETTERS = TopicPartition("out", 2), TopicPartition("p.dlq", 2)


@pytest.mark.parametrize("takes_context", [False, True])
async def test_a_result(process: Process, takes_context: bool) -> None:
    """A result keeps partition, key and timestamp, says where it came from, and is the same by either path."""

    def with_context(row: dict[str, Any], ctx: RowContext) -> Any:
        return {**row, "b": 2}

    def without(row: dict[str, Any]) -> Any:
        return {**row, "b": 2}

    pipeline = pipeline_of(with_context if takes_context else without)
    effects = await process(pipeline, [record({"a": 1}, offset=17, key="ü".encode(), partition=2, timestamp=123)])
    headers = (("rowmill.source", b"in/2/17/0"), ("rowmill.session", b"live"))
    assert only(effects) == (SINK, Outgoing("ü".encode(), b'{"a":1,"b":2}', 123, headers))
    assert counts(effects) == (1, 1, 0, 0, 0)


async def test_a_lot_leaves_nothing_to_the_garbage_collector(broker: FakeBroker, pool: BlockingPool) -> None:
    """Rows that use tables are freed with their lot: no cycle keeps them until the collector comes by."""

    class Key(str):
        """One that tells when it is gone."""

        __slots__ = ("__weakref__",)

    keys: list[weakref.ref[Key]] = []

    def count(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.table("counts").put("k", row["n"])
        ctx.key = key = Key(ctx.key)
        keys.append(weakref.ref(key))
        return row

    pipeline = pipeline_of(count).table("counts")
    catalog = Catalog(broker, create=True, partitions=3, timeout=5)
    await catalog.ensure(["in", "out", LIVE.dead_letters])
    tables = PartitionTables(MemoryStore(), pipeline.tables)
    processor = Processor(pipeline, pipeline.chain(), LIVE, SINK._replace(topic="in"), catalog, Runtime(pool), tables)
    gc.disable()
    try:
        effects = await processor.process([record({"n": n}, offset=n, key=b"a", partition=2) for n in range(5)])
        await asyncio.sleep(0.01)  # the thread lets go of the lot
        assert [key() for key in keys] == [None] * 5
    finally:
        gc.enable()
    assert effects.results == 5


async def test_every_row_has_one_fate(process: Process) -> None:
    """Kept, dropped, split, failed and emitting rows are counted once each, and outputs keep the rows' order."""

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        what = row["what"]
        if what == "emit":
            ctx.emit("side", {"n": ctx.offset})
            return None
        if what == "fail":
            ctx.emit("side", {"n": "lost with its row"})
            raise ValueError("no")
        return {"keep": row, "drop": None, "split": [row, row]}[what]

    what = ["keep", "drop", "split", "fail", "emit", "keep"]
    rows = [record({"what": w}, offset=n, partition=2) for n, w in enumerate(what)]
    effects = await process(pipeline_of(handler), [*rows, record(b"nonsense", offset=6, partition=2)])
    assert counts(effects) == (7, 4, 2, 2, 1)
    sources = [header_of(out.headers, "rowmill.source") for out in effects.outputs[SINK]]
    assert sources == [b"in/2/0/0", b"in/2/2/0", b"in/2/2/1", b"in/2/5/0"]
    assert [out.value for out in effects.outputs[LETTERS]] == [rows[3].value, b"nonsense"]
    side = [out for tp, records in effects.outputs.items() if tp.topic == "side" for out in records]
    assert [loads(out.value or b"") for out in side] == [{"n": 4}]


async def test_nothing_goes_out(process: Process) -> None:
    """A batch of dropped rows has no outputs at all, and an empty batch is nothing."""
    effects = await process(pipeline_of(lambda row: None), [record(partition=2)] * 3)
    assert (effects.outputs, counts(effects)) == ({}, (3, 0, 3, 0, 0))
    assert counts(await process(pipeline_of(), [])) == (0, 0, 0, 0, 0)


# --- placement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "new_key", "sink_partitions", "partition"),
    [
        (b"k", "same", 4, 2),
        (None, "same", 4, 2),
        (b"k", "other", 4, partition_for(b"other", 4)),
        (b"k", None, 4, 2),
        (None, "new", 4, partition_for(b"new", 4)),
        (b"k", "same", 6, partition_for(b"k", 6)),
        (b"k", "other", 6, partition_for(b"other", 6)),
        (b"k", None, 2, 0),
        (None, "same", 6, 2),
        (None, "same", 1, 0),
    ],
)
async def test_placement(
    broker: FakeBroker, process: Process, key: bytes | None, new_key: str | None, sink_partitions: int, partition: int
) -> None:
    """In a sink as wide as the source a row keeps its partition as long as its key; else murmur2 of the key says."""

    def rekey(row: dict[str, Any], ctx: RowContext) -> Any:
        if new_key != "same":
            ctx.key = new_key
        return row

    broker.make("out", sink_partitions)
    tp, out = only(await process(pipeline_of(rekey), [record(key=key, partition=2)]))
    assert tp == TopicPartition("out", partition)
    assert out.key == (key if new_key == "same" else new_key.encode() if new_key else None)


async def test_plain_chains_in_a_sink_of_another_width(broker: FakeBroker, process: Process) -> None:
    """Without contexts the rule is the same: rows go where their keys belong."""
    broker.make("out", 7)
    keys = [b"%d" % n for n in range(50)]
    effects = await process(pipeline_of(), [record(key=key, partition=2) for key in keys])
    found = {out.key: tp.partition for tp, records in effects.outputs.items() for out in records}
    assert found == {key: partition_for(key, 7) for key in keys}


@pytest.mark.parametrize("session", [LIVE, OWN])
async def test_emits(broker: FakeBroker, process: Process, session: Session) -> None:
    """Side outputs go to topics of the session, made when missing, by their own key; ordinals follow the results'."""

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.emit("low", {"n": 1}, key="k", headers={"h": "1"})
        ctx.emit("out", {"n": 2})
        ctx.emit("high", {"n": 3})
        return [row, row]

    effects = await process(pipeline_of(handler), [record(offset=5, partition=2, topic=session.source("in"))], session)
    placed = {header_of(out.headers, "rowmill.source"): (tp, out) for tp, r in effects.outputs.items() for out in r}
    source = session.source("in").encode()
    tp, low = placed[source + b"/2/5/2"]
    assert tp == TopicPartition(session.output("low"), partition_for(b"k", 3))
    assert (low.key, header_of(low.headers, "h")) == (b"k", b"1")
    assert placed[source + b"/2/5/3"][0] == TopicPartition(session.output("out"), 2)
    assert placed[source + b"/2/5/4"][0] == TopicPartition(session.output("high"), 2)
    assert counts(effects) == (1, 2, 0, 0, 3)
    assert (await broker.topics())[session.output("low")].partitions == 3


@pytest.mark.parametrize("topic", ["", "a b", "rowmill.control", "x" * 300])
async def test_emits_to_nowhere(process: Process, topic: str) -> None:
    """A side output to a topic that cannot be makes its row a dead letter, results included; the others go on."""

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.emit(topic if row["n"] == 1 else "good", {})
        return row

    effects = await process(pipeline_of(handler), [record({"n": n}, offset=n, partition=2) for n in range(3)])
    assert counts(effects) == (3, 2, 0, 1, 2)
    (letter,) = effects.outputs[LETTERS]
    assert header_of(letter.headers, "rowmill.error.type") == b"topic_refused"
    assert header_of(letter.headers, "rowmill.error.stage") == b"output"
    assert header_of(letter.headers, "rowmill.error.offset") == b"1"


async def test_topics_cannot_be_looked_up(broker: FakeBroker, process: Process) -> None:
    """When the broker cannot say whether a topic exists, the batch fails, to be done again."""

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.emit("new", {})

    broker.inject("topics", lost(), skip=1)
    with pytest.raises(BrokerError, match="connection lost"):
        await process(pipeline_of(handler), [record(partition=2)])


# --- headers and context ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_context", [False, True])
async def test_headers_are_passed_on(process: Process, takes_context: bool) -> None:
    """The sender's headers (traceparent too) come before ours; what stands under our prefix is never passed on."""
    seen = []

    def with_context(row: dict[str, Any], ctx: RowContext) -> Any:
        seen.append(ctx.headers)
        return row

    headers = (("traceparent", b"00-1-2-01"), ("rowmill.source", b"forged"), ("a", None), ("rowmill.input.row", b"9"))
    pipeline = pipeline_of(with_context) if takes_context else pipeline_of()
    _, out = only(await process(pipeline, [record(headers=headers, partition=2)]))
    assert out.headers == (
        ("traceparent", b"00-1-2-01"),
        ("a", None),
        ("rowmill.source", b"in/2/0/0"),
        ("rowmill.session", b"live"),
    )
    assert all(found == (("traceparent", b"00-1-2-01"), ("a", None)) for found in seen)


async def test_what_a_handler_may_change(process: Process) -> None:
    """Key, timestamp and headers stand in the results as the handler left them."""

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.timestamp, ctx.headers = 77, {"mine": "x"}
        return row

    _, out = only(await process(pipeline_of(handler), [record(headers=(("theirs", b"y"),), partition=2)]))
    assert out.timestamp == 77
    assert out.headers[0] == ("mine", b"x")
    assert header_of(out.headers, "theirs") is None


@pytest.mark.parametrize("timestamp", ["now", 1.5, None, True, -2, 2**63])
async def test_times_that_are_none(process: Process, timestamp: Any) -> None:
    """A timestamp that no record can carry makes the row a dead letter."""

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.timestamp = timestamp
        return row

    tp, letter = only(await process(pipeline_of(handler), [record(partition=2)]))
    assert tp == LETTERS
    assert header_of(letter.headers, "rowmill.error.type") == b"bad_timestamp"


async def test_the_place_in_the_input_is_kept(process: Process) -> None:
    """In a bounded run results and dead letters carry the input row's number."""

    def handler(row: dict[str, Any]) -> Any:
        return row if row["n"] else 1 / 0

    rows = [record({"n": n}, headers=(("rowmill.input.row", b"%d" % (n + 40)),), partition=2) for n in range(2)]
    effects = await process(pipeline_of(handler), rows, OWN)
    for tp, number in ((TopicPartition("out.job", 2), b"41"), (TopicPartition("p.dlq.job", 2), b"40")):
        (out,) = effects.outputs[tp]
        assert header_of(out.headers, "rowmill.input.row") == number


async def test_broken_input(process: Process) -> None:
    """A piece of an input file that is no row becomes a dead letter with the reader's reason; only in such a run."""
    rows = [record(b'{"a": 1}', headers=(("rowmill.input.error", b"line 3: bad"),), partition=2)]
    _, letter = only(await process(pipeline_of(), rows, OWN))
    assert header_of(letter.headers, "rowmill.error.type") == b"broken_input"
    assert header_of(letter.headers, "rowmill.error.message") == b"line 3: bad"
    tp, _ = only(await process(pipeline_of(), rows, LIVE))
    assert tp == SINK


# --- what is amiss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_context", [False, True])
@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (record(None), "null_value", "tombstone"),
        (record(b"nonsense"), "not_json", "not JSON"),
        (record(b"[]"), "not_an_object", "array"),
        (record(b'{"a":"\xff"}'), "invalid_utf8", "value is not UTF-8"),
        (record(key=b"\xff"), "invalid_utf8", "key is not UTF-8: invalid start byte at byte 0"),
        (record(headers=(("h\udcff", b"x"),)), "invalid_utf8", "header name is not UTF-8"),
        (record(b'{"a":18446744073709551616}'), "integer_out_of_range", "64 bits"),
        (record(b'{"a":' + b"[" * 20 + b"]" * 20 + b"}"), "too_deep", "deeper than 10"),
        (record(b'{"a":"' + b"x" * 2_000 + b'"}'), "too_large", "above max_row_bytes=1,000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_records(process: Process, takes_context: bool, bad: StoredRecord, kind: str, says: str) -> None:
    """A record that is no row is a dead letter of its own bytes, reaches no handler, and its neighbours go on."""
    seen = []

    def with_context(row: dict[str, Any], ctx: RowContext) -> Any:
        seen.append(row)
        return row

    def without(row: dict[str, Any]) -> Any:
        seen.append(row)
        return row

    pipeline = pipeline_of(with_context if takes_context else without, max_row_bytes=1_000, max_depth=10)
    effects = await process(pipeline, [record({"n": 0}), bad, record({"n": 1})])
    assert counts(effects) == (3, 2, 0, 1, 0)
    assert seen == [{"n": 0}, {"n": 1}]
    (letter,) = effects.outputs[LETTERS]
    assert (letter.key, letter.value) == (bad.key, bad.value)
    assert header_of(letter.headers, "rowmill.error.stage") == b"input"
    assert header_of(letter.headers, "rowmill.error.type") == kind.encode()
    assert says in (header_of(letter.headers, "rowmill.error.message") or b"").decode()


async def test_keys_of_bytes(process: Process) -> None:
    """With keys="bytes" any key is good, and handlers get it as bytes."""
    seen = []

    def handler(row: dict[str, Any], ctx: RowContext) -> Any:
        seen.append(ctx.key)
        return row

    _, out = only(await process(pipeline_of(handler, keys="bytes"), [record(key=b"\xff", partition=2)]))
    assert (out.key, seen) == (b"\xff", [b"\xff"])


async def test_tombstones_forwarded(process: Process) -> None:
    """With tombstones="forward" a null value goes to the sink with its key, and no handler sees it."""
    pipeline = pipeline_of(lambda row: 1 / 0, tombstones="forward")
    effects = await process(pipeline, [record(None, key=b"k", offset=3, headers=(("h", b"1"),), partition=2)])
    tp, out = only(effects)
    assert tp == SINK
    assert (out.key, out.value, out.timestamp) == (b"k", None, 1_000)
    assert out.headers == (("h", b"1"), ("rowmill.source", b"in/2/3/0"), ("rowmill.session", b"live"))
    assert counts(effects) == (1, 1, 0, 0, 0)


async def test_tombstones_that_do_not_fit(process: Process) -> None:
    """A tombstone whose headers leave no room for ours is a dead letter, not the end of its partition."""
    bad = record(None, key=b"k", headers=(("h", b"x" * 9_990),), partition=2)
    effects = await process(pipeline_of(tombstones="forward"), [bad, record({})], max_bytes=10_000)
    assert counts(effects) == (2, 1, 0, 1, 0)
    assert header_of(effects.outputs[LETTERS][0].headers, "rowmill.error.type") == b"too_large"


@pytest.mark.parametrize("takes_context", [False, True])
@pytest.mark.parametrize(
    ("result", "kind"),
    [
        ({"a": object()}, b"unserialisable"),
        ({"a": 2**70}, b"unserialisable"),
        ([{"a": 1}, {"a": {1}}], b"unserialisable"),
        ({"a": "x" * 10_000}, b"too_large"),
        ([{"a": 1}, {"a": "x" * 10_000}], b"too_large"),
    ],
)
async def test_results_that_cannot_be_written(
    process: Process,
    takes_context: bool,
    result: Any,
    kind: bytes,
) -> None:
    """A result that cannot be written buries the whole row, its other results included; the others go on."""

    def with_context(row: dict[str, Any], ctx: RowContext) -> Any:
        ctx.emit("side", {})
        return row if row["n"] else result

    def without(row: dict[str, Any]) -> Any:
        return row if row["n"] else result

    pipeline = pipeline_of(with_context if takes_context else without)
    effects = await process(pipeline, [record({"n": n}, partition=2) for n in range(3)], max_bytes=10_000)
    assert counts(effects) == (3, 2, 0, 1, 2 * takes_context)
    (letter,) = effects.outputs[LETTERS]
    assert letter.value == b'{"n":0}'
    assert header_of(letter.headers, "rowmill.error.stage") == b"output"
    assert header_of(letter.headers, "rowmill.error.type") == kind
    assert len(effects.outputs[SINK]) == 2


@pytest.mark.parametrize("size", range(9_600, 10_100, 25))
async def test_results_near_the_limit(process: Process, size: int) -> None:
    """Around the largest size each result either fits with all its headers, or is a dead letter."""
    effects = await process(
        pipeline_of(lambda row: {"a": "x" * size}), [record(key=b"k", partition=2)], max_bytes=10_000
    )
    tp, out = only(effects)
    weight = len(out.value or b"") + len(out.key or b"") + sum(len(n) + len(v or b"") + 10 for n, v in out.headers)
    assert (tp == LETTERS) or weight <= 10_000
    assert (tp == SINK) is (size < 9_800) or 9_700 < size < 9_900


async def test_failures_in_stages(process: Process) -> None:
    """A handler's error is told with its stage, class and text; the dead letter has the row as it came."""

    def spoil(row: dict[str, Any]) -> Any:
        row["spoilt"] = True
        return row

    effects = await process(pipeline_of(spoil, lambda row: row["missing"]), [record({"a": 1}, partition=2)])
    tp, letter = only(effects)
    assert (tp, letter.value) == (LETTERS, b'{"a":1}')
    assert header_of(letter.headers, "rowmill.error.stage") == b"stage1"
    assert header_of(letter.headers, "rowmill.error.type") == b"KeyError"
    assert header_of(letter.headers, "rowmill.error.message") == b"'missing'"
    assert header_of(letter.headers, "rowmill.error.attempts") == b"1"


async def test_async_chains(process: Process) -> None:
    """A chain that has to be awaited gives the same effects as one that need not."""

    async def later(row: dict[str, Any]) -> Any:
        return now(row)

    def now(row: dict[str, Any]) -> Any:
        return {**row, "b": 2} if row["a"] else no_such_row(row)

    def no_such_row(row: dict[str, Any]) -> Any:
        raise ZeroDivisionError(str(row))

    rows = [record({"a": n % 3}, offset=n, key=b"%d" % n, partition=2) for n in range(9)] + [record(b"bad")]
    one, two = [await process(pipeline_of(handler), rows) for handler in (later, now)]
    assert contents(one) == contents(two)
    assert counts(one) == counts(two) == (10, 6, 0, 4, 0)


def test_effects_add_up() -> None:
    """Effects of later rows go behind those of earlier ones, partition by partition."""
    tps = [TopicPartition("out", n) for n in range(3)]

    def effects(*parts: tuple[int, bytes]) -> Effects:
        made = Effects()
        for partition, value in parts:
            box = made.outputs.setdefault(tps[partition], Outbox("in/0/", ("rowmill.session", b"live")))
            box.append(Outgoing(None, value, 0))
        made.rows, made.results, made.dropped, made.dead_letters, made.emitted = 1, 2, 3, 4, 5
        return made

    total = Effects()
    for part in (effects((0, b"a"), (1, b"b")), effects((1, b"c")), effects((2, b"d"), (1, b"e"))):
        total.merge(part)
    assert [[out.value for out in total.outputs[tp]] for tp in tps] == [[b"a"], [b"b", b"c", b"e"], [b"d"]]
    assert counts(total) == (3, 6, 9, 12, 15)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(record({"n": 3}, headers=(("trace", b"1"),)), id="headers"),
        pytest.param(record({"n": 3}, timestamp=2**42), id="from the future"),
        pytest.param(record(b"nonsense"), id="no row"),
        pytest.param(record({"n": "bad"}), id="fails"),
        pytest.param(record({"n": "set"}), id="cannot be written"),
        pytest.param(record({"n": "two"}), id="two results"),
        pytest.param(record({"n": "none"}), id="dropped"),
    ],
)
async def test_rows_out_of_the_ordinary(process: Process, odd: StoredRecord) -> None:
    """A lot with one odd row among plain ones comes to the same as its rows one by one, in the same order."""

    def handler(row: dict[str, Any]) -> Any:
        special = {"set": {"n": {1}}, "two": [{"n": 1}, {"n": 2}], "none": None}
        if row["n"] == "bad":
            raise ValueError(row["n"])
        return special[row["n"]] if row["n"] in special else {**row, "m": row["n"] + 1}

    plain = [record({"n": n}, offset=n, key=b"%d" % n, partition=2) for n in range(9)]
    rows = [*plain[:4], odd._replace(offset=4, partition=2, key=b"4"), *plain[5:]]
    together = await process(pipeline_of(handler), rows)
    apart = Effects()
    for row in rows:
        apart.merge(await process(pipeline_of(handler), [row]))
    assert contents(together) == contents(apart)
    assert counts(together) == counts(apart)
    assert [(record.offset, failure.kind) for record, failure in together.failures] == [
        (record.offset, failure.kind) for record, failure in apart.failures
    ]


async def test_a_source_that_grew(broker: FakeBroker, pool: BlockingPool) -> None:
    """A new partition of the source, beyond the sink's last one, places its results by key instead of by number."""
    catalog = Catalog(broker, create=True, partitions=3, timeout=5)
    await catalog.ensure(["in", "out", LIVE.dead_letters])
    new = TopicPartition("in", 9)
    pipeline = pipeline_of()
    effects = await Processor(pipeline, pipeline.chain(), LIVE, new, catalog, Runtime(pool)).process(
        [record({"a": 1}, key=b"k", partition=9)]
    )
    [target] = effects.outputs
    assert target == TopicPartition("out", partition_for(b"k", 4))
