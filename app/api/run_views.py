"""What a client sees of a run: readings of its journal, shaped as JSON."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from app.bootstrap import Services
from app.domain.plan import Plan
from app.domain.plan_json import plan_as_dict
from app.domain.run import NodeStatus, RunStatus
from app.domain.state import NodeState, RunState
from app.kit.ids import created_ms
from app.kit.redact import redact
from app.kit.rfc3339 import rfc3339
from app.orchestrator.resume import StoredRun, event_value, last_event
from app.orchestrator.run import DrivenRun
from app.store.signals import SignalRecord


def accepted_view(run: DrivenRun) -> dict[str, Any]:
    """The run as of seq 1, when it was accepted: what the 202 promises and nothing more."""
    plan = run.state.plans.get(1)
    nodes = [] if plan is None else [_node(plan, node_id, NodeState()) for node_id in plan.nodes]
    envelope = run.envelope
    return {
        "run_id": run.handle.text_id,
        "status": RunStatus.QUEUED,
        "objective": envelope.objective,
        "plan_version": None if plan is None else plan.version,
        "last_seq": 1,
        "nodes": nodes,
        "output": None,
        "error": None,
        "timings": None,
        "metadata": _metadata(envelope.metadata.label, envelope.metadata.correlation_id),
        "resumed_from": None,
        "created_at": rfc3339(created_ms(run.handle.run_id)),
        "finished_at": None,
        "links": _links(run.handle.text_id),
    }


def summary_view(row: Any) -> dict[str, Any]:
    """A run in a list, from its rows alone."""
    return {
        "run_id": str(row["run_id"]),
        "status": row["status"],
        "objective": row["objective"],
        "label": row["label"],
        "correlation_id": row["correlation_id"],
        "lane": row["lane"],
        "last_seq": row["seq"],
        "created_at": row["created_at"].isoformat().replace("+00:00", "Z"),
        "links": {"self": f"/v1/runs/{row['run_id']}"},
    }


async def run_view(services: Services, stored: StoredRun) -> dict[str, Any]:
    """The run resource: folded from the journal, with the output or error of its last event."""
    state = stored.state
    run_id = UUID(state.run_id)
    output = error = None
    if state.status.is_terminal and not stored.pruned:
        event = await last_event(services.reader, run_id, state.seq)
        data = {} if event is None else event["data"]
        output = await event_value(services.reader, run_id, data)
        error = data.get("error")
    return {
        "run_id": state.run_id,
        "status": stored.status if stored.pruned else state.status,
        "objective": stored.objective,
        "plan_version": None if state.plan is None else state.plan.version,
        "last_seq": stored.seq if stored.pruned else state.seq,
        "nodes": _nodes(state),
        "output": output,
        "error": error,
        "timings": _timings(state) if services.settings.latency_record else None,
        "metadata": _metadata(stored.label, stored.correlation_id),
        "resumed_from": resumed_from_view(stored.resumed_from),
        "created_at": rfc3339(created_ms(run_id)),
        "finished_at": None if state.finished_at is None else rfc3339(state.finished_at),
        "links": _links(state.run_id),
    }


async def debug_view(
    services: Services,
    stored: StoredRun,
    signals: list[SignalRecord],
    worker: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything an operator asks at night, with secrets taken out: by key, and by their values."""
    state = stored.state
    view = await run_view(services, stored)
    nodes = state.nodes
    found: dict[str, Any] = services.secrets.hidden_in(
        redact(
            {
                "run": view,
                "lease": {
                    "epoch": stored.epoch,
                    "owner": stored.owner,
                    "worker": worker,
                    "head_seq": stored.seq,
                    "takes": stored.takes,
                    "wake_at": None
                    if stored.wake_at is None
                    else stored.wake_at.isoformat().replace("+00:00", "Z"),
                },
                "snapshot": {"seq": stored.snapshot_seq} if stored.snapshot_seq else None,
                "completed_nodes": [n for n, node in nodes.items() if node.done_seq is not None],
                "pending_nodes": [
                    n for n, node in nodes.items() if node.status is NodeStatus.PENDING
                ],
                "attempts": {
                    node_id: {
                        "attempt": node.attempt,
                        "round": node.round,
                        "error": node.error,
                        "started_at": None if node.started_at is None else rfc3339(node.started_at),
                        "retry_at": None if node.retry_at is None else rfc3339(node.retry_at),
                    }
                    for node_id, node in nodes.items()
                    if node.attempt
                },
                "plans": [plan_as_dict(plan) for plan in state.plans.values()],
                "signals": [signal.as_dict() for signal in signals],
                "envelope": None
                if stored.envelope is None
                else stored.envelope.model_dump(mode="json", by_alias=True),
                "trace_id": stored.trace_id,
            }
        )
    )
    return found


def _nodes(state: RunState) -> list[dict[str, Any]]:
    if state.plan is None:
        return []
    return [_node(state.plan, node_id, node) for node_id, node in state.nodes.items()]


def _node(plan: Plan, node_id: str, node: NodeState) -> dict[str, Any]:
    found: dict[str, Any] = {
        "node_id": node_id,
        "status": node.status,
        "capability_id": plan.nodes[node_id].capability_id,
        "attempt": node.attempt,
        "duration_ms": node.duration_ms,
    }
    if node.reason is not None:
        found["reason"] = node.reason
    if node.error is not None:
        found["error"] = node.error
    return found


def _timings(state: RunState) -> dict[str, Any]:
    """The latency record, in ms: total, queue and planning, and each node by its id."""
    return {
        "total_ms": None if state.finished_at is None else state.finished_at - state.queued_at,
        "queue_ms": None if state.started_at is None else state.started_at - state.queued_at,
        "planning_ms": state.planning_ms,
        "paused_ms": state.paused_ms,
        "nodes": {
            node_id: node.duration_ms
            for node_id, node in state.nodes.items()
            if node.duration_ms is not None
        },
    }


def _metadata(label: str | None, correlation_id: str | None) -> dict[str, Any]:
    return {"label": label, "correlation_id": correlation_id}


def resumed_from_view(found: tuple[UUID, int] | None) -> dict[str, Any] | None:
    """The finished run whose results a run keeps, and how far its journal went."""
    return None if found is None else {"run_id": str(found[0]), "seq": found[1]}


def _links(run_id: str) -> dict[str, str]:
    base = f"/v1/runs/{run_id}"
    return {
        "self": base,
        "events": f"{base}/events",
        "plans": f"{base}/plans",
        "debug": f"{base}/debug",
    }
