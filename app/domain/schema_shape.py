"""The shape of a JSON Schema document: where its sub-schemas are, what its `$ref`s name, what it
costs to run. Nothing here knows the engine that runs schemas; see `json_schema` for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from app.domain.errors import ContractError, Fault
from app.kit.json_pointer import PointerMissing, escape, resolve

Schema = dict[str, Any] | bool

SCHEMA_KEYWORDS = frozenset(
    {
        "additionalProperties",
        "contains",
        "contentSchema",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
SCHEMA_LIST_KEYWORDS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SCHEMA_MAP_KEYWORDS = frozenset(
    {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
)
# These change what a reference means from inside the document; a contract has no use for them.
REFUSED_KEYWORDS = frozenset(
    {"$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef"}
)
DIALECT = "https://json-schema.org/draft/2020-12/schema"

SUBSCHEMAS_MAX = 10_000
ENUM_MAX = 5_000
PATTERN_CHARS_MAX = 1_000
PATTERNS_MAX = 64
# A schema whose references fan out (a to b twice, b to c twice …) is small to write and doubles
# its work at every step; this bounds the work as if every reference were written out.
UNFOLDED_MAX = 10_000
UNFOLDED_DEPTH_MAX = 128


@dataclass(slots=True)
class Shape:
    """`cost`: sub-schemas with every reference written out. `loops`: recursive reference sites."""

    cost: int
    loops: int
    patterns: int


def children(schema: Schema) -> Iterator[tuple[str, Any]]:
    """The direct sub-schemas of a schema with their pointers relative to it."""
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in SCHEMA_KEYWORDS:
            yield f"/{keyword}", value
        elif keyword in SCHEMA_LIST_KEYWORDS and isinstance(value, list):
            for index, item in enumerate(value):
                yield f"/{keyword}/{index}", item
        elif keyword in SCHEMA_MAP_KEYWORDS and isinstance(value, dict):
            for key, item in value.items():
                yield f"/{keyword}/{escape(key)}", item


def relocate(schema: Schema, prefix: str) -> Schema:
    """The schema as it must be written to stand at `prefix` of another document.

    `prefix` is a pointer as it stands in a URI fragment (see `fragment`). Local references get it;
    the root's `$id` and `$schema` are dropped, for they would start a document of its own.
    """
    return schema if isinstance(schema, bool) else _moved(schema, prefix)


def _moved(schema: dict[str, Any], prefix: str) -> dict[str, Any]:
    def move(sub: Any) -> Any:
        return _moved(sub, prefix) if isinstance(sub, dict) else sub

    moved = {}
    for keyword, value in schema.items():
        if keyword == "$ref" and isinstance(value, str):
            moved[keyword] = f"#{prefix}{value[1:]}"
        elif keyword not in ("$id", "$schema"):
            moved[keyword] = _with_children(keyword, value, move)
    return moved


def _with_children(keyword: str, value: Any, change: Callable[[Any], Any]) -> Any:
    if keyword in SCHEMA_KEYWORDS:
        return change(value)
    if keyword in SCHEMA_LIST_KEYWORDS and isinstance(value, list):
        return [change(item) for item in value]
    if keyword in SCHEMA_MAP_KEYWORDS and isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    return value


def fragment(*tokens: str) -> str:
    """Keys as a pointer in a URI fragment, such as "/properties/a%20b"."""
    return "".join(f"/{quote(escape(token), safe='~')}" for token in tokens)


def has_reference(schema: Schema) -> bool:
    """Whether a `$ref` stands anywhere in the schema."""
    stack = [schema]
    while stack:
        found = stack.pop()
        if isinstance(found, dict) and "$ref" in found:
            return True
        stack.extend(sub for _, sub in children(found))
    return False


def referenced(root: Schema, reference: str) -> Schema | None:
    """The schema that a local reference ("#", "#/…") names, or None."""
    try:
        found = resolve(root, unquote(reference[1:]))
    except PointerMissing:
        return None
    return found if isinstance(found, dict | bool) else None


def follow(root: Schema, schema: Schema) -> Schema:
    """The schema behind a chain of local `$ref`s; one with `properties` of its own is an end."""
    for _ in range(UNFOLDED_DEPTH_MAX):
        if isinstance(schema, bool) or "$ref" not in schema or "properties" in schema:
            break
        target = referenced(root, schema["$ref"])
        if target is None:
            break
        schema = target
    return schema


def standing_alone(schema: Schema, root: Schema) -> Schema:
    """A part of a document as a document of its own; its references go into a copy of `root`."""
    if schema is root or isinstance(schema, bool) or not has_reference(schema):
        return schema
    prefix = fragment("$defs", "root")
    # All its references lead into the copy now, so nothing needs its own definitions any more.
    return {**_moved(schema, prefix), "$defs": {"root": relocate(root, prefix)}}


def measure(root: Schema, pointer: str, slack: int = 1) -> Shape:
    """Check the limits and the references of a document; `pointer` is where it stands.

    Limits on size and cost are multiplied by `slack`. Raises `ContractError` with SCHEMA_INVALID,
    SCHEMA_REF_REFUSED or SCHEMA_TOO_LARGE. Expects a value that passed the JSON gate, so that
    nesting is bounded.
    """
    schemas: dict[str, Schema] = {}
    stack: list[tuple[str, Schema]] = [("", root)]
    patterns = 0
    while stack:
        at, schema = stack.pop()
        schemas[at] = schema
        if len(schemas) > SUBSCHEMAS_MAX * slack:
            raise _fault("SCHEMA_TOO_LARGE", f"over {SUBSCHEMAS_MAX} sub-schemas", pointer)
        if isinstance(schema, dict):
            patterns += _check_keywords(schema, at, pointer)
        stack.extend((at + step, sub) for step, sub in children(schema))
    if patterns > PATTERNS_MAX * slack:
        raise _fault("SCHEMA_TOO_LARGE", f"over {PATTERNS_MAX} patterns", pointer)
    unfolding = _Unfolding(schemas, pointer, UNFOLDED_MAX * slack)
    cost, _ = unfolding.of("", 0)
    return Shape(cost, unfolding.loops, patterns)


def _check_keywords(schema: dict[str, Any], at: str, pointer: str) -> int:
    """Check what the engine would let pass; returns how many patterns the schema has."""
    place = pointer + at
    for keyword in sorted(REFUSED_KEYWORDS & schema.keys()):
        raise _fault("SCHEMA_INVALID", f"{keyword} is not supported", f"{place}/{keyword}")
    if at and "$id" in schema:
        raise _fault("SCHEMA_INVALID", "$id may only stand at the root", f"{place}/$id")
    if schema.get("$schema", DIALECT) not in (DIALECT, DIALECT + "#"):
        raise _fault("SCHEMA_INVALID", "only JSON Schema 2020-12 is supported", f"{place}/$schema")
    enum = schema.get("enum")
    if isinstance(enum, list) and len(enum) > ENUM_MAX:
        raise _fault("SCHEMA_TOO_LARGE", f"over {ENUM_MAX} values", f"{place}/enum")
    patterns = _patterns_of(schema)
    if any(len(pattern) > PATTERN_CHARS_MAX for pattern in patterns):
        raise _fault("SCHEMA_TOO_LARGE", f"a pattern is over {PATTERN_CHARS_MAX} characters", place)
    return len(patterns)


def _patterns_of(schema: dict[str, Any]) -> list[str]:
    keyed = schema.get("patternProperties")
    found = list(keyed) if isinstance(keyed, dict) else []
    pattern = schema.get("pattern")
    return [*found, pattern] if isinstance(pattern, str) else found


@dataclass(slots=True)
class _Unfolding:
    """Counts the sub-schemas of a document with every reference written out.

    A reference back to where the walk came from is a loop. It is counted and not followed: how
    often it is run depends on the value, whose depth is bounded.
    """

    schemas: dict[str, Schema]
    pointer: str
    cost_max: int
    loops: int = 0
    known: dict[str, tuple[int, int]] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)

    def of(self, at: str, depth: int) -> tuple[int, int]:
        """Cost and height of the sub-schema at `at`; the depth is that of the walk so far."""
        if at in self.open:
            self.loops += 1
            return 1, 0
        found = self.known.get(at)
        if found is None and depth < UNFOLDED_DEPTH_MAX:
            found = self.known[at] = self._sum(at, depth)
        if found is None or found[0] > self.cost_max or depth + found[1] > UNFOLDED_DEPTH_MAX:
            raise _fault("SCHEMA_TOO_LARGE", "references fan out too far", self.pointer + at)
        return found

    def _sum(self, at: str, depth: int) -> tuple[int, int]:
        cost, height = 1, 0
        self.open.add(at)
        for target in self._next(at):
            more, below = self.of(target, depth + 1)
            cost, height = cost + more, max(height, below + 1)
        self.open.remove(at)
        return cost, height

    def _next(self, at: str) -> Iterator[str]:
        schema = self.schemas[at]
        if not isinstance(schema, dict):
            return
        for step, _ in children(schema):
            # Definitions are run only where they are referred to.
            if not step.startswith(("/$defs/", "/definitions/")):
                yield at + step
        if "$ref" in schema:
            yield self._target(schema["$ref"], f"{self.pointer}{at}/$ref")

    def _target(self, reference: Any, place: str) -> str:
        if not isinstance(reference, str):
            raise _fault("SCHEMA_INVALID", "$ref must be a string", place)
        if reference != "#" and not reference.startswith("#/"):
            raise _fault(
                "SCHEMA_REF_REFUSED", "$ref may only name a place in the same schema", place
            )
        target = unquote(reference[1:])
        if target not in self.schemas:
            raise _fault("SCHEMA_REF_REFUSED", "$ref names no schema in this document", place)
        return target


def _fault(code: str, message: str, pointer: str) -> ContractError:
    return ContractError(message, faults=[Fault(code, message, pointer)])
