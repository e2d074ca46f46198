"""Reading the answers of Anthropic's Messages API, whole or streamed. For `anthropic.py` only.

https://platform.claude.com/docs/en/build-with-claude/streaming. An answer is a list of blocks: we
read texts and calls of tools, and pass over all others (thinking).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.adapters.providers.failures import BrokenOff, error_word
from app.adapters.providers.wire import (
    Name,
    Pieces,
    Wire,
    count,
    json_text,
    part,
    read,
    stop_of,
    usage_of,
)
from app.domain.chat import ChatAnswer, StopReason, ToolCall, Usage

_STOPS = {
    "end_turn": StopReason.END,
    "stop_sequence": StopReason.END,
    "max_tokens": StopReason.LENGTH,
    "model_context_window_exceeded": StopReason.LENGTH,
    "tool_use": StopReason.TOOLS,
    "refusal": StopReason.REFUSED,
}


class _Block(Wire):
    type: str


class _TextBlock(Wire):
    text: str


class _ToolUse(Wire):
    id: Name
    name: Name
    input: dict[str, Any]


class _Message(Wire):
    content: list[Any]
    stop_reason: str | None = None
    usage: Any = None


def message_answer(payload: bytes, answer_tool: str | None) -> ChatAnswer:
    """The answer in the body of a message that was not streamed.

    With `answer_tool` the input of that tool is the text of the answer, and other texts are not.
    """
    message = read(_Message, payload)
    blocks = _Blocks(lambda _: None, answer_tool)
    for index, block in enumerate(message.content):
        blocks.start(index, block)
    return blocks.answer(message.stop_reason, _usage(message.usage))


class _Blocks:
    """The blocks of an answer, each given whole or begun and then continued."""

    def __init__(self, on_text: Callable[[str], None], answer_tool: str | None) -> None:
        self._pieces = Pieces(on_text)
        self._answer_tool = answer_tool
        self._answer_index: int | None = None
        self._calls: dict[int, tuple[_ToolUse, list[str]]] = {}

    def start(self, index: int, block: Any) -> None:
        kind = part(_Block, block).type
        if kind == "text":
            self._add_text(part(_TextBlock, block).text)
        elif kind == "tool_use":
            use = part(_ToolUse, block)
            if use.name == self._answer_tool:
                self._answer_index = index
            else:
                self._calls[index] = (use, [])
            if use.input:
                self._add_input(index, json_text(use.input))

    def go_on(self, index: int, delta: Any) -> None:
        kind = part(_Block, delta).type
        if kind == "text_delta":
            self._add_text(part(_TextBlock, delta).text)
        elif kind == "input_json_delta":
            self._add_input(index, part(_InputDelta, delta).partial_json)

    def answer(self, reason: str | None, usage: Usage | None) -> ChatAnswer:
        # The input of a tool that was called with nothing comes in no pieces at all.
        calls = tuple(
            ToolCall(use.id, use.name, "".join(pieces) or "{}")
            for _, (use, pieces) in sorted(self._calls.items())
        )
        is_answered = self._answer_index is not None
        if is_answered and not self._pieces.text:
            self._pieces.add("{}")
        if is_answered and not calls and reason == "tool_use":
            reason = "end_turn"
        return ChatAnswer(self._pieces.text, stop_of(reason, _STOPS, calls), usage, calls)

    def _add_text(self, text: str) -> None:
        if self._answer_tool is None:
            self._pieces.add(text)

    def _add_input(self, index: int, text: str) -> None:
        if index == self._answer_index:
            self._pieces.add(text)
        elif index in self._calls:
            self._calls[index][1].append(text)


def _usage(found: Any) -> Usage | None:
    """The vendor counts what it wrote to its cache and read from it apart from the other input."""
    if not isinstance(found, dict):
        return None
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    counts = [count(found.get(name) or 0) for name in names]
    known = [number for number in counts if number is not None]
    if len(known) < len(names) or "input_tokens" not in found:
        return None
    return usage_of(sum(known), found.get("output_tokens"), counts[-1])


class _InputDelta(Wire):
    partial_json: str


class _MessageStart(Wire):
    usage: Any = None


class _MessageDelta(Wire):
    stop_reason: str | None = None


class _Event(Wire):
    """The other fields depend on the type."""

    type: str
    index: int = 0
    message: Any = None
    content_block: Any = None
    delta: Any = None
    usage: Any = None
    error: Any = None


class MessageStream:
    """Events until `message_stop`."""

    def __init__(self, on_text: Callable[[str], None], answer_tool: str | None) -> None:
        self._blocks = _Blocks(on_text, answer_tool)
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}

    def take(self, payload: bytes) -> bool:
        """See `AnswerStream`."""
        event = read(_Event, payload)
        match event.type:
            case "error":
                raise BrokenOff(error_word(event.error))
            case "message_start":
                self._count(part(_MessageStart, event.message).usage)
            case "content_block_start":
                self._blocks.start(event.index, event.content_block)
            case "content_block_delta":
                self._blocks.go_on(event.index, event.delta)
            case "message_delta":
                self._reason = part(_MessageDelta, event.delta).stop_reason or self._reason
                self._count(event.usage)
        return event.type == "message_stop"

    def answer(self) -> ChatAnswer:
        """See `AnswerStream`."""
        return self._blocks.answer(self._reason, _usage(self._usage))

    def _count(self, usage: Any) -> None:
        """Counts are told twice; the later ones are the final ones, where they are told again."""
        if isinstance(usage, dict):
            self._usage.update((name, n) for name, n in usage.items() if n is not None)
