"""A server of models on loopback that says what it is told, in the wires of all vendors.

    async with running_model_server() as server:
        server.say("It fits.")
        provider = make_provider(server.endpoint("openai"))

It speaks HTTP by hand over `far_side`, so that it can misbehave: `server.behave(...)` takes one
behaviour for each of the next requests, then the server speaks again. Requests are kept as read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic import SecretStr

from app.adapters.providers.endpoint import Endpoint, OpenAiApi, ProviderKind
from app.domain.chat import ChatAnswer, StopReason, Usage
from tests.far_side import Behaviour, Exchange, FarSide, far_side
from tests.model_wires import STREAMS, WHOLES, embeddings_body

USAGE = Usage(12, 5, 4)
_ROOTS: dict[ProviderKind, str] = {
    "openai": "/v1",
    "yandex": "/v1",
    "anthropic": "",
    "ollama": "",
}


@dataclass(slots=True)
class ModelServer:
    """The running server. What it says can change between two requests."""

    side: FarSide
    models: list[str] = field(default_factory=lambda: ["small-1", "large-1"])
    _answers: deque[ChatAnswer] = field(
        default_factory=lambda: deque([ChatAnswer("Hi.", StopReason.END, USAGE)])
    )
    _behaviours: deque[Behaviour] = field(default_factory=deque)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.side.port}"

    @property
    def requests(self) -> list[Exchange]:
        return self.side.exchanges

    def endpoint(
        self, kind: ProviderKind, api: OpenAiApi = "chat", key: str | None = None, **more: Any
    ) -> Endpoint:
        """What `make_provider` needs to speak with this server; the provider is called "models"."""
        secret = None if key is None else SecretStr(key)
        return Endpoint("models", kind, self.url + _ROOTS[kind], secret, api=api, **more)

    def say(self, *answers: str | ChatAnswer) -> None:
        """The next answers, one a request; the last one stays."""
        self._answers = deque(
            ChatAnswer(a, StopReason.END, USAGE) if isinstance(a, str) else a for a in answers
        )

    def behave(self, *behaviours: Behaviour) -> None:
        """What the next requests meet instead, one each."""
        self._behaviours.extend(behaviours)

    async def reached(self, count: int) -> None:
        """Until so many requests have come in."""
        while len(self.requests) < count:
            self.side.arrived.clear()
            await self.side.arrived.wait()

    async def speak(self, writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        """The answer to this request, in the wire that its path asks for."""
        stream = self._stream(exchange)
        if stream is None:
            status, body = self._whole(exchange)
            writer.write(_head(status, "application/json", f"Content-Length: {len(body)}") + body)
            return
        writer.write(_head(200, _media_type(exchange), "Transfer-Encoding: chunked"))
        for piece in stream:
            writer.write(_chunk(piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    def speak_in_steps(self, steps: asyncio.Semaphore) -> Behaviour:
        """A streamed answer, of which each step lets one piece through."""

        async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
            stream = self._stream(exchange)
            assert stream is not None
            writer.write(_head(200, _media_type(exchange), "Transfer-Encoding: chunked"))
            for piece in stream:
                await steps.acquire()
                writer.write(_chunk(piece))
                await writer.drain()
            writer.write(b"0\r\n\r\n")

        return behave

    async def cut_off(self, writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        """A stream that ends in good order, but before its end mark."""
        stream = self._stream(exchange)
        assert stream is not None
        writer.write(_head(200, _media_type(exchange), "Transfer-Encoding: chunked"))
        writer.write(b"".join(_chunk(piece) for piece in stream[:-1]) + b"0\r\n\r\n")

    async def break_down(self, writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        """Half of an answer, then nothing more while the client waits."""
        stream = self._stream(exchange)
        whole = self._whole(exchange)[1] if stream is None else b"".join(stream)
        media_type = "application/json" if stream is None else _media_type(exchange)
        writer.write(_head(200, media_type, f"Content-Length: {len(whole)}"))
        writer.write(whole[: len(whole) // 2])
        await say_nothing(writer, exchange)

    async def _serve(self, writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        behaviour = self._behaviours.popleft() if self._behaviours else self.speak
        await behaviour(writer, exchange)

    def _next(self) -> ChatAnswer:
        return self._answers.popleft() if len(self._answers) > 1 else self._answers[0]

    def _stream(self, exchange: Exchange) -> list[bytes] | None:
        """The pieces of a streamed answer; None when the request does not ask for a stream."""
        path = exchange.target.partition("?")[0]
        if path not in STREAMS or not exchange.json.get("stream"):
            return None
        return list(STREAMS[path](self._next(), exchange.json))

    def _whole(self, exchange: Exchange) -> tuple[int, bytes]:
        path = exchange.target.partition("?")[0]
        if path in WHOLES:
            return 200, orjson.dumps(WHOLES[path](self._next(), exchange.json))
        if path in ("/v1/embeddings", "/api/embed"):
            return 200, orjson.dumps(embeddings_body(path, exchange.json["input"]))
        if path == "/v1/models":
            return 200, orjson.dumps({"data": [{"id": name} for name in self.models]})
        if path == "/api/tags":
            return 200, orjson.dumps({"models": [{"name": name} for name in self.models]})
        return 404, b'{"error": {"type": "not_found_error", "message": "no such path"}}'


@asynccontextmanager
async def running_model_server() -> AsyncIterator[ModelServer]:
    """A server for the time of the block."""
    async with far_side() as side:
        server = ModelServer(side)
        side.behave = server._serve
        yield server


# --- behaviours beside those of `far_side` --------------------------------------------------------


async def say_nothing(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
    """Nothing until the client leaves."""
    await writer.drain()
    await exchange.reader.read()
    raise ConnectionError


def unfinished(status: int, body: bytes, media_type: str = "application/json") -> Behaviour:
    """This much of a body, then nothing more while the client waits."""

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        writer.write(_head(status, media_type, f"Content-Length: {len(body) + 1}") + body)
        await say_nothing(writer, exchange)

    return behave


def endless(media_type: str) -> Behaviour:
    """A body that does not stop while the client listens."""

    async def behave(writer: asyncio.StreamWriter, _exchange: Exchange) -> None:
        writer.write(_head(200, media_type, "Transfer-Encoding: chunked"))
        while True:
            writer.write(_chunk(b" " * 65_536))
            await writer.drain()

    return behave


# --- HTTP -----------------------------------------------------------------------------------------


def _head(status: int, media_type: str, framing: str) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Type: {media_type}\r\n{framing}\r\n\r\n".encode()


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _media_type(exchange: Exchange) -> str:
    is_ollama = exchange.target.startswith("/api/")
    return "application/x-ndjson" if is_ollama else "text/event-stream; charset=utf-8"
