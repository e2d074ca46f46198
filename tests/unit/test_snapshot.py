"""Snapshots: the state through JSON and back, with nothing lost and nothing that is not state."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import orjson
import pytest

from app.domain.budget import Spent
from app.domain.capability import NodeKind
from app.domain.decide import RunLimits, decide
from app.domain.events import Event, EventType
from app.domain.plan import Plan
from app.domain.run import RunStatus
from app.domain.snapshot import state_as_dict, state_from_dict
from app.domain.state import SNAPSHOT_FORMAT, NodeState, RunState, apply
from tests.plans import (
    RUN_ID,
    START_MS,
    Story,
    diamond,
    exact,
    limited_node,
    plan_node,
    plan_of,
    story_of,
)


def _stored(state: RunState) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(orjson.dumps(state_as_dict(state)))
    return found


def _full_story() -> Story:
    """A state in which no field of the run and of its nodes taken together has its default."""
    story = story_of(_full_plan())
    story.fail("gone")
    kept = [node for node in story.plan.nodes.values() if node.id != "gone"]
    story.replan(plan_of(*kept, version=4))
    _tell(story)
    return story


def _full_plan() -> Plan:
    return plan_of(
        plan_node("A"),
        plan_node("B"),
        plan_node("below", "A"),
        plan_node("R"),
        plan_node("W"),
        plan_node("U"),
        plan_node("D"),
        plan_node("ready"),
        plan_node("ready too"),
        limited_node("L2"),
        limited_node("L1"),
        limited_node("M", capability="scarce"),
        plan_node("F", kind=NodeKind.FALLBACK),
        plan_node("gone"),
        version=3,
    )


def _tell(story: Story) -> None:
    for node_id in ("U", "W", "B"):
        story.start(node_id)
    story.now += 40
    story.block("U")
    story.retry("U", 5, round=2)
    story.start("U")
    story.block("U")
    story.retry("W", 70, error={"code": "c", "message": "m"})
    story.done("D", duration_ms=2.25)
    story.pause()
    story.now += 8
    story.add(Event(EventType.RUN_RESUMED, {}))
    story.start("R")
    story.fail("A", duration_ms=0.125)
    _call_model(story, "R", "0.25")
    story.trigger("p")
    story.pause(RunStatus.PAUSED)
    story.state.finished_at = story.now
    story.state.planning_ms = 0.5


def _call_model(story: Story, node_id: str, cost_usd: str) -> None:
    data = {"tokens_in": 10, "tokens_out": 3, "cost_usd": cost_usd}
    story.add(Event(EventType.LLM_RESPONSE, data, node_id=node_id))


def test_the_way_through_json_is_exact_to_the_order_of_every_queue() -> None:
    story = _full_story()
    found = state_from_dict(RUN_ID, story.state.plans, _stored(story.state))
    assert found == story.state
    assert exact(found) == exact(story.state)
    assert found.plan is story.plan


def test_every_field_of_the_state_is_part_of_the_snapshot() -> None:
    """The state above differs from a new one in all fields, so a forgotten one shows."""
    state = _full_story().state
    empty = RunState("other", {})
    same = [name for name in RunState.__slots__ if getattr(state, name) == getattr(empty, name)]
    assert same == []
    plain = NodeState()
    touched = {
        name
        for node in state.nodes.values()
        for name in NodeState.__slots__
        if getattr(node, name) != getattr(plain, name)
    }
    assert touched == set(NodeState.__slots__)


def test_a_run_without_a_plan_has_a_snapshot_too() -> None:
    state = RunState(RUN_ID, {})
    apply(state, Event(EventType.RUN_QUEUED, {}, seq=1, ts=START_MS))
    found = state_from_dict(RUN_ID, {}, _stored(state))
    assert found == state
    assert found.plan is None


def test_a_restored_state_goes_on_like_the_original() -> None:
    story = story_of(diamond())
    story.done("A")
    story.start("C")
    found = state_from_dict(RUN_ID, story.state.plans, _stored(story.state))
    assert found is not None
    for state in (found, story.state):
        apply(state, Event(EventType.NODE_DONE, {"output": {}}, node_id="C", attempt=1, seq=7))
    assert exact(found) == exact(story.state)
    limits = RunLimits(2)
    assert decide(found, START_MS, limits) == decide(story.state, START_MS, limits)


def test_a_snapshot_is_a_copy() -> None:
    story = story_of(diamond())
    taken = orjson.dumps(state_as_dict(story.state))
    found = state_from_dict(RUN_ID, story.state.plans, orjson.loads(taken))
    assert found is not None
    story.done("A", "B")
    assert orjson.dumps(state_as_dict(found)) == taken


def test_a_node_that_waits_for_its_breaker_still_does_behind_a_snapshot() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B"), plan_node("C", "B")))
    story.skip("B")
    story.start("A")
    story.refuse("A", 250)
    story.pause(RunStatus.PAUSED)
    story.start("C")
    found = state_from_dict(RUN_ID, story.state.plans, _stored(story.state))
    assert found is not None
    assert exact(found) == exact(story.state)
    assert found.waiting == {"A": START_MS + 250}
    assert found.paused_seq == story.state.seq - 1


def test_a_snapshot_of_the_format_before_plans_were_replaced_is_folded_anew() -> None:
    assert SNAPSHOT_FORMAT == 3
    story = story_of(diamond())
    old = {**_stored(story.state), "format": 2}
    for name in ("to_ask", "replan", "policies_fired", "retired"):
        del old[name]
    assert state_from_dict(RUN_ID, story.state.plans, old) is None


def test_a_run_that_waits_for_its_next_plan_still_does_behind_a_snapshot() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B", "A")))
    story.fail("A")
    story.trigger("p")
    found = state_from_dict(RUN_ID, story.state.plans, _stored(story.state))
    assert found is not None
    assert (found.replan, found.policies_fired) == ("p", {"p": 1})
    second = plan_of(plan_node("B"), plan_node("C"), version=2)
    found.plans = {**found.plans, 2: second}
    story.replan(second)
    apply(found, story.events[-1])
    assert exact(found) == exact(story.state)
    assert found.retired == {"A": (1, 1)}


def test_a_node_that_was_dropped_counts_on_behind_a_snapshot() -> None:
    story = story_of(plan_of(plan_node("A"), plan_node("B")))
    story.fail("A")
    story.replan(plan_of(plan_node("B"), version=2))
    found = state_from_dict(RUN_ID, story.state.plans, _stored(story.state))
    assert found is not None
    third = plan_of(plan_node("A"), plan_node("B"), version=3)
    found.plans = {**found.plans, 3: third}
    story.replan(third)
    apply(found, story.events[-1])
    assert exact(found) == exact(story.state)
    assert found.nodes["A"] == NodeState(attempt=1, round=2, attempts_before_round=1)


def test_what_a_run_spent_on_models_is_kept() -> None:
    story = story_of(diamond())
    for cost in ("0.0001", "0.25"):
        _call_model(story, "A", cost)
    found = state_from_dict(RUN_ID, story.state.plans, _stored(story.state))
    assert found is not None
    assert found.spent == Spent(Decimal("0.2501"), 26, 2)


def test_a_snapshot_of_another_format_is_not_used() -> None:
    story = story_of(diamond())
    stored = _stored(story.state)
    assert stored["format"] == SNAPSHOT_FORMAT
    for other in (SNAPSHOT_FORMAT + 1, SNAPSHOT_FORMAT - 1):
        assert state_from_dict(RUN_ID, story.state.plans, {**stored, "format": other}) is None


def test_a_snapshot_of_an_older_writer_may_lack_fields_of_nodes() -> None:
    """Rows are read by the names that were stored with them, not by position."""
    story = story_of(diamond())
    story.start("A")
    stored = _stored(story.state)
    dropped = stored["node_fields"].index("duration_ms")
    for row in (stored["node_fields"], *stored["nodes"].values()):
        del row[dropped]
        row.reverse()
    assert state_from_dict(RUN_ID, story.state.plans, stored) == story.state


def test_a_row_that_does_not_fit_its_names_is_refused() -> None:
    story = story_of(diamond())
    stored = _stored(story.state)
    stored["nodes"]["B"].append(1)
    with pytest.raises(ValueError, match="longer"):
        state_from_dict(RUN_ID, story.state.plans, stored)


def test_a_snapshot_holds_no_output() -> None:
    story = story_of(diamond())
    story.done("A", output={"secret": "canary"})
    text = orjson.dumps(state_as_dict(story.state))
    assert b"canary" not in text
    assert story.node("A").done_seq == story.state.seq
