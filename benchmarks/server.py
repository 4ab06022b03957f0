"""An HTTP server that answers each request after 50 ms, as a model would: ``GET /7`` gives ``{"answer": 15}``.

It prints its port and runs until it is killed. It parses no more than it must: two cores are shared by everybody, and
what it took would be missing for those who are measured.
"""

from __future__ import annotations

import asyncio

SECONDS = 0.05
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


class Answering(asyncio.Protocol):
    """One connection; the client sends its next request when it has the answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]
        self._unread = b""

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while b"\r\n\r\n" in self._unread:
            request, _, self._unread = self._unread.partition(b"\r\n\r\n")
            number = int(request.split(b" ", 2)[1].removeprefix(b"/"))
            asyncio.get_running_loop().call_later(SECONDS, self._answer, number)

    def _answer(self, number: int) -> None:
        body = b'{"answer": %d}' % (2 * number + 1)
        self._transport.write(_HEAD % (len(body), body))


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0, backlog=1_000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
