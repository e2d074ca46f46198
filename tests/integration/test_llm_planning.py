"""Runs that a model plans: the three handshakes, and everything that can come between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import fresh_database
from tests.far_side import answer
from tests.farm import (
    GOOD,
    INVENTED,
    VERDICT,
    advise,
    drill,
    envelope,
    settle,
)
from tests.model_server import ModelServer, running_model_server
from tests.model_service import service_with
from tests.service import RunningService
from tests.shared_service import audit, until
from tests.tools import running_tool

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def farm(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[RunningService, ModelServer]]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        async with (
            fresh_database(postgres_dsn) as dsn,
            running_model_server() as models,
            running_tool(drill=drill, advise=advise) as tool,
        ):
            async with service_with(models, dsn, folder, patch, llm_cache_days=0) as service:
                await settle(service, tool)
                yield service, models
            await audit(dsn)


@pytest_asyncio.fixture(loop_scope="module")
async def service(farm: tuple[RunningService, ModelServer]) -> RunningService:
    return farm[0]


@pytest_asyncio.fixture(loop_scope="module")
async def models(farm: tuple[RunningService, ModelServer]) -> ModelServer:
    farm[1].requests.clear()
    return farm[1]


async def planned(service: RunningService, body: dict[str, Any]) -> tuple[list[str], Any, Any]:
    """The types of a run's events, its first plan, and its output."""
    run = await service.submit(body)
    events = await service.events(run["run_id"])
    plan = (await service.client.get(f"/v1/runs/{run['run_id']}/plans/1")).json()
    return [event.event for event in events], plan, events[-1].json["data"].get("output")


async def test_a_draft_is_accepted_and_run_in_a_domain_that_was_registered_at_run_time(
    service: RunningService, models: ModelServer
) -> None:
    models.say(GOOD)
    types, plan, output = await planned(service, envelope())
    assert types[:7] == [
        *("RUN_QUEUED", "RUN_START", "PLAN_REQUESTED", "MODEL_SELECTED"),
        *("LLM_REQUEST", "LLM_RESPONSE", "PLAN_GENERATED"),
    ]
    assert types[-1] == "RUN_DONE"
    assert (plan["author"], plan["metadata"]["rationale"]) == ("llm", "one after the other")
    assert [step["fit"] for step in plan["metadata"]["proof"]] == ["same_facet"] * 3
    assert output == {VERDICT: "oats on loam of Dithmarschen"}
    assert len(models.requests) == 1


async def test_a_rejected_draft_is_mended(service: RunningService, models: ModelServer) -> None:
    models.say(INVENTED, GOOD)
    types, plan, _ = await planned(service, envelope())
    handshake = [found for found in types if found.startswith("PLAN_")]
    assert handshake == [*("PLAN_REQUESTED", "PLAN_REJECTED", "PLAN_REQUESTED", "PLAN_GENERATED")]
    assert plan["author"] == "llm"
    _, second = models.requests
    assert "CAPABILITY_NOT_REGISTERED" in second.json["messages"][1]["content"]


async def test_without_an_answer_the_assembler_plans(
    service: RunningService, models: ModelServer
) -> None:
    models.behave(answer(401))
    types, plan, output = await planned(service, envelope())
    assert (types[-1], plan["author"]) == ("RUN_DONE", "assembler")
    assert output == {VERDICT: "oats on loam of Dithmarschen"}


async def test_the_assembler_is_the_default_and_a_goal_graph_needs_no_planner(
    service: RunningService, models: ModelServer
) -> None:
    _, plan, _ = await planned(service, envelope(policies={}))
    assert plan["author"] == "assembler"
    nodes: list[dict[str, Any]] = [
        {"id": "a", "capability": "agronomy.drill"},
        {"id": "b", "capability": "agronomy.advise", "requires": ["a"]},
    ]
    _, plan, _ = await planned(service, envelope(goal_graph={"nodes": nodes}))
    assert plan["author"] == "caller"
    assert models.requests == []


async def test_the_budget_counts_planning(service: RunningService, models: ModelServer) -> None:
    body = envelope(constraints={"budget": {"calls": 0}})
    types, plan, _ = await planned(service, body)
    assert (types[-1], plan["author"]) == ("RUN_DONE", "assembler")
    assert "BUDGET_EXHAUSTED" in types
    assert models.requests == []


async def test_a_run_is_cancelled_while_it_is_planned(
    service: RunningService, models: ModelServer
) -> None:
    gate = asyncio.Event()

    async def wait(writer: asyncio.StreamWriter, exchange: Any) -> None:
        await gate.wait()

    models.behave(wait)
    run = await service.submit(envelope())
    async with asyncio.timeout(20):
        await until(service, run["run_id"], "LLM_REQUEST")
        await models.reached(1)
        response = await service.client.post(f"/v1/runs/{run['run_id']}/cancel", json={})
        assert response.status_code == 202
        events = await service.events(run["run_id"])
    gate.set()
    assert events[-1].event == "RUN_CANCELLED"
    assert "PLAN_GENERATED" not in [event.event for event in events]


async def test_a_run_that_is_paused_while_it_is_planned_has_its_plan_when_it_goes_on(
    service: RunningService, models: ModelServer
) -> None:
    gate = asyncio.Event()

    async def wait_and_speak(writer: asyncio.StreamWriter, exchange: Any) -> None:
        await gate.wait()
        await models.speak(writer, exchange)

    models.say(GOOD)
    models.behave(wait_and_speak)
    run = await service.submit(envelope())
    async with asyncio.timeout(20):
        await until(service, run["run_id"], "LLM_REQUEST")
        await models.reached(1)
        await service.client.post(f"/v1/runs/{run['run_id']}/pause", json={})
        await until(service, run["run_id"], "RUN_PAUSED")
        gate.set()
        await until(service, run["run_id"], "PLAN_GENERATED")
        response = await service.client.post(f"/v1/runs/{run['run_id']}/resume", json={})
        assert response.status_code == 202, response.text
        events = await service.events(run["run_id"])
    types = [event.event for event in events]
    assert types.index("RUN_PAUSED") < types.index("PLAN_GENERATED") < types.index("NODE_START")
    assert types[-1] == "RUN_DONE"
    assert len(models.requests) == 1


async def test_who_takes_a_run_over_in_the_middle_of_planning_plans_it_anew(
    models: ModelServer, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_tool(drill=drill, advise=advise) as tool:
        gate = asyncio.Event()

        async def wait(writer: asyncio.StreamWriter, exchange: Any) -> None:
            await gate.wait()

        models.say(GOOD)
        models.behave(wait)
        quick = {"drain_grace_s": 0.0, "llm_cache_days": 0}
        async with service_with(models, dsn, tmp_path, monkeypatch, **quick) as first:
            await settle(first, tool)
            run = await first.submit(envelope())
            await until(first, run["run_id"], "LLM_REQUEST")
            await models.reached(1)
        async with service_with(models, dsn, tmp_path, monkeypatch, **quick) as second:
            events = await second.events(run["run_id"])
        gate.set()
    types = [event.event for event in events]
    assert types.count("PLAN_REQUESTED") == 2
    assert types.count("PLAN_GENERATED") == 1
    assert types[-1] == "RUN_DONE"
    await audit(dsn)
