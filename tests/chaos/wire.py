"""HTTP and Server-Sent Events by hand over one connection: what a client really sees on the line.

For the clients of the suite alone. Independent of the service's encoders, and cheap: it must cost
less than what it watches. Raises `Broken` for whatever ends a connection too early.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import orjson

CONNECT_S = 5.0
ANSWER_S = 15.0
SILENCE_S = 20.0


class Broken(Exception):
    """The connection ended before the answer did."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def is_problem(self) -> bool:
        return self.headers.get("content-type", "").startswith("application/problem+json")


@dataclass(frozen=True, slots=True)
class WireEvent:
    """One dispatched event; `id` None for control frames."""

    id: int | None
    event: str
    data: bytes


class Exchange:
    """One request and its answer on a connection of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.transport.abort()

    async def send(
        self, method: str, path: str, content: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        """Send the request and read the head of the answer."""
        body = b"" if content is None else orjson.dumps(content)
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        if content is not None:
            lines.append("Content-Type: application/json")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        try:
            async with asyncio.timeout(CONNECT_S):
                opened = asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
                self._reader, self._writer = await opened
            self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            async with asyncio.timeout(ANSWER_S):
                head = await self._reader.readuntil(b"\r\n\r\n")
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise Broken(type(error).__name__) from error
        status, *fields = head.decode("latin-1").split("\r\n")
        self.status = int(status.split(" ")[1])
        pairs = (line.split(":", 1) for line in fields if line)
        self.headers = {name.lower(): value.strip() for name, value in pairs}

    async def answer(self) -> Answer:
        """The whole body of an answer that has an end."""
        try:
            async with asyncio.timeout(ANSWER_S):
                if "content-length" in self.headers:
                    assert self._reader is not None
                    length = int(self.headers["content-length"])
                    body = await self._reader.readexactly(length)
                elif self.status == 204:
                    body = b""
                else:
                    body = b"".join([chunk async for chunk in self._chunks()])
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise Broken(type(error).__name__) from error
        return Answer(self.status, self.headers, body)

    async def events(self) -> AsyncGenerator[WireEvent, None]:
        """The events of a stream as they come; ends when the server ends it in order."""
        buffer = b""
        async for chunk in self._chunks():
            buffer += chunk
            *blocks, buffer = buffer.split(b"\n\n")
            for block in blocks:
                if (event := _event(block)) is not None:
                    yield event

    async def _chunks(self) -> AsyncIterator[bytes]:
        """The body behind `Transfer-Encoding: chunked`."""
        assert self._reader is not None
        reader = self._reader
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    size = int(await reader.readuntil(b"\r\n"), 16)
                    chunk = await reader.readexactly(size + 2)
                if size == 0:
                    return
                yield chunk[:-2]
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
            raise Broken(type(error).__name__) from error


def _event(block: bytes) -> WireEvent | None:
    """One block of lines as an event; None for comments and `retry`."""
    fields: dict[bytes, bytes] = {}
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name:
            fields[name] = value.removeprefix(b" ")
    if b"data" not in fields:
        return None
    found = fields.get(b"id")
    event = fields.get(b"event", b"message").decode()
    return WireEvent(None if found is None else int(found), event, fields[b"data"])


async def ask(
    port: int,
    method: str,
    path: str,
    content: Any = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One request with a whole answer. Raises `Broken`."""
    async with Exchange(port) as exchange:
        await exchange.send(method, path, content, headers)
        return await exchange.answer()
