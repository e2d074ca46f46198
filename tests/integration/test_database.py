"""The statements that are not hot: what they cost in round trips, and when nobody lets us in."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from sqlalchemy import event, text

from app.domain.errors import Unavailable
from app.settings import Settings
from app.store import database as module
from app.store.database import Database
from tests.envelopes import diamond, echo_node, graph
from tests.service import RunningService, running_service
from tests.shared_service import problem, register, until
from tests.tools import answer_at_gate, http_capability, running_tool


async def test_a_read_begins_no_transaction(database: Database) -> None:
    asked: list[str] = []
    async with database.engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        # asyncpg tells what is not prepared: the ping, and where transactions begin and end.
        driver.add_query_logger(lambda query: asked.append(query.query))
    async with database.read() as connection:
        await connection.execute(text("select 1"))
    assert asked == [";"]
    asked.clear()
    async with database.transaction() as connection:
        await connection.execute(text("select 1"))
    assert asked == [";", "BEGIN ISOLATION LEVEL READ COMMITTED;", "COMMIT;"]


async def test_a_relaxed_statement_that_is_cut_off_takes_its_connection_along(
    database: Database,
) -> None:
    async def backend() -> int:
        async with database.relaxed() as connection:
            return int(await connection.fetchval("select pg_backend_pid()"))

    async def sleep() -> None:
        async with database.relaxed() as connection:
            under_way.set()
            await connection.execute("select pg_sleep(60)")

    before, under_way = await backend(), asyncio.Event()
    assert await backend() == before
    sleeping = asyncio.create_task(sleep())
    await under_way.wait()
    sleeping.cancel()
    async with asyncio.timeout(20):  # nobody waits until the server has heard of it
        await asyncio.gather(sleeping, return_exceptions=True)
        assert await backend() != before


async def test_a_relaxed_statement_that_is_refused_keeps_its_connection(
    database: Database,
) -> None:
    async with database.relaxed() as connection:
        before = await connection.fetchval("select pg_backend_pid()")
    with pytest.raises(asyncpg.UndefinedTableError):
        async with database.relaxed() as connection:
            await connection.execute("select from nowhere")
    async with database.relaxed() as connection:
        assert await connection.fetchval("select pg_backend_pid()") == before


async def test_relaxed_connections_that_are_all_in_use_are_a_database_out_of_reach(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(module.RELAXED_MAX):
            await stack.enter_async_context(database.relaxed())
        # Not before: each of those connects first, which takes a busy machine longer than this.
        monkeypatch.setattr(module, "RELAXED_S", 0.05)
        with pytest.raises(Unavailable, match="out of reach"):
            await stack.enter_async_context(database.relaxed())


async def test_a_run_is_read_with_three_statements(service: RunningService) -> None:
    run = await service.finished(diamond())
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if "FROM runs" in statement or "FROM events" in statement:  # housekeeping goes on
            asked.append(statement)

    engine = service.services.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        found = await service.client.get(f"/v1/runs/{run['run_id']}")
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert found.json() == run
    # The run with its plans and newest snapshot, the events behind that, the last event.
    assert len(asked) == 3, asked


async def test_a_login_that_is_refused_for_a_while_is_a_database_out_of_reach(
    dsn: str, settings: Settings
) -> None:
    admin = await asyncpg.connect(dsn)
    role = "rotated"
    await admin.execute(f"create role {role} superuser login password 'first'")
    try:
        own = urlsplit(dsn)
        login = own._replace(netloc=f"{role}:first@{own.hostname}:{own.port}").geturl()
        async with (
            running_tool(gated=answer_at_gate) as tool,
            running_service(settings, login) as service,
        ):
            await register(service, http_capability(tool, "gated", "pure"))
            run = await service.submit(graph(echo_node("A", capability="test.gated")))
            await tool.called.wait()
            await admin.execute(f"alter role {role} nologin")
            await admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where usename = $1", role
            )
            tool.gate.set()
            for path in (f"/v1/runs/{run['run_id']}", "/v1/capabilities"):
                refused = await service.client.get(path)
                problem(refused, 503, "database_unreachable")
                assert role not in refused.text
            refused = await service.client.post("/v1/runs", json=diamond())
            assert refused.status_code == 503
            await admin.execute(f"alter role {role} login")
            await until(service, run["run_id"], "RUN_DONE")
    finally:
        await admin.execute(f"reassign owned by {role} to current_user; drop role {role}")
        await admin.close()
