"""Any sequence of faults: effects appear exactly once."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.options import WorkerOptions
from rowmill.streams.session import Session
from rowmill.streams.transaction import IsOurs, Transactor
from support.fake_broker import FakeBroker, Step, lost
from support.fake_clock import FakeClock

IN, OUT = TopicPartition("in", 0), TopicPartition("out", 0)
CHANGELOG = TopicPartition("rowmill.p.in.changelog", 0)
STEPS: list[Step] = ["start", "begin", "send", "ack", "offsets", "end", "committed", "pending", "settle", "look_up"]


def record(n: int) -> Outgoing:
    """The checkpoint record of the commit of ``n``."""
    return Outgoing(CHECKPOINT_KEY, CheckpointRecord(n + 1, 0, False, None, {}, {}, {}, "me", "").encode(), 0)


def witness(broker: FakeBroker, n: int) -> IsOurs:
    """Whose the changelog's last record is, asked about the commit of ``n``."""

    async def is_ours() -> bool | None:
        last = (broker.values(CHANGELOG.topic) or [None])[-1]
        return {record(n).value: True, record(n - 1).value if n else None: False}.get(last)

    return is_ours


class Script(NamedTuple):
    """A fault to be put in."""

    step: Step
    took_effect: bool
    skip: int
    times: int


SCRIPTS = st.lists(
    st.builds(Script, st.sampled_from(STEPS), st.booleans(), st.integers(0, 4), st.integers(1, 3)), max_size=6
)


@given(SCRIPTS, st.booleans())
@settings(max_examples=200)
def test_exactly_once(scripts: list[Script], markers: bool) -> None:
    """Five commits through any faults leave five effects in order, five transactions, and the last checkpoint."""
    broker = FakeBroker(markers=markers)
    broker.make("in")
    broker.make("out")
    broker.make(CHANGELOG.topic)
    transactor = Transactor(broker, Session("p"), IN, WorkerOptions(stall_timeout=10_000), FakeClock())

    async def run() -> None:
        await transactor.open()
        for script in scripts:
            broker.inject(script.step, lost(), took_effect=script.took_effect, skip=script.skip, times=script.times)
        for n in range(5):
            outputs = {OUT: [Outgoing(None, b"%d" % n, 0)], CHANGELOG: [record(n)]}
            await transactor.commit(outputs, Committed(n + 1), witness(broker, n))

    asyncio.run(run())
    assert broker.values("out") == [b"0", b"1", b"2", b"3", b"4"]
    assert broker.group_offsets == {"rowmill.p": {IN: Committed(5)}}
    assert broker.commits == 5
