"""OpenAPI of what FastAPI does not see: bodies that routes read themselves, events and problems.

Routes refer to these by name, `install_openapi` puts them among the components.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from app.api.errors import Problem
from app.api.run_schemas import ResumeBody
from app.domain.envelope import Envelope
from app.domain.events import EventType, Level

REFERENCE = "#/components/schemas/"


class Event(BaseModel):
    """One event of a run: a line of its journal, and the data of an SSE frame."""

    seq: int = Field(ge=1, description="1, 2, 3 … without gaps; the id of the SSE frame.")
    run_id: str
    ts: str = Field(description="RFC 3339, UTC.")
    level: Level
    type: EventType
    node_id: str | None = None
    attempt: int | None = None
    plan_version: int | None = None
    trace_id: str
    data: dict[str, Any]


NAMED: tuple[type[BaseModel], ...] = (Envelope, Event, Problem, ResumeBody)


def install_openapi(app: FastAPI) -> None:
    """Let the app's OpenAPI also hold the models of `NAMED` and their parts."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            _add(schema.setdefault("components", {}).setdefault("schemas", {}))
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add(components: dict[str, Any]) -> None:
    """Parts that read otherwise than they are written get "-Input", as FastAPI names them."""
    _, generated = models_json_schema(
        [(model, "validation") for model in NAMED], ref_template=REFERENCE + "{model}"
    )
    definitions: dict[str, Any] = generated["$defs"]
    whole = {model.__name__ for model in NAMED}
    renamed = {
        REFERENCE + name: f"{REFERENCE}{name}-Input"
        for name, definition in definitions.items()
        if name not in whole and components.get(name, definition) != definition
    }
    for name, definition in definitions.items():
        reference = REFERENCE + name
        final = renamed.get(reference, reference).removeprefix(REFERENCE)
        components[final] = _with_references(definition, renamed)


def _with_references(node: Any, renamed: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _with_references(item, renamed) for key, item in node.items()}
    if isinstance(node, list):
        return [_with_references(item, renamed) for item in node]
    return renamed.get(node, node) if isinstance(node, str) else node
