"""Plans in memory, and stories: a run's events with the state that they lead to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.domain.capability import Effect, NodeKind
from app.domain.decide import Decision, RunLimits, decide
from app.domain.events import BlockReason, Event, EventType, SkipReason, error_data
from app.domain.plan import Author, OutputSource, Plan, PlanNode, children_of
from app.domain.run import RunStatus
from app.domain.state import CapabilityKey, NodeState, RunState, apply

RUN_ID = "0190b1c2-0000-7000-8000-000000000001"
START_MS = 1_750_000_000_000


def plan_node(node_id: str, *requires: str, **changes: Any) -> PlanNode:
    """A pure node without inputs; `changes` are fields of `PlanNode`."""
    node = PlanNode(
        id=node_id,
        kind=NodeKind.EXECUTION,
        label=node_id,
        text="",
        capability_id="util.echo",
        capability_version="1.0.0",
        requires=requires,
        bindings={},
        input_facets=(),
        output_facets=(),
        effect=Effect.PURE,
        timeout_s=60.0,
        max_attempts=3,
    )
    return replace(node, **changes)


def limited_node(
    node_id: str, *requires: str, capability: str = "rare", concurrency: int = 1, **changes: Any
) -> PlanNode:
    """A node whose capability may only run `concurrency` times at once."""
    return plan_node(
        node_id, *requires, capability_id=capability, concurrency=concurrency, **changes
    )


def key_of(node: PlanNode) -> CapabilityKey:
    return (node.capability_id, node.capability_version)


def plan_of(*nodes: PlanNode, version: int = 1) -> Plan:
    """The plan of these nodes; its output is that of the last one."""
    by_id = {node.id: node for node in nodes}
    output = (OutputSource(None, nodes[-1].id, ""),) if nodes else ()
    return Plan(
        run_id=RUN_ID,
        version=version,
        created_at="2025-06-15T15:06:40.000Z",
        author=Author.CALLER,
        nodes=by_id,
        output=output,
        proof=(),
        children=children_of(by_id),
    )


def diamond(**changes: Any) -> Plan:
    """A, then B and C, then D."""
    return plan_of(
        plan_node("A", **changes),
        plan_node("B", "A", **changes),
        plan_node("C", "A", **changes),
        plan_node("D", "B", "C", **changes),
    )


def chain(length: int, **changes: Any) -> Plan:
    first = plan_node("n0", **changes)
    return plan_of(first, *(plan_node(f"n{i}", f"n{i - 1}", **changes) for i in range(1, length)))


def wide(width: int, **changes: Any) -> Plan:
    """A root, `width` nodes that require it, and one that requires all of these."""
    middle = [f"w{i}" for i in range(width)]
    return plan_of(
        plan_node("root", **changes),
        *(plan_node(node_id, "root", **changes) for node_id in middle),
        plan_node("join", *middle, **changes),
    )


@dataclass
class Story:
    """A run told event by event. Every event is numbered, stamped with `now` and folded in."""

    plan: Plan
    state: RunState
    now: int = START_MS
    events: list[Event] = field(default_factory=list)

    def add(self, *events: Event) -> Event:
        """Fold events in as one append; the last one is returned."""
        for event in events:
            event.seq, event.ts = self.state.seq + 1, self.now
            apply(self.state, event)
            self.events.append(event)
        return self.events[-1]

    def node(self, node_id: str) -> NodeState:
        return self.state.nodes[node_id]

    def start(self, node_id: str, attempt: int | None = None) -> Event:
        number = self.node(node_id).attempt + 1 if attempt is None else attempt
        return self.add(Event(EventType.NODE_START, {}, node_id=node_id, attempt=number))

    def done(self, *node_ids: str, **data: Any) -> None:
        """Each node is started, unless it runs already, and ends well."""
        for node_id in node_ids:
            if node_id not in self.state.running:
                self.start(node_id)
            attempt = self.node(node_id).attempt
            body = {"output": {}, **data}
            self.add(Event(EventType.NODE_DONE, body, node_id=node_id, attempt=attempt))

    def fail(self, node_id: str, **data: Any) -> None:
        """The node is started, unless it runs already, and fails for good."""
        if node_id not in self.state.running:
            self.start(node_id)
        attempt = self.node(node_id).attempt
        body = {"error": error_data("broken", "It broke."), **data}
        self.add(Event(EventType.NODE_FAILED, body, node_id=node_id, attempt=attempt))

    def retry(self, node_id: str, delay_ms: int = 0, **data: Any) -> None:
        attempt = self.node(node_id).attempt
        body = {"delay_ms": delay_ms, **data}
        self.add(Event(EventType.NODE_RETRY, body, node_id=node_id, attempt=attempt))

    def block(self, node_id: str, reason: BlockReason = BlockReason.UNKNOWN_OUTCOME) -> None:
        attempt = self.node(node_id).attempt or None
        body = {"reason": reason, "error": error_data("reset", "The line went dead.")}
        self.add(Event(EventType.NODE_BLOCKED, body, node_id=node_id, attempt=attempt))

    def refuse(self, node_id: str, delay_ms: int) -> None:
        """The breaker of the node's far side did not let the call through."""
        body = {"reason": BlockReason.BREAKER_OPEN, "scope": "tool::host", "delay_ms": delay_ms}
        attempt = self.node(node_id).attempt
        self.add(Event(EventType.NODE_BLOCKED, body, node_id=node_id, attempt=attempt))

    def skip(self, *node_ids: str) -> None:
        """The results of these nodes are kept from an earlier run."""
        for node_id in node_ids:
            body = {"reason": SkipReason.RESUME, "output": {}}
            self.add(Event(EventType.NODE_SKIPPED, body, node_id=node_id))

    def replan(self, plan: Plan) -> None:
        """This plan version takes the place of the one in force."""
        self.plan = plan
        self.state.plans = {**self.state.plans, plan.version: plan}
        self.add(Event(EventType.PLAN_GENERATED, {"version": plan.version}))

    def reject_plan(self, *, is_final: bool = True) -> None:
        """The planner has no plan, for now or for good."""
        body = {"attempt": 1, "phase": "replan", "diagnostics": []}
        self.add(Event(EventType.PLAN_REJECTED, body | ({"final": True} if is_final else {})))

    def trigger(self, policy_id: str) -> None:
        """A policy fires: the plan is to be made anew."""
        body = {"policy_id": policy_id, "trigger": "on_node_failed", "action": "replan"}
        self.add(Event(EventType.POLICY_TRIGGERED, body))

    def pause(self, status: RunStatus = RunStatus.AWAITING_HUMAN) -> None:
        self.add(Event(EventType.RUN_PAUSED, {"status": status, "reason": "unknown_outcome"}))

    def decide(
        self,
        max_parallel: int = 16,
        *,
        deadline_ms: int | None = None,
        free_slots: Mapping[CapabilityKey, int] | None = None,
    ) -> Decision:
        return decide(self.state, self.now, RunLimits(max_parallel, deadline_ms, free_slots or {}))


def story_of(plan: Plan) -> Story:
    """A story up to the plan: RUN_QUEUED, RUN_START, PLAN_GENERATED."""
    story = Story(plan, RunState(plan.run_id, {plan.version: plan}))
    story.add(
        Event(EventType.RUN_QUEUED, {"objective": "tell a story", "lane": "standard"}),
        Event(EventType.RUN_START, {}),
        Event(EventType.PLAN_GENERATED, {"version": plan.version, "planning_ms": 0.5}),
    )
    return story


def fold(plans: Mapping[int, Plan], events: Iterable[Event]) -> RunState:
    """The state that events lead to, from nothing."""
    state = RunState(RUN_ID, plans)
    for event in events:
        apply(state, event)
    return state


def exact(state: RunState) -> dict[str, Any]:
    """Everything a state holds, with the order of every dictionary: `==` on dicts ignores it."""
    found: dict[str, Any] = {}
    for name in RunState.__slots__:
        value = getattr(state, name)
        if name == "ready_limited":
            value = [(key, list(queue)) for key, queue in value.items()]
        elif name == "plans":
            value = dict(value)
        elif isinstance(value, dict):
            value = list(value.items())
        found[name] = value
    return found


def told(decision: Decision) -> list[tuple[str, str | None]]:
    """A decision in short: type and node of its events."""
    return [(str(event.type), event.node_id) for event in decision.events]
