"""Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends the process at once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from .logs import in_form, in_json

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_THREAD_SECONDS = 1.0


class Caught:
    """Which signal came first, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells do: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal or 0)


class StoppedError(Exception):
    """A signal ended the command before it was done."""

    def __init__(self, caught: Caught, message: str) -> None:
        super().__init__(message)
        self.exit_code = caught.exit_code


@contextmanager
def orderly_stop(stop: Callable[[], None], note: str = "") -> Iterator[Caught]:
    """While the block runs, the first signal calls ``stop`` on the running loop; a second one exits at once.

    To be used inside the event loop of the main thread.

    Args:
        stop: asks for the end.
        note: shown at the first signal.
    """
    import asyncio  # this file is needed for a help text as well, asyncio is not

    loop = asyncio.get_running_loop()
    caught = Caught()

    def handle(number: int, _frame: FrameType | None) -> None:
        if caught.signal is not None:
            os.write(2, b"\n")
            os._exit(128 + number)
        caught.signal = number
        if note:
            # Not by print: the signal may have come in the middle of one, and a blocked loop could not say it.
            os.write(2, f"{in_form(note) if in_json() else chr(10) + note}\n".encode())
        loop.call_soon_threadsafe(stop)

    for number in _SIGNALS:
        # asyncio's handlers run on the loop, so a user's handler that blocks it would block the second Ctrl-C too:
        # a plain handler goes over them. They stay beneath because they make a signal wake the loop.
        loop.add_signal_handler(number, lambda: None)
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def leave_threads_behind(exit_code: int) -> None:
    """See that the process ends soon, also if some thread that a handler has started does not.

    Python ends as ever: idle threads of pools are told to, and what was registered with ``atexit`` runs. Only where it
    still waits for a thread after a second the process ends at once.
    """
    watch = threading.Timer(_THREAD_SECONDS, _end_at_once, (exit_code,))
    watch.daemon = True
    atexit.register(watch.cancel)  # runs when all threads have ended, and before what others have registered
    watch.start()


def _end_at_once(exit_code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)
