"""A plan version takes the place of another: what of the state goes on, and what begins anew."""

from __future__ import annotations

from app.domain.events import BlockReason
from app.domain.plan import Plan, PlanNode
from app.domain.run import NodeStatus
from app.domain.run_state import NodeState, RunState, make_ready


def replace_plan(state: RunState, before: Plan) -> None:
    """`state.plan` is in force now, in the place of `before`. Nothing runs while that happens.

    A node that is unchanged stays as it is, unless it failed or was blocked by a failure; one that
    is ordered anew begins a round of its own.
    """
    plan = state.plan
    assert plan is not None
    old, state.nodes = state.nodes, {}
    waiting, state.waiting = state.waiting, {}
    for node in plan.nodes.values():
        earlier = old.pop(node.id, None)
        if earlier is None:
            state.nodes[node.id] = _ordered_anew(*state.retired.pop(node.id, (0, 0)))
        elif _is_same(before.nodes[node.id], node) and not _is_lost(earlier):
            state.nodes[node.id] = earlier
            if node.id in waiting:
                state.waiting[node.id] = waiting[node.id]
        else:
            state.nodes[node.id] = _ordered_anew(earlier.attempt, earlier.round)
    state.retired.update((i, (node.attempt, node.round)) for i, node in old.items() if node.attempt)
    state.replan = None
    _recount(state, plan)


def _is_same(before: PlanNode, after: PlanNode) -> bool:
    """Whether both order the same call. `True` equals 1 in Python, but not for who is called."""
    return before == after and repr(before.bindings) == repr(after.bindings)


def _is_lost(node: NodeState) -> bool:
    """Whether it failed, or was given up below what failed: it is tried anew."""
    return node.status is NodeStatus.FAILED or node.reason == BlockReason.DEPENDENCY_FAILED


def _ordered_anew(attempt: int, earlier_round: int) -> NodeState:
    """A node to be started. Attempts go on counting, so that no result is ever taken for another;
    one that was called before has a new round, and so a new idempotency key."""
    if not attempt:
        return NodeState()
    return NodeState(attempt=attempt, round=earlier_round + 1, attempts_before_round=attempt)


def _recount(state: RunState, plan: Plan) -> None:
    """Counts and queues, from the nodes as they are now."""
    nodes = state.nodes
    state.ready, state.ready_limited, state.to_ask = {}, {}, {}
    state.failed, state.to_block = {}, {}
    state.done_count = sum(node.done_seq is not None for node in nodes.values())
    state.blocked = {
        node_id: None
        for node_id in state.blocked
        if node_id in nodes and nodes[node_id].status is NodeStatus.BLOCKED
    }
    for node in plan.nodes.values():
        found = nodes[node.id]
        if found.status is NodeStatus.PENDING and node.id not in state.waiting:
            found.unmet = sum(nodes[i].done_seq is None for i in node.requires)
            if not found.unmet:
                make_ready(state, node.id)
