"""What every provider of models sends, byte for byte."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from app.adapters.providers import make_provider
from app.domain.chat import (
    AnswerForm,
    ChatRole,
    Message,
    StopReason,
    ToolCall,
)
from app.ports import Provider
from app.version import VERSION
from tests.model_server import ModelServer, running_model_server
from tests.providers import CALLS, OPEN_SCHEMA, PATHS, SCHEMA, WEATHER, WIRES, Wire, asked

CONVERSATION = (
    Message(ChatRole.SYSTEM, "Be brief."),
    Message(ChatRole.SYSTEM, "Use tools."),
    Message(ChatRole.USER, "How warm is it?"),
    Message(ChatRole.ASSISTANT, "Let me look.", CALLS[:1]),
    Message(ChatRole.TOOL, "21 °C", call_id="call_a"),
    Message(ChatRole.ASSISTANT, "", (ToolCall("call_c", "weather", "{}"), CALLS[1])),
    Message(ChatRole.TOOL, "none", call_id="call_c"),
    Message(ChatRole.TOOL, "both", call_id="call_b"),
)


@pytest.fixture(params=WIRES, ids="-".join)
def wire(request: pytest.FixtureRequest) -> Wire:
    found: Wire = request.param
    return found


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with running_model_server() as running:
        yield running


@pytest.fixture
async def provider(server: ModelServer, wire: Wire) -> AsyncIterator[Provider]:
    kind, api = wire
    running = make_provider(server.endpoint(kind, api))
    yield running
    await running.aclose()


HELLO = [{"role": "user", "content": "Hello"}]
MINIMAL: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "small-1", "messages": HELLO},
    "/v1/responses": {"model": "small-1", "input": HELLO, "store": False},
    "/v1/messages": {"model": "small-1", "max_tokens": 4096, "messages": HELLO},
    "/api/chat": {"model": "small-1", "messages": HELLO, "stream": False, "truncate": False},
}
STREAMED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"stream": True, "stream_options": {"include_usage": True}},
    "/v1/responses": {"stream": True},
    "/v1/messages": {"stream": True},
    "/api/chat": {"stream": True},
}


async def test_a_request_says_no_more_than_was_asked(
    provider: Provider, server: ModelServer, wire: Wire
) -> None:
    await provider.chat(asked())
    await provider.chat(asked(), lambda _: None)
    whole, streamed = server.requests
    path = PATHS[wire]
    assert (whole.method, whole.target, streamed.target) == ("POST", path, path)
    assert whole.body == orjson.dumps(MINIMAL[path])
    assert streamed.body == orjson.dumps({**MINIMAL[path], **STREAMED[path]})


async def test_the_headers_are_these(server: ModelServer, wire: Wire) -> None:
    kind, api = wire
    more = {"headers": {"X-Team": "blue", "user-agent": "ours"}, "project": "folder-1"}
    keyed = make_provider(server.endpoint(kind, api, key="sk-1", **more))
    bare = make_provider(server.endpoint(kind, api))
    await keyed.chat(asked())
    await bare.chat(asked(), lambda _: None)
    await keyed.aclose()
    await bare.aclose()
    first, second = server.requests
    media_type = "application/x-ndjson" if kind == "ollama" else "text/event-stream"
    own = {"anthropic-version": "2023-06-01"} if kind == "anthropic" else {}
    key = {"x-api-key": "sk-1"} if kind == "anthropic" else {"authorization": "Bearer sk-1"}
    folder = {"openai-project": "folder-1"} if kind == "yandex" else {}
    common = {
        "host": f"127.0.0.1:{server.side.port}",
        "accept-encoding": "identity",
        "content-type": "application/json",
        **own,
    }
    assert first.headers == {
        **common,
        "accept": "application/json",
        "content-length": str(len(first.body)),
        "user-agent": "ours",
        "x-team": "blue",
        **key,
        **folder,
    }
    assert second.headers == {
        **common,
        "accept": media_type,
        "content-length": str(len(second.body)),
        "user-agent": f"flexrun/{VERSION}",
    }


def function_tool(**more: Any) -> dict[str, Any]:
    return {"name": "weather", "description": "The weather of a city.", **more}


PARAMETERS = {"type": "object", "properties": {}}
FULL: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "small-1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "How warm is it?"},
            {
                "role": "assistant",
                "content": "Let me look.",
                "tool_calls": [
                    {
                        "id": "call_a",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city":"Köln"}'},
                    }
                ],
            },
            {"role": "tool", "content": "21 °C", "tool_call_id": "call_a"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": call_id,
                        "type": "function",
                        "function": {"name": "weather", "arguments": "{}"},
                    }
                    for call_id in ("call_c", "call_b")
                ],
            },
            {"role": "tool", "content": "none", "tool_call_id": "call_c"},
            {"role": "tool", "content": "both", "tool_call_id": "call_b"},
        ],
        "temperature": 0.0,
        "max_tokens": 77,
        "tools": [{"type": "function", "function": function_tool(parameters=PARAMETERS)}],
    },
    "/v1/responses": {
        "model": "small-1",
        "input": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "How warm is it?"},
            {"role": "assistant", "content": "Let me look."},
            {
                "type": "function_call",
                "call_id": "call_a",
                "name": "weather",
                "arguments": '{"city":"Köln"}',
            },
            {"type": "function_call_output", "call_id": "call_a", "output": "21 °C"},
            *(
                {"type": "function_call", "call_id": call_id, "name": "weather", "arguments": "{}"}
                for call_id in ("call_c", "call_b")
            ),
            {"type": "function_call_output", "call_id": "call_c", "output": "none"},
            {"type": "function_call_output", "call_id": "call_b", "output": "both"},
        ],
        "store": False,
        "temperature": 0.0,
        "max_output_tokens": 77,
        "tools": [{"type": "function", **function_tool(parameters=PARAMETERS, strict=False)}],
    },
    "/v1/messages": {
        "model": "small-1",
        "max_tokens": 77,
        "messages": [
            {"role": "user", "content": "How warm is it?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me look."},
                    {
                        "type": "tool_use",
                        "id": "call_a",
                        "name": "weather",
                        "input": {"city": "Köln"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_a", "content": "21 °C"},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": call_id, "name": "weather", "input": {}}
                    for call_id in ("call_c", "call_b")
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_c", "content": "none"},
                    {"type": "tool_result", "tool_use_id": "call_b", "content": "both"},
                ],
            },
        ],
        "system": "Be brief.\n\nUse tools.",
        "temperature": 0.0,
        "tools": [function_tool(input_schema=PARAMETERS)],
    },
    "/api/chat": {
        "model": "small-1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "How warm is it?"},
            {
                "role": "assistant",
                "content": "Let me look.",
                "tool_calls": [
                    {
                        "id": "call_a",
                        "function": {"name": "weather", "arguments": {"city": "Köln"}},
                    }
                ],
            },
            {
                "role": "tool",
                "content": "21 °C",
                "tool_name": "weather",
                "tool_call_id": "call_a",
            },
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": call_id, "function": {"name": "weather", "arguments": {}}}
                    for call_id in ("call_c", "call_b")
                ],
            },
            {
                "role": "tool",
                "content": "none",
                "tool_name": "weather",
                "tool_call_id": "call_c",
            },
            {
                "role": "tool",
                "content": "both",
                "tool_name": "weather",
                "tool_call_id": "call_b",
            },
        ],
        "stream": False,
        "truncate": False,
        "options": {"temperature": 0.0, "num_predict": 77},
        "tools": [{"type": "function", "function": function_tool(parameters=PARAMETERS)}],
    },
}


async def test_a_conversation_with_tools_and_limits(
    provider: Provider, server: ModelServer, wire: Wire
) -> None:
    request = asked(*CONVERSATION, temperature=0.0, output_tokens_max=77, tools=(WEATHER,))
    await provider.chat(request)
    assert server.requests[0].body == orjson.dumps(FULL[PATHS[wire]])


def in_form(path: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    """What JSON by this schema adds to a request."""
    is_strict = schema == SCHEMA
    if path == "/v1/messages":
        if schema is None:
            return {}
        if is_strict:
            return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
        description = "Give the final answer, as the input of this tool."
        tool = {"name": "give_answer", "description": description, "input_schema": schema}
        choice = {"type": "any", "disable_parallel_tool_use": True}
        return {"tools": [tool], "tool_choice": choice}
    if path == "/api/chat":
        return {"format": schema or "json"}
    if schema is None:
        form: dict[str, Any] = {"type": "json_object"}
    elif path == "/v1/responses":
        form = {"type": "json_schema", "name": "answer", "schema": schema, "strict": is_strict}
    else:
        held = {"name": "answer", "schema": schema, "strict": is_strict}
        form = {"type": "json_schema", "json_schema": held}
    return {"text": {"format": form}} if path == "/v1/responses" else {"response_format": form}


@pytest.mark.parametrize("schema", [None, SCHEMA, OPEN_SCHEMA], ids=["mode", "strict", "open"])
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_json_and_schemas(
    provider: Provider,
    server: ModelServer,
    wire: Wire,
    schema: dict[str, Any] | None,
    is_streamed: bool,
) -> None:
    said = '{"city":"Köln","celsius":21}'
    server.say(said)
    pieces: list[str] = []
    request = asked(form=AnswerForm.JSON, schema=schema)
    found = await provider.chat(request, pieces.append if is_streamed else None)
    assert (found.text, found.stop, found.tool_calls) == (said, StopReason.END, ())
    assert not is_streamed or ("".join(pieces) == said and len(pieces) > 1)
    path = PATHS[wire]
    body = {**MINIMAL[path], **(STREAMED[path] if is_streamed else {}), **in_form(path, schema)}
    assert server.requests[0].json == body
    # A schema is only for answers in JSON.
    await provider.chat(asked(schema=schema))
    assert server.requests[1].json == MINIMAL[path]


async def test_a_schema_of_no_object_is_left_to_the_caller(server: ModelServer) -> None:
    provider = make_provider(server.endpoint("anthropic"))
    await provider.chat(asked(form=AnswerForm.JSON, schema={"type": "array"}))
    assert server.requests[0].json == MINIMAL["/v1/messages"]
    await provider.aclose()
