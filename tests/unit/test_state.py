"""`apply`: what each event changes in a run's state, and what it must leave alone."""

from __future__ import annotations

from copy import deepcopy

import pytest

from app.domain.capability import NodeKind
from app.domain.events import BlockReason, Event, EventType, error_data
from app.domain.run import NodeStatus, RunStatus
from app.domain.state import NodeState, RunState, apply
from tests.plans import (
    START_MS,
    Story,
    chain,
    diamond,
    exact,
    key_of,
    limited_node,
    plan_node,
    plan_of,
    story_of,
)

_ERROR = error_data("broken", "It broke.")


def _limited() -> Story:
    """A and B of one limited capability, C of another, all ready."""
    return story_of(
        plan_of(limited_node("A"), limited_node("B"), limited_node("C", capability="scarce"))
    )


def test_a_new_run_is_queued_at_the_time_of_its_first_event() -> None:
    state = RunState("r", {})
    apply(state, Event(EventType.RUN_QUEUED, {}, seq=1, ts=START_MS))
    assert (state.status, state.queued_at, state.started_at) == (RunStatus.QUEUED, START_MS, None)
    apply(state, Event(EventType.RUN_START, {}, seq=2, ts=START_MS + 7))
    assert (state.status, state.started_at) == (RunStatus.RUNNING, START_MS + 7)
    assert state.queued_at == START_MS


@pytest.mark.parametrize(
    "event_type", [EventType.LOG, EventType.VALIDATION_ERROR, EventType.RUN_RECOVERED]
)
def test_an_event_that_changes_nothing_only_moves_seq_and_time(event_type: EventType) -> None:
    story = story_of(diamond())
    before = exact(deepcopy(story.state))
    story.now += 5
    story.add(Event(event_type, {"anything": 1}, node_id="A"))
    assert exact(story.state) == {**before, "seq": before["seq"] + 1, "last_ts": START_MS + 5}


def test_seq_and_time_are_those_of_the_event() -> None:
    state = RunState("r", {})
    apply(state, Event(EventType.LOG, {}, seq=41, ts=17))
    assert (state.seq, state.last_ts) == (41, 17)


def test_a_plan_makes_its_nodes_and_readies_the_roots_in_plan_order() -> None:
    plan = plan_of(plan_node("Z"), plan_node("M", "Z"), plan_node("A"), plan_node("E", "Z", "A"))
    story = story_of(plan)
    assert story.state.plan is plan
    assert story.state.planning_ms == 0.5
    assert list(story.state.nodes) == ["Z", "M", "A", "E"]
    assert list(story.state.ready) == ["Z", "A"]
    assert {node_id: node.unmet for node_id, node in story.state.nodes.items()} == {
        "Z": 0,
        "M": 1,
        "A": 0,
        "E": 2,
    }
    assert story.node("M") == NodeState(unmet=1)


def test_the_plan_in_force_is_the_version_that_the_event_names() -> None:
    first, second = plan_of(plan_node("A")), plan_of(plan_node("B"), version=2)
    state = RunState("r", {1: first, 2: second})
    apply(state, Event(EventType.PLAN_GENERATED, {"version": 2}, seq=1))
    assert state.plan is second
    assert (list(state.nodes), state.planning_ms) == (["B"], None)


def test_limited_capabilities_queue_apart_in_the_order_of_readiness() -> None:
    story = _limited()
    assert not story.state.ready
    assert [(key, list(queue)) for key, queue in story.state.ready_limited.items()] == [
        (("rare", "1.0.0"), ["A", "B"]),
        (("scarce", "1.0.0"), ["C"]),
    ]


def test_versions_of_a_limited_capability_queue_apart() -> None:
    newer = limited_node("B", capability_version="2.0.0")
    story = story_of(plan_of(limited_node("A"), newer))
    assert {key: list(queue) for key, queue in story.state.ready_limited.items()} == {
        ("rare", "1.0.0"): ["A"],
        ("rare", "2.0.0"): ["B"],
    }


def test_a_started_node_runs_and_is_no_longer_ready() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B")))
    story.now += 3
    story.start("A", attempt=1)
    assert list(story.state.ready) == ["B"]
    assert list(story.state.running) == ["A"]
    assert story.node("A") == NodeState(NodeStatus.RUNNING, attempt=1, started_at=START_MS + 3)
    assert story.node("B") == NodeState()


def test_a_start_counts_the_attempt_of_the_event() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B")))
    story.start("A", attempt=4)
    assert story.node("A").attempt == 4
    story.add(Event(EventType.NODE_START, {}, node_id="B"))
    assert story.node("B").attempt == 1


def test_a_started_limited_node_leaves_its_queue_and_the_last_one_takes_it_along() -> None:
    story = _limited()
    story.start("A")
    assert story.state.ready_limited[key_of(story.plan.nodes["A"])] == {"B": None}
    story.start("B")
    assert list(story.state.ready_limited) == [("scarce", "1.0.0")]
    story.start("C")
    assert story.state.ready_limited == {}
    assert list(story.state.running) == ["A", "B", "C"]


def test_done_records_where_the_output_is_and_readies_what_waited_for_it() -> None:
    story = story_of(diamond())
    story.start("A")
    story.done("A", duration_ms=12.5)
    node = story.node("A")
    assert (node.status, node.done_seq, node.duration_ms) == (NodeStatus.DONE, 5, 12.5)
    assert (story.state.done_count, list(story.state.running)) == (1, [])
    assert list(story.state.ready) == ["B", "C"]
    story.done("B")
    assert story.node("D").unmet == 1
    assert list(story.state.ready) == ["C"]
    story.done("C")
    assert (story.node("D").unmet, list(story.state.ready)) == (0, ["D"])
    assert story.state.done_count == 3


def test_a_limited_child_becomes_ready_in_its_queue() -> None:
    story = story_of(plan_of(plan_node("A"), limited_node("B", "A")))
    story.done("A")
    assert not story.state.ready
    assert story.state.ready_limited == {("rare", "1.0.0"): {"B": None}}


def test_done_clears_what_went_wrong_before() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.start("A")
    story.block("A")
    story.add(Event(EventType.NODE_DONE, {"output": {}}, node_id="A", attempt=1))
    node = story.node("A")
    assert (node.status, node.reason, node.error) == (NodeStatus.DONE, None, None)
    assert story.state.blocked == {}
    assert node.duration_ms is None


def test_a_child_that_is_blocked_does_not_become_ready_when_its_other_parent_is_done() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B"), plan_node("C", "A", "B")))
    story.start("B")
    story.fail("A")
    story.block("C", BlockReason.DEPENDENCY_FAILED)
    story.done("B")
    assert list(story.state.ready) == []
    assert story.node("C").status is NodeStatus.BLOCKED


def test_a_retry_waits_for_its_time() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B")))
    story.start("A")
    story.now += 100
    story.retry("A", 250, error=_ERROR)
    node = story.node("A")
    assert (node.status, node.retry_at) == (NodeStatus.PENDING, START_MS + 350)
    assert (node.attempt, node.round, node.attempts_before_round) == (1, 1, 0)
    assert node.error == _ERROR
    assert story.state.waiting == {"A": START_MS + 350}
    assert list(story.state.running) == []
    assert list(story.state.ready) == ["B"]


def test_the_next_attempt_ends_the_wait() -> None:
    story = _limited()
    story.start("A")
    story.retry("A", 250)
    story.start("A")
    assert (story.node("A").attempt, story.node("A").retry_at) == (2, None)
    assert story.state.waiting == {}
    assert list(story.state.running) == ["A"]
    assert story.state.ready_limited[key_of(story.plan.nodes["A"])] == {"B": None}


def test_a_retry_that_is_due_at_the_epoch_still_ends_its_wait() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.start("A")
    story.now = 0
    story.retry("A", 0)
    assert story.state.waiting == {"A": 0}
    story.start("A")
    assert story.state.waiting == {}


def test_an_ordered_retry_begins_a_new_round_with_fresh_attempts() -> None:
    story = story_of(plan_of(plan_node("A")))
    story.start("A", attempt=3)
    story.block("A")
    story.retry("A", 0, round=2, error=_ERROR)
    node = story.node("A")
    assert (node.status, node.round, node.attempts_before_round) == (NodeStatus.PENDING, 2, 3)
    assert (node.reason, node.error) == (None, _ERROR)
    assert story.state.blocked == {}
    assert story.state.waiting == {"A": START_MS}


def test_a_failed_node_dooms_the_pending_nodes_right_below_it() -> None:
    story = story_of(
        plan_of(
            plan_node("A"),
            plan_node("B", "A"),
            plan_node("C", "B"),
            plan_node("D"),
            plan_node("E", "A", "D"),
        )
    )
    story.start("A")
    story.now += 9
    story.fail("A", error=_ERROR, duration_ms=8.0)
    node = story.node("A")
    assert (node.status, node.error, node.duration_ms) == (NodeStatus.FAILED, _ERROR, 8.0)
    assert list(story.state.failed) == ["A"]
    assert list(story.state.running) == []
    assert list(story.state.to_block) == ["B", "E"]
    assert list(story.state.ready) == ["D"]
    assert story.state.done_count == 0


def test_a_blocked_node_can_be_declared_failed() -> None:
    story = story_of(chain(2))
    story.start("n0")
    story.block("n0")
    story.add(Event(EventType.NODE_FAILED, {"error": _ERROR}, node_id="n0", attempt=1))
    assert story.state.blocked == {}
    assert (story.node("n0").status, story.node("n0").reason) == (NodeStatus.FAILED, None)
    assert story.node("n0").duration_ms is None
    assert list(story.state.to_block) == ["n1"]


def test_blocking_a_doomed_node_dooms_the_next_level() -> None:
    story = story_of(chain(3))
    story.fail("n0")
    story.block("n1", BlockReason.DEPENDENCY_FAILED)
    assert list(story.state.to_block) == ["n2"]
    story.block("n2", BlockReason.DEPENDENCY_FAILED)
    assert list(story.state.to_block) == []
    assert list(story.state.blocked) == ["n1", "n2"]
    assert story.node("n2").reason == BlockReason.DEPENDENCY_FAILED


def test_a_node_that_is_blocked_already_is_not_doomed_again() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B"), plan_node("C", "A", "B")))
    story.start("B")
    story.fail("A")
    story.block("C", BlockReason.DEPENDENCY_FAILED)
    story.fail("B")
    assert list(story.state.to_block) == []


def test_an_unknown_outcome_blocks_the_node_and_dooms_nobody() -> None:
    story = story_of(chain(2))
    story.start("n0")
    story.block("n0")
    node = story.node("n0")
    assert (node.status, node.reason) == (NodeStatus.BLOCKED, BlockReason.UNKNOWN_OUTCOME)
    assert node.error == error_data("reset", "The line went dead.")
    assert list(story.state.running) == []
    assert list(story.state.to_block) == []
    assert list(story.state.blocked) == ["n0"]
    assert story.node("n1").status is NodeStatus.PENDING


def test_a_ready_or_waiting_node_that_is_blocked_can_not_start_any_more() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B"), limited_node("C")))
    story.start("B")
    story.retry("B", 1_000)
    for node_id in ("A", "B", "C"):
        story.block(node_id, BlockReason.DEPENDENCY_FAILED)
    state = story.state
    assert (state.ready, state.waiting, state.ready_limited) == ({}, {}, {})
    assert list(state.blocked) == ["A", "B", "C"]


def test_a_node_that_its_breaker_refused_is_blocked_and_waits_for_its_time() -> None:
    story = story_of(chain(2))
    story.start("n0")
    story.now += 100
    story.refuse("n0", 250)
    state, node = story.state, story.node("n0")
    assert (node.status, node.reason) == (NodeStatus.BLOCKED, BlockReason.BREAKER_OPEN)
    assert (node.attempt, node.attempts_before_round) == (1, 1)
    assert (node.retry_at, state.waiting) == (START_MS + 350, {"n0": START_MS + 350})
    assert (list(state.blocked), list(state.running), list(state.to_block)) == (["n0"], [], [])
    assert state.unknown_outcomes() == []


def test_the_next_start_of_a_refused_node_ends_its_wait() -> None:
    story = story_of(plan_of(limited_node("A"), limited_node("B")))
    story.start("A")
    story.refuse("A", 250)
    story.start("A")
    state, node = story.state, story.node("A")
    assert (node.status, node.attempt, node.reason) == (NodeStatus.RUNNING, 2, None)
    assert (node.retry_at, state.waiting, state.blocked) == (None, {}, {})
    assert state.ready_limited == {("rare", "1.0.0"): {"B": None}}


def test_a_kept_result_counts_as_done_and_stands_in_the_event_that_says_so() -> None:
    story = story_of(plan_of(plan_node("A"), limited_node("B", "A"), plan_node("C", "A", "B")))
    story.skip("A")
    assert story.node("A") == NodeState(NodeStatus.SKIPPED, done_seq=4, reason="resume")
    assert (story.state.done_count, list(story.state.ready)) == (1, [])
    story.skip("B")
    assert story.state.ready_limited == {}
    assert list(story.state.ready) == ["C"]


def test_unknown_outcomes_are_listed_in_the_order_they_were_blocked() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B"), plan_node("C"), plan_node("D", "C")))
    for node_id in ("A", "B", "C"):
        story.start(node_id)
    story.block("B")
    story.fail("C")
    story.block("D", BlockReason.DEPENDENCY_FAILED)
    story.block("A")
    assert story.state.unknown_outcomes() == ["B", "A"]


@pytest.mark.parametrize("status", [RunStatus.AWAITING_HUMAN, RunStatus.PAUSED])
def test_pauses_add_up_and_leave_the_clock_of_the_deadline_standing(status: RunStatus) -> None:
    story = story_of(diamond())
    for lasting in (40, 2):
        story.now += 10
        story.pause(status)
        assert story.state.status is status
        assert story.state.paused_at == story.now
        assert story.state.paused_seq == story.state.seq
        story.now += lasting
        story.add(Event(EventType.RUN_RESUMED, {}))
        assert story.state.status.value == "running"
        assert story.state.paused_at is None
    assert story.state.paused_ms == 42


def test_the_seq_of_a_pause_stays_until_the_next_one() -> None:
    story = story_of(chain(1))
    story.start("n0")
    assert story.state.paused_seq is None
    story.pause(RunStatus.PAUSED)
    paused_seq = story.state.seq
    story.done("n0")
    assert story.state.paused_seq == paused_seq
    story.add(Event(EventType.RUN_RESUMED, {}))
    story.pause(RunStatus.PAUSED)
    assert story.state.paused_seq == story.state.seq > paused_seq


def test_a_resume_without_a_pause_adds_no_time() -> None:
    story = story_of(diamond())
    story.now += 50
    story.add(Event(EventType.RUN_RESUMED, {}))
    assert (story.state.status, story.state.paused_ms) == (RunStatus.RUNNING, 0)


@pytest.mark.parametrize(
    ("event_type", "status"),
    [
        (EventType.RUN_DONE, RunStatus.DONE),
        (EventType.RUN_FAILED, RunStatus.FAILED),
        (EventType.RUN_CANCELLED, RunStatus.CANCELLED),
    ],
)
def test_each_terminal_event_ends_the_run_its_own_way(
    event_type: EventType, status: RunStatus
) -> None:
    story = story_of(diamond())
    before = story.state.finished_at
    story.now += 11
    story.add(Event(event_type, {}))
    assert story.state.status is status
    assert (before, story.state.finished_at) == (None, START_MS + 11)


def test_a_node_event_without_a_node_is_refused_by_name() -> None:
    story = story_of(diamond())
    with pytest.raises(AssertionError, match="NODE_START without a node"):
        story.add(Event(EventType.NODE_START, {}))


# Fallbacks


def _asked() -> Story:
    """A person was asked about F, which B requires; A is done."""
    plan = plan_of(plan_node("A"), plan_node("F", kind=NodeKind.FALLBACK), plan_node("B", "F"))
    story = story_of(plan)
    story.done("A")
    story.add(*story.decide().events)
    return story


def test_a_fallback_is_never_ready_to_be_called() -> None:
    fallback = limited_node("F", kind=NodeKind.FALLBACK)
    story = story_of(plan_of(fallback, plan_node("A"), plan_node("G", "A", kind=NodeKind.FALLBACK)))
    state = story.state
    assert (list(state.to_ask), list(state.ready), state.ready_limited) == (["F"], ["A"], {})
    story.done("A")
    assert (list(state.to_ask), list(state.ready)) == (["F", "G"], [])


def test_a_fallback_that_was_asked_waits_for_a_person() -> None:
    story = _asked()
    node = story.node("F")
    assert (node.status, node.reason, node.attempt) == (NodeStatus.BLOCKED, "awaiting_answer", 1)
    assert node.awaits_human
    assert (story.state.to_ask, list(story.state.blocked)) == ({}, ["F"])
    assert story.state.awaiting_human() == ["F"]
    assert story.state.unknown_outcomes() == []


def test_who_awaits_a_human_is_listed_in_the_order_of_blocking() -> None:
    plan = plan_of(plan_node("F", kind=NodeKind.FALLBACK), plan_node("U"), plan_node("R"))
    story = story_of(plan)
    for node_id in ("U", "R"):
        story.start(node_id)
    story.refuse("R", 5)
    story.block("U")
    story.block("F", BlockReason.AWAITING_ANSWER)
    assert story.state.awaiting_human() == ["U", "F"]
    assert story.state.unknown_outcomes() == ["U"]
    assert not story.node("R").awaits_human


def test_the_answer_of_a_person_is_the_result_of_the_fallback() -> None:
    story = _asked()
    story.add(Event(EventType.NODE_DONE, {"output": {}}, node_id="F", attempt=1))
    assert (story.node("F").status, story.state.blocked) == (NodeStatus.DONE, {})
    assert list(story.state.ready) == ["B"]


def test_to_order_a_fallback_anew_is_to_plan_again_and_then_to_ask_again() -> None:
    story = _asked()
    story.add(Event(EventType.RUN_RESUMED, {}))
    story.retry("F", 0, round=2, error=None)
    state, node = story.state, story.node("F")
    assert (node.status, node.round, node.retry_at) == (NodeStatus.PENDING, 2, None)
    assert (state.replan, list(state.to_ask), state.waiting) == ("", ["F"], {})
    story.reject_plan()
    assert (state.replan, list(state.to_ask)) == (None, ["F"])
    [asked, _] = story.decide().events
    assert (asked.type, asked.node_id, asked.attempt) == (EventType.NODE_BLOCKED, "F", 2)
