"""What tracing costs: the same load without it, with a receiver, and with one that is no help.

All services stand on one Postgres, each with a database of its own, and take the load in turn, a
second or so each, again and again. A machine is slow for seconds at a time, so each turn with
tracing has one without beside it, before or behind, and what counts is the median of such pairs. Of
two processes of one kind one may be faster for good, so every round starts new ones. A turn ends
when its service is quiet again, so that what an exporter has left to tell costs nobody else. The
receiver takes everything and reads nothing, so that it costs as little of this machine as a distant
one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import psutil

from bench import client, process
from bench.process import Running
from bench.rig import Rig
from bench.shapes import AT_ONCE, DIAMOND, throughput
from bench.stats import Goal, Ratio

RUNS = 1_000
TURNS = 2
WARM_RUNS = 300, 900
"""So many runs, between these, go before a turn: an exporter has seen by then that its service is
busy, and no turn begins with a batch of its."""
CALM_RUNS = 600
CALM_RUNS_PER_S = 200
QUIET_S = 0.6
QUIET_CPU_S = 0.04
"""A service that used less CPU in `QUIET_S`, its exporter with it, has nothing left to tell."""

OFF = f"diamond, {AT_ONCE} at once, no tracing"
OTLP = f"diamond, {AT_ONCE} at once, traced by OTLP"
LANGFUSE = f"diamond, {AT_ONCE} at once, traced by Langfuse"
HANGING = f"diamond, {AT_ONCE} at once, traced, the receiver hangs"
DOWN = f"diamond, {AT_ONCE} at once, traced, nobody receives"
CPU = "CPU of the service and of its exporter"
SLOWER = "runs/s, no tracing over this"
DEARER = "CPU of a run, this over no tracing"
TOLD = "share of the runs that are traced"
BEHIND = f"how far traces are behind at {CALM_RUNS_PER_S} diamonds a second, "
LIMITS = {OTLP: Goal(1.1, 1.05), LANGFUSE: Goal(1.1, 1.05)}
RATIOS = (
    Ratio("runs/s, receiver up over hanging", OTLP, HANGING, Goal(1.02, 1.0)),
    Ratio("runs/s, receiver up over nobody there", OTLP, DOWN, Goal(1.02, 1.0)),
)
NOBODY = "http://127.0.0.1:9"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def tracing(rig: Rig) -> None:
    """Every way in turn, `TURNS` times; then the exporters at a load that leaves time to spare."""
    async with AsyncExitStack() as stack:
        await _take_turns(rig, await _services(rig, stack))


async def _take_turns(rig: Rig, services: dict[str, Running]) -> None:
    count = rig.count(RUNS, least=AT_ONCE)
    traced = [name for name in services if name != OFF]
    for _ in range(rig.count(TURNS)):
        random.shuffle(traced)  # nobody always comes behind the same one
        for name in traced:
            pair = [OFF, name]
            random.shuffle(pair)
            _note(rig, {who: await _turn(count, services[who]) for who in pair})
    for name, sink in ((OTLP, "OTLP"), (LANGFUSE, "Langfuse")):
        behind_s = await _behind(rig.count(CALM_RUNS, least=AT_ONCE), services[name])
        rig.book.add(f"{BEHIND}{sink}", "s", behind_s, goal=Goal(2.0, 1.5))


def _note(rig: Rig, pair: dict[str, _Turn]) -> None:
    """What a turn without tracing and the one beside it came to."""
    [traced] = [name for name in pair if name != OFF]
    for name, turn in pair.items():
        rig.book.add(name, "runs/s", turn.rate)
        rig.book.add(f"{name}: {CPU}", "ms/run", turn.cpu_ms)
    if traced in (OTLP, LANGFUSE):
        rig.book.add(f"{traced}: {TOLD}", "runs/run", pair[traced].told)
    off, on = pair[OFF], pair[traced]
    goal = LIMITS.get(traced)
    rig.book.add(f"{traced}: {SLOWER}", "x", off.rate / on.rate, goal=goal)
    rig.book.add(f"{traced}: {DEARER}", "x", on.cpu_ms / off.cpu_ms, goal=goal)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What one turn came to; `told` is the share of its runs that a receiver was told of."""

    rate: float
    cpu_ms: float
    told: float


async def _turn(count: int, service: Running) -> _Turn:
    """One turn of one service, under a lasting load."""
    await throughput(service, random.randint(*WARM_RUNS))
    before, used_s = await _exported(service), _cpu_s(service)
    rate, _ = await throughput(service, count)
    told, used_s = await _exported(service) - before, _cpu_s(service) - used_s
    await _quiet(service)
    return _Turn(rate, used_s * 1000 / count, told / count)


async def _behind(count: int, service: Running) -> float:
    """Seconds of a steady pace of runs that a receiver was not yet told of when the last ended."""
    before = await _exported(service)
    await client.at_once(service.port, DIAMOND, count, every_s=1 / CALM_RUNS_PER_S)
    told = await _exported(service) - before
    await _quiet(service)
    return (count - told) / CALM_RUNS_PER_S


async def _quiet(service: Running) -> None:
    """Until the exporter has told of all that waits."""
    used_s = _cpu_s(service)
    while True:
        await asyncio.sleep(QUIET_S)
        before_s, used_s = used_s, _cpu_s(service)
        if used_s - before_s < QUIET_CPU_S:
            return


def _cpu_s(service: Running) -> float:
    """Seconds of CPU of a service and of its exporter, its only child."""
    children = psutil.Process(service.process.pid).children()
    return service.cpu_s + sum(sum(child.cpu_times()[:2]) for child in children)


async def _exported(service: Running) -> int:
    """How many runs this service has told a receiver of."""
    async with client.connected(service.port) as connection:
        page = await connection.answer(client.request("GET", "/metrics"))
    found = re.search(rb'^flexrun_traced_runs_total{outcome="exported"} (\d+)', page, re.MULTILINE)
    return int(found[1]) if found else 0


async def _services(rig: Rig, stack: AsyncExitStack) -> dict[str, Running]:
    """A service for every way, warmed up."""
    up = await stack.enter_async_context(_receiver(_accept))
    hanging = await stack.enter_async_context(_receiver(_never))
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
        found[name] = await stack.enter_async_context(_service(dsn, settings))
        await throughput(found[name], AT_ONCE)
        await _quiet(found[name])
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
