"""Asks a paid, flaky HTTP service about each row, and pays no more than it must.

    python examples/enrich_http.py             # starts a flaky service of its own, asks it, prints what happened

or, as a job over a file, with the service in another terminal:

    python examples/flaky_server.py
    rowmill run examples/enrich_http.py --input examples/data/reviews.csv --output enriched.csv
"""

import asyncio
import logging
import os
from tempfile import TemporaryDirectory
from typing import TypedDict
from weakref import WeakKeyDictionary

import aiohttp
from rowmill import Budget, Cache, CircuitBreaker, Pipeline, RateLimit, Retry

SERVICE = os.environ.get("CLASSIFY_URL", "http://127.0.0.1:8765")
PRICE = "0.002"

enrich = Pipeline("enrich", budget=Budget("20.00"))
clients = WeakKeyDictionary()


def client(ctx):
    """One HTTP client per worker, with connections that are used again; it is closed with the worker."""
    if ctx.runtime not in clients:
        clients[ctx.runtime] = aiohttp.ClientSession()
        ctx.runtime.at_close(clients[ctx.runtime].close)
    return clients[ctx.runtime]


@enrich.stage
def check(row):
    """A row without any text is somebody's mistake: it becomes a dead letter, and costs nothing."""
    if not row.get("text"):
        raise ValueError("this row has no text")
    return row


class Enriched(TypedDict):
    """What an answer must have; anything else counts as a failed call."""

    text: str
    category: str


@enrich.stage(
    concurrency=50,  # calls at once
    limit=RateLimit(per_second=500, burst=20),  # calls per second, retries included; obeys Retry-After
    timeout=1.0,  # seconds for one call
    retry=Retry(attempts=5, first=0.1, cap=1.0),  # with growing, random pauses; not for 4xx
    breaker=CircuitBreaker(failures=20, open_for=2.0),  # rows wait while the service is down
    cache=Cache(parameters={"model": "small-1"}),  # an answer is paid for once: also after a kill -9, or run again
    price=PRICE,  # each call, set aside before it is made
    output=Enriched,  # rubbish is a failed call as well
    on_error={"category": None},  # what rows get whose calls failed for good; without it they become dead letters
)
async def classify(row, ctx):
    """The call itself. POST, because aiohttp repeats GET by itself when a connection breaks: calls nobody counts."""
    async with client(ctx).post(f"{SERVICE}/classify", json={"text": row["text"]}) as response:
        response.raise_for_status()
        answer = await response.json()
    return {**row, "category": answer["category"]}


def rows(count):
    """Made-up rows: of a hundred, two are hard to tell, and one is empty."""
    for n in range(count):
        yield {"id": n, "text": "" if n % 100 == 99 else f"Is this {n}?" if n % 50 == 7 else f"Review number {n}"}


async def main(count=2_000):
    """Run it all in this process, twice, and tell what happened."""
    from flaky_server import FlakyServer

    global SERVICE  # noqa: PLW0603 - the service's port is known only now
    with TemporaryDirectory() as folder:
        async with FlakyServer() as server:
            SERVICE = server.url
            result = await enrich.run_async(rows(count), broker=f"local://{folder}")
            report(result, server)
            calls = server.calls
            again = await enrich.run_async(rows(count), broker=f"local://{folder}")
            print(f"\nOnce more: {server.calls - calls:,} calls, cost {again.costs.total_cost}; the rest is known.")
    return result, again, calls, server


def report(result, server):
    """Where the rows went, and what it cost."""
    figures, stage = result.metrics, result.stages["classify"]
    print(f"rows            {figures.total_rows:8,}")
    print(f"  results       {figures.results:8,}   of these without a category: {figures.defaulted_rows:,}")
    print(f"  dead letters  {figures.failed_rows:8,}   the first: {result.errors[0].error_message}")
    print(f"calls           {server.calls:8,}   {server.calls / figures.total_rows:.2f} per row")
    print(f"  went wrong    {server.faults:8,}   retries: {stage['retries']:,}, time-outs: {stage['timeouts']:,}")
    print(f"cost            {result.costs.total_cost:>8}   at {PRICE} a call")
    print(f"time            {result.duration.total_seconds():8.1f} s")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main())
