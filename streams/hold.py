"""Keeping workers off a session's partitions while somebody else moves them.

There are two ways. A session that no worker serves is *held*: the mover joins the group as its only member. A session
that is *paused* keeps its workers: they hold the group, and have closed their producers and tables. It is enough that
nobody resumes it meanwhile, which is looked at before each partition; whoever does in between is fenced from the
partition, and begins it anew where it was moved to.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ..state.clock import Clock
from ..state.errors import RowmillError
from ..state.execution import Wanted
from ..state.model import TopicPartition
from .brokers.base import AssignmentListener, Broker
from .control_topic import ControlTopic
from .deadlines import deadline
from .errors import BrokerError, BrokerTimeoutError, FencedError, GroupBusyError
from .events import recent_progress

_LOOK_SECONDS = 0.5
_WITHIN_SECONDS = 60.0
"""How far back to look for workers' words: more than a second, for clocks that are apart."""


@dataclass(frozen=True, slots=True)
class Standstill:
    """Who is at work on a session.

    Attributes:
        members: how many workers are in its group; None: the broker does not tell.
        is_paused: whether its operators want it paused; paused workers may be in the group.
    """

    members: int | None
    is_paused: bool


async def look_at(broker: Broker, group: str, timeout: float, clock: Clock) -> Standstill:
    """Who is at work on a session. Changes nothing.

    Raises:
        BrokerError: the broker does not answer.
    """
    record = await ControlTopic(broker, clock=clock, timeout=timeout, create=False).session(group)
    is_paused = record is not None and record.wanted is Wanted.PAUSE
    try:
        async with deadline(timeout, f"group {group}: look up its members"):
            return Standstill(len(await broker.members(group)), is_paused)
    except BrokerTimeoutError:
        raise
    except BrokerError:
        return Standstill(None, is_paused)


class Hold(ABC):
    """Nobody works on the session."""

    @abstractmethod
    async def check(self) -> None:
        """Look once more.

        Raises:
            GroupBusyError: somebody does by now.
        """

    def taken(self, error: FencedError) -> RowmillError:
        """What it means that somebody took a partition in between."""
        return error


@asynccontextmanager
async def kept_still(
    broker: Broker, group: str, sources: Sequence[str], timeout: float, clock: Clock
) -> AsyncIterator[Hold]:
    """Be sure that nobody works on the session: its workers are paused, or there are none.

    Args:
        broker: a started one.
        group: the session's.
        sources: the topics it reads, as they are named on the broker.
        timeout: seconds for the broker to answer, and for workers that pause to finish their rows.
        clock: time.

    Raises:
        GroupBusyError: somebody works on it, or it cannot be known that nobody does.
    """
    found = await look_at(broker, group, timeout, clock)
    if found.is_paused and found.members != 0:
        paused = _Paused(broker, group, timeout, clock)
        await paused.settle()
        yield paused
    else:
        async with _held(broker, group, sources, timeout) as held:
            yield held


# --- paused workers --------------------------------------------------------------------------------------------


class _Word(NamedTuple):
    """What a worker said last of itself."""

    at_ms: int
    state: str


_Words: TypeAlias = Mapping[str, _Word]


class _Paused(Hold):
    """Workers that are in the group, and paused."""

    def __init__(self, broker: Broker, group: str, timeout: float, clock: Clock) -> None:
        self._broker = broker
        self._group = group
        self._timeout = timeout
        self._clock = clock
        self._control = ControlTopic(broker, clock=clock, timeout=timeout, create=False)

    async def check(self) -> None:
        """The session is to stay paused."""
        record = await self._control.session(self._group)
        if record is None or record.wanted is not Wanted.PAUSE:
            by = f" by {record.changed_by}" if record is not None and record.changed_by else ""
            raise GroupBusyError(f"the session was resumed{by} meanwhile; pause it, and run this again")

    def taken(self, error: FencedError) -> RowmillError:
        """The partition's producer was started by somebody else."""
        return GroupBusyError(
            f"somebody else works on it: the session was resumed meanwhile, or another replay runs ({error}); pause "
            "it, and run this again"
        )

    async def settle(self) -> None:
        """Wait until each worker in the group has said that it is paused, since this began.

        What counts is that a worker's newest word changes while it is looked at: clocks of other machines do not.

        Raises:
            GroupBusyError: some did not, or the session was resumed.
        """
        give_up = self._clock.monotonic() + self._timeout
        before: _Words | None = None
        while True:
            await self.check()
            words = await self._listen()
            before = words if before is None else before
            why = await self._why_not(before, words)
            if why is None:
                return
            if self._clock.monotonic() > give_up:
                raise GroupBusyError(
                    f"the session is to be paused, but {why} within {self._timeout:g} s. `rowmill status` shows its "
                    "workers; stop those that do not pause (SIGTERM or Ctrl-C), and run this again; a killed one "
                    "counts as a member until its session times out"
                )
            await self._clock.sleep(_LOOK_SECONDS)

    async def _why_not(self, before: _Words, words: _Words) -> str | None:
        """Why it cannot be said yet that all workers are paused; None: they are."""
        spoke = {worker: word.state for worker, word in words.items() if before.get(worker) != word}
        busy = sorted(worker for worker, state in spoke.items() if state not in {"paused", "stopped"})
        if busy:
            return f"worker {busy[0]} did not finish its rows"
        paused = sum(state == "paused" for state in spoke.values())
        async with deadline(self._timeout, f"group {self._group}: look up its members"):
            members = len(await self._broker.members(self._group))
        return None if paused >= members else f"{members - paused} of its {members} workers did not say that they are"

    async def _listen(self) -> dict[str, _Word]:
        found = await recent_progress(
            self._broker,
            within_seconds=_WITHIN_SECONDS,
            groups=[self._group],
            clock=self._clock,
            timeout=self._timeout,
        )
        return {
            worker: _Word(event.at_ms, "stopped" if event.has_stopped else str(event.data.get("state")))
            for worker, event in found.get(self._group, {}).items()
        }


# --- nobody there ----------------------------------------------------------------------------------------------


class _Held(Hold, AssignmentListener):
    """A member of the group that wants all of its partitions and works on none."""

    def __init__(self, group: str, wanted: frozenset[TopicPartition]) -> None:
        self._group = group
        self._wanted = wanted
        self._owned: frozenset[TopicPartition] = frozenset()
        self.told = asyncio.Event()

    def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None:
        """All of them: nobody else is there."""
        del consecutive
        self._owned = partitions
        self.told.set()

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Somebody joins, or it is over."""
        self._owned -= partitions

    async def check(self) -> None:
        """Everything is still ours."""
        if not self._wanted <= self._owned:
            raise GroupBusyError(
                f"group {self._group} has a member: a worker runs. Stop the workers (SIGTERM or Ctrl-C), and run this "
                "again, or pause them (rowmill pause); a killed one counts as a member until its session times out"
            )


@asynccontextmanager
async def _held(broker: Broker, group: str, sources: Sequence[str], timeout: float) -> AsyncIterator[_Held]:
    """Be the group's only member.

    To ask who is in the group would leave a gap between the answer and the act, and the port has no such question.
    A worker that is there keeps its partitions, or gets them back at once; one that was killed is waited for until
    its session times out.

    Raises:
        GroupBusyError: somebody else is there.
    """
    async with deadline(timeout, "look topics up"):
        topics = await broker.topics()
    wanted = frozenset(TopicPartition(s, p) for s in sources for p in range(topics[s].partitions))
    hold = _Held(group, wanted)
    member = broker.member(group, list(sources))
    try:
        try:
            async with deadline(timeout + (broker.session_timeout or 0), f"group {group}: join"):
                await member.join(hold)
                await hold.told.wait()
        except BrokerTimeoutError as error:
            raise GroupBusyError(
                f"group {group} does not settle: a member of it does not answer. Stop the workers, and run this again"
            ) from error
        await hold.check()
        yield hold
    finally:
        await member.leave()
        await member.close()
