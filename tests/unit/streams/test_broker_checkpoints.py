"""Checkpoints of a broker's sessions: which session a word means, what can be resumed, and records of strangers."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

import pytest
from rowmill.state.codec import dumps
from rowmill.state.context import ExecutionContext, session_uuid
from rowmill.state.execution import ExecutionState
from rowmill.state.model import TopicPartition
from rowmill.streams.broker_checkpoints import CHECKPOINTS_TOPIC, BrokerCheckpoints
from rowmill.streams.checkpoint_stores import named_id
from rowmill.streams.session import Session
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock
from support.sessions import MadeSession

pytestmark = pytest.mark.timeout(60)

NAME = "0b0e6f9a-4d0f-4f4e-9b57-7a4c7a3f8a11"


@pytest.fixture
def broker() -> FakeBroker:
    """A broker without markers, so that offsets are rows."""
    return FakeBroker(markers=False)


def checkpoints(broker: FakeBroker) -> BrokerCheckpoints:
    """What is asked."""
    return BrokerCheckpoints(broker, clock=FakeClock())


# --- which session is meant --------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [NAME, f"p.{NAME}", f"rowmill.p.{NAME}", str(session_uuid(f"rowmill.p.{NAME}"))])
async def test_a_session_whose_name_is_a_uuid(broker: FakeBroker, word: str) -> None:
    """A name that a session has is that session's, also where it looks like an id; its id is found as before."""
    session = Session("p", NAME)
    await MadeSession(session).make(broker, FakeClock())
    found = await checkpoints(broker).find(word)
    assert found == session_uuid(session.group)
    assert await checkpoints(broker).exists(found)


async def test_what_no_session_is_called(broker: FakeBroker) -> None:
    """A UUID that is no session's name is an id, and any other word has the id that files use for it."""
    await MadeSession(Session("p", "monday")).make(broker, FakeClock())
    assert await checkpoints(broker).find(NAME) == UUID(NAME)
    assert await checkpoints(broker).find(UUID(NAME)) == UUID(NAME)
    assert await checkpoints(broker).find("tuesday") == named_id("tuesday")


# --- what can be resumed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "committed", "state", "resumable"),
    [
        ({}, (4, 10), ExecutionState.IDLE, True),
        ({}, (10, 10), ExecutionState.IDLE, False),
        ({}, (None, None), ExecutionState.IDLE, False),
        ({}, (10, None), ExecutionState.IDLE, True),
        ({"failure": "out of memory", "failed_ms": 5}, (10, 10), ExecutionState.FAILED, False),
        ({"failure": "out of memory", "failed_ms": 5}, (4, 10), ExecutionState.FAILED, True),
        ({"sources": ("p", "gone")}, (4, 10), ExecutionState.IDLE, False),
    ],
)
async def test_what_can_be_resumed(
    broker: FakeBroker,
    fields: dict[str, Any],
    committed: tuple[int | None, ...],
    state: ExecutionState,
    resumable: bool,
) -> None:
    """A session that began, has something left to do, and has its sources still; not one with nothing left."""
    await MadeSession(Session("p", "monday"), fields, committed=committed).make(broker, FakeClock())
    (info,) = await checkpoints(broker).infos()
    assert (info.state, info.resumable) == (state, resumable)


# --- kept by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [
        b"-9000000000000000000",
        b"-62135596900000",
        b"253402300800000",
        b"9223372036854775807",
        b"1e17",
        b"1e300",
        b"1e400",
        b'"yesterday"',
        b"null",
        b"[1]",
    ],
)
async def test_odd_times_do_not_spoil_the_list(broker: FakeBroker, caplog: pytest.LogCaptureFixture, at: bytes) -> None:
    """A checkpoint that a stranger wrote with a time that cannot be is left out with a warning; others are listed."""
    (place,) = broker.make(CHECKPOINTS_TOPIC)
    for session_id, moment in ((UUID(int=1), b"1750000000000"), (UUID(int=2), at)):
        data = dumps(ExecutionContext(session_id=session_id).to_checkpoint())
        broker.write(place, b'{"v":1,"at":%s,"data":%s}' % (moment, data), key=str(session_id).encode())
    assert place == TopicPartition(CHECKPOINTS_TOPIC, 0)
    with caplog.at_level(logging.WARNING):
        infos = await checkpoints(broker).infos()
    assert [info.session_id for info in infos] == [UUID(int=1)]
    assert len(caplog.records) == 1
