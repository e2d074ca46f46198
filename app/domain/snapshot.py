"""Snapshots: a run's state at one seq as plain JSON, so that a resume need not fold from event 1.

A snapshot only saves time: `fold(snapshot + tail) == fold(all)`, and a format that this version
does not know is simply not used. It refers to outputs by seq and never holds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from decimal import Decimal
from typing import Any

from app.domain.budget import Spent
from app.domain.plan import Plan
from app.domain.run import NodeStatus, RunStatus
from app.domain.state import SNAPSHOT_FORMAT, NodeState, RunState

_PLAIN = (
    *("seq", "last_ts", "done_count", "queued_at", "started_at", "finished_at"),
    *("planning_ms", "paused_at", "paused_seq", "paused_ms", "replan"),
)
_ORDERED = ("ready", "running", "to_block", "to_ask", "failed", "blocked")
_NODE_FIELDS = tuple(field.name for field in fields(NodeState))


def state_as_dict(state: RunState) -> dict[str, Any]:
    """The state as JSON. Node states are rows, in the order of `node_fields`."""
    found: dict[str, Any] = {
        "format": SNAPSHOT_FORMAT,
        "status": state.status,
        "plan_version": None if state.plan is None else state.plan.version,
        "node_fields": _NODE_FIELDS,
        "nodes": {
            node_id: [getattr(node, name) for name in _NODE_FIELDS]
            for node_id, node in state.nodes.items()
        },
        "ready_limited": [[*key, list(queue)] for key, queue in state.ready_limited.items()],
        "waiting": list(state.waiting.items()),
        "spent": [str(state.spent.usd), state.spent.tokens, state.spent.calls],
        "policies_fired": dict(state.policies_fired),
        "retired": {node_id: list(found) for node_id, found in state.retired.items()},
    }
    found.update({name: getattr(state, name) for name in _PLAIN})
    found.update({name: list(getattr(state, name)) for name in _ORDERED})
    return found


def state_from_dict(
    run_id: str, plans: Mapping[int, Plan], found: Mapping[str, Any]
) -> RunState | None:
    """The state of a snapshot, or None when another version of Flexrun wrote it."""
    if found["format"] != SNAPSHOT_FORMAT:
        return None
    version = found["plan_version"]
    state = RunState(
        run_id=run_id,
        plans=plans,
        status=RunStatus(found["status"]),
        plan=None if version is None else plans[version],
        waiting=dict(found["waiting"]),
    )
    usd, tokens, calls = found["spent"]
    state.spent = Spent(Decimal(usd), tokens, calls)
    state.policies_fired = dict(found["policies_fired"])
    state.retired = {node_id: (count, turn) for node_id, (count, turn) in found["retired"].items()}
    for name in _PLAIN:
        setattr(state, name, found[name])
    for name in _ORDERED:
        setattr(state, name, dict.fromkeys(found[name]))
    for capability_id, capability_version, queue in found["ready_limited"]:
        state.ready_limited[capability_id, capability_version] = dict.fromkeys(queue)
    for node_id, row in found["nodes"].items():
        node = NodeState(**dict(zip(found["node_fields"], row, strict=True)))
        node.status = NodeStatus(node.status)
        state.nodes[node_id] = node
    return state
