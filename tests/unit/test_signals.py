"""`apply_signal`: what cancel, pause and resume do to a run, and what comes too late."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from app.domain.capability import Effect, NodeKind
from app.domain.event_shapes import EVENT_DATA
from app.domain.events import BlockReason, Event, EventType, Level, error_data
from app.domain.run import NodeStatus, RunStatus
from app.domain.signals import Applied, Signal, SignalKind, apply_signal, uncertain_nodes
from app.domain.state import RunState
from tests.plans import Story, plan_node, plan_of, story_of, told

SIGNAL_ID = UUID(int=7)
RUN_ID = UUID(int=1)


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
    return Signal(SIGNAL_ID, RUN_ID, SignalKind.RESUME, body)


ADA = {"id": "ada", "display_name": None, "email": None}


def _order(kind: SignalKind, **body: Any) -> Signal:
    """A cancel or a pause."""
    return Signal(SIGNAL_ID, RUN_ID, kind, body)


def _one_of_each() -> Story:
    """Six nodes, each somewhere else; `once` and `unsure` may have had an effect."""
    once = Effect.AT_MOST_ONCE
    plan = plan_of(
        plan_node("done"),
        plan_node("failed"),
        plan_node("repeatable"),
        plan_node("once", effect=once),
        plan_node("unsure", effect=once),
        plan_node("refused", effect=once),
        plan_node("waiting", effect=once),
        plan_node("below", "failed"),
        plan_node("ready", effect=once),
    )
    story = story_of(plan)
    story.done("done")
    story.fail("failed")
    for node_id in ("repeatable", "once", "unsure", "refused", "waiting"):
        story.start(node_id)
    story.block("unsure")
    story.refuse("refused", 900)
    story.retry("waiting", 900)
    story.block("below", BlockReason.DEPENDENCY_FAILED)
    return story


def _discarded(story: Story, signal: Signal) -> str:
    seq = story.state.seq
    applied = apply_signal(story.state, signal)
    assert applied == Applied(applied.outcome)
    outcome = applied.outcome
    assert outcome.startswith("discarded: ")
    assert story.state.seq == seq
    return outcome


def test_a_resume_says_who_decided_what() -> None:
    story = _waiting()
    nodes = {"A": {"decision": "retry"}, "B": {"decision": "fail"}}
    signal = _signal(story, nodes, operator="ada", note="seen in the ledger")
    applied = apply_signal(story.state, signal)
    events, outputs, outcome = applied.events, applied.outputs, applied.outcome
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
    apply_signal(story.state, _signal(story, {"A": {"decision": "done", "output": {}}}))
    assert story.state.status is RunStatus.AWAITING_HUMAN
    assert story.node("A").status is NodeStatus.BLOCKED


def test_done_supplies_the_output_and_lets_dependants_go_on() -> None:
    story = _waiting()
    nodes = {"A": {"decision": "done", "output": {"said": "so"}}}
    applied = apply_signal(story.state, _signal(story, nodes, operator="ada"))
    events, outputs = applied.events, applied.outputs
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
    applied = apply_signal(story.state, _signal(story, nodes))
    events, outputs = applied.events, applied.outputs
    assert outputs == {"A": output}
    assert events[1].data["output"] == output


def test_retry_orders_a_new_round_at_once() -> None:
    story = _waiting()
    applied = apply_signal(story.state, _signal(story, {"A": {"decision": "retry"}}))
    events, outputs = applied.events, applied.outputs
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
        story.add(*apply_signal(story.state, _signal(story, {"A": {"decision": "retry"}})).events)
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
    events = apply_signal(story.state, _signal(story, nodes)).events
    failed = events[1]
    assert (failed.type, failed.node_id, failed.attempt) == (EventType.NODE_FAILED, "A", 2)
    assert failed.level is Level.ERROR
    assert failed.data["error"]["code"] == "operator_decision"
    story.add(*events)
    assert told(story.decide()) == [("NODE_BLOCKED", "D"), ("RUN_FAILED", None)]


@pytest.mark.parametrize("nodes", [None, {}])
def test_a_resume_without_decisions_changes_no_node(nodes: dict[str, Any] | None) -> None:
    story = _waiting()
    applied = apply_signal(story.state, _signal(story, nodes))
    events, outputs, outcome = applied.events, applied.outputs, applied.outcome
    assert [event.type for event in events] == [EventType.RUN_RESUMED]
    assert (outputs, outcome, events[0].data["nodes"]) == ({}, "applied", {})
    assert events[0].data["operator"] is None
    story.add(*events)
    assert told(story.decide()) == [("RUN_PAUSED", None)], "the outcomes are still unknown"


def test_a_paused_run_is_resumed_as_well() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.pause(RunStatus.PAUSED)
    applied = apply_signal(story.state, _signal(story))
    events, outcome = applied.events, applied.outcome
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
    story.add(*apply_signal(story.state, signal).events)
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


def _asked() -> Story:
    """A person was asked about F, which B requires; A has no known outcome."""
    plan = plan_of(plan_node("A"), plan_node("F", kind=NodeKind.FALLBACK), plan_node("B", "F"))
    story = story_of(plan)
    story.start("A")
    story.block("A")
    story.add(*story.decide().events)
    assert story.state.status is RunStatus.AWAITING_HUMAN
    return story


def test_the_answer_of_a_person_is_the_output_of_a_fallback() -> None:
    story = _asked()
    nodes = {"F": {"decision": "done", "output": {"said": "so"}}}
    applied = apply_signal(story.state, _signal(story, nodes, operator="ada"))
    assert applied.outputs == {"F": {"said": "so"}}
    assert applied.events[1] == Event(
        EventType.NODE_DONE,
        {"output": {"said": "so"}, "decided_by": "ada"},
        node_id="F",
        attempt=1,
    )
    story.add(*applied.events)
    assert told(story.decide()) == [("NODE_START", "B")]


def test_to_retry_a_fallback_is_to_plan_again() -> None:
    story = _asked()
    nodes: dict[str, dict[str, Any]] = {
        "A": {"decision": "done", "output": {}},
        "F": {"decision": "retry"},
    }
    story.add(*apply_signal(story.state, _signal(story, nodes)).events)
    decision = story.decide()
    assert (told(decision), decision.plan) == ([], True)
    assert story.state.replan == ""
    story.reject_plan()
    assert told(story.decide()) == [("NODE_BLOCKED", "F"), ("RUN_PAUSED", None)]


def test_a_fallback_without_an_answer_fails_the_run() -> None:
    story = _asked()
    nodes: dict[str, dict[str, Any]] = {
        "A": {"decision": "done", "output": {}},
        "F": {"decision": "fail"},
    }
    story.add(*apply_signal(story.state, _signal(story, nodes)).events)
    assert told(story.decide()) == [("NODE_BLOCKED", "B"), ("RUN_FAILED", None)]


def test_only_a_fallback_that_was_asked_is_decided_upon() -> None:
    story = story_of(plan_of(plan_node("F", kind=NodeKind.FALLBACK), plan_node("A")))
    story.pause(RunStatus.PAUSED)
    outcome = _discarded(story, _signal(story, {"F": {"decision": "fail"}}))
    assert "'F' does not wait" in outcome


def test_a_question_is_not_an_effect_that_may_have_happened() -> None:
    assert uncertain_nodes(_asked().state) == ["A"]
    [event] = apply_signal(_asked().state, _order(SignalKind.CANCEL)).events
    assert event.data["unfinished_nodes"] == ["A", "F", "B"]
    assert event.data["unknown_outcomes"] == ["A"]


def test_an_unknown_word_is_refused() -> None:
    story = _waiting()
    with pytest.raises(ValueError, match="perhaps"):
        apply_signal(story.state, _signal(story, {"A": {"decision": "perhaps"}}))


# Cancel


def test_a_cancel_ends_the_run_and_says_who_wanted_it_and_what_is_left() -> None:
    story = _one_of_each()
    applied = apply_signal(
        story.state, _order(SignalKind.CANCEL, operator=ADA, note="wrong document")
    )
    assert applied == Applied(
        events=[
            Event(
                EventType.RUN_CANCELLED,
                {
                    "signal_id": str(SIGNAL_ID),
                    "operator": ADA,
                    "note": "wrong document",
                    "unfinished_nodes": [
                        *("repeatable", "once", "unsure", "refused", "waiting", "below", "ready"),
                    ],
                    "unknown_outcomes": ["once", "unsure"],
                },
                level=Level.WARN,
            )
        ]
    )
    story.add(*applied.events)
    assert story.state.status is RunStatus.CANCELLED
    assert told(story.decide()) == []


def test_a_run_without_a_plan_is_cancelled_with_nothing_left() -> None:
    [event] = apply_signal(RunState("r", {}), _order(SignalKind.CANCEL)).events
    assert (event.data["unfinished_nodes"], event.data["unknown_outcomes"]) == ([], [])
    assert (event.data["operator"], event.data["note"]) == (None, None)


@pytest.mark.parametrize("status", [status for status in RunStatus if not status.is_terminal])
def test_every_open_run_can_be_cancelled(status: RunStatus) -> None:
    story = _waiting()
    story.state.status = status
    applied = apply_signal(story.state, _order(SignalKind.CANCEL))
    assert (applied.outcome, [event.type for event in applied.events]) == (
        "applied",
        [EventType.RUN_CANCELLED],
    )


# Pause


def test_a_pause_names_what_still_runs_and_starts_nothing_more() -> None:
    story = _one_of_each()
    applied = apply_signal(story.state, _order(SignalKind.PAUSE, operator=ADA, note="lunch"))
    assert (applied.outcome, applied.outputs) == ("applied", {})
    assert applied.events == [
        Event(
            EventType.RUN_PAUSED,
            {
                "status": "paused",
                "reason": "operator",
                "nodes": ["repeatable", "once"],
                "signal_id": str(SIGNAL_ID),
                "operator": ADA,
                "note": "lunch",
            },
            level=Level.WARN,
        )
    ]
    paused = story.add(*applied.events)
    assert (story.state.status, story.state.paused_seq) == (RunStatus.PAUSED, paused.seq)
    story.now += 10_000
    assert told(story.decide(deadline_ms=1)) == []


def test_what_ends_during_a_pause_counts_and_the_answer_to_the_pause_still_fits() -> None:
    """The pause has a seq of its own: events behind it do not make its resume stale."""
    story = story_of(plan_of(plan_node("A"), plan_node("B", "A")))
    story.start("A")
    paused = story.add(*apply_signal(story.state, _order(SignalKind.PAUSE)).events)
    story.done("A")
    assert told(story.decide()) == []
    resume = _signal(story, paused_seq=paused.seq)
    story.add(*apply_signal(story.state, resume).events)
    assert told(story.decide()) == [("NODE_START", "B")]


@pytest.mark.parametrize(
    "status", [status for status in RunStatus if status is not RunStatus.RUNNING]
)
def test_only_a_run_that_runs_can_be_paused(status: RunStatus) -> None:
    story = _waiting()
    story.state.status = status
    assert _discarded(story, _order(SignalKind.PAUSE)) == f"discarded: the run is {status}"


# All of them


@pytest.mark.parametrize("kind", SignalKind)
@pytest.mark.parametrize("status", [status for status in RunStatus if status.is_terminal])
def test_what_comes_after_the_end_is_discarded(kind: SignalKind, status: RunStatus) -> None:
    story = _waiting()
    story.state.status = status
    signal = Signal(SIGNAL_ID, RUN_ID, kind, {"paused_seq": story.state.paused_seq})
    assert _discarded(story, signal) == f"discarded: the run is {status}"


@pytest.mark.parametrize("kind", SignalKind)
def test_what_a_signal_says_has_the_declared_shape(kind: SignalKind) -> None:
    story = _waiting() if kind is SignalKind.RESUME else _one_of_each()
    body = {"operator": ADA, "note": "so", "paused_seq": story.state.paused_seq}
    [event] = apply_signal(story.state, Signal(SIGNAL_ID, RUN_ID, kind, body)).events
    EVENT_DATA[EventType(event.type)].model_validate(event.data)


def test_uncertain_are_unknown_outcomes_and_calls_that_must_not_be_repeated() -> None:
    assert uncertain_nodes(_one_of_each().state) == ["once", "unsure"]
    assert uncertain_nodes(story_of(plan_of(plan_node("A"))).state) == []
