"""A domain that no line of the program knows, registered while the service runs: what to plant.

A site is drilled for a core; a core is judged by one adviser or another.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from tests.service import RunningService
from tests.tools import Tool, respond

PLACE, SOIL, VERDICT = "site", "drill_core", "crop_advice"


def facet(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "title": name,
        "schema": {"type": "string"},
        "semantics": f"The {name}.",
    }


def capability(tool: Tool, name: str, takes: str, gives: str, tier: int = 0) -> dict[str, Any]:
    """A tool of a domain that no line of the program knows."""
    return {
        "capability_id": f"agronomy.{name}",
        "version": "1.0.0",
        "display_name": name,
        "summary": f"Makes {gives} of {takes}.",
        "kind": "http",
        "effect": "pure",
        "input_contract": {"facets": [takes]},
        "output_contract": {"facets": [gives]},
        "cost": {"tier": tier},
        "config": {"url": f"http://127.0.0.1:{tool.port}/{name}"},
    }


async def drill(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    respond(writer, 200, {SOIL: f"loam of {body['inputs'][PLACE]}"})


async def advise(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    respond(writer, 200, {VERDICT: f"oats on {body['inputs'][SOIL]}"})


async def neighbour(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    respond(writer, 200, {VERDICT: f"peas on {body['inputs'][SOIL]}"})


async def refuse(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    respond(writer, 400, {"detail": "no"})


def drafted(*capabilities: str) -> str:
    """A draft of a chain, as a model would write it."""
    stages = [{"stage": f"step {n}", "capability": name} for n, name in enumerate(capabilities)]
    return orjson.dumps({"rationale": "one after the other", "stages": stages}).decode()


GOOD = drafted("agronomy.drill", "agronomy.advise")
INVENTED = drafted("agronomy.pray")


def envelope(**more: Any) -> dict[str, Any]:
    return {
        "objective": "Find out what to plant",
        "inputs": {PLACE: "Dithmarschen"},
        "output_contract": {"facets": [VERDICT]},
        "policies": {"planner": {"strategy": "llm"}},
        **more,
    }


async def settle(service: RunningService, tool: Tool) -> None:
    """Register the whole domain at run time."""
    for name in (PLACE, SOIL, VERDICT):
        response = await service.client.post("/v1/facets", json=facet(name))
        assert response.status_code in (200, 201), response.text
    for made in (
        capability(tool, "drill", PLACE, SOIL),
        capability(tool, "advise", SOIL, VERDICT),
        capability(tool, "neighbour", SOIL, VERDICT, tier=5),
    ):
        await register(service, made)


async def register(service: RunningService, made: dict[str, Any]) -> None:
    response = await service.client.post("/v1/capabilities", json=made)
    assert response.status_code in (200, 201), response.text
