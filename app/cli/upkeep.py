"""What `migrate`, `prune`, `doctor` and `serve` do to the database, without a service.

Imports SQLAlchemy: import it only where it is used. Raises the domain's errors.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime
from typing import Any

from app.cli.errors import CliError, ExitCode
from app.store import partitions, revisions
from app.store.database import Database, server_facts


def migrate_database(dsn: str) -> tuple[str | None, str]:
    """Upgrade a database that is behind: its revision before, and now."""
    return asyncio.run(_migrate(dsn))


async def _migrate(dsn: str) -> tuple[str | None, str]:
    database = await Database.open(dsn)
    try:
        before = await revisions.current_revision(database)
    finally:
        await database.close()
    if not revisions.is_behind(before):
        return before, before or ""
    from app.store.migrate import migrate  # noqa: PLC0415 - Alembic, which is heavy

    await migrate(dsn)
    return before, revisions.head_revision()


def prune_database(dsn: str, before: date, *, dry_run: bool) -> list[partitions.Pruned]:
    """Drop the days before `before` whose runs are all finished."""
    return asyncio.run(_prune(dsn, before, dry_run=dry_run))


async def _prune(dsn: str, before: date, *, dry_run: bool) -> list[partitions.Pruned]:
    database = await Database.open(dsn)
    try:
        revision = await revisions.current_revision(database)
        if revisions.is_behind(revision):
            raise CliError(
                f"The database is at revision {revision or 'empty'}, this version needs "
                f"{revisions.head_revision()}.",
                exit_code=ExitCode.UNREACHABLE,
                hint="First: flexrun migrate",
            )
        return await partitions.prune(database, before, dry_run=dry_run)
    finally:
        await database.close()


def facts_of(dsn: str) -> dict[str, Any]:
    """What the doctor asks: server facts, `revision`, `head`, and `days` of partitions ahead."""
    return asyncio.run(_facts(dsn))


async def _facts(dsn: str) -> dict[str, Any]:
    database = await Database.open(dsn)
    try:
        async with database.read() as connection:
            facts = await server_facts(connection)
        facts["revision"] = await revisions.current_revision(database)
        facts["head"] = revisions.head_revision()
        facts["is_behind"] = revisions.is_behind(facts["revision"])
        facts["days"] = await partitions.days_prepared(database, datetime.now(UTC).date())
        return facts
    finally:
        await database.close()
