"""Signals: accepted in one short transaction, read by whoever drives the run."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, insert, select

from app.domain.errors import Conflict, NotFound
from app.store.database import Database
from app.store.tables import run_heads, signals


@dataclass(frozen=True, slots=True)
class SignalRow:
    """A signal that nobody consumed yet; `body` is JSON."""

    signal_id: UUID
    kind: str
    body: str


async def accept_signal(
    database: Database,
    *,
    tenant_id: str,
    run_id: UUID,
    signal: SignalRow,
    allowed: Collection[str],
) -> None:
    """Store the signal if the run is in one of the `allowed` statuses.

    Raises `NotFound` (`run_not_found`) or `Conflict` (`invalid_run_state`). The holder judges it
    again when it applies it, so that no lock is held between here and there.
    """
    async with database.transaction() as connection:
        status = (
            await connection.execute(
                select(run_heads.c.status).where(
                    run_heads.c.run_id == run_id, run_heads.c.tenant_id == tenant_id
                )
            )
        ).scalar()
        if status is None:
            raise NotFound(f"There is no run {run_id}.", code="run_not_found")
        if status not in allowed:
            raise Conflict(
                f"The run is {status}; this signal is for runs that are {' or '.join(allowed)}."
            )
        await connection.execute(
            insert(signals).values(
                signal_id=signal.signal_id,
                run_id=run_id,
                tenant_id=tenant_id,
                kind=signal.kind,
                body=signal.body,
                created_at=func.clock_timestamp(),
            )
        )


@dataclass(frozen=True, slots=True)
class SignalRecord:
    """A signal with what became of it, for the audit trail."""

    signal_id: UUID
    kind: str
    body: str
    created_at: datetime
    outcome: str | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "signal_id": str(self.signal_id),
            "kind": self.kind,
            "body": json.loads(self.body),
            "created_at": self.created_at.isoformat().replace("+00:00", "Z"),
            "outcome": self.outcome,
        }


async def all_signals(database: Database, run_id: UUID) -> list[SignalRecord]:
    """Every signal the run ever got, oldest first."""
    statement = (
        select(*(signals.c[("signal_id", "kind", "body", "created_at", "outcome")]))
        .where(signals.c.run_id == run_id)
        .order_by(signals.c.signal_id)
    )
    async with database.read() as connection:
        return [SignalRecord(*row) for row in await connection.execute(statement)]


async def open_signals(database: Database, run_id: UUID) -> list[SignalRow]:
    """Signals of the run that wait, in the order in which they were accepted."""
    statement = (
        select(signals.c.signal_id, signals.c.kind, signals.c.body)
        .where(signals.c.run_id == run_id, signals.c.outcome.is_(None))
        .order_by(signals.c.signal_id)
    )
    async with database.read() as connection:
        return [SignalRow(*row) for row in await connection.execute(statement)]
