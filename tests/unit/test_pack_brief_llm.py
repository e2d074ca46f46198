"""The pack of the brief by models: its prompts, its plans, and what is put right in its answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.pack import standard_packs
from app.adapters.capabilities.pack_brief_llm import (
    BRIEF_LLM,
    CHECK,
    COMPOSE,
    KEY_POINTS,
    OUTLINE,
    BriefLlmAdapter,
)
from app.domain.capability import Effect, Registration
from app.domain.chat import Completion, Prompt
from app.domain.errors import PlanRejected
from app.planner.plan_envelope import plan_envelope
from app.ports import CallFailed
from app.registry.image import RegistryImage
from tests.capability_samples import call_of, compiled
from tests.registry_samples import envelope

PACKS = standard_packs(EgressTransport(EgressPolicy()))
FACETS = {facet.name: facet for pack in PACKS for facet in pack.facets()}
BUILTINS = [compiled(one, FACETS.values()) for pack in PACKS for one in pack.registrations()]
MODELS = [compiled(one, FACETS.values()) for one in BRIEF_LLM]
IMAGE = RegistryImage.build(1, FACETS.values(), [*BUILTINS, *MODELS])
BY_MODELS = {one.capability_id for one in BRIEF_LLM}

TEXT = """# Tides

The sea rises twice a day because of the moon.

Spring tides
============

They come with every full moon. The highest was 16.3 metres.
"""
DOCUMENT = {"title": "Tides", "text": TEXT, "media_type": "text/markdown"}
SECTIONS: list[dict[str, Any]] = [
    {"id": "s1", "title": "Tides", "level": 1, "start_line": 1, "end_line": 4},
    {"id": "s2", "title": "Spring tides", "level": 1, "start_line": 5, "end_line": 8},
]
FIRST = "The sea rises twice a day because of the moon."
SECOND = "The highest was 16.3 metres."
INVENTED = "The sea rises three times a day because of the sun."


async def answered(registration: Registration, answer: Any, **inputs: Any) -> dict[str, Any]:
    """What a capability of the pack makes of a model's answer; both fit its contract."""
    capability = compiled(registration, FACETS.values())
    assert capability.output.violations(answer) == []

    async def complete(prompt: Prompt) -> Completion:
        return Completion("m", orjson.dumps(answer).decode(), value=answer)

    inputs = {"document": DOCUMENT, **inputs}
    assert capability.input.violations(inputs) == []
    output = await BriefLlmAdapter().invoke(replace(call_of(capability, inputs), complete=complete))
    assert capability.output.violations(output) == []
    return output


def outline(*sections: dict[str, Any]) -> dict[str, Any]:
    return {"outline": {"title": "Tides", "line_count": 99, "sections": list(sections)}}


def section(title: str, start: int, end: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "id": title[:4],
        "title": title,
        "level": 1,
        "start_line": start,
        "end_line": end,
        **more,
    }


def point(quote: str, **more: Any) -> dict[str, Any]:
    place = {"section": "?", "line": 1, "offset": 0, "score": 0.5}
    return {"text": quote, "quote": quote, **place, **more}


def bullet(quote: str, **more: Any) -> dict[str, Any]:
    place = {"section": "?", "section_id": "?", "line": 1, "offset": 0}
    return {"text": quote, "quote": quote, **place, **more}


def draft(*bullets: dict[str, Any], summary: str = FIRST) -> dict[str, Any]:
    return {"title": "Tides", "summary": summary, "bullets": list(bullets), "facts": []}


class TestRegistrations:
    def test_each_is_pure_dearer_than_code_and_names_no_model(self) -> None:
        for one in BRIEF_LLM:
            assert one.effect is Effect.PURE
            assert one.preferred_models == []
            assert one.cost.tier == 5
            assert (one.cost.tokens or 0) > 4_000
        assert len(BY_MODELS) == 4

    @pytest.mark.parametrize("capability", MODELS, ids=lambda one: one.capability_id)
    def test_prompts_name_every_facet_with_its_meaning(self, capability: Any) -> None:
        assert BriefLlmAdapter().check(capability) == []
        prompt = capability.registration.system_prompt
        for name in capability.output.facets:
            assert FACETS[name].semantics.instruction in prompt

    @pytest.mark.parametrize("capability", MODELS, ids=lambda one: one.capability_id)
    def test_each_makes_what_a_builtin_makes(self, capability: Any) -> None:
        builtin = IMAGE.newest(capability.capability_id.removesuffix("_llm"))
        assert builtin is not None
        assert capability.input.facets == builtin.input.facets
        assert capability.output.facets == builtin.output.facets


class TestPlans:
    def plan(self, objective: str | None, *, models_up: bool = True, **more: Any) -> set[str]:
        optimisation = {"objective": objective, **more}
        made = envelope(
            inputs={"document": DOCUMENT},
            output=["brief"],
            policies={"planner": {"optimisation": optimisation}},
        )
        plan = plan_envelope(made, IMAGE, run_id="r", created_at="now", models_up=models_up)
        return {node.capability_id for node in plan.nodes.values()}

    def test_quality_has_models_do_all_that_models_can(self) -> None:
        assert self.plan("quality") == BY_MODELS | {"document.facts"}

    @pytest.mark.parametrize("objective", [None, "speed", "diversity", "token_efficiency"])
    def test_no_other_objective_asks_one(self, objective: str | None) -> None:
        assert BY_MODELS.isdisjoint(self.plan(objective))

    def test_nor_does_quality_while_none_is_up(self) -> None:
        assert self.plan("quality", models_up=False) == self.plan(None)

    def test_tokens_of_the_plan_are_bounded_by_what_the_pack_declares(self) -> None:
        declared = sum(one.cost.tokens or 0 for one in BRIEF_LLM)
        assert self.plan("quality", max_tokens=declared) >= BY_MODELS
        with pytest.raises(PlanRejected, match=f"declares {declared} tokens"):
            self.plan("quality", max_tokens=declared - 1)


class TestOutline:
    async def test_sections_cover_every_line_once_wherever_the_model_puts_them(self) -> None:
        answer = outline(section("Tides", 2), section("Spring Tides", 4, parent="Tide"))
        made = (await answered(OUTLINE, answer))["outline"]
        assert made["line_count"] == 8
        assert [(s["id"], s["start_line"], s["end_line"]) for s in made["sections"]] == [
            ("s1", 1, 4),
            ("s2", 5, 8),
        ]
        assert made["sections"][1]["parent"] == "s1"

    async def test_a_title_of_the_model_stands_where_it_says_if_that_can_be(self) -> None:
        answer = outline(
            section("Twice a day", 1),
            section("Full moons", 6, parent="nobody"),
            section("Back again", 6),
            section("Beyond the end", 9),
        )
        made = (await answered(OUTLINE, answer))["outline"]["sections"]
        assert [(s["title"], s["start_line"], s["end_line"]) for s in made] == [
            ("Twice a day", 1, 5),
            ("Full moons", 6, 8),
        ]
        assert "parent" not in made[1]

    async def test_one_section_is_left_in_any_case(self) -> None:
        made = (await answered(OUTLINE, outline(section("Lost", 70))))["outline"]["sections"]
        assert [(s["start_line"], s["end_line"]) for s in made] == [(1, 8)]


class TestQuotes:
    OUTLINE = {"outline": {"title": "Tides", "line_count": 8, "sections": SECTIONS}}["outline"]

    async def test_key_points_are_found_or_left_out(self) -> None:
        reworded = point(FIRST, text="Boats sink every winter near the harbour.")
        answer = {"key_points": [point(SECOND), point(INVENTED), reworded, point(FIRST)]}
        made = (await answered(KEY_POINTS, answer, outline=self.OUTLINE))["key_points"]
        assert [(p["quote"], p["section"], p["line"]) for p in made] == [
            (SECOND, "s2", 8),
            (FIRST, "s1", 3),
        ]
        assert all(TEXT[p["offset"] :].startswith(p["quote"]) for p in made)

    async def test_bullets_get_their_places_and_a_wrong_one_is_left_to_the_check(self) -> None:
        answer = {"draft_brief": draft(bullet(SECOND), bullet(INVENTED))}
        given = {"outline": self.OUTLINE, "key_points": [], "facts": []}
        made = (await answered(COMPOSE, answer, **given))["draft_brief"]
        found, wrong = made["bullets"]
        assert (found["section"], found["section_id"], found["line"]) == ("Spring tides", "s2", 8)
        assert TEXT[found["offset"] :].startswith(SECOND)
        assert wrong == bullet(INVENTED)


class TestCheck:
    async def checked(
        self, *kept: dict[str, Any], drafted: int = 2, dropped: int = 0, summary: str = FIRST
    ) -> dict[str, Any]:
        drop = {"pointer": "/bullets/1", "text": INVENTED, "reason": "words_not_in_quote"}
        report = {"bullets_checked": 7, "bullets_grounded": 7, "dropped": [drop] * dropped}
        brief = draft(*({**one, "grounded": True} for one in kept), summary=summary)
        answer = {"brief": brief, "brief_report": report}
        given = draft(*[bullet(FIRST)] * drafted)
        return await answered(CHECK, answer, draft_brief=given)

    async def test_what_the_model_keeps_is_kept_and_what_it_drops_is_told(self) -> None:
        made = await self.checked(bullet(FIRST), dropped=1)
        [kept] = made["brief"]["bullets"]
        assert (kept["line"], TEXT[kept["offset"] :].startswith(FIRST)) == (3, True)
        report = made["brief_report"]
        assert (report["bullets_checked"], report["bullets_grounded"]) == (2, 1)
        assert [drop["pointer"] for drop in report["dropped"]] == ["/bullets/1"]

    async def test_what_the_document_does_not_say_is_not_kept_whoever_vouches_for_it(self) -> None:
        made = await self.checked(bullet(FIRST), bullet(INVENTED), summary=INVENTED)
        assert [one["quote"] for one in made["brief"]["bullets"]] == [FIRST]
        assert made["brief"]["summary"] == FIRST
        assert [(d["pointer"], d["reason"]) for d in made["brief_report"]["dropped"]] == [
            ("/brief/bullets/1", "quote_not_found"),
            ("/brief/summary", "sentence_not_found"),
        ]

    async def test_a_brief_of_nothing_fails_without_words_of_the_model(self) -> None:
        with pytest.raises(CallFailed) as failed:
            await self.checked(bullet(INVENTED), dropped=1)
        assert (failed.value.code, failed.value.retryable) == ("brief_ungrounded", False)
        assert [fault.pointer for fault in failed.value.faults] == [
            "/bullets/1",
            "/brief/bullets/0",
        ]
        assert all("sun" not in fault.message for fault in failed.value.faults)

    async def test_a_draft_without_bullets_has_nothing_to_lose(self) -> None:
        made = await self.checked(drafted=0)
        assert made["brief"]["bullets"] == []

    async def test_the_report_stays_within_its_bounds(self) -> None:
        made = await self.checked(bullet(FIRST), bullet(INVENTED), dropped=200)
        assert len(made["brief_report"]["dropped"]) == 200


async def test_another_version_is_its_owners_and_is_left_as_it_is() -> None:
    other = OUTLINE.model_copy(update={"version": "2.0.0"})
    answer = outline(section("Lost", 70))
    assert await answered(other, answer) == answer
