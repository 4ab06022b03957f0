"""What becomes of a row, told by the row alone, so that the handler and the oracle cannot disagree."""

from __future__ import annotations

from typing import Any, NamedTuple

LUCK = 1 << 32
"""Rows carry a number below this, ``luck``, drawn when they are published."""

TABLE = "counts"
NO_KEY = "-"
"""Under this entry the table counts a partition's rows without a key."""


class Fate(NamedTuple):
    """How long the handler takes in seconds, and what it does then; a deadly row kills its process instead."""

    seconds: float
    fails: bool
    parts: int
    emits: bool
    deadly: bool


def fate(row: dict[str, Any]) -> Fate:
    """The row's fate: most take 0 to 5 ms, one in 200 up to 100 ms; 3 % fail, 8 % are dropped, 10 % are split."""
    luck = int(row["luck"])
    kind, rest = luck % 100, luck // 100
    fraction, rest = rest % 1000 / 1000, rest // 1000
    seconds = fraction * (0.1 if rest % 200 == 0 else 0.005)
    parts = 0 if kind < 8 else 2 if kind < 18 else 1
    return Fate(seconds, kind >= 97, parts, emits=kind % 10 == 3, deadly=bool(row.get("deadly")))


def results(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What the sink gets."""
    return [{"n": row["n"], "part": part} for part in range(fate(row).parts)]


def side(row: dict[str, Any]) -> dict[str, Any]:
    """What an emitting row sends to the side topic."""
    return {"n": row["n"], "side": True}


def complaint(row: dict[str, Any]) -> str:
    """What a failing row's error says."""
    return f"row {row['n']} was to fail"
