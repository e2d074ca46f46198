"""Runs whose nodes are answered by a model: a real service, a real server that speaks the wire."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import make_settings
from tests.envelopes import graph
from tests.far_side import answer
from tests.model_server import ModelServer
from tests.model_service import KEY, service_with, shared_models
from tests.service import RunningService, running_service
from tests.shared_service import audit, until

STRING = {"type": "string"}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[RunningService, ModelServer]]:
    """One service and its models for the tests that need nothing special."""
    folder = tmp_path_factory.mktemp("models")
    async with shared_models(postgres_dsn, folder, judge(), llm_cache_days=0) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: tuple[RunningService, ModelServer]) -> RunningService:
    return shared[0]


@pytest_asyncio.fixture(loop_scope="module")
async def models(shared: tuple[RunningService, ModelServer]) -> ModelServer:
    """The models of the shared service, without memory of earlier tests."""
    models = shared[1]
    models.requests.clear()
    return models


def judge(**changes: Any) -> dict[str, Any]:
    def side(key: str) -> dict[str, Any]:
        return {"schema": {"type": "object", "properties": {key: STRING}, "required": [key]}}

    return {
        "capability_id": "soil.judge",
        "version": "1.0.0",
        "display_name": "a judge of soils",
        "summary": "Says what grows where.",
        "kind": "llm",
        "effect": "pure",
        "input_contract": side("soil"),
        "output_contract": side("verdict"),
        **changes,
    }


def ask(*nodes: str, **constraints: Any) -> dict[str, Any]:
    """A chain of nodes that ask a model, each about another soil."""
    found = []
    for before, node_id in zip((None, *nodes), nodes, strict=False):
        found.append(
            {
                "id": node_id,
                "capability": "soil.judge",
                "requires": [] if before is None else [before],
                "inputs": {"soil": {"value": f"loam {node_id} of canary island"}},
            }
        )
    return graph(*found, constraints=constraints)


async def test_a_node_is_one_prompt_and_all_of_it_is_in_the_journal(
    service: RunningService, models: ModelServer
) -> None:
    models.say('{"verdict": "oats"}')
    run = await service.submit(ask("A"))
    events = await service.events(run["run_id"])
    assert [event.event for event in events][3:] == [
        *("NODE_START", "MODEL_SELECTED", "LLM_REQUEST", "LLM_RESPONSE", "NODE_DONE", "RUN_DONE")
    ]
    assert {event.json["node_id"] for event in events[3:-1]} == {"A"}
    assert events[-2].json["data"]["output"] == {"verdict": "oats"}
    assert events[-3].json["data"]["cost_usd"] == "0.000022"  # 12 tokens in, 5 out
    [request] = models.requests
    assert request.json["model"] == "small"
    assert "loam A of canary island" in request.json["messages"][1]["content"]


async def test_what_a_call_does_is_streamed_while_it_is_under_way(
    service: RunningService, models: ModelServer
) -> None:
    gate = asyncio.Event()

    async def wait_and_speak(writer: asyncio.StreamWriter, exchange: Any) -> None:
        await gate.wait()
        await models.speak(writer, exchange)

    models.say('{"verdict": "oats"}')
    models.behave(wait_and_speak)
    run = await service.submit(ask("A"))
    async with asyncio.timeout(20):
        await until(service, run["run_id"], "LLM_REQUEST")
        gate.set()
        await until(service, run["run_id"], "RUN_DONE")


async def test_the_same_envelope_again_makes_no_call(
    models: ModelServer, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.say('{"verdict": "oats"}')
    types: list[str] = []
    for _ in range(2):  # another process, for what one has in memory
        async with service_with(models, dsn, tmp_path, monkeypatch, judge()) as service:
            run = await service.submit(ask("A", "B"))
            types = [event.event for event in await service.events(run["run_id"])]
            assert types[-1] == "RUN_DONE"
            assert len(models.requests) == 2
    assert types.count("CACHE_HIT") == 2
    assert {"CACHE_MISS", "LLM_REQUEST", "LLM_RESPONSE"}.isdisjoint(types)
    await audit(dsn)


async def test_a_bad_answer_is_repaired_and_both_calls_are_told(
    service: RunningService, models: ModelServer
) -> None:
    models.say('{"verdict": 7}', '{"verdict": "oats"}')
    run = await service.submit(ask("A"))
    events = await service.events(run["run_id"])
    outcomes = [e.json["data"]["outcome"] for e in events if e.event == "LLM_RESPONSE"]
    assert outcomes == ["schema_validation_failed", "ok"]
    assert events[-1].event == "RUN_DONE"


async def test_a_budget_stops_a_run_before_the_call_that_does_not_fit(
    service: RunningService, models: ModelServer
) -> None:
    models.say('{"verdict": "oats"}')
    run = await service.submit(ask("A", "B", "C", budget={"calls": 2}))
    events = await service.events(run["run_id"])
    assert len(models.requests) == 2
    [exhausted] = [event for event in events if event.event == "BUDGET_EXHAUSTED"]
    assert exhausted.json["data"] == {"resource": "calls", "limit": "2", "spent": "2"}
    [failed] = [event for event in events if event.event == "NODE_FAILED"]
    assert (failed.json["node_id"], failed.json["data"]["error"]["code"]) == (
        "C",
        "budget_exhausted",
    )
    assert events[-1].event == "RUN_FAILED"


async def test_what_was_spent_is_known_to_the_process_that_goes_on(
    models: ModelServer, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.say('{"verdict": "oats"}')
    gate = asyncio.Event()

    async def wait(writer: asyncio.StreamWriter, exchange: Any) -> None:
        await gate.wait()

    models.behave(models.speak, wait)
    quick = {"drain_grace_s": 0.0}
    async with service_with(models, dsn, tmp_path, monkeypatch, judge(), **quick) as first:
        run = await first.submit(ask("A", "B", "C", budget={"calls": 2}))
        await models.reached(2)  # A is answered, B is under way
    async with service_with(models, dsn, tmp_path, monkeypatch, judge()) as second:
        events = await second.events(run["run_id"])
    gate.set()
    # B's call that was cut off is not known to have cost anything; B's second one is the last.
    assert len(models.requests) == 3
    assert [e.json["node_id"] for e in events if e.event == "NODE_DONE"] == ["A", "B"]
    assert [e.json["data"]["spent"] for e in events if e.event == "BUDGET_EXHAUSTED"] == ["2"]
    await audit(dsn)


async def test_a_node_waits_for_the_breaker_of_the_provider_and_goes_on_by_itself(
    models: ModelServer, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.say('{"verdict": "oats"}')
    models.behave(answer(500), answer(500))
    changes = {"cb_threshold": 2, "cb_cooldown_s": 2.0}  # still open when it is asked next
    async with service_with(models, dsn, tmp_path, monkeypatch, judge(), **changes) as service:
        run = await service.submit(ask("A"))
        events = await service.events(run["run_id"])
        types = [event.event for event in events]
        [tripped] = [event for event in events if event.event == "BREAKER_TRIPPED"]
        assert tripped.json["data"]["scope"] == "llm::near"
        [blocked] = [event for event in events if event.event == "NODE_BLOCKED"]
        assert blocked.json["data"]["reason"] == "breaker_open"
        assert types.count("BREAKER_CLOSED") == 1
        assert types[-1] == "RUN_DONE"
        assert len(models.requests) == 3
    await audit(dsn)


async def test_without_a_model_the_kind_is_there_and_says_what_is_missing(
    dsn: str, models: ModelServer
) -> None:
    async with running_service(make_settings(), dsn) as service:
        response = await service.client.post("/v1/capabilities", json=judge())
        assert response.status_code == 201
        run = await service.submit(ask("A"))
        [*_, failed, last] = await service.events(run["run_id"])
        assert failed.json["data"]["error"]["code"] == "no_compatible_model"
        assert last.event == "RUN_FAILED"
    await audit(dsn)


async def test_a_prompt_that_forgets_an_output_is_refused_and_a_made_one_is_shown(
    service: RunningService,
) -> None:
    forgetful = judge(version="2.0.0", system_prompt="Look at the soil.")
    response = await service.client.post("/v1/capabilities", json=forgetful)
    assert (response.status_code, response.json()["code"]) == (422, "registration_invalid")
    [error] = response.json()["errors"]
    assert (error["pointer"], "verdict" in error["message"]) == ("/system_prompt", True)

    shown = (await service.client.get("/v1/capabilities/soil.judge")).json()["system_prompt"]
    assert shown.startswith("You are a judge of soils.")
    assert '"required":["verdict"]' in shown


async def test_keys_and_prompts_are_in_no_log_line_and_no_event_of_a_call(
    service: RunningService, models: ModelServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    models.say("answer canary that is no JSON")
    echo = f'{{"error": {{"message": "{KEY} loam A of canary island"}}}}'.encode()
    models.behave(models.speak, answer(400, echo))
    run = await service.submit(ask("A"))
    events = await service.events(run["run_id"])
    assert events[-1].event == "RUN_FAILED"
    assert all(KEY not in event.data for event in events)
    told = [event.data for event in events if event.json.get("node_id")]
    assert all("canary" not in text for text in told)
    assert all("canary" not in record.getMessage() for record in caplog.records)
