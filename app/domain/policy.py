"""Runtime policies: what makes a run change its course while it is under way.

A policy has a trigger and an action. `triggers.py` says which of them fire.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.domain.capability import NodeKind

POLICIES_MAX = 50


class TriggerKind(StrEnum):
    """When a policy looks: a node gave its result, or has failed for good."""

    ON_NODE_COMPLETE = "on_node_complete"
    ON_NODE_FAILED = "on_node_failed"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Selector(_Strict):
    """Which nodes are meant: all parts that are given must match, none means every node."""

    node_id: str | None = Field(default=None, max_length=100)
    kind: NodeKind | None = None
    capability_id: str | None = Field(default=None, max_length=120)


class Trigger(_Strict):
    kind: TriggerKind
    selector: Selector = Selector()


class ReplanAction(_Strict):
    """Plan the rest anew: what is done stays. At most `max_attempts` times in a run."""

    kind: Literal["replan"]
    rationale: str = Field(default="", max_length=2_000)
    max_attempts: int = Field(default=1, ge=1, le=20)


class RuntimePolicy(_Strict):
    """One rule of a run. Ids are unique within an envelope."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    enabled: bool = True
    trigger: Trigger
    action: ReplanAction


def with_own_ids(policies: list[RuntimePolicy]) -> list[RuntimePolicy]:
    """The policies; raises `ValueError` when two share an id."""
    ids = [policy.id for policy in policies]
    doubled = next((found for found in ids if ids.count(found) > 1), None)
    if doubled is not None:
        raise ValueError(f"two policies have the id {doubled!r}")
    return policies
