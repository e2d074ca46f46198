"""What is kept, what is dropped, and what only saves time: partitions, snapshots, old keys."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import asyncpg

from app.domain.run import RunStatus
from app.kit.ids import id_at, new_id, run_day
from app.store.database import Database
from app.store.keys import forget_old_keys
from app.store.partitions import DAYS_AHEAD, days_prepared, make_partitions, prune
from tests.envelopes import chain
from tests.journal_kit import JournalKit, journal_kit
from tests.service import RunningService

OLD = datetime(2020, 9, 13, 12, tzinfo=UTC)


def old_id() -> UUID:
    """A run id of a day long ago."""
    bound = id_at(int(OLD.timestamp() * 1000))
    return UUID(int=bound.int | (new_id().int & ((1 << 62) - 1)))


async def old_run(kit: JournalKit, status: RunStatus) -> UUID:
    """A run of that day, in this status."""
    handle, accepted = kit.submit(run_id=old_id())
    await accepted
    await kit.log(handle, "x", status=status)
    return handle.run_id


async def test_a_day_is_dropped_when_all_its_runs_are_finished(
    dsn: str, database: Database
) -> None:
    async with journal_kit(dsn) as kit:
        run_id = await old_run(kit, RunStatus.DONE)
        dry = await prune(database, date(2021, 1, 1), dry_run=True)
        assert [(day.day, day.runs, day.unfinished, day.dropped) for day in dry] == [
            (OLD.date(), 1, 0, False)
        ]
        assert await kit.rows("select from events where run_id = $1", run_id)

        [dropped] = await prune(database, date(2021, 1, 1))
        assert dropped.dropped
        assert await kit.rows("select from events where run_id = $1", run_id) == []
        [kept] = await kit.rows("select envelope, pruned_at from runs where run_id = $1", run_id)
        assert kept["envelope"] is None
        assert kept["pruned_at"] is not None
        assert await prune(database, date(2021, 1, 1)) == []


async def test_a_day_with_an_unfinished_run_is_kept(dsn: str, database: Database) -> None:
    async with journal_kit(dsn) as kit:
        await old_run(kit, RunStatus.DONE)
        run_id = await old_run(kit, RunStatus.AWAITING_HUMAN)
        [day] = await prune(database, date(2021, 1, 1))

        assert (day.dropped, day.unfinished, day.runs) == (False, 1, 2)
        assert await kit.messages(run_id) == ["x"]


async def test_days_are_prepared_ahead_and_made_once(database: Database) -> None:
    today = datetime.now(UTC).date()
    await make_partitions(database, today)
    await make_partitions(database, today)

    assert await days_prepared(database, today) == DAYS_AHEAD + 1
    assert await days_prepared(database, today + timedelta(days=30)) == 0


async def test_keys_are_forgotten_after_a_day(dsn: str, database: Database) -> None:
    async with journal_kit(dsn) as kit:
        for key in ("old", "new"):
            await kit.submit(key=key)[1]
        await kit.rows(
            "update idempotency_keys set created_at = now() - interval '25 hours' where key = 'old'"
        )

        assert await forget_old_keys(database) == 1
        assert [row["key"] for row in await kit.rows("select key from idempotency_keys")] == ["new"]


async def test_deleting_all_snapshots_changes_nothing_but_the_time(
    service: RunningService, dsn: str
) -> None:
    done = await service.finished(chain(600))
    connection = await asyncpg.connect(dsn)
    run_id = UUID(done["run_id"])
    seqs = await connection.fetch("select seq from snapshots where run_id = $1", run_id)
    assert seqs, "a run of 1,200 events has a snapshot on the way"
    before = (await service.client.get(f"/v1/runs/{run_id}")).json()
    await connection.execute("delete from snapshots where run_day = $1", run_day(run_id))
    after = (await service.client.get(f"/v1/runs/{run_id}")).json()
    await connection.execute(
        "insert into snapshots values ($1, $2, 700, '{\"format\": 0}')", run_day(run_id), run_id
    )
    foreign = (await service.client.get(f"/v1/runs/{run_id}")).json()
    await connection.close()

    assert before == after == foreign
    assert before["status"] == "done"
    assert {node["status"] for node in before["nodes"]} == {"done"}
