"""How long a stage's calls take: a sample of them, taken so that nobody notices.

Reading the clock twice and sorting the difference into a sketch costs two microseconds, more than a plain function
takes. So one call in so many is timed, about a hundred a second, whatever the pace; what a timed call found counts for
those since the one before. Calls are chosen before they are made, by their number: slow ones are no likelier to be in
the sample than quick ones, as they would be if every so often "the next to finish" were taken.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

from ..state.clock import Clock
from ..state.sketch import Sketch
from .stage import Handler, Stage

_PER_SECOND = 100
"""Calls that are timed."""
_MOST = 300
"""Calls that are timed at most between two looks at the pace: it may rise, and there may be nobody who looks."""
_LOOK_SECONDS = 0.5
_KEPT_SECONDS = 30.0
_NEVER = sys.maxsize


class StageTimes:
    """A sample of the times of one stage's calls. May be used on any thread.

    Args:
        clock: time.
    """

    __slots__ = (
        "_before", "_clock", "_last", "_left", "_lock", "_looked", "_recent", "_since", "_step", "_untold", "due",
    )  # fmt: skip

    def __init__(self, clock: Clock) -> None:
        self.due = 0
        """The next call is to be timed once so many have been made."""
        self._clock = clock
        self._lock = threading.Lock()
        self._step = 1
        self._left = _MOST
        self._last = 0  # calls made when the last one was timed
        self._looked = (clock.monotonic(), 0)  # when the pace was looked at, and calls made until then
        self._untold = Sketch()
        # The last half minute or more of them: a young sketch, and the one before it.
        self._since = clock.monotonic()
        self._recent, self._before = Sketch(), Sketch()

    def claim(self, made: int) -> int:
        """A call begins, and is timed because it is due. Gives how many calls it stands for.

        Args:
            made: how many calls were made until now.
        """
        with self._lock:
            stands_for = max(1, made - self._last)
            self._last = made
            self._left -= 1
            self.due = made + self._step if self._left > 0 else _NEVER
        return stands_for

    def add(self, seconds: float, stands_for: int) -> None:
        """A call that was claimed is over."""
        with self._lock:
            self._untold.add(seconds, stands_for)
            self._recent.add(seconds, stands_for)

    def take(self, made: int) -> Sketch:
        """What was timed since the last time this was called."""
        with self._lock:
            self._look(made)
            taken, self._untold = self._untold, Sketch()
        return taken

    def recent(self, made: int) -> Sketch:
        """What was timed within the last half minute or up to twice that."""
        with self._lock:
            self._look(made)
            both = Sketch()
            both.merge(self._before)
            both.merge(self._recent)
        return both

    def _look(self, made: int) -> None:
        """Have as many calls timed at the present pace as are wanted."""
        now = self._clock.monotonic()
        then, had = self._looked
        if now - then >= _LOOK_SECONDS:
            self._looked = (now, made)
            self._step = max(1, round((made - had) / (now - then) / _PER_SECOND))
            if self._left <= 0:  # nobody speaks for those since: the next one would outweigh all others
                self._last = made
            self._left = _MOST
            self.due = min(self.due, made + self._step)
        if now - self._since >= _KEPT_SECONDS:
            is_old = now - self._since >= 2 * _KEPT_SECONDS
            self._before, self._recent = Sketch() if is_old else self._recent, Sketch()
            self._since = now

    def timed(self, call: Handler, made: int, *, is_async: bool = False) -> Handler:
        """Claims a call of this handler; gives what to call instead, once. A call that raises is timed as well.

        Where the handler runs on a thread, so does the clock: a call that waits for a thread has not begun.
        """
        monotonic, stands_for = self._clock.monotonic, self.claim(made)

        async def timed_call(*arguments: Any) -> Any:
            began = monotonic()
            try:
                result = call(*arguments)
                return result if result.__class__ is dict else await result
            finally:
                self.add(monotonic() - began, stands_for)

        def timed_plain_call(*arguments: Any) -> Any:
            began = monotonic()
            try:
                return call(*arguments)
            finally:
                self.add(monotonic() - began, stands_for)

        return timed_call if is_async else timed_plain_call

    def stage(self, stage: Stage, made: int) -> Stage:
        """The same for a stage without policies, to be called once."""
        return replace(stage, call=self.timed(stage.call, made, is_async=stage.is_async))
