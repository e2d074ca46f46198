"""Signals: messages of operators to whoever drives a run, and what each does to its run.

Every signal is judged again when it is applied, because the run may have moved on since the API
accepted it. One that does not fit any more is discarded, with the reason in the audit trail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

from app.domain.capability import Effect
from app.domain.events import BlockReason, Event, EventType, Level, error_data
from app.domain.run import NodeStatus, RunStatus
from app.domain.state import RunState


class SignalKind(StrEnum):
    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"


class NodeDecision(StrEnum):
    """What an operator says of a node that waits for a person.

    `retry` of a fallback, which nobody calls, is to plan again.
    """

    DONE = "done"
    RETRY = "retry"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Signal:
    """One stored signal. `body` is what the API accepted: `{operator?, note?, nodes? …}`."""

    signal_id: UUID
    run_id: UUID
    kind: SignalKind
    body: dict[str, Any]


@dataclass(slots=True)
class Applied:
    """What a signal did: its events, the outputs it supplies, its outcome for the audit trail."""

    outcome: str = "applied"
    events: list[Event] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)


def apply_signal(state: RunState, signal: Signal) -> Applied:
    """The consequences of a signal in this state. Nothing is changed here."""
    if state.status.is_terminal:
        return Applied(f"discarded: the run is {state.status}")
    return _APPLIED_BY[signal.kind](state, signal)


def uncertain_nodes(state: RunState) -> list[str]:
    """Nodes whose effect may have happened although the journal has no result of it.

    Those that are blocked for that reason, and calls of `at_most_once` capabilities under way.
    """
    assert state.plan is not None
    return [
        node_id
        for node_id, node in state.nodes.items()
        if node.reason == BlockReason.UNKNOWN_OUTCOME
        or (
            node.status is NodeStatus.RUNNING
            and state.plan.nodes[node_id].effect is Effect.AT_MOST_ONCE
        )
    ]


def _cancel(state: RunState, signal: Signal) -> Applied:
    """End the run now. Calls under way are cut off once this is durable."""
    unfinished = [
        node_id
        for node_id, node in state.nodes.items()
        if node.status in (NodeStatus.PENDING, NodeStatus.RUNNING, NodeStatus.BLOCKED)
    ]
    data: dict[str, Any] = {
        **_by(signal),
        "unfinished_nodes": unfinished,
        "unknown_outcomes": [] if state.plan is None else uncertain_nodes(state),
    }
    return Applied(events=[Event(EventType.RUN_CANCELLED, data, level=Level.WARN)])


def _pause(state: RunState, signal: Signal) -> Applied:
    """Start nothing new. Calls under way may end, and their results are recorded."""
    if state.status is not RunStatus.RUNNING:
        return Applied(f"discarded: the run is {state.status}")
    data = {
        "status": RunStatus.PAUSED,
        "reason": "operator",
        "nodes": list(state.running),
        **_by(signal),
    }
    return Applied(events=[Event(EventType.RUN_PAUSED, data, level=Level.WARN)])


def _by(signal: Signal) -> dict[str, Any]:
    return {
        "signal_id": str(signal.signal_id),
        "operator": signal.body.get("operator"),
        "note": signal.body.get("note"),
    }


def _resume(state: RunState, signal: Signal) -> Applied:
    """Go on, with the decisions that the run waited for."""
    if state.status not in (RunStatus.AWAITING_HUMAN, RunStatus.PAUSED):
        return Applied(f"discarded: the run is {state.status}")
    body = signal.body
    if body["paused_seq"] != state.paused_seq:
        return Applied("discarded: it answers an earlier pause")
    decisions: dict[str, dict[str, Any]] = body.get("nodes") or {}
    nodes = {node_id: given["decision"] for node_id, given in decisions.items()}
    applied = Applied(events=[Event(EventType.RUN_RESUMED, {**_by(signal), "nodes": nodes})])
    for node_id, given in decisions.items():
        node = state.nodes.get(node_id)
        if node is None or not node.awaits_human:
            return Applied(f"discarded: node {node_id!r} does not wait for a decision")
        if given["decision"] == NodeDecision.DONE:
            applied.outputs[node_id] = given["output"]
        applied.events.append(_decided(node_id, given, state, body.get("operator")))
    return applied


def _decided(node_id: str, given: dict[str, Any], state: RunState, operator: Any) -> Event:
    """What an operator's decision makes of a node."""
    node = state.nodes[node_id]
    decision = NodeDecision(given["decision"])
    data: dict[str, Any]
    if decision is NodeDecision.DONE:
        data = {"output": given["output"], "decided_by": operator}
    elif decision is NodeDecision.RETRY:
        data = {"delay_ms": 0, "round": node.round + 1, "error": node.error}
    else:
        text = "An operator declared the node failed."
        data = {"error": error_data("operator_decision", text)}
    event_type, level = _DECIDED_AS[decision]
    return Event(event_type, data, node_id=node_id, attempt=node.attempt, level=level)


_DECIDED_AS = {
    NodeDecision.DONE: (EventType.NODE_DONE, Level.INFO),
    NodeDecision.RETRY: (EventType.NODE_RETRY, Level.INFO),
    NodeDecision.FAIL: (EventType.NODE_FAILED, Level.ERROR),
}

_APPLIED_BY = {SignalKind.CANCEL: _cancel, SignalKind.PAUSE: _pause, SignalKind.RESUME: _resume}
