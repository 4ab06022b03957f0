"""Offset maps and the tracker: whatever completes in whatever order, a restart runs exactly the rest."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill.state.model import Committed, TopicPartition
from rowmill.streams.errors import CheckpointError
from rowmill.streams.offsets import (
    IN_FLIGHT_LIMIT,
    MAX_CHARACTERS,
    SPAN_LIMIT,
    OffsetMap,
    OffsetTracker,
    decode_map,
    encode_map,
)


@st.composite
def maps(draw: st.DrawFn) -> OffsetMap:
    """A low watermark, which is incomplete, and any set of incomplete offsets above it."""
    low = draw(st.integers(0, 2**40))
    deltas = sorted(draw(st.sets(st.integers(1, 400), max_size=200)) | {0})
    end = low + deltas[-1] + 1 + draw(st.integers(0, 50))
    return OffsetMap(low, end, tuple(low + delta for delta in deltas))


@given(maps())
def test_a_map_survives_its_encoding(offsets: OffsetMap) -> None:
    """Decoding gives back what was encoded; a map without complete offsets is empty metadata."""
    text = encode_map(offsets)
    back = decode_map(Committed(offsets.low, text))
    if offsets.end - offsets.low == len(offsets.incomplete):
        assert text == ""
        assert back == OffsetMap(offsets.low, offsets.low, ())
    else:
        assert back == offsets


@given(st.data())
def test_a_crash_runs_exactly_what_was_not_complete(data: st.DataObject) -> None:
    """Through any number of crashes each row completes and is committed once: those in flight again, others not."""
    log = sorted(data.draw(st.sets(st.integers(0, 300), min_size=1, max_size=120), label="offsets with gaps"))
    committed = Committed(0)
    finished: set[int] = set()  # committed as complete
    for _ in range(data.draw(st.integers(1, 4), label="crashes") + 1):
        tracker = OffsetTracker(decode_map(committed))
        again = [offset for offset in log if offset >= committed.offset]
        upto = data.draw(st.integers(0, len(again)), label="taken")
        running = [again[:upto][place] for place in tracker.take(again[:upto])]
        assert not finished & set(running), "a committed row runs again"
        done = data.draw(st.sets(st.sampled_from(running)) if running else st.just(set()), label="completed")
        for offset in done:
            tracker.complete(offset)
        committed = tracker.snapshot()
        assert len(committed.metadata) <= MAX_CHARACTERS
        finished |= done
        known = decode_map(committed)
        for offset in log:
            is_known = offset < known.low or (offset < known.end and offset not in known.incomplete)
            assert is_known == (offset in finished) or offset not in again[:upto]
    tracker = OffsetTracker(decode_map(committed))
    rest = [offset for offset in log if offset >= committed.offset]
    running = [rest[place] for place in tracker.take(rest)]
    assert set(running) | finished == set(log)
    assert not set(running) & finished
    for offset in running:
        tracker.complete(offset)
    tracker.pass_over(log[-1] + 1)
    assert tracker.snapshot() == Committed(log[-1] + 1)


@pytest.mark.parametrize("lot", [1, 200])
@pytest.mark.parametrize("seed", range(30))
def test_a_map_always_fits(seed: int, lot: int) -> None:
    """Taking only while there is room, the metadata stays within what the broker takes, whatever completes."""
    chance = random.Random(seed)
    low, slow, jump = chance.randrange(2**50), chance.randint(1, 30), chance.randrange(2**32)
    tracker = OffsetTracker(OffsetMap(low, low, ()))
    at, in_flight = low, []
    for _ in range(30_000 // lot):
        if tracker.has_room(at):
            gap = chance.choice((0, 0, 0, jump))  # between the rows of this lot, as in a compacted topic
            offsets = [at + place * (1 + gap) for place in range(lot)] if lot > 1 else [at]
            offsets = offsets[: tracker.fitting(offsets)]
            in_flight += [offsets[place] for place in tracker.take(offsets)]
            at = offsets[-1] + 1 + (jump if chance.random() < 0.001 else 0)
        if len(in_flight) > slow and chance.random() < 0.6:
            tracker.complete(in_flight.pop(chance.randrange(slow, len(in_flight))))
    assert len(tracker.snapshot().metadata) <= MAX_CHARACTERS


def test_worst_cases_fit() -> None:
    """Every second row complete over the whole span, and the most rows in flight over a huge one."""
    span = OffsetMap(0, SPAN_LIMIT, tuple(range(0, SPAN_LIMIT, 2)))
    assert len(encode_map(span)) <= MAX_CHARACTERS * 3 // 4
    far = 3_000_000
    sparse = OffsetMap(0, far * IN_FLIGHT_LIMIT, tuple(range(0, far * IN_FLIGHT_LIMIT, far)))
    assert len(encode_map(sparse)) <= MAX_CHARACTERS


def test_rows_that_vanished_count_as_complete() -> None:
    """An incomplete offset that compaction removed does not hold the low watermark for ever."""
    tracker = OffsetTracker(decode_map(Committed(10, encode_map(OffsetMap(10, 20, (10, 12, 15))))))
    assert tracker.take([11, 15, 19, 20]) == [1, 3]
    assert tracker.low_watermark == 15
    tracker.complete(15)
    assert tracker.low_watermark == 20
    tracker.complete(20)
    tracker.pass_over(25)
    assert tracker.snapshot() == Committed(25)


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "offset_maps.json").read_text())


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"v{golden['version']}-{golden['kind']}")
def test_golden_maps_load(golden: dict[str, Any]) -> None:
    """What an older version wrote must load for ever; and the present one still writes it the same."""
    expected = OffsetMap(golden["low"], golden["end"], tuple(golden["incomplete"]))
    assert decode_map(Committed(golden["low"], golden["metadata"])) == expected
    assert encode_map(expected) == golden["metadata"]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("not base64!", "cannot be read"),
        ("", None),
        ("AQ==", "cannot be read"),
        ("AnIKAQkB", "version 2"),
        ("AXgKAQkB", "kind 120"),
        ("AXIKAQE=", "fall short"),
        ("AXIKAX8=", "exceed"),
        ("AWIKqg==", "bytes of bits"),
        ("somebody's own note", "cannot be read"),
    ],
)
def test_unreadable_maps_are_errors(metadata: str, says: str | None) -> None:
    """A map that cannot be read is an error that names the remedy, never a silent start without one."""
    if says is None:
        assert decode_map(Committed(7, metadata)) == OffsetMap(7, 7, ())
        return
    with pytest.raises(CheckpointError, match=says) as caught:
        decode_map(Committed(7, metadata), TopicPartition("in", 3))
    assert "in/3: " in str(caught.value)
    assert "rowmill replay PIPELINE --to-current --execute" in str(caught.value)
