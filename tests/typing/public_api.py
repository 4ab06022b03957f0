"""What type checkers have to see in the public API. Not run: mypy reads it, and each line must hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, assert_type

import pandas as pd
from rowmill import (
    ConfigError,
    ExecutionResult,
    Message,
    Pipeline,
    RowContext,
    RowmillError,
    Session,
    Stage,
    WorkerOptions,
    open_broker,
    publish,
    read,
)
from rowmill.streams.brokers.base import Broker

pipeline = Pipeline("p", source=["a", "b"], sink="c", start="latest", tombstones="forward", keys="bytes")


@pipeline.stage
def bare(row: dict[str, Any]) -> dict[str, Any] | None:
    """Used without parentheses."""
    return row


@pipeline.stage(timeout=5)
async def awaited(row: dict[str, Any], ctx: RowContext) -> list[dict[str, Any]]:
    """Used with options."""
    ctx.emit("side", row, key="k", headers={"h": b"x"})
    assert_type(ctx.key, str | bytes | None)
    ctx.key = b"other"
    return [row]


@pipeline.stage(frame=True, batch=10)
def framed(frame: pd.DataFrame) -> pd.DataFrame:
    """Takes frames."""
    return frame


# A decorated function is still the function it was.
assert_type(bare({}), dict[str, Any] | None)
assert_type(framed(pd.DataFrame()), pd.DataFrame)
kept: Callable[[dict[str, Any], RowContext], Awaitable[list[dict[str, Any]]]] = awaited

assert_type(pipeline.add(bare, name="again").add(awaited, timeout=1.5), Pipeline)
assert_type(pipeline.stages, tuple[Stage, ...])
assert_type(pipeline.process({"a": 1}, key=b"k"), list[dict[str, Any]])
assert_type(pipeline.run([{"a": 1}], options=WorkerOptions(commit_rows=5)), ExecutionResult)
assert_type(pipeline.run(pd.DataFrame()).data, pd.DataFrame)
assert_type(publish("t", [{"a": 1}], key="a"), int)
assert_type(read("t", start="earliest", limit=5), Iterator[Message])
assert_type(open_broker("local://x"), Broker)
assert_type(Session("p").group, str)

for chunk in pipeline.stream(({"n": n} for n in range(5)), chunk_size=2):
    assert_type(chunk, pd.DataFrame)

caught: type[RowmillError] = ConfigError

# What must not pass: each of these ignores an error that mypy has to find (unused ignores are errors).
pipeline.stage(batch="10")  # type: ignore[call-overload]
pipeline.stage(colour="red")  # type: ignore[call-overload]
pipeline.add(bare, batch="10")  # type: ignore[arg-type]
Pipeline("p", keys="json")  # type: ignore[arg-type]
Pipeline("p", start="beginning")  # type: ignore[arg-type]
Pipeline("p", "positional")  # type: ignore[call-arg]
publish("t", 5)  # type: ignore[arg-type]
WorkerOptions(threads="8")  # type: ignore[arg-type]
bare(5)  # type: ignore[arg-type]
