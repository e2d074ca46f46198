"""A plan made anew while its run is under way: what is done stays, the rest is planned again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.domain.capability import Effect
from app.domain.contract import Contract
from app.domain.envelope import Envelope, Selection
from app.domain.events import BlockReason
from app.domain.plan import Author, Bound, Plan, PlanCause, PlanNode, ProofStep
from app.domain.run import NodeStatus
from app.domain.state import RunState
from app.kit.json_pointer import escape
from app.planner.assemble import assemble, goals_of, inputs_at_hand
from app.planner.draft import Draft, DraftNode, PlanLimits
from app.registry.image import RegistryImage


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come when its plan is made anew.

    `kept` nodes are in every later version, unchanged: those that have a result, and those of which
    nobody knows whether they had an effect. `outputs` are the results by node id, `failed` the
    errors. `ready` could start now under the plan in force. `reason` is the policy's rationale.
    """

    plan: Plan
    kept: Mapping[str, PlanNode]
    outputs: Mapping[str, Any]
    failed: Mapping[str, Mapping[str, Any]]
    ready: tuple[str, ...]
    cause: PlanCause
    policy_id: str | None = None
    reason: str = ""

    @property
    def done(self) -> frozenset[str]:
        """The kept nodes that have a result."""
        return frozenset(self.kept) & self.outputs.keys()

    @property
    def in_doubt(self) -> frozenset[str]:
        """The facets that kept nodes make if a person says that they had their effect."""
        unknown = self.kept.keys() - self.outputs.keys()
        return frozenset(facet for i in unknown for facet in self.kept[i].output_facets)

    @property
    def kept_proof(self) -> tuple[ProofStep, ...]:
        """Why what goes into the kept nodes fits, as it was proved when they were planned."""
        return tuple(step for step in self.plan.proof if step.node_id in self.kept)

    def author_of(self, draft: Draft) -> Author:
        """Whose the next version is: a goal's is its drafter's, all others are replans."""
        return draft.author if self.cause is PlanCause.NEXT_GOAL else Author.REPLAN


def progress_of(state: RunState, outputs: Mapping[str, Any], envelope: Envelope) -> Progress | None:
    """Where the run stands; None when it has no plan yet."""
    plan = state.plan
    if plan is None:
        return None
    kept = {
        node.id: node
        for node in plan.nodes.values()
        if state.nodes[node.id].status in (NodeStatus.DONE, NodeStatus.SKIPPED)
        or state.nodes[node.id].reason == BlockReason.UNKNOWN_OUTCOME
    }
    asked_by = next((p for p in envelope.policies.runtime if p.id == state.replan), None)
    if state.replan is None:
        cause = PlanCause.NEXT_GOAL
    else:
        cause = PlanCause.OPERATOR if asked_by is None else PlanCause.POLICY
    return Progress(
        plan,
        kept,
        {node_id: outputs[node_id] for node_id in kept if node_id in outputs},
        {node_id: state.nodes[node_id].error or {} for node_id in state.failed},
        (*state.ready, *(i for queue in state.ready_limited.values() for i in queue)),
        cause,
        None if asked_by is None else asked_by.id,
        "" if asked_by is None else asked_by.action.rationale,
    )


def kept_drafts(progress: Progress | None) -> list[DraftNode]:
    """The nodes that stay, as a draft proposes them: pinned, and bound as they were."""
    if progress is None:
        return []
    return [
        DraftNode(
            node.id, node.capability_id, node.capability_version, node.requires, node.bindings
        )
        for node in progress.kept.values()
    ]


def assemble_rest(
    envelope: Envelope,
    image: RegistryImage,
    output: Contract,
    limits: PlanLimits,
    progress: Progress,
    *,
    models_up: bool = True,
    run_id: str = "",
) -> Draft:
    """The cheapest way from what is done to what is asked for; what failed is used last of all.

    Facets that are made already are given like inputs to the assembler, and bound to the nodes that
    made them afterwards. Raises `PlanRejected` as `assemble` does.
    """
    made = _made(image, progress)
    planner = envelope.policies.planner
    selection = _selection_left(planner.selection, progress)
    goals = goals_of(envelope, image, output)
    at_hand = inputs_at_hand(envelope, image)
    settled = progress.in_doubt | made.keys()
    left = [goal for goal in goals if goal not in settled and _is_to_make(goal, at_hand, progress)]
    if progress.kept and goals and not left and not selection.require:
        return Draft(Author.REPLAN, [], "everything that is asked for is made")
    if not progress.in_doubt.isdisjoint(goals) or (left and at_hand.issuperset(left)):
        # The assembler would make the others once more: what a person still decides about, or all
        # that is asked for when all of it is given.
        output = replace(output, mode="facets", facets=tuple(left))
    given = {facet: progress.outputs[node_id][key] for facet, (node_id, key) in made.items()}
    planner = planner.model_copy(update={"selection": selection})
    rest = envelope.model_copy(
        update={
            "inputs": {**envelope.inputs, **given},
            "policies": envelope.policies.model_copy(update={"planner": planner}),
        }
    )
    draft = assemble(rest, image, output, limits, models_up=models_up, run_id=run_id)
    sources = {
        f"/{escape(facet)}": Bound(node_id, f"/{escape(key)}")
        for facet, (node_id, key) in made.items()
    }
    return replace(draft, nodes=_renamed(draft.nodes, progress.kept, sources))


def _selection_left(selection: Selection, progress: Progress) -> Selection:
    """What the policies say of the rest. A side effect that happened, or may have, is not caused
    again; what failed comes last."""
    kept = progress.kept.values()
    used = {node.capability_id for node in kept}
    once = [node.capability_id for node in kept if node.effect is Effect.AT_MOST_ONCE]
    failed = [progress.plan.nodes[node_id].capability_id for node_id in progress.failed]
    return selection.model_copy(
        update={
            "require": [name for name in selection.require if name not in used],
            "forbid": [*selection.forbid, *once],
            "avoid": [*selection.avoid, *failed],
        }
    )


def _is_to_make(goal: str, at_hand: Collection[str], progress: Progress) -> bool:
    """Whether a node has to make it: what is given is passed through, unless the plan in force was
    to make it anew."""
    planned = progress.plan.nodes.values()
    return goal not in at_hand or any(goal in node.output_facets for node in planned)


def made_by(image: RegistryImage, progress: Progress | None) -> frozenset[str]:
    """The facets that the run has made so far."""
    return frozenset() if progress is None else frozenset(_made(image, progress))


def _made(image: RegistryImage, progress: Progress) -> dict[str, tuple[str, str]]:
    """The facets that kept nodes made: the node and the key of its output; the latest wins."""
    found: dict[str, tuple[str, str]] = {}
    for node_id, node in progress.kept.items():
        capability = image.get(node.capability_id, node.capability_version)
        output = progress.outputs.get(node_id)
        if capability is not None and isinstance(output, Mapping):
            for declared in capability.output.properties.values():
                if declared.facet is not None and declared.key in output:
                    found[declared.facet] = (node_id, declared.key)
    return found


def _renamed(
    nodes: Iterable[DraftNode], taken: Collection[str], sources: Mapping[str, Bound]
) -> list[DraftNode]:
    """The nodes with ids of their own, and with what was made already taken from who made it."""
    ids: dict[str, str] = {}
    for node in nodes:
        count, candidate = 2, node.id
        while candidate in taken or candidate in ids.values():
            count, candidate = count + 1, f"{node.id[:95]}_{count}"
        ids[node.id] = candidate
    return [
        replace(
            node,
            id=ids[node.id],
            requires=[ids[required] for required in node.requires],
            bindings={
                key: sources.get(bound.pointer, bound)
                if bound.source == "inputs"
                else replace(bound, source=ids[bound.source or ""])
                for key, bound in (node.bindings or {}).items()
            },
        )
        for node in nodes
    ]
