"""A load client on raw sockets with keep-alive: it must cost less than what it measures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import orjson

HEAD_END = b"\r\n\r\n"
STREAM_END = b"\r\n0\r\n\r\n"
EVENT_STREAM = "text/event-stream"
ANSWER_S = 30.0


class Refused(RuntimeError):
    """The service answered with something else than 2xx."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """One run, POST to last event: seconds since the request was sent, and the raw stream."""

    first_s: float
    done_s: float
    raw: bytes


def request(method: str, path: str, body: bytes = b"", accept: str = "application/json") -> bytes:
    """The bytes of a request, to be made once and sent often."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection:
    """One connection that sends one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 22))

    def close(self) -> None:
        self._writer.close()

    async def stream(self, sent: bytes) -> Streamed:
        """Send a request whose answer is an event stream, and read that to its end."""
        started = time.perf_counter()
        head, rest = await self._head(sent)
        if b"transfer-encoding: chunked" not in head.lower():
            raise Refused(f"not a stream: {head.decode()}")
        first = 0.0
        raw = bytearray(rest)
        while True:
            if not first and b"\ndata: " in raw:
                first = time.perf_counter()
            if raw.endswith(STREAM_END):
                return Streamed(first - started, time.perf_counter() - started, bytes(raw))
            got = await self._reader.read(1 << 18)
            if not got:
                raise Refused("the stream broke off")
            raw += got

    async def answer(self, sent: bytes) -> bytes:
        """Send a request and read its body."""
        head, _ = await self._head(sent)
        return await self._body(head)

    async def json(self, method: str, path: str, content: Any = None) -> Any:
        """A call with JSON both ways."""
        body = b"" if content is None else orjson.dumps(content)
        return orjson.loads(await self.answer(request(method, path, body)))

    async def _head(self, sent: bytes) -> tuple[bytes, bytes]:
        self._writer.write(sent)
        head = await self._reader.readuntil(HEAD_END)
        if head[9:10] != b"2":
            raise Refused((head + await self._body(head)).decode(errors="replace"))
        return head, b""

    async def _body(self, head: bytes) -> bytes:
        length = head.lower().partition(b"content-length:")[2].partition(b"\r")[0]
        return await self._reader.readexactly(int(length or b"0"))


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """A connection for the time of the block."""
    connection = await Connection.open(port)
    try:
        yield connection
    finally:
        connection.close()


async def one_by_one(port: int, sent: bytes, count: int, *, warm: int = 2) -> list[Streamed]:
    """`count` runs, each alone, after some that do not count."""
    async with connected(port) as connection:
        for _ in range(warm):
            await connection.stream(sent)
        return [await connection.stream(sent) for _ in range(count)]


async def at_once(
    port: int, sent: bytes, count: int, *, clients: int = 32, every_s: float = 0.0
) -> float:
    """Runs per second when `clients` connections share `count` runs, of which one more may be sent
    every so often."""
    connections = [await Connection.open(port) for _ in range(clients)]
    left = iter(range(count))

    async def work(connection: Connection) -> None:
        for number in left:
            if every_s:
                await asyncio.sleep(started + number * every_s - time.perf_counter())
            await connection.stream(sent)

    try:
        started = time.perf_counter()
        await asyncio.gather(*(work(connection) for connection in connections))
        return count / (time.perf_counter() - started)
    finally:
        for connection in connections:
            connection.close()


@dataclass(slots=True)
class Load:
    """How many runs of a lasting load have ended so far."""

    ended: int = 0


@asynccontextmanager
async def load(port: int, sent: bytes, clients: int) -> AsyncIterator[Load]:
    """So many connections that send one run after the other for the time of the block."""
    found = Load()

    async def work(connection: Connection) -> None:
        while True:
            await connection.stream(sent)
            found.ended += 1

    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        opened = [await stack.enter_async_context(connected(port)) for _ in range(clients)]
        tasks = [group.create_task(work(connection)) for connection in opened]
        yield found
        for task in tasks:
            task.cancel()


class Sink(asyncio.Protocol):
    """A client of a stream that only counts bytes, and keeps the last of them."""

    def __init__(self, sent: bytes) -> None:
        self._sent = sent
        self._tail = b""
        self.received = 0
        self._wanted: tuple[int, asyncio.Future[None]] | None = None
        self.transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self.attached: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[float] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._sent)

    def data_received(self, data: bytes) -> None:
        if not self.attached.done():
            if not data.startswith(b"HTTP/1.1 200"):
                self.attached.set_exception(Refused(data[:200].decode(errors="replace")))
                return
            self.attached.set_result(None)
        self.received += len(data)
        if self._wanted is not None and self.received >= self._wanted[0]:
            if not self._wanted[1].done():
                self._wanted[1].set_result(None)
            self._wanted = None
        self._tail = (self._tail + data)[-len(STREAM_END) :]
        if self._tail == STREAM_END and not self.ended.done():
            self.ended.set_result(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (self.attached, self.ended):
            if not future.done():
                future.set_exception(Refused(f"the connection was lost: {exc}"))
                future.exception()  # heard: who does not wait for it need not be told

    async def reach(self, received: int) -> None:
        """Until this many bytes have come."""
        if self.received < received:
            reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._wanted = (received, reached)
            await reached

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


async def attach(port: int, path: str, count: int) -> list[Sink]:
    """`count` clients of one stream, all of which have been answered."""
    sent = request("GET", path, accept=EVENT_STREAM)
    loop = asyncio.get_running_loop()
    sinks: list[Sink] = []
    for _ in range(count):
        _, sink = await loop.create_connection(lambda: Sink(sent), "127.0.0.1", port)
        sinks.append(sink)
    async with asyncio.timeout(ANSWER_S):
        await asyncio.gather(*(sink.attached for sink in sinks))
    return sinks
