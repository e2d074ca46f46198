"""Schemas of strangers: limits hold, nothing is fetched or runs long, reasons are readable.

Where Python does the work, calls are counted; what runs away elsewhere does so for good, and the
limit of a test (`timeout` in pyproject.toml) ends it.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.domain import json_schema, schema_shape
from app.domain.errors import ContractError, Fault
from app.domain.json_schema import (
    CACHE_WEIGHT_MAX,
    canonical_sha256,
    compile_derived,
    compile_schema,
)
from app.domain.schema_shape import (
    children,
    follow,
    fragment,
    has_reference,
    referenced,
    relocate,
    standing_alone,
)
from app.kit.json_pointer import tokens
from tests.effort import calls_made


def refusal(schema: Any, pointer: str = "/schema") -> Fault:
    with pytest.raises(ContractError) as caught:
        compile_schema(schema, pointer)
    [fault] = caught.value.faults
    return fault


def nested(depth: int, leaf: Any = 1) -> Any:
    for _ in range(depth):
        leaf = {"a": leaf}
    return leaf


# --- references


class _Canary(http.server.BaseHTTPRequestHandler):
    hits: list[str]

    def do_GET(self) -> None:
        self.hits.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: Any) -> None:
        """Nothing: the test's own output is enough."""


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """A web server that remembers who asked it for anything."""
    hits: list[str] = []
    handler = type("Canary", (_Canary,), {"hits": hits})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", hits
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_reference_leaves_the_document(canary: tuple[str, list[str]], tmp_path: Path) -> None:
    url, hits = canary
    file = tmp_path / "schema.json"
    file.write_text("{}")
    references = [
        f"{url}/schema",
        f"{url}/schema#/a",
        file.as_uri(),
        str(file),
        "other.json",
        "urn:uuid:1",
        "//127.0.0.1/x",
        "#anchor",
        "https://json-schema.org/draft/2020-12/schema",
        "",
    ]
    for reference in references:
        for schema in ({"$ref": reference}, {"items": {"anyOf": [{"$ref": reference}]}}):
            fault = refusal(schema)
            assert fault.code == "SCHEMA_REF_REFUSED"
            assert fault.pointer.endswith("/$ref")
            assert reference not in fault.message or not reference
    refusal({"$id": f"{url}/base", "$ref": "schema"})
    refusal({"items": {"$id": f"{url}/base", "$ref": "#/x"}})
    refusal({"$schema": f"{url}/dialect"})
    assert hits == []


def test_the_engine_itself_refuses_to_fetch(
    canary: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second net, seen by taking the first away."""
    url, hits = canary
    shape = schema_shape.Shape(cost=1, loops=0, patterns=0)
    monkeypatch.setattr(json_schema, "measure", lambda *_: shape)
    assert refusal({"$ref": f"{url}/net"}).code == "SCHEMA_REF_REFUSED"
    assert hits == []


@pytest.mark.parametrize(
    ("schema", "code", "pointer"),
    [
        (5, "SCHEMA_INVALID", "/schema"),
        ("{}", "SCHEMA_INVALID", "/schema"),
        ({"type": "strin"}, "SCHEMA_INVALID", "/schema/type"),
        ({"minLength": -1}, "SCHEMA_INVALID", "/schema/minLength"),
        ({"allOf": {}}, "SCHEMA_INVALID", "/schema/allOf"),
        ({"properties": []}, "SCHEMA_INVALID", "/schema/properties"),
        ({"items": [{}]}, "SCHEMA_INVALID", "/schema/items"),
        ({"$ref": 5}, "SCHEMA_INVALID", "/schema/$ref"),
        ({"$ref": "#/$defs/no"}, "SCHEMA_REF_REFUSED", "/schema/$ref"),
        ({"$ref": "#/const", "const": {}}, "SCHEMA_REF_REFUSED", "/schema/$ref"),
        ({"$ref": "#/x", "x": {}}, "SCHEMA_REF_REFUSED", "/schema/$ref"),
        ({"not": {"$id": "x"}}, "SCHEMA_INVALID", "/schema/not/$id"),
        ({"$anchor": "x"}, "SCHEMA_INVALID", "/schema/$anchor"),
        ({"items": {"$dynamicRef": "#x"}}, "SCHEMA_INVALID", "/schema/items/$dynamicRef"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#"},
            "SCHEMA_INVALID",
            "/schema/$schema",
        ),
        ({"const": float("nan")}, "SCHEMA_INVALID", "/schema/const"),
        ({"const": {1: 2}}, "SCHEMA_INVALID", "/schema/const"),
        ({"const": {1, 2}}, "SCHEMA_INVALID", "/schema/const"),
        ({"enum": [2**60]}, "SCHEMA_INVALID", "/schema/enum/0"),
        ({"title": "\ud800"}, "SCHEMA_INVALID", "/schema/title"),
        ({"pattern": "(?=a)b"}, "SCHEMA_INVALID", "/schema/pattern"),
        ({"pattern": "(a)\\1"}, "SCHEMA_INVALID", "/schema/pattern"),
        ({"pattern": "("}, "SCHEMA_INVALID", "/schema/pattern"),
        ({"pattern": "((a{1000}){1000}){1000}"}, "SCHEMA_INVALID", "/schema/pattern"),
        ({"pattern": "a" * 1_001}, "SCHEMA_TOO_LARGE", "/schema"),
        ({"patternProperties": {"a" * 1_001: True}}, "SCHEMA_TOO_LARGE", "/schema"),
        ({"allOf": [{"pattern": f"a{n}"} for n in range(65)]}, "SCHEMA_TOO_LARGE", "/schema"),
        ({"description": "x" * 300_000}, "SCHEMA_TOO_LARGE", "/schema"),
        ({"items": {"enum": list(range(5_001))}}, "SCHEMA_TOO_LARGE", "/schema/items/enum"),
        ({"anyOf": [True] * 10_001}, "SCHEMA_TOO_LARGE", "/schema"),
        (nested(64, {}), "SCHEMA_TOO_LARGE", "/schema" + "/a" * 64),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_schema_that_is_wrong_or_too_large(schema: Any, code: str, pointer: str) -> None:
    fault = refusal(schema)
    assert (fault.code, fault.pointer) == (code, pointer)
    assert len(fault.message) <= 300


def test_a_very_deep_schema_is_refused_without_a_crash() -> None:
    assert refusal(nested(5_000, {})).code == "SCHEMA_TOO_LARGE"
    cycle: dict[str, Any] = {}
    cycle["not"] = cycle
    assert refusal(cycle).code == "SCHEMA_TOO_LARGE"


def doubling(levels: int, keyword: str = "allOf") -> dict[str, Any]:
    """2^levels sub-schemas when written out."""
    twice = {
        f"a{n}": {keyword: [{"$ref": f"#/$defs/a{n + 1}"}, {"$ref": f"#/$defs/a{n + 1}"}]}
        for n in range(levels)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**twice, f"a{levels}": {"type": "string"}}}


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "oneOf"])
def test_references_that_fan_out_are_refused(keyword: str) -> None:
    assert compile_schema(doubling(8, keyword)).shape.cost > 2**8
    for levels in (22, 60):
        schema = doubling(levels, keyword)
        fault, calls = calls_made(partial(refusal, schema))
        assert fault.code == "SCHEMA_TOO_LARGE"
        assert calls < 500 * levels


def test_a_long_chain_of_references_is_refused() -> None:
    def chain(length: int) -> dict[str, Any]:
        links = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(length)}
        return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "string"}}}

    assert not compile_schema(chain(60)).is_valid(1)
    assert refusal(chain(2_000)).code == "SCHEMA_TOO_LARGE"
    # Already measured from its far end, the chain is still too long as a whole.
    late = chain(2_000)
    late["$defs"] = {key: late["$defs"][key] for key in sorted(late["$defs"])}
    late["allOf"] = [{"$ref": f"#/$defs/a{n}"} for n in range(1_999, 0, -60)]
    late.pop("$ref")
    assert refusal(late).code == "SCHEMA_TOO_LARGE"


def test_recursive_schemas_are_fine() -> None:
    tree = {
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}},
        "additionalProperties": False,
    }
    validator = compile_schema(tree)
    assert validator.shape.loops == 2
    assert validator.is_valid({"left": {"right": {}}})
    [violation] = validator.errors({"left": {"right": {"up": {}}}})
    assert violation.pointer == "/left/right"
    assert compile_schema({"$ref": "#"}).is_valid(1)


def test_recursive_errors_do_not_multiply() -> None:
    """Each level doubles the engine's own list of errors; 2^60 would never come back."""
    schema = {
        "anyOf": [{"properties": {"a": {"$ref": "#"}}}, {"properties": {"a": {"$ref": "#"}}}],
        "type": "object",
    }
    [violation] = compile_schema(schema).errors(nested(60))
    assert (violation.pointer, violation.keyword) == ("", "schema")
    chain = {"properties": {"a": {"$ref": "#"}}, "type": "object"}
    [found] = compile_schema(chain).errors(nested(60))
    assert found.pointer == "/a" * 60
    assert found.keyword == "type"


# --- regular expressions and sizes


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|aa)+$", "^(.*a){20}$", "(x+x+)+y"])
def test_no_pattern_runs_away(pattern: str) -> None:
    validator = compile_schema({"pattern": pattern})
    assert not validator.is_valid("a" * 50_000 + "!")


def test_useful_patterns_fit() -> None:
    compile_schema({"pattern": r"^[\p{L}\d]{1,40}$"})
    compile_schema({"pattern": r"^\w{1,32}$", "patternProperties": {"^x-": True}})


def test_a_huge_enum_is_quick_within_its_limit() -> None:
    validator = compile_schema({"enum": [f"value {n}" for n in range(5_000)]})
    assert validator.is_valid("value 4999")
    [violation] = validator.errors("secret")
    assert len(violation.message) <= 300


def test_too_much_work_is_refused_unseen() -> None:
    schema = {"allOf": [{"items": {"type": "integer", "minimum": n}} for n in range(4_000)]}
    validator = compile_schema(schema)
    value = [5_000] * 50_000
    assert not validator.is_valid(value)
    [violation] = validator.errors(value)
    assert (violation.pointer, violation.keyword) == ("", "schema")
    assert validator.is_valid([5_000] * 50)


# --- reasons


def test_reasons_are_readable_and_never_quote_the_value() -> None:
    secret = "s3cret" * 10
    validator = compile_schema(
        {
            "properties": {
                "type": {"type": "integer"},
                "length": {"maxLength": 3},
                "enum": {"enum": [1, 2]},
                "const": {"const": 1},
                "pattern": {"pattern": "^a$"},
                "any": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "one": {"oneOf": [{"type": "integer"}, {"type": "null"}]},
                "not": {"not": {"type": "string"}},
                "never": False,
                "unique": {"uniqueItems": True},
                "contains": {"contains": {"type": "integer"}},
                "names": {"propertyNames": {"maxLength": 60}},
            },
            "required": ["missing/1"],
        }
    )
    names = ["type", "length", "enum", "const", "pattern", "any", "one", "not", "never"]
    value: dict[str, Any] = dict.fromkeys(names, secret)
    value |= {"unique": [secret, secret], "contains": [secret], "names": {"short": secret}}
    found = validator.errors(value)
    assert {violation.pointer for violation in found} >= {"/" + name for name in names}
    assert not any("s3cret" in violation.message for violation in found)
    by_pointer = {violation.pointer: violation for violation in found}
    assert by_pointer["/type"].message == 'the value is not of type "integer"'
    assert by_pointer["/type"].keyword == "type"
    assert by_pointer["/missing~11"].message == "is required"
    assert by_pointer["/missing~11"].keyword == "required"
    assert by_pointer["/never"].message == "nothing is allowed here"
    assert by_pointer["/never"].keyword == "falseSchema"


def test_bare_false_is_told_by_the_keyword_that_holds_it() -> None:
    [closed] = compile_schema({"additionalProperties": False}).errors({"x": 1})
    assert (closed.pointer, closed.keyword) == ("", "additionalProperties")
    [never] = compile_schema(False).errors({"x": 1})
    assert (never.pointer, never.keyword) == ("", "falseSchema")


def test_reasons_are_bounded() -> None:
    validator = compile_schema({"items": {"type": "string"}})
    assert len(validator.errors([1] * 100)) == 20
    assert validator.errors(["x"] * 100) == []


def test_long_keys_do_not_make_long_reasons() -> None:
    validator = compile_schema({"additionalProperties": {"type": "string"}})
    [violation] = validator.errors({"k" * 100_000: 1})
    assert len(violation.pointer) == 1_000
    for key in ("/" * 5_000, "k" + "/" * 5_000):
        [violation] = validator.errors({key: 1})
        assert tokens(violation.pointer)
    [closed] = compile_schema({"properties": {"a": True}, "additionalProperties": False}).errors(
        {"k" * 100_000: 1}
    )
    assert len(closed.message) == 300


def test_large_values_are_searched_part_by_part() -> None:
    schema = {
        "type": "object",
        "properties": {
            "rows": {
                "type": "array",
                "prefixItems": [{"type": "string"}],
                "items": {"$ref": "#/$defs/row"},
            },
            "name": {"type": "string"},
            "other": {"type": "object"},
        },
        "$defs": {"row": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    }
    rows: list[Any] = ["head", *({"n": n} for n in range(20_000))]
    rows[7] = {"n": "seven"}
    rows[19_999] = {"n": None}
    validator = compile_schema(schema)
    found, calls = calls_made(partial(validator.errors, {"rows": rows, "name": "x"}))
    assert calls < 40 * len(rows)
    assert [(violation.pointer, violation.keyword) for violation in found] == [
        ("/rows/7/n", "type"),
        ("/rows/19999/n", "type"),
    ]


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"maxItems": 3}, [1] * 5_000),
        ({"maxProperties": 3}, {str(n): n for n in range(5_000)}),
        ({"propertyNames": {"maxLength": 1}}, {f"k{n}": n for n in range(100_000)}),
        ({"anyOf": [{"items": {"type": "string"}}] * 2}, [1] * 100_000),
        ({"type": "string"}, [1] * 5_000),
        (False, [1] * 5_000),
        ({"allOf": [False]}, "x" * 10),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_where_no_part_is_to_blame_the_whole_is(schema: Any, value: Any) -> None:
    [violation] = compile_schema(schema).errors(value)
    assert violation.pointer == ""


# --- parts and relocation


def test_a_part_stands_alone_with_its_references() -> None:
    root = {
        "$id": "https://example.com/x",
        "properties": {"a": {"items": {"$ref": "#/$defs/n"}}, "b": {"type": "string"}},
        "$defs": {"n": {"type": "integer"}},
    }
    part = root["properties"]["a"]  # type: ignore[index]
    alone = compile_derived(standing_alone(part, root))
    assert alone.is_valid([1])
    assert not alone.is_valid(["x"])
    plain = root["properties"]["b"]  # type: ignore[index]
    assert standing_alone(plain, root) is plain
    assert standing_alone(root, root) is root
    assert standing_alone(True, root) is True


def test_relocation_touches_references_only_where_schemas_are() -> None:
    schema = {
        "$ref": "#/$defs/x",
        "const": {"$ref": "#/a"},
        "properties": {"$ref": {"$ref": "#"}, "t": True},
        "allOf": [{"$ref": "#/b"}],
        "not": {"$ref": "#/c"},
        "default": {"$id": "kept"},
        "$defs": {"x": {"$id": "dropped"}},
    }
    assert relocate(schema, "/p") == {
        "$ref": "#/p/$defs/x",
        "const": {"$ref": "#/a"},
        "properties": {"$ref": {"$ref": "#/p"}, "t": True},
        "allOf": [{"$ref": "#/p/b"}],
        "not": {"$ref": "#/p/c"},
        "default": {"$id": "kept"},
        "$defs": {"x": {}},
    }
    assert relocate(False, "/p") is False
    assert fragment("properties", "a b/ü~") == "/properties/a%20b~1%C3%BC~0"


def test_helpers_bear_schemas_that_were_not_compiled() -> None:
    odd: dict[str, Any] = {"allOf": 5, "properties": [], "$ref": 7, "patternProperties": 1}
    assert relocate(odd, "/p") == odd
    assert list(children(odd)) == []
    assert list(children(True)) == []
    assert has_reference({"not": {"$ref": "#"}})
    assert not has_reference({"const": {"$ref": "#"}})
    assert referenced({"a": 1}, "#/a") is None
    assert referenced({"a": {}}, "#/b") is None
    assert follow({}, {"$ref": "#/nope"}) == {"$ref": "#/nope"}
    assert follow({"$ref": "#"}, {"$ref": "#"}) == {"$ref": "#"}
    root: dict[str, Any] = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": True}}
    assert follow(root, root) is True


# --- cache


def test_a_schema_is_compiled_once() -> None:
    first = compile_schema({"type": "string", "title": "cached"})
    assert compile_schema({"title": "cached", "type": "string"}) is first
    assert compile_derived({"title": "cached", "type": "string"}) is not first
    assert canonical_sha256({"a": 1, "b": 2}) == canonical_sha256({"b": 2, "a": 1})


def test_the_cache_is_bounded_and_drops_what_nobody_asks_for() -> None:
    cache = json_schema._Cache(weight_max=20)
    validators = [compile_schema({"const": n}) for n in range(4)]
    keys = [(bytes([n]), 1) for n in range(4)]
    cache.put(keys[0], validators[0], 6)
    cache.put(keys[1], validators[1], 6)
    assert cache.get(keys[0]) is validators[0]
    assert cache.get(keys[0]) is validators[0]
    cache.put(keys[2], validators[2], 6)
    assert cache.get(keys[1]) is None
    assert cache.get(keys[0]) is validators[0]
    assert cache.get(keys[2]) is validators[2]
    cache.put(keys[3], validators[3], CACHE_WEIGHT_MAX)
    assert cache.get(keys[3]) is validators[3]
    assert cache.get(keys[0]) is None
