"""OpenAPI beyond what FastAPI derives: shapes that routes read by hand, and the event union."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.api.bodies import describe_bodies
from app.api.run_schemas import DeltaFrame, ResumeBody, RunResource
from app.domain.envelope import Envelope

REFERENCE = "#/components/schemas/{model}"


def install_openapi(app: FastAPI) -> None:
    """Let `/openapi.json` have every shape that a route names, and `Event` with its union."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            describe_bodies()
            document = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                routes=app.routes,
                separate_input_output_schemas=app.separate_input_output_schemas,
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (Envelope, ResumeBody, RunResource, DeltaFrame):
                _add(schemas, model)
            schemas["Event"] = _event_union(schemas)
            _drop_default_problems(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _drop_default_problems(document: dict[str, Any]) -> None:
    """FastAPI documents a 422 of its own wherever there is a parameter; ours are problems."""
    for operations in document["paths"].values():
        for operation in operations.values():
            content = operation["responses"].get("422", {}).get("content", {})
            if "application/json" in content:
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _add(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template=REFERENCE, by_alias=True)
    for name, definition in schema.pop("$defs", {}).items():
        schemas.setdefault(name, definition)
    schemas.setdefault(model.__name__, schema)


def _event_union(schemas: dict[str, Any]) -> dict[str, Any]:
    # A model for each type of event, which only this document needs.
    from app.domain.event_shapes import event_models  # noqa: PLC0415

    mapping: dict[str, str] = {}
    for event_type, model in event_models().items():
        schema = model.model_json_schema(ref_template=REFERENCE)
        for name, definition in schema.pop("$defs", {}).items():
            schemas.setdefault(name, definition)
        schemas[f"{model.__name__}Event"] = schema
        mapping[event_type] = REFERENCE.format(model=f"{model.__name__}Event")
    return {
        "description": "One event of a run: the `data:` of its SSE frame.",
        "oneOf": [{"$ref": reference} for reference in mapping.values()],
        "discriminator": {"propertyName": "type", "mapping": mapping},
    }
