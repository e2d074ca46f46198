"""What a schema says about its values, gathered over `allOf` and local `$ref`.

Everything read here is a *necessary* condition: a value that fits the schema has it. Keywords that
are not understood are left out, which can only make the set of values larger. So a reader may
conclude "all values of this schema are …" and never "every value that is … fits the schema".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from app.domain.schema_shape import Schema, referenced

TYPES = frozenset({"null", "boolean", "object", "array", "string", "integer", "fraction"})
"""The types of JSON values, numbers apart: 1.0 is an integer, 1.5 a fraction."""

_CONJUNCTS_MAX = 200


def types_of(schema: dict[str, Any]) -> frozenset[str]:
    """The types that `type` alone allows."""
    named = schema.get("type")
    if named is None:
        return TYPES
    found = {named} if isinstance(named, str) else set(named)
    if "number" in found:
        found |= {"integer", "fraction"}
    return frozenset(found) & TYPES


@dataclass(frozen=True, slots=True)
class Facts:
    """`conjuncts`: schemas that all hold; `unions`: of each list at least one branch holds.

    `is_never`: no value fits at all.
    """

    conjuncts: tuple[dict[str, Any], ...]
    unions: tuple[list[Schema], ...]
    is_never: bool

    @property
    def types(self) -> frozenset[str]:
        found = TYPES
        for schema in self.conjuncts:
            found &= types_of(schema)
        return found

    @property
    def required(self) -> frozenset[str]:
        return frozenset(name for found in self.each("required") for name in found)

    @property
    def names(self) -> frozenset[str]:
        """The names of all declared properties."""
        return frozenset(name for found in self.each("properties") for name in found)

    def each(self, keyword: str) -> Iterator[Any]:
        """The values of a keyword in every conjunct that has it."""
        return (schema[keyword] for schema in self.conjuncts if keyword in schema)

    def most(self, keyword: str, default: int = 0) -> int:
        """The largest of a lower bound such as minItems."""
        return max(self.each(keyword), default=default)

    def least(self, keyword: str) -> int | None:
        """The smallest of an upper bound such as maxItems; None when there is none."""
        return min(self.each(keyword), default=None)

    def member(self, name: str) -> Schema:
        """A schema that the value of a property fits whenever it is there; False: never there."""
        return _all_of([_property(schema, name) for schema in self.conjuncts])

    def other_properties(self) -> Schema:
        """A schema for the values of properties that are not declared."""
        return _all_of([_undeclared(schema) for schema in self.conjuncts])

    def item(self, index: int) -> Schema:
        """A schema that the item at an index fits whenever it is there."""
        return _all_of([_item(schema, index) for schema in self.conjuncts])

    @property
    def prefix_length(self) -> int:
        """From this index on all items have the same schema."""
        return max((len(found) for found in self.each("prefixItems")), default=0)


def gather(root: Schema, schema: Schema) -> Facts:
    """The facts of a schema whose references resolve against `root`."""
    conjuncts: list[dict[str, Any]] = []
    unions: list[list[Schema]] = []
    seen: set[int] = set()
    stack = [schema]
    while stack and len(seen) < _CONJUNCTS_MAX:
        found = stack.pop()
        if found is False:
            return Facts((), (), is_never=True)
        if found is True or id(found) in seen:
            continue
        seen.add(id(found))
        conjuncts.append(found)
        unions.extend(found[name] for name in ("anyOf", "oneOf") if name in found)
        stack.extend(found.get("allOf", ()))
        if "$ref" in found and (target := referenced(root, found["$ref"])) is not None:
            stack.append(target)
    return Facts(tuple(conjuncts), tuple(unions), is_never=False)


def _all_of(schemas: list[Schema]) -> Schema:
    if False in schemas:
        return False
    told = [schema for schema in schemas if schema is not True]
    if not told:
        return True
    return told[0] if len(told) == 1 else {"allOf": told}


def _property(schema: dict[str, Any], name: str) -> Schema:
    found: Schema = schema.get("properties", {}).get(name, _undeclared(schema))
    return found


def _undeclared(schema: dict[str, Any]) -> Schema:
    # A name that is not declared may fall under a pattern, and then `additional…` is not for it.
    if "patternProperties" in schema:
        return True
    found: Schema = schema.get("additionalProperties", True)
    return found


def _item(schema: dict[str, Any], index: int) -> Schema:
    prefix = schema.get("prefixItems", ())
    found: Schema = prefix[index] if index < len(prefix) else schema.get("items", True)
    return found
