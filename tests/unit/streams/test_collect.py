"""Reading topics to the end, and sorting what they hold."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from rowmill.state.model import Headers
from rowmill.streams.collect import (
    Result,
    Sorter,
    error_field,
    header,
    input_row,
    partitions_of,
    read_topic,
    result_of,
)
from rowmill.streams.errors import BrokerError
from support.fake_broker import FakeBroker, lost
from support.rows import record


@pytest.mark.parametrize("spill_after", [1, 3, 7, 100])
def test_sorted_across_spills(spill_after: int) -> None:
    """However often results go to disk, all of them come back in order, again and again."""
    results = [Result((0, n, o), b'{"n":"%d \xc3\xbc"}' % n) for n in range(20) for o in range(2)]
    shuffled = results[:]
    random.Random(7).shuffle(shuffled)
    sorter = Sorter(spill_after)
    for number, result in enumerate(shuffled, 1):
        sorter.add(result)
        if number % 13 == 0:
            assert list(sorter.sorted()) == sorted(shuffled[:number])
    for _ in range(2):
        assert list(sorter.sorted()) == results
    assert len(sorter._held) < spill_after
    sorter.close()


def test_empty_sorter() -> None:
    """No results are no results."""
    assert list(Sorter().sorted()) == []


@pytest.mark.parametrize(
    ("headers", "order"),
    [
        ((("rowmill.source", b"in/2/17/3"),), (2, 17, 3)),
        ((("rowmill.source", b"in.with.dots/2/17/0"),), (2, 17, 0)),
        ((("rowmill.source", b"in/2/17/3"), ("rowmill.input.row", b"99")), (0, 99, 3)),
        ((("rowmill.source", b"in/2/17/3"), ("rowmill.input.row", b"x")), (2, 17, 3)),
    ],
)
def test_the_place_of_a_result(headers: Headers, order: tuple[int, int, int]) -> None:
    """A result sorts by its input row where it has one, else by partition and offset, then by ordinal."""
    result = result_of(record(b"v", headers=headers))
    assert result == Result(order, b"v")
    assert result is not None
    assert result.row == order[1]


@pytest.mark.parametrize(
    ("topic", "place"), [("first", 0), ("second", 1), ("third/odd", 3), ("third", 2), ("other", 3)]
)
def test_results_of_several_sources(topic: str, place: int) -> None:
    """Without an input of its own a session's results sort by source, then partition, then offset."""
    source = ("rowmill.source", f"{topic}/2/17/0".encode())
    found = result_of(record(b"v", headers=(source,)), ["first", "second", "third"])
    assert found == Result((place << 32 | 2, 17, 0), b"v")


@pytest.mark.parametrize(
    ("value", "headers"),
    [(b"v", ()), (b"v", (("rowmill.source", None),)), (None, (("rowmill.source", b"in/2/17/3"),))],
)
def test_what_is_no_result(value: bytes | None, headers: Headers) -> None:
    """Records of others, and tombstones, are no results."""
    assert result_of(record(value, headers=headers)) is None


def test_headers() -> None:
    """Of a repeated header the last counts; an error's fields and the input's row are found by name."""
    headers: Headers = (
        ("a", b"1"),
        ("a", b"2"),
        ("rowmill.error.message", b"bad \xff"),
        ("rowmill.input.row", b"5"),
    )
    found = record(headers=headers)
    assert (header(found, "a"), header(found, "b")) == (b"2", None)
    assert (error_field(found, "message"), error_field(found, "stage")) == ("bad �", "")
    assert (input_row(found), input_row(record())) == (5, None)


async def everything(broker: FakeBroker, topic: str) -> list[bytes | None]:
    """The topic's values as read_topic gives them."""
    found: list[bytes | None] = []
    async for records in read_topic(broker, topic):
        assert records
        found += [r.value for r in records]
    return found


@pytest.mark.timeout(20)
async def test_reading_ends_at_the_end() -> None:
    """All partitions are read over gaps to where they ended at the start; empty ones and absent topics give nothing."""
    broker = FakeBroker()
    tps = broker.make("t", 4)
    broker.write(tps[0], *(b"%d" % n for n in range(5)))
    broker.skip_offsets(tps[0], 3)
    broker.skip_offsets(tps[1], 2)
    broker.write(tps[1], b"x")
    broker.skip_offsets(tps[2], 4)
    assert sorted(await everything(broker, "t"), key=str) == [b"0", b"1", b"2", b"3", b"4", b"x"]
    assert await everything(broker, "absent") == []
    assert await partitions_of(broker, ["absent", "t"]) == tps


@pytest.mark.timeout(20)
async def test_reading_from_an_offset() -> None:
    """A partition may be begun in the middle; the others are read from their first record."""
    broker = FakeBroker()
    one, two = broker.make("t", 2)
    broker.write(one, b"0", b"1", b"2")
    broker.write(two, b"a", b"b")
    broker.truncate(two, 1)
    found: list[bytes | None] = []
    async for records in read_topic(broker, "t", {one: 2}):
        found += [r.value for r in records]
    assert sorted(map(str, found)) == [str(b"2"), str(b"b")]


@pytest.mark.timeout(20)
async def test_reading_closes_its_reader() -> None:
    """Whether the reading ends, breaks off or fails: no reader is left behind."""
    broker = FakeBroker()
    (tp,) = broker.make("t")
    broker.write(tp, b"0", b"1")
    batches: list[Sequence[object]] = []
    reading = read_topic(broker, "t")
    batches.append(await anext(reading))
    await reading.aclose()  # type: ignore[attr-defined]
    broker.inject("fetch", lost())
    with pytest.raises(BrokerError):
        await everything(broker, "t")
    assert await everything(broker, "t") == [b"0", b"1"]
    assert broker._readers == []
