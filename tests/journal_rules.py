"""The rules of a run, as a watcher of its journal and of the far side would write them down.

`Watch` learns only from events and checks each one before and after it is applied. `Outside` is the
far side's own list of calls; no crash reaches it. For `simulator.py`, which makes the journals.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from app.domain.capability import Effect
from app.domain.decide import Failure
from app.domain.events import TERMINAL_EVENTS, BlockReason, Event, EventType
from app.domain.plan import Plan, PlanNode
from app.domain.ready import ready_set
from app.domain.run import NODE_TRANSITIONS, RUN_TRANSITIONS, NodeStatus, RunStatus
from app.domain.state import RunState, apply
from tests.plans import key_of

FINISHED = (NodeStatus.DONE, NodeStatus.SKIPPED)


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
    """Every call that ever reached the far side, and those that had or may have had an effect."""

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    effects: Counter[tuple[str, int]] = field(default_factory=Counter)

    def called(self, call: Call) -> None:
        self.calls[call.node.id, call.attempt] += 1
        if call.failure is None or call.failure.unknown_outcome:
            self.effects[call.node.id, call.round] += 1

    def check(self, plan: Plan, lives: int, inherits: Inheritance) -> None:
        for node_id in inherits.kept:
            assert not any(called == node_id for called, _ in self.calls), f"{node_id} was kept"
        for node_id in inherits.uncertain:
            assert self.effects[node_id, 1] == 0, f"{node_id} was called before anybody decided"
        for (node_id, attempt), count in self.calls.items():
            once = plan.nodes[node_id].effect is Effect.AT_MOST_ONCE
            allowed = 1 if once else lives
            assert count <= allowed, f"{node_id} attempt {attempt} was called {count} times"
        for (node_id, number), count in self.effects.items():
            if plan.nodes[node_id].effect is Effect.AT_MOST_ONCE:
                assert count == 1, f"{node_id} may have happened {count} times in round {number}"


class Watch:
    """The rules of a journal, kept in the plainest way: sets of ids, recounted at every event."""

    def __init__(
        self, plan: Plan, max_parallel: int, deadline_ms: int | None, seen: Counter[str]
    ) -> None:
        self.plan = plan
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

    def _learn(self, event: Event, state: RunState) -> None:
        match event.type:
            case EventType.RUN_QUEUED:
                self.queued_at = event.ts
            case EventType.PLAN_GENERATED:
                self.status = dict.fromkeys(self.plan.nodes, NodeStatus.PENDING)
                self.round = dict.fromkeys(self.plan.nodes, 1)
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

    def _learn_node(self, event: Event, node_id: str) -> None:
        match event.type:
            case EventType.NODE_START:
                self.status[node_id] = NodeStatus.RUNNING
                self.refused_until.pop(node_id, None)
            case EventType.NODE_SKIPPED:
                self.status[node_id] = NodeStatus.SKIPPED
            case EventType.NODE_DONE:
                self.status[node_id] = NodeStatus.DONE
            case EventType.NODE_FAILED:
                self.status[node_id] = NodeStatus.FAILED
            case EventType.NODE_RETRY:
                self.status[node_id] = NodeStatus.PENDING
                self.round[node_id] = event.data.get("round", self.round[node_id])
            case EventType.NODE_BLOCKED:
                self.status[node_id] = NodeStatus.BLOCKED
                self.attempt[node_id] = event.attempt or self.attempt[node_id]
                if event.data["reason"] == BlockReason.DEPENDENCY_FAILED:
                    self.given_up[node_id] += 1
                    assert self.given_up[node_id] == 1, f"{node_id} was blocked twice"
                    assert self._lost(node_id), f"{node_id} depends on no failed node"
                elif event.data["reason"] == BlockReason.BREAKER_OPEN:
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
        assert all(nodes[node_id].round == number for node_id, number in self.round.items())
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
        assert set(ready) == {i for i in pending if unmet[i] == 0 and i not in waiting}
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
        below_failed, below_unknown = set[str](), set[str]()
        for node in self.plan.nodes.values():
            for found, reason in (
                (below_failed, NodeStatus.FAILED),
                (below_unknown, NodeStatus.BLOCKED),
            ):
                if any(
                    required in found
                    or (self.status.get(required) is reason and not self.given_up[required])
                    for required in node.requires
                ):
                    found.add(node.id)
        if state.status is RunStatus.DONE:
            assert set(self.status.values()) <= set(FINISHED)
        elif state.status is RunStatus.AWAITING_HUMAN:
            assert state.unknown_outcomes()
            assert not state.failed
        self._check_nodes(state, below_failed, below_unknown)

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
                assert state.nodes[node_id].reason == BlockReason.UNKNOWN_OUTCOME
            else:
                assert status in (*FINISHED, NodeStatus.FAILED)
