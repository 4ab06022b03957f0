"""rowmill's pipelines, one for each job, as a user would write them; ``rowmill worker`` runs them with its defaults."""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakKeyDictionary

from rowmill import Pipeline

from benchmarks.child import begin_once, burn, compute, settings
from benchmarks.rows import Row, result_of

_said = settings()


def _pipeline() -> Pipeline:
    return Pipeline(_said.name, source=_said.source, sink=_said.sink)


plain = _pipeline()
plain.add(compute, name="compute")

burned = _pipeline()
burned.add(burn, name="burn")

counted = _pipeline().table("counts")


@counted.stage
def count(row: Row, ctx: Any) -> Row:
    """Number the rows of each key."""
    begin_once()
    table = ctx.table("counts")
    number = table.get(ctx.key, 0) + 1
    table.put(ctx.key, number)
    return {**row, "number": number}


gave_way = _pipeline()


@gave_way.stage(concurrency=_said.concurrency)
async def give_way(row: Row) -> Row:
    """Wait for nothing, as cheaply as one can wait."""
    begin_once()
    await asyncio.sleep(0)
    return result_of(row)


asked = _pipeline()
_clients: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@asked.stage(concurrency=_said.concurrency)
async def ask(row: Row, ctx: Any) -> Row:
    """Ask the server about the row."""
    from benchmarks.peers.asking import answer_of, make_client

    begin_once()
    if ctx.runtime not in _clients:
        _clients[ctx.runtime] = make_client()
        ctx.runtime.at_close(_clients[ctx.runtime].close)
    return {**row, "answer": await answer_of(_clients[ctx.runtime], _said.server, row["id"])}
