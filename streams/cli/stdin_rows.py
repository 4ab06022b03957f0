"""JSON lines from standard input, as rows to publish."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

from ..inputs import InputRow, json_line_rows

_POLL_SECONDS = 0.2
_READ_BYTES = 1 << 16


class StdinRows:
    """Fits the port Input. It is read once, and in a thread; ``stop`` ends that thread's wait for more.

    A thread that waits in ``read()`` cannot be ended, and the interpreter waits for it at exit: Ctrl-C at a
    terminal would hang until Ctrl-D.

    Args:
        descriptor: where to read.
        key: the field that becomes the key, or None.
    """

    fingerprint = "stdin"
    total: int | None = None
    is_file = True  # its rows need not be compared: it is read once

    def __init__(self, descriptor: int, key: str | None) -> None:
        self._descriptor = descriptor
        self._key = key
        self._stopped = False

    def stop(self) -> None:
        """End as if the input had ended."""
        self._stopped = True

    def rows(self, first: int) -> Iterator[InputRow]:
        """Every line that is not blank, as it stands. ``first`` must be 0: a pipe has no way back."""
        assert first == 0  # noqa: S101 - publishing without a session never goes on
        return json_line_rows(self._lines(), self._key)

    def _lines(self) -> Iterator[bytes]:
        rest: list[bytes] = []
        while not self._stopped:
            if not select.select([self._descriptor], [], [], _POLL_SECONDS)[0]:
                continue
            chunk = os.read(self._descriptor, _READ_BYTES)
            if not chunk:
                break
            *lines, last = chunk.split(b"\n")
            if lines:
                lines[0] = b"".join(rest) + lines[0]
                rest = []
            rest.append(last)
            yield from lines
        yield b"".join(rest)
