"""What a worker tells of itself at a moment: for events, metrics, health and whoever watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ..state.model import TopicPartition
from ..state.sketch import Sketch

WorkerState: TypeAlias = "Literal['starting', 'running', 'pausing', 'paused', 'stopping', 'stopped']"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSnapshot:
    """One partition that a worker owns.

    Attributes:
        tp: which.
        state: ``opening`` (fencing, restoring), ``running`` or ``paused``.
        committed: the committed low watermark; None while it opens.
        position: the offset that is read next.
        buffered: rows taken and not yet committed.
        in_flight: rows in work.
        oldest_offset: the lowest offset in work; None if there is none.
        oldest_seconds: how long that row has been in work.
        full: what keeps further rows from beginning, though they are there: ``map`` (the offset map holds no more rows
            behind the oldest one), ``rows`` or ``bytes`` (the worker has as many in work as it may); "": nothing.
        counts: rows, results, dropped, skipped, defaulted, dead_letters, emitted: exact, since the session's beginning.
    """

    tp: TopicPartition
    state: Literal["opening", "running", "paused"]
    committed: int | None = None
    position: int | None = None
    buffered: int = 0
    in_flight: int = 0
    oldest_offset: int | None = None
    oldest_seconds: float | None = None
    full: Literal["", "map", "rows", "bytes"] = ""
    counts: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON. Not by ``asdict``: that costs milliseconds with many partitions, on the event loop."""
        place = {"topic": self.tp.topic, "partition": self.tp.partition}
        return place | {name: getattr(self, name) for name in _PARTITION_FIELDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One worker.

    Attributes:
        worker: its name; every start has a new one.
        state: what it does.
        at_ms: when this was taken.
        started_ms: when it started.
        totals: what it committed since it started: rows, rebuilt, results, dropped, skipped, defaulted, dead_letters,
            emitted, transactions, tokens (int), and cost (text).
        in_flight: rows in work, in all partitions.
        in_flight_bytes: their values' bytes.
        commit_seconds: how long its last commit took; None before the first one.
        partitions: those it owns.
        stages: by name, in the chain's order: counts and times (see StageCounts).
        latency: by name, how long calls took: a sample of those lately.
        breakers: ``closed``, ``open`` or ``half_open`` by resource.
        budget: ``limit``, ``spent``, ``held`` as text; None without a budget.
        events_dropped: events that were too many for ``rowmill.events``, since it started.
        observer_errors: how often an observer failed, since it started.
    """

    worker: str
    state: WorkerState
    at_ms: int
    started_ms: int
    totals: Mapping[str, int | str]
    in_flight: int = 0
    in_flight_bytes: int = 0
    commit_seconds: float | None = None
    partitions: tuple[PartitionSnapshot, ...] = ()
    stages: Mapping[str, Mapping[str, Any]]
    breakers: Mapping[str, str]
    budget: Mapping[str, str] | None = None
    latency: Mapping[str, Sketch] = field(default_factory=dict)
    events_dropped: int = 0
    observer_errors: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON; without ``worker`` and ``at_ms``, which every event has anyway."""
        fields = {name: getattr(self, name) for name in _WORKER_FIELDS}
        latency = {name: sketch.to_dict() for name, sketch in self.latency.items() if sketch.count}
        return fields | {"partitions": [each.to_dict() for each in self.partitions], "latency": latency}


_PARTITION_FIELDS = [name for name in PartitionSnapshot.__dataclass_fields__ if name != "tp"]
_WORKER_FIELDS = [name for name in WorkerSnapshot.__dataclass_fields__ if name not in {"worker", "at_ms"}]
