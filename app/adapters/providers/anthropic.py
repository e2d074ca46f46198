"""Anthropic's Messages API. https://platform.claude.com/docs/en/api/messages

A schema is kept in one of two ways. One that the vendor can hold the model to
(`is_strict_schema`) goes into `output_config.format`. Any other is the input of a tool that the
model has to call, and this input is the answer. There is no switch for JSON without a schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from app.adapters.providers.anthropic_answers import MessageStream, message_answer
from app.adapters.providers.endpoint import Endpoint
from app.adapters.providers.exchange import EVENT_STREAM, Exchange
from app.adapters.providers.wire import (
    Name,
    Wire,
    answer_schema,
    arguments_of,
    is_strict_schema,
    read,
)
from app.domain.chat import (
    ANSWER_TOOL,
    ChatAnswer,
    ChatRequest,
    ChatRole,
    Embeddings,
    LlmUnavailableError,
    Message,
    Tool,
)

API_VERSION = "2023-06-01"
OUTPUT_TOKENS_MAX = 4096
"""The vendor demands a limit; this one, which every model allows, holds where none is asked for."""
MODELS_PAGE = 1000


class AnthropicProvider:
    """Anthropic, or one that speaks its wire. Implements `Provider`."""

    def __init__(self, endpoint: Endpoint) -> None:
        headers = {"anthropic-version": API_VERSION}
        if endpoint.key is not None:
            headers["x-api-key"] = endpoint.key.get_secret_value()
        self._name = endpoint.name
        self._exchange = Exchange(endpoint, headers)

    async def chat(
        self, request: ChatRequest, on_text: Callable[[str], None] | None = None
    ) -> ChatAnswer:
        """See `Provider`."""
        body = self._body(request, is_streamed=on_text is not None)
        tool = ANSWER_TOOL if _needs_answer_tool(request) else None
        if on_text is None:
            return await self._exchange.post(
                "/v1/messages",
                body,
                request.timeout_s,
                lambda payload: message_answer(payload, tool),
            )
        return await self._exchange.stream(
            "/v1/messages", body, request.timeout_s, EVENT_STREAM, MessageStream(on_text, tool)
        )

    async def embed(self, model: str, texts: Sequence[str], timeout_s: float) -> Embeddings:
        """Always raises `LlmUnavailableError`: this vendor has no embeddings."""
        raise LlmUnavailableError(
            "provider_refused",
            f"{self._name} has no embeddings",
            retryable=False,
            target_failed=False,
        )

    async def models(self, timeout_s: float) -> list[str]:
        """See `Provider`. One page, the largest there is, holds them all by far."""

        def parse(payload: bytes) -> list[str]:
            return sorted(model.id for model in read(_Models, payload).data)

        return await self._exchange.get(f"/v1/models?limit={MODELS_PAGE}", timeout_s, parse)

    async def aclose(self) -> None:
        """See `Provider`."""
        await self._exchange.aclose()

    def _body(self, request: ChatRequest, *, is_streamed: bool) -> dict[str, Any]:
        system = [m.text for m in request.messages if m.role is ChatRole.SYSTEM]
        body: dict[str, Any] = {
            "model": request.model,
            "max_tokens": request.output_tokens_max or OUTPUT_TOKENS_MAX,
            "messages": self._messages(request.messages),
        }
        if system:
            body["system"] = "\n\n".join(system)
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.tools:
            body["tools"] = [_tool(tool) for tool in request.tools]
        body.update(_held_to_schema(request))
        if is_streamed:
            body["stream"] = True
        return body

    def _messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The turns; the results of one turn's tool calls stand together, as the API demands."""
        found: list[dict[str, Any]] = []
        last: ChatRole | None = None
        for message in messages:
            if message.role is ChatRole.SYSTEM:
                continue
            if message.role is ChatRole.TOOL and last is ChatRole.TOOL:
                found[-1]["content"].append(_tool_result(message))
            elif message.role is ChatRole.TOOL:
                found.append({"role": "user", "content": [_tool_result(message)]})
            else:
                found.append({"role": message.role.value, "content": self._content(message)})
            last = message.role
        return found

    def _content(self, message: Message) -> str | list[dict[str, Any]]:
        if not message.tool_calls:
            return message.text
        # A text block must not be empty.
        blocks: list[dict[str, Any]] = []
        if message.text:
            blocks.append({"type": "text", "text": message.text})
        for call in message.tool_calls:
            arguments = arguments_of(self._name, call)
            blocks.append(
                {"type": "tool_use", "id": call.call_id, "name": call.name, "input": arguments}
            )
        return blocks


def _tool_result(message: Message) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": message.call_id, "content": message.text}


def _tool(tool: Tool) -> dict[str, Any]:
    return {
        "name": tool.name,
        "description": tool.description,
        "input_schema": dict(tool.parameters),
    }


def _needs_answer_tool(request: ChatRequest) -> bool:
    """Tools take every schema of an object, but no other."""
    schema = answer_schema(request)
    return schema is not None and schema.get("type") == "object" and not is_strict_schema(schema)


def _held_to_schema(request: ChatRequest) -> dict[str, Any]:
    """The fields of the body that make the answer keep its schema."""
    schema = answer_schema(request)
    if schema is None:
        return {}
    if is_strict_schema(schema):
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    if not _needs_answer_tool(request):
        return {}
    answer = Tool(ANSWER_TOOL, "Give the final answer, as the input of this tool.", schema)
    return {
        "tools": [_tool(tool) for tool in (*request.tools, answer)],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }


class _Model(Wire):
    id: Name


class _Models(Wire):
    data: list[_Model]
