"""Whether workers have done what was asked: by what they tell, not by what they told before."""

from __future__ import annotations

import pytest
from rowmill.state.execution import Wanted
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers.base import MemberInfo
from rowmill.streams.control import ControlTopic
from rowmill.streams.control_wait import Follower, Standing
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock

GROUP = "rowmill.reviews"
TP = TopicPartition(EVENTS_TOPIC, 0)


class Session:
    """A session whose workers say what a test has them say."""

    def __init__(self, members: int = 0) -> None:
        self.broker = FakeBroker()
        self.broker.make(EVENTS_TOPIC)
        self.clock = FakeClock()
        self.follower = Follower(ControlTopic(self.broker, clock=self.clock), GROUP)
        self.member_count = members

        async def told(group: str) -> list[MemberInfo]:
            assert group == GROUP
            return [MemberInfo(str(n), "", "", frozenset()) for n in range(self.member_count)]

        self.broker.members = told  # type: ignore[method-assign]

    def say(self, worker: str, state: str, skew_ms: int = 0, group: str = GROUP) -> None:
        """A worker's progress; "stopped" is its last word."""
        kind = "worker_stopped" if state == "stopped" else "progress"
        at_ms = self.clock.now_ms() + skew_ms
        event = EventRecord(
            kind=kind, at_ms=at_ms, pipeline="reviews", session="live", group=group, worker=worker,
            data={"state": state} if kind == "progress" else {"reason": "stopped"},
        )  # fmt: skip
        self.broker.log(TP).append(TP, [Outgoing(group.encode(), event.encode(), self.clock.now_ms())])

    def say_later(self, after: float, worker: str, *states: str, skew_ms: int = 0) -> None:
        """One state each second, from then on; the last one for ever."""
        said, start = 0, self.clock.monotonic() + after
        sleep = self.clock.sleep

        async def sleeping(seconds: float) -> None:
            nonlocal said
            await sleep(seconds)
            while start + said <= self.clock.monotonic():
                self.say(worker, states[min(said, len(states) - 1)], skew_ms)
                said += 1

        self.clock.sleep = sleeping  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("wanted", "before", "after", "skew_ms", "expected"),
    [
        (Wanted.PAUSE, "running", ["pausing", "paused"], 0, Standing(1, {}, 0)),
        (Wanted.PAUSE, "running", ["pausing"], 0, Standing(0, {"w": "pausing"}, 0)),
        (Wanted.PAUSE, "paused", ["running"], 0, Standing(0, {"w": "running"}, 0)),
        (Wanted.PAUSE, "running", ["pausing", "paused"], -3_600_000, Standing(1, {}, 0)),
        (Wanted.PAUSE, "running", ["pausing", "paused"], 3_600_000, Standing(1, {}, 0)),
        (Wanted.PAUSE, "running", ["stopping", "stopped"], 0, Standing(0, {}, 0)),
        (Wanted.RUN, "paused", ["paused", "running"], 0, Standing(1, {}, 0)),
        (Wanted.RUN, "paused", ["paused"], 0, Standing(0, {"w": "paused"}, 0)),
        (Wanted.CANCEL, "running", ["stopping", "stopped"], 0, Standing(1, {}, 0)),
        (Wanted.CANCEL, "running", ["running"], 0, Standing(0, {"w": "running"}, 0)),
        (Wanted.PAUSE, "running", ["?"], 0, Standing(0, {"w": "?"}, 0)),
    ],
)
async def test_one_worker(wanted: Wanted, before: str, after: list[str], skew_ms: int, expected: Standing) -> None:
    """It has done it when it says so after the request, whatever its clock shows and whatever it said before."""
    session = Session()
    session.say("w", before, skew_ms)
    session.say("other", "running", group="rowmill.other")
    await session.follower.begin()
    session.say_later(0.4, "w", *after, skew_ms=skew_ms)
    began = session.clock.monotonic()
    standing = await session.follower.wait(wanted, 4.0)
    assert standing == expected
    assert standing.is_carried_out is (not expected.waited_for)
    assert session.clock.monotonic() - began <= 4.3


async def test_all_workers_are_waited_for() -> None:
    """One of two has paused: the other is named."""
    session = Session()
    session.say("a", "running")
    session.say("b", "running")
    await session.follower.begin()
    session.say_later(0.4, "a", "paused")
    session.say_later(0.4, "b", "pausing")
    standing = await session.follower.wait(Wanted.PAUSE, 3.0)
    assert (standing.done, standing.waited_for, standing.is_carried_out) == (1, {"b": "pausing"}, False)


async def test_no_worker_runs() -> None:
    """Nobody is waited for."""
    session = Session()
    await session.follower.begin()
    assert (await session.follower.wait(Wanted.PAUSE, 3.0)).is_carried_out
    assert session.clock.slept == []


async def test_a_worker_that_fell_silent_is_not_waited_for_for_ever() -> None:
    """It was killed: after some seconds without a word it counts as gone."""
    session = Session()
    session.say("w", "running")
    await session.follower.begin()
    began = session.clock.monotonic()
    assert (await session.follower.wait(Wanted.PAUSE, 30.0)).is_carried_out
    assert 5 <= session.clock.monotonic() - began <= 12


@pytest.mark.parametrize("wanted", Wanted)
async def test_members_that_tell_nothing(wanted: Wanted) -> None:
    """They are there by the broker's word, and what they do cannot be told: that is said, not guessed."""
    session = Session(members=2)
    await session.follower.begin()
    session.say_later(0.1, "w", {Wanted.RUN: "running", Wanted.PAUSE: "paused", Wanted.CANCEL: "stopped"}[wanted])
    standing = await session.follower.wait(wanted, 3.0)
    assert not standing.is_carried_out
    assert (standing.done, standing.unheard) == ((1, 2) if wanted is Wanted.CANCEL else (1, 1))


async def test_a_broker_that_does_not_tell_the_members() -> None:
    """What the workers say must do then."""
    session = Session()
    del session.broker.members
    await session.follower.begin()
    session.say_later(0.1, "w", "paused")
    assert (await session.follower.wait(Wanted.PAUSE, 3.0)).is_carried_out


async def test_workers_that_had_stopped_are_not_cancelled() -> None:
    """Who said goodbye before the request is not counted among those that carried it out."""
    session = Session()
    session.say("before", "stopped")
    session.say("w", "running")
    await session.follower.begin()
    session.say_later(0.4, "w", "stopping", "stopped")
    assert await session.follower.wait(Wanted.CANCEL, 4.0) == Standing(1, {}, 0)
