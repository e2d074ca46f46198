"""Registrations made of the tools that an MCP server lists, for the operator to look at.

What a server says about itself gives contracts, texts and the pin. What repeating a call does is
not among it: annotations are hints of a stranger, so `effect` is the operator's word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from app.adapters.capabilities.mcp_protocol import Tool
from app.adapters.capabilities.text_lines import word_set
from app.domain.capability import CapabilityKind, Effect, Registration
from app.domain.contract import JsonSchemaContract
from app.domain.schema_shape import Schema, children, fragment, relocate

VERSION_CHARS = 12
_ID_CHARS_MAX = 120
_SUMMARY_CHARS_MAX = 2_000
_TITLE_CHARS_MAX = 200
_FORBIDDEN = re.compile(r"[^a-z0-9_.\-]+")
# Most servers in TypeScript name one of these, and few say anything that has changed since.
_OLD_DIALECT = re.compile(r"https?://json-schema\.org/draft-0[67]/schema#?")
_ANNOTATIONS = word_set("$comment title description default examples readOnly writeOnly")
_TEXT_OUTPUT = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}


def registrations(
    tools: Iterable[Tool], config: dict[str, Any], *, effect: Effect, prefix: str
) -> list[Registration]:
    """A registration for each tool, in the order given; `config` says how the server is reached.

    Ids are `<prefix>.<tool>` in what letters an id may have. The version is the beginning of the
    pin, so that a tool that changed becomes another version beside the old one.
    """
    return [
        Registration(
            capability_id=capability_id(prefix, tool.name),
            version=tool.pin[:VERSION_CHARS],
            display_name=(tool.title.strip() or tool.name)[:_TITLE_CHARS_MAX],
            summary=(tool.description.strip() or tool.name)[:_SUMMARY_CHARS_MAX],
            kind=CapabilityKind.MCP,
            effect=effect,
            input_contract=JsonSchemaContract(json_schema=_modernised(tool.input_schema)),
            output_contract=JsonSchemaContract(json_schema=_output_schema(tool)),
            config={**config, "tool": tool.name, "description_sha256": tool.pin},
        )
        for tool in tools
    ]


def capability_id(prefix: str, tool: str) -> str:
    """An id that says where a tool is from."""
    return _FORBIDDEN.sub("_", f"{prefix}.{tool}".lower()).lstrip("_.-")[:_ID_CHARS_MAX]


def _output_schema(tool: Tool) -> dict[str, Any]:
    """The schema of what `McpAdapter` makes of the tool's result."""
    if tool.output_schema is None:
        return _TEXT_OUTPUT
    schema = _modernised(tool.output_schema)
    if not tool.is_wrapped:
        return schema
    inner = relocate(schema, fragment("properties", "result"))
    return {"type": "object", "properties": {"result": inner}, "required": ["result"]}


def _modernised(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as one of 2020-12 where that means the same, else as it is: the registry refuses
    other dialects and says so."""
    named = schema.get("$schema")
    if not isinstance(named, str) or not _OLD_DIALECT.fullmatch(named) or _has_changed(schema):
        return schema
    return {keyword: value for keyword, value in schema.items() if keyword != "$schema"}


def _has_changed(schema: Schema) -> bool:
    """Whether a schema of draft 6 or 7 uses what means something else in 2020-12."""
    if not isinstance(schema, dict):
        return False
    beside_ref = schema.keys() - _ANNOTATIONS - {"$ref", "$schema", "definitions", "$defs"}
    return (
        "dependencies" in schema
        or isinstance(schema.get("items"), list)
        or ("$ref" in schema and bool(beside_ref))
        or any(_has_changed(below) for _, below in children(schema))
    )
