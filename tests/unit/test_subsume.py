"""Subsumption is sound: "yes" and "no" are never wrong, judged by the engine itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import subsume
from app.domain.errors import ContractError
from app.domain.json_schema import Validator, compile_derived, compile_schema
from app.domain.schema_facts import gather
from app.domain.schema_shape import standing_alone
from app.domain.subsume import Verdict, lookup, subsumes
from app.kit.json_pointer import PointerMissing, resolve
from tests.effort import calls_made
from tests.schema_samples import Samples

SEEDS = st.integers(0, 2**32)


def compiled(schema: Any) -> Validator | None:
    """None for a schema that is refused: a reference that leads to nothing, for example."""
    try:
        return compile_schema(schema)
    except ContractError:
        return None


@settings(max_examples=100)
@given(SEEDS)
def test_a_verdict_is_never_wrong(seed: int) -> None:
    samples = Samples(seed)
    for _ in range(20):
        general, specific = samples.pair()
        allows, gives = compiled(general), compiled(specific)
        if allows is None or gives is None:
            continue
        verdict = subsumes(general, specific)
        for value in (samples.value() for _ in range(30)):
            if gives.is_valid(value):
                fits = allows.is_valid(value)
                assert verdict.outcome != "yes" or fits, (general, specific, value)
                assert verdict.outcome != "no" or not fits, (general, specific, value)


@settings(max_examples=60)
@given(SEEDS)
def test_what_is_found_at_a_place_is_true_of_every_value(seed: int) -> None:
    samples = Samples(seed)
    schema = samples.document()
    gives = compiled(schema)
    values = [samples.value() for _ in range(60)]
    valid = [value for value in values if gives is not None and gives.is_valid(value)]
    for pointer in ("/a", "/b", "/a/a", "/0", "/1", "/a/0"):
        found = lookup(schema, pointer)
        fits = compile_derived(standing_alone(found.schema, schema))
        for value in valid:
            try:
                part = resolve(value, pointer)
            except PointerMissing:
                assert not found.is_guaranteed, (schema, pointer, value)
            else:
                assert found.outcome != "absent", (schema, pointer, value)
                assert fits.is_valid(part), (schema, pointer, value)


# --- a table for people

DOCUMENT = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "text": {"type": "string", "maxLength": 10}},
    "required": ["title", "text"],
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
}
OTHER_TREE = {"type": "object", "properties": {"next": {"$ref": "#"}}}


@pytest.mark.parametrize(
    ("general", "specific", "outcome"),
    [
        # everything and nothing
        (True, {"type": "string"}, "yes"),
        ({}, DOCUMENT, "yes"),
        ({"title": "Any", "description": "x", "format": "date", "x-own": 1}, DOCUMENT, "yes"),
        (False, DOCUMENT, "no"),
        ({"type": "string"}, False, "yes"),
        ({"type": "string"}, {"allOf": [False]}, "yes"),
        ({"type": "string"}, True, "undecided"),
        # types
        ({"type": "number"}, {"type": "integer"}, "yes"),
        ({"type": "integer"}, {"type": "number"}, "undecided"),
        ({"type": ["integer", "null"]}, {"type": "integer"}, "yes"),
        ({"type": "string"}, {"type": "integer"}, "no"),
        ({"type": "integer"}, {"type": "number", "not": {"type": "integer"}}, "undecided"),
        ({"type": "null"}, {"type": ["null", "boolean"], "not": {"const": True}}, "undecided"),
        ({"type": "null"}, {"type": ["null", "boolean"], "not": {"type": "boolean"}}, "yes"),
        # values
        ({"type": "string"}, {"enum": ["a", "b"]}, "yes"),
        ({"type": "string"}, {"enum": ["a", 1]}, "undecided"),
        ({"type": "string"}, {"type": "string", "enum": ["a", 1]}, "yes"),
        ({"type": "string"}, {"const": 1}, "no"),
        ({"pattern": "^a"}, {"enum": ["ab", "ac"]}, "yes"),
        ({"enum": ["a", "b", "c"]}, {"enum": ["a"]}, "yes"),
        ({"enum": ["a"]}, {"type": "string"}, "undecided"),
        ({"enum": ["a"]}, {"type": "integer"}, "no"),
        ({"const": 5}, {"type": "integer", "maximum": 4}, "no"),
        ({"enum": [True, False]}, {"type": "boolean"}, "yes"),
        ({"const": 1}, {"const": True}, "no"),
        ({"const": True}, {"const": 1}, "no"),
        ({"type": "string"}, {"enum": [str(n) for n in range(501)]}, "undecided"),
        ({"enum": [str(n) for n in range(501)]}, {"type": "integer"}, "undecided"),
        # numbers
        ({"minimum": 0}, {"type": "integer", "minimum": 0}, "yes"),
        ({"minimum": 0}, {"type": "integer", "exclusiveMinimum": 0}, "yes"),
        ({"exclusiveMinimum": 0}, {"type": "integer", "minimum": 0}, "undecided"),
        ({"exclusiveMinimum": 0}, {"type": "integer", "maximum": 0}, "no"),
        ({"minimum": 0}, {"type": "number", "exclusiveMaximum": 0}, "no"),
        ({"minimum": 0}, {"type": "number", "maximum": 0}, "undecided"),
        ({"minimum": 0}, {"type": "number"}, "undecided"),
        ({"maximum": 9}, {"type": "number", "minimum": 1, "maximum": 9}, "yes"),
        ({"maximum": 9}, {"type": "number", "minimum": 10}, "no"),
        ({"exclusiveMaximum": 9}, {"type": "number", "maximum": 8.5}, "yes"),
        ({"minimum": 0}, {"type": "string"}, "yes"),
        ({"minimum": 0}, {"type": ["string", "number"], "maximum": -1}, "undecided"),
        ({"multipleOf": 1}, {"type": "integer"}, "yes"),
        ({"multipleOf": 2}, {"type": "integer", "multipleOf": 2}, "yes"),
        ({"multipleOf": 2}, {"type": "integer", "multipleOf": 4}, "undecided"),
        # strings
        ({"maxLength": 10}, {"type": "string", "maxLength": 5}, "yes"),
        ({"maxLength": 10}, {"type": "string", "minLength": 11}, "no"),
        ({"maxLength": 10}, {"type": "string"}, "undecided"),
        ({"minLength": 2}, {"type": "string", "minLength": 2}, "yes"),
        ({"minLength": 2}, {"type": "string", "maxLength": 1}, "no"),
        ({"pattern": "a"}, {"type": "string", "pattern": "a"}, "yes"),
        ({"pattern": "a"}, {"type": "string", "pattern": "b"}, "undecided"),
        # objects
        (DOCUMENT, DOCUMENT, "yes"),
        ({"required": ["title"]}, DOCUMENT, "yes"),
        ({"required": ["title", "more"]}, DOCUMENT, "undecided"),
        ({"required": ["more"]}, {**DOCUMENT, "additionalProperties": False}, "no"),
        ({"required": ["a"]}, {"type": "object", "properties": {"a": False}}, "no"),
        ({"properties": {"title": {"type": "integer"}}}, DOCUMENT, "no"),
        (
            {"properties": {"o": {"type": "integer"}}},
            {"type": "object", "properties": {"o": {"type": "string"}}},
            "undecided",
        ),
        ({"properties": {"x": {"type": "string"}}}, DOCUMENT, "undecided"),
        ({"properties": {"x": {}}, "additionalProperties": False}, DOCUMENT, "no"),
        ({"additionalProperties": {"type": "string"}}, DOCUMENT, "undecided"),
        (
            {"additionalProperties": {"type": "string"}},
            {"type": "object", "additionalProperties": {"enum": ["a"]}},
            "yes",
        ),
        (
            {"properties": {"a": {}}, "additionalProperties": False},
            {"type": "object", "properties": {"a": {}, "b": False}, "additionalProperties": False},
            "yes",
        ),
        (
            {"patternProperties": {"^t": {"type": "string"}}, "additionalProperties": False},
            {**DOCUMENT, "additionalProperties": False},
            "undecided",
        ),
        (
            {"additionalProperties": {"type": "string"}},
            {"type": "object", "patternProperties": {"": {}}, "additionalProperties": False},
            "undecided",
        ),
        ({"minProperties": 2}, DOCUMENT, "yes"),
        ({"minProperties": 3}, {**DOCUMENT, "additionalProperties": False}, "no"),
        ({"maxProperties": 2}, {**DOCUMENT, "additionalProperties": False}, "yes"),
        (
            {"maxProperties": 1},
            {"type": "object", "maxProperties": 1, "additionalProperties": False},
            "yes",
        ),
        ({"maxProperties": 1}, DOCUMENT, "no"),
        ({"propertyNames": {"maxLength": 9}}, DOCUMENT, "undecided"),
        # arrays
        ({"items": {"type": "number"}}, {"type": "array", "items": {"type": "integer"}}, "yes"),
        ({"items": {"type": "string"}}, {"type": "array", "items": {"type": "null"}}, "undecided"),
        (
            {"items": {"type": "string"}},
            {"type": "array", "items": {"type": "null"}, "minItems": 1},
            "no",
        ),
        ({"items": {"type": "string"}}, {"type": "array", "maxItems": 0}, "yes"),
        (
            {"prefixItems": [{"type": "string"}], "items": {"type": "null"}},
            {"type": "array", "prefixItems": [{"const": "x"}], "items": False},
            "yes",
        ),
        (
            {"prefixItems": [{"type": "string"}], "items": {"type": "null"}},
            {"type": "array", "prefixItems": [{"const": "x"}], "items": {"const": None}},
            "yes",
        ),
        ({"maxItems": 1}, {"type": "array", "prefixItems": [True], "items": False}, "yes"),
        ({"minItems": 1}, {"type": "array", "minItems": 2}, "yes"),
        ({"minItems": 3}, {"type": "array", "maxItems": 2}, "no"),
        ({"uniqueItems": True}, {"type": "array", "uniqueItems": True}, "yes"),
        ({"uniqueItems": True}, {"type": "array", "maxItems": 1}, "yes"),
        ({"uniqueItems": False}, {"type": "array"}, "yes"),
        ({"uniqueItems": True}, {"type": "array"}, "undecided"),
        ({"contains": {"type": "string"}}, {"type": "array", "minItems": 1}, "undecided"),
        # combinations
        ({"allOf": [{"type": "number"}, {"minimum": 0}]}, {"type": "integer", "minimum": 1}, "yes"),
        ({"allOf": [{"type": "number"}, {"minimum": 0}]}, {"type": "string"}, "no"),
        ({"type": "number"}, {"allOf": [{"type": "integer"}, {"minimum": 1}]}, "yes"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"type": "string"}, "yes"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"type": "integer"}, "no"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, {"type": "number"}, "undecided"),
        (
            {"anyOf": [{"type": "string"}, {"type": "null"}]},
            {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
            "yes",
        ),
        ({"type": "string"}, {"anyOf": [{"type": "null"}, {"type": "string"}]}, "undecided"),
        ({"type": "string"}, {"oneOf": [{"type": "null"}, {"type": "array"}]}, "no"),
        (
            {"type": "string"},
            {"anyOf": [{}, {"type": "null"}], "oneOf": [{"type": "array"}, {"type": "object"}]},
            "no",
        ),
        (
            {"type": "string"},
            {"anyOf": [{"const": "a"}, {"const": "b"}], "oneOf": [{"minLength": 1}]},
            "yes",
        ),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, {"type": "string"}, "yes"),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, {"type": "integer"}, "no"),
        ({"oneOf": [{"type": "string"}, {}]}, {"type": "string"}, "undecided"),
        ({"not": {"type": "string"}}, {"type": "integer"}, "yes"),
        ({"not": {"type": "number"}}, {"type": "integer"}, "no"),
        ({"not": {"minimum": 3}}, {"type": "integer"}, "undecided"),
        ({"if": {"type": "string"}, "then": False}, {"type": "string"}, "undecided"),
        # references
        ({"$ref": "#/$defs/s", "$defs": {"s": {"type": "string"}}}, {"type": "string"}, "yes"),
        ({"$ref": "#/$defs/s", "$defs": {"s": {"type": "string"}}}, {"type": "null"}, "no"),
        ({"type": "string"}, {"$ref": "#/$defs/s", "$defs": {"s": {"const": "x"}}}, "yes"),
        ({"type": "string"}, {"$ref": "#"}, "undecided"),
        (TREE, TREE, "yes"),
        (TREE, OTHER_TREE, "undecided"),
        ({"$ref": "#/$defs/gone"}, {"type": "string"}, "undecided"),
        ({"type": "string"}, {"$ref": "#/$defs/gone"}, "undecided"),
    ],
    ids=repr,
)
def test_a_pair_of_schemas(general: Any, specific: Any, outcome: str) -> None:
    verdict = subsumes(general, specific)
    assert verdict.outcome == outcome
    assert verdict.why or outcome == "yes"


def test_the_verdict_tells_where_and_why() -> None:
    general = {"properties": {"brief": {"properties": {"title": {"type": "integer"}}}}}
    specific = {
        "type": "object",
        "properties": {
            "brief": {
                "type": "object",
                "properties": {"title": {"type": "string"}},
                "required": ["title"],
            }
        },
        "required": ["brief"],
    }
    assert subsumes(general, specific) == Verdict(
        "no", "wants integer, gets string", "/brief/title"
    )
    found = subsumes({"type": "integer"}, {"type": ["number", "string"]})
    assert found == Verdict("undecided", "may be a number that is not whole or string", "")
    assert subsumes({"type": "string"}, {"type": "number"}).why == "wants string, gets number"
    closed = {"type": "array", "items": {"type": "number"}, "minItems": 1}
    assert subsumes({"items": {"type": "object"}}, closed).pointer == "/0"
    nothing = {"allOf": [{"type": "string"}, {"type": "object"}]}
    assert subsumes({"type": "string"}, nothing).outcome in ("yes", "no")


def test_parts_resolve_their_references_in_their_own_documents() -> None:
    general = {"properties": {"k": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"type": "number"}}}
    specific = {"properties": {"k": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"type": "string"}}}
    part = {"$ref": "#/$defs/v"}
    assert subsumes(part, part, general_root=general, specific_root=specific).outcome == "no"
    assert subsumes(part, part, general_root=general, specific_root=general).outcome == "yes"
    assert subsumes(part, part, general_root=general, specific_root={**general}).outcome == "yes"
    listed = {"enum": ["a", 1], "$ref": "#/$defs/v"}
    found = subsumes({"type": "string"}, listed, specific_root=specific)
    assert found.outcome == "yes"


def test_an_intricate_pair_is_given_up_early() -> None:
    def maze(kind: str) -> dict[str, Any]:
        step = {"$ref": "#/$defs/n"}
        return {
            **step,
            "$defs": {
                "n": {
                    "anyOf": [
                        {"type": "object", "properties": {key: step, key + kind: step}}
                        for key in "abcdef"
                    ]
                }
            },
        }

    found, calls = calls_made(partial(subsumes, maze("x"), maze("y")))
    assert found.outcome == "undecided"
    assert calls < 100_000


def test_conditions_that_never_end_are_cut() -> None:
    many = {"allOf": [{"title": str(n)} for n in range(1_000)]}
    assert len(gather(many, many).conjuncts) == 200
    loop = {"$ref": "#"}
    assert gather(loop, loop).conjuncts == (loop,)


@pytest.mark.parametrize(
    ("schema", "pointer", "outcome", "found", "sure"),
    [
        (DOCUMENT, "", "found", DOCUMENT, True),
        (DOCUMENT, "/title", "found", {"type": "string"}, True),
        (DOCUMENT, "/more", "undecided", True, False),
        (DOCUMENT, "/title/x", "absent", False, False),
        ({**DOCUMENT, "additionalProperties": False}, "/more", "absent", False, False),
        (
            {"properties": {"a": {"type": "null"}}, "required": ["a"]},
            "/a",
            "found",
            {"type": "null"},
            False,
        ),
        (
            {"type": "object", "additionalProperties": {"type": "null"}},
            "/a",
            "found",
            {"type": "null"},
            False,
        ),
        ({"type": "array", "items": {"const": 1}}, "/3", "found", {"const": 1}, False),
        (
            {"type": "array", "items": {"const": 1}, "minItems": 4},
            "/3",
            "found",
            {"const": 1},
            True,
        ),
        ({"type": "array", "prefixItems": [{"const": 1}]}, "/0", "found", {"const": 1}, False),
        ({"type": "array", "items": {"const": 1}}, "/x", "absent", False, False),
        ({"type": "array", "items": {"const": 1}}, "/-", "absent", False, False),
        ({"items": {"const": 1}}, "/0", "undecided", True, False),
        (False, "/a", "absent", False, False),
        (TREE, "/next/next", "found", {"$ref": "#/$defs/node"}, False),
        (
            {"allOf": [DOCUMENT, {"properties": {"title": {"minLength": 1}}}]},
            "/title",
            "found",
            {"allOf": [{"minLength": 1}, {"type": "string"}]},
            True,
        ),
        (
            {"anyOf": [DOCUMENT, {"type": "null"}]},
            "/title",
            "found",
            {"anyOf": [{"type": "string"}]},
            False,
        ),
        (
            {"type": "object", "anyOf": [DOCUMENT, {**DOCUMENT, "title": "B"}]},
            "/title",
            "found",
            {"anyOf": [{"type": "string"}, {"type": "string"}]},
            True,
        ),
        (
            {
                "type": "object",
                "properties": {"title": {"minLength": 1}},
                "oneOf": [DOCUMENT, {"type": "null"}],
            },
            "/title",
            "found",
            {"allOf": [{"minLength": 1}, {"anyOf": [{"type": "string"}]}]},
            False,
        ),
        ({"anyOf": [DOCUMENT, {"type": "object"}]}, "/title", "undecided", True, False),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "/title", "absent", False, False),
        (
            {"type": "object", "properties": {"a": False}, "anyOf": [{}, {"type": "object"}]},
            "/a",
            "absent",
            False,
            False,
        ),
    ],
    ids=repr,
)
def test_looking_up_a_place(
    schema: Any, pointer: str, outcome: str, found: Any, sure: bool
) -> None:
    located = lookup(schema, pointer)
    assert (located.outcome, located.schema, located.is_guaranteed) == (outcome, found, sure)


def test_looking_up_is_bounded() -> None:
    for branches in (1, 2, 50):
        for unions in (1, 40):
            maze = {"allOf": [{"anyOf": [{"$ref": "#"}] * branches} for _ in range(unions)]}
            located, calls = calls_made(partial(lookup, maze, "/a"))
            assert located.outcome == "undecided"
            assert calls < 200_000


def test_a_malformed_pointer_is_missing() -> None:
    with pytest.raises(PointerMissing):
        lookup({}, "a")


def test_very_deep_schemas_are_undecided_not_a_crash() -> None:
    def nest(leaf: Any, levels: int) -> Any:
        for _ in range(levels):
            leaf = {"items": leaf, "type": "array", "minItems": 1}
        return leaf

    assert subsume.DEPTH_MAX == 40
    assert subsumes(nest({"type": "null"}, 30), nest({"type": "string"}, 30)).outcome == "no"
    assert subsumes(nest({"type": "null"}, 60), nest({"type": "string"}, 60)).outcome == "undecided"
