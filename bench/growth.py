"""Runs per second on a journal that holds a million events, against one that is empty."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import asyncpg

from app.kit.ids import created_ms
from bench import client, envelopes, process
from bench.process import Running
from bench.rig import Rig
from bench.shapes import AT_ONCE, throughput

EVENTS = 1_000_000
TABLES = ("runs", "run_heads", "plan_versions", "events")
DAY_MS = 86_400_000

EMPTY = f"diamond, {AT_ONCE} at once, on an empty journal"
FULL = f"diamond, {AT_ONCE} at once, on 1 M events"


async def growth(rig: Rig) -> None:
    """Two services on two databases of one server, in turn."""
    if "growth" not in rig.kept:
        rig.kept["growth"] = await _open(rig)
    empty, full = rig.kept["growth"]
    for what, service in ((EMPTY, empty), (FULL, full)):
        rate, _ = await throughput(service, rig.count(600, least=AT_ONCE))
        rig.book.add(what, "runs/s", rate)


async def _open(rig: Rig) -> tuple[Running, Running]:
    services = []
    for name in ("bench_empty", "bench_full"):
        dsn = await rig.database(name)
        service = await rig.stack.enter_async_context(process.running(database_url=dsn))
        body = envelopes.encoded(envelopes.diamond(), at_least=envelopes.BODY_BYTES)
        sent = client.request("POST", "/v1/runs", body, client.EVENT_STREAM)
        await client.one_by_one(service.port, sent, 1, warm=0)
        if name == "bench_full":
            await fill(dsn, rig.count(EVENTS, least=1_000))
        services.append(service)
    return services[0], services[1]


async def fill(dsn: str, events: int) -> None:
    """Copy the one run that is there until the journal holds this many events."""
    connection = await asyncpg.connect(dsn)
    try:
        model = await connection.fetchval("select run_id from run_heads where status = 'done'")
        rows = {
            table: [dict(row) for row in await connection.fetch(rows_of(table), model)]
            for table in TABLES
        }
        ids = list(_ids(model, events // len(rows["events"])))
        for table in TABLES:
            await connection.copy_records_to_table(
                table,
                records=copies(rows[table], model, ids),
                columns=list(rows[table][0]),
                timeout=300,
            )
        for table in TABLES:
            await connection.execute(f"vacuum (analyze) {table}", timeout=300)
        await connection.execute("checkpoint", timeout=300)
    finally:
        await connection.close()


def rows_of(table: str) -> str:
    """The query for the rows of one run in a table."""
    return f"select * from {table} where run_id = $1"


def _ids(model: UUID, count: int) -> Iterator[UUID]:
    """Ids in the order of time, spread over the day of the model until its own moment."""
    until = created_ms(model)
    since = until - until % DAY_MS
    for number in range(count):
        at = since + (until - since) * number // count
        rest = secrets.randbits(74)
        low = (7 << 76) | ((rest >> 62) << 64) | (2 << 62) | (rest & ((1 << 62) - 1))
        yield UUID(int=(at << 80) | low)


def copies(rows: list[dict[str, Any]], model: UUID, ids: list[UUID]) -> Iterator[tuple[Any, ...]]:
    """The rows once for each id, which replaces the model's own, also within texts."""
    was = str(model)
    for run_id in ids:
        text = str(run_id)
        for row in rows:
            yield tuple(
                run_id
                if value == model
                else value.replace(was, text)
                if isinstance(value, str)
                else value
                for value in row.values()
            )
