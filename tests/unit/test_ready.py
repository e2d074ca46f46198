"""`ready_set`: pending nodes whose requirements are all done and that need not wait."""

from __future__ import annotations

from app.domain.events import BlockReason
from app.domain.ready import ready_set
from app.domain.state import RunState
from tests.plans import diamond, limited_node, plan_node, plan_of, story_of


def test_nothing_is_ready_before_there_is_a_plan() -> None:
    assert ready_set(RunState("r", {})) == []


def test_the_diamond_opens_level_by_level() -> None:
    story = story_of(diamond())
    assert ready_set(story.state) == ["A"]
    story.start("A")
    assert ready_set(story.state) == []
    story.done("A")
    assert ready_set(story.state) == ["B", "C"]
    story.done("C")
    assert ready_set(story.state) == ["B"]
    story.done("B")
    assert ready_set(story.state) == ["D"]
    story.done("D")
    assert ready_set(story.state) == []


def test_limited_nodes_are_ready_too_queue_by_queue() -> None:
    plan = plan_of(
        limited_node("L1"),
        plan_node("A"),
        limited_node("M1", capability="scarce"),
        limited_node("L2"),
        plan_node("B"),
    )
    assert ready_set(story_of(plan).state) == ["A", "B", "L1", "L2", "M1"]


def test_a_node_that_waits_for_its_next_attempt_is_not_ready() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B")))
    story.start("A")
    story.retry("A", 100)
    assert ready_set(story.state) == ["B"]


def test_a_failed_or_unknown_requirement_readies_nobody() -> None:
    story = story_of(
        plan_of(plan_node("A"), plan_node("B"), plan_node("C", "A"), plan_node("D", "B"))
    )
    story.fail("A")
    story.start("B")
    story.block("B", BlockReason.UNKNOWN_OUTCOME)
    assert ready_set(story.state) == []


def test_the_answer_is_the_readers_own() -> None:
    story = story_of(diamond())
    ready_set(story.state).clear()
    assert ready_set(story.state) == ["A"]
