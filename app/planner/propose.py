"""A plan that a model proposes: asked for, proved, sent back with what is wrong, asked for again.

    PLAN_REQUESTED -> draft -> verify -> PLAN_REJECTED with diagnostics -> PLAN_REQUESTED -> …

Two tries, then the assembler, which needs no model. What a model proposes never runs unproved, so
the worst that a bad one can do is to cost two calls. A goal graph that names no capabilities is
planned by the same handshake, one node at a time; there the assembler can not help.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.domain.chat import Completion, Prompt, PromptFailed
from app.domain.contract import Contract
from app.domain.envelope import Envelope
from app.domain.errors import Fault, PlanRejected
from app.domain.events import Event
from app.domain.json_schema import compile_schema
from app.domain.plan import Plan
from app.planner.assemble import goals_of, inputs_at_hand
from app.planner.draft import Draft, PlanLimits
from app.planner.goals import draft_chosen, draft_named, is_stepwise, ready_now
from app.planner.handshake import rejected, requested
from app.planner.plan_envelope import (
    limits_of,
    output_contract_of,
    plan_envelope,
    within_tokens,
)
from app.planner.prompt import draft_of, planning_prompt, step_prompt
from app.planner.replan import Progress, made_by
from app.planner.shortlist import shortlist
from app.planner.verify import verify
from app.registry.image import RegistryImage

TRIES = 2

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
    progress: Progress | None = None,
) -> Plan:
    """The verified plan of an envelope, by a model if one finds it; with `progress` the next one.

    `tell` gets the events of the handshake, all but the last. Raises `PlanRejected` when nobody has
    a plan.
    """
    asking = _Asking(envelope, image, output_contract_of(envelope, image), progress)

    def proved(draft: Draft) -> Plan:
        plan = verify(
            draft,
            envelope,
            image,
            asking.output,
            run_id=run_id,
            created_at=created_at,
            limits=limits_of(envelope, limits),
            progress=progress,
        )
        return within_tokens(plan, envelope, image)

    tell(requested(1, progress))
    if (draft := asking.without_model()) is not None:
        return proved(draft)
    refused: PlanRejected | None = None
    attempt, was_last = 1, False
    while attempt <= TRIES and not was_last:
        prompt = asking.prompt(attempt, () if refused is None else tuple(refused.faults))
        try:
            completion = await complete(prompt)
            return proved(asking.draft(completion.value))
        except PlanRejected as found:
            refused = found
        except PromptFailed as failed:
            # Models have been tried as often as is worth it: asking once more would not help.
            fault = Fault(failed.code, failed.message)
            refused, was_last = PlanRejected(failed.message, faults=[fault]), True
        if asking.is_step and (was_last or attempt == TRIES):
            raise refused
        tell(rejected(attempt, refused.faults, progress))
        attempt += 1
        tell(requested(attempt, progress))
    return plan_envelope(
        envelope,
        image,
        run_id=run_id,
        created_at=created_at,
        limits=limits,
        models_up=not was_last,
        progress=progress,
    )


@dataclass(slots=True)
class _Asking:
    """What is asked of a model: a draft of all that is left, or the next node of a goal graph."""

    envelope: Envelope
    image: RegistryImage
    output: Contract
    progress: Progress | None

    @property
    def is_step(self) -> bool:
        return is_stepwise(self.envelope.goal_graph, self.progress)

    def without_model(self) -> Draft | None:
        """What nobody has to choose. Raises `PlanRejected` when no goal can be chosen yet."""
        graph = self.envelope.goal_graph
        if graph is None or not self.is_step:
            return None
        return draft_named(graph, self.progress)

    def prompt(self, attempt: int, faults: tuple[Fault, ...]) -> Prompt:
        selection = self.envelope.policies.planner.selection
        at_hand = inputs_at_hand(self.envelope, self.image) | made_by(self.image, self.progress)
        graph, progress = self.envelope.goal_graph, self.progress
        if graph is not None and self.is_step:
            listed = shortlist(self.image, at_hand, (), selection)
            ready = ready_now(graph, progress)
            prompt = step_prompt(
                *(self.envelope, self.output, listed, ready, faults),
                attempt=attempt,
                progress=progress,
            )
        else:
            goals = goals_of(self.envelope, self.image, self.output)
            listed = shortlist(self.image, at_hand, goals, selection)
            prompt = planning_prompt(
                *(self.envelope, self.output, listed, faults), attempt=attempt, progress=progress
            )
        assert isinstance(prompt.schema, Mapping)
        return replace(prompt, faults_of=_faults_by(prompt.schema))

    def draft(self, answer: Mapping[str, Any]) -> Draft:
        graph, progress = self.envelope.goal_graph, self.progress
        if graph is not None and self.is_step:
            return draft_chosen(graph, progress, answer)
        return draft_of(answer, () if progress is None else progress.kept)


def _faults_by(schema: Mapping[str, Any]) -> Callable[[Any], list[Fault]]:
    compiled = compile_schema(dict(schema))
    return lambda value: [
        Fault("DRAFT_INVALID", found.message, found.pointer) for found in compiled.errors(value)
    ]
