"""What happened, as events: ended calls, consumed signals, a finished plan, the planner's answer.

Everything here turns something that arrived into events of the loop's next append, and keeps the
outputs that later nodes need. Big values become blobs of the same append.
"""

from __future__ import annotations

import hashlib
import random
import time
from typing import Any

import orjson

from app.domain.decide import judge_failure
from app.domain.errors import Fault, PlanRejected
from app.domain.events import BlockReason, Event, EventType, Level, error_data
from app.domain.plan import OutputSource, Plan
from app.domain.plan_json import plan_as_dict
from app.domain.signals import Signal, apply_signal
from app.journal.record import Append
from app.kit.clock import now_ms, rfc3339
from app.kit.json_pointer import PointerMissing, resolve
from app.orchestrator.run import DrivenRun, Outcome, Planned, Said
from app.planner.plan_envelope import PlanLimits, plan_envelope
from app.ports import Refused, Transition, TransitionKind
from app.registry.image import RegistryImage

INLINE_VALUE_BYTES_MAX = 64 * 1024
PLAN_NODES_IN_EVENT_MAX = 256


def outcome_events(run: DrivenRun, outcome: Outcome, append: Append) -> list[Event]:
    """The events of one ended call; its output is kept for the nodes that need it."""
    state, node_id = run.state, outcome.node_id
    assert state.plan is not None
    node = state.nodes[node_id]
    announced = [announcement(transition, append) for transition in outcome.transitions]
    if outcome.refused is not None:
        return [*announced, breaker_open(node_id, node.attempt, outcome.refused)]
    if outcome.failure is not None:
        judged = judge_failure(state.plan.nodes[node_id], node, outcome.failure)
        return [*outcome.emitted, *announced, *judged]
    run.outputs[node_id] = outcome.output
    data = value_data("output", outcome.raw, append)
    data["duration_ms"] = outcome.duration_ms
    done = Event(EventType.NODE_DONE, data, node_id=node_id, attempt=node.attempt)
    return [*outcome.emitted, *announced, done]


def said_events(said: Said, append: Append) -> list[Event]:
    """The events of a call that is still under way."""
    return [*(announcement(transition, append) for transition in said.transitions), *said.events]


_ANNOUNCED_AS = {
    TransitionKind.TRIPPED: (EventType.BREAKER_TRIPPED, Level.WARN),
    TransitionKind.HALF_OPEN: (EventType.BREAKER_HALF_OPEN, Level.INFO),
    TransitionKind.CLOSED: (EventType.BREAKER_CLOSED, Level.INFO),
}


def announcement(transition: Transition, append: Append) -> Event:
    """The event of a breaker's change; its row, which makes it the only one, is in the append."""
    append.transitions.append(
        (
            *(transition.scope, transition.worker_id, transition.generation),
            *(transition.kind.value, transition.cooldown_s),
        )
    )
    event_type, level = _ANNOUNCED_AS[transition.kind]
    data = {
        "scope": transition.scope,
        "generation": transition.generation,
        "cooldown_s": transition.cooldown_s,
        "degraded": transition.degraded,
    }
    return Event(event_type, data, level=level)


def breaker_open(node_id: str, attempt: int, refused: Refused) -> Event:
    """The node waits for its breaker, and asks again soon after it may let a call in.

    Not all at once: of those who wait, one becomes the probe and the others ask in vain.
    """
    spread_s = min(refused.retry_after_s * 0.2, 1.0)
    delay_ms = int((refused.retry_after_s + random.uniform(0, spread_s)) * 1000) + 1
    data = {"reason": BlockReason.BREAKER_OPEN, "scope": refused.scope, "delay_ms": delay_ms}
    return Event(EventType.NODE_BLOCKED, data, node_id=node_id, attempt=attempt, level=Level.WARN)


def value_data(name: str, raw: bytes, append: Append) -> dict[str, Any]:
    """A value for an event: itself, or a reference when it is big. It was encoded only once."""
    if len(raw) <= INLINE_VALUE_BYTES_MAX:
        return {name: orjson.Fragment(raw)}
    sha256 = hashlib.sha256(raw).hexdigest()
    append.blobs.append((sha256, raw))
    return {f"{name}_ref": {"sha256": sha256, "bytes": len(raw)}}


def consume_signal(run: DrivenRun, signal: Signal, append: Append) -> list[Event]:
    """Apply a signal, or discard it with the reason; either way it is consumed in this append."""
    applied = apply_signal(run.state, signal)
    run.outputs.update(applied.outputs)
    for event in applied.events:
        if event.type is EventType.NODE_DONE:
            raw = orjson.dumps(event.data.pop("output"))
            event.data = {**value_data("output", raw, append), **event.data}
    append.signals.append((signal.signal_id, applied.outcome))
    return applied.events


def make_plan(
    run: DrivenRun, image: RegistryImage, limits: PlanLimits, append: Append, *, timed: bool
) -> list[Event]:
    """Ask the planner. A plan that it can not make ends the run with the diagnostics."""
    requested = Event(EventType.PLAN_REQUESTED, {"attempt": 1, "phase": "initial"})
    started = time.perf_counter()
    try:
        plan = plan_envelope(
            run.envelope,
            image,
            run_id=run.handle.text_id,
            created_at=rfc3339(now_ms()),
            limits=limits,
        )
    except PlanRejected as rejected:
        diagnostics = [fault.as_dict() for fault in rejected.faults]
        data = {"attempt": 1, "phase": "initial", "diagnostics": diagnostics}
        event = Event(EventType.PLAN_REJECTED, data, level=Level.ERROR)
        return [requested, event, run_failed("plan_rejected", rejected.detail)]
    planning_ms = (time.perf_counter() - started) * 1000 if timed else None
    adopt_plan(run, plan, append)
    return [requested, plan_generated(plan, planning_ms)]


def planned_events(run: DrivenRun, planned: Planned, append: Append, *, timed: bool) -> list[Event]:
    """What planning by a model came to; the handshake before it is in the journal already."""
    if planned.plan is None:
        assert planned.rejected is not None
        return [run_failed("plan_rejected", planned.rejected.detail)]
    adopt_plan(run, planned.plan, append)
    return [plan_generated(planned.plan, planned.planning_ms if timed else None)]


def adopt_plan(run: DrivenRun, plan: Plan, append: Append) -> None:
    """Make a plan version known to the state, and durable with this append."""
    run.state.plans = {**run.state.plans, plan.version: plan}
    append.plans.append((plan.version, orjson.dumps(plan_as_dict(plan)).decode()))


def plan_generated(plan: Plan, planning_ms: float | None) -> Event:
    """The event that puts a plan version into force. Big plans are only counted, not listed."""
    data: dict[str, Any] = {
        "version": plan.version,
        "author": plan.author,
        "node_count": len(plan.nodes),
    }
    if len(plan.nodes) <= PLAN_NODES_IN_EVENT_MAX:
        data["nodes"] = [
            {"id": node.id, "capability_id": node.capability_id, "requires": node.requires}
            for node in plan.nodes.values()
        ]
    if planning_ms is not None:
        data["planning_ms"] = round(planning_ms, 3)
    return Event(EventType.PLAN_GENERATED, data, plan_version=plan.version)


def complete(run: DrivenRun, append: Append) -> list[Event]:
    """Every node is done: compose the output, check it against the run's contract, end the run."""
    assert run.state.plan is not None
    output = _compose(run.state.plan.output, run)
    if not run.output_contract.is_valid(output):
        return _refused(tuple(run.output_contract.violations(output)))
    return [Event(EventType.RUN_DONE, value_data("output", orjson.dumps(output), append))]


def _compose(sources: tuple[OutputSource, ...], run: DrivenRun) -> Any:
    """The run's output from what the nodes produced, as the plan says.

    A part that was not produced is left out: whether it may be missing, the contract says.
    """
    composed: dict[str, Any] = {}
    for part in sources:
        found = run.envelope.inputs if part.source == "inputs" else run.outputs[part.source]
        try:
            value = resolve(found, part.pointer) if part.pointer else found
        except PointerMissing:
            continue
        if part.key is None:
            return value
        composed[part.key] = value
    return composed


def _refused(faults: tuple[Fault, ...]) -> list[Event]:
    errors = [fault.as_dict() for fault in faults]
    data = {"scope": "final_output", "errors": errors}
    return [
        Event(EventType.VALIDATION_ERROR, data, level=Level.ERROR),
        run_failed("invalid_output", "The output breaks the run's contract."),
    ]


def event_limit(events_max: int) -> Event:
    return run_failed("event_limit", f"A run has at most {events_max} events.")


def run_failed(code: str, message: str, **more: Any) -> Event:
    """RUN_FAILED for a reason that is not a failed node. `more` goes into the error."""
    data = {"error": error_data(code, message, **more), "failed_nodes": []}
    return Event(EventType.RUN_FAILED, data, level=Level.ERROR)
