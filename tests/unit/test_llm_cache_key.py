"""The key of a cached answer: equal for equal requests anywhere, another for any other part."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.chat import AnswerForm, ChatRequest, ChatRole, Message, Tool, ToolCall
from app.llm.cache import CODE_VERSION, cache_key
from app.version import VERSION

TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
SCHEMAS = st.dictionaries(TEXT, JSON, max_size=4)
CALLS = st.builds(ToolCall, TEXT, TEXT, TEXT)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(ChatRole),
    text=TEXT,
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    call_id=TEXT,
)
REQUESTS = st.builds(
    ChatRequest,
    model=TEXT,
    messages=st.lists(MESSAGES, min_size=1, max_size=3).map(tuple),
    timeout_s=st.floats(0.1, 100),
    output_tokens_max=st.none() | st.integers(1, 10_000),
    temperature=st.none() | st.floats(0, 2),
    form=st.sampled_from(AnswerForm),
    schema=st.none() | SCHEMAS,
    tools=st.lists(st.builds(Tool, TEXT, TEXT, SCHEMAS), max_size=2).map(tuple),
)

REQUEST = ChatRequest(
    model="gpt-x",
    messages=(
        Message(ChatRole.SYSTEM, "Be brief."),
        Message(ChatRole.USER, "Привет, 世界"),
        Message(ChatRole.ASSISTANT, "", (ToolCall("c1", "find", '{"q":1}'),)),
        Message(ChatRole.TOOL, "found", call_id="c1"),
    ),
    timeout_s=30.0,
    output_tokens_max=256,
    temperature=0.2,
    form=AnswerForm.JSON,
    schema={"type": "object", "properties": {"a": {"type": "string"}, "b": {"minimum": 0.5}}},
    tools=(Tool("find", "Finds.", {"type": "object", "required": ["q"]}),),
)


def key_of(request: ChatRequest, **changes: str) -> str:
    parts = {"provider": "openai", "tenant_id": "t1", "inputs_sha256": "d1", "code_version": "v1"}
    return cache_key(request, **{**parts, **changes})


def reordered(value: Any) -> Any:
    """The same JSON value, with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(REQUESTS, st.floats(0.1, 100))
def test_the_order_of_keys_and_the_time_limit_make_no_difference(
    request: ChatRequest, timeout_s: float
) -> None:
    same = dataclasses.replace(
        request,
        timeout_s=timeout_s,
        schema=request.schema and MappingProxyType(reordered(request.schema)),
        tools=tuple(
            Tool(tool.name, tool.description, reordered(tool.parameters)) for tool in request.tools
        ),
    )

    assert key_of(same) == key_of(request)


PART_CHANGES: list[Callable[[ChatRequest], dict[str, Any]]] = [
    lambda request: {"model": request.model + "x"},
    lambda request: {"messages": (*request.messages, Message(ChatRole.USER, ""))},
    lambda request: {"messages": (changed(request.messages[0]), *request.messages[1:])},
    lambda request: {"output_tokens_max": (request.output_tokens_max or 0) + 1},
    lambda request: {"temperature": 2.5 if request.temperature is None else None},
    lambda request: {"form": next(form for form in AnswerForm if form is not request.form)},
    lambda request: (
        {"schema": {**(request.schema or {}), "another": None}}
        if "another" not in (request.schema or {})
        else {"schema": None}
    ),
    lambda request: {"schema": {} if request.schema is None else None},
    lambda request: {"tools": (*request.tools, Tool("", "", {}))},
]
MESSAGE_CHANGES: list[Callable[[Message], dict[str, Any]]] = [
    lambda message: {"text": message.text + " "},
    lambda message: {"call_id": message.call_id + "x"},
    lambda message: {"role": next(role for role in ChatRole if role is not message.role)},
    lambda message: {"tool_calls": (*message.tool_calls, ToolCall("", "", ""))},
]


def changed(message: Message) -> Message:
    return dataclasses.replace(message, text=f"{message.text}.")


@given(REQUESTS, st.sampled_from(PART_CHANGES))
def test_any_part_of_the_request_makes_another_key(
    request: ChatRequest, change: Callable[[ChatRequest], dict[str, Any]]
) -> None:
    assert key_of(dataclasses.replace(request, **change(request))) != key_of(request)


@given(REQUESTS, st.sampled_from(MESSAGE_CHANGES))
def test_any_part_of_a_message_makes_another_key(
    request: ChatRequest, change: Callable[[Message], dict[str, Any]]
) -> None:
    first, *others = request.messages
    other = dataclasses.replace(first, **change(first))
    assert key_of(dataclasses.replace(request, messages=(other, *others))) != key_of(request)


@given(st.sampled_from(["provider", "tenant_id", "inputs_sha256", "code_version"]), TEXT, TEXT)
def test_who_calls_for_whom_makes_another_key(part: str, one: str, other: str) -> None:
    keys = {key_of(REQUEST, **{part: value}) for value in (one, other)}
    assert len(keys) == len({one, other})


def test_parts_do_not_run_into_each_other() -> None:
    keys = {
        key_of(REQUEST, provider="a", tenant_id="bc"),
        key_of(REQUEST, provider="ab", tenant_id="c"),
        key_of(REQUEST, provider="", tenant_id="abc"),
        key_of(REQUEST, provider='a","tenant_id":"b', tenant_id="c"),
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 1.0}),
        ({"a": 1}, {"a": True}),
        ({"a": "1"}, {"a": 1}),
        ({"a": None}, {}),
        ({"a": "\u00e9"}, {"a": "e\u0301"}),
        ({"a": 2**64}, {"a": 2**64 + 1}),
        ({"a": "\ud800"}, {"a": "\udc00"}),
    ],
)
def test_values_are_taken_as_given(one: dict[str, Any], other: dict[str, Any]) -> None:
    keys = {key_of(dataclasses.replace(REQUEST, schema=schema)) for schema in (one, other)}
    assert len(keys) == 2


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        key_of(dataclasses.replace(REQUEST, temperature=float("nan")))
    with pytest.raises(TypeError):
        key_of(dataclasses.replace(REQUEST, schema={"a": object()}))


GOLDEN = "9434ca0b92b1c24903782c2e97c56a1283bcb7701c7bae2420f92168a2d0b4d9"


def test_the_key_is_the_same_in_every_process_and_release() -> None:
    """It may only change together with `KEY_FORMAT`."""
    code = "from tests.unit.test_llm_cache_key import REQUEST, key_of; print(key_of(REQUEST))"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        told = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            check=True,
            text=True,
        )
        assert told.stdout.strip() == GOLDEN
    assert key_of(REQUEST) == GOLDEN


def test_a_new_release_asks_anew() -> None:
    assert CODE_VERSION.startswith(f"{VERSION}/")
    key = cache_key(REQUEST, provider="openai", tenant_id="t1", inputs_sha256="d1")
    assert key == key_of(REQUEST, code_version=CODE_VERSION)
