"""Where events are streamed: the SSE response, a cursor over a run's frames.

sse-starlette gives the response class and the encoder of control frames. Its send loop is replaced:
it costs five tasks and a queue a stream, this one is the request's own coroutine with a cursor.
Frames of the journal carry an `id`, control frames (`retry`, comments, `gap`, `delta`) never do, so
that a client that reconnects always names a seq. A delta is sent right behind the event that it was
placed behind, or not at all: none comes behind the event that ends its call.
"""

from __future__ import annotations

import asyncio
import random
from uuid import UUID

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from app.bootstrap import Services
from app.domain.errors import FlexrunError, Unavailable
from app.journal.feed import Channel, Feed, Filter
from app.journal.frames import Frame
from app.kit import failpoints
from app.kit.drain import Drain

HEARTBEAT_S = 15.0
SEND_TIMEOUT_S = 20.0
FLUSH_LOOK_S = 0.5
SEND_BYTES_MAX = 32 * 1024
"""After the frame with which it is reached a message ends. A client that does not read costs its
last message twice: as we gave it to the server, and as the server holds it for the socket."""
SHARED_BYTES_MAX = 2 * SEND_BYTES_MAX
"""What all streams of a run hold together costs each of them once."""
DRAIN_SPREAD_S = 1.0
STREAMS = "flexrun.streams"
"""Where in the scope our server wants a stream put, to run it when the framework's frames are gone:
an open stream then costs half the memory."""
TRANSPORT = "flexrun.transport"
"""ASGI extension of our server: the socket's transport, to see and to cut dead clients."""

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]

_RETRY = ServerSentEvent(retry=2000, sep="\n").encode()
_HEARTBEAT = ServerSentEvent(comment="heartbeat", sep="\n").encode()
_DRAINING = ServerSentEvent(comment="draining", sep="\n").encode()
_DELAYED = ServerSentEvent(comment="the journal is out of reach, please wait", sep="\n").encode()


class EventStream(EventSourceResponse):
    """The frames of one run behind `after`, replayed and then live, until its terminal event."""

    def __init__(
        self,
        feed: Feed,
        channel: Channel,
        *,
        after: int,
        wanted: Filter,
        drain: Drain,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        # The base class would build headers, a lock and an iterator that this loop has no use for.
        self.status_code = 200
        self.background = None
        self.raw_headers = [*HEADERS, *(headers or ())]
        self._feed = feed
        self._channel = channel
        self._cursor = after
        self._wanted = wanted
        self._listens = wanted.takes_deltas
        self._heard = 0  # the number of the first delta that was not looked at
        self._drain = drain
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        streams: list[EventStream] | None = scope.pop(STREAMS, None)
        if streams is not None:
            streams.append(self)
            return
        transport = (scope.get("extensions") or {}).get(TRANSPORT, {}).get("transport")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._follow(send, transport)
        except TimeoutError:
            # The client reads nothing: cut the line; it resumes from its Last-Event-ID.
            if transport is not None:
                transport.abort()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        finally:
            self._feed.leave(self._channel, listens=self._listens)

    async def _follow(self, send: Send, transport: asyncio.WriteTransport | None) -> None:
        opening = _RETRY
        while True:
            data, is_over = await self._next()
            if opening or data or is_over:
                failpoints.hit("stream.before_send")
                await self._send(send, transport, opening + data, more=not is_over)
                failpoints.hit("stream.after_send")
                opening = b""
            if is_over and transport is not None:
                await self._flushed(transport)
            if is_over or (transport is not None and transport.is_closing()):
                return
            if self._drain.is_draining:
                await asyncio.sleep(random.uniform(0, DRAIN_SPREAD_S))
                await self._send(send, transport, _DRAINING, more=False)
                return
            if self._is_up_to_date() and not await self._wait():
                await self._send(send, transport, _HEARTBEAT, more=True)

    async def _flushed(self, transport: asyncio.WriteTransport) -> None:
        """Until the last bytes have left the process, which else nothing would wait for."""
        if transport.get_write_buffer_size() == 0:
            return
        await asyncio.sleep(0)  # where they leave, unless the client is slow
        async with asyncio.timeout(SEND_TIMEOUT_S):
            while (  # noqa: ASYNC110 - nobody tells
                transport.get_write_buffer_size() and not transport.is_closing()
            ):
                await asyncio.sleep(FLUSH_LOOK_S)

    async def _next(self) -> tuple[bytes, bool]:
        """The bytes behind the cursor, and whether the stream is over with them."""
        channel = self._channel
        if self._wanted.is_open and not self._has_deltas(max(self._cursor, channel.last)):
            data = channel.joined_after(self._cursor)
            if data is not None and len(data) <= SHARED_BYTES_MAX:
                self._feed.metrics.stream_frames += max(channel.last - self._cursor, 0)
                self._cursor = max(self._cursor, channel.last)
                return data, channel.ended and self._cursor >= channel.last
        frames = channel.after(self._cursor)
        if frames is None:
            return await self._page()
        return self._take(frames)

    async def _page(self) -> tuple[bytes, bool]:
        """The ring does not reach back to the cursor: read the journal, and tell of a gap."""
        try:
            frames = await self._feed.page(self._channel, self._cursor)
        except FlexrunError:
            await asyncio.sleep(1)
            return _DELAYED, False
        if not frames:
            gap = self._gap(self._cursor + 1, self._channel.last)
            self._cursor = self._channel.last
            return gap, True
        gap = b""
        if frames[0].seq > self._cursor + 1:
            gap = self._gap(self._cursor + 1, frames[0].seq - 1)
        data, is_over = self._take(frames)
        return gap + data, is_over

    def _take(self, frames: list[Frame]) -> tuple[bytes, bool]:
        """Join what passes the filter, up to one send's worth; move the cursor over all of it."""
        parts: list[bytes] = []
        size = 0
        for frame in frames:
            size += self._take_deltas(parts, SEND_BYTES_MAX - size)
            if size >= SEND_BYTES_MAX:
                return b"".join(parts), False
            self._cursor = frame.seq
            if self._wanted.passes(frame):
                parts.append(frame.data)
                self._feed.metrics.stream_frames += 1
                size += len(frame.data)
            if frame.is_terminal:
                return b"".join(parts), True
        self._take_deltas(parts, SEND_BYTES_MAX - size)
        return b"".join(parts), False

    def _has_deltas(self, up_to: int) -> bool:
        """Whether a delta that was not looked at has its place behind an event up to there."""
        ring = self._channel.deltas
        if ring is None or self._heard >= ring.end or not self._listens:
            return False
        self._heard = max(self._heard, ring.first)
        return ring[self._heard].after <= up_to

    def _take_deltas(self, parts: list[bytes], room: int) -> int:
        """Add those whose place is right behind the cursor, until the room (bytes) is used up.

        Those whose place the cursor has passed are left out. The number of bytes.
        """
        size = 0
        while size < room and self._has_deltas(self._cursor):
            assert self._channel.deltas is not None
            delta = self._channel.deltas[self._heard]
            self._heard += 1
            if delta.after == self._cursor and self._wanted.passes_delta(delta):
                parts.append(delta.data)
                size += len(delta.data)
        return size

    def _is_up_to_date(self) -> bool:
        return self._channel.last <= self._cursor and not self._has_deltas(self._cursor)

    @staticmethod
    def _gap(first: int, last: int) -> bytes:
        """Retention took these events: say so instead of skipping them in silence."""
        data = orjson.dumps({"from": first, "to": last}).decode()
        return ServerSentEvent(data=data, event="gap", sep="\n").encode()

    async def _wait(self) -> bool:
        """Until there is something to look at. False: a heartbeat is due instead.

        It is due by what was sent, not by what happened: a filter may let nothing through.
        """
        waiter = self._channel.wait()
        loop = asyncio.get_running_loop()
        timer = loop.call_at(self._sent_at + HEARTBEAT_S, _time_is_up, waiter)
        try:
            return await waiter
        finally:
            timer.cancel()
            self._channel.forget(waiter)

    async def _send(
        self, send: Send, transport: asyncio.WriteTransport | None, data: bytes, *, more: bool
    ) -> None:
        """One ASGI message. A client that takes nothing for `SEND_TIMEOUT_S`: TimeoutError."""
        message = {"type": "http.response.body", "body": data, "more_body": more}
        if transport is not None and transport.get_write_buffer_size() == 0:
            await send(message)  # all was taken so far: this can not have to wait
        else:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send(message)
        self._sent_at = asyncio.get_running_loop().time()


def _time_is_up(waiter: asyncio.Future[bool]) -> None:
    if not waiter.done():
        waiter.set_result(False)


def check_room(services: Services) -> None:
    """Raises `Unavailable` (`server_busy`) when there are as many streams as there may be."""
    if services.feed.readers >= services.settings.streams_max:
        raise Unavailable("Too many open streams.", code="server_busy", retry_after_s=5)


def stream_of(
    services: Services,
    channel: Channel,
    after: int,
    wanted: Filter,
    headers: dict[str, str] | None = None,
) -> EventStream:
    """A stream over a channel that was entered as its filter listens; it leaves it."""
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return EventStream(
        services.feed, channel, after=after, wanted=wanted, drain=services.drain, headers=raw
    )


def open_stream(
    services: Services,
    run_id: UUID,
    after: int,
    wanted: Filter,
    headers: dict[str, str] | None = None,
) -> EventStream:
    """A stream of a run that exists already: replayed from the journal, then live.

    Raises `Unavailable` as `check_room` does.
    """
    check_room(services)
    channel = services.feed.enter(run_id, after, listens=wanted.takes_deltas)
    services.feed.nudge()
    return stream_of(services, channel, after, wanted, headers)
