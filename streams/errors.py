"""Errors of the streams layer. Each class says who acts next::

RowmillError
├── BrokerError              the broker or the network: try again, later or elsewhere (retryable)
│   ├── BrokerTimeoutError   a call outlived its deadline; what it did is unknown
│   └── BrokerUnreachableError  nothing answers at that address
├── FencedError              somebody else owns the partition now: drop everything, rejoin the group
├── GroupBusyError           you: another worker on this embedded broker already serves the group
├── TopicError               you: a topic is missing, or its name or shape is wrong
├── OffsetOutOfRangeError    you: the committed offset no longer exists; choose where to go on
├── RowFailedError           you: a row failed in a stage that says on_error="fail"; mend the cause, go on
├── SessionError             you: the session exists and does not fit what was asked
│   ├── SessionCancelledError  an operator cancelled it; start it again to go on
│   └── NoCheckpointError    there is no such session to go on with; execute it first
├── IllegalTransitionError   you: what was asked of the session does not go with what it is doing; see what that is
├── InputError               you: a file cannot be read or written
└── StalledError             your supervisor: start the worker again

``CheckpointError`` is here too: contexts and tables raise it as well, so it is defined in the state layer.
"""

from __future__ import annotations

from typing import ClassVar

from ..state.errors import CheckpointError as CheckpointError  # noqa: PLC0414 - exported again
from ..state.errors import RowmillError
from ..state.model import TopicPartition


class BrokerError(RowmillError):
    """The broker or the way to it failed; the same call may succeed later."""

    retryable: ClassVar[bool] = True


class BrokerTimeoutError(BrokerError):
    """A call did not end within its deadline. Whether it took effect is unknown: read, never guess."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what}: no answer within {seconds:g} s")


class BrokerUnreachableError(BrokerError):
    """No broker answers at the address given."""


class FencedError(RowmillError):
    """A newer owner of the same transactional id exists. The loser stops touching the partition."""


class GroupBusyError(RowmillError):
    """The embedded broker lets one worker serve a group, and there is one."""


class TopicError(RowmillError):
    """A topic is missing, badly named, or not of the shape that is needed."""


class OffsetOutOfRangeError(RowmillError):
    """The position asked for is not in the log (any more)."""

    def __init__(self, tp: TopicPartition, offset: int, remedy: str) -> None:
        super().__init__(f"{tp}: offset {offset:,} is not in the log; {remedy}")
        self.tp = tp
        self.offset = offset
        self.remedy = remedy


class SessionError(RowmillError):
    """A session of that name exists and belongs to something else."""


class IllegalTransitionError(RowmillError, RuntimeError):
    """What was asked of a session does not follow what is wanted of it, or what it is doing. Nothing was changed.

    Also a RuntimeError, which callers of Python libraries expect of an object in the wrong state.
    """


class SessionCancelledError(SessionError):
    """Somebody cancelled the session while it ran here. What has completed is kept; a new start goes on with it."""


class NoCheckpointError(SessionError, ValueError):
    """There is nothing to go on with: the broker knows no such session. Nothing was changed.

    Also a ValueError, which users of ondine expect of ``resume``.
    """


class InputError(RowmillError):
    """A file of the user's cannot be read or written as asked."""


class RowFailedError(RowmillError):
    """A row failed in a stage whose ``on_error`` is ``fail``; it stays undone, and the session can be gone on with."""


class StalledError(RowmillError):
    """No progress is possible for longer than ``stall_timeout``."""
