"""`apply_resume`: what an operator's answer does to the run that waits for it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from app.domain.events import BlockReason, Event, EventType, Level, error_data
from app.domain.run import NodeStatus, RunStatus
from app.orchestrator.signals import Signal, SignalKind, apply_resume
from tests.plans import Story, plan_node, plan_of, story_of, told

SIGNAL_ID = UUID(int=7)


def _waiting() -> Story:
    """A and B have unknown outcomes, C is done; below A is D."""
    story = story_of(plan_of(plan_node("A"), plan_node("B"), plan_node("C"), plan_node("D", "A")))
    story.done("C")
    story.start("A", attempt=2)
    story.start("B")
    story.block("A")
    story.block("B")
    story.add(*story.decide().events)
    assert story.state.status is RunStatus.AWAITING_HUMAN
    return story


def _signal(story: Story, nodes: dict[str, dict[str, Any]] | None = None, **more: Any) -> Signal:
    body = {"nodes": nodes, "paused_seq": story.state.seq, **more}
    return Signal(SIGNAL_ID, SignalKind.RESUME, body)


def _discarded(story: Story, signal: Signal) -> str:
    seq = story.state.seq
    events, outputs, outcome = apply_resume(story.state, signal)
    assert (events, outputs) == ([], {})
    assert outcome.startswith("discarded: ")
    assert story.state.seq == seq
    return outcome


def test_a_resume_says_who_decided_what() -> None:
    story = _waiting()
    nodes = {"A": {"decision": "retry"}, "B": {"decision": "fail"}}
    signal = _signal(story, nodes, operator="ada", note="seen in the ledger")
    events, outputs, outcome = apply_resume(story.state, signal)
    assert events[0] == Event(
        EventType.RUN_RESUMED,
        {
            "signal_id": str(SIGNAL_ID),
            "operator": "ada",
            "note": "seen in the ledger",
            "nodes": {"A": "retry", "B": "fail"},
        },
    )
    assert (outputs, outcome) == ({}, "applied")
    assert [(event.type, event.node_id) for event in events[1:]] == [
        (EventType.NODE_RETRY, "A"),
        (EventType.NODE_FAILED, "B"),
    ]


def test_a_resume_only_answers_and_leaves_the_state_to_the_events() -> None:
    story = _waiting()
    apply_resume(story.state, _signal(story, {"A": {"decision": "done", "output": {}}}))
    assert story.state.status is RunStatus.AWAITING_HUMAN
    assert story.node("A").status is NodeStatus.BLOCKED


def test_done_supplies_the_output_and_lets_dependants_go_on() -> None:
    story = _waiting()
    nodes = {"A": {"decision": "done", "output": {"said": "so"}}}
    events, outputs, _ = apply_resume(story.state, _signal(story, nodes, operator="ada"))
    assert outputs == {"A": {"said": "so"}}
    assert events[1] == Event(
        EventType.NODE_DONE,
        {"output": {"said": "so"}, "decided_by": "ada"},
        node_id="A",
        attempt=2,
    )
    story.add(*events)
    assert story.node("A").status is NodeStatus.DONE
    assert told(story.decide()) == [("NODE_START", "D")]


@pytest.mark.parametrize("output", [None, 0, "", []])
def test_an_output_may_be_any_value(output: Any) -> None:
    story = _waiting()
    nodes: dict[str, dict[str, Any]] = {"A": {"decision": "done", "output": output}}
    events, outputs, _ = apply_resume(story.state, _signal(story, nodes))
    assert outputs == {"A": output}
    assert events[1].data["output"] == output


def test_retry_orders_a_new_round_at_once() -> None:
    story = _waiting()
    events, outputs, _ = apply_resume(story.state, _signal(story, {"A": {"decision": "retry"}}))
    assert outputs == {}
    assert events[1] == Event(
        EventType.NODE_RETRY,
        {"delay_ms": 0, "round": 2, "error": error_data("reset", "The line went dead.")},
        node_id="A",
        attempt=2,
    )
    story.add(*events)
    [start] = story.decide().events
    assert (start.node_id, start.attempt, start.data["round"]) == ("A", 3, 2)


def test_every_ordered_retry_is_a_round_of_its_own() -> None:
    story = _waiting()
    for number in (2, 3):
        story.add(*apply_resume(story.state, _signal(story, {"A": {"decision": "retry"}}))[0])
        assert story.node("A").round == number
        story.add(*story.decide().events)
        story.block("A")
        story.add(*story.decide().events)
        assert story.state.status is RunStatus.AWAITING_HUMAN


def test_fail_fails_the_node_and_what_depends_on_it() -> None:
    story = _waiting()
    nodes: dict[str, dict[str, Any]] = {
        "A": {"decision": "fail"},
        "B": {"decision": "done", "output": {}},
    }
    events, _, _ = apply_resume(story.state, _signal(story, nodes))
    failed = events[1]
    assert (failed.type, failed.node_id, failed.attempt) == (EventType.NODE_FAILED, "A", 2)
    assert failed.level is Level.ERROR
    assert failed.data["error"]["code"] == "operator_decision"
    story.add(*events)
    assert told(story.decide()) == [("NODE_BLOCKED", "D"), ("RUN_FAILED", None)]


@pytest.mark.parametrize("nodes", [None, {}])
def test_a_resume_without_decisions_changes_no_node(nodes: dict[str, Any] | None) -> None:
    story = _waiting()
    events, outputs, outcome = apply_resume(story.state, _signal(story, nodes))
    assert [event.type for event in events] == [EventType.RUN_RESUMED]
    assert (outputs, outcome, events[0].data["nodes"]) == ({}, "applied", {})
    assert events[0].data["operator"] is None
    story.add(*events)
    assert told(story.decide()) == [("RUN_PAUSED", None)], "the outcomes are still unknown"


def test_a_paused_run_is_resumed_as_well() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.pause(RunStatus.PAUSED)
    events, _, outcome = apply_resume(story.state, _signal(story))
    assert ([event.type for event in events], outcome) == ([EventType.RUN_RESUMED], "applied")


@pytest.mark.parametrize(
    "status",
    [status for status in RunStatus if status.value not in ("awaiting_human", "paused")],
)
def test_a_run_that_does_not_wait_discards_the_answer(status: RunStatus) -> None:
    story = _waiting()
    story.state.status = status
    outcome = _discarded(story, _signal(story, {"A": {"decision": "retry"}}))
    assert status.value in outcome


@pytest.mark.parametrize("off", [-1, 1])
def test_an_answer_to_another_pause_is_discarded(off: int) -> None:
    story = _waiting()
    signal = _signal(story, {"A": {"decision": "retry"}}, paused_seq=story.state.seq + off)
    assert "earlier pause" in _discarded(story, signal)


def test_an_answer_counts_once_even_if_the_run_pauses_again() -> None:
    story = _waiting()
    signal = _signal(story, {"A": {"decision": "retry"}})
    story.add(*apply_resume(story.state, signal)[0])
    _discarded(story, signal)
    story.add(*story.decide().events)
    story.block("A")
    story.add(*story.decide().events)
    assert story.state.status is RunStatus.AWAITING_HUMAN
    assert "earlier pause" in _discarded(story, signal)


@pytest.mark.parametrize("decision", ["done", "retry", "fail"])
@pytest.mark.parametrize("node_id", ["C", "D", "nobody"])
def test_a_decision_about_a_node_that_is_not_blocked_discards_the_whole_answer(
    decision: str, node_id: str
) -> None:
    story = _waiting()
    nodes = {
        "A": {"decision": "done", "output": {}},
        node_id: {"decision": decision, "output": {}},
    }
    assert repr(node_id) in _discarded(story, _signal(story, nodes))


@pytest.mark.parametrize("decision", ["done", "retry", "fail"])
def test_a_node_below_a_failed_one_is_not_for_operators_to_decide(decision: str) -> None:
    """It would start without what it requires. The API refuses this; the run judges it again."""
    story = story_of(plan_of(plan_node("A"), plan_node("B", "A"), plan_node("C")))
    story.start("C")
    story.fail("A")
    story.block("B", BlockReason.DEPENDENCY_FAILED)
    story.block("C")
    story.pause(RunStatus.PAUSED)
    _discarded(story, _signal(story, {"B": {"decision": decision, "output": {}}}))


def test_an_unknown_word_is_refused() -> None:
    story = _waiting()
    with pytest.raises(ValueError, match="perhaps"):
        apply_resume(story.state, _signal(story, {"A": {"decision": "perhaps"}}))
