"""Where an envelope becomes a plan: the door of the planner.

Pure and synchronous: no I/O, no clock, no randomness. The same envelope and image give the same
plan, to the byte.
"""

from __future__ import annotations

from app.domain.contract import Contract
from app.domain.envelope import Envelope
from app.domain.errors import ContractError, Fault, PlanRejected
from app.domain.plan import Plan
from app.planner.assemble import assemble
from app.planner.draft import PlanLimits
from app.planner.goal_graph import draft_goal_graph
from app.planner.verify import verify
from app.registry.image import RegistryImage

__all__ = ["PlanLimits", "output_contract_of", "plan_envelope"]

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
) -> Plan:
    """The verified plan of an envelope, version 1.

    With a goal graph it is the caller's plan, bound and proved; without one the cheapest that can
    be assembled from the registry. Raises `PlanRejected` with one fault per broken rule: those of
    `verify`, of `assemble` and of `output_contract_of`.
    """
    output = output_contract_of(envelope, image)
    limits = limits_of(envelope, limits)
    if envelope.goal_graph is not None:
        draft = draft_goal_graph(envelope.goal_graph)
    else:
        draft = assemble(envelope, image, output, limits)
    return verify(
        draft, envelope, image, output, run_id=run_id, created_at=created_at, limits=limits
    )


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
