"""What tracing costs: the same load without it, with a receiver, and with one that is no help.

All services stand on one Postgres, each with a database of its own, and take the load in turn, a
second or so each, again and again: a machine that is slow for a while is so for all of them. Who
does not have the turn is stopped (SIGSTOP), so that what it has left to tell costs nobody else;
each keeps the backlog that a lasting load leaves it. The receiver takes everything and reads
nothing, so that it costs as little of this machine as a distant one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from bench import client, process
from bench.process import Running
from bench.rig import Rig
from bench.shapes import AT_ONCE, throughput
from bench.stats import Goal, Ratio

RUNS = 300
TURNS = 8
SETTLE_S = 0.4
"""At most so long before a slice: exporting comes in beats, which no slice should begin with."""
FIT_S = 20.0
"""How long a service that was stopped may take until it accepts runs: its lease may be over."""

OFF = f"diamond, {AT_ONCE} at once, no tracing"
OTLP = f"diamond, {AT_ONCE} at once, traced by OTLP"
LANGFUSE = f"diamond, {AT_ONCE} at once, traced by Langfuse"
HANGING = f"diamond, {AT_ONCE} at once, traced, the receiver hangs"
DOWN = f"diamond, {AT_ONCE} at once, traced, nobody receives"
CPU = "CPU of the service"
TOLD = "share of the runs that are traced"
RATIOS = (
    Ratio("runs/s, no tracing over OTLP", OFF, OTLP, Goal(1.1, 1.05)),
    Ratio("runs/s, no tracing over Langfuse", OFF, LANGFUSE, Goal(1.1, 1.05)),
    Ratio("CPU of a run, OTLP over no tracing", f"{OTLP}: {CPU}", f"{OFF}: {CPU}", Goal(1.1, 1.05)),
    Ratio(
        "CPU of a run, Langfuse over no tracing",
        f"{LANGFUSE}: {CPU}",
        f"{OFF}: {CPU}",
        Goal(1.1, 1.05),
    ),
    Ratio("runs/s, receiver up over hanging", OTLP, HANGING, Goal(1.02, 1.0)),
    Ratio("runs/s, receiver up over nobody there", OTLP, DOWN, Goal(1.02, 1.0)),
)
NOBODY = "http://127.0.0.1:9"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def tracing(rig: Rig) -> None:
    """Every way in turn, `TURNS` times; all turns of a way together are its round."""
    if "tracing" not in rig.kept:
        rig.kept["tracing"] = await _services(rig)
    services: dict[str, Running] = rig.kept["tracing"]
    sums = {name: _Sum() for name in services}
    names = list(services)
    for _ in range(rig.count(TURNS)):
        for name in names:
            await _slice(rig.count(RUNS, least=AT_ONCE), services[name], sums[name])
        names.append(names.pop(0))  # nobody always comes behind the same one
    for name, total in sums.items():
        rig.book.add(name, "runs/s", total.runs / total.seconds)
        rig.book.add(f"{name}: {CPU}", "ms/run", total.cpu_ms / total.runs)
        if name in (OTLP, LANGFUSE):
            rig.book.add(f"{name}: {TOLD}", "runs/run", total.told / total.runs)


@dataclass(slots=True)
class _Sum:
    """What all turns of one way come to. A single one is too short to mean anything."""

    runs: int = 0
    seconds: float = 0.0
    cpu_ms: float = 0.0
    told: int = 0


async def _slice(count: int, service: Running, total: _Sum) -> None:
    """One turn of one service, which is awake for as long as it lasts."""
    async with _awake(service):
        await asyncio.sleep(random.uniform(0, SETTLE_S))
        before = await _exported(service)
        rate, cpu_ms = await throughput(service, count)
        total.told += await _exported(service) - before
    total.runs += count
    total.seconds += count / rate
    total.cpu_ms += cpu_ms * count


async def _exported(service: Running) -> int:
    """How many runs this service has told a receiver of."""
    async with client.connected(service.port) as connection:
        page = await connection.answer(client.request("GET", "/metrics"))
    found = re.search(rb'^flexrun_traced_runs_total{outcome="exported"} (\d+)', page, re.MULTILINE)
    return int(found[1]) if found else 0


@asynccontextmanager
async def _awake(service: Running) -> AsyncIterator[None]:
    """A service that was stopped goes on for the time of the block, once it is fit to."""
    service.process.send_signal(signal.SIGCONT)
    try:
        await _fit(service)
        yield
    finally:
        service.process.send_signal(signal.SIGSTOP)


async def _fit(service: Running) -> None:
    """Wait until the service has driven a run. Raises `Refused` when it does not within `FIT_S`."""
    loop = asyncio.get_running_loop()
    until = loop.time() + FIT_S
    while True:
        try:
            await throughput(service, 1)
        except client.Refused:
            if loop.time() > until:
                raise
        else:
            return
        await asyncio.sleep(0.1)


async def _services(rig: Rig) -> dict[str, Running]:
    """A service for every way, warmed up and stopped."""
    up = await rig.stack.enter_async_context(_receiver(_accept))
    hanging = await rig.stack.enter_async_context(_receiver(_never))
    keys = {"LANGFUSE_PUBLIC_KEY": "pk-lf-bench", "LANGFUSE_SECRET_KEY": "sk-lf-bench"}
    ways: dict[str, dict[str, str]] = {
        OFF: {},
        OTLP: {"OTEL_EXPORTER_OTLP_ENDPOINT": up},
        LANGFUSE: {**keys, "LANGFUSE_BASE_URL": up},
        HANGING: {"OTEL_EXPORTER_OTLP_ENDPOINT": hanging},
        DOWN: {"OTEL_EXPORTER_OTLP_ENDPOINT": NOBODY},
    }
    found = {}
    for number, (name, settings) in enumerate(ways.items()):
        dsn = await rig.database(f"bench_tracing_{number}")
        found[name] = await rig.stack.enter_async_context(_service(dsn, settings))
        await throughput(found[name], AT_ONCE)
        found[name].process.send_signal(signal.SIGSTOP)
    return found


@asynccontextmanager
async def _service(dsn: str, settings: dict[str, str]) -> AsyncIterator[Running]:
    arguments = ["-m", "app.cli.main", "serve", "--port", "0"]
    service = await process.spawn(arguments, process.clean_environment(dsn) | settings)
    try:
        yield service
    finally:
        service.process.send_signal(signal.SIGCONT)
        await service.stop()


@asynccontextmanager
async def _receiver(answer: Answer) -> AsyncIterator[str]:
    """Takes POSTs for the time of the block."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with AsyncExitStack() as stack:
            stack.callback(writer.close)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                    await reader.readexactly(length)
                    await answer(writer)

    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 24)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _accept(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def _never(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()
