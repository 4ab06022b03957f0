"""Errors of the handlers layer. Each class says who acts next::

RowmillError
├── MisfitError           you, the handler's author: it gave back what cannot be matched to its rows
├── HandlerTimeoutError   the handler outlived its stage's timeout; the row is a dead letter
└── AbandonedError        too many blocking handlers hang; the stage's rows fail until threads come back
"""

from __future__ import annotations

from ..state.errors import RowmillError


class MisfitError(RowmillError, TypeError):
    """A handler returned something that is no row, list of rows or None, or that fits no input row."""


class HandlerTimeoutError(RowmillError, TimeoutError):
    """A handler did not finish within its stage's ``timeout``."""


class AbandonedError(RowmillError):
    """No thread may be started for a blocking handler: as many as allowed hang already."""
