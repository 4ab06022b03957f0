"""streams/outbox.py: records on their way out, by columns."""

from __future__ import annotations

import gc

from rowmill.state.model import Outgoing
from rowmill.streams.outbox import Outbox

SESSION = ("rowmill.session", b"live")


def source(text: bytes) -> tuple[str, bytes]:
    """The header that tells where a record came from."""
    return ("rowmill.source", text)


def mixed() -> Outbox:
    """Two plain rows, and a record made by hand."""
    box = Outbox("in/2/", SESSION)
    box.extend_plain([b"a", None], [b"1", b"2"], [10, 20], [7, 9])
    box.append(Outgoing(b"c", None, 30, (("x", b"y"),)))
    return box


def test_records_come_out_in_order() -> None:
    """Plain rows get the headers that tell their source and session; what was made by hand keeps its own."""
    expected = [
        Outgoing(b"a", b"1", 10, (source(b"in/2/7/0"), SESSION)),
        Outgoing(None, b"2", 20, (source(b"in/2/9/0"), SESSION)),
        Outgoing(b"c", None, 30, (("x", b"y"),)),
    ]
    box = mixed()
    assert list(box) == expected
    assert list(box) == expected, "it can be sent again"
    assert (len(box), box[1], box[-1], box[1:]) == (3, expected[1], expected[2], expected[1:])


def test_later_ones_go_behind() -> None:
    """Another outbox's records follow this one's."""
    box, later = mixed(), mixed()
    box.extend(later)
    assert list(box) == [*mixed(), *mixed()]


def test_plain_rows_are_nothing_to_the_collector() -> None:
    """However many plain rows wait, the garbage collector has no more objects to look at."""
    box = Outbox("in/2/", SESSION)
    numbers = list(range(1_000, 3_000))
    gc.collect()
    before = len(gc.get_objects())
    box.extend_plain([b"key"] * 2_000, [b"%d" % n for n in numbers], numbers, numbers)
    assert len(gc.get_objects()) - before < 10
