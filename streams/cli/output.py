"""How things look on a terminal: numbers, tables, commands to copy, and text that came from elsewhere."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence

from .logs import in_form, masked


def say(text: str, *, quiet: bool = False, level: str = "info", bug: BaseException | None = None) -> None:
    """A line for the person, on standard error: standard output is for results only.

    With ``--log-format json`` it is a JSON object like the lines of the log, of that level, with a bug's traceback.
    """
    if not quiet:
        print(in_form(masked(text), level=level, error=bug), file=sys.stderr, flush=True)


def write_line(text: bytes, *, flush: bool = False) -> None:
    """A result on standard output, as the bytes it is."""
    sys.stdout.buffer.write(text + b"\n")
    if flush:
        sys.stdout.buffer.flush()


def duration(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def size(count: float) -> str:
    """Bytes, as ``3.1 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def plural(count: int, noun: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def command(*words: str | None) -> str:
    """A command line to copy; words that are None or empty are left out."""
    return shlex.join(word for word in words if word)


def plain(text: str) -> str:
    """Text from data or user code on one line, without anything that could steer a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text).strip()


def width() -> int:
    """Columns of the terminal, between 60 and 120; 80 in a pipe."""
    return max(60, min(120, shutil.get_terminal_size((80, 24)).columns))


def table(rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), indent: str = "") -> str:
    """Aligned columns; those in ``right`` are flushed right. The last column is cut at the terminal's edge."""
    lines = [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    room = width() - len(indent) - sum(widths[:-1]) - 2 * (len(widths) - 1)
    widths[-1] = min(widths[-1], max(10, room))
    return "\n".join(indent + _line(row, widths, right).rstrip() for row in lines)


def _line(row: list[str], widths: list[int], right: Sequence[int]) -> str:
    cells = [
        cut(cell, wide).rjust(wide) if i in right else cut(cell, wide).ljust(wide)
        for i, (cell, wide) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells)


def cut(text: str, wide: int) -> str:
    """At most ``wide`` characters, the last of them … when there were more."""
    return text if len(text) <= wide else text[: wide - 1] + "…"


def reader_has_left() -> bool:
    """Whether standard output is a pipe whose reader is gone; if so, what is left to write goes nowhere.

    Asked after a BrokenPipeError, because one can also come from a network connection.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by something that is no file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    # Else the interpreter flushes once more at exit, and complains.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True
