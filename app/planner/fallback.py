"""The last resort of a planner: a node that nobody calls, because a person does its work."""

from __future__ import annotations

from app.domain.capability import Effect, NodeKind
from app.domain.contract import Contract
from app.domain.envelope import Envelope
from app.domain.errors import Fault
from app.domain.plan import Author, Fit, OutputSource, Plan, PlanNode, ProofStep, children_of
from app.planner.replan import Progress

FALLBACK = "fallback"
CAPABILITY_ID, CAPABILITY_VERSION = "human.fallback", "1"
"""Not in the registry: there is nothing to call."""
FAULTS_TOLD_MAX = 5
OBJECTIVE_CHARS_MAX = 500


def fallback_plan(
    envelope: Envelope,
    output: Contract,
    faults: tuple[Fault, ...],
    progress: Progress | None,
    *,
    run_id: str,
    created_at: str,
) -> Plan:
    """A plan that keeps what is done and asks a person for the output of the run."""
    kept = {} if progress is None else dict(progress.kept)
    proof = () if progress is None else progress.kept_proof
    node_id = FALLBACK
    while node_id in kept:
        node_id += "_"
    nodes = kept | {
        node_id: PlanNode(
            id=node_id,
            kind=NodeKind.FALLBACK,
            label="A person decides",
            text=_prompt(envelope, faults),
            capability_id=CAPABILITY_ID,
            capability_version=CAPABILITY_VERSION,
            requires=(),
            bindings={},
            input_facets=(),
            output_facets=output.facets,
            effect=Effect.PURE,
            timeout_s=1.0,
            max_attempts=1,
            rationale="no plan was found",
        )
    }
    why = "a person gives the output; it is checked when it is given"
    return Plan(
        run_id,
        1 if progress is None else progress.plan.version + 1,
        created_at,
        Author.FALLBACK,
        nodes,
        (OutputSource(None, node_id, ""),),
        (*proof, ProofStep(None, "", node_id, "", Fit.CHECKED_AT_RUN, why)),
        "no plan was found",
        children_of(nodes),
    )


def _prompt(envelope: Envelope, faults: tuple[Fault, ...]) -> str:
    told = [f"- {fault.code}: {fault.message}" for fault in faults[:FAULTS_TOLD_MAX]]
    return "\n".join(
        [
            f"No plan was found for: {envelope.objective[:OBJECTIVE_CHARS_MAX]}",
            *told,
            "Decide `done` with the output of the run, `retry` to plan again once what is missing"
            " is there, or `fail`.",
        ]
    )
