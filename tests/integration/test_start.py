"""Start: what the service refuses to run on, and that the schema says what the code says."""

from __future__ import annotations

import re

import asyncpg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from app.bootstrap import NotReady, open_services
from app.domain.errors import Unavailable
from app.domain.events import Level
from app.domain.run import RunStatus
from app.settings import Settings
from app.store.database import Database
from app.store.migrate import INI, migrate
from app.store.revisions import current_revision, head_revision, revisions
from app.store.tables import metadata
from tests.conftest import make_settings, with_database


async def start(dsn: str, settings: Settings) -> None:
    async with open_services(settings, dsn):
        pass


async def test_a_database_that_may_forget_commits_is_refused(dsn: str) -> None:
    with pytest.raises(NotReady, match="fsync, full_page_writes, synchronous_commit off"):
        await start(dsn, make_settings(allow_unsafe_postgres=False))
    await start(dsn, make_settings(allow_unsafe_postgres=True))


async def test_a_database_that_is_behind_is_refused_with_the_command_to_run(
    postgres_dsn: str,
) -> None:
    admin = await asyncpg.connect(postgres_dsn)
    await admin.execute("create database behind")
    behind = with_database(postgres_dsn, "behind")
    try:
        with pytest.raises(NotReady, match=r"revision empty.*flexrun migrate"):
            await start(behind, make_settings())
        await migrate(behind)
        await migrate(behind)
        database = await Database.open(behind)
        assert await current_revision(database) == head_revision()
        await database.close()
        await start(behind, make_settings())
    finally:
        await admin.execute("drop database behind with (force)")
        await admin.close()


def test_revisions_are_the_chain_that_alembic_sees() -> None:
    scripts = ScriptDirectory.from_config(Config(str(INI)))
    assert list(revisions()) == [script.revision for script in scripts.walk_revisions()]


async def test_a_schema_of_a_later_version_is_worked_on(dsn: str) -> None:
    """So that processes can be replaced one by one after a migration."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("update alembic_version set version_num = '9999'")
    await connection.close()
    await start(dsn, make_settings())


@pytest.mark.parametrize(
    "dsn",
    ["postgresql://nobody@127.0.0.1:1/none", "postgresql://nobody@127.0.0.1:abc/none"],
)
async def test_a_database_that_is_not_there_is_said_to_be_unreachable(dsn: str) -> None:
    with pytest.raises(Unavailable) as caught:
        await start(dsn, make_settings())
    assert caught.value.code == "database_unreachable"


async def test_tables_and_migrations_agree(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch(
        """select table_name, column_name, is_nullable = 'YES' as nullable
        from information_schema.columns where table_schema = 'public'"""
    )
    await connection.close()
    migrated = {(r["table_name"], r["column_name"]): r["nullable"] for r in rows}
    declared = {
        (table.name, column.name): bool(column.nullable)
        for table in metadata.tables.values()
        for column in table.columns
    }
    names = {table.name for table in metadata.tables.values()}

    assert {key: value for key, value in migrated.items() if key[0] in names} == declared


async def test_check_constraints_name_the_statuses_of_the_code(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch(
        """select conrelid::regclass::text as "table", pg_get_constraintdef(oid) as rule
        from pg_constraint where contype = 'c' and conrelid::regclass::text in
        ('run_heads', 'events')"""
    )
    await connection.close()
    allowed = [
        (row["table"], set(re.findall(r"'(\w+)'::text", row["rule"])))
        for row in rows
        if "ANY" in row["rule"]
    ]

    assert ("run_heads", {str(status) for status in RunStatus}) in allowed
    assert ("events", {str(level) for level in Level}) in allowed
