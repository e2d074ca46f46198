"""Schema migrations, from empty to head: the embedded database is migrated by its service, any
other by `flexrun migrate`."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.store.database import sqlalchemy_url

MIGRATION_LOCK = 0x466C6578  # "Flex": one migration at a time, whoever starts first
INI = Path(__file__).parents[2] / "alembic.ini"


async def migrate(dsn: str) -> None:
    """Bring the database to head. Safe to run from several processes at once."""
    engine = create_async_engine(sqlalchemy_url(dsn), poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.execute(
                text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK}
            )
            await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> None:
    config = Config(str(INI))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
