"""Plans that are made anew while their run is under way: by policies, operators, goal by goal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
import pytest_asyncio

from app.domain.decide import Decision, decide
from tests.conftest import fresh_database, make_settings
from tests.farm import (
    GOOD,
    INVENTED,
    SOIL,
    VERDICT,
    advise,
    capability,
    drafted,
    drill,
    envelope,
    facet,
    neighbour,
    refuse,
    register,
    settle,
)
from tests.model_server import ModelServer, running_model_server
from tests.model_service import service_with
from tests.service import RunningService, running_service
from tests.shared_service import audit, until
from tests.sse import SseEvent
from tests.tools import Tool, respond, running_tool

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASKED = ["MODEL_SELECTED", "LLM_REQUEST", "LLM_RESPONSE"]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def farm(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[RunningService, ModelServer, Tool]]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        async with (
            fresh_database(postgres_dsn) as dsn,
            running_model_server() as models,
            running_tool(drill=drill, advise=advise, neighbour=neighbour) as tool,
        ):
            async with service_with(models, dsn, folder, patch, llm_cache_days=0) as service:
                await settle(service, tool)
                yield service, models, tool
            await audit(dsn)


@pytest_asyncio.fixture(loop_scope="module")
async def service(farm: tuple[RunningService, ModelServer, Tool]) -> RunningService:
    return farm[0]


@pytest_asyncio.fixture(loop_scope="module")
async def models(farm: tuple[RunningService, ModelServer, Tool]) -> ModelServer:
    farm[1].requests.clear()
    return farm[1]


@pytest_asyncio.fixture(loop_scope="module")
async def tool(farm: tuple[RunningService, ModelServer, Tool]) -> AsyncIterator[Tool]:
    before = dict(farm[2].behaviours)
    farm[2].ledger.clear()
    yield farm[2]
    farm[2].behaviours = before


def policy(kind: str = "on_node_complete", **selector: str) -> dict[str, Any]:
    """Replan once when a node ends."""
    return {
        "id": "second-thoughts",
        "trigger": {"kind": kind, "selector": selector},
        "action": {"kind": "replan", "rationale": "look at the core first"},
    }


def asks_for(*runtime: dict[str, Any], strategy: str = "llm", **more: Any) -> dict[str, Any]:
    policies = {"planner": {"strategy": strategy}, "runtime": list(runtime)}
    return envelope(policies=policies, **more)


def types_of(events: list[SseEvent]) -> list[str]:
    return [event.event or "" for event in events]


def data_of(events: list[SseEvent], event_type: str) -> list[dict[str, Any]]:
    return [event.json["data"] for event in events if event.event == event_type]


async def run_of(
    service: RunningService, body: dict[str, Any]
) -> tuple[dict[str, Any], list[SseEvent]]:
    """A finished run and its events."""
    run = await service.submit(body)
    async with asyncio.timeout(30):
        events = await service.events(run["run_id"])
    found: dict[str, Any] = (await service.client.get(f"/v1/runs/{run['run_id']}")).json()
    return found, events


def waits_at(gate: asyncio.Event, models: ModelServer) -> Any:
    async def wait_and_speak(writer: asyncio.StreamWriter, exchange: Any) -> None:
        await gate.wait()
        await models.speak(writer, exchange)

    return wait_and_speak


def user_prompt(models: ModelServer, index: int) -> str:
    found: str = models.requests[index].json["messages"][1]["content"]
    return found


# A policy asks for it


async def test_a_policy_replans_in_the_middle_of_a_run(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    models.say(GOOD, drafted("agronomy.neighbour"))
    run, events = await run_of(service, asks_for(policy(capability_id="agronomy.drill")))
    assert types_of(events) == [
        *("RUN_QUEUED", "RUN_START", "PLAN_REQUESTED", *ASKED, "PLAN_GENERATED"),
        *("NODE_START", "NODE_DONE", "POLICY_TRIGGERED", "PLAN_REQUESTED", *ASKED),
        *("PLAN_GENERATED", "PLAN_UPDATED", "NODE_START", "NODE_DONE", "RUN_DONE"),
    ]
    assert run["output"] == {VERDICT: "peas on loam of Dithmarschen"}
    assert run["plan_version"] == 2
    assert data_of(events, "PLAN_UPDATED") == [
        {
            "previous_version": 1,
            "version": 2,
            "cause": "policy",
            "kept": ["step_0"],
            "added": ["step_0_2"],
            "removed": ["step_1"],
            "policy_id": "second-thoughts",
        }
    ]
    assert [entry.path for entry in tool.ledger] == ["/drill", "/neighbour"]
    told = user_prompt(models, 1)
    assert "Why the plan is made anew:\nlook at the core first" in told
    assert '- step_0 (agronomy.drill): {"drill_core":"loam of Dithmarschen"}' in told
    assert "Ready nodes: step_1" in told
    url = f"/v1/runs/{run['run_id']}/plans"
    plans = [(await service.client.get(f"{url}/{version}")).json() for version in (1, 2)]
    assert [plan["author"] for plan in plans] == ["llm", "replan"]
    assert plans[1]["nodes"][0] == plans[0]["nodes"][0]
    diff = (await service.client.get(f"{url}/diff?from=1&to=2")).json()
    assert [node["id"] for node in diff["removed"]] == ["step_1"]


async def test_nothing_starts_while_the_plan_is_made_anew(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    gate = asyncio.Event()
    stages = [
        {"stage": "drill", "capability": "agronomy.drill"},
        {"stage": "again", "capability": "agronomy.drill"},
        {"stage": "advise", "capability": "agronomy.advise", "requires": ["drill", "again"]},
    ]
    models.say(orjson.dumps({"stages": stages}).decode(), drafted("agronomy.advise"))
    models.behave(models.speak, waits_at(gate, models))
    body = asks_for(policy(node_id="drill"), constraints={"max_parallel": 1})
    run = await service.submit(body)
    async with asyncio.timeout(30):
        await models.reached(2)
        assert [entry.node_id for entry in tool.ledger] == ["drill"]
        gate.set()
        events = await service.events(run["run_id"])
    assert [e.json["node_id"] for e in events if e.event == "NODE_START"] == ["drill", "step_0"]
    assert "Ready nodes: again" in user_prompt(models, 1)
    assert events[-1].event == "RUN_DONE"


async def test_a_run_is_shown_as_of_one_moment_while_its_plan_changes(
    service: RunningService, models: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row and plans are read before its events: a plan that came in between is not known."""
    gate = asyncio.Event()
    models.say(GOOD, drafted("agronomy.neighbour"))
    models.behave(models.speak, waits_at(gate, models))
    run = await service.submit(asks_for(policy(capability_id="agronomy.drill")))
    reader = service.services.reader
    read = reader.run

    async def and_then_it_ends(tenant_id: str, run_id: UUID) -> Any:
        row = await read(tenant_id, run_id)
        gate.set()
        await until(service, run["run_id"], "RUN_DONE")
        return row

    async with asyncio.timeout(30):
        await models.reached(2)
        with monkeypatch.context() as patch:
            patch.setattr(reader, "run", and_then_it_ends)
            shown = await service.client.get(f"/v1/runs/{run['run_id']}")
        ended = await service.client.get(f"/v1/runs/{run['run_id']}")
    assert shown.status_code == 200, shown.text
    assert (shown.json()["status"], shown.json()["plan_version"]) == ("running", 1)
    assert (ended.json()["status"], ended.json()["plan_version"]) == ("done", 2)


async def test_a_run_that_is_planned_anew_does_not_ask_for_slots_again_and_again(
    service: RunningService, models: ModelServer, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node is ready, its slot is free, and nothing may start: there is nothing to wake up for."""
    turns = 0

    def counted(*arguments: Any) -> Decision:
        nonlocal turns
        turns += 1
        assert turns < 100, "the loop spins"
        return decide(*arguments)

    monkeypatch.setattr("app.orchestrator.loop.decide", counted)
    await register(service, {**capability(tool, "rare", SOIL, VERDICT, tier=9), "concurrency": 1})
    tool.behaviours["/rare"] = advise
    gate = asyncio.Event()
    models.say(drafted("agronomy.drill", "agronomy.rare"), drafted("agronomy.rare"))
    models.behave(models.speak, waits_at(gate, models))
    run = await service.submit(asks_for(policy(capability_id="agronomy.drill")))
    async with asyncio.timeout(30):
        await models.reached(2)
        await until(service, run["run_id"], "LLM_REQUEST", after=8)
        gate.set()
        events = await service.events(run["run_id"])
    assert events[-1].event == "RUN_DONE", events[-1]
    assert turns < 100


async def test_what_failed_is_planned_around_without_a_model(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    tool.behaviours["/advise"] = refuse
    body = asks_for(policy("on_node_failed"), strategy="assembler")
    run, events = await run_of(service, body)
    assert types_of(events)[-8:] == [
        *("NODE_FAILED", "POLICY_TRIGGERED", "PLAN_REQUESTED", "PLAN_GENERATED"),
        *("PLAN_UPDATED", "NODE_START", "NODE_DONE", "RUN_DONE"),
    ]
    assert [entry.path for entry in tool.ledger] == ["/drill", "/advise", "/neighbour"]
    assert {node["node_id"]: node["status"] for node in run["nodes"]} == {
        "drill": "done",
        "neighbour": "done",
    }
    assert models.requests == []


async def test_a_node_that_is_ordered_anew_is_called_under_a_new_key(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    async def fail_once(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        failed_before = len(tool.calls(body["run_id"], "advise")) > 1
        await (advise if failed_before else refuse)(tool, body, writer)

    tool.behaviours["/advise"] = fail_once
    forbidden = {"forbid": ["agronomy.neighbour", "agronomy.rare"]}
    body = asks_for(policy("on_node_failed", node_id="advise"), strategy="assembler")
    body["policies"]["planner"]["selection"] = forbidden
    run, _ = await run_of(service, body)
    assert run["status"] == "done"
    first, second = tool.calls(run["run_id"], "advise")
    assert (first.attempt, second.attempt) == (1, 2)
    assert (first.key[-2:], second.key[-2:]) == (":1", ":2")


async def test_a_policy_replans_no_more_often_than_it_may(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    tool.behaviours["/advise"] = tool.behaviours["/neighbour"] = refuse
    run, events = await run_of(service, asks_for(policy("on_node_failed"), strategy="assembler"))
    assert (run["status"], run["error"]["code"]) == ("failed", "node_failed")
    assert types_of(events).count("POLICY_TRIGGERED") == 1


async def test_a_plan_stays_in_force_when_there_is_no_other(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    nodes: list[dict[str, Any]] = [
        {"id": "a", "capability": "agronomy.drill"},
        {"id": "b", "capability": "agronomy.advise", "requires": ["a"]},
    ]
    body = asks_for(
        policy(node_id="a"),
        strategy="assembler",
        goal_graph={"nodes": nodes},
        output_contract={"mode": "freeform", "instructions": "What to plant."},
    )
    run, events = await run_of(service, body)
    (refused,) = data_of(events, "PLAN_REJECTED")
    assert (refused["phase"], refused["final"]) == ("replan", True)
    assert (run["status"], run["plan_version"]) == ("done", 1)


async def test_who_takes_a_run_over_in_the_middle_of_replanning_goes_on_with_it(
    models: ModelServer, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_tool(drill=drill, advise=advise, neighbour=neighbour) as tool:
        gate = asyncio.Event()
        models.say(GOOD, drafted("agronomy.neighbour"))
        models.behave(models.speak, waits_at(gate, models))
        quick = {"drain_grace_s": 0.0, "llm_cache_days": 0}
        async with service_with(models, dsn, tmp_path, monkeypatch, **quick) as first:
            await settle(first, tool)
            run = await first.submit(asks_for(policy(capability_id="agronomy.drill")))
            await models.reached(2)
            await until(first, run["run_id"], "POLICY_TRIGGERED")
        async with service_with(models, dsn, tmp_path, monkeypatch, **quick) as second:
            async with asyncio.timeout(30):
                events = await second.events(run["run_id"])
        gate.set()
    types = types_of(events)
    assert types.count("POLICY_TRIGGERED") == types.count("PLAN_UPDATED") == 1
    assert types[-1] == "RUN_DONE"
    assert [entry.path for entry in tool.ledger] == ["/drill", "/neighbour"]
    await audit(dsn)


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({"trigger": {"kind": "on_full_moon"}}, "/policies/runtime/0/trigger/kind"),
        ({"action": {"kind": "goto"}}, "/policies/runtime/0/action/kind"),
        ({"when": "always"}, "/policies/runtime/0/when"),
        ({"id": ""}, "/policies/runtime/0/id"),
    ],
)
async def test_a_policy_that_nobody_knows_is_refused(
    service: RunningService, wrong: dict[str, Any], pointer: str
) -> None:
    response = await service.client.post("/v1/runs", json=asks_for({**policy(), **wrong}))
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


async def test_two_policies_of_one_name_are_refused(service: RunningService) -> None:
    response = await service.client.post("/v1/runs", json=asks_for(policy(), policy()))
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == ["/policies/runtime"]


# A person is the last resort


async def no_plan(service: RunningService, models: ModelServer) -> dict[str, Any]:
    """A run that nobody has a plan for, when it asks."""
    models.say(INVENTED)
    run = await service.submit(asks_for(inputs={"site_of_nothing": "x"}))
    async with asyncio.timeout(30):
        asked = await until(service, run["run_id"], "RUN_PAUSED")
    assert asked.json["data"] == {
        "status": "awaiting_human",
        "reason": "awaiting_answer",
        "nodes": ["fallback"],
    }
    return run


async def resumed(service: RunningService, run: dict[str, Any], decision: dict[str, Any]) -> Any:
    url = f"/v1/runs/{run['run_id']}/resume"
    return await service.client.post(url, json={"nodes": {"fallback": decision}})


async def test_when_nobody_has_a_plan_a_person_is_asked_for_the_output(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    run = await no_plan(service, models)
    found = (await service.client.get(f"/v1/runs/{run['run_id']}")).json()
    assert [(n["node_id"], n["status"], n["reason"]) for n in found["nodes"]] == [
        ("fallback", "blocked", "awaiting_answer")
    ]
    wrong = await resumed(service, run, {"decision": "done", "output": {VERDICT: 7}})
    assert wrong.status_code == 422
    assert wrong.json()["errors"][0]["pointer"] == f"/nodes/fallback/output/{VERDICT}"
    right = await resumed(service, run, {"decision": "done", "output": {VERDICT: "nothing"}})
    assert right.status_code == 202, right.text
    events = await service.events(run["run_id"])
    assert events[-1].json["data"]["output"] == {VERDICT: "nothing"}
    assert [data.get("final") for data in data_of(events, "PLAN_REJECTED")] == [None, None, True]
    (asked,) = data_of(events, "NODE_BLOCKED")
    assert asked["operator_prompt"].startswith("No plan was found for: Find out what to plant\n")
    assert "CAPABILITY_MISSING" in asked["operator_prompt"]


async def test_an_operator_has_it_planned_again_once_what_was_missing_is_there(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    run = await no_plan(service, models)
    response = await resumed(service, run, {"decision": "retry"})
    assert response.status_code == 202, response.text
    async with asyncio.timeout(30):
        first = await until(service, run["run_id"], "RUN_RESUMED")
        again = await until(service, run["run_id"], "RUN_PAUSED", after=int(first.id or 0))
    assert again.json["data"]["nodes"] == ["fallback"]
    await service.client.post("/v1/facets", json=facet("site_of_nothing"))
    await register(service, capability(tool, "dream", "site_of_nothing", VERDICT))
    tool.behaviours["/dream"] = _dream
    models.say(drafted("agronomy.dream"))
    response = await resumed(service, run, {"decision": "retry"})
    async with asyncio.timeout(30):
        events = await service.events(run["run_id"])
    assert events[-1].json["data"]["output"] == {VERDICT: "clover"}
    (updated,) = data_of(events, "PLAN_UPDATED")
    assert (updated["cause"], updated["removed"]) == ("operator", ["fallback"])


async def _dream(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    respond(writer, 200, {VERDICT: "clover"})


async def test_an_operator_may_fail_it(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    models.say(INVENTED)
    run = await service.submit(asks_for(inputs={"site_of_nobody": "x"}))
    await until(service, run["run_id"], "RUN_PAUSED")
    await resumed(service, run, {"decision": "fail"})
    events = await service.events(run["run_id"])
    assert events[-1].event == "RUN_FAILED"
    assert events[-1].json["data"]["failed_nodes"] == ["fallback"]


# Goal by goal

DIAMOND: list[dict[str, Any]] = [
    {"id": "A", "text": "get a core"},
    {"id": "B", "text": "ask the adviser", "requires": ["A"]},
    {"id": "C", "text": "ask the neighbour", "requires": ["A"]},
    {"id": "D", "text": "hear the adviser once more", "requires": ["B", "C"]},
]


def chosen(node: str, name: str) -> str:
    return orjson.dumps({"node": node, "capability": f"agronomy.{name}"}).decode()


async def test_goals_without_capabilities_are_planned_one_at_a_time_from_the_ready_set(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    models.say(
        *(chosen("A", "drill"), chosen("C", "neighbour"), chosen("B", "advise")),
        chosen("D", "advise"),
    )
    # A deadline far off must not park the run while a model has to choose.
    body = envelope(policies={}, goal_graph={"nodes": DIAMOND}, constraints={"deadline_s": 3_600})
    run, events = await run_of(service, body)
    assert run["status"] == "done", run
    starts = [event.json["node_id"] for event in events if event.event == "NODE_START"]
    assert starts == ["A", "C", "B", "D"]
    lines = [
        line
        for index in range(4)
        for line in user_prompt(models, index).splitlines()
        if line.startswith("Ready nodes:")
    ]
    assert lines == [f"Ready nodes: {ready}" for ready in ("A", "B, C", "B", "D")]
    opened = [data.get("open_goals") for data in data_of(events, "PLAN_GENERATED")]
    assert opened == [["B", "C", "D"], ["B", "D"], ["D"], None]
    assert {data["cause"] for data in data_of(events, "PLAN_UPDATED")} == {"next_goal"}
    assert run["output"] == {VERDICT: "oats on loam of Dithmarschen"}
    plan = (await service.client.get(f"/v1/runs/{run['run_id']}/plans/4")).json()
    assert [node["requires"] for node in plan["nodes"] if node["id"] == "D"] == [["B", "C"]]


async def test_a_goal_that_names_its_capability_needs_no_model(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    models.say(chosen("B", "advise"))
    nodes = [{**DIAMOND[0], "capability": "agronomy.drill"}, DIAMOND[1]]
    run, _ = await run_of(service, envelope(policies={}, goal_graph={"nodes": nodes}))
    assert run["status"] == "done", run
    assert len(models.requests) == 1


async def test_a_choice_outside_of_the_ready_set_is_sent_back(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    models.say(chosen("B", "advise"), chosen("A", "drill"), chosen("B", "advise"))
    run, _ = await run_of(service, envelope(policies={}, goal_graph={"nodes": DIAMOND[:2]}))
    assert run["status"] == "done", run


async def test_goals_that_no_model_can_place_end_at_a_person_and_keep_what_is_done(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    models.say(chosen("A", "drill"), chosen("B", "pray"))
    run = await service.submit(envelope(policies={}, goal_graph={"nodes": DIAMOND[:2]}))
    async with asyncio.timeout(30):
        await until(service, run["run_id"], "RUN_PAUSED")
    found = (await service.client.get(f"/v1/runs/{run['run_id']}")).json()
    assert {node["node_id"]: node["status"] for node in found["nodes"]} == {
        "A": "done",
        "fallback": "blocked",
    }
    models.say(chosen("B", "neighbour"))
    response = await resumed(service, run, {"decision": "retry"})
    assert response.status_code == 202, response.text
    async with asyncio.timeout(30):
        events = await service.events(run["run_id"])
    assert events[-1].json["data"]["output"] == {VERDICT: "peas on loam of Dithmarschen"}
    assert [entry.path for entry in tool.ledger] == ["/drill", "/neighbour"]


async def test_a_goal_graph_that_can_never_be_done_is_refused(service: RunningService) -> None:
    nodes = [{"id": "A", "requires": ["B"]}, {"id": "B", "requires": ["A"]}, {"id": "C"}]
    response = await service.client.post(
        "/v1/runs", json=envelope(policies={}, goal_graph={"nodes": nodes})
    )
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert (error["code"], error["pointer"]) == ("CYCLE", "/goal_graph/nodes/0")


async def test_where_no_model_is_configured_goals_have_to_name_their_capabilities(
    dsn: str,
) -> None:
    body = envelope(
        policies={},
        goal_graph={"nodes": DIAMOND},
        output_contract={"mode": "freeform", "instructions": "What to plant."},
    )
    async with running_service(make_settings(), dsn) as plain:
        response = await plain.client.post("/v1/runs", json=body)
    assert response.status_code == 422
    assert {error["code"] for error in response.json()["errors"]} == {"CAPABILITY_MISSING"}
