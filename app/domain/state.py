"""The state of a run as a fold over its journal.

`apply(state, event)` is the only way a state changes, in the process that drives the run and in
every process that reads it: state = fold(journal), and fold(snapshot + tail) = fold(all). It keeps
the counts that `ready_set` and `decide` read, so that a step costs the same in a plan of 100 nodes
and in one of 2,000. Outputs are not part of the state: a node's `done_seq` says which event has it.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

from app.domain.budget import Spent
from app.domain.capability import NodeKind
from app.domain.events import BlockReason, Event, EventType
from app.domain.plan import PlanNode
from app.domain.plan_change import replace_plan
from app.domain.run import NodeStatus, RunStatus
from app.domain.run_state import (
    BY_OPERATOR,
    SNAPSHOT_FORMAT,
    CapabilityKey,
    NodeState,
    RunState,
    leave_ready,
    make_ready,
)

__all__ = ["SNAPSHOT_FORMAT", "CapabilityKey", "NodeState", "RunState", "apply"]


def apply(state: RunState, event: Event) -> None:
    """Fold one event into the state, in place. Unknown types change nothing but `seq`."""
    state.seq = event.seq
    state.last_ts = event.ts
    handler = _HANDLERS.get(event.type)
    if handler is not None:
        handler(state, event)


def _run_queued(state: RunState, event: Event) -> None:
    state.queued_at = event.ts


def _run_start(state: RunState, event: Event) -> None:
    state.status = RunStatus.RUNNING
    state.started_at = event.ts


def _plan_generated(state: RunState, event: Event) -> None:
    plan = state.plans[event.data["version"]]
    before, state.plan = state.plan, plan
    state.planning_ms = event.data.get("planning_ms")
    if before is not None:
        replace_plan(state, before)
        return
    for node in plan.nodes.values():
        state.nodes[node.id] = NodeState(unmet=len(node.requires))
        if not node.requires:
            make_ready(state, node.id)


def _plan_rejected(state: RunState, event: Event) -> None:
    if "final" in event.data:
        state.replan = None


def _policy_triggered(state: RunState, event: Event) -> None:
    policy_id = event.data["policy_id"]
    state.policies_fired[policy_id] = state.policies_fired.get(policy_id, 0) + 1
    state.replan = policy_id


def _node_start(state: RunState, event: Event) -> None:
    node_id = _node_id(event)
    node = state.nodes[node_id]
    leave_ready(state, node_id)
    state.blocked.pop(node_id, None)
    state.running[node_id] = None
    node.status = NodeStatus.RUNNING
    node.attempt = event.attempt or 1
    node.reason = None
    node.retry_at = None
    node.started_at = event.ts


def _node_done(state: RunState, event: Event) -> None:
    node_id = _node_id(event)
    node = state.nodes[node_id]
    state.running.pop(node_id, None)
    state.blocked.pop(node_id, None)
    node.status = NodeStatus.DONE
    node.reason = None
    node.error = None
    node.duration_ms = event.data.get("duration_ms")
    _satisfy_children(state, node_id, event.seq)


def _node_skipped(state: RunState, event: Event) -> None:
    """It counts as done: its result is in this very event."""
    node_id = _node_id(event)
    node = state.nodes[node_id]
    leave_ready(state, node_id)
    node.status = NodeStatus.SKIPPED
    node.reason = event.data["reason"]
    _satisfy_children(state, node_id, event.seq)


def _satisfy_children(state: RunState, node_id: str, seq: int) -> None:
    state.nodes[node_id].done_seq = seq
    state.done_count += 1
    assert state.plan is not None
    for child_id in state.plan.children[node_id]:
        child = state.nodes[child_id]
        child.unmet -= 1
        if child.unmet == 0 and child.status is NodeStatus.PENDING:
            make_ready(state, child_id)


def _node_retry(state: RunState, event: Event) -> None:
    """Back to pending: after a failed attempt with a delay, or because an operator orders it."""
    node_id = _node_id(event)
    node = state.nodes[node_id]
    state.running.pop(node_id, None)
    state.blocked.pop(node_id, None)
    node.status = NodeStatus.PENDING
    if (ordered := event.data.get("round")) is not None:
        node.round = ordered
        node.attempts_before_round = node.attempt
    node.reason = None
    node.error = event.data.get("error")
    if _plan_node(state, node_id).kind is NodeKind.FALLBACK:
        # What was missing may be there now: plan again, and ask again only if it still is.
        state.replan = BY_OPERATOR
        state.to_ask[node_id] = None
        return
    node.retry_at = event.ts + event.data["delay_ms"]
    state.waiting[node_id] = node.retry_at


def _node_failed(state: RunState, event: Event) -> None:
    node_id = _node_id(event)
    node = state.nodes[node_id]
    state.running.pop(node_id, None)
    state.blocked.pop(node_id, None)
    state.failed[node_id] = None
    node.status = NodeStatus.FAILED
    node.reason = None
    node.error = event.data["error"]
    node.duration_ms = event.data.get("duration_ms")
    _doom_children(state, node_id)


def _doom_children(state: RunState, node_id: str) -> None:
    assert state.plan is not None
    for child_id in state.plan.children[node_id]:
        if state.nodes[child_id].status is NodeStatus.PENDING:
            state.to_block[child_id] = None


def _node_blocked(state: RunState, event: Event) -> None:
    node_id = _node_id(event)
    node = state.nodes[node_id]
    if node.status is NodeStatus.RUNNING:
        del state.running[node_id]
    else:
        leave_ready(state, node_id)
    state.to_block.pop(node_id, None)
    state.blocked[node_id] = None
    node.attempt = event.attempt or node.attempt
    node.status = NodeStatus.BLOCKED
    node.reason = event.data["reason"]
    node.error = event.data.get("error")
    if node.reason == BlockReason.DEPENDENCY_FAILED:
        _doom_children(state, node_id)
    elif node.reason == BlockReason.BREAKER_OPEN:
        # Nothing was called: it goes on by itself, and no try of its round is used up.
        node.attempts_before_round += 1
        node.retry_at = event.ts + event.data["delay_ms"]
        state.waiting[node_id] = node.retry_at


def _run_paused(state: RunState, event: Event) -> None:
    state.status = RunStatus(event.data["status"])
    state.paused_at = event.ts
    state.paused_seq = event.seq


def _run_resumed(state: RunState, event: Event) -> None:
    state.status = RunStatus.RUNNING
    if state.paused_at is not None:
        state.paused_ms += event.ts - state.paused_at
        state.paused_at = None


def _llm_response(state: RunState, event: Event) -> None:
    data = event.data
    tokens = data["tokens_in"] + data["tokens_out"]
    state.spent.add(Spent(Decimal(data["cost_usd"]), tokens, 1))


def _run_done(state: RunState, event: Event) -> None:
    _finish(state, event, RunStatus.DONE)


def _run_failed(state: RunState, event: Event) -> None:
    _finish(state, event, RunStatus.FAILED)


def _run_cancelled(state: RunState, event: Event) -> None:
    _finish(state, event, RunStatus.CANCELLED)


def _finish(state: RunState, event: Event, status: RunStatus) -> None:
    state.status = status
    state.finished_at = event.ts


def _plan_node(state: RunState, node_id: str) -> PlanNode:
    assert state.plan is not None
    return state.plan.nodes[node_id]


def _node_id(event: Event) -> str:
    assert event.node_id is not None, f"{event.type} without a node"
    return event.node_id


_HANDLERS: dict[str, Callable[[RunState, Event], None]] = {
    EventType.RUN_QUEUED: _run_queued,
    EventType.RUN_START: _run_start,
    EventType.PLAN_GENERATED: _plan_generated,
    EventType.PLAN_REJECTED: _plan_rejected,
    EventType.POLICY_TRIGGERED: _policy_triggered,
    EventType.NODE_START: _node_start,
    EventType.NODE_DONE: _node_done,
    EventType.NODE_RETRY: _node_retry,
    EventType.NODE_FAILED: _node_failed,
    EventType.NODE_BLOCKED: _node_blocked,
    EventType.NODE_SKIPPED: _node_skipped,
    EventType.RUN_PAUSED: _run_paused,
    EventType.RUN_RESUMED: _run_resumed,
    EventType.LLM_RESPONSE: _llm_response,
    EventType.RUN_DONE: _run_done,
    EventType.RUN_FAILED: _run_failed,
    EventType.RUN_CANCELLED: _run_cancelled,
}
