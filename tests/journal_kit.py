"""A journal over a real database, without the rest of the service: for tests of the write path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg

from app.domain.events import Event, EventType
from app.domain.run import RunStatus
from app.journal.frames import Frame
from app.journal.record import Append, Journal, RunHandle
from app.kit.clock import now_ms
from app.kit.ids import created_ms, new_id
from app.kit.metrics import Metrics
from app.kit.rfc3339 import to_datetime
from app.store.append import NewRun
from app.store.database import Database
from app.store.partitions import make_partitions, make_partitions_hot

Connect = Callable[[], Awaitable[asyncpg.Connection]]


@dataclass
class Sink:
    """Takes published frames, as the feed does."""

    frames: dict[UUID, list[Frame]] = field(default_factory=dict)

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        self.frames.setdefault(run_id, []).extend(frames)


@dataclass
class JournalKit:
    dsn: str
    journal: Journal
    sink: Sink
    metrics: Metrics
    owner: str

    def submit(
        self, *, key: str | None = None, run_id: UUID | None = None, epoch: int = 1
    ) -> tuple[RunHandle, asyncio.Future[None]]:
        """A new run, born claimed; its handle and when it is durable."""
        handle = RunHandle(run_id or new_id(), epoch, 0, "0" * 32, recorded_epoch=epoch)
        append = Append(
            [Event(EventType.RUN_QUEUED, {"objective": "o", "lane": "standard"})],
            RunStatus.RUNNING,
            self.owner,
            new_run=self._new_run(handle, key),
        )
        handle.stamp(append.events, now_ms())
        return handle, self.journal.record(handle, append)

    def _new_run(self, handle: RunHandle, key: str | None) -> NewRun:
        return NewRun(
            tenant_id="default",
            created_at=to_datetime(created_ms(handle.run_id)),
            objective="o",
            label=None,
            correlation_id=None,
            envelope="{}",
            traceparent="00-0-0-01",
            lane="standard",
            idempotency=None if key is None else ("POST /v1/runs", key, "f"),
        )

    def log(
        self, handle: RunHandle, *texts: str, status: RunStatus = RunStatus.RUNNING, **more: Any
    ) -> asyncio.Future[None]:
        """Append LOG events."""
        events = [Event(EventType.LOG, {"message": text}) for text in texts]
        handle.stamp(events, now_ms())
        owner = self.owner if status is RunStatus.RUNNING else None
        return self.journal.record(handle, Append(events, status, owner, **more))

    async def rows(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self.dsn)
        try:
            found: list[asyncpg.Record] = await connection.fetch(sql, *arguments)
            return found
        finally:
            await connection.close()

    async def messages(self, run_id: UUID) -> list[str]:
        """The LOG messages of a run, after checking that its numbering has no gap."""
        rows = await self.rows(
            "select seq, body::json->'data'->>'message' as message from events "
            "where run_id = $1 order by seq",
            run_id,
        )
        assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["message"] for row in rows if row["message"] is not None]


@asynccontextmanager
async def journal_kit(
    dsn: str,
    connect: Connect | None = None,
    *,
    writers: int = 1,
    partitions: bool = True,
    owner: str = "w1",
) -> AsyncIterator[JournalKit]:
    """One writer by default, so that tests decide what is in a batch."""

    async def plain() -> asyncpg.Connection:
        return await asyncpg.connect(dsn, server_settings={"lock_timeout": "500ms"})

    if partitions:
        database = await Database.open(dsn)
        await make_partitions(database, datetime.now(UTC).date())
        await database.close()
    sink = Sink()
    metrics = Metrics()
    journal = Journal(connect or plain, sink, make_partitions_hot, writers=writers, metrics=metrics)
    await journal.start()
    try:
        yield JournalKit(dsn, journal, sink, metrics, owner)
    finally:
        await journal.close()
