"""Plans made anew: what stays, what is planned for the rest, and what is never done twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.domain.capability import CapabilityKind, Effect
from app.domain.envelope import Envelope
from app.domain.errors import Fault, PlanRejected
from app.domain.event_shapes import EVENT_DATA
from app.domain.events import EventType, Level
from app.domain.plan import Author, Bound, OutputSource, Plan, PlanCause
from app.domain.state import RunState
from app.planner.fallback import fallback_plan
from app.planner.handshake import rejected, requested
from app.planner.plan_envelope import output_contract_of
from app.planner.replan import Progress, kept_drafts, made_by, progress_of
from app.registry.image import RegistryImage
from tests.plans import diamond, limited_node, plan_node, plan_of, story_of
from tests.registry_samples import capability, echo, envelope, facet, image_of, node
from tests.replans import BY_POLICY, check_next, first_plan, next_plan, progress_at

DRILL = capability("soil.drill", ["place"], ["soil"])
JUDGE = capability("soil.judge", ["soil"], ["verdict"])
REPORT = capability("farm.report", ["verdict", "place"], ["report"])
IMAGE = image_of(DRILL, JUDGE, REPORT)
ASKED = envelope(inputs={"place": "Dithmarschen"}, output=["report"], policies=BY_POLICY)


def again(
    made: Envelope,
    image: RegistryImage,
    later: RegistryImage | None = None,
    **ended: Any,
) -> tuple[Progress, Plan]:
    """A first plan, how far it came, and the plan after it; it keeps the promises of all plans."""
    progress = progress_at(first_plan(made, image), made, image, policy_id="again", **ended)
    plan = next_plan(made, later or image, progress)
    check_next(plan, progress, made, later or image)
    return progress, plan


def added(progress: Progress, plan: Plan) -> dict[str, str]:
    """Capability by node id, of the nodes that are new."""
    return {i: n.capability_id for i, n in plan.nodes.items() if i not in progress.kept}


class TestProgress:
    def test_without_a_plan_there_is_none(self) -> None:
        assert progress_of(RunState("r", {}), {}, ASKED) is None
        assert kept_drafts(None) == []
        assert made_by(IMAGE, None) == frozenset()

    def test_what_has_a_result_or_an_unknown_outcome_is_kept(self) -> None:
        nodes = [plan_node(i) for i in ("done", "skipped", "unknown", "failed", "next")]
        plan = plan_of(*nodes, limited_node("rare"), plan_node("below", "failed"))
        story = story_of(plan)
        story.skip("skipped")
        story.done("done")
        story.start("unknown")
        story.block("unknown")
        story.fail("failed")
        outputs = {"done": {"a": 1}, "skipped": {}, "other": {}}
        progress = progress_of(story.state, outputs, ASKED)
        assert progress is not None
        assert list(progress.kept) == ["done", "skipped", "unknown"]
        assert progress.kept["unknown"] is plan.nodes["unknown"]
        assert progress.done == {"done", "skipped"}
        assert progress.outputs == {"done": {"a": 1}, "skipped": {}}
        assert progress.failed["failed"]["code"] == "broken"
        assert progress.ready == ("next", "rare")
        assert (progress.cause, progress.policy_id) == (PlanCause.NEXT_GOAL, None)

    def test_who_asks_for_it(self) -> None:
        progress = progress_at(diamond(), ASKED, IMAGE, failed=["A"], policy_id="again")
        assert (progress.cause, progress.policy_id) == (PlanCause.POLICY, "again")
        assert progress.reason == "The ground was too wet."
        asked = requested(1, progress)
        refused = rejected(2, [Fault("CYCLE", "No.")], progress, is_final=True)
        assert asked.data == {
            "attempt": 1,
            "phase": "replan",
            "cause": "policy",
            "policy_id": "again",
        }
        assert (refused.data["final"], refused.level) == (True, Level.ERROR)
        for event in (asked, refused):
            EVENT_DATA[EventType(event.type)].model_validate(event.data)

    def test_an_operator_asks_by_ordering_a_fallback_again(self) -> None:
        plan = fallback_plan(
            *(ASKED, output_contract_of(ASKED, IMAGE), (), None), run_id="r", created_at="now"
        )
        story = story_of(plan)
        story.block("fallback")
        story.retry("fallback")
        progress = progress_of(story.state, {}, ASKED)
        assert progress is not None
        assert (progress.cause, progress.policy_id) == (PlanCause.OPERATOR, None)
        assert not progress.kept
        assert requested(1, progress).data == {"attempt": 1, "phase": "replan", "cause": "operator"}
        assert added(progress, next_plan(ASKED, IMAGE, progress)).keys() == {
            "drill",
            "judge",
            "report",
        }


class TestRest:
    def test_what_is_done_stays_and_the_rest_takes_from_it(self) -> None:
        progress, plan = again(ASKED, IMAGE, done=["drill"], failed=["judge"])
        assert plan.author is Author.REPLAN
        assert (plan.version, plan.created_at) == (2, "later")
        assert added(progress, plan) == {"judge": "soil.judge", "report": "farm.report"}
        assert plan.nodes["judge"].bindings == {"soil": Bound("drill", "/soil")}
        assert plan.nodes["judge"].requires == ("drill",)
        assert plan.nodes["report"].bindings["place"] == Bound("inputs", "/place")

    def test_what_failed_is_avoided_where_there_is_another_way(self) -> None:
        guess = capability("soil.guess", ["place"], ["verdict"], tier=9)
        image = image_of(DRILL, JUDGE, REPORT, guess)
        progress, plan = again(ASKED, image, done=["drill"], failed=["judge"])
        assert added(progress, plan) == {"guess": "soil.guess", "report": "farm.report"}

    def test_even_if_the_caller_prefers_it(self) -> None:
        selection = {"prefer": ["soil.judge"]}
        policies = {**BY_POLICY, "planner": {"selection": selection}}
        made = envelope(inputs={"place": "here"}, output=["report"], policies=policies)
        guess = capability("soil.guess", ["place"], ["verdict"], tier=9)
        image = image_of(DRILL, JUDGE, REPORT, guess)
        progress, plan = again(made, image, done=["drill"], failed=["judge"])
        assert "guess" in added(progress, plan)

    def test_when_all_is_made_nothing_is_added(self) -> None:
        progress, plan = again(ASKED, IMAGE, done=["drill", "judge", "report"])
        assert added(progress, plan) == {}
        assert plan.output == (OutputSource("report", "report", "/report"),)
        assert plan.rationale == "everything that is asked for is made"

    def test_what_is_given_and_asked_for_is_still_passed_through(self) -> None:
        made = envelope(inputs={"place": "here"}, output=["soil", "place"], policies=BY_POLICY)
        progress, plan = again(made, IMAGE, done=["drill"])
        assert added(progress, plan) == {}
        assert [part.source for part in plan.output] == ["drill", "inputs"]

    def test_of_what_is_made_anew_only_what_is_left(self) -> None:
        image = image_of(
            capability("text.polish", ["text"], ["text"]),
            capability("note.edit", ["note"], ["note"]),
            capability("note.check", ["note"], ["note"], tier=3),
            facets=["date"],
        )
        given: dict[str, Any] = {"text": "a", "note": "b", "date": "c"}
        made = envelope(inputs=given, output=["text", "date", "note"], policies=BY_POLICY)
        assert sorted(first_plan(made, image).nodes) == ["edit", "polish"]
        progress, plan = again(made, image, done=["polish"], failed=["edit"])
        assert added(progress, plan) == {"check": "note.check"}
        assert [part.source for part in plan.output] == ["polish", "inputs", "check"]
        progress, plan = again(made, image, done=["polish", "edit"])
        assert added(progress, plan) == {}

    def test_when_nothing_is_done_all_that_is_given_is_made_anew(self) -> None:
        first, second = (
            capability(f"{name}.polish", ["text"], ["text"], tier=tier)
            for name, tier in (("a", 0), ("b", 1))
        )
        made = envelope(
            node("X", capability="a.polish"),
            inputs={"text": "x"},
            output=["text"],
            policies=BY_POLICY,
        )
        progress, plan = again(made, image_of(first, second), failed=["X"])
        assert added(progress, plan) == {"polish": "b.polish"}

    def test_nor_is_a_plan_empty_because_all_that_is_asked_for_is_given(self) -> None:
        made = envelope(node("X"), inputs={"text": "x"}, output=["text"], policies=BY_POLICY)
        polish = capability("text.polish", ["text"], ["text"])
        progress, plan = again(made, image_of(polish, echo()), failed=["X"])
        assert added(progress, plan) == {"polish": "text.polish"}
        with pytest.raises(PlanRejected) as refused:
            again(made, image_of(echo(), facets=["text"]), failed=["X"])
        assert refused.value.faults[0].code == "CAPABILITY_MISSING"

    def test_what_was_to_come_from_a_node_without_facets_is_made_by_one_that_has_them(self) -> None:
        plain = capability(
            "plain", gives={"schema": {"type": "object", "properties": {"soil": {}}}}
        )
        made = envelope(
            *(node("A"), node("B", "A", capability="plain")),
            inputs={"place": "here"},
            output={"schema": {"type": "object", "required": ["soil"]}},
            policies=BY_POLICY,
        )
        progress, plan = again(made, image_of(plain, DRILL, echo()), done=["A"], failed=["B"])
        assert added(progress, plan) == {"drill": "soil.drill"}

    def test_what_is_made_counts_before_what_was_given_wrong(self) -> None:
        inputs = {"place": "here", "soil": 7}
        made = envelope(inputs=inputs, output=["verdict"], policies=BY_POLICY)
        progress, plan = again(made, IMAGE, done=["drill"], failed=["judge"])
        assert added(progress, plan) == {"judge": "soil.judge"}
        assert plan.nodes["judge"].bindings == {"soil": Bound("drill", "/soil")}

    def test_new_ids_do_not_collide_with_each_other(self) -> None:
        image = image_of(
            capability("a.judge", ["place"], ["soil"]),
            capability("b.judge_2", ["soil"], ["verdict"]),
            echo(),
        )
        made = envelope(
            *(node("judge"), node("X", "judge", capability="a.judge")),
            node("Y", "X", capability="b.judge_2"),
            inputs={"place": "here"},
            output=["verdict"],
            policies=BY_POLICY,
        )
        progress, plan = again(made, image, done=["judge"], failed=["X"])
        assert added(progress, plan) == {"judge_2": "a.judge", "judge_2_2": "b.judge_2"}
        assert plan.nodes["judge_2_2"].requires == ("judge_2",)

    def test_ids_are_renamed_where_they_are_taken(self) -> None:
        made = envelope(
            node("drill", capability="soil.drill"),
            node("judge", "drill"),
            node("judge_2", "drill"),
            node("report", "judge", capability="util.broken"),
            inputs={"place": "here"},
            output=["report"],
            policies=BY_POLICY,
        )
        broken = capability("util.broken", ["soil"], ["report", "verdict"], tier=9)
        image = image_of(DRILL, JUDGE, REPORT, broken, echo())
        done = ["drill", "judge", "judge_2"]
        progress, plan = again(made, image, done=done, failed=["report"])
        assert added(progress, plan) == {"judge_3": "soil.judge", "report": "farm.report"}
        assert plan.nodes["report"].bindings["verdict"] == Bound("judge_3", "/verdict")
        assert plan.nodes["report"].requires == ("judge_3",)

    def test_a_long_id_stays_an_id(self) -> None:
        long = "x" * 100
        image = image_of(DRILL, capability(long, ["soil"], ["report"]), echo())
        made = envelope(
            *(node("drill", capability="soil.drill"), node(long, "drill")),
            node("end", capability="farm.report"),
            inputs={"place": "here", "verdict": "good"},
            output=["report"],
            policies=BY_POLICY,
        )
        failing = image_of(*image.capabilities.values(), REPORT)
        progress, plan = again(made, failing, done=["drill", long], failed=["end"])
        assert added(progress, plan) == {"x" * 95 + "_2": long}

    def test_by_the_key_of_a_facet(self) -> None:
        soil = facet("soil", property_key="ph/5")
        drill = capability("drill", ["place"], ["soil"], catalog={"soil": soil})
        judge = capability("judge", ["soil"], ["verdict"], catalog={"soil": soil})
        image = image_of(drill, judge, facets=[soil])
        made = envelope(inputs={"place": "here"}, output=["verdict"], policies=BY_POLICY)
        _, plan = again(made, image, done=["drill"], failed=["judge"])
        assert plan.nodes["judge"].bindings == {"ph/5": Bound("drill", "/ph~15")}

    def test_an_optional_result_counts_only_if_it_is_there(self) -> None:
        perhaps = facet("soil", required_by_default=False)
        drill = capability("drill", ["place"], ["soil", "hole"], catalog={"soil": perhaps})
        image = image_of(drill, JUDGE, facets=["soil"])
        made = envelope(inputs={"place": "here"}, output=["hole"])
        progress = progress_at(first_plan(made, image), made, image, done=["drill"])
        assert made_by(image, progress) == {"hole", "soil"}
        lacking = replace(progress, outputs={"drill": {"hole": "h"}})
        assert made_by(image, lacking) == {"hole"}

    def test_required_capabilities_are_used_once_and_before_all_is_said_to_be_made(self) -> None:
        extra = capability("farm.note", ["place"], ["note"])
        image = image_of(DRILL, JUDGE, REPORT, extra)
        policies = {**BY_POLICY, "planner": {"selection": {"require": ["farm.note"]}}}
        made = envelope(inputs={"place": "here"}, output=["soil"], policies=policies)
        progress, plan = again(made, image, done=["drill"])
        assert added(progress, plan) == {"note": "farm.note"}
        progress, plan = again(made, image, done=["note"], failed=["drill"])
        assert added(progress, plan) == {"drill": "soil.drill"}
        progress, plan = again(made, image, done=["note", "drill"])
        assert added(progress, plan) == {}

    def test_a_freeform_output_is_for_a_goal_graph_or_a_model(self) -> None:
        made = envelope(node("A"), node("B", "A"), policies=BY_POLICY)
        with pytest.raises(PlanRejected) as refused:
            again(made, image_of(echo()), done=["A"], failed=["B"])
        assert refused.value.faults[0].code == "CAPABILITY_MISSING"

    def test_while_no_model_is_up_the_rest_does_without(self) -> None:
        made = capability("soil.ask", ["soil"], ["verdict"])
        llm = made.registration.model_copy(update={"kind": CapabilityKind.LLM})
        asks = replace(made, registration=llm)
        image = image_of(DRILL, asks, capability("soil.measure", ["soil"], ["verdict"], tier=9))
        asked = envelope(inputs={"place": "here"}, output=["verdict"], policies=BY_POLICY)
        progress = progress_at(first_plan(asked, image), asked, image, done=["drill"])
        for models_up, taken in ((True, "soil.ask"), (False, "soil.measure")):
            plan = next_plan(asked, image, progress, models_up=models_up)
            assert list(added(progress, plan).values()) == [taken]


class TestSideEffects:
    """A side effect that happened, or may have, is not caused again by planning anew."""

    PAY = capability("bank.pay", ["place"], ["receipt"], effect=Effect.AT_MOST_ONCE)
    FILE = capability("tax.file", ["receipt"], ["filing"])
    IMAGE = image_of(PAY, FILE, DRILL)

    def test_the_rest_is_planned_around_an_unknown_outcome(self) -> None:
        made = envelope(inputs={"place": "here"}, output=["receipt", "soil"], policies=BY_POLICY)
        progress, plan = again(made, self.IMAGE, unknown=["pay"], failed=["drill"])
        assert list(progress.kept) == ["pay"]
        assert added(progress, plan) == {"drill": "soil.drill"}
        assert plan.output[0] == OutputSource("receipt", "pay", "/receipt")
        progress, plan = again(made, self.IMAGE, unknown=["pay"], done=["drill"])
        assert added(progress, plan) == {}

    def test_what_needs_its_result_can_not_be_assembled(self) -> None:
        made = envelope(inputs={"place": "here"}, output=["filing"], policies=BY_POLICY)
        with pytest.raises(PlanRejected) as refused:
            again(made, self.IMAGE, unknown=["pay"])
        [fault] = refused.value.faults
        assert (fault.code, fault.facet) == ("CAPABILITY_MISSING", "filing")

    def test_unless_something_else_makes_it(self) -> None:
        other = capability("bank.ask", ["place"], ["receipt"], tier=9)
        image = image_of(self.PAY, self.FILE, other)
        made = envelope(inputs={"place": "here"}, output=["filing"], policies=BY_POLICY)
        progress, plan = again(made, image, unknown=["pay"])
        assert added(progress, plan) == {"ask": "bank.ask", "file": "tax.file"}

    def test_a_required_one_counts_as_used(self) -> None:
        policies = {**BY_POLICY, "planner": {"selection": {"require": ["bank.pay"]}}}
        made = envelope(inputs={"place": "here"}, output=["soil"], policies=policies)
        progress, plan = again(made, self.IMAGE, unknown=["pay"], failed=["drill"])
        assert added(progress, plan) == {"drill": "soil.drill"}
