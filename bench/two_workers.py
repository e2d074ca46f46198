"""One worker process against two on the same database and the same two cores.

The queue appears in one commit while the workers idle, so that their start is not measured; a rate
is runs over the time from the first event of a drive to the last RUN_DONE. The pair of services
under HTTP load has a client each, and both share what one service gets alone.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import datetime

import asyncpg
import orjson

from app.kit.ids import new_id
from bench import client, envelopes, process
from bench.growth import TABLES, copies, rows_of
from bench.rig import Rig
from bench.shapes import AT_ONCE

RUNS = 3_000
DRAIN_S = 120.0
LOOK_S = 0.05
WAITING = "select exists (select from run_heads where status not in ('done', 'failed'))"

ONE = "queue of diamonds, one worker process"
TWO = "queue of diamonds, two worker processes"
ONE_SERVICE = f"diamond over HTTP, {AT_ONCE} at once, one service process"
TWO_SERVICES = f"diamond over HTTP, {AT_ONCE} at once, two service processes"


async def two_workers(rig: Rig) -> None:
    """Both ways in turn; which comes first changes from round to round."""
    ways = [(1, ONE, ONE_SERVICE), (2, TWO, TWO_SERVICES)]
    turn = rig.kept["two_workers"] = rig.kept.get("two_workers", 0) + 1
    for processes, queue, load in ways if turn % 2 else reversed(ways):
        dsn = await rig.database("bench_workers")
        count = rig.count(RUNS, least=50)
        rig.book.add(queue, "runs/s", await _drain(dsn, processes, count))
        rig.book.add(load, "runs/s", await _load(dsn, processes, count))


async def _drain(dsn: str, workers: int, count: int) -> float:
    """Runs per second of so many worker processes that find `count` runs in the queue."""
    model = await _queue_one(dsn)
    async with AsyncExitStack() as stack:
        for _ in range(workers):
            started = process.running("worker", database_url=dsn)
            await stack.enter_async_context(started)
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        await _multiply(connection, model, count)
        async with asyncio.timeout(DRAIN_S):
            while await connection.fetchval(WAITING):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(LOOK_S)
        return count / await _took(connection, count)


async def _queue_one(dsn: str) -> dict[str, list[asyncpg.Record]]:
    """The rows of one run as an API without a worker stores it; the run itself is removed."""
    async with process.running("api", database_url=dsn) as api, client.connected(api.port) as calls:
        run = await calls.json("POST", "/v1/runs", envelopes.diamond())
    connection = await asyncpg.connect(dsn)
    try:
        found = {table: await connection.fetch(rows_of(table), run["run_id"]) for table in TABLES}
        await connection.execute("delete from run_heads")
        return found
    finally:
        await connection.close()


async def _multiply(
    connection: asyncpg.Connection[asyncpg.Record],
    rows: dict[str, list[asyncpg.Record]],
    count: int,
) -> None:
    """The same run so many times, under new ids, to be seen all at once."""
    model = rows["runs"][0]["run_id"]
    ids = [new_id() for _ in range(count)]
    async with connection.transaction():
        for table in TABLES:
            found = [dict(row) for row in rows[table]]
            if found:
                await connection.copy_records_to_table(
                    table, records=copies(found, model, ids), columns=list(found[0])
                )


async def _took(connection: asyncpg.Connection[asyncpg.Record], count: int) -> float:
    """Seconds from the first RUN_START to the last RUN_DONE, by the times in the events."""
    rows = await connection.fetch(
        "select body from events where type in ('RUN_START', 'RUN_DONE')", timeout=60
    )
    if len(rows) != 2 * count:
        raise RuntimeError(f"{count} runs have {len(rows)} starts and good ends")
    times = [datetime.fromisoformat(orjson.loads(row["body"])["ts"]) for row in rows]
    return (max(times) - min(times)).total_seconds()


async def _load(dsn: str, services: int, count: int) -> float:
    """Runs per second over HTTP, `AT_ONCE` at once over all services."""
    body = envelopes.encoded(envelopes.diamond(), at_least=envelopes.BODY_BYTES)
    sent = client.request("POST", "/v1/runs", body, client.EVENT_STREAM)
    async with AsyncExitStack() as stack:
        ports = []
        for _ in range(services):
            started = process.running(database_url=dsn)
            ports.append((await stack.enter_async_context(started)).port)
        for port in ports:
            await client.at_once(port, sent, AT_ONCE)
        began = time.perf_counter()
        await asyncio.gather(
            *(
                client.at_once(port, sent, count // services, clients=AT_ONCE // services)
                for port in ports
            )
        )
        return count // services * services / (time.perf_counter() - began)
