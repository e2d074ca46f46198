"""Shapes of plans in OpenAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from app.domain.plan import Author


class PlanResource(BaseModel):
    """One plan version. `metadata.proof` says of every input and output why it fits."""

    model_config = ConfigDict(extra="forbid")

    run_id: str
    version: int
    created_at: str
    author: Author
    nodes: list[dict[str, Any]]
    metadata: dict[str, Any]


class PlanList(BaseModel):
    plans: list[PlanResource]


class PlanDiff(BaseModel):
    """Nodes that were added, removed and changed between two versions."""

    model_config = ConfigDict(extra="allow")
