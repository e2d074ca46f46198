"""The fault proxy does what it is told, and never changes a byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import uvloop

from tests.chaos.proxy import CLEAR, FaultProxy, Weather, running_proxy
from tests.chaos.wire import Broken, ask

ANSWER = bytes(range(256)) * 400


class Source:
    """A server that answers every line with the same bytes, and remembers what it was told."""

    def __init__(self) -> None:
        self.port = 0
        self.heard: list[bytes] = []
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while line := await reader.readline():
                self.heard.append(line)
                writer.write(ANSWER)
                await writer.drain()
        self.ended.set()
        writer.close()


@pytest.fixture
async def source() -> AsyncIterator[Source]:
    source = Source()
    server = await asyncio.start_server(source.serve, "127.0.0.1", 0)
    source.port = server.sockets[0].getsockname()[1]
    yield source
    server.close()


@pytest.fixture
async def proxy(source: Source) -> AsyncIterator[FaultProxy]:
    async with running_proxy(source.port, seed=7) as proxy:
        yield proxy


async def exchange(proxy: FaultProxy) -> bytes:
    """What one line gets for an answer, up to the end or the whole of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(b"hello\n")
        found = b""
        async with asyncio.timeout(10):
            while len(found) < len(ANSWER) and (chunk := await reader.read(1 << 16)):
                found += chunk
        return found
    finally:
        writer.close()


async def test_by_default_it_is_not_there(proxy: FaultProxy, source: Source) -> None:
    assert await exchange(proxy) == ANSWER
    assert source.heard == [b"hello\n"]


@pytest.mark.parametrize("cut", [1, 2, 4_097, 65_536, 65_537, len(ANSWER) - 1])
async def test_it_cuts_at_the_very_byte(proxy: FaultProxy, cut: int) -> None:
    proxy.set(Weather(cut_after=cut))
    assert await exchange(proxy) == ANSWER[:cut]
    proxy.clear()
    assert await exchange(proxy) == ANSWER


async def test_a_connection_ends_on_both_sides(proxy: FaultProxy, source: Source) -> None:
    proxy.set(Weather(cut_after=10))
    assert await exchange(proxy) == ANSWER[:10]
    await asyncio.wait_for(source.ended.wait(), 10)


async def test_it_resets_a_share_of_the_connections(proxy: FaultProxy) -> None:
    proxy.set(Weather(reset_share=0.5))
    whole = 0
    for _ in range(40):
        with suppress(ConnectionError):
            whole += await exchange(proxy) == ANSWER
    assert 5 < whole < 35


async def test_it_refuses(proxy: FaultProxy) -> None:
    proxy.set(Weather(refusing=True))
    with pytest.raises((ConnectionError, AssertionError)):
        assert await exchange(proxy)
    with pytest.raises(Broken):
        await ask(proxy.port, "GET", "/")


async def test_what_is_stalled_arrives_later(proxy: FaultProxy, source: Source) -> None:
    proxy.set(Weather(stalled=True))
    answer = asyncio.create_task(exchange(proxy))
    while not proxy.connections:
        await asyncio.sleep(0)
    assert source.heard == []
    assert not answer.done()
    proxy.clear()
    assert await answer == ANSWER


async def test_what_is_lost_on_a_half_open_line_never_arrives(
    proxy: FaultProxy, source: Source
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"one\n")
    assert await reader.readexactly(len(ANSWER)) == ANSWER
    proxy.set(Weather(half_open=True))
    writer.write(b"two\n")
    other = asyncio.create_task(exchange(proxy))  # it goes through the proxy behind "two"
    while proxy.connections < 2:
        await asyncio.sleep(0)
    assert proxy.reset_all() == 2
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    with suppress(ConnectionError):
        assert await other == b""
    writer.close()
    assert source.heard == [b"one\n"]
    proxy.set(CLEAR)
    assert await exchange(proxy) == ANSWER


async def test_it_throttles_and_delays(proxy: FaultProxy) -> None:
    loop = asyncio.get_running_loop()
    proxy.set(Weather(rate=1_000_000, latency_s=0.05))
    started = loop.time()
    assert await exchange(proxy) == ANSWER
    # At least the latency both ways, and the bytes at that rate: what it promises is a lower bound.
    assert loop.time() - started >= 0.1 + len(ANSWER) / 1_000_000


async def test_a_target_that_is_not_there_ends_the_connection(source: Source) -> None:
    proxy = FaultProxy(lambda: 1)
    await proxy.start()
    try:
        assert await exchange(proxy) == b""
    except ConnectionError:
        pass
    finally:
        await proxy.close()
    assert proxy.broken == 1


def test_a_line_that_was_reset_already_can_be_reset_again() -> None:
    """The suite runs on uvloop, whose closed sockets have no number any more."""

    async def reset_twice() -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            FaultProxy._reset([writer])
            await writer.wait_closed()
            FaultProxy._reset([writer])
        finally:
            server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(reset_twice())
