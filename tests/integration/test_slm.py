"""Requests to models over HTTP: real services, real servers that speak the wire of models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.api import slm_runs
from app.domain.chat import ChatAnswer, StopReason
from app.kit.ids import new_id
from app.settings import Role
from tests.conftest import fresh_database, make_settings
from tests.envelopes import diamond
from tests.far_side import answer
from tests.integration.test_metrics import scrape
from tests.model_server import USAGE, ModelServer, running_model_server
from tests.model_wires import vector_of
from tests.process import service_processes
from tests.service import RunningService, running_service
from tests.shared_service import audit, problem, rows, until

MODELS = """
providers:
  near: {{kind: openai, base_url: "{near}/v1"}}
  far: {{kind: openai, base_url: "{far}/v1"}}
  hasty: {{kind: openai, base_url: "{far}/v1", timeout_s: 1}}
models:
  small: {{provider: near, ctx_window: 8000, output_tokens_max: 500, json_mode: true,
    function_calling: false, cost_tier: low, roles: [chat],
    prices: {{input_usd_per_mtok: "1", output_usd_per_mtok: "2"}}}}
  spare: {{provider: far, ctx_window: 8000, output_tokens_max: 500, json_mode: true,
    function_calling: false, cost_tier: high, roles: [chat],
    prices: {{input_usd_per_mtok: "9", output_usd_per_mtok: "9"}}}}
  coder: {{provider: hasty, ctx_window: 8000, output_tokens_max: 500, json_mode: true,
    function_calling: false, cost_tier: low, roles: [code],
    prices: {{input_usd_per_mtok: "1", output_usd_per_mtok: "2"}}}}
  vectors: {{provider: near, ctx_window: 1000, output_tokens_max: 0, json_mode: false,
    function_calling: false, cost_tier: free, roles: [embedding]}}
  other-vectors: {{provider: far, ctx_window: 1000, output_tokens_max: 0, json_mode: false,
    function_calling: false, cost_tier: high, roles: [embedding],
    prices: {{input_usd_per_mtok: "9", output_usd_per_mtok: "9"}}}}
"""
PATIENCE_S = 40.0
ASK = {"prompt": "canary: what grows on loam?"}
TOKENS = USAGE.tokens_in + USAGE.tokens_out

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Sides:
    """Where models are: `near` is asked first, `far` when it gives no answer."""

    near: ModelServer
    far: ModelServer

    def catalog(self, folder: Path) -> Path:
        file = folder / "models.yaml"
        file.write_text(MODELS.format(near=self.near.url, far=self.far.url))
        return file


@asynccontextmanager
async def running_sides() -> AsyncIterator[Sides]:
    async with running_model_server() as near, running_model_server() as far:
        near.say("oats")
        far.say("rye")
        yield Sides(near, far)


@asynccontextmanager
async def service_with(
    sides: Sides, dsn: str, folder: Path, role: Role = "serve", **changes: object
) -> AsyncIterator[RunningService]:
    settings = {"llm_cache_days": 0, "max_retries": 0, "cb_threshold": 1_000, **changes}
    made = make_settings(models_file=sides.catalog(folder), **settings)
    async with running_service(made, dsn, role) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[RunningService, Sides]]:
    """One service for the tests that need nothing special."""
    async with fresh_database(postgres_dsn) as dsn, running_sides() as sides:
        async with service_with(sides, dsn, tmp_path_factory.mktemp("slm")) as service:
            yield service, sides
        await audit(dsn)


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: tuple[RunningService, Sides]) -> RunningService:
    return shared[0]


@pytest_asyncio.fixture(loop_scope="module")
async def sides(shared: tuple[RunningService, Sides]) -> Sides:
    """The models of the shared service, without memory of earlier tests."""
    sides = shared[1]
    sides.near.requests.clear()
    sides.far.requests.clear()
    sides.near.say("oats")
    sides.far.say("rye")
    return sides


async def queued(service: RunningService, body: dict[str, Any], **headers: str) -> str:
    """Queue a request; its id."""
    response = await service.client.post("/v1/requests", json=body, headers=headers)
    assert response.status_code == 202, response.text
    accepted: dict[str, str] = response.json()
    assert accepted["status"] == "queued"
    assert response.headers["location"] == f"/v1/requests/{accepted['request_id']}"
    return accepted["request_id"]


async def ended(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    """The request, once it is not pending any more."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found: dict[str, Any] = (await client.get(f"/v1/requests/{request_id}")).json()
            if found["status"] != "pending":
                return found
            await asyncio.sleep(0.02)


async def types_of(service: RunningService, request_id: str) -> list[str]:
    return [event.event for event in await service.events(request_id)]


# --- answers at once ------------------------------------------------------------------------------


async def test_a_prompt_is_answered_and_its_call_is_in_the_journal_and_in_the_metrics(
    service: RunningService, sides: Sides
) -> None:
    before = await scrape(service)
    body = {**ASK, "output_tokens_max": 50, "temperature": 0.5}
    response = await service.client.post("/v1/infer_sync", json=body)
    assert response.status_code == 200, response.text
    assert response.json() == {"model": "small", "output": "oats", "tokens_used": TOKENS}

    [sent] = [request.json for request in sides.near.requests]
    assert sent["messages"] == [{"role": "user", "content": ASK["prompt"]}]
    assert (sent["max_tokens"], sent["temperature"]) == (50, 0.5)

    where = response.headers["content-location"]
    run_id = where.rpartition("/")[2]
    stored = (await service.client.get(where)).json()
    assert stored == {"request_id": run_id, "status": "completed", "result": response.json()}
    assert (await types_of(service, run_id))[3:] == [
        *("NODE_START", "MODEL_SELECTED", "LLM_REQUEST", "LLM_RESPONSE", "NODE_DONE", "RUN_DONE")
    ]
    run = (await service.client.get(f"/v1/runs/{run_id}")).json()
    assert run["nodes"][0]["capability_id"] == "models.infer"

    [record] = (await service.client.get("/v1/slm/metrics?limit=1")).json()["calls"]
    assert record.pop("latency_ms") > 0
    assert record.pop("ts") >= run["created_at"]
    assert record == {
        "model_id": "small",
        "provider": "near",
        "role": "chat",
        "tenant_id": "default",
        "tokens_in": USAGE.tokens_in,
        "tokens_out": USAGE.tokens_out,
        "outcome": "ok",
        "refusal": False,
        "run_id": run_id,
        "node_id": "call",
    }

    after = await scrape(service)

    def added(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert added("llm_calls_total", provider="near", outcome="ok") == 1
    assert added("llm_calls_total", provider="far", outcome="ok") == 0
    assert added("llm_tokens_total", provider="near", direction="in") == USAGE.tokens_in
    assert added("llm_tokens_total", provider="near", direction="out") == USAGE.tokens_out
    assert added("llm_cost_usd_total", provider="near") == pytest.approx(22e-6)
    assert added("llm_duration_seconds_count", provider="near") == 1
    assert added("model_selections_total", reason="cheapest") == 1


async def test_a_text_is_embedded(service: RunningService, sides: Sides) -> None:
    response = await service.client.post("/v1/embedding", json={"text": "loam"})
    assert response.status_code == 200, response.text
    vector = vector_of("loam")
    assert response.json() == {"model": "vectors", "embedding": vector, "dim": len(vector)}
    [sent] = [request.json for request in sides.near.requests]
    assert sent == {"model": "vectors", "input": ["loam"]}
    [record] = (await service.client.get("/v1/slm/metrics?limit=1")).json()["calls"]
    assert (record["model_id"], record["role"], record["outcome"]) == ("vectors", "embedding", "ok")


async def test_a_provider_that_is_down_is_followed_by_the_next_and_that_is_counted(
    service: RunningService, sides: Sides
) -> None:
    before = await scrape(service)
    sides.near.behave(answer(500))
    body = {**ASK, "model": "small"}
    response = await service.client.post("/v1/infer_sync", json=body)
    assert response.json() == {"model": "spare", "output": "rye", "tokens_used": TOKENS}
    after = await scrape(service)
    for name, labels in (
        ("llm_calls_total", {"provider": "far", "outcome": "ok"}),
        ("model_selections_total", {"reason": "fallback"}),
    ):
        assert after.value(name, **labels) == before.value(name, **labels) + 1
    page = (await service.client.get("/v1/slm/metrics?limit=2")).json()["calls"]
    assert [(call["provider"], call["outcome"]) for call in page] == [
        ("far", "ok"),
        ("near", "provider_failed"),
    ]


async def test_a_named_model_of_vectors_is_the_only_one_that_is_asked(
    service: RunningService, sides: Sides
) -> None:
    sides.near.behave(answer(500))
    named = {"text": "loam", "model": "vectors"}
    response = await service.client.post("/v1/embedding", json=named)
    problem(response, 502, "llm_unavailable")
    assert sides.far.requests == []

    sides.near.behave(answer(500))
    response = await service.client.post("/v1/embedding", json={"text": "loam"})
    assert response.json()["model"] == "other-vectors"


async def test_a_provider_without_an_answer_is_502_with_the_reason(
    service: RunningService, sides: Sides
) -> None:
    sides.near.behave(answer(401, b'{"error": {"message": "canary"}}'))
    sides.far.behave(answer(500))
    response = await service.client.post("/v1/infer_sync", json=ASK)
    problem(response, 502, "llm_unavailable")
    assert "canary" not in response.text
    request_id = response.json()["request_id"]
    assert (await service.client.get(f"/v1/requests/{request_id}")).json()["error"] == {
        "code": "llm_unavailable",
        "message": response.json()["detail"],
    }

    sides.near.say(ChatAnswer("I will not.", StopReason.REFUSED, USAGE))
    response = await service.client.post("/v1/infer_sync", json=ASK)
    problem(response, 502, "refused")
    [record] = (await service.client.get("/v1/slm/metrics?limit=1")).json()["calls"]
    assert (record["outcome"], record["refusal"]) == ("refused", True)


async def test_a_provider_has_its_time_and_no_more(service: RunningService, sides: Sides) -> None:
    gate = asyncio.Event()

    async def wait(*_: Any) -> None:
        await gate.wait()

    sides.far.behave(wait)  # it has 1 s
    response = await service.client.post("/v1/infer_sync", json={**ASK, "role": "code"})
    gate.set()
    problem(response, 502, "timeout")


@pytest.mark.parametrize(
    ("route", "body", "code"),
    [
        ("infer_sync", {"prompt": "x" * 200_000}, "no_compatible_model"),
        ("embedding", {"text": "x" * 200_000}, "no_compatible_model"),
        ("embedding", {"text": "x", "model": "small"}, "no_compatible_model"),
        ("infer_sync", {**ASK, "model": "nobody"}, "unknown_model"),
        ("embedding", {"text": "x", "model": "nobody"}, "unknown_model"),
        ("infer_sync", {**ASK, "role": "embedding"}, "invalid_request"),
        ("infer_sync", {"prompt": ""}, "invalid_request"),
        ("requests", {"mode": "chat", "payload": ASK}, "invalid_request"),
        ("requests", {"mode": "embedding", "payload": ASK}, "invalid_request"),
        ("requests", {"mode": "infer_sync", "provider": "no", "payload": ASK}, "unknown_provider"),
        (
            "requests",
            {"mode": "infer_sync", "provider": "far", "model": "small", "payload": ASK},
            "unknown_model",
        ),
    ],
)
async def test_what_nobody_can_do_is_422(
    service: RunningService, sides: Sides, route: str, body: dict[str, Any], code: str
) -> None:
    problem(await service.client.post(f"/v1/{route}", json=body), 422, code)
    assert sides.near.requests == []


async def test_open_breakers_are_503_and_nothing_of_it_happens_later(
    sides: Sides, dsn: str, tmp_path: Path
) -> None:
    sides.near.behave(answer(500))
    sides.far.behave(answer(500))
    async with service_with(sides, dsn, tmp_path, cb_threshold=1, cb_cooldown_s=30) as service:
        problem(await service.client.post("/v1/infer_sync", json=ASK), 502, "llm_unavailable")
        response = await service.client.post("/v1/infer_sync", json=ASK)
        problem(response, 503, "breaker_open")
        assert 1 <= int(response.headers["retry-after"]) <= 36
        assert len(sides.near.requests) == len(sides.far.requests) == 1
        [newest, _] = (await service.client.get("/v1/runs")).json()["runs"]
        await until(service, newest["run_id"], "RUN_CANCELLED")
    await audit(dsn)


async def test_without_a_worker_the_client_is_told_in_time_and_no_call_is_made_later(
    sides: Sides, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slm_runs, "NOW_S", 0.2)
    async with service_with(sides, dsn, tmp_path, "api") as api:
        response = await api.client.post("/v1/infer_sync", json=ASK)
        problem(response, 504, "no_answer_in_time")
        request_id = response.json()["request_id"]
    async with service_with(sides, dsn, tmp_path) as service:
        found = await ended(service.client, request_id)
        assert found["status"] == "error"
    assert sides.near.requests == []
    await audit(dsn)


async def test_a_process_that_leaves_tells_those_who_wait_and_takes_nothing_more(
    sides: Sides, dsn: str, tmp_path: Path
) -> None:
    gate = asyncio.Event()

    async def wait(*_: Any) -> None:
        await gate.wait()

    sides.near.behave(wait)
    async with service_with(sides, dsn, tmp_path) as service:
        waiting = asyncio.create_task(service.client.post("/v1/infer_sync", json=ASK))
        await sides.near.reached(1)
        service.services.drain.begin()
        problem(await waiting, 503, "draining")
        problem(await service.client.post("/v1/infer_sync", json=ASK), 503, "draining")
        [run] = (await service.client.get("/v1/runs")).json()["runs"]
        found = await ended(service.client, run["run_id"])
        assert found["error"]["code"] == "cancelled"
    gate.set()
    await audit(dsn)


async def test_without_models_there_is_none_that_can_do_it(dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("{}")
    async with running_service(make_settings(models_file=file), dsn) as service:
        for route, body in (("infer_sync", ASK), ("embedding", {"text": "x"})):
            response = await service.client.post(f"/v1/{route}", json=body)
            problem(response, 422, "no_compatible_model")
    await audit(dsn)


async def test_prompts_are_in_no_event_and_no_log_line(
    service: RunningService, sides: Sides, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    response = await service.client.post("/v1/infer_sync", json=ASK)
    run_id = response.headers["content-location"].rpartition("/")[2]
    assert all("canary" not in event.data for event in await service.events(run_id))
    assert all("canary" not in record.getMessage() for record in caplog.records)


# --- the queue ------------------------------------------------------------------------------------


async def test_a_request_is_pending_until_it_is_completed(
    service: RunningService, sides: Sides
) -> None:
    gate = asyncio.Event()

    async def wait_and_speak(writer: asyncio.StreamWriter, exchange: Any) -> None:
        await gate.wait()
        await sides.far.speak(writer, exchange)

    sides.far.behave(wait_and_speak)
    request_id = await queued(service, {"mode": "infer_sync", "provider": "far", "payload": ASK})
    await sides.far.reached(1)
    url = f"/v1/requests/{request_id}"
    pending = await service.client.get(url)
    assert pending.json() == {"request_id": request_id, "status": "pending"}
    gate.set()
    assert (await ended(service.client, request_id))["result"] == {
        "model": "spare",
        "output": "rye",
        "tokens_used": TOKENS,
    }
    assert sides.near.requests == []


async def test_a_text_can_be_queued_and_its_key_queues_it_once(
    service: RunningService, sides: Sides
) -> None:
    body = {"mode": "embedding", "model": "vectors", "payload": {"text": "loam"}}
    first = await queued(service, body, **{"Idempotency-Key": "k1"})
    assert (await ended(service.client, first))["result"]["embedding"] == vector_of("loam")
    assert await queued(service, body, **{"Idempotency-Key": "k1"}) == first
    assert len(sides.near.requests) == 1
    other = {**body, "payload": {"text": "sand"}}
    response = await service.client.post(
        "/v1/requests", json=other, headers={"Idempotency-Key": "k1"}
    )
    problem(response, 422, "idempotency_key_reused")


async def test_a_failed_and_a_cancelled_request_say_why(
    service: RunningService, sides: Sides
) -> None:
    body = {"mode": "infer_sync", "payload": ASK}
    sides.near.behave(answer(400))
    sides.far.behave(answer(400))
    failed = await ended(service.client, await queued(service, body))
    assert (failed["status"], failed["error"]["code"]) == ("error", "llm_unavailable")

    gate = asyncio.Event()

    async def wait(*_: Any) -> None:
        await gate.wait()

    sides.near.behave(wait)
    request_id = await queued(service, body)
    await sides.near.reached(2)
    response = await service.client.post(f"/v1/runs/{request_id}/cancel", json={})
    assert response.status_code == 202
    cancelled = await ended(service.client, request_id)
    gate.set()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("error", "cancelled")


async def test_a_run_that_is_no_request_is_not_found(service: RunningService) -> None:
    run = await service.finished(diamond())
    for request_id in (run["run_id"], str(new_id()), "x"):
        response = await service.client.get(f"/v1/requests/{request_id}")
        problem(response, 404, "request_not_found")


async def test_a_queued_request_waits_for_a_breaker(sides: Sides, dsn: str, tmp_path: Path) -> None:
    sides.near.behave(answer(500))
    sides.far.behave(answer(500))
    changes: dict[str, Any] = {"cb_threshold": 1, "cb_cooldown_s": 2.0, "max_retries": 1}
    async with service_with(sides, dsn, tmp_path, **changes) as service:
        request_id = await queued(service, {"mode": "infer_sync", "payload": ASK})
        found = await ended(service.client, request_id)
        assert found["status"] == "completed"
        assert "NODE_BLOCKED" in await types_of(service, request_id)
    await audit(dsn)


async def test_another_process_takes_the_request_of_a_killed_one(
    sides: Sides, dsn: str, tmp_path: Path
) -> None:
    gate = asyncio.Event()

    async def wait(*_: Any) -> None:
        await gate.wait()

    sides.near.behave(wait)
    models_file = str(sides.catalog(tmp_path))
    async with service_processes(
        dsn, "serve", "serve", models_file=models_file, llm_cache_days="0"
    ) as (first, second):
        assert first.url is not None
        assert second.url is not None
        async with httpx.AsyncClient(timeout=10) as client:
            body = {"mode": "infer_sync", "payload": ASK}
            response = await client.post(f"{first.url}/v1/requests", json=body)
            request_id = response.json()["request_id"]
            async with asyncio.timeout(PATIENCE_S):
                await sides.near.reached(1)
            await first.kill()
        async with httpx.AsyncClient(base_url=second.url, timeout=10) as client:
            found = await ended(client, request_id)
            page = (await client.get("/v1/slm/metrics")).json()["calls"]
    gate.set()
    assert found["status"] == "completed"
    assert found["result"] == {"model": "small", "output": "oats", "tokens_used": TOKENS}
    assert len(sides.near.requests) == 2
    assert [(call["run_id"], call["outcome"]) for call in page] == [(request_id, "ok")]
    await audit(dsn)


# --- the record of calls --------------------------------------------------------------------------


async def test_calls_are_paged_newest_first_and_from_a_time_on(
    service: RunningService, sides: Sides
) -> None:
    asked = []
    for _ in range(5):
        response = await service.client.post("/v1/infer_sync", json=ASK)
        asked.append(response.headers["content-location"].rpartition("/")[2])
    await service.finished(diamond())
    first = (await service.client.get(f"/v1/runs/{asked[0]}")).json()["created_at"]

    found: list[str] = []
    more: dict[str, Any] = {"since": first, "limit": 2}
    for size in (2, 2, 1):
        page = (await service.client.get("/v1/slm/metrics", params=more)).json()
        assert len(page["calls"]) == size
        found += [call["run_id"] for call in page["calls"]]
        more["cursor"] = page["next_cursor"]
    assert more["cursor"] is None
    assert found == asked[::-1]

    for cursor in ("?", "WzFd"):
        response = await service.client.get("/v1/slm/metrics", params={"cursor": cursor})
        problem(response, 400, "bad_cursor")
    for since in ("yesterday", "x"):
        response = await service.client.get("/v1/slm/metrics", params={"since": since})
        assert response.status_code == 422


async def test_calls_of_other_tenants_are_not_shown(service: RunningService, sides: Sides) -> None:
    response = await service.client.post("/v1/infer_sync", json=ASK)
    run_id = response.headers["content-location"].rpartition("/")[2]
    change = "update runs set tenant_id = $2 where run_id = $1::uuid"
    await rows(service, change, run_id, "somebody")
    page = (await service.client.get("/v1/slm/metrics?limit=200")).json()["calls"]
    await rows(service, change, run_id, "default")
    assert run_id not in [call["run_id"] for call in page]
