"""A plan version takes the place of another: what goes on, what begins anew, what is forgotten."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from app.domain.capability import NodeKind
from app.domain.events import BlockReason
from app.domain.plan import Bound, Plan, PlanNode
from app.domain.run import NodeStatus
from app.domain.state import NodeState
from tests.plans import START_MS, Story, diamond, limited_node, plan_node, plan_of, story_of


def _failed() -> Story:
    """A is done, B failed, C below it is blocked, D waits for its retry, U has no known outcome;
    a policy asks for another plan."""
    plan = plan_of(
        plan_node("A"),
        plan_node("B", "A"),
        plan_node("C", "B"),
        plan_node("D"),
        plan_node("U"),
        plan_node("E", "D"),
    )
    story = story_of(plan)
    story.done("A", duration_ms=3.0)
    for node_id in ("D", "U"):
        story.start(node_id)
    story.retry("D", 500)
    story.block("U")
    story.fail("B")
    story.block("C", BlockReason.DEPENDENCY_FAILED)
    story.trigger("p")
    return story


def _next(story: Story, *changed: PlanNode, without: tuple[str, ...] = ()) -> Plan:
    """The next version: the plan in force with these nodes in it, or in the place of others."""
    nodes = {i: node for i, node in story.plan.nodes.items() if i not in without}
    nodes.update((node.id, node) for node in changed)
    return plan_of(*nodes.values(), version=story.plan.version + 1)


def _asked_for(story: Story) -> tuple[str | None, dict[str, int]]:
    """Who waits for another plan, and how often each policy fired."""
    return story.state.replan, story.state.policies_fired


def test_a_policy_asks_until_there_is_a_plan_or_none_at_all() -> None:
    story = _failed()
    assert _asked_for(story) == ("p", {"p": 1})
    story.reject_plan(is_final=False)
    assert _asked_for(story) == ("p", {"p": 1})
    story.reject_plan()
    assert _asked_for(story) == (None, {"p": 1})
    assert story.state.plan is story.plan
    assert (list(story.state.failed), list(story.state.to_block)) == (["B"], [])
    story.trigger("p")
    story.trigger("q")
    story.replan(_next(story))
    assert _asked_for(story) == (None, {"p": 2, "q": 1})


def test_what_is_unchanged_goes_on_in_the_next_version() -> None:
    story = _failed()
    before = deepcopy(story.state.nodes)
    story.replan(_next(story, without=("B", "C")))
    state = story.state
    assert state.plan is story.plan
    assert list(state.nodes) == ["A", "D", "U", "E"]
    assert {i: state.nodes[i] for i in "ADU"} == {i: before[i] for i in "ADU"}
    assert state.waiting == {"D": START_MS + 500}
    assert list(state.blocked) == ["U"]
    assert (state.done_count, state.failed, state.ready) == (1, {}, {})
    assert state.nodes["E"] == NodeState(unmet=1)
    assert state.retired == {"B": (1, 1)}


def test_what_failed_is_tried_again_in_a_round_of_its_own_and_so_is_what_is_below_it() -> None:
    story = _failed()
    story.replan(_next(story))
    state = story.state
    assert state.nodes["B"] == NodeState(attempt=1, round=2, attempts_before_round=1)
    assert state.nodes["C"] == NodeState(unmet=1)
    assert (list(state.ready), list(state.blocked), state.failed) == (["B"], ["U"], {})
    [start] = story.decide().events
    assert (start.node_id, start.attempt, start.data["round"]) == ("B", 2, 2)


def test_a_changed_node_begins_anew_whatever_became_of_it() -> None:
    story = _failed()
    story.replan(_next(story, plan_node("D", timeout_s=9.0), plan_node("E", "D", timeout_s=9.0)))
    state = story.state
    assert state.nodes["D"] == NodeState(attempt=1, round=2, attempts_before_round=1)
    assert state.nodes["E"] == NodeState(unmet=1)
    assert (list(state.ready), state.waiting) == (["B", "D"], {})


@pytest.mark.parametrize(("value", "number"), [(1, 1), (True, 2), (1.0, 2), ("1", 2)])
def test_a_constant_that_python_takes_for_equal_is_another_order(value: Any, number: int) -> None:
    """Else two different calls would have the same idempotency key."""
    story = story_of(plan_of(plan_node("A", bindings={"count": Bound(None, "", 1)})))
    story.start("A")
    story.retry("A", 500)
    story.replan(_next(story, plan_node("A", bindings={"count": Bound(None, "", value)})))
    assert story.node("A").round == number


def test_a_node_that_comes_back_counts_on() -> None:
    story = _failed()
    story.replan(_next(story, without=("B", "C", "E")))
    assert story.state.retired == {"B": (1, 1)}, "what was never called has nothing to count"
    story.replan(_next(story, plan_node("B", "A"), plan_node("E", "D")))
    state = story.state
    assert state.nodes["B"] == NodeState(attempt=1, round=2, attempts_before_round=1)
    assert state.nodes["E"] == NodeState(unmet=1)
    assert state.retired == {}
    story.replan(_next(story, without=("B",)))
    assert state.retired == {"B": (1, 2)}


def test_a_node_that_was_not_started_yet_keeps_its_round_over_versions() -> None:
    story = _failed()
    story.replan(_next(story))
    before = deepcopy(story.node("B"))
    story.replan(_next(story, plan_node("new")))
    assert story.node("B") == before
    assert list(story.state.ready) == ["B", "new"]


def test_a_node_that_waits_for_its_breaker_still_does_in_the_next_version() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B")))
    for node_id in ("A", "B"):
        story.start(node_id)
        story.refuse(node_id, 250)
    story.replan(_next(story, plan_node("B", timeout_s=9.0)))
    state = story.state
    assert (state.waiting, list(state.blocked)) == ({"A": START_MS + 250}, ["A"])
    assert state.nodes["B"] == NodeState(attempt=1, round=2, attempts_before_round=1)
    story.start("A", attempt=2)
    assert (state.waiting, list(state.running)) == ({}, ["A"])


def test_queues_are_those_of_the_next_version() -> None:
    story = story_of(plan_of(limited_node("A"), limited_node("B"), plan_node("C")))
    story.fail("C")
    story.replan(_next(story, plan_node("A"), plan_node("F", kind=NodeKind.FALLBACK)))
    state = story.state
    assert state.ready_limited == {("rare", "1.0.0"): {"B": None}}
    assert (list(state.ready), list(state.to_ask)) == (["A", "C"], ["F"])
    story.replan(_next(story, without=("B", "F", "C")))
    assert (state.ready_limited, list(state.ready), state.to_ask) == ({}, ["A"], {})


def test_a_result_that_was_kept_from_an_earlier_run_stays() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B", "A")))
    story.skip("A")
    story.replan(_next(story, plan_node("C", "A", "B")))
    assert story.node("A").status is NodeStatus.SKIPPED
    assert (story.state.done_count, list(story.state.ready)) == (1, ["B"])
    assert story.node("C").unmet == 1


def test_a_fallback_that_still_waits_is_not_asked_again() -> None:
    story = story_of(plan_of(plan_node("F", kind=NodeKind.FALLBACK)))
    story.block("F", BlockReason.AWAITING_ANSWER)
    story.replan(_next(story, plan_node("C")))
    state = story.state
    assert (state.to_ask, list(state.blocked), list(state.ready)) == ({}, ["F"], ["C"])
    assert story.node("F").reason == BlockReason.AWAITING_ANSWER


def test_planning_time_is_that_of_the_version_in_force() -> None:
    story = story_of(diamond())
    assert story.state.planning_ms == 0.5
    story.replan(_next(story))
    assert story.state.planning_ms is None
