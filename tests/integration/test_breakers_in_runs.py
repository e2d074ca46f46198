"""Breakers as runs meet them: opened by failures, waited for, announced once, reset by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pytest

from app.adapters.capabilities.egress import EgressRefused
from app.adapters.capabilities.http import HttpAdapter
from app.adapters.capabilities.http_outcome import refused_target
from app.ports import BreakerStatus, Call, Permit, TransitionKind
from app.settings import Settings
from tests.conftest import make_settings
from tests.envelopes import echo_node, graph
from tests.far_side import Exchange, far_side
from tests.far_side import answer as answer_bytes
from tests.redis_kit import MortalRedis, make_client
from tests.redis_kit import until as eventually
from tests.servers import RunningRedis
from tests.service import RunningService, running_service
from tests.shared_service import problem, register, rows, until
from tests.sse import SseEvent
from tests.tools import Tool, answer, http_capability, respond, running_tool

BREAKER_EVENTS = ("BREAKER_TRIPPED", "BREAKER_HALF_OPEN", "BREAKER_CLOSED")
LONG_S = 600.0
PATIENT_S = 2.0
"""The cool-down of a breaker that must be open after the next commits, which may be slow."""
BUSY_MACHINE_MS = 10_000
"""So that a machine which is busy with other tests does not count as an outage of Redis."""


def settings(**changes: object) -> Settings:
    return make_settings(**{"cb_threshold": 3, "cb_cooldown_s": 1.0, **changes})


class Moody:
    """A tool that answers 503 while `is_down`, but no more than `failures_max` times."""

    def __init__(self) -> None:
        self.is_down = True
        self.failures_max = math.inf
        self.status = 503

    async def __call__(
        self, tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        if self.is_down and len(tool.ledger) <= self.failures_max:
            respond(writer, self.status, {"detail": "not now"})
        else:
            await answer(tool, body, writer)


@asynccontextmanager
async def moody(service: RunningService, **more: Any) -> AsyncIterator[tuple[Tool, Moody]]:
    """The tool behind `test.moody`, down at first; with ten attempts a node."""
    mood = Moody()
    async with running_tool(moody=mood) as tool:
        body = http_capability(tool, "moody", "idempotent", **{"max_attempts": 10, **more})
        await register(service, body)
        yield tool, mood


def one_call(**more: Any) -> dict[str, Any]:
    return graph(echo_node("A", capability="test.moody"), **more)


def scope_of(tool: Tool) -> str:
    return f"test.moody::127.0.0.1:{tool.port}"


async def breakers(service: RunningService) -> dict[str, dict[str, Any]]:
    listed = (await service.client.get("/v1/breakers")).json()["breakers"]
    return {breaker["scope"]: breaker for breaker in listed}


async def announcements(service: RunningService) -> list[tuple[str, str]]:
    found = await rows(
        service, "select scope, kind from breaker_transitions order by generation, announced_at"
    )
    return [(row["scope"], row["kind"]) for row in found]


def of_breakers(events: list[SseEvent]) -> list[str]:
    return [event.event for event in events if event.event in BREAKER_EVENTS]


async def test_a_node_waits_for_its_breaker_and_goes_on_by_itself(dsn: str) -> None:
    patient = settings(cb_cooldown_s=PATIENT_S)
    async with running_service(patient, dsn) as service, moody(service) as (tool, mood):
        mood.failures_max = 3
        run_id = (await service.submit(one_call()))["run_id"]
        blocked = await until(service, run_id, "NODE_BLOCKED")
        await until(service, run_id, "RUN_DONE")
        events = await service.events(run_id)
        scope = scope_of(tool)

        assert [event.event for event in events[3:]] == [
            *("NODE_START", "NODE_RETRY", "NODE_START", "NODE_RETRY"),
            *("NODE_START", "BREAKER_TRIPPED", "NODE_RETRY", "NODE_START", "NODE_BLOCKED"),
            *("NODE_START", "BREAKER_HALF_OPEN", "BREAKER_CLOSED", "NODE_DONE", "RUN_DONE"),
        ]
        data = blocked.json["data"]
        assert (data["reason"], data["scope"]) == ("breaker_open", scope)
        assert 0 < data["delay_ms"] <= PATIENT_S * 1.2 * 1_000 + 1
        told = {e.event: e.json["data"] for e in events if e.event in BREAKER_EVENTS}
        assert len({found["generation"] for found in told.values()}) == 1
        assert told["BREAKER_TRIPPED"] == {
            "scope": scope,
            "generation": told["BREAKER_TRIPPED"]["generation"],
            "cooldown_s": PATIENT_S,
            "degraded": False,
        }
        assert await announcements(service) == [
            *((scope, "tripped"), (scope, "half_open"), (scope, "closed")),
        ]
        # Three failures, a call that was not made, and the probe.
        assert [call.attempt for call in tool.calls(run_id, "A")] == [1, 2, 3, 5]
        assert (await breakers(service))[scope]["status"] == "closed"


async def test_a_refusal_uses_up_no_attempt(dsn: str) -> None:
    """Two tries, and the breaker opens at the first failure: the second try is still made."""
    async with (
        running_service(settings(cb_threshold=1, cb_cooldown_s=PATIENT_S), dsn) as service,
        moody(service, max_attempts=2) as (tool, mood),
    ):
        mood.failures_max = 1
        run_id = (await service.submit(one_call()))["run_id"]
        await until(service, run_id, "NODE_BLOCKED")
        await until(service, run_id, "RUN_DONE")
        assert len(tool.calls(run_id, "A")) == 2


async def test_failures_of_several_runs_open_one_breaker_once(dsn: str) -> None:
    async with (
        running_service(settings(cb_cooldown_s=LONG_S), dsn) as service,
        moody(service) as (tool, _),
    ):
        limits = {"deadline_s": 2}
        ended = await asyncio.gather(
            *(service.finished(one_call(constraints=limits)) for _ in range(8))
        )
        for run in ended:
            assert (run["status"], run["error"]["code"]) == ("failed", "deadline_exceeded")
            last = await until(service, run["run_id"], "RUN_FAILED")
            assert last.json["data"]["unfinished_nodes"] == ["A"]
        journals = [await service.events(run["run_id"]) for run in ended]
        assert sum(of_breakers(events).count("BREAKER_TRIPPED") for events in journals) == 1
        assert await announcements(service) == [(scope_of(tool), "tripped")]
        # The eight calls that were under way when it opened, at most, came after the threshold.
        assert 3 <= len(tool.ledger) <= 3 + 8


async def test_what_is_the_callers_fault_does_not_count(dsn: str) -> None:
    async with (
        running_service(settings(cb_threshold=1), dsn) as service,
        moody(service) as (tool, mood),
    ):
        for mood.status in (400, 401, 404, 422):
            assert (await service.finished(one_call()))["error"]["code"] == "node_failed"
        breaker = (await breakers(service))[scope_of(tool)]
        assert (breaker["status"], breaker["failures"]) == ("closed", 0)
        assert await announcements(service) == []


@pytest.mark.parametrize(
    "error",
    [refused_target(EgressRefused("target_refused", "no")), RuntimeError("a bug of ours")],
    ids=["refused here", "crashed"],
)
async def test_a_call_that_was_not_made_closes_no_breaker(
    dsn: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fail(adapter: HttpAdapter, call: Call) -> dict[str, Any]:
        raise error

    async with (
        running_service(settings(cb_threshold=1), dsn) as service,
        moody(service) as (tool, _),
    ):
        run_id = (await service.submit(one_call(constraints={"deadline_s": 20})))["run_id"]
        await until(service, run_id, "NODE_BLOCKED")
        monkeypatch.setattr(HttpAdapter, "invoke", fail)
        await until(service, run_id, "RUN_FAILED")
        assert (await breakers(service))[scope_of(tool)]["status"] == "half_open"
        assert "closed" not in [kind for _, kind in await announcements(service)]


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
async def test_a_breaker_is_closed_by_hand(
    dsn: str, redis_server: RunningRedis, shared: bool
) -> None:
    redis_url = redis_server.url if shared else None
    changes = {"cb_cooldown_s": LONG_S, "redis_budget_ms": BUSY_MACHINE_MS}
    async with (
        fresh_redis(redis_server),
        running_service(settings(redis_url=redis_url, **changes), dsn) as service,
        moody(service) as (tool, mood),
    ):
        run_id = (await service.submit(one_call()))["run_id"]
        blocked = await until(service, run_id, "NODE_BLOCKED")
        scope = scope_of(tool)
        opened = (await breakers(service))[scope]
        assert (opened["status"], opened["failures"]) == ("open", 3)
        assert opened["degraded"] is False
        assert opened["opened_at"] is not None
        assert 0 < opened["retry_after_s"] <= LONG_S

        mood.is_down = False
        url = f"/v1/breakers/{quote(scope, safe='')}/reset"
        closed = await service.client.post(url)
        assert closed.status_code == 200
        assert closed.json() == {
            **opened,
            "status": "closed",
            "failures": 0,
            "opened_at": None,
            "retry_after_s": 0.0,
        }
        assert (await service.client.post(url)).json() == closed.json(), "once is enough"
        assert await announcements(service) == [(scope, "tripped"), (scope, "closed")]
        assert (await service.finished(one_call()))["status"] == "done"
        assert blocked.json["data"]["delay_ms"] >= LONG_S / 2 * 1_000
        response = await service.client.post(f"/v1/runs/{run_id}/cancel", json={})
        assert response.status_code == 202
        await until(service, run_id, "RUN_CANCELLED")

        unknown = f"/v1/breakers/{quote('test.moody::nowhere:1', safe='')}/reset"
        problem(await service.client.post(unknown), 404, "breaker_not_found")


@asynccontextmanager
async def fresh_redis(server: RunningRedis) -> AsyncIterator[Any]:
    """A client of an empty Redis."""
    client = make_client(server.url)
    await client.flushall()
    try:
        yield client
    finally:
        await client.aclose()


async def test_a_run_that_waits_for_its_breaker_can_be_paused_and_resumed(dsn: str) -> None:
    async with running_service(settings(), dsn) as service, moody(service) as (_, mood):
        run_id = (await service.submit(one_call()))["run_id"]
        await until(service, run_id, "NODE_BLOCKED")
        base = f"/v1/runs/{run_id}"
        assert (await service.client.post(f"{base}/pause", json={})).status_code == 202
        pause = await until(service, run_id, "RUN_PAUSED")
        mood.is_down = False

        async def is_parked() -> bool:
            sql = "select owner from run_heads where run_id = $1"
            [head] = await rows(service, sql, UUID(run_id))
            return head["owner"] is None

        await eventually(is_parked, "nobody holds the run")
        assert (await service.client.post(f"{base}/resume", json={})).status_code == 202
        await until(service, run_id, "RUN_DONE", pause.seq)


# Several processes and one Redis


async def test_racing_failures_of_two_services_are_announced_once(
    dsn: str, redis_server: RunningRedis
) -> None:
    shared = settings(
        cb_threshold=5,
        cb_cooldown_s=LONG_S,
        redis_url=redis_server.url,
        redis_budget_ms=BUSY_MACHINE_MS,
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(fresh_redis(redis_server))
        services = [await stack.enter_async_context(running_service(shared, dsn)) for _ in range(2)]
        tool, _ = await stack.enter_async_context(moody(services[0]))
        await services[1].services.registry.refresh()
        submits = [service.submit(one_call()) for service in services for _ in range(25)]
        await asyncio.gather(*submits)

        async def all_wait() -> bool:
            sql = "select count(distinct run_id) from events where type = 'NODE_BLOCKED'"
            [[blocked]] = await rows(services[0], sql)
            return bool(blocked == len(submits))

        # Not until a deadline ends them: it drops what a call under way brings, maybe the trip.
        await eventually(all_wait, "all runs wait for the breaker")
        [[tripped]] = await rows(
            services[0], "select count(*) from events where type = 'BREAKER_TRIPPED'"
        )
        assert tripped == 1
        assert await announcements(services[0]) == [(scope_of(tool), "tripped")]
        assert len(tool.ledger) <= 5 + 50
        views = [(await breakers(service))[scope_of(tool)] for service in services]
        assert [view["status"] for view in views] == ["open", "open"]
        assert views[0]["generation"] == views[1]["generation"]


async def test_calls_go_on_when_redis_is_killed(dsn: str, tmp_path: Path) -> None:
    with MortalRedis(tmp_path) as redis:
        # A Redis that is killed refuses at once; one that is slow is only on a busy machine.
        patient = settings(redis_url=redis.url, redis_budget_ms=BUSY_MACHINE_MS)
        async with (
            running_service(patient, dsn) as service,
            moody(service) as (tool, mood),
        ):
            mood.is_down = False
            assert (await service.finished(one_call()))["status"] == "done"
            assert (await service.client.get("/readyz")).json()["status"] == "ok"
            redis.kill()
            assert (await service.finished(one_call()))["status"] == "done"
            ready = await service.client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
            assert ready.json()["checks"]["redis"] == {"ok": False}
            listed = (await service.client.get("/v1/breakers")).json()
            assert listed["degraded"] is True

            mood.is_down = True
            run_id = (await service.submit(one_call()))["run_id"]
            tripped = await until(service, run_id, "BREAKER_TRIPPED")
            assert tripped.json["data"]["degraded"] is True
            mood.is_down = False
            await until(service, run_id, "RUN_DONE")
            redis.start()

            async def is_ready() -> bool:
                answer = await service.client.get("/readyz")
                return bool(answer.json()["status"] == "ok")

            await eventually(is_ready, "Redis is used again")
            assert (await service.finished(one_call()))["status"] == "done"
            found = (await breakers(service))[scope_of(tool)]
            assert (found["status"], found["degraded"]) == ("closed", False)
            listed = (await service.client.get("/v1/breakers")).json()
            assert listed["degraded"] is False


async def test_a_trip_whose_run_was_taken_away_is_announced_by_the_sweep_once(
    dsn: str, redis_server: RunningRedis
) -> None:
    shared = settings(
        cb_threshold=1,
        cb_cooldown_s=LONG_S,
        redis_url=redis_server.url,
        redis_budget_ms=BUSY_MACHINE_MS,
    )
    async with (
        fresh_redis(redis_server),
        running_service(shared, dsn) as first,
        running_service(shared, dsn) as second,
        far_side() as side,
    ):
        gate = asyncio.Event()

        async def fail_at_gate(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
            await gate.wait()
            await answer_bytes(503)(writer, exchange)

        side.behave = fail_at_gate
        await register(
            first, http_capability(Tool(), "moody", "at_most_once", config={"url": side.url})
        )
        run_id = UUID((await first.submit(one_call()))["run_id"])
        await side.arrived.wait()
        # Somebody else holds the run now: what the call brings can not be recorded any more.
        await rows(
            first,
            "update run_heads set epoch = epoch + 1, owner = null, status = 'cancelled' "
            "where run_id = $1",
            run_id,
        )
        gate.set()
        scope = f"test.moody::127.0.0.1:{side.port}"

        async def is_announced() -> bool:
            return bool(await announcements(first))

        await eventually(is_announced, "the sweep has told it")
        assert await announcements(first) == [(scope, "tripped")]

        async def is_forgotten() -> bool:
            return not await second.services.breakers.unannounced()

        await eventually(is_forgotten, "nothing is left to tell")
        assert await announcements(second) == [(scope, "tripped")]
        [[events]] = await rows(first, "select count(*) from events where type = 'BREAKER_TRIPPED'")
        assert events == 0


async def test_a_cancelled_probe_is_given_back(dsn: str, redis_server: RunningRedis) -> None:
    shared = settings(
        cb_threshold=1,
        cb_cooldown_s=0.1,
        redis_url=redis_server.url,
        redis_budget_ms=BUSY_MACHINE_MS,
    )
    async with (
        fresh_redis(redis_server) as client,
        running_service(shared, dsn) as service,
        far_side() as side,
    ):
        failed_once = asyncio.Event()

        async def fail_then_hold(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
            if failed_once.is_set():
                await exchange.reader.read()  # until the caller hangs up
                raise ConnectionError
            failed_once.set()
            await answer_bytes(503)(writer, exchange)

        side.behave = fail_then_hold
        await register(
            service,
            http_capability(Tool(), "moody", "idempotent", timeout_s=600, config={"url": side.url}),
        )
        run_id = (await service.submit(one_call()))["run_id"]
        await eventually(lambda: len(side.exchanges) == 2, "the probe is under way")
        scope = f"test.moody::127.0.0.1:{side.port}"
        assert (await breakers(service))[scope]["status"] == "half_open"
        times = await client.hmget(f"flexrun:cb:{{{scope}}}", "probe_at", "probe_until")
        assert int(times[1]) - int(times[0]) > 600_000, "trusted as long as its call may take"
        response = await service.client.post(f"/v1/runs/{run_id}/cancel", json={})
        assert response.status_code == 202
        await until(service, run_id, "RUN_CANCELLED")

        shared_breakers = service.services.breakers

        async def is_free() -> bool:
            return isinstance(await shared_breakers.allow(scope, "test:1", 60.0), Permit)

        await eventually(is_free, "another probe may start")
        [view] = await shared_breakers.views()
        assert view.status is BreakerStatus.HALF_OPEN

        async def half_open_is_told() -> bool:
            return (scope, TransitionKind.HALF_OPEN.value) in await announcements(service)

        await eventually(half_open_is_told, "the sweep tells what the cancelled call could not")
