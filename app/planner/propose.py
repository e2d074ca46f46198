"""A plan that a model proposes: asked for, proved, sent back with what is wrong, asked for again.

    PLAN_REQUESTED -> draft -> verify -> PLAN_REJECTED with diagnostics -> PLAN_REQUESTED -> …

Two tries, then the assembler, which needs no model. What a model proposes never runs unproved, so
the worst that a bad one can do is to cost two calls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from app.domain.chat import Completion, Prompt, PromptFailed
from app.domain.envelope import Envelope
from app.domain.errors import Fault, PlanRejected
from app.domain.events import Event, EventType, Level
from app.domain.json_schema import compile_schema
from app.domain.plan import Plan
from app.planner.assemble import goals_of, inputs_at_hand
from app.planner.draft import PlanLimits
from app.planner.plan_envelope import limits_of, output_contract_of, plan_envelope
from app.planner.prompt import DRAFT_SCHEMA, draft_of, planning_prompt
from app.planner.shortlist import shortlist
from app.planner.verify import verify
from app.registry.image import RegistryImage

TRIES = 2
PHASE = "initial"

Complete = Callable[[Prompt], Awaitable[Completion]]
Tell = Callable[[Event], None]


async def propose_plan(
    envelope: Envelope,
    image: RegistryImage,
    complete: Complete,
    tell: Tell,
    *,
    run_id: str,
    created_at: str,
    limits: PlanLimits,
) -> Plan:
    """The verified plan of an envelope, by a model if one finds it.

    `tell` gets the events of the handshake, all but the last. Raises `PlanRejected` as
    `plan_envelope` does, when the assembler has no plan either.
    """
    output = output_contract_of(envelope, image)
    selection = envelope.policies.planner.selection
    at_hand = inputs_at_hand(envelope, image)
    capabilities = shortlist(image, at_hand, goals_of(envelope, image, output), selection)
    diagnostics: tuple[Fault, ...] = ()
    for attempt in range(1, TRIES + 1):
        tell(_requested(attempt))
        prompt = planning_prompt(envelope, output, capabilities, diagnostics, attempt=attempt)
        try:
            completion = await complete(replace(prompt, faults_of=_draft_faults))
            return verify(
                draft_of(completion.value),
                envelope,
                image,
                output,
                run_id=run_id,
                created_at=created_at,
                limits=limits_of(envelope, limits),
            )
        except PlanRejected as rejected:
            diagnostics = tuple(rejected.faults)
            tell(_rejected(attempt, diagnostics))
        except PromptFailed as failed:
            # Models have been tried as often as is worth it: asking once more would not help.
            tell(_rejected(attempt, (Fault(failed.code, failed.message),)))
            break
    tell(_requested(attempt + 1))
    try:
        return plan_envelope(envelope, image, run_id=run_id, created_at=created_at, limits=limits)
    except PlanRejected as rejected:
        tell(_rejected(attempt + 1, rejected.faults))
        raise


def _draft_faults(value: Any) -> list[Fault]:
    return [
        Fault("DRAFT_INVALID", found.message, found.pointer)
        for found in compile_schema(DRAFT_SCHEMA).errors(value)
    ]


def _requested(attempt: int) -> Event:
    return Event(EventType.PLAN_REQUESTED, {"attempt": attempt, "phase": PHASE})


def _rejected(attempt: int, faults: tuple[Fault, ...]) -> Event:
    diagnostics = [fault.as_dict() for fault in faults]
    data = {"attempt": attempt, "phase": PHASE, "diagnostics": diagnostics}
    return Event(EventType.PLAN_REJECTED, data, level=Level.WARN)
