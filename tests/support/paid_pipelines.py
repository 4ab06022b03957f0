"""Pipelines with a paid stage behind a real HTTP client, for tests in this process and in others: ``…:paid``.

Processes are told by the environment: ``ROWMILL_TEST_NAME``, the pipeline's name; ``ROWMILL_TEST_URL``, the service;
``ROWMILL_TEST_CACHE``, ``own`` or ``shared``; ``ROWMILL_TEST_BUDGET``, an amount. Each call costs 1.
"""

from __future__ import annotations

import os
import time
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp
from rowmill import Budget, Cache, Pipeline
from rowmill.handlers.runtime import Runtime

from support.flaky_server import BEGUN_HEADER

_CLIENTS: WeakKeyDictionary[Runtime, aiohttp.ClientSession] = WeakKeyDictionary()


def client(runtime: Runtime) -> aiohttp.ClientSession:
    """The worker's HTTP client: one per worker, closed with it."""
    session = _CLIENTS.get(runtime)
    if session is None:
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        _CLIENTS[runtime] = session
        runtime.at_close(session.close)
    return session


async def ask(url: str, row: dict[str, Any], ctx: Any) -> dict[str, Any]:
    """One call. ``POST``: aiohttp would repeat other requests by itself when a connection breaks."""
    headers = {BEGUN_HEADER: repr(time.monotonic())}
    async with client(ctx.runtime).post(url, json={"n": row["n"]}, headers=headers) as response:
        response.raise_for_status()
        return {**row, **await response.json()}


def paid_pipeline(name: str, url: str, *, budget: str | None = None, **policies: Any) -> Pipeline:
    """One stage, ``pay``, with these policies and the price 1."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out", budget=Budget(budget) if budget else None)

    @pipeline.stage(price=1, **policies)
    async def pay(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        return await ask(url, row, ctx)

    return pipeline


def _from_environment() -> Pipeline:
    told = {key: os.environ.get(f"ROWMILL_TEST_{key}") for key in ("NAME", "URL", "CACHE", "BUDGET", "CONCURRENCY")}
    caches = {"own": Cache(), "shared": Cache(shared=True)}
    return paid_pipeline(
        told["NAME"] or "test",
        told["URL"] or "",
        budget=told["BUDGET"],
        cache=caches.get(told["CACHE"] or ""),
        concurrency=int(told["CONCURRENCY"] or 20),
    )


paid = _from_environment()
