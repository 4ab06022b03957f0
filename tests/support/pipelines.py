"""Small pipelines for tests that start processes: ``pipelines.py:NAME``, told by the environment what to be called.

``ROWMILL_TEST_NAME`` is the pipeline's name, ``ROWMILL_TEST_CALLS`` a file to which each handler call appends the
row's number: what was really run, also by processes that were killed.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from rowmill import Pipeline

NAME = os.environ.get("ROWMILL_TEST_NAME", "test")
CALLS = os.environ.get("ROWMILL_TEST_CALLS")


def called(row: dict[str, Any]) -> None:
    """Note a call, in one write, so that lines of several processes do not mix."""
    if CALLS:
        with Path(CALLS).open("a", encoding="utf-8") as file:
            file.write(f"{row['n']}\n")


doubled = Pipeline(NAME, source=NAME, sink=f"{NAME}.out")


@doubled.stage
def double(row: dict[str, Any]) -> dict[str, Any]:
    """A thousand rows take about a second, so that a kill hits work in progress."""
    called(row)
    time.sleep(0.0005)
    return {**row, "twice": row["n"] * 2}


mixed = Pipeline(f"{NAME}-mixed", source=f"{NAME}-mixed", sink=f"{NAME}-mixed.out")


@mixed.stage
def sort_out(row: dict[str, Any]) -> Any:
    """Every tenth row is dropped, every seventh fails, every fifth gives two results."""
    called(row)
    time.sleep(0.0001)
    n = row["n"]
    if n % 10 == 0:
        return None
    if n % 7 == 0:
        raise ValueError(f"seven divides {n}")
    return [row, {**row, "again": True}] if n % 5 == 0 else row


@mixed.stage
async def settle(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
    """Sends every row to a side topic as well."""
    ctx.emit(f"{NAME}-mixed.side", {"n": row["n"]}, key=str(row["n"]))
    return row


def mixed_oracle(numbers: range) -> tuple[list[int], list[int], int]:
    """What ``mixed`` must give: the results' numbers in order, the failed ones, and how many were dropped."""
    failed = [n for n in numbers if n % 10 and n % 7 == 0]
    results = [n for n in numbers if n % 10 and n % 7 for _ in range(2 if n % 5 == 0 else 1)]
    return results, failed, sum(1 for n in numbers if n % 10 == 0)


unordered = Pipeline(f"{NAME}-async", source=f"{NAME}-async", sink=f"{NAME}-async.out")


@unordered.stage(concurrency=50)
async def wait_some(row: dict[str, Any]) -> dict[str, Any]:
    """Every fiftieth row takes half a second, the others a few milliseconds: rows complete out of order."""
    called(row)
    await asyncio.sleep(0.5 if row["n"] % 50 == 0 else 0.002 + row["n"] % 7 * 0.001)
    return row


counted = Pipeline(f"{NAME}-counted", source=f"{NAME}-counted", sink=f"{NAME}-counted.out").table("counts")


@counted.stage(concurrency=20)
async def count(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
    """Numbers the rows of each key, and counts all rows and their cost; every thirteenth fails after it wrote."""
    called(row)
    table = ctx.table("counts")
    number = table.get(ctx.key, 0) + 1
    table.add("all")
    ctx.add_cost("0.1", tokens=3)
    await asyncio.sleep(0.001 + row["n"] % 7 * 0.001)
    if row["n"] % 13 == 0:
        table.put("failed", row["n"])
        raise ValueError("thirteen")
    table.put(ctx.key, number)
    return {**row, "number": number}


deadly = Pipeline(f"{NAME}-deadly", source=f"{NAME}-deadly", sink=f"{NAME}-deadly.out")


@deadly.stage(concurrency=10)
async def survive(row: dict[str, Any]) -> dict[str, Any]:
    """Row 13 ends the process, as a crash of a native library does."""
    called(row)
    await asyncio.sleep(0.005)
    if row["n"] == 13:
        os._exit(9)
    return row


deadly_plain = Pipeline(f"{NAME}-plain", source=f"{NAME}-plain", sink=f"{NAME}-plain.out")


@deadly_plain.stage
def survive_plainly(row: dict[str, Any]) -> dict[str, Any]:
    """The same in a chain of plain functions."""
    called(row)
    if row["n"] == 13:
        os._exit(9)
    return row


minute = Pipeline(NAME, source=NAME, sink=f"{NAME}.out")


@minute.stage(concurrency=40)
async def take_a_minute(row: dict[str, Any]) -> dict[str, Any]:
    """From the 20th row on it takes a minute: half of these as a coroutine, half as a blocking call that none stops."""
    called(row)
    if row["n"] >= 30:
        await asyncio.sleep(60)
    elif row["n"] >= 20:
        await asyncio.to_thread(time.sleep, 60)
    return row


quick = Pipeline(NAME, source=NAME, sink=f"{NAME}.out")


@quick.stage(name="take_a_minute")
async def at_once(row: dict[str, Any]) -> dict[str, Any]:
    """The same stage, mended."""
    called(row)
    return row
