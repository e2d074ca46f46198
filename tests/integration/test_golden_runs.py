"""Golden runs: everything that two runs tell, word for word, but for ids, times and durations.

What they tell is stored in `tests/golden/`. A change of the words is a change that clients see:
look at the difference, and if it is meant, write the files anew with `GOLDEN=write` in the
environment.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from tests.conftest import fresh_database, make_settings
from tests.envelopes import graph
from tests.model_server import ModelServer, running_model_server
from tests.service import RunningService, running_service

GOLDEN = Path(__file__).parents[1] / "golden"
SPARED = {"run_id": "<run>", "trace_id": "<trace>", "ts": "<time>", "at": "<time>"}
DURATIONS = ("duration_ms", "planning_ms")
MODELS = """
providers:
  near: {{kind: openai, base_url: "{url}/v1"}}
models:
  words:
    provider: near
    ctx_window: 32000
    output_tokens_max: 1000
    json_mode: false
    function_calling: false
    cost_tier: free
    roles: [chat]
  small:
    provider: near
    ctx_window: 2000
    output_tokens_max: 500
    json_mode: true
    function_calling: false
    cost_tier: low
    prices: {{input_usd_per_mtok: "1", output_usd_per_mtok: "2"}}
    roles: [chat]
  large:
    provider: near
    ctx_window: 32000
    output_tokens_max: 1000
    json_mode: true
    function_calling: true
    cost_tier: high
    prices: {{input_usd_per_mtok: "5", output_usd_per_mtok: "10"}}
    roles: [chat, reliable]
"""
STRING = {"type": "string"}
SUMMARY = {
    "capability_id": "notes.summary",
    "version": "1.0.0",
    "display_name": "a writer of summaries",
    "summary": "Says in one sentence what a note says.",
    "kind": "llm",
    "effect": "pure",
    "input_contract": {
        "schema": {"type": "object", "properties": {"note": STRING}, "required": ["note"]}
    },
    "output_contract": {
        "schema": {"type": "object", "properties": {"summary": STRING}, "required": ["summary"]}
    },
    "config": {"output_tokens_max": 100},
}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def office(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[RunningService, ModelServer]]:
    file = tmp_path_factory.mktemp("models") / "models.yaml"
    async with fresh_database(postgres_dsn) as dsn, running_model_server() as models:
        models.say('{"summary": "Nothing new."}')
        file.write_text(MODELS.format(url=models.url))
        settings = make_settings(models_file=file, llm_cache_days=0)
        async with running_service(settings, dsn) as service:
            response = await service.client.post("/v1/capabilities", json=SUMMARY)
            assert response.status_code == 201, response.text
            yield service, models


def _envelope(note: str) -> dict[str, Any]:
    inputs = {"note": {"from": "inputs", "pointer": "/note"}}
    node = {"id": "summary", "capability": "notes.summary", "inputs": inputs}
    return graph(node, inputs={"note": note}, objective="Summarise the note")


def _normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: SPARED.get(key, 0 if key in DURATIONS else _normal(found))
            for key, found in value.items()
        }
    return [_normal(found) for found in value] if isinstance(value, list) else value


async def told(service: RunningService, envelope: dict[str, Any]) -> bytes:
    """All events of a run, one a line, without what differs from run to run."""
    run = await service.submit(envelope)
    events = await service.events(run["run_id"])
    return b"".join(orjson.dumps(_normal(event.json)) + b"\n" for event in events)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("json_only", "Nothing happened today."),
        ("overflow_fallback", "Nothing happened today. " * 400),
    ],
)
async def test_a_golden_run_tells_the_same_again_and_again(
    office: tuple[RunningService, ModelServer], name: str, note: str
) -> None:
    service, models = office
    first, second = [await told(service, _envelope(note)) for _ in range(2)]
    assert first == second
    path = GOLDEN / f"{name}.jsonl"
    if os.environ.get("GOLDEN") == "write":
        path.write_bytes(first)
    assert first.decode() == path.read_text()
    asked = {request.json["model"] for request in models.requests}
    assert "words" not in asked, "a prompt that wants JSON went to a model that can not"
