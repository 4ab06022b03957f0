"""An event loop in a thread of its own: what is left behind on it is closed with it."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Iterator

import pytest
from aiokafka.conn import AIOKafkaConnection
from rowmill.streams.console.own_thread import close_loop


@pytest.fixture
def talkative() -> Iterator[socket.socket]:
    """A server that tells every client something that no client asked for."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = server.accept()
        with client:
            client.sendall(b"half a mess")
            client.recv(1)  # until it hangs up

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server
    thread.join(10)
    server.close()
    assert not thread.is_alive()


def test_a_connection_with_something_unread_is_closed_as_well(talkative: socket.socket) -> None:
    """aiokafka's reader is cancelled before, so what came stays in the stream; a warning would fail this test."""
    loop = asyncio.new_event_loop()

    async def connect() -> AIOKafkaConnection:
        connection = AIOKafkaConnection(*talkative.getsockname())
        reader, writer = await asyncio.open_connection(*talkative.getsockname())
        connection._reader, connection._writer = reader, writer
        while not vars(reader)["_buffer"]:
            await asyncio.sleep(0.01)
        return connection

    connection = loop.run_until_complete(asyncio.wait_for(connect(), 10))
    assert connection.connected()
    close_loop(loop)
    assert not connection.connected()
    del connection
    gc.collect()
