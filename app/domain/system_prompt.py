"""The system prompt of a capability that a model runs: what it is for, what it gets and gives.

An owner may write the prompt; it has to name every input and output, because a model makes up what
it was not told of. Without one, the prompt is made from the contracts, anew whenever they change.
The schema of the output always stands at its end, so that no owner can forget it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from app.domain.capability import Capability
from app.domain.contract import FreeformContract, Property
from app.domain.errors import Fault

SCHEMA_CHARS_MAX = 16_000


def system_prompt_of(capability: Capability) -> str:
    """The whole text: the owner's or a made one, and how the answer has to look."""
    registration = capability.registration
    parts = [registration.system_prompt or _made(capability), _ending(capability)]
    if registration.config.get("tools"):
        parts.insert(1, "Call your tools for what you can not know yourself, then answer.")
    return "\n\n".join(parts)


def prompt_faults(capability: Capability) -> list[Fault]:
    """What the owner's prompt leaves out: every input and output by the name of its key."""
    prompt = capability.registration.system_prompt
    if prompt is None:
        return []
    return [
        Fault(
            "SYSTEM_PROMPT_INCOMPLETE",
            f"The prompt does not name the {side} {key!r}.",
            "/system_prompt",
            facet=found.facet,
            capability_id=capability.capability_id,
        )
        for side, properties in (
            ("input", capability.input.properties),
            ("output", capability.output.properties),
        )
        for key, found in properties.items()
        if not re.search(rf"(?<![\w.\-]){re.escape(key)}(?![\w\-])", prompt)
    ]


def _made(capability: Capability) -> str:
    registration = capability.registration
    parts = [f"You are {registration.display_name}. {registration.summary}"]
    for heading, properties in (
        ("You get", capability.input.properties),
        ("You make", capability.output.properties),
    ):
        if properties:
            parts.append("\n".join([f"{heading}:", *map(line_of, properties.values())]))
    return "\n\n".join(parts)


def line_of(found: Property) -> str:
    """What a model is told of one input or output."""
    title = f" ({found.title})" if found.title else ""
    needed = "" if found.required else ", may be missing"
    told = f": {found.instruction}" if found.instruction else ""
    return f"- {found.key}{title}{needed}{told}"


def _ending(capability: Capability) -> str:
    spec = capability.registration.output_contract
    if isinstance(spec, FreeformContract):
        return f"Answer with the text alone. What it has to be: {spec.instructions}"
    return (
        "Finalise to this JSON Schema; answer with one JSON object and nothing else:\n"
        f"{_schema_text(capability.output.schema)}"
    )


def _schema_text(schema: Mapping[str, Any]) -> str:
    """The schema in canonical JSON; of a very long one only what its top level says."""
    text = _canonical(schema)
    if len(text) <= SCHEMA_CHARS_MAX:
        return text
    short = {
        key: {word: found[word] for word in ("type", "title", "enum") if word in found}
        for key, found in schema.get("properties", {}).items()
        if isinstance(found, dict)
    }
    top = {"type": "object", "properties": short, "required": schema.get("required", [])}
    return _canonical(top)[:SCHEMA_CHARS_MAX]


def _canonical(schema: Mapping[str, Any]) -> str:
    return orjson.dumps(schema, option=orjson.OPT_SORT_KEYS).decode()
