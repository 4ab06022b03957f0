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
    from .handlers.observers import (
        CostTrackingObserver,
        ExecutionObserver,
        LoggingObserver,
        ObserverDispatcher,
        ProgressBarObserver,
        RowFailure,
    )
    from .handlers.outcomes import Failure
    from .handlers.registry import Registry
    from .handlers.retry import Retry
    from .handlers.routing import Route, Router
    from .handlers.stage import Stage
    from .state.artifact_stores import open_artifacts
    from .state.artifacts import ArtifactError, ArtifactStore
    from .state.context import ExecutionContext
    from .state.errors import BadRowError, CheckpointError, ConfigError, RowmillError
    from .state.execution import ExecutionState
    from .state.stats import ProcessingStats
    from .streams.broker_checkpoints import BrokerCheckpointStorage
    from .streams.brokers.open import open_broker
    from .streams.checkpoint_stores import (
        CheckpointInfo,
        CheckpointStorage,
        FileCheckpointStorage,
        MemoryCheckpointStorage,
    )
    from .streams.client import Message, publish, read
    from .streams.dlq import dead_letters, purge_dead_letters, retry_dead_letters
    from .streams.dlq_letters import DeadLetter
    from .streams.errors import (
        BrokerError,
        BrokerTimeoutError,
        BrokerUnreachableError,
        FencedError,
        GroupBusyError,
        IllegalTransitionError,
        InputError,
        NoCheckpointError,
        OffsetOutOfRangeError,
        RowFailedError,
        SessionCancelledError,
        SessionError,
        StalledError,
        TopicError,
    )
    from .streams.executors import AsyncExecutor, ExecutionStrategy, StreamingExecutor, SyncExecutor
    from .streams.operating import cancel_session, pause_session, resume_session, sessions
    from .streams.options import WorkerOptions
    from .streams.pipeline import Pipeline
    from .streams.pipeline_executor import PipelineExecutor
    from .streams.results import CostEstimate, ErrorInfo, ExecutionResult
    from .streams.session import Session
    from .streams.state_manager import StateManager
    from .streams.status import SessionStatus
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
    "BrokerCheckpointStorage": "streams.broker_checkpoints",
    "BrokerError": "streams.errors",
    "BrokerTimeoutError": "streams.errors",
    "BrokerUnreachableError": "streams.errors",
    "Budget": "handlers.budget",
    "Cache": "handlers.cache",
    "CheckpointError": "state.errors",
    "CheckpointInfo": "streams.checkpoint_stores",
    "CheckpointStorage": "streams.checkpoint_stores",
    "CircuitBreaker": "handlers.breaker",
    "ConfigError": "state.errors",
    "CostEstimate": "streams.results",
    "CostTracker": "handlers.costs",
    "CostTrackingObserver": "handlers.observers",
    "DeadLetter": "streams.dlq_letters",
    "ErrorInfo": "streams.results",
    "Events": "handlers.dispatch",
    "ExecutionContext": "state.context",
    "ExecutionObserver": "handlers.observers",
    "ExecutionResult": "streams.results",
    "ExecutionState": "state.execution",
    "ExecutionStrategy": "streams.executors",
    "Failure": "handlers.outcomes",
    "FencedError": "streams.errors",
    "FileCheckpointStorage": "streams.checkpoint_stores",
    "Graph": "handlers.graph",
    "GraphError": "handlers.errors",
    "GraphResult": "handlers.graph",
    "GroupBusyError": "streams.errors",
    "HandlerTimeoutError": "handlers.errors",
    "IllegalTransitionError": "streams.errors",
    "InputError": "streams.errors",
    "LoggingObserver": "handlers.observers",
    "MemoryCheckpointStorage": "streams.checkpoint_stores",
    "Message": "streams.client",
    "NoCheckpointError": "streams.errors",
    "NodeReport": "handlers.graph_run",
    "ObserverDispatcher": "handlers.observers",
    "OffsetOutOfRangeError": "streams.errors",
    "Pipeline": "streams.pipeline",
    "PipelineExecutor": "streams.pipeline_executor",
    "ProcessDiedError": "handlers.errors",
    "ProcessingStats": "state.stats",
    "ProgressBarObserver": "handlers.observers",
    "RateLimit": "handlers.limits",
    "Registry": "handlers.registry",
    "Retry": "handlers.retry",
    "Route": "handlers.routing",
    "Router": "handlers.routing",
    "RowContext": "handlers.context",
    "RowFailedError": "streams.errors",
    "RowFailure": "handlers.observers",
    "RowmillError": "state.errors",
    "SchemaError": "handlers.errors",
    "Session": "streams.session",
    "SessionCancelledError": "streams.errors",
    "SessionError": "streams.errors",
    "SessionStatus": "streams.status",
    "Stage": "handlers.stage",
    "StageFailedError": "handlers.errors",
    "StalledError": "streams.errors",
    "StateManager": "streams.state_manager",
    "StopExecution": "handlers.errors",
    "StreamingExecutor": "streams.executors",
    "StreamingResult": "streams.streaming",
    "SyncExecutor": "streams.executors",
    "TopicError": "streams.errors",
    "UnroutedError": "handlers.errors",
    "Worker": "streams.worker",
    "WorkerOptions": "streams.options",
    "cancel_session": "streams.operating",
    "dead_letters": "streams.dlq",
    "open_artifacts": "state.artifact_stores",
    "open_broker": "streams.brokers.open",
    "pause_session": "streams.operating",
    "publish": "streams.client",
    "purge_dead_letters": "streams.dlq",
    "read": "streams.client",
    "resume_session": "streams.operating",
    "retry_dead_letters": "streams.dlq",
    "sessions": "streams.operating",
}

__all__ = [
    "Analyser",
    "ArtifactError",
    "ArtifactStore",
    "Assembly",
    "AsyncExecutor",
    "BadRowError",
    "BrokerCheckpointStorage",
    "BrokerError",
    "BrokerTimeoutError",
    "BrokerUnreachableError",
    "Budget",
    "Cache",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointStorage",
    "CircuitBreaker",
    "ConfigError",
    "CostEstimate",
    "CostTracker",
    "CostTrackingObserver",
    "DeadLetter",
    "ErrorInfo",
    "Events",
    "ExecutionContext",
    "ExecutionObserver",
    "ExecutionResult",
    "ExecutionState",
    "ExecutionStrategy",
    "Failure",
    "FencedError",
    "FileCheckpointStorage",
    "Graph",
    "GraphError",
    "GraphResult",
    "GroupBusyError",
    "HandlerTimeoutError",
    "IllegalTransitionError",
    "InputError",
    "LoggingObserver",
    "MemoryCheckpointStorage",
    "Message",
    "NoCheckpointError",
    "NodeReport",
    "ObserverDispatcher",
    "OffsetOutOfRangeError",
    "Pipeline",
    "PipelineExecutor",
    "ProcessDiedError",
    "ProcessingStats",
    "ProgressBarObserver",
    "RateLimit",
    "Registry",
    "Retry",
    "Route",
    "Router",
    "RowContext",
    "RowFailedError",
    "RowFailure",
    "RowmillError",
    "SchemaError",
    "Session",
    "SessionCancelledError",
    "SessionError",
    "SessionStatus",
    "Stage",
    "StageFailedError",
    "StalledError",
    "StateManager",
    "StopExecution",
    "StreamingExecutor",
    "StreamingResult",
    "SyncExecutor",
    "TopicError",
    "UnroutedError",
    "Worker",
    "WorkerOptions",
    "cancel_session",
    "dead_letters",
    "open_artifacts",
    "open_broker",
    "pause_session",
    "publish",
    "purge_dead_letters",
    "read",
    "resume_session",
    "retry_dead_letters",
    "sessions",
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
