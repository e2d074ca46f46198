"""Shapes of capabilities, facets and compiled contracts in OpenAPI, made from the domain's."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.domain.capability import (
    Capability,
    CapabilityKind,
    CapabilityStatus,
    Cost,
    Effect,
    Heartbeat,
    NodeKind,
)
from app.domain.contract import Contract, ContractSpec, Mode, instructions_of
from app.domain.facet import Facet, FacetMetadata, Semantics
from app.domain.system_prompt import system_prompt_of
from app.kit.redact import redact


class _Shape(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_by_alias=True, validate_by_name=True, serialize_by_alias=True
    )


class ProvenanceShape(_Shape):
    """Which facet a property of a contract came from."""

    facet: str
    title: str
    direction: str
    pointer: str


class CompiledContract(_Shape):
    """A contract as JSON Schema. `instructions` are those of its facets, one a line."""

    mode: Mode
    json_schema: dict[str, Any] = Field(alias="schema")
    required: list[str]
    facets: list[str]
    provenance: list[ProvenanceShape]
    instructions: str
    sha256: str = Field(description="Equal for equal schemas, whatever the order of their keys.")


class CompiledContracts(_Shape):
    """Both sides; null for a side that was not given."""

    input: CompiledContract | None
    output: CompiledContract | None


class CompileBody(_Shape):
    """Contracts to compile, as in a registration. At least one side makes sense."""

    input_contract: ContractSpec | None = None
    output_contract: ContractSpec | None = None


class CapabilityResource(_Shape):
    """A registered capability. Values under secret keys of config and metadata are redacted."""

    capability_id: str
    version: str
    display_name: str
    summary: str
    kind: CapabilityKind
    node_kind: NodeKind
    effect: Effect
    input_contract: ContractSpec
    output_contract: ContractSpec
    cost: Cost
    timeout_s: float
    max_attempts: int = Field(description="The default of the effect when none was registered.")
    concurrency: int | None
    heartbeat: Heartbeat | None
    preferred_models: list[str]
    system_prompt: str | None = Field(
        description="Of the kind llm: what its model is told, made from the contracts or the "
        "registered text, with the schema of the output."
    )
    config: dict[str, Any]
    metadata: dict[str, Any]
    status: CapabilityStatus = Field(description="`inactive`: its heartbeat ran out.")
    registered_at: datetime = Field(description="When this id and version was first registered.")
    last_seen_at: datetime
    input_facets: list[str]
    output_facets: list[str]
    contracts: CompiledContracts


class CapabilityList(_Shape):
    """A page by id and version. `next_cursor` is null at the end."""

    capabilities: list[CapabilityResource]
    next_cursor: str | None


class FacetResource(_Shape):
    """A facet of the catalog."""

    name: str
    title: str
    description: str
    json_schema: dict[str, Any] = Field(alias="schema")
    semantics: Semantics
    metadata: FacetMetadata


class FacetList(_Shape):
    """A page by name. `next_cursor` is null at the end."""

    facets: list[FacetResource]
    next_cursor: str | None


def contract_view(
    contract: Contract | None, facets: Mapping[str, Facet]
) -> CompiledContract | None:
    """A compiled contract; `facets` is the catalog that it was compiled against."""
    if contract is None:
        return None
    return CompiledContract(
        mode=contract.mode,
        json_schema=contract.schema,
        required=list(contract.required),
        facets=list(contract.facets),
        provenance=[ProvenanceShape(**found.as_dict()) for found in contract.provenance],
        instructions=instructions_of(facets[name] for name in contract.facets if name in facets),
        sha256=contract.sha256,
    )


def capability_view(capability: Capability, facets: Mapping[str, Facet]) -> CapabilityResource:
    """A capability as it is shown: without secrets."""
    registration = capability.registration
    shown = {name: getattr(registration, name) for name in type(registration).model_fields}
    shown |= {
        "max_attempts": registration.attempts_max,
        "config": redact(registration.config),
        "metadata": redact(registration.metadata),
    }
    if registration.kind is CapabilityKind.LLM:
        shown["system_prompt"] = system_prompt_of(capability)
    return CapabilityResource(
        **shown,
        status=capability.status,
        registered_at=capability.registered_at,
        last_seen_at=capability.last_seen_at,
        input_facets=list(capability.input.facets),
        output_facets=list(capability.output.facets),
        contracts=CompiledContracts(
            input=contract_view(capability.input, facets),
            output=contract_view(capability.output, facets),
        ),
    )


def facet_view(facet: Facet) -> FacetResource:
    """A facet as it is shown."""
    return FacetResource(**{name: getattr(facet, name) for name in Facet.model_fields})


FACET_EXAMPLE: dict[str, Any] = {
    "name": "headline",
    "title": "Headline",
    "description": "One line above an article.",
    "schema": {"type": "string", "maxLength": 120},
    "semantics": {"instruction": "Write one line that says what is new."},
    "metadata": {"version": "1.0.0", "direction": "bidirectional", "owner": "newsroom"},
}
REGISTRATION_EXAMPLE: dict[str, Any] = {
    "capability_id": "newsroom.headline",
    "version": "1.0.0",
    "display_name": "Headline writer",
    "summary": "Writes the headline of a document.",
    "kind": "http",
    "effect": "idempotent",
    "input_contract": {"mode": "facets", "facets": ["document"]},
    "output_contract": {"mode": "facets", "facets": ["headline"]},
    "heartbeat": {"interval_s": 30},
    "config": {"url": "https://tools.example.com/headline"},
}
COMPILE_EXAMPLE: dict[str, Any] = {
    "input_contract": {"mode": "facets", "facets": ["document"]},
    "output_contract": {"mode": "facets", "facets": ["brief"]},
}
