"""Reading bodies from the messages of a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from app.api import bodies
from app.api.bodies import describe_bodies, documented_body, read_body, read_json_model
from app.api.errors import RequestTimeout, UnsupportedMediaType
from app.domain.errors import BadInput, TooLarge, Unprocessable

JSON = ((b"content-type", b"application/json"),)


class Thing(BaseModel):
    name: str


class Sender:
    """Answers `receive` with these chunks and counts how often it was asked."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = list(chunks)
        self.asked = 0

    async def __call__(self) -> dict[str, Any]:
        self.asked += 1
        if not self.chunks:
            return {"type": "http.disconnect"}
        chunk = self.chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(self.chunks)}


def request(sender: Any, *headers: tuple[bytes, bytes]) -> Request:
    return Request({"type": "http", "headers": [*headers]}, sender)


async def test_one_message_is_read_as_it_is() -> None:
    body = b'{"name":"n"}'
    sender = Sender(body)
    assert await read_body(request(sender, *JSON), 12) is body
    assert sender.asked == 1


async def test_chunks_are_joined_up_to_the_limit() -> None:
    assert await read_body(request(Sender(b"", b"ab", b"", b"c"), *JSON), 3) == b"abc"
    sender = Sender(b"ab", b"cd", b"ef", b"gh")
    with pytest.raises(TooLarge) as caught:
        await read_body(request(sender, *JSON), 3)
    assert caught.value.code == "body_too_large"
    assert sender.asked == 2


async def test_an_announced_excess_is_not_even_received() -> None:
    sender = Sender(b"abcd")
    with pytest.raises(TooLarge):
        await read_body(request(sender, *JSON, (b"content-length", b"4")), 3)
    assert sender.asked == 0


async def test_one_message_over_the_limit_is_refused() -> None:
    with pytest.raises(TooLarge):
        await read_body(request(Sender(b"abcd"), *JSON), 3)


async def test_no_body_needs_no_media_type() -> None:
    assert await read_body(request(Sender(b"")), 3) == b""


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"content-type", b"text/json")],
        [(b"content-type", b"application/jsonx")],
        [*JSON, (b"content-encoding", b"gzip")],
    ],
)
async def test_only_plain_json_is_read(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(UnsupportedMediaType):
        await read_body(request(Sender(b"{}"), *headers), 3)


async def test_a_client_that_leaves_is_noticed() -> None:
    with pytest.raises(ClientDisconnect):
        await read_body(request(Sender(), *JSON), 3)


async def test_a_slow_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "ARRIVAL_S", 0.01)

    async def never() -> dict[str, Any]:
        return await asyncio.Future()

    with pytest.raises(RequestTimeout):
        await read_body(request(never, *JSON), 3)


async def test_a_model_or_the_reasons_why_not() -> None:
    assert (await read_json_model(request(Sender(b'{"name":"n"}'), *JSON), Thing, 99)).name == "n"
    with pytest.raises(BadInput) as malformed:
        await read_json_model(request(Sender(b'{"name":"n","name":"m"}'), *JSON), Thing, 99)
    assert malformed.value.code == "malformed_json"
    with pytest.raises(Unprocessable) as invalid:
        await read_json_model(request(Sender(b'{"name":1}'), *JSON), Thing, 99)
    assert [fault.pointer for fault in invalid.value.faults] == ["/name"]


async def test_a_big_body_passes_the_same_gate() -> None:
    size = bodies.GATE_INLINE_BYTES_MAX
    good = b'{"name":"' + b"n" * size + b'"}'
    assert len((await read_json_model(request(Sender(good), *JSON), Thing, 2 * size)).name) == size
    with pytest.raises(BadInput):
        await read_json_model(request(Sender(good[:-1]), *JSON), Thing, 2 * size)


def test_the_schema_of_a_documented_body_is_made_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "_without_schema", [])
    extra = documented_body(Thing, {"name": "n"})
    media = extra["requestBody"]["content"]["application/json"]
    assert media == {"example": {"name": "n"}}
    for _ in range(2):
        describe_bodies()
        assert media == {"example": {"name": "n"}, "schema": Thing.model_json_schema()}
