"""The context of a session: how far it is, what it cost, what failed; and how that is written into a checkpoint.

One context belongs to one partition of a session and is committed with its offsets; :meth:`ExecutionContext.merge`
makes the session's view of them. The names, the defaults and the twelve keys of a checkpoint are those of ondine 2.1,
whose checkpoints load here.
"""

from __future__ import annotations

import decimal
import logging
import operator
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Protocol
from uuid import UUID, uuid4, uuid5

from .errors import CheckpointError, ConfigError
from .model import RESERVED_PREFIX
from .stats import ProcessingStats

log = logging.getLogger(__name__)

PROCESSED_KEY = RESERVED_PREFIX + "processed_rows"
"""Where ``processed_rows`` travels: a key inside a checkpoint's ``intermediate_data``."""
DROPPED_KEY = RESERVED_PREFIX + "dropped_rows"
DEFAULTED_KEY = RESERVED_PREFIX + "defaulted_rows"
_OWN_KEYS = (PROCESSED_KEY, DROPPED_KEY, DEFAULTED_KEY)

_NAMESPACE = UUID("3b760896-2f20-4344-b435-29c75f6cadcc")  # drawn once; another one would give every session a new id
_UNCOUNTED = -1
_PLACES = 40  # so that sums of amounts that were let in always fit in the 200 digits below
# Decimal's everyday context rounds to 28 digits without a word. Sums of money here are exact or refused.
_EXACT = decimal.Context(prec=200, traps=[decimal.Inexact, decimal.InvalidOperation])


def session_uuid(name: str) -> UUID:
    """The ``session_id`` of a session, the same in every process: ``session_uuid("rowmill.p")`` for a group's name.

    Give the group's name, not the session's id: every pipeline has a session called ``live``.
    """
    return uuid5(_NAMESPACE, f"session/{name}")


def pipeline_uuid(name: str) -> UUID:
    """The ``pipeline_id`` of a pipeline, the same in every process; never equal to a session's id."""
    return uuid5(_NAMESPACE, f"pipeline/{name}")


def checked_cost(cost: Any, setting: str = "add_cost(cost=)") -> Decimal:
    """A cost as a Decimal: the one gate that money passes, so that no float reaches a cost.

    Args:
        cost: a Decimal, an int, or a number as text.
        setting: the argument's name as the caller wrote it, for the message.

    Raises:
        ConfigError: it is a float, negative or no finite number.
    """
    if isinstance(cost, float):
        raise ConfigError(setting, cost, f"give Decimal({str(cost)!r}): a float has lost the exact amount already")
    if isinstance(cost, bool) or not isinstance(cost, (Decimal, int, str)):
        raise ConfigError(setting, cost, "give a Decimal, an int, or a number as text")
    try:
        amount = Decimal(cost)
    except decimal.InvalidOperation:
        raise ConfigError(setting, cost, "this is no number; give one such as '0.25'") from None
    if not amount.is_finite() or amount < 0:
        raise ConfigError(setting, cost, "give a finite amount of at least 0")
    if amount and (amount.adjusted() > _PLACES or int(amount.as_tuple().exponent) < -2 * _PLACES):
        raise ConfigError(setting, cost, f"give at most {_PLACES} digits before and {2 * _PLACES} behind the point")
    return amount


def sum_costs(*amounts: Decimal) -> Decimal:
    """The exact sum, where ``+`` rounds to 28 digits.

    Raises:
        ConfigError: the sum has more than 200 digits: one of the amounts is no money.
    """
    total = Decimal(0)
    for amount in amounts:
        try:
            total = _EXACT.add(total, amount)
        except decimal.Inexact:
            remedy = f"give one that makes at most {_EXACT.prec} digits together with {total}"
            raise ConfigError("cost", amount, remedy) from None
    return total


class ProgressObserver(Protocol):
    """Who wants to hear of progress. Called in the thread that makes the progress, so it should be quick.

    An ExecutionObserver is one as well; whoever hears of more than progress is told by an ObserverDispatcher.
    """

    def on_progress_update(self, context: ExecutionContext, /) -> object:
        """Look at the context. What it returns is not used; what it raises is logged once and counted."""
        ...


class ProgressDispatcher(Protocol):
    """Who takes news of progress to observers on other threads: an ObserverDispatcher."""

    def progress(self, context: ExecutionContext, /) -> object:
        """Pass the context on, as it is now, without waiting for anybody."""
        ...


def _now() -> datetime:
    return datetime.now(UTC)


def _new_id() -> str:
    return str(uuid4())


@dataclass
class ExecutionContext:
    """Progress, cost and failures of one partition of a session, or of a whole session once merged.

    Belongs to one thread. For accounts of cost by stage see CostTracker; here are only the totals that are committed.

    Two contexts are equal when their checkpoints are. What only a process knows (observers, names, trace and span
    ids) is neither compared nor stored.

    Time: moments are in UTC. One without a time zone is taken for this machine's local time, since that is what
    ``datetime.now()``, and so ondine, wrote; load such a checkpoint under the TZ it was written under. Hand in
    ``start_time`` and ``get_stats(now=)`` to be independent of the machine's clock.

    Rows: each row that is done is in exactly one of ``processed_rows``, ``failed_rows``, ``skipped_rows`` and
    ``dropped_rows``; their sum is ``completed_rows``. Count by adding to them, or with :meth:`update_row` where rows
    come in order.
    ``last_processed_row`` is only a position; its default, 0, cannot tell "no row" from "the first row", which is why
    it is not what progress is computed from. Without ``processed_rows``, in a call as in a checkpoint, the count is
    taken from ``last_processed_row``: 0 is no row, n > 0 are n + 1 rows, less the failed and skipped ones.

    Attributes:
        session_id: the session; see :func:`session_uuid`.
        pipeline_id: the pipeline; see :func:`pipeline_uuid`.
        start_time: when the session began, earlier attempts included.
        end_time: when it was over; None while it goes on.
        current_stage_index: 0 for the first stage.
        last_processed_row: 0-based position of the row done last.
        total_rows: rows to do; 0 when that is unknown.
        accumulated_cost: money, exact.
        accumulated_tokens: tokens.
        intermediate_data: anything JSON that should survive a restart; keys that begin with ``rowmill.`` are taken.
        failed_rows: rows that became dead letters.
        skipped_rows: rows that failed in a stage that says ``on_error="skip"``.
        observers: told by :meth:`notify_progress`, in this order, in its caller's thread.
        observer_dispatcher: told by :meth:`notify_progress` as well; it tells its own observers on their threads.
        trace_id, span_id: for logs and traces; new ones in every process.
        processed_rows: rows that gave at least one result.
        dropped_rows: rows for which a handler gave no result, on purpose.
        defaulted_rows: of the processed ones, those in which a fallback took a failed stage's place.
        pipeline_name, session_name, worker_name: what people call them, for logs; "" where nobody said.
        observer_errors: how often an observer raised.

    Raises:
        ConfigError: ``accumulated_cost`` is a float, negative or no number.
    """

    session_id: UUID = field(default_factory=uuid4)
    pipeline_id: UUID = field(default_factory=uuid4)
    start_time: datetime = field(default_factory=_now)
    end_time: datetime | None = None
    current_stage_index: int = 0
    last_processed_row: int = 0
    total_rows: int = 0
    accumulated_cost: Decimal = Decimal("0.0")
    accumulated_tokens: int = 0
    intermediate_data: dict[str, Any] = field(default_factory=dict)
    failed_rows: int = 0
    skipped_rows: int = 0
    observers: list[ProgressObserver] = field(default_factory=list, repr=False, compare=False)
    observer_dispatcher: ProgressDispatcher | None = field(default=None, repr=False, compare=False)
    trace_id: str = field(default_factory=_new_id, compare=False)
    span_id: str = field(default_factory=_new_id, compare=False)
    processed_rows: int = _UNCOUNTED
    dropped_rows: int = 0
    defaulted_rows: int = 0
    pipeline_name: str = field(default="", compare=False)
    session_name: str = field(default="", compare=False)
    worker_name: str = field(default="", compare=False)
    observer_errors: int = field(default=0, init=False, repr=False, compare=False)
    _blamed: list[object] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.start_time = _utc(self.start_time)
        self.end_time = None if self.end_time is None else _utc(self.end_time)
        self.accumulated_cost = checked_cost(self.accumulated_cost, "ExecutionContext(accumulated_cost=)")
        if self.processed_rows == _UNCOUNTED:
            self.processed_rows = _implied(
                self.last_processed_row, self.failed_rows, self.skipped_rows + self.dropped_rows
            )

    @property
    def completed_rows(self) -> int:
        """Rows that are done, whatever became of them."""
        return self.processed_rows + self.failed_rows + self.skipped_rows + self.dropped_rows

    def update_stage(self, stage_index: int) -> None:
        """The stage that runs now, 0 for the first.

        Raises:
            ConfigError: the index is no integer of at least 0.
        """
        self.current_stage_index = _whole("update_stage(stage_index=)", stage_index)

    def update_row(self, row_index: int) -> None:
        """The row at this 0-based position is done, and so are all before it: for rows that come in order.

        Those of them that are in none of the counts yet are counted as processed, so count a failed or skipped
        row before its ``update_row``. An index that moves back moves the position only. Where rows complete out of
        order, or positions are offsets, add to the counts and set ``last_processed_row`` instead.

        Raises:
            ConfigError: the index is no integer of at least -1, which means that no row is done.
        """
        self.last_processed_row = _whole("update_row(row_index=)", row_index, least=-1)
        self.processed_rows += max(0, self.last_processed_row + 1 - self.completed_rows)

    def add_cost(self, cost: Decimal, tokens: int) -> None:
        """Add what a call cost. All or nothing: if one of the two is refused, neither is added.

        Raises:
            ConfigError: the cost is a float, negative or not a finite number; the tokens are negative or no integer.
        """
        amount = checked_cost(cost)
        number = _whole("add_cost(tokens=)", tokens)
        self.accumulated_cost = sum_costs(self.accumulated_cost, amount)
        self.accumulated_tokens += number

    def notify_progress(self) -> None:
        """Tell every observer, and the dispatcher. One that raises harms neither the others nor the caller."""
        for observer in list(self.observers):
            try:
                observer.on_progress_update(self)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the rows
                self._blame(observer, error)
        if self.observer_dispatcher is not None:
            try:
                self.observer_dispatcher.progress(self)
            except Exception as error:  # noqa: BLE001 - it may be anybody's
                self._blame(self.observer_dispatcher, error)

    def _blame(self, observer: object, error: Exception) -> None:
        self.observer_errors += 1
        if any(known is observer for known in self._blamed):
            return
        self._blamed.append(observer)
        name = type(observer).__qualname__
        log.warning("the observer %s failed; its next failures are only counted", name, exc_info=error)

    def get_progress(self) -> float:
        """Percent of the rows that are done: 0.0 while the total is unknown, 100.0 exactly when all are, never more."""
        if self.total_rows <= 0:
            return 0.0
        # Multiplied first: 100 * n / n is 100.0 for every n.
        return min(100.0, 100 * self.completed_rows / self.total_rows)

    def get_stats(self, now: datetime | None = None) -> ProcessingStats:
        """Counts, and the speed from ``start_time`` to ``end_time``, or to ``now`` while the session goes on.

        The speed is that of all rows done, as in a bounded run's metrics. ``results`` is None: rows are counted here.
        """
        until = self.end_time or now or _now()
        seconds = max(0.0, (_utc(until) - _utc(self.start_time)).total_seconds())
        return ProcessingStats(
            total_rows=self.total_rows,
            processed_rows=self.processed_rows,
            failed_rows=self.failed_rows,
            skipped_rows=self.skipped_rows,
            dropped_rows=self.dropped_rows,
            defaulted_rows=self.defaulted_rows,
            rows_per_second=self.completed_rows / seconds if seconds else 0.0,
            total_duration_seconds=seconds,
        )

    def to_checkpoint(self) -> dict[str, Any]:
        """The twelve keys that ondine's checkpoints have: ids and money as text, moments in ISO 8601.

        ``processed_rows`` is not among them. Where it is not what :class:`ExecutionContext` would take from
        ``last_processed_row`` anyway, it lies inside ``intermediate_data`` under ``rowmill.processed_rows``, so that
        nothing is lost, ondine can still read the checkpoint, and an old one means what it meant. The result is a
        copy: it stays as it is while the context goes on.

        Raises:
            ConfigError: ``intermediate_data`` has that key already.
        """
        for key in _OWN_KEYS:
            if key in self.intermediate_data:
                raise ConfigError("intermediate_data", key, f"keys with {RESERVED_PREFIX!r} are rowmill's own")
        data = deepcopy(self.intermediate_data)
        for key, count in ((DROPPED_KEY, self.dropped_rows), (DEFAULTED_KEY, self.defaulted_rows)):
            if count:
                data[key] = count
        if self.processed_rows != _implied(
            self.last_processed_row, self.failed_rows, self.skipped_rows + self.dropped_rows
        ):
            data[PROCESSED_KEY] = self.processed_rows
        return {
            "session_id": str(self.session_id),
            "pipeline_id": str(self.pipeline_id),
            "start_time": _utc(self.start_time).isoformat(),
            "end_time": None if self.end_time is None else _utc(self.end_time).isoformat(),
            "current_stage_index": self.current_stage_index,
            "last_processed_row": self.last_processed_row,
            "total_rows": self.total_rows,
            "accumulated_cost": str(self.accumulated_cost),
            "accumulated_tokens": self.accumulated_tokens,
            "intermediate_data": data,
            "failed_rows": self.failed_rows,
            "skipped_rows": self.skipped_rows,
        }

    @classmethod
    def from_checkpoint(cls, data: Mapping[str, Any]) -> ExecutionContext:
        """The context that a checkpoint holds, ondine's included. The counterpart of :meth:`to_checkpoint`.

        ``end_time``, ``intermediate_data``, ``failed_rows`` and ``skipped_rows`` may be absent; keys that nobody
        knows are left out.

        Raises:
            CheckpointError: it is no mapping, or a key is missing or holds something else than it should.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(f"a context's checkpoint is a JSON object; found {_shown(data)}")
        intermediate = deepcopy(_read_object(data, "intermediate_data"))
        processed = _read_count(intermediate, PROCESSED_KEY, _UNCOUNTED)
        dropped = _read_count(intermediate, DROPPED_KEY, 0)
        defaulted = _read_count(intermediate, DEFAULTED_KEY, 0)
        for key in _OWN_KEYS:
            intermediate.pop(key, None)
        return cls(
            session_id=_read_uuid(data, "session_id"),
            pipeline_id=_read_uuid(data, "pipeline_id"),
            start_time=_read_moment(data, "start_time"),
            end_time=None if data.get("end_time") is None else _read_moment(data, "end_time"),
            current_stage_index=_read_count(data, "current_stage_index"),
            last_processed_row=_read_count(data, "last_processed_row", least=-1),
            total_rows=_read_count(data, "total_rows"),
            accumulated_cost=_read_cost(data, "accumulated_cost"),
            accumulated_tokens=_read_count(data, "accumulated_tokens"),
            intermediate_data=intermediate,
            failed_rows=_read_count(data, "failed_rows", 0),
            skipped_rows=_read_count(data, "skipped_rows", 0),
            processed_rows=processed,
            dropped_rows=dropped,
            defaulted_rows=defaulted,
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_checkpoint`."""
        return self.to_checkpoint()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExecutionContext:
        """The same as :meth:`from_checkpoint`."""
        return cls.from_checkpoint(data)

    @classmethod
    def merge(cls, contexts: Iterable[ExecutionContext]) -> ExecutionContext:
        """One view of a session from the contexts of its partitions. Merging merged ones gives the same.

        Rows, cost, tokens and ``observer_errors`` are summed up. It began when the first one did, and is over, when
        the last one is, once all are. ``current_stage_index`` is the stage that all have reached,
        ``last_processed_row`` the furthest position, the pipeline, the trace and the names those of the first context.
        ``intermediate_data`` and observers stay with the partitions: the view is for looking, not to go on from.

        Raises:
            ConfigError: there are none, or they are of different sessions.
        """
        parts = list(contexts)
        if not parts:
            raise ConfigError("merge(contexts=)", parts, "give at least one context: no context, no session")
        first = parts[0]
        for part in parts:
            if part.session_id != first.session_id:
                raise ConfigError(
                    "merge(contexts=)", part.session_id, f"give contexts of one session: {first.session_id}"
                )
        ends = [_utc(part.end_time) for part in parts if part.end_time is not None]
        merged = cls(
            session_id=first.session_id,
            pipeline_id=first.pipeline_id,
            start_time=min(_utc(part.start_time) for part in parts),
            end_time=max(ends) if len(ends) == len(parts) else None,
            current_stage_index=min(part.current_stage_index for part in parts),
            last_processed_row=max(part.last_processed_row for part in parts),
            total_rows=sum(part.total_rows for part in parts),
            accumulated_cost=sum_costs(*(part.accumulated_cost for part in parts)),
            accumulated_tokens=sum(part.accumulated_tokens for part in parts),
            failed_rows=sum(part.failed_rows for part in parts),
            skipped_rows=sum(part.skipped_rows for part in parts),
            dropped_rows=sum(part.dropped_rows for part in parts),
            defaulted_rows=sum(part.defaulted_rows for part in parts),
            trace_id=first.trace_id,
            span_id=first.span_id,
            processed_rows=sum(part.processed_rows for part in parts),
            pipeline_name=first.pipeline_name,
            session_name=first.session_name,
            worker_name=first.worker_name,
        )
        merged.observer_errors = sum(part.observer_errors for part in parts)
        return merged


def _implied(last_processed_row: int, failed_rows: int, skipped_rows: int) -> int:
    """The processed rows of a context that does not say how many they are."""
    done = last_processed_row + 1 if last_processed_row > 0 else 0
    return max(0, done - failed_rows - skipped_rows)


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


def _whole(setting: str, value: Any, *, least: int = 0) -> int:
    """An integer, numpy's included: as Python's own it can be written as JSON."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ConfigError(setting, value, f"give an integer of at least {least}")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _unfit(key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"the context's checkpoint: {key!r} is {_shown(value)}; expected {expected}")


def _present(data: Mapping[str, Any], key: str, expected: str) -> Any:
    if key not in data:
        found = _shown(sorted(map(str, data)))
        raise CheckpointError(f"the context's checkpoint lacks {key!r}; expected {expected}; found the keys {found}")
    return data[key]


def _read_text(data: Mapping[str, Any], key: str, expected: str) -> str:
    value = _present(data, key, expected)
    if not isinstance(value, str):
        raise _unfit(key, value, expected)
    return value


def _read_uuid(data: Mapping[str, Any], key: str) -> UUID:
    text = _read_text(data, key, "a UUID as text")
    try:
        return UUID(text)
    except ValueError:
        raise _unfit(key, text, "a UUID as text") from None


def _read_moment(data: Mapping[str, Any], key: str) -> datetime:
    expected = "a moment in ISO 8601, such as '2026-01-31T12:00:00+00:00'"
    text = _read_text(data, key, expected)
    try:
        return _utc(datetime.fromisoformat(text))
    except (ValueError, OverflowError, OSError):  # the latter two: a moment at the edge of the calendar
        raise _unfit(key, text, expected) from None


def _read_cost(data: Mapping[str, Any], key: str) -> Decimal:
    expected = "a finite decimal number of at least 0 as text, such as '0.25'"
    text = _read_text(data, key, expected)
    try:
        return checked_cost(text, key)
    except ConfigError:
        raise _unfit(key, text, expected) from None


def _read_count(data: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 0) -> int:
    expected = f"an integer of at least {least}"
    if default is not None and key not in data:
        return default
    value = _present(data, key, expected)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _unfit(key, value, expected)
    return value


def _read_object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise _unfit(key, value, "a JSON object")
    return value
