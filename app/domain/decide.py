"""What may happen now: the whole of the orchestrator's judgement, without I/O or a clock.

`decide(state, now_ms, limits)` reads a state and returns the events that should be appended next;
the loop appends them, applies them, and calls the nodes that were started. `judge_failure` turns a
failed call into a retry, a failure or a blocked node, by the effect of its capability.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.domain.capability import Effect
from app.domain.errors import Fault
from app.domain.events import BlockReason, Event, EventType, Level, error_data
from app.domain.plan import PlanNode
from app.domain.ready import ready_set
from app.domain.run import NodeStatus, RunStatus
from app.domain.state import CapabilityKey, NodeState, RunState


@dataclass(frozen=True, slots=True)
class RunLimits:
    """What bounds a run from outside its state. Times are ms; `deadline_ms` counts from acceptance.

    `free_slots` says how many calls of a limited capability this process may still start; one that
    is not named has none. Capabilities without a limit of their own do not look there.
    """

    max_parallel: int
    deadline_ms: int | None = None
    free_slots: Mapping[CapabilityKey, int] = field(default_factory=dict)


@dataclass(slots=True)
class Decision:
    """`events` to append in order. `complete`: every node is done, compose the output. `plan`: the
    run goes on with another plan version, which is to be made now.

    `wake_at` (ms) is when to look again although nothing happens: a retry or the deadline.
    """

    events: list[Event] = field(default_factory=list)
    complete: bool = False
    plan: bool = False
    wake_at: int | None = None


def decide(state: RunState, now_ms: int, limits: RunLimits) -> Decision:
    """What may happen now. A run that is not `running` is left alone."""
    decision = Decision()
    if state.status is not RunStatus.RUNNING or state.plan is None:
        return decision
    deadline = deadline_at(state, limits)
    if deadline is not None and now_ms >= deadline:
        decision.events.append(_deadline_exceeded(state))
        return decision
    if state.replan is not None:
        # What is under way ends first, so that the new plan knows how it ended.
        decision.plan = not state.running
        decision.wake_at = deadline
        return decision
    _block_dependants(state, decision)
    started = _start_nodes(state, now_ms, limits, decision)
    if started or state.running or state.waiting or state.ready_limited:
        # A retry that is due but found no slot is woken by the slot, not by the clock.
        due = min((at for at in state.waiting.values() if at > now_ms), default=None)
        decision.wake_at = _earliest(deadline, due)
    else:
        _come_to_rest(state, decision)
        if decision.plan:
            decision.wake_at = deadline
    return decision


def deadline_at(state: RunState, limits: RunLimits) -> int | None:
    """When the run must have ended (ms), or None. Time spent paused or with a human is added."""
    if limits.deadline_ms is None:
        return None
    return state.queued_at + limits.deadline_ms + state.paused_ms


def _earliest(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _deadline_exceeded(state: RunState) -> Event:
    return Event(
        EventType.RUN_FAILED,
        {
            "error": error_data(
                "deadline_exceeded", "The run's deadline passed before it was done."
            ),
            "failed_nodes": list(state.failed),
            "unfinished_nodes": [
                *state.running,
                *state.waiting,
                *ready_set(state),
                *state.to_ask,
            ],
        },
        level=Level.ERROR,
    )


def _block_dependants(state: RunState, decision: Decision) -> None:
    """Everything below a failed node is blocked in one go; unrelated branches go on."""
    assert state.plan is not None
    stack = list(reversed(state.to_block))
    seen = set(stack)
    while stack:
        node_id = stack.pop()
        decision.events.append(
            Event(
                EventType.NODE_BLOCKED,
                {"reason": BlockReason.DEPENDENCY_FAILED},
                node_id=node_id,
                level=Level.WARN,
            )
        )
        for child_id in state.plan.children[node_id]:
            # One that an earlier failure blocked already is still a child of this one.
            if child_id not in seen and state.nodes[child_id].status is NodeStatus.PENDING:
                seen.add(child_id)
                stack.append(child_id)


def _start_nodes(state: RunState, now_ms: int, limits: RunLimits, decision: Decision) -> int:
    """NODE_START for what is ready, as far as the limits allow; how many were started."""
    free = limits.max_parallel - len(state.running)
    if free <= 0:
        return 0
    before = free
    for node_id in state.ready:
        if free <= 0:
            break
        decision.events.append(_node_start(state, node_id))
        free -= 1
    for key, queue in state.ready_limited.items():
        slots = min(free, limits.free_slots.get(key, 0))
        for node_id, _ in zip(queue, range(slots), strict=False):
            decision.events.append(_node_start(state, node_id))
            free -= 1
    taken: dict[CapabilityKey, int] = {}
    for node_id, retry_at in state.waiting.items():
        if free <= 0:
            break
        if retry_at <= now_ms and _has_slot(state, node_id, limits, taken):
            decision.events.append(_node_start(state, node_id))
            free -= 1
    return before - free


def _has_slot(
    state: RunState, node_id: str, limits: RunLimits, taken: dict[CapabilityKey, int]
) -> bool:
    """Whether a waiting node's capability has room, besides what was started just now."""
    assert state.plan is not None
    node = state.plan.nodes[node_id]
    if node.concurrency is None:
        return True
    key = (node.capability_id, node.capability_version)
    used = min(len(state.ready_limited.get(key, ())), limits.free_slots.get(key, 0))
    if used + taken.get(key, 0) >= limits.free_slots.get(key, 0):
        return False
    taken[key] = taken.get(key, 0) + 1
    return True


def _node_start(state: RunState, node_id: str) -> Event:
    assert state.plan is not None
    plan_node = state.plan.nodes[node_id]
    node = state.nodes[node_id]
    data: dict[str, object] = {"capability_id": plan_node.capability_id}
    if node.round > 1:
        data["round"] = node.round
    return Event(EventType.NODE_START, data, node_id=node_id, attempt=node.attempt + 1)


def _come_to_rest(state: RunState, decision: Decision) -> None:
    """Nothing runs and nothing can start: the run is complete, failed, or needs a human."""
    if state.failed:
        failed = list(state.failed)
        decision.events.append(
            Event(
                EventType.RUN_FAILED,
                {
                    "error": error_data(
                        "node_failed", f"{len(failed)} node(s) failed: {', '.join(failed[:5])}."
                    ),
                    "failed_nodes": failed,
                    "unknown_outcomes": state.unknown_outcomes(),
                },
                level=Level.ERROR,
            )
        )
    elif waiting := [*state.awaiting_human(), *state.to_ask]:
        decision.events += [_ask(state, node_id) for node_id in state.to_ask]
        is_unknown = bool(state.unknown_outcomes())
        reason = BlockReason.UNKNOWN_OUTCOME if is_unknown else BlockReason.AWAITING_ANSWER
        data = {"status": RunStatus.AWAITING_HUMAN, "reason": reason, "nodes": waiting}
        decision.events.append(Event(EventType.RUN_PAUSED, data, level=Level.WARN))
    else:
        assert state.plan is not None
        decision.plan = bool(state.plan.open_goals)
        decision.complete = not decision.plan


def _ask(state: RunState, node_id: str) -> Event:
    """A fallback is not called: a person is asked."""
    assert state.plan is not None
    data = {
        "reason": BlockReason.AWAITING_ANSWER,
        "operator_prompt": state.plan.nodes[node_id].text,
    }
    attempt = state.nodes[node_id].attempt + 1
    return Event(EventType.NODE_BLOCKED, data, node_id=node_id, attempt=attempt, level=Level.WARN)


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call failed. `delay_ms` is the back-off that a retry would take.

    `target_failed`: the far side is to blame, which is what its breaker counts; None: not known.
    """

    code: str
    message: str
    retryable: bool
    unknown_outcome: bool = False
    target_failed: bool | None = False
    duration_ms: float = 0.0
    delay_ms: int = 0
    faults: tuple[Fault, ...] = ()
    scope: str = ""


def judge_failure(node: PlanNode, state: NodeState, failure: Failure) -> list[Event]:
    """What a failed attempt means: retry, NODE_FAILED, or NODE_BLOCKED with an unknown outcome.

    An `at_most_once` node is repeated only where nothing can have happened. Contract violations
    come first as VALIDATION_ERROR, so that a reader sees the cause before the consequence.
    """
    events: list[Event] = []
    attempt = state.attempt
    if failure.faults:
        events.append(
            Event(
                EventType.VALIDATION_ERROR,
                {"scope": failure.scope, "errors": [f.as_dict() for f in failure.faults]},
                node_id=node.id,
                attempt=attempt,
                level=Level.WARN,
            )
        )
    error = error_data(failure.code, failure.message)
    if failure.unknown_outcome and node.effect is Effect.AT_MOST_ONCE:
        events.append(unknown_outcome(node.id, attempt, error))
    elif failure.retryable and attempt - state.attempts_before_round < node.max_attempts:
        events.append(
            Event(
                EventType.NODE_RETRY,
                {"delay_ms": failure.delay_ms, "error": error, "duration_ms": failure.duration_ms},
                node_id=node.id,
                attempt=attempt,
                level=Level.WARN,
            )
        )
    else:
        events.append(
            Event(
                EventType.NODE_FAILED,
                {"error": error, "duration_ms": failure.duration_ms},
                node_id=node.id,
                attempt=attempt,
                level=Level.ERROR,
            )
        )
    return events


def unknown_outcome(node_id: str, attempt: int, error: dict[str, object]) -> Event:
    """The event that parks an `at_most_once` node whose effect may have happened."""
    return Event(
        EventType.NODE_BLOCKED,
        {"reason": BlockReason.UNKNOWN_OUTCOME, "error": error},
        node_id=node_id,
        attempt=attempt,
        level=Level.WARN,
    )


def recover(state: RunState) -> tuple[list[Event], list[str]]:
    """After a take-over: the events to append, and the nodes whose attempt is called again.

    The intent of a running node is durable, its result is not. `pure` and `idempotent` nodes run
    the same attempt again with the same key; an `at_most_once` node is blocked.
    """
    events: list[Event] = []
    again: list[str] = []
    if state.plan is None:
        return events, again
    for node_id in state.running:
        if state.plan.nodes[node_id].effect is Effect.AT_MOST_ONCE:
            error = error_data(
                "unknown_outcome", "The worker stopped while the call was under way."
            )
            events.append(unknown_outcome(node_id, state.nodes[node_id].attempt, error))
        else:
            again.append(node_id)
    return events, again
