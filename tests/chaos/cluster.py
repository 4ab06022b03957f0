"""The Kafka under test: one node with a second listener that is reached through the proxy."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from support.kafka_server import HOST, KafkaServer, free_port

from .proxy import APIS


class ProxiedKafka(KafkaServer):
    """A node that advertises the proxy's port to whoever comes through the proxy, and its own to all others."""

    def __init__(self) -> None:
        super().__init__(heap="768m")
        self.behind_port = free_port()
        self.proxy_port = free_port()

    def _settings(self, bind: str) -> dict[str, str]:
        settings = super()._settings(bind)
        settings["listeners"] += f",PROXIED://{bind}:{self.behind_port}"
        settings["advertised.listeners"] += f",PROXIED://{HOST}:{self.proxy_port}"
        settings["listener.security.protocol.map"] += ",PROXIED:PLAINTEXT"
        return settings


class ProxyProcess:
    """The proxy, started and driven from here."""

    def __init__(self, port: int, target: int) -> None:
        self.bootstrap = f"{HOST}:{port}"
        self.swallowed = 0
        self._ports = (str(port), str(target))
        self._process: Process | None = None
        self._told = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run it; returns when it listens."""
        script = str(Path(__file__).with_name("proxy.py"))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, script, *self._ports, stdin=PIPE, stdout=PIPE
        )
        assert self._process.stdout is not None
        await self._process.stdout.readline()
        self._listening = asyncio.create_task(self._listen(self._process.stdout))

    async def _listen(self, output: asyncio.StreamReader) -> None:
        while line := await output.readline():
            self.swallowed += "swallowed" in json.loads(line)
            self._told.set()

    async def swallow(self, api: str, times: int, then: str, patience: float = 30) -> int:
        """Swallow the next replies; returns how many fell within the patience."""
        assert self._process is not None
        assert self._process.stdin is not None
        rule = {"api": APIS[api], "times": times, "then": then}
        wanted, before = self.swallowed + times, self.swallowed
        self._process.stdin.write(json.dumps(rule).encode() + b"\n")
        try:
            async with asyncio.timeout(patience):
                while self.swallowed < wanted:
                    self._told.clear()
                    await self._told.wait()
        except TimeoutError:
            self._process.stdin.write(json.dumps({**rule, "times": 0}).encode() + b"\n")
        return self.swallowed - before

    async def close(self) -> None:
        """End it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                async with asyncio.timeout(3):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._listening is not None:
            self._listening.cancel()
