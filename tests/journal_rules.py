"""The rules of a run, as a watcher of its journal and of the far side would write them down.

`Watch` learns only from events and checks each one before and after it is applied. `Outside` is the
far side's own list of calls; no crash reaches it. For `simulator.py`, which makes the journals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from app.domain.capability import Effect, NodeKind
from app.domain.decide import Failure
from app.domain.events import TERMINAL_EVENTS, BlockReason, Event, EventType
from app.domain.plan import Plan, PlanNode
from app.domain.plan_json import node_as_dict
from app.domain.policy import RuntimePolicy, TriggerKind
from app.domain.ready import ready_set
from app.domain.run import NODE_TRANSITIONS, RUN_TRANSITIONS, NodeStatus, RunStatus
from app.domain.state import NodeState, RunState, apply
from tests.plans import key_of, plan_of

FINISHED = (NodeStatus.DONE, NodeStatus.SKIPPED)
ASKED = (BlockReason.UNKNOWN_OUTCOME, BlockReason.AWAITING_ANSWER)


def is_kept(node: NodeState) -> bool:
    """Whether later plans have the node as it is: it has a result, or may have had an effect."""
    return node.status in FINISHED or node.reason == BlockReason.UNKNOWN_OUTCOME


def written(node: PlanNode) -> bytes:
    """A node to the last byte: `==` takes 1 for True."""
    return orjson.dumps(node_as_dict(node))


@dataclass(frozen=True)
class Inheritance:
    """What a successor takes over: results, and nodes whose effect may have happened."""

    kept: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()


@dataclass
class Call:
    """One call under way. `failure` None: it will return an output.

    `refused_ms`: its breaker does not let it through, and says when to ask again.
    """

    node: PlanNode
    attempt: int
    round: int
    ends_at: int
    failure: Failure | None
    refused_ms: int | None = None


@dataclass
class Outside:
    """Every call that ever reached the far side, and those that had or may have had an effect.

    `orders` are what was called, by idempotency key; `attempts` says in which round each was.
    """

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    effects: Counter[tuple[str, int]] = field(default_factory=Counter)
    orders: dict[tuple[str, int], PlanNode] = field(default_factory=dict)
    attempts: dict[tuple[str, int], int] = field(default_factory=dict)

    def called(self, call: Call) -> None:
        node_id = call.node.id
        ordered = self.orders.setdefault((node_id, call.round), call.node)
        assert written(ordered) == written(call.node), f"two orders have the key of {node_id}"
        number = self.attempts.setdefault((node_id, call.attempt), call.round)
        assert number == call.round, f"{node_id} attempt {call.attempt} has two keys"
        self.calls[node_id, call.attempt] += 1
        if call.failure is None or call.failure.unknown_outcome:
            self.effects[node_id, call.round] += 1

    def check(self, lives: int, inherits: Inheritance) -> None:
        for node_id in inherits.kept:
            assert not any(called == node_id for called, _ in self.calls), f"{node_id} was kept"
        for node_id in inherits.uncertain:
            assert self.effects[node_id, 1] == 0, f"{node_id} was called before anybody decided"
        for (node_id, attempt), count in self.calls.items():
            ordered = self.orders[node_id, self.attempts[node_id, attempt]]
            once = ordered.effect is Effect.AT_MOST_ONCE
            allowed = 1 if once else lives
            assert count <= allowed, f"{node_id} attempt {attempt} was called {count} times"
        for (node_id, number), count in self.effects.items():
            if self.orders[node_id, number].effect is Effect.AT_MOST_ONCE:
                assert count == 1, f"{node_id} may have happened {count} times in round {number}"


class Watch:
    """The rules of a journal, kept in the plainest way: sets of ids, recounted at every event."""

    def __init__(
        self,
        plans: Mapping[int, Plan],
        policies: Sequence[RuntimePolicy],
        max_parallel: int,
        deadline_ms: int | None,
        seen: Counter[str],
    ) -> None:
        self.plans = plans
        self.plan = plan_of(version=0)
        self.policies = {policy.id: policy for policy in policies}
        self.max_parallel = max_parallel
        self.deadline_ms = deadline_ms
        self.seen = seen
        self.seq = 0
        self.ended = False
        self.status: dict[str, NodeStatus] = {}
        self.attempt: Counter[str] = Counter()
        self.round: dict[str, int] = {}
        self.starts: Counter[tuple[str, int]] = Counter()
        self.refused_until: dict[str, int] = {}
        self.given_up: Counter[str] = Counter()
        self.results: set[tuple[str, int | None]] = set()
        self.reasons: dict[str, str] = {}
        self.fired: Counter[str] = Counter()
        self.replan: str | None = None
        self.queued_at = 0
        self.paused_at: int | None = None
        self.paused_seq: int | None = None
        self.paused_ms = 0

    @property
    def deadline(self) -> int | None:
        if self.deadline_ms is None:
            return None
        return self.queued_at + self.deadline_ms + self.paused_ms

    def apply(self, state: RunState, event: Event) -> None:
        """Fold the event into the state, between the checks before and after."""
        assert not self.ended, f"{event.type} after the end"
        assert event.seq == self.seq + 1
        self.seq = event.seq
        self.seen[event.type] += 1
        run_before = state.status
        nodes_before = {node_id: node.status for node_id, node in state.nodes.items()}
        if event.type is EventType.NODE_START:
            self._may_start(event)
        elif event.type is EventType.PLAN_GENERATED:
            self._may_replace(self.plans[event.data["version"]])
            nodes_before = {}  # the new version starts its own nodes
        apply(state, event)
        self._learn(event, state)
        if state.status is not run_before:
            assert state.status in RUN_TRANSITIONS[run_before], (run_before, state.status)
        for node_id, before in nodes_before.items():
            after = state.nodes[node_id].status
            if after is not before:
                assert node_id == event.node_id, f"{event.type} changed {node_id}"
                assert after in NODE_TRANSITIONS[before], (node_id, before, after)
                self.seen[f"{before} to {after}"] += 1
        self._recount(state)

    def _may_start(self, event: Event) -> None:
        node = self.plan.nodes[event.node_id or ""]
        assert self.replan is None, f"{node.id} started although the plan is to be made anew"
        assert node.kind is not NodeKind.FALLBACK, f"{node.id} is nobody's to call"
        assert self.status[node.id] not in FINISHED, f"{node.id} has its result already"
        assert all(self.status[required] in FINISHED for required in node.requires)
        if self.status[node.id] is not NodeStatus.PENDING:
            assert event.ts >= self.refused_until[node.id], "its breaker was not asked in time"
        running = [i for i, status in self.status.items() if status is NodeStatus.RUNNING]
        assert len(running) < self.max_parallel
        if node.concurrency is not None:
            same = [i for i in running if key_of(self.plan.nodes[i]) == key_of(node)]
            assert len(same) < node.concurrency
        assert event.attempt == self.attempt[node.id] + 1
        self.attempt[node.id] += 1
        number = self.round[node.id]
        assert event.data.get("round", 1) == number
        self.starts[node.id, number] += 1
        assert self.starts[node.id, number] <= node.max_attempts

    def _may_replace(self, plan: Plan) -> None:
        """The next version comes when nothing runs, and has what is done as it was."""
        assert plan.version == self.plan.version + 1
        assert NodeStatus.RUNNING not in self.status.values()
        for node_id, status in self.status.items():
            if status in FINISHED or self.reasons.get(node_id) == BlockReason.UNKNOWN_OUTCOME:
                assert written(plan.nodes[node_id]) == written(self.plan.nodes[node_id])

    def _learn(self, event: Event, state: RunState) -> None:
        match event.type:
            case EventType.RUN_QUEUED:
                self.queued_at = event.ts
            case EventType.PLAN_GENERATED:
                self._replace(self.plans[event.data["version"]])
                self.replan = None
            case EventType.PLAN_REJECTED if "final" in event.data:
                self.replan = None
            case EventType.POLICY_TRIGGERED:
                self._fire(self.policies[event.data["policy_id"]], event)
            case EventType.RUN_PAUSED:
                self.paused_at = event.ts
                self.paused_seq = event.seq
            case EventType.RUN_RESUMED:
                assert self.paused_at is not None
                self.paused_ms += event.ts - self.paused_at
                self.paused_at = None
        self.ended = event.type in TERMINAL_EVENTS
        assert state.status.is_terminal is self.ended
        if event.node_id is not None:
            self._learn_node(event, event.node_id)

    def _fire(self, policy: RuntimePolicy, event: Event) -> None:
        self.fired[policy.id] += 1
        assert policy.enabled
        assert self.fired[policy.id] <= policy.action.max_attempts
        assert self.replan is None, "one plan is made at a time"
        is_done = policy.trigger.kind is TriggerKind.ON_NODE_COMPLETE
        ended = NodeStatus.DONE if is_done else NodeStatus.FAILED
        assert self.status[event.node_id or ""] is ended
        self.replan = policy.id

    def _replace(self, plan: Plan) -> None:
        """What goes on under the new version, and what is ordered anew: in a round of its own if it
        was ever called."""
        before, status, reasons = self.plan.nodes, self.status, self.reasons
        self.plan, self.status, self.reasons = plan, {}, {}
        self.given_up = Counter()
        refused, self.refused_until = self.refused_until, {}
        for node in plan.nodes.values():
            found = status.get(node.id)
            reason = reasons.get(node.id)
            is_same = found is not None and written(before[node.id]) == written(node)
            is_lost = found is NodeStatus.FAILED or reason == BlockReason.DEPENDENCY_FAILED
            if is_same and found is not None and not is_lost:
                self.seen[f"kept {found}"] += 1
                self.status[node.id] = found
                if reason is not None:
                    self.reasons[node.id] = reason
                if node.id in refused:
                    self.refused_until[node.id] = refused[node.id]
                continue
            self.status[node.id] = NodeStatus.PENDING
            if self.attempt[node.id]:
                self.seen["ordered anew" if found else "ordered again"] += 1
                self.round[node.id] += 1
            else:
                self.round[node.id] = 1

    def _learn_node(self, event: Event, node_id: str) -> None:
        match event.type:
            case EventType.NODE_START:
                self._set(node_id, NodeStatus.RUNNING)
                self.refused_until.pop(node_id, None)
            case EventType.NODE_SKIPPED:
                self._set(node_id, NodeStatus.SKIPPED, event.data["reason"])
            case EventType.NODE_DONE | EventType.NODE_FAILED:
                is_done = event.type is EventType.NODE_DONE
                self._set(node_id, NodeStatus.DONE if is_done else NodeStatus.FAILED)
                result = (node_id, event.attempt)
                assert result not in self.results, f"{result} is recorded twice"
                self.results.add(result)
            case EventType.NODE_RETRY:
                self._set(node_id, NodeStatus.PENDING)
                self.round[node_id] = event.data.get("round", self.round[node_id])
                if self.plan.nodes[node_id].kind is NodeKind.FALLBACK:
                    self.replan = ""
            case EventType.NODE_BLOCKED:
                self._set(node_id, NodeStatus.BLOCKED, event.data["reason"])
                self.attempt[node_id] = event.attempt or self.attempt[node_id]
                self._learn_blocked(event, node_id)

    def _set(self, node_id: str, status: NodeStatus, reason: str | None = None) -> None:
        self.status[node_id] = status
        self.reasons.pop(node_id, None)
        if reason is not None:
            self.reasons[node_id] = reason

    def _learn_blocked(self, event: Event, node_id: str) -> None:
        match event.data["reason"]:
            case BlockReason.DEPENDENCY_FAILED:
                self.given_up[node_id] += 1
                assert self.given_up[node_id] == 1, f"{node_id} was blocked twice"
                assert self._lost(node_id), f"{node_id} depends on no failed node"
            case BlockReason.BREAKER_OPEN:
                self.starts[node_id, self.round[node_id]] -= 1
                self.refused_until[node_id] = event.ts + event.data["delay_ms"]

    def _lost(self, node_id: str) -> bool:
        """Whether the node is right below one that failed or was given up."""
        return any(
            self.status[required] is NodeStatus.FAILED or self.given_up[required]
            for required in self.plan.nodes[node_id].requires
        )

    def _recount(self, state: RunState) -> None:
        """What `apply` counts along is what a look at the whole plan says."""
        nodes = state.nodes
        assert {node_id: node.status for node_id, node in nodes.items()} == self.status
        assert all(node.round == self.round[node_id] for node_id, node in nodes.items())
        assert all(node.attempt == self.attempt[node_id] for node_id, node in nodes.items())
        assert {i: node.reason for i, node in nodes.items() if node.reason} == self.reasons
        assert (state.replan, state.policies_fired) == (self.replan, self.fired)
        assert state.retired == {
            node_id: (attempt, self.round[node_id])
            for node_id, attempt in self.attempt.items()
            if attempt and node_id not in nodes
        }
        pending = {i for i, status in self.status.items() if status is NodeStatus.PENDING}
        unmet = {
            node_id: sum(
                self.status[required] not in FINISHED
                for required in self.plan.nodes[node_id].requires
            )
            for node_id in self.status
        }
        assert {node_id: node.unmet for node_id, node in nodes.items()} == unmet
        waiting = {i: at for i, node in nodes.items() if (at := node.retry_at) is not None}
        assert state.waiting == waiting
        assert waiting.keys() <= pending | self.refused_until.keys()
        assert self.refused_until.items() <= waiting.items()
        ready = ready_set(state)
        assert len(ready) == len(set(ready))
        due = {i for i in pending if unmet[i] == 0 and i not in waiting}
        to_ask = {i for i in due if self.plan.nodes[i].kind is NodeKind.FALLBACK}
        assert (set(ready), set(state.to_ask)) == (due - to_ask, to_ask)
        assert set(state.to_block) == {i for i in pending if self._lost(i)}
        for queue, status in (
            (state.running, NodeStatus.RUNNING),
            (state.failed, NodeStatus.FAILED),
            (state.blocked, NodeStatus.BLOCKED),
        ):
            assert set(queue) == {i for i, found in self.status.items() if found is status}
        assert state.done_count == sum(status in FINISHED for status in self.status.values())
        for key, limited in state.ready_limited.items():
            assert limited, f"an empty queue of {key} is left"
            assert all(key_of(self.plan.nodes[node_id]) == key for node_id in limited)
        assert state.paused_ms == self.paused_ms
        assert (state.paused_at, state.paused_seq) == (self.paused_at, self.paused_seq)

    def check_end(self, state: RunState) -> None:
        """What a run that is finished, or waits for a human, must have come to."""
        failed = {i for i, status in self.status.items() if status is NodeStatus.FAILED}
        blocked = {i for i, status in self.status.items() if status is NodeStatus.BLOCKED}
        below_failed = self._below(failed)
        below_unknown = self._below(blocked - set(self.given_up) | set(state.to_ask))
        if state.status is RunStatus.DONE:
            assert set(self.status.values()) <= set(FINISHED)
            assert not self.plan.open_goals
        elif state.status is RunStatus.AWAITING_HUMAN:
            assert state.awaiting_human()
            assert not state.failed
        self._check_nodes(state, below_failed, below_unknown)

    def _below(self, found: set[str]) -> set[str]:
        """Everything that depends on these nodes, over any number of steps."""
        below: set[str] = set()
        for node in self.plan.nodes.values():
            if not (found | below).isdisjoint(node.requires):
                below.add(node.id)
        return below

    def _check_nodes(
        self, state: RunState, below_failed: set[str], below_unknown: set[str]
    ) -> None:
        """Everything that could go on went on; what is lost was said to be lost, once."""
        for node_id, status in self.status.items():
            if node_id in below_failed:
                assert status is NodeStatus.BLOCKED
                assert self.given_up[node_id] == 1
            elif node_id in below_unknown:
                assert status is NodeStatus.PENDING
            elif status is NodeStatus.BLOCKED:
                assert state.nodes[node_id].reason in ASKED
            elif node_id in state.to_ask:
                assert state.failed, f"nobody was asked about {node_id}"
            else:
                assert status in (*FINISHED, NodeStatus.FAILED)
