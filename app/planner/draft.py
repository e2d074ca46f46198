"""Drafts: what a planner proposes and `verify` proves; and how either is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.domain.errors import Fault, PlanRejected
from app.domain.plan import Author, Bound

RESERVED_NODE_IDS = frozenset({"inputs"})
# Enough to see what is wrong; 2,000 wrong nodes would make an answer of megabytes.
FAULTS_MAX = 100


def reject_if(what: str, faults: list[Fault]) -> None:
    """Raise `PlanRejected` if there are faults; `what` says what failed."""
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        detail = f"{what}: {faults[0].message}{more}"
        raise PlanRejected(detail, faults=faults[:FAULTS_MAX])


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """Bounds on every plan; an envelope may ask for tighter ones in policies.planner.topology."""

    nodes_max: int = 2_000
    edges_max: int = 10_000
    depth_max: int = 2_000


@dataclass(slots=True)
class DraftNode:
    """One proposed capability call.

    `bindings` None: bind by facet name. `pointer` is where the envelope speaks of the node, such as
    "/goal_graph/nodes/2", and empty when a planner made it up: faults then name the node only.
    """

    id: str
    capability_id: str
    capability_version: str | None
    requires: Sequence[str]
    bindings: Mapping[str, Bound] | None
    text: str = ""
    timeout_s: float | None = None
    max_attempts: int | None = None
    rationale: str = ""
    pointer: str = ""

    def at(self, suffix: str) -> str:
        """The JSON pointer of a part of the node, empty when the envelope does not hold it."""
        return self.pointer and self.pointer + suffix


@dataclass(slots=True)
class Draft:
    """A proposed plan, or with `open_goals` a part of one: later versions give the output."""

    author: Author
    nodes: Sequence[DraftNode]
    rationale: str = ""
    open_goals: tuple[str, ...] = ()
