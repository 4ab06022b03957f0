"""rowmill: row pipelines as event-driven stream processors, exactly once on Kafka or on an embedded broker.

Everything public is here: ``from rowmill import Pipeline, publish, read``. Names are loaded when first used, so
that ``import rowmill`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .handlers.analysis import Analyser, Assembly
    from .handlers.breaker import CircuitBreaker
    from .handlers.budget import Budget
    from .handlers.cache import Cache
    from .handlers.context import RowContext
    from .handlers.costs import CostTracker
    from .handlers.dispatch import Events
    from .handlers.errors import (
        GraphError,
        HandlerTimeoutError,
        ProcessDiedError,
        SchemaError,
        StageFailedError,
        StopExecution,
        UnroutedError,
    )
    from .handlers.graph import Graph, GraphResult
    from .handlers.graph_run import NodeReport
    from .handlers.limits import RateLimit
    from .handlers.outcomes import Failure
    from .handlers.registry import Registry
    from .handlers.retry import Retry
    from .handlers.routing import Route, Router
    from .handlers.stage import Stage
    from .state.artifact_stores import open_artifacts
    from .state.artifacts import ArtifactError, ArtifactStore
    from .state.context import ExecutionContext
    from .state.errors import BadRowError, CheckpointError, ConfigError, RowmillError
    from .state.stats import ProcessingStats
    from .streams.brokers.open import open_broker
    from .streams.client import Message, publish, read
    from .streams.dlq import dead_letters, purge_dead_letters, retry_dead_letters
    from .streams.dlq_letters import DeadLetter
    from .streams.errors import (
        BrokerError,
        BrokerTimeoutError,
        BrokerUnreachableError,
        FencedError,
        GroupBusyError,
        InputError,
        OffsetOutOfRangeError,
        RowFailedError,
        SessionError,
        StalledError,
        TopicError,
    )
    from .streams.executors import AsyncExecutor, ExecutionStrategy, StreamingExecutor, SyncExecutor
    from .streams.options import WorkerOptions
    from .streams.pipeline import Pipeline
    from .streams.results import CostEstimate, ErrorInfo, ExecutionResult
    from .streams.session import Session
    from .streams.streaming import StreamingResult
    from .streams.worker import Worker

__version__ = "0.1.0"

_HOMES = {
    "Analyser": "handlers.analysis",
    "ArtifactError": "state.artifacts",
    "ArtifactStore": "state.artifacts",
    "Assembly": "handlers.analysis",
    "AsyncExecutor": "streams.executors",
    "BadRowError": "state.errors",
    "BrokerError": "streams.errors",
    "BrokerTimeoutError": "streams.errors",
    "BrokerUnreachableError": "streams.errors",
    "Budget": "handlers.budget",
    "Cache": "handlers.cache",
    "CheckpointError": "state.errors",
    "CircuitBreaker": "handlers.breaker",
    "ConfigError": "state.errors",
    "CostEstimate": "streams.results",
    "CostTracker": "handlers.costs",
    "DeadLetter": "streams.dlq_letters",
    "ErrorInfo": "streams.results",
    "Events": "handlers.dispatch",
    "ExecutionContext": "state.context",
    "ExecutionResult": "streams.results",
    "ExecutionStrategy": "streams.executors",
    "Failure": "handlers.outcomes",
    "FencedError": "streams.errors",
    "Graph": "handlers.graph",
    "GraphError": "handlers.errors",
    "GraphResult": "handlers.graph",
    "GroupBusyError": "streams.errors",
    "HandlerTimeoutError": "handlers.errors",
    "InputError": "streams.errors",
    "Message": "streams.client",
    "NodeReport": "handlers.graph_run",
    "OffsetOutOfRangeError": "streams.errors",
    "Pipeline": "streams.pipeline",
    "ProcessDiedError": "handlers.errors",
    "ProcessingStats": "state.stats",
    "RateLimit": "handlers.limits",
    "Registry": "handlers.registry",
    "Retry": "handlers.retry",
    "Route": "handlers.routing",
    "Router": "handlers.routing",
    "RowContext": "handlers.context",
    "RowFailedError": "streams.errors",
    "RowmillError": "state.errors",
    "SchemaError": "handlers.errors",
    "Session": "streams.session",
    "SessionError": "streams.errors",
    "Stage": "handlers.stage",
    "StageFailedError": "handlers.errors",
    "StalledError": "streams.errors",
    "StopExecution": "handlers.errors",
    "StreamingExecutor": "streams.executors",
    "StreamingResult": "streams.streaming",
    "SyncExecutor": "streams.executors",
    "TopicError": "streams.errors",
    "UnroutedError": "handlers.errors",
    "Worker": "streams.worker",
    "WorkerOptions": "streams.options",
    "dead_letters": "streams.dlq",
    "open_artifacts": "state.artifact_stores",
    "open_broker": "streams.brokers.open",
    "publish": "streams.client",
    "purge_dead_letters": "streams.dlq",
    "read": "streams.client",
    "retry_dead_letters": "streams.dlq",
}

__all__ = [
    "Analyser",
    "ArtifactError",
    "ArtifactStore",
    "Assembly",
    "AsyncExecutor",
    "BadRowError",
    "BrokerError",
    "BrokerTimeoutError",
    "BrokerUnreachableError",
    "Budget",
    "Cache",
    "CheckpointError",
    "CircuitBreaker",
    "ConfigError",
    "CostEstimate",
    "CostTracker",
    "DeadLetter",
    "ErrorInfo",
    "Events",
    "ExecutionContext",
    "ExecutionResult",
    "ExecutionStrategy",
    "Failure",
    "FencedError",
    "Graph",
    "GraphError",
    "GraphResult",
    "GroupBusyError",
    "HandlerTimeoutError",
    "InputError",
    "Message",
    "NodeReport",
    "OffsetOutOfRangeError",
    "Pipeline",
    "ProcessDiedError",
    "ProcessingStats",
    "RateLimit",
    "Registry",
    "Retry",
    "Route",
    "Router",
    "RowContext",
    "RowFailedError",
    "RowmillError",
    "SchemaError",
    "Session",
    "SessionError",
    "Stage",
    "StageFailedError",
    "StalledError",
    "StopExecution",
    "StreamingExecutor",
    "StreamingResult",
    "SyncExecutor",
    "TopicError",
    "UnroutedError",
    "Worker",
    "WorkerOptions",
    "dead_letters",
    "open_artifacts",
    "open_broker",
    "publish",
    "purge_dead_letters",
    "read",
    "retry_dead_letters",
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
