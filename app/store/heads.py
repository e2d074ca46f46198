"""Reads of run heads and keys on a writer's own connection."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from uuid import UUID

from app.store.database import HotConnection


@dataclass(frozen=True, slots=True)
class HeadRow:
    """The fence of a run and who holds it."""

    epoch: int
    seq: int
    status: str
    owner: str | None


async def read_heads(connection: HotConnection, run_ids: list[UUID]) -> dict[UUID, HeadRow]:
    """The heads of those runs that exist."""
    rows = await connection.fetch(
        "select run_id, epoch, seq, status, owner from run_heads where run_id = any($1::uuid[])",
        run_ids,
    )
    return {row[0]: HeadRow(row[1], row[2], row[3], row[4]) for row in rows}


async def event_body(connection: HotConnection, day: date, run_id: UUID, seq: int) -> str | None:
    """The stored body of one event."""
    found: str | None = await connection.fetchval(
        "select body from events where run_day = $1 and run_id = $2 and seq = $3", day, run_id, seq
    )
    return found


async def run_of_key(
    connection: HotConnection, tenant_id: str, route: str, key: str
) -> UUID | None:
    """The run that an idempotency key made."""
    found: UUID | None = await connection.fetchval(
        """select run_id from idempotency_keys
        where tenant_id = $1 and route = $2 and key = $3""",
        tenant_id,
        route,
        key,
    )
    return found
