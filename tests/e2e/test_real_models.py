"""The models of models.yaml themselves, asked for real: for whoever has a key, or runs Ollama.

    FLEXRUN_REAL_MODELS=1 OPENAI_API_KEY=… make test ARGS=tests/e2e/test_real_models.py

Skipped without the first variable, so that no test run costs money by accident. What models say
differs from day to day; that a run is done and its output fits its contract does not.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from app.bootstrap import open_catalog
from tests.conftest import make_settings
from tests.service import RunningService, running_service

ROOT = Path(__file__).parents[2]
EXAMPLES = ("headline", "quality", "planned", "goals")
WRONG_KEY = "sk-wrong-0000000000000000"

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("FLEXRUN_REAL_MODELS"),
        reason="asks real models, which costs money: set FLEXRUN_REAL_MODELS=1",
    ),
    pytest.mark.timeout(600),
]


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads((ROOT / "examples" / f"{name}.json").read_bytes())
    return found


@pytest.fixture
async def service(dsn: str) -> AsyncIterator[RunningService]:
    settings = make_settings(models_file=ROOT / "models.yaml", llm_cache_days=0)
    async with running_service(settings, dsn) as service:
        response = await service.client.post("/v1/capabilities", json=example("llm_capability"))
        assert response.status_code in (200, 201), response.text
        yield service


async def events_of(service: RunningService, run_id: str) -> list[str]:
    return [event.event or "" for event in await service.events(run_id)]


async def test_a_prompt_is_answered(service: RunningService) -> None:
    response = await service.client.post(
        "/v1/infer_sync", json={"prompt": "Answer with the one word: ready"}, timeout=120
    )
    assert response.status_code == 200, response.text
    assert response.json()["output"].strip()
    assert response.json()["tokens_used"] > 0


@pytest.mark.parametrize("name", EXAMPLES)
async def test_an_example_is_done_by_models(service: RunningService, name: str) -> None:
    run = await service.submit(example(name))
    events = await events_of(service, run["run_id"])
    assert events[-1] == "RUN_DONE", events
    assert "LLM_RESPONSE" in events


async def test_a_wrong_key_falls_back_to_the_assembler(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(models_file=ROOT / "models.yaml", llm_cache_days=0)
    for provider in open_catalog(settings).providers:
        monkeypatch.setenv(f"{provider.upper()}_API_KEY", WRONG_KEY)
    async with running_service(settings, dsn) as service:
        run = await service.submit(example("planned"))
        events = await events_of(service, run["run_id"])
        found = (await service.client.get(f"/v1/runs/{run['run_id']}/plans/1")).json()
    assert (events[-1], found["author"]) == ("RUN_DONE", "assembler")
    assert WRONG_KEY not in orjson.dumps(events).decode()


async def test_switched_off_no_call_is_made(dsn: str) -> None:
    settings = make_settings(models_file=ROOT / "models.yaml", models_enabled=False)
    async with running_service(settings, dsn) as service:
        run = await service.submit(example("planned"))
        events = await events_of(service, run["run_id"])
    assert events[-1] == "RUN_DONE"
    assert "LLM_REQUEST" not in events
