"""Envelopes from what a person types: a file, or inputs and outputs by the names of their facets.

document=@README.md   a file, shaped as the facet's schema wants it
query=items[0]        a text, likewise
json_value:={"a": 1}  JSON as it stands; json_value:=@a.json from a file
"""

from __future__ import annotations

import json
import mimetypes
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import Api, path_of
from app.cli.errors import ApiProblem, UsageError

_ASSIGNMENT = re.compile(r"([^:=]+)(:?=)(.*)", re.DOTALL)
_HEADING = re.compile(r"^#[ \t]+(.+?)[ \t]*#*[ \t]*$", re.MULTILINE)
_MARKDOWN = frozenset({".md", ".markdown", ".mdown"})
TITLE_CHARS_MAX = 500

EnvelopeFile = Annotated[
    str | None,
    typer.Argument(help="Envelope as a JSON file; - is standard input.", show_default=False),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", "-i", metavar="NAME=VALUE", help="name=text, name=@file, name:=json; repeatable."
    ),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option("--output", "-o", metavar="FACET", help="Facet to produce; repeatable."),
]
Objective = Annotated[str | None, typer.Option(help="What the run is for, in words.")]


def make_envelope(
    api: Api,
    file: str | None,
    inputs: list[str] | None,
    outputs: list[str] | None,
    objective: str | None,
) -> dict[str, Any]:
    """The envelope of a file, with the options laid over it; or of the options alone."""
    envelope: dict[str, Any] = {} if file is None else _envelope_file(file)
    if inputs:
        given = {**(envelope.get("inputs") or {})}
        given.update(_input(api, text) for text in inputs)
        envelope["inputs"] = given
    if outputs:
        envelope["output_contract"] = {"mode": "facets", "facets": outputs}
    if file is None and not outputs:
        raise UsageError(
            "There is nothing to produce.",
            hint="Give an envelope file, or name facets: "
            "flexrun run --input document=@README.md --output brief",
        )
    if objective is not None:
        envelope["objective"] = objective
    elif file is None:
        envelope["objective"] = _objective(envelope)
    return envelope


def _objective(envelope: dict[str, Any]) -> str:
    made = ", ".join(envelope["output_contract"]["facets"])
    given = ", ".join(envelope.get("inputs") or {})
    return f"Make {made} from {given}." if given else f"Make {made}."


def _envelope_file(file: str) -> dict[str, Any]:
    found = parse_json(read_text(file), file)
    if not isinstance(found, dict):
        raise UsageError(f"{file} holds no envelope: a JSON object is needed.")
    return found


def read_text(file: str) -> str:
    """The text of a file, or of standard input for `-`."""
    try:
        if file == "-":
            return sys.stdin.buffer.read().decode()
        return Path(file).expanduser().read_bytes().decode()
    except OSError as error:
        raise UsageError(f"{file} can not be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no UTF-8 text (byte {error.start}).") from None


def parse_json(text: str, name: str) -> Any:
    """JSON, or an error that says where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{name} is no JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise UsageError(f"{name} is nested too deeply.") from None


def assignment(text: str) -> tuple[str, bool, str]:
    """`name=value` or `name:=value` as `(name, whether it is JSON, value)`."""
    match = _ASSIGNMENT.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not of the form name=text, name=@file or name:=json.")
    return match[1].strip(), match[2] == ":=", match[3]


def json_or_file(name: str, value: str) -> Any:
    """The JSON that is typed, or that is in the file behind an `@`."""
    if value.startswith("@"):
        return parse_json(read_text(value[1:]), value[1:])
    return parse_json(value, name)


def _input(api: Api, text: str) -> tuple[str, Any]:
    name, is_json, value = assignment(text)
    if is_json:
        return name, json_or_file(name, value)
    schema = _schema_of(api, name)
    if value.startswith("@"):
        return name, _shaped(name, schema, read_text(value[1:]), value[1:])
    return name, _shaped(name, schema, value, None)


def _schema_of(api: Api, facet: str) -> dict[str, Any] | None:
    """The JSON Schema of a facet; None when the catalog has none of this name."""
    try:
        found: dict[str, Any] = api.get(path_of("facets", facet))["schema"]
    except ApiProblem as problem:
        if problem.status == 404:
            return None
        raise
    return found


def _shaped(name: str, schema: dict[str, Any] | None, text: str, file: str | None) -> Any:
    """A text as the facet wants it: itself, an object that holds it, or the JSON that it is."""
    if schema is None:
        is_json = file is not None and Path(file).suffix == ".json"
        return parse_json(text, file or name) if is_json else text
    if schema.get("type") == "string":
        return text if file is None else text.strip("\n")
    properties = schema.get("properties") or {}
    if schema.get("type") == "object" and _is_text(properties.get("text")):
        about = {} if file is None else _about(text, file)
        known = {key: value for key, value in about.items() if key in properties}
        return {**known, "text": text}
    return parse_json(text, file or name)


def _is_text(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "string"


def _about(text: str, file: str) -> dict[str, str]:
    """What is known of a document besides its text."""
    if file == "-":
        return {"title": _title(text) or "standard input"}
    path = Path(file)
    suffix = path.suffix.lower()
    media_type = "text/markdown" if suffix in _MARKDOWN else mimetypes.guess_type(path.name)[0]
    heading = _title(text) if media_type == "text/markdown" else None
    found = {"title": heading or path.stem, "source": str(file)}
    if media_type is not None:
        found["media_type"] = media_type
    return found


def _title(text: str) -> str | None:
    match = _HEADING.search(text)
    return match[1][:TITLE_CHARS_MAX] if match else None
