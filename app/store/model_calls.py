"""The calls of models in the journal of all runs of a tenant, newest run first.

Read through the index `events_model_calls` and the order of the partitions: ids of runs are ordered
by time, and so are the days, so that a page touches the newest partitions until it is full. Only
calls are looked at, never other events; those of other tenants are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Select, Text, literal_column, select, tuple_

from app.domain.events import EventType
from app.kit.ids import run_day
from app.store.database import Database
from app.store.tables import events, runs

# Literal, or the planner could not know that the partial index holds all of them.
_RESPONSE = literal_column(f"'{EventType.LLM_RESPONSE}'", Text)
_ORDER = (events.c.run_day, events.c.run_id, events.c.seq)


@dataclass(frozen=True, slots=True)
class CallRow:
    """One LLM_RESPONSE; `body` is the whole event as JSON."""

    run_id: UUID
    seq: int
    body: str


async def model_calls(
    database: Database,
    tenant_id: str,
    *,
    before: tuple[UUID, int] | None,
    since: UUID | None,
    limit: int,
) -> list[CallRow]:
    """Calls behind `before` (run and seq), of runs from `since` on; at most `limit`."""
    statement = _statement(tenant_id, before, since, limit)
    async with database.read() as connection:
        rows = await connection.execute(statement)
        return [CallRow(row.run_id, row.seq, row.body) for row in rows]


def _statement(
    tenant_id: str, before: tuple[UUID, int] | None, since: UUID | None, limit: int
) -> Select[tuple[UUID, int, str]]:
    statement = (
        select(events.c.run_id, events.c.seq, events.c.body)
        .join(runs, runs.c.run_id == events.c.run_id)
        .where(events.c.type == _RESPONSE, runs.c.tenant_id == tenant_id)
        .order_by(*(column.desc() for column in _ORDER))
        .limit(limit)
    )
    if before is not None:
        run_id, seq = before
        day = run_day(run_id)
        last = tuple_(day, run_id, seq, types=[column.type for column in _ORDER])
        # The day alone as well: it is what tells which partitions are not needed.
        statement = statement.where(events.c.run_day <= day, tuple_(*_ORDER) < last)
    if since is not None:
        statement = statement.where(events.c.run_day >= run_day(since), events.c.run_id >= since)
    return statement
