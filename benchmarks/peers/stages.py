"""P2, in a process of its own: what a chain of plain stages costs above calling its functions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import reduce
from typing import Any

from rowmill.handlers.chain import Chain
from rowmill.handlers.stage import make_stage

FURTHER = 20
"""Stages after the first."""


def main() -> None:
    count = int(sys.argv[1])
    one, many = best(count, run_stages(1)), best(count, run_stages(1 + FURTHER))
    calls = best(count, run_calls(FURTHER)) - best(count, run_calls(0))
    print(
        json.dumps({"above": (many - one - calls) / FURTHER, "stage": (many - one) / FURTHER, "call": calls / FURTHER})
    )


def best(count: int, run: Callable[[list[Any]], list[Any]]) -> float:
    """Microseconds of processor time a row, the best of five; each row must have been through everything."""
    taken = []
    for _ in range(5):
        rows = [{"id": number, "steps": 0} for number in range(count)]
        began = time.process_time()
        rows = run(rows)
        taken.append((time.process_time() - began) / count * 1e6)
        if [row["id"] for row in rows] != list(range(count)):
            raise SystemExit("the rows are not those that went in")
    return min(taken)


def make_step() -> Callable[[Any], Any]:
    return lambda row: row


def run_stages(number: int) -> Callable[[list[Any]], list[Any]]:
    check_all_run(number)
    chain = Chain([make_stage(make_step(), name=f"step-{which}") for which in range(number)])

    def run(rows: list[Any]) -> list[Any]:
        chain.run_sync(rows, None)
        return rows

    return run


def run_calls(number: int) -> Callable[[list[Any]], list[Any]]:
    """The same functions called one in the other, without any loop around them."""
    steps = {f"step_{which}": make_step() for which in range(number)}
    nested = reduce(lambda inside, name: f"{name}({inside})", steps, "row")
    run: Callable[[list[Any]], list[Any]] = eval(f"lambda rows: [{nested} for row in rows]", steps)  # noqa: S307
    return run


def check_all_run(number: int) -> None:
    """A chain made the same way, of stages that count: so all of them are run."""

    def count(row: Any) -> Any:
        return {**row, "steps": row["steps"] + 1}

    rows: list[Any] = [{"id": 0, "steps": 0}]
    Chain([make_stage(count, name=f"step-{which}") for which in range(number)]).run_sync(rows, None)
    if rows[0]["steps"] != number:
        raise SystemExit(f"{rows[0]['steps']} of {number} stages ran")


if __name__ == "__main__":
    main()
