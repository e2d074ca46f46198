"""What a process says of its models when it is asked whether it is ready, by its environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import fresh_database, make_settings
from tests.far_side import answer
from tests.model_server import running_model_server
from tests.model_service import KEY, MODELS
from tests.service import RunningService, running_service

PROMPT = {"prompt": "Say something."}


async def ready(service: RunningService) -> tuple[str, Any]:
    """The status, and what is said of the models."""
    response = await service.client.get("/readyz")
    assert response.status_code == 200
    found = response.json()
    return found["status"], found["checks"].get("models")


@pytest.mark.parametrize(
    ("key", "settings", "why"),
    [
        (None, {}, "TESTS_MODEL_KEY is not set"),
        ("sk-…", {}, "TESTS_MODEL_KEY is a placeholder"),
        (KEY, {"models_enabled": False}, "switched off by FLEXRUN_MODELS_ENABLED"),
    ],
)
async def test_without_a_usable_provider_it_is_ready_and_calls_nobody(
    key: str | None,
    settings: dict[str, Any],
    why: str,
    dsn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if key is not None:
        monkeypatch.setenv("TESTS_MODEL_KEY", key)
    async with running_model_server() as models:
        file = tmp_path / "models.yaml"
        file.write_text(MODELS.format(url=models.url))
        made = make_settings(models_file=file, **settings)
        async with running_service(made, dsn) as service:
            assert await ready(service) == ("ok", {"ok": True, "providers": {"near": why}})
            response = await service.client.post("/v1/infer_sync", json=PROMPT)
            assert (response.status_code, response.json()["code"]) == (422, "no_compatible_model")
        assert models.requests == []


async def test_models_that_are_away_degrade_it_until_they_are_back(
    postgres_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTS_MODEL_KEY", KEY)
    async with fresh_database(postgres_dsn) as dsn, running_model_server() as models:
        file = tmp_path / "models.yaml"
        file.write_text(MODELS.format(url=models.url))
        quick = {"cb_threshold": 1, "cb_cooldown_s": 60, "max_retries": 0}
        async with running_service(make_settings(models_file=file, **quick), dsn) as service:
            assert await ready(service) == (
                "ok",
                {"ok": True, "providers": {"near": "configured"}},
            )
            models.behave(answer(500))
            for _ in range(2):  # the first opens the breaker, the second meets it
                await service.client.post("/v1/infer_sync", json=PROMPT)
            status, said = await ready(service)
            assert (status, said["ok"]) == ("degraded", False)
            await service.client.post("/v1/breakers/llm::near/reset")
            response = await service.client.post("/v1/infer_sync", json=PROMPT)
            assert response.status_code == 200, response.text
            assert (await ready(service))[0] == "ok"
