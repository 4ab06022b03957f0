"""JSON in, JSON out: the one file that knows orjson.

``decode`` refuses what could not be written again or would silently change: see ``docs/decisions/0006``.
FACTS: orjson accepts depth 1,024 on the way in but about 254 on the way out, turns integers from 2^64 into
floats, and NaN into null.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import orjson

from .errors import BadRowError
from .model import Row

MAX_DEPTH = 128
"""Nesting allowed in a row, counting the row itself. Well below what orjson can write (about 254)."""

# Nineteen digits in a row are the shortest text of an integer that may not fit in 64 bits; almost no row has
# them. Turning every digit into a zero and looking for nineteen zeros costs 0.2 µs for 90 bytes and 0.7 µs for
# 1 KB here; the regular expression [0-9]{19} cost 0.8 and 8.9 µs.
_DIGITS_TO_ZERO = bytes.maketrans(b"0123456789", b"0000000000")
_LONG_DIGITS = b"0" * 19
_ONLY_DICTS = {dict}
_TOGETHER = 64
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


def decode(value: bytes | None, max_bytes: int, max_depth: int = MAX_DEPTH) -> Row:
    """The row that a record's value holds.

    Args:
        value: the record's value as it came; None is a tombstone.
        max_bytes: longest value accepted, checked before anything is parsed.
        max_depth: deepest nesting accepted, the row itself counting as 1.

    Raises:
        BadRowError: with a ``kind`` of null_value, too_large, not_json, not_an_object, too_deep or
            integer_out_of_range.
    """
    if value is None:
        raise BadRowError("null_value", "the value is null (a tombstone); a row is a JSON object")
    if len(value) > max_bytes:
        raise BadRowError("too_large", f"the value has {len(value):,} bytes, above max_row_bytes={max_bytes:,}")
    try:
        row = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise _not_json(value, error) from None
    if type(row) is not dict:
        raise BadRowError("not_an_object", f"the value is a JSON {_json_type(row)}; a row is a JSON object")
    _check(value, row, max_depth)
    return row


def _check(value: bytes, row: Row, max_depth: int) -> None:
    # No value nests deeper than it has opening brackets: counting them settles almost every row.
    if _brackets(value) > max_depth:
        _check_depth(row, max_depth)
    if _LONG_DIGITS in value.translate(_DIGITS_TO_ZERO):
        _check_integers(value)


def decode_all(values: Sequence[bytes | None], max_bytes: int, max_depth: int = MAX_DEPTH) -> list[Row] | None:
    """The rows of a whole lot; None where anything about one of them needs :func:`decode`'s closer look.

    The same checks, made once for all: 0.5 µs a row of 90 bytes here, where ``decode`` takes 0.9.
    """
    try:
        if max(map(len, values), default=0) > max_bytes:  # type: ignore[arg-type]  # a tombstone is a TypeError
            return None
        rows = list(map(orjson.loads, values))  # type: ignore[arg-type]
    except (TypeError, orjson.JSONDecodeError):
        return None
    if not all_dicts(rows):
        return None
    for start in range(0, len(values), _TOGETHER):  # not all at once: a few kilobytes stay in the processor's cache
        some: Sequence[Any] = values[start : start + _TOGETHER]
        text: bytes = b"".join(some)
        if _brackets(text) > max_depth or _LONG_DIGITS in text.translate(_DIGITS_TO_ZERO):
            try:
                for value, row in zip(some, rows[start:], strict=False):
                    _check(value, row, max_depth)
            except BadRowError:
                return None
    return rows


def all_dicts(rows: Collection[object]) -> bool:
    """Whether there is nothing but rows here: no failure, no list of several, nothing that was dropped."""
    return set(map(type, rows)) <= _ONLY_DICTS


def encode(row: Any) -> bytes:
    """A row as compact JSON. numpy scalars and arrays, dates and UUIDs are written as orjson does.

    Raises:
        BadRowError: ``unserialisable``, naming the type that JSON has no form for.
    """
    return encode_all((row,))[0]


def encode_all(rows: Iterable[Any]) -> list[bytes]:
    """As :func:`encode`, for all rows of a lot.

    What orjson gives is copied, which is cheap and saves much. It writes into a large buffer and leaves the result in
    it, or in what remains when the rest is given back: rows that wait for their commit would each hold a page, touched
    for the first time, or lie between holes that fit nothing else. A list of 2,000 results of 80 bytes costs 2.7 µs
    a row without the copy and 0.3 with it (orjson 3.13); a plain pipeline had four times the memory.
    """
    try:
        return [b"%b" % orjson.dumps(row, _other, orjson.OPT_SERIALIZE_NUMPY) for row in rows]
    except (orjson.JSONEncodeError, RecursionError) as error:
        raise BadRowError("unserialisable", f"the result cannot be written as JSON: {error}") from None


def _other(value: Any) -> Any:
    """What orjson has no form for but people expect one: dates and durations of pandas, and its missing values."""
    isoformat = getattr(value, "isoformat", None)
    if isoformat is None:
        raise TypeError(f"Type is not JSON serializable: {type(value).__name__}; make it str, int, float, list or dict")
    return isoformat() if value == value else None  # noqa: PLR0124 - NaT differs from itself


def dumps(value: Any) -> bytes:
    """Any JSON value of rowmill's own (no caps): checkpoints, summaries, machine-readable output."""
    return orjson.dumps(value)


def loads(text: bytes | str) -> Any:
    """The counterpart of :func:`dumps`; raises ValueError for what is no JSON."""
    return orjson.loads(text)


def _not_json(value: bytes, error: orjson.JSONDecodeError) -> BadRowError:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as bad:
        return BadRowError("invalid_utf8", f"the value is not UTF-8: {bad.reason} at byte {bad.start}")
    return BadRowError("not_json", f"the value is not JSON: {error}")


def _json_type(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "null")


def _brackets(text: bytes) -> int:
    """How many open. That there is none is found at once; counting looks at each byte."""
    return text.count(b"{") + (text.count(b"[") if b"[" in text else 0)


def _check_depth(row: Row, max_depth: int) -> None:
    level: list[Any] = [row]
    depth = 0
    while level:
        depth += 1
        if depth > max_depth:
            raise BadRowError("too_deep", f"the value nests deeper than {max_depth} levels")
        children: list[Any] = []
        for node in level:
            inside = node.values() if isinstance(node, dict) else node
            children += [child for child in inside if isinstance(child, (dict, list))]
        level = children


def _check_integers(value: bytes) -> None:
    def read(digits: str) -> int:
        # More than 20 characters cannot fit; int() itself refuses above 4,300 digits.
        if len(digits) > 20 or not _INT_MIN <= int(digits) <= _INT_MAX:
            raise BadRowError(
                "integer_out_of_range",
                f"the integer {digits[:24]}{'…' if len(digits) > 24 else ''} does not fit in 64 bits; "
                "send it as a string",
            )
        return 0

    json.loads(value, parse_int=read)
