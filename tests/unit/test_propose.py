"""Plans that a model proposes: the handshake, the prompt, and what becomes of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.capability import CapabilityKind
from app.domain.chat import PromptFailed
from app.domain.envelope import Envelope
from app.domain.errors import Fault, PlanRejected
from app.domain.plan import Author, Bound
from app.planner.plan_envelope import output_contract_of
from app.planner.prompt import DRAFT_SCHEMA, draft_of, planning_prompt
from app.planner.shortlist import shortlist
from app.registry.image import RegistryImage
from tests.drafting import Models
from tests.registry_samples import capability, envelope, image_of

DRILL = capability("soil.drill", ["place"], ["soil"])
JUDGE = capability("soil.judge", ["soil"], ["verdict"])
PRICE = capability("market.price", ["place"], ["price"])
GUESS = capability("soil.guess", ["place"], ["verdict"], tier=5)
IMAGE = image_of(DRILL, JUDGE, PRICE, GUESS)
GOOD = {
    "rationale": "drill, then judge",
    "stages": [
        {"stage": "Drill here!", "capability": "soil.drill"},
        {
            "stage": "judge",
            "capability": "soil.judge",
            "requires": ["Drill here!"],
            "inputs": {"soil": {"from": "Drill here!", "pointer": "/soil"}},
            "instructions": "Be brief.",
        },
    ],
}
INVENTED = {"stages": [{"stage": "ask", "capability": "soil.oracle"}]}


def asked(**planner: Any) -> Envelope:
    return envelope(
        inputs={"place": "Dithmarschen"},
        output=["verdict"],
        policies={"planner": {"strategy": "llm", **planner}},
    )


async def test_a_draft_that_holds_is_the_plan() -> None:
    models = Models(GOOD)
    plan = await models.plan(asked(), IMAGE)
    assert plan.author is Author.LLM
    assert list(plan.nodes) == ["Drill_here", "judge"]
    assert plan.nodes["judge"].bindings == {"soil": Bound("Drill_here", "/soil")}
    assert plan.nodes["Drill_here"].bindings == {"place": Bound("inputs", "/place")}
    assert plan.nodes["judge"].text == "Be brief."
    assert plan.rationale == "drill, then judge"
    assert models.handshake() == [("PLAN_REQUESTED", 1, [])]


async def test_a_rejected_draft_goes_back_with_its_diagnostics() -> None:
    models = Models(INVENTED, GOOD)
    assert (await models.plan(asked(), IMAGE)).author is Author.LLM
    assert models.handshake() == [
        ("PLAN_REQUESTED", 1, []),
        ("PLAN_REJECTED", 1, ["CAPABILITY_NOT_REGISTERED"]),
        ("PLAN_REQUESTED", 2, []),
    ]
    first, second = (prompt.messages[1].text for prompt in models.prompts)
    assert "was rejected" not in first
    assert "Plan 1 was rejected; mend it:\n- CAPABILITY_NOT_REGISTERED: no cap" in second


async def test_after_two_rejected_drafts_the_assembler_plans() -> None:
    models = Models(INVENTED, INVENTED)
    plan = await models.plan(asked(), IMAGE)
    assert plan.author is Author.ASSEMBLER
    assert [(name, attempt) for name, attempt, _ in models.handshake()] == [
        *(("PLAN_REQUESTED", 1), ("PLAN_REJECTED", 1)),
        *(("PLAN_REQUESTED", 2), ("PLAN_REJECTED", 2)),
        ("PLAN_REQUESTED", 3),
    ]


@pytest.mark.parametrize("code", ["no_compatible_model", "budget_exhausted", "invalid_json"])
async def test_when_no_model_answers_the_assembler_plans_at_once(code: str) -> None:
    models = Models(PromptFailed(code, "No."))
    assert (await models.plan(asked(), IMAGE)).author is Author.ASSEMBLER
    assert models.handshake() == [
        ("PLAN_REQUESTED", 1, []),
        ("PLAN_REJECTED", 1, [code]),
        ("PLAN_REQUESTED", 2, []),
    ]


async def test_when_nobody_has_a_plan_the_last_reason_is_raised() -> None:
    models = Models(INVENTED, INVENTED)
    with pytest.raises(PlanRejected) as refused:
        await models.plan(asked(), image_of(JUDGE))
    assert [fault.code for fault in refused.value.faults] == ["CAPABILITY_MISSING"]
    assert models.handshake()[-1] == ("PLAN_REQUESTED", 3, [])


@pytest.mark.parametrize("failed", [PromptFailed("timeout", "No."), INVENTED])
async def test_the_assembler_asks_no_model_when_none_answers(
    failed: PromptFailed | Mapping[str, Any],
) -> None:
    made = capability("soil.think", ["place"], ["verdict"])
    llm = made.registration.model_copy(update={"kind": CapabilityKind.LLM})
    plan = await Models(failed, failed).plan(
        asked(), image_of(replace(made, registration=llm), GUESS)
    )
    answers = not isinstance(failed, PromptFailed)
    assert list(plan.nodes) == (["think"] if answers else ["guess"])


async def test_what_a_draft_declares_to_use_is_bounded_too() -> None:
    dear = capability("soil.judge", ["soil"], ["verdict"], cost={"tier": 0, "tokens": 600})
    image = image_of(DRILL, dear, GUESS)
    made = asked(optimisation={"max_tokens": 500}, selection={"prefer": ["soil.guess"]})
    models = Models(GOOD, {"stages": [{"stage": "g", "capability": "soil.guess"}]})
    assert list((await models.plan(made, image)).nodes) == ["g"]
    assert models.handshake()[1] == ("PLAN_REJECTED", 1, ["LIMIT_EXCEEDED"])


@pytest.mark.parametrize(
    ("stages", "code"),
    [
        ([{"stage": "a", "capability": "soil.drill"}] * 2, "DUPLICATE_NODE"),
        (
            [
                {"stage": "a", "capability": "soil.judge", "requires": ["b"]},
                {"stage": "b", "capability": "soil.drill", "requires": ["a"]},
            ],
            "CYCLE",
        ),
        ([{"stage": "a", "capability": "soil.drill", "requires": ["x"]}], "UNKNOWN_NODE"),
        ([{"stage": "a", "capability": "market.price"}], "OUTPUT_FACET_UNCOVERED"),
        ([{"stage": "a", "capability": "soil.judge"}], "INPUT_UNBOUND"),
    ],
)
async def test_whatever_does_not_hold_is_rejected(stages: list[Any], code: str) -> None:
    models = Models({"stages": stages}, GOOD)
    assert (await models.plan(asked(), IMAGE)).author is Author.LLM
    [_, (_, _, codes), _] = models.handshake()
    assert code in codes


async def test_the_policies_bind_a_model_too() -> None:
    models = Models(GOOD, GOOD)
    plan = await models.plan(asked(selection={"forbid": ["soil.drill"]}), IMAGE)
    assert (plan.author, list(plan.nodes)) == (Author.ASSEMBLER, ["guess"])
    assert "SELECTION_CONFLICT" in models.handshake()[1][2]
    assert "soil.drill" not in models.prompts[0].messages[1].text


def prompt_for(made: Envelope, image: RegistryImage = IMAGE) -> str:
    output = output_contract_of(made, image)
    return planning_prompt(made, output, image.active()).messages[1].text


def test_the_prompt_holds_the_envelope_and_the_registry_and_nothing_else() -> None:
    made = asked(directives=["Prefer what is near."], selection={"require": ["soil.drill"]})
    assert prompt_for(made) == (
        f"Objective:\n{made.objective}\n\n"
        "Directives:\n- Prefer what is near.\n\n"
        'Inputs:\n- place: "Dithmarschen"\n\n'
        "Output, as JSON Schema:\n"
        '{"additionalProperties":true,"properties":{"verdict":{"type":"string"}},'
        '"required":["verdict"],"type":"object"}\n\n'
        "Capabilities:\n"
        + "\n".join(
            f"- {found.capability_id}: {found.registration.summary} Takes: {takes}. "
            f"Makes: {makes}. Cost tier {tier}."
            for found, takes, makes, tier in (
                (PRICE, "place", "price", 0),
                (DRILL, "place", "soil", 0),
                (GUESS, "place", "verdict", 5),
                (JUDGE, "soil", "verdict", 0),
            )
        )
        + "\n\nThe plan has to use: soil.drill"
    )


def test_the_prompt_says_what_the_plan_shall_be_best_at() -> None:
    made = asked(optimisation={"objective": "speed"})
    prompt = planning_prompt(made, output_contract_of(made, IMAGE), [DRILL])
    assert "\n\nOptimise for: speed\n\nInputs:" in prompt.messages[1].text


def test_a_long_value_is_shown_shortened() -> None:
    made = envelope(inputs={"place": "x" * 100_000}, output=["verdict"])
    text = prompt_for(made)
    assert "(100002 characters)" in text
    assert len(text) < 2_000


def test_the_shortlist_has_who_could_have_a_part_in_it() -> None:
    def listed(at_hand: Sequence[str], goals: Sequence[str], **lists: Any) -> list[str]:
        selection = asked(selection=lists).policies.planner.selection
        return [c.capability_id for c in shortlist(IMAGE, at_hand, goals, selection, size_max=3)]

    assert listed(["place"], ["verdict"]) == ["soil.drill", "soil.guess", "soil.judge"]
    assert listed(["soil"], ["verdict"]) == ["soil.judge"], "nobody gives a place"
    assert listed(["place"], ["verdict"], forbid=["soil.guess"]) == ["soil.drill", "soil.judge"]
    assert "market.price" in listed(["place"], ["verdict"], prefer=["market.price"])
    assert len(listed(["place"], [])) == 3, "an output in words may need anybody"


def test_who_makes_two_of_the_goals_is_listed_once() -> None:
    image = image_of(capability("soil.both", ["place"], ["verdict", "price"]), JUDGE)
    selection = asked().policies.planner.selection
    found = shortlist(image, ["place"], ["verdict", "price"], selection)
    assert [each.capability_id for each in found] == ["soil.both"]


_names = st.text("ab .-_/ä", min_size=1, max_size=6)


@given(st.lists(_names, min_size=1, max_size=8, unique=True))
def test_every_name_of_a_stage_becomes_a_node_id_of_its_own(names: list[str]) -> None:
    stages = [{"stage": name, "capability": "x", "requires": names[:1]} for name in names]
    draft = draft_of({"stages": stages})
    ids = [node.id for node in draft.nodes]
    assert len(set(ids)) == len(ids)
    assert all(node.requires == [ids[0]] for node in draft.nodes)
    assert "inputs" not in ids


def test_a_stage_called_inputs_is_not_taken_for_the_inputs_of_the_run() -> None:
    bound = {"a": {"from": "inputs", "pointer": "/a"}}
    [node] = draft_of({"stages": [{"stage": "inputs", "capability": "x", "inputs": bound}]}).nodes
    assert node.id == "inputs_2"
    assert node.bindings == {"a": Bound("inputs", "/a")}


PROMPT = """Objective:
test

Special instructions:
- Mind the dikes.
- No drilling at night.

Directives:
- Prefer what is near.

Inputs:
- place: "Dithmarschen"
- notes: "{notes}… (402 characters)
- n: {{"a":[true,null],"b":1}}

Output, as JSON Schema:
{{"additionalProperties":true,"properties":{{"verdict":{{"type":"string"}}}},\
"required":["verdict"],"type":"object"}}

Capabilities:
- market.price: market.price Takes: place. Makes: price. Cost tier 0.
- soil.drill: soil.drill Takes: place. Makes: soil. Cost tier 0.
- soil.guess: soil.guess Takes: place. Makes: verdict. Cost tier 5.
- soil.judge: soil.judge Takes: soil. Makes: verdict. Cost tier 0.

The plan has to use: soil.drill, soil.judge

Plan 1 was rejected; mend it:
- CYCLE: a waits for b
- UNKNOWN_NODE: no c"""


def test_without_a_graph_the_prompt_is_what_it_always_was() -> None:
    """To the byte: answers that are in the cache are found by it."""
    made = envelope(
        inputs={"place": "Dithmarschen", "notes": "x" * 400, "n": {"b": 1, "a": [True, None]}},
        output=["verdict"],
        special_instructions=["Mind the dikes.", "No drilling at night."],
        policies={
            "planner": {
                "directives": ["Prefer what is near."],
                "selection": {"require": ["soil.drill", "soil.judge"]},
            }
        },
    )
    faults = [Fault("CYCLE", "a waits for b"), Fault("UNKNOWN_NODE", "no c")]
    prompt = planning_prompt(
        made, output_contract_of(made, IMAGE), IMAGE.active(), faults, attempt=2
    )
    assert prompt.messages[1].text == PROMPT.format(notes="x" * 299)
    assert prompt.messages[0].text.startswith("You plan work as a directed acyclic graph of")
    assert prompt.schema is DRAFT_SCHEMA
    assert "Ready nodes" not in prompt.messages[1].text
