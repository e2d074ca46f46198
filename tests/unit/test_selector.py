"""The selector of models: what it never does, in which order it looks, and what it says."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.chat import AnswerForm, ChatRole, Message, ModelRole, Prompt, Tool
from app.domain.event_shapes import ModelSelectedData
from app.llm.catalog import Catalog, Model, ProviderAccess
from app.llm.models_file import CostTier, Prices
from app.llm.selector import (
    OUTPUT_TOKENS_GUESSED,
    Need,
    Reason,
    Rejected,
    Selection,
    Why,
    select,
)
from app.llm.tokens import CharacterCounter, projected

PROVIDERS = ("p0", "p1", "p2")
NAMES = tuple(f"m{number}" for number in range(8))


def model(name: str, **given: Any) -> Model:
    """A model that can do everything cheaply, except for what is said."""
    price = Decimal(str(given.pop("price", "1")))
    return Model(
        **{
            "name": name,
            "vendor_name": name,
            "provider": "p0",
            "ctx_window": 10_000,
            "output_tokens_max": 2_000,
            "json_mode": True,
            "function_calling": True,
            "cost_tier": CostTier.LOW,
            "prices": Prices(input_usd_per_mtok=price, output_usd_per_mtok=price),
            "roles": (ModelRole.CHAT,),
            **given,
        }
    )


def catalog_of(
    *models: Model, away: Iterable[str] = (), per_token: Mapping[str, float] | None = None
) -> Catalog:
    """A catalog of these; the providers in `away` are not configured."""
    return Catalog(
        providers={
            name: ProviderAccess(name, "openai", unavailable="KEY is not set" * (name in away))
            for name in PROVIDERS
        },
        models={found.name: found for found in models},
        counters={
            found.name: CharacterCounter((per_token or {}).get(found.name, 4.0)) for found in models
        },
    )


def whys(selection: Selection) -> dict[str, str]:
    return {found.model: found.why for found in selection.rejected}


# --- properties over random catalogs --------------------------------------------------------------


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=len(NAMES)))
    models = [
        model(
            name,
            provider=draw(st.sampled_from(PROVIDERS)),
            ctx_window=draw(st.integers(1, 3_000)),
            output_tokens_max=draw(st.integers(0, 2_000)),
            json_mode=draw(st.booleans()),
            function_calling=draw(st.booleans()),
            cost_tier=draw(st.sampled_from(CostTier)),
            price=draw(st.sampled_from(["0", "0.5", "1", "2"])),
            roles=tuple(draw(st.sets(st.sampled_from(ModelRole), min_size=1))),
        )
        for name in names
    ]
    away = draw(st.sets(st.sampled_from(PROVIDERS), max_size=1))
    per_token = {name: draw(st.sampled_from([1.0, 3.0, 4.0])) for name in names}
    return catalog_of(*models, away=away, per_token=per_token)


some_names = st.lists(st.sampled_from([*NAMES, "nobody"]), max_size=4)
needs = st.builds(
    Need,
    role=st.sampled_from(ModelRole),
    json_mode=st.booleans(),
    function_calling=st.booleans(),
    texts=st.lists(st.integers(0, 6_000).map("x".__mul__), max_size=2).map(tuple),
    output_tokens=st.none() | st.integers(1, 2_500),
    preferred=some_names.map(tuple),
    forbidden=some_names.map(frozenset),
    cost_tier_max=st.sampled_from(CostTier),
)
tried = st.dictionaries(st.sampled_from(NAMES), st.just("tried"), max_size=3)
breakers = st.dictionaries(st.sampled_from(PROVIDERS), st.floats(0.1, 60), max_size=2)


@given(catalogs(), needs, tried, breakers)
def test_the_chosen_model_can_take_the_call(
    catalog: Catalog, need: Need, tried: dict[str, str], breakers: dict[str, float]
) -> None:
    found = select(catalog, need, passed_over=tried, open_breakers=breakers)
    if found.chosen is None:
        return
    chosen = catalog.models[found.chosen]
    assert chosen.json_mode or not need.json_mode
    assert chosen.function_calling or not need.function_calling
    assert need.role in chosen.roles
    assert chosen.cost_tier.rank <= need.cost_tier_max.rank
    assert found.chosen not in need.forbidden
    assert found.chosen not in tried
    assert chosen.provider not in breakers
    assert catalog.unavailable(chosen) == ""
    assert found.projection is not None
    prompt_tokens = catalog.counters[chosen.name](need.texts)
    assert found.projection.prompt_tokens == prompt_tokens
    assert found.projection.tokens == projected(prompt_tokens, found.projection.output_tokens)
    assert found.projection.tokens <= chosen.ctx_window
    assert found.projection.output_tokens <= chosen.output_tokens_max
    if need.output_tokens is not None and need.role is not ModelRole.EMBEDDING:
        assert found.projection.output_tokens == need.output_tokens


@given(catalogs(), needs, tried, breakers, st.randoms(use_true_random=False))
def test_the_order_of_the_catalog_does_not_matter(
    catalog: Catalog,
    need: Need,
    tried: dict[str, str],
    breakers: dict[str, float],
    shuffler: random.Random,
) -> None:
    names = list(catalog.models)
    shuffler.shuffle(names)
    shuffled = replace(catalog, models={name: catalog.models[name] for name in names})

    expected = select(catalog, need, passed_over=tried, open_breakers=breakers)
    assert select(shuffled, need, passed_over=tried, open_breakers=breakers) == expected


@given(catalogs(), needs, tried, breakers)
def test_every_model_is_chosen_or_rejected_or_not_needed(
    catalog: Catalog, need: Need, tried: dict[str, str], breakers: dict[str, float]
) -> None:
    """Without those that were rejected, nothing changes; without the chosen one, another comes."""
    found = select(catalog, need, passed_over=tried, open_breakers=breakers)
    rejected = [one.model for one in found.rejected]

    assert len(rejected) == len(set(rejected))
    assert found.chosen not in rejected
    if found.chosen is None:
        assert set(rejected) == {*catalog.models, *need.preferred}
        assert found.reason is Reason.NO_COMPATIBLE_MODEL
        assert found.projection is None
    else:
        behind = replace(need, preferred=(), forbidden={*need.forbidden, found.chosen})
        second = select(catalog, behind, passed_over=tried, open_breakers=breakers)
        assert second.chosen not in rejected


@given(catalogs(), needs, tried, breakers)
def test_the_reason_says_whether_the_first_choice_was_taken(
    catalog: Catalog, need: Need, tried: dict[str, str], breakers: dict[str, float]
) -> None:
    found = select(catalog, need, passed_over=tried, open_breakers=breakers)
    if found.reason is Reason.PREFERRED:
        assert need.preferred[0] == found.chosen
        assert not found.rejected
    elif found.reason is Reason.CHEAPEST:
        assert not need.preferred
    elif found.reason is Reason.FALLBACK:
        assert found.rejected
    else:
        assert found.chosen is None


@given(catalogs(), needs, tried, breakers)
def test_a_selection_is_the_data_of_its_event(
    catalog: Catalog, need: Need, tried: dict[str, str], breakers: dict[str, float]
) -> None:
    found = select(catalog, need, passed_over=tried, open_breakers=breakers)
    data = ModelSelectedData.model_validate(found.as_dict())
    assert data.model_dump() == found.as_dict()


def test_the_same_need_gives_the_same_choice_a_thousand_times() -> None:
    catalog = catalog_of(*(model(name, price=index % 3) for index, name in enumerate(NAMES)))
    need = Need(texts=("x" * 400,), json_mode=True, preferred=("nobody",))

    assert {select(catalog, need).as_dict()["chosen"] for _ in range(1_000)} == {"m0"}


# --- order ----------------------------------------------------------------------------------------


def test_the_cheapest_tier_comes_first_then_the_price_of_the_call_then_the_name() -> None:
    talkative = Prices(input_usd_per_mtok=Decimal(1), output_usd_per_mtok=Decimal(9))
    attentive = Prices(input_usd_per_mtok=Decimal(3), output_usd_per_mtok=Decimal(1))
    catalog = catalog_of(
        model("a", cost_tier=CostTier.MEDIUM, price=0),
        model("b", prices=talkative),
        model("c", prices=attentive),
        model("d", prices=attentive),
    )
    long_prompt = Need(texts=("x" * 8_000,), output_tokens=10)
    long_answer = Need(texts=("x",), output_tokens=2_000)

    assert select(catalog, long_prompt).chosen == "b"
    assert select(catalog, long_answer).chosen == "c"
    assert select(catalog, replace(long_answer, forbidden={"b", "c", "d"})).chosen == "a"


def test_preferred_models_come_first_in_their_order_whatever_they_cost() -> None:
    catalog = catalog_of(model("cheap"), model("dear", cost_tier=CostTier.HIGH, price=50))

    found = select(catalog, Need(preferred=("dear", "cheap")))
    assert (found.chosen, found.reason, found.rejected) == ("dear", Reason.PREFERRED, ())

    found = select(catalog, Need(preferred=("gone", "dear")))
    assert (found.chosen, found.reason) == ("dear", Reason.FALLBACK)
    assert whys(found) == {"gone": "unknown_model"}


def test_nobody_preferred_is_the_cheapest_even_if_others_could_never_do_it() -> None:
    catalog = catalog_of(
        model("a", json_mode=False), model("b", roles=(ModelRole.CODE,)), model("c", price=2)
    )
    found = select(catalog, Need(json_mode=True))
    assert (found.chosen, found.reason) == ("c", Reason.CHEAPEST)
    assert whys(found) == {"a": "no_json", "b": "wrong_role"}


# --- why ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "need", "why", "numbers"),
    [
        ({"json_mode": False}, Need(json_mode=True), Why.NO_JSON, {}),
        ({"function_calling": False}, Need(function_calling=True), Why.NO_TOOLS, {}),
        ({"roles": (ModelRole.CODE,)}, Need(), Why.WRONG_ROLE, {}),
        ({"provider": "p2"}, Need(), Why.NOT_AVAILABLE, {}),
        ({}, Need(forbidden={"m"}), Why.FORBIDDEN, {}),
        (
            {"cost_tier": CostTier.MEDIUM},
            Need(cost_tier_max=CostTier.LOW),
            Why.TOO_EXPENSIVE,
            {},
        ),
        (
            {},
            Need(output_tokens=2_001),
            Why.OUTPUT_OVERFLOW,
            {"output_tokens": 2_001, "output_tokens_max": 2_000},
        ),
        (
            {"ctx_window": 1_259},
            Need(texts=("x" * 800,), output_tokens=1_000),
            Why.OVERFLOW,
            {"projected_tokens": 1_260, "ctx_window": 1_259},
        ),
        ({"provider": "p1"}, Need(), Why.BREAKER_OPEN, {"retry_after_s": 4.5}),
    ],
)
def test_a_model_that_can_not_is_rejected_with_the_numbers_that_decided(
    flags: dict[str, Any], need: Need, why: Why, numbers: dict[str, float]
) -> None:
    catalog = catalog_of(model("m", **flags), away=["p2"])
    found = select(catalog, need, open_breakers={"p1": 4.5})

    assert found.rejected == (Rejected("m", why, numbers),)
    assert found.chosen is None
    assert found.retry_after_s == numbers.get("retry_after_s")


def test_a_window_that_is_just_filled_is_no_overflow() -> None:
    need = Need(texts=("x" * 800,), output_tokens=1_000)
    found = select(catalog_of(model("m", ctx_window=1_260)), need)
    assert found.chosen == "m"
    assert found.projection is not None
    assert found.projection.tokens == 1_260
    assert found.projection.cost_usd == Decimal("0.0012")


def test_models_passed_over_keep_the_word_of_the_caller() -> None:
    catalog = catalog_of(model("a"), model("b", price=2))
    found = select(catalog, Need(), passed_over={"a": "timeout"})
    assert (found.chosen, found.reason) == ("b", Reason.FALLBACK)
    assert whys(found) == {"a": "timeout"}


def test_only_open_breakers_say_when_to_come_back_and_the_soonest_counts() -> None:
    catalog = catalog_of(
        model("a", provider="p0"), model("b", provider="p1"), model("c", json_mode=False)
    )
    need = Need(json_mode=True)

    found = select(catalog, need, open_breakers={"p0": 9.0, "p1": 2.0})
    assert (found.chosen, found.retry_after_s) == (None, 2.0)
    found = select(catalog, need, open_breakers={"p0": 9.0})
    assert (found.chosen, found.retry_after_s) == ("b", None)
    assert select(catalog, replace(need, forbidden={"a", "b"})).retry_after_s is None


def test_an_answer_without_a_limit_is_taken_for_a_short_one() -> None:
    roomy, tight = model("roomy", price=2), model("tight", output_tokens_max=100)
    found = select(catalog_of(roomy, tight), Need())
    assert found.chosen == "tight"
    assert found.projection is not None
    assert found.projection.output_tokens == 100
    found = select(catalog_of(roomy), Need())
    assert found.projection is not None
    assert found.projection.output_tokens == OUTPUT_TOKENS_GUESSED


def test_an_embedding_has_no_output() -> None:
    embedding = model("e", roles=(ModelRole.EMBEDDING,), output_tokens_max=0, ctx_window=105)
    need = Need(role=ModelRole.EMBEDDING, texts=("x" * 400,))
    assert select(catalog_of(embedding), need).chosen == "e"


def test_an_empty_catalog_has_no_compatible_model() -> None:
    found = select(Catalog(), Need())
    assert (found.chosen, found.rejected) == (None, ())
    assert found.reason is Reason.NO_COMPATIBLE_MODEL


# --- prompts --------------------------------------------------------------------------------------


def test_a_prompt_says_what_it_needs() -> None:
    prompt = Prompt(
        (Message(ChatRole.USER, "plan it"),),
        role=ModelRole.PLANNING,
        form=AnswerForm.JSON,
        schema={"type": "object"},
        tools=(Tool("look_up", "Looks up.", {"type": "object"}),),
        output_tokens_max=300,
        preferred=("a", "b"),
    )
    need = Need.of(prompt)

    assert need == Need(
        role=ModelRole.PLANNING,
        json_mode=True,
        function_calling=True,
        texts=("plan it", "look_up", "Looks up.", '{"type":"object"}', '{"type":"object"}'),
        output_tokens=300,
        preferred=("a", "b"),
    )
    assert "plan it" not in repr(need)
    assert Need.of(prompt, ModelRole.RELIABLE).role is ModelRole.RELIABLE


# --- golden ---------------------------------------------------------------------------------------


def test_golden_a_prompt_that_overflows_falls_back_to_the_next_that_fits() -> None:
    """The cheapest can not hold it, the next gives no JSON, the third can do both."""
    catalog = catalog_of(
        model("small", ctx_window=8_192, price="0.1"),
        model("prose", ctx_window=200_000, json_mode=False, price="0.5"),
        model("wide", ctx_window=200_000, cost_tier=CostTier.MEDIUM, price="2"),
        model("vast", ctx_window=1_000_000, cost_tier=CostTier.HIGH, price="9"),
    )
    need = Need(json_mode=True, texts=("x" * 40_000,), output_tokens=500)

    found = select(catalog, need)

    assert found.as_dict() == {
        "chosen": "wide",
        "reason": "fallback",
        "role": "chat",
        "rejected": [
            {"model": "small", "why": "overflow"},
            {"model": "prose", "why": "no_json"},
        ],
    }
    assert found.rejected[0].numbers == {"projected_tokens": 11_025, "ctx_window": 8_192}
    assert select(catalog, replace(need, texts=("x" * 4_000,))).as_dict() == {
        "chosen": "small",
        "reason": "cheapest",
        "role": "chat",
        "rejected": [],
    }
