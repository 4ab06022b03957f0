"""What Kafka answers to OffsetFetch: an error inside of it is told or asked again, and never "no offset" (FACTS)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rowmill.state.model import Committed, TopicPartition
from rowmill.streams.brokers.kafka import KafkaBroker
from rowmill.streams.errors import BrokerError, BrokerTimeoutError, TopicError
from support.fake_clock import FakeClock

TP = TopicPartition("in", 0)
NOT_COORDINATOR, LOADING, NO_SUCH_PARTITION, NOT_ALLOWED, UNSTABLE, UNKNOWN = 16, 14, 3, 30, 88, -1

pytestmark = pytest.mark.timeout(20)


class Admin:
    """Gives prepared answers, one after the other, the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def find_coordinator(self, group: str) -> int:
        """Always the same."""
        return 1

    async def _send_request(self, request: Any, node: int) -> Any:
        self.asked += 1
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def asking(*answers: Any) -> tuple[KafkaBroker, Admin]:
    """A broker that will answer so."""
    broker, admin = KafkaBroker("nowhere:1", clock=FakeClock()), Admin(*answers)
    broker._admin = admin
    return broker, admin


def fetched(*entries: tuple[int, int, str | None, int], code: int = 0) -> Any:
    """An answer to OffsetFetch version 3."""
    return SimpleNamespace(error_code=code, topics=[("in", list(entries))] if entries else [])


def stable(code: int, group_code: int = 0) -> Any:
    """An answer to OffsetFetch version 7."""
    return SimpleNamespace(error_code=group_code, topics=[("in", [(0, 5, 0, "", code, {})], {})])


THERE = fetched((0, 5, "map", 0))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(THERE, Committed(5, "map")), (fetched((0, 5, None, 0)), Committed(5)), (fetched((0, -1, "", 0)), None)],
)
async def test_what_was_committed(answer: Any, expected: Committed | None) -> None:
    """Only -1, without any error, means that nothing was committed."""
    broker, admin = asking(answer)
    assert (await broker.committed("g", [TP]), admin.asked) == ({TP: expected}, 1)


@pytest.mark.parametrize(
    "passing",
    [
        fetched(code=LOADING),  # the group's error stands on top, with no topics: to the client, "no offset"
        fetched(code=NOT_COORDINATOR),
        fetched((0, -1, "", NO_SUCH_PARTITION)),
        fetched(),  # an answer without the partition
    ],
)
async def test_errors_that_pass(passing: Any) -> None:
    """The coordinator loads, or has moved: it is asked again until it answers."""
    broker, admin = asking(passing, passing, THERE)
    assert (await broker.committed("g", [TP]), admin.asked) == ({TP: Committed(5, "map")}, 3)


@pytest.mark.parametrize(
    ("lasting", "error"),
    [
        (fetched(code=NOT_ALLOWED), TopicError),
        (fetched((0, -1, "", NOT_ALLOWED)), TopicError),
        (fetched(code=UNKNOWN), BrokerError),
        (fetched((0, -1, "", UNKNOWN)), BrokerError),
    ],
)
async def test_errors_that_last(lasting: Any, error: type[Exception]) -> None:
    """They are raised."""
    broker, _ = asking(lasting)
    with pytest.raises(error):
        await broker.committed("g", [TP])


async def test_a_coordinator_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error after a while, and no beginning from the start."""
    monkeypatch.setattr("rowmill.streams.brokers.kafka.CALL_SECONDS", 0.05)
    broker, _ = asking(fetched(code=LOADING))
    with pytest.raises(BrokerTimeoutError):
        await broker.committed("g", [TP])


async def test_offsets_that_a_transaction_may_still_move() -> None:
    """They are pending; any other error is none of that."""
    broker, _ = asking(stable(UNSTABLE))
    assert await broker.pending("g", [TP]) == {TP}
    broker, admin = asking(stable(0, LOADING), stable(NO_SUCH_PARTITION), stable(0))
    assert (await broker.pending("g", [TP]), admin.asked) == (frozenset(), 3)
    broker, _ = asking(stable(UNKNOWN))
    with pytest.raises(BrokerError):
        await broker.pending("g", [TP])
