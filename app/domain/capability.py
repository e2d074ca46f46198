"""Capabilities: what can run a node, with its contracts, its cost and what repeating it does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.domain.contract import Contract, ContractSpec

CAPABILITY_ID = re.compile(r"^[a-z0-9][a-z0-9_.\-]{0,119}$")
CapabilityId = Annotated[str, StringConstraints(pattern=CAPABILITY_ID.pattern)]


class Effect(StrEnum):
    """What repeating a capability does to the world."""

    PURE = "pure"
    IDEMPOTENT = "idempotent"
    AT_MOST_ONCE = "at_most_once"


class CapabilityKind(StrEnum):
    """The adapter family that runs the capability."""

    BUILTIN = "builtin"
    HTTP = "http"
    LLM = "llm"
    MCP = "mcp"


class NodeKind(StrEnum):
    """What a node does for its plan. Execution is the default."""

    STRUCTURING = "structuring"
    EXECUTION = "execution"
    TRANSFORMATION = "transformation"
    VALIDATION = "validation"
    BRANCH = "branch"
    ROUTING = "routing"
    FALLBACK = "fallback"


class CapabilityStatus(StrEnum):
    """`inactive`: its heartbeat ran out; it is not planned any more, running plans go on."""

    ACTIVE = "active"
    INACTIVE = "inactive"


class Cost(BaseModel):
    """What a call costs. `tier` orders capabilities when nothing else does (0 is free)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tier: int = Field(default=0, ge=0, le=9)
    usd_per_call: Decimal | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)


class Heartbeat(BaseModel):
    """How often the owner registers again; without it the capability never goes stale."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    interval_s: float = Field(gt=0, le=86_400)
    timeout_s: float | None = Field(default=None, gt=0, le=604_800)

    @property
    def silence_max_s(self) -> float:
        """How long it may stay silent before it counts as stale: `timeout_s`, else 3 intervals."""
        return self.timeout_s if self.timeout_s is not None else 3 * self.interval_s


class Registration(BaseModel):
    """The body of `POST /v1/capabilities`. Registering again is the heartbeat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    capability_id: CapabilityId
    version: str = Field(min_length=1, max_length=64, pattern=r"^[0-9A-Za-z][0-9A-Za-z.+\-]*$")
    display_name: str = Field(min_length=1, max_length=200)
    summary: str = Field(min_length=1, max_length=2_000)
    kind: CapabilityKind
    node_kind: NodeKind = NodeKind.EXECUTION
    effect: Effect
    input_contract: ContractSpec
    output_contract: ContractSpec
    cost: Cost = Cost()
    timeout_s: float = Field(default=60, gt=0, le=86_400)
    max_attempts: int | None = Field(default=None, ge=1, le=20)
    concurrency: int | None = Field(default=None, ge=1, le=10_000)
    heartbeat: Heartbeat | None = None
    preferred_models: list[str] = Field(default_factory=list, max_length=20)
    system_prompt: str | None = Field(default=None, max_length=20_000)
    config: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)

    def with_defaults(self, *, timeout_s: float, attempts_max: int) -> Registration:
        """The registration with the operator's defaults where it says nothing.

        An `at_most_once` capability that does not ask for repetitions gets none.
        """
        defaults: dict[str, Any] = {}
        if "timeout_s" not in self.model_fields_set:
            defaults["timeout_s"] = timeout_s
        if self.max_attempts is None:
            defaults["max_attempts"] = 1 if self.effect is Effect.AT_MOST_ONCE else attempts_max
        return self.model_copy(update=defaults)

    @property
    def attempts_max(self) -> int:
        """How many attempts a node of this capability has when its plan says nothing."""
        if self.max_attempts is not None:
            return self.max_attempts
        return 1 if self.effect is Effect.AT_MOST_ONCE else 3


@dataclass(frozen=True, slots=True)
class Capability:
    """A registered capability with its compiled contracts: what planner and executor work with."""

    registration: Registration
    input: Contract
    output: Contract
    status: CapabilityStatus
    registered_at: datetime
    last_seen_at: datetime

    @property
    def capability_id(self) -> str:
        return self.registration.capability_id

    @property
    def version(self) -> str:
        return self.registration.version

    @property
    def key(self) -> tuple[str, str]:
        return (self.registration.capability_id, self.registration.version)
