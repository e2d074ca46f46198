"""The catalog of models and the selection over HTTP, and starts that a wrong file refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from app.adapters.breakers.local import LocalBreakers
from app.adapters.providers.openai import OpenAiProvider
from app.api import models
from app.api.errors import install_error_handlers
from app.bootstrap import open_catalog, open_services
from app.llm.catalog import Catalog
from app.llm.models_file import ModelsInvalid
from app.ports import Permit
from app.settings import Settings
from tests.conftest import make_settings
from tests.service import running_service

CANARY = "canary-91b2"


def entry(provider: str, **given: Any) -> dict[str, Any]:
    return {
        "provider": provider,
        "ctx_window": 8_192,
        "output_tokens_max": 2_000,
        "json_mode": True,
        "function_calling": True,
        "cost_tier": "low",
        "prices": {"input_usd_per_mtok": "0.15", "output_usd_per_mtok": "0.60"},
        "roles": ["chat"],
        **given,
    }


CONTENT: dict[str, Any] = {
    "providers": {
        "far": {
            "kind": "openai",
            "base_url": "http://127.0.0.1:9/v1",
            "key_env": "TEST_FAR_KEY",
            "headers": {"X-Team": CANARY},
        },
        "dear": {"kind": "anthropic", "base_url": "http://127.0.0.1:9", "key_env": "TEST_DEAR_KEY"},
        "here": {"kind": "ollama", "base_url": "http://127.0.0.1:9"},
    },
    "models": {
        "small": entry("far"),
        "wide": entry("here", ctx_window=200_000, cost_tier="medium"),
        "prose": entry("far", json_mode=False, prices={
            "input_usd_per_mtok": "0.05", "output_usd_per_mtok": "0.05"
        }),
        "best": entry("dear", cost_tier="high"),
    },
}  # fmt: skip


def write(folder: Path, content: object) -> Path:
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Four models of three providers, one of which has no key."""
    monkeypatch.setenv("TEST_FAR_KEY", CANARY)
    monkeypatch.delenv("TEST_DEAR_KEY", raising=False)
    return make_settings(models_file=write(tmp_path, CONTENT), envelope_bytes_max=200_000)


@pytest.fixture
def services(settings: Settings) -> SimpleNamespace:
    """What the routes use, without the database that they do not use."""
    return SimpleNamespace(
        settings=settings,
        catalog=open_catalog(settings),
        breakers=LocalBreakers(threshold=1, cooldown_s=30.0, worker_id_of=lambda: "w"),
    )


@pytest.fixture
async def client(services: SimpleNamespace) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.state.services = services
    install_error_handlers(app)
    app.include_router(models.router)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://flexrun") as client:
        yield client


async def chosen(client: httpx.AsyncClient, **need: Any) -> dict[str, Any]:
    response = await client.post("/v1/models/select", json=need)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


# --- the catalog ----------------------------------------------------------------------------------


async def test_the_catalog_shows_flags_prices_and_what_is_missing(
    client: httpx.AsyncClient,
) -> None:
    response = await client.get("/v1/models")

    assert response.status_code == 200
    assert CANARY not in response.text
    assert "127.0.0.1" not in response.text
    body = response.json()
    assert body["next_cursor"] is None
    assert [model["name"] for model in body["models"]] == ["best", "prose", "small", "wide"]
    best, _, small, _ = body["models"]
    assert small == {
        "name": "small",
        "provider": "far",
        "kind": "openai",
        "vendor_name": "small",
        "ctx_window": 8_192,
        "output_tokens_max": 2_000,
        "json_mode": True,
        "function_calling": True,
        "cost_tier": "low",
        "prices": {
            "input_usd_per_mtok": "0.15",
            "output_usd_per_mtok": "0.60",
            "cached_usd_per_mtok": None,
        },
        "roles": ["chat"],
        "available": True,
        "reason": None,
    }
    assert (best["available"], best["reason"]) == (False, "TEST_DEAR_KEY is not set")


async def test_the_catalog_is_paged_by_name(client: httpx.AsyncClient) -> None:
    names: list[str] = []
    params: dict[str, Any] = {"limit": 2}
    for size in (2, 2):
        body = (await client.get("/v1/models", params=params)).json()
        assert len(body["models"]) == size
        names += [model["name"] for model in body["models"]]
        params["cursor"] = body["next_cursor"]
    assert names == ["best", "prose", "small", "wide"]
    assert params["cursor"] is None

    response = await client.get("/v1/models", params={"cursor": "no"})
    assert (response.status_code, response.json()["code"]) == (400, "bad_cursor")


# --- the selection --------------------------------------------------------------------------------


async def test_the_cheapest_that_fits_is_chosen_with_its_numbers(client: httpx.AsyncClient) -> None:
    found = await chosen(client, json_mode=True, text="x" * 4_000, output_tokens=1_000)
    assert found == {
        "chosen": "small",
        "provider": "far",
        "reason": "cheapest",
        "prompt_tokens": 1_000,
        "output_tokens": 1_000,
        "projected_tokens": 2_100,
        "cost_usd": "0.00075",
        "rejected": [{"model": "prose", "why": "no_json", "numbers": {}}],
    }


async def test_an_overflow_falls_back_and_says_by_how_much(client: httpx.AsyncClient) -> None:
    found = await chosen(client, json_mode=True, text="x" * 40_000, output_tokens=500)
    assert (found["chosen"], found["reason"]) == ("wide", "fallback")
    assert found["rejected"] == [
        {"model": "prose", "why": "no_json", "numbers": {}},
        {
            "model": "small",
            "why": "overflow",
            "numbers": {"projected_tokens": 11_025, "ctx_window": 8_192},
        },
    ]


async def test_preferences_and_vetoes_are_heeded(client: httpx.AsyncClient) -> None:
    assert (await chosen(client, preferred=["wide"]))["reason"] == "preferred"
    found = await chosen(client, preferred=["best", "nobody"], forbidden=["prose"], tried=["small"])
    assert found["chosen"] == "wide"
    assert [(one["model"], one["why"]) for one in found["rejected"]] == [
        ("best", "not_available"),
        ("nobody", "unknown_model"),
        ("prose", "forbidden"),
        ("small", "tried"),
    ]


async def test_a_provider_with_an_open_breaker_is_passed_over(
    client: httpx.AsyncClient, services: SimpleNamespace
) -> None:
    scope = services.catalog.providers["far"].breaker_scope
    permit = await services.breakers.allow(scope, "test", 1.0)
    assert isinstance(permit, Permit)
    await services.breakers.report(permit, False, "test")

    found = await chosen(client)

    assert (found["chosen"], found["reason"]) == ("wide", "fallback")
    assert [(one["model"], one["why"]) for one in found["rejected"]] == [
        ("prose", "breaker_open"),
        ("small", "breaker_open"),
    ]
    assert 0 < found["rejected"][0]["numbers"]["retry_after_s"] <= 30

    await services.breakers.reset(scope)
    assert (await chosen(client))["chosen"] == "prose"


async def test_when_nobody_fits_all_are_told_with_the_reason(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/models/select", json={"role": "planning", "text": CANARY})
    body = response.json()
    assert (response.status_code, body["code"]) == (422, "no_compatible_model")
    assert body["rejected"] == [
        {"model": name, "why": "wrong_role", "numbers": {}}
        for name in ("prose", "small", "wide", "best")
    ]
    assert CANARY not in response.text


@pytest.mark.parametrize(
    ("body", "status", "code", "pointer"),
    [
        ({"json_mode": "very"}, 422, "invalid_request", "/json_mode"),
        ({"role": "poet"}, 422, "invalid_request", "/role"),
        ({"output_tokens": 0}, 422, "invalid_request", "/output_tokens"),
        ({"cost_tier_max": "any"}, 422, "invalid_request", "/cost_tier_max"),
        ({"preferred": ["x"] * 101}, 422, "invalid_request", "/preferred"),
        ({"colour": "blue"}, 422, "invalid_request", "/colour"),
        ({"text": "x" * 200_000}, 413, "body_too_large", None),
    ],
)
async def test_a_need_that_is_none_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, code: str, pointer: str | None
) -> None:
    response = await client.post("/v1/models/select", json=body)
    found = response.json()
    assert (response.status_code, found["code"]) == (status, code)
    assert [fault["pointer"] for fault in found["errors"]] == ([pointer] if pointer else [])


# --- the start ------------------------------------------------------------------------------------


async def test_a_service_opens_the_providers_that_can_be_called(
    dsn: str, settings: Settings
) -> None:
    async with running_service(settings, dsn) as service:
        assert set(service.services.providers) == {"far", "here"}
        assert isinstance(service.services.providers["far"], OpenAiProvider)
        body = (await service.client.get("/v1/models")).json()
        assert [model["available"] for model in body["models"]] == [False, True, True, True]


async def test_without_models_nobody_can_be_chosen(
    client: httpx.AsyncClient, services: SimpleNamespace
) -> None:
    services.catalog = Catalog()
    assert (await client.get("/v1/models")).json() == {"models": [], "next_cursor": None}
    response = await client.post("/v1/models/select", json={})
    assert (response.status_code, response.json()["rejected"]) == (422, [])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("models", "small", "json_mode"), "yes", "model small, json_mode"),
        (
            ("providers", "here", "base_url"),
            f"http://user:{CANARY}@h",
            "base_url of provider 'here'",
        ),
        (("providers", "far", "headers"), {"X": f"{CANARY}\n"}, "provider 'far' has a header"),
    ],
)
async def test_a_wrong_file_refuses_the_start_before_anything_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: tuple[str, str, str],
    value: object,
    words: str,
) -> None:
    monkeypatch.setenv("TEST_FAR_KEY", CANARY)
    section, name, field = path
    content = {**CONTENT, section: {**CONTENT[section]}}
    content[section][name] = {**content[section][name], field: value}
    settings = make_settings(models_file=write(tmp_path, content))

    with pytest.raises(ModelsInvalid, match=words) as caught:
        async with open_services(settings, "postgresql://nobody@127.0.0.1:1/none"):
            pass

    assert caught.value.code == "models_invalid"
    assert CANARY not in str(caught.value)


def test_an_empty_variable_is_one_that_is_not_set(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_FAR_KEY", "")
    assert open_catalog(settings).providers["far"].unavailable == "TEST_FAR_KEY is not set"
