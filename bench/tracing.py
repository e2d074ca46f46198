"""What tracing costs: the same load without it, with a receiver, and with one that is no help.

All services stand on one Postgres, each with a database of its own, and take the load in turn; who
comes first changes from round to round. The receiver takes everything and reads nothing, so that
it costs as little of this machine as a distant one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from bench import process
from bench.process import Running
from bench.rig import Rig
from bench.shapes import AT_ONCE, throughput
from bench.stats import Goal, Ratio

RUNS = 1_500
OFF = f"diamond, {AT_ONCE} at once, no tracing"
OTLP = f"diamond, {AT_ONCE} at once, traced by OTLP"
LANGFUSE = f"diamond, {AT_ONCE} at once, traced by Langfuse"
HANGING = f"diamond, {AT_ONCE} at once, traced, the receiver hangs"
DOWN = f"diamond, {AT_ONCE} at once, traced, nobody receives"
CPU = "CPU of the service"
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

REST_S = 1.0
IDLE_SHARE = 0.05

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def tracing(rig: Rig) -> None:
    """Every way once."""
    if "tracing" not in rig.kept:
        rig.kept["tracing"] = await _services(rig)
    services: dict[str, Running] = rig.kept["tracing"]
    names = list(services)
    turn = rig.kept["tracing_turn"] = rig.kept.get("tracing_turn", -1) + 1
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        rate, cpu_ms = await throughput(services[name], rig.count(RUNS, least=AT_ONCE))
        rig.book.add(name, "runs/s", rate)
        rig.book.add(f"{name}: {CPU}", "ms/run", cpu_ms)
        await _at_rest(services[name])


async def _at_rest(service: Running) -> None:
    """Until the service has nothing left to tell: what it does then would cost the next one."""
    used = service.cpu_s
    while True:
        await asyncio.sleep(REST_S)
        before, used = used, service.cpu_s
        if used - before < REST_S * IDLE_SHARE:
            return


async def _services(rig: Rig) -> dict[str, Running]:
    """A service for every way, warmed up."""
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
    return found


@asynccontextmanager
async def _service(dsn: str, settings: dict[str, str]) -> AsyncIterator[Running]:
    arguments = ["-m", "app.cli.main", "serve", "--port", "0"]
    service = await process.spawn(arguments, process.clean_environment(dsn) | settings)
    try:
        yield service
    finally:
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
