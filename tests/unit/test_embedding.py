"""Embeddings: which model is asked, what is recorded and what is spent."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from app.domain.budget import Spent
from app.domain.chat import Embeddings, PromptFailed
from app.domain.envelope import Budget
from app.domain.event_shapes import EVENT_DATA
from app.domain.events import EventType
from app.ports import Embedded
from tests.llm_kit import MODELS, VECTOR, Desk, answer, busy, refused

VECTORS = """
  near-vectors:
    provider: near
    model: embed-1
    ctx_window: 100
    output_tokens_max: 0
    json_mode: false
    function_calling: false
    cost_tier: low
    prices: {input_usd_per_mtok: "2", output_usd_per_mtok: "0"}
    roles: [embedding]
  far-vectors:
    provider: far
    ctx_window: 1000
    output_tokens_max: 0
    json_mode: false
    function_calling: false
    cost_tier: high
    prices: {input_usd_per_mtok: "3", output_usd_per_mtok: "0"}
    roles: [embedding]
"""


def desk(folder: Path, *vectors: Embeddings | Exception, budget: Budget | None = None) -> Desk:
    """A desk whose near provider answers embeddings like this."""
    found = Desk(folder, [answer("never")], budget=budget, models=MODELS + VECTORS, threshold=3)
    found.near.vectors = list(vectors) or [VECTOR]
    return found


async def test_a_text_goes_to_the_cheapest_and_all_of_it_is_recorded(tmp_path: Path) -> None:
    found = desk(tmp_path)
    embedded = await found.gateway.embed("loam", (), found.asker())
    assert embedded == Embedded("near-vectors", (0.5, 0.25))
    assert found.near.embedded == [("embed-1", ["loam"])]
    assert found.types() == ["MODEL_SELECTED", "LLM_REQUEST", "LLM_RESPONSE"]
    for event in found.told:
        EVENT_DATA[EventType(event.type)].model_validate(event.data)
    data = found.told[-1].data
    assert (data["role"], data["tokens_in"], data["tokens_out"]) == ("embedding", 7, 0)
    assert found.account.spent == Spent(Decimal("0.000014"), 7, 1)
    assert found.account.held == Spent()


async def test_what_the_provider_did_not_count_is_projected(tmp_path: Path) -> None:
    found = desk(tmp_path, Embeddings(((1.0,),)))
    await found.gateway.embed("x" * 40, (), found.asker())
    data = found.told[-1].data
    assert (data["tokens_in"], data["tokens_out"], data["is_estimated"]) == (10, 0, True)


async def test_a_model_that_gives_none_is_tried_again_and_then_followed(tmp_path: Path) -> None:
    found = desk(tmp_path, busy(), VECTOR)
    assert (await found.gateway.embed("loam", (), found.asker())).model == "near-vectors"
    found = desk(tmp_path, refused())
    assert (await found.gateway.embed("loam", (), found.asker())).model == "far-vectors"
    found = desk(tmp_path)
    long = "x" * 2_000  # too much for the cheapest
    assert (await found.gateway.embed(long, (), found.asker())).model == "far-vectors"


@pytest.mark.parametrize(
    ("text", "models", "code"),
    [
        ("loam", ["near-vectors"], "llm_unavailable"),
        ("x" * 2_000, ["near-vectors"], "no_compatible_model"),
        ("loam", ["small"], "no_compatible_model"),
        ("loam", ["nobody"], "no_compatible_model"),
    ],
)
async def test_named_models_are_the_only_ones_that_are_asked(
    text: str, models: list[str], code: str, tmp_path: Path
) -> None:
    found = desk(tmp_path, refused())
    with pytest.raises(PromptFailed) as failed:
        await found.gateway.embed(text, models, found.asker())
    assert failed.value.code == code
    assert found.far.embedded == []


async def test_an_open_breaker_says_when_to_come_back(tmp_path: Path) -> None:
    found = desk(tmp_path, busy())
    with pytest.raises(PromptFailed):  # after three tries, which open the breaker
        await found.gateway.embed("loam", ["near-vectors"], found.asker())
    with pytest.raises(PromptFailed) as failed:
        await found.gateway.embed("loam", ["near-vectors"], found.asker())
    assert failed.value.code == "breaker_open"
    assert failed.value.retry_after_s is not None
    assert len(found.near.embedded) == 3
    assert [transition.scope for transition in found.heard] == ["llm::near"]


async def test_a_budget_holds_for_embeddings_as_well(tmp_path: Path) -> None:
    found = desk(tmp_path, budget=Budget(calls=1))
    await found.gateway.embed("loam", (), found.asker())
    with pytest.raises(PromptFailed) as failed:
        await found.gateway.embed("loam", (), found.asker())
    assert failed.value.code == "budget_exhausted"
    assert found.told[-1].data == {"resource": "calls", "limit": "1", "spent": "1"}
