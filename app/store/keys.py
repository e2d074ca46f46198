"""Idempotency keys, as far as they are not part of the submit statement itself."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from sqlalchemy import delete, func, select, tuple_

from app.store.database import Database
from app.store.tables import idempotency_keys

KEPT = timedelta(hours=24)
DELETED_AT_ONCE = 10_000


async def find_key(
    database: Database, tenant_id: str, route: str, key: str
) -> tuple[UUID, str] | None:
    """`(run_id, fingerprint)` of a key that was used."""
    statement = select(idempotency_keys.c.run_id, idempotency_keys.c.fingerprint).where(
        idempotency_keys.c.tenant_id == tenant_id,
        idempotency_keys.c.route == route,
        idempotency_keys.c.key == key,
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    return None if row is None else (row.run_id, row.fingerprint)


async def forget_old_keys(database: Database) -> int:
    """Delete keys older than a day, in steps that no time limit cuts off; how many went."""
    key = tuple_(*idempotency_keys.primary_key.columns)
    old = select(*idempotency_keys.primary_key.columns).where(
        idempotency_keys.c.created_at < func.clock_timestamp() - KEPT
    )
    deleted = 0
    while True:
        async with database.transaction() as connection:
            result = await connection.execute(
                delete(idempotency_keys).where(key.in_(old.limit(DELETED_AT_ONCE)))
            )
        deleted += result.rowcount
        if result.rowcount < DELETED_AT_ONCE:
            return deleted
