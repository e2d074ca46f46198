"""Facets, capabilities and envelopes in memory, for tests that need a registry and no database."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from app.domain.capability import (
    Capability,
    CapabilityKind,
    CapabilityStatus,
    Cost,
    Effect,
    NodeKind,
    Registration,
)
from app.domain.contract import compile_contract
from app.domain.envelope import Envelope
from app.domain.facet import Facet
from app.registry.image import RegistryImage

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
ANY_OBJECT: dict[str, Any] = {"schema": {"type": "object"}}
TEXT: dict[str, Any] = {"type": "string"}


def facet(name: str, schema: Mapping[str, Any] = TEXT, **metadata: Any) -> Facet:
    """A facet; `metadata` are its version, direction, required_by_default, property_key …"""
    return Facet.model_validate(
        {
            "name": name,
            "title": name.replace("_", " ").title(),
            "schema": dict(schema),
            "semantics": f"The {name}.",
            "metadata": metadata,
        }
    )


def catalog_of(facets: Iterable[Facet | str]) -> dict[str, Facet]:
    """Facets by name; a bare name is a text facet."""
    made = [facet(found) if isinstance(found, str) else found for found in facets]
    return {found.name: found for found in made}


def capability(
    capability_id: str,
    takes: Sequence[str] | Mapping[str, Any] = (),
    gives: Sequence[str] | Mapping[str, Any] = (),
    *,
    catalog: Mapping[str, Facet] | None = None,
    version: str = "1",
    tier: int = 0,
    active: bool = True,
    age_s: float = 0,
    kind: NodeKind = NodeKind.EXECUTION,
    **registration: Any,
) -> Capability:
    """A registered capability.

    `takes` and `gives` are facet names or a whole contract spec; no names stand for any object.
    Facets missing from `catalog` are texts. `age_s` puts `registered_at` after LONG_AGO.
    """
    known = dict(catalog or {})
    specs = [
        dict(given)
        if isinstance(given, Mapping)
        else {"facets": list(given)}
        if given
        else ANY_OBJECT
        for given in (takes, gives)
    ]
    for spec in specs:
        for name in spec.get("facets", ()):
            known.setdefault(name, facet(name))
    made = Registration.model_validate(
        {
            "capability_id": capability_id,
            "version": version,
            "display_name": capability_id,
            "summary": capability_id,
            "kind": CapabilityKind.BUILTIN,
            "node_kind": kind,
            "effect": Effect.PURE,
            "input_contract": specs[0],
            "output_contract": specs[1],
            "cost": Cost(tier=tier),
            **registration,
        }
    )
    at = LONG_AGO + timedelta(seconds=age_s)
    return Capability(
        made,
        compile_contract(made.input_contract, "input", known, "/input_contract"),
        compile_contract(made.output_contract, "output", known, "/output_contract"),
        CapabilityStatus.ACTIVE if active else CapabilityStatus.INACTIVE,
        at,
        at,
    )


def image_of(
    *capabilities: Capability, facets: Iterable[Facet | str] = (), revision: int = 1
) -> RegistryImage:
    """An image of these capabilities; their facets are added as texts unless given."""
    catalog = catalog_of(facets)
    for found in capabilities:
        for name in (*found.input.facets, *found.output.facets):
            catalog.setdefault(name, facet(name))
    return RegistryImage.build(revision, catalog.values(), capabilities)


def echo(capability_id: str = "util.echo", **registration: Any) -> Capability:
    """Takes and gives any object, as `util.echo` does."""
    return capability(capability_id, **registration)


def envelope(
    *nodes: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | Sequence[str] | None = None,
    **parts: Any,
) -> Envelope:
    """An envelope with a goal graph of these nodes, or none; `output` may be facet names."""
    contract = (
        {"instructions": "anything"}
        if output is None
        else dict(output)
        if isinstance(output, Mapping)
        else {"facets": list(output)}
    )
    body = {"objective": "test", "inputs": dict(inputs or {}), "output_contract": contract, **parts}
    if nodes:
        body["goal_graph"] = {"nodes": [dict(node) for node in nodes]}
    return Envelope.model_validate(body)


def node(
    node_id: str, *requires: str, capability: str = "util.echo", **more: Any
) -> dict[str, Any]:
    """A goal node as the envelope spells it."""
    return {"id": node_id, "requires": list(requires), "capability": capability, **more}


def diamond() -> Envelope:
    """A; B and C require A; D requires both: each takes the whole outputs of what it requires."""
    return envelope(
        node("A", inputs={"n": {"value": 1}}),
        node("B", "A", inputs={"in": {"from": "A", "pointer": ""}}),
        node("C", "A", inputs={"in": {"from": "A", "pointer": ""}}),
        node(
            "D",
            "B",
            "C",
            inputs={"b": {"from": "B", "pointer": ""}, "c": {"from": "C", "pointer": ""}},
        ),
    )
