"""The cache of model answers on a real Postgres: one call for all who ask, and none that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import pytest

from app.domain.chat import ChatAnswer, StopReason
from app.llm import cache as module
from app.store.llm_cache import BODY_BYTES_MAX
from tests.far_side import Exchange, answer, far_side
from tests.llm_cache_kit import ANSWER, KEY, Model, Open, opened_caches, rows, sql_session, stored
from tests.llm_cache_process import Order, asking_process
from tests.redis_kit import make_client, until
from tests.servers import RunningRedis

LEASE_S = 4.5
"""Renewed after each third of it: a busy machine may stall whoever holds it for 3 s."""


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no outage of Postgres, after which calls go on without the cache."""
    monkeypatch.setattr(module, "STATEMENT_S", 30.0)


@pytest.fixture
async def open_cache(dsn: str) -> AsyncIterator[Open]:
    async with opened_caches(dsn) as open_cache:
        yield open_cache


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[Any]:
    async with sql_session(dsn) as sql:
        yield sql


# --- hits and misses ------------------------------------------------------------------------------


async def test_what_was_answered_once_is_not_asked_again(open_cache: Open, sql: Any) -> None:
    model = Model()
    first, second = await open_cache(), await open_cache()

    assert await first.fetch(KEY, "t1", model) == (ANSWER, False)
    assert await first.fetch(KEY, "t1", model) == (ANSWER, True)
    assert await second.fetch(KEY, "t1", model) == (ANSWER, True)
    assert model.calls == 1
    [row] = await sql.fetch("select * from llm_answers")
    assert (row["tenant_id"], row["cache_key"], row["owner"]) == ("t1", KEY, None)


async def test_another_key_or_tenant_is_a_miss(open_cache: Open, sql: Any) -> None:
    model, cache = Model(), await open_cache()
    for key, tenant_id in ((KEY, "t1"), (KEY, "t2"), ("cd" * 32, "t1")):
        assert await cache.fetch(key, tenant_id, model) == (ANSWER, False)

    assert model.calls == await stored(sql) == 3


async def test_what_is_no_answer_to_give_again_is_not_stored(open_cache: Open, sql: Any) -> None:
    cache = await open_cache()
    for said in (
        ChatAnswer("I would rath", StopReason.LENGTH),
        ChatAnswer("I would rather not", StopReason.REFUSED),
        ChatAnswer("x" * BODY_BYTES_MAX, StopReason.END),
        ChatAnswer("half of \ud83d", StopReason.END),
    ):
        model = Model(said=said)

        assert await cache.fetch(KEY, "t1", model) == (said, False)
        assert await cache.fetch(KEY, "t1", model) == (said, False)
        assert await rows(sql) == 0


async def test_an_answer_that_can_not_be_read_is_replaced(open_cache: Open, sql: Any) -> None:
    model, cache = Model(), await open_cache()
    await cache.fetch(KEY, "t1", model)
    for body in (b"", b"\xff", b'{"format":0}', b"[]"):
        await sql.execute("update llm_answers set body = $1", body)

        assert await cache.fetch(KEY, "t1", model) == (ANSWER, False)
        assert await cache.fetch(KEY, "t1", model) == (ANSWER, True)
    assert model.calls == 5


# --- one call for all -----------------------------------------------------------------------------


async def test_fifty_callers_of_one_process_make_one_call(open_cache: Open) -> None:
    model, cache = Model(), await open_cache()
    found = await asyncio.gather(*(cache.fetch(KEY, "t1", model) for _ in range(50)))

    assert model.calls == 1
    assert sorted(hit for _, hit in found) == [False] + 49 * [True]
    assert {answer for answer, _ in found} == {ANSWER}


async def test_fifty_callers_of_two_caches_make_one_call(open_cache: Open) -> None:
    model, caches = Model(waits=True), [await open_cache(), await open_cache()]
    callers = [
        asyncio.create_task(cache.fetch(KEY, "t1", model)) for cache in caches for _ in range(25)
    ]
    await model.called.wait()
    model.go_on.set()
    found = await asyncio.gather(*callers)

    assert model.calls == 1
    assert sorted(hit for _, hit in found) == [False] + 49 * [True]


@pytest.mark.parametrize("with_redis", [False, True], ids=["without Redis", "with Redis"])
async def test_fifty_callers_of_two_processes_make_one_call(
    dsn: str, redis_server: RunningRedis, with_redis: bool
) -> None:
    may_answer = asyncio.Event()
    client = make_client(redis_server.url)
    await client.flushall()  # other tests leave hot copies under the same key
    await client.aclose()

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        await may_answer.wait()
        await answer(body=b"forty-two")(writer, exchange)

    async with far_side() as model, AsyncExitStack() as stack:
        model.behave = behave
        redis_url = redis_server.url if with_redis else None
        order = Order(dsn, redis_url, model.url, KEY, callers=25, lease_s=5.0)
        processes = [await stack.enter_async_context(asking_process(order)) for _ in range(2)]
        for process in processes:
            await process.go()
        await model.arrived.wait()
        may_answer.set()
        told = [await process.told() for process in processes]

        assert len(model.exchanges) == sum(each.calls for each in told) == 1
        assert sum(each.hits for each in told) == 49
        assert [each.answers for each in told] == 2 * [["forty-two"]]


async def test_waiting_writes_nothing(open_cache: Open, sql: Any) -> None:
    model, other = Model(waits=True), await open_cache()
    leading = asyncio.create_task((await open_cache()).fetch(KEY, "t1", model))
    await model.called.wait()
    waiting = asyncio.create_task(other.fetch(KEY, "t1", model))
    await asyncio.wait({waiting}, timeout=0.1)

    assert await sql.fetchval("select xmax::text from llm_answers") == "0", "nor locks the row"
    model.go_on.set()
    assert await leading == (ANSWER, False)
    assert await waiting == (ANSWER, True)


async def test_different_keys_do_not_wait_for_each_other(open_cache: Open) -> None:
    slow, quick, cache = Model(waits=True), Model(), await open_cache()
    waiting = asyncio.create_task(cache.fetch(KEY, "t1", slow))
    await slow.called.wait()

    assert await cache.fetch(KEY, "t2", quick) == (ANSWER, False)
    slow.go_on.set()
    assert await waiting == (ANSWER, False)


# --- a call that gives nothing --------------------------------------------------------------------


async def test_a_failure_goes_to_one_caller_and_is_not_stored(open_cache: Open, sql: Any) -> None:
    model, cache = Model(TimeoutError("slow")), await open_cache()

    with pytest.raises(TimeoutError, match="slow"):
        await cache.fetch(KEY, "t1", model)
    assert await rows(sql) == 0
    assert await cache.fetch(KEY, "t1", model) == (ANSWER, False)


@pytest.mark.parametrize("processes", [1, 2])
async def test_after_a_failure_the_waiting_try_one_at_a_time(
    open_cache: Open, processes: int
) -> None:
    failures = [ValueError("first"), ValueError("second"), ValueError("third")]
    model = Model(*failures)
    caches = [await open_cache() for _ in range(processes)]
    found = await asyncio.gather(
        *(caches[number % processes].fetch(KEY, "t1", model) for number in range(10)),
        return_exceptions=True,
    )

    assert (model.calls, model.at_once_max) == (4, 1)
    assert sorted(str(each) for each in found if isinstance(each, Exception)) == [
        "first",
        "second",
        "third",
    ]
    assert found.count((ANSWER, False)) == 1
    assert found.count((ANSWER, True)) == 6


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_caller_that_is_cancelled_passes_the_lead_on(
    open_cache: Open, sql: Any, processes: int
) -> None:
    given_up, model = Model(waits=True), Model()
    caches = [await open_cache() for _ in range(processes)]
    leader = asyncio.create_task(caches[0].fetch(KEY, "t1", given_up))
    await given_up.called.wait()
    waiting = [asyncio.create_task(caches[-1].fetch(KEY, "t1", model)) for _ in range(5)]
    await asyncio.sleep(0)
    leader.cancel()
    found = await asyncio.gather(*waiting)

    assert leader.cancelled()
    assert (given_up.calls, given_up.at_once, model.calls) == (1, 0, 1)
    assert sorted(hit for _, hit in found) == [False] + 4 * [True]
    assert await stored(sql) == 1


async def test_a_caller_that_is_cancelled_gives_its_lease_back(open_cache: Open, sql: Any) -> None:
    model, cache = Model(waits=True), await open_cache()
    leader = asyncio.create_task(cache.fetch(KEY, "t1", model))
    await model.called.wait()
    assert (await rows(sql), await stored(sql)) == (1, 0)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)

    assert await rows(sql) == 0


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_waiting_caller_may_leave(open_cache: Open, processes: int) -> None:
    model = Model(waits=True)
    caches = [await open_cache() for _ in range(processes)]
    leader = asyncio.create_task(caches[0].fetch(KEY, "t1", model))
    await model.called.wait()
    waiting = [asyncio.create_task(caches[-1].fetch(KEY, "t1", model)) for _ in range(2)]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await caches[-1].fetch(KEY, "t1", model)
    waiting[0].cancel()
    model.go_on.set()

    assert await leader == (ANSWER, False)
    assert await waiting[1] == (ANSWER, True)
    assert waiting[0].cancelled()
    assert model.calls == 1


async def test_cancelled_anywhere_it_leaves_nothing_behind(open_cache: Open, sql: Any) -> None:
    rng, cache = Random(3), await open_cache(lease_s=1.0)
    for number in range(60):
        model = Model()
        asking = asyncio.create_task(cache.fetch(f"key {number}", "t1", model))
        for _ in range(rng.randrange(1, 60)):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    model = Model()
    for number in range(60):
        assert (await cache.fetch(f"key {number}", "t1", model))[0] == ANSWER
    assert await stored(sql) == 60


# --- leases ---------------------------------------------------------------------------------------


async def test_a_killed_process_is_waited_for_until_its_lease_ends(
    open_cache: Open, dsn: str, sql: Any
) -> None:
    never, own = asyncio.Event(), Model()

    async def behave(_writer: asyncio.StreamWriter, _exchange: Exchange) -> None:
        await never.wait()

    async with far_side() as model:
        model.behave = behave
        order = Order(dsn, None, model.url, KEY, callers=3, lease_s=LEASE_S)
        async with asking_process(order) as leader:
            await leader.go()
            await model.arrived.wait()
            cache = await open_cache()
            waiting = asyncio.create_task(cache.fetch(KEY, "t1", own))
            await renewed(sql, by_s=0.0)
            assert not waiting.done(), "the one that makes the call lives"
            await leader.kill()
            # What is left of a lease is long, so most of it passes at once.
            ends = await sql.fetchrow(
                """update llm_answers set lease_until = clock_timestamp() + interval '0.5 s'
                returning owner, lease_until"""
            )

        assert await waiting == (ANSWER, False)
        [row] = await sql.fetch("select * from llm_answers")
        assert row["created_at"] > ends["lease_until"]
        assert ends["owner"] is not None
        assert (len(model.exchanges), own.calls) == (1, 1)


async def test_a_call_that_takes_longer_than_a_lease_keeps_it(open_cache: Open, sql: Any) -> None:
    model = Model(waits=True)
    leader, other = await open_cache(lease_s=LEASE_S), await open_cache(lease_s=LEASE_S)
    leading = asyncio.create_task(leader.fetch(KEY, "t1", model))
    await model.called.wait()
    waiting = asyncio.create_task(other.fetch(KEY, "t1", model))
    await renewed(sql, by_s=LEASE_S)
    model.go_on.set()

    assert await leading == (ANSWER, False)
    assert await waiting == (ANSWER, True)
    assert model.calls == 1


async def renewed(sql: Any, by_s: float) -> None:
    """Wait until the one lease ends so much later than it does now."""
    first = await sql.fetchval("select lease_until from llm_answers")

    async def is_renewed() -> bool:
        ends = await sql.fetchval("select lease_until from llm_answers")
        return bool((ends - first).total_seconds() > by_s)

    await until(is_renewed, "the lease is renewed")


async def test_all_leases_of_a_process_are_renewed(open_cache: Open, sql: Any) -> None:
    model, cache = Model(waits=True), await open_cache(lease_s=0.3)
    asking = [asyncio.create_task(cache.fetch(f"key {n}", "t1", model)) for n in range(20)]
    await until(lambda: model.calls == 20, "all ask")
    first = await sql.fetchval("select max(lease_until) from llm_answers")

    async def run_on() -> bool:
        return bool(await sql.fetchval("select min(lease_until) from llm_answers") > first)

    await until(run_on, "all leases are renewed")
    model.go_on.set()
    await asyncio.gather(*asking)
    assert await stored(sql) == 20


async def test_who_lost_its_lease_stores_nothing(open_cache: Open, sql: Any) -> None:
    model, cache = Model(waits=True), await open_cache()
    asking = asyncio.create_task(cache.fetch(KEY, "t1", model))
    await model.called.wait()
    await sql.execute("update llm_answers set owner = 'another'")
    model.go_on.set()

    assert await asking == (ANSWER, False), "its caller has the answer all the same"
    [row] = await sql.fetch("select * from llm_answers")
    assert (row["owner"], row["body"]) == ("another", None)
