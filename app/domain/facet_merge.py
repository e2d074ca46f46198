"""Merging two schemas that facets give for the same key.

The merged schema accepts exactly what both accept, or there is no merge:

- equal schemas (key order aside) merge to themselves;
- `type` must name the same types, or stand in one of them only (else TYPE_MISMATCH);
- `enum` (and `const`, as an enum of one) becomes the intersection; an empty one is ENUM_CONFLICT;
- `required` becomes the union;
- annotations (title, description, default …) are the later schema's;
- every other keyword is kept when one schema alone has it, or both have it alike. Keywords whose
  meaning depends on each other (`properties` with `additionalProperties`, `items` with
  `prefixItems` …) are kept as a group. Anything else is MERGE_UNSUPPORTED: differing bounds,
  patterns and combinators, and any `$ref` or `unevaluated…`, whose meaning would change.
"""

from __future__ import annotations

from typing import Any

import orjson

from app.domain.schema_shape import Schema, has_reference

_ANNOTATIONS = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "format",
        "$comment",
        "$defs",
        "definitions",
    }
)
_GROUPS = (
    frozenset({"properties", "patternProperties", "additionalProperties"}),
    frozenset({"items", "prefixItems"}),
    frozenset({"if", "then", "else"}),
    frozenset({"contains", "minContains", "maxContains"}),
)
_MERGED = frozenset({"type", "enum", "const", "required"})
_LOOKING_AROUND = frozenset({"unevaluatedProperties", "unevaluatedItems"})


class Unmergeable(Exception):
    """Two schemas for one key have no sound merge. `code` is one of the compiler's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def merge(earlier: Schema, later: Schema) -> Schema:
    """The schema that accepts what both accept; raises `Unmergeable`."""
    if _same(earlier, later):
        return later
    if isinstance(earlier, bool) or isinstance(later, bool):
        raise Unmergeable("MERGE_UNSUPPORTED", "true and false merge with nothing else")
    if has_reference(earlier) or has_reference(later):
        raise Unmergeable("MERGE_UNSUPPORTED", "schemas with $ref merge only when they are equal")
    if _LOOKING_AROUND & (earlier.keys() | later.keys()):
        raise Unmergeable("MERGE_UNSUPPORTED", "unevaluated… depends on the whole schema")
    merged = {**earlier, **later}
    _check_type(earlier, later)
    _merge_enum(merged, earlier, later)
    if "required" in earlier and "required" in later:
        merged["required"] = list(dict.fromkeys([*earlier["required"], *later["required"]]))
    _check_the_rest(earlier, later)
    return merged


def _check_type(earlier: dict[str, Any], later: dict[str, Any]) -> None:
    if "type" not in earlier or "type" not in later:
        return
    if _types(earlier) != _types(later):
        raise Unmergeable(
            "TYPE_MISMATCH",
            f"the facets disagree on its type: {_named(earlier)} and {_named(later)}",
        )


def _types(schema: dict[str, Any]) -> set[str]:
    named = schema["type"]
    return {named} if isinstance(named, str) else set(named)


def _named(schema: dict[str, Any]) -> str:
    return " or ".join(sorted(_types(schema)))


def _merge_enum(merged: dict[str, Any], earlier: dict[str, Any], later: dict[str, Any]) -> None:
    first, second = _values(earlier), _values(later)
    if first is None or second is None:
        return
    allowed = {_key(value) for value in first}
    shared = [value for value in second if _key(value) in allowed]
    if not shared:
        raise Unmergeable("ENUM_CONFLICT", "no value is allowed by both facets")
    merged.pop("const", None)
    merged["enum"] = shared


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """The values that `enum` and `const` allow together; None when neither is there."""
    enum: list[Any] | None = schema.get("enum")
    if "const" not in schema:
        return enum
    if enum is None or _key(schema["const"]) in {_key(value) for value in enum}:
        return [schema["const"]]
    return []


def _check_the_rest(earlier: dict[str, Any], later: dict[str, Any]) -> None:
    for keyword in earlier:
        if keyword not in later or keyword in _ANNOTATIONS or keyword in _MERGED:
            continue
        if not _same(earlier[keyword], later[keyword]):
            raise Unmergeable("MERGE_UNSUPPORTED", f"the facets disagree on {keyword}")
    for group in _GROUPS:
        first, second = group & earlier.keys(), group & later.keys()
        if first and second and first != second:
            raise Unmergeable(
                "MERGE_UNSUPPORTED", f"the facets disagree on {' and '.join(sorted(group))}"
            )


def _same(first: Any, second: Any) -> bool:
    return _key(first) == _key(second)


def _key(value: Any) -> bytes:
    """Equal for equal JSON values; 1 and 1.0 count as equal, true and 1 do not."""
    return orjson.dumps(_whole(value), option=orjson.OPT_SORT_KEYS)


def _whole(value: Any) -> Any:
    """The value with whole floats as integers, at every depth."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value
