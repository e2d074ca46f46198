"""Tools as they are registered: which ones a capability may have, and what a model is told."""

from __future__ import annotations

from typing import Any

import pytest

from app.adapters.capabilities.llm import LlmAdapter
from app.domain.capability import Capability, Effect, Registration
from app.domain.chat import ANSWER_TOOL
from app.domain.facet import Facet
from app.domain.system_prompt import system_prompt_of
from app.domain.tools import is_stronger, named_tools, tool_as_told, tool_faults, tools_of
from tests.capability_samples import compiled

PLOT = Facet.model_validate(
    {
        "name": "plot",
        "title": "Plot",
        "schema": {"type": "integer"},
        "semantics": {"instruction": "Its number in the land register."},
    }
)


def capability_of(capability_id: str = "soil.advise", **changes: Any) -> Capability:
    body = {
        "capability_id": capability_id,
        "version": "1.0.0",
        "display_name": "Adviser",
        "summary": "Says what grows where.",
        "kind": "llm",
        "effect": "idempotent",
        "input_contract": {"schema": {"type": "object"}},
        "output_contract": {"schema": {"type": "object"}},
        **changes,
    }
    return compiled(Registration.model_validate(body), [PLOT])


REGISTERED = {
    (tool.capability_id, version): tool
    for tool in (
        capability_of("units.convert", kind="builtin", effect="pure"),
        capability_of("soil.lookup", kind="http"),
        capability_of("sms.send", kind="http", effect="at_most_once"),
        capability_of("soil.judge"),
        capability_of("soil.board", config={"tools": ["units.convert"]}),
    )
    for version in (None, "1.0.0")
}


def faults_of(*tools: Any, **changes: Any) -> list[tuple[str, str]]:
    capability = capability_of(config={"tools": list(tools)}, **changes)
    assert LlmAdapter().check(capability) == []
    found = tool_faults(capability, lambda *ref: REGISTERED.get(ref))
    assert {fault.capability_id for fault in found} <= {"soil.advise"}
    return [(fault.code, fault.pointer) for fault in found]


def test_tools_are_named_by_id_or_by_id_and_version() -> None:
    pinned = {"capability_id": "units.convert", "version": "1.0.0"}
    assert faults_of("soil.lookup", "soil.judge", pinned) == []
    assert faults_of("soil.lookup", {**pinned, "version": "2.0.0"}) == [
        ("TOOL_NOT_FOUND", "/config/tools/1")
    ]


def test_each_broken_rule_is_told_where_it_is() -> None:
    assert faults_of("no.such", "soil.advise", "units.convert", "soil.board") == [
        ("TOOL_NOT_FOUND", "/config/tools/0"),
        ("TOOL_IS_ITSELF", "/config/tools/1"),
        ("TOOL_HAS_TOOLS", "/config/tools/3"),
    ]


@pytest.mark.parametrize(
    ("effect", "too_strong"),
    [
        ("pure", ["/config/tools/1", "/config/tools/2"]),
        ("idempotent", ["/config/tools/2"]),
        ("at_most_once", []),
    ],
)
def test_a_tool_is_not_stronger_than_what_repeats_it(effect: str, too_strong: list[str]) -> None:
    found = faults_of("units.convert", "soil.lookup", "sms.send", effect=effect)
    assert found == [("TOOL_EFFECT_TOO_STRONG", pointer) for pointer in too_strong]


def test_effects_are_ordered() -> None:
    assert is_stronger(Effect.AT_MOST_ONCE, Effect.IDEMPOTENT)
    assert is_stronger(Effect.IDEMPOTENT, Effect.PURE)
    assert not is_stronger(Effect.PURE, Effect.PURE)


def test_only_kind_llm_has_tools() -> None:
    assert tools_of(capability_of(kind="http", config={"tools": 7}).registration) == []
    assert tools_of(capability_of().registration) == []


@pytest.mark.parametrize(
    ("config", "pointers"),
    [
        ({"tools": ["a.b", "a.b"]}, ["/config/tools"]),
        ({"tools": ["a.b", {"capability_id": "a.b", "version": "2"}]}, ["/config/tools"]),
        ({"tools": [f"t{n}" for n in range(33)]}, ["/config/tools"]),
        ({"tools": ["A B"]}, ["/config/tools/0/capability_id"]),
        ({"tools": [{"capability_id": "a", "secret": 1}]}, ["/config/tools/0/secret"]),
        ({"tool_rounds_max": 0}, ["/config/tool_rounds_max"]),
    ],
)
def test_faults_of_the_config_are_named(config: dict[str, Any], pointers: list[str]) -> None:
    faults = LlmAdapter().check(capability_of(config=config))
    assert [(fault.code, fault.pointer) for fault in faults] == [
        ("CONFIG_INVALID", pointer) for pointer in pointers
    ]


def test_names_for_a_model_are_unique_and_within_what_providers_allow() -> None:
    long = "far." + "x" * 100
    ids = ["units.convert", "units_convert", "units-convert", long, f"{long}y", ANSWER_TOOL]
    tools = named_tools(capability_of(capability_id) for capability_id in ids)
    assert [tool.capability_id for tool in tools.values()] == ids
    first, second, third, *rest = tools
    assert (first, third) == ("units_convert", "units-convert")
    assert second.startswith("units_convert_")
    assert all(len(name) <= 64 and name.replace("-", "_").isidentifier() for name in tools)
    assert ANSWER_TOOL not in tools
    assert list(named_tools(capability_of(capability_id) for capability_id in ids)) == [
        *(first, second, third),
        *rest,
    ]


def test_a_model_is_told_what_a_tool_does_and_what_its_inputs_mean() -> None:
    tool = tool_as_told("lookup", capability_of(input_contract={"facets": ["plot"]}))
    assert tool.description == (
        "Adviser: Says what grows where.\n- plot (Plot): Its number in the land register."
    )
    assert tool.parameters["properties"] == {"plot": {"type": "integer"}}
    anything = capability_of(input_contract={"instructions": "Whatever you like."})
    assert tool_as_told("any", anything).parameters == {"type": "object"}


def test_the_system_prompt_speaks_of_tools_only_where_there_are_some() -> None:
    told = "Call your tools for what you can not know yourself, then answer."
    with_tools = system_prompt_of(capability_of(config={"tools": ["units.convert"]}))
    assert with_tools.split("\n\n")[1] == told
    assert told not in system_prompt_of(capability_of(config={"tools": []}))
