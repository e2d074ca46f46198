"""`decide`, `judge_failure` and `recover`: the orchestrator's whole judgement, case by case."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest

from app.domain.capability import Effect, NodeKind
from app.domain.decide import Failure, RunLimits, deadline_at, judge_failure, recover
from app.domain.errors import Fault
from app.domain.event_shapes import EVENT_DATA
from app.domain.events import BlockReason, Event, EventType, Level, error_data
from app.domain.run import RunStatus
from app.domain.state import NodeState, RunState
from tests.plans import (
    START_MS,
    Story,
    chain,
    diamond,
    exact,
    limited_node,
    plan_node,
    plan_of,
    story_of,
    told,
    wide,
)

RARE = ("rare", "1.0.0")
SCARCE = ("scarce", "1.0.0")


def _starts(
    story: Story, max_parallel: int = 16, free_slots: dict[tuple[str, str], int] | None = None
) -> list[str]:
    decision = story.decide(max_parallel, free_slots=free_slots)
    return [e.node_id or "" for e in decision.events if e.type is EventType.NODE_START]


# What may start


def test_a_run_without_a_plan_is_left_alone() -> None:
    story = Story(diamond(), RunState("r", {}))
    story.add(Event(EventType.RUN_QUEUED, {}), Event(EventType.RUN_START, {}))
    decision = story.decide(deadline_ms=0)
    assert (told(decision), decision.complete, decision.wake_at) == ([], False, None)


@pytest.mark.parametrize(
    "status", [status for status in RunStatus if status is not RunStatus.RUNNING]
)
def test_a_run_that_is_not_running_is_left_alone(status: RunStatus) -> None:
    story = story_of(diamond())
    story.state.status = status
    decision = story.decide(deadline_ms=0)
    assert (told(decision), decision.complete, decision.wake_at) == ([], False, None)


def test_deciding_changes_nothing() -> None:
    plan = plan_of(plan_node("A"), limited_node("B"), plan_node("C"), plan_node("D", "C"))
    story = story_of(plan)
    story.fail("C")
    before = exact(deepcopy(story.state))
    first = story.decide(free_slots={RARE: 1})
    assert exact(story.state) == before
    assert story.decide(free_slots={RARE: 1}) == first


def test_the_diamond_runs_to_its_end() -> None:
    story = story_of(diamond())
    for expected in (["A"], ["B", "C"], ["D"]):
        decision = story.decide()
        assert told(decision) == [("NODE_START", node_id) for node_id in expected]
        assert not decision.complete
        story.add(*decision.events)
        assert told(story.decide()) == []
        story.done(*expected)
    decision = story.decide()
    assert (told(decision), decision.complete, decision.wake_at) == ([], True, None)


def test_a_start_says_which_capability_and_attempt() -> None:
    story = story_of(plan_of(plan_node("A", capability_id="web.search")))
    [event] = story.decide().events
    assert event == Event(
        EventType.NODE_START, {"capability_id": "web.search"}, node_id="A", attempt=1
    )


def test_a_start_in_a_later_round_names_the_round() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.start("A", attempt=2)
    story.block("A")
    story.retry("A", 0, round=2)
    [event] = story.decide().events
    assert event.data == {"capability_id": "util.echo", "round": 2}
    assert event.attempt == 3


def test_ready_nodes_start_in_the_order_they_became_ready() -> None:
    story = story_of(plan_of(*(plan_node(name) for name in "DACB")))
    assert _starts(story) == ["D", "A", "C", "B"]


@pytest.mark.parametrize("max_parallel", [1, 2, 3, 4, 9])
def test_no_more_nodes_run_than_allowed(max_parallel: int) -> None:
    story = story_of(plan_of(*(plan_node(name) for name in "ABCDE")))
    story.start("A")
    assert len(_starts(story, max_parallel)) == min(max_parallel - 1, 4)


def test_more_running_nodes_than_allowed_start_nothing() -> None:
    story = story_of(plan_of(*(plan_node(name) for name in "ABC")))
    story.start("A")
    story.start("B")
    assert _starts(story, 1) == []


def test_the_bound_counts_ready_limited_and_waiting_nodes_together() -> None:
    plan = plan_of(plan_node("W"), plan_node("A"), limited_node("L"), limited_node("M"))
    story = story_of(plan)
    story.start("W")
    story.retry("W", 0)
    slots = {RARE: 2}
    assert _starts(story, 1, slots) == ["A"]
    assert _starts(story, 2, slots) == ["A", "L"]
    assert _starts(story, 3, slots) == ["A", "L", "M"]
    assert _starts(story, 4, slots) == ["A", "L", "M", "W"]


# Limited capabilities


@pytest.mark.parametrize(
    ("free", "expected"), [(0, []), (1, ["A"]), (2, ["A", "B"]), (9, ["A", "B"])]
)
def test_a_limited_capability_starts_as_many_as_it_has_free_slots(
    free: int, expected: list[str]
) -> None:
    story = story_of(plan_of(limited_node("A"), limited_node("B")))
    assert _starts(story, free_slots={RARE: free}) == expected


def test_a_capability_with_more_calls_than_its_limit_starts_nothing() -> None:
    story = story_of(plan_of(limited_node("A"), limited_node("W")))
    story.start("W")
    story.retry("W", 0)
    assert _starts(story, free_slots={RARE: -1}) == []


def test_a_limited_capability_without_a_count_has_no_slot() -> None:
    story = story_of(plan_of(limited_node("A"), plan_node("B")))
    assert _starts(story) == ["B"]


def test_each_limited_capability_has_slots_of_its_own() -> None:
    plan = plan_of(
        limited_node("A"),
        limited_node("B"),
        limited_node("C", capability="scarce"),
        limited_node("D", capability="scarce"),
    )
    assert _starts(story_of(plan), free_slots={RARE: 1, SCARCE: 2}) == ["A", "C", "D"]
    assert _starts(story_of(plan), 2, {RARE: 1, SCARCE: 2}) == ["A", "C"]


def test_waiting_nodes_get_only_the_slots_that_ready_ones_left() -> None:
    plan = plan_of(limited_node("V"), limited_node("W"), limited_node("A"), plan_node("B", "A"))
    story = story_of(plan)
    for node_id in ("V", "W"):
        story.start(node_id)
        story.retry(node_id, 0)
    assert _starts(story, free_slots={RARE: 1}) == ["A"]
    assert _starts(story, free_slots={RARE: 2}) == ["A", "V"]
    assert _starts(story, free_slots={RARE: 3}) == ["A", "V", "W"]
    story.start("A")
    assert _starts(story, free_slots={RARE: 1}) == ["V"]
    assert _starts(story, free_slots={RARE: 0}) == []


def test_a_waiting_node_without_a_slot_does_not_hold_up_the_next_one() -> None:
    plan = plan_of(limited_node("V"), limited_node("X", capability="scarce"), plan_node("W"))
    story = story_of(plan)
    for node_id in ("V", "X", "W"):
        story.start(node_id)
        story.retry(node_id, 0)
    assert _starts(story, free_slots={RARE: 0, SCARCE: 1}) == ["X", "W"]


def test_a_run_that_lacks_only_a_slot_waits_for_it_and_not_for_the_clock() -> None:
    story = story_of(plan_of(limited_node("A")))
    decision = story.decide(free_slots={RARE: 0})
    assert (told(decision), decision.complete, decision.wake_at) == ([], False, None)


# Retries and the clock


def test_a_retry_starts_exactly_when_it_is_due() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.start("A")
    story.retry("A", 250)
    story.now += 249
    decision = story.decide()
    assert (told(decision), decision.wake_at) == ([], START_MS + 250)
    assert not decision.complete
    story.now += 1
    decision = story.decide()
    assert (told(decision), decision.wake_at) == ([("NODE_START", "A")], None)
    assert decision.events[0].attempt == 2


def test_the_run_wakes_for_the_earliest_retry_that_is_still_to_come() -> None:
    story = story_of(plan_of(*(plan_node(name) for name in "ABCD")))
    for node_id, delay in (("A", 300), ("B", 100), ("C", 200)):
        story.start(node_id)
        story.retry(node_id, delay)
    story.start("D")
    assert story.decide(1).wake_at == START_MS + 100
    story.now += 100
    assert story.decide(1).wake_at == START_MS + 200, "B is due and waits for room"


def test_the_run_wakes_for_its_deadline_or_a_retry_whichever_comes_first() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B")))
    assert story.decide(deadline_ms=500).wake_at == START_MS + 500
    story.start("A")
    story.retry("A", 300)
    story.start("B")
    assert story.decide(deadline_ms=500).wake_at == START_MS + 300
    assert story.decide(deadline_ms=200).wake_at == START_MS + 200
    assert story.decide().wake_at == START_MS + 300


def test_the_deadline_counts_from_acceptance_and_stands_still_during_pauses() -> None:
    state = RunState("r", {}, queued_at=1_000, started_at=5_000, paused_ms=30)
    assert deadline_at(state, RunLimits(1, deadline_ms=200)) == 1_230
    assert deadline_at(state, RunLimits(1)) is None


def test_the_deadline_ends_the_run_exactly_when_it_comes() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.now += 199
    assert told(story.decide(deadline_ms=200)) == [("NODE_START", "A")]
    story.now += 1
    decision = story.decide(deadline_ms=200)
    assert told(decision) == [("RUN_FAILED", None)]
    assert (decision.complete, decision.wake_at) == (False, None)


def test_a_passed_deadline_names_what_failed_and_what_was_not_finished() -> None:
    plan = plan_of(
        plan_node("ready"),
        plan_node("running"),
        plan_node("waiting"),
        plan_node("failed"),
        plan_node("done"),
        limited_node("limited"),
    )
    story = story_of(plan)
    story.start("running")
    story.start("waiting")
    story.retry("waiting", 900)
    story.fail("failed")
    story.done("done")
    story.now += 200
    [event] = story.decide(deadline_ms=200).events
    assert event.level is Level.ERROR
    assert event.data["error"]["code"] == "deadline_exceeded"
    assert event.data["failed_nodes"] == ["failed"]
    assert sorted(event.data["unfinished_nodes"]) == ["limited", "ready", "running", "waiting"]


def test_a_finished_run_does_not_pass_its_deadline() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.done("A")
    story.now += 199
    assert story.decide(deadline_ms=200).complete


# Breakers


def test_a_node_that_its_breaker_refused_goes_on_by_itself() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B", "A")))
    story.start("A")
    story.refuse("A", 250)
    decision = story.decide()
    assert (told(decision), decision.complete) == ([], False)
    assert decision.wake_at == START_MS + 250
    story.now += 250
    [event] = story.decide().events
    assert (event.type, event.node_id, event.attempt) == (EventType.NODE_START, "A", 2)


def test_refusals_use_up_no_attempt() -> None:
    """Nothing was called, so all tries of the node are still there after any number of refusals."""
    node = plan_node("A", max_attempts=2)
    story = story_of(plan_of(node))
    for _ in range(5):
        story.start("A")
        story.refuse("A", 0)
    story.start("A")
    [retry] = judge_failure(node, story.node("A"), _RESET)
    assert retry.type is EventType.NODE_RETRY
    story.retry("A")
    story.start("A")
    story.refuse("A", 0)
    story.start("A")
    [failed] = judge_failure(node, story.node("A"), _RESET)
    assert (failed.type, failed.attempt) == (EventType.NODE_FAILED, 8)


def test_a_refused_node_of_a_limited_capability_waits_for_a_slot_as_well() -> None:
    story = story_of(plan_of(limited_node("A")))
    story.start("A")
    story.refuse("A", 0)
    assert _starts(story, free_slots={RARE: 0}) == []
    assert _starts(story, free_slots={RARE: 1}) == ["A"]


def test_a_run_does_not_fail_while_a_refused_node_may_still_go_on() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B"), plan_node("C")))
    story.start("A")
    story.start("C")
    story.block("C")
    story.refuse("A", 100)
    story.fail("B")
    decision = story.decide()
    assert (told(decision), decision.wake_at) == ([], START_MS + 100)


def test_the_deadline_ends_a_run_that_waits_for_a_breaker() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.start("A")
    story.refuse("A", 5_000)
    assert story.decide(deadline_ms=200).wake_at == START_MS + 200
    story.now += 200
    [event] = story.decide(deadline_ms=200).events
    assert event.data["error"]["code"] == "deadline_exceeded"
    assert event.data["unfinished_nodes"] == ["A"]


# Results of an earlier run


def test_a_run_that_keeps_results_starts_behind_them() -> None:
    story = story_of(diamond())
    story.skip("A", "B")
    assert told(story.decide()) == [("NODE_START", "C")]
    story.done("C", "D")
    assert story.decide().complete


def test_a_run_whose_every_result_is_kept_is_complete_at_once() -> None:
    story = story_of(diamond())
    story.skip(*"ABCD")
    assert story.decide().complete


# Failed nodes and what depends on them


def test_everything_below_a_failed_node_is_blocked_at_once_and_once() -> None:
    plan = plan_of(
        plan_node("A"),
        plan_node("B", "A"),
        plan_node("C", "A"),
        plan_node("D", "B", "C"),
        plan_node("E", "D"),
        plan_node("other"),
    )
    story = story_of(plan)
    story.start("other")
    story.fail("A")
    decision = story.decide()
    assert sorted(told(decision)) == [("NODE_BLOCKED", node_id) for node_id in "BCDE"]
    assert {event.data["reason"] for event in decision.events} == {"dependency_failed"}
    assert {event.level for event in decision.events} == {Level.WARN}
    story.add(*decision.events)
    assert told(story.decide()) == []
    story.done("other")
    [event] = story.decide().events
    assert event.type is EventType.RUN_FAILED


def test_dependants_are_blocked_before_others_start() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B", "A"), plan_node("other")))
    story.fail("A")
    assert told(story.decide()) == [("NODE_BLOCKED", "B"), ("NODE_START", "other")]


def test_a_second_failure_does_not_block_again_what_the_first_one_blocked() -> None:
    plan = plan_of(
        plan_node("A"),
        plan_node("B"),
        plan_node("X", "A"),
        plan_node("Y", "B"),
        plan_node("both", "X", "Y"),
    )
    story = story_of(plan)
    story.start("B")
    story.fail("A")
    story.add(*story.decide().events)
    assert list(story.state.blocked) == ["X", "both"]
    story.fail("B")
    decision = story.decide()
    assert [found for found in told(decision) if found[0] == "NODE_BLOCKED"] == [
        ("NODE_BLOCKED", "Y")
    ]


def test_a_run_fails_only_when_nothing_can_go_on() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B"), plan_node("C")))
    story.start("B")
    story.start("C")
    story.fail("A")
    assert told(story.decide()) == []
    story.retry("C", 100)
    story.done("B")
    decision = story.decide()
    assert (told(decision), decision.wake_at) == ([], START_MS + 100)


def test_a_failed_run_names_its_failed_nodes_and_unknown_outcomes() -> None:
    story = story_of(plan_of(*(plan_node(name) for name in "ABC")))
    story.start("C")
    story.block("C")
    story.fail("B")
    story.fail("A")
    decision = story.decide()
    [event] = decision.events
    assert (event.type, event.level) == (EventType.RUN_FAILED, Level.ERROR)
    assert event.data == {
        "error": error_data("node_failed", "2 node(s) failed: B, A."),
        "failed_nodes": ["B", "A"],
        "unknown_outcomes": ["C"],
    }
    assert not decision.complete


def test_the_message_of_a_failed_run_stays_short() -> None:
    story = story_of(plan_of(*(plan_node(f"n{i}") for i in range(9))))
    for i in range(9):
        story.fail(f"n{i}")
    [event] = story.decide().events
    assert event.data["error"]["message"] == "9 node(s) failed: n0, n1, n2, n3, n4."
    assert len(event.data["failed_nodes"]) == 9


def test_an_unknown_outcome_waits_for_a_human_when_all_else_is_done() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B", "A"), plan_node("C")))
    story.start("C")
    story.start("A")
    story.block("A")
    assert told(story.decide()) == []
    story.done("C")
    decision = story.decide(deadline_ms=999)
    [event] = decision.events
    assert (event.type, event.level) == (EventType.RUN_PAUSED, Level.WARN)
    assert event.data == {
        "status": "awaiting_human",
        "reason": "unknown_outcome",
        "nodes": ["A"],
    }
    assert (decision.complete, decision.wake_at) == (False, None)
    story.add(event)
    assert story.state.status is RunStatus.AWAITING_HUMAN


# Replans, goals that are left, and fallbacks


def test_nothing_starts_until_a_plan_that_is_asked_for_is_there() -> None:
    plan = plan_of(plan_node("A"), plan_node("B"), limited_node("L"), plan_node("W"))
    story = story_of(plan)
    story.start("W")
    story.retry("W", 0)
    story.fail("A")
    story.trigger("p")
    decision = story.decide(free_slots={RARE: 1})
    assert (told(decision), decision.plan, decision.complete) == ([], True, False)
    story.replan(plan_of(plan_node("B"), plan_node("C"), version=2))
    decision = story.decide()
    assert (told(decision), decision.plan) == ([("NODE_START", "B"), ("NODE_START", "C")], False)


def test_what_is_under_way_ends_before_a_plan_is_made_anew() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B"), plan_node("C", "B")))
    story.start("B")
    story.fail("A")
    story.trigger("p")
    assert not story.decide().plan
    story.done("B")
    assert (told(story.decide()), story.decide().plan) == ([], True)


def test_without_another_plan_the_one_in_force_goes_on() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B", "A"), plan_node("C")))
    story.fail("A")
    story.trigger("p")
    story.reject_plan(is_final=False)
    assert story.decide().plan
    story.reject_plan()
    decision = story.decide()
    assert told(decision) == [("NODE_BLOCKED", "B"), ("NODE_START", "C")]
    assert not decision.plan


def test_a_run_that_waits_for_a_plan_still_has_its_deadline() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.start("A")
    story.retry("A", 50)
    story.trigger("p")
    assert story.decide(deadline_ms=200).wake_at == START_MS + 200
    assert story.decide().wake_at is None
    story.now += 200
    [event] = story.decide(deadline_ms=200).events
    assert event.data["error"]["code"] == "deadline_exceeded"


def test_a_run_that_is_paused_makes_no_plan() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.trigger("p")
    story.pause(RunStatus.PAUSED)
    assert not story.decide().plan


def test_a_run_whose_goals_are_not_all_planned_goes_on_with_another_plan() -> None:
    plan = plan_of(plan_node("A"))
    story = story_of(replace(plan, open_goals=("B", "C")))
    assert told(story.decide()) == [("NODE_START", "A")]
    story.start("A")
    assert not story.decide().plan
    story.done("A")
    decision = story.decide(deadline_ms=200)
    assert (told(decision), decision.plan, decision.complete) == ([], True, False)
    assert decision.wake_at == START_MS + 200
    story.replan(plan_of(plan_node("A"), plan_node("B", "A"), version=2))
    story.done("B")
    decision = story.decide()
    assert (decision.plan, decision.complete) == (False, True)


@pytest.mark.parametrize("ends_as", ["RUN_FAILED", "RUN_PAUSED"])
def test_the_next_goal_waits_for_those_before_it(ends_as: str) -> None:
    story = story_of(replace(plan_of(plan_node("A"), plan_node("B")), open_goals=("C",)))
    story.done("A")
    if ends_as == "RUN_FAILED":
        story.fail("B")
    else:
        story.start("B")
        story.block("B")
    decision = story.decide()
    assert (told(decision), decision.plan) == ([(ends_as, None)], False)


def test_a_person_is_asked_when_nothing_else_is_left_to_do() -> None:
    fallback = plan_node("F", kind=NodeKind.FALLBACK, text="What is the brief?")
    story = story_of(plan_of(fallback, plan_node("A"), plan_node("B", "F")))
    assert told(story.decide()) == [("NODE_START", "A")]
    story.start("A")
    assert told(story.decide()) == []
    story.done("A")
    asked, paused = story.decide().events
    assert asked == Event(
        EventType.NODE_BLOCKED,
        {"reason": "awaiting_answer", "operator_prompt": "What is the brief?"},
        node_id="F",
        attempt=1,
        level=Level.WARN,
    )
    assert paused == Event(
        EventType.RUN_PAUSED,
        {"status": "awaiting_human", "reason": "awaiting_answer", "nodes": ["F"]},
        level=Level.WARN,
    )
    for event in (asked, paused):
        EVENT_DATA[EventType(event.type)].model_validate(event.data)
    story.add(asked, paused)
    story.add(Event(EventType.RUN_RESUMED, {}))
    assert told(story.decide()) == [("RUN_PAUSED", None)], "asked already"


def test_who_waits_is_named_together_and_an_unknown_outcome_is_the_graver_reason() -> None:
    story = story_of(plan_of(plan_node("F", kind=NodeKind.FALLBACK), plan_node("U")))
    story.start("U")
    story.block("U")
    decision = story.decide()
    assert told(decision) == [("NODE_BLOCKED", "F"), ("RUN_PAUSED", None)]
    data = decision.events[-1].data
    assert (data["reason"], data["nodes"]) == ("unknown_outcome", ["U", "F"])


def test_nobody_is_asked_when_the_run_has_failed_anyway() -> None:
    story = story_of(plan_of(plan_node("F", kind=NodeKind.FALLBACK), plan_node("A")))
    story.fail("A")
    assert told(story.decide()) == [("RUN_FAILED", None)]


def test_a_fallback_that_nobody_was_asked_about_is_unfinished_at_the_deadline() -> None:
    story = story_of(plan_of(plan_node("F", kind=NodeKind.FALLBACK), plan_node("A")))
    story.start("A")
    story.now += 200
    [event] = story.decide(deadline_ms=200).events
    assert event.data["unfinished_nodes"] == ["A", "F"]


def test_an_empty_plan_is_complete() -> None:
    assert story_of(plan_of()).decide().complete


# One failed call


_RESET = Failure("reset", "The line went dead.", retryable=True, delay_ms=70, duration_ms=1.5)
_UNKNOWN = Failure("reset", "The line went dead.", retryable=True, unknown_outcome=True)
_FINAL = Failure("refused", "No.", retryable=False, duration_ms=2.5)


def _attempt(number: int, before: int = 0) -> NodeState:
    return NodeState(attempt=number, attempts_before_round=before)


def _types(events: list[Event]) -> list[str]:
    return [event.type for event in events]


def test_a_retryable_failure_is_tried_again_after_its_delay() -> None:
    assert judge_failure(plan_node("A"), _attempt(2), _RESET) == [
        Event(
            EventType.NODE_RETRY,
            {
                "delay_ms": 70,
                "error": error_data("reset", "The line went dead."),
                "duration_ms": 1.5,
            },
            node_id="A",
            attempt=2,
            level=Level.WARN,
        )
    ]


def test_a_final_failure_fails_the_node() -> None:
    assert judge_failure(plan_node("A"), _attempt(1), _FINAL) == [
        Event(
            EventType.NODE_FAILED,
            {"error": error_data("refused", "No."), "duration_ms": 2.5},
            node_id="A",
            attempt=1,
            level=Level.ERROR,
        )
    ]


@pytest.mark.parametrize(
    ("attempt", "before", "max_attempts", "expected"),
    [
        (1, 0, 1, EventType.NODE_FAILED),
        (2, 0, 3, EventType.NODE_RETRY),
        (3, 0, 3, EventType.NODE_FAILED),
        (4, 3, 3, EventType.NODE_RETRY),
        (5, 3, 3, EventType.NODE_RETRY),
        (6, 3, 3, EventType.NODE_FAILED),
    ],
)
def test_attempts_are_counted_by_round(
    attempt: int, before: int, max_attempts: int, expected: EventType
) -> None:
    node = plan_node("A", max_attempts=max_attempts)
    assert _types(judge_failure(node, _attempt(attempt, before), _RESET)) == [expected]


@pytest.mark.parametrize("effect", [Effect.PURE, Effect.IDEMPOTENT])
def test_an_unknown_outcome_of_what_may_be_repeated_is_a_failure_like_others(
    effect: Effect,
) -> None:
    node = plan_node("A", effect=effect)
    assert _types(judge_failure(node, _attempt(1), _UNKNOWN)) == [EventType.NODE_RETRY]
    assert _types(judge_failure(node, _attempt(3), _UNKNOWN)) == [EventType.NODE_FAILED]


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_an_unknown_outcome_of_an_at_most_once_node_is_never_repeated(max_attempts: int) -> None:
    node = plan_node("A", effect=Effect.AT_MOST_ONCE, max_attempts=max_attempts)
    assert judge_failure(node, _attempt(1), _UNKNOWN) == [
        Event(
            EventType.NODE_BLOCKED,
            {
                "reason": BlockReason.UNKNOWN_OUTCOME,
                "error": error_data("reset", "The line went dead."),
            },
            node_id="A",
            attempt=1,
            level=Level.WARN,
        )
    ]


def test_an_at_most_once_node_is_repeated_where_nothing_can_have_happened() -> None:
    node = plan_node("A", effect=Effect.AT_MOST_ONCE, max_attempts=2)
    assert _types(judge_failure(node, _attempt(1), _RESET)) == [EventType.NODE_RETRY]
    assert _types(judge_failure(node, _attempt(2), _RESET)) == [EventType.NODE_FAILED]
    assert _types(judge_failure(node, _attempt(1), _FINAL)) == [EventType.NODE_FAILED]


def test_broken_contracts_are_told_before_their_consequence() -> None:
    faults = (Fault("TYPE", "no text", "/a", facet="brief"), Fault("RANGE", "too big", "/b"))
    failure = Failure(
        "invalid_output", "bad", retryable=False, faults=faults, scope="capability_output"
    )
    cause, consequence = judge_failure(plan_node("A"), _attempt(2), failure)
    assert cause == Event(
        EventType.VALIDATION_ERROR,
        {
            "scope": "capability_output",
            "errors": [
                {"code": "TYPE", "pointer": "/a", "message": "no text", "facet": "brief"},
                {"code": "RANGE", "pointer": "/b", "message": "too big"},
            ],
        },
        node_id="A",
        attempt=2,
        level=Level.WARN,
    )
    assert consequence.type is EventType.NODE_FAILED


# After a take-over


def test_a_take_over_calls_repeatable_attempts_again_and_blocks_the_others() -> None:
    plan = plan_of(
        plan_node("pure"),
        plan_node("once", effect=Effect.AT_MOST_ONCE),
        plan_node("idempotent", effect=Effect.IDEMPOTENT),
        plan_node("waiting", effect=Effect.AT_MOST_ONCE),
        plan_node("ready", effect=Effect.AT_MOST_ONCE),
    )
    story = story_of(plan)
    story.start("waiting")
    story.retry("waiting", 100)
    for node_id in ("idempotent", "once", "pure"):
        story.start(node_id, attempt=2)
    events, again = recover(story.state)
    assert again == ["idempotent", "pure"]
    [event] = events
    assert (event.type, event.node_id, event.attempt) == (EventType.NODE_BLOCKED, "once", 2)
    assert event.data["reason"] == BlockReason.UNKNOWN_OUTCOME
    assert event.data["error"]["code"] == "unknown_outcome"
    assert event.level is Level.WARN
    story.add(event)
    assert recover(story.state) == ([], ["idempotent", "pure"])


def test_a_take_over_before_the_plan_has_nothing_to_recover() -> None:
    assert recover(RunState("r", {})) == ([], [])


# Big plans


def test_a_wide_plan_starts_what_fits_and_no_more() -> None:
    story = story_of(wide(50))
    story.done("root")
    assert _starts(story, 16) == [f"w{i}" for i in range(16)]


def test_a_long_chain_below_a_failure_is_blocked_without_recursion() -> None:
    story = story_of(chain(2_000))
    story.fail("n0")
    decision = story.decide()
    blocked = [("NODE_BLOCKED", f"n{i}") for i in range(1, 2_000)]
    assert told(decision) == [*blocked, ("RUN_FAILED", None)]
