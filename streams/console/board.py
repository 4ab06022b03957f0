"""What the console knows from events, in memory: fed by the Faust app, read by everybody else."""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, cast

from ...state.clock import Clock
from ...state.codec import loads
from ...state.model import TopicPartition
from ..errors import CheckpointError
from ..event_records import EventRecord
from ..session_records import SessionRecord
from ..session_refs import session_of
from .letters import LetterBoard
from .series import WINDOWS, FailureCount, Point, StageFigures, Window, count_failure, packed
from .session_board import Change, Facts, SessionBoard, split_key

__all__ = ["TABLES", "Alert", "Board", "Change", "Standing"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

State: TypeAlias = Literal["starting", "catching up", "live", "stopped"]
CONTROL = "control"
"""The kind of the events that records of the control topic make: what is ``wanted``, ``by`` whom, and for what
``reason``."""
TABLES = (*WINDOWS, "events", "letters", "alerts", "sessions")
"""The tables that keep a board, by name, in the order in which they must be written."""

MOST_SESSIONS = 500
MOST_LETTER_TOPICS = 500
MOST_ALERTS = 1_000
_FORGET_MS = 7 * 86_400_000


@dataclass(frozen=True, slots=True)
class Standing:
    """How current the history is.

    Attributes:
        state: ``starting``; ``catching up`` with events that were written before now; ``live``; ``stopped``, and then
            ``message`` says why.
        behind_seconds: how old the newest event was when it was read; 0 while there is nothing left to read.
        message: for people; "" where all is well.
    """

    state: State = "starting"
    behind_seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a rule found, while it lasts and for a while after.

    Attributes:
        rule: its kind.
        group: the session.
        subject: the breaker, the fraction of the budget; "" where the session is all that it is about.
        since_ms: when it began.
        until_ms: when it ended; None while it lasts.
        text: for people.
    """

    rule: str
    group: str
    subject: str
    since_ms: int
    until_ms: int | None
    text: str

    @property
    def key(self) -> str:
        """What it is kept under: one at a time of each."""
        return f"{self.rule}/{self.group}/{self.subject}"


def _locked(method: Callable[Concatenate[Board, P], T]) -> Callable[Concatenate[Board, P], T]:
    """One call at a time: the Faust app feeds from a thread of its own."""

    @functools.wraps(method)
    def call(board: Board, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with board._lock:  # noqa: SLF001 - it is the board's own method
            return method(board, *args, **kwargs)

    return call


class Board:
    """All sessions of a broker. Every method is quick and may be called from any thread.

    Args:
        clock: dates what is told without a date, and lets windows expire.
    """

    def __init__(self, clock: Clock) -> None:
        self.standing = Standing()
        self._lock = threading.RLock()
        self._clock = clock
        self._sessions: OrderedDict[str, SessionBoard] = OrderedDict()
        self._letters: OrderedDict[str, LetterBoard] = OrderedDict()
        self._alerts: dict[str, Alert] = {}
        self._unwritten: list[Change] = []
        self._listeners: list[Callable[[str], None]] = []

    # -- reading ----------------------------------------------------------------------------------------------

    @_locked
    def groups(self) -> list[str]:
        """The sessions that something is known of, sorted."""
        return sorted(self._sessions)

    @_locked
    def points(self, group: str, window: Window, since_ms: int, until_ms: int) -> list[Point]:
        """The windows of a session that overlap this time, the oldest first; those without anything are left out."""
        session = self._sessions.get(group)
        return session.points(window, since_ms, until_ms) if session else []

    @_locked
    def failures(self, group: str, since_ms: int) -> list[FailureCount]:
        """Failed rows by stage and type since then, the most frequent first.

        Workers tell of twenty per second, dead letters are all there: of the two counts the larger one is shown.
        Looked at minute by minute for six hours, hour by hour beyond.
        """
        session = self._sessions.get(group)
        if session is None:
            return []
        window: Window = "1m" if self._clock.now_ms() - since_ms <= 6 * 3_600_000 else "1h"
        found: dict[tuple[str, str], list[int]] = {}
        for entry in session.sums(window, since_ms):
            for (stage, kind), (count, last_ms) in entry.failed.items():
                count_failure(found, stage, kind, last_ms, count)
        letters = self._letters.get(session.dead_letters)
        for (stage, kind), (count, last_ms) in (letters.counts(session.session, since_ms) if letters else {}).items():
            known = found.setdefault((stage, kind), [0, 0])
            found[stage, kind] = [max(known[0], count), max(known[1], last_ms)]
        counts = [FailureCount(stage, kind, count, last_ms) for (stage, kind), (count, last_ms) in found.items()]
        return sorted(counts, key=lambda each: (-each.count, each.stage, each.type))

    @_locked
    def stages(self, group: str) -> list[StageFigures]:
        """What each stage did within the last minute, in the order of the chain."""
        session = self._sessions.get(group)
        return session.stages(self._clock.now_ms()) if session else []

    @_locked
    def stages_so_far(self, group: str) -> list[StageFigures]:
        """What each stage did within the last seven days: rows, and quantiles over all of them."""
        session = self._sessions.get(group)
        return session.stages_so_far(self._clock.now_ms()) if session else []

    @_locked
    def events(self, group: str, kinds: frozenset[str] | None, limit: int) -> list[EventRecord]:
        """The newest events of these kinds (None: of all) first, without ``progress``; 250 failures and 250 others."""
        session = self._sessions.get(group)
        return session.events(kinds, limit) if session else []

    @_locked
    def alerts(self, group: str | None) -> list[Alert]:
        """Of one session or of all: those that last, then those that ended within an hour; the newest first."""
        found = [alert for alert in self._alerts.values() if group is None or alert.group == group]
        return sorted(found, key=lambda alert: (alert.until_ms is not None, -(alert.until_ms or alert.since_ms)))

    def add_listener(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Have a function called with the group whenever something of a session changed: once per second at most.

        Returns: a function that ends it.
        """
        self._listeners.append(callback)

        def remove() -> None:
            if callback in self._listeners:
                self._listeners.remove(callback)

        return remove

    # -- feeding ----------------------------------------------------------------------------------------------

    @_locked
    def facts(self, group: str) -> Facts | None:
        """What rules look at; None for a session that nothing is known of."""
        session = self._sessions.get(group)
        return session.facts(self._clock.now_ms()) if session else None

    @_locked
    def take(self, tp: TopicPartition, offset: int, written_ms: int, value: bytes | None) -> EventRecord | None:
        """Count a record of the events topic; the event, unless it is none or was counted before."""
        event = EventRecord.decode(value)
        if event is None or session_of(event.group) is None:
            return None
        event = replace(event, written_ms=max(written_ms, 0), size=len(value or b""))
        session = self._session(event.group)
        return event if session.take(event, value or b"", str(tp), offset, self._clock.now_ms()) else None

    @_locked
    def take_control(self, tp: TopicPartition, offset: int, written_ms: int, value: bytes | None) -> EventRecord | None:
        """Note what somebody asked of a session, from the control topic; the event that this makes, if any.

        Args:
            tp, offset: where the record stands.
            written_ms: when it was written.
            value: its value; None where the session was forgotten.
        """
        record = _session_record(value)
        if record is None or session_of(record.group) is None:
            return None
        event = EventRecord(
            kind=CONTROL,
            at_ms=record.changed_ms or written_ms,
            pipeline=record.pipeline,
            session=record.session,
            group=record.group,
            worker="",
            data={"wanted": record.wanted.value, "by": record.changed_by, "reason": record.reason},
            written_ms=written_ms,
        )
        is_new = self._session(record.group).take_control(event, record.dead_letters, str(tp), offset)
        return event if is_new else None

    @_locked
    def take_letter(self, tp: TopicPartition, offset: int, written_ms: int, why: dict[str, str]) -> None:
        """Count a dead letter. ``why``: its ``session``, ``stage`` and ``type``."""
        letters = self._letters.setdefault(tp.topic, LetterBoard())
        letters.take(tp.partition, offset, written_ms or self._clock.now_ms(), why)
        self._letters.move_to_end(tp.topic)
        if len(self._letters) > MOST_LETTER_TOPICS:
            topic, _ = self._letters.popitem(last=False)
            self._unwritten.append(Change("letters", topic, None))

    @_locked
    def letter_topics(self) -> dict[str, int]:
        """Where sessions put their dead letters, as their workers said, and when those were last heard of, in ms."""
        topics: dict[str, int] = {}
        for session in self._sessions.values():
            if session.dead_letters:
                topics[session.dead_letters] = max(session.newest_ms, topics.get(session.dead_letters, 0))
        return topics

    @_locked
    def tell(self, group: str, *, lag: int | None, state: str) -> None:
        """Say what the exact figures are (``status.session_statuses``), so that lag has a history and rules know it.

        Args:
            group: the session.
            lag: rows left, in all partitions; None where nobody knows.
            state: the word that ``rowmill status`` shows.
        """
        if session_of(group) is not None:
            self._session(group).tell(lag, state, self._clock.now_ms())

    def stand(self, state: State, behind_seconds: float = 0.0, message: str = "") -> None:
        """Set the standing."""
        self.standing = Standing(state, round(behind_seconds, 3), message)

    @_locked
    def put_alert(self, alert: Alert) -> None:
        """Keep an alert, in the place of the one before of the same kind."""
        self._alerts[alert.key] = alert
        self._unwritten.append(Change("alerts", alert.key, _alert_bytes(alert)))
        if len(self._alerts) > MOST_ALERTS:
            self.drop_alert(min(self._alerts.values(), key=lambda each: each.until_ms or each.since_ms))

    @_locked
    def drop_alert(self, alert: Alert) -> None:
        """Forget one."""
        if self._alerts.pop(alert.key, None) is not None:
            self._unwritten.append(Change("alerts", alert.key, None))

    def notify(self, groups: Iterable[str]) -> None:
        """Tell the listeners. One that fails disturbs nobody."""
        for group in groups:
            for callback in list(self._listeners):
                try:
                    callback(group)
                except Exception:  # noqa: BLE001 - it is somebody else's
                    _log.exception("a listener of the console's board failed")

    def _session(self, group: str) -> SessionBoard:
        session = self._sessions.get(group)
        if session is None:
            session = self._sessions[group] = SessionBoard(group)
            self._crowd_out()
        return session

    def _crowd_out(self) -> None:
        """Forget the session that was silent for longest, where there are too many."""
        if len(self._sessions) > MOST_SESSIONS:
            newest = next(reversed(self._sessions))
            group = min(self._sessions, key=lambda name: (name == newest, self._sessions[name].newest_ms))
            self._unwritten += self._sessions.pop(group).forget()

    # -- tables -----------------------------------------------------------------------------------------------

    @_locked
    def changes(self) -> list[Change]:
        """What to write to the tables, in this order; asking takes it off the list.

        All of it but the sessions' own records comes first: a record must not say more than the windows hold.
        """
        now_ms, is_live = self._clock.now_ms(), self.standing.state == "live"
        found, self._unwritten = self._unwritten, []
        for group, session in list(self._sessions.items()):
            found += session.changes(now_ms, is_live=is_live)
            if session.has_nothing() and now_ms - session.newest_ms > _FORGET_MS:
                del self._sessions[group]
                found += session.forget()
        for topic, letters in self._letters.items():
            if letters.is_changed:
                found.append(Change("letters", topic, letters.encode(now_ms)))
        return sorted(found, key=lambda change: change.table == "sessions")

    @_locked
    def load(self, contents: Callable[[str], Iterable[tuple[str, bytes]]]) -> None:
        """Take what the tables hold, in the place of all that is known.

        Args:
            contents: the keys and values of a table, by its name. What cannot be read is left out.
        """
        told = {group: (session.lag, session.state) for group, session in self._sessions.items() if session.state}
        self._sessions, self._letters, self._alerts = OrderedDict(), OrderedDict(), {}
        self._unwritten = []
        for table in reversed(TABLES):  # sessions first
            for key, value in contents(table):
                try:
                    self._load(table, key, value)
                except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
                    _log.warning("the console's table %s: %r cannot be read and is left out: %s", table, key, error)
        for group, (lag, state) in told.items():  # which no table holds: alerts of lag would end and come back
            session = self._session(group)
            session.lag, session.state = lag, state

    def _load(self, table: str, key: str, value: bytes) -> None:
        if table == "sessions":
            if session_of(key) is not None:
                session = SessionBoard(key)
                session.load(value)
                self._sessions[key] = session
        elif table == "letters":
            self._letters[key] = LetterBoard.decode(value)
        elif table == "alerts":
            alert = Alert(*loads(value))
            self._alerts[alert.key] = alert
        else:
            group, rest = split_key(key)
            if session_of(group) is None:
                return
            session = self._session(group)
            if table == "events":
                session.load_event(rest, value)
            else:
                session.load_window(cast(Window, table), int(rest), value)


def _session_record(value: bytes | None) -> SessionRecord | None:
    try:
        return SessionRecord.decode(value) if value else None
    except CheckpointError:
        return None


def _alert_bytes(alert: Alert) -> bytes:
    fields: list[Any] = [alert.rule, alert.group, alert.subject, alert.since_ms, alert.until_ms, alert.text]
    return packed(fields)
