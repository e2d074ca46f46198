"""The write path: every hole that DESIGN names, against a real Postgres."""

from __future__ import annotations

import asyncio
from typing import Any, cast
from uuid import UUID

import asyncpg
import pytest

from app.domain.run import RunStatus
from app.journal.errors import JournalRejected, KeyTaken, LeaseLost
from app.journal.record import RunHandle
from app.kit.clock import now_ms
from app.kit.ids import id_at, new_id, run_day
from app.store.append import HeadMove, append_batch
from app.store.database import HotConnection, connect
from tests.journal_kit import JournalKit, journal_kit


async def test_appends_of_one_run_that_wait_together_become_one(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        handle, accepted = kit.submit()
        await accepted
        before = kit.journal.commits
        futures = [kit.log(handle, "a"), kit.log(handle, "b", "c"), kit.log(handle, "d")]
        await asyncio.gather(*futures)

        assert await kit.messages(handle.run_id) == ["a", "b", "c", "d"]
        assert kit.journal.commits == before + 1
        assert [frame.seq for frame in kit.sink.frames[handle.run_id]] == [1, 2, 3, 4, 5]


async def test_runs_that_wait_together_share_a_commit(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        submitted = [kit.submit() for _ in range(50)]
        await asyncio.gather(*(accepted for _, accepted in submitted))
        first = kit.journal.commits
        await asyncio.gather(*(kit.log(handle, "x") for handle, _ in submitted))

        assert first <= 2
        assert kit.journal.commits == first + 1


@pytest.mark.parametrize("part", ["event", "blob"])
async def test_a_batch_is_no_bigger_than_a_statement_can_carry_in_its_time(
    dsn: str, part: str
) -> None:
    def log(handle: RunHandle, mebibytes: int) -> asyncio.Future[None]:
        value = "x" * (mebibytes << 20)
        if part == "event":
            return kit.log(handle, value)
        return kit.log(handle, "x", blobs=[("abc", value.encode())])

    async with journal_kit(dsn) as kit:
        handles = [await _accepted(kit) for _ in range(6)]
        before = kit.journal.commits
        # Together: 3 and 3, 3, 9 although it is too big, 3 and 0.
        sizes = [3, 3, 3, 9, 3, 0]
        await asyncio.gather(*(log(*each) for each in zip(handles, sizes, strict=True)))
        assert kit.journal.commits == before + 4

        # What waits of one run counts as one append.
        await asyncio.gather(log(handles[0], 3), log(handles[0], 3), log(handles[1], 3))
        assert kit.journal.commits == before + 6


async def _accepted(kit: JournalKit) -> RunHandle:
    handle, accepted = kit.submit()
    await accepted
    return handle


async def test_nothing_is_published_before_it_is_durable(dsn: str) -> None:
    published_at: list[int] = []

    async with journal_kit(dsn) as kit:
        handle, accepted = kit.submit()
        blocker = await asyncpg.connect(dsn)
        await accepted
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.fetch("select from run_heads where run_id = $1 for update", handle.run_id)
        waiting = kit.log(handle, "late")
        for _ in range(20):
            await asyncio.sleep(0.005)
            published_at.append(len(kit.sink.frames[handle.run_id]))
        await transaction.rollback()
        await waiting
        await blocker.close()

        assert set(published_at) == {1}
        assert len(kit.sink.frames[handle.run_id]) == 2


async def test_a_fenced_run_fails_alone_beside_healthy_ones(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        submitted = [kit.submit() for _ in range(3)]
        await asyncio.gather(*(accepted for _, accepted in submitted))
        fenced = submitted[1][0]
        await kit.rows(
            "update run_heads set epoch = epoch + 1, owner = 'w2' where run_id = $1", fenced.run_id
        )
        results = await asyncio.gather(
            *(kit.log(handle, "x") for handle, _ in submitted), return_exceptions=True
        )

        assert [type(result) for result in results] == [type(None), LeaseLost, type(None)]
        assert await kit.messages(fenced.run_id) == []
        assert await kit.messages(submitted[0][0].run_id) == ["x"]
        assert len(kit.sink.frames[fenced.run_id]) == 1
        assert kit.metrics.stale_writes == 1


async def test_a_poison_value_fails_its_run_and_no_other(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        submitted = [kit.submit() for _ in range(3)]
        await asyncio.gather(*(accepted for _, accepted in submitted))
        good, bad, fine = (handle for handle, _ in submitted)
        bad_future = _log_with_nul(kit, bad)
        results = await asyncio.gather(
            kit.log(good, "x"), bad_future, kit.log(fine, "x"), return_exceptions=True
        )

        assert [type(result) for result in results] == [type(None), JournalRejected, type(None)]
        assert await kit.messages(bad.run_id) == []
        assert await kit.messages(good.run_id) == ["x"]
        bad.rewind(1)
        await kit.log(bad, "goes on")
        assert await kit.messages(bad.run_id) == ["goes on"]


def _log_with_nul(kit: JournalKit, handle: RunHandle) -> asyncio.Future[None]:
    """An append that Postgres refuses: text can not hold NUL (a plan body, past every gate)."""
    return kit.log(handle, "x", plans=[(1, "\0")])


async def test_batches_in_opposite_order_do_not_deadlock(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        handles = [kit.submit() for _ in range(40)]
        await asyncio.gather(*(accepted for _, accepted in handles))
        first, second = await asyncpg.connect(dsn), await asyncpg.connect(dsn)

        def moves(rows: list[RunHandle]) -> list[HeadMove]:
            # Both batches name the same runs; whoever comes second finds its fence moved.
            return [
                HeadMove(
                    h.run_id,
                    h.day,
                    1,
                    1,
                    1,
                    2,
                    RunStatus.RUNNING,
                    "w1",
                    None,
                    events=[(2, "LOG", None, None, "INFO", "{}")],
                )
                for h in rows
            ]

        runs = [handle for handle, _ in handles]
        one, two = await asyncio.gather(
            append_batch(first, moves(runs)), append_batch(second, moves(runs[::-1]))
        )
        await first.close()
        await second.close()

        assert one | two == {handle.run_id for handle in runs}
        assert not one & two


class Explains:
    """A connection that tells how it would execute a statement, as one that it keeps prepared."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self.plan = ""

    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        await self._connection.execute("set plan_cache_mode = force_generic_plan")
        found = await self._connection.fetch(f"explain {sql}", *arguments)
        self.plan = "\n".join(line for [line] in found)
        return []


@pytest.mark.parametrize("runs", [1, 2, 32])
async def test_an_append_that_is_planned_on_empty_tables_reads_heads_by_their_key(
    dsn: str, runs: int
) -> None:
    connection = await connect(dsn)
    explains = Explains(connection)
    run_ids = [new_id() for _ in range(runs)]
    try:
        await append_batch(
            cast(HotConnection, explains),
            [
                HeadMove(run_id, run_day(run_id), 1, 1, 1, 2, RunStatus.RUNNING, "w1", None)
                for run_id in run_ids
            ],
        )
    finally:
        await connection.close()
    reads = explains.plan.count(" on run_heads") - explains.plan.count("Update on run_heads")
    assert reads == explains.plan.count("Index Cond: (run_id = ") >= 1


class LosesAnswers:
    """A connection whose statement is executed, and whose answer is lost on the way."""

    def __init__(self, connection: asyncpg.Connection, plan: list[str]) -> None:
        self._connection = connection
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        if not sql.startswith("with"):
            found: list[asyncpg.Record] = await self._connection.fetch(sql, *arguments)
            return found
        step = self._plan.pop(0) if self._plan else "ok"
        if step == "read only":
            raise asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT")
        if step == "lost before":
            await self._connection.close()
            raise asyncpg.ConnectionDoesNotExistError("cut before it was sent")
        rows: list[asyncpg.Record] = await self._connection.fetch(sql, *arguments)
        if step == "broken":
            # A cut in the wrong moment leaves the driver in a state that it never leaves again,
            # although the connection does not count as closed.
            self._plan.insert(0, "broken")
            raise asyncpg.InternalClientError("cannot switch to state 12")
        if step == "lost after":
            await self._connection.close()
            raise asyncpg.ConnectionDoesNotExistError("cut after the commit")
        return rows


@pytest.mark.parametrize("step", ["lost before", "lost after"])
async def test_an_unknown_commit_outcome_is_asked_of_the_head(dsn: str, step: str) -> None:
    plan = ["ok", step]

    async def connect() -> Any:
        return LosesAnswers(await asyncpg.connect(dsn), plan)

    async with journal_kit(dsn, connect) as kit:
        handle, accepted = kit.submit()
        await accepted
        await kit.log(handle, "once")
        await kit.log(handle, "more")

        assert await kit.messages(handle.run_id) == ["once", "more"]
        assert [frame.seq for frame in kit.sink.frames[handle.run_id]] == [1, 2, 3]
        assert plan == []


@pytest.mark.parametrize("step", ["lost before", "lost after"])
async def test_an_unknown_outcome_of_a_submit_makes_one_run(dsn: str, step: str) -> None:
    plan = [step]

    async def connect() -> Any:
        return LosesAnswers(await asyncpg.connect(dsn), plan)

    async with journal_kit(dsn, connect) as kit:
        handle, accepted = kit.submit(key="k")
        await accepted

        heads = await kit.rows("select run_id, seq from run_heads")
        assert [(row["run_id"], row["seq"]) for row in heads] == [(handle.run_id, 1)]


async def test_a_driver_that_is_out_of_step_is_replaced(dsn: str) -> None:
    plans = [["ok", "broken"], []]

    async def connect() -> Any:
        return LosesAnswers(await asyncpg.connect(dsn), plans.pop(0))

    async with journal_kit(dsn, connect) as kit:
        handle, accepted = kit.submit()
        await accepted
        await kit.log(handle, "once")
        await kit.log(handle, "more")

        assert await kit.messages(handle.run_id) == ["once", "more"]
        assert plans == []


async def test_an_unknown_outcome_after_which_somebody_else_took_the_run_is_a_lost_lease(
    dsn: str,
) -> None:
    plan = ["ok", "lost before"]

    async def connect() -> Any:
        if len(plan) == 0:
            thief = await asyncpg.connect(dsn)
            await thief.execute("update run_heads set epoch = 2, owner = 'w2' where epoch = 1")
            await thief.close()
        return LosesAnswers(await asyncpg.connect(dsn), plan)

    async with journal_kit(dsn, connect) as kit:
        handle, accepted = kit.submit()
        await accepted
        with pytest.raises(LeaseLost):
            await kit.log(handle, "x")
        assert await kit.messages(handle.run_id) == []


async def test_a_server_that_is_read_only_for_a_while_fails_no_run(dsn: str) -> None:
    plan = ["ok", "read only", "read only"]

    async def connect() -> Any:
        return LosesAnswers(await asyncpg.connect(dsn), plan)

    async with journal_kit(dsn, connect) as kit:
        handle = await _accepted(kit)
        await kit.log(handle, "once")

        assert await kit.messages(handle.run_id) == ["once"]
        assert plan == []


@pytest.mark.parametrize(
    "error", [asyncpg.InvalidPasswordError, asyncpg.InvalidCatalogNameError, TimeoutError]
)
async def test_a_session_that_is_not_to_be_had_says_nothing_about_the_data(
    dsn: str, error: type[Exception]
) -> None:
    opened: list[asyncpg.Connection] = []
    errors: list[Exception] = []

    async def connect() -> asyncpg.Connection:
        if errors:
            raise errors.pop()
        opened.append(await asyncpg.connect(dsn))
        return opened[-1]

    async with journal_kit(dsn, connect) as kit:
        handles = [await _accepted(kit) for _ in range(2)]
        before = kit.journal.commits
        errors += [error("no"), error("no"), error("no")]
        await opened[0].close()
        await asyncio.gather(*(kit.log(handle, "x") for handle in handles))

        assert errors == []
        assert kit.journal.commits == before + 1, "they stay together"
        assert [await kit.messages(handle.run_id) for handle in handles] == [["x"], ["x"]]


class TooSlow:
    """A connection that finishes no statement in time that carries more than one run."""

    def __init__(self, connection: asyncpg.Connection, refused: list[int], error: Exception):
        self._connection = connection
        self._refused = refused
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetch(self, sql: str, *arguments: Any) -> list[asyncpg.Record]:
        if sql.startswith("with") and isinstance(arguments[0], list) and len(arguments[0]) > 1:
            self._refused.append(len(arguments[0]))
            raise self._error
        found: list[asyncpg.Record] = await self._connection.fetch(sql, *arguments)
        return found


@pytest.mark.parametrize("error", [asyncpg.QueryCanceledError, TimeoutError])
async def test_a_batch_that_takes_too_long_is_sent_run_by_run(
    dsn: str, error: type[Exception]
) -> None:
    refused: list[int] = []

    async def connect() -> Any:
        return TooSlow(await asyncpg.connect(dsn), refused, error("too long"))

    async with journal_kit(dsn, connect) as kit:
        handles = [await _accepted(kit) for _ in range(3)]
        before = kit.journal.commits
        async with asyncio.timeout(5):
            await asyncio.gather(*(kit.log(handle, "x") for handle in handles))

        assert refused == [3]
        assert kit.journal.commits == before + 3
        assert [await kit.messages(handle.run_id) for handle in handles] == [["x"]] * 3


async def _claimed_twice(kit: JournalKit) -> tuple[RunHandle, RunHandle]:
    """A run from the queue that two workers start: who claimed it, and who came too late."""
    late, accepted = kit.submit(epoch=0)
    await accepted
    await kit.rows("update run_heads set epoch = 1, owner = 'w2' where run_id = $1", late.run_id)
    late.epoch = 1
    first = RunHandle(late.run_id, 1, 1, late.trace_id, recorded_seq=1, recorded_epoch=1)
    first.last_ts = late.last_ts = now_ms() + 60_000  # their events bear the same time
    return first, late


async def test_the_same_event_of_another_worker_under_the_same_epoch_is_not_ours(
    dsn: str,
) -> None:
    async with journal_kit(dsn) as kit, journal_kit(dsn, owner="w2") as other:
        first, late = await _claimed_twice(kit)
        await other.log(first, "same")
        with pytest.raises(LeaseLost):
            await kit.log(late, "same")

        assert await kit.messages(first.run_id) == ["same"]
        assert len(kit.sink.frames[first.run_id]) == 1


async def test_a_run_of_the_queue_that_another_worker_claimed_first_is_no_stale_write(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with journal_kit(dsn) as kit:
        _, late = await _claimed_twice(kit)
        with pytest.raises(LeaseLost):
            await kit.log(late, "x")

        assert kit.metrics.stale_writes == 0
        assert [record for record in caplog.records if record.levelname == "WARNING"] == []


async def test_the_answer_of_a_last_append_that_was_lost_is_found_without_owner(dsn: str) -> None:
    plan = ["ok", "lost after"]

    async def connect() -> Any:
        return LosesAnswers(await asyncpg.connect(dsn), plan)

    async with journal_kit(dsn, connect) as kit:
        handle = await _accepted(kit)
        await kit.log(handle, "end", status=RunStatus.FAILED)

        assert await kit.messages(handle.run_id) == ["end"]
        assert plan == []


async def test_cancelling_the_caller_does_not_withdraw_the_append(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        handle, accepted = kit.submit()
        await accepted

        async def wait(future: asyncio.Future[None]) -> None:
            await future

        task = asyncio.create_task(wait(kit.log(handle, "kept")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await kit.log(handle, "next")

        assert await kit.messages(handle.run_id) == ["kept", "next"]


async def test_a_missing_partition_is_made_on_the_way(dsn: str) -> None:
    async with journal_kit(dsn, partitions=False) as kit:
        handle, accepted = kit.submit()
        await accepted
        await kit.log(handle, "x")

        assert await kit.messages(handle.run_id) == ["x"]


async def test_a_run_of_a_day_long_ago_gets_its_partition(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        old = UUID(int=id_at(1_600_000_000_000).int | (new_id().int & ((1 << 62) - 1)))
        handle, accepted = kit.submit(run_id=old)
        await accepted

        tables = await kit.rows("select to_regclass('events_20200913') is not null as made")
        assert tables[0]["made"]
        assert await kit.messages(handle.run_id) == []


async def test_a_key_makes_one_run_also_within_one_batch(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        submitted = [kit.submit(key="same") for _ in range(20)]
        results = await asyncio.gather(
            *(accepted for _, accepted in submitted), return_exceptions=True
        )

        assert [result is None for result in results].count(True) == 1
        assert all(result is None or isinstance(result, KeyTaken) for result in results)
        assert len(await kit.rows("select from run_heads")) == 1
        assert len(await kit.rows("select from events")) == 1


async def test_an_attempt_has_one_result_whatever_the_code_believes(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        handle, accepted = kit.submit()
        await accepted
        connection = await asyncpg.connect(dsn)

        def done(seq: int) -> HeadMove:
            row = (seq, "NODE_DONE", "A", 1, "INFO", "{}")
            return HeadMove(
                handle.run_id,
                handle.day,
                1,
                seq - 1,
                1,
                seq,
                RunStatus.RUNNING,
                "w1",
                None,
                events=[row],
            )

        assert await append_batch(connection, [done(2)]) == {handle.run_id}
        with pytest.raises(asyncpg.UniqueViolationError):
            await append_batch(connection, [done(3)])
        await connection.close()


@pytest.mark.parametrize("table", ["events", "plan_versions"])
@pytest.mark.parametrize("change", ["update {} set body = ''", "delete from {}"])
async def test_what_was_written_never_changes(dsn: str, table: str, change: str) -> None:
    async with journal_kit(dsn) as kit:
        handle, accepted = kit.submit()
        await accepted
        await kit.log(handle, "x", plans=[(1, "{}")])

        with pytest.raises(asyncpg.RestrictViolationError):
            await kit.rows(change.format(table))


async def test_big_values_are_stored_once_by_content(dsn: str) -> None:
    async with journal_kit(dsn) as kit:
        handle, accepted = kit.submit()
        await accepted
        await kit.log(handle, "a", blobs=[("abc", b"big")])
        await kit.log(handle, "b", blobs=[("abc", b"big")])

        assert len(await kit.rows("select from blobs")) == 1
