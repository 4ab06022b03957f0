"""What the console knows of one session: built from its events one by one, written down and read again as bytes.

The order of things makes the counts exact. A session's events are read in their order; ``positions`` says up to which
of them the cumulative figures of its workers are known, and each window says up to which it counts. Windows are
written before the session's own record, so that after a kill the record is never ahead of a window: events behind it
are read again, and each window takes those that it lacks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal

from ...state.codec import dumps, loads
from ..event_records import PROGRESS, ROW_FAILED, WORKER_STOPPED, EventRecord, plain_text
from .series import (
    MOST_STAGES,
    SPANS,
    VERSION,
    WINDOWS,
    Point,
    Positions,
    StageFigures,
    Totals,
    Window,
    WindowSum,
    increase,
    is_expired,
    latencies_of,
    money,
    packed,
    stage_figures,
    start_of,
    whole,
)

WORKER_STARTED = "worker_started"

RING_SIZE = 250
"""Events kept of each sort: failures of rows are a sort of their own, so that a flood of them hides nothing else."""
MOST_EVENT_BYTES = 4_096

_MOST_WORKERS = 1_000
_MOST_RECORD_BYTES = 800_000
_FORGET_WORKER_MS = 86_400_000
_NEW_WORKER_MS = 15_000
_LATE_MS = 20_000
_MINUTE_MS = 60_000

IDLE_STATES = frozenset({"paused", "pausing", "completed", "cancelled", "cancelling"})
"""In these a session that commits nothing does what was asked of it."""


@dataclass(slots=True)
class WorkerBoard:
    """What one worker told last."""

    totals: Totals = field(default_factory=Totals)
    seen_ms: int = 0
    state: str = ""
    breakers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Change:
    """A table's entry to be written; ``value`` None removes it."""

    table: str
    key: str
    value: bytes | None


class SessionBoard:
    """One session.

    Args:
        group: its consumer group.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self.pipeline = ""
        self.session = ""
        self.newest_ms = 0
        self.row_ms = 0
        """When rows were committed last, or the session was first heard of."""
        self.order: list[str] = []
        self.dead_letters = ""
        self.workers: dict[str, WorkerBoard] = {}
        self.budget: dict[str, str] | None = None
        self.lag: int | None = None
        self.state = ""
        """What the exact figures say of it, as last told."""
        self.waits_ms = 0
        """Since when rows are left that are to be worked on; 0 while there are none, or nobody shall."""
        self.positions: Positions = {}
        self._wish = ""
        self._lately: deque[tuple[int, int]] = deque(maxlen=10_000)
        """Dead letters of the last minute, for rules: when, and how many."""
        self._open: dict[Window, dict[int, WindowSum]] = {window: {} for window in WINDOWS}
        self._closed: dict[Window, dict[int, bytes]] = {window: {} for window in WINDOWS}
        self._points: dict[Window, dict[int, Point]] = {window: {} for window in WINDOWS}
        self._rings: dict[str, _Ring] = {"e": _Ring(), "f": _Ring()}
        self._unwritten: dict[tuple[str, str], bytes | None] = {}
        self._is_changed = False

    # -- reading events ---------------------------------------------------------------------------------------

    def take(self, event: EventRecord, value: bytes, tp: str, offset: int, now_ms: int) -> bool:
        """Count an event, unless it is counted already; tells which."""
        if offset < self.positions.get(tp, 0):
            return False
        at_ms = self._time_of(event, now_ms)
        self.newest_ms = at_ms
        self.row_ms = self.row_ms or at_ms
        self.pipeline = event.pipeline or self.pipeline
        self.session = event.session or self.session
        if event.kind != PROGRESS:
            self._note(event, value)
        if event.kind == WORKER_STARTED:
            self._started(event)
        elif event.kind in {PROGRESS, WORKER_STOPPED}:
            self._count(event, at_ms, tp, offset)
        elif event.kind == ROW_FAILED:
            kind = event.data.get("type")
            for window in self._lacking(at_ms, tp, offset):
                window.add_failure(event.subject[:100], kind[:100] if isinstance(kind, str) else "", at_ms)
        elif event.kind.startswith("breaker_") and event.worker in self.workers:
            self.workers[event.worker].breakers[event.subject] = event.kind.removeprefix("breaker_")
        self.positions[tp] = offset + 1
        self._is_changed = True
        return True

    def take_control(self, event: EventRecord, dead_letters: str, tp: str, offset: int) -> bool:
        """Note what somebody asked for, unless that is noted already; tells which.

        A record is written again whenever a worker starts or fails: only another wish is news.
        """
        if offset < self.positions.get(tp, 0):
            return False
        self.positions[tp] = offset + 1
        self.pipeline, self.session = event.pipeline or self.pipeline, event.session or self.session
        self.dead_letters = dead_letters or self.dead_letters
        self._is_changed = True
        wish = f"{event.data['wanted']}/{event.at_ms}"
        if wish == self._wish:
            return False
        self._wish = wish
        self._note(event, event.encode())
        return True

    def _time_of(self, event: EventRecord, now_ms: int) -> int:
        """Never back: a window that was left takes nothing any more, whichever way an event is read again."""
        at_ms = event.written_ms or event.at_ms
        return max(at_ms if at_ms <= now_ms + _MINUTE_MS else now_ms, self.newest_ms)

    def _started(self, event: EventRecord) -> None:
        self.workers[event.worker] = WorkerBoard(seen_ms=self.newest_ms)
        stages = event.data.get("stages")
        if isinstance(stages, list):
            self.order = [name for name in stages if isinstance(name, str)][:MOST_STAGES]
        topic = event.data.get("dead_letters")
        self.dead_letters = topic if isinstance(topic, str) else self.dead_letters

    def _count(self, event: EventRecord, at_ms: int, tp: str, offset: int) -> None:
        told = Totals.of(event.data)
        worker = self.workers.get(event.worker)
        if worker is None:
            worker = self.workers[event.worker] = WorkerBoard(_baseline(event, told))
        added, worker.totals = increase(worker.totals, told)
        latencies = latencies_of(event.data)
        for window in self._lacking(at_ms, tp, offset):
            window.add(added, latencies)
        if added.rows:
            self.row_ms = at_ms
        if added.dead_letters:
            self._lately.append((at_ms, added.dead_letters))
        if event.kind == WORKER_STOPPED:
            del self.workers[event.worker]
            return
        worker.seen_ms = at_ms
        worker.state = str(event.data.get("state", ""))[:20]
        breakers = event.data.get("breakers")
        if isinstance(breakers, dict):
            worker.breakers = {str(name): str(state) for name, state in list(breakers.items())[:100]}
        budget = event.data.get("budget")
        if isinstance(budget, dict):
            self.budget = {name: str(money(budget.get(name))) for name in ("limit", "spent")}
        self._forget_workers()

    def _forget_workers(self) -> None:
        oldest = next(iter(self.workers))
        if self.newest_ms - self.workers[oldest].seen_ms > _FORGET_WORKER_MS or len(self.workers) > _MOST_WORKERS:
            del self.workers[oldest]

    def _lacking(self, at_ms: int, tp: str, offset: int) -> Iterator[WindowSum]:
        """The windows of this moment that have not counted this record."""
        for window in WINDOWS:
            found = self._window(window, start_of(window, at_ms))
            if not found.has_counted(tp, offset):
                yield found
                found.positions[tp] = offset + 1

    def _window(self, window: Window, start_ms: int) -> WindowSum:
        found = self._open[window].get(start_ms)
        if found is None:
            closed = self._closed[window].pop(start_ms, None)
            self._points[window].pop(start_ms, None)
            found = (WindowSum.decode(closed) if closed is not None else None) or WindowSum(start_ms, lag=self.lag)
            self._open[window][start_ms] = found
        return found

    def _note(self, event: EventRecord, value: bytes) -> None:
        name = "f" if event.kind == ROW_FAILED else "e"
        if len(value) > MOST_EVENT_BYTES:
            value = packed({**event.to_dict(), "data": {"message": plain_text(event.data.get("message", ""))[:2_000]}})
        slot = self._rings[name].add(event.written_ms, value)
        self._unwritten["events", f"{self.group}/{name}{slot}"] = dumps([self._rings[name].count, event.written_ms]) + (
            b"\n" + value
        )

    # -- what others tell -------------------------------------------------------------------------------------

    def tell(self, lag: int | None, state: str, now_ms: int) -> None:
        """The exact figures: lag belongs to the windows of this moment."""
        self.lag, self.state = lag, state
        if lag is not None:
            self.waits_ms = 0 if not lag or state in IDLE_STATES else self.waits_ms or now_ms
        if lag is None or not (lag or self.workers):
            return
        for window in WINDOWS:
            found = self._window(window, start_of(window, now_ms))
            if found.lag != lag or found.start_ms > self.newest_ms:
                found.lag = lag
                self._is_changed = True

    # -- writing and reading tables ---------------------------------------------------------------------------

    def changes(self, now_ms: int, *, is_live: bool) -> list[Change]:
        """What has changed since this was asked, in the order in which it must be written.

        ``is_live``: whether all events up to about now are read, so that a window ends with the clock and not only
        with an event that lies behind it.
        """
        changes = [change for window in WINDOWS for change in self._expired(window, now_ms)]
        settled_ms = max(self.newest_ms, now_ms - _LATE_MS) if is_live else self.newest_ms
        if self._is_changed or any(
            start_of(window, settled_ms) > start for window in WINDOWS for start in self._open[window]
        ):
            changes += [change for window in WINDOWS for change in self._windows(window, settled_ms)]
            changes += [Change(table, key, value) for (table, key), value in self._unwritten.items()]
            changes.append(Change("sessions", self.group, self._encode()))
            self._unwritten.clear()
            self._is_changed = False
        return changes

    def _windows(self, window: Window, settled_ms: int) -> Iterator[Change]:
        for start_ms, found in sorted(self._open[window].items()):
            is_over = start_ms < start_of(window, settled_ms)
            value = found.encode(with_bins=not is_over or window == "10s")
            if is_over:
                del self._open[window][start_ms]
                self._closed[window][start_ms] = value
            yield Change(window, window_key(self.group, start_ms), value)

    def _expired(self, window: Window, now_ms: int) -> Iterator[Change]:
        closed = self._closed[window]
        for start_ms in [start_ms for start_ms in closed if is_expired(window, start_ms, now_ms)]:
            del closed[start_ms]
            self._points[window].pop(start_ms, None)
            yield Change(window, window_key(self.group, start_ms), None)

    def forget(self) -> list[Change]:
        """Everything of it, removed from all tables."""
        changes = [
            Change(window, window_key(self.group, start_ms), None)
            for window in WINDOWS
            for start_ms in (*self._closed[window], *self._open[window])
        ]
        changes += [Change("events", f"{self.group}/{name}{n}", None) for name in self._rings for n in range(RING_SIZE)]
        return [*changes, Change("sessions", self.group, None)]

    def has_nothing(self) -> bool:
        """Whether all of it has expired."""
        return not any(self._closed[window] or self._open[window] for window in WINDOWS)

    def _encode(self) -> bytes:
        """The session's own record; of too many workers those that were silent for longest are left out."""
        while len(value := self._encoded()) > _MOST_RECORD_BYTES and self.workers:
            silent = sorted(self.workers, key=lambda name: self.workers[name].seen_ms)
            for name in silent[: len(silent) // 4 + 1]:
                del self.workers[name]
        return value

    def _encoded(self) -> bytes:
        return packed(
            {
                "v": VERSION,
                "pipeline": self.pipeline,
                "session": self.session,
                "newest_ms": self.newest_ms,
                "row_ms": self.row_ms,
                "waits_ms": self.waits_ms,
                "order": self.order,
                "dead_letters": self.dead_letters,
                "budget": self.budget,
                "positions": self.positions,
                "wish": self._wish,
                "rings": {name: ring.count for name, ring in self._rings.items()},
                "workers": {
                    name: [worker.totals.to_json(), worker.seen_ms, worker.state, worker.breakers]
                    for name, worker in self.workers.items()
                },
            }
        )

    def load(self, value: bytes) -> None:
        """The session's own record, as it was written."""
        content = loads(value)
        if content["v"] != VERSION:
            raise ValueError(f"version {content['v']} of the console's tables, this one reads {VERSION}")
        self.pipeline, self.session = content["pipeline"], content["session"]
        self.newest_ms, self.row_ms = content["newest_ms"], content["row_ms"]
        self.waits_ms = content.get("waits_ms", 0)
        self.order, self.dead_letters = content["order"], content["dead_letters"]
        self.budget, self.positions = content["budget"], content["positions"]
        self._wish = content["wish"]
        for name, count in content["rings"].items():
            self._rings[name].count = count
        self.workers = {
            name: WorkerBoard(Totals.from_json(totals), seen_ms, state, breakers)
            for name, (totals, seen_ms, state, breakers) in content["workers"].items()
        }

    def load_window(self, window: Window, start_ms: int, value: bytes) -> None:
        """A window, as it was written."""
        self._closed[window][start_ms] = value

    def load_event(self, slot: str, value: bytes) -> None:
        """An event, as it was written. Those beyond the session's record are read again."""
        ring = self._rings[slot[0]]
        head, _, event = value.partition(b"\n")
        number, written_ms = loads(head)
        if number <= ring.count:
            ring.put(number, written_ms, event)

    # -- what is shown ----------------------------------------------------------------------------------------

    def points(self, window: Window, since_ms: int, until_ms: int) -> list[Point]:
        """Those windows that overlap this time."""
        first_ms = start_of(window, since_ms)
        closed, points, running = self._closed[window], self._points[window], self._open[window]
        found = []
        for start_ms in sorted({*closed, *running}):
            if not first_ms <= start_ms < until_ms:
                continue
            if start_ms in running:
                found.append(Point.of(running[start_ms]))
                continue
            point = points.get(start_ms)
            if point is None:
                decoded = WindowSum.decode(closed[start_ms])
                if decoded is None:
                    continue
                point = points[start_ms] = Point.of(decoded)
            found.append(point)
        return found

    def sums(self, window: Window, since_ms: int) -> Iterator[WindowSum]:
        """The windows since then, with all that they hold. For reading only."""
        first_ms = start_of(window, since_ms)
        for start_ms, value in list(self._closed[window].items()):
            if start_ms >= first_ms and (found := WindowSum.decode(value)) is not None:
                yield found
        yield from (found for start_ms, found in self._open[window].items() if start_ms >= first_ms)

    def stages(self, now_ms: int) -> list[StageFigures]:
        """What the stages did within the last minute."""
        windows = list(self.sums("10s", now_ms - _MINUTE_MS))
        known = [name for window in windows for name in window.stages]
        names = dict.fromkeys([*self.order, *known])
        covered = [now_ms - min(window.start_ms for window in windows)] if windows else [_MINUTE_MS]
        seconds = min(max(covered[0], SPANS["10s"].length_ms), _MINUTE_MS + SPANS["10s"].length_ms) / 1000
        return stage_figures(names, windows, seconds)

    def stages_so_far(self, now_ms: int) -> list[StageFigures]:
        """What they did as far back as there are windows."""
        return stage_figures(self.order, self.sums("1h", now_ms - SPANS["1h"].kept_ms), 0)

    def facts(self, now_ms: int) -> Facts:
        """What rules look at."""
        while self._lately and self._lately[0][0] <= now_ms - _MINUTE_MS:
            self._lately.popleft()
        # A session that had nothing to do, or was paused, is not late with the rows that came to it just now.
        idle_ms = now_ms - max(self.row_ms or now_ms, self.waits_ms)
        return Facts(
            self.lag,
            self.state,
            max(0, idle_ms) / 1000,
            self.budget_fraction(),
            self.open_breakers(now_ms),
            sum(count for _, count in self._lately),
        )

    def events(self, kinds: frozenset[str] | None, limit: int) -> list[EventRecord]:
        """The newest first."""
        found = sorted((entry for ring in self._rings.values() for entry in ring.entries()), reverse=True)
        events = []
        for _, _, value, written_ms in found:
            event = EventRecord.decode(value)
            if event is not None and (kinds is None or event.kind in kinds):
                events.append(replace(event, written_ms=written_ms, size=len(value)))
                if len(events) >= limit:
                    break
        return events

    def open_breakers(self, now_ms: int) -> dict[str, str]:
        """The resources whose breaker is open in some worker that was heard of within a minute, and in which."""
        return {
            resource: name
            for name, worker in self.workers.items()
            if now_ms - worker.seen_ms < _MINUTE_MS
            for resource, state in worker.breakers.items()
            if state == "open"
        }

    def budget_fraction(self) -> Decimal | None:
        """How much of the budget is spent; None without one."""
        if self.budget is None or not Decimal(self.budget["limit"]):
            return None
        return Decimal(self.budget["spent"]) / Decimal(self.budget["limit"])


class _Ring:
    """The newest events of one sort, by number."""

    def __init__(self) -> None:
        self.count = 0
        self._slots: dict[int, tuple[int, int, bytes]] = {}

    def add(self, written_ms: int, value: bytes) -> int:
        self.count += 1
        return self.put(self.count, written_ms, value)

    def put(self, number: int, written_ms: int, value: bytes) -> int:
        slot = number % RING_SIZE
        self._slots[slot] = (number, written_ms, value)
        return slot

    def entries(self) -> Iterator[tuple[int, int, bytes, int]]:
        """To be sorted by time, then by number."""
        return ((written_ms, number, value, written_ms) for number, written_ms, value in self._slots.values())


def _baseline(event: EventRecord, told: Totals) -> Totals:
    """What a worker had told before it was first heard of: nothing if it is new, else all that it tells now."""
    started_ms = whole(event.data.get("started_ms"))
    return Totals() if started_ms and event.at_ms - started_ms <= _NEW_WORKER_MS else told


def window_key(group: str, start_ms: int) -> str:
    """A window's key in its table."""
    return f"{group}/{start_ms}"


def split_key(key: str) -> tuple[str, str]:
    """The group, and what follows it. No group has a slash."""
    group, _, rest = key.rpartition("/")
    return group, rest


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules look at.

    Attributes:
        lag: rows left; None where nobody told.
        state: the word that ``rowmill status`` shows; "" where nobody told.
        idle_seconds: since rows were committed last, or there were any to be worked on.
        budget: the fraction of it that is spent; None without one.
        breakers: those that are open, and a worker in which they are.
        dead_letters: within the last minute.
    """

    lag: int | None
    state: str
    idle_seconds: float
    budget: Decimal | None
    breakers: Mapping[str, str]
    dead_letters: int
