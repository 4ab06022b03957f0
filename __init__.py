"""rowmill: row pipelines as event-driven stream processors, exactly once on Kafka or on an embedded broker.

Everything public is here: ``from rowmill import Pipeline, publish, read``. Names are loaded when first used, so
that ``import rowmill`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .handlers.context import RowContext
    from .handlers.stage import Stage
    from .state.context import ExecutionContext
    from .state.errors import BadRowError, CheckpointError, ConfigError, RowmillError
    from .state.stats import ProcessingStats
    from .streams.brokers.open import open_broker
    from .streams.client import Message, publish, read
    from .streams.errors import (
        BrokerError,
        BrokerTimeoutError,
        BrokerUnreachableError,
        FencedError,
        GroupBusyError,
        InputError,
        OffsetOutOfRangeError,
        SessionError,
        StalledError,
        TopicError,
    )
    from .streams.options import WorkerOptions
    from .streams.pipeline import Pipeline
    from .streams.results import CostEstimate, ErrorInfo, ExecutionResult
    from .streams.session import Session
    from .streams.streaming import StreamingResult
    from .streams.worker import Worker

__version__ = "0.1.0"

_HOMES = {
    "BadRowError": "state.errors",
    "BrokerError": "streams.errors",
    "BrokerTimeoutError": "streams.errors",
    "BrokerUnreachableError": "streams.errors",
    "CheckpointError": "state.errors",
    "ConfigError": "state.errors",
    "CostEstimate": "streams.results",
    "ErrorInfo": "streams.results",
    "ExecutionContext": "state.context",
    "ExecutionResult": "streams.results",
    "FencedError": "streams.errors",
    "GroupBusyError": "streams.errors",
    "InputError": "streams.errors",
    "Message": "streams.client",
    "OffsetOutOfRangeError": "streams.errors",
    "Pipeline": "streams.pipeline",
    "ProcessingStats": "state.stats",
    "RowContext": "handlers.context",
    "RowmillError": "state.errors",
    "Session": "streams.session",
    "SessionError": "streams.errors",
    "Stage": "handlers.stage",
    "StalledError": "streams.errors",
    "StreamingResult": "streams.streaming",
    "TopicError": "streams.errors",
    "Worker": "streams.worker",
    "WorkerOptions": "streams.options",
    "open_broker": "streams.brokers.open",
    "publish": "streams.client",
    "read": "streams.client",
}

__all__ = [
    "BadRowError",
    "BrokerError",
    "BrokerTimeoutError",
    "BrokerUnreachableError",
    "CheckpointError",
    "ConfigError",
    "CostEstimate",
    "ErrorInfo",
    "ExecutionContext",
    "ExecutionResult",
    "FencedError",
    "GroupBusyError",
    "InputError",
    "Message",
    "OffsetOutOfRangeError",
    "Pipeline",
    "ProcessingStats",
    "RowContext",
    "RowmillError",
    "Session",
    "SessionError",
    "Stage",
    "StalledError",
    "StreamingResult",
    "TopicError",
    "Worker",
    "WorkerOptions",
    "open_broker",
    "publish",
    "read",
]


def __getattr__(name: str) -> Any:
    """PEP 562: import a public name's module when the name is first asked for."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
