"""Goal graphs that name no capabilities: one node at a time, each when its goal is ready."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.envelope import Envelope, GoalGraph
from app.domain.errors import PlanRejected
from app.domain.plan import Author, Bound, Plan, PlanCause
from app.planner.draft import Draft, PlanLimits
from app.planner.goals import (
    check_goals,
    draft_chosen,
    draft_named,
    is_open,
    is_stepwise,
    ready_goals,
    ready_now,
)
from app.planner.plan_envelope import output_contract_of
from app.planner.replan import Progress
from app.planner.verify import verify
from app.registry.image import RegistryImage
from tests.registry_samples import capability, echo, envelope, image_of, node
from tests.replans import check_next, first_plan, next_plan, progress_at

READ = capability("read", ["document"], ["outline"])
WRITE = capability("write", ["outline"], ["brief"])
IMAGE = image_of(echo(), READ, WRITE)
ECHO = {"capability": "util.echo"}


def goal(node_id: str, *requires: str, **more: Any) -> dict[str, Any]:
    """A goal that names no capability."""
    return {"id": node_id, "requires": list(requires), **more}


def graph_of(made: Envelope) -> GoalGraph:
    assert made.goal_graph is not None
    return made.goal_graph


def ids(goals: list[Any]) -> list[str]:
    return [found.id for found in goals]


DIAMOND = envelope(goal("A"), goal("B", "A"), goal("C", "A"), goal("D", "B", "C"))


def proved(
    draft: Draft, made: Envelope, progress: Progress | None, image: RegistryImage = IMAGE
) -> Plan:
    plan = verify(
        *(draft, made, image, output_contract_of(made, image)),
        run_id="r",
        created_at="now",
        limits=PlanLimits(),
        progress=progress,
    )
    if progress is not None:
        check_next(plan, progress, made, image)
    return plan


def step(
    made: Envelope,
    progress: Progress | None,
    node_id: str,
    capability_id: str = "util.echo",
    image: RegistryImage = IMAGE,
    **answer: Any,
) -> Plan:
    """The version that a model's choice leads to."""
    chosen = {"node": node_id, "capability": capability_id, **answer}
    return proved(draft_chosen(graph_of(made), progress, chosen), made, progress, image)


def after(plan: Plan, made: Envelope, image: RegistryImage = IMAGE) -> Progress:
    """Everything that is planned is done."""
    return progress_at(plan, made, image, done=list(plan.nodes))


class TestCheck:
    def codes_of(self, made: Envelope, limits: PlanLimits | None = None) -> list[tuple[str, str]]:
        with pytest.raises(PlanRejected) as refused:
            check_goals(graph_of(made), IMAGE, limits or PlanLimits())
        return [(fault.code, fault.pointer) for fault in refused.value.faults]

    def test_a_graph_is_open_when_a_goal_names_no_capability(self) -> None:
        assert is_open(graph_of(DIAMOND))
        assert is_open(graph_of(envelope(node("A"), goal("B"))))
        assert not is_open(graph_of(envelope(node("A"))))
        check_goals(graph_of(DIAMOND), IMAGE)

    def test_what_can_be_said_before_anything_is_chosen(self) -> None:
        made = envelope(
            goal("A"),
            goal("A", "X"),
            goal("inputs"),
            node("B", "A", capability="nope"),
            goal("C", inputs={"a/b": {"from": "Y"}, "c": {"from": "inputs"}, "d": {"value": 1}}),
        )
        assert self.codes_of(made) == [
            ("DUPLICATE_NODE", "/goal_graph/nodes/1/id"),
            ("UNKNOWN_NODE", "/goal_graph/nodes/1/requires/0"),
            ("RESERVED_NODE_ID", "/goal_graph/nodes/2/id"),
            ("CAPABILITY_NOT_REGISTERED", "/goal_graph/nodes/3/capability"),
            ("UNKNOWN_NODE", "/goal_graph/nodes/4/inputs/a~1b/from"),
        ]

    def test_a_ring_is_named_from_the_goal_written_first(self) -> None:
        made = envelope(goal("D", "A"), goal("B", "A"), goal("C", "B"), goal("A", "C"))
        with pytest.raises(PlanRejected, match="require each other: B → A → C → B") as refused:
            check_goals(graph_of(made), IMAGE)
        [fault] = refused.value.faults
        assert (fault.code, fault.pointer, fault.node_id) == ("CYCLE", "/goal_graph/nodes/1", "B")

    def test_a_ring_through_an_input_and_a_long_one(self) -> None:
        assert self.codes_of(envelope(goal("A", inputs={"x": {"from": "A"}}))) == [
            ("CYCLE", "/goal_graph/nodes/0")
        ]
        ring = envelope(*(goal(f"n{i}", f"n{(i + 1) % 50}") for i in range(50)))
        with pytest.raises(PlanRejected, match=r"n0 → n1 .* n19 → … → n0"):
            check_goals(graph_of(ring), IMAGE)

    def test_there_is_a_limit_and_a_chain_up_to_it_is_legal(self) -> None:
        chain = [goal("n0"), *(goal(f"n{i}", f"n{i - 1}") for i in range(1, 2_000))]
        check_goals(graph_of(envelope(*reversed(chain))), IMAGE)
        two = envelope(goal("A"), goal("B"))
        check_goals(graph_of(two), IMAGE, PlanLimits(nodes_max=2))
        assert self.codes_of(two, PlanLimits(nodes_max=1)) == [
            ("LIMIT_EXCEEDED", "/goal_graph/nodes")
        ]


class TestReady:
    def test_goals_are_ready_when_all_that_they_require_is_done(self) -> None:
        graph = graph_of(DIAMOND)
        assert ids(ready_goals(graph, (), ())) == ["A"]
        assert ids(ready_goals(graph, {"A"}, ())) == []
        assert ids(ready_goals(graph, {"A"}, {"A"})) == ["B", "C"]
        assert ids(ready_goals(graph, {"A", "C"}, {"A", "C"})) == ["B"]
        assert ids(ready_goals(graph, {"A", "B", "C"}, {"A", "B", "C"})) == ["D"]

    def test_a_goal_waits_for_those_that_it_takes_something_from(self) -> None:
        inputs = {"x": {"from": "A"}, "y": {"from": "inputs"}, "z": {"value": 1}}
        graph = graph_of(envelope(goal("A"), goal("B", inputs=inputs)))
        assert ids(ready_goals(graph, (), ())) == ["A"]
        assert ids(ready_goals(graph, {"A"}, {"A"})) == ["B"]

    def test_steps_are_taken_until_every_goal_is_kept(self) -> None:
        assert not is_stepwise(None, None)
        assert not is_stepwise(graph_of(envelope(node("A"))), None)
        made = envelope(goal("A"), goal("B", "A"))
        graph = graph_of(made)
        assert is_stepwise(graph, None)
        first = after(step(made, None, "A"), made)
        assert is_stepwise(graph, first)
        assert not is_stepwise(graph, after(step(made, first, "B"), made))

    def test_nothing_is_ready_behind_an_unknown_outcome(self) -> None:
        made = envelope(goal("A"), goal("B", "A"), goal("C"))
        progress = progress_at(step(made, None, "A"), made, IMAGE, unknown=["A"])
        assert ids(ready_now(graph_of(made), progress)) == ["C"]
        lonely = envelope(goal("A"), goal("B", "A"))
        progress = progress_at(step(lonely, None, "A"), lonely, IMAGE, unknown=["A"])
        with pytest.raises(PlanRejected) as refused:
            ready_now(graph_of(lonely), progress)
        assert [fault.code for fault in refused.value.faults] == ["GOAL_NOT_READY"]

    def test_without_a_model_an_open_graph_is_refused_by_its_goals(self) -> None:
        made = envelope(node("A"), goal("B", "A"), goal("C"))
        with pytest.raises(PlanRejected) as refused:
            first_plan(made, IMAGE)
        assert [(fault.code, fault.pointer) for fault in refused.value.faults] == [
            ("CAPABILITY_MISSING", "/goal_graph/nodes/1"),
            ("CAPABILITY_MISSING", "/goal_graph/nodes/2"),
        ]
        progress = after(step(made, None, "C"), made)
        with pytest.raises(PlanRejected):
            next_plan(made, IMAGE, progress)


class TestSteps:
    @pytest.mark.parametrize("order", ["ABCD", "ACBD"])
    def test_the_middle_of_a_diamond_in_any_order_and_its_end_last(self, order: str) -> None:
        plan = step(DIAMOND, None, order[0])
        for place, node_id in enumerate(order[1:], start=1):
            progress = after(plan, DIAMOND)
            assert progress.cause is PlanCause.NEXT_GOAL
            assert node_id in ids(ready_now(graph_of(DIAMOND), progress))
            plan = step(DIAMOND, progress, node_id)
            assert (plan.version, plan.author) == (place + 1, Author.LLM)
            assert list(plan.nodes) == list(order[: place + 1])
            assert plan.open_goals == tuple(sorted(order[place + 1 :]))
        assert plan.nodes["D"].requires == ("B", "C")
        assert [part.source for part in plan.output] == ["D"]

    def test_what_a_goal_says_of_itself_is_kept_and_the_rest_is_the_models(self) -> None:
        bound = {"in": {"value": 7}}
        made = envelope(
            goal("A", text="Say it.", timeout_s=3, max_attempts=2, inputs=bound), goal("B", "A")
        )
        took = {"x": {"from": "A", "pointer": ""}}
        first = step(made, None, "A", rationale="It echoes.", inputs=took)
        node_a = first.nodes["A"]
        assert (node_a.text, node_a.timeout_s, node_a.max_attempts) == ("Say it.", 3, 2)
        assert node_a.bindings == {"in": Bound(None, "", 7)}, "the caller bound it"
        assert node_a.rationale == "It echoes."
        second = step(made, after(first, made), "B", inputs=took)
        assert second.nodes["B"].bindings == {"x": Bound("A", "")}
        assert (second.nodes["A"], second.nodes["B"].rationale) == (node_a, "")

    def test_what_is_not_bound_is_bound_by_name(self) -> None:
        made = envelope(goal("A"), goal("B", "A"), inputs={"document": "text"}, output=["brief"])
        first = step(made, None, "A", "read")
        assert first.output == ()
        assert all(found.node_id for found in first.proof), "nothing is said of the output"
        plan = step(made, after(first, made), "B", "write", inputs={})
        assert plan.nodes["B"].bindings == {"outline": Bound("A", "/outline")}
        assert plan.proof[: len(first.proof)] == first.proof
        assert plan.output[0].source == "B"

    def test_the_last_version_has_to_give_the_output(self) -> None:
        made = envelope(goal("A"), goal("B", "A"), inputs={"document": "text"}, output=["brief"])
        progress = after(step(made, None, "A", "read"), made)
        with pytest.raises(PlanRejected) as refused:
            step(made, progress, "B", "util.echo")
        assert [fault.code for fault in refused.value.faults] == ["OUTPUT_FACET_UNCOVERED"]

    def test_what_the_policies_require_may_come_with_any_goal(self) -> None:
        selection = {"require": ["write"], "forbid": ["read"]}
        made = envelope(
            *(goal("A"), goal("B", "A")),
            inputs={"outline": "text"},
            policies={"planner": {"selection": selection}},
        )
        progress = after(step(made, None, "A"), made)
        assert step(made, progress, "B", "write").open_goals == ()
        with pytest.raises(PlanRejected) as refused:
            step(made, progress, "B")
        assert [fault.code for fault in refused.value.faults] == ["SELECTION_CONFLICT"]
        with pytest.raises(PlanRejected) as refused:
            step(made, None, "A", "read", inputs={"document": {"from": "inputs", "pointer": ""}})
        assert refused.value.faults[0].code == "SELECTION_CONFLICT"

    def test_goals_that_name_their_capability_need_nobody_to_choose(self) -> None:
        made = envelope(node("A"), node("B"), goal("C", "A", "B"), node("D", "C"))
        graph = graph_of(made)
        draft = draft_named(graph, None)
        assert draft is not None
        plan = proved(draft, made, None)
        assert (list(plan.nodes), plan.open_goals) == (["A", "B"], ("C", "D"))
        assert plan.author is Author.CALLER
        progress = after(plan, made)
        assert draft_named(graph, progress) is None
        progress = after(step(made, progress, "C"), made)
        draft = draft_named(graph, progress)
        assert draft is not None
        last = proved(draft, made, progress)
        assert (last.author, last.open_goals, list(last.nodes)[-1]) == (Author.CALLER, (), "D")

    def test_a_goal_that_failed_is_open_again(self) -> None:
        made = envelope(
            goal("A"),
            goal("B", "A"),
            inputs={"document": "text"},
            policies={"runtime": [ON_FAILED]},
        )
        progress = after(step(made, None, "A"), made)
        plan = step(made, progress, "B", "read")
        failed = progress_at(plan, made, IMAGE, done=["A"], failed=["B"], policy_id="again")
        assert ids(ready_now(graph_of(made), failed)) == ["B"]
        again = step(made, failed, "B")
        assert (again.version, again.author) == (3, Author.REPLAN)
        assert again.nodes["B"].capability_id == "util.echo"


ON_FAILED = {"id": "again", "trigger": {"kind": "on_node_failed"}, "action": {"kind": "replan"}}


@settings(max_examples=60)
@given(st.integers(0, 1_000_000))
def test_any_graph_is_walked_to_its_end(seed: int) -> None:
    """Whatever is chosen of what is ready, every goal is planned once, after those it waits for."""
    rng = random.Random(seed)
    count = rng.randint(1, 7)
    goals = []
    for place in range(count):
        earlier = [f"n{i}" for i in range(place)]
        found = goal(f"n{place}", *rng.sample(earlier, min(place, rng.randint(0, 2))))
        if earlier and rng.random() < 0.3:
            found["inputs"] = {"x": {"from": rng.choice(earlier), "pointer": ""}}
        goals.append(found | (ECHO if rng.random() < 0.3 else {}))
    rng.shuffle(goals)
    made = envelope(*goals, goal("end", *(found["id"] for found in goals)))
    graph = graph_of(made)
    check_goals(graph, IMAGE)
    plans: list[Plan] = []
    progress: Progress | None = None
    while is_stepwise(graph, progress):
        draft = draft_named(graph, progress)
        if draft is None:
            node_id = rng.choice(ids(ready_now(graph, progress)))
            draft = draft_chosen(graph, progress, {"node": node_id, **ECHO})
        plans.append(proved(draft, made, progress))
        planned = plans[-1].nodes.keys()
        assert set(plans[-1].open_goals) == {found.id for found in graph.nodes} - planned
        progress = after(plans[-1], made)
    assert plans[-1].nodes.keys() == {found.id for found in graph.nodes}
    assert [part.source for part in plans[-1].output] == ["end"]
