"""Errors of the handlers layer. Each class says who acts next::

RowmillError
├── MisfitError             you, the handler's author: it gave back what cannot be matched to its rows
├── ConditionError          you: a stage's ``when=`` raised
├── HandlerTimeoutError     the handler outlived its stage's timeout; a Retry tries again
├── NotStartedError         no thread was free for a blocking handler; a Retry tries again
│   └── AbandonedError      too many blocking handlers hang; the stage's rows fail until threads come back
├── ProcessDiedError        the process that ran a handler ended in the middle of a call; a Retry tries again
├── BreakerOpenError        nobody: the stage's resource is left alone for a while
├── UnknownPriceError       you: what a call may cost cannot be told, so it is not made
├── PriceTooHighError       you: one call may cost more than the whole budget
├── LedgerError             the broker's keeper: the budget's ledger does not answer
├── BadRowError             (the state layer's)
│   └── SchemaError         whoever made the row: it does not fit the schema
│       └── ResultSchemaError  the handler's author; a Retry asks again, for a model may answer better
├── StageFailedError        as the stage inside the element says
├── UnroutedError           you: a router has no route for the row, or nobody handles the event
├── GraphError              you, or whoever runs what a node called: nodes failed; the message names them
└── StopExecution           nobody: a handler raises it to end the session in order
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ..state.errors import BadRowError, RowmillError
from .retry import asked_pause, is_curable, status_of

if TYPE_CHECKING:
    from .graph_run import NodeReport
    from .outcomes import Failure
    from .shapes import Misfit

NAMED_MISFITS = 3
"""Misfits that an error's message names; of the others it gives the number."""


class MisfitError(RowmillError, TypeError):
    """A handler returned something that is no row, list of rows or None, or that fits no input row."""


class ConditionError(RowmillError):
    """A stage's ``when=`` raised: whether the row should run is unknown, so it fails."""


class HandlerTimeoutError(RowmillError, TimeoutError):
    """A handler did not finish within its stage's ``timeout``."""

    retryable: ClassVar[bool] = True


class NotStartedError(RowmillError):
    """A blocking handler was not called: no thread was free for it in time. Nothing was done, nothing is to pay."""

    retryable: ClassVar[bool] = True


class AbandonedError(NotStartedError):
    """No thread may be started for a blocking handler: as many as allowed hang already."""


class BreakerOpenError(RowmillError):
    """The stage was not called: its circuit breaker is open."""

    retryable: ClassVar[bool] = True


class SchemaError(BadRowError):
    """A row does not fit its schema: whoever made the row acts. It becomes a dead letter that names the field.

    Args:
        what: ``input`` or ``result``.
        schema: the schema's name.
        misfits: at least one; the message names the first three.
    """

    def __init__(self, what: str, schema: str, misfits: Sequence[Misfit]) -> None:
        named = "; ".join(map(str, misfits[:NAMED_MISFITS]))
        more = len(misfits) - NAMED_MISFITS
        told = f"the {what} does not fit {schema}: {named}" + (f"; and {more:,} more" if more > 0 else "")
        super().__init__("schema", told)
        self.misfits = tuple(misfits[:NAMED_MISFITS])
        self.count = len(misfits)


class ResultSchemaError(SchemaError):
    """A handler gave a result that does not fit. A model or a service may give a better one next time: retryable."""

    retryable: ClassVar[bool] = True


class UnknownPriceError(RowmillError, ValueError):
    """What a call may cost cannot be told, so it is not made: unknown is not free."""


class PriceTooHighError(RowmillError, ValueError):
    """One call may cost more than the whole budget: no waiting would ever pay for it."""


class LedgerError(RowmillError):
    """The ledger does not answer. Nothing new is leased until it does; what is leased already may be spent."""

    retryable: ClassVar[bool] = True


class ProcessDiedError(RowmillError):
    """The process that ran a handler ended in the middle of it: a crash in C code, ``os._exit``, out of memory.

    The rows of that call fail; others get a new process.
    """

    retryable: ClassVar[bool] = True


class StageFailedError(RowmillError):
    """A stage inside an element failed, and with it the row.

    Attributes:
        failure: the inner stage's, with its name, attempts and error.
        kind: that failure's kind, so that dead letters can be told apart by it.
    """

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure
        self.kind = failure.kind
        self.retryable = failure.error is not None and is_curable(failure.error)  # type: ignore[misc] # the inner one's
        self.status = None if failure.error is None else status_of(failure.error)
        self.retry_after = None if failure.error is None else asked_pause(failure.error)


class UnroutedError(RowmillError):
    """No route leads on for this row, or nobody handles its event.

    Attributes:
        kind: ``no_route`` or ``no_handlers``.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class GraphError(RowmillError):
    """Nodes of a graph failed, and with them the row; the message names them.

    Attributes:
        nodes: what became of each node, by name.
        then: what becomes of the row: ``fail`` if one of the nodes was declared with ``on_error="fail"``.
        retryable: whether trying again may help against every failed node's error.
    """

    def __init__(self, message: str, nodes: Mapping[str, NodeReport], failures: Sequence[Failure]) -> None:
        super().__init__(message)
        self.nodes = dict(nodes)
        self.then: Literal["fail", "dead_letter"] = "fail" if any(f.then == "fail" for f in failures) else "dead_letter"
        errors = [failure.error for failure in failures if failure.error is not None]
        self.retryable = len(errors) == len(failures) and all(map(is_curable, errors))  # type: ignore[misc]
        self.status = next((status for error in errors if (status := status_of(error)) is not None), None)
        self.retry_after = next((asked for error in errors if (asked := asked_pause(error)) is not None), None)


class StopExecution(RowmillError):  # noqa: N818 - the name that users of other orchestrators look for
    """Raised by a handler: the session ends in order once the rows in work are through.

    The row that raised it stays undone, and is the first to run when the session goes on.
    """
