"""How figures look on the pages: numbers with their units, and the geometry of small drawings. Pure, and text only.

The templates escape what comes from here as they do all else: nothing here makes HTML.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

UNKNOWN: Final = "\N{EN DASH}"
"""What stands for a figure that nobody knows."""

_PATIENT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Look:
    """How a state is shown: never by its colour alone.

    Attributes:
        word: what is written.
        tone: the style sheet's name of its colours: ``good``, ``busy``, ``warn``, ``bad``, ``calm``.
        icon: the name of its shape, a symbol of ``icons.svg``.
        rank: its place where sessions are listed; what needs somebody comes first.
    """

    word: str
    tone: str
    icon: str
    rank: int


_LOOKS: Final[Mapping[str, Look]] = {
    "failed": Look("failed", "bad", "cross", 0),
    "cancelling": Look("cancelling", "warn", "stop", 1),
    "pausing": Look("pausing", "warn", "pause", 1),
    "resuming": Look("resuming", "busy", "play", 1),
    "stopping": Look("stopping", "warn", "stop", 1),
    "executing": Look("executing", "good", "play", 1),
    "running": Look("running", "good", "play", 1),
    "initializing": Look("initializing", "busy", "dots", 1),
    "starting": Look("starting", "busy", "dots", 1),
    "opening": Look("opening", "busy", "dots", 1),
    "paused": Look("paused", "warn", "pause", 2),
    "idle": Look("idle", "calm", "ring", 3),
    "cancelled": Look("cancelled", "calm", "stop", 4),
    "completed": Look("completed", "done", "check", 5),
    "stopped": Look("stopped", "calm", "stop", 5),
    "closed": Look("closed", "good", "check", 1),
    "half_open": Look("half open", "warn", "half", 1),
    "open": Look("open", "bad", "cross", 0),
    "waiting": Look("waiting", "bad", "dots", 0),
    "retried": Look("retried", "done", "check", 1),
    "purged": Look("purged", "calm", "cross", 2),
    "silent": Look("silent", "bad", "cross", 0),
}


def look(state: str | None) -> Look:
    """How a session's, worker's, partition's, breaker's or dead letter's state is shown."""
    return _LOOKS.get(state or "", Look(state or "unknown", "calm", "ring", 3))


def count(number: float | None) -> str:
    """``12,345``."""
    return UNKNOWN if number is None else f"{number:,.0f}"


def rate(number: float | None) -> str:
    """Of something per second, without the unit: ``0.25``, ``8.4``, ``1,204``."""
    if number is None:
        return UNKNOWN
    if number == 0:
        return "0"
    if abs(number) < 1:
        return f"{number:.2f}"
    return f"{number:.1f}" if abs(number) < 100 else f"{number:,.0f}"


def latency(number: float | None) -> str:
    """How long a call takes: as :func:`seconds`, but nothing takes no time."""
    return "< 1 µs" if number is not None and number < 1e-6 else seconds(number)


def seconds(number: float | None) -> str:
    """A time span with its unit: ``80 µs``, ``42 ms``, ``1.30 s``, ``3 min 05 s``, ``2 h 07 min``, ``4 d 3 h``."""
    if number is None:
        return UNKNOWN
    if number < 0.9995:
        amount, unit = (number * 1e6, "µs") if number < 0.0009995 else (number * 1e3, "ms")
        return "0 ms" if not number else f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"
    if number < _PATIENT_SECONDS:
        return f"{number:.2f} s" if number < 10 else f"{number:.0f} s"
    minutes, rest = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(number: float | None) -> str:
    """Bytes: ``812 B``, ``3.1 KiB``."""
    if number is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def money(text: str | None) -> str:
    """An amount in the budget's currency, which rowmill does not know: ``1,234.56``; small ones with more digits."""
    if text is None:
        return UNKNOWN
    try:
        amount = Decimal(text)
    except InvalidOperation:
        return text
    if amount == 0:
        return "0"
    if abs(amount) >= 1:
        return f"{amount:,.2f}"
    return f"{amount:.6f}".rstrip("0") if abs(amount) >= Decimal("0.000001") else f"{amount:.2E}"


def percent(fraction: float | None) -> str:
    """``0.5`` as ``50 %``; a little is never ``0 %``, and not quite all never ``100 %``."""
    if fraction is None:
        return UNKNOWN
    value = fraction * 100
    if 0 < value < 1:
        return "< 1 %"
    if 99 < value < 100:
        return "> 99 %"
    return f"{value:.0f} %"


def plural(number: float | None, noun: str) -> str:
    """``1 row``, ``1,200 rows``, ``2 dead letters``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def utc(milliseconds: int | None) -> str:
    """A moment for people whose browser does not put it in their zone: ``2026-11-22 01:02:03 UTC``."""
    if milliseconds is None:
        return UNKNOWN
    return _moment(milliseconds).strftime("%Y-%m-%d %H:%M:%S UTC")


def machine_time(milliseconds: int | None) -> str:
    """A moment for ``<time datetime>``."""
    if milliseconds is None:
        return ""
    return _moment(milliseconds).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def milliseconds_of(text: str | None) -> int | None:
    """The moment that a text in RFC 3339 names; None for none, and for what is no moment."""
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1000) if text else None
    except ValueError:
        return None


def _moment(milliseconds: int) -> datetime:
    latest = 253_402_300_799_000  # the end of year 9999: producers may date their records as they like
    return datetime.fromtimestamp(min(max(milliseconds, 0), latest) / 1000, UTC)


@dataclass(frozen=True, slots=True)
class Spark:
    """A small line drawn over equal steps.

    Attributes:
        lines: points of each piece of the line, as SVG writes them; where a figure is unknown the line is broken.
        areas: what is below these pieces.
        highest: the greatest figure; 0 without any.
        last: the newest known one.
    """

    lines: tuple[str, ...]
    areas: tuple[str, ...]
    highest: float
    last: float | None


def spark(figures: Sequence[float | None], width: int = 120, height: int = 24) -> Spark:
    """The drawing of figures from old to new, in a box of that size, one pixel of air above and below."""
    known = [figure for figure in figures if figure is not None]
    highest = max(known, default=0.0)
    step = width / max(1, len(figures) - 1)
    scale = (height - 2) / highest if highest else 0.0
    lines, areas = [], []
    for first, piece in _pieces(figures):
        points = [(round((first + n) * step, 1), round(height - 1 - y * scale, 1)) for n, y in enumerate(piece)]
        if len(points) == 1:  # a lonely figure is a dash, or nobody would see it
            points.append((round(points[0][0] + step / 2, 1), points[0][1]))
        line = " ".join(f"{x:g},{y:g}" for x, y in points)
        lines.append(line)
        areas.append(f"{points[0][0]:g},{height} {line} {points[-1][0]:g},{height}")
    return Spark(tuple(lines), tuple(areas), float(highest), known[-1] if known else None)


def _pieces(figures: Sequence[float | None]) -> list[tuple[int, list[float]]]:
    pieces: list[tuple[int, list[float]]] = []
    for n, figure in enumerate(figures):
        if figure is None:
            continue
        if pieces and pieces[-1][0] + len(pieces[-1][1]) == n:
            pieces[-1][1].append(figure)
        else:
            pieces.append((n, [figure]))
    return pieces


def share(part: float | None, whole: float | None) -> float:
    """A part of a whole from 0 to 100, for bars; 0 where something is unknown."""
    return round(min(100.0, max(0.0, 100 * part / whole)), 1) if part and whole else 0.0


def dom_id(*words: Any) -> str:
    """A name for an element that stays the same from one page to the next, whatever characters the words have."""
    return "x" + hashlib.blake2b("\0".join(str(word) for word in words).encode(), digest_size=6).hexdigest()


def event_line(event: Mapping[str, Any]) -> str:
    """What an event's data say, in a line: messages first, then the other simple fields."""
    data = event.get("data")
    if not isinstance(data, Mapping):
        return ""
    parts = [str(data["message"])] if data.get("message") else []
    for name, value in data.items():
        if name == "message" or value is None or isinstance(value, Mapping):
            continue
        shown = ", ".join(map(str, value[:6])) + (" …" if len(value) > 6 else "") if isinstance(value, list) else value
        if shown != "":
            parts.append(f"{name.replace('_', ' ')} {shown}")
    return " · ".join(parts)


def stage_line(counts: Mapping[str, float]) -> str:
    """What a stage's policies did, in a line; nothing of what did not happen."""
    words = {
        "retries": "retried", "timeouts": "timed out", "hits": "cached", "defaulted": "with fallback",
        "refused": "refused", "passed_by": "passed by",
    }  # fmt: skip
    return " · ".join(f"{count(counts[name])} {word}" for name, word in words.items() if counts.get(name))


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "count": count,
    "dom_id": dom_id,
    "event_line": event_line,
    "iso": machine_time,
    "latency": latency,
    "look": look,
    "money": money,
    "ms_of": milliseconds_of,
    "percent": percent,
    "plural": plural,
    "rate": rate,
    "seconds": seconds,
    "size": size,
    "spark": spark,
    "stage_line": stage_line,
    "utc": utc,
}
"""Those of the templates, by the names that they have there. Some stand in for Jinja's own of the same name."""
