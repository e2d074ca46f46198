"""`flexrun migrate` and `flexrun prune`: the database itself, without a service."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.config import DatabaseUrl, DataDir, database_errors, database_of, load_settings
from app.cli.errors import CliError, ExitCode, UsageError
from app.cli.output import out

if TYPE_CHECKING:
    from app.store.partitions import Pruned

_AGE = re.compile(r"(\d{1,5})([dw])")
_DAYS = {"d": 1, "w": 7}


def migrate(database_url: DatabaseUrl = None, data_dir: DataDir = None) -> None:
    """Bring the database to the schema of this version. Safe to repeat."""
    settings = load_settings(database_url=database_url, data_dir=data_dir)
    with database_errors(), database_of(settings) as dsn:
        before, after = asyncio.run(migrate_database(dsn))
    if before == after:
        out(f"The database is at revision {after} already.")
    else:
        out(f"The database is at revision {after} now (before: {before or 'empty'}).")


async def migrate_database(dsn: str) -> tuple[str | None, str]:
    """Upgrade a database that is behind: its revision before, and now."""
    # SQLAlchemy and Alembic are slow to import.
    from app.store.database import Database  # noqa: PLC0415
    from app.store.migrate import current_revision, head_revision  # noqa: PLC0415
    from app.store.migrate import migrate as upgrade  # noqa: PLC0415

    database = await Database.open(dsn)
    try:
        before = await current_revision(database)
    finally:
        await database.close()
    head = head_revision()
    if before != head:
        await upgrade(dsn)
    return before, head


def prune(
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Such as 30d or 8w; at least a day.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is.")] = False,
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Drop the journals of whole days whose runs are all finished."""
    before = datetime.now(UTC).date() - timedelta(days=_days(older_than))
    settings = load_settings(database_url=database_url, data_dir=data_dir)
    with database_errors(), database_of(settings) as dsn:
        pruned = asyncio.run(_prune(dsn, before, dry_run=dry_run))
    for day in pruned:
        out(f"{day.day}  {day.runs} runs  {_fate(day, dry_run=dry_run)}")
    if not pruned:
        out(f"Nothing is kept from before {before}.")


def _days(age: str) -> int:
    match = _AGE.fullmatch(age.strip())
    days = int(match[1]) * _DAYS[match[2]] if match else 0
    if not 1 <= days <= 36_500:
        raise UsageError(f"{age!r} is no age of days or weeks, such as 30d or 8w.")
    return days


def _fate(day: Pruned, *, dry_run: bool) -> str:
    if dry_run:
        return "would be dropped, if all of them are finished"
    return "dropped" if day.dropped else "kept: some of them are not finished"


async def _prune(dsn: str, before: date, *, dry_run: bool) -> list[Pruned]:
    # SQLAlchemy is slow to import.
    from app.store.database import Database  # noqa: PLC0415
    from app.store.migrate import current_revision, head_revision  # noqa: PLC0415
    from app.store.partitions import prune as drop_days  # noqa: PLC0415

    database = await Database.open(dsn)
    try:
        revision, head = await current_revision(database), head_revision()
        if revision != head:
            raise CliError(
                f"The database is at revision {revision or 'empty'}, this version needs {head}.",
                exit_code=ExitCode.UNREACHABLE,
                hint="First: flexrun migrate",
            )
        return await drop_days(database, before, dry_run=dry_run)
    finally:
        await database.close()
