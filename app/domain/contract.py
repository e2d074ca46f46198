"""Contracts: what goes into and comes out of a capability or a run, as one JSON Schema.

A contract is written as a spec (facet names, a whole JSON Schema, or free text) and compiled once
into a `Contract`, which everything else works with. Merging of facets is in `facet_merge`, running
of schemas in `json_schema`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from app.domain.errors import ContractError, Fault
from app.domain.facet import Facet, FacetName, Side
from app.domain.facet_merge import Unmergeable, merge
from app.domain.json_schema import (
    Validator,
    Violation,
    canonical_sha256,
    compile_derived,
    compile_schema,
)
from app.domain.schema_shape import Schema, follow, fragment, relocate, standing_alone
from app.kit.json_pointer import escape, tokens

Mode = Literal["facets", "json_schema", "freeform"]


class _Spec(BaseModel):
    # `json_schema` is spelled `schema` outside: BaseModel has a method of that name.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
    )


class FacetsContract(_Spec):
    """The named facets of the catalog, each one property."""

    mode: Literal["facets"] = "facets"
    facets: list[FacetName] = Field(min_length=1, max_length=200)

    @field_validator("facets")
    @classmethod
    def _unique(cls, facets: list[str]) -> list[str]:
        if len(set(facets)) != len(facets):
            raise ValueError("a facet is named twice")
        return facets


class JsonSchemaContract(_Spec):
    """A whole JSON Schema (2020-12). `hints` and `example` help whoever makes the value."""

    mode: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, Any] = Field(alias="schema")
    hints: str | list[str] | None = None
    example: Any = None


class FreeformContract(_Spec):
    """Words instead of a schema: any value is accepted."""

    mode: Literal["freeform"] = "freeform"
    instructions: str = Field(min_length=1, max_length=20_000)
    expected_format: str | None = Field(default=None, max_length=2_000)
    example: Any = None


_MODE_OF: dict[str, Mode] = {
    "schema": "json_schema",
    "facets": "facets",
    "instructions": "freeform",
}


def _with_mode(value: Any) -> Any:
    """Fill in a mode that was left out, from the field that only one mode has."""
    if isinstance(value, dict) and "mode" not in value:
        for name, mode in _MODE_OF.items():
            if name in value:
                return {"mode": mode, **value}
    return value


_AnySpec = Annotated[
    FacetsContract | JsonSchemaContract | FreeformContract, Field(discriminator="mode")
]
ContractSpec = Annotated[_AnySpec, BeforeValidator(_with_mode)]


@dataclass(frozen=True, slots=True)
class Property:
    """One declared property of a contract.

    A local `$ref` in `schema` resolves against `Contract.schema`, not against `schema` itself.
    `facet` is None in mode json_schema, and where several facets with different schemas were merged
    under one key: then no facet speaks for the property alone, so the names must not prove a fit.
    """

    key: str
    facet: str | None
    facet_version: str | None
    title: str | None
    schema: Schema
    required: bool
    instruction: str = ""
    """What it means: of its facets, or the description in the schema."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which facet a part of a compiled contract came from. `pointer` is "/key"."""

    facet: str
    title: str
    direction: str
    pointer: str

    def as_dict(self) -> dict[str, str]:
        return {
            "facet": self.facet,
            "title": self.title,
            "direction": self.direction,
            "pointer": self.pointer,
        }


@dataclass(frozen=True, slots=True)
class Contract:
    """A compiled contract. Validators are compiled at first use and kept.

    `is_trivial`: every object is accepted, so a check may be left out. `accepts_any_key`: names
    that are not declared are not refused as such. Values given to the checks must have passed the
    JSON gate (`app.kit.json_gate`).
    """

    mode: Mode
    schema: dict[str, Any]
    properties: dict[str, Property] = field(compare=False)
    facets: tuple[str, ...]
    provenance: tuple[Provenance, ...]
    accepts_any_key: bool = field(compare=False)
    is_trivial: bool = field(compare=False)
    _validators: dict[str | None, Validator] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def sha256(self) -> str:
        """Hash of the compiled schema, equal for equal schemas whatever the order of their keys."""
        return canonical_sha256(self.schema)

    @property
    def required(self) -> tuple[str, ...]:
        """The keys of the required declared properties, in order."""
        return tuple(key for key, found in self.properties.items() if found.required)

    def is_valid(self, value: Any) -> bool:
        """Whether the value keeps the contract; the fast way, without reasons."""
        return (self.is_trivial and type(value) is dict) or self._validator(None).is_valid(value)

    def violations(self, value: Any) -> list[Fault]:
        """How the value breaks the contract; at most 20, an empty list when it keeps it.

        A fault's code is "CONTRACT_" and the keyword in upper snake case, such as CONTRACT_TYPE or
        CONTRACT_ADDITIONAL_PROPERTIES. Its facet is found from the first segment of its pointer.
        """
        if self.is_valid(value):
            return []
        return [self._fault(found, "") for found in self._validator(None).errors(value)]

    def property_violations(self, key: str, value: Any) -> list[Fault]:
        """How a value breaks the schema of one declared property; pointers start with "/key"."""
        at = "/" + escape(key)
        return [self._fault(found, at) for found in self._validator(key).errors(value)]

    def _validator(self, key: str | None) -> Validator:
        """The validator of the whole (None) or of one declared property."""
        found = self._validators.get(key)
        if found is None:
            schema: Schema = self.schema
            if key is not None:
                schema = standing_alone(self.properties[key].schema, self.schema)
            found = self._validators[key] = compile_derived(schema)
        return found

    def _fault(self, found: Violation, at: str) -> Fault:
        pointer = at + found.pointer
        segments = tokens(pointer)
        return Fault(
            code="CONTRACT_" + _upper_snake(found.keyword),
            message=found.message,
            pointer=pointer,
            facet=self._facet_at(segments[0]) if segments else None,
        )

    def _facet_at(self, key: str) -> str | None:
        """The facet that speaks for a key; of several merged ones the last."""
        pointer = "/" + escape(key)
        named = [found.facet for found in self.provenance if found.pointer == pointer]
        return named[-1] if named else None


def compile_contract(
    spec: FacetsContract | JsonSchemaContract | FreeformContract,
    direction: Side,
    catalog: Mapping[str, Facet],
    pointer: str,
) -> Contract:
    """Compile a spec; `pointer` is where it stands in the request, for the faults.

    Raises `ContractError` with every fault found: FACET_NOT_FOUND, DIRECTION_MISMATCH,
    TYPE_MISMATCH, ENUM_CONFLICT, MERGE_UNSUPPORTED (see `facet_merge`) for facets, and the codes of
    `json_schema.compile_schema` for a whole schema.
    """
    if isinstance(spec, FacetsContract):
        return _from_facets(spec.facets, direction, catalog, pointer)
    if isinstance(spec, JsonSchemaContract):
        return _from_schema(spec.json_schema, pointer + "/schema")
    return Contract("freeform", {}, {}, (), (), accepts_any_key=True, is_trivial=True)


def instructions_of(facets: Iterable[Facet]) -> str:
    """What a node is told about its facets: their instructions in order, one a line."""
    return "\n".join(facet.semantics.instruction for facet in facets)


def _from_facets(
    names: list[str], direction: Side, catalog: Mapping[str, Facet], pointer: str
) -> Contract:
    faults: list[Fault] = []
    used: list[Facet] = []
    properties: dict[str, Property] = {}
    for index, name in enumerate(names):
        at = f"{pointer}/facets/{index}"
        facet = catalog.get(name)
        if facet is None:
            faults.append(Fault("FACET_NOT_FOUND", f"no facet {name!r} is known", at, facet=name))
        elif not facet.stands_on(direction):
            faults.append(_wrong_side(facet, direction, at))
        else:
            used.append(facet)
            try:
                properties[facet.key] = _added(facet, properties.get(facet.key))
            except Unmergeable as why:
                faults.append(Fault(why.code, f"{facet.key!r}: {why}", at, facet=name))
    if faults:
        raise ContractError("the facets do not make a contract", faults=faults)
    schema = {
        "type": "object",
        "properties": {key: found.schema for key, found in properties.items()},
        "required": [key for key, found in properties.items() if found.required],
        "additionalProperties": True,
    }
    return Contract(
        mode="facets",
        schema=schema,
        properties=properties,
        facets=tuple(names),
        provenance=tuple(
            Provenance(facet.name, facet.title, direction, "/" + escape(facet.key))
            for facet in used
        ),
        accepts_any_key=True,
        is_trivial=_is_trivial(schema),
    )


def _wrong_side(facet: Facet, direction: Side, at: str) -> Fault:
    return Fault(
        "DIRECTION_MISMATCH",
        f"facet {facet.name!r} is for {facet.metadata.direction.value}, not for {direction}",
        at,
        facet=facet.name,
    )


def _added(facet: Facet, earlier: Property | None) -> Property:
    """The property after this facet has spoken for its key, alone or together with earlier ones."""
    # `#` of a facet is the facet's own schema; in the contract that schema stands at its key.
    own = relocate(facet.json_schema, fragment("properties", facet.key))
    required = facet.metadata.required_by_default
    told = facet.semantics.instruction
    if earlier is None:
        return Property(facet.key, facet.name, facet.version, facet.title, own, required, told)
    merged = merge(earlier.schema, own)
    required = required or earlier.required
    told = f"{earlier.instruction}\n{told}"
    return Property(facet.key, None, None, facet.title, merged, required, told)


def _from_schema(schema: dict[str, Any], pointer: str) -> Contract:
    validator = compile_schema(schema, pointer)
    # A schema may keep its real body in `$defs` (recursive models are written so).
    top = follow(schema, schema)
    declared = top.get("properties", {}) if isinstance(top, dict) else {}
    required = top.get("required", ()) if isinstance(top, dict) else ()
    properties = {
        key: Property(
            *(key, None, None, _text_of(found, "title"), found, key in required),
            instruction=_text_of(found, "description") or "",
        )
        for key, found in declared.items()
    }
    return Contract(
        mode="json_schema",
        schema=schema,
        properties=properties,
        facets=(),
        provenance=(),
        accepts_any_key=_accepts_any_key(schema) and _accepts_any_key(top),
        is_trivial=_is_trivial(schema),
        _validators={None: validator},
    )


def _text_of(schema: Schema, keyword: str) -> str | None:
    return schema.get(keyword) if isinstance(schema, dict) else None


def _accepts_any_key(schema: Schema) -> bool:
    if isinstance(schema, bool):
        return schema
    closing = ("additionalProperties", "unevaluatedProperties")
    return all(schema.get(keyword) is not False for keyword in closing)


_ANNOTATIONS = frozenset({"title", "description", "$schema", "$id", "$comment", "$defs"})


def _is_trivial(schema: dict[str, Any]) -> bool:
    """Whether every object is valid; may say no to a schema that is trivial in a roundabout way."""
    anything: tuple[Any, ...] = (True, {})
    return (
        schema.keys() - _ANNOTATIONS <= {"type", "properties", "required", "additionalProperties"}
        and schema.get("type", "object") == "object"
        and not schema.get("required")
        and schema.get("additionalProperties", True) in anything
        and all(found in anything for found in schema.get("properties", {}).values())
    )


def _upper_snake(keyword: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", keyword).upper()
