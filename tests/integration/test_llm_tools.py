"""Runs whose model calls tools: a real service, a real tool, and the wires of two vendors."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from app.domain.chat import ChatAnswer, StopReason, ToolCall
from tests.conftest import fresh_database, make_settings
from tests.envelopes import graph
from tests.model_server import USAGE, ModelServer, running_model_server
from tests.service import RunningService, running_service
from tests.shared_service import audit, codes, problem, register, until
from tests.sse import SseEvent
from tests.tools import Tool, answer, http_capability, respond, running_tool

MODELS = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1"}}
  anthropic: {{kind: anthropic, base_url: "{url}"}}
models:
  plain:
    provider: openai
    ctx_window: 8000
    output_tokens_max: 500
    json_mode: true
    function_calling: false
    cost_tier: free
    roles: [chat]
  gpt:
    provider: openai
    ctx_window: 8000
    output_tokens_max: 500
    json_mode: true
    function_calling: true
    cost_tier: low
    prices: {{input_usd_per_mtok: "1", output_usd_per_mtok: "2"}}
    roles: [chat]
  claude:
    provider: anthropic
    ctx_window: 8000
    output_tokens_max: 500
    json_mode: true
    function_calling: true
    cost_tier: high
    prices: {{input_usd_per_mtok: "1", output_usd_per_mtok: "2"}}
    roles: [chat]
"""
ENVELOPE = graph({"id": "A", "capability": "soil.advise", "inputs": {}})
VERDICT = '{"verdict": "oats"}'
PLOT = {"schema": {"type": "object", "properties": {"plot": {"type": "integer"}}}}
STRING = {"type": "string"}

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def fail(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    respond(writer, 500, {"detail": "out of order"})


async def cut(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@asynccontextmanager
async def farm(
    dsn: str, folder: Path, models: ModelServer, tool: Tool, **changes: Any
) -> AsyncIterator[RunningService]:
    """A service with these models and all tools registered."""
    file = folder / "models.yaml"
    file.write_text(MODELS.format(url=models.url))
    settings = make_settings(models_file=file, cb_threshold=1, cb_cooldown_s=60, **changes)
    async with running_service(settings, dsn) as service:
        await register(
            service,
            http_capability(tool, "lookup", "idempotent", input_contract=PLOT, concurrency=1),
            http_capability(tool, "broken", "idempotent"),
            http_capability(tool, "send", "at_most_once"),
        )
        yield service


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def models() -> AsyncIterator[ModelServer]:
    async with running_model_server() as models:
        yield models


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def tool() -> AsyncIterator[Tool]:
    async with running_tool(lookup=answer, broken=fail, send=cut) as tool:
        yield tool


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(
    postgres_dsn: str,
    tmp_path_factory: pytest.TempPathFactory,
    models: ModelServer,
    tool: Tool,
) -> AsyncIterator[RunningService]:
    folder = tmp_path_factory.mktemp("models")
    async with fresh_database(postgres_dsn) as dsn:
        async with farm(dsn, folder, models, tool, llm_cache_days=0) as service:
            yield service
        await audit(dsn)


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: RunningService, models: ModelServer, tool: Tool) -> RunningService:
    """The shared service; models and tool without memory of earlier tests."""
    models.requests.clear()
    tool.ledger.clear()
    return shared


def adviser(*tools: str, **changes: Any) -> dict[str, Any]:
    return {
        "capability_id": "soil.advise",
        "version": "1.0.0",
        "display_name": "an adviser",
        "summary": "Says what grows where.",
        "kind": "llm",
        "effect": "idempotent",
        "input_contract": {"schema": {"type": "object"}},
        "output_contract": {
            "schema": {
                "type": "object",
                "properties": {"verdict": STRING},
                "required": ["verdict"],
            }
        },
        "config": {"tools": list(tools)},
        **changes,
    }


def asks(*calls: tuple[str, str]) -> ChatAnswer:
    found = tuple(ToolCall(f"call_{n}", *call) for n, call in enumerate(calls))
    return ChatAnswer("", StopReason.TOOLS, USAGE, found)


async def advise(
    service: RunningService, registration: dict[str, Any]
) -> tuple[str, list[SseEvent]]:
    """The id and all events of a run with one node."""
    await register(service, registration)
    run = await service.submit(ENVELOPE)
    return run["run_id"], await service.events(run["run_id"])


def outcomes(events: list[SseEvent]) -> list[tuple[str, str]]:
    """Capability and outcome of every tool call."""
    return [
        (event.json["data"]["capability_id"], event.json["data"]["outcome"])
        for event in events
        if event.event == "TOOL_CALLED"
    ]


def results_sent(models: ModelServer, index: int = -1) -> list[Any]:
    """The results of tools in a request, as JSON, on whichever wire."""
    found = []
    for message in models.requests[index].json["messages"]:
        if message["role"] == "tool":
            found.append(orjson.loads(message["content"]))
        elif isinstance(message["content"], list):
            parts = [part for part in message["content"] if part["type"] == "tool_result"]
            found += [orjson.loads(part["content"]) for part in parts]
    return found


@pytest.mark.parametrize(("model", "path"), [("gpt", "/chat/completions"), ("claude", "/messages")])
async def test_a_model_calls_a_tool_and_answers_with_what_it_gave(
    service: RunningService, models: ModelServer, tool: Tool, model: str, path: str
) -> None:
    models.say(asks(("test_lookup", '{"plot":7}'), ("test_lookup", '{"plot":8}')), VERDICT)
    preferred = adviser("test.lookup", preferred_models=["plain", model])
    run_id, events = await advise(service, preferred)
    asked = ["MODEL_SELECTED", "LLM_REQUEST", "LLM_RESPONSE"]
    assert [event.event for event in events][3:] == [
        *("NODE_START", *asked, "TOOL_CALLED", "TOOL_CALLED", *asked, "NODE_DONE", "RUN_DONE")
    ]
    assert {(e.json["node_id"], e.json["attempt"]) for e in events[3:-1]} == {("A", 1)}
    assert events[-2].json["data"]["output"] == {"verdict": "oats"}
    first, second = [event.json["data"] for event in events if event.event == "TOOL_CALLED"]
    assert first.pop("duration_ms") > 0
    assert first == {
        "capability_id": "test.lookup",
        "version": "1.0.0",
        "call": 1,
        "outcome": "ok",
    }
    assert second["call"] == 2
    # A model that can call no tools is not asked, though it is preferred and free.
    [passed_over] = events[4].json["data"]["rejected"]
    assert passed_over == {"model": "plain", "why": "no_tools"}
    assert {request.target for request in models.requests} == {f"/v1{path}"}
    assert results_sent(models) == [{"echo": {"plot": 7}}, {"echo": {"plot": 8}}]
    digests = [hashlib.sha256(b'{"plot":%d}' % plot).hexdigest() for plot in (7, 8)]
    keys = [f"{run_id}:A:1:test.lookup:{digest}" for digest in digests]
    assert [entry.key for entry in tool.ledger] == keys


async def test_mistakes_are_told_to_the_model_which_then_does_better(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    wrong = asks(("test_lookup", '{"plot":"seven"}'), ("test_guess", "{}"))
    models.say(wrong, asks(("test_lookup", '{"plot":7}')), VERDICT)
    _, events = await advise(service, adviser("test.lookup"))
    assert events[-1].event == "RUN_DONE"
    assert outcomes(events) == [("test.lookup", "invalid_input"), ("test.lookup", "ok")]
    [logged] = [event.json["data"] for event in events if event.event == "LOG"]
    assert logged["code"] == "unknown_tool"
    broken, unknown = [result["error"] for result in results_sent(models, 1)]
    assert (broken["code"], broken["faults"][0]["pointer"]) == ("invalid_input", "/plot")
    assert (unknown["code"], "test_lookup" in unknown["message"]) == ("unknown_tool", True)
    assert len(tool.ledger) == 1


async def test_a_tool_that_fails_opens_its_own_breaker_and_the_run_goes_on(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    call = asks(("test_broken", "{}"))
    models.say(call, call, VERDICT)
    _, events = await advise(service, adviser("test.broken"))
    assert events[-1].event == "RUN_DONE"
    assert outcomes(events) == [
        ("test.broken", "capability_unavailable"),
        ("test.broken", "breaker_open"),
    ]
    [tripped] = [event.json["data"] for event in events if event.event == "BREAKER_TRIPPED"]
    assert tripped["scope"] == f"test.broken::127.0.0.1:{tool.port}"
    told = [result["error"]["code"] for result in results_sent(models)]
    assert told == ["capability_unavailable", "breaker_open"]
    assert len(tool.ledger) == 1


async def test_a_model_that_never_answers_fails_its_node(
    service: RunningService, models: ModelServer
) -> None:
    models.say(asks(("test_lookup", "{}")))
    config = {"tools": ["test.lookup"], "tool_rounds_max": 2}
    _, events = await advise(service, adviser(config=config))
    assert outcomes(events) == [("test.lookup", "ok")] * 2
    failed, last = events[-2:]
    assert failed.json["data"]["error"]["code"] == "tool_rounds_exhausted"
    assert last.event == "RUN_FAILED"
    assert len(models.requests) == 3


async def test_an_effect_that_may_have_happened_blocks_the_node_for_a_human(
    service: RunningService, models: ModelServer, tool: Tool
) -> None:
    models.say(asks(("test_send", "{}")), VERDICT)
    await register(service, adviser("test.send", effect="at_most_once"))
    run = await service.submit(ENVELOPE)
    await until(service, run["run_id"], "RUN_PAUSED")
    page = await service.client.get(f"/v1/runs/{run['run_id']}/events")
    called, blocked = page.json()["events"][-3:-1]
    assert (called["type"], called["data"]["outcome"]) == (
        "TOOL_CALLED",
        "capability_connection_lost",
    )
    assert (blocked["type"], blocked["data"]["reason"]) == ("NODE_BLOCKED", "unknown_outcome")
    assert len(models.requests) == len(tool.ledger) == 1


async def test_a_take_over_in_the_middle_is_the_node_again_with_the_same_keys(
    models: ModelServer, tool: Tool, dsn: str, tmp_path: Path
) -> None:
    gate = asyncio.Event()

    async def wait(writer: asyncio.StreamWriter, exchange: Any) -> None:
        await gate.wait()

    models.requests.clear()
    tool.ledger.clear()
    models.say(asks(("test_lookup", '{"plot":7}')), VERDICT)
    models.behave(models.speak, wait)
    async with farm(dsn, tmp_path, models, tool, drain_grace_s=0.0) as first:
        await register(first, adviser("test.lookup"))
        run = await first.submit(ENVELOPE)
        await models.reached(2)  # the tool gave its result, the model thinks about it
        await until(first, run["run_id"], "TOOL_CALLED")  # which is in the journal a bit later
    async with farm(dsn, tmp_path, models, tool) as second:
        events = await second.events(run["run_id"])
        again = await second.finished(ENVELOPE)
    gate.set()
    assert again["status"] == "done"
    types = [event.event for event in events]
    assert (types.count("NODE_START"), types.count("NODE_DONE")) == (1, 1)
    assert outcomes(events) == [("test.lookup", "ok")] * 2
    assert {event.json["attempt"] for event in events if event.event == "TOOL_CALLED"} == {1}
    # What the model wants is known already when the node is called again, and in the next run.
    assert len(models.requests) == 3
    first_key, second_key, other_run = [entry.key for entry in tool.ledger]
    assert first_key == second_key != other_run
    await audit(dsn)


async def test_tools_that_can_not_be_had_are_refused_where_they_are_named(
    service: RunningService,
) -> None:
    pinned = {"capability_id": "test.lookup", "version": "9"}
    config = {"tools": ["no.such", "soil.advise", "test.send", pinned, "test.broken"]}
    response = await service.client.post("/v1/capabilities", json=adviser(config=config))
    assert codes(problem(response, 422, "registration_invalid")) == [
        ("TOOL_NOT_FOUND", "/config/tools/0"),
        ("TOOL_IS_ITSELF", "/config/tools/1"),
        ("TOOL_EFFECT_TOO_STRONG", "/config/tools/2"),
        ("TOOL_NOT_FOUND", "/config/tools/3"),
    ]


async def test_a_tool_that_got_tools_later_has_none_when_it_is_called(
    service: RunningService, models: ModelServer
) -> None:
    await register(
        service,
        adviser(capability_id="soil.judge"),
        adviser("soil.judge"),
        adviser("test.lookup", capability_id="soil.judge"),
    )
    models.say(asks(("soil_judge", "{}")), VERDICT)
    run = await service.submit(ENVELOPE)
    events = await service.events(run["run_id"])
    assert events[-1].event == "RUN_DONE"
    assert outcomes(events) == [("soil.judge", "tool_has_tools")]
    # And now it can not be registered like this any more.
    response = await service.client.post(
        "/v1/capabilities", json=adviser("soil.judge", version="2")
    )
    found = codes(problem(response, 422, "registration_invalid"))
    assert found == [("TOOL_HAS_TOOLS", "/config/tools/0")]


async def test_a_tool_may_be_a_prompt_itself_at_the_cost_of_the_same_run(
    service: RunningService, models: ModelServer
) -> None:
    await register(service, adviser(capability_id="soil.poet"), adviser("soil.poet"))
    models.say(asks(("soil_poet", "{}")), '{"verdict": "roses"}', VERDICT)
    run = await service.submit({**ENVELOPE, "constraints": {"budget": {"calls": 3}}})
    events = await service.events(run["run_id"])
    assert events[-1].event == "RUN_DONE"
    assert outcomes(events) == [("soil.poet", "ok")]
    assert results_sent(models) == [{"verdict": "roses"}]
    calls = [event.json["data"]["call"] for event in events if event.event == "LLM_RESPONSE"]
    assert calls == [1, 2, 3]
