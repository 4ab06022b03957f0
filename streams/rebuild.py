"""Making tables again: which rows run only for what they write to tables, and where results stand meanwhile.

``rowmill replay --state rebuild`` empties a partition's tables, and sends the session back to the first row that there
is. The checkpoint record keeps where results stood: rows that were complete there run once more and keep silent, all
others run as ever. It keeps that in every commit until the low watermark has come past the last of the silent rows, so
a kill or a rebalance on the way changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left

from ..state.checkpoint import CheckpointRecord
from ..state.model import Committed
from .offsets import OffsetMap, decode_map


class Rebuild:
    """The rows of a partition that keep silent.

    Args:
        stood: where results stand: a low watermark and an offset map, as in a commit.

    Raises:
        CheckpointError: the map cannot be read.
    """

    def __init__(self, stood: Committed) -> None:
        self.stood = stood
        self._map = decode_map(stood)

    @property
    def end(self) -> int:
        """The offset behind the last silent row: once the low watermark is here, it is over."""
        return self._map.end

    def is_silent(self, offset: int) -> bool:
        """Whether the row has had its results, and runs for the tables alone."""
        return is_complete(self._map, offset)


def rebuild_of(record: CheckpointRecord) -> Rebuild | None:
    """The rebuild that is under way by a partition's checkpoint record, if one is."""
    return None if record.rebuild_until is None else Rebuild(Committed(record.rebuild_until, record.rebuild_map))


def is_complete(offsets: OffsetMap, offset: int) -> bool:
    """Whether a map says that this offset is complete."""
    low, end, incomplete = offsets
    if offset < low or offset >= end:
        return offset < low
    place = bisect_left(incomplete, offset)
    return place == len(incomplete) or incomplete[place] != offset


def standing(committed: OffsetMap, record: CheckpointRecord | None) -> OffsetMap:
    """Which rows have had their results: those that are committed, and those that a rebuild runs once more.

    Raises:
        CheckpointError: the record's map cannot be read.
    """
    if record is None or record.rebuild_until is None:
        return committed
    former = decode_map(Committed(record.rebuild_until, record.rebuild_map))
    low, end = max(committed.low, former.low), max(committed.end, former.end)
    either = (o for o in range(low, end) if not is_complete(committed, o) and not is_complete(former, o))
    incomplete = tuple(either)
    return OffsetMap(incomplete[0] if incomplete else end, end, incomplete)
