"""A TCP proxy before Kafka that swallows replies to chosen requests; a process of its own, driven by JSON lines.

``{"api": 26, "times": 2, "then": "close"}`` on its input swallows the next two replies to EndTxn requests, and closes
each one's connection; ``"stall"`` leaves the connection open and silent instead. Every swallowed reply is told on its
output as ``{"swallowed": 26}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
from typing import Any

HOST = "127.0.0.1"
APIS = {"Produce": 0, "OffsetFetch": 9, "AddOffsetsToTxn": 25, "EndTxn": 26, "TxnOffsetCommit": 28}
_HEAD = struct.Struct(">hhi")


class Proxy:
    """Frames from clients to Kafka and back; at most one rule at a time."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._api = -1
        self._left = 0
        self._then = "close"

    def obey(self, rule: dict[str, Any]) -> None:
        """A new rule replaces the old one."""
        self._api, self._left, self._then = int(rule["api"]), int(rule["times"]), str(rule["then"])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side or a rule ends it."""
        try:
            kafka_reader, kafka_writer = await asyncio.open_connection(HOST, self._target)
        except OSError:
            writer.close()
            return
        asked: dict[int, int] = {}
        ways = [
            asyncio.create_task(self._forward(reader, kafka_writer, asked)),
            asyncio.create_task(self._answer(kafka_reader, writer, asked)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, kafka_writer):
            end.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[int, int]) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(reader)
                api, _, correlation = _HEAD.unpack_from(frame)
                asked[correlation] = api
                await _pass_on(writer, frame)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[int, int]) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(reader)
                api = asked.pop(struct.unpack_from(">i", frame)[0], -1)
                if api == self._api and self._left:
                    self._left -= 1
                    print(json.dumps({"swallowed": api}), flush=True)
                    if self._then == "close":
                        return
                    while True:  # silent from now on, until the client hangs up
                        await _frame(reader)
                await _pass_on(writer, frame)


async def _frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack(">i", await reader.readexactly(4))
    return await reader.readexactly(length)


async def _pass_on(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(struct.pack(">i", len(frame)) + frame)
    await writer.drain()


async def main() -> None:
    """Listen on the first argument's port for Kafka on the second's, until the input ends."""
    port, target = map(int, sys.argv[1:])
    proxy = Proxy(target)
    loop = asyncio.get_running_loop()
    rules = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(rules), sys.stdin)
    server = await asyncio.start_server(proxy.serve, HOST, port)
    print(json.dumps({"ready": port}), flush=True)
    while line := await rules.readline():
        proxy.obey(json.loads(line))
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
