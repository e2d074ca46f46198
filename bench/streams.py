"""Many clients of one run: what each costs while it waits, and how fast frames reach them all.

The run is held back by its root node, which calls a gate of the benchmark, until every client is
attached. sse-starlette's own response then sends the same frames, in the same bursts, to as many
clients.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from bench import client, envelopes, process
from bench.limits import stand_in
from bench.process import Running
from bench.rig import Rig
from bench.stats import Goal

Go = Callable[[], Coroutine[Any, Any, None]]

CLIENTS = 1_000
WIDTH = 200
SETTLE_S = 1.0
WARM_CLIENTS = 20
OPEN_FILES = 4_096

OURS = f"{CLIENTS} clients of a {WIDTH}-wide run: flexrun"
STOCK = f"{CLIENTS} clients of a {WIDTH}-wide run: sse-starlette with dicts"


async def streams(rig: Rig) -> None:
    """On a service of its own each round: memory once taken would count for the next round."""
    _allow_open_files()
    clients = rig.count(CLIENTS, least=10)
    await rig.server()
    if "streams" not in rig.kept:
        rig.kept["streams"] = await rig.database("bench_streams")
    async with (
        _gate() as gate,
        process.running(database_url=rig.kept["streams"], egress_allow="127.0.0.1") as service,
        client.connected(service.port) as calls,
    ):
        registration = envelopes.gate_registration(f"http://127.0.0.1:{gate.port}/")
        await calls.json("POST", "/v1/capabilities", registration)
        run = await calls.json(
            "POST", "/v1/runs", envelopes.wide(WIDTH, root=envelopes.gate_node())
        )
        await asyncio.wait_for(gate.asked.wait(), 30)
        path = f"/v1/runs/{run['run_id']}/events"
        rig.book.add(
            "idle stream: memory of the service for each",
            "KB",
            await _idle_kb(service, path, clients),
            goal=Goal(25, 13),
        )
        before = (await calls.json("GET", f"/v1/runs/{run['run_id']}"))["last_seq"]
        took, received = await _fan_out(service.port, path, clients, gate.open)
        events = (await calls.json("GET", f"{path}?limit=1000&after={before}"))["events"]
    _check(received, events)
    rig.book.add(OURS, "frames/s", clients * len(events) / took)
    rig.book.add(STOCK, "frames/s", await _stock(rig, events, clients))


async def _idle_kb(service: Running, path: str, clients: int) -> float:
    warm = await client.attach(service.port, path, min(WARM_CLIENTS, clients))
    await asyncio.sleep(SETTLE_S)
    before = service.rss
    attached = await client.attach(service.port, path, clients)
    await asyncio.sleep(SETTLE_S)
    grown = service.rss - before
    for sink in warm + attached:
        sink.close()
    await asyncio.sleep(SETTLE_S / 2)
    return grown / clients / 1024


async def _fan_out(port: int, path: str, clients: int, go: Go) -> tuple[float, int]:
    """Seconds from the go to the end of the last stream, and the bytes of the shortest one."""
    sinks = await client.attach(port, path, clients)
    await asyncio.sleep(SETTLE_S / 2)
    started = time.perf_counter()
    going = asyncio.create_task(go())
    ends = await asyncio.gather(*(sink.ended for sink in sinks))
    await going
    least = min(sink.received for sink in sinks)
    for sink in sinks:
        sink.close()
    return max(ends) - started, least


def _check(received: int, events: list[dict[str, Any]]) -> None:
    """A stream that lost frames would win."""
    needed = sum(len(orjson.dumps(event)) for event in events)
    if received < needed:
        raise RuntimeError(f"a client got {received} bytes, the events alone have {needed}")


async def _stock(rig: Rig, events: list[dict[str, Any]], clients: int) -> float:
    server = await stand_in(rig, "stock")
    # What one append made durable has one time, and came as one burst.
    bursts = [
        [
            {"id": str(event["seq"]), "event": event["type"], "data": orjson.dumps(event).decode()}
            for event in burst
        ]
        for _, burst in itertools.groupby(events, key=lambda event: event["ts"])
    ]
    async with client.connected(server.port) as calls:
        await calls.answer(client.request("PUT", "/bursts", orjson.dumps(bursts)))

        async def go() -> None:
            await calls.answer(client.request("POST", "/go"))

        took, received = await _fan_out(server.port, "/stream", clients, go)
    _check(received, events)
    return clients * len(events) / took


@dataclass(slots=True)
class _Gate:
    """An http capability that answers when it is opened."""

    port: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def open(self) -> None:
        self.opened.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(client.HEAD_END)
        self.asked.set()
        await self.opened.wait()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
            b"Connection: close\r\n\r\n{}"
        )
        await writer.drain()
        writer.close()


@asynccontextmanager
async def _gate() -> AsyncIterator[_Gate]:
    gate = _Gate()
    server = await asyncio.start_server(gate.serve, "127.0.0.1", 0)
    gate.port = server.sockets[0].getsockname()[1]
    try:
        yield gate
    finally:
        gate.opened.set()
        server.close()


def _allow_open_files() -> None:
    """Each client is an open file here and one in the service, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
