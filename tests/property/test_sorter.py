"""Sorting with spills is sorting."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rowmill.state.codec import encode
from rowmill.streams.collect import Result, Sorter

PLACES = st.tuples(st.integers(0, 3), st.integers(0, 2**63), st.integers(0, 3))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5).map(lambda text: encode({"t": text}))


@given(st.lists(st.builds(Result, PLACES, TEXTS), max_size=30), st.integers(1, 10))
def test_like_sorted(results: list[Result], spill_after: int) -> None:
    """Any results, in any order, with any size of the runs: the same as sorting them in memory."""
    sorter = Sorter(spill_after)
    for result in results:
        sorter.add(result)
    assert list(sorter.sorted()) == sorted(results)
    assert list(sorter.sorted()) == sorted(results)
    sorter.close()
