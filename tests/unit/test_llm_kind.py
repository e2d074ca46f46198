"""The kind `llm` alone: what a model is told, what may be registered, what a failure becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from app.adapters.capabilities.llm import LlmAdapter
from app.domain.capability import Capability, Registration
from app.domain.chat import AnswerForm, ChatRole, Completion, ModelRole, Prompt, PromptFailed
from app.domain.facet import Facet
from app.domain.system_prompt import prompt_faults, system_prompt_of
from app.ports import Call, CallFailed, CallRefused
from tests.capability_samples import compiled

FACETS = [
    Facet.model_validate(
        {
            "name": name,
            "title": title,
            "schema": schema,
            "semantics": {"instruction": told},
            "metadata": {"required_by_default": needed},
        }
    )
    for name, title, schema, told, needed in (
        ("soil", "Soil sample", {"type": "object"}, "What the drill brought up.", True),
        ("season", "Season", {"type": "string"}, "When it was taken.", False),
        ("verdict", "Verdict", {"type": "string"}, "One sentence for the farmer.", True),
    )
]


def capability_of(**changes: Any) -> Capability:
    body = {
        "capability_id": "soil.judge",
        "version": "1.0.0",
        "display_name": "a judge of soils",
        "summary": "Says what grows where.",
        "kind": "llm",
        "effect": "pure",
        "input_contract": {"facets": ["soil", "season"]},
        "output_contract": {"facets": ["verdict"]},
        **changes,
    }
    return compiled(Registration.model_validate(body), FACETS)


def call_of(capability: Capability, complete: Callable[[Prompt], Any]) -> Call:
    async def asked(prompt: Prompt) -> Completion:
        found = complete(prompt)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Completion)
        return found

    return Call(
        run_id="r",
        node_id="n",
        attempt=1,
        idempotency_key="r:n:1",
        objective="Find out what to plant",
        instructions="Be brief.",
        inputs={"soil": {"ph": 6}, "season": "spring"},
        deadline_ms=1_000,
        capability=capability,
        complete=asked,
    )


def test_a_made_prompt_tells_every_facet_and_ends_with_the_schema() -> None:
    capability = capability_of()
    assert system_prompt_of(capability) == (
        "You are a judge of soils. Says what grows where.\n"
        "\n"
        "You get:\n"
        "- soil (Soil sample): What the drill brought up.\n"
        "- season (Season), may be missing: When it was taken.\n"
        "\n"
        "You make:\n"
        "- verdict (Verdict): One sentence for the farmer.\n"
        "\n"
        "Finalise to this JSON Schema; answer with one JSON object and nothing else:\n"
        + orjson.dumps(capability.output.schema, option=orjson.OPT_SORT_KEYS).decode()
    )
    assert prompt_faults(capability) == []


@pytest.mark.parametrize(
    ("prompt", "missing"),
    [
        ("From soil and season make the verdict.", []),
        ("From `soil` and the /season, make: verdict", []),
        ("From soil make the verdict.", ["season"]),
        ("From topsoil and seasons make verdicts.", ["soil", "season", "verdict"]),
        ("Do your best.", ["soil", "season", "verdict"]),
    ],
)
def test_a_prompt_of_the_owner_has_to_name_every_facet(prompt: str, missing: list[str]) -> None:
    capability = capability_of(system_prompt=prompt)
    faults = LlmAdapter().check(capability)
    assert [fault.facet for fault in faults] == missing
    assert {fault.pointer for fault in faults} <= {"/system_prompt"}
    assert system_prompt_of(capability).startswith(prompt)
    assert '"verdict"' in system_prompt_of(capability)


def test_a_schema_too_long_to_tell_is_told_by_its_top_level() -> None:
    properties = {
        f"part{n}": {"type": "object", "properties": {"x" * 50: {"type": "string"}}}
        for n in range(200)
    }
    contract = {"schema": {"type": "object", "properties": properties, "required": ["part7"]}}
    prompt = system_prompt_of(capability_of(output_contract=contract))
    told = orjson.loads(prompt.rpartition("\n")[2])
    assert told["properties"]["part7"] == {"type": "object"}
    assert told["required"] == ["part7"]


@pytest.mark.parametrize(
    ("config", "pointers"),
    [
        ({}, []),
        ({"role": "code", "temperature": 0.5, "output_tokens_max": 100}, []),
        ({"role": "boss"}, ["/config/role"]),
        ({"temperature": 3, "url": "http://x"}, ["/config/temperature", "/config/url"]),
    ],
)
def test_faults_of_a_config_are_named(config: dict[str, Any], pointers: list[str]) -> None:
    faults = LlmAdapter().check(capability_of(config=config))
    assert [fault.pointer for fault in faults] == pointers


async def test_a_call_is_one_prompt_and_its_value_the_output() -> None:
    asked: list[Prompt] = []

    def complete(prompt: Prompt) -> Completion:
        asked.append(prompt)
        return Completion("m", '{"verdict": "oats"}', {"verdict": "oats"})

    capability = capability_of(
        config={"role": "code", "temperature": 0}, preferred_models=["large", "small"]
    )
    assert await LlmAdapter().invoke(call_of(capability, complete)) == {"verdict": "oats"}
    [prompt] = asked
    system, told = prompt.messages
    assert (system.role, told.role) == (ChatRole.SYSTEM, ChatRole.USER)
    assert system.text == system_prompt_of(capability)
    assert told.text == (
        "Objective: Find out what to plant\n\nInstructions:\nBe brief.\n\n"
        'Inputs, as JSON:\n{"season":"spring","soil":{"ph":6}}'
    )
    assert (prompt.role, prompt.form) == (ModelRole.CODE, AnswerForm.JSON)
    assert (prompt.temperature, prompt.preferred) == (0, ("large", "small"))
    assert prompt.schema == capability.output.schema
    assert prompt.faults_of is not None
    assert [fault.facet for fault in prompt.faults_of({"verdict": 7})] == ["verdict"]
    assert prompt.faults_of({"verdict": "oats"}) == []


async def test_a_contract_in_words_gives_the_text() -> None:
    capability = capability_of(
        output_contract={"mode": "freeform", "instructions": "A short poem."}
    )
    call = call_of(capability, lambda prompt: Completion("m", "Roses are red."))
    assert await LlmAdapter().invoke(call) == {"text": "Roses are red."}
    assert system_prompt_of(capability).endswith("What it has to be: A short poem.")


@pytest.mark.parametrize("code", ["llm_unavailable", "budget_exhausted", "invalid_json"])
async def test_a_failure_keeps_its_code_and_is_not_repeated(code: str) -> None:
    failed = PromptFailed(code, "Provider x answered 500.")
    with pytest.raises(CallFailed) as caught:
        await LlmAdapter().invoke(call_of(capability_of(), lambda prompt: failed))
    assert (caught.value.code, caught.value.message) == (code, failed.message)
    assert not caught.value.retryable
    assert not caught.value.unknown_outcome


async def test_an_open_breaker_is_waited_for() -> None:
    failed = PromptFailed("breaker_open", "Later.", retry_after_s=12.5)
    with pytest.raises(CallRefused) as caught:
        await LlmAdapter().invoke(call_of(capability_of(), lambda prompt: failed))
    assert caught.value.retry_after_s == 12.5
