"""Which revision a database has, and which one this version needs.

Every start and every probe asks; the migrations themselves (`migrate.py`) need Alembic, which is a
tenth of all that a start would import.
"""

from __future__ import annotations

import functools
from pathlib import Path

from sqlalchemy import text

from app.store.database import Database

_VERSIONS = Path(__file__).parents[2] / "migrations" / "versions"


@functools.cache
def revisions() -> tuple[str, ...]:
    """All of the source tree, the newest first. Their files are numbered: `0001_….py`."""
    names = [path.name.partition("_")[0] for path in _VERSIONS.glob("[0-9]*_*.py")]
    return tuple(sorted(names, reverse=True))


def head_revision() -> str:
    """The newest revision in the source tree."""
    return revisions()[0]


def is_behind(revision: str | None) -> bool:
    """Whether a database of this revision lacks something that this version needs.

    A revision that is not in the source tree is a newer one: migrations leave the previous version
    working, so that processes can be replaced one by one.
    """
    return revision is None or (revision in revisions() and revision != head_revision())


async def current_revision(database: Database) -> str | None:
    """The revision of the database; None when it is empty."""
    async with database.read() as connection:
        if await connection.scalar(text("select to_regclass('alembic_version') is null")):
            return None
        found: str | None = await connection.scalar(text("select version_num from alembic_version"))
        return found
