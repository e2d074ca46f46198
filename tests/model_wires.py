"""What a model says, in the wires of all vendors: the other side of `app/adapters/providers/`.

Written from the vendors' documents and apart from the code under test. `WHOLES` give the body of an
answer, `STREAMS` the pieces of a streamed one; both are told the request's body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson

from app.domain.chat import ChatAnswer, StopReason, ToolCall, Usage

PIECE_CHARS = 4


def _pieces(text: str) -> list[str]:
    return [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]


def _event(value: Any, name: str = "") -> bytes:
    field_line = f"event: {name}\n".encode() if name else b""
    return field_line + b"data: " + orjson.dumps(value) + b"\n\n"


def vector_of(text: str) -> list[float]:
    """What every model here embeds a text as."""
    return [float(len(text)), 0.5, -1.0]


def embeddings_body(path: str, texts: list[str]) -> dict[str, Any]:
    vectors = [vector_of(text) for text in texts]
    if path == "/api/embed":
        return {"embeddings": vectors, "prompt_eval_count": len(texts)}
    # Backwards: the index counts, not the order.
    data = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return {"data": data[::-1], "usage": {"prompt_tokens": len(texts), "total_tokens": len(texts)}}


_CHAT_REASONS = {
    StopReason.END: "stop",
    StopReason.LENGTH: "length",
    StopReason.TOOLS: "tool_calls",
    StopReason.REFUSED: "stop",
}


def _chat_usage(usage: Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.tokens_in,
        "completion_tokens": usage.tokens_out,
        "prompt_tokens_details": {"cached_tokens": usage.tokens_cached},
    }


def _chat_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _chat_whole(answer: ChatAnswer, _request: dict[str, Any]) -> dict[str, Any]:
    field_name = "refusal" if answer.stop is StopReason.REFUSED else "content"
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    message[field_name] = answer.text
    if answer.tool_calls:
        message["tool_calls"] = [_chat_call(call) for call in answer.tool_calls]
    choice = {"index": 0, "message": message, "finish_reason": _CHAT_REASONS[answer.stop]}
    return {"object": "chat.completion", "choices": [choice], "usage": _chat_usage(answer.usage)}


def _chat_stream(answer: ChatAnswer, request: dict[str, Any]) -> Iterator[bytes]:
    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _event({"object": "chat.completion.chunk", "choices": [choice], "usage": None})

    yield chunk({"role": "assistant", "content": ""})
    field_name = "refusal" if answer.stop is StopReason.REFUSED else "content"
    for piece in _pieces(answer.text):
        yield chunk({field_name: piece})
    for index, call in enumerate(answer.tool_calls):
        first = {**_chat_call(call), "function": {"name": call.name, "arguments": ""}}
        yield chunk({"tool_calls": [{"index": index, **first}]})
        for piece in _pieces(call.arguments):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield chunk({}, _CHAT_REASONS[answer.stop])
    if request["stream_options"]["include_usage"] and answer.usage is not None:
        yield _event({"choices": [], "usage": _chat_usage(answer.usage)})
    yield b"data: [DONE]\n\n"


def _responses_whole(answer: ChatAnswer, _request: dict[str, Any]) -> dict[str, Any]:
    kind = "refusal" if answer.stop is StopReason.REFUSED else "text"
    part = {"type": "refusal" if kind == "refusal" else "output_text", kind: answer.text}
    output: list[dict[str, Any]] = [{"type": "reasoning", "summary": []}]
    if answer.text:
        output.append({"type": "message", "role": "assistant", "content": [part]})
    output += [
        {"type": "function_call", "call_id": c.call_id, "name": c.name, "arguments": c.arguments}
        for c in answer.tool_calls
    ]
    is_cut = answer.stop is StopReason.LENGTH
    usage = answer.usage and {
        "input_tokens": answer.usage.tokens_in,
        "output_tokens": answer.usage.tokens_out,
        "input_tokens_details": {"cached_tokens": answer.usage.tokens_cached},
    }
    return {
        "object": "response",
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "error": None,
        "output": output,
        "usage": usage,
    }


def _responses_stream(answer: ChatAnswer, request: dict[str, Any]) -> Iterator[bytes]:
    whole = _responses_whole(answer, request)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    yield _event({"type": "response.created", "response": begun}, "response.created")
    is_refusal = answer.stop is StopReason.REFUSED
    name = "response.refusal.delta" if is_refusal else "response.output_text.delta"
    for piece in _pieces(answer.text):
        yield _event({"type": name, "delta": piece}, name)
    for call in answer.tool_calls:
        name = "response.function_call_arguments.delta"
        yield _event({"type": name, "delta": call.arguments}, name)
    name = f"response.{whole['status']}"
    yield _event({"type": name, "response": whole}, name)


_MESSAGES_REASONS = {
    StopReason.END: "end_turn",
    StopReason.LENGTH: "max_tokens",
    StopReason.TOOLS: "tool_use",
    StopReason.REFUSED: "refusal",
}


def _messages_blocks(answer: ChatAnswer, request: dict[str, Any]) -> list[dict[str, Any]]:
    """A model that has to call a tool gives its text as the input of the last one."""
    calls = [(call.call_id, call.name, call.arguments) for call in answer.tool_calls]
    is_forced = "tool_choice" in request and not calls
    if is_forced:
        calls = [("toolu_answer", request["tools"][-1]["name"], answer.text)]
    blocks: list[dict[str, Any]] = [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]
    if answer.text and not is_forced:
        blocks.append({"type": "text", "text": answer.text})
    return blocks + [
        {"type": "tool_use", "id": call_id, "name": name, "input": orjson.loads(arguments)}
        for call_id, name, arguments in calls
    ]


def _messages_reason(answer: ChatAnswer, request: dict[str, Any]) -> str:
    is_forced = "tool_choice" in request and answer.stop is StopReason.END
    return "tool_use" if is_forced else _MESSAGES_REASONS[answer.stop]


def _messages_usage(usage: Usage | None) -> dict[str, Any]:
    """One token of the input is written to the cache, if there is one to spare."""
    if usage is None:
        return {}
    fresh = usage.tokens_in - usage.tokens_cached
    written = min(fresh, 1)
    return {
        "input_tokens": fresh - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": usage.tokens_cached,
        "output_tokens": usage.tokens_out,
    }


def _messages_whole(answer: ChatAnswer, request: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "message",
        "role": "assistant",
        "content": _messages_blocks(answer, request),
        "stop_reason": _messages_reason(answer, request),
        "usage": _messages_usage(answer.usage),
    }


def _emptied(block: dict[str, Any]) -> dict[str, Any]:
    """A block as it begins: what it holds comes in pieces."""
    empty: dict[str, Any] = {"text": "", "input": {}}
    return {name: empty.get(name, value) for name, value in block.items()}


def _messages_stream(answer: ChatAnswer, request: dict[str, Any]) -> Iterator[bytes]:
    def event(name: str, **more: Any) -> bytes:
        return _event({"type": name, **more}, name)

    usage = _messages_usage(answer.usage)
    begun = {**usage, "output_tokens": 1} if usage else None
    yield event("message_start", message={"content": [], "stop_reason": None, "usage": begun})
    yield event("ping")
    for index, block in enumerate(_messages_blocks(answer, request)):
        yield event("content_block_start", index=index, content_block=_emptied(block))
        if block["type"] == "text":
            deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(block["text"])]
        elif block["type"] == "tool_use":
            text = orjson.dumps(block["input"]).decode() if block["input"] else ""
            deltas = [{"type": "input_json_delta", "partial_json": p} for p in ("", *_pieces(text))]
        else:
            deltas = [{"type": "signature_delta", "signature": "s"}]
        for delta in deltas:
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    reason = {"stop_reason": _messages_reason(answer, request), "stop_sequence": None}
    counts = {"output_tokens": usage["output_tokens"]} if usage else None
    yield event("message_delta", delta=reason, usage=counts)
    yield event("message_stop")


def _ollama_whole(answer: ChatAnswer, _request: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "thinking": "Hm."}
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": c.call_id, "function": {"name": c.name, "arguments": orjson.loads(c.arguments)}}
            for c in answer.tool_calls
        ]
    reason = "length" if answer.stop is StopReason.LENGTH else "stop"
    counts = (
        {}
        if answer.usage is None
        else {
            "prompt_eval_count": answer.usage.tokens_in,
            "eval_count": answer.usage.tokens_out,
        }
    )
    return {"message": message, "done": True, "done_reason": reason, **counts}


def _ollama_stream(answer: ChatAnswer, request: dict[str, Any]) -> Iterator[bytes]:
    whole = _ollama_whole(answer, request)
    for piece in _pieces(answer.text):
        yield orjson.dumps({"message": {"content": piece}, "done": False}) + b"\n"
    if answer.tool_calls:
        message = {"content": "", "tool_calls": whole["message"]["tool_calls"]}
        yield orjson.dumps({"message": message, "done": False}) + b"\n"
    yield orjson.dumps({**whole, "message": {"content": ""}}) + b"\n"


WHOLES: dict[str, Callable[[ChatAnswer, dict[str, Any]], dict[str, Any]]] = {
    "/v1/chat/completions": _chat_whole,
    "/v1/responses": _responses_whole,
    "/v1/messages": _messages_whole,
    "/api/chat": _ollama_whole,
}
STREAMS: dict[str, Callable[[ChatAnswer, dict[str, Any]], Iterator[bytes]]] = {
    "/v1/chat/completions": _chat_stream,
    "/v1/responses": _responses_stream,
    "/v1/messages": _messages_stream,
    "/api/chat": _ollama_stream,
}
