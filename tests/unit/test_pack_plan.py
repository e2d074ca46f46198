"""The standard pack as the planner sees it: a brief is planned, proved, and always checked."""

from __future__ import annotations

from typing import Any

import pytest

from app.adapters.capabilities.builtin import BuiltinAdapter
from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.pack import standard_packs
from app.domain.plan import Fit, Plan
from app.planner.plan_envelope import plan_envelope
from app.ports import CallFailed
from app.registry.image import RegistryImage
from tests.capability_samples import call_of, compiled
from tests.registry_samples import envelope

PACKS = standard_packs(EgressTransport(EgressPolicy()))
FACETS = {facet.name: facet for pack in PACKS for facet in pack.facets()}
CAPABILITIES = [
    compiled(registration, FACETS.values())
    for pack in PACKS
    for registration in pack.registrations()
]
IMAGE = RegistryImage.build(1, FACETS.values(), CAPABILITIES)
DOCUMENT = {"title": "Tides", "text": "# Tides\n\nThe sea rises twice a day because of the moon.\n"}


def planned(inputs: dict[str, Any], *outputs: str) -> Plan:
    wish = envelope(inputs=inputs, output=outputs, constraints={"proof": "strict"})
    return plan_envelope(wish, IMAGE, run_id="r", created_at="2026-01-01T00:00:00.000Z")


def steps(plan: Plan) -> dict[str, set[str]]:
    """The capability of each node and the capabilities that it directly requires."""
    named = {node.id: node.capability_id for node in plan.nodes.values()}
    return {
        node.capability_id: {named[required] for required in node.requires}
        for node in plan.nodes.values()
    }


BRIEF = {
    "document.key_points": {"document.outline"},
    "document.facts": {"document.outline"},
    "brief.compose": {"document.outline", "document.key_points", "document.facts"},
    "brief.check": {"brief.compose"},
}


def test_a_brief_of_a_document() -> None:
    plan = planned({"document": DOCUMENT}, "brief")
    assert steps(plan) == {"document.outline": set(), **BRIEF}
    assert {step.fit for step in plan.proof} <= {Fit.SAME_FACET, Fit.SUBSUMED}


def test_a_brief_of_a_page() -> None:
    found = steps(planned({"url": "https://example.org/"}, "brief"))
    assert found.pop("http.fetch") == set()
    for needs in found.values():
        needs.discard("http.fetch")
    assert found == {"document.outline": set(), **BRIEF}


def test_a_query() -> None:
    found = steps(planned({"query": "a", "json_value": {"a": 1}}, "json_result"))
    assert found == {"json.query": set()}


async def test_the_plan_carries_out() -> None:
    plan = planned({"document": DOCUMENT}, "brief", "brief_report")
    adapter = BuiltinAdapter(PACKS)
    made: dict[str, Any] = {}
    for node in plan.nodes.values():
        capability = IMAGE.get(node.capability_id, node.capability_version)
        assert capability is not None
        inputs = {
            key: DOCUMENT if bound.source == "inputs" else made[str(bound.source)][key]
            for key, bound in node.bindings.items()
        }
        assert capability.input.violations(inputs) == []
        made[node.id] = await adapter.invoke(call_of(capability, inputs))
        assert capability.output.violations(made[node.id]) == []
    output = made[list(plan.nodes)[-1]]
    assert output["brief"]["bullets"][0]["text"].startswith("The sea rises")
    assert output["brief_report"]["dropped"] == []


async def test_fetching_a_private_page_fails_without_a_connection() -> None:
    fetch = next(one for one in CAPABILITIES if one.capability_id == "http.fetch")
    with pytest.raises(CallFailed) as caught:
        await BuiltinAdapter(PACKS).invoke(call_of(fetch, {"url": "http://169.254.169.254/"}))
    assert caught.value.code == "egress_refused"
