"""An independent reader of Server-Sent Events, written from WHATWG HTML 9.2.6."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class SseEvent:
    """One dispatched event; `id` is the client's last event id at that moment."""

    event: str
    data: str
    id: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.data)
        return found

    @property
    def seq(self) -> int:
        return int(self.json["seq"])


@dataclass
class SseParser:
    """Fed with bytes in any cut; `events` are complete ones, `comments` and `retry` beside."""

    events: list[SseEvent] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    retry: int | None = None
    last_id: str = ""
    _buffer: bytes = b""
    _data: list[str] = field(default_factory=list)
    _event: str = ""

    def feed(self, chunk: bytes) -> None:
        self._buffer += chunk
        while True:
            line, found, rest = self._cut(self._buffer)
            if not found:
                return
            self._buffer = rest
            self._line(line.decode())

    @staticmethod
    def _cut(buffer: bytes) -> tuple[bytes, bool, bytes]:
        for index, byte in enumerate(buffer):
            if byte == 10:
                return buffer[:index], True, buffer[index + 1 :]
            if byte == 13:
                if index + 1 == len(buffer):
                    return b"", False, buffer
                skip = 2 if buffer[index + 1] == 10 else 1
                return buffer[:index], True, buffer[index + skip :]
        return b"", False, buffer

    def _line(self, line: str) -> None:
        if not line:
            self._dispatch()
        elif line.startswith(":"):
            self.comments.append(line[1:].removeprefix(" "))
        else:
            name, _, value = line.partition(":")
            self._field(name, value.removeprefix(" "))

    def _field(self, name: str, value: str) -> None:
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self.last_id = value
        elif name == "retry" and value.isdigit():
            self.retry = int(value)

    def _dispatch(self) -> None:
        data, event = self._data, self._event
        self._data, self._event = [], ""
        if data:
            self.events.append(SseEvent(event or "message", "\n".join(data), self.last_id))


def parse(chunks: Iterable[bytes]) -> SseParser:
    """Everything in a recorded stream."""
    parser = SseParser()
    for chunk in chunks:
        parser.feed(chunk)
    return parser


async def read_stream(response: httpx.Response) -> list[SseEvent]:
    """All events until the server ends the stream. Deltas are left out: whether a call says its
    text depends on who followed the run when it began."""
    parser = SseParser()
    async for chunk in response.aiter_bytes():
        parser.feed(chunk)
    return [event for event in parser.events if event.event != "delta"]
