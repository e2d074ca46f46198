"""A brief by the pack of models: when it is planned, what it asks, what holds of its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from app.adapters.capabilities.outline import outline_of
from app.adapters.capabilities.pack_brief_llm import BRIEF_LLM
from tests.conftest import make_settings
from tests.far_side import answer
from tests.model_server import ModelServer
from tests.model_service import service_with, shared_models
from tests.service import RunningService, running_service
from tests.shared_service import audit, until

EXAMPLE: dict[str, Any] = orjson.loads(
    (Path(__file__).parents[2] / "examples" / "quality.json").read_bytes()
)
DOCUMENT: dict[str, str] = EXAMPLE["inputs"]["document"]
BY_MODELS = {registration.capability_id for registration in BRIEF_LLM}
BY_CODE = {found.removesuffix("_llm") for found in BY_MODELS} | {"document.facts"}
RELEASED = "Northwind 4.2 was released on 3 March 2026."
FORMAT = "The old import format is accepted until 30 September 2026."
INVENTED = "Northwind 4.2 was released on 1 April 2026."

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[RunningService, ModelServer]]:
    folder = tmp_path_factory.mktemp("models")
    async with shared_models(postgres_dsn, folder, llm_cache_days=0) as found:
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


def wish(objective: str | None, **more: Any) -> dict[str, Any]:
    optimisation = {"objective": objective, **more}
    return {**EXAMPLE, "policies": {"planner": {"optimisation": optimisation}}}


def bullet(quote: str, **more: Any) -> dict[str, Any]:
    """As a model gives it: the words are right, the places are not."""
    place = {"section": "Northwind 4.2", "section_id": "s1", "line": 1, "offset": 0}
    return {"text": quote, "quote": quote, **place, **more}


def answers(*drafted: str, kept: tuple[str, ...], **of_kept: Any) -> list[str]:
    """What a model says to the four prompts, in their order."""
    outline = outline_of(DOCUMENT["text"], DOCUMENT["title"], "text/markdown")
    place = {"section": "s1", "line": 1, "offset": 0, "score": 0.9}
    points = [{"text": quote, "quote": quote, **place} for quote in (RELEASED, FORMAT)]
    brief = {"title": "Northwind 4.2", "summary": RELEASED, "facts": []}
    draft = {**brief, "bullets": [bullet(quote) for quote in drafted]}
    checked = {
        **brief,
        "bullets": [bullet(quote, **{"grounded": True, **of_kept}) for quote in kept],
    }
    report = {"bullets_checked": len(drafted), "bullets_grounded": len(kept), "dropped": []}
    said = [
        {"outline": outline},
        {"key_points": points},
        {"draft_brief": draft},
        {"brief": checked, "brief_report": report},
    ]
    return [orjson.dumps(one).decode() for one in said]


def used(run: dict[str, Any]) -> set[str]:
    return {node["capability_id"] for node in run["nodes"]}


async def test_the_example_is_a_brief_that_models_made(
    service: RunningService, models: ModelServer
) -> None:
    models.say(*answers(RELEASED, FORMAT, kept=(RELEASED, FORMAT)))
    run = await service.finished(EXAMPLE)
    assert (run["status"], run["error"]) == ("done", None)
    assert used(run) == BY_MODELS | {"document.facts"}
    assert {node["status"] for node in run["nodes"]} == {"done"}
    assert len(models.requests) == 4
    brief = run["output"]["brief"]
    assert [found["quote"] for found in brief["bullets"]] == [RELEASED, FORMAT]
    for found in brief["bullets"]:
        assert DOCUMENT["text"][found["offset"] :].startswith(found["quote"])
        assert DOCUMENT["text"].splitlines()[found["line"] - 1].startswith(found["quote"])


async def test_each_prompt_is_what_its_capability_is_for(
    service: RunningService, models: ModelServer
) -> None:
    models.say(*answers(RELEASED, kept=(RELEASED,)))
    await service.finished(EXAMPLE)
    for request, registration in zip(models.requests, BRIEF_LLM, strict=True):
        system, user = (message["content"] for message in request.json["messages"])
        assert system.startswith(registration.system_prompt)
        assert "Finalise to this JSON Schema" in system
        assert EXAMPLE["objective"] in user
        assert RELEASED in user


@pytest.mark.parametrize("objective", [None, "token_efficiency", "speed"])
async def test_no_model_is_asked_for_what_code_can_do(
    service: RunningService, models: ModelServer, objective: str | None
) -> None:
    run = await service.finished(wish(objective))
    assert (run["status"], used(run)) == ("done", BY_CODE)
    assert models.requests == []


async def test_a_check_that_breaks_its_contract_is_asked_again_with_what_is_wrong(
    service: RunningService, models: ModelServer
) -> None:
    *before, good = answers(RELEASED, kept=(RELEASED,))
    bad = answers(RELEASED, kept=(RELEASED,), grounded=False)[-1]
    models.say(*before, bad, good)
    run = await service.finished(EXAMPLE)
    assert run["status"] == "done"
    assert len(models.requests) == 5
    told = models.requests[-1].json["messages"][-1]["content"]
    assert "/brief/bullets/0/grounded" in told


async def test_what_a_check_vouches_for_is_held_against_the_document(
    service: RunningService, models: ModelServer
) -> None:
    models.say(*answers(RELEASED, INVENTED, kept=(RELEASED, INVENTED)))
    facets = {"mode": "facets", "facets": ["brief", "brief_report"]}
    run = await service.finished({**EXAMPLE, "output_contract": facets})
    output = run["output"]
    assert [found["quote"] for found in output["brief"]["bullets"]] == [RELEASED]
    assert output["brief_report"] == {
        "bullets_checked": 2,
        "bullets_grounded": 1,
        "dropped": [{"pointer": "/brief/bullets/1", "text": INVENTED, "reason": "quote_not_found"}],
    }


async def test_a_brief_of_which_nothing_holds_fails_its_run(
    service: RunningService, models: ModelServer
) -> None:
    models.say(*answers(INVENTED, kept=(INVENTED,)))
    run = await service.submit(EXAMPLE)
    events = await service.events(run["run_id"])
    [failed] = [event for event in events if event.event == "NODE_FAILED"]
    assert failed.json["data"]["error"]["code"] == "brief_ungrounded"
    assert INVENTED not in failed.data
    assert events[-1].event == "RUN_FAILED"


async def test_a_plan_that_declares_too_many_tokens_is_refused_and_says_so(
    service: RunningService, models: ModelServer
) -> None:
    run = await service.submit(wish("quality", max_tokens=1_000))
    events = await service.events(run["run_id"])
    [rejected] = [event for event in events if event.event == "PLAN_REJECTED"]
    [fault] = rejected.json["data"]["diagnostics"]
    assert fault["code"] == "LIMIT_EXCEEDED"
    assert fault["pointer"] == "/policies/planner/optimisation/max_tokens"
    assert models.requests == []


async def test_of_two_processes_on_one_database_the_one_with_models_uses_them(
    models: ModelServer, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.say(*answers(RELEASED, kept=(RELEASED,)))
    async with running_service(make_settings(), dsn) as without:
        preview = (await without.client.post("/v1/plans/preview", json=EXAMPLE)).json()
        assert {node["capability_id"] for node in preview["nodes"]} == BY_CODE
        run = await without.finished(EXAMPLE)
        assert (run["status"], used(run)) == ("done", BY_CODE)
        revision = without.services.registry.image("default").revision
        async with service_with(models, dsn, tmp_path, monkeypatch) as with_models:
            assert with_models.services.registry.image("default").revision == revision
            run = await with_models.finished(EXAMPLE)
            assert (run["status"], used(run)) == ("done", BY_MODELS | {"document.facts"})
    await audit(dsn)


async def test_while_the_models_are_down_the_next_brief_is_made_without_them(
    models: ModelServer, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.behave(answer(500), answer(500))
    changes = {"cb_threshold": 2, "cb_cooldown_s": 60, "llm_cache_days": 0}
    async with service_with(models, dsn, tmp_path, monkeypatch, **changes) as service:
        first = await service.submit(EXAMPLE)
        blocked = await until(service, first["run_id"], "NODE_BLOCKED")
        assert blocked.json["data"]["reason"] == "breaker_open"
        second = await service.finished(EXAMPLE)
        assert (second["status"], used(second)) == ("done", BY_CODE)
        assert len(models.requests) == 2
        order = {"operator": {"id": "ada"}, "note": "the models are down"}
        cancelled = await service.client.post(f"/v1/runs/{first['run_id']}/cancel", json=order)
        assert cancelled.status_code == 202, cancelled.text
        await until(service, first["run_id"], "RUN_CANCELLED")
    await audit(dsn)
