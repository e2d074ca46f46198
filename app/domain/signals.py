"""Signals: messages of operators to whoever drives a run, stored until the run consumed them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

from app.domain.events import BlockReason, Event, EventType, Level, error_data
from app.domain.run import RunStatus
from app.domain.state import RunState


class SignalKind(StrEnum):
    RESUME = "resume"


class NodeDecision(StrEnum):
    """What an operator says of a node whose outcome is unknown."""

    DONE = "done"
    RETRY = "retry"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Signal:
    """One stored signal. `body` is what the API accepted."""

    signal_id: UUID
    kind: SignalKind
    body: dict[str, Any]


def apply_resume(state: RunState, signal: Signal) -> tuple[list[Event], dict[str, Any], str]:
    """The events a resume causes, the outputs it supplies, and its outcome for the audit trail.

    It is judged again here, because the run may have moved since the API accepted it: a resume of
    a run that does not wait is discarded.
    """
    if state.status not in (RunStatus.AWAITING_HUMAN, RunStatus.PAUSED):
        return [], {}, f"discarded: the run is {state.status}"
    body = signal.body
    if body["paused_seq"] != state.seq:
        return [], {}, "discarded: it answers an earlier pause"
    decisions: dict[str, dict[str, Any]] = body.get("nodes") or {}
    events = [
        Event(
            EventType.RUN_RESUMED,
            {
                "signal_id": str(signal.signal_id),
                "operator": body.get("operator"),
                "note": body.get("note"),
                "nodes": {node_id: given["decision"] for node_id, given in decisions.items()},
            },
        )
    ]
    outputs: dict[str, Any] = {}
    for node_id, given in decisions.items():
        node = state.nodes.get(node_id)
        if node is None or node.reason != BlockReason.UNKNOWN_OUTCOME:
            return [], {}, f"discarded: node {node_id!r} does not wait for a decision"
        match NodeDecision(given["decision"]):
            case NodeDecision.DONE:
                outputs[node_id] = given["output"]
                events.append(
                    Event(
                        EventType.NODE_DONE,
                        {"output": given["output"], "decided_by": body.get("operator")},
                        node_id=node_id,
                        attempt=node.attempt,
                    )
                )
            case NodeDecision.RETRY:
                events.append(
                    Event(
                        EventType.NODE_RETRY,
                        {"delay_ms": 0, "round": node.round + 1, "error": node.error},
                        node_id=node_id,
                        attempt=node.attempt,
                    )
                )
            case NodeDecision.FAIL:
                error = error_data("operator_decision", "An operator declared the node failed.")
                events.append(
                    Event(
                        EventType.NODE_FAILED,
                        {"error": error},
                        node_id=node_id,
                        attempt=node.attempt,
                        level=Level.ERROR,
                    )
                )
    return events, outputs, "applied"
