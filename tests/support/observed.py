"""A worker as those see it who only look: its snapshot can be set by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from rowmill import Pipeline, Session
from rowmill.state.model import TopicPartition
from rowmill.state.sketch import Sketch
from rowmill.streams.snapshots import PartitionSnapshot, WorkerSnapshot


def partition(
    number: int, state: Literal["opening", "running", "paused"] = "running", **fields: Any
) -> PartitionSnapshot:
    """One of topic ``reviews``."""
    return PartitionSnapshot(tp=TopicPartition("reviews", number), state=state, **{"counts": {}, **fields})


class ObservedWorker:
    """A worker at work on two partitions, with every figure it can have."""

    def __init__(self) -> None:
        self.pipeline = Pipeline("reviews")
        self.session = Session("reviews")
        self.looks = 0
        self.present = WorkerSnapshot(
            worker="0a1b2c3d",
            state="running",
            at_ms=1_750_000_000_000,
            started_ms=1_749_999_000_500,
            totals={"rows": 12, "results": 9, "dropped": 1, "skipped": 2, "defaulted": 3, "dead_letters": 4,
                    "emitted": 5, "transactions": 6, "tokens": 7, "cost": "1.25"},
            in_flight=8,
            in_flight_bytes=900,
            commit_seconds=0.25,
            partitions=(
                partition(0, committed=100, position=120, buffered=20, in_flight=5, oldest_offset=101,
                          oldest_seconds=1.5, counts={"rows": 100, "results": 90, "dead_letters": 3}),
                partition(1, "opening"),
            ),
            stages={"score": {"rows": 34, "out": 33, "dropped": 0, "failed": 1, "calls": 30, "retries": 2,
                              "timeouts": 1, "failures": 1, "defaulted": 1, "refused": 0, "passed_by": 4, "hits": 10,
                              "seconds": 3.5}},
            latency={"score": Sketch.of({"bins": {"-57": 20, "0": 10}, "zero": 0})},
            breakers={"api": "half_open"},
            budget={"limit": "10", "spent": "2.5", "reserved": "0.5"},
            events_dropped=11,
            observer_errors=13,
        )  # fmt: skip

    def set(self, **changes: Any) -> None:
        """Let it stand otherwise."""
        self.present = replace(self.present, **changes)

    def snapshot(self) -> WorkerSnapshot:
        """How it stands."""
        self.looks += 1
        return self.present
