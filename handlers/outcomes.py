"""What became of a row in a stage: results, nothing, or a failure with its reason."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import walk_tb
from typing import Any, Literal, TypeAlias

from ..state.errors import RowmillError
from ..state.model import Row
from .errors import MisfitError
from .frames import is_frame
from .stage import Stage

Then: TypeAlias = "Literal['dead_letter', 'skip', 'fail', 'stop']"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row did not complete: the stage, the error, and how often it was tried.

    ``kind`` is the error's class name, or a short stable name for errors that rowmill found itself; ``where`` is the
    file and line of the user's code that raised it, "" for those. ``then`` is what becomes of the row: a dead letter;
    left out and counted (``skip``); or it stays undone and the session ends, as failed (``fail``) or in order
    (``stop``).
    """

    stage: str
    kind: str
    message: str
    attempts: int = 1
    where: str = field(default="", compare=False)
    error: BaseException | None = field(default=None, compare=False, repr=False)
    then: Then = "dead_letter"

    @property
    def halts(self) -> bool:
        """Whether the session ends with it; the row is not done and runs again when the session goes on."""
        return self.then in {"fail", "stop"}


Outcome: TypeAlias = "Row | list[Row] | Failure | None"
"""What became of one input row: one result, several, a failure, or nothing (dropped on purpose)."""

RAISED = (Exception, SystemExit, asyncio.CancelledError)
"""What a plain handler may raise and fail its row with. Nobody cancels a bare call: a CancelledError is its own."""

_RULE = "a handler returns a dict, a list of dicts, or None to drop the row"
_OWN_FOLDER = str(Path(__file__).parent)


def checked(stage: Stage, result: Any) -> Outcome:
    """A handler's result for one row, in order.

    Raises:
        MisfitError: it is none.
    """
    return result if result.__class__ is dict else odd_result(stage, result)


def odd_result(stage: Stage, result: Any) -> Outcome:
    """What is no bare dict: None, a list of rows, a dict's subclass, or a mistake.

    Raises:
        MisfitError: it is a mistake.
    """
    if result is None:
        return None
    if isinstance(result, dict):
        return dict(result)
    if isinstance(result, (list, tuple)):
        for row in result:
            if not isinstance(row, dict):
                raise MisfitError(f"stage {stage.name!r} returned a list with a {type_name(row)} in it; {_RULE}")
        return [dict(row) for row in result] or None
    raise MisfitError(f"stage {stage.name!r} returned a {type_name(result)}; {_RULE}")


def type_name(value: Any) -> str:
    """A value's type, for messages."""
    return "DataFrame (set frame=True for frames)" if is_frame(value) else type(value).__name__


def failure_of(stage: Stage, error: BaseException, attempts: int = 1, then: Then | None = None) -> Failure:
    """An exception as a row's failure. An exception without text is named by its class.

    The failure of a stage inside an element keeps that stage's name, behind the element's, and what it says is to
    become of the row.
    """
    inner = getattr(error, "failure", None)
    if isinstance(inner, Failure):
        ends = then or (inner.then if inner.then != "dead_letter" else stage.then_of(error))
        where = inner.where or ("" if inner.error is None else _where(inner.error))
        name = f"{stage.name}/{inner.stage}"
        return replace(inner, stage=name, message=text_of(error), error=error, then=ends, where=where)
    return Failure(
        stage.name,
        str(getattr(error, "kind", "") if isinstance(error, RowmillError) else "") or type(error).__name__,
        text_of(error),
        attempts=attempts,
        where=_where(error),
        error=error,
        then=then or stage.then_of(error),
    )


def text_of(error: BaseException) -> str:
    """What an error says; its class where it says nothing, or cannot."""
    try:
        return str(error) or repr(error)
    except Exception:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"{type(error).__name__} (which cannot be shown)"


def _where(error: BaseException) -> str:
    """The last line of the user's own code on the way to the error, as ``file.py:17``; "" if there is none.

    Of the frames that are not ours, the first one's file is the handler's; libraries it calls come further in.
    """
    elsewhere = getattr(error, "raised_at", "")  # in a process of the handler's own
    if elsewhere:
        return str(elsewhere)
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    theirs = [(name, line) for name, line in frames if not name.startswith(_OWN_FOLDER)]
    own = [line for name, line in theirs if name == theirs[0][0]]
    return f"{Path(theirs[0][0]).name}:{own[-1]}" if theirs else ""
