"""`flexrun migrate` and `flexrun prune`: the database itself, without a service."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.config import DatabaseUrl, DataDir, database_errors, database_of, load_settings
from app.cli.errors import UsageError
from app.cli.output import out

if TYPE_CHECKING:
    from app.store.partitions import Pruned

_AGE = re.compile(r"(\d{1,5})([dw])")
_DAYS = {"d": 1, "w": 7}


def migrate(database_url: DatabaseUrl = None, data_dir: DataDir = None) -> None:
    """Bring the database to the schema of this version. Safe to repeat."""
    from app.cli.upkeep import migrate_database  # noqa: PLC0415 - heavy, see there

    settings = load_settings(database_url=database_url, data_dir=data_dir)
    with database_errors(), database_of(settings) as (dsn, _):
        before, after = migrate_database(dsn)
    if before == after:
        out(f"The database is at revision {after} already.")
    else:
        out(f"The database is at revision {after} now (before: {before or 'empty'}).")


def prune(
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Such as 30d or 8w; at least a day.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what there is.")] = False,
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Drop the journals of whole days whose runs are all finished."""
    from app.cli.upkeep import prune_database  # noqa: PLC0415 - heavy, see there

    before = datetime.now(UTC).date() - timedelta(days=days_of(older_than))
    settings = load_settings(database_url=database_url, data_dir=data_dir)
    with database_errors(), database_of(settings) as (dsn, _):
        pruned = prune_database(dsn, before, dry_run=dry_run)
    for day in pruned:
        out(f"{day.day}  {day.runs} runs  {_fate(day, dry_run=dry_run)}")
    if not pruned:
        out(f"Nothing is kept from before {before}.")


def days_of(age: str) -> int:
    """An age such as `30d` or `8w` in days."""
    match = _AGE.fullmatch(age.strip())
    days = int(match[1]) * _DAYS[match[2]] if match else 0
    if not 1 <= days <= 36_500:
        raise UsageError(f"{age!r} is no age of days or weeks, such as 30d or 8w.")
    return days


def _fate(day: Pruned, *, dry_run: bool) -> str:
    if day.unfinished:
        return f"kept: {day.unfinished} of them are not finished"
    return "would be dropped" if dry_run else "dropped"
