"""What planning came to, as events: a plan version in force, or why there is none.

Everything here becomes part of the loop's next append, together with the plan itself.
"""

from __future__ import annotations

import time
from typing import Any

import orjson

from app.domain.errors import PlanRejected
from app.domain.events import Event, EventType
from app.domain.plan import Plan, PlanCause
from app.domain.plan_json import plan_as_dict
from app.journal.record import Append
from app.kit.clock import now_ms
from app.kit.rfc3339 import rfc3339
from app.orchestrator.outcomes import run_failed
from app.orchestrator.run import DrivenRun, Planned
from app.planner.fallback import fallback_plan
from app.planner.handshake import rejected, requested
from app.planner.plan_envelope import PlanLimits, plan_envelope
from app.planner.replan import Progress, progress_of
from app.registry.image import RegistryImage

IDS_IN_EVENT_MAX = 256


def make_plan(
    run: DrivenRun,
    image: RegistryImage,
    limits: PlanLimits,
    append: Append,
    *,
    models_up: bool,
    timed: bool,
) -> list[Event]:
    """Plan at once, without a model. A first plan that can not be made ends the run."""
    progress = progress_of(run.state, run.outputs, run.envelope)
    asked = requested(1, progress)
    started = time.perf_counter()
    try:
        plan = plan_envelope(
            run.envelope,
            image,
            run_id=run.handle.text_id,
            created_at=rfc3339(now_ms()),
            limits=limits,
            models_up=models_up,
            progress=progress,
        )
    except PlanRejected as refused:
        events = [asked, rejected(1, refused.faults, progress, is_final=True)]
        if _must_have_one(progress):
            events.append(run_failed("plan_rejected", refused.detail))
        return events
    planning_ms = (time.perf_counter() - started) * 1000
    return [asked, *_adopted(run, plan, progress, append, planning_ms if timed else None)]


def planned_events(run: DrivenRun, planned: Planned, append: Append, *, timed: bool) -> list[Event]:
    """What planning by a model came to; the handshake before it is in the journal already.

    Without any plan a person is asked. What was planned for a run that an operator has changed in
    the meantime is dropped, and planned again.
    """
    progress = planned.progress
    now = progress_of(run.state, run.outputs, run.envelope)
    if progress is not None and (now is None or now.kept.keys() != progress.kept.keys()):
        return []
    if planned.plan is not None:
        ms = planned.planning_ms if timed else None
        return _adopted(run, planned.plan, progress, append, ms)
    assert planned.rejected is not None
    faults = planned.rejected.faults
    events = [rejected(planned.attempt, faults, progress, is_final=True)]
    if _must_have_one(progress):
        plan = fallback_plan(
            *(run.envelope, run.output_contract, faults, progress),
            run_id=run.handle.text_id,
            created_at=rfc3339(now_ms()),
        )
        events += _adopted(run, plan, progress, append, None)
    return events


def _must_have_one(progress: Progress | None) -> bool:
    """Whether the run can not go on without the plan that was asked for."""
    return progress is None or progress.cause is PlanCause.NEXT_GOAL


def _adopted(
    run: DrivenRun,
    plan: Plan,
    progress: Progress | None,
    append: Append,
    planning_ms: float | None,
) -> list[Event]:
    adopt_plan(run, plan, append)
    generated = plan_generated(plan, planning_ms)
    return [generated] if progress is None else [generated, _plan_updated(plan, progress)]


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
    if len(plan.nodes) <= IDS_IN_EVENT_MAX:
        data["nodes"] = [
            {"id": node.id, "capability_id": node.capability_id, "requires": node.requires}
            for node in plan.nodes.values()
        ]
    if planning_ms is not None:
        data["planning_ms"] = round(planning_ms, 3)
    if plan.open_goals:
        data["open_goals"] = plan.open_goals[:IDS_IN_EVENT_MAX]
    return Event(EventType.PLAN_GENERATED, data, plan_version=plan.version)


def _plan_updated(plan: Plan, progress: Progress) -> Event:
    """What the new version changes in the one before."""
    before = progress.plan.nodes
    same = [node.id for node in plan.nodes.values() if before.get(node.id) == node]
    added = [node_id for node_id in plan.nodes if node_id not in set(same)]
    removed = [node_id for node_id in before if node_id not in plan.nodes]
    data: dict[str, Any] = {
        "previous_version": progress.plan.version,
        "version": plan.version,
        "cause": progress.cause,
        "kept": same[:IDS_IN_EVENT_MAX],
        "added": added[:IDS_IN_EVENT_MAX],
        "removed": removed[:IDS_IN_EVENT_MAX],
    }
    if progress.policy_id is not None:
        data["policy_id"] = progress.policy_id
    return Event(EventType.PLAN_UPDATED, data, plan_version=plan.version)
