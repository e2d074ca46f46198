"""kill -9 or SIGSTOP in the middle of a run: how long until the next node event is in the journal.

The time of an event is the wall clock of the process that recorded it, so what is reported is when
the run went on, not when somebody could read it.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from app.worker import LOOK_EVERY_S
from bench import client, envelopes, process
from bench.process import Running
from bench.rig import Rig
from bench.stats import Goal, percentile

NODES = 1_000
KILL_AFTER_BYTES = 60_000
PAGE = 1_000
FINISH_S = 60.0

LEASE_S = 10.0
AT_ONCE = Goal(1.0, 0.6)

FROZEN = "SIGSTOP, another worker alive: to the next node event"
ALIVE = "kill -9, another worker alive: to the next node event"
RESTARTED = "kill -9, same service restarted: to the next node event"
WITH_POSTGRES = "kill -9, same service and its Postgres restarted: to the next node event"


async def takeover(rig: Rig) -> None:
    """One kill a round; p50 and p99 are taken over all rounds."""
    dsn = await _database(rig)
    rig.book.add(ALIVE, "s", *await _stop_beside_another(dsn, signal.SIGKILL), goal=AT_ONCE)
    _add_worst(rig, ALIVE)


async def frozen(rig: Rig) -> None:
    """One worker a round that stands still: its lease of 10 s has to end first."""
    dsn = await _database(rig)
    goal = Goal(LEASE_S + 1.0, LEASE_S)
    rig.book.add(FROZEN, "s", *await _stop_beside_another(dsn, signal.SIGSTOP), goal=goal)


async def restart(rig: Rig) -> None:
    """One kill of each kind a round, after which the same service is started again."""
    dsn = await _database(rig)
    rig.book.add(RESTARTED, "s", *await _kill_and_restart(dsn, None), goal=AT_ONCE)
    own = rig.scratch / "takeover"
    rig.book.add(WITH_POSTGRES, "s", *await _kill_and_restart(None, own), goal=AT_ONCE)
    _add_worst(rig, RESTARTED, WITH_POSTGRES)


def _add_worst(rig: Rig, *names: str) -> None:
    for figure in rig.book.figures():
        if figure.what in names:
            worst = f"{figure.what}, p99"
            rig.book.replace(worst, "s", percentile(figure.values, 0.99), goal=Goal(3.0, 3.0))


async def _database(rig: Rig) -> str:
    if "takeover" not in rig.kept:
        rig.kept["takeover"] = await rig.database("bench_takeover")
    found: str = rig.kept["takeover"]
    return found


async def _kill_and_restart(dsn: str | None, data_dir: Path | None) -> list[float]:
    """Seconds from the start of the new process to the next node event."""
    service = await process.start(database_url=dsn, data_dir=data_dir)
    try:
        run_id = await _run_until_under_way(service)
    finally:
        await service.kill()
    async with process.running(database_url=dsn, data_dir=data_dir) as again:
        return await _went_on(again, run_id, again.spawned_at)


async def _stop_beside_another(dsn: str, how: signal.Signals) -> list[float]:
    """Seconds from the signal to the next node event, which another process records."""
    async with process.running(database_url=dsn) as other:
        # A start always takes the same time: the kill would always be as far from the next look.
        await asyncio.sleep(random.uniform(0, LOOK_EVERY_S))
        service = await process.start(database_url=dsn)
        try:
            run_id = await _run_until_under_way(service)
            stopped_at = time.time()
            service.process.send_signal(how)
            return await _went_on(other, run_id, stopped_at)
        finally:
            await service.kill()


async def _run_until_under_way(service: Running) -> str:
    """Submit a long chain and wait until a part of its events has come."""
    async with client.connected(service.port) as calls:
        run = await calls.json("POST", "/v1/runs", envelopes.chain(NODES))
    path = f"/v1/runs/{run['run_id']}/events"
    (sink,) = await client.attach(service.port, path, 1)
    async with asyncio.timeout(FINISH_S):
        await sink.reach(KILL_AFTER_BYTES)
    sink.close()
    return str(run["run_id"])


async def _went_on(service: Running, run_id: str, since: float) -> list[float]:
    """When the first node event after the take-over happened. Empty: the kill came too late."""
    async with client.connected(service.port) as calls:
        # A stream ends with its run; nobody needs to ask for it again and again.
        path = f"/v1/runs/{run_id}/events"
        async with asyncio.timeout(FINISH_S):
            await calls.stream(client.request("GET", path, accept=client.EVENT_STREAM))
        found = await _first_after_takeover(calls, run_id)
    return [] if found is None else [found - since]


async def _first_after_takeover(calls: client.Connection, run_id: str) -> float | None:
    after, is_recovered = 0, False
    while True:
        path = f"/v1/runs/{run_id}/events?limit={PAGE}&after={after}"
        events: list[dict[str, Any]] = (await calls.json("GET", path))["events"]
        for event in events:
            if is_recovered and event["type"].startswith("NODE_"):
                return datetime.fromisoformat(event["ts"]).timestamp()
            is_recovered = is_recovered or event["type"] == "RUN_RECOVERED"
        if len(events) < PAGE:
            return None
        after = events[-1]["seq"]
