"""``rowmill cancel``: have all workers of a session stop at once."""

from __future__ import annotations

from ...state.execution import Wanted
from .asking import Request, add_request
from .parser import Commands

_CANCEL = Request(
    name="cancel",
    wanted=Wanted.CANCEL,
    summary="have a session's workers stop at once; it can be gone on with",
    about=(
        "Ask that a session be cancelled. All its workers, and its `rowmill run`, commit the rows that are done, give "
        "up those in work, and exit. Nothing is lost: started again, the session goes on with the rows that were not "
        "done. To end the workers and let them finish, send them SIGTERM instead."
    ),
    next="Its workers commit what is done and exit within seconds; to go on with it, start it again.",
    done="gone",
    alone="to go on with it, start one",
)


def add_parser(commands: Commands) -> None:
    """``cancel``'s options."""
    add_request(commands, _CANCEL)
