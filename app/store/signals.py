"""Signals: accepted in one short transaction, consumed by whoever drives the run.

A signal is a row from acceptance on. Its `outcome` is written in the append of the event that it
causes; one that came too late for its run is discarded by a worker.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert

from app.domain.errors import Conflict, IdempotencyMismatch, NotFound
from app.domain.signals import Signal, SignalKind
from app.store.database import Database, HotConnection
from app.store.tables import run_heads, signals


async def accept_signal(
    database: Database,
    tenant_id: str,
    signal: Signal,
    allowed: Collection[str],
    idempotency_key: str | None,
) -> UUID:
    """Store the signal if its run is in one of the `allowed` statuses; the id of what is stored.

    With a key that was used for the same run and kind, nothing is stored: the answer is the id of
    the first one. Raises `NotFound` (`run_not_found`), `Conflict` (`invalid_run_state`) and
    `IdempotencyMismatch`. The holder judges the signal again when it applies it, so that no lock is
    held between here and there.
    """
    async with database.transaction() as connection:
        status = (
            await connection.execute(
                select(run_heads.c.status).where(
                    run_heads.c.run_id == signal.run_id, run_heads.c.tenant_id == tenant_id
                )
            )
        ).scalar()
        if status is None:
            raise NotFound(f"There is no run {signal.run_id}.", code="run_not_found")
        if status not in allowed:
            raise wrong_state(signal.kind, status)
        stored = await connection.execute(
            insert(signals)
            .values(
                signal_id=signal.signal_id,
                run_id=signal.run_id,
                tenant_id=tenant_id,
                kind=signal.kind,
                body=orjson.dumps(signal.body).decode(),
                created_at=func.clock_timestamp(),
                idempotency_key=idempotency_key,
            )
            .on_conflict_do_nothing()
        )
    if stored.rowcount:
        return signal.signal_id
    # Two of the same key at once: the other one came first.
    assert idempotency_key is not None
    earlier = await find_signal(database, tenant_id, signal, idempotency_key)
    assert earlier is not None
    return earlier


async def find_signal(
    database: Database, tenant_id: str, signal: Signal, idempotency_key: str
) -> UUID | None:
    """The signal that this key made before; `IdempotencyMismatch` if it said something else."""
    statement = select(signals.c.signal_id, signals.c.body).where(
        signals.c.tenant_id == tenant_id,
        signals.c.run_id == signal.run_id,
        signals.c.kind == signal.kind,
        signals.c.idempotency_key == idempotency_key,
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).first()
    if row is None:
        return None
    if _asked(orjson.loads(row.body)) != _asked(signal.body):
        raise IdempotencyMismatch("This Idempotency-Key was used with another body. Use a new key.")
    found: UUID = row.signal_id
    return found


def _asked(body: dict[str, Any]) -> dict[str, Any]:
    """What the client said, without what was noted when it was accepted."""
    return {name: value for name, value in body.items() if name != "paused_seq"}


_DONE_WHAT = {
    SignalKind.CANCEL: "cancelled while it is queued, running, paused or awaits a human",
    SignalKind.PAUSE: "paused while it is queued or running",
    SignalKind.RESUME: "resumed when it is paused, awaits a human, failed or was cancelled",
}


def wrong_state(kind: SignalKind, status: str) -> Conflict:
    """`invalid_run_state` in words, with the status as a member of its own."""
    return Conflict(
        f"The run is {status}; a run can be {_DONE_WHAT[kind]}.", extra={"run_status": status}
    )


_OPEN = """select s.signal_id, s.run_id, s.kind, s.body from signals s
    join run_heads h using (run_id) where s.outcome is null and {} order by s.created_at, 1"""


async def signals_for(connection: HotConnection, worker_id: str) -> list[Signal]:
    """Signals that wait, in the order of their acceptance: of the runs that this worker drives,
    and of runs in the queue, which may be in its backlog."""
    mine = "(h.owner = $1 or (h.owner is null and h.status = 'queued'))"
    rows = await connection.fetch(_OPEN.format(mine), worker_id)
    return [_signal(row) for row in rows]


async def signals_of(connection: HotConnection, run_ids: list[UUID]) -> list[Signal]:
    """Signals that wait, of these runs."""
    rows = await connection.fetch(_OPEN.format("s.run_id = any($1::uuid[])"), run_ids)
    return [_signal(row) for row in rows]


def _signal(row: Any) -> Signal:
    return Signal(row[0], row[1], SignalKind(row[2]), orjson.loads(row[3]))


async def discard_late_signals(connection: HotConnection) -> None:
    """Answer signals that were accepted while their run was ending."""
    await connection.execute(
        """update signals s set outcome = 'discarded: the run is ' || h.status
        from run_heads h where s.outcome is null and h.run_id = s.run_id
        and h.status in ('done', 'failed', 'cancelled')"""
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
        .order_by(signals.c.created_at, signals.c.signal_id)
    )
    async with database.read() as connection:
        return [SignalRecord(*row) for row in await connection.execute(statement)]
