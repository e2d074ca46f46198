"""Starts: from nothing, and on data that are there; and what the process weighs when it idles."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench import client, process
from bench.process import Running
from bench.rig import Rig, forget_data
from bench.stats import Goal

IDLE_S = 2.0
MB = 1_000_000


async def starts(rig: Rig) -> None:
    """Spawn to `/readyz` 200, on an embedded Postgres that no other process keeps alive."""
    data_dir = rig.scratch / "starts"
    cold = await _ready_in(rig, data_dir)
    rig.book.add("start on an empty folder, to ready", "s", cold[0], goal=Goal(4, 2))
    warm = await _ready_in(rig, data_dir)
    rig.book.add("start on existing data, to ready", "s", warm[0])
    rig.book.add("memory of the idle service", "MB", warm[1], goal=Goal(200, 120))
    await asyncio.to_thread(forget_data, data_dir)


async def _ready_in(rig: Rig, data_dir: Path) -> tuple[float, float]:
    """Seconds to ready, and the MB of the process when it has idled for a moment."""
    started = time.perf_counter()
    service: Running = await process.start(data_dir=data_dir)
    try:
        async with client.connected(service.port) as calls:
            await calls.answer(client.request("GET", "/readyz"))
        took = time.perf_counter() - started
        await asyncio.sleep(IDLE_S if rig.scale >= 1 else IDLE_S * rig.scale)
        return took, service.rss / MB
    finally:
        await service.stop()
