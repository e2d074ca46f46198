"""The record of calls reads no more of the journal than it shows."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg

from app.kit.ids import id_at, run_day
from app.store.database import Database
from app.store.model_calls import _statement, model_calls
from app.store.partitions import make_partitions

DAYS, RUNS, EVENTS = 3, 40, 50
"""Days with so many runs, of so many events; the last event of each is the call of a model."""


async def fill(dsn: str, database: Database) -> list[UUID]:
    """The runs, oldest first."""
    today = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
    days = [today - timedelta(days=DAYS - 1 - back) for back in range(DAYS)]
    for day in days:
        await make_partitions(database, day.date())
    first = [int(day.timestamp() * 1000) for day in days]
    found = [id_at(ms + number) for ms in first for number in range(RUNS)]
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        """insert into runs (run_id, tenant_id, created_at, objective, envelope, traceparent)
        select r, 'default', now(), 'x', '{}', '' from unnest($1::uuid[]) r""",
        found,
    )
    await connection.execute(
        """insert into events (run_day, run_id, seq, type, level, body)
        select d, r, n, case when n = $3 then 'LLM_RESPONSE' else 'LOG' end, 'INFO', '{}'
        from unnest($1::date[], $2::uuid[]) as u (d, r), generate_series(1, $3) n""",
        [run_day(run_id) for run_id in found],
        found,
        EVENTS,
    )
    await connection.execute("analyze")
    await connection.close()
    return found


async def test_a_page_reads_the_index_of_calls_alone(dsn: str, database: Database) -> None:
    found = await fill(dsn, database)
    newest_first = found[::-1]
    page = await model_calls(database, "default", before=None, since=None, limit=10)
    assert [row.run_id for row in page] == newest_first[:10]
    assert {row.seq for row in page} == {EVENTS}
    behind = (page[-1].run_id, page[-1].seq)
    rest = await model_calls(database, "default", before=behind, since=found[20], limit=500)
    assert [row.run_id for row in rest] == newest_first[10 : len(found) - 20]
    assert await model_calls(database, "nobody", before=None, since=None, limit=10) == []

    connection = await asyncpg.connect(dsn)
    partial = {
        row[0]
        for row in await connection.fetch(
            "select indexname from pg_indexes where indexdef like '%LLM_RESPONSE%'"
        )
    }
    for before, since in ((None, None), (behind, None), (behind, found[20])):
        statement = _statement("default", before, since, 10).compile(
            database.engine, compile_kwargs={"literal_binds": True}
        )
        plan = "\n".join(r[0] for r in await connection.fetch(f"explain analyze {statement}"))
        assert "Seq Scan on events" not in plan, plan
        used = set(re.findall(r"using (events_\w+)", plan))
        assert used, plan
        assert used <= partial, plan
        # The newest day fills the page: the days before it are not touched.
        assert plan.count("never executed") >= DAYS - 1 - (since is not None), plan
    await connection.close()
