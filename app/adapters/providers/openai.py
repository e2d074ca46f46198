"""OpenAI and all that speak its wire: answers, embeddings and the list of models.

Answers have two dialects, `openai_chat.py` and `openai_responses.py`; embeddings and models are the
same in both. https://developers.openai.com/api/reference
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from app.adapters.providers.endpoint import Endpoint
from app.adapters.providers.exchange import EVENT_STREAM, AnswerStream, Exchange
from app.adapters.providers.failures import Garbage
from app.adapters.providers.openai_chat import ChatStream, chat_answer, chat_body
from app.adapters.providers.openai_responses import (
    ResponseStream,
    response_answer,
    response_body,
)
from app.adapters.providers.wire import Name, Wire, embeddings_of, read, usage_of
from app.domain.chat import ChatAnswer, ChatRequest, Embeddings


@dataclass(frozen=True, slots=True)
class _Dialect:
    """One of the two ways to ask for an answer; `body` is told whether it is to be streamed."""

    path: str
    body: Callable[[ChatRequest, bool], dict[str, Any]]
    answer: Callable[[bytes], ChatAnswer]
    stream: Callable[[Callable[[str], None]], AnswerStream]


_RESPONSES = _Dialect("/responses", response_body, response_answer, ResponseStream)


def _chat_completions(base_url: str) -> _Dialect:
    body = partial(chat_body, limit_name(base_url))
    return _Dialect("/chat/completions", body, chat_answer, ChatStream)


class OpenAiProvider:
    """One OpenAI-compatible endpoint. Implements `Provider`."""

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str] | None = None) -> None:
        bearer = {}
        if endpoint.key is not None:
            bearer["Authorization"] = f"Bearer {endpoint.key.get_secret_value()}"
        self._exchange = Exchange(endpoint, {**bearer, **(headers or {})})
        is_responses = endpoint.api == "responses"
        self._dialect = _RESPONSES if is_responses else _chat_completions(endpoint.base_url)

    async def chat(
        self, request: ChatRequest, on_text: Callable[[str], None] | None = None
    ) -> ChatAnswer:
        """See `Provider`. The text of a refusal is what the model says about it."""
        dialect = self._dialect
        body = dialect.body(request, on_text is not None)
        if on_text is None:
            return await self._exchange.post(dialect.path, body, request.timeout_s, dialect.answer)
        return await self._exchange.stream(
            dialect.path, body, request.timeout_s, EVENT_STREAM, dialect.stream(on_text)
        )

    async def embed(self, model: str, texts: Sequence[str], timeout_s: float) -> Embeddings:
        """See `Provider`. Vendors bound how many texts they take; the answer has 8 MiB at most."""
        body = {"model": model, "input": list(texts)}

        def parse(payload: bytes) -> Embeddings:
            found = read(_Embeddings, payload)
            items = sorted(found.data, key=lambda item: item.index)
            if [item.index for item in items] != list(range(len(texts))):
                raise Garbage("does not number its vectors like the texts")
            counts = found.usage if isinstance(found.usage, dict) else {}
            usage = usage_of(counts.get("prompt_tokens"), 0)
            return embeddings_of([item.embedding for item in items], texts, usage)

        return await self._exchange.post("/embeddings", body, timeout_s, parse)

    async def models(self, timeout_s: float) -> list[str]:
        """See `Provider`."""

        def parse(payload: bytes) -> list[str]:
            return sorted(model.id for model in read(_Models, payload).data)

        return await self._exchange.get("/models", timeout_s, parse)

    async def aclose(self) -> None:
        """See `Provider`."""
        await self._exchange.aclose()


def limit_name(base_url: str) -> str:
    """What chat completions call the limit of output tokens.

    OpenAI's newer models refuse `max_tokens`; many servers that speak its wire know nothing else.
    """
    is_openai = httpx.URL(base_url).host == "api.openai.com"
    return "max_completion_tokens" if is_openai else "max_tokens"


class _Embedding(Wire):
    index: int
    embedding: list[float]


class _Embeddings(Wire):
    data: list[_Embedding]
    usage: Any = None


class _Model(Wire):
    id: Name


class _Models(Wire):
    data: list[_Model]
