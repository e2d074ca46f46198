"""Connections that are reset as soon as they stand, on the event loop of the service."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvloop

from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport

AT_ONCE = 20
ROUNDS = 20


@pytest.fixture
def resetting_port() -> Iterator[int]:
    """A server that answers every connection with RST."""
    with socket.create_server(("127.0.0.1", 0), backlog=AT_ONCE) as server:

        def reset_all() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.close()

        thread = threading.Thread(target=reset_all)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_connection_that_is_reset_at_once_is_an_error_of_the_network(resetting_port: int) -> None:
    async def ask_often() -> list[object]:
        transport = EgressTransport(EgressPolicy(["127.0.0.1"]))
        async with httpx.AsyncClient(transport=transport) as client:
            url = f"http://127.0.0.1:{resetting_port}/"
            found: list[object] = []
            for _ in range(ROUNDS):
                calls = (client.post(url, json={}) for _ in range(AT_ONCE))
                found += await asyncio.gather(*calls, return_exceptions=True)
            return found

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcomes = runner.run(ask_often())
    assert len(outcomes) == ROUNDS * AT_ONCE
    assert [o for o in outcomes if not isinstance(o, httpx.NetworkError)] == []
