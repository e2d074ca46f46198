"""A service whose one model is at a scripted model server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import fresh_database, make_settings
from tests.model_server import ModelServer, running_model_server
from tests.service import RunningService, running_service
from tests.shared_service import audit

MODELS = """
providers:
  near: {{kind: openai, base_url: "{url}/v1", key_env: TESTS_MODEL_KEY}}
models:
  small:
    provider: near
    ctx_window: 8000
    output_tokens_max: 500
    json_mode: true
    function_calling: false
    cost_tier: low
    prices: {{input_usd_per_mtok: "1", output_usd_per_mtok: "2"}}
    roles: [chat, planning]
"""
KEY = "sk-canary-4711"


@asynccontextmanager
async def service_with(
    models: ModelServer,
    dsn: str,
    folder: Path,
    patch: pytest.MonkeyPatch,
    *capabilities: dict[str, Any],
    **settings: object,
) -> AsyncIterator[RunningService]:
    """The service, with one model at this server, and these capabilities registered."""
    patch.setenv("TESTS_MODEL_KEY", KEY)
    file = folder / "models.yaml"
    file.write_text(MODELS.format(url=models.url))
    async with running_service(make_settings(models_file=file, **settings), dsn) as service:
        for registration in capabilities:
            response = await service.client.post("/v1/capabilities", json=registration)
            assert response.status_code in (200, 201), response.text
        yield service


@asynccontextmanager
async def shared_models(
    postgres_dsn: str, folder: Path, *capabilities: dict[str, Any], **settings: object
) -> AsyncIterator[tuple[RunningService, ModelServer]]:
    """One service and its models for all tests of a file, on a database of its own; its journal is
    audited when it has stopped."""
    with pytest.MonkeyPatch.context() as patch:
        async with fresh_database(postgres_dsn) as dsn, running_model_server() as models:
            async with service_with(
                models, dsn, folder, patch, *capabilities, **settings
            ) as service:
                yield service, models
            await audit(dsn)
