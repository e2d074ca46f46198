"""A server on loopback that answers as told, or misbehaves: the far side of `http` capabilities.

A behaviour is a coroutine `(writer, exchange)` that writes raw bytes. Requests are kept as read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass(slots=True)
class Exchange:
    """One request as it came in; `headers` have lower-case names."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int
    reader: asyncio.StreamReader = field(repr=False)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


Behaviour = Callable[[asyncio.StreamWriter, Exchange], Awaitable[None]]


@dataclass(slots=True)
class FarSide:
    """The running server. `behave` decides the next answers, `exchanges` are the past requests."""

    port: int = 0
    behave: Behaviour | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/call"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        finally:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while not self.closing.is_set():
                exchange = await _read(reader, number)
                self.exchanges.append(exchange)
                self.arrived.set()
                assert self.behave is not None
                await self.behave(writer, exchange)
                await writer.drain()
        self.gone.set()


async def _read(reader: asyncio.StreamReader, connection: int) -> Exchange:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Exchange(method, target, headers, body, connection, reader)


@contextlib.asynccontextmanager
async def far_side(tls: ssl.SSLContext | None = None) -> AsyncIterator[FarSide]:
    """A server for the time of the block; hanging behaviours end with it."""
    side = FarSide()
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(side.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    side.port = server.sockets[0].getsockname()[1]
    try:
        yield side
    finally:
        side.closing.set()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def answer(
    status: int = 200,
    body: bytes = b"{}",
    media_type: str | None = "application/json",
    **headers: str,
) -> Behaviour:
    """A well-formed answer; underscores in header names are hyphens."""

    async def behave(writer: asyncio.StreamWriter, _exchange: Exchange) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
        if media_type is not None:
            lines.append(f"Content-Type: {media_type}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    return behave


def raw(data: bytes, *, reset: bool = False) -> Behaviour:
    """These bytes, then the end of the connection: by RST if `reset`, else in good order."""

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        writer.write(data)
        await writer.drain()
        if reset:
            linger = struct.pack("ii", 1, 0)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:
            writer.write_eof()
            await exchange.reader.read()
        raise ConnectionError

    return behave
