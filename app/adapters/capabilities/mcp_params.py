"""Tool parameters that are repeated in HTTP headers, and how header values are written.

A server marks a parameter with `x-mcp-header: Name` in its input schema; a client repeats the
argument as `Mcp-Param-Name`, so that proxies can route without reading bodies. Source: MCP
2026-07-28, "Streamable HTTP: Custom Headers from Tool Parameters". Pure.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

Mirrors = Mapping[str, tuple[str, ...]]
"""Header name to the keys that lead to the argument."""

_KEYWORD = "x-mcp-header"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
_PLAIN = re.compile(r"[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?|")
_ENCODED = re.compile(r"=\?base64\?.*\?=")
_TYPES = ("string", "integer", "boolean")
_INT_MAX = 2**53 - 1
# Keywords whose values are data and no schemas: an annotation in them is none.
_DATA = frozenset({"const", "default", "enum", "example", "examples"})


class MirrorInvalid(ValueError):
    """An annotation breaks the rules, and with it the definition of the tool."""


def mirrors_of(input_schema: dict[str, Any]) -> Mirrors:
    """Where the arguments to repeat are; raises `MirrorInvalid`."""
    found: dict[str, tuple[str, ...]] = {}
    for name, schema, path in _annotated(input_schema, ()):
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise MirrorInvalid("a header annotation is no header name")
        if path is None:
            raise MirrorInvalid("a header annotation stands where no argument is sure to be")
        if schema.get("type") not in _TYPES:
            raise MirrorInvalid("a header annotation stands at no string, integer or boolean")
        header = f"Mcp-Param-{name}".lower()
        if header in found:
            raise MirrorInvalid("two parameters want the same header")
        found[header] = path
    return found


def _annotated(
    schema: Any, path: tuple[str, ...] | None
) -> Iterator[tuple[Any, dict[str, Any], tuple[str, ...] | None]]:
    """Every annotation with its schema and path; None once a keyword but `properties` was passed.

    Schemas come through the JSON gate, so the recursion is at most 64 deep.
    """
    if isinstance(schema, list):
        for part in schema:
            yield from _annotated(part, None)
    if not isinstance(schema, dict):
        return
    if _KEYWORD in schema:
        yield schema[_KEYWORD], schema, path
    for keyword, below in schema.items():
        if keyword in _DATA:
            continue
        if keyword == "properties" and isinstance(below, dict):
            for key, part in below.items():
                yield from _annotated(part, None if path is None else (*path, key))
        elif isinstance(below, dict | list):
            yield from _annotated(below, None)


def mirrored(mirrors: Mirrors, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The headers of a call; an argument that is not there, or null, has none.

    An argument of another type than its schema says is left out: the server refuses it anyway.
    """
    found = {header: _text_of(_at(arguments, path)) for header, path in mirrors.items()}
    return {header: header_value(text) for header, text in found.items() if text is not None}


def header_value(text: str) -> str:
    """A text as the value of a header: as it is when it is plain ASCII, else in base64."""
    if _PLAIN.fullmatch(text) and not _ENCODED.fullmatch(text):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode('ascii')}?="


def _at(arguments: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(arguments, Mapping) or key not in arguments:
            return None
        arguments = arguments[key]
    return arguments


def _text_of(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON Schema counts 42.0 among the integers
    if isinstance(value, int):
        return str(value) if abs(value) <= _INT_MAX else None
    return value if isinstance(value, str) else None
