"""The rows that everybody works on, and what must come out. Standard library only: every peer imports it."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

SMALL, LARGE = 80, 1_000
"""Sizes of rows in bytes of JSON, near enough."""
_FIELDS = 9
"""Texts that make a large row."""


def key_of(number: int, keys: int) -> bytes:
    """The key of a row; those of one key are far apart."""
    return f"key-{number * 7_919 % keys:06d}".encode()


def row_of(number: int, size: int = SMALL) -> Row:
    """A row by its number."""
    row = {"id": number, "price": number % 977, "quantity": number % 13, "name": f"row {number:08d}", "open": True}
    if size >= LARGE:
        row |= {
            f"note_{field}": f"{number + field:08d} is what this long text begins with; " * 2
            for field in range(_FIELDS)
        }
    return row


def result_of(row: Row) -> Row:
    """What each application makes of a row: one field more."""
    return {**row, "total": row["price"] * row["quantity"]}
