"""The pure parts of MCP: headers from parameters, pins, registrations, and streams of events."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.capabilities.mcp_http import event_data
from app.adapters.capabilities.mcp_import import registrations
from app.adapters.capabilities.mcp_params import MirrorInvalid, header_value, mirrored, mirrors_of
from app.adapters.capabilities.mcp_protocol import Garbled, pin_of, tools_in
from app.domain.capability import Effect
from app.domain.errors import ContractError
from tests.capability_samples import compiled

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


# --- headers --------------------------------------------------------------------------------------


@given(TEXT)
def test_a_header_value_is_plain_and_can_be_read_back(text: str) -> None:
    value = header_value(text)
    assert re.fullmatch(r"[\x20-\x7e\t]*", value)
    assert value == value.strip()
    coded = re.fullmatch(r"=\?base64\?(.*)\?=", value)
    assert (base64.b64decode(coded[1]).decode() if coded else value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("us-west1", "us-west1"),
        ("Hello, 世界", "=?base64?SGVsbG8sIOS4lueVjA==?="),
        (" padded ", "=?base64?IHBhZGRlZCA=?="),
        ("line1\nline2", "=?base64?bGluZTEKbGluZTI=?="),
        ("=?base64?literal?=", "=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?="),
        ("", ""),
    ],
)
def test_the_examples_of_the_specification(text: str, value: str) -> None:
    assert header_value(text) == value


def marked(kind: str, name: object) -> dict[str, Any]:
    return {"type": kind, "x-mcp-header": name}


def test_only_arguments_that_are_there_are_repeated() -> None:
    mirrors = mirrors_of(
        {
            "type": "object",
            "properties": {
                "a": marked("string", "A"),
                "in": {"type": "object", "properties": {"n": marked("integer", "Num")}},
                "on": marked("boolean", "On"),
                "plain": {"type": "string", "default": {"x-mcp-header": "data, no annotation"}},
            },
        }
    )
    found = mirrored(mirrors, {"a": "x", "in": {"n": -7}, "on": False, "plain": "p"})
    assert found == {"mcp-param-a": "x", "mcp-param-num": "-7", "mcp-param-on": "false"}
    assert mirrored(mirrors, {"in": {"n": 42.0}}) == {"mcp-param-num": "42"}
    for nothing in ({}, {"a": None, "in": None}, {"in": {"n": 2**53}, "on": [1]}, {"in": 5}):
        assert mirrored(mirrors, nothing) == {}


@pytest.mark.parametrize(
    "properties",
    [
        {"a": marked("string", "")},
        {"a": marked("string", "A b")},
        {"a": marked("string", "A\r\nB: c")},
        {"a": marked("string", 5)},
        {"a": marked("number", "A")},
        {"a": marked("object", "A")},
        {"a": {"x-mcp-header": "A"}},
        {"a": marked("string", "A"), "b": marked("string", "a")},
        {"a": {"type": "array", "items": marked("string", "A")}},
        {"a": {"anyOf": [marked("string", "A")]}},
        {"a": {"type": "object", "additionalProperties": marked("string", "A")}},
    ],
)
def test_annotations_that_break_a_tool(properties: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": properties}
    with pytest.raises(MirrorInvalid):
        mirrors_of(schema)
    assert list(tools_in({"tools": [{"name": "t", "inputSchema": schema}]})) == []


# --- pins and registrations -----------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(["name", "description", "inputSchema"]), JSON), JSON)
def test_a_pin_is_of_what_a_tool_says(listed: dict[str, Any], other: Any) -> None:
    pin = pin_of(listed)
    assert pin == pin_of({**dict(reversed(listed.items())), "title": other, "annotations": other})
    assert pin == pin_of(orjson.loads(orjson.dumps(listed)))
    is_same = orjson.dumps(other) == orjson.dumps(listed.get("description"))
    if not is_same and not isinstance(other, dict | list):
        assert pin_of({**listed, "description": other}) != pin


def test_a_known_pin() -> None:
    """What `sha256sum` says of the canonical text, so that a pin never means something else."""
    listed = {"name": "add", "description": "Adds.", "inputSchema": {"type": "object"}}
    assert pin_of(listed) == PIN


PIN = "2ff88bc9985672f6919a24e7e03425680537d92cd3fc81789b75e073f5b3bbc7"


def test_malformed_tools_are_left_out() -> None:
    good = {"name": "good", "inputSchema": {"type": "object"}, "description": 5}
    listed = [
        7,
        {},
        {"name": 5, "inputSchema": {}},
        {"name": "x"},
        good,
        {**good, "outputSchema": 5},
    ]
    (tool,) = tools_in({"tools": listed})
    assert (tool.name, tool.title, tool.description) == ("good", "", "")


def test_registrations_fit_whatever_a_tool_is_called() -> None:
    listed = [
        {"name": "Get Weather!", "inputSchema": {"type": "object"}, "title": "W" * 999},
        {"name": "x" * 300, "inputSchema": {"type": "object"}, "description": "d" * 9_999},
        {"name": "énorme", "inputSchema": {"type": "object"}, "description": "  "},
    ]
    found = registrations(
        tools_in({"tools": listed}), {"server": "a"}, effect=Effect.PURE, prefix="_Tools.Example"
    )
    assert [each.capability_id for each in found] == [
        "tools.example.get_weather_",
        ("tools.example." + "x" * 300)[:120],
        "tools.example._norme",
    ]
    assert [each.summary for each in found] == ["Get Weather!", "d" * 2_000, "énorme"]
    assert {each.effect for each in found} == {Effect.PURE}


def registered(makes: dict[str, Any]) -> Any:
    """The output contract of a tool with this output schema."""
    listed = {"name": "t", "inputSchema": {"type": "object"}, "outputSchema": makes}
    tools = tools_in({"tools": [listed]})
    (found,) = registrations(tools, {"server": "a"}, effect=Effect.PURE, prefix="p")
    return compiled(found).output


def test_wrapped_output_keeps_its_references() -> None:
    number = {"n": {"type": "integer"}}
    contract = registered({"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}], "$defs": number})
    assert contract.is_valid({"result": 5})
    assert contract.is_valid({"result": None})
    assert not contract.is_valid({"result": "5"})
    assert not contract.is_valid({})


DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def test_an_older_dialect_that_means_the_same() -> None:
    properties = {"dependencies": {"type": "array"}, "n": {"$ref": "#/definitions/n", "title": "N"}}
    more = {"properties": properties, "definitions": {"n": {"exclusiveMinimum": 0}}}
    contract = registered({"$schema": DRAFT_7, "type": "object", **more})
    assert contract.is_valid({"dependencies": [], "n": 1})
    assert not contract.is_valid({"n": 0})


@pytest.mark.parametrize(
    "part",
    [
        {"items": [{"type": "string"}]},
        {"dependencies": {"a": ["b"]}},
        {"properties": {"a": {"$ref": "#", "maxProperties": 1}}},
        {"$schema": "http://json-schema.org/draft-04/schema#"},
    ],
)
def test_an_older_dialect_that_means_something_else(part: dict[str, Any]) -> None:
    with pytest.raises(ContractError):
        registered({"$schema": DRAFT_7, "type": "object", **part})


# --- streams of events ----------------------------------------------------------------------------


async def parts_of(text: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(text), size):
        yield text[start : start + size]
    yield b""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1_000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
async def test_events_in_any_parts(size: int, end: bytes) -> None:
    lines = [
        b": comment",
        b"data: a",
        b"data:b",
        b"data:  c",
        b"id: 1",
        b"",
        b"",
        b"event: message",
        b"data",
        b"data: x:y",
        b"",
        b"event: other",
        b"data: z",
        b"",
        b"data:",
        b"",
        b"data: unfinished",
    ]
    found = [data async for data in event_data(parts_of(end.join(lines), size), 100)]
    assert found == [b"a\nb\n c", b"\nx:y"]


async def test_events_are_bounded() -> None:
    for text in (b"data: " + b"x" * 101, b"data: xxxxx\n" * 21):
        with pytest.raises(Garbled):
            [data async for data in event_data(parts_of(text, 10), 100)]
