"""What the tests of all providers of models have in common: every wire, and something to ask."""

from __future__ import annotations

from typing import Any

from app.adapters.providers import OpenAiApi, ProviderKind
from app.domain.chat import ChatRequest, ChatRole, Message, Tool, ToolCall

Wire = tuple[ProviderKind, OpenAiApi]
WIRES: list[Wire] = [
    ("openai", "chat"),
    ("openai", "responses"),
    ("anthropic", "chat"),
    ("ollama", "chat"),
    ("yandex", "chat"),
    ("yandex", "responses"),
]
PATHS = {
    ("openai", "chat"): "/v1/chat/completions",
    ("openai", "responses"): "/v1/responses",
    ("anthropic", "chat"): "/v1/messages",
    ("ollama", "chat"): "/api/chat",
    ("yandex", "chat"): "/v1/chat/completions",
    ("yandex", "responses"): "/v1/responses",
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "celsius": {"type": ["number", "null"]}},
    "required": ["city", "celsius"],
    "additionalProperties": False,
}
OPEN_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}
WEATHER = Tool("weather", "The weather of a city.", {"type": "object", "properties": {}})
CALLS = (
    ToolCall("call_a", "weather", '{"city":"Köln"}'),
    ToolCall("call_b", "weather", "{}"),
)


def asked(*messages: Message, **more: Any) -> ChatRequest:
    """A request of `small-1`; without messages it says hello."""
    return ChatRequest("small-1", messages or (Message(ChatRole.USER, "Hello"),), 10, **more)
