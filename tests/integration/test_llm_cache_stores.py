"""What the cache of model answers makes of its stores: Redis or Postgres away, and upkeep."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from app.adapters.llm_cache.redis import (
    AT_ONCE_MAX,
    BODY_BYTES_MAX,
    PATIENCE_S,
    TELL_EVERY_S,
    TTL_S,
    RedisHotAnswers,
)
from app.adapters.llm_cache.redis import REST_S as REDIS_REST_S
from app.bootstrap import open_services
from app.domain.chat import ChatAnswer, StopReason
from app.llm import cache as module
from app.llm.cache import REST_S, STATEMENT_S, AnswerCache
from app.store.database import Database
from app.store.llm_cache import DELETED_AT_ONCE, answer_to_json, forget_old_answers
from app.worker import Worker
from tests.chaos.proxy import FaultProxy, Weather, running_proxy
from tests.conftest import make_settings
from tests.llm_cache_kit import (
    ANSWER,
    KEY,
    Model,
    Open,
    StoredAtOnce,
    opened_caches,
    rows,
    sql_session,
    stored,
)
from tests.redis_kit import MortalRedis, make_client, until
from tests.servers import RunningRedis

HOT_KEY = f"flexrun:llm:t1:{KEY}"
BODY = answer_to_json(ANSWER) or b""
PATIENT_S = 10.0
"""The budget where exact counts are asked for: a busy machine is no outage of Redis."""


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


@pytest.fixture
async def client(redis_server: RunningRedis) -> AsyncIterator[Any]:
    client = make_client(redis_server.url)
    await client.flushall()
    await client.config_resetstat()
    yield client
    await client.aclose()


@pytest.fixture
async def hot(redis_server: RunningRedis) -> AsyncIterator[RedisHotAnswers]:
    async with opened_hot(redis_server.url) as hot:
        yield hot


@asynccontextmanager
async def opened_hot(
    url: str, budget_s: float = PATIENT_S, **options: Any
) -> AsyncIterator[RedisHotAnswers]:
    hot = RedisHotAnswers(url, budget_s=budget_s, **options)
    try:
        yield hot
    finally:
        await hot.aclose()


# --- hot copies in Redis --------------------------------------------------------------------------


async def test_a_hot_copy_saves_the_way_to_postgres(
    open_cache: Open, sql: Any, hot: RedisHotAnswers, client: Any
) -> None:
    model = Model()
    first, second = await open_cache(hot=hot), await open_cache(hot=hot)
    assert await first.fetch(KEY, "t1", model) == (ANSWER, False)
    await sql.execute("delete from llm_answers")

    assert await second.fetch(KEY, "t1", model) == (ANSWER, True)
    assert await client.keys("*") == [HOT_KEY]
    assert 0 < await client.ttl(HOT_KEY) <= TTL_S


async def test_what_is_found_in_postgres_becomes_hot(
    open_cache: Open, hot: RedisHotAnswers, client: Any
) -> None:
    model = Model()
    cold, warm = await open_cache(), await open_cache(hot=hot)
    await cold.fetch(KEY, "t1", model)
    assert await client.keys("*") == []

    assert await warm.fetch(KEY, "t1", model) == (ANSWER, True)
    assert await client.keys("*") == [HOT_KEY]


async def test_fifty_callers_look_into_redis_once(
    open_cache: Open, hot: RedisHotAnswers, client: Any
) -> None:
    model, cache = Model(), await open_cache(hot=hot)
    await asyncio.gather(*(cache.fetch(KEY, "t1", model) for _ in range(50)))
    commands = await client.info("commandstats")

    assert model.calls == 1
    assert commands["cmdstat_getrange"]["calls"] == 1
    assert commands["cmdstat_set"]["calls"] == 1


async def test_a_copy_that_is_no_answer_is_a_miss_and_replaced(
    open_cache: Open, hot: RedisHotAnswers, client: Any
) -> None:
    model, cache = Model(), await open_cache(hot=hot)
    too_large = BODY + b" " * BODY_BYTES_MAX
    for body in (b"", b"\xff", b"[]", b'{"format":99}', too_large):
        await client.set(HOT_KEY, body)

        assert (await cache.fetch(KEY, "t1", model))[0] == ANSWER
        assert await hot.get(f"t1:{KEY}") == BODY
    assert model.calls == 1, "Postgres has it"


async def test_a_key_of_another_kind_is_a_miss(
    open_cache: Open, hot: RedisHotAnswers, client: Any
) -> None:
    model, cache = Model(), await open_cache(hot=hot)
    await client.lpush(HOT_KEY, "not ours")

    assert await cache.fetch(KEY, "t1", model) == (ANSWER, False)


async def test_a_large_answer_has_no_hot_copy(
    open_cache: Open, sql: Any, hot: RedisHotAnswers, client: Any
) -> None:
    said = ChatAnswer("x" * BODY_BYTES_MAX, StopReason.END)
    model, cache = Model(said=said), await open_cache(hot=hot)

    assert await cache.fetch(KEY, "t1", model) == (said, False)
    assert await cache.fetch(KEY, "t1", model) == (said, True)
    assert await client.keys("*") == []
    assert await stored(sql) == 1


async def test_what_is_not_stored_has_no_hot_copy(
    open_cache: Open, hot: RedisHotAnswers, client: Any
) -> None:
    cache = await open_cache(hot=hot)
    await cache.fetch(KEY, "t1", Model(said=ChatAnswer("No.", StopReason.REFUSED)))
    with pytest.raises(ValueError, match="bad"):
        await cache.fetch(KEY, "t1", Model(ValueError("bad")))

    assert await client.keys("*") == []


async def test_an_answer_that_lost_its_lease_has_no_hot_copy(
    open_cache: Open, sql: Any, hot: RedisHotAnswers, client: Any
) -> None:
    model, cache = Model(waits=True), await open_cache(hot=hot)
    asking = asyncio.create_task(cache.fetch(KEY, "t1", model))
    await model.called.wait()
    await sql.execute("update llm_answers set owner = 'another'")
    model.go_on.set()

    assert await asking == (ANSWER, False)
    assert await client.keys("*") == []


async def test_redis_away_or_frozen_fails_nobody(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, now = Model(), [0.0]
    with MortalRedis(tmp_path) as server:
        async with opened_hot(server.url, 0.05, clock=lambda: now[0]) as hot:
            cache = await open_cache(hot=hot)
            server.freeze()
            async with asyncio.timeout(PATIENCE_S):  # which a command has, and a caller has not
                for tenant_id in ("t1", "t2"):
                    assert await cache.fetch(KEY, tenant_id, model) == (ANSWER, False)
            server.thaw()
            server.kill()
            for tenant_id in ("t1", "t2", "t3"):
                now[0] += REDIS_REST_S
                await cache.fetch(KEY, tenant_id, model)
            assert model.calls == 3, "what is in Postgres is not asked again"

    [told] = [record for record in caplog.records if record.name == "flexrun.llm"]
    assert told.levelno == logging.WARNING
    assert str(server.port) not in caplog.text


async def test_redis_is_not_asked_again_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    with MortalRedis(tmp_path) as server:
        async with opened_hot(server.url, clock=lambda: now[0]) as hot:
            await hot.put("name", b"{}")
            server.kill()
            assert await hot.get("name") is None
            server.start()
            now[0] += 0.9 * REDIS_REST_S
            await hot.put("name", b"{}")
            assert await hot.get("name") is None
            now[0] += 0.2 * REDIS_REST_S
            await hot.put("name", b"{}")
            assert await hot.get("name") == b"{}"
            server.kill()
            assert await hot.get("name") is None
            assert len(caplog.records) == 1
            now[0] += TELL_EVERY_S
            assert await hot.get("name") is None
            assert len(caplog.records) == 2


async def test_closing_waits_for_no_command(tmp_path: Path) -> None:
    with MortalRedis(tmp_path) as server:
        async with asyncio.timeout(PATIENCE_S), opened_hot(server.url, 0.05) as hot:
            server.freeze()
            assert await hot.get("name") is None


async def test_no_reply_reaches_another_caller(tmp_path: Path) -> None:
    """Neither of a command that is over its budget nor of one whose caller left."""
    names, now = [f"name {number}" for number in range(40)], [0.0]
    with MortalRedis(tmp_path) as server:
        async with opened_hot(server.url, 0.05, clock=lambda: now[0]) as hot:
            client = make_client(server.url)
            for name in names:
                await client.set(f"flexrun:llm:{name}", name)
            server.freeze()
            asking = [asyncio.create_task(hot.get(name)) for name in names]
            await asyncio.sleep(0)
            for task in asking[::2]:
                task.cancel()
            late = await asyncio.gather(*asking, return_exceptions=True)
            assert set(late[1::2]) == {None}
            server.thaw()
            found = 0
            while found < len(names):
                now[0] += REDIS_REST_S
                for name in names:
                    told = await hot.get(name)
                    assert told in (None, name.encode())
                    found += told is not None
            assert int((await client.info("clients"))["connected_clients"]) <= AT_ONCE_MAX + 1
            await client.aclose()


# --- Postgres away --------------------------------------------------------------------------------


@asynccontextmanager
async def cache_over_a_line(
    dsn: str, **options: Any
) -> AsyncIterator[tuple[AnswerCache, FaultProxy]]:
    """A cache whose line to Postgres can be cut."""
    url = make_url(dsn)
    assert url.port is not None
    async with running_proxy(url.port) as proxy:
        far = url.set(port=proxy.port).render_as_string(hide_password=False)
        database = await Database.open(far)
        cache = StoredAtOnce(database, **options)
        yield cache, proxy
        await cache.aclose()
        await database.close()


def cut(proxy: FaultProxy) -> None:
    proxy.set(Weather(refusing=True))
    proxy.reset_all()


async def test_without_postgres_models_are_called_directly(
    dsn: str, sql: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flexrun.llm")
    model, now = Model(), [0.0]
    async with cache_over_a_line(dsn, clock=lambda: now[0]) as (cache, proxy):
        cut(proxy)
        for _ in range(3):
            now[0] += REST_S
            assert await cache.fetch(KEY, "t1", model) == (ANSWER, False)
        with pytest.raises(ValueError, match="bad"):
            await cache.fetch(KEY, "t1", Model(ValueError("bad")))
        proxy.clear()
        connections = proxy.connections
        assert await cache.fetch(KEY, "t1", model) == (ANSWER, False)
        assert proxy.connections == connections, "not asked again at once"
        assert await rows(sql) == 0
        now[0] += REST_S
        assert await cache.fetch(KEY, "t1", model) == (ANSWER, False)
        assert await cache.fetch(KEY, "t1", model) == (ANSWER, True)

    told = [record for record in caplog.records if record.name == "flexrun.llm"]
    assert [record.levelno for record in told] == [logging.WARNING, logging.INFO]
    assert str(make_url(dsn).password) not in caplog.text
    assert ANSWER.text not in caplog.text


async def test_postgres_lost_during_the_call_costs_only_the_copy(dsn: str, sql: Any) -> None:
    model = Model(waits=True)
    async with cache_over_a_line(dsn) as (cache, proxy):
        asking = asyncio.create_task(cache.fetch(KEY, "t1", model))
        await model.called.wait()
        cut(proxy)
        model.go_on.set()

        assert await asking == (ANSWER, False)
        assert await stored(sql) == 0


async def test_who_waits_for_another_process_goes_on_without_postgres(
    dsn: str, open_cache: Open
) -> None:
    slow, own, other = Model(waits=True), Model(), await open_cache()
    leading = asyncio.create_task(other.fetch(KEY, "t1", slow))
    await slow.called.wait()
    async with cache_over_a_line(dsn) as (cache, proxy):
        waiting = asyncio.create_task(cache.fetch(KEY, "t1", own))
        await asyncio.wait({waiting}, timeout=0.05)
        cut(proxy)

        assert await waiting == (ANSWER, False)
        slow.go_on.set()
        assert await leading == (ANSWER, False)


async def test_a_line_that_says_nothing_holds_no_call_up(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STATEMENT_S", STATEMENT_S)
    model = Model()
    async with cache_over_a_line(dsn) as (cache, proxy):
        proxy.set(Weather(half_open=True))
        assert await cache.fetch(KEY, "t1", model) == (ANSWER, False)
        proxy.reset_all()


# --- upkeep ---------------------------------------------------------------------------------------


async def test_a_use_is_noted_once_a_day(open_cache: Open, sql: Any) -> None:
    model, cache = Model(), await open_cache()
    await cache.fetch(KEY, "t1", model)
    await sql.execute("update llm_answers set last_used_day = current_date - 20")
    versions = []
    for _ in range(3):
        assert await cache.fetch(KEY, "t1", model) == (ANSWER, True)
        versions.append(await sql.fetchval("select xmin::text from llm_answers"))

    assert len(set(versions)) == 1
    assert await sql.fetchval("select last_used_day = current_date from llm_answers")


async def add_rows(sql: Any, count: int, days_ago: int) -> None:
    await sql.execute(
        """insert into llm_answers (tenant_id, cache_key, body, created_at, last_used_day)
        select 't1', $2 || '-' || n, '{}', clock_timestamp(), current_date - $2::int
        from generate_series(1, $1) n""",
        count,
        str(days_ago),
    )


async def test_what_was_not_used_for_long_is_forgotten(database: Database, sql: Any) -> None:
    await add_rows(sql, DELETED_AT_ONCE + 5, days_ago=31)
    await add_rows(sql, 3, days_ago=30)
    await add_rows(sql, 2, days_ago=0)

    assert await forget_old_answers(database, 30) == DELETED_AT_ONCE + 5
    assert await forget_old_answers(database, 30) == 0
    assert await forget_old_answers(database, 0) == 3
    assert await stored(sql) == 2


async def test_a_worker_keeps_the_house_of_answers(dsn: str, sql: Any) -> None:
    await add_rows(sql, 4, days_ago=8)
    await add_rows(sql, 1, days_ago=7)
    async with open_services(make_settings(llm_cache_days=7), dsn) as services:
        worker = Worker(services)
        await worker.start()

        async def is_done() -> bool:
            return await stored(sql) == 1

        await until(is_done, "old answers are gone")
        await worker.drain(0)
