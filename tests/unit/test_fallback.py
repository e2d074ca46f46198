"""The last resort: a plan whose only work is a person's."""

from __future__ import annotations

from app.domain.capability import NodeKind
from app.domain.errors import Fault
from app.domain.plan import Author, OutputSource, Plan
from app.domain.plan_json import plan_as_dict, plan_from_dict
from app.planner.fallback import fallback_plan
from app.planner.plan_envelope import output_contract_of
from app.planner.replan import Progress
from tests.plans import story_of
from tests.registry_samples import capability, envelope, image_of
from tests.replans import first_plan, progress_at

DRILL = capability("soil.drill", ["place"], ["soil"])
JUDGE = capability("soil.judge", ["soil"], ["verdict"])
IMAGE = image_of(DRILL, JUDGE)
ASKED = envelope(inputs={"place": "here"}, output=["verdict"])
FAULTS = tuple(Fault("CYCLE", f"fault {i}") for i in range(9))


def fallback(progress: Progress | None = None, faults: tuple[Fault, ...] = FAULTS) -> Plan:
    return fallback_plan(
        *(ASKED, output_contract_of(ASKED, IMAGE), faults, progress), run_id="r", created_at="now"
    )


def test_a_person_is_asked_for_the_output() -> None:
    plan = fallback()
    [node] = plan.nodes.values()
    assert (plan.version, plan.author) == (1, Author.FALLBACK)
    assert (node.id, node.kind) == ("fallback", NodeKind.FALLBACK)
    assert node.output_facets == ("verdict",)
    assert plan.output == (OutputSource(None, "fallback", ""),)
    assert [step.node_id for step in plan.proof] == [None]
    assert node.text.startswith("No plan was found for: test\n- CYCLE: fault 0\n")
    assert "fault 4" in node.text
    assert "fault 5" not in node.text
    assert plan_from_dict(plan_as_dict(plan)) == plan


def test_the_question_is_of_bearable_length() -> None:
    long = ASKED.model_copy(update={"objective": "x" * 20_000})
    plan = fallback_plan(
        *(long, output_contract_of(long, IMAGE), (), None), run_id="r", created_at="now"
    )
    assert len(plan.nodes["fallback"].text) < 1_000


def test_nobody_calls_it_it_is_asked() -> None:
    state = story_of(fallback()).state
    assert list(state.to_ask) == ["fallback"]
    assert not state.ready


def test_what_is_done_stays_with_its_proof() -> None:
    first = first_plan(ASKED, IMAGE)
    plan = fallback(progress_at(first, ASKED, IMAGE, done=["drill"]))
    assert (plan.version, list(plan.nodes)) == (2, ["drill", "fallback"])
    assert plan.nodes["drill"] is first.nodes["drill"]
    assert [step.node_id for step in plan.proof] == ["drill", None]
    assert plan.children == {"drill": (), "fallback": ()}


def test_a_fallback_that_was_answered_keeps_its_name() -> None:
    earlier = fallback()
    plan = fallback(progress_at(earlier, ASKED, IMAGE, done=["fallback"]))
    assert list(plan.nodes) == ["fallback", "fallback_"]
    assert plan.output == (OutputSource(None, "fallback_", ""),)
