"""Many runs at once: all end, nothing is mixed up, and nothing is left behind in the process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
import pytest_asyncio

from tests.conftest import fresh_database, make_settings
from tests.envelopes import chain, diamond, echo_node, graph, wide
from tests.redis_kit import until as eventually
from tests.servers import free_port
from tests.service import RunningService, running_service
from tests.shared_service import audit, problem, register, rows, until
from tests.sse import read_stream
from tests.tools import Tool, answer, answer_at_gate, fail_once, http_capability, running_tool

pytestmark = pytest.mark.asyncio(loop_scope="module")

RUNS = 300
CONNECTIONS_MAX = 3 + 5 + 2 + 1 + 1
"""SQLAlchemy's pool and overflow, the journal's writers, the lease, the wake-ups."""
PATIENT = 10_000
"""The breaker of the tool where nobody listens stays closed, so that its runs fail at once."""
DOCUMENT = {"text": "# Release\n\nVersion 2.1 ships on 2026-03-01. It is 40 % faster than 2.0.\n"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def dsn(postgres_dsn: str) -> AsyncIterator[str]:
    async with fresh_database(postgres_dsn) as dsn:
        yield dsn
        assert await audit(dsn)  # of whichever of these tests this process ran


@asynccontextmanager
async def busy_client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client with room for all requests at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        yield client


def kinds() -> list[tuple[dict[str, Any], str]]:
    """Envelopes, each with the status that its runs must end in."""
    brief = {"mode": "facets", "facets": ["brief"]}
    retried = graph(echo_node("A"), echo_node("B", "A", capability="test.fail"))
    limited = graph(*(echo_node(f"n{i}", capability="test.limited") for i in range(3)))
    refused = graph(echo_node("A"), echo_node("B", "A", capability="test.hopeless"))
    big = graph(echo_node("A", inputs={"text": {"value": "ü" * 40_000}}), echo_node("B", "A"))
    return [
        (diamond(), "done"),
        (chain(8), "done"),
        (wide(12), "done"),
        (retried, "done"),
        (limited, "done"),
        (refused, "failed"),
        (big, "done"),
        (
            {"objective": "brief", "inputs": {"document": DOCUMENT}, "output_contract": brief},
            "done",
        ),
        ({"objective": "brief", "inputs": {}, "output_contract": brief}, "failed"),
    ]


async def submit_and_follow(
    client: httpx.AsyncClient, number: int, envelope: dict[str, Any]
) -> str:
    """The status of a run at its end, learned in one of three ways."""
    way = number % 3
    if way == 0:
        response = await client.post("/v1/runs", json=envelope, headers={"Prefer": "wait=60"})
        assert response.status_code == 200, response.text
        return str(response.json()["status"])
    if way == 1:
        headers = {"Accept": "text/event-stream"}
        async with client.stream("POST", "/v1/runs", json=envelope, headers=headers) as stream:
            assert stream.status_code == 200, await stream.aread()
            events = await read_stream(stream)
    else:
        accepted = await client.post("/v1/runs", json=envelope)
        assert accepted.status_code == 202, accepted.text
        url = accepted.json()["links"]["events"]
        async with client.stream("GET", url, headers={"Accept": "text/event-stream"}) as stream:
            assert stream.status_code == 200, await stream.aread()
            events = await read_stream(stream)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert len({event.json["run_id"] for event in events}) == 1
    return {"RUN_DONE": "done", "RUN_FAILED": "failed"}[events[-1].event]


async def burst(service: RunningService, count: int) -> None:
    """So many runs of all kinds at once, each to the end that its kind has."""
    mixed = kinds()
    async with busy_client(service.url) as client:
        statuses = await asyncio.gather(
            *(
                submit_and_follow(client, number, mixed[number % len(mixed)][0])
                for number in range(count)
            )
        )
    expected = [mixed[number % len(mixed)][1] for number in range(count)]
    assert Counter(statuses) == Counter(expected)
    assert statuses == expected


async def register_tools(service: RunningService, tool: Tool) -> None:
    nobody = f"http://127.0.0.1:{free_port()}/"
    await register(
        service,
        http_capability(tool, "fail", "idempotent"),
        http_capability(tool, "limited", "pure", concurrency=4),
        http_capability(tool, "hopeless", "pure", config={"url": nobody}),
    )


async def connections_of(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return int(
            await connection.fetchval(
                """select count(*) from pg_stat_activity
                where datname = current_database() and application_name = 'flexrun'"""
            )
        )
    finally:
        await connection.close()


async def runs_of(service: RunningService) -> Counter[str]:
    """How many runs of each status there are, those of other tests of this file among them."""
    found = await rows(service, "select status, count(*) from run_heads group by 1")
    return Counter({row["status"]: row["count"] for row in found})


def task_names() -> Counter[str]:
    """What runs in this loop, without the tool's own connections."""
    names = Counter(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    del names["Tool._serve"]
    return names


async def quiet(service: RunningService) -> Counter[str]:
    """The tasks that are left when every run, stream and statement has ended."""
    services = service.services
    pool: Any = services.database.engine.pool
    async with asyncio.timeout(20):
        while services.runner.driven or services.feed.readers:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        while "RequestResponseCycle.run_asgi" in task_names():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        while pool.checkedout():  # noqa: ASYNC110 - by the feed, which looks for news by itself
            await asyncio.sleep(0.01)
    return task_names()


async def quiet_again(service: RunningService, before: Counter[str]) -> Counter[str]:
    """The tasks that are left, which are soon those of before: some end after what they did."""
    left = await quiet(service)
    with suppress(TimeoutError):
        async with asyncio.timeout(20):
            while left != before:
                await asyncio.sleep(0.01)
                left = await quiet(service)
    return left


async def test_three_hundred_runs_at_once_end_and_leave_nothing_behind(dsn: str) -> None:
    # No sweep of the registry in between: it would be a task and a statement more.
    settings = make_settings(cb_threshold=PATIENT, sweep_s=3_600)
    async with running_tool(fail=fail_once, limited=answer) as tool:
        async with running_service(settings, dsn) as service:
            known = await runs_of(service)
            await register_tools(service, tool)
            await burst(service, 18)
            before = await quiet(service)
            await burst(service, RUNS)

            assert await quiet_again(service, before) == before
            services = service.services
            assert services.runner.driven == 0
            assert services.feed.readers == 0
            assert services.feed._channels == {}
            assert not any(services.runner.drive.executor.slots._used.values())
            assert not any(services.runner.drive.executor.slots._waiting.values())
            pool: Any = services.database.engine.pool
            assert pool.checkedout() == 0
            assert await connections_of(dsn) <= CONNECTIONS_MAX
            statuses = await runs_of(service)
            assert statuses.keys() == {"done", "failed"}
            assert statuses.total() - known.total() == RUNS + 18
            assert not await rows(service, "select from run_heads where owner is not null")

        async def all_are_closed() -> bool:
            return await connections_of(dsn) == 0

        await eventually(all_are_closed, "the server has noticed that we left")


async def test_runs_beyond_the_bound_wait_their_turn_and_all_end(dsn: str) -> None:
    async with (
        running_tool(fail=fail_once, limited=answer) as tool,
        running_service(make_settings(runs_max=5, cb_threshold=PATIENT), dsn) as service,
    ):
        await register_tools(service, tool)
        await burst(service, 60)
        assert not service.services.runner.handed_off
        # What waits for its turn here is left alone by the worker of the same process.
        assert service.services.metrics.stale_writes == 0


async def test_a_run_whose_acceptance_came_late_is_driven_all_the_same(dsn: str) -> None:
    settings = make_settings(runs_max=1)
    async with AsyncExitStack() as stack:
        tool = await stack.enter_async_context(running_tool(gated=answer_at_gate))
        service = await stack.enter_async_context(running_service(settings, dsn))
        await register(service, http_capability(tool, "gated", "pure"))
        first = await service.submit(graph(echo_node("A", capability="test.gated")))
        await tool.called.wait()
        # Not before: a busy machine takes longer than this for a run that it accepts.
        service.services.commands.submit_timeout_s = 0.1

        blocker = await asyncpg.connect(dsn)
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("lock table idempotency_keys, runs in exclusive mode")
        headers = {"Idempotency-Key": "late"}
        late = chain(2, metadata={"label": "late"})
        response = await service.client.post("/v1/runs", json=late, headers=headers)
        problem(response, 503, "submit_outcome_unknown")
        assert int(response.headers["retry-after"]) > 0
        await transaction.rollback()
        await blocker.close()

        # The same key finds the run as soon as it is durable; it waits for the room of the first.
        async with asyncio.timeout(10):
            sql = "select run_id from runs where label = 'late'"
            while not (found := await rows(service, sql)):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        run_id = str(found[0]["run_id"])
        again = await service.client.post("/v1/runs", json=late, headers=headers)
        assert (again.status_code, again.json()["run_id"]) == (202, run_id)
        tool.gate.set()
        await until(service, first["run_id"], "RUN_DONE")
        async with asyncio.timeout(10):
            await until(service, run_id, "RUN_DONE")


async def test_a_service_without_free_connections_says_try_again(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_service(make_settings(), dsn) as service:
        run = await service.finished(diamond())
        engine = service.services.database.engine
        async with AsyncExitStack() as stack:
            for _ in range(8):
                _ = await stack.enter_async_context(engine.connect())
            # Not before: one of them may be in use by the service itself for a while.
            monkeypatch.setattr(engine.pool, "_timeout", 0.05)
            for path in ("", "/events", "/plans", "/debug"):
                response = await service.client.get(f"/v1/runs/{run['run_id']}{path}")
                problem(response, 503, "database_unreachable")
                assert int(response.headers["retry-after"]) > 0
            listed = await service.client.get("/v1/runs")
            problem(listed, 503, "database_unreachable")
            # Runs go on: their road to the journal is another one.
            accepted = await service.submit(diamond())
            # What is accepted is not refused because its end can not be read.
            waited = await service.client.post(
                "/v1/runs", json=diamond(), headers={"Prefer": "wait=5"}
            )
            assert (waited.status_code, waited.json()["status"]) == (202, "queued")
            assert waited.headers["location"] == f"/v1/runs/{waited.json()['run_id']}"
        await until(service, waited.json()["run_id"], "RUN_DONE")
        await until(service, accepted["run_id"], "RUN_DONE")
        head = await service.services.reader.head("default", UUID(accepted["run_id"]))
        assert head is not None
        assert head.status == "done"
