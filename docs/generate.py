"""Writes the generated pages from the code: `python -m docs.generate`, in the root.

EVENTS.md is made of the shapes of events, API.md of the OpenAPI document of the app, RECORDS.md of
the shapes of records (`docs/records.py`), SETTINGS.md of the model of the settings.
`tests/unit/test_docs.py` fails when a page is not what this would write.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from app.api.errors import MEDIA_TYPE as PROBLEM_TYPE
from app.api.errors import FaultShape, Problem
from app.api.stream import HEARTBEAT_S
from app.domain.event_shapes import EVENT_DATA, EventShape
from app.domain.events import TERMINAL_EVENTS, Level
from app.journal.deltas import JOIN_S
from app.main import create_app
from app.settings import Settings
from docs.markdown import Schema, default_of, fields, first_line, page, table, type_of
from docs.problem_codes import fault_codes, problem_codes
from docs.records import records_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
METHODS = ("get", "post", "put", "patch", "delete")
SHAPES_LEFT_OUT = re.compile(
    r"Event$|Data$|^(HTTPValidationError|ValidationError|ValueRef|Problem|FaultShape)$"
)
"""Events have a page of their own, problems a section; FastAPI's error shape is never answered."""


@functools.cache
def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {
        "EVENTS.md": events_page(),
        "API.md": api_page(),
        "RECORDS.md": records_page(
            {name: variable_of(name, field) for name, field in Settings.model_fields.items()}
        ),
        "SETTINGS.md": settings_page(),
    }


# --- EVENTS.md ------------------------------------------------------------------------------------


def events_page() -> str:
    """Every event type with its data, the common fields, levels and control frames."""
    common = _enums_inlined(EventShape.model_json_schema())
    parts = [
        "The journal of a run is a list of events. This is what they hold.",
        "An event is the same everywhere: in the `events` table, in a JSON page of "
        "`GET /v1/runs/{id}/events`, and behind `data:` of its SSE frame, byte for byte. A "
        "released event keeps its name and never loses a field; new fields and types may come.",
        "## Common fields",
        fields(common)
        + "\n| `type` | one of the types below | yes | |\n| `data` | object | yes | by type |",
        "Fields that do not apply are left out, they are never null.",
        "## Levels",
        table(("level", "means"), [(f"`{level}`", _LEVELS[level]) for level in Level]),
        "## Frames of a stream",
        "```\nid: 5\nevent: NODE_DONE\n"
        'data: {"seq":5,"run_id":"…","ts":"…","level":"INFO","type":"NODE_DONE","node_id":"A",…}\n'
        "```",
        "The stream of a run ends after its last event. Besides events it has control frames, "
        "which never carry an `id`, so that a client that reconnects always names a `seq`:",
        table(("frame", "when"), _CONTROL_FRAMES),
        *_DELTAS,
        "## Types",
        table(
            ("type", "occurs when"),
            [
                (f"[`{event_type}`](#{event_type.lower()})", first_line(data.__doc__))
                for event_type, data in EVENT_DATA.items()
            ],
        ),
        "Exactly one of "
        + ", ".join(f"`{event_type}`" for event_type in EVENT_DATA if event_type in TERMINAL_EVENTS)
        + " ends a run, and it is the last event. It passes every filter.",
    ]
    nested: dict[str, Any] = {}
    for event_type, data in EVENT_DATA.items():
        parts += list(_event_section(event_type, data, nested))
    parts.append("## Shapes inside of data")
    parts += [part for name in sorted(nested) for part in _shape_section(name, nested[name])]
    return page("Events", "app/domain/event_shapes.py", parts)


_LEVELS = {
    Level.INFO: "the expected course",
    Level.WARN: "something went wrong and is dealt with, or waits for somebody",
    Level.ERROR: "a node or the run gave up",
}
_CONTROL_FRAMES = (
    ("`retry: 2000`", "first: reconnect after 2 s when the line breaks"),
    ("`: heartbeat`", f"a comment after {HEARTBEAT_S:.0f} s of silence"),
    ('`event: gap`, `data: {"from": …, "to": …}`', "these events were dropped by retention"),
    (
        '`event: delta`, `data: {"run_id", "node_id", "attempt", "call", "piece", "text"}`',
        "a piece of what a call says while it is under way, see below",
    ),
    ("`: draining`", "the process is leaving; the stream ends, reconnect"),
    ("`: the journal is out of reach, please wait`", "Postgres does not answer; it goes on"),
)

_DELTAS = (
    "### Text while it is said",
    "A stream shows what the calls of nodes say while they are under way: the answer of a model as "
    "it comes, which is JSON where JSON was asked for, and what a capability says of itself. The "
    "fields of a delta are those of [DeltaFrame](API.md#deltaframe). What is said within "
    f"{JOIN_S * 1000:.0f} ms is one piece.",
    "- Deltas are stored nowhere, and a JSON page has none. The text as a whole is in the result: "
    "the `output` of NODE_DONE.\n"
    "- `call` is that of LLM_REQUEST. Each try, and each repair of an answer, is another call and "
    "another text: begin anew, and drop what a call that failed has said.\n"
    "- All deltas of a call come before its LLM_RESPONSE, all of an attempt before its NODE_DONE.\n"
    "- Pieces are numbered from 1. One that is missing was dropped: the client is slow, or came in "
    "the middle. After a reconnect pieces can come again: pass over what was seen.\n"
    "- A filter by `node` keeps those of its nodes. With a filter by `type` there are deltas only "
    "if it names `delta`; for a filter by `level` they are INFO.\n"
    "- A model streams only if a stream that takes deltas follows the run when its call begins. "
    "Who comes later sees this call's text only if it is streamed already. Answers from the cache, "
    "and planning, say nothing.\n"
    "- Where another process drives the run, deltas reach the stream only with `REDIS_URL`, and "
    "only as long as Redis is well. No run waits for them, or fails by them.",
)


def _event_section(event_type: str, data: type[BaseModel], nested: dict[str, Any]) -> Iterator[str]:
    """One type; the shapes that its data refers to are noted in `nested`."""
    schema = _enums_inlined(data.model_json_schema())
    yield f"### {event_type}"
    yield " ".join((data.__doc__ or "").split())
    nested.update(schema.get("$defs", {}))
    if schema.get("properties"):
        yield fields(schema, link=True)
    elif schema.get("additionalProperties"):
        yield "`data` is free."
    else:
        yield "`data` is empty."


def _enums_inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """References to enumerations replaced by their values: nobody should have to look them up."""
    enums = {f"#/$defs/{n}": d for n, d in schema.get("$defs", {}).items() if "enum" in d}

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(item) for item in part]
        if not isinstance(part, dict):
            return part
        reference = part.get("$ref")
        if reference in enums:
            return {"enum": enums[reference]["enum"], "description": part.get("description", "")}
        return {key: inline(item) for key, item in part.items()}

    inlined: dict[str, Any] = inline(schema)
    inlined["$defs"] = {n: d for n, d in inlined.get("$defs", {}).items() if "properties" in d}
    return inlined


# --- API.md ---------------------------------------------------------------------------------------


def api_page() -> str:
    """Routes, shapes and problem codes."""
    document = create_app(Settings.model_construct(), "").openapi()
    routes = list(_routes(document))
    parts = [
        "JSON in and out, snake_case; unknown fields are refused. Times are RFC 3339 in UTC, ids "
        "are UUIDv7, money is a decimal string. Lists are paged by `cursor` and `next_cursor`. "
        "The same as OpenAPI: `GET /openapi.json`.",
        "## Routes",
        table(
            ("route", "does"),
            [
                (f"[`{verb} {path}`](#{_anchor(f'{verb} {path}')})", route.get("summary", ""))
                for verb, path, route in routes
            ],
        ),
    ]
    for verb, path, route in routes:
        parts += list(_route_section(verb, path, route))
    parts += list(_problem_sections())
    parts += ["## Shapes", *_shape_sections(document["components"]["schemas"])]
    return page("HTTP API", "the OpenAPI document of the app", parts)


def _routes(document: Schema) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                yield method.upper(), path, methods[method]


def _anchor(heading: str) -> str:
    """How GitHub makes an anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _route_section(verb: str, path: str, route: Schema) -> Iterator[str]:
    yield f"### {verb} {path}"
    yield " ".join(filter(None, (f"{route.get('summary', '')}.", route.get("description", ""))))
    parameters = [*route.get("parameters", ())]
    if parameters:
        yield table(
            ("parameter", "in", "type", "meaning"),
            [
                (
                    f"`{found['name']}`",
                    found["in"] + (", required" if found.get("required") else ""),
                    type_of(found.get("schema", {}), link=True),
                    " ".join(
                        filter(
                            None,
                            (found.get("description", ""), default_of(found.get("schema", {}))),
                        )
                    ),
                )
                for found in parameters
            ],
        )
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    if body:
        yield f"Body: {_body_type(body['schema'])}"
    yield table(
        ("status", "meaning", "content"),
        [
            (status, found.get("description", ""), _content_of(found.get("content", {})))
            for status, found in sorted(route["responses"].items())
            if not _is_fastapis_own(found)
        ],
    )


def _body_type(schema: Schema) -> str:
    if "$ref" in schema:
        return type_of(schema, link=True)
    return f"\n\n{fields(schema)}" if schema.get("properties") else type_of(schema)


def _is_fastapis_own(response: Schema) -> bool:
    """FastAPI documents a 422 of its own shape, which this app never answers."""
    return "HTTPValidationError" in json.dumps(response.get("content", {}))


def _content_of(content: Schema) -> str:
    found = [
        "a [problem](#problems)"
        if media == PROBLEM_TYPE
        else f"`{media}`: {type_of(given.get('schema', {}), link=True)}"
        for media, given in content.items()
    ]
    return "; ".join(found)


def _shape_sections(schemas: Schema) -> Iterator[str]:
    for name in sorted(schemas):
        if not SHAPES_LEFT_OUT.search(name):
            yield from _shape_section(name, schemas[name])


def _shape_section(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}"
    if description := schema.get("description"):
        yield " ".join(description.split())
    yield fields(schema, link=True) if schema.get("properties") else type_of(schema, link=True)


# --- problems -------------------------------------------------------------------------------------


def _problem_sections() -> Iterator[str]:
    yield "## Problems"
    yield "Errors are `application/problem+json` (RFC 9457). A 503 has a Retry-After."
    yield fields(Problem.model_json_schema())
    yield "Each of `errors` is one broken rule:"
    yield fields(FaultShape.model_json_schema())
    yield table(("status", "code", "says, for example"), problem_codes())
    yield (
        "Codes in `errors[]`, and in the events PLAN_REJECTED and VALIDATION_ERROR, of plans, "
        "contracts, decisions and JSON:"
    )
    yield ", ".join(f"`{code}`" for code in fault_codes())
    yield (
        "A code of the facet compiler is prefixed by `FACET_CONTRACT_` when the output contract "
        "of an envelope is refused. Codes in lower case are those of the validation of fields, "
        "such as `missing`, and of registrations."
    )


# --- SETTINGS.md ----------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting with its variable, type, default and meaning."""
    schema = Settings.model_json_schema(by_alias=False)
    rows = [
        (
            f"`{variable_of(name, field)}`",
            type_of(schema["properties"][name]),
            _default_of_setting(field),
            field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]
    parts = [
        "Everything an operator can set, by the environment. Flags of the command line win over "
        "it. [.env.example](../.env.example) lists the same to copy.",
        table(("variable", "type", "default", "meaning"), rows),
        "The command line also reads `FLEXRUN_URL`: where the service is that commands speak to.",
    ]
    return page("Settings", "app/settings.py", parts)


def variable_of(name: str, field: FieldInfo) -> str:
    """The environment variable of a setting."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return f"FLEXRUN_{name.upper()}"


def _default_of_setting(field: FieldInfo) -> str:
    default = field.default
    if default is None or default is PydanticUndefined or default == ():
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
