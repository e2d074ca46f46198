"""Runtime policies: what an envelope may say of them, and which of them fire."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.domain.capability import NodeKind
from app.domain.envelope import Envelope
from app.domain.event_shapes import PolicyTriggeredData
from app.domain.events import BlockReason, Event, EventType
from app.domain.plan import Plan
from app.domain.policy import POLICIES_MAX, RuntimePolicy, Selector, TriggerKind, with_own_ids
from app.domain.state import RunState
from app.domain.triggers import triggered
from tests.plans import Story, plan_node, plan_of, story_of

DONE, FAILED = TriggerKind.ON_NODE_COMPLETE, TriggerKind.ON_NODE_FAILED


def _body(policy_id: str = "p", kind: str = "on_node_failed", **more: Any) -> dict[str, Any]:
    return {"id": policy_id, "trigger": {"kind": kind}, "action": {"kind": "replan"}, **more}


def _policy(
    policy_id: str = "p",
    trigger: TriggerKind = DONE,
    *,
    enabled: bool = True,
    max_attempts: int = 1,
    **selector: Any,
) -> RuntimePolicy:
    return RuntimePolicy.model_validate(
        {
            "id": policy_id,
            "enabled": enabled,
            "trigger": {"kind": trigger, "selector": selector},
            "action": {"kind": "replan", "max_attempts": max_attempts},
        }
    )


def _envelope(*policies: dict[str, Any]) -> Envelope:
    return Envelope.model_validate(
        {
            "objective": "brief the team",
            "output_contract": {"mode": "freeform", "instructions": "say something"},
            "policies": {"runtime": list(policies)},
        }
    )


def _plan() -> Plan:
    return plan_of(
        plan_node("A", capability_id="web.search"),
        plan_node("B", capability_id="web.search", kind=NodeKind.TRANSFORMATION),
        plan_node("C"),
    )


def _fired(story: Story, *policies: RuntimePolicy, since: int = 0) -> list[tuple[str, str | None]]:
    """What fires on the events behind `since`: policy and node."""
    found = triggered(policies, story.events[since:], story.state)
    return [(event.data["policy_id"], event.node_id) for event in found]


# What an envelope may say


def test_a_policy_has_the_documented_defaults() -> None:
    [found] = _envelope(_body()).policies.runtime
    assert found.enabled
    assert found.trigger.selector == Selector(node_id=None, kind=None, capability_id=None)
    assert (found.action.rationale, found.action.max_attempts) == ("", 1)


def test_a_policy_keeps_what_it_says() -> None:
    selector = {"node_id": "A", "kind": "validation", "capability_id": "util.echo"}
    body = {
        "id": "p",
        "enabled": False,
        "trigger": {"kind": "on_node_complete", "selector": selector},
        "action": {"kind": "replan", "rationale": "better sources", "max_attempts": 20},
    }
    [found] = _envelope(body).policies.runtime
    assert found.model_dump(mode="json") == body


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"id": ""}, ("id",)),
        ({"id": "x" * 101}, ("id",)),
        ({"enable": True}, ("enable",)),
        ({"trigger": {}}, ("trigger", "kind")),
        ({"trigger": {"kind": "on_monday"}}, ("trigger", "kind")),
        (
            {"trigger": {"kind": "on_node_failed", "selector": {"node": "A"}}},
            ("trigger", "selector", "node"),
        ),
        (
            {"trigger": {"kind": "on_node_failed", "selector": {"kind": "magic"}}},
            ("trigger", "selector", "kind"),
        ),
        ({"action": {}}, ("action", "kind")),
        ({"action": {"kind": "explode"}}, ("action", "kind")),
        ({"action": {"kind": "replan", "max_attempts": 0}}, ("action", "max_attempts")),
        ({"action": {"kind": "replan", "max_attempts": 21}}, ("action", "max_attempts")),
        ({"action": {"kind": "replan", "rationale": "x" * 2_001}}, ("action", "rationale")),
    ],
)
def test_a_policy_refuses(changes: dict[str, Any], where: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        _envelope({**_body(), **changes})
    [error] = refused.value.errors()
    assert error["loc"] == ("policies", "runtime", 0, *where)


@pytest.mark.parametrize("name", ["id", "trigger", "action"])
def test_what_a_policy_must_say(name: str) -> None:
    body = _body()
    del body[name]
    with pytest.raises(ValidationError) as refused:
        _envelope(body)
    assert [error["loc"] for error in refused.value.errors()] == [("policies", "runtime", 0, name)]


def test_the_policies_of_an_envelope_have_ids_of_their_own() -> None:
    assert [p.id for p in _envelope(_body("a"), _body("b")).policies.runtime] == ["a", "b"]
    with pytest.raises(ValidationError, match="two policies have the id 'a'") as refused:
        _envelope(_body("a"), _body("b"), _body("a"))
    [error] = refused.value.errors()
    assert error["loc"] == ("policies", "runtime")
    assert with_own_ids([]) == []


def test_an_envelope_has_a_bounded_number_of_policies() -> None:
    bodies = [_body(f"p{i}") for i in range(POLICIES_MAX + 1)]
    assert len(_envelope(*bodies[:-1]).policies.runtime) == POLICIES_MAX
    with pytest.raises(ValidationError, match="at most 50"):
        _envelope(*bodies)


# Which fire


def test_a_policy_fires_on_the_end_that_it_looks_at() -> None:
    story = story_of(_plan())
    policies = (_policy("done", DONE), _policy("failed", FAILED))
    assert _fired(story, *policies) == []
    story.start("A")
    assert _fired(story, *policies) == []
    story.done("A")
    assert _fired(story, *policies) == [("done", "A")]
    seen = len(story.events)
    story.fail("B")
    assert _fired(story, *policies, since=seen) == [("failed", "B")]


def test_what_does_not_end_a_node_sets_nothing_off() -> None:
    story = story_of(_plan())
    story.skip("A")
    for node_id in ("B", "C"):
        story.start(node_id)
    story.retry("B", 5)
    story.block("C", BlockReason.UNKNOWN_OUTCOME)
    story.pause()
    assert _fired(story, _policy("done", DONE), _policy("failed", FAILED)) == []


def test_what_is_fired_has_the_declared_shape_and_asks_for_a_replan() -> None:
    story = story_of(_plan())
    story.fail("A")
    policy = RuntimePolicy.model_validate(
        _body(action={"kind": "replan", "rationale": "try another source"})
    )
    [event] = triggered([policy], story.events, story.state)
    assert event == Event(
        EventType.POLICY_TRIGGERED,
        {
            "policy_id": "p",
            "trigger": "on_node_failed",
            "action": "replan",
            "rationale": "try another source",
        },
        node_id="A",
    )
    PolicyTriggeredData.model_validate(event.data)
    story.add(event)
    assert (story.state.replan, story.state.policies_fired) == ("p", {"p": 1})


def test_without_a_rationale_none_is_told() -> None:
    story = story_of(_plan())
    story.done("A")
    [event] = triggered([_policy()], story.events, story.state)
    assert event.data == {"policy_id": "p", "trigger": "on_node_complete", "action": "replan"}


@pytest.mark.parametrize(
    ("selector", "node_id"),
    [
        ({}, "A"),
        ({"node_id": "C"}, "C"),
        ({"node_id": "D"}, None),
        ({"kind": "transformation"}, "B"),
        ({"kind": "validation"}, None),
        ({"capability_id": "util.echo"}, "C"),
        ({"capability_id": "web"}, None),
        ({"capability_id": "web.search", "kind": "transformation"}, "B"),
        ({"capability_id": "util.echo", "kind": "transformation"}, None),
        ({"node_id": "A", "capability_id": "util.echo"}, None),
        ({"node_id": "B", "kind": "transformation", "capability_id": "web.search"}, "B"),
    ],
)
def test_all_parts_of_a_selector_must_match(selector: dict[str, Any], node_id: str | None) -> None:
    story = story_of(_plan())
    story.done("A", "B", "C")
    assert _fired(story, _policy(**selector)) == ([] if node_id is None else [("p", node_id)])


def test_only_the_first_policy_fires_in_declared_order_and_not_in_that_of_events() -> None:
    story = story_of(_plan())
    story.done("A")
    story.fail("B")
    first, second = _policy("first", FAILED), _policy("second", DONE)
    assert _fired(story, first, second) == [("first", "B")]
    assert _fired(story, second, first) == [("second", "A")]


def test_a_policy_that_is_switched_off_does_not_stand_in_the_way() -> None:
    story = story_of(_plan())
    story.done("A")
    assert _fired(story, _policy("off", enabled=False), _policy("on")) == [("on", "A")]


def test_a_policy_fires_as_often_as_it_may() -> None:
    """Also over plan versions: the count is the run's."""
    story = story_of(_plan())
    policy = _policy(max_attempts=2)
    for version in (2, 3):
        seen = len(story.events)
        story.done("A" if version == 2 else "B")
        [event] = triggered([policy], story.events[seen:], story.state)
        story.add(event)
        story.replan(plan_of(*_plan().nodes.values(), version=version))
    seen = len(story.events)
    story.done("C")
    assert _fired(story, policy, since=seen) == []
    assert _fired(story, policy, _policy("another"), since=seen) == [("another", "C")]


def test_while_a_plan_is_made_anew_nothing_else_fires() -> None:
    story = story_of(_plan())
    story.done("A")
    story.add(*triggered([_policy("first")], story.events, story.state))
    story.done("B")
    assert _fired(story, _policy("second")) == []


def test_an_answer_of_a_planner_frees_the_next_one() -> None:
    story = story_of(_plan())
    story.done("A")
    story.add(*triggered([_policy("first")], story.events, story.state))
    story.reject_plan()
    seen = len(story.events)
    story.done("B")
    assert _fired(story, _policy("first"), _policy("second"), since=seen) == [("second", "B")]


def test_a_node_that_the_plan_in_force_no_longer_has_sets_nothing_off() -> None:
    story = story_of(_plan())
    story.fail("A")
    story.replan(plan_of(plan_node("C"), version=2))
    assert _fired(story, _policy("p", FAILED)) == []


def test_a_run_without_a_plan_has_nothing_to_replan() -> None:
    done = Event(EventType.NODE_DONE, {"output": {}}, node_id="A")
    assert triggered([_policy()], [done], RunState("r", {})) == []
