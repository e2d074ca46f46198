"""Models: what `adapters/providers/` and `adapters/llm_cache/` are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from app.domain.chat import ChatAnswer, ChatRequest, Embeddings


class Provider(Protocol):
    """One endpoint of a vendor of models. It tries once: retries and breakers are not its job.

    Every call raises `TimeoutError` when its time is over, `LlmUnavailableError` for all else, and
    stops the exchange when it is cancelled. Keys, prompts and answers are in no error and no log.
    """

    async def chat(
        self, request: ChatRequest, on_text: Callable[[str], None] | None = None
    ) -> ChatAnswer:
        """The whole answer. With `on_text` it is streamed, and each piece of text told at once."""
        ...

    async def embed(self, model: str, texts: Sequence[str], timeout_s: float) -> Embeddings:
        """A vector for each text."""
        ...

    async def models(self, timeout_s: float) -> list[str]:
        """The vendor's names of the models that it offers now, sorted."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...


class HotAnswers(Protocol):
    """Copies of cached answers that are quicker to read than the database, and never authoritative.

    Nothing here raises: a copy that can not be had in time is a miss, and one that can not be made
    is none.
    """

    async def get(self, name: str) -> bytes | None:
        """What `put` was given, for as long as it lives."""
        ...

    async def put(self, name: str, body: bytes) -> None:
        """Keep a copy for a while; one that is too large is not kept."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...
