"""Whether a session's workers have done what was asked of it: by what they tell of themselves, and by the group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..state.errors import RowmillError
from ..state.execution import Wanted
from .control_topic import ControlTopic
from .deadlines import deadline
from .event_records import EventRecord
from .events import recent_progress

_POLL_SECONDS = 0.25
_WITHIN_SECONDS = 10.0
_SILENT_SECONDS = 5.0
"""A worker tells its progress every second. Who has not for so long has died, or cannot."""
_REACHED: Mapping[Wanted, frozenset[str]] = MappingProxyType(
    {
        Wanted.RUN: frozenset({"starting", "running"}),
        Wanted.PAUSE: frozenset({"paused"}),
        Wanted.CANCEL: frozenset(),
    }
)
"""The states of workers that do what is wanted; a cancelled one is gone."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far the workers of a session are.

    Attributes:
        done: how many do what was asked for; of a cancelled session: how many have gone.
        waited_for: those that do not yet, by name, with their state.
        unheard: members of the group that tell nothing: they have just started, may not write events, are of an older
            rowmill, or were killed and the broker does not know yet.
    """

    done: int
    waited_for: Mapping[str, str]
    unheard: int

    @property
    def is_carried_out(self) -> bool:
        """Whether nobody is waited for. So it is where no worker runs: one that starts finds what is wanted."""
        return not self.waited_for and not self.unheard


class Follower:
    """Looks at a session's workers, from before a request until they have done it.

    A worker's word counts if it is newer, by the worker's own clock, than its last one before the request.

    Args:
        control: the topic.
        group: the session's.
    """

    def __init__(self, control: ControlTopic, group: str) -> None:
        self._control = control
        self._group = group
        self._before: dict[str, int] = {}
        """When each worker had spoken last before the request."""
        self._had_stopped: set[str] = set()
        """Workers that were gone before the request."""
        self._heard: dict[str, tuple[int, float]] = {}
        """When each worker spoke last, by its clock, and when that was heard, by ours."""

    async def begin(self) -> None:
        """Look before the request.

        Raises:
            BrokerError: the broker does not answer.
        """
        newest = await self._newest()
        self._before = {worker: event.at_ms for worker, event in newest.items()}
        self._had_stopped = {worker for worker, event in newest.items() if event.has_stopped}

    async def wait(self, wanted: Wanted, seconds: float) -> Standing:
        """Look until it is carried out, at most so long.

        Args:
            wanted: what was asked for.
            seconds: how long.

        Raises:
            BrokerError: the broker does not answer.
        """
        clock = self._control.clock
        give_up = clock.monotonic() + seconds
        while True:
            standing = await self._look(wanted)
            left = give_up - clock.monotonic()
            if standing.is_carried_out or left <= 0:
                return standing
            await clock.sleep(min(_POLL_SECONDS, left))

    async def _look(self, wanted: Wanted) -> Standing:
        newest = await self._newest()
        members = await self._members()
        alive = {worker: event for worker, event in newest.items() if self._is_alive(worker, event)}
        done = {worker for worker, event in alive.items() if self._has_obeyed(worker, event, wanted)}
        gone = len(newest.keys() - alive.keys() - self._had_stopped) if wanted is Wanted.CANCEL else 0
        waited_for = {worker: _state(event) for worker, event in alive.items() if worker not in done}
        return Standing(len(done) + gone, waited_for, max(0, members - len(alive)))

    def _is_alive(self, worker: str, event: EventRecord) -> bool:
        now = self._control.clock.monotonic()
        at_ms, since = self._heard.setdefault(worker, (event.at_ms, now))
        if event.at_ms != at_ms:
            since = now
            self._heard[worker] = (event.at_ms, now)
        return not event.has_stopped and now - since <= _SILENT_SECONDS

    def _has_obeyed(self, worker: str, event: EventRecord, wanted: Wanted) -> bool:
        return _state(event) in _REACHED[wanted] and event.at_ms > self._before.get(worker, -1)

    async def _newest(self) -> dict[str, EventRecord]:
        control = self._control
        found = await recent_progress(
            control.broker,
            within_seconds=_WITHIN_SECONDS,
            groups=[self._group],
            clock=control.clock,
            timeout=control.timeout,
        )
        return found.get(self._group, {})

    async def _members(self) -> int:
        """How many members the group has; 0 where the broker does not tell."""
        try:
            async with deadline(self._control.timeout, f"look up the members of {self._group}"):
                return len(await self._control.broker.members(self._group))
        except RowmillError:
            return 0


def _state(event: EventRecord) -> str:
    return str(event.data.get("state", ""))
