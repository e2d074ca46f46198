"""What happened, as events: ended calls, consumed signals, and the end of the run.

Everything here turns something that arrived into events of the loop's next append, and keeps the
outputs that later nodes need. Big values become blobs of the same append.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import orjson

from app.domain.decide import judge_failure
from app.domain.errors import Fault
from app.domain.events import BlockReason, Event, EventType, Level, error_data
from app.domain.plan import OutputSource
from app.domain.signals import Signal, apply_signal
from app.journal.record import Append
from app.kit.json_pointer import PointerMissing, resolve
from app.orchestrator.run import DrivenRun, Outcome, Said
from app.ports import Refused, Transition, TransitionKind

INLINE_VALUE_BYTES_MAX = 64 * 1024


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
