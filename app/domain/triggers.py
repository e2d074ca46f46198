"""Which runtime policies fire on what was just recorded.

What they do is in the events: whoever folds POLICY_TRIGGERED carries the action out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from app.domain.events import Event, EventType
from app.domain.policy import RuntimePolicy, Trigger, TriggerKind
from app.domain.state import RunState

_TRIGGERED_BY = {
    EventType.NODE_DONE: TriggerKind.ON_NODE_COMPLETE,
    EventType.NODE_FAILED: TriggerKind.ON_NODE_FAILED,
}


def triggered(
    policies: Sequence[RuntimePolicy], events: Iterable[Event], state: RunState
) -> list[Event]:
    """POLICY_TRIGGERED for the first policy that these events set off, in declared order.

    A replan changes the course of the run, so the first one is the only one: whatever else ended in
    the meantime is seen by the plan that is made next. `state` has the events folded in already.
    """
    if state.replan is not None or state.plan is None:
        return []
    ended = [event for event in events if event.type in _TRIGGERED_BY]
    for policy in policies:
        fired = state.policies_fired.get(policy.id, 0)
        if policy.enabled and fired < policy.action.max_attempts:
            for event in ended:
                if _matches(policy.trigger, event, state):
                    return [_fired(policy, event)]
    return []


def _matches(trigger: Trigger, event: Event, state: RunState) -> bool:
    assert state.plan is not None
    node = state.plan.nodes.get(event.node_id or "")
    if node is None or _TRIGGERED_BY[EventType(event.type)] is not trigger.kind:
        return False
    wanted = trigger.selector
    return (
        wanted.node_id in (None, node.id)
        and wanted.kind in (None, node.kind)
        and wanted.capability_id in (None, node.capability_id)
    )


def _fired(policy: RuntimePolicy, event: Event) -> Event:
    data: dict[str, Any] = {
        "policy_id": policy.id,
        "trigger": policy.trigger.kind,
        "action": policy.action.kind,
    }
    if policy.action.rationale:
        data["rationale"] = policy.action.rationale
    return Event(EventType.POLICY_TRIGGERED, data, node_id=event.node_id)
