"""The OpenAPI document is true: every route, every status and every body is as it says.

A script asks every documented operation, and each answer is held against the schema of
its route and status. schemathesis then asks with what nobody would write by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema_rs
import pytest
import pytest_asyncio
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)

from app.domain.chat import ChatAnswer, StopReason, ToolCall
from app.domain.event_shapes import EVENT_DATA
from app.domain.events import EventType
from app.main import ROUTERS
from tests.envelopes import diamond, echo_node, graph
from tests.model_server import USAGE, ModelServer, running_model_server
from tests.redis_kit import until as eventually
from tests.service import RunningService
from tests.shared_service import register, shared_service, until
from tests.sse import parse
from tests.tools import (
    Tool,
    answer,
    answer_at_gate,
    fail_once,
    hang_up,
    http_capability,
    respond,
    running_tool,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

SSE = {"Accept": "text/event-stream"}
NO_RUN = "0190a5b0-0000-7000-8000-000000000000"
MODELS = """
providers:
  local: {{kind: ollama, base_url: "http://127.0.0.1:9"}}
  near: {{kind: openai, base_url: "{url}/v1"}}
models:
  planner: {{provider: local, ctx_window: 8192, output_tokens_max: 4096, json_mode: true,
    function_calling: true, cost_tier: free, roles: [planning]}}
  writer: {{provider: near, ctx_window: 8192, output_tokens_max: 4096, json_mode: true,
    function_calling: true, cost_tier: free, roles: [chat]}}
  vectors: {{provider: near, ctx_window: 8192, output_tokens_max: 0, json_mode: false,
    function_calling: false, cost_tier: free, roles: [embedding]}}
"""
REPLAN = {
    "id": "again",
    "trigger": {"kind": "on_node_complete", "selector": {"node_id": "outline"}},
    "action": {"kind": "replan"},
}
LINE = '{"line": "It fits."}'
UNSAID = {405, 408, 500}
"""Statuses that go without saying: any route may answer them, always with a problem."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def models() -> AsyncIterator[ModelServer]:
    async with running_model_server() as server:
        server.say(LINE)
        yield server


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(
    postgres_dsn: str, models: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningService]:
    file = tmp_path_factory.mktemp("models") / "models.yaml"
    file.write_text(MODELS.format(url=models.url))
    async with shared_service(
        postgres_dsn, cb_threshold=2, cb_cooldown_s=0.2, models_file=file
    ) as service:
        yield service
        await eventually(lambda: service.services.runner.driven == 0, "all runs have ended")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def document(service: RunningService) -> dict[str, Any]:
    found: dict[str, Any] = (await service.client.get("/openapi.json")).json()
    return found


async def fail_twice(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """503 until it was called twice, then 200."""
    if len(tool.calls(body["run_id"], body["node_id"])) <= 2:
        respond(writer, 503, {"detail": "not yet"})
    else:
        await answer(tool, body, writer)


class Witness:
    """A client that compares every answer with the document, and remembers what it has seen."""

    def __init__(self, client: httpx.AsyncClient, document: dict[str, Any]) -> None:
        self._client = client
        self._document = document
        self._validators: dict[str, jsonschema_rs.Validator] = {}
        self._templates = [
            (re.compile(re.sub(r"\{[^}]+\}", "[^/]+", path)), path) for path in document["paths"]
        ]
        self.seen: set[tuple[str, str, str]] = set()
        self.event_types: set[str] = set()

    async def get(self, url: str, status: int = 200, **more: Any) -> httpx.Response:
        return await self.ask("GET", url, status, **more)

    async def post(self, url: str, body: Any, status: int, **more: Any) -> httpx.Response:
        return await self.ask("POST", url, status, json=body, **more)

    async def ask(self, method: str, url: str, status: int, **more: Any) -> httpx.Response:
        """Ask, and judge the answer."""
        response = await self._client.request(method, url, **more)
        assert response.status_code == status, response.text
        # Literal segments go before parameters, as in the router: /plans/diff is no version.
        path = min(
            (path for pattern, path in self._templates if pattern.fullmatch(response.url.path)),
            key=lambda path: path.count("{"),
        )
        operation = self._document["paths"][path][method.lower()]
        self.seen.add((method, path, str(status)))
        self._judge(operation["responses"], response)
        return response

    def _judge(self, documented: dict[str, Any], response: httpx.Response) -> None:
        status = str(response.status_code)
        assert status in documented, f"{response.request.method} {response.url}: {status}"
        content = documented[status].get("content")
        if content is None:
            assert response.content == b""
            return
        media_type = response.headers["content-type"].partition(";")[0]
        assert media_type in content, (response.url, media_type)
        if media_type == "text/event-stream":
            for event in parse([response.content]).events:
                shape = "DeltaFrame" if event.event == "delta" else "Event"
                self._validate({"$ref": f"#/components/schemas/{shape}"}, event.json)
                self.event_types.add(event.event)
        else:
            is_json = media_type.endswith("json")
            value = response.json() if is_json else response.text
            self._validate(content[media_type]["schema"], value)

    def _validate(self, schema: dict[str, Any], value: Any) -> None:
        key = json.dumps(schema, sort_keys=True)
        if key not in self._validators:
            whole = {**schema, "components": self._document["components"]}
            self._validators[key] = jsonschema_rs.validator_for(whole)
        self._validators[key].validate(value)


async def test_every_event_type_is_documented(document: dict[str, Any]) -> None:
    assert set(EVENT_DATA) == set(EventType)
    mapping = document["components"]["schemas"]["Event"]["discriminator"]["mapping"]
    assert set(mapping) == set(EventType)


async def test_every_route_answers_what_is_documented(
    service: RunningService, models: ModelServer, document: dict[str, Any]
) -> None:
    witness = Witness(service.client, document)
    async with running_tool(
        answer=answer, gated=answer_at_gate, fail=fail_once, cut=hang_up, down=fail_twice
    ) as tool:
        await _ask_the_registry(witness, tool)
        run_id = await _ask_runs(witness)
        await until(service, run_id, "RUN_DONE")
        await _ask_about(witness, run_id)
        await _ask_for_every_event(service, witness, tool)
        await _ask_models_for_events(service, witness, tool, models)
        await _give_orders(service, witness, tool)
        await _ask_breakers(witness)
    await _ask_models(witness)
    await _ask_probes(witness)

    documented = {
        (method.upper(), path, status)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for status in operation["responses"]
    }
    missing = {entry for entry in documented - witness.seen if not entry[2].startswith("5")}
    assert missing == set()
    assert witness.event_types == {*EventType, "delta"} - {"RUN_RECOVERED", "LOG"}


async def _ask_the_registry(witness: Witness, tool: Tool) -> None:
    facet = {
        "name": "claim",
        "title": "Claim",
        "schema": {"type": "string"},
        "semantics": {"instruction": "State it."},
        "metadata": {"version": "1.0.0"},
    }
    for path, body, missing in (
        ("facets", facet, "claim"),
        ("capabilities", http_capability(tool, "answer", "pure"), "test.answer"),
    ):
        url = f"/v1/{path}"
        await witness.post(url, body, 201)
        await witness.post(url, body, 200)
        await witness.post(url, {}, 422)
        await witness.get(url, params={"limit": 1})
        await witness.get(url, 400, params={"cursor": "?"})
        await witness.get(url, 422, params={"limit": 0})
        await witness.get(f"{url}/{missing}")
        await witness.get(f"{url}/nobody", 404)
    await witness.post("/v1/facets", {**facet, "title": "Other"}, 409)
    echo = {**http_capability(tool, "x", "pure"), "capability_id": "util.echo"}
    await witness.post("/v1/capabilities", echo, 409)
    beat = "/v1/capabilities/test.answer/heartbeat"
    await witness.ask("POST", beat, 200)
    await witness.ask("POST", "/v1/capabilities/nobody/heartbeat", 404)
    long = {"version": "x" * 65}
    await witness.ask("POST", beat, 422, params=long)
    await witness.get("/v1/capabilities/test.answer", 422, params=long)
    await witness.get("/v1/facets/" + "x" * 200, 404)
    contracts = {"output_contract": {"mode": "facets", "facets": ["claim", "brief"]}}
    await witness.post("/v1/contracts/compile", contracts, 200)
    await witness.post("/v1/contracts/compile", {"output_contract": {"facets": ["no"]}}, 422)


async def _ask_runs(witness: Witness) -> str:
    accepted = await witness.post("/v1/runs", diamond(), 202)
    await witness.post("/v1/runs", diamond(), 200, headers={"Prefer": "wait=20"})
    await witness.post("/v1/runs", diamond(), 200, headers=SSE)
    await witness.post("/v1/runs", graph(echo_node("A", "A")), 422)
    await witness.post("/v1/plans/preview", diamond(), 200)
    await witness.post("/v1/plans/preview", graph(echo_node("A", "A")), 422)
    await witness.get("/v1/runs", params={"limit": 1})
    await witness.get("/v1/runs", 400, params={"cursor": "?"})
    await witness.get("/v1/runs", 422, params={"status": "?"})
    for path in (
        *("/v1/runs", "/v1/plans/preview", "/v1/facets", "/v1/capabilities"),
        *("/v1/contracts/compile", "/v1/models/select"),
        *("/v1/infer_sync", "/v1/embedding", "/v1/requests"),
        *("/v1/runs/find", f"/v1/runs/{NO_RUN}/resume"),
        *(f"/v1/runs/{NO_RUN}/cancel", f"/v1/runs/{NO_RUN}/pause"),
    ):
        json_type = {"Content-Type": "application/json"}
        await witness.ask("POST", path, 400, content=b"{", headers=json_type)
        await witness.ask("POST", path, 413, content=b" " * (1 << 21), headers=json_type)
        await witness.ask("POST", path, 415, content=b"{}", headers={"Content-Type": "text/plain"})
    return str(accepted.json()["run_id"])


async def _ask_about(witness: Witness, run_id: str) -> None:
    base = f"/v1/runs/{run_id}"
    for path, status in (
        *(("", 200), ("/plans", 200), ("/plans/1", 200), ("/plans/2", 404), ("/plans/x", 422)),
        *(("/plans/diff?from=1&to=1", 200), ("/plans/diff?from=1&to=9", 404)),
        *(("/plans/diff?from=0&to=1", 422), ("/nodes/A/output", 200), ("/nodes/Z/output", 404)),
        *(("/debug", 200), ("/events", 200), ("/events?limit=0", 422), ("/events?after=99", 400)),
    ):
        await witness.get(base + path, status)
    await witness.get(f"{base}/events", headers=SSE)
    await witness.get(f"{base}/events", 204, headers={**SSE, "Last-Event-ID": "12"})
    await witness.get(f"{base}/events", 400, headers={**SSE, "Last-Event-ID": "x"})
    for path in ("", "/plans", "/debug", "/events"):
        await witness.get(f"/v1/runs/{NO_RUN}{path}", 404)
    for order in ("cancel", "pause", "resume"):
        await witness.post(f"{base}/{order}", {}, 409)
        await witness.post(f"/v1/runs/{NO_RUN}/{order}", {}, 404)
        await witness.post(f"{base}/{order}", {"note": 1}, 422)


async def _ask_for_every_event(service: RunningService, witness: Witness, tool: Tool) -> None:
    await register(
        service,
        http_capability(tool, "gated", "pure"),
        http_capability(tool, "fail", "idempotent"),
        http_capability(tool, "cut", "at_most_once"),
        http_capability(tool, "down", "idempotent"),
    )
    shape = {"type": "object", "properties": {"B": {"type": "string"}}, "required": ["B"]}
    contract = {"mode": "json_schema", "schema": shape}
    brief = {"mode": "facets", "facets": ["brief"]}
    document = {"text": "# Release\n\nVersion 2.1 ships on 2026-03-01.\n"}
    for envelope in (
        graph(echo_node("A", capability="test.fail")),
        graph(echo_node("A", capability="test.down")),
        graph(
            echo_node("A"),
            echo_node("B", "A", inputs={"x": {"from": "A", "pointer": "/none"}}),
            echo_node("C", "B"),
        ),
        graph(echo_node("A"), output_contract=contract),
        {
            "objective": "x",
            "inputs": {"document": document},
            "output_contract": brief,
            "policies": {"runtime": [REPLAN]},
        },
        {"objective": "x", "output_contract": brief},
        graph(echo_node("A", inputs={"big": {"value": "x" * 70_000}})),
    ):
        await witness.post("/v1/runs", envelope, 200, headers=SSE)

    # A run that waits, in every place where it is shown.
    run = await service.submit(graph(echo_node("A", capability="test.cut"), echo_node("B", "A")))
    base = f"/v1/runs/{run['run_id']}"
    paused = await until(service, run["run_id"], "RUN_PAUSED")
    await witness.get(base)
    await witness.get(f"{base}/debug")
    await witness.get(f"{base}/nodes/B/output", 404)
    await witness.post(f"{base}/resume", {}, 422)
    operator = {"id": "ops", "display_name": "Ops", "email": "ops@example.org"}
    decision = {"A": {"decision": "retry"}}
    await witness.post(f"{base}/resume", {"nodes": decision, "operator": operator}, 202)
    await until(service, run["run_id"], "RUN_DONE", paused.seq)
    await witness.get(f"{base}/events", headers=SSE)
    await witness.get(f"{base}/debug")

    # A run under way.
    run = await service.submit(graph(echo_node("A", capability="test.gated")))
    await witness.get(f"/v1/runs/{run['run_id']}")
    await witness.get(f"/v1/runs/{run['run_id']}/debug")
    tool.gate.set()
    await until(service, run["run_id"], "RUN_DONE")


async def _ask_models_for_events(
    service: RunningService, witness: Witness, tool: Tool, models: ModelServer
) -> None:
    written = {
        **http_capability(tool, "write", "pure"),
        "kind": "llm",
        "config": {},
        "output_contract": {"schema": {"type": "object", "required": ["line"]}},
    }
    asking = {**written, "capability_id": "test.ask", "config": {"tools": ["util.echo"]}}
    await register(service, written, asking)
    call = ChatAnswer("", StopReason.TOOLS, USAGE, (ToolCall("1", "util_echo", "{}"),))
    for answers, envelope in (
        (
            [LINE],
            graph(
                echo_node("A", capability="test.write", inputs={"about": {"value": "x"}}),
                echo_node("again", "A", capability="test.write", inputs={"about": {"value": "x"}}),
                echo_node("other", "again", capability="test.write"),
                constraints={"budget": {"calls": 1}},
            ),
        ),
        ([call, LINE], graph(echo_node("A", capability="test.ask"))),
    ):
        models.say(*answers)
        await witness.post("/v1/runs", envelope, 200, headers=SSE)


async def _give_orders(service: RunningService, witness: Witness, tool: Tool) -> None:
    """A run is paused, resumed and cancelled; another one keeps its result and goes on."""
    tool.gate.clear()
    envelope = graph(
        echo_node("A", inputs={"small": {"value": 1}}),
        echo_node("big", inputs={"big": {"value": "x" * 70_000}}),
        echo_node("B", "A", capability="test.gated"),
        objective="be ordered about",
    )
    await witness.post("/v1/runs/find", envelope, 404)
    await witness.post("/v1/runs/find", {}, 422)
    before = len(tool.ledger)
    run_id = (await service.submit(envelope))["run_id"]
    base = f"/v1/runs/{run_id}"
    await tool.reached(before + 1)
    order = {"operator": {"id": "ops"}, "note": "stop", "expected_plan_version": 1}
    for body, status in (({**order, "expected_plan_version": 2}, 409), (order, 202)):
        await witness.post(f"{base}/pause", body, status)
    paused = await until(service, run_id, "RUN_PAUSED")
    await witness.get(base)
    await witness.post(f"{base}/resume", order, 202)
    resumed = await until(service, run_id, "RUN_RESUMED", paused.seq)
    await witness.post("/v1/runs/find", envelope, 200)
    await witness.post(f"{base}/cancel", order, 202)
    await until(service, run_id, "RUN_CANCELLED", resumed.seq)
    tool.gate.set()
    for path in ("", "/debug"):
        await witness.get(base + path)
    await witness.get(f"{base}/events", headers=SSE)
    successor = (await witness.post(f"{base}/resume", {}, 202)).json()
    assert successor["signal_id"] is None
    base = f"/v1/runs/{successor['run_id']}"
    await witness.get(f"{base}/events", headers=SSE)
    for path in ("", "/debug", "/nodes/big/output"):
        await witness.get(base + path)


async def _ask_breakers(witness: Witness) -> None:
    [down] = [
        breaker
        for breaker in (await witness.get("/v1/breakers")).json()["breakers"]
        if breaker["scope"].startswith("test.down::")
    ]
    await witness.ask("POST", f"/v1/breakers/{quote(down['scope'], safe='')}/reset", 200)
    await witness.ask("POST", "/v1/breakers/nobody::nowhere/reset", 404)


async def _ask_models(witness: Witness) -> None:
    await witness.get("/v1/models")
    await witness.get("/v1/models", 400, params={"cursor": "?"})
    await witness.get("/v1/models", 422, params={"limit": 0})
    need = {"role": "planning", "preferred": ["nobody"]}
    await witness.post("/v1/models/select", need, 200)
    await witness.post("/v1/models/select", {"role": "code"}, 422)
    await witness.post("/v1/infer_sync", {"prompt": "Does it fit?"}, 200)
    await witness.post("/v1/infer_sync", {"prompt": "Does it fit?", "role": "code"}, 422)
    await witness.post("/v1/embedding", {"text": "It fits."}, 200)
    await witness.post("/v1/embedding", {}, 422)
    wanted = {"mode": "embedding", "provider": "near", "payload": {"text": "It fits."}}
    queued = await witness.post("/v1/requests", wanted, 202)
    await witness.post("/v1/requests", {**wanted, "mode": "?"}, 422)
    await witness.get(f"/v1/requests/{queued.json()['request_id']}")
    await witness.get(f"/v1/requests/{NO_RUN}", 404)
    await witness.get("/v1/slm/metrics")
    await witness.get("/v1/slm/metrics", 400, params={"cursor": "?"})
    await witness.get("/v1/slm/metrics", 422, params={"limit": 0})


async def _ask_probes(witness: Witness) -> None:
    for path in ("/livez", "/readyz", "/startupz", "/metrics"):
        await witness.get(path)


async def test_no_route_is_undocumented(document: dict[str, Any]) -> None:
    routes = {
        (method, route.path_format)
        for module in ROUTERS
        for route in module.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    documented = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert routes == documented


async def test_every_error_is_documented_as_a_problem(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            for status, response in operation["responses"].items():
                if int(status) >= 400 and path.startswith("/v1/"):
                    assert list(response["content"]) == ["application/problem+json"], path
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_every_example_in_the_document_is_accepted(
    service: RunningService, document: dict[str, Any]
) -> None:
    shown = 0
    # What others refer to is registered first.
    for path in sorted(document["paths"], key=lambda path: "facets" not in path):
        body = document["paths"][path].get("post", {}).get("requestBody", {"content": {}})
        example = body["content"].get("application/json", {}).get("example")
        if example is not None:
            response = await service.client.post(path, json=example)
            assert response.status_code in (200, 201, 202), response.text
            shown += 1
    assert shown >= 3


# The service throws dice in this process, which hypothesis takes for dice of a strategy.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.usefixtures("untraced")
async def test_no_request_makes_the_service_fail_or_break_its_contract(
    service: RunningService,
) -> None:
    schema = await asyncio.to_thread(schemathesis.openapi.from_url, f"{service.url}/openapi.json")
    asked = await asyncio.to_thread(_fuzz, schema)
    assert asked >= 200
    assert (await service.client.get("/readyz")).status_code == 200
    async with asyncio.timeout(10):
        while service.services.runner.driven:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def _fuzz(schema: Any) -> int:
    """Ask every operation with generated data; how many requests that were."""
    asked = 0

    def judge(case: schemathesis.Case[Any]) -> None:
        nonlocal asked
        asked += 1
        response = case.call(timeout=10)
        # 502: the provider of one role is away, as it may be.
        assert response.status_code < 500 or response.status_code in (502, 503), case
        documented = {int(status) for status in case.operation.definition.raw["responses"]}
        assert response.status_code in documented | UNSAID, (case, response.status_code)
        if response.status_code not in UNSAID:
            case.validate_response(
                response, checks=[content_type_conformance, response_schema_conformance]
            )

    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            run = given(case=operation.as_strategy(generation_mode=mode))(judge)
            run = hypothesis_settings(
                max_examples=10,
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(run)
            with contextlib.suppress(Unsatisfiable):  # nothing of it can be wrong
                seed(2_026)(run)()
    return asked
