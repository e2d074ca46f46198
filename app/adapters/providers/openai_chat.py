"""OpenAI's chat completions, which most other vendors speak as well. For `openai.py` only.

https://developers.openai.com/api/reference/resources/chat
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.adapters.providers.failures import BrokenOff, Garbage, error_word
from app.adapters.providers.wire import (
    Name,
    Pieces,
    Wire,
    answer_schema,
    is_strict_schema,
    read,
    stop_of,
    usage_of,
)
from app.domain.chat import (
    AnswerForm,
    ChatAnswer,
    ChatRequest,
    Message,
    StopReason,
    Tool,
    ToolCall,
    Usage,
)

_STOPS = {
    "stop": StopReason.END,
    "length": StopReason.LENGTH,
    "tool_calls": StopReason.TOOLS,
    "content_filter": StopReason.REFUSED,
}


def chat_body(limit_name: str, request: ChatRequest, is_streamed: bool) -> dict[str, Any]:
    """The body of POST /chat/completions, with this name for the limit of output tokens."""
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_message(message) for message in request.messages],
    }
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.output_tokens_max is not None:
        body[limit_name] = request.output_tokens_max
    if request.form is AnswerForm.JSON:
        body["response_format"] = _response_format(request)
    if request.tools:
        body["tools"] = [function_tool(tool) for tool in request.tools]
    if is_streamed:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return body


def _message(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role.value, "content": message.text}
    if message.call_id:
        found["tool_call_id"] = message.call_id
    if message.tool_calls:
        # The content of an assistant that only calls is null, not the empty text.
        found["content"] = message.text or None
        found["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return found


def _response_format(request: ChatRequest) -> dict[str, Any]:
    schema = answer_schema(request)
    if schema is None:
        return {"type": "json_object"}
    shape = {"name": "answer", "schema": schema, "strict": is_strict_schema(schema)}
    return {"type": "json_schema", "json_schema": shape}


def function_tool(tool: Tool) -> dict[str, Any]:
    """A tool in the form that Ollama has taken over, too."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


# --- answers --------------------------------------------------------------------------------------


class _Function(Wire):
    name: Name
    arguments: str


class _Call(Wire):
    id: Name
    function: _Function


class _Message(Wire):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(Wire):
    message: _Message
    finish_reason: str | None = None


class _Completion(Wire):
    choices: list[_Choice]
    usage: Any = None


def chat_answer(payload: bytes) -> ChatAnswer:
    """The answer in the body of a completion that was not streamed."""
    found = read(_Completion, payload)
    if not found.choices:
        raise Garbage("holds no choice")
    choice = found.choices[0]
    calls = tuple(
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in choice.message.tool_calls or ()
    )
    refusal = choice.message.refusal or ""
    return ChatAnswer(
        (choice.message.content or "") + refusal,
        _stop(choice.finish_reason, calls, is_refusal=bool(refusal)),
        _usage(found.usage),
        calls,
    )


def _stop(reason: str | None, calls: tuple[ToolCall, ...], *, is_refusal: bool) -> StopReason:
    return StopReason.REFUSED if is_refusal else stop_of(reason, _STOPS, calls)


def _usage(found: Any) -> Usage | None:
    if not isinstance(found, dict):
        return None
    details = found.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return usage_of(found.get("prompt_tokens"), found.get("completion_tokens"), cached)


class _FunctionDelta(Wire):
    name: str | None = None
    arguments: str | None = None


class _CallDelta(Wire):
    index: int
    id: str | None = None
    function: _FunctionDelta | None = None


class _Delta(Wire):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_CallDelta] | None = None


class _ChoiceDelta(Wire):
    delta: _Delta
    finish_reason: str | None = None


class _Chunk(Wire):
    choices: tuple[_ChoiceDelta, ...] = ()
    usage: Any = None
    error: Any = None


class ChatStream:
    """Chunks until `[DONE]`. The usage comes in one of the last, where the server counts."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._pieces = Pieces(on_text)
        self._calls: dict[int, _CallParts] = {}
        self._reason: str | None = None
        self._is_refusal = False
        self._usage: Any = None

    def take(self, payload: bytes) -> bool:
        """See `AnswerStream`."""
        if payload == b"[DONE]":
            return True
        chunk = read(_Chunk, payload)
        if chunk.error is not None:
            raise BrokenOff(error_word(chunk.error))
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices[:1]:
            self._take_choice(choice)
        return False

    def _take_choice(self, choice: _ChoiceDelta) -> None:
        delta = choice.delta
        self._pieces.add(delta.content)
        self._pieces.add(delta.refusal)
        self._is_refusal = self._is_refusal or bool(delta.refusal)
        self._reason = choice.finish_reason or self._reason
        for part in delta.tool_calls or ():
            self._calls.setdefault(part.index, _CallParts()).take(part)

    def answer(self) -> ChatAnswer:
        """See `AnswerStream`."""
        calls = tuple(call.whole() for _, call in sorted(self._calls.items()))
        stop = _stop(self._reason, calls, is_refusal=self._is_refusal)
        return ChatAnswer(self._pieces.text, stop, _usage(self._usage), calls)


class _CallParts:
    """A tool call as it grows: the first part has its id and name, its arguments come in pieces."""

    def __init__(self) -> None:
        self._call_id = ""
        self._name = ""
        self._arguments: list[str] = []

    def take(self, part: _CallDelta) -> None:
        self._call_id = self._call_id or part.id or ""
        if part.function is not None:
            self._name = self._name or part.function.name or ""
            self._arguments.append(part.function.arguments or "")

    def whole(self) -> ToolCall:
        if not self._call_id or not self._name:
            raise Garbage("holds a tool call without its id or name")
        return ToolCall(self._call_id, self._name, "".join(self._arguments))
