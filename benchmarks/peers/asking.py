"""One HTTP call, the same for the pipeline and for the bare loop that it is compared with."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson


def make_client() -> aiohttp.ClientSession:
    """A client whose connections are as many as the calls at once (its default is 100)."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def answer_of(client: aiohttp.ClientSession, server: str, number: int) -> Any:
    """What the server says about a number."""
    async with client.get(f"{server}/{number}") as response:
        return orjson.loads(await response.read())["answer"]
