"""Reads the database for the checker, by SQL of its own, run by run; and watches heads meanwhile.

For the checker alone; it never writes, but for the one attempt to change a stored event that the
database has to refuse.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tests.chaos.history import (
    BreakerRow,
    ClientLog,
    Connection,
    EventRow,
    Head,
    RunRecord,
    SignalRow,
    Surroundings,
    ToolCall,
)

PAGE_RUNS = 200
LOOK_S = 0.5
PATIENCE_S = 60.0
AWAY = (
    *(OSError, TimeoutError),
    *(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError),
)


class Watcher:
    """Sees heads change while everything runs: the fence may only ever move forward."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._task: asyncio.Task[None] | None = None
        self.looks = 0
        self.sightings: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="watcher")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def is_watching(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _watch(self) -> None:
        while True:
            try:
                connection = await asyncpg.connect(self._dsn, timeout=5)
                try:
                    while True:
                        await self._look(connection)
                        await asyncio.sleep(LOOK_S)
                finally:
                    connection.terminate()
            except AWAY:
                await asyncio.sleep(LOOK_S)

    async def _look(self, connection: asyncpg.Connection) -> None:
        rows = await connection.fetch(
            """select run_id, epoch, seq from run_heads
            where status in ('queued', 'running', 'awaiting_human', 'paused')"""
        )
        self.looks += 1
        for run_id, epoch, seq in rows:
            seen = self.sightings[str(run_id)]
            if not seen or seen[-1] != (epoch, seq):
                seen.append((epoch, seq))


async def fetch(dsn: str, query: str, *arguments: Any) -> list[Any]:
    """The rows of one query. A database that is away just then is asked again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                connection = await asyncpg.connect(dsn, timeout=5)
                try:
                    return list(await connection.fetch(query, *arguments))
                finally:
                    await connection.close()
            except AWAY:
                await asyncio.sleep(LOOK_S)


async def unfinished(dsn: str) -> list[tuple[str, str]]:
    """Runs that are not over, with their status."""
    rows = await fetch(
        dsn,
        """select run_id::text, status from run_heads
        where status not in ('done', 'failed', 'cancelled')""",
    )
    return [(row[0], row[1]) for row in rows]


async def owned_by(dsn: str, pid: int) -> int:
    """How many runs are owned by the worker with this pid."""
    rows = await fetch(
        dsn, "select count(*) from run_heads where owner like '%:' || $1::text || ':%'", str(pid)
    )
    return int(rows[0][0])


async def signals_open(dsn: str) -> int:
    """How many signals wait for their outcome."""
    return int((await fetch(dsn, "select count(*) from signals where outcome is null"))[0][0])


async def event_count(dsn: str) -> int:
    """How many events there are by now."""
    return int((await fetch(dsn, "select coalesce(sum(seq), 0) from run_heads"))[0][0])


async def refuses_change(connection: asyncpg.Connection) -> bool:
    """Whether the database refuses to change and to drop what was written (I1)."""
    for statement in ("update events set level = level", "delete from events"):
        try:
            await connection.execute(statement)
        except asyncpg.RestrictViolationError:
            continue
        return False
    return True


async def surroundings(connection: asyncpg.Connection) -> Surroundings:
    """Keys, labels, signals and announcements."""
    around = Surroundings()
    for row in await connection.fetch("select key, run_id::text from idempotency_keys"):
        around.key_of_run[row["key"]] = row["run_id"]
    for row in await connection.fetch(
        """select correlation_id, run_id::text from runs
        where correlation_id is not null and resumed_from is null"""
    ):
        around.runs_of_label.setdefault(row["correlation_id"], []).append(row["run_id"])
    for row in await connection.fetch("select signal_id::text from signals"):
        around.signal_ids.add(row["signal_id"])
    for row in await connection.fetch(
        "select scope, worker_id, generation, kind, run_id::text from breaker_transitions"
    ):
        around.announced.append(BreakerRow(*row))
    return around


async def runs(
    connection: asyncpg.Connection,
    log: ClientLog,
    ledger: dict[str, list[ToolCall]],
    watcher: Watcher | None = None,
) -> AsyncIterator[RunRecord]:
    """Every run there is, with what clients and tools know of it."""
    connections: defaultdict[str, list[Connection]] = defaultdict(list)
    for seen in log.connections:
        connections[seen.run_id].append(seen)
    last = UUID(int=0)
    while True:
        heads = await connection.fetch(
            """select run_id, epoch, seq, status, owner from run_heads where run_id > $1
            order by run_id limit $2""",
            last,
            PAGE_RUNS,
        )
        if not heads:
            return
        last = heads[-1]["run_id"]
        rows = await _rows(connection, [head["run_id"] for head in heads])
        for head in heads:
            run_id = str(head["run_id"])
            yield RunRecord(
                run_id=run_id,
                head=Head(head["epoch"], head["seq"], head["status"], head["owner"]),
                rows=rows["events"].get(head["run_id"], []),
                plans=dict(rows["plans"].get(head["run_id"], [])),
                snapshots=rows["snapshots"].get(head["run_id"], []),
                signals=rows["signals"].get(head["run_id"], []),
                calls=ledger.get(run_id, []),
                frames=log.frames.get(run_id, {}),
                connections=connections.get(run_id, []),
                sightings=watcher.sightings.get(run_id, []) if watcher else [],
            )


async def _rows(
    connection: asyncpg.Connection, run_ids: list[UUID]
) -> dict[str, dict[UUID, list[Any]]]:
    """The rows of a page of runs, by table and run."""
    found: dict[str, defaultdict[UUID, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for row in await connection.fetch(
        """select run_id, seq, type, node_id, attempt, body from events
        where run_id = any($1::uuid[]) order by run_id, seq""",
        run_ids,
    ):
        run_id, seq, event_type, node_id, attempt, body = row
        found["events"][run_id].append(EventRow(seq, event_type, node_id, attempt, body.encode()))
    for run_id, version, body in await connection.fetch(
        "select run_id, version, body from plan_versions where run_id = any($1::uuid[])", run_ids
    ):
        found["plans"][run_id].append((version, orjson.loads(body)))
    for run_id, seq, body in await connection.fetch(
        "select run_id, seq, body from snapshots where run_id = any($1::uuid[]) order by seq",
        run_ids,
    ):
        found["snapshots"][run_id].append((seq, body.encode()))
    for run_id, signal_id, kind, key, outcome in await connection.fetch(
        """select run_id, signal_id::text, kind, idempotency_key, outcome from signals
        where run_id = any($1::uuid[])""",
        run_ids,
    ):
        found["signals"][run_id].append(SignalRow(signal_id, kind, key, outcome))
    return {name: dict(found[name]) for name in ("events", "plans", "snapshots", "signals")}
