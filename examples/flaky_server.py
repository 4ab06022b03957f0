"""A small service that behaves as services do on a bad day: 429, 500, silence, torn connections, rubbish.

    python examples/flaky_server.py

serves on http://127.0.0.1:8765 until Ctrl-C.
"""

import asyncio
import random
import sys

from aiohttp import web

PORT = 8765


class FlakyServer:
    """Tells which of three categories a text belongs to, if it feels like it. Counts its calls."""

    def __init__(self, seed=1, port=0):
        self.calls = 0
        self.faults = 0
        self.url = None
        self._port = port
        self._random = random.Random(seed)  # noqa: S311 - mischief that can be repeated
        self._runner = None

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/classify", self.classify)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def classify(self, request):
        """One call in ten goes wrong; once in a thousand calls everybody is told to wait a second."""
        self.calls += 1
        text = (await request.json())["text"]
        await asyncio.sleep(0.005)
        if "?" in text:
            return web.Response(status=422)  # "I cannot tell": trying again is of no use
        luck = 0.0 if self.calls % 1000 == 500 else self._random.uniform(0.001, 1)
        self.faults += luck < 0.1
        if luck < 0.001:
            return web.Response(status=429, headers={"Retry-After": "1"})
        if luck < 0.05:
            return web.Response(status=500)
        if luck < 0.06:
            await asyncio.sleep(3600)
        if luck < 0.08:
            request.transport.abort()
        if luck < 0.09:
            return web.Response(text="<html>welcome</html>")
        if luck < 0.1:
            return web.json_response({"category": 42})
        return web.json_response({"category": ("books", "films", "music")[len(text) % 3]})


async def main():
    async with FlakyServer(port=PORT) as server:
        print(f"serving on {server.url} until Ctrl-C")
        await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(0)
