"""Pipelines that the console is looked at with, called as the environment says; ``ROWMILL_TEST_FIXED`` is a file that
means: the bug is mended."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from rowmill import Pipeline

NAME = os.environ.get("ROWMILL_TEST_NAME", "test")
FIXED = Path(os.environ.get("ROWMILL_TEST_FIXED", "fixed"))
EVIL = '<script>window.evil=1</script><img src=x onerror="window.evil=2">\'"&{{7*7}}'

steady = Pipeline(NAME, source=NAME, sink=f"{NAME}.out")


@steady.stage(concurrency=8)
async def settle(row: dict[str, Any]) -> dict[str, Any]:
    """Some hundred rows in a second."""
    await asyncio.sleep(0.02)
    return row


mended = Pipeline(NAME, source=NAME, sink=f"{NAME}.out")


@mended.stage
def check(row: dict[str, Any]) -> dict[str, Any]:
    """Every fifth row fails while there is the bug."""
    if row["n"] % 5 == 0 and not FIXED.exists():
        raise ValueError(f"row {row['n']} is one of five")
    return {**row, "checked": True}


EvilError = type(EVIL, (Exception,), {})

evil = Pipeline(NAME, source=NAME, sink=f"{NAME}.out")


@evil.stage
def burst(row: dict[str, Any]) -> dict[str, Any]:
    """Every row fails, with markup wherever an error has text."""
    raise EvilError(EVIL)
