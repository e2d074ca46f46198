"""Where an envelope becomes a plan: the door of the planner.

Pure and synchronous: no I/O, no clock, no randomness. The same arguments give the same plan, to the
byte.
"""

from __future__ import annotations

from app.domain.contract import Contract
from app.domain.envelope import Envelope
from app.domain.errors import ContractError, Fault, PlanRejected
from app.domain.plan import Plan, PlanNode
from app.planner.assemble import assemble
from app.planner.draft import PlanLimits, reject_if
from app.planner.goal_graph import draft_goal_graph
from app.planner.goals import is_stepwise
from app.planner.replan import Progress, assemble_rest
from app.planner.verify import verify
from app.registry.image import RegistryImage

__all__ = ["PlanLimits", "output_contract_of", "plan_envelope", "within_tokens"]

_LIMITS = PlanLimits()
_FACET_CODES = frozenset(
    {"DIRECTION_MISMATCH", "TYPE_MISMATCH", "ENUM_CONFLICT", "MERGE_UNSUPPORTED"}
)


def plan_envelope(
    envelope: Envelope,
    image: RegistryImage,
    *,
    run_id: str,
    created_at: str,
    limits: PlanLimits = _LIMITS,
    models_up: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """The verified plan of an envelope: version 1, or with `progress` the next one.

    With a goal graph it is the caller's plan, bound and proved; without one the cheapest that can
    be assembled from the registry. `models_up`: a call of a model has a chance now. Raises
    `PlanRejected` with one fault per broken rule: those of `verify`, of `assemble`, of
    `within_tokens` and of `output_contract_of`.
    """
    output = output_contract_of(envelope, image)
    limits = limits_of(envelope, limits)
    graph = envelope.goal_graph
    if graph is not None and (progress is None or is_stepwise(graph, progress)):
        draft = draft_goal_graph(graph)
    elif progress is not None:
        draft = assemble_rest(
            *(envelope, image, output, limits, progress), models_up=models_up, run_id=run_id
        )
    else:
        draft = assemble(envelope, image, output, limits, models_up=models_up, run_id=run_id)
    plan = verify(
        *(draft, envelope, image, output),
        run_id=run_id,
        created_at=created_at,
        limits=limits,
        progress=progress,
    )
    return within_tokens(plan, envelope, image)


def within_tokens(plan: Plan, envelope: Envelope, image: RegistryImage) -> Plan:
    """The plan, if what its capabilities declare to use is within `optimisation.max_tokens`.

    A capability that declares nothing counts nothing. Raises `PlanRejected` with LIMIT_EXCEEDED.
    """
    tokens_max = envelope.policies.planner.optimisation.max_tokens
    if tokens_max is None:
        return plan
    tokens = sum(_tokens(node, image) for node in plan.nodes.values())
    if tokens > tokens_max:
        message = f"the plan declares {tokens} tokens; {tokens_max} is the limit"
        pointer = "/policies/planner/optimisation/max_tokens"
        reject_if("the plan was refused", [Fault("LIMIT_EXCEEDED", message, pointer)])
    return plan


def _tokens(node: PlanNode, image: RegistryImage) -> int:
    """What the capability of a node declares; nothing when it is registered no more."""
    capability = image.get(node.capability_id, node.capability_version)
    return 0 if capability is None else capability.registration.cost.tokens or 0


def limits_of(envelope: Envelope, limits: PlanLimits) -> PlanLimits:
    """The bounds of a plan, tighter where the envelope asks for it."""
    topology = envelope.policies.planner.topology
    if topology.max_depth is None and topology.max_nodes is None:
        return limits
    return PlanLimits(
        min(limits.nodes_max, topology.max_nodes or limits.nodes_max),
        limits.edges_max,
        min(limits.depth_max, topology.max_depth or limits.depth_max),
    )


def output_contract_of(envelope: Envelope, image: RegistryImage) -> Contract:
    """The run's output contract, compiled once per spec and image.

    Raises `PlanRejected` with UNKNOWN_FACET, FACET_CONTRACT_<code of the facet compiler>, or the
    compiler's own codes for a JSON Schema that does not compile.
    """
    try:
        return image.output_contract(envelope.output_contract)
    except ContractError as refused:
        raise PlanRejected(
            f"the output contract does not compile: {refused.detail}",
            faults=[_planner_fault(fault) for fault in refused.faults],
        ) from refused


def _planner_fault(fault: Fault) -> Fault:
    if fault.code == "FACET_NOT_FOUND":
        code = "UNKNOWN_FACET"
    elif fault.code in _FACET_CODES:
        code = "FACET_CONTRACT_" + fault.code
    else:
        return fault
    return Fault(code, fault.message, fault.pointer, facet=fault.facet)
