"""A TCP proxy that misbehaves on order: latency, throttle, cut, reset, stall and black hole.

One `FaultProxy` is one listening port before one target. What it does is its `Weather`, which can
be changed at any time and holds for all its connections, old and new. Its randomness comes from a
seed. Must never change a byte: what it lets through is what was sent.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

HOST = "127.0.0.1"
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Weather:
    """How the line is. The default lets everything through at once.

    `latency_s`: every chunk waits so long, in both directions. `rate`: bytes per second and
    direction. `cut_after`: a new connection ends, without a word, after so many bytes from the
    target. `reset_share`: the share of new connections that are reset at a random one of their
    first 64 KiB. `stalled`: bytes wait in the proxy and go on later, as if sent again.
    `half_open`: what the target says is lost for good, and so is what it is told. `refusing`: new
    connections are reset at once.
    """

    latency_s: float = 0.0
    rate: float = 0.0
    cut_after: int | None = None
    reset_share: float = 0.0
    stalled: bool = False
    half_open: bool = False
    refusing: bool = False


CLEAR = Weather()


class FaultProxy:
    """Listens on `port`; `target` may be changed, for the connections that come after."""

    def __init__(self, target: Callable[[], int], seed: int = 0) -> None:
        self.port = 0
        self.weather = CLEAR
        self.connections = 0
        self.broken = 0
        self._target = target
        self._random = random.Random(seed)
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, port, limit=CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def set(self, weather: Weather) -> None:
        """From now on, for all connections. What was stalled goes on if it is no longer."""
        self.weather = weather
        self._changed.set()
        self._changed = asyncio.Event()

    def clear(self) -> None:
        self.set(CLEAR)

    def reset_all(self) -> int:
        """Reset every open connection now; how many there were."""
        found = list(self._open.items())
        for task, writers in found:
            self._reset(writers)
            task.cancel()
        return len(found)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._open[task] = [writer]
        task.add_done_callback(lambda done: self._open.pop(done, None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        writers = self._open[task]
        self.connections += 1
        try:
            if self.weather.refusing:
                self._reset(writers)
                return
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target())
            writers.append(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, None))
                group.create_task(self._pump(far_reader, writer, self._end_of_line(writers)))
        except* (OSError, _Cut):
            self.broken += 1
        finally:
            for open_writer in writers:
                open_writer.close()

    def _end_of_line(self, writers: list[asyncio.StreamWriter]) -> tuple[int, Callable[[], None]]:
        """After how many bytes from the target this connection ends, and how."""
        weather = self.weather
        if self._random.random() < weather.reset_share:
            return self._random.randrange(1, CHUNK), lambda: self._reset(writers)
        if weather.cut_after is not None:
            return weather.cut_after, lambda: None
        return 0, lambda: None

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        end: tuple[int, Callable[[], None]] | None,
    ) -> None:
        """Carry bytes one way until one side is done, or the line is cut."""
        left, cut = end or (0, lambda: None)
        while chunk := await reader.read(CHUNK):
            await self._weather_permitting(len(chunk))
            if writer.is_closing():
                return
            if self.weather.half_open:
                continue
            if 0 < left <= len(chunk):
                writer.write(chunk[:left])
                with suppress(OSError):
                    await writer.drain()
                cut()
                raise _Cut
            left -= len(chunk) if left else 0
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()

    async def _weather_permitting(self, size: int) -> None:
        weather = self.weather
        if weather.latency_s:
            await asyncio.sleep(weather.latency_s)
        if weather.rate:
            await asyncio.sleep(size / weather.rate)
        while self.weather.stalled:
            await self._changed.wait()

    @staticmethod
    def _reset(writers: list[asyncio.StreamWriter]) -> None:
        """Close with RST instead of FIN."""
        for writer in writers:
            sock: socket.socket | None = writer.get_extra_info("socket")
            if sock is not None:
                with suppress(OSError, ValueError):  # it may be closed already
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


class _Cut(Exception):
    """The line ends here."""


@asynccontextmanager
async def running_proxy(target_port: int, seed: int = 0) -> AsyncIterator[FaultProxy]:
    """A proxy for the time of the block."""
    proxy = FaultProxy(lambda: target_port, seed)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
