"""How all sessions stand, kept in memory: looked up in the background, and served to any number of readers.

A request never waits for the broker. The next look begins a second after the last one, later where a look takes long,
and seldom while nobody reads; who has just changed something may ask for one at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ...state.clock import Clock
from ...state.errors import RowmillError
from ..brokers.base import Broker, BrokerInfo
from ..brokers.open import shown_url
from ..deadlines import deadline
from ..status import SessionStatus, StatusReader
from .contents import shown_text
from .views import (
    AlertView,
    BreakerView,
    EventView,
    FailureView,
    HistoryView,
    Overview,
    Series,
    SessionView,
    Summary,
    spark_of,
    stages_of,
    topics_of,
)

if TYPE_CHECKING:
    from .board import Board
    from .series import Window

log = logging.getLogger(__name__)

MOST_SESSIONS = 500
"""Sessions that are shown."""
MOST_SECONDS = 30.0
"""The longest pause between two looks, however long one takes."""
_SHARE = 3.0
"""A look may take a quarter of the time."""
_IDLE_SECONDS = 60.0
_IDLE_PAUSE = 5.0
_URGENT_SECONDS = 6.0
_FOCUS_PAUSE = 0.5
_SLOW_SECONDS = 0.5
_MOST_FOCUSED = 4
_MINUTE = 60.0
_DAY_MS = 86_400_000
_WINDOW_SECONDS: Mapping[str, int] = {"10s": 10, "1m": 60, "1h": 3_600}

Changed = Callable[[frozenset[str]], object]
"""Called with the groups of which something is new."""


class _Sample(NamedTuple):
    """How many dead letters a session had, and when."""

    at: float
    dead_letters: int


class Watch:
    """Looks the sessions up again and again, and puts them together with what the board knows of their past.

    Belongs to one event loop.

    Args:
        broker: a started one.
        board: what events told.
        clock: time.
        read_only: whether nothing can be changed from here; only told.
        interval: seconds from the end of one look to the beginning of the next.
        timeout: seconds that each call to the broker may take.
    """

    def __init__(
        self,
        broker: Broker,
        board: Board,
        *,
        clock: Clock,
        read_only: bool = False,
        interval: float = 1.0,
        timeout: float = 15.0,
    ) -> None:
        self.board = board
        self.read_only = read_only
        self.shown_broker = shown_url(broker.url.partition("?")[0])
        self._broker = broker
        self._clock = clock
        self._interval = interval
        self._timeout = timeout
        self._reader = StatusReader(broker, clock=clock, timeout=timeout)
        self._info: BrokerInfo | None = None
        self._statuses: dict[str, SessionStatus] = {}
        self._refreshed_ms: int | None = None
        self._refresh_error: str | None = None
        self._took: float | None = None
        self._samples: dict[str, deque[_Sample]] = {}
        self._listeners: list[Changed] = []
        self._asked_at = float("-inf")
        self._hurry = asyncio.Event()
        self._is_wanted = False
        self._urgent: dict[str, float] = {}
        self._followed: dict[str, int] = {}

    # --- looking -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look for ever; what goes wrong is told to the readers, and tried again."""
        remove = self.board.add_listener(lambda group: self._tell(frozenset({group})))
        try:
            while True:
                await self.refresh()
                await self._rest()
        finally:
            remove()

    async def refresh(self) -> None:
        """Look once. Never raises for the broker's faults: what was known stays, and the error is shown."""
        began = self._clock.monotonic()
        try:
            if self._info is None:
                async with deadline(self._timeout, "look the broker up"):
                    self._info = await self._broker.info()
            found = await self._reader.statuses()
            self._took = self._clock.monotonic() - began
            self._keep({status.record.group: status for status in found})
        except RowmillError as error:
            self._fail(str(error))
        except Exception as error:  # a bug in there must not end the watch, nor hide
            log.exception("sessions cannot be looked up")
            self._fail(f"this is a bug in rowmill: {type(error).__name__}: {error}")

    def _fail(self, message: str) -> None:
        if self._refresh_error is None:
            log.warning("sessions cannot be looked up, which is tried again: %s", message)
        self._refresh_error = shown_text(message)
        self._tell(frozenset())

    def _keep(self, found: dict[str, SessionStatus]) -> None:
        before, failed = self._statuses, self._refresh_error is not None
        self._statuses, self._refresh_error, self._refreshed_ms = found, None, self._clock.now_ms()
        for group in self._samples.keys() - found.keys():
            del self._samples[group]
        now = self._clock.monotonic()
        for group, status in found.items():
            _sample(self._samples.setdefault(group, deque()), _Sample(now, status.rows.dead_letters))
            self.board.tell(group, lag=status.lag, state=status.activity)  # so that lag has a history
        changed = {group for group, status in found.items() if _essence(before.get(group)) != _essence(status)}
        changed |= before.keys() - found.keys()
        if changed or failed:
            self._tell(frozenset(changed))

    async def _rest(self) -> None:
        """Until the next look is due. Meanwhile sessions that were just steered, or are on somebody's screen while a
        look at all takes long, are looked at by themselves.
        """
        pause = min(MOST_SECONDS, max(self._interval, _SHARE * (self._took or 0.0)))
        if self._clock.monotonic() - self._asked_at > _IDLE_SECONDS:
            pause = max(pause, _IDLE_PAUSE)
        until = self._clock.monotonic() + pause
        while (left := until - self._clock.monotonic()) > 0:
            await self._pause(min(left, _FOCUS_PAUSE) if self._focused() else left)
            if self._is_wanted:
                self._is_wanted = False
                return
            for group in self._focused():
                await self._look_at(group)

    def _focused(self) -> list[str]:
        """The sessions to be looked at by themselves."""
        now = self._clock.monotonic()
        self._urgent = {group: until for group, until in self._urgent.items() if until > now}
        followed = self._followed if (self._took or 0.0) > _SLOW_SECONDS else ()
        return sorted({*self._urgent, *followed})[:_MOST_FOCUSED]

    async def _look_at(self, group: str) -> None:
        """One session. What goes wrong is told by the next look at all."""
        reader = StatusReader(self._broker, clock=self._clock, timeout=self._timeout)
        try:
            found = await reader.statuses(group)
        except RowmillError as error:
            log.debug("%s cannot be looked up: %s", group, error)
            return
        except Exception:  # a bug in there must not end the watch
            log.exception("%s cannot be looked up", group)
            return
        before = self._statuses.get(group)
        if found and before is not None:
            self._statuses = {**self._statuses, group: found[0]}
            self.board.tell(group, lag=found[0].lag, state=found[0].activity)
            if _essence(before) != _essence(found[0]):
                self._tell(frozenset({group}))

    async def _pause(self, seconds: float) -> None:
        """So long, or until somebody wants a look."""
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        hurried = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait({sleeping, hurried}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            hurried.cancel()
            self._hurry.clear()

    def hurry(self, group: str) -> None:
        """A session was changed: look at it at once, and several times within the next seconds."""
        self._urgent[group] = self._clock.monotonic() + _URGENT_SECONDS
        self._hurry.set()

    def follow(self, group: str) -> Callable[[], None]:
        """Somebody has this session before him.

        Returns:
            What ends it.
        """
        self._followed[group] = self._followed.get(group, 0) + 1

        def end() -> None:
            self._followed[group] -= 1
            if not self._followed[group]:
                del self._followed[group]

        return end

    def touch(self) -> None:
        """Somebody reads."""
        now = self._clock.monotonic()
        if now - self._asked_at > _IDLE_SECONDS:
            self._is_wanted = True
            self._hurry.set()
        self._asked_at = now

    # --- who wants to hear of changes --------------------------------------------------------------------------

    def add_listener(self, listener: Changed) -> Callable[[], None]:
        """Call it with the groups that have changed (none: something of the console itself has).

        Returns:
            What ends it.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _tell(self, groups: frozenset[str]) -> None:
        for listener in list(self._listeners):
            try:
                listener(groups)
            except Exception:  # one that fails disturbs nobody, least of all the watch
                log.exception("a listener of the watch failed")

    # --- reading -----------------------------------------------------------------------------------------------

    def status(self, group: str) -> SessionStatus | None:
        """A session as it was looked up last; None for one that is not known."""
        return self._statuses.get(group)

    def statuses(self) -> Collection[SessionStatus]:
        """All of them."""
        return self._statuses.values()

    def overview(self) -> Overview:
        """All sessions in a line each: those that go on before those that have ended, by name."""
        self.touch()
        ordered = sorted(self._statuses.values(), key=lambda status: (status.is_over, status.reference))
        alerts = self._open_alerts()
        info, now_ms = self._info, self._clock.now_ms()
        return Overview(
            broker=self.shown_broker,
            kind="" if info is None else info.kind,
            version="" if info is None else info.version,
            now_ms=now_ms,
            read_only=self.read_only,
            history=HistoryView.of(self.board.standing),
            refreshed_ms=self._refreshed_ms,
            refresh_error=self._refresh_error,
            refresh_seconds=None if self._took is None else round(self._took, 3),
            sessions=[self._summary(status, alerts, now_ms) for status in ordered[:MOST_SESSIONS]],
            sessions_left_out=max(0, len(ordered) - MOST_SESSIONS),
        )

    def health(self) -> dict[str, Any]:
        """Whether sessions can be looked up; names nothing of anybody's, since it needs no token."""
        is_well = self._refreshed_ms is not None and self._refresh_error is None
        return {
            "status": "ok" if is_well else "the broker does not answer" if self._refresh_error else "starting",
            "history": self.board.standing.state,
            "refreshed_ms": self._refreshed_ms,
        }

    def summary(self, group: str) -> Summary | None:
        """One session in a line; None for one that is not known."""
        status = self._statuses.get(group)
        return None if status is None else self._summary(status, self._open_alerts(), self._clock.now_ms())

    def session(self, group: str) -> SessionView | None:
        """One session in detail; None for one that is not known."""
        self.touch()
        status = self._statuses.get(group)
        if status is None:
            return None
        now_ms = self._clock.now_ms()
        told = status.to_dict()
        return SessionView(
            summary=self._summary(status, self._open_alerts(), now_ms),
            status=told,
            partitions=told["partitions"],
            stages=stages_of(
                status, self.board.stages(group), () if status.stages else self.board.stages_so_far(group)
            ),
            breakers=[BreakerView(shown_text(name), shown_text(state)) for name, state in status.breakers.items()],
            workers=told["workers"],
            failures=[FailureView.of(each) for each in self.board.failures(group, now_ms - _DAY_MS)],
            alerts=self.alerts(group),
            topics=topics_of(status),
            now_ms=now_ms,
            refreshed_ms=self._refreshed_ms,
            refresh_error=self._refresh_error,
            history=HistoryView.of(self.board.standing),
        )

    def series(self, group: str, window: Window, since_ms: int, until_ms: int) -> Series:
        """A session's figures over time, of the windows that begin in that time."""
        self.touch()
        return Series.of(self.board.points(group, window, since_ms, until_ms), _WINDOW_SECONDS[window])

    def events(self, group: str, kinds: frozenset[str] | None, limit: int) -> list[EventView]:
        """What happened lately, the newest first."""
        self.touch()
        return [EventView.of(event) for event in self.board.events(group, kinds, limit)]

    def alerts(self, group: str | None = None) -> list[AlertView]:
        """Open alerts and those that were closed lately, of one session or of all."""
        return [AlertView.of(alert) for alert in self.board.alerts(group)]

    def _open_alerts(self) -> dict[str, int]:
        """How many are open, by group."""
        counts: dict[str, int] = {}
        for alert in self.board.alerts(None):
            if alert.until_ms is None:
                counts[alert.group] = counts.get(alert.group, 0) + 1
        return counts

    def _summary(self, status: SessionStatus, alerts: Mapping[str, int], now_ms: int) -> Summary:
        group = status.record.group
        since_ms = now_ms - 11 * _MINUTE_MS
        return Summary.of(
            status,
            spark=spark_of(self.board.points(group, "10s", since_ms, now_ms), now_ms),
            alerts=alerts.get(group, 0),
            dead_letters_per_minute=_per_minute(self._samples.get(group, deque())),
        )


_MINUTE_MS = 60_000
_LEAST_SPAN_SECONDS = 5.0


def _sample(samples: deque[_Sample], new: _Sample) -> None:
    """Keep those of the last minute, and the one before them."""
    samples.append(new)
    while len(samples) > 2 and new.at - samples[1].at >= _MINUTE:
        samples.popleft()


def _per_minute(samples: deque[_Sample]) -> float | None:
    """New dead letters in the last minute; None where that was not watched for long enough.

    What came in some seconds is not multiplied up to a minute: a burst is no rate.
    """
    if not samples:
        return None
    first, last = samples[0], samples[-1]
    if last.at - first.at < _LEAST_SPAN_SECONDS:
        return None
    return max(0, last.dead_letters - first.dead_letters) * _MINUTE / max(_MINUTE, last.at - first.at)


def _essence(status: SessionStatus | None) -> object:
    """What of a status is news when it changes: not when it was looked up, nor how old a worker's word is."""
    if status is None:
        return None
    workers = [replace(worker, seen_seconds=None, said={}) for worker in status.workers]
    partitions = [replace(partition, oldest_seconds=None) for partition in status.partitions]
    return replace(status, at_ms=0, workers=tuple(workers), partitions=tuple(partitions))
