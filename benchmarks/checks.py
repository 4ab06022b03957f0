"""Whether results are right: every figure stands on one of these, read from the sink after the process has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from .rows import Row


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in a sink.

    Attributes:
        repeated: results that came more often than once.
        complaint: what is wrong; empty if nothing is. Repeated results are wrong for those who promise each once.
    """

    repeated: int
    complaint: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be there.

    Attributes:
        count: rows, numbered from 0.
        result: by a row's number.
        key: by a row's number.
        is_exact: whether each result must be there once, or may be there more often.
    """

    count: int
    result: Callable[[int], Row]
    key: Callable[[int], bytes]
    is_exact: bool


async def judge(expected: Expected, runs: AsyncIterable[Sequence[Any]]) -> Verdict:
    """Compare content, number and order of results: those of one key stand in one partition, in the rows' order."""
    times = bytearray(expected.count)
    last: dict[bytes, tuple[int, int]] = {}
    wrong: Counter[str] = Counter()
    sample = ""
    async for records in runs:
        for record in records:
            number, fault = _examine(expected, record, times, last)
            if fault:
                wrong[fault] += 1
                sample = sample or f"row {number}: {record.key!r} {record.value[:300]!r}"
    repeated = sum(seen - 1 for seen in times if seen)
    if lost := times.count(0):
        wrong["lost"] += lost
    if repeated and expected.is_exact:
        wrong["repeated"] += repeated
    told = ", ".join(f"{count:,} {what}" for what, count in wrong.items())
    return Verdict(repeated, f"{told} of {expected.count:,} ({sample or 'no sample'})" if wrong else "")


def _examine(expected: Expected, record: Any, times: bytearray, last: dict[bytes, tuple[int, int]]) -> tuple[int, str]:
    """The number of a result, and what is wrong with it."""
    found = orjson.loads(record.value)
    number = found.get("id", -1)
    if not 0 <= number < expected.count:
        return number, "unknown"
    times[number] = min(255, times[number] + 1)
    if record.key != expected.key(number):
        return number, "with another key"
    if found != expected.result(number):
        return number, "with other content"
    if times[number] > 1:
        return number, ""
    partition, before = last.get(record.key, (record.partition, -1))
    last[record.key] = (record.partition, number)
    if partition != record.partition:
        return number, "in another partition than their key's"
    return number, "out of order" if number < before else ""
