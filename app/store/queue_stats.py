"""How much work waits and who takes part, for the metrics page: read through partial indexes only.

The heads of finished runs are many and are never touched: sequential scans are off for these
statements, because a planner that sees a long queue would rather read the whole table. Counting a
lane stops at `LANE_COUNT_MAX`. `QueueWatch` asks at most once in `READ_EVERY_S`, however many ask
it, and less often when the answer took long: many processes do so, and a long queue must not get
longer because it is looked at.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.domain.envelope import Lane
from app.domain.errors import Unavailable
from app.kit.ids import created_ms
from app.store.database import Database

log = logging.getLogger("flexrun.queue")

ROLES = ("serve", "api", "worker")
LANE_COUNT_MAX = 100_000
READ_EVERY_S = 5.0
READ_TIMEOUT_S = 2.0
REST_FACTOR = 100
"""A reading is followed by a rest of so many times what it took: one hundredth of a server core."""

REST_MAX_S = 30.0

_BY_INDEX = (
    "set local enable_seqscan = off",
    "set local enable_bitmapscan = off",  # a bitmap is built whole, limit or not
    "set local max_parallel_workers_per_gather = 0",
)
_QUEUED = text(
    """select l.lane, q.depth, q.oldest from unnest(cast(:lanes as text[])) as l (lane)
    cross join lateral (
        select count(*) as depth, min(c.run_id::text) as oldest from (
            select h.run_id from run_heads h
            where h.lane = l.lane and h.status = 'queued' and h.owner is null limit :most) c) q"""
)
_UNDER_WAY = text(
    """select status, sum(n)::bigint from (
        select status, count(*) as n from run_heads where owner is not null group by status
        union all
        select status, count(*) from run_heads
        where owner is null and wake_at is not null and status = 'running' group by status) s
    where status in ('queued', 'running') group by status"""
)
_WORKERS = text(
    "select role, count(*) from workers where lease_until > clock_timestamp() group by role"
)


@dataclass(frozen=True, slots=True)
class QueueStats:
    """What all processes share. `oldest_ms`: when the oldest queued run of a lane was accepted."""

    depth: Mapping[str, int]
    oldest_ms: Mapping[str, int]
    unfinished: Mapping[str, int]
    workers: Mapping[str, int]


async def read_queue(database: Database) -> QueueStats:
    """Read it now. `Unavailable` when the database is away."""
    async with database.read() as connection:
        for setting in _BY_INDEX:
            await connection.execute(text(setting))
        lanes = {"lanes": [str(lane) for lane in Lane], "most": LANE_COUNT_MAX}
        queued = (await connection.execute(_QUEUED, lanes)).all()
        under_way = {row[0]: int(row[1]) for row in await connection.execute(_UNDER_WAY)}
        workers = {row[0]: int(row[1]) for row in await connection.execute(_WORKERS)}
    depth = {row[0]: int(row[1]) for row in queued}
    return QueueStats(
        depth=depth,
        oldest_ms={row[0]: created_ms(UUID(row[2])) for row in queued if row[2] is not None},
        unfinished={
            "queued": sum(depth.values()) + under_way.get("queued", 0),
            "running": under_way.get("running", 0),
        },
        workers={role: workers.get(role, 0) for role in ROLES},
    )


class QueueWatch:
    """The newest reading; one statement at a time, however many scrapers there are."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = asyncio.Lock()
        self._next_at = 0.0
        self._found: QueueStats | None = None

    async def stats(self) -> QueueStats | None:
        """The newest reading, as a rule of the last `READ_EVERY_S`; None: the database is away."""
        async with self._lock:
            asked_at = time.monotonic()
            if asked_at >= self._next_at:
                self._found = await self._read()
                now = time.monotonic()
                rest = (now - asked_at) * REST_FACTOR if self._found is not None else 0.0
                self._next_at = now + max(READ_EVERY_S, min(rest, REST_MAX_S))
            return self._found

    async def _read(self) -> QueueStats | None:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                return await read_queue(self._database)
        except (Unavailable, TimeoutError, DBAPIError) as error:
            log.warning("the queue can not be read (%s)", type(error).__name__)
            return None
