"""JSON Schemas without references, for the places of OpenAPI in which FastAPI resolves none."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a model that does not contain itself."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    inlined: dict[str, Any] = _inline(schema, definitions)
    return inlined


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    reference = node.get("$ref")
    if isinstance(reference, str):
        beside = {key: item for key, item in node.items() if key != "$ref"}
        return _inline({**definitions[reference.removeprefix("#/$defs/")], **beside}, definitions)
    # A discriminator maps to references; the members' constants say the same.
    return {key: _inline(item, definitions) for key, item in node.items() if key != "discriminator"}
