"""Facets become contracts, or one of the five refusals with facet and pointer."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from app.domain.contract import (
    Contract,
    ContractSpec,
    FacetsContract,
    FreeformContract,
    JsonSchemaContract,
    compile_contract,
    instructions_of,
)
from app.domain.errors import ContractError, Fault
from app.domain.facet import Direction, Facet, Side
from app.domain.facet_merge import merge

SPEC: TypeAdapter[Any] = TypeAdapter(ContractSpec)


def facet(name: str, schema: dict[str, Any] | None = None, **metadata: Any) -> Facet:
    return Facet.model_validate(
        {
            "name": name,
            "title": name.title(),
            "schema": {"type": "string"} if schema is None else schema,
            "semantics": f"make the {name}",
            "metadata": metadata,
        }
    )


def compiled(*facets: Facet, side: Side = "output", names: list[str] | None = None) -> Contract:
    catalog = {found.name: found for found in facets}
    spec = FacetsContract(facets=names or list(catalog))
    return compile_contract(spec, side, catalog, "/output_contract")


def refusal(*facets: Facet, side: Side = "output", names: list[str] | None = None) -> list[Fault]:
    with pytest.raises(ContractError) as caught:
        compiled(*facets, side=side, names=names)
    return list(caught.value.faults)


# --- shapes


def test_a_facet_has_the_shape_of_the_catalog() -> None:
    found = facet("brief", direction="both", property_key="text")
    assert found.key == "text"
    assert found.version == "1.0.0"
    assert found.metadata.direction is Direction.BIDIRECTIONAL
    assert found.metadata.required_by_default
    assert found.semantics.instruction == "make the brief"
    assert facet("brief").key == "brief"
    dumped = found.model_dump(mode="json")
    assert dumped["schema"] == {"type": "string"}
    assert Facet.model_validate(dumped) == found
    assert Facet.model_json_schema()["required"] == ["name", "title", "schema", "semantics"]


def test_a_facet_takes_its_semantics_whole_too() -> None:
    body = {"name": "a", "title": "A", "schema": {}, "semantics": {"instruction": "x", "no": 1}}
    with pytest.raises(ValidationError, match="no"):
        Facet.model_validate(body)
    assert (
        Facet.model_validate(body | {"semantics": {"instruction": "x"}}).semantics.summary is None
    )


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"mode": "facets", "facets": ["a"]}, FacetsContract),
        ({"facets": ["a"]}, FacetsContract),
        ({"mode": "json_schema", "schema": {"type": "object"}}, JsonSchemaContract),
        ({"schema": {}, "hints": ["short"], "example": {"a": 1}}, JsonSchemaContract),
        ({"mode": "freeform", "instructions": "a poem"}, FreeformContract),
        ({"instructions": "a poem", "expected_format": "markdown"}, FreeformContract),
    ],
)
def test_a_spec_is_one_of_three_and_the_mode_may_be_left_out(
    body: dict[str, Any], kind: type
) -> None:
    found = SPEC.validate_python(body)
    assert type(found) is kind
    assert SPEC.validate_python(found) == found
    assert SPEC.validate_json(SPEC.dump_json(found)) == found


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"mode": "nope", "schema": {}},
        {"mode": "facets", "facets": []},
        {"mode": "facets", "facets": ["a", "a"]},
        {"mode": "facets", "facets": ["a"], "schema": {}},
        {"schema": {}, "facets": ["a"]},
        {"schema": 5},
        {"mode": "freeform"},
    ],
    ids=repr,
)
def test_anything_else_is_refused(body: Any) -> None:
    with pytest.raises(ValidationError):
        SPEC.validate_python(body)


def test_the_schema_of_a_spec_names_its_discriminator() -> None:
    schema = SPEC.json_schema()
    assert schema["discriminator"]["propertyName"] == "mode"
    assert set(schema["discriminator"]["mapping"]) == {"facets", "json_schema", "freeform"}


# --- compiling


def test_every_facet_adds_one_property_with_its_provenance() -> None:
    found = compiled(
        facet("brief", version="2.1.0"),
        facet("score", {"type": "integer"}, property_key="a/b", required_by_default=False),
    )
    assert found.schema == {
        "type": "object",
        "properties": {"brief": {"type": "string"}, "a/b": {"type": "integer"}},
        "required": ["brief"],
        "additionalProperties": True,
    }
    assert [entry.as_dict() for entry in found.provenance] == [
        {"facet": "brief", "title": "Brief", "direction": "output", "pointer": "/brief"},
        {"facet": "score", "title": "Score", "direction": "output", "pointer": "/a~1b"},
    ]
    assert found.facets == ("brief", "score")
    assert found.required == ("brief",)
    assert found.accepts_any_key
    assert not found.is_trivial
    brief = found.properties["brief"]
    assert (brief.facet, brief.facet_version, brief.title) == ("brief", "2.1.0", "Brief")
    assert found == compiled(*[facet("brief"), found_score()], names=["brief", "score"])


def found_score() -> Facet:
    return facet("score", {"type": "integer"}, property_key="a/b", required_by_default=False)


def test_equal_schemas_have_equal_hashes_whatever_the_order() -> None:
    one = compile_contract(JsonSchemaContract(json_schema={"a": 1, "b": 2}), "input", {}, "")
    two = compile_contract(JsonSchemaContract(json_schema={"b": 2, "a": 1}), "input", {}, "")
    three = compile_contract(JsonSchemaContract(json_schema={"b": 3, "a": 1}), "input", {}, "")
    assert one.sha256 == two.sha256 != three.sha256


def test_references_of_a_facet_stay_in_the_facet() -> None:
    tree = {
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "name": {"$ref": "#/$defs/a%20b"}},
        "$defs": {"a b": {"type": "string"}},
        "$id": "https://example.com/tree",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
    }
    found = compiled(facet("tree", tree, property_key="t e/x"), facet("brief"))
    good = {"t e/x": {"left": {"left": {"name": "x"}}}, "brief": ""}
    bad = {"t e/x": {"left": {"left": {"name": 1}}}, "brief": ""}
    assert found.is_valid(good)
    [fault] = found.violations(bad)
    assert fault.pointer == "/t e~1x/left/left/name"
    assert (fault.code, fault.facet) == ("CONTRACT_TYPE", "tree")
    assert found.property_violations("t e/x", good["t e/x"]) == []
    assert found.property_violations("t e/x", bad["t e/x"]) == [fault]


def test_violations_name_facet_and_place() -> None:
    found = compiled(
        facet("brief", {"type": "string", "maxLength": 3}),
        facet("list", {"type": "array", "items": {"additionalProperties": False}}),
    )
    assert found.violations({"brief": "abc", "list": []}) == []
    faults = found.violations({"brief": "abcd", "list": [{}, {"x": 1}]})
    assert [(fault.code, fault.pointer, fault.facet) for fault in faults] == [
        ("CONTRACT_MAX_LENGTH", "/brief", "brief"),
        ("CONTRACT_ADDITIONAL_PROPERTIES", "/list/1", "list"),
    ]
    [missing] = found.violations({"brief": ""})
    assert (missing.code, missing.pointer, missing.facet) == ("CONTRACT_REQUIRED", "/list", "list")
    [wrong] = found.violations([])
    assert (wrong.code, wrong.pointer, wrong.facet) == ("CONTRACT_TYPE", "", None)


def test_freeform_accepts_everything() -> None:
    found = compile_contract(FreeformContract(instructions="a poem"), "output", {}, "")
    assert found.is_trivial
    assert found.accepts_any_key
    assert found.is_valid({"x": 1})
    assert found.is_valid("roses")
    assert found.violations("roses") == []
    assert found.properties == {}


def test_a_whole_schema_declares_its_top_level_properties() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"title": "The a", "type": "string"}, "b": True},
        "required": ["a"],
        "additionalProperties": False,
    }
    found = compile_contract(JsonSchemaContract(json_schema=schema), "input", {}, "")
    assert found.required == ("a",)
    assert found.properties["a"].title == "The a"
    assert found.properties["b"].title is None
    assert found.properties["a"].facet is None
    assert not found.accepts_any_key
    [fault] = found.violations({"a": "", "x": 1})
    assert (fault.facet, fault.pointer) == (None, "")
    assert [fault.pointer for fault in found.property_violations("a", 1)] == ["/a"]
    assert found.property_violations("b", 1) == []


@pytest.mark.parametrize(
    ("schema", "keys", "open_keys", "trivial"),
    [
        ({}, [], True, True),
        ({"type": "object", "title": "Any", "properties": {"a": True}}, ["a"], True, True),
        ({"type": "object", "additionalProperties": True, "required": []}, [], True, True),
        ({"type": "object", "required": ["a"]}, [], True, False),
        ({"type": ["object", "null"]}, [], True, False),
        ({"type": "object", "additionalProperties": {"type": "string"}}, [], True, False),
        ({"type": "object", "unevaluatedProperties": False}, [], False, False),
        (
            {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"k": {}}}}},
            ["k"],
            True,
            False,
        ),
        ({"$ref": "#/$defs/x", "$defs": {"x": False}}, [], False, False),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}, [], True, False),
    ],
    ids=repr,
)
def test_what_a_whole_schema_says_of_itself(
    schema: dict[str, Any], keys: list[str], open_keys: bool, trivial: bool
) -> None:
    found = compile_contract(JsonSchemaContract(json_schema=schema), "input", {}, "")
    assert list(found.properties) == keys
    assert found.accepts_any_key is open_keys
    assert found.is_trivial is trivial
    if trivial:
        assert found.is_valid({"anything": 1})


def test_a_broken_schema_is_refused_with_its_place() -> None:
    with pytest.raises(ContractError) as caught:
        compile_contract(
            JsonSchemaContract(json_schema={"properties": {"a": {"type": "strin"}}}),
            "output",
            {},
            "/output_contract",
        )
    [fault] = caught.value.faults
    assert fault.code == "SCHEMA_INVALID"
    assert fault.pointer == "/output_contract/schema/properties/a/type"


def test_instructions_are_the_facets_own_in_order() -> None:
    assert instructions_of([facet("a"), facet("b")]) == "make the a\nmake the b"
    assert instructions_of([]) == ""


# --- the five refusals


def test_facet_not_found() -> None:
    [fault] = refusal(facet("a"), names=["a", "nope"])
    assert (fault.code, fault.facet) == ("FACET_NOT_FOUND", "nope")
    assert fault.pointer == "/output_contract/facets/1"


@pytest.mark.parametrize(
    ("direction", "side", "fits"),
    [
        ("input", "input", True),
        ("input", "output", False),
        ("output", "output", True),
        ("output", "input", False),
        ("bidirectional", "input", True),
        ("both", "output", True),
    ],
)
def test_direction_mismatch(direction: str, side: Side, fits: bool) -> None:
    found = facet("a", direction=direction)
    if fits:
        assert compiled(found, side=side).facets == ("a",)
        return
    [fault] = refusal(found, side=side)
    assert (fault.code, fault.facet) == ("DIRECTION_MISMATCH", "a")
    assert fault.pointer == "/output_contract/facets/0"


def at_one_key(first: dict[str, Any], second: dict[str, Any]) -> tuple[Facet, Facet]:
    return facet("one", first, property_key="k"), facet("two", second, property_key="k")


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ({"type": "string"}, {"type": "integer"}, "TYPE_MISMATCH"),
        ({"type": ["string", "null"]}, {"type": "string"}, "TYPE_MISMATCH"),
        ({"enum": ["a", "b"]}, {"enum": ["c"]}, "ENUM_CONFLICT"),
        ({"enum": ["a"]}, {"const": "b"}, "ENUM_CONFLICT"),
        ({"const": 1}, {"const": True}, "ENUM_CONFLICT"),
        ({"enum": ["a"], "const": "b"}, {"enum": ["a"]}, "ENUM_CONFLICT"),
        ({"minimum": 1}, {"minimum": 2}, "MERGE_UNSUPPORTED"),
        ({"pattern": "a"}, {"pattern": "b"}, "MERGE_UNSUPPORTED"),
        ({"anyOf": [{}]}, {"anyOf": [True]}, "MERGE_UNSUPPORTED"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {}}}, {"type": "string"}, "MERGE_UNSUPPORTED"),
        ({"type": "string"}, {"allOf": [{"$ref": "#"}]}, "MERGE_UNSUPPORTED"),
        ({"unevaluatedItems": False}, {"items": True}, "MERGE_UNSUPPORTED"),
        ({"properties": {"a": {}}}, {"additionalProperties": False}, "MERGE_UNSUPPORTED"),
        ({"items": {}}, {"items": {}, "prefixItems": [{}]}, "MERGE_UNSUPPORTED"),
    ],
    ids=repr,
)
def test_two_facets_that_disagree_about_a_key(
    first: dict[str, Any], second: dict[str, Any], code: str
) -> None:
    [fault] = refusal(*at_one_key(first, second))
    assert (fault.code, fault.facet) == (code, "two")
    assert fault.pointer == "/output_contract/facets/1"
    assert "'k'" in fault.message


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ({"type": "string", "minLength": 1}, {"minLength": 1, "type": "string"}, None),
        ({"type": "string", "title": "A"}, {"type": "string", "title": "B"}, None),
        ({"type": "string"}, {"maxLength": 3}, {"type": "string", "maxLength": 3}),
        ({"enum": ["a", "b", "c"]}, {"enum": ["c", "b", "x"]}, {"enum": ["c", "b"]}),
        ({"const": "a"}, {"enum": ["a", "b"]}, {"enum": ["a"]}),
        ({"enum": [1, [1.0]], "const": 1}, {"const": 1.0}, {"enum": [1.0]}),
        ({"enum": [{"a": 1}]}, {"enum": [{"a": 1.0}, 1.5]}, {"enum": [{"a": 1.0}]}),
        ({"enum": ["a"]}, {"type": "string"}, {"enum": ["a"], "type": "string"}),
        ({"required": ["a"]}, {"required": ["b", "a"]}, {"required": ["a", "b"]}),
        ({"type": ["null", "string"]}, {"type": ["string", "null"]}, None),
        ({"minimum": 1}, {"minimum": 1.0, "maximum": 2}, {"minimum": 1.0, "maximum": 2}),
    ],
    ids=repr,
)
def test_two_facets_that_agree_about_a_key(
    first: dict[str, Any], second: dict[str, Any], merged: dict[str, Any] | None
) -> None:
    found = compiled(*at_one_key(first, second))
    assert found.properties["k"].schema == (second if merged is None else merged)
    assert [entry.pointer for entry in found.provenance] == ["/k", "/k"]


def test_no_facet_speaks_alone_for_a_merged_key() -> None:
    one, two = at_one_key({"type": "string"}, {"maxLength": 1})
    found = compiled(
        one, two.model_copy(update={"metadata": facet("x", required_by_default=False).metadata})
    )
    assert set(found.properties) == {"k", "two"}
    merged = compiled(one, two)
    assert merged.properties["k"].facet is None
    assert merged.properties["k"].facet_version is None
    assert merged.required == ("k",)
    [fault] = merged.violations({"k": "abc"})
    assert fault.facet == "two"


def test_true_and_false_merge_with_nothing_else() -> None:
    assert merge(True, True) is True
    with pytest.raises(Exception, match="true and false"):
        merge(True, {"type": "string"})


def test_all_faults_are_told_at_once() -> None:
    faults = refusal(
        facet("a", direction="input"),
        *at_one_key({"type": "string"}, {"type": "integer"}),
        names=["nope", "a", "one", "two"],
    )
    assert [fault.code for fault in faults] == [
        "FACET_NOT_FOUND",
        "DIRECTION_MISMATCH",
        "TYPE_MISMATCH",
    ]
