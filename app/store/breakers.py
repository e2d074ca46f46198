"""Announcements of breakers: one row a transition. Whoever inserts the row has told, once.

A run that causes a transition inserts the row in the append that carries its event
(`store/append.py`); what is here serves the sweep and an operator's reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert

from app.ports import Transition
from app.store.database import Database
from app.store.tables import breaker_transitions, run_heads

KEPT = timedelta(days=7)

_KEY = tuple(breaker_transitions.c[("scope", "worker_id", "generation", "kind")])


async def announced(
    database: Database, transitions: Sequence[Transition]
) -> set[tuple[str, str, int, str]]:
    """The keys of those transitions that have their row."""
    keys = [transition.key for transition in transitions]
    async with database.read() as connection:
        rows = await connection.execute(select(*_KEY).where(tuple_(*_KEY).in_(keys)))
        return {tuple(row) for row in rows}


async def holders_that_may_announce(
    database: Database, holders: Sequence[tuple[UUID, int]]
) -> set[tuple[UUID, int]]:
    """Those `(run_id, epoch)` that still drive their run: they may announce by themselves."""
    statement = select(run_heads.c.run_id, run_heads.c.epoch).where(
        tuple_(run_heads.c.run_id, run_heads.c.epoch).in_(holders), run_heads.c.owner.is_not(None)
    )
    async with database.read() as connection:
        return {(row.run_id, row.epoch) for row in await connection.execute(statement)}


async def announce(database: Database, transition: Transition) -> bool:
    """Insert the row of a transition that no run announces. False: it was there already."""
    async with database.transaction() as connection:
        result = await connection.execute(
            insert(breaker_transitions)
            .values(
                scope=transition.scope,
                worker_id=transition.worker_id,
                generation=transition.generation,
                kind=transition.kind.value,
                cooldown_s=transition.cooldown_s,
                announced_at=func.clock_timestamp(),
            )
            .on_conflict_do_nothing()
        )
    return bool(result.rowcount)


async def forget_old_announcements(database: Database) -> int:
    """Delete rows older than a week: generations are never used again."""
    async with database.transaction() as connection:
        result: Any = await connection.execute(
            delete(breaker_transitions).where(
                breaker_transitions.c.announced_at < func.clock_timestamp() - KEPT
            )
        )
    return int(result.rowcount)
