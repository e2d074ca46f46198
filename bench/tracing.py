"""What tracing costs: the same service with it and without, under a load that does not stop.

Two processes of one kind differ by more than an exporter costs, and a machine is slow for seconds
at a time. So it is one process (`switched_tracing`), in which tracing is on for a second and off
for a second, which of them first by chance. Each such pair gives a ratio, and the median of all
pairs of all rounds is what counts. The receiver takes everything and reads nothing, so that it
costs as little of this machine as a distant one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import psutil

from bench import client, process
from bench.client import Load
from bench.process import Running
from bench.rig import Rig
from bench.shapes import AT_ONCE, DIAMOND
from bench.stats import Book, Goal, median_interval
from bench.switched_tracing import OFF, ON

PAIRS = 4
SLICE_S = 1.0
WARM_S = 2.0
CALM_RUNS = 400
CALM_RUNS_PER_S = 200

OTLP = "traced by OTLP"
LANGFUSE = "traced by Langfuse"
HANGING = "traced, the receiver hangs"
DOWN = "traced, nobody receives"
RATE = f"diamond, {AT_ONCE} at once, without"
TOLD = "share of the runs that are told"
CPU = "CPU of a run and its export, with over without"
TIME = "time of a run, with over without"
BEHIND = f"at {CALM_RUNS_PER_S} diamonds a second, behind by"
GOALS = {OTLP: Goal(1.1, 1.05), LANGFUSE: Goal(1.1, 1.05)}
NO_HELP = {
    HANGING: "time of a run, receiver hangs over receives",
    DOWN: "time of a run, nobody receives over receives",
}
NOBODY = "http://127.0.0.1:9"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def tracing(rig: Rig) -> None:
    """Every way for some pairs of slices; the exporters also with time to spare."""
    async with AsyncExitStack() as stack:
        up = await stack.enter_async_context(_receiver(_accept))
        hanging = await stack.enter_async_context(_receiver(_never))
        keys = {"LANGFUSE_PUBLIC_KEY": "pk-lf-bench", "LANGFUSE_SECRET_KEY": "sk-lf-bench"}
        ways = {
            OTLP: {"OTEL_EXPORTER_OTLP_ENDPOINT": up},
            LANGFUSE: {**keys, "LANGFUSE_BASE_URL": up},
            HANGING: {"OTEL_EXPORTER_OTLP_ENDPOINT": hanging},
            DOWN: {"OTEL_EXPORTER_OTLP_ENDPOINT": NOBODY},
        }
        for name, settings in ways.items():
            async with _service(await rig.database("bench_tracing"), settings) as service:
                if name in GOALS:
                    behind_s = await _behind(rig.count(CALM_RUNS, least=AT_ONCE), service)
                    rig.book.add(f"{name}: {BEHIND}", "s", behind_s, goal=Goal(2.0, 1.5))
                async with client.load(service.port, DIAMOND, AT_ONCE) as load:
                    await asyncio.sleep(WARM_S)
                    for _ in range(rig.count(PAIRS)):
                        await _pair(rig.book, name, service, load)
            _sum_up(rig.book, name)


def _sum_up(book: Book, name: str) -> None:
    """What the pairs of all rounds so far say together."""
    ratios = book.values(f"{name}: {TIME}")
    middle, (low, high) = statistics.median(ratios), median_interval(ratios)
    book.replace(f"{name}: {TIME}, 95 % interval of it", "x", low, middle, high)
    if name in NO_HELP:
        up = statistics.median(book.values(f"{OTLP}: {TIME}"))
        book.replace(NO_HELP[name], "x", middle / up, goal=Goal(1.02, 1.0))


@dataclass(frozen=True, slots=True)
class _Slice:
    """What a run took of the time and of the CPU, in seconds; the share of the runs that a receiver
    was told of."""

    time_s: float
    cpu_s: float
    told: float


async def _pair(book: Book, name: str, service: Running, load: Load) -> None:
    """A slice with tracing and one without."""
    slices = [True, False]
    random.shuffle(slices)
    pair = {is_on: await _slice(service, load, is_on) for is_on in slices}
    book.add(f"{name}: {RATE}", "runs/s", 1 / pair[False].time_s)
    book.add(f"{name}: {TOLD}", "runs/run", pair[True].told)
    book.add(f"{name}: {CPU}", "x", pair[True].cpu_s / pair[False].cpu_s)
    ratio = pair[True].time_s / pair[False].time_s
    book.add(f"{name}: {TIME}", "x", ratio, goal=GOALS.get(name))


async def _slice(service: Running, load: Load, is_on: bool) -> _Slice:
    told = await _exported(service)
    service.process.send_signal(ON if is_on else OFF)
    began, ended, cpu_s = time.perf_counter(), load.ended, _cpu_s(service)
    await asyncio.sleep(SLICE_S)
    runs = load.ended - ended
    took_s, cpu_s = time.perf_counter() - began, _cpu_s(service) - cpu_s
    return _Slice(took_s / runs, cpu_s / runs, (await _exported(service) - told) / runs)


async def _behind(count: int, service: Running) -> float:
    """Seconds of a steady pace of runs that a receiver was not yet told of when the last ended."""
    before = await _exported(service)
    await client.at_once(service.port, DIAMOND, count, every_s=1 / CALM_RUNS_PER_S)
    return (count - (await _exported(service) - before)) / CALM_RUNS_PER_S


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


@asynccontextmanager
async def _service(dsn: str, settings: dict[str, str]) -> AsyncIterator[Running]:
    arguments = ["-m", "bench.switched_tracing", "serve", "--port", "0"]
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
