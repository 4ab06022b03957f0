"""The worker's options: what each means, its default, and what it may be."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..state.errors import ConfigError

if TYPE_CHECKING:
    from .brokers.base import Broker

_LEAST = {"max_deaths": 0, "table_cache_bytes": 8 * 1024 * 1024}


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker runs. Durations are seconds.

    Attributes:
        commit_interval: longest time between a row's completion and its transaction (0.1).
        commit_rows: rows after which a transaction is made at once (10,000).
        fetch_rows: rows a partition task takes in one go (2,000).
        buffer_rows: rows taken and not yet committed, per partition, above which its fetching pauses (20,000).
        buffer_bytes: the same in bytes of values (32 MiB).
        max_in_flight: rows in work at once in the whole worker, where stages are async or concurrent (1,000).
        max_in_flight_bytes: the same in bytes of values (64 MiB).
        linger: how long a row waits for company before a batch or frame stage of such a chain (0.02).
        processes: calls of handlers with ``executor="process"`` that run at once; None: one per core.
        threads: blocking handlers and batches of plain ones that run at once (8).
        drain_timeout: how long rows in work may take to finish when the worker is asked to stop (30).
        broker_timeout: how long a step of a transaction may take before the partition's work is redone (30).
        stall_timeout: how long a partition may fail to commit before the worker gives up with exit code 1 (120).
        guarantee: ``exactly_once``, or ``at_least_once``: results flow as rows complete, for latency; after a crash
            some may appear again, and tables and context may count them twice.
        state_dir: the folder for tables and cached answers, of which each worker takes a part of its own; None:
            ``state`` in the embedded broker's folder, else ``.rowmill/state``.
        table_cache_bytes: memory of RocksDB in the whole worker, from 8 MiB (64 MiB); what was used last takes half as
            much again.
        max_deaths: at how many deaths of its process a row may be seen in work before it becomes a dead letter unrun
            (3). Looking begins after a first death. 0: never.
        create_topics: whether missing sources, sinks and dead-letter topics are made (True).
        partitions: how many partitions topics that are made get; None: 6 on Kafka, 4 embedded.
    """

    commit_interval: float = 0.1
    commit_rows: int = 10_000
    fetch_rows: int = 2_000
    buffer_rows: int = 20_000
    buffer_bytes: int = 32 * 1024 * 1024
    max_in_flight: int = 1_000
    max_in_flight_bytes: int = 64 * 1024 * 1024
    linger: float = 0.02
    processes: int | None = None
    threads: int = 8
    drain_timeout: float = 30.0
    broker_timeout: float = 30.0
    stall_timeout: float = 120.0
    guarantee: Literal["exactly_once", "at_least_once"] = "exactly_once"
    state_dir: str | None = None
    table_cache_bytes: int = 64 * 1024 * 1024
    max_deaths: int = 3
    create_topics: bool = True
    partitions: int | None = None

    def __post_init__(self) -> None:
        if self.guarantee not in {"exactly_once", "at_least_once"}:
            raise ConfigError("guarantee", self.guarantee, "give 'exactly_once' or 'at_least_once'")
        if self.state_dir is not None and (not isinstance(self.state_dir, str) or not self.state_dir.strip("\0")):
            raise ConfigError("state_dir", self.state_dir, "give a folder's path")
        for field in fields(self):
            if field.name not in {"guarantee", "state_dir"}:
                _check(field.name, getattr(self, field.name))


def _check(name: str, value: Any) -> None:
    if name == "create_topics":
        if not isinstance(value, bool):
            raise ConfigError(name, value, "give True or False")
    elif name in {"partitions", "processes"} and value is None:
        return
    elif name in {"commit_interval", "linger", "drain_timeout", "broker_timeout", "stall_timeout"}:
        at_least_zero = name in {"commit_interval", "linger", "drain_timeout"}
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf") or not (value or at_least_zero):
            raise ConfigError(name, value, f"give seconds {'from' if at_least_zero else 'above'} 0")
    else:
        least = _LEAST.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(name, value, f"give a whole number from {least:,}")


def state_folder(options: WorkerOptions, broker: Broker) -> Path:
    """Where a worker keeps tables: the option, else a folder beside the embedded broker's files, else one of ours."""
    if options.state_dir is not None:
        return Path(options.state_dir)
    return broker.folder / "state" if broker.folder is not None else Path(".rowmill/state")
