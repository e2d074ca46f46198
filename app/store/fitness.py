"""Whether a database can be trusted with runs: its schema is at head, and it forgets no commit."""

from __future__ import annotations

from app.store.database import Database, server_facts
from app.store.revisions import current_revision, head_revision, is_behind

DURABILITY = ("fsync", "full_page_writes", "synchronous_commit")


async def unfit(database: Database, *, allow_unsafe: bool) -> str | None:
    """Why the service must not start on it, and what to do; None when it may.

    `allow_unsafe` accepts a server that may lose what it acknowledged.
    """
    revision = await current_revision(database)
    if is_behind(revision):
        return (
            f"The database is at revision {revision or 'empty'}, this version needs "
            f"{head_revision()}. Run `flexrun migrate` first."
        )
    async with database.read() as connection:
        facts = await server_facts(connection)
    unsafe = [name for name in DURABILITY if facts[name] == "off"]
    if unsafe and not allow_unsafe:
        return (
            f"Postgres runs with {', '.join(unsafe)} off, so that a crash could lose accepted "
            "runs. Turn it on; FLEXRUN_ALLOW_UNSAFE_POSTGRES=true accepts it for tests."
        )
    return None
