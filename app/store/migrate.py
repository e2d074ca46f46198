"""Schema migrations: from empty to head, and whether a database is behind.

A service refuses to start on a database that is behind; the embedded one it migrates by itself.
"""

from __future__ import annotations

import functools
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.store.database import Database, sqlalchemy_url

MIGRATION_LOCK = 0x466C6578  # "Flex": one migration at a time, whoever starts first


def _config() -> Config:
    return Config(str(Path(__file__).parents[2] / "alembic.ini"))


@functools.cache  # it imports every migration, and readiness asks for it
def _revisions() -> tuple[str, ...]:
    """Those of the source tree, the newest first."""
    scripts = ScriptDirectory.from_config(_config()).walk_revisions()
    return tuple(script.revision for script in scripts)


def head_revision() -> str:
    """The newest revision in the source tree."""
    return _revisions()[0]


def is_behind(revision: str | None) -> bool:
    """Whether a database of this revision lacks something that this version needs.

    A revision that is not in the source tree is a newer one: migrations leave the previous version
    working, so that processes can be replaced one by one.
    """
    return revision is None or (revision in _revisions() and revision != head_revision())


async def current_revision(database: Database) -> str | None:
    """The revision of the database; None when it is empty."""
    async with database.read() as connection:
        return await connection.run_sync(
            lambda sync: MigrationContext.configure(sync).get_current_revision()
        )


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
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
