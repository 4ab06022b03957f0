"""``rowmill pause``: have all workers of a session finish what they have, and wait."""

from __future__ import annotations

from ...state.execution import Wanted
from .asking import Request, add_request
from .parser import Commands

_PAUSE = Request(
    name="pause",
    wanted=Wanted.PAUSE,
    summary="have a session's workers finish rows in work, and wait",
    about=(
        "Ask that a session be paused. All its workers finish and commit the rows in work, take no others, and wait; "
        "they keep their partitions. So does a worker that starts meanwhile, also when all others were stopped: the "
        "session stays paused until it is resumed or cancelled.\n\n"
        "The command returns when the request is recorded. Of two people who ask at once, the second is told what the "
        "first one made of the session."
    ),
    next="Its workers finish and commit the rows in work within seconds, and wait; those that start now wait as well.",
    done="paused",
    alone="one that starts waits",
    back="resume",
)


def add_parser(commands: Commands) -> None:
    """``pause``'s options."""
    add_request(commands, _PAUSE)
