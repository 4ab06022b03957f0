"""``rowmill resume``: have the workers of a paused session go on."""

from __future__ import annotations

from ...state.execution import Wanted
from .asking import Request, add_request
from .parser import Commands

_RESUME = Request(
    name="resume",
    wanted=Wanted.RUN,
    summary="have a paused session's workers go on",
    about=(
        "Ask that a paused session go on, from where it stopped or where `rowmill replay` has moved it meanwhile. "
        "A cancelled session is not resumed: start its workers, or its run, again."
    ),
    next="Its workers go on within seconds; if none is running, start one.",
    done="running",
    alone="start one",
)


def add_parser(commands: Commands) -> None:
    """``resume``'s options."""
    add_request(commands, _RESUME)
