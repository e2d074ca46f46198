"""Models that plan what is left of a run, or the next goal of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from app.domain.chat import PromptFailed
from app.domain.contract import Contract
from app.domain.envelope import Envelope
from app.domain.errors import Fault, PlanRejected
from app.domain.plan import Author, Bound, Plan
from app.planner.goals import ready_now
from app.planner.plan_envelope import output_contract_of
from app.planner.prompt import planning_prompt, step_prompt
from app.planner.replan import Progress
from tests.drafting import Models
from tests.registry_samples import capability, echo, envelope, image_of, node
from tests.replans import BY_POLICY, check_next, first_plan, progress_at

DRILL = capability("soil.drill", ["place"], ["soil"])
JUDGE = capability("soil.judge", ["soil"], ["verdict"])
PRICE = capability("market.price", ["place"], ["price"])
GUESS = capability("soil.guess", ["place"], ["verdict"], tier=5)
IMAGE = image_of(DRILL, JUDGE, PRICE, GUESS)
INVENTED = {"stages": [{"stage": "ask", "capability": "soil.oracle"}]}
REST = {
    "stages": [
        {"stage": "drill", "capability": "market.price"},
        {"stage": "guess", "capability": "soil.guess", "requires": ["drill"]},
    ]
}
DRILLED = {"node": "A", "capability": "soil.drill"}


def output_of(made: Envelope) -> Contract:
    return output_contract_of(made, IMAGE)


def first_step(made: Envelope) -> Plan:
    """The first version of an open graph: its goal A, done by an echo."""
    graph = made.goal_graph
    assert graph is not None
    named = [graph.nodes[0].model_copy(update={"capability": "util.echo"})]
    alone = made.model_copy(update={"goal_graph": graph.model_copy(update={"nodes": named})})
    return first_plan(alone, image_of(echo()))


class TestReplan:
    """A model plans what is left of a run."""

    MADE = envelope(
        inputs={"place": "Dithmarschen"},
        output=["verdict"],
        policies={"planner": {"strategy": "llm"}, **BY_POLICY},
    )
    PROGRESS = progress_at(
        *(first_plan(MADE, IMAGE), MADE, IMAGE), done=["drill"], failed=["judge"], policy_id="again"
    )

    async def test_what_is_done_stays_and_the_draft_is_of_the_rest(self) -> None:
        models = Models(REST)
        plan = await models.plan(self.MADE, IMAGE, progress=self.PROGRESS)
        check_next(plan, self.PROGRESS, self.MADE, IMAGE)
        assert list(plan.nodes) == ["drill", "drill_2", "guess"]
        assert plan.nodes["guess"].requires == ("drill_2",)
        assert (plan.author, plan.version) == (Author.REPLAN, 2)
        assert models.handshake() == [("PLAN_REQUESTED", 1, [])]
        assert models.told[0].data == {
            "attempt": 1,
            "phase": "replan",
            "cause": "policy",
            "policy_id": "again",
        }

    async def test_a_stage_may_take_from_what_is_done(self) -> None:
        bound = {"soil": {"from": "drill", "pointer": "/soil"}}
        stage = {"stage": "again", "capability": "soil.judge", "inputs": bound}
        plan = await Models({"stages": [stage]}).plan(self.MADE, IMAGE, progress=self.PROGRESS)
        assert plan.nodes["again"].bindings == {"soil": Bound("drill", "/soil")}
        assert plan.nodes["again"].requires == ("drill",)

    async def test_after_two_rejected_drafts_the_rest_is_assembled(self) -> None:
        models = Models(INVENTED, INVENTED)
        plan = await models.plan(self.MADE, IMAGE, progress=self.PROGRESS)
        check_next(plan, self.PROGRESS, self.MADE, IMAGE)
        assert list(plan.nodes) == ["drill", "guess"], "what failed is avoided"
        assert [attempt for _, attempt, _ in models.handshake()] == [1, 1, 2, 2, 3]
        assert {event.data["phase"] for event in models.told} == {"replan"}

    async def test_what_is_made_makes_more_capabilities_callable(self) -> None:
        image = image_of(DRILL, JUDGE)
        made = envelope(
            node("drill", capability="soil.drill", inputs={"place": {"value": "here"}}),
            node("judge", "drill", capability="soil.judge"),
            output=["verdict"],
        )
        progress = progress_at(first_plan(made, image), made, image, done=["drill"])
        models = Models({"stages": [{"stage": "j", "capability": "soil.judge"}]})
        assert "j" in (await models.plan(made, image, progress)).nodes
        assert "- soil.judge:" in models.prompts[0].messages[1].text

    def test_the_prompt_tells_what_is_done_what_failed_and_why(self) -> None:
        unknown = progress_at(self.PROGRESS.plan, self.MADE, IMAGE, unknown=["drill"])
        known = planning_prompt(self.MADE, output_of(self.MADE), (), progress=self.PROGRESS)
        assert known.messages[1].text.endswith(
            "\n\nCapabilities:\n\n"
            "Why the plan is made anew:\nThe ground was too wet.\n\n"
            "Done (never run again; take inputs from these by their names):\n"
            '- drill (soil.drill): {"soil":"soil by drill"}\n\n'
            "Failed:\n- judge (soil.judge): broken\n\n"
            "Ready nodes: none"
        )
        text = planning_prompt(self.MADE, output_of(self.MADE), (), progress=unknown)
        assert text.messages[1].text.endswith(
            "\n\nDone (never run again; take inputs from these by their names):\n"
            "- drill (soil.drill): its outcome is not known\n\n"
            "Ready nodes: none"
        )

    def test_where_nothing_is_done_nothing_is_said_of_it(self) -> None:
        failed = progress_at(self.PROGRESS.plan, self.MADE, IMAGE, failed=["drill"])
        text = planning_prompt(self.MADE, output_of(self.MADE), (), progress=failed)
        assert text.messages[1].text.endswith(
            "\n\nCapabilities:\n\nFailed:\n- drill (soil.drill): broken\n\nReady nodes: none"
        )

    def test_ready_nodes_are_named_and_long_results_are_cut(self) -> None:
        made = envelope(node("A"), node("B", "A"), node("C", "A"), node("D", "B", "C"))
        image = image_of(echo())
        progress = progress_at(first_plan(made, image), made, image, done=["A"])
        progress = replace(progress, outputs={"A": {"a": "x" * 5_000}})
        text = planning_prompt(made, output_of(made), (), progress=progress).messages[1].text
        assert text.endswith("xxx… (5008 characters)\n\nReady nodes: B, C")
        assert 2_000 < len(text) < 3_000


class TestSteps:
    """Goals without capabilities, chosen by a model one at a time."""

    IMAGE = image_of(DRILL, JUDGE, GUESS, echo())
    MADE = envelope(
        {"id": "A", "text": "Drill."},
        {"id": "B", "requires": ["A"]},
        {"id": "C", "requires": ["A"], "text": "Think.", "capability": "util.echo"},
        {"id": "D", "requires": ["B", "C"], "text": "Judge."},
        inputs={"place": "here"},
        output=["verdict"],
    )

    async def test_a_diamond_is_walked_to_its_end(self) -> None:
        answers: list[Mapping[str, Any]] = [
            DRILLED,
            {"node": "B", "capability": "util.echo"},
            {"node": "D", "capability": "soil.judge", "rationale": "It can."},
        ]
        models = Models(*answers)
        progress: Progress | None = None
        versions: list[Plan] = []
        for _ in range(4):
            plan = await models.plan(self.MADE, self.IMAGE, progress)
            if progress is not None:
                check_next(plan, progress, self.MADE, self.IMAGE)
            versions.append(plan)
            progress = progress_at(plan, self.MADE, self.IMAGE, done=list(plan.nodes))
        assert [list(plan.nodes)[-1] for plan in versions] == ["A", "C", "B", "D"]
        authors = [Author.LLM, Author.CALLER, Author.LLM, Author.LLM]
        assert [plan.author for plan in versions] == authors
        assert [len(plan.open_goals) for plan in versions] == [3, 2, 1, 0]
        assert versions[-1].nodes["D"].bindings == {"soil": Bound("A", "/soil")}
        ready = [prompt.messages[1].text.rpartition("\n\n")[2] for prompt in models.prompts]
        assert ready == ["Ready nodes: A", "Ready nodes: B", "Ready nodes: D"]
        assert [name for name, _, _ in models.handshake()] == ["PLAN_REQUESTED"] * 4
        assert [event.data.get("cause") for event in models.told] == [None] + ["next_goal"] * 3

    def test_the_prompt_shows_the_graph_what_is_done_and_what_is_ready(self) -> None:
        made = envelope(
            *({"id": "A"}, {"id": "B", "requires": ["A"]}, {"id": "C", "requires": ["A"]}),
            {"id": "D", "text": "Judge.", "requires": ["B", "C"], "capability": "soil.judge"},
        )
        first = progress_at(first_step(made), made, IMAGE, done=["A"])
        assert made.goal_graph is not None
        ready = ready_now(made.goal_graph, first)
        prompt = step_prompt(
            *(made, output_of(made), [GUESS], ready, [Fault("CYCLE", "No.")]),
            attempt=2,
            progress=first,
        )
        assert prompt.messages[1].text == (
            "Objective:\ntest\n\nInputs:\n\nOutput, as JSON Schema:\n{}\n\nCapabilities:\n"
            "- soil.guess: soil.guess Takes: place. Makes: verdict. Cost tier 5.\n\n"
            "Goal graph:\n- A: \n- B, after A: \n- C, after A: \n"
            "- D, after B, C, by soil.judge: Judge.\n\n"
            "Done (never run again; take inputs from these by their names):\n"
            "- A (util.echo): {}\n\n"
            "Ready nodes: B, C\n\n"
            "Plan 1 was rejected; mend it:\n- CYCLE: No."
        )
        assert prompt.schema is not None
        assert prompt.schema["properties"]["node"] == {"enum": ["B", "C"]}

    async def test_a_node_that_is_not_ready_is_refused(self) -> None:
        models = Models({"node": "D", "capability": "util.echo"})
        with pytest.raises(PlanRejected) as refused:
            await models.plan(self.MADE, self.IMAGE)
        assert [fault.code for fault in refused.value.faults] == ["schema_validation_failed"]
        [prompt] = models.prompts
        assert prompt.faults_of is not None
        answers: list[tuple[Mapping[str, Any], list[tuple[str, str]]]] = [
            ({"node": "D", "capability": "util.echo"}, [("DRAFT_INVALID", "/node")]),
            ({"node": "E", "capability": "util.echo"}, [("DRAFT_INVALID", "/node")]),
            ({"node": "A"}, [("DRAFT_INVALID", "/capability")]),
            (DRILLED, []),
        ]
        for answer, found in answers:
            faults = prompt.faults_of(answer)
            assert [(fault.code, fault.pointer) for fault in faults] == found

    async def test_a_choice_that_does_not_hold_is_sent_back_once(self) -> None:
        models = Models({"node": "A", "capability": "soil.oracle"}, DRILLED)
        assert list((await models.plan(self.MADE, self.IMAGE)).nodes) == ["A"]
        assert models.handshake() == [
            ("PLAN_REQUESTED", 1, []),
            ("PLAN_REJECTED", 1, ["CAPABILITY_NOT_REGISTERED"]),
            ("PLAN_REQUESTED", 2, []),
        ]
        assert "mend it:\n- CAPABILITY_NOT_REGISTERED" in models.prompts[1].messages[1].text

    async def test_nobody_can_choose_instead_of_a_model(self) -> None:
        wrong = {"node": "A", "capability": "soil.oracle"}
        models = Models(wrong, wrong)
        with pytest.raises(PlanRejected) as refused:
            await models.plan(self.MADE, self.IMAGE)
        assert [fault.code for fault in refused.value.faults] == ["CAPABILITY_NOT_REGISTERED"]
        assert models.handshake()[-1] == ("PLAN_REQUESTED", 2, [])
        silent = Models(PromptFailed("timeout", "No."))
        with pytest.raises(PlanRejected) as refused:
            await silent.plan(self.MADE, self.IMAGE)
        assert [fault.code for fault in refused.value.faults] == ["timeout"]
        assert silent.handshake() == [("PLAN_REQUESTED", 1, [])]

    async def test_behind_an_unknown_outcome_no_model_is_asked(self) -> None:
        made = envelope({"id": "A"}, {"id": "B", "requires": ["A"]})
        stuck = progress_at(first_step(made), made, IMAGE, unknown=["A"])
        models = Models()
        with pytest.raises(PlanRejected) as refused:
            await models.plan(made, self.IMAGE, stuck)
        assert [fault.code for fault in refused.value.faults] == ["GOAL_NOT_READY"]
        assert models.handshake() == [("PLAN_REQUESTED", 1, [])]
