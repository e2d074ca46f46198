"""Ends of requests ahead of FastAPI: of one that its process cuts off, of a stream nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast
from uuid import UUID

import orjson
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.types import Message

from app.api import stream as stream_module
from app.api.hot import HotRoutes
from app.api.stream import TRANSPORT, EventStream
from app.journal.feed import Feed, Filter
from app.journal.frames import frame_of
from app.kit.drain import Drain
from app.store.events import EventReader


async def cut_off(path: str) -> list[Message]:
    """What a client sees of a request that is cancelled while it waits."""
    app = FastAPI()
    waits = asyncio.Event()
    sent: list[Message] = []

    async def body() -> Any:
        yield b"first"
        await wait()

    async def wait() -> None:
        waits.set()
        await asyncio.Event().wait()

    @app.get("/begun")
    async def begin() -> StreamingResponse:
        return StreamingResponse(body())

    @app.get("/late")
    async def late() -> None:
        await wait()

    async def receive() -> Message:
        await asyncio.Event().wait()
        return {}

    async def send(message: Message) -> None:
        if any(m["type"] == message["type"] == "http.response.start" for m in sent):
            raise RuntimeError("an answer begins once")
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
    }
    request = asyncio.create_task(HotRoutes(app)(scope, receive, send))
    await waits.wait()
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    assert request.cancelled()
    return sent


async def test_a_request_that_the_end_of_the_process_cuts_off_is_told_to_come_again() -> None:
    start, body = await cut_off("/late")
    headers = dict(start["headers"])
    assert start["status"] == 503
    assert headers[b"content-type"] == b"application/problem+json"
    assert b"retry-after" in headers
    assert orjson.loads(body["body"])["code"] == "draining"


async def test_an_answer_that_has_begun_stays_as_it_is() -> None:
    sent = await cut_off("/begun")
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert sent[0]["status"] == 200


class Deaf:
    """A transport whose client takes nothing: what it was given stays."""

    aborted = False

    def get_write_buffer_size(self) -> int:
        return 1

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


async def test_a_stream_that_is_over_does_not_leave_its_last_bytes_with_a_dead_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "SEND_TIMEOUT_S", 0.05)
    feed = Feed(cast(EventReader, None))
    channel = feed.enter(UUID(int=1), 0, listens=True)
    channel.push([frame_of(1, "RUN_DONE", None, "INFO", b"{}")])
    stream = EventStream(feed, channel, after=0, wanted=Filter(), drain=Drain())
    sent: list[Message] = []
    deaf = Deaf()

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {}

    scope = {"type": "http", "extensions": {TRANSPORT: {"transport": deaf}}}
    await stream(scope, receive, send)
    assert [message.get("more_body") for message in sent] == [None, False]
    assert deaf.aborted
    assert feed.readers == 0
