"""OpenAI's responses API, the newer dialect for answers. For `openai.py` only.

https://developers.openai.com/api/reference/resources/responses. Nothing stays at the vendor: every
request holds the whole conversation and asks not to be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from app.adapters.providers.failures import BrokenOff, Garbage, error_word
from app.adapters.providers.wire import (
    Name,
    Pieces,
    Wire,
    answer_schema,
    is_strict_schema,
    part,
    read,
    stop_of,
    usage_of,
)
from app.domain.chat import (
    AnswerForm,
    ChatAnswer,
    ChatRequest,
    ChatRole,
    Message,
    StopReason,
    Tool,
    ToolCall,
    Usage,
)

_STOPS = {
    "completed": StopReason.END,
    "max_output_tokens": StopReason.LENGTH,
    "content_filter": StopReason.REFUSED,
}
_TEXT_DELTAS = frozenset({"response.output_text.delta", "response.refusal.delta"})
_END_MARKS = frozenset({"response.completed", "response.incomplete", "response.failed"})


def response_body(request: ChatRequest, is_streamed: bool) -> dict[str, Any]:
    """The body of POST /responses."""
    body: dict[str, Any] = {
        "model": request.model,
        "input": [item for message in request.messages for item in _items(message)],
        "store": False,
    }
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.output_tokens_max is not None:
        body["max_output_tokens"] = request.output_tokens_max
    if request.form is AnswerForm.JSON:
        body["text"] = {"format": _format(request)}
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if is_streamed:
        body["stream"] = True
    return body


def _items(message: Message) -> Iterator[dict[str, Any]]:
    """A turn as items of `input`: the call of a tool and its result are items of their own."""
    if message.role is ChatRole.TOOL:
        yield {
            "type": "function_call_output",
            "call_id": message.call_id,
            "output": message.text,
        }
        return
    if message.text or not message.tool_calls:
        yield {"role": message.role.value, "content": message.text}
    for call in message.tool_calls:
        yield {
            "type": "function_call",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
        }


def _format(request: ChatRequest) -> dict[str, Any]:
    schema = answer_schema(request)
    if schema is None:
        return {"type": "json_object"}
    strict = is_strict_schema(schema)
    return {"type": "json_schema", "name": "answer", "schema": schema, "strict": strict}


def _tool(tool: Tool) -> dict[str, Any]:
    # Unlike chat completions, this API takes a schema for a strict one unless it is told.
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
        "strict": False,
    }


# --- answers --------------------------------------------------------------------------------------


class _Item(Wire):
    """What stands in `output`; of its kinds we read messages and function calls."""

    type: str


class _OutputMessage(Wire):
    content: list[Any]


class _OutputText(Wire):
    text: str


class _Refusal(Wire):
    refusal: str


class _FunctionCall(Wire):
    call_id: Name
    name: Name
    arguments: str


class _IncompleteDetails(Wire):
    reason: str | None = None


class _Response(Wire):
    status: str
    output: list[Any]
    incomplete_details: _IncompleteDetails | None = None
    error: Any = None
    usage: Any = None


def response_answer(payload: bytes) -> ChatAnswer:
    """The answer in the body of a response that was not streamed."""
    return _answer(read(_Response, payload))


def _answer(found: _Response) -> ChatAnswer:
    if found.status == "failed":
        raise BrokenOff(error_word(found.error))
    texts: list[str] = []
    calls: list[ToolCall] = []
    is_refusal = False
    for item in found.output:
        kind = part(_Item, item).type
        if kind == "function_call":
            call = part(_FunctionCall, item)
            calls.append(ToolCall(call.call_id, call.name, call.arguments))
        elif kind == "message":
            for content in part(_OutputMessage, item).content:
                is_refusal = is_refusal or part(_Item, content).type == "refusal"
                texts.append(_text(content))
    stop = stop_of(_reason(found), _STOPS, calls)
    return ChatAnswer(
        "".join(texts),
        StopReason.REFUSED if is_refusal else stop,
        _usage(found.usage),
        tuple(calls),
    )


def _text(content: Any) -> str:
    kind = part(_Item, content).type
    if kind == "refusal":
        return part(_Refusal, content).refusal
    return part(_OutputText, content).text if kind == "output_text" else ""


def _reason(found: _Response) -> str | None:
    if found.status != "incomplete":
        return found.status
    return found.incomplete_details.reason if found.incomplete_details is not None else None


def _usage(found: Any) -> Usage | None:
    if not isinstance(found, dict):
        return None
    details = found.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return usage_of(found.get("input_tokens"), found.get("output_tokens"), cached)


class _Event(Wire):
    """The other fields depend on the type; an `error` has its code beside it or in an object."""

    type: str
    delta: Any = None
    response: Any = None
    code: Any = None
    error: Any = None


class _TextDelta(Wire):
    delta: str


class ResponseStream:
    """Events until one that ends the response, which holds it as a whole once more."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._pieces = Pieces(on_text)
        self._response: Any = None

    def take(self, payload: bytes) -> bool:
        """See `AnswerStream`."""
        event = read(_Event, payload)
        if event.type == "error":
            raise BrokenOff(error_word(event.error or {"code": event.code}))
        if event.type in _TEXT_DELTAS:
            self._pieces.add(part(_TextDelta, {"delta": event.delta}).delta)
        self._response = event.response
        return event.type in _END_MARKS

    def answer(self) -> ChatAnswer:
        """See `AnswerStream`. Raises `Garbage` for a whole that is not what was told in pieces."""
        answer = _answer(part(_Response, self._response))
        if answer.text != self._pieces.text:
            raise Garbage("is not what its pieces make")
        return answer
