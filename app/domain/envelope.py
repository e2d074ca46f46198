"""The run envelope: what to achieve, with what, under which rules, in what shape.

Unknown fields are refused, so that a misspelled limit is an error and never silently ignored.
"""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from app.domain.contract import ContractSpec
from app.domain.policy import POLICIES_MAX, RuntimePolicy, with_own_ids

NODE_ID_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}$"
NodeId = Annotated[str, StringConstraints(pattern=NODE_ID_PATTERN)]
FacetKey = Annotated[str, StringConstraints(min_length=1, max_length=120)]

MAX_PARALLEL_DEFAULT = 16
MAX_PARALLEL_CAP = 256


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Frozen all the way down: a default is shared, not copied for every envelope."""
        return self


class Lane(StrEnum):
    """The queue a run waits in."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


class ProofMode(StrEnum):
    """`strict` refuses a plan whose fit is only checked at run time."""

    ALLOW_CHECKED = "allow_checked"
    STRICT = "strict"


class ValueBinding(_Strict):
    """A constant given by the caller."""

    value: Any


class FromBinding(_Strict):
    """A part of the run's inputs or of another node's output; `pointer` is a JSON pointer."""

    source: str = Field(alias="from", min_length=1, max_length=100)
    pointer: str = Field(default="", max_length=1_000, pattern=r"^(/.*)?$")


Binding = ValueBinding | FromBinding


class GoalNode(_Strict):
    """One node of a caller's goal graph. Without `inputs` it is bound by facet name.

    Without `capability` it only says what is to be done: a model chooses who does it, one node at a
    time, among those whose requirements are done.
    """

    id: NodeId
    text: str = Field(default="", max_length=4_000)
    requires: list[NodeId] = Field(default_factory=list, max_length=2_000)
    capability: str | None = Field(default=None, min_length=1, max_length=120)
    capability_version: str | None = Field(default=None, max_length=64)
    inputs: dict[FacetKey, Binding] | None = None
    timeout_s: float | None = Field(default=None, gt=0, le=86_400)
    max_attempts: int | None = Field(default=None, ge=1, le=20)


class GoalGraph(_Strict):
    nodes: list[GoalNode] = Field(min_length=1)


class Budget(_Strict):
    """Hard limits of a run; None is no limit."""

    usd: Decimal | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)
    calls: int | None = Field(default=None, ge=0)


class Constraints(_Strict):
    """`deadline_s` counts from acceptance, not while the run is paused or awaits a human."""

    deadline_s: float | None = Field(default=None, gt=0, le=2_592_000)
    max_parallel: int = Field(default=MAX_PARALLEL_DEFAULT, ge=1, le=MAX_PARALLEL_CAP)
    lane: Lane = Lane.STANDARD
    proof: ProofMode = ProofMode.ALLOW_CHECKED
    durability: Literal["strict"] = "strict"
    budget: Budget = Budget()


class Selection(_Strict):
    """Capability ids that a plan must, must not, should or should not use."""

    require: list[str] = Field(default_factory=list, max_length=100)
    forbid: list[str] = Field(default_factory=list, max_length=100)
    prefer: list[str] = Field(default_factory=list, max_length=100)
    avoid: list[str] = Field(default_factory=list, max_length=100)


class Topology(_Strict):
    """Bounds on the shape of a plan."""

    max_depth: int | None = Field(default=None, ge=1, le=2_000)
    max_nodes: int | None = Field(default=None, ge=1, le=2_000)


class Objective(StrEnum):
    """What a plan shall be best at, where there are several ways."""

    SPEED = "speed"
    QUALITY = "quality"
    DIVERSITY = "diversity"
    TOKEN_EFFICIENCY = "token_efficiency"


class Optimisation(_Strict):
    """What the assembler prefers besides low cost: `quality` lets a model make what a model can,
    `token_efficiency` only what nothing else can, `speed` takes the shortest time limits, and with
    `diversity` capabilities of equal cost take turns from run to run. `max_tokens` bounds what the
    capabilities of any plan declare to use (`cost.tokens`); what calls really use is bounded by
    `constraints.budget`."""

    objective: Objective | None = None
    max_tokens: int | None = Field(default=None, ge=0)


class PlannerPolicies(_Strict):
    """How the plan is made. `strategy` llm: a model proposes it, with the `directives` in its
    prompt; without a model, or when what it proposes does not hold, the assembler makes it."""

    strategy: Literal["assembler", "llm"] = "assembler"
    directives: list[Annotated[str, StringConstraints(max_length=2_000)]] = Field(
        default_factory=list, max_length=50
    )
    selection: Selection = Selection()
    topology: Topology = Topology()
    optimisation: Optimisation = Optimisation()


class Policies(_Strict):
    """Rules of the run: how its plan is made, and what changes its course, in declared order."""

    planner: PlannerPolicies = PlannerPolicies()
    runtime: Annotated[list[RuntimePolicy], AfterValidator(with_own_ids)] = Field(
        default_factory=list, max_length=POLICIES_MAX
    )


class Metadata(_Strict):
    label: str | None = Field(default=None, max_length=200)
    correlation_id: str | None = Field(default=None, max_length=200)
    client_id: str | None = Field(default=None, max_length=200)


class Envelope(_Strict):
    """The validated body of `POST /v1/runs`."""

    objective: str = Field(min_length=1, max_length=20_000)
    inputs: dict[FacetKey, Any] = Field(default_factory=dict)
    output_contract: ContractSpec
    goal_graph: GoalGraph | None = None
    constraints: Constraints = Constraints()
    policies: Policies = Policies()
    goal_conditions: list[dict[str, Any]] = Field(default_factory=list, max_length=0)
    special_instructions: list[str] = Field(default_factory=list, max_length=100)
    metadata: Metadata = Metadata()
