"""The last gate of every plan, whoever drafted it: what leaves here is acyclic, bound and proved.

One pass each over nodes and edges: resolve the capabilities, put into order (which
binds by name), check the size, prove the inputs, prove the output. A stage whose result the next
one needs ends the verification when it found faults; within a stage all faults are collected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from app.domain.capability import Capability, CapabilityStatus
from app.domain.contract import Contract
from app.domain.envelope import Envelope, ProofMode
from app.domain.errors import Fault
from app.domain.plan import OutputSource, Plan, PlanNode, children_of
from app.kit.json_pointer import escape
from app.planner.draft import RESERVED_NODE_IDS, Draft, DraftNode, PlanLimits, reject_if
from app.planner.order import Node, in_order, unplaced_faults
from app.planner.output import prove_output
from app.planner.prove import Prover
from app.planner.replan import Progress, kept_drafts
from app.planner.view import view_of
from app.registry.image import RegistryImage

REFUSED = "the plan was refused"


def verify(
    draft: Draft,
    envelope: Envelope,
    image: RegistryImage,
    output_contract: Contract,
    *,
    run_id: str,
    created_at: str,
    limits: PlanLimits,
    progress: Progress | None = None,
) -> Plan:
    """The plan of a draft, with its proof. Its nodes are in topological order.

    With `progress` it is the next version: nodes that are kept come first, as they are. With open
    goals nothing is said yet of the output, nor of what the policies require. Raises `PlanRejected`
    with LIMIT_EXCEEDED, DUPLICATE_NODE, RESERVED_NODE_ID, UNKNOWN_NODE, CAPABILITY_NOT_REGISTERED,
    CAPABILITY_INACTIVE, SELECTION_CONFLICT, CYCLE, INPUT_UNBOUND, INPUT_MISMATCH,
    OUTPUT_FACET_UNCOVERED, OUTPUT_MISMATCH, PROOF_TOO_WEAK, OUTCOME_UNKNOWN.
    """
    faults: list[Fault] = []
    kept: Mapping[str, PlanNode] = {}
    if progress is not None:
        kept = progress.kept
        _check_doubt(draft, progress, faults)
        draft = replace(draft, nodes=[*kept_drafts(progress), *draft.nodes])
    _check_count("nodes", len(draft.nodes), limits.nodes_max, draft, faults)
    reject_if(REFUSED, faults)
    nodes = _resolve(draft, image, kept, faults)
    _check_selection(draft, envelope, faults)
    _check_count("edges", _edge_count(nodes), limits.edges_max, draft, faults)
    reject_if(REFUSED, faults)
    order = in_order(nodes, envelope.inputs)
    if len(order) < len(nodes):
        reject_if(REFUSED, unplaced_faults(nodes, order, envelope.inputs))
    _check_count("edges", _edge_count(nodes), limits.edges_max, draft, faults)
    _check_count("depth", max(node.level for node in order), limits.depth_max, draft, faults)
    strict = envelope.constraints.proof is ProofMode.STRICT
    prover = Prover(nodes, envelope.inputs, strict=strict)
    if progress is not None:
        # They need none but each other. Of several that make a part of the output the last counts,
        # and that has to be a new one.
        order.sort(key=lambda node: node.draft.id not in kept)
        prover.steps += progress.kept_proof
    for node in order:
        if node.draft.id not in kept:
            prover.prove_inputs(node)
    output: tuple[OutputSource, ...] = ()
    if not draft.open_goals:
        output = prove_output(output_contract, order, envelope.inputs, prover, strict=strict)
    reject_if(REFUSED, faults + prover.faults)
    planned = {node.draft.id: kept.get(node.draft.id) or _planned(node) for node in order}
    return Plan(
        run_id,
        1 if progress is None else progress.plan.version + 1,
        created_at,
        draft.author if progress is None else progress.author_of(draft),
        planned,
        output,
        tuple(prover.steps),
        draft.rationale,
        children_of(planned),
        draft.open_goals,
    )


def _check_doubt(draft: Draft, progress: Progress, faults: list[Fault]) -> None:
    """What may have happened in a node that awaits a decision is not done again by another one."""
    doubtful = {
        node.capability_id
        for node_id, node in progress.kept.items()
        if node_id not in progress.outputs
    }
    for node in draft.nodes:
        if node.capability_id in doubtful:
            why = f"nobody knows yet whether an earlier call of {node.capability_id!r} took effect"
            _refuse(faults, "OUTCOME_UNKNOWN", why, node, "/capability")


def _check_count(
    what: str, count: int, allowed_max: int, draft: Draft, faults: list[Fault]
) -> None:
    if count > allowed_max:
        pointer = "/goal_graph/nodes" if draft.nodes[0].pointer else ""
        message = f"the plan has {count} {what}" if what != "depth" else f"its depth is {count}"
        faults.append(Fault("LIMIT_EXCEEDED", f"{message}; {allowed_max} is the limit", pointer))


def _resolve(
    draft: Draft, image: RegistryImage, kept: Mapping[str, PlanNode], faults: list[Fault]
) -> dict[str, Node]:
    """The nodes with their capabilities, by id; those without a capability are left out."""
    nodes: dict[str, Node] = {}
    taken: set[str] = set()
    for node in draft.nodes:
        if node.id in taken:
            _refuse(faults, "DUPLICATE_NODE", f"the node id {node.id!r} is taken", node, "/id")
            continue
        taken.add(node.id)
        if node.id in RESERVED_NODE_IDS:
            why = f"the node id {node.id!r} names the run's inputs in bindings"
            _refuse(faults, "RESERVED_NODE_ID", why, node, "/id")
        capability = _capability_of(node, image, faults, is_kept=node.id in kept)
        if capability is not None:
            nodes[node.id] = Node(
                node,
                capability,
                view_of(capability.input),
                view_of(capability.output),
                dict.fromkeys(node.requires),
                node.bindings or {},
            )
    for found in nodes.values():
        _link(found, taken, faults)
    return nodes


def _capability_of(
    node: DraftNode, image: RegistryImage, faults: list[Fault], *, is_kept: bool
) -> Capability | None:
    """The capability of a node; one whose work is done need not be active any more."""
    name, version, where = node.capability_id, node.capability_version, "/capability"
    if version is None:
        found = image.newest(name)
        if found is not None:
            return found
        is_known = image.is_known(name)
    else:
        found = image.get(name, version)
        if found is not None and (is_kept or found.status is CapabilityStatus.ACTIVE):
            return found
        is_known = found is not None
        name, where = f"{name} {version}", "/capability_version"
    if is_known:
        why = f"capability {name!r} is inactive: its heartbeat ran out"
        _refuse(faults, "CAPABILITY_INACTIVE", why, node, where)
    else:
        why = f"no capability {name!r} is registered"
        _refuse(faults, "CAPABILITY_NOT_REGISTERED", why, node, where)
    return None


def _link(node: Node, ids: set[str], faults: list[Fault]) -> None:
    """Check that the named nodes exist, and note the sources that are not required directly."""
    draft = node.draft
    if not ids.issuperset(node.requires):
        for index, required in enumerate(draft.requires):
            if required not in ids:
                why = f"node {draft.id!r} requires {required!r}, which is not in the graph"
                _refuse(faults, "UNKNOWN_NODE", why, draft, f"/requires/{index}")
    extra: dict[str, None] = {}
    for key, bound in node.bound.items():
        source = bound.source
        if source is None or source in node.requires or source == "inputs":
            continue
        if source in ids:
            extra[source] = None
        else:
            why = f"node {draft.id!r} takes {key!r} from {source!r}, which is not in the graph"
            _refuse(faults, "UNKNOWN_NODE", why, draft, f"/inputs/{escape(key)}/from")
    node.extra = list(extra)


def _refuse(faults: list[Fault], code: str, message: str, node: DraftNode, suffix: str) -> None:
    faults.append(
        Fault(
            code,
            message,
            node.at(suffix),
            node_id=node.id,
            capability_id=node.capability_id,
        )
    )


def _check_selection(draft: Draft, envelope: Envelope, faults: list[Fault]) -> None:
    """The capabilities that the envelope's policies require and forbid. What is required may be
    chosen for a goal that is open."""
    selection = envelope.policies.planner.selection
    if not selection.require and not selection.forbid:
        return
    used = {node.capability_id for node in draft.nodes}
    for node in draft.nodes:
        if node.capability_id in selection.forbid:
            why = f"capability {node.capability_id!r} is forbidden by the policies"
            _refuse(faults, "SELECTION_CONFLICT", why, node, "/capability")
    for index, required in enumerate(selection.require):
        if required not in used and not draft.open_goals:
            faults.append(
                Fault(
                    "SELECTION_CONFLICT",
                    f"the policies require capability {required!r}, which the plan does not use",
                    f"/policies/planner/selection/require/{index}",
                    capability_id=required,
                )
            )


def _edge_count(nodes: Mapping[str, Node]) -> int:
    return sum([len(node.requires) for node in nodes.values()])


def _planned(node: Node) -> PlanNode:
    draft, capability = node.draft, node.capability
    registration = capability.registration
    return PlanNode(
        draft.id,
        registration.node_kind,
        registration.display_name,
        draft.text,
        registration.capability_id,
        registration.version,
        tuple(node.requires),
        dict(node.bound),
        capability.input.facets,
        capability.output.facets,
        registration.effect,
        registration.timeout_s if draft.timeout_s is None else draft.timeout_s,
        registration.attempts_max if draft.max_attempts is None else draft.max_attempts,
        registration.concurrency,
        draft.rationale,
    )
