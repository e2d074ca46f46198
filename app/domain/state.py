"""The state of a run as a fold over its journal.

`apply(state, event)` is the only way a state changes, in the process that drives the run and in
every process that reads it: state = fold(journal), and fold(snapshot + tail) = fold(all). It keeps
the counts that `ready_set` and `decide` read, so that a step costs the same in a plan of 100 nodes
and in one of 2,000. Outputs are not part of the state: a node's `done_seq` says which event has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from app.domain.budget import Spent
from app.domain.events import BlockReason, Event, EventType
from app.domain.plan import Plan
from app.domain.run import NodeStatus, RunStatus

SNAPSHOT_FORMAT = 2

CapabilityKey = tuple[str, str]


@dataclass(slots=True)
class NodeState:
    """One node. `attempt` counts started attempts, `round` the times it was ordered anew.

    `unmet` is the number of direct requirements that are not done; `retry_at` (ms) is when a
    pending node may start again; `done_seq` is the seq of the event that holds the output.
    """

    status: NodeStatus = NodeStatus.PENDING
    attempt: int = 0
    round: int = 1
    attempts_before_round: int = 0
    unmet: int = 0
    retry_at: int | None = None
    done_seq: int | None = None
    reason: str | None = None
    error: dict[str, Any] | None = None
    started_at: int | None = None
    duration_ms: float | None = None


@dataclass(slots=True)
class RunState:
    """Everything `decide` needs to know about a run.

    `ready` holds pending nodes that may start now, in the order in which they became ready; those
    whose capability has a limit of its own wait in `ready_limited`. `waiting` holds nodes with a
    `retry_at`: pending ones, and those that an open breaker blocks until then. `to_block` holds
    pending nodes below a failed one. Times are ms since 1970.
    """

    run_id: str
    plans: Mapping[int, Plan] = field(repr=False)
    status: RunStatus = RunStatus.QUEUED
    plan: Plan | None = field(default=None, repr=False)
    seq: int = 0
    last_ts: int = 0
    nodes: dict[str, NodeState] = field(default_factory=dict)
    ready: dict[str, None] = field(default_factory=dict)
    ready_limited: dict[CapabilityKey, dict[str, None]] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    running: dict[str, None] = field(default_factory=dict)
    to_block: dict[str, None] = field(default_factory=dict)
    failed: dict[str, None] = field(default_factory=dict)
    blocked: dict[str, None] = field(default_factory=dict)
    done_count: int = 0
    queued_at: int = 0
    started_at: int | None = None
    finished_at: int | None = None
    planning_ms: float | None = None
    paused_at: int | None = None
    paused_seq: int | None = None
    paused_ms: int = 0
    spent: Spent = field(default_factory=Spent)

    def unknown_outcomes(self) -> list[str]:
        """Nodes whose effect may or may not have happened, in the order they were blocked."""
        return [
            node_id
            for node_id in self.blocked
            if self.nodes[node_id].reason == BlockReason.UNKNOWN_OUTCOME
        ]


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
    state.plan = plan
    state.planning_ms = event.data.get("planning_ms")
    for node in plan.nodes.values():
        state.nodes[node.id] = NodeState(unmet=len(node.requires))
        if not node.requires:
            _make_ready(state, node.id)


def _make_ready(state: RunState, node_id: str) -> None:
    assert state.plan is not None
    node = state.plan.nodes[node_id]
    if node.concurrency is None:
        state.ready[node_id] = None
    else:
        key = (node.capability_id, node.capability_version)
        state.ready_limited.setdefault(key, {})[node_id] = None


def _leave_ready(state: RunState, node_id: str) -> None:
    """A node stops being ready or waiting: it started, or it was blocked."""
    if node_id in state.ready:
        del state.ready[node_id]
        return
    if state.waiting.pop(node_id, None) is not None:
        return
    assert state.plan is not None
    node = state.plan.nodes[node_id]
    key = (node.capability_id, node.capability_version)
    queue = state.ready_limited.get(key)
    if queue is not None and node_id in queue:
        del queue[node_id]
        if not queue:
            del state.ready_limited[key]


def _node_start(state: RunState, event: Event) -> None:
    node_id = _node_id(event)
    node = state.nodes[node_id]
    _leave_ready(state, node_id)
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
    _leave_ready(state, node_id)
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
            _make_ready(state, child_id)


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
        _leave_ready(state, node_id)
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


def _node_id(event: Event) -> str:
    assert event.node_id is not None, f"{event.type} without a node"
    return event.node_id


_HANDLERS: dict[str, Callable[[RunState, Event], None]] = {
    EventType.RUN_QUEUED: _run_queued,
    EventType.RUN_START: _run_start,
    EventType.PLAN_GENERATED: _plan_generated,
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
