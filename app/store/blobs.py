"""Big values of one run for another one, copied inside the database."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Date, Uuid, bindparam, select
from sqlalchemy.dialects.postgresql import insert

from app.kit.ids import run_day
from app.store.database import Database
from app.store.tables import blobs


async def copy_blobs(database: Database, from_run: UUID, to_run: UUID, sha256s: list[str]) -> None:
    """Give `to_run` its own copies, so that the retention of `from_run` takes nothing from it."""
    source = select(
        bindparam("day", run_day(to_run), Date),
        bindparam("run", to_run, Uuid),
        blobs.c.sha256,
        blobs.c.body,
    ).where(
        blobs.c.run_day == run_day(from_run),
        blobs.c.run_id == from_run,
        blobs.c.sha256.in_(sha256s),
    )
    names = ["run_day", "run_id", "sha256", "body"]
    statement = insert(blobs).from_select(names, source).on_conflict_do_nothing()
    async with database.transaction() as connection:
        await connection.execute(statement)
