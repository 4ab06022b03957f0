"""What a worker says when it begins: that its session is paused, and how it goes on."""

from __future__ import annotations

import asyncio
import logging

import pytest
from rowmill import Pipeline, WorkerOptions
from rowmill.state.clock import SystemClock
from rowmill.state.execution import Wanted
from rowmill.streams.control import ControlTopic
from rowmill.streams.session import Session
from rowmill.streams.session_records import SessionRecord
from rowmill.streams.worker import Worker
from support.fake_broker import FakeBroker

pytestmark = pytest.mark.timeout(30)

QUICK = WorkerOptions(commit_interval=0.005, broker_timeout=5.0, drain_timeout=5.0)


@pytest.mark.parametrize(
    ("wanted", "session", "name"),
    [
        (Wanted.PAUSE, Session("p"), "p"),
        (Wanted.PAUSE, Session("p", "monday"), "p.monday"),
        (Wanted.RUN, Session("p"), ""),
        (Wanted.CANCEL, Session("p"), ""),
    ],
    ids=["paused", "paused side session", "running", "cancelled"],
)
async def test_a_worker_of_a_paused_session_says_so(
    wanted: Wanted, session: Session, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that waits from its start on warns once, with the command that lets it go on; others say nothing."""
    broker = FakeBroker()
    broker.make("in", 2)
    broker.make(session.output("out"), 2)
    record = SessionRecord(group=session.group, pipeline="p", session=session.id, sources=("in",), wanted=wanted)
    await ControlTopic(broker, clock=SystemClock(), timeout=5).update(session.group, lambda _: record)
    pipeline = Pipeline("p", source="in", sink="out").add(lambda row: row, name="stage")
    worker = Worker(pipeline, broker, session=session, options=QUICK, steered=True)
    state = "paused" if wanted is Wanted.PAUSE else "running"
    with caplog.at_level(logging.WARNING, logger="rowmill.streams.steering"):
        running = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            while worker.state != state:
                await asyncio.sleep(0.001)
        worker.stop()
        await asyncio.wait_for(running, 10)
    said = [each.getMessage() for each in caplog.records if "is paused" in each.getMessage()]
    expected = f"session {name} is paused: its rows wait until somebody resumes it (rowmill resume {name})"
    assert said == ([expected] if name else [])
