"""Ollama's own wire: /api/chat, /api/embed and /api/tags.

https://github.com/ollama/ollama/blob/main/docs/api.md. A prompt that is longer than the context of
the server is refused: by itself Ollama would drop the oldest messages and say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from app.adapters.providers.endpoint import Endpoint
from app.adapters.providers.exchange import JSON_LINES, Exchange
from app.adapters.providers.failures import BrokenOff, Garbage
from app.adapters.providers.openai_chat import function_tool
from app.adapters.providers.wire import (
    Name,
    Pieces,
    Wire,
    answer_schema,
    arguments_of,
    embeddings_of,
    json_text,
    read,
    stop_of,
    usage_of,
)
from app.domain.chat import (
    AnswerForm,
    ChatAnswer,
    ChatRequest,
    Embeddings,
    Message,
    StopReason,
    ToolCall,
)

# Servers of 2024 end an answer without a reason.
_STOPS = {"": StopReason.END, "stop": StopReason.END, "length": StopReason.LENGTH}


class OllamaProvider:
    """One Ollama server. Implements `Provider`."""

    def __init__(self, endpoint: Endpoint) -> None:
        headers = {}
        if endpoint.key is not None:
            headers["Authorization"] = f"Bearer {endpoint.key.get_secret_value()}"
        self._name = endpoint.name
        self._exchange = Exchange(endpoint, headers)

    async def chat(
        self, request: ChatRequest, on_text: Callable[[str], None] | None = None
    ) -> ChatAnswer:
        """See `Provider`."""
        body = self._body(request, is_streamed=on_text is not None)
        if on_text is None:
            return await self._exchange.post("/api/chat", body, request.timeout_s, _answer)
        return await self._exchange.stream(
            "/api/chat", body, request.timeout_s, JSON_LINES, OllamaStream(on_text)
        )

    async def embed(self, model: str, texts: Sequence[str], timeout_s: float) -> Embeddings:
        """See `Provider`. A text that is too long for the model is refused, not cut."""
        body = {"model": model, "input": list(texts), "truncate": False}

        def parse(payload: bytes) -> Embeddings:
            found = read(_Embeddings, payload)
            return embeddings_of(found.embeddings, texts, usage_of(found.prompt_eval_count, 0))

        return await self._exchange.post("/api/embed", body, timeout_s, parse)

    async def models(self, timeout_s: float) -> list[str]:
        """See `Provider`. These are the models that were pulled."""

        def parse(payload: bytes) -> list[str]:
            return sorted(model.name for model in read(_Tags, payload).models)

        return await self._exchange.get("/api/tags", timeout_s, parse)

    async def aclose(self) -> None:
        """See `Provider`."""
        await self._exchange.aclose()

    def _body(self, request: ChatRequest, *, is_streamed: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": request.model,
            "messages": self._messages(request.messages),
            "stream": is_streamed,
            "truncate": False,
        }
        options: dict[str, Any] = {}
        if request.temperature is not None:
            options["temperature"] = request.temperature
        if request.output_tokens_max is not None:
            options["num_predict"] = request.output_tokens_max
        if options:
            body["options"] = options
        if request.tools:
            # The server holds the whole answer to a format, and then no tool can be called.
            body["tools"] = [function_tool(tool) for tool in request.tools]
        elif request.form is AnswerForm.JSON:
            body["format"] = answer_schema(request) or "json"
        return body

    def _messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """A result of a tool names the tool: that is what most templates of models look at."""
        names: dict[str, str] = {}
        found = []
        for message in messages:
            one: dict[str, Any] = {"role": message.role.value, "content": message.text}
            if message.call_id:
                one["tool_name"] = names.get(message.call_id, "")
                one["tool_call_id"] = message.call_id
            if message.tool_calls:
                names.update((call.call_id, call.name) for call in message.tool_calls)
                one["tool_calls"] = [self._call(call) for call in message.tool_calls]
            found.append(one)
        return found

    def _call(self, call: ToolCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": arguments_of(self._name, call)}
        return {"id": call.call_id, "function": function}


# --- answers --------------------------------------------------------------------------------------


class _Function(Wire):
    name: Name
    arguments: dict[str, Any]


class _Call(Wire):
    id: str = ""
    function: _Function


class _Message(Wire):
    content: str = ""
    tool_calls: list[_Call] | None = None


class _Response(Wire):
    """A whole answer, or a line of a streamed one: the last line is `done` and has the counts."""

    message: _Message | None = None
    done: bool = False
    done_reason: str = ""
    prompt_eval_count: Any = None
    eval_count: Any = None
    error: Any = None


def _answer(payload: bytes) -> ChatAnswer:
    """An answer that was not streamed is a stream of one line."""
    stream = OllamaStream(lambda _: None)
    if not stream.take(payload):
        raise Garbage("is not done")
    return stream.answer()


class OllamaStream:
    """Lines until the one that is `done`. Calls of tools come whole."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._pieces = Pieces(on_text)
        self._calls: list[ToolCall] = []
        self._last = _Response()

    def take(self, payload: bytes) -> bool:
        """See `AnswerStream`."""
        self._last = read(_Response, payload)
        if self._last.error is not None:
            # Ollama has no words for its errors, only sentences.
            raise BrokenOff("")
        if self._last.message is not None:
            self._pieces.add(self._last.message.content)
            for call in self._last.message.tool_calls or ():
                # Older servers give calls no id; ours are unique within the answer.
                call_id = call.id or f"call_{len(self._calls)}"
                arguments = json_text(call.function.arguments)
                self._calls.append(ToolCall(call_id, call.function.name, arguments))
        return self._last.done

    def answer(self) -> ChatAnswer:
        """See `AnswerStream`."""
        calls = tuple(self._calls)
        stop = stop_of(self._last.done_reason, _STOPS, calls)
        usage = usage_of(self._last.prompt_eval_count, self._last.eval_count)
        return ChatAnswer(self._pieces.text, stop, usage, calls)


class _Embeddings(Wire):
    embeddings: list[list[float]]
    prompt_eval_count: Any = None


class _Tag(Wire):
    name: Name


class _Tags(Wire):
    models: list[_Tag]
