"""The at-least-once forwarder: what a failed send or commit does."""

from __future__ import annotations

import asyncio

import pytest
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.delivery import Forwarder
from rowmill.streams.errors import FencedError, StalledError, TopicError
from rowmill.streams.options import WorkerOptions
from rowmill.streams.session import Session
from support.fake_broker import DeafListener, FakeBroker, FakeMember, lost
from support.fake_clock import FakeClock

TP = TopicPartition("in", 0)
OUT, OTHER = TopicPartition("out", 0), TopicPartition("other", 0)
GROUP = "rowmill.p"

pytestmark = pytest.mark.timeout(20)


class Bench:
    """A broker, a member of the group that owns in/0, and a forwarder for that."""

    def __init__(self) -> None:
        self.broker = FakeBroker()
        for topic in ("in", "out", "other"):
            self.broker.make(topic)
        self.clock = FakeClock()
        self.member: FakeMember | None = None
        options = WorkerOptions(stall_timeout=5)
        self.forwarder = Forwarder(self.broker, Session("p"), TP, options, self.clock, lambda: self.member)

    @property
    def committed(self) -> int:
        return self.broker.group_offsets[GROUP][TP].offset


@pytest.fixture
async def bench() -> Bench:
    """A fresh one, opened, whose member has its partition."""
    bench = Bench()
    bench.member = FakeMember(bench.broker, GROUP, ["in"])
    await bench.member.join(DeafListener())
    await bench.forwarder.open()
    return bench


async def test_a_commit_is_repeated(bench: Bench) -> None:
    """Until the broker confirms it, with growing pauses; what it stands at is known only then."""
    bench.broker.inject("commit", lost(), times=3)
    await bench.forwarder.commit(Committed(7))
    assert (bench.committed, bench.forwarder.checkpoint) == (7, Committed(7))
    assert bench.clock.slept == [0.1 * 0.75, 0.2 * 0.75, 0.4 * 0.75]


async def test_a_commit_is_not_repeated_for_ever(bench: Bench) -> None:
    """After ``stall_timeout`` the worker has to give up, and the checkpoint is the one before."""
    bench.broker.inject("commit", lost("gone"), times=1_000)
    with pytest.raises(StalledError, match="in/0: no commit succeeded; last error: gone"):
        await bench.forwarder.commit(Committed(7))
    assert 5 < sum(bench.clock.slept) < 12
    assert bench.forwarder.checkpoint is None


@pytest.mark.parametrize("why", ["gone elsewhere", "left"])
async def test_a_commit_of_a_partition_that_is_lost(bench: Bench, why: str) -> None:
    """Who is no member any more, or does not own the partition, does not try again."""
    if why == "left":
        bench.member = None
    else:
        assert bench.member is not None
        await bench.member.lose()
    with pytest.raises(FencedError):
        await bench.forwarder.commit(Committed(7))
    assert bench.clock.slept == []


async def test_a_send_that_fails(bench: Bench) -> None:
    """The first error is raised once every acknowledgement was awaited."""
    bench.broker.inject("ack", TopicError("too large"))
    records = [Outgoing(None, b"{}", 0, ())]
    with pytest.raises(TopicError, match="too large"):
        await bench.forwarder.send({OUT: records, OTHER: records})
    assert bench.broker.calls.count("ack") == 2


async def test_a_send_that_cannot_go_on(bench: Bench) -> None:
    """What was handed over before is awaited all the same."""
    bench.broker.inject("send", TopicError("no such topic"), skip=1)
    records = [Outgoing(None, b"{}", 0, ())]
    with pytest.raises(TopicError, match="no such topic"):
        await bench.forwarder.send({OUT: records, OTHER: records})
    assert bench.broker.calls.count("ack") == 1


async def test_no_commit_amid_a_rebalance(bench: Bench) -> None:
    """An attempt that failed is made again when the group is stable, and not before."""
    released = asyncio.Event()
    committing = asyncio.create_task(bench.forwarder.commit(Committed(7), released))
    await asyncio.sleep(0)
    assert "commit" not in bench.broker.calls
    bench.broker.inject("commit", lost())
    released.set()
    await committing
    assert bench.committed == 7
