"""What the journal is told of planning: asked for, refused with diagnostics, asked again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.domain.errors import Fault
from app.domain.events import Event, EventType, Level
from app.domain.plan import PlanPhase
from app.planner.replan import Progress


def requested(attempt: int, progress: Progress | None = None) -> Event:
    """PLAN_REQUESTED: the planner is asked once more."""
    return Event(EventType.PLAN_REQUESTED, {**_phase(attempt, progress), **_cause(progress)})


def rejected(
    attempt: int,
    faults: Sequence[Fault],
    progress: Progress | None = None,
    *,
    is_final: bool = False,
) -> Event:
    """PLAN_REJECTED with what is wrong; `is_final`: the planner is not asked again."""
    data = _phase(attempt, progress)
    data["diagnostics"] = [fault.as_dict() for fault in faults]
    if is_final:
        data["final"] = True
    return Event(EventType.PLAN_REJECTED, data, level=Level.ERROR if is_final else Level.WARN)


def _phase(attempt: int, progress: Progress | None) -> dict[str, Any]:
    phase = PlanPhase.INITIAL if progress is None else PlanPhase.REPLAN
    return {"attempt": attempt, "phase": phase}


def _cause(progress: Progress | None) -> dict[str, Any]:
    if progress is None:
        return {}
    found: dict[str, Any] = {"cause": progress.cause}
    if progress.policy_id is not None:
        found["policy_id"] = progress.policy_id
    return found
