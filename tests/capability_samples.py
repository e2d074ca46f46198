"""Capabilities with compiled contracts and calls of them, for tests of adapters alone."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from app.adapters.capabilities.builtin import BuiltinAdapter, Pack
from app.domain.capability import (
    Capability,
    CapabilityKind,
    CapabilityStatus,
    Effect,
    Registration,
)
from app.domain.contract import compile_contract
from app.domain.facet import Facet
from app.kit.ids import span_id
from app.ports import Call

ANY_OBJECT: dict[str, Any] = {"mode": "json_schema", "schema": {"type": "object"}}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-{span_id('run-1', 'A', 2)}-01"
"""Of `call_of`."""
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


def compiled(registration: Registration, facets: Iterable[Facet] = ()) -> Capability:
    """The capability of a registration, as the registry makes it."""
    catalog = {facet.name: facet for facet in facets}
    return Capability(
        registration=registration,
        input=compile_contract(registration.input_contract, "input", catalog, ""),
        output=compile_contract(registration.output_contract, "output", catalog, ""),
        status=CapabilityStatus.ACTIVE,
        registered_at=LONG_AGO,
        last_seen_at=LONG_AGO,
    )


def http_capability(
    config: dict[str, Any], effect: Effect = Effect.IDEMPOTENT, capability_id: str = "far.side"
) -> Capability:
    return _far_side(CapabilityKind.HTTP, config, effect, capability_id)


def mcp_capability(config: dict[str, Any], effect: Effect = Effect.IDEMPOTENT) -> Capability:
    return _far_side(CapabilityKind.MCP, config, effect, "far.tool")


def _far_side(
    kind: CapabilityKind, config: dict[str, Any], effect: Effect, capability_id: str
) -> Capability:
    return compiled(
        Registration.model_validate(
            {
                "capability_id": capability_id,
                "version": "1.0.0",
                "display_name": "Far side",
                "summary": "A server under test.",
                "kind": kind,
                "effect": effect,
                "input_contract": ANY_OBJECT,
                "output_contract": ANY_OBJECT,
                "config": config,
            }
        )
    )


def call_of(capability: Capability, inputs: dict[str, Any], deadline_ms: int = 10_000) -> Call:
    return Call(
        run_id="run-1",
        node_id="A",
        attempt=2,
        idempotency_key="run-1:A:1",
        objective="find out",
        instructions="look closely",
        inputs=inputs,
        deadline_ms=deadline_ms,
        capability=capability,
        trace_id=TRACE_ID,
    )


async def run_builtin(pack: Pack, capability_id: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The output of a builtin, with both sides of its contract checked."""
    registration = next(
        found for found in pack.registrations() if found.capability_id == capability_id
    )
    capability = compiled(registration, pack.facets())
    assert capability.input.violations(inputs) == []
    output = await BuiltinAdapter([pack]).invoke(call_of(capability, inputs))
    assert capability.output.violations(output) == []
    return output
