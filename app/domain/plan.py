"""Plans: an immutable DAG of capability calls, with the proof that every input and output fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from app.domain.capability import Effect, NodeKind


class Author(StrEnum):
    """Who made a plan version."""

    CALLER = "caller"
    ASSEMBLER = "assembler"
    LLM = "llm"
    REPLAN = "replan"
    FALLBACK = "fallback"


class PlanPhase(StrEnum):
    """Whether it is the first plan of a run, or takes the place of one."""

    INITIAL = "initial"
    REPLAN = "replan"


class PlanCause(StrEnum):
    """Why a plan is made anew: a policy, an operator, or the next of the caller's goals."""

    POLICY = "policy"
    OPERATOR = "operator"
    NEXT_GOAL = "next_goal"


class Fit(StrEnum):
    """Why a value fits the place it goes to.

    `same_facet`: both sides name the same facet and version. `subsumed`: decided on the schemas, or
    on the value itself where it is known. `checked_at_run`: too weak to decide; the contract check
    before the call decides.
    """

    SAME_FACET = "same_facet"
    SUBSUMED = "subsumed"
    CHECKED_AT_RUN = "checked_at_run"


@dataclass(frozen=True, slots=True)
class Bound:
    """Where an input comes from: a constant (`source` None), the run's `inputs`, or a node."""

    source: str | None
    pointer: str = ""
    value: Any = None

    def as_dict(self) -> dict[str, Any]:
        """The binding in the spelling of the envelope."""
        if self.source is None:
            return {"value": self.value}
        return {"from": self.source, "pointer": self.pointer}


@dataclass(frozen=True, slots=True)
class ProofStep:
    """One required input of a node, or one part of the run's output (`node_id` None)."""

    node_id: str | None
    key: str
    source: str | None
    pointer: str
    fit: Fit
    why: str


@dataclass(frozen=True, slots=True)
class PlanNode:
    """One capability call. `requires` holds direct dependencies, declared and derived."""

    id: str
    kind: NodeKind
    label: str
    text: str
    capability_id: str
    capability_version: str
    requires: tuple[str, ...]
    bindings: dict[str, Bound]
    input_facets: tuple[str, ...]
    output_facets: tuple[str, ...]
    effect: Effect
    timeout_s: float
    max_attempts: int
    concurrency: int | None = None
    rationale: str = ""


@dataclass(frozen=True, slots=True)
class OutputSource:
    """One part of the run's output: `key` None takes the whole value."""

    key: str | None
    source: str
    pointer: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan version. It never changes; a replan makes the next one.

    `children` is derived: the nodes that require a node, in plan order. `open_goals` are goals of
    the caller that no node does yet: when its nodes are done, the next version plans one of them.
    """

    run_id: str
    version: int
    created_at: str
    author: Author
    nodes: dict[str, PlanNode]
    output: tuple[OutputSource, ...]
    proof: tuple[ProofStep, ...]
    rationale: str = ""
    children: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    open_goals: tuple[str, ...] = ()


def children_of(nodes: dict[str, PlanNode]) -> dict[str, tuple[str, ...]]:
    """For every node the ids of the nodes that require it, in plan order."""
    found: dict[str, list[str]] = {node_id: [] for node_id in nodes}
    for node in nodes.values():
        for required in node.requires:
            found[required].append(node.id)
    return {node_id: tuple(ids) for node_id, ids in found.items()}
