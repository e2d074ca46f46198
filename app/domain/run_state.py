"""What the state of a run holds: the value that `state.py` folds from the journal.

Only the fold changes it. Here are its fields, what can be read off them at once, and how a node
joins and leaves the queues of what may start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.domain.budget import Spent
from app.domain.capability import NodeKind
from app.domain.events import BlockReason
from app.domain.plan import Plan
from app.domain.run import NodeStatus, RunStatus

SNAPSHOT_FORMAT = 3
BY_OPERATOR = ""
"""Who asks for a replan when no policy does. No policy has this id."""

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

    @property
    def awaits_human(self) -> bool:
        """Whether only a person's decision can move it."""
        return self.reason in (BlockReason.UNKNOWN_OUTCOME, BlockReason.AWAITING_ANSWER)


@dataclass(slots=True)
class RunState:
    """Everything `decide` needs to know about a run.

    `ready` holds pending nodes that may start now, in the order in which they became ready; those
    whose capability has a limit of its own wait in `ready_limited`, and fallbacks, which nobody
    calls, in `to_ask`. `waiting` holds nodes with a `retry_at`: pending ones, and those that an
    open breaker blocks until then. `to_block` holds pending nodes below a failed one.

    `replan` is the id of the policy that asks for a new plan version, until there is one or it is
    known that there is none; nothing starts meanwhile. `retired` holds attempt and round of called
    nodes that no plan version in force has any more. Times are ms since 1970.
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
    to_ask: dict[str, None] = field(default_factory=dict)
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
    replan: str | None = None
    policies_fired: dict[str, int] = field(default_factory=dict)
    retired: dict[str, tuple[int, int]] = field(default_factory=dict)

    def awaiting_human(self) -> list[str]:
        """Nodes that a person has to decide about, in the order they were blocked."""
        return [node_id for node_id in self.blocked if self.nodes[node_id].awaits_human]

    def unknown_outcomes(self) -> list[str]:
        """Nodes whose effect may or may not have happened, in the order they were blocked."""
        return [
            node_id
            for node_id in self.blocked
            if self.nodes[node_id].reason == BlockReason.UNKNOWN_OUTCOME
        ]


def make_ready(state: RunState, node_id: str) -> None:
    assert state.plan is not None
    node = state.plan.nodes[node_id]
    if node.kind is NodeKind.FALLBACK:
        state.to_ask[node_id] = None
    elif node.concurrency is None:
        state.ready[node_id] = None
    else:
        key = (node.capability_id, node.capability_version)
        state.ready_limited.setdefault(key, {})[node_id] = None


def leave_ready(state: RunState, node_id: str) -> None:
    """A node stops being ready or waiting: it started, or it was blocked."""
    if node_id in state.ready:
        del state.ready[node_id]
        return
    if state.to_ask.pop(node_id, node_id) is None:
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
