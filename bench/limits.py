"""What the same machine can do in the same minute without the service, to judge it by."""

from __future__ import annotations

import asyncio
import statistics
import time

import asyncpg

from bench import client, process, servers
from bench.process import Running
from bench.rig import Rig

POST_RATE = "limit: bare FastAPI POST of 2 KB, 32 at once"
COMMIT = "limit: one-row commit of asyncpg, p50"
CLIENTS = 32
ROW_BYTES = 300


async def limits(rig: Rig) -> None:
    """A POST that only validates, and a commit of one row on the same Postgres."""
    rig.book.add(POST_RATE, "req/s", await _post_rate(rig))
    rig.book.add(COMMIT, "ms", await _commit_ms(rig))


async def stand_in(rig: Rig, kind: str) -> Running:
    """One of `bench.servers`, started when it is first needed."""
    key = f"server:{kind}"
    if key not in rig.kept:
        started = await process.spawn(("-m", "bench.servers", kind), process.clean_environment())
        rig.stack.push_async_callback(started.stop)
        rig.kept[key] = started
    found: Running = rig.kept[key]
    return found


async def _post_rate(rig: Rig) -> float:
    server = await stand_in(rig, "post")
    sent = client.request("POST", "/jobs", servers.job_body(2_048))
    connections = [await client.Connection.open(server.port) for _ in range(CLIENTS)]
    count = rig.count(6_000, least=CLIENTS)
    left = iter(range(count))

    async def work(connection: client.Connection) -> None:
        for _ in left:
            await connection.answer(sent)

    try:
        await connections[0].answer(sent)
        started = time.perf_counter()
        await asyncio.gather(*(work(connection) for connection in connections))
        return count / (time.perf_counter() - started)
    finally:
        for connection in connections:
            connection.close()


async def _commit_ms(rig: Rig) -> float:
    if "limits" not in rig.kept:
        rig.kept["limits"] = await rig.database("bench_limits", migrated=False)
    connection = await asyncpg.connect(rig.kept["limits"])
    try:
        await connection.execute(
            "create table if not exists rows (id bigserial primary key, body text not null)"
        )
        insert = await connection.prepare("insert into rows (body) values ($1)")
        body = "x" * ROW_BYTES
        took = []
        for _ in range(rig.count(500, least=20)):
            started = time.perf_counter()
            await insert.fetch(body)
            took.append((time.perf_counter() - started) * 1000)
        return statistics.median(took)
    finally:
        await connection.close()
