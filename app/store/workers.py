"""Who takes part, for people who look. The worker's own statements are in `leases.py`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select

from app.store.database import Database
from app.store.tables import workers


async def worker_of(database: Database, worker_id: str | None) -> dict[str, Any] | None:
    """The process that holds a run, with the seconds that are left of its lease; None: nobody."""
    if worker_id is None:
        return None
    left = func.extract("epoch", workers.c.lease_until - func.clock_timestamp())
    statement = select(*(workers.c[("host", "pid", "role", "started_at")]), left).where(
        workers.c.worker_id == worker_id
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    if row is None:
        return {"worker_id": worker_id, "alive": False}
    return {
        "worker_id": worker_id,
        "alive": row[4] > 0,
        "lease_left_s": round(float(row[4]), 1),
        "host": row.host,
        "pid": row.pid,
        "role": row.role,
        "started_at": row.started_at.isoformat().replace("+00:00", "Z"),
    }
