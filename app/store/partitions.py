"""One partition a day for everything a run writes, made ahead of time and dropped whole.

There is no default partition: rows of a day that nobody prepared are an error, not a surprise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.database import Database, HotConnection
from app.store.tables import DAY_TABLES

log = logging.getLogger("flexrun.partitions")

DAYS_AHEAD = 7
PARTITION_LOCK = 0x466C6579


def partition_name(table: str, day: date) -> str:
    return f"{table}_{day:%Y%m%d}"


def _ddl(table: str, day: date) -> tuple[str, str]:
    """CREATE and ATTACH apart: CREATE ... PARTITION OF would lock the parent for writers."""
    name = partition_name(table, day)
    return (
        f"create table {name} (like {table} including defaults including constraints)",
        f"alter table {table} attach partition {name} "
        f"for values from ('{day}') to ('{day + timedelta(days=1)}')",
    )


async def make_partitions_hot(connection: HotConnection, days: Iterable[date]) -> None:
    """The same for a writer that met a missing day, on its own connection."""
    async with connection.transaction():
        await connection.execute("select pg_advisory_xact_lock($1)", PARTITION_LOCK)
        for day in sorted(days):
            for table in DAY_TABLES:
                if await connection.fetchval(
                    "select to_regclass($1) is null", partition_name(table, day)
                ):
                    for statement in _ddl(table, day):
                        await connection.execute(statement)


async def make_partitions(database: Database, today: date) -> None:
    """Prepare today and the days ahead; partitions that exist are left alone."""
    days = [today + timedelta(days=offset) for offset in range(-1, DAYS_AHEAD + 1)]
    async with database.transaction() as connection:
        await connection.execute(
            text("select pg_advisory_xact_lock(:key)"), {"key": PARTITION_LOCK}
        )
        present = await _present(connection)
        for day in days:
            for table in DAY_TABLES:
                if partition_name(table, day) not in present:
                    for statement in _ddl(table, day):
                        await connection.execute(text(statement))


async def days_prepared(database: Database, today: date) -> int:
    """How many days from today on have all their partitions."""
    async with database.read() as connection:
        present = await _present(connection)
    day = today
    while all(partition_name(table, day) in present for table in DAY_TABLES):
        day += timedelta(days=1)
    return (day - today).days


async def _present(connection: AsyncConnection) -> set[str]:
    rows = await connection.execute(
        text(
            """select c.relname from pg_inherits i
            join pg_class c on c.oid = i.inhrelid join pg_class p on p.oid = i.inhparent
            where p.relname = any(:tables)"""
        ),
        {"tables": list(DAY_TABLES)},
    )
    return {row.relname for row in rows}


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune did with one day: dropped, or kept because runs of it are unfinished."""

    day: date
    runs: int
    unfinished: int
    dropped: bool


async def prune(database: Database, before: date, *, dry_run: bool = False) -> list[Pruned]:
    """Drop the days before `before` whose runs are all finished; keep their rows in `runs`.

    The rows that stay say when and with what outcome a run ended. Their envelope goes too.
    """
    async with database.read() as connection:
        present = await _present(connection)
    days = sorted(
        day
        for name in present
        if name.startswith("events_") and (day := _day_of(name)) is not None and day < before
    )
    return [await _prune_day(database, day, dry_run) for day in days]


def _day_of(name: str) -> date | None:
    digits = name.removeprefix("events_")
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return None


async def _prune_day(database: Database, day: date, dry_run: bool) -> Pruned:
    bounds = {"day": day, "next": day + timedelta(days=1)}
    async with database.transaction() as connection:
        # Detaching waits for readers of the parent table; they are short.
        await connection.execute(text("set local lock_timeout = '10s'"))
        await connection.execute(text("set local statement_timeout = '60s'"))
        total, unfinished = (
            await connection.execute(
                text(
                    """select count(*), count(*) filter
                    (where h.status not in ('done', 'failed', 'cancelled'))
                    from runs r join run_heads h using (run_id)
                    where r.created_at >= :day and r.created_at < :next"""
                ),
                bounds,
            )
        ).one()
        if unfinished or dry_run:
            return Pruned(day, total, unfinished, dropped=False)
        for table in DAY_TABLES:
            name = partition_name(table, day)
            await connection.execute(text(f"alter table {table} detach partition {name}"))
            await connection.execute(text(f"drop table {name}"))
        await connection.execute(
            text(
                """update runs set envelope = null, pruned_at = now()
                where created_at >= :day and created_at < :next"""
            ),
            bounds,
        )
        await connection.execute(
            text(
                """delete from signals s using runs r where s.run_id = r.run_id
                and r.created_at >= :day and r.created_at < :next"""
            ),
            bounds,
        )
    log.info("dropped the journal of %s with %s runs", day, total)
    return Pruned(day, total, unfinished, dropped=True)
